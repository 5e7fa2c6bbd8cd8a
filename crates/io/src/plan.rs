//! From wanted byte ranges to reads: sorted, coalesced, aligned, none larger than a buffer.
//!
//! Pure: no file is touched. A plan's reads cover every wanted byte; each read lists the slices of
//! it that somebody wants.

use std::ops::Range;

use crate::file::FileId;

/// Two ranges closer than this are read as one. At 1-3 GB/s these bytes cost 5-15 us, about what
/// another request costs in system call, interrupt and wake-up.
pub const COALESCE_GAP_BYTES: u64 = 16 << 10;

/// A longer record is not one read: Linux transfers at most 2 GiB at once.
const RECORD_MAX_BYTES: u64 = 1 << 30;

/// A byte range of a file that belongs to a piece of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Which piece.
    pub piece: usize,
    /// The file.
    pub file: FileId,
    /// First byte.
    pub offset: u64,
    /// Length in bytes; not zero. `offset + len` must not overflow.
    pub len: u64,
    /// It goes to a place of its own, so that only ranges of the same record share its reads.
    pub in_place: Option<InPlace>,
}

/// What the planner must know of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InPlace {
    /// Bytes behind the range that may be overwritten.
    pub after: u64,
    /// Ranges of one record that follow each other in the file are one read, however long.
    pub record: Option<u32>,
}

impl Wanted {
    fn end(&self) -> u64 {
        self.offset + self.len
    }

    fn record(&self) -> Option<u32> {
        self.in_place?.record
    }

    /// Whether `next`, the range behind it in the same file, shares its reads, which go to `end`.
    /// Blocks of a read that go to several places are whole for each.
    fn shares(&self, next: &Wanted, end: u64, align: u32) -> bool {
        match (self.in_place, next.in_place) {
            (None, None) => next.offset <= end.saturating_add(COALESCE_GAP_BYTES),
            (Some(place), Some(_)) => {
                self.record().is_some()
                    && self.record() == next.record()
                    && next.offset.is_multiple_of(u64::from(align))
                    && next.offset.checked_sub(end).is_some_and(|gap| gap <= place.after)
            }
            _ => false,
        }
    }
}

/// What the planner must know of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Alignment of offsets and lengths, in bytes: a power of two that divides the buffer size.
    pub align: u32,
    /// Size of the file in bytes; reads do not go past it, rounded up to `align`.
    pub size: u64,
}

/// One read of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// The file.
    pub file: FileId,
    /// First byte, aligned.
    pub offset: u64,
    /// Length in bytes, aligned; at most a buffer, unless it is a record's.
    pub len: usize,
    /// It goes to the places of its pieces: of one, or of some that belong to one record and follow
    /// each other. From the start of a slice on, whole blocks are the next place's.
    pub in_place: bool,
    slices: Range<usize>,
}

/// Bytes of a read that a piece wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// The piece.
    pub piece: usize,
    /// Where these bytes lie within the piece.
    pub piece_offset: u64,
    /// Where they lie within the read.
    pub start: usize,
    /// How many there are; not zero.
    pub len: usize,
}

/// Reads in file order, and who wants what of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    reads: Vec<Read>,
    slices: Vec<Slice>,
}

impl Plan {
    /// Plans `wanted` into reads of at most `buffer_bytes`, but for records that go to places.
    ///
    /// Within a file, ranges that touch, overlap or lie closer than [`COALESCE_GAP_BYTES`] share
    /// reads, unless one goes to a place of its own. Those of one record are one read if what lies
    /// between them has room behind the first's place. Any other range longer than a buffer is cut into parts
    /// of nearly equal size, so that an unaligned record of one buffer's length becomes two halves
    /// and not a whole and a crumb.
    pub fn new(
        mut wanted: Vec<Wanted>,
        layout: impl Fn(FileId) -> Layout,
        buffer_bytes: usize,
    ) -> Self {
        wanted.sort_unstable_by_key(|w| (w.file, w.offset, w.piece));
        let mut plan = Self::default();
        let mut rest = wanted.as_slice();
        while let Some(first) = rest.first() {
            let layout = layout(first.file);
            let mut end = first.end();
            let mut run = 1;
            while let Some(next) = rest.get(run)
                && next.file == first.file
                && rest[run - 1].shares(next, end, layout.align)
                && (first.in_place.is_none() || next.end() - first.offset <= RECORD_MAX_BYTES)
            {
                end = end.max(next.end());
                run += 1;
            }
            let is_record = first.record().is_some() && end - first.offset <= RECORD_MAX_BYTES;
            let most_bytes = if is_record { 2 * RECORD_MAX_BYTES } else { buffer_bytes as u64 };
            plan.cut(&rest[..run], end, layout, most_bytes);
            rest = &rest[run..];
        }
        plan
    }

    /// The reads, in order of file and offset.
    pub fn reads(&self) -> &[Read] {
        &self.reads
    }

    /// Who wants what of `read`.
    pub fn slices(&self, read: &Read) -> &[Slice] {
        &self.slices[read.slices.clone()]
    }

    /// Cuts one coalesced run, sorted by offset and ending at `end`, into reads of at most
    /// `most_bytes`.
    fn cut(&mut self, run: &[Wanted], end: u64, layout: Layout, most_bytes: u64) {
        let align = u64::from(layout.align);
        debug_assert!(align.is_power_of_two() && most_bytes.is_multiple_of(align));
        let start = run[0].offset & !(align - 1);
        let end = round_up(end, align).min(round_up(layout.size, align)).max(start);
        let parts = (end - start).div_ceil(most_bytes).max(1);
        let part = round_up((end - start).div_ceil(parts), align).min(most_bytes);

        let mut waiting = run.iter().peekable();
        let mut active: Vec<&Wanted> = Vec::new();
        let mut at = start;
        while at < end {
            let next = at.saturating_add(part).min(end);
            while let Some(w) = waiting.next_if(|w| w.offset < next) {
                active.push(w);
            }
            let first_slice = self.slices.len();
            for w in &active {
                let from = w.offset.max(at);
                self.slices.push(Slice {
                    piece: w.piece,
                    piece_offset: from - w.offset,
                    start: (from - at) as usize,
                    len: (w.end().min(next) - from) as usize,
                });
            }
            active.retain(|w| w.end() > next);
            // With buffers smaller than the gap a read may lie wholly within one.
            if self.slices.len() > first_slice {
                self.reads.push(Read {
                    file: run[0].file,
                    offset: at,
                    len: (next - at) as usize,
                    in_place: run[0].in_place.is_some(),
                    slices: first_slice..self.slices.len(),
                });
            }
            at = next;
        }
    }
}

/// Rounds up to a power of two, saturating at its last multiple.
pub(crate) fn round_up(value: u64, align: u64) -> u64 {
    value.saturating_add(align - 1) & !(align - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(offset: u64, len: u64) -> Vec<Wanted> {
        vec![Wanted { piece: 0, file: FileId(0), offset, len, in_place: None }]
    }

    fn layout(align: u32, size: u64) -> impl Fn(FileId) -> Layout {
        move |_| Layout { align, size }
    }

    #[test]
    fn a_small_unaligned_range_is_one_aligned_read() {
        let plan = Plan::new(one(5000, 10), layout(4096, 1 << 20), 8192);
        let [read] = plan.reads() else { panic!("{plan:?}") };
        assert_eq!((read.offset, read.len), (4096, 4096));
        let slice = Slice { piece: 0, piece_offset: 0, start: 904, len: 10 };
        assert_eq!(plan.slices(read), [slice]);
    }

    #[test]
    fn an_unaligned_record_of_a_buffers_length_is_halved() {
        let plan = Plan::new(one(100, 1 << 20), layout(512, 1 << 30), 1 << 20);
        let lens: Vec<_> = plan.reads().iter().map(|r| r.len).collect();
        assert_eq!(lens, [(1 << 19) + 512, 1 << 19]);
    }

    #[test]
    fn neighbours_share_a_read_and_strangers_do_not() {
        let near = COALESCE_GAP_BYTES;
        for (offset, reads) in [(1000, 1), (1000 + near, 1), (1001 + near, 2)] {
            let mut wanted = one(0, 1000);
            wanted.push(Wanted { piece: 1, file: FileId(0), offset, len: 10, in_place: None });
            let plan = Plan::new(wanted, layout(1, 1 << 20), 1 << 20);
            assert_eq!(plan.reads().len(), reads, "{offset}");
        }
    }

    #[test]
    fn a_record_is_one_read_and_two_are_two() {
        let place = |after, record| Some(InPlace { after, record: Some(record) });
        let part =
            |piece, offset, len, in_place| Wanted { piece, file: FileId(0), offset, len, in_place };
        let wanted = vec![
            part(0, 4096, 3 << 20, place(0, 7)),
            part(1, 4096 + (3 << 20), 5000, place(3192, 7)),
            part(2, 12_288 + (3 << 20), 5000, place(3192, 7)),
            part(3, 20_480 + (3 << 20), 5000, place(3192, 8)),
        ];
        let plan = |wanted| Plan::new(wanted, layout(512, 1 << 30), 1 << 20);
        let lens = |plan: &Plan| plan.reads().iter().map(|r| r.len).collect::<Vec<_>>();
        assert_eq!(lens(&plan(wanted.clone())), [(3 << 20) + 8192 + 5120, 5120]);
        // Without room for what lies between, each is read alone.
        let mut tight = wanted.clone();
        tight[1].in_place = place(3191, 7);
        assert_eq!(lens(&plan(tight)), [(3 << 20) + 5120, 5120, 5120]);
    }

    #[test]
    fn the_end_of_the_file_bounds_the_read() {
        let plan = Plan::new(one(8190, 10), layout(512, 8200), 4096);
        let read = plan.reads().last().unwrap();
        assert_eq!(read.offset + read.len as u64, 8704);
    }

    fn any_wanted() -> impl Strategy<Value = Vec<Wanted>> {
        let place = (0u64..9000, prop::option::of(0u32..4));
        let place = place.prop_map(|(after, record)| InPlace { after, record });
        let offset = prop_oneof![0u64..200_000, (0u64..50).prop_map(|page| page * 4096)];
        let one = (0u32..3, offset, 1u64..60_000, prop::option::weighted(0.4, place));
        proptest::collection::vec(one, 0..40).prop_map(|list| {
            let mut wanted = Vec::new();
            for (piece, (file, offset, len, in_place)) in list.into_iter().enumerate() {
                wanted.push(Wanted { piece, file: FileId(file), offset, len, in_place });
            }
            wanted
        })
    }

    proptest! {
        #[test]
        fn every_wanted_byte_is_read_once_in_its_place(
            wanted in any_wanted(),
            align in prop::sample::select(vec![1u32, 512, 4096]),
            buffer_pages in 1usize..20,
            slack in 0u64..5000,
        ) {
            let buffer_bytes = buffer_pages * 4096;
            let size = wanted.iter().map(Wanted::end).max().unwrap_or(0) + slack;
            let plan = Plan::new(wanted.clone(), layout(align, size), buffer_bytes);

            let mut arrived: Vec<_> = wanted.iter().map(|w| vec![0u8; w.len as usize]).collect();
            let mut previous: Option<&Read> = None;
            for read in plan.reads() {
                prop_assert!(read.offset.is_multiple_of(u64::from(align)));
                prop_assert!(read.len.is_multiple_of(align as usize));
                let slices = plan.slices(read);
                let record = |s: &Slice| wanted[s.piece].record();
                let is_record = read.in_place && record(&slices[0]).is_some();
                prop_assert!(read.len > 0 && (is_record || read.len <= buffer_bytes));
                prop_assert!(read.offset + (read.len as u64) < size + u64::from(align));
                if let Some(p) = previous && !p.in_place && !read.in_place {
                    prop_assert!((p.file, p.offset + p.len as u64) <= (read.file, read.offset));
                }
                previous = Some(read);
                prop_assert!(!plan.slices(read).is_empty());
                prop_assert!(!read.in_place || is_record || slices.len() == 1);
                for pair in slices.windows(2).filter(|_| read.in_place) {
                    prop_assert_eq!(record(&pair[0]), record(&pair[1]));
                    prop_assert!(pair[1].start.is_multiple_of(align as usize));
                    let room = wanted[pair[0].piece].in_place.unwrap().after;
                    prop_assert!(pair[0].start + pair[0].len <= pair[1].start);
                    prop_assert!(pair[1].start - pair[0].start - pair[0].len <= room as usize);
                }
                for s in plan.slices(read) {
                    let w = wanted[s.piece];
                    prop_assert!(s.len > 0 && s.start + s.len <= read.len);
                    prop_assert_eq!(read.in_place, w.in_place.is_some());
                    prop_assert_eq!(read.file, w.file);
                    prop_assert_eq!(read.offset + s.start as u64, w.offset + s.piece_offset);
                    let at = s.piece_offset as usize;
                    for byte in &mut arrived[s.piece][at..at + s.len] {
                        *byte += 1;
                    }
                }
            }
            for piece in arrived {
                prop_assert!(piece.iter().all(|count| *count == 1));
            }
        }

        #[test]
        fn ranges_far_into_a_file_do_not_overflow(
            offset in (i64::MAX as u64 - (1 << 20))..(i64::MAX as u64 - 4096),
            len in 1u64..4096,
        ) {
            let plan = Plan::new(one(offset, len), layout(4096, i64::MAX as u64), 1 << 16);
            let slices = plan.reads().iter().flat_map(|r| plan.slices(r));
            let covered: usize = slices.map(|s| s.len).sum();
            prop_assert_eq!(covered as u64, len);
        }
    }
}
