//! A guest that writes faster than can be sent is made to rest.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::*;
use migration::params::Parameters;

/// A link that takes 2000 pages a second, for a guest that writes as many as it can to 500.
fn slow(p: &mut Parameters) {
    p.max_bandwidth = 8 << 20;
    p.downtime_limit = Duration::from_millis(40);
    p.auto_converge = true;
    p.throttle.initial = 50;
    p.throttle.increment = 40;
}

fn history(vm: &FakeVm) -> Vec<String> {
    vm.world.history.lock().unwrap().clone()
}

#[test]
fn a_guest_that_writes_too_fast_rests_more_and_more_until_it_fits() {
    let (mut source, destination, _) = two_vms(512);
    source.dirty(500, 0);
    let control = control_with(slow);
    let ended = migrate(source, destination, pair(), (control.clone(), crate::common::control()));
    assert_moved(&ended);
    let history = history(&ended.source);
    let steps: Vec<_> =
        history.iter().filter(|line| line.contains("throttle") || *line == "pause").collect();
    // A second step follows where the guest still gets to write enough, which is the host's affair.
    let rests = &steps[..steps.len() - 2];
    assert!(rests[0] == "throttle 50" && rests.is_sorted(), "{steps:?}");
    // No more than that of the time it stood still.
    assert_eq!(steps[steps.len() - 2..], ["pause", "throttle 0"]);
    let report = control.report();
    assert!(report.throttle_percent >= 50 && report.passes > 2, "{report:?}");
    assert_eq!(control.info().cpu_throttle_percentage, None);
}

#[test]
fn where_it_is_known_who_writes_only_that_vcpu_rests() {
    let (mut source, destination, _) = two_vms(512);
    source.ram.rings.store(true, Ordering::SeqCst);
    source.dirty(500, 0);
    let control = control_with(slow);
    let started = start(source, destination, pair(), (control.clone(), crate::common::control()));
    wait_for("the guest to rest", || control.info().cpu_throttle_percentage > Some(0));
    let vcpus = control.info().vcpus;
    let ended = started.join();
    assert_moved(&ended);
    let history = history(&ended.source);
    let rests: Vec<_> = history.iter().filter(|line| line.contains("throttle")).collect();
    assert_eq!(
        (rests[0].as_str(), rests[rests.len() - 1].as_str()),
        ("throttle [50, 0]", "throttle 0")
    );
    assert!(rests[1..rests.len() - 1].iter().all(|line| line.ends_with(", 0]")), "{rests:?}");
    // As it was shown, unless it had just ended.
    assert!(vcpus.is_empty() || vcpus[0].dirty_pages_rate > 0, "{vcpus:?}");
    assert!(vcpus.iter().skip(1).all(|vcpu| vcpu.dirty_pages_rate == 0), "{vcpus:?}");
}

#[test]
fn it_is_not_slowed_where_that_is_not_asked_for_or_not_needed() {
    for (asked, pages) in [(false, 500), (true, 20)] {
        let (mut source, destination, _) = two_vms(512);
        source.dirty(pages, 0);
        let control = control_with(|p| {
            slow(p);
            p.auto_converge = asked;
            p.timeout = Some(Duration::from_secs(3));
            p.on_timeout = migration::params::OnTimeout::Force;
        });
        let ended = migrate(source, destination, pair(), (control, crate::common::control()));
        assert_moved(&ended);
        let history = history(&ended.source);
        assert!(!history.iter().any(|line| line.contains("throttle")), "{history:?}");
    }
}

#[test]
fn a_guest_that_stays_runs_at_full_speed() {
    let cancel = |source: FakeVm, destination| {
        let control = control_with(slow);
        let started =
            start(source, destination, pair(), (control.clone(), crate::common::control()));
        wait_for("the guest to rest", || control.info().cpu_throttle_percentage > Some(0));
        control.cancel().unwrap();
        let ended = started.join();
        assert_kept(&ended, "cancelled");
        ended
    };
    let fault = |fault| {
        move |mut source: FakeVm, destination| {
            source.fault = fault;
            let control = control_with(slow);
            let ended = migrate(source, destination, pair(), (control, crate::common::control()));
            assert_kept(&ended, "was told to fail");
            ended
        }
    };
    let ways: [&dyn Fn(FakeVm, FakeVm) -> Ended; 4] =
        [&cancel, &fault(Fault::Pause), &fault(Fault::Drain), &fault(Fault::Throttle)];
    for end in ways {
        let (mut source, destination, _) = two_vms(512);
        source.dirty(500, 0);
        let ended = end(source, destination);
        let history = history(&ended.source);
        let last = history.iter().rfind(|line| line.contains("throttle"));
        assert_eq!(last.map(String::as_str), Some("throttle 0"), "{history:?}");
        // And not after it has been resumed.
        let (end, runs) = (
            history.iter().rposition(|line| line == "throttle 0"),
            history.iter().rposition(|line| line == "source runs"),
        );
        assert!(runs < Some(2) || end < runs, "{history:?}");
    }
}
