//! Upper bounds on everything that a store may hold, each with its reason. What is beyond one of them is
//! refused with [`Error::Limit`](crate::Error::Limit).

/// Bytes of a manifest. Those of models that are kept one blob per tensor have some 200 for each, and
/// the largest models some 50,000 tensors.
pub const MAX_MANIFEST_BYTES: u64 = 32 << 20;

/// Layers of a manifest, over all models in it.
pub const MAX_LAYERS: usize = 1 << 18;

/// Bytes of other small files: a reference of the Hugging Face cache has 40, LM Studio's settings some
/// thousands.
pub const MAX_SMALL_FILE_BYTES: u64 = 1 << 20;

/// Entries of a store that are looked at, folders and files. A store of a thousand models, with all
/// blobs of theirs, has fewer than ten thousand.
pub const MAX_ENTRIES: usize = 1 << 17;

/// Folders in folders below the root of a store: `publisher/model/quant/file` has three.
pub const MAX_DEPTH: usize = 6;

/// Bytes of a name: Ollama's longest has 350 for the host and 80 for each of the other parts.
pub const MAX_NAME_BYTES: usize = 1024;

/// Files of a split model, as for `tierstream_gguf`.
pub const MAX_SPLIT_FILES: u32 = 1024;

/// Bytes of a name that nearly the same ones are looked for.
pub(crate) const MAX_NEAR_BYTES: usize = 200;

/// Names that an error tells of.
pub(crate) const MAX_TOLD: usize = 8;

/// Models of a repository that an error tells of: it is the only place where they can be seen.
pub(crate) const MAX_TOLD_OF_REPOSITORY: usize = 40;
