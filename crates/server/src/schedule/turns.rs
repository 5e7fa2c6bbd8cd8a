//! A queue in which peers take turns.

use std::collections::VecDeque;

use crate::peers::Peer;

/// What waits: of a peer in the order in which it came, and of all peers in turn.
#[derive(Debug)]
pub(super) struct Turns<T> {
    /// None of them is empty. The first has its turn.
    peers: VecDeque<(Peer, VecDeque<T>)>,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self { peers: VecDeque::new() }
    }
}

impl<T> Turns<T> {
    pub(super) fn push(&mut self, peer: Peer, item: T) {
        match self.peers.iter_mut().find(|(other, _)| *other == peer) {
            Some((_, items)) => items.push_back(item),
            None => self.peers.push_back((peer, VecDeque::from([item]))),
        }
    }

    /// Takes the next one out.
    pub(super) fn pop(&mut self) -> Option<T> {
        let (peer, mut items) = self.peers.pop_front()?;
        let item = items.pop_front();
        if !items.is_empty() {
            self.peers.push_back((peer, items));
        }
        item
    }

    pub(super) fn retain(&mut self, stays: impl Fn(&T) -> bool) {
        self.peers.retain_mut(|(_, items)| {
            items.retain(&stays);
            !items.is_empty()
        });
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.peers.iter().flat_map(|(_, items)| items)
    }

    pub(super) fn len(&self) -> usize {
        self.peers.iter().map(|(_, items)| items.len()).sum()
    }

    /// What waits of one peer.
    pub(super) fn len_of(&self, peer: Peer) -> usize {
        self.peers.iter().find(|(other, _)| *other == peer).map_or(0, |(_, items)| items.len())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn peers_take_turns() {
        let peer = |n| Peer::Address(Ipv4Addr::new(10, 0, 0, n).into());
        let mut turns = Turns::default();
        for (n, item) in [(1, 10), (1, 11), (1, 12), (2, 20), (3, 30), (2, 21)] {
            turns.push(peer(n), item);
        }
        assert_eq!((turns.len(), turns.len_of(peer(1)), turns.len_of(peer(4))), (6, 3, 0));
        assert_eq!([turns.pop(), turns.pop()], [Some(10), Some(20)]);
        // Who comes later has its turn after those who wait.
        turns.push(peer(4), 40);
        turns.retain(|&item| item != 30);
        let rest: Vec<_> = std::iter::from_fn(|| turns.pop()).collect();
        assert_eq!(rest, [11, 21, 40, 12]);
        assert_eq!(turns.len(), 0);
    }
}
