//! The connection is cut after every byte, in either direction: never do both sides run, and the
//! source runs on unless it had given the guest away.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::common::*;
use migration::params::Parameters;
use migration::source::Outcome;
use migration::transport::Connection;
use migration::wire::command::{Command, Commit};

/// How many bytes may pass in each direction before both are cut.
#[derive(Clone, Copy)]
struct Budget {
    forth: usize,
    back: usize,
}

const ALL: Budget = Budget { forth: usize::MAX, back: usize::MAX };

/// What passed, in each direction.
type Passed = Arc<Mutex<(Vec<u8>, Vec<u8>)>>;

/// Two connections with a wire between them that breaks when a budget is spent, and changes a bit of
/// the byte at `flip` on its way forth.
fn wire(budget: Budget, flip: Option<usize>) -> (Connection, Connection, Passed) {
    let (a, a_end) = UnixStream::pair().unwrap();
    let (b, b_end) = UnixStream::pair().unwrap();
    let passed = Passed::default();
    for (from, to, mut left, forth) in [
        (a_end.try_clone().unwrap(), b_end.try_clone().unwrap(), budget.forth, true),
        (b_end.try_clone().unwrap(), a_end.try_clone().unwrap(), budget.back, false),
    ] {
        let passed = passed.clone();
        thread::spawn(move || {
            let mut buf = [0; 65536];
            let mut begin = 0;
            while left > 0 {
                let Ok(n @ 1..) = (&from).read(&mut buf) else { break };
                if let Some(at) = flip.filter(|at| forth && (begin..begin + n).contains(at)) {
                    buf[at - begin] ^= 1 << (at % 8);
                }
                begin += n;
                let n = n.min(left);
                left -= n;
                let mut passed = passed.lock().unwrap();
                let log = if forth { &mut passed.0 } else { &mut passed.1 };
                log.extend_from_slice(&buf[..n]);
                drop(passed);
                if (&to).write_all(&buf[..n]).is_err() {
                    break;
                }
            }
            if left == 0 {
                // Cut: what has passed arrives, nothing more does in either direction.
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            } else {
                let _ = to.shutdown(Shutdown::Write);
            }
        });
    }
    let a = Connection::from_unix(a, "unix:a".into());
    let b = Connection::from_unix(b, "unix:b".into());
    (a, b, passed)
}

fn run(budget: Budget, verify: bool) -> (Ended, Vec<u8>, Vec<u8>) {
    run_with(budget, verify, 0)
}

/// Two VMs with so many devices more than usual.
fn run_with(budget: Budget, verify: bool, more: u32) -> (Ended, Vec<u8>, Vec<u8>) {
    let (mut source, mut destination, _) = two_vms(24);
    for vm in [&mut source, &mut destination] {
        vm.add_devices(more);
    }
    let (a, b, passed) = wire(budget, None);
    let control = control_with(|p| p.verify = verify);
    let ended = migrate(source, destination, (a, b), (control, crate::common::control()));
    let passed = passed.lock().unwrap().clone();
    (ended, passed.0, passed.1)
}

fn check(ended: &Ended, committed: bool, at: &str) {
    let world = &ended.source.world;
    match &ended.outcome {
        Outcome::Completed(_) => {
            assert_eq!(world.runs(), Some("destination"), "{at}");
            assert!(ended.source.ram.contents() == ended.destination.ram.contents(), "{at}");
        }
        Outcome::Kept { error } => {
            assert_eq!(world.runs(), Some("source"), "{at}: {}", error.chain());
            assert_eq!(world.disks(), Some("source"), "{at}");
            assert!(ended.arrived.is_err(), "{at}");
        }
        Outcome::InDoubt { .. } => {
            assert!(committed, "{at}: in doubt before a byte of COMMIT had left");
            assert_ne!(world.runs(), Some("source"), "{at}");
            assert_eq!(ended.arrived.is_ok(), world.runs() == Some("destination"), "{at}");
        }
        Outcome::KeptStopped { .. } => panic!("{at}: {:?}", ended.outcome),
    }
}

/// Sections go out as they are written, many in one write.
#[test]
fn the_sections_of_many_devices_are_cut_anywhere() {
    const DEVICES: u32 = 200;
    let (ended, forth, _) = run_with(ALL, false, DEVICES);
    assert_moved(&ended);
    let first = forth.windows(7).position(|w| w == b"\x03cpu\0\0\0").expect("the first section");
    let commit = forth.windows(5).rposition(|w| w == b"\x08\x4d\x03\0\x04").expect("COMMIT");
    assert!(commit - first > 2 * 4096, "several writes: {first} to {commit}");
    for cut in (first..commit).step_by(211) {
        let (ended, passed, _) = run_with(Budget { forth: cut, ..ALL }, false, DEVICES);
        assert_eq!(passed.len(), cut);
        check(&ended, false, &format!("cut after {cut} bytes forth"));
        assert!(matches!(ended.outcome, Outcome::Kept { .. }), "cut after {cut} bytes forth");
    }
}

#[test]
fn the_stream_is_cut_everywhere() {
    let (ended, forth, back) = run(ALL, true);
    assert_moved(&ended);
    let (mut commit, mut settled) = (Vec::new(), Vec::new());
    Command::Commit(Commit { disks: 0.into() }).write(&mut commit);
    Command::Settled.write(&mut settled);
    assert!(forth.ends_with(&[commit.clone(), settled.clone()].concat()));
    let whole_order = forth.len() - settled.len();
    let point_of_no_return = whole_order - commit.len();

    // In the pages every 997th byte, elsewhere every one.
    let pages = 3000..point_of_no_return - 2500;
    assert!(pages.len() > 40_000, "the stream has {} bytes", forth.len());
    for cut in (0..forth.len()).filter(|cut| !pages.contains(cut) || cut % 997 == 0) {
        let (ended, passed, _) = run(Budget { forth: cut.max(1), ..ALL }, true);
        assert!(passed.len() <= cut.max(1));
        check(&ended, cut > point_of_no_return, &format!("cut after {cut} bytes forth"));
        if cut <= point_of_no_return {
            assert!(matches!(ended.outcome, Outcome::Kept { .. }), "cut after {cut} bytes forth");
        } else if cut > whole_order {
            // The source knew, and was saying so.
            assert!(matches!(ended.outcome, Outcome::Completed(_)), "cut after {cut} bytes");
        } else if cut < whole_order {
            // What has arrived is not yet a whole COMMIT.
            assert!(matches!(ended.outcome, Outcome::InDoubt { .. }), "cut after {cut} bytes");
            assert!(ended.arrived.is_err());
        }
    }
    let running = back.windows(2).rposition(|w| w == b"\x4d\x06").expect("RUNNING before shut(0)");
    let mut in_doubt = 0;
    for cut in 1..back.len() {
        let (ended, _, _) = run(Budget { back: cut, ..ALL }, true);
        // Between PREPARED and RUNNING it depends on who is faster.
        let prepared = cut >= running;
        check(&ended, prepared, &format!("cut after {cut} bytes back"));
        in_doubt += usize::from(matches!(ended.outcome, Outcome::InDoubt { .. }));
    }
    assert!(in_doubt > 0, "no cut of shut(0) left a doubt");
}

#[test]
fn a_bit_that_changes_on_its_way_is_noticed_wherever_it_matters() {
    let find = |text: &[u8], bytes: &[u8]| text.windows(bytes.len()).position(|w| w == bytes);
    let (ended, forth, _) = run(ALL, true);
    assert_moved(&ended);
    let manifest = find(&forth, b"{\"protocol\"").unwrap();
    let ram = find(&forth, b"\x03ram\0\0\0\0").unwrap();
    let devices = find(&forth, b"\x03cpu\0\0\0").unwrap() - 5;
    let end = find(&forth, b"\0\x06").unwrap();
    assert!(manifest < ram && ram < devices && devices < end, "{manifest} {ram} {devices} {end}");
    let mut refused = 0;
    for at in (manifest..ram - 5).chain(devices..end).step_by(5) {
        let (source, destination, world) = two_vms(24);
        let (a, b, _) = wire(ALL, Some(at));
        // A length that has changed makes both sides wait.
        let quick = |p: &mut Parameters| p.stall_timeout = Duration::from_millis(200);
        let controls = (
            control_with(|p| {
                p.verify = true;
                quick(p);
            }),
            control_with(quick),
        );
        let ended = migrate(source, destination, (a, b), controls);
        let place = String::from_utf8_lossy(&forth[at - 20..at + 20]).into_owned();
        assert!(
            matches!(ended.outcome, Outcome::Kept { .. }),
            "{at}, in {place:?}: {:?}",
            ended.outcome
        );
        assert!(ended.arrived.is_err(), "{at}");
        assert_eq!(world.runs(), Some("source"), "{at}");
        refused += 1;
    }
    assert!(refused > 100, "{refused}");
}
