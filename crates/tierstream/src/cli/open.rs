//! From flags to a loaded model, with a progress bar.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tierstream::{Engine, Options, Weights, demo, io_config};

use super::args::ModelArgs;

/// The model's file; `demo` is the one in the program.
pub(crate) fn path(args: &ModelArgs) -> anyhow::Result<Cow<'_, Path>> {
    if args.model == Path::new("demo") {
        return Ok(Cow::Owned(demo::file().context("cannot write the demo model")?));
    }
    Ok(Cow::Borrowed(&args.model))
}

/// The flags as the library takes them.
pub(crate) fn options(args: &ModelArgs) -> Options {
    Options {
        ram_bytes: args.ram.map(|b| b.0),
        experts: args.experts,
        policy: args.policy,
        threads: args.threads,
        ctx: args.ctx,
        batch: args.batch,
        seed: u64::from(args.seed),
        weights: Weights::Streamed,
        preload: true,
        io: io_config(args.io),
    }
}

/// Loads the model; notes go to stderr.
pub(crate) fn engine(args: &ModelArgs, options: Options) -> anyhow::Result<Engine> {
    let path = path(args)?;
    let bar = progress_bar();
    let engine = Engine::load(&path, options, &mut |done| {
        bar.set_position((done * 1000.0) as u64);
        true
    });
    bar.finish_and_clear();
    let engine = engine?;
    for note in engine.notes() {
        eprintln!("note: {note}");
    }
    Ok(engine)
}

/// Appears after a second, on a terminal only.
fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(1000);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("loading {bar:30} {percent:>3} % {elapsed}");
    bar.set_style(style.expect("a constant template").progress_chars("=> "));
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}
