//! An answer while it comes: what a model says, told apart.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use tierstream_chat::{Delta, Parser};
use tokio::time::timeout_at;

use crate::ask::{self, Ask, Input};
use crate::engine::Token;
use crate::error::{ApiError, ApiResult};
use crate::grammar::Form;
use crate::hub::{Hub, Lease, blocking};
use crate::job::{Done, Event, Goal, Job, Writing};
use crate::logprobs::{Logprobs, Told};
use crate::overdue::Overdue;
use crate::schedule::Answer;

/// An answer. Who drops it ends it.
pub(crate) struct Generation {
    pub(crate) lease: Lease,
    answer: Answer,
    parser: Option<Parser>,
    ready: VecDeque<Output>,
    /// Of tokens whose text has not come out yet.
    logprobs: Logprobs,
    deadline: tokio::time::Instant,
    /// Of a request that may be gone on from.
    prompt: Option<Vec<Token>>,
    has_called: bool,
    is_over: bool,
}

/// What comes of an answer: parts, and one end.
pub(crate) enum Output {
    Part(Part),
    End(Done),
}

/// A part of an answer.
pub(crate) struct Part {
    pub(crate) deltas: Vec<Delta>,
    pub(crate) logprobs: Logprobs,
}

/// All of an answer.
pub(crate) struct Whole {
    pub(crate) reply: tierstream_chat::Reply,
    pub(crate) logprobs: Told,
    pub(crate) done: Done,
}

impl Generation {
    /// Has a request computed: its model is loaded, and the request waits for its turn or is in it.
    pub(crate) async fn begin(hub: &Arc<Hub>, ask: Ask) -> ApiResult<Self> {
        let deadline = ask.admission.deadline;
        timeout_at(deadline, Self::begun(hub, ask)).await.map_err(|_| ApiError::late())?
    }

    /// The same with a model that is in use already.
    pub(crate) async fn begin_on(hub: &Hub, lease: Lease, ask: Ask) -> ApiResult<Self> {
        let deadline = ask.admission.deadline;
        let begun = Self::begun_on(hub, lease, ask);
        timeout_at(deadline, begun).await.map_err(|_| ApiError::late())?
    }

    async fn begun(hub: &Arc<Hub>, ask: Ask) -> ApiResult<Self> {
        let lease = hub.acquire(&ask.model, ask.params.ctx()?, ask.keep_alive).await?;
        Self::begun_on(hub, lease, ask).await
    }

    async fn begun_on(hub: &Hub, lease: Lease, mut ask: Ask) -> ApiResult<Self> {
        let deadline = ask.admission.deadline;
        if lease.limits.is_encoder {
            let name = &lease.preset.found.name;
            return Err(ApiError::bad(format!("{name:?} does not generate text, but embeddings")));
        }
        let metrics = hub.metrics.clone();
        blocking(move || {
            ask.params = std::mem::take(&mut ask.params).or(lease.preset.params.clone());
            let prompt = ask::prompt(&lease, &mut ask)?;
            let ctx = lease.limits.ctx;
            check_length(prompt.tokens.len(), ctx)?;
            let sampling = ask.params.sampling(ctx)?;
            let stop = ask.params.stops()?;
            let parser =
                prompt.parsed.map(|opens| Parser::new(&lease.preset.format, &ask.tools, opens));
            let thinks_first = prompt.parsed.unwrap_or(false);
            let guide = match &ask.form {
                Form::Free => None,
                form => {
                    lease.grammars()?.guide(form, &lease.preset.format, &ask.tools, thinks_first)?
                }
            };
            let goes_on = matches!(ask.input, Input::Prompt { .. }).then(|| prompt.tokens.clone());
            let (peer, asked) = (ask.admission.peer(), ask.admission.asked);
            // It is tokens, and who sees it in the queue finds that its memory is given back.
            drop((ask.input, ask.tools, ask.form, ask.admission));
            lease.bring(&prompt.tokens);
            let answer = lease.submit(peer, |events, marks| {
                let goal = Goal::Text(Box::new(Writing {
                    max_tokens: ask.params.most_tokens(),
                    sampling,
                    stop,
                    guide,
                    bias: ask.bias,
                    marks,
                    logprobs: ask.logprobs,
                }));
                let wanted = Arc::new(AtomicBool::new(true));
                Job {
                    prompt: prompt.tokens,
                    goal,
                    events,
                    wanted,
                    asked,
                    queued: Instant::now(),
                    metrics,
                }
            })?;
            Ok(Self {
                lease,
                answer,
                parser,
                ready: VecDeque::new(),
                logprobs: Logprobs::default(),
                deadline,
                prompt: goes_on,
                has_called: false,
                is_over: false,
            })
        })
        .await?
    }

    /// What comes next; none after the end or an error.
    pub(crate) async fn next(&mut self) -> Option<ApiResult<Output>> {
        loop {
            if let Some(said) = self.ready.pop_front() {
                return Some(Ok(said));
            }
            if self.is_over {
                return None;
            }
            // A model that is fast always has an event, and the timer would never be looked at.
            if tokio::time::Instant::now() >= self.deadline {
                return Some(Err(self.over(ApiError::late())));
            }
            match timeout_at(self.deadline, self.answer.next()).await {
                Ok(Some(Event::Piece(mut piece))) => {
                    self.logprobs.append(&mut piece.logprobs);
                    let deltas = match &mut self.parser {
                        Some(parser) => parser.feed(&piece.text),
                        None => vec![Delta::Content(piece.text)],
                    };
                    self.say(deltas);
                }
                Ok(Some(Event::Done(done))) => {
                    self.is_over = true;
                    let deltas = self.parser.as_mut().map(Parser::finish).unwrap_or_default();
                    self.say(deltas);
                    if !self.logprobs.is_empty() {
                        let logprobs = std::mem::take(&mut self.logprobs);
                        self.ready.push_back(Output::Part(Part { deltas: Vec::new(), logprobs }));
                    }
                    self.ready.push_back(Output::End(done));
                }
                Ok(Some(Event::Embedding(_))) => {}
                Ok(Some(Event::Failed(error))) => return Some(Err(self.over(error.into()))),
                Ok(None) => {
                    return Some(Err(self.over(ApiError::stopped())));
                }
                Err(_) => {
                    return Some(Err(self.over(ApiError::late())));
                }
            }
        }
    }

    fn over(&mut self, error: ApiError) -> ApiError {
        self.is_over = true;
        error
    }

    fn say(&mut self, deltas: Vec<Delta>) {
        if deltas.is_empty() {
            return;
        }
        self.has_called |= deltas.iter().any(|delta| matches!(delta, Delta::ToolEnd { .. }));
        let logprobs = std::mem::take(&mut self.logprobs);
        self.ready.push_back(Output::Part(Part { deltas, logprobs }));
    }

    /// The prompt's tokens, where a client may go on from them.
    pub(crate) fn prompt(&self) -> Option<&[Token]> {
        self.prompt.as_deref()
    }

    /// When it is given up.
    pub(crate) fn overdue(&self) -> Overdue {
        Overdue {
            deadline: self.deadline,
            retires: self.lease.retirement(),
            computing: Some(self.answer.computing()),
        }
    }

    /// Whether the model has called a tool.
    pub(crate) fn has_called(&self) -> bool {
        self.has_called
    }

    /// With the texts of the answer's model.
    pub(crate) fn told(&self, logprobs: Logprobs) -> Told {
        Told::new(logprobs, self.lease.text.clone(), self.lease.preset.marks.clone())
    }

    /// All of it.
    pub(crate) async fn whole(&mut self) -> ApiResult<Whole> {
        let mut reply = tierstream_chat::Reply::default();
        let mut logprobs = Logprobs::default();
        while let Some(said) = self.next().await {
            match said? {
                Output::Part(mut part) => {
                    reply.extend(part.deltas);
                    logprobs.append(&mut part.logprobs);
                }
                Output::End(done) => {
                    return Ok(Whole { reply, logprobs: self.told(logprobs), done });
                }
            }
        }
        Err(ApiError::endless())
    }
}

fn check_length(prompt: usize, ctx: usize) -> ApiResult<()> {
    if prompt == 0 {
        return Err(ApiError::bad("the prompt is empty"));
    }
    if prompt >= ctx {
        return Err(ApiError::too_long(format!(
            "the prompt has {prompt} tokens, which leave no room for an answer in a context of {ctx}; num_ctx in \
             Ollama's options, or the server's --ctx, makes it larger, up to what the model was trained with"
        )));
    }
    Ok(())
}

impl Ask {
    /// Whether there is anything to go on from; a request without only loads its model, or unloads it.
    pub(crate) fn is_empty(&self) -> bool {
        match &self.input {
            Input::Chat(messages) => messages.is_empty(),
            Input::Prompt { prompt, before, .. } => prompt.is_empty() && before.is_empty(),
            Input::Insert { prompt, suffix } => prompt.is_empty() && suffix.is_empty(),
            Input::Raw(text) => text.is_empty(),
            Input::Tokens(tokens) => tokens.is_empty(),
        }
    }
}

/// Nanoseconds, as Ollama gives times.
pub(crate) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
