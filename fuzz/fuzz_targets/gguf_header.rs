//! Any bytes as a GGUF file: read, joined to a model, its experts grouped, and what was read
//! written again.
//!
//! `cargo +nightly fuzz run gguf_header fuzz/corpus/gguf_header fuzz/seeds/gguf_header`

#![no_main]

use libfuzzer_sys::fuzz_target;
use tierstream_gguf::write::{TensorSpec, encode};
use tierstream_gguf::{Experts, Header, Model, Result};

fuzz_target!(|file: &[u8]| {
    if let Err(error) = use_file(file) {
        // Messages are made from the file's own strings.
        assert!(!error.to_string().contains('\x1b'));
        let _ = error.hint();
    }
});

fn use_file(file: &[u8]) -> Result<()> {
    let header = Header::from_bytes(file)?;
    for tensor in header.tensors() {
        assert!(tensor.offset >= header.data_offset() && tensor.end() <= file.len() as u64);
        assert!(tensor.offset.is_multiple_of(header.alignment()));
    }
    rewrite(&header);
    let model = Model::from_parts(vec![("fuzz.gguf".into(), header)])?;
    let _ = model.check_ggml();
    let experts = Experts::group(&model)?;
    assert_eq!(experts.dense_bytes() + experts.expert_bytes(), model.tensor_bytes());
    for (index, layer) in experts.layers().iter().enumerate() {
        assert!((1..=layer.experts).contains(&layer.used));
        for expert in [0, layer.experts - 1] {
            let record = experts.record(index, expert).expect("an expert of the layer");
            let mut bytes = 0;
            for extent in record {
                assert!(extent.offset + extent.len <= file.len() as u64);
                bytes += extent.len;
            }
            assert_eq!(bytes, layer.record_bytes);
        }
    }
    Ok(())
}

/// What the reader takes, the writer writes and the reader takes again.
fn rewrite(header: &Header) {
    // The padding may be larger than the memory that the fuzzer is given.
    if header.alignment() > 1 << 16 {
        return;
    }
    let spec = |tensor: &tierstream_gguf::Tensor| {
        TensorSpec::new(&tensor.name, tensor.ty, tensor.dims.to_vec())
    };
    let tensors: Vec<TensorSpec> = header.tensors().iter().map(spec).collect();
    let (bytes, written) =
        encode(header.metadata(), &tensors).expect("what was read can be written");
    assert_eq!(written.data_offset(), header.data_offset());
    let (again, _) =
        encode(written.metadata(), &tensors).expect("what was written can be written again");
    assert_eq!(bytes, again);
}
