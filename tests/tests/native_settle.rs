//! A hand-over that was cut when nobody could know any more who has the guest, and nobody there to
//! decide: the source asks the destination, or looks at the disks, and it settles by itself.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use system_tests::guest::Guest;
use system_tests::image::{COMMIT, Disk};
use system_tests::wait;

const MEMORY: &str = "64M";
const WORK: &str = "set=16M,rate=0,verify=20000";
/// shut(0).
const SHUT: &[u8] = b"\0\x01\0\x04\0\0\0\0";

/// What happens to the first connection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cut {
    /// The order does not reach the destination.
    TheOrder,
    /// The destination's last word does not reach the source.
    TheLastWord,
    /// The destination is frozen, then the order reaches it, and all is cut.
    BehindTheOrder { frozen: Pid },
}

/// Cuts its first connection and forwards all later ones, or none.
struct Relay {
    address: SocketAddr,
    over: Arc<AtomicBool>,
    worker: Option<JoinHandle<()>>,
}

impl Relay {
    fn new(target: &str, cut: Cut, later: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let target = target.strip_prefix("tcp:").unwrap_or(target).to_string();
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let worker = thread::spawn(move || {
            let mut pumps = Vec::new();
            let mut first = Some(cut);
            while let Ok((near, _)) = listener.accept() {
                if ended.load(Ordering::Acquire) {
                    break;
                }
                let Ok(far) = TcpStream::connect(&target) else { continue };
                let cut = first.take();
                let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                pumps.push(thread::spawn(move || forth(&near, &far, cut)));
                pumps.push(thread::spawn(move || back(&far2, &near2, cut)));
                if !later {
                    break;
                }
            }
            drop(listener);
            pumps.into_iter().for_each(|pump| pump.join().expect("no panic"));
        });
        Self { address, over, worker: Some(worker) }
    }

    fn uri(&self) -> String {
        format!("tcp:{}", self.address)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

fn hang_up(a: &TcpStream, b: &TcpStream) {
    let _ = (a.shutdown(Shutdown::Both), b.shutdown(Shutdown::Both));
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

/// Stops a process, and returns when all of its threads stand still.
fn freeze(pid: Pid) {
    kill(pid, Signal::SIGSTOP).expect("our own child");
    let stopped = || {
        let mut tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
        tasks.all(|task| {
            let stat = fs::read_to_string(task.expect("a thread").path().join("stat"));
            // Behind the name in brackets, which may have any character.
            stat.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|s| s.starts_with('T')))
        })
    };
    wait::until("the process to stand still", 20, || stopped().then_some(()), || pid);
}

fn forth(mut near: &TcpStream, mut far: &TcpStream, cut: Option<Cut>) {
    let mut buf = vec![0; 64 << 10];
    while let Ok(n @ 1..) = near.read(&mut buf) {
        // The source waits for PREPARED before it sends COMMIT, so that begins what is read.
        match cut.filter(|_| find(&buf[..n], COMMIT) == Some(0)) {
            Some(Cut::TheOrder) => break,
            Some(Cut::BehindTheOrder { frozen }) => {
                freeze(frozen);
                far.write_all(&buf[..n]).expect("room");
                // Nothing is thrown away of what has not been read there.
                let _ = (far.shutdown(Shutdown::Write), near.shutdown(Shutdown::Both));
                return;
            }
            _ => {}
        }
        if far.write_all(&buf[..n]).is_err() {
            break;
        }
    }
    hang_up(near, far);
}

fn back(mut far: &TcpStream, mut near: &TcpStream, cut: Option<Cut>) {
    let mut buf = vec![0; 64 << 10];
    while let Ok(n @ 1..) = far.read(&mut buf) {
        if cut == Some(Cut::TheLastWord) && find(&buf[..n], SHUT).is_some() {
            break;
        }
        if near.write_all(&buf[..n]).is_err() {
            break;
        }
    }
    if matches!(cut, Some(Cut::BehindTheOrder { .. })) {
        let _ = near.shutdown(Shutdown::Both);
    } else {
        hang_up(near, far);
    }
}

/// Source and destination after the cut.
struct Pair {
    here: Guest,
    there: Guest,
    _relay: Relay,
}

/// Migrates through a relay that cuts. The source finds itself in doubt.
fn cut(cut: impl FnOnce(&Guest) -> Cut, later: bool, more: &str) -> Pair {
    let mut here = Guest::boot_with(MEMORY, 1, WORK, more);
    here.wait_ready();
    let there = Guest::incoming_with(MEMORY, 1, more);
    let relay = Relay::new(&there.vm.migrate_uri(), cut(&there), later);
    let mut qmp = here.begin(&relay.uri(), &json!({ "x-stall-timeout": 5000 }));
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], "failed", "{info}");
    let error = info["error-desc"].as_str().unwrap_or_default();
    assert!(error.contains("not known whether the destination runs the guest"), "{info}");
    Pair { here, there, _relay: relay }
}

impl Pair {
    /// Nobody says anything, and the guest goes on here, whole.
    fn resumes(&mut self) {
        let vm = &self.here.vm;
        wait::until(
            "the guest to go on here",
            60,
            || (vm.qmp().status() == "running").then_some(()),
            || vm.stderr(),
        );
        let state = vm.qmp().ask("query-status");
        assert!(state["x-in-doubt"].is_null(), "{state}");
        let info = vm.qmp().ask("query-migrate");
        let error = info["error-desc"].as_str().unwrap_or_default();
        assert!(error.contains("this has settled: the guest goes on here"), "{info}");
        self.here.is_whole();
    }

    /// Nobody says anything, and the process here ends well: the guest lives there.
    fn hands_over(&mut self) {
        assert_eq!(self.here.vm.wait_exit(60), 0, "{}", self.here.vm.stderr());
        let said = self.here.vm.stderr();
        assert!(said.contains("the guest runs at the destination, and this copy ends"), "{said}");
        self.here.nothing_is_left();
        self.there.is_whole();
        assert_eq!(self.there.vm.qmp().status(), "running");
    }

    /// Whether anybody listens where the destination waited.
    fn still_listens(&self, uri: &str) -> bool {
        TcpStream::connect(uri.strip_prefix("tcp:").expect("a port")).is_ok()
    }
}

#[test]
fn a_destination_that_runs_the_guest_says_so_when_it_is_asked() {
    let mut uri = String::new();
    let mut pair = cut(
        |there| {
            uri = there.vm.migrate_uri();
            Cut::TheLastWord
        },
        true,
        "",
    );
    pair.there.is_whole();
    pair.hands_over();
    // The source has said that it knows, and nobody needs to be answered any more.
    wait::until(
        "the destination to listen no more",
        20,
        || (!pair.still_listens(&uri)).then_some(()),
        || pair.there.vm.stderr(),
    );
    pair.there.vm.qmp().ask("quit");
    assert_eq!(pair.there.vm.wait_exit(20), 0, "{}", pair.there.vm.stderr());
}

#[test]
fn a_destination_that_will_never_run_the_guest_says_so_when_it_is_asked() {
    let mut pair = cut(|_| Cut::TheOrder, true, "");
    pair.resumes();
    assert_eq!(pair.there.vm.wait_exit(20), 1, "{}", pair.there.vm.stderr());
    let said = pair.there.vm.stderr();
    assert!(said.contains("the source knows now what became of the guest"), "{said}");
    pair.there.nothing_is_left();
    pair.here.moves_after_all(MEMORY, 1, "");
}

#[test]
fn the_disks_decide_when_the_destination_is_gone() {
    let disk = Disk::new();
    // It never had the order, and has ended: nobody can be asked.
    let mut pair = cut(|_| Cut::TheOrder, false, &disk.argument());
    pair.resumes();
    assert_eq!(pair.there.vm.wait_exit(20), 1, "{}", pair.there.vm.stderr());
    pair.here.moves_after_all(MEMORY, 1, &disk.argument());
    // It runs, and can't be reached; but its disk shows it.
    let mut pair = cut(|_| Cut::TheLastWord, false, &disk.argument());
    pair.hands_over();
}

#[test]
fn without_disks_and_without_an_answer_nothing_is_decided() {
    let mut pair = cut(|_| Cut::TheLastWord, false, "");
    let asked = wait::until(
        "two questions",
        60,
        || {
            let doubt = pair.here.vm.qmp().ask("query-status")["x-in-doubt"].clone();
            let asked = doubt["asked"].as_str().unwrap_or_default().to_string();
            (asked.starts_with("asked") && !asked.starts_with("asked 1 ")).then_some(asked)
        },
        || pair.here.vm.stderr(),
    );
    assert!(asked.contains("can't connect"), "{asked}");
    let out = pair.here.vm.cli(&["recover"]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(said.contains("asked     asked"), "{said}");
    let cancel = pair.here.vm.qmp().execute("migrate_cancel", json!({}));
    let error = cancel.expect_err("the guest has been given away").to_string();
    assert!(error.contains("too late to cancel"), "{error}");
    // It is settled by the operator all the same, at once.
    let out = pair.here.vm.cli(&["recover", "--discard", "--i-know-the-destination-runs"]);
    assert!(out.status.success(), "{out:?}");
    assert_eq!(pair.here.vm.wait_exit(20), 0, "{}", pair.here.vm.stderr());
    pair.there.is_whole();
}

#[test]
fn another_process_at_the_destinations_address_decides_nothing() {
    let mut pair = cut(|_| Cut::TheLastWord, false, "");
    // The relay is gone; somebody else takes its port.
    let uri = pair._relay.uri();
    let mut args = system_tests::vm::Vm::selfcheck(MEMORY, 1, "").args("--migrate-listen");
    args = args.arg(uri);
    let mut other = args.start();
    let doubt = |pair: &Pair| pair.here.vm.qmp().ask("query-status")["x-in-doubt"].clone();
    wait::until(
        "an answer of one who knows nothing",
        60,
        || {
            let doubt = doubt(&pair);
            let asked = doubt["asked"].as_str().unwrap_or_default();
            asked.contains("knows nothing of this migration").then_some(())
        },
        || format!("{}{}", pair.here.vm.stderr(), other.stderr()),
    );
    thread::sleep(Duration::from_secs(1));
    assert!(doubt(&pair).is_object());
    assert_eq!(other.qmp().status(), "inmigrate");
    other.qmp().ask("quit");
    assert_eq!(other.wait_exit(20), 0, "{}", other.stderr());
    let out = pair.here.vm.cli(&["recover", "--discard", "--i-know-the-destination-runs"]);
    assert!(out.status.success(), "{out:?}");
    assert_eq!(pair.here.vm.wait_exit(20), 0, "{}", pair.here.vm.stderr());
    pair.there.is_whole();
}

#[test]
fn a_guest_that_has_run_and_ended_elsewhere_is_not_taken_back() {
    let disk = Disk::new();
    let mut pair = cut(|_| Cut::TheLastWord, false, &disk.argument());
    // The source sleeps over it.
    freeze(pair.here.vm.pid());
    pair.there.is_whole();
    pair.there.vm.qmp().ask("quit");
    assert_eq!(pair.there.vm.wait_exit(20), 0, "{}", pair.there.vm.stderr());
    pair.here.vm.signal(Signal::SIGCONT);
    let doubt = wait::until(
        "the source to have asked",
        60,
        || {
            let doubt = pair.here.vm.qmp().ask("query-status")["x-in-doubt"].clone();
            doubt["asked"].is_string().then_some(doubt)
        },
        || pair.here.vm.stderr(),
    );
    assert!(doubt["disks"].as_str().unwrap_or_default().contains("written to since"), "{doubt}");
    assert_eq!(pair.here.vm.qmp().ask("query-status")["running"], false);
    pair.here.vm.qmp().ask("quit");
    assert_eq!(pair.here.vm.wait_exit(20), 0, "{}", pair.here.vm.stderr());
}

/// A destination that is frozen before it reads the order, while the guest is resumed at the source.
fn frozen() -> (Pair, Disk) {
    let disk = Disk::new();
    let freeze = |there: &Guest| Cut::BehindTheOrder { frozen: there.vm.pid() };
    let mut pair = cut(freeze, true, &disk.argument());
    pair.resumes();
    (pair, disk)
}

impl Pair {
    fn wakes_and_refuses(&mut self, words: &str) {
        self.there.vm.signal(Signal::SIGCONT);
        assert_eq!(self.there.vm.wait_exit(60), 1, "{}", self.there.vm.stderr());
        let said = self.there.vm.stderr();
        assert!(said.contains(words), "'{words}' is not in: {said}");
        assert!(!self.there.vm.serial().contains("verified"), "it ran: {}", self.there.vm.serial());
    }
}

#[test]
fn a_destination_that_wakes_too_late_finds_the_disks_taken() {
    let (mut pair, disk) = frozen();
    pair.wakes_and_refuses("in use by another virtual machine");
    pair.here.is_whole();
    pair.here.moves_after_all(MEMORY, 1, &disk.argument());
}

#[test]
fn a_destination_that_wakes_when_the_guest_has_ended_finds_the_disks_changed() {
    let (mut pair, _disk) = frozen();
    pair.here.vm.qmp().ask("quit");
    assert_eq!(pair.here.vm.wait_exit(20), 0, "{}", pair.here.vm.stderr());
    // Nobody holds them, and the guest has written nothing.
    pair.wakes_and_refuses("is not as the source left it");
}
