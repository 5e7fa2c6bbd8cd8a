//! One suite for every device: the stand-in, and the GPUs of the machine that it runs on.

#[path = "suite/gates.rs"]
mod gates;
mod support;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use support::{Counted, MIB, everywhere, pattern, read, write};
use tierstream_cuda::{Device, Error, Region};

const GRANULE: u64 = 4 * MIB;

fn region(device: &Device, granules: u64) -> Region {
    device.reserve(granules * GRANULE, GRANULE).unwrap()
}

#[test]
fn there_are_gpus_or_there_is_a_reason() {
    match Device::all() {
        Ok(gpus) => assert!(!gpus.is_empty()),
        Err(Error::NoGpu { reason }) => assert!(!reason.is_empty()),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_device_tells_what_it_is() {
    everywhere(|device| {
        let (info, memory) = (device.info(), device.memory().unwrap());
        assert!(!info.name.is_empty());
        assert!(memory.total_bytes > 0 && memory.free_bytes <= memory.total_bytes);
        assert!(device.granularity().unwrap().is_power_of_two());
    });
}

#[test]
fn copies_arrive_and_leave_their_neighbours_alone() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(4 * MIB).unwrap();
        for (seed, (offset, len)) in
            [(0, 1), (5, 3), (4096, 4096), (100, 1 << 20), (MIB, 3 << 20)].into_iter().enumerate()
        {
            stream.fill(block.span(0, block.bytes()).unwrap(), 0x55).unwrap();
            let bytes = pattern(seed, len);
            let mut pinned = device.pin(len).unwrap();
            assert!(pinned.iter().all(|b| *b == 0), "new pinned memory is zeros");
            pinned.copy_from_slice(&bytes);
            let target = || block.span(offset, len as u64).unwrap();
            stream.upload(pinned, target()).unwrap();
            let back = stream.download(target(), device.pin(len).unwrap()).unwrap();
            assert_eq!(*back.wait().unwrap(), *bytes);
            let mut expected = vec![0x55; 4 << 20];
            expected[offset as usize..][..len].copy_from_slice(&bytes);
            assert!(read(device, block.span(0, block.bytes()).unwrap()) == expected);
        }
    });
}

#[test]
fn rows_arrive_at_other_distances_and_nothing_between_them() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(MIB).unwrap();
        for (seed, (count, width, from_pitch, to_pitch)) in
            [(1, 5, 5, 9), (3, 100, 100, 100), (7, 4096, 5000, 4200), (4, 1, 3, 2)]
                .into_iter()
                .enumerate()
        {
            stream.fill(block.span(0, MIB).unwrap(), 0x55).unwrap();
            let ends = |pitch: usize| (count - 1) * pitch + width;
            let bytes = pattern(seed, ends(from_pitch));
            let target = block.span(10, ends(to_pitch) as u64).unwrap();
            stream.upload_rows(bytes.clone(), from_pitch, target, to_pitch, width).unwrap();
            stream.synchronize().unwrap();
            let mut expected = vec![0x55; MIB as usize];
            for row in 0..count {
                let from = &bytes[row * from_pitch..][..width];
                expected[10 + row * to_pitch..][..width].copy_from_slice(from);
            }
            assert!(read(device, block.span(0, MIB).unwrap()) == expected);
        }
        // Other numbers of rows, rows that overlap, half a row, none.
        for (from, from_pitch, to, to_pitch, width) in
            [(25, 10, 15, 10, 5), (14, 4, 15, 10, 5), (16, 10, 15, 10, 5), (0, 1, 0, 1, 0)]
        {
            let to = block.span(0, to).unwrap();
            let error = stream.upload_rows(vec![0; from], from_pitch, to, to_pitch, width);
            assert!(matches!(error, Err(Error::Config(_))), "{error:?}");
        }
    });
}

#[test]
fn pageable_memory_is_copied_too() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(MIB).unwrap();
        let bytes = pattern(1, MIB as usize);
        stream.upload(bytes.clone(), block.span(0, MIB).unwrap()).unwrap();
        let back = stream.download(block.span(0, MIB).unwrap(), vec![0; MIB as usize]).unwrap();
        assert!(back.wait().unwrap() == bytes);
    });
}

/// Memory that others have allocated is copied to as well, and left to them.
#[test]
fn borrowed_memory_stays_with_its_owner() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(MIB).unwrap();
        stream.fill(block.span(0, MIB).unwrap(), 0).unwrap();
        // SAFETY: a part of `block`, which lives longer.
        let borrowed = unsafe { device.borrow(block.address() + 10, 100) };
        assert_eq!((borrowed.address(), borrowed.bytes()), (block.address() + 10, 100));
        stream.upload(vec![7; 90], borrowed.span(10, 90).unwrap()).unwrap();
        assert!(matches!(borrowed.span(1, 100), Err(Error::Range { .. })));
        stream.synchronize().unwrap();
        drop(borrowed);
        let mut expected = vec![0; MIB as usize];
        expected[20..110].fill(7);
        assert!(read(device, block.span(0, MIB).unwrap()) == expected);
    });
}

#[test]
fn device_memory_is_filled_and_copied_in_order() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(3 * MIB).unwrap();
        let part = |i: u64| block.span(i * MIB, MIB).unwrap();
        for i in 0..3 {
            stream.fill(part(i), i as u8).unwrap();
        }
        stream.copy_within(part(1), part(0)).unwrap();
        stream.fill(part(1), 9).unwrap();
        stream.copy_within(part(1), part(2)).unwrap();
        let bytes = stream.download(block.span(0, 3 * MIB).unwrap(), vec![0; 3 << 20]).unwrap();
        let bytes = bytes.wait().unwrap();
        assert!(bytes[..1 << 20].iter().all(|b| *b == 1));
        assert!(bytes[1 << 20..].iter().all(|b| *b == 9));
    });
}

#[test]
fn nothing_can_be_copied() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(10).unwrap();
        stream.upload(vec![], block.span(10, 0).unwrap()).unwrap();
        stream.fill(block.span(0, 0).unwrap(), 1).unwrap();
        let back = stream.download(block.span(3, 0).unwrap(), vec![]).unwrap();
        assert_eq!(back.wait().unwrap(), []);
        let region = region(device, 1);
        assert_eq!(region.span(GRANULE, 0).unwrap().bytes(), 0);
    });
}

#[test]
fn ranges_that_are_not_there_are_refused() {
    everywhere(|device| {
        let range = |result: Result<_, Error>| match result {
            Err(Error::Range { .. }) => {}
            other => panic!("{other:?}"),
        };
        let stream = device.stream().unwrap();
        let block = device.allocate(10).unwrap();
        range(block.span(9, 2).map(drop));
        range(block.span(u64::MAX, 2).map(drop));
        range(stream.upload(vec![0; 3], block.span(0, 4).unwrap()));
        range(stream.download(block.span(0, 4).unwrap(), vec![0; 5]).map(drop));
        range(stream.copy_within(block.span(0, 4).unwrap(), block.span(5, 5).unwrap()));
        let shared = device.pin(10).unwrap().share();
        range(shared.slice(5, 6).map(drop));
        let region = region(device, 2);
        region.map(1).unwrap();
        range(region.span(0, 1).map(drop));
        range(region.span(GRANULE - 1, 2).map(drop));
        range(region.span(2 * GRANULE - 1, 2).map(drop));
        range(region.map(2));
        range(region.unmap(2));
        range(region.resize(3));
        assert_eq!(stream.pending(), 0);
    });
}

#[test]
fn sizes_that_cannot_be_meant_are_refused() {
    everywhere(|device| {
        assert!(matches!(device.pin(0), Err(Error::Config(_))));
        assert!(matches!(device.allocate(0), Err(Error::Config(_))));
        for (bytes, granule) in [(0, GRANULE), (GRANULE, 0), (u64::MAX, GRANULE), (1, u64::MAX)] {
            assert!(matches!(device.reserve(bytes, granule), Err(Error::Config(_))));
        }
    });
}

#[test]
fn other_devices_are_refused() {
    everywhere(|device| {
        let other = tierstream_cuda::standin::StandIn::new(Default::default()).unwrap().device();
        let (stream, elsewhere) = (device.stream().unwrap(), other.stream().unwrap());
        let config = |result| assert!(matches!(result, Err(Error::Config(_))), "{result:?}");
        let theirs = || other.allocate(4).unwrap().span(0, 4).unwrap();
        let ours = || device.allocate(4).unwrap().span(0, 4).unwrap();
        config(stream.upload(vec![0; 4], theirs()));
        config(stream.download(theirs(), vec![0; 4]).map(drop));
        config(stream.copy_within(ours(), theirs()));
        config(stream.copy_within(theirs(), ours()));
        config(stream.fill(theirs(), 0));
        config(stream.wait_for(&elsewhere.record().unwrap()));
    });
}

#[test]
fn a_copy_owns_its_memory_until_it_is_seen_done() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(MIB).unwrap();
        let drops = Arc::new(AtomicUsize::new(0));
        let upload = || {
            let bytes = Counted::new(pattern(0, MIB as usize), &drops);
            stream.upload(bytes, block.span(0, MIB).unwrap()).unwrap();
        };
        upload();
        let first = stream.record().unwrap();
        upload();
        let second = stream.record().unwrap();
        assert_eq!((drops.load(Ordering::SeqCst), stream.pending()), (0, 2));
        first.wait().unwrap();
        assert_eq!((drops.load(Ordering::SeqCst), stream.pending()), (1, 1));
        assert!(first.is_done().unwrap());
        second.wait().unwrap();
        assert_eq!((drops.load(Ordering::SeqCst), stream.pending()), (2, 0));
        upload();
        drop((first, second));
        drop(stream);
        assert_eq!(drops.load(Ordering::SeqCst), 3, "dropping a stream waits");
    });
}

#[test]
fn a_later_event_gives_up_the_memory_of_all_before() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(8).unwrap();
        let events: Vec<_> = (0..8)
            .map(|i| {
                stream.upload(vec![i as u8], block.span(i, 1).unwrap()).unwrap();
                stream.record().unwrap()
            })
            .collect();
        events[5].wait().unwrap();
        assert_eq!(stream.pending(), 2);
        while !events[7].is_done().unwrap() {
            thread::yield_now();
        }
        assert_eq!(stream.pending(), 0);
        for event in &events {
            assert!(event.is_done().unwrap());
        }
        assert_eq!(read(device, block.span(0, 8).unwrap()), [0, 1, 2, 3, 4, 5, 6, 7]);
    });
}

#[test]
fn a_download_that_nobody_waits_for_still_has_its_memory() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(MIB).unwrap();
        let drops = Arc::new(AtomicUsize::new(0));
        let to = Counted::new(vec![0; MIB as usize], &drops);
        drop(stream.download(block.span(0, MIB).unwrap(), to).unwrap());
        assert_eq!((drops.load(Ordering::SeqCst), stream.pending()), (0, 1));
        stream.synchronize().unwrap();
        assert_eq!((drops.load(Ordering::SeqCst), stream.pending()), (1, 0));
    });
}

#[test]
fn a_stream_waits_for_another() {
    everywhere(|device| {
        let (a, b) = (device.stream().unwrap(), device.stream().unwrap());
        let block = device.allocate(3 * MIB).unwrap();
        let part = |i: u64| block.span(i * MIB, MIB).unwrap();
        for seed in 0..50 {
            let bytes = pattern(seed, MIB as usize);
            a.upload(bytes.clone(), part(0)).unwrap();
            b.wait_for(&a.record().unwrap()).unwrap();
            b.copy_within(part(0), part(1)).unwrap();
            a.wait_for(&b.record().unwrap()).unwrap();
            a.copy_within(part(1), part(2)).unwrap();
            let back = a.download(part(2), vec![0; MIB as usize]).unwrap().wait().unwrap();
            assert!(back == bytes, "round {seed}");
        }
    });
}

#[test]
fn threads_share_a_stream() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(8 * 4096).unwrap();
        let drops = Arc::new(AtomicUsize::new(0));
        thread::scope(|scope| {
            for i in 0..8 {
                let (stream, block, drops) = (&stream, &block, &drops);
                scope.spawn(move || {
                    for seed in 0..40 {
                        let span = || block.span(i * 4096, 4096).unwrap();
                        let bytes = pattern(seed + i as usize, 4096);
                        stream.upload(Counted::new(bytes.clone(), drops), span()).unwrap();
                        let back = stream.download(span(), vec![0; 4096]).unwrap();
                        assert!(back.wait().unwrap() == bytes);
                    }
                });
            }
        });
        stream.synchronize().unwrap();
        assert_eq!((drops.load(Ordering::SeqCst), stream.pending()), (8 * 40, 0));
    });
}

#[test]
fn memory_that_is_there_is_pinned_and_goes_with_its_owner() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(MIB).unwrap();
        let drops = Arc::new(AtomicUsize::new(0));
        let mut owner = Counted::new(pattern(3, MIB as usize), &drops);
        let base = NonNull::from(&mut owner.bytes[0]);
        // SAFETY: the vector stays where it is, and the copy below is waited for.
        let registered = unsafe { device.register(owner, base, MIB as usize) }.unwrap();
        // SAFETY: as above.
        let again = unsafe { device.register((), base, MIB as usize) };
        assert!(matches!(again, Err(Error::Driver { .. })), "{:?}", again.err());
        let registered = Arc::new(registered);
        struct Bytes(Arc<tierstream_cuda::Registered<Counted>>);
        impl AsRef<[u8]> for Bytes {
            fn as_ref(&self) -> &[u8] {
                &self.0.owner().bytes
            }
        }
        let bytes = Bytes(Arc::clone(&registered));
        stream.upload(bytes, block.span(0, MIB).unwrap()).unwrap();
        drop(registered);
        assert_eq!(drops.load(Ordering::SeqCst), 0);
        stream.synchronize().unwrap();
        assert_eq!(drops.load(Ordering::SeqCst), 1);
        assert!(read(device, block.span(0, MIB).unwrap()) == pattern(3, MIB as usize));
    });
}

#[test]
fn pinned_memory_is_read_by_many_copies_at_once() {
    everywhere(|device| {
        let mut pinned = device.pin(4096).unwrap();
        pinned.copy_from_slice(&pattern(0, 4096));
        let shared = pinned.share();
        let streams: Vec<_> = (0..3).map(|_| device.stream().unwrap()).collect();
        let block = device.allocate(3 * 1000).unwrap();
        for (i, stream) in (0..).zip(&streams) {
            let part = shared.slice(1000, 2000).unwrap().slice(i * 10, 1000).unwrap();
            stream.upload(part, block.span(i as u64 * 1000, 1000).unwrap()).unwrap();
        }
        drop(shared);
        streams.iter().for_each(|stream| stream.synchronize().unwrap());
        let all = pattern(0, 4096);
        let expected = [&all[1000..2000], &all[1010..2010], &all[1020..2020]].concat();
        assert!(read(device, block.span(0, 3000).unwrap()) == expected);
    });
}

#[test]
fn a_region_grows_and_shrinks_in_place() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let region = region(device, 8);
        assert_eq!((region.granules(), region.mapped_bytes()), (8, 0));
        region.resize(3).unwrap();
        assert_eq!(region.mapped_bytes(), 3 * GRANULE);
        // Over the seams of granules.
        let bytes = pattern(1, 2 * GRANULE as usize);
        let middle = || region.span(GRANULE / 2, 2 * GRANULE).unwrap();
        write(&stream, middle(), bytes.clone());
        region.resize(8).unwrap();
        assert!(read(device, middle()) == bytes, "growing moves nothing");
        region.unmap(5).unwrap();
        region.unmap(5).unwrap();
        assert!(!region.is_mapped(5) && region.is_mapped(6) && !region.is_mapped(8));
        region.resize(4).unwrap();
        assert_eq!(region.mapped_bytes(), 4 * GRANULE);
        assert!(read(device, middle()) == bytes, "shrinking moves nothing");
        region.map(7).unwrap();
        region.map(7).unwrap();
        stream.fill(region.span(7 * GRANULE, GRANULE).unwrap(), 4).unwrap();
        stream.synchronize().unwrap();
        region.resize(0).unwrap();
        assert_eq!(region.mapped_bytes(), 0);
        region.map(0).unwrap();
        assert_eq!(read(device, region.span(0, GRANULE).unwrap()).len(), GRANULE as usize);
    });
}

#[test]
fn sizes_of_a_region_are_rounded_up() {
    everywhere(|device| {
        let granularity = device.granularity().unwrap();
        let region = device.reserve(5 * granularity + 1, granularity + 1).unwrap();
        assert_eq!(region.granule_bytes(), 2 * granularity);
        assert_eq!((region.granules(), region.bytes()), (3, 6 * granularity));
        assert_eq!(region.address() % granularity.min(4096), 0);
    });
}

#[test]
fn memory_in_use_stays_mapped() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let region = region(device, 4);
        region.resize(4).unwrap();
        let span = region.span(2 * GRANULE - 1, 2).unwrap();
        for granule in [1, 2] {
            assert_eq!(region.unmap(granule).unwrap_err(), Error::Busy { granule });
        }
        assert_eq!(region.resize(2).unwrap_err(), Error::Busy { granule: 2 });
        assert_eq!(region.mapped_bytes(), 4 * GRANULE);
        region.unmap(3).unwrap();
        stream.fill(span, 1).unwrap();
        let done = stream.record().unwrap();
        // The copy may be done, but it has not been seen done.
        assert_eq!(region.unmap(1).unwrap_err(), Error::Busy { granule: 1 });
        done.wait().unwrap();
        region.resize(0).unwrap();
    });
}

#[test]
fn a_region_outlives_its_handle_for_what_uses_it() {
    everywhere(|device| {
        let region = region(device, 1);
        region.map(0).unwrap();
        let (write_to, read_from) = (region.span(0, 100).unwrap(), region.span(0, 100).unwrap());
        drop(region);
        write(&device.stream().unwrap(), write_to, pattern(0, 100));
        assert_eq!(read(device, read_from), pattern(0, 100));
    });
}

#[test]
fn without_memory_everything_stays_as_it_was() {
    everywhere(|device| {
        let memory = device.memory().unwrap();
        let too_much = |result| assert!(matches!(result, Err(Error::OutOfMemory { .. })));
        too_much(device.allocate(2 * memory.total_bytes).map(drop));
        // The first granule fits, the second does not.
        let region = device.reserve(2 * memory.total_bytes, memory.free_bytes / 10 * 6).unwrap();
        too_much(region.resize(2));
        assert_eq!(region.mapped_bytes(), 0);
        region.map(0).unwrap();
        too_much(region.map(1));
        too_much(region.resize(3));
        assert_eq!(region.mapped_bytes(), region.granule_bytes());
        assert!(region.is_mapped(0));
        region.unmap(0).unwrap();
        region.map(1).unwrap();
    });
}

#[test]
fn the_bus_has_a_rate() {
    everywhere(|device| {
        let rates = device.bandwidth(4 << 20, 3).unwrap();
        assert_eq!((rates.bytes, rates.rounds), (4 << 20, 3));
        assert!(rates.upload_gbps > 0.0 && rates.download_gbps > 0.0);
    });
}
