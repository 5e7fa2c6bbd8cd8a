//! Writes the seeds of the fuzz target `pack`: the first bytes of small packed files, to start from
//! something well-formed.
//!
//! `cargo run -p tierstream-pack --example fuzz_seeds -- fuzz/seeds/pack`

use std::error::Error;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use tierstream_gguf::write::{TensorSpec, encode};
use tierstream_gguf::{Metadata, Model, TensorType};
use tierstream_io::{Config, Reader};
use tierstream_pack::{Options, Pack, Writer};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args_os().nth(1).ok_or("usage: fuzz_seeds <folder>")?;
    let dir = Path::new(&dir);
    fs::create_dir_all(dir)?;
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "m");
    metadata.insert("m.expert_used_count", 1u32);
    let tensors = [
        TensorSpec::new("blk.0.ffn_gate_exps.weight", TensorType::F32, [2, 4, 2]),
        TensorSpec::new("blk.0.ffn_down_exps.weight", TensorType::F16, [4, 2, 2]),
        TensorSpec::new("output.weight", TensorType::F32, [8]),
    ];
    let (mut bytes, header) = encode(&metadata, &tensors)?;
    bytes.resize(header.file_len().try_into()?, 7);
    let source = dir.join("model.gguf");
    fs::write(&source, bytes)?;
    let model = Model::open(&source)?;
    let reader = Arc::new(Reader::new(Config::default())?);
    for (name, experts_only) in [("whole", false), ("experts", true)] {
        let path = dir.join(name);
        let options = Options { experts_only };
        Writer::new(&model, &path, options, reader.clone())?.write(&mut |_| true)?;
        // No more than the index: the weights are not looked at.
        let end = Pack::open(&path)?.model().files()[0].data_offset;
        fs::File::options().write(true).open(&path)?.set_len(end)?;
    }
    fs::remove_file(source)?;
    Ok(())
}
