//! Upper bounds on everything that a file may claim, each with its reason.
//!
//! They keep a hostile file from costing more than its own size, and are far above anything seen in
//! published models. A file beyond one of them is refused with
//! [`ErrorKind::Limit`](crate::ErrorKind::Limit).

/// Bytes of one file's header (metadata and tensor table). The largest published ones, with
/// 250k-token vocabularies and merges, are near 30 MiB; a sparse file can claim any length, so the
/// file's own length bounds nothing.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;

/// Metadata pairs in one file. Published models have fewer than 200.
pub const MAX_METADATA_PAIRS: u64 = 1 << 16;

/// Tensors in a model, over all its files. The largest models have about 3,000; files that keep
/// each expert as a tensor of its own (61 layers x 256 experts x 3) about 50,000.
pub const MAX_TENSORS: u64 = 1 << 18;

/// Bytes of a metadata key: the GGUF specification's own limit.
pub const MAX_KEY_BYTES: u64 = 65_535;

/// Bytes of one string. The longest in use are whole `tokenizer.json` files kept as one value, some
/// 20 MiB.
pub const MAX_STRING_BYTES: u64 = 64 << 20;

/// Elements of one metadata array. Vocabularies have up to 300k tokens and 600k merges.
pub const MAX_ARRAY_ELEMENTS: u64 = 1 << 24;

/// Levels of arrays within arrays: the parser recurses once per level. ggml itself accepts a single
/// level.
pub const MAX_ARRAY_DEPTH: u32 = 4;

/// Dimensions of a tensor: `GGML_MAX_DIMS` of ggml, and the GGUF specification's "currently at most
/// 4".
pub const MAX_DIMS: u32 = 4;

/// Bytes of a tensor name. `GGML_MAX_NAME` is 64 with the closing NUL, and ggml refuses a name of
/// 64 bytes (`ggml/src/gguf.cpp`), although the GGUF specification allows it.
pub const MAX_TENSOR_NAME_BYTES: u64 = 63;

/// Files of a split model. Each is opened and read before the model is usable; published splits
/// stay under 200.
pub const MAX_SPLIT_FILES: u64 = 1024;

/// `general.alignment` in bytes. Published files use 32; nothing that a packed file is aligned for
/// (sectors, huge pages, device memory granules) is larger. A writer allocates up to this much
/// padding.
pub const MAX_ALIGNMENT: u64 = 64 << 20;
