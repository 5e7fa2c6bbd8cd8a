//! One suite for every engine: tensors in memory of their own, in the caller's, and in chunks; and
//! what becomes of them when something goes wrong.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::{READING, Random, Raw, folder, index, plain, start};
use tierstream_io::wrap::{Action, Fault, Rule};
use tierstream_io::{Config, EngineKind, Error as IoError, PAGE, Reader, Wrap};
use tierstream_safetensors::{Checkpoint, Error, ErrorKind, Loader};

/// A checkpoint of two shards, and what its tensors hold.
struct Fixture {
    folder: tempfile::TempDir,
    bytes: BTreeMap<String, Vec<u8>>,
}

impl Fixture {
    fn new() -> Self {
        let folder = folder();
        let mut random = Random(0x9E37_79B9_7F4A_7C15);
        let lens: [&[usize]; 2] = [
            // Neighbours, gaps when some are left out, more than a piece of 16 MiB.
            &[5, 0, 4096, 100_001, 1, 70_000, 17 << 20, 3, 200_000, 0],
            &[1 << 20, 7, 8 << 20, 123_456],
        ];
        let (mut bytes, mut map) = (BTreeMap::new(), Vec::new());
        for (shard, lens) in lens.iter().enumerate() {
            let file = format!("model-{shard}.safetensors");
            let mut tensors = Vec::new();
            for (n, len) in lens.iter().enumerate() {
                let tensor = Raw::bytes(&format!("t{shard}.{n}"), random.bytes(*len));
                map.push((tensor.name.clone(), file.clone()));
                bytes.insert(tensor.name.clone(), tensor.bytes.clone());
                tensors.push(tensor);
            }
            std::fs::write(folder.path().join(&file), plain(&tensors)).unwrap();
        }
        let pairs = map.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str()));
        std::fs::write(folder.path().join("model.safetensors.index.json"), index(pairs)).unwrap();
        Self { folder, bytes }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn shard(&self, n: usize) -> PathBuf {
        self.path().join(format!("model-{n}.safetensors"))
    }

    fn loader(&self, reader: Arc<Reader>) -> Loader {
        Loader::new(reader, Checkpoint::open(self.path()).unwrap()).unwrap()
    }

    /// Names in an order that is not that of the files.
    fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.bytes.keys().map(String::as_str).collect();
        names.reverse();
        names
    }

    /// Loads in all ways, and compares every byte.
    fn check(&self, loader: &Loader, names: &[&str]) {
        let loaded = loader.load(names, |_| true).unwrap();
        assert_eq!(loaded.len(), names.len());
        for (name, (tensor, bytes)) in names.iter().zip(loaded.iter()) {
            assert_eq!(&tensor.name, name);
            assert!(bytes == self.bytes[*name], "{name} of its own");
            assert_eq!(bytes.as_ptr().addr() % PAGE, tensor.offset as usize % PAGE);
            assert!(
                loaded.get(name) == Some(bytes) || names.iter().filter(|n| *n == name).count() > 1
            );
        }

        let room = |name: &&str| vec![0xEE; self.bytes[*name].len()];
        let mut buffers: Vec<Vec<u8>> = names.iter().map(room).collect();
        let pairs = names.iter().zip(buffers.iter_mut().map(Vec::as_mut_slice));
        loader.load_into(pairs, |_| true).unwrap();
        for (name, buffer) in names.iter().zip(&buffers) {
            assert!(*buffer == self.bytes[*name], "{name} of the caller's");
        }

        let mut seen: Vec<Vec<bool>> =
            names.iter().map(|n| vec![false; self.bytes[*n].len()]).collect();
        let took = loader.stream(names, |chunk| {
            let range = chunk.offset as usize..chunk.offset as usize + chunk.len();
            assert!(chunk[..] == self.bytes[names[chunk.piece]][range.clone()]);
            seen[chunk.piece][range]
                .iter_mut()
                .for_each(|seen| assert!(!std::mem::replace(seen, true)));
            true
        });
        took.unwrap();
        assert!(seen.iter().flatten().all(|seen| *seen));
    }
}

/// A reader of every engine that starts here, with buffers of several sizes.
fn everywhere(test: impl Fn(Arc<Reader>)) {
    for engine in READING {
        for (buffer_bytes, count) in [(1 << 16, 3), (1 << 20, 8)] {
            let config = Config {
                engine,
                buffer_bytes,
                ring_bytes: count * buffer_bytes,
                ..Config::default()
            };
            let Some(reader) = start(config) else { continue };
            println!("{engine}, {count} x {buffer_bytes}");
            test(reader);
        }
    }
}

#[test]
fn tensors_arrive() {
    let fixture = Fixture::new();
    let names = fixture.names();
    everywhere(|reader| {
        let loader = fixture.loader(Arc::clone(&reader));
        fixture.check(&loader, &names);
        fixture.check(&loader, &[]);
        fixture.check(&loader, &["t0.1"]);
        fixture.check(&loader, &["t1.1", "t0.0", "t1.1"]);
        let every_other: Vec<&str> = names.iter().copied().step_by(2).collect();
        fixture.check(&loader, &every_other);

        let all = loader.load_all(|_| true).unwrap();
        let tensors = loader.checkpoint().tensors();
        assert_eq!(all.len(), tensors.len());
        for ((tensor, bytes), expected) in all.iter().zip(tensors) {
            assert_eq!(tensor, expected);
            assert!(bytes == fixture.bytes[&tensor.name]);
        }
        // Whatever else becomes of them, memory is held as long as somebody has it.
        let clone = all.clone();
        drop((all, loader, reader));
        assert!(clone.get("t0.6").unwrap() == fixture.bytes["t0.6"]);
        assert_eq!(clone.get("t0.60"), None);
    });
}

#[test]
fn all_of_a_file_is_read_once_and_lands_without_a_copy() {
    let fixture = Fixture::new();
    everywhere(|reader| {
        let loader = fixture.loader(Arc::clone(&reader));
        let files = loader.checkpoint().files();
        let data: u64 = files.iter().map(|file| file.len - file.data_offset).sum();
        let all = loader.load_all(|_| true).unwrap();
        let stats = reader.stats();
        assert_eq!(stats.bytes_wanted, data);
        // Of each file, the block that its data begins in and the one that it ends in.
        assert!(stats.bytes_read <= data + 4 * PAGE as u64, "{stats:?}");
        assert!(all.held_bytes() as u64 <= data + 4 * PAGE as u64);
    });
}

#[test]
fn threads_share_a_loader() {
    let fixture = Fixture::new();
    everywhere(|reader| {
        let loader = fixture.loader(reader);
        std::thread::scope(|scope| {
            for name in ["t0.3", "t1.2", "t0.6"] {
                let (fixture, loader) = (&fixture, &loader);
                scope.spawn(move || fixture.check(loader, &[name, "t0.8"]));
            }
        });
    });
}

#[test]
fn progress_grows_to_the_whole() {
    let fixture = Fixture::new();
    let names = ["t0.3", "t0.6", "t1.2", "t0.3"];
    let bytes = |names: &[&str]| names.iter().map(|n| fixture.bytes[*n].len() as u64).sum::<u64>();
    everywhere(|reader| {
        let loader = fixture.loader(reader);
        let seen = Mutex::new(Vec::new());
        let watch = |total: u64| {
            let seen = &seen;
            move |progress: tierstream_safetensors::Progress| {
                assert_eq!(progress.bytes_total, total);
                seen.lock().unwrap().push(progress.bytes_done);
                true
            }
        };
        let check = |total: u64, least: usize| {
            let seen = std::mem::take(&mut *seen.lock().unwrap());
            assert!(seen.is_sorted() && seen.last() == Some(&total), "{seen:?}");
            assert!(seen.len() >= least, "{seen:?}");
        };
        // What is asked for twice is loaded once, and into the caller's buffers twice.
        loader.load(names, watch(bytes(&names[..3]))).unwrap();
        check(bytes(&names[..3]), 4);
        let mut buffers = names.map(|name| vec![0; fixture.bytes[name].len()]);
        let pairs = names.iter().zip(buffers.iter_mut().map(Vec::as_mut_slice));
        loader.load_into(pairs, watch(bytes(&names))).unwrap();
        check(bytes(&names), 20);
    });
}

#[test]
fn a_load_is_cancelled() {
    let fixture = Fixture::new();
    everywhere(|reader| {
        let loader = fixture.loader(Arc::clone(&reader));
        let cancelled = |result: Result<(), Error>| {
            let error = result.unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Cancelled), "{error:?}");
            assert_eq!(error.to_string(), "cancelled");
        };
        let mut calls = 0;
        cancelled(
            loader
                .load_all(|_| {
                    calls += 1;
                    calls < 2
                })
                .map(drop),
        );
        assert_eq!(calls, 2);
        // Its memory is not given back under a read.
        assert_eq!(reader.in_flight(), 0);
        let mut buffer = vec![0; 17 << 20];
        cancelled(loader.load_into([("t0.6", &mut buffer[..])], |_| false));
        cancelled(loader.stream(["t0.6"], |_| false));
        fixture.check(&loader, &["t0.8"]);
    });
}

#[test]
fn a_panic_of_the_callers_cancels_too() {
    let fixture = Fixture::new();
    let reader = Arc::new(Reader::new(Config::default()).unwrap());
    let loader = fixture.loader(Arc::clone(&reader));
    let panics = |load: &dyn Fn()| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(load)).unwrap_err();
    };
    panics(&|| drop(loader.load_all(|_| panic!("meant"))));
    panics(&|| drop(loader.stream(["t0.6"], |_| panic!("meant"))));
    fixture.check(&loader, &["t0.8", "t1.3"]);
    while reader.in_flight() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn what_is_asked_wrongly_reads_nothing() {
    let fixture = Fixture::new();
    let reader = Arc::new(Reader::new(Config::default()).unwrap());
    let loader = fixture.loader(Arc::clone(&reader));
    let unknown = |error: Error| {
        assert!(matches!(error.kind(), ErrorKind::UnknownTensor), "{error}");
        assert_eq!(error.tensor(), Some("t9"));
    };
    unknown(loader.load(["t0.0", "t9"], |_| true).unwrap_err());
    unknown(loader.load_into([("t9", &mut [][..])], |_| true).unwrap_err());
    unknown(loader.stream(["t0.0", "t9"], |_| true).unwrap_err());
    for len in [4, 6] {
        let mut buffer = vec![0; len];
        let error = loader.load_into([("t0.0", &mut buffer[..])], |_| true).unwrap_err();
        let told = matches!(
            error.kind(),
            ErrorKind::BufferLen { expected: 5, found } if *found == len as u64
        );
        assert!(told, "{error}");
        assert_eq!(error.tensor(), Some("t0.0"));
    }
    assert_eq!(reader.stats().reads, 0);
}

/// Everything that loads, of one name.
fn all_ways(loader: &Loader, name: &str) -> [Result<(), Error>; 3] {
    let mut buffer = vec![0; loader.checkpoint().tensor(name).unwrap().len as usize];
    [
        loader.load([name], |_| true).map(drop),
        loader.load_into([(name, &mut buffer[..])], |_| true),
        loader.stream([name], |_| true),
    ]
}

#[test]
fn a_read_error_names_the_tensor_and_the_file() {
    let fixture = Fixture::new();
    let checkpoint = Checkpoint::open(fixture.path()).unwrap();
    // In the middle of the large one; in one of the small; in the second file.
    for (name, skip) in [("t0.6", 9 << 20), ("t0.4", 0), ("t1.2", 5 << 20), ("t1.3", 123_455)] {
        let tensor = checkpoint.tensor(name).unwrap();
        let at = tensor.offset + skip;
        for engine in READING {
            let path = fixture.shard(tensor.file);
            let rule = Rule::all(Action::Errno(5)).path(&path).bytes(at..at + 1);
            let wrap: Wrap = Box::new(|inner| Box::new(Fault::new(inner, vec![rule]).unwrap()));
            // Reads small enough that few tensors share one.
            let (buffer_bytes, ring_bytes) = (PAGE, 4 * PAGE);
            let config =
                Config { engine, buffer_bytes, ring_bytes, wrap: Some(wrap), ..Config::default() };
            let Some(reader) = start(config) else { continue };
            let loader = fixture.loader(Arc::clone(&reader));
            let mut results = all_ways(&loader, name).to_vec_of_errors();
            results.push(loader.load_all(|_| true).unwrap_err());
            results.push(loader.stream(fixture.names(), |_| true).unwrap_err());
            for error in results {
                let read = matches!(error.kind(), ErrorKind::Reader(IoError::Read { .. }));
                assert!(read, "{error:?}");
                assert_eq!(error.path(), Some(&*path));
                let text = error.to_string();
                assert!(text.contains(path.to_str().unwrap()), "{text}");
                assert!(std::error::Error::source(&error).is_some());
                // The read that failed began with it, or with another of its page.
                let blamed = checkpoint.tensor(error.tensor().unwrap()).unwrap();
                assert_eq!(blamed.file, tensor.file);
                assert!(blamed.offset <= at && blamed.end() + PAGE as u64 > at, "{error}");
                if skip > PAGE as u64 {
                    assert_eq!(error.tensor(), Some(name));
                }
            }
            // The others are not hurt.
            fixture.check(&loader, &["t0.8", "t1.0"]);
        }
    }
}

trait Errors {
    fn to_vec_of_errors(self) -> Vec<Error>;
}

impl Errors for [Result<(), Error>; 3] {
    fn to_vec_of_errors(self) -> Vec<Error> {
        self.into_iter().map(|result| result.expect_err("must fail")).collect()
    }
}

#[test]
fn a_file_that_shrinks_or_changes_is_an_error() {
    everywhere(|reader| {
        let fixture = Fixture::new();
        let loader = fixture.loader(Arc::clone(&reader));
        let shard = fixture.shard(1);
        let file = std::fs::File::options().write(true).open(&shard).unwrap();
        let len = file.metadata().unwrap().len();

        // Cut within the last tensor: it is missed, and what is still there is no longer trusted.
        file.set_len(len - 100_000).unwrap();
        for error in all_ways(&loader, "t1.3").to_vec_of_errors() {
            let cut = matches!(error.kind(), ErrorKind::Reader(IoError::Truncated { .. }));
            assert!(cut, "{error:?}");
            assert_eq!((error.tensor(), error.path()), (Some("t1.3"), Some(&*shard)));
        }
        for error in all_ways(&loader, "t1.0").to_vec_of_errors() {
            let changed = matches!(error.kind(), ErrorKind::Reader(IoError::Changed { .. }));
            assert!(changed, "{error:?}");
            assert_eq!(error.path(), Some(&*shard));
        }
        // The other file is as it was.
        fixture.check(&loader, &["t0.3"]);

        // As long as before, but written to.
        file.set_len(len).unwrap();
        let error = loader.load_all(|_| true).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Reader(IoError::Changed { .. })), "{error:?}");
    });
}

#[test]
fn a_file_that_is_not_what_its_header_was_read_from_is_an_error() {
    let fixture = Fixture::new();
    let reader = Arc::new(Reader::new(Config::default()).unwrap());
    let shard = fixture.shard(0);
    let changed = |checkpoint: &Arc<Checkpoint>| {
        let error = Loader::new(Arc::clone(&reader), Arc::clone(checkpoint)).unwrap_err();
        let changed = matches!(error.kind(), ErrorKind::Reader(IoError::Changed { .. }));
        assert!(changed, "{error:?}");
        assert_eq!(error.path(), Some(&*shard));
    };
    let checkpoint = Arc::new(Checkpoint::open(fixture.path()).unwrap());
    // Another file with the same bytes and the same time.
    let (copy, modified) =
        (fixture.path().join("copy"), std::fs::metadata(&shard).unwrap().modified().unwrap());
    std::fs::copy(&shard, &copy).unwrap();
    std::fs::File::options().write(true).open(&copy).unwrap().set_modified(modified).unwrap();
    std::fs::rename(&copy, &shard).unwrap();
    changed(&checkpoint);

    let checkpoint = Arc::new(Checkpoint::open(fixture.path()).unwrap());
    let file = std::fs::File::options().write(true).open(&shard).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    changed(&checkpoint);
    let checkpoint = Arc::new(Checkpoint::open(fixture.path()).unwrap());
    file.set_len(100).unwrap();
    changed(&checkpoint);
    std::fs::remove_file(&shard).unwrap();
    let error = Loader::new(Arc::clone(&reader), checkpoint).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Reader(IoError::Open { .. })), "{error:?}");
}

/// Loads on the reader's own thread, which would wait for itself.
#[test]
fn a_load_from_inside_a_sink_is_an_error() {
    use tierstream_io::{Chunk, Extent, Priority, Sink};

    struct Inside(Mutex<Option<Loader>>);
    impl Sink for Inside {
        fn chunk(&self, _: Chunk) {
            let Some(loader) = self.0.lock().unwrap().take() else { return };
            for error in all_ways(&loader, "t0.3").to_vec_of_errors() {
                assert!(
                    matches!(error.kind(), ErrorKind::Reader(IoError::InsideSink)),
                    "{error:?}"
                );
            }
        }
        fn done(&self, _: usize, result: Result<(), IoError>) {
            result.unwrap();
        }
    }
    let fixture = Fixture::new();
    for engine in [EngineKind::Pread, EngineKind::Buffered] {
        let reader = start(Config { engine, ..Config::default() }).unwrap();
        let loader = fixture.loader(Arc::clone(&reader));
        let file = reader.open(&fixture.shard(0)).unwrap();
        let sink = Arc::new(Inside(Mutex::new(Some(loader))));
        let extent = Extent { file, offset: 0, len: 10 };
        reader.submit(Priority::Demand, vec![extent], sink).wait().unwrap();
    }
}
