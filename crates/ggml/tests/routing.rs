//! Recorded routing: the same experts and weights whatever computes, each token's own, and those that
//! the pool was asked for.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{
    Room, Run, STOCK, Synth, attach, demo, load_on_stand_in, load_with, reader, streamed, tokens,
};
use tierstream_cuda::standin::{Config, StandIn};
use tierstream_ggml::{
    BatchRouting, Context, ContextOptions, Entry, Error, Execution, Keep, Model, Replay, Token,
};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Spec};

/// By sequence and position, for each layer that was computed: experts and weights.
type ByToken = BTreeMap<(u32, u32), Vec<Option<(Vec<u32>, Vec<f32>)>>>;

fn by_token(batches: &[BatchRouting]) -> ByToken {
    let mut all = ByToken::new();
    for batch in batches {
        for (index, token) in batch.tokens.iter().enumerate() {
            let of = |(experts, weights): (&[u32], &[f32])| (experts.to_vec(), weights.to_vec());
            let layers = batch.layers.iter().map(|layer| layer.of(index).map(of)).collect();
            let before = all.insert((token.entry.sequence, token.position), layers);
            assert!(before.is_none(), "{token:?} comes once");
        }
    }
    all
}

/// The routing of a run of single tokens.
fn of_run(model: &Model, execution: Execution) -> Vec<BatchRouting> {
    let run = Run { execution, ..Run::new(model, 12, 30, 1) };
    let mut context = run.context(model);
    context.record_routing(true).unwrap();
    run.logits_in(&mut context).unwrap();
    assert_eq!(execution == Execution::Auto && model.gpu().is_some(), context.whole_tokens() > 0);
    context.take_routing().unwrap()
}

#[test]
fn whoever_computes_tells_the_same() {
    let stand_in = StandIn::new(Config::default()).unwrap();
    let on_gpu = |share, execution| {
        let model = load_on_stand_in(&demo(), &stand_in, reader());
        attach(&model, Room::Share(share), Policy::Lru);
        of_run(&model, execution)
    };
    let on_host = |room| of_run(&streamed(&demo(), room), Execution::Host);
    let expected = on_host(Room::Share(0.4));
    assert_eq!(expected.len(), 42);
    // Where all records lie in order nobody would look at the ids.
    assert_eq!(on_host(Room::Preloaded), expected);
    for execution in [Execution::Auto, Execution::Host] {
        assert_eq!(on_gpu(0.4, execution), expected, "{execution}");
        assert_eq!(on_gpu(1.0, execution), expected, "{execution}");
    }
}

#[test]
fn weights_are_those_of_the_router_best_first() {
    let batches = of_run(&streamed(&demo(), Room::Share(0.4)), Execution::Host);
    for (at, layers) in by_token(&batches) {
        assert_eq!(layers.len(), 6);
        for (experts, weights) in layers.into_iter().flatten() {
            assert_eq!((experts.len(), weights.len()), (8, 8));
            assert!(weights.is_sorted_by(|a, b| a >= b), "{at:?}: {weights:?}");
            // Of the softmax over all, the chosen ones normalised (models/README.md).
            assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{at:?}: {weights:?}");
        }
    }
}

#[test]
fn what_is_recorded_is_what_the_pool_was_asked_for() {
    let model = streamed(&demo(), Room::Share(0.4));
    let mut uses = vec![vec![0u32; 64]; 6];
    for layers in by_token(&of_run(&model, Execution::Host)).into_values() {
        for (layer, routed) in layers.into_iter().enumerate() {
            routed.unwrap().0.into_iter().for_each(|expert| uses[layer][expert as usize] += 1);
        }
    }
    let counted: Vec<Vec<u32>> = model.layer_uses().into_iter().map(|layer| layer.uses).collect();
    assert_eq!(uses, counted);
}

fn entries(tokens: &[Token], sequence: u32, last: bool) -> Vec<Entry> {
    let end = tokens.len() - 1;
    let entry = |(index, &token)| Entry { token, sequence, keep: last && index == end };
    tokens.iter().enumerate().map(entry).collect()
}

fn context(model: &Model, n_seq: u32) -> Context {
    let options = ContextOptions {
        n_ctx: 256,
        n_seq,
        n_batch: 16,
        keep: Keep::Last,
        ..ContextOptions::default()
    };
    Context::new(model.clone(), &options).unwrap()
}

/// llama.cpp cuts and sorts batches of several sequences: each token gets its own routing all the same.
#[test]
fn sequences_computed_together_are_told_apart() {
    let model = streamed(&demo(), Room::Share(0.6));
    let texts: Vec<Vec<Token>> = (0..3).map(|i| tokens(8192, 24, 100 + i)).collect();
    let mut alone = ByToken::new();
    for (sequence, text) in (0..).zip(&texts) {
        let mut context = context(&model, 1);
        context.record_routing(true).unwrap();
        for token in text {
            context.step(&[Entry { token: *token, sequence: 0, keep: true }]).unwrap();
        }
        let found = by_token(&context.take_routing().unwrap());
        alone.extend(
            found.into_iter().map(|((_, position), layers)| ((sequence, position), layers)),
        );
    }

    let mut together = context(&model, 3);
    together.record_routing(true).unwrap();
    let mut step = |parts: &[(u32, std::ops::Range<usize>, bool)]| {
        let entries: Vec<Entry> = parts
            .iter()
            .flat_map(|(s, range, keep)| entries(&texts[*s as usize][range.clone()], *s, *keep))
            .collect();
        together.step(&entries).unwrap();
    };
    // A prompt by itself; prompts beside each other, out of order and of unequal length; single tokens,
    // of all and of some; a prompt that nobody wants the logits of yet beside single tokens.
    step(&[(1, 0..9, true)]);
    step(&[(2, 0..5, true), (0, 0..8, true)]);
    step(&[(0, 8..9, true), (1, 9..10, true), (2, 5..6, true)]);
    step(&[(2, 6..7, true), (0, 9..10, true)]);
    step(&[(1, 10..11, true), (0, 10..19, false), (2, 7..8, true)]);
    step(&[(0, 19..24, true), (1, 11..12, true)]);
    let found = by_token(&together.take_routing().unwrap());
    let expected = 24 + 12 + 8;
    assert_eq!(found.len(), expected);
    let (mut same, mut all, mut last) = (0, 0, 0);
    for (at, layers) in &found {
        for (layer, routed) in layers.iter().enumerate() {
            match (routed, &alone[at][layer]) {
                (Some((experts, _)), Some((expected, _))) => {
                    same += experts.iter().filter(|expert| expected.contains(expert)).count();
                    all += expected.len();
                }
                (None, _) => {
                    assert_eq!(layer, 5, "{at:?}: only the last layer is left out");
                    last += 1;
                }
                other => panic!("{at:?}: {other:?}"),
            }
        }
    }
    // Logits were kept of the last of each part but one.
    assert_eq!(expected - last, 12);
    // Kernels for several rows round differently; another token's experts are other ones.
    assert!(same * 100 >= all * 99, "{same} of {all}");
}

#[test]
fn prompts_that_are_cut_to_batches() {
    let model = streamed(&demo(), Room::Share(0.6));
    let mut context = context(&model, 1);
    context.record_routing(true).unwrap();
    context.decode(&tokens(8192, 40, 5), Keep::Last, |_, _| {}).unwrap();
    let batches = context.take_routing().unwrap();
    let sizes: Vec<usize> = batches.iter().map(|batch| batch.tokens.len()).collect();
    assert_eq!(sizes, [16, 16, 8]);
    assert!(context.take_routing().unwrap().is_empty(), "taken");
    let all = by_token(&batches);
    let told: Vec<u32> = all.iter().filter(|(_, l)| l[5].is_some()).map(|(at, _)| at.1).collect();
    assert_eq!(told, [39], "of the last layer");
    context.record_routing(false).unwrap();
    context.decode(&[1], Keep::Last, |_, _| {}).unwrap();
    assert!(context.take_routing().unwrap().is_empty());
}

#[test]
fn every_architecture_shows_its_weights() {
    for arch in Arch::ALL.into_iter().filter(|arch| arch.is_moe()) {
        let synth = Synth::new(&Spec::new(arch));
        let model = streamed(&synth.path, Room::Share(0.5));
        for (at, layers) in by_token(&of_run(&model, Execution::Host)) {
            for (experts, weights) in layers.into_iter().flatten() {
                assert_eq!(experts.len(), weights.len(), "{arch:?} {at:?}");
                assert!(weights.iter().all(|weight| weight.is_finite()), "{arch:?}: {weights:?}");
            }
        }
    }
}

#[test]
fn replayed_routing_is_computed_with_on_the_host_too() {
    let model = streamed(&demo(), Room::Share(0.4));
    let of = |first: u32| vec![(first..first + 8).collect::<Vec<u32>>(); 6];
    let mut context = context(&model, 1);
    context.record_routing(true).unwrap();
    context.replay(Some(Replay::new(vec![of(0), of(8), of(24)])));
    for token in [1, 2, 3, 4] {
        context.decode(&[token], Keep::Last, |_, _| {}).unwrap();
    }
    let firsts: Vec<u32> = by_token(&context.take_routing().unwrap())
        .into_values()
        .map(|layers| layers[3].as_ref().unwrap().0[0])
        .collect();
    assert_eq!(firsts, [0, 8, 24, 0]);
    context.replay(Some(Replay::new(vec![vec![vec![64; 8]; 6]])));
    let error = context.decode(&[5], Keep::Last, |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::Replay { layer: 0, .. }), "{error:?}");
}

#[test]
fn without_a_pool_nobody_looks() {
    let model = load_with(Path::new(&demo()), STOCK, reader());
    let mut context = context(&model, 1);
    assert!(matches!(context.record_routing(true), Err(Error::NoPool)));
    context.record_routing(false).unwrap();
}
