//! What a QEMU sends that can't be taken: refused by name, and QEMU's guest runs on.

use serde_json::json;
use system_tests::pair::Pair;
use system_tests::work::disk;
use tempfile::TempDir;

#[test]
fn what_does_not_fit_is_refused_by_name_and_the_guest_in_qemu_runs_on() {
    let dir = TempDir::new().expect("a directory");
    let disk = disk(dir.path()).display().to_string();
    let qemu = format!(
        "-m 256 -smp 1 -drive file={disk},if=none,id=disk0,format=raw \
         -device virtio-blk-pci,drive=disk0 -device virtio-rng-pci"
    );
    let mini = |memory: &str, smp: u32, devices: &str| {
        Pair::new(&format!("--memory {memory} --smp {smp} {devices}"), &qemu, "guest.run=memory")
    };
    let right = format!("--disk path={disk} --rng");
    let guest = mini("256M", 1, &right).boot_qemu();
    let cases = [
        ("128M", 1, right.clone(), "Size mismatch: pc.ram"),
        ("256M", 1, format!("--disk path={disk}"), "virtio-rng"),
        ("256M", 1, format!("--disk path={disk} --rng=addr=7"), "virtio-rng"),
        ("256M", 1, format!("--disk path={disk},virtio=modern --rng"), "virtio-blk"),
        ("256M", 1, format!("--disk path={disk},queues=2 --rng"), "virtio-blk"),
    ];
    for (memory, smp, devices, name) in cases {
        let pair = mini(memory, smp, &devices);
        let mut there = pair.mini.incoming(pair.dir.path(), "there", "127.0.0.1");
        let end = guest.qemu.migrate(&there.vm.migrate_uri(), true);
        assert_eq!(end["status"], "failed", "{devices}: {end}");
        assert_eq!(there.vm.wait_exit(20), 1);
        let said = there.vm.stderr();
        assert!(said.contains(name), "{memory} {devices}: no '{name}' in:\n{said}");
        assert_eq!(guest.qemu.qmp().status(), "running", "{devices}");
    }
    // Several connections: the first one alone would look complete.
    let set = |on: bool| {
        let multifd = json!([{ "capability": "multifd", "state": on }]);
        let arguments = json!({ "capabilities": multifd });
        let mut qmp = guest.qemu.qmp();
        qmp.execute("migrate-set-capabilities", arguments).expect("a capability");
    };
    let pair = mini("256M", 1, &right);
    let mut there = pair.mini.incoming(pair.dir.path(), "there", "127.0.0.1");
    set(true);
    let end = guest.qemu.migrate(&there.vm.migrate_uri(), true);
    assert_eq!(end["status"], "failed", "{end}");
    // At once, and not when the silence has lasted too long.
    assert_eq!(there.vm.wait_exit(5), 1, "a guest without its pages: {}", there.vm.stderr());
    assert!(there.vm.stderr().contains("'multifd'"), "{}", there.vm.stderr());
    set(false);
    drop(there);

    assert_eq!(guest.qemu.qmp().status(), "running");
    guest.terminal.next_number("memory: generation");
    let mut guest = pair.to_mini(guest, "at-last", true);
    guest.next_number("memory: generation");
    guest.assert_content();
}
