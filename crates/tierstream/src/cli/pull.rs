//! `tierstream pull`: a model of the Hugging Face hub, fetched into its cache.

use std::cell::Cell;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Instant;

use serde::Serialize;
use tierstream::size::Bytes;
use tierstream_pull::{Cancel, Event, Observer, Options, Pulled, Puller};
use tierstream_store::{Environment, HubName};

use super::args::{Cli, Pull};
use super::interrupt::{self, Running};
use super::output::{self, Progress};

/// The answer of `pull`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
struct Answer {
    name: String,
    file: String,
    file_bytes: u64,
    fetched_bytes: u64,
    total_s: f64,
    fetch_gbps: Option<f64>,
}

pub(crate) fn pull(cli: &Cli, args: &Pull) -> anyhow::Result<ExitCode> {
    interrupt::install()?;
    let name = HubName::parse(&args.name)?;
    let puller = Puller::new(&Environment::of_process(), Options::default())?;
    let start = Instant::now();
    let pulled = {
        let cancel = Cancel::new();
        let stop = cancel.clone();
        let _running = Running::stopped_by(move || stop.cancel());
        puller.pull(&name, &Shown::new(), &cancel)?
    };
    let answer = answer(pulled, start.elapsed().as_secs_f64());
    if cli.json {
        output::json(&answer)?
    } else {
        output::print(&text(&answer))?
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows a pull on a terminal; elsewhere only what keeps it from going on.
struct Shown {
    progress: Progress,
    /// When the first bytes were told of, and how many there were.
    begun: Cell<Option<(Instant, u64)>>,
}

impl Shown {
    fn new() -> Self {
        Self { progress: Progress::start("asking the hub"), begun: Cell::new(None) }
    }

    fn tell(&self, text: String) {
        match io::stderr().is_terminal() {
            true => self.progress.detail(text),
            false => output::note(text),
        }
    }
}

impl Observer for Shown {
    fn report(&self, event: Event<'_>) {
        match event {
            Event::Asking => {}
            Event::Waiting(file) => self.tell(format!("another program fetches {file}, waiting")),
            Event::Retrying { why, wait } => {
                self.tell(format!("{why}; trying again in {}", output::rough(wait.as_secs_f64())));
            }
            Event::Fetching(files) => {
                let (mut done, mut all) = (0, 0);
                for file in files {
                    (done, all) = (done + file.done_bytes, all + file.bytes);
                }
                let (start, before) = self.begun.get().unwrap_or((Instant::now(), done));
                self.begun.set(Some((start, before)));
                self.progress.label("fetching");
                self.progress.set(done as f32 / all.max(1) as f32);
                let rate = (done - before) as f64 / start.elapsed().as_secs_f64();
                if rate > 0.0 {
                    let left = output::rough((all - done) as f64 / rate);
                    self.progress.detail(format!("{}, {left} left", output::rate(rate)));
                }
            }
            Event::Checking(_) => self.progress.label("comparing"),
            _ => {}
        }
    }
}

fn answer(pulled: Pulled, total_s: f64) -> Answer {
    let fetched_bytes = pulled.fetched_bytes;
    Answer {
        name: pulled.name,
        file: pulled.path.display().to_string(),
        file_bytes: pulled.bytes,
        fetched_bytes,
        total_s,
        fetch_gbps: (fetched_bytes > 0).then(|| fetched_bytes as f64 / 1e9 / total_s),
    }
}

fn text(answer: &Answer) -> String {
    let (name, size) = (output::printable(&answer.name), Bytes(answer.file_bytes));
    let Some(gbps) = answer.fetch_gbps else {
        return format!("{name} was there already, {size}\n");
    };
    let before = match answer.file_bytes.saturating_sub(answer.fetched_bytes) {
        0 => String::new(),
        bytes => format!(" ({} were there from before)", Bytes(bytes)),
    };
    let rate = output::rate(gbps * 1e9);
    format!("fetched {name}, {size} in {:.1} s, {rate}{before}\n", answer.total_s)
}
