//! Two Intel 8237A DMA controllers and their page registers: registers only, for no device on
//! this board transfers by them.

use migration::vmstate::{Audience, FieldError, Migratable, VmState};
use serde::{Deserialize, Serialize};

use super::{FLOATING, byte_ports};
use crate::device::Device;

/// The first controller's registers (channels 0 to 3).
pub const FIRST_PORTS: (u16, u16) = (0x00, 0x10);
/// The second controller's registers (channels 4 to 7), two ports apart.
pub const SECOND_PORTS: (u16, u16) = (0xc0, 0x20);
/// The page registers of the first controller's channels 2, 3, 1 and 0. The port between them,
/// 0x80, belongs to the power-on self-test.
pub const FIRST_PAGES: [(u16, u16); 2] = [(0x81, 3), (0x87, 1)];
/// The page registers of the second controller's channels 6, 7, 5 and 4.
pub const SECOND_PAGES: [(u16, u16); 2] = [(0x89, 3), (0x8f, 1)];

/// Which channel each page register belongs to, from the controller's first page port on.
const PAGE_CHANNEL: [Option<usize>; 8] =
    [None, Some(2), Some(3), Some(1), None, None, None, Some(0)];

/// Registers behind the eight address and count registers (data sheet, figure 5).
mod reg {
    /// Read: status. Write: command.
    pub(super) const COMMAND: u16 = 8;
    pub(super) const REQUEST: u16 = 9;
    pub(super) const SINGLE_MASK: u16 = 10;
    pub(super) const MODE: u16 = 11;
    pub(super) const CLEAR_FLIP_FLOP: u16 = 12;
    pub(super) const MASTER_CLEAR: u16 = 13;
    pub(super) const CLEAR_MASK: u16 = 14;
    pub(super) const ALL_MASK: u16 = 15;
}

/// Which of the two controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Channels 0 to 3, for bytes. Instance 0 of the section.
    First,
    /// Channels 4 to 7, for words. Instance 1.
    Second,
}

/// One controller.
#[derive(Debug)]
pub struct Dma {
    which: Which,
    command: u8,
    mask: u8,
    /// The next address or count byte is the high one.
    flip_flop: bool,
    channels: [Channel; 4],
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Channel {
    /// The address and the number of bytes transferred so far, in bytes.
    now: [i32; 2],
    /// What was programmed: address and count, in units of the controller.
    base: [u16; 2],
    mode: u8,
    page: u8,
    pageh: u8,
    dack: u8,
    eop: u8,
}

impl Dma {
    /// A controller after power-on: every channel masked.
    pub fn new(which: Which) -> Self {
        Self { which, command: 0, mask: 0xff, flip_flop: false, channels: Default::default() }
    }

    /// Units are bytes (0) or words (1).
    fn shift(&self) -> u32 {
        match self.which {
            Which::First => 0,
            Which::Second => 1,
        }
    }

    /// The register behind a port, or the channel whose page it is.
    fn decode(&self, port: u16) -> Option<Port> {
        let (base, pages) = match self.which {
            Which::First => (FIRST_PORTS, 0x80),
            Which::Second => (SECOND_PORTS, 0x88),
        };
        if (base.0..base.0 + base.1).contains(&port) {
            return Some(Port::Register((port - base.0) >> self.shift()));
        }
        let page = usize::from(port.checked_sub(pages)?);
        PAGE_CHANNEL.get(page).copied().flatten().map(Port::Page)
    }

    fn read_port(&mut self, port: u16) -> u8 {
        match self.decode(port) {
            Some(Port::Page(channel)) => self.channels.get(channel).map_or(FLOATING, |c| c.page),
            Some(Port::Register(n @ 0..=7)) => {
                let shift = self.shift();
                let high = self.flip_flop;
                self.flip_flop = !high;
                let Some(channel) = self.channels.get(usize::from(n >> 1)) else {
                    return FLOATING;
                };
                let [address, done] = channel.now;
                let value = if n & 1 == 0 {
                    address.wrapping_add(done) >> shift
                } else {
                    i32::from(channel.base[1]).wrapping_sub(done >> shift)
                };
                let [low_byte, high_byte, ..] = value.to_le_bytes();
                if high { high_byte } else { low_byte }
            }
            // No channel requests, none has reached its end.
            Some(Port::Register(reg::COMMAND)) => 0,
            Some(Port::Register(reg::ALL_MASK)) => self.mask,
            // The temporary register.
            Some(Port::Register(reg::MASTER_CLEAR)) => 0,
            _ => FLOATING,
        }
    }

    fn write_port(&mut self, port: u16, value: u8) {
        let shift = self.shift();
        let register = match self.decode(port) {
            Some(Port::Register(n)) => n,
            Some(Port::Page(n)) => {
                if let Some(channel) = self.channels.get_mut(n) {
                    channel.page = value;
                }
                return;
            }
            None => return,
        };
        match register {
            0..=7 => {
                let high = self.flip_flop;
                self.flip_flop = !high;
                let Some(channel) = self.channels.get_mut(usize::from(register >> 1)) else {
                    return;
                };
                let base = &mut channel.base[usize::from(register & 1)];
                if high {
                    *base = (*base & 0x00ff) | (u16::from(value) << 8);
                    channel.now = [i32::from(channel.base[0]) << shift, 0];
                } else {
                    *base = (*base & 0xff00) | u16::from(value);
                }
            }
            reg::COMMAND => self.command = value,
            // A request by software moves nothing here.
            reg::REQUEST => {}
            reg::SINGLE_MASK => {
                let bit = 1 << (value & 3);
                self.mask = if value & 4 != 0 { self.mask | bit } else { self.mask & !bit };
            }
            reg::MODE => {
                if let Some(channel) = self.channels.get_mut(usize::from(value & 3)) {
                    channel.mode = value & !3;
                }
            }
            reg::CLEAR_FLIP_FLOP => self.flip_flop = false,
            reg::MASTER_CLEAR => {
                self.flip_flop = false;
                self.mask = 0xff;
                self.command = 0;
            }
            reg::CLEAR_MASK => self.mask = 0,
            reg::ALL_MASK => self.mask = value,
            _ => {}
        }
    }
}

enum Port {
    Register(u16),
    Page(usize),
}

byte_ports!(Dma);

impl Device for Dma {
    fn reset(&mut self) {
        *self = Self::new(self.which);
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

/// Section `dma` v1, instance 0 or 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmaState {
    command: u8,
    mask: u8,
    flip_flop: u8,
    dshift: i32,
    regs: [ChannelState; 4],
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "dma_regs")]
struct ChannelState {
    now: [i32; 2],
    base: [u16; 2],
    mode: u8,
    page: u8,
    pageh: u8,
    dack: u8,
    eop: u8,
}

impl VmState for DmaState {
    const VERSION: u32 = 1;
}

impl Migratable for Dma {
    type State = DmaState;

    fn save(&self, _: Audience) -> Result<DmaState, FieldError> {
        Ok(DmaState {
            command: self.command,
            mask: self.mask,
            flip_flop: self.flip_flop.into(),
            dshift: self.shift() as i32,
            regs: self.channels.clone().map(|c| {
                let Channel { now, base, mode, page, pageh, dack, eop } = c;
                ChannelState { now, base, mode, page, pageh, dack, eop }
            }),
        })
    }

    fn check(&self, state: &DmaState) -> Result<(), FieldError> {
        let shift = self.shift() as i32;
        if state.dshift != shift {
            return Err(FieldError::new("dshift", shift, state.dshift));
        }
        Ok(())
    }

    fn restore(&mut self, state: DmaState) -> Result<(), FieldError> {
        self.command = state.command;
        self.mask = state.mask;
        self.flip_flop = state.flip_flop != 0;
        self.channels = state.regs.map(|c| {
            let ChannelState { now, base, mode, page, pageh, dack, eop } = c;
            Channel { now, base, mode, page, pageh, dack, eop }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_counts_pass_byte_by_byte() {
        let mut dma = Dma::new(Which::First);
        for (port, value) in [(0x0c, 0), (0x04, 0x34), (0x04, 0x12), (0x05, 0xff), (0x05, 0x01)] {
            dma.write_port(port, value);
        }
        let read = [0x04, 0x04, 0x05, 0x05].map(|port| dma.read_port(port));
        assert_eq!(read, [0x34, 0x12, 0xff, 0x01]);
    }

    #[test]
    fn the_second_controllers_ports_are_two_apart() {
        let mut dma = Dma::new(Which::Second);
        for (port, value) in [(0xc4, 0x78), (0xc4, 0x56), (0xd6, 0xc1), (0x8b, 0x9a)] {
            dma.write_port(port, value);
        }
        assert_eq!([0xc4, 0xc4, 0x8b].map(|port| dma.read_port(port)), [0x78, 0x56, 0x9a]);
        assert_eq!(dma.channels[1].mode, 0xc0);
        assert_eq!(dma.channels[1].now[0], 0x5678 << 1);
    }

    #[test]
    fn masks() {
        let mut dma = Dma::new(Which::First);
        dma.write_port(0x0a, 0x02);
        assert_eq!(dma.read_port(0x0f), 0xfb);
        dma.write_port(0x0e, 0);
        dma.write_port(0x0a, 0x07);
        assert_eq!(dma.read_port(0x0f), 0x08);
        dma.write_port(0x08, 0x10);
        dma.write_port(0x0d, 0);
        assert_eq!((dma.read_port(0x0f), dma.command), (0xff, 0));
        assert_eq!(dma.read_port(0x08), 0);
    }

    #[test]
    fn state_travels_whole() {
        let channel = |n: u8| ChannelState {
            now: [i32::from(n) << 20, -i32::from(n)],
            base: [u16::from(n) << 8, u16::from(n) + 1],
            mode: n + 2,
            page: n + 3,
            pageh: n + 4,
            dack: n + 5,
            eop: n + 6,
        };
        let sent = DmaState {
            command: 1,
            mask: 2,
            flip_flop: 1,
            dshift: 1,
            regs: [channel(10), channel(30), channel(50), channel(70)],
        };
        let mut dma = Dma::new(Which::Second);
        dma.check(&sent).unwrap();
        dma.restore(sent.clone()).unwrap();
        assert_eq!(dma.save(Audience::Qemu).unwrap(), sent);
        assert_eq!(Dma::new(Which::First).check(&sent).unwrap_err().field, "dshift");
    }
}
