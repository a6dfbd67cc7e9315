//! A panic anywhere on a migration's way: the migration ends all the same, with words, and the guest is
//! where the hand-over has it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use migration::control::Control;
use migration::destination::DestinationError;
use migration::phase::Phase;
use migration::source::{Outcome, Settled, Wish};
use migration::transport::Links;

use crate::common::*;

/// Both sides, of which one panics.
fn with(source_panics: Fault, destination_panics: Fault) -> (Ended, Arc<Control>, Arc<Control>) {
    let (mut source, mut destination, _) = two_vms(64);
    (source.fault, source.panics) = (source_panics, true);
    (destination.fault, destination.panics) = (destination_panics, true);
    let controls = (control(), control());
    let ended = migrate(source, destination, pair(), controls.clone());
    (ended, controls.0, controls.1)
}

/// The migration is over, as seen from outside, and says this.
fn failed(control: &Control, words: &str) {
    let info = control.info();
    assert_eq!(info.status, Some(Phase::Failed));
    let said = info.error_desc.unwrap_or_default();
    assert!(said.contains(words), "'{words}' is not in: {said}");
    assert!(said.contains("a fault of mini-vmm itself"), "{said}");
}

/// The guest moves to a fresh destination after all.
fn moves_after_all(mut source: FakeVm) {
    let destination = FakeVm::new("destination", &source.world, 64);
    source.fault = Fault::None;
    assert_moved(&migrate(source, destination, pair(), (control(), control())));
}

#[test]
fn a_source_that_panics_before_the_order_goes_on_with_its_guest() {
    for (fault, during) in [
        (Fault::Details, "the two sides got to know each other"),
        (Fault::Log, "RAM was sent"),
        (Fault::Pause, "the guest was stopped"),
        (Fault::Paused, "the guest was stopped"),
        (Fault::Drain, "the guest was stopped"),
        (Fault::ReadState, "the guest's state was sent"),
        (Fault::Sections, "the guest's state was sent"),
        (Fault::LastSection, "the guest's state was sent"),
        (Fault::ReleaseDisks, "giving up the disks' locks failed"),
    ] {
        let (ended, here, there) = with(fault, Fault::None);
        assert_kept(&ended, &format!("{fault:?} was told to panic"));
        failed(&here, during);
        // It hears why, unless it was never told that it is a migration.
        let said = ended.arrived.as_ref().unwrap_err().error.chain();
        assert!(fault == Fault::Details || said.contains("was told to panic"), "{said}");
        assert_eq!(there.info().status, Some(Phase::Failed));
        moves_after_all(ended.source);
    }
}

#[test]
fn a_source_that_panics_over_the_order_is_in_doubt() {
    let (mut ended, here, _) = with(Fault::LeftDisks, Fault::None);
    let Outcome::InDoubt { doubt, .. } = ended.outcome else { panic!("{:?}", ended.outcome) };
    failed(&here, "it is not known whether the destination runs the guest");
    let world = ended.source.world.clone();
    assert_eq!((world.runs(), world.disks()), (None, None));
    assert!(here.cancel().is_err(), "too late");
    // Nothing had left; the disks show it.
    ended.source.fault = Fault::None;
    assert!(matches!(doubt.look(&mut ended.source), Settled::Kept));
    assert_eq!((world.runs(), world.disks()), (Some("source"), Some("source")));
    moves_after_all(ended.source);
}

#[test]
fn a_source_that_panics_when_it_takes_its_disks_back_is_in_doubt() {
    let (mut ended, here, _) = with(Fault::ReacquireDisks, Fault::TakeDisks);
    let Outcome::InDoubt { mut doubt, .. } = ended.outcome else { panic!("{:?}", ended.outcome) };
    failed(&here, "it is not known whether the destination runs the guest");
    assert_eq!(ended.source.world.runs(), None);
    // Nor does it end the doubt when it does so again.
    let resume = Wish::Resume { known_dead: false, even_changed: false };
    let Settled::StillInDoubt(why, again) = doubt.recover(&mut ended.source, resume) else {
        panic!("it was granted")
    };
    assert!(why.to_string().contains("was told to panic"), "{why}");
    doubt = again;
    ended.source.fault = Fault::None;
    assert!(matches!(doubt.recover(&mut ended.source, resume), Settled::Kept));
    assert_eq!(ended.source.world.runs(), Some("source"));
}

#[test]
fn a_guest_whose_resume_panics_is_kept_and_said_to_stand() {
    let (ended, here, _) = with(Fault::Resume, Fault::Prepare);
    let Outcome::KeptStopped { resume, .. } = &ended.outcome else { panic!("{:?}", ended.outcome) };
    assert!(resume.to_string().contains("Resume was told to panic"), "{resume}");
    failed(&here, "Prepare was told to panic");
}

#[test]
fn a_guest_that_has_moved_has_moved_whatever_panics_after_it() {
    let (ended, here, _) = with(Fault::HandOver, Fault::None);
    assert_moved(&ended);
    assert_eq!(here.info().status, Some(Phase::Completed));
}

#[test]
fn a_destination_that_panics_refuses_and_takes_nobody_any_more() {
    for fault in [Fault::Prepare, Fault::TakeDisks] {
        let (ended, _, there) = with(Fault::None, fault);
        assert_kept(&ended, &format!("{fault:?} was told to panic"));
        failed(&there, "was told to panic");
        let failure = ended.arrived.unwrap_err();
        assert!(!failure.vm_untouched, "{failure:?}");
        moves_after_all(ended.source);
    }
}

#[test]
fn a_destination_that_panics_while_it_starts_the_guest_says_nothing_about_it() {
    let (mut ended, _, there) = with(Fault::None, Fault::Start);
    let failure = ended.arrived.unwrap_err();
    assert!(matches!(failure.error, DestinationError::Panicked { .. }), "{failure:?}");
    assert!(!failure.vm_untouched);
    failed(&there, "Start was told to panic");
    assert_eq!(there.owed(), None, "whether it has run is not known");
    let Outcome::InDoubt { doubt, .. } = ended.outcome else { panic!("{:?}", ended.outcome) };
    let world = ended.source.world.clone();
    assert_eq!((world.runs(), world.disks()), (None, Some("destination")));
    let Settled::StillInDoubt(_, doubt) = doubt.look(&mut ended.source) else {
        panic!("somebody holds the disks")
    };
    // Its process ends, and its locks with it.
    world.drop_disks("destination");
    assert!(matches!(doubt.look(&mut ended.source), Settled::Kept));
    assert_eq!(world.runs(), Some("source"));
}

#[test]
fn memory_that_panics_ends_the_migration_over_one_connection_or_several() {
    for count in [0, 3] {
        for source_panics in [true, false] {
            let (source, mut destination, _) = two_vms(1024);
            let ram = if source_panics { &source.ram } else { &destination.ram };
            ram.panics.store(true, Ordering::Relaxed);
            let (main, there) = pair();
            let (pages, beside) = (0..count).map(|_| pair()).unzip();
            destination.beside = beside;
            let controls = (control(), control());
            let links = Links { main, pages };
            let ended = migrate(source, destination, (links, there), controls.clone());
            assert_kept(&ended, "memory was told to panic");
            assert!(ended.arrived.is_err());
            let own = if source_panics { &controls.0 } else { &controls.1 };
            failed(own, "memory was told to panic");
            ended.source.ram.panics.store(false, Ordering::Relaxed);
            let destination = FakeVm::new("destination", &ended.source.world, 1024);
            assert_moved(&migrate(ended.source, destination, pair(), (control(), control())));
        }
    }
}
