//! What breaks while a guest is on its way: either process, the connection, the user's patience.
//! Afterwards the guest runs where it was, is whole, and moves after all.

use std::io::Read;
use std::net::TcpListener;
use std::process::Stdio;
use std::thread;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};
use system_tests::guest::Guest;
use system_tests::proxy::{Direction, Harm, Proxy};
use system_tests::qmp::Qmp;
use system_tests::wait;

const MEMORY: &str = "64M";

/// What a guest does that rewrites 16 MiB as fast as it can.
const BUSY: &str = "set=16M,rate=0,verify=20000";

fn busy() -> Guest {
    Guest::ready(MEMORY, 1, BUSY)
}

/// Starts a migration that takes 8 s at least, and returns when RAM travels.
fn in_ram(here: &Guest, uri: &str) -> Qmp {
    let mut qmp = here.begin(uri, &json!({ "max-bandwidth": 8 << 20 }));
    wait::until(
        "RAM to travel",
        30,
        || (qmp.ask("query-migrate")["ram"]["transferred"].as_u64()? > 2 << 20).then_some(()),
        || here.vm.stderr(),
    );
    qmp
}

/// The migration ends with this status and these words, and the guest goes on here, whole.
fn stays(here: &mut Guest, qmp: &mut Qmp, status: &str, words: &str) {
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], status, "{info}");
    let why = info["error-desc"].as_str().unwrap_or_default();
    assert!(why.contains(words), "'{words}' is not in: {why}");
    assert_eq!(qmp.status(), "running", "after: {why}");
    here.is_whole();
}

/// Lifts the limits of a migration before: what is next may be fast.
fn without_limits(here: Guest) {
    let defaults = json!({ "max-bandwidth": 0, "x-stall-timeout": 30_000, "x-verify": false });
    here.vm.qmp().execute("migrate-set-parameters", defaults).expect("parameters");
    here.moves_after_all(MEMORY, 1, "");
}

#[test]
fn a_source_that_is_killed_ends_the_destination_with_words() {
    let mut here = busy();
    let mut there = Guest::incoming(MEMORY, 1);
    in_ram(&here, &there.vm.migrate_uri());
    here.vm.signal(Signal::SIGKILL);
    here.vm.wait_exit(20);
    assert_eq!(there.vm.wait_exit(60), 1, "{}", there.vm.stderr());
    assert!(there.vm.stderr().contains("broke off"), "{}", there.vm.stderr());
    there.nothing_is_left();
}

#[test]
fn a_destination_that_is_killed_does_the_guest_no_harm() {
    let mut here = busy();
    let there = Guest::incoming(MEMORY, 1);
    let mut qmp = in_ram(&here, &there.vm.migrate_uri());
    there.vm.signal(Signal::SIGKILL);
    stays(&mut here, &mut qmp, "failed", "");
    without_limits(here);
}

#[test]
fn a_destination_that_stands_still_is_given_up_in_time() {
    let mut here = busy();
    let mut there = Guest::incoming(MEMORY, 1);
    let uri = there.vm.migrate_uri();
    here.vm.qmp().execute("migrate-set-parameters", json!({ "x-stall-timeout": 1000 })).unwrap();
    let mut qmp = in_ram(&here, &uri);
    there.vm.signal(Signal::SIGSTOP);
    // What the kernel's buffers hold would last long at the old rate.
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 })).unwrap();
    stays(&mut here, &mut qmp, "failed", "stands still: nothing for 1s");
    there.vm.signal(Signal::SIGCONT);
    assert_eq!(there.vm.wait_exit(60), 1, "{}", there.vm.stderr());
    there.nothing_is_left();
    without_limits(here);
}

/// The last pages were on their way and unread when the source gave up, and its guest has written to them since: they
/// were lent to the kernel, which has no copy. The destination reads them as they are then, and takes that for what
/// it is.
#[test]
fn a_destination_that_sleeps_through_the_end_calls_nothing_damaged() {
    let mut here = Guest::ready(MEMORY, 1, "set=1M,rate=0,verify=20000");
    let mut there = Guest::incoming(MEMORY, 1);
    let wait = |state: bool| json!({ "capabilities": [{ "capability": "pause-before-switchover", "state": state }] });
    here.vm.qmp().execute("migrate-set-capabilities", wait(true)).unwrap();
    let parameters = json!({ "x-verify": true, "x-stall-timeout": 2000 });
    let mut qmp = here.begin(&there.vm.migrate_uri(), &parameters);
    wait::until(
        "the last moment",
        60,
        || (qmp.ask("query-migrate")["status"] == "pre-switchover").then_some(()),
        || here.vm.stderr(),
    );
    there.vm.signal(Signal::SIGSTOP);
    let on = json!({ "state": "pre-switchover" });
    qmp.execute("migrate-continue", on).expect("it goes on");
    stays(&mut here, &mut qmp, "failed", "stands still: nothing for 2s");
    there.vm.signal(Signal::SIGCONT);
    assert_eq!(there.vm.wait_exit(60), 1, "{}", there.vm.stderr());
    let words = there.vm.stderr();
    // It may have had room to read them before, and hear of it when it answers; or the kernel has dropped what it had
    // not read, with the connection.
    let known = ["the source gave up", "the source can't be answered", "the stream broke off"];
    assert!(known.iter().any(|known| words.contains(known)), "{words}");
    assert!(!words.contains("failed: the comparison"), "{words}");
    assert!(there.line.text().is_empty(), "it ran there: {}", there.line.text());
    there.nothing_is_left();
    qmp.execute("migrate-set-capabilities", wait(false)).unwrap();
    without_limits(here);
}

#[test]
fn a_listener_that_says_nothing_or_hangs_up_is_no_destination() {
    let mut here = busy();
    let quick = json!({ "x-stall-timeout": 1000 });

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let mute = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // Until the other side has had enough.
        let _ = stream.read_to_end(&mut Vec::new());
        listener
    });
    let mut qmp = here.begin(&uri, &quick);
    stays(&mut here, &mut qmp, "failed", "stands still: nothing for 1s");
    drop(mute.join().unwrap());

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let hangs_up = thread::spawn(move || {
        drop(listener.accept().unwrap());
        // It listens on: a port that is closed refuses the second of several connections, and the
        // migration doesn't even start.
        listener
    });
    let mut qmp = here.begin(&uri, &quick);
    stays(&mut here, &mut qmp, "failed", "");
    drop(hangs_up.join().unwrap());
    without_limits(here);
}

/// The beginning of the section of that name: in the stream's binary form, not in the manifest.
const FIRST_DEVICE: &[u8] = b"\x05timer";
const SERIAL_PORT: &[u8] = b"\x06serial";
/// EOF and the description that another mini-vmm gets, but for its last byte.
const END: &[u8] = b"\0\x06\0\0\0\x02{";
/// PREPARED on its way back, and COMMIT on its way there: type, number and length.
const PREPARED: &[u8] = b"\x4d\x03\0\x04";
const COMMIT: &[u8] = b"\x08\x4d\x03\0\x04";
/// shut(0), which is the last word.
const SHUT: &[u8] = b"\0\x01\0\x04\0\0\0\0";

#[test]
fn a_stream_that_is_cut_before_the_hand_over_leaves_the_guest_here() {
    use Direction::{Back, There};
    // The guest looks at all of it after each of them.
    const MEMORY: &str = "32M";
    let mut here = Guest::ready(MEMORY, 1, BUSY);
    for (place, direction, harm, destination_waits_on) in [
        ("before the first byte", There, Harm::CutAt(0), true),
        ("in the header", There, Harm::CutAt(6), true),
        ("in the manifest", There, Harm::CutBehind(b"\"vcpus\"", 1), true),
        ("in RAM", There, Harm::CutAt(8 << 20), false),
        ("at the switch-over", There, Harm::CutBehind(FIRST_DEVICE, 0), false),
        ("inside a device", There, Harm::CutBehind(SERIAL_PORT, 12), false),
        ("in the last bytes", There, Harm::CutBehind(END, 0), false),
        ("before the first answer", Back, Harm::CutAt(0), true),
        ("in hello", Back, Harm::CutAt(11), true),
        ("in PREPARED", Back, Harm::CutBehind(PREPARED, 2), false),
    ] {
        println!("cut {place}");
        let mut there = Guest::incoming(MEMORY, 1);
        let proxy = Proxy::new(&there.vm.migrate_uri(), direction, harm);
        let mut qmp = here.begin(&proxy.uri(), &json!({}));
        stays(&mut here, &mut qmp, "failed", "");
        if destination_waits_on {
            assert_eq!(there.vm.qmp().status(), "inmigrate", "cut {place}");
            there.vm.signal(Signal::SIGTERM);
            assert_eq!(there.vm.wait_exit(20), 0, "cut {place}: {}", there.vm.stderr());
        } else {
            assert_eq!(there.vm.wait_exit(60), 1, "cut {place}: {}", there.vm.stderr());
            assert!(!there.vm.stderr().is_empty(), "cut {place}");
        }
        there.nothing_is_left();
    }
    here.moves_after_all(MEMORY, 1, "");
}

/// The guest stands still at the source, which says that it does not know, and will not let it go
/// on by itself.
fn in_doubt(here: &Guest, qmp: &mut Qmp) {
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], "failed", "{info}");
    wait::until(
        "words for the operator",
        20,
        || here.vm.stderr().contains("find out whether it runs there").then_some(()),
        || here.vm.stderr(),
    );
    assert_ne!(qmp.status(), "running");
    qmp.execute("cont", json!({})).expect_err("it may run there");
    assert_ne!(qmp.status(), "running");
}

#[test]
fn a_cut_in_the_order_to_run_leaves_a_doubt_and_no_guest_that_runs() {
    let here = busy();
    let mut there = Guest::incoming(MEMORY, 1);
    let harm = Harm::CutBehind(COMMIT, 0);
    let proxy = Proxy::new(&there.vm.migrate_uri(), Direction::There, harm);
    // For so long the destination waits for a source that may yet give the order.
    let short = json!({ "x-stall-timeout": 5000 });
    there.vm.qmp().execute("migrate-set-parameters", short.clone()).expect("parameters");
    let mut qmp = here.begin(&proxy.uri(), &short);
    in_doubt(&here, &mut qmp);
    // It has not heard the whole order, so it must not run the guest.
    assert_eq!(there.vm.wait_exit(60), 1, "{}", there.vm.stderr());
    there.nothing_is_left();
}

#[test]
fn a_cut_in_the_last_word_leaves_a_doubt_and_one_guest_at_most() {
    let here = busy();
    let mut there = Guest::incoming(MEMORY, 1);
    let harm = Harm::CutBehind(&SHUT[..5], 0);
    let proxy = Proxy::new(&there.vm.migrate_uri(), Direction::Back, harm);
    let mut qmp = here.begin(&proxy.uri(), &json!({}));
    in_doubt(&here, &mut qmp);
    // The destination has said all that it had to: the guest is there.
    there.is_whole();
    assert_eq!(there.vm.qmp().status(), "running");
    assert_ne!(qmp.status(), "running");
}

#[test]
fn a_cancel_is_heeded_in_ram_and_at_the_switch_over() {
    let mut here = busy();

    let there = Guest::incoming(MEMORY, 1);
    let mut qmp = in_ram(&here, &there.vm.migrate_uri());
    qmp.ask("migrate_cancel");
    stays(&mut here, &mut qmp, "cancelled", "");

    // The guest stands still and waits for the user's word.
    let wait = |state: bool| json!({ "capabilities": [{ "capability": "pause-before-switchover", "state": state }] });
    let there = Guest::incoming(MEMORY, 1);
    qmp.execute("migrate-set-capabilities", wait(true)).unwrap();
    // The limit would keep the guest from converging.
    let mut qmp = here.begin(&there.vm.migrate_uri(), &json!({ "max-bandwidth": 0 }));
    wait::until(
        "the last moment",
        60,
        || (qmp.ask("query-migrate")["status"] == "pre-switchover").then_some(()),
        || here.vm.stderr(),
    );
    assert_ne!(qmp.status(), "running");
    qmp.ask("migrate_cancel");
    stays(&mut here, &mut qmp, "cancelled", "");
    qmp.execute("migrate-set-capabilities", wait(false)).unwrap();
    without_limits(here);
}

#[test]
fn a_cancel_in_the_last_moments_leaves_the_guest_on_one_side_exactly() {
    let mut here = busy();
    let mut stayed = 0;
    // With the comparison there is time for the cancel to come first, without it none for certain.
    for compare in [true, true, false, false, false] {
        let mut there = Guest::incoming(MEMORY, 1);
        let mut qmp = here.begin(&there.vm.migrate_uri(), &json!({ "x-verify": compare }));
        qmp.event("STOP");
        if let Err(error) = qmp.execute("migrate_cancel", json!({})) {
            assert!(error.to_string().contains("too late to cancel"), "{error}");
        }
        let info = qmp.wait_migrated(60);
        match info["status"].as_str() {
            Some("cancelled") => {
                assert_eq!(qmp.status(), "running");
                here.is_whole();
                assert_eq!(there.vm.wait_exit(60), 1, "{}", there.vm.stderr());
                there.nothing_is_left();
                stayed += 1;
            }
            Some("completed") => {
                assert_eq!(qmp.status(), "postmigrate");
                there.is_whole();
                assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
                here.nothing_is_left();
                here = there;
            }
            _ => panic!("neither here nor there: {info}"),
        }
    }
    assert!(stayed > 0, "no cancel came in time");
    without_limits(here);
}

#[test]
fn ctrl_c_cancels_and_the_guest_is_whole() {
    let mut here = busy();
    let there = Guest::incoming(MEMORY, 1);
    let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
    let child = command.args(["--bandwidth", "4M"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut qmp = here.vm.qmp();
    wait::until(
        "the migration to be under way",
        30,
        || (qmp.ask("query-migrate")["status"] == "active").then_some(()),
        || "",
    );
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGINT).unwrap();
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("was cancelled, the guest goes on here"), "{said}");
    stays(&mut here, &mut qmp, "cancelled", "");
    without_limits(here);
}

#[test]
fn time_that_is_over_cancels_or_forces_as_was_asked() {
    // In the second that a pass takes the guest rewrites all of its set again, several times over.
    let mut here = Guest::ready(MEMORY, 1, "fill=8M,set=4M,rate=0,verify=0");
    let slow = ["--bandwidth", "4M", "--downtime", "5ms", "--timeout", "5s", "--on-timeout"];
    let run = |here: &Guest, there: &Guest, what: &str| {
        let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
        let out = command.args(slow).args([what, "--json"]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        let report = serde_json::from_slice::<Value>(&out.stdout).unwrap_or_default();
        (out.status.code(), said, report)
    };
    let mut there = Guest::incoming(MEMORY, 1);
    let (status, said, _) = run(&here, &there, "cancel");
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("did not converge within 5s"), "{said}");
    assert_eq!(here.vm.qmp().status(), "running");
    here.is_whole();
    assert_eq!(there.vm.wait_exit(60), 1, "{}", there.vm.stderr());
    there.nothing_is_left();

    let mut there = Guest::incoming(MEMORY, 1);
    let (status, said, report) = run(&here, &there, "force");
    assert_eq!(status, Some(0), "{said}");
    assert_eq!(report["migration"]["status"], "completed", "{report}");
    let total = report["migration"]["total-time"].as_u64().unwrap_or_default();
    assert!(total >= 5000, "it did not wait for its time: {report}");
    // At this rate the 5 ms that were allowed are enough for 20 KiB.
    let rest = report["migration"]["ram"]["downtime-bytes"].as_u64().unwrap_or_default();
    assert!(rest > 200 << 10, "it was not forced: {report}");
    assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
    there.is_whole();
    without_limits(there);
}

#[test]
fn nobody_migrates_to_himself_and_nobody_twice_at_once() {
    // One that waits for a guest has none to give, and waits on.
    let waits = Guest::incoming(MEMORY, 1);
    let own = waits.vm.migrate_uri();
    let out = waits.vm.migrate_command(&own).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("incoming"), "{said}");
    assert_eq!(waits.vm.qmp().status(), "inmigrate");

    let here = busy();
    let mut second = Guest::ready(MEMORY, 1, "set=1M");
    let mut qmp = in_ram(&here, &own);
    let again = qmp.execute("migrate", json!({ "uri": own })).expect_err("one is under way");
    assert_eq!(again.desc, "There's a migration process in progress");
    // Another source finds the destination taken; it is not let in before the first is done.
    let mut other = second.begin(&own, &json!({ "x-stall-timeout": 1000 }));
    stays(&mut second, &mut other, "failed", "stands still: nothing for 1s");
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 })).unwrap();
    let end = qmp.wait_migrated(60);
    assert_eq!(end["status"], "completed", "{end}\n{}", waits.vm.stderr());
    drop(here);

    // Its listener is gone with its arrival, so there is nobody to move to.
    let mut arrived = waits;
    arrived.is_whole();
    let out = arrived.vm.migrate_command(&own).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("is the destination running"), "{said}");
    assert_eq!(arrived.vm.qmp().status(), "running");
    arrived.is_whole();
    without_limits(arrived);
    without_limits(second);
}
