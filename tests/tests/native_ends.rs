//! How a guest and its process end: power-off, reset, triple fault, signals.

use nix::sys::signal::Signal;
use system_tests::guest::Guest;
use system_tests::vm::VmArgs;

#[test]
fn a_guest_that_powers_off_ends_its_process_with_0() {
    let mut guest = Guest::ready("64M", 1, "set=1M");
    let mut qmp = guest.vm.qmp();
    guest.line.send(b"q");
    let event = qmp.event("SHUTDOWN");
    assert_eq!(event["data"]["guest"], true, "{event}");
    assert_eq!(event["data"]["reason"], "guest-shutdown", "{event}");
    assert_eq!(guest.vm.wait_exit(20), 0, "{}", guest.vm.stderr());
    guest.nothing_is_left();
}

#[test]
fn a_guest_that_resets_starts_anew_in_the_same_process() {
    let mut guest = Guest::ready("64M", 2, "set=1M,vcpus=2");
    let mut qmp = guest.vm.qmp();
    let from = guest.line.text().len();
    guest.line.send(b"b");
    let event = qmp.event("RESET");
    assert_eq!(event["data"]["guest"], true, "{event}");
    assert_eq!(event["data"]["reason"], "guest-reset", "{event}");
    for words in ["selfcheck: start vcpus=2", "selfcheck: ready"] {
        guest.line.wait_line_from(from, words, 60, |line| line.contains(words).then_some(()));
    }
    guest.is_whole();
    assert_eq!(qmp.status(), "running");
}

#[test]
fn a_triple_fault_is_reported_with_registers_and_code_and_is_a_failure() {
    let mut guest = Guest::ready("64M", 1, "set=1M");
    guest.line.send(b"t");
    assert_eq!(guest.vm.wait_exit(20), 1, "{}", guest.vm.stderr());
    let said = guest.vm.stderr();
    for words in ["triple fault", "rip=", "rflags=", "r15=", "cr3=", "efer=", "code at 0x"] {
        assert!(said.contains(words), "'{words}' is not in:\n{said}");
    }
    guest.nothing_is_left();
}

#[test]
fn a_signal_ends_the_process_cleanly_whatever_the_guest_does() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut busy = Guest::ready("64M", 2, "set=16M,rate=0,vcpus=2");
        let mut paused = Guest::boot_with("64M", 1, "", "--paused");
        let mut waits = Guest::incoming("64M", 1);
        for guest in [&mut busy, &mut paused, &mut waits] {
            let mut qmp = guest.vm.qmp();
            guest.vm.signal(signal);
            let event = qmp.event("SHUTDOWN");
            assert_eq!(event["data"]["reason"], "host-signal", "{event}");
            assert_eq!(guest.vm.wait_exit(20), 0, "{signal}: {}", guest.vm.stderr());
            guest.nothing_is_left();
        }
    }
}

/// What a VM may wait for while it is built: a kernel, a disk, or what was saved, from a pipe that
/// nobody writes to.
#[test]
fn a_signal_ends_a_vm_that_is_still_being_built() {
    for what in [
        "--kernel {} --memory 64M",
        "--selfcheck= --memory 64M --disk path={},readonly=on",
        "--memory 64M --migrate-listen file:{}",
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let args = what.replace("{}", &pipe.display().to_string());
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let mut vm = VmArgs::default().args(&args).spawn();
            let socket = vm.qmp_path();
            system_tests::wait::until(
                "the VM to begin",
                30,
                || socket.exists().then_some(()),
                || "",
            );
            vm.signal(signal);
            assert_eq!(vm.wait_exit(10), 0, "{args}: {}", vm.stderr());
            let directory = socket.parent().expect("a directory of its own");
            assert!(!directory.exists(), "{args}: its directory is left behind");
            assert_eq!(vm.stderr(), "", "{args}");
        }
    }
}

#[test]
fn a_page_that_is_corrupted_is_found_and_named() {
    // Without this, all that the guest says of itself elsewhere would prove nothing.
    let guest = Guest::ready("64M", 1, "set=1M,verify=20000");
    guest.line.send(b"x");
    let page = guest.line.wait_line_from(0, "the corrupted page", 20, |line| {
        line.split_once("corrupted page=").map(|(_, page)| page.to_string())
    });
    let fail = guest.line.wait_for("FAIL", 60);
    assert!(fail.contains(&format!("page={page} ")), "{page} was corrupted: {fail}");
}
