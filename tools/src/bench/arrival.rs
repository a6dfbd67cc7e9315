//! A guest that has arrived and has still to show that nothing of it was lost.
//!
//! That takes as long as to fill a guest's memory, where KVM interprets. So it is done while the next guest fills its
//! own, and neither while anything is measured.

use serde_json::json;

use super::vm::Vm;
use crate::error::Result;

/// See [this module](self).
pub(super) struct Arrival {
    vm: Vm,
    /// Where what the guest says since it stood still begins.
    from: usize,
    asked: bool,
}

impl Arrival {
    /// Its guest stands still until it is to verify, so as not to disturb what is measured meanwhile.
    pub(super) fn new(mut vm: Vm) -> Result<Arrival> {
        let from = vm.heard();
        vm.ask("stop", json!({}))?;
        Ok(Arrival { vm, from, asked: false })
    }

    /// Lets the guest go on, and has it verify all of its memory.
    pub(super) fn verify(&mut self) -> Result<()> {
        self.vm.ask("cont", json!({}))?;
        self.vm.say(b'v')?;
        self.asked = true;
        Ok(())
    }

    /// Waits until it has, and ends it. What it finds wrong is an error.
    pub(super) fn end(mut self) -> Result<()> {
        if !self.asked {
            self.verify()?;
        }
        self.vm.line(self.from, "selfcheck: verified all").map(drop)
    }
}
