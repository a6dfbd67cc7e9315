//! Guests of many sizes and moods move: large, spread out, idle, not yet started, stopped on
//! arrival.

use serde_json::json;
use system_tests::guest::{Guest, number};

/// The guest moves with both sides compared, and is whole there.
fn moves(mut here: Guest, mut there: Guest) -> Guest {
    here.migrate_to(&there, true);
    here.nothing_is_left();
    there.is_whole();
    there
}

#[test]
fn a_gibibyte_that_is_written_all_over_moves() {
    // Of every megabyte a part is rewritten, so that no pass finds a clean half.
    let here = Guest::ready("1G", 1, "set=32M,rate=0,spread=1,verify=20000");
    moves(here, Guest::incoming("1G", 1));
}

#[test]
fn four_gibibytes_on_both_sides_of_the_pci_hole_move() {
    // Half of what is held lies at each end of memory; between them pages that never were.
    let here = Guest::ready("4G", 2, "vcpus=2,fill=512M,set=32M,rate=0,spread=1,verify=20000");
    moves(here, Guest::incoming("4G", 2));
}

#[test]
fn an_idle_guest_moves_in_one_pass_and_goes_on_when_told() {
    let mut here = Guest::ready("256M", 1, "set=16M,rate=0,verify=0");
    here.ask(b"h", "ok h", 60);
    let mut there = Guest::incoming("256M", 1);
    let before = number(&here.ask(b"s", "up_ms=", 60), "rewritten");
    here.migrate_to(&there, true);
    let after = number(&there.ask(b"s", "up_ms=", 60), "rewritten");
    assert_eq!(before, after, "it was told to rest");
    there.is_whole();
    there.ask(b"g", "ok g", 60);
    let resumed = number(&there.ask(b"s", "up_ms=", 60), "rewritten");
    assert!(resumed >= after);
    there.is_whole();
    assert!(number(&there.ask(b"s", "up_ms=", 60), "rewritten") > after, "it does not go on");
}

#[test]
fn a_guest_that_has_not_started_arrives_so_and_boots_there() {
    let mut here = Guest::boot_with("64M", 1, "set=4M", "--paused");
    assert_eq!(here.vm.qmp().status(), "prelaunch");
    let mut there = Guest::incoming("64M", 1);
    here.migrate_to(&there, true);
    here.nothing_is_left();
    let mut qmp = there.vm.qmp();
    assert_ne!(qmp.status(), "running", "nobody has started it");
    assert_eq!(there.line.text(), "");
    qmp.ask("cont");
    there.line.wait_for("selfcheck: ready", 120);
    there.is_whole();
}

#[test]
fn a_destination_that_was_told_to_wait_holds_the_guest_until_it_may_go_on() {
    let mut here = Guest::ready("64M", 1, "set=16M,rate=0,verify=20000");
    let mut there = Guest::incoming_with("64M", 1, "--paused");
    here.migrate_to(&there, true);
    here.nothing_is_left();
    let mut qmp = there.vm.qmp();
    assert_eq!(qmp.status(), "paused");
    qmp.ask("cont");
    there.is_whole();
    // And from a stopped guest to one that is started elsewhere.
    qmp.ask("stop");
    let mut third = Guest::incoming("64M", 1);
    there.migrate_to(&third, true);
    let mut qmp = third.vm.qmp();
    assert_eq!(qmp.status(), "paused");
    qmp.execute("cont", json!({})).expect("it may go on");
    third.is_whole();
}
