//! The fixed tables: RSDP, RSDT, FADT, FACS, MADT.

use acpi_tables::sdt::Sdt;

use crate::layout::{self, port};

pub(super) const OEM_ID: [u8; 6] = *b"MINVMM";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"I440FX  ";
pub(super) const OEM_REVISION: u32 = 1;

/// The interrupt of ACPI events.
const SCI_IRQ: u16 = 9;
/// Written to the APM command port, it makes the PM function give its events to the SCI.
const ACPI_ENABLE: u8 = 0xf1;
/// Written there, it takes them back.
const ACPI_DISABLE: u8 = 0xf0;
/// The id in the IOAPIC's own register.
const IOAPIC_ID: u8 = 0;

const HEADER_LEN: usize = 36;

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b))
}

/// The root pointer of ACPI 1.0 (ACPI 1.0b, 5.2.4.2).
pub(super) fn rsdp(rsdt: u32) -> [u8; 20] {
    let mut t = [0; 20];
    t[..8].copy_from_slice(b"RSD PTR ");
    t[9..15].copy_from_slice(&OEM_ID);
    t[16..].copy_from_slice(&rsdt.to_le_bytes());
    t[8] = checksum(&t);
    t
}

pub(super) fn rsdt(tables: &[u32]) -> Vec<u8> {
    let mut t = Sdt::new(*b"RSDT", HEADER_LEN as u32, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        t.append_slice(&table.to_le_bytes());
    }
    t.as_slice().to_vec()
}

/// The firmware control structure: a place for the global lock and the waking vector. It has no
/// checksum (ACPI 1.0b, 5.2.6).
pub(super) fn facs() -> [u8; 64] {
    let mut t = [0; 64];
    t[..4].copy_from_slice(b"FACS");
    t[4..8].copy_from_slice(&64u32.to_le_bytes());
    t
}

/// The fixed description of revision 1 (ACPI 1.0b, 5.2.5; offsets from the table there).
pub(super) fn fadt(facs: u32, dsdt: u32) -> Vec<u8> {
    const LEN: u32 = 116;
    // WBINVD works, C1 on every processor, no sleep button, RTC can wake from S4 (it is not there,
    // as on QEMU's board), and the PM timer is the clock to trust.
    const WBINVD: u32 = 1;
    const PROC_C1: u32 = 1 << 2;
    const NO_SLEEP_BUTTON: u32 = 1 << 5;
    const RTC_S4: u32 = 1 << 7;

    let mut t = Sdt::new(*b"FACP", LEN, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    t.write_u32(36, facs);
    t.write_u32(40, dsdt);
    t.write_u8(44, 1); // interrupt model: both PICs and an IOAPIC
    t.write_u16(46, SCI_IRQ);
    t.write_u32(48, port::APM_COMMAND.into());
    t.write_u8(52, ACPI_ENABLE);
    t.write_u8(53, ACPI_DISABLE);
    t.write_u32(56, port::PM_BASE.into()); // PM1a event block
    t.write_u32(64, u32::from(port::PM_BASE) + 4); // PM1a control block
    t.write_u32(76, u32::from(port::PM_BASE) + 8); // PM timer
    t.write_u32(80, port::GPE0.into());
    t.write_u8(88, 4); // length of the PM1 event block
    t.write_u8(89, 2); // of the control block
    t.write_u8(91, 4); // of the timer
    t.write_u8(92, 4); // of GPE0
    t.write_u16(96, 0xfff); // no C2: a latency above 100 µs says so
    t.write_u16(98, 0xfff); // no C3: above 1000 µs
    t.write_u8(108, 0x32); // the RTC's century byte, index into CMOS
    t.write_u32(112, WBINVD | PROC_C1 | NO_SLEEP_BUTTON | RTC_S4);
    t.update_checksum();
    t.as_slice().to_vec()
}

/// The interrupt controllers (ACPI 1.0b, 5.2.8).
pub(super) fn madt(vcpus: u8) -> Vec<u8> {
    const PCAT_COMPAT: u32 = 1;
    const ACTIVE_HIGH_LEVEL: u16 = 0b11_01;

    let mut t = Sdt::new(*b"APIC", HEADER_LEN as u32, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    t.append_slice(&(layout::LAPIC.start as u32).to_le_bytes());
    t.append_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..vcpus {
        t.append_slice(&[0, 8, id, id, 1, 0, 0, 0]); // processor LAPIC, enabled
    }
    let mut ioapic = [1, 12, IOAPIC_ID, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    ioapic[4..8].copy_from_slice(&(layout::IOAPIC.start as u32).to_le_bytes());
    t.append_slice(&ioapic);
    let mut over = |source: u8, gsi: u8, flags: u16| {
        let [f0, f1] = flags.to_le_bytes();
        t.append_slice(&[2, 10, 0, source, gsi, 0, 0, 0, f0, f1]);
    };
    over(0, 2, 0); // the PIT, as the bus has it (edge, high)
    for irq in [5, 9, 10, 11] {
        over(irq, irq, ACTIVE_HIGH_LEVEL); // PCI and the SCI
    }
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]); // LINT1 of every LAPIC is the NMI
    t.as_slice().to_vec()
}
