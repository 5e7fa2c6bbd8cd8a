//! From wanted byte ranges to reads: sorted, coalesced, aligned, none larger than a buffer.
//!
//! Pure: no file is touched. A plan's reads cover every wanted byte; each read lists the slices of
//! it that somebody wants.

use std::ops::Range;

use crate::file::FileId;

/// Two ranges closer than this are read as one. At 1-3 GB/s these bytes cost 5-15 us, about what
/// another request costs in system call, interrupt and wake-up.
pub const COALESCE_GAP_BYTES: u64 = 16 << 10;

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
    /// It goes to a place of its own, so no other range shares its reads.
    pub in_place: bool,
}

impl Wanted {
    fn end(&self) -> u64 {
        self.offset + self.len
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
    /// Length in bytes, aligned, at most a buffer.
    pub len: usize,
    /// It is of one piece only, which has a place of its own.
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
    /// Plans `wanted` into reads of at most `buffer_bytes`.
    ///
    /// Within a file, ranges that touch, overlap or lie closer than [`COALESCE_GAP_BYTES`] share
    /// reads, unless one goes to a place of its own; a range longer than a buffer is cut into parts
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
            let mut end = first.end();
            let mut run = 1;
            while let Some(next) = rest.get(run)
                && next.file == first.file
                && !first.in_place
                && !next.in_place
                && next.offset <= end.saturating_add(COALESCE_GAP_BYTES)
            {
                end = end.max(next.end());
                run += 1;
            }
            plan.cut(&rest[..run], end, layout(first.file), buffer_bytes as u64);
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

    /// Cuts one coalesced run, sorted by offset and ending at `end`, into reads.
    fn cut(&mut self, run: &[Wanted], end: u64, layout: Layout, buffer_bytes: u64) {
        let align = u64::from(layout.align);
        debug_assert!(align.is_power_of_two() && buffer_bytes.is_multiple_of(align));
        let start = run[0].offset & !(align - 1);
        let end = round_up(end, align).min(round_up(layout.size, align)).max(start);
        let parts = (end - start).div_ceil(buffer_bytes).max(1);
        let part = round_up((end - start).div_ceil(parts), align).min(buffer_bytes);

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
                    in_place: run[0].in_place,
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
        vec![Wanted { piece: 0, file: FileId(0), offset, len, in_place: false }]
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
            wanted.push(Wanted { piece: 1, file: FileId(0), offset, len: 10, in_place: false });
            let plan = Plan::new(wanted, layout(1, 1 << 20), 1 << 20);
            assert_eq!(plan.reads().len(), reads, "{offset}");
        }
    }

    #[test]
    fn the_end_of_the_file_bounds_the_read() {
        let plan = Plan::new(one(8190, 10), layout(512, 8200), 4096);
        let read = plan.reads().last().unwrap();
        assert_eq!(read.offset + read.len as u64, 8704);
    }

    fn any_wanted() -> impl Strategy<Value = Vec<Wanted>> {
        let one = (0u32..3, 0u64..200_000, 1u64..60_000, prop::bool::weighted(0.2));
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
                prop_assert!(read.len > 0 && read.len <= buffer_bytes);
                prop_assert!(read.offset + (read.len as u64) < size + u64::from(align));
                if let Some(p) = previous && !p.in_place && !read.in_place {
                    prop_assert!((p.file, p.offset + p.len as u64) <= (read.file, read.offset));
                }
                previous = Some(read);
                prop_assert!(!plan.slices(read).is_empty());
                if read.in_place {
                    prop_assert_eq!(plan.slices(read).len(), 1);
                }
                for s in plan.slices(read) {
                    let w = wanted[s.piece];
                    prop_assert!(s.len > 0 && s.start + s.len <= read.len);
                    prop_assert_eq!(read.in_place, w.in_place);
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
