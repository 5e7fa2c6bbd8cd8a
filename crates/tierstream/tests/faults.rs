//! Reads that fail in the middle of a generation: an error with its place, an engine that goes on,
//! and never a wrong token.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tierstream::io::engine::Engine as IoEngine;
use tierstream::io::wrap::{Action, Fault, Rule};
use tierstream::size::PoolShare;
use tierstream::{
    Engine, Error, Generate, Options, Sampling, Stage, Token, VerifyOptions, ggml, io, verify,
};

const EIO: i32 = 5;

const PROMPT: &str = "It was a cold evening in November, and the old gentleman sat by the fire,";

/// Tokens that are generated.
const TOKENS: u32 = 48;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf")
}

/// The demo model with a quarter of its experts, some of whose reads fail.
fn engine(rules: Vec<Rule>) -> Engine {
    let wrap: io::Wrap =
        Box::new(|inner| -> Box<dyn IoEngine> { Box::new(Fault::new(inner, rules).unwrap()) });
    let options = Options {
        experts: Some(PoolShare::Share(0.25)),
        threads: Some(1),
        io: io::Config { wrap: Some(wrap), ..Options::default().io },
        ..Options::default()
    };
    Engine::load(&demo(), options, &mut |_| true).unwrap()
}

/// Tokens that came, and how it ended.
fn generate(engine: &mut Engine) -> (Vec<Token>, Result<(), Error>) {
    let prompt = engine.model().vocab().tokenize(PROMPT, true, false).unwrap();
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let mut came = Vec::new();
    let made = engine.generate(&prompt, &Generate { max_tokens: TOKENS, sampling }, |token, _| {
        came.push(token);
        ControlFlow::Continue(())
    });
    (came, made.map(drop))
}

/// A generation in which all is well.
struct Healthy {
    tokens: Vec<Token>,
    reads: u64,
    /// A read after the prompt and before the end.
    middle: u64,
}

fn reads(engine: &Engine) -> u64 {
    engine.model().reader().unwrap().stats().reads
}

fn healthy() -> Healthy {
    let mut first = engine(Vec::new());
    let prompt = first.model().vocab().tokenize(PROMPT, true, false).unwrap();
    first.context().decode(&prompt, ggml::Keep::Last, |_, _| ()).unwrap();
    let of_prompt = reads(&first);
    let mut second = engine(Vec::new());
    let (tokens, result) = generate(&mut second);
    result.unwrap();
    assert_eq!(tokens.len(), TOKENS as usize);
    let reads = reads(&second);
    assert!(reads > of_prompt + 100, "{reads} reads, {of_prompt} of them for the prompt");
    Healthy { tokens, reads, middle: (of_prompt + reads) / 2 }
}

/// One read, in the middle of the first generation.
fn fails(nth: u64, action: Action) -> Engine {
    engine(vec![Rule::all(action).nth(nth..nth + 1)])
}

/// The error ends this request in its middle, and the next one is right.
fn ends_one_request(expected: &[Token], mut engine: Engine) -> Error {
    let (came, result) = generate(&mut engine);
    let error = result.expect_err("the read fails");
    assert!(!came.is_empty() && came.len() < expected.len(), "{} tokens", came.len());
    assert_eq!(came, expected[..came.len()], "what came until then is right");
    for _ in 0..2 {
        engine.clear();
        let (came, result) = generate(&mut engine);
        result.unwrap();
        assert_eq!(came, expected, "the next request");
    }
    error
}

/// All that a user is told of it.
fn text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(source) = next {
        text.push_str(&format!(": {source}"));
        next = source.source();
    }
    text
}

fn assert_names(error: &Error, path: &Path, offset: u64) {
    let text = text(error);
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    assert!(text.contains(&format!("offset {offset}")), "{text}");
    let bytes = path.metadata().unwrap().len();
    assert!(offset > 0 && offset < bytes, "{text}");
}

#[test]
fn a_read_that_fails() {
    let healthy = healthy();
    let error = ends_one_request(&healthy.tokens, fails(healthy.middle, Action::Errno(EIO)));
    match &error {
        Error::Engine(ggml::Error::Io(io::Error::Read { path, offset, source, .. })) => {
            assert_names(&error, path, *offset);
            assert_eq!(**path, *demo());
            assert_eq!(source.raw_os_error(), Some(EIO));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_read_that_gives_nothing() {
    let healthy = healthy();
    let error = ends_one_request(&healthy.tokens, fails(healthy.middle, Action::Short(0)));
    match &error {
        Error::Engine(ggml::Error::Io(io::Error::Truncated { path, offset, .. })) => {
            assert_names(&error, path, *offset);
            assert_eq!(**path, *demo());
        }
        other => panic!("{other:?}"),
    }
    assert!(error.hint().is_some(), "{error}");
}

#[test]
fn a_short_read_is_read_on() {
    let healthy = healthy();
    let mut engine = fails(healthy.middle, Action::Short(4096));
    let (came, result) = generate(&mut engine);
    result.unwrap();
    assert_eq!(came, healthy.tokens);
    assert!(reads(&engine) > healthy.reads, "the rest is read by another read");
}

#[test]
fn a_verification_ends_where_its_caller_says() {
    let what = VerifyOptions { prompt: None, prompt_limit: Some(16), generate: 16, seed: 1 };
    for (stop, at) in [(Stage::Loading, 0.0), (Stage::Comparing, 0.0), (Stage::Comparing, 0.75)] {
        let options = Options { threads: Some(1), ..Options::default() };
        let mut last = (Stage::Loading, 0.0);
        let result = verify(&demo(), options, &what, &mut |stage, done| {
            assert!(stage != Stage::Loading || last.0 == Stage::Loading, "there is no way back");
            assert!(stage != Stage::Comparing || stage != last.0 || done > last.1);
            last = (stage, done);
            stage != stop || done < at
        });
        let cancelled = matches!(result, Err(Error::Engine(ggml::Error::Cancelled)));
        assert!(cancelled, "{result:?}");
        assert_eq!(last.0, stop);
    }
}
