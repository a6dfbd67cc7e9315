//! The section of a virtio device, laid out as QEMU 7.2's:
//!
//! ```text
//! PCI device block │ MSI-X table, pending bits, config vector │ status, isr, queue select,
//! features 31:0 │ device configuration │ queues │ the device's own part │ subsections
//! ```
//!
//! QEMU's arrays of queues have room for 1024, 45 KB in all. Between two mini-vmms, while the guest stands still, those
//! that there are travel in a subsection of their own, some 50 bytes each.
//!
//! What is derived (rings, doorbells, interrupt routes, BARs) is rebuilt by the functions that a
//! driver's register writes use.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use migration::vmstate::{
    Audience, ByteSource, Counted, Decoder, Describer, Description, Encoder, FieldError,
    LayoutDigest, Pad, Section, SectionId, StateError, Tailed, check_version,
};

use super::core::status;
use super::device::{Part, PartDecoder};
use super::features;
use super::pci::{Generation, ModernQueue, VirtioPci};
use super::queue::{MAX_QUEUE_SIZE, NO_VECTOR, RingAddresses, VirtQueue};
use crate::pci::{PciBus, PciDeviceState, PciFunction};

/// Queue arrays always have room for as many queues as a virtio device may have.
const QUEUES: usize = 1024;
/// A device configuration larger than this is not one.
const MAX_CONFIG: u32 = 4096;

/// The fields between MSI-X and the device configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u8,
    isr: u8,
    queue_sel: u16,
    /// Bits 31 to 0.
    guest_features: u32,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct QueueState {
    num: u32,
    desc: u64,
    last_avail_idx: u16,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct RingState {
    avail: u64,
    used: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct ModernQueueState {
    num: u16,
    pad: Pad<1>,
    enabled: bool,
    desc: [u32; 2],
    avail: [u32; 2],
    used: [u32; 2],
}

impl From<ModernQueue> for ModernQueueState {
    fn from(queue: ModernQueue) -> Self {
        let ModernQueue { size, enabled, desc, avail, used } = queue;
        Self { num: size, pad: Pad, enabled, desc, avail, used }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ModernState {
    dfselect: u32,
    gfselect: u32,
    guest_features: [u32; 2],
    vqs: Tailed<ModernQueueState, QUEUES>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct PciSubsections {
    #[serde(rename = "virtio_pci/modern_state")]
    modern: Option<ModernState>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct ExtraState {
    subsections: PciSubsections,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct Subsections {
    #[serde(rename = "virtio/64bit_features")]
    features: Option<u64>,
    #[serde(rename = "virtio/virtqueues")]
    rings: Option<Tailed<RingState, QUEUES>>,
    #[serde(rename = "virtio/ringsize")]
    default_sizes: Option<Tailed<u32, QUEUES>>,
    #[serde(rename = "virtio/broken")]
    broken: Option<bool>,
    #[serde(rename = "virtio/extra_state")]
    extra: Option<ExtraState>,
    #[serde(rename = "virtio/started")]
    started: Option<bool>,
    #[serde(rename = "virtio/disabled")]
    disabled: Option<bool>,
}

/// What another mini-vmm gets in place of QEMU's arrays. Not a part of [`Subsections`], nor of the layout's digest: only
/// who says that it reads it is sent it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct Short {
    #[serde(rename = "mini-vmm/virtqueues")]
    queues: Option<FewQueues>,
}

/// The queues of a device with modern registers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct FewQueues {
    rings: Counted<u16, RingState, QUEUES>,
    dfselect: u32,
    gfselect: u32,
    guest_features: [u32; 2],
    vqs: Counted<u16, ModernQueueState, QUEUES>,
}

impl FewQueues {
    /// Puts QEMU's arrays, of a device with so many queues, where these would have been.
    fn expand(self, queues: usize, to: &mut Subsections) -> Result<(), FieldError> {
        let FewQueues { rings, dfselect, gfselect, guest_features, vqs } = self;
        let field = |name: &str| format!("mini-vmm/virtqueues.{name}");
        for (name, found) in [("rings", rings.0.len()), ("vqs", vqs.0.len())] {
            if found != queues {
                return Err(FieldError::new(field(name), queues, found));
            }
        }
        let there = to.rings.is_some() || to.default_sizes.is_some() || to.extra.is_some();
        if there {
            return Err(FieldError::new(field("rings"), "these queues once", "QEMU's arrays too"));
        }
        to.rings = Some(Tailed::new(rings.0, RingState::default()));
        let vqs = Tailed::new(vqs.0, ModernQueueState::from(ModernQueue::default()));
        let modern = Some(ModernState { dfselect, gfselect, guest_features, vqs });
        to.extra = Some(ExtraState { subsections: PciSubsections { modern } });
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct MsixState {
    table: Vec<u8>,
    pba: Vec<u8>,
    config_vector: u16,
}

/// A decoded section.
struct State {
    pci: PciDeviceState,
    msix: Option<MsixState>,
    registers: Registers,
    config: Vec<u8>,
    queues: Vec<(QueueState, u16)>,
    part: Part,
    subsections: Subsections,
}

impl State {
    fn features(&self) -> u64 {
        self.subsections.features.unwrap_or(self.registers.guest_features.into())
    }

    /// Where queue `index` is.
    fn ring(&self, index: usize, size: u16) -> RingAddresses {
        let desc = self.queues.get(index).map_or(0, |(queue, _)| queue.desc);
        let modern = self.features() & features::VERSION_1 != 0;
        match self.subsections.rings.as_ref().and_then(|rings| rings.get(index)) {
            Some(ring) if modern => RingAddresses { desc, avail: ring.avail, used: ring.used },
            _ => RingAddresses::legacy(desc, size),
        }
    }
}

/// The section `0000:00:SS.0/virtio-…` of one function.
pub struct VirtioSection {
    function: Arc<Mutex<VirtioPci>>,
    bus: Arc<PciBus>,
    id: SectionId,
    version: u32,
}

impl VirtioSection {
    /// The section of `function`, which is attached to `bus`.
    pub fn new(function: Arc<Mutex<VirtioPci>>, bus: Arc<PciBus>) -> Self {
        let locked = function.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let kind = locked.device.kind();
        let id = SectionId::new(format!("0000:00:{:02x}.0/{}", locked.slot, kind.name), 0);
        drop(locked);
        Self { function, bus, id, version: kind.version }
    }

    fn lock(&self) -> Result<MutexGuard<'_, VirtioPci>, StateError> {
        self.function.lock().map_err(|_| {
            self.device_error("a thread panicked while it worked on the device".to_owned())
        })
    }

    fn device_error(&self, what: String) -> StateError {
        StateError::Device { section: self.id.to_string(), what, source: None }
    }

    fn field_error(&self, error: FieldError) -> StateError {
        StateError::Field { section: self.id.to_string(), error }
    }

    fn read(
        &self,
        function: &VirtioPci,
        version: u32,
        source: &mut dyn ByteSource,
    ) -> Result<State, StateError> {
        let mut from = Decoder::new(&self.id, version, source);
        let pci: PciDeviceState = from.get("pci")?;
        // The rest is laid out as the capabilities say: they must be ours.
        function.config.check(&pci).map_err(|error| self.field_error(error))?;
        let vectors = usize::from(function.device.vectors());
        let msix = if vectors == 0 {
            None
        } else {
            Some(MsixState {
                table: from.get_bytes(16 * vectors)?,
                pba: from.get_bytes(vectors.div_ceil(8))?,
                config_vector: from.get("config_vector")?,
            })
        };
        let registers: Registers = from.get("")?;
        let config_len: u32 = from.get("config_len")?;
        if config_len > MAX_CONFIG {
            let problem = format_args!("{config_len} bytes of configuration, at most {MAX_CONFIG}");
            return Err(from.malformed("config_len", problem));
        }
        let config = from.get_bytes(usize::try_from(config_len).unwrap_or(0))?;
        let count: u32 = from.get("num_queues")?;
        let expected = function.core.len();
        if usize::try_from(count) != Ok(expected) {
            return Err(self.field_error(FieldError::new("num_queues", expected, count)));
        }
        let mut queues = Vec::with_capacity(expected);
        for index in 0..expected {
            let queue: QueueState = from.get(&format!("queue[{index}]"))?;
            let vector = match vectors {
                0 => NO_VECTOR,
                _ => from.get(&format!("queue[{index}].vector"))?,
            };
            queues.push((queue, vector));
        }
        let mut part = PartDecoder {
            decoder: &mut from,
            section: self.id.to_string(),
            features: registers.guest_features.into(),
        };
        let part = function.device.decode_part(&mut part)?;
        let mut subsections: Subsections = from.get("")?;
        let short: Short = from.get("")?;
        from.finish()?;
        if let Some(few) = short.queues {
            few.expand(expected, &mut subsections).map_err(|error| self.field_error(error))?;
        }
        Ok(State { pci, msix, registers, config, queues, part, subsections })
    }
}

impl Section for VirtioSection {
    fn id(&self) -> SectionId {
        self.id.clone()
    }
    fn version(&self) -> u32 {
        self.version
    }
    fn min_version(&self) -> u32 {
        self.version
    }

    fn save(&self, audience: Audience) -> Result<Vec<u8>, StateError> {
        let mut to = Encoder::new(&self.id);
        self.lock()?.save(&mut to, audience)?;
        Ok(to.into_bytes())
    }

    fn decode(
        &self,
        version: u32,
        source: &mut dyn ByteSource,
    ) -> Result<Box<dyn Any + Send>, StateError> {
        check_version(&self.id, version, self.version, self.version)?;
        let function = self.lock()?;
        let state = self.read(&function, version, source)?;
        function.check(&state).map_err(|error| self.field_error(error))?;
        Ok(Box::new(state))
    }

    fn apply(&mut self, state: Box<dyn Any + Send>) -> Result<(), StateError> {
        let state = state.downcast::<State>().map_err(|_| {
            self.device_error("was given a state that another section has decoded".to_owned())
        })?;
        self.lock()?.restore(*state).map_err(|error| self.field_error(error))?;
        self.bus.refresh();
        Ok(())
    }

    fn save_described(&self, audience: Audience) -> Result<(Vec<u8>, Description), StateError> {
        let bytes = self.save(audience)?;
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let mut describer = Describer::new(&self.id, self.version);
        let description = move || {
            describer.opaque("virtio", "virtio", size);
            Ok(describer.finish())
        };
        Ok((bytes, Box::new(description)))
    }

    fn layout_digest(&self) -> u64 {
        let mut layout = LayoutDigest::new(self.version, self.version)
            .part::<PciDeviceState>("pci")
            .part::<Registers>("registers")
            .part::<QueueState>("queue")
            .part::<Subsections>("subsections");
        let function = self.function.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        layout = layout
            .number("vectors", function.device.vectors().into())
            .number("queues", u64::try_from(function.core.len()).unwrap_or(u64::MAX));
        function.device.part_layout(layout).finish()
    }
}

impl VirtioPci {
    fn save(&self, to: &mut Encoder, audience: Audience) -> Result<(), StateError> {
        let (isr, pin, msix, config_vector) = {
            let interrupts = self.core.interrupts().lock();
            let msix = interrupts.msix.as_ref().map(|msix| msix.save());
            (interrupts.isr, interrupts.pin.asserted(), msix, interrupts.config_vector)
        };
        to.put(&self.config.save(pin))?;
        let has_msix = msix.is_some();
        if let Some((table, pba)) = msix {
            to.put_bytes(&table);
            to.put_bytes(&pba);
            to.put(&config_vector)?;
        }
        let accepted = self.core.features();
        let [a, b, c, d, ..] = accepted.to_le_bytes();
        to.put(&Registers {
            status: self.core.status(),
            isr,
            queue_sel: self.queue_select,
            guest_features: u32::from_le_bytes([a, b, c, d]),
        })?;
        let config = self.device.config();
        to.put(&u32::try_from(config.len()).unwrap_or(0))?;
        to.put_bytes(&config);
        to.put(&u32::try_from(self.core.len()).unwrap_or(0))?;
        let (mut rings, mut default_sizes) = (Vec::new(), Vec::new());
        let mut resized = false;
        for index in 0..self.core.len() {
            let Some(queue) = self.core.queue(index) else { continue };
            let RingAddresses { desc, avail, used } = queue.addresses();
            rings.push(RingState { avail, used });
            default_sizes.push(u32::from(queue.default_size()));
            to.put(&QueueState {
                num: queue.size().into(),
                desc,
                last_avail_idx: queue.saved_last_avail(),
            })?;
            if has_msix {
                to.put(&queue.vector)?;
            }
            resized |= queue.size() != queue.default_size();
        }
        self.device.save_part(to, audience)?;
        let modern = self.generation != Generation::Legacy;
        let mut subsections = Subsections {
            features: Some(accepted),
            broken: self.core.is_broken().then_some(true),
            started: (self.core.status() & status::DRIVER_OK != 0).then_some(true),
            disabled: self.core.is_disabled().then_some(true),
            ..Subsections::default()
        };
        let mut short = Short::default();
        if modern && audience == Audience::MiniVmm {
            short.queues = Some(self.few_queues(rings));
        } else {
            subsections.rings = modern.then(|| Tailed::new(rings, RingState::default()));
            subsections.default_sizes = resized.then(|| Tailed::new(default_sizes, 0));
            let modern = modern.then(|| self.modern_state());
            subsections.extra = Some(ExtraState { subsections: PciSubsections { modern } });
        }
        to.put(&subsections)?;
        to.put(&short)
    }

    fn few_queues(&self, rings: Vec<RingState>) -> FewQueues {
        let vqs: Vec<_> = self.modern.iter().copied().map(ModernQueueState::from).collect();
        FewQueues {
            rings: rings.into(),
            dfselect: self.device_feature_select,
            gfselect: self.driver_feature_select,
            guest_features: self.driver_features,
            vqs: vqs.into(),
        }
    }

    fn modern_state(&self) -> ModernState {
        ModernState {
            dfselect: self.device_feature_select,
            gfselect: self.driver_feature_select,
            guest_features: self.driver_features,
            vqs: Tailed::new(
                self.modern.iter().copied().map(ModernQueueState::from),
                ModernQueueState::from(ModernQueue::default()),
            ),
        }
    }

    /// Everything that indexes, sizes or addresses something. The PCI block and the device's part
    /// were checked when they were read.
    fn check(&self, state: &State) -> Result<(), FieldError> {
        let accepted = state.features();
        if accepted & !self.offered != 0 {
            return Err(FieldError::new(
                "guest_features",
                format_args!("features within {:#x}", self.offered),
                format_args!(
                    "{accepted:#x} (Features {accepted:#x} unsupported. Allowed features: {:#x})",
                    self.offered
                ),
            ));
        }
        if let Some(msix) = &state.msix {
            if let Some(local) = &self.core.interrupts().lock().msix {
                local.check(&msix.table, &msix.pba)?;
            }
            self.check_vector("config_vector", msix.config_vector)?;
        }
        self.device.check_config(&state.config)?;
        for (index, (queue, vector)) in state.queues.iter().enumerate() {
            self.check_vector(&format!("queue[{index}].vector"), *vector)?;
            self.check_queue(state, index, queue)?;
        }
        Ok(())
    }

    fn check_vector(&self, field: &str, vector: u16) -> Result<(), FieldError> {
        let vectors = self.device.vectors();
        if vector == NO_VECTOR || vector < vectors {
            return Ok(());
        }
        Err(FieldError::new(field, format_args!("less than {vectors}, or 0xffff"), vector))
    }

    fn check_queue(
        &self,
        state: &State,
        index: usize,
        queue: &QueueState,
    ) -> Result<(), FieldError> {
        let size = u16::try_from(queue.num)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE)
            .ok_or_else(|| {
                let expected = format_args!("a power of two of at most {MAX_QUEUE_SIZE}");
                FieldError::new(format!("queue[{index}].num"), expected, queue.num)
            })?;
        let last_avail = queue.last_avail_idx;
        if queue.desc == 0 {
            return match last_avail {
                0 => Ok(()),
                _ => Err(FieldError::new(
                    format!("queue[{index}].last_avail_idx"),
                    "0, since the queue has no address",
                    format_args!(
                        "{last_avail:#x} (VQ {index} address 0x0 inconsistent with Host index \
                         {last_avail:#x})"
                    ),
                )),
            };
        }
        if state.features() & features::VERSION_1 != 0 && state.subsections.rings.is_none() {
            let expected = "the subsection virtio/virtqueues, since the driver is a modern one";
            return Err(FieldError::new(format!("queue[{index}]"), expected, "none"));
        }
        let ring = state.ring(index, size);
        ring.check(self.core.ram(), size).map_err(|error| {
            FieldError::new(format!("queue[{index}].desc"), "a ring in guest memory", error)
        })?;
        let used = VirtQueue::used_idx(self.core.ram(), ring.used).unwrap_or(last_avail);
        let in_flight = last_avail.wrapping_sub(used);
        if in_flight > size {
            return Err(FieldError::new(
                format!("queue[{index}].last_avail_idx"),
                format_args!("at most {size:#x} more than the used index {used:#x}"),
                format_args!(
                    "{last_avail:#x} (VQ {index} size {size:#x} < last_avail_idx {last_avail:#x} \
                     - used_idx {used:#x})"
                ),
            ));
        }
        Ok(())
    }

    fn restore(&mut self, state: State) -> Result<(), FieldError> {
        self.reset_device();
        let intx = self.config.restore(&state.pci);
        let accepted = state.features();
        self.queue_select = state.registers.queue_sel;
        if let Some(ModernState { dfselect, gfselect, guest_features, vqs }) =
            state.subsections.extra.as_ref().and_then(|extra| extra.subsections.modern.as_ref())
        {
            self.device_feature_select = *dfselect;
            self.driver_feature_select = *gfselect;
            self.driver_features = *guest_features;
            for (live, queue) in self.modern.iter_mut().zip(vqs.iter()) {
                *live = ModernQueue {
                    size: queue.num,
                    enabled: queue.enabled,
                    desc: queue.desc,
                    avail: queue.avail,
                    used: queue.used,
                };
            }
        }
        self.core.set_features(accepted);
        self.device.features_accepted(accepted);
        for (index, (queue, vector)) in state.queues.iter().enumerate() {
            let size = u16::try_from(queue.num).unwrap_or(0);
            if let Some(mut live) = self.core.queue(index) {
                live.vector = *vector;
                live.set_size(size);
            }
            if queue.desc == 0 {
                continue;
            }
            let ring = state.ring(index, size);
            self.enable_queue(index, ring);
            // Requests that were taken and not given back are taken again: every device here
            // takes them in order. One whose part lists them goes on behind them, and one that keeps
            // some for long is told apart from one that has none, until it has taken them.
            let used = VirtQueue::used_idx(self.core.ram(), ring.used);
            let used = used.unwrap_or(queue.last_avail_idx);
            if let Some(mut live) = self.core.queue(index) {
                live.set_position(used, used);
                if self.device.keeps_requests(index) {
                    live.set_to_take_again(queue.last_avail_idx.wrapping_sub(used));
                }
            }
        }
        self.device.restore_config(&state.config);
        self.device.restore_part(state.part)?;

        let mut interrupts = self.core.interrupts().lock();
        interrupts.isr = state.registers.isr;
        interrupts.pin.set(intx);
        if let Some(MsixState { table, pba, config_vector }) = &state.msix {
            interrupts.config_vector = *config_vector;
            let control = self.msix_control();
            if let Some(msix) = &mut interrupts.msix {
                msix.restore(table, pba, control);
            }
        }
        drop(interrupts);
        self.core.set_broken(state.subsections.broken.unwrap_or(false));
        self.core.set_status(state.registers.status);
        self.follow_config();
        tracing::debug!("{}: restored, features {accepted:#x}", self.name());
        Ok(())
    }
}
