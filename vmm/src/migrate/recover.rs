//! A hand-over of which nobody knows how it ended: what is known of it, and how it is settled.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::SystemTime;

use migration::guest::{Holder, SourceVm, VmError};
use migration::handover::Arbiter;
use migration::source::{Doubt, Objection, Settled, Wish};
use serde::Serialize;

use super::MigrationDesk;
use super::leaving::Leaving;
use super::settle::Asker;
use crate::power::MachineEvent;
use crate::vm::Vm;

/// The doubt, and the guest that stands still for it.
pub(super) struct Standing {
    pub(super) doubt: Doubt,
    pub(super) leaving: Leaving,
    /// Who asks the destination meanwhile.
    pub(super) asker: Arc<Asker>,
}

impl Standing {
    pub(super) fn reason(&self) -> &str {
        self.doubt.reason()
    }

    pub(super) fn is_asked_by(&self, asker: &Arc<Asker>) -> bool {
        Arc::ptr_eq(&self.asker, asker)
    }
}

/// What is known of a doubt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DoubtInfo {
    /// What broke.
    pub reason: String,
    /// For how many seconds it has been so.
    pub for_seconds: u64,
    /// What the disks show, as a sentence.
    pub disks: String,
    /// What came of asking the destination, as a sentence; nothing if it was not asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asked: Option<String>,
    /// What can be done, as a sentence.
    pub advice: &'static str,
}

/// Why a doubt was not settled as was wished.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// There is none.
    #[error(
        "there is nothing to recover: it is known who has the guest ('status' says what this VM does)"
    )]
    NoDoubt,
    /// It was refused.
    #[error("refused: {0}")]
    Objection(#[from] Objection),
    /// The guest is here and stands still.
    #[error("the guest is here again, but could not be resumed")]
    Stopped(#[source] VmError),
}

impl MigrationDesk {
    pub(super) fn doubt(&self) -> MutexGuard<'_, Option<Standing>> {
        self.doubt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stand(&self, doubt: Doubt, leaving: Leaving, asker: Arc<Asker>) {
        *self.doubt() = Some(Standing { doubt, leaving, asker });
    }

    /// What is known of a doubt, if there is one.
    pub(crate) fn doubt_info(&self) -> Option<DoubtInfo> {
        let mut standing = self.doubt();
        let Standing { doubt, leaving, asker } = standing.as_mut()?;
        let (disks, advice) = leaving.what_is_known(doubt.arbiter());
        let elapsed = SystemTime::now().duration_since(doubt.since()).unwrap_or_default();
        Some(DoubtInfo {
            reason: doubt.reason().to_owned(),
            for_seconds: elapsed.as_secs(),
            disks,
            asked: asker.report(),
            advice,
        })
    }

    /// Whether there is a doubt.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.doubt().is_some()
    }
}

impl Leaving {
    /// What the disks show, and what can be done then.
    fn what_is_known(&mut self, arbiter: Arbiter) -> (String, &'static str) {
        if self.memory_is_taken() {
            return (
                "the destination has taken the guest's memory, which is the same as here, and has not \
                 said more"
                    .into(),
                "look at the destination: either the guest runs there, or it has ended with its process; it \
                 can't go on here. 'quit' ends this copy",
            );
        }
        if self.memory_is_kept() {
            let disks = match self.probe_disks() {
                Ok(Holder::RunningGuest(what) | Holder::Someone(what)) => what,
                Ok(Holder::Nobody) => "nobody holds the guest's disks".into(),
                Err(e) => crate::error_chain(&e),
            };
            return (
                format!("the guest's memory is this side's, and no other process runs it; {disks}"),
                "end the process that waits for the guest, if there still is one, and see to the disks; \
                 'recover --resume' lets the guest go on here",
            );
        }
        if arbiter == Arbiter::Nothing {
            return (
                "the guest has no disk whose lock would show who runs it".into(),
                "look at the destination; 'recover --resume --i-know-the-destination-does-not-run' \
                 or 'recover --discard --i-know-the-destination-runs'",
            );
        }
        match self.probe_disks() {
            Ok(Holder::RunningGuest(what)) => {
                (what, "'recover --discard' ends this copy; nothing is lost by it")
            }
            Ok(Holder::Someone(what)) => (
                what,
                "look at the destination: it holds the disks, but does not say that the guest has \
                 started. If it runs there, 'recover --discard --i-know-the-destination-runs'; if \
                 not, end the process that holds them, then 'recover --resume'",
            ),
            Ok(Holder::Nobody) => match self.disks_changed() {
                Some(what) => (
                    format!("nobody holds the guest's disks, but {what}"),
                    "the guest has run elsewhere and has ended there: boot it anew from its disks, \
                     and end this copy with 'quit'",
                ),
                None => (
                    "nobody holds the guest's disks, and nobody has written to them since".into(),
                    "'recover --resume' lets the guest go on here; a destination that is told to run \
                     it later will find the disks taken",
                ),
            },
            Err(e) => (crate::error_chain(&e), "see to the disk, then try again"),
        }
    }
}

impl Vm {
    /// Does with a doubt what the operator wishes, unless it could make two running guests, or none.
    pub(crate) fn recover(self: &Arc<Self>, wish: Wish) -> Result<(), RecoverError> {
        let mut place = self.migration.doubt();
        let Some(Standing { doubt, mut leaving, asker }) = place.take() else {
            return Err(RecoverError::NoDoubt);
        };
        let settled = doubt.recover(&mut leaving, wish);
        if !matches!(settled, Settled::StillInDoubt(..)) {
            asker.end();
            self.migration.note_settled("the operator has decided");
        }
        match settled {
            Settled::HandedOver => {
                tracing::warn!("the operator has settled the doubt: this copy ends");
                self.queue(MachineEvent::HandedOver);
                Ok(())
            }
            Settled::Kept => {
                tracing::warn!("the operator has settled the doubt: the guest goes on here");
                Ok(())
            }
            Settled::KeptStopped(error) => Err(RecoverError::Stopped(error)),
            Settled::StillInDoubt(objection, doubt) => {
                *place = Some(Standing { doubt, leaving, asker });
                Err(objection.into())
            }
        }
    }
}
