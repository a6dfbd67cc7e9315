//! A VM without a hypervisor: memory in vectors, devices that are structs, a guest that is a
//! thread, and a world that notices when two sides run the same VM.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::control::{Control, Events, NoEvents};
use migration::destination::{self, Failure};
use migration::dirty::DirtyBitmap;
use migration::guest::{
    DestinationVm, DirtyTracker, GuestRam, IoPart, Machine, PAGE_SIZE, RamBlock, ReadPart,
    SourceVm, VmError,
};
use migration::manifest::Problem;
use migration::params::Parameters;
use migration::phase::Phase;
use migration::source::{self, Outcome};
use migration::stats::Report;
use migration::transport::Connection;
use migration::vmstate::{
    Audience, FieldError, Migratable, Section, SectionId, SectionOf, VmState,
};
use serde::{Deserialize, Serialize};

pub(crate) const MACHINE: &str = "pc-i440fx-7.2";

/// Long enough for a loaded machine; nothing waits for so long unless it hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

// --- memory -----------------------------------------------------------------------------------

pub(crate) struct FakeRam {
    blocks: Mutex<Vec<RamBlock>>,
    data: Mutex<Vec<Vec<u8>>>,
    /// The log; `None` while nobody asks for it.
    log: Mutex<Option<DirtyBitmap>>,
    /// Pages that the guest writes just after the first clear of a block's log, and just before the
    /// second.
    pub(crate) ambush: Option<(u64, u64)>,
    clears: AtomicU64,
}

impl FakeRam {
    pub(crate) fn new(blocks: &[(&str, u64)]) -> Arc<Self> {
        Self::with_ambush(blocks, None)
    }

    pub(crate) fn with_ambush(blocks: &[(&str, u64)], ambush: Option<(u64, u64)>) -> Arc<Self> {
        let blocks: Vec<_> = blocks
            .iter()
            .map(|(name, pages)| RamBlock { name: (*name).into(), len: pages * PAGE_SIZE })
            .collect();
        let data = blocks.iter().map(|b| vec![0; b.len as usize]).collect();
        Arc::new(Self {
            blocks: Mutex::new(blocks),
            data: Mutex::new(data),
            log: Mutex::new(None),
            ambush,
            clears: AtomicU64::new(0),
        })
    }

    /// A write by the guest or a device: into memory, then into the log.
    pub(crate) fn write(&self, block: usize, offset: u64, bytes: &[u8]) {
        let at = offset as usize;
        self.data.lock().unwrap()[block][at..at + bytes.len()].copy_from_slice(bytes);
        if let Some(log) = &mut *self.log.lock().unwrap() {
            for page in offset / PAGE_SIZE..=(offset + bytes.len() as u64 - 1) / PAGE_SIZE {
                log.set(block, page);
            }
        }
    }

    pub(crate) fn contents(&self) -> Vec<Vec<u8>> {
        self.data.lock().unwrap().clone()
    }

    fn check(&self, block: usize, offset: u64, len: u64) -> io::Result<()> {
        let inside = self
            .blocks
            .lock()
            .unwrap()
            .get(block)
            .is_some_and(|b| offset.checked_add(len).is_some_and(|end| end <= b.len));
        if inside { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

impl GuestRam for FakeRam {
    fn blocks(&self) -> Vec<RamBlock> {
        self.blocks.lock().unwrap().clone()
    }

    fn write_parts(
        &self,
        out: BorrowedFd<'_>,
        parts: &[IoPart<'_>],
        full: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut all = Vec::new();
        for part in parts {
            match *part {
                IoPart::Bytes(bytes) => all.extend_from_slice(bytes),
                IoPart::Ram { block, offset, len } => {
                    self.check(block, offset, len as u64)?;
                    let at = offset as usize;
                    all.extend_from_slice(&self.data.lock().unwrap()[block][at..at + len]);
                }
            }
        }
        let mut rest = &all[..];
        while !rest.is_empty() {
            match nix::unistd::write(out, rest) {
                Ok(n) => rest = &rest[n..],
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => full()?,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn read_parts(&self, from: BorrowedFd<'_>, parts: &mut [ReadPart<'_>]) -> io::Result<usize> {
        let len = |p: &ReadPart<'_>| match p {
            ReadPart::Bytes(b) => b.len(),
            ReadPart::Ram { len, .. } => *len,
        };
        let mut all = vec![0; parts.iter().map(len).sum()];
        let n = loop {
            match nix::unistd::read(from, &mut all) {
                Err(nix::Error::EINTR) => {}
                other => break other?,
            }
        };
        let mut rest = &all[..n];
        for part in parts {
            let (head, tail) = rest.split_at(len(part).min(rest.len()));
            match part {
                ReadPart::Bytes(b) => b[..head.len()].copy_from_slice(head),
                ReadPart::Ram { block, offset, len } => {
                    self.check(*block, *offset, *len as u64)?;
                    self.copy_in(*block, *offset, head)?;
                }
            }
            rest = tail;
        }
        Ok(n)
    }

    fn copy_in(&self, block: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check(block, offset, bytes.len() as u64)?;
        let at = offset as usize;
        self.data.lock().unwrap()[block][at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn copy_out(&self, block: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(block, offset, buf.len() as u64)?;
        let at = offset as usize;
        buf.copy_from_slice(&self.data.lock().unwrap()[block][at..at + buf.len()]);
        Ok(())
    }

    fn fill(&self, block: usize, offset: u64, len: u64, byte: u8) -> io::Result<()> {
        self.check(block, offset, len)?;
        let at = offset as usize;
        self.data.lock().unwrap()[block][at..at + len as usize].fill(byte);
        Ok(())
    }

    fn populate(&self, _block: usize, _offset: u64, _len: u64) {}

    fn is_zero(&self, block: usize, offset: u64) -> bool {
        let at = offset as usize;
        self.data.lock().unwrap()[block][at..at + PAGE_SIZE as usize].iter().all(|b| *b == 0)
    }
}

struct FakeLog(Arc<FakeRam>);

impl DirtyTracker for FakeLog {
    fn start(&mut self) -> Result<(), VmError> {
        *self.0.log.lock().unwrap() = Some(DirtyBitmap::new(&self.0.blocks()));
        Ok(())
    }
    // As KVM does it with manual protection: reading the log does not clear it.
    fn fetch(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        let log = self.0.log.lock().unwrap();
        let log = log.as_ref().ok_or_else(|| VmError::new("the log is not started"))?;
        for (index, block) in self.0.blocks().iter().enumerate() {
            for page in 0..block.len / PAGE_SIZE {
                if log.is_set(index, page) {
                    into.set(index, page);
                }
            }
        }
        Ok(())
    }
    fn clear(&mut self, block: usize, first_page: u64, bits: &[u64]) -> Result<(), VmError> {
        assert_eq!(first_page % 64, 0);
        let nth = if block == 0 { self.0.clears.fetch_add(1, Ordering::SeqCst) + 1 } else { 0 };
        let strike = |page| self.0.write(0, page * PAGE_SIZE + 50, b"in between");
        if let (Some((_, before)), 2) = (self.0.ambush, nth) {
            strike(before);
        }
        let mut guard = self.0.log.lock().unwrap();
        let log = guard.as_mut().ok_or_else(|| VmError::new("the log is not started"))?;
        let end = (first_page + bits.len() as u64 * 64).min(log.pages(block));
        if let Some(was) = log.take(block, first_page..end) {
            let stays: Vec<u64> = was.iter().zip(bits).map(|(was, bit)| was & !bit).collect();
            log.or(block, first_page, &stays);
        }
        drop(guard);
        if let (Some((after, _)), 1) = (self.0.ambush, nth) {
            strike(after);
        }
        Ok(())
    }
    fn stop(&mut self) {
        assert!(self.0.log.lock().unwrap().take().is_some(), "stopped without a start");
    }
}

// --- devices ----------------------------------------------------------------------------------

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FakeState {
    pub(crate) counter: u64,
    pub(crate) mode: u8,
    pub(crate) regs: [u32; 4],
}

impl VmState for FakeState {
    const VERSION: u32 = 3;
    const MIN_VERSION: u32 = 2;
}

#[derive(Debug, Default)]
pub(crate) struct FakeDevice {
    pub(crate) state: FakeState,
    /// What happens to the state when it is restored, for a device with a defect.
    pub(crate) forgetful: bool,
}

impl Migratable for FakeDevice {
    type State = FakeState;
    fn save(&self, _: Audience) -> Result<FakeState, FieldError> {
        Ok(self.state.clone())
    }
    fn check(&self, state: &FakeState) -> Result<(), FieldError> {
        if state.mode > 7 { Err(FieldError::new("mode", "0 to 7", state.mode)) } else { Ok(()) }
    }
    fn restore(&mut self, state: FakeState) -> Result<(), FieldError> {
        self.state = state;
        if self.forgetful {
            self.state.regs[2] = 0;
        }
        Ok(())
    }
}

/// A device of the same version with another layout.
#[derive(Debug)]
struct OtherDevice;

#[derive(Debug, Serialize, Deserialize)]
struct OtherState {
    counter: u32,
}

impl VmState for OtherState {
    const VERSION: u32 = FakeState::VERSION;
    const MIN_VERSION: u32 = FakeState::MIN_VERSION;
}

impl Migratable for OtherDevice {
    type State = OtherState;
    fn save(&self, _: Audience) -> Result<OtherState, FieldError> {
        Ok(OtherState { counter: 0 })
    }
    fn check(&self, _: &OtherState) -> Result<(), FieldError> {
        Ok(())
    }
    fn restore(&mut self, _: OtherState) -> Result<(), FieldError> {
        Ok(())
    }
}

// --- the world that both VMs live in ----------------------------------------------------------

/// Who runs and who has the disks. Panics when both do.
#[derive(Debug, Default)]
pub(crate) struct World {
    running: Mutex<Option<&'static str>>,
    disks: Mutex<Option<&'static str>>,
    pub(crate) history: Mutex<Vec<String>>,
    /// Set when the rule was broken, so that a panic on another thread is not overlooked.
    pub(crate) broken: AtomicBool,
}

impl World {
    pub(crate) fn note(&self, what: impl Into<String>) {
        self.history.lock().unwrap().push(what.into());
    }
    pub(crate) fn runs(&self) -> Option<&'static str> {
        *self.running.lock().unwrap()
    }
    pub(crate) fn disks(&self) -> Option<&'static str> {
        *self.disks.lock().unwrap()
    }
    fn run(&self, who: &'static str) {
        let mut running = self.running.lock().unwrap();
        if running.is_some() || self.disks() != Some(who) {
            self.broken.store(true, Ordering::SeqCst);
        }
        *running = Some(who);
        drop(running);
        self.note(format!("{who} runs"));
    }
    fn stand(&self, who: &'static str) {
        let mut running = self.running.lock().unwrap();
        if *running == Some(who) {
            *running = None;
        }
    }
    fn take_disks(&self, who: &'static str) -> Result<(), VmError> {
        let mut disks = self.disks.lock().unwrap();
        match *disks {
            None => {
                *disks = Some(who);
                Ok(())
            }
            Some(other) => Err(VmError::new(format!("disk0.raw is locked by {other}"))),
        }
    }
    fn drop_disks(&self, who: &'static str) {
        let mut disks = self.disks.lock().unwrap();
        if *disks == Some(who) {
            *disks = None;
        }
    }
}

/// What goes wrong in a VM, for tests of failures.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    #[default]
    None,
    Pause,
    Drain,
    ReleaseDisks,
    ReacquireDisks,
    Resume,
    Prepare,
    TakeDisks,
    Start,
}

pub(crate) struct FakeVm {
    pub(crate) who: &'static str,
    pub(crate) machine: String,
    pub(crate) vcpus: u32,
    pub(crate) ram: Arc<FakeRam>,
    pub(crate) devices: Vec<(SectionId, Arc<Mutex<FakeDevice>>)>,
    pub(crate) world: Arc<World>,
    pub(crate) fault: Fault,
    pub(crate) details: serde_json::Value,
    pub(crate) blockers: Vec<String>,
    pub(crate) was_running: bool,
    /// Blocks that it takes although it has not got them.
    pub(crate) keeps: Vec<String>,
    /// The first device's layout is one that nobody else knows.
    pub(crate) other_layout: bool,
    guest: Option<Guest>,
}

impl FakeVm {
    pub(crate) fn new(who: &'static str, world: &Arc<World>, pages: u64) -> Self {
        let names = [("cpu", 0), ("cpu", 1), ("0000:00:02.0/virtio-net", 0)];
        Self {
            who,
            machine: MACHINE.into(),
            vcpus: 2,
            ram: FakeRam::new(&[("pc.ram", pages), ("pc.bios", 3)]),
            devices: names
                .iter()
                .map(|(name, n)| (SectionId::new(*name, *n), Arc::default()))
                .collect(),
            world: world.clone(),
            fault: Fault::None,
            details: serde_json::json!({ "slots": [2] }),
            blockers: Vec::new(),
            was_running: true,
            keeps: Vec::new(),
            other_layout: false,
            guest: None,
        }
    }

    /// Gives every page and device a content of its own, and lets it run.
    pub(crate) fn boot(&mut self) {
        for (index, block) in self.ram.blocks().iter().enumerate() {
            // Every third page stays zero.
            for page in (0..block.len / PAGE_SIZE).filter(|p| p % 3 != 1) {
                let byte = (page * 7 + index as u64 + 1) as u8 | 1;
                self.ram.write(index, page * PAGE_SIZE, &[byte; PAGE_SIZE as usize]);
            }
        }
        for (n, (_, device)) in self.devices.iter().enumerate() {
            let n = n as u64;
            device.lock().unwrap().state = FakeState {
                counter: 0x1122_3344_5566_7700 + n,
                mode: n as u8 + 1,
                regs: [1, 2, 3, 4].map(|r| r * 0x0101_0101 + n as u32),
            };
        }
        self.world.take_disks(self.who).unwrap();
        self.world.run(self.who);
    }

    /// Starts a guest that rewrites the first `pages` pages as fast as it is let.
    pub(crate) fn dirty(&mut self, pages: u64, pause_us: u64) {
        let count = Arc::new(AtomicU64::new(0));
        self.guest = Some(Guest::new(self.ram.clone(), pages, pause_us, count.clone()));
        wait_for("the guest to write", || count.load(Ordering::Relaxed) > pages);
    }

    pub(crate) fn device(&self, n: usize) -> FakeState {
        self.devices[n].1.lock().unwrap().state.clone()
    }

    fn fault(&self, at: Fault) -> Result<(), VmError> {
        if self.fault == at {
            return Err(VmError::with(format!("{at:?} was told to fail"), "the reason behind it"));
        }
        Ok(())
    }
}

impl Machine for FakeVm {
    fn machine_type(&self) -> String {
        self.machine.clone()
    }
    fn vcpus(&self) -> u32 {
        self.vcpus
    }
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.ram.clone()
    }
    fn sections(&self) -> Vec<Box<dyn Section>> {
        let mut sections: Vec<Box<dyn Section>> = self
            .devices
            .iter()
            .map(|(id, d)| Box::new(SectionOf::new(id.clone(), d.clone())) as Box<dyn Section>)
            .collect();
        if self.other_layout {
            sections[0] = Box::new(SectionOf::<OtherDevice>::new(
                self.devices[0].0.clone(),
                Arc::new(Mutex::new(OtherDevice)),
            ));
        }
        sections
    }
    fn details(&self) -> serde_json::Value {
        self.details.clone()
    }
}

impl SourceVm for FakeVm {
    fn prepare_for_qemu(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn blockers(&self) -> Vec<String> {
        self.blockers.clone()
    }
    fn dirty_tracker(&mut self) -> Result<Box<dyn DirtyTracker>, VmError> {
        Ok(Box::new(FakeLog(self.ram.clone())))
    }
    fn pause(&mut self) -> Result<(), VmError> {
        self.fault(Fault::Pause)?;
        if let Some(guest) = &self.guest {
            guest.set_running(false);
        }
        self.world.stand(self.who);
        self.world.note("pause");
        Ok(())
    }
    fn drain(&mut self) -> Result<(), VmError> {
        self.fault(Fault::Drain)?;
        // A request in flight ends: it is written to guest memory, and the state changes.
        self.ram.write(0, 5 * PAGE_SIZE + 100, b"used ring");
        self.devices[2].1.lock().unwrap().state.counter += 1;
        self.world.note("drain");
        Ok(())
    }
    fn resume(&mut self) -> Result<(), VmError> {
        self.fault(Fault::Resume)?;
        if self.was_running && self.world.runs() != Some(self.who) {
            self.world.run(self.who);
            if let Some(guest) = &self.guest {
                guest.set_running(true);
            }
        }
        Ok(())
    }
    fn release_disks(&mut self) -> Result<(), VmError> {
        self.fault(Fault::ReleaseDisks)?;
        self.world.drop_disks(self.who);
        Ok(())
    }
    fn reacquire_disks(&mut self) -> Result<(), VmError> {
        self.fault(Fault::ReacquireDisks)?;
        self.world.take_disks(self.who)
    }
    fn hand_over(&mut self) {
        self.world.note("handed over");
    }
}

impl DestinationVm for FakeVm {
    fn check_details(&self, source: &serde_json::Value) -> Vec<Problem> {
        if *source == self.details {
            return Vec::new();
        }
        // Some differences are worth no more than a word.
        let fatal = source.get("only a word").is_none();
        let mut problem = Problem::new(
            migration::problem::kind::PCI_SLOT,
            "PCI slots",
            &self.details,
            source,
            "use --device",
        );
        problem.code = "slots".into();
        problem.fatal = fatal;
        vec![problem]
    }
    fn accept_block(&mut self, block: &RamBlock) -> bool {
        let has = self.ram.blocks().iter().any(|b| b.name == block.name);
        let known = self.keeps.contains(&block.name) && !has;
        if known {
            self.ram.blocks.lock().unwrap().push(block.clone());
            self.ram.data.lock().unwrap().push(vec![0; block.len as usize]);
        }
        known
    }
    fn prepare(&mut self) -> Result<(), VmError> {
        self.fault(Fault::Prepare)
    }
    fn take_disks(&mut self) -> Result<(), VmError> {
        self.fault(Fault::TakeDisks)?;
        self.world.take_disks(self.who)
    }
    fn release_disks(&mut self) {
        self.world.drop_disks(self.who);
    }
    fn start(&mut self) -> Result<(), VmError> {
        self.fault(Fault::Start)?;
        self.world.run(self.who);
        Ok(())
    }
    fn section_differences(&self, _: &SectionId, a: &[u8], b: &[u8]) -> Vec<FieldError> {
        let at = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()));
        vec![FieldError::new(format!("byte {at}"), format!("{a:x?}"), format!("{b:x?}"))]
    }
}

/// A guest that does nothing but write.
struct Guest {
    gate: Arc<(Mutex<(bool, bool)>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    fn new(ram: Arc<FakeRam>, pages: u64, pause_us: u64, count: Arc<AtomicU64>) -> Self {
        let gate = Arc::new((Mutex::new((true, false)), Condvar::new()));
        let theirs = gate.clone();
        let thread = thread::Builder::new()
            .name("fake-guest".into())
            .spawn(move || {
                let (state, wake) = &*theirs;
                loop {
                    let guard = state.lock().unwrap();
                    let guard =
                        wake.wait_while(guard, |(running, ended)| !*running && !*ended).unwrap();
                    if guard.1 {
                        return;
                    }
                    let n = count.fetch_add(1, Ordering::Relaxed) + 1;
                    ram.write(0, (n % pages) * PAGE_SIZE + 8, &n.to_le_bytes());
                    drop(guard);
                    if pause_us > 0 {
                        thread::sleep(Duration::from_micros(pause_us));
                    }
                }
            })
            .unwrap();
        Self { gate, thread: Some(thread) }
    }

    fn set_running(&self, running: bool) {
        self.gate.0.lock().unwrap().0 = running;
        self.gate.1.notify_all();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.gate.0.lock().unwrap().1 = true;
        self.gate.1.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

// --- events -----------------------------------------------------------------------------------

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

// --- two sides --------------------------------------------------------------------------------

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
    connections: (Connection, Connection),
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
    (a, b): (Connection, Connection),
    controls: (Arc<Control>, Arc<Control>),
) -> Started {
    let (source_control, destination_control) = controls;
    let there = thread::spawn(move || {
        let result = destination::run(&mut destination, b, &destination_control);
        (result, destination)
    });
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

/// The source kept its guest, which runs, and says `words`.
pub(crate) fn assert_kept(ended: &Ended, words: &str) {
    let Outcome::Kept { error } = &ended.outcome else {
        panic!("expected the source to keep the guest: {:?}", ended.outcome)
    };
    let text = error.chain();
    assert!(text.contains(words), "'{words}' is not in: {text}");
    assert_eq!(ended.source.world.runs(), Some("source"));
    assert_eq!(ended.source.world.disks(), Some("source"));
    assert!(ended.source.ram.log.lock().unwrap().is_none(), "the dirty log was left on");
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
