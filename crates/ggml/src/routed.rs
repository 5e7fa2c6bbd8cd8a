//! The routing of one batch in one layer, read back to the host and sorted by expert.

use crate::abi::*;
use crate::error::Error;
use crate::plan::Routing;
use crate::recorder::Noted;
use crate::replay::Replay;
use crate::residency::{Need, Placed};

/// The routing of one batch in one layer, on the host.
#[derive(Default)]
pub(crate) struct Routed {
    /// Expert of each pair, `n_used` a token; pair = token * n_used + rank.
    experts: Vec<u32>,
    /// What the matmul gets instead: slot - low.
    pub(crate) slots: Vec<i32>,
    pub(crate) n_used: usize,
    pub(crate) n_tokens: usize,
    needs: Vec<Need>,
    /// Pairs in the order of their experts.
    by_expert: Vec<u32>,
    /// Where an expert's pairs begin in `by_expert`; one more than experts.
    starts: Vec<u32>,
    raw: Vec<u8>,
}

impl Routed {
    /// Reads the ids of a routing, which the backend has computed.
    pub(crate) fn read(&mut self, routing: &Routing, n_experts: u32) -> Result<(), String> {
        // SAFETY: a live, allocated tensor of the graph.
        let ids = unsafe { &*routing.ids };
        (self.n_used, self.n_tokens) = read_ids(ids, n_experts, &mut self.raw, &mut self.experts)?;
        self.index(n_experts);
        Ok(())
    }

    /// The same with the bytes of the ids, which somebody has read.
    pub(crate) fn take(
        &mut self,
        routing: &Routing,
        bytes: &[u8],
        n_experts: u32,
    ) -> Result<(), String> {
        // SAFETY: a live tensor of the graph.
        let ids = unsafe { &*routing.ids };
        (self.n_used, self.n_tokens) = sort_out_ids(ids, n_experts, bytes, &mut self.experts)?;
        self.index(n_experts);
        Ok(())
    }

    /// The routing of a single token.
    pub(crate) fn take_token(&mut self, ids: &[i32], n_experts: u32) -> Result<(), String> {
        (self.n_used, self.n_tokens) = (ids.len(), 1);
        self.experts.clear();
        for &id in ids {
            self.experts.push(checked(id, n_experts)?);
        }
        self.index(n_experts);
        Ok(())
    }

    /// Takes what is recorded of token `token` of a replay, if this is the routing of a single one.
    pub(crate) fn replay(
        &mut self,
        replay: &Replay,
        token: usize,
        layer: usize,
        n_experts: u32,
    ) -> Result<(), Error> {
        if self.n_tokens == 1 {
            let experts = replay.experts(token, layer, (self.n_used, n_experts))?;
            self.experts.clear();
            self.experts.extend_from_slice(experts);
            self.index(n_experts);
        }
        Ok(())
    }

    /// For who records routing; `weights` as the ids are.
    pub(crate) fn noted(&self, layer: usize, weights: Option<Vec<f32>>) -> Noted {
        Noted {
            layer,
            used: self.n_used,
            tokens: self.n_tokens,
            experts: self.experts.clone(),
            weights: weights.unwrap_or_default(),
        }
    }

    /// Sorts the pairs by expert (counting sort) and lists the distinct experts.
    fn index(&mut self, n_experts: u32) {
        self.starts.clear();
        self.starts.resize(n_experts as usize + 1, 0);
        for &e in &self.experts {
            self.starts[e as usize + 1] += 1;
        }
        self.needs.clear();
        for e in 0..n_experts as usize {
            if self.starts[e + 1] > 0 {
                self.needs
                    .push(Need { expert: u32::try_from(e).expect("below n_experts"), last_row: 0 });
            }
            self.starts[e + 1] += self.starts[e];
        }
        self.by_expert.clear();
        self.by_expert.resize(self.experts.len(), 0);
        let mut next = self.starts.clone();
        for (pair, &e) in (0u32..).zip(&self.experts) {
            self.by_expert[next[e as usize] as usize] = pair;
            next[e as usize] += 1;
        }
        let n_used = u32::try_from(self.n_used.max(1)).expect("top-k is small");
        for need in &mut self.needs {
            let end = self.starts[need.expert as usize + 1] as usize;
            need.last_row = self.by_expert[end - 1] / n_used;
        }
    }

    pub(crate) fn pairs(&self) -> usize {
        self.experts.len()
    }

    /// Distinct experts, with the last token that needs each.
    pub(crate) fn needs(&self) -> &[Need] {
        &self.needs
    }

    /// Pairs that are routed to `expert`, ascending.
    pub(crate) fn rows_of(&self, expert: u32) -> &[u32] {
        let e = expert as usize;
        &self.by_expert[self.starts[e] as usize..self.starts[e + 1] as usize]
    }

    /// Fills `slots` for all pairs. Every routed expert must be in `placed`.
    pub(crate) fn map(&mut self, placed: &[Placed], low: u32) {
        self.slots.clear();
        self.slots.resize(self.experts.len(), 0);
        for p in placed {
            let slot = i32::try_from(p.slot - low).expect("slots fit ggml's ids");
            let e = p.expert as usize;
            for at in self.starts[e]..self.starts[e + 1] {
                self.slots[self.by_expert[at as usize] as usize] = slot;
            }
        }
    }
}

/// The lowest and the highest slot of `placed`.
pub(crate) fn slot_range(placed: &[Placed]) -> (u32, u32) {
    let slots = placed.iter().map(|p| p.slot);
    (slots.clone().min().unwrap_or(0), slots.max().unwrap_or(0))
}

/// Reads the ids of a computed tensor into `experts`, token by token. Returns how many there are of
/// each token, and the tokens.
pub(crate) fn read_ids(
    ids: &ggml_tensor,
    n_experts: u32,
    raw: &mut Vec<u8>,
    experts: &mut Vec<u32>,
) -> Result<(usize, usize), String> {
    // SAFETY: a live, allocated tensor; the bytes of a view span its strides.
    unsafe {
        raw.resize(ggml_nbytes(ids), 0);
        ggml_backend_tensor_get(ids, raw.as_mut_ptr().cast(), 0, raw.len());
    }
    sort_out_ids(ids, n_experts, raw, experts)
}

/// The same with the tensor's bytes.
pub(crate) fn sort_out_ids(
    ids: &ggml_tensor,
    n_experts: u32,
    bytes: &[u8],
    experts: &mut Vec<u32>,
) -> Result<(usize, usize), String> {
    if ids.type_ != GGML_TYPE_I32 || ids.ne[2] != 1 || ids.ne[3] != 1 {
        return Err("the selected experts are no I32 matrix".into());
    }
    let size = |n: i64| usize::try_from(n).unwrap_or(0);
    let (n_used, n_tokens) = (size(ids.ne[0]), size(ids.ne[1]));
    experts.clear();
    for token in 0..n_tokens {
        for rank in 0..n_used {
            let at = token * ids.nb[1] + rank * ids.nb[0];
            let id = i32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
            experts.push(checked(id, n_experts)?);
        }
    }
    Ok((n_used, n_tokens))
}

/// An id that is an expert's.
fn checked(id: i32, n_experts: u32) -> Result<u32, String> {
    let expert = u32::try_from(id).ok().filter(|&expert| expert < n_experts);
    expert.ok_or_else(|| format!("expert {id} selected of {n_experts}"))
}
