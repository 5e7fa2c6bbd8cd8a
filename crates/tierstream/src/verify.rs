//! The exactness gate: the streamed run against the fully resident one, every logit of every
//! token.

use std::path::Path;
use std::sync::Arc;

use tierstream_ggml::{ExpertCounters, Keep, Sampler, Sampling, Token, Weights};
use tierstream_gguf::Experts;
use tierstream_io::{Config, Reader};
use tierstream_pack::{Checked, Pack};

use crate::drive::{self, Io};
use crate::engine::{Engine, Options};
use crate::error::{Error, Result};
use crate::progress::Loading;
use crate::random::drawn_tokens;
use crate::reading::io_config;
use crate::size::PoolShare;

/// Share of all experts in the pool when none is asked for: with all of them resident, nothing
/// would be streamed.
const POOL_SHARE: f64 = 0.25;

/// Most tokens of a prompt, and those of one that is drawn from the seed, if nobody says otherwise.
const PROMPT_TOKENS_MAX: usize = 512;
const DRAWN_PROMPT_TOKENS: usize = 128;

/// Prompt of models that have a tokenizer, when none is given.
const PROMPT: &str = "The first chapter tells how the work was begun, by whom, and with what \
     tools; the second, what became of it. Let us consider a function that takes two numbers:\n\n\
     fn add(a: u32, b: u32) -> u32 {\n    a + b\n}\n";

/// What is compared.
#[derive(Debug)]
pub struct VerifyOptions {
    /// Text of the prompt; default: a short one, or ids drawn from the seed for models without a
    /// tokenizer.
    pub prompt: Option<String>,
    /// Most tokens of the prompt, by default 512; or how many are drawn, by default 128.
    pub prompt_limit: Option<usize>,
    /// Tokens to generate after the prompt. They are drawn from the resident run's logits.
    pub generate: usize,
    /// Seed of the prompt and of the drawing.
    pub seed: u32,
}

/// The outcome.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Verification {
    /// Whether all logits of all tokens have the same bits.
    pub identical: bool,
    /// Tokens compared: the prompt's and the generated ones.
    pub tokens: usize,
    /// Of those, tokens whose logits have the same bits.
    pub identical_tokens: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Largest absolute difference of two logits; infinite if one of them is no number.
    pub max_abs_diff: f32,
    /// The first logit that differs.
    pub first_difference: Option<Difference>,
    /// The pool's share of all experts, percent; none where nothing is streamed.
    pub experts_percent: Option<f64>,
    /// What the streamed run asked of the pool.
    pub experts: Requests,
    /// Of a packed model, all of whose weights have their checksums: how many there are.
    pub checksums: Option<Checksums>,
}

/// Weights that were compared with their checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Checksums {
    /// Expert records.
    pub records: u64,
    /// Other tensors.
    pub tensors: u64,
    /// Bytes of both.
    pub bytes: u64,
}

/// What a verification is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Comparing the weights of a packed model with their checksums.
    Checking,
    /// Loading the model, once for each of the two runs.
    Loading,
    /// Computing and comparing.
    Comparing,
}

/// Is told the stage and how much of it is done, 0 to 1; returning false ends the verification.
pub type VerifyProgress<'a> = &'a mut (dyn FnMut(Stage, f32) -> bool + Send);

/// A logit that differs.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Difference {
    /// Which token, from the start of the prompt.
    pub token: usize,
    /// Which entry of the vocabulary.
    pub id: usize,
    /// Its logit in the resident run.
    pub resident: f32,
    /// Its logit in the streamed run.
    pub streamed: f32,
}

/// The pool's work in a verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Requests {
    /// Bytes of the pool.
    pub budget_bytes: u64,
    /// Records asked for.
    pub requests: u64,
    /// Of those, resident.
    pub hits: u64,
    /// Of those, read.
    pub faults: u64,
    /// Bytes of the records read.
    pub bytes_read: u64,
}

/// Runs the model at `path` twice in step, resident (stock llama.cpp on the same processor or GPU,
/// mapped file, not repacked) and as `options` say, and compares. A pool that `options` do not size holds a quarter of the
/// experts, or those that one token uses if they are more.
///
/// # Errors
/// As [`Engine::load`] and [`Engine::generate`]; [`Error::Request`] when nothing is compared.
pub fn verify(
    path: &Path,
    mut options: Options,
    what: &VerifyOptions,
    progress: VerifyProgress<'_>,
) -> Result<Verification> {
    let drawn = what.prompt_limit.unwrap_or(DRAWN_PROMPT_TOKENS);
    let prompt_limit = what.prompt_limit.unwrap_or(PROMPT_TOKENS_MAX);
    let most = prompt_limit.saturating_add(what.generate).max(1);
    options.keep = Keep::All;
    options.ctx.get_or_insert(u32::try_from(most.next_multiple_of(256)).unwrap_or(u32::MAX));
    if options.experts.is_none() {
        options.experts = Some(default_share(path)?);
    }
    let checksums = checksums(path, &options, &mut |done| progress(Stage::Checking, done))?;
    // The first load of a big model is the streamed one: it tells quickly what is wrong.
    let (ctx, threads) = (options.ctx, options.threads);
    let placement = options.placement.clone();
    let mut loading = |l: Loading| {
        let share = l.bytes_done as f32 / l.bytes_total.max(1) as f32;
        progress(Stage::Loading, share)
    };
    let mut streamed = Engine::load(path, options, &mut loading)?;
    // Bits are those of batches of the same size.
    let n_batch = streamed.context().options().n_batch;
    // A dense model is loaded alike in both runs.
    let repack = streamed.experts().is_empty();
    let weights = Weights::Stock { mmap: !repack, repack, cpu_experts: false };
    let keep = Keep::All;
    let batch = Some(n_batch);
    let reference = Options { weights, placement, batch, ctx, threads, keep, ..Options::default() };
    let mut resident = Engine::load(path, reference, &mut loading)?;

    let vocab = resident.model().vocab();
    let mut prompt = match (&what.prompt, vocab.has_text()) {
        (Some(text), true) => vocab.tokenize(text, true, false)?,
        (Some(_), false) => {
            return Err(Error::Request("this model has no tokenizer and takes no text".into()));
        }
        (None, true) => vocab.tokenize(PROMPT, true, false)?,
        (None, false) => drawn_tokens(drawn, vocab.len(), what.seed),
    };
    prompt.truncate(prompt_limit);
    if prompt.is_empty() {
        return Err(Error::Request("the prompt has no tokens".into()));
    }

    streamed.check_room(prompt.len() + what.generate)?;
    let mut comparison = Comparison::default();
    let mut sampler =
        Sampler::new(Sampling { temperature: 1.0, seed: what.seed, ..Sampling::default() });
    let before = streamed.expert_counters();
    let all = prompt.len() + what.generate;
    let mut go_on = |compared: usize| match progress(Stage::Comparing, compared as f32 / all as f32)
    {
        true => Ok(()),
        false => Err(Error::Engine(tierstream_ggml::Error::Cancelled)),
    };
    for batch in prompt.chunks(n_batch as usize) {
        go_on(comparison.tokens)?;
        step(&mut resident, &mut streamed, batch, &mut comparison)?;
    }
    for _ in 0..what.generate {
        go_on(comparison.tokens)?;
        let token = sampler.sample(resident.context())?;
        step(&mut resident, &mut streamed, &[token], &mut comparison)?;
    }
    let used = streamed.expert_counters().since(&before);
    Ok(Verification { checksums, ..comparison.finish(prompt.len(), &streamed, used) })
}

/// Reads all of a packed model, and compares it with its checksums.
fn checksums(
    path: &Path,
    options: &Options,
    progress: &mut dyn FnMut(f32) -> bool,
) -> Result<Option<Checksums>> {
    if !tierstream_pack::is_packed(path) {
        return Ok(None);
    }
    let mut config = Config { engine: options.io.engine, ..io_config(Io::Auto) };
    if !options.io_direct {
        drive::settle(&mut config, &[path.to_owned()])?;
    }
    let reader = Arc::new(Reader::new(config)?);
    let Checked { records, tensors, bytes } = Pack::open(path)?.check(&reader, progress)?;
    Ok(Some(Checksums { records, tensors, bytes }))
}

/// [`POOL_SHARE`], or the largest share of a layer's experts that a token uses.
fn default_share(path: &Path) -> Result<PoolShare> {
    let experts = Experts::group(&tierstream_pack::open(path)?)?;
    let streamed = experts.layers().iter().filter(|l| l.is_streamed());
    let used = streamed.map(|l| f64::from(l.used) / f64::from(l.experts));
    Ok(PoolShare::Share(used.fold(POOL_SHARE, f64::max)))
}

/// Computes `tokens` in both runs and compares their rows.
fn step(
    resident: &mut Engine,
    streamed: &mut Engine,
    tokens: &[Token],
    comparison: &mut Comparison,
) -> Result<()> {
    let mut rows: Vec<Vec<f32>> = Vec::with_capacity(tokens.len());
    resident.context().decode(tokens, Keep::All, |_, row| rows.push(row.to_vec()))?;
    resident.context().rest();
    let mut rows = rows.iter();
    streamed.context().decode(tokens, Keep::All, |_, row| {
        comparison.row(rows.next().map_or(&[], Vec::as_slice), row);
    })?;
    streamed.context().rest();
    Ok(())
}

#[derive(Default)]
struct Comparison {
    tokens: usize,
    identical: usize,
    max_abs_diff: f32,
    first: Option<Difference>,
}

impl Comparison {
    fn row(&mut self, resident: &[f32], streamed: &[f32]) {
        let same_shape = resident.len() == streamed.len() && !resident.is_empty();
        let mut same = same_shape;
        for (id, (&a, &b)) in resident.iter().zip(streamed).enumerate() {
            if a.to_bits() == b.to_bits() {
                continue;
            }
            same = false;
            let diff = (a - b).abs();
            self.max_abs_diff =
                self.max_abs_diff.max(if diff.is_nan() { f32::INFINITY } else { diff });
            self.first.get_or_insert(Difference {
                token: self.tokens,
                id,
                resident: a,
                streamed: b,
            });
        }
        self.tokens += 1;
        self.identical += usize::from(same);
    }

    fn finish(self, prompt_tokens: usize, streamed: &Engine, used: ExpertCounters) -> Verification {
        let (budget_bytes, _) = streamed.model().pool_bytes();
        Verification {
            identical: self.identical == self.tokens,
            tokens: self.tokens,
            identical_tokens: self.identical,
            prompt_tokens,
            max_abs_diff: self.max_abs_diff,
            first_difference: self.first,
            experts_percent: streamed.model().pool_share().map(|share| 100.0 * share),
            experts: Requests {
                budget_bytes,
                requests: used.requests,
                hits: used.hits,
                faults: used.faults,
                bytes_read: used.bytes_read,
            },
            checksums: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Comparison;

    #[test]
    fn one_bit_is_a_difference() {
        let mut c = Comparison::default();
        c.row(&[1.0, -0.0], &[1.0, -0.0]);
        c.row(&[1.0, -0.0], &[1.0, 0.0]);
        assert_eq!((c.tokens, c.identical, c.max_abs_diff), (2, 1, 0.0));
        let first = c.first.expect("the second row differs");
        assert_eq!((first.token, first.id), (1, 1));
    }

    #[test]
    fn no_number_is_an_infinite_difference_unless_it_is_the_same() {
        let mut c = Comparison::default();
        c.row(&[f32::NAN], &[f32::NAN]);
        assert_eq!((c.identical, c.max_abs_diff), (1, 0.0));
        c.row(&[f32::NAN], &[0.0]);
        assert_eq!((c.identical, c.max_abs_diff), (1, f32::INFINITY));
    }

    #[test]
    fn a_missing_row_is_a_difference() {
        let mut c = Comparison::default();
        c.row(&[], &[]);
        c.row(&[1.0], &[1.0, 2.0]);
        assert_eq!(c.identical, 0);
    }
}
