//! Guests that boot by a firmware: SeaBIOS, which a guest of a QEMU brought along, or which is read here.
//!
//! It finds what it finds on QEMU's board: itself below 4 GiB and, where the chipset shows no RAM, below
//! 1 MiB; its files at the fw_cfg device. Those that are RAM blocks of a QEMU are served from the blocks,
//! so that a guest that came reads what it would have read there.

use std::sync::Arc;

use arch::acpi::{self, AcpiConfig};
use arch::layout;
use devices::chipset::i440fx::{PAM_SEGMENTS, PamAccess};
use devices::isa::fw_cfg::AcpiSizes;

use super::{Machine, MachineError};
use crate::kvm::{BelowOneMib, DirtyLog, RomMemory, SEGMENTS, View};
use crate::rom::{self, FILE_PREFIX, PC_BIOS, PC_ROM, Rom, RomList};

/// How much of the BIOS' end shows below 1 MiB.
const ISA_BIOS_LEN: u64 = 128 << 10;
/// Where [`PC_ROM`] shows.
const PC_ROM_START: u64 = 0xc_0000;
/// The first address behind both.
const ONE_MIB: u64 = 1 << 20;

/// The table of memory that a firmware reads (QEMU's `etc/e820`): address, length, and a type.
const E820_FILE: &str = "etc/e820";
/// How long to wait before another try when nothing can be booted, in milliseconds; all ones for never,
/// as a QEMU says it that was told nothing.
const BOOT_FAIL_WAIT: (&str, u32) = ("etc/boot-fail-wait", u32::MAX);
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// KVM's own pages: identity map and TSS.
const KVM_PAGES: (u64, u64) = (layout::KVM_IDENTITY_MAP, 0x4000);

/// What the guest is shown below 1 MiB and 4 GiB with these registers and ROMs.
///
/// A segment that is written to RAM but not read from there is ROM altogether, as in QEMU. On a board
/// without any BIOS there is RAM everywhere: a guest that was booted without one finds no hole.
fn shown(pam: [PamAccess; SEGMENTS], roms: &RomList) -> BelowOneMib {
    let find = |name: &str| roms.iter().find(|rom| rom.name() == name);
    let Some(bios) = find(PC_BIOS) else { return BelowOneMib::default() };
    let option_rom = find(PC_ROM);
    let rom_at = |address: u64, len: u64| {
        let part = |rom: &Rom, offset: u64| {
            let fits = offset.checked_add(len).is_some_and(|end| end <= rom.size());
            fits.then(|| View::Rom(RomMemory { memory: rom.memory().clone(), offset }))
        };
        let isa_bios = bios.size().min(ISA_BIOS_LEN);
        let view = if address >= ONE_MIB - isa_bios {
            part(bios, bios.size() - (ONE_MIB - address))
        } else {
            option_rom.and_then(|rom| part(rom, address - PC_ROM_START))
        };
        view.unwrap_or(View::Nothing)
    };
    let segments = BelowOneMib::places().map(|(address, len)| {
        let there = |(segment, _): &((u64, u64), PamAccess)| segment.0 == address;
        let access = PAM_SEGMENTS.into_iter().zip(pam).find(there).map(|(_, access)| access);
        match access {
            Some(PamAccess { read: true, write: true }) => View::Ram,
            Some(PamAccess { read: true, write: false }) => View::RamReadOnly,
            _ => rom_at(address, len),
        }
    });
    BelowOneMib { segments, bios: Some(bios.memory().clone()) }
}

/// The table of memory.
fn e820(ram: u64) -> Vec<u8> {
    let low = layout::low_ram_size(ram);
    let entries = [
        (KVM_PAGES.0, KVM_PAGES.1, E820_RESERVED),
        (0, low, E820_RAM),
        (layout::HIGH_RAM_START, ram - low, E820_RAM),
    ];
    let mut table = Vec::new();
    for (address, len, kind) in entries.into_iter().filter(|(_, len, _)| *len > 0) {
        table.extend(address.to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(kind.to_le_bytes());
    }
    table
}

/// The files that are in RAM blocks.
fn files(roms: &RomList, sizes: Option<&AcpiSizes>) -> Vec<(String, Vec<u8>)> {
    let file = |rom: &Rom| {
        let name = rom.name().strip_prefix(FILE_PREFIX)?;
        let len = match (name, sizes) {
            (acpi::TABLES_FILE, Some(sizes)) => sizes.table_mr_size,
            (acpi::SCRIPT_FILE, Some(sizes)) => sizes.linker_mr_size,
            (acpi::RSDP_FILE, Some(sizes)) => sizes.rsdp_mr_size,
            _ => rom.size(),
        };
        Some((name.to_string(), rom.content(len)))
    };
    roms.iter().filter_map(file).collect()
}

impl Machine {
    /// From now on the guest finds in memory what it programs the chipset to show.
    pub(super) fn follow_pam(&self) {
        let (log, ram) = (self.dirty_log.clone(), self.ram.clone());
        let hook = move |pam| {
            if let Err(e) = show(&log, pam, &ram.roms().list()) {
                tracing::error!("the memory below 1 MiB: {}", crate::error_chain(&e));
            }
        };
        self.board.on_pam(Box::new(hook));
    }

    /// Shows the guest its firmware and the files for it, after registers or ROMs have changed.
    pub fn show_firmware(&self) -> Result<(), MachineError> {
        let roms = self.ram.roms().list();
        if let Some(pam) = self.board.pam() {
            show(&self.dirty_log, pam, &roms)?;
        }
        let sizes = self.board.acpi_sizes();
        let mut files = files(&roms, sizes.as_ref());
        files.push((E820_FILE.to_string(), e820(self.ram.size())));
        files.push((BOOT_FAIL_WAIT.0.to_string(), BOOT_FAIL_WAIT.1.to_le_bytes().to_vec()));
        Ok(self.board.offer_files(files, None)?)
    }

    /// Gets a firmware and the tables that it hands on, for a machine that has none.
    pub(super) fn provide_firmware(&self) -> Result<(), MachineError> {
        let roms = self.ram.roms();
        if roms.has(PC_BIOS) {
            return Ok(());
        }
        let bios = rom::read_bios(self.config.firmware.as_deref())?;
        let vcpus = u8::try_from(self.config.smp).unwrap_or(u8::MAX);
        let tables = acpi::for_firmware(AcpiConfig { vcpus, ram: self.ram.size() })?;
        let sizes = AcpiSizes {
            table_mr_size: tables.tables.len() as u64,
            linker_mr_size: tables.script.len() as u64,
            rsdp_mr_size: tables.rsdp.len() as u64,
        };
        roms.add_filled(&format!("{FILE_PREFIX}{}", acpi::TABLES_FILE), &tables.tables)?;
        roms.add_filled(PC_BIOS, &bios)?;
        roms.add_filled(PC_ROM, &[0; rom::ROM_LEN as usize])?;
        roms.add_filled(&format!("{FILE_PREFIX}{}", acpi::SCRIPT_FILE), &tables.script)?;
        roms.add_filled(&format!("{FILE_PREFIX}{}", acpi::RSDP_FILE), &tables.rsdp)?;
        Ok(self.board.offer_files(Vec::new(), Some(sizes))?)
    }
}

fn show(
    log: &Arc<DirtyLog>,
    pam: [PamAccess; SEGMENTS],
    roms: &RomList,
) -> Result<(), crate::kvm::KvmError> {
    log.show(&shown(pam, roms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rom::Roms;

    const ROM: PamAccess = PamAccess { read: false, write: false };

    fn roms(blocks: &[(&str, usize)]) -> RomList {
        let roms = Roms::default();
        for (name, len) in blocks {
            roms.add_filled(name, &vec![1; *len]).unwrap();
        }
        roms.list()
    }

    fn offsets(shown: &BelowOneMib) -> Vec<Option<u64>> {
        let offset = |view: &View| match view {
            View::Rom(rom) => Some(rom.offset),
            _ => None,
        };
        shown.segments.iter().map(offset).collect()
    }

    #[test]
    fn the_end_of_the_bios_shows_below_one_mib() {
        let list = roms(&[(PC_BIOS, 256 << 10), (PC_ROM, 128 << 10)]);
        let all = shown([ROM; SEGMENTS], &list);
        let expected: Vec<_> = (0..8)
            .map(|n| Some(n * 0x4000))
            .chain([0x2_0000, 0x2_4000, 0x2_8000, 0x2_c000, 0x3_0000].map(Some))
            .collect();
        assert_eq!(offsets(&all), expected);
        assert!(all.bios.is_some());
        // Without an option ROM, and with a BIOS too short for the window, nothing answers there.
        let short = shown([ROM; SEGMENTS], &roms(&[(PC_BIOS, 64 << 10)]));
        assert_eq!(offsets(&short)[12], Some(0));
        assert!(short.segments[..12].iter().all(|view| matches!(view, View::Nothing)));
    }

    #[test]
    fn registers_choose_and_no_bios_means_ram() {
        let list = roms(&[(PC_BIOS, 256 << 10)]);
        let mut pam = [ROM; SEGMENTS];
        // The chipset's first segment is the last in memory.
        pam[0] = PamAccess { read: true, write: false };
        pam[1] = PamAccess { read: true, write: true };
        pam[11] = PamAccess { read: false, write: true };
        let views = shown(pam, &list).segments;
        assert!(matches!(views[12], View::RamReadOnly));
        assert!(matches!(views[0], View::Ram));
        assert!(matches!(views[10], View::Rom(_)));
        let none = shown([ROM; SEGMENTS], &RomList::default());
        assert!(none.bios.is_none() && none.segments.iter().all(|v| matches!(v, View::Ram)));
    }

    #[test]
    fn files_are_as_long_as_was_said() {
        let list = roms(&[
            ("/rom@etc/acpi/rsdp", 4096),
            ("/rom@etc/acpi/tables", 8192),
            (PC_BIOS, 4096),
            ("/rom@etc/other", 100),
        ]);
        let sizes = AcpiSizes { table_mr_size: 5000, linker_mr_size: 1, rsdp_mr_size: 20 };
        let all = files(&list, Some(&sizes));
        let lens: Vec<_> = all.iter().map(|(name, bytes)| (name.as_str(), bytes.len())).collect();
        assert_eq!(lens, [("etc/acpi/rsdp", 20), ("etc/acpi/tables", 5000), ("etc/other", 4096)]);
    }

    #[test]
    fn memory_above_the_hole_has_an_entry_of_its_own() {
        assert_eq!(e820(256 << 20).len(), 40);
        let table = e820(5 << 30);
        assert_eq!(table.len(), 60);
        assert_eq!(table[40..48], (4u64 << 30).to_le_bytes());
        assert_eq!(table[48..56], (2u64 << 30).to_le_bytes());
    }
}
