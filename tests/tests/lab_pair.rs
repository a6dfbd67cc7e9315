//! Two hosts with different kernels and processors, joined by a network: there and back.

use std::path::Path;
use std::process::Command;

use system_tests::linux::{Machine, Start};
use system_tests::peer::{self, PeerVm};
use system_tests::work::{check_disk, disk};
use tempfile::TempDir;

#[test]
fn a_guest_goes_to_another_host_and_comes_back() {
    let release = |mut command: Command| {
        String::from_utf8(command.arg("-r").output().expect("uname runs").stdout).expect("a name")
    };
    let here = release(Command::new("uname"));
    let there = release(peer::command("uname"));
    assert_ne!(here, there, "the two hosts are to have different kernels");

    let dir = TempDir::new().expect("a directory");
    // The shared directory is a disk that both hosts reach.
    let image = disk(Path::new(&peer::shared_directory()));
    let machine = Machine {
        // What both processors have.
        args: format!("--cpu x86-64-v2 --memory 256M --smp 2 --disk path={}", image.display()),
        append: "guest.run=memory,disk,clock,fpu".into(),
        start: Start::Vmlinux,
    };
    let guest = machine.boot(dir.path(), "first");
    let first = guest.next_number("disk: record");

    let remote = PeerVm::incoming(&machine, "there", 7800);
    let report = guest.leave_for(remote.uri());
    println!("there: {report}");
    // All its work goes on there.
    for work in ["disk: record", "memory: generation", "clock: realtime", "fpu: "] {
        remote.wait_for(work, 30);
    }
    assert!(!remote.text().contains("WRONG"), "{}", remote.text());

    let mut back = machine.incoming(dir.path(), "back", &peer::own_address());
    println!("back: {}", remote.migrate_to(&back.vm.migrate_uri()));
    assert!(back.next_number("disk: record") > first, "the disk writer went on");
    back.wait_new("memory: generation", 30);
    let report = back.shell("report");
    assert!(report.contains("processors: 2"), "{report}");
    back.assert_content();
    let durable = back.next_number("disk: record");
    back.vm.qmp().ask("system_powerdown");
    assert_eq!(back.vm.wait_exit(60), 0, "{}", back.vm.stderr());

    check_disk(&image, durable);
}
