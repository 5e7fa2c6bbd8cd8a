//! Public traces: what is computed of them against what their authors and others have published or
//! computed. `docs/evaluation.md` has the sources and says where and why numbers differ.

use std::path::Path;

use tierstream_eval::metrics::{Options, metrics};
use tierstream_eval::sim::{Counting, Eviction, PoolKind, Setup, Size, Start, curve, sch};
use tierstream_eval::{Assume, Phase, Trace, read};
use tierstream_pool::Policy;

/// In the order of the published tables.
const NAMES: [&str; 4] = ["olmoe", "qwen", "gemma", "gptoss"];

fn load(name: &str) -> Trace {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    read(&folder.join(format!("{name}.parquet")), Assume::default()).unwrap()
}

fn percent(share: f64) -> f64 {
    100.0 * share
}

/// Whether all of `ours` are within so much of what was published.
#[track_caller]
fn assert_close(name: &str, ours: &[f64], published: &[f64], within: f64) {
    let far = ours.iter().zip(published).any(|(a, b)| (a - b).abs() > within);
    assert!(!far && ours.len() == published.len(), "{name}: {ours:.2?} is not {published:?}");
}

/// As published simulators have it: counts that never fade.
const LFU: Eviction = Eviction::Online(Policy::Lfu { half_life: u32::MAX });
const LRU: Eviction = Eviction::Online(Policy::Lru);

fn rates(trace: &Trace, setup: Setup, sizes: &[Size]) -> Vec<f64> {
    let curve = curve(trace, &setup, sizes).unwrap();
    curve.points.iter().map(|point| percent(point.hit_rate().unwrap())).collect()
}

fn of(pool: PoolKind, eviction: Eviction) -> Setup {
    Setup { pool, eviction, ..Setup::default() }
}

const RHOS: [Size; 3] = [Size::Rho(1.0), Size::Rho(2.0), Size::Rho(4.0)];

#[test]
fn pools_per_layer_cold_and_strict() {
    let lru = [[43.4, 59.5, 79.2], [37.7, 51.7, 72.0], [35.4, 51.5, 70.6], [17.6, 32.8, 50.1]];
    let lfu = [[43.4, 59.9, 80.6], [37.7, 56.8, 75.0], [35.4, 57.0, 74.2], [17.6, 32.6, 48.9]];
    let opt = [[59.0, 75.7, 90.4], [54.2, 70.8, 84.5], [53.5, 70.0, 82.8], [37.9, 53.0, 64.5]];
    for (row, name) in NAMES.iter().enumerate() {
        let trace = load(name);
        let rates = |eviction| rates(&trace, of(PoolKind::PerLayer, eviction), &RHOS);
        // Ours takes the experts of a step in the order of their numbers.
        assert_close(name, &rates(LRU), &lru[row], 0.6);
        assert_close(name, &rates(LFU), &lfu[row], 0.15);
        assert_close(name, &rates(Eviction::BeladyLeave), &opt[row], 0.06);
        let physical = rates(Eviction::Belady);
        assert_eq!(physical[0], rates(LRU)[0], "{name}: no choice at rho 1");
        assert!(physical.iter().zip(&opt[row]).all(|(a, b)| *a < b + 0.06), "{name}");
    }
}

/// The difference in LRU is the order inside a step: with hits as older than faults, and either in the
/// order of the trace, the rates are theirs.
#[test]
fn lru_with_hits_before_faults() {
    let published =
        [[43.4, 59.5, 79.2], [37.7, 51.7, 72.0], [35.4, 51.5, 70.6], [17.6, 32.8, 50.1]];
    for (row, name) in NAMES.iter().enumerate() {
        let trace = load(name);
        let used = trace.header().layers[0].used as usize;
        let rates: Vec<f64> = [1, 2, 4].map(|rho| hits_first(&trace, rho * used)).to_vec();
        assert_close(name, &rates, &published[row], 0.15);
    }
}

/// A list, most recent last, per layer; hits are moved there as they come, faults after them.
fn hits_first(trace: &Trace, slots: usize) -> f64 {
    let (mut hits, mut requests) = (0, 0);
    for layer in 0..trace.header().layers.len() {
        let mut list: Vec<u16> = Vec::new();
        for token in 0..trace.len() {
            if trace.tokens()[token].phase != Phase::Decode {
                continue;
            }
            let step = trace.experts(token, layer);
            let (found, missing): (Vec<u16>, Vec<u16>) =
                step.iter().partition(|e| list.contains(e));
            hits += found.len();
            requests += step.len();
            for expert in found.into_iter().chain(missing) {
                list.retain(|&other| other != expert);
                list.push(expert);
            }
            list.drain(..list.len().saturating_sub(slots));
        }
    }
    percent(hits as f64 / requests as f64)
}

#[test]
fn one_pool_for_all_layers() {
    let at_two = [[56.8, 52.8, 76.5], [47.6, 51.6, 72.5], [47.3, 53.4, 71.3], [30.6, 33.4, 55.6]];
    for (name, published) in NAMES.iter().zip(&at_two) {
        let trace = load(name);
        let ours = [LRU, LFU, Eviction::Belady]
            .map(|eviction| rates(&trace, of(PoolKind::Global, eviction), &RHOS[1..2])[0]);
        assert_close(name, &ours, published, 0.15);
    }
}

/// Belady, LRU, LFU, and LFU per layer, by MiB: decoded tokens after their prompt.
#[test]
fn byte_budgets() {
    let sizes = [500, 1000, 2000, 4000, 8000].map(|mib| Size::Bytes(mib << 20));
    let qwen = [
        [45.3, 62.7, 79.4, 92.7, 97.1],
        [0.0, 37.7, 56.5, 80.3, 96.0],
        [26.6, 40.2, 58.6, 80.8, 96.0],
        [38.3, 45.1, 63.3, 81.7, 95.2],
    ];
    let gptoss = [
        [29.4, 43.5, 59.9, 73.0, 85.0],
        [0.0, 17.7, 30.9, 51.7, 65.9],
        [14.2, 23.3, 35.0, 49.8, 66.1],
        [19.1, 19.1, 34.2, 50.8, 67.7],
    ];
    let gemma = [
        [48.2, 65.7, 80.6, 92.9, 96.4],
        [0.0, 36.1, 62.2, 81.9, 96.2],
        [30.5, 45.8, 64.1, 83.4, 96.2],
        [36.0, 47.7, 67.6, 84.3, 95.6],
    ];
    for (name, published) in [("qwen", qwen), ("gptoss", gptoss), ("gemma", gemma)] {
        let trace = load(name);
        let curves = [
            (PoolKind::Global, Eviction::Belady),
            (PoolKind::Global, LRU),
            (PoolKind::Global, LFU),
            (PoolKind::PerLayer, LFU),
        ];
        for ((pool, eviction), published) in curves.into_iter().zip(published) {
            let setup = Setup { start: Start::Warm, ..of(pool, eviction) };
            let ours = rates(&trace, setup, &sizes);
            let within = if pool == PoolKind::Global { 0.25 } else { 1.0 };
            assert_close(&format!("{name} {pool} {eviction}"), &ours, &published, within);
        }
    }
    let gptoss = load("gptoss");
    let mib = [1000, 3000, 6000].map(|mib| Size::Bytes(mib << 20));
    let setup = |eviction| Setup { start: Start::Warm, ..of(PoolKind::Global, eviction) };
    assert_close("lru", &rates(&gptoss, setup(LRU), &mib), &[17.6, 44.8, 59.5], 0.15);
    assert_close("opt", &rates(&gptoss, setup(Eviction::Belady), &mib), &[43.5, 67.8, 81.0], 0.06);
}

#[test]
fn the_best_of_the_next_16_tokens() {
    let published =
        [[49.9, 71.3, 90.8], [46.4, 67.9, 86.6], [46.5, 67.9, 85.0], [33.7, 53.1, 69.7]];
    for (name, published) in NAMES.iter().zip(&published) {
        let trace = load(name);
        let decoded = (0..trace.len() as u32)
            .filter(|&token| trace.tokens()[token as usize].phase == Phase::Decode);
        let slots =
            [1, 2, 4].map(|rho| trace.header().layers.iter().map(|l| l.used * rho).collect());
        let sch = sch(&trace, &[decoded.collect()], 16, &slots);
        let rates = |hits: &[u64]| -> Vec<f64> {
            hits.iter().map(|&hits| percent(hits as f64 / sch.requests as f64)).collect()
        };
        assert_close(name, &rates(&sch.hits_fill), published, 0.25);
        assert!(sch.hits.iter().zip(&sch.hits_fill).all(|(strict, fill)| strict < fill));
    }
}

/// Fills count as hits in the convention of moe-lrc: once per slot of every layer.
#[test]
fn fills_are_as_many_as_slots() {
    let trace = load("olmoe");
    let setup = Setup { counting: Counting::Fill, ..of(PoolKind::PerLayer, LRU) };
    let (fill, strict) =
        (curve(&trace, &setup, &RHOS), curve(&trace, &of(PoolKind::PerLayer, LRU), &RHOS));
    for ((fill, strict), slots) in
        fill.unwrap().points.iter().zip(&strict.unwrap().points).zip([8, 16, 32])
    {
        assert_eq!(fill.hits - strict.hits, 16 * slots);
    }
}

#[test]
fn reuse_and_segments() {
    // Next-token reuse; SRP of 4, 16 and 64 tokens; rho of those.
    let published = [
        (43.5, [64.5, 49.4, 42.6], [0.99, 1.49, 1.27]),
        (38.0, [60.5, 46.6, 41.7], [0.93, 1.43, 1.26]),
        (35.7, [60.0, 46.4, 40.7], [0.93, 1.40, 1.15]),
        (17.9, [49.0, 36.5, 28.4], [3.08, 1.88, 1.44]),
    ];
    for (name, (reuse, srp, rho)) in NAMES.iter().zip(published) {
        let options = Options { controls: false, ..Options::default() };
        let report = metrics(&load(name), &options).unwrap();
        let of = |window: &str| report.locality.srp[window].unwrap();
        assert_close(name, &[percent(report.locality.reuse_next.unwrap())], &[reuse], 0.05);
        let windows = ["4", "16", "64"];
        assert_close(name, &windows.map(|window| percent(of(window).srp)), &srp, 0.06);
        assert_close(name, &windows.map(|window| of(window).rho), &rho, 0.006);
        assert_eq!(report.predict.previous_token.recall, report.locality.reuse_next);
    }
}
