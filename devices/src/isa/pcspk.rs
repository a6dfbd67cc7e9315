//! The speaker's part of system control port B (0x61).
//!
//! KVM's timer answers the port itself; what is left to do here is to carry section `pcspk`.

use migration::vmstate::{Audience, FieldError, Migratable, VmState};
use serde::{Deserialize, Serialize};

use crate::device::Device;

/// Bit 4 of the port: memory is being refreshed.
const REFRESH: u8 = 1 << 4;

/// What the speaker remembers.
#[derive(Debug, Default)]
pub struct PcSpeaker {
    state: PcSpeakerState,
}

/// Section `pcspk` v1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PcSpeakerState {
    /// Bit 1 of the port: the speaker follows timer 2.
    pub data_on: u8,
    /// Bit 4 of the port (0 or 16), which changes at each read.
    pub dummy_refresh_clock: u8,
}

impl PcSpeaker {
    /// A silent speaker.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Device for PcSpeaker {
    fn reset(&mut self) {
        self.state = PcSpeakerState::default();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

impl VmState for PcSpeakerState {
    const VERSION: u32 = 1;
}

impl Migratable for PcSpeaker {
    type State = PcSpeakerState;

    fn save(&self, _: Audience) -> Result<PcSpeakerState, FieldError> {
        Ok(self.state.clone())
    }

    fn check(&self, state: &PcSpeakerState) -> Result<(), FieldError> {
        if state.data_on > 1 {
            return Err(FieldError::new("data_on", "0 or 1", state.data_on));
        }
        if state.dummy_refresh_clock & !REFRESH != 0 {
            let found = state.dummy_refresh_clock;
            return Err(FieldError::new("dummy_refresh_clock", "0 or 16", found));
        }
        Ok(())
    }

    fn restore(&mut self, state: PcSpeakerState) -> Result<(), FieldError> {
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_its_state_and_names_what_is_wrong() {
        let mut speaker = PcSpeaker::new();
        let state = PcSpeakerState { data_on: 1, dummy_refresh_clock: 16 };
        speaker.check(&state).unwrap();
        speaker.restore(state.clone()).unwrap();
        assert_eq!(speaker.save(Audience::Qemu).unwrap(), state);
        let bad = PcSpeakerState { data_on: 0, dummy_refresh_clock: 2 };
        assert_eq!(speaker.check(&bad).unwrap_err().field, "dummy_refresh_clock");
        speaker.reset();
        assert_eq!(speaker.save(Audience::Qemu).unwrap(), PcSpeakerState::default());
    }
}
