//! Any bytes as a safetensors file, read as we do and as the format's own reader does; and as the
//! index of a checkpoint.
//!
//! `cargo +nightly fuzz run safetensors_header fuzz/corpus/safetensors_header
//! fuzz/seeds/safetensors_header`

#![no_main]

use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;
use tierstream_safetensors::{Error, ErrorKind, Header, Index};

fuzz_target!(|bytes: &[u8]| {
    let theirs = SafeTensors::read_metadata(bytes);
    match Header::from_bytes(bytes) {
        Ok(header) => {
            let (_, theirs) = theirs.expect("what we take it takes");
            check(&header, &theirs, bytes.len() as u64);
        }
        Err(error) => {
            check_message(&error);
            assert!(theirs.is_err() || is_ours(&error), "only we refuse it: {error}");
        }
    }
    match Index::from_bytes(bytes) {
        Ok(index) => {
            assert!(index.tensors().is_sorted() && index.files().is_sorted());
            for name in index.files() {
                assert!(!name.contains(['/', '\\', ':', '\0']) && name != ".." && name != ".");
            }
        }
        Err(error) => check_message(&error),
    }
});

/// Tensors without holes from the header to the end, as the format's own reader has them.
fn check(header: &Header, theirs: &safetensors::tensor::Metadata, file_len: u64) {
    let infos = theirs.tensors();
    assert_eq!(infos.len(), header.tensors().len());
    let mut end = header.data_offset();
    for tensor in header.tensors() {
        assert_eq!(tensor.offset, end);
        end = tensor.end();
        let info = infos[&tensor.name];
        assert_eq!(format!("{:?}", info.dtype), tensor.dtype.name());
        assert!(info.shape.iter().map(|dim| *dim as u64).eq(tensor.shape.iter().copied()));
        let begin = info.data_offsets.0 as u64 + header.data_offset();
        assert_eq!(
            (begin, tensor.len),
            (tensor.offset, tensor.elements() * tensor.dtype.bits() / 8)
        );
    }
    assert_eq!(end, file_len);
    let metadata = theirs.metadata().iter().flatten();
    let metadata: std::collections::BTreeMap<&String, &String> = metadata.collect();
    assert!(metadata.into_iter().eq(header.metadata()));
}

/// Whether it breaks a rule that the format has, or we have, and its own reader does not keep.
fn is_ours(error: &Error) -> bool {
    match error.kind() {
        ErrorKind::Duplicate
        | ErrorKind::DuplicateMetadata { .. }
        | ErrorKind::Limit { .. }
        | ErrorKind::NotSafetensors(_) => true,
        // Arrays for objects, and keys that are passed over.
        ErrorKind::Json { message } => {
            ["invalid type: sequence", "unknown field"].iter().any(|text| message.contains(text))
        }
        _ => false,
    }
}

fn check_message(error: &Error) {
    // Messages are made from the file's own strings.
    let text = error.to_string();
    assert!(!text.contains('\x1b') && !text.contains('\n'), "{text:?}");
    let _ = error.hint();
}
