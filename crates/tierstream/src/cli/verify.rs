//! `tierstream verify`.

use std::process::ExitCode;

use tierstream::{Error, Verification, VerifyOptions, verify as verify_model};

use super::args::{Cli, Verify};
use super::open;

pub(crate) fn verify(cli: &Cli, args: &Verify) -> anyhow::Result<ExitCode> {
    let read = |path: &std::path::PathBuf| {
        std::fs::read_to_string(path)
            .map_err(|source| Error::File { path: path.clone(), source })
    };
    let what = VerifyOptions {
        prompt: args.prompt_file.as_ref().map(read).transpose()?,
        prompt_limit: args.prompt_limit as usize,
        generate: args.tokens as usize,
        seed: args.model.seed,
    };
    let path = open::path(&args.model)?;
    let outcome = verify_model(&path, open::options(&args.model), &what, &mut |_| true)?;
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
    } else {
        print(&outcome);
    }
    Ok(if outcome.identical { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(outcome: &Verification) {
    let label = if outcome.identical { "identical" } else { "DIFFERENT" };
    println!("{label}: {}/{} tokens", outcome.identical_tokens, outcome.tokens);
    println!("largest difference: {:e}", outcome.max_abs_diff);
    if let Some(first) = outcome.first_difference {
        println!(
            "first difference: token {}, vocabulary entry {}: resident {:e}, streamed {:e}",
            first.token, first.id, first.resident, first.streamed
        );
    }
    let e = &outcome.experts;
    eprintln!(
        "pool of {}: {} experts requested, {} resident, {} read ({})",
        tierstream::size::Bytes(e.budget_bytes),
        e.requests,
        e.hits,
        e.faults,
        tierstream::size::Bytes(e.bytes_read)
    );
}
