//! Sections of QEMU's board that stand for nothing here, or for something that lives elsewhere:
//! carried as they came, and written with the values of a fresh machine otherwise.

use migration::vmstate::{Audience, Bytes, FieldError, FixedVec, Migratable, Pad, VmState};
use serde::{Deserialize, Serialize};

use crate::device::Device;

/// A section without a device behind it.
#[derive(Debug, Default)]
pub struct Holder<S> {
    state: S,
}

impl<S: Default> Holder<S> {
    /// A holder of a fresh machine's value.
    pub fn new() -> Self {
        Self::default()
    }
}

impl<S: Default + Send> Device for Holder<S> {
    fn reset(&mut self) {
        self.state = S::default();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

impl<S: VmState + Default + Clone> Migratable for Holder<S> {
    type State = S;

    fn save(&self, _: Audience) -> Result<S, FieldError> {
        Ok(self.state.clone())
    }

    /// Every value is one that can be handed on.
    fn check(&self, _: &S) -> Result<(), FieldError> {
        Ok(())
    }

    fn restore(&mut self, state: S) -> Result<(), FieldError> {
        self.state = state;
        Ok(())
    }
}

/// Section `i2c_bus` v1: the SMBus behind the power management function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I2cBusState {
    /// The slave that is being talked to; 255 for none.
    pub saved_address: u8,
}

impl Default for I2cBusState {
    fn default() -> Self {
        Self { saved_address: 0xff }
    }
}

impl VmState for I2cBusState {
    const VERSION: u32 = 1;
}

/// Section `acpi_build` v1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiBuildState {
    /// The guest's firmware has fetched the ACPI tables.
    pub patched: u8,
}

impl Default for AcpiBuildState {
    /// The tables are in the guest's memory from the first instruction on.
    fn default() -> Self {
        Self { patched: 1 }
    }
}

impl VmState for AcpiBuildState {
    const VERSION: u32 = 1;
}

/// Section `kvm-tpr-opt` v1: how far QEMU's option ROM for old Windows guests, which makes their
/// accesses to the task priority register cheap, has got. Its code is in the guest's memory and
/// waits for a call that only such guests make.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TprOptState {
    unused: Pad<8>,
    vaddr: u32,
    fixup_start: u32,
    fixup_end: u32,
    vapic_vaddr: u32,
    vapic_size: u32,
    vcpu_shift: u32,
    rom_real_tpr_addr: u32,
    up: TprHandlers,
    mp: TprHandlers,
    /// 0: the ROM is not there or has not spoken; 1: it works; 2: it stands by.
    pub state: u32,
    real_tpr_addr: u32,
    rom_state_vaddr: u32,
    vapic_paddr: u32,
    rom_state_paddr: u32,
}

/// The ROM's routines for one or for several processors, by their addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "kvmvapic-handlers")]
struct TprHandlers {
    set_tpr: u32,
    set_tpr_eax: u32,
    get_tpr: FixedVec<u32, 8>,
    get_tpr_stack: u32,
}

impl VmState for TprOptState {
    const VERSION: u32 = 1;
}

/// How many bytes the run state's name may have, its final NUL included.
pub const RUNSTATE_SIZE: usize = 100;

/// Section `globalstate` v1: whether the machine ran when it was stopped for the move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GlobalState {
    /// The name's length with its NUL.
    size: u32,
    runstate: Bytes<RUNSTATE_SIZE>,
}

impl VmState for GlobalState {
    const VERSION: u32 = 1;
}

impl GlobalState {
    /// The section for a run state, for example `running`. A name of more than 99 bytes, which
    /// QEMU doesn't have, is cut.
    pub fn new(runstate: &str) -> Self {
        let name = runstate.as_bytes();
        let name = name.get(..RUNSTATE_SIZE - 1).unwrap_or(name);
        Self {
            size: name.len() as u32 + 1,
            runstate: Bytes::from_fn(|i| name.get(i).copied().unwrap_or(0)),
        }
    }

    /// The run state's name.
    pub fn runstate(&self) -> Result<&str, FieldError> {
        let bad = |found: &dyn std::fmt::Display| {
            Err(FieldError::new("runstate", "a name of at most 99 bytes and a NUL", found))
        };
        let Some(end) = self.runstate.iter().position(|byte| *byte == 0) else {
            return bad(&"no NUL");
        };
        match self.runstate.get(..end).map(std::str::from_utf8) {
            Some(Ok(name)) => Ok(name),
            _ => bad(&"bytes that are no text"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_hold() {
        let mut bus = Holder::<I2cBusState>::new();
        assert_eq!(bus.save(Audience::Qemu).unwrap().saved_address, 0xff);
        bus.restore(I2cBusState { saved_address: 0x50 }).unwrap();
        assert_eq!(bus.save(Audience::Qemu).unwrap().saved_address, 0x50);
        bus.reset();
        assert_eq!(bus.save(Audience::Qemu).unwrap(), I2cBusState::default());
        let mut tables = Holder::<AcpiBuildState>::new();
        tables.restore(AcpiBuildState { patched: 0 }).unwrap();
        assert_eq!(tables.save(Audience::Qemu).unwrap().patched, 0);
    }

    #[test]
    fn run_states_are_text() {
        assert_eq!(GlobalState::new("running").runstate(), Ok("running"));
        assert_eq!(GlobalState::new("running").size, 8);
        assert_eq!(GlobalState::new(&"x".repeat(200)).runstate().unwrap().len(), 99);
        let mut state = GlobalState::new("paused");
        state.runstate.fill(b'x');
        assert_eq!(state.runstate().unwrap_err().field, "runstate");
        state.runstate[1] = 0;
        state.runstate[0] = 0xff;
        assert!(state.runstate().is_err());
    }
}
