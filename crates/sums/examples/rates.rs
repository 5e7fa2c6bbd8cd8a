//! How fast checksums are computed in memory, by one thread: XXH3, BLAKE3 and SHA-256 in turns.
//!
//! `cargo run --release -p tierstream-sums --example rates`

use std::hint::black_box;
use std::time::Instant;

use sha2::Digest;

const BYTES: usize = 2 << 30;
const ROUNDS: usize = 7;

/// A way to hash, and its name.
type Way = (&'static str, fn(&[u8]));

fn main() {
    let bytes: Vec<u8> =
        (0..BYTES as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let ways: [Way; 3] = [
        ("XXH3, 64 bits", |bytes| _ = black_box(tierstream_sums::sum(bytes))),
        ("BLAKE3", |bytes| _ = black_box(blake3::hash(bytes))),
        ("SHA-256", |bytes| _ = black_box(sha2::Sha256::digest(bytes))),
    ];
    let mut rates = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        for ((_, way), rates) in ways.iter().zip(&mut rates) {
            let start = Instant::now();
            way(black_box(&bytes));
            rates.push(BYTES as f64 / start.elapsed().as_secs_f64() / 1e9);
        }
    }
    for ((name, _), mut rates) in ways.iter().zip(rates) {
        rates.sort_by(f64::total_cmp);
        let (least, median, most) = (rates[0], rates[ROUNDS / 2], rates[ROUNDS - 1]);
        println!("{name}: {median:.1} GB/s ({least:.1} to {most:.1})");
    }
}
