//! Writes the seeds of the fuzz target `gguf_header`: whole files below 1 KiB, to start from
//! something well-formed.
//!
//! `cargo run -p tierstream-gguf --example fuzz_seeds -- fuzz/seeds/gguf_header`

use std::error::Error;
use std::fs;
use std::path::Path;

use tierstream_gguf::write::{TensorSpec, encode};
use tierstream_gguf::{Array, Metadata, Strings, TensorType};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args_os().nth(1).ok_or("usage: fuzz_seeds <folder>")?;
    let dir = Path::new(&dir);
    fs::create_dir_all(dir)?;

    let mut values = Metadata::new();
    values.insert("general.architecture", "a");
    values.insert("general.alignment", 16u32);
    values.insert("a.bool", true);
    values.insert("a.f32", f32::NAN);
    values.insert("a.i64", -1i64);
    values.insert("a.u8s", vec![1u8, 2]);
    values.insert("a.strs", ["x", "", "yz"].iter().collect::<Strings>());
    values.insert("a.nested", Array::Nested(vec![vec![1u16].into(), vec![0.5f64].into()]));
    write(dir, "values", &values, &[TensorSpec::new("t", TensorType::F32, [2])])?;

    let mut moe = Metadata::new();
    moe.insert("general.architecture", "m");
    moe.insert("m.block_count", 2u32);
    moe.insert("m.nextn_predict_layers", 1u32);
    moe.insert("m.expert_used_count", vec![1u32, 2]);
    let mut tensors = Vec::new();
    for layer in 0..2 {
        for (name, dims) in
            [("gate_up_exps", [2, 2, 2]), ("down_exps", [1, 2, 2]), ("up_chexps", [1, 1, 1])]
        {
            let name = format!("blk.{layer}.ffn_{name}.weight");
            tensors.push(TensorSpec::new(name, TensorType::F16, dims));
        }
    }
    tensors.push(TensorSpec::new("blk.0.ffn_down_exps.bias", TensorType::F32, [2, 2]));
    tensors.push(TensorSpec::new("blk.0.ffn_down_exps.scale", TensorType::F32, [2]));
    write(dir, "experts", &moe, &tensors)
}

fn write(
    dir: &Path,
    name: &str,
    metadata: &Metadata,
    tensors: &[TensorSpec],
) -> Result<(), Box<dyn Error>> {
    let (mut bytes, header) = encode(metadata, tensors)?;
    bytes.resize(header.file_len().try_into()?, 0);
    assert!(bytes.len() <= 1024, "{name}: {} bytes", bytes.len());
    fs::write(dir.join(name), bytes)?;
    Ok(())
}
