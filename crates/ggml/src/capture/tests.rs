use proptest::prelude::*;
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_synth::{Arch, Spec};

use super::*;
use crate::placement::Gpu;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// What shares a page with another tensor lies in the same page of the same file as that.
    #[test]
    fn tensors_lie_in_memory_as_in_their_file(
        parts in prop::collection::vec(
            (any::<bool>(), prop_oneof![0u64..64, 0u64..9000, Just(32)], 1usize..20_000),
            1..40,
        ),
    ) {
        let (mut file, mut at) = (0, 0);
        let mut tensors = Vec::new();
        for (other_file, gap, bytes) in parts {
            if other_file {
                (file, at) = (file + 1, 0);
            }
            at += gap;
            tensors.push((Some((file, at)), bytes));
            at += bytes as u64;
        }
        let (offsets, all) = lay_out(tensors.iter().copied(), 32);
        let placed: Vec<_> = tensors
            .iter()
            .zip(offsets)
            .map(|(&(place, bytes), at)| (place.unwrap(), at..at + bytes))
            .collect();
        prop_assert!(all.is_multiple_of(PAGE));
        let page = |at: usize| at / PAGE;
        for (index, ((file, offset), range)) in placed.iter().enumerate() {
            let in_order = offset.is_multiple_of(32);
            prop_assert!(range.end <= all && range.start.is_multiple_of(32));
            prop_assert!(!in_order || range.start % PAGE == *offset as usize % PAGE);
            for ((other_file, other_offset), other) in &placed[..index] {
                prop_assert!(other.end <= range.start);
                if page(other.end - 1) == page(range.start) {
                    prop_assert_eq!(file, other_file);
                    let apart = usize::try_from(offset - other_offset).unwrap();
                    prop_assert_eq!(range.start - other.start, apart);
                }
            }
        }
    }
}

#[test]
fn neighbours_in_a_file_are_neighbours() {
    let tensors = [(10 * PAGE + 64, 1000), (10 * PAGE + 1088, 5000), (90 * PAGE + 32, 10)];
    let placed = tensors.iter().map(|&(offset, bytes)| (Some((0, offset as u64)), bytes));
    assert_eq!(lay_out(placed, 32), (vec![64, 1088, 2 * PAGE + 32], 3 * PAGE));
    // The same one twice, one that no file has, and one that no kernel would take as it lies.
    let places = [Some((0, 64)), Some((0, 64)), None, Some((0, 71))];
    let placed = places.into_iter().map(|place| (place, 100));
    assert_eq!(lay_out(placed, 32), (vec![64, PAGE + 64, 2 * PAGE, 3 * PAGE], 4 * PAGE));
    // Many bytes together lie as in the file's huge pages.
    let (first, large) = (3 * PAGE as u64, (HUGE_PAGE + 5 * PAGE) as u64);
    let placed = [(Some((0, first)), 100), (Some((1, large)), HUGE_RUN_BYTES)];
    let (offsets, _) = lay_out(placed.into_iter(), 32);
    assert_eq!(offsets, [0, HUGE_PAGE + 5 * PAGE]);
}

/// A context with a tensor for each of these names, three rows of so many numbers each.
fn context(tensors: &[(&str, i64)]) -> *mut ggml_context {
    // SAFETY: a context without data.
    unsafe {
        let mem_size = ggml_tensor_overhead() * tensors.len();
        let params = ggml_init_params { mem_size, mem_buffer: ptr::null_mut(), no_alloc: true };
        let ctx = ggml_init(params);
        for &(name, ne0) in tensors {
            let tensor = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ne0, 3);
            let name = std::ffi::CString::new(name).unwrap();
            ggml_set_name(tensor, name.as_ptr());
        }
        ctx
    }
}

fn names(ctx: *mut ggml_context) -> Vec<String> {
    let mut names = Vec::new();
    // SAFETY: a live context.
    unsafe {
        let mut tensor = ggml_get_first_tensor(ctx);
        while !tensor.is_null() {
            names.push(name_of(tensor.cast()));
            tensor = ggml_get_next_tensor(ctx, tensor);
        }
    }
    names
}

/// What a type allocates for all tensors of a context.
fn allocate(ctx: *mut ggml_context, buft: ggml_backend_buffer_type_t) -> ggml_backend_buffer_t {
    // SAFETY: both live.
    unsafe { ggml_backend_alloc_ctx_tensors_from_buft(ctx.cast(), buft.cast()).cast() }
}

fn type_of(buffer: ggml_backend_buffer_t) -> ggml_backend_buffer_type_t {
    // SAFETY: live.
    unsafe { (*buffer).buft }
}

fn some_file() -> tierstream_gguf::Model {
    let dir = tempfile::tempdir().unwrap();
    let written = Spec::new(Arch::Llama).write(dir.path().join("model.gguf")).unwrap();
    tierstream_gguf::Model::open(&written.files[0]).unwrap()
}

#[test]
fn names_are_hidden_until_the_load_is_over_and_nobody_elses_are() {
    let file = some_file();
    let stand_in = StandIn::new(Config::default()).unwrap();
    let gpu = Placement::Gpu(Gpu::stand_in(&stand_in).unwrap());
    let types = types_of(&gpu, false).unwrap();
    for &(buft, kind) in &types {
        let tensors = [("token_embd.weight", 5), ("in no file", 7)];
        let ctx = context(&tensors);
        let (buffer, captured) = capture(&file, types.clone(), || {
            let buffer = allocate(ctx, buft);
            assert!(names(ctx).iter().all(|n| n.starts_with('\u{1}')), "{:?}", names(ctx));
            // So that llama.cpp pins nothing for it.
            assert_eq!(type_of(buffer) == buft, kind != Kind::Device);
            // Of other threads, nothing is noted.
            std::thread::scope(|s| {
                s.spawn(|| {
                    let types = types_of(&Placement::Cpu, false).unwrap();
                    let ctx = context(&tensors);
                    let buffer = allocate(ctx, types[0].0);
                    assert_eq!(names(ctx), ["token_embd.weight", "in no file"]);
                    assert_eq!(type_of(buffer), types[0].0);
                    // SAFETY: ours.
                    unsafe {
                        ggml_backend_buffer_free(buffer.cast());
                        ggml_free(ctx);
                    }
                });
            });
            Ok(buffer)
        })
        .unwrap();
        assert_eq!(names(ctx), ["token_embd.weight", "in no file"]);
        assert_eq!((type_of(buffer), captured.faults.len()), (buft, 0));
        let told: Vec<_> = captured.unread.iter().map(|t| (&*t.name, t.bytes)).collect();
        assert_eq!(told, [("token_embd.weight", 60), ("in no file", 84)]);
        for unread in &captured.unread {
            let is_right = match unread.at {
                At::Device(_) => kind == Kind::Device,
                At::Host { in_file_order, .. } => {
                    in_file_order == (kind == Kind::Plain && unread.bytes == 60)
                }
                At::Converted { .. } => false,
            };
            assert!(is_right, "{kind:?} {unread:?}");
        }
        // SAFETY: ours.
        unsafe {
            ggml_backend_buffer_free(buffer.cast());
            ggml_free(ctx);
        }
    }
    let memory = stand_in.device().memory().unwrap();
    assert_eq!(memory.free_bytes, memory.total_bytes);
}

#[test]
fn want_of_memory_is_told() {
    let file = some_file();
    let stand_in = StandIn::new(Config::default()).unwrap();
    let gpu = Placement::Gpu(Gpu::stand_in(&stand_in).unwrap());
    let types = types_of(&gpu, false).unwrap();
    let own = types.iter().find(|(_, kind)| *kind == Kind::Device).unwrap().0;
    let ctx = context(&[("token_embd.weight", 5)]);
    stand_in.inject(Fault::OutOfMemory, 0);
    let refused = capture(&file, types, || {
        assert!(allocate(ctx, own).is_null());
        Err::<(), _>(Error::Internal("as llama.cpp says".into()))
    });
    let error = refused.map(drop).unwrap_err();
    assert!(matches!(error, Error::WeightsTooLarge { bytes: 128 }), "{error:?}");
    assert_eq!(names(ctx), ["token_embd.weight"]);
    // SAFETY: ours.
    unsafe { ggml_free(ctx) };
}
