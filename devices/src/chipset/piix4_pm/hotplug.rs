//! QEMU's hot-plug registers for PCI slots and CPUs (its `docs/specs`: acpi_pci_hotplug and
//! acpi_cpu_hotplug), enough for ACPI methods that look: nothing ever comes or goes.

/// How many PCI buses the state has room for.
pub(super) const BUSES: usize = 256;

/// A read of the little-endian dword at `offset & !3`, cut to what was asked for.
fn give(value: u32, offset: u16, data: &mut [u8]) {
    let bytes = value.to_le_bytes();
    for (byte, value) in data.iter_mut().zip(bytes.iter().skip(usize::from(offset & 3))) {
        *byte = *value;
    }
}

/// A written dword; what is narrower is taken for its low bytes.
fn take(data: &[u8]) -> u32 {
    data.iter().rev().fold(0, |value, byte| (value << 8) | u32::from(*byte))
}

/// PCI slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PciHotplug {
    /// The bus that the registers are about.
    pub(super) select: u32,
    /// Slots that came and slots that shall go, a bit each, for each bus.
    pub(super) slots: Vec<(u32, u32)>,
    pub(super) acpi_index: u32,
}

impl Default for PciHotplug {
    fn default() -> Self {
        Self { select: 0, slots: vec![(0, 0); BUSES], acpi_index: 0 }
    }
}

impl PciHotplug {
    pub(super) fn read(&mut self, offset: u16, data: &mut [u8]) {
        let slots = self.slots.get_mut(self.select as usize);
        let value = match offset & !3 {
            // A slot that came is told once.
            0x00 => slots.map_or(0, |(up, _)| std::mem::take(up)),
            0x04 => slots.map_or(0, |(_, down)| *down),
            0x10 => self.select,
            0x14 => std::mem::take(&mut self.acpi_index),
            // 0x08 features and 0x0c removable slots: none.
            _ => 0,
        };
        give(value, offset, data);
    }

    pub(super) fn write(&mut self, offset: u16, data: &[u8]) {
        match offset {
            // No slot lets go of its device; the guest has at least been told.
            0x08 => {
                if let Some((_, down)) = self.slots.get_mut(self.select as usize) {
                    *down &= !take(data);
                }
            }
            0x10 => self.select = take(data),
            // No device has an ACPI index.
            0x14 => self.acpi_index = 0,
            _ => {}
        }
    }
}

/// What is known of one CPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cpu {
    pub(super) inserting: bool,
    pub(super) removing: bool,
    pub(super) ost_event: u32,
    pub(super) ost_status: u32,
}

/// CPUs, all of them present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CpuHotplug {
    /// Until the guest asks for the modern interface, the ports are a bitmap of CPUs.
    pub(super) modern: bool,
    pub(super) selector: u32,
    pub(super) command: u8,
    pub(super) cpus: Vec<Cpu>,
}

/// Commands of the modern interface.
mod command {
    /// Select the next CPU with an event.
    pub(super) const NEXT_EVENT: u8 = 0;
    pub(super) const OST_EVENT: u8 = 1;
    pub(super) const OST_STATUS: u8 = 2;
    pub(super) const ARCH_ID: u8 = 3;
}

/// CPU status: present and enabled.
const ENABLED: u8 = 1 << 0;
/// CPU status and control: it came.
const INSERTING: u8 = 1 << 1;
/// CPU status and control: it shall go.
const REMOVING: u8 = 1 << 2;

impl CpuHotplug {
    /// `cpus` CPUs, whose APIC ids are 0 to `cpus - 1`.
    pub(super) fn new(cpus: u32) -> Self {
        let cpus = vec![Cpu::default(); cpus as usize];
        Self { modern: false, selector: 0, command: 0, cpus }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.cpus.len() as u32);
    }

    fn selected(&mut self) -> Option<&mut Cpu> {
        self.cpus.get_mut(self.selector as usize)
    }

    /// Byte `n` of the bitmap of CPUs.
    fn bitmap(&self, n: usize) -> u8 {
        let present = self.cpus.len().saturating_sub(n * 8).min(8);
        (0xff_u16 >> (8 - present)) as u8
    }

    pub(super) fn read(&mut self, offset: u16, data: &mut [u8]) {
        if !self.modern {
            for (byte, n) in data.iter_mut().zip(usize::from(offset)..32) {
                *byte = self.bitmap(n);
            }
            return;
        }
        let (selector, command) = (self.selector, self.command);
        let Some(cpu) = self.selected() else { return data.fill(0) };
        match offset {
            // The upper half of the answer: no APIC id has one.
            0x00..=0x03 => data.fill(0),
            0x04 => {
                data.fill(0);
                let inserting = if cpu.inserting { INSERTING } else { 0 };
                let removing = if cpu.removing { REMOVING } else { 0 };
                give(u32::from(ENABLED | inserting | removing), 0, data);
            }
            0x08..=0x0b => match command {
                command::NEXT_EVENT | command::ARCH_ID => give(selector, offset, data),
                _ => data.fill(0),
            },
            _ => data.fill(0),
        }
    }

    pub(super) fn write(&mut self, offset: u16, data: &[u8]) {
        let value = take(data);
        if !self.modern {
            // Nobody ever had a reason to write into the bitmap, so this is the sign.
            self.modern = offset == 0 && value == 0;
            return;
        }
        match offset {
            0x00 => self.selector = value,
            0x04 => {
                if let Some(cpu) = self.selected() {
                    cpu.inserting &= value & u32::from(INSERTING) == 0;
                    cpu.removing &= value & u32::from(REMOVING) == 0;
                }
            }
            0x05 => {
                self.command = value as u8;
                if self.command == command::NEXT_EVENT {
                    self.select_next_event();
                }
            }
            0x08 => {
                let command = self.command;
                match (command, self.selected()) {
                    (command::OST_EVENT, Some(cpu)) => cpu.ost_event = value,
                    (command::OST_STATUS, Some(cpu)) => cpu.ost_status = value,
                    _ => {}
                }
            }
            _ => {}
        }
    }

    /// The first CPU from the selected one on (and round) that has an event. None: no change.
    fn select_next_event(&mut self) {
        let from = self.selector as usize;
        if from >= self.cpus.len() {
            return;
        }
        let eventful = |(_, cpu): &(usize, &Cpu)| cpu.inserting || cpu.removing;
        let round = self.cpus.iter().enumerate().cycle().skip(from).take(self.cpus.len());
        if let Some((n, _)) = round.into_iter().find(eventful) {
            self.selector = n as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dword(read: impl FnOnce(&mut [u8])) -> u32 {
        let mut data = [0xff; 4];
        read(&mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn no_slot_comes_or_goes() {
        let mut pci = PciHotplug::default();
        for bus in [0, 255, 256, u32::MAX] {
            pci.write(0x10, &bus.to_le_bytes());
            assert_eq!(dword(|data| pci.read(0x10, data)), bus);
            for offset in [0x00, 0x04, 0x08, 0x0c, 0x14] {
                assert_eq!(dword(|data| pci.read(offset, data)), 0);
            }
            pci.write(0x08, &[0xff; 4]);
        }
    }

    #[test]
    fn what_came_with_the_state_is_told_once() {
        let mut pci = PciHotplug::default();
        pci.slots[0] = (0x10, 0x20);
        assert_eq!(dword(|data| pci.read(0, data)), 0x10);
        assert_eq!(dword(|data| pci.read(0, data)), 0);
        assert_eq!(dword(|data| pci.read(4, data)), 0x20);
        pci.write(8, &0x20u32.to_le_bytes());
        assert_eq!(dword(|data| pci.read(4, data)), 0);
    }

    #[test]
    fn cpus_are_a_bitmap_first() {
        let mut cpus = CpuHotplug::new(10);
        let mut map = [0xee; 4];
        cpus.read(0, &mut map);
        assert_eq!(map, [0xff, 0x03, 0, 0]);
    }

    /// The detection that the interface's document prescribes, and what ACPI's scan method does.
    #[test]
    fn the_modern_interface_finds_every_cpu_enabled() {
        let mut cpus = CpuHotplug::new(2);
        cpus.write(0, &[0; 4]);
        cpus.write(0, &[0; 4]);
        cpus.write(5, &[0]);
        assert_eq!(dword(|data| cpus.read(0, data)), 0);
        for n in [0u32, 1] {
            cpus.write(0, &n.to_le_bytes());
            let mut status = [0];
            cpus.read(4, &mut status);
            assert_eq!(status, [ENABLED]);
            cpus.write(5, &[3]);
            assert_eq!(dword(|data| cpus.read(8, data)), n);
        }
        cpus.write(0, &2u32.to_le_bytes());
        let mut status = [0xff];
        cpus.read(4, &mut status);
        assert_eq!(status, [0], "there is no third one");
    }

    #[test]
    fn events_are_found_and_cleared() {
        let mut cpus = CpuHotplug::new(3);
        cpus.modern = true;
        cpus.cpus[1].inserting = true;
        cpus.write(0, &2u32.to_le_bytes());
        cpus.write(5, &[0]);
        assert_eq!(dword(|data| cpus.read(8, data)), 1);
        let mut status = [0];
        cpus.read(4, &mut status);
        assert_eq!(status, [ENABLED | INSERTING]);
        cpus.write(4, &[INSERTING]);
        cpus.read(4, &mut status);
        assert_eq!(status, [ENABLED]);
        cpus.write(5, &[1]);
        cpus.write(8, &7u32.to_le_bytes());
        cpus.write(5, &[2]);
        cpus.write(8, &8u32.to_le_bytes());
        assert_eq!((cpus.cpus[1].ost_event, cpus.cpus[1].ost_status), (7, 8));
    }
}
