//! Model files that change, and a program that is killed: noticed, and nothing is lost.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{PROMPT, demo, first_byte, json, signal, stderr, stdout, tierstream};

/// A copy of the demo model.
fn copy(dir: &Path) -> PathBuf {
    let path = dir.join("model.gguf");
    fs::copy(demo(), &path).unwrap();
    path
}

/// A run that does not end by itself. Its experts come and go.
fn endless(model: &Path) -> Command {
    let mut command = tierstream();
    command
        .args(["run", model.to_str().unwrap(), PROMPT, "-n", "1000000", "--ctx", "200000"])
        .args(["--temp", "0", "-t", "1", "--experts", "25%"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// The same, when it has begun to write.
fn writing(model: &Path) -> Child {
    let mut child = endless(model).spawn().unwrap();
    first_byte(&mut child);
    child
}

/// Stops it with Ctrl-C.
fn stopped(child: Child) -> Output {
    signal(&child, Signal::INT);
    child.wait_with_output().unwrap()
}

fn write_other(path: &Path) {
    fs::write(path, b"another file").unwrap();
}

#[test]
fn a_replaced_model_is_told() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let other = dir.path().join("other");
    type Replace = fn(&Path, &Path);
    let ways: [(&str, Replace); 4] = [
        ("renamed over", |model, other| {
            write_other(other);
            fs::rename(other, model).unwrap();
        }),
        ("renamed over, with another name left", |model, other| {
            fs::hard_link(model, other.with_extension("link")).unwrap();
            write_other(other);
            fs::rename(other, model).unwrap();
        }),
        ("moved away", |model, other| fs::rename(model, other).unwrap()),
        ("deleted", |model, _| fs::remove_file(model).unwrap()),
    ];
    for (way, replace) in ways {
        let model = copy(dir.path());
        let told = format!(
            "note: {} was replaced; the model in use is the one that was loaded\n",
            model.display()
        );
        let untouched = stopped(writing(&model));
        assert!(!stderr(&untouched).contains("was replaced"), "{way}: {untouched:?}");
        let child = writing(&model);
        replace(&model, &other);
        let output = stopped(child);
        assert_eq!(output.status.code(), Some(130), "{way}: {output:?}");
        assert!(stderr(&output).contains(&told), "{way}: {output:?}");
    }
}

/// The run ends by itself, with an error that names the file.
fn ends(child: Child, model: &Path) -> String {
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = stderr(&output);
    let error = text.lines().find(|l| l.starts_with("error: ")).expect(text);
    assert!(error.contains(model.to_str().unwrap()), "{text}");
    assert!(text.contains("\nhint: "), "{text}");
    text.to_owned()
}

#[test]
fn a_truncated_model_ends_the_run() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = copy(dir.path());
    let bytes = model.metadata().unwrap().len();
    let child = writing(&model);
    OpenOptions::new().write(true).open(&model).unwrap().set_len(bytes / 2).unwrap();
    let text = ends(child, &model);
    assert!(text.contains("is too short") || text.contains("changed while it was open"), "{text}");
}

#[test]
fn a_modified_model_ends_the_run() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = copy(dir.path());
    let child = writing(&model);
    let file = OpenOptions::new().write(true).open(&model).unwrap();
    file.write_all_at(b"other weights", model.metadata().unwrap().len() / 2).unwrap();
    // Files keep time in steps; this is another one for sure.
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    let text = ends(child, &model);
    assert!(text.contains("changed while it was open: its modification time moved"), "{text}");
}

#[test]
fn json_tells_of_a_changed_model() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = copy(dir.path());
    let mut child = endless(&model).arg("--json").spawn().unwrap();
    // This note comes when all is loaded.
    let mut told = String::new();
    let mut errors = io::BufReader::new(child.stderr.take().unwrap());
    while !told.contains("trained with a context of") {
        assert!(io::BufRead::read_line(&mut errors, &mut told).unwrap() > 0, "{told}");
    }
    File::options().write(true).open(&model).unwrap().set_len(1 << 20).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let object: Value = serde_json::from_str(stdout(&output)).expect("one whole object");
    assert!(object["error"].as_str().unwrap().contains(model.to_str().unwrap()), "{object}");
    assert!(object["hint"].is_string(), "{object}");
}

/// All that a run could have changed of a file.
fn state(path: &Path) -> (Vec<u8>, [i64; 6]) {
    let m: Metadata = path.metadata().unwrap();
    let numbers = [
        m.mtime(),
        m.mtime_nsec(),
        m.ctime(),
        m.ctime_nsec(),
        i64::from(m.mode()),
        m.nlink() as i64,
    ];
    (fs::read(path).unwrap(), numbers)
}

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

#[test]
fn a_killed_run_loses_nothing_and_leaves_nothing() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = copy(dir.path());
    let before = state(&model);
    let args = ["run", model.to_str().unwrap(), PROMPT, "-n", "16", "--temp", "0", "-t", "1"];
    let expected = json(&args)["tokens"].clone();
    let (cache, temporary) = (dir.path().join("cache"), dir.path().join("tmp"));
    fs::create_dir(&temporary).unwrap();
    for way in [&["--io", "auto"][..], &["--io", "pread"], &["--io", "buffered"]] {
        let mut child = endless(&model)
            .args(way)
            .env("TIERSTREAM_CACHE", &cache)
            .env("TMPDIR", &temporary)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // In the middle of its work.
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 64]).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(state(&model) == before, "{way:?}: the model is only read");
        assert_eq!(names(&temporary), [""; 0], "{way:?}");
        assert!(!cache.exists(), "{way:?}: {:?}", names(&cache));
        assert_eq!(json(&args)["tokens"], expected, "{way:?}: the next run");
    }
}

/// Killed while it wrote the demo model to its cache: half a file under another name, and, where
/// the machine went down too, under its own.
#[test]
fn half_a_demo_model_in_the_cache_is_written_anew() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let run = || {
        let mut command = tierstream();
        command.args(["run", "demo", PROMPT, "-n", "4"]).env("TIERSTREAM_CACHE", dir.path());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    run();
    let [name] = &names(dir.path())[..] else { panic!("{:?}", names(dir.path())) };
    let path = dir.path().join(name);
    let whole = fs::read(&path).unwrap();
    assert!(whole == fs::read(demo()).unwrap());
    for half in [&whole[..whole.len() / 2], b""] {
        let partial = dir.path().join(name.replace(".gguf", ".1.partial"));
        fs::write(&partial, half).unwrap();
        fs::write(&path, half).unwrap();
        run();
        assert!(fs::read(&path).unwrap() == whole);
    }
    // Of the right size, and not the model.
    let mut wrong = whole.clone();
    wrong[1 << 20] ^= 1;
    fs::write(&path, wrong).unwrap();
    run();
    assert!(fs::read(&path).unwrap() == whole);
}
