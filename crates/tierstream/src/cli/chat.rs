//! The chat of `tierstream run` on a terminal.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustyline::error::ReadlineError;
use tierstream::size::Bytes;
use tierstream::{Engine, Generate, Generation, Stop, Token};
use tierstream_chat::Message;

use super::args::{self, Run};
use super::output::{self, Tokens};
use super::preset::{self, Preset, Rendered};
use super::reply::Manner;
use super::report::{Report, lines, percent};
use super::run::{self, Goal};
use super::{interrupt, open, show};
use input::Input;
use words::{HELP, Line};

mod input;
mod words;

/// This part of the context is kept free for an answer, as long as there are turns to forget.
const ANSWER_PART: usize = 4;

/// A conversation.
pub(crate) struct Chat<'a> {
    engine: &'a mut Engine,
    /// Its system prompt stays when messages are forgotten.
    preset: Preset,
    options: Generate,
    /// Texts that end an answer.
    stops: Vec<String>,
    /// Tokens of context.
    n_ctx: usize,
    hides_thinking: bool,
    verbose: bool,
    messages: Vec<Message>,
    /// The tokens that the context holds.
    held: Vec<Token>,
    /// Tokens of the last answer that it does not hold yet.
    pending: Vec<Token>,
    /// What `held` and `pending` are in the words of the template; `None` where that is not known.
    rendered: Option<String>,
    last: Option<Generation>,
    /// That the user has set; otherwise every answer has another one.
    seed: Option<u32>,
    session: Session,
}

/// What all answers took together.
#[derive(Debug, Default)]
struct Session {
    answers: usize,
    prompt_tokens: usize,
    tokens: usize,
    /// Of `tokens`, those that took `eval_time`: the first of each answer comes with the prompt.
    timed_tokens: usize,
    eval_time: Duration,
}

impl Session {
    fn add(&mut self, made: &Generation) {
        self.answers += usize::from(!made.tokens.is_empty());
        self.prompt_tokens += made.prompt_tokens;
        self.tokens += made.tokens.len();
        self.timed_tokens += made.tokens.len().saturating_sub(1);
        self.eval_time += made.eval_time;
    }

    fn tok_s(&self) -> Option<f64> {
        let seconds = self.eval_time.as_secs_f64();
        (self.timed_tokens > 0 && seconds > 0.0).then(|| self.timed_tokens as f64 / seconds)
    }
}

impl<'a> Chat<'a> {
    /// `seed`: that of every answer; without it each has another one.
    pub(crate) fn new(
        engine: &'a mut Engine,
        preset: Preset,
        goal: Goal,
        seed: Option<u32>,
        args: &Run,
        verbose: bool,
    ) -> anyhow::Result<Self> {
        if !engine.model().vocab().has_text() {
            return Err(open::no_tokenizer());
        }
        // A template that fails does so now.
        preset.render(&[Message::new("user", "a")])?;
        let n_ctx = engine.context().options().n_ctx as usize;
        Ok(Self {
            engine,
            preset,
            options: goal.options,
            stops: goal.stops,
            n_ctx,
            hides_thinking: args.hide_thinking,
            verbose,
            messages: Vec::new(),
            held: Vec::new(),
            pending: Vec::new(),
            rendered: None,
            last: None,
            seed,
            session: Session::default(),
        })
    }

    pub(crate) fn run(mut self) -> anyhow::Result<ExitCode> {
        let mut input = Input::new()?;
        if !self.preset.has_template() {
            output::note("this model has no chat template: it goes on from what you write");
        }
        output::stderr("/help lists the commands, /bye leaves");
        loop {
            if let Some(code) = interrupt::exit_code_beside_ctrl_c() {
                return Ok(code);
            }
            let line = match input.next() {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => {
                    output::stderr("/bye or Ctrl-D leaves");
                    continue;
                }
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(anyhow::Error::new(error).context("cannot read a line")),
            };
            match words::parse(&line) {
                Line::Bye => break,
                line => self.act(line)?,
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Only what makes the chat impossible is an error.
    fn act(&mut self, line: Line<'_>) -> anyhow::Result<()> {
        match line {
            Line::Nothing | Line::Bye => {}
            Line::Say(text) => self.answer(text)?,
            Line::Help => output::stderr(HELP),
            Line::Clear => self.clear(),
            Line::Show => {
                let asked = show::Asked::of_context(self.n_ctx);
                let memory = show::Memory::from(&*self.engine);
                let info = show::Info::new(self.engine.file(), &asked, Some(memory))?;
                output::stderr(info.to_string().trim_end());
            }
            Line::Stats => output::stderr(self.stats().trim_end()),
            Line::Set(name, value) => match self.set(name, value) {
                Ok(()) => output::stderr(&format!("{name} is {value}")),
                Err(why) => output::stderr(&why),
            },
            Line::Unknown(command) => {
                output::stderr(&format!("there is no command {command}; /help lists them"));
            }
            Line::NoArgument(command) => {
                output::stderr(&format!("{command} takes no argument; /help lists the commands"));
            }
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.engine.clear();
        self.messages.clear();
        self.held.clear();
        self.pending.clear();
        self.rendered = None;
        output::stderr("the conversation is forgotten");
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let number = |least: u32| match value.parse::<u32>() {
            Ok(n) if n >= least => Ok(n),
            _ => Err(format!("{name} is a whole number from {least} on")),
        };
        match name {
            "temp" | "temperature" => self.options.sampling.temperature = args::temperature(value)?,
            "seed" => self.seed = Some(number(0)?),
            "n" => self.options.max_tokens = number(1)?,
            "system" if self.preset.has_template() => {
                self.preset.system = Some(value.replace("\\\n", "\n"));
            }
            "system" => {
                let why = "this model has no chat template, through which it would get a system";
                return Err(format!("{why} prompt; write it into your next message"));
            }
            "think" => self.preset.set_think(args::think(value)?)?,
            _ => return Err("/set takes temp, seed, n, system or think, and a value".to_owned()),
        }
        Ok(())
    }

    fn stats(&self) -> String {
        let all = self.engine.expert_counters();
        let held = format!("{} of {} tokens", self.held.len(), self.n_ctx);
        let session = &self.session;
        let mut rows = vec![
            ("answers", session.answers.to_string()),
            ("prompt tokens", session.prompt_tokens.to_string()),
            ("tokens", session.tokens.to_string()),
        ];
        rows.extend(session.tok_s().map(|rate| ("eval rate", format!("{rate:.2} tokens/s"))));
        if let Some(hit_rate) = all.hit_rate() {
            rows.push(("hit rate", percent(hit_rate)));
            rows.push(("faults", all.faults.to_string()));
            rows.push(("bytes read", Bytes(all.bytes_read).to_string()));
        }
        rows.push(("context", held));
        let mut text = format!("The chat so far:\n{}", lines(&rows));
        if let Some(made) = &self.last {
            let total = made.prompt_time + made.eval_time;
            let seed = self.options.sampling.seed;
            let report = Report { engine: self.engine, made, seed, total };
            text.push_str("\nThe last answer:\n");
            text.push_str(&report.timings());
        }
        text
    }

    fn answer(&mut self, text: String) -> anyhow::Result<()> {
        let start = Instant::now();
        self.messages.push(Message::new("user", text));
        let (first, mut prompt) = match self.fitting_prompt() {
            Ok(Some(found)) => found,
            Ok(None) => {
                self.messages.pop();
                output::stderr(&format!(
                    "the context of {} tokens has no room for that; --ctx makes it larger",
                    self.n_ctx
                ));
                return Ok(());
            }
            Err(error) => {
                self.messages.pop();
                output::report(&error, false);
                return Ok(());
            }
        };
        if first > 0 {
            self.forget_oldest(first);
        }
        let mut before = self.make_room(&mut prompt);
        // Without a template, the context alone knows what was said, and it has lost that.
        before.lost = first > 0 && !self.preset.has_template();
        let parser = self.preset.parser(prompt.opens_thinking);
        let manner = Manner { silent: false, hides_thinking: self.hides_thinking, parser };
        let mut out = Tokens::new(true, &self.stops, manner);
        let seed = self.seed.unwrap_or_else(run::random_seed);
        self.options.sampling.seed = seed;
        let made = run::generate(
            self.engine,
            &prompt.tokens,
            &self.options,
            self.preset.marks(),
            &mut out,
        );
        out.finish()?;
        match made {
            Ok(made) => {
                let report =
                    Report { engine: self.engine, made: &made, seed, total: start.elapsed() };
                run::tell(&report, self.verbose);
                if made.stop == Stop::ContextFull {
                    output::stderr(
                        "the next message makes room: the oldest turns are forgotten for it; --ctx \
                         makes the context larger",
                    );
                }
                if made.tokens.is_empty() {
                    self.take_back(before);
                } else {
                    self.keep(prompt, &made, out);
                }
                self.session.add(&made);
                self.last = Some(made);
            }
            Err(error) => {
                self.take_back(before);
                output::report(&error.into(), false);
            }
        }
        Ok(())
    }

    /// The prompt for the last message, and the first message that it is made of: not all of them
    /// where that would leave little room for an answer. `None` where the message alone does not
    /// fit.
    fn fitting_prompt(&self) -> anyhow::Result<Option<(usize, Prompt)>> {
        let answer = (self.options.max_tokens as usize).min(self.n_ctx / ANSWER_PART);
        let last = self.messages.len() - 1;
        // All that stays is read again, so if turns have to go, several do. But what was said last
        // stays while it can.
        let limits = [
            (0..last.min(1), self.n_ctx - answer),
            (2..last, self.n_ctx / 2),
            (2..last, self.n_ctx - answer),
            (last..last + 1, self.n_ctx),
        ];
        for (messages, most) in limits {
            // A turn is a message and its answer.
            for first in messages.step_by(2) {
                let prompt = self.prompt(first)?;
                if prompt.kept + prompt.tokens.len() <= most {
                    return Ok(Some((first, prompt)));
                }
            }
        }
        Ok(None)
    }

    fn forget_oldest(&mut self, messages: usize) {
        self.messages.drain(..messages);
        let turns = match messages / 2 {
            1 => "the oldest turn is".to_owned(),
            n => format!("the {n} oldest turns are"),
        };
        output::note(format!("the context of {} tokens is full: {turns} forgotten", self.n_ctx));
    }

    fn keep(&mut self, prompt: Prompt, made: &Generation, out: Tokens) {
        self.held.extend(prompt.tokens);
        self.held.extend(&made.tokens);
        let position = self.engine.context().position() as usize;
        self.pending = self.held.split_off(position.min(self.held.len()));
        // The context holds a stop text too, which the answer lacks.
        let whole = made.stop != Stop::StopText;
        self.rendered = prompt.rendered.filter(|_| whole).map(|text| text + &out.raw);
        let thinking = Some(out.reply.thinking).filter(|text| !text.is_empty());
        self.messages.push(Message { thinking, ..Message::new("assistant", out.reply.text) });
    }

    /// Brings the context to what the prompt goes on from, and gives what to come back to.
    fn make_room(&mut self, prompt: &mut Prompt) -> Before {
        let whole = prompt.kept == self.held.len();
        let (pending, rendered) = (std::mem::take(&mut self.pending), self.rendered.take());
        if whole {
            return Before { held: prompt.kept, pending, rendered, lost: false };
        }
        if !self.cut(prompt.kept) {
            // The context shares these with the prompt, but cannot be cut back to them.
            let mut tokens = self.held[..prompt.kept].to_vec();
            tokens.append(&mut prompt.tokens);
            *prompt = Prompt { kept: 0, tokens, rendered: prompt.rendered.take(), ..*prompt };
            self.engine.clear();
            self.held.clear();
        }
        Before { held: self.held.len(), pending: Vec::new(), rendered: None, lost: false }
    }

    /// Forgets the last message, which got no answer, and what the context has of it.
    fn take_back(&mut self, before: Before) {
        self.messages.pop();
        let there = self.engine.context().position() as usize >= before.held;
        if there && !before.lost && self.cut(before.held) {
            self.pending = before.pending;
            self.rendered = before.rendered;
        } else {
            self.clear();
        }
    }

    /// Forgets the tokens from `len` on; false where the model's memory cannot be cut.
    fn cut(&mut self, len: usize) -> bool {
        let position = u32::try_from(len).expect("a context is smaller");
        let cut = self.engine.context().forget_from(position);
        if cut {
            self.held.truncate(len);
        }
        cut
    }

    /// What the last message adds to the messages from `first` on. Changes nothing: there may be no
    /// room for it.
    ///
    /// Where a template's new text only adds to the old one, the tokens of the answers stay as
    /// they were drawn. Otherwise (some templates leave out what the model thought) the context
    /// has to be cut back to what it shares with the new text.
    fn prompt(&self, first: usize) -> anyhow::Result<Prompt> {
        let vocab = self.engine.model().vocab();
        let tokenize = |text: &str, begin, special| {
            vocab.tokenize(text, begin, special).map_err(tierstream::Error::from)
        };
        let messages = &self.messages[first..];
        let Some(Rendered { text, opens_thinking }) = self.preset.render(messages)? else {
            if first == 0 {
                let last = self.messages.last().map_or("", |message| message.content.as_str());
                return Ok(self.added(tokenize(last, self.held.is_empty(), false)?));
            }
            let text: String = messages.iter().map(|message| message.content.as_str()).collect();
            return Ok(self.anew(tokenize(&text, true, false)?));
        };
        let more = self.rendered.as_ref().and_then(|had| text.strip_prefix(had.as_str()));
        let prompt = match more {
            Some(more) => self.added(tokenize(more, false, true)?),
            None => self.anew(preset::tokens(self.engine, &text)?),
        };
        Ok(Prompt { rendered: Some(text), opens_thinking, ..prompt })
    }

    /// The prompt that adds `tokens` to what the context holds, and is to hold.
    fn added(&self, tokens: Vec<Token>) -> Prompt {
        let tokens = [&self.pending[..], &tokens].concat();
        Prompt { kept: self.held.len(), tokens, ..Prompt::default() }
    }

    /// The prompt that makes the context hold `tokens`.
    fn anew(&self, mut tokens: Vec<Token>) -> Prompt {
        let same = self.held.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        // Something must be decoded to have a next token.
        let kept = same.min(tokens.len().saturating_sub(1));
        Prompt { kept, tokens: tokens.split_off(kept), ..Prompt::default() }
    }
}

/// What is to be decoded for a message.
#[derive(Default)]
struct Prompt {
    /// So many of the context's tokens stay.
    kept: usize,
    /// What comes after them; the tokens of the last answer that the context lacks are the first.
    tokens: Vec<Token>,
    /// With a template: all of the conversation up to the answer.
    rendered: Option<String>,
    /// It ends where the model is to go on thinking.
    opens_thinking: bool,
}

/// The conversation before a message, to come back to when that gets no answer.
struct Before {
    held: usize,
    pending: Vec<Token>,
    rendered: Option<String>,
    /// It cannot be come back to.
    lost: bool,
}
