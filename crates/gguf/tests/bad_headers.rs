//! Every rule that a file can break, broken once; and the good neighbours that must pass.

mod common;

use common::{Raw, counts, file, metadata, string, tensors};
use tierstream_gguf::limits;
use tierstream_gguf::{ErrorKind, Experts, Format, Header, Model, Subject, Value};

const U8: u32 = 0;
const U16: u32 = 2;
const U32: u32 = 4;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STR: u32 = 8;
const ARRAY: u32 = 9;

const TYPE_F32: u32 = 0;
const TYPE_Q4_0: u32 = 2;

macro_rules! assert_refused {
    ($bytes:expr, $($kind:tt)+) => {{
        let error = Header::from_bytes(&$bytes[..]).expect_err("must be refused");
        assert!(matches!(error.kind(), $($kind)+), "{error} ({:?})", error.kind());
        error
    }};
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let whole = file(&metadata(), &tensors());
    let header = Header::from_bytes(&whole).unwrap();
    let last_byte = header.tensors().iter().map(|tensor| tensor.end()).max().unwrap();
    for len in 0..last_byte {
        let error = Header::from_bytes(&whole[..len as usize]).expect_err("cut");
        let told = match error.kind() {
            ErrorKind::Empty => len == 0,
            ErrorKind::HeaderTruncated { needs, has, .. } => {
                needs > has && len < header.data_offset()
            }
            ErrorKind::TensorPastEnd { end, file_len, .. } => *file_len == len && *end > len,
            _ => false,
        };
        assert!(told, "cut at {len}: {error}");
    }
    Header::from_bytes(&whole[..last_byte as usize]).expect("the last padding may be missing");
}

#[test]
fn truncation_names_the_tensor_and_both_sizes() {
    let bytes = Raw::default().tensor("a.weight", &[64], TYPE_F32, 0).data(100).bytes();
    let error = assert_refused!(bytes, ErrorKind::TensorPastEnd { .. });
    assert_eq!(error.subject(), Some(&Subject::Tensor("a.weight".into())));
    assert_eq!(
        error.to_string(),
        "tensor \"a.weight\": the file is truncated: the data needs bytes 64..320, the file has 164 \
         (at byte 24)"
    );
    assert!(error.hint().is_some());
}

#[test]
fn other_files_are_named() {
    assert_refused!(b"", ErrorKind::Empty);
    assert_refused!(b"PK\x03\x04....", ErrorKind::NotGguf(Format::Zip));
    assert_refused!(b"\x20\0\0\0\0\0\0\0{\"a\":{}}", ErrorKind::NotGguf(Format::Safetensors));
    assert_refused!([0; 4096], ErrorKind::NotGguf(Format::Zeros));
    let error = assert_refused!(b"\x1b[2J", ErrorKind::NotGguf(Format::Unknown(_)));
    assert!(!error.to_string().contains('\x1b'));
}

#[test]
fn versions() {
    for version in [2, 3] {
        assert_eq!(Header::from_bytes(&counts(version, 0, 0)).unwrap().version(), version);
    }
    for version in [0, 1, 4, u32::MAX] {
        assert_refused!(counts(version, 0, 0), ErrorKind::Version(_));
    }
    assert_refused!(counts(3u32.swap_bytes(), 0, 0), ErrorKind::BigEndian);
    assert_refused!(counts(1u32.swap_bytes(), 0, 0), ErrorKind::BigEndian);
}

#[test]
fn absurd_counts_are_refused_before_they_cost_anything() {
    for count in [limits::MAX_TENSORS + 1, u64::MAX, i64::MAX as u64, 1 << 40] {
        assert_refused!(counts(3, count, 0), ErrorKind::Limit { .. });
        assert_refused!(counts(3, 0, count), ErrorKind::Limit { .. });
    }
    assert_refused!(counts(3, limits::MAX_TENSORS, 0), ErrorKind::HeaderTruncated { .. });
    assert_refused!(counts(3, 0, limits::MAX_METADATA_PAIRS), ErrorKind::HeaderTruncated { .. });

    for len in [1 << 20, u64::MAX, u64::MAX - 7] {
        let value = len.to_le_bytes();
        assert_refused!(
            Raw::default().pair("k", STR, value).bytes(),
            ErrorKind::HeaderTruncated { .. }
        );
    }
    for (len, ty) in [(1 << 20, U8), (1 << 24, STR), (1 << 24, ARRAY)] {
        let value = [&u32::to_le_bytes(ty)[..], &u64::to_le_bytes(len)].concat();
        assert_refused!(
            Raw::default().pair("k", ARRAY, value).bytes(),
            ErrorKind::HeaderTruncated { .. }
        );
    }
    let value = [&U8.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
    let error =
        assert_refused!(Raw::default().pair("k", ARRAY, value).bytes(), ErrorKind::Limit { .. });
    assert_eq!(error.subject(), Some(&Subject::Key("k".into())));
}

#[test]
fn keys() {
    let one = [1];
    assert_refused!(Raw::default().pair("", U8, one).bytes(), ErrorKind::EmptyKey);
    assert_refused!(Raw::default().pair(b"\xff", U8, one).bytes(), ErrorKind::NotUtf8 { .. });
    assert_refused!(Raw::default().pair("a\0b", U8, one).bytes(), ErrorKind::InteriorNul { .. });
    let long = "k".repeat(limits::MAX_KEY_BYTES as usize);
    Header::from_bytes(&Raw::default().pair(&long, U8, one).bytes()).unwrap();
    assert_refused!(Raw::default().pair(long + "k", U8, one).bytes(), ErrorKind::Limit { .. });
    let twice = Raw::default().pair("b", U8, one).pair("a", U8, one).pair("b", U8, one);
    let error = assert_refused!(twice.bytes(), ErrorKind::Duplicate);
    assert_eq!(error.subject(), Some(&Subject::Key("b".into())));
    // 24 bytes of counts, two pairs of 14.
    assert_eq!(error.offset(), Some(24 + 28));
}

#[test]
fn values() {
    assert_refused!(
        Raw::default().pair("k", 13, [0; 8]).bytes(),
        ErrorKind::UnknownValueType { id: 13 }
    );
    assert_refused!(
        Raw::default().pair("k", BOOL, [2]).bytes(),
        ErrorKind::InvalidBool { value: 2 }
    );
    assert_refused!(
        Raw::default().pair("k", STR, string(b"\xc3")).bytes(),
        ErrorKind::NotUtf8 { .. }
    );
    assert_refused!(
        Raw::default().pair("k", STR, string("a\0")).bytes(),
        ErrorKind::InteriorNul { .. }
    );
    let nan = Raw::default().pair("k", F32, f32::NAN.to_le_bytes()).bytes();
    assert!(Header::from_bytes(&nan).unwrap().metadata().f64("k").unwrap().unwrap().is_nan());
    // Tokens are bytes.
    let tokens =
        [&STR.to_le_bytes()[..], &2u64.to_le_bytes(), &string(b"\xc3"), &string(b"a\0")].concat();
    let header = Header::from_bytes(&Raw::default().pair("k", ARRAY, tokens).bytes()).unwrap();
    let strings: Vec<&[u8]> = header.metadata().strings("k").unwrap().unwrap().iter().collect();
    assert_eq!(strings, [&b"\xc3"[..], b"a\0"]);
}

#[test]
fn nesting_is_bounded() {
    let nested = |levels: u32| {
        let mut value = [&U8.to_le_bytes()[..], &1u64.to_le_bytes(), &[7]].concat();
        for _ in 1..levels {
            value = [&ARRAY.to_le_bytes()[..], &1u64.to_le_bytes(), &value].concat();
        }
        Raw::default()
            .pair("general.architecture", STR, string("a"))
            .pair("k", ARRAY, value)
            .bytes()
    };
    let header = Header::from_bytes(&nested(limits::MAX_ARRAY_DEPTH)).unwrap();
    let model = Model::from_parts(vec![("m".into(), header)]).unwrap();
    assert!(matches!(model.check_ggml().unwrap_err().kind(), ErrorKind::GgmlRefuses(_)));
    assert_refused!(nested(limits::MAX_ARRAY_DEPTH + 1), ErrorKind::Limit { .. });
    assert_refused!(nested(1_000), ErrorKind::Limit { .. });
}

#[test]
fn known_keys_have_their_types() {
    for (key, ty, value) in [
        ("general.architecture", U32, vec![1, 0, 0, 0]),
        ("general.alignment", U16, vec![32, 0]),
        ("general.quantization_version", STR, string("2")),
        ("split.no", U32, vec![0; 4]),
        ("split.count", U8, vec![1]),
        ("split.tensors.count", U32, vec![0; 4]),
    ] {
        let error = assert_refused!(
            Raw::default().pair(key, ty, value).bytes(),
            ErrorKind::WrongType { .. }
        );
        assert_eq!(error.subject(), Some(&Subject::Key(key.into())));
    }
}

#[test]
fn alignment() {
    for value in [0u32, 3, 48, u32::MAX] {
        let bytes = Raw::default().pair("general.alignment", U32, value.to_le_bytes()).bytes();
        assert_refused!(bytes, ErrorKind::InvalidAlignment { .. });
    }
    let bytes = Raw::default().pair("general.alignment", U32, (1u32 << 31).to_le_bytes()).bytes();
    assert_refused!(bytes, ErrorKind::Limit { .. });
    let off = Raw::default().tensor("a", &[4], TYPE_F32, 16).data(64).bytes();
    assert_refused!(off, ErrorKind::Misaligned { offset: 16, alignment: 32 });
    let eight = Raw::default().pair("general.alignment", U32, 16u32.to_le_bytes()).tensor(
        "a",
        &[4],
        TYPE_F32,
        16,
    );
    let header = Header::from_bytes(&eight.data(64).bytes()).unwrap();
    assert_eq!(header.tensors()[0].offset, header.data_offset() + 16);
}

#[test]
fn tensor_names() {
    let named = |name: &[u8]| Raw::default().tensor(name, &[1], TYPE_F32, 0).data(32).bytes();
    Header::from_bytes(&named(&[b'n'; 63])).unwrap();
    assert_refused!(named(&[b'n'; 64]), ErrorKind::Limit { limit: 63, .. });
    assert_refused!(named(b"\xff"), ErrorKind::NotUtf8 { .. });
    assert_refused!(named(b"a\0"), ErrorKind::InteriorNul { .. });
    let twice =
        Raw::default().tensor("a", &[1], TYPE_F32, 0).tensor("a", &[1], TYPE_F32, 32).data(64);
    assert_refused!(twice.bytes(), ErrorKind::Duplicate);
}

#[test]
fn tensor_shapes_and_types() {
    let shaped = |dims: &[u64], ty| Raw::default().tensor("a", dims, ty, 0).data(64).bytes();
    assert_refused!(shaped(&[4, 0], TYPE_F32), ErrorKind::ZeroDimension { dim: 1 });
    assert_refused!(shaped(&[1; 5], TYPE_F32), ErrorKind::Limit { .. });
    assert_refused!(shaped(&[1 << 32, 1 << 32], TYPE_F32), ErrorKind::ShapeOverflow { .. });
    assert_refused!(shaped(&[1 << 62], TYPE_F32), ErrorKind::ShapeOverflow { .. });
    assert_refused!(shaped(&[33], TYPE_Q4_0), ErrorKind::PartialBlock { .. });
    assert_refused!(shaped(&[32], 31), ErrorKind::RemovedTensorType { .. });
    assert_refused!(shaped(&[32], 4), ErrorKind::RemovedTensorType { .. });
    assert_refused!(shaped(&[32], 43), ErrorKind::UnknownTensorType { .. });
    assert_refused!(shaped(&[32], u32::MAX), ErrorKind::UnknownTensorType { .. });
    let scalar = Header::from_bytes(&shaped(&[], TYPE_F32)).unwrap();
    assert_eq!(scalar.tensors()[0].len, 4);
}

#[test]
fn tensor_places() {
    let overlap =
        Raw::default().tensor("b", &[16], TYPE_F32, 32).tensor("a", &[16], TYPE_F32, 0).data(128);
    let error = assert_refused!(overlap.bytes(), ErrorKind::Overlap { .. });
    assert_eq!(error.subject(), Some(&Subject::Tensor("b".into())));
    for offset in [!31, (u64::MAX >> 1) & !31, 1 << 62] {
        let far = Raw::default().tensor("a", &[1], TYPE_F32, offset).data(64).bytes();
        assert_refused!(far, ErrorKind::TensorPastEnd { .. });
    }
    // A gap is good GGUF, but not to ggml.
    let gap = Raw::default().pair("general.architecture", STR, string("a"));
    let gap = gap.tensor("a", &[1], TYPE_F32, 32).data(64).bytes();
    let model = Model::from_parts(vec![("m".into(), Header::from_bytes(&gap).unwrap())]).unwrap();
    let error = model.check_ggml().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::GgmlRefuses(_)));
    assert_eq!(error.path(), Some("m".as_ref()));
}

#[test]
fn a_model_needs_an_architecture() {
    let header = Header::from_bytes(&Raw::default().bytes()).unwrap();
    let error = Model::from_parts(vec![("m.gguf".into(), header)]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::MissingKey));
    assert_eq!(
        error.to_string(),
        "m.gguf: metadata key \"general.architecture\": the key is missing"
    );
}

#[test]
fn the_toy_file_itself_is_good() {
    let header = Header::from_bytes(&file(&metadata(), &tensors())).unwrap();
    assert_eq!(header.metadata().get("toy.expert_count"), Some(&Value::U32(4)));
    let model = Model::from_parts(vec![("m".into(), header)]).unwrap();
    model.check_ggml().unwrap();
    assert_eq!(Experts::group(&model).unwrap().layers().len(), 2);
}
