//! Which experts tokens were routed to, noted by the executors as they read the ids, and told token by
//! token when the batch is computed.

use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::abi::*;
use crate::context::Entry;
use crate::error::{Error, Result};

/// The routing of tokens that were computed together: each of their experts was needed once.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchRouting {
    /// The tokens, in the order in which they were computed.
    pub tokens: Vec<TokenAt>,
    /// Every MoE layer, in the order of computing.
    pub layers: Vec<LayerRouting>,
}

/// A token, and where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenAt {
    /// The token, and its sequence.
    pub entry: Entry,
    /// Position in its sequence, from 0 on.
    pub position: u32,
}

/// The routing of a batch in one MoE layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRouting {
    used: usize,
    /// The row of each token of the batch.
    rows: Vec<Option<usize>>,
    /// `[rows, used]`
    experts: Vec<u32>,
    /// `[rows, used]`, or empty.
    weights: Vec<f32>,
}

impl LayerRouting {
    /// The experts of token `index` of the batch, in the order of the router's scores, best first, and
    /// the routing weight of each, which its output is multiplied with; no weights where the graph does
    /// not show them. None of a token for which the layer was not computed: the last layer computes only
    /// those whose logits are kept.
    pub fn of(&self, index: usize) -> Option<(&[u32], &[f32])> {
        let row = self.rows[index]?;
        let range = row * self.used..(row + 1) * self.used;
        Some((&self.experts[range.clone()], self.weights.get(range).unwrap_or_default()))
    }
}

/// What an executor has noted of one layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Noted {
    /// Index among the MoE layers.
    pub(crate) layer: usize,
    pub(crate) used: usize,
    pub(crate) tokens: usize,
    /// `[tokens, used]`
    pub(crate) experts: Vec<u32>,
    /// `[tokens, used]`, or empty.
    pub(crate) weights: Vec<f32>,
}

/// Collects the routing of a batch, if somebody has asked for it.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    is_on: AtomicBool,
    noted: Mutex<Vec<Noted>>,
}

impl Recorder {
    /// Whether anybody wants to know.
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    pub(crate) fn turn(&self, on: bool) {
        self.is_on.store(on, Ordering::Relaxed);
        self.forget();
    }

    pub(crate) fn note(&self, noted: Noted) {
        self.lock().push(noted);
    }

    pub(crate) fn forget(&self) {
        self.lock().clear();
    }

    /// What was noted of the graphs that have computed `tokens`, of which llama.cpp has made parts of at
    /// most `most` tokens.
    ///
    /// # Errors
    /// [`Error::SelfCheck`] if they cannot be those.
    pub(crate) fn take(&self, tokens: &[TokenAt], most: usize) -> Result<Vec<BatchRouting>> {
        let noted = std::mem::take(&mut *self.lock());
        let mut graphs: Vec<Vec<Noted>> = Vec::new();
        for layer in noted {
            match graphs.last_mut() {
                Some(graph) if graph.last().is_some_and(|last| last.layer < layer.layer) => {
                    graph.push(layer);
                }
                _ => graphs.push(vec![layer]),
            }
        }
        let sequences: Vec<u32> = tokens.iter().map(|token| token.entry.sequence).collect();
        let parts = ubatches(&sequences, most);
        if parts.len() != graphs.len() {
            let (found, expected) = (graphs.len(), parts.len());
            return Err(Error::SelfCheck(format!(
                "{} tokens were computed in {found} graphs, not in {expected}",
                tokens.len()
            )));
        }
        let batch = |(part, graph): (Vec<usize>, Vec<Noted>)| {
            let tokens: Vec<TokenAt> = part.iter().map(|&index| tokens[index]).collect();
            let layers =
                graph.into_iter().map(|noted| noted.layer_of(&tokens)).collect::<Result<_>>()?;
            Ok(BatchRouting { tokens, layers })
        };
        parts.into_iter().zip(graphs).map(batch).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Noted>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Noted {
    /// Finds the row of each of the tokens of a graph: all have one, or those whose logits are kept.
    fn layer_of(self, tokens: &[TokenAt]) -> Result<LayerRouting> {
        let kept = tokens.iter().filter(|token| token.entry.keep).count();
        let all = self.tokens == tokens.len();
        if !all && self.tokens != kept {
            return Err(Error::SelfCheck(format!(
                "MoE layer {} was computed for {} tokens, of a batch of {}, {kept} of them kept",
                self.layer,
                self.tokens,
                tokens.len()
            )));
        }
        let mut next = 0..;
        let rows = tokens.iter().map(|token| (all || token.entry.keep).then(|| next.next())?);
        let Self { used, experts, weights, .. } = self;
        Ok(LayerRouting { used, rows: rows.collect(), experts, weights })
    }
}

/// The parts in which llama.cpp computes a batch, as indices of its tokens. Of one sequence they are cut
/// from the batch as it is. Of several, each with cells of its own, a part has as many tokens of each of
/// its sequences, one sequence after the other, whose numbers follow each other
/// (llama-batch.cpp, `split_equal`, sequential).
fn ubatches(sequences: &[u32], most: usize) -> Vec<Vec<usize>> {
    let mut used = vec![false; sequences.len()];
    let mut parts = Vec::new();
    loop {
        // The first free token of each sequence, in the order of the batch.
        let mut members: Vec<u32> = Vec::new();
        for (&sequence, _) in sequences.iter().zip(&used).filter(|&(_, &used)| !used) {
            let follows = members.last().is_none_or(|&last| sequence == last + 1);
            if follows && !members.contains(&sequence) {
                members.push(sequence);
            }
        }
        if members.is_empty() {
            return parts;
        }
        let free = |sequence: u32| {
            let is_free = |&index: &usize| sequences[index] == sequence && !used[index];
            (0..sequences.len()).filter(is_free).collect::<Vec<_>>()
        };
        let free: Vec<Vec<usize>> = members.iter().map(|&sequence| free(sequence)).collect();
        let least = free.iter().map(Vec::len).min().unwrap_or(0);
        let each = least.min((most / members.len()).max(1));
        let part: Vec<usize> = free.iter().flat_map(|of| &of[..each]).copied().collect();
        part.iter().for_each(|&index| used[index] = true);
        parts.push(part);
    }
}

/// The weights that a layer's outputs are multiplied with (or its inputs, in some models), F32
/// `[1, used, tokens]`, if they are computed before its first expert matmul. `nodes` are those from the
/// first matmul of the layer before to that of the next one.
pub(crate) fn weights_of(
    nodes: &[*mut ggml_tensor],
    matmul: usize,
    ids: *const ggml_tensor,
) -> Option<*mut ggml_tensor> {
    // SAFETY: live nodes of a graph, and their sources.
    let tensor = |tensor: *const ggml_tensor| unsafe { &*tensor };
    let shape = [1, tensor(ids).ne[0], tensor(ids).ne[1]];
    let is_weighted = |node: &&*mut ggml_tensor| {
        // SAFETY: a tensor's name ends within it.
        let name = unsafe { CStr::from_ptr(tensor(**node).name.as_ptr()) };
        // llama-graph.cpp, `build_moe_ffn`.
        tensor(**node).op == GGML_OP_MUL && name.to_bytes().starts_with(b"ffn_moe_weighted")
    };
    // Weights of the layers before and after are computed before these nodes, or too late.
    let are_right = |&weights: &*mut ggml_tensor| {
        let t = tensor(weights);
        let holder = if t.view_src.is_null() { weights } else { t.view_src };
        // SAFETY: a live tensor.
        let is_contiguous = unsafe { ggml_is_contiguous(weights) };
        t.type_ == GGML_TYPE_F32
            && t.ne[..3] == shape
            && is_contiguous
            && nodes[..matmul].contains(&holder)
    };
    nodes.iter().filter(is_weighted).map(|&node| tensor(node).src[1]).find(are_right)
}

/// The values of a computed F32 tensor, which is contiguous.
pub(crate) fn read_floats(tensor: *mut ggml_tensor) -> Vec<f32> {
    // SAFETY: a live, allocated tensor of the graph; as many bytes are read as there is room for.
    unsafe {
        let bytes = ggml_nbytes(tensor);
        let mut values = vec![0f32; bytes / size_of::<f32>()];
        ggml_backend_tensor_get(tensor, values.as_mut_ptr().cast(), 0, bytes);
        values
    }
}

/// The same from its bytes.
pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().expect("four bytes"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(sequence: u32, position: u32, keep: bool) -> TokenAt {
        TokenAt { entry: Entry { token: 7, sequence, keep }, position }
    }

    fn noted(layer: usize, experts: &[u32]) -> Noted {
        let weights = experts.iter().map(|&expert| expert as f32).collect();
        Noted { layer, used: 2, tokens: experts.len() / 2, experts: experts.to_vec(), weights }
    }

    #[test]
    fn parts_of_one_sequence_and_of_several() {
        assert_eq!(ubatches(&[0; 5], 2), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(ubatches(&[], 2), Vec::<Vec<usize>>::new());
        // A prompt of three tokens beside two single ones: one of each, then the rest.
        assert_eq!(ubatches(&[1, 0, 0, 0, 2], 8), [vec![0, 4], vec![1, 2, 3]]);
        assert_eq!(ubatches(&[0, 0, 0, 1, 2], 8), [vec![0, 3, 4], vec![1, 2]]);
        assert_eq!(ubatches(&[0, 2], 8), [vec![0], vec![1]]);
        assert_eq!(ubatches(&[0, 0, 0, 1, 1, 1], 4), [vec![0, 1, 3, 4], vec![2, 5]]);
    }

    #[test]
    fn rows_find_their_tokens() {
        let recorder = Recorder::default();
        let tokens = [token(0, 4, false), token(0, 5, true), token(1, 0, true)];
        recorder.note(noted(0, &[1, 2, 3, 4]));
        // Nobody wants the logits of the first token.
        recorder.note(noted(3, &[5, 6]));
        recorder.note(noted(0, &[7, 8]));
        recorder.note(noted(3, &[9, 10]));
        let error = recorder.take(&tokens[..2], 8).unwrap_err();
        assert!(error.to_string().contains("2 graphs, not in 1"), "{error}");
        assert_eq!(recorder.take(&[], 8).unwrap(), [], "it is forgotten");

        recorder.note(noted(0, &[1, 2, 3, 4]));
        recorder.note(noted(3, &[3, 4]));
        recorder.note(noted(0, &[7, 8]));
        recorder.note(noted(3, &[9, 10]));
        let batches = recorder.take(&tokens, 8).unwrap();
        let first = &batches[0];
        assert_eq!(first.tokens, [tokens[0], tokens[2]], "one token of each sequence");
        assert_eq!(first.layers[0].of(1), Some((&[3, 4][..], &[3.0, 4.0][..])));
        assert_eq!(first.layers[1].of(0), None);
        assert_eq!(first.layers[1].of(1), Some((&[3, 4][..], &[3.0, 4.0][..])));
        assert_eq!(batches[1].tokens, [tokens[1]]);
        assert_eq!(batches[1].layers[1].of(0), Some((&[9, 10][..], &[9.0, 10.0][..])));

        recorder.note(Noted { weights: Vec::new(), ..noted(0, &[1, 2, 3, 4, 5, 6]) });
        let error = recorder.take(&tokens[..2], 8).unwrap_err().to_string();
        assert!(error.contains("for 3 tokens, of a batch of 2, 1 of them kept"), "{error}");
    }
}
