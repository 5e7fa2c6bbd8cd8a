//! Models that are loaded for the first time, and again: what is found of them, and what is not.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tierstream_gguf::{Experts, Model};
use tierstream_io::{Config, Reader};
use tierstream_sums::{Against, Error, Reference, Result, reference, sum};
use tierstream_synth::{Arch, Spec};

/// A model in a folder of its own, and a folder for records.
struct Case {
    dir: tempfile::TempDir,
    model: PathBuf,
}

impl Case {
    fn new(spec: &Spec) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let written = spec.write(dir.path().join("model.gguf")).unwrap();
        Self { model: written.files[0].clone(), dir }
    }

    fn records(&self) -> PathBuf {
        self.dir.path().join("cache/weights")
    }

    fn of(&self, model: &Path) -> Result<Reference> {
        of(model, Some(&self.records()))
    }

    /// What the folder of records has, without what is no record.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.records()).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn record(&self) -> PathBuf {
        let names = self.names();
        assert_eq!(names.len(), 1, "{names:?}");
        self.records().join(&names[0])
    }
}

fn of(model: &Path, records: Option<&Path>) -> Result<Reference> {
    let reader = Arc::new(Reader::new(Config::default()).unwrap());
    reference(&Model::open(model).unwrap(), records, &reader, &mut |_| true)
}

/// The model that most tests use: small, with experts.
fn olmoe() -> Spec {
    Spec::new(Arch::Olmoe)
}

fn of_layers(n_layer: u32) -> Spec {
    let mut spec = olmoe();
    spec.n_layer = n_layer;
    spec
}

/// Overwrites a byte with another one.
fn flip(path: &Path, at: u64) {
    let mut file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(at)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&[!byte[0]]).unwrap();
}

#[test]
fn the_first_load_records_and_the_next_ones_find_it() {
    for split_bytes in [None, Some(300 << 10)] {
        let mut spec = olmoe();
        spec.split_bytes = split_bytes;
        let case = Case::new(&spec);
        let model = Model::open(&case.model).unwrap();
        assert_eq!(model.files().len() > 1, split_bytes.is_some());
        let first = case.of(&case.model).unwrap();
        assert_eq!((first.against, &first.notes), (Against::FirstLoad, &Vec::new()));
        assert_eq!(first.first.unwrap().0, model.file_bytes());
        assert_eq!(first.record, Some(case.record()));

        // The same as of the bytes.
        let experts = Experts::group(&model).unwrap();
        let part_of =
            |index| experts.layers().iter().find(|l| l.parts.iter().any(|p| p.tensor == index));
        let mut shared = 0;
        for (index, tensor) in model.tensors().iter().enumerate() {
            let whole = fs::read(&model.files()[tensor.file].path).unwrap();
            let bytes = &whole[tensor.offset as usize..(tensor.offset + tensor.len) as usize];
            let shares = part_of(index).map_or(1, |layer| layer.experts as usize);
            shared += usize::from(shares > 1);
            let expected: Vec<u64> = bytes.chunks(bytes.len() / shares).map(sum).collect();
            assert_eq!(first.sums[index], expected, "{}", tensor.name);
        }
        assert!(shared > 0);

        let second = case.of(&case.model).unwrap();
        assert_eq!((second.against, second.first), (Against::Record, None));
        assert_eq!((second.sums, second.record), (first.sums, first.record));
        let (was, is) = (first.recorded.unwrap(), second.recorded.unwrap());
        assert!(was.duration_since(is).unwrap().as_secs() < 1);
        // By another name of the same file, too.
        let link = case.dir.path().join("link.gguf");
        std::os::unix::fs::symlink(&case.model, &link).unwrap();
        if split_bytes.is_none() {
            assert_eq!(case.of(&link).unwrap().against, Against::Record);
        }
    }
}

#[test]
fn weights_that_rot_are_compared_with_what_they_were() {
    let case = Case::new(&olmoe());
    let first = case.of(&case.model).unwrap();
    let model = Model::open(&case.model).unwrap();
    flip(&case.model, model.tensors()[3].offset);
    let second = case.of(&case.model).unwrap();
    assert_eq!((second.against, second.sums), (Against::Record, first.sums));
}

#[test]
fn a_model_that_was_moved_is_found_and_a_copy_is_another_one() {
    let case = Case::new(&olmoe());
    let first = case.of(&case.model).unwrap();
    // Another model may have the same header: one of the same shapes, trained on.
    let copy = case.dir.path().join("copy.gguf");
    fs::copy(&case.model, &copy).unwrap();
    assert_eq!(case.of(&copy).unwrap().against, Against::FirstLoad);
    assert_eq!(case.names().len(), 2);
    fs::remove_file(&copy).unwrap();

    let moved = case.dir.path().join("moved/model.gguf");
    fs::create_dir(moved.parent().unwrap()).unwrap();
    fs::rename(&case.model, &moved).unwrap();
    let found = case.of(&moved).unwrap();
    assert_eq!((found.against, &found.sums), (Against::Record, &first.sums));
    assert_ne!(found.record, first.record);
    assert!(!first.record.unwrap().exists() || case.names().len() == 2);
    // And from there on it is at its new place.
    let again = case.of(&moved).unwrap();
    assert_eq!((again.against, again.record), (Against::Record, found.record));
}

#[test]
fn a_model_that_was_replaced_is_told_from_one_that_rotted() {
    let case = Case::new(&olmoe());
    case.of(&case.model).unwrap();
    let was = fs::metadata(&case.model).unwrap().modified().unwrap();
    let data = Model::open(&case.model).unwrap().files()[0].data_offset;
    // A letter of a token, or a number: some byte that a header may have in another way.
    let whole = fs::read(&case.model).unwrap();
    let name = b"general.architecture";
    let at = whole.windows(name.len()).position(|bytes| bytes == name).unwrap() as u64;
    let harmless = (at..data).find(|&at| {
        flip(&case.model, at);
        let opens = Model::open(&case.model).is_ok_and(|model| model.check_ggml().is_ok());
        let opens = opens && Model::open(&case.model).unwrap().files()[0].data_offset == data;
        if !opens {
            flip(&case.model, at);
        }
        opens
    });
    harmless.expect("a byte that makes another header");
    // Nobody has written to it.
    File::options().write(true).open(&case.model).unwrap().set_modified(was).unwrap();
    let error = case.of(&case.model).unwrap_err();
    assert!(matches!(&error, Error::Header { end, .. } if *end == data), "{error:?}");
    assert!(error.hint().unwrap().contains(case.record().to_str().unwrap()));

    // Somebody has.
    of_layers(olmoe().n_layer + 1).write(&case.model).unwrap();
    let replaced = case.of(&case.model).unwrap();
    assert_eq!((replaced.against, replaced.notes.len()), (Against::FirstLoad, 1));
    assert!(replaced.notes[0].contains("another model"), "{:?}", replaced.notes);
    assert_eq!(case.of(&case.model).unwrap().against, Against::Record);
    assert_eq!(case.names().len(), 1);
}

#[test]
fn a_damaged_record_is_not_trusted() {
    let case = Case::new(&of_layers(1));
    let first = case.of(&case.model).unwrap();
    let record = case.record();
    let whole = fs::read(&record).unwrap();
    for at in (0..whole.len()).step_by(41).chain(0..60).chain([whole.len() - 1]) {
        for bit in [0, 5] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            fs::write(&record, &bytes).unwrap();
            let error = case.of(&case.model).map(|r| r.against).unwrap_err();
            let is_told = matches!(error, Error::Damaged { .. } | Error::Version { .. });
            assert!(is_told, "byte {at}, bit {bit}: {error:?}");
            let hint = error.hint().unwrap();
            assert!(hint.contains(record.to_str().unwrap()), "{hint}");
        }
    }
    for len in (0..whole.len()).step_by(101) {
        fs::write(&record, &whole[..len]).unwrap();
        let error = case.of(&case.model).map(|r| r.against).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{len} bytes: {error:?}");
    }
    let text = String::from_utf8(whole.clone()).unwrap();
    fs::write(&record, text.replacen("version 1,", "version 2,", 1)).unwrap();
    let error = case.of(&case.model).map(|r| r.against).unwrap_err();
    assert!(matches!(&error, Error::Version { version, .. } if version == "2"), "{error:?}");
    // Right in itself, and another model's.
    let other = Case::new(&of_layers(2));
    other.of(&other.model).unwrap();
    fs::copy(other.record(), &record).unwrap();
    let error = case.of(&case.model).map(|r| r.against).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error:?}");

    fs::write(&record, &whole).unwrap();
    assert_eq!(case.of(&case.model).unwrap().sums, first.sums);
    // Without it, there is nothing to compare with.
    fs::remove_file(&record).unwrap();
    assert_eq!(case.of(&case.model).unwrap().against, Against::FirstLoad);
}

#[test]
fn what_cannot_be_recorded_is_told() {
    let case = Case::new(&olmoe());
    // A file where the folder should be.
    fs::create_dir(case.dir.path().join("cache")).unwrap();
    fs::write(case.records(), "").unwrap();
    for folder in [Some(case.records()), None] {
        let first = of(&case.model, folder.as_deref()).unwrap();
        assert_eq!((first.against, first.record), (Against::FirstLoad, None));
        assert!(first.notes[0].contains("cannot be recorded"), "{:?}", first.notes);
    }
}

#[test]
fn a_blob_has_the_sha256_that_its_name_says_or_is_refused() {
    let case = Case::new(&olmoe());
    let digest: String =
        Sha256::digest(fs::read(&case.model).unwrap()).iter().map(|b| format!("{b:02x}")).collect();
    let blob = case.dir.path().join(format!("sha256-{digest}"));
    fs::rename(&case.model, &blob).unwrap();
    let first = case.of(&blob).unwrap();
    assert_eq!((first.against, first.record.is_some()), (Against::Sha256, true));
    assert_eq!(case.of(&blob).unwrap().against, Against::Record);

    fs::remove_file(case.record()).unwrap();
    let model = Model::open(&blob).unwrap();
    let damaged = [model.files()[0].data_offset, model.files()[0].len - 1];
    for at in damaged {
        flip(&blob, at);
        let error = case.of(&blob).map(|r| r.against).unwrap_err();
        assert!(matches!(error, Error::Sha256 { .. }), "{error:?}");
        assert!(case.names().is_empty(), "nothing is recorded of it");
        flip(&blob, at);
    }
    // A link to it is the blob.
    let link = case.dir.path().join("model");
    std::os::unix::fs::symlink(&blob, &link).unwrap();
    assert_eq!(case.of(&link).unwrap().against, Against::Sha256);
}

#[test]
fn who_stops_it_records_nothing() {
    let case = Case::new(&olmoe());
    let model = Model::open(&case.model).unwrap();
    let reader = Arc::new(Reader::new(Config::default()).unwrap());
    let stopped = reference(&model, Some(&case.records()), &reader, &mut |_| false);
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert!(!case.records().exists());
}
