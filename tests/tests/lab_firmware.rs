//! Linux guests that boot by SeaBIOS from a disk, here and in QEMU, under real KVM.

use std::path::Path;

use system_tests::bootdisk;
use system_tests::linux::{Machine, Start, Terminal};
use system_tests::pair::Pair;
use system_tests::work::{check_disk, disk};
use tempfile::TempDir;

/// Work that leaves records on the second disk: the first is what the guest boots from.
const WORK: &str = "guest.disk=/dev/vdb guest.run=disk,clock";

fn args(boot: &Path, records: &Path) -> String {
    let (boot, records) = (boot.display(), records.display());
    format!("--memory 256M --smp 2 --disk path={boot} --disk path={records}")
}

/// The same machine for QEMU.
fn qemu_args(boot: &Path, records: &Path) -> String {
    let drive = |n: u32, path: &Path| {
        let path = path.display();
        format!(
            "-drive file={path},if=none,id=disk{n},format=raw -device virtio-blk-pci,drive=disk{n}"
        )
    };
    format!("-m 256 -smp 2 {} {}", drive(0, boot), drive(1, records))
}

/// Reboots, and waits until all is up again, by the firmware.
fn reboot(guest: &mut Terminal) {
    let from = guest.text().len();
    // A writer that goes on while the kernel takes its disk away has an error to tell.
    guest.tell("killall guest-tool; sleep 2; sync; reboot -f");
    guest.wait_new("GUEST READY", 120);
    let said = guest.text();
    let since = said.get(from..).unwrap_or_default();
    assert!(since.contains("SeaBIOS (version"), "its firmware started it:\n{since}");
    assert!(since.contains("loading"), "its boot sector loaded it:\n{since}");
}

/// The last record that the guest calls durable, and that nothing is wrong.
fn check(guest: &mut Terminal) -> u64 {
    guest.assert_content();
    guest.next_number("disk: record")
}

#[test]
fn a_disk_boots_here_reboots_and_powers_off() {
    let dir = TempDir::new().expect("a directory");
    let records = disk(dir.path());
    let boot = bootdisk::linux(dir.path(), WORK);
    let machine =
        Machine { args: args(&boot, &records), append: String::new(), start: Start::Itself };
    let mut guest = machine.boot(dir.path(), "first");
    // As firmware told it: all processors and all memory, and what ACPI has to say.
    let report = guest.shell("report; cat /proc/iomem; ls /sys/firmware/acpi/tables");
    for words in ["processors: 2", "System RAM", "FACP", "APIC", "DSDT"] {
        assert!(report.contains(words), "{words}:\n{report}");
    }
    check(&mut guest);
    reboot(&mut guest);
    let durable = check(&mut guest);
    guest.vm.qmp().ask("system_powerdown");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
    check_disk(&records, durable);
}

#[test]
fn a_guest_that_qemu_booted_from_a_disk_reboots_here_and_there() {
    let dir = TempDir::new().expect("a directory");
    let records = disk(dir.path());
    let boot = bootdisk::linux(dir.path(), WORK);
    let pair = Pair::from_disk(&args(&boot, &records), &qemu_args(&boot, &records));
    let mut first = pair.boot_qemu();
    check(&mut first.terminal);
    let mut here = pair.to_mini(first, "mini", true);
    check(&mut here);
    reboot(&mut here);
    check(&mut here);
    let mut there = pair.to_qemu(here);
    check(&mut there.terminal);
    reboot(&mut there.terminal);
    let durable = check(&mut there.terminal);
    there.qemu.qmp().ask("system_powerdown");
    assert_eq!(there.qemu.wait_exit(60), 0, "{}", there.qemu.log());
    check_disk(&records, durable);
}

#[test]
fn a_guest_that_qemu_gave_a_kernel_boots_its_disk_here() {
    let dir = TempDir::new().expect("a directory");
    let records = disk(dir.path());
    let boot = bootdisk::linux(dir.path(), WORK);
    // The kernel that QEMU was told of does not travel; the firmware does, and finds the disk's.
    let mut pair = Pair::new(&args(&boot, &records), &qemu_args(&boot, &records), WORK);
    pair.mini.start = Start::Itself;
    let mut first = pair.boot_qemu();
    check(&mut first.terminal);
    let mut here = pair.to_mini(first, "mini", true);
    check(&mut here);
    reboot(&mut here);
    let durable = check(&mut here);
    here.vm.qmp().ask("system_powerdown");
    assert_eq!(here.vm.wait_exit(60), 0, "{}", here.vm.stderr());
    check_disk(&records, durable);
}
