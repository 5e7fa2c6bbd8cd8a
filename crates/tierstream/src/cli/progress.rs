//! How far something is, on a terminal: a bar, or a spinner.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tierstream::{LoadStage, Loading};

use super::output::rate;
use super::wrap;

/// What takes no longer than this shows nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// The same of a load, whose bar tells more.
const LOAD_PATIENCE: Duration = Duration::from_millis(100);

/// Redraws.
const TICK: Duration = Duration::from_millis(100);

/// Width of a terminal that does not tell it.
const COLUMNS: usize = 80;

/// Width of a bar of a load, at least and at most.
const BAR_COLUMNS: (usize, usize) = (8, 30);

/// A bar, or a spinner, that appears after a second, on a terminal only. Gone when dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    told: Arc<Mutex<Told>>,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Clone)]
struct Told {
    label: &'static str,
    detail: String,
    /// 0 to 1, if there is a share to tell.
    share: Option<f32>,
    load: Option<Loading>,
}

impl Progress {
    pub(crate) fn start(label: &'static str) -> Self {
        Self::start_after(PATIENCE, label)
    }

    /// Of a load: [`Progress::load`] fills it.
    pub(crate) fn of_load() -> Self {
        Self::start_after(LOAD_PATIENCE, "loading")
    }

    fn start_after(patience: Duration, label: &'static str) -> Self {
        let told = Told { label, detail: String::new(), share: None, load: None };
        let mut this = Self { told: Arc::new(Mutex::new(told)), stop: None, thread: None };
        if io::stderr().is_terminal() {
            let (stop, stopped) = mpsc::channel();
            let told = this.told.clone();
            let draw = move || draw(&told, patience, &stopped);
            // Without its thread there is no bar, and nothing else is lost.
            this.thread = std::thread::Builder::new().name("progress".into()).spawn(draw).ok();
            this.stop = Some(stop);
        }
        this
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        lock(&self.told)
    }

    /// Another part of the work has begun.
    pub(crate) fn label(&self, label: &'static str) {
        self.told().label = label;
    }

    /// What stands behind the bar.
    pub(crate) fn detail(&self, detail: String) {
        self.told().detail = detail;
    }

    /// `share` of the work is done, 0 to 1.
    pub(crate) fn set(&self, share: f32) {
        self.told().share = Some(share.clamp(0.0, 1.0));
    }

    /// A load is so far.
    pub(crate) fn load(&self, loading: Loading) {
        self.told().load = Some(loading);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

fn draw(told: &Mutex<Told>, patience: Duration, stopped: &mpsc::Receiver<()>) {
    let goes_on = |wait| stopped.recv_timeout(wait) == Err(mpsc::RecvTimeoutError::Timeout);
    if !goes_on(patience) {
        return;
    }
    let style = |t| ProgressStyle::with_template(t).expect("a constant template");
    let bar = ProgressBar::with_draw_target(Some(1000), ProgressDrawTarget::stderr());
    let mut shown = "";
    loop {
        let Told { label, detail, share, load } = lock(told).clone();
        let template = match (&load, share) {
            (Some(load), _) if load.bytes_total > 0 => "{wide_msg}",
            (_, Some(_)) => "{msg} {bar:30} {percent:>3} % {elapsed} {prefix}",
            (_, None) => "{spinner} {msg} {elapsed}",
        };
        if template != shown {
            bar.set_style(style(template).progress_chars("=> "));
            shown = template;
        }
        match load {
            Some(load) if load.bytes_total > 0 => {
                let columns = wrap::columns(io::stderr()).unwrap_or(COLUMNS);
                // The last column stays free: a line that fills it is broken by some terminals.
                bar.set_message(load_line(&load, columns - 1));
            }
            _ => bar.set_message(label),
        }
        bar.set_prefix(detail);
        if let Some(share) = share {
            bar.set_position((f64::from(share) * 1000.0) as u64);
        }
        bar.tick();
        if !goes_on(TICK) {
            break;
        }
    }
    bar.finish_and_clear();
}

/// A load in one line of at most `columns`: what is less important goes first where there is no room.
fn load_line(load: &Loading, columns: usize) -> String {
    let label = match load.stage {
        LoadStage::Weights => "loading",
        LoadStage::Experts => "reading experts",
    };
    let total = load.bytes_total.max(1);
    let done = load.bytes_done.min(total);
    let share = done as f64 / total as f64;
    let moves = load.bytes_per_s > 0.0 && done < total;
    // As wide as at the end, so that the bar keeps its place.
    let width = gib(total, total).len();
    let bytes = format!("{:>width$} of {}", gib(done, total), gib_unit(total));
    let speed = moves.then(|| rate(load.bytes_per_s));
    let limit = load.limit_bytes_per_s.filter(|limit| moves && *limit > 0.0);
    let of_limit =
        limit.map(|limit| format!("({:.0} % of drive)", load.bytes_per_s / limit * 100.0));
    let left = moves.then(|| format!("{} left", seconds((total - done) as f64 / load.bytes_per_s)));

    let head = format!("{label} {:>3} %", (share * 100.0) as u32);
    let (least_bar, most_bar) = BAR_COLUMNS;
    // In the order in which they are given room; shown in another.
    let wanted = [Some(&bytes), left.as_ref(), speed.as_ref(), of_limit.as_ref()];
    let mut room = columns.saturating_sub(head.chars().count());
    let mut fits = [false; 4];
    let mut has_speed = false;
    for (at, text) in wanted.iter().enumerate() {
        let Some(text) = text else { continue };
        // The share of the drive belongs to the rate.
        let needs = text.chars().count() + if at == 3 { 1 } else { 2 };
        if needs <= room && (at != 3 || has_speed) {
            fits[at] = true;
            has_speed |= at == 2;
            room -= needs;
        }
    }
    let bar = room.saturating_sub(3).min(most_bar);
    let mut line = String::new();
    let _ = match bar >= least_bar {
        true => write!(line, "{label} [{}] {:>3} %", drawn(share, bar), (share * 100.0) as u32),
        false => write!(line, "{head}"),
    };
    for at in [0, 2, 3, 1] {
        if let Some(text) = wanted[at].filter(|_| fits[at]) {
            let space = if at == 3 { " " } else { "  " };
            let _ = write!(line, "{space}{text}");
        }
    }
    line
}

/// `=====>    `, `columns` wide.
fn drawn(share: f64, columns: usize) -> String {
    let full = ((share * columns as f64) as usize).min(columns);
    let head = if full < columns { ">" } else { "" };
    format!("{:<columns$}", "=".repeat(full) + head)
}

/// `done` in the unit of `total`, without it.
fn gib(done: u64, total: u64) -> String {
    let (unit, digits) = unit_of(total);
    format!("{:.digits$}", done as f64 / unit as f64)
}

fn gib_unit(total: u64) -> String {
    let name = if unit_of(total).0 == 1 << 30 { "GiB" } else { "MiB" };
    format!("{} {name}", gib(total, total))
}

fn unit_of(total: u64) -> (u64, usize) {
    if total >= 1 << 30 { (1 << 30, 1) } else { (1 << 20, 0) }
}

fn seconds(seconds: f64) -> String {
    match seconds.ceil() as u64 {
        s @ 0..100 => format!("{s} s"),
        s @ 100..6000 => format!("{} min", s.div_ceil(60)),
        s => format!("{:.1} h", s as f64 / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loading(done_gib: f64, gbps: f64, limit_gbps: Option<f64>) -> Loading {
        Loading {
            stage: LoadStage::Weights,
            bytes_done: (done_gib * f64::from(1 << 30)) as u64,
            bytes_total: (18.4 * f64::from(1 << 30)) as u64,
            bytes_per_s: gbps * 1e9,
            limit_bytes_per_s: limit_gbps.map(|gbps| gbps * 1e9),
        }
    }

    #[test]
    fn a_load_by_width() {
        let mut all = String::new();
        let half = loading(6.21, 2.41, Some(2.5));
        for columns in [120, 100, 90, 79, 70, 60, 50, 40, 30, 20] {
            let line = load_line(&half, columns);
            assert!(line.chars().count() <= columns, "{columns}: {line}");
            let _ = writeln!(all, "{columns:>3} {line}");
        }
        insta::assert_snapshot!(all);
    }

    #[test]
    fn a_load_from_its_start_to_its_end() {
        let mut all = String::new();
        for load in [
            loading(0.0, 0.0, Some(2.5)),
            loading(0.2, 2.0, None),
            loading(9.0, 2.6, Some(2.5)),
            loading(18.39, 2.4, Some(2.5)),
            loading(18.4, 2.4, Some(2.5)),
            loading(19.0, 2.4, Some(0.0)),
            Loading { stage: LoadStage::Experts, ..loading(1.0, 0.001, None) },
            Loading { bytes_total: 20 << 20, ..loading(0.01, 0.5, None) },
        ] {
            let _ = writeln!(all, "{}", load_line(&load, 100));
        }
        insta::assert_snapshot!(all);
    }
}
