//! Prints the header of a model, one JSON object per line. First its metadata: key, type (the
//! number in the file; for arrays also that of their elements), value. Then its tensors: name,
//! type, dims (innermost first), absolute offset, bytes.
//!
//! `cargo run -p tierstream-gguf --example dump -- model.gguf`

use std::error::Error;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use tierstream_gguf::{Array, Model, Value};

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
    for (key, value) in model.metadata().iter() {
        let ty = match value {
            Value::Array(items) => {
                format!("{},{}", value.value_type().id(), items.element_type().id())
            }
            _ => value.value_type().id().to_string(),
        };
        writeln!(out, "{{\"key\":{},\"type\":[{ty}],\"value\":{}}}", string(key), json(value))?;
    }
    for tensor in model.tensors() {
        let dims: Vec<String> = tensor.dims.iter().map(u64::to_string).collect();
        writeln!(
            out,
            "{{\"name\":{},\"type\":\"{}\",\"dims\":[{}],\"offset\":{},\"len\":{}}}",
            string(&tensor.name),
            tensor.ty,
            dims.join(","),
            tensor.offset,
            tensor.len
        )?;
    }
    out.flush()
}

fn json(value: &Value) -> String {
    match value {
        Value::Str(text) => string(text),
        Value::Bool(value) => value.to_string(),
        Value::F32(value) => float((*value).into()),
        Value::F64(value) => float(*value),
        Value::Array(items) => array(items),
        _ => value.integer().expect("all other types are integers").to_string(),
    }
}

fn array(items: &Array) -> String {
    let items: Vec<String> = match items {
        Array::Str(items) => items.iter().map(|s| string(&String::from_utf8_lossy(s))).collect(),
        Array::Bool(items) => items.iter().map(bool::to_string).collect(),
        Array::F32(items) => items.iter().map(|item| float((*item).into())).collect(),
        Array::F64(items) => items.iter().copied().map(float).collect(),
        Array::Nested(items) => items.iter().map(array).collect(),
        _ => (0..items.len()).flat_map(|i| items.integer(i)).map(|i| i.to_string()).collect(),
    };
    format!("[{}]", items.join(","))
}

/// With all digits; JSON has no infinity and no NaN.
fn float(value: f64) -> String {
    if value.is_finite() { format!("{value:?}") } else { "null".into() }
}

/// Quoted as JSON wants it, which `{:?}` does not for what is not printable.
fn string(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\0'..='\x1f' => quoted += &format!("\\u{:04x}", u32::from(c)),
            _ => quoted.push(c),
        }
    }
    quoted + "\""
}
