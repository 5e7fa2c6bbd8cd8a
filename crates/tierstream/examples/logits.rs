//! Greedy tokens and the logits that each was chosen by, for comparing with other engines:
//! `logits MODEL PROMPT TOKENS [POOL_SHARE]`. Prints a line of JSON and then, as bytes, a row of
//! little-endian f32 for every token: the logit of each id of the vocabulary.

use std::io::Write;
use std::path::Path;

use serde_json::json;
use tierstream::{Engine, Keep, Options, Token, Weights, demo};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, prompt, tokens, rest @ ..] = &args[..] else {
        return Err("usage: logits MODEL PROMPT TOKENS [POOL_SHARE]".into());
    };
    let tokens: usize = tokens.parse()?;
    let path = if model == "demo" { demo::file()?.path } else { Path::new(model).to_owned() };
    let mut options = Options { ctx: Some(1024), threads: Some(2), ..Options::default() };
    match rest.first() {
        Some(share) => options.experts = Some(share.parse()?),
        None => options.weights = Weights::Stock { mmap: true, repack: false, cpu_experts: false },
    }
    let mut engine = Engine::load(&path, options, &mut |_| true)?;
    let mut next = engine.model().vocab().tokenize(prompt, true, false)?;
    let prompt_tokens = next.clone();
    let mut made = Vec::new();
    let mut rows = Vec::new();
    for _ in 0..tokens {
        let mut best = 0;
        engine.context().decode(&next, Keep::Last, |_, logits| {
            best = most_likely(logits);
            rows.extend(logits.iter().flat_map(|logit| logit.to_le_bytes()));
        })?;
        next = vec![best];
        made.push(best);
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", json!({ "prompt_tokens": prompt_tokens, "tokens": made }))?;
    out.write_all(&rows)?;
    Ok(())
}

/// The id of the largest logit, the lowest such id where several are as large.
fn most_likely(logits: &[f32]) -> Token {
    let best = (0..).zip(logits).max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.map_or(0, |(id, _)| id)
}
