//! Threads fight over a small pool; every byte that a step may compute with is looked at.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tierstream_io::wrap::{Action, Fault, Rule};
use tierstream_io::{Config, Reader, Wrap};
use tierstream_pool::Policy;

use super::*;
use crate::memory::{to_ne, usize_of};
use crate::plan::{ExpertOp, Stage};
use crate::residency::{Layer, Need, Part, SlotPart, Spec};

const LAYERS: usize = 5;
const EXPERTS: u32 = 16;
const USED: u32 = 2;
/// Floats of one expert in each part.
type Floats = [usize; 2];
/// Too small to be read in place, and no multiple of a block.
const SMALL: Floats = [300, 77];
/// Whole blocks, which are read in place, and what takes the way through the ring or not, by where
/// it lies.
const LARGE: Floats = [17 << 10, (17 << 10) + 8];

/// What fills part `part` of an expert.
fn mark(layer: usize, part: usize, expert: u32) -> f32 {
    ((layer * 2 + part) * EXPERTS as usize + expert as usize) as f32
}

/// A pool over a file of marks. Layers are of two size classes.
fn pool(sizes: Floats, slots: impl Fn(&[u32]) -> Vec<u32>, rules: Vec<Rule>) -> Arc<Residency> {
    // Beside the test's own program: the system's folder may lie in memory, without direct reads.
    let program = std::env::current_exe().unwrap();
    let mut file = tempfile::NamedTempFile::new_in(program.parent().unwrap()).unwrap();
    let wrap: Wrap = Box::new(|engine| Box::new(Fault::new(engine, rules).unwrap()));
    // Parts of the large size are cut into several reads.
    let buffer_bytes = if sizes == SMALL { 4096 } else { 32 << 10 };
    let config =
        Config { ring_bytes: 128 << 10, buffer_bytes, wrap: Some(wrap), ..Config::default() };
    let reader = Arc::new(Reader::new(config).unwrap());
    let mut offset = 0;
    let mut layers = Vec::new();
    for layer in 0..LAYERS {
        let mut parts = Vec::new();
        // The odd layers' records are smaller.
        let n_parts = sizes.len() - layer % 2;
        for (part, &floats) in sizes.iter().enumerate().take(n_parts) {
            parts.push((offset, floats));
            for expert in 0..EXPERTS {
                let bytes = mark(layer, part, expert).to_ne_bytes().repeat(floats);
                file.write_all(&bytes).unwrap();
                offset += bytes.len() as u64;
            }
        }
        layers.push(parts);
    }
    file.as_file().sync_all().unwrap();
    let id = reader.open(file.path()).unwrap();
    let part = |(offset, floats): (u64, usize)| Part {
        name: String::new(),
        file: id,
        offset,
        bytes: floats * 4,
        stride: floats as u64 * 4,
        slot: SlotPart::new(offset, floats * 4, 512),
        type_: GGML_TYPE_F32,
        ne: [to_ne(floats), 1],
    };
    let layers: Vec<Layer> = layers
        .into_iter()
        .zip(0..)
        .map(|(parts, block)| Layer {
            block,
            class: block as usize % 2,
            experts: EXPERTS,
            used: USED,
            parts: parts.into_iter().map(part).collect(),
            in_one_piece: false,
        })
        .collect();
    let slots = slots(&Spec::least_slots(&layers));
    let spec = Spec { layers, slots, staged: 1, policy: Policy::Lru, seed: 0, checksums: None };
    Residency::new(spec, None, None, reader).unwrap()
}

fn check(residency: &Residency, layer: usize, part: usize, placed: &[Placed]) {
    for p in placed {
        let window = residency.window(layer, part, p.slot, p.slot);
        let n = usize_of(window.ne[0]);
        // SAFETY: the step holds the slot, and its bytes have arrived.
        let floats = unsafe { std::slice::from_raw_parts(window.data.cast::<f32>(), n) };
        let expected = mark(layer, part, p.expert);
        assert!(
            floats.iter().all(|&f| f == expected),
            "layer {layer}, part {part}, {p:?}: {:?}",
            &floats[..8]
        );
    }
}

/// What the executor does with one layer, with looking in place of computing. `fate` decides
/// where it gives up.
fn step(residency: &Arc<Residency>, layer: usize, need: &[Need], fate: u64) -> Result<()> {
    let parts = residency.layer(layer).parts.len();
    // A guess that is right in part, of records in stages of one part each.
    let stages: Vec<Vec<usize>> = (0..parts).map(|part| vec![part]).collect();
    let guess: Vec<u32> = need.iter().map(|n| (n.expert + (fate & 1) as u32) % EXPERTS).collect();
    let ahead = match fate % 3 {
        0 => None,
        _ => residency.read_ahead(layer, &guess, &guess[guess.len() / 2..], &stages),
    };
    let mut step = residency.acquire(layer, need, ahead, &|| false)?;
    let mut all: Vec<u32> = step.hits().iter().map(|p| p.expert).collect();
    all.extend(step.arriving().iter().flatten().map(|p| p.expert));
    all.sort_unstable();
    assert!(all.iter().eq(need.iter().map(|n| &n.expert)), "every expert once: {all:?}");
    if fate == 0 {
        return Err(Error::Cancelled);
    }
    // Stages of one part each, or one of all.
    let op = |part| ExpertOp { node: 0, part };
    let stages: Vec<Stage> = match fate % 2 {
        0 => (0..parts).map(|part| Stage { ops: vec![op(part)] }).collect(),
        _ => vec![Stage { ops: (0..parts).map(op).collect() }],
    };
    let mut loads = Loads::new(&stages, &mut step);
    if fate == 1 {
        return Err(Error::Cancelled); // with reads under way
    }
    for (index, stage) in stages.iter().enumerate() {
        let look = |placed: &[Placed]| {
            for op in &stage.ops {
                check(residency, layer, op.part, placed);
            }
        };
        look(step.hits());
        for group in 0..step.arriving().len() {
            step.arrived(loads.of(index, group))?;
            look(&step.arriving()[group]);
            loads.computed(&mut step, index, group);
        }
        look(step.hits());
    }
    if fate == 2 {
        return Err(Error::Cancelled); // with everything there
    }
    step.finish()
}

/// Runs threads over random needs, then looks for what they left behind.
fn fight(residency: &Arc<Residency>, threads: u64, steps: u64) -> usize {
    let failed = AtomicUsize::new(0);
    let (done, ended) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        if ended
            .recv_timeout(Duration::from_secs(120))
            .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            eprintln!("the fight goes on after 120 s: a deadlock");
            std::process::abort();
        }
    });
    std::thread::scope(|s| {
        for thread in 0..threads {
            let (residency, failed) = (&residency, &failed);
            s.spawn(move || {
                let mut state = thread + 1;
                let mut random = |below: u64| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 33) % below
                };
                for _ in 0..steps {
                    let layer = random(LAYERS as u64) as usize;
                    // Mostly single tokens, sometimes nearly all experts.
                    let chance = if random(4) == 0 { 80 } else { 12 };
                    let mut need: Vec<Need> = (0..EXPERTS)
                        .filter(|_| random(100) < chance)
                        .map(|expert| Need { expert, last_row: expert % 3 })
                        .collect();
                    if need.is_empty() {
                        need.push(Need { expert: random(16) as u32, last_row: 0 });
                    }
                    let failure = step(residency, layer, &need, random(30)).is_err();
                    failed.fetch_add(usize::from(failure), Ordering::Relaxed);
                    if random(50) == 0 {
                        residency.clear();
                    }
                }
            });
        }
    });
    drop(done);
    residency.clear();
    assert_eq!(residency.resident_bytes(), 0, "a pin was not given back");
    // The whole pool can be had again, by every layer.
    for layer in 0..LAYERS {
        let need: Vec<Need> = (0..EXPERTS).map(|expert| Need { expert, last_row: 0 }).collect();
        assert!((0..50).any(|_| step(residency, layer, &need, 99).is_ok()), "layer {layer}");
    }
    failed.into_inner()
}

#[test]
fn many_threads_in_small_pools() {
    let floor = |least: &[u32]| least.to_vec();
    let more = |least: &[u32]| least.iter().map(|n| n + 3).collect();
    let half = |least: &[u32]| least.iter().map(|n| n * 4).collect();
    for (threads, steps) in [(2, 2000), (4, 1000)] {
        assert!(fight(&pool(SMALL, floor, Vec::new()), threads, steps) > 100);
        assert!(fight(&pool(SMALL, more, Vec::new()), threads, steps) > 100);
        assert!(fight(&pool(SMALL, half, Vec::new()), threads, steps) > 100);
        assert!(fight(&pool(LARGE, floor, Vec::new()), threads, steps / 2) > 100);
        assert!(fight(&pool(LARGE, half, Vec::new()), threads, steps / 2) > 100);
    }
}

#[test]
fn failing_reads() {
    for sizes in [SMALL, LARGE] {
        let rule = |i: u64| Rule::all(Action::Errno(5)).nth(i * 211..i * 211 + 1);
        let residency = pool(sizes, |least| least.to_vec(), (0..1000).map(rule).collect());
        assert!(fight(&residency, 3, 500) > 100);
    }
}

#[test]
fn everything_resident_in_expert_order() {
    let all = |least: &[u32]| vec![3 * EXPERTS, 2 * EXPERTS][..least.len()].to_vec();
    for sizes in [SMALL, LARGE] {
        check_expert_order(&pool(sizes, all, Vec::new()));
    }
}

fn check_expert_order(residency: &Arc<Residency>) {
    residency.load_all(&[], &mut |_| true).unwrap();
    let bases = residency.identity().clone().expect("all fits");
    for (layer, base) in bases.into_iter().enumerate() {
        for part in 0..residency.layer(layer).parts.len() {
            let placed: Vec<_> =
                (0..EXPERTS).map(|expert| Placed { expert, slot: base + expert }).collect();
            check(residency, layer, part, &placed);
        }
    }
    residency.clear();
    assert!(residency.identity().is_none());
}
