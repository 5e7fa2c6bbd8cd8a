//! Records which experts a model routes to, token by token: `routing MODEL PROMPT TOKENS SEED`.
//!
//! Prints a line per token, of the prompt first and then of the text that the model draws, `TOKENS`
//! in all: layers apart by `;`, ids of experts by `,`, in rising order. The ids are told by what is
//! read: the pool is emptied before each token, so that every expert which it uses comes from the
//! file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tierstream::gguf::experts::MoeLayer;
use tierstream::io::engine::{Engine as IoEngine, RawDone, RawRead};
use tierstream::{Engine, Keep, Options, Sampler, Sampling, io};

/// What was read: ranges of bytes per file.
type Reads = Arc<Mutex<BTreeMap<PathBuf, Vec<Range<u64>>>>>;

/// An engine that tells what it is asked for.
struct Recorder {
    inner: Box<dyn IoEngine>,
    reads: Reads,
}

impl IoEngine for Recorder {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn direct(&self) -> bool {
        self.inner.direct()
    }
    fn remark(&self) -> Option<String> {
        self.inner.remark()
    }
    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        self.inner.submit(&mut reads.inspect(|read| {
            let range = read.offset()..read.offset() + read.len() as u64;
            let mut all = self.reads.lock().expect("nobody panics with it");
            all.entry(read.file().path().to_owned()).or_default().push(range);
        }));
    }
    fn wait(&self, done: &mut Vec<RawDone>) {
        self.inner.wait(done);
    }
    fn wake(&self) {
        self.inner.wake();
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, prompt, tokens, seed] = &args[..] else {
        return Err("usage: routing MODEL PROMPT TOKENS SEED".into());
    };
    let (tokens, seed): (usize, u32) = (tokens.parse()?, seed.parse()?);
    let reads = Reads::default();
    let told = reads.clone();
    let wrap: io::Wrap = Box::new(|inner| Box::new(Recorder { inner, reads: told }));
    let options = Options {
        threads: Some(1),
        preload: false,
        // Reads of one page: no gap between two experts is read for being small.
        io: io::Config { buffer_bytes: io::PAGE, wrap: Some(wrap), ..Options::default().io },
        ..Options::default()
    };
    let mut engine = Engine::load(Path::new(model), options, &mut |_| true)?;
    let prompt = engine.model().vocab().tokenize(prompt, true, false)?;
    let mut sampler =
        Sampler::new(Sampling { temperature: 0.7, top_p: 0.95, seed, ..Sampling::default() });
    for at in 0..tokens {
        let token = match prompt.get(at) {
            Some(&token) => token,
            None => sampler.sample(engine.context())?,
        };
        engine.model().clear_pool();
        reads.lock().expect("nobody panics with it").clear();
        engine.context().decode(&[token], Keep::Last, |_, _| ())?;
        let reads = reads.lock().expect("nobody panics with it");
        let layers = engine.experts().layers().iter();
        let ids = layers.map(|layer| ids(layer, &engine, &reads)).collect::<Result<Vec<_>, _>>()?;
        println!("{}", ids.join(";"));
    }
    Ok(())
}

/// The experts of a layer that were read as a whole. Of their neighbours, no more was than blocks
/// reach over.
fn ids(
    layer: &MoeLayer,
    engine: &Engine,
    reads: &BTreeMap<PathBuf, Vec<Range<u64>>>,
) -> Result<String, String> {
    let part = &layer.parts[0];
    let file = &engine.file().files()[part.file].path;
    let mut reads = reads.get(file).cloned().unwrap_or_default();
    reads.sort_by_key(|r| r.start);
    let was_read = |expert: &u32| {
        let start = part.expert(*expert).offset;
        // How far from its start on everything was read.
        let reach =
            reads.iter().fold(start, |to, r| if r.start <= to { to.max(r.end) } else { to });
        reach >= start + part.bytes_per_expert
    };
    let ids: Vec<u32> = (0..layer.experts).filter(was_read).collect();
    if ids.len() != layer.used as usize {
        return Err(format!("{} experts of layer {} were read", ids.len(), layer.layer));
    }
    Ok(ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","))
}
