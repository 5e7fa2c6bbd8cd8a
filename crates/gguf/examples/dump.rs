//! Prints the tensors of a model, one JSON object per line: name, type, dims (innermost first),
//! absolute offset, bytes.
//!
//! `cargo run -p tierstream-gguf --example dump -- model.gguf`

use std::error::Error;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use tierstream_gguf::Model;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: dump <model.gguf>");
        return ExitCode::from(2);
    };
    let model = match Model::open(path) {
        Ok(model) => model,
        Err(error) => {
            match error.source() {
                Some(reason) => eprintln!("error: {error}: {reason}"),
                None => eprintln!("error: {error}"),
            }
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            return ExitCode::FAILURE;
        }
    };
    match print(&model) {
        Ok(()) => ExitCode::SUCCESS,
        // A closed pipe, as of `head`.
        Err(_) => ExitCode::FAILURE,
    }
}

fn print(model: &Model) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for tensor in model.tensors() {
        let dims: Vec<String> = tensor.dims.iter().map(u64::to_string).collect();
        writeln!(
            out,
            "{{\"name\":{:?},\"type\":\"{}\",\"dims\":[{}],\"offset\":{},\"len\":{}}}",
            tensor.name,
            tensor.ty,
            dims.join(","),
            tensor.offset,
            tensor.len
        )?;
    }
    out.flush()
}
