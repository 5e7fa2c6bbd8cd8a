//! The devices that tests run over, and memory that tells when it is dropped.

// Every test binary uses its own part of this.
#![allow(dead_code)]

pub(crate) mod gates;

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use tierstream_cuda::standin::{Config, StandIn};
use tierstream_cuda::{Device, Span, Stream};

pub(crate) const MIB: u64 = 1 << 20;

/// The GPUs of this machine.
fn gpus() -> &'static [Device] {
    static GPUS: OnceLock<Vec<Device>> = OnceLock::new();
    GPUS.get_or_init(|| {
        let (gpus, why_none) = match Device::all() {
            Ok(gpus) => (gpus, String::new()),
            Err(why) => (Vec::new(), format!(" ({why})")),
        };
        let names: String = gpus.iter().map(|gpu| format!(", {}", gpu.info().name)).collect();
        // Past the harness, which shows what is printed only for tests that fail.
        let _ = writeln!(std::io::stderr(), "tests run over: stand-in{names}{why_none}");
        gpus
    })
}

/// Of the GPUs: a gate that waits and something that waits for the whole device, as the freeing of
/// memory does, would wait for each other if the gate's host cannot go on meanwhile.
static GATES: RwLock<()> = RwLock::new(());

/// Calls `test` for a stand-in of its own, and for every GPU of this machine.
pub(crate) fn everywhere(test: impl Fn(&Device)) {
    on_standin(&test);
    for device in gpus() {
        let _no_gates = GATES.read().unwrap_or_else(PoisonError::into_inner);
        println!("over {}", device.info().name);
        test(device);
    }
}

/// The same for a test of gates: on a GPU, no other test runs meanwhile.
pub(crate) fn everywhere_alone(test: impl Fn(&Device)) {
    on_standin(&test);
    for device in gpus() {
        let _alone = GATES.write().unwrap_or_else(PoisonError::into_inner);
        println!("over {}", device.info().name);
        test(device);
    }
}

fn on_standin(test: impl Fn(&Device)) {
    let config = Config { memory_bytes: 128 * MIB, ..Config::default() };
    let standin = StandIn::new(config).unwrap().device();
    println!("over {}", standin.info().name);
    test(&standin);
}

/// `bytes` bytes that tell `seed`s apart.
pub(crate) fn pattern(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i * 7 + i / 251 + seed * 31) as u8).collect()
}

/// What lies on the device, read on a stream of its own.
pub(crate) fn read(device: &Device, span: Span) -> Vec<u8> {
    let stream = device.stream().unwrap();
    let to = vec![0; span.bytes() as usize];
    stream.download(span, to).unwrap().wait().unwrap()
}

/// Writes to the device, and waits for it.
pub(crate) fn write(stream: &Stream, span: Span, bytes: Vec<u8>) {
    stream.upload(bytes, span).unwrap();
    stream.synchronize().unwrap();
}

/// Bytes that count their drops.
pub(crate) struct Counted<T = Vec<u8>> {
    pub(crate) bytes: T,
    pub(crate) drops: Arc<AtomicUsize>,
}

impl<T> Counted<T> {
    pub(crate) fn new(bytes: T, drops: &Arc<AtomicUsize>) -> Self {
        Self { bytes, drops: Arc::clone(drops) }
    }
}

impl<T: AsRef<[u8]>> AsRef<[u8]> for Counted<T> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

impl<T: AsMut<[u8]>> AsMut<[u8]> for Counted<T> {
    fn as_mut(&mut self) -> &mut [u8] {
        self.bytes.as_mut()
    }
}

impl<T> Drop for Counted<T> {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Ordering::SeqCst);
    }
}
