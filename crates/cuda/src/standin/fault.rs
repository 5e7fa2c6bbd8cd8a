//! Faults by rule.

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// Device memory is taken, by [`allocate`](crate::Device::allocate) or
    /// [`map`](crate::Region::map): there is none.
    OutOfMemory,
    /// Memory that was taken is mapped: refused.
    MapRefused,
    /// Host memory is pinned or registered: refused.
    PinRefused,
    /// A copy is queued: refused. Nothing is queued, and the next one works.
    CopyRefused,
    /// A queued copy runs: it fails, and the device is lost.
    CopyLost,
    /// An event comes, but is seen only with the query after so many.
    LateEvent {
        /// Queries that are answered with "not yet".
        queries: u32,
    },
    /// A capture is begun: refused. Nothing of it runs or is queued, and the next one works.
    CaptureRefused,
    /// A graph is launched: refused. Nothing is queued, and the next launch works.
    LaunchRefused,
}

#[derive(Debug, Default)]
pub(crate) struct Faults {
    rules: Vec<(Fault, u64)>,
}

impl Faults {
    pub(crate) fn add(&mut self, fault: Fault, after: u64) {
        self.rules.push((fault, after));
    }

    pub(crate) fn clear(&mut self) {
        self.rules.clear();
    }

    /// For an operation that the faults that are `of` it are counted by: the one that is due.
    pub(crate) fn next(&mut self, of: impl Fn(Fault) -> bool) -> Option<Fault> {
        let mut due = None;
        self.rules.retain_mut(|(fault, after)| {
            if !of(*fault) {
                return true;
            }
            let now = *after == 0;
            if now {
                due = Some(*fault);
            }
            *after = after.saturating_sub(1);
            !now
        });
        due
    }

    /// Whether this fault is due for an operation of its kind.
    pub(crate) fn strikes(&mut self, fault: Fault) -> bool {
        self.next(|rule| rule == fault).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_strikes_once_and_when_it_is_due() {
        let mut faults = Faults::default();
        faults.add(Fault::OutOfMemory, 2);
        faults.add(Fault::CopyLost, 0);
        let strikes: Vec<bool> = (0..5).map(|_| faults.strikes(Fault::OutOfMemory)).collect();
        assert_eq!(strikes, [false, false, true, false, false]);
        assert!(faults.strikes(Fault::CopyLost));
        assert!(!faults.strikes(Fault::CopyLost));
    }
}
