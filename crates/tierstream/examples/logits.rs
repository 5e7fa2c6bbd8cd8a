//! Greedy tokens and the log-probabilities of the most likely ones, as JSON, for comparing with
//! other engines: `logits MODEL PROMPT TOKENS TOP [POOL_SHARE]`.

use std::path::Path;

use serde_json::json;
use tierstream::{Engine, Keep, Options, Token, Weights, demo};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, prompt, tokens, top, rest @ ..] = &args[..] else {
        return Err("usage: logits MODEL PROMPT TOKENS TOP [POOL_SHARE]".into());
    };
    let (tokens, top): (usize, usize) = (tokens.parse()?, top.parse()?);
    let path = if model == "demo" { demo::file()?.path } else { Path::new(model).to_owned() };
    let mut options = Options { ctx: Some(1024), threads: Some(2), ..Options::default() };
    match rest.first() {
        Some(share) => options.experts = Some(share.parse()?),
        None => options.weights = Weights::Stock { mmap: true, repack: false },
    }
    let mut engine = Engine::load(&path, options, &mut |_| true)?;
    let mut next = engine.model().vocab().tokenize(prompt, true, false)?;
    let prompt_tokens = next.clone();
    let mut made = Vec::new();
    let mut rows = Vec::new();
    for _ in 0..tokens {
        let mut row = Vec::new();
        engine.context().decode(&next, Keep::Last, |_, logits| row = logits.to_vec())?;
        let best = most_likely(&row, top);
        next = vec![best[0].0];
        made.push(best[0].0);
        rows.push(best);
    }
    println!("{}", json!({ "prompt_tokens": prompt_tokens, "tokens": made, "top": rows }));
    Ok(())
}

/// The `top` most likely ids and their log-probabilities, most likely first.
fn most_likely(logits: &[f32], top: usize) -> Vec<(Token, f64)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    let mut all: Vec<(Token, f64)> =
        (0..).zip(logits).map(|(id, &l)| (id, f64::from(l - max) - sum.ln())).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all.truncate(top);
    all
}
