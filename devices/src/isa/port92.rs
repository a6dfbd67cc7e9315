//! System control port A (0x92): the fast A20 gate and the fast reset.
//!
//! KVM has no A20 gate to close, so bit 1 is only remembered.

use std::sync::Arc;

use migration::vmstate::{Audience, FieldError, Migratable, VmState};
use serde::{Deserialize, Serialize};

use super::{FLOATING, byte_ports};
use crate::device::{Device, PowerControl, PowerRequest};

/// The port's number.
pub const PORT: u16 = 0x92;

/// A rising edge resets the machine.
const RESET: u8 = 1 << 0;
/// Address line 20 is let through.
const A20: u8 = 1 << 1;

/// System control port A.
pub struct Port92 {
    outport: u8,
    power: Arc<dyn PowerControl>,
}

impl Port92 {
    /// The port with A20 open.
    pub fn new(power: Arc<dyn PowerControl>) -> Self {
        Self { outport: A20, power }
    }

    fn read_port(&mut self, port: u16) -> u8 {
        if port == PORT { self.outport } else { FLOATING }
    }

    fn write_port(&mut self, port: u16, value: u8) {
        if port != PORT {
            return;
        }
        if value & RESET != 0 && self.outport & RESET == 0 {
            self.power.request(PowerRequest::Reset);
        }
        self.outport = value;
    }
}

byte_ports!(Port92);

impl Device for Port92 {
    fn reset(&mut self) {
        self.outport = A20;
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

/// Section `port92` v1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port92State {
    outport: u8,
}

impl VmState for Port92State {
    const VERSION: u32 = 1;
}

impl Migratable for Port92 {
    type State = Port92State;

    fn save(&self, _: Audience) -> Result<Port92State, FieldError> {
        Ok(Port92State { outport: self.outport })
    }

    fn check(&self, _: &Port92State) -> Result<(), FieldError> {
        Ok(())
    }

    fn restore(&mut self, state: Port92State) -> Result<(), FieldError> {
        self.outport = state.outport;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::testing::FakePower;

    #[test]
    fn only_a_rising_reset_bit_resets() {
        let power = FakePower::new();
        let mut port = Port92::new(power.clone());
        assert_eq!(port.read_port(PORT), 0x02);
        port.write_port(PORT, 0x03);
        port.write_port(PORT, 0x01);
        assert_eq!(power.requests(), [PowerRequest::Reset]);
        port.write_port(PORT, 0x02);
        port.write_port(PORT, 0x03);
        assert_eq!(power.requests().len(), 2);
    }

    #[test]
    fn state_travels() {
        let mut from = Port92::new(FakePower::new());
        from.write_port(PORT, 0xa4);
        let state = from.save(Audience::Qemu).unwrap();
        assert_eq!(state, Port92State { outport: 0xa4 });
        let power = FakePower::new();
        let mut to = Port92::new(power.clone());
        to.restore(state).unwrap();
        assert_eq!(to.read_port(PORT), 0xa4);
        assert!(power.requests().is_empty());
    }
}
