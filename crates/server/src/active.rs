//! A request while it is computed.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::engine::{EngineError, Text, Token};
use crate::job::{Event, Job};
use crate::write::{Drawn, Writer};

/// What is to be computed next of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) tokens: Vec<Token>,
    pub(crate) then: Then,
}

/// What is wanted after a part of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// The next part.
    Read,
    /// A row of logits.
    Write,
    /// An embedding.
    Embed,
}

/// A request that has a sequence.
pub(crate) struct Active {
    job: Job,
    /// Tokens that are still to be computed before the next is drawn: the prompt's, then the last drawn.
    ahead: Vec<Token>,
    is_reading: bool,
    /// None where no text is wanted.
    writer: Option<Writer>,
}

impl Active {
    /// `cached` tokens of the prompt are there.
    pub(crate) fn new(mut job: Job, cached: usize, writer: Option<Writer>) -> Self {
        let metrics = &job.metrics;
        metrics.waited(job.queued.elapsed());
        metrics.prompt_tokens_cached.inc_by(cached as u64);
        let ahead = job.prompt.split_off(cached);
        Self { job, ahead, is_reading: true, writer }
    }

    pub(crate) fn wanted(&self) -> Arc<AtomicBool> {
        self.job.wanted.clone()
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.job.is_wanted()
    }

    pub(crate) fn fail(self, error: &EngineError) {
        self.tell(Event::Failed(error.clone()));
    }

    /// Tells its last event.
    pub(crate) fn tell(self, end: Event) {
        self.job.tell(end);
    }

    pub(crate) fn has_prompt(&self) -> bool {
        self.is_reading
    }

    /// What is to be computed next of the prompt, at most so many tokens. `whole`: embeddings are made of all
    /// tokens at once, and else of the last one.
    pub(crate) fn part(&self, most: usize, whole: bool) -> Part {
        let all = self.ahead.len();
        let (n, then) = match self.writer {
            Some(_) if all <= most => (all, Then::Write),
            Some(_) => (most, Then::Read),
            None if whole || all == 1 => (all, Then::Embed),
            None => ((all - 1).min(most), Then::Read),
        };
        Part { tokens: self.ahead[..n].to_vec(), then }
    }

    /// The token that was drawn last, if the prompt is done.
    pub(crate) fn next_token(&self) -> Option<Token> {
        (!self.is_reading).then(|| self.ahead.first().copied())?
    }

    /// These are to be computed once more, before all else.
    pub(crate) fn again(&mut self, mut lost: Vec<Token>) {
        self.is_reading |= !lost.is_empty();
        lost.append(&mut self.ahead);
        self.ahead = lost;
    }

    /// `tokens` more are computed; with a row of logits the next is drawn. `room`: of the context. Returns the last
    /// event, not told yet, if the request is over.
    pub(crate) fn computed(
        &mut self,
        tokens: usize,
        row: Option<&[f32]>,
        room: usize,
        took: Duration,
        text: &dyn Text,
    ) -> Option<Event> {
        self.ahead.drain(..tokens);
        match self.is_reading {
            true => self.job.metrics.read(tokens, took),
            false => self.job.metrics.generated(tokens, took),
        }
        let writer = self.writer.as_mut()?;
        writer.took(self.is_reading, took);
        let row = row?;
        self.is_reading = false;
        let start = Instant::now();
        let drawn = writer.draw(row, room, text, &self.job);
        writer.took(false, start.elapsed());
        match drawn {
            Ok(Drawn::Token(token)) => {
                self.ahead.push(token);
                None
            }
            Ok(Drawn::End(done)) => Some(Event::Done(done)),
            Err(error) => Some(Event::Failed(error)),
        }
    }

    /// The prompt's last tokens are computed, and this is what was wanted.
    pub(crate) fn embedded(self, embedding: Vec<f32>, took: Duration) {
        self.job.metrics.read(self.ahead.len(), took);
        self.job.tell(Event::Embedding(embedding));
    }
}
