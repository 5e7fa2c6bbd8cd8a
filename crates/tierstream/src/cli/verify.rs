//! `tierstream verify`.

use std::process::ExitCode;

use tierstream::size::Bytes;
use tierstream::{Error, Verification, VerifyOptions, verify as verify_model};

use super::args::{Cli, Verify};
use super::open;
use super::output::{self, Progress};

pub(crate) fn verify(cli: &Cli, args: &Verify) -> anyhow::Result<ExitCode> {
    let read = |path: &std::path::PathBuf| {
        std::fs::read_to_string(path).map_err(|source| Error::File { path: path.clone(), source })
    };
    let what = VerifyOptions {
        prompt: args.prompt_file.as_ref().map(read).transpose()?,
        prompt_limit: args.prompt_limit as usize,
        generate: args.tokens as usize,
        seed: args.model.load.seed(),
    };
    let path = open::path(&args.model.load)?;
    let options = open::options(&args.model.load, args.model.experts);
    let progress = Progress::start("comparing");
    let outcome = verify_model(&path, options, &what, &mut |_| true);
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
    output::print(&text)?;
    let e = &outcome.experts;
    output::stderr(&format!(
        "pool of {}: {} experts requested, {} resident, {} read ({})",
        Bytes(e.budget_bytes),
        e.requests,
        e.hits,
        e.faults,
        Bytes(e.bytes_read)
    ));
    Ok(())
}
