//! What a context keeps of a sequence's tokens, taken out and put back.

use crate::abi::*;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::log;

impl Context {
    /// Bytes of [`Context::save`].
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn saved_bytes(&self, sequence: u32) -> usize {
        match self.len(sequence) {
            0 => 0,
            // SAFETY: a live context, one of its sequences.
            _ => unsafe { llama_state_seq_get_size(self.raw(), sequence.cast_signed()) },
        }
    }

    /// What [`Context::restore`] makes the sequence of that it is now: bytes of llama.cpp's, good for a
    /// context of the same model, sizes and device. None for an empty one.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn save(&self, sequence: u32) -> Option<Vec<u8>> {
        let mut state = vec![0u8; self.saved_bytes(sequence)];
        if state.is_empty() {
            return None;
        }
        // SAFETY: a live context, one of its sequences; as many bytes as there is room for.
        let written = unsafe {
            let (to, len) = (state.as_mut_ptr(), state.len());
            llama_state_seq_get_data(self.raw(), to, len, sequence.cast_signed())
        };
        (written == state.len()).then_some(state)
    }

    /// Makes a sequence one of `len` tokens that was saved. Only the caller knows whether `state` is that, and
    /// unchanged: llama.cpp looks at its sizes alone.
    ///
    /// # Errors
    /// [`Error::Saved`]; the sequence is empty then.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn restore(&mut self, sequence: u32, state: &[u8], len: u32) -> Result<()> {
        self.cut(sequence, 0);
        log::clear();
        let id = sequence.cast_signed();
        // SAFETY: a live context, one of its sequences; bytes of which llama.cpp reads no more than there are.
        let read = unsafe { llama_state_seq_set_data(self.raw(), state.as_ptr(), state.len(), id) };
        // SAFETY: a live context.
        let last = unsafe { llama_memory_seq_pos_max(llama_get_memory(self.raw()), id) };
        if read == state.len() && i64::from(last) + 1 == i64::from(len) {
            self.restored(sequence, len);
            return Ok(());
        }
        let reason = match log::complaints() {
            reason if reason.is_empty() => format!("it has {} tokens, not {len}", last + 1),
            reason => reason,
        };
        self.cut(sequence, 0);
        Err(Error::Saved { reason })
    }
}
