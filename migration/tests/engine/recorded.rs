//! Two releases can talk: a conversation of release 0.1.0 is kept in `tests/recorded`, either half of it
//! is played to the other side as it is today, and the best version that both sides speak is used.
//!
//! When something is *added* to the protocol these files stay as they are. A new one is recorded beside
//! them for a new version: `MINI_VMM_RECORD=DIR cargo test -p migration --test engine recorded`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::common::*;
use migration::destination;
use migration::manifest::{Hello, PROTOCOL_VERSIONS, Prepared, Running, Verdict};
use migration::source::{self, Outcome};
use migration::stats::Report;
use migration::transport::Connection;
use migration::vmstate::{Audience, SliceSource};
use migration::wire::return_path::Message;

/// What a source of release 0.1.0 says, with `x-verify`, from the header to SETTLED.
const FORTH: &[u8] = include_bytes!("../recorded/0.1.0-forth");
/// What the destination answers.
const BACK: &[u8] = include_bytes!("../recorded/0.1.0-back");

const PAGES: u64 = 8;
const PING: &[u8] = b"\x08\0\x02\0\x04";
const MANIFEST: &[u8] = b"\x08\x4d\x01\0\x04";
const COMMIT: &[u8] = b"\x08\x4d\x03\0\x04";
const SETTLED: &[u8] = b"\x08\x4d\x07\0\x04";
/// EOF, and the description behind it.
const END: &[u8] = b"\0\x06\0\0";

fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let mut source = SliceSource::new(bytes);
        all.push(Message::read(&mut source).expect("a whole message"));
        bytes = source.rest();
    }
    all
}

fn connection(stream: UnixStream) -> Connection {
    Connection::from_unix(stream, "unix:x".into())
}

/// Copies all that passes.
fn copy(mut from: UnixStream, mut to: UnixStream, log: Arc<Mutex<Vec<u8>>>) {
    thread::spawn(move || {
        let mut buf = [0; 65536];
        while let Ok(n @ 1..) = from.read(&mut buf) {
            log.lock().unwrap().extend_from_slice(&buf[..n]);
            if to.write_all(&buf[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    });
}

#[test]
fn a_conversation_of_today_has_the_recorded_ones_parts() {
    let (source, destination, _) = two_vms(PAGES);
    let (a, a_end) = UnixStream::pair().unwrap();
    let (b, b_end) = UnixStream::pair().unwrap();
    let (forth, back) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::<Mutex<Vec<u8>>>::default());
    copy(a_end.try_clone().unwrap(), b_end.try_clone().unwrap(), forth.clone());
    copy(b_end, a_end, back.clone());
    let controls = (control_with(|p| p.verify = true), control());
    let ended = migrate(source, destination, (connection(a), connection(b)), controls);
    assert_moved(&ended);
    let (forth, back) = (forth.lock().unwrap().clone(), back.lock().unwrap().clone());
    if let Some(dir) = std::env::var_os("MINI_VMM_RECORD") {
        let dir = std::path::Path::new(&dir);
        std::fs::write(dir.join("forth"), &forth).unwrap();
        std::fs::write(dir.join("back"), &back).unwrap();
    }
    let names = |bytes: &[u8]| -> Vec<_> {
        let all = messages(bytes).into_iter().filter(|m| !matches!(m, Message::Pong(_)));
        all.map(|m| m.name()).collect()
    };
    assert_eq!(names(BACK), ["hello", "verdict", "prepared", "shut"]);
    // Since then the source says that it listens for one more.
    assert_eq!(names(&back), ["hello", "verdict", "prepared", "running", "shut"]);
    // What is not JSON is the same to the last byte: RAM and device sections, between the verdict and
    // the digests.
    let ram = |bytes: &[u8]| {
        let start = bytes.windows(7).position(|w| w == b"\x01\0\0\0\x02\x03r").expect("START ram");
        let end = bytes.windows(5).position(|w| w == b"\x08\x4d\x02\0\x04").expect("VERIFY");
        bytes[start..end].to_vec()
    };
    assert!(ram(&forth) == ram(FORTH), "pages or sections look otherwise than in release 0.1.0");
    // Nobody waits for a description.
    assert!(has(&forth, b"\0\x06\0\0\0\x02{}"));
}

#[test]
fn todays_destination_takes_a_vm_from_the_recorded_source() {
    // What it must be afterwards.
    let (source, mut there, world) = two_vms(PAGES);
    world.note("the source is another process, of release 0.1.0");
    let (a, b) = UnixStream::pair().unwrap();
    let player = thread::spawn(move || {
        (&a).write_all(FORTH).unwrap();
        let mut answers = Vec::new();
        (&a).read_to_end(&mut answers).unwrap();
        answers
    });
    // Its guest stands still, and its disks are free.
    let mut source = source;
    migration::guest::SourceVm::pause(&mut source).unwrap();
    migration::guest::SourceVm::drain(&mut source).unwrap();
    migration::guest::SourceVm::read_state(&mut source).unwrap();
    migration::guest::SourceVm::release_disks(&mut source).unwrap();
    let control = control();
    destination::run(&mut there, connection(b), &control).unwrap();
    assert_eq!((world.runs(), world.disks()), (Some("destination"), Some("destination")));
    assert!(there.ram.contents() == source.ram.contents(), "RAM differs");
    for n in 0..3 {
        assert_eq!(there.device(n), source.device(n));
    }
    assert_eq!(control.owed(), None, "it has said that it knows");
    let answers = join(player);
    assert!(matches!(messages(&answers).last(), Some(Message::Shut(0))));
}

/// Plays a destination that says these words, each when it is its turn, and answers pings. Gives what
/// the source has sent.
fn played(words: [Message; 4]) -> (Outcome, FakeVm, Vec<u8>) {
    let (outcome, source, came, _) = played_all(words.map(|word| vec![word]));
    (outcome, source, came)
}

/// The same, of a destination that may say several at once; also what the source reports.
fn played_all(words: [Vec<Message>; 4]) -> (Outcome, FakeVm, Vec<u8>, Report) {
    let (mut source, ..) = two_vms(PAGES);
    let (a, b) = UnixStream::pair().unwrap();
    let player = thread::spawn(move || {
        let [hello, verdict, prepared, shut] = words;
        let mut turns =
            [(PING, hello), (MANIFEST, verdict), (END, prepared), (COMMIT, shut)].into_iter();
        let mut next = turns.next();
        let (mut came, mut looked, mut pings) = (Vec::new(), 0, 0);
        let mut buf = [0; 65536];
        while let Ok(n @ 1..) = (&b).read(&mut buf) {
            came.extend_from_slice(&buf[..n]);
            let mut say = Vec::new();
            while let Some((what, word)) = &next {
                let Some(at) = came[looked..].windows(what.len()).position(|w| w == *what) else {
                    break;
                };
                looked += at + what.len();
                word.iter().for_each(|word| word.write(&mut say));
                next = turns.next();
            }
            // A ping's value stands behind it.
            while let Some(at) = came[pings..].windows(PING.len()).position(|w| w == PING) {
                let value = pings + at + PING.len();
                let Some(value) = came.get(value..value + 4) else { break };
                Message::Pong(u32::from_be_bytes(value.try_into().unwrap())).write(&mut say);
                pings += at + PING.len() + 4;
            }
            if (&b).write_all(&say).is_err() {
                break;
            }
        }
        came
    });
    let control = control_with(|p| p.verify = true);
    let outcome = source::run(&mut source, connection(a), &control);
    (outcome, source, join(player), control.report())
}

fn recorded() -> [Message; 4] {
    let all = messages(BACK).into_iter().filter(|m| !matches!(m, Message::Pong(_)));
    let all: Vec<_> = all.collect();
    all.try_into().expect("hello, verdict, prepared, shut")
}

fn has(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|w| w == what)
}

#[test]
fn todays_source_gives_its_vm_to_the_recorded_destination() {
    let (outcome, source, came) = played(recorded());
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    assert_eq!(source.world.runs(), None);
    assert!(has(&came, SETTLED));
}

/// A destination that says this of itself, otherwise as recorded.
fn with_hello(protocols: &[u32], abilities: &[&str]) -> [Message; 4] {
    let hello = Hello {
        program: "mini-vmm 99".into(),
        protocols: protocols.to_vec(),
        abilities: abilities.iter().map(|a| (*a).to_owned()).collect(),
    };
    let [_, verdict, prepared, shut] = recorded();
    [Message::Hello(hello), verdict, prepared, shut]
}

#[test]
fn with_a_newer_peer_the_best_version_that_both_speak_is_used() {
    let best = PROTOCOL_VERSIONS[0];
    let (outcome, _, came) =
        played(with_hello(&[best + 2, best + 1, best], &["fate", "telepathy"]));
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    assert!(has(&came, format!("\"protocol\":{best},").as_bytes()));
    // A newer source may say more in its messages than this side knows.
    let newer = String::from_utf8_lossy(FORTH).into_owned();
    assert!(newer.contains("\"protocol\":1"));
    let verdict: Verdict =
        serde_json::from_str(r#"{"problems": [], "of-a-later-release": {"a": [1]}}"#).unwrap();
    assert_eq!(verdict, Verdict::default());
    let prepared: Prepared = serde_json::from_str(r#"{"later": 1}"#).unwrap();
    assert_eq!(prepared, Prepared::default());
}

#[test]
fn sections_are_written_in_the_form_that_the_peer_reads() {
    let forms = [(&["fate"][..], Audience::Restore), (&["short-sections"][..], Audience::MiniVmm)];
    for (abilities, form) in forms {
        let (outcome, source, _) = played(with_hello(PROTOCOL_VERSIONS, abilities));
        assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
        for (id, device) in &source.devices {
            let saved_for = device.lock().unwrap().saved_for.lock().unwrap().clone();
            // Before, to know how long it is, and in the end.
            assert_eq!(saved_for, [form, form], "{id}, {abilities:?}");
        }
    }
}

#[test]
fn with_an_older_peer_nothing_is_said_that_it_does_not_know() {
    let (outcome, _, came) = played(with_hello(PROTOCOL_VERSIONS, &[]));
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    assert!(!has(&came, SETTLED));
    // The migration has no name for one that can't be asked for it.
    let manifest = came.windows(MANIFEST.len()).position(|w| w == MANIFEST).unwrap();
    let len = manifest + MANIFEST.len();
    let json = len + 4..;
    let size = u32::from_be_bytes(came[len..len + 4].try_into().unwrap()) as usize;
    let manifest: serde_json::Value = serde_json::from_slice(&came[json][..size]).unwrap();
    assert!(manifest.get("id").is_none(), "{manifest}");
}

#[test]
fn whatever_a_destination_says_of_since_when_the_guest_runs_decides_nothing() {
    let [hello, verdict, prepared, shut] = recorded();
    for said in [0, 1, u64::MAX] {
        let running = || Message::Running(Running { since_us: said });
        let last = vec![running(), running(), shut.clone()];
        let words = [vec![hello.clone()], vec![verdict.clone()], vec![prepared.clone()], last];
        let (outcome, _, _, report) = played_all(words);
        assert!(matches!(outcome, Outcome::Completed(_)), "{said}: {outcome:?}");
        let downtime = report.downtime.expect("it stood still");
        let steps: Duration = report.steps.iter().map(|(_, took)| *took).sum();
        // No more than the last step can be talked away.
        let before: Duration = report.steps.iter().rev().skip(1).map(|(_, took)| *took).sum();
        assert!(steps <= downtime && before <= downtime && !before.is_zero(), "{report:#?}");
    }
    // Out of turn it is an error.
    let early = Message::Running(Running { since_us: 5 });
    let (outcome, source, _) = played([hello, verdict, early, shut]);
    let Outcome::Kept { error } = outcome else { panic!("{outcome:?}") };
    assert!(error.chain().contains("running") && error.chain().contains("prepared"), "{error:?}");
    assert_eq!(source.world.runs(), Some("source"));
}

#[test]
fn without_a_common_version_nothing_is_sent() {
    let (outcome, source, came) = played(with_hello(&[98, 97], &["fate"]));
    let Outcome::Kept { error } = outcome else { panic!("{outcome:?}") };
    assert!(error.chain().contains("no common protocol: the destination speaks [98, 97]"));
    assert_eq!(source.world.runs(), Some("source"));
    assert!(!has(&came, MANIFEST) && !has(&came, b"\x03ram"));
}
