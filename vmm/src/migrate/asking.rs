//! Asking a destination whether this VM could move there: what `mini-vmm preflight` is to the VM.

use std::sync::Arc;
use std::time::Duration;

use migration::control::{Control, NoEvents};
use migration::params::Parameters;
use migration::source::{self, Preflight, Questions, SourceError};

use super::MigrationDesk;
use super::leaving::Leaving;
use super::way::{WayError, WayOut};
use crate::config::MigrationUri;
use crate::vm::Vm;

/// How long whoever answers may be silent. Somebody waits for the answer, and no guest is at stake.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why nobody could be asked.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// A migration, or another preflight, is under way.
    #[error("a migration or a preflight of this VM is under way")]
    Busy,
    /// The address leads to where nobody answers.
    #[error(
        "'{uri}' is no place where a mini-vmm answers: a preflight asks one that waits at tcp:HOST:PORT or \
         unix:PATH ('mini-vmm run … --migrate-listen')"
    )]
    NobodyAnswers {
        /// The address.
        uri: String,
    },
    /// Nobody is there.
    #[error(transparent)]
    Way(#[from] WayError),
    /// Somebody is there, and the conversation failed.
    #[error("is it a mini-vmm that waits for a migration?")]
    Source(#[from] SourceError),
}

/// The desk is free again when this is dropped.
struct Asking<'a>(&'a MigrationDesk);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.lock().asking = None;
    }
}

impl Vm {
    /// Asks, on the calling thread.
    pub(crate) fn ask(
        self: &Arc<Self>,
        uri: &MigrationUri,
        parameters: Parameters,
        questions: &Questions,
    ) -> Result<Preflight, PreflightError> {
        let nobody = || PreflightError::NobodyAnswers { uri: uri.to_string() };
        // Nothing else is even opened: a file would be written to, and a descriptor can be used once.
        let MigrationUri::Socket(_) = uri else { return Err(nobody()) };
        let (control, _asking) = self.begin_asking(parameters)?;
        let connection = match WayOut::open(uri, 0, &self.migration.grants)? {
            WayOut::Connection(links) => links.main,
            WayOut::Sink(_) => return Err(nobody()),
        };
        let mut leaving = Leaving::new(self.clone());
        Ok(source::preflight(&mut leaving, &connection, &control, questions)?)
    }

    /// What stands against moving to any QEMU; nobody is asked.
    pub(crate) fn look_for_qemu(self: &Arc<Self>) -> Result<Preflight, PreflightError> {
        let (_control, _asking) = self.begin_asking(Parameters::default())?;
        Ok(source::preflight_for_qemu(&Leaving::new(self.clone()))?)
    }

    /// A control of its own: a preflight is no migration to whoever watches.
    fn begin_asking(
        &self,
        mut parameters: Parameters,
    ) -> Result<(Arc<Control>, Asking<'_>), PreflightError> {
        self.migration.let_end();
        let mut desk = self.migration.lock();
        if desk.is_busy() || desk.closing {
            return Err(PreflightError::Busy);
        }
        parameters.stall_timeout = parameters.stall_timeout.min(PATIENCE);
        let control = Arc::new(Control::new(parameters, Box::new(NoEvents)));
        desk.asking = Some(control.clone());
        Ok((control, Asking(&self.migration)))
    }
}
