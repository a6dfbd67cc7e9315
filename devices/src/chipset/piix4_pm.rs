//! Power management: 82371AB (PIIX4) function 01.3, with ACPI's fixed registers, the general
//! purpose events, the SMI command port, the SMBus host, and QEMU's hot-plug registers.
//!
//! Two of its port ranges are where the guest puts them (PMBA and SMBBA); the others are fixed.

use std::sync::{Arc, Mutex, Weak};

use vm_device::MutDevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use super::identity;
use crate::bus::{BusError, IoBus};
use crate::clock::Clock;
use crate::device::{Device, PowerControl, PowerRequest};
use crate::irq::IrqLine;
use crate::pci::{PciConfig, PciFunction};
use crate::timer::{Timed, TimerClock, TimerHost};

mod acpi;
mod hotplug;
mod section;
mod smbus;
mod state;

use acpi::{AcpiRegisters, Sleep};
use hotplug::{CpuHotplug, PciHotplug};
pub use section::PmSection;
use smbus::SmBus;
pub use state::PmState;

/// General purpose event block 0: two status bytes, two enable bytes.
pub const GPE0: (u16, u16) = (0xafe0, 4);
/// APM control (the ACPI tables' SMI_CMD) and status.
pub const APM: (u16, u16) = (0xb2, 2);
/// PCI hot-plug.
pub const PCI_HOTPLUG: (u16, u16) = (0xae00, 24);
/// CPU hot-plug: 12 ports, but 32 until the guest has switched to the modern interface.
pub const CPU_HOTPLUG: (u16, u16) = (0xaf00, 32);
/// What to write to the APM control port to switch ACPI on.
pub const ACPI_ENABLE: u8 = 0xf1;
/// What to write to the APM control port to switch ACPI off.
pub const ACPI_DISABLE: u8 = 0xf0;

/// Both movable ranges have this many ports.
const MOVABLE_PORTS: u16 = 64;
/// Status register: medium DEVSEL timing, fast back-to-back.
const STATUS: (usize, [u8; 2]) = (0x06, [0x80, 0x02]);
/// Registers that are not zero after power-on.
const POWER_ON: [(usize, u8); 7] = [
    (PM_BASE, 0x01),
    (DEVICE_ACTIVITY_B + 3, APMC_EN),
    (0x5f, 0x10),
    (0x63, 0x60),
    (0x67, 0x08),
    (SMBUS_BASE, 0x01),
    (0xd2, 0x08),
];
/// Device activity B.
const DEVICE_ACTIVITY_B: usize = 0x58;
/// In its last byte: a write to the APM control port raises an SMI. A firmware that finds it set takes
/// system management mode for set up already, and leaves it alone; so a QEMU says that it has none.
const APMC_EN: u8 = 0x02;
/// Power management base address.
const PM_BASE: usize = 0x40;
/// Miscellaneous power management: bit 0 enables the range.
const PM_ENABLE: usize = 0x80;
/// SMBus base address.
const SMBUS_BASE: usize = 0x90;
/// SMBus host configuration: bit 0 enables the range.
const SMBUS_ENABLE: usize = 0xd2;
/// The interrupt that the function tells to drivers: the SCI's.
const INTERRUPT_LINE: (usize, u8) = (0x3c, 9);

/// The function.
pub struct Piix4Pm {
    this: Weak<Mutex<Self>>,
    io: Arc<IoBus>,
    sci: Arc<dyn IrqLine>,
    clock: Arc<dyn Clock>,
    host: Arc<dyn TimerHost>,
    power: Arc<dyn PowerControl>,
    config: PciConfig,
    /// Where the movable ranges are mapped now.
    pm_ports: Option<u16>,
    smbus_ports: Option<u16>,
    acpi: AcpiRegisters,
    apm_control: u8,
    apm_status: u8,
    smbus: SmBus,
    pci_hotplug: PciHotplug,
    cpu_hotplug: CpuHotplug,
    /// QEMU's selector of memory slots, of which there are none.
    memory_selector: u32,
}

/// Which of the port ranges an access goes to.
#[derive(Clone, Copy)]
enum Block {
    Acpi,
    Smbus,
    Gpe,
    Apm,
    PciHotplug,
    CpuHotplug,
}

impl Piix4Pm {
    /// The function after power-on, its fixed ports claimed on `io`. `sci` is ISA IRQ 9 (level
    /// triggered); `cpus` is how many vCPUs there are, all of them plugged in.
    pub fn new(
        cpus: u32,
        io: Arc<IoBus>,
        sci: Arc<dyn IrqLine>,
        clock: Arc<dyn Clock>,
        host: Arc<dyn TimerHost>,
        power: Arc<dyn PowerControl>,
    ) -> Result<Arc<Mutex<Self>>, BusError> {
        let mut config = PciConfig::new(identity(0x7113, 3, 0x0680, 0));
        config.set(STATUS.0, &STATUS.1);
        config.set_interrupt_pin(1);
        config.set(INTERRUPT_LINE.0, &[INTERRUPT_LINE.1]);
        for (offset, value) in POWER_ON {
            config.set(offset, &[value]);
        }
        let pm = Arc::new_cyclic(|this| {
            Mutex::new(Self {
                this: this.clone(),
                io: io.clone(),
                sci,
                clock,
                host,
                power,
                config,
                pm_ports: None,
                smbus_ports: None,
                acpi: AcpiRegisters::default(),
                apm_control: 0,
                apm_status: 0,
                smbus: SmBus::default(),
                pci_hotplug: PciHotplug::default(),
                cpu_hotplug: CpuHotplug::new(cpus),
                memory_selector: 0,
            })
        });
        for (base, size) in [GPE0, APM, PCI_HOTPLUG, CPU_HOTPLUG] {
            io.map_pio(base, size, pm.clone())?;
        }
        Ok(pm)
    }

    /// Somebody presses the power button.
    pub fn power_button(&mut self) {
        self.acpi.press_power_button();
        self.update();
    }

    /// Whether the guest has switched ACPI on (SCI_EN).
    pub fn acpi_enabled(&self) -> bool {
        self.acpi.sci_enabled()
    }

    /// Drives the SCI, and has the timer armed anew.
    fn update(&mut self) {
        let now = self.clock.virtual_ns();
        self.sci.set_level(self.acpi.sci(now));
        self.host.deadline_changed();
    }

    /// Where a base register and its enable bit say that a range should be.
    fn wanted(&self, base: usize, enable: usize) -> Option<u16> {
        let on = self.config.bytes().get(enable).is_some_and(|byte| byte & 1 != 0);
        // Bits 15 to 6 are the address.
        let port = self.config.word(base) & !(MOVABLE_PORTS - 1);
        (on && port != 0).then_some(port)
    }

    /// Moves the two ranges to where the registers say. A range that somebody else has is tried
    /// again at the next write to a register.
    fn remap(&mut self) {
        let wanted = [self.wanted(PM_BASE, PM_ENABLE), self.wanted(SMBUS_BASE, SMBUS_ENABLE)];
        let Some(this) = self.this.upgrade() else { return };
        let mut mapped = [self.pm_ports, self.smbus_ports];
        for (now, wanted) in mapped.iter_mut().zip(wanted) {
            if *now != wanted
                && let Some(old) = now.take()
            {
                self.io.unmap_pio(old);
            }
        }
        for (now, wanted) in mapped.iter_mut().zip(wanted) {
            let (None, Some(port)) = (*now, wanted) else { continue };
            match self.io.map_pio(port, MOVABLE_PORTS, this.clone()) {
                Ok(()) => *now = Some(port),
                Err(error) => tracing::debug!(%error, "power management ports stay unmapped"),
            }
        }
        [self.pm_ports, self.smbus_ports] = mapped;
    }

    fn block(&self, base: u16) -> Option<Block> {
        match base {
            _ if base == GPE0.0 => Some(Block::Gpe),
            _ if base == APM.0 => Some(Block::Apm),
            _ if base == PCI_HOTPLUG.0 => Some(Block::PciHotplug),
            _ if base == CPU_HOTPLUG.0 => Some(Block::CpuHotplug),
            _ if Some(base) == self.pm_ports => Some(Block::Acpi),
            _ if Some(base) == self.smbus_ports => Some(Block::Smbus),
            _ => None,
        }
    }

    fn write_apm(&mut self, offset: u16, value: u8) {
        match offset {
            0 => {
                self.apm_control = value;
                match value {
                    ACPI_ENABLE => self.acpi.set_sci_enabled(true),
                    ACPI_DISABLE => self.acpi.set_sci_enabled(false),
                    // An SMI would follow; this board has no system management mode.
                    _ => {}
                }
            }
            1 => self.apm_status = value,
            _ => {}
        }
    }

    fn reset_all(&mut self) {
        self.config.reset();
        self.acpi = AcpiRegisters::default();
        self.apm_control = 0;
        self.apm_status = 0;
        self.smbus = SmBus::default();
        self.pci_hotplug = PciHotplug::default();
        self.cpu_hotplug.reset();
        self.memory_selector = 0;
        self.remap();
        self.update();
    }
}

impl MutDevicePio for Piix4Pm {
    fn pio_read(&mut self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(0xff);
        let now = self.clock.virtual_ns();
        match self.block(base.0) {
            Some(Block::Acpi) => self.acpi.read(offset, data, now),
            Some(Block::Gpe) => self.acpi.read_gpe(offset, data),
            Some(Block::PciHotplug) => self.pci_hotplug.read(offset, data),
            Some(Block::CpuHotplug) => self.cpu_hotplug.read(offset, data),
            Some(Block::Smbus) => {
                for (byte, at) in data.iter_mut().zip(offset..) {
                    *byte = self.smbus.read(at);
                }
            }
            Some(Block::Apm) => {
                for (byte, value) in data
                    .iter_mut()
                    .zip([self.apm_control, self.apm_status].iter().skip(offset.into()))
                {
                    *byte = *value;
                }
            }
            None => {}
        }
    }

    fn pio_write(&mut self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let now = self.clock.virtual_ns();
        match self.block(base.0) {
            Some(Block::Acpi) => match self.acpi.write(offset, data, now) {
                Some(Sleep::Off) => self.power.request(PowerRequest::PowerOff),
                Some(Sleep::Unsupported(kind)) => {
                    tracing::debug!(kind, "the guest asked for a sleep state that is not offered");
                }
                None => {}
            },
            Some(Block::Gpe) => self.acpi.write_gpe(offset, data),
            Some(Block::PciHotplug) => self.pci_hotplug.write(offset, data),
            Some(Block::CpuHotplug) => self.cpu_hotplug.write(offset, data),
            Some(Block::Smbus) => {
                for (value, at) in data.iter().zip(offset..) {
                    self.smbus.write(at, *value);
                }
            }
            Some(Block::Apm) => {
                for (value, at) in data.iter().zip(offset..) {
                    self.write_apm(at, *value);
                }
            }
            None => {}
        }
        self.update();
    }
}

impl PciFunction for Piix4Pm {
    fn name(&self) -> &str {
        "piix4_pm"
    }

    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        self.remap();
    }

    fn reset(&mut self) {
        self.reset_all();
    }
}

impl Timed for Piix4Pm {
    fn timer_clock(&self) -> TimerClock {
        TimerClock::Virtual
    }

    fn next_deadline(&self) -> Option<i64> {
        self.acpi.deadline_ns(self.clock.virtual_ns())
    }

    fn expire(&mut self, now_ns: i64) {
        self.sci.set_level(self.acpi.sci(now_ns));
    }
}

impl Device for Piix4Pm {
    fn reset(&mut self) {
        self.reset_all();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {
        self.remap();
        self.update();
    }
}

#[cfg(test)]
mod tests;
