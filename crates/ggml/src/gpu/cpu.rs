//! The processor's part of a layer: the chain of the graph, copied for some of the experts, over their
//! records in host memory.

use std::collections::HashMap;
use std::ptr;

use crate::abi::*;
use crate::chain::{Chain, Link, Outside};
use crate::error::{Error, Result};
use crate::memory::{Memory, to_ne, usize_of};
use crate::placement;
use crate::residency::Placed;
use crate::routed::Routed;
use crate::segment::{Run, compute_on, done};

/// Experts are multiplied with in one call if their slots lie no further apart than this:
/// ggml-cpu keeps books for every matrix of a call's weights, needed or not.
const WINDOW_SLOTS: u32 = 256;

/// Nodes that a graph has room for; more are computed in several.
const GRAPH_NODES: usize = 512;

/// Where tensors of a copy begin, bytes.
const ALIGNMENT: usize = 64;

/// Computes rows of chains with ggml's CPU backend.
pub(super) struct OnCpu {
    backend: ggml_backend_t,
    buffer_type: ggml_backend_buffer_type_t,
    /// The header of its graph.
    context: *mut ggml_context,
    /// What the copies compute.
    memory: Option<Memory>,
    /// The chain's inputs, as they were fetched last.
    inputs: Option<Memory>,
    fetched: HashMap<*mut ggml_tensor, Box<ggml_tensor>>,
    /// Weights that chains read beside experts, by address on the GPU and bytes.
    constants: HashMap<(usize, usize), Memory>,
    // Boxed: they point to each other.
    #[allow(clippy::vec_box, reason = "graphs hold their addresses")]
    tensors: Vec<Box<ggml_tensor>>,
    /// What was computed of the layer: a row for each expert of the token.
    rows: Vec<f32>,
}

/// A row to compute: which, of which expert, and the slot that its record is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Row {
    rank: usize,
    expert: u32,
    slot: u32,
}

/// Memory that is given out from its beginning on.
struct Room {
    at: *mut u8,
    left: usize,
}

impl Room {
    fn of(memory: &Memory) -> Self {
        let base = memory.base();
        let skipped = base.align_offset(ALIGNMENT);
        Self { at: base.wrapping_add(skipped), left: memory.bytes() - skipped }
    }

    fn take(&mut self, bytes: usize) -> *mut u8 {
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        assert!(bytes <= self.left, "the room was counted before");
        let at = self.at;
        (self.at, self.left) = (at.wrapping_add(bytes), self.left - bytes);
        at
    }
}

impl OnCpu {
    /// With so many threads, those of `threadpool` if there is one. It outlives this.
    pub(super) fn new(threads: i32, threadpool: ggml_threadpool_t) -> Result<Self> {
        let device = placement::cpu()?;
        let graph_bytes = {
            // SAFETY: a pure function.
            unsafe { ggml_graph_overhead_custom(GRAPH_NODES, false) }
        };
        let params = ggml_init_params {
            mem_size: graph_bytes + 1024,
            mem_buffer: ptr::null_mut(),
            no_alloc: true,
        };
        // SAFETY: the CPU device, which lives for ever, has backends of the kind that these functions
        // are for; both are null or ours.
        unsafe {
            let backend: ggml_backend_t = ggml_backend_dev_init(device.cast(), ptr::null()).cast();
            let context = ggml_init(params);
            if backend.is_null() || context.is_null() {
                return Err(Error::Backend("ggml's CPU backend does not start".into()));
            }
            ggml_backend_cpu_set_n_threads(backend.cast(), threads);
            if !threadpool.is_null() {
                ggml_backend_cpu_set_threadpool(backend.cast(), threadpool);
            }
            Ok(Self {
                backend,
                buffer_type: ggml_backend_get_default_buffer_type(backend.cast()).cast(),
                context,
                memory: None,
                inputs: None,
                fetched: HashMap::new(),
                constants: HashMap::new(),
                tensors: Vec::new(),
                rows: Vec::new(),
            })
        }
    }

    /// Reads what `chain` starts from. Everything before the chain has been waited for, and nothing
    /// of it is computed yet: its outputs may take the place of its inputs.
    pub(super) fn fetch(&mut self, chain: &Chain) -> Result<()> {
        self.fetched.clear();
        let inputs = chain.inputs();
        // SAFETY: live tensors of the graph.
        let bytes = |&t: &*mut ggml_tensor| unsafe { ggml_nbytes(t) }.next_multiple_of(ALIGNMENT);
        let needed = inputs.iter().map(bytes).sum::<usize>();
        let memory = grown(&mut self.inputs, needed, self.buffer_type)?;
        let mut room = Room::of(memory);
        for input in inputs {
            // SAFETY: a live, allocated tensor; a view's bytes span its strides.
            let host = unsafe {
                let mut host = Box::new(*input);
                let bytes = ggml_nbytes(input);
                let to = room.take(bytes);
                ggml_backend_tensor_get(input, to.cast(), 0, bytes);
                host.as_leaf(memory.buffer(), to);
                host
            };
            self.fetched.insert(input, host);
        }
        // SAFETY: as above.
        let width = unsafe { usize_of((*chain.output()).ne[0]) };
        self.rows.clear();
        self.rows.resize(width * chain.used, 0.0);
        Ok(())
    }

    /// Computes the rows of `placed`, whose records are in slots of the pool that `window` gives
    /// tensors of, by part and slots.
    pub(super) fn compute(
        &mut self,
        chain: &Chain,
        placed: &[Placed],
        routed: &Routed,
        window: impl Fn(usize, (u32, u32)) -> ggml_tensor,
    ) -> Run {
        let mut rows = Vec::with_capacity(chain.used);
        for p in placed {
            let ranks = routed.rows_of(p.expert).iter();
            rows.extend(ranks.map(|&rank| Row {
                rank: rank as usize,
                expert: p.expert,
                slot: p.slot,
            }));
        }
        rows.sort_unstable_by_key(|row| (row.slot, row.rank));
        let near: Vec<&[Row]> = windows(&rows).collect();
        let at_once = (GRAPH_NODES / chain.links.len().max(1)).max(1);
        near.chunks(at_once).try_for_each(|groups| self.compute_groups(chain, groups, &window))
    }

    /// What was computed since the last [`OnCpu::fetch`]: rows of ranks `first..=last`.
    pub(super) fn rows(&self, chain: &Chain, first: usize, last: usize) -> &[f32] {
        let width = self.rows.len() / chain.used;
        &self.rows[first * width..(last + 1) * width]
    }

    fn compute_groups(
        &mut self,
        chain: &Chain,
        groups: &[&[Row]],
        window: impl Fn(usize, (u32, u32)) -> ggml_tensor,
    ) -> Run {
        for link in &chain.links {
            self.keep_constants(chain, link)?;
        }
        let needed = groups.iter().map(|group| self.bytes_of(chain, group.len())).sum();
        grown(&mut self.memory, needed, self.buffer_type)?;
        let mut room = Room::of(self.memory.as_ref().expect("just made"));
        self.tensors.clear();
        // SAFETY: a fresh graph in our own context, with room for these nodes; the copies live until
        // the next call, and what they read too.
        unsafe {
            ggml_reset(self.context);
            let graph: *mut ggml_cgraph =
                ggml_new_graph_custom(self.context, GRAPH_NODES, false).cast();
            let mut outputs = Vec::with_capacity(groups.len());
            for group in groups {
                let copies = self.copy(chain, group, &window, &mut room);
                outputs.push(copies.last().copied().unwrap_or(ptr::null_mut()));
                for node in copies {
                    (*graph).nodes.add((*graph).n_nodes as usize).write(node);
                    (*graph).n_nodes += 1;
                }
            }
            done(compute_on(self.backend, &mut *graph))?;
            let width = self.rows.len() / chain.used;
            for (group, output) in groups.iter().zip(outputs) {
                let rows = std::slice::from_raw_parts((*output).data.cast(), width * group.len());
                for (row, computed) in group.iter().zip(rows.chunks_exact(width)) {
                    self.rows[row.rank * width..][..width].copy_from_slice(computed);
                }
            }
        }
        Ok(())
    }

    /// Bytes that a copy for so many rows takes, at most.
    fn bytes_of(&self, chain: &Chain, rows: usize) -> usize {
        let bytes = |link: &Link| {
            // SAFETY: a live node of the graph, and its sources.
            unsafe {
                let t = &*link.tensor;
                let own = match (t.view_src.is_null(), link.by_expert) {
                    (false, _) => 0,
                    (true, true) => t.nb[1] * rows,
                    (true, false) => ggml_nbytes(t),
                };
                // Rows of inputs may have to be gathered.
                let fetched = t.src.iter().filter_map(|source| self.fetched.get(source));
                let gathered = fetched.map(|s| (s.nb[1] * rows).next_multiple_of(ALIGNMENT));
                own.next_multiple_of(ALIGNMENT) + gathered.sum::<usize>()
            }
        };
        let ids = 2 * (rows * size_of::<i32>()).next_multiple_of(ALIGNMENT);
        chain.links.iter().map(bytes).sum::<usize>() + ids
    }

    /// Copies the chain for the rows of `group`. Returns its nodes in the order of computing.
    ///
    /// # Safety
    /// The inputs were fetched, the constants are kept, and the room suffices.
    unsafe fn copy(
        &mut self,
        chain: &Chain,
        group: &[Row],
        window: impl Fn(usize, (u32, u32)) -> ggml_tensor,
        room: &mut Room,
    ) -> Vec<*mut ggml_tensor> {
        let buffer = self.memory.as_ref().expect("made for this copy").buffer();
        let (low, high) = (group[0].slot, group[group.len() - 1].slot);
        let numbers = |of: &dyn Fn(&Row) -> u32, room: &mut Room| {
            let at = room.take(group.len() * size_of::<i32>()).cast::<i32>();
            for (index, row) in group.iter().enumerate() {
                let number = i32::try_from(of(row)).expect("slots and experts fit ggml's ids");
                // SAFETY: within the room just taken, which is aligned.
                unsafe { at.add(index).write(number) };
            }
            let shape = [to_ne(group.len()), 1, 1];
            Box::new(crate::memory::tensor(buffer, GGML_TYPE_I32, shape, at.cast()))
        };
        let slots = numbers(&|row| row.slot - low, room);
        let experts = numbers(&|row| row.expert, room);
        let (slots, experts) = (self.keep(slots), self.keep(experts));
        let mut copies: HashMap<*mut ggml_tensor, *mut ggml_tensor> = HashMap::new();
        let mut order = Vec::with_capacity(chain.links.len());
        for link in &chain.links {
            // SAFETY: a live node of the graph.
            let original = unsafe { &*link.tensor };
            let mut copy = Box::new(*original);
            copy.buffer = buffer.cast();
            copy.extra = ptr::null_mut();
            if link.by_expert {
                copy.ne[1] = to_ne(group.len());
                copy.nb[2] = copy.nb[1] * group.len();
                copy.nb[3] = copy.nb[2];
            }
            for (index, source) in original.src.iter().enumerate().filter(|(_, s)| !s.is_null()) {
                copy.src[index] = match copies.get(source) {
                    Some(&theirs) => theirs,
                    None if *source == chain.ids && link.part.is_some() => slots,
                    None if *source == chain.ids => experts,
                    None => match (link.part, index) {
                        (Some(part), 0) => self.keep(Box::new(window(part, (low, high)))),
                        _ => self.outside(chain, link, *source, group, room),
                    },
                };
            }
            if original.view_src.is_null() {
                // SAFETY: the copy has the shape and strides of a tensor.
                copy.data = room.take(unsafe { ggml_nbytes(&raw const *copy) }).cast();
            } else {
                let of = match copies.get(&original.view_src) {
                    Some(&theirs) => theirs,
                    None => self.outside(chain, link, original.view_src, group, room),
                };
                copy.view_src = of;
                // SAFETY: a live copy, of this call.
                copy.data = unsafe { (*of).data.wrapping_byte_add(copy.view_offs) };
            }
            let copy = self.keep(copy);
            copies.insert(link.tensor, copy);
            order.push(copy);
        }
        order
    }

    /// A source that no link computes, in host memory; with the group's rows only, if it has one for
    /// each expert.
    fn outside(
        &mut self,
        chain: &Chain,
        link: &Link,
        source: *mut ggml_tensor,
        group: &[Row],
        room: &mut Room,
    ) -> *mut ggml_tensor {
        if chain.outside(link, source) == Some(Outside::Constant) {
            // SAFETY: a live tensor of the model.
            let mut host = Box::new(unsafe { *source });
            let memory = &self.constants[&key(&host)];
            host.as_leaf(memory.buffer(), memory.base());
            return self.keep(host);
        }
        let mut host = self.fetched[&source].clone();
        if link.by_expert && chain.used > 1 && usize_of(host.ne[1]) == chain.used {
            let (from, bytes) = (host.data.cast::<u8>(), host.nb[1]);
            let to = room.take(bytes * group.len());
            for (index, row) in group.iter().enumerate() {
                // SAFETY: rows of a fetched tensor, which has one for each rank, and of the room.
                unsafe {
                    ptr::copy_nonoverlapping(
                        from.add(row.rank * bytes),
                        to.add(index * bytes),
                        bytes,
                    )
                };
            }
            host.data = to.cast();
            host.ne[1] = to_ne(group.len());
            host.nb[2] = bytes * group.len();
            host.nb[3] = host.nb[2];
        }
        self.keep(host)
    }

    fn keep(&mut self, tensor: Box<ggml_tensor>) -> *mut ggml_tensor {
        self.tensors.push(tensor);
        self.tensors.last_mut().map_or(ptr::null_mut(), |tensor| &raw mut **tensor)
    }

    /// Makes sure that the weights that a link reads beside experts are in host memory, where they
    /// stay: biases and scales, some 100 MiB for the largest models.
    fn keep_constants(&mut self, chain: &Chain, link: &Link) -> Result<()> {
        // SAFETY: a live node of the graph, and its sources.
        let t = unsafe { &*link.tensor };
        for &source in t.src.iter().chain([&t.view_src]).filter(|source| !source.is_null()) {
            if chain.outside(link, source) != Some(Outside::Constant) {
                continue;
            }
            // SAFETY: a live weight, which is in memory.
            unsafe {
                let key = key(&*source);
                if !self.constants.contains_key(&key) {
                    let memory = Memory::scratch(self.buffer_type, key.1)?;
                    ggml_backend_tensor_get(source, memory.base().cast(), 0, key.1);
                    self.constants.insert(key, memory);
                }
            }
        }
        Ok(())
    }
}

impl Drop for OnCpu {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; it computes only while it is called.
        unsafe {
            ggml_free(self.context);
            ggml_backend_free(self.backend.cast());
        }
    }
}

/// A copy of a tensor of the graph that is computed already.
trait AsLeaf {
    fn as_leaf(&mut self, buffer: ggml_backend_buffer_t, data: *mut u8);
}

impl AsLeaf for ggml_tensor {
    fn as_leaf(&mut self, buffer: ggml_backend_buffer_t, data: *mut u8) {
        self.op = GGML_OP_NONE;
        self.src = [ptr::null_mut(); 10];
        (self.view_src, self.view_offs) = (ptr::null_mut(), 0);
        self.extra = ptr::null_mut();
        self.buffer = buffer.cast();
        self.data = data.cast();
    }
}

/// What a constant is known by.
fn key(constant: &ggml_tensor) -> (usize, usize) {
    // SAFETY: a tensor has a shape.
    (constant.data.addr(), unsafe { ggml_nbytes(constant) })
}

/// Cuts rows, sorted by slot, where slots lie too far apart for one call.
fn windows(rows: &[Row]) -> impl Iterator<Item = &[Row]> {
    let mut rest = rows;
    std::iter::from_fn(move || {
        let low = rest.first()?.slot;
        let near = rest.partition_point(|row| row.slot - low < WINDOW_SLOTS);
        let (group, behind) = rest.split_at(near);
        rest = behind;
        Some(group)
    })
}

/// `memory` with at least `bytes`, aligned, in it.
fn grown(
    memory: &mut Option<Memory>,
    bytes: usize,
    buffer_type: ggml_backend_buffer_type_t,
) -> Result<&Memory> {
    let needed = bytes + ALIGNMENT;
    if memory.as_ref().is_none_or(|m| m.bytes() < needed) {
        *memory = None; // give the old one back first
        *memory = Some(Memory::scratch(buffer_type, needed)?);
    }
    Ok(memory.as_ref().expect("just made"))
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::chain::tests::{EXPERTS, Layer, SELECTED, WAYS};
    use crate::plan::nodes;

    /// Rows that are computed for some of the experts are those of the whole graph.
    #[test]
    fn rows_are_those_of_the_graph() {
        for (way, build) in WAYS {
            let mut layer = Layer::new();
            build(&layer);
            layer.compute();
            let chain = layer.chain().unwrap();
            let expected = |rank: usize| {
                // SAFETY: computed, in host memory.
                unsafe {
                    let out = &*chain.output();
                    let row = out.data.byte_add(rank * out.nb[1]).cast::<f32>();
                    std::slice::from_raw_parts(row, usize_of(out.ne[0])).to_vec()
                }
            };
            let mut routed = Routed::default();
            let experts = SELECTED.map(i32::unsigned_abs);
            routed.take_token(&SELECTED, EXPERTS as u32).unwrap();
            for (threads, missing) in [(1, &[1][..]), (2, &[3, 4]), (1, &[1, 3, 4]), (3, &[4])] {
                let mut cpu = OnCpu::new(threads, ptr::null_mut()).unwrap();
                cpu.fetch(&chain).unwrap();
                let placed: Vec<Placed> =
                    missing.iter().map(|&expert| Placed { expert, slot: expert }).collect();
                let computed = cpu.compute(&chain, &placed, &routed, |part, (low, high)| {
                    // SAFETY: a live tensor of all experts.
                    let mut window = unsafe { *layer.experts[part] };
                    window.data = window.data.wrapping_byte_add(low as usize * window.nb[2]);
                    window.ne[2] = i64::from(high - low) + 1;
                    window
                });
                assert!(computed.is_ok());
                for (rank, expert) in experts.into_iter().enumerate() {
                    let is_missing = missing.contains(&expert);
                    let row = cpu.rows(&chain, rank, rank);
                    let what = format!("{way}, rank {rank} of {missing:?}");
                    assert_eq!(row == expected(rank), is_missing, "{what}");
                    assert!(is_missing || row.iter().all(|&x| x == 0.0), "{what}");
                }
                assert_eq!(cpu.constants.len(), usize::from(["scaled", "biased"].contains(&way)));
            }
            assert!(nodes(layer.graph()).len() > chain.links.len());
        }
    }

    #[test]
    fn slots_far_apart_are_not_of_one_call() {
        let row = |slot| Row { rank: 0, expert: 0, slot };
        let rows = [3, 4, 258, 259, 515, 4000].map(row);
        let cut: Vec<Vec<u32>> =
            windows(&rows).map(|group| group.iter().map(|row| row.slot).collect()).collect();
        assert_eq!(cut, [vec![3, 4, 258], vec![259], vec![515], vec![4000]]);
        assert_eq!(windows(&[]).count(), 0);
    }
}
