//! `tierstream verify`.

use std::process::ExitCode;

use tierstream::size::Bytes;
use tierstream::{Checksums, Error, Stage, Verification, VerifyOptions, verify as verify_model};

use super::args::{Cli, Verify};
use super::open;
use super::output::{self, Progress};

pub(crate) fn verify(cli: &Cli, args: &Verify) -> anyhow::Result<ExitCode> {
    let read = |path: &std::path::PathBuf| {
        std::fs::read_to_string(path).map_err(|source| Error::File { path: path.clone(), source })
    };
    let what = VerifyOptions {
        prompt: args.prompt_file.as_ref().map(read).transpose()?,
        prompt_limit: args.prompt_limit.map(|limit| limit as usize),
        generate: args.tokens as usize,
        seed: args.model.load.engine.seed(),
    };
    let path = open::path(&args.model.load)?;
    let mut options = open::options(&args.model.load.engine, args.model.experts)?;
    open::backends();
    options.weight_sums = open::weight_sums(&args.model.load.engine, &path)?;
    let progress = Progress::start("loading");
    let outcome = verify_model(&path, options, &what, &mut |stage, done| {
        progress.label(match stage {
            Stage::Checking => "checking checksums",
            Stage::Loading => "loading",
            Stage::Comparing => "comparing",
        });
        progress.set(done);
        true
    });
    drop(progress);
    let outcome = outcome?;
    let written = if cli.json { output::json(&outcome) } else { print(&outcome) };
    // A reader who has seen enough does not make different outputs equal.
    match written {
        Err(error) if !output::is_closed_pipe(&error) => return Err(error),
        _ => {}
    }
    Ok(if outcome.identical { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(outcome: &Verification) -> anyhow::Result<()> {
    let label = if outcome.identical { "identical" } else { "DIFFERENT" };
    let mut text = format!(
        "{label}: {}/{} tokens\nlargest difference: {:e}\n",
        outcome.identical_tokens, outcome.tokens, outcome.max_abs_diff
    );
    if let Some(first) = outcome.first_difference {
        text.push_str(&format!(
            "first difference: token {}, vocabulary entry {}: resident {:e}, streamed {:e}\n",
            first.token, first.id, first.resident, first.streamed
        ));
    }
    text.push_str(&pool(outcome));
    if let Some(Checksums { records, tensors, bytes }) = outcome.checksums {
        let all = Bytes(bytes);
        text.push_str(&format!(
            "checksums: right, of {records} records and {tensors} tensors ({all})\n"
        ));
    }
    output::print(&text)
}

/// What the answer holds for.
fn pool(outcome: &Verification) -> String {
    let Some(percent) = outcome.experts_percent else {
        return "pool: none, nothing of this model is streamed\n".to_owned();
    };
    let e = &outcome.experts;
    format!(
        "pool: {}, {percent:.1} % of the experts; {} requested, {} resident, {} read ({})\n",
        Bytes(e.budget_bytes),
        e.requests,
        e.hits,
        e.faults,
        Bytes(e.bytes_read)
    )
}
