//! The ring that a model's files are read to.

use tierstream_gguf::Experts;
use tierstream_io::{Config, PAGE};

/// Bytes of the ring.
pub(crate) const RING_BYTES: usize = 16 << 20;

/// The largest buffers that the ring is made of, bytes.
const BUFFER_MAX_BYTES: usize = 16 << 20;

/// As many records as the ring holds when it is made for them.
const RECORDS: usize = 4;

/// Makes the ring of `io` of buffers that hold a record, so that a miss is one read: of a packed model whose
/// records go to a GPU through it. Records larger than [`BUFFER_MAX_BYTES`] come in several reads.
pub(crate) fn hold_records(io: &mut Config, file: &tierstream_gguf::Model, experts: &Experts) {
    if file.originals().is_none() {
        return;
    }
    let streamed = experts.layers().iter().filter(|layer| layer.is_streamed());
    let strides = streamed.flat_map(|layer| &layer.parts).map(|part| part.stride);
    let record = strides.max().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0);
    let buffer = record.next_multiple_of(PAGE);
    if (io.buffer_bytes + 1..=BUFFER_MAX_BYTES).contains(&buffer) {
        io.buffer_bytes = buffer;
        io.ring_bytes = io.ring_bytes.max(RECORDS * buffer);
    }
}
