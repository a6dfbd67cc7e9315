//! A source that only asks: every problem and a forecast for it, and nothing changed for anybody.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::common::*;
use migration::destination::{self, DestinationError, Failure};
use migration::guest::Machine;
use migration::manifest::{Hello, Manifest, PREFLIGHT, Problem, Verdict};
use migration::params::Parameters;
use migration::phase::Phase;
use migration::problem::kind;
use migration::source::{Preflight, Questions, SourceError, preflight};
use migration::transport::{Connection, StreamReader};
use migration::wire::command::{Abort, Command, PING_MAGIC};
use migration::wire::header::{self, Configuration};
use migration::wire::limits::{MAX_PROBE, MAX_PROBES, MAX_PROBLEMS};
use migration::wire::return_path::Message;
use migration::wire::section::{self, PartType, SectionHeader};

fn quick() -> Questions {
    Questions {
        sample: Duration::from_millis(40),
        probe_time: Duration::from_millis(100),
        probe_bytes: 4 << 20,
        rehearse: false,
    }
}

type Ending = Result<Box<migration::stats::Report>, Failure>;

/// Lets `destination` wait for one source.
fn waits(mut destination: FakeVm, connection: Connection) -> JoinHandle<(Ending, FakeVm)> {
    thread::spawn(move || {
        let control = control();
        let ending = destination::run(&mut destination, connection, &control);
        let asked =
            matches!(&ending, Err(f) if matches!(f.error, DestinationError::OnlyAsked { .. }));
        if asked {
            assert_eq!(control.stats().phase(), Phase::None, "somebody was told of a migration");
        }
        (ending, destination)
    })
}

fn ask(
    source: &mut FakeVm,
    destination: FakeVm,
    change: fn(&mut Parameters),
) -> (Preflight, Ending, FakeVm) {
    let (a, b) = pair();
    let there = waits(destination, b);
    let control = control_with(change);
    let answer = preflight(source, &a, &control, &quick()).unwrap();
    assert_eq!(control.stats().phase(), Phase::None);
    let (ending, destination) = join(there);
    (answer, ending, destination)
}

fn codes(answer: &Preflight) -> Vec<&str> {
    answer.problems.iter().map(|problem| problem.code.as_str()).collect()
}

#[test]
fn a_vm_that_fits_would_move_and_does_so_afterwards_to_the_same_destination() {
    let (mut source, mut destination, world) = two_vms(256);
    let before = destination.ram.contents();
    for _ in 0..2 {
        let (answer, ending, there) = ask(&mut source, destination, |_| {});
        assert!(answer.would_move && answer.problems.is_empty(), "{answer:?}");
        assert!(answer.destination.starts_with("mini-vmm"));
        let forecast = answer.forecast.unwrap();
        assert!(forecast.converges && forecast.bandwidth > 1 << 20, "{forecast:?}");
        // Every third page is zero.
        let share = forecast.data_bytes * 100 / forecast.ram_bytes;
        assert!((60..=70).contains(&share), "{forecast:?}");
        let failure = ending.unwrap_err();
        assert!(matches!(failure.error, DestinationError::OnlyAsked { count: 0 }), "{failure}");
        assert!(failure.vm_untouched);
        assert!(there.ram.contents() == before);
        assert_eq!(world.runs(), Some("source"));
        destination = there;
    }
    assert!(!world.history.lock().unwrap().contains(&"pause".to_owned()));
    assert_moved(&migrate(source, destination, pair(), (control(), control())));
}

/// Asks with a rehearsal.
fn rehearse(source: &mut FakeVm, destination: FakeVm) -> (Preflight, Ending, FakeVm) {
    let (a, b) = pair();
    let there = waits(destination, b);
    let questions = Questions { sample: Duration::ZERO, rehearse: true, ..quick() };
    let answer = preflight(source, &a, &control(), &questions).unwrap();
    let (ending, destination) = join(there);
    (answer, ending, destination)
}

#[test]
fn a_rehearsal_loads_everything_but_ram_and_throws_it_away() {
    let (mut source, mut destination, world) = two_vms(256);
    let (ram, devices) = (destination.ram.contents(), [0, 1, 2].map(|n| destination.device(n)));
    for _ in 0..2 {
        let (answer, ending, there) = rehearse(&mut source, destination);
        assert!(answer.would_move && answer.problems.is_empty(), "{answer:?}");
        let rehearsal = answer.rehearsal.unwrap();
        assert!(rehearsal.loaded && rehearsal.pause_us > 0, "{rehearsal:?}");
        assert_eq!((rehearsal.sections, rehearsal.compared_sections), (3, 3));
        assert!(ending.unwrap_err().vm_untouched);
        // It was really there, and it is there no more.
        let loaded = format!("prepared with {:?}", source.device(0));
        assert!(world.history.lock().unwrap().contains(&loaded), "{:?}", world.history);
        assert!(there.ram.contents() == ram);
        assert_eq!([0, 1, 2].map(|n| there.device(n)), devices);
        assert_eq!((world.runs(), world.disks()), (Some("source"), Some("source")));
        destination = there;
    }
    assert_moved(&migrate(source, destination, pair(), (control(), control())));
}

#[test]
fn what_can_t_be_loaded_is_told_by_a_rehearsal_and_the_guest_runs_on() {
    let (mut source, mut destination, world) = two_vms(64);
    let (ram, devices) = (destination.ram.contents(), [0, 1, 2].map(|n| destination.device(n)));
    destination.fault = Fault::Prepare;
    let (answer, ending, mut destination) = rehearse(&mut source, destination);
    assert_eq!(codes(&answer), ["rehearsal"], "{answer:?}");
    assert!(!answer.would_move && !answer.rehearsal.as_ref().unwrap().loaded);
    assert!(answer.problems[0].known_as.contains("Prepare was told to fail"), "{answer:?}");
    assert!(ending.unwrap_err().vm_untouched);
    assert!(destination.ram.contents() == ram);
    assert_eq!([0, 1, 2].map(|n| destination.device(n)), devices);
    assert_eq!(world.runs(), Some("source"));
    // Once that is mended it moves to the same one.
    destination.fault = Fault::None;
    assert_moved(&migrate(source, destination, pair(), (control(), control())));
}

#[test]
fn a_destination_that_can_t_throw_it_away_takes_nobody_any_more() {
    let (mut source, mut destination, world) = two_vms(64);
    destination.fault = Fault::EndRehearsal;
    let (answer, ending, _) = rehearse(&mut source, destination);
    assert_eq!(codes(&answer), ["rehearsal"], "{answer:?}");
    let failure = ending.unwrap_err();
    assert!(!failure.vm_untouched && failure.to_string().contains("ending the rehearsal"));
    assert_eq!(world.runs(), Some("source"));
}

#[test]
fn a_guest_that_a_rehearsal_has_stopped_goes_on_whatever_happens() {
    for (fault, panics) in
        [(Fault::Paused, false), (Fault::Paused, true), (Fault::Drain, false), (Fault::Drain, true)]
    {
        let (mut source, destination, world) = two_vms(64);
        (source.fault, source.panics) = (fault, panics);
        let (a, b) = pair();
        let there = waits(destination, b);
        let questions = Questions { sample: Duration::ZERO, rehearse: true, ..quick() };
        let error = preflight(&mut source, &a, &control(), &questions).unwrap_err().chain();
        assert!(error.contains(&format!("{fault:?} was told to")), "{error}");
        assert_eq!((world.runs(), world.disks()), (Some("source"), Some("source")));
        let (_, destination) = join(there);
        source.fault = Fault::None;
        assert_moved(&migrate(source, destination, pair(), (control(), control())));
    }
}

#[test]
fn nobody_is_stopped_for_a_rehearsal_that_would_be_in_vain() {
    let (mut source, mut destination, world) = two_vms(64);
    destination.vcpus = 4;
    let (answer, ..) = rehearse(&mut source, destination);
    assert!(!answer.would_move && answer.rehearsal.is_none(), "{answer:?}");
    assert!(!world.history.lock().unwrap().contains(&"pause".to_owned()));
    // One that knows preflight and no more.
    let (mut source, ..) = two_vms(64);
    let (a, b) = UnixStream::pair().unwrap();
    let mut bytes = Vec::new();
    hello(&[PREFLIGHT]).write(&mut bytes);
    (&b).write_all(&bytes).unwrap();
    let connection = Connection::from_unix(a, "unix:a".into());
    let questions = Questions { rehearse: true, ..quick() };
    let error = preflight(&mut source, &connection, &control(), &questions).unwrap_err();
    assert!(matches!(error, SourceError::NoRehearsal { .. }), "{error}");
}

#[test]
fn every_difference_is_in_one_answer_with_its_code_and_its_known_name() {
    let (mut source, mut destination, _) = two_vms(64);
    source.blockers = vec!["State blocked by non-migratable CPU device (invtsc flag)".into()];
    destination.machine = "pc-i440fx-7.1".into();
    destination.vcpus = 4;
    destination.ram = FakeRam::new(&[("pc.ram", 128), ("vga.vram", 1)]);
    destination.devices.remove(1);
    destination.other_layout = true;
    destination.details = serde_json::json!({ "slots": [3] });
    let (answer, ending, _) = ask(&mut source, destination, |_| {});
    assert!(!answer.would_move);
    let expected = [
        "blocked",
        "machine-type",
        "vcpus",
        "ram-size",
        "ram-block",
        "ram-block",
        "device-layout",
        "device-missing",
        "slots",
    ];
    assert_eq!(codes(&answer), expected);
    assert!(matches!(ending.unwrap_err().error, DestinationError::OnlyAsked { count: 8 }));
    let text = serde_json::to_string(&answer).unwrap();
    for words in [
        "invtsc",
        "Machine type received is 'pc-i440fx-7.2' and local is 'pc-i440fx-7.1'",
        "Length mismatch: pc.ram: 0x40000 in != 0x80000",
        "Unknown ramblock \\\"pc.bios\\\"",
        "Missing section footer",
        "Unknown savevm section or instance 'cpu' 1",
    ] {
        assert!(text.contains(words), "'{words}' is not in {text}");
    }
    assert_eq!(serde_json::from_str::<Preflight>(&text).unwrap(), answer);
}

#[test]
fn a_warning_stops_neither_the_answer_nor_the_migration() {
    let (mut source, destination, _) = two_vms(64);
    source.details = serde_json::json!({ "only a word": true });
    let (answer, _, destination) = ask(&mut source, destination, |_| {});
    assert!(answer.would_move, "{answer:?}");
    assert_eq!((codes(&answer), answer.problems[0].fatal), (vec!["slots"], false));
    assert_moved(&migrate(source, destination, pair(), (control(), control())));
}

#[test]
fn a_guest_that_writes_too_fast_is_told_what_would_do() {
    let (mut source, destination, _) = two_vms(256);
    source.dirty(200, 0);
    let (answer, ..) = ask(&mut source, destination, |p| {
        p.max_bandwidth = 100_000;
        p.downtime_limit = Duration::from_millis(10);
    });
    assert_eq!(codes(&answer), ["not-converging"], "{answer:?}");
    assert!(!answer.would_move);
    let forecast = answer.forecast.unwrap();
    assert!(!forecast.converges && forecast.dirtied_bytes > 100 * 4096, "{forecast:?}");
    assert!(answer.problems[0].hint.contains("--downtime"), "{:?}", answer.problems);
    assert!(answer.problems[0].hint.contains("which the connection has"), "{:?}", answer.problems);
}

/// Plays a destination by hand: answers the first words with `answers`, and gives what came.
fn played(answers: Vec<Message>) -> (Result<Preflight, SourceError>, Vec<u8>) {
    let (mut source, ..) = two_vms(64);
    let (a, b) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || {
        let mut bytes = Vec::new();
        for message in answers {
            message.write(&mut bytes);
        }
        (&b).write_all(&bytes).unwrap();
        let mut came = Vec::new();
        let _ = (&b).read_to_end(&mut came);
        came
    });
    let connection = Connection::from_unix(a, "unix:a".into());
    let answer = preflight(&mut source, &connection, &control(), &quick());
    drop(connection);
    assert_eq!(source.world.runs(), Some("source"));
    (answer, join(there))
}

fn hello(abilities: &[&str]) -> Message {
    Message::Hello(Hello {
        program: "mini-vmm 0.0.9".into(),
        protocols: vec![1],
        abilities: abilities.iter().map(|a| (*a).to_owned()).collect(),
    })
}

#[test]
fn who_cannot_be_asked_is_told_apart_and_is_sent_nothing_that_it_does_not_know() {
    let (answer, came) = played(vec![Message::Pong(PING_MAGIC)]);
    let words = answer.unwrap_err().chain();
    assert!(words.contains("can't be asked") && words.contains("as a QEMU does"), "{words}");
    assert!(!String::from_utf8_lossy(&came).contains("protocol"), "a QEMU was sent a manifest");

    let (answer, came) = played(vec![hello(&[])]);
    let words = answer.unwrap_err().chain();
    assert!(words.contains("can't be asked") && words.contains("mini-vmm 0.0.9"), "{words}");
    assert!(!String::from_utf8_lossy(&came).contains("only_asking"), "a question was put");

    let mut stranger = Vec::new();
    Message::Pong(0).write(&mut stranger);
    let (mut source, ..) = two_vms(64);
    let (a, b) = UnixStream::pair().unwrap();
    (&b).write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
    let connection = Connection::from_unix(a, "unix:a".into());
    let error = preflight(&mut source, &connection, &control(), &quick()).unwrap_err();
    assert!(error.chain().contains("can't be understood"), "{}", error.chain());
}

#[test]
fn a_hostile_verdict_is_cut_to_size() {
    let problem = Problem::new(kind::RAM_SIZE, "a\u{1b}[2Jb", "1", "2", "x".repeat(10_000));
    let verdict = Verdict { problems: vec![problem; 200], ..Verdict::default() };
    let questions = Questions { sample: Duration::ZERO, ..quick() };
    let (mut source, ..) = two_vms(64);
    let (a, b) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || {
        let mut bytes = Vec::new();
        hello(&[PREFLIGHT]).write(&mut bytes);
        Message::Verdict(verdict).write(&mut bytes);
        let reading = b.try_clone().unwrap();
        let reader = thread::spawn(move || (&reading).read_to_end(&mut Vec::new()));
        let _ = (&b).write_all(&bytes);
        let _ = reader.join();
    });
    let connection = Connection::from_unix(a, "unix:a".into());
    // Too long altogether, or cut: no other end is right.
    match preflight(&mut source, &connection, &control(), &questions) {
        Ok(answer) => {
            assert_eq!(answer.problems.len(), MAX_PROBLEMS);
            assert_eq!(answer.left_out, 200 - MAX_PROBLEMS as u64);
            assert_eq!(answer.problems[0].what, "a?[2Jb");
            assert!(answer.problems[0].hint.len() < 5000 && !answer.would_move);
        }
        Err(error) => assert!(error.chain().contains("at most"), "{}", error.chain()),
    }
    drop(connection);
    join(there);
}

/// Plays a source by hand up to its manifest, and then as `rest` says.
fn played_source(only_asking: bool, rest: impl FnOnce(&mut Vec<u8>)) -> (Failure, Vec<Message>) {
    let (source, destination, _) = two_vms(16);
    let mut bytes = Vec::new();
    let machine: String = MACHINE.into();
    header::write(&mut bytes, &Configuration { machine: machine.clone(), ..Default::default() });
    Command::OpenReturnPath.write(&mut bytes);
    Command::Ping(PING_MAGIC).write(&mut bytes);
    Command::Manifest(Box::new(manifest(&source, only_asking))).write(&mut bytes);
    rest(&mut bytes);
    let (a, b) = UnixStream::pair().unwrap();
    let there = waits(destination, Connection::from_unix(b, "unix:b".into()));
    let reading = a.try_clone().unwrap();
    let answers = thread::spawn(move || {
        let mut reader = StreamReader::new(Connection::from_unix(reading, "unix:a".into()));
        std::iter::from_fn(|| Message::read(&mut reader).ok()).collect::<Vec<_>>()
    });
    // The destination may hang up before it has read all.
    let _ = (&a).write_all(&bytes);
    let _ = a.shutdown(std::net::Shutdown::Write);
    let (ending, _) = join(there);
    (ending.unwrap_err(), join(answers))
}

fn manifest(vm: &FakeVm, only_asking: bool) -> Manifest {
    Manifest {
        protocol: 1,
        program: "test".into(),
        machine: MACHINE.into(),
        vcpus: 2,
        ram: migration::guest::GuestRam::blocks(&*vm.ram),
        sections: Vec::new(),
        verify: false,
        only_asking,
        channels: None,
        memory: false,
        hears_running: false,
        id: None,
        commit_within_ms: 0,
        sent_at_ms: 0,
        details: vm.details(),
    }
}

#[test]
fn whoever_asks_may_not_send_a_vm_and_the_vm_that_waits_is_untouched() {
    let probe = |n: u64| {
        move |out: &mut Vec<u8>| {
            for _ in 0..n {
                Command::Probe(MAX_PROBE).write(out);
            }
        }
    };
    let (failure, _) = played_source(false, probe(1));
    // The sections differ, so that a real migration ends here.
    assert!(matches!(failure.error, DestinationError::Refused { .. }), "{failure}");

    let (failure, _) = played_source(true, probe(MAX_PROBES / u64::from(MAX_PROBE) + 1));
    assert!(failure.error.chain().contains("more probes"), "{failure}");
    assert!(failure.vm_untouched);

    let (failure, answers) = played_source(true, |out| {
        let key = migration::vmstate::SectionId::new("ram", 0);
        section::write_header(out, PartType::Start, &SectionHeader { id: 2, key, version: 4 });
    });
    assert!(failure.error.chain().contains("a VM after a mere question"), "{failure}");
    assert!(failure.vm_untouched);
    let names: Vec<_> = answers.iter().map(Message::name).collect();
    assert_eq!(names, ["hello", "pong", "verdict", "failed"]);

    let (source, ..) = two_vms(16);
    let (failure, _) = played_source(true, |out| {
        Command::Manifest(Box::new(manifest(&source, false))).write(out);
    });
    assert!(failure.error.chain().contains("a manifest"), "{failure}");

    // It dies in the middle of a probe, or just so.
    let (failure, _) = played_source(true, |out| {
        Command::Probe(MAX_PROBE).write(out);
        out.truncate(out.len() - 100);
    });
    assert!(failure.vm_untouched && failure.error.chain().contains("broke off"), "{failure}");
    let (failure, answers) = played_source(true, |out| {
        Command::Abort(Abort { reason: "enough".into() }).write(out);
    });
    assert!(matches!(failure.error, DestinationError::OnlyAsked { count: 3 }), "{failure}");
    assert!(matches!(answers.last(), Some(Message::Verdict(v)) if v.problems.len() == 3));
}
