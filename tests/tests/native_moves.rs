//! The self-checking guest moves between processes on this machine.

use serde_json::json;
use system_tests::vm::Vm;

/// Waits until the guest has filled its memory.
fn ready(vm: &mut Vm) {
    vm.wait_serial("the guest to be ready", 120, |line| {
        assert!(!line.contains("FAIL"), "{line}");
        line.contains("selfcheck: ready").then_some(())
    });
}

fn number(line: &str, key: &str) -> Option<u64> {
    line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
}

/// The next status lines of the guest are well, and it has verified more than all of its memory
/// since it arrived.
fn goes_on(vm: &mut Vm) -> u64 {
    let verified = |line: &str| {
        assert!(!line.contains("FAIL"), "the guest found a difference: {line}");
        Some((number(line, "verified")?, number(line, "pages")?, number(line, "up_ms")?))
    };
    let (before, pages, _) = vm.wait_serial("a status line", 60, verified);
    vm.wait_serial("all memory to be verified again", 120, |line| {
        let (now, _, up_ms) = verified(line)?;
        (now > before + pages).then_some(up_ms)
    })
}

fn migrate(from: &mut Vm, to: &Vm, verify: bool) {
    let mut command = from.migrate_command(&to.migrate_uri());
    if verify {
        command.arg("--verify");
    }
    let out = command.output().expect("mini-vmm migrate starts");
    assert!(
        out.status.success(),
        "{}\nsource: {}\ndestination: {}",
        String::from_utf8_lossy(&out.stderr),
        from.stderr(),
        to.stderr()
    );
    assert_eq!(from.wait_exit(20), 0, "the source ends well:\n{}", from.stderr());
}

fn moves_verified(memory: &str, smp: u32, params: &str) {
    let mut here = Vm::selfcheck(memory, smp, params).start();
    ready(&mut here);
    let mut there = Vm::incoming(memory, smp).start();
    migrate(&mut here, &there, true);
    goes_on(&mut there);
}

#[test]
fn one_vcpu_under_dirty_load_moves_and_both_sides_compare_equal() {
    moves_verified("64M", 1, "set=16M,rate=0,verify=20000");
}

#[test]
fn two_vcpus_under_dirty_load_move_and_both_sides_compare_equal() {
    moves_verified("256M", 2, "set=32M,rate=20000,verify=60000");
}

#[test]
fn memory_on_both_sides_of_the_pci_hole_arrives() {
    moves_verified("5G", 1, "fill=64M,set=16M,rate=4000,verify=20000");
}

#[test]
fn twenty_moves_in_a_row_lose_nothing_and_time_never_goes_back() {
    let mut guest = Vm::selfcheck("64M", 1, "set=8M,rate=4000,verify=20000,every=200").start();
    ready(&mut guest);
    let mut up_ms = 0;
    for hop in 0..20 {
        let mut there = Vm::incoming("64M", 1).start();
        migrate(&mut guest, &there, hop % 5 == 0);
        std::mem::swap(&mut guest, &mut there);
        let now = guest.wait_serial("a status line after the move", 30, |line| {
            assert!(!line.contains("FAIL"), "hop {hop}: {line}");
            number(line, "up_ms")
        });
        assert!(now > up_ms, "hop {hop}: the guest's clock went from {up_ms} to {now}");
        up_ms = now;
    }
    goes_on(&mut guest);
}

#[test]
fn a_paused_guest_arrives_paused_and_goes_on_when_told() {
    let mut here = Vm::selfcheck("64M", 1, "set=8M,verify=20000").start();
    ready(&mut here);
    let mut qmp = here.qmp();
    qmp.ask("stop");
    assert_eq!(qmp.status(), "paused");
    let mut there = Vm::incoming("64M", 1).start();
    migrate(&mut here, &there, true);
    let mut qmp = there.qmp();
    assert_eq!(qmp.status(), "paused");
    qmp.ask("cont");
    goes_on(&mut there);
}

#[test]
fn a_guest_moves_in_the_first_moments_of_its_boot() {
    let mut here = Vm::selfcheck("256M", 1, "set=8M,verify=60000").start();
    let mut there = Vm::incoming("256M", 1).start();
    migrate(&mut here, &there, false);
    ready(&mut there);
    goes_on(&mut there);
}

#[test]
fn a_destination_that_does_not_fit_is_refused_with_words_and_the_guest_stays() {
    let mut here = Vm::selfcheck("64M", 1, "set=8M,verify=20000").start();
    ready(&mut here);
    for (memory, smp, words) in [("128M", 1, "RAM block pc.ram"), ("64M", 2, "number of vCPUs")] {
        let there = Vm::incoming(memory, smp).start();
        let out = here.migrate_command(&there.migrate_uri()).output().expect("it starts");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(said.contains(words), "the source says why: {said}");
        assert!(there.stderr().contains(words), "so does the destination: {}", there.stderr());
        assert_eq!(here.qmp().status(), "running");
        // It goes on listening, and is whole.
        assert_eq!(there.cli(&["status", "--json"]).status.code(), Some(0));
    }
    let mut there = Vm::incoming("64M", 1).start();
    migrate(&mut here, &there, false);
    goes_on(&mut there);
}

#[test]
fn a_killed_destination_and_a_cancel_leave_the_guest_where_it_was() {
    let mut here = Vm::selfcheck("256M", 1, "set=8M,verify=60000").start();
    ready(&mut here);
    let mut qmp = here.qmp();
    // Slow enough that there is time to do harm.
    let slow = json!({ "max-bandwidth": 20 << 20 });
    qmp.execute("migrate-set-parameters", slow).expect("a bandwidth");

    let there = Vm::incoming("256M", 1).start();
    let uri = there.migrate_uri();
    qmp.execute("migrate", json!({ "uri": uri })).expect("it starts");
    system_tests::wait::until(
        "some memory to have been sent",
        30,
        || (qmp.ask("query-migrate")["ram"]["transferred"].as_u64()? > 8 << 20).then_some(()),
        || "",
    );
    drop(there);
    let failed = qmp.wait_migrated(30);
    assert_eq!(failed["status"], "failed", "{failed}");
    assert!(failed["error-desc"].as_str().is_some_and(|why| !why.is_empty()), "{failed}");
    assert_eq!(qmp.status(), "running");

    let there = Vm::incoming("256M", 1).start();
    qmp.execute("migrate", json!({ "uri": there.migrate_uri() })).expect("it starts");
    let twice = qmp.execute("migrate", json!({ "uri": uri })).expect_err("one is under way");
    assert_eq!(twice.desc, "There's a migration process in progress");
    qmp.ask("migrate_cancel");
    assert_eq!(qmp.wait_migrated(30)["status"], "cancelled");
    assert_eq!(qmp.status(), "running");
    drop(there);

    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 })).expect("no limit");
    let mut there = Vm::incoming("256M", 1).start();
    migrate(&mut here, &there, true);
    goes_on(&mut there);
}

#[test]
fn whoever_talks_to_a_listener_and_is_no_source_is_sent_away() {
    use std::io::Write;
    let mut there = Vm::incoming("64M", 1).start();
    let uri = there.migrate_uri();
    let address = uri.strip_prefix("tcp:").expect("a TCP address").to_string();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"QEVM", b""] {
        let mut stream = std::net::TcpStream::connect(&address).expect("it listens");
        // It may hang up before all has been written.
        let _ = stream.write_all(garbage);
    }
    let mut here = Vm::selfcheck("64M", 1, "set=8M,verify=20000").start();
    ready(&mut here);
    migrate(&mut here, &there, false);
    goes_on(&mut there);
}

#[test]
fn a_back_end_that_cannot_be_opened_is_an_error_that_names_it() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let mut run = system_tests::vm::command(dir.path());
    run.args(["run", "--selfcheck", "--serial", "null", "--net", "tap=no-such-tap"]);
    let mut child = run.stderr(std::process::Stdio::piped()).spawn().expect("mini-vmm starts");
    let status = system_tests::wait::until(
        "mini-vmm to give up",
        20,
        || child.try_wait().expect("our own child"),
        || "it hangs",
    );
    assert_eq!(status.code(), Some(1));
    let said = child.wait_with_output().expect("our own child").stderr;
    assert!(String::from_utf8_lossy(&said).contains("no-such-tap"));
}
