//! Several sequences of one context, computed together: each as llama.cpp computes it, and none changed
//! by what happens to another.

mod common;

use common::{
    Room, Synth, argmax, faulty, reads_of_a_load, stock, streamed, streamed_with, tokens,
};
use tierstream_ggml::{
    Context, ContextOptions, Entry, Error, Keep, Model, Sampler, Sampling, Token,
};
use tierstream_io::wrap::{Action, Rule};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Spec};

const EIO: i32 = 5;
const N_SEQ: u32 = 3;

fn context(model: &Model) -> Context {
    let options = ContextOptions {
        n_ctx: 256,
        n_seq: N_SEQ,
        n_batch: 16,
        keep: Keep::Last,
        ..ContextOptions::default()
    };
    Context::new(model.clone(), &options).unwrap()
}

/// The prompt in batches, of which the last row is kept.
fn read(context: &mut Context, sequence: u32, prompt: &[Token]) -> Vec<f32> {
    let size = context.batch_size();
    let last = prompt.len() - 1;
    let entry = |(i, &token)| Entry { token, sequence, keep: i == last };
    let entries: Vec<Entry> = prompt.iter().enumerate().map(entry).collect();
    for batch in entries.chunks(size) {
        context.step(batch).unwrap();
    }
    context.logits(0).to_vec()
}

fn next(rows: &[Vec<f32>]) -> Vec<Entry> {
    let entry = |(sequence, row): (usize, &Vec<f32>)| Entry {
        token: argmax(row),
        sequence: u32::try_from(sequence).unwrap(),
        keep: true,
    };
    rows.iter().enumerate().map(entry).collect()
}

fn rows(context: &Context) -> Vec<Vec<f32>> {
    (0..N_SEQ as usize).map(|row| context.logits(row).to_vec()).collect()
}

fn prompts(model: &Model) -> Vec<Vec<Token>> {
    (0..N_SEQ as usize).map(|i| tokens(model.vocab().len(), 5 + 20 * i, 3 + i as u64)).collect()
}

/// Prompts one after the other, then tokens of all sequences in each step; the second sequence is cut
/// back, and goes on, meanwhile.
fn conversation(model: &Model) -> Vec<Vec<f32>> {
    let mut context = context(model);
    let mut last: Vec<Vec<f32>> = Vec::new();
    for (sequence, prompt) in (0..).zip(prompts(model)) {
        last.push(read(&mut context, sequence, &prompt));
        assert_eq!(context.len(sequence) as usize, prompt.len());
    }
    let mut all = last.clone();
    for step in 0..12 {
        if step == 6 {
            assert!(context.cut(1, 10));
            assert_eq!((context.len(0), context.len(1), context.len(2)), (11, 10, 51));
            last[1] = read(&mut context, 1, &[7, 8, 9]);
        }
        context.step(&next(&last)).unwrap();
        last = rows(&context);
        all.extend(last.clone());
    }
    all
}

#[test]
fn sequences_are_computed_as_llama_cpp_does() {
    for arch in [Arch::Qwen3Moe, Arch::GptOss] {
        let synth = Synth::new(&Spec::new(arch));
        let reference = conversation(&stock(&synth.path));
        for room in [Room::Floor(0), Room::Share(0.3), Room::Preloaded] {
            let got = conversation(&streamed(&synth.path, room));
            assert!(got == reference, "{arch:?} {room:?}");
        }
    }
}

/// Alone in its context, or with two others that are silent: the same bits.
#[test]
fn a_sequence_does_not_depend_on_where_it_is() {
    let synth = Synth::new(&Spec::new(Arch::Qwen3Moe));
    let model = streamed(&synth.path, Room::Share(0.5));
    let prompts = prompts(&model);
    let mut together = context(&model);
    let alone: Vec<Vec<f32>> = prompts
        .iter()
        .map(|prompt| {
            let options = ContextOptions { n_ctx: 256, n_batch: 16, ..ContextOptions::default() };
            let mut context = Context::new(model.clone(), &options).unwrap();
            read(&mut context, 0, prompt)
        })
        .collect();
    for (sequence, prompt) in (0..).zip(&prompts) {
        assert!(read(&mut together, sequence, prompt) == alone[sequence as usize], "{sequence}");
    }
}

/// After a failed step all sequences are where they were, and the step can be done again.
#[test]
fn a_failed_step_leaves_the_sequences_as_they_were() {
    let synth = Synth::new(&Spec::new(Arch::Qwen3Moe));
    let reference = conversation(&stock(&synth.path));
    let loaded = reads_of_a_load(&synth.path);
    let rule =
        |i: u64| Rule::all(Action::Errno(EIO)).nth(loaded + 40 + i * 90..loaded + 41 + i * 90);
    let model = streamed_with(
        &synth.path,
        Room::Floor(0),
        Policy::Lru,
        faulty((0..30).map(rule).collect()),
    );
    let mut context = context(&model);
    let mut failed = 0;
    let mut insist = |context: &mut Context, entries: &[Entry]| loop {
        let before: Vec<u32> = (0..N_SEQ).map(|sequence| context.len(sequence)).collect();
        match context.step(entries) {
            Ok(()) => return,
            Err(Error::Io(_)) => failed += 1,
            Err(error) => panic!("{error}"),
        }
        let after: Vec<u32> = (0..N_SEQ).map(|sequence| context.len(sequence)).collect();
        assert_eq!(after, before);
    };
    let mut last = Vec::new();
    for (sequence, prompt) in (0..).zip(prompts(&model)) {
        for batch in prompt.chunks(16) {
            let end = batch.len() - 1;
            let entry = |(i, &token)| Entry { token, sequence, keep: i == end };
            insist(&mut context, &batch.iter().enumerate().map(entry).collect::<Vec<_>>());
        }
        last.push(context.logits(0).to_vec());
    }
    assert!(last == reference[..3]);
    for step in 0..6 {
        insist(&mut context, &next(&last));
        last = rows(&context);
        assert!(last == reference[3 * step + 3..3 * step + 6], "step {step}");
    }
    assert!(failed > 3, "{failed} steps failed");
}

#[test]
fn steps_that_cannot_be() {
    let synth = Synth::new(&Spec::new(Arch::Qwen3Moe));
    let model = streamed(&synth.path, Room::Share(1.0));
    let mut context = context(&model);
    let entry = Entry { token: 1, sequence: 0, keep: true };
    let bad: [&[Entry]; 5] = [
        &[],
        &[Entry { sequence: N_SEQ, ..entry }],
        &[Entry { token: -1, ..entry }],
        &[entry, entry],
        &[Entry { keep: false, ..entry }; 17],
    ];
    for entries in bad {
        assert!(matches!(context.step(entries), Err(Error::Batch(_))), "{entries:?}");
    }
    read(&mut context, 2, &tokens(model.vocab().len(), 256, 1));
    let full = context.step(&[Entry { sequence: 2, ..entry }]);
    assert!(matches!(full, Err(Error::Batch(_))), "{full:?}");
    context.step(&[entry]).unwrap();
    assert_eq!((context.len(0), context.len(1), context.len(2)), (1, 0, 256));
}

/// A row is sampled as llama.cpp samples from a context; what is masked is not drawn.
#[test]
fn rows_are_sampled_as_contexts_are() {
    let synth = Synth::new(&Spec::new(Arch::Qwen3Moe));
    let model = streamed(&synth.path, Room::Share(1.0));
    let mut context = context(&model);
    let sampling =
        Sampling { temperature: 1.5, repeat_penalty: 1.2, seed: 11, ..Sampling::default() };
    let (mut of_context, mut of_row) = (Sampler::new(sampling), Sampler::new(sampling));
    let mut row = read(&mut context, 0, &tokens(model.vocab().len(), 9, 2));
    for _ in 0..40 {
        let token = of_context.sample(&mut context).unwrap();
        assert_eq!(of_row.sample_row(&row), Some(token));
        row = read(&mut context, 0, &[token]);
    }
    row.fill(f32::NEG_INFINITY);
    assert_eq!(of_row.sample_row(&row), None);
    row[17] = -3.0;
    assert_eq!(of_row.sample_row(&row), Some(17));
}

/// A sequence that is saved, and restored in another place and after others were there, goes on to the
/// same bits.
#[test]
fn a_restored_sequence_goes_on_as_if_it_had_stayed() {
    for arch in [Arch::Qwen3Moe, Arch::GptOss] {
        let synth = Synth::new(&Spec::new(arch));
        let model = streamed(&synth.path, Room::Share(0.5));
        let prompt = &prompts(&model)[2];
        let go_on = |context: &mut Context, sequence| {
            let mut row = read(context, sequence, &[5]);
            let mut all = Vec::new();
            for _ in 0..8 {
                row = read(context, sequence, &[argmax(&row)]);
                all.push(row.clone());
            }
            all
        };
        let mut stayed = context(&model);
        read(&mut stayed, 1, prompt);
        let state = stayed.save(1).unwrap();
        assert_eq!(state.len(), stayed.saved_bytes(1));
        let expected = go_on(&mut stayed, 1);

        let mut other = context(&model);
        assert_eq!(other.save(0), None);
        read(&mut other, 2, &[1, 2, 3]);
        let len = u32::try_from(prompt.len()).unwrap();
        other.restore(2, &state, len).unwrap();
        assert_eq!(other.len(2), len);
        assert!(go_on(&mut other, 2) == expected, "{arch:?}");
        // Once more, cut back: what comes after is the whole sequence again.
        other.restore(0, &state, len).unwrap();
        assert!(other.cut(0, len - 4));
        read(&mut other, 0, &prompt[prompt.len() - 4..]);
        other.restore(0, &state, len).unwrap();
        assert!(go_on(&mut other, 0) == expected, "{arch:?}");
    }
}

#[test]
fn what_is_no_saved_sequence_is_refused() {
    let synth = Synth::new(&Spec::new(Arch::Qwen3Moe));
    let model = streamed(&synth.path, Room::Share(0.5));
    let mut context = context(&model);
    read(&mut context, 0, &[1, 2, 3, 4]);
    let state = context.save(0).unwrap();
    for (bytes, len) in [(&state[..], 5), (&state[..state.len() - 1], 4), (&[7; 64][..], 4)] {
        read(&mut context, 1, &[9]);
        let refused = context.restore(1, bytes, len);
        assert!(matches!(refused, Err(Error::Saved { .. })), "{refused:?}");
        assert_eq!((context.len(0), context.len(1)), (4, 0));
    }
    // Of more tokens than a sequence has room for.
    let options = ContextOptions { n_ctx: 256, n_batch: 16, ..ContextOptions::default() };
    let mut small = Context::new(model.clone(), &options).unwrap();
    let mut large = Context::new(model, &ContextOptions { n_ctx: 512, ..options }).unwrap();
    for batch in tokens(64, 300, 1).chunks(16) {
        large.decode(batch, Keep::Last, |_, _| ()).unwrap();
    }
    let refused = small.restore(0, &large.save(0).unwrap(), 300);
    assert!(matches!(refused, Err(Error::Saved { .. })), "{refused:?}");
    small.decode(&[1, 2], Keep::Last, |_, _| ()).unwrap();
}
