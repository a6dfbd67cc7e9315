//! A PS/2 mouse without anybody at it.

use migration::vmstate::{Audience, FieldError, Migratable, VmState};
use serde::{Deserialize, Serialize};

use super::queue::{Channel, ChannelState};
use super::{ACK, Ps2Port, RESEND, TEST_PASSED};
use crate::device::Device;

/// Commands of the PS/2 mouse.
mod command {
    pub(super) const SCALE_1_1: u8 = 0xe6;
    pub(super) const SCALE_2_1: u8 = 0xe7;
    pub(super) const SET_RESOLUTION: u8 = 0xe8;
    pub(super) const STATUS: u8 = 0xe9;
    pub(super) const STREAM_MODE: u8 = 0xea;
    pub(super) const POLL: u8 = 0xeb;
    pub(super) const END_WRAP: u8 = 0xec;
    pub(super) const WRAP: u8 = 0xee;
    pub(super) const REMOTE_MODE: u8 = 0xf0;
    pub(super) const IDENTIFY: u8 = 0xf2;
    pub(super) const SET_RATE: u8 = 0xf3;
    pub(super) const ENABLE: u8 = 0xf4;
    pub(super) const DISABLE: u8 = 0xf5;
    pub(super) const DEFAULTS: u8 = 0xf6;
    pub(super) const RESET: u8 = 0xff;
}

/// The first byte of the status report.
mod status {
    pub(super) const SCALE_2_1: u8 = 1 << 4;
    pub(super) const ENABLED: u8 = 1 << 5;
    pub(super) const REMOTE: u8 = 1 << 6;
}

/// The wheel mouse's type; 0 is the plain one's.
const TYPE_WHEEL: u8 = 3;
/// The five-button wheel mouse's.
const TYPE_EXPLORER: u8 = 4;

/// The mouse.
#[derive(Debug, Default)]
pub struct Mouse {
    channel: Channel,
    status: u8,
    resolution: u8,
    sample_rate: u8,
    /// Wrap mode: what is sent comes back.
    wrap: bool,
    kind: u8,
    /// How far the sequence of sample rates has come that turns a plain mouse into a wheel mouse.
    detect_state: u8,
    moved: [i32; 3],
    buttons: u8,
}

impl Mouse {
    /// A mouse after power-on.
    pub fn new() -> Self {
        Self::default()
    }

    /// Samples per second and counts per millimetre as after power-on.
    fn defaults(&mut self) {
        self.sample_rate = 100;
        self.resolution = 2;
        self.status = 0;
    }

    /// Microsoft's sequence: rates 200, 100, 80 ask for a wheel, 200, 200, 80 for five buttons.
    fn set_rate(&mut self, rate: u8) {
        self.sample_rate = rate;
        let (next, kind) = match (self.detect_state, rate) {
            (1, 100) => (2, None),
            (1, 200) => (3, None),
            (2, 80) => (0, Some(TYPE_WHEEL)),
            (3, 80) => (0, Some(TYPE_EXPLORER)),
            (0, 200) => (1, None),
            _ => (0, None),
        };
        self.detect_state = next;
        self.kind = kind.unwrap_or(self.kind);
    }

    /// A movement report that says: nothing moved. Bit 3 is always set.
    fn report(&mut self) {
        let first = 0x08 | (self.buttons & 0x07);
        self.channel.answer(&[first, 0, 0]);
        if self.kind != 0 {
            self.channel.answer(&[0]);
        }
    }
}

impl Ps2Port for Mouse {
    fn send(&mut self, byte: u8) {
        match self.channel.command.take() {
            Some(command::SET_RATE) => {
                self.set_rate(byte);
                return self.channel.answer(&[ACK]);
            }
            Some(_) => {
                self.resolution = byte;
                return self.channel.answer(&[ACK]);
            }
            None => {}
        }
        if self.wrap && byte != command::RESET {
            if byte == command::END_WRAP {
                self.wrap = false;
                return self.channel.answer(&[ACK]);
            }
            return self.channel.answer(&[byte]);
        }
        match byte {
            command::SET_RESOLUTION | command::SET_RATE => self.channel.command = Some(byte),
            command::SCALE_1_1 => self.status &= !status::SCALE_2_1,
            command::SCALE_2_1 => self.status |= status::SCALE_2_1,
            command::STREAM_MODE => self.status &= !status::REMOTE,
            command::REMOTE_MODE => self.status |= status::REMOTE,
            command::WRAP => self.wrap = true,
            command::END_WRAP => {}
            command::ENABLE => self.status |= status::ENABLED,
            command::DISABLE => self.status &= !status::ENABLED,
            command::DEFAULTS => self.defaults(),
            command::STATUS => {
                return self.channel.answer(&[ACK, self.status, self.resolution, self.sample_rate]);
            }
            command::POLL => {
                self.channel.answer(&[ACK]);
                return self.report();
            }
            command::IDENTIFY => return self.channel.answer(&[ACK, self.kind]),
            command::RESET => {
                *self = Self::default();
                self.defaults();
                return self.channel.answer(&[ACK, TEST_PASSED, self.kind]);
            }
            _ => return self.channel.answer(&[RESEND]),
        }
        self.channel.answer(&[ACK]);
    }

    fn take(&mut self) -> Option<u8> {
        self.channel.take()
    }

    fn has_data(&self) -> bool {
        self.channel.has_data()
    }
}

impl Device for Mouse {
    fn reset(&mut self) {
        *self = Self::default();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

/// Section `ps2mouse` v2.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MouseState {
    parent_obj: ChannelState,
    mouse_status: u8,
    mouse_resolution: u8,
    mouse_sample_rate: u8,
    mouse_wrap: u8,
    mouse_type: u8,
    mouse_detect_state: u8,
    mouse_dx: i32,
    mouse_dy: i32,
    mouse_dz: i32,
    mouse_buttons: u8,
}

impl VmState for MouseState {
    const VERSION: u32 = 2;
}

impl Migratable for Mouse {
    type State = MouseState;

    fn save(&self, _: Audience) -> Result<MouseState, FieldError> {
        let [mouse_dx, mouse_dy, mouse_dz] = self.moved;
        Ok(MouseState {
            parent_obj: self.channel.save(),
            mouse_status: self.status,
            mouse_resolution: self.resolution,
            mouse_sample_rate: self.sample_rate,
            mouse_wrap: self.wrap.into(),
            mouse_type: self.kind,
            mouse_detect_state: self.detect_state,
            mouse_dx,
            mouse_dy,
            mouse_dz,
            mouse_buttons: self.buttons,
        })
    }

    fn check(&self, state: &MouseState) -> Result<(), FieldError> {
        state.parent_obj.check()?;
        if state.mouse_detect_state > 3 {
            return Err(FieldError::new("mouse_detect_state", "0 to 3", state.mouse_detect_state));
        }
        if ![0, TYPE_WHEEL, TYPE_EXPLORER].contains(&state.mouse_type) {
            return Err(FieldError::new("mouse_type", "0, 3 or 4", state.mouse_type));
        }
        Ok(())
    }

    fn restore(&mut self, state: MouseState) -> Result<(), FieldError> {
        self.channel.restore(&state.parent_obj);
        self.status = state.mouse_status;
        self.resolution = state.mouse_resolution;
        self.sample_rate = state.mouse_sample_rate;
        self.wrap = state.mouse_wrap != 0;
        self.kind = state.mouse_type;
        self.detect_state = state.mouse_detect_state;
        self.moved = [state.mouse_dx, state.mouse_dy, state.mouse_dz];
        self.buttons = state.mouse_buttons;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::queue::{full_state, full_state_turned};
    use super::*;

    fn exchange(mouse: &mut Mouse, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().for_each(|byte| mouse.send(*byte));
        std::iter::from_fn(|| mouse.take()).collect()
    }

    #[test]
    fn answers_a_driver() {
        let mut mouse = Mouse::new();
        assert_eq!(exchange(&mut mouse, &[0xff]), [0xfa, 0xaa, 0x00]);
        assert_eq!(exchange(&mut mouse, &[0xe9]), [0xfa, 0x00, 0x02, 100]);
        assert_eq!(exchange(&mut mouse, &[0xf4, 0xe7]), [0xfa, 0xfa]);
        assert_eq!(exchange(&mut mouse, &[0xe9]), [0xfa, 0x30, 0x02, 100]);
        assert_eq!(exchange(&mut mouse, &[0xeb]), [0xfa, 0x08, 0, 0]);
        assert_eq!(exchange(&mut mouse, &[0x01]), [0xfe]);
    }

    #[test]
    fn becomes_a_wheel_mouse_when_asked() {
        let mut mouse = Mouse::new();
        exchange(&mut mouse, &[0xf3, 200, 0xf3, 100, 0xf3, 80]);
        assert_eq!(exchange(&mut mouse, &[0xf2]), [0xfa, 3]);
        exchange(&mut mouse, &[0xf3, 200, 0xf3, 200, 0xf3, 80]);
        assert_eq!(exchange(&mut mouse, &[0xf2]), [0xfa, 4]);
        assert_eq!(exchange(&mut mouse, &[0xeb]), [0xfa, 0x08, 0, 0, 0]);
    }

    #[test]
    fn wraps_until_told_otherwise() {
        let mut mouse = Mouse::new();
        assert_eq!(
            exchange(&mut mouse, &[0xee, 0x55, 0xf4, 0xec, 0xf4]),
            [0xfa, 0x55, 0xf4, 0xfa, 0xfa]
        );
    }

    #[test]
    fn state_travels_whole() {
        let sent = MouseState {
            parent_obj: full_state(),
            mouse_status: 0x70,
            mouse_resolution: 3,
            mouse_sample_rate: 60,
            mouse_wrap: 1,
            mouse_type: 4,
            mouse_detect_state: 2,
            mouse_dx: -5,
            mouse_dy: 6,
            mouse_dz: -7,
            mouse_buttons: 5,
        };
        let mut mouse = Mouse::new();
        mouse.check(&sent).unwrap();
        mouse.restore(sent.clone()).unwrap();
        let expected = MouseState { parent_obj: full_state_turned(), ..sent };
        assert_eq!(mouse.save(Audience::Qemu).unwrap(), expected);
    }

    #[test]
    fn bad_state_is_named() {
        let mouse = Mouse::new();
        let refused = |change: fn(&mut MouseState)| {
            let mut state = mouse.save(Audience::Qemu).unwrap();
            change(&mut state);
            mouse.check(&state).unwrap_err().field
        };
        assert_eq!(refused(|s| s.mouse_type = 1), "mouse_type");
        assert_eq!(refused(|s| s.mouse_detect_state = 4), "mouse_detect_state");
        assert_eq!(refused(|s| s.parent_obj.rptr = 256), "queue.rptr");
    }
}
