//! The serial port: a National PC16550D.
//!
//! Written here rather than taken from `vm-superio`, whose model has no transmitter state, no
//! FIFO control and no pending-interrupt latch: a port restored from it could lose the transmit
//! interrupt a driver waits for.
//!
//! The line is infinitely fast: what is written goes to the output at once and only stays in the
//! transmitter while the output takes nothing (`WouldBlock`); what is received reaches the
//! reader without the character time-out's wait, so that no timer is needed.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::sync::Arc;

use super::{FLOATING, byte_ports};
use crate::device::Device;
use crate::irq::IrqLine;

mod state;

pub use state::SerialState;

/// COM1's first port; its interrupt is ISA IRQ 4.
pub const COM1: u16 = 0x3f8;
/// How many ports a 16550 has.
pub const PORTS: u16 = 8;

/// Bytes in each FIFO.
const FIFO_SIZE: usize = 16;
/// 115200 / 12 = 9600 baud, the divisor after power-on.
const DEFAULT_DIVISOR: u16 = 12;

/// Interrupt Enable Register.
mod ier {
    pub(super) const RECEIVED_DATA: u8 = 1 << 0;
    pub(super) const TRANSMITTER_EMPTY: u8 = 1 << 1;
    pub(super) const LINE_STATUS: u8 = 1 << 2;
    pub(super) const MODEM_STATUS: u8 = 1 << 3;
    pub(super) const ALL: u8 = 0x0f;
}

/// Interrupt Identification Register, table 4 of the data sheet, highest priority first.
mod iir {
    pub(super) const LINE_STATUS: u8 = 0x06;
    pub(super) const RECEIVED_DATA: u8 = 0x04;
    pub(super) const CHARACTER_TIMEOUT: u8 = 0x0c;
    pub(super) const TRANSMITTER_EMPTY: u8 = 0x02;
    pub(super) const MODEM_STATUS: u8 = 0x00;
    pub(super) const NONE: u8 = 0x01;
    pub(super) const ID: u8 = 0x0f;
    pub(super) const FIFOS_ENABLED: u8 = 0xc0;
}

/// FIFO Control Register.
mod fcr {
    pub(super) const ENABLE: u8 = 1 << 0;
    pub(super) const CLEAR_RECEIVER: u8 = 1 << 1;
    pub(super) const CLEAR_TRANSMITTER: u8 = 1 << 2;
    /// The bits that stay: enable, DMA mode, trigger level.
    pub(super) const KEPT: u8 = 0xc9;
}

/// Line Control Register.
mod lcr {
    pub(super) const DLAB: u8 = 1 << 7;
}

/// Modem Control Register.
mod mcr {
    pub(super) const DTR: u8 = 1 << 0;
    pub(super) const RTS: u8 = 1 << 1;
    pub(super) const OUT1: u8 = 1 << 2;
    pub(super) const OUT2: u8 = 1 << 3;
    pub(super) const LOOPBACK: u8 = 1 << 4;
    pub(super) const ALL: u8 = 0x1f;
}

/// Line Status Register.
mod lsr {
    pub(super) const DATA_READY: u8 = 1 << 0;
    pub(super) const OVERRUN: u8 = 1 << 1;
    /// Overrun, parity, framing, break: cleared by reading the register.
    pub(super) const ERRORS: u8 = 0x1e;
    /// The transmitter holding register (or the FIFO) is empty.
    pub(super) const THR_EMPTY: u8 = 1 << 5;
    /// So is the shift register.
    pub(super) const TRANSMITTER_EMPTY: u8 = 1 << 6;
}

/// Modem Status Register.
mod msr {
    pub(super) const CTS: u8 = 1 << 4;
    pub(super) const DSR: u8 = 1 << 5;
    pub(super) const RI: u8 = 1 << 6;
    pub(super) const DCD: u8 = 1 << 7;
    /// The four change bits, cleared by reading the register.
    pub(super) const DELTAS: u8 = 0x0f;
}

/// A 16550A at a fixed place.
pub struct SerialPort {
    base: u16,
    irq: Arc<dyn IrqLine>,
    output: Box<dyn Write + Send>,
    room_again: Option<Box<dyn Fn() + Send>>,
    paused: bool,
    regs: Registers,
}

/// What a reset resets.
struct Registers {
    divisor: u16,
    /// The receiver's only byte when the FIFOs are off.
    rbr: u8,
    ier: u8,
    iir: u8,
    lcr: u8,
    mcr: u8,
    lsr: u8,
    msr: u8,
    scr: u8,
    fcr: u8,
    /// The transmitter became empty, and nobody has been told.
    thr_interrupt: bool,
    /// The byte that the output did not take yet.
    shift: Option<u8>,
    /// The transmitter's only byte when the FIFOs are off; waiting while THR_EMPTY is clear.
    thr: u8,
    received: VecDeque<u8>,
    to_send: VecDeque<u8>,
}

impl Registers {
    fn new() -> Self {
        Self {
            divisor: DEFAULT_DIVISOR,
            rbr: 0,
            ier: 0,
            iir: iir::NONE,
            lcr: 0,
            mcr: mcr::OUT2,
            lsr: lsr::THR_EMPTY | lsr::TRANSMITTER_EMPTY,
            msr: msr::DCD | msr::DSR | msr::CTS,
            scr: 0,
            fcr: 0,
            thr_interrupt: false,
            shift: None,
            thr: 0,
            received: VecDeque::with_capacity(FIFO_SIZE),
            to_send: VecDeque::with_capacity(FIFO_SIZE),
        }
    }

    fn fifos(&self) -> bool {
        self.fcr & fcr::ENABLE != 0
    }

    fn divisor_latch(&self) -> bool {
        self.lcr & lcr::DLAB != 0
    }

    fn loopback(&self) -> bool {
        self.mcr & mcr::LOOPBACK != 0
    }

    /// How many bytes the FIFO holds before "received data" is signalled.
    fn trigger(&self) -> usize {
        match self.fcr >> 6 {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    /// How many bytes can be received now without loss.
    fn room(&self) -> usize {
        if self.fifos() {
            FIFO_SIZE.saturating_sub(self.received.len())
        } else {
            usize::from(self.lsr & lsr::DATA_READY == 0)
        }
    }

    fn push_received(&mut self, byte: u8) {
        if self.room() == 0 {
            self.lsr |= lsr::OVERRUN;
            if self.fifos() {
                return;
            }
        }
        if self.fifos() {
            self.received.push_back(byte);
        } else {
            self.rbr = byte;
        }
        self.lsr |= lsr::DATA_READY;
    }

    fn pop_received(&mut self) -> u8 {
        if self.fifos() {
            let byte = self.received.pop_front().unwrap_or(0);
            if self.received.is_empty() {
                self.lsr &= !lsr::DATA_READY;
            }
            byte
        } else {
            self.lsr &= !lsr::DATA_READY;
            self.rbr
        }
    }

    fn clear_receiver(&mut self) {
        self.received.clear();
        self.lsr &= !lsr::DATA_READY;
    }

    /// Takes the next byte out of the holding register or FIFO.
    fn next_to_send(&mut self) -> Option<u8> {
        if self.lsr & lsr::THR_EMPTY != 0 {
            return None;
        }
        let byte = if self.fifos() { self.to_send.pop_front() } else { Some(self.thr) };
        if self.to_send.is_empty() {
            self.lsr |= lsr::THR_EMPTY;
            self.thr_interrupt = true;
        }
        byte
    }

    /// The interrupt identification that follows from everything else.
    fn pending_interrupt(&self) -> u8 {
        let enabled = |bit| self.ier & bit != 0;
        if enabled(ier::LINE_STATUS) && self.lsr & lsr::ERRORS != 0 {
            iir::LINE_STATUS
        } else if enabled(ier::RECEIVED_DATA) && self.lsr & lsr::DATA_READY != 0 {
            if self.fifos() && self.received.len() < self.trigger() {
                iir::CHARACTER_TIMEOUT
            } else {
                iir::RECEIVED_DATA
            }
        } else if enabled(ier::TRANSMITTER_EMPTY) && self.thr_interrupt {
            iir::TRANSMITTER_EMPTY
        } else if enabled(ier::MODEM_STATUS) && self.msr & msr::DELTAS != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    /// In loopback the four outputs come back as the four inputs.
    fn modem_status(&self) -> u8 {
        if !self.loopback() {
            return self.msr;
        }
        [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)]
            .into_iter()
            .filter(|(output, _)| self.mcr & output != 0)
            .fold(self.msr & msr::DELTAS, |status, (_, input)| status | input)
    }
}

impl SerialPort {
    /// A port at `base` whose sent bytes go to `output`, which must not buffer. An output that answers `WouldBlock` holds
    /// the transmitter up until [`flush_output`](Self::flush_output); one that fails otherwise
    /// loses the byte, as a cable that was pulled out does.
    pub fn new(base: u16, irq: Arc<dyn IrqLine>, output: Box<dyn Write + Send>) -> Self {
        Self { base, irq, output, room_again: None, paused: false, regs: Registers::new() }
    }

    /// `f` is called, with the port locked, when a full receiver has room again.
    pub fn on_room(&mut self, f: Box<dyn Fn() + Send>) {
        self.room_again = Some(f);
    }

    /// Whether [`receive`](Self::receive) would take a byte now.
    pub fn wants_input(&self) -> bool {
        !self.paused && !self.regs.loopback() && self.regs.room() > 0
    }

    /// Bytes from the other end of the line. Takes as many as the receiver has room for, and says
    /// how many that were.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        if !self.wants_input() {
            return 0;
        }
        let taken = bytes.len().min(self.regs.room());
        for byte in bytes.iter().take(taken) {
            self.regs.push_received(*byte);
        }
        self.update_irq();
        taken
    }

    /// Whether the output has held the transmitter up: wait until it is writable, then
    /// [`flush_output`](Self::flush_output).
    pub fn has_pending_output(&self) -> bool {
        self.regs.shift.is_some()
    }

    /// Tries again to send what the output did not take.
    pub fn flush_output(&mut self) {
        if !self.paused {
            self.transmit();
            self.update_irq();
        }
    }

    fn transmit(&mut self) {
        while let Some(byte) = self.regs.shift.take().or_else(|| self.regs.next_to_send()) {
            if self.regs.loopback() {
                self.regs.push_received(byte);
            } else if !self.send(byte) {
                self.regs.shift = Some(byte);
                return;
            }
        }
        self.regs.lsr |= lsr::TRANSMITTER_EMPTY;
    }

    /// False when the output takes nothing now.
    fn send(&mut self, byte: u8) -> bool {
        match self.output.write_all(&[byte]) {
            Ok(()) => true,
            Err(e) if e.kind() == ErrorKind::WouldBlock => false,
            Err(e) => {
                tracing::debug!(port = self.base, error = %e, "serial output lost");
                true
            }
        }
    }

    fn update_irq(&mut self) {
        let id = self.regs.pending_interrupt();
        self.regs.iir = if self.regs.fifos() { id | iir::FIFOS_ENABLED } else { id };
        // A PC gates the line with OUT2; this board's wiring, like QEMU's, does not.
        self.irq.set_level(id != iir::NONE);
    }

    fn read_port(&mut self, port: u16) -> u8 {
        let value = match port.wrapping_sub(self.base) {
            0 if self.regs.divisor_latch() => self.regs.divisor.to_le_bytes()[0],
            0 => {
                let was_full = self.regs.room() == 0;
                let byte = self.regs.pop_received();
                if was_full && let Some(f) = &self.room_again {
                    f();
                }
                byte
            }
            1 if self.regs.divisor_latch() => self.regs.divisor.to_le_bytes()[1],
            1 => self.regs.ier,
            2 => {
                let value = self.regs.iir;
                if value & iir::ID == iir::TRANSMITTER_EMPTY {
                    self.regs.thr_interrupt = false;
                }
                value
            }
            3 => self.regs.lcr,
            4 => self.regs.mcr,
            5 => {
                let value = self.regs.lsr;
                self.regs.lsr &= !lsr::ERRORS;
                value
            }
            6 => {
                let value = self.regs.modem_status();
                self.regs.msr &= !msr::DELTAS;
                value
            }
            7 => self.regs.scr,
            _ => return FLOATING,
        };
        self.update_irq();
        value
    }

    fn write_port(&mut self, port: u16, value: u8) {
        match port.wrapping_sub(self.base) {
            0 if self.regs.divisor_latch() => {
                self.regs.divisor = (self.regs.divisor & 0xff00) | u16::from(value);
            }
            0 => self.write_thr(value),
            1 if self.regs.divisor_latch() => {
                self.regs.divisor = (self.regs.divisor & 0x00ff) | (u16::from(value) << 8);
            }
            1 => {
                let raised = value & !self.regs.ier;
                self.regs.ier = value & ier::ALL;
                if raised & ier::TRANSMITTER_EMPTY != 0 && self.regs.lsr & lsr::THR_EMPTY != 0 {
                    self.regs.thr_interrupt = true;
                }
            }
            2 => self.write_fcr(value),
            3 => self.regs.lcr = value,
            4 => {
                let could_receive = self.wants_input();
                self.regs.mcr = value & mcr::ALL;
                if !could_receive
                    && self.wants_input()
                    && let Some(f) = &self.room_again
                {
                    f();
                }
            }
            // The line and modem status registers are read-only.
            7 => self.regs.scr = value,
            _ => return,
        }
        self.update_irq();
    }

    fn write_thr(&mut self, value: u8) {
        let regs = &mut self.regs;
        if regs.fifos() {
            if regs.to_send.len() == FIFO_SIZE {
                regs.to_send.pop_back();
            }
            regs.to_send.push_back(value);
        } else {
            regs.thr = value;
        }
        regs.thr_interrupt = false;
        regs.lsr &= !(lsr::THR_EMPTY | lsr::TRANSMITTER_EMPTY);
        self.transmit();
    }

    fn write_fcr(&mut self, value: u8) {
        let regs = &mut self.regs;
        let was_full = regs.room() == 0;
        // Switching the FIFOs on or off empties them.
        let switched = (regs.fcr ^ value) & fcr::ENABLE != 0;
        if switched || value & fcr::CLEAR_RECEIVER != 0 {
            regs.clear_receiver();
        }
        if switched || value & fcr::CLEAR_TRANSMITTER != 0 {
            regs.to_send.clear();
            if regs.lsr & lsr::THR_EMPTY == 0 {
                regs.lsr |= lsr::THR_EMPTY;
                regs.thr_interrupt = true;
            }
        }
        regs.fcr = value & fcr::KEPT;
        if was_full
            && regs.room() > 0
            && let Some(f) = &self.room_again
        {
            f();
        }
    }
}

byte_ports!(SerialPort);

impl Device for SerialPort {
    fn reset(&mut self) {
        self.regs = Registers::new();
        self.update_irq();
        if let Some(f) = &self.room_again {
            f();
        }
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        self.flush_output();
        if let Some(f) = &self.room_again {
            f();
        }
    }
}

#[cfg(test)]
mod tests;
