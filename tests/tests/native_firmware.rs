//! Guests that boot by SeaBIOS from a disk: what needs no Linux.

use serde_json::json;
use system_tests::bootdisk::{Then, counting};
use system_tests::qemu::QemuArgs;
use system_tests::vm::{Vm, VmArgs};
use tempfile::TempDir;

/// A VM without a kernel, with this disk.
fn machine(disk: &std::path::Path, more: &str) -> VmArgs {
    VmArgs::default().args(&format!("--memory 64M --smp 2 --disk path={} {more}", disk.display()))
}

fn wait_boot(vm: &mut Vm, n: u32) {
    let words = format!("BOOT {n}");
    vm.wait_serial(&words, 60, |line| line.contains(&words).then_some(()));
}

#[test]
fn a_disk_boots_and_boots_again_after_its_own_resets() {
    let dir = TempDir::new().expect("a directory");
    let disk = counting(dir.path(), 3, Then::Reset);
    let mut vm = machine(&disk, "").start();
    for n in 1..=3 {
        wait_boot(&mut vm, n);
    }
    assert_eq!(vm.wait_exit(30), 0, "it powers off:\n{}", vm.stderr());
    let said = vm.serial();
    assert_eq!(said.matches("SeaBIOS (version").count(), 3, "{said}");
}

#[test]
fn its_firmware_moves_with_a_guest_that_boots_again_elsewhere() {
    let dir = TempDir::new().expect("a directory");
    let disk = counting(dir.path(), 3, Then::Wait);
    let mut here = machine(&disk, "").start();
    wait_boot(&mut here, 1);
    here.cli(&["reset", "--vm", &here.name]);
    wait_boot(&mut here, 2);
    // The other side finds no firmware of its own, and needs none.
    let mut there = machine(&disk, "--migrate-listen tcp:127.0.0.1:0").start();
    let out = here.migrate_command(&there.migrate_uri()).output().expect("mini-vmm migrate starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(here.wait_exit(30), 0);
    there.qmp().ask("system_reset");
    wait_boot(&mut there, 3);
    assert_eq!(there.wait_exit(30), 0, "it powers off:\n{}", there.stderr());
}

#[test]
fn a_guest_of_qemu_reboots_here_by_the_firmware_that_came_and_goes_back() {
    let dir = TempDir::new().expect("a directory");
    let disk = counting(dir.path(), 3, Then::Wait);
    let qemu = QemuArgs::new(&format!(
        "-m 64 -smp 2 -accel kvm -cpu host,arch-capabilities=off -drive file={},if=none,id=disk0,format=raw \
         -device virtio-blk-pci,drive=disk0",
        disk.display()
    ));
    let first = qemu.start();
    first.terminal().wait_for("BOOT 1", 60);
    let mut here = machine(&disk, "--migrate-listen tcp:127.0.0.1:0").start();
    let end = first.migrate(&here.migrate_uri(), true);
    assert_eq!(end["status"], "completed", "{end}\nmini-vmm: {}", here.stderr());
    first.terminate();
    here.qmp().ask("system_reset");
    wait_boot(&mut here, 2);
    let mut second = qemu.args("-incoming tcp:127.0.0.1:0").start();
    let out =
        here.migrate_command(&second.migrate_uri()).output().expect("mini-vmm migrate starts");
    assert!(out.status.success(), "{}\n{}", String::from_utf8_lossy(&out.stderr), second.log());
    let terminal = second.terminal();
    second.qmp().ask("system_reset");
    terminal.wait_for("BOOT 3", 60);
    assert_eq!(second.wait_exit(30), 0, "it powers off:\n{}", second.log());
}

#[test]
fn nothing_to_boot_is_said_by_the_firmware() {
    let dir = TempDir::new().expect("a directory");
    let disk = system_tests::work::disk(dir.path());
    let mut vm = machine(&disk, "").start();
    let words = "No bootable device.";
    vm.wait_serial(words, 60, |line| line.contains(words).then_some(()));
    assert_eq!(vm.qmp().ask("query-status")["status"], json!("running"));
    vm.qmp().ask("quit");
    assert_eq!(vm.wait_exit(30), 0);
}
