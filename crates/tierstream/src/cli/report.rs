//! What a generation took: the line after the text, the block of `--verbose`, the JSON object.

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tierstream::io::{AS_ASKED, Status};
use tierstream::memory::Usage;
use tierstream::size::Bytes;
use tierstream::sums::Against;
use tierstream::{Engine, Generation, LoadRate, Stop, Token};

use super::output;

/// Why there are no experts to tell of.
const NOT_STREAMED: &str = "none streamed: all of the model is in memory";
/// Why there are no reads to tell of.
const NOT_READ: &str = "llama.cpp has read this model";

/// A generation and the engine that made it.
pub(crate) struct Report<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) made: &'a Generation,
    /// Of its sampling.
    pub(crate) seed: u32,
    /// From the start of the program's work to the last token.
    pub(crate) total: Duration,
}

/// The answer of `run --json`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
pub(crate) struct RunJson<'a> {
    model: String,
    text: &'a str,
    thinking: Option<&'a str>,
    tokens: &'a [Token],
    prompt_tokens: usize,
    stop: Stop,
    seed: u32,
    tok_s: Option<f64>,
    prompt_tok_s: Option<f64>,
    total_s: f64,
    load_s: f64,
    prompt_s: f64,
    eval_s: f64,
    stall_s: f64,
    stall_share: f64,
    experts: ExpertsJson,
    gpu: Option<GpuJson>,
    io: IoJson,
    verified: Option<VerifiedJson>,
    peak_rss_bytes: u64,
}

#[derive(Debug, Serialize)]
struct VerifiedJson {
    bytes: u64,
    hash_s: f64,
    against: &'static str,
    recorded: Option<u64>,
    record: Option<String>,
    first_read_bytes: Option<u64>,
    first_read_s: Option<f64>,
}

#[derive(Debug, Serialize)]
struct ExpertsJson {
    total_bytes: u64,
    budget_bytes: u64,
    resident_bytes: u64,
    requests: u64,
    hits: u64,
    hit_rate: Option<f64>,
    faults: u64,
    ram_hits: u64,
    computed: u64,
    evictions: u64,
    read_ahead: u64,
    read_ahead_used: u64,
    bytes_read: u64,
}

#[derive(Debug, Serialize)]
struct GpuJson {
    name: String,
    miss: String,
    whole_tokens: u64,
    pool_bytes: u64,
    start_s: f64,
    shortage_bytes: u64,
    cufile_bytes: u64,
    cufile_reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct IoJson {
    engine: Option<&'static str>,
    direct: bool,
    reason: Option<String>,
    load_bytes: u64,
    cached_bytes: u64,
    load_gbps: Option<f64>,
    limit_gbps: Option<f64>,
    limit_share: Option<f64>,
}

impl IoJson {
    fn of(status: Option<Status>, load: Option<LoadRate>) -> Self {
        let (engine, direct, reason) = match status {
            Some(s) => (Some(s.engine), s.direct, s.reason),
            None => (None, false, Some(NOT_READ.to_owned())),
        };
        let limit_gbps = load.and_then(|load| load.limit_gbps);
        Self {
            engine,
            direct,
            reason,
            load_bytes: load.map_or(0, |load| load.bytes),
            cached_bytes: load.map_or(0, |load| load.cached_bytes),
            load_gbps: load.map(|load| load.gbps),
            limit_gbps,
            limit_share: load.zip(limit_gbps).map(|(load, limit)| load.gbps / limit),
        }
    }
}

impl<'a> Report<'a> {
    /// One line: speed, hit rate, bytes from the drive and the path that they took.
    pub(crate) fn summary(&self) -> String {
        let n = self.made.tokens.len();
        let mut line = format!("{n} token{}", if n == 1 { "" } else { "s" });
        if let Some(rate) = self.tok_s() {
            let _ = write!(line, ", {rate:.1} tok/s");
        }
        match self.hit_rate() {
            Some(hits) => {
                let read = Bytes(self.made.experts.bytes_read);
                let _ = write!(line, ", hit rate {}, {read} read from the drive", percent(hits));
                if let Some(path) = self.path() {
                    let _ = write!(line, " ({path})");
                }
                match self.made.experts.computed {
                    0 => {}
                    1 => line.push_str(", 1 expert computed on the CPU"),
                    n => {
                        let _ = write!(line, ", {n} experts computed on the CPU");
                    }
                }
            }
            None => line.push_str(", nothing streamed"),
        }
        if let (Some(_), Some(checked)) =
            (self.engine.weight_sums(), self.engine.model().checksums())
        {
            // What is read again counts again.
            let (bytes, all) = (checked.bytes(), self.engine.file().tensor_bytes());
            let part = match bytes < all {
                true => format!("{} of {}", Bytes(bytes), Bytes(all)),
                false => Bytes(bytes).to_string(),
            };
            let _ = write!(line, ", {part} compared with checksums");
        }
        match self.made.stop {
            Stop::Cancelled => line.push_str(", stopped"),
            Stop::ContextFull => line.push_str(", the context is full"),
            Stop::End | Stop::Length | Stop::StopText => {}
        }
        line
    }

    /// The block that Ollama prints with `--verbose`, and below it what is ours.
    pub(crate) fn timings(&self) -> String {
        let made = self.made;
        let mut rows: Vec<(&str, String)> = vec![
            ("total duration", duration(self.total)),
            ("load duration", self.load_duration()),
            ("prompt eval count", format!("{} token(s)", made.prompt_tokens)),
            ("prompt eval duration", duration(made.prompt_time)),
            ("prompt eval rate", format!("{:.2} tokens/s", made.prompt_tok_s())),
            ("eval count", format!("{} token(s)", made.tokens.len())),
            ("eval duration", duration(made.eval_time)),
            ("eval rate", self.eval_rate()),
        ];
        rows.extend(self.load_rate().map(|rate| ("load rate", rate)));
        rows.extend(self.gpu_path().map(|path| ("io path to GPU", path)));
        rows.extend(self.streaming());
        rows.extend(self.verified().map(|text| ("verified", text)));
        rows.push(("seed", self.seed.to_string()));
        rows.push(("peak memory", Bytes(Usage::now().peak_rss_bytes).to_string()));
        lines(&rows)
    }

    fn load_duration(&self) -> String {
        let load = duration(self.engine.load_time());
        match self.engine.gpu_start_time() {
            Some(start) => format!("{load} (of which {} for the GPU to start)", duration(start)),
            None => load,
        }
    }

    /// How fast the load has read, by which path, and how near that is to what the drive can do.
    fn load_rate(&self) -> Option<String> {
        let (load, status) = (self.engine.load_rate()?, self.engine.model().read_status()?);
        let (bytes, rate) = (Bytes(load.bytes + load.cached_bytes), output::rate(load.gbps * 1e9));
        let limit = load.limit_gbps.map_or_else(String::new, |limit| {
            let share = percent(load.gbps / limit);
            format!(", {share} of the {} seen of this drive", output::rate(limit * 1e9))
        });
        let way = read_way(status.engine, status.direct, None);
        let cached = Bytes(load.cached_bytes);
        let way = match (load.bytes, load.cached_bytes) {
            (_, 0) => way,
            (0, _) => "all of it was in the page cache".to_owned(),
            _ => format!("{cached} of it were in the page cache, the rest {way}"),
        };
        Some(format!("{rate} for {bytes}{limit} ({way})"))
    }

    /// How the weights that were loaded have really come to the GPU, and why.
    fn gpu_path(&self) -> Option<String> {
        let reason = self.cufile_reason()?;
        let bytes = self.engine.model().gds_read().map_or(0, |read| read.bytes);
        Some(match bytes {
            0 => format!("through host memory ({reason})"),
            _ => format!("cufile, {} past host memory ({reason})", Bytes(bytes)),
        })
    }

    /// Why weights were read past host memory, or not.
    fn cufile_reason(&self) -> Option<String> {
        let failed = self.engine.model().gds_read().and_then(|read| read.failed.clone());
        failed.or_else(|| Some(self.engine.gpu_way()?.reason.clone()))
    }

    /// The prompt yields the first token, which takes no time of its own.
    fn eval_rate(&self) -> String {
        match self.made.tokens.len() {
            0 | 1 => "none: the prompt yields the first token".to_owned(),
            n => format!("{:.2} tokens/s (the {} after the first)", self.made.tok_s(), n - 1),
        }
    }

    fn streaming(&self) -> Vec<(&'static str, String)> {
        let Some(reader) = self.engine.model().reader() else {
            return vec![("experts", NOT_STREAMED.to_owned())];
        };
        let used = &self.made.experts;
        let (budget, resident) = self.engine.model().pool_bytes();
        let all = self.engine.model().expert_bytes();
        let status = reader.status();
        let per_token = used.faults as f64 / self.made.tokens.len().max(1) as f64;
        let pool = format!(
            "{} of {} ({}), {} resident",
            Bytes(budget),
            Bytes(all),
            self.engine.model().pool_share().map_or_else(|| "-".to_owned(), percent),
            Bytes(resident)
        );
        let hits = self.hit_rate().map_or_else(|| "no requests".to_owned(), percent);
        let mut rows = vec![("expert pool", pool)];
        rows.extend(self.engine.model().gpu().map(|gpu| {
            let taken = Bytes(self.engine.model().vram_bytes().unwrap_or(0));
            ("GPU", format!("{}, {taken} of its memory taken for the pool", gpu.name()))
        }));
        rows.extend(self.engine.model().gpu().map(|_| {
            let whole = self.engine.whole_tokens();
            ("as a whole", format!("{whole} tokens, whose routing the host did not wait for"))
        }));
        rows.extend([
            ("hit rate", format!("{hits} ({} of {})", used.hits, used.requests)),
            ("faults", self.faults_text(per_token)),
            ("bytes read", Bytes(used.bytes_read).to_string()),
            ("stall share", percent(self.stall_share())),
            ("io path", read_way(status.engine, status.direct, status.reason.as_deref())),
        ]);
        rows
    }

    fn faults_text(&self, per_token: f64) -> String {
        let used = &self.made.experts;
        let mut text = format!("{} ({per_token:.1} per token)", used.faults);
        if let Some((room, resident)) = self.engine.model().pool_below_bytes() {
            let _ = write!(
                text,
                "; {} records came from host memory ({} of {} filled)",
                used.ram_hits,
                Bytes(resident),
                Bytes(room)
            );
        }
        if used.computed > 0 {
            let _ = write!(text, "; {} were computed on the CPU", used.computed);
        }
        text
    }

    pub(crate) fn json(&self, text: &'a str, thinking: &'a str) -> RunJson<'a> {
        let (made, model) = (self.made, self.engine.model());
        let (budget_bytes, resident_bytes) = model.pool_bytes();
        let used = &made.experts;
        RunJson {
            model: model.path().display().to_string(),
            text,
            thinking: Some(thinking).filter(|text| !text.is_empty()),
            tokens: &made.tokens,
            prompt_tokens: made.prompt_tokens,
            stop: made.stop,
            seed: self.seed,
            tok_s: self.tok_s(),
            prompt_tok_s: some_rate(made.prompt_tok_s()),
            total_s: self.total.as_secs_f64(),
            load_s: self.engine.load_time().as_secs_f64(),
            prompt_s: made.prompt_time.as_secs_f64(),
            eval_s: made.eval_time.as_secs_f64(),
            stall_s: made.stall.as_secs_f64(),
            stall_share: self.stall_share(),
            experts: ExpertsJson {
                total_bytes: model.expert_bytes(),
                budget_bytes,
                resident_bytes,
                requests: used.requests,
                hits: used.hits,
                hit_rate: self.hit_rate(),
                faults: used.faults,
                ram_hits: used.ram_hits,
                computed: used.computed,
                evictions: used.evictions,
                read_ahead: used.read_ahead,
                read_ahead_used: used.read_ahead_used,
                bytes_read: used.bytes_read,
            },
            gpu: model.gpu().map(|gpu| GpuJson {
                name: gpu.name().to_owned(),
                miss: self.engine.miss().to_string(),
                whole_tokens: self.engine.whole_tokens(),
                pool_bytes: model.vram_bytes().unwrap_or(0),
                start_s: self.engine.gpu_start_time().unwrap_or_default().as_secs_f64(),
                shortage_bytes: model.pool_shortage_bytes(),
                cufile_bytes: model.gds_read().map_or(0, |read| read.bytes),
                cufile_reason: self.cufile_reason(),
            }),
            io: IoJson::of(model.read_status(), self.engine.load_rate()),
            verified: self.verified_json(),
            peak_rss_bytes: Usage::now().peak_rss_bytes,
        }
    }

    fn verified_json(&self) -> Option<VerifiedJson> {
        let (sums, checked) = (self.engine.weight_sums()?, self.engine.model().checksums()?);
        let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).ok();
        Some(VerifiedJson {
            bytes: checked.bytes(),
            hash_s: checked.time().as_secs_f64(),
            against: sums.against().name(),
            recorded: sums.recorded().and_then(since).map(|time| time.as_secs()),
            record: sums.record().map(|path| path.display().to_string()),
            first_read_bytes: sums.first_read().map(|(bytes, _)| bytes),
            first_read_s: sums.first_read().map(|(_, time)| time.as_secs_f64()),
        })
    }

    /// Bytes that were compared with their checksums, what these are, and what it took.
    fn verified(&self) -> Option<String> {
        let (sums, checked) = (self.engine.weight_sums()?, self.engine.model().checksums()?);
        let (bytes, time) = (Bytes(checked.bytes()), duration(checked.time()));
        let against = match sums.against() {
            Against::Record => sums.source(),
            Against::Pack => "of the packed file".to_owned(),
            Against::FirstLoad => {
                "recorded just before: there was nothing to compare with".to_owned()
            }
            Against::Sha256 => {
                "recorded just before, when the file had the SHA-256 that its name says".to_owned()
            }
        };
        let mut text = format!("{bytes} have the checksums {against}; hashing took {time}");
        if let Some((bytes, time)) = sums.first_read() {
            let _ = write!(text, ", reading all of it first {} ({})", duration(time), Bytes(bytes));
        }
        Some(text)
    }

    /// That the pool is smaller than it was to be, if it is.
    pub(crate) fn shortage(&self) -> Option<String> {
        let bytes = self.engine.model().pool_shortage_bytes();
        let shortage = Bytes(bytes);
        (bytes > 0).then(|| {
            format!("other programs have taken the GPU's memory: the pool is {shortage} smaller")
        })
    }

    /// The path that reads really took.
    fn path(&self) -> Option<String> {
        let status = self.engine.model().reader()?.status();
        Some(read_way(status.engine, status.direct, None))
    }

    fn tok_s(&self) -> Option<f64> {
        some_rate(self.made.tok_s())
    }

    fn hit_rate(&self) -> Option<f64> {
        self.made.experts.hit_rate()
    }

    fn stall_share(&self) -> f64 {
        let busy = self.made.prompt_time + self.made.eval_time;
        if busy.is_zero() { 0.0 } else { self.made.stall.as_secs_f64() / busy.as_secs_f64() }
    }
}

fn some_rate(rate: f64) -> Option<f64> {
    (rate > 0.0).then_some(rate)
}

/// The engine, the path of its reads, and why that is not the fastest.
pub(crate) fn read_way(engine: &str, direct: bool, reason: Option<&str>) -> String {
    let way = if direct { "direct" } else { "through the page cache" };
    match reason {
        Some(AS_ASKED) => format!("{engine}, {way}, as asked"),
        Some(reason) => format!("{engine}, {way} ({reason})"),
        None => format!("{engine}, {way}"),
    }
}

/// `93.1 %` of a share from 0 to 1.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Names and values under each other.
pub(crate) fn lines(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len() + 1).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in rows {
        let _ = writeln!(text, "{:width$} {value}", format!("{name}:"));
    }
    text
}

/// As Go, and so Ollama, writes durations: `1m2.5s`, `4.709213s`, `289.25ms`.
fn duration(d: Duration) -> String {
    let d = Duration::from_micros(u64::try_from(d.as_micros()).unwrap_or(u64::MAX));
    let (minutes, seconds) = (d.as_secs() / 60, d - Duration::from_secs(d.as_secs() / 60 * 60));
    match minutes {
        _ if d.is_zero() => "0s".to_owned(),
        0 => format!("{d:?}"),
        1..60 => format!("{minutes}m{}s", seconds.as_secs_f64()),
        _ => format!("{}h{}m{}s", minutes / 60, minutes % 60, seconds.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Duration, duration, lines};

    #[test]
    fn durations_are_written_as_ollama_does() {
        for (micros, text) in [
            (0, "0s"),
            (250, "250µs"),
            (289_250, "289.25ms"),
            (4_709_213, "4.709213s"),
            (62_500_000, "1m2.5s"),
            (3_600_000_000, "1h0m0s"),
        ] {
            assert_eq!(duration(Duration::from_micros(micros)), text);
        }
    }

    #[test]
    fn values_stand_under_each_other() {
        let rows = [("a", "1".to_owned()), ("long", "2".to_owned())];
        assert_eq!(lines(&rows), "a:    1\nlong: 2\n");
    }
}
