//! 16-bit float encodings.

/// IEEE 754 binary16 bits of `x`, rounded to nearest even; overflow becomes infinity.
#[inline]
pub(crate) fn f16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let abs = bits & 0x7fff_ffff;
    if abs >= 0x4780_0000 {
        // 65536 and above, infinity, NaN.
        return sign | if abs > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    }
    if abs < 0x3880_0000 {
        // Subnormal: adding 0.5 leaves the value in units of 2^-24, rounded, in the low bits.
        let shifted = f32::from_bits(abs) + 0.5;
        return sign | (shifted.to_bits() - 0.5_f32.to_bits()) as u16;
    }
    // Rebias the exponent by 112, then round away the 13 low bits to nearest even.
    let odd = (abs >> 13) & 1;
    sign | ((abs - (112 << 23) + 0x0fff + odd) >> 13) as u16
}

/// bfloat16 bits of a finite `x`, rounded to nearest even.
#[inline]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The value of binary16 bits.
#[cfg(test)]
pub(crate) fn f16_value(bits: u16) -> f32 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((bits >> 10) & 0x1f);
    let mantissa = f32::from(bits & 0x3ff);
    sign * match exponent {
        0 => mantissa * 2f32.powi(-24),
        31 if mantissa == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        e => (1024.0 + mantissa) * 2f32.powi(e - 25),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_round_trip_of_every_finite_value() {
        for bits in 0..=u16::MAX {
            if bits & 0x7c00 != 0x7c00 {
                assert_eq!(f16_bits(f16_value(bits)), bits);
            }
        }
    }

    #[test]
    fn f16_rounds_to_nearest_even() {
        assert_eq!(f16_bits(1.0 + 2f32.powi(-11)), f16_bits(1.0));
        assert_eq!(f16_bits(1.0 + 3.0 * 2f32.powi(-11)), f16_bits(1.0 + 2.0 * 2f32.powi(-10)));
        assert_eq!(f16_bits(65520.0), 0x7c00);
        assert_eq!(f16_bits(65519.0), 0x7bff);
        assert_eq!(f16_bits(1e9), 0x7c00);
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        assert_eq!(bf16_bits(1.0), 0x3f80);
        assert_eq!(bf16_bits(1.0 + 2f32.powi(-8)), 0x3f80);
        assert_eq!(bf16_bits(1.0 + 3.0 * 2f32.powi(-8)), 0x3f82);
        assert_eq!(bf16_bits(-2.0), 0xc000);
    }
}
