//! Pages that the guest writes, noted in a ring for each vCPU (`--dirty-ring`): nothing is lost, however often
//! the rings fill, and the vCPU that writes most is the one that is slowed.

use serde_json::json;
use system_tests::guest::Guest;
use system_tests::vm::{Vm, VmArgs};
use system_tests::wait;

/// Fills the smallest ring many times in a second.
const BUSY: &str = "set=32M,rate=0,spread=1,verify=20000";
const RING: &str = "--dirty-ring 1024";

fn ready(memory: &str, smp: u32, params: &str, more: &str) -> Guest {
    let mut guest = Guest::boot_with(memory, smp, params, more);
    guest.wait_ready();
    guest
}

#[test]
fn a_busy_guest_moves_again_and_again_and_both_sides_compare_equal() {
    for (smp, channels) in [(1, "1"), (2, "4"), (4, "1")] {
        let mut here = ready("128M", smp, &format!("vcpus={smp},{BUSY}"), RING);
        for _ in 0..3 {
            let mut there = Guest::incoming_with("128M", smp, RING);
            let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
            let out = command.args(["--verify", "--channels", channels, "--json"]).output();
            let out = out.expect("mini-vmm migrate starts");
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            let said: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
            assert_eq!(said["report"]["verified-ram-bytes"].as_u64(), Some(128 << 20), "{said}");
            assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
            here.nothing_is_left();
            there.is_whole();
            here = there;
        }
    }
}

#[test]
fn after_a_cancel_a_full_ring_holds_nobody_up_and_the_next_attempt_is_whole() {
    let mut here = ready("128M", 2, &format!("vcpus=2,{BUSY}"), RING);
    for _ in 0..2 {
        let there = Guest::incoming_with("128M", 2, "");
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
    let mut there = Guest::incoming("128M", 2);
    here.migrate_to(&there, true);
    there.is_whole();
    there.moves_after_all("128M", 2, "--dirty-ring=65536");
}

#[test]
fn firmware_that_changes_the_window_below_one_mib_and_a_paused_guest_move_too() {
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
