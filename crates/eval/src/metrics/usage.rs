//! How evenly experts are used, and what a fixed set of them would hold.

use super::sequences::{Sequence, half};
use crate::trace::Trace;

/// Uses of the experts of a layer, in each half of the trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Usage {
    halves: [Vec<u64>; 2],
}

impl Usage {
    pub(super) fn of(trace: &Trace, sequences: &[Sequence], layer: usize) -> Self {
        let count = trace.header().layers[layer].experts as usize;
        let mut halves = [vec![0; count], vec![0; count]];
        for (number, sequence) in sequences.iter().enumerate() {
            for (index, &token) in sequence.tokens.iter().enumerate() {
                let uses = &mut halves[half(sequences, number, index)];
                let experts = trace.experts(token as usize, layer);
                experts.iter().for_each(|&expert| uses[usize::from(expert)] += 1);
            }
        }
        Self { halves }
    }

    /// Of both halves.
    pub(super) fn all(&self) -> Vec<u64> {
        self.halves[0].iter().zip(&self.halves[1]).map(|(a, b)| a + b).collect()
    }

    /// Experts that were used at all.
    pub(super) fn distinct(&self) -> usize {
        self.all().iter().filter(|&&uses| uses > 0).count()
    }

    /// Entropy of the uses as a share of the most that it can be, that of equal ones.
    pub(super) fn entropy(&self) -> Option<f64> {
        let all = self.all();
        let sum: u64 = all.iter().sum();
        if sum == 0 || all.len() < 2 {
            return None;
        }
        let shares = all.iter().filter(|&&uses| uses > 0).map(|&uses| uses as f64 / sum as f64);
        let bits: f64 = shares.map(|share| -share * share.log2()).sum();
        Some(bits / (all.len() as f64).log2())
    }

    /// Gini coefficient of the uses: 0 if all are equal, near 1 if one has them all.
    pub(super) fn gini(&self) -> Option<f64> {
        let mut all = self.all();
        all.sort_unstable();
        let sum: u64 = all.iter().sum();
        let count = all.len() as f64;
        let weighted = (1..).zip(&all).map(|(rank, &uses)| f64::from(rank) * uses as f64);
        let weighted: f64 = weighted.sum();
        (sum > 0).then(|| 2.0 * weighted / (count * sum as f64) - (count + 1.0) / count)
    }

    /// Uses in one half of the `slots` experts that the other half used most, and all uses; both ways.
    pub(super) fn held_out(&self, slots: usize) -> (u64, u64) {
        let [a, b] = &self.halves;
        let (mut held, mut all) = (0, 0);
        for (learn, test) in [(a, b), (b, a)] {
            let mut order: Vec<usize> = (0..learn.len()).collect();
            order.sort_by_key(|&expert| (std::cmp::Reverse(learn[expert]), expert));
            held += order.iter().take(slots).map(|&expert| test[expert]).sum::<u64>();
            all += test.iter().sum::<u64>();
        }
        (held, all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(first: &[u64], second: &[u64]) -> Usage {
        Usage { halves: [first.to_vec(), second.to_vec()] }
    }

    #[test]
    fn even_and_uneven() {
        let even = usage(&[1, 1, 1, 1], &[2, 2, 2, 2]);
        assert_eq!((even.entropy(), even.gini(), even.distinct()), (Some(1.0), Some(0.0), 4));
        let one = usage(&[0, 5, 0, 0], &[0; 4]);
        assert_eq!((one.entropy(), one.gini(), one.distinct()), (Some(0.0), Some(0.75), 1));
        let none = usage(&[0; 4], &[0; 4]);
        assert_eq!((none.entropy(), none.gini()), (None, None));
    }

    #[test]
    fn what_one_half_teaches_of_the_other() {
        let usage = usage(&[9, 1, 0, 0], &[4, 0, 0, 6]);
        // The first half's best is 0: 4 of 10. The second's is 3: 0 of 10.
        assert_eq!(usage.held_out(1), (4, 20));
        // 0 and 1; 3 and 0.
        assert_eq!(usage.held_out(2), (4 + 9, 20));
        assert_eq!(usage.held_out(9), (20, 20));
    }
}
