//! A client that only knows QEMU drives a migration: the Python package `qemu.qmp`, unmodified.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use system_tests::vm::{Vm, VmArgs};

/// The package, at the version whose behaviour was looked at.
const PACKAGE: &str = "qemu.qmp==0.0.6";

fn succeed(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command:?}: {}\n{errors}", out.status);
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A Python that has the package, made once and kept with the other fetched things.
fn python() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).unwrap_or_else(|| {
        Path::new(&std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache")
    });
    let place = cache.join("mini-vmm").join("python-qemu-qmp");
    let python = place.join("bin").join("python");
    // Written last, so that a half-made environment is made again.
    let done = place.join("complete");
    if !done.exists() {
        let _ = fs::remove_dir_all(&place);
        succeed(Command::new("python3").args(["-m", "venv"]).arg(&place));
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE];
        succeed(Command::new(&python).args(pip));
        fs::write(done, PACKAGE).expect("a file in the cache");
    }
    python
}

#[test]
fn a_client_of_qemu_drives_a_migration_from_start_to_end() {
    let mut source = Vm::selfcheck("64M", 1, "set=8M,rate=2000,every=200").start();
    source.wait_serial("the guest to be ready", 120, |line| {
        line.contains("selfcheck: ready").then_some(())
    });
    let mut destination = VmArgs::default().args("--memory 64M --migrate-listen defer").start();

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("qmp_client.py");
    let said = succeed(
        Command::new(python())
            .arg(script)
            .args([source.qmp_path(), destination.qmp_path()])
            .arg("tcp:127.0.0.1:0"),
    );
    let seen: Value = serde_json::from_str(&said).expect("one JSON object");

    // QEMU's order, as its own clients have seen it. How many passes there are is the guest's doing.
    let mut source_events: Vec<_> =
        seen["source"].as_array().expect("events").iter().filter_map(Value::as_str).collect();
    source_events.dedup();
    let words: Vec<_> = source_events.iter().filter(|e| **e != "MIGRATION_PASS").collect();
    assert_eq!(
        json!(words),
        json!([
            "MIGRATION setup",
            "MIGRATION active",
            "STOP",
            "MIGRATION device",
            "MIGRATION completed",
            "SHUTDOWN"
        ])
    );
    assert!(source_events.contains(&"MIGRATION_PASS"));
    assert_eq!(
        seen["destination"],
        json!([
            "MIGRATION setup",
            "MIGRATION active",
            "RESUME",
            "MIGRATION completed",
            "STOP",
            "RESUME"
        ])
    );
    assert_eq!(source.wait_exit(20), 0);
    destination.wait_serial("the guest to go on", 60, |line| {
        assert!(!line.contains("FAIL"), "{line}");
        line.contains("up_ms=").then_some(())
    });
}
