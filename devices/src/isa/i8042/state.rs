//! Section `pckbd` v3.

use migration::vmstate::{Audience, FieldError, Migratable, VmState};
use serde::{Deserialize, Serialize};

use super::super::ps2::Ps2Port;
use super::{I8042, Registers, Reply, Source, lock, outport, status};

/// Section `pckbd` v3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    pub(super) kbd: Controller,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "pckbd@3")]
pub(super) struct Controller {
    pub(super) write_cmd: u8,
    pub(super) status: u8,
    pub(super) mode: u8,
    /// What waits for the output buffer: see [`pending`].
    pub(super) pending_tmp: u8,
    pub(super) subsections: Subsections,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub(super) struct Subsections {
    #[serde(rename = "pckbd_outport")]
    pub(super) outport: Option<Outport>,
    #[serde(rename = "pckbd/extended_state@0")]
    pub(super) extended_state: Option<ExtendedState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Outport {
    pub(super) outport: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ExtendedState {
    /// Bit 0: a timer was running that slows the keyboard down. Here there is none.
    pub(super) migration_flags: u32,
    pub(super) obsrc: u32,
    pub(super) obdata: u8,
    pub(super) cbdata: u8,
}

/// Bits of `pending_tmp`.
pub(super) mod pending {
    pub(in super::super) const REPLY_AS_KEYBOARD: u8 = 1 << 2;
    pub(in super::super) const REPLY_AS_MOUSE: u8 = 1 << 3;
    pub(in super::super) const KEYBOARD: u8 = 1 << 4;
    pub(in super::super) const MOUSE: u8 = 1 << 5;
}

/// Values of `obsrc`.
mod obsrc {
    pub(super) const KEYBOARD: u32 = 1;
    pub(super) const MOUSE: u32 = 2;
    pub(super) const CONTROLLER: u32 = 4;
}

impl VmState for I8042State {
    const VERSION: u32 = 3;
}

impl Migratable for I8042 {
    type State = I8042State;

    fn save(&self, _: Audience) -> Result<I8042State, FieldError> {
        let regs = &self.regs;
        let mut pending_tmp = match regs.reply {
            Some(Reply::AsKeyboard(_)) => pending::REPLY_AS_KEYBOARD,
            Some(Reply::AsMouse(_)) => pending::REPLY_AS_MOUSE,
            None => 0,
        };
        if lock(&self.keyboard).has_data() {
            pending_tmp |= pending::KEYBOARD;
        }
        if lock(&self.mouse).has_data() {
            pending_tmp |= pending::MOUSE;
        }
        let obsrc = match regs.source {
            None => 0,
            Some(Source::Keyboard) => obsrc::KEYBOARD,
            Some(Source::Mouse) => obsrc::MOUSE,
            Some(Source::Controller) => obsrc::CONTROLLER,
        };
        let outport =
            (regs.outport != outport::DEFAULT).then_some(Outport { outport: regs.outport });
        Ok(I8042State {
            kbd: Controller {
                write_cmd: regs.write_cmd,
                status: regs.status,
                mode: regs.mode,
                pending_tmp,
                subsections: Subsections {
                    outport,
                    extended_state: Some(ExtendedState {
                        migration_flags: 0,
                        obsrc,
                        obdata: regs.obdata,
                        cbdata: regs.cbdata,
                    }),
                },
            },
        })
    }

    fn check(&self, state: &I8042State) -> Result<(), FieldError> {
        let known = [0, obsrc::KEYBOARD, obsrc::MOUSE, obsrc::CONTROLLER];
        match &state.kbd.subsections.extended_state {
            Some(extended) if !known.contains(&extended.obsrc) => {
                Err(FieldError::new("obsrc", "0, 1, 2 or 4", extended.obsrc))
            }
            _ => Ok(()),
        }
    }

    fn restore(&mut self, state: I8042State) -> Result<(), FieldError> {
        let kbd = state.kbd;
        let extended = kbd.subsections.extended_state;
        let cbdata = extended.as_ref().map_or(0, |e| e.cbdata);
        let reply = if kbd.pending_tmp & pending::REPLY_AS_KEYBOARD != 0 {
            Some(Reply::AsKeyboard(cbdata))
        } else if kbd.pending_tmp & pending::REPLY_AS_MOUSE != 0 {
            Some(Reply::AsMouse(cbdata))
        } else {
            None
        };
        self.regs = Registers {
            write_cmd: kbd.write_cmd,
            status: kbd.status,
            mode: kbd.mode,
            outport: kbd.subsections.outport.map_or(outport::DEFAULT, |sub| sub.outport),
            obdata: extended.as_ref().map_or(0, |e| e.obdata),
            source: match extended.as_ref().map_or(0, |e| e.obsrc) {
                obsrc::KEYBOARD => Some(Source::Keyboard),
                obsrc::MOUSE => Some(Source::Mouse),
                obsrc::CONTROLLER => Some(Source::Controller),
                _ => None,
            },
            reply,
            cbdata,
        };
        // Without the extension, the byte in the buffer is still at the head of its queue.
        if extended.is_none() {
            self.regs.status &= !(status::OUTPUT_FULL | status::MOUSE_OUTPUT);
        }
        self.drive_lines();
        Ok(())
    }
}
