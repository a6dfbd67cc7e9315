//! A guest that writes faster than can be sent is slowed until it fits, if that is allowed
//! (`--auto-converge`), and only as long as it leaves.

use serde_json::json;
use system_tests::guest::Guest;
use system_tests::wait;

/// Rewrites 16 MiB as fast as it can.
const PARAMS: &str = "set=16M,rate=0,verify=1000";
/// What the network takes: 0.8 s for the 16 MiB, of which a moment is allowed.
const SLOW: [&str; 4] = ["--bandwidth", "20M", "--downtime", "50ms"];

#[test]
fn a_guest_that_writes_too_fast_leaves_only_when_it_may_be_slowed() {
    let mut here = Guest::ready("64M", 2, &format!("vcpus=2,{PARAMS}"));
    let there = Guest::incoming("64M", 2);
    let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
    let out = command.args(SLOW).args(["--timeout", "8s"]).output().expect("it starts");
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("did not converge within 8s"), "{said}");
    drop(there);

    let mut there = Guest::incoming("64M", 2);
    let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
    command.args(SLOW).args(["--timeout", "300s", "--auto-converge", "--verify"]);
    let out = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(said.contains("the vCPUs rested for "), "{said}");
    assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
    there.is_whole();
}

#[test]
fn while_it_is_slowed_it_obeys_and_a_cancel_gives_it_all_of_its_time_back() {
    let mut here = Guest::ready("64M", 1, "fill=8M,set=4M,rate=0,verify=1000");
    let there = Guest::incoming("64M", 1);
    let full = here.speed();
    let mut qmp = here.vm.qmp();
    let on = json!({ "capabilities": [{ "capability": "auto-converge", "state": true }] });
    qmp.execute("migrate-set-capabilities", on).expect("a capability");
    // So slow that the guest does not fit at a fifth of its speed either.
    let slow = json!({
        "max-bandwidth": 2 << 20, "downtime-limit": 0, "max-cpu-throttle": 80,
        "cpu-throttle-initial": 50, "cpu-throttle-increment": 40,
    });
    let mut qmp = here.begin(&there.vm.migrate_uri(), &slow);
    let mut seen = Vec::new();
    wait::until(
        "the guest to rest",
        120,
        || {
            let percent = qmp.ask("query-migrate")["cpu-throttle-percentage"].as_u64();
            if seen.last() != Some(&percent) {
                seen.push(percent);
            }
            (percent == Some(80)).then_some(())
        },
        || "",
    );
    assert_eq!(seen, [None, Some(50), Some(80)]);
    let slowed = here.speed();
    assert!(slowed < full / 2.0, "it rests, and rewrites {slowed} pages a second of {full}");

    qmp.ask("stop");
    assert_eq!(qmp.status(), "paused");
    let line = here.line.text().len();
    qmp.ask("cont");
    here.line.wait_line_from(line, "it goes on", 60, |line| line.contains("up_ms=").then_some(()));
    assert_eq!(qmp.ask("query-migrate")["cpu-throttle-percentage"], 80);

    qmp.ask("migrate_cancel");
    assert_eq!(qmp.wait_migrated(60)["status"], "cancelled");
    let again = here.speed();
    assert!(again > slowed * 2.0, "{full}, slowed {slowed}, then {again}");
    let after = qmp.ask("query-migrate");
    assert!(after.get("cpu-throttle-percentage").is_none(), "{after}");
    here.is_whole();
}
