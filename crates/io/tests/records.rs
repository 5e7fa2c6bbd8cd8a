//! Records: parts that lie side by side in a file, and apart in memory, come with one read.

mod support;

use std::ops::Range;

use support::{Fixture, Places, READING, extent, start};
use tierstream_io::wrap::{Action, Fault, Rule};
use tierstream_io::{Config, Error, Extent, FileId, Priority, Reader, Wrap};

/// Bytes of the parts of a record, and where each begins in it.
const PARTS: [(u64, u64); 3] = [(0, 70_000), (73_728, 65_536), (139_264, 99_000)];
const RECORD_BYTES: u64 = 241_664;
const RECORDS: u64 = 5;

fn records(file: FileId, which: Range<u64>) -> Vec<Extent> {
    let at = |record: u64| 4096 + record * RECORD_BYTES;
    which.flat_map(|r| PARTS.map(|(start, len)| extent(file, at(r) + start, len))).collect()
}

fn fixture() -> Fixture {
    Fixture::new((4096 + RECORDS * RECORD_BYTES) as usize)
}

/// A reader whose buffers are smaller than any part.
fn reader(engine: tierstream_io::EngineKind, rules: Vec<Rule>) -> Option<Reader> {
    let wrap: Wrap = Box::new(|inner| Box::new(Fault::new(inner, rules).unwrap()));
    let (ring_bytes, buffer_bytes) = (1 << 17, 1 << 14);
    start(Config { engine, ring_bytes, buffer_bytes, wrap: Some(wrap), ..Config::default() })
}

fn check(fixture: &Fixture, extents: &[Extent], sink: &Places) {
    for (n, extent) in extents.iter().enumerate() {
        assert!(matches!(sink.results()[n], Some(Ok(()))), "{extent:?}");
        assert!(sink.piece(n) == fixture.slice(extent), "{extent:?}");
    }
    assert!(sink.chunked().iter().all(|chunked| !chunked));
    sink.check_guards();
}

#[test]
fn a_record_is_one_read() {
    let fixture = fixture();
    for engine in READING {
        let Some(reader) = reader(engine, Vec::new()) else { continue };
        let file = reader.open(&fixture.path).unwrap();
        for which in [0..1, 4..5, 0..RECORDS] {
            let before = reader.stats();
            let count = which.end - which.start;
            let extents = records(file, which);
            let sink = Places::of_records(&extents, PARTS.len());
            reader.submit(Priority::Demand, extents.clone(), sink.clone()).wait().unwrap();
            check(&fixture, &extents, &sink);
            let after = reader.stats();
            assert_eq!(after.reads - before.reads, count, "{engine}");
            // What lies between the parts is read, what lies behind the last is not.
            let most = count * RECORD_BYTES;
            assert!(after.bytes_read - before.bytes_read <= most, "{engine}");
        }
    }
}

#[test]
fn a_record_that_is_cut_short_anywhere_is_read_on() {
    let fixture = fixture();
    for engine in READING {
        for cut in [1, 4096, 69_632, 70_000, 73_727, 73_728, 100_000, 139_264, 238_000] {
            let rule = Rule::all(Action::Short(cut)).nth(0..2);
            let Some(reader) = reader(engine, vec![rule]) else { continue };
            let file = reader.open(&fixture.path).unwrap();
            let extents = records(file, 1..3);
            let sink = Places::of_records(&extents, PARTS.len());
            reader.submit(Priority::Demand, extents.clone(), sink.clone()).wait().unwrap();
            check(&fixture, &extents, &sink);
        }
    }
}

#[test]
fn an_error_fails_the_record_and_no_other() {
    let fixture = fixture();
    for engine in READING {
        let bad = 4096 + RECORD_BYTES + 80_000;
        let rule = Rule::all(Action::Errno(5)).bytes(bad..bad + 1);
        let Some(reader) = reader(engine, vec![rule]) else { continue };
        let file = reader.open(&fixture.path).unwrap();
        let extents = records(file, 0..3);
        let sink = Places::of_records(&extents, PARTS.len());
        let error = reader.submit(Priority::Demand, extents.clone(), sink.clone()).wait();
        assert!(matches!(error, Err(Error::Read { .. })), "{error:?}");
        for (n, result) in sink.results().into_iter().enumerate() {
            let failed = matches!(result, Some(Err(Error::Read { .. })));
            assert_eq!(failed, (3..6).contains(&n), "{n}: {result:?}");
        }
        sink.check_guards();
    }
}

#[test]
fn a_file_that_has_shrunk_fails_the_parts_that_are_gone() {
    let fixture = fixture();
    for engine in READING {
        let Some(reader) = reader(engine, Vec::new()) else { continue };
        let file = reader.open(&fixture.path).unwrap();
        let size = fixture.bytes.len() as u64;
        let shorter = std::fs::File::options().write(true).open(&fixture.path).unwrap();
        // Within the second part of the last record.
        shorter.set_len(size - RECORD_BYTES + 100_000).unwrap();
        let extents = records(file, RECORDS - 1..RECORDS);
        let sink = Places::of_records(&extents, PARTS.len());
        let error = reader.submit(Priority::Demand, extents.clone(), sink.clone()).wait();
        assert!(matches!(error, Err(Error::Truncated { .. })), "{error:?}");
        assert!(sink.piece(0) == fixture.slice(&extents[0]));
        assert!(sink.results()[1..].iter().all(|r| matches!(r, Some(Err(_)))));
        sink.check_guards();
        shorter.set_len(size).unwrap();
        std::fs::write(&fixture.path, &fixture.bytes).unwrap();
    }
}
