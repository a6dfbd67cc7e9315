//! Who runs the VM: the hand-over as two state machines without I/O.
//!
//! Events go in, an [`Action`](source::Action) comes out; the drivers in [`crate::source`] and
//! [`crate::destination`] carry actions out and report what came of them, and a model checker can
//! do the same with every loss, crash and delay. Neither machine has a clock, a socket or a VM.
//!
//! ```text
//! SOURCE
//!                   Switch             Paused                StateSent (mini-vmm)
//!        ┌───────┐ ─Pause──→ ┌───────┐ ─Send──→ ┌───────┐ ────────────→ ┌───────────────┐
//!        │Running│           │Pausing│          │Sending│               │AwaitingPrepared│
//!        └───────┘           └───────┘          └───────┘               └───────────────┘
//!            │Failed             │Failed            │Failed  │StateSent(QEMU)  │Prepared │Failed
//!            ↓                   ↓                  ↓        └────────┐        │         ↓
//!         ┌────┐  Resumed    ┌────────┐←────────────┴─────────────────┼────────┼─────────┘
//!         │Kept│←────────────│Resuming│                               ↓        ↓ ReleaseDisks
//!         └────┘             └────────┘   DisksKept (failed)       ┌──────────────┐
//!            ↑                  ↑  ↑ └─────────────────────────────│ReleasingDisks│
//!            │ResumeFailed→     │  │DisksTaken                     └──────────────┘
//!         ┌────────────┐        │ ┌────────────┐ NotCommitted           │DisksReleased → Commit
//!         │KeptStopped │        │ │RetakingDisks│←─────────────┐        ↓
//!         └────────────┘        │ └────────────┘ Refused  ┌──────────┐     ← POINT OF NO RETURN
//!                               │       │ ↑  └────────────│Committing│
//!                    DisksLost  │       │ │Refused        └──────────┘
//!                       ┌───────┼───────┘ │                │   │Confirmed   ┌──────────┐
//!                       ↓       │         │     Lost       │   └──HandOver─→│HandedOver│
//!                    ┌───────┐──┼─────────┘ ←──────────────┘                └──────────┘
//!                    │InDoubt│──┴──────────────────────Confirmed─────────────────↑
//!                    └───────┘  (only an answer moves it, never a guess)
//!
//! DESTINATION
//!  ┌─────────┐ Received  ┌─────────┐ Prepared (mini-vmm)  ┌──────────────┐ Commit
//!  │Receiving│─Prepare──→│Preparing│────SendPrepared─────→│AwaitingCommit│───┐ TakeDisks
//!  └─────────┘           └─────────┘                      └──────────────┘   ↓
//!       │Failed               │ │ Prepared (QEMU)                │Failed  ┌───────────┐
//!       ↓                     │ └────────────────TakeDisks───────┼───────→│TakingDisks│
//!   ┌──────┐←─────────────────┴──────────────────────────────────┘        └───────────┘
//!   │Failed│←──────────────────────────DisksRefused─────────────────────────│   │DisksTaken
//!   └──────┘                                                 (mini-vmm) Start   │(QEMU) SendShut
//!       ↑   StartFailed: ReleaseDisks   ┌────────┐←─────────────────────────┘   ↓
//!       ├───────────────────────────────│Starting│  Acknowledged: Start ┌─────────────┐
//!       │                               └────────┘←─────────────────────│Acknowledging│
//!       │                                   │Started                    └─────────────┘
//!       │                                   ↓                                   │Failed:
//!       │                               ┌───────┐                               │ReleaseDisks
//!       └───────────────────────────────│Running│───────────────────────────────┘
//!                                       └───────┘
//! ```
//!
//! The rules behind it:
//!
//! - **The point of no return is the first byte of COMMIT**, not the last: a write that fails half
//!   way may have been enough. A QEMU knows no COMMIT; the last bytes of the stream (EOF and the
//!   description) take its place, after everything else has gone.
//! - Before it, every failure resumes the source. After it, only an *answer* moves the source:
//!   `shut(0)` says that the other side runs, an explicit refusal says that it never will. A broken
//!   connection, or silence, is neither.
//! - A destination that refuses after COMMIT has decided for ever before it says so.
//! - Disk locks are given up before COMMIT and taken before the first vCPU runs, so that the
//!   kernel arbitrates between two sides that both believe the VM is theirs.
//! - Where nobody answers, nobody runs the guest before the stream is whole: a write or a flush that
//!   fails is a refusal, and so is a command that ends badly.
//! - A QEMU source resumes when the connection breaks before it has read `shut(0)`; so to a QEMU
//!   `shut(0)` is sent before the guest starts, and the guest does not start when it can't be sent.

use serde::{Deserialize, Serialize};

/// What the other side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Peer {
    /// It knows PREPARED and COMMIT.
    MiniVmm,
    /// It knows the stream and `shut`.
    Qemu,
    /// A file, a pipe or a command, which answers nothing: what was written is all that is known.
    /// Only a source has such a peer.
    Nobody,
}

/// The side that gives the VM away.
pub mod source {
    use super::Peer;

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
        /// The disks' locks are being taken back, after an explicit refusal.
        RetakingDisks,
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
        /// The locks could not be given up, or a cancel came first; they are held.
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
        /// The disks' locks are held again.
        DisksTaken,
        /// Someone else holds the locks.
        DisksLost,
        /// The guest is as it was before it was stopped.
        Resumed,
        /// The guest could not be resumed.
        ResumeFailed,
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
        /// Take the disks' locks back; then `DisksTaken` or `DisksLost`.
        RetakeDisks,
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
        state: State,
    }

    impl Source {
        /// A source whose guest runs.
        pub fn new(peer: Peer) -> Self {
            Self { peer, state: State::Running }
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

        /// Whether the destination may already have what it needs to run the guest.
        pub fn is_committed(&self) -> bool {
            matches!(self.state, State::Committing | State::HandedOver | State::InDoubt)
        }

        /// Takes an event. An event that has no meaning in a state changes nothing: answers that
        /// come late are the rule in a network, not an error.
        pub fn on(&mut self, event: Event) -> Action {
            use Event as E;
            use State as S;
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
                (S::ReleasingDisks, E::DisksKept) => (S::Resuming, Action::Resume),

                (S::Committing, E::Confirmed) => (S::HandedOver, Action::HandOver),
                (S::Committing, E::Refused | E::NotCommitted) => {
                    (S::RetakingDisks, Action::RetakeDisks)
                }
                (S::Committing, E::Lost | E::Failed) => (S::InDoubt, Action::Hold),

                (S::InDoubt, E::Confirmed) => (S::HandedOver, Action::HandOver),
                (S::InDoubt, E::Refused) => (S::RetakingDisks, Action::RetakeDisks),

                (S::RetakingDisks, E::DisksTaken) => (S::Resuming, Action::Resume),
                (S::RetakingDisks, E::DisksLost) => (S::InDoubt, Action::Hold),

                (S::Resuming, E::Resumed) => (S::Kept, Action::None),
                (S::Resuming, E::ResumeFailed) => (S::KeptStopped, Action::None),

                (state, _) => (state, Action::None),
            };
            self.state = state;
            action
        }
    }
}

/// The side that takes the VM.
pub mod destination {
    use super::Peer;

    /// Where the hand-over stands.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub enum State {
        /// The stream is being read.
        Receiving,
        /// Everything has come and is being loaded.
        Preparing,
        /// Everything is loaded; the source has the next word.
        AwaitingCommit,
        /// The guest is this side's; its disks are being locked.
        TakingDisks,
        /// `shut(0)` is being sent to a QEMU.
        Acknowledging,
        /// The vCPUs are being started.
        Starting,
        /// End: the guest runs here.
        Running,
        /// End: it does not, and never will.
        Failed,
    }

    /// What happened.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub enum Event {
        /// The whole stream has come.
        Received,
        /// Everything is loaded, checked and built.
        Prepared,
        /// COMMIT came.
        Commit,
        /// The disks are locked and open for writing.
        DisksTaken,
        /// They can't be locked.
        DisksRefused,
        /// `shut(0)` is out (or the source wants none).
        Acknowledged,
        /// The vCPUs run.
        Started,
        /// They don't, and none has.
        StartFailed,
        /// The connection broke, or the source is silent.
        Lost,
        /// Anything else went wrong, or the source takes the guest back.
        Failed,
    }

    /// What is to be done.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub enum Action {
        /// Nothing.
        None,
        /// Load and check everything; then `Prepared` or `Failed`.
        Prepare,
        /// Say PREPARED and wait; then `Commit`, `Lost` or `Failed`.
        SendPrepared,
        /// Lock the disks; then `DisksTaken` or `DisksRefused`.
        TakeDisks,
        /// Send `shut(0)` to a QEMU; then `Acknowledged`, `Lost` or `Failed`.
        Acknowledge,
        /// Start the vCPUs; then `Started` or `StartFailed`.
        Start,
        /// The guest runs: say `shut(0)` to a mini-vmm.
        Announce,
        /// Say why not, as far as the source can hear it.
        Refuse,
        /// Unlock the disks, then say why not.
        ReleaseDisksAndRefuse,
    }

    /// The machine.
    #[derive(Debug, Clone, PartialEq, Eq, Hash)]
    pub struct Destination {
        peer: Peer,
        state: State,
    }

    impl Destination {
        /// A destination that waits for the stream.
        pub fn new(peer: Peer) -> Self {
            Self { peer, state: State::Receiving }
        }

        /// Where it stands.
        pub fn state(&self) -> State {
            self.state
        }

        /// Whether a vCPU may run on this side.
        pub fn may_run(&self) -> bool {
            matches!(self.state, State::Starting | State::Running)
        }

        /// Takes an event. An event that has no meaning in a state changes nothing.
        pub fn on(&mut self, event: Event) -> Action {
            use Event as E;
            use State as S;
            let (state, action) = match (self.state, event) {
                (S::Receiving, E::Received) => (S::Preparing, Action::Prepare),
                (S::Preparing, E::Prepared) if self.peer == Peer::MiniVmm => {
                    (S::AwaitingCommit, Action::SendPrepared)
                }
                (S::Preparing, E::Prepared) => (S::TakingDisks, Action::TakeDisks),
                (S::AwaitingCommit, E::Commit) => (S::TakingDisks, Action::TakeDisks),
                (S::Receiving | S::Preparing | S::AwaitingCommit, E::Lost | E::Failed) => {
                    (S::Failed, Action::Refuse)
                }

                (S::TakingDisks, E::DisksRefused) => (S::Failed, Action::Refuse),
                (S::TakingDisks, E::DisksTaken) if self.peer == Peer::MiniVmm => {
                    (S::Starting, Action::Start)
                }
                (S::TakingDisks, E::DisksTaken) => (S::Acknowledging, Action::Acknowledge),

                (S::Acknowledging, E::Acknowledged) => (S::Starting, Action::Start),
                (S::Acknowledging, E::Lost | E::Failed) => {
                    (S::Failed, Action::ReleaseDisksAndRefuse)
                }

                (S::Starting, E::Started) if self.peer == Peer::MiniVmm => {
                    (S::Running, Action::Announce)
                }
                (S::Starting, E::Started) => (S::Running, Action::None),
                (S::Starting, E::StartFailed) => (S::Failed, Action::ReleaseDisksAndRefuse),

                (state, _) => (state, Action::None),
            };
            self.state = state;
            action
        }
    }
}

#[cfg(test)]
mod tests;
