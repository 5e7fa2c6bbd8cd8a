//! Fills buffers with random but valid blocks of every tensor type.
//!
//! No quantiser runs: the stored bits are drawn directly, with scales such that the values that
//! llama.cpp reads back have the wanted spread. Layouts: `ggml/src/ggml-common.h`, decoding:
//! `ggml/src/ggml-quants.c` of llama.cpp.

use crate::half::{bf16_bits, f16_bits};
use crate::rng::Rng;
use crate::types::TensorType;

/// Entries in a table of block scales.
const SCALES: usize = 64;

/// A source of tensor data with a given spread.
#[derive(Debug)]
pub(crate) struct Filler {
    rng: Rng,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// `mean + step * i32`, uniform.
    F32 {
        mean: f32,
        step: f32,
    },
    /// `mean + step * (i16 + 1/2)`, uniform.
    F16 {
        mean: f32,
        step: f32,
    },
    Bf16 {
        mean: f32,
        step: f32,
    },
    Q8_0([u16; SCALES]),
    Q4_0([u16; SCALES]),
    Q5_0([u16; SCALES]),
    /// (scale, scale of the minimum).
    Q4K([(u16, u16); SCALES]),
    Q5K([(u16, u16); SCALES]),
    Q6K([u16; SCALES]),
    /// Exponent byte, and how often of 2^32 the next larger one is taken.
    Mxfp4 {
        exponent: u8,
        larger: u64,
    },
}

impl Filler {
    /// Data of type `ty` with mean `mean` and standard deviation `std`.
    ///
    /// Quantised types have mean 0 whatever `mean` says: their scales have random signs.
    pub(crate) fn new(ty: TensorType, mean: f32, std: f32, rng: Rng) -> Self {
        // A uniform variable on (-a, a) has standard deviation a / sqrt(3).
        let half_width = std * 3f32.sqrt();
        // Mean of q^2 over uniform stored bits, q being the integer that the scale multiplies.
        let table = |mean_square: f32| signed_scales(std / mean_square.sqrt());
        let kind = match ty {
            TensorType::F32 => Kind::F32 { mean, step: half_width / 2f32.powi(31) },
            TensorType::F16 => Kind::F16 { mean, step: half_width / 32768.0 },
            TensorType::BF16 => Kind::Bf16 { mean, step: half_width / 32768.0 },
            TensorType::Q8_0 => Kind::Q8_0(table(5460.5)),
            TensorType::Q4_0 => Kind::Q4_0(table(21.5)),
            TensorType::Q5_0 => Kind::Q5_0(table(85.5)),
            TensorType::Q4_K => {
                Kind::Q4K(k_scales(std / (21.25 * mean_square_scale()).sqrt(), 7.5))
            }
            TensorType::Q5_K => {
                Kind::Q5K(k_scales(std / (85.25 * mean_square_scale()).sqrt(), 15.5))
            }
            TensorType::Q6_K => {
                let scale_square = (32..64).map(|s| (s * s) as f32).sum::<f32>() / 32.0;
                Kind::Q6K(table(341.5 * scale_square))
            }
            TensorType::MXFP4 => {
                // Values are {0,1,2,3,4,6,8,12} * 2^(e-128); mixing two neighbouring exponents
                // meets any spread exactly.
                let scale = std / (274f32 / 8.0).sqrt();
                let power = scale.log2().floor();
                let ratio = f64::from(scale / power.exp2());
                let larger = (ratio * ratio - 1.0) / 3.0 * 2f64.powi(32);
                Kind::Mxfp4 { exponent: (power as i32 + 128) as u8, larger: larger as u64 }
            }
        };
        Self { rng, kind }
    }

    /// Overwrites `out`, whose length is a multiple of the type's block size.
    pub(crate) fn fill(&mut self, out: &mut [u8]) {
        let rng = &mut self.rng;
        match &self.kind {
            Kind::F32 { mean, step } => {
                for four in out.chunks_exact_mut(4) {
                    let value = mean + step * ((rng.next() >> 32) as i32 as f32);
                    four.copy_from_slice(&value.to_le_bytes());
                }
            }
            Kind::F16 { mean, step } => fill_16(out, rng, |i| f16_bits(mean + step * i)),
            Kind::Bf16 { mean, step } => fill_16(out, rng, |i| bf16_bits(mean + step * i)),
            Kind::Q8_0(scales) => {
                for block in out.chunks_exact_mut(34) {
                    put_u16(block, pick(scales, rng));
                    put_random(&mut block[2..], rng);
                    for q in &mut block[2..] {
                        // Quantisers never store -128, and some kernels rely on it.
                        *q = if *q == 0x80 { 0x7f } else { *q };
                    }
                }
            }
            Kind::Q4_0(scales) => {
                for block in out.chunks_exact_mut(18) {
                    put_u16(block, pick(scales, rng));
                    put_random(&mut block[2..], rng);
                }
            }
            Kind::Q5_0(scales) => {
                for block in out.chunks_exact_mut(22) {
                    put_u16(block, pick(scales, rng));
                    put_random(&mut block[2..], rng);
                }
            }
            Kind::Q4K(scales) => out.chunks_exact_mut(144).for_each(|b| put_k(b, scales, rng)),
            Kind::Q5K(scales) => out.chunks_exact_mut(176).for_each(|b| put_k(b, scales, rng)),
            Kind::Q6K(scales) => {
                for block in out.chunks_exact_mut(210) {
                    put_random(&mut block[..192], rng);
                    let mut bits = u128::from(rng.next()) | u128::from(rng.next()) << 64;
                    for scale in &mut block[192..208] {
                        let magnitude = 32 + (bits & 31) as i8;
                        *scale = if bits & 32 == 0 { magnitude } else { -magnitude } as u8;
                        bits >>= 6;
                    }
                    put_u16(&mut block[208..], pick(scales, rng));
                }
            }
            Kind::Mxfp4 { exponent, larger } => {
                for block in out.chunks_exact_mut(17) {
                    block[0] = exponent + u8::from((rng.next() >> 32) < *larger);
                    put_random(&mut block[1..], rng);
                }
            }
        }
    }
}

/// Scales of both signs and of magnitudes 0.7 to 1.3, with root mean square `scale`.
fn signed_scales(scale: f32) -> [u16; SCALES] {
    spread(scale, f16_bits)
}

/// Pairs (d, dmin) with dmin = centre * d, which puts the middle of the stored range at zero.
fn k_scales(scale: f32, centre: f32) -> [(u16, u16); SCALES] {
    spread(scale, |s| (f16_bits(s.abs()), f16_bits(s.abs() * centre)))
}

fn spread<T>(scale: f32, encode: impl Fn(f32) -> T) -> [T; SCALES] {
    let magnitude = |i: usize| 0.7 + 0.6 * (i / 2) as f32 / (SCALES / 2 - 1) as f32;
    let mean_square = (0..SCALES).map(|i| magnitude(i).powi(2)).sum::<f32>() / SCALES as f32;
    let unit = scale / mean_square.sqrt();
    std::array::from_fn(|i| encode(if i % 2 == 0 { unit } else { -unit } * magnitude(i)))
}

/// A 6-bit sub-block scale between 16 and 63 from 6 random bits.
#[inline]
fn sub_scale(bits: u64) -> u8 {
    (16 + (((bits & 63) * 3) >> 2)) as u8
}

fn mean_square_scale() -> f32 {
    (0..64).map(|bits| f32::from(sub_scale(bits)).powi(2)).sum::<f32>() / 64.0
}

#[inline]
fn pick<T: Copy>(table: &[T; SCALES], rng: &mut Rng) -> T {
    table[(rng.next() >> 58) as usize]
}

#[inline]
fn put_u16(out: &mut [u8], value: u16) {
    out[..2].copy_from_slice(&value.to_le_bytes());
}

#[inline]
fn put_random(out: &mut [u8], rng: &mut Rng) {
    let mut words = out.chunks_exact_mut(8);
    for word in &mut words {
        word.copy_from_slice(&rng.next().to_le_bytes());
    }
    let rest = words.into_remainder();
    if !rest.is_empty() {
        let last = rng.next().to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// `value` gets a number from -32767.5 to 32767.5.
#[inline]
fn fill_16(out: &mut [u8], rng: &mut Rng, value: impl Fn(f32) -> u16) {
    for four in out.chunks_mut(8) {
        let bits = rng.next();
        for (i, two) in four.chunks_exact_mut(2).enumerate() {
            put_u16(two, value(f32::from((bits >> (16 * i)) as i16) + 0.5));
        }
    }
}

/// A Q4_K or Q5_K block: d, dmin, eight 6-bit scales and minimums in 12 bytes, then the quants.
#[inline]
fn put_k(block: &mut [u8], scales: &[(u16, u16); SCALES], rng: &mut Rng) {
    let bits = rng.next();
    let (d, dmin) = scales[(bits >> 58) as usize];
    put_u16(block, d);
    put_u16(&mut block[2..], dmin);
    let scale = |j: usize| sub_scale(bits >> (6 * j));
    // Minimums differ from scales by one, either way, so that the two are not interchangeable.
    let minimum = |j: usize| scale(j) ^ (bits >> (48 + j) & 1) as u8;
    for j in 0..4 {
        let (s, m) = (scale(j + 4), minimum(j + 4));
        block[4 + j] = scale(j) | s >> 4 << 6;
        block[8 + j] = minimum(j) | m >> 4 << 6;
        block[12 + j] = (s & 15) | m << 4;
    }
    put_random(&mut block[16..], rng);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::half::f16_value;

    fn f16_at(b: &[u8], i: usize) -> f32 {
        f16_value(u16::from_le_bytes([b[i], b[i + 1]]))
    }

    /// `get_scale_min_k4` of ggml-quants.c.
    fn scale_min(q: &[u8], j: usize) -> (f32, f32) {
        let (s, m) = if j < 4 {
            (q[j] & 63, q[j + 4] & 63)
        } else {
            ((q[j + 4] & 15) | q[j - 4] >> 6 << 4, q[j + 4] >> 4 | q[j] >> 6 << 4)
        };
        (f32::from(s), f32::from(m))
    }

    /// The values of one block, after ggml's `dequantize_row_*`; order does not matter here.
    fn decode(ty: TensorType, b: &[u8]) -> Vec<f32> {
        let nibbles = |from: usize, to: usize| {
            b[from..to].iter().flat_map(|q| [i32::from(q & 15), i32::from(q >> 4)])
        };
        match ty {
            TensorType::F32 => vec![f32::from_le_bytes(b.try_into().unwrap())],
            TensorType::F16 => vec![f16_at(b, 0)],
            TensorType::BF16 => vec![f32::from_bits(u32::from(b[1]) << 24 | u32::from(b[0]) << 16)],
            TensorType::Q8_0 => b[2..].iter().map(|q| f16_at(b, 0) * f32::from(*q as i8)).collect(),
            TensorType::Q4_0 => nibbles(2, 18).map(|q| f16_at(b, 0) * (q - 8) as f32).collect(),
            TensorType::Q5_0 => {
                let high = u32::from_le_bytes(b[2..6].try_into().unwrap());
                nibbles(6, 22)
                    .enumerate()
                    .map(|(i, q)| f16_at(b, 0) * ((q | ((high >> i & 1) as i32 * 16)) - 16) as f32)
                    .collect()
            }
            TensorType::Q4_K | TensorType::Q5_K => {
                let five = ty == TensorType::Q5_K;
                let quants = &b[if five { 48 } else { 16 }..];
                let mut out = Vec::new();
                for j in 0..8 {
                    let (scale, min) = scale_min(&b[4..16], j);
                    for l in 0..32 {
                        let byte = quants[j / 2 * 32 + l];
                        let low = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
                        let high = if five { b[16 + l] >> j & 1 } else { 0 };
                        let q = f32::from(low | high << 4);
                        out.push(f16_at(b, 0) * scale * q - f16_at(b, 2) * min);
                    }
                }
                out
            }
            TensorType::Q6_K => (0..256)
                .map(|i| {
                    let (half, quarter, l) = (i / 128, i % 128 / 32, i % 32);
                    let low = b[64 * half + 32 * (quarter % 2) + l] >> (quarter / 2 * 4) & 15;
                    let high = b[128 + 32 * half + l] >> (2 * quarter) & 3;
                    let scale = b[192 + 8 * half + 2 * quarter + l / 16] as i8;
                    f16_at(b, 208) * f32::from(scale) * (f32::from(low | high << 4) - 32.0)
                })
                .collect(),
            TensorType::MXFP4 => {
                const VALUES: [i32; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
                let d = 2f32.powi(i32::from(b[0]) - 128);
                nibbles(1, 17).map(|q| d * VALUES[q as usize] as f32).collect()
            }
        }
    }

    fn moments(ty: TensorType, mean: f32, std: f32) -> (f32, f32) {
        let blocks = (1 << 18) / ty.block_len() as usize;
        let mut data = vec![0xee; blocks * ty.block_bytes() as usize];
        Filler::new(ty, mean, std, Rng::for_name(3, "t")).fill(&mut data);
        let values: Vec<f64> = data
            .chunks_exact(ty.block_bytes() as usize)
            .flat_map(|b| decode(ty, b))
            .map(f64::from)
            .collect();
        assert_eq!(values.len(), 1 << 18);
        assert!(values.iter().all(|v| v.is_finite() && v.abs() < 8.0 * f64::from(std) + 1.0));
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        (mean as f32, variance.sqrt() as f32)
    }

    #[test]
    fn every_type_has_the_wanted_spread() {
        for ty in TensorType::ALL {
            for std in [0.5, 1.0 / 16.0, 1.0 / 64.0, 1.0 / 100.0] {
                let (mean, got) = moments(ty, 0.0, std);
                assert!((got / std - 1.0).abs() < 0.02, "{ty} {std}: deviation {got}");
                assert!(mean.abs() < 0.02 * std, "{ty} {std}: mean {mean}");
            }
        }
    }

    #[test]
    fn floats_take_a_mean() {
        for ty in [TensorType::F32, TensorType::F16, TensorType::BF16] {
            let (mean, std) = moments(ty, 1.0, 0.1);
            assert!((mean - 1.0).abs() < 0.002, "{ty}: {mean}");
            assert!((std - 0.1).abs() < 0.002, "{ty}: {std}");
        }
    }

    #[test]
    fn content_does_not_depend_on_the_size_of_the_calls() {
        for ty in TensorType::ALL {
            let len = 64 * ty.block_bytes() as usize;
            let filler = || Filler::new(ty, 0.0, 0.1, Rng::for_name(9, "t"));
            let mut whole = vec![0; len];
            filler().fill(&mut whole);
            let mut parts = vec![0; len];
            let mut filler = filler();
            // Halves: F16 and BF16 draw four values at a time, so a part is a multiple of 8 bytes.
            for part in parts.chunks_mut(len / 2) {
                filler.fill(part);
            }
            assert_eq!(whole, parts, "{ty}");
        }
    }
}
