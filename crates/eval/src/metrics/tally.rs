//! What is counted of a layer of a prompt. Tallies are summed: over layers, prompts, resamples.

use crate::trace::Trace;

/// Windows in which experts are counted, in tokens.
pub(super) const WINDOWS: [usize; 5] = [4, 16, 50, 64, 256];

/// Distances from here on are counted together.
const DISTANCE_MAX: usize = 1024;

/// Sums of counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tally {
    /// Experts of tokens that have one before them, and those of them that it used too.
    pub(super) next: u64,
    pub(super) kept: u64,
    /// Uses by their distance from the last one, in tokens; 0 is not used.
    pub(super) distances: Vec<u64>,
    /// Of each of [`WINDOWS`]: number of windows, of layers each, and how many experts were used how
    /// often in them.
    pub(super) windows: [Window; WINDOWS.len()],
    /// By the place that an expert had for the token before: how many there were, and how many were
    /// used again.
    pub(super) ranks: Vec<(u64, u64)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Window {
    pub(super) count: u64,
    pub(super) uses: Vec<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            next: 0,
            kept: 0,
            distances: vec![0; DISTANCE_MAX + 1],
            windows: WINDOWS.map(|window| Window { count: 0, uses: vec![0; window + 1] }),
            ranks: Vec::new(),
        }
    }
}

fn add_all(to: &mut [u64], from: &[u64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

impl Tally {
    /// Of the tokens of one sequence in one layer.
    pub(super) fn of(trace: &Trace, tokens: &[u32], layer: usize) -> Self {
        let mut tally = Self::default();
        let experts = trace.header().layers[layer].experts as usize;
        let step = |index: usize| trace.experts(tokens[index] as usize, layer);
        let mut last = vec![usize::MAX; experts];
        for index in 0..tokens.len() {
            let before = index.checked_sub(1).map(step);
            for &expert in step(index) {
                let last = &mut last[usize::from(expert)];
                if *last != usize::MAX {
                    let distance = index - *last;
                    tally.distances[distance.min(DISTANCE_MAX)] += 1;
                    tally.kept += u64::from(distance == 1);
                }
                *last = index;
            }
            if let Some(before) = before {
                tally.next += step(index).len() as u64;
                tally.ranks.resize(tally.ranks.len().max(before.len()), (0, 0));
                for (rank, &expert) in tally.ranks.iter_mut().zip(before) {
                    rank.0 += 1;
                    rank.1 += u64::from(last[usize::from(expert)] == index);
                }
            }
        }
        let mut counts = vec![(0, 0); experts];
        for (window, &len) in tally.windows.iter_mut().zip(&WINDOWS) {
            counts.fill((0, 0));
            window.count(tokens.len(), len, &mut counts, step);
        }
        tally
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.next += other.next;
        self.kept += other.kept;
        add_all(&mut self.distances, &other.distances);
        for (to, from) in self.windows.iter_mut().zip(&other.windows) {
            to.count += from.count;
            add_all(&mut to.uses, &from.uses);
        }
        self.ranks.resize(self.ranks.len().max(other.ranks.len()), (0, 0));
        for (to, from) in self.ranks.iter_mut().zip(&other.ranks) {
            to.0 += from.0;
            to.1 += from.1;
        }
    }

    /// Mean share of a token's experts that the token before used.
    pub(super) fn reuse_next(&self) -> Option<f64> {
        (self.next > 0).then(|| self.kept as f64 / self.next as f64)
    }

    /// The distance that such a share of all repeated uses does not exceed.
    pub(super) fn distance(&self, share: f64) -> Option<u64> {
        let all: u64 = self.distances.iter().sum();
        let wanted = (share * all as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let found = self.distances.iter().position(|&count| {
            seen += count;
            seen >= wanted
        });
        if all == 0 { None } else { found.map(|distance| distance as u64) }
    }
}

impl Window {
    /// Counts how often each expert is used in each window of `len` tokens. An expert's number changes
    /// with the window only when it enters or leaves: until then all windows count at once.
    fn count<'a>(
        &mut self,
        tokens: usize,
        len: usize,
        counts: &mut [(u32, usize)],
        step: impl Fn(usize) -> &'a [u16],
    ) {
        let Some(last) = tokens.checked_sub(len) else { return };
        let uses = &mut self.uses;
        for index in 0..tokens {
            // The window that ends with this token.
            let window = (index + 1).saturating_sub(len);
            let mut change = |expert: u16, by: i32| {
                let (count, since) = &mut counts[usize::from(expert)];
                uses[*count as usize] += (window - *since) as u64;
                *count = count.wrapping_add_signed(by);
                *since = window;
            };
            if index >= len {
                step(index - len).iter().for_each(|&expert| change(expert, -1));
            }
            step(index).iter().for_each(|&expert| change(expert, 1));
        }
        self.count = last as u64 + 1;
        for &(count, since) in counts.iter() {
            uses[count as usize] += (last + 1 - since) as u64;
        }
    }

    /// Distinct experts in a window, on average.
    pub(super) fn unique(&self) -> Option<f64> {
        let used: u64 = self.uses[1..].iter().sum();
        (self.count > 0).then(|| used as f64 / self.count as f64)
    }

    /// Segment routing best performance, and the size of the segment's group in units of the experts
    /// that a token uses: the most over all alpha of F1 = 2 S1 / (m N1 + S0), where N1 experts of
    /// windows were used alpha times or more, together S1 times, and all of them S0 times.
    pub(super) fn srp(&self) -> Option<(f64, f64)> {
        let len = self.uses.len() - 1;
        let all: u64 = (0u64..).zip(&self.uses).map(|(uses, &count)| uses * count).sum();
        let (mut some, mut experts) = (0, 0);
        let mut best = None;
        for uses in (1..=len).rev() {
            experts += self.uses[uses];
            some += uses as u64 * self.uses[uses];
            let group = len as f64 * experts as f64;
            let f1 = 2.0 * some as f64 / (group + all as f64);
            if experts > 0 && best.is_none_or(|(best, _)| f1 > best) {
                best = Some((f1, group / all as f64));
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Header;
    use crate::trace::{Phase, Token};

    fn trace(experts: u32, rows: &[&[u16]]) -> Trace {
        let used = rows.first().map_or(1, |row| row.len()) as u32;
        let mut trace = Trace::new(Header::uniform(1, experts, used)).unwrap();
        for (position, row) in (0..).zip(rows) {
            let (phase, batch) = (Phase::Decode, position);
            let token = Token { prompt: 0, position, batch, id: None, phase, domain: 0 };
            trace.push(token, row, &[]).unwrap();
        }
        trace
    }

    fn tally(trace: &Trace) -> Tally {
        Tally::of(trace, &(0..trace.len() as u32).collect::<Vec<_>>(), 0)
    }

    #[test]
    fn what_a_few_tokens_tell() {
        let trace = trace(6, &[&[0, 1], &[1, 2], &[0, 2], &[3, 4], &[0, 1]]);
        let tally = tally(&trace);
        assert_eq!((tally.next, tally.kept), (8, 2));
        assert_eq!(tally.reuse_next(), Some(0.25));
        // 1 after 1, 0 after 2, 2 after 1, 0 after 2, 1 after 3.
        assert_eq!(tally.distances[..5], [0, 2, 2, 1, 0]);
        assert_eq!((tally.distance(0.5), tally.distance(0.9)), (Some(2), Some(3)));
        // Second choices 1 and 2 came again, and no other.
        assert_eq!(tally.ranks, [(4, 0), (4, 2)]);
        let four = &tally.windows[0];
        assert_eq!(four.count, 2);
        // {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}, {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}
        assert_eq!(four.uses, [2, 4, 6, 0, 0]);
        assert_eq!(four.unique(), Some(5.0));
        assert_eq!(tally.windows[1].unique(), None);
        assert_eq!(tally.windows[1].srp(), None);
    }

    #[test]
    fn srp_of_the_extremes() {
        let same: Vec<&[u16]> = vec![&[1, 2]; 20];
        let (srp, rho) = tally(&trace(8, &same)).windows[1].srp().unwrap();
        assert_eq!((srp, rho), (1.0, 1.0));
        // Any two of four in turn: all four are the group, each used half of the time.
        let turns: Vec<&[u16]> = (0..40).map(|n| [&[0u16, 1][..], &[2, 3]][n % 2]).collect();
        let (srp, rho) = tally(&trace(8, &turns)).windows[1].srp().unwrap();
        assert!((srp - 2.0 / 3.0).abs() < 1e-12 && (rho - 2.0).abs() < 1e-12, "{srp} {rho}");
    }

    #[test]
    fn sliding_is_counting_anew() {
        let mut random = crate::random::Random::new(5);
        let rows: Vec<Vec<u16>> = (0..90)
            .map(|_| {
                let first = random.below(12) as u16;
                vec![first, (first + 1 + random.below(11) as u16) % 12]
            })
            .collect();
        let rows: Vec<&[u16]> = rows.iter().map(Vec::as_slice).collect();
        let tally = tally(&trace(12, &rows));
        for (window, len) in tally.windows.iter().zip(WINDOWS) {
            let mut uses = vec![0; len + 1];
            for part in rows.windows(len) {
                for expert in 0..12 {
                    uses[part.iter().filter(|row| row.contains(&expert)).count()] += 1;
                }
            }
            assert_eq!(window.uses, uses);
        }
    }

    #[test]
    fn sums_are_those_of_the_parts() {
        let a = tally(&trace(6, &[&[0, 1], &[1, 2], &[0, 2], &[3, 4], &[0, 1]]));
        let mut sum = Tally::default();
        sum.add(&a);
        assert_eq!(sum, a);
        sum.add(&a);
        assert_eq!((sum.kept, sum.reuse_next()), (4, a.reuse_next()));
        assert_eq!(sum.windows[0].srp(), a.windows[0].srp());
    }
}
