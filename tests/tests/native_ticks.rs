//! The self-checking guest that ticks a thousand times a second, by which downtimes are held against what a guest feels:
//! it is idle when it has nothing to do, and no standstill escapes it, although most of its ticks are only counted.

use std::thread;
use std::time::{Duration, SystemTime};

use system_tests::guest::{Guest, number};
use system_tests::qmp::Qmp;

/// How long the guest is stopped.
const STOP: Duration = Duration::from_millis(60);

/// Microseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros() as u64
}

/// The guest's longest gaps: how long, and when each ended, in µs.
fn gaps(guest: &mut Guest) -> Vec<(u64, u64)> {
    let from = guest.line.text().len();
    guest.ask(b"l", "ok l", 60);
    let text = guest.line.text();
    let told = text[from..].lines().filter(|line| line.contains(" end_us="));
    told.map(|line| (number(line, "gap_us"), number(line, "end_us"))).collect()
}

/// Stops the guest for a while, and holds what it felt against that.
fn feels_a_stop(guest: &mut Guest, qmp: &mut Qmp) {
    guest.ask(b"r", "ok r", 60);
    qmp.ask("stop");
    let stopped = now();
    thread::sleep(STOP);
    let until = now();
    qmp.ask("cont");
    let all = gaps(guest);
    let it = all.iter().find(|(gap, end)| end - gap <= stopped && until <= *end);
    assert!(it.is_some(), "it stood still from {stopped} to {until} and felt {all:?}");
}

#[test]
fn it_is_idle_and_feels_each_standstill() {
    let mut guest = Guest::ready("64M", 1, "set=0,verify=0,hz=1000");
    let mut qmp = guest.vm.qmp();
    let busy = guest.busy();
    assert!(busy < 0.5, "an idle guest has its processor for {busy:.2} of the time");
    for _ in 0..5 {
        feels_a_stop(&mut guest, &mut qmp);
    }
}

#[test]
fn it_is_so_with_several_vcpus_at_work_and_behind_a_move() {
    let mut here = Guest::ready("64M", 2, "set=8M,rate=2000,verify=4000,hz=1000");
    let mut qmp = here.vm.qmp();
    feels_a_stop(&mut here, &mut qmp);
    let mut there = Guest::incoming("64M", 2);
    here.migrate_to(&there, true);
    there.is_whole();
    let mut qmp = there.vm.qmp();
    feels_a_stop(&mut there, &mut qmp);
    let status = there.ask(b"s", "up_ms=", 60);
    assert_eq!(number(&status, "vcpus"), 2, "{status}");
    assert!(number(&status, "skew_us") < 1000, "{status}");
}
