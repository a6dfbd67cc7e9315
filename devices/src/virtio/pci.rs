//! virtio over PCI (virtio 1.2, 4.1): the function, its BARs, and the doorbells.
//!
//! A transitional function answers a legacy driver at BAR 0 (ports) and a modern one at BAR 4
//! (memory); see [`registers`](super::registers) for what stands there. Both come down to the same
//! few steps: [`set_status`](VirtioPci::set_status), [`enable_queue`](VirtioPci::enable_queue) and
//! so on, which restoring a state uses as well.

use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::core::{Core, VirtioError, status};
use super::device::{BackendError, VirtioDevice};
use super::features;
use super::interrupt::Interrupts;
use super::queue::RingAddresses;
use crate::device::Device;
use crate::irq::{IoAddress, IoEvents, MsiController};
use crate::memory::GuestRamRef;
use crate::pci::{
    BarKind, IntxPin, Msix, PciConfig, PciFunction, PciIdentity, command, msix_capability,
};

/// Red Hat's vendor id, which is virtio's.
const VENDOR: u16 = 0x1af4;
/// The subsystem id of the board's modern-only functions.
const BOARD_SUBSYSTEM: u16 = 0x1100;
/// Modern device ids are the virtio id plus this.
const MODERN_ID: u16 = 0x1040;
/// The vendor-specific capability (PCI 3.0, appendix H).
const VENDOR_CAPABILITY: u8 = 0x09;
/// Capability types (virtio 1.2, 4.1.4).
mod cfg_type {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const WINDOW: u8 = 5;
}

/// The BAR of the legacy registers.
pub(super) const LEGACY_BAR: usize = 0;
const MSIX_BAR: u8 = 1;
/// The BAR of the modern registers.
pub(super) const MODERN_BAR: usize = 4;
/// Four areas of one page each: common, ISR, device, notify.
const AREA: u32 = 0x1000;
const NOTIFY_AREA: u64 = 0x3000;
/// Distance between two queues' doorbells.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
/// Legacy doorbell, offset in BAR 0.
const LEGACY_NOTIFY: u16 = 16;
/// Legacy registers in front of the device's configuration, with MSI-X and without.
pub(super) const LEGACY_HEADER: [u64; 2] = [24, 20];
/// Where the capabilities are.
const COMMON_CAPABILITY: u8 = 0x40;
const WINDOW_CAPABILITY: u8 = 0x84;
const MSIX_CAPABILITY: u8 = 0x98;
/// The only capability of a legacy-only function.
const LEGACY_MSIX_CAPABILITY: u8 = 0x40;
/// The window's data register.
const WINDOW_DATA: usize = 0x94;
const COMMAND: usize = 0x04;

/// Which drivers a function is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Generation {
    /// Legacy and modern ones; the board's default.
    #[default]
    Transitional,
    /// Legacy ones only (`disable-modern=on`).
    Legacy,
    /// Modern ones only (`disable-legacy=on`).
    Modern,
}

/// What a function needs from its machine.
pub struct Wiring {
    /// Guest memory.
    pub ram: GuestRamRef,
    /// Where MSI-X vectors come from.
    pub msi: Arc<dyn MsiController>,
    /// Where doorbells are registered.
    pub io_events: Arc<dyn IoEvents>,
    /// Its INTA.
    pub pin: IntxPin,
    /// The PCI slot, for the section's key.
    pub slot: u8,
    /// Which drivers it is for.
    pub generation: Generation,
}

/// A queue as a modern driver describes it, before and after it enables it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ModernQueue {
    /// The size; 0 until the driver writes it.
    pub(super) size: u16,
    pub(super) enabled: bool,
    /// Low and high halves, as they are written.
    pub(super) desc: [u32; 2],
    pub(super) avail: [u32; 2],
    pub(super) used: [u32; 2],
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    pub(super) config: PciConfig,
    pub(super) core: Arc<Core>,
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) generation: Generation,
    pub(super) slot: u8,
    io_events: Arc<dyn IoEvents>,
    /// Where the message control register of MSI-X is, if there is MSI-X.
    msix_control: Option<usize>,
    /// Everything that is offered to some driver.
    pub(super) offered: u64,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    /// What a modern driver wrote, half by half.
    pub(super) driver_features: [u32; 2],
    pub(super) queue_select: u16,
    pub(super) modern: Vec<ModernQueue>,
    /// Where BAR 0 and BAR 4 are.
    legacy_base: Option<u16>,
    modern_base: Option<u64>,
    doorbells: Vec<Doorbell>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Doorbell {
    queue: usize,
    address: IoAddress,
    value: Option<u16>,
}

impl VirtioPci {
    /// Makes a function of `device`. The caller attaches it to the bus, gives it to the I/O thread
    /// by [`VirtioEvents`], and opens its host side when the VM is to run here.
    pub fn new(mut device: Box<dyn VirtioDevice>, wiring: Wiring) -> Result<Self, VirtioError> {
        let kind = device.kind();
        let Wiring { ram, msi, io_events, pin, slot, generation } = wiring;
        let msix = match device.vectors() {
            0 => None,
            n => Some(Msix::new(n, msi.as_ref()).map_err(|source| VirtioError::Resource {
                name: kind.name,
                what: "an MSI-X vector",
                source,
            })?),
        };
        let (config, msix_control) = config_space(device.as_ref(), generation, msix.as_ref());
        let interrupts = Interrupts::new(pin, msix);
        let core = Arc::new(Core::new(kind.name, ram, &device.queue_sizes(), interrupts)?);
        device.connect(core.clone())?;
        let version_1 = if generation == Generation::Legacy { 0 } else { features::VERSION_1 };
        Ok(Self {
            config,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: [0; 2],
            queue_select: 0,
            modern: vec![ModernQueue::default(); core.len()],
            offered: device.features() | features::COMMON | version_1,
            core,
            device,
            generation,
            slot,
            io_events,
            msix_control,
            legacy_base: None,
            modern_base: None,
            doorbells: Vec::new(),
        })
    }

    /// The device itself.
    pub fn device(&mut self) -> &mut dyn VirtioDevice {
        self.device.as_mut()
    }

    /// Whether the VM stands still.
    pub fn is_paused(&self) -> bool {
        self.core.is_paused()
    }

    /// Opens the host side. On a destination this comes last.
    pub fn open(&mut self) -> Result<(), BackendError> {
        self.device.open()
    }

    /// Its configuration space.
    pub fn configuration(&self) -> &PciConfig {
        &self.config
    }

    /// Where in guest memory the queues' positions stand.
    pub fn positions(&self) -> Vec<u64> {
        let queues = (0..self.core.len()).filter_map(|n| self.core.queue(n));
        queues.filter_map(|queue| queue.position_at()).collect()
    }

    /// A guest that was migrated here has started.
    pub fn guest_started(&mut self) -> Result<(), BackendError> {
        self.device.guest_started()
    }

    /// What is left of [`resume`](Device::resume) when the guest runs: workers are woken, and the queues are looked at
    /// for what was rung while the device was paused. A guest that rings before is heard then. The
    /// [doorbells](Self::update_doorbells) follow.
    pub fn catch_up(&mut self) {
        self.device.unquiesce();
        // Nothing is taken from the queues of a device without a driver, and each ring wakes a thread.
        if self.core.is_live() {
            self.kick_all();
        }
    }

    /// Asks for a flush that nobody waits for.
    pub fn flush_ahead(&mut self) {
        self.device.flush_ahead();
    }

    /// Closes the host side. The VM must be paused.
    pub fn close(&mut self) -> Result<(), BackendError> {
        self.device.close()
    }

    /// What this function offers to a legacy driver, and to a modern one.
    pub(super) fn offer(&self, modern: bool) -> u64 {
        if modern {
            self.offered & !(features::LEGACY_ONLY | self.device.kind().legacy_features)
        } else {
            self.offered & 0xffff_ffff
        }
    }

    /// The driver accepts `wanted`, as far as it was offered.
    pub(super) fn set_features(&mut self, wanted: u64) {
        let accepted = wanted & self.offered & !features::BAD_FEATURE;
        self.core.set_features(accepted);
        self.device.features_accepted(accepted);
    }

    /// The driver writes the status register; 0 resets the device.
    pub(super) fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset_device();
            return;
        }
        let kept = self.core.status() & status::NEEDS_RESET;
        self.core.set_status(value | kept);
        self.update_doorbells();
        if value & status::DRIVER_OK != 0 {
            self.kick_all();
        }
    }

    /// Everything a driver has set up is forgotten. MSI-X and BARs are PCI's, and stay.
    pub(super) fn reset_device(&mut self) {
        self.device.quiesce();
        for index in 0..self.core.len() {
            if let Some(mut queue) = self.core.queue(index) {
                queue.reset();
            }
        }
        self.core.set_status(0);
        self.core.set_features(0);
        self.core.set_broken(false);
        self.core.interrupts().lock().reset();
        self.modern.fill(ModernQueue::default());
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = [0; 2];
        self.queue_select = 0;
        self.device.features_accepted(0);
        self.device.reset();
        self.device.unquiesce();
        self.update_doorbells();
    }

    /// The ring of queue `index` is at `at`, from now on.
    pub(super) fn enable_queue(&mut self, index: usize, at: RingAddresses) {
        let Some(mut queue) = self.core.queue(index) else { return };
        self.core.apply_features(&mut queue);
        let enabled = queue.enable(self.core.ram(), at);
        drop(queue);
        if let Err(error) = enabled {
            self.core.fail(&format_args!("queue {index}: {error}"));
        }
        self.update_doorbells();
    }

    /// One queue is forgotten.
    pub(super) fn reset_queue(&mut self, index: usize) {
        self.device.quiesce();
        if let Some(mut queue) = self.core.queue(index) {
            let vector = queue.vector;
            queue.reset();
            queue.vector = vector;
            self.core.apply_features(&mut queue);
        }
        self.device.unquiesce();
        self.update_doorbells();
    }

    pub(super) fn kick_all(&self) {
        for index in 0..self.core.len() {
            self.core.kick(index);
        }
    }

    /// Whether interrupts go out by MSI-X.
    pub(super) fn msix_enabled(&self) -> bool {
        self.core.interrupts().lock().msix.as_ref().is_some_and(Msix::is_enabled)
    }

    /// The message control register of MSI-X.
    pub(super) fn msix_control(&self) -> u16 {
        self.msix_control.map_or(0, |at| self.config.word(at))
    }

    /// A vector as a driver may choose it: one that exists, or none.
    pub(super) fn valid_vector(&self, vector: u16) -> u16 {
        if vector < self.device.vectors() { vector } else { super::queue::NO_VECTOR }
    }

    /// What follows from the command register and from MSI-X control.
    pub(super) fn follow_config(&mut self) {
        let command = self.config.command();
        let master = command & command::MASTER != 0;
        self.core.set_disabled(!master);
        if !master {
            self.core.set_status(self.core.status() & !status::DRIVER_OK);
        }
        let mut interrupts = self.core.interrupts().lock();
        interrupts.pin.set_disabled(command & command::INTX_DISABLE != 0);
        if let Some(at) = self.msix_control {
            interrupts.set_msix_control(self.config.word(at));
        }
        drop(interrupts);
        self.update_doorbells();
    }

    /// Registers the doorbells of the queues that are in use where the BARs are, and takes the
    /// others back. A doorbell that the kernel does not take rings by way of the BAR; so do all that are new while
    /// the VM is paused, until the guest runs: each waits for the kernel to let go of its list of doorbells.
    pub fn update_doorbells(&mut self) {
        let mut wanted = Vec::new();
        let started = self.core.status() & status::DRIVER_OK != 0 && !self.core.is_broken();
        for queue in 0..self.core.len() {
            let ready = self.core.queue(queue).is_some_and(|queue| queue.is_ready());
            let (true, Ok(number)) = (started && ready, u16::try_from(queue)) else { continue };
            if let Some(port) = self.legacy_base.and_then(|base| base.checked_add(LEGACY_NOTIFY)) {
                wanted.push(Doorbell { queue, address: IoAddress::Pio(port), value: Some(number) });
            }
            if let Some(base) = self.modern_base {
                let offset = NOTIFY_AREA + u64::from(NOTIFY_MULTIPLIER) * u64::from(number);
                let address = IoAddress::Mmio(base.saturating_add(offset));
                wanted.push(Doorbell { queue, address, value: None });
            }
        }
        let (keep, drop): (Vec<_>, Vec<_>) =
            self.doorbells.drain(..).partition(|doorbell| wanted.contains(doorbell));
        for Doorbell { queue, address, value } in drop {
            if let Some(fd) = self.core.kick_fd(queue)
                && let Err(error) = self.io_events.unregister(fd, address, value)
            {
                tracing::warn!("cannot take back the doorbell at {address:x?}: {error}");
            }
        }
        self.doorbells = keep;
        if self.core.is_paused() {
            return;
        }
        for doorbell in wanted {
            let Doorbell { queue, address, value } = doorbell;
            if !self.doorbells.contains(&doorbell)
                && let Some(fd) = self.core.kick_fd(queue)
            {
                match self.io_events.register(fd, address, value) {
                    Ok(()) => self.doorbells.push(doorbell),
                    Err(error) => {
                        tracing::debug!("no doorbell in the kernel at {address:x?}: {error}");
                    }
                }
            }
        }
    }

    /// The access that the PCI configuration window describes: BAR 4, an offset and 1, 2 or 4
    /// bytes (virtio 1.2, 4.1.4.9).
    fn window(&self) -> Option<(u64, usize)> {
        let bytes = self.config.bytes();
        let at = usize::from(WINDOW_CAPABILITY);
        let dword = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let (bar, offset, length) = (bytes[at + 4], dword(at + 8), dword(at + 12));
        let length = usize::try_from(length).ok()?;
        (self.generation != Generation::Legacy
            && usize::from(bar) == MODERN_BAR
            && matches!(length, 1 | 2 | 4)
            && u64::from(offset).is_multiple_of(u64::try_from(length).ok()?)
            && offset < 4 * AREA)
            .then_some((offset.into(), length))
    }
}

/// The configuration space of `device`, and where its MSI-X control register is.
fn config_space(
    device: &dyn VirtioDevice,
    generation: Generation,
    msix: Option<&Msix>,
) -> (PciConfig, Option<usize>) {
    let kind = device.kind();
    let mut config = PciConfig::new(match generation {
        Generation::Modern => PciIdentity {
            id: (VENDOR, MODERN_ID + kind.id),
            revision: 1,
            class: kind.class,
            prog_if: 0,
            subsystem: (VENDOR, BOARD_SUBSYSTEM),
        },
        Generation::Transitional | Generation::Legacy => PciIdentity {
            id: (VENDOR, kind.transitional_id),
            revision: 0,
            class: kind.class,
            prog_if: 0,
            subsystem: (VENDOR, kind.id),
        },
    });
    config.set_interrupt_pin(1);
    if generation != Generation::Modern {
        let header = LEGACY_HEADER[usize::from(msix.is_none())];
        let size = header + u64::try_from(device.config().len()).unwrap_or(0);
        config.add_bar(LEGACY_BAR, BarKind::Io, size.next_power_of_two());
    }
    if msix.is_some() {
        config.add_bar(MSIX_BAR.into(), BarKind::Memory32, AREA.into());
    }
    if generation != Generation::Legacy {
        config.add_bar(MODERN_BAR, BarKind::Memory64, u64::from(4 * AREA));
        let mut at = COMMON_CAPABILITY;
        for (area, kind) in
            [cfg_type::COMMON, cfg_type::ISR, cfg_type::DEVICE].into_iter().enumerate()
        {
            let area = u32::try_from(area).unwrap_or(0) * AREA;
            config.add_capability(at, VENDOR_CAPABILITY, &capability(kind, area, &[]));
            at += 0x10;
        }
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        let notify = capability(cfg_type::NOTIFY, 3 * AREA, &multiplier);
        config.add_capability(at, VENDOR_CAPABILITY, &notify);
        let mut window = capability(cfg_type::WINDOW, 0, &[0; 4]);
        // Bar, padding, offset, length and data are the guest's.
        window[2..].fill(0);
        config.add_capability(WINDOW_CAPABILITY, VENDOR_CAPABILITY, &window);
        let start = usize::from(WINDOW_CAPABILITY);
        config.set_writable(start + 4, &[0xff]);
        config.set_writable(start + 8, &[0xff; 12]);
    }
    let control = msix.map(|msix| {
        let at = match generation {
            Generation::Legacy => LEGACY_MSIX_CAPABILITY,
            _ => MSIX_CAPABILITY,
        };
        config.add_capability(at, msix_capability::ID, &msix.capability(MSIX_BAR));
        config.set_writable(usize::from(at) + 3, &[msix_capability::CONTROL_WRITABLE]);
        usize::from(at) + 2
    });
    (config, control)
}

/// A virtio capability behind id and next pointer.
fn capability(kind: u8, offset: u32, extra: &[u8]) -> Vec<u8> {
    let len = 16 + u8::try_from(extra.len()).unwrap_or(0);
    let bar = u8::try_from(MODERN_BAR).unwrap_or(0);
    let mut body = vec![len, kind, bar, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&AREA.to_le_bytes());
    body.extend_from_slice(extra);
    body
}

impl PciFunction for VirtioPci {
    fn name(&self) -> &str {
        self.device.kind().name
    }

    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        let touched = offset..offset.saturating_add(data.len());
        if touched.contains(&WINDOW_DATA)
            && let Some((at, length)) = self.window()
        {
            let mut value = [0; 4];
            let value = &mut value[..length];
            self.modern_read(at, value);
            self.config.set_now(WINDOW_DATA, value);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        let touched = offset..offset.saturating_add(data.len());
        let control = self.msix_control.map_or(touched.start, |at| at + 1);
        if touched.contains(&COMMAND)
            || touched.contains(&(COMMAND + 1))
            || self.msix_control.is_some() && touched.contains(&control)
        {
            self.follow_config();
        }
        if touched.contains(&WINDOW_DATA)
            && let Some((at, length)) = self.window()
        {
            let mut value = [0; 4];
            self.config.read(WINDOW_DATA, &mut value);
            self.modern_write(at, &value[..length]);
        }
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        match bar {
            LEGACY_BAR => self.legacy_read(offset, data),
            MODERN_BAR => self.modern_read(offset, data),
            _ => match &self.core.interrupts().lock().msix {
                Some(msix) => msix.read(offset, data),
                None => data.fill(0xff),
            },
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        match bar {
            LEGACY_BAR => self.legacy_write(offset, data),
            MODERN_BAR => self.modern_write(offset, data),
            _ => {
                if let Some(msix) = &mut self.core.interrupts().lock().msix {
                    msix.write(offset, data);
                }
            }
        }
    }

    fn bar_mapped(&mut self, bar: usize, base: Option<u64>) {
        match bar {
            LEGACY_BAR => self.legacy_base = base.and_then(|base| u16::try_from(base).ok()),
            MODERN_BAR => self.modern_base = base,
            _ => return,
        }
        self.update_doorbells();
    }

    fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
        if let Some(msix) = &mut self.core.interrupts().lock().msix {
            msix.reset();
        }
        self.follow_config();
    }
}

impl Device for VirtioPci {
    fn reset(&mut self) {
        PciFunction::reset(self);
    }

    fn pause(&mut self) {
        self.core.set_paused(true);
        self.device.quiesce();
        self.device.flush();
    }

    fn resume(&mut self) {
        self.core.set_paused(false);
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.core.set_status(0);
        self.update_doorbells();
    }
}

/// What the I/O thread serves of a function: its queues' doorbells and its host side.
pub struct VirtioEvents(pub Arc<Mutex<VirtioPci>>);

/// The event data of the host side; doorbells have their queue's number.
const HOST_SIDE: u32 = u32::MAX;

impl MutEventSubscriber for VirtioEvents {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        let mut function = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if events.data() == HOST_SIDE {
            function.device.event();
            return;
        }
        let Ok(queue) = usize::try_from(events.data()) else { return };
        // An empty counter is a race with somebody else's read, and harmless.
        let rung = function.core.kick_fd(queue).is_some_and(|fd| fd.read().is_ok());
        if rung {
            function.device.kick(queue);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let function = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut add = |events| {
            if let Err(error) = ops.add(events) {
                tracing::error!("{}: nobody will listen to it: {error}", function.name());
            }
        };
        if !function.device.serves_itself() {
            for (queue, number) in (0..function.core.len()).zip(0..) {
                if let Some(fd) = function.core.kick_fd(queue) {
                    add(Events::with_data(fd, number, EventSet::IN));
                }
            }
        }
        if let Some(fd) = function.device.event_fd() {
            add(Events::with_data_raw(fd, HOST_SIDE, EventSet::IN));
        }
    }
}
