//! When a request that failed is made again.

use std::time::Duration;

use crate::error::Error;
use crate::limits;

/// Why a request failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It may go better another time.
    Passing { error: Error, retry_after: Option<Duration> },
    /// It would fail again.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Final(error)
    }
}

/// The longest wait that is not the server's wish.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// Counts failures since something has come.
#[derive(Debug)]
pub(crate) struct Tries {
    max: u32,
    first_wait: Duration,
    failed: u32,
}

impl Tries {
    pub(crate) fn new(max: u32, first_wait: Duration) -> Self {
        Self { max, first_wait, failed: 0 }
    }

    /// Something has come.
    pub(crate) fn reset(&mut self) {
        self.failed = 0;
    }

    /// The time to wait before the next try, and why; the error if there is none.
    pub(crate) fn next(&mut self, failure: Failure) -> Result<(Duration, Error), Error> {
        let (error, retry_after) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing { error, retry_after } => (error, retry_after),
        };
        self.failed += 1;
        if self.failed >= self.max {
            return Err(error);
        }
        let doubled = self.first_wait.saturating_mul(1 << (self.failed - 1).min(16)).min(WAIT_MAX);
        let asked =
            retry_after.map(|time| time.min(Duration::from_secs(limits::MAX_RETRY_AFTER_S)));
        Ok((asked.unwrap_or(doubled), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passing(after: Option<u64>) -> Failure {
        let error = Error::Cancelled;
        Failure::Passing { error, retry_after: after.map(Duration::from_secs) }
    }

    #[test]
    fn waits_double_and_end() {
        let mut tries = Tries::new(4, Duration::from_secs(1));
        let wait =
            |tries: &mut Tries, after| tries.next(passing(after)).ok().map(|w| w.0.as_secs());
        assert_eq!(wait(&mut tries, None), Some(1));
        assert_eq!(wait(&mut tries, None), Some(2));
        tries.reset();
        assert_eq!(wait(&mut tries, None), Some(1));
        assert_eq!(wait(&mut tries, Some(7)), Some(7));
        assert_eq!(wait(&mut tries, Some(u64::MAX)), Some(limits::MAX_RETRY_AFTER_S));
        assert_eq!(wait(&mut tries, None), None);
        assert!(tries.next(Failure::Final(Error::Cancelled)).is_err());
    }
}
