//! The ACPI tables of the board.
//!
//! A guest that SeaBIOS booted under QEMU carries its tables in its own RAM; these here are for guests
//! that are born in mini-vmm: in their place for the direct boot ([`build`]), or for a firmware that
//! chooses the place ([`for_firmware`]). They describe the same hardware: PM registers at 0x600, SCI 9, links of
//! the PIIX3, one LAPIC for each vCPU.
//!
//! In a direct boot all tables fit below 1 MiB in the area of option ROMs, which the chipset shows as RAM. The 128 KiB
//! behind it are left alone: there the BIOS must show through when the guest has moved to a QEMU and
//! reboots. So an operating system does not come across the root pointer in its own search (ACPI
//! 1.0b, 5.2.4.1); it is told (`hvm_start_info.rsdp_paddr`, `boot_params.acpi_rsdp_addr`).

mod dsdt;
mod loader;
mod tables;

pub use loader::{FirmwareTables, RSDP_FILE, SCRIPT_FILE, TABLES_FILE, for_firmware};

/// Where the tables go: below the 128 KiB of the BIOS.
pub const AREA_START: u64 = 0xd_0000;
/// Size of that area in bytes.
pub const AREA_LEN: usize = 0x1_0000;

/// What the tables have to say about a machine.
#[derive(Debug, Clone, Copy)]
pub struct AcpiConfig {
    /// Number of vCPUs; their APIC ids are 0, 1, …
    pub vcpus: u8,
    /// Size of guest RAM in bytes.
    pub ram: u64,
}

/// Tables ready to be copied to [`AREA_START`].
#[derive(Debug, Clone)]
pub struct AcpiTables {
    /// Every table, as it must stand in memory.
    pub image: Vec<u8>,
    /// Guest-physical address of the root pointer (RSDP).
    pub rsdp: u64,
}

/// The tables did not fit their area.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables take {needed} bytes, there is room for {room}")]
pub struct AcpiError {
    needed: usize,
    room: usize,
}

/// Makes the tables of a machine.
pub fn build(config: AcpiConfig) -> Result<AcpiTables, AcpiError> {
    let mut area = Area { start: AREA_START as u32, image: vec![0; RSDP_LEN] };
    let placed = area.add_all(config);
    for (to, from) in area.image.iter_mut().zip(tables::rsdp(placed.rsdt)) {
        *to = from;
    }
    if area.image.len() > AREA_LEN {
        return Err(AcpiError { needed: area.image.len(), room: AREA_LEN });
    }
    Ok(AcpiTables { image: area.image, rsdp: AREA_START })
}

/// Room for the root pointer at the area's start.
const RSDP_LEN: usize = 64;

struct Area {
    /// Guest-physical address of the image.
    start: u32,
    image: Vec<u8>,
}

/// The addresses of the tables that point to others.
struct Placed {
    fadt: u32,
    rsdt: u32,
}

impl Area {
    fn add_all(&mut self, config: AcpiConfig) -> Placed {
        let dsdt = self.add(&dsdt::build(config));
        let facs = self.add(&tables::facs());
        let fadt = self.add(&tables::fadt(facs, dsdt));
        let madt = self.add(&tables::madt(config.vcpus));
        let rsdt = self.add(&tables::rsdt(&[fadt, madt]));
        Placed { fadt, rsdt }
    }

    /// Appends a table and gives its guest-physical address. 64 bytes is the alignment of the
    /// FACS, the strictest of all (ACPI 1.0b, 5.2.6).
    fn add(&mut self, table: &[u8]) -> u32 {
        self.image.resize(self.image.len().next_multiple_of(64), 0);
        let address = self.start + self.image.len() as u32;
        self.image.extend_from_slice(table);
        address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(image: &[u8], address: u32) -> u32 {
        let at = (u64::from(address) - AREA_START) as usize;
        u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
    }

    fn table(image: &[u8], address: u32) -> &[u8] {
        let at = (u64::from(address) - AREA_START) as usize;
        let len = u32_at(image, address + 4) as usize;
        &image[at..at + len]
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_sums_to_zero() {
        for (vcpus, ram) in [(1, 64 << 20), (4, 5 << 30), (255, 64 << 30)] {
            let tables = build(AcpiConfig { vcpus, ram }).unwrap();
            let image = &tables.image;
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
            assert_eq!(&image[..8], b"RSD PTR ");
            assert_eq!(sum(&image[..20]), 0);
            let rsdt = table(image, u32_at(image, AREA_START as u32 + 16));
            assert_eq!((&rsdt[..4], sum(rsdt)), (&b"RSDT"[..], 0));
            let mut seen = Vec::new();
            for entry in rsdt[36..].chunks(4) {
                let t = table(image, u32::from_le_bytes(entry.try_into().unwrap()));
                assert_eq!(sum(t), 0);
                seen.push(t[..4].to_vec());
            }
            assert_eq!(seen, [b"FACP".to_vec(), b"APIC".to_vec()]);
            let fadt = table(image, u32::from_le_bytes(rsdt[36..40].try_into().unwrap()));
            let dsdt = table(image, u32::from_le_bytes(fadt[40..44].try_into().unwrap()));
            assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
            let facs = u32::from_le_bytes(fadt[36..40].try_into().unwrap());
            assert_eq!((&table(image, facs)[..4], facs % 64), (&b"FACS"[..], 0));
        }
    }
}
