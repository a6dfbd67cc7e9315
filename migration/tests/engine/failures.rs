//! Migrations that fail, before and after the point of no return: who has the guest then, and
//! what does the source know.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::*;
use migration::destination::DestinationError;
use migration::params::Parameters;
use migration::phase::Phase;
use migration::source::{Outcome, SourceError};
use migration::stats::Step;
use migration::transport::{Address, Connection, Listener, TransportError};
use migration::vmstate::SectionId;
use migration::wire::return_path::{Failed, Message};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

#[test]
fn every_difference_is_named_at_once_before_a_page_moves() {
    let (source, mut destination, world) = two_vms(64);
    destination.machine = "pc-i440fx-7.1".into();
    destination.vcpus = 4;
    destination.ram = FakeRam::new(&[("pc.ram", 128), ("pc.bios", 3), ("vga.vram", 1)]);
    destination.devices.remove(1);
    destination.devices.push((SectionId::new("serial", 0), Arc::default()));
    destination.details = serde_json::json!({ "slots": [3] });
    let ended = migrate(source, destination, pair(), (control(), control()));
    assert_kept(&ended, "the destination refuses the VM");
    let Outcome::Kept { error: SourceError::Refused { problems } } = &ended.outcome else {
        panic!("{:?}", ended.outcome)
    };
    let codes: Vec<_> = problems.iter().map(|p| p.code.as_str()).collect();
    assert_eq!(
        codes,
        [
            "machine-type",
            "vcpus",
            "ram-size",
            "ram-block",
            "device-missing",
            "device-extra",
            "slots"
        ]
    );
    let failure = ended.arrived.unwrap_err();
    assert!(matches!(failure.error, DestinationError::Refused { .. }));
    assert!(failure.vm_untouched);
    let text = failure.error.chain();
    for words in ["pc-i440fx-7.1", "vcpus", "pc.ram", "vga.vram", "cpu (instance 1)", "serial"] {
        assert!(text.to_lowercase().contains(words) || words == "vcpus", "{words}: {text}");
    }
    assert!(!world.history.lock().unwrap().contains(&"pause".to_owned()));
}

#[test]
fn a_device_whose_layout_was_changed_without_a_new_version_is_found() {
    let (source, mut destination, _) = two_vms(64);
    destination.other_layout = true;
    let ended = migrate(source, destination, pair(), (control(), control()));
    assert_kept(&ended, "device section cpu: the destination has layout");
    assert!(ended.arrived.unwrap_err().vm_untouched);
}

#[test]
fn a_vm_that_cannot_be_migrated_says_so_first() {
    let (mut source, destination, _) = two_vms(64);
    source.blockers = vec!["the CPU has invtsc".into()];
    let ended = migrate(source, destination, pair(), (control(), control()));
    assert_kept(&ended, "the CPU has invtsc");
    assert!(ended.arrived.unwrap_err().vm_untouched);
}

#[test]
fn whatever_fails_on_the_source_before_the_commit_leaves_the_guest_running() {
    for (fault, words) in [
        (Fault::Pause, "pausing the vCPUs failed: Pause was told to fail: the reason behind it"),
        (Fault::Drain, "finishing the devices' requests failed: Drain"),
        (Fault::ReadState, "reading the machine's state failed: ReadState"),
        (Fault::LastSection, "0000:00:02.0/virtio-net: it was told to fail"),
        (Fault::ReleaseDisks, "giving up the disks' locks failed: ReleaseDisks"),
    ] {
        let (mut source, destination, _) = two_vms(64);
        source.fault = fault;
        let control = control();
        let ended =
            migrate(source, destination, pair(), (control.clone(), crate::common::control()));
        assert_kept(&ended, words);
        let there = ended.arrived.as_ref().unwrap_err().error.chain();
        assert!(there.contains("the source gave up") && there.contains(words), "{there}");
        assert_eq!(control.info().status, Some(Phase::Failed));
        assert!(control.info().error_desc.unwrap().contains(words));
    }
}

/// Sections are sent while others are written: the destination has some of them when one can't be.
#[test]
fn a_section_that_cannot_be_written_behind_others_that_were_sent_leaves_the_guest_running() {
    let (mut source, mut destination, _) = two_vms(64);
    for vm in [&mut source, &mut destination] {
        vm.add_devices(200);
    }
    source.fault = Fault::LastSection;
    let there = crate::common::control();
    let ended = migrate(source, destination, pair(), (control(), there.clone()));
    let words = "disk (instance 199): it was told to fail";
    assert_kept(&ended, words);
    let said = ended.arrived.as_ref().unwrap_err().error.chain();
    assert!(said.contains("the source gave up") && said.contains(words), "{said}");
    let steps: Vec<_> = there.report().steps.iter().map(|(step, _)| *step).collect();
    assert!(steps.contains(&Step::Devices), "none had come: {steps:?}");
}

#[test]
fn whatever_fails_on_the_destination_reaches_the_source_in_its_own_words() {
    for (fault, words) in [
        (Fault::Prepare, "preparing the VM failed: Prepare was told to fail: the reason behind it"),
        (Fault::TakeDisks, "the disks can't be taken: TakeDisks was told to fail"),
        (Fault::Start, "the VM can't be started: Start was told to fail: the reason behind it"),
    ] {
        let (source, mut destination, world) = two_vms(64);
        destination.fault = fault;
        let ended = migrate(source, destination, pair(), (control(), control()));
        assert_kept(&ended, words);
        assert!(ended.arrived.unwrap_err().error.chain().contains(words));
        assert!(world.history.lock().unwrap().iter().all(|h| h != "destination runs"));
    }
}

#[test]
fn a_device_that_refuses_its_state_is_named_with_its_field() {
    let (source, destination, _) = two_vms(64);
    source.devices[1].1.lock().unwrap().state.mode = 9;
    let ended = migrate(source, destination, pair(), (control(), control()));
    assert_kept(&ended, "cpu (instance 1): field mode: expected 0 to 7, found 9");
}

#[test]
fn a_device_that_forgets_a_register_is_found_by_the_comparison() {
    for verify in [false, true] {
        let (source, destination, _) = two_vms(64);
        destination.devices[0].1.lock().unwrap().forgetful = true;
        let control = control_with(|p| p.verify = verify);
        let ended = migrate(source, destination, pair(), (control, crate::common::control()));
        if verify {
            assert_kept(&ended, "section cpu differs when it is saved again");
        } else {
            assert!(matches!(ended.outcome, Outcome::Completed(_)));
        }
    }
}

#[test]
fn a_page_that_was_not_marked_dirty_is_found_by_the_comparison() {
    let (mut source, destination, _) = two_vms(64);
    let ram = source.ram.clone();
    source.dirty(1, 0);
    let control = control_with(|p| {
        p.verify = true;
        p.pause_before_switchover = true;
    });
    let started = start(source, destination, pair(), (control.clone(), crate::common::control()));
    wait_for("pre-switchover", || control.stats().phase() == Phase::PreSwitchover);
    use migration::guest::GuestRam;
    ram.copy_in(0, 9 * 4096 + 17, b"a write that nobody noted").unwrap();
    control.proceed();
    let ended = started.join();
    assert_kept(&ended, "RAM block pc.ram differs between the two sides in [0x0, 0x100000)");
}

#[test]
fn a_guest_that_cannot_be_resumed_is_kept_and_said_to_stand() {
    let (mut source, mut destination, world) = two_vms(64);
    source.fault = Fault::Resume;
    destination.fault = Fault::Prepare;
    let ended = migrate(source, destination, pair(), (control(), control()));
    let Outcome::KeptStopped { error, resume } = &ended.outcome else {
        panic!("{:?}", ended.outcome)
    };
    assert!(error.chain().contains("preparing the VM failed"));
    assert!(resume.to_string().contains("Resume was told to fail"));
    assert_eq!((world.runs(), world.disks()), (None, Some("source")));
}

#[test]
fn a_cancel_during_ram_leaves_the_guest_and_a_second_try_succeeds() {
    let (mut source, destination, world) = two_vms(1024);
    source.dirty(100, 100);
    let control = control_with(|p| p.max_bandwidth = 1 << 20);
    let started = start(source, destination, pair(), (control.clone(), crate::common::control()));
    wait_for("RAM to move", || control.report().transferred_bytes > 100_000);
    let begin = Instant::now();
    control.cancel().unwrap();
    let ended = started.join();
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_kept(&ended, "cancelled");
    assert_eq!(control.info().status, Some(Phase::Cancelled));
    let there = ended.arrived.unwrap_err().error.chain();
    assert!(there.contains("the source gave up: the migration was cancelled"), "{there}");

    let destination = FakeVm::new("destination", &world, 1024);
    let ended = migrate(
        ended.source,
        destination,
        pair(),
        (crate::common::control(), crate::common::control()),
    );
    assert_moved(&ended);
}

#[test]
fn a_cancel_in_pre_switchover_resumes_and_one_after_the_end_is_too_late() {
    let (source, destination, _) = two_vms(64);
    let control = control_with(|p| p.pause_before_switchover = true);
    let started = start(source, destination, pair(), (control.clone(), crate::common::control()));
    wait_for("pre-switchover", || control.stats().phase() == Phase::PreSwitchover);
    control.cancel().unwrap();
    assert_kept(&started.join(), "cancelled");

    let (source, destination, _) = two_vms(64);
    let control = crate::common::control();
    let ended = migrate(source, destination, pair(), (control.clone(), crate::common::control()));
    assert_moved(&ended);
    assert!(control.cancel().is_err());
}

/// A source alone, against whatever `peer` does with the other end.
fn against(
    mut source: FakeVm,
    change: impl FnOnce(&mut Parameters),
    peer: impl FnOnce(UnixStream) + Send + 'static,
) -> (Outcome, FakeVm) {
    let (a, b) = UnixStream::pair().unwrap();
    let there = std::thread::spawn(move || peer(b));
    let connection = Connection::from_unix(a, "unix:a".into());
    let outcome = migration::source::run(&mut source, connection, &control_with(change));
    join(there);
    (outcome, source)
}

fn short(p: &mut Parameters) {
    p.stall_timeout = Duration::from_millis(300);
}

fn read_to_end(mut stream: UnixStream) {
    let mut buf = [0; 4096];
    while stream.read(&mut buf).is_ok_and(|n| n > 0) {}
}

fn say(stream: &mut UnixStream, message: &Message) {
    let mut bytes = Vec::new();
    message.write(&mut bytes);
    stream.write_all(&bytes).unwrap();
}

#[test]
fn a_destination_that_stands_still_is_noticed_in_every_phase() {
    // It reads and never answers.
    let (source, _, world) = two_vms(64);
    let (outcome, _) = against(source, short, read_to_end);
    let Outcome::Kept { error } = outcome else { panic!("{outcome:?}") };
    assert!(error.chain().contains("its first answer was awaited"), "{}", error.chain());
    assert_eq!(world.runs(), Some("source"));

    // It answers the ping, and then reads nothing any more. The bytes fill the socket's buffers.
    let (source, _, world) = two_vms(4096);
    let (outcome, _) = against(source, short, |mut stream| {
        say(&mut stream, &Message::Pong(1));
        // Holds the connection, unread, until the source gives up.
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::try_from(DEADLINE).unwrap()).unwrap();
    });
    let Outcome::Kept { error } = outcome else { panic!("{outcome:?}") };
    assert!(error.chain().contains("stands still"), "{}", error.chain());
    assert_eq!(world.runs(), Some("source"));

    // It reads RAM and does not say that it has.
    let (source, _, world) = two_vms(64);
    let (outcome, _) = against(source, short, |mut stream| {
        say(&mut stream, &Message::Pong(1));
        read_to_end(stream);
    });
    let Outcome::Kept { error } = outcome else { panic!("{outcome:?}") };
    assert!(error.chain().contains("it was taking in RAM"), "{}", error.chain());
    assert_eq!(world.runs(), Some("source"));

    // As a QEMU: it reads everything, answers every ping and never says shut. That is doubt.
    let (source, _, world) = two_vms(64);
    let (outcome, _) = against(source, short, |mut stream| {
        let (mut buf, mut pong) = ([0; 4096], Vec::new());
        Message::Pong(1).write(&mut pong);
        // A pong that nobody asked for does no harm.
        while stream.read(&mut buf).is_ok_and(|n| n > 0) && stream.write_all(&pong).is_ok() {}
    });
    assert!(matches!(outcome, Outcome::InDoubt { .. }), "{outcome:?}");
    assert_eq!(world.runs(), None);
}

#[test]
fn a_source_that_stands_still_is_noticed() {
    let (_, mut destination, _) = two_vms(64);
    let (a, b) = UnixStream::pair().unwrap();
    (&a).write_all(b"QEVM\0\0\0\x03\x07\0\0\0\x0dpc-i440fx-7.2\x08\0\x01").unwrap();
    let connection = Connection::from_unix(b, "unix:b".into());
    let failure = migration::destination::run(&mut destination, connection, &control_with(short))
        .unwrap_err();
    assert!(failure.vm_untouched);
    assert!(failure.error.chain().contains("the stream broke off"), "{}", failure.error.chain());
    drop(a);
}

#[test]
fn a_cancel_frees_a_write_that_nobody_reads() {
    let (mut source, _, world) = two_vms(4096);
    let (a, mut b) = UnixStream::pair().unwrap();
    say(&mut b, &Message::Pong(1));
    let control = control();
    let theirs = control.clone();
    let here = std::thread::spawn(move || {
        migration::source::run(&mut source, Connection::from_unix(a, "unix:a".into()), &theirs)
    });
    wait_until_stuck(&control);
    let begin = Instant::now();
    control.cancel().unwrap();
    let outcome = join(here);
    assert!(matches!(outcome, Outcome::Kept { error: SourceError::Cancelled }), "{outcome:?}");
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(world.runs(), Some("source"));
    drop(b);
}

#[test]
fn a_destination_can_be_given_up_from_its_own_side() {
    let (mut source, destination, _) = two_vms(512);
    source.dirty(100, 100);
    let slow = control_with(|p| p.max_bandwidth = 1 << 20);
    let there = control();
    let started = start(source, destination, pair(), (slow.clone(), there.clone()));
    wait_for("RAM to move", || slow.report().transferred_bytes > 100_000);
    there.abort();
    let ended = started.join();
    assert!(matches!(ended.arrived.as_ref().unwrap_err().error, DestinationError::Cancelled));
    assert_kept(&ended, "");
}

#[test]
fn a_bad_answer_keeps_the_guest() {
    for bytes in
        [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"\0\x63\0\x04\0\0\0\0", b"\0\x01\0\x04\0\0\0\0"]
    {
        let (source, _, world) = two_vms(64);
        let (outcome, _) = against(
            source,
            |_| {},
            move |mut stream| {
                stream.write_all(bytes).unwrap();
                read_to_end(stream);
            },
        );
        assert!(matches!(outcome, Outcome::Kept { .. }), "{outcome:?}");
        assert_eq!(world.runs(), Some("source"));
    }
}

#[test]
fn words_of_a_destination_that_fails_during_ram_are_heard() {
    let (source, _, _) = two_vms(4096);
    let (outcome, _) = against(
        source,
        |_| {},
        |mut stream| {
            say(&mut stream, &Message::Pong(1));
            let mut buf = [0; 1000];
            stream.read_exact(&mut buf).unwrap();
            let failed = Failed { reason: "out of memory on host b".into() };
            say(&mut stream, &Message::Failed(failed));
            read_to_end(stream);
        },
    );
    let Outcome::Kept { error } = outcome else { panic!("{outcome:?}") };
    assert_eq!(error.to_string(), "the destination failed: out of memory on host b");
}

#[test]
fn strangers_at_the_listener_leave_the_vm_waiting() {
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"", b"QEV", &[0xff; 5000], b"QEVM\0\0\0\x02"] {
        let (_, mut destination, _) = two_vms(64);
        let (a, b) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            // The destination may close before all is written.
            let _ = (&a).write_all(bytes);
            a.shutdown(std::net::Shutdown::Write).unwrap_or_default();
            read_to_end(a);
        });
        let connection = Connection::from_unix(b, "unix:b".into());
        let failure =
            migration::destination::run(&mut destination, connection, &control()).unwrap_err();
        assert!(failure.vm_untouched);
        assert!(matches!(failure.error, DestinationError::Stranger { .. }), "{failure:?}");
        join(writer);
    }
}

#[test]
fn nobody_there_is_said_so() {
    let address = Address::Tcp { host: "127.0.0.1".into(), port: 0 };
    let listener = Listener::bind(&address).unwrap();
    let taken = listener.address().clone();
    assert!(matches!(Listener::bind(&taken), Err(TransportError::Listen { .. })));
    assert!(listener.accept(Duration::ZERO).unwrap().is_none());
    drop(listener);
    let error = Connection::connect(&taken, DEADLINE).unwrap_err();
    assert!(error.to_string().starts_with("can't connect to tcp:127.0.0.1:"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let path = Address::Unix(dir.path().join("sock"));
    assert!(matches!(Connection::connect(&path, DEADLINE), Err(TransportError::Connect { .. })));
    let listener = Listener::bind(&path).unwrap();
    assert!(matches!(Listener::bind(&path), Err(TransportError::Listen { .. })));
    assert!(Connection::connect(&path, DEADLINE).is_ok());
    drop(listener);
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none(), "the file is gone");
    // A file that a dead process left is replaced, and any other file is not.
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("sock")).unwrap());
    assert!(Listener::bind(&path).is_ok());
    std::fs::write(dir.path().join("sock"), "precious").unwrap();
    assert!(Listener::bind(&path).is_err());
    assert_eq!(std::fs::read(dir.path().join("sock")).unwrap(), b"precious");
}

/// A source that takes longer to give its disks up than this destination waits for it.
fn too_slow(connections: (Connection, Connection)) -> Ended {
    let (mut source, destination, _) = two_vms(64);
    source.slow_release = Duration::from_millis(1500);
    let there = control_with(|p| p.stall_timeout = Duration::from_millis(500));
    migrate(source, destination, connections, (control(), there))
}

#[test]
fn a_destination_waits_for_the_order_as_long_as_was_agreed_and_says_what_it_did() {
    let ended = too_slow(pair());
    let words = "within the 500ms that both sides had agreed on";
    assert_kept(&ended, words);
    let failure = ended.arrived.unwrap_err();
    assert!(failure.to_string().contains(words), "{failure}");
    assert!(failure.to_string().contains("has not run here and stays the source's"), "{failure}");
}

#[test]
fn a_source_that_is_too_late_gives_no_order() {
    // Nothing comes back after PREPARED, so that the source can't hear that it is too late.
    let (a, mut a_end) = UnixStream::pair().unwrap();
    let (mut b_end, b) = UnixStream::pair().unwrap();
    let (mut from, mut to) = (a_end.try_clone().unwrap(), b_end.try_clone().unwrap());
    let forth = thread::spawn(move || std::io::copy(&mut from, &mut to).map(drop));
    let back = thread::spawn(move || {
        let mut seen = Vec::new();
        let mut byte = [0];
        let prepared = b"\x4d\x03\0\x04";
        while !seen.ends_with(prepared) && matches!(b_end.read(&mut byte), Ok(1)) {
            seen.push(byte[0]);
            let _ = a_end.write_all(&byte);
        }
        let mut len = [0; 4];
        b_end.read_exact(&mut len).unwrap();
        let mut body = vec![0; u32::from_be_bytes(len) as usize];
        b_end.read_exact(&mut body).unwrap();
        a_end.write_all(&[&len[..], &body].concat()).unwrap();
        while matches!(b_end.read(&mut byte), Ok(1)) {}
        (a_end, b_end)
    });
    let a = Connection::from_unix(a, "unix:a".into());
    let b = Connection::from_unix(b, "unix:b".into());
    let ended = too_slow((a, b));
    assert_kept(&ended, "waits only 500ms for its order");
    assert!(ended.arrived.is_err());
    drop((forth, back));
}
