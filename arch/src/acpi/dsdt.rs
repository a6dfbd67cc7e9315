//! The DSDT: the PCI root, its interrupt links, and the devices that cannot be probed.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Method,
    Name, ONE, OpRegion, OpRegionSpace, Or, Package, Path, ResourceTemplate, Return, Scope, Store,
    ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::AcpiConfig;
use super::tables::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{self, port};

/// `_STA` of a device that is there, enabled, working, and not shown to people (ACPI 1.0b, 6.3.5).
const PRESENT: u8 = 0x0b;
/// The same, but disabled: a link without an interrupt.
const DISABLED: u8 = 0x09;

/// Interrupts that a PIIX3 PIRQ may be routed to on this board.
const LINK_IRQS: [u32; 3] = [5, 10, 11];

pub(super) fn build(config: AcpiConfig) -> Vec<u8> {
    let mut t = Sdt::new(*b"DSDT", 36, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    t.append_slice(&pci_root(config));
    t.append_slice(&links());
    t.append_slice(&isa_devices());
    let mut soft_off = Vec::new();
    // SLP_TYP 0 of both PM1 control registers means S5 on this chip.
    Name::new("_S5_".into(), &Package::new(vec![&ZERO, &ZERO, &ZERO, &ZERO]))
        .to_aml_bytes(&mut soft_off);
    t.append_slice(&soft_off);
    t.as_slice().to_vec()
}

fn scope(children: Vec<&dyn Aml>) -> Vec<u8> {
    let mut bytes = Vec::new();
    Scope::new("_SB_".into(), children).to_aml_bytes(&mut bytes);
    bytes
}

/// Link of a slot's pin: PIRQ = (slot - 1 + pin) mod 4, as the board is wired.
fn link_of(slot: u32, pin: u32) -> &'static str {
    match (slot + 3 + pin) % 4 {
        0 => "\\_SB_.LNKA",
        1 => "\\_SB_.LNKB",
        2 => "\\_SB_.LNKC",
        _ => "\\_SB_.LNKD",
    }
}

fn routing_table() -> Vec<u8> {
    let mut entries = Vec::new();
    for slot in 0..32u32 {
        for pin in 0..4u32 {
            let mut entry = Vec::new();
            Package::new(vec![
                &(slot << 16 | 0xffff),
                &(pin as u8),
                &Path::new(link_of(slot, pin)),
                &ZERO,
            ])
            .to_aml_bytes(&mut entry);
            entries.push(Raw(entry));
        }
    }
    let mut package = Vec::new();
    // A package of more than 255 elements has another form; 128 still fits.
    Package::new(entries.iter().map(|e| e as &dyn Aml).collect()).to_aml_bytes(&mut package);
    package
}

fn pci_root(config: AcpiConfig) -> Vec<u8> {
    let buses = AddressSpace::<u16>::new_bus_number(0, 0xff);
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let ports_low = AddressSpace::<u16>::new_io(0, 0xcf7, None);
    let ports_high = AddressSpace::<u16>::new_io(0xd00, 0xffff, None);
    let vga = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::Cacheable,
        true,
        0xa_0000,
        0xb_ffff,
        None,
    );
    let window32 = layout::pci32_window(config.ram);
    let window = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        window32.start as u32,
        window32.end() as u32 - 1,
        None,
    );
    let range64 = layout::pci64_window(config.ram);
    let window64 = AddressSpace::<u64>::new_memory(
        AddressSpaceCacheable::Cacheable,
        true,
        range64.start,
        range64.end() - 1,
        None,
    );
    let resources = ResourceTemplate::new(vec![
        &buses,
        &config_ports,
        &ports_low,
        &ports_high,
        &vga,
        &window,
        &window64,
    ]);
    let routes = Raw(routing_table());
    scope(vec![&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &resources),
            &Name::new("_PRT".into(), &routes),
            &Device::new(
                "ISA_".into(),
                vec![
                    &Name::new("_ADR".into(), &0x0001_0000u32),
                    &OpRegion::new("PIRQ".into(), OpRegionSpace::PCIConfig, &0x60u8, &4u8),
                ],
            ),
        ],
    )])
}

/// Registers PIRQRCA to PIRQRCD of the PIIX3 (82371SB, 2.2.5: bit 7 is "not routed", bits 3-0 the
/// interrupt), and a link device over each.
fn links() -> Vec<u8> {
    let field = Field::new(
        "PCI0.ISA_.PIRQ".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![
            FieldEntry::Named(*b"PRQ0", 8),
            FieldEntry::Named(*b"PRQ1", 8),
            FieldEntry::Named(*b"PRQ2", 8),
            FieldEntry::Named(*b"PRQ3", 8),
        ],
    );
    let mut all = Vec::new();
    field.to_aml_bytes(&mut all);
    for (uid, (name, register)) in
        [("LNKA", "PRQ0"), ("LNKB", "PRQ1"), ("LNKC", "PRQ2"), ("LNKD", "PRQ3")]
            .into_iter()
            .enumerate()
    {
        all.extend(link(name, register, uid as u8));
    }
    scope(vec![&Raw(all)])
}

fn link(name: &str, register: &str, uid: u8) -> Vec<u8> {
    // Offset of the interrupt's number in an extended interrupt descriptor (ACPI 1.0b, 6.4.3.6).
    const NUMBER: u8 = 5;
    let register = Path::new(register);
    let possible = Interrupts(&LINK_IRQS);
    let current = Interrupts(&[0]);
    let mut bytes = Vec::new();
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0F")),
            &Name::new("_UID".into(), &uid),
            &Name::new("_PRS".into(), &ResourceTemplate::new(vec![&possible])),
            &Method::new(
                "_STA".into(),
                0,
                false,
                vec![
                    &If::new(&And::new(&ZERO, &register, &0x80u8), vec![&Return::new(&DISABLED)]),
                    &Return::new(&PRESENT),
                ],
            ),
            &Method::new("_DIS".into(), 0, false, vec![&Or::new(&register, &register, &0x80u8)]),
            &Method::new(
                "_CRS".into(),
                0,
                true,
                vec![
                    &Name::new("RES_".into(), &ResourceTemplate::new(vec![&current])),
                    &CreateDWordField::new(&Path::new("IRQN"), &Path::new("RES_"), &NUMBER),
                    &If::new(
                        &Equal::new(&And::new(&ZERO, &register, &0x80u8), &ZERO),
                        vec![&Store::new(&Path::new("IRQN"), &register)],
                    ),
                    &Return::new(&Path::new("RES_")),
                ],
            ),
            &Method::new(
                "_SRS".into(),
                1,
                true,
                vec![
                    &CreateDWordField::new(&Path::new("IRQN"), &Arg(0), &NUMBER),
                    &Store::new(&register, &Path::new("IRQN")),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}

fn isa_devices() -> Vec<u8> {
    let irq = |number| Interrupt::new(true, true, false, false, number);
    let device = |name: &str, hid: &str, uid: u8, resources: Vec<&dyn Aml>| {
        let mut bytes = Vec::new();
        Device::new(
            name.into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new(hid)),
                &Name::new("_UID".into(), &uid),
                &Name::new("_STA".into(), &0x0fu8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            ],
        )
        .to_aml_bytes(&mut bytes);
        bytes
    };
    let mut all = Vec::new();
    all.extend(device("RTC_", "PNP0B00", 0, vec![&IO::new(0x70, 0x70, 1, 8), &irq(8)]));
    all.extend(device(
        "KBD_",
        "PNP0303",
        0,
        vec![&IO::new(0x60, 0x60, 1, 1), &IO::new(0x64, 0x64, 1, 1), &irq(1)],
    ));
    all.extend(device("MOU_", "PNP0F13", 0, vec![&irq(12)]));
    all.extend(device("COM1", "PNP0501", 1, vec![&IO::new(0x3f8, 0x3f8, 1, 8), &irq(4)]));
    let mut bytes = Vec::new();
    Scope::new("_SB_.PCI0.ISA_".into(), vec![&Raw(all)]).to_aml_bytes(&mut bytes);
    // Hardware that nobody may claim: the PM and GPE registers and the PCI hot-plug ports.
    let reserved = scope(vec![&Device::new(
        "RSRV".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(port::PM_BASE, port::PM_BASE, 1, 0x40),
                    &IO::new(port::GPE0, port::GPE0, 1, 4),
                    &IO::new(port::PCI_HOTPLUG, port::PCI_HOTPLUG, 1, 0x18),
                    &IO::new(port::CPU_HOTPLUG, port::CPU_HOTPLUG, 1, 0x0c),
                    &IO::new(port::APM_COMMAND, port::APM_COMMAND, 1, 2),
                    &IO::new(port::SMBUS_BASE, port::SMBUS_BASE, 1, 0x40),
                ]),
            ),
        ],
    )]);
    bytes.extend(reserved);
    bytes
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// One extended interrupt descriptor with several choices: level, active high, shared (ACPI 1.0b,
/// 6.4.3.6). The crate's own has a single interrupt, and an operating system reads two of them as
/// two interrupts.
struct Interrupts<'a>(&'a [u32]);

impl Aml for Interrupts<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const CONSUMER: u8 = 1;
        const SHARED: u8 = 1 << 3;
        sink.byte(0x89);
        sink.word(2 + 4 * self.0.len() as u16);
        sink.byte(CONSUMER | SHARED);
        sink.byte(self.0.len() as u8);
        for irq in self.0 {
            sink.dword(*irq);
        }
    }
}
