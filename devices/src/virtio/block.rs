//! virtio-blk (virtio 1.2, 5.2): a raw image, served by a thread of its own.
//!
//! The worker takes a gate around each request. [`quiesce`](VirtioDevice::quiesce) shuts the gate,
//! and so returns when the request in flight is finished and no other will begin.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};

use migration::vmstate::{Audience, Encoder, FieldError, LayoutDigest, StateError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::chain::Chain;
use super::core::{Core, VirtioError};
use super::device::{BackendError, Kind, Part, PartDecoder, VirtioDevice};
use super::disk::{CacheMode, DiskImage, OpenDisk, SECTOR};
use super::element::RawElement;
use super::trouble::Trouble;

static KIND: Kind = Kind {
    name: "virtio-blk",
    version: 2,
    id: 2,
    transitional_id: 0x1001,
    class: 0x0100,
    legacy_features: 0,
};

/// Feature bits (virtio 1.2, 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const GEOMETRY: u64 = 1 << 4;
    pub(super) const READ_ONLY: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types and results (virtio 1.2, 5.2.6).
mod request {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
    /// Set by legacy drivers to ask for order; means nothing now.
    pub(super) const BARRIER: u32 = 1 << 31;
    /// Flag of write-zeroes: the storage may be given up.
    pub(super) const UNMAP: u32 = 1;
}

const QUEUE_SIZE: u16 = 256;
/// Bytes of the answer to GET_ID.
const ID_LEN: usize = 20;
/// The most sectors of one discard or write-zeroes request.
const MAX_DISCARD_SECTORS: u32 = 0x3f_ffff;
/// Offset of the write-cache byte in the configuration.
const WCE: usize = 32;
/// The geometry that QEMU guesses for an image without a partition table.
const HEADS: u8 = 16;
const SECTORS_PER_TRACK: u8 = 63;

/// What a block device is configured to be.
#[derive(Debug, Clone)]
pub struct BlockOptions {
    /// The image.
    pub image: DiskImage,
    /// The name that errors use.
    pub id: String,
    /// What the guest reads as serial number; cut to 20 bytes.
    pub serial: String,
    /// Number of queues, at least 1.
    pub queues: u16,
}

/// A virtio block device.
pub struct Block {
    options: BlockOptions,
    /// In sectors.
    capacity: u64,
    shared: Arc<Shared>,
    core: Option<Arc<Core>>,
    worker: Option<JoinHandle<()>>,
    /// Why the image could not be brought to safety when the VM paused.
    unsaved: Option<String>,
}

/// What the device and its worker share.
struct Shared {
    gate: Mutex<Gate>,
    /// Somebody waits for the gate: the worker leaves it alone.
    shut: AtomicBool,
    quit: AtomicBool,
    /// A flush is wanted that nobody waits for.
    tidy: AtomicBool,
    /// The guest may rely on a flush to make its writes last.
    write_cache: AtomicBool,
    wake: EventFd,
    serial: [u8; ID_LEN],
    capacity: u64,
    readonly: bool,
}

/// Held around each request.
struct Gate {
    open: bool,
    disk: Option<OpenDisk>,
    /// Requests that another host had taken and not finished; they come first.
    unfinished: VecDeque<(usize, RawElement)>,
}

impl Block {
    /// A device for the image, whose size it takes; it is not opened for use yet.
    pub fn new(options: BlockOptions) -> Result<Self, BackendError> {
        let error =
            |what: String, source| BackendError { device: options.id.clone(), what, source };
        let path = options.image.path.display();
        let size = options
            .image
            .size()
            .map_err(|e| error(format!("the disk image {path} cannot be read"), e))?;
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|e| error("no eventfd".to_owned(), e))?;
        let mut serial = [0; ID_LEN];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let capacity = size.div_ceil(SECTOR);
        let shared = Arc::new(Shared {
            gate: Mutex::new(Gate { open: false, disk: None, unfinished: VecDeque::new() }),
            shut: AtomicBool::new(true),
            quit: AtomicBool::new(false),
            tidy: AtomicBool::new(false),
            write_cache: AtomicBool::new(write_cache(&options)),
            wake,
            serial,
            capacity,
            readonly: options.image.readonly,
        });
        Ok(Self { options, capacity, shared, core: None, worker: None, unsaved: None })
    }

    #[cfg(test)]
    pub(super) fn is_synced(&self) -> bool {
        self.shared.gate().disk.as_ref().is_some_and(OpenDisk::is_synced)
    }

    fn backend_error(&self, what: &str, source: io::Error) -> BackendError {
        let what = format!("the disk image {} {what}", self.options.image.path.display());
        BackendError { device: self.options.id.clone(), what, source }
    }
}

fn write_cache(options: &BlockOptions) -> bool {
    options.image.cache != CacheMode::Writethrough
}

impl VirtioDevice for Block {
    fn kind(&self) -> &'static Kind {
        &KIND
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.options.queues.max(1))]
    }
    fn vectors(&self) -> u16 {
        self.options.queues.max(1).saturating_add(1)
    }
    fn features(&self) -> u64 {
        let mut features = feature::SEG_MAX
            | feature::GEOMETRY
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE
            | feature::DISCARD
            | feature::WRITE_ZEROES;
        if self.options.queues > 1 {
            features |= feature::MQ;
        }
        if self.options.image.readonly {
            features |= feature::READ_ONLY;
        }
        features
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
    fn connect(&mut self, core: Arc<Core>) -> Result<(), VirtioError> {
        let (shared, of_worker) = (self.shared.clone(), core.clone());
        let worker = thread::Builder::new()
            .name(format!("blk-{}", self.options.id).chars().take(15).collect())
            .spawn(move || shared.work(&of_worker))
            .map_err(|source| VirtioError::Resource {
                name: KIND.name,
                what: "a thread",
                source,
            })?;
        self.worker = Some(worker);
        self.core = Some(core);
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        let cylinders = self.capacity / (u64::from(HEADS) * u64::from(SECTORS_PER_TRACK));
        let cylinders = u16::try_from(cylinders.clamp(2, 16383)).unwrap_or(16383);
        let sector = u32::try_from(SECTOR).unwrap_or(512);
        let mut config = Vec::with_capacity(57);
        config.extend_from_slice(&self.capacity.to_le_bytes());
        config.extend_from_slice(&0_u32.to_le_bytes()); // size_max: not offered
        config.extend_from_slice(&u32::from(QUEUE_SIZE - 2).to_le_bytes()); // seg_max
        config.extend_from_slice(&cylinders.to_le_bytes());
        config.extend_from_slice(&[HEADS, SECTORS_PER_TRACK]);
        config.extend_from_slice(&sector.to_le_bytes());
        config.extend_from_slice(&[0; 8]); // topology: nothing known
        config.push(self.shared.write_cache.load(Ordering::Relaxed).into());
        config.push(0);
        config.extend_from_slice(&self.options.queues.max(1).to_le_bytes());
        for _ in 0..2 {
            // Discard, then write-zeroes: sectors and segments of a request.
            config.extend_from_slice(&MAX_DISCARD_SECTORS.to_le_bytes());
            config.extend_from_slice(&1_u32.to_le_bytes());
            if config.len() == 44 {
                config.extend_from_slice(&1_u32.to_le_bytes()); // discard alignment, in sectors
            }
        }
        config.push(1); // write-zeroes may give up storage
        config
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let touched = WCE.checked_sub(offset).and_then(|at| data.get(at));
        if let Some(byte) = touched
            && self.core.as_ref().is_some_and(|core| core.has(feature::CONFIG_WCE))
        {
            self.shared.write_cache.store(*byte != 0, Ordering::Relaxed);
        }
    }
    fn check_config(&self, config: &[u8]) -> Result<(), FieldError> {
        // A source whose guest has never looked at it may send zeros.
        let capacity = config.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        if capacity != 0 && capacity != self.capacity {
            let expected = format_args!("{} sectors, the size of the image here", self.capacity);
            return Err(FieldError::new("config.capacity", expected, capacity));
        }
        Ok(())
    }
    fn restore_config(&mut self, config: &[u8]) {
        self.write_config(0, config);
    }

    fn reset(&mut self) {
        self.shared.gate().unfinished.clear();
        self.shared.write_cache.store(write_cache(&self.options), Ordering::Relaxed);
    }

    fn serves_itself(&self) -> bool {
        true
    }
    fn kick(&mut self, _: usize) {}

    fn quiesce(&mut self) {
        self.shared.shut.store(true, Ordering::Release);
        self.shared.gate().open = false;
    }
    fn unquiesce(&mut self) {
        if self.core.as_ref().is_some_and(|core| !core.is_paused()) {
            self.shared.gate().open = true;
            self.shared.shut.store(false, Ordering::Release);
            self.shared.wake();
        }
    }
    fn flush(&mut self) {
        self.shared.tidy.store(false, Ordering::Release);
        let flush = |disk: &OpenDisk| disk.flush().inspect_err(|error| disk.owe(error));
        let flushed = self.shared.gate().disk.as_ref().map_or(Ok(()), flush);
        self.unsaved = flushed.err().map(|error| error.to_string());
        if let Some(error) = &self.unsaved {
            tracing::error!("{}: the disk image cannot be flushed: {error}", self.options.id);
        }
    }

    fn flush_ahead(&mut self) {
        self.shared.tidy.store(true, Ordering::Release);
        self.shared.wake();
    }

    fn open(&mut self) -> Result<(), BackendError> {
        let mut gate = self.shared.gate();
        if gate.disk.is_some() {
            return Ok(());
        }
        let disk =
            self.options.image.open().map_err(|e| self.backend_error("cannot be opened", e))?;
        if disk.size().div_ceil(SECTOR) != self.capacity {
            let expected =
                format!("{} sectors were expected, {} bytes found", self.capacity, disk.size());
            return Err(self.backend_error("has changed its size", io::Error::other(expected)));
        }
        gate.disk = Some(disk);
        Ok(())
    }
    fn guest_started(&mut self) -> Result<(), BackendError> {
        let marked = self.shared.gate().disk.as_ref().map_or(Ok(()), OpenDisk::mark_started);
        marked.map_err(|e| self.backend_error("cannot be marked as one whose guest has started", e))
    }
    fn close(&mut self) -> Result<(), BackendError> {
        let Some(disk) = self.shared.gate().disk.take() else { return Ok(()) };
        disk.flush().map_err(|e| self.backend_error("cannot be flushed", e))
    }

    fn try_backend(&mut self) -> Vec<Trouble> {
        if self.shared.gate().disk.is_some() {
            return Vec::new();
        }
        let what = format!("the disk image {}", self.options.image.path.display());
        let found = match self.options.image.inspect() {
            Ok(found) => found,
            Err(source) => return vec![Trouble::Missing { what, source }],
        };
        let mut troubles = Vec::new();
        let is = found.size.div_ceil(SECTOR);
        if is != self.capacity {
            troubles.push(Trouble::Size { what: what.clone(), was: self.capacity, is });
        }
        if !found.locked && !self.options.image.readonly {
            troubles.push(Trouble::Unlocked { what: what.clone() });
        }
        if let Some(source) = found.refused {
            troubles.push(Trouble::NotWritable { what, source });
        }
        troubles
    }

    fn part_layout(&self, layout: LayoutDigest) -> LayoutDigest {
        layout.part::<RawElement>("inflight")
    }
    fn save_part(&self, to: &mut Encoder, _: Audience) -> Result<(), StateError> {
        if let Some(error) = &self.unsaved {
            return Err(StateError::Device {
                section: KIND.name.to_owned(),
                what: format!("{}: the disk image could not be flushed: {error}", self.options.id),
                source: None,
            });
        }
        // A worker that serves has the gate for as long as a request takes, and a flush.
        let gate = match self.shared.gate.try_lock() {
            Ok(gate) => gate,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // It comes to its end, and no other begins.
            Err(_) if self.shared.shut.load(Ordering::Acquire) => self.shared.gate(),
            Err(_) => {
                return Err(StateError::Device {
                    section: KIND.name.to_owned(),
                    what: format!("{}: a request is being served", self.options.id),
                    source: None,
                });
            }
        };
        for (queue, element) in &gate.unfinished {
            to.put(&1_u8)?;
            if self.options.queues > 1 {
                to.put(&u32::try_from(*queue).unwrap_or(0))?;
            }
            to.put(element)?;
        }
        to.put(&0_u8)
    }
    fn decode_part(&self, from: &mut PartDecoder<'_, '_>) -> Result<Part, StateError> {
        let queues = usize::from(self.options.queues.max(1));
        let mut unfinished = VecDeque::new();
        while from.get::<u8>("inflight.more")? != 0 {
            let at = unfinished.len();
            if at >= queues * usize::from(super::queue::MAX_QUEUE_SIZE) {
                let expected = "no more requests than the queues hold";
                return Err(from.error(FieldError::new("inflight", expected, at + 1)));
            }
            let mut queue = 0;
            if queues > 1 {
                let index: u32 = from.get(&format!("inflight[{at}].queue"))?;
                queue = usize::try_from(index).unwrap_or(usize::MAX);
                if queue >= queues {
                    let field = format!("inflight[{at}].queue");
                    let expected = format_args!("less than {queues}");
                    return Err(from.error(FieldError::new(field, expected, index)));
                }
            }
            let field = format!("inflight[{at}]");
            let element: RawElement = from.get(&field)?;
            if let Some(core) = &self.core {
                element.check(&field, core.ram()).map_err(|error| from.error(error))?;
            }
            unfinished.push_back((queue, element));
        }
        Ok(Box::new(unfinished))
    }
    fn restore_part(&mut self, part: Part) -> Result<(), FieldError> {
        let unfinished = part.downcast::<VecDeque<(usize, RawElement)>>().map_err(|_| {
            FieldError::new("inflight", "the part that this device has decoded", "another's")
        })?;
        if let Some(core) = &self.core {
            for (queue, _) in unfinished.iter() {
                if let Some(mut queue) = core.queue(*queue) {
                    let used = queue.last_avail().wrapping_sub(queue.in_flight());
                    let next = queue.last_avail().wrapping_add(1);
                    queue.set_position(next, used);
                }
            }
        }
        self.shared.gate().unfinished = *unfinished;
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            tracing::error!("{}: the worker thread panicked", self.options.id);
        }
    }
}

impl Shared {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::debug!("a block worker is woken already: {error}");
        }
    }

    /// The worker thread.
    fn work(&self, core: &Core) {
        let (shut, open) = match self.waits(core) {
            Ok(waits) => waits,
            Err(error) => {
                tracing::error!("a block worker cannot listen to its queues: {error}");
                return;
            }
        };
        let mut events = vec![EpollEvent::default(); core.len().saturating_add(1)];
        while !self.quit.load(Ordering::Acquire) {
            let wait = if self.shut.load(Ordering::Acquire) { &shut } else { &open };
            match wait.wait(-1, &mut events) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!("a block worker cannot wait for its queues: {error}");
                    return;
                }
            }
            // Whoever rings again after this is served again.
            let _ = self.wake.read();
            if !self.shut.load(Ordering::Acquire) {
                for queue in 0..core.len() {
                    let _ = core.kick_fd(queue).map(EventFd::read);
                    self.serve(core, queue);
                }
            }
        }
    }

    /// What to wait for while the gate is shut, and while it is open.
    fn waits(&self, core: &Core) -> io::Result<(Epoll, Epoll)> {
        let (shut, open) = (Epoll::new()?, Epoll::new()?);
        let add = |epoll: &Epoll, fd: &EventFd| {
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))
        };
        add(&shut, &self.wake)?;
        add(&open, &self.wake)?;
        for queue in 0..core.len() {
            if let Some(fd) = core.kick_fd(queue) {
                add(&open, fd)?;
            }
        }
        Ok((shut, open))
    }

    fn serve(&self, core: &Core, queue: usize) {
        loop {
            if self.shut.load(Ordering::Acquire) {
                return;
            }
            let mut gate = self.gate();
            if !gate.open {
                return;
            }
            self.serve_unfinished(core, &mut gate);
            // Like a flush of the guest's: no request is under way, and the next waits for it.
            if self.tidy.swap(false, Ordering::AcqRel)
                && let Some(disk) = &gate.disk
            {
                disk.flush_unasked();
            }
            core.set_notification(queue, false);
            match core.pop(queue) {
                Some(chain) => self.answer(core, queue, chain, gate.disk.as_mut()),
                None if core.set_notification(queue, true) => {}
                None => return,
            }
        }
    }

    fn serve_unfinished(&self, core: &Core, gate: &mut Gate) {
        while core.is_live()
            && let Some((queue, element)) = gate.unfinished.pop_front()
        {
            match element.chain(core.ram()) {
                Ok(chain) => self.answer(core, queue, chain, gate.disk.as_mut()),
                Err(error) => core.fail(&error),
            }
        }
    }

    /// Executes one request and gives it back.
    fn answer(&self, core: &Core, queue: usize, mut chain: Chain<'_>, disk: Option<&mut OpenDisk>) {
        let total = chain.writable.len();
        let Some(data_len) = total.checked_sub(1) else {
            return core.fail(&"virtio-blk: a request has no room for its result");
        };
        let mut result = chain.writable.split_off(data_len);
        let Some(header) = chain.readable.read_array::<16>() else {
            return core.fail(&"virtio-blk: a request has no header");
        };
        let status = match self.execute(core, header, &mut chain, disk) {
            Ok(()) => 0_u8,
            Err(Refusal::Failed(error)) => {
                tracing::warn!("virtio-blk: a request failed: {error}");
                1
            }
            Err(Refusal::Invalid) => 1,
            Err(Refusal::Unsupported) => 2,
        };
        result.write(&[status]);
        core.push(queue, chain.head, total);
        core.interrupt(queue);
    }

    fn execute(
        &self,
        core: &Core,
        header: [u8; 16],
        chain: &mut Chain<'_>,
        disk: Option<&mut OpenDisk>,
    ) -> Result<(), Refusal> {
        let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]) & !request::BARRIER;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let disk = disk.ok_or_else(|| io::Error::other("the disk image is not open"))?;
        // Without a flush command, or with its write cache off, a driver relies on every write.
        let lasting = !core.has(feature::FLUSH) || !self.write_cache.load(Ordering::Relaxed);
        match kind {
            request::IN => {
                let offset = self.range(sector, chain.writable.len())?;
                disk.read(offset, &mut chain.writable)?;
                return Ok(());
            }
            request::OUT => {
                let offset = self.range(sector, chain.readable.len())?;
                self.writable()?;
                disk.write(offset, &mut chain.readable)?;
            }
            request::FLUSH => {
                disk.flush()?;
                return Ok(());
            }
            request::GET_ID => {
                chain.writable.write(&self.serial);
                return Ok(());
            }
            request::DISCARD | request::WRITE_ZEROES => {
                let [a, b, c, d, e, f, g, h, n0, n1, n2, n3, f0, f1, f2, f3] =
                    chain.readable.read_array().ok_or(Refusal::Invalid)?;
                // One segment in a request, as the configuration says.
                if !chain.readable.is_empty() {
                    return Err(Refusal::Invalid);
                }
                let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
                let flags = u32::from_le_bytes([f0, f1, f2, f3]);
                let allowed = if kind == request::DISCARD { 0 } else { request::UNMAP };
                if flags & !allowed != 0 {
                    return Err(Refusal::Unsupported);
                }
                self.writable()?;
                if sectors > MAX_DISCARD_SECTORS || sectors == 0 {
                    return Err(Refusal::Invalid);
                }
                let len = u64::from(sectors) * SECTOR;
                let offset = self.range(sector, usize::try_from(len).unwrap_or(usize::MAX))?;
                if kind == request::DISCARD {
                    disk.discard(offset, len)?;
                } else {
                    disk.write_zeroes(offset, len, flags & request::UNMAP != 0)?;
                }
            }
            _ => return Err(Refusal::Unsupported),
        }
        if lasting {
            disk.flush()?;
        }
        Ok(())
    }

    /// The first byte of a range of whole sectors that lies on the disk.
    fn range(&self, sector: u64, len: usize) -> Result<u64, Refusal> {
        let len = u64::try_from(len).map_err(|_| Refusal::Invalid)?;
        let end = sector.checked_add(len / SECTOR).ok_or(Refusal::Invalid)?;
        if !len.is_multiple_of(SECTOR) || end > self.capacity {
            return Err(Refusal::Invalid);
        }
        sector.checked_mul(SECTOR).ok_or(Refusal::Invalid)
    }

    fn writable(&self) -> Result<(), Refusal> {
        if self.readonly { Err(Refusal::Invalid) } else { Ok(()) }
    }
}

/// Why a request was not done.
enum Refusal {
    /// The host could not.
    Failed(io::Error),
    /// It makes no sense on this disk.
    Invalid,
    /// This device has no such request.
    Unsupported,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::vmstate::SectionId;

    #[test]
    fn whoever_wants_the_state_of_a_disk_does_not_wait_for_a_request() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 4096]).unwrap();
        let (path, cache) = (file.path().to_owned(), CacheMode::Writeback);
        let image = DiskImage { path, readonly: false, cache };
        let options = BlockOptions { image, id: "disk0".into(), serial: String::new(), queues: 1 };
        let disk = Block::new(options).unwrap();
        let save = || {
            let mut to = Encoder::new(&SectionId::new("disk", 0));
            disk.save_part(&mut to, Audience::MiniVmm).map_err(|error| error.to_string())
        };
        disk.shared.shut.store(false, Ordering::Release);
        let request = disk.shared.gate();
        assert!(save().unwrap_err().contains("disk0: a request is being served"));
        drop(request);
        assert_eq!(save(), Ok(()));
    }
}
