//! A region: addresses that are reserved once, and physical memory that comes and goes behind them,
//! granule by granule. What lies in it never moves, so kernels and captured graphs keep their
//! pointers while the memory grows and shrinks. (CUDA driver API, "Virtual Memory Management".)

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::device::Device;
use crate::driver::{Address, Handle};
use crate::error::{Error, Result};
use crate::memory::{Span, check_range};
use crate::sync::lock;

/// Reserved addresses on a device, and the memory behind some of them. All memory goes back to the
/// device when the region and all its [`Span`]s are gone.
pub struct Region {
    shared: Arc<Shared>,
}

struct Shared {
    device: Device,
    base: Address,
    granule_bytes: u64,
    count: usize,
    granules: Mutex<Vec<Granule>>,
}

/// The memory behind one granule's addresses.
#[derive(Clone, Copy, Default)]
struct Granule {
    memory: Option<Handle>,
    /// Spans over it.
    uses: u32,
}

impl Device {
    /// Reserves addresses for `bytes`, without memory. Memory will come and go in granules of
    /// `granule_bytes`; both sizes are rounded up, to whole granules and to the device's
    /// [`granularity`](Self::granularity). Each map or unmap costs some 50 us whatever its size:
    /// 32-64 MiB is a good granule.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes of 0 or past 64 bits; what the driver says.
    pub fn reserve(&self, bytes: u64, granule_bytes: u64) -> Result<Region> {
        let odd = || Error::Config(format!("a region of {bytes} bytes in {granule_bytes}"));
        if bytes == 0 || granule_bytes == 0 {
            return Err(odd());
        }
        let granule_bytes =
            granule_bytes.checked_next_multiple_of(self.granularity()?).ok_or_else(odd)?;
        let reserved = bytes.checked_next_multiple_of(granule_bytes).ok_or_else(odd)?;
        let count = usize::try_from(reserved / granule_bytes).map_err(|_| odd())?;
        let base = self.driver().reserve(reserved);
        let base = base.map_err(|f| f.doing(format!("reserve {reserved} bytes of addresses")))?;
        let granules = Mutex::new(vec![Granule::default(); count]);
        let shared = Shared { device: self.clone(), base, granule_bytes, count, granules };
        Ok(Region { shared: Arc::new(shared) })
    }
}

impl Region {
    /// Where it begins in the device's address space.
    pub fn address(&self) -> u64 {
        self.shared.base
    }

    /// Size of a granule.
    pub fn granule_bytes(&self) -> u64 {
        self.shared.granule_bytes
    }

    /// Number of granules, mapped or not.
    pub fn granules(&self) -> usize {
        self.shared.count
    }

    /// Bytes of addresses.
    pub fn bytes(&self) -> u64 {
        self.granules() as u64 * self.granule_bytes()
    }

    /// Bytes of memory behind them now.
    pub fn mapped_bytes(&self) -> u64 {
        let granules = lock(&self.shared.granules);
        let mapped = granules.iter().filter(|g| g.memory.is_some()).count();
        mapped as u64 * self.granule_bytes()
    }

    /// Whether there is memory behind this granule.
    pub fn is_mapped(&self, granule: usize) -> bool {
        lock(&self.shared.granules).get(granule).is_some_and(|g| g.memory.is_some())
    }

    /// Puts memory behind a granule, of unknown contents: kernels that read beyond what was copied
    /// there need it [filled](crate::Stream::fill) first. No change if there is some.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Range`] beyond the region. Nothing has changed then.
    pub fn map(&self, granule: usize) -> Result<()> {
        self.check(granule)?;
        let mut granules = lock(&self.shared.granules);
        self.shared.map(&mut granules, granule)
    }

    /// Takes the memory behind a granule away, for others to have at once. No change if there is
    /// none. What reads there other than the copies of this crate must be done.
    ///
    /// # Errors
    /// [`Error::Busy`] while a [`Span`] is over it; [`Error::Range`] beyond the region.
    pub fn unmap(&self, granule: usize) -> Result<()> {
        self.check(granule)?;
        let mut granules = lock(&self.shared.granules);
        if granules[granule].uses > 0 {
            return Err(Error::Busy { granule });
        }
        self.shared.unmap(&mut granules, granule)
    }

    /// Puts memory behind the first `count` granules and takes it away behind all others, as
    /// [`map`](Self::map) and [`unmap`](Self::unmap) do; growing comes first.
    ///
    /// # Errors
    /// Those of [`map`](Self::map) and [`unmap`](Self::unmap). Out of memory and busy leave
    /// everything as it was.
    pub fn resize(&self, count: usize) -> Result<()> {
        if count > 0 {
            self.check(count - 1)?;
        }
        let mut granules = lock(&self.shared.granules);
        if let Some(busy) = (count..self.granules()).find(|&i| granules[i].uses > 0) {
            return Err(Error::Busy { granule: busy });
        }
        let missing: Vec<usize> = (0..count).filter(|&i| granules[i].memory.is_none()).collect();
        for (done, &granule) in missing.iter().enumerate() {
            if let Err(error) = self.shared.map(&mut granules, granule) {
                for &undo in &missing[..done] {
                    self.shared.unmap(&mut granules, undo)?;
                }
                return Err(error);
            }
        }
        (count..self.granules()).try_for_each(|i| self.shared.unmap(&mut granules, i))
    }

    /// A part of the region that stays mapped for as long as the span lives.
    ///
    /// # Errors
    /// [`Error::Range`] beyond the region, or where there is no memory.
    pub fn span(&self, offset: u64, bytes: u64) -> Result<Span> {
        let size = self.granule_bytes();
        check_range(offset, bytes, self.bytes())?;
        let mut granules = lock(&self.shared.granules);
        // Both are at most the number of granules, so they fit.
        let part = (offset / size) as usize..(offset + bytes).div_ceil(size) as usize;
        if let Some(hole) = part.clone().find(|&i| granules[i].memory.is_none()) {
            let what = format!("granule {hole} is not mapped");
            return Err(Error::Range { offset, bytes, what });
        }
        granules[part.clone()].iter_mut().for_each(|g| g.uses += 1);
        let region = Arc::clone(&self.shared);
        Ok(Span::of_region(self.address() + offset, bytes, Use { region, part }))
    }

    fn check(&self, granule: usize) -> Result<()> {
        if granule < self.granules() {
            return Ok(());
        }
        let offset = (granule as u64).saturating_mul(self.granule_bytes());
        let what = format!("the region has {} granules", self.granules());
        Err(Error::Range { offset, bytes: self.granule_bytes(), what })
    }
}

impl Shared {
    fn address(&self, granule: usize) -> Address {
        self.base + granule as u64 * self.granule_bytes
    }

    fn map(&self, granules: &mut [Granule], granule: usize) -> Result<()> {
        if granules[granule].memory.is_some() {
            return Ok(());
        }
        let (driver, bytes) = (self.device.driver(), self.granule_bytes);
        let created = driver.create(bytes);
        let memory = created.map_err(|f| f.doing(format!("take {bytes} bytes of GPU memory")))?;
        // SAFETY: reserved addresses without memory, and new memory of the same size.
        let mapped = unsafe { driver.map(self.address(granule), bytes, memory) };
        mapped.map_err(|failure| {
            // SAFETY: just created, and not mapped.
            unsafe { driver.destroy(memory) };
            failure.doing(format!("map {bytes} bytes of GPU memory"))
        })?;
        granules[granule].memory = Some(memory);
        Ok(())
    }

    /// For a granule without uses.
    fn unmap(&self, granules: &mut [Granule], granule: usize) -> Result<()> {
        let Some(memory) = granules[granule].memory else { return Ok(()) };
        let (driver, bytes) = (self.device.driver(), self.granule_bytes);
        // SAFETY: mapped with this size; copies hold spans, so none uses it.
        let unmapped = unsafe { driver.unmap(self.address(granule), bytes) };
        unmapped.map_err(|f| f.doing(format!("unmap {bytes} bytes of GPU memory")))?;
        // SAFETY: what was mapped there, and now is not.
        unsafe { driver.destroy(memory) };
        granules[granule].memory = None;
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut granules = std::mem::take(&mut *lock(&self.granules));
        // Every span holds the region, so nothing is in use.
        let unmapped = (0..self.count).try_for_each(|i| self.unmap(&mut granules, i));
        // A device that fails here is lost, and its memory with it.
        if unmapped.is_ok() {
            let bytes = self.count as u64 * self.granule_bytes;
            // SAFETY: reserved with this size, and nothing is mapped.
            unsafe { self.device.driver().unreserve(self.base, bytes) };
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({} of {} bytes mapped)", self.mapped_bytes(), self.bytes())
    }
}

/// Keeps granules mapped.
pub(crate) struct Use {
    region: Arc<Shared>,
    part: Range<usize>,
}

impl Use {
    pub(crate) fn device(&self) -> &Device {
        &self.region.device
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut granules = lock(&self.region.granules);
        granules[self.part.clone()].iter_mut().for_each(|g| g.uses -= 1);
    }
}
