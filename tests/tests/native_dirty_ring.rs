//! Pages that the guest writes, noted in a ring for each vCPU (`--dirty-ring`): nothing is lost, however often
//! the rings fill, and the vCPU that writes most is the one that is slowed.

use serde_json::json;
use system_tests::guest::Guest;
use system_tests::qmp::Qmp;
use system_tests::vm::{Vm, VmArgs};
use system_tests::wait;

const MEMORY: &str = "64M";
const BUSY: &str = "set=32M,rate=0,spread=1,verify=20000";
/// The longest: a KVM that interprets writes an entry for each instruction that writes, and many of them before
/// it looks whether the ring is full.
const RING: &str = "--dirty-ring 65536";

fn ready(memory: &str, smp: u32, params: &str, more: &str) -> Guest {
    let mut guest = Guest::boot_with(memory, smp, params, more);
    guest.wait_ready();
    guest
}

#[test]
fn a_busy_guest_moves_again_and_again_and_both_sides_compare_equal() {
    for (smp, channels) in [(1, "1"), (2, "4"), (4, "1")] {
        let mut here = ready(MEMORY, smp, &format!("vcpus={smp},{BUSY}"), RING);
        for _ in 0..3 {
            let mut there = Guest::incoming_with(MEMORY, smp, RING);
            let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
            let out = command.args(["--verify", "--channels", channels, "--json"]).output();
            let out = out.expect("mini-vmm migrate starts");
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            let said: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
            assert_eq!(said["report"]["verified-ram-bytes"].as_u64(), Some(64 << 20), "{said}");
            assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
            here.nothing_is_left();
            there.is_whole();
            here = there;
        }
    }
}

#[test]
fn after_a_cancel_a_full_ring_holds_nobody_up_and_the_next_attempt_is_whole() {
    let mut here = ready(MEMORY, 2, &format!("vcpus=2,{BUSY}"), RING);
    for _ in 0..2 {
        let there = Guest::incoming_with(MEMORY, 2, "");
        let mut qmp = here.begin(&there.vm.migrate_uri(), &json!({ "max-bandwidth": 16 << 20 }));
        wait::until(
            "a second pass",
            120,
            || {
                let passes = qmp.ask("query-migrate")["ram"]["dirty-sync-count"].as_u64();
                (passes >= Some(2)).then_some(())
            },
            || "",
        );
        qmp.ask("migrate_cancel");
        assert_eq!(qmp.wait_migrated(60)["status"], "cancelled");
        here.is_whole();
    }
    let fast = json!({ "max-bandwidth": 0 });
    here.vm.qmp().execute("migrate-set-parameters", fast).expect("parameters");
    // To one that keeps a log, and from there to one with another ring.
    let mut there = Guest::incoming(MEMORY, 2);
    here.migrate_to(&there, true);
    there.is_whole();
    there.moves_after_all(MEMORY, 2, "--dirty-ring=32768");
}

#[test]
fn a_guest_that_stands_still_moves_too() {
    let mut here = ready("64M", 1, "set=4M,rate=0,verify=1000", RING);
    here.vm.qmp().ask("stop");
    let mut there = Guest::incoming_with("64M", 1, RING);
    here.migrate_to(&there, true);
    let mut qmp = there.vm.qmp();
    assert_eq!(qmp.status(), "paused");
    qmp.ask("cont");
    there.is_whole();
}

#[test]
fn a_ring_that_can_not_be_had_is_refused_by_name() {
    for (entries, words) in
        [("512", "a power of two from 1024 to 65536"), ("5000", "'5000' is not"), ("many", "many")]
    {
        let args = Vm::selfcheck("64M", 1, "").args(&format!("--dirty-ring {entries}"));
        let mut vm = VmArgs::spawn(args);
        assert_eq!(vm.wait_exit(20), 2, "{}", vm.stderr());
        assert!(vm.stderr().contains(words), "{}", vm.stderr());
    }
}

/// So slow that the guest does not fit at a fifth of its speed either.
const SLOW: &str = r#"{ "max-bandwidth": 2097152, "downtime-limit": 0, "max-cpu-throttle": 80,
    "cpu-throttle-initial": 50, "cpu-throttle-increment": 40 }"#;

/// Begins a migration that throttles and does not end.
fn begin_throttled(here: &Guest, there: &Guest) -> Qmp {
    let on = json!({ "capabilities": [{ "capability": "auto-converge", "state": true }] });
    here.vm.qmp().execute("migrate-set-capabilities", on).expect("a capability");
    let slow = serde_json::from_str(SLOW).expect("parameters");
    here.begin(&there.vm.migrate_uri(), &slow)
}

/// Each vCPU's share of rest, once the one that rests most does so for `percent`.
fn rests(qmp: &mut Qmp, percent: u64) -> Vec<u64> {
    wait::until(
        "the guest to rest",
        180,
        || {
            let info = qmp.ask("query-migrate");
            let status = info["status"].as_str();
            assert!(matches!(status, Some("setup" | "active")), "{info}");
            let now = info["cpu-throttle-percentage"].as_u64();
            let vcpus = info["x-vcpus"].as_array()?.iter();
            let rests =
                vcpus.map(|vcpu| vcpu["cpu-throttle-percentage"].as_u64().expect("a share"));
            (now == Some(percent)).then(|| rests.collect())
        },
        || "",
    )
}

#[test]
fn only_the_vcpu_that_writes_rests_and_a_cancel_gives_it_its_time_back() {
    let params = "vcpus=2,writers=1,fill=8M,set=4M,rate=0,verify=100";
    let mut here = ready("64M", 2, params, RING);
    let there = Guest::incoming("64M", 2);
    let full = here.busy();
    let mut qmp = begin_throttled(&here, &there);
    let all = rests(&mut qmp, 80);
    assert_eq!(all, [80, 0]);
    // By its processor time: on a busy host the work that it gets done says more of the others'.
    let slowed = here.busy();
    assert!(
        slowed < 0.4,
        "it rests for 80 % of the time, and runs for {slowed} of it, {full} before"
    );
    let info = qmp.ask("query-migrate");
    let rate = |n: usize| info["x-vcpus"][n]["dirty-pages-rate"].as_u64().expect("a rate");
    assert!(rate(0) > 4 * rate(1), "{info}");

    qmp.ask("migrate_cancel");
    assert_eq!(qmp.wait_migrated(60)["status"], "cancelled");
    let again = here.busy();
    assert!(again > slowed * 1.25, "{full}, slowed {slowed}, then {again}");
    let after = qmp.ask("query-migrate");
    assert!(after.get("x-vcpus").is_none(), "{after}");
    here.is_whole();
}

#[test]
fn vcpus_that_write_alike_rest_alike() {
    let here = ready("64M", 2, "vcpus=2,fill=8M,set=4M,rate=0,verify=1000", RING);
    let there = Guest::incoming("64M", 2);
    let mut qmp = begin_throttled(&here, &there);
    let all = rests(&mut qmp, 80);
    assert!(all.len() == 2 && all.iter().all(|percent| *percent >= 70), "{all:?}");
    qmp.ask("migrate_cancel");
    assert_eq!(qmp.wait_migrated(60)["status"], "cancelled");
}

#[test]
fn a_guest_that_writes_too_fast_leaves_when_the_vcpu_that_writes_rests() {
    let params = "vcpus=2,writers=1,set=16M,rate=0,verify=1000";
    let mut here = ready("64M", 2, params, RING);
    let mut there = Guest::incoming("64M", 2);
    let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
    command.args(["--bandwidth", "20M", "--downtime", "50ms", "--timeout", "300s"]);
    command.args(["--auto-converge", "--verify"]);
    let out = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(said.contains("rested for "), "{said}");
    assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
    there.is_whole();
}
