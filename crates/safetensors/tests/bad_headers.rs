//! Every rule that a file can break, broken once; and the good neighbours that must pass.

mod common;

use common::{Raw, plain, raw};
use tierstream_safetensors::{Error, ErrorKind, Header, Index, limits};

fn refused(bytes: &[u8]) -> Error {
    Header::from_bytes(bytes).expect_err("must be refused")
}

macro_rules! assert_refused {
    ($bytes:expr, $($kind:tt)+) => {{
        let error = refused(&$bytes[..]);
        assert!(matches!(error.kind(), $($kind)+), "{error} ({:?})", error.kind());
        error
    }};
}

/// A file of tensors `a`, `b`, ... of type `U8`, at these offsets of `data` bytes.
fn at(offsets: &[(u64, u64)], data: usize) -> Vec<u8> {
    let entry = |(n, (begin, end)): (usize, &(u64, u64))| {
        let (name, len) = (char::from(b'a' + n as u8), end.wrapping_sub(*begin));
        format!(
            "\"{name}\":{{\"dtype\":\"U8\",\"shape\":[{len}],\"data_offsets\":[{begin},{end}]}}"
        )
    };
    let entries: Vec<String> = offsets.iter().enumerate().map(entry).collect();
    raw(format!("{{{}}}", entries.join(",")), &vec![0; data])
}

fn one(dtype: &str, shape: &str, begin: u64, end: u64, data: usize) -> Vec<u8> {
    let json = format!(
        "{{\"t\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}}}"
    );
    raw(json, &vec![0; data])
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let whole = plain(&[Raw::bytes("a", vec![1; 30]), Raw::bytes("b", vec![2; 30])]);
    let data_offset = whole.len() - 60;
    for len in 0..whole.len() {
        let error = refused(&whole[..len]);
        let told = match error.kind() {
            ErrorKind::TooShort { file_len } => *file_len == len as u64 && len < 9,
            ErrorKind::HeaderPastEnd { header_len, file_len } => {
                *header_len == data_offset as u64 - 8 && *file_len == len as u64
            }
            ErrorKind::PastEnd { end, file_len, .. } => *file_len == len as u64 && *end > *file_len,
            _ => false,
        };
        assert!(told, "cut at {len}: {error}");
        assert!(error.hint().is_some());
    }
    let longer = [&whole[..], b"x"].concat();
    assert_refused!(longer, ErrorKind::Trailing { .. });
}

#[test]
fn truncation_names_the_tensor_and_both_sizes() {
    let bytes = at(&[(0, 10), (10, 300)], 100);
    let error = assert_refused!(bytes, ErrorKind::PastEnd { .. });
    assert_eq!(error.tensor(), Some("b"));
    let (begin, end, len) = (bytes.len() - 90, bytes.len() + 200, bytes.len());
    assert_eq!(
        error.to_string(),
        format!(
            "tensor \"b\": the file is truncated: the data needs bytes {begin}..{end}, the file has \
             {len}"
        )
    );
}

#[test]
fn other_files_are_named() {
    for (bytes, expected) in [
        (&b"GGUF\x03\0\0\0\0\0\0\0"[..], "GGUF"),
        (b"PK\x03\x04\x14\0\0\0\0\0\0\0", "zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"<!DOCTYPE html>", "web page"),
        (b"{\"weight_map\":{}}", "JSON"),
        (&[0; 100], "zeros"),
        (b"\x1b[2J\x1b[2J\x1b[2J", "no header"),
    ] {
        let error = assert_refused!(bytes, ErrorKind::NotSafetensors(_));
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!error.to_string().contains('\x1b'));
    }
    // Before the format's first rule was: any JSON may begin with a space, this not.
    assert_refused!(raw(" {}", &[]), ErrorKind::NotSafetensors(_));
}

#[test]
fn absurd_lengths_are_refused_before_they_cost_anything() {
    for len in [100, 1 << 40, u64::MAX, u64::MAX - 7, i64::MAX as u64] {
        let bytes = [&len.to_le_bytes()[..], b"{}"].concat();
        assert_refused!(bytes, ErrorKind::HeaderPastEnd { header_len, .. } if *header_len == len);
    }
    assert_refused!(raw("", &[]), ErrorKind::TooShort { file_len: 8 });
    Header::from_bytes(&raw("{}", &[])).unwrap();
    Header::from_bytes(&raw("{}      ", &[])).unwrap();

    // A sparse file may be as long as it claims to be.
    let folder = common::folder();
    let path = folder.path().join("sparse.safetensors");
    let len = limits::MAX_HEADER_BYTES + 1;
    std::fs::write(&path, [&len.to_le_bytes()[..], b"{"].concat()).unwrap();
    let sparse = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    sparse.set_len(1 << 40).unwrap();
    let error = Header::read(&sparse).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Limit { value, .. } if *value == len), "{error}");
}

#[test]
fn data_is_covered_once() {
    Header::from_bytes(&at(&[(5, 9), (0, 5), (9, 9), (0, 0), (5, 5)], 9)).unwrap();
    let error =
        assert_refused!(at(&[(0, 10), (5, 15)], 15), ErrorKind::Overlap { other } if other == "a");
    assert_eq!(error.tensor(), Some("b"));
    assert_refused!(at(&[(0, 10), (0, 10)], 10), ErrorKind::Overlap { .. });
    assert_refused!(at(&[(0, 10), (5, 5)], 10), ErrorKind::Overlap { .. });
    let error = assert_refused!(at(&[(0, 4), (6, 9)], 9), ErrorKind::Hole { begin: 4, end: 6 });
    assert_eq!(error.tensor(), Some("b"));
    assert_refused!(at(&[(1, 2)], 2), ErrorKind::Hole { begin: 0, end: 1 });
    assert_refused!(at(&[(0, 4)], 5), ErrorKind::Trailing { .. });
    assert_refused!(at(&[], 1), ErrorKind::Trailing { .. });
    assert_refused!(at(&[(7, 3)], 7), ErrorKind::Reversed { begin: 7, end: 3 });
    assert_refused!(at(&[(0, u64::MAX)], 7), ErrorKind::ShapeOverflow { .. });
    assert_refused!(at(&[(0, 1 << 60)], 7), ErrorKind::PastEnd { .. });
    let all_of_64_bits = (1 << 60, u64::MAX);
    assert_refused!(at(&[(0, 1 << 60), all_of_64_bits], 7), ErrorKind::PastEnd { .. });
}

#[test]
fn shapes_and_types() {
    Header::from_bytes(&one("F32", "[2,3]", 0, 24, 24)).unwrap();
    Header::from_bytes(&one("F4", "[2,3]", 0, 3, 3)).unwrap();
    Header::from_bytes(&one("F64", "[7,0,1]", 0, 0, 0)).unwrap();
    let error = assert_refused!(
        one("F32", "[2,3]", 0, 23, 23),
        ErrorKind::WrongBytes { expected: 24, found: 23, .. }
    );
    assert_eq!(error.to_string(), "tensor \"t\": F32 of shape [2, 3] has 24 bytes, its data 23");
    assert_refused!(one("F32", "[]", 0, 0, 0), ErrorKind::WrongBytes { .. });
    assert_refused!(one("F4", "[3]", 0, 1, 1), ErrorKind::PartialByte { .. });
    for shape in ["[18446744073709551615]", "[4294967296,4294967296]", "[18446744073709551615,2,0]"]
    {
        assert_refused!(one("F32", shape, 0, 0, 0), ErrorKind::ShapeOverflow { .. });
    }
    let error = assert_refused!(one("F33", "[]", 0, 4, 4), ErrorKind::UnknownDtype { .. });
    assert_eq!(error.tensor(), Some("t"));
    assert!(error.hint().is_some());
    let dims = |count: usize| format!("[{}]", vec!["1"; count].join(","));
    Header::from_bytes(&one("U8", &dims(limits::MAX_DIMS), 0, 1, 1)).unwrap();
    assert_refused!(one("U8", &dims(limits::MAX_DIMS + 1), 0, 1, 1), ErrorKind::Limit { .. });
    for shape in
        ["[-1]", "[1.0]", "[1e0]", "[18446744073709551616]", "\"1\"", "{}", "null", "[[1]]"]
    {
        let error = assert_refused!(one("U8", shape, 0, 1, 1), ErrorKind::Json { .. });
        assert_eq!(error.tensor(), Some("t"));
    }
}

#[test]
fn names() {
    let entry = "{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}";
    let twice = format!("{{\"a\":{entry},\"b\":{entry},\"\\u0061\":{entry}}}");
    let error = assert_refused!(raw(twice, &[]), ErrorKind::Duplicate);
    assert_eq!(error.tensor(), Some("a"));
    let long = "n".repeat(limits::MAX_NAME_BYTES);
    Header::from_bytes(&raw(format!("{{\"{long}\":{entry}}}"), &[])).unwrap();
    assert_refused!(raw(format!("{{\"{long}n\":{entry}}}"), &[]), ErrorKind::Limit { .. });
    // Whatever is in a name, a terminal is safe.
    let wild = format!("{{\"\\u001b[2J\":{entry},\"\\u001b[2J\":{entry}}}");
    let error = assert_refused!(raw(wild, &[]), ErrorKind::Duplicate);
    assert!(!error.to_string().contains('\x1b'), "{error}");
}

#[test]
fn fields() {
    let with = |fields: &str| raw(format!("{{\"t\":{{{fields}}}}}"), &[0]);
    let (dtype, shape, offsets) = ("\"dtype\":\"U8\"", "\"shape\":[1]", "\"data_offsets\":[0,1]");
    Header::from_bytes(&with(&format!("{offsets},{dtype},{shape}"))).unwrap();
    for fields in [
        format!("{dtype},{shape}"),
        format!("{dtype},{offsets}"),
        format!("{shape},{offsets}"),
        format!("{dtype},{dtype},{shape},{offsets}"),
        format!("{dtype},{shape},{shape},{offsets}"),
        format!("{dtype},{shape},{offsets},{offsets}"),
        format!("{dtype},{shape},\"data_offsets\":[0]"),
        format!("{dtype},{shape},\"data_offsets\":[0,1,1]"),
        format!("{dtype},{shape},\"data_offsets\":[0,-1]"),
        format!("{shape},{offsets},\"dtype\":8"),
        format!("{dtype},{shape},{offsets},\"more\":1"),
        format!("{dtype},{shape},{offsets},\"\":{{}}"),
    ] {
        let error = assert_refused!(with(&fields), ErrorKind::Json { .. });
        assert_eq!(error.tensor(), Some("t"), "{fields}");
    }
    for entry in ["[\"U8\",[1],[0,1]]", "null", "1", "\"U8\""] {
        assert_refused!(raw(format!("{{\"t\":{entry}}}"), &[0]), ErrorKind::Json { .. });
    }
}

#[test]
fn metadata() {
    let with = |metadata: &str| raw(format!("{{\"__metadata__\":{metadata}}}"), &[]);
    let header = Header::from_bytes(&with("{\"format\":\"pt\",\"\":\"\"}")).unwrap();
    assert_eq!(header.metadata()["format"], "pt");
    assert!(Header::from_bytes(&with("null")).unwrap().metadata().is_empty());
    for metadata in ["{\"a\":1}", "{\"a\":null}", "{\"a\":{}}", "[]", "\"a\"", "1"] {
        assert_refused!(with(metadata), ErrorKind::Json { .. });
    }
    let key = |key: &String| key.as_str() == "a";
    assert_refused!(
        with("{\"a\":\"1\",\"b\":\"2\",\"a\":\"1\"}"),
        ErrorKind::DuplicateMetadata { key: k } if key(k)
    );
    assert_refused!(
        raw("{\"__metadata__\":{},\"__metadata__\":{}}", &[]),
        ErrorKind::DuplicateMetadata { .. }
    );
    let pairs = |count: usize| {
        let pairs: Vec<String> = (0..count).map(|n| format!("\"{n}\":\"\"")).collect();
        with(&format!("{{{}}}", pairs.join(",")))
    };
    Header::from_bytes(&pairs(limits::MAX_METADATA_PAIRS)).unwrap();
    assert_refused!(pairs(limits::MAX_METADATA_PAIRS + 1), ErrorKind::Limit { .. });
}

#[test]
fn json() {
    assert_refused!(raw(b"{\"a\xff\":1}", &[]), ErrorKind::NotUtf8 { offset: 11 });
    // However deep, no stack ends: nothing that is kept has a depth, and what an index has besides
    // is passed over.
    let deep =
        |open: &str, close: &str| format!("{}0{}", open.repeat(1 << 20), close.repeat(1 << 20));
    for value in [deep("[", "]"), deep("{\"a\":", "}"), deep("[", "")] {
        for header in [format!("{{\"t\":{value}}}"), format!("{{\"t\":{{\"shape\":{value}}}}}")] {
            assert_refused!(raw(header, &[]), ErrorKind::Json { .. });
        }
        assert_refused!(raw(format!("{{\"__metadata__\":{value}}}"), &[]), ErrorKind::Json { .. });
        let index = Index::from_bytes(format!("{{\"x\":{value},\"weight_map\":{{}}}}").as_bytes());
        assert_eq!(index.is_ok(), value.ends_with([']', '}']));
    }
    for text in [
        "{",
        "{]",
        "{}}",
        "{}x",
        "{}\0",
        "{\"a\"}",
        "{'a':1}",
        "{}{}",
        "{,}",
        "{\"a\":1,}",
        "{\"\\ud800\":1}",
    ] {
        assert_refused!(raw(text, &[]), ErrorKind::Json { .. });
    }
    // The reader quotes what it finds; neither the terminal nor the log is to suffer.
    let long = "x".repeat(100_000);
    let error = assert_refused!(
        one("U8", &format!("\"\\u001b[2J{long}\""), 0, 1, 1),
        ErrorKind::Json { .. }
    );
    assert!(!error.to_string().contains('\x1b') && error.to_string().len() < 500, "{error}");
}

#[test]
fn indices() {
    let refused = |text: &str| Index::from_bytes(text.as_bytes()).expect_err("must be refused");
    for name in ["../a", "/a", "a/b", "a\\\\b", "..", ".", "", "C:a", "\\u0000", "\\u001b[2J"] {
        let error = refused(&format!("{{\"weight_map\":{{\"t\":\"{name}\"}}}}"));
        assert!(matches!(error.kind(), ErrorKind::ShardName { .. }), "{error}");
        assert_eq!(error.tensor(), Some("t"));
        assert!(!error.to_string().contains('\x1b'));
    }
    for text in [
        "",
        "{}",
        "[]",
        "{\"weight_map\":[]}",
        "{\"weight_map\":{\"a\":1}}",
        "{\"weight_map\":{},\"weight_map\":{}}",
        "{\"weight_map\":{}}x",
    ] {
        let error = refused(text);
        assert!(matches!(error.kind(), ErrorKind::Json { .. }), "{text}: {error}");
    }
    let error = refused("{\"weight_map\":{\"a\":\"x\",\"b\":\"x\",\"a\":\"y\"}}");
    assert!(matches!(error.kind(), ErrorKind::Duplicate), "{error}");
    assert_eq!(error.tensor(), Some("a"));
    let bad = Index::from_bytes(b"{\"weight_map\":{\"\xff\":\"x\"}}").unwrap_err();
    assert!(matches!(bad.kind(), ErrorKind::NotUtf8 { .. }), "{bad}");
    let files = |count: usize| {
        let names: Vec<String> = (0..count).map(|n| n.to_string()).collect();
        Index::from_bytes(common::index(names.iter().map(|n| (n.as_str(), n.as_str()))).as_bytes())
    };
    assert_eq!(files(limits::MAX_FILES).unwrap().files().len(), limits::MAX_FILES);
    let error = files(limits::MAX_FILES + 1).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Limit { .. }), "{error}");
}
