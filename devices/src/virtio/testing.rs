//! A guest made of nothing but a driver: real memory, real rings, fake interrupt controllers.

use std::collections::BTreeSet;
use std::io;
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use migration::vmstate::{Audience, Section, SliceSource, StateError};

use super::{Generation, VirtioDevice, VirtioPci, VirtioSection, Wiring, features, status};
use crate::bus::IoBus;
use crate::device::Device;
use crate::irq::{IoAddress, IoEvents, MsiController, MsiMessage, MsiVector};
use crate::memory::{GuestRam, GuestRamRef};
use crate::pci::{IntxRouter, PciBus, ResetControl};

/// Size of each of the two pieces of RAM.
pub(crate) const PIECE: u64 = 8 << 20;
/// Where the second piece begins.
pub(crate) const HIGH: u64 = 4 << 30;
/// Where rings are laid out, one after the other.
const RINGS: u64 = 0x1_0000;
const RING: u64 = 0x4000;
/// Where buffers are allocated.
const BUFFERS: u64 = 0x40_0000;
/// How long to wait for a worker.
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Clone, Default)]
pub(crate) struct FakeMsi(Arc<Mutex<MsiLog>>);

#[derive(Default)]
struct MsiLog {
    allocated: usize,
    sent: Vec<(usize, MsiMessage)>,
}

struct FakeVector {
    index: usize,
    log: FakeMsi,
    message: Mutex<Option<MsiMessage>>,
}

impl FakeMsi {
    /// Vectors that fired, in order of their allocation, with their message.
    pub(crate) fn sent(&self) -> Vec<(usize, MsiMessage)> {
        self.0.lock().unwrap().sent.clone()
    }

    pub(crate) fn take(&self) -> Vec<usize> {
        self.0.lock().unwrap().sent.drain(..).map(|(vector, _)| vector).collect()
    }
}

impl MsiController for FakeMsi {
    fn allocate(&self) -> io::Result<Box<dyn MsiVector>> {
        let mut log = self.0.lock().unwrap();
        let index = log.allocated;
        log.allocated += 1;
        Ok(Box::new(FakeVector { index, log: self.clone(), message: Mutex::default() }))
    }
}

impl MsiVector for FakeVector {
    fn set_message(&self, message: MsiMessage) {
        *self.message.lock().unwrap() = Some(message);
    }
    fn trigger(&self) -> io::Result<()> {
        let message = self.message.lock().unwrap().expect("a vector without a route fires");
        self.log.0.lock().unwrap().sent.push((self.index, message));
        Ok(())
    }
}

/// Lets a device go on, as a machine does.
pub(crate) fn go_on(function: &Mutex<VirtioPci>) {
    let mut function = function.lock().unwrap();
    function.resume();
    function.catch_up();
    function.update_doorbells();
}

#[derive(Default)]
pub(crate) struct FakeIoEvents(pub(crate) Mutex<BTreeSet<(u64, Option<u16>)>>);

fn key(address: IoAddress) -> u64 {
    match address {
        IoAddress::Pio(port) => port.into(),
        IoAddress::Mmio(address) => address,
    }
}

impl IoEvents for FakeIoEvents {
    fn register(&self, _: &EventFd, address: IoAddress, value: Option<u16>) -> io::Result<()> {
        assert!(self.0.lock().unwrap().insert((key(address), value)), "registered twice");
        Ok(())
    }
    fn unregister(&self, _: &EventFd, address: IoAddress, value: Option<u16>) -> io::Result<()> {
        assert!(self.0.lock().unwrap().remove(&(key(address), value)), "was not registered");
        Ok(())
    }
}

#[derive(Default)]
pub(crate) struct FakeBridge(Mutex<[bool; 4]>);

impl IntxRouter for FakeBridge {
    fn set_pirq(&self, line: usize, high: bool) {
        self.0.lock().unwrap()[line] = high;
    }
}

impl ResetControl for FakeBridge {
    fn read(&self) -> u8 {
        0
    }
    fn write(&self, _: u8) {}
}

/// RAM in two pieces, as on a machine with memory above 4 GiB.
pub(crate) fn ram() -> GuestRamRef {
    let size = usize::try_from(PIECE).unwrap();
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), size), (GuestAddress(HIGH), size)]).unwrap())
}

#[derive(Clone, Copy)]
pub(crate) struct DriverQueue {
    pub(crate) size: u16,
    next_desc: u16,
    avail: u16,
    used: u16,
}

/// A driver and the function that it drives, at slot 3.
pub(crate) struct Guest {
    pub(crate) ram: GuestRamRef,
    pub(crate) msi: FakeMsi,
    pub(crate) io_events: Arc<FakeIoEvents>,
    pub(crate) bridge: Arc<FakeBridge>,
    pub(crate) io: Arc<IoBus>,
    pub(crate) bus: Arc<PciBus>,
    pub(crate) function: Arc<Mutex<VirtioPci>>,
    pub(crate) queues: Vec<DriverQueue>,
    next_buffer: u64,
}

/// Where the fixture's firmware puts the BARs.
pub(crate) const LEGACY_PORTS: u16 = 0xc000;
pub(crate) const MSIX_BASE: u64 = 0xfebf_0000;
pub(crate) const MODERN_BASE: u64 = 0xfe00_0000;

impl Guest {
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with(device, Generation::Transitional, ram())
    }

    /// A machine with this device, running, its BARs mapped, without a driver.
    pub(crate) fn with(
        device: Box<dyn VirtioDevice>,
        generation: Generation,
        ram: GuestRamRef,
    ) -> Self {
        let guest = Self::cold(device, generation, ram);
        let function = guest.function.clone();
        function.lock().unwrap().open().unwrap();
        guest.config_write(0x10, u32::from(LEGACY_PORTS));
        guest.config_write(0x14, u32::try_from(MSIX_BASE).unwrap());
        guest.config_write(0x20, u32::try_from(MODERN_BASE).unwrap());
        guest.config_write(0x04, 7);
        go_on(&function);
        guest
    }

    /// A machine with this device, as a destination has it before anything was loaded.
    pub(crate) fn cold(
        device: Box<dyn VirtioDevice>,
        generation: Generation,
        ram: GuestRamRef,
    ) -> Self {
        let (io, bridge) = (Arc::new(IoBus::new()), Arc::new(FakeBridge::default()));
        let bus = PciBus::new(io.clone(), bridge.clone(), bridge.clone()).unwrap();
        let (msi, io_events) = (FakeMsi::default(), Arc::new(FakeIoEvents::default()));
        let sizes = device.queue_sizes();
        let wiring = Wiring {
            ram: ram.clone(),
            msi: Arc::new(msi.clone()),
            io_events: io_events.clone(),
            pin: bus.inta(3),
            slot: 3,
            generation,
        };
        let function = Arc::new(Mutex::new(VirtioPci::new(device, wiring).unwrap()));
        bus.attach(3, 0, function.clone()).unwrap();
        let queues = sizes
            .iter()
            .map(|size| DriverQueue { size: *size, next_desc: 0, avail: 0, used: 0 })
            .collect();
        Self { ram, msi, io_events, bridge, io, bus, function, queues, next_buffer: BUFFERS }
    }

    pub(crate) fn config_write(&self, register: u32, value: u32) {
        self.io.pio_write(0xcf8, &(0x8000_1800 | register).to_le_bytes());
        self.io.pio_write(0xcfc, &value.to_le_bytes());
    }

    pub(crate) fn config_read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.io.pio_write(0xcf8, &(0x8000_1800 | register).to_le_bytes());
        self.io.pio_read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    /// Whether the function's INTx line (PIRQC, for slot 3) is high.
    pub(crate) fn intx(&self) -> bool {
        self.bridge.0.lock().unwrap()[2]
    }

    pub(crate) fn write16(&self, offset: u64, value: u16) {
        self.io.mmio_write(MODERN_BASE + offset, &value.to_le_bytes());
    }

    pub(crate) fn write32(&self, offset: u64, value: u32) {
        self.io.mmio_write(MODERN_BASE + offset, &value.to_le_bytes());
    }

    pub(crate) fn write8(&self, offset: u64, value: u8) {
        self.io.mmio_write(MODERN_BASE + offset, &[value]);
    }

    pub(crate) fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.io.mmio_read(MODERN_BASE + offset, &mut data);
        data
    }

    pub(crate) fn legacy_read<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.io.pio_read(LEGACY_PORTS + offset, &mut data);
        data
    }

    pub(crate) fn legacy_write(&self, offset: u16, data: &[u8]) {
        self.io.pio_write(LEGACY_PORTS + offset, data);
    }

    pub(crate) fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    /// What the device offers to a modern driver.
    pub(crate) fn offered(&self) -> u64 {
        let mut offered = 0;
        for half in 0..2 {
            self.write32(0, half);
            offered |= u64::from(u32::from_le_bytes(self.read(4))) << (32 * half);
        }
        offered
    }

    pub(crate) fn ring(queue: usize) -> u64 {
        RINGS + RING * u64::try_from(queue).unwrap()
    }

    /// Does what a modern driver does: every queue, MSI-X with vector n + 1 for queue n as far as
    /// there are any, vector 0 for changes of the configuration.
    pub(crate) fn start(&mut self, features: u64) {
        self.write8(0x14, 0);
        self.write8(0x14, 1 | 2);
        let features = features | features::VERSION_1;
        for (half, bits) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write32(8, half);
            self.write32(0xc, u32::try_from(bits).unwrap());
        }
        self.write8(0x14, 1 | 2 | status::FEATURES_OK);
        assert_eq!(self.status() & status::FEATURES_OK, status::FEATURES_OK);
        let vectors = self.function.lock().unwrap().device().vectors();
        if vectors > 0 {
            for vector in 0..u64::from(vectors) {
                let entry = MSIX_BASE + 16 * vector;
                self.io.mmio_write(entry, &0xfee0_0000_u64.to_le_bytes());
                let data = 0x40 + u32::try_from(vector).unwrap();
                self.io.mmio_write(entry + 8, &data.to_le_bytes());
                self.io.mmio_write(entry + 12, &0_u32.to_le_bytes());
            }
            let control = self.config_read(0x98);
            self.config_write(0x98, control | 0x8000_0000);
            self.write16(0x10, 0);
        }
        for queue in 0..self.queues.len() {
            let number = u16::try_from(queue).unwrap();
            self.write16(0x16, number);
            let size = u16::from_le_bytes(self.read(0x18));
            self.queues[queue] = DriverQueue { size, next_desc: 0, avail: 0, used: 0 };
            self.write16(0x18, size);
            if vectors > 0 {
                self.write16(0x1a, (number + 1).min(vectors - 1));
            }
            for (register, offset) in [(0x20, 0), (0x28, 0x1000), (0x30, 0x2000)] {
                self.ram
                    .write_slice(&[0; 0x1000], GuestAddress(Self::ring(queue) + offset))
                    .unwrap();
                self.write32(register, u32::try_from(Self::ring(queue) + offset).unwrap());
                self.write32(register + 4, 0);
            }
            self.write16(0x1c, 1);
        }
        self.write8(0x14, 1 | 2 | status::FEATURES_OK | status::DRIVER_OK);
        self.serve();
    }

    /// Allocates a buffer with these bytes.
    pub(crate) fn buffer(&mut self, bytes: &[u8]) -> u64 {
        let at = self.next_buffer;
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
        self.next_buffer += u64::try_from(bytes.len()).unwrap().next_multiple_of(16);
        assert!(self.next_buffer < PIECE);
        at
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(crate) fn set_desc(
        &self,
        table: u64,
        index: u16,
        at: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let entry = GuestAddress(table + 16 * u64::from(index));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&at.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.ram.write_slice(&bytes, entry).unwrap();
    }

    /// Makes a chain of `(address, length, device-writable)` available; returns its head.
    pub(crate) fn add(&mut self, queue: usize, pieces: &[(u64, u32, bool)]) -> u16 {
        let (table, size) = (Self::ring(queue), self.queues[queue].size);
        let head = self.queues[queue].next_desc;
        for (i, (at, len, writable)) in pieces.iter().enumerate() {
            let index = self.queues[queue].next_desc;
            let next = (index + 1) % size;
            let more = u16::from(i + 1 < pieces.len());
            self.set_desc(table, index, *at, *len, more | (2 * u16::from(*writable)), next);
            self.queues[queue].next_desc = next;
        }
        self.make_available(queue, head);
        head
    }

    /// The same through an indirect table.
    pub(crate) fn add_indirect(&mut self, queue: usize, pieces: &[(u64, u32, bool)]) -> u16 {
        let table = self.buffer(&vec![0; 16 * pieces.len()]);
        for (index, (at, len, writable)) in (0..).zip(pieces) {
            let more = u16::from(usize::from(index) + 1 < pieces.len());
            self.set_desc(table, index, *at, *len, more | (2 * u16::from(*writable)), index + 1);
        }
        let head = self.queues[queue].next_desc;
        self.queues[queue].next_desc = (head + 1) % self.queues[queue].size;
        let len = 16 * u32::try_from(pieces.len()).unwrap();
        self.set_desc(Self::ring(queue), head, table, len, 4, 0);
        self.make_available(queue, head);
        head
    }

    pub(crate) fn make_available(&mut self, queue: usize, head: u16) {
        let state = &mut self.queues[queue];
        let avail = Self::ring(queue) + 0x1000;
        let entry = avail + 4 + 2 * u64::from(state.avail % state.size);
        self.ram.write_obj(head, GuestAddress(entry)).unwrap();
        state.avail = state.avail.wrapping_add(1);
        self.ram.write_obj(state.avail, GuestAddress(avail + 2)).unwrap();
    }

    /// Asks for an interrupt when `more` requests and one have been given back (virtio 1.2, 2.7.8).
    pub(crate) fn want_interrupt(&self, queue: usize, more: u16) {
        let state = &self.queues[queue];
        let event = Self::ring(queue) + 0x1000 + 4 + 2 * u64::from(state.size);
        self.ram.write_obj(state.used.wrapping_add(more), GuestAddress(event)).unwrap();
    }

    /// Rings, and does what the I/O thread does then.
    pub(crate) fn kick(&self, queue: usize) {
        self.write16(0x3000 + 4 * u64::try_from(queue).unwrap(), u16::try_from(queue).unwrap());
        self.serve();
    }

    /// Serves every doorbell that rings.
    pub(crate) fn serve(&self) {
        let mut function = self.function.lock().unwrap();
        if function.device().serves_itself() {
            return;
        }
        for queue in 0..self.queues.len() {
            if function.core.kick_fd(queue).is_some_and(|fd| fd.read().is_ok()) {
                function.device().kick(queue);
            }
        }
    }

    /// What the device has given back since the last call: heads and lengths.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let used = Self::ring(queue) + 0x2000;
        let index: u16 = self.ram.read_obj(GuestAddress(used + 2)).unwrap();
        let state = &mut self.queues[queue];
        let mut given = Vec::new();
        while state.used != index {
            let entry = used + 4 + 8 * u64::from(state.used % state.size);
            let head: u32 = self.ram.read_obj(GuestAddress(entry)).unwrap();
            let len: u32 = self.ram.read_obj(GuestAddress(entry + 4)).unwrap();
            given.push((u16::try_from(head).unwrap(), len));
            state.used = state.used.wrapping_add(1);
        }
        given
    }

    /// Waits until the device has given `n` requests back.
    pub(crate) fn wait_used(&mut self, queue: usize, n: usize) -> Vec<(u16, u32)> {
        let mut given = Vec::new();
        until("the device gives requests back", || {
            given.extend(self.used(queue));
            given.len() >= n
        });
        given
    }

    /// The same driver goes on with this device.
    pub(crate) fn driven_like(mut self, source: &Guest) -> Self {
        self.queues.clone_from(&source.queues);
        self.next_buffer = source.next_buffer;
        self
    }

    pub(crate) fn section(&self) -> VirtioSection {
        VirtioSection::new(self.function.clone(), self.bus.clone())
    }

    pub(crate) fn save(&self) -> Vec<u8> {
        self.save_for(Audience::Qemu)
    }

    pub(crate) fn save_for(&self, audience: Audience) -> Vec<u8> {
        self.section().save(audience).unwrap()
    }

    pub(crate) fn load(&self, body: &[u8]) -> Result<(), StateError> {
        let mut section = self.section();
        let mut source = SliceSource::new(body);
        let state = section.decode(section.version(), &mut source)?;
        assert!(source.rest().is_empty(), "{} bytes are left", source.rest().len());
        section.apply(state)
    }

    /// Forgets which pages were written.
    pub(crate) fn clean(&self) {
        for region in self.ram.iter() {
            let bitmap: &AtomicBitmap = region.deref().bitmap();
            bitmap.reset();
        }
    }

    /// The pages written since [`clean`](Self::clean), as guest addresses.
    pub(crate) fn dirty(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for region in self.ram.iter() {
            for page in 0..region.len() >> 12 {
                if region.deref().bitmap().is_bit_set(usize::try_from(page).unwrap()) {
                    pages.insert(region.start_addr().0 + (page << 12));
                }
            }
        }
        pages
    }
}

/// Waits for a condition that another thread brings about.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::yield_now();
    }
}
