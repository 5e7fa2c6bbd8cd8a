//! Split models, and files that cannot be opened.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::file;
use tempfile::TempDir;
use tierstream_gguf::write::TensorSpec;
use tierstream_gguf::{ErrorKind, Experts, Format, Metadata, Model, Subject, TensorType};

const PARTS: u16 = 3;

fn part_path(dir: &Path, part: u16) -> PathBuf {
    dir.join(format!("toy-{part:05}-of-{PARTS:05}.gguf"))
}

fn part_metadata(part: u16, tensors: i32) -> Metadata {
    let mut metadata = if part == 1 { common::metadata() } else { Metadata::new() };
    metadata.insert("split.no", part - 1);
    metadata.insert("split.count", PARTS);
    metadata.insert("split.tensors.count", tensors);
    metadata
}

/// Writes the toy model in three parts: the dense tensor, then a layer of experts each.
fn write_split(dir: &Path) -> Vec<TensorSpec> {
    let tensors = common::tensors();
    let count = tensors.len() as i32;
    for (part, range) in [(1, 0..1), (2, 1..4), (3, 4..7)] {
        fs::write(part_path(dir, part), file(&part_metadata(part, count), &tensors[range]))
            .unwrap();
    }
    tensors
}

fn rewrite(dir: &Path, part: u16, tensors: &[TensorSpec], change: impl FnOnce(&mut Metadata)) {
    let mut metadata = part_metadata(part, 7);
    change(&mut metadata);
    fs::write(part_path(dir, part), file(&metadata, tensors)).unwrap();
}

#[test]
fn the_parts_become_one_model() {
    let dir = TempDir::new().unwrap();
    let tensors = write_split(dir.path());
    let model = Model::open(part_path(dir.path(), 1)).unwrap();
    assert_eq!(model.files().len(), 3);
    assert_eq!(model.architecture(), "toy");
    let names: Vec<&str> = model.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, tensors.iter().map(|tensor| tensor.name.as_str()).collect::<Vec<_>>());
    assert_eq!(model.tensor("blk.1.ffn_up_exps.weight").unwrap().file, 2);
    assert_eq!(model.tensor("blk.0.ffn_up_exps.weight").unwrap().file, 1);
    assert_eq!(model.tensor("blk.2.ffn_up_exps.weight"), None);
    model.check_ggml().unwrap();

    let on_disk: u64 =
        (1..=PARTS).map(|part| part_path(dir.path(), part).metadata().unwrap().len()).sum();
    assert_eq!(model.file_bytes(), on_disk);
    let experts = Experts::group(&model).unwrap();
    let files: Vec<usize> = experts.record(1, 3).unwrap().map(|extent| extent.file).collect();
    assert_eq!(files, [2, 2, 2]);
    assert_eq!(experts.size_classes().len(), 1);
}

#[test]
fn a_later_part_points_to_the_first() {
    let dir = TempDir::new().unwrap();
    write_split(dir.path());
    let error = Model::open(part_path(dir.path(), 2)).unwrap_err();
    let ErrorKind::NotFirstPart { part: 2, count: 3, first: Some(first) } = error.kind() else {
        panic!("{error}");
    };
    assert_eq!(*first, part_path(dir.path(), 1));
    assert_eq!(error.hint().unwrap(), format!("open {} instead", first.display()));
}

#[test]
fn a_missing_part_is_named() {
    let dir = TempDir::new().unwrap();
    write_split(dir.path());
    fs::remove_file(part_path(dir.path(), 3)).unwrap();
    let error = Model::open(part_path(dir.path(), 1)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::MissingPart { part: 3, count: 3 }));
    assert_eq!(error.path(), Some(part_path(dir.path(), 3).as_path()));
}

#[test]
fn a_renamed_first_part_is_told() {
    let dir = TempDir::new().unwrap();
    write_split(dir.path());
    let renamed = dir.path().join("model.gguf");
    fs::rename(part_path(dir.path(), 1), &renamed).unwrap();
    let error = Model::open(&renamed).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::SplitFileName { count: 3 }));
    assert!(error.to_string().contains("-00001-of-00003.gguf"), "{error}");
}

#[test]
fn parts_that_disagree_are_refused() {
    let dir = TempDir::new().unwrap();
    let tensors = write_split(dir.path());
    let open = || Model::open(part_path(dir.path(), 1)).unwrap_err();

    rewrite(dir.path(), 2, &tensors[1..4], |metadata| drop(metadata.insert("split.count", 4u16)));
    let error = open();
    assert!(
        matches!(error.kind(), ErrorKind::SplitMismatch { expected: 3, found: 4, .. }),
        "{error}"
    );
    assert_eq!(error.path(), Some(part_path(dir.path(), 2).as_path()));

    rewrite(dir.path(), 2, &tensors[1..4], |metadata| drop(metadata.insert("split.no", 2u16)));
    assert!(matches!(open().kind(), ErrorKind::SplitMismatch { expected: 2, found: 3, .. }));

    rewrite(dir.path(), 2, &tensors[1..3], |_| {});
    assert!(matches!(open().kind(), ErrorKind::SplitMismatch { expected: 7, found: 6, .. }));

    rewrite(dir.path(), 2, &tensors[4..7], |_| {});
    let error = open();
    assert!(matches!(error.kind(), ErrorKind::Duplicate), "{error}");
    assert_eq!(error.path(), Some(part_path(dir.path(), 3).as_path()));

    rewrite(dir.path(), 2, &tensors[1..4], |_| {});
    rewrite(dir.path(), 1, &tensors[..1], |metadata| {
        drop(metadata.insert("split.tensors.count", -1i32))
    });
    assert!(matches!(open().kind(), ErrorKind::OutOfRange { value: -1, .. }));

    rewrite(dir.path(), 1, &tensors[..1], |metadata| {
        drop(metadata.insert("split.count", u16::MAX))
    });
    assert!(matches!(open().kind(), ErrorKind::Limit { .. }));
}

#[test]
fn a_truncated_part_is_named() {
    let dir = TempDir::new().unwrap();
    write_split(dir.path());
    let path = part_path(dir.path(), 2);
    let half = path.metadata().unwrap().len() / 2;
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(half).unwrap();
    let error = Model::open(part_path(dir.path(), 1)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::TensorPastEnd { file_len, .. } if *file_len == half));
    assert_eq!(error.path(), Some(path.as_path()));
    assert!(matches!(error.subject(), Some(Subject::Tensor(_))));
}

#[test]
fn what_is_no_model_file() {
    let dir = TempDir::new().unwrap();
    let error = Model::open(dir.path()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Directory));

    let missing = Model::open(dir.path().join("missing.gguf")).unwrap_err();
    assert!(matches!(missing.kind(), ErrorKind::Io { .. }));
    assert!(std::error::Error::source(&missing).is_some());

    let empty = dir.path().join("empty.gguf");
    fs::write(&empty, b"").unwrap();
    let error = Model::open(&empty).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Empty));
    assert_eq!(error.path(), Some(empty.as_path()));

    let zip = dir.path().join("pytorch_model.bin");
    fs::write(&zip, b"PK\x03\x04rest").unwrap();
    assert!(matches!(Model::open(&zip).unwrap_err().kind(), ErrorKind::NotGguf(Format::Zip)));
}

#[cfg(unix)]
#[test]
fn a_device_is_not_opened() {
    assert!(matches!(Model::open("/dev/zero").unwrap_err().kind(), ErrorKind::NotRegular));
}

#[test]
fn a_sparse_file_of_any_length_costs_its_header() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sparse.gguf");
    let spec = [TensorSpec::new("a", TensorType::F32, [1])];
    fs::write(&path, file(&common::metadata(), &spec)).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(Model::open(&path).unwrap().file_bytes(), 1 << 40);
}
