//! Agreement with the format authors' own Python reader; see `oracle.py` for how its tables are
//! made. They need no Python: `./x oracle` asks that reader itself, for more files and metadata too.

use std::path::Path;

use tierstream_gguf::{Model, TensorType};

#[test]
fn tensor_types_agree() {
    let table = include_str!("data/tensor_types.txt");
    for line in table.lines() {
        // The package counts two f32 in a Q8_1 block; `block_q8_1` of ggml-common.h has two f16.
        let line = if line == "9 Q8_1 32 40" { "9 Q8_1 32 36" } else { line };
        let id = line.split(' ').next().unwrap().parse().unwrap();
        let ty = TensorType::from_id(id).unwrap();
        assert_eq!(format!("{id} {ty} {} {}", ty.block_elems(), ty.block_bytes()), line);
    }
    // Newer than the package.
    let only_here: Vec<TensorType> = TensorType::all()
        .filter(|ty| !table.lines().any(|line| line.starts_with(&format!("{} ", ty.id()))))
        .collect();
    assert_eq!(only_here, [TensorType::Q2_0]);
}

#[test]
fn the_tensors_of_a_real_file_agree() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf");
    let model = Model::open(path).unwrap();
    let table = include_str!("data/novelist-moe-31m-q4_0.txt");
    assert_eq!(table.lines().count(), model.tensors().len());
    for (tensor, expected) in model.tensors().iter().zip(table.lines()) {
        let dims: Vec<String> = tensor.dims.iter().map(u64::to_string).collect();
        let line = format!(
            "{{\"name\":{:?},\"type\":\"{}\",\"dims\":[{}],\"offset\":{},\"len\":{}}}",
            tensor.name,
            tensor.ty,
            dims.join(","),
            tensor.offset,
            tensor.len
        );
        assert_eq!(line, expected);
    }
}
