//! The keyboard controller: an Intel 8042 at ports 0x60 and 0x64, with a keyboard on IRQ 1 and a
//! mouse on IRQ 12.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ps2::{Keyboard, Mouse, Ps2Port};
use super::{FLOATING, byte_ports};
use crate::device::{Device, PowerControl, PowerRequest};
use crate::irq::IrqLine;

mod state;

pub use state::I8042State;

/// Data.
pub const DATA_PORT: u16 = 0x60;
/// Status (read) and command (write).
pub const COMMAND_PORT: u16 = 0x64;

/// The status register.
mod status {
    pub(super) const OUTPUT_FULL: u8 = 1 << 0;
    pub(super) const SELF_TESTED: u8 = 1 << 2;
    pub(super) const COMMAND: u8 = 1 << 3;
    pub(super) const UNLOCKED: u8 = 1 << 4;
    /// What is in the output buffer comes from the mouse.
    pub(super) const MOUSE_OUTPUT: u8 = 1 << 5;
}

/// The command byte (byte 0 of the controller's memory).
mod mode {
    pub(super) const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub(super) const MOUSE_INTERRUPT: u8 = 1 << 1;
    pub(super) const DISABLE_KEYBOARD: u8 = 1 << 4;
    pub(super) const DISABLE_MOUSE: u8 = 1 << 5;
    pub(super) const TRANSLATE: u8 = 1 << 6;
}

/// The output port.
mod outport {
    pub(super) const RESET_OFF: u8 = 1 << 0;
    pub(super) const A20: u8 = 1 << 1;
    /// After power-on: no reset, A20 open, the bits without a meaning high.
    pub(super) const DEFAULT: u8 = 0xcf;
}

/// Commands of the controller.
mod command {
    pub(super) const READ_MODE: u8 = 0x20;
    pub(super) const WRITE_MODE: u8 = 0x60;
    pub(super) const DISABLE_MOUSE: u8 = 0xa7;
    pub(super) const ENABLE_MOUSE: u8 = 0xa8;
    pub(super) const TEST_MOUSE: u8 = 0xa9;
    pub(super) const SELF_TEST: u8 = 0xaa;
    pub(super) const TEST_KEYBOARD: u8 = 0xab;
    pub(super) const DISABLE_KEYBOARD: u8 = 0xad;
    pub(super) const ENABLE_KEYBOARD: u8 = 0xae;
    pub(super) const READ_INPUT_PORT: u8 = 0xc0;
    pub(super) const READ_OUTPORT: u8 = 0xd0;
    pub(super) const WRITE_OUTPORT: u8 = 0xd1;
    pub(super) const WRITE_KEYBOARD_OUTPUT: u8 = 0xd2;
    pub(super) const WRITE_MOUSE_OUTPUT: u8 = 0xd3;
    pub(super) const WRITE_MOUSE: u8 = 0xd4;
    pub(super) const DISABLE_A20: u8 = 0xdd;
    pub(super) const ENABLE_A20: u8 = 0xdf;
    /// From here on: pulse the output port's low bits that are 0 in the command.
    pub(super) const PULSE: u8 = 0xf0;
}

/// Where the byte in the output buffer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Keyboard,
    Mouse,
    /// The controller itself, in the keyboard's name or the mouse's.
    Controller,
}

/// The controller. Keyboard and mouse are devices (and sections) of their own; only the controller
/// locks them.
pub struct I8042 {
    keyboard: Arc<Mutex<Keyboard>>,
    mouse: Arc<Mutex<Mouse>>,
    keyboard_irq: Arc<dyn IrqLine>,
    mouse_irq: Arc<dyn IrqLine>,
    power: Arc<dyn PowerControl>,
    regs: Registers,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Registers {
    /// The command whose argument comes next; 0 for none.
    write_cmd: u8,
    status: u8,
    mode: u8,
    outport: u8,
    obdata: u8,
    source: Option<Source>,
    /// The controller's own answer, waiting for the output buffer.
    reply: Option<Reply>,
    /// The last answer; QEMU keeps it, so it is carried.
    cbdata: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    AsKeyboard(u8),
    AsMouse(u8),
}

impl Registers {
    fn new() -> Self {
        Self {
            write_cmd: 0,
            status: status::COMMAND | status::UNLOCKED,
            mode: mode::KEYBOARD_INTERRUPT | mode::MOUSE_INTERRUPT,
            outport: outport::DEFAULT,
            obdata: 0,
            source: None,
            reply: None,
            cbdata: 0,
        }
    }
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl I8042 {
    /// A controller after power-on. `keyboard_irq` is ISA IRQ 1, `mouse_irq` 12.
    pub fn new(
        keyboard: Arc<Mutex<Keyboard>>,
        mouse: Arc<Mutex<Mouse>>,
        keyboard_irq: Arc<dyn IrqLine>,
        mouse_irq: Arc<dyn IrqLine>,
        power: Arc<dyn PowerControl>,
    ) -> Self {
        Self { keyboard, mouse, keyboard_irq, mouse_irq, power, regs: Registers::new() }
    }

    /// Moves the next byte into the output buffer if that is free, and drives the lines.
    fn update(&mut self) {
        let regs = &mut self.regs;
        if regs.status & status::OUTPUT_FULL == 0 {
            let enabled = |bit| regs.mode & bit == 0;
            let next = if let Some(reply) = regs.reply.take() {
                Some(match reply {
                    Reply::AsKeyboard(byte) => (byte, Source::Controller, 0),
                    Reply::AsMouse(byte) => (byte, Source::Controller, status::MOUSE_OUTPUT),
                })
            } else if enabled(mode::DISABLE_KEYBOARD)
                && let Some(byte) = lock(&self.keyboard).take()
            {
                Some((byte, Source::Keyboard, 0))
            } else if enabled(mode::DISABLE_MOUSE)
                && let Some(byte) = lock(&self.mouse).take()
            {
                Some((byte, Source::Mouse, status::MOUSE_OUTPUT))
            } else {
                None
            };
            if let Some((byte, source, flag)) = next {
                regs.obdata = byte;
                regs.source = Some(source);
                regs.status |= status::OUTPUT_FULL | flag;
            }
        }
        self.drive_lines();
    }

    fn drive_lines(&self) {
        let (status, mode) = (self.regs.status, self.regs.mode);
        let full = status & status::OUTPUT_FULL != 0;
        let from_mouse = status & status::MOUSE_OUTPUT != 0;
        self.keyboard_irq.set_level(full && !from_mouse && mode & mode::KEYBOARD_INTERRUPT != 0);
        self.mouse_irq.set_level(full && from_mouse && mode & mode::MOUSE_INTERRUPT != 0);
    }

    fn reply(&mut self, reply: Reply) {
        let (Reply::AsKeyboard(byte) | Reply::AsMouse(byte)) = reply;
        self.regs.cbdata = byte;
        self.regs.reply = Some(reply);
    }

    fn set_outport(&mut self, value: u8) {
        self.regs.outport = value;
        if value & outport::RESET_OFF == 0 {
            self.power.request(PowerRequest::Reset);
        }
    }

    fn read_port(&mut self, port: u16) -> u8 {
        match port {
            DATA_PORT => {
                // An empty buffer reads as what was in it last.
                let value = self.regs.obdata;
                if self.regs.status & status::OUTPUT_FULL != 0 {
                    self.regs.status &= !(status::OUTPUT_FULL | status::MOUSE_OUTPUT);
                    // The line drops even if the next byte raises it again: it is an edge that
                    // the interrupt controller waits for.
                    self.drive_lines();
                    self.update();
                }
                value
            }
            COMMAND_PORT => self.regs.status,
            _ => FLOATING,
        }
    }

    fn write_port(&mut self, port: u16, value: u8) {
        match port {
            DATA_PORT => self.write_data(value),
            COMMAND_PORT => self.write_command(value),
            _ => return,
        }
        self.update();
    }

    fn write_command(&mut self, value: u8) {
        match value {
            command::READ_MODE => self.reply(Reply::AsKeyboard(self.regs.mode)),
            command::WRITE_MODE
            | command::WRITE_OUTPORT
            | command::WRITE_KEYBOARD_OUTPUT
            | command::WRITE_MOUSE_OUTPUT
            | command::WRITE_MOUSE => self.regs.write_cmd = value,
            command::DISABLE_MOUSE => self.regs.mode |= mode::DISABLE_MOUSE,
            command::ENABLE_MOUSE => self.regs.mode &= !mode::DISABLE_MOUSE,
            command::DISABLE_KEYBOARD => self.regs.mode |= mode::DISABLE_KEYBOARD,
            command::ENABLE_KEYBOARD => self.regs.mode &= !mode::DISABLE_KEYBOARD,
            // Both lines are neither stuck low nor high.
            command::TEST_MOUSE | command::TEST_KEYBOARD => self.reply(Reply::AsKeyboard(0x00)),
            command::SELF_TEST => {
                self.regs.status |= status::SELF_TESTED;
                self.reply(Reply::AsKeyboard(0x55));
            }
            // Bit 7: the keyboard is not locked.
            command::READ_INPUT_PORT => self.reply(Reply::AsKeyboard(0x80)),
            command::READ_OUTPORT => self.reply(Reply::AsKeyboard(self.regs.outport)),
            command::DISABLE_A20 => self.regs.outport &= !outport::A20,
            command::ENABLE_A20 => self.regs.outport |= outport::A20,
            command::PULSE.. => {
                if value & outport::RESET_OFF == 0 {
                    self.power.request(PowerRequest::Reset);
                }
            }
            _ => tracing::debug!(command = value, "keyboard controller: unknown command"),
        }
    }

    fn write_data(&mut self, value: u8) {
        match std::mem::take(&mut self.regs.write_cmd) {
            command::WRITE_MODE => {
                self.regs.mode = value;
                lock(&self.keyboard).set_translate(value & mode::TRANSLATE != 0);
            }
            command::WRITE_OUTPORT => self.set_outport(value),
            command::WRITE_KEYBOARD_OUTPUT => self.reply(Reply::AsKeyboard(value)),
            command::WRITE_MOUSE_OUTPUT => self.reply(Reply::AsMouse(value)),
            command::WRITE_MOUSE => {
                lock(&self.mouse).send(value);
                // Talking to a device enables it.
                self.regs.mode &= !mode::DISABLE_MOUSE;
            }
            _ => {
                lock(&self.keyboard).send(value);
                self.regs.mode &= !mode::DISABLE_KEYBOARD;
            }
        }
    }
}

byte_ports!(I8042);

impl Device for I8042 {
    /// Keyboard and mouse are reset on their own.
    fn reset(&mut self) {
        self.regs = Registers::new();
        self.drive_lines();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

#[cfg(test)]
mod tests;
