//! Checkpoints of one file and of several: which files they are, and what index and files must agree
//! in.

mod common;

use std::path::Path;

use common::{Raw, index, plain};
use tierstream_safetensors::{Checkpoint, Error, ErrorKind};

const INDEX: &str = "model.safetensors.index.json";

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    std::fs::write(folder.join(name), bytes).unwrap();
}

/// A file of empty tensors of these names.
fn with(names: &[&str]) -> Vec<u8> {
    let tensors: Vec<Raw> = names.iter().map(|name| Raw::bytes(name, Vec::new())).collect();
    plain(&tensors)
}

fn names(checkpoint: &Checkpoint) -> Vec<&str> {
    checkpoint.tensors().iter().map(|tensor| tensor.name.as_str()).collect()
}

fn refused(path: impl AsRef<Path>) -> Error {
    Checkpoint::open(path).expect_err("must be refused")
}

#[test]
fn a_folder_is_opened_by_what_is_usual_or_alone() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let opened = || names(&Checkpoint::open(dir).unwrap()).join(" ");
    let error = refused(dir);
    assert!(matches!(error.kind(), ErrorKind::NoCheckpoint), "{error}");
    assert_eq!(error.path(), Some(dir));

    write(dir, "README.md", "none");
    write(dir, "b.safetensors", with(&["only"]));
    assert_eq!(opened(), "only");
    write(dir, "c.safetensors", with(&["other"]));
    let error = refused(dir);
    assert!(matches!(error.kind(), ErrorKind::Ambiguous { found } if found.len() == 2), "{error}");
    assert!(error.to_string().contains("\"b.safetensors\", \"c.safetensors\""), "{error}");
    write(dir, "x.safetensors.index.json", index([("only", "b.safetensors")]));
    assert_eq!(opened(), "only");
    write(dir, INDEX, index([("only", "b.safetensors"), ("other", "c.safetensors")]));
    assert_eq!(opened(), "only other");
    write(dir, "model.safetensors", with(&["single"]));
    assert_eq!(opened(), "single");
    // What is there is meant, even if it leads nowhere.
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.join("model.safetensors")).unwrap();
    let error = refused(dir);
    assert!(
        matches!(error.kind(), ErrorKind::Reader(tierstream_io::Error::Open { .. })),
        "{error}"
    );
}

#[test]
fn shards_are_joined() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    // As in the cache of Hugging Face.
    let blobs = tempfile::tempdir().unwrap();
    write(blobs.path(), "1", plain(&[Raw::bytes("z", vec![1, 2]), Raw::bytes("a", vec![3])]));
    write(blobs.path(), "2", plain(&[Raw::bytes("m", vec![4])]));
    let map = [("a", "s-1"), ("m", "s-2"), ("z", "s-1")];
    write(blobs.path(), "i", index(map));
    for (blob, name) in [("1", "s-1"), ("2", "s-2"), ("i", INDEX)] {
        std::os::unix::fs::symlink(blobs.path().join(blob), dir.join(name)).unwrap();
    }
    for path in [dir.to_owned(), dir.join(INDEX)] {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(names(&checkpoint), ["z", "a", "m"]);
        let places: Vec<_> = checkpoint.tensors().iter().map(|t| (t.file, t.len)).collect();
        assert_eq!(places, [(0, 2), (0, 1), (1, 1)]);
        assert_eq!(checkpoint.files()[1].path, dir.join("s-2"));
        assert_eq!(checkpoint.tensor_bytes(), 4);
        for tensor in checkpoint.tensors() {
            assert_eq!(checkpoint.tensor(&tensor.name), Some(tensor));
        }
        assert_eq!(checkpoint.tensor("b"), None);
    }
    // In the folder that one is in, a bare name works too.
    assert_eq!(names(&Checkpoint::open(dir.join("s-2")).unwrap()), ["m"]);
}

#[test]
fn metadata_is_that_of_the_first_file_that_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let file = |name: &str, pairs: &[(&str, &str)]| {
        let pairs = pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        common::file(&[Raw::bytes(name, vec![])], &[0], Some(&pairs), 0)
    };
    write(dir, "s-1", file("a", &[("format", "pt")]));
    write(dir, "s-2", file("b", &[("format", "np"), ("more", "2")]));
    write(dir, INDEX, index([("a", "s-1"), ("b", "s-2")]));
    let checkpoint = Checkpoint::open(dir).unwrap();
    assert_eq!(checkpoint.metadata("format"), Some("pt"));
    assert_eq!(checkpoint.metadata("more"), Some("2"));
    assert_eq!(checkpoint.metadata("none"), None);
    assert_eq!(checkpoint.files()[1].metadata["format"], "np");
}

/// An index of `a` in `s-1` and `b` in `s-2`, and files that do not keep to it.
#[test]
fn index_and_files_must_agree() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    write(dir, INDEX, index([("a", "s-1"), ("b", "s-2")]));
    write(dir, "s-1", with(&["a"]));

    let error = refused(dir);
    assert!(matches!(error.kind(), ErrorKind::MissingShard), "{error}");
    assert_eq!((error.path(), error.tensor()), (Some(&*dir.join("s-2")), Some("b")));
    assert!(error.hint().is_some());

    write(dir, "s-2", with(&["c", "b"]));
    let error = refused(dir);
    assert!(matches!(error.kind(), ErrorKind::NotInIndex { in_file: None }), "{error}");
    assert_eq!((error.path(), error.tensor()), (Some(&*dir.join("s-2")), Some("c")));

    write(dir, "s-2", with(&[]));
    let error = refused(dir);
    assert!(matches!(error.kind(), ErrorKind::NotInShard), "{error}");
    assert_eq!((error.path(), error.tensor()), (Some(&*dir.join("s-2")), Some("b")));

    write(dir, "s-2", with(&["b", "a"]));
    let error = refused(dir);
    let elsewhere = ErrorKind::NotInIndex { in_file: Some("s-1".to_owned()) };
    assert_eq!(error.kind().to_string(), elsewhere.to_string());
    assert_eq!((error.path(), error.tensor()), (Some(&*dir.join("s-2")), Some("a")));

    write(dir, "s-2", [&with(&["b"])[..], b"x"].concat());
    let error = refused(dir);
    assert!(matches!(error.kind(), ErrorKind::Trailing { .. }), "{error}");
    assert_eq!(error.path(), Some(&*dir.join("s-2")));
}

#[test]
fn nothing_outside_of_the_folder_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("inner");
    std::fs::create_dir(&dir).unwrap();
    write(folder.path(), "outside", with(&["a"]));
    let absolute = folder.path().join("outside");
    for name in ["../outside", absolute.to_str().unwrap(), "./../outside", "x/../../outside"] {
        write(&dir, INDEX, index([("a", name)]));
        let error = refused(&dir);
        assert!(matches!(error.kind(), ErrorKind::ShardName { .. }), "{error}");
        assert_eq!((error.path(), error.tensor()), (Some(&*dir.join(INDEX)), Some("a")));
    }
}

#[test]
fn what_is_no_file_is_refused_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let fifo = dir.join("fifo.safetensors");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    std::fs::create_dir(dir.join("folder.json")).unwrap();
    write(dir, INDEX, index([("a", "fifo.safetensors")]));
    for path in [fifo.clone(), dir.join(INDEX), dir.join("missing"), dir.join("missing.json")] {
        let error = refused(&path);
        let open = matches!(error.kind(), ErrorKind::Reader(tierstream_io::Error::Open { .. }));
        assert!(open, "{error}");
        assert!(error.path().is_some());
    }
    write(dir, INDEX, index([("a", "folder.json")]));
    assert!(refused(dir).to_string().contains("folder.json"));
    assert!(matches!(refused(dir.join("folder.json")).kind(), ErrorKind::NoCheckpoint));
}
