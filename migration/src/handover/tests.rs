//! Every pair of state and event, and a search through every order of events, losses and crashes.

use std::collections::{HashSet, VecDeque};

use super::destination::{Action as DAction, Destination, Event as DEvent, State as DState};
use super::source::{Action as SAction, Event as SEvent, Source, State as SState};
use super::*;

const SOURCE_EVENTS: [SEvent; 15] = [
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
    SEvent::DisksTaken,
    SEvent::DisksLost,
    SEvent::Resumed,
    SEvent::ResumeFailed,
];

const DESTINATION_EVENTS: [DEvent; 10] = [
    DEvent::Received,
    DEvent::Prepared,
    DEvent::Commit,
    DEvent::DisksTaken,
    DEvent::DisksRefused,
    DEvent::Acknowledged,
    DEvent::Started,
    DEvent::StartFailed,
    DEvent::Lost,
    DEvent::Failed,
];

/// A source brought to `state` by the shortest way.
fn source_in(peer: Peer, state: SState) -> Option<Source> {
    let mut seen = HashSet::from([Source::new(peer)]);
    let mut queue = VecDeque::from([Source::new(peer)]);
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

fn destination_in(peer: Peer, state: DState) -> Option<Destination> {
    let mut seen = HashSet::from([Destination::new(peer)]);
    let mut queue = VecDeque::from([Destination::new(peer)]);
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
    let table = |peer: Peer, state: S, event: E| -> Option<(S, A)> {
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
            S::ReleasingDisks if event == E::DisksKept => Some((S::Resuming, A::Resume)),
            S::Committing if event == E::Confirmed => Some((S::HandedOver, A::HandOver)),
            S::Committing if event == E::Refused || event == E::NotCommitted => {
                Some((S::RetakingDisks, A::RetakeDisks))
            }
            S::Committing if event == E::Lost || event == E::Failed => Some((S::InDoubt, A::Hold)),
            S::InDoubt if event == E::Confirmed => Some((S::HandedOver, A::HandOver)),
            S::InDoubt if event == E::Refused => Some((S::RetakingDisks, A::RetakeDisks)),
            S::RetakingDisks if event == E::DisksTaken => Some((S::Resuming, A::Resume)),
            S::RetakingDisks if event == E::DisksLost => Some((S::InDoubt, A::Hold)),
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
        S::RetakingDisks,
        S::Resuming,
        S::Kept,
        S::KeptStopped,
        S::HandedOver,
        S::InDoubt,
    ];
    for peer in [Peer::MiniVmm, Peer::Qemu, Peer::Nobody] {
        for state in states {
            let Some(source) = source_in(peer, state) else {
                assert_ne!(peer, Peer::MiniVmm, "{state:?} is unreachable");
                assert_eq!(state, S::AwaitingPrepared, "unreachable");
                continue;
            };
            for event in SOURCE_EVENTS {
                let mut next = source.clone();
                let action = next.on(event);
                let expected = table(peer, state, event).unwrap_or((state, A::None));
                assert_eq!((next.state(), action), expected, "{peer:?} {state:?} {event:?}");
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
    let table = |peer: Peer, state: S, event: E| -> Option<(S, A)> {
        let mini = peer == Peer::MiniVmm;
        match (state, event) {
            (S::Receiving, E::Received) => Some((S::Preparing, A::Prepare)),
            (S::Receiving, e) if lost(e) => Some((S::Failed, A::Refuse)),
            (S::Preparing, E::Prepared) if mini => Some((S::AwaitingCommit, A::SendPrepared)),
            (S::Preparing, E::Prepared) => Some((S::TakingDisks, A::TakeDisks)),
            (S::Preparing, e) if lost(e) => Some((S::Failed, A::Refuse)),
            (S::AwaitingCommit, E::Commit) => Some((S::TakingDisks, A::TakeDisks)),
            (S::AwaitingCommit, e) if lost(e) => Some((S::Failed, A::Refuse)),
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
        S::Acknowledging,
        S::Starting,
        S::Running,
        S::Failed,
    ];
    for peer in [Peer::MiniVmm, Peer::Qemu] {
        for state in states {
            let Some(destination) = destination_in(peer, state) else {
                let never = [(Peer::Qemu, S::AwaitingCommit), (Peer::MiniVmm, S::Acknowledging)];
                assert!(never.contains(&(peer, state)), "{peer:?} {state:?} is unreachable");
                continue;
            };
            for event in DESTINATION_EVENTS {
                let mut next = destination.clone();
                let action = next.on(event);
                let expected = table(peer, state, event).unwrap_or((state, A::None));
                assert_eq!((next.state(), action), expected, "{peer:?} {state:?} {event:?}");
            }
        }
    }
}

/// A message between the two, as far as the hand-over cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Msg {
    State,
    Prepared,
    Commit,
    Shut0,
    Refused,
}

/// Both machines, what is under way between them, and the disks' lock.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    source: Source,
    destination: Destination,
    source_todo: SAction,
    destination_todo: DAction,
    forth: VecDeque<Msg>,
    back: VecDeque<Msg>,
    connected: bool,
    source_alive: bool,
    destination_alive: bool,
    source_runs: bool,
    destination_runs: bool,
    source_locks: bool,
    destination_locks: bool,
    /// The VM has disks whose locks arbitrate. One without must be as safe.
    has_disks: bool,
}

impl World {
    fn new(has_disks: bool) -> Self {
        let mut source = Source::new(Peer::MiniVmm);
        let todo = source.on(SEvent::Switch);
        Self {
            source,
            destination: Destination::new(Peer::MiniVmm),
            source_todo: todo,
            destination_todo: DAction::None,
            forth: VecDeque::new(),
            back: VecDeque::new(),
            connected: true,
            source_alive: true,
            destination_alive: true,
            source_runs: true,
            destination_runs: false,
            source_locks: true,
            destination_locks: false,
            has_disks,
        }
    }

    fn send_forth(&mut self, msg: Msg) {
        if self.connected {
            self.forth.push_back(msg);
        }
    }

    fn send_back(&mut self, msg: Msg) {
        if self.connected {
            self.back.push_back(msg);
        }
    }

    fn source_event(mut self, event: SEvent) -> Self {
        self.source_todo = self.source.on(event);
        if self.source_todo == SAction::HandOver {
            self.source_todo = SAction::None;
        }
        self
    }

    fn destination_event(mut self, event: DEvent) -> Self {
        self.destination_todo = self.destination.on(event);
        self
    }

    /// Every world that can come next.
    fn next(&self) -> Vec<World> {
        let mut worlds = Vec::new();
        let w = || self.clone();
        if self.source_alive {
            match self.source_todo {
                SAction::Pause => {
                    let mut a = w();
                    a.source_runs = false;
                    worlds.push(a.clone().source_event(SEvent::Paused));
                    worlds.push(a.source_event(SEvent::Failed));
                }
                SAction::Send => {
                    let mut a = w();
                    a.send_forth(Msg::State);
                    worlds.push(a.source_event(SEvent::StateSent));
                    worlds.push(w().source_event(SEvent::Failed));
                }
                SAction::ReleaseDisks => {
                    let mut a = w();
                    a.source_locks = false;
                    worlds.push(a.source_event(SEvent::DisksReleased));
                    worlds.push(w().source_event(SEvent::DisksKept));
                }
                SAction::Commit => {
                    let mut a = w();
                    a.send_forth(Msg::Commit);
                    a.source_todo = SAction::None;
                    worlds.push(a);
                    worlds.push(w().source_event(SEvent::NotCommitted));
                }
                SAction::RetakeDisks => {
                    let mut a = w();
                    if a.has_disks && a.destination_locks {
                        worlds.push(a.source_event(SEvent::DisksLost));
                    } else {
                        a.source_locks = true;
                        worlds.push(a.source_event(SEvent::DisksTaken));
                    }
                }
                SAction::Resume => {
                    let mut a = w();
                    a.source_runs = true;
                    worlds.push(a.source_event(SEvent::Resumed));
                    worlds.push(w().source_event(SEvent::ResumeFailed));
                }
                _ => {}
            }
            if let Some(msg) = self.back.front() {
                let mut a = w();
                a.back.pop_front();
                worlds.push(match msg {
                    Msg::Prepared => a.source_event_if_waiting(SEvent::Prepared),
                    Msg::Shut0 => a.source_event_if_waiting(SEvent::Confirmed),
                    _ => a.source_event_if_waiting(SEvent::Refused),
                });
            } else if !self.connected || self.back.is_empty() {
                // A broken connection, or the source's patience runs out.
                worlds.push(w().source_event_if_waiting(SEvent::Lost));
            }
        }
        if self.destination_alive {
            match self.destination_todo {
                DAction::Prepare => {
                    worlds.push(w().destination_event(DEvent::Prepared));
                    worlds.push(w().destination_event(DEvent::Failed));
                }
                DAction::SendPrepared => {
                    let mut a = w();
                    a.send_back(Msg::Prepared);
                    a.destination_todo = DAction::None;
                    worlds.push(a);
                }
                DAction::TakeDisks => {
                    let mut a = w();
                    if !a.has_disks || !a.source_locks {
                        a.destination_locks = true;
                        worlds.push(a.destination_event(DEvent::DisksTaken));
                    }
                    worlds.push(w().destination_event(DEvent::DisksRefused));
                }
                DAction::Start => {
                    let mut a = w();
                    a.destination_runs = true;
                    worlds.push(a.destination_event(DEvent::Started));
                    worlds.push(w().destination_event(DEvent::StartFailed));
                }
                DAction::Announce => {
                    let mut a = w();
                    a.send_back(Msg::Shut0);
                    a.destination_todo = DAction::None;
                    worlds.push(a);
                }
                DAction::Refuse | DAction::ReleaseDisksAndRefuse => {
                    let mut a = w();
                    a.destination_locks = false;
                    a.send_back(Msg::Refused);
                    a.destination_todo = DAction::None;
                    worlds.push(a);
                }
                DAction::Acknowledge | DAction::None => {}
            }
            if self.destination_todo == DAction::None {
                if let Some(msg) = self.forth.front() {
                    let mut a = w();
                    a.forth.pop_front();
                    worlds.push(match msg {
                        Msg::State => a.destination_event(DEvent::Received),
                        _ => a.destination_event(DEvent::Commit),
                    });
                } else {
                    worlds.push(w().destination_event(DEvent::Lost));
                }
            }
        }
        if self.connected {
            // What is under way arrives up to any point, then nothing more.
            for (f, b) in
                (0..=self.forth.len()).flat_map(|f| (0..=self.back.len()).map(move |b| (f, b)))
            {
                let mut a = w();
                a.connected = false;
                a.forth.truncate(f);
                a.back.truncate(b);
                worlds.push(a);
            }
        }
        if self.source_alive {
            let mut a = w();
            (a.source_alive, a.source_runs, a.source_locks) = (false, false, false);
            worlds.push(a);
        }
        if self.destination_alive {
            let mut a = w();
            (a.destination_alive, a.destination_runs, a.destination_locks) = (false, false, false);
            worlds.push(a);
        }
        worlds
    }

    /// Messages and losses reach the source while it waits for the other side, not while it is
    /// busy with its own machine.
    fn source_event_if_waiting(self, event: SEvent) -> Self {
        match self.source_todo {
            SAction::None | SAction::AwaitPrepared | SAction::Hold => {
                let todo = self.source_todo;
                let mut next = self.source_event(event);
                if next.source_todo == SAction::None && !next.source.is_committed() {
                    next.source_todo = todo;
                }
                next
            }
            _ => self,
        }
    }
}

#[test]
fn no_order_of_events_lets_both_sides_run() {
    explore(true);
}

#[test]
fn nor_does_any_when_there_are_no_disks_to_arbitrate() {
    explore(false);
}

fn explore(has_disks: bool) {
    let mut seen = HashSet::from([World::new(has_disks)]);
    let mut queue = VecDeque::from([World::new(has_disks)]);
    let (mut handed_over, mut kept, mut doubt) = (0, 0, 0);
    while let Some(world) = queue.pop_front() {
        assert!(!(world.source_runs && world.destination_runs), "both run: {world:?}");
        let both_lock = world.source_locks && world.destination_locks;
        assert!(!(has_disks && both_lock), "both lock: {world:?}");
        assert!(!world.source_runs || world.source.may_run(), "{world:?}");
        assert!(!world.source_runs || world.source_locks, "runs without its disks: {world:?}");
        assert!(!world.destination_runs || world.destination_locks, "{world:?}");
        // A source that knows of no COMMIT has lost nothing: the guest is with it.
        match world.source.state() {
            SState::HandedOver => {
                assert!(world.destination_runs || !world.destination_alive, "{world:?}");
                handed_over += 1;
            }
            SState::Kept => kept += 1,
            SState::InDoubt => doubt += 1,
            _ => {}
        }
        for next in world.next() {
            if seen.insert(next.clone()) {
                queue.push_back(next);
            }
        }
    }
    assert!(handed_over > 0 && kept > 0 && doubt > 0, "{handed_over} {kept} {doubt}");
    assert!(seen.len() > 200, "only {} worlds were seen", seen.len());
}
