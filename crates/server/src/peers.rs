//! Who asks, and how many connections each peer has.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{ConnectInfo, Request};
use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};

/// Who asks: what there is for requests is shared between peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Peer {
    /// Whoever has that address.
    Address(IpAddr),
    /// Whoever has the key with that digest, from wherever.
    Key([u8; 32]),
}

impl Peer {
    /// Whose request that is. `has_keys`: requests need a key, which was looked at.
    pub(crate) fn of(request: &Request, has_keys: bool) -> Self {
        if has_keys && let Some(key) = key(request.headers()) {
            return Self::Key(Sha256::digest(key).into());
        }
        let connection = request.extensions().get::<ConnectInfo<SocketAddr>>();
        Self::Address(connection.map_or(Ipv4Addr::LOCALHOST.into(), |info| peer(info.0.ip())))
    }
}

/// The key that a request gives.
pub(crate) fn key(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = bearer.and_then(|value| value.strip_prefix("Bearer "));
    bearer.or_else(|| headers.get("x-api-key")?.to_str().ok())
}

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

    #[test]
    fn a_peer_is_an_address_or_a_key() {
        let of = |address: &str, key: Option<(&str, &str)>, has_keys| {
            let mut request = Request::new(axum::body::Body::empty());
            let address = SocketAddr::new(address.parse().expect("an address"), 1);
            request.extensions_mut().insert(ConnectInfo(address));
            if let Some((name, value)) = key {
                let name = header::HeaderName::try_from(name).expect("a name");
                request.headers_mut().insert(name, value.parse().expect("a value"));
            }
            Peer::of(&request, has_keys)
        };
        assert_eq!(of("2001:db8::1", None, false), of("2001:db8::2:1", None, false));
        assert_ne!(of("10.0.0.1", None, false), of("10.0.0.2", None, false));
        let [bearer, other] = ["Bearer a", "Bearer b"].map(|value| Some(("authorization", value)));
        assert_eq!(of("10.0.0.1", bearer, true), of("::1", Some(("x-api-key", "a")), true));
        assert_ne!(of("10.0.0.1", bearer, true), of("10.0.0.1", other, true));
        // What nobody has looked at says nothing.
        assert_eq!(of("10.0.0.1", bearer, false), of("10.0.0.1", other, false));
    }
}
