//! Ids of answers and of what is in them.

use crate::ask::random;

/// An id that no other has; `kind` tells what of, as `chatcmpl-` and `call_` do.
pub(crate) fn id(kind: &str) -> String {
    format!("{kind}{:016x}", random())
}
