//! A stock Debian kernel under real KVM: boot, move, reboot, power off.

use std::fs::File;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use system_tests::linux::Machine;
use tempfile::TempDir;

/// How far the guest's wall clock may be off. Both clocks are read over a serial line by a busy,
/// emulated processor.
const WALL_CLOCK_TOLERANCE_S: u64 = 3;

fn disk(dir: &TempDir) -> String {
    let path = dir.path().join("disk.img");
    File::create(&path).and_then(|file| file.set_len(64 << 20)).expect("a disk image");
    path.display().to_string()
}

/// Every record that the guest called durable is on the image.
fn check_disk(image: &str, last: u64) {
    let tool = std::env::var("MINI_VMM_GUEST_TOOL").expect("MINI_VMM_GUEST_TOOL");
    let out = Command::new(tool)
        .args(["disk-check", image, &last.to_string()])
        .output()
        .expect("the guest's tool runs here too");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "records are lost:\n{said}");
    println!("{said}");
}

#[test]
fn three_migrations_in_a_row_lose_nothing() {
    let dir = TempDir::new().expect("a directory");
    let image = disk(&dir);
    let machine = Machine {
        args: format!("--memory 256M --smp 2 --disk path={image}"),
        append: "guest.run=memory,disk,clock,fpu".into(),
    };
    let mut guest = machine.boot(dir.path(), "first");
    guest.assert_content();
    for name in ["second", "third", "fourth"] {
        let durable = guest.next_number("disk: record");
        let verified = guest.next_number("memory: generation");
        let there = machine.incoming(dir.path(), name, "127.0.0.1");
        guest = guest.migrate_to(there);
        // The work goes on where it was, all of it, and on both processors.
        assert!(guest.next_number("disk: record") > durable, "the disk writer went on");
        assert!(guest.next_number("memory: generation") >= verified, "the memory worker went on");
        guest.wait_new("fpu:", 30);
        guest.wait_new("clock:", 30);
        let report = guest.shell("report");
        assert!(report.contains("processors: 2"), "{report}");
        assert!(report.contains("clocksource: kvm-clock"), "{report}");
        let date = report
            .lines()
            .find_map(|line| line.trim().strip_prefix("date: ")?.parse::<u64>().ok())
            .expect("a date");
        let here = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        assert!(
            date.abs_diff(here) <= WALL_CLOCK_TOLERANCE_S,
            "the guest says it is {date}, the host {here}"
        );
        guest.assert_content();
    }
    let durable = guest.next_number("disk: record");
    // A reboot starts the kernel again, here.
    guest.tell("reboot -f");
    guest.wait_new("GUEST READY", 90);
    // The power button is heard, and powers off by ACPI.
    guest.vm.qmp().ask("system_powerdown");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
    check_disk(&image, durable);
}

#[test]
fn a_stock_kernel_boots_with_one_and_with_four_processors() {
    let dir = TempDir::new().expect("a directory");
    let image = disk(&dir);
    for smp in [1, 4] {
        let machine = Machine {
            args: format!("--memory 256M --smp {smp} --disk path={image},readonly=on"),
            append: String::new(),
        };
        let mut guest = machine.boot(dir.path(), &format!("smp{smp}"));
        let report = guest.shell("report");
        assert!(report.contains(&format!("processors: {smp}")), "{report}");
        assert!(report.contains("virtio_blk"), "{report}");
        guest.assert_content();
        guest.tell("poweroff -f");
        assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
    }
}
