//! `uring`: direct reads through io_uring, submitted and reaped by the one thread that waits.
//!
//! Other threads hand their reads over and ring an eventfd. They do not enter the kernel
//! themselves: completions run as task work of the thread that submitted the read, which may be
//! busy computing, and reads of a thread that exits are cancelled (io_uring(7)). One issuer also
//! lets the kernel defer that work until we ask for it (`DEFER_TASKRUN`, Linux 6.1).

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::ThreadId;

use io_uring::{IoUring, opcode, types};
use rustix::event::{EventfdFlags, PollFd, PollFlags};

use super::{Engine, EngineKind, RawDone, RawRead};
use crate::error::{Error, Result};
use crate::ring::{Buffer, Ring};
use crate::sync::lock;

/// Most reads in flight that we ask of a ring.
const DEPTH_MAX: usize = 1024;
/// The kernel registers at most this many buffers (`IORING_MAX_REG_BUFFERS`).
const REGISTERED_MAX: usize = 1 << 14;
/// Linux transfers at most this many bytes per read (`MAX_RW_COUNT`).
const READ_MAX: usize = 0x7fff_f000;
/// `user_data` of the poll on the eventfd; reads carry the number of their slot.
const WAKE: u64 = u64::MAX;

/// The io_uring engine.
pub struct Uring {
    depth: usize,
    ring: Arc<Ring>,
    registered: bool,
    remark: Option<String>,
    waker: OwnedFd,
    notified: AtomicBool,
    handed_over: Mutex<Vec<RawRead>>,
    owner: OnceLock<ThreadId>,
    /// Touched by the owner only, so never contended.
    core: Mutex<Core>,
}

struct Core {
    uring: IoUring,
    enabled: bool,
    armed: bool,
    slots: Vec<Option<Submitted>>,
    free: Vec<usize>,
    backlog: VecDeque<RawRead>,
    /// The error that `io_uring_enter` died of.
    broken: Option<i32>,
}

/// A read that the kernel has, or is about to have.
struct Submitted {
    read: RawRead,
    /// Of a read into several places. Older kernels look at it as long as the read is in flight.
    _targets: Box<[libc::iovec]>,
}

// SAFETY: addresses of memory that the read owns, or whose keeper it owns.
unsafe impl Send for Submitted {}

impl Uring {
    /// Sets a ring up for `depth` reads in flight (at most 1024), and registers the buffers of
    /// `ring` with the kernel when `register_buffers` says so and the kernel allows it.
    ///
    /// # Errors
    /// [`Error::Engine`] when the kernel, or a sandbox, refuses io_uring.
    pub fn new(ring: &Arc<Ring>, depth: usize, register_buffers: bool) -> Result<Self> {
        let fail =
            |source| Error::Engine { engine: EngineKind::Uring.name(), source: Arc::new(source) };
        self_test().map_err(fail)?;
        let depth = depth.clamp(1, DEPTH_MAX);
        let (uring, enabled) = set_up(depth as u32 + 1).map_err(fail)?;
        let waker = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| fail(errno.into()))?;
        let refused = if register_buffers { register(&uring, ring).err() } else { None };
        let core = Core {
            uring,
            enabled,
            armed: false,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).collect(),
            backlog: VecDeque::new(),
            broken: None,
        };
        Ok(Self {
            depth,
            ring: Arc::clone(ring),
            registered: register_buffers && refused.is_none(),
            remark: refused.map(|error| format!("io_uring without registered buffers: {error}")),
            waker,
            notified: AtomicBool::new(false),
            handed_over: Mutex::default(),
            owner: OnceLock::new(),
            core: Mutex::new(core),
        })
    }

    /// Takes over what other threads have handed in, and pushes what there is room for.
    fn push(&self, core: &mut Core) {
        core.backlog.extend(lock(&self.handed_over).drain(..));
        if !core.armed {
            let poll = opcode::PollAdd::new(
                types::Fd(self.waker.as_raw_fd()),
                PollFlags::IN.bits().into(),
            );
            // SAFETY: the entry points to no memory; the eventfd lives as long as the ring.
            let pushed = unsafe { core.uring.submission().push(&poll.build().user_data(WAKE)) };
            core.armed = pushed.is_ok();
        }
        while let Some(mut read) = core.backlog.pop_front() {
            let Some(slot) = core.free.pop() else {
                core.backlog.push_front(read);
                break;
            };
            let (entry, targets) = self.entry(&mut read);
            let entry = entry.user_data(slot as u64);
            // SAFETY: the target stays valid and untouched while the kernel may write to it: the
            // read, and with it the only access to its memory, lies in its slot until the
            // completion arrives, and is quarantined should it never arrive. The same holds the
            // file open.
            let pushed = unsafe { core.uring.submission().push(&entry) };
            if pushed.is_err() {
                core.free.push(slot);
                core.backlog.push_front(read);
                break;
            }
            core.slots[slot] = Some(Submitted { read, _targets: targets });
        }
    }

    /// What the kernel is told of a read, and what that points to besides the memory to be filled.
    fn entry(&self, read: &mut RawRead) -> (io_uring::squeue::Entry, Box<[libc::iovec]>) {
        let fd = types::Fd(read.file().handle().as_raw_fd());
        let offset = read.offset();
        let ours = |buffer: &&Buffer| self.registered && Arc::ptr_eq(buffer.ring(), &self.ring);
        let fixed = read.buffer().filter(ours).map(|buffer| buffer.index() as u16);
        let mut targets = read.targets();
        if let [target] = &mut targets[..] {
            let (at, len) = (target.as_mut_ptr(), target.len().min(READ_MAX) as u32);
            let entry = match fixed {
                Some(index) => opcode::ReadFixed::new(fd, at, len, index).offset(offset).build(),
                None => opcode::Read::new(fd, at, len).offset(offset).build(),
            };
            return (entry, Box::default());
        }
        let iovec = |target: &mut IoSliceMut<'_>| libc::iovec {
            iov_base: target.as_mut_ptr().cast(),
            iov_len: target.len(),
        };
        let targets: Box<[libc::iovec]> = targets.iter_mut().map(iovec).collect();
        let count = u32::try_from(targets.len()).expect("a record has few parts");
        (opcode::Readv::new(fd, targets.as_ptr(), count).offset(offset).build(), targets)
    }

    /// Collects completions; says whether the eventfd was rung.
    fn reap(&self, core: &mut Core, done: &mut Vec<RawDone>) -> bool {
        let mut woken = false;
        let Core { uring, slots, free, armed, .. } = core;
        for entry in uring.completion() {
            if entry.user_data() == WAKE {
                *armed = false;
                woken = true;
                continue;
            }
            let slot = entry.user_data() as usize;
            let submitted = slots.get_mut(slot).and_then(Option::take);
            let Some(Submitted { read, .. }) = submitted else { continue };
            free.push(slot);
            let result = match entry.result() {
                n @ 0.. => Ok(n as usize),
                errno => Err(io::Error::from_raw_os_error(-errno)),
            };
            done.push(RawDone { read, result });
        }
        if woken {
            self.hear();
        }
        woken
    }

    /// Empties the eventfd. What a ringer did before it rang is visible afterwards.
    fn hear(&self) {
        let _ = rustix::io::read(&self.waker, &mut [0; 8]);
        self.notified.swap(false, Ordering::AcqRel);
    }

    /// [`Engine::wait`] once `io_uring_enter` has died: nothing arrives any more.
    fn wait_broken(&self, core: &mut Core, errno: i32, done: &mut Vec<RawDone>) {
        core.backlog.extend(lock(&self.handed_over).drain(..));
        let in_flight = core.slots.iter_mut().filter_map(Option::take).map(|mut submitted| {
            submitted.read.quarantine();
            submitted.read
        });
        done.extend(
            in_flight
                .chain(core.backlog.drain(..))
                .map(|read| RawDone { read, result: Err(io::Error::from_raw_os_error(errno)) }),
        );
        if done.is_empty() {
            let _ = rustix::event::poll(&mut [PollFd::new(&self.waker, PollFlags::IN)], None);
            self.hear();
        }
    }
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        EngineKind::Uring.name()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn remark(&self) -> Option<String> {
        self.remark.clone()
    }

    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        if self.owner.get() != Some(&std::thread::current().id()) {
            let mut queue = lock(&self.handed_over);
            let before = queue.len();
            queue.extend(reads);
            let grew = queue.len() > before;
            drop(queue);
            if grew {
                self.wake();
            }
            return;
        }
        let mut core = lock(&self.core);
        core.backlog.extend(reads);
        if core.broken.is_none() {
            self.push(&mut core);
            if !core.uring.submission().is_empty() {
                core.enter(0);
            }
        }
    }

    fn wait(&self, done: &mut Vec<RawDone>) {
        let me = std::thread::current().id();
        assert_eq!(*self.owner.get_or_init(|| me), me, "wait() belongs to one thread");
        let mut core = lock(&self.core);
        core.enable();
        loop {
            if let Some(errno) = core.broken {
                return self.wait_broken(&mut core, errno, done);
            }
            self.push(&mut core);
            core.enter(1);
            let woken = self.reap(&mut core, done);
            if woken && core.broken.is_none() {
                self.push(&mut core);
                core.enter(0);
            }
            if woken || !done.is_empty() {
                return;
            }
        }
    }

    fn wake(&self) {
        if !self.notified.swap(true, Ordering::AcqRel) {
            // The counter cannot overflow with one ring per hearing, so this does not fail.
            let _ = rustix::io::write(&self.waker, &1u64.to_ne_bytes());
        }
    }
}

impl Core {
    /// Makes the calling thread the ring's only issuer.
    fn enable(&mut self) {
        if !self.enabled {
            self.enabled = true;
            if let Err(error) = self.uring.submitter().register_enable_rings() {
                self.broken = Some(errno_of(&error));
            }
        }
    }

    /// Submits what was pushed and waits for `want` completions. Passing refusals leave the
    /// entries in the queue for the next call.
    fn enter(&mut self, want: usize) {
        let Err(error) = self.uring.submit_and_wait(want) else { return };
        match errno_of(&error) {
            libc::EINTR | libc::EBUSY | libc::ETIME => {}
            // Out of memory for requests: those in flight will free some.
            libc::EAGAIN => std::thread::yield_now(),
            errno => self.broken = Some(errno),
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // Only reached with reads in flight when the owner did not drain them.
        for submitted in lock(&self.core).slots.iter_mut().flatten() {
            submitted.read.quarantine();
        }
    }
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring")
            .field("depth", &self.depth)
            .field("registered", &self.registered)
            .finish_non_exhaustive()
    }
}

fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// One no-op through a ring of its own: a sandbox may allow the set-up and refuse the rest.
fn self_test() -> io::Result<()> {
    let mut uring = IoUring::new(2)?;
    // SAFETY: a no-op points to no memory.
    unsafe { uring.submission().push(&opcode::Nop::new().build()) }.map_err(io::Error::other)?;
    loop {
        match uring.submit_and_wait(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(drop),
        }
    }
}

/// A ring, and whether it is enabled already. One that defers task work stays disabled until its
/// owner is known.
fn set_up(entries: u32) -> io::Result<(IoUring, bool)> {
    let modern = IoUring::builder()
        .dontfork()
        .setup_clamp()
        .setup_r_disabled()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(entries);
    match modern {
        Ok(uring) => Ok((uring, false)),
        Err(error) if errno_of(&error) == libc::EINVAL => {
            IoUring::builder().dontfork().setup_clamp().build(entries).map(|uring| (uring, true))
        }
        Err(error) => Err(error),
    }
}

fn register(uring: &IoUring, ring: &Ring) -> io::Result<()> {
    if ring.count() > REGISTERED_MAX {
        return Err(io::Error::other(format!("{} are more than {REGISTERED_MAX}", ring.count())));
    }
    let buffers: Vec<_> = (0..ring.count())
        .map(|n| libc::iovec {
            iov_base: ring.base().wrapping_add(n * ring.buffer_bytes()).cast(),
            iov_len: ring.buffer_bytes(),
        })
        .collect();
    // SAFETY: each range is one whole buffer of the mapping, which the engine keeps alive.
    unsafe { uring.submitter().register_buffers(&buffers) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use super::*;
    use crate::engine::Segment;
    use crate::file::File;
    use crate::sink::{Chunk, Held, Place, Sink};
    use crate::skip::skip;

    fn start(ring: &Arc<Ring>, depth: usize, register_buffers: bool) -> Option<Uring> {
        match Uring::new(ring, depth, register_buffers) {
            Err(Error::Engine { source, .. }) => {
                skip(format_args!("no io_uring: {source}"));
                None
            }
            other => Some(other.unwrap()),
        }
    }

    /// Has a place that is never read to.
    struct Nowhere(std::ptr::NonNull<[u8]>);

    // SAFETY: an address that nobody looks at.
    unsafe impl Send for Nowhere {}
    // SAFETY: as above.
    unsafe impl Sync for Nowhere {}

    impl Sink for Nowhere {
        fn chunk(&self, _: Chunk) {}
        fn done(&self, _: usize, _: Result<()>) {}
    }

    #[test]
    fn a_refused_registration_is_told() {
        let ring = Ring::new(crate::ring::PAGE, REGISTERED_MAX + 1).unwrap();
        let Some(engine) = start(&ring, 1, true) else { return };
        assert!(engine.remark().unwrap().contains("without registered buffers"));
        assert!(Uring::new(&ring, 1, false).unwrap().remark().is_none());
    }

    /// A ring that dies must fail its reads, not hang, and must not reuse their memory.
    #[test]
    fn a_dead_ring_fails_its_reads_and_keeps_their_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [7; 8192]).unwrap();
        let ring = Ring::new(8192, 4).unwrap();
        let Some(engine) = start(&ring, 4, false) else { return };
        let file = Arc::new(File::open(&path).unwrap());
        let read = |id| RawRead::new(id, Arc::clone(&file), 0, ring.take(0).unwrap(), 0, 8192);
        engine.submit(&mut std::iter::once(read(1)));
        let mut done = Vec::new();
        while done.is_empty() {
            engine.wait(&mut done);
        }
        assert_eq!(*done[0].result.as_ref().unwrap(), 8192);
        done.clear();
        assert_eq!(ring.free_count(), 4);

        let raw = lock(&engine.core).uring.as_raw_fd();
        // SAFETY: only the target of dup2; it is not closed through this handle.
        let mut fd = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(raw) });
        rustix::io::dup2(std::fs::File::open("/dev/null").unwrap(), &mut fd).unwrap();

        let sink = Arc::new(Nowhere(Box::leak(vec![0; 8192].into_boxed_slice()).into()));
        // SAFETY: the memory is leaked, and nobody looks at it.
        let place = unsafe { Place::new(sink.0.cast(), 0, 0) };
        let held = Held::new(place, Arc::clone(&sink) as Arc<dyn Sink>);
        let segments = vec![Segment { held, skip: 0, len: 8192 }];
        // SAFETY: the place is as long.
        let in_place = unsafe { RawRead::to_places(4, Arc::clone(&file), 0, segments) };
        engine.submit(&mut [read(2), in_place].into_iter());
        while done.len() < 2 {
            engine.wait(&mut done);
        }
        assert!(done.drain(..).all(|d| d.result.is_err()));
        assert_eq!(ring.free_count(), 3);
        assert_eq!(Arc::strong_count(&sink), 2, "what keeps the place is kept for ever");
        engine.submit(&mut std::iter::once(read(3)));
        engine.wait(&mut done);
        assert!(done.pop().unwrap().result.is_err());
        assert_eq!(ring.free_count(), 3);
        engine.wake();
        engine.wait(&mut done);
        assert!(done.is_empty());
    }
}
