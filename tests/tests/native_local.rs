//! `migrate --local`: a guest goes to another process in its own memory, of which nothing is copied.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};
use system_tests::guest::{Guest, number};
use system_tests::image::{COMMIT, Disk};
use system_tests::qmp::Qmp;
use system_tests::vm::Vm;
use system_tests::wait;
use tempfile::TempDir;

const MEMORY: &str = "64M";
const WORK: &str = "set=16M,rate=0,verify=20000";

/// Where processes wait for each other.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::with_prefix("mini-vmm-local-").expect("a directory"))
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A process that waits there for a guest of this form.
    fn waits(&self, name: &str, memory: &str, smp: u32, more: &str) -> Guest {
        let listen = format!("--migrate-listen {}", uri(&self.socket(name)));
        Guest::start(Vm::selfcheck(memory, smp, "").args(&listen).args(more))
    }
}

fn uri(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// A guest whose memory can be given to another process.
fn shared(memory: &str, smp: u32, work: &str, more: &str) -> Guest {
    let mut guest = Guest::boot_with(memory, smp, work, &format!("--shared-memory {more}"));
    guest.wait_ready();
    guest
}

/// What the command prints and says.
fn local(here: &Guest, uri: &str, more: &[&str]) -> (bool, Value, String) {
    let args = [&["migrate", "--vm", &here.vm.name, "--local", "--json", uri], more].concat();
    let out = here.vm.cli(&args);
    let report: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
    (out.status.success(), report["report"].clone(), String::from_utf8_lossy(&out.stderr).into())
}

/// Moves it, and gives the report.
fn hands_over(here: &mut Guest, there: &Guest) -> Value {
    let (done, report, said) = local(here, &there.vm.migrate_uri(), &[]);
    let (source, destination) = (here.vm.stderr(), there.vm.stderr());
    assert!(done, "{said}\nsource: {source}\ndestination: {destination}");
    assert_eq!(here.vm.wait_exit(20), 0, "the source ends well:\n{}", here.vm.stderr());
    here.nothing_is_left();
    report
}

/// It is refused in these words before anything has happened, and the guest goes on.
fn is_refused(here: &mut Guest, uri: &str, more: &[&str], words: &str) {
    let (done, _, said) = local(here, uri, more);
    assert!(!done && said.contains(words), "'{words}' is not in: {said}");
    assert_eq!(here.vm.qmp().status(), "running");
}

#[test]
fn a_guest_goes_from_process_to_process_in_its_own_memory() {
    let place = Place::new();
    // It writes to its disk all the time, so that requests are under way whenever it stops.
    let disk = Disk::inside(place.0.path(), 64 << 20);
    let more = format!("{} --rng --balloon", disk.argument());
    let mut guest = shared(MEMORY, 2, &format!("{WORK},disk=200"), &more);
    let mut records = 0;
    // The next process need not have been told; and one that was drops what it has for it.
    for (name, more) in [("a", more.clone()), ("b", format!("{more} --shared-memory")), ("c", more)]
    {
        let mut there = place.waits(name, MEMORY, 2, &more);
        let before = guest.is_whole();
        let report = hands_over(&mut guest, &there);
        assert!(there.is_whole() > before, "time goes on");
        let line = there.ask(b"s", "up_ms=", 60);
        assert!(number(&line, "records") > records, "it goes on writing: {line}");
        assert_eq!(number(&line, "disk_errors"), 0, "{line}");
        records = number(&line, "records");
        assert_eq!(report["normal-pages"], 0, "{report}");
        let sent = report["transferred-bytes"].as_u64().expect("a number");
        assert!(sent < 1 << 20, "{report}");
        guest = there;
    }
    guest.vm.qmp().ask("quit");
    assert_eq!(guest.vm.wait_exit(20), 0, "{}", guest.vm.stderr());
}

#[test]
fn the_pause_is_no_longer_for_a_large_memory() {
    let place = Place::new();
    // The shortest of some, in ms, and what was sent: other tests take the processors at times.
    let shortest = |memory: &str| {
        let mut guest = shared(memory, 1, "set=1M,verify=0", "");
        let mut all = Vec::new();
        for name in ["1", "2", "3", "4"] {
            let there = place.waits(&format!("{memory}-{name}"), memory, 1, "");
            let report = hands_over(&mut guest, &there);
            let sent = report["transferred-bytes"].as_f64().expect("a number");
            all.push((report["downtime-ms"].as_f64().expect("a number"), sent));
            guest = there;
        }
        guest.is_whole();
        println!("{memory}: {all:?}");
        all.into_iter().reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).expect("some")
    };
    let (small, large) = (shortest("64M"), shortest("1G"));
    assert!(large.1 < small.1 * 1.1, "more was sent: {small:?}, {large:?}");
    // To copy sixteen times as much would take as many times as long.
    assert!(large.0 < small.0 * 8.0, "{small:?} ms for 64M, {large:?} ms for 1G");
}

#[test]
fn it_moves_as_usual_afterwards_with_pages_that_its_process_has_never_looked_at() {
    let place = Place::new();
    // Most of its memory it only looks at when it is told.
    let mut here = shared(MEMORY, 1, "set=1M,rate=10,verify=0", "");
    let mut there = place.waits("a", MEMORY, 1, "");
    hands_over(&mut here, &there);
    let mut private = Guest::incoming(MEMORY, 1);
    there.migrate_to(&private, true);
    private.is_whole();
    // And from there to where it can be shared again, and on.
    let mut shared = Guest::incoming_with(MEMORY, 1, "--shared-memory");
    private.migrate_to(&shared, true);
    shared.is_whole();
    let mut last = place.waits("b", MEMORY, 1, "");
    hands_over(&mut shared, &last);
    last.is_whole();
}

#[test]
fn a_guest_that_stands_still_stands_still_there() {
    let place = Place::new();
    let mut here = shared(MEMORY, 1, WORK, "");
    here.vm.qmp().ask("stop");
    let mut there = place.waits("a", MEMORY, 1, "");
    hands_over(&mut here, &there);
    assert_eq!(there.vm.qmp().status(), "paused");
    there.vm.qmp().ask("cont");
    there.is_whole();
}

#[test]
fn what_can_not_be_handed_over_says_so_at_once_and_moves_as_usual() {
    let place = Place::new();
    let mut here = Guest::ready(MEMORY, 1, WORK);
    let there = place.waits("a", MEMORY, 1, "");
    let path = there.vm.migrate_uri();
    is_refused(&mut here, &path, &[], "with --shared-memory");
    // What is asked for once is not meant for the next time.
    let out = here.vm.cli(&["migrate", "--vm", &here.vm.name, &path]);
    assert!(out.status.success(), "{out:?}");

    let mut here = shared(MEMORY, 1, WORK, "");
    let nobody = uri(&place.socket("nobody"));
    is_refused(&mut here, "tcp:127.0.0.1:1", &[], "waits at unix:PATH");
    is_refused(&mut here, "file:/tmp/vm", &[], "waits at unix:PATH");
    is_refused(&mut here, &nobody, &[], "is the destination running");
    for option in
        ["--verify", "--auto-converge", "--channels=2", "--compress=zstd", "--bandwidth=1M"]
    {
        is_refused(&mut here, &nobody, &[option], "cannot be used with");
    }
    let mut qmp = here.vm.qmp();
    for (parameters, capability) in [
        (json!({ "x-local": true, "x-verify": true }), None),
        (json!({ "x-local": true, "x-verify": false }), Some("multifd")),
        (json!({ "x-local": true }), Some("auto-converge")),
    ] {
        qmp.execute("migrate-set-parameters", parameters.clone()).expect("parameters");
        for (name, state) in
            ["multifd", "auto-converge"].map(|name| (name, capability == Some(name)))
        {
            let list = json!([{ "capability": name, "state": state }]);
            qmp.execute("migrate-set-capabilities", json!({ "capabilities": list })).expect("one");
        }
        let error = qmp.execute("migrate", json!({ "uri": nobody })).expect_err("no sense");
        assert!(error.desc.contains("can't be combined"), "{parameters} {capability:?}: {error}");
    }
}

#[test]
fn a_destination_that_is_not_alike_leaves_the_guest_here() {
    let place = Place::new();
    let mut here = shared(MEMORY, 1, WORK, "");
    for (name, memory, smp, more, words) in [
        ("a", "32M", 1, "", "--memory 64M"),
        ("b", MEMORY, 2, "", "--smp 1"),
        ("c", MEMORY, 1, "--rng", "the same devices"),
    ] {
        let mut there = place.waits(name, memory, smp, more);
        is_refused(&mut here, &there.vm.migrate_uri(), &[], words);
        // It has been told of no memory, and waits on.
        assert_eq!(there.vm.qmp().status(), "inmigrate");
        there.vm.qmp().ask("quit");
        assert_eq!(there.vm.wait_exit(20), 0, "{}", there.vm.stderr());
    }
    here.is_whole();
    let mut there = place.waits("d", MEMORY, 1, "");
    hands_over(&mut here, &there);
    there.is_whole();
}

/// The guest stands still, the destination has its memory, and nothing else has happened yet.
fn at_the_last_moment(here: &Guest, uri: &str) -> Qmp {
    let mut qmp = here.vm.qmp();
    let wait = json!([{ "capability": "pause-before-switchover", "state": true }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": wait })).expect("one");
    qmp.execute("migrate-set-parameters", json!({ "x-local": true })).expect("a parameter");
    qmp.execute("migrate", json!({ "uri": uri })).expect("it starts");
    wait::until(
        "the last moment",
        60,
        || (qmp.ask("query-migrate")["status"] == "pre-switchover").then_some(()),
        || here.vm.stderr(),
    );
    let go_on = json!([{ "capability": "pause-before-switchover", "state": false }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": go_on })).expect("one");
    qmp
}

/// The guest runs here, whole, and goes to another process after all.
fn stays_and_moves_after_all(mut here: Guest, qmp: &mut Qmp, status: &str) {
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], status, "{info}");
    wait::until(
        "the guest to go on",
        60,
        || (qmp.status() == "running").then_some(()),
        || here.vm.stderr(),
    );
    here.is_whole();
    let place = Place::new();
    let mut there = place.waits("after-all", MEMORY, 1, "");
    hands_over(&mut here, &there);
    there.is_whole();
}

#[test]
fn a_destination_that_is_killed_with_the_memory_does_it_no_harm() {
    let place = Place::new();
    let here = shared(MEMORY, 1, WORK, "");
    let there = place.waits("a", MEMORY, 1, "");
    let mut qmp = at_the_last_moment(&here, &there.vm.migrate_uri());
    there.vm.signal(Signal::SIGKILL);
    stays_and_moves_after_all(here, &mut qmp, "failed");
}

#[test]
fn a_cancel_is_heeded_and_the_destination_ends() {
    let place = Place::new();
    let here = shared(MEMORY, 1, WORK, "");
    let mut there = place.waits("a", MEMORY, 1, "");
    let mut qmp = at_the_last_moment(&here, &there.vm.migrate_uri());
    qmp.ask("migrate_cancel");
    assert_eq!(there.vm.wait_exit(60), 1, "{}", there.vm.stderr());
    stays_and_moves_after_all(here, &mut qmp, "cancelled");
}

#[test]
fn a_source_that_is_killed_ends_the_destination() {
    let place = Place::new();
    let mut here = shared(MEMORY, 1, WORK, "");
    let mut there = place.waits("a", MEMORY, 1, "");
    at_the_last_moment(&here, &there.vm.migrate_uri());
    here.vm.signal(Signal::SIGKILL);
    here.vm.wait_exit(20);
    assert_eq!(there.vm.wait_exit(60), 1, "{}", there.vm.stderr());
    assert!(there.vm.stderr().contains("broke off"), "{}", there.vm.stderr());
}

/// What a destination writes in the ledger: see `migration/src/handover/ledger.rs`.
#[derive(Clone, Copy)]
enum Entry {
    Offered = 1,
    Taken = 2,
    Runs = 3,
    Returned = 4,
    Kept = 5,
}

fn read(ledger: &File) -> u32 {
    let mut word = [0; 4];
    ledger.read_exact_at(&mut word, 0).expect("a page");
    u32::from_ne_bytes(word)
}

fn write(ledger: &File, entry: Entry) {
    ledger.write_all_at(&(entry as u32).to_ne_bytes(), 0).expect("a page");
}

/// A destination that says whatever the source wants to hear, and runs nothing.
struct Liar {
    stream: UnixStream,
    /// All that has come.
    heard: Vec<u8>,
}

impl Liar {
    /// Waits for a source, and goes along until that has said COMMIT. Gives the ledger.
    fn takes(listener: &UnixListener) -> (Self, File) {
        let (stream, _) = listener.accept().expect("a source");
        let mut liar = Self { stream, heard: Vec::new() };
        let ping = liar.hears(b"\x08\0\x02\0\x04");
        let value = liar.next(ping, 4);
        liar.says(0x4d01, r#"{"program":"a liar","protocols":[1],"abilities":["memory","fate"]}"#);
        liar.pongs(&value);
        let manifest = liar.hears(b"\x08\x4d\x01\0\x04");
        let len = u32::from_be_bytes(liar.next(manifest, 4).try_into().expect("4 bytes"));
        let manifest = liar.next(manifest + 4, len as usize);
        let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
        assert_eq!(manifest["memory"], true, "{manifest}");
        liar.says(0x4d02, r#"{"problems":[]}"#);
        let [_memory, ledger] = liar.descriptors();
        liar.hears(b"\x08\0\x02\0\x04\0\0\0\x01");
        liar.pongs(&[0, 0, 0, 1]);
        // The end, without a description.
        liar.hears(b"\0\0\0\x02{}");
        liar.says(0x4d03, "{}");
        liar.hears(COMMIT);
        let ledger = File::from(ledger);
        assert_eq!(read(&ledger), Entry::Offered as u32, "COMMIT offers the memory");
        (liar, ledger)
    }

    /// Reads until this has come, and gives where it ends.
    fn hears(&mut self, what: &[u8]) -> usize {
        loop {
            let found = self.heard.windows(what.len()).position(|window| window == what);
            if let Some(at) = found {
                return at + what.len();
            }
            self.more();
        }
    }

    fn next(&mut self, at: usize, len: usize) -> Vec<u8> {
        while self.heard.len() < at + len {
            self.more();
        }
        self.heard[at..at + len].to_vec()
    }

    fn more(&mut self) {
        let mut buf = [0; 4096];
        let n = self.stream.read(&mut buf).expect("the source");
        assert!(n > 0, "the source has hung up");
        self.heard.extend_from_slice(&buf[..n]);
    }

    fn says(&mut self, number: u16, json: &str) {
        let mut message = number.to_be_bytes().to_vec();
        message.extend([0, 4]);
        message.extend((json.len() as u32).to_be_bytes());
        message.extend(json.bytes());
        self.stream.write_all(&message).expect("the source");
    }

    fn pongs(&mut self, value: &[u8]) {
        self.stream.write_all(&[&[0, 2, 0, 4], value].concat()).expect("the source");
    }

    fn descriptors(&mut self) -> [OwnedFd; 2] {
        let (mut byte, mut space) = ([0], nix::cmsg_space!([RawFd; 2]));
        let mut parts = [IoSliceMut::new(&mut byte)];
        let from = self.stream.as_raw_fd();
        let message = recvmsg::<()>(from, &mut parts, Some(&mut space), MsgFlags::empty());
        let message = message.expect("the memory");
        let mut fds = Vec::new();
        for control in message.cmsgs().expect("all of it") {
            if let ControlMessageOwned::ScmRights(found) = control {
                // SAFETY: the kernel has just opened them for this call, and nobody else knows them.
                fds.extend(found.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        fds.try_into().expect("the memory and its ledger")
    }
}

/// Migrates to a liar, who does something with the ledger and ends.
fn lied_to(
    here: &Guest,
    place: &Place,
    does: impl FnOnce(&mut Liar, &File) + Send + 'static,
) -> (Qmp, File) {
    let path = place.socket("liar");
    let listener = UnixListener::bind(&path).expect("a socket");
    let liar = thread::spawn(move || {
        let (mut liar, ledger) = Liar::takes(&listener);
        does(&mut liar, &ledger);
        ledger
    });
    let mut qmp = here.vm.qmp();
    qmp.execute("migrate-set-parameters", json!({ "x-local": true })).expect("a parameter");
    qmp.execute("migrate", json!({ "uri": uri(&path) })).expect("it starts");
    let ledger = liar.join().expect("no panic");
    std::fs::remove_file(path).expect("the socket");
    (qmp, ledger)
}

#[test]
fn a_destination_that_dies_with_the_order_gives_the_guest_back_without_a_question() {
    let (place, here) = (Place::new(), shared(MEMORY, 1, WORK, ""));
    let (mut qmp, ledger) = lied_to(&here, &place, |_, _| {});
    let info = qmp.wait_migrated(60);
    let error = info["error-desc"].as_str().unwrap_or_default();
    assert!(!error.contains("not known whether"), "{info}");
    assert_eq!(read(&ledger), Entry::Kept as u32);
    stays_and_moves_after_all(here, &mut qmp, "failed");
}

#[test]
fn a_refusal_of_the_order_gives_the_guest_back() {
    let (place, here) = (Place::new(), shared(MEMORY, 1, WORK, ""));
    let (mut qmp, ledger) = lied_to(&here, &place, |liar, ledger| {
        write(ledger, Entry::Taken);
        write(ledger, Entry::Returned);
        liar.says(0x4d04, r#"{"reason":"no such luck"}"#);
    });
    let info = qmp.wait_migrated(60);
    let error = info["error-desc"].as_str().unwrap_or_default();
    assert!(error.contains("no such luck"), "{info}");
    assert_eq!(read(&ledger), Entry::Kept as u32);
    stays_and_moves_after_all(here, &mut qmp, "failed");
}

#[test]
fn memory_that_was_taken_is_not_taken_back_whoever_says_so() {
    let (place, here) = (Place::new(), shared(MEMORY, 1, WORK, ""));
    let (mut qmp, ledger) = lied_to(&here, &place, |liar, ledger| {
        write(ledger, Entry::Taken);
        // Not even if it says so itself.
        liar.says(0x4d04, r#"{"reason":"it is yours"}"#);
    });
    let info = qmp.wait_migrated(60);
    let error = info["error-desc"].as_str().unwrap_or_default();
    assert!(error.contains("not known whether the destination runs the guest"), "{info}");
    qmp.execute("cont", json!({})).expect_err("it may run there");
    for more in [
        &[][..],
        &["--i-know-the-destination-does-not-run"],
        &["--i-know-the-destination-does-not-run", "--even-though-the-disks-have-changed"],
    ] {
        let out = here.vm.cli(&[&["recover", "--vm", &here.vm.name, "--resume"], more].concat());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains("has taken the guest's memory"), "{said}");
    }
    let doubt = qmp.ask("query-status")["x-in-doubt"].clone();
    assert!(doubt["disks"].as_str().unwrap_or_default().contains("has taken"), "{doubt}");
    assert_ne!(qmp.status(), "running");
    // When it says where it counts that no guest has run there, it needs nobody's word.
    write(&ledger, Entry::Returned);
    stays_and_moves_after_all(here, &mut qmp, "failed");
    assert_eq!(read(&ledger), Entry::Kept as u32);
}

#[test]
fn a_guest_that_has_run_there_is_gone_whatever_became_of_it() {
    let (place, mut here) = (Place::new(), shared(MEMORY, 1, WORK, ""));
    let (mut qmp, _ledger) = lied_to(&here, &place, |_, ledger| write(ledger, Entry::Runs));
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
}

/// Holds a disk's image as a mini-vmm does in which a guest has started (`devices/src/virtio/disk.rs`).
fn hold(image: &Path) -> File {
    let file = File::options().read(true).write(true).open(image).expect("an image");
    for (l_start, l_len) in [(100, 200), (310, 1)] {
        let lock = nix::libc::flock {
            l_type: nix::libc::F_WRLCK as i16,
            l_whence: nix::libc::SEEK_SET as i16,
            l_start,
            l_len,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).expect("nobody else holds it");
    }
    file
}

#[test]
fn who_holds_the_disks_without_having_taken_the_memory_is_no_reason_to_end_the_only_copy() {
    let place = Place::new();
    let disk = Disk::inside(place.0.path(), 1 << 20);
    let mut here = shared(MEMORY, 1, WORK, &disk.argument());
    let (image, holds) = (place.0.path().join("disk.img"), mpsc::channel());
    let (mut qmp, ledger) = lied_to(&here, &place, move |_, _| {
        holds.0.send(hold(&image)).expect("somebody keeps it");
    });
    let held = holds.1.recv().expect("the disk");
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], "failed", "{info}");
    assert_eq!(read(&ledger), Entry::Kept as u32);
    let recover = |what: &str| {
        let out = here.vm.cli(&["recover", "--vm", &here.vm.name, what]);
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    for wish in ["--discard", "--resume"] {
        let (done, said) = recover(wish);
        assert!(!done, "{wish}: {said}");
    }
    let doubt = qmp.ask("query-status")["x-in-doubt"].clone();
    let disks = doubt["disks"].as_str().unwrap_or_default();
    assert!(disks.contains("memory is this side's"), "{doubt}");
    drop(held);
    let (done, said) = recover("--resume");
    assert!(done || qmp.status() == "running", "{said}");
    here.is_whole();
}
