//! `tierstream eval report`: traces as a page to look at.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;
use tierstream::size::Bytes;
use tierstream_eval::metrics::Options;
use tierstream_eval::page::{self, Made, Plan, Study, quoted};

use super::super::args::{Cli, EvalReport};
use super::super::output::{self, Failure, Progress};
use super::super::trace::beside;
use super::{open, phase};

/// Bytes of a plan at most: real ones have a few thousand.
const PLAN_BYTES_MAX: u64 = 1 << 20;

/// The answer with `--json`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
struct Reported {
    file: String,
    file_bytes: u64,
    traces: Vec<String>,
}

pub(crate) fn report(cli: &Cli, args: &EvalReport) -> anyhow::Result<ExitCode> {
    let stdout = args.output.as_os_str() == "-";
    if stdout && cli.json {
        let message = "the page is what goes to stdout";
        return Err(Failure::error(message, "name a file, or leave --json away"));
    }
    args.traces.iter().try_for_each(|trace| output::check_other(trace, &args.output))?;
    let what = &args.what;
    let options = Options { phase: phase(what), seed: what.seed, ..Options::default() };
    let names: Vec<String> = args.traces.iter().map(|path| path.display().to_string()).collect();
    let plan = args.plan.as_deref().map(plan).transpose()?;
    let progress = Progress::start("measuring");
    let mut studies = Vec::new();
    for (path, name) in args.traces.iter().zip(&names) {
        progress.detail(name.clone());
        let trace = open(path, what)?;
        studies.push(Study::of(name, &trace, &options, what.experts)?);
    }
    drop(progress);
    let html = page::html(&studies, plan.as_ref(), &made(args, &names));
    if stdout {
        output::print(&html)?;
        return Ok(ExitCode::SUCCESS);
    }
    let file_bytes = beside(&args.output, |mut file| Ok(file.write_all(html.as_bytes())?))?;
    let file = args.output.display().to_string();
    if cli.json {
        output::json(&Reported { file, file_bytes, traces: names })?;
    } else {
        output::print(&format!("{file}: {}\n", Bytes(file_bytes)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn plan(path: &Path) -> anyhow::Result<Plan> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(PLAN_BYTES_MAX).read_to_string(&mut text))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Plan::from_json(&text).map_err(|error| {
        let message = format!("{}: {error}", path.display());
        Failure::error(message, "tierstream plan MODEL --json > plan.json writes one")
    })
}

/// The command line, with what it leaves out.
fn made(args: &EvalReport, names: &[String]) -> Made {
    let what = &args.what;
    let mut command = "tierstream eval report".to_owned();
    names.iter().for_each(|name| command.push_str(&format!(" {}", quoted(name))));
    command.push_str(&format!(" --phase {} --seed {}", phase(what).name(), what.seed));
    if let Some(experts) = what.experts {
        command.push_str(&format!(" --experts {experts}"));
    }
    if let Some(plan) = &args.plan {
        command.push_str(&format!(" --plan {}", quoted(&plan.display().to_string())));
    }
    command.push_str(&format!(" -o {}", quoted(&args.output.display().to_string())));
    Made { version: env!("CARGO_PKG_VERSION").to_owned(), command }
}
