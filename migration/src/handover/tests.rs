//! Every pair of state and event, by the table; `model.rs` goes through their orders.

use std::collections::{HashSet, VecDeque};

use super::destination::{Action as DAction, Destination, Event as DEvent, State as DState};
use super::source::{Action as SAction, Event as SEvent, Source, State as SState};
use super::*;

pub(super) const SOURCE_EVENTS: [SEvent; 29] = [
    SEvent::Switch,
    SEvent::Paused,
    SEvent::StateSent,
    SEvent::Prepared,
    SEvent::DisksReleased,
    SEvent::DisksKept,
    SEvent::NotCommitted,
    SEvent::Confirmed,
    SEvent::Refused,
    SEvent::Lost,
    SEvent::Failed,
    SEvent::MemoryKept,
    SEvent::MemoryTaken,
    SEvent::DisksTaken,
    SEvent::DisksLost,
    SEvent::Resumed,
    SEvent::ResumeFailed,
    SEvent::DisksChanged,
    SEvent::DisksFree,
    SEvent::DisksInUse,
    SEvent::DisksFailed,
    SEvent::Unknown,
    SEvent::Look,
    SEvent::ResumeHere { known_dead: false, even_changed: false },
    SEvent::ResumeHere { known_dead: true, even_changed: false },
    SEvent::ResumeHere { known_dead: false, even_changed: true },
    SEvent::ResumeHere { known_dead: true, even_changed: true },
    SEvent::Discard { known_running: false },
    SEvent::Discard { known_running: true },
];

pub(super) const DESTINATION_EVENTS: [DEvent; 11] = [
    DEvent::Received,
    DEvent::Prepared,
    DEvent::Commit,
    DEvent::DisksTaken,
    DEvent::DisksRefused,
    DEvent::Acknowledged,
    DEvent::Claimed,
    DEvent::Started,
    DEvent::StartFailed,
    DEvent::Lost,
    DEvent::Failed,
];

/// A source brought to `state` by the shortest way.
fn source_in(first: Source, state: SState) -> Option<Source> {
    let mut seen = HashSet::from([first.clone()]);
    let mut queue = VecDeque::from([first]);
    while let Some(source) = queue.pop_front() {
        if source.state() == state {
            return Some(source);
        }
        for event in SOURCE_EVENTS {
            let mut next = source.clone();
            next.on(event);
            if seen.insert(next.clone()) {
                queue.push_back(next);
            }
        }
    }
    None
}

fn destination_in(first: Destination, state: DState) -> Option<Destination> {
    let mut seen = HashSet::from([first.clone()]);
    let mut queue = VecDeque::from([first]);
    while let Some(destination) = queue.pop_front() {
        if destination.state() == state {
            return Some(destination);
        }
        for event in DESTINATION_EVENTS {
            let mut next = destination.clone();
            next.on(event);
            if seen.insert(next.clone()) {
                queue.push_back(next);
            }
        }
    }
    None
}

#[test]
fn every_pair_of_the_source_does_what_the_table_says() {
    use SAction as A;
    use SEvent as E;
    use SState as S;
    let end = |e: &E| matches!(e, E::Failed | E::Lost | E::Refused);
    // For each state: what each event leads to. Whatever is not listed changes nothing.
    let table = |peer: Peer,
                 arbiter: Arbiter,
                 fenced: bool,
                 ledger: bool,
                 state: S,
                 event: E|
     -> Option<(S, A)> {
        let locks = arbiter == Arbiter::DiskLocks;
        let disks = |even_changed| Some((S::RetakingDisks { even_changed }, A::RetakeDisks));
        let retake = |even_changed| match ledger {
            true => Some((S::Reclaiming { even_changed }, A::Reclaim)),
            false => disks(even_changed),
        };
        match state {
            S::Running if event == E::Switch => Some((S::Pausing, A::Pause)),
            S::Running if end(&event) => Some((S::Kept, A::None)),
            S::Pausing if event == E::Paused => Some((S::Sending, A::Send)),
            S::Pausing if end(&event) => Some((S::Resuming, A::Resume)),
            S::Sending if event == E::StateSent => Some(match peer {
                Peer::MiniVmm => (S::AwaitingPrepared, A::AwaitPrepared),
                Peer::Qemu | Peer::Nobody => (S::ReleasingDisks, A::ReleaseDisks),
            }),
            S::Sending if end(&event) => Some((S::Resuming, A::Resume)),
            S::AwaitingPrepared if event == E::Prepared => {
                Some((S::ReleasingDisks, A::ReleaseDisks))
            }
            S::AwaitingPrepared if end(&event) => Some((S::Resuming, A::Resume)),
            S::ReleasingDisks if event == E::DisksReleased => Some((S::Committing, A::Commit)),
            S::ReleasingDisks if event == E::DisksKept => disks(false),
            S::Committing if event == E::Confirmed => Some((S::HandedOver, A::HandOver)),
            S::Committing if event == E::Refused || event == E::NotCommitted => retake(false),
            S::Committing if event == E::Lost || event == E::Failed => match ledger {
                true => retake(false),
                false => Some((S::InDoubt, A::Hold)),
            },
            S::InDoubt => match event {
                E::Confirmed => Some((S::HandedOver, A::HandOver)),
                E::Refused => retake(false),
                E::ResumeHere { known_dead, even_changed } if ledger || locks || known_dead => {
                    retake(even_changed)
                }
                E::Discard { known_running: true } => Some((S::HandedOver, A::HandOver)),
                E::Look | E::Discard { .. } if ledger => retake(false),
                E::Discard { .. } if locks => {
                    Some((S::ProbingDisks { resume_if_free: false }, A::ProbeDisks))
                }
                E::Look if locks => {
                    Some((S::ProbingDisks { resume_if_free: fenced }, A::ProbeDisks))
                }
                E::Look | E::Unknown => Some((S::InDoubt, A::Hold)),
                E::ResumeHere { .. } | E::Discard { .. } => Some((S::InDoubt, A::AskForWord)),
                _ => None,
            },
            S::ProbingDisks { resume_if_free } => match event {
                E::DisksFree if resume_if_free => disks(false),
                E::DisksInUse => Some((S::HandedOver, A::HandOver)),
                E::DisksLost => Some((S::InDoubt, A::AskForWord)),
                E::DisksFree | E::DisksFailed => Some((S::InDoubt, A::Hold)),
                _ => None,
            },
            S::Reclaiming { even_changed } => match event {
                E::MemoryKept => disks(even_changed),
                E::Confirmed => Some((S::HandedOver, A::HandOver)),
                E::MemoryTaken => Some((S::InDoubt, A::Hold)),
                _ => None,
            },
            S::RetakingDisks { even_changed } => match event {
                E::DisksTaken => Some((S::Resuming, A::Resume)),
                E::DisksChanged if even_changed => Some((S::Resuming, A::Resume)),
                E::DisksChanged => Some((S::InDoubt, A::ReleaseDisksAndHold)),
                E::DisksLost | E::DisksFailed => Some((S::InDoubt, A::Hold)),
                _ => None,
            },
            S::Resuming if event == E::Resumed => Some((S::Kept, A::None)),
            S::Resuming if event == E::ResumeFailed => Some((S::KeptStopped, A::None)),
            _ => None,
        }
    };
    let states = [
        S::Running,
        S::Pausing,
        S::Sending,
        S::AwaitingPrepared,
        S::ReleasingDisks,
        S::Committing,
        S::Reclaiming { even_changed: false },
        S::Reclaiming { even_changed: true },
        S::RetakingDisks { even_changed: false },
        S::RetakingDisks { even_changed: true },
        S::ProbingDisks { resume_if_free: false },
        S::ProbingDisks { resume_if_free: true },
        S::Resuming,
        S::Kept,
        S::KeptStopped,
        S::HandedOver,
        S::InDoubt,
    ];
    let peers = [Peer::MiniVmm, Peer::Qemu, Peer::Nobody];
    let arbiters = [Arbiter::DiskLocks, Arbiter::Nothing];
    let all = peers.into_iter().flat_map(|p| arbiters.map(|a| (p, a)));
    let all = all.flat_map(|(p, a)| [(p, a, false), (p, a, true)]);
    for (peer, arbiter, fenced, ledger) in
        all.flat_map(|(p, a, f)| [(p, a, f, false), (p, a, f, true)])
    {
        for state in states {
            let source = Source::new(peer, arbiter);
            let source = if fenced { source.fenced() } else { source };
            let source = if ledger { source.by_ledger() } else { source };
            let Some(source) = source_in(source, state) else {
                match state {
                    S::AwaitingPrepared => assert_ne!(peer, Peer::MiniVmm),
                    S::Reclaiming { .. } => assert!(!ledger),
                    S::ProbingDisks { resume_if_free: true } => {
                        assert!(!fenced || ledger || arbiter == Arbiter::Nothing);
                    }
                    S::ProbingDisks { .. } => assert!(ledger || arbiter == Arbiter::Nothing),
                    _ => panic!("{peer:?} {arbiter:?}: {state:?} is unreachable"),
                }
                continue;
            };
            for event in SOURCE_EVENTS {
                let mut next = source.clone();
                let action = next.on(event);
                let expected =
                    table(peer, arbiter, fenced, ledger, state, event).unwrap_or((state, A::None));
                let case = format!("{peer:?} {arbiter:?} {fenced} {ledger} {state:?} {event:?}");
                assert_eq!((next.state(), action), expected, "{case}");
            }
        }
    }
}

#[test]
fn every_pair_of_the_destination_does_what_the_table_says() {
    use DAction as A;
    use DEvent as E;
    use DState as S;
    let lost = |e: E| e == E::Lost || e == E::Failed;
    let table = |peer: Peer, ledger: bool, state: S, event: E| -> Option<(S, A)> {
        let mini = peer == Peer::MiniVmm;
        match (state, event) {
            (S::Receiving, E::Received) => Some((S::Preparing, A::Prepare)),
            (S::Receiving, e) if lost(e) => Some((S::Failed, A::Refuse)),
            (S::Preparing, E::Prepared) if mini => Some((S::AwaitingCommit, A::SendPrepared)),
            (S::Preparing, E::Prepared) => Some((S::TakingDisks, A::TakeDisks)),
            (S::Preparing, e) if lost(e) => Some((S::Failed, A::Refuse)),
            (S::AwaitingCommit, E::Commit) => Some((S::TakingDisks, A::TakeDisks)),
            (S::AwaitingCommit, e) if lost(e) => Some((S::Failed, A::Refuse)),
            (S::TakingDisks, E::DisksTaken) if ledger => Some((S::Claiming, A::Claim)),
            (S::Claiming, E::Claimed) => Some((S::Starting, A::Start)),
            (S::Claiming, E::StartFailed | E::Failed) => {
                Some((S::Failed, A::ReleaseDisksAndRefuse))
            }
            (S::TakingDisks, E::DisksTaken) if mini => Some((S::Starting, A::Start)),
            (S::TakingDisks, E::DisksTaken) => Some((S::Acknowledging, A::Acknowledge)),
            (S::TakingDisks, E::DisksRefused) => Some((S::Failed, A::Refuse)),
            (S::Acknowledging, E::Acknowledged) => Some((S::Starting, A::Start)),
            (S::Acknowledging, e) if lost(e) => Some((S::Failed, A::ReleaseDisksAndRefuse)),
            (S::Starting, E::Started) if mini => Some((S::Running, A::Announce)),
            (S::Starting, E::Started) => Some((S::Running, A::None)),
            (S::Starting, E::StartFailed) => Some((S::Failed, A::ReleaseDisksAndRefuse)),
            _ => None,
        }
    };
    let states = [
        S::Receiving,
        S::Preparing,
        S::AwaitingCommit,
        S::TakingDisks,
        S::Claiming,
        S::Acknowledging,
        S::Starting,
        S::Running,
        S::Failed,
    ];
    // A ledger is there only between two mini-vmms.
    for (peer, ledger) in [(Peer::MiniVmm, false), (Peer::MiniVmm, true), (Peer::Qemu, false)] {
        let first = Destination::new(peer);
        let first = if ledger { first.by_ledger() } else { first };
        for state in states {
            let Some(destination) = destination_in(first.clone(), state) else {
                let never = [(Peer::Qemu, S::AwaitingCommit), (Peer::MiniVmm, S::Acknowledging)];
                let never = never.contains(&(peer, state)) || !ledger && state == S::Claiming;
                assert!(never, "{peer:?} {state:?} is unreachable");
                continue;
            };
            for event in DESTINATION_EVENTS {
                let mut next = destination.clone();
                let action = next.on(event);
                let expected = table(peer, ledger, state, event).unwrap_or((state, A::None));
                let case = format!("{peer:?} {ledger} {state:?} {event:?}");
                assert_eq!((next.state(), action), expected, "{case}");
            }
        }
    }
}
