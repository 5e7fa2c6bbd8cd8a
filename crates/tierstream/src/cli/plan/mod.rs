//! `tierstream plan`: whether to stream a model on this machine.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use tierstream::costs::{self, Below, streamed_layers};
use tierstream::gguf::{self, Experts};
use tierstream::size::{Bytes, PoolShare};
use tierstream::{Forecast, Miss, Options, Requirement, drive};
use tierstream_eval::plan::{
    Costs, Curve, Expected, Limit, Machine, Place, Placement, Prediction, Range, Verdict,
    VerdictKind, predict, verdict,
};
use tierstream_eval::{Assume, Layer, Phase, Trace, read};

use self::gpu::OnGpu;
use super::args::{Cli, EngineArgs, GpuArg, Plan};
use super::open;
use super::output::{self, Failure, rate, rough};
use super::recording;

mod gpu;

/// Shares of the experts that are told of, beside what there is room for.
const SHARES: [f64; 5] = [0.125, 0.25, 0.5, 0.75, 1.0];

/// Weights that are loaded as a whole to see how fast they are: a few seconds' worth.
const WHOLE_BYTES_MAX: u64 = 3 << 29;

/// How long a drive is measured for a dense model.
const DRIVE_TIME: Duration = Duration::from_secs(1);

/// Where it was not measured: time of a token computed as a whole over that of one computed layer by layer,
/// at the least.
const RESIDENT_SHARE: f64 = 0.7;

/// Tokens of the prompt before the first token.
const PROMPT_TOKENS: i32 = 64;

/// The answer of `plan`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
struct Answer {
    model: String,
    architecture: String,
    shape: Option<Shape>,
    curve: Option<CurveOf>,
    measured: Option<Measured>,
    measured_gpu: Option<OnGpu>,
    ram_bytes: u64,
    ram_bytes_min: u64,
    vram_bytes: Option<u64>,
    predictions: Vec<Prediction>,
    #[serde(flatten)]
    verdict: Verdict,
}

#[derive(Debug, Serialize)]
struct Shape {
    moe_layers: usize,
    experts: u32,
    used: u32,
    record_bytes: u64,
    token_cycle_bytes: u64,
    expert_bytes: u64,
    dense_bytes: u64,
}

/// Where the hit rates are from.
#[derive(Debug, Serialize)]
struct CurveOf {
    /// `trace`, or `bundled`.
    source: &'static str,
    trace: Option<String>,
    tokens: Option<usize>,
}

/// What was measured of the machine.
#[derive(Debug, Serialize)]
struct Measured {
    hit_s: Range,
    resident_s: Option<Range>,
    faults: Vec<Faults>,
    drive_gbps: f64,
    packed_gain: Option<f64>,
    load_s: f64,
    load_gbps: Option<f64>,
}

/// So many faults of a layer at one time.
#[derive(Debug, Serialize)]
struct Faults {
    faults: f64,
    /// What they add to the layer.
    added_s: Range,
    /// What reading them alone takes.
    read_s: Range,
}

pub(crate) fn plan(cli: &Cli, args: &Plan) -> anyhow::Result<ExitCode> {
    let path = open::path(&args.model)?;
    let file = tierstream::pack::open(&path).map_err(tierstream::Error::from)?;
    let experts = Experts::group(&file).map_err(tierstream::Error::from)?;
    let layers = layers(&experts);
    let engine = without_gpu(&args.model.engine);
    let options = || open::options(&engine, None);
    // Before the trace is in memory, which a run has not.
    let forecast = Forecast::new(&file, options()?)?;
    let trace = args.trace.as_ref().map(|path| traced(path, &file, &layers)).transpose()?;
    let ram = forecast.ram_bytes(engine.ram.map(|ram| ram.0));
    let answer = if layers.is_empty() {
        dense(&file, &forecast, ram)?
    } else {
        let needs = *forecast.requirement();
        let has_gpu = args.model.engine.machine.gpu.0.is_some();
        if !has_gpu {
            needs.left_of(ram)?;
        }
        drop(forecast);
        let measured = measure(&path, &experts, options)?;
        let with_gpu = || open::options(&args.model.engine, None);
        let on_gpu = has_gpu.then(|| gpu::measure(&path, &experts, with_gpu)).transpose()?;
        let curve = match &trace {
            Some(trace) => Curve::Trace(trace),
            None => Curve::Bundled { architecture: file.architecture() },
        };
        let model = Model { layers: &layers, experts: &experts, needs, curve, measured: &measured };
        let answer = model.answer(args, &file, ram, on_gpu.as_ref())?;
        Answer { measured: Some(measured), measured_gpu: on_gpu, ..answer }
    };
    if cli.json {
        output::json(&answer)?;
    } else {
        output::print(&text(&answer))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The same model on the processor, for which all memory is there: with a GPU, --ram is of a pool below it.
fn without_gpu(args: &EngineArgs) -> EngineArgs {
    let mut args = args.clone();
    if args.machine.gpu.0.is_some() {
        args.ram = None;
    }
    (args.machine.gpu, args.machine.vram, args.miss) = (GpuArg(None), None, Miss::Copy);
    args
}

/// Layers that stream, as traces have them.
fn layers(experts: &Experts) -> Vec<Layer> {
    let of = |layer: &&gguf::experts::MoeLayer| Layer {
        block: layer.layer,
        experts: layer.experts,
        used: layer.used,
        record_bytes: layer.record_bytes,
    };
    streamed_layers(experts).iter().map(of).collect()
}

/// A trace of a model with these layers.
fn traced(path: &Path, file: &gguf::Model, layers: &[Layer]) -> anyhow::Result<Trace> {
    let experts = layers.iter().map(|layer| layer.experts).max();
    let trace = read(path, Assume { experts })?;
    trace.header().check_model(layers)?;
    if trace.count(Phase::Decode) == 0 {
        let message = format!("{}: there are no decoded tokens in it", path.display());
        return Err(Failure::error(message, "a plan is for tokens that are decoded one by one"));
    }
    let (traced, own) = (&trace.header().model.hash, recording::digest(file));
    if let (Some(traced), Some(own)) = (traced, own)
        && *traced != own
    {
        output::note(format!(
            "{}: it is of another model of this shape ({traced}, this one is {own}), whose routing may \
             be more or less local",
            path.display()
        ));
    }
    // Requests that were computed together, by a server, would be more than one token a step.
    Ok(trace.one_by_one())
}

/// Loads the model with a small pool, and where it is small as a whole.
fn measure(
    path: &std::path::Path,
    experts: &Experts,
    options: impl Fn() -> anyhow::Result<Options>,
) -> anyhow::Result<Measured> {
    let whole = experts.expert_bytes() + experts.dense_bytes() <= WHOLE_BYTES_MAX;
    let mut resident_s = None;
    if whole || costs::pool_share(experts).is_none() {
        let mut engine = open::quiet_engine(path, Options { experts: None, ..options()? })?;
        resident_s = Some(Range::of(&costs::token_s(&mut engine, 5)?));
    }
    let mut engine = open::quiet_engine(path, costs::options(options()?, experts, Below::Drive))?;
    let load_s = engine.load_time().as_secs_f64();
    let load_gbps = engine.load_rate().map(|rate| rate.gbps);
    output::stderr("measuring tokens with records missing");
    let costs = costs::measure(&mut engine, Below::Drive)?;
    let bursts = costs.packed_s.iter().zip(&costs.bursts_s);
    let gains: Vec<f64> = bursts
        .map(|((_, packed), (_, apart))| Range::of(apart).mid / Range::of(packed).mid)
        .collect();
    let record = experts.record_bytes(0).unwrap_or(0) as f64;
    let (records, burst) = costs.bursts_s.last().map_or((0, 1.0), |(n, s)| (*n, Range::of(s).mid));
    Ok(Measured {
        hit_s: Range::of(&costs.hit_s),
        resident_s,
        faults: faults(&costs),
        drive_gbps: f64::from(records) * record / burst / 1e9,
        packed_gain: (!gains.is_empty()).then(|| Range::of(&gains).mid),
        load_s,
        load_gbps,
    })
}

/// Records that were missing, and read.
fn faults(costs: &costs::Costs) -> Vec<Faults> {
    let faults = costs.faults_s.iter().zip(&costs.bursts_s);
    faults
        .map(|((faults, added), (_, read))| Faults {
            faults: *faults,
            added_s: no_gain(added),
            read_s: Range::of(read),
        })
        .collect()
}

/// What missing records add: nothing where noise says that they save something.
fn no_gain(added_s: &[f64]) -> Range {
    Range::of(&added_s.iter().map(|s| s.max(0.0)).collect::<Vec<_>>())
}

/// Where it was not tried, computing without a pool takes at most what it does with one.
fn at_most(hit_s: Range) -> Range {
    Range { low: RESIDENT_SHARE * hit_s.low, ..hit_s }
}

/// Sizes of pools to tell of, ascending: those that are asked for, or what is left of memory, and others
/// around it.
fn pools(asked: &[PoolShare], least: u64, whole: u64, left: u64) -> Vec<u64> {
    let of = |size: &PoolShare| match *size {
        PoolShare::Bytes(bytes) => bytes.0.min(whole),
        PoolShare::Share(share) => (whole as f64 * share) as u64,
    };
    let mut pools: Vec<u64> = asked.iter().map(of).collect();
    if pools.is_empty() {
        pools.extend(SHARES.iter().map(|share| (whole as f64 * share) as u64));
        pools.extend([least, left.min(whole)]);
    }
    pools.retain(|&pool| pool >= least);
    pools.sort_unstable();
    pools.dedup();
    pools
}

/// A model, what it needs, and what was found out.
struct Model<'a> {
    layers: &'a [Layer],
    experts: &'a Experts,
    needs: Requirement,
    curve: Curve<'a>,
    measured: &'a Measured,
}

impl Model<'_> {
    fn answer(
        &self,
        args: &Plan,
        file: &gguf::Model,
        ram: u64,
        on_gpu: Option<&OnGpu>,
    ) -> anyhow::Result<Answer> {
        let mut predictions = self.on_the_cpu(args, ram)?;
        if let Some(on_gpu) = on_gpu {
            predictions.extend(on_gpu.predictions(self, args)?);
        }
        let vram_bytes = on_gpu.map(|on_gpu| on_gpu.vram_bytes);
        let packed_gain = self.measured.packed_gain;
        let machine = Machine { ram_bytes: ram, vram_bytes, packed_gain };
        let hint = "--experts takes pools that there is room for, too";
        let verdict = verdict(&predictions, &machine)
            .ok_or_else(|| Failure::error("none of these pools has room here", hint))?;
        let first = self.layers[0];
        Ok(Answer {
            model: file.files()[0].path.display().to_string(),
            architecture: output::printable(file.architecture()),
            shape: Some(Shape {
                moe_layers: self.layers.len(),
                experts: first.experts,
                used: first.used,
                record_bytes: first.record_bytes,
                token_cycle_bytes: self.experts.token_cycle_bytes(),
                expert_bytes: self.experts.expert_bytes(),
                dense_bytes: self.experts.dense_bytes(),
            }),
            curve: Some(match self.curve {
                Curve::Trace(trace) => CurveOf {
                    source: "trace",
                    trace: args.trace.as_ref().map(|path| path.display().to_string()),
                    tokens: Some(trace.count(Phase::Decode)),
                },
                Curve::Bundled { .. } => CurveOf { source: "bundled", trace: None, tokens: None },
            }),
            measured: None,
            measured_gpu: None,
            ram_bytes: ram,
            ram_bytes_min: self.needs.least_bytes(),
            vram_bytes,
            predictions,
            verdict,
        })
    }

    /// Pools in host memory, the smallest first, and all of it.
    fn on_the_cpu(&self, args: &Plan, ram: u64) -> anyhow::Result<Vec<Prediction>> {
        let Requirement { least_pool_bytes: least, whole_pool_bytes: whole, .. } = self.needs;
        let left = ram.saturating_sub(self.needs.fixed_bytes);
        let (costs, resident) = (self.costs(), self.resident_costs());
        let pools = pools(&args.experts, least, whole, left);
        let predictions = pools.into_iter().map(|pool_bytes| {
            let is_whole = pool_bytes >= whole;
            let fits = self.needs.fixed_bytes + pool_bytes <= ram;
            let surely = self.needs.bytes_for(pool_bytes);
            let place = Place {
                placement: if is_whole { Placement::ResidentRam } else { Placement::PoolRam },
                ram_bytes: if fits { surely.min(ram) } else { surely },
                vram_bytes: 0,
                pool_bytes,
                fits,
                first_token_s: Some(
                    self.measured.load_s + self.prompt_s(is_whole, self.measured.hit_s),
                ),
            };
            let expected = self.expected(self.slots(pool_bytes, whole), 0, args)?;
            let costs = if is_whole { &resident } else { &costs };
            Ok(predict(place, self.requests(), &expected, costs))
        });
        predictions.collect()
    }

    fn expected(&self, slots: u64, below: u64, args: &Plan) -> anyhow::Result<Expected> {
        Ok(self.curve.at(self.layers, slots, below, args.model.engine.policy)?)
    }

    /// Of a pool of which `whole` bytes hold all.
    fn slots(&self, pool_bytes: u64, whole: u64) -> u64 {
        let all: u64 = self.layers.iter().map(|layer| u64::from(layer.experts)).sum();
        (u128::from(all) * u128::from(pool_bytes) / u128::from(whole.max(1))) as u64
    }

    /// Records that a token asks for.
    fn requests(&self) -> f64 {
        self.layers.iter().map(|layer| f64::from(layer.used)).sum()
    }

    fn costs(&self) -> Costs {
        let faults = &self.measured.faults;
        Costs {
            hit_s: self.measured.hit_s,
            faults_s: faults.iter().map(|f| (f.faults, f.added_s)).collect(),
            bursts_s: faults.iter().map(|f| (f.faults, f.read_s)).collect(),
        }
    }

    fn resident_costs(&self) -> Costs {
        let not_tried = at_most(self.measured.hit_s);
        Costs { hit_s: self.measured.resident_s.unwrap_or(not_tried), ..self.costs() }
    }

    /// At least: all experts if they are loaded, else those that a prompt uses; and a token.
    fn prompt_s(&self, is_whole: bool, hit_s: Range) -> f64 {
        let uses = |layer: &Layer| {
            let (experts, used) = (f64::from(layer.experts), f64::from(layer.used));
            let distinct = experts * (1.0 - (1.0 - used / experts).powi(PROMPT_TOKENS));
            distinct * layer.record_bytes as f64
        };
        let bytes = match is_whole {
            true => self.experts.expert_bytes() as f64,
            false => self.layers.iter().map(uses).sum(),
        };
        bytes / (self.measured.drive_gbps * 1e9) + hit_s.mid
    }
}

/// A dense model: each token needs all of it.
fn dense(file: &gguf::Model, forecast: &Forecast, ram: u64) -> anyhow::Result<Answer> {
    let needed = forecast.requirement().least_bytes();
    let fits = needed <= ram;
    let bytes = file.tensor_bytes();
    let path = &file.files()[0].path;
    let read = drive::random_reads(path, 8, DRIVE_TIME)?.map(|rate| bytes as f64 / rate.gbps / 1e9);
    let read =
        read.map_or_else(String::new, |s| format!(", which takes {} from this drive", seconds(s)));
    let streaming = format!(
        "It is dense: each token needs all {} of its weights{read}, so that streaming loses",
        Bytes(bytes)
    );
    let (verdict, sentence, changes) = if fits {
        (
            VerdictKind::Resident,
            format!("Keep it resident: all of it fits. {streaming}."),
            Vec::new(),
        )
    } else {
        let changes = vec![
            format!("With {} of memory it would fit.", Bytes(needed).rounded_up()),
            "A smaller quantisation of it, or a mixture of experts of its size, may fit."
                .to_owned(),
            "llama.cpp can keep some of its layers on a GPU (`-ngl`), and the rest in memory."
                .to_owned(),
        ];
        (
            VerdictKind::No,
            format!("Do not run it here: there is no room for it. {streaming}."),
            changes,
        )
    };
    Ok(Answer {
        model: path.display().to_string(),
        architecture: output::printable(file.architecture()),
        shape: None,
        curve: None,
        measured: None,
        measured_gpu: None,
        ram_bytes: ram,
        ram_bytes_min: needed,
        vram_bytes: None,
        predictions: Vec::new(),
        verdict: Verdict { verdict, sentence, changes, ram_bytes_x2: None },
    })
}

/// A time, to three digits.
fn seconds(s: f64) -> String {
    match s {
        s if s < 0.001 => format!("{:.0} us", s * 1e6),
        s if s < 0.1 => format!("{:.2} ms", s * 1e3),
        s if s < 10.0 => format!("{s:.2} s"),
        s => rough(s),
    }
}

fn text(answer: &Answer) -> String {
    let mut lines = Vec::new();
    if let Some(shape) = &answer.shape {
        lines.push(format!(
            "{}: {} MoE layers, {} of {} experts, records of {}; {} of experts, {} of the rest",
            answer.architecture,
            shape.moe_layers,
            shape.used,
            shape.experts,
            Bytes(shape.record_bytes),
            Bytes(shape.expert_bytes),
            Bytes(shape.dense_bytes)
        ));
    }
    if let Some(curve) = &answer.curve {
        lines.push(match (&curve.trace, curve.tokens) {
            (Some(trace), Some(tokens)) => format!("hits: by {trace}, {tokens} decoded tokens"),
            _ => "hits: by public traces of other models, so that error bars are wide; --trace takes \
                  this one's"
                .to_owned(),
        });
    }
    if let Some(measured) = &answer.measured {
        let resident = measured.resident_s.map(|s| format!(", as a whole {}", seconds(s.mid)));
        lines.push(format!(
            "measured: a token with all its experts in the pool {}{}",
            seconds(measured.hit_s.mid),
            resident.unwrap_or_default()
        ));
        for f in &measured.faults {
            lines.push(format!(
                "  {:.0} missing in a layer: {} more, of which the drive alone {}",
                f.faults,
                seconds(f.added_s.mid.max(0.0)),
                seconds(f.read_s.mid)
            ));
        }
        lines.push(format!("  drive: {}", rate(measured.drive_gbps * 1e9)));
    }
    if !answer.predictions.is_empty() {
        lines.push(String::new());
        let titles =
            ["EXPERTS", "POOL", "MEMORY", "HITS", "TOK/S", "", "FIRST TOKEN", "LIMITED BY", ""];
        let rows = answer.predictions.iter().map(row);
        lines.push(output::table(std::iter::once(titles.map(str::to_owned)).chain(rows).collect()));
    }
    lines.push(answer.verdict.sentence.clone());
    lines.extend(answer.verdict.changes.iter().cloned());
    lines.join("\n") + "\n"
}

fn row(p: &Prediction) -> [String; 9] {
    let place = match p.placement {
        Placement::ResidentRam => "all in RAM",
        Placement::PoolRam => "pool in RAM",
        Placement::ResidentVram => "all in VRAM",
        Placement::PoolVramOverRam => "pool in VRAM, all in RAM",
        Placement::PoolVramOverPoolRam => "pools in VRAM and RAM",
        Placement::PoolVramOverDrive => "pool in VRAM",
    };
    let limit = match p.limited_by {
        Limit::Compute => "computing",
        Limit::Drive => "drive",
        Limit::Bus => "bus",
    };
    [
        place.to_owned(),
        Bytes(p.pool_bytes).to_string(),
        Bytes(if p.placement.is_on_gpu() { p.vram_bytes } else { p.ram_bytes }).to_string(),
        format!("{:.1}%", 100.0 * p.hit_rate),
        format!("{:.2}", p.tok_s),
        format!("({:.2}-{:.2})", p.tok_s_low, p.tok_s_high),
        p.first_token_s.map_or("-".to_owned(), seconds),
        limit.to_owned(),
        if p.fits { "" } else { "no room" }.to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told() {
        let range = |mid: f64| Range { mid, low: 0.9 * mid, high: 1.1 * mid };
        let prediction = |placement, gib: u64, fits, tok_s: f64| Prediction {
            placement,
            ram_bytes: (gib + 2) << 30,
            vram_bytes: 0,
            pool_bytes: gib << 30,
            fits,
            hit_rate: gib as f64 / 16.0,
            faults_per_token: 384.0 - 24.0 * gib as f64,
            tok_s,
            tok_s_low: 0.8 * tok_s,
            tok_s_high: 1.25 * tok_s,
            first_token_s: Some(9.5),
            limited_by: if fits { Limit::Drive } else { Limit::Compute },
            tok_s_drive_x2: fits.then_some(1.4 * tok_s),
        };
        let predictions = vec![
            prediction(Placement::PoolRam, 4, true, 3.25),
            prediction(Placement::ResidentRam, 16, false, 14.5),
        ];
        let machine = Machine { ram_bytes: 8 << 30, vram_bytes: None, packed_gain: Some(1.3) };
        let mut answer = Answer {
            model: "model.gguf".to_owned(),
            architecture: "qwen3moe".to_owned(),
            shape: Some(Shape {
                moe_layers: 48,
                experts: 128,
                used: 8,
                record_bytes: 2_654_208,
                token_cycle_bytes: 1_019_215_872,
                expert_bytes: 16 << 30,
                dense_bytes: 1 << 30,
            }),
            curve: Some(CurveOf { source: "bundled", trace: None, tokens: None }),
            measured: Some(Measured {
                hit_s: range(0.07),
                resident_s: None,
                faults: vec![Faults { faults: 8.0, added_s: range(0.006), read_s: range(0.008) }],
                drive_gbps: 2.5,
                packed_gain: Some(1.3),
                load_s: 1.0,
                load_gbps: None,
            }),
            measured_gpu: None,
            ram_bytes: 8 << 30,
            ram_bytes_min: 3 << 30,
            vram_bytes: None,
            verdict: verdict(&predictions, &machine).unwrap(),
            predictions,
        };
        insta::assert_snapshot!(text(&answer));
        answer.curve = Some(CurveOf {
            source: "trace",
            trace: Some("model.parquet".to_owned()),
            tokens: Some(4096),
        });
        assert!(text(&answer).contains("hits: by model.parquet, 4096 decoded tokens\n"));
    }
}
