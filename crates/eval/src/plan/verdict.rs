//! From predictions to a sentence.

use serde::{Deserialize, Serialize};

use super::{Limit, Placement, Prediction};

/// Tokens per second below which nobody wants to wait for a model.
pub const TOK_S_MIN: f64 = 1.0;

/// By how much reads must be faster in one piece for it to matter.
const PACKED_GAIN_MIN: f64 = 1.15;

/// What there is, and what reading would gain.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Machine {
    /// Host memory that may be taken, bytes.
    pub ram_bytes: u64,
    /// The same of a GPU.
    pub vram_bytes: Option<u64>,
    /// Time of reads as records lie in the file, over that of records in one piece; none if they are.
    pub packed_gain: Option<f64>,
}

/// What to do with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerdictKind {
    /// All of it fits.
    Resident,
    /// A pool, and what it lacks from below.
    Stream,
    /// On the processor, though there is a GPU.
    Cpu,
    /// It would be too slow.
    No,
}

/// What to do, and what would change that.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// In a word.
    pub verdict: VerdictKind,
    /// In a sentence.
    pub sentence: String,
    /// What would make it faster, a sentence each.
    pub changes: Vec<String>,
    /// Host memory with which it would be twice as fast, if some would do.
    pub ram_bytes_x2: Option<u64>,
}

/// The verdict on what there is room for; none if there is for nothing.
#[must_use]
pub fn verdict(predictions: &[Prediction], machine: &Machine) -> Option<Verdict> {
    let speed = |a: &&Prediction, b: &&Prediction| a.tok_s.total_cmp(&b.tok_s);
    let fit = || predictions.iter().filter(|p| p.fits);
    let fastest = fit().max_by(speed)?;
    // What is resident on the same device is, unless it is surely slower.
    let resident = fit().find(|p| {
        let same = p.placement.is_on_gpu() == fastest.placement.is_on_gpu();
        same && p.placement.is_resident() && p.tok_s_high >= fastest.tok_s_low
    });
    let best = resident.unwrap_or(fastest);
    let kind = kind(best, machine);
    let larger = predictions
        .iter()
        .filter(|p| !p.placement.is_on_gpu() && p.ram_bytes > machine.ram_bytes)
        .filter(|p| p.tok_s >= 2.0 * best.tok_s);
    let ram_bytes_x2 = larger.map(|p| p.ram_bytes).min();
    let on_gpu = fit().filter(|p| p.placement.is_on_gpu()).max_by(speed);
    Some(Verdict {
        verdict: kind,
        sentence: sentence(kind, best, on_gpu),
        changes: changes(best, predictions, machine, ram_bytes_x2),
        ram_bytes_x2,
    })
}

fn kind(best: &Prediction, machine: &Machine) -> VerdictKind {
    match best.placement {
        _ if best.tok_s < TOK_S_MIN => VerdictKind::No,
        Placement::ResidentRam | Placement::PoolRam if machine.vram_bytes.is_some() => {
            VerdictKind::Cpu
        }
        Placement::ResidentRam | Placement::ResidentVram => VerdictKind::Resident,
        _ => VerdictKind::Stream,
    }
}

fn sentence(kind: VerdictKind, best: &Prediction, on_gpu: Option<&Prediction>) -> String {
    let expected = format!(
        "{:.3} tok/s ({:.3} to {:.3})",
        Sig(best.tok_s),
        Sig(best.tok_s_low),
        Sig(best.tok_s_high)
    );
    let limit = match best.limited_by {
        Limit::Compute => "computing",
        Limit::Drive => "the drive",
        Limit::Bus => "the bus to the GPU",
    };
    match kind {
        VerdictKind::Resident => {
            format!("Keep it resident: all of it fits, and {expected} are expected.")
        }
        VerdictKind::Stream => format!(
            "Stream it: {expected} are expected with a pool of {}, limited by {limit}.",
            size(best.pool_bytes)
        ),
        VerdictKind::Cpu => {
            let beside = on_gpu.map_or_else(
                || ", and the GPU has no room for it".to_owned(),
                |gpu| format!(", {:.3} on the GPU", Sig(gpu.tok_s)),
            );
            let pool = match best.placement {
                Placement::PoolRam => {
                    format!(" with a pool of {}, limited by {limit}", size(best.pool_bytes))
                }
                _ => String::new(),
            };
            format!("Keep it on the CPU: {expected} are expected there{pool}{beside}.")
        }
        VerdictKind::No => {
            format!("Do not run it here: {expected} are the most to expect, limited by {limit}.")
        }
    }
}

fn changes(
    best: &Prediction,
    predictions: &[Prediction],
    machine: &Machine,
    ram_bytes_x2: Option<u64>,
) -> Vec<String> {
    let mut changes = Vec::new();
    let resident = predictions.iter().find(|p| p.placement == Placement::ResidentRam && !p.fits);
    match (ram_bytes_x2, resident) {
        (Some(bytes), _) => {
            changes.push(format!("With {} of memory it would be twice as fast.", size(bytes)));
        }
        (None, Some(resident)) if resident.tok_s > best.tok_s => changes.push(format!(
            "With {} of memory all of it would fit: {:.3} tok/s.",
            size(resident.ram_bytes),
            Sig(resident.tok_s)
        )),
        _ => {}
    }
    let faster = best.tok_s_drive_x2.filter(|&tok_s| tok_s > 1.1 * best.tok_s);
    if let Some(tok_s) = faster {
        changes.push(format!("With a drive twice as fast: {:.3} tok/s.", Sig(tok_s)));
    }
    let packed = machine.packed_gain.filter(|&gain| gain >= PACKED_GAIN_MIN);
    if let (Some(gain), Limit::Drive) = (packed, best.limited_by) {
        changes.push(format!(
            "`tierstream pack` puts each expert in one piece, which is read {gain:.1} times as fast here."
        ));
    }
    changes
}

/// A number with so many significant digits, as the precision says.
struct Sig(f64);

impl std::fmt::Display for Sig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = f.precision().unwrap_or(3) as i32;
        let whole = if self.0 > 0.0 { self.0.log10().floor() as i32 + 1 } else { 1 };
        write!(f, "{:.*}", (digits - whole).clamp(0, 4) as usize, self.0)
    }
}

/// Bytes in GiB, or MiB where they are few.
fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1000.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

#[cfg(test)]
mod tests {
    use super::super::predict;
    use super::super::tests::{costs, expected, place};
    use super::*;

    /// 8 layers with so many faults each.
    fn prediction(placement: Placement, gib: u64, fits: bool, faults: usize) -> Prediction {
        let mut layers = vec![0.0; faults + 1];
        layers[faults] = 8.0;
        predict(place(placement, gib << 30, fits), 64.0, &expected(&layers), &costs())
    }

    fn machine() -> Machine {
        Machine { ram_bytes: 4 << 30, vram_bytes: None, packed_gain: Some(1.5) }
    }

    #[test]
    fn what_fits_stays_resident() {
        let all = prediction(Placement::ResidentRam, 4, true, 0);
        let half = prediction(Placement::PoolRam, 2, true, 2);
        let verdict = verdict(&[half, all], &machine()).unwrap();
        assert_eq!(verdict.verdict, VerdictKind::Resident);
        assert!(verdict.sentence.contains("100 tok/s"), "{}", verdict.sentence);
        assert!(verdict.changes.is_empty(), "{:?}", verdict.changes);
    }

    #[test]
    fn a_pool_that_is_faster_by_chance_is_not_preferred_to_all() {
        let all = prediction(Placement::ResidentRam, 4, true, 0);
        let mut half = prediction(Placement::PoolRam, 2, true, 0);
        half.tok_s *= 1.05;
        let both = |half: &Prediction| verdict(&[half.clone(), all.clone()], &machine()).unwrap();
        assert_eq!(both(&half).verdict, VerdictKind::Resident);
        (half.tok_s, half.tok_s_low) = (2.0 * half.tok_s, 1.9 * half.tok_s);
        assert_eq!(both(&half).verdict, VerdictKind::Stream);
    }

    #[test]
    fn what_does_not_fit_is_streamed_and_more_memory_is_named() {
        let pools = [(4, true, 8), (6, false, 4), (12, false, 0)];
        let all =
            pools.map(|(gib, fits, faults)| prediction(Placement::PoolRam, gib, fits, faults));
        let verdict = verdict(&all, &machine()).unwrap();
        assert_eq!((verdict.verdict, verdict.ram_bytes_x2), (VerdictKind::Stream, Some(12 << 30)));
        assert!(verdict.sentence.contains("limited by the drive"), "{}", verdict.sentence);
        assert_eq!(verdict.changes.len(), 3, "{:?}", verdict.changes);
        assert!(verdict.changes[0].starts_with("With 12.0 GiB of memory"), "{:?}", verdict.changes);
        assert!(verdict.changes[2].contains("pack"), "{:?}", verdict.changes);
    }

    #[test]
    fn beside_a_gpu_the_faster_of_both_is_told() {
        let with_gpu = Machine { vram_bytes: Some(1 << 30), ..machine() };
        let cpu = prediction(Placement::ResidentRam, 4, true, 0);
        let gpu = prediction(Placement::PoolVramOverDrive, 1, true, 8);
        let both = verdict(&[cpu.clone(), gpu.clone()], &with_gpu).unwrap();
        assert_eq!(both.verdict, VerdictKind::Cpu);
        assert!(both.sentence.contains("on the GPU"), "{}", both.sentence);
        let alone = verdict(&[gpu], &with_gpu).unwrap();
        assert_eq!(alone.verdict, VerdictKind::Stream);
        let no_room = verdict(&[cpu], &with_gpu).unwrap();
        assert!(no_room.sentence.contains("no room"), "{}", no_room.sentence);
    }

    #[test]
    fn what_is_too_slow_is_not_run() {
        let mut slow = prediction(Placement::PoolRam, 4, true, 8);
        (slow.tok_s, slow.tok_s_low, slow.tok_s_high) = (0.4, 0.3, 0.5);
        let verdict = verdict(&[slow], &machine()).unwrap();
        assert_eq!(verdict.verdict, VerdictKind::No);
        assert!(verdict.sentence.contains("0.400 tok/s (0.300 to 0.500)"), "{}", verdict.sentence);
        assert!(
            super::verdict(&[prediction(Placement::PoolRam, 9, false, 0)], &machine()).is_none()
        );
    }
}
