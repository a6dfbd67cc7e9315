//! What is said beforehand is what comes: how long a migration takes, after its first pass, and how long the
//! guest stands still, when it is stopped. Over slow links, so that they decide and not the host's processors.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use system_tests::guest::Guest;
use system_tests::network;

/// One after the other, for time is measured.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a host that is busy adds to a pause, in ms.
const HICCUP: f64 = 25.0;

/// The part of what is found by which a forecast may be off.
const FIFTH: f64 = 0.2;

/// Moves a guest of 64 MiB, and gives the report.
fn move_one(smp: u32, params: &str, more: &str) -> Value {
    let mut here = Guest::boot_with("64M", smp, params, more);
    here.wait_ready();
    let mut there = Guest::incoming_with("64M", smp, more);
    let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
    let out = command.args(["--json", "--downtime", "300ms"]).output().expect("it starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
    there.is_whole();
    let said: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    said["report"].clone()
}

/// Whether `found` is what was `expected`, within this part of it and what a busy host adds.
fn is_near(what: &str, report: &Value, expected: &Value, found: &Value, part: f64) {
    let ms = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("no {what}: {report:#}"));
    let (expected, found) = (ms(expected), ms(found));
    println!("{what}: {expected:.1} ms expected, {found:.1} ms found");
    let off = (expected - found).abs();
    assert!(off <= found * part + HICCUP, "{what}: {expected} and {found}: {report:#}");
}

#[test]
fn a_migration_takes_what_was_said_after_its_first_pass() {
    let _alone = alone();
    network::isolate();
    network::shape("200mbit");
    for params in [
        // Each pass has less to send than the one before.
        "set=40M,rate=1500,verify=500",
        // The same pages again and again: no pass leaves fewer, and they are what the guest waits for.
        "set=4M,rate=8000,verify=500",
        "set=0,verify=500",
    ] {
        println!("{params}");
        let report = move_one(1, params, "");
        let first = &report["first-forecast"];
        is_near("in all", &report, &first["total-ms"], &report["total-ms"], FIFTH);
        let (expected, found) = (&report["expected-downtime-ms"], &report["downtime-ms"]);
        is_near("downtime", &report, expected, found, FIFTH);
        assert!(report["downtime-ms"].as_f64() < Some(300.0), "the limit: {report:#}");
    }
}

#[test]
fn the_state_of_devices_is_a_part_of_what_is_expected() {
    let _alone = alone();
    network::isolate();
    // Some 60 KB of state, a quarter of a second. Pages come to it that even a guest without work writes, up to the
    // pause.
    network::shape("2mbit");
    let dir = tempfile::tempdir().expect("a directory");
    let disk = |n: u32| {
        let path = dir.path().join(format!("{n}.img"));
        let made = std::fs::File::create(&path).and_then(|file| file.set_len(1 << 20));
        made.expect("an image");
        format!("--disk path={}", path.display())
    };
    let disks: Vec<String> = (0..4).map(disk).collect();
    let report = move_one(6, "fill=2M,set=0,verify=100", &disks.join(" "));
    let (expected, found) = (&report["expected-downtime-ms"], &report["downtime-ms"]);
    is_near("downtime", &report, expected, found, FIFTH);
    assert!(report["downtime-ms"].as_f64() > Some(100.0), "it is slow: {report:#}");
}

#[test]
fn whoever_asks_meanwhile_is_told() {
    let _alone = alone();
    let here = Guest::ready("64M", 1, "set=16M,rate=500,verify=500");
    let mut there = Guest::incoming("64M", 1);
    // The first pass takes 8 s, and the others 2 s and less.
    let slow = json!({ "max-bandwidth": 8 << 20, "downtime-limit": 20 });
    let mut qmp = here.begin(&there.vm.migrate_uri(), &slow);
    let told = system_tests::wait::until(
        "a forecast",
        60,
        || {
            let info = qmp.ask("query-migrate");
            assert!(matches!(info["status"].as_str(), Some("setup" | "active")), "{info}");
            info["x-expected-total-time"].as_u64()
        },
        || "",
    );
    let info = qmp.wait_migrated(60);
    let total = info["total-time"].as_u64().expect("a time");
    assert!(info.get("x-expected-total-time").is_none(), "it is over: {info}");
    assert!(told > total / 2 && told < total * 2, "{told} was said, {total} it took");
    there.is_whole();
}
