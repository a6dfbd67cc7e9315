//! A stock Debian kernel under real KVM: boot, move, reboot, power off.

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use system_tests::linux::Machine;
use system_tests::network::Tap;
use tempfile::TempDir;

/// How far the guest's wall clock may be off. Both clocks are read over a serial line by a busy,
/// emulated processor.
const WALL_CLOCK_TOLERANCE_S: u64 = 3;

fn disk(dir: &TempDir) -> String {
    let path = dir.path().join("disk.img");
    File::create(&path).and_then(|file| file.set_len(64 << 20)).expect("a disk image");
    path.display().to_string()
}

fn tool() -> String {
    std::env::var("MINI_VMM_GUEST_TOOL").expect("MINI_VMM_GUEST_TOOL is set by cargo xtask test")
}

/// Every record that the guest called durable is on the image.
fn check_disk(image: &str, last: u64) {
    let out = Command::new(tool())
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
    let tap = Tap::new("mvtap0", "10.99.0.1/24");
    let machine = Machine {
        args: format!(
            "--memory 256M --smp 2 --disk path={image} --net tap={} --rng --balloon --console null",
            tap.name()
        ),
        append: "guest.run=memory,disk,clock,fpu,tcp guest.ip=10.99.0.2/24".into(),
    };
    let mut guest = machine.boot(dir.path(), "first");
    guest.assert_content();
    // One TCP session for the whole time; every byte that comes back is checked.
    let mut session = Command::new(tool())
        .args(["tcp-client", "10.99.0.2", "7000", "100000", "20000"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the guest's tool runs here too");
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
        guest.wait_new("tcp-server:", 30);
        assert!(session.try_wait().expect("our own child").is_none(), "the TCP session goes on");
        for driver in ["virtio_blk", "virtio_net", "virtio_rng", "virtio_console"] {
            let report = guest.shell("report");
            assert!(report.contains(driver), "{driver} is bound:\n{report}");
        }
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
    kill(Pid::from_raw(session.id() as i32), Signal::SIGINT).expect("a signal to our own child");
    let said = session.wait_with_output().expect("our own child");
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    println!("{}", said.lines().last().unwrap_or_default());
    assert!(!said.contains("WRONG") && said.contains("tcp-client:"), "{said}");
    // A reboot starts the kernel again, here.
    guest.tell("reboot -f");
    guest.wait_new("GUEST READY", 90);
    // The power button is heard, and powers off by ACPI.
    guest.vm.qmp().ask("system_powerdown");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
    check_disk(&image, durable);
}

#[test]
fn a_stock_kernel_boots_on_one_processor_and_powers_off() {
    let dir = TempDir::new().expect("a directory");
    let image = disk(&dir);
    let machine = Machine {
        args: format!("--memory 256M --smp 1 --disk path={image},readonly=on"),
        append: String::new(),
    };
    let mut guest = machine.boot(dir.path(), "one");
    let report = guest.shell("report");
    assert!(report.contains("processors: 1"), "{report}");
    assert!(report.contains("virtio_blk"), "{report}");
    guest.assert_content();
    guest.tell("poweroff -f");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
}
