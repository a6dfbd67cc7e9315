//! The IDE function of the PIIX3, function 01.1, without drives.
//!
//! Its ports answer as cables with nothing at their end: every register reads as zero, which is
//! how Linux's libata finds out that no drive is there.

use migration::vmstate::{Audience, FieldError, Form, Migratable, VmState, Word, Words};
use serde::{Deserialize, Serialize};
use vm_device::MutDevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use super::identity;
use crate::device::Device;
use crate::pci::{BarKind, PCI_DEVICE_WORDS, PciConfig, PciDeviceState, PciFunction};

/// The two channels' command blocks and control ports: (first port, number of ports).
pub const PORTS: [(u16, u16); 4] = [(0x1f0, 8), (0x3f6, 1), (0x170, 8), (0x376, 1)];

const STATUS: (usize, [u8; 2]) = (0x06, [0x80, 0x02]);
/// The bus master's registers.
const BUS_MASTER_BAR: usize = 4;
const BUS_MASTER_PORTS: u64 = 16;

/// Device register: bits that are always set.
const SELECT_ONES: u8 = 0xa0;
/// Device register bit 4: the second drive.
const SELECT_SECOND: u8 = 1 << 4;
/// Control register bit 2: reset both drives.
const SOFT_RESET: u8 = 1 << 2;

/// Bus master command and status registers (data sheet, BMICX and BMISX).
mod bus_master {
    pub(super) const COMMAND: u64 = 0;
    pub(super) const STATUS: u64 = 2;
    pub(super) const TABLE: u64 = 4;
    /// Start, and direction.
    pub(super) const COMMAND_BITS: u8 = 0x09;
    /// Bits that software sets and clears: which drives can do DMA.
    pub(super) const STATUS_WRITABLE: u8 = 0x60;
    /// Error and interrupt, cleared by writing ones.
    pub(super) const STATUS_CLEARED: u8 = 0x06;
}

/// The function.
pub struct Ide {
    config: PciConfig,
    bmdma: [BusMaster; 2],
    bus: [Channel; 2],
    drives: [[Drive; 2]; 2],
}

/// One channel of the bus master; on the wire as it is here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "ide bmdma@3")]
struct BusMaster {
    cmd: u8,
    #[serde(rename = "migration_compat_status")]
    status: u8,
    addr: u32,
    /// The request that was stopped by an error; there are none without drives.
    #[serde(rename = "migration_retry_sector_num")]
    retry_sector_num: i64,
    #[serde(rename = "migration_retry_nsector")]
    retry_nsector: u32,
    #[serde(rename = "migration_retry_unit")]
    retry_unit: u8,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "ide_bus")]
struct Channel {
    /// The control register.
    cmd: u8,
    /// The selected drive.
    unit: u8,
}

/// The registers that a drive would have. What is written is kept, as it is by QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "ide_drive@3")]
struct Drive {
    mult_sectors: i32,
    identify_set: i32,
    feature: u8,
    error: u8,
    nsector: u32,
    sector: u8,
    lcyl: u8,
    hcyl: u8,
    hob_feature: u8,
    hob_sector: u8,
    hob_nsector: u8,
    hob_lcyl: u8,
    hob_hcyl: u8,
    select: u8,
    status: u8,
    lba48: u8,
    sense_key: u8,
    asc: u8,
    cdrom_changed: u8,
}

impl Default for Drive {
    fn default() -> Self {
        Self {
            mult_sectors: 16,
            identify_set: 0,
            feature: 0,
            error: 0,
            nsector: 1,
            sector: 1,
            // The signature of no drive.
            lcyl: 0xff,
            hcyl: 0xff,
            hob_feature: 0,
            hob_sector: 0,
            hob_nsector: 0,
            hob_lcyl: 0,
            hob_hcyl: 0,
            select: SELECT_ONES,
            // Ready, seek complete.
            status: 0x50,
            lba48: 0,
            sense_key: 0,
            asc: 0,
            cdrom_changed: 0,
        }
    }
}

impl Drive {
    /// A write to the command block. The registers two deep keep what was in them before.
    fn write(&mut self, register: u16, value: u8) {
        match register {
            1 => self.hob_feature = std::mem::replace(&mut self.feature, value),
            2 => {
                let old = std::mem::replace(&mut self.nsector, value.into());
                self.hob_nsector = old.to_le_bytes()[0];
            }
            3 => self.hob_sector = std::mem::replace(&mut self.sector, value),
            4 => self.hob_lcyl = std::mem::replace(&mut self.lcyl, value),
            5 => self.hob_hcyl = std::mem::replace(&mut self.hcyl, value),
            6 => self.select = value | SELECT_ONES,
            _ => {}
        }
    }
}

impl Default for Ide {
    fn default() -> Self {
        let mut config = PciConfig::new(identity(0x7010, 0, 0x0101, 0x80));
        config.set(STATUS.0, &STATUS.1);
        config.add_bar(BUS_MASTER_BAR, BarKind::Io, BUS_MASTER_PORTS);
        Self {
            config,
            bmdma: Default::default(),
            bus: Default::default(),
            drives: Default::default(),
        }
    }
}

impl Ide {
    /// The function after power-on.
    pub fn new() -> Self {
        Self::default()
    }

    fn write_command_block(&mut self, channel: usize, register: u16, value: u8) {
        if register == 6
            && let Some(bus) = self.bus.get_mut(channel)
        {
            bus.unit = u8::from(value & SELECT_SECOND != 0);
        }
        for drive in self.drives.get_mut(channel).into_iter().flatten() {
            drive.write(register, value);
        }
    }

    fn write_control(&mut self, channel: usize, value: u8) {
        let Some(bus) = self.bus.get_mut(channel) else { return };
        let released = bus.cmd & SOFT_RESET != 0 && value & SOFT_RESET == 0;
        bus.cmd = value;
        if released {
            bus.unit = 0;
            if let Some(drives) = self.drives.get_mut(channel) {
                *drives = Default::default();
            }
        }
    }

    fn reset_all(&mut self) {
        self.config.reset();
        self.bmdma = Default::default();
        self.bus = Default::default();
        self.drives = Default::default();
    }
}

impl MutDevicePio for Ide {
    fn pio_read(&mut self, _: PioAddress, _: PioAddressOffset, data: &mut [u8]) {
        data.fill(0);
    }

    fn pio_write(&mut self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        // Only the data port, of which nobody reads, is wider than a byte.
        let [value] = *data else { return };
        match base.0 {
            0x1f0 => self.write_command_block(0, offset, value),
            0x170 => self.write_command_block(1, offset, value),
            0x3f6 => self.write_control(0, value),
            0x376 => self.write_control(1, value),
            _ => {}
        }
    }
}

impl PciFunction for Ide {
    fn name(&self) -> &str {
        "ide"
    }

    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn bar_read(&mut self, _: usize, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = match (self.bmdma.get((at >> 3) as usize), at & 7) {
                (Some(channel), bus_master::COMMAND) => channel.cmd,
                (Some(channel), bus_master::STATUS) => channel.status,
                (Some(channel), n @ bus_master::TABLE..=7) => {
                    channel.addr.to_le_bytes()[(n & 3) as usize]
                }
                _ => 0xff,
            };
        }
    }

    fn bar_write(&mut self, _: usize, offset: u64, data: &[u8]) {
        for (value, at) in data.iter().zip(offset..) {
            let Some(channel) = self.bmdma.get_mut((at >> 3) as usize) else { continue };
            match at & 7 {
                // Starting a transfer that no drive asked for does nothing.
                bus_master::COMMAND => channel.cmd = value & bus_master::COMMAND_BITS,
                bus_master::STATUS => {
                    let kept = channel.status & !(value & bus_master::STATUS_CLEARED);
                    let writable = bus_master::STATUS_WRITABLE;
                    channel.status = (kept & !writable) | (value & writable);
                }
                n @ bus_master::TABLE..=7 => {
                    let mut bytes = channel.addr.to_le_bytes();
                    bytes[(n & 3) as usize] = *value;
                    channel.addr = u32::from_le_bytes(bytes) & !3;
                }
                _ => {}
            }
        }
    }

    fn reset(&mut self) {
        self.reset_all();
    }
}

impl Device for Ide {
    fn reset(&mut self) {
        self.reset_all();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

/// Section `0000:00:01.1/ide` v3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdeState {
    parent_obj: PciDeviceState,
    bmdma: [BusMaster; 2],
    bus: [Channel; 2],
    #[serde(rename = "bus[0].ifs")]
    primary: [Drive; 2],
    #[serde(rename = "bus[1].ifs")]
    secondary: [Drive; 2],
}

/// Their elements may have subsections in QEMU.
const ARRAYS: &[Word] = &[
    Word::shown("ide", "bmdma", Form::Each),
    Word::shown("ide", "bus", Form::Each),
    Word::shown("ide", "bus[0].ifs", Form::Each),
    Word::shown("ide", "bus[1].ifs", Form::Each),
];

impl VmState for IdeState {
    const VERSION: u32 = 3;
    const WORDS: Words = Words { prefix: "", fields: &[PCI_DEVICE_WORDS, ARRAYS] };
}

impl Migratable for Ide {
    type State = IdeState;

    fn save(&self, _: Audience) -> Result<IdeState, FieldError> {
        let [primary, secondary] = self.drives.clone();
        Ok(IdeState {
            parent_obj: self.config.save(false),
            bmdma: self.bmdma.clone(),
            bus: self.bus.clone(),
            primary,
            secondary,
        })
    }

    fn check(&self, state: &IdeState) -> Result<(), FieldError> {
        self.config.check(&state.parent_obj)?;
        for (n, bus) in state.bus.iter().enumerate() {
            if bus.unit > 1 {
                return Err(FieldError::new(format!("bus[{n}].unit"), "0 or 1", bus.unit));
            }
        }
        Ok(())
    }

    fn restore(&mut self, state: IdeState) -> Result<(), FieldError> {
        self.config.restore(&state.parent_obj);
        self.bmdma = state.bmdma;
        self.bus = state.bus;
        self.drives = [state.primary, state.secondary];
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_at_the_cable() {
        let mut ide = Ide::new();
        for base in [0x1f0, 0x170] {
            // libata's test: what is written to count and sector must be read back.
            for (register, value) in [(6, 0xa0), (2, 0x55), (3, 0xaa), (2, 0xaa), (3, 0x55)] {
                ide.pio_write(PioAddress(base), register, &[value]);
            }
            for register in 0..8 {
                let mut value = [0xee];
                ide.pio_read(PioAddress(base), register, &mut value);
                assert_eq!(value, [0]);
            }
        }
        let mut alternate_status = [0xee];
        ide.pio_read(PioAddress(0x3f6), 0, &mut alternate_status);
        assert_eq!(alternate_status, [0]);
        assert_eq!((ide.drives[0][0].nsector, ide.drives[1][1].hob_sector), (0xaa, 0xaa));
    }

    #[test]
    fn soft_reset_selects_the_first_drive() {
        let mut ide = Ide::new();
        ide.pio_write(PioAddress(0x170), 6, &[0xb0]);
        ide.pio_write(PioAddress(0x170), 2, &[0x55]);
        assert_eq!(ide.bus[1].unit, 1);
        ide.pio_write(PioAddress(0x376), 0, &[0x04]);
        ide.pio_write(PioAddress(0x376), 0, &[0x00]);
        assert_eq!((ide.bus[1].unit, &ide.drives[1][0]), (0, &Drive::default()));
    }

    #[test]
    fn bus_master_registers() {
        let mut ide = Ide::new();
        ide.bmdma[1].status = 0x07;
        ide.bar_write(4, 8, &[0xff]);
        ide.bar_write(4, 10, &[0x62]);
        ide.bar_write(4, 12, &0x1234_5677u32.to_le_bytes());
        let mut block = [0; 8];
        ide.bar_read(4, 8, &mut block);
        assert_eq!(block, [0x09, 0xff, 0x65, 0xff, 0x74, 0x56, 0x34, 0x12]);
        ide.bar_write(4, 16, &[0; 8]);
    }

    #[test]
    fn state_travels_whole() {
        let drive = |n: u8| Drive {
            mult_sectors: i32::from(n),
            identify_set: 1,
            feature: n + 1,
            error: n + 2,
            nsector: u32::from(n) + 3,
            sector: n + 4,
            lcyl: n + 5,
            hcyl: n + 6,
            hob_feature: n + 7,
            hob_sector: n + 8,
            hob_nsector: n + 9,
            hob_lcyl: n + 10,
            hob_hcyl: n + 11,
            select: n + 12,
            status: n + 13,
            lba48: n + 14,
            sense_key: n + 15,
            asc: n + 16,
            cdrom_changed: n + 17,
        };
        let master = |n: u8| BusMaster {
            cmd: n,
            status: n + 1,
            addr: u32::from(n) << 16,
            retry_sector_num: -i64::from(n),
            retry_nsector: u32::from(n) + 2,
            retry_unit: n + 3,
        };
        let mut ide = Ide::new();
        let mut sent = ide.save(Audience::Qemu).unwrap();
        sent.parent_obj.config[0x20..0x22].copy_from_slice(&[0x41, 0xc1]);
        sent.parent_obj.config[0x41] = 0x80;
        sent.bmdma = [master(8), master(16)];
        sent.bus = [Channel { cmd: 2, unit: 1 }, Channel { cmd: 3, unit: 0 }];
        sent.primary = [drive(20), drive(40)];
        sent.secondary = [drive(60), drive(80)];
        ide.check(&sent).unwrap();
        ide.restore(sent.clone()).unwrap();
        assert_eq!(ide.save(Audience::Qemu).unwrap(), sent);
        sent.bus[1].unit = 2;
        assert_eq!(ide.check(&sent).unwrap_err().field, "bus[1].unit");
    }
}
