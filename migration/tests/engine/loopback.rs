//! Two engines in one process: migrations that succeed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::channels::links;
use crate::common::*;
use migration::control::Control;
use migration::guest::PAGE_SIZE;
use migration::params::OnTimeout;
use migration::phase::Phase;
use migration::source::Outcome;
use migration::stats::Step;

#[test]
fn a_quiet_guest_arrives() {
    let (source, destination, world) = two_vms(64);
    let ended = migrate(source, destination, pair(), (control(), control()));
    assert_moved(&ended);
    let mut history = world.history.lock().unwrap().clone();
    history.retain(|what| !what.starts_with("prepared"));
    // Done while the source's guest runs, so that it need not be done when it stands still.
    for ahead in ["flush ahead", "the destination expects it", "source exercises"] {
        let at = |what: &str| history.iter().position(|happened| happened == what);
        assert!(at(ahead).is_some() && at(ahead) < at("pause"), "{ahead}: {history:?}");
        history.retain(|what| what != ahead);
    }
    // When a pass has ended, while the source hears of that and may go on.
    assert!(history.iter().any(|what| what == "destination exercises"), "{history:?}");
    history.retain(|what| what != "destination exercises");
    let expected =
        ["source runs", "pause", "drain", "read state", "destination runs", "handed over"];
    assert_eq!(history, expected);
}

#[test]
fn a_block_that_the_destination_can_keep_arrives_with_the_rest() {
    let (_, mut destination, world) = two_vms(64);
    let mut source = FakeVm::new("source", &world, 64);
    source.ram = FakeRam::new(&[("pc.ram", 64), ("pc.bios", 3), ("pc.rom", 2)]);
    source.ram.write(2, 100, b"a ROM");
    destination.keeps = vec!["pc.rom".into()];
    let ended = migrate(source, destination, pair(), (control(), control()));
    assert_moved(&ended);
    assert_eq!(&ended.destination.ram.contents()[2][100..105], b"a ROM");
}

#[test]
fn a_guest_that_writes_without_pause_arrives_over_tcp_and_is_verified() {
    let (a, b) = tcp_pair();
    let (mut source, destination, _) = two_vms(4096);
    source.dirty(300, 20);
    let control = control_with(|p| p.verify = true);
    let ended = migrate(source, destination, (a, b), (control.clone(), crate::common::control()));
    assert_moved(&ended);
    let report = control.report();
    assert_eq!(report.verified_ram_bytes, (4096 + 3) * PAGE_SIZE);
    assert_eq!(report.verified_sections, 3);
    assert!(report.passes >= 2 && report.zero_pages > 1000 && report.normal_pages > 2000);
}

#[test]
fn a_write_between_fetching_and_clearing_the_log_is_not_lost() {
    let (_, destination, world) = two_vms(64);
    let mut source = FakeVm::new("source", &world, 64);
    // Page 3 makes a second pass; page 7 is written after the log was fetched for it.
    let blocks = [("pc.ram", 64), ("pc.bios", 3)];
    source.ram = FakeRam::with_ambush(&blocks, Some((3, 7)));
    let control = control_with(|p| p.downtime_limit = Duration::ZERO);
    let ended = migrate(source, destination, pair(), (control.clone(), crate::common::control()));
    assert_moved(&ended);
    assert_eq!(control.report().passes, 4);
    let at = 7 * PAGE_SIZE as usize + 50;
    assert_eq!(&ended.destination.ram.contents()[0][at..at + 10], b"in between");
}

#[test]
fn a_write_between_the_sending_of_a_page_and_its_reading_is_not_lost() {
    for channels in [0, 3] {
        let (mut source, mut destination, _) = two_vms(2048);
        source.fill_with_noise();
        source.ram.lend_by_reference();
        *source.ram.late.lock().unwrap() = Some(70);
        let connections = links(channels, &mut destination);
        let control = control_with(|p| p.verify = true);
        let ended =
            migrate(source, destination, connections, (control.clone(), crate::common::control()));
        assert_moved(&ended);
        assert!(control.report().passes >= 2);
        let at = 70 * PAGE_SIZE as usize;
        assert_eq!(&ended.destination.ram.contents()[0][at..at + 4], b"late");
    }
}

#[test]
fn a_page_that_is_used_just_after_it_was_found_unused_is_not_lost() {
    const MANY: u64 = 20_000;
    for channels in [0, 3] {
        for page in [1024, 1025, 7000, MANY - 11] {
            let (_, mut destination, world) = two_vms(MANY);
            let source = FakeVm::new("source", &world, MANY);
            source.ram.write(0, 0, b"in use");
            source.ram.write(0, (MANY - 1) * PAGE_SIZE, b"in use");
            *source.ram.unused.lock().unwrap() = 700..MANY - 10;
            *source.ram.first_use.lock().unwrap() = Some(page);
            let connections = links(channels, &mut destination);
            let ended = migrate(source, destination, connections, (control(), control()));
            assert_moved(&ended);
            let at = (page * PAGE_SIZE) as usize;
            assert_eq!(&ended.destination.ram.contents()[0][at..at + 4], b"used", "page {page}");
        }
    }
}

#[test]
fn a_paused_guest_arrives_and_the_phases_come_in_order() {
    let (source, destination, _) = two_vms(64);
    let (here, there) = (Recorder::default(), Recorder::default());
    let mut p = parameters();
    p.pause_before_switchover = true;
    let control = Arc::new(Control::new(p, Box::new(here.clone())));
    let other = Arc::new(Control::new(parameters(), Box::new(there.clone())));
    let started = start(source, destination, pair(), (control.clone(), other.clone()));
    wait_for("pre-switchover", || control.stats().phase() == Phase::PreSwitchover);
    control.proceed();
    let ended = started.join();
    assert_moved(&ended);
    assert_eq!(
        here.0.lock().unwrap().join(", "),
        "setup, pass 1, active, pre-switchover, device, pass 2, completed"
    );
    assert_eq!(there.0.lock().unwrap().join(", "), "setup, active, completed");
    let steps = |c: &Control| c.report().steps.iter().map(|(s, _)| *s).collect::<Vec<_>>();
    use Step::*;
    assert_eq!(
        steps(&control),
        [Pause, Drain, VcpuState, LastPages, Devices, Prepared, Commit, Running]
    );
    assert_eq!(steps(&other), [LastPages, Devices, Prepared, Commit, Running]);
}

#[test]
fn a_guest_that_dirties_too_much_is_moved_by_force_or_kept() {
    for (on_timeout, moved) in [(OnTimeout::Force, true), (OnTimeout::Cancel, false)] {
        let (mut source, destination, _) = two_vms(512);
        source.dirty(500, 100);
        let control = control_with(|p| {
            p.max_bandwidth = 8 << 20;
            p.downtime_limit = Duration::ZERO;
            p.timeout = Some(Duration::from_millis(300));
            p.on_timeout = on_timeout;
        });
        let ended = migrate(source, destination, pair(), (control, crate::common::control()));
        if moved {
            assert_moved(&ended);
        } else {
            assert_kept(&ended, "did not converge within 300ms");
            let words = ended.arrived.unwrap_err().error.chain();
            assert!(
                words.contains("the source gave up: the migration did not converge"),
                "{words}"
            );
        }
    }
}

#[test]
fn the_bandwidth_is_kept_to_and_can_be_changed_on_the_way() {
    let (source, destination, _) = two_vms(2048);
    let control = control_with(|p| p.max_bandwidth = 1 << 20);
    let started = start(source, destination, pair(), (control.clone(), crate::common::control()));
    wait_for("two megabytes", || control.report().transferred_bytes > 2 << 20);
    let report = control.report();
    // The second megabyte may not have begun before the first one's second was over.
    assert!(report.total >= Duration::from_millis(900), "{report:?}");
    let mut p = control.parameters();
    p.max_bandwidth = 0;
    control.set_parameters(p);
    assert_moved(&started.join());
}

#[test]
fn a_guest_goes_there_and_back_again() {
    let (mut source, mut destination, world) = two_vms(256);
    let before = source.ram.contents();
    for trip in 0..6 {
        let (a, b) =
            if trip % 2 == 0 { ("source", "destination") } else { ("destination", "source") };
        source.who = a;
        destination.who = b;
        let ended = migrate(source, destination, pair(), (control(), control()));
        assert!(matches!(ended.outcome, Outcome::Completed(_)), "trip {trip}: {:?}", ended.outcome);
        assert_eq!(world.runs(), Some(b));
        (source, destination) = (ended.destination, ended.source);
    }
    let after = source.ram.contents();
    // Only what the drained request has written is new.
    let differing: Vec<_> =
        (0..before[0].len()).filter(|i| before[0][*i] != after[0][*i]).collect();
    assert!(differing.iter().all(|i| i / PAGE_SIZE as usize == 5));
    assert_eq!(source.device(2).counter, 0x1122_3344_5566_7702 + 6);
}

#[test]
fn the_downtime_ends_when_the_guest_runs_and_not_when_that_is_heard() {
    let (source, mut destination, _) = two_vms(64);
    destination.slow_to_say = Duration::from_secs(1);
    let (here, there) = (control(), control());
    let ended = migrate(source, destination, pair(), (here.clone(), there.clone()));
    assert_moved(&ended);
    for control in [here, there] {
        let report = control.report();
        let downtime = report.downtime.expect("it stood still");
        let steps: Duration = report.steps.iter().map(|(_, took)| *took).sum();
        assert!(steps <= downtime, "{report:#?}");
        assert!(report.total >= downtime + Duration::from_secs(1), "{report:#?}");
    }
}

#[test]
fn threads_that_bring_pages_in_give_way_to_guests_until_one_waits_for_them() {
    for count in [0, 3] {
        let (mut source, mut destination, _) = two_vms(4096);
        source.fill_with_noise();
        let connections = links(count, &mut destination);
        let ended = migrate(source, destination, connections, (control(), control()));
        // That `prepare` and `start` don't is said by the destination itself.
        assert_moved(&ended);
        let behind = ended.destination.ram.calls.behind.load(Ordering::Relaxed);
        // Over several connections the first packet of each has to be read first.
        let least = if count == 0 { 4096 * PAGE_SIZE } else { 1 };
        assert!(behind >= least, "{count} connections: {behind}");
    }
}
