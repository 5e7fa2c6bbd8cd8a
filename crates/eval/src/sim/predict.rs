//! Who guesses what the next layer needs, from what a trace tells.

use std::fmt;
use std::str::FromStr;

use crate::header::Header;

/// A way to guess the experts of a layer before its router has spoken.
///
/// A trace has no hidden states, so that the next layer's router cannot be asked; [`Oracle`](Self::Oracle)
/// stands for one of a given recall.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Predictor {
    /// What the layer used for the last token, in that order.
    Previous,
    /// What followed most often, so far, on the experts that the layer before has just used.
    Following,
    /// Knows each of the experts with this chance, and puts other ones in the place of the rest.
    Oracle {
        /// From 0 to 1.
        recall: f64,
    },
}

impl fmt::Display for Predictor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Previous => f.pad("previous"),
            Self::Following => f.pad("following"),
            Self::Oracle { recall } => write!(f, "oracle:{recall}"),
        }
    }
}

impl FromStr for Predictor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "previous" => Ok(Self::Previous),
            "following" => Ok(Self::Following),
            _ => text
                .strip_prefix("oracle:")
                .and_then(|recall| recall.parse().ok())
                .filter(|recall| (0.0..=1.0).contains(recall))
                .map(|recall| Self::Oracle { recall })
                .ok_or_else(|| "there are previous, following, oracle:<recall>".to_owned()),
        }
    }
}

/// How often experts of a layer followed those of the layer before.
pub(crate) struct Following {
    /// Experts of the layer.
    width: usize,
    counts: Vec<u32>,
}

impl Following {
    /// Of a layer with so many experts, after one with `before`.
    pub(crate) fn new(before: u32, experts: u32) -> Self {
        let width = experts as usize;
        Self { width, counts: vec![0; before as usize * width] }
    }

    /// Notes that a token used these.
    pub(crate) fn note(&mut self, before: &[u16], experts: &[u16]) {
        for &from in before {
            let row = &mut self.counts[usize::from(from) * self.width..][..self.width];
            experts.iter().for_each(|&to| row[usize::from(to)] += 1);
        }
    }

    /// The most likely experts after these, best first, at most `count`; none that never followed.
    pub(crate) fn guess(&self, before: &[u16], count: usize, out: &mut Vec<u16>) {
        let mut scores = vec![0.0f64; self.width];
        for &from in before {
            let row = &self.counts[usize::from(from) * self.width..][..self.width];
            let all: u32 = row.iter().sum();
            let scale = 1.0 / f64::from(all.max(1));
            scores.iter_mut().zip(row).for_each(|(score, &n)| *score += f64::from(n) * scale);
        }
        let mut order: Vec<u16> = (0..self.width as u16).collect();
        order.retain(|&expert| scores[usize::from(expert)] > 0.0);
        let by_score = |a: &u16, b: &u16| {
            scores[usize::from(*b)].total_cmp(&scores[usize::from(*a)]).then(a.cmp(b))
        };
        order.sort_by(by_score);
        out.clear();
        out.extend(order.into_iter().take(count));
    }
}

/// One for each layer but the first.
pub(crate) fn followings(header: &Header) -> Vec<Following> {
    let pairs = header.layers.windows(2);
    pairs.map(|pair| Following::new(pair[0].experts, pair[1].experts)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first() {
        let mut following = Following::new(4, 4);
        following.note(&[0], &[1]);
        following.note(&[0], &[1]);
        following.note(&[0], &[2]);
        following.note(&[3], &[0]);
        let mut out = Vec::new();
        following.guess(&[0], 4, &mut out);
        assert_eq!(out, [1, 2]);
        following.guess(&[0, 3], 2, &mut out);
        assert_eq!(out, [0, 1]);
        following.guess(&[2], 2, &mut out);
        assert!(out.is_empty());
    }

    #[test]
    fn names_round_trip() {
        for predictor in
            [Predictor::Previous, Predictor::Following, Predictor::Oracle { recall: 0.88 }]
        {
            assert_eq!(predictor.to_string().parse(), Ok(predictor));
        }
        assert!("oracle:2".parse::<Predictor>().is_err());
    }
}
