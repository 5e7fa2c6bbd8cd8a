//! Loads a checkpoint and prints its tensors, one JSON object per line: name, dtype, shape, and the
//! CRC-32 of the bytes, as they are loaded into memory of their own (`own`) and of the caller's
//! (`given`). First a line with the metadata.
//!
//! `cargo run -p tierstream-safetensors --example checksums -- <folder or file> [engine]`

use std::error::Error;
use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use tierstream_io::{Config, EngineKind, Reader};
use tierstream_safetensors::{Checkpoint, Loader};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let path = args.next().ok_or("usage: checksums <folder or file> [engine]")?;
    let engine = match args.next() {
        None => EngineKind::Auto,
        Some(name) if name == "uring" => EngineKind::Uring,
        Some(name) if name == "pread" => EngineKind::Pread,
        Some(name) if name == "buffered" => EngineKind::Buffered,
        Some(name) => return Err(format!("no engine {name:?}").into()),
    };
    let reader = Arc::new(Reader::new(Config { engine, ..Config::default() })?);
    let loader = Loader::new(reader, Checkpoint::open(path)?)?;
    let own = loader.load_all(|_| true)?;
    let tensors = loader.checkpoint().tensors();
    let mut given: Vec<Vec<u8>> = tensors.iter().map(|t| vec![0xEE; t.len as usize]).collect();
    let names = tensors.iter().map(|tensor| &tensor.name);
    loader.load_into(names.zip(given.iter_mut().map(Vec::as_mut_slice)), |_| true)?;

    let mut out = BufWriter::new(io::stdout().lock());
    let metadata = loader.checkpoint().files().iter().map(|file| &file.metadata);
    serde_json::to_writer(&mut out, &metadata.collect::<Vec<_>>())?;
    writeln!(out)?;
    for ((tensor, own), given) in own.iter().zip(&given) {
        let line = serde_json::json!({
            "name": tensor.name,
            "dtype": tensor.dtype.name(),
            "shape": tensor.shape,
            "own": crc32(own),
            "given": crc32(given),
        });
        writeln!(out, "{line}")?;
    }
    Ok(out.flush()?)
}

/// As zlib has it: polynomial 0xEDB88320, reflected.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 0 { crc >> 1 } else { (crc >> 1) ^ 0xEDB8_8320 };
    let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), step);
    !bytes.iter().fold(!0, byte)
}
