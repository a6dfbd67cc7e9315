//! A destination on the same host: it is given the memory itself, and no page of it travels.
//!
//! ```text
//! manifest (memory) → ← verdict
//! the memory and a ledger, as descriptors            → mapped there, for reading only
//! the other blocks of RAM, if there are any          →   while the guest runs
//! pause, sections, …, COMMIT: as in any migration    → … takes disks and memory, starts the vCPUs
//! ```
//!
//! There is no log of written pages and nothing to converge: the pause is as long whatever the memory's
//! size. Who has the memory after COMMIT stands in the [ledger](crate::handover::ledger).

use std::os::fd::AsFd;

use super::precopy::Passes;
use super::{Migration, SourceError};

impl Migration<'_> {
    /// Gives the destination the memory, and sends what else there is of RAM.
    pub(super) fn hand_memory(&mut self) -> Result<Passes, SourceError> {
        // All that was said before is out, and its answer has come.
        let Some(connection) = self.out.connection() else {
            return Err(SourceError::NotLocal { program: None });
        };
        let shared = self.vm.share_memory(connection.as_fd());
        shared.map_err(SourceError::vm("giving the destination the guest's memory"))?;
        self.send_other_blocks()
    }
}
