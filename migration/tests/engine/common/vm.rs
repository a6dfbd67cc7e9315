//! A VM that is to go wrong where it is told, and a world that notices when two sides run the same one.

use std::any::Any;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use migration::guest::{
    DestinationVm, DirtyTracker, GuestRam, Holder, Machine, PAGE_SIZE, RamBlock, Reclaimed,
    SourceVm, TakenBack, VmError,
};
use migration::handover::Arbiter;
use migration::handover::ledger::{Entry, Ledger, Mark};
use migration::manifest::{Problem, Scrap};
use migration::throttle::Rest;
use migration::transport::Connection;
use migration::vmstate::{
    Audience, ByteSource, Description, FieldError, Section, SectionId, SectionOf, StateError,
};

use super::guest::{FakeDevice, FakeState, Guest, OtherDevice};
use super::memory::{FakeLog, FakeRam, GIVES_WAY};
use super::{MACHINE, wait_for};

/// Who runs and who has the disks. Panics when both do.
#[derive(Default)]
pub(crate) struct World {
    running: Mutex<Option<&'static str>>,
    disks: Mutex<Option<&'static str>>,
    /// Somebody has written to the disks since the source gave them up.
    pub(crate) disks_written: AtomicBool,
    /// Whose the memory is that is not copied.
    pub(crate) ledger: AtomicU32,
    /// That memory.
    shared: Mutex<Option<Arc<FakeRam>>>,
    /// Changes whenever they are taken back.
    pub(crate) stamp: AtomicU64,
    pub(crate) history: Mutex<Vec<String>>,
    /// Set when the rule was broken, so that a panic on another thread is not overlooked.
    pub(crate) broken: AtomicBool,
}

impl World {
    pub(crate) fn ledger(&self) -> Ledger<'_> {
        Ledger::new(&self.ledger)
    }
    pub(crate) fn note(&self, what: impl Into<String>) {
        self.history.lock().unwrap().push(what.into());
    }
    pub(crate) fn runs(&self) -> Option<&'static str> {
        *self.running.lock().unwrap()
    }
    pub(crate) fn disks(&self) -> Option<&'static str> {
        *self.disks.lock().unwrap()
    }
    fn disks_changed(&self) -> bool {
        self.disks_written.load(Ordering::Relaxed)
    }
    pub(crate) fn run(&self, who: &'static str) {
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
    pub(crate) fn take_disks(&self, who: &'static str) -> Result<(), VmError> {
        let mut disks = self.disks.lock().unwrap();
        match *disks {
            None => {
                *disks = Some(who);
                Ok(())
            }
            Some(other) if other == who => Ok(()),
            Some(other) => Err(VmError::new(format!("disk0.raw is locked by {other}"))),
        }
    }
    pub(crate) fn drop_disks(&self, who: &'static str) {
        let mut disks = self.disks.lock().unwrap();
        if *disks == Some(who) {
            *disks = None;
        }
    }
}

/// Where the devices' states rely on memory.
const SCRAP: u64 = 5 * PAGE_SIZE + 100;

/// What goes wrong in a VM, for tests of failures.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    #[default]
    None,
    Throttle,
    Details,
    Log,
    Pause,
    /// It stands still, and says that it does not.
    Paused,
    Drain,
    ReadState,
    /// When it stands still.
    Sections,
    /// The last section can't be written, when it stands still.
    LastSection,
    LeftDisks,
    HandOver,
    ReleaseDisks,
    ReacquireDisks,
    Resume,
    Prepare,
    EndRehearsal,
    TakeDisks,
    Share,
    Offer,
    Adopt,
    Claim,
    Start,
    /// It takes the memory when the source has given it up.
    LateClaim,
    /// It dies right before it takes the memory.
    DiesUnclaimed,
    /// It dies with the memory, before its guest runs.
    DiesClaimed,
    /// It dies as soon as its guest runs.
    DiesRunning,
}

pub(crate) struct FakeVm {
    pub(crate) who: &'static str,
    pub(crate) machine: String,
    pub(crate) vcpus: u32,
    pub(crate) ram: Arc<FakeRam>,
    pub(crate) devices: Vec<(SectionId, Arc<Mutex<FakeDevice>>)>,
    pub(crate) world: Arc<World>,
    pub(crate) fault: Fault,
    /// What goes wrong does so by a panic.
    pub(crate) panics: bool,
    pub(crate) details: serde_json::Value,
    pub(crate) blockers: Vec<String>,
    pub(crate) against_qemu: Vec<Problem>,
    pub(crate) was_running: bool,
    pub(crate) arbiter: Arbiter,
    /// How long it takes to give its disks up.
    pub(crate) slow_release: Duration,
    /// How long the destination's thread waits for a processor when its guest has begun to run.
    pub(crate) slow_to_say: Duration,
    /// Blocks that it takes although it has not got them.
    pub(crate) keeps: Vec<String>,
    /// The first device's layout is one that nobody else knows.
    pub(crate) other_layout: bool,
    /// Further connections that wait to be taken.
    pub(crate) beside: Vec<Connection>,
    guest: Option<Guest>,
    /// Its devices stand still, and what the hypervisor holds has not been read.
    unread: bool,
    /// The source's memory, which this side is to go on in.
    adopted: Option<Arc<FakeRam>>,
    /// Where the source hangs.
    pub(crate) link: Option<Connection>,
}

/// One end of a socket, as a file.
fn file(fd: BorrowedFd<'_>) -> std::fs::File {
    fd.try_clone_to_owned().expect("a descriptor").into()
}

impl FakeVm {
    /// What a process leaves behind that is killed here.
    fn dies(&mut self, at: Fault) {
        if self.fault == at {
            self.world.drop_disks(self.who);
            self.world.stand(self.who);
            self.world.note(format!("{} dies", self.who));
            let link = self.link.take().expect("a link to cut");
            link.shutdown(std::net::Shutdown::Both);
            panic!("{at:?} was told to die");
        }
    }

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
            panics: false,
            details: serde_json::json!({ "slots": [2] }),
            blockers: Vec::new(),
            against_qemu: Vec::new(),
            was_running: true,
            arbiter: Arbiter::DiskLocks,
            slow_release: Duration::ZERO,
            slow_to_say: Duration::ZERO,
            keeps: Vec::new(),
            other_layout: false,
            beside: Vec::new(),
            guest: None,
            unread: false,
            adopted: None,
            link: None,
        }
    }

    /// Has so many devices more.
    pub(crate) fn add_devices(&mut self, count: u32) {
        self.devices.extend((0..count).map(|n| (SectionId::new("disk", n), Arc::default())));
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

    /// Fills all of its memory with what can't be compressed.
    pub(crate) fn fill_with_noise(&mut self) {
        let mut word = 1u64;
        for (index, block) in self.ram.blocks().iter().enumerate() {
            for page in 0..block.len / PAGE_SIZE {
                let words = std::iter::repeat_with(|| {
                    word = word.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (word >> 32) as u32
                });
                let bytes: Vec<u8> = words.take(1024).flat_map(u32::to_le_bytes).collect();
                self.ram.write(index, page * PAGE_SIZE, &bytes);
            }
        }
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
            assert!(!self.panics, "{at:?} was told to panic");
            return Err(VmError::with(format!("{at:?} was told to fail"), "the reason behind it"));
        }
        Ok(())
    }
}

/// A device whose state can't be written down.
struct Unwritable {
    section: Box<dyn Section>,
    panics: bool,
}

impl Unwritable {
    fn error(&self) -> StateError {
        assert!(!self.panics, "{:?} was told to panic", Fault::LastSection);
        let (section, what) = (self.id().to_string(), "it was told to fail".to_owned());
        StateError::Device { section, what, source: None }
    }
}

impl Section for Unwritable {
    fn id(&self) -> SectionId {
        self.section.id()
    }
    fn version(&self) -> u32 {
        self.section.version()
    }
    fn min_version(&self) -> u32 {
        self.section.min_version()
    }
    fn save(&self, _: Audience) -> Result<Vec<u8>, StateError> {
        Err(self.error())
    }
    fn decode(
        &self,
        version: u32,
        source: &mut dyn ByteSource,
    ) -> Result<Box<dyn Any + Send>, StateError> {
        self.section.decode(version, source)
    }
    fn apply(&mut self, state: Box<dyn Any + Send>) -> Result<(), StateError> {
        self.section.apply(state)
    }
    fn save_described(&self, _: Audience) -> Result<(Vec<u8>, Description), StateError> {
        Err(self.error())
    }
    fn layout_digest(&self) -> u64 {
        self.section.layout_digest()
    }
}

impl Machine for FakeVm {
    fn machine_type(&self) -> String {
        self.machine.clone()
    }
    fn vcpus(&self) -> u32 {
        self.vcpus
    }
    fn uuid(&self) -> [u8; 16] {
        [0; 16]
    }
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.ram.clone()
    }
    fn exercise(&self) {
        self.world.note(format!("{} exercises", self.who));
    }
    fn sections(&self) -> Vec<Box<dyn Section>> {
        if self.world.runs().is_none() {
            self.fault(Fault::Sections).expect("only a panic makes sense here");
        }
        assert!(!self.unread, "to save what was not read can write to memory that has been sent");
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
        if self.fault == Fault::LastSection
            && self.world.runs().is_none()
            && let Some(last) = sections.pop()
        {
            sections.push(Box::new(Unwritable { section: last, panics: self.panics }));
        }
        sections
    }
    fn details(&self) -> serde_json::Value {
        self.fault(Fault::Details).expect("only a panic makes sense here");
        self.details.clone()
    }
}

impl SourceVm for FakeVm {
    fn against_qemu(&self) -> Result<Vec<Problem>, VmError> {
        Ok(self.against_qemu.clone())
    }
    fn prepare_for_qemu(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn blockers(&self) -> Vec<String> {
        self.blockers.clone()
    }
    fn scraps(&self) -> Vec<Scrap> {
        let mut bytes = [0; 4];
        self.ram.copy_out(0, SCRAP, &mut bytes).unwrap();
        vec![Scrap { address: SCRAP, value: u32::from_le_bytes(bytes) }]
    }
    fn dirty_tracker(&mut self) -> Result<Box<dyn DirtyTracker>, VmError> {
        self.fault(Fault::Log)?;
        Ok(Box::new(FakeLog(self.ram.clone())))
    }
    fn throttle(&mut self, rest: &Rest) -> Result<(), VmError> {
        self.world.note(match rest {
            Rest::All(percent) => format!("throttle {percent}"),
            Rest::Each(percent) => format!("throttle {percent:?}"),
        });
        if let Some(guest) = &self.guest {
            guest.throttle(rest.most());
        }
        self.fault(Fault::Throttle)
    }
    fn flush_ahead(&mut self) {
        self.world.note("flush ahead");
    }
    fn pause(&mut self) -> Result<(), VmError> {
        self.fault(Fault::Pause)?;
        if let Some(guest) = &self.guest {
            guest.set_running(false);
        }
        self.world.stand(self.who);
        self.world.note("pause");
        self.fault(Fault::Paused)
    }
    fn drain(&mut self) -> Result<(), VmError> {
        self.fault(Fault::Drain)?;
        // A request in flight ends: it is written to guest memory, and the state changes.
        self.ram.write(0, 5 * PAGE_SIZE + 100, b"used ");
        self.devices[2].1.lock().unwrap().state.counter += 1;
        self.unread = true;
        self.world.note("drain");
        Ok(())
    }
    fn read_state(&mut self) -> Result<(), VmError> {
        self.fault(Fault::ReadState)?;
        // To read a vCPU's state makes KVM write to guest memory.
        self.ram.write(0, 5 * PAGE_SIZE + 105, b"ring");
        self.unread = false;
        self.world.note("read state");
        Ok(())
    }
    fn resume(&mut self) -> Result<(), VmError> {
        self.fault(Fault::Resume)?;
        self.unread = false;
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
        std::thread::sleep(self.slow_release);
        self.world.drop_disks(self.who);
        Ok(())
    }
    fn left_disks(&self) -> serde_json::Value {
        self.fault(Fault::LeftDisks).expect("only a panic makes sense here");
        self.world.stamp.load(Ordering::Relaxed).into()
    }
    fn arbiter(&self) -> Arbiter {
        self.arbiter
    }
    fn reacquire_disks(&mut self) -> Result<TakenBack, VmError> {
        self.fault(Fault::ReacquireDisks)?;
        if let Err(held) = self.world.take_disks(self.who) {
            return Ok(TakenBack::Held(held.what));
        }
        Ok(match self.world.disks_changed() {
            true => TakenBack::Changed("disk0.raw was written to".into()),
            false => {
                self.world.stamp.fetch_add(1, Ordering::Relaxed);
                TakenBack::AsLeft
            }
        })
    }
    fn probe_disks(&mut self) -> Result<Holder, VmError> {
        Ok(match (self.world.disks(), self.world.runs()) {
            (None, _) => Holder::Nobody,
            (Some(who), Some(_)) => Holder::RunningGuest(format!("disk0.raw is locked by {who}")),
            (Some(who), None) => Holder::Someone(format!("disk0.raw is locked by {who}")),
        })
    }
    fn share_memory(&mut self, over: BorrowedFd<'_>) -> Result<(), VmError> {
        self.fault(Fault::Share)?;
        self.world.ledger.store(0, Ordering::SeqCst);
        *self.world.shared.lock().unwrap() = Some(self.ram.clone());
        file(over).write_all(b"M").map_err(|e| VmError::with("the memory", e))
    }
    fn offer_memory(&mut self) -> Result<(), VmError> {
        self.fault(Fault::Offer)?;
        self.world.ledger().mark(Mark::Offer).expect("a new ledger");
        Ok(())
    }
    fn reclaim_memory(&mut self) -> Result<Reclaimed, VmError> {
        Ok(match self.world.ledger().mark(Mark::Keep) {
            Ok(_) => Reclaimed::Kept,
            Err(Entry::Runs) => Reclaimed::Runs,
            Err(_) => Reclaimed::Taken,
        })
    }
    fn hand_over(&mut self) {
        self.world.note("handed over");
        self.fault(Fault::HandOver).expect("only a panic makes sense here");
    }
}

impl DestinationVm for FakeVm {
    fn give_way(&self) -> fn(bool) {
        |way| GIVES_WAY.set(way)
    }
    fn expect(&mut self) -> Result<(), VmError> {
        self.world.note("the destination expects it");
        Ok(())
    }
    fn check_details(&mut self, source: &serde_json::Value) -> Vec<Problem> {
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
    fn next_connection(&mut self, timeout: Duration) -> Result<Option<Connection>, VmError> {
        if self.beside.is_empty() {
            std::thread::sleep(timeout);
            return Ok(None);
        }
        Ok(Some(self.beside.remove(0)))
    }
    fn accept_block(&mut self, block: &RamBlock) -> bool {
        let has = self.ram.blocks().iter().any(|b| b.name == block.name);
        let known = self.keeps.contains(&block.name) && !has;
        if known {
            self.ram.add(block);
        }
        known
    }
    fn begin_rehearsal(&mut self, scraps: &[Scrap]) -> Result<(), VmError> {
        for scrap in scraps {
            let bytes = scrap.value.to_le_bytes();
            self.ram.copy_in(0, scrap.address, &bytes).map_err(|e| VmError::with("a scrap", e))?;
        }
        Ok(())
    }
    fn end_rehearsal(&mut self, scraps: &[Scrap]) -> Result<(), VmError> {
        self.fault(Fault::EndRehearsal)?;
        for scrap in scraps {
            self.ram.copy_in(0, scrap.address, &[0; 4]).map_err(|e| VmError::with("a scrap", e))?;
        }
        Ok(())
    }
    fn prepare(&mut self) -> Result<(), VmError> {
        assert!(!GIVES_WAY.get(), "the source's guest waits, and others go first");
        self.world.note(format!("prepared with {:?}", self.device(0)));
        self.fault(Fault::Prepare)
    }
    fn adopt_memory(&mut self, from: BorrowedFd<'_>) -> Result<(), VmError> {
        let mut byte = [0];
        file(from).read_exact(&mut byte).map_err(|e| VmError::with("the memory", e))?;
        if &byte != b"M" {
            return Err(VmError::new("no memory came"));
        }
        self.fault(Fault::Adopt)?;
        self.adopted = self.world.shared.lock().unwrap().clone();
        Ok(())
    }
    fn claim_memory(&mut self) -> Result<(), VmError> {
        self.dies(Fault::DiesUnclaimed);
        if self.fault == Fault::LateClaim {
            wait_for("the source to act", || self.world.ledger().entry() != Entry::Offered);
        }
        let taken = self.world.ledger().mark(Mark::Take);
        taken.map_err(|entry| VmError::new(format!("the memory is {entry:?}")))?;
        self.dies(Fault::DiesClaimed);
        self.fault(Fault::Claim)?;
        // Nothing has been written there before.
        let theirs = self.adopted.clone().expect("memory");
        let mut bytes = vec![0; theirs.blocks()[0].len as usize];
        theirs.copy_out(0, 0, &mut bytes).unwrap();
        self.ram.copy_in(0, 0, &bytes).unwrap();
        Ok(())
    }
    fn give_memory_back(&mut self) {
        if self.fault == Fault::DiesUnclaimed || self.fault == Fault::DiesClaimed {
            // A dead process does nothing.
            return;
        }
        self.adopted = None;
        let _ = self.world.ledger().mark(Mark::Return);
    }
    fn take_disks(&mut self, left: &serde_json::Value) -> Result<(), VmError> {
        self.fault(Fault::TakeDisks)?;
        if !left.is_null() && *left != self.world.stamp.load(Ordering::Relaxed) {
            return Err(VmError::new("disk0.raw is not as the source left it"));
        }
        self.world.take_disks(self.who)
    }
    fn release_disks(&mut self) {
        self.world.drop_disks(self.who);
    }
    fn start(&mut self) -> Result<Instant, VmError> {
        assert!(!GIVES_WAY.get(), "the guest waits, and others go first");
        self.fault(Fault::Start)?;
        let since = Instant::now();
        self.world.run(self.who);
        if self.adopted.is_some() {
            self.world.ledger().mark(Mark::Start).expect("memory that was taken");
        }
        self.dies(Fault::DiesRunning);
        std::thread::sleep(self.slow_to_say);
        Ok(since)
    }
    fn section_differences(&self, _: &SectionId, a: &[u8], b: &[u8]) -> Vec<FieldError> {
        let at = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()));
        vec![FieldError::new(format!("byte {at}"), format!("{a:x?}"), format!("{b:x?}"))]
    }
}
