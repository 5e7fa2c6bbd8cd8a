//! `tierstream pack`: a copy of a model in which each expert's record is one piece.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tierstream::io::Reader;
use tierstream::pack::{self, Options, Packed, Writer};
use tierstream::size::Bytes;
use tierstream::{Error, gguf, io_config_for};

use super::args::{Cli, Pack};
use super::interrupt::{self, Running};
use super::named::Named;
use super::output::{self, Failure, Progress};

/// The answer of `pack`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
struct Answer {
    model: String,
    file: String,
    experts_only: bool,
    records: u64,
    file_bytes: u64,
    model_bytes: u64,
    written_bytes: u64,
    resumed_bytes: u64,
    total_s: f64,
    write_gbps: Option<f64>,
}

pub(crate) fn pack(cli: &Cli, args: &Pack) -> anyhow::Result<ExitCode> {
    interrupt::install()?;
    let source = Named::find(&args.model)?;
    let model = pack::open(&source.path).map_err(Error::from)?;
    let output = args.output.as_deref().unwrap_or(source.folder());
    check_output(&source.path, output)?;
    let target = pack::target(&source.title(), output);
    let paths: Vec<_> = model.files().iter().map(|file| file.path.clone()).collect();
    let reader = Arc::new(Reader::new(io_config_for(args.io, &paths)?).map_err(Error::from)?);
    let options = Options { experts_only: args.experts_only };
    let start = Instant::now();
    let writer = Writer::new(&model, &target, options, reader).map_err(Error::from)?;
    let packed = write(writer, start).map_err(Error::from)?;
    let answer = answer(&model, args, &packed, start.elapsed());
    if cli.json {
        output::json(&answer)?
    } else {
        output::print(&text(&answer))?
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses what would fail when all is written, and what would cost the model.
fn check_output(model: &Path, output: &Path) -> anyhow::Result<()> {
    let shown = output.display();
    if output.as_os_str().as_encoded_bytes().ends_with(b"/") && !output.is_dir() {
        let hint =
            format!("make it (mkdir -p {shown}), or leave the / away for a file of that name");
        return Err(Failure::error(format!("there is no folder {shown}"), hint));
    }
    let whole = |path: &Path| path.canonicalize().ok();
    if whole(output).is_some_and(|output| Some(output) == whole(model)) {
        let hint = "name another file with -o; the model is only read";
        return Err(Failure::error(format!("{shown} is the model that is to be packed"), hint));
    }
    Ok(())
}

fn write(writer: Writer, start: Instant) -> pack::Result<Packed> {
    let _running = Running::start(None);
    let progress = Progress::start("packing");
    writer.write(&mut |p| {
        progress.set(p.done_bytes as f32 / p.total_bytes.max(1) as f32);
        let rate = (p.done_bytes - p.resumed_bytes) as f64 / start.elapsed().as_secs_f64();
        if rate > 0.0 {
            let left = (p.total_bytes - p.done_bytes) as f64 / rate;
            progress.detail(format!("{}, {} left", output::rate(rate), output::rough(left)));
        }
        !interrupt::requested()
    })
}

fn answer(model: &gguf::Model, args: &Pack, packed: &Packed, total: Duration) -> Answer {
    let written_bytes = packed.total_bytes - packed.resumed_bytes;
    let total_s = total.as_secs_f64();
    Answer {
        model: model.files()[0].path.display().to_string(),
        file: packed.path.display().to_string(),
        experts_only: args.experts_only,
        records: packed.records,
        file_bytes: packed.file_bytes,
        model_bytes: model.file_bytes(),
        written_bytes,
        resumed_bytes: packed.resumed_bytes,
        total_s,
        write_gbps: (written_bytes > 0).then(|| written_bytes as f64 / 1e9 / total_s),
    }
}

fn text(answer: &Answer) -> String {
    let what = match (answer.experts_only, answer.records) {
        (_, 0) => "no expert records".to_owned(),
        (true, n) => format!("{n} expert records alone"),
        (false, n) => format!("{n} expert records"),
    };
    let rate =
        answer.write_gbps.map_or(String::new(), |gbps| format!(", {}", output::rate(gbps * 1e9)));
    let resumed = match answer.resumed_bytes {
        0 => String::new(),
        bytes => format!(" ({} were there from before)", Bytes(bytes)),
    };
    format!(
        "packed {}: {what}, {} in {:.1} s{rate}{resumed}\n",
        output::printable(&answer.file),
        Bytes(answer.file_bytes),
        answer.total_s
    )
}
