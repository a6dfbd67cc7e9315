//! Memory that is not copied: both sides see a ledger of whose it is, and whatever becomes of either of
//! them, the guest runs once at most, and never with older registers in memory in which it has run since.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use migration::control::Control;
use migration::destination;
use migration::handover::Arbiter;
use migration::handover::ledger::Entry;
use migration::params::Parameters;
use migration::source::{Objection, Outcome, Settled, Wish};
use migration::transport::Connection;

use crate::common::*;

fn local(change: impl FnOnce(&mut Parameters)) -> (Arc<Control>, Arc<Control>) {
    let here = control_with(|p| {
        p.local = true;
        change(p);
    });
    (here, control())
}

/// Moves it without a fault.
fn moves(mut source: FakeVm) {
    source.fault = Fault::None;
    let world = source.world.clone();
    let destination = FakeVm::new("destination", &world, 64);
    let ended = migrate(source, destination, pair(), local(|_| {}));
    assert_moved(&ended);
    assert_eq!(world.ledger().entry(), Entry::Runs);
}

#[test]
fn the_memory_arrives_and_no_page_of_it_travels() {
    let (mut source, destination, world) = two_vms(4096);
    source.dirty(300, 20);
    let controls = local(|_| {});
    let ended = migrate(source, destination, pair(), controls.clone());
    assert_moved(&ended);
    assert_eq!(world.ledger().entry(), Entry::Runs);
    // The three of the other block.
    let report = controls.0.report();
    assert_eq!(report.normal_pages + report.zero_pages, 3);
    assert!(report.transferred_bytes < 64 << 10, "{report:?}");
}

#[test]
fn whatever_fails_before_the_guest_runs_there_leaves_it_here() {
    for (here, there, words) in [
        (Fault::Share, Fault::None, "giving the destination the guest's memory failed"),
        (Fault::None, Fault::Adopt, "taking the source's memory failed"),
        (Fault::Pause, Fault::None, "pausing"),
        (Fault::Sections, Fault::None, ""),
        (Fault::None, Fault::Prepare, "preparing the VM failed"),
        (Fault::Offer, Fault::None, "offering the guest's memory failed"),
        (Fault::None, Fault::TakeDisks, "the disks can't be taken"),
        (Fault::None, Fault::Claim, "the VM can't be started"),
        (Fault::None, Fault::Start, "the VM can't be started"),
    ] {
        for arbiter in [Arbiter::DiskLocks, Arbiter::Nothing] {
            let (mut source, mut destination, world) = two_vms(64);
            (source.fault, destination.fault) = (here, there);
            source.arbiter = arbiter;
            let ended = migrate(source, destination, pair(), local(|_| {}));
            assert_kept(&ended, words);
            let entry = world.ledger().entry();
            assert!(matches!(entry, Entry::Unused | Entry::Kept), "{here:?} {there:?}: {entry:?}");
            moves(ended.source);
        }
    }
}

#[test]
fn a_destination_that_knows_nothing_of_it_is_told_of_nothing() {
    let (source, mut destination, world) = two_vms(64);
    destination.details = serde_json::json!({ "slots": [3] });
    let ended = migrate(source, destination, pair(), local(|_| {}));
    assert_kept(&ended, "--device");
    assert!(ended.arrived.unwrap_err().vm_untouched);
    assert_eq!(world.ledger().entry(), Entry::Unused);
    moves(ended.source);
}

/// What a destination says to pages that come beside the memory, which is another's to write to.
fn beside_the_memory(first: &[u8]) -> String {
    let (source, mut destination, _) = two_vms(16);
    let [before, pages] = crate::hostile::parts(&source, true);
    let (mut a, b) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || {
        let connection = Connection::from_unix(b, "unix:b".into());
        let failure = destination::run(&mut destination, connection, &control()).unwrap_err();
        (failure.error.chain(), destination.ram.contents())
    });
    a.write_all(&before).unwrap();
    let mut heard = Vec::new();
    while !heard.windows(10).any(|window| window == b"\"problems\"") {
        let mut buf = [0; 4096];
        let n = a.read(&mut buf).unwrap();
        assert!(n > 0, "no verdict");
        heard.extend_from_slice(&buf[..n]);
    }
    // It may hang up before it has read all of this.
    let _ = a.write_all(&[first, &pages].concat());
    let _ = a.shutdown(std::net::Shutdown::Write);
    let (words, contents) = join(there);
    assert!(contents[0].iter().all(|byte| *byte == 0), "something was written");
    words
}

#[test]
fn pages_beside_the_memory_are_refused() {
    let words = beside_the_memory(b"M");
    assert!(words.contains("whose memory has come as a descriptor"), "{words}");
    // And the memory itself has to come.
    let words = beside_the_memory(b"");
    assert!(words.contains("no memory came"), "{words}");
}

/// The destination is killed there.
fn dies(at: Fault, arbiter: Arbiter) -> Ended {
    let (mut source, mut destination, _) = two_vms(64);
    let (a, b) = pair();
    destination.fault = at;
    destination.link = Some(b.clone());
    source.arbiter = arbiter;
    migrate(source, destination, (a, b), local(|_| {}))
}

#[test]
fn a_destination_that_dies_before_it_takes_the_memory_gives_it_back_without_a_question() {
    for arbiter in [Arbiter::DiskLocks, Arbiter::Nothing] {
        let ended = dies(Fault::DiesUnclaimed, arbiter);
        assert_kept(&ended, "");
        assert_eq!(ended.source.world.ledger().entry(), Entry::Kept);
        moves(ended.source);
    }
}

#[test]
fn memory_in_which_a_guest_may_have_run_never_goes_on_here() {
    for arbiter in [Arbiter::DiskLocks, Arbiter::Nothing] {
        let ended = dies(Fault::DiesClaimed, arbiter);
        let mut source = ended.source;
        let Outcome::InDoubt { mut doubt, .. } = ended.outcome else { panic!("no doubt") };
        for known_dead in [false, true] {
            for even_changed in [false, true] {
                let wish = Wish::Resume { known_dead, even_changed };
                let Settled::StillInDoubt(objection, again) = doubt.recover(&mut source, wish)
                else {
                    panic!("{wish:?} was granted")
                };
                assert!(matches!(objection, Objection::MemoryTaken), "{objection}");
                doubt = again;
            }
        }
        let Settled::StillInDoubt(Objection::MemoryTaken, doubt) = doubt.look(&mut source) else {
            panic!("it was taken back for a look")
        };
        assert_eq!((source.world.runs(), source.world.disks()), (None, None));
        let discard = Wish::Discard { known_running: true };
        assert!(matches!(doubt.recover(&mut source, discard), Settled::HandedOver));
    }
}

#[test]
fn a_guest_that_has_run_there_is_gone_from_here_whatever_became_of_it() {
    for arbiter in [Arbiter::DiskLocks, Arbiter::Nothing] {
        let ended = dies(Fault::DiesRunning, arbiter);
        assert!(matches!(ended.outcome, Outcome::Completed(_)), "{:?}", ended.outcome);
        let world = &ended.source.world;
        assert_eq!((world.runs(), world.ledger().entry()), (None, Entry::Runs));
    }
}

#[test]
fn a_destination_that_is_too_late_finds_the_memory_kept() {
    // It has no disks, and the source nothing else to wait for.
    let (mut source, mut destination, world) = two_vms(64);
    source.arbiter = Arbiter::Nothing;
    destination.fault = Fault::LateClaim;
    let patience = Duration::from_millis(300);
    let started = start(source, destination, pair(), local(|p| p.stall_timeout = patience));
    let Ended { outcome, arrived, mut source, .. } = started.join();
    let said = arrived.expect_err("the memory is the source's").error.chain();
    assert!(said.contains("the memory is Kept"), "{said}");
    assert_eq!(world.ledger().entry(), Entry::Kept);
    // Whether the destination still held the disks when the source wanted them back is a matter of luck.
    match outcome {
        Outcome::Kept { .. } => {}
        Outcome::InDoubt { doubt, .. } => {
            assert!(matches!(doubt.look(&mut source), Settled::Kept));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!((world.runs(), world.disks()), (Some("source"), Some("source")));
    moves(source);
}
