//! One and the same guest, written down by QEMU and by mini-vmm: the two streams say the same.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use system_tests::linux::Linux;
use system_tests::network::Bridge;
use system_tests::pair::Pair;
use system_tests::vm::mini_vmm;
use system_tests::wait;
use system_tests::work::disk;
use tempfile::TempDir;

/// Where the streams differ, and why. An entry is the beginning of a place.
const DIFFERENCES: &[(&str, &str)] = &[
    ("timer/", "the machine's clock goes on while it is stopped here, and stands still in QEMU"),
    ("cpu/env.tsc", "so do the processors' counters"),
    ("cpu (instance 1)/env.tsc", "so do the processors' counters"),
    ("kvmclock/clock", "and the guest's own clock"),
    ("mc146818rtc/", "the time of day, which is another one"),
    ("i8254/", "points in time on the machine's clock"),
    ("apic/initial_count_load_time", "a point in time on the machine's clock"),
    ("apic (instance 1)/initial_count_load_time", "a point in time on the machine's clock"),
    ("apic/next_time", "a point in time on the machine's clock"),
    ("apic (instance 1)/next_time", "a point in time on the machine's clock"),
    ("apic/timer_expiry", "a point in time on the machine's clock"),
    ("apic (instance 1)/timer_expiry", "a point in time on the machine's clock"),
    (
        "ps2kbd/parent_obj/queue.",
        "bytes that the guest has read are forgotten, as QEMU forgets where they were",
    ),
    ("ps2mouse/parent_obj/queue.", "the same"),
    (
        "ioapic/irr",
        "an edge that has not been delivered, which KVM delivers when it is given the IOAPIC",
    ),
    ("apic/irr", "to one of these"),
    ("apic (instance 1)/irr", "to one of these"),
];

fn saved(path: &Path) -> String {
    format!("exec:cat >{}", path.display())
}

/// What `inspect --diff` finds.
fn differences(a: &Path, b: &Path) -> Value {
    let out = Command::new(mini_vmm()).args(["inspect", "--json", "--diff"]).args([a, b]).output();
    let out = out.expect("mini-vmm starts");
    serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)))
}

/// Where streams go: to the results of the run, if somebody wants them (`lab run --results`).
fn results(dir: &TempDir) -> PathBuf {
    std::env::var_os("MINI_VMM_LAB_RESULTS").map_or_else(|| dir.path().into(), PathBuf::from)
}

#[test]
fn a_guest_of_qemus_is_written_down_alike_by_both() {
    let dir = TempDir::new().expect("a directory");
    let image = disk(dir.path());
    let bridge = Bridge::new("mvbr0", "10.99.0.1/24", &["mvtapm", "mvtapq"]);
    let taps: Vec<_> = bridge.taps().collect();
    let pair = Pair::full(&image, &taps, "--paused");
    let guest = pair.boot_qemu();
    guest.terminal.next_number("memory: generation");
    guest.terminal.next_number("disk: record");
    guest.qemu.qmp().execute("stop", json!({})).expect("QEMU stops its guest");

    let (theirs, ours) = (results(&dir).join("qemu.mig"), results(&dir).join("mini-vmm.mig"));
    let end = guest.qemu.migrate(&saved(&theirs), false);
    assert_eq!(end["status"], "completed", "{end}");
    guest.qemu.terminate();

    let mut there = restored(&pair, &theirs);
    let uri = format!("file:{}", ours.display());
    let out = there.vm.migrate_command(&uri).output().expect("mini-vmm migrate starts");
    assert!(
        out.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&out.stderr),
        there.vm.stderr()
    );
    assert_eq!(there.vm.wait_exit(20), 0, "{}", there.vm.stderr());

    let found = differences(&theirs, &ours);
    let explained = |place: &str| DIFFERENCES.iter().any(|(known, _)| place.starts_with(known));
    let fields = found["fields"].as_array().expect("fields").iter();
    let odd: Vec<_> =
        fields.filter(|f| !explained(f["place"].as_str().expect("a place"))).collect();
    assert!(odd.is_empty(), "differences that nobody has explained: {odd:#?}");
    // KVM writes the page from which a guest reads its clock when a vCPU is entered: one for each.
    for block in found["pages"].as_array().expect("pages") {
        assert!(block["pages"].as_u64().expect("a number") <= 2, "{block}");
    }

    // And it is the same guest: it goes on in a QEMU from what mini-vmm has written.
    let file = format!("exec:cat {}", ours.display());
    let qemu = pair.qemu.clone().args("-incoming").arg(file).start();
    let mut terminal = qemu.terminal();
    let arrived = || (qemu.qmp().status() == "paused").then_some(());
    wait::until("the guest's arrival in QEMU", 60, arrived, || qemu.log());
    qemu.qmp().execute("cont", json!({})).expect("QEMU lets its guest go on");
    terminal.next_number("memory: generation");
    terminal.next_number("disk: record");
    terminal.assert_content();
    qemu.terminate();
}

/// A stopped mini-vmm with the guest of that file.
fn restored(pair: &Pair, file: &Path) -> Linux {
    let uri = format!("file:{}", file.display());
    let there = pair.mini.restoring(pair.dir.path(), "restored", &uri);
    let arrived = || (there.vm.qmp().status() == "paused").then_some(());
    wait::until("the guest's arrival", 60, arrived, || there.vm.stderr());
    there
}
