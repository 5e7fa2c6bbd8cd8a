//! How many connections each peer has.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Connections by the address that they come from.
#[derive(Debug)]
pub(crate) struct Peers {
    counts: Mutex<HashMap<IpAddr, usize>>,
    most: usize,
    most_local: usize,
}

/// A connection that is counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    peers: Arc<Peers>,
    peer: IpAddr,
}

impl Peers {
    /// Each has so many at most, and all of this machine together `most_local`.
    pub(crate) fn new(most: usize, most_local: usize) -> Arc<Self> {
        Arc::new(Self { counts: Mutex::default(), most, most_local })
    }

    /// Counts one more; none where there are too many.
    pub(crate) fn count(self: &Arc<Self>, address: IpAddr) -> Option<Counted> {
        let peer = peer(address);
        let most = if peer.is_loopback() { self.most_local } else { self.most };
        let mut counts = self.lock();
        let count = counts.entry(peer).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Counted { peers: self.clone(), peer })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.peers.lock();
        if let Some(count) = counts.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.peer);
            }
        }
    }
}

/// Who has an address. A machine has as many of IPv6 as it likes, with the same first half.
fn peer(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        address if address.is_loopback() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from(address.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_so_many() {
        let peers = Peers::new(2, 3);
        let count = |address: &str| peers.count(address.parse().expect("an address"));
        let first = [count("10.0.0.1"), count("::ffff:10.0.0.1")];
        assert!(first.iter().all(Option::is_some) && count("10.0.0.1").is_none());
        let second = [count("2001:db8::1"), count("2001:db8::2:1")];
        assert!(second.iter().all(Option::is_some) && count("2001:db8::3").is_none());
        let local = [count("127.0.0.1"), count("::1"), count("127.8.0.1")];
        assert!(local.iter().all(Option::is_some) && count("::1").is_none());
        assert!(count("10.0.0.2").is_some() && count("2001:db8:0:1::1").is_some());
        drop(first);
        assert!(count("10.0.0.1").is_some() && count("2001:db8::1").is_none());
        drop((second, local));
        assert!(peers.lock().is_empty());
    }
}
