//! How fast the bus is.

use std::time::Instant;

use crate::device::Device;
use crate::error::Result;

/// Rates of copies between pinned memory and a device, in 10^9 bytes per second: the median over
/// the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bandwidth {
    /// Size of a copy.
    pub bytes: usize,
    /// Copies measured in each direction.
    pub rounds: usize,
    /// To the device.
    pub upload_gbps: f64,
    /// From the device.
    pub download_gbps: f64,
}

impl Device {
    /// Measures copies of `bytes` each, one after the other, after one that does not count. Takes
    /// `bytes` of pinned memory and as much of the device's meanwhile.
    ///
    /// # Errors
    /// Those of the calls that it makes: no memory, first of all.
    pub fn bandwidth(&self, bytes: usize, rounds: usize) -> Result<Bandwidth> {
        let rounds = rounds.max(1);
        let block = self.allocate(bytes as u64)?;
        let all = || block.span(0, bytes as u64);
        let stream = self.stream()?;
        let gbps = |start: Instant| bytes as f64 / start.elapsed().as_secs_f64() / 1e9;
        let (mut up, mut down) = (Vec::new(), Vec::new());
        let mut memory = self.pin(bytes)?;
        for _ in 0..=rounds {
            let start = Instant::now();
            memory = stream.download(all()?, memory)?.wait()?;
            down.push(gbps(start));
        }
        let memory = memory.share();
        for _ in 0..=rounds {
            let start = Instant::now();
            stream.upload(memory.clone(), all()?)?;
            stream.record()?.wait()?;
            up.push(gbps(start));
        }
        let (upload_gbps, download_gbps) = (median(&mut up[1..]), median(&mut down[1..]));
        Ok(Bandwidth { bytes, rounds, upload_gbps, download_gbps })
    }
}

/// Of at least one rate.
fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(super::median(&mut [3.0]), 3.0);
        assert_eq!(super::median(&mut [9.0, 1.0, 2.0]), 2.0);
    }
}
