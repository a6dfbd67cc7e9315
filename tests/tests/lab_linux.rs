//! A stock Debian kernel under real KVM: boot, move, reboot, power off.

use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use system_tests::linux::{Linux, Machine, Start};
use system_tests::network::{ARP, Sniffer, Tap, is_gratuitous_arp};
use system_tests::pair::assert_interrupts_go_on;
use system_tests::wait;
use system_tests::work::{Session, check_disk, disk};
use tempfile::TempDir;

/// How far the guest's wall clock may be off, beyond the time that it takes to ask for it.
const WALL_CLOCK_TOLERANCE_S: u64 = 3;

/// The host's time, in seconds since 1970.
fn host_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

#[test]
fn three_migrations_in_a_row_lose_nothing() {
    let dir = TempDir::new().expect("a directory");
    let image = disk(dir.path());
    let tap = Tap::new("mvtap0", "10.99.0.1/24");
    let machine = Machine {
        args: format!(
            "--memory 256M --smp 2 --disk path={} --net tap={} --rng --balloon --console null",
            image.display(),
            tap.name()
        ),
        append: "guest.run=memory,disk,clock,fpu,tcp guest.ip=10.99.0.2/24".into(),
        start: Start::Vmlinux,
    };
    let mut guest = machine.boot(dir.path(), "first");
    guest.assert_content();
    // One TCP session for the whole time; every byte that comes back is checked.
    let mut session = Session::start("10.99.0.2");
    for name in ["second", "third", "fourth"] {
        let durable = guest.next_number("disk: record");
        let verified = guest.next_number("memory: generation");
        let there = machine.incoming(dir.path(), name, "127.0.0.1");
        // Its own driver tells the network, because ours asks it to.
        let sniffer = Sniffer::new(ARP);
        let announced = thread::spawn(move || {
            sniffer.hear(1, 60, |frame| is_gratuitous_arp(frame, [10, 99, 0, 2]))
        });
        guest = guest.migrate_to(there);
        announced.join().expect("the guest announced itself");
        // The work goes on where it was, all of it, and on both processors.
        assert!(guest.next_number("disk: record") > durable, "the disk writer went on");
        assert!(guest.next_number("memory: generation") >= verified, "the memory worker went on");
        guest.wait_new("fpu:", 30);
        guest.wait_new("clock:", 30);
        guest.wait_new("tcp-server:", 30);
        session.assert_alive();
        let asked = host_time();
        let report = guest.shell("report");
        let answered = host_time();
        for driver in ["virtio_blk", "virtio_net", "virtio_rng", "virtio_console"] {
            assert!(report.contains(driver), "{driver} is bound:\n{report}");
        }
        assert!(report.contains("processors: 2"), "{report}");
        assert!(report.contains("clocksource: kvm-clock"), "{report}");
        let date = report
            .lines()
            .find_map(|line| line.trim().strip_prefix("date: ")?.parse::<u64>().ok())
            .expect("a date");
        assert!(
            (asked - WALL_CLOCK_TOLERANCE_S..=answered + WALL_CLOCK_TOLERANCE_S).contains(&date),
            "the guest says it is {date}, the host {asked} to {answered}"
        );
        guest.assert_content();
    }
    let durable = guest.next_number("disk: record");
    session.finish();
    // A reboot starts the kernel again, here.
    guest.tell("reboot -f");
    guest.wait_new("GUEST READY", 90);
    // The power button is heard, and powers off by ACPI.
    guest.vm.qmp().ask("system_powerdown");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
    check_disk(&image, durable);
}

#[test]
fn a_rehearsal_loads_queues_that_are_at_work_and_disturbs_nothing() {
    let dir = TempDir::new().expect("a directory");
    let image = disk(dir.path());
    let tap = Tap::new("mvtap2", "10.97.0.1/24");
    let machine = Machine {
        args: format!(
            "--memory 256M --smp 1 --disk path={} --net tap={} --rng --balloon --console null",
            image.display(),
            tap.name()
        ),
        append: "guest.run=memory,disk,clock,tcp guest.ip=10.97.0.2/24".into(),
        start: Start::Vmlinux,
    };
    let mut guest = machine.boot(dir.path(), "here");
    guest.assert_content();
    let mut session = Session::start("10.97.0.2");
    guest.wait_new("tcp-server:", 60);
    let there = machine.incoming(dir.path(), "there", "127.0.0.1");
    let uri = there.vm.migrate_uri();
    for _ in 0..2 {
        let out = guest.vm.cli(&["migrate", "--rehearse", &uri, "--json"]);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let errors = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}{errors}\n{}", there.vm.stderr());
        let answer: Value = serde_json::from_str(&said).expect("JSON");
        println!("{answer}");
        assert_eq!(answer["would-move"], true, "{answer}");
        let rehearsal = &answer["rehearsal"];
        assert_eq!(rehearsal["loaded"], true, "{answer}");
        assert_eq!(rehearsal["compared-sections"], rehearsal["sections"], "{answer}");
        // Nothing has become of it on either side.
        assert_eq!(guest.vm.qmp().status(), "running");
        assert_eq!(there.vm.qmp().status(), "inmigrate");
        assert_eq!(there.text(), "", "the guest ran there");
        let durable = guest.next_number("disk: record");
        let verified = guest.next_number("memory: generation");
        guest.wait_new("tcp-server:", 30);
        assert!(guest.next_number("disk: record") > durable, "the disk writer went on");
        assert!(guest.next_number("memory: generation") >= verified, "so did the memory's");
        session.assert_alive();
        assert_interrupts_go_on(&mut guest, 1);
        guest.assert_content();
    }
    // The real one, to the same destination, compared to the last bit.
    let out = guest.migrate_command(&uri).arg("--verify").output().expect("mini-vmm starts");
    let errors = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{errors}\n{}\n{}", guest.vm.stderr(), there.vm.stderr());
    println!("{}", String::from_utf8_lossy(&out.stdout));
    assert_eq!(guest.vm.wait_exit(20), 0, "{}", guest.vm.stderr());
    guest.assert_calm();
    let mut guest = there;
    guest.wait_new("tcp-server:", 60);
    assert_interrupts_go_on(&mut guest, 1);
    guest.assert_content();
    let durable = guest.next_number("disk: record");
    session.finish();
    guest.tell("poweroff -f");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
    check_disk(&image, durable);
}

#[test]
fn a_stock_kernel_boots_on_one_processor_and_powers_off() {
    let dir = TempDir::new().expect("a directory");
    let image = disk(dir.path());
    let machine = Machine {
        args: format!("--memory 256M --smp 1 --disk path={},readonly=on", image.display()),
        append: String::new(),
        start: Start::BzImage,
    };
    let mut guest = machine.boot(dir.path(), "one");
    let report = guest.shell("report");
    assert!(report.contains("processors: 1"), "{report}");
    assert!(report.contains("virtio_blk"), "{report}");
    guest.assert_content();
    guest.tell("poweroff -f");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
}

/// Its pages are noted in rings as short as they may be, so that they fill.
#[test]
fn a_stock_kernel_with_four_processors_moves_and_powers_off() {
    let dir = TempDir::new().expect("a directory");
    let machine = Machine {
        args: "--memory 256M --smp 4 --dirty-ring 1024".into(),
        append: "guest.run=memory,clock".into(),
        start: Start::Vmlinux,
    };
    let mut guest = machine.boot(dir.path(), "here");
    guest.assert_content();
    let verified = guest.next_number("memory: generation");
    let there = machine.incoming(dir.path(), "there", "127.0.0.1");
    guest = guest.migrate_to(there);
    assert!(guest.next_number("memory: generation") >= verified, "the memory worker went on");
    guest.wait_new("clock:", 30);
    let report = guest.shell("report");
    assert!(report.contains("processors: 4"), "{report}");
    guest.assert_content();
    guest.vm.qmp().ask("system_powerdown");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
}

/// The new processes have private memory until they are given the guest's own.
#[test]
fn a_stock_kernel_goes_from_process_to_process_in_its_own_memory() {
    let dir = TempDir::new().expect("a directory");
    let image = disk(dir.path());
    let args = format!("--memory 256M --smp 2 --disk path={}", image.display());
    let append = "guest.run=memory,disk,clock,fpu";
    let machine = |args| Machine { args, append: append.into(), start: Start::Vmlinux };
    let mut guest = machine(format!("{args} --shared-memory")).boot(dir.path(), "first");
    let waits = machine(args);
    guest.assert_content();
    for name in ["second", "third"] {
        let durable = guest.next_number("disk: record");
        let verified = guest.next_number("memory: generation");
        let uri = format!("unix:{}", dir.path().join(name).display());
        let there = waits.restoring(dir.path(), name, &uri);
        let mut command = guest.vm.migrate_command(&uri);
        command.arg("--local");
        println!("{}", guest.leave_by(command));
        guest = there;
        assert!(guest.next_number("disk: record") > durable, "the disk writer went on");
        assert!(guest.next_number("memory: generation") >= verified, "the memory worker went on");
        guest.wait_new("fpu:", 30);
        guest.wait_new("clock:", 30);
        let report = guest.shell("report");
        assert!(report.contains("clocksource: kvm-clock"), "{report}");
        guest.assert_content();
    }
    // What this process has never looked at of the memory goes to another host all the same.
    guest = guest.migrate_to(waits.incoming(dir.path(), "elsewhere", "127.0.0.1"));
    let durable = guest.next_number("disk: record");
    guest.next_number("memory: generation");
    guest.assert_content();
    guest.vm.qmp().ask("system_powerdown");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
    check_disk(&image, durable);
}

#[test]
fn the_balloon_is_asked_here_and_there_and_the_keyboard_translates() {
    const MIB: u64 = 1 << 20;
    let actual = |guest: &Linux| {
        let said = guest.vm.qmp().ask("query-balloon");
        said["actual"].as_u64().unwrap_or_else(|| panic!("no number: {said}"))
    };
    let ask = |guest: &Linux, mib: u64| {
        let mut qmp = guest.vm.qmp();
        qmp.execute("balloon", json!({ "value": mib * MIB })).expect("there is a balloon");
        wait::until(
            "the guest to do as it is asked",
            60,
            || (actual(guest) == mib * MIB).then_some(()),
            || guest.text(),
        );
        // Paced: the last one is the end of it.
        while qmp.event("BALLOON_CHANGE")["data"]["actual"] != mib * MIB {}
    };
    let dir = TempDir::new().expect("a directory");
    let machine = Machine {
        args: "--memory 256M --smp 1 --balloon".into(),
        append: String::new(),
        start: Start::Vmlinux,
    };
    let mut guest = machine.boot(dir.path(), "here");
    let inputs = guest.shell("cat /proc/bus/input/devices");
    assert!(inputs.contains("AT Translated Set 2 keyboard"), "{inputs}");
    assert_eq!(actual(&guest), 256 * MIB);
    ask(&guest, 208);
    let there = machine.incoming(dir.path(), "there", "127.0.0.1");
    guest = guest.migrate_to(there);
    assert_eq!(actual(&guest), 208 * MIB, "what was given came along");
    ask(&guest, 256);
    guest.assert_content();
    guest.tell("poweroff -f");
    assert_eq!(guest.vm.wait_exit(60), 0, "{}", guest.vm.stderr());
}
