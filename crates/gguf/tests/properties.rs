//! What must hold for every file: round trips, and no panic on any bytes.

mod common;

use std::io::Cursor;

use proptest::prelude::*;
use tierstream_gguf::write::{TensorSpec, encode};
use tierstream_gguf::{
    Array, Experts, Header, Metadata, Model, Result, Strings, TensorType, Value,
};

fn array() -> impl Strategy<Value = Array> {
    let strings = prop::collection::vec(prop::collection::vec(any::<u8>(), 0..6), 0..6);
    let leaf = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..6).prop_map(Array::U8),
        prop::collection::vec(any::<i8>(), 0..6).prop_map(Array::I8),
        prop::collection::vec(any::<u16>(), 0..6).prop_map(Array::U16),
        prop::collection::vec(any::<i16>(), 0..6).prop_map(Array::I16),
        prop::collection::vec(any::<u32>(), 0..6).prop_map(Array::U32),
        prop::collection::vec(any::<i32>(), 0..6).prop_map(Array::I32),
        prop::collection::vec(any::<u64>(), 0..6).prop_map(Array::U64),
        prop::collection::vec(any::<i64>(), 0..6).prop_map(Array::I64),
        prop::collection::vec(any::<f32>(), 0..6).prop_map(Array::F32),
        prop::collection::vec(any::<f64>(), 0..6).prop_map(Array::F64),
        prop::collection::vec(any::<bool>(), 0..6).prop_map(Array::Bool),
        strings.prop_map(|strings| Array::Str(strings.iter().collect::<Strings>())),
    ];
    leaf.prop_recursive(3, 16, 3, |inner| {
        prop::collection::vec(inner, 0..3).prop_map(Array::Nested)
    })
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f32>().prop_map(Value::F32),
        any::<f64>().prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        "[^\0]{0,12}".prop_map(Value::Str),
        array().prop_map(Value::Array),
    ]
}

fn metadata() -> impl Strategy<Value = Metadata> {
    let pairs = prop::collection::vec(("x\\.[a-z]{1,6}", value()), 0..8);
    (pairs, prop::option::of(0u32..8)).prop_map(|(pairs, alignment_log2)| {
        let mut metadata = Metadata::new();
        metadata.insert("general.architecture", "toy");
        pairs.into_iter().for_each(|(key, value)| drop(metadata.insert(key, value)));
        if let Some(log2) = alignment_log2 {
            metadata.insert("general.alignment", 1u32 << log2);
        }
        metadata
    })
}

fn tensors() -> impl Strategy<Value = Vec<TensorSpec>> {
    let types: Vec<TensorType> = TensorType::all().collect();
    let tensor = (prop::sample::select(types), 1u64..4, prop::collection::vec(1u64..5, 0..4));
    prop::collection::vec(tensor, 0..6).prop_map(|tensors| {
        let spec = |(index, (ty, blocks, outer)): (usize, (TensorType, u64, Vec<u64>))| {
            let mut dims = vec![blocks * ty.block_elems()];
            dims.extend(outer);
            TensorSpec::new(format!("t.{index}"), ty, dims)
        };
        tensors.into_iter().enumerate().map(spec).collect()
    })
}

/// All that a user of the crate does with a file.
fn use_file(bytes: &[u8]) -> Result<Experts> {
    let model = Model::from_parts(vec![("m".into(), Header::from_bytes(bytes)?)])?;
    for tensor in model.tensors() {
        assert!(tensor.end() <= bytes.len() as u64);
        assert_eq!(model.tensor(&tensor.name), Some(tensor));
    }
    let _ = model.check_ggml();
    let experts = Experts::group(&model)?;
    assert_eq!(experts.expert_bytes() + experts.dense_bytes(), model.tensor_bytes());
    for (index, layer) in experts.layers().iter().enumerate() {
        let last = experts.record(index, layer.experts - 1).expect("a record for each expert");
        assert!(last.map(|extent| extent.len).sum::<u64>() == layer.record_bytes);
        assert!(experts.record(index, layer.experts).is_none());
    }
    Ok(experts)
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(metadata in metadata(), tensors in tensors()) {
        let (mut bytes, written) = encode(&metadata, &tensors).unwrap();
        prop_assert_eq!(bytes.len() as u64, written.data_offset());
        bytes.resize(written.file_len() as usize, 0xaa);
        let read = Header::read(Cursor::new(&bytes)).unwrap();
        prop_assert_eq!(read.tensors(), written.tensors());
        prop_assert_eq!(read.tensors().len(), tensors.len());
        for (tensor, spec) in read.tensors().iter().zip(&tensors) {
            prop_assert_eq!((&tensor.name, tensor.ty), (&spec.name, spec.ty));
            prop_assert_eq!(&*tensor.dims, &spec.dims[..]);
            prop_assert!(tensor.offset.is_multiple_of(read.alignment()));
        }
        // Bytes, because NaN is unequal to itself.
        let (again, _) = encode(read.metadata(), &tensors).unwrap();
        prop_assert_eq!(&again[..], &bytes[..again.len()]);
        use_file(&bytes).unwrap();
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let _ = use_file(&bytes);
        let after_magic = [&b"GGUF\x03\0\0\0"[..], &bytes].concat();
        let _ = use_file(&after_magic);
        let counted = [&common::counts(3, 1, 1)[..], &bytes].concat();
        let _ = use_file(&counted);
    }

    #[test]
    fn damaged_files_do_not_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        bit in any::<prop::sample::Index>(),
    ) {
        let whole = common::file(&common::metadata(), &common::tensors());
        let header_bytes = Header::from_bytes(&whole).unwrap().data_offset() as usize;
        let mut flipped = whole.clone();
        let bit = bit.index(header_bytes * 8);
        flipped[bit / 8] ^= 1 << (bit % 8);
        let _ = use_file(&flipped);
        let mut overwritten = whole;
        damage.iter().for_each(|(at, byte)| overwritten[at.index(header_bytes)] = *byte);
        let _ = use_file(&overwritten);
    }
}

#[test]
fn every_single_bit_flip_is_survived() {
    let whole = common::file(&common::metadata(), &common::tensors());
    let header_bytes = Header::from_bytes(&whole).unwrap().data_offset() as usize;
    let mut refused = 0;
    for bit in 0..header_bytes * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        refused += usize::from(use_file(&flipped).is_err());
    }
    // Most of the header is lengths, types and shapes; letters of names may change unnoticed.
    assert!(refused > header_bytes * 2, "{refused} of {}", header_bytes * 8);
}
