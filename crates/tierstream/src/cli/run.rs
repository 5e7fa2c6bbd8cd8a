//! `tierstream run`: text in, text out.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, IsTerminal, Read};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use tierstream::{Engine, Generate, Generation, Options, Stop, Token};
use tierstream_chat::{Message, Parser};
use tierstream_server::{ApiError, Params};

use super::args::{Cli, LoadArgs, Run, SamplingArgs};
use super::chat::Chat;
use super::interrupt::{self, Running};
use super::named::Named;
use super::open;
use super::output::{self, Failure, Progress, Tokens};
use super::preset::{self, Own, Preset, Talk};
use super::reply::Manner;
use super::report::Report;

/// Tokens of a completion when no number is given.
const COMPLETION_TOKENS: u32 = 256;

/// Most bytes of a prompt from standard input.
const PROMPT_BYTES_MAX: u64 = 64 << 20;

/// What the model is to go on from.
enum Input {
    Text(String),
    Tokens(Vec<Token>),
    Chat,
}

pub(crate) fn run(cli: &Cli, args: &Run) -> anyhow::Result<ExitCode> {
    interrupt::install()?;
    let input = input(cli, args)?;
    let load = &args.model.load;
    let start = Instant::now();
    let named = Named::find(&load.model)?;
    let path = &named.path;
    if !matches!(input, Input::Tokens(_)) {
        open::check_takes_text(path)?;
    }
    let own = Own::read(&named.layers(), args.raw)?;
    let params = Params {
        num_predict: args.n.map(Into::into),
        stop: (!args.stop.is_empty()).then(|| args.stop.clone()),
        ..params(load, &args.sampling)
    };
    let params = params.or(own.params.clone());
    // As with Ollama, -1 is any.
    let seed = params.seed.filter(|&seed| seed != -1).map(|seed| seed as u32);
    let drawn = seed.unwrap_or_else(random_seed);
    let params = Params { seed: Some(drawn.into()), ..params };
    let options = open::options(&load.engine, args.model.experts)?;
    let ctx = params.ctx().map_err(unmet)?;
    let options = Options { ctx, seed: drawn.into(), ..options };
    // To the end of the report, which a signal must not cut.
    let running = Running::start(None);
    let options = Options { weight_sums: open::weight_sums(&load.engine, path)?, ..options };
    let mut engine = open::engine(&load.engine, path, options)?;
    let talk = Talk { raw: args.raw, system: args.system.as_deref(), think: args.think };
    let preset = Preset::new(own, &engine, talk)?;
    let goal = Goal::new(&params, &preset, &mut engine)?;
    let (prompt, parser) = match input {
        Input::Chat => {
            drop(running);
            return Chat::new(&mut engine, preset, goal, seed, args, cli.verbose)?.run();
        }
        Input::Tokens(tokens) => (tokens, None),
        Input::Text(text) => prompt(&engine, &preset, &text)?,
    };
    check(&engine, &prompt)?;
    let has_text = engine.model().vocab().has_text();
    if !has_text && !args.stop.is_empty() {
        let hint = "--stop is for models that have one; -n ends after so many tokens";
        return Err(Failure::error("this model has no tokenizer", hint));
    }
    let manner = Manner { silent: cli.json, hides_thinking: args.hide_thinking, parser };
    let mut out = Tokens::new(has_text, &goal.stops, manner);
    let result = generate(&mut engine, &prompt, &goal.options, preset.marks(), &mut out);
    let written = out.finish();
    let made = result?;
    written?;
    let report = Report { engine: &engine, made: &made, seed: drawn, total: start.elapsed() };
    if cli.json {
        // Ids are told as such.
        let text = if has_text { out.reply.text.as_str() } else { "" };
        output::json(&report.json(text, &out.reply.thinking))?;
    }
    tell(&report, cli.verbose);
    let interrupted = interrupt::exit_code().filter(|_| made.stop == Stop::Cancelled);
    Ok(interrupted.unwrap_or(ExitCode::SUCCESS))
}

/// Prints what a generation took on stderr.
pub(crate) fn tell(report: &Report<'_>, verbose: bool) {
    if verbose {
        output::stderr(&format!("\n{}", report.timings()));
    }
    output::status("2", &report.summary());
    if let Some(shortage) = report.shortage() {
        output::note(shortage);
    }
}

/// Generates into `out`, until the model, the options, a stop text, Ctrl-C or a closed
/// stdout ends it. Of the control tokens, `out` sees the names of `marks`.
pub(crate) fn generate(
    engine: &mut Engine,
    prompt: &[Token],
    options: &Generate,
    marks: &[Token],
    out: &mut Tokens,
) -> tierstream::Result<Generation> {
    let _running = Running::start(Some(engine.cancel_handle()));
    let mut reading = Some(Progress::start("reading the prompt"));
    let model = engine.model().clone();
    let made = engine.generate(prompt, options, |token, bytes| {
        reading.take();
        let goes_on = match marks.contains(&token) {
            true => out.push(token, &model.vocab().name(token)),
            false => out.push(token, bytes),
        };
        if goes_on { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    // ggml's threads spin between decodes; nothing is decoded while a user reads.
    engine.context().rest();
    if let Some(path) = engine.model().replaced_file() {
        output::note(format!(
            "{} was replaced; the model in use is the one that was loaded",
            path.display()
        ));
    }
    made.map(|made| if out.stopped() { Generation { stop: Stop::StopText, ..made } } else { made })
}

/// Another one each time.
pub(crate) fn random_seed() -> u32 {
    // The standard library's hasher takes its keys from the system.
    (RandomState::new().build_hasher().finish() >> 32) as u32
}

/// How a model is to write.
pub(crate) struct Goal {
    pub(crate) options: Generate,
    /// Texts that end an answer.
    pub(crate) stops: Vec<String>,
}

impl Goal {
    pub(crate) fn new(
        params: &Params,
        preset: &Preset,
        engine: &mut Engine,
    ) -> anyhow::Result<Self> {
        let n_ctx = engine.context().options().n_ctx as usize;
        let sampling = preset::sampling(&params.sampling(n_ctx).map_err(unmet)?);
        // With a chat template the model knows where its answer ends.
        let usual = if preset.has_template() { u32::MAX } else { COMPLETION_TOKENS };
        let most = |n| u32::try_from(n).unwrap_or(u32::MAX);
        let max_tokens = params.num_predict.map_or(usual, most);
        let stops = params.stops().map_err(unmet)?;
        Ok(Self { options: Generate { max_tokens, sampling }, stops })
    }
}

/// What the flags say of how a model is to write.
pub(crate) fn params(load: &LoadArgs, sampling: &SamplingArgs) -> Params {
    Params {
        num_ctx: load.engine.ctx.map(Into::into),
        seed: load.engine.seed.map(Into::into),
        top_k: sampling.top_k.map(Into::into),
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        temperature: sampling.temp,
        repeat_penalty: sampling.repeat_penalty,
        ..Params::default()
    }
}

pub(crate) fn unmet(error: ApiError) -> anyhow::Error {
    let hint = "the model's name may bring parameters along, over which flags win: `tierstream run --help`";
    Failure::error(error, hint)
}

fn input(cli: &Cli, args: &Run) -> anyhow::Result<Input> {
    if let Some(tokens) = &args.prompt_tokens {
        return Ok(Input::Tokens(tokens.clone()));
    }
    let piped = !io::stdin().is_terminal();
    let text = match args.prompt.as_deref() {
        Some("-") => from_stdin()?,
        Some(text) if piped => joined(text, &from_stdin()?),
        Some(text) => text.to_owned(),
        None if piped => from_stdin()?,
        None if cli.json || !io::stdout().is_terminal() => {
            return Err(Failure::error(
                "there is no prompt",
                "give one as the second argument or through a pipe; a chat needs a terminal",
            ));
        }
        None => return Ok(Input::Chat),
    };
    if text.is_empty() {
        return Err(Failure::error(
            "the prompt is empty",
            "give one as the second argument or through a pipe; without any, on a terminal, there \
             is a chat",
        ));
    }
    Ok(Input::Text(text))
}

/// A prompt and what is piped in beside it, in the order and with the space of `ollama run`.
fn joined(prompt: &str, piped: &str) -> String {
    match (prompt, piped) {
        (prompt, "") => prompt.to_owned(),
        ("", piped) => piped.to_owned(),
        (prompt, piped) => format!("{piped} {prompt}"),
    }
}

/// All of standard input but the end of its last line, which `echo` and editors add.
fn from_stdin() -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    let waiting = Progress::start("reading standard input");
    let read = io::stdin().lock().take(PROMPT_BYTES_MAX + 1).read_to_end(&mut bytes);
    drop(waiting);
    read.context("cannot read the prompt from standard input")?;
    if bytes.len() as u64 > PROMPT_BYTES_MAX {
        return Err(Failure::error(
            format!("the prompt on standard input is longer than {} MiB", PROMPT_BYTES_MAX >> 20),
            "no context holds so much; was another file meant?",
        ));
    }
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let message = format!("the prompt on standard input is no UTF-8 text (at byte {at})");
        Failure::error(message, "was another file meant? `iconv -t utf-8` converts other encodings")
    })?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

/// The tokens of a single message, and what reads the reply to it.
pub(crate) fn prompt(
    engine: &Engine,
    preset: &Preset,
    text: &str,
) -> anyhow::Result<(Vec<Token>, Option<Parser>)> {
    let vocab = engine.model().vocab();
    if !vocab.has_text() {
        return Err(open::no_tokenizer());
    }
    match preset.render(&[Message::new("user", text)])? {
        Some(rendered) => {
            let tokens = preset::tokens(engine, &rendered.text)?;
            Ok((tokens, preset.parser(rendered.opens_thinking)))
        }
        None => Ok((vocab.tokenize(text, true, false).map_err(tierstream::Error::from)?, None)),
    }
}

/// What the engine would refuse too, with a better hint.
fn check(engine: &Engine, prompt: &[Token]) -> anyhow::Result<()> {
    let n_vocab = engine.model().vocab().len();
    let known = |t: &&Token| u32::try_from(**t).is_ok_and(|t| t < n_vocab);
    match prompt.iter().find(|t| !known(t)) {
        Some(t) => Err(Failure::error(
            format!("token {t} is none of the model's"),
            format!("its tokens are 0 to {}", n_vocab.saturating_sub(1)),
        )),
        None => Ok(()),
    }
}
