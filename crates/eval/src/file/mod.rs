//! Traces as Parquet files; `docs/trace-format.md` has the format.

mod read;
mod schema;
mod write;

pub(crate) use read::read;
pub use write::Writer;

#[cfg(test)]
mod tests;
