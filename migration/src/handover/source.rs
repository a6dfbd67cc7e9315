//! The side that gives the VM away.

use super::{Arbiter, Peer};

/// Where the hand-over stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// The guest runs (or is paused by its user's wish), and RAM travels.
    Running,
    /// vCPUs and devices are being stopped.
    Pausing,
    /// The guest stands still, and the rest of its state travels.
    Sending,
    /// Everything is out; the destination loads it.
    AwaitingPrepared,
    /// The disks' locks are being given up.
    ReleasingDisks,
    /// COMMIT is going out or has gone. Past the point of no return.
    Committing,
    /// The memory, which the destination has too, is being taken back by the ledger.
    Reclaiming {
        /// As behind it.
        even_changed: bool,
    },
    /// The disks' locks are being taken back: after an explicit refusal, or on the operator's word.
    RetakingDisks {
        /// Whether the guest shall go on although somebody has written to its disks meanwhile.
        even_changed: bool,
    },
    /// It is being looked at whether somebody else holds the disks' locks.
    ProbingDisks {
        /// Whether the guest shall go on here when nobody does. Otherwise this copy was to end.
        resume_if_free: bool,
    },
    /// The guest is being resumed.
    Resuming,
    /// End: the guest is here, as if nothing had been tried.
    Kept,
    /// End: the guest is here but could not be resumed.
    KeptStopped,
    /// End: the other side runs the guest.
    HandedOver,
    /// Nobody here knows who runs the guest. It stands still and everything is kept until an
    /// answer comes.
    InDoubt,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// Enough of RAM has travelled: it is time to stop the guest.
    Switch,
    /// vCPUs and devices stand still.
    Paused,
    /// Everything has been sent that comes before the point of no return.
    StateSent,
    /// The destination holds everything.
    Prepared,
    /// The disks' locks are given up.
    DisksReleased,
    /// The locks could not be given up, or not all of them.
    DisksKept,
    /// It is certain that not a byte of COMMIT has left (a cancel came first).
    NotCommitted,
    /// `shut(0)`: the destination runs the guest.
    Confirmed,
    /// The destination says that it does not run the guest and never will.
    Refused,
    /// The connection broke, or the destination is silent.
    Lost,
    /// Anything else went wrong: an error of this side, a bad message, a cancel.
    Failed,
    /// The memory is this side's, for ever.
    MemoryKept,
    /// The destination has taken the memory, and has not said more.
    MemoryTaken,
    /// The disks' locks are held again, and nobody has written since they were given up.
    DisksTaken,
    /// The locks are held again, but somebody has written since: the guest's memory is older than
    /// its disks.
    DisksChanged,
    /// Someone else holds the locks.
    DisksLost,
    /// Someone else holds the locks and has marked them: the guest that was handed over runs there
    /// (looked at only).
    DisksInUse,
    /// Nobody holds the locks (looked at only).
    DisksFree,
    /// The disks can't be had for another reason.
    DisksFailed,
    /// The guest is as it was before it was stopped.
    Resumed,
    /// The guest could not be resumed.
    ResumeFailed,
    /// The destination was asked, and whoever answered knows nothing of this migration.
    Unknown,
    /// Nothing could be learned by asking: what do the disks show?
    Look,
    /// The operator wants the guest to go on here.
    ResumeHere {
        /// He says in so many words that the destination does not run it and never will.
        known_dead: bool,
        /// He says in so many words that it shall even if its disks have been written to.
        even_changed: bool,
    },
    /// The operator wants this copy to end.
    Discard {
        /// He says in so many words that the destination runs the guest.
        known_running: bool,
    },
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Nothing.
    None,
    /// Stop vCPUs and devices; then `Paused` or `Failed`.
    Pause,
    /// Send what is left; then `StateSent` or `Failed`.
    Send,
    /// Wait for `Prepared`.
    AwaitPrepared,
    /// Give up the disks' locks; then `DisksReleased` or `DisksKept`.
    ReleaseDisks,
    /// Send COMMIT (to a QEMU: the end of the stream) and wait; then `NotCommitted`,
    /// `Confirmed`, `Refused` or `Lost`.
    Commit,
    /// Take the memory back by the ledger; then `MemoryKept`, `MemoryTaken`, or `Confirmed` if it says that
    /// the guest has been started there.
    Reclaim,
    /// Take the disks' locks back, and change the disks' stamps, so that no order to run them as they
    /// were left is good any more; then `DisksTaken`, `DisksChanged`, `DisksLost` or `DisksFailed`.
    RetakeDisks,
    /// Look who holds the disks' locks, and take none; then `DisksInUse`, `DisksLost`,
    /// `DisksFree` or `DisksFailed`.
    ProbeDisks,
    /// Give up again the locks that were just taken, and keep everything else.
    ReleaseDisksAndHold,
    /// Nothing here can tell who runs the guest: ask the operator for his word.
    AskForWord,
    /// Resume; then `Resumed` or `ResumeFailed`.
    Resume,
    /// Give up the guest for ever.
    HandOver,
    /// Keep everything, let nothing run, and say so.
    Hold,
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    peer: Peer,
    arbiter: Arbiter,
    fenced: bool,
    ledger: bool,
    state: State,
}

impl Source {
    /// A source whose guest runs.
    pub fn new(peer: Peer, arbiter: Arbiter) -> Self {
        Self { peer, arbiter, fenced: false, ledger: false, state: State::Running }
    }

    /// The destination runs the guest only over disks that are as this side left them, however late
    /// it wakes up: so this side may take them back unasked.
    #[must_use]
    pub fn fenced(self) -> Self {
        Self { fenced: true, ..self }
    }

    /// The destination has this side's own memory, and a [ledger](super::ledger) says whose it is.
    #[must_use]
    pub fn by_ledger(self) -> Self {
        Self { ledger: true, ..self }
    }

    /// One in any state, as a machine with a broken guard might come to be.
    #[cfg(test)]
    pub(super) fn in_state(&self, state: State) -> Self {
        Self { state, ..self.clone() }
    }

    /// What the other side is.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether a vCPU may run on this side.
    pub fn may_run(&self) -> bool {
        use State::*;
        matches!(self.state, Running | Pausing | Resuming | Kept | KeptStopped)
    }

    /// What tells who may run the guest when nobody answers.
    pub fn arbiter(&self) -> Arbiter {
        self.arbiter
    }

    /// Takes an event. An event that has no meaning in a state changes nothing: answers that
    /// come late are the rule in a network, not an error.
    pub fn on(&mut self, event: Event) -> Action {
        use Event as E;
        use State as S;
        let disks = |even_changed| (S::RetakingDisks { even_changed }, Action::RetakeDisks);
        let retake = |even_changed| match self.ledger {
            true => (S::Reclaiming { even_changed }, Action::Reclaim),
            false => disks(even_changed),
        };
        let (state, action) = match (self.state, event) {
            (S::Running, E::Switch) => (S::Pausing, Action::Pause),
            (S::Running, E::Failed | E::Lost | E::Refused) => (S::Kept, Action::None),

            (S::Pausing, E::Paused) => (S::Sending, Action::Send),
            (S::Pausing, E::Failed | E::Lost | E::Refused) => (S::Resuming, Action::Resume),

            (S::Sending, E::StateSent) if self.peer == Peer::MiniVmm => {
                (S::AwaitingPrepared, Action::AwaitPrepared)
            }
            (S::Sending, E::StateSent) => (S::ReleasingDisks, Action::ReleaseDisks),
            (S::Sending, E::Failed | E::Lost | E::Refused) => (S::Resuming, Action::Resume),

            (S::AwaitingPrepared, E::Prepared) => (S::ReleasingDisks, Action::ReleaseDisks),
            (S::AwaitingPrepared, E::Failed | E::Lost | E::Refused) => {
                (S::Resuming, Action::Resume)
            }

            (S::ReleasingDisks, E::DisksReleased) => (S::Committing, Action::Commit),
            // Of several disks some may have been given up before one failed.
            (S::ReleasingDisks, E::DisksKept) => disks(false),

            (S::Committing, E::Confirmed) => (S::HandedOver, Action::HandOver),
            (S::Committing, E::Refused | E::NotCommitted) => retake(false),
            // The ledger knows what the connection can't tell any more.
            (S::Committing, E::Lost | E::Failed) if self.ledger => retake(false),
            (S::Committing, E::Lost | E::Failed) => (S::InDoubt, Action::Hold),

            (S::InDoubt, E::Confirmed) => (S::HandedOver, Action::HandOver),
            (S::InDoubt, E::Refused) => retake(false),
            (S::InDoubt, E::ResumeHere { known_dead, even_changed })
                if known_dead || self.ledger || self.arbiter == Arbiter::DiskLocks =>
            {
                retake(even_changed)
            }
            (S::InDoubt, E::Discard { known_running: true }) => (S::HandedOver, Action::HandOver),
            // A destination may hold the disks, and have marked them, without having taken the memory.
            (S::InDoubt, E::Look | E::Discard { .. }) if self.ledger => retake(false),
            (S::InDoubt, E::Discard { .. }) if self.arbiter == Arbiter::DiskLocks => {
                (S::ProbingDisks { resume_if_free: false }, Action::ProbeDisks)
            }
            // An answer to a question that tells nothing, and silence, end no doubt; the disks may.
            (S::InDoubt, E::Look) if self.arbiter == Arbiter::DiskLocks => {
                (S::ProbingDisks { resume_if_free: self.fenced }, Action::ProbeDisks)
            }
            (S::InDoubt, E::Look | E::Unknown) => (S::InDoubt, Action::Hold),
            (S::InDoubt, E::ResumeHere { .. } | E::Discard { .. }) => {
                (S::InDoubt, Action::AskForWord)
            }

            (S::ProbingDisks { .. }, E::DisksInUse) => (S::HandedOver, Action::HandOver),
            // A destination holds them before it runs, and may fail to.
            (S::ProbingDisks { .. }, E::DisksLost) => (S::InDoubt, Action::AskForWord),
            (S::ProbingDisks { resume_if_free: true }, E::DisksFree) => disks(false),
            (S::ProbingDisks { .. }, E::DisksFree | E::DisksFailed) => (S::InDoubt, Action::Hold),

            (S::Reclaiming { even_changed }, E::MemoryKept) => disks(even_changed),
            (S::Reclaiming { .. }, E::Confirmed) => (S::HandedOver, Action::HandOver),
            (S::Reclaiming { .. }, E::MemoryTaken) => (S::InDoubt, Action::Hold),

            (S::RetakingDisks { .. }, E::DisksTaken)
            | (S::RetakingDisks { even_changed: true }, E::DisksChanged) => {
                (S::Resuming, Action::Resume)
            }
            (S::RetakingDisks { .. }, E::DisksChanged) => (S::InDoubt, Action::ReleaseDisksAndHold),
            (S::RetakingDisks { .. }, E::DisksLost | E::DisksFailed) => (S::InDoubt, Action::Hold),

            (S::Resuming, E::Resumed) => (S::Kept, Action::None),
            (S::Resuming, E::ResumeFailed) => (S::KeptStopped, Action::None),

            (state, _) => (state, Action::None),
        };
        self.state = state;
        action
    }
}
