//! The columns of a trace file, and the key of its header.

use std::sync::{Arc, LazyLock};

use parquet::schema::parser::parse_message_type;
use parquet::schema::types::TypePtr;

/// Key of the header (JSON) in the file's key-value metadata.
pub(super) const HEADER_KEY: &str = "tierstream.trace";

/// The version that is written, and the only one that is read.
pub(super) const VERSION: u32 = 1;

/// One row for each token and MoE layer.
const MESSAGE: &str = "
message trace {
  REQUIRED INT32 prompt (UINT_32);
  REQUIRED BYTE_ARRAY domain (UTF8);
  REQUIRED BYTE_ARRAY phase (UTF8);
  REQUIRED INT32 batch (UINT_32);
  REQUIRED INT32 position (UINT_32);
  OPTIONAL INT32 token (UINT_32);
  REQUIRED INT32 layer (UINT_32);
  REQUIRED group experts (LIST) {
    REPEATED group list {
      REQUIRED INT32 element (UINT_16);
    }
  }
  OPTIONAL group weights (LIST) {
    REPEATED group list {
      REQUIRED FLOAT element;
    }
  }
}";

pub(super) static SCHEMA: LazyLock<TypePtr> =
    LazyLock::new(|| Arc::new(parse_message_type(MESSAGE).expect("the message is a schema")));

/// The leaf columns, in order: path, and definition level of a value that is there.
pub(super) const COLUMNS: [(&str, i16); 9] = [
    ("prompt", 0),
    ("domain", 0),
    ("phase", 0),
    ("batch", 0),
    ("position", 0),
    ("token", 1),
    ("layer", 0),
    ("experts.list.element", 1),
    ("weights.list.element", 2),
];

/// Where the header stands in the file, with the version before all else.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Head {
    pub(super) version: u32,
    #[serde(flatten)]
    pub(super) header: crate::Header,
}
