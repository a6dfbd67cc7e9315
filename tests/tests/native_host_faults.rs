//! What a host may do to a guest on its way: no space, no flush, no network, no memory. One side has the
//! guest, whole, and says what was wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use system_tests::broken_disk::BrokenDisk;
use system_tests::faults::case::{Action, Direction, Inside, Place};
use system_tests::faults::relay::{Fault, Pids, Relay};
use system_tests::faults::witness::Witness;
use system_tests::guest::{Guest, number};
use system_tests::image::Disk;
use system_tests::network::{Tap, isolate};
use system_tests::vm::Vm;
use system_tests::wait;

const MEMORY: &str = "32M";
const PARAMS: &str = "fill=8M,set=2M,rate=4000,disk=100";

/// A number of the guest's own.
fn count(guest: &mut Guest, key: &str) -> u64 {
    let line = guest.ask(b"s", "up_ms=", 60);
    number(&line, key)
}

/// Returns when the guest has written more records than now.
fn writes_on(guest: &mut Guest) {
    let before = count(guest, "records");
    let start = Instant::now();
    while count(guest, "records") <= before + 2 {
        assert!(start.elapsed() < Duration::from_secs(30), "nothing more is written");
    }
}

/// The migration fails with these words, and the guest goes on here, whole.
fn stays(here: &mut Guest, uri: &str, words: &[&str]) -> Value {
    let mut qmp = here.begin(uri, &json!({ "x-verify": true, "x-stall-timeout": 5000 }));
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], "failed", "{info}");
    let why = info["error-desc"].as_str().unwrap_or_default();
    for words in words {
        assert!(why.contains(words), "'{words}' is not in: {why}");
    }
    wait::until(
        "the guest to go on here",
        20,
        || (qmp.status() == "running").then_some(()),
        || here.vm.stderr(),
    );
    here.is_whole();
    info
}

/// A way from here to there on which the first piece of this name waits until it is released.
fn held_up(here: &Guest, there: &Guest, direction: Direction, unit: &str) -> Relay {
    let place = Place::At { unit: unit.into(), nth: 0, inside: Inside::Before };
    let fault = Fault { direction, place, action: Action::Late };
    let pids = Pids { source: here.vm.pid(), destination: there.vm.pid() };
    Relay::new(&there.vm.migrate_uri(), Some(fault), pids)
}

/// The destination has ended with status 1 and these words.
fn ended(there: &mut Guest, words: &str) {
    assert_eq!(there.vm.wait_exit(60), 1, "{}", there.vm.stderr());
    assert!(there.vm.stderr().contains(words), "'{words}' is not in: {}", there.vm.stderr());
    there.nothing_is_left();
}

fn quits(guest: &mut Guest) {
    guest.vm.qmp().ask("quit");
    assert_eq!(guest.vm.wait_exit(20), 0, "{}", guest.vm.stderr());
    guest.nothing_is_left();
}

#[test]
fn a_guest_whose_disk_has_no_space_left_moves_and_goes_on_when_there_is_some() {
    let dir = tempfile::tempdir().unwrap();
    unshare(CloneFlags::CLONE_NEWNS).expect("a namespace, which root may have");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .expect("a mount of our own");
    let small = Some("size=256k");
    mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), small).expect("a tmpfs");
    // What is not written to takes no space.
    let image = Disk::inside(dir.path(), 1 << 20);
    fs::write(dir.path().join("filler"), vec![1; 200 << 10]).unwrap();
    let witness = Witness::new(&image.path);
    let mut here = Guest::boot_with(MEMORY, 1, PARAMS, &image.argument());
    here.wait_ready();
    wait::until(
        "the disk to be full",
        120,
        || (count(&mut here, "disk_errors") > 3).then_some(()),
        || "",
    );
    let mut there = Guest::incoming_with(MEMORY, 1, &image.argument());
    here.migrate_to(&there, true);
    here.nothing_is_left();
    assert!(here.vm.stderr().contains("No space left"), "{}", here.vm.stderr());
    let errors = count(&mut there, "disk_errors");
    wait::until(
        "the disk to be full there",
        60,
        || (count(&mut there, "disk_errors") > errors).then_some(()),
        || "",
    );
    fs::remove_file(dir.path().join("filler")).unwrap();
    writes_on(&mut there);
    there.is_whole();
    quits(&mut there);
    assert!(witness.testify().unwrap() > 10);
}

/// A guest whose process has such a disk.
fn over(disk: &BrokenDisk, image: &Disk) -> Guest {
    let mut vm = Vm::selfcheck(MEMORY, 1, PARAMS).args(&image.argument());
    for (name, value) in disk.environment() {
        vm = vm.env(name, value);
    }
    let mut guest = Guest::start(vm);
    guest.wait_ready();
    guest
}

#[test]
fn a_disk_that_cannot_be_flushed_keeps_the_guest_where_its_data_is() {
    let dir = tempfile::tempdir().unwrap();
    let image = Disk::inside(dir.path(), 1 << 20);
    let disk = BrokenDisk::new(dir.path());
    let witness = Witness::new(&image.path);
    let mut here = over(&disk, &image);
    witness.wait_for_more_than(10);
    disk.set(true);
    let mut there = Guest::incoming_with(MEMORY, 1, &image.argument());
    let words = ["could not be flushed", "Input/output error"];
    stays(&mut here, &there.vm.migrate_uri(), &words);
    ended(&mut there, "could not be flushed");
    // The guest was told of its own flushes as well, and tries them again.
    assert!(count(&mut here, "disk_errors") > 0);
    disk.set(false);
    writes_on(&mut here);
    here.moves_after_all(MEMORY, 1, &image.argument());
    assert!(witness.testify().unwrap() > 10);
}

/// All was brought to the disk when the guest stopped, and nothing is left that could fail.
#[test]
fn a_disk_that_fails_after_the_last_flush_holds_no_guest_back() {
    let dir = tempfile::tempdir().unwrap();
    let image = Disk::inside(dir.path(), 1 << 20);
    let disk = BrokenDisk::new(dir.path());
    let witness = Witness::new(&image.path);
    let mut here = over(&disk, &image);
    witness.wait_for_more_than(10);
    let mut there = Guest::incoming_with(MEMORY, 1, &image.argument());
    // The destination is ready, and the source does not know it yet.
    let relay = held_up(&here, &there, Direction::Back, "prepared");
    let mut qmp = here.begin(&relay.uri(), &json!({ "x-stall-timeout": 30_000, "x-verify": true }));
    wait::until("PREPARED", 30, || relay.seen().fired, || here.vm.stderr());
    disk.set(true);
    relay.release();
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
    here.nothing_is_left();
    there.is_whole();
    writes_on(&mut there);
    quits(&mut there);
    assert!(witness.testify().unwrap() > 10);
}

/// How long a process has used a processor.
fn used(guest: &Guest) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", guest.vm.pid())).unwrap();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    // proc(5): user and system time are fields 14 and 15, counted from 1; two are cut off. Ticks are of
    // 10 ms wherever Linux runs on x86.
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(10 * ticks)
}

#[test]
fn a_tap_that_vanishes_takes_the_network_and_nothing_else() {
    isolate();
    let with = |tap: &Tap| format!("--net tap={},mac=52:54:00:aa:bb:cc", tap.name());
    let (old, new) = (Tap::up("gone0"), Tap::up("gone1"));
    let mut here =
        Guest::boot_with(MEMORY, 1, "fill=8M,set=0,verify=0,hz=10,every=100000", &with(&old));
    here.wait_ready();
    drop(old);
    here.is_whole();
    // Nobody looks at a dead tap again and again.
    let (start, before) = (Instant::now(), used(&here));
    here.ask(b"s", "up_ms=", 60);
    std::thread::sleep(Duration::from_secs(2));
    let (busy, passed) = (used(&here) - before, start.elapsed());
    assert!(busy < passed / 2, "{busy:?} of {passed:?}");

    // A destination whose tap is gone before it is asked is no destination.
    let mut there = Guest::incoming_with(MEMORY, 1, &with(&new));
    drop(new);
    stays(&mut here, &there.vm.migrate_uri(), &["gone1"]);
    there.vm.qmp().ask("quit");
    there.vm.wait_exit(20);
    there.nothing_is_left();

    // Nor is one that loses it at the last moment.
    let new = Tap::up("gone2");
    let mut there = Guest::incoming_with(MEMORY, 1, &with(&new));
    let relay = held_up(&here, &there, Direction::There, "commit");
    let mut qmp = here.begin(&relay.uri(), &json!({ "x-stall-timeout": 30_000 }));
    wait::until("COMMIT", 30, || relay.seen().fired, || here.vm.stderr());
    drop(new);
    relay.release();
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], "failed", "{info}");
    wait::until(
        "the guest to go on here",
        20,
        || (qmp.status() == "running").then_some(()),
        || here.vm.stderr(),
    );
    here.is_whole();
    ended(&mut there, "gone2");
    assert!(there.line.text().is_empty(), "it ran there: {}", there.line.text());

    // To one that has its tap it moves, and has a network again.
    let new = Tap::up("gone3");
    here.moves_after_all(MEMORY, 1, &with(&new));
}

/// A control group for memory, of either version, that is removed when this is dropped.
struct MemoryGroup {
    path: PathBuf,
    limit: &'static str,
}

impl MemoryGroup {
    fn new() -> Self {
        let name = format!("mini-vmm-test-{}", std::process::id());
        let (root, limit) = match Path::new("/sys/fs/cgroup/memory").is_dir() {
            true => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            false => {
                // It may be on already.
                let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
                ("/sys/fs/cgroup", "memory.max")
            }
        };
        let path = Path::new(root).join(name);
        fs::create_dir(&path).expect("a control group, which root may make");
        Self { path, limit }
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.path.join(file), text).unwrap_or_else(|e| panic!("{file}: {e}"));
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

#[test]
fn a_destination_without_memory_half_way_dies_and_the_guest_does_not() {
    const MEMORY: &str = "128M";
    let dir = tempfile::tempdir().unwrap();
    let image = Disk::inside(dir.path(), 1 << 20);
    let witness = Witness::new(&image.path);
    let params = "fill=96M,set=2M,rate=4000,disk=100";
    let mut here = Guest::boot_with(MEMORY, 1, params, &image.argument());
    here.wait_ready();
    witness.wait_for_more_than(10);
    let group = MemoryGroup::new();
    let mut there = Guest::incoming_with(MEMORY, 1, &image.argument());
    // The first bytes of RAM are late, so that the destination has agreed by then.
    let relay = held_up(&here, &there, Direction::There, "ram part");
    let mut qmp = here.begin(&relay.uri(), &json!({ "x-stall-timeout": 30_000 }));
    wait::until("RAM", 30, || relay.seen().fired, || here.vm.stderr());
    // Room for half of it.
    group.write("cgroup.procs", &there.vm.pid().to_string());
    group.write(group.limit, &(48 << 20).to_string());
    relay.release();
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], "failed", "{info}");
    assert!(!info["error-desc"].as_str().unwrap_or_default().is_empty(), "{info}");
    assert!(relay.seen().there.iter().any(|(name, pages)| name == "pages" && *pages > 3));
    assert_eq!(there.vm.wait_exit(60), -1, "the host kills it: {}", there.vm.stderr());
    assert!(there.line.text().is_empty(), "it ran there: {}", there.line.text());
    assert_eq!(qmp.status(), "running");
    here.is_whole();
    writes_on(&mut here);
    here.moves_after_all(MEMORY, 1, &image.argument());
    assert!(witness.testify().unwrap() > 10);
}
