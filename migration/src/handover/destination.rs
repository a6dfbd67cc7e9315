//! The side that takes the VM.

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
    /// The memory, which is the source's own, is being taken.
    Claiming,
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
    /// They can't be locked, or are not as the source left them: it has taken the guest back since.
    DisksRefused,
    /// `shut(0)` is out (or the source wants none).
    Acknowledged,
    /// The memory is this side's.
    Claimed,
    /// The vCPUs run.
    Started,
    /// They don't, and none has; or the memory is the source's again.
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
    /// Lock the disks, and look whether they are as COMMIT says; then `DisksTaken` or `DisksRefused`.
    TakeDisks,
    /// Send `shut(0)` to a QEMU; then `Acknowledged`, `Lost` or `Failed`.
    Acknowledge,
    /// Take the memory by the ledger; then `Claimed` or `StartFailed`.
    Claim,
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
    ledger: bool,
    state: State,
}

impl Destination {
    /// A destination that waits for the stream.
    pub fn new(peer: Peer) -> Self {
        Self { peer, ledger: false, state: State::Receiving }
    }

    /// The memory is the source's own, and a [ledger](super::ledger) says whose it is.
    #[must_use]
    pub fn by_ledger(self) -> Self {
        Self { ledger: true, ..self }
    }

    /// One in any state, as a machine with a broken guard might come to be.
    #[cfg(test)]
    pub(super) fn in_state(&self, state: State) -> Self {
        Self { state, ..self.clone() }
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
            (S::TakingDisks, E::DisksTaken) if self.ledger => (S::Claiming, Action::Claim),
            (S::TakingDisks, E::DisksTaken) if self.peer == Peer::MiniVmm => {
                (S::Starting, Action::Start)
            }
            (S::TakingDisks, E::DisksTaken) => (S::Acknowledging, Action::Acknowledge),

            (S::Claiming, E::Claimed) => (S::Starting, Action::Start),
            (S::Claiming, E::StartFailed | E::Failed) => (S::Failed, Action::ReleaseDisksAndRefuse),

            (S::Acknowledging, E::Acknowledged) => (S::Starting, Action::Start),
            (S::Acknowledging, E::Lost | E::Failed) => (S::Failed, Action::ReleaseDisksAndRefuse),

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
