//! Where everything is in the guest-physical address space and on the I/O ports of
//! `pc-i440fx-7.2`.
//!
//! RAM is one block (`pc.ram`), mapped in one piece or in two around the hole below 4 GiB in which
//! devices, the interrupt controllers and the firmware answer. The split is part of the machine
//! type: a page's address inside the block is what travels, so both sides must cut alike.

/// The size of a guest page, and the unit of RAM sizes.
pub const PAGE_SIZE: u64 = 4096;
/// 4 GiB: where RAM goes on above the PCI hole.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// From this much RAM on (3.5 GiB) it is split around the hole.
pub const RAM_SPLIT_FROM: u64 = 0xe000_0000;
/// How much of a split RAM lies below the hole (3 GiB).
pub const SPLIT_LOW_RAM: u64 = 0xc000_0000;
const GIB: u64 = 1 << 30;
/// The smallest RAM that the board can boot with (1 MiB of firmware area).
pub const MIN_RAM: u64 = 1 << 20;

/// The window of video memory, RAM when no VGA answers there.
pub const VGA_WINDOW: Range = Range { start: 0xa_0000, size: 0x2_0000 };
/// Top of the window in which 32-bit BARs are placed (exclusive); its bottom is the end of low RAM.
pub const PCI32_END: u64 = 0xfec0_0000;
/// The IOAPIC's registers.
pub const IOAPIC: Range = Range { start: 0xfec0_0000, size: 0x1000 };
/// The local APICs' registers, and the target of message-signalled interrupts.
pub const LAPIC: Range = Range { start: 0xfee0_0000, size: 0x10_0000 };
/// Where the firmware's 256 KiB end the first 4 GiB.
pub const BIOS: Range = Range { start: 0xfffc_0000, size: 0x4_0000 };
/// The window for 64-bit BARs, from the end of RAM above 4 GiB, is this large.
pub const PCI64_SIZE: u64 = 0x8000_0000;

/// A page of which KVM on Intel processors makes its identity-mapped page table, for guests that
/// run without paging. Just below the TSS pages, in the reserved area above the LAPIC.
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages that KVM on Intel processors uses for a real-mode TSS.
pub const KVM_TSS: u64 = 0xfeff_d000;

/// I/O ports of the board; fixed by the chipset and by what firmware and ACPI tables say.
pub mod port {
    /// 16550A UART `COM1`, eight ports.
    pub const COM1: u16 = 0x3f8;
    /// PCI configuration address register (32 bits).
    pub const PCI_CONFIG_ADDRESS: u16 = 0xcf8;
    /// PCI configuration data, four ports.
    pub const PCI_CONFIG_DATA: u16 = 0xcfc;
    /// Reset control register, inside the configuration address' four ports.
    pub const RESET_CONTROL: u16 = 0xcf9;
    /// Power management block as firmware places it: PM1 event, control and timer.
    pub const PM_BASE: u16 = 0x600;
    /// SMBus host controller as firmware places it.
    pub const SMBUS_BASE: u16 = 0x700;
    /// General-purpose events: two status and two enable bytes.
    pub const GPE0: u16 = 0xafe0;
    /// ACPI PCI hot-plug registers.
    pub const PCI_HOTPLUG: u16 = 0xae00;
    /// ACPI CPU hot-plug registers.
    pub const CPU_HOTPLUG: u16 = 0xaf00;
    /// Port B: PIT channel 2's gate, speaker data, its output.
    pub const PORT_B: u16 = 0x61;
    /// Fast A20 and reset.
    pub const PORT_92: u16 = 0x92;
    /// APM command port, written to raise an SMI.
    pub const APM_COMMAND: u16 = 0xb2;
    /// First port of firmware configuration.
    pub const FW_CFG: u16 = 0x510;
}

/// A piece of address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Its first address.
    pub start: u64,
    /// Its length in bytes.
    pub size: u64,
}

impl Range {
    /// The first address after it.
    pub const fn end(&self) -> u64 {
        self.start + self.size
    }
}

/// A piece of guest RAM and where it lies in the block `pc.ram`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
    /// Offset inside the block; the pieces follow each other without a gap.
    pub block_offset: u64,
}

/// A RAM size that the board cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Not a whole number of pages.
    #[error("RAM of {0} bytes is not a multiple of the page size, {PAGE_SIZE}")]
    Unaligned(u64),
    /// Too small for the firmware area.
    #[error("RAM of {0} bytes is less than the smallest that can boot, {MIN_RAM}")]
    TooSmall(u64),
    /// RAM and PCI windows would pass the processor's physical address width.
    #[error("RAM of {size} bytes needs addresses up to {end:#x}, this processor has {bits} bits")]
    TooLarge {
        /// The RAM size.
        size: u64,
        /// The end of the 64-bit PCI window above it.
        end: u64,
        /// Physical address width of the guest's processor.
        bits: u8,
    },
}

/// How much of `ram_size` lies below the PCI hole.
pub const fn low_ram_size(ram_size: u64) -> u64 {
    if ram_size < RAM_SPLIT_FROM { ram_size } else { SPLIT_LOW_RAM }
}

/// RAM of `ram_size` bytes as the machine maps it. `phys_bits` is the physical address width that
/// the guest's CPUID tells (leaf 0x8000_0008).
pub fn ram_regions(ram_size: u64, phys_bits: u8) -> Result<Vec<RamRegion>, LayoutError> {
    if !ram_size.is_multiple_of(PAGE_SIZE) {
        return Err(LayoutError::Unaligned(ram_size));
    }
    if ram_size < MIN_RAM {
        return Err(LayoutError::TooSmall(ram_size));
    }
    let low = low_ram_size(ram_size);
    let mut regions = vec![RamRegion { address: 0, size: low, block_offset: 0 }];
    if ram_size > low {
        let end = HIGH_RAM_START.saturating_add(ram_size - low).saturating_add(PCI64_SIZE);
        if end > 1u64.checked_shl(u32::from(phys_bits)).unwrap_or(u64::MAX) {
            return Err(LayoutError::TooLarge { size: ram_size, end, bits: phys_bits });
        }
        regions.push(RamRegion {
            address: HIGH_RAM_START,
            size: ram_size - low,
            block_offset: low,
        });
    }
    Ok(regions)
}

/// The window for 32-bit BARs: from the end of low RAM to the IOAPIC.
pub const fn pci32_window(ram_size: u64) -> Range {
    let start = low_ram_size(ram_size);
    Range { start, size: PCI32_END - start }
}

/// The window for 64-bit BARs: from the first whole GiB above all RAM and above 4 GiB. `ram_size`
/// is one that [`ram_regions`] accepts.
pub const fn pci64_window(ram_size: u64) -> Range {
    let high = ram_size - low_ram_size(ram_size);
    Range { start: HIGH_RAM_START + high.saturating_add(GIB - 1) / GIB * GIB, size: PCI64_SIZE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn ram_is_cut_where_qemu_cuts_it() {
        let one = ram_regions(3583 * MIB, 40).unwrap();
        assert_eq!(one, [RamRegion { address: 0, size: 3583 * MIB, block_offset: 0 }]);
        let two = ram_regions(3584 * MIB, 40).unwrap();
        assert_eq!(
            two,
            [
                RamRegion { address: 0, size: 3 << 30, block_offset: 0 },
                RamRegion { address: 1 << 32, size: 512 * MIB, block_offset: 3 << 30 },
            ]
        );
        assert_eq!(pci32_window(5 << 30), Range { start: 3 << 30, size: 0x3ec0_0000 });
        assert_eq!(pci64_window(5 << 30).start, 6 << 30);
        assert_eq!(pci64_window(3584 * MIB).start, 5 << 30);
        assert_eq!(pci64_window(64 * MIB), Range { start: 1 << 32, size: 0x8000_0000 });
    }

    #[test]
    fn sizes_that_no_board_has_are_refused() {
        assert_eq!(ram_regions(0, 40), Err(LayoutError::TooSmall(0)));
        assert_eq!(ram_regions(MIB + 1, 40), Err(LayoutError::Unaligned(MIB + 1)));
        assert!(matches!(ram_regions(1 << 40, 40), Err(LayoutError::TooLarge { bits: 40, .. })));
        assert!(matches!(ram_regions(!0xfff, 52), Err(LayoutError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn regions_cover_the_block_once(pages in 256u64..(1 << 26)) {
            let size = pages * PAGE_SIZE;
            let regions = ram_regions(size, 52).unwrap();
            let mut offset = 0;
            for region in &regions {
                prop_assert_eq!(region.block_offset, offset);
                prop_assert!(region.address + region.size <= PCI32_END || region.address >= HIGH_RAM_START);
                offset += region.size;
            }
            prop_assert_eq!(offset, size);
        }
    }
}
