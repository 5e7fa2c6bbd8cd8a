//! Runs models with llama.cpp, with expert weights streamed through a pool.
//!
//! The way of a token: [`Context::decode`] calls llama.cpp, which builds its graph and gives it to
//! the only device it knows, our proxy (`proxy`). The proxy's executor (`host`, or `gpu`) cuts the
//! graph before the expert matmuls of each layer (`plan`), looks the routed experts up in the pool
//! (`residency`), has the missing ones read, points the matmuls at slots and lets the real backend
//! compute. llama.cpp itself is unmodified.

mod abi;
mod abort;
mod backends;
mod cached;
mod cancel;
mod capture;
mod chain;
mod context;
mod control;
mod device;
mod embedding;
mod error;
mod executor;
mod gds;
mod gpu;
mod host;
mod late;
mod log;
mod memory;
mod model;
mod placement;
mod plan;
mod pooled;
mod precheck;
mod prefetch;
mod probe;
mod proxy;
mod recorder;
mod rehearsal;
mod replay;
mod residency;
mod routed;
mod router;
mod sampler;
mod saved;
mod segment;
mod stalls;
#[cfg(test)]
mod test_graph;
mod uploads;
mod verified;
mod vocab;
mod weights;
mod workspace;

pub use abort::on_abort;
pub use backends::load_backends;
pub use cached::FromCache;
pub use cancel::Cancel;
pub use context::{Context, ContextOptions, Entry, Keep};
pub use device::{DeviceInfo, devices, ggml_version};
pub use error::{Error, Result};
pub use gds::{Gds, GdsTurns};
pub use gpu::{Execution, Miss};
pub use log::set_verbose;
pub use memory::give_back_freed_memory;
pub use model::{GdsRead, Model, PoolOptions, PoolSize, Progress, Source, Weights};
pub use placement::{Gpu, Placement};
pub use prefetch::Prefetch;
pub use recorder::{BatchRouting, LayerRouting, TokenAt};
pub use rehearsal::Rehearsal;
pub use replay::Replay;
pub use residency::{ExpertCounters, LayerUse};
pub use sampler::{Sampler, Sampling};
pub use stalls::{STALL_BOUNDS, Stalls};
pub use tierstream_cuda::{Cufile, Error as GpuError, Places as CufilePlaces};
pub use verified::{ChecksumSource, Checksums, Mismatch};
pub use vocab::{Token, Vocab};
