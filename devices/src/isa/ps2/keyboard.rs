//! An MF2 keyboard without anybody at it.

use migration::vmstate::{Audience, FieldError, Migratable, VmState};
use serde::{Deserialize, Serialize};

use super::queue::{Channel, ChannelState};
use super::{ACK, Ps2Port, RESEND, TEST_PASSED};
use crate::device::Device;

/// Commands of the IBM PS/2 keyboard.
mod command {
    pub(super) const SET_LEDS: u8 = 0xed;
    pub(super) const ECHO: u8 = 0xee;
    pub(super) const SCANCODE_SET: u8 = 0xf0;
    pub(super) const IDENTIFY: u8 = 0xf2;
    pub(super) const SET_RATE: u8 = 0xf3;
    pub(super) const ENABLE: u8 = 0xf4;
    pub(super) const DISABLE: u8 = 0xf5;
    pub(super) const DEFAULTS: u8 = 0xf6;
    pub(super) const MAKE_BREAK_FIRST: u8 = 0xf7;
    pub(super) const MAKE_BREAK_LAST: u8 = 0xfa;
    pub(super) const RESET: u8 = 0xff;
}

/// The keyboard.
#[derive(Debug)]
pub struct Keyboard {
    channel: Channel,
    scan_enabled: bool,
    /// The controller turns set 2 into set 1 on the way (its mode bit 6).
    translate: bool,
    scancode_set: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self { channel: Channel::default(), scan_enabled: true, translate: false, scancode_set: 2 }
    }
}

impl Keyboard {
    /// A keyboard after power-on.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the controller translates scan codes.
    pub(crate) fn set_translate(&mut self, on: bool) {
        self.translate = on;
    }

    fn defaults(&mut self) {
        self.scan_enabled = true;
        self.scancode_set = 2;
    }

    fn argument(&mut self, command: u8, byte: u8) {
        let reply = match (command, byte) {
            (command::SCANCODE_SET, 0) => {
                // Translation applies to this answer too.
                let set = match (self.scancode_set, self.translate) {
                    (1, true) => 0x43,
                    (2, true) => 0x41,
                    (3, true) => 0x3f,
                    (set, _) => set,
                };
                return self.channel.answer(&[ACK, set]);
            }
            (command::SCANCODE_SET, 1..=3) => {
                self.scancode_set = byte;
                ACK
            }
            (command::SCANCODE_SET, _) => RESEND,
            _ => ACK,
        };
        self.channel.answer(&[reply]);
    }
}

impl Ps2Port for Keyboard {
    fn send(&mut self, byte: u8) {
        if let Some(command) = self.channel.command.take() {
            return self.argument(command, byte);
        }
        match byte {
            command::SET_LEDS | command::SCANCODE_SET | command::SET_RATE => {
                self.channel.command = Some(byte);
                self.channel.answer(&[ACK]);
            }
            command::ECHO => self.channel.answer(&[command::ECHO]),
            command::IDENTIFY => {
                // 0xab83, of which the controller's translation makes 0xab41.
                let id = if self.translate { 0x41 } else { 0x83 };
                self.channel.answer(&[ACK, 0xab, id]);
            }
            command::ENABLE => {
                self.scan_enabled = true;
                self.channel.answer(&[ACK]);
            }
            command::DISABLE => {
                self.defaults();
                self.scan_enabled = false;
                self.channel.answer(&[ACK]);
            }
            command::DEFAULTS => {
                self.defaults();
                self.channel.answer(&[ACK]);
            }
            command::MAKE_BREAK_FIRST..=command::MAKE_BREAK_LAST => self.channel.answer(&[ACK]),
            command::RESET => {
                self.channel.clear();
                self.defaults();
                self.channel.answer(&[ACK, TEST_PASSED]);
            }
            _ => self.channel.answer(&[RESEND]),
        }
    }

    fn take(&mut self) -> Option<u8> {
        self.channel.take()
    }

    fn has_data(&self) -> bool {
        self.channel.has_data()
    }
}

impl Device for Keyboard {
    fn reset(&mut self) {
        *self = Self::default();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

/// Section `ps2kbd` v3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyboardState {
    parent_obj: ChannelState,
    scan_enabled: i32,
    translate: i32,
    scancode_set: i32,
}

impl VmState for KeyboardState {
    const VERSION: u32 = 3;
}

impl Migratable for Keyboard {
    type State = KeyboardState;

    fn save(&self, _: Audience) -> Result<KeyboardState, FieldError> {
        Ok(KeyboardState {
            parent_obj: self.channel.save(),
            scan_enabled: self.scan_enabled.into(),
            translate: self.translate.into(),
            scancode_set: self.scancode_set.into(),
        })
    }

    fn check(&self, state: &KeyboardState) -> Result<(), FieldError> {
        state.parent_obj.check()?;
        // 0 is what the earliest sections stand for.
        if !(0..=3).contains(&state.scancode_set) {
            return Err(FieldError::new("scancode_set", "0 to 3", state.scancode_set));
        }
        Ok(())
    }

    fn restore(&mut self, state: KeyboardState) -> Result<(), FieldError> {
        self.channel.restore(&state.parent_obj);
        self.scan_enabled = state.scan_enabled != 0;
        self.translate = state.translate != 0;
        self.scancode_set = u8::try_from(state.scancode_set).unwrap_or(2);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::queue::{full_state, full_state_turned};
    use super::*;

    fn exchange(keyboard: &mut Keyboard, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().for_each(|byte| keyboard.send(*byte));
        std::iter::from_fn(|| keyboard.take()).collect()
    }

    #[test]
    fn answers_a_driver() {
        let mut keyboard = Keyboard::new();
        assert_eq!(exchange(&mut keyboard, &[0xff]), [0xfa, 0xaa]);
        assert_eq!(exchange(&mut keyboard, &[0xf2]), [0xfa, 0xab, 0x83]);
        assert_eq!(exchange(&mut keyboard, &[0xed, 0x07]), [0xfa, 0xfa]);
        assert_eq!(exchange(&mut keyboard, &[0xf3, 0x00]), [0xfa, 0xfa]);
        assert_eq!(exchange(&mut keyboard, &[0xf0, 0x03]), [0xfa, 0xfa]);
        assert_eq!(exchange(&mut keyboard, &[0xf0, 0x00]), [0xfa, 0xfa, 0x03]);
        assert_eq!(exchange(&mut keyboard, &[0xf0, 0x09]), [0xfa, 0xfe]);
        assert_eq!(exchange(&mut keyboard, &[0xee]), [0xee]);
        assert_eq!(exchange(&mut keyboard, &[0xf4]), [0xfa]);
        assert_eq!(exchange(&mut keyboard, &[0x00]), [0xfe]);
        keyboard.set_translate(true);
        assert_eq!(exchange(&mut keyboard, &[0xf2]), [0xfa, 0xab, 0x41]);
    }

    #[test]
    fn state_travels_whole() {
        let sent = KeyboardState {
            parent_obj: full_state(),
            scan_enabled: 0,
            translate: 1,
            scancode_set: 3,
        };
        let mut keyboard = Keyboard::new();
        keyboard.check(&sent).unwrap();
        keyboard.restore(sent.clone()).unwrap();
        let expected = KeyboardState { parent_obj: full_state_turned(), ..sent };
        assert_eq!(keyboard.save(Audience::Qemu).unwrap(), expected);
        assert_eq!(exchange(&mut keyboard, &[1]), *b"abc\xfa", "1 is the rate it waits for");
    }

    #[test]
    fn bad_state_is_named() {
        let keyboard = Keyboard::new();
        let mut state = keyboard.save(Audience::Qemu).unwrap();
        state.scancode_set = 4;
        assert_eq!(keyboard.check(&state).unwrap_err().field, "scancode_set");
        state.parent_obj.count = -1;
        assert_eq!(keyboard.check(&state).unwrap_err().field, "queue.count");
    }
}
