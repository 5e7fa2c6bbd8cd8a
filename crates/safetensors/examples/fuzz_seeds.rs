//! Writes the seeds of the fuzz target `safetensors_header`: small whole files, to start from
//! something well-formed.
//!
//! `cargo run -p tierstream-safetensors --example fuzz_seeds -- fuzz/seeds/safetensors_header`

use std::error::Error;
use std::fs;
use std::path::Path;

use tierstream_safetensors::{Dtype, Header, Index};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args_os().nth(1).ok_or("usage: fuzz_seeds <folder>")?;
    let dir = Path::new(&dir);
    fs::create_dir_all(dir)?;

    let mut entries = vec!["\"__metadata__\":{\"format\":\"pt\",\"\":\"\\u00e9\"}".to_owned()];
    let mut end = 0;
    for dtype in Dtype::all() {
        let begin = end;
        end += dtype.bits() / 2;
        entries.push(format!(
            "\"{dtype}\":{{\"dtype\":\"{dtype}\",\"shape\":[2,1,2],\"data_offsets\":[{begin},{end}]}}"
        ));
    }
    write(dir, "dtypes", &entries, end)?;

    let entries = [
        "\"b\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[4,5]}",
        "\"\":{\"shape\":[1],\"data_offsets\":[0,4],\"dtype\":\"F32\"}",
        "\"e\":{\"dtype\":\"I64\",\"shape\":[3,0],\"data_offsets\":[4,4]}",
    ];
    write(dir, "order", &entries.map(str::to_owned), 5)?;
    write(dir, "none", &[], 0)?;

    let index = b"{\"metadata\":{\"total_size\":5},\"weight_map\":{\"a\":\"1\",\"b\":\"2\"}}";
    Index::from_bytes(index)?;
    fs::write(dir.join("index"), index)?;
    Ok(())
}

fn write(dir: &Path, name: &str, entries: &[String], data: u64) -> Result<(), Box<dyn Error>> {
    let json = format!("{{{}}}", entries.join(","));
    let mut bytes = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat();
    bytes.resize(bytes.len() + usize::try_from(data)?, 0);
    Header::from_bytes(&bytes)?;
    fs::write(dir.join(name), bytes)?;
    Ok(())
}
