//! The 256 KiB below 1 MiB, of which the chipset shows each segment as RAM or as ROM (its PAM registers),
//! and the firmware below 4 GiB.
//!
//! Each segment is a memory slot of its own, once one of them is something else than RAM; until then, which
//! is for ever where no firmware runs, all of them are one: whatever is done to a slot takes KVM a grace
//! period, and milliseconds on a busy host. The first change takes all of it away for a moment. KVM changes no slot from RAM to ROM: it is taken away and
//! made again, and while that lasts there is nothing at these addresses. So do not change what a vCPU
//! executes meanwhile; firmware does not.

use std::sync::Arc;

use arch::layout;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegion;

use super::KvmError;
use super::dirty_log::{self, Slot};
use super::dirty_ring::Place;

/// Where the segments begin.
pub(super) const START: u64 = 0xc_0000;
/// The first address behind them.
pub(super) const END: u64 = 0x10_0000;
/// How many there are.
pub const SEGMENTS: usize = 13;
/// Their sizes in 4 KiB pages, ascending by address: twelve of 16 KiB and one of 64 KiB (82441FX data
/// sheet, PAM).
const PAGES: [u64; SEGMENTS] = [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 16];
const PAGE_SIZE: u64 = 4096;
/// Where this window's pages are in the RAM block: one word of the log, since `START` is a multiple of
/// 64 pages.
const FIRST_PAGE: u64 = START / PAGE_SIZE;

/// Memory that the guest can only read.
#[derive(Clone)]
pub struct RomMemory {
    /// All of a ROM, which stays mapped as long as a guest is shown it.
    pub memory: Arc<MmapRegion>,
    /// Where in it the part begins that is shown.
    pub offset: u64,
}

/// What a segment is.
#[derive(Clone, Default)]
pub enum View {
    /// RAM.
    #[default]
    Ram,
    /// RAM that ignores writes.
    RamReadOnly,
    /// ROM.
    Rom(RomMemory),
    /// Nothing answers.
    Nothing,
}

impl View {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Ram, Self::Ram)
            | (Self::RamReadOnly, Self::RamReadOnly)
            | (Self::Nothing, Self::Nothing) => true,
            (Self::Rom(a), Self::Rom(b)) => {
                Arc::ptr_eq(&a.memory, &b.memory) && a.offset == b.offset
            }
            _ => false,
        }
    }
}

/// What the guest is shown.
#[derive(Clone, Default)]
pub struct BelowOneMib {
    /// Each segment, ascending by address.
    pub segments: [View; SEGMENTS],
    /// What ends at 4 GiB.
    pub bios: Option<Arc<MmapRegion>>,
}

impl BelowOneMib {
    /// The segments' addresses and lengths in bytes.
    pub fn places() -> [(u64, u64); SEGMENTS] {
        let mut at = START;
        PAGES.map(|pages| {
            let place = (at, pages * PAGE_SIZE);
            at += place.1;
            place
        })
    }
}

/// The slots of the window and of the firmware below 4 GiB.
pub(super) struct Shadow {
    vm: Arc<VmFd>,
    /// The RAM that is there, if the VM has as much.
    ram: Option<Slot>,
    first_id: u32,
    shown: BelowOneMib,
    /// Each segment has its own slot.
    split: bool,
    logging: bool,
    /// A slot of RAM has come or gone while writes were logged, and its log with it.
    lost: bool,
}

impl Shadow {
    /// RAM everywhere, once it is [mapped](Self::map). Takes [`SEGMENTS`] slots and one more, from `first_id` on.
    ///
    /// # Safety
    /// `ram` must lie in a mapping of this process that outlives the VM.
    pub(super) unsafe fn new(vm: Arc<VmFd>, ram: Option<Slot>, first_id: u32) -> Self {
        let shown = BelowOneMib::default();
        Self { vm, ram, first_id, shown, split: false, logging: false, lost: false }
    }

    /// The slot of all segments.
    fn whole(&self) -> Option<Slot> {
        let (guest_address, len) = (START, END - START);
        self.ram.map(|ram| Slot { id: self.first_id, guest_address, len, ..ram })
    }

    /// Gives a VM that has none of it all of it as RAM, in one slot.
    pub(super) fn map(&self) -> Result<(), KvmError> {
        let Some(slot) = self.whole() else { return Ok(()) };
        let flags = if self.logging { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        // SAFETY: the slot lies in RAM, for which the caller of `new` vouched.
        unsafe { dirty_log::set_region(&self.vm, &slot, flags) }
    }

    /// Gives each segment its own slot.
    fn split(&mut self) -> Result<(), KvmError> {
        if self.split {
            return Ok(());
        }
        if let Some(whole) = self.whole() {
            // SAFETY: this takes the slot away.
            unsafe { dirty_log::set_region(&self.vm, &Slot { len: 0, ..whole }, 0) }?;
        }
        self.split = true;
        self.lost |= self.logging;
        // What fails here is nothing until it is shown once more.
        self.shown.segments = std::array::from_fn(|_| View::Nothing);
        for index in 0..SEGMENTS {
            self.set(index, &View::Ram)?;
            self.note(index, View::Ram);
        }
        Ok(())
    }

    /// The slot of a segment of RAM.
    fn ram(&self, index: usize) -> Option<Slot> {
        let ram = self.ram?;
        let (address, len) = *BelowOneMib::places().get(index)?;
        let skipped = address - START;
        Some(Slot {
            id: self.first_id + index as u32,
            guest_address: address,
            len,
            host_address: ram.host_address + skipped,
            block_offset: ram.block_offset + skipped,
        })
    }

    fn set(&self, index: usize, view: &View) -> Result<(), KvmError> {
        let Some(ram) = self.ram(index) else { return Ok(()) };
        let (slot, flags) = match view {
            View::Ram if self.logging => (ram, KVM_MEM_LOG_DIRTY_PAGES),
            View::Ram => (ram, 0),
            View::RamReadOnly => (ram, KVM_MEM_READONLY),
            View::Rom(rom) => {
                let host_address = rom.memory.as_ptr() as u64 + rom.offset;
                (Slot { host_address, ..ram }, KVM_MEM_READONLY)
            }
            View::Nothing => (Slot { len: 0, ..ram }, 0),
        };
        // SAFETY: the slot lies in RAM, for which the caller of `new` vouched, or in a ROM that
        // `self.shown` keeps mapped until the slot has gone.
        unsafe { dirty_log::set_region(&self.vm, &slot, flags) }
    }

    pub(super) fn show(&mut self, what: &BelowOneMib) -> Result<(), KvmError> {
        for (index, view) in what.segments.iter().enumerate() {
            let Some(now) = self.shown.segments.get(index) else { continue };
            if now.is(view) {
                continue;
            }
            self.split()?;
            self.lost |= self.logging;
            let nothing = matches!(self.shown.segments.get(index), Some(View::Nothing) | None);
            if !nothing {
                self.set(index, &View::Nothing)?;
                self.note(index, View::Nothing);
            }
            if !matches!(view, View::Nothing) {
                self.set(index, view)?;
                self.note(index, view.clone());
            }
        }
        self.show_bios(what.bios.as_ref())
    }

    fn note(&mut self, index: usize, view: View) {
        if let Some(shown) = self.shown.segments.get_mut(index) {
            *shown = view;
        }
    }

    /// Shows `bios` so that it ends at 4 GiB.
    fn show_bios(&mut self, bios: Option<&Arc<MmapRegion>>) -> Result<(), KvmError> {
        let same = match (&self.shown.bios, bios) {
            (Some(now), Some(bios)) => Arc::ptr_eq(now, bios),
            (None, None) => true,
            _ => false,
        };
        if same {
            return Ok(());
        }
        let slot = |memory: &Arc<MmapRegion>| {
            let len = memory.size() as u64;
            Slot {
                id: self.first_id + SEGMENTS as u32,
                guest_address: layout::BIOS.end() - len,
                len,
                host_address: memory.as_ptr() as u64,
                block_offset: 0,
            }
        };
        if let Some(now) = &self.shown.bios {
            // SAFETY: this takes the slot away.
            unsafe { dirty_log::set_region(&self.vm, &Slot { len: 0, ..slot(now) }, 0) }?;
        }
        if let Some(bios) = bios {
            // SAFETY: `self.shown` keeps the ROM mapped until the slot has gone.
            unsafe { dirty_log::set_region(&self.vm, &slot(bios), KVM_MEM_READONLY) }?;
        }
        self.shown.bios = bios.cloned();
        Ok(())
    }

    /// The slots of RAM, each with the number of its first page in the window.
    fn writable(&self) -> Vec<(Slot, u64)> {
        if !self.split {
            return self.whole().map(|slot| (slot, 0)).into_iter().collect();
        }
        let mut first = 0;
        let mut slots = Vec::new();
        for ((index, view), pages) in self.shown.segments.iter().enumerate().zip(PAGES) {
            if matches!(view, View::Ram) {
                slots.extend(self.ram(index).map(|slot| (slot, first)));
            }
            first += pages;
        }
        slots
    }

    pub(super) fn set_logging(&mut self, on: bool) -> Result<(), KvmError> {
        self.logging = on;
        self.lost = false;
        if !self.split {
            return self.map();
        }
        for (index, view) in self.shown.segments.iter().enumerate() {
            if matches!(view, View::Ram) {
                self.set(index, view)?;
            }
        }
        Ok(())
    }

    /// Where the page `offset` of a slot of the window is that was written to. One of another shape than
    /// the slot has now was written before it got that.
    pub(super) fn place(&self, id: u32, offset: u64) -> Place {
        let ids = self.first_id..self.first_id + SEGMENTS as u32;
        if self.ram.is_none() || !ids.contains(&id) {
            return Place::Nowhere;
        }
        let slots = self.writable();
        let slot = slots.iter().find(|(slot, _)| slot.id == id && offset < slot.len / PAGE_SIZE);
        slot.map_or(Place::Word(FIRST_PAGE), |(_, first)| Place::Page(FIRST_PAGE + first + offset))
    }

    /// Whether a slot of RAM has come or gone since this was asked last, while writes were logged.
    pub(super) fn take_lost(&mut self) -> bool {
        std::mem::take(&mut self.lost) && self.ram.is_some()
    }

    pub(super) fn fetch(&mut self, mut found: impl FnMut(u64, &[u64])) -> Result<(), KvmError> {
        if self.ram.is_none() {
            return Ok(());
        }
        let mut word = if self.take_lost() { u64::MAX } else { 0 };
        for (slot, first) in self.writable() {
            let log = dirty_log::fetch(&self.vm, &slot)?;
            word |= log.first().copied().unwrap_or(0) << first;
        }
        found(FIRST_PAGE, &[word]);
        Ok(())
    }

    pub(super) fn clear(&self, word: u64) -> Result<(), KvmError> {
        for (slot, first) in self.writable() {
            let mask = u64::MAX >> (u64::BITS as u64 - slot.len / PAGE_SIZE);
            let bits = word >> first & mask;
            if bits != 0 {
                dirty_log::clear(&self.vm, &slot, 0, &[bits])?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Ram;

    /// What the log says of the window's pages.
    fn fetched(shadow: &mut Shadow) -> u64 {
        let mut word = 0;
        shadow
            .fetch(|first, bits| {
                assert_eq!((first, bits.len()), (FIRST_PAGE, 1));
                word = bits[0];
            })
            .unwrap();
        word
    }

    #[test]
    fn the_window_is_one_slot_until_a_segment_differs_and_its_log_is_whole_all_the_while() {
        let kvm = super::super::open().unwrap();
        let vm = super::super::create_vm(&kvm).unwrap();
        super::super::enable_manual_dirty_log(&vm).unwrap();
        let memory = Ram::new(64 << 20, 40).unwrap();
        let window = memory.slots().first().map(|ram| Slot {
            guest_address: START,
            len: END - START,
            host_address: ram.host_address + START,
            block_offset: START,
            ..*ram
        });
        // SAFETY: the memory outlives the VM.
        let mut shadow = unsafe { Shadow::new(vm, window, 5) };
        shadow.map().unwrap();
        assert_eq!(shadow.writable().len(), 1);
        shadow.set_logging(true).unwrap();
        // As the log begins, and then what has been written since: nothing.
        let _ = fetched(&mut shadow);
        shadow.clear(u64::MAX).unwrap();
        assert_eq!(fetched(&mut shadow), 0);
        shadow.show(&BelowOneMib::default()).unwrap();
        assert!(!shadow.split, "nothing has changed");
        assert_eq!(shadow.place(5, 63), Place::Page(FIRST_PAGE + 63));
        assert_eq!([4, 5 + SEGMENTS as u32].map(|id| shadow.place(id, 0)), [Place::Nowhere; 2]);

        let mut some = BelowOneMib::default();
        some.segments[2] = View::RamReadOnly;
        some.segments[12] = View::Nothing;
        shadow.show(&some).unwrap();
        let firsts: Vec<_> = shadow.writable().iter().map(|(_, first)| *first).collect();
        assert_eq!(firsts, [0, 4, 12, 16, 20, 24, 28, 32, 36, 40, 44]);
        assert_eq!(fetched(&mut shadow), u64::MAX, "its log went with the slot");
        shadow.clear(u64::MAX).unwrap();
        assert_eq!(fetched(&mut shadow), 0);
        assert_eq!(shadow.place(5, 3), Place::Page(FIRST_PAGE + 3));
        assert_eq!(shadow.place(5 + 11, 0), Place::Page(FIRST_PAGE + 44));
        // As it was written when all were one, and to a segment that has gone.
        assert_eq!(shadow.place(5, 63), Place::Word(FIRST_PAGE));
        assert_eq!(shadow.place(5 + 12, 0), Place::Word(FIRST_PAGE));
        shadow.show(&BelowOneMib::default()).unwrap();
        assert_eq!(shadow.writable().len(), SEGMENTS);
        shadow.set_logging(false).unwrap();
    }

    #[test]
    fn the_segments_fill_the_window_and_one_word() {
        let places = BelowOneMib::places();
        let mut at = START;
        for (address, len) in places {
            assert_eq!(address, at);
            at += len;
        }
        assert_eq!((at, PAGES.iter().sum::<u64>(), FIRST_PAGE % 64), (END, 64, 0));
        // As the chipset counts them.
        let mut chipset = devices::chipset::i440fx::PAM_SEGMENTS;
        chipset.sort_unstable();
        assert_eq!(chipset, places);
    }
}
