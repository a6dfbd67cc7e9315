//! Which pages each vCPU has written, from KVM's dirty rings (Linux, api.rst, KVM_CAP_DIRTY_LOG_RING).
//!
//! ```text
//! kernel:      dirty_index ──► writes slot and offset, then DIRTY
//!   ring  │ · │ R │ R │ D │ D │ D │ · │ · │
//!               │       └─ next: reads them, notes the page, then RESET
//!               └─ KVM_RESET_DIRTY_RINGS: protects the pages again, and the entries are free
//! ```
//! A page that is noted here has been protected again before anybody is told of it: what is written to it
//! afterwards is a new entry. A ring has an end: a vCPU that fills it leaves the guest, and goes back when
//! somebody has emptied it, which it does itself.
//!
//! KVM keeps a reserve in each ring for what is written until the vCPU leaves, and does not look whether it was
//! enough: entries that have not been read are written over then, and nobody knows which pages they named.
//! That is found out here, and the ring is not believed any more.

use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO,
    kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use nix::sys::signal::{SigSet, SigmaskHow};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use super::KvmError;

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// An entry's states (Linux, kvm.h, KVM_DIRTY_GFN_F_…): the kernel has written it, and we have read it.
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// How often the rings are swept of what has run over.
const SWEEPS: u32 = 16;

/// An entry of a ring, shared with the kernel (`kvm_dirty_gfn`).
#[repr(C)]
#[derive(Default)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());

/// A vCPU's ring in this process.
struct Mapping {
    entries: NonNull<Entry>,
    len: usize,
}

// SAFETY: the entries are atomics, and the mapping belongs to this value alone.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(vcpu: &VcpuFd, len: usize) -> std::io::Result<Self> {
        // SAFETY: asks for the page size.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let offset = libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * page;
        // SAFETY: a new mapping, where the kernel likes it.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len * size_of::<Entry>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(at.cast()) {
            Some(entries) if at != libc::MAP_FAILED => Ok(Self { entries, len }),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    fn entries(&self) -> &[Entry] {
        // SAFETY: the mapping has so many entries and lives as long as `self`; page-aligned, and any bytes
        // are valid atomics, which the kernel may change meanwhile.
        unsafe { slice::from_raw_parts(self.entries.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, to which no reference outlives `self`.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.len * size_of::<Entry>()) };
    }
}

/// Gives the slot and the page in it of each entry that the kernel has written, from `next` on, and marks it
/// as read; how many there were. `next` counts for ever; the ring's length is a power of two.
fn harvest(entries: &[Entry], next: &mut u64, mut found: impl FnMut(u32, u64)) -> u64 {
    let last = (entries.len() as u64).wrapping_sub(1);
    let begin = *next;
    // No more than all, though none is written anew before it is reset.
    while *next - begin <= last {
        let Some(entry) = entries.get((*next & last) as usize) else { break };
        if entry.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
            break;
        }
        found(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
        entry.flags.store(RESET, Ordering::Release);
        *next += 1;
    }
    *next - begin
}

/// Marks every entry that the kernel has written as read, wherever it is, in a ring that has run over; how
/// many there were.
fn sweep(entries: &[Entry]) -> u64 {
    let written = entries.iter().filter(|entry| {
        let (from, to) = (DIRTY, RESET);
        entry.flags.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    });
    written.count() as u64
}

/// Where an entry points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// A page of the RAM block.
    Page(u64),
    /// One of these 64 pages of it, the first a multiple of 64: their slots have changed meanwhile.
    Word(u64),
    /// Into no memory that is there.
    Nowhere,
}

/// An entry that points nowhere, which KVM never writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stray {
    vcpu: usize,
    slot: u32,
    offset: u64,
}

struct Ring {
    mapping: Mapping,
    next: u64,
    /// Pages since the beginning of the log, each once for each time that somebody was told.
    found: u64,
}

/// What has been found and nobody has been told of yet.
#[derive(Default)]
struct Pages {
    /// A bit for each page of the block.
    words: Vec<u64>,
    any: bool,
    stray: Option<Stray>,
    /// The vCPU whose ring has run over. For good: where KVM goes on in it is not known.
    overrun: Option<usize>,
}

impl Pages {
    /// Whether all is known that was written.
    fn check(&self) -> Result<(), KvmError> {
        if let Some(vcpu) = self.overrun {
            return Err(KvmError::DirtyRingOverrun { vcpu });
        }
        match self.stray {
            None => Ok(()),
            Some(Stray { vcpu, slot, offset }) => {
                Err(KvmError::DirtyRingEntry { vcpu, slot, offset })
            }
        }
    }

    /// Whether one of them had not been found before; `None` if the block has no such page.
    fn or(&mut self, page: u64, bits: u64) -> Option<bool> {
        let word = self.words.get_mut((page / 64) as usize)?;
        let new = *word & bits != bits;
        *word |= bits;
        self.any = true;
        Some(new)
    }

    /// Notes the page of an entry; whether it had not been found before.
    fn note(&mut self, place: Place, stray: Stray) -> bool {
        let noted = match place {
            Place::Page(page) => self.or(page, 1 << (page % 64)),
            Place::Word(page) => self.or(page, u64::MAX),
            Place::Nowhere => None,
        };
        if noted.is_none() {
            self.stray.get_or_insert(stray);
        }
        noted.unwrap_or(false)
    }
}

struct State {
    rings: Vec<Ring>,
    pages: Pages,
}

/// All vCPUs' rings.
pub(super) struct DirtyRings {
    vm: Arc<VmFd>,
    entries: u32,
    state: Mutex<State>,
}

impl DirtyRings {
    /// Gives each vCPU that is created from now on a ring of so many entries, a power of two. `pages` is the
    /// RAM block's length.
    pub(super) fn new(vm: Arc<VmFd>, entries: u32, pages: u64) -> Result<Self, KvmError> {
        let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        // What is offered is the most bytes that a ring may have.
        let offered = caps.map(|cap| (cap, vm.check_extension_raw(cap.into()).max(0) as u64));
        let Some((cap, most)) = offered.into_iter().find(|(_, most)| *most > 0) else {
            return Err(KvmError::NoDirtyRing);
        };
        let size = size_of::<Entry>() as u64;
        let bytes = u64::from(entries) * size;
        if bytes > most {
            return Err(KvmError::DirtyRingTooLarge { wanted: entries, most: most / size });
        }
        let mut request = kvm_enable_cap { cap, ..Default::default() };
        request.args[0] = bytes;
        vm.enable_cap(&request).map_err(|e| {
            KvmError::ioctl(format!("KVM_ENABLE_CAP(DIRTY_LOG_RING) of {entries} entries"), e)
        })?;
        let words = vec![0; pages.div_ceil(64) as usize];
        let pages = Pages { words, ..Pages::default() };
        let state = Mutex::new(State { rings: Vec::new(), pages });
        Ok(Self { vm, entries, state })
    }

    /// Maps the ring of a vCPU that was just created. They are added in the order of their indices.
    pub(super) fn add(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let mut state = self.lock();
        let mapping =
            Mapping::new(vcpu, self.entries as usize).map_err(|source| KvmError::Ioctl {
                what: format!("mmap of vCPU {}'s dirty ring", state.rings.len()),
                source,
            })?;
        state.rings.push(Ring { mapping, next: 0, found: 0 });
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties all rings; `place` says where the page `offset` of a slot is in the RAM block. When this
    /// returns, every page that was found is protected again.
    pub(super) fn empty(&self, place: impl Fn(u32, u64) -> Place) -> Result<(), KvmError> {
        self.emptied(place).map(drop)
    }

    /// Empties the rings, and gives all that was found since the last time, 64 pages at a time.
    pub(super) fn take(
        &self,
        place: impl Fn(u32, u64) -> Place,
        mut found: impl FnMut(u64, &[u64]),
    ) -> Result<(), KvmError> {
        let mut state = self.emptied(place)?;
        state.pages.check()?;
        if std::mem::take(&mut state.pages.any) {
            found(0, &state.pages.words);
            state.pages.words.fill(0);
        }
        Ok(())
    }

    /// Empties the rings and forgets what was in them, and how much that was. Fails if one has ever run over.
    pub(super) fn forget(&self, place: impl Fn(u32, u64) -> Place) -> Result<(), KvmError> {
        let mut state = self.emptied(place)?;
        state.pages.words.fill(0);
        (state.pages.any, state.pages.stray) = (false, None);
        state.rings.iter_mut().for_each(|ring| ring.found = 0);
        state.pages.check()
    }

    /// Whether one of the rings is half full or more.
    pub(super) fn half_full(&self) -> bool {
        self.lock().rings.iter().any(|ring| {
            let entries = ring.mapping.entries();
            let half = (ring.next as usize + entries.len() / 2) % entries.len().max(1);
            entries.get(half).is_some_and(|entry| entry.flags.load(Ordering::Relaxed) & DIRTY != 0)
        })
    }

    /// How many pages each vCPU has been found to write since the log began, and was the first to, since
    /// somebody was last told of them.
    pub(super) fn found(&self) -> Vec<u64> {
        self.lock().rings.iter().map(|ring| ring.found).collect()
    }

    fn emptied(
        &self,
        place: impl Fn(u32, u64) -> Place,
    ) -> Result<MutexGuard<'_, State>, KvmError> {
        let mut guard = self.lock();
        let State { rings, pages } = &mut *guard;
        let mut read = 0;
        for (vcpu, ring) in rings.iter_mut().enumerate() {
            let entries = ring.mapping.entries();
            let found = &mut ring.found;
            let count = harvest(entries, &mut ring.next, |slot, offset| {
                let new = pages.note(place(slot, offset), Stray { vcpu, slot, offset });
                // What KVM itself writes for a guest is an entry each time.
                *found += u64::from(new);
            });
            read += count;
            if count == entries.len() as u64 {
                // The last of the reserve is gone, and maybe more.
                pages.overrun.get_or_insert(vcpu);
            }
        }
        if read > 0 && self.reset()? != read && pages.overrun.is_none() {
            // One was written over meanwhile. It does not matter whose.
            pages.overrun = Some(0);
        }
        if pages.overrun.is_some() {
            // So that the vCPU can go on: no migration will believe what was in it.
            for _ in 0..SWEEPS {
                let swept: u64 = rings.iter().map(|ring| sweep(ring.mapping.entries())).sum();
                if swept == 0 || self.reset()? == 0 {
                    break;
                }
            }
        }
        Ok(guard)
    }

    /// Has KVM protect the pages of all entries that were read, and free the entries; how many there were.
    ///
    /// Since Linux 6.16 it breaks off when the thread has a signal, and then frees up to 64 entries whose
    /// pages it has not protected (virt/kvm/dirty_ring.c, kvm_dirty_ring_reset). So signals are kept away. What
    /// stops, freezes or traces the process can't be; it is noticed by the number of entries, unless it comes
    /// right behind the last of them (docs/migration.md).
    fn reset(&self) -> Result<u64, KvmError> {
        let failed = |source| KvmError::Ioctl { what: "KVM_RESET_DIRTY_RINGS".into(), source };
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let mask = mask.map_err(|e| failed(e.into()))?;
        // SAFETY: takes no argument.
        let done = unsafe { ioctl(&self.vm, KVM_RESET_DIRTY_RINGS()) };
        let error = std::io::Error::last_os_error();
        mask.thread_set_mask().map_err(|e| failed(e.into()))?;
        u64::try_from(done).map_err(|_| failed(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(len: usize) -> Vec<Entry> {
        std::iter::repeat_with(Entry::default).take(len).collect()
    }

    /// What the kernel does: writes an entry at `at`, which must be free.
    fn push(ring: &[Entry], at: u64, slot: u32, offset: u64) {
        let entry = &ring[at as usize % ring.len()];
        assert_eq!(entry.flags.load(Ordering::Acquire), 0, "entry {at} is in use");
        entry.slot.store(slot, Ordering::Relaxed);
        entry.offset.store(offset, Ordering::Relaxed);
        entry.flags.store(DIRTY, Ordering::Release);
    }

    /// And frees those that were read.
    fn reset(ring: &[Entry]) -> usize {
        let read = ring.iter().filter(|e| e.flags.load(Ordering::Acquire) & RESET != 0);
        read.map(|entry| entry.flags.store(0, Ordering::Release)).count()
    }

    fn harvested(ring: &[Entry], next: &mut u64) -> Vec<(u32, u64)> {
        let mut found = Vec::new();
        let count = harvest(ring, next, |slot, offset| found.push((slot, offset)));
        assert_eq!(count, found.len() as u64);
        found
    }

    #[test]
    fn entries_come_in_order_once_and_around_the_end() {
        let ring = ring(8);
        let (mut at, mut next) = (0, 0);
        assert_eq!(harvested(&ring, &mut next), []);
        for round in 0..10_u64 {
            let wanted: Vec<_> = (0..5).map(|n| (n as u32, round * 10 + n)).collect();
            for (slot, offset) in &wanted {
                push(&ring, at, *slot, *offset);
                at += 1;
            }
            assert_eq!(harvested(&ring, &mut next), wanted);
            // Read, and not reset: they do not come again, and nothing else does.
            assert_eq!(harvested(&ring, &mut next), []);
            assert_eq!(reset(&ring), 5);
        }
        assert_eq!((at, next), (50, 50));
    }

    #[test]
    fn a_full_ring_is_read_once_around() {
        let ring = ring(16);
        let mut next = 5;
        for n in 0..16 {
            push(&ring, 5 + n, 0, n);
        }
        let found = harvested(&ring, &mut next);
        assert_eq!(found, (0..16).map(|n| (0, n)).collect::<Vec<_>>());
        assert_eq!((next, harvested(&ring, &mut next)), (21, Vec::new()));
        assert_eq!(reset(&ring), 16);
        // A ring whose every entry claims to be written for ever does not hold anybody up.
        let lying = harvest(&ring, &mut next, |_, _| {
            ring.iter().for_each(|entry| entry.flags.store(DIRTY, Ordering::Release));
        });
        assert_eq!(lying, 0);
        push(&ring, next, 0, 0);
        let lying = harvest(&ring, &mut next, |_, _| {
            ring.iter().for_each(|entry| entry.flags.store(DIRTY, Ordering::Release));
        });
        assert_eq!(lying, 16);
        assert_eq!(harvest(&[], &mut next, |_, _| {}), 0);
    }

    #[test]
    fn what_is_behind_a_hole_waits_for_it() {
        let ring = ring(8);
        let mut next = 0;
        push(&ring, 1, 0, 1);
        assert_eq!(harvested(&ring, &mut next), []);
        push(&ring, 0, 0, 0);
        assert_eq!(harvested(&ring, &mut next), [(0, 0), (0, 1)]);
        // Flags that nobody knows are none of the two.
        ring[2].flags.store(4, Ordering::Release);
        assert_eq!(harvested(&ring, &mut next), []);
        ring[2].flags.store(DIRTY | RESET, Ordering::Release);
        assert_eq!(harvested(&ring, &mut next), []);
    }

    #[test]
    fn pages_are_noted_and_the_first_entry_that_points_nowhere_is_told() {
        let mut pages = Pages { words: vec![0; 3], ..Pages::default() };
        let stray = |slot| Stray { vcpu: 1, slot, offset: 7 };
        assert!(pages.note(Place::Page(64), stray(0)));
        assert!(!pages.note(Place::Page(64), stray(0)), "found before");
        assert!(pages.note(Place::Page(191), stray(1)));
        assert!(pages.note(Place::Word(0), stray(2)));
        assert_eq!((&pages.words[..], pages.any), (&[u64::MAX, 1, 1 << 63][..], true));
        assert!(pages.check().is_ok());
        assert!(!pages.note(Place::Page(192), stray(3)));
        assert!(!pages.note(Place::Nowhere, stray(4)));
        assert_eq!(pages.stray, Some(stray(3)));
        assert!(matches!(pages.check(), Err(KvmError::DirtyRingEntry { slot: 3, .. })));
        pages.overrun = Some(2);
        assert!(matches!(pages.check(), Err(KvmError::DirtyRingOverrun { vcpu: 2 })));
    }

    #[test]
    fn a_ring_that_has_run_over_is_swept_of_what_is_written_and_of_nothing_else() {
        let ring = ring(8);
        push(&ring, 6, 0, 1);
        push(&ring, 2, 0, 2);
        ring[3].flags.store(RESET, Ordering::Release);
        assert_eq!(sweep(&ring), 2);
        let flags: Vec<_> = ring.iter().map(|e| e.flags.load(Ordering::Acquire)).collect();
        assert_eq!(flags, [0, 0, RESET, RESET, 0, 0, RESET, 0]);
        assert_eq!(sweep(&ring), 0);
    }
}
