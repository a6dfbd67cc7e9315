//! Two sides of a migration without a hypervisor: memory in vectors, devices that are structs, a guest
//! that is a thread, and a world that notices when two sides run the same VM.

mod guest;
mod memory;
mod vm;

use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::control::{Control, Events, NoEvents};
use migration::destination::{self, Failure};
use migration::params::Parameters;
use migration::phase::Phase;
use migration::source::{self, Outcome};
use migration::stats::Report;
use migration::transport::{Address, Connection, Links, Listener};
use migration::wire::ram;

pub(crate) use guest::FakeState;
pub(crate) use memory::FakeRam;
pub(crate) use vm::{FakeVm, Fault, World};

pub(crate) const MACHINE: &str = "pc-i440fx-7.2";

/// Writes a record of a page that is all zero.
pub(crate) fn zero_page(out: &mut Vec<u8>, block: Option<&str>, offset: u64) {
    ram::write_record(out, block, offset, ram::ZERO);
    out.push(0);
}

/// Long enough for a loaded machine; nothing waits for so long unless it hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Remembers what happened.
#[derive(Debug, Default, Clone)]
pub(crate) struct Recorder(pub(crate) Arc<Mutex<Vec<String>>>);

impl Events for Recorder {
    fn phase(&self, phase: Phase) {
        self.0.lock().unwrap().push(phase.to_string());
    }
    fn pass(&self, pass: u64) {
        self.0.lock().unwrap().push(format!("pass {pass}"));
    }
}

pub(crate) fn parameters() -> Parameters {
    let mut p = Parameters::default();
    p.stall_timeout = Duration::from_secs(20);
    p
}

pub(crate) fn control() -> Arc<Control> {
    Arc::new(Control::new(parameters(), Box::new(NoEvents)))
}

pub(crate) fn control_with(change: impl FnOnce(&mut Parameters)) -> Arc<Control> {
    let mut p = parameters();
    change(&mut p);
    Arc::new(Control::new(p, Box::new(NoEvents)))
}

pub(crate) fn pair() -> (Connection, Connection) {
    let (a, b) = UnixStream::pair().unwrap();
    (Connection::from_unix(a, "unix:a".into()), Connection::from_unix(b, "unix:b".into()))
}

/// The two ends of a connection over loopback.
pub(crate) fn tcp_pair() -> (Connection, Connection) {
    let listener = Listener::bind(&Address::Tcp { host: "127.0.0.1".into(), port: 0 }).unwrap();
    let a = Connection::connect(listener.address(), DEADLINE).unwrap();
    let b = listener.accept(DEADLINE).unwrap().unwrap();
    (a, b)
}

/// A source with content and a destination without, in one world.
pub(crate) fn two_vms(pages: u64) -> (FakeVm, FakeVm, Arc<World>) {
    let world = Arc::new(World::default());
    let mut source = FakeVm::new("source", &world, pages);
    source.boot();
    let destination = FakeVm::new("destination", &world, pages);
    (source, destination, world)
}

pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) arrived: Result<Box<Report>, Failure>,
    pub(crate) source: FakeVm,
    pub(crate) destination: FakeVm,
}

/// Runs both sides to their ends.
pub(crate) fn migrate(
    source: FakeVm,
    destination: FakeVm,
    connections: (impl Into<Links>, Connection),
    controls: (Arc<Control>, Arc<Control>),
) -> Ended {
    let ended = start(source, destination, connections, controls);
    ended.join()
}

pub(crate) struct Started {
    source: JoinHandle<(Outcome, FakeVm)>,
    destination: JoinHandle<(Result<Box<Report>, Failure>, FakeVm)>,
}

pub(crate) fn start(
    mut source: FakeVm,
    mut destination: FakeVm,
    (a, b): (impl Into<Links>, Connection),
    controls: (Arc<Control>, Arc<Control>),
) -> Started {
    let (source_control, destination_control) = controls;
    let there = thread::spawn(move || {
        let result = destination::run(&mut destination, b, &destination_control);
        (result, destination)
    });
    let a = a.into();
    let here = thread::spawn(move || {
        let outcome = source::run(&mut source, a, &source_control);
        (outcome, source)
    });
    Started { source: here, destination: there }
}

impl Started {
    pub(crate) fn join(self) -> Ended {
        let (outcome, source) = join(self.source);
        let (arrived, destination) = join(self.destination);
        let world = &source.world;
        assert!(!world.broken.load(Ordering::SeqCst), "both ran: {:?}", world.history);
        Ended { outcome, arrived, source, destination }
    }
}

/// Joins a thread that must end.
pub(crate) fn join<T>(thread: JoinHandle<T>) -> T {
    wait_for("a thread to end", || thread.is_finished());
    thread.join().unwrap()
}

pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < DEADLINE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until the source's write is stuck: nothing has gone out for a while.
pub(crate) fn wait_until_stuck(control: &Control) {
    let (mut before, mut since) = (0, Instant::now());
    wait_for("the way out to be full", || {
        let now = control.report().transferred_bytes;
        if now != before {
            (before, since) = (now, Instant::now());
        }
        now > 0 && since.elapsed() > Duration::from_millis(200)
    });
}

/// The source kept its guest, which runs, and says `words`.
pub(crate) fn assert_kept(ended: &Ended, words: &str) {
    let Outcome::Kept { error } = &ended.outcome else {
        panic!("expected the source to keep the guest: {:?}", ended.outcome)
    };
    let text = error.chain();
    assert!(text.contains(words), "'{words}' is not in: {text}");
    assert_eq!(ended.source.world.runs(), Some("source"));
    assert_eq!(ended.source.world.disks(), Some("source"));
    assert!(!ended.source.ram.is_logged(), "the dirty log was left on");
}

pub(crate) fn assert_moved(ended: &Ended) {
    assert!(matches!(ended.outcome, Outcome::Completed(_)), "{:?}", ended.outcome);
    assert!(ended.arrived.is_ok(), "{:?}", ended.arrived);
    assert_eq!(ended.source.world.runs(), Some("destination"));
    assert_eq!(ended.source.world.disks(), Some("destination"));
    assert!(ended.source.ram.contents() == ended.destination.ram.contents(), "RAM differs");
    for n in 0..ended.source.devices.len() {
        assert_eq!(ended.source.device(n), ended.destination.device(n));
    }
}
