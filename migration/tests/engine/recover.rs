//! A doubt, and the operator who settles it: what is granted, what is refused, and with which words.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use migration::handover::Arbiter;
use migration::source::{Doubt, Objection, Outcome, Settled, Wish};

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
