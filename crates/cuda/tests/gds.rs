//! Reads of files straight to a device, by a libcufile for tests over the stand-in.

#[path = "support/cufile.rs"]
mod cufile;
mod support;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;

use cufile::Stub;
use proptest::prelude::*;
use support::{MIB, pattern, read};
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_cuda::{Buffer, Cufile, Device, Error, Gds, GdsFile, Places};

fn places(stub: &Stub) -> Places {
    Places {
        libraries: vec![stub.path()],
        nvidia_fs: stub.nvidia_fs(),
        kernel_symbols: "/no/such/file".into(),
        compat_off: false,
    }
}

fn stand_in() -> StandIn {
    StandIn::new(Config { memory_bytes: 64 * MIB, ..Config::default() }).unwrap()
}

/// Why files cannot be read straight to a device.
#[track_caller]
fn why<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result.unwrap_err() {
        Error::NoGds { reason } => reason,
        error => panic!("{error:?}"),
    }
}

fn open(places: &Places) -> Result<Gds, Error> {
    Cufile::find(places)?.open(&stand_in().device())
}

/// A file of `bytes` bytes, and one to keep it.
fn file(bytes: usize) -> (File, Vec<u8>) {
    let content = pattern(3, bytes);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content).unwrap();
    (file, content)
}

fn bytes_of(device: &Device, buffer: &Buffer, bytes: usize) -> Vec<u8> {
    read_of(device, buffer, 0, bytes)
}

fn read_of(device: &Device, buffer: &Buffer, at: usize, bytes: usize) -> Vec<u8> {
    read(device, buffer.span(at as u64, bytes as u64).unwrap())
}

#[test]
fn what_is_missing_is_told() {
    let stub = Stub::new();
    let nowhere = vec![PathBuf::from("libcufile-of-nobody.so"), stub.nvidia_fs()];
    let reason = why(Cufile::find(&Places { libraries: nowhere, ..places(&stub) }));
    assert!(reason.starts_with("libcufile cannot be loaded (libcufile-of-nobody.so"), "{reason}");
    assert!(reason.contains("; "), "{reason}");

    let nvidia_fs = PathBuf::from("/no/such/device");
    let reason = why(Cufile::find(&Places { nvidia_fs, ..places(&stub) }));
    assert!(reason.starts_with("there is neither the kernel module nvidia-fs (/no/such"));
    // Looked for before anything is started.
    assert_eq!(stub.get("opens"), 0);

    // A library that is another one.
    let other = Places { libraries: vec!["libc.so.6".into()], ..places(&stub) };
    assert!(why(Cufile::find(&other)).contains("cuFileDriverOpen"));
}

#[test]
fn compatibility_mode_is_off_whatever_supports_it() {
    let stub = Stub::new();
    let gds = open(&places(&stub)).unwrap();
    assert_eq!((stub.get("compat"), stub.get("p2pdma")), (0, 0));
    // Once for both.
    let again = open(&places(&stub)).unwrap();
    drop(gds);
    assert_eq!((stub.get("opens"), stub.get("opened")), (1, 1));
    drop(again);
    stub.assert_ended();

    let (stub, nvidia_fs) = (Stub::new(), "/no/such/device".into());
    let kernel_symbols = stub.symbols();
    drop(open(&Places { nvidia_fs, kernel_symbols, ..places(&stub) }).unwrap());
    assert_eq!((stub.get("compat"), stub.get("p2pdma")), (0, 1));
    stub.assert_ended();
}

#[test]
fn an_old_library_is_started_only_if_the_user_has_switched_it_off() {
    let stub = Stub::old();
    let reason = why(open(&places(&stub)));
    assert!(reason.contains("too old") && reason.contains("CUFILE_ALLOW_COMPAT_MODE=false"));
    let nvidia_fs = "/no/such/device".into();
    let without =
        Places { nvidia_fs, kernel_symbols: stub.symbols(), compat_off: true, ..places(&stub) };
    assert!(why(open(&without)).contains("too old to do without the kernel module nvidia-fs"));
    assert_eq!(stub.get("opens"), 0);
    drop(open(&Places { compat_off: true, ..places(&stub) }).unwrap());
    stub.assert_ended();
}

#[test]
fn refusals_are_told_in_the_librarys_words() {
    let stub = Stub::new();
    stub.set("open_fails", 5001);
    let reason = why(open(&places(&stub)));
    let words = "libcufile does not start: cuFile error 5001, CU_FILE_DRIVER_NOT_INITIALIZED";
    assert_eq!(reason, words);
    stub.set("open_fails", 0);
    let gds = open(&places(&stub)).unwrap();
    stub.set("file_refused", 5020);
    let reason = why(gds.register(file(1).0));
    assert_eq!(reason, "libcufile does not take the file: cuFile error 5020, CU_FILE_DIO_NOT_SET");
    stub.set("buffer_refused", 5036);
    assert!(why(gds.buffer(4096)).ends_with("5036, CU_FILE_GPU_MEMORY_PINNING_FAILED"));
    assert!(matches!(gds.buffer(0), Err(Error::Config(_))));
    drop(gds);
    stub.assert_ended();
}

/// What reads, for tests that change nothing of it.
struct Ready {
    stub: Stub,
    device: Device,
    gds: Gds,
    file: GdsFile,
    content: Vec<u8>,
}

fn ready(bytes: usize) -> Ready {
    let (stub, device) = (Stub::new(), stand_in().device());
    let gds = Cufile::find(&places(&stub)).unwrap().open(&device).unwrap();
    let (file, content) = file(bytes);
    let file = gds.register(file).unwrap();
    Ready { stub, device, gds, file, content }
}

const FILE_BYTES: usize = 300_007;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 300, ..Default::default() })]

    /// Whatever is asked for, and however few bytes come at once.
    #[test]
    fn bytes_are_those_of_the_file(
        block in 0..FILE_BYTES.div_ceil(4096) + 2,
        bytes in prop_oneof![1usize..5000, 1usize..100_000, (1usize..24).prop_map(|n| n * 4096)],
        short_bytes in prop_oneof![Just(0i64), 4096i64..20_000],
    ) {
        static READY: OnceLock<Ready> = OnceLock::new();
        let Ready { stub, device, gds, file, content } = READY.get_or_init(|| ready(FILE_BYTES));
        stub.set("short_bytes", short_bytes);
        let buffer = gds.buffer(100_000usize.next_multiple_of(4096)).unwrap();
        let there = content.get(block * 4096..).unwrap_or_default();
        let there = &there[..bytes.min(there.len())];
        prop_assert_eq!(file.read(block as u64 * 4096, bytes, &buffer).unwrap(), there.len());
        prop_assert!(bytes_of(device, &buffer, there.len()) == there);
    }
}

#[test]
fn interrupted_reads_are_made_again() {
    let Ready { stub, device, gds, file, content } = ready(50_000);
    let buffer = gds.buffer(16 << 10).unwrap();
    stub.set("interrupt", 3);
    assert_eq!(file.read(4096, 10_000, &buffer).unwrap(), 10_000);
    assert!(bytes_of(&device, &buffer, 10_000) == content[4096..][..10_000]);
    assert!(read_of(&device, &buffer, 4096, 100) == content[8192..][..100]);
    assert!(matches!(buffer.span(16 << 10, 1), Err(Error::Range { .. })));
    drop((buffer, file, gds));
    stub.assert_ended();
}

#[test]
fn failed_reads_are_told() {
    let Ready { stub, gds, file, .. } = ready(50_000);
    let buffer = gds.buffer(16 << 10).unwrap();
    let error = |offset, bytes| file.read(offset, bytes, &buffer).unwrap_err();
    stub.set("fail_errno", 5);
    assert_eq!(error(0, 100).raw_os_error(), Some(5));
    stub.set("fail_after", 1);
    stub.set("fail_code", 5008);
    assert_eq!(error(0, 100).to_string(), "cuFile error 5008, CU_FILE_IO_NOT_SUPPORTED");
    stub.set("needs_compat", 1);
    assert_eq!(error(0, 100).to_string(), "cuFile error 5008, CU_FILE_IO_NOT_SUPPORTED");
    stub.set("needs_compat", 0);
    let before = stub.get("reads");
    for (offset, bytes) in [(1, 100), (0, (16 << 10) + 1), (u64::MAX - 4095, 4096)] {
        assert_eq!(error(offset, bytes).kind(), std::io::ErrorKind::InvalidInput);
    }
    let others = Cufile::find(&places(&stub)).unwrap().open(&stand_in().device()).unwrap();
    let others = others.buffer(4096).unwrap();
    assert!(file.read(0, 100, &others).is_err());
    assert_eq!(stub.get("reads"), before);
}

#[test]
fn memory_comes_back_and_a_lost_device_is_told() {
    let (stub, stand_in) = (Stub::new(), stand_in());
    let device = stand_in.device();
    let gds = Cufile::find(&places(&stub)).unwrap().open(&device).unwrap();
    let registered = gds.register(file(9000).0).unwrap();
    stand_in.inject(Fault::OutOfMemory, 0);
    assert!(matches!(gds.buffer(4096), Err(Error::OutOfMemory { .. })));
    drop(gds.buffer(4096).unwrap());
    let memory = device.memory().unwrap();
    assert_eq!(memory.free_bytes, memory.total_bytes);

    let buffer = gds.buffer(4096).unwrap();
    let stream = device.stream().unwrap();
    stand_in.inject(Fault::CopyLost, 0);
    stream.upload(vec![0; 8], buffer.span(0, 8).unwrap()).unwrap();
    assert!(stream.synchronize().is_err());
    let error = registered.read(0, 4096, &buffer).unwrap_err();
    assert!(error.to_string().contains("the GPU is lost"), "{error}");
    assert!(matches!(gds.buffer(4096), Err(Error::Lost { .. })));
}
