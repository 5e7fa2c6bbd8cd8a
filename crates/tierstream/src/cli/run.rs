//! `tierstream run`: text in, text out.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, IsTerminal, Read};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use tierstream::{Engine, Generate, Generation, Options, Sampling, Stop, Token};

use super::args::{Cli, Run};
use super::chat::Chat;
use super::interrupt::{self, Running};
use super::open;
use super::output::{self, Failure, Progress, Tokens};
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
    let seed = load.engine.seed.unwrap_or_else(random_seed);
    let start = Instant::now();
    let path = open::path(load)?;
    if !matches!(input, Input::Tokens(_)) {
        open::check_takes_text(&path)?;
    }
    let options =
        Options { seed: u64::from(seed), ..open::options(&load.engine, args.model.experts)? };
    // To the end of the report, which a signal must not cut.
    let running = Running::start(None);
    let options = Options { weight_sums: open::weight_sums(&load.engine, &path)?, ..options };
    let mut engine = open::engine(&load.engine, &path, options)?;
    let prompt = match input {
        Input::Chat => {
            drop(running);
            return Chat::new(&mut engine, args, cli.verbose)?.run();
        }
        Input::Tokens(tokens) => tokens,
        Input::Text(text) => tokens(&engine, &text, args)?,
    };
    check(&engine, &prompt)?;
    let options =
        Generate { max_tokens: max_tokens(args, &engine), sampling: sampling(args, seed) };
    let has_text = engine.model().vocab().has_text();
    if !has_text && !args.stop.is_empty() {
        let hint = "--stop is for models that have one; -n ends after so many tokens";
        return Err(Failure::error("this model has no tokenizer", hint));
    }
    let mut out = Tokens::new(has_text, cli.json, &args.stop);
    let result = generate(&mut engine, &prompt, &options, &mut out);
    let written = out.finish();
    let made = result?;
    written?;
    let report = Report { engine: &engine, made: &made, seed, total: start.elapsed() };
    if cli.json {
        output::json(&report.json(&out.text))?;
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
/// stdout ends it.
pub(crate) fn generate(
    engine: &mut Engine,
    prompt: &[Token],
    options: &Generate,
    out: &mut Tokens,
) -> tierstream::Result<Generation> {
    let _running = Running::start(Some(engine.cancel_handle()));
    let mut reading = Some(Progress::start("reading the prompt"));
    let made = engine.generate(prompt, options, |token, bytes| {
        reading.take();
        if out.push(token, bytes) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
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

pub(crate) fn sampling(args: &Run, seed: u32) -> Sampling {
    Sampling {
        temperature: args.temp,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repeat_penalty: args.repeat_penalty,
        seed,
        ..Sampling::default()
    }
}

/// With a chat template the model knows where its answer ends.
pub(crate) fn max_tokens(args: &Run, engine: &Engine) -> u32 {
    let ends = uses_template(engine, args.raw);
    args.n.unwrap_or(if ends { u32::MAX } else { COMPLETION_TOKENS })
}

pub(crate) fn uses_template(engine: &Engine, raw: bool) -> bool {
    !raw && engine.model().vocab().chat_template().is_some()
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

fn tokens(engine: &Engine, text: &str, args: &Run) -> anyhow::Result<Vec<Token>> {
    let vocab = engine.model().vocab();
    if !vocab.has_text() {
        return Err(open::no_tokenizer());
    }
    let tokens = if uses_template(engine, args.raw) {
        let system = args.system.as_deref().map(|system| ("system", system));
        let messages: Vec<_> = system.into_iter().chain([("user", text)]).collect();
        let prompt = vocab.apply_chat_template(&messages).map_err(bad_template)?;
        vocab.tokenize(&prompt, true, true)
    } else if args.system.is_some() {
        return Err(no_template_for_system());
    } else {
        vocab.tokenize(text, true, false)
    };
    Ok(tokens.map_err(tierstream::Error::from)?)
}

pub(crate) fn no_template_for_system() -> anyhow::Error {
    Failure::error(
        "this model has no chat template, through which it would get a system prompt",
        "write it at the beginning of the prompt",
    )
}

pub(crate) fn bad_template(error: impl std::fmt::Display) -> anyhow::Error {
    Failure::error(error, "--raw gives it the prompt as it is, without the template")
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
