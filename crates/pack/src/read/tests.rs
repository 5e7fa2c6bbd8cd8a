//! Packed files that are not as they should be.

use proptest::prelude::*;
use tierstream_gguf::Experts;
use tierstream_io::Config;
use tierstream_synth::{Arch, Spec};

use super::*;
use crate::format::{Dense, File, Layer};
use crate::{Options, Writer, sign};

/// A packed file: the bytes of all of it.
fn packed(experts_only: bool) -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/../../target");
    let dir = dir.unwrap();
    let mut spec = Spec::new(Arch::Olmoe).experts(4, 2);
    (spec.n_layer, spec.vocab, spec.split_bytes) = (2, 64, Some(200 << 10));
    let written = spec.write(dir.path().join("model.gguf")).unwrap();
    assert!(written.files.len() > 1);
    let model = Model::open(&written.files[0]).unwrap();
    let path = dir.path().join("model.tspack");
    let reader = Arc::new(Reader::new(Config::default()).unwrap());
    let writer = Writer::new(&model, &path, Options { experts_only }, reader).unwrap();
    writer.write(&mut |_| true).unwrap();
    let bytes = fs::read(&path).unwrap();
    (dir, path, bytes)
}

/// What holds for every model that is read.
fn check(model: &Model, len: u64) {
    let own = |e: &Extent| e.file == 0;
    let mut ranges: Vec<(u64, u64)> = model
        .tensors()
        .iter()
        .flat_map(|t| t.extents())
        .filter(own)
        .map(|extent| (extent.offset, extent.offset + extent.len))
        .collect();
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    assert!(ranges.iter().all(|range| range.0 >= ALIGN && range.1 <= len));
    for tensor in model.tensors() {
        assert_eq!(tensor.extents().map(|extent| extent.len).sum::<u64>(), tensor.len);
    }
    let experts = Experts::group(model).unwrap();
    assert_eq!(experts.expert_bytes() + experts.dense_bytes(), model.tensor_bytes());
}

#[test]
fn it_reads_what_was_packed() {
    for experts_only in [false, true] {
        let (dir, path, bytes) = packed(experts_only);
        let pack = Pack::open(&path).unwrap();
        check(pack.model(), bytes.len() as u64);
        assert_eq!(pack.is_experts_only(), experts_only);
        let original = Model::open(first(dir.path())).unwrap();
        let model = pack.model();
        assert_eq!(model.metadata(), original.metadata());
        let file = |model: &Model, n: usize| fs::read(&model.files()[n].path).unwrap();
        for (here, there) in model.tensors().iter().zip(original.tensors()) {
            assert_eq!((&here.name, here.ty, here.dims), (&there.name, there.ty, there.dims));
            let data = |model: &Model, e: Extent| {
                file(model, e.file)[e.offset as usize..(e.offset + e.len) as usize].to_vec()
            };
            let ours: Vec<u8> = here.extents().flat_map(|extent| data(model, extent)).collect();
            let theirs: Vec<u8> = there.extents().flat_map(|e| data(&original, e)).collect();
            assert!(ours == theirs, "{}", here.name);
        }
    }
}

/// The first file of the model in a folder.
fn first(dir: &Path) -> PathBuf {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    names.into_iter().find(|p| p.to_string_lossy().contains("-00001-of-")).unwrap()
}

#[test]
fn every_shorter_or_longer_file_is_refused() {
    let (_dir, path, bytes) = packed(false);
    for len in (0..bytes.len()).step_by(997).chain([4095, 4096, 8191, 8192, bytes.len() - 1]) {
        fs::write(&path, &bytes[..len]).unwrap();
        let error = Pack::open(&path).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. } | Error::Length { .. }), "{len}: {error:?}");
        assert!(open(&path).is_err());
    }
    fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
    assert!(matches!(Pack::open(&path), Err(Error::Length { .. })));
}

#[test]
fn a_byte_that_changed_is_noticed_by_reading_or_checking() {
    let (_dir, path, bytes) = packed(false);
    let reader = || Arc::new(Reader::new(Config::default()).unwrap());
    let data_offset = Pack::open(&path).unwrap().model().files()[0].data_offset as usize;
    let (mut read, mut checked) = (0, 0);
    for at in (0..data_offset).step_by(61).chain((data_offset..bytes.len()).step_by(40_009)) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        fs::write(&path, &changed).unwrap();
        match open(&path) {
            Err(_) => read += 1,
            Ok(_) => {
                let pack = Pack::open(&path).unwrap();
                match pack.check(&reader(), &mut |_| true) {
                    Err(Error::Checksum { .. }) => checked += 1,
                    // What lies between sections and tensors is nobody's.
                    other => assert!(other.is_ok() && bytes[at] == 0, "{at}: {other:?}"),
                }
            }
        }
    }
    assert!(read > 50 && checked > 5, "{read} {checked}");
}

/// The file with another index, which has its checksum.
fn with_index(bytes: &[u8], change: impl FnOnce(&mut Index)) -> Vec<u8> {
    let front = Front::decode(bytes[..ALIGN as usize].try_into().unwrap()).unwrap();
    let (start, end) = (front.index.offset as usize, front.data_offset() as usize);
    let mut index = Index::decode(&bytes[start..start + front.index.len as usize]).unwrap();
    change(&mut index);
    let section = index.encode();
    let mut bytes = bytes.to_vec();
    bytes[start..end].fill(0);
    bytes[start..start + section.len()].copy_from_slice(&section);
    bytes[56..64].copy_from_slice(&(section.len() as u64).to_le_bytes());
    sign(&mut bytes);
    bytes
}

#[test]
fn an_index_that_does_not_fit_the_headers_is_refused() {
    let (_dir, _, bytes) = packed(false);
    let len = bytes.len() as u64;
    check(Pack::parse(&with_index(&bytes, |_| {}), len).unwrap().model(), len);
    type Change = fn(&mut Index);
    let changes: [(&str, Change); 16] = [
        ("a place twice", |i| i.dense[1].tensor = i.dense[0].tensor),
        ("no such tensor", |i| i.dense[0].tensor = u32::MAX),
        ("a place missing", |i| _ = i.dense.pop()),
        ("a part missing", |i| _ = i.layers[0].parts.pop()),
        ("another file", |i| i.dense[0].file = 1),
        ("off a block", |i| i.dense[0].offset += 8),
        ("over another", |i| i.dense[0].offset = i.dense[1].offset),
        ("over the index", |i| i.dense[0].offset = 4096),
        ("beyond the end", |i| i.dense[0].offset = 1 << 40),
        ("nowhere", |i| i.layers[0].offset = u64::MAX - 4095),
        ("records apart", |i| i.layers[0].stride += 4096),
        ("records too close", |i| i.layers[0].stride -= 4096),
        ("records in one place", |i| i.layers[0].stride = 0),
        ("parts in one place", |i| i.layers[0].parts[1].1 = 0),
        ("parts off a block", |i| i.layers[0].parts[1].1 += 32),
        ("too few experts", |i| _ = i.layers[0].checksums.pop()),
    ];
    for (what, change) in changes {
        let error = Pack::parse(&with_index(&bytes, change), len).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{what}: {error:?}");
        assert!(error.hint().is_some());
    }
    let more: [(&str, Change); 5] = [
        ("a dense tensor as experts", |i| {
            let Dense { tensor, offset, .. } = i.dense.remove(0);
            let parts = vec![(tensor, 0)];
            i.layers.push(Layer { block: 9, offset, stride: 4096, parts, checksums: vec![0] });
        }),
        ("a longer header", |i| i.files[0].header_len += 1),
        ("a shorter file", |i| i.files[0].len = 10),
        ("a file more", |i| {
            i.files.push(File { len: 0, header_len: 0, name: b"x".to_vec() });
        }),
        ("a NUL in a name", |i| i.files[0].name = b"a\0b".to_vec()),
    ];
    for (what, change) in more {
        assert!(Pack::parse(&with_index(&bytes, change), len).is_err(), "{what}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, cases: 300, ..Default::default()
    })]

    /// Whatever the index and the headers say, with right checksums.
    #[test]
    fn changed_sections_are_read_or_refused(
        changes in prop::collection::vec((0.0f64..1.0, any::<u8>()), 1..6),
        experts_only: bool,
    ) {
        thread_local!(static FILES: [Vec<u8>; 2] = [packed(false).2, packed(true).2]);
        let mut bytes = FILES.with(|files| files[usize::from(experts_only)].clone());
        let len = bytes.len() as u64;
        let front = Front::decode(bytes[..ALIGN as usize].try_into().unwrap()).unwrap();
        bytes.truncate(front.data_offset() as usize);
        let end = (front.index.offset + front.index.len) as usize;
        for (share, byte) in changes {
            // The end of it is the index.
            let at = (share.sqrt() * end as f64) as usize;
            bytes[at] = byte;
        }
        sign(&mut bytes);
        match Pack::parse(&bytes, len) {
            Ok(pack) => check_if_grouped(pack.model(), len),
            Err(error) => prop_assert!(!error.to_string().contains('\x1b'), "{error}"),
        }
    }
}

/// Experts may have become what nobody can group.
fn check_if_grouped(model: &Model, len: u64) {
    if Experts::group(model).is_ok() {
        check(model, len);
    }
}
