//! From rows of logits to text.

use std::time::{Duration, Instant};

use crate::engine::{EngineError, Sample, Text, Token};
use crate::job::{Done, Event, Job, Piece, Reason, Writing};
use crate::logprobs::Likely;
use crate::texts::Texts;

/// What came of a row of logits.
pub(crate) enum Drawn {
    Token(Token),
    /// The answer is over, and its text told.
    End(Done),
}

/// Writes one answer.
pub(crate) struct Writer {
    how: Writing,
    sampler: Box<dyn Sample>,
    /// A row of logits that was changed.
    shaped: Vec<f32>,
    texts: Texts,
    piece: Piece,
    /// When the last token was drawn.
    last: Instant,
    done: Done,
}

impl Writer {
    /// `cached` tokens of the prompt are there.
    pub(crate) fn new(
        how: Writing,
        prompt: &[Token],
        cached: usize,
        mut sampler: Box<dyn Sample>,
    ) -> Self {
        sampler.accept(prompt);
        let done = Done {
            reason: Reason::Length,
            stop_text: None,
            prompt_tokens: prompt.len(),
            cached,
            prompt_time: Duration::ZERO,
            eval_time: Duration::ZERO,
            drawn: Vec::new(),
        };
        let texts = Texts::new(&how.stop);
        let (shaped, piece) = (Vec::new(), Piece::default());
        Self { how, sampler, shaped, texts, piece, last: Instant::now(), done }
    }

    /// Counts time for the prompt, or for what is written.
    pub(crate) fn took(&mut self, is_reading: bool, time: Duration) {
        match is_reading {
            true => self.done.prompt_time += time,
            false => self.done.eval_time += time,
        }
    }

    /// Draws a token from a row of logits, and tells its text. `room`: tokens that the context takes.
    pub(crate) fn draw(
        &mut self,
        row: &[f32],
        room: usize,
        text: &dyn Text,
        job: &Job,
    ) -> Result<Drawn, EngineError> {
        if self.done.drawn.len() == self.how.max_tokens {
            return Ok(self.end(Reason::Length, job));
        }
        let token = self.pick(row, text)?;
        if text.is_end(token) {
            return Ok(self.end(Reason::Stop, job));
        }
        self.count(job);
        self.done.drawn.push(token);
        let piece = text.piece(token, self.how.marks.contains(&token));
        if let Some(n) = self.how.logprobs {
            let (drawn, likeliest) = logprobs(row, token, n);
            self.piece.logprobs.push(drawn, &likeliest);
        }
        let stopped = self.texts.push(&piece);
        self.piece.text = self.texts.take();
        if !self.piece.text.is_empty() {
            job.tell(Event::Piece(std::mem::take(&mut self.piece)));
        }
        if stopped {
            return Ok(self.end(Reason::Stop, job));
        }
        if room == 0 || self.done.drawn.len() == self.how.max_tokens {
            return Ok(self.end(Reason::Length, job));
        }
        Ok(Drawn::Token(token))
    }

    fn pick(&mut self, row: &[f32], text: &dyn Text) -> Result<Token, EngineError> {
        let Self { how: Writing { guide, bias, .. }, sampler, shaped, .. } = self;
        let row = if guide.is_none() && bias.is_empty() {
            row
        } else {
            shaped.clear();
            shaped.extend_from_slice(row);
            for (token, bias) in bias.iter() {
                if let Some(logit) = usize::try_from(*token).ok().and_then(|id| shaped.get_mut(id))
                {
                    *logit += bias;
                }
            }
            if let Some(guide) = guide {
                guide.shape(shaped)?;
            }
            shaped
        };
        let none = || EngineError::Failed("the model gives no token a probability".into());
        let token = sampler.sample(row).ok_or_else(none)?;
        if let Some(guide) = guide
            && !text.is_end(token)
        {
            guide.accept(token)?;
        }
        Ok(token)
    }

    fn count(&mut self, job: &Job) {
        match self.done.drawn.is_empty() {
            true => job.metrics.first_token(job.asked.elapsed()),
            false => job.metrics.next_token(self.last.elapsed()),
        }
        self.last = Instant::now();
    }

    fn end(&mut self, reason: Reason, job: &Job) -> Drawn {
        self.texts.finish();
        self.piece.text = self.texts.take();
        if !self.piece.text.is_empty() || !self.piece.logprobs.is_empty() {
            job.tell(Event::Piece(std::mem::take(&mut self.piece)));
        }
        self.done.reason = reason;
        self.done.stop_text = self.texts.stopped_at().map(str::to_owned);
        Drawn::End(self.done.clone())
    }
}

/// How likely `token` is, and the `n` likeliest, before any sampler.
fn logprobs(row: &[f32], token: Token, n: usize) -> (Likely, Vec<Likely>) {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - most).exp()).sum();
    let log = |x: f32| (f64::from(x - most) - sum.ln()) as f32;
    let all = row.iter().zip(0..);
    let mut likeliest: Vec<Likely> = all.map(|(&x, id)| (id, x)).collect();
    let n = n.min(likeliest.len());
    if n > 0 && n < likeliest.len() {
        likeliest.select_nth_unstable_by(n - 1, |a, b| b.1.total_cmp(&a.1));
    }
    likeliest.truncate(n);
    likeliest.sort_by(|a, b| b.1.total_cmp(&a.1));
    likeliest.iter_mut().for_each(|(_, x)| *x = log(*x));
    let drawn = usize::try_from(token).ok().and_then(|id| row.get(id));
    ((token, drawn.map_or(f32::MIN, |&x| log(x))), likeliest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_those_of_the_row() {
        // Probabilities of 1/7, 4/7 and 2/7.
        let row = [0.0, 4f32.ln(), 2f32.ln()];
        let (drawn, likeliest) = logprobs(&row, 2, 2);
        let near = |(token, got): Likely, wanted: Token, p: f64| {
            token == wanted && (f64::from(got) - p.ln()).abs() < 1e-6
        };
        assert!(near(drawn, 2, 2.0 / 7.0));
        let [first, second] = likeliest[..] else { panic!("{likeliest:?}") };
        assert!(near(first, 1, 4.0 / 7.0) && near(second, 2, 2.0 / 7.0));
        assert_eq!(logprobs(&row, 0, 0).1, []);
        assert_eq!(logprobs(&row, 0, 9).1.len(), 3);
    }
}
