//! How fast records come that are one read each, scattered to their parts' places, against reads of
//! the same size to one place: random records, a few at a time by each way in turns, since drives
//! wander.
//!
//! `cargo run --release -p tierstream-io --example records -- FILE RECORD_BYTES [PARTS] [DEPTH] [ROUNDS]`

use std::error::Error;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use tierstream_io::{Chunk, Config, Extent, FileId, PAGE, Place, Priority, Reader, Sink, Ticket};

/// Records that are read by one way before it is the other one's turn, and turns of a round.
const TURN_RECORDS: usize = 32;
const TURNS: usize = 16;

/// Room for one record, whose contents nobody looks at.
struct Room {
    at: NonNull<u8>,
    /// Where each part begins.
    starts: Vec<usize>,
}

// SAFETY: an address of memory that is never given back, and never read.
unsafe impl Send for Room {}
// SAFETY: as above; a room is used by one request at a time.
unsafe impl Sync for Room {}

impl Sink for Room {
    fn chunk(&self, _: Chunk) {
        unreachable!("every piece has a place that suits");
    }

    fn place(&self, piece: usize) -> Option<Place> {
        // SAFETY: within memory that lives for ever.
        let place = unsafe { Place::new(self.at.add(self.starts[piece]), 0, 0) };
        Some(place.of_record(0))
    }

    fn done(&self, _: usize, result: tierstream_io::Result<()>) {
        result.expect("the file can be read");
    }
}

/// Room for records of these parts at `at`, the last part first, so that no two are neighbours.
fn room(at: NonNull<u8>, parts: &[usize]) -> Arc<Room> {
    let behind = |part: usize| parts[part + 1..].iter().sum();
    Arc::new(Room { at, starts: (0..parts.len()).map(behind).collect() })
}

/// Memory that begins with a page. How it lies physically decides how fast a drive writes to it.
fn memory(bytes: usize) -> NonNull<u8> {
    let memory = vec![1u8; bytes + PAGE].leak();
    let skip = memory.as_ptr().addr().next_multiple_of(PAGE) - memory.as_ptr().addr();
    NonNull::from(&mut memory[skip])
}

/// Seconds of reading the records at `offsets`, `rooms.len()` at a time.
fn seconds(
    reader: &Reader,
    file: FileId,
    offsets: &[u64],
    parts: &[usize],
    rooms: &[Arc<Room>],
) -> f64 {
    let (start, mut tickets) = (Instant::now(), Vec::<Ticket>::new());
    for (n, &offset) in offsets.iter().enumerate() {
        if n >= rooms.len() {
            tickets[n - rooms.len()].wait().expect("the file can be read");
        }
        let mut at = offset;
        let extents = parts.iter().map(|&len| {
            let extent = Extent { file, offset: at, len: len as u64 };
            at += len as u64;
            extent
        });
        let room = rooms[n % rooms.len()].clone();
        tickets.push(reader.submit(Priority::Demand, extents.collect(), room));
    }
    tickets.iter().for_each(|ticket| ticket.wait().expect("the file can be read"));
    start.elapsed().as_secs_f64()
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let path = PathBuf::from(args.next().ok_or("usage: records FILE RECORD_BYTES [PARTS] ...")?);
    let mut number = |default: usize| -> Result<usize, Box<dyn Error>> {
        Ok(args.next().and_then(|n| n.into_string().ok()).map_or(Ok(default), |n| n.parse())?)
    };
    let record = number(3 << 20)?;
    let (parts, depth, rounds) = (number(3)?, number(8)?, number(9)?);
    let part = (record / parts).next_multiple_of(PAGE);
    let scattered = vec![part; parts];
    let whole = vec![part * parts];
    let record = (part * parts) as u64;
    let reader = Reader::new(Config { depth, ..Config::default() })?;
    let file = reader.open(&path)?;
    let records = reader.file(file)?.size() / record;
    let state = reader.file(file)?.direct_state().clone();
    println!("{records} records of {record} bytes in {parts} parts, depth {depth}; {state:?}");
    // The same memory for both ways.
    let memory: Vec<_> = (0..depth).map(|_| memory(part * parts)).collect();
    let rooms = |parts: &[usize]| memory.iter().map(|&at| room(at, parts)).collect::<Vec<_>>();
    let (scattered_rooms, whole_rooms) = (rooms(&scattered), rooms(&whole));
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % records * record
    };
    let mut ratios = Vec::new();
    for _ in 0..rounds {
        let (mut by_parts, mut by_whole) = (0.0, 0.0);
        let before = reader.stats().reads;
        for turn in 0..2 * TURNS {
            let offsets: Vec<u64> = (0..TURN_RECORDS).map(|_| random()).collect();
            // As often behind its like as behind the other.
            if turn.count_ones() % 2 == 0 {
                by_parts += seconds(&reader, file, &offsets, &scattered, &scattered_rooms);
            } else {
                by_whole += seconds(&reader, file, &offsets, &whole, &whole_rooms);
            }
        }
        assert_eq!(reader.stats().reads - before, 2 * (TURNS * TURN_RECORDS) as u64);
        let rate = |seconds| (TURNS * TURN_RECORDS) as f64 * record as f64 / 1e9 / seconds;
        ratios.push(by_whole / by_parts);
        println!("scattered {:.2} GB/s, whole {:.2} GB/s", rate(by_parts), rate(by_whole));
    }
    ratios.sort_by(f64::total_cmp);
    println!("scattered over whole: median {:.3}, {ratios:.3?}", ratios[ratios.len() / 2]);
    Ok(())
}
