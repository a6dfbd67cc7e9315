//! Guests that go where a printed command line leads, under real KVM.

use system_tests::linux::{Machine, Start};
use system_tests::pair::InQemu;
use system_tests::qemu::QemuArgs;
use system_tests::vm::Vm;
use system_tests::work::{check_disk, disk};
use tempfile::TempDir;

/// What `mini-vmm qemu-command` says of this VM.
fn line(vm: &Vm, format: &[&str]) -> String {
    let out = vm.cli(&[&["qemu-command", "--incoming", "tcp:127.0.0.1:0"], format].concat());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text").trim_end().to_string()
}

#[test]
fn the_printed_line_takes_a_guest_to_qemu_and_back() {
    let dir = TempDir::new().expect("a directory");
    let image = disk(dir.path());
    let machine = Machine {
        args: format!(
            "--memory 256M --smp 2 --disk path={},addr=9,virtio=modern --rng --console null \
             --balloon=addr=1f",
            image.display()
        ),
        append: "guest.run=memory,disk,clock".into(),
        start: Start::Vmlinux,
    };
    let guest = machine.boot(dir.path(), "first");
    let (words, shell) = (line(&guest.vm, &["--json"]), line(&guest.vm, &[]));

    let qemu = QemuArgs::printed(&words).start();
    let terminal = qemu.terminal();
    println!("mini-vmm -> QEMU: {}", guest.leave_for(&qemu.migrate_uri()));
    let mut guest = InQemu { qemu, terminal };
    guest.terminal.next_number("memory: generation");
    guest.terminal.next_number("disk: record");
    guest.terminal.assert_content();

    let mut there = Machine::like(&shell, dir.path(), "second");
    let end = guest.qemu.migrate(&there.vm.migrate_uri(), true);
    assert_eq!(end["status"], "completed", "{end}\nmini-vmm: {}", there.vm.stderr());
    guest.qemu.terminate();
    there.next_number("memory: generation");
    let durable = there.next_number("disk: record");
    there.assert_content();
    // The kernel is in the line as well.
    there.tell("reboot -f");
    there.wait_new("GUEST READY", 90);
    there.vm.qmp().ask("system_powerdown");
    assert_eq!(there.vm.wait_exit(60), 0, "{}", there.vm.stderr());
    check_disk(&image, durable);
}
