//! `tierstream run`.
use std::ops::ControlFlow;
use std::io::Write;
use std::process::ExitCode;
use super::args::{Cli, Run};
use super::open;

pub(crate) fn run(_cli: &Cli, args: &Run) -> anyhow::Result<ExitCode> {
    let mut engine = open::engine(&args.model, open::options(&args.model))?;
    let prompt = engine.model().vocab().tokenize(args.prompt.as_deref().unwrap_or(""), true, false)?;
    let g = tierstream::Generate { max_tokens: args.n, sampling: tierstream::Sampling { temperature: args.temp, top_k: args.top_k, top_p: args.top_p, min_p: args.min_p, seed: args.model.seed } };
    let done = engine.generate(&prompt, &g, |_, b| { print!("{}", String::from_utf8_lossy(b)); let _ = std::io::stdout().flush(); ControlFlow::Continue(()) })?;
    println!();
    eprintln!("{:.1} tok/s {:?}", done.tok_s(), done.experts);
    Ok(ExitCode::SUCCESS)
}
