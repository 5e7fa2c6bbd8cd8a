//! How weights reach a GPU's memory: through a ring in host memory, or past it, by cuFile.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tierstream_ggml::{Cufile, CufilePlaces, Gds, GdsTurns, Gpu};
use tierstream_io::{Config, Reader};

use super::known::{Identity, Known};
use super::probe::median;
use crate::error::{Error, Result};
use crate::machine::Filesystem;

/// How much faster cuFile has to be: a short measurement is a rough one.
const MARGIN: f64 = 1.05;

/// In how many rounds of four it has to be faster: others may use the drive meanwhile.
const ROUNDS_OF_FOUR: u32 = 3;

/// A measurement of fewer rounds is a guess.
const ROUNDS_MIN: u32 = 4;

/// How weights reach a GPU's memory, as a user asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GpuReads {
    /// The faster way.
    #[default]
    Auto,
    /// By cuFile (GPUDirect Storage), or the load fails.
    Cufile,
    /// Through host memory.
    Ring,
}

/// How they do, and why.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GpuWay {
    /// By cuFile.
    pub cufile: bool,
    /// Why, in a few words.
    pub reason: String,
    /// The measurement behind it, if there was one.
    pub probe: Option<GpuProbe>,
}

/// What both ways brought from a drive to a GPU: 1e9 bytes per second, medians of turns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuProbe {
    /// The GPU, the library, and what of the kernel supports it: of others this says nothing.
    pub of: String,
    /// By cuFile.
    pub cufile_gbps: f64,
    /// Through the ring.
    pub ring_gbps: f64,
    /// The first over the second, median of neighbouring turns.
    pub ratio: f64,
    /// Pairs of turns.
    pub rounds: u32,
    /// Of those, the ones in which cuFile was faster.
    pub rounds_won: u32,
    /// What cuFile said when it was tried, if it does not read this drive.
    pub refused: Option<String>,
}

impl GpuProbe {
    fn of_turns(of: String, turns: &GdsTurns) -> Self {
        let pairs = turns.cufile_gbps.iter().zip(&turns.ring_gbps);
        let ratios: Vec<f64> = pairs.map(|(cufile, ring)| cufile / ring).collect();
        Self {
            of,
            cufile_gbps: median(turns.cufile_gbps.clone()),
            ring_gbps: median(turns.ring_gbps.clone()),
            rounds: ratios.len() as u32,
            rounds_won: ratios.iter().filter(|ratio| **ratio > 1.0).count() as u32,
            ratio: median(ratios),
            refused: None,
        }
    }

    fn refusal(of: String, why: String) -> Self {
        let (cufile_gbps, ring_gbps, ratio) = (0.0, 0.0, 0.0);
        let (rounds, rounds_won, refused) = (0, 0, Some(why));
        Self { of, cufile_gbps, ring_gbps, ratio, rounds, rounds_won, refused }
    }

    /// What it says.
    fn way(self) -> GpuWay {
        let rates = format!(
            "{:.2} GB/s by cuFile, {:.2} through host memory",
            self.cufile_gbps, self.ring_gbps
        );
        let faster = self.ratio > MARGIN && 4 * self.rounds_won >= ROUNDS_OF_FOUR * self.rounds;
        let (cufile, reason) = if let Some(why) = &self.refused {
            (false, format!("cuFile does not read this drive: {why}"))
        } else if self.rounds < ROUNDS_MIN {
            (false, format!("which way is faster takes too long to measure ({rates})"))
        } else if faster {
            (true, format!("the faster way here ({rates})"))
        } else {
            (false, format!("cuFile is not clearly faster here ({rates})"))
        };
        GpuWay { cufile, reason, probe: Some(self) }
    }
}

/// When a drive is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Only what is known counts.
    Never,
    /// If nothing is known of it.
    IfUnknown,
    /// Whatever is known.
    Again,
}

impl GpuWay {
    /// The way for weights in the file at `path`, on `filesystem`, to `gpu`, by a libcufile in `places`.
    /// Measures both for a moment where `measure` says so, and remembers that in the folder `cache`.
    pub fn of(
        path: &Path,
        filesystem: Option<&Filesystem>,
        gpu: &Gpu,
        places: &CufilePlaces,
        cache: Option<&Path>,
        measure: Measure,
    ) -> GpuWay {
        let drive = Identity::of(path, filesystem);
        let mut known = drive.zip(cache).map(|(drive, dir)| (Known::load(dir, drive), dir));
        let known = known.as_mut().map(|(known, dir)| (known, *dir));
        let config = Config::default();
        GpuLoad { path, gpu, places, verified: false }.faster(known, measure, config).1
    }
}

/// What a way is chosen for.
pub(crate) struct GpuLoad<'a> {
    /// The (first) file.
    pub(crate) path: &'a Path,
    pub(crate) gpu: &'a Gpu,
    pub(crate) places: &'a CufilePlaces,
    /// Weights are compared with checksums.
    pub(crate) verified: bool,
}

impl GpuLoad<'_> {
    /// The way that is asked for: with `auto` by what is `known` of the drive, or else by a measurement,
    /// in which a reader of `config` has the ring.
    ///
    /// # Errors
    /// [`Error::Cufile`] if it has to be cuFile and cannot.
    pub(crate) fn choose(
        &self,
        asked: GpuReads,
        known: Option<(&mut Known, &Path)>,
        config: Config,
    ) -> Result<(Option<Gds>, GpuWay)> {
        match asked {
            GpuReads::Ring => Ok((None, not("as asked"))),
            GpuReads::Cufile if self.verified => {
                let reason = format!("{VERIFIED} (--verify-weights)");
                Err(Error::Cufile { reason })
            }
            GpuReads::Cufile => {
                let opened = self.find().and_then(|cufile| Gds::open(cufile, self.gpu));
                let gds = opened.map_err(|error| Error::Cufile { reason: without(&error) })?;
                let reason = "as asked".to_owned();
                Ok((Some(gds.required()), GpuWay { cufile: true, reason, probe: None }))
            }
            GpuReads::Auto if self.verified => Ok((None, not(VERIFIED))),
            GpuReads::Auto => Ok(self.faster(known, Measure::IfUnknown, config)),
        }
    }

    fn find(&self) -> tierstream_ggml::Result<Cufile> {
        Ok(Cufile::find(self.places)?)
    }

    fn faster(
        &self,
        known: Option<(&mut Known, &Path)>,
        measure: Measure,
        config: Config,
    ) -> (Option<Gds>, GpuWay) {
        let cufile = match self.find() {
            Ok(cufile) => cufile,
            Err(error) => return (None, not(without(&error))),
        };
        let of = format!("{}, {cufile}", self.gpu.description());
        let remembered = known.as_ref().and_then(|(known, _)| known.gpu_probe());
        let remembered = remembered.filter(|probe| probe.of == of && measure != Measure::Again);
        match remembered.cloned().map(GpuProbe::way) {
            Some(way) if !way.cufile => return (None, way),
            None if measure == Measure::Never => {
                return (None, not("libcufile is there, but was not measured"));
            }
            Some(way) => {
                return match Gds::open(cufile, self.gpu) {
                    Ok(gds) => (Some(gds), way),
                    Err(error) => (None, not(without(&error))),
                };
            }
            None => {}
        }
        let measured = Gds::open(cufile, self.gpu).and_then(|gds| {
            let reader = Arc::new(Reader::new(config)?);
            Ok((gds.measure(&reader, self.path)?, gds))
        });
        let (gds, probe) = match measured {
            Ok((Some(turns), gds)) => (Some(gds), GpuProbe::of_turns(of, &turns)),
            Ok((None, _)) => return (None, not("the file is too small to tell the faster way")),
            Err(error) => (None, GpuProbe::refusal(of, without(&error))),
        };
        if let Some((known, dir)) = known {
            known.set_gpu_probe(probe.clone());
            // Without it, the next start measures again.
            let _ = known.save(dir);
        }
        let way = probe.way();
        (gds.filter(|_| way.cufile), way)
    }
}

const VERIFIED: &str = "weights that are compared with checksums are hashed in host memory";

/// Through host memory.
fn not(reason: impl Into<String>) -> GpuWay {
    GpuWay { cufile: false, reason: reason.into(), probe: None }
}

/// Why there is no cuFile, with all that is behind it.
fn without(error: &tierstream_ggml::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probed(cufile_gbps: f64, ring_gbps: f64) -> GpuProbe {
        let turns = GdsTurns { cufile_gbps: vec![cufile_gbps; 8], ring_gbps: vec![ring_gbps; 8] };
        GpuProbe::of_turns("a GPU".to_owned(), &turns)
    }

    #[test]
    fn rates_decide() {
        for (cufile, ring, expected, why) in [
            (6.0, 4.0, true, "the faster way here (6.00 GB/s by cuFile, 4.00 through host memory)"),
            (4.21, 4.0, true, "the faster way here"),
            // Within what such a measurement may be wrong by.
            (4.19, 4.0, false, "cuFile is not clearly faster here (4.19 GB/s by cuFile"),
            (4.0, 4.0, false, "cuFile is not clearly faster"),
            (3.0, 4.0, false, "cuFile is not clearly faster"),
        ] {
            let way = probed(cufile, ring).way();
            assert_eq!(way.cufile, expected, "{cufile} {ring}");
            assert!(way.reason.starts_with(why), "{}", way.reason);
        }
        // Now this one and now that one: somebody else was busy there.
        for (rounds_won, cufile) in [(8, true), (6, true), (5, false)] {
            let way = GpuProbe { rounds_won, ..probed(6.0, 4.0) }.way();
            assert_eq!(way.cufile, cufile, "{rounds_won}");
        }
        let few = GpuProbe { rounds: 3, rounds_won: 3, ..probed(6.0, 4.0) }.way();
        assert!(!few.cufile && few.reason.contains("too long to measure"), "{few:?}");
        let refused = GpuProbe::refusal("a GPU".to_owned(), "cuFile error 5008".to_owned()).way();
        let why = "cuFile does not read this drive: cuFile error 5008";
        assert_eq!((refused.cufile, &*refused.reason), (false, why));
    }

    #[test]
    fn ratios_are_those_of_neighbours() {
        // A drive that gets slower: each pair says the same.
        let turns = GdsTurns { cufile_gbps: vec![8.0, 4.0, 2.0], ring_gbps: vec![4.0, 2.0, 1.0] };
        let probe = GpuProbe::of_turns(String::new(), &turns);
        assert_eq!((probe.ratio, probe.rounds, probe.rounds_won), (2.0, 3, 3));
        assert_eq!((probe.cufile_gbps, probe.ring_gbps), (4.0, 2.0));
    }
}
