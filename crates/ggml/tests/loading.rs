//! What is checked around a load: whether files are still the ones whose header was read, whether
//! a model gets one pool, whether it computes numbers.

mod common;

use std::fs;
use std::time::{Duration, SystemTime};

use common::{Room, STOCK, Synth, go_on, load_with, reader, stock, streamed, tokens};
use tierstream_ggml::{
    Context, ContextOptions, Error, Keep, Model, Placement, PoolOptions, PoolSize, Weights,
};
use tierstream_pool::Policy;

fn changed(result: Result<Model, Error>) -> bool {
    match result {
        Err(Error::Io(tierstream_io::Error::Changed { .. })) => true,
        Err(other) => panic!("{other:?}"),
        Ok(_) => false,
    }
}

/// The header was read from another file, or from what the file was before.
#[test]
fn files_changed_since_their_header_was_read_are_refused() {
    for weights in [Weights::Streamed, STOCK] {
        let synth = Synth::qwen();
        let load = |file| Model::load(file, weights, &Placement::Cpu, reader(), &mut go_on);
        let open = || tierstream_gguf::Model::open(&synth.path).unwrap();
        let file = open();
        assert!(!changed(load(&file)));
        // Another file of the same name and bytes.
        let copy = synth.dir().join("copy");
        fs::copy(&synth.path, &copy).unwrap();
        fs::rename(&copy, &synth.path).unwrap();
        assert!(changed(load(&file)), "{weights:?}");
        // The same file, written to.
        let file = open();
        assert!(!changed(load(&file)));
        let handle = fs::File::options().append(true).open(&synth.path).unwrap();
        handle.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
        assert!(changed(load(&file)), "{weights:?}");
        assert!(!changed(load(&open())));
    }
}

#[test]
fn a_replaced_file_is_told() {
    let synth = Synth::qwen();
    let model = streamed(&synth.path, Room::Floor(0));
    assert_eq!(model.replaced_file(), None);
    let copy = synth.dir().join("copy");
    fs::copy(&synth.path, &copy).unwrap();
    fs::rename(&copy, &synth.path).unwrap();
    assert_eq!(model.replaced_file().as_ref(), Some(&synth.path));
    assert_eq!(stock(&synth.path).replaced_file(), None);
}

#[test]
fn a_pool_is_attached_once_even_at_the_same_time() {
    let synth = Synth::qwen();
    let model = load_with(&synth.path, Weights::Streamed, reader());
    let options = |preload| PoolOptions {
        size: PoolSize::Share(1.0),
        policy: Policy::Lru,
        seed: 1,
        preload,
        below: None,
        staged: 2,
    };
    let attach = || model.attach_pool(&options(false), &mut go_on);
    // A second caller while the first one preloads, which is stopped then.
    let mut second = None;
    let first = model.attach_pool(&options(true), &mut |_| {
        second = std::thread::scope(|s| s.spawn(attach).join().ok());
        false
    });
    assert!(matches!(first, Err(Error::Cancelled)), "{first:?}");
    assert!(matches!(second, Some(Err(Error::HasPool))), "{second:?}");
    // A caller that panics leaves the model without a pool, and free.
    let panics = std::panic::AssertUnwindSafe(|| {
        let _ = model.attach_pool(&options(true), &mut |_| panic!("on purpose"));
    });
    std::panic::catch_unwind(panics).unwrap_err();
    attach().unwrap();
    assert!(matches!(attach(), Err(Error::HasPool)));
}

#[test]
fn a_share_is_a_share_in_every_size_class() {
    use tierstream_synth::{Arch, Quant, Spec};
    let synth = Synth::new(&Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M));
    for share in [0.125, 0.3, 0.99] {
        let model = streamed(&synth.path, Room::Share(share));
        let (bytes, all) = (model.pool_bytes().0 as f64, model.expert_bytes() as f64);
        assert!(bytes >= share * all && bytes < (share + 0.02) * all, "{share}: {bytes} of {all}");
    }
}

#[test]
fn logits_that_are_not_numbers_are_an_error() {
    let synth = Synth::qwen();
    let header = tierstream_gguf::Model::open(&synth.path).unwrap();
    let norm = header.tensor("output_norm.weight").unwrap();
    let mut bytes = fs::read(&synth.path).unwrap();
    bytes[norm.offset as usize..norm.end() as usize].fill(0xFF);
    fs::write(&synth.path, bytes).unwrap();
    for model in [stock(&synth.path), streamed(&synth.path, Room::Floor(0))] {
        let options = ContextOptions { n_ctx: 256, n_batch: 8, ..ContextOptions::default() };
        let mut context = Context::new(model.clone(), &options).unwrap();
        let tokens = tokens(model.vocab().len(), 12, 1);
        for keep in [Keep::Last, Keep::All] {
            let error = context.decode(&tokens, keep, |_, _| panic!("no row")).unwrap_err();
            assert!(
                matches!(&error, Error::NotANumber { path } if *path == synth.path),
                "{error:?}"
            );
            assert!(!context.has_logits());
            // The batch that kept no row has passed.
            assert_eq!(context.position(), if keep == Keep::Last { 8 } else { 0 });
            context.clear();
        }
    }
}
