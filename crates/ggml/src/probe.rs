//! Which layers of a graph the proxy cannot serve. Asked while a model is loaded, so that such
//! layers become resident instead of failing the first decode.

use crate::abi::*;
use crate::error::Error;
use crate::plan::Plan;
use crate::weights::WeightTable;

/// The MoE layers for which [`Plan::new`] refuses `graph`, and why. Where two layers are in each
/// other's way, the first one stays.
pub(crate) fn refused(graph: &ggml_cgraph, table: &WeightTable) -> Vec<(usize, String)> {
    if Plan::new(graph, table, false).is_ok() {
        return Vec::new();
    }
    // Rather than to know the rules a second time: layers are added one by one, and those with
    // which the plan fails are left out. Only ever done for models that are loaded anew.
    let mut served = Vec::new();
    let mut refused = Vec::new();
    for layer in 0..table.layers() {
        served.push(layer);
        if let Err(error) = Plan::new(graph, &table.limited_to(&served), false) {
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
    use super::*;
    use crate::test_graph::TestGraph;

    fn matmuls(built: &TestGraph, layer: usize, parts: &[usize], ids: *mut ggml_tensor) {
        parts.iter().for_each(|&part| built.matmul(layer, part, ids));
    }

    fn refused_layers(built: &TestGraph) -> Vec<usize> {
        let refused = refused(built.graph(), &built.table);
        assert!(refused.iter().all(|(_, reason)| !reason.is_empty()));
        refused.into_iter().map(|(layer, _)| layer).collect()
    }

    #[test]
    fn ordinary_layers_are_served() {
        let built = TestGraph::new();
        assert_eq!(refused_layers(&built), []);
        (0..3).for_each(|layer| matmuls(&built, layer, &[0, 1], built.ids()));
        assert_eq!(refused_layers(&built), []);
    }

    #[test]
    fn layers_with_a_part_used_twice_or_not_at_all_are_refused() {
        let built = TestGraph::new();
        matmuls(&built, 0, &[0, 1, 1], built.ids());
        matmuls(&built, 1, &[1, 0], built.ids());
        matmuls(&built, 2, &[0], built.ids());
        assert_eq!(refused_layers(&built), [0, 2]);
    }

    #[test]
    fn of_two_layers_that_share_a_routing_one_is_served() {
        let built = TestGraph::new();
        let ids = built.ids();
        matmuls(&built, 0, &[0, 1], ids);
        matmuls(&built, 2, &[0, 1], ids);
        matmuls(&built, 1, &[0, 1], built.ids());
        assert_eq!(refused_layers(&built), [2]);
    }

    #[test]
    fn layers_read_by_other_operations_are_refused() {
        let built = TestGraph::new();
        matmuls(&built, 0, &[0, 1], built.ids());
        // SAFETY: shapes that fit, a live graph.
        unsafe {
            let rows = ggml_new_tensor_2d(built.context, GGML_TYPE_I32, 2, 4);
            built.add(ggml_get_rows(built.context, built.weights[1][0], rows));
        }
        assert_eq!(refused_layers(&built), [1]);
    }
}
