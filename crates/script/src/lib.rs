//! An engine without weights, for tests of the server and of its clients: it says what it was told to say.
//!
//! A token is a byte, or one of a few control tokens. What is said depends on the prompt alone. In a chat it is
//! the text between `SAY[` and `]YAS` without any `~`, the last one if there are several, else the user's last
//! words. Text that is no chat is gone on with by the alphabet.

#![forbid(unsafe_code)]

mod experts;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use self::experts::Experts;
use tierstream_server::engine::{
    Compute, Engine, EngineError, Entry, Limits, LoadOptions, Loaded, Rates, Sample, Sampling,
    Text, Token,
};

/// Names of the control tokens, whose ids follow those of the bytes.
const CONTROLS: [&str; 8] = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
];

const BYTES: Token = 256;
const END: Token = BYTES + 1;
const END_OF_TURN: Token = BYTES + 3;
const VOCABULARY: usize = 256 + CONTROLS.len();

/// Loads scripted models, whatever their files have.
#[derive(Debug, Clone, Default)]
pub struct Script {
    /// Sequences of each model; 0 is 1.
    pub sequences: usize,
    /// Tokens of context; 0 is 4096.
    pub ctx: u32,
    /// Steps wait here, if it is there.
    pub gate: Option<Arc<Gate>>,
    /// Loads wait here, if it is there.
    pub load_gate: Option<Arc<Gate>>,
    /// Models of which one was loaded.
    pub loads: Arc<Mutex<Vec<std::path::PathBuf>>>,
    /// Bytes of memory for models; 0 is any.
    pub room_bytes: u64,
    /// What models have of it.
    pub memory: Arc<AtomicU64>,
    /// Models that are unloaded wait here before they give their memory back, if it is there.
    pub unload_gate: Option<Arc<Gate>>,
}

/// A model's memory.
struct Memory {
    bytes: u64,
    all: Arc<AtomicU64>,
    unload_gate: Option<Arc<Gate>>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(gate) = &self.unload_gate {
            gate.pass(&|| false);
        }
        self.all.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Bytes that a scripted model says it takes.
pub const MODEL_BYTES: u64 = 1 << 20;

/// Bytes that it takes beyond that for each token of context that was asked for.
pub const TOKEN_BYTES: u64 = 64;

/// Bytes per second that a scripted model says its drive can do.
pub const DRIVE_RATE: f64 = 2e9;

/// Lets steps through.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    /// Steps that may go.
    open: u64,
    /// Steps that wait.
    waiting: u64,
    /// Steps whose wait was ended.
    stopped: u64,
}

impl Gate {
    fn state(&self) -> std::sync::MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets so many more steps go.
    pub fn open(&self, steps: u64) {
        let mut state = self.state();
        state.open = state.open.saturating_add(steps);
        self.changed.notify_all();
    }

    /// Waits until a step waits.
    pub fn wait_until_reached(&self) {
        let state = self.state();
        drop(self.changed.wait_while(state, |state| state.waiting == 0));
    }

    /// Steps that were stopped.
    pub fn stopped(&self) -> u64 {
        self.state().stopped
    }

    /// Waits until so many steps were stopped.
    pub fn wait_until_stopped(&self, steps: u64) {
        let state = self.state();
        drop(self.changed.wait_while(state, |state| state.stopped < steps));
    }

    /// False if the wait was ended.
    fn pass(&self, stops: &dyn Fn() -> bool) -> bool {
        let mut state = self.state();
        state.waiting += 1;
        self.changed.notify_all();
        while state.open == 0 && !stops() {
            // Nobody tells it that it is to stop.
            let waited = self.changed.wait_timeout(state, Duration::from_millis(1));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiting -= 1;
        let passes = !stops();
        match passes {
            true => state.open -= 1,
            false => state.stopped += 1,
        }
        self.changed.notify_all();
        passes
    }
}

impl Script {
    /// Bytes of a model, if they fit beside those that are taken.
    fn room(&self, ctx: Option<u32>, taken_bytes: u64) -> Result<u64, EngineError> {
        let bytes = MODEL_BYTES + TOKEN_BYTES * u64::from(ctx.unwrap_or(0));
        if self.room_bytes > 0 && taken_bytes + bytes > self.room_bytes {
            return Err(EngineError::NoRoom("there is no room for this model".into()));
        }
        Ok(bytes)
    }
}

impl Engine for Script {
    fn check(&self, _: &Path, ctx: Option<u32>) -> Result<(), EngineError> {
        self.room(ctx, 0).map(drop)
    }

    fn load(
        &self,
        path: &Path,
        options: &LoadOptions,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Loaded, EngineError> {
        let taken_bytes = self.memory.load(Ordering::Acquire).max(options.taken_bytes);
        let bytes = self.room(options.ctx, taken_bytes)?;
        self.memory.fetch_add(bytes, Ordering::AcqRel);
        let (all, unload_gate) = (self.memory.clone(), self.unload_gate.clone());
        let memory = Memory { bytes, all, unload_gate };
        if let Some(gate) = &self.load_gate {
            gate.pass(&|| !is_wanted());
        }
        if !is_wanted() {
            return Err(EngineError::Cancelled);
        }
        let ctx = match (options.ctx, self.ctx) {
            (Some(ctx), _) => ctx as usize,
            (None, 0) => 4096,
            (None, ctx) => ctx as usize,
        };
        let sequences = self.sequences.max(1);
        let compute = Scripted {
            limits: Limits { ctx, sequences, batch: 64, together: sequences, is_encoder: false },
            held: vec![Vec::new(); sequences],
            rows: Vec::new(),
            stop: Arc::default(),
            gate: self.gate.clone(),
            experts: Arc::default(),
        };
        let [counted, listed] = [(); 2].map(|()| compute.experts.clone());
        self.loads.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
        Ok(Loaded {
            text: Arc::new(Bytes),
            identity: format!("{} {ctx}", path.display()),
            compute: Box::new(compute),
            counters: Arc::new(move || {
                // Whoever can look at the model has it.
                let _ = &memory;
                counted.counters()
            }),
            layers: Arc::new(move || listed.layers()),
            rates: Rates { drive: Some(DRIVE_RATE), gpu: None },
            ram_bytes: MODEL_BYTES,
            vram_bytes: 0,
            notes: Vec::new(),
        })
    }
}

/// A tokenizer of bytes.
struct Bytes;

impl Text for Bytes {
    fn tokenize(&self, text: &str, begin: bool, markup: bool) -> Result<Vec<Token>, EngineError> {
        let mut tokens: Vec<Token> = begin.then_some(BYTES).into_iter().collect();
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let control = CONTROLS.iter().position(|name| markup && rest.starts_with(name));
            match control.and_then(|at| Some((Token::try_from(at).ok()?, CONTROLS[at].len()))) {
                Some((at, len)) => {
                    tokens.push(BYTES + at);
                    rest = &rest[len..];
                }
                None => {
                    let len = first.len_utf8();
                    tokens.extend(rest.as_bytes()[..len].iter().map(|&byte| Token::from(byte)));
                    rest = &rest[len..];
                }
            }
        }
        Ok(tokens)
    }

    fn piece(&self, token: Token, markup: bool) -> Vec<u8> {
        match u8::try_from(token) {
            Ok(byte) => vec![byte],
            Err(_) if !markup => Vec::new(),
            Err(_) => {
                let control = usize::try_from(token - BYTES).ok().and_then(|at| CONTROLS.get(at));
                control.map_or_else(Vec::new, |name| name.as_bytes().to_vec())
            }
        }
    }

    fn is_end(&self, token: Token) -> bool {
        token == END || token == END_OF_TURN
    }

    fn bos_eos(&self) -> (String, String) {
        ("<s>".into(), "</s>".into())
    }

    fn len(&self) -> usize {
        VOCABULARY
    }
}

struct Scripted {
    limits: Limits,
    held: Vec<Vec<Token>>,
    rows: Vec<Vec<f32>>,
    stop: Arc<AtomicBool>,
    gate: Option<Arc<Gate>>,
    experts: Arc<Experts>,
}

/// A prompt with this in it makes the model's thread panic.
pub const PANICS: &str = "PANIC NOW";

/// A prompt with this in it fails when it is computed.
pub const FAILS: &str = "FAIL NOW";

impl Compute for Scripted {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn step(&mut self, entries: &[Entry]) -> Result<(), EngineError> {
        if self.gate.as_ref().is_some_and(|gate| !gate.pass(&|| self.stop.load(Ordering::Acquire)))
            || self.stop.load(Ordering::Acquire)
        {
            return Err(EngineError::Cancelled);
        }
        let before: HashMap<usize, usize> =
            entries.iter().map(|e| (e.sequence, self.held[e.sequence].len())).collect();
        self.rows.clear();
        for entry in entries {
            let held = &mut self.held[entry.sequence];
            held.push(entry.token);
            self.experts.route(entry.token);
            if entry.keep {
                self.rows.push(row(next(held)));
            }
        }
        let has = |sequence: &usize, text: &str| {
            String::from_utf8_lossy(&bytes(&self.held[*sequence])).contains(text)
        };
        assert!(!before.keys().any(|sequence| has(sequence, PANICS)), "the script says so");
        if before.keys().any(|sequence| has(sequence, FAILS)) {
            before.iter().for_each(|(&sequence, &len)| self.held[sequence].truncate(len));
            return Err(EngineError::Failed("the script says so".into()));
        }
        Ok(())
    }

    fn embed(&mut self, sequence: usize, tokens: &[Token]) -> Result<Vec<f32>, EngineError> {
        let entry = |&token| Entry { token, sequence, keep: false };
        self.step(&tokens.iter().map(entry).collect::<Vec<_>>())?;
        // How often each vowel comes.
        let held = bytes(&self.held[sequence]);
        let count = |vowel: &u8| held.iter().filter(|&byte| byte == vowel).count() as f32;
        Ok(b"aeiou".iter().map(count).collect())
    }

    fn logits(&mut self, row: usize) -> &[f32] {
        &self.rows[row]
    }

    fn len(&mut self, sequence: usize) -> usize {
        self.held[sequence].len()
    }

    fn cut(&mut self, sequence: usize, len: usize) -> bool {
        self.held[sequence].truncate(len);
        true
    }

    fn saved_bytes(&mut self, sequence: usize) -> usize {
        4 * self.held[sequence].len()
    }

    fn save(&mut self, sequence: usize) -> Option<Vec<u8>> {
        Some(self.held[sequence].iter().flat_map(|token| token.to_le_bytes()).collect())
    }

    fn restore(&mut self, sequence: usize, state: &[u8], _: usize) -> bool {
        let tokens = state.as_chunks().0.iter();
        self.held[sequence] = tokens.map(|&bytes| Token::from_le_bytes(bytes)).collect();
        true
    }

    fn sampler(&self, _: &Sampling) -> Box<dyn Sample> {
        Box::new(Likeliest)
    }

    fn stopper(&self) -> Arc<dyn Fn(bool) + Send + Sync> {
        let (stop, gate) = (self.stop.clone(), self.gate.clone());
        Arc::new(move |on| {
            stop.store(on, Ordering::Release);
            if let Some(gate) = &gate {
                // With the lock, so that who is about to wait has seen it.
                let state = gate.state();
                gate.changed.notify_all();
                drop(state);
            }
        })
    }
}

struct Likeliest;

impl Sample for Likeliest {
    fn accept(&mut self, _: &[Token]) {}

    fn sample(&mut self, logits: &[f32]) -> Option<Token> {
        let (id, logit) = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
        (*logit > f32::NEG_INFINITY).then(|| Token::try_from(id).ok())?
    }
}

fn bytes(tokens: &[Token]) -> Vec<u8> {
    tokens.iter().flat_map(|&token| Bytes.piece(token, true)).collect()
}

/// The token that comes next is the likeliest, those of letters are less so, and others hardly are.
fn row(next: Token) -> Vec<f32> {
    let logit = |id: usize| match id {
        id if Token::try_from(id) == Ok(next) => 10.0,
        id if u8::try_from(id).is_ok_and(|byte| byte.is_ascii_alphanumeric()) => {
            1.0 - id as f32 / 1000.0
        }
        _ => -1.0,
    };
    (0..VOCABULARY).map(logit).collect()
}

/// What comes after these tokens.
fn next(held: &[Token]) -> Token {
    let tokens = |text| Bytes.tokenize(text, false, true).unwrap_or_default();
    let marker = tokens("<|im_start|>assistant\n");
    let at = held.windows(marker.len()).rposition(|tokens| tokens == marker);
    let (prompt, said) = match at {
        Some(at) => held.split_at(at + marker.len()),
        None => (held, &[][..]),
    };
    // What templates begin answers with that are not to be thought about.
    let said = said.strip_prefix(&tokens("<think>\n\n</think>\n\n")[..]).unwrap_or(said);
    let script = script(prompt, at.is_none());
    script.get(said.len()).copied().unwrap_or(END_OF_TURN)
}

/// What is said to a prompt. Text that is gone on with is counted through the alphabet.
fn script(prompt: &[Token], goes_on: bool) -> Vec<Token> {
    if goes_on {
        let last = prompt.last().copied().unwrap_or(0);
        let letter = u8::try_from(last)
            .ok()
            .filter(u8::is_ascii_lowercase)
            .map_or(b'a', |b| (b - b'a' + 1) % 26 + b'a');
        return vec![Token::from(letter)];
    }
    let text = String::from_utf8_lossy(&bytes(prompt)).into_owned();
    let said = match text
        .rfind("SAY[")
        .and_then(|at| Some(&text[at + 4..][..text[at + 4..].rfind("]YAS")?]))
    {
        Some(said) => said.replace('~', ""),
        None => "You said: ".to_owned() + text.trim_end().lines().rev().nth(1).unwrap_or_default(),
    };
    Bytes.tokenize(&said, false, true).unwrap_or_default()
}
