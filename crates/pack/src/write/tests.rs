//! Packing on a disk that fills, and loses power at any moment: a write that was not synced has then
//! happened, or not, or in part.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use proptest::prelude::*;
use tierstream_io::Config;
use tierstream_synth::{Arch, Spec};

use super::*;
use crate::Pack;

/// Bytes of a file as they are, and what is not yet surely on the drive.
#[derive(Clone, Default)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
    allocated: u64,
}

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Len(usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Change::Write(at, new) => {
                bytes.resize(bytes.len().max(at + new.len()), 0);
                bytes[*at..at + new.len()].copy_from_slice(new);
            }
            Change::Len(len) => bytes.resize(*len, 0),
        }
    }
}

type Names = BTreeMap<PathBuf, usize>;

#[derive(Default)]
struct State {
    inodes: RefCell<Vec<Inode>>,
    names: RefCell<Names>,
    /// As they were after each change since the last sync, the first being that of the sync.
    history: RefCell<Vec<Names>>,
    /// Changes until the power goes; how many there were.
    left: Cell<u64>,
    made: Cell<u64>,
    is_dead: Cell<bool>,
    /// Bytes in all.
    capacity: u64,
    random: Cell<u64>,
}

#[derive(Clone)]
struct Memory(Rc<State>);

struct MemoryFile {
    disk: Memory,
    inode: usize,
}

fn dead() -> io::Error {
    io::Error::other("the power is gone")
}

impl Memory {
    fn new(capacity: u64, seed: u64) -> Self {
        let history = RefCell::new(vec![Names::new()]);
        let (left, random) = (Cell::new(u64::MAX), Cell::new(seed));
        Self(Rc::new(State { capacity, left, history, random, ..State::default() }))
    }

    fn below(&self, end: u64) -> u64 {
        // SplitMix64.
        let state = self.0.random.get().wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.0.random.set(state);
        let x = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let x = x ^ (x >> 31);
        x % end.max(1)
    }

    /// Whether the power is there, and stays for another change.
    fn change(&self) -> io::Result<()> {
        self.0.made.set(self.0.made.get() + 1);
        match self.0.left.get() {
            0 => {
                self.0.is_dead.set(true);
                Err(dead())
            }
            left => {
                self.0.left.set(left - 1);
                Ok(())
            }
        }
    }

    /// What is there when the power comes back.
    fn after_loss(&self) -> Self {
        let next = Memory::new(self.0.capacity, self.below(u64::MAX));
        for inode in self.0.inodes.borrow().iter() {
            let mut bytes = inode.durable.clone();
            for change in &inode.pending {
                match (self.below(3), change) {
                    (0, _) => {}
                    (1, Change::Write(at, new)) => {
                        let kept = self.below(new.len() as u64 + 1) as usize;
                        Change::Write(*at, new[..kept].to_vec()).apply(&mut bytes);
                    }
                    (_, change) => change.apply(&mut bytes),
                }
            }
            let (now, allocated) = (bytes.clone(), bytes.len() as u64);
            let inode = Inode { now, durable: bytes, pending: Vec::new(), allocated };
            next.0.inodes.borrow_mut().push(inode);
        }
        let history = self.0.history.borrow();
        let names = history[self.below(history.len() as u64) as usize].clone();
        *next.0.names.borrow_mut() = names.clone();
        *next.0.history.borrow_mut() = vec![names];
        next
    }

    fn rename_all(&self, change: impl FnOnce(&mut Names)) {
        let mut names = self.0.names.borrow_mut();
        change(&mut names);
        self.0.history.borrow_mut().push(names.clone());
    }

    fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let inode = *self.0.names.borrow().get(path)?;
        Some(self.0.inodes.borrow()[inode].now.clone())
    }

    fn used(&self) -> u64 {
        let names = self.0.names.borrow();
        let inodes = self.0.inodes.borrow();
        names.values().map(|&n| inodes[n].allocated).sum()
    }
}

impl Disk for Memory {
    type File = MemoryFile;

    fn open(&self, path: &Path) -> io::Result<Option<MemoryFile>> {
        let known = self.0.names.borrow().get(path).copied();
        let inode = match known {
            Some(inode) => inode,
            None => {
                self.change()?;
                self.0.inodes.borrow_mut().push(Inode::default());
                let inode = self.0.inodes.borrow().len() - 1;
                self.rename_all(|names| _ = names.insert(path.to_owned(), inode));
                inode
            }
        };
        Ok(Some(MemoryFile { disk: self.clone(), inode }))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.0.names.borrow().contains_key(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change()?;
        self.rename_all(|names| {
            let inode = names.remove(from).expect("there");
            assert!(names.insert(to.to_owned(), inode).is_none());
        });
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change()?;
        self.rename_all(|names| _ = names.remove(path));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.change()?;
        *self.0.history.borrow_mut() = vec![self.0.names.borrow().clone()];
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(self.0.capacity.saturating_sub(self.used()))
    }
}

impl MemoryFile {
    fn with<T>(&self, f: impl FnOnce(&mut Inode) -> T) -> T {
        f(&mut self.disk.0.inodes.borrow_mut()[self.inode])
    }

    fn put(&self, change: Change) {
        self.with(|inode| {
            change.apply(&mut inode.now);
            inode.pending.push(change);
        });
    }
}

impl DiskFile for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|inode| inode.now.len() as u64))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.with(|inode| inode.allocated))
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|inode| {
            let bytes = inode.now.get(offset as usize..offset as usize + into.len());
            into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.disk.0.is_dead.get() {
            return Err(dead());
        }
        // What finds no room, finds none behind its first bytes.
        let end = offset + bytes.len() as u64;
        let more = end.saturating_sub(self.with(|inode| inode.allocated));
        if more > self.disk.free_bytes()? {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.with(|inode| inode.allocated += more);
        let powered = self.disk.change();
        let kept = match powered {
            Ok(()) => bytes.len(),
            // The last thing that happens.
            Err(_) => self.disk.below(bytes.len() as u64 + 1) as usize,
        };
        self.put(Change::Write(offset as usize, bytes[..kept].to_vec()));
        powered
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.change()?;
        self.put(Change::Len(len as usize));
        self.with(|inode| inode.allocated = inode.allocated.min(len));
        Ok(())
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let more = len.saturating_sub(self.with(|inode| inode.allocated));
        if more > self.disk.free_bytes()? {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.with(|inode| inode.allocated += more);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.change()?;
        self.with(|inode| {
            inode.pending.clear();
            inode.durable = inode.now.clone();
        });
        Ok(())
    }

    fn forget(&self, _: u64, _: u64) {}
}

struct Source {
    dir: tempfile::TempDir,
    model: Model,
    reader: Arc<Reader>,
    options: Options,
}

const TARGET: &str = "model.tspack";

impl Source {
    fn new() -> Self {
        Self::of_seed(0)
    }

    fn of_seed(seed: u64) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/../../target");
        let dir = dir.unwrap();
        let mut spec = Spec::new(Arch::Olmoe).experts(6, 2);
        (spec.n_layer, spec.vocab, spec.seed) = (2, 256, seed);
        let written = spec.write(dir.path().join("model.gguf")).unwrap();
        let model = Model::open(&written.files[0]).unwrap();
        let reader = Arc::new(Reader::new(Config::default()).unwrap());
        Self { dir, model, reader, options: Options::default() }
    }

    fn writer(&self) -> Writer {
        let target = Path::new(TARGET);
        let writer = Writer::new(&self.model, target, self.options, self.reader.clone()).unwrap();
        Writer { sync_every_bytes: 100_000, ..writer }
    }

    /// The packed file, made on `disk`.
    fn packed(&self, disk: &Memory) -> Vec<u8> {
        self.writer().write_to(disk, &mut |_| true).unwrap();
        disk.bytes(Path::new(TARGET)).unwrap()
    }
}

#[test]
fn what_was_written_has_its_checksums() {
    let source = Source::new();
    let tensors = source.model.tensors().len() as u64 - 2 * 3;
    for experts_only in [false, true] {
        let path = source.dir.path().join(format!("{experts_only}.tspack"));
        let (reader, options) = (source.reader.clone(), Options { experts_only });
        let writer = Writer::new(&source.model, &path, options, reader).unwrap();
        let packed = writer.write(&mut |_| true).unwrap();
        let pack = Pack::open(&path).unwrap();
        let checked = pack.check(&source.reader, &mut |_| true).unwrap();
        assert_eq!((checked.records, checked.tensors), (2 * 6, tensors));
        assert_eq!(checked.bytes, source.model.tensor_bytes());
        let dense = Experts::group(&source.model).unwrap().dense_bytes();
        assert_eq!(packed.total_bytes, checked.bytes - if experts_only { dense } else { 0 });
    }
    // What the last one leaves in the model's file is looked at there.
    let norm = source.model.tensor("output_norm.weight").unwrap();
    let path = &source.model.files()[0].path;
    let mut bytes = std::fs::read(path).unwrap();
    bytes[norm.offset as usize] ^= 1;
    std::fs::write(path, bytes).unwrap();
    let pack = Pack::open(&source.dir.path().join("true.tspack")).unwrap();
    let reader = Arc::new(Reader::new(Config::default()).unwrap());
    match pack.check(&reader, &mut |_| true) {
        Err(Error::Checksum { path: told, what, offset }) => {
            assert_eq!((&told, offset), (path, norm.offset));
            assert!(what.contains("output_norm"), "{what}");
        }
        other => panic!("{other:?}"),
    }
}

/// Stops packing after so many changes of the disk, and lets the power come back.
fn lose_power(source: &Source, disk: &Memory, after: u64) -> Memory {
    disk.0.left.set(after);
    let _ = source.writer().write_to(disk, &mut |_| true);
    disk.after_loss()
}

#[test]
fn power_may_be_lost_at_every_change() {
    for experts_only in [false, true] {
        let options = Options { experts_only };
        lose_power_at_every_change(&Source { options, ..Source::new() });
    }
}

fn lose_power_at_every_change(source: &Source) {
    let undisturbed = Memory::new(1 << 30, 1);
    let expected = source.packed(&undisturbed);
    let changes = undisturbed.0.made.get();
    assert!(changes > 30, "{changes}");
    let (mut resumed, mut complete) = (0, 0);
    for after in 0..=changes {
        // The last steps are the ones that give it its name.
        let seeds = if after + 8 > changes { 20 } else { 3 };
        for seed in 1..=seeds {
            let disk = lose_power(source, &Memory::new(1 << 30, seed * 7919 + after), after);
            // Nor is it one under another name, should somebody give it the final one.
            let partial = disk.bytes(Path::new("model.tspack.partial")).unwrap_or_default();
            let has_front = partial.starts_with(&expected[..crate::ALIGN as usize]);
            assert!(!has_front || partial == expected, "after {after} changes");
            if let Some(bytes) = disk.bytes(Path::new(TARGET)) {
                assert!(bytes == expected, "incomplete under its name after {after} changes");
                complete += 1;
                continue;
            }
            let packed = source.writer().write_to(&disk, &mut |_| true).unwrap();
            resumed += u32::from(packed.resumed_bytes > 0);
            assert!(disk.bytes(Path::new(TARGET)).unwrap() == expected, "after {after} changes");
        }
    }
    assert!(resumed > 10 && complete > 0, "{resumed} {complete}");
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, cases: 24, ..Default::default()
    })]

    /// With two models in turns, of the same shape.
    #[test]
    fn power_may_be_lost_again_and_again(
        losses in prop::collection::vec((0u64..60, 0usize..2), 1..8),
        seed in 1u64..u64::MAX,
    ) {
        let sources = [Source::of_seed(0), Source::of_seed(1)];
        let expected = [0, 1].map(|n| sources[n].packed(&Memory::new(1 << 30, 1)));
        prop_assert!(expected[0] != expected[1] && expected[0].len() == expected[1].len());
        let mut disk = Memory::new(1 << 30, seed);
        for &(after, which) in &losses {
            disk = lose_power(&sources[which], &disk, after);
            if let Some(bytes) = disk.bytes(Path::new(TARGET)) {
                prop_assert!(bytes == expected[which]);
                return Ok(());
            }
        }
        let last = losses[0].1;
        prop_assert!(sources[last].packed(&disk) == expected[last]);
    }

    #[test]
    fn a_full_disk_is_an_error_and_no_more(share in 0.0f64..1.0, seed in 1u64..u64::MAX) {
        let source = Source::new();
        let expected = source.packed(&Memory::new(1 << 30, 1));
        let small = Memory::new((expected.len() as f64 * share) as u64, seed);
        let error = source.writer().write_to(&small, &mut |_| true).unwrap_err();
        let told = match &error {
            Error::NoRoom { needed, free, .. } => needed > free,
            Error::Io { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            _ => false,
        };
        prop_assert!(told, "{error:?}");
        prop_assert!(error.hint().is_some());
        prop_assert_eq!(small.bytes(Path::new(TARGET)), None);
        // Nor is anything left of it.
        prop_assert_eq!(small.used(), 0);
    }
}

#[test]
fn a_disk_that_fills_meanwhile_is_gone_on_with_later() {
    let source = Source::new();
    let undisturbed = Memory::new(1 << 30, 1);
    let expected = source.packed(&undisturbed);
    let disk = Memory::new(1 << 30, 1);
    let mut told = 0;
    // Somebody else takes the room, where the file system could not keep it for us.
    let error = source.writer().write_to(&disk, &mut |p| {
        if p.done_bytes > p.total_bytes / 2 && told == 0 {
            told = 1;
            let mut inodes = disk.0.inodes.borrow_mut();
            let partial = disk.0.names.borrow()[Path::new("model.tspack.partial")];
            inodes[partial].allocated = 0;
            let full = Inode { allocated: 1 << 30, ..Inode::default() };
            inodes.push(full);
            disk.0.names.borrow_mut().insert("other".into(), inodes.len() - 1);
        }
        true
    });
    let error = error.unwrap_err();
    assert!(
        matches!(&error, Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull),
        "{error:?}"
    );
    assert_eq!(disk.bytes(Path::new(TARGET)), None);
    disk.remove(Path::new("other")).unwrap();
    let packed = source.writer().write_to(&disk, &mut |_| true).unwrap();
    assert!(packed.resumed_bytes > 0);
    assert!(disk.bytes(Path::new(TARGET)).unwrap() == expected);
}

#[test]
fn who_stops_it_goes_on_later() {
    let source = Source::new();
    let expected = source.packed(&Memory::new(1 << 30, 1));
    let disk = Memory::new(1 << 30, 1);
    let mut told = Vec::new();
    let half = |p: Progress| p.done_bytes < p.total_bytes / 2;
    let stopped = source.writer().write_to(&disk, &mut |p| {
        told.push(p.done_bytes);
        half(p)
    });
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert!(told.is_sorted() && told[0] == 0);
    assert_eq!(disk.bytes(Path::new(TARGET)), None);
    let packed = source.writer().write_to(&disk, &mut |_| true).unwrap();
    assert!(packed.resumed_bytes > 0 && packed.resumed_bytes < packed.total_bytes);
    assert!(disk.bytes(Path::new(TARGET)).unwrap() == expected);
    // Nothing is left beside it.
    assert_eq!(disk.0.names.borrow().len(), 1);
    let again = source.writer().write_to(&disk, &mut |_| true);
    assert!(matches!(again, Err(Error::Exists { .. })));
}

#[test]
fn what_was_written_of_another_file_is_not_taken_up() {
    let mut source = Source::new();
    let disk = Memory::new(1 << 30, 1);
    let stopped = source.writer().write_to(&disk, &mut |p| p.done_bytes < p.total_bytes / 2);
    assert!(matches!(stopped, Err(Error::Cancelled)));
    // The same header, and other weights.
    let path = source.model.files()[0].path.clone();
    let mut bytes = std::fs::read(&path).unwrap();
    let data = source.model.files()[0].data_offset as usize;
    bytes[data..].iter_mut().for_each(|byte| *byte ^= 1);
    std::fs::write(&path, bytes).unwrap();
    source.model = Model::open(&path).unwrap();
    let packed = source.writer().write_to(&disk, &mut |_| true).unwrap();
    assert_eq!(packed.resumed_bytes, 0);
    let expected = source.packed(&Memory::new(1 << 30, 1));
    assert!(disk.bytes(Path::new(TARGET)).unwrap() == expected);
}

#[test]
fn a_source_that_changes_meanwhile_is_an_error() {
    for (len, wanted) in [(None, "Changed"), (Some(5000), "")] {
        let source = Source::new();
        let path = source.model.files()[0].path.clone();
        let disk = Memory::new(1 << 30, 1);
        let writer = source.writer();
        let mut done = false;
        let result = writer.write_to(&disk, &mut |_| {
            if !std::mem::replace(&mut done, true) {
                let file = std::fs::File::options().write(true).open(&path).unwrap();
                match len {
                    Some(len) => file.set_len(len).unwrap(),
                    None => {
                        use std::os::unix::fs::FileExt;
                        file.write_all_at(b"x", source.model.files()[0].len - 1).unwrap();
                        let later =
                            std::time::SystemTime::now() + std::time::Duration::from_secs(9);
                        file.set_modified(later).unwrap();
                    }
                }
            }
            true
        });
        let error = format!("{:?}", result.unwrap_err());
        assert!(error.starts_with("Source(") && error.contains(wanted), "{error}");
        assert_eq!(disk.bytes(Path::new(TARGET)), None);
    }
}

#[test]
fn a_drive_error_of_the_source_is_one_and_is_gone_on_from() {
    use tierstream_io::wrap::{Action, Fault, Rule};
    let mut source = Source::new();
    let expected = source.packed(&Memory::new(1 << 30, 1));
    let last = source.model.files()[0].len - 1;
    let rule = Rule::all(Action::Errno(5)).bytes(last..last + 1);
    let wrap: tierstream_io::Wrap =
        Box::new(|engine| Box::new(Fault::new(engine, vec![rule]).unwrap()));
    let good = source.reader.clone();
    source.reader =
        Arc::new(Reader::new(Config { wrap: Some(wrap), ..Config::default() }).unwrap());
    let disk = Memory::new(1 << 30, 1);
    let error = source.writer().write_to(&disk, &mut |_| true).unwrap_err();
    assert!(matches!(&error, Error::Source(tierstream_io::Error::Read { .. })), "{error:?}");
    assert!(error.to_string().contains("model.gguf"), "{error}");
    assert_eq!(disk.bytes(Path::new(TARGET)), None);
    source.reader = good;
    let packed = source.writer().write_to(&disk, &mut |_| true).unwrap();
    assert!(packed.resumed_bytes > 0);
    assert!(disk.bytes(Path::new(TARGET)).unwrap() == expected);
}

#[test]
fn a_damaged_partial_file_is_not_taken_up() {
    let source = Source::new();
    let expected = source.packed(&Memory::new(1 << 30, 1));
    let disk = Memory::new(1 << 30, 1);
    let stopped = source.writer().write_to(&disk, &mut |p| p.done_bytes < p.total_bytes / 2);
    assert!(matches!(stopped, Err(Error::Cancelled)));
    let partial = disk.open(Path::new("model.tspack.partial")).unwrap().unwrap();
    partial.set_len(4096).unwrap();
    let packed = source.writer().write_to(&disk, &mut |_| true).unwrap();
    assert_eq!(packed.resumed_bytes, 0);
    assert!(disk.bytes(Path::new(TARGET)).unwrap() == expected);
}

#[test]
fn names_follow_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let name = |source: &str| {
        let target = target(Path::new(source), dir.path());
        target.file_name().unwrap().to_str().unwrap().to_owned()
    };
    assert_eq!(name("/models/a.b.gguf"), "a.b.tspack");
    assert_eq!(name("q-00001-of-00003.gguf"), "q.tspack");
    assert_eq!(name("q-1-of-3.gguf"), "q-1-of-3.tspack");
    let file = dir.path().join("x");
    assert_eq!(target(Path::new("a.gguf"), &file), file);
}

#[test]
fn another_process_is_told_of() {
    let source = Source::new();
    let target = source.dir.path().join(TARGET);
    let writer = |target: &Path| {
        Writer::new(&source.model, target, Options::default(), source.reader.clone()).unwrap()
    };
    let other = writer(&target);
    let mut second = None;
    let stopped = writer(&target).write(&mut |_| {
        let other = writer(&target).write(&mut |_| true);
        second = Some(other.unwrap_err());
        false
    });
    assert!(matches!(second, Some(Error::Busy { .. })), "{second:?}");
    assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
    other.write(&mut |_| true).unwrap();
    let names: Vec<_> = std::fs::read_dir(source.dir.path()).unwrap().collect();
    assert_eq!(names.len(), 2);
}
