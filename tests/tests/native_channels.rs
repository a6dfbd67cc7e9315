//! Memory goes through connections of its own: between mini-vmms, and from and to a QEMU with its
//! capability `multifd`.

use serde_json::json;
use system_tests::guest::Guest;
use system_tests::qemu::QemuArgs;
use system_tests::serial::SerialLine;
use system_tests::vm::VmArgs;
use system_tests::wait;

const PARAMS: &str = "set=16M,rate=0,verify=20000";

#[test]
fn a_busy_guest_moves_over_many_connections_and_both_sides_compare_equal() {
    let mut here = Guest::ready("256M", 2, "vcpus=2,set=32M,rate=0,spread=1,verify=20000");
    for channels in ["4", "2", "16"] {
        let mut there = Guest::incoming("256M", 2);
        let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
        let out = command.args(["--verify", "--channels", channels, "--json"]).output();
        let out = out.expect("mini-vmm migrate starts");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
        here.nothing_is_left();
        there.is_whole();
        here = there;
    }
}

#[test]
fn a_destination_that_dies_half_way_leaves_the_guest_and_the_next_takes_it() {
    let mut here = Guest::ready("256M", 1, PARAMS);
    let mut there = Guest::incoming("256M", 1);
    let mut qmp = here.vm.qmp();
    let multifd = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
    qmp.execute("migrate-set-capabilities", multifd).expect("a capability");
    let slow = json!({ "multifd-channels": 4, "max-bandwidth": 32 << 20 });
    let mut qmp = here.begin(&there.vm.migrate_uri(), &slow);
    wait::until(
        "pages",
        60,
        || (qmp.ask("query-migrate")["ram"]["normal"].as_u64() > Some(2000)).then_some(()),
        || "",
    );
    there.vm.signal(nix::sys::signal::Signal::SIGKILL);
    let end = qmp.wait_migrated(60);
    assert_eq!(end["status"], "failed", "{end}");
    here.is_whole();
    there.vm.wait_exit(20);
    let fast = json!({ "max-bandwidth": 0 });
    qmp.execute("migrate-set-parameters", fast).expect("parameters");
    drop(qmp);
    here.moves_after_all("256M", 1, "");
}

#[test]
fn threads_that_bring_pages_in_give_way_to_vcpus_and_none_does_when_the_guest_runs() {
    const SCHED_BATCH: u32 = 3;
    let mut here = Guest::ready("256M", 1, PARAMS);
    for (channels, name) in [(0, "migration-in"), (3, "migration-ch2")] {
        let mut there = Guest::incoming("256M", 1);
        let mut qmp = here.vm.qmp();
        let several = json!({ "capability": "multifd", "state": channels > 0 });
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": [several] }))
            .expect("a capability");
        let slow = json!({ "multifd-channels": channels.max(1), "max-bandwidth": 32 << 20 });
        let mut qmp = here.begin(&there.vm.migrate_uri(), &slow);
        // Not between sections, and over several connections not for the first pages of one.
        let policies = wait::until(
            "a thread to give way",
            60,
            || Some(there.vm.policies()).filter(|all| all.contains(&(name.into(), SCHED_BATCH))),
            || format!("{:?}\n{}", there.vm.policies(), there.vm.stderr()),
        );
        for serving in ["vcpu0", "io"] {
            assert!(policies.contains(&(serving.into(), 0)), "{policies:?}");
        }
        assert_eq!(qmp.ask("query-migrate")["status"], "active");
        qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 })).expect("no limit");
        assert_eq!(qmp.wait_migrated(60)["status"], "completed");
        there.is_whole();
        // Threads that have nothing to do any more may take a moment to end.
        wait::until(
            "nobody to give way",
            20,
            || there.vm.policies().iter().all(|(_, policy)| *policy == 0).then_some(()),
            || format!("{:?}", there.vm.policies()),
        );
        assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
        here = there;
    }
}

#[test]
fn what_has_one_connection_only_and_numbers_that_nobody_has_are_refused() {
    let here = Guest::ready("64M", 1, PARAMS);
    let run = |args: &[&str]| {
        let out = here.vm.migrate_command(args[0]).args(&args[1..]).output().expect("it starts");
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    for count in ["0", "17", "many"] {
        assert_eq!(run(&["tcp:127.0.0.1:1", "--channels", count]).0, Some(2), "{count}");
    }
    let file = here.vm.dir().join("vm.mig");
    let (code, said) = run(&[&format!("file:{}", file.display()), "--channels", "4"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("further connections") && said.contains("tcp:HOST:PORT"), "{said}");
    assert!(!file.exists());
}

#[test]
fn compressed_pages_arrive_whole_and_are_fewer_bytes() {
    let mut here = Guest::ready("256M", 2, "vcpus=2,set=32M,rate=2000,spread=1,verify=20000");
    for how in [&["zstd"][..], &["zstd:3", "--channels", "4"], &["zstd:19", "--channels", "2"]] {
        let mut there = Guest::incoming("256M", 2);
        let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
        command.args(["--verify", "--json", "--compress"]).args(how);
        let out = command.output().expect("mini-vmm migrate starts");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let said: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
        let n = |key: &str| said["report"][key].as_u64().expect("a number");
        // Four words in a page say something.
        assert!(n("normal-pages") > 50_000, "{said}");
        assert!(n("transferred-bytes") < n("normal-pages") * 4096 / 8, "{said}");
        assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
        there.is_whole();
        here = there;
    }
    for how in ["lz4", "zstd:0", "zstd:20", "zstd:x", "zstd:"] {
        let out = here.vm.migrate_command("tcp:127.0.0.1:1").args(["--compress", how]).output();
        assert_eq!(out.expect("it starts").status.code(), Some(2), "{how}");
    }
}

#[test]
fn a_qemu_and_a_mini_vmm_exchange_a_guest_over_several_connections() {
    exchange_with_a_qemu("none");
}

#[test]
fn a_qemu_and_a_mini_vmm_exchange_a_guest_compressed() {
    exchange_with_a_qemu("zstd");
}

fn exchange_with_a_qemu(compression: &str) {
    let mut here = Guest::ready("64M", 1, PARAMS);
    let several = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
    let count = json!({
        "multifd-channels": 3, "max-bandwidth": 1u64 << 40, "multifd-compression": compression,
    });
    let compress: &[&str] = if compression == "zstd" { &["--compress", "zstd"] } else { &[] };

    // It shows that MSR to a guest where it is not told not to, and cannot set it on every host.
    let qemu = QemuArgs::new("-accel kvm -cpu host,-arch-capabilities -m 64 -smp 1")
        .args("-incoming defer")
        .start();
    {
        let mut qmp = qemu.qmp();
        qmp.execute("migrate-set-capabilities", several.clone()).expect("a capability");
        qmp.execute("migrate-set-parameters", count.clone()).expect("parameters");
        qmp.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" })).expect("it listens");
    }
    let to = qemu.migrate_uri();
    let mut command = here.vm.migrate_command(&to);
    let out = command.args(["--channels", "3"]).args(compress).output().expect("it starts");
    assert!(out.status.success(), "{}\n{}", String::from_utf8_lossy(&out.stderr), qemu.log());
    assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
    let line = SerialLine::attach(&qemu.path("serial"));
    let from = line.text().len();
    line.send(b"v");
    line.wait_line_from(from, "verified all pages=", 120, |line| {
        assert!(!line.contains("FAIL"), "the guest found a difference: {line}");
        line.contains("verified all pages=").then_some(())
    });

    // And back, where QEMU's number of connections must be known here, as between two QEMUs.
    let mut there = Guest::start(VmArgs::default().args("--memory 64M --migrate-listen defer"));
    let mut qmp = there.vm.qmp();
    qmp.execute("migrate-set-capabilities", several.clone()).expect("a capability");
    qmp.execute("migrate-set-parameters", count.clone()).expect("parameters");
    qmp.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" })).expect("it listens");
    drop(qmp);
    {
        let mut qmp = qemu.qmp();
        qmp.execute("migrate-set-capabilities", several).expect("a capability");
        qmp.execute("migrate-set-parameters", count).expect("parameters");
    }
    let end = qemu.migrate(&there.vm.migrate_uri(), true);
    assert_eq!(end["status"], "completed", "{end}\n{}", there.vm.stderr());
    if compression == "zstd" {
        // As it was received: a QEMU counts what it would have been.
        let report = &there.vm.qmp().ask("x-mini-vmm-status")["report"];
        let n = |key: &str| report[key].as_u64().expect("a number");
        assert!(n("normal-pages") > 10_000, "{report}");
        assert!(n("transferred-bytes") < n("normal-pages") * 4096 / 4, "{report}");
    }
    drop(qemu);
    there.is_whole();
}
