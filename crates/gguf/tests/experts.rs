//! Expert records of made-up models and of a real one.

mod common;

use std::path::Path;

use common::{file, metadata, tensors};
use tierstream_gguf::experts::{Family, PartKind, SmallRole};
use tierstream_gguf::write::TensorSpec;
use tierstream_gguf::{Error, ErrorKind, Experts, Extent, Header, Metadata, Model, TensorType};

fn model(metadata: &Metadata, tensors: &[TensorSpec]) -> Model {
    let header = Header::from_bytes(&file(metadata, tensors)).unwrap();
    Model::from_parts(vec![("toy.gguf".into(), header)]).unwrap()
}

fn refused(metadata: &Metadata, tensors: &[TensorSpec]) -> Error {
    Experts::group(&model(metadata, tensors)).expect_err("must be refused")
}

fn spec(name: &str, ty: TensorType, dims: &[u64]) -> TensorSpec {
    TensorSpec::new(name, ty, dims)
}

#[test]
fn records_are_slices_in_canonical_order() {
    let model = model(&metadata(), &tensors());
    let experts = Experts::group(&model).unwrap();
    // Gate and up: 64 x 2 in Q4_0 = 4 blocks of 18; down: 32 x 8 = 8 blocks.
    assert_eq!(experts.record_bytes(0), Some(72 + 72 + 144));
    for (index, layer) in experts.layers().iter().enumerate() {
        let kinds: Vec<PartKind> = layer.parts.iter().map(|part| part.kind).collect();
        assert_eq!(kinds, [PartKind::Gate, PartKind::Up, PartKind::Down]);
        assert_eq!((layer.layer, layer.experts, layer.used), (index as u32, 4, 2));
        for expert in 0..4 {
            let record: Vec<Extent> = experts.record(index, expert).unwrap().collect();
            for (extent, (name, bytes)) in
                record.iter().zip([("gate", 72), ("up", 72), ("down", 144)])
            {
                let tensor = model.tensor(&format!("blk.{index}.ffn_{name}_exps.weight")).unwrap();
                let offset = tensor.offset + u64::from(expert) * bytes;
                assert_eq!(*extent, Extent { file: 0, offset, len: bytes });
            }
        }
        assert!(experts.record(index, 4).is_none());
    }
    assert!(experts.record(2, 0).is_none());
    assert_eq!(experts.token_cycle_bytes(), 2 * 2 * 288);
    assert_eq!(experts.expert_bytes(), 2 * 4 * 288);
    assert_eq!(experts.dense_bytes(), 8 * 3 * 4);
    assert!(experts.layers().iter().all(|layer| layer.small.is_empty()));
}

#[test]
fn a_dense_model_has_none() {
    let experts = Experts::group(&model(&metadata(), &tensors()[..1])).unwrap();
    assert!(experts.is_empty());
    assert_eq!(
        (experts.token_cycle_bytes(), experts.expert_bytes(), experts.dense_bytes()),
        (0, 0, 96)
    );
}

#[test]
fn mixed_quantisation_makes_classes() {
    let mut tensors = tensors();
    tensors[4].ty = TensorType::Q8_0;
    let experts = Experts::group(&model(&metadata(), &tensors)).unwrap();
    let classes = experts.size_classes();
    assert_eq!(classes.len(), 2);
    assert_eq!((classes[0].layers.clone(), classes[0].record_bytes), (vec![0], 288));
    assert_eq!((classes[1].layers.clone(), classes[1].record_bytes), (vec![1], 416));
    assert_eq!(experts.layers()[1].class, 1);
    // As many bytes, but another shape: not interchangeable.
    let mut tensors = common::tensors();
    tensors[5].dims = vec![32, 4, 4];
    assert_eq!(Experts::group(&model(&metadata(), &tensors)).unwrap().size_classes().len(), 2);
    // Another number of experts of the same shape: interchangeable.
    let mut tensors = common::tensors();
    tensors[4..].iter_mut().for_each(|tensor| tensor.dims[2] = 8);
    assert_eq!(Experts::group(&model(&metadata(), &tensors)).unwrap().size_classes().len(), 1);
}

#[test]
fn fused_chunk_shared_and_small_tensors() {
    let tensors = [
        spec("blk.3.ffn_gate_up_exps.weight", TensorType::Q8_0, &[32, 4, 4]),
        spec("blk.3.ffn_down_exps.weight", TensorType::Q8_0, &[32, 2, 4]),
        spec("blk.3.ffn_down_exps.scale", TensorType::F32, &[4]),
        spec("blk.3.ffn_down_exps.input_scale", TensorType::F32, &[4]),
        spec("blk.3.ffn_gate_up_exps.bias", TensorType::F32, &[4, 4]),
        spec("blk.3.ffn_up_chexps.weight", TensorType::F32, &[3, 2, 2]),
        spec("blk.3.ffn_up_shexp.weight", TensorType::F32, &[3, 2]),
        spec("blk.3.ffn_norm_exps.weight", TensorType::F32, &[3]),
        spec("blk.03.ffn_up_exps.weight", TensorType::F32, &[3]),
        spec("blk.3.ffn_up_exps.weight.lora_a", TensorType::F32, &[3]),
        spec("v.blk.3.ffn_up_exps.weight", TensorType::F32, &[3]),
    ];
    let mut metadata = metadata();
    metadata.insert("toy.expert_used_count", 3u32);
    let model = model(&metadata, &tensors);
    let experts = Experts::group(&model).unwrap();
    let [routed, chunk] = experts.layers() else { panic!("{experts:?}") };
    assert_eq!((routed.layer, routed.family, routed.used), (3, Family::Routed, 3));
    assert_eq!((chunk.layer, chunk.family, chunk.experts, chunk.used), (3, Family::Chunk, 2, 2));
    assert_eq!(routed.record_bytes, 4 * 34 + 2 * 34);
    let small: Vec<_> =
        routed.small.iter().map(|s| (s.kind, s.role, s.bytes_per_expert, s.extent.len)).collect();
    assert_eq!(
        small,
        [
            (PartKind::GateUp, SmallRole::Bias, 16, 64),
            (PartKind::Down, SmallRole::Scale, 4, 16),
            (PartKind::Down, SmallRole::InputScale, 4, 16),
        ]
    );
    assert_eq!(experts.expert_bytes(), 4 * 204 + 2 * 24);
    assert_eq!(experts.dense_bytes() + experts.expert_bytes(), model.tensor_bytes());
    assert_eq!(experts.token_cycle_bytes(), 3 * 204 + 2 * 24);
}

#[test]
fn tensors_that_do_not_fit_together() {
    let with = |name: &str, ty, dims: &[u64]| {
        let mut tensors = tensors();
        tensors.push(spec(name, ty, dims));
        refused(&metadata(), &tensors)
    };
    let error = with("blk.0.ffn_gate_up_exps.weight", TensorType::F32, &[4, 2, 3]);
    assert!(matches!(error.kind(), ErrorKind::ExpertCount { expected: 4, found: 3 }), "{error}");
    assert!(
        error.to_string().starts_with("toy.gguf: tensor \"blk.0.ffn_gate_up_exps.weight\""),
        "{error}"
    );
    for dims in [&[4, 4][..], &[4], &[4, 2, 4, 1]] {
        let error = with("blk.2.ffn_up_exps.weight", TensorType::F32, dims);
        assert!(matches!(error.kind(), ErrorKind::ExpertShape { .. }), "{error}");
    }
    let error = with("blk.0.ffn_up_exps.bias", TensorType::F32, &[2, 5]);
    assert!(matches!(error.kind(), ErrorKind::ExpertCount { expected: 4, found: 5 }), "{error}");
    let error = with("blk.0.ffn_up_exps.scale", TensorType::Q4_0, &[32]);
    assert!(matches!(error.kind(), ErrorKind::ExpertShape { .. }), "{error}");
    for name in ["blk.0.ffn_gate_up_exps.bias", "blk.5.ffn_up_exps.bias"] {
        let error = with(name, TensorType::F32, &[2, 4]);
        assert!(matches!(error.kind(), ErrorKind::ExpertWeightsMissing), "{error}");
    }
}

#[test]
fn used_experts_are_bounded() {
    let with = |change: &dyn Fn(&mut Metadata)| {
        let mut metadata = metadata();
        change(&mut metadata);
        Experts::group(&model(&metadata, &tensors()))
    };
    for bad in [0, 5, u32::MAX] {
        let error =
            with(&|metadata| drop(metadata.insert("toy.expert_used_count", bad))).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
        assert!(error.to_string().contains("1..=4"), "{error}");
    }
    let missing =
        with(&|metadata| drop(metadata.insert("general.architecture", "other"))).unwrap_err();
    assert!(matches!(missing.kind(), ErrorKind::MissingKey), "{missing}");
    let per_layer =
        with(&|metadata| drop(metadata.insert("toy.expert_used_count", vec![1u32, 4]))).unwrap();
    assert_eq!(per_layer.layers().iter().map(|layer| layer.used).collect::<Vec<_>>(), [1, 4]);
    for short in [vec![1i32], vec![1, -1]] {
        with(&|metadata| drop(metadata.insert("toy.expert_used_count", short.clone())))
            .unwrap_err();
    }
}

#[test]
fn layers_for_further_tokens_are_not_in_the_cycle() {
    let mut metadata = metadata();
    metadata.insert("toy.nextn_predict_layers", 1u32);
    let experts = Experts::group(&model(&metadata, &tensors())).unwrap();
    assert_eq!(
        experts.layers().iter().map(|layer| layer.next_token).collect::<Vec<_>>(),
        [false, true]
    );
    assert_eq!(experts.token_cycle_bytes(), 2 * 288);
    assert_eq!(experts.expert_bytes(), 2 * 4 * 288);
}

#[test]
fn the_novelist_model() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf");
    let model = Model::open(path).unwrap();
    model.check_ggml().unwrap();
    assert_eq!(model.architecture(), "qwen3moe");
    assert_eq!(model.block_count().unwrap(), Some(6));
    assert_eq!(model.expert_count().unwrap(), Some(64));
    assert_eq!(model.metadata().strings("tokenizer.ggml.tokens").unwrap().unwrap().len(), 8192);
    assert_eq!(model.metadata().f64("qwen3moe.rope.freq_base").unwrap(), Some(10_000.0));
    assert_eq!(model.file_bytes(), 19_873_888);

    let experts = Experts::group(&model).unwrap();
    assert_eq!(experts.layers().len(), 6);
    assert_eq!(experts.size_classes().len(), 1);
    for layer in experts.layers() {
        assert_eq!((layer.experts, layer.used, layer.record_bytes), (64, 8, 41_472));
    }
    assert_eq!(experts.token_cycle_bytes(), 6 * 8 * 41_472);
    assert_eq!(experts.expert_bytes(), 6 * 64 * 41_472);
    assert_eq!(experts.expert_bytes() + experts.dense_bytes(), model.tensor_bytes());
}
