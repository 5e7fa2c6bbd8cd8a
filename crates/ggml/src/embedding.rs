//! What a model makes of a text as a whole.

use std::ffi::CString;

use crate::abi::*;
use crate::context::{Context, Entry};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::vocab::Token;

/// How a model gives embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Embeds {
    /// Its state after the last token, as for the next one. It writes text, too.
    Last,
    /// One of all tokens, which are computed at once: it reads texts, and writes none.
    Whole,
}

impl Embeds {
    /// By the model's header: the converters of llama.cpp write down how an encoder's tokens become one.
    pub(crate) fn of(model: &Model) -> Self {
        let key = meta(model, "general.architecture").map(|arch| format!("{arch}.pooling_type"));
        let pooling: Option<llama_pooling_type> =
            key.and_then(|key| meta(model, &key)).and_then(|value| value.parse().ok());
        match pooling {
            Some(LLAMA_POOLING_TYPE_MEAN | LLAMA_POOLING_TYPE_CLS | LLAMA_POOLING_TYPE_RANK) => {
                Self::Whole
            }
            _ => Self::Last,
        }
    }
}

/// A value of the header, as text.
fn meta(model: &Model, key: &str) -> Option<String> {
    let key = CString::new(key).ok()?;
    let mut text = [0u8; 128];
    // SAFETY: a live model, a string, and room for as many bytes as it is told.
    let n = unsafe {
        llama_model_meta_val_str(model.raw(), key.as_ptr(), text.as_mut_ptr().cast(), text.len())
    };
    let n = usize::try_from(n).ok().filter(|&n| n < text.len())?;
    String::from_utf8(text[..n].to_vec()).ok()
}

impl Context {
    /// Whether the model reads texts and writes none: it can [`Context::embed`] only.
    pub fn is_encoder(&self) -> bool {
        // SAFETY: a live context.
        self.embeds == Embeds::Whole || unsafe { llama_get_memory(self.raw()).is_null() }
    }

    /// Appends `tokens` to a sequence. Returns what the model makes of all of it: as many numbers as
    /// [`Context::n_embd`], of any length. An encoder takes a text whole, at most [`Context::batch_size`] tokens,
    /// and the sequence is empty again afterwards.
    ///
    /// # Errors
    /// As [`Context::step`]; [`Error::Batch`] for models that rank texts, which have no embeddings.
    pub fn embed(&mut self, sequence: u32, tokens: &[Token]) -> Result<Vec<f32>> {
        let entry = |&token| Entry { token, sequence, keep: false };
        let entries: Vec<Entry> = tokens.iter().map(entry).collect();
        self.check(&entries)?;
        // SAFETY: a live context.
        let pooling = unsafe { llama_pooling_type(self.raw()) };
        if pooling == LLAMA_POOLING_TYPE_RANK {
            return Err(Error::Batch(
                "this model ranks texts, and has no embeddings of them".into(),
            ));
        }
        if !self.is_encoder() {
            let (last, before) = entries.split_last().expect("checked");
            for batch in before.chunks(self.batch_size()) {
                self.compute(batch)?;
            }
            // The graph is the same but for what is read of it, and only for one token.
            self.set_embeddings(true);
            let computed = self.compute(&[*last]).map(|()| self.embedding(sequence, pooling));
            self.set_embeddings(false);
            self.model().copy_weights();
            return computed?;
        }
        if self.embeds != Embeds::Whole {
            return Err(Error::Batch("this model has no embeddings".into()));
        }
        if entries.len() > self.batch_size() {
            let (n, most) = (entries.len(), self.batch_size());
            return Err(Error::Batch(format!(
                "{n} tokens are more than the {most} that are read at once"
            )));
        }
        let computed = self.compute(&entries).map(|()| self.embedding(sequence, pooling));
        self.cut(sequence, 0);
        computed?
    }

    /// Numbers of an embedding.
    pub fn n_embd(&self) -> usize {
        // SAFETY: a live model.
        usize::try_from(unsafe { llama_model_n_embd_out(self.model().raw()) }).unwrap_or(0)
    }

    fn set_embeddings(&mut self, on: bool) {
        // SAFETY: a live context.
        unsafe { llama_set_embeddings(self.raw(), on) };
    }

    fn embedding(&self, sequence: u32, pooling: llama_pooling_type) -> Result<Vec<f32>> {
        // SAFETY: a live context; what it returns is null, or has `n_embd` numbers until it computes again.
        let embedding = unsafe {
            let first = match pooling {
                LLAMA_POOLING_TYPE_NONE => llama_get_embeddings_ith(self.raw(), -1),
                _ => llama_get_embeddings_seq(self.raw(), sequence.cast_signed()),
            };
            if first.is_null() {
                return Err(Error::Batch("llama.cpp gives no embedding of this".into()));
            }
            std::slice::from_raw_parts(first, self.n_embd()).to_vec()
        };
        if embedding.iter().any(|x| !x.is_finite()) {
            return Err(Error::NotANumber { path: self.model().path().to_owned() });
        }
        Ok(embedding)
    }
}
