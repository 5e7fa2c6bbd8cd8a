//! Embeddings of texts.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::ask::Params;
use crate::body::Admission;
use crate::engine::{EngineError, Token};
use crate::error::{ApiError, ApiResult};
use crate::hub::{Hub, KeepAlive, Lease, blocking};
use crate::job::{Event, Goal, Job};
use crate::schedule::Answer;

/// A request for embeddings.
#[derive(Debug)]
pub(crate) struct EmbedAsk {
    pub(crate) admission: Admission,
    pub(crate) model: String,
    pub(crate) keep_alive: Option<KeepAlive>,
    pub(crate) inputs: Vec<EmbedInput>,
    pub(crate) params: Params,
    /// What is too long is cut. Else it is refused.
    pub(crate) truncate: bool,
    /// The first so many numbers are wanted.
    pub(crate) dimensions: Option<usize>,
}

#[derive(Debug)]
pub(crate) enum EmbedInput {
    Text(String),
    Tokens(Vec<Token>),
}

/// Embeddings, each of length 1.
pub(crate) struct Embedded {
    pub(crate) embeddings: Vec<Vec<f32>>,
    pub(crate) tokens: usize,
    pub(crate) load_time: Duration,
}

/// Texts of a request.
const INPUTS_MAX: usize = 2048;

/// Has them computed, several at a time.
pub(crate) async fn embed(hub: &Arc<Hub>, ask: EmbedAsk) -> ApiResult<Embedded> {
    if ask.inputs.len() > INPUTS_MAX {
        return Err(ApiError::of("input", format!("a request has at most {INPUTS_MAX} inputs")));
    }
    let admission = ask.admission;
    let lease = hub.acquire(&ask.model, ask.params.ctx()?, ask.keep_alive);
    let lease = Arc::new(admission.within(lease).await?);
    let (model, held) = (lease.clone(), admission.clone());
    let prompts = blocking(move || all_tokens(&model, ask.inputs, ask.truncate, &held)).await??;
    let tokens = prompts.iter().map(Vec::len).sum();
    let embeddings = admission.within(compute(hub, &lease, &admission, prompts)).await?;
    let shortened = |embedding| shortened(embedding, ask.dimensions);
    Ok(Embedded {
        embeddings: embeddings.into_iter().map(shortened).collect::<ApiResult<_>>()?,
        tokens,
        load_time: lease.load_time,
    })
}

/// Makes tokens of all inputs, and gives back what else the request has of memory: it may wait for long.
fn all_tokens(
    model: &Lease,
    inputs: Vec<EmbedInput>,
    truncate: bool,
    admission: &Admission,
) -> ApiResult<Vec<Vec<Token>>> {
    let all = inputs.into_iter().map(|input| tokens(model, input, truncate));
    let all = all.collect::<ApiResult<Vec<_>>>()?;
    admission.shrink(all.iter().map(|tokens| size_of_val(&tokens[..])).sum());
    Ok(all)
}

fn tokens(model: &Lease, input: EmbedInput, truncate: bool) -> ApiResult<Vec<Token>> {
    let mut tokens = match input {
        EmbedInput::Text(text) => model.text.tokenize(&text, true, false)?,
        EmbedInput::Tokens(tokens) => model.checked(tokens)?,
    };
    let room = model.limits.ctx;
    if tokens.len() > room {
        if !truncate {
            let n = tokens.len();
            let why = format!("the input has {n} tokens, and the context has room for {room}");
            return Err(ApiError { param: Some("input"), ..ApiError::too_long(why) });
        }
        // An encoder's texts end with a token of their own.
        let last = tokens.pop().filter(|_| model.limits.is_encoder);
        tokens.truncate(room - usize::from(last.is_some()));
        tokens.extend(last);
    }
    match tokens.is_empty() {
        true => Err(ApiError::of("input", "the input is empty")),
        false => Ok(tokens),
    }
}

/// As many at a time as the model has sequences, in their order.
async fn compute(
    hub: &Hub,
    lease: &Lease,
    admission: &Admission,
    prompts: Vec<Vec<Token>>,
) -> ApiResult<Vec<Vec<f32>>> {
    let mut done = Vec::with_capacity(prompts.len());
    let mut begun: VecDeque<Answer> = VecDeque::new();
    for mut prompt in prompts {
        loop {
            let is_full = begun.len() >= lease.limits.sequences;
            let answer = if is_full {
                Err(ApiError::busy())
            } else {
                submit(hub, lease, admission, &mut prompt)
            };
            match answer {
                Ok(answer) => {
                    begun.push_back(answer);
                    break;
                }
                // There is room when one of them is done.
                Err(error) => done.push(embedding(&mut begun.pop_front().ok_or(error)?).await?),
            }
        }
    }
    for mut answer in begun {
        done.push(embedding(&mut answer).await?);
    }
    Ok(done)
}

/// Has a prompt computed, which is as it was where that is refused.
fn submit(
    hub: &Hub,
    lease: &Lease,
    admission: &Admission,
    prompt: &mut Vec<Token>,
) -> ApiResult<Answer> {
    lease.submit(admission.peer(), |events, _| Job {
        prompt: std::mem::take(prompt),
        goal: Goal::Embedding,
        events,
        wanted: Arc::new(AtomicBool::new(true)),
        asked: admission.asked,
        queued: Instant::now(),
        metrics: hub.metrics.clone(),
    })
}

async fn embedding(answer: &mut Answer) -> ApiResult<Vec<f32>> {
    match answer.next().await {
        Some(Event::Embedding(embedding)) => Ok(embedding),
        Some(Event::Failed(error)) => Err(error.into()),
        _ => Err(ApiError::stopped()),
    }
}

/// Of length 1, with as many numbers as are wanted.
fn shortened(mut embedding: Vec<f32>, dimensions: Option<usize>) -> ApiResult<Vec<f32>> {
    if let Some(wanted) = dimensions.filter(|&n| n > 0) {
        if wanted > embedding.len() {
            let most = embedding.len();
            return Err(ApiError::of(
                "dimensions",
                format!("the model's embeddings have {most} dimensions"),
            ));
        }
        embedding.truncate(wanted);
    }
    let length = embedding.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if !length.is_finite() {
        return Err(EngineError::Failed("the embedding is not a number".into()).into());
    }
    if length > 0.0 {
        embedding.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    Ok(embedding)
}

#[cfg(test)]
mod tests {
    use super::shortened;

    #[test]
    fn embeddings_have_length_1() {
        assert_eq!(shortened(vec![3.0, 4.0], None).expect("valid"), [0.6, 0.8]);
        assert_eq!(shortened(vec![3.0, 4.0], Some(1)).expect("valid"), [1.0]);
        assert_eq!(shortened(vec![0.0, 0.0], None).expect("valid"), [0.0, 0.0]);
        assert!(shortened(vec![3.0, 4.0], Some(3)).is_err());
        assert!(shortened(vec![f32::NAN], None).is_err());
    }
}
