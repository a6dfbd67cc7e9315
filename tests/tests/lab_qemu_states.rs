//! What a guest is doing and what its machine looks like when it moves between QEMU and mini-vmm.

use serde_json::json;
use system_tests::pair::{self, Pair};
use system_tests::work::{check_disk, disk};
use tempfile::TempDir;

/// A machine with one disk and this work.
fn with_disk(dir: &TempDir, smp: u32, work: &str) -> Pair {
    let disk = disk(dir.path()).display().to_string();
    Pair::new(
        &format!("--memory 256M --smp {smp} --disk path={disk}"),
        &format!(
            "-m 256 -smp {smp} -drive file={disk},if=none,id=disk0,format=raw \
             -device virtio-blk-pci,drive=disk0"
        ),
        work,
    )
}

#[test]
fn a_guest_from_qemu_reboots_and_powers_off_here() {
    let dir = TempDir::new().expect("a directory");
    let pair = with_disk(&dir, 1, "");
    let guest = pair.boot_qemu();
    let mut guest = pair.to_mini(guest, "there", true);
    guest.assert_content();
    guest.tell("reboot -f");
    guest.wait_new("GUEST READY", 90);
    guest.assert_content();
    guest.vm.qmp().ask("system_powerdown");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
}

#[test]
fn a_guest_booted_here_reboots_and_powers_off_in_qemu() {
    let dir = TempDir::new().expect("a directory");
    let pair = with_disk(&dir, 2, "guest.run=memory");
    let guest = pair.boot_mini();
    let mut guest = pair.to_qemu(guest);
    guest.terminal.next_number("memory: generation");
    guest.terminal.assert_content();
    // The firmware that it was given on its way.
    guest.terminal.tell("reboot -f");
    guest.terminal.wait_new("GUEST READY", 90);
    guest.terminal.assert_content();
    guest.qemu.qmp().ask("system_powerdown");
    assert_eq!(guest.qemu.wait_exit(60), 0, "{}", guest.qemu.log());
}

#[test]
fn a_paused_guest_arrives_paused() {
    let dir = TempDir::new().expect("a directory");
    let pair = with_disk(&dir, 1, "guest.run=memory,clock");
    let guest = pair.boot_qemu();
    guest.qemu.qmp().ask("stop");
    let guest = pair.to_mini(guest, "there", true);
    assert_eq!(guest.vm.qmp().status(), "paused");
    let quiet = guest.text().len();
    guest.vm.qmp().ask("stop");
    assert_eq!(guest.text().len(), quiet, "a paused guest says nothing");
    // And back as it is.
    let mut guest = pair.to_qemu(guest);
    assert_eq!(guest.qemu.qmp().status(), "paused");
    guest.qemu.qmp().ask("cont");
    guest.terminal.next_number("memory: generation");
    guest.terminal.assert_content();
}

#[test]
fn a_guest_arrives_in_the_middle_of_its_boot() {
    let dir = TempDir::new().expect("a directory");
    let pair = with_disk(&dir, 2, "loglevel=6");
    let qemu = pair.qemu.start();
    let terminal = qemu.terminal();
    terminal.wait_for("Linux version", 60);
    let mut guest = pair.to_mini(pair::InQemu { qemu, terminal }, "there", true);
    guest.wait_ready();
    guest.assert_content();
}

#[test]
fn an_idle_guest_arrives_by_a_source_that_wants_no_answer() {
    let dir = TempDir::new().expect("a directory");
    let pair = with_disk(&dir, 1, "");
    let guest = pair.boot_qemu();
    let mut guest = pair.to_mini(guest, "there", false);
    let report = guest.shell("report");
    assert!(report.contains("processors: 1"), "{report}");
    guest.assert_content();
}

#[test]
fn modern_devices_in_slots_of_their_own_and_memory_above_the_hole() {
    let dir = TempDir::new().expect("a directory");
    let disk = disk(dir.path()).display().to_string();
    // 3.5 GiB: 3 GiB below the PCI hole, the rest at 4 GiB.
    let pair = Pair::new(
        &format!(
            "--memory 3584M --smp 2 --disk path={disk},addr=9,virtio=modern \
             --rng=addr=4,virtio=modern --balloon=addr=7"
        ),
        &format!(
            "-m 3584 -smp 2 -drive file={disk},if=none,id=disk0,format=raw \
             -device virtio-blk-pci,drive=disk0,addr=9,disable-legacy=on \
             -device virtio-rng-pci,addr=4,disable-legacy=on -device virtio-balloon-pci,addr=7"
        ),
        "guest.run=disk,memory",
    );
    let guest = pair.boot_qemu();
    let durable = guest.terminal.next_number("disk: record");
    let mut guest = pair.to_mini(guest, "there", true);
    assert!(guest.next_number("disk: record") > durable, "the disk writer went on");
    guest.assert_content();
    let mut guest = pair.to_qemu(guest);
    let durable = guest.terminal.next_number("disk: record");
    guest.terminal.assert_content();
    guest.qemu.qmp().execute("system_powerdown", json!({})).expect("QEMU has a power button");
    assert_eq!(guest.qemu.wait_exit(60), 0, "{}", guest.qemu.log());
    check_disk(&dir.path().join("disk.img"), durable);
}

#[test]
fn queues_full_of_requests_arrive() {
    let dir = TempDir::new().expect("a directory");
    let pair = with_disk(&dir, 2, "guest.run=disk");
    let mut guest = pair.boot_qemu();
    let reader = "while :; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null; done &";
    for _ in 0..8 {
        guest.terminal.shell(reader);
    }
    let durable = guest.terminal.next_number("disk: record");
    let guest = pair.to_mini(guest, "there", true);
    assert!(guest.next_number("disk: record") > durable, "the disk writer went on");
    let mut guest = pair.to_qemu(guest);
    let durable = guest.terminal.next_number("disk: record");
    guest.terminal.assert_content();
    guest.qemu.terminate();
    check_disk(&dir.path().join("disk.img"), durable);
}

#[test]
fn four_processors_arrive_and_go_back() {
    let pair = Pair::new("--memory 256M --smp 4", "-m 256 -smp 4", "guest.run=memory,clock");
    let guest = pair.boot_qemu();
    let verified = guest.terminal.next_number("memory: generation");
    let mut guest = pair.to_mini(guest, "there", true);
    assert!(guest.next_number("memory: generation") >= verified, "the memory worker went on");
    assert!(guest.shell("report").contains("processors: 4"));
    guest.assert_content();
    let mut guest = pair.to_qemu(guest);
    guest.terminal.next_number("memory: generation");
    assert!(guest.terminal.shell("report").contains("processors: 4"));
    guest.terminal.assert_content();
    guest.qemu.terminate();
}
