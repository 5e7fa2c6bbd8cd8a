//! Which layers of a graph the proxy cannot serve. Asked while a model is loaded, so that such
//! layers become resident instead of failing the first decode.

use crate::abi::*;
use crate::error::Error;
use crate::plan::Plan;
use crate::weights::WeightTable;

/// The MoE layers for which [`Plan::new`] refuses `graph`, and why. Where two layers are in each
/// other's way, the first one stays.
pub(crate) fn refused(graph: &ggml_cgraph, table: &WeightTable) -> Vec<(usize, String)> {
    if Plan::new(graph, table).is_ok() {
        return Vec::new();
    }
    // Rather than to know the rules a second time: layers are added one by one, and those with
    // which the plan fails are left out. Only ever done for models that are loaded anew.
    let mut served = Vec::new();
    let mut refused = Vec::new();
    for layer in 0..table.layers() {
        served.push(layer);
        if let Err(error) = Plan::new(graph, &table.limited_to(&served)) {
            served.pop();
            let reason = match error {
                Error::SelfCheck(reason) => reason,
                other => other.to_string(),
            };
            refused.push((layer, reason));
        }
    }
    refused
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::ffi::CString;
    use std::ptr;

    use super::*;
    use crate::weights::PartRef;

    /// Three MoE layers of two parts, and a graph.
    struct Bench {
        context: *mut ggml_context,
        table: WeightTable,
        weights: [[*mut ggml_tensor; 2]; 3],
        graph: *mut ggml_cgraph,
    }

    impl Bench {
        fn new() -> Self {
            let params =
                ggml_init_params { mem_size: 1 << 20, mem_buffer: ptr::null_mut(), no_alloc: true };
            // SAFETY: room for all that the tests make.
            let context = unsafe { ggml_init(params) };
            let name = |layer: usize, part: usize| format!("{layer}.{part}");
            let all = (0..6).map(|i| (name(i / 2, i % 2), PartRef { layer: i / 2, part: i % 2 }));
            let mut table = WeightTable::new(all.collect::<HashMap<_, _>>());
            let weights = [0, 1, 2].map(|layer| {
                [0, 1].map(|part| {
                    let name = CString::new(name(layer, part)).unwrap();
                    // SAFETY: a live context.
                    unsafe {
                        let t = ggml_new_tensor_3d(context, GGML_TYPE_F32, 8, 8, 4);
                        ggml_set_name(t, name.as_ptr());
                        table.place(t).unwrap();
                        t
                    }
                })
            });
            // SAFETY: a live context.
            let graph = unsafe { ggml_new_graph(context) }.cast();
            Self { context, table, weights, graph }
        }

        fn ids(&self) -> *mut ggml_tensor {
            // SAFETY: a live context.
            unsafe { ggml_new_tensor_2d(self.context, GGML_TYPE_I32, 2, 3) }
        }

        fn matmuls(&self, layer: usize, parts: &[usize], ids: *mut ggml_tensor) {
            for &part in parts {
                // SAFETY: shapes that fit, a live graph.
                unsafe {
                    let input = ggml_new_tensor_3d(self.context, GGML_TYPE_F32, 8, 1, 3);
                    let out = ggml_mul_mat_id(self.context, self.weights[layer][part], input, ids);
                    ggml_build_forward_expand(self.graph.cast(), out);
                }
            }
        }

        fn refused(&self) -> Vec<usize> {
            // SAFETY: a live graph.
            let refused = refused(unsafe { &*self.graph }, &self.table);
            assert!(refused.iter().all(|(_, reason)| !reason.is_empty()));
            refused.into_iter().map(|(layer, _)| layer).collect()
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            // SAFETY: ours, freed once.
            unsafe { ggml_free(self.context) };
        }
    }

    #[test]
    fn ordinary_layers_are_served() {
        let bench = Bench::new();
        assert_eq!(bench.refused(), []);
        (0..3).for_each(|layer| bench.matmuls(layer, &[0, 1], bench.ids()));
        assert_eq!(bench.refused(), []);
    }

    #[test]
    fn layers_with_a_part_used_twice_or_not_at_all_are_refused() {
        let bench = Bench::new();
        bench.matmuls(0, &[0, 1, 1], bench.ids());
        bench.matmuls(1, &[1, 0], bench.ids());
        bench.matmuls(2, &[0], bench.ids());
        assert_eq!(bench.refused(), [0, 2]);
    }

    #[test]
    fn of_two_layers_that_share_a_routing_one_is_served() {
        let bench = Bench::new();
        let ids = bench.ids();
        bench.matmuls(0, &[0, 1], ids);
        bench.matmuls(2, &[0, 1], ids);
        bench.matmuls(1, &[0, 1], bench.ids());
        assert_eq!(bench.refused(), [2]);
    }

    #[test]
    fn layers_read_by_other_operations_are_refused() {
        let bench = Bench::new();
        bench.matmuls(0, &[0, 1], bench.ids());
        // SAFETY: shapes that fit, a live graph.
        unsafe {
            let rows = ggml_new_tensor_2d(bench.context, GGML_TYPE_I32, 2, 4);
            let out = ggml_get_rows(bench.context, bench.weights[1][0], rows);
            ggml_build_forward_expand(bench.graph.cast(), out);
        }
        assert_eq!(bench.refused(), [1]);
    }
}
