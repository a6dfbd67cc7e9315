//! Which pages the guest's vCPUs have written: KVM's dirty log, slot by slot.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::KvmError;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Pages covered by one word of the log. KVM_CLEAR_DIRTY_LOG takes ranges in these steps.
const PAGES_PER_WORD: u64 = 64;

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

/// The memory slots of a VM and their dirty logs.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    slots: Vec<Slot>,
    manual: bool,
    initially_set: bool,
}

impl DirtyLog {
    /// Maps `slots` into the VM, not logged yet.
    ///
    /// # Safety
    /// Every slot must lie in a mapping of this process that outlives the VM.
    pub unsafe fn new(vm: Arc<VmFd>, slots: Vec<Slot>) -> Result<Self, KvmError> {
        let (manual, initially_set) = super::enable_manual_dirty_log(&vm)?;
        let log = Self { vm, slots, manual, initially_set };
        log.set_logging(false)?;
        Ok(log)
    }

    /// The slots, in the order of their block offsets.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Whether the log begins with every page marked, so that a first pass needs no other list.
    pub fn initially_set(&self) -> bool {
        self.initially_set
    }

    /// Starts or stops logging.
    pub fn set_logging(&self, on: bool) -> Result<(), KvmError> {
        for slot in &self.slots {
            let region = kvm_userspace_memory_region {
                slot: slot.id,
                flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: slot.guest_address,
                memory_size: slot.len,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the caller of `new` vouched for the mapping behind every slot.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| {
                KvmError::ioctl(
                    format!(
                        "KVM_SET_USER_MEMORY_REGION slot {} ({:#x}+{:#x})",
                        slot.id, slot.guest_address, slot.len
                    ),
                    e,
                )
            })?;
        }
        Ok(())
    }

    /// The pages of `slot` written since they were last cleared, one bit a page, page 0 in bit 0
    /// of word 0. Without manual protection this clears the log as well.
    pub fn fetch(&self, slot: &Slot) -> Result<Vec<u64>, KvmError> {
        self.vm
            .get_dirty_log(slot.id, slot.len as usize)
            .map_err(|e| KvmError::ioctl(format!("KVM_GET_DIRTY_LOG slot {}", slot.id), e))
    }

    /// Makes the pages of `bits` count anew. `bits` is the log of the pages from
    /// `first_page` (a multiple of 64) on. Must happen *before* the pages are read: what the guest
    /// writes in between is then marked again, at worst once too often.
    pub fn clear(&self, slot: &Slot, first_page: u64, bits: &[u64]) -> Result<(), KvmError> {
        if !self.manual {
            return Ok(());
        }
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
        match unsafe { ioctl_with_ref(self.vm.as_ref(), KVM_CLEAR_DIRTY_LOG(), &request) } {
            0 => Ok(()),
            _ => Err(KvmError::ioctl(
                format!(
                    "KVM_CLEAR_DIRTY_LOG slot {} pages {first_page:#x}+{pages:#x} of fd {}",
                    slot.id,
                    self.vm.as_raw_fd()
                ),
                kvm_ioctls::Error::last(),
            )),
        }
    }
}
