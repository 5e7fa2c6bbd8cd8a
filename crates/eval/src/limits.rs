//! The most that a trace may have. What is beyond is refused before memory is taken for it.

/// MoE layers.
pub const LAYERS_MAX: usize = 4096;

/// Experts of a layer.
pub const EXPERTS_MAX: u32 = 65_535;

/// Experts that a token uses in one layer.
pub const USED_MAX: u32 = 1024;

/// Experts that a token uses in all layers together.
pub const ROW_MAX: usize = 1 << 16;

/// Tokens.
pub const TOKENS_MAX: usize = 1 << 26;

/// Expert ids of all tokens: 4 GiB of memory.
pub const IDS_MAX: usize = 1 << 31;

/// Distinct domain tags.
pub const DOMAINS_MAX: usize = 4096;

/// Bytes of a domain tag, and of a line of text.
pub const TAG_BYTES_MAX: usize = 256;

/// Bytes of a line of a text format.
pub const LINE_BYTES_MAX: usize = 8 << 20;

/// Bytes of the header of a Parquet trace.
pub const HEADER_BYTES_MAX: usize = 4 << 20;
