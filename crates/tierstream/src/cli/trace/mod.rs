//! `tierstream trace`: which experts tokens are routed to, recorded, and in and out of the formats of
//! others.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;
use tierstream::size::Bytes;
use tierstream_eval::{Assume, Format, Phase, Token, Trace, Writer, write_jsonl, write_route_csv};

use super::args::{self, Cli, ExportFormat, TraceExport, TraceFiles, TraceImport};
use super::output::{self, Failure};

mod prompts;
mod record;

pub(crate) fn trace(cli: &Cli, args: &args::Trace) -> anyhow::Result<ExitCode> {
    match (&args.files, &args.record) {
        (Some(TraceFiles::Import(args)), _) => import(cli, args),
        (Some(TraceFiles::Export(args)), _) => export(cli, args),
        (None, Some(args)) => record::record(cli, args),
        (None, None) => unreachable!("clap asks for one of them"),
    }
}

/// The answer of `trace import`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
struct Imported {
    file: String,
    format: String,
    file_bytes: u64,
    model: String,
    layers: usize,
    experts: u32,
    used: u32,
    prompts: usize,
    domains: Vec<String>,
    tokens: Tokens,
}

/// How many tokens there are of each phase.
#[derive(Debug, Serialize)]
struct Tokens {
    prefill: u64,
    decode: u64,
}

fn import(cli: &Cli, args: &TraceImport) -> anyhow::Result<ExitCode> {
    output::check_other(&args.input, &args.output)?;
    let format = Format::detect(&args.input)?;
    let trace = tierstream_eval::read(&args.input, Assume { experts: args.experts })?;
    if args.experts.is_none()
        && matches!(format, Format::Jsonl | Format::PromptCsv | Format::MoeLrc)
    {
        let experts = trace.header().layers[0].experts;
        output::note(format!(
            "{format} may not tell how many experts a layer has; {experts} are taken, --experts N sets it"
        ));
    }
    let file_bytes = write(&trace, &args.output, args.domain.as_deref())?;
    let answer = imported(&trace, args, format, file_bytes);
    if cli.json {
        output::json(&answer)?;
    } else {
        output::print(&format!(
            "{}: {} tokens of prompts and {} decoded, {} MoE layers, {} of {} experts, {}\n",
            answer.file,
            answer.tokens.prefill,
            answer.tokens.decode,
            answer.layers,
            answer.used,
            answer.experts,
            Bytes(file_bytes)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn imported(trace: &Trace, args: &TraceImport, format: Format, file_bytes: u64) -> Imported {
    let layers = &trace.header().layers;
    let mut prompts: Vec<u32> = trace.tokens().iter().map(|token| token.prompt).collect();
    prompts.sort_unstable();
    prompts.dedup();
    let named = trace.domains().names().iter().skip(1).cloned();
    Imported {
        file: args.output.display().to_string(),
        format: format.to_string(),
        file_bytes,
        model: trace.header().model.name.clone(),
        layers: layers.len(),
        experts: layers.iter().map(|layer| layer.experts).max().unwrap_or(0),
        used: layers.iter().map(|layer| layer.used).max().unwrap_or(0),
        prompts: prompts.len(),
        domains: named.chain(args.domain.clone()).collect(),
        tokens: Tokens {
            prefill: trace.count(Phase::Prefill) as u64,
            decode: trace.count(Phase::Decode) as u64,
        },
    }
}

/// Writes a trace as Parquet, beside its place until all of it is there. Returns its size.
fn write(trace: &Trace, path: &Path, domain: Option<&str>) -> anyhow::Result<u64> {
    beside(path, |file| {
        let mut writer = Writer::new(BufWriter::new(file), trace.header().clone())?;
        let mut numbers = Vec::new();
        for name in trace.domains().names() {
            let name = if name.is_empty() { domain.unwrap_or_default() } else { name };
            numbers.push(writer.domain(name)?);
        }
        for (index, token) in trace.tokens().iter().enumerate() {
            let token = Token { domain: numbers[usize::from(token.domain)], ..*token };
            writer.push(&token, trace.row(index), trace.weight_row(index))?;
        }
        writer.finish()?.flush()?;
        Ok(())
    })
}

/// Has `fill` write a file that takes its place when it is whole. Returns its size.
pub(super) fn beside(
    path: &Path,
    fill: impl FnOnce(File) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let failed = || format!("cannot write {}", path.display());
    let file = File::create(&part).with_context(failed)?;
    let written = fill(file).and_then(|()| {
        let bytes = fs::metadata(&part)?.len();
        fs::rename(&part, path)?;
        Ok(bytes)
    });
    written.with_context(failed).inspect_err(|_| {
        // What is left of it is of no use.
        let _ = fs::remove_file(&part);
    })
}

fn export(cli: &Cli, args: &TraceExport) -> anyhow::Result<ExitCode> {
    let stdout = args.output.as_os_str() == "-";
    output::check_other(&args.input, &args.output)?;
    if stdout && cli.json {
        return Err(Failure::error(
            "the trace is what goes to stdout",
            "name a file, or leave --json away",
        ));
    }
    let trace = tierstream_eval::read(&args.input, Assume::default())?;
    let csv = args.output.extension().is_some_and(|extension| extension == "csv");
    let format = args.format.unwrap_or(if csv { ExportFormat::Csv } else { ExportFormat::Jsonl });
    let write = |out: &mut dyn Write| match format {
        ExportFormat::Csv => write_route_csv(&trace, out),
        ExportFormat::Jsonl => write_jsonl(&trace, out),
    };
    if stdout {
        write(&mut BufWriter::new(io::stdout().lock()))
            .context("cannot write to standard output")?;
        return Ok(ExitCode::SUCCESS);
    }
    let file_bytes = beside(&args.output, |file| Ok(write(&mut BufWriter::new(file))?))?;
    let file = args.output.display().to_string();
    if cli.json {
        #[derive(Serialize)]
        struct Exported {
            file: String,
            file_bytes: u64,
        }
        output::json(&Exported { file, file_bytes })?;
    } else {
        output::print(&format!("{file}: {}\n", Bytes(file_bytes)))?;
    }
    Ok(ExitCode::SUCCESS)
}
