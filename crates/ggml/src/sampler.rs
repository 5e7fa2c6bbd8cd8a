//! From logits to the next token.

use crate::abi::*;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::vocab::Token;

/// Tokens that a repeat penalty looks back on, as in llama.cpp's tools.
const PENALTY_TOKENS: usize = 64;

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
    /// Divides the logits of tokens that occur among the last 64 (multiplies those below 0).
    /// Greater than 0; 1: does nothing.
    pub repeat_penalty: f32,
    /// The same seed gives the same tokens.
    pub seed: u32,
}

impl Default for Sampling {
    /// The defaults of llama.cpp's tools, with a fixed seed.
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, repeat_penalty: 1.0, seed: 0 }
    }
}

/// A chain of samplers.
#[derive(Debug)]
pub struct Sampler {
    chain: *mut llama_sampler,
}

// SAFETY: a chain has no ties to a thread.
unsafe impl Send for Sampler {}

impl Sampler {
    /// The usual chain: repeat penalty, top-k, top-p, min-p, temperature, draw; or the most likely token.
    pub fn new(sampling: Sampling) -> Self {
        // SAFETY: the chain takes ownership of what is added.
        unsafe {
            let chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
            let add = |sampler| llama_sampler_chain_add(chain, sampler);
            if sampling.repeat_penalty != 1.0 {
                // Only a sampler that runs in a backend asks for the size of the vocabulary.
                let (n_vocab, last) = (0, PENALTY_TOKENS as i32);
                add(llama_sampler_init_penalties(n_vocab, last, sampling.repeat_penalty, 0.0, 0.0));
            }
            if sampling.temperature <= 0.0 {
                add(llama_sampler_init_greedy());
            } else {
                if sampling.top_k > 0 {
                    add(llama_sampler_init_top_k(sampling.top_k));
                }
                add(llama_sampler_init_top_p(sampling.top_p, 1));
                add(llama_sampler_init_min_p(sampling.min_p, 1));
                add(llama_sampler_init_temp(sampling.temperature));
                add(llama_sampler_init_dist(sampling.seed));
            }
            Self { chain }
        }
    }

    /// Tells of tokens that were not drawn, those of a prompt, for the repeat penalty.
    pub fn accept(&mut self, tokens: &[Token]) {
        for &token in &tokens[tokens.len().saturating_sub(PENALTY_TOKENS)..] {
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
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // SAFETY: ours, freed once, with all that was added.
        unsafe { llama_sampler_free(self.chain) };
    }
}
