//! A TCP relay that passes a migration on piece by piece, and does it harm at one place.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use socket2::SockRef;

use super::case::{Action, Direction, Inside, Map, Place, Side};
use super::units::{Splitter, Unit};

/// How often a thread that waits looks whether that is still wanted.
const STEP: Duration = Duration::from_millis(10);

/// What the relay does, and where.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Whose bytes are meant.
    pub direction: Direction,
    /// Where in them.
    pub place: Place,
    /// What.
    pub action: Action,
}

/// The two processes, which are this one's children.
#[derive(Debug, Clone, Copy)]
pub struct Pids {
    /// The source.
    pub source: Pid,
    /// The destination.
    pub destination: Pid,
}

impl Pids {
    fn of(self, side: Side) -> Pid {
        match side {
            Side::Source => self.source,
            Side::Destination => self.destination,
        }
    }

    /// Sends a signal to a process that is still our child.
    pub fn signal(self, side: Side, signal: Signal) {
        let pid = self.of(side);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let parent =
            status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
        if parent == Some(std::process::id()) {
            let _ = kill(pid, signal);
        }
    }
}

/// What has happened.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// When the fault was done.
    pub fired: Option<Instant>,
    /// The piece at which it was done.
    pub at: String,
    /// How often each piece has come, by its name, from the source and back.
    pub there: Vec<(String, u64)>,
    /// The same, back.
    pub back: Vec<(String, u64)>,
}

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Seen>,
    /// Nothing passes any more in either direction.
    halted: AtomicBool,
    /// What is late may go on.
    released: AtomicBool,
    /// Both connections are to be dropped.
    over: AtomicBool,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

/// The relay, for one connection.
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

impl Relay {
    /// Passes one connection on to `target` (`tcp:…`), with this fault.
    pub fn new(target: &str, fault: Option<Fault>, pids: Pids) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let target = target.strip_prefix("tcp:").unwrap_or(target).to_string();
        let shared = Arc::new(Shared::default());
        let of_worker = shared.clone();
        let worker = thread::spawn(move || {
            let (near, _) = listener.accept().expect("somebody connects");
            let Ok(far) = TcpStream::connect(target) else { return };
            for stream in [&near, &far] {
                let _ = stream.set_nodelay(true);
                stream.set_read_timeout(Some(STEP)).expect("a read timeout");
                stream.set_write_timeout(Some(STEP)).expect("a write timeout");
            }
            let pump = |direction| {
                let fault = fault.clone().filter(|f| f.direction == direction);
                Pump::new(of_worker.clone(), direction, fault, pids)
            };
            let (there, back) = (pump(Direction::There), pump(Direction::Back));
            thread::scope(|scope| {
                scope.spawn(|| back.run(&far, &near));
                there.run(&near, &far);
            });
        });
        Self { address, shared, worker: Some(worker) }
    }

    /// The URI to migrate to.
    pub fn uri(&self) -> String {
        format!("tcp:{}", self.address)
    }

    /// What has happened so far.
    pub fn seen(&self) -> Seen {
        self.shared.seen().clone()
    }

    /// The names of what has passed, each once.
    pub fn map(&self) -> Map {
        let seen = self.shared.seen();
        let names = |all: &[(String, u64)]| all.iter().map(|(name, _)| name.clone()).collect();
        Map { there: names(&seen.there), back: names(&seen.back) }
    }

    /// What is late may go on.
    pub fn release(&self) {
        self.shared.released.store(true, Ordering::Release);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        // Wakes one that nobody has connected to.
        let _ = TcpStream::connect(self.address);
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

/// What becomes of a connection's direction after a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    GoOn,
    /// All further bytes are thrown away.
    Discard,
    /// The sender has died: its bytes end here.
    End,
    /// The connection is gone.
    Gone,
}

struct Pump {
    shared: Arc<Shared>,
    direction: Direction,
    fault: Option<Fault>,
    pids: Pids,
    splitter: Splitter,
    counts: BTreeMap<String, u64>,
    /// Bytes in front of the next piece.
    passed: u64,
}

impl Pump {
    fn new(shared: Arc<Shared>, direction: Direction, fault: Option<Fault>, pids: Pids) -> Self {
        let there = direction == Direction::There;
        let splitter = if there { Splitter::there() } else { Splitter::back() };
        Self { shared, direction, fault, pids, splitter, counts: BTreeMap::new(), passed: 0 }
    }

    fn run(mut self, mut from: &TcpStream, to: &TcpStream) {
        let mut buf = vec![0; 64 << 10];
        let mut after = After::GoOn;
        while !self.shared.is_over() {
            match from.read(&mut buf) {
                Ok(0) => {
                    let rest = self.splitter.rest();
                    if after == After::GoOn {
                        self.write(to, &rest);
                        let _ = to.shutdown(Shutdown::Write);
                    }
                    return;
                }
                Ok(n) if after == After::GoOn => {
                    after = self.pass(&buf[..n], from, to);
                    match after {
                        After::Gone => return,
                        After::Discard | After::End => {
                            let _ = to.shutdown(Shutdown::Write);
                        }
                        After::GoOn => {}
                    }
                }
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => {
                    let _ = to.shutdown(Shutdown::Both);
                    return;
                }
            }
        }
    }

    /// Passes on what is complete.
    fn pass(&mut self, bytes: &[u8], from: &TcpStream, to: &TcpStream) -> After {
        let mut out = Vec::new();
        for mut unit in self.splitter.push(bytes) {
            let Some(inside) = self.due(&unit) else {
                out.extend_from_slice(&unit.bytes);
                continue;
            };
            let action = self.fault.take().map(|fault| fault.action);
            if let Some(Action::Corrupt(xor)) = action {
                let at = inside.min(unit.bytes.len() - 1);
                unit.bytes[at] ^= xor;
                self.note(&unit);
                out.extend_from_slice(&unit.bytes);
                continue;
            }
            out.extend_from_slice(&unit.bytes[..inside]);
            self.write(to, &out);
            out.clear();
            self.note(&unit);
            match self.act(action, from, to) {
                After::GoOn => out.extend_from_slice(&unit.bytes[inside..]),
                after => return after,
            }
        }
        while self.shared.halted.load(Ordering::Acquire) {
            if self.shared.is_over() {
                return After::Gone;
            }
            thread::sleep(STEP);
        }
        if self.write(to, &out) {
            return After::GoOn;
        }
        let _ = from.shutdown(Shutdown::Both);
        After::Gone
    }

    /// Counts a piece, and says behind how many of its bytes the fault is due.
    fn due(&mut self, unit: &Unit) -> Option<usize> {
        let count = self.counts.entry(unit.name.clone()).or_default();
        let nth = *count;
        *count += 1;
        let begin = self.passed;
        self.passed += unit.bytes.len() as u64;
        let mut seen = self.shared.seen();
        let there = self.direction == Direction::There;
        let list = if there { &mut seen.there } else { &mut seen.back };
        match list.iter_mut().find(|(name, _)| *name == unit.name) {
            Some((_, n)) => *n += 1,
            None => list.push((unit.name.clone(), 1)),
        }
        drop(seen);
        let len = unit.bytes.len();
        match &self.fault.as_ref()?.place {
            Place::Byte(n) => (begin..begin + len as u64).contains(n).then(|| (n - begin) as usize),
            Place::At { unit: name, nth: wanted, inside } => (*name == unit.name && *wanted == nth)
                .then(|| match inside {
                    Inside::Before => 0,
                    Inside::Bytes(n) => 1 + (n % (len as u64 - 1).max(1)) as usize,
                    Inside::Behind => len,
                }),
        }
    }

    fn note(&self, unit: &Unit) {
        let mut seen = self.shared.seen();
        seen.fired = Some(Instant::now());
        seen.at = unit.name.clone();
    }

    fn act(&self, action: Option<Action>, from: &TcpStream, to: &TcpStream) -> After {
        let wait = |until: &dyn Fn() -> bool| {
            while !until() {
                if self.shared.is_over() {
                    return After::Gone;
                }
                thread::sleep(STEP);
            }
            After::GoOn
        };
        let here = match self.direction {
            Direction::There => Side::Source,
            Direction::Back => Side::Destination,
        };
        match action {
            None | Some(Action::Corrupt(_)) => After::GoOn,
            Some(Action::Cut) => {
                for stream in [from, to] {
                    let _ = stream.shutdown(Shutdown::Both);
                }
                After::Gone
            }
            Some(Action::Reset) => {
                for stream in [from, to] {
                    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
                }
                // Closed when both threads have let go of them.
                self.shared.over.store(true, Ordering::Release);
                After::Gone
            }
            Some(Action::Truncate) => After::Discard,
            Some(Action::Stall) => wait(&|| false),
            Some(Action::StallBoth) => {
                self.shared.halted.store(true, Ordering::Release);
                wait(&|| false)
            }
            Some(Action::Late) => wait(&|| self.shared.released.load(Ordering::Acquire)),
            Some(Action::Delay(ms)) => {
                let end = Instant::now() + Duration::from_millis(ms);
                wait(&|| Instant::now() >= end)
            }
            Some(Action::Kill(side, ms)) if ms > 0 => {
                let pids = self.pids;
                thread::spawn(move || {
                    thread::sleep(Duration::from_millis(ms));
                    pids.signal(side, Signal::SIGKILL);
                });
                After::GoOn
            }
            Some(Action::Kill(side, _)) => {
                self.pids.signal(side, Signal::SIGKILL);
                if side == here { After::End } else { After::GoOn }
            }
            Some(Action::Freeze(side)) => {
                self.pids.signal(side, Signal::SIGSTOP);
                After::GoOn
            }
        }
    }

    /// Writes, unless the case is over; `false` when nobody takes it.
    fn write(&self, mut to: &TcpStream, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            match to.write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if self.shared.is_over() {
                        return false;
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }
}
