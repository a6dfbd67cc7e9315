//! The machines' guards, each of which can be broken on purpose: what a guard is good for is shown
//! by what the checker finds without it.

use super::super::destination::{Action as DAction, Destination, Event as DEvent, State as DState};
use super::super::source::{Action as SAction, Event as SEvent, Source, State as SState};
use super::Handover;

/// A rule that a machine keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guard {
    /// Silence after COMMIT is no refusal.
    SilenceIsNoRefusal,
    /// Nor is it a confirmation.
    SilenceIsNoConfirmation,
    /// A cancel after COMMIT is too late.
    CancelIsTooLate,
    /// COMMIT goes to nobody who has not said PREPARED.
    CommitOnlyToPrepared,
    /// The locks are given up before COMMIT.
    DisksBeforeCommit,
    /// Locks that could not all be given up are all taken again.
    FailedReleaseRetakes,
    /// A failure before COMMIT resumes the guest.
    FailureResumes,
    /// What was refused is taken back with its disks.
    RefusalRetakesDisks,
    /// Locks that somebody else holds end the wish to resume.
    HeldLocksForbidResume,
    /// Disks that have changed end the wish to resume.
    ChangedDisksForbidResume,
    /// Locks taken in vain are given up again.
    LocksTakenInVainAreReleased,
    /// Without an arbiter the operator must give his word before the guest goes on.
    ResumeWantsWord,
    /// ... and before the copy ends.
    DiscardWantsWord,
    /// Disks that nobody holds end the wish to discard.
    FreeLocksForbidDiscard,
    /// So do disks that are held by one that may yet fail to start.
    HeldLocksForbidDiscard,
    /// A doubt can be settled.
    OperatorIsHeard,
    /// The destination waits for COMMIT.
    WaitsForCommit,
    /// It does not run when the source is silent.
    SilenceIsNoCommit,
    /// It does not run after it has given up, whatever comes.
    FailureIsFinal,
    /// It does not run without its disks.
    RunsWithDisksOnly,
    /// Its last word comes when the guest runs, not before.
    LastWordComesLast,
    /// When it can't start it gives the disks back.
    FailedStartReleasesDisks,
    /// Who knows nothing of a migration does not decide it.
    UnknownDecidesNothing,
    /// Where no disk can tell, nothing is decided by looking.
    LookingWantsDisks,
    /// Disks that nobody holds are taken before the guest goes on.
    FreeDisksAreTakenFirst,
    /// A destination says that it will never run the guest when it can't any more.
    AnswersWhatIsForEver,
    /// It says what became of the guest.
    QuestionsAreAnswered,
    /// A source that can't ask looks at the disks.
    DisksAreLookedAt,
    /// An order to run over disks as they once were is refused when they are so no more.
    StaleOrderIsRefused,
    /// A source asks the ledger before it takes its guest back.
    LedgerIsAsked,
    /// ... and takes nothing that the destination has taken.
    TakenMemoryStaysTaken,
    /// A destination takes the memory before its vCPUs run.
    MemoryIsTakenFirst,
    /// One that takes it in vain gives it back.
    FailedStartReturnsMemory,
}

impl Handover {
    pub(super) fn source_on(&self, source: &mut Source, event: SEvent) -> SAction {
        let (state, action) = match self.broken.and_then(|g| broken_source(g, source, event)) {
            Some(wrong) => wrong,
            None => return source.on(event),
        };
        *source = source.in_state(state);
        action
    }

    pub(super) fn destination_on(&self, to: &mut Destination, event: DEvent) -> DAction {
        let (state, action) = match self.broken.and_then(|g| broken_destination(g, to, event)) {
            Some(wrong) => wrong,
            None => return to.on(event),
        };
        *to = to.in_state(state);
        action
    }
}

fn broken_source(guard: Guard, source: &Source, event: SEvent) -> Option<(SState, SAction)> {
    use Guard as G;
    use SAction as A;
    use SEvent as E;
    use SState as S;
    let retake = (S::RetakingDisks { even_changed: false }, A::RetakeDisks);
    let resume = (S::Resuming, A::Resume);
    Some(match (guard, source.state(), event) {
        (G::SilenceIsNoRefusal, S::Committing, E::Lost) => retake,
        (G::SilenceIsNoConfirmation, S::Committing, E::Lost) => (S::HandedOver, A::HandOver),
        (G::CancelIsTooLate, S::Committing, E::Failed) => retake,
        (G::CommitOnlyToPrepared, S::Sending, E::StateSent) => (S::ReleasingDisks, A::ReleaseDisks),
        (G::DisksBeforeCommit, S::AwaitingPrepared, E::Prepared) => (S::Committing, A::Commit),
        (G::FailedReleaseRetakes, S::ReleasingDisks, E::DisksKept) => resume,
        (G::FailureResumes, S::AwaitingPrepared, E::Lost) => (S::InDoubt, A::Hold),
        (G::RefusalRetakesDisks, S::Committing, E::Refused) => resume,
        (G::HeldLocksForbidResume, S::RetakingDisks { .. }, E::DisksLost) => resume,
        (G::ChangedDisksForbidResume, S::RetakingDisks { .. }, E::DisksChanged) => resume,
        (G::LocksTakenInVainAreReleased, S::RetakingDisks { .. }, E::DisksChanged) => {
            (S::InDoubt, A::Hold)
        }
        (G::ResumeWantsWord, S::InDoubt, E::ResumeHere { .. }) => retake,
        (G::DiscardWantsWord, S::InDoubt, E::Discard { .. }) => (S::HandedOver, A::HandOver),
        (G::FreeLocksForbidDiscard, S::ProbingDisks { .. }, E::DisksFree) => {
            (S::HandedOver, A::HandOver)
        }
        (G::HeldLocksForbidDiscard, S::ProbingDisks { .. }, E::DisksLost) => {
            (S::HandedOver, A::HandOver)
        }
        (G::UnknownDecidesNothing, S::InDoubt, E::Unknown) => retake,
        (G::LookingWantsDisks, S::InDoubt, E::Look) => retake,
        (G::FreeDisksAreTakenFirst, S::ProbingDisks { resume_if_free: true }, E::DisksFree) => {
            resume
        }
        (G::DisksAreLookedAt, S::InDoubt, E::Look) => (S::InDoubt, A::Hold),
        (G::LedgerIsAsked, S::Committing, E::Lost) => retake,
        (G::TakenMemoryStaysTaken, S::Reclaiming { .. }, E::MemoryTaken) => retake,
        (G::OperatorIsHeard, S::InDoubt, E::ResumeHere { .. } | E::Discard { .. }) => {
            (S::InDoubt, A::Hold)
        }
        _ => return None,
    })
}

fn broken_destination(
    guard: Guard,
    destination: &Destination,
    event: DEvent,
) -> Option<(DState, DAction)> {
    use DAction as A;
    use DEvent as E;
    use DState as S;
    use Guard as G;
    let take = (S::TakingDisks, A::TakeDisks);
    Some(match (guard, destination.state(), event) {
        (G::WaitsForCommit, S::Preparing, E::Prepared) => take,
        (G::SilenceIsNoCommit, S::AwaitingCommit, E::Lost) => take,
        (G::FailureIsFinal, S::Failed, E::Commit) => take,
        (G::RunsWithDisksOnly, S::TakingDisks, E::DisksRefused) => (S::Starting, A::Start),
        (G::LastWordComesLast, S::TakingDisks, E::DisksTaken) => (S::Acknowledging, A::Acknowledge),
        (G::LastWordComesLast, S::Acknowledging, E::Acknowledged) => (S::Starting, A::Start),
        (G::MemoryIsTakenFirst, S::TakingDisks, E::DisksTaken) => (S::Starting, A::Start),
        (G::FailedStartReleasesDisks, S::Starting, E::StartFailed) => (S::Failed, A::Refuse),
        _ => return None,
    })
}
