//! What must be true in every world, and what the checker finds.

use std::collections::HashSet;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::super::ledger::Entry;
use super::super::source::{Action as SAction, State as SState};
use super::guards::Guard;
use super::steps::Step;
use super::{Arbiter, Handover, Harm, Peer, World};

/// Worlds from which a good end is known to be in reach.
pub(super) type Hopeful = Arc<Mutex<HashSet<World>>>;

const ONE_RUNNER: &str = "never two runners";
const ONE_HOLDER: &str = "never two that hold the disks";
const RUNS_WITH_DISKS: &str = "who runs holds the disks";
const FALLS_BACK: &str = "before COMMIT a failure ends with the source running";
const COMMIT_TO_PREPARED: &str = "COMMIT goes to a destination that has said PREPARED";
const NOT_BY_SILENCE: &str = "silence alone settles nothing after COMMIT";
const NO_OLD_MEMORY: &str = "memory never goes on over disks that have changed";
const NO_COPY_LOST: &str = "no plain command ends the last copy";
const GIVEN_TO_SOMEBODY: &str = "who is told that it runs there is told the truth";
const RUNS_OR_HOLDS: &str = "a source in doubt holds no disk that the other side may need";
const SETTLES: &str =
    "a doubt settles by itself while the destination lives, or the disks are as left";
const GOOD_END: &str = "a good end is in reach: it runs on exactly one side";

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![self.beginning()]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        self.steps(world, steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        Some(self.after(world, step))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_RUNNER, |_, w: &World| !(w.here.runs && w.there.runs)),
            Property::always(ONE_HOLDER, |m: &Self, w: &World| {
                !(m.has_disks() && w.here.locks && w.there.locks)
            }),
            Property::always(RUNS_WITH_DISKS, |m: &Self, w: &World| {
                let fine = |side: &super::Side| !side.runs || side.locks;
                !m.has_disks() || fine(&w.here) && fine(&w.there)
            }),
            Property::always(FALLS_BACK, |m: &Self, w: &World| {
                // Unless the operator has booted it anew elsewhere before.
                w.committed || !w.here.alive || w.there.booted || m.falls_back(w)
            }),
            Property::always(COMMIT_TO_PREPARED, |m: &Self, w: &World| {
                m.peer != Peer::MiniVmm || !w.committed || w.prepared
            }),
            Property::always(NOT_BY_SILENCE, |_, w: &World| {
                let open = matches!(
                    w.source.state(),
                    SState::Committing | SState::InDoubt | SState::Reclaiming { .. }
                );
                !w.committed || w.evidence || open
            }),
            Property::always(NO_OLD_MEMORY, |_, w: &World| w.harm != Some(Harm::OldMemory)),
            Property::always(NO_COPY_LOST, |_, w: &World| w.harm != Some(Harm::CopyLost)),
            Property::always(GIVEN_TO_SOMEBODY, |_, w: &World| w.harm != Some(Harm::GivenToNobody)),
            Property::always(RUNS_OR_HOLDS, |m: &Self, w: &World| {
                let releasing = w.source_todo == SAction::ReleaseDisksAndHold;
                let doubt = w.source.state() == SState::InDoubt && w.here.alive;
                !(m.has_disks() && doubt && w.here.locks) || releasing
            }),
            Property::always(GOOD_END, |m: &Self, w: &World| m.may_end_well(w, true)),
            Property::always(SETTLES, |m: &Self, w: &World| {
                let doubt = w.here.alive && w.source.state() == SState::InDoubt;
                let answers = w.there.alive && !w.new_there;
                let disks_tell = m.has_disks() && !w.there.booted && !w.disk_changed;
                let can = match w.ledger {
                    None => m.peer == Peer::MiniVmm && (answers || disks_tell),
                    Some(Entry::Taken) => answers,
                    Some(Entry::Runs) => w.there.runs,
                    Some(_) => !w.there.booted && !w.disk_changed,
                };
                !(doubt && can) || m.may_end_well(w, false)
            }),
            // What the model must be able to tell, or it proves nothing.
            Property::sometimes("handed over", |_, w: &World| {
                w.source.state() == SState::HandedOver && w.there.runs
            }),
            Property::sometimes("kept", |_, w: &World| w.source.state() == SState::Kept),
            Property::sometimes("in doubt, and it runs there", |_, w: &World| {
                w.source.state() == SState::InDoubt && w.there.runs
            }),
            Property::sometimes("resumed by the operator", |_, w: &World| {
                w.committed && w.here.runs && !w.there.alive && w.source.state() == SState::Kept
            }),
            Property::sometimes("a doubt settled by an answer or the disks", |_, w: &World| {
                w.committed && w.here.runs && w.there.alive && w.source.state() == SState::Kept
            }),
            Property::sometimes("moved at the second try", |_, w: &World| {
                w.second && w.source.state() == SState::HandedOver && w.there.runs
            }),
        ]
    }
}

impl World {
    /// The guest runs, on one side, and the other knows that it doesn't there.
    fn has_ended_well(&self) -> bool {
        let settled = !self.here.alive
            || match self.source.state() {
                SState::HandedOver => !self.here.runs,
                SState::Kept | SState::KeptStopped => self.here.runs,
                _ => false,
            };
        settled && self.source_todo == SAction::None && (self.here.runs != self.there.runs)
    }
}

impl Handover {
    /// Whether sides and operator can still bring the guest to run on exactly one side when
    /// nothing more goes wrong; or the sides alone. A guest without disks that died with its process is
    /// beyond help.
    fn may_end_well(&self, world: &World, operator: bool) -> bool {
        let hopeful = if operator { &self.hopeful } else { &self.hopeful_alone };
        let mut hopeful = hopeful.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen = HashSet::from([world.clone()]);
        // The way to each world, so that all on a good one are known to be good.
        let mut path = vec![(world.clone(), Vec::new())];
        self.steps(world, &mut path[0].1);
        while let Some((here, steps)) = path.last_mut() {
            if hopeful.contains(here) || here.has_ended_well() {
                hopeful.extend(path.into_iter().map(|(world, _)| world));
                return true;
            }
            let next = loop {
                match steps.pop() {
                    Some(step) if step.is_benign() && (operator || step.is_by_itself()) => {
                        let next = self.after(here, step);
                        if seen.insert(next.clone()) {
                            break Some(next);
                        }
                    }
                    Some(_) => {}
                    None => break None,
                }
            };
            match next {
                Some(next) => {
                    let mut steps = Vec::new();
                    self.steps(&next, &mut steps);
                    path.push((next, steps));
                }
                None => {
                    path.pop();
                }
            }
        }
        let source_gone = !world.here.alive || world.source.state() == SState::HandedOver;
        // The memory that the source has is what the guest has died in.
        let taken = matches!(world.ledger, Some(Entry::Taken | Entry::Runs));
        let with_it = taken && (!world.there.alive || world.new_there);
        !self.has_disks() && (source_gone || with_it) && !world.there.runs
    }
}

fn say(text: &str) {
    // Past the test harness, which would keep it to itself.
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn check(arbiter: Arbiter, peer: Peer) {
    check_model(Handover::new(arbiter, peer));
}

fn check_model(model: Handover) {
    let begin = Instant::now();
    let (arbiter, peer, local) = (model.arbiter, model.peer, model.local);
    let checker = model.checker().threads(2).spawn_bfs().join();
    say(&format!(
        "hand-over to {peer:?}, {arbiter:?}, local {local}: {} worlds, {} steps between them, {} deep, {:.1?}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        begin.elapsed()
    ));
    for property in checker.model().properties() {
        let name = property.name;
        let found = checker.discovery(name);
        match property.expectation {
            stateright::Expectation::Always => {
                if let Some(path) = found {
                    panic!("not true: {name}\n{}", story(&path));
                }
            }
            _ => assert!(found.is_some(), "it never happens: {name}"),
        }
    }
    assert!(checker.is_done(), "not every world was looked at");
    assert!(checker.unique_state_count() > 1000, "the model is too small to prove anything");
}

/// How it came to this, step by step.
fn story(path: &stateright::Path<World, Step>) -> String {
    let steps: Vec<_> = path.clone().into_actions().iter().map(|s| format!("  {s:?}\n")).collect();
    format!("{}{:#?}", steps.concat(), path.last_state())
}

#[test]
fn the_hand_over_to_a_mini_vmm_is_right_with_disks() {
    check(Arbiter::DiskLocks, Peer::MiniVmm);
}

#[test]
fn the_hand_over_to_a_mini_vmm_is_right_without_disks() {
    check(Arbiter::Nothing, Peer::MiniVmm);
}

#[test]
fn the_hand_over_to_a_qemu_is_right_with_disks() {
    check(Arbiter::DiskLocks, Peer::Qemu);
}

#[test]
fn the_hand_over_to_a_qemu_is_right_without_disks() {
    check(Arbiter::Nothing, Peer::Qemu);
}

#[test]
fn the_hand_over_of_the_memory_itself_is_right_with_disks() {
    check_model(Handover::new(Arbiter::DiskLocks, Peer::MiniVmm).local());
}

#[test]
fn the_hand_over_of_the_memory_itself_is_right_without_disks() {
    check_model(Handover::new(Arbiter::Nothing, Peer::MiniVmm).local());
}

#[test]
fn without_any_one_guard_of_the_ledger_the_check_fails() {
    use Arbiter::{DiskLocks, Nothing};
    use Guard as G;
    for (guard, arbiter, property) in [
        (G::LedgerIsAsked, Nothing, ONE_RUNNER),
        (G::LedgerIsAsked, DiskLocks, NOT_BY_SILENCE),
        (G::TakenMemoryStaysTaken, Nothing, ONE_RUNNER),
        (G::TakenMemoryStaysTaken, DiskLocks, NO_OLD_MEMORY),
        (G::MemoryIsTakenFirst, Nothing, ONE_RUNNER),
        (G::FailedStartReturnsMemory, Nothing, GOOD_END),
        (G::FailedStartReturnsMemory, DiskLocks, SETTLES),
    ] {
        let mut model = Handover::new(arbiter, Peer::MiniVmm).local();
        model.broken = Some(guard);
        let wanted = HasDiscoveries::AnyOf([property].into_iter().collect());
        let checker = model.checker().threads(2).finish_when(wanted).spawn_bfs().join();
        let found = checker.discovery(property).is_some();
        assert!(found, "without {guard:?} nobody misses: {property}");
        say(&format!("without {guard:?}: {property} ({} worlds)", checker.unique_state_count()));
    }
}

#[test]
fn without_any_one_guard_the_check_fails() {
    use Arbiter::{DiskLocks, Nothing};
    use Guard as G;
    for (guard, arbiter, property) in [
        (G::SilenceIsNoRefusal, Nothing, ONE_RUNNER),
        (G::SilenceIsNoRefusal, DiskLocks, NOT_BY_SILENCE),
        (G::SilenceIsNoConfirmation, Nothing, NOT_BY_SILENCE),
        (G::CancelIsTooLate, Nothing, ONE_RUNNER),
        (G::CommitOnlyToPrepared, DiskLocks, COMMIT_TO_PREPARED),
        (G::DisksBeforeCommit, DiskLocks, "handed over"),
        (G::FailedReleaseRetakes, DiskLocks, RUNS_WITH_DISKS),
        (G::FailureResumes, DiskLocks, FALLS_BACK),
        (G::RefusalRetakesDisks, DiskLocks, RUNS_WITH_DISKS),
        (G::HeldLocksForbidResume, DiskLocks, ONE_RUNNER),
        (G::ChangedDisksForbidResume, DiskLocks, NO_OLD_MEMORY),
        (G::LocksTakenInVainAreReleased, DiskLocks, RUNS_OR_HOLDS),
        (G::ResumeWantsWord, Nothing, ONE_RUNNER),
        (G::DiscardWantsWord, Nothing, NO_COPY_LOST),
        (G::FreeLocksForbidDiscard, DiskLocks, NO_COPY_LOST),
        (G::HeldLocksForbidDiscard, DiskLocks, NO_COPY_LOST),
        (G::OperatorIsHeard, DiskLocks, GOOD_END),
        (G::WaitsForCommit, Nothing, ONE_RUNNER),
        (G::SilenceIsNoCommit, Nothing, ONE_RUNNER),
        (G::FailureIsFinal, Nothing, ONE_RUNNER),
        (G::RunsWithDisksOnly, DiskLocks, RUNS_WITH_DISKS),
        (G::LastWordComesLast, DiskLocks, GIVEN_TO_SOMEBODY),
        (G::FailedStartReleasesDisks, DiskLocks, GOOD_END),
        (G::UnknownDecidesNothing, Nothing, NOT_BY_SILENCE),
        (G::LookingWantsDisks, Nothing, NOT_BY_SILENCE),
        (G::FreeDisksAreTakenFirst, DiskLocks, RUNS_WITH_DISKS),
        (G::AnswersWhatIsForEver, Nothing, ONE_RUNNER),
        (G::QuestionsAreAnswered, Nothing, SETTLES),
        (G::DisksAreLookedAt, DiskLocks, SETTLES),
        (G::StaleOrderIsRefused, DiskLocks, NO_OLD_MEMORY),
    ] {
        let mut model = Handover::new(arbiter, Peer::MiniVmm);
        model.broken = Some(guard);
        let wanted = HasDiscoveries::AnyOf([property].into_iter().collect());
        let sometimes = model
            .properties()
            .iter()
            .any(|p| p.name == property && p.expectation == stateright::Expectation::Sometimes);
        let checker = if sometimes {
            model.checker().threads(2).spawn_bfs().join()
        } else {
            model.checker().threads(2).finish_when(wanted).spawn_bfs().join()
        };
        let found = checker.discovery(property);
        // What should happen at times must not; what must always be true must have failed.
        assert_eq!(found.is_none(), sometimes, "without {guard:?} nobody misses: {property}");
        say(&format!("without {guard:?}: {property} ({} worlds)", checker.unique_state_count()));
    }
}
