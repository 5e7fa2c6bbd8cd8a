//! Budgets are hard: the process stays within `--ram`, measured by the kernel. And they are used.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tierstream_synth::{Arch, Quant, Spec, TensorType};

const MIB: u64 = 1 << 20;

/// What the promise leaves for the allocator and the kernel's own accounting.
const SLACK_BYTES: u64 = 64 * MIB;

/// What may stay unused of a budget: what is counted and not touched by a run that is no worst
/// case.
const UNUSED_BYTES: u64 = 48 * MIB;

/// By how much `show` may differ from what `run` makes.
const SHOW_BYTES: u64 = 4 * MIB;

/// A model on the drive, and runs of it.
struct Case {
    dir: tempfile::TempDir,
    /// Bytes of the file.
    bytes: u64,
    /// Bytes of the largest expert record.
    record_bytes: u64,
    flags: Vec<&'static str>,
    /// What may stay unused of a budget, beside one record.
    unused_bytes: u64,
}

impl Case {
    fn new(spec: &Spec, flags: &[&'static str]) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temp folder");
        let written = spec.write(dir.path().join("model.gguf")).expect("there is room for it");
        let records = spec.plan().records();
        let record_bytes = records.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        Self {
            dir,
            bytes: written.bytes,
            record_bytes,
            flags: flags.to_vec(),
            unused_bytes: UNUSED_BYTES,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("model.gguf")
    }

    /// `run --json` with a prompt of so many tokens, of which `n` more are generated.
    fn try_run(&self, ram: &str, prompt: usize, n: usize) -> Output {
        let ids: Vec<String> = (0..prompt).map(|i| (i * 7 % 1000).to_string()).collect();
        let (ids, n) = (ids.join(","), n.to_string());
        let args = ["--prompt-tokens", &ids, "-n", &n, "--ram", ram, "--json"];
        program("run", &self.path(), &[&args[..], &self.flags].concat())
    }

    fn run(&self, ram: &str, prompt: usize, n: usize) -> Value {
        let report = json(&self.try_run(ram, prompt, n));
        assert_eq!(report["tokens"].as_array().map(Vec::len), Some(n));
        report
    }

    /// A run within `ram` bytes, and `show` of the same: the budget is kept to, used, and foretold.
    #[track_caller]
    fn check(&self, ram: u64, prompt: usize, n: usize) {
        let ram_arg = format!("{ram}B");
        let report = self.run(&ram_arg, prompt, n);
        let (peak, pool) = (number(&report["peak_rss_bytes"]), pool(&report));
        assert!(peak <= ram + SLACK_BYTES, "peak {peak} of a budget of {ram}: {report}");
        assert!(number(&report["experts"]["faults"]) > 0);
        let used = peak + self.unused_bytes + self.record_bytes;
        assert!(used >= ram, "peak {peak} of a budget of {ram}, with a pool of {pool}");
        let shown = self.shown(&["--ram", &ram_arg]);
        let foretold = number(&shown["budgets"][4]["pool_bytes"]);
        assert!(
            foretold.abs_diff(pool) <= SHOW_BYTES + self.record_bytes,
            "a pool of {pool} where `show` has {foretold}"
        );
    }

    fn shown(&self, flags: &[&str]) -> Value {
        json(&program("show", &self.path(), &[flags, &self.flags, &["--json"]].concat()))
    }

    /// The budget that the hint of a refused one names.
    fn least(&self, ram: &str) -> String {
        let out = self.try_run(ram, 20, 4);
        assert_eq!(out.status.code(), Some(1));
        let error: Value = serde_json::from_slice(&out.stdout).expect("one JSON object");
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        assert!(text("error").contains("too little memory"), "{error}");
        let hint = text("hint");
        let named = hint.split_once("--ram ").and_then(|(_, rest)| rest.split_once(','));
        named.unwrap_or_else(|| panic!("{hint}")).0.to_owned()
    }
}

fn program(verb: &str, model: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tierstream"))
        .arg(verb)
        .arg(model)
        .args(args)
        .output()
        .expect("the program starts")
}

fn json(out: &Output) -> Value {
    assert!(out.status.success(), "{out:?}");
    serde_json::from_slice(&out.stdout).expect("one JSON object")
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no count"))
}

fn pool(report: &Value) -> u64 {
    number(&report["experts"]["budget_bytes"])
}

fn mib(text: &str) -> u64 {
    let number = text.strip_suffix("MiB").and_then(|n| n.parse::<u64>().ok());
    number.unwrap_or_else(|| panic!("{text}")) * MIB
}

#[test]
fn half_of_the_model_is_enough_and_is_kept_to() {
    let spec = Spec::big(Arch::Qwen3Moe).quant(Quant::Q4_K_M).scale_to(1 << 30);
    let mut case = Case::new(&spec, &[]);
    case.check(case.bytes / 2, 1200, 48);
    // A long batch, in a context that it fills, so that the compute buffers are touched. There is
    // room for a batch all of whose rows go to one expert.
    case.flags = vec!["--batch", "2048", "--ctx", "2048"];
    case.unused_bytes += 24 * MIB;
    case.check(case.bytes / 2, 2010, 32);
}

/// Without a pool, or with one that has a slot for each record: slots are a little larger than records,
/// which must not keep the last experts out.
#[test]
fn a_model_that_fits_is_read_once() {
    let case = Case::new(&Spec::big(Arch::Qwen3Moe).quant(Quant::Q4_K_M).scale_to(300 * MIB), &[]);
    let mut texts = Vec::new();
    for flags in [&["--ram", "2GiB"][..], &["--ram", "600MiB"], &[], &["--experts", "100%"]] {
        let args = ["--prompt-tokens", "1,2,3", "-n", "4", "--temp", "0", "--json"];
        let report = json(&program("run", &case.path(), &[&args, flags].concat()));
        let experts = &report["experts"];
        assert_eq!(number(&experts["requests"]) > 0, flags.contains(&"--experts"), "{flags:?}");
        assert_eq!((number(&experts["faults"]), number(&experts["bytes_read"])), (0, 0));
        let loaded = number(&report["io"]["load_bytes"]) + number(&report["io"]["cached_bytes"]);
        assert!((case.bytes - (8 << 20)..case.bytes + (8 << 20)).contains(&loaded), "{flags:?}");
        if let ["--ram", ram] = flags {
            let ram = if *ram == "2GiB" { 2 << 30 } else { mib(ram) };
            assert!(number(&report["peak_rss_bytes"]) <= ram, "{flags:?}: {report}");
        }
        texts.push(report["tokens"].clone());
    }
    // Whoever computes them, they are the same bits.
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
}

#[test]
fn wide_layers_have_their_room() {
    // The widths of Mixtral 8x7B, where a batch of 512 tokens gathers rows of 64 MiB.
    let mut spec = Spec::big(Arch::Mixtral).width(4096).experts(5, 2).quant(TensorType::Q4_0);
    (spec.n_layer, spec.n_ff_exp) = (2, 14336);
    let case = Case::new(&spec, &["--ctx", "1024"]);
    case.check(case.bytes / 2 + 320 * MIB, 700, 8);
}

#[test]
fn other_types_have_their_room() {
    for quant in [TensorType::F16, TensorType::Q8_0] {
        let spec = Spec::big(Arch::Olmoe).quant(quant).scale_to(400 * MIB);
        let case = Case::new(&spec, &["--ctx", "2048"]);
        case.check(case.bytes / 2 + 128 * MIB, 600, 32);
    }
}

#[test]
fn the_least_budget_is_named_and_works() {
    let case = Case::new(&Spec::big(Arch::Qwen3Moe).scale_to(200 * MIB), &[]);
    // By the header alone; and by what was measured, just below what the header promises.
    let named = case.least("1MiB");
    let report = case.run(&named, 600, 4);
    let peak = number(&report["peak_rss_bytes"]);
    assert!(peak <= mib(&named) + SLACK_BYTES, "peak {peak} of a budget of {named}");
    let shown = number(&case.shown(&[])["ram_bytes_min_estimate"]);
    assert!(shown.abs_diff(mib(&named)) <= SHOW_BYTES, "{named} where `show` has {shown}");
    let below = mib(&named) - 16 * MIB;
    assert!(mib(&case.least(&format!("{below}B"))).abs_diff(mib(&named)) <= SHOW_BYTES);
}

#[test]
fn a_dense_model_is_refused_before_it_is_read() {
    let case = Case::new(&Spec::big(Arch::Llama).scale_to(200 * MIB), &["--ctx", "512"]);
    let named = case.least("100MiB");
    assert!(mib(&named) > case.bytes);
    let report = case.run(&named, 100, 4);
    let peak = number(&report["peak_rss_bytes"]);
    assert!(peak <= mib(&named) + SLACK_BYTES, "peak {peak} of a budget of {named}: {report}");
    // With a hole in place of its weights it is refused alike.
    let file = std::fs::OpenOptions::new().write(true).open(case.path()).unwrap();
    file.set_len(4 * MIB).unwrap();
    file.set_len(case.bytes).unwrap();
    assert!(mib(&case.least("100MiB")).abs_diff(mib(&named)) <= SHOW_BYTES);
}
