//! Any bytes as the first ones of a packed file, with the checksums that they should have: whatever is
//! taken has every tensor in the file once, and no two share a byte.
//!
//! `cargo +nightly fuzz run pack fuzz/corpus/pack fuzz/seeds/pack`

#![no_main]

use libfuzzer_sys::fuzz_target;
use tierstream_gguf::Experts;
use tierstream_pack::{Pack, sign};

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    sign(&mut bytes);
    // As long as it says, so that what it says of its own length is not all that is looked at.
    let len = bytes.get(16..24).map_or(0, |len| u64::from_le_bytes(len.try_into().expect("8")));
    let pack = match Pack::parse(&bytes, len) {
        Ok(pack) => pack,
        Err(error) => {
            assert!(!error.to_string().contains('\x1b'));
            let _ = error.hint();
            return;
        }
    };
    let model = pack.model();
    let mut ranges = Vec::new();
    for tensor in model.tensors() {
        assert_eq!(tensor.extents().map(|extent| extent.len).sum::<u64>(), tensor.len);
        let own = tensor.extents().filter(|extent| extent.file == 0);
        ranges.extend(own.map(|extent| (extent.offset, extent.offset + extent.len)));
    }
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    assert!(ranges.last().is_none_or(|last| last.1 <= len));
    if let Ok(experts) = Experts::group(model) {
        assert_eq!(experts.dense_bytes() + experts.expert_bytes(), model.tensor_bytes());
    }
});
