//! virtio-balloon (virtio 1.2, 5.5): memory that a guest gives back.

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex};

use migration::vmstate::{Audience, Encoder, FieldError, LayoutDigest, StateError};
use serde::{Deserialize, Serialize};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::core::{Core, VirtioError, status};
use super::device::{Kind, Part, PartDecoder, VirtioDevice};
use super::handle::Handle;
use super::pci::VirtioPci;

static KIND: Kind = Kind {
    name: "virtio-balloon",
    version: 1,
    id: 5,
    transitional_id: 0x1002,
    class: 0x00ff,
    legacy_features: 0,
};

/// Feature bits (virtio 1.2, 5.5.3).
mod feature {
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const PAGE_POISON: u64 = 1 << 4;
}

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const QUEUE_SIZE: u16 = 128;
const PAGE_SHIFT: u32 = 12;
/// The most pages that one request gives back: what the largest of drivers name in one (Windows'; Linux
/// names 256). A page that stays is no mistake, only no gain.
pub(super) const MAX_PAGES: usize = 1024;
/// How many requests are served in a row. Each is up to [`MAX_PAGES`] calls of the host's.
pub(super) const TURN: usize = 16;
/// Bytes of an entry of the statistics: tag and value.
const STAT: usize = 10;
/// More statistics than a driver has kinds of.
const MAX_STATS: usize = 32;

/// Offsets in the configuration.
mod field {
    pub(super) const ACTUAL: usize = 4;
    pub(super) const POISON: usize = 12;
    pub(super) const LEN: usize = 16;
}

/// Gives guest memory back to the host. What is discarded reads as zeros.
pub trait PageDiscard: Send {
    /// Discards whole pages, `len` bytes of RAM from guest-physical `address` on, without a hole.
    fn discard(&self, address: u64, len: u64) -> io::Result<()>;
}

/// A virtio balloon.
pub struct Balloon {
    id: String,
    discard: Box<dyn PageDiscard>,
    core: Option<Arc<Core>>,
    state: State,
    poison: u32,
    /// The request by which statistics can be asked for, which the driver leaves with us.
    held: Option<u16>,
    stats: Vec<(u16, u64)>,
    changed: Option<Box<dyn Fn(u32) + Send>>,
}

/// The device's part of the section.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// How many pages the guest is asked to give.
    num_pages: u32,
    /// How many it says it has given.
    actual: u32,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Poison {
    poison_val: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct Subsections {
    #[serde(rename = "virtio-balloon-device/page-poison")]
    poison: Option<Poison>,
}

impl Balloon {
    /// A device that errors call `id`, and that gives pages back by `discard`.
    pub fn new(id: impl Into<String>, discard: Box<dyn PageDiscard>) -> Self {
        Self {
            id: id.into(),
            discard,
            core: None,
            state: State::default(),
            poison: 0,
            held: None,
            stats: Vec::new(),
            changed: None,
        }
    }

    /// Asks the guest to give up so many pages of 4 KiB in all. A guest that stands still hears of
    /// it when it goes on, be it on another host.
    pub fn set_target(&mut self, pages: u32) {
        self.state.num_pages = pages;
        let ready = |core: &&Arc<Core>| {
            core.status() & status::DRIVER_OK != 0 && !core.is_broken() && !core.is_disabled()
        };
        if let Some(core) = self.core.as_ref().filter(ready) {
            core.interrupts().config();
        }
    }

    /// How many pages of 4 KiB the guest says it has given up. It may say anything.
    pub fn actual(&self) -> u32 {
        self.state.actual
    }

    /// `changed` is called, with the device locked, when the guest says another
    /// [`actual`](Self::actual), which may be often.
    pub fn on_change(&mut self, changed: Box<dyn Fn(u32) + Send>) {
        self.changed = Some(changed);
    }

    /// What the guest said last about its memory, as tags and values (virtio 1.2, 5.5.6.4).
    pub fn stats(&self) -> &[(u16, u64)] {
        &self.stats
    }

    /// Asks for newer ones, if the driver gives any.
    pub fn poll_stats(&mut self) {
        if let Some(core) = self.core.as_ref().filter(|core| core.is_live())
            && let Some(head) = self.held.take()
        {
            core.push(STATS, head, 0);
            core.interrupt(STATS);
        }
    }

    /// Gives back the pages whose numbers stand in a request.
    fn inflate(&self, core: &Core, numbers: impl Iterator<Item = u32>) {
        let mut numbers = numbers.take(MAX_PAGES);
        let mut run: Option<(u32, u32)> = None;
        loop {
            let next = numbers.next();
            run = match (run, next) {
                (Some((first, count)), Some(page)) if first.checked_add(count) == Some(page) => {
                    Some((first, count.saturating_add(1)))
                }
                (previous, next) => {
                    if let Some((first, count)) = previous {
                        self.discard_run(core, first, count);
                    }
                    next.map(|page| (page, 1))
                }
            };
            if run.is_none() {
                return;
            }
        }
    }

    /// Discards what of a run is RAM: it may reach into the hole below 4 GiB, or out of it.
    fn discard_run(&self, core: &Core, first: u32, count: u32) {
        let (address, len) = (u64::from(first) << PAGE_SHIFT, u64::from(count) << PAGE_SHIFT);
        // 2^32 pages of 4 KiB, twice, are far from overflowing.
        let end = address + len;
        let mut left = len;
        for region in core.ram().iter() {
            let base = region.start_addr().0;
            let (from, to) = (address.max(base), end.min(base.saturating_add(region.len())));
            let Some(len) = to.checked_sub(from).filter(|len| *len > 0) else { continue };
            left = left.saturating_sub(len);
            if let Err(error) = self.discard.discard(from, len) {
                tracing::warn!("{}: cannot give back pages at {from:#x}: {error}", self.id);
                continue;
            }
            // They read as zeros now, which is a change like any other.
            if let (Ok(offset), Ok(len)) = (usize::try_from(from - base), usize::try_from(len)) {
                region.bitmap().mark_dirty(offset, len);
            }
        }
        if left > 0 {
            tracing::debug!("{}: {left:#x} bytes at {address:#x} are not RAM", self.id);
        }
    }

    fn take_stats(&mut self, core: &Core) {
        for _ in 0..TURN {
            let Some(mut chain) = core.pop(STATS) else {
                if core.set_notification(STATS, true) {
                    continue;
                }
                return;
            };
            // A second request, though we have not answered the first: answered at once.
            if let Some(head) = self.held.replace(chain.head) {
                core.push(STATS, head, 0);
                core.interrupt(STATS);
            }
            self.stats.clear();
            while self.stats.len() < MAX_STATS
                && let Some([t0, t1, v0, v1, v2, v3, v4, v5, v6, v7]) =
                    chain.readable.read_array::<STAT>()
            {
                let tag = u16::from_le_bytes([t0, t1]);
                let value = u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]);
                self.stats.push((tag, value));
            }
        }
        core.kick(STATS);
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> &'static Kind {
        &KIND
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }
    fn vectors(&self) -> u16 {
        0
    }
    fn features(&self) -> u64 {
        feature::STATS_VQ | feature::PAGE_POISON
    }
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
    fn connect(&mut self, core: Arc<Core>) -> Result<(), VirtioError> {
        self.core = Some(core);
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        let State { num_pages, actual } = self.state;
        [num_pages, actual, 0, self.poison].map(u32::to_le_bytes).concat()
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut config = self.config();
        for (at, value) in (offset..field::LEN).zip(data) {
            if let Some(byte) = config.get_mut(at) {
                *byte = *value;
            }
        }
        let word = |at: usize| {
            let bytes = config.get(at..).and_then(<[u8]>::first_chunk);
            bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        let before = std::mem::replace(&mut self.state.actual, word(field::ACTUAL));
        if let Some(changed) = self.changed.as_ref().filter(|_| before != self.state.actual) {
            changed(self.state.actual);
        }
        if self.core.as_ref().is_some_and(|core| core.has(feature::PAGE_POISON)) {
            self.poison = word(field::POISON);
        }
    }

    fn reset(&mut self) {
        self.held = None;
        self.poison = 0;
    }

    fn kick(&mut self, queue: usize) {
        let Some(core) = self.core.clone() else { return };
        match queue {
            INFLATE => core.serve_in_turns(queue, TURN, |chain| {
                let numbers = std::iter::from_fn(|| chain.readable.read_array());
                self.inflate(&core, numbers.map(u32::from_le_bytes));
                0
            }),
            // Pages that the guest takes back come by themselves when it touches them.
            DEFLATE => core.serve(queue, |_| 0),
            STATS => self.take_stats(&core),
            _ => {}
        }
    }

    fn part_layout(&self, layout: LayoutDigest) -> LayoutDigest {
        layout.part::<State>("balloon").part::<Subsections>("balloon")
    }
    fn save_part(&self, to: &mut Encoder, _: Audience) -> Result<(), StateError> {
        to.put(&self.state)?;
        let negotiated = self.core.as_ref().is_some_and(|core| core.has(feature::PAGE_POISON));
        to.put(&Subsections { poison: negotiated.then_some(Poison { poison_val: self.poison }) })
    }
    fn decode_part(&self, from: &mut PartDecoder<'_, '_>) -> Result<Part, StateError> {
        let state: State = from.get("balloon")?;
        let subsections: Subsections = from.get("balloon")?;
        Ok(Box::new((state, subsections)))
    }
    fn keeps_requests(&self, queue: usize) -> bool {
        queue == STATS
    }
    /// The request that the driver has left with the other host is taken from the queue again.
    fn restore_part(&mut self, part: Part) -> Result<(), FieldError> {
        let (state, subsections) = *part.downcast::<(State, Subsections)>().map_err(|_| {
            FieldError::new("balloon", "the part that this device has decoded", "another's")
        })?;
        self.state = state;
        self.poison = subsections.poison.unwrap_or_default().poison_val;
        self.held = None;
        Ok(())
    }
}

/// A balloon, for whoever asks its guest for memory.
#[derive(Clone)]
pub struct BalloonControl(Handle<Balloon>);

impl BalloonControl {
    /// The control of `function`; `None` when that is not a [`Balloon`].
    pub fn new(function: Arc<Mutex<VirtioPci>>) -> Option<Self> {
        Handle::new(function).map(Self)
    }

    /// See [`Balloon::set_target`].
    pub fn set_target(&self, pages: u32) {
        self.0.with(|balloon| balloon.set_target(pages));
    }

    /// See [`Balloon::actual`].
    pub fn actual(&self) -> u32 {
        self.0.with(|balloon| balloon.actual()).unwrap_or(0)
    }

    /// See [`Balloon::on_change`].
    pub fn on_change(&self, changed: Box<dyn Fn(u32) + Send>) {
        self.0.with(|balloon| balloon.on_change(changed));
    }
}
