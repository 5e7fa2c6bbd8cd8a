//! Numbers that look random and are the same for the same seed.

use tierstream_ggml::Token;

/// splitmix64 (Steele, Lea and Flood 2014).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, or 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// Numbers below `n` in random order; of a huge `n`, the first million draws.
    pub(crate) fn shuffled(&mut self, n: u64) -> Vec<u64> {
        if n > 1 << 20 {
            return (0..1 << 20).map(|_| self.below(n)).collect();
        }
        let mut all: Vec<u64> = (0..n).collect();
        for i in (1..all.len()).rev() {
            all.swap(i, self.below(i as u64 + 1) as usize);
        }
        all
    }
}

/// `n` token ids below `vocab`.
pub(crate) fn drawn_tokens(n: usize, vocab: u32, seed: u32) -> Vec<Token> {
    let mut random = Random::new(u64::from(seed));
    let mut id = || Token::try_from(random.below(u64::from(vocab))).expect("ids are i32");
    (0..n).map(|_| id()).collect()
}

#[cfg(test)]
mod tests {
    use super::{Random, drawn_tokens};

    #[test]
    fn known_stream() {
        // First outputs for seed 1234567, from the reference implementation.
        let mut random = Random::new(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn a_shuffle_has_every_number_once() {
        let mut all = Random::new(1).shuffled(100);
        assert_ne!(all, (0..100).collect::<Vec<_>>());
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn drawn_tokens_are_of_the_vocabulary() {
        let tokens = drawn_tokens(100, 7, 3);
        assert!(tokens.iter().all(|t| (0..7).contains(t)));
        assert_eq!(tokens, drawn_tokens(100, 7, 3));
        assert_ne!(tokens, drawn_tokens(100, 7, 4));
    }
}
