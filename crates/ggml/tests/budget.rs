//! The smallest pool that works is the one that the model names, to the byte.

mod common;

use common::{Run, Synth, assert_same_bits, go_on, load_with, reader, stock};
use tierstream_ggml::{Error, Model, PoolOptions, PoolSize, Weights};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec};

fn attach(model: &Model, size: PoolSize) -> Result<(), Error> {
    let pool =
        PoolOptions { size, policy: Policy::Lru, seed: 1, preload: false, below: None, staged: 2 };
    model.attach_pool(&pool, &mut go_on)
}

/// Room before the next page, behind each part of each size class.
const PADDING_BYTES: u64 = 3 * 2 * (tierstream_io::PAGE as u64 - 1);

#[test]
fn the_floor_is_exact() {
    for quant in [Quant::Q4_K_M, Quant::Uniform(tierstream_synth::TensorType::Q8_0)] {
        let synth = Synth::new(&Spec::new(Arch::Qwen3Moe).quant(quant));
        let reference = stock(&synth.path);
        let run = Run::new(&reference, 20, 4, 8);
        let expected = run.logits(&reference);
        let load = || load_with(&synth.path, Weights::Streamed, reader());
        let model = load();
        let least = model.least_pool_bytes();
        // 8 of 64 experts a token, in every layer.
        assert_eq!(least, model.expert_bytes() / 8);
        for (size, asked) in [
            (PoolSize::Bytes(0), 0),
            (PoolSize::Bytes(1), 1),
            (PoolSize::Bytes(least - 1), least - 1),
            (PoolSize::Share(0.0), 0),
            (PoolSize::Share(-1.0), 0),
            (PoolSize::Share(f64::NAN), 0),
        ] {
            match attach(&model, size) {
                Err(Error::PoolTooSmall { bytes, least_bytes }) => {
                    assert_eq!((bytes, least_bytes), (asked, least), "{size:?}");
                }
                other => panic!("{size:?}: {other:?}"),
            }
        }
        // The same model takes its pool after all that, and only once.
        attach(&model, PoolSize::Bytes(least)).unwrap();
        assert!(matches!(attach(&model, PoolSize::Bytes(least)), Err(Error::HasPool)));
        assert_same_bits(&expected, &run.logits(&model), reference.vocab().len(), "at the floor");
        let all = model.expert_bytes();
        for bytes in [least, least + 1, (least + all) / 2, all - 1, all, all + 1, u64::MAX] {
            let model = load();
            attach(&model, PoolSize::Bytes(bytes)).unwrap();
            let (budget, _) = model.pool_bytes();
            assert!(budget <= bytes.min(all) + PADDING_BYTES, "{bytes}: {budget}");
            assert!(budget >= least, "{bytes}: {budget}");
        }
    }
}

#[test]
fn without_a_pool_nothing_is_decoded() {
    let synth = Synth::qwen();
    let model = load_with(&synth.path, Weights::Streamed, reader());
    let run = Run::new(&model, 4, 0, 4);
    let error = run.logits_in(&mut run.context(&model)).unwrap_err();
    assert!(matches!(error, Error::SelfCheck(_)), "{error:?}");
}
