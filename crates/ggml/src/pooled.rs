//! What the proxy, the planner and the executors of one model share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::residency::Residency;
use crate::weights::{PartRef, WeightTable};

/// Which tensors are experts, and the pool that holds their records.
pub(crate) struct Pooled {
    weights: Mutex<WeightTable>,
    residency: OnceLock<Arc<Residency>>,
}

impl Pooled {
    /// `names` are the expert tensors that will live in the pool.
    pub(crate) fn new(names: HashMap<String, PartRef>) -> Self {
        Self { weights: Mutex::new(WeightTable::new(names)), residency: OnceLock::new() }
    }

    pub(crate) fn weights(&self) -> &Mutex<WeightTable> {
        &self.weights
    }

    pub(crate) fn table(&self) -> MutexGuard<'_, WeightTable> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the model its pool, and says whether it had none. Before that, graphs with expert
    /// weights fail.
    #[must_use]
    pub(crate) fn attach(&self, residency: Arc<Residency>) -> bool {
        self.residency.set(residency).is_ok()
    }

    pub(crate) fn residency(&self) -> Option<&Arc<Residency>> {
        self.residency.get()
    }
}
