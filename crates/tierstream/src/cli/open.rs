//! From flags to a loaded model, with a progress bar.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use tierstream::drive::Io;
use tierstream::ggml::CufilePlaces;
use tierstream::size::{Bytes, PoolShare};
use tierstream::sums::Against;
use tierstream::{
    Engine, Gpu, Keep, Miss, Options, Placement, WeightSums, Weights, cache, gguf, io_config,
    memory,
};

use super::args::{EngineArgs, LoadArgs, MachineArgs, Peer};
use super::interrupt;
use super::named::Named;
use super::output::{self, Failure, Progress};

/// The model's file.
pub(crate) fn path(args: &LoadArgs) -> anyhow::Result<PathBuf> {
    named(&args.model)
}

/// The file that `model` names.
pub(crate) fn named(model: &Path) -> anyhow::Result<PathBuf> {
    Ok(Named::find(model)?.path)
}

/// The flags as the library takes them. Loads ggml's [`backends`] where a GPU is asked for.
/// What weights are compared with is not among them: [`weight_sums`].
pub(crate) fn options(args: &EngineArgs, experts: Option<PoolShare>) -> anyhow::Result<Options> {
    if args.machine.gpu.0.is_none() {
        let miss = args.miss;
        anyhow::ensure!(miss == Miss::Copy, "--miss {miss} is for --gpu: no GPU is to be used");
    }
    // Before all weights are read for it.
    if args.verify_weights && args.machine.io == Io::Cufile {
        let what = "--io cufile reads past host memory, where --verify-weights has weights hashed";
        return Err(Failure::error(what, "leave one of them out"));
    }
    Ok(Options {
        ram_bytes: args.ram.map(|ram| ram.0.min(memory::most_bytes())),
        experts,
        policy: args.policy,
        prefetch: args.prefetch,
        miss: args.miss,
        execution: args.executor,
        threads: args.machine.threads,
        ctx: args.ctx,
        sequences: 1,
        batch: args.batch,
        keep: Keep::Last,
        seed: u64::from(args.seed()),
        weights: Weights::Streamed,
        placement: placement(&args.machine)?,
        vram_bytes: args.machine.vram.map(|b| b.0),
        preload: true,
        pooled: false,
        weight_sums: None,
        io: io_config(args.machine.io),
        io_direct: args.machine.io.is_direct(),
        gpu_reads: args.machine.io.gpu_reads(),
        cufile: CufilePlaces::here(),
    })
}

/// With `--verify-weights`, what the weights in `path` are compared with. If nothing was recorded of
/// them, that reads all of them.
pub(crate) fn weight_sums(
    args: &EngineArgs,
    path: &Path,
) -> anyhow::Result<Option<Arc<WeightSums>>> {
    if !args.verify_weights {
        return Ok(None);
    }
    let progress = Progress::start("reading all weights, to record their checksums");
    let records = cache::weight_sums();
    let sums = WeightSums::of(path, records.as_deref(), args.machine.io, &mut |done| {
        progress.set(done);
        !interrupt::requested()
    });
    drop(progress);
    anyhow::ensure!(!interrupt::requested(), "stopped while the weights were read");
    let sums = sums?;
    sums.notes().iter().for_each(output::note);
    if let (Some(record), Against::FirstLoad) = (sums.record(), sums.against()) {
        output::note(format!(
            "there was nothing to compare the weights with; their checksums are recorded now, for \
             the next load ({})",
            record.display()
        ));
    }
    Ok(Some(Arc::new(sums)))
}

/// Where to compute. Loads ggml's [`backends`] where that is a GPU.
pub(crate) fn placement(args: &MachineArgs) -> anyhow::Result<Placement> {
    let Some(index) = args.gpu.0 else {
        anyhow::ensure!(args.vram.is_none(), "--vram is for --gpu: no GPU is to be used");
        return Ok(Placement::Cpu);
    };
    backends();
    let mut gpus = Gpu::all().map_err(tierstream::Error::from)?;
    if index >= gpus.len() {
        let last = gpus.len() - 1;
        let hint = "`tierstream doctor` lists them";
        return Err(Failure::error(format!("there is no GPU {index}: the last is {last}"), hint));
    }
    Ok(Placement::Gpu(gpus.swap_remove(index)))
}

/// Loads the ggml backends beside the program, usually none, and those of `TIERSTREAM_BACKENDS`.
/// What cannot be used is noted.
pub(crate) fn backends() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for refused in tierstream::ggml::load_backends(None).into_iter().filter_map(Result::err) {
            output::note(refused);
        }
    });
}

/// Loads the model in `path`; notes go to stderr. A request of [`interrupt`] ends it.
pub(crate) fn engine(args: &EngineArgs, path: &Path, options: Options) -> anyhow::Result<Engine> {
    backends();
    let experts = options.experts;
    let engine = quiet_engine(path, options)?;
    let flags = [
        beyond_memory(args),
        beyond_training(args.ctx, &engine),
        more_than_all(experts, &engine),
        experts.and_then(|_| without_experts(&engine)),
        args.machine.threads.and_then(more_than_processors),
    ];
    for note in engine.notes().iter().chain(flags.iter().flatten()) {
        output::note(note);
    }
    Ok(engine)
}

/// The same without notes.
pub(crate) fn quiet_engine(path: &Path, options: Options) -> anyhow::Result<Engine> {
    let progress = Progress::of_load();
    let engine = Engine::load(path, options, &mut |loading| {
        progress.load(loading);
        !interrupt::requested()
    });
    drop(progress);
    anyhow::ensure!(!interrupt::requested(), "stopped while the model was loading");
    Ok(engine?)
}

/// That `--ram` is more than there is, if it is.
pub(crate) fn beyond_memory(args: &EngineArgs) -> Option<String> {
    let most = memory::most_bytes();
    let ram = args.ram.filter(|ram| ram.0 > most)?;
    Some(format!("--ram {ram}: there are {} here, which are the bound", Bytes(most)))
}

fn beyond_training(ctx: Option<u32>, engine: &Engine) -> Option<String> {
    let trained = engine.model().n_ctx_train();
    let ctx = ctx.filter(|&ctx| trained > 0 && ctx > trained)?;
    Some(format!(
        "this model was trained with a context of {trained} tokens: what it writes beyond them, up \
         to --ctx {ctx}, may make no sense"
    ))
}

/// Compute threads wait for each other by spinning.
fn more_than_processors(threads: u32) -> Option<String> {
    let usable = std::thread::available_parallelism().map_or(usize::MAX, |n| n.get());
    (threads as usize > usable).then(|| {
        format!(
            "--threads {threads}: there are {usable} processors; more threads than that slow each \
             other down a hundredfold"
        )
    })
}

fn more_than_all(experts: Option<PoolShare>, engine: &Engine) -> Option<String> {
    let all = engine.model().whole_pool_bytes();
    match experts {
        Some(PoolShare::Bytes(asked))
            if engine.model().pool_share() == Some(1.0) && asked.0 > all =>
        {
            Some(format!("--experts {asked}: all experts of this model fit, {}", Bytes(all)))
        }
        _ => None,
    }
}

fn without_experts(engine: &Engine) -> Option<String> {
    let dense = engine.experts().is_empty();
    dense.then(|| "--experts has no effect: this model has none".to_owned())
}

/// The kind of the model's tokenizer; none for models that take token ids only.
pub(crate) fn tokenizer(file: &gguf::Model) -> Option<String> {
    let kind = file.metadata().str("tokenizer.ggml.model").ok().flatten()?;
    (kind != "no_vocab" && kind != "none").then(|| output::printable(kind))
}

/// Refuses to run llama.cpp beside us with a model that it cannot read.
pub(crate) fn check_peers(file: &gguf::Model, peers: &[Peer]) -> anyhow::Result<()> {
    if peers.is_empty() || file.originals().is_none() {
        return Ok(());
    }
    let hint = "name the GGUF that it was made of, or leave --against out";
    Err(Failure::error("llama.cpp cannot load a packed model", hint))
}

/// Refuses a model that cannot take a text, before its weights are read.
///
/// A file that does not say is left to llama.cpp.
pub(crate) fn check_takes_text(path: &Path) -> anyhow::Result<()> {
    let file = tierstream::pack::open(path).map_err(tierstream::Error::from)?;
    match file.metadata().get("tokenizer.ggml.model") {
        Some(_) if tokenizer(&file).is_none() => Err(no_tokenizer()),
        _ => Ok(()),
    }
}

pub(crate) fn no_tokenizer() -> anyhow::Error {
    Failure::error("this model has no tokenizer", "give it token ids: --prompt-tokens 1,2,3")
}
