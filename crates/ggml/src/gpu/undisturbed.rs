//! Who may keep a GPU waiting for the host, and who waits for the GPU.
//!
//! Calls that give a GPU's memory back, or load kernels, may wait until it has nothing to do, and keep
//! the driver's locks meanwhile: as long as the GPU waits for this process, neither would end.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, TryLockError};

static UNDISTURBED: RwLock<()> = RwLock::new(());

/// While this lives, nobody [disturbs](disturbing) a GPU. None if somebody does, or is about to.
pub(super) fn undisturbed() -> Option<RwLockReadGuard<'static, ()>> {
    match UNDISTURBED.try_read() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Makes a call that may wait until GPUs have nothing to do: not before those that wait for the host
/// have gone on, a token later.
pub(crate) fn disturbing<T>(call: impl FnOnce() -> T) -> T {
    let _alone = UNDISTURBED.write().unwrap_or_else(PoisonError::into_inner);
    call()
}
