//! From flags to a loaded model, with a progress bar.

use std::borrow::Cow;
use std::path::Path;

use anyhow::Context as _;
use tierstream::size::PoolShare;
use tierstream::{Engine, Options, Weights, demo, io_config};

use super::args::LoadArgs;
use super::interrupt;
use super::output::{self, Progress};

/// The model's file; `demo` is the one in the program.
pub(crate) fn path(args: &LoadArgs) -> anyhow::Result<Cow<'_, Path>> {
    named(&args.model)
}

/// The file that `model` names.
pub(crate) fn named(model: &Path) -> anyhow::Result<Cow<'_, Path>> {
    if model == Path::new("demo") {
        return Ok(Cow::Owned(demo::file().context("cannot write the demo model")?));
    }
    Ok(Cow::Borrowed(model))
}

/// The flags as the library takes them.
pub(crate) fn options(args: &LoadArgs, experts: Option<PoolShare>) -> Options {
    Options {
        ram_bytes: args.ram.map(|b| b.0),
        experts,
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

/// Loads the model; notes go to stderr. A request of [`interrupt`] ends it.
pub(crate) fn engine(args: &LoadArgs, options: Options) -> anyhow::Result<Engine> {
    let path = path(args)?;
    let progress = Progress::start("loading");
    let mut last = 0.0;
    let engine = Engine::load(&path, options, &mut |done| {
        // It runs from 0 to 1 again for the experts that are read ahead.
        if done < last {
            progress.label("reading experts");
        }
        last = done;
        progress.set(done);
        !interrupt::requested()
    });
    drop(progress);
    let engine = engine?;
    for note in engine.notes() {
        output::note(note);
    }
    Ok(engine)
}
