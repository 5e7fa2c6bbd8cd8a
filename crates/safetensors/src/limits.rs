//! Upper bounds on everything that a file may claim, each with its reason.
//!
//! They keep a hostile file from costing more than a few times the bytes of its header, and are far
//! above anything seen in published checkpoints. A file beyond one of them is refused with
//! [`ErrorKind::Limit`](crate::ErrorKind::Limit).

/// Bytes of one file's header: the limit of the `safetensors` package (`MAX_HEADER_SIZE`).
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of an index. It names what the headers name, with less about each; the largest published
/// ones are near 20 MB.
pub const MAX_INDEX_BYTES: u64 = 100_000_000;

/// Tensors in a checkpoint, over all its files. Those that keep each expert as tensors of its own,
/// with their scales, have up to some 250,000.
pub const MAX_TENSORS: usize = 1 << 20;

/// Bytes of a tensor's name. Published ones stay under 150.
pub const MAX_NAME_BYTES: usize = 4096;

/// Dimensions of a tensor. NumPy has up to 64, PyTorch as many.
pub const MAX_DIMS: usize = 64;

/// Metadata pairs in one file. Most have one, `format`.
pub const MAX_METADATA_PAIRS: usize = 1 << 16;

/// Files of a checkpoint. Each is opened, and stays open while tensors are loaded. Published ones
/// have fewer than 200.
pub const MAX_FILES: usize = 4096;
