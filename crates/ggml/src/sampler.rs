//! From logits to the next token.

use crate::abi::*;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::vocab::Token;

/// How tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0: always the most likely token.
    pub temperature: f32,
    /// Draw from this many most likely tokens; 0: from all.
    pub top_k: i32,
    /// Draw from the most likely tokens that together have this probability.
    pub top_p: f32,
    /// Leave out tokens less likely than this share of the most likely one.
    pub min_p: f32,
    /// Leave out tokens that are less usual than this: locally typical sampling (arXiv 2202.00666); 1: none.
    pub typical_p: f32,
    /// Tokens that penalties look back on; 0: none.
    pub penalty_tokens: u32,
    /// Divides the logits of tokens that occur among those (multiplies those below 0).
    /// Greater than 0; 1: does nothing.
    pub repeat_penalty: f32,
    /// Taken from the logit of a token for each time that it occurs among those.
    pub frequency_penalty: f32,
    /// Taken from the logits of tokens that occur among those.
    pub presence_penalty: f32,
    /// The same seed gives the same tokens.
    pub seed: u32,
}

impl Default for Sampling {
    /// The defaults of llama.cpp's tools, with a fixed seed.
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            penalty_tokens: 64,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

/// A chain of samplers.
#[derive(Debug)]
pub struct Sampler {
    chain: *mut llama_sampler,
    /// Tokens that its penalties look back on.
    penalty_tokens: u32,
    /// Of one row, kept for the next.
    candidates: Vec<llama_token_data>,
}

// SAFETY: a chain has no ties to a thread.
unsafe impl Send for Sampler {}

impl Sampler {
    /// The usual chain: penalties, top-k, typical, top-p, min-p, temperature, draw; or the most likely token.
    pub fn new(sampling: Sampling) -> Self {
        // SAFETY: the chain takes ownership of what is added.
        unsafe {
            let chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
            let add = |sampler| llama_sampler_chain_add(chain, sampler);
            if sampling.has_penalties() {
                // Only a sampler that runs in a backend asks for the size of the vocabulary.
                let (n_vocab, last) =
                    (0, i32::try_from(sampling.penalty_tokens).unwrap_or(i32::MAX));
                let (frequency, presence) = (sampling.frequency_penalty, sampling.presence_penalty);
                let repeat = sampling.repeat_penalty;
                add(llama_sampler_init_penalties(n_vocab, last, repeat, frequency, presence));
            }
            if sampling.temperature <= 0.0 {
                add(llama_sampler_init_greedy());
            } else {
                if sampling.top_k > 0 {
                    add(llama_sampler_init_top_k(sampling.top_k));
                }
                if sampling.typical_p < 1.0 {
                    add(llama_sampler_init_typical(sampling.typical_p, 1));
                }
                add(llama_sampler_init_top_p(sampling.top_p, 1));
                add(llama_sampler_init_min_p(sampling.min_p, 1));
                add(llama_sampler_init_temp(sampling.temperature));
                add(llama_sampler_init_dist(sampling.seed));
            }
            let penalty_tokens = sampling.penalty_tokens;
            Self { chain, penalty_tokens, candidates: Vec::new() }
        }
    }

    /// Tells of tokens that were not drawn, those of a prompt, for the penalties.
    pub fn accept(&mut self, tokens: &[Token]) {
        for &token in &tokens[tokens.len().saturating_sub(self.penalty_tokens as usize)..] {
            // SAFETY: the chain is live.
            unsafe { llama_sampler_accept(self.chain, token) };
        }
    }

    /// Draws a token from the last logits that `context` computed.
    ///
    /// # Errors
    /// [`Error::Batch`] if it has computed none since it was made, cleared or failed.
    pub fn sample(&mut self, context: &mut Context) -> Result<Token> {
        if !context.has_logits() {
            return Err(Error::Batch("there are no logits to sample from".into()));
        }
        // SAFETY: both are live; -1 is the last row of logits, which is there.
        Ok(unsafe { llama_sampler_sample(self.chain, context.raw(), -1) })
    }

    /// Draws a token from a row of logits, one for each token of the vocabulary. Those of -infinity are
    /// not drawn; `None` where all are, or where there are none.
    pub fn sample_row(&mut self, logits: &[f32]) -> Option<Token> {
        let candidates = &mut self.candidates;
        candidates.clear();
        let ids = 0..Token::MAX;
        candidates.extend(
            ids.zip(logits)
                .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
                .map(|(id, &logit)| llama_token_data { id, logit, p: 0.0 }),
        );
        if candidates.is_empty() {
            return None;
        }
        let mut array = llama_token_data_array {
            data: candidates.as_mut_ptr(),
            size: candidates.len(),
            selected: -1,
            sorted: false,
        };
        // SAFETY: the chain is live, and the array has `size` entries, of which samplers keep some.
        unsafe { llama_sampler_apply(self.chain, &raw mut array) };
        let chosen = usize::try_from(array.selected).ok().filter(|&at| at < array.size)?;
        // A sampler may have the array point to entries of its own.
        // SAFETY: it has `size` entries until the chain is used again.
        let token = unsafe { (*array.data.add(chosen)).id };
        // SAFETY: the chain is live.
        unsafe { llama_sampler_accept(self.chain, token) };
        Some(token)
    }
}

impl Sampling {
    fn has_penalties(&self) -> bool {
        let penalties = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty);
        self.penalty_tokens > 0 && penalties != (1.0, 0.0, 0.0)
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // SAFETY: ours, freed once, with all that was added.
        unsafe { llama_sampler_free(self.chain) };
    }
}
