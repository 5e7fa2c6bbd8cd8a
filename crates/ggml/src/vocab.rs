//! Text to tokens and back, with the tokenizer in the GGUF.

use std::ffi::{CStr, CString, c_char};

use crate::abi::*;
use crate::error::{Error, Result};

/// A token id.
pub type Token = llama_token;

/// The tokenizer of a loaded model. Borrowed from it.
#[derive(Debug, Clone, Copy)]
pub struct Vocab<'a> {
    vocab: *const llama_vocab,
    model: *const llama_model,
    _model: std::marker::PhantomData<&'a ()>,
}

impl Vocab<'_> {
    pub(crate) fn new(model: *const llama_model) -> Self {
        // SAFETY: a live model.
        let vocab = unsafe { llama_model_get_vocab(model) };
        Self { vocab, model, _model: std::marker::PhantomData }
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
    /// [`Error::Vocab`] for a model without a tokenizer or a text longer than 2 GiB.
    pub fn tokenize(&self, text: &str, special: bool, markup: bool) -> Result<Vec<Token>> {
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
        if !self.has_text() || !self.contains(token) {
            return Vec::new();
        }
        let mut bytes = vec![0u8; 64];
        for _ in 0..2 {
            let room = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
            // SAFETY: `bytes` has `room` bytes.
            let n = unsafe {
                let buf = bytes.as_mut_ptr().cast();
                llama_token_to_piece(self.vocab, token, buf, room, 0, false)
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

    /// The chat template in the GGUF, Jinja source.
    pub fn chat_template(&self) -> Option<String> {
        // SAFETY: a live model; the string lives as long as it.
        unsafe {
            let text = llama_model_chat_template(self.model, std::ptr::null());
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    }

    /// The prompt for `messages` (role, content) by the model's template, ready for an answer.
    /// llama.cpp recognises the well-known templates and renders those.
    ///
    /// # Errors
    /// [`Error::Vocab`] if there is no template, or none that llama.cpp knows.
    pub fn apply_chat_template(&self, messages: &[(&str, &str)]) -> Result<String> {
        let missing = || Error::Vocab("this model has no chat template".into());
        let template = CString::new(self.chat_template().ok_or_else(missing)?)
            .map_err(|_| Error::Vocab("the chat template holds a NUL".into()))?;
        let nul =
            |s: &str| CString::new(s).map_err(|_| Error::Vocab("a message holds a NUL".into()));
        let owned: Vec<(CString, CString)> = messages
            .iter()
            .map(|(role, content)| Ok((nul(role)?, nul(content)?)))
            .collect::<Result<_>>()?;
        let chat: Vec<llama_chat_message> = owned
            .iter()
            .map(|(role, content)| llama_chat_message {
                role: role.as_ptr(),
                content: content.as_ptr(),
            })
            .collect();
        let mut text = vec![0u8; 1024];
        loop {
            let room = i32::try_from(text.len()).unwrap_or(i32::MAX);
            // SAFETY: all strings outlive the call; `text` has `room` bytes.
            let n = unsafe {
                llama_chat_apply_template(
                    template.as_ptr(),
                    chat.as_ptr(),
                    chat.len(),
                    true,
                    text.as_mut_ptr().cast(),
                    room,
                )
            };
            let unknown = || Error::Vocab("llama.cpp does not know this chat template".into());
            let n = usize::try_from(n).map_err(|_| unknown())?;
            if n <= text.len() {
                text.truncate(n);
                return String::from_utf8(text).map_err(|_| unknown());
            }
            text.resize(n, 0);
        }
    }
}
