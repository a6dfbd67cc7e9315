//! Guest RAM: the block `pc.ram`, mapped below and above the PCI hole.
//!
//! The memory is private and anonymous, with huge pages asked for. A memfd would do as well where
//! the kernel gives shared memory huge pages, but most hosts are set to never do that
//! (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`), and then first touch of a destination's
//! memory is ten times slower.
//!
//! It is a memfd ([`Memfd`]) for a VM that is to be handed to another process of the same host, or has
//! been: mapped over the private memory, at the same addresses, so that nobody who knows them (KVM, the
//! devices) has to be told.

use std::io;
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;

use devices::memory::GuestRamRef;
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::kvm::Slot;
use crate::memfd::Memfd;
use crate::rom::Roms;

/// The unit of everything: an x86 page.
pub const PAGE_SIZE: u64 = 4096;

/// What KVM can map at once (Intel SDM volume 3, 4.5.4: a page directory entry's 2 MiB).
const HUGE_PAGE: usize = 2 << 20;
/// How often memory is placed anew so that it begins with a huge page.
const ALIGN_TRIES: usize = 4;

/// Guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the mapping.
    #[error(
        "cannot map {size} bytes of guest memory (the host has {available} bytes available): give \
         the VM less with --memory, or free memory on the host"
    )]
    Map {
        /// Wanted.
        size: u64,
        /// What the host has, as far as it can be known.
        available: u64,
        /// The reason.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// More than the host has.
    #[error(
        "the VM wants {size} bytes of memory, the host has only {total} in all: give the VM less \
         with --memory"
    )]
    TooMuch {
        /// Wanted.
        size: u64,
        /// All that the host has.
        total: u64,
    },
    /// The host has not as much as it said.
    #[error(
        "the host could not give the VM its {size} bytes of memory at once: free memory there, give the VM \
         less with --memory, or leave out --prealloc"
    )]
    Allocate {
        /// Wanted.
        size: u64,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The host gives no memory that can be shared.
    #[error("the host could not give the VM {size} bytes of shared memory (--shared-memory)")]
    Share {
        /// Wanted.
        size: u64,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// Not a size that the board can have.
    #[error(transparent)]
    Size(#[from] arch::layout::LayoutError),
    /// The regions do not fit together.
    #[error("guest memory of {size} bytes cannot be laid out: {reason}")]
    Layout {
        /// Wanted.
        size: u64,
        /// Why.
        reason: String,
    },
}

/// The RAM of one machine.
#[derive(Clone)]
pub struct Ram {
    guest: GuestRamRef,
    slots: Arc<[Slot]>,
    mappings: Arc<[Arc<MmapRegion<AtomicBitmap>>]>,
    size: u64,
    roms: Arc<Roms>,
    /// What is mapped, if it is no private memory: all of the block, in its order.
    shared: Arc<RwLock<Option<Arc<Memfd>>>>,
}

/// Where a memfd's bytes are to be mapped from, and whether they may be written to.
type Backing<'a> = Option<(&'a Memfd, bool)>;

/// How many bytes this process could still be given: what the host has, or what its control groups
/// leave, whichever is less. As far as it can be known.
pub fn available() -> Option<u64> {
    let host = meminfo("MemAvailable:");
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    // The line of version 2 (Linux, cgroup-v2.rst); version 1 is not looked at.
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let group = own.and_then(|path| group_leaves(Path::new("/sys/fs/cgroup"), Path::new(path)));
    host.into_iter().chain(group).min()
}

/// What a control group and those that it is in leave of their limits; nothing where none is set.
fn group_leaves(root: &Path, group: &Path) -> Option<u64> {
    let left = |group: &Path| {
        let number = |file| {
            let text = std::fs::read_to_string(root.join(group).join(file)).ok()?;
            text.trim().parse::<u64>().ok()
        };
        // The limit is the word "max" where there is none.
        Some(number("memory.max")?.saturating_sub(number("memory.current")?))
    };
    group.ancestors().filter_map(left).min()
}

fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

impl Ram {
    /// Zeroed RAM of `size` bytes for processors of `phys_bits` physical address bits. Nothing is
    /// allocated until it is touched.
    pub fn new(size: u64, phys_bits: u8) -> Result<Self, MemoryError> {
        if let Some(total) = meminfo("MemTotal:").filter(|&total| size > total) {
            return Err(MemoryError::TooMuch { size, total });
        }
        let layout_error = |reason: String| MemoryError::Layout { size, reason };
        let mut regions = Vec::new();
        let mut slots = Vec::new();
        let mut mappings = Vec::new();
        for (id, range) in (0..).zip(arch::layout::ram_regions(size, phys_bits)?) {
            let mapping = map(range.size).map_err(|source| MemoryError::Map {
                size,
                available: meminfo("MemAvailable:").unwrap_or(0),
                source,
            })?;
            let mapping = Arc::new(mapping);
            slots.push(Slot {
                id,
                guest_address: range.address,
                len: range.size,
                host_address: mapping.as_ptr() as u64,
                block_offset: range.block_offset,
            });
            regions.push(
                GuestRegionMmap::with_arc(mapping.clone(), GuestAddress(range.address))
                    .ok_or_else(|| layout_error("it wraps around".into()))?,
            );
            mappings.push(mapping);
        }
        let guest =
            GuestMemoryMmap::from_regions(regions).map_err(|e| layout_error(e.to_string()))?;
        Ok(Self {
            guest: Arc::new(guest),
            slots: slots.into(),
            mappings: mappings.into(),
            size,
            roms: Arc::default(),
            shared: Arc::default(),
        })
    }

    /// The same, such that it can be given to another process.
    pub fn new_shared(size: u64, phys_bits: u8) -> Result<Self, MemoryError> {
        let ram = Self::new(size, phys_bits)?;
        let failed = |source| MemoryError::Share { size, source };
        let memory = Memfd::new(c"pc.ram", size).map_err(failed)?;
        ram.map_over(Some((&memory, true))).map_err(failed)?;
        ram.note(Some(memory));
        Ok(ram)
    }

    /// What another process can be given; nothing if the memory is private.
    pub fn shared(&self) -> Option<Arc<Memfd>> {
        self.shared.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes another process' memory, as long as this, in place of its own. It can only be read until
    /// [`make_writable`](Self::make_writable): whoever writes to it before ends this process, and KVM gets an
    /// error.
    pub fn adopt(&self, memory: Memfd) -> io::Result<()> {
        if memory.size() != self.size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mapped = self.map_over(Some((&memory, false)));
        if mapped.is_err() {
            // One of two mappings may have been made.
            self.map_over(None)?;
        } else {
            self.note(Some(memory));
        }
        mapped
    }

    /// What was adopted may be written to from now on.
    pub fn make_writable(&self) -> io::Result<()> {
        self.slots.iter().try_for_each(|slot| {
            let (address, len) = (slot.host_address as *mut _, slot.len as usize);
            // SAFETY: the range is exactly one of this RAM's mappings, which everybody takes for memory that
            // can be written to.
            match unsafe { libc::mprotect(address, len, libc::PROT_READ | libc::PROT_WRITE) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    }

    /// Puts private memory, all zeros, in the place of shared memory, and touches that no more: it is
    /// another process' now. Nothing happens to memory that is private.
    pub fn let_go(&self) -> io::Result<()> {
        if self.shared().is_none() {
            return Ok(());
        }
        self.map_over(None)?;
        self.note(None);
        Ok(())
    }

    fn note(&self, memory: Option<Memfd>) {
        *self.shared.write().unwrap_or_else(PoisonError::into_inner) = memory.map(Arc::new);
    }

    /// Maps something else where all of it is mapped.
    fn map_over(&self, backing: Backing<'_>) -> io::Result<()> {
        self.slots.iter().try_for_each(|slot| map_over(slot, backing))
    }

    /// Has the host give all of it its memory now, cleared by as many threads as the host has processors.
    pub fn allocate(&self) -> Result<(), MemoryError> {
        let threads = thread::available_parallelism().map_or(1, NonZero::get) as u64;
        for slot in self.slots.iter() {
            let part = slot.len.div_ceil(threads).next_multiple_of(HUGE_PAGE as u64);
            thread::scope(|scope| {
                let starts = (0..slot.len).step_by(part as usize);
                let work = |at: u64| allocate(slot.host_address + at, part.min(slot.len - at));
                let workers: Vec<_> = starts.map(|at| scope.spawn(move || work(at))).collect();
                workers.into_iter().try_for_each(|worker| {
                    let done = worker.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
                    done.map_err(|source| MemoryError::Allocate { size: self.size, source })
                })
            })?;
        }
        Ok(())
    }

    /// The memory as devices see it.
    pub fn guest(&self) -> &GuestRamRef {
        &self.guest
    }

    /// The stretches that KVM maps, in the order of their offsets in the block.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The firmware and tables that travel beside it.
    pub fn roms(&self) -> &Roms {
        &self.roms
    }

    /// Size of the block in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The bitmap of device writes of the slot at `index`, one bit a page.
    pub fn device_bitmap(&self, index: usize) -> Option<&AtomicBitmap> {
        self.mappings.get(index).map(|mapping| mapping.bitmap())
    }
}

/// Maps memory on a huge page's boundary, if that can be had: KVM maps a huge page to the guest only
/// where both its addresses are on one. Linux has done so by itself since 6.7.
fn map_aligned(len: u64) -> Result<MmapRegion<AtomicBitmap>, vm_memory::mmap::MmapRegionError> {
    let map = || {
        // The builder's own bitmap has no bits: what devices write would be lost.
        let bitmap = AtomicBitmap::with_len(len as usize);
        MmapRegionBuilder::new_with_bitmap(len as usize, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
    };
    // Mappings are placed downwards: with a filler of the right size in its place, the next one
    // ends lower by as much. A filler may also fall into a hole above; the next one will not.
    let mut fillers = Vec::new();
    loop {
        let region = map()?;
        let beyond = region.as_ptr() as usize % HUGE_PAGE;
        if beyond == 0 || fillers.len() == ALIGN_TRIES {
            return Ok(region);
        }
        drop(region);
        fillers.push(MmapRegion::<()>::new(beyond)?);
    }
}

fn map(len: u64) -> Result<MmapRegion<AtomicBitmap>, vm_memory::mmap::MmapRegionError> {
    let region = map_aligned(len)?;
    if !(region.as_ptr() as usize).is_multiple_of(HUGE_PAGE) {
        tracing::debug!("guest memory is not on a huge page's boundary");
    }
    ask_for_huge_pages(region.as_ptr() as u64, len);
    Ok(region)
}

/// Asks for huge pages for one of RAM's mappings.
fn ask_for_huge_pages(address: u64, len: u64) {
    // SAFETY: the range is exactly one mapping of RAM's; the advice changes no content.
    let advised = unsafe { libc::madvise(address as *mut _, len as usize, libc::MADV_HUGEPAGE) };
    if advised != 0 {
        tracing::debug!("no huge pages for guest memory: {}", std::io::Error::last_os_error());
    }
}

/// Maps a part of a memfd, or private zeros, exactly over one of RAM's mappings. In one step: nobody
/// finds nothing there.
fn map_over(slot: &Slot, backing: Backing<'_>) -> io::Result<()> {
    let (prot, flags, fd, offset) = match backing {
        None => {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            (libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        }
        Some((memory, writable)) => {
            let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
            (prot, flags, memory.as_fd().as_raw_fd(), slot.block_offset as libc::off_t)
        }
    };
    let (address, len) = (slot.host_address as *mut _, slot.len as usize);
    // SAFETY: the range is exactly one of this RAM's mappings, which stays one: only what is behind it
    // changes, and that is memory which is shared with a guest, to which no Rust reference exists. A memfd is
    // sealed, and as long as the block, so that there is always something behind.
    let mapped = unsafe { libc::mmap(address, len, prot, flags | libc::MAP_FIXED, fd, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    ask_for_huge_pages(slot.host_address, slot.len);
    Ok(())
}

/// Has the host give memory to a range of one of RAM's mappings.
fn allocate(address: u64, len: u64) -> io::Result<()> {
    // SAFETY: the range lies inside a mapping of `Ram`, which is alive; the content stays as it is.
    let done = unsafe { libc::madvise(address as *mut _, len as usize, libc::MADV_POPULATE_WRITE) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn the_tightest_control_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b/c");
        std::fs::create_dir_all(&inner).unwrap();
        let put = |group: &str, max: &str, current: &str| {
            let dir = root.path().join(group);
            std::fs::write(dir.join("memory.max"), format!("{max}\n")).unwrap();
            std::fs::write(dir.join("memory.current"), format!("{current}\n")).unwrap();
        };
        let leaves = |group| group_leaves(root.path(), Path::new(group));
        assert_eq!(leaves("a/b/c"), None);
        put("a/b/c", "max", "5");
        assert_eq!(leaves("a/b/c"), None);
        put("a/b", "1000", "400");
        put("a", "2000", "1500");
        assert_eq!(
            (leaves("a/b/c"), leaves("a/b"), leaves("a")),
            (Some(500), Some(500), Some(500))
        );
        put("a", "2000", "9999");
        assert_eq!(leaves("a/b/c"), Some(0));
    }

    #[test]
    fn memory_that_is_allocated_ahead_is_there() {
        use migration::guest::GuestRam;
        let ram = Ram::new(67 << 20, 40).unwrap();
        let absent = || ram.absent(0, 0, 67 << 20).expect("the host tells");
        assert!(absent().iter().any(|word| *word != 0));
        ram.allocate().unwrap();
        assert!(absent().iter().all(|word| *word == 0));
        assert!(ram.is_zero(0, 66 << 20));
    }

    #[test]
    fn shared_memory_is_all_there_for_whoever_is_given_it() {
        use migration::guest::GuestRam;
        let size = 5 << 30;
        let ram = Ram::new_shared(size, 40).unwrap();
        let absent = |ram: &Ram, at: u64| {
            let page = ram.absent(0, at, PAGE_SIZE).expect("the host tells");
            page == [1]
        };
        // In both mappings, and where one ends and the other begins.
        let border = ram.slots()[1].block_offset;
        assert!(absent(&ram, 0x5000) && absent(&ram, border) && absent(&ram, size - PAGE_SIZE));
        ram.copy_in(0, border - 3, b"border").unwrap();
        ram.copy_in(0, size - 4, b"last").unwrap();

        let other = Ram::new(size, 40).unwrap();
        let fd = ram.shared().unwrap().descriptor().unwrap();
        other.adopt(Memfd::received(fd, size, "guest memory").unwrap()).unwrap();
        // Nothing of it is mapped there yet.
        assert!(!absent(&other, border) && !absent(&other, border - PAGE_SIZE));
        assert!(!absent(&other, size - PAGE_SIZE) && absent(&other, size / 2));
        let mut bytes = [0; 6];
        other.copy_out(0, border - 3, &mut bytes).unwrap();
        assert_eq!(&bytes, b"border");
        other.make_writable().unwrap();
        other.copy_in(0, size - 4, b"LAST").unwrap();
        ram.copy_out(0, size - 4, &mut bytes[..4]).unwrap();
        assert_eq!(&bytes[..4], b"LAST");

        // Whoever lets go of it does it no harm, and finds nothing of it.
        ram.let_go().unwrap();
        assert!(ram.shared().is_none() && ram.is_zero(0, size - PAGE_SIZE));
        ram.fill(0, 0, 2 << 20, 1).unwrap();
        devices::virtio::PageDiscard::discard(&ram, 0, 2 << 20).unwrap();
        drop(ram);
        other.copy_out(0, size - 4, &mut bytes[..4]).unwrap();
        assert_eq!(&bytes[..4], b"LAST");
        assert!(absent(&other, 0));
    }

    #[test]
    fn what_is_adopted_is_not_written_to_before_its_time() {
        use migration::guest::{GuestRam, ReadPart};
        use std::io::Write;
        use std::os::unix::net::UnixStream;
        let size = 4 << 20;
        let ram = Ram::new_shared(size, 40).unwrap();
        let other = Ram::new(size, 40).unwrap();
        let fd = || ram.shared().unwrap().descriptor().unwrap();
        let memory = |size| Memfd::received(fd(), size, "guest memory");
        assert!(Ram::new(2 * size, 40).unwrap().adopt(memory(size).unwrap()).is_err());
        other.adopt(memory(size).unwrap()).unwrap();
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut read = || {
            a.write_all(b"page").unwrap();
            other.read_parts(b.as_fd(), &mut [ReadPart::Ram { block: 0, offset: 0, len: 4 }])
        };
        // The kernel writes, so that this is no fault of this process.
        assert_eq!(read().unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert!(ram.is_zero(0, 0) && other.is_zero(0, 0));
        other.make_writable().unwrap();
        assert_eq!(read().unwrap(), 4);
        assert!(!ram.is_zero(0, 0));
        other.let_go().unwrap();
        assert!(other.is_zero(0, 0) && !ram.is_zero(0, 0));
    }

    #[test]
    fn what_a_device_writes_is_marked_in_every_slot() {
        let ram = Ram::new(5 << 30, 40).unwrap();
        for (index, slot) in ram.slots().iter().enumerate() {
            let bitmap = ram.device_bitmap(index).unwrap();
            assert_eq!(bitmap.len() as u64, slot.len / PAGE_SIZE);
            bitmap.reset();
            for page in [0, 7, slot.len / PAGE_SIZE - 1] {
                let address = GuestAddress(slot.guest_address + page * PAGE_SIZE + 8);
                ram.guest().write_slice(b"device", address).unwrap();
                ram.guest().store(1_u16, address, Ordering::Relaxed).unwrap();
                let marked = bitmap.get_and_reset();
                let expected = |n| if n == page / 64 { 1 << (page % 64) } else { 0_u64 };
                assert!((0..).zip(&marked).all(|(n, word)| *word == expected(n)), "page {page}");
            }
        }
    }

    #[test]
    fn memory_is_where_kvm_can_map_huge_pages() {
        for size in [64 << 20, 5 << 30] {
            // Another mapping of odd size, so that nothing is aligned by chance.
            let _odd = MmapRegion::<()>::new(3 * PAGE_SIZE as usize).unwrap();
            let ram = Ram::new(size, 40).unwrap();
            for slot in ram.slots() {
                let unlike = (slot.host_address ^ slot.guest_address) % HUGE_PAGE as u64;
                assert_eq!(unlike, 0, "{slot:x?}");
            }
        }
    }
}
