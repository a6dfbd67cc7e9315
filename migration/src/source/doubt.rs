//! The end of a hand-over that needs no connection, and the doubt that is left when it was lost.

use std::time::SystemTime;

use super::SourceError;
use super::switchover::Trouble;
use crate::fate::{Fate, MigrationId};
use crate::guest::{Holder, Reclaimed, SourceVm, TakenBack, VmError};
use crate::handover::Arbiter;
use crate::handover::source::{Action, Event, Source, State};
use crate::panics::{asked_of_vm, guarded};

/// The last actions.
pub(super) fn finish(
    machine: &mut Source,
    mut action: Action,
    vm: &mut dyn SourceVm,
    trouble: &mut Trouble,
) {
    loop {
        let event = match action {
            Action::Reclaim => reclaim(vm, trouble),
            Action::RetakeDisks => retake(vm, trouble),
            Action::ProbeDisks => probe(vm, trouble),
            Action::ReleaseDisksAndHold => {
                if let Err(error) = asked_of_vm(|| vm.release_disks()) {
                    trouble.objection = Some(Objection::Disks(error));
                }
                return;
            }
            Action::Resume => match asked_of_vm(|| vm.resume()) {
                Ok(()) => Event::Resumed,
                Err(error) => {
                    trouble.resume = Some(error);
                    Event::ResumeFailed
                }
            },
            Action::HandOver => {
                // The other side runs the guest, whatever becomes of this one.
                let _ = guarded(|| vm.hand_over());
                return;
            }
            _ => return,
        };
        action = machine.on(event);
    }
}

fn reclaim(vm: &mut dyn SourceVm, trouble: &mut Trouble) -> Event {
    let objection = match asked_of_vm(|| vm.reclaim_memory()) {
        Ok(Reclaimed::Kept) => return Event::MemoryKept,
        Ok(Reclaimed::Runs) => return Event::Confirmed,
        Ok(Reclaimed::Taken) => Objection::MemoryTaken,
        Err(error) => Objection::Memory(error),
    };
    trouble.objection = Some(objection);
    Event::MemoryTaken
}

fn retake(vm: &mut dyn SourceVm, trouble: &mut Trouble) -> Event {
    let (event, objection) = match asked_of_vm(|| vm.reacquire_disks()) {
        Ok(TakenBack::AsLeft) => return Event::DisksTaken,
        Ok(TakenBack::Changed(what)) => (Event::DisksChanged, Objection::Changed(what)),
        Ok(TakenBack::Held(what)) => (Event::DisksLost, Objection::Held(what)),
        Err(error) => (Event::DisksFailed, Objection::Disks(error)),
    };
    trouble.objection = Some(objection);
    event
}

fn probe(vm: &mut dyn SourceVm, trouble: &mut Trouble) -> Event {
    let (event, objection) = match asked_of_vm(|| vm.probe_disks()) {
        Ok(Holder::RunningGuest(_)) => return Event::DisksInUse,
        Ok(Holder::Someone(what)) => (Event::DisksLost, Objection::HeldBySomeone(what)),
        Ok(Holder::Nobody) => (Event::DisksFree, Objection::NobodyRunsIt),
        Err(error) => (Event::DisksFailed, Objection::Disks(error)),
    };
    trouble.objection = Some(objection);
    event
}

/// A hand-over whose outcome nobody here knows. The guest stands still.
#[derive(Debug)]
#[must_use = "the guest stands still until the doubt is settled"]
pub struct Doubt {
    machine: Source,
    reason: String,
    since: SystemTime,
    id: Option<MigrationId>,
}

/// What the operator wants to become of a [`Doubt`], with what he says in so many words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// The guest goes on here.
    Resume {
        /// The destination does not run it and never will.
        known_dead: bool,
        /// It shall even if its disks have been written to.
        even_changed: bool,
    },
    /// This copy ends.
    Discard {
        /// The destination runs the guest.
        known_running: bool,
    },
}

/// Why a wish was not granted. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum Objection {
    /// Somebody else has the disks.
    #[error(
        "{0}: the guest runs elsewhere or is about to, and must not run here too. If it runs at the \
         destination, end this copy with 'recover --discard'; if the holder is something else, end \
         that first"
    )]
    Held(String),
    /// Somebody has had the disks.
    #[error(
        "{0}: the guest has run elsewhere meanwhile, and its memory here is older than its disks. \
         Boot it anew from them ('recover --discard --i-know-the-destination-runs' ends this copy), \
         or, if you know that something else has written there and does no harm, add \
         --even-though-the-disks-have-changed"
    )]
    Changed(String),
    /// Another process has the guest's memory.
    #[error(
        "the destination has taken the guest's memory, and has not said that the guest runs: it runs \
         there, or has ended there with its process. It must never go on here, with the registers that it \
         had before. Look there; 'quit' ends this copy"
    )]
    MemoryTaken,
    /// It can't be seen who has it.
    #[error("{}; the guest stands still here, and 'recover' may be tried again", crate::wire::error_chain(.0))]
    Memory(VmError),
    /// No disk can tell.
    #[error(
        "nothing here can tell whether the destination runs the guest: it has no disk whose lock \
         would show it. Look there, end the process there if there is one, and then add \
         --i-know-the-destination-does-not-run"
    )]
    CantTellDead,
    /// It was asked, or the disks were looked at, in vain.
    #[error("nothing was learned that decides who runs the guest")]
    NothingLearned,
    /// No disk can tell, and this copy may be the last.
    #[error(
        "nothing here can tell whether the destination runs the guest: it has no disk whose lock \
         would show it, and this may be the last copy. Look there, and if it runs add \
         --i-know-the-destination-runs"
    )]
    CantTellRunning,
    /// Nobody holds the disks.
    #[error(
        "nobody holds the guest's disks, so it runs nowhere, and this may be its last copy: \
         'recover --resume' lets it go on here. If it is to end all the same, use 'quit'"
    )]
    NobodyRunsIt,
    /// Somebody holds the disks, but does not say that a guest has started there.
    #[error(
        "{0}, but nothing says that it is the guest that runs there: a QEMU does not say so, nor does \
         a mini-vmm that is about to start it. Look there, and if it runs add \
         --i-know-the-destination-runs"
    )]
    HeldBySomeone(String),
    /// The disks can't be opened or looked at.
    #[error("{}; the guest stands still here, and 'recover' may be tried again", crate::wire::error_chain(.0))]
    Disks(VmError),
}

/// What came of [`Doubt::recover`].
#[derive(Debug)]
pub enum Settled {
    /// This side must never run the guest again.
    HandedOver,
    /// The guest is here as it was before.
    Kept,
    /// The guest is here but could not be resumed.
    KeptStopped(VmError),
    /// The wish was not granted.
    StillInDoubt(Objection, Doubt),
}

impl Doubt {
    pub(super) fn new(machine: Source, error: &SourceError, id: Option<MigrationId>) -> Self {
        Self { machine, reason: error.chain(), since: SystemTime::now(), id }
    }

    /// What broke.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Since when it is not known who runs the guest.
    pub fn since(&self) -> SystemTime {
        self.since
    }

    /// What tells who may run the guest.
    pub fn arbiter(&self) -> Arbiter {
        self.machine.arbiter()
    }

    /// What the destination knows the migration by, if it can be asked for it.
    pub fn id(&self) -> Option<MigrationId> {
        self.id
    }

    /// Takes the answer of one that was asked ([`ask`](super::ask())).
    pub fn hear(self, vm: &mut dyn SourceVm, fate: Fate) -> Settled {
        let event = match fate {
            Fate::Runs => Event::Confirmed,
            Fate::NeverHere => Event::Refused,
            Fate::Unknown => Event::Unknown,
        };
        self.settle(vm, event, Objection::NothingLearned)
    }

    /// Nobody could be asked, or knew: settles it if the disks can.
    pub fn look(self, vm: &mut dyn SourceVm) -> Settled {
        self.settle(vm, Event::Look, Objection::NothingLearned)
    }

    /// Does what the operator wants, unless it could make two running guests, or none.
    pub fn recover(self, vm: &mut dyn SourceVm, wish: Wish) -> Settled {
        let event = match wish {
            Wish::Resume { known_dead, even_changed } => {
                Event::ResumeHere { known_dead, even_changed }
            }
            Wish::Discard { known_running } => Event::Discard { known_running },
        };
        let cant_tell = match wish {
            Wish::Resume { .. } => Objection::CantTellDead,
            Wish::Discard { .. } => Objection::CantTellRunning,
        };
        self.settle(vm, event, cant_tell)
    }

    fn settle(mut self, vm: &mut dyn SourceVm, event: Event, cant_tell: Objection) -> Settled {
        let mut trouble = Trouble::default();
        let action = self.machine.on(event);
        finish(&mut self.machine, action, vm, &mut trouble);
        match self.machine.state() {
            State::HandedOver => Settled::HandedOver,
            State::Kept => Settled::Kept,
            State::KeptStopped => Settled::KeptStopped(trouble.into_errors().1),
            _ => Settled::StillInDoubt(trouble.objection.unwrap_or(cant_tell), self),
        }
    }
}
