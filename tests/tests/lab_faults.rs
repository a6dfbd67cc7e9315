//! Chosen attacks on the migration of a stock Debian guest with a disk, a TCP session and work on all of
//! it, one after the other with the same guest: it is where it must be, and has lost nothing.

use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use system_tests::faults::case::{Action, Direction, Inside, Place, Side};
use system_tests::faults::locks::{holds, is_locked};
use system_tests::faults::relay::{Fault, Pids, Relay};
use system_tests::image::Disk;
use system_tests::linux::{Linux, Machine, Start};
use system_tests::network::Bridge;
use system_tests::wait;
use system_tests::work::{Session, check_disk};
use tempfile::TempDir;

/// `x-stall-timeout` in ms: the lab's processors are slow.
const STALL_MS: u64 = 20_000;

/// Where the guest is to be afterwards, and who is to see to that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// The hand-over was not reached.
    Stayed,
    /// The source is in doubt, and goes on by itself, since nobody has taken the disk.
    SettlesHere,
    /// The source is in doubt, and ends by itself, since the disk shows the guest at the destination.
    SettlesThere,
    /// The source is in doubt, and the operator lets the guest go on there.
    Resumed,
    /// The source is in doubt, and the operator ends this copy; he is not let do anything else.
    Discarded,
    /// The destination runs it, and nobody is left to doubt that.
    Moved,
}

impl Expected {
    fn is_here(self) -> bool {
        matches!(self, Self::Stayed | Self::SettlesHere | Self::Resumed)
    }

    /// Nobody but the operator decides.
    fn asks_the_operator(self) -> bool {
        matches!(self, Self::Resumed | Self::Discarded)
    }
}

/// What is done at the first piece of the stream of this name.
fn fault(direction: Direction, unit: &str, inside: Inside, action: Action) -> Fault {
    let place = Place::At { unit: unit.into(), nth: 0, inside };
    Fault { direction, place, action }
}

/// A guest at work, on a host with a bridge.
struct World {
    dir: TempDir,
    disk: Disk,
    taps: [&'static str; 2],
    _bridge: Bridge,
    guest: Linux,
    session: Session,
    moves: usize,
}

fn machine(disk: &Disk, tap: &str) -> Machine {
    Machine {
        args: format!("--memory 192M --smp 2 {} --net tap={tap}", disk.argument()),
        append: "guest.run=memory,disk,clock,tcp guest.ip=10.98.0.2/24".into(),
        start: Start::Vmlinux,
    }
}

/// How the migration ended for a source that may itself end at any time; nothing if it has.
fn wait_for_end(source: &mut Linux) -> Option<Value> {
    let mut qmp = source.vm.qmp();
    let state = std::cell::RefCell::new(Value::Null);
    wait::until(
        "the migration's end",
        60,
        || {
            let Ok(Ok(info)) = qmp.try_execute("query-migrate", json!({})) else {
                // It closes its socket before it ends.
                source.vm.wait_exit(20);
                return Some(None);
            };
            state.replace(info.clone());
            let status = info["status"].as_str().unwrap_or_default();
            matches!(status, "completed" | "failed" | "cancelled").then_some(Some(info))
        },
        || state.borrow().to_string(),
    )
}

impl World {
    fn new() -> Self {
        let dir = TempDir::new().expect("a directory");
        let disk = Disk::inside(dir.path(), 64 << 20);
        let taps = ["mvfault0", "mvfault1"];
        let bridge = Bridge::new("mvfaults", "10.98.0.1/24", &taps);
        let mut guest = machine(&disk, taps[0]).boot(dir.path(), "here");
        guest.assert_content();
        let session = Session::start("10.98.0.2");
        guest.wait_new("tcp-server:", 60);
        Self { dir, disk, taps, _bridge: bridge, guest, session, moves: 0 }
    }

    fn image(&self) -> &Path {
        &self.disk.path
    }

    /// The guest works on, and nothing has been lost.
    fn is_whole(&mut self) {
        let durable = self.guest.next_number("disk: record");
        let verified = self.guest.next_number("memory: generation");
        self.guest.wait_new("tcp-server:", 60);
        assert!(self.guest.next_number("disk: record") > durable, "the disk writer went on");
        assert!(self.guest.next_number("memory: generation") >= verified, "so did the memory's");
        self.session.assert_alive();
        self.guest.assert_content();
    }

    /// Migrates to a new process, through a relay that does this; all are given back when it has
    /// happened.
    fn migrate(&mut self, fault: Fault, settles: bool) -> (Linux, Relay, Pids) {
        self.moves += 1;
        let name = format!("there{}", self.moves);
        let there = machine(&self.disk, self.taps[1]).incoming(self.dir.path(), &name, "127.0.0.1");
        let stall = json!({ "x-stall-timeout": STALL_MS });
        there.vm.qmp().execute("migrate-set-parameters", stall).expect("parameters");
        let pids = Pids { source: self.guest.vm.pid(), destination: there.vm.pid() };
        let relay = Relay::new(&there.vm.migrate_uri(), Some(fault), pids);
        let mut qmp = self.guest.vm.qmp();
        // The downtime is that of `Linux::migrate_command`, for its reason.
        let parameters = json!({
            "x-stall-timeout": STALL_MS,
            "x-verify": true,
            "x-settle": settles,
            "downtime-limit": 3000,
        });
        qmp.execute("migrate-set-parameters", parameters).expect("parameters");
        qmp.execute("migrate", json!({ "uri": relay.uri() })).expect("the migration starts");
        wait::until(
            "the place of the fault",
            30,
            || relay.seen().fired,
            || {
                let (here, there) = (self.guest.vm.stderr(), there.vm.stderr());
                format!("{:?}\nthe source: {here}\nthe destination: {there}", relay.seen())
            },
        );
        (there, relay, pids)
    }

    /// The source says that it is in doubt, and has not run since.
    fn is_in_doubt(&self) {
        let mut qmp = self.guest.vm.qmp();
        wait::until(
            "the doubt",
            60,
            || qmp.ask("query-status")["x-in-doubt"].is_object().then_some(()),
            || self.guest.vm.stderr(),
        );
        assert_eq!(qmp.ask("query-status")["running"], false);
    }

    /// The operator's command; whether it was done, and what it said.
    fn recover(&self, args: &[&str]) -> (bool, String) {
        let out = self.guest.vm.cli(&[&["recover"], args].concat());
        let said = [out.stdout, out.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        println!("recover {args:?}: {said}");
        (out.status.success(), said)
    }

    fn operator(&self, there: &mut Linux, expected: Expected) {
        self.is_in_doubt();
        if expected == Expected::Resumed {
            assert_eq!(there.vm.wait_exit(60), 1, "{}", there.vm.stderr());
            let (done, said) = self.recover(&["--discard"]);
            assert!(!done && said.contains("this may be its last copy"), "{said}");
            let (done, said) = self.recover(&["--resume"]);
            assert!(done, "{said}");
            return;
        }
        // A copy that runs must be proof against this.
        let forced = json!({
            "action": "resume",
            "destination-does-not-run": true,
            "disks-may-have-changed": true,
        });
        let mut qmp = self.guest.vm.qmp();
        let refused = qmp.execute("x-recover", forced).expect_err("it runs there");
        assert!(refused.to_string().contains("in use by another"), "{refused}");
        let (done, said) = self.recover(&["--discard"]);
        assert!(done, "{said}");
    }

    fn attack(&mut self, fault: Fault, expected: Expected) {
        println!("=== {fault:?}: {expected:?}");
        let action = fault.action;
        let killed = |side| action == Action::Kill(side, 0);
        let (mut there, relay, pids) = self.migrate(fault, !expected.asks_the_operator());
        if !killed(Side::Source) {
            let info = wait_for_end(&mut self.guest);
            println!("{info:?}");
            if let Some(info) = info.filter(|info| info["status"] != "completed") {
                assert_ne!(info["error-desc"].as_str().unwrap_or_default(), "", "{info}");
            }
        }
        if expected.asks_the_operator() {
            self.operator(&mut there, expected);
        }
        if expected.is_here() {
            self.has_stayed(&mut there, &relay, pids, action);
            if expected == Expected::SettlesHere {
                let info = self.guest.vm.qmp().ask("query-migrate");
                let why = info["error-desc"].as_str().unwrap_or_default();
                assert!(why.contains("this has settled: the guest goes on here"), "{info}");
            }
        } else {
            let code = self.guest.vm.wait_exit(60);
            let said = self.guest.vm.stderr();
            assert_eq!(code, if killed(Side::Source) { -1 } else { 0 }, "{said}");
            if expected == Expected::SettlesThere {
                let words = "the guest runs at the destination, and this copy ends";
                assert!(said.contains(words), "'{words}' is not in: {said}");
            }
            self.has_moved(there, killed(Side::Source));
        }
        self.is_whole();
    }

    /// The guest goes on here, and the other process has ended, told why, and left nothing.
    fn has_stayed(&mut self, there: &mut Linux, relay: &Relay, pids: Pids, action: Action) {
        wait::until(
            "the guest to go on here",
            60,
            || (self.guest.vm.qmp().status() == "running").then_some(()),
            || self.guest.vm.stderr(),
        );
        if action == Action::Freeze(Side::Destination) {
            pids.signal(Side::Destination, Signal::SIGCONT);
        }
        relay.release();
        let code = there.vm.wait_exit(60);
        if action == Action::Kill(Side::Destination, 0) {
            assert_eq!(code, -1, "{}", there.vm.stderr());
        } else {
            assert_eq!(code, 1, "{}", there.vm.stderr());
            assert!(!there.vm.stderr().trim().is_empty(), "it says why");
            there.vm.nothing_is_left();
        }
        assert_eq!(there.text(), "", "the guest ran there as well");
        assert!(holds(self.guest.vm.pid(), self.image()), "who runs the guest holds its disk");
    }

    /// The guest goes on there, and this process, which has ended, has left nothing.
    fn has_moved(&mut self, there: Linux, killed: bool) {
        wait::until(
            "the guest to go on there",
            60,
            || (there.vm.qmp().status() == "running").then_some(()),
            || there.vm.stderr(),
        );
        self.guest.assert_calm();
        if !killed {
            self.guest.vm.nothing_is_left();
        }
        self.guest = there;
        self.taps.swap(0, 1);
        assert!(holds(self.guest.vm.pid(), self.image()), "who runs the guest holds its disk");
    }

    /// The guest powers off, and all that it called durable is on the disk.
    fn finish(mut self) {
        let durable = self.guest.next_number("disk: record");
        self.session.finish();
        self.guest.tell("poweroff -f");
        assert_eq!(self.guest.vm.wait_exit(60), 0, "{}", self.guest.vm.stderr());
        self.guest.vm.nothing_is_left();
        assert!(!is_locked(&self.disk.path), "the disk is still locked");
        check_disk(&self.disk.path, durable);
    }
}

#[test]
fn what_breaks_on_the_way_leaves_a_linux_guest_where_it_was() {
    use Direction::There;
    let mut world = World::new();
    for (unit, inside, action) in [
        ("pages", Inside::Bytes(50_000), Action::Cut),
        ("section cpu 1", Inside::Bytes(200), Action::Reset),
        ("ram end", Inside::Behind, Action::Kill(Side::Destination, 0)),
        ("section cpu", Inside::Bytes(300), Action::Corrupt(0x10)),
        ("zero pages", Inside::Before, Action::StallBoth),
    ] {
        world.attack(fault(There, unit, inside, action), Expected::Stayed);
    }
    world.finish();
}

#[test]
fn what_breaks_before_the_order_leaves_a_linux_guest_where_it_was() {
    use Direction::{Back, There};
    let mut world = World::new();
    for (direction, unit, inside, action, expected) in [
        (There, "section apic", Inside::Before, Action::Truncate, Expected::Stayed),
        (
            There,
            "description",
            Inside::Bytes(50),
            Action::Freeze(Side::Destination),
            Expected::Stayed,
        ),
        (Back, "prepared", Inside::Before, Action::Kill(Side::Destination, 0), Expected::Stayed),
        (There, "commit", Inside::Bytes(5), Action::Cut, Expected::SettlesHere),
        (There, "commit", Inside::Behind, Action::Kill(Side::Source, 0), Expected::Moved),
    ] {
        world.attack(fault(direction, unit, inside, action), expected);
    }
    world.finish();
}

#[test]
fn what_breaks_at_the_order_leaves_one_linux_guest() {
    use Direction::{Back, There};
    let mut world = World::new();
    let freeze = Action::Freeze(Side::Destination);
    for (direction, unit, inside, action, expected) in [
        (Back, "shut", Inside::Bytes(3), Action::Cut, Expected::SettlesThere),
        // It wakes up with the order before it, and finds the disk taken.
        (There, "commit", Inside::Before, freeze, Expected::SettlesHere),
        (There, "commit", Inside::Before, Action::Cut, Expected::Resumed),
        (Back, "shut", Inside::Before, Action::Cut, Expected::Discarded),
    ] {
        world.attack(fault(direction, unit, inside, action), expected);
    }
    world.dies_over_there();
}

impl World {
    /// The guest runs at the destination, which dies before it has told so: the source's copy is old,
    /// and nobody lets it run over what was written since.
    fn dies_over_there(mut self) {
        println!("=== the guest dies at the destination");
        let cut = fault(Direction::Back, "shut", Inside::Before, Action::Cut);
        let (mut there, _relay, _) = self.migrate(cut, false);
        self.is_in_doubt();
        there.next_number("disk: record");
        let durable = there.next_number("disk: record");
        there.vm.signal(Signal::SIGKILL);
        assert_eq!(there.vm.wait_exit(20), -1);
        let (done, said) = self.recover(&["--resume"]);
        assert!(!done && said.contains("written to since"), "{said}");
        self.is_in_doubt();
        self.guest.vm.qmp().ask("quit");
        assert_eq!(self.guest.vm.wait_exit(20), 0, "{}", self.guest.vm.stderr());
        self.guest.vm.nothing_is_left();
        self.guest.assert_calm();
        there.assert_calm();
        assert!(!is_locked(&self.disk.path), "the disk is still locked");
        check_disk(&self.disk.path, durable);
    }
}
