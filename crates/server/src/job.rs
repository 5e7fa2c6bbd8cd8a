//! What a model's thread is asked for, and what it answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::engine::{EngineError, Sampling, Token};
use crate::grammar::Guide;
use crate::logprobs::Logprobs;
use crate::metrics::Metrics;

/// A request.
pub(crate) struct Job {
    /// At least one token, and not more than the context has; fewer where text is to be written.
    pub(crate) prompt: Vec<Token>,
    pub(crate) goal: Goal,
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) wanted: Arc<AtomicBool>,
    /// When the client asked for it.
    pub(crate) asked: Instant,
    /// When it had its model, and its prompt was tokens.
    pub(crate) queued: Instant,
    pub(crate) metrics: Arc<Metrics>,
}

/// What a request wants.
pub(crate) enum Goal {
    Text(Box<Writing>),
    Embedding,
}

/// How text is written.
pub(crate) struct Writing {
    pub(crate) max_tokens: usize,
    pub(crate) sampling: Sampling,
    pub(crate) stop: Vec<String>,
    /// Holds the answer to a form.
    pub(crate) guide: Option<Guide>,
    /// What is added to the logits of tokens.
    pub(crate) bias: Vec<(Token, f32)>,
    /// Control tokens whose names are part of the text.
    pub(crate) marks: Arc<[Token]>,
    /// How many of the likeliest tokens are told with each.
    pub(crate) logprobs: Option<usize>,
}

/// What comes of a request: pieces of text, and one end.
#[derive(Debug)]
pub(crate) enum Event {
    Piece(Piece),
    Done(Done),
    Embedding(Vec<f32>),
    Failed(EngineError),
}

/// Text, and the tokens that it is.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) logprobs: Logprobs,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The model, or a text to stop at.
    Stop,
    /// As many tokens as were asked for, or the context is full.
    Length,
}

impl Reason {
    /// `stop` or `length`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// How an answer ended.
#[derive(Debug, Clone)]
pub(crate) struct Done {
    pub(crate) reason: Reason,
    /// The text that ended it, if one did.
    pub(crate) stop_text: Option<String>,
    pub(crate) prompt_tokens: usize,
    /// Of these, those that did not have to be computed.
    pub(crate) cached: usize,
    pub(crate) prompt_time: Duration,
    pub(crate) eval_time: Duration,
    /// The tokens that were drawn.
    pub(crate) drawn: Vec<Token>,
}

impl Done {
    /// The numbers of both.
    pub(crate) fn and(mut self, other: &Self) -> Self {
        self.prompt_tokens += other.prompt_tokens;
        self.cached += other.cached;
        self.prompt_time += other.prompt_time;
        self.eval_time += other.eval_time;
        self.drawn.extend(&other.drawn);
        self
    }
}

impl Job {
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// How text is to be written, if it is, taken out.
    pub(crate) fn take_writing(&mut self) -> Option<Writing> {
        match std::mem::replace(&mut self.goal, Goal::Embedding) {
            Goal::Text(how) => Some(*how),
            Goal::Embedding => None,
        }
    }

    /// Who asked may be gone.
    pub(crate) fn tell(&self, event: Event) {
        drop(self.events.send(event));
    }
}
