//! Guest memory is mapped into the VM while the rest of the machine is made.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::MachineError;
use crate::kvm::{DirtyLog, KvmError};

/// A thread that maps guest memory. Nobody runs the guest or lets go of the memory before it has come to its end.
pub(super) struct Mapping(Option<JoinHandle<Result<(), KvmError>>>);

impl Mapping {
    /// Begins to map what `log` knows of.
    pub(super) fn begin(log: &Arc<DirtyLog>) -> Result<Self, MachineError> {
        let log = log.clone();
        let thread = thread::Builder::new()
            .name("map".into())
            .spawn(move || log.map())
            .map_err(MachineError::host("cannot start a thread that maps the guest's memory"))?;
        Ok(Self(Some(thread)))
    }

    /// Waits until it is mapped.
    pub(super) fn end(mut self) -> Result<(), MachineError> {
        match self.0.take().map(JoinHandle::join) {
            Some(Ok(mapped)) => Ok(mapped?),
            Some(Err(panicked)) => resume_unwind(panicked),
            None => Ok(()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // The machine is not made, for another reason.
            let _ = thread.join();
        }
    }
}
