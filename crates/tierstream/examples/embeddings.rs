//! What a model makes of texts, for comparing with other engines: `embeddings MODEL TEXT...`. Prints a line
//! of JSON for each: its token ids, and the embedding.

use std::path::Path;

use serde_json::json;
use tierstream::{Engine, Options, demo};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, texts @ ..] = &args[..] else {
        return Err("usage: embeddings MODEL TEXT...".into());
    };
    let path = if model == "demo" { demo::file()?.path } else { Path::new(model).to_owned() };
    let options = Options { ctx: Some(256), threads: Some(2), ..Options::default() };
    let mut engine = Engine::load(&path, options, &mut |_| true)?;
    for text in texts {
        let tokens = engine.model().vocab().tokenize(text, true, false)?;
        // Each alone, as if it was the first.
        engine.context().cut(0, 0);
        let embedding = engine.context().embed(0, &tokens)?;
        println!("{}", json!({ "tokens": tokens, "embedding": embedding }));
    }
    Ok(())
}
