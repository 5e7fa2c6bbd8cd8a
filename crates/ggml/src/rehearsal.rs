//! What running a model takes, told by its header: llama.cpp makes the model and a context, but
//! neither loads weights nor allocates what they are computed with.

use std::sync::Arc;

use tierstream_io::Reader;

use crate::context::{Context, ContextOptions};
use crate::error::Result;
use crate::model::Model;

/// A model with one context, neither of which can compute. What they take of this process's memory
/// (the vocabulary, the graphs' books), those of a run take too; [`Rehearsal::rest_bytes`] is what
/// a run takes beyond them.
#[derive(Debug)]
pub struct Rehearsal {
    context: Context,
    dense_bytes: u64,
}

impl Rehearsal {
    /// Rehearses `file`, whose header is already read and checked. `reader` would serve the
    /// experts. Layers that turn out not to stream once a model is loaded are taken to stream.
    ///
    /// # Errors
    /// As [`Model::load`] and [`Context::new`].
    pub fn new(
        file: &tierstream_gguf::Model,
        reader: &Arc<Reader>,
        options: &ContextOptions,
    ) -> Result<Rehearsal> {
        let model = Model::load_header(file, reader)?;
        let weights: u64 = file.tensors().iter().map(|t| t.len).sum();
        let dense_bytes = weights - model.expert_bytes();
        Ok(Rehearsal { context: Context::new(model, options)?, dense_bytes })
    }

    /// What a run has beyond the rehearsal and without the expert pool, bytes: dense weights, KV
    /// cache, and what it computes with.
    pub fn rest_bytes(&self) -> u64 {
        self.dense_bytes + self.context.state_bytes() + self.context.compute_bytes()
    }

    /// As [`Context::state_bytes`].
    pub fn state_bytes(&self) -> u64 {
        self.context.state_bytes()
    }

    /// The model, of which there is only the header. It cannot be computed with.
    pub fn model(&self) -> &Model {
        self.context.model()
    }
}
