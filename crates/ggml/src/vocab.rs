//! Text to tokens and back, with the tokenizer in the GGUF.

use std::ffi::c_char;

use crate::abi::*;
use crate::error::{Error, Result};

/// A token id.
pub type Token = llama_token;

/// The tokenizer of a loaded model. Borrowed from it.
#[derive(Debug, Clone, Copy)]
pub struct Vocab<'a> {
    vocab: *const llama_vocab,
    _model: std::marker::PhantomData<&'a ()>,
}

// SAFETY: llama.cpp only reads a vocabulary once its model is loaded.
unsafe impl Sync for Vocab<'_> {}

/// Some of llama.cpp's pre-tokenizers match words with `std::regex`, which recurses for each character of a word
/// (llama.cpp issue 27783 has a crash after 26,000 of them on 8 MiB). So many need little of any stack.
const STRETCH_ON_ANY_STACK: usize = 1024;

/// Three times what was seen, bytes.
const STACK_PER_CHARACTER: usize = 1024;

/// A stack for these is 256 MiB of addresses, and memory as it is used.
const STRETCH_MAX: usize = 1 << 18;

/// The most characters of a text that follow each other without a change from blanks to others: no word is longer.
fn longest_stretch(text: &str) -> usize {
    let (mut longest, mut now, mut was_blank) = (0, 0, false);
    for c in text.chars() {
        let is_blank = c.is_whitespace();
        now = if is_blank == was_blank { now + 1 } else { 1 };
        was_blank = is_blank;
        longest = longest.max(now);
    }
    longest
}

impl Vocab<'_> {
    pub(crate) fn new(model: *const llama_model) -> Self {
        // SAFETY: a live model.
        let vocab = unsafe { llama_model_get_vocab(model) };
        Self { vocab, _model: std::marker::PhantomData }
    }

    /// Number of token ids.
    pub fn len(&self) -> u32 {
        // SAFETY: a live vocabulary.
        u32::try_from(unsafe { llama_vocab_n_tokens(self.vocab) }).unwrap_or(0)
    }

    /// Whether there are no tokens at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// False for models without a tokenizer (`tokenizer.ggml.model = no_vocab`): they take ids.
    pub fn has_text(&self) -> bool {
        // SAFETY: a live vocabulary.
        unsafe { llama_vocab_type(self.vocab) != LLAMA_VOCAB_TYPE_NONE }
    }

    /// Whether `token` ends a generation.
    pub fn is_end(&self, token: Token) -> bool {
        // SAFETY: a live vocabulary and one of its tokens.
        self.has_text() && self.contains(token) && unsafe { llama_vocab_is_eog(self.vocab, token) }
    }

    /// llama.cpp ends the process on ids that are not its own; its tokenizer can give such.
    fn contains(&self, token: Token) -> bool {
        u32::try_from(token).is_ok_and(|token| token < self.len())
    }

    /// The ids of `text`. `special`: add the model's begin-of-text token if it wants one.
    /// `markup`: read the names of control tokens in the text as the tokens themselves.
    ///
    /// # Errors
    /// [`Error::Vocab`] for a model without a tokenizer, a text longer than 2 GiB, or one with so long a stretch
    /// without blanks, or of blanks alone, that llama.cpp could not be trusted with it.
    pub fn tokenize(&self, text: &str, special: bool, markup: bool) -> Result<Vec<Token>> {
        let stretch = longest_stretch(text);
        if stretch <= STRETCH_ON_ANY_STACK {
            return self.tokenize_here(text, special, markup);
        }
        if stretch > STRETCH_MAX {
            return Err(Error::Vocab(format!(
                "the text has {stretch} characters in a row without a blank, or blanks alone; {STRETCH_MAX} are the most"
            )));
        }
        let bytes = stretch * STACK_PER_CHARACTER;
        let no_thread = |_| Error::OutOfMemory { bytes, what: "a thread to tokenize" };
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .stack_size(bytes)
                .spawn_scoped(scope, || self.tokenize_here(text, special, markup))
                .map_err(no_thread)?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn tokenize_here(&self, text: &str, special: bool, markup: bool) -> Result<Vec<Token>> {
        if !self.has_text() {
            return Err(Error::Vocab("this model has no tokenizer".into()));
        }
        let len = i32::try_from(text.len())
            .map_err(|_| Error::Vocab("a prompt is at most 2 GiB".into()))?;
        let mut tokens = vec![0; text.len() + 2];
        for _ in 0..2 {
            let room = i32::try_from(tokens.len()).unwrap_or(i32::MAX);
            // SAFETY: `text` has `len` bytes, `tokens` room for `room` ids.
            let n = unsafe {
                let text = text.as_ptr().cast::<c_char>();
                llama_tokenize(self.vocab, text, len, tokens.as_mut_ptr(), room, special, markup)
            };
            match usize::try_from(n) {
                Ok(n) => {
                    tokens.truncate(n);
                    return Ok(tokens);
                }
                Err(_) => tokens.resize(n.unsigned_abs() as usize, 0),
            }
        }
        Err(Error::Vocab("llama.cpp cannot tokenize this text".into()))
    }

    /// The bytes of `token`; often no whole UTF-8 character. Empty for control tokens and for ids
    /// that are no token.
    pub fn piece(&self, token: Token) -> Vec<u8> {
        self.bytes(token, false)
    }

    /// The same, and of a control token its name: what [`Vocab::tokenize`] with `markup` reads as it.
    pub fn name(&self, token: Token) -> Vec<u8> {
        self.bytes(token, true)
    }

    fn bytes(&self, token: Token, names: bool) -> Vec<u8> {
        if !self.has_text() || !self.contains(token) {
            return Vec::new();
        }
        let mut bytes = vec![0u8; 64];
        for _ in 0..2 {
            let room = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
            // SAFETY: `bytes` has `room` bytes.
            let n = unsafe {
                let buf = bytes.as_mut_ptr().cast();
                llama_token_to_piece(self.vocab, token, buf, room, 0, names)
            };
            match usize::try_from(n) {
                Ok(n) => {
                    bytes.truncate(n);
                    return bytes;
                }
                Err(_) => bytes.resize(n.unsigned_abs() as usize, 0),
            }
        }
        Vec::new()
    }

    /// The token that begins a text, if the model has one.
    pub fn bos(&self) -> Option<Token> {
        // SAFETY: a live vocabulary.
        Some(unsafe { llama_vocab_bos(self.vocab) }).filter(|token| self.contains(*token))
    }

    /// The token that ends a text, if the model has one.
    pub fn eos(&self) -> Option<Token> {
        // SAFETY: a live vocabulary.
        Some(unsafe { llama_vocab_eos(self.vocab) }).filter(|token| self.contains(*token))
    }
}
