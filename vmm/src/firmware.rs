//! What a firmware does to the board before it starts the operating system, for guests that boot
//! without one.
//!
//! It works as firmware works, through ports 0xcf8 and 0xcfc, and leaves the chipset as SeaBIOS
//! leaves it under QEMU: a guest finds BARs assigned, interrupts routed and power management
//! enabled, and one that later moves to a QEMU is not surprised.

use arch::layout::{self, port};
use devices::bus::IoBus;
use devices::isa::i8042;
use vm_allocator::{AddressAllocator, AllocPolicy};

/// The PIIX3's four PIRQ lines go to these interrupts (route registers 0x60 to 0x63).
const PIRQ_ROUTES: [u8; 4] = [10, 10, 11, 11];

/// BARs of I/O space are placed from here on.
const IO_WINDOW: layout::Range = layout::Range { start: 0xc000, size: 0x3000 };

/// PCI configuration registers (PCI Local Bus 3.0, 6.1).
mod reg {
    pub(super) const VENDOR: u8 = 0x00;
    pub(super) const COMMAND: u8 = 0x04;
    pub(super) const HEADER_TYPE: u8 = 0x0e;
    pub(super) const BAR0: u8 = 0x10;
    pub(super) const INTERRUPT_LINE: u8 = 0x3c;
    pub(super) const INTERRUPT_PIN: u8 = 0x3d;
}

/// The keyboard controller's commands (Intel 8042, as in the PC/AT).
mod keyboard {
    pub(super) const WRITE_MODE: u8 = 0x60;
    pub(super) const SELF_TEST: u8 = 0xaa;
    /// Command byte: keyboard and mouse off, no interrupts.
    pub(super) const QUIET: u8 = 0x30;
    /// Command byte: scan codes are translated to set 1, the keyboard interrupts, the mouse is off
    /// until a driver comes. So SeaBIOS leaves it.
    pub(super) const READY: u8 = 0x61;
}

const COMMAND_IO: u32 = 1;
const COMMAND_MEMORY: u32 = 2;
const MULTIFUNCTION: u32 = 0x80;

/// The board could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// The devices want more address space than the board has.
    #[error(
        "no room for BAR {bar} of PCI device {slot:02x}.{function} ({size:#x} bytes of {space}): \
         configure fewer devices"
    )]
    NoRoom {
        /// PCI device number.
        slot: u8,
        /// PCI function number.
        function: u8,
        /// Which BAR.
        bar: u8,
        /// Its size in bytes.
        size: u64,
        /// Ports or memory.
        space: &'static str,
        /// The allocator's reason.
        #[source]
        source: vm_allocator::Error,
    },
    /// The board has no such window; a layout that cannot be.
    #[error("the PCI windows of a machine with {0} bytes of RAM cannot be laid out")]
    Layout(u64, #[source] vm_allocator::Error),
}

/// One PCI function as firmware sees it.
#[derive(Clone, Copy)]
struct Function<'a> {
    bus: &'a IoBus,
    slot: u8,
    function: u8,
}

impl Function<'_> {
    fn select(self, register: u8) {
        let address = 0x8000_0000
            | u32::from(self.slot) << 11
            | u32::from(self.function) << 8
            | u32::from(register & 0xfc);
        self.bus.pio_write(port::PCI_CONFIG_ADDRESS, &address.to_le_bytes());
    }

    fn read(self, register: u8) -> u32 {
        let mut data = [0; 4];
        self.select(register);
        self.bus.pio_read(port::PCI_CONFIG_DATA, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(self, register: u8, value: u32) {
        self.select(register);
        self.bus.pio_write(port::PCI_CONFIG_DATA, &value.to_le_bytes());
    }

    fn read8(self, register: u8) -> u8 {
        let mut data = [0];
        self.select(register);
        self.bus.pio_read(port::PCI_CONFIG_DATA + u16::from(register & 3), &mut data);
        let [byte] = data;
        byte
    }

    fn write8(self, register: u8, value: u8) {
        self.select(register);
        self.bus.pio_write(port::PCI_CONFIG_DATA + u16::from(register & 3), &[value]);
    }

    fn is_there(self) -> bool {
        self.read(reg::VENDOR) & 0xffff != 0xffff
    }
}

/// Sets the board up for a guest with `ram` bytes of memory.
pub fn set_up(bus: &IoBus, ram: u64) -> Result<(), FirmwareError> {
    chipset(bus);
    keyboard_controller(bus);
    let window = layout::pci32_window(ram);
    let mut ports = AddressAllocator::new(IO_WINDOW.start, IO_WINDOW.size)
        .map_err(|e| FirmwareError::Layout(ram, e))?;
    let mut memory = AddressAllocator::new(window.start, window.size)
        .map_err(|e| FirmwareError::Layout(ram, e))?;
    for slot in 1..32 {
        let first = Function { bus, slot, function: 0 };
        if !first.is_there() {
            continue;
        }
        let several = u32::from(first.read8(reg::HEADER_TYPE)) & MULTIFUNCTION != 0;
        for function in 0..if several { 8 } else { 1 } {
            let f = Function { bus, slot, function };
            if f.is_there() {
                assign(f, &mut ports, &mut memory)?;
            }
        }
    }
    Ok(())
}

/// I440FX, PIIX3 and PIIX4 in the order of their functions. The numbers are those of the chips'
/// data sheets; which values go there is what SeaBIOS leaves (`docs/board.md`).
fn chipset(bus: &IoBus) {
    let at = |slot, function| Function { bus, slot, function };
    let host = at(0, 0);
    // PAM: 0xc0000 to 0xdffff, where the ACPI tables are, is plain RAM. From 0xe0000 on it is as at
    // power-on, the BIOS: a reset of this chipset does not touch these registers, and a QEMU that
    // resets the guest later runs it from there.
    for pam in 0x5a..=0x5d {
        host.write8(pam, 0x33);
    }
    for pam in [0x59, 0x5e, 0x5f] {
        host.write8(pam, 0x00);
    }
    // SMRAM: closed and locked away from everyone, since nothing runs in SMM.
    host.write8(0x72, 0x0a);

    let isa = at(1, 0);
    for (register, irq) in (0x60..).zip(PIRQ_ROUTES) {
        isa.write8(register, irq);
    }

    let ide = at(1, 1);
    // Both channels decode their ports (IDETIM, bit 15 of each).
    ide.write(0x40, 0x8000_8000);

    let pm = at(1, 3);
    pm.write8(reg::INTERRUPT_LINE, 9);
    pm.write(0x40, u32::from(port::PM_BASE) | 1);
    pm.write8(0x80, 1); // PMREGMISC: the I/O space at PMBA answers
    pm.write(0x90, u32::from(port::SMBUS_BASE) | 1);
    pm.write8(0xd2, 0x09); // SMBHSTCFG: host controller on, interrupt by SMI off
}

/// The keyboard controller as a BIOS hands it over. Linux takes the translation bit that it finds for
/// what the keyboard is.
fn keyboard_controller(bus: &IoBus) {
    let command = |value| bus.pio_write(i8042::COMMAND_PORT, &[value]);
    let data = |value| bus.pio_write(i8042::DATA_PORT, &[value]);
    // The test's answer is read before anything may interrupt: the interrupt would be pending still
    // when the guest begins.
    command(keyboard::WRITE_MODE);
    data(keyboard::QUIET);
    command(keyboard::SELF_TEST);
    bus.pio_read(i8042::DATA_PORT, &mut [0]);
    command(keyboard::WRITE_MODE);
    data(keyboard::READY);
}

/// Places the function's BARs and switches its decoders on.
fn assign(
    f: Function<'_>,
    ports: &mut AddressAllocator,
    memory: &mut AddressAllocator,
) -> Result<(), FirmwareError> {
    let mut decode = 0;
    let mut bar = 0;
    while bar < 6 {
        let register = reg::BAR0 + 4 * bar;
        let this = bar;
        bar += 1;
        f.write(register, u32::MAX);
        let mask = f.read(register);
        if mask == 0 {
            continue;
        }
        let is_io = mask & 1 != 0;
        let is_64 = !is_io && mask & 0b110 == 0b100;
        let size = if is_io {
            // Bits 31-16 of an I/O BAR may be hard-wired to zero.
            u64::from(!(mask & !0b11) & 0xffff) + 1
        } else {
            u64::from(!(mask & !0xf)) + 1
        };
        let (space, from, policy) = if is_io {
            ("I/O ports", &mut *ports, AllocPolicy::FirstMatch)
        } else {
            ("memory", &mut *memory, AllocPolicy::LastMatch)
        };
        let range = from.allocate(size, size, policy).map_err(|source| FirmwareError::NoRoom {
            slot: f.slot,
            function: f.function,
            bar: this,
            size,
            space,
            source,
        })?;
        f.write(register, range.start() as u32);
        if is_64 {
            f.write(register + 4, 0);
            bar += 1;
        }
        decode |= if is_io { COMMAND_IO } else { COMMAND_MEMORY };
    }
    if let pin @ 1..=4 = f.read8(reg::INTERRUPT_PIN) {
        // The PM function's interrupt is the SCI, wired and not routed.
        if (f.slot, f.function) != (1, 3) {
            let pirq = (usize::from(f.slot) + 3 + usize::from(pin) - 1) % 4;
            let irq = PIRQ_ROUTES.get(pirq).copied().unwrap_or_default();
            f.write8(reg::INTERRUPT_LINE, irq);
        }
    }
    let command = f.read(reg::COMMAND) & 0xffff;
    f.write(reg::COMMAND, command | decode);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, Mutex};

    use devices::irq::IrqLine;
    use devices::isa::i8042::I8042;
    use devices::isa::ps2::{Keyboard, Mouse};

    use super::*;
    use crate::power::MachineEvents;

    /// Counts how often it went up.
    #[derive(Default)]
    struct Line(AtomicU32);

    impl IrqLine for Line {
        fn set_level(&self, level: bool) {
            self.0.fetch_add(level.into(), Ordering::Relaxed);
        }
    }

    #[test]
    fn the_keyboard_controller_translates_and_nothing_is_pending() {
        let bus = IoBus::new();
        let lines = [(); 2].map(|()| Arc::new(Line::default()));
        let [first, twelfth] = lines.clone();
        let (keyboard, mouse) = (Keyboard::new(), Mouse::new());
        let (keyboard, mouse) = (Arc::new(Mutex::new(keyboard)), Arc::new(Mutex::new(mouse)));
        let power = Arc::new(MachineEvents::new().0);
        let controller = I8042::new(keyboard, mouse, first, twelfth, power);
        let controller = Arc::new(Mutex::new(controller));
        for port in [i8042::DATA_PORT, i8042::COMMAND_PORT] {
            bus.map_pio(port, 1, controller.clone()).unwrap();
        }
        let read = |port| {
            let mut byte = [0];
            bus.pio_read(port, &mut byte);
            byte[0]
        };
        let mode = || {
            bus.pio_write(i8042::COMMAND_PORT, &[0x20]);
            read(i8042::DATA_PORT)
        };
        assert_eq!(mode(), 0x03, "after a reset the device is as the board has it");
        lines.iter().for_each(|line| line.0.store(0, Ordering::Relaxed));
        set_up(&bus, 64 << 20).unwrap();
        let raised = || lines.each_ref().map(|line| line.0.load(Ordering::Relaxed));
        assert_eq!(raised(), [0, 0]);
        // Self-tested, the output buffer empty.
        assert_eq!(read(i8042::COMMAND_PORT) & 0x05, 0x04);
        assert_eq!(mode(), 0x61);
    }
}
