//! What must hold for every file: round trips, agreement with the format's own reader, and no panic
//! on any bytes.

mod common;

use std::collections::BTreeMap;

use common::Raw;
use proptest::prelude::*;
use safetensors::SafeTensors;
use tierstream_safetensors::{Dtype, ErrorKind, Header, Index};

fn tensor() -> impl Strategy<Value = Raw> {
    let dtypes: Vec<Dtype> = Dtype::all().collect();
    let dims = prop::collection::vec(0u64..5, 0..4);
    ("[a-c\u{0}\"\\\\ é😀]{0,6}", prop::sample::select(dtypes), dims, any::<u64>()).prop_map(
        |(name, dtype, mut shape, seed)| {
            // Whole bytes of the small types.
            if dtype.bits() < 8 {
                shape.push(4);
            }
            let len = shape.iter().product::<u64>() * dtype.bits() / 8;
            let bytes = common::Random(seed | 1).bytes(len as usize);
            Raw { name, dtype: dtype.name(), shape, bytes }
        },
    )
}

fn tensors() -> impl Strategy<Value = Vec<Raw>> {
    prop::collection::vec(tensor(), 0..8).prop_map(|tensors| {
        let named = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor));
        named.collect::<BTreeMap<_, _>>().into_values().collect()
    })
}

fn metadata() -> impl Strategy<Value = Option<BTreeMap<String, String>>> {
    prop::option::of(prop::collection::btree_map(".{0,4}", ".{0,4}", 0..4))
}

/// Reads a file as we do and as the package does. What we take it takes too, and the same; what
/// only it takes breaks a rule of ours.
fn agree(file: &[u8]) -> Option<Header> {
    let theirs = SafeTensors::read_metadata(file);
    let ours = match Header::from_bytes(file) {
        Ok(ours) => ours,
        Err(error) => {
            let stricter = match error.kind() {
                ErrorKind::Duplicate
                | ErrorKind::DuplicateMetadata { .. }
                | ErrorKind::Limit { .. }
                | ErrorKind::NotSafetensors(_) => true,
                // It takes `["F32", [1], [0, 4]]` for a tensor, too, and passes over unknown keys.
                ErrorKind::Json { message } => {
                    ["invalid type: sequence", "unknown field"].iter().any(|m| message.contains(m))
                }
                _ => false,
            };
            assert!(stricter || theirs.is_err(), "only we refuse it: {error}");
            return None;
        }
    };
    let (header_len, theirs) = theirs.expect("we have taken it");
    let data_offset = ours.data_offset();
    assert_eq!(data_offset, 8 + header_len as u64);
    let infos = theirs.tensors();
    assert_eq!(infos.len(), ours.tensors().len());
    for tensor in ours.tensors() {
        let info = infos[&tensor.name];
        assert_eq!(format!("{:?}", info.dtype), tensor.dtype.name());
        let shape: Vec<u64> = info.shape.iter().map(|dim| *dim as u64).collect();
        assert_eq!(shape, tensor.shape);
        let (begin, end) = info.data_offsets;
        let range = (begin as u64 + data_offset, end as u64 + data_offset);
        assert_eq!(range, (tensor.offset, tensor.end()));
        assert!(tensor.end() <= file.len() as u64);
    }
    let metadata: BTreeMap<String, String> =
        theirs.metadata().clone().unwrap_or_default().into_iter().collect();
    assert_eq!(&metadata, ours.metadata());
    Some(ours)
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(
        (tensors, listed) in tensors().prop_flat_map(|tensors| {
            let order: Vec<usize> = (0..tensors.len()).collect();
            (Just(tensors), Just(order).prop_shuffle())
        }),
        metadata in metadata(),
        padding in 0usize..9,
    ) {
        let file = common::file(&tensors, &listed, metadata.as_ref(), padding);
        let header = agree(&file).expect("a good file");
        prop_assert_eq!(header.tensors().len(), tensors.len());
        prop_assert_eq!(header.metadata(), &metadata.unwrap_or_default());
        prop_assert_eq!(header.file_len(), file.len() as u64);
        // Names are unique.
        for expected in &tensors {
            let mut named = header.tensors().iter().filter(|tensor| tensor.name == expected.name);
            let tensor = named.next().expect("it is there");
            prop_assert!(named.next().is_none());
            prop_assert_eq!(tensor.dtype.name(), expected.dtype);
            prop_assert_eq!(&tensor.shape, &expected.shape);
            prop_assert_eq!(&file[tensor.offset as usize..tensor.end() as usize], &expected.bytes);
        }
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        data in 0usize..40,
    ) {
        agree(&bytes);
        let _ = Index::from_bytes(&bytes);
        agree(&common::raw([b"{", &bytes[..]].concat(), &vec![0; data]));
        let _ = Index::from_bytes(&[b"{\"weight_map\":", &bytes[..]].concat());
    }

    #[test]
    fn damaged_files_do_not_panic(
        tensors in tensors(),
        metadata in metadata(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        digits in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 0..4),
    ) {
        let listed: Vec<usize> = (0..tensors.len()).collect();
        let whole = common::file(&tensors, &listed, metadata.as_ref(), 1);
        let mut overwritten = whole.clone();
        damage.iter().for_each(|(at, byte)| overwritten[at.index(whole.len())] = *byte);
        agree(&overwritten);
        // Numbers only, for what is well-formed and wrong.
        let places: Vec<usize> = (8..whole.len()).filter(|at| whole[*at].is_ascii_digit()).collect();
        let mut renumbered = whole;
        if !places.is_empty() {
            digits.iter().for_each(|(at, byte)| renumbered[places[at.index(places.len())]] = *byte);
        }
        agree(&renumbered);
    }

    #[test]
    fn indices_are_read_back(
        map in prop::collection::btree_map(".{0,8}", "[a-c]{1,2}\\.safetensors", 0..12),
    ) {
        let pairs = map.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str()));
        let index = Index::from_bytes(common::index(pairs).as_bytes()).unwrap();
        prop_assert_eq!(index.tensors().len(), map.len());
        for (tensor, file) in index.tensors() {
            prop_assert_eq!(&index.files()[*file], &map[tensor]);
        }
        prop_assert!(index.files().is_sorted());
    }
}

#[test]
fn every_single_bit_flip_is_survived() {
    let tensors = [
        Raw { name: "a".into(), dtype: "F32", shape: vec![2, 3], bytes: vec![1; 24] },
        Raw { name: "b".into(), dtype: "U8", shape: vec![], bytes: vec![2] },
    ];
    let whole = common::plain(&tensors);
    let header_bytes = whole.len() - 25;
    let refused = (0..header_bytes * 8).filter(|bit| {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        agree(&flipped).is_none()
    });
    // Letters of names may change unnoticed.
    let refused = refused.count();
    assert!(refused > header_bytes * 7, "{refused} of {}", header_bytes * 8);
}
