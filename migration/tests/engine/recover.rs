//! A doubt, and the operator who settles it: what is granted, what is refused, and with which words.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use migration::control::Owed;
use migration::destination;
use migration::fate::{Fate, MigrationId};
use migration::handover::Arbiter;
use migration::source::{self, Doubt, Objection, Outcome, Settled, Wish};

use crate::common::*;

const RESUME: Wish = Wish::Resume { known_dead: false, even_changed: false };
const RESUME_DEAD: Wish = Wish::Resume { known_dead: true, even_changed: false };
const RESUME_ANYHOW: Wish = Wish::Resume { known_dead: true, even_changed: true };
const DISCARD: Wish = Wish::Discard { known_running: false };
const DISCARD_RUNNING: Wish = Wish::Discard { known_running: true };

/// A source that has sent COMMIT and could not take its disks back when that was refused.
fn in_doubt(arbiter: Arbiter) -> (FakeVm, Doubt, Arc<World>) {
    let (mut source, mut destination, world) = two_vms(64);
    source.fault = Fault::ReacquireDisks;
    source.arbiter = arbiter;
    destination.fault = Fault::Start;
    let mut ended = migrate(source, destination, pair(), (control(), control()));
    let Outcome::InDoubt { error, doubt } = ended.outcome else { panic!("{:?}", ended.outcome) };
    assert!(error.chain().contains("the VM can't be started"));
    assert_eq!(doubt.reason(), error.chain());
    assert_eq!(doubt.arbiter(), arbiter);
    assert_eq!((world.runs(), world.disks()), (None, None));
    ended.source.fault = Fault::None;
    (ended.source, doubt, world)
}

/// The wish is refused, nothing has changed, and nobody runs.
fn refused(doubt: Doubt, vm: &mut FakeVm, wish: Wish) -> (Objection, Doubt) {
    let before = (vm.world.runs(), vm.world.disks());
    let Settled::StillInDoubt(objection, doubt) = doubt.recover(vm, wish) else {
        panic!("{wish:?} was granted")
    };
    assert_eq!((vm.world.runs(), vm.world.disks()), before, "{wish:?} changed something");
    (objection, doubt)
}

#[test]
fn free_and_unchanged_disks_let_the_guest_go_on_here_and_no_copy_end() {
    let (mut vm, doubt, world) = in_doubt(Arbiter::DiskLocks);
    let (objection, doubt) = refused(doubt, &mut vm, DISCARD);
    assert!(matches!(objection, Objection::NobodyRunsIt), "{objection}");
    assert!(matches!(doubt.recover(&mut vm, RESUME), Settled::Kept));
    assert_eq!((world.runs(), world.disks()), (Some("source"), Some("source")));
}

#[test]
fn disks_that_another_holds_forbid_to_resume_whatever_the_operator_says() {
    let (mut vm, mut doubt, world) = in_doubt(Arbiter::DiskLocks);
    world.take_disks("destination").unwrap();
    for wish in [RESUME, RESUME_DEAD, RESUME_ANYHOW] {
        let objection;
        (objection, doubt) = refused(doubt, &mut vm, wish);
        assert!(matches!(&objection, Objection::Held(by) if by.contains("destination")));
        assert!(objection.to_string().contains("must not run here too"), "{objection}");
    }
    // It holds them, but it has not said that it runs.
    let (objection, doubt) = refused(doubt, &mut vm, DISCARD);
    assert!(matches!(objection, Objection::HeldBySomeone(_)), "{objection}");
    assert!(matches!(doubt.recover(&mut vm, DISCARD_RUNNING), Settled::HandedOver));
    assert_eq!((world.runs(), world.disks()), (None, Some("destination")));
}

#[test]
fn a_guest_that_runs_there_ends_the_copy_here() {
    let (mut vm, doubt, world) = in_doubt(Arbiter::DiskLocks);
    world.take_disks("destination").unwrap();
    world.run("destination");
    let (objection, doubt) = refused(doubt, &mut vm, RESUME);
    assert!(matches!(objection, Objection::Held(_)), "{objection}");
    assert!(matches!(doubt.recover(&mut vm, DISCARD), Settled::HandedOver));
    assert_eq!(world.runs(), Some("destination"));
}

#[test]
fn disks_that_have_been_written_to_forbid_to_resume_unless_that_is_said() {
    let (mut vm, doubt, world) = in_doubt(Arbiter::DiskLocks);
    world.disks_written.store(true, Ordering::Relaxed);
    let (objection, doubt) = refused(doubt, &mut vm, RESUME);
    assert!(matches!(objection, Objection::Changed(_)), "{objection}");
    let (objection, doubt) = refused(doubt, &mut vm, RESUME_DEAD);
    assert!(objection.to_string().contains("--even-though-the-disks-have-changed"), "{objection}");
    assert!(matches!(doubt.recover(&mut vm, RESUME_ANYHOW), Settled::Kept));
    assert_eq!((world.runs(), world.disks()), (Some("source"), Some("source")));
}

#[test]
fn without_disks_only_the_operators_word_settles_it() {
    let (mut vm, doubt, world) = in_doubt(Arbiter::Nothing);
    let (objection, doubt) = refused(doubt, &mut vm, RESUME);
    assert!(matches!(objection, Objection::CantTellDead), "{objection}");
    let (objection, doubt) = refused(doubt, &mut vm, DISCARD);
    assert!(matches!(objection, Objection::CantTellRunning), "{objection}");
    assert!(matches!(doubt.recover(&mut vm, RESUME_DEAD), Settled::Kept));
    assert_eq!(world.runs(), Some("source"));

    let (mut vm, doubt, world) = in_doubt(Arbiter::Nothing);
    assert!(matches!(doubt.recover(&mut vm, DISCARD_RUNNING), Settled::HandedOver));
    assert_eq!(world.runs(), None);
    assert!(world.history.lock().unwrap().iter().any(|h| h == "handed over"));
}

#[test]
fn disks_that_do_not_open_leave_the_doubt_for_another_try() {
    let (mut vm, doubt, world) = in_doubt(Arbiter::DiskLocks);
    vm.fault = Fault::ReacquireDisks;
    let (objection, doubt) = refused(doubt, &mut vm, RESUME);
    assert!(objection.to_string().contains("ReacquireDisks"), "{objection}");
    vm.fault = Fault::None;
    assert!(matches!(doubt.recover(&mut vm, RESUME), Settled::Kept));
    assert_eq!(world.runs(), Some("source"));
}

#[test]
fn a_guest_that_can_t_be_resumed_is_kept_all_the_same() {
    let (mut vm, doubt, world) = in_doubt(Arbiter::DiskLocks);
    vm.fault = Fault::Resume;
    let Settled::KeptStopped(error) = doubt.recover(&mut vm, RESUME) else { panic!("resumed") };
    assert!(error.to_string().contains("Resume"), "{error}");
    assert_eq!((world.runs(), world.disks()), (None, Some("source")));
}

#[test]
fn an_answer_settles_it_and_no_other_words_do() {
    for arbiter in [Arbiter::DiskLocks, Arbiter::Nothing] {
        let (mut vm, doubt, world) = in_doubt(arbiter);
        assert!(doubt.id().is_some());
        let Settled::StillInDoubt(_, doubt) = doubt.hear(&mut vm, Fate::Unknown) else {
            panic!("whoever knows nothing has decided")
        };
        assert_eq!((world.runs(), world.disks()), (None, None));
        assert!(matches!(doubt.hear(&mut vm, Fate::NeverHere), Settled::Kept));
        assert_eq!(world.runs(), Some("source"));

        let (mut vm, doubt, world) = in_doubt(arbiter);
        world.take_disks("destination").unwrap();
        world.run("destination");
        assert!(matches!(doubt.hear(&mut vm, Fate::Runs), Settled::HandedOver));
        assert_eq!(world.runs(), Some("destination"));
    }
}

#[test]
fn disks_settle_it_when_nobody_can_be_asked() {
    // Free, and as they were left.
    let (mut vm, doubt, world) = in_doubt(Arbiter::DiskLocks);
    assert!(matches!(doubt.look(&mut vm), Settled::Kept));
    assert_eq!((world.runs(), world.disks()), (Some("source"), Some("source")));
    // Held, but not by one that says it runs.
    let (mut vm, doubt, world) = in_doubt(Arbiter::DiskLocks);
    world.take_disks("destination").unwrap();
    let Settled::StillInDoubt(_, doubt) = doubt.look(&mut vm) else { panic!("settled") };
    assert_eq!(world.runs(), None);
    world.run("destination");
    assert!(matches!(doubt.look(&mut vm), Settled::HandedOver));
    // Free, but written to.
    let (mut vm, doubt, world) = in_doubt(Arbiter::DiskLocks);
    world.disks_written.store(true, Ordering::Relaxed);
    let Settled::StillInDoubt(objection, _) = doubt.look(&mut vm) else { panic!("settled") };
    assert!(matches!(objection, Objection::Changed(_)), "{objection}");
    assert_eq!((world.runs(), world.disks()), (None, None));
    // None to look at.
    let (mut vm, doubt, world) = in_doubt(Arbiter::Nothing);
    let Settled::StillInDoubt(objection, _) = doubt.look(&mut vm) else { panic!("settled") };
    assert!(matches!(objection, Objection::NothingLearned), "{objection}");
    assert_eq!(world.runs(), None);
}

/// What a source that asks for `id` is told by a destination that knows `owed`, and whether that hears
/// that it was heard.
fn asked(owed: Owed, id: MigrationId) -> (Fate, bool) {
    let (a, b) = pair();
    let there = thread::spawn(move || destination::answer(b, &owed, DEADLINE));
    let answer = source::ask(a, MACHINE.into(), id, DEADLINE).unwrap();
    let fate = answer.fate();
    answer.is_settled();
    (fate, join(there))
}

#[test]
fn a_destination_answers_for_the_migration_that_it_knows_and_for_no_other() {
    let (id, patience) = (MigrationId::random(), Duration::from_secs(1));
    for fate in [Fate::Runs, Fate::NeverHere] {
        let owed = Owed { id, fate, patience };
        assert_eq!(asked(owed, id), (fate, true));
        assert_eq!(asked(owed, MigrationId::random()), (Fate::Unknown, false));
    }
    // One that waits for its first migration knows of none, and waits on.
    let (_, mut waiting, _) = two_vms(8);
    let (a, b) = pair();
    let there = thread::spawn(move || destination::run(&mut waiting, b, &control()).unwrap_err());
    let answer = source::ask(a, MACHINE.into(), id, DEADLINE).unwrap();
    assert_eq!(answer.fate(), Fate::Unknown);
    drop(answer);
    let failure = join(there);
    assert!(failure.vm_untouched, "{failure:?}");
    assert!(failure.to_string().contains(&id.to_string()), "{failure}");
}

#[test]
fn silence_and_nonsense_are_no_answers() {
    let (id, short) = (MigrationId::random(), Duration::from_millis(100));
    let (a, b) = pair();
    let error = source::ask(a, MACHINE.into(), id, short).unwrap_err();
    assert!(error.to_string().contains("stands still"), "{error}");
    drop(b);
    let (a, b) = pair();
    drop(b);
    assert!(source::ask(a, MACHINE.into(), id, DEADLINE).is_err());
    // A source of another kind comes to a VM that has arrived.
    let (a, b) = pair();
    let owed = Owed { id, fate: Fate::Runs, patience: short };
    let there = thread::spawn(move || destination::answer(b, &owed, DEADLINE));
    let (mut source, ..) = two_vms(8);
    let Outcome::Kept { error } = source::run(&mut source, a, &control()) else { panic!("moved") };
    assert!(error.chain().contains("waits for no migration"), "{}", error.chain());
    assert!(!join(there));
}

/// What a destination with this fault owes its source afterwards.
fn owed(fault: Fault) -> (Ended, Option<Owed>) {
    let (source, mut destination, _) = two_vms(8);
    destination.fault = fault;
    let there = control();
    let ended = migrate(source, destination, pair(), (control(), there.clone()));
    (ended, there.owed())
}

#[test]
fn a_source_that_has_heard_says_so_and_is_owed_nothing() {
    let (ended, owes) = owed(Fault::None);
    assert_moved(&ended);
    assert_eq!(owes, None);
    // It heard the refusal.
    let (ended, owes) = owed(Fault::Start);
    assert_kept(&ended, "the VM can't be started");
    assert_eq!(owes, None);
    // Before PREPARED it can be in no doubt.
    let (ended, owes) = owed(Fault::Prepare);
    assert_kept(&ended, "Prepare");
    assert_eq!(owes, None);
}

#[test]
fn an_order_is_good_for_disks_as_they_were_left_and_no_others() {
    let (mut source, mut destination, world) = two_vms(8);
    use migration::guest::{DestinationVm, SourceVm};
    source.pause().unwrap();
    SourceVm::release_disks(&mut source).unwrap();
    let order = source.left_disks();
    // The source takes its guest back, and the guest ends; then the order is read.
    assert_eq!(source.reacquire_disks().unwrap(), migration::guest::TakenBack::AsLeft);
    SourceVm::release_disks(&mut source).unwrap();
    assert!(destination.take_disks(&order).is_err());
    assert_eq!(world.disks(), None);
    destination.take_disks(&source.left_disks()).unwrap();
}
