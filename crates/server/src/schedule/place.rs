//! Which sequence a request gets, and what is there of its prompt already.

use std::sync::Arc;

use super::{Slot, Worker};
use crate::active::Active;
use crate::engine::Token;
use crate::job::{Job, Writing};
use crate::prompts::{Saved, WORTH, common};
use crate::write::Writer;

impl Worker {
    /// Gives a request a free sequence.
    pub(super) fn begin(&mut self, mut job: Job) {
        let Some(at) = self.nearest(&job.prompt) else { return };
        // The last token is computed in any case, for its logits.
        let most = job.prompt.len() - 1;
        let held = common(&self.slots[at].held, &job.prompt).min(most);
        let (at, kept) = match self.prompts.best(&job.prompt[..most], held) {
            Some(saved) => self.restore(&saved, most, &job.prompt),
            None => (at, self.cut(at, held)),
        };
        self.clock += 1;
        self.slots[at].used = self.clock;
        let writer = job.take_writing().map(|how: Writing| {
            let sampler = self.compute.sampler(&how.sampling);
            Writer::new(how, &job.prompt, kept, sampler)
        });
        self.slots[at].writes = writer.is_some();
        self.slots[at].active = Some(Active::new(job, kept, writer));
    }

    /// The free sequence that holds most of a prompt; among equals the one that was used least lately.
    fn nearest(&self, prompt: &[Token]) -> Option<usize> {
        let free = self.slots.iter().enumerate().filter(|(_, slot)| slot.active.is_none());
        let most =
            |(_, slot): &(usize, &Slot)| (common(&slot.held, prompt), std::cmp::Reverse(slot.used));
        free.max_by_key(most).map(|(at, _)| at)
    }

    /// Makes the free sequence that was used least lately one that was saved. Which it is, and what it has of
    /// the prompt then.
    fn restore(&mut self, saved: &Arc<Saved>, most: usize, prompt: &[Token]) -> (usize, usize) {
        let free = self.slots.iter().enumerate().filter(|(_, slot)| slot.active.is_none());
        let oldest = free.min_by_key(|(_, slot)| slot.used).map(|(at, _)| at);
        let at = oldest.expect("the nearest one is free");
        self.cut(at, 0);
        if self.compute.restore(at, &saved.state, saved.tokens.len()) {
            self.slots[at].held.clone_from(&saved.tokens);
        }
        let held = common(&self.slots[at].held, prompt).min(most);
        (at, self.cut(at, held))
    }

    /// Leaves a sequence its first `len` tokens, or none where it cannot be cut; returns how many it has. What most
    /// of is lost is kept.
    fn cut(&mut self, at: usize, len: usize) -> usize {
        if 2 * len < self.slots[at].held.len() {
            self.keep(at);
        }
        let slot = &mut self.slots[at];
        let mut len = len;
        if len < slot.held.len() && !self.compute.cut(at, len) {
            len = 0;
            self.compute.cut(at, 0);
        }
        slot.held.truncate(len);
        len
    }

    /// Keeps what a sequence has, for later.
    fn keep(&mut self, at: usize) {
        let Slot { held, writes, .. } = &self.slots[at];
        // Texts for embeddings seldom come again.
        if held.len() < WORTH || !writes {
            return;
        }
        let bytes = self.compute.saved_bytes(at);
        self.prompts.keep(held, bytes, || self.compute.save(at));
    }

    /// Keeps what all sequences have: the model is to go.
    pub(super) fn keep_all(&mut self) {
        (0..self.slots.len()).for_each(|at| self.keep(at));
        self.prompts.flush();
    }
}
