//! `tierstream trace MODEL`: prompts that are answered, or texts that are read, and where their tokens are
//! routed to.

use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use serde::Serialize;
use tierstream::ggml::TokenAt;
use tierstream::size::Bytes;
use tierstream::{Engine, Generate, Keep, Options, gguf, pack};
use tierstream_eval::{Phase, Sampling};
use tierstream_server::Params;

use super::prompts::{self, Item};
use crate::cli::args::{Cli, TraceRecord};
use crate::cli::interrupt::{self, Running};
use crate::cli::named::Named;
use crate::cli::open;
use crate::cli::output::{self, Failure, Progress};
use crate::cli::preset::{Own, Preset, Talk};
use crate::cli::recording::{self, Of, Recording};
use crate::cli::run::{self, Goal};

/// Tokens of an answer when no number is given.
const ANSWER_TOKENS: u32 = 256;

/// The answer of `trace MODEL`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
struct Recorded {
    file: String,
    file_bytes: u64,
    model: String,
    layers: usize,
    experts: u32,
    used: u32,
    prompts: u32,
    tokens: super::Tokens,
    total_s: f64,
    interrupted: bool,
}

pub(super) fn record(cli: &Cli, args: &TraceRecord) -> anyhow::Result<ExitCode> {
    interrupt::install()?;
    let path = args.prompts.as_deref().or(args.text.as_deref()).expect("clap asks for one");
    let items = prompts::read(path, args.prompts.is_some(), args.domain.as_deref())?;
    output::check_other(path, &args.out)?;
    recording::try_path(&args.out)?;
    let load = &args.model.load;
    let named = Named::find(&load.model)?;
    check(&named.path)?;
    let own = Own::read(&named.layers(), args.raw)?;
    // The same trace each time, unless another seed is asked for.
    let params = run::params(load, &args.sampling).or(own.params.clone());
    let params = Params { seed: Some(load.engine.seed().into()), ..params };
    let running = Running::start(None);
    let mut engine = load_engine(args, &named, &params)?;
    drop(running);
    let running = Running::start(Some(engine.cancel_handle()));
    let preset = Preset::new(own, &engine, Talk { raw: args.raw, ..Talk::default() })?;
    let goal = Goal::new(&params, &preset, &mut engine)?;
    let title = named.title();
    let model = title.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let (sampling, source) = match args.prompts {
        Some(_) => (Some(told(&goal.options.sampling)), "tierstream trace --prompts"),
        None => (None, "tierstream trace --text"),
    };
    let header = recording::header(&engine, &model, sampling, source);
    let layers = header.layers.clone();
    engine.context().record_routing(true).map_err(tierstream::Error::from)?;

    let start = Instant::now();
    let recording = Recording::create(&args.out, header)?;
    let mut recorder = Recorder { engine, recording, prompts: 0 };
    let done = match args.prompts {
        Some(_) => {
            let max_tokens = args.tokens.unwrap_or(ANSWER_TOKENS);
            recorder.answers(&items, &preset, &Generate { max_tokens, ..goal.options })
        }
        None => recorder.texts(&items, args.tokens),
    };
    let interrupted = interrupt::exit_code();
    drop(running);
    let Recorder { recording, prompts, .. } = recorder;
    let (prefill, decode) = recording.tokens();
    if prefill + decode == 0 {
        done?;
        anyhow::bail!("stopped before a token was recorded: there is no trace");
    }
    if let Err(error) = done {
        recording.finish()?;
        let kept = format!("what was recorded before is in {}", args.out.display());
        return Err(Failure::error(format!("{error:#}"), kept));
    }
    let recorded = Recorded {
        file: args.out.display().to_string(),
        file_bytes: recording.finish()?,
        model,
        layers: layers.len(),
        experts: layers.iter().map(|layer| layer.experts).max().unwrap_or(0),
        used: layers.iter().map(|layer| layer.used).max().unwrap_or(0),
        prompts,
        tokens: super::Tokens { prefill, decode },
        total_s: start.elapsed().as_secs_f64(),
        interrupted: interrupted.is_some(),
    };
    if cli.json {
        output::json(&recorded)?;
    } else {
        if recorded.interrupted {
            output::note(format!(
                "interrupted after {prompts} of {} prompts or texts",
                items.len()
            ));
        }
        output::print(&format!(
            "{}: {prefill} tokens of prompts and {decode} decoded, {} MoE layers, {} of {} experts, {}\n",
            recorded.file,
            recorded.layers,
            recorded.used,
            recorded.experts,
            Bytes(recorded.file_bytes)
        ))?;
    }
    Ok(interrupted.unwrap_or(ExitCode::SUCCESS))
}

/// Refuses a model that nothing can be recorded of, before its weights are read.
fn check(path: &Path) -> anyhow::Result<()> {
    let file = pack::open(path).map_err(tierstream::Error::from)?;
    let experts = gguf::Experts::group(&file).map_err(tierstream::Error::from)?;
    if experts.is_empty() {
        return Err(no_experts());
    }
    if file.metadata().get("tokenizer.ggml.model").is_some() && open::tokenizer(&file).is_none() {
        let message = "this model has no tokenizer, for prompts and texts";
        let hint = "programs can record its routing with ids of tokens: Context::record_routing";
        return Err(Failure::error(message, hint));
    }
    Ok(())
}

fn no_experts() -> anyhow::Error {
    let message = "this model routes to no experts: there is nothing to record";
    Failure::error(message, "`tierstream list` tells which models have experts")
}

/// The model, with its experts in a pool: nobody else looks where tokens are routed to.
fn load_engine(args: &TraceRecord, named: &Named, params: &Params) -> anyhow::Result<Engine> {
    let engine = &args.model.load.engine;
    let options = open::options(engine, args.model.experts)?;
    let ctx = params.ctx().map_err(run::unmet)?;
    // In a text every token is asked for in every layer, the last one too.
    let keep = if args.prompts.is_some() { Keep::Last } else { Keep::All };
    let options = Options { ctx, keep, pooled: true, ..options };
    let weight_sums = open::weight_sums(engine, &named.path)?;
    let engine = open::engine(engine, &named.path, Options { weight_sums, ..options })?;
    if engine.model().pool_share().is_none() {
        return Err(no_experts());
    }
    Ok(engine)
}

/// How tokens are drawn, as the header of a trace has it.
fn told(sampling: &tierstream::Sampling) -> Sampling {
    Sampling {
        temperature: Some(sampling.temperature),
        top_k: Some(sampling.top_k),
        top_p: Some(sampling.top_p),
        min_p: Some(sampling.min_p),
        seed: Some(sampling.seed.into()),
    }
}

struct Recorder {
    engine: Engine,
    recording: Recording,
    /// Prompts so far. Of a text, each part that fills the context is one.
    prompts: u32,
}

impl Recorder {
    /// Has the model answer prompts, each in a context of its own.
    fn answers(
        &mut self,
        items: &[Item],
        preset: &Preset,
        options: &Generate,
    ) -> anyhow::Result<()> {
        let n_ctx = self.engine.context().options().n_ctx as usize;
        // All of them before the first is answered.
        let prompts = items.iter().map(|item| {
            let (prompt, _) = run::prompt(&self.engine, preset, &item.text)?;
            if prompt.is_empty() {
                let message = format!("{}: an empty prompt", item.from);
                return Err(Failure::error(message, "a model that has no first token needs one"));
            }
            if prompt.len() >= n_ctx {
                let message = format!("{}: {} tokens", item.from, prompt.len());
                let hint = format!("the context has room for {n_ctx}, with the answer: --ctx");
                return Err(Failure::error(message, hint));
            }
            Ok(prompt)
        });
        let prompts = prompts.collect::<anyhow::Result<Vec<_>>>()?;
        let progress = Progress::start("recording answers");
        for (index, (item, prompt)) in items.iter().zip(prompts).enumerate() {
            progress.set(index as f32 / items.len() as f32);
            self.engine.clear();
            // Other draws for each.
            let mut options = options.clone();
            options.sampling.seed = options.sampling.seed.wrapping_add(self.prompts);
            self.engine.generate(&prompt, &options, |_, _| match interrupt::requested() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })?;
            self.take(item, |at| match (at.position as usize) < prompt.len() {
                true => Phase::Prefill,
                false => Phase::Decode,
            })?;
            if interrupt::requested() {
                break;
            }
        }
        Ok(())
    }

    /// Has the model read texts, `most` tokens of each, in parts that fill the context.
    fn texts(&mut self, items: &[Item], most: Option<u32>) -> anyhow::Result<()> {
        let progress = Progress::start("recording texts");
        let n_ctx = self.engine.context().options().n_ctx as usize;
        for (index, item) in items.iter().enumerate() {
            let vocab = self.engine.model().vocab();
            let tokens =
                vocab.tokenize(&item.text, true, false).map_err(tierstream::Error::from)?;
            let tokens = &tokens[..tokens.len().min(most.map_or(usize::MAX, |n| n as usize))];
            // The token that texts begin with, where the model wants one, begins each part.
            let begins = tokens.first().copied().filter(|&first| vocab.bos() == Some(first));
            let (head, rest) = tokens.split_at(usize::from(begins.is_some()));
            for part in rest.chunks((n_ctx - head.len()).max(1)) {
                progress.set(index as f32 / items.len() as f32);
                self.engine.clear();
                let part = [head, part].concat();
                let computed = self.engine.context().decode(&part, Keep::All, |_, _| {});
                self.take(item, |_| Phase::Decode)?;
                match computed {
                    Err(tierstream::ggml::Error::Cancelled) => return Ok(()),
                    computed => computed.map_err(tierstream::Error::from)?,
                }
            }
        }
        Ok(())
    }

    /// Adds what was recorded of a prompt.
    fn take(&mut self, item: &Item, phase: impl Fn(&TokenAt) -> Phase) -> anyhow::Result<()> {
        let routing = self.engine.context().take_routing();
        let batches = routing.map_err(tierstream::Error::from)?;
        let (prompt, domain) = (self.prompts, self.recording.domain(&item.domain)?);
        let of = |at: &TokenAt| Of { prompt, phase: phase(at), domain, has_id: true };
        // A text stands for what is decoded token by token.
        let one_by_one = self.engine.context().options().keep == Keep::All;
        self.recording.push(&batches, one_by_one, of)?;
        self.prompts += 1;
        Ok(())
    }
}
