//! The configuration space of one function: 256 bytes, and what may happen to each.

use serde::{Deserialize, Serialize};

use migration::vmstate::{Bytes, FieldError, Form, Word};

/// Bytes of configuration space that a function has (no PCI Express here).
pub const CONFIG_SIZE: usize = 256;

/// Registers of the type 0 header (PCI 3.0, 6.1).
mod reg {
    pub(super) const VENDOR: usize = 0x00;
    pub(super) const DEVICE: usize = 0x02;
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const PROG_IF: usize = 0x09;
    pub(super) const CLASS: usize = 0x0a;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const HEADER_TYPE: usize = 0x0e;
    pub(super) const BAR0: usize = 0x10;
    pub(super) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(super) const SUBSYSTEM: usize = 0x2e;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    pub(super) const INTERRUPT_PIN: usize = 0x3d;
    /// What follows the header.
    pub(super) const DEVICE_SPECIFIC: usize = 0x40;
}

/// Bits of the command register (PCI 3.0, 6.2.2).
pub mod command {
    /// I/O BARs are decoded.
    pub const IO: u16 = 1 << 0;
    /// Memory BARs are decoded.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may write to memory (and so send MSIs).
    pub const MASTER: u16 = 1 << 2;
    /// System errors are reported.
    pub const SERR: u16 = 1 << 8;
    /// INTx is never asserted.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Status bit 4: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// The error bits of the status register, which a guest clears by writing ones.
const STATUS_ERRORS: u16 = 0xf900;
/// Header type bit 7: the slot has more functions than this one.
const MULTIFUNCTION: u8 = 0x80;

/// Who a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciIdentity {
    /// Vendor and device.
    pub id: (u16, u16),
    /// Revision.
    pub revision: u8,
    /// Base class (high byte) and sub-class.
    pub class: u16,
    /// Programming interface.
    pub prog_if: u8,
    /// Subsystem vendor and subsystem.
    pub subsystem: (u16, u16),
}

/// What kind of address space a BAR asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Prefetchable memory anywhere; takes this BAR and the next one.
    Memory64,
}

impl BarKind {
    /// The read-only low bits (PCI 3.0, 6.2.5.1).
    fn type_bits(self) -> u8 {
        match self {
            Self::Io => 0x01,
            Self::Memory32 => 0x00,
            Self::Memory64 => 0x0c,
        }
    }
}

/// Where a BAR is at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRange {
    /// The kind of address space.
    pub kind: BarKind,
    /// The first port or guest-physical address.
    pub base: u64,
    /// Its size in bytes, a power of two.
    pub size: u64,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// The configuration space of one function.
///
/// Offsets given by the device's own code must lie inside it: the building methods panic
/// otherwise, as indexing does. The two accesses that a guest can make, [`read`](Self::read) and
/// [`write`](Self::write), never do.
#[derive(Debug, Clone)]
pub struct PciConfig {
    bytes: [u8; CONFIG_SIZE],
    /// What [`reset`](Self::reset) goes back to.
    power_on: [u8; CONFIG_SIZE],
    /// Bits that a guest may set and clear.
    writable: [u8; CONFIG_SIZE],
    /// Bits that a guest clears by writing one.
    write1_clear: [u8; CONFIG_SIZE],
    /// Bits that must be the same on both sides of a migration, unless they are writable.
    compared: [u8; CONFIG_SIZE],
    bars: [Option<Bar>; 6],
}

impl PciConfig {
    /// A function without BARs, capabilities and interrupt. What lies behind the header is
    /// writable and not compared, until a capability or [`set_writable`](Self::set_writable) says
    /// otherwise.
    pub fn new(identity: PciIdentity) -> Self {
        let mut config = Self {
            bytes: [0; CONFIG_SIZE],
            power_on: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            write1_clear: [0; CONFIG_SIZE],
            compared: [0; CONFIG_SIZE],
            bars: [None; 6],
        };
        config.set(reg::VENDOR, &identity.id.0.to_le_bytes());
        config.set(reg::DEVICE, &identity.id.1.to_le_bytes());
        config.set(reg::REVISION, &[identity.revision]);
        config.set(reg::PROG_IF, &[identity.prog_if]);
        config.set(reg::CLASS, &identity.class.to_le_bytes());
        config.set(reg::SUBSYSTEM_VENDOR, &identity.subsystem.0.to_le_bytes());
        config.set(reg::SUBSYSTEM, &identity.subsystem.1.to_le_bytes());

        let command =
            command::IO | command::MEMORY | command::MASTER | command::SERR | command::INTX_DISABLE;
        config.set_writable(reg::COMMAND, &command.to_le_bytes());
        config.set_writable(reg::CACHE_LINE, &[0xff]);
        config.set_writable(reg::INTERRUPT_LINE, &[0xff]);
        config.set_writable(reg::DEVICE_SPECIFIC, &[0xff; CONFIG_SIZE - reg::DEVICE_SPECIFIC]);
        config.set_write1_clear(reg::STATUS, &STATUS_ERRORS.to_le_bytes());

        for offset in (reg::VENDOR..reg::COMMAND).chain(reg::REVISION..reg::CACHE_LINE) {
            config.compared[offset] = 0xff;
        }
        config.compared[reg::HEADER_TYPE] = 0xff;
        config.compared[reg::CAPABILITIES] = 0xff;
        config.compared[reg::STATUS] = STATUS_CAPABILITIES;
        config
    }

    /// Sets bytes whatever the writable mask says, and their value after a reset.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.power_on[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Sets bytes whatever the writable mask says, until the next reset.
    pub fn set_now(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Says which bits from `offset` on a guest may write.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Says which bits from `offset` on a guest clears by writing ones.
    pub fn set_write1_clear(&mut self, offset: usize, mask: &[u8]) {
        self.write1_clear[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Says that the slot has more functions than this one.
    pub fn set_multifunction(&mut self) {
        let header = self.bytes[reg::HEADER_TYPE] | MULTIFUNCTION;
        self.set(reg::HEADER_TYPE, &[header]);
    }

    /// Says which pin the function drives: 1 for INTA to 4 for INTD.
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.set(reg::INTERRUPT_PIN, &[pin]);
    }

    /// Adds BAR `index`. `size` must be a power of two: at least 4 bytes of ports, 16 of memory.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) {
        assert!(size.is_power_of_two(), "a BAR's size is a power of two");
        self.bars[index] = Some(Bar { kind, size });
        let offset = reg::BAR0 + 4 * index;
        let writable = !(size - 1);
        let width = if kind == BarKind::Memory64 { 8 } else { 4 };
        self.set(offset, &[kind.type_bits()]);
        self.set_writable(offset, &writable.to_le_bytes()[..width]);
        self.compared[offset..offset + width].fill(0xff);
    }

    /// Puts a capability at `offset`: its id, a pointer to the one that was added before, then
    /// `body`. The capability pointer of the header points to the last one added. Nothing of it is
    /// writable until [`set_writable`](Self::set_writable) says so, and all of it is compared.
    pub fn add_capability(&mut self, offset: u8, id: u8, body: &[u8]) {
        let start = usize::from(offset);
        let end = start + 2 + body.len();
        let next = self.bytes[reg::CAPABILITIES];
        self.set(start, &[id, next]);
        self.set(start + 2, body);
        self.set(reg::CAPABILITIES, &[offset]);
        self.set(reg::STATUS, &[self.bytes[reg::STATUS] | STATUS_CAPABILITIES]);
        self.writable[start..end].fill(0);
        self.compared[start..end].fill(0xff);
    }

    /// Back to the values after power-on.
    pub fn reset(&mut self) {
        self.bytes = self.power_on;
    }

    /// The same for the header only: command, BARs, interrupt line.
    pub fn reset_header(&mut self) {
        let (header, power_on) = (&mut self.bytes[..reg::DEVICE_SPECIFIC], &self.power_on);
        header.copy_from_slice(&power_on[..reg::DEVICE_SPECIFIC]);
    }

    /// All bytes as they are.
    pub fn bytes(&self) -> &[u8; CONFIG_SIZE] {
        &self.bytes
    }

    /// Two bytes at `offset`, little-endian.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// The command register; see [`command`].
    pub fn command(&self) -> u16 {
        self.word(reg::COMMAND)
    }

    /// A guest's read. What lies outside of the space reads as ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0xff);
        let known = self.bytes.get(offset..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(known) {
            *to = *from;
        }
    }

    /// A guest's write. What lies outside of the space, or is not writable, is lost.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, value) in (offset..CONFIG_SIZE).zip(data) {
            let writable = self.writable[at];
            let byte = (self.bytes[at] & !writable) | (value & writable);
            self.bytes[at] = byte & !(value & self.write1_clear[at]);
        }
    }

    /// Where BAR `index` answers now; `None` when it is absent, switched off in the command
    /// register, at zero, or where its space ends (all ones, while a guest finds out its size).
    pub fn bar(&self, index: usize) -> Option<BarRange> {
        let Bar { kind, size } = (*self.bars.get(index)?)?;
        let offset = reg::BAR0 + 4 * index;
        let width = if kind == BarKind::Memory64 { 8 } else { 4 };
        let mut raw = [0; 8];
        raw[..width].copy_from_slice(&self.bytes[offset..offset + width]);
        let base = u64::from_le_bytes(raw) & !(size - 1);
        let (decoded, last) = match kind {
            BarKind::Io => (command::IO, u64::from(u16::MAX)),
            BarKind::Memory32 => (command::MEMORY, u64::from(u32::MAX)),
            BarKind::Memory64 => (command::MEMORY, u64::MAX),
        };
        let end = base.checked_add(size - 1)?;
        (self.command() & decoded != 0 && base != 0 && end < last).then_some(BarRange {
            kind,
            base,
            size,
        })
    }

    /// The state on the wire; `intx` is the level at which the device holds its INTA.
    pub fn save(&self, intx: bool) -> PciDeviceState {
        PciDeviceState {
            version: PCI_DEVICE_VERSION,
            config: Bytes::from_fn(|i| self.bytes[i]),
            irq_state: [intx.into(), 0, 0, 0],
        }
    }

    /// The bits of configuration space that no guest can change and that must be the same on both sides
    /// of a migration; the others are 0.
    pub fn fixed(&self) -> [u8; CONFIG_SIZE] {
        std::array::from_fn(|i| {
            self.bytes[i] & self.compared[i] & !self.writable[i] & !self.write1_clear[i]
        })
    }

    /// The masks of one byte, as a QEMU shows them when it differs: what is compared, what a guest may
    /// write, and what it clears.
    pub fn masks(&self, offset: usize) -> Option<[u8; 3]> {
        let mask = |of: &[u8; CONFIG_SIZE]| of.get(offset).copied();
        Some([mask(&self.compared)?, mask(&self.writable)?, mask(&self.write1_clear)?])
    }

    /// The BARs: number, kind and size in bytes.
    pub fn bars(&self) -> impl Iterator<Item = (usize, BarKind, u64)> + '_ {
        let bars = self.bars.iter().enumerate();
        bars.filter_map(|(index, bar)| bar.map(|bar| (index, bar.kind, bar.size)))
    }

    /// Checks that `state` is one of a function like this: the same identity, BAR sizes and
    /// capabilities.
    pub fn check(&self, state: &PciDeviceState) -> Result<(), FieldError> {
        if state.version != PCI_DEVICE_VERSION {
            let field = "pci.version";
            return Err(FieldError::new(field, PCI_DEVICE_VERSION, state.version));
        }
        for (i, (found, local)) in state.config.iter().zip(self.bytes).enumerate() {
            let (compared, writable) = (self.compared[i], self.writable[i]);
            if (found ^ local) & compared & !writable & !self.write1_clear[i] != 0 {
                return Err(FieldError::new(
                    format!("pci.config[{i:#x}]"),
                    format_args!("{local:#04x}"),
                    format_args!(
                        "{found:#04x} (Bad config data: i={i:#x} read: {found:x} device: {local:x} \
                         cmask: {compared:x} wmask: {writable:x} w1cmask: {:x})",
                        self.write1_clear[i]
                    ),
                ));
            }
        }
        match state.config.get(reg::INTERRUPT_PIN) {
            Some(0..=4) => {}
            Some(pin) => return Err(FieldError::new("pci.config[0x3d]", "a pin, 0 to 4", pin)),
            None => return Err(FieldError::new("pci.config", "256 bytes", state.config.len())),
        }
        if let Some((pin, level)) = state.irq_state.iter().enumerate().find(|(_, l)| **l > 1) {
            return Err(FieldError::new(format!("pci.irq_state[{pin}]"), "0 or 1", level));
        }
        Ok(())
    }

    /// Takes a state that [`check`](Self::check) has accepted, and returns the level of INTA.
    pub fn restore(&mut self, state: &PciDeviceState) -> bool {
        for (byte, value) in self.bytes.iter_mut().zip(state.config.iter()) {
            *byte = *value;
        }
        state.irq_state[0] != 0
    }
}

/// The only version of the PCI device block that is in use.
const PCI_DEVICE_VERSION: u32 = 2;

/// The block that begins every PCI function's section, 276 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "PCIDevice@2")]
pub struct PciDeviceState {
    /// The block's own version.
    pub version: u32,
    /// Configuration space.
    pub config: Bytes<CONFIG_SIZE>,
    /// The levels of INTA to INTD, 0 or 1.
    pub irq_state: [u32; 4],
}

/// QEMU's words for its fields, in the description of a section that it is in.
pub const PCI_DEVICE_WORDS: &[Word] = &[
    Word::new("PCIDevice", "version", "version_id").as_form(Form::Type("int32 le")),
    Word::new("PCIDevice", "config", "config[0]").as_form(Form::Type("pci config")),
    Word::shown("PCIDevice", "irq_state", Form::Whole("pci irq state")),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_fixed_is_what_must_be_the_same() {
        let (one, mut other) = (virtio_like(), virtio_like());
        // A guest writes wherever it may.
        other.write(reg::COMMAND, &[0xff, 0xff]);
        other.write(reg::BAR0, &[0xff; 4]);
        other.write(0x9a, &[0xff; 2]);
        assert_eq!(one.fixed(), other.fixed());
        assert_eq!(one.fixed()[..4], [0xf4, 0x1a, 0x00, 0x10]);
        other.add_capability(0xb0, 9, &[0x10, 1]);
        assert_ne!(one.fixed(), other.fixed());
        let bars: Vec<_> = one.bars().collect();
        let (io, m32, m64) = (BarKind::Io, BarKind::Memory32, BarKind::Memory64);
        assert_eq!(bars, [(0, io, 0x20), (1, m32, 0x1000), (4, m64, 0x4000)]);
        assert_eq!(one.masks(reg::VENDOR), Some([0xff, 0, 0]));
        assert_eq!(one.masks(CONFIG_SIZE), None);
    }

    fn virtio_like() -> PciConfig {
        let mut config = PciConfig::new(PciIdentity {
            id: (0x1af4, 0x1000),
            revision: 0,
            class: 0x0200,
            prog_if: 0,
            subsystem: (0x1af4, 1),
        });
        config.set_interrupt_pin(1);
        config.add_bar(0, BarKind::Io, 0x20);
        config.add_bar(1, BarKind::Memory32, 0x1000);
        config.add_bar(4, BarKind::Memory64, 0x4000);
        config.add_capability(0x40, 9, &[0x10, 1]);
        config.add_capability(0x98, 0x11, &[3, 0]);
        config.set_writable(0x9b, &[0xc0]);
        config
    }

    fn dword(config: &PciConfig, offset: usize) -> u32 {
        let mut data = [0; 4];
        config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identity_and_capabilities_stand_where_the_header_says() {
        let config = virtio_like();
        assert_eq!(dword(&config, 0x00), 0x1000_1af4);
        assert_eq!(dword(&config, 0x08), 0x0200_0000);
        assert_eq!(dword(&config, 0x2c), 0x0001_1af4);
        assert_eq!(dword(&config, 0x34) & 0xff, 0x98);
        assert_eq!(dword(&config, 0x98), 0x0003_4011);
        assert_eq!(dword(&config, 0x40), 0x0110_0009);
        assert_eq!(dword(&config, 0x04) >> 16, 0x0010);
    }

    #[test]
    fn sizing_tells_sizes_and_types() {
        let mut config = virtio_like();
        for offset in [0x10, 0x14, 0x18, 0x20, 0x24] {
            config.write(offset, &[0xff; 4]);
        }
        assert_eq!(dword(&config, 0x10), 0xffff_ffe1);
        assert_eq!(dword(&config, 0x14), 0xffff_f000);
        assert_eq!(dword(&config, 0x18), 0);
        assert_eq!(dword(&config, 0x20), 0xffff_c00c);
        assert_eq!(dword(&config, 0x24), 0xffff_ffff);
        config.write(4, &[7, 0]);
        assert!((0..8).all(|bar| config.bar(bar).is_none()), "all ones are no address");
    }

    #[test]
    fn bars_answer_only_when_decoded() {
        let mut config = virtio_like();
        config.write(0x10, &0xc001_u32.to_le_bytes());
        config.write(0x20, &0x8000_0000_u32.to_le_bytes());
        config.write(0x24, &1_u32.to_le_bytes());
        assert_eq!(config.bar(0), None);
        config.write(4, &[1]);
        let io = BarRange { kind: BarKind::Io, base: 0xc000, size: 0x20 };
        assert_eq!(config.bar(0), Some(io));
        assert_eq!(config.bar(4), None);
        config.write(4, &[2]);
        let memory = BarRange { kind: BarKind::Memory64, base: 0x1_8000_0000, size: 0x4000 };
        assert_eq!((config.bar(0), config.bar(4)), (None, Some(memory)));
        config.reset();
        config.write(4, &[3]);
        assert_eq!((config.bar(0), config.bar(4)), (None, None));
    }

    #[test]
    fn accesses_at_the_end_of_the_space_stay_inside() {
        let mut config = virtio_like();
        config.write(0xfe, &[1, 2, 3, 4]);
        assert_eq!(dword(&config, 0xfe), 0xffff_0201);
        assert_eq!(dword(&config, 0x400), u32::MAX);
        config.write(usize::MAX, &[1]);
    }

    #[test]
    fn errors_are_cleared_by_ones() {
        let mut config = virtio_like();
        config.set_now(7, &[0xf9]);
        config.write(6, &[0xff, 0x80]);
        assert_eq!(config.word(6), 0x7910);
    }

    #[test]
    fn another_kind_of_function_is_refused_by_name_of_the_byte() {
        let config = virtio_like();
        let good = config.save(true);
        config.check(&good).unwrap();
        for (offset, value) in [(0, 0), (0x0e, 0x80), (0x34, 0x84), (0x06, 0), (0x10, 0), (0x9a, 1)]
        {
            let mut bad = good.clone();
            bad.config[offset] = value;
            let error = config.check(&bad).unwrap_err();
            assert_eq!(error.field, format!("pci.config[{offset:#x}]"));
            assert!(error.found.contains(&format!("Bad config data: i={offset:#x}")), "{error}");
        }
        for (offset, value) in [(0x04, 7), (0x2e, 9), (0x3c, 11), (0x11, 0xc0), (0x9b, 0x80)] {
            let mut same = good.clone();
            same.config[offset] = value;
            config.check(&same).unwrap();
        }
        let mut bad = good.clone();
        bad.config[0x3d] = 5;
        assert_eq!(config.check(&bad).unwrap_err().field, "pci.config[0x3d]");
        let mut bad = good.clone();
        bad.irq_state[2] = 2;
        assert_eq!(config.check(&bad).unwrap_err().field, "pci.irq_state[2]");
        let mut bad = good;
        bad.version = 3;
        assert_eq!(config.check(&bad).unwrap_err().field, "pci.version");
    }

    #[test]
    fn a_restored_space_is_the_saved_one() {
        let mut source = virtio_like();
        source.write(4, &[7, 4]);
        source.write(0x10, &0xc041_u32.to_le_bytes());
        source.write(0x3c, &[11]);
        source.write(0xb0, &[0x5a]);
        let state = source.save(true);
        let mut destination = virtio_like();
        destination.check(&state).unwrap();
        assert!(destination.restore(&state));
        assert_eq!(destination.bytes(), source.bytes());
        assert_eq!(destination.bar(0), source.bar(0));
        assert!(destination.bar(0).is_some());
    }
}
