//! Guest memory as KVM knows it, and which pages the guest's vCPUs have written: KVM's dirty log, slot
//! by slot, or its dirty rings, vCPU by vCPU ([`dirty_ring`](super::dirty_ring)).
//!
//! The 256 KiB below 1 MiB that the chipset may show as ROM are slots of their own
//! ([`shadow`](super::shadow)).

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES,
    KVMIO, kvm_clear_dirty_log, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::KvmError;
use super::dirty_ring::{DirtyRings, Place};
use super::shadow::{self, BelowOneMib, Shadow};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Pages covered by one word of the log. KVM_CLEAR_DIRTY_LOG takes ranges in these steps.
const PAGES_PER_WORD: u64 = 64;
/// The unit of the log.
const PAGE_SIZE: u64 = 4096;

/// One stretch of guest memory as KVM knows it.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// KVM's number for it.
    pub id: u32,
    /// Guest-physical address of its first byte.
    pub guest_address: u64,
    /// Length in bytes, whole pages.
    pub len: u64,
    /// Address of its first byte in this process.
    pub host_address: u64,
    /// Offset of its first byte in the RAM block `pc.ram`.
    pub block_offset: u64,
}

/// The memory slots of a VM and their dirty logs, or its vCPUs' dirty rings.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    slots: Vec<Slot>,
    /// Locked before the rings are.
    shadow: Mutex<Shadow>,
    manual: bool,
    /// A log can begin with every page marked.
    initially_set: bool,
    rings: Option<DirtyRings>,
}

/// Tells KVM what a slot is; a length of 0 takes it away.
///
/// # Safety
/// The slot must lie in a mapping of this process that outlives the VM or the slot.
pub(super) unsafe fn set_region(vm: &VmFd, slot: &Slot, flags: u32) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot: slot.id,
        flags,
        guest_phys_addr: slot.guest_address,
        memory_size: slot.len,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the caller vouches for the mapping.
    unsafe { vm.set_user_memory_region(region) }.map_err(|e| {
        KvmError::ioctl(
            format!(
                "KVM_SET_USER_MEMORY_REGION slot {} ({:#x}+{:#x})",
                slot.id, slot.guest_address, slot.len
            ),
            e,
        )
    })
}

/// Maps `ram` into a VM whose guest never runs: no log, no window below 1 MiB. Each slot is a grace period
/// of the kernel's, and milliseconds on a busy host.
///
/// # Safety
/// Every slot must lie in a mapping of this process that outlives the VM.
pub unsafe fn map_plainly(vm: &VmFd, ram: &[Slot]) -> Result<(), KvmError> {
    // SAFETY: the caller vouches for the mapping behind every slot.
    ram.iter().try_for_each(|slot| unsafe { set_region(vm, slot, 0) })
}

/// The pages of `slot` written since they were last cleared, one bit a page, page 0 in bit 0 of word
/// 0. Without manual protection this clears the log as well.
pub(super) fn fetch(vm: &VmFd, slot: &Slot) -> Result<Vec<u64>, KvmError> {
    vm.get_dirty_log(slot.id, slot.len as usize)
        .map_err(|e| KvmError::ioctl(format!("KVM_GET_DIRTY_LOG slot {}", slot.id), e))
}

/// Makes the pages of `bits` count anew. `bits` is the log of the slot's pages from `first_page` (a
/// multiple of 64) on.
pub(super) fn clear(vm: &VmFd, slot: &Slot, first_page: u64, bits: &[u64]) -> Result<(), KvmError> {
    debug_assert_eq!(first_page % PAGES_PER_WORD, 0);
    let pages =
        (bits.len() as u64 * PAGES_PER_WORD).min((slot.len / 4096).saturating_sub(first_page));
    let mut request = kvm_clear_dirty_log {
        slot: slot.id,
        num_pages: pages as u32,
        first_page,
        ..Default::default()
    };
    request.__bindgen_anon_1.dirty_bitmap = bits.as_ptr().cast_mut().cast();
    // SAFETY: the bitmap has at least `pages` bits, and the kernel only reads it.
    match unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) } {
        0 => Ok(()),
        _ => Err(KvmError::ioctl(
            format!(
                "KVM_CLEAR_DIRTY_LOG slot {} pages {first_page:#x}+{pages:#x} of fd {}",
                slot.id,
                vm.as_raw_fd()
            ),
            kvm_ioctls::Error::last(),
        )),
    }
}

/// RAM without what lies between 768 KiB and 1 MiB, and that.
fn split(ram: &[Slot]) -> (Vec<Slot>, Option<Slot>) {
    let (from, to) = (shadow::START, shadow::END);
    let mut slots = Vec::new();
    let mut window = None;
    let mut id = 0;
    for slot in ram {
        let end = slot.guest_address + slot.len;
        let part = |from: u64, to: u64| {
            let (from, to) = (from.max(slot.guest_address), to.min(end));
            let skipped = from.saturating_sub(slot.guest_address);
            (from < to).then(|| Slot {
                id: 0,
                guest_address: from,
                len: to - from,
                host_address: slot.host_address + skipped,
                block_offset: slot.block_offset + skipped,
            })
        };
        for piece in [part(0, from), part(to, u64::MAX)].into_iter().flatten() {
            slots.push(Slot { id, ..piece });
            id += 1;
        }
        window = window.or(part(from, to));
    }
    (slots, window)
}

impl DirtyLog {
    /// The slots of `ram`, which [`map`](Self::map) gives to the VM. With `ring` each vCPU has a dirty ring of
    /// so many entries, a power of two; then this comes before the first vCPU is created.
    ///
    /// # Safety
    /// Every slot must lie in a mapping of this process that outlives the VM.
    pub unsafe fn new(vm: Arc<VmFd>, ram: &[Slot], ring: Option<u32>) -> Result<Self, KvmError> {
        let end = ram.iter().map(|slot| slot.block_offset + slot.len).max().unwrap_or(0);
        let rings = ring
            .map(|entries| DirtyRings::new(vm.clone(), entries, end / PAGE_SIZE))
            .transpose()?;
        // A log that begins with every page set does not protect them: no ring would hear of a write.
        let (manual, initially_set) = match rings {
            Some(_) => (false, false),
            None => super::enable_manual_dirty_log(&vm)?,
        };
        let (slots, window) = split(ram);
        let first_id = slots.len() as u32;
        // SAFETY: the window is a part of `ram`.
        let shadow = unsafe { Shadow::new(vm.clone(), window, first_id) };
        Ok(Self { vm, slots, shadow: Mutex::new(shadow), manual, initially_set, rings })
    }

    /// Maps all of it into the VM as RAM, not logged yet. Each slot is a grace period of the kernel's, together several
    /// milliseconds of waiting; vCPUs may be created meanwhile, and none may run.
    pub fn map(&self) -> Result<(), KvmError> {
        self.shadow().map()?;
        self.set_slots(false)
    }

    fn shadow(&self) -> MutexGuard<'_, Shadow> {
        self.shadow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_slots(&self, logging: bool) -> Result<(), KvmError> {
        let flags = if logging { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let mut done = Ok(());
        for slot in &self.slots {
            // SAFETY: the caller of `new` vouched for the mapping behind every slot.
            done = done.and(unsafe { set_region(&self.vm, slot, flags) });
            // Where one can't be ended, the others can.
            if logging && done.is_err() {
                break;
            }
        }
        done
    }

    /// How logging begins from now on, where there is a choice. A log that begins with every page marked protects
    /// a page when it is cleared, just before it is sent for the first time. Where few pages are there it
    /// is quicker to protect those `at_once`: to clear the log takes KVM some 10 ns for a page, also for one that
    /// was never there, and the pages that are written before they are sent are as few. No slot may be logged when
    /// this is asked for: KVM asks what was chosen when it begins and at each clear, and both must be told the same.
    pub fn protect_at_once(&self, at_once: bool) -> Result<(), KvmError> {
        if !self.initially_set {
            return Ok(());
        }
        let first = if at_once { 0 } else { KVM_DIRTY_LOG_INITIALLY_SET };
        super::set_manual_dirty_log(&self.vm, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | first)
    }

    /// A vCPU was created; its ring, if it has one, is read from now on. They come in the order of their
    /// indices.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        self.rings.as_ref().map_or(Ok(()), |rings| rings.add(vcpu))
    }

    /// Starts or stops logging.
    pub fn set_logging(&self, on: bool) -> Result<(), KvmError> {
        if on && let Some(rings) = &self.rings {
            // What is left of an earlier time.
            rings.forget(self.places(&self.shadow()))?;
        }
        let done = self.set_slots(on);
        if on {
            done?;
            return self.shadow().set_logging(on);
        }
        // As much as can be ended is; and a vCPU may be waiting for an empty ring.
        let done = done.and(self.shadow().set_logging(on));
        done.and(self.empty_rings())
    }

    /// Where a ring's entries are in the RAM block.
    fn places(&self, shadow: &Shadow) -> impl Fn(u32, u64) -> Place {
        move |id, offset| match self.slots.iter().find(|slot| slot.id == id) {
            Some(slot) if offset < slot.len / PAGE_SIZE => {
                Place::Page(slot.block_offset / PAGE_SIZE + offset)
            }
            Some(_) => Place::Nowhere,
            None => shadow.place(id, offset),
        }
    }

    /// Empties the rings, so that a vCPU whose ring is full can go on; what was in them is kept until
    /// [`fetch`](Self::fetch). Does nothing where there are none.
    pub fn empty_rings(&self) -> Result<(), KvmError> {
        let shadow = self.shadow();
        self.rings.as_ref().map_or(Ok(()), |rings| rings.empty(self.places(&shadow)))
    }

    /// Whether one of the rings is half full or more.
    pub fn rings_fill(&self) -> bool {
        self.rings.as_ref().is_some_and(DirtyRings::half_full)
    }

    /// Whether there are rings.
    pub fn has_rings(&self) -> bool {
        self.rings.is_some()
    }

    /// How many pages each vCPU has been found to write since logging was started, by their indices; `None`
    /// where there are no rings, and it is not known.
    pub fn by_vcpu(&self) -> Option<Vec<u64>> {
        self.rings.as_ref().map(DirtyRings::found)
    }

    /// Shows the guest these things below 1 MiB and 4 GiB from now on.
    pub fn show(&self, what: &BelowOneMib) -> Result<(), KvmError> {
        self.shadow().show(what)
    }

    /// Gives the pages of `pc.ram` written since they were last cleared to `found`: the number of the
    /// first page, a multiple of 64, and one bit for each page from there on. Without manual protection,
    /// and with rings, this clears the log as well, before it returns.
    pub fn fetch(&self, mut found: impl FnMut(u64, &[u64])) -> Result<(), KvmError> {
        if let Some(rings) = &self.rings {
            let mut shadow = self.shadow();
            if shadow.take_lost() {
                found(shadow::START / PAGE_SIZE, &[u64::MAX]);
            }
            return rings.take(self.places(&shadow), found);
        }
        for slot in &self.slots {
            found(slot.block_offset / PAGE_SIZE, &fetch(&self.vm, slot)?);
        }
        self.shadow().fetch(found)
    }

    /// Makes the pages of `bits` count anew. `bits` is the log of the pages of `pc.ram` from
    /// `first_page` (a multiple of 64) on. Must happen *before* the pages are read: what the guest
    /// writes in between is then marked again, at worst once too often.
    pub fn clear(&self, first_page: u64, bits: &[u64]) -> Result<(), KvmError> {
        if !self.manual {
            return Ok(());
        }
        let end = first_page.saturating_add(bits.len() as u64 * PAGES_PER_WORD);
        // What of `bits` lies in this part of the block, and where that begins.
        let overlap = |offset: u64, len: u64| {
            // Slots begin at multiples of 64 pages, so no word belongs to two of them.
            let start = offset / PAGE_SIZE;
            let from = first_page.max(start);
            let to = end.min((start + len / PAGE_SIZE).next_multiple_of(PAGES_PER_WORD));
            let words = (from.checked_sub(first_page)? / PAGES_PER_WORD) as usize
                ..(to.checked_sub(first_page)? / PAGES_PER_WORD) as usize;
            Some((from - start, bits.get(words).filter(|words| !words.is_empty())?))
        };
        for slot in &self.slots {
            if let Some((from, bits)) = overlap(slot.block_offset, slot.len) {
                clear(&self.vm, slot, from, bits)?;
            }
        }
        match overlap(shadow::START, shadow::END - shadow::START) {
            Some((_, &[word])) => self.shadow().clear(word),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shadow_is_cut_out_of_ram_and_nothing_else() {
        let slot = |guest_address, len, block_offset| Slot {
            id: 0,
            guest_address,
            len,
            host_address: 0x7000_0000_0000 + block_offset,
            block_offset,
        };
        let ram = [slot(0, 3 << 30, 0), slot(4 << 30, 1 << 30, 3 << 30)];
        let (slots, window) = split(&ram);
        let of = |s: &Slot| (s.id, s.guest_address, s.len, s.block_offset);
        assert_eq!(
            slots.iter().map(of).collect::<Vec<_>>(),
            [
                (0, 0, 0xc_0000, 0),
                (1, 0x10_0000, (3 << 30) - 0x10_0000, 0x10_0000),
                (2, 4 << 30, 1 << 30, 3 << 30),
            ]
        );
        assert_eq!(window.as_ref().map(of), Some((0, 0xc_0000, 0x4_0000, 0xc_0000)));
        assert!(
            slots
                .iter()
                .chain(&window)
                .all(|s| s.host_address == 0x7000_0000_0000 + s.block_offset)
        );
        let (slots, window) = split(&[slot(0, 1 << 20, 0)]);
        assert_eq!((slots.len(), window.map(|w| w.len)), (1, Some(0x4_0000)));
    }
}
