//! virtio-net (virtio 1.2, 5.1) with one pair of queues and a control queue.
//!
//! - [`backend`](self): where frames go, [`Tap`] or [`StreamSocket`];
//! - `control`: what the driver says on the control queue, and which frames it wants;
//! - `state`: the device's part of the section.
//!
//! Frames come in on the I/O thread, as long as the driver has room for them: what it has no room
//! for waits in the tap, or in the peer.

mod backend;
mod control;
mod rarp;
mod state;
mod stream;
mod tap;

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use migration::vmstate::{Audience, Encoder, FieldError, LayoutDigest, StateError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub use backend::{HEADER, MAX_FRAME, NetBackend, Offloads, Sent};
pub use rarp::rarp_frame;
pub use stream::{StreamAddress, StreamSocket};
pub use tap::Tap;

use super::chain::Chain;
use super::core::{Core, VirtioError};
use super::device::{BackendError, Kind, Part, PartDecoder, VirtioDevice};
use super::features;
use super::trouble::Trouble;
use control::Filter;

static KIND: Kind = Kind {
    name: "virtio-net",
    version: 11,
    id: 1,
    transitional_id: 0x1000,
    class: 0x0200,
    legacy_features: feature::GSO,
};

/// Feature bits (virtio 1.2, 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub(super) const MAC: u64 = 1 << 5;
    /// Legacy: all kinds of segmentation.
    pub(super) const GSO: u64 = 1 << 6;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const GUEST_UFO: u64 = 1 << 10;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const HOST_UFO: u64 = 1 << 14;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const CTRL_RX: u64 = 1 << 18;
    pub(super) const CTRL_VLAN: u64 = 1 << 19;
    pub(super) const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// What the guest is willing to receive.
    pub(super) const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO;
    /// What needs a host side that understands vnet headers.
    pub(super) const WITH_HEADER: u64 =
        CSUM | GUEST_OFFLOADS | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_UFO;
}

/// Bits of the status field of the configuration.
mod link {
    pub(super) const UP: u16 = 1;
    pub(super) const ANNOUNCE: u16 = 2;
}

const RX: usize = 0;
const TX: usize = 1;
const CTRL: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
/// One for each queue, and one for the configuration.
const VECTORS: u16 = 4;
/// How many frames are moved before others on the I/O thread have a turn.
const BUDGET: usize = 256;

/// What a network device is configured to be.
pub struct NetOptions {
    /// The name that errors use.
    pub id: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Where its frames go.
    pub backend: Box<dyn NetBackend>,
}

/// A virtio network device.
pub struct Net {
    id: String,
    /// The address that it was configured with.
    permanent_mac: [u8; 6],
    backend: Box<dyn NetBackend>,
    is_open: bool,
    /// Watches the backend, whatever descriptor that has at the moment.
    watch: Epoll,
    core: Option<Arc<Core>>,
    mac: [u8; 6],
    status: u16,
    filter: Filter,
    offloads: u64,
    /// Bytes of the header in front of each frame in guest memory: 10, or 12 with the number of
    /// buffers.
    header_len: usize,
    /// A frame for which the driver had no room, header and all.
    waiting: Option<Vec<u8>>,
    /// The backend had no room for the driver's next frame.
    held_up: bool,
    buffer: Vec<u8>,
}

impl Net {
    /// A device whose backend is not open yet.
    pub fn new(options: NetOptions) -> Result<Self, BackendError> {
        let NetOptions { id, mac, backend } = options;
        let watch = Epoll::new().map_err(|source| BackendError {
            device: id.clone(),
            what: "no epoll".to_owned(),
            source,
        })?;
        Ok(Self {
            id,
            permanent_mac: mac,
            backend,
            is_open: false,
            watch,
            core: None,
            mac,
            status: link::UP,
            filter: Filter::default(),
            offloads: 0,
            header_len: HEADER - 2,
            waiting: None,
            held_up: false,
            buffer: vec![0; HEADER + MAX_FRAME],
        })
    }

    /// The address that the guest uses now.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// The features of which the backend is capable.
    fn offered(&self) -> u64 {
        let plain = feature::CTRL_GUEST_OFFLOADS
            | feature::MAC
            | feature::GSO
            | feature::MRG_RXBUF
            | feature::STATUS
            | feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_VLAN
            | feature::CTRL_RX_EXTRA
            | feature::GUEST_ANNOUNCE
            | feature::CTRL_MAC_ADDR;
        if self.backend.has_vnet_header() { plain | feature::WITH_HEADER } else { plain }
    }

    fn has(&self, mask: u64) -> bool {
        self.core.as_ref().is_some_and(|core| core.has(mask))
    }

    fn set_offloads(&mut self, offloads: u64) {
        self.offloads = offloads;
        let on = |mask| offloads & mask != 0;
        let offloads = Offloads {
            csum: on(feature::GUEST_CSUM),
            tso4: on(feature::GUEST_TSO4),
            tso6: on(feature::GUEST_TSO6),
            ecn: on(feature::GUEST_ECN),
            ufo: on(feature::GUEST_UFO),
        };
        if self.is_open
            && self.backend.has_vnet_header()
            && let Err(error) = self.backend.set_offloads(offloads)
        {
            tracing::warn!("{}: the tap does not take {offloads:?}: {error}", self.id);
        }
    }

    /// Takes frames from the backend as long as the driver has room.
    fn receive(&mut self) {
        let Some(core) = self.core.clone() else { return };
        if !core.is_live() || !self.is_open {
            return;
        }
        let mut delivered = false;
        if let Some(frame) = self.waiting.take() {
            if !self.deliver(&core, &frame) {
                self.waiting = Some(frame);
                return;
            }
            delivered = true;
        }
        for _ in 0..BUDGET {
            let mut buffer = std::mem::take(&mut self.buffer);
            let received = self.backend.receive(&mut buffer);
            let mut kept = None;
            match &received {
                Ok(Some(n)) => {
                    let frame = buffer.get(..*n).unwrap_or_default();
                    if self.filter.wants(frame.get(HEADER..).unwrap_or_default(), &self.mac) {
                        if self.deliver(&core, frame) {
                            delivered = true;
                        } else {
                            kept = Some(frame.to_vec());
                        }
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!("{}: nothing more comes from the network: {error}", self.id);
                }
            }
            self.buffer = buffer;
            if kept.is_some() || !matches!(received, Ok(Some(_))) {
                self.waiting = kept;
                if delivered {
                    core.interrupt(RX);
                }
                return;
            }
        }
        core.interrupt(RX);
        core.kick(RX);
    }

    /// Puts one frame, with its header, into the driver's buffers. False when it has too few.
    fn deliver(&self, core: &Core, frame: &[u8]) -> bool {
        let (header, payload) = frame.split_at_checked(HEADER).unwrap_or((&[], frame));
        match self.collect(core, self.header_len + payload.len()) {
            Collected::Chains(chains) => {
                self.fill(core, chains, header, payload);
                true
            }
            Collected::Never => true,
            Collected::NotYet => false,
        }
    }

    /// Enough requests for `needed` bytes; or none, and the driver will ring when there are more.
    fn collect<'a>(&self, core: &'a Core, needed: usize) -> Collected<'a> {
        let mergeable = self.has(feature::MRG_RXBUF);
        let (mut chains, mut room) = (Vec::new(), 0_usize);
        while room < needed {
            let Some(chain) = core.pop(RX) else {
                // Asked while all that there are count as taken: the driver rings for the next one
                // beyond them, and not only when the ring had run empty.
                if core.set_notification(RX, true) {
                    continue;
                }
                for _ in &chains {
                    core.unpop(RX);
                }
                return Collected::NotYet;
            };
            let len = chain.writable.len();
            if !chain.readable.is_empty()
                || len == 0
                || (chains.is_empty() && len < self.header_len)
            {
                core.fail(&"virtio-net: a receive buffer is not writable, or too small");
                return Collected::NotYet;
            }
            room = room.saturating_add(len);
            chains.push(chain);
            if !mergeable && room < needed {
                // A driver that wants large frames gives large buffers.
                core.unpop(RX);
                return Collected::Never;
            }
        }
        Collected::Chains(chains)
    }

    fn fill(&self, core: &Core, chains: Vec<Chain<'_>>, header: &[u8], payload: &[u8]) {
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX).to_le_bytes();
        let mut bytes = [0; HEADER];
        let (start, end) = bytes.split_at_mut(HEADER - 2);
        start.copy_from_slice(header.get(..HEADER - 2).unwrap_or(&[0; HEADER - 2]));
        end.copy_from_slice(&count);
        let mut header = bytes.get(..self.header_len).unwrap_or_default();
        let mut payload = payload;
        for mut chain in chains {
            let n = chain.writable.write(header);
            header = header.get(n..).unwrap_or_default();
            let m = chain.writable.write(payload);
            payload = payload.get(m..).unwrap_or_default();
            core.push(RX, chain.head, n + m);
        }
    }

    /// Sends what the driver has given, as long as the backend takes it.
    fn transmit(&mut self) {
        let Some(core) = self.core.clone() else { return };
        let mut left = BUDGET;
        self.held_up = false;
        loop {
            core.set_notification(TX, false);
            let mut sent = false;
            while left > 0
                && let Some(mut chain) = core.pop(TX)
            {
                left -= 1;
                match self.send(&mut chain) {
                    Sent::Blocked => {
                        core.unpop(TX);
                        self.held_up = true;
                        if sent {
                            core.interrupt(TX);
                        }
                        return;
                    }
                    Sent::Done => core.push(TX, chain.head, 0),
                }
                sent = true;
            }
            if sent {
                core.interrupt(TX);
            }
            if left == 0 {
                core.kick(TX);
                return;
            }
            if !core.set_notification(TX, true) {
                return;
            }
        }
    }

    /// Sends one frame; a frame that cannot be is lost, as on a wire.
    fn send(&mut self, chain: &mut Chain<'_>) -> Sent {
        let mut buffer = std::mem::take(&mut self.buffer);
        let (header, payload) = buffer.split_at_mut(HEADER);
        header.fill(0);
        let n = chain.readable.read(header.get_mut(..self.header_len).unwrap_or_default());
        let m = chain.readable.read(payload);
        // The number of buffers means nothing on the way out.
        if let Some(count) = header.get_mut(HEADER - 2..) {
            count.fill(0);
        }
        let whole = n == self.header_len && m > 0 && chain.readable.is_empty();
        let result = match buffer.get(..HEADER + m) {
            Some(frame) if whole && self.is_open => self.backend.send(frame),
            _ => Ok(Sent::Done),
        };
        self.buffer = buffer;
        result.unwrap_or_else(|error| {
            tracing::debug!("{}: a frame is lost: {error}", self.id);
            Sent::Done
        })
    }

    fn backend_error(&self, source: io::Error) -> BackendError {
        BackendError {
            device: self.id.clone(),
            what: format!("cannot open {}", self.backend.name()),
            source,
        }
    }
}

/// What [`Net::collect`] has found.
enum Collected<'a> {
    /// Room enough.
    Chains(Vec<Chain<'a>>),
    /// Not enough yet.
    NotYet,
    /// The driver's buffers are too small for the frame.
    Never,
}

impl VirtioDevice for Net {
    fn kind(&self) -> &'static Kind {
        &KIND
    }
    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }
    fn vectors(&self) -> u16 {
        VECTORS
    }
    fn features(&self) -> u64 {
        self.offered()
    }
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
    fn connect(&mut self, core: Arc<Core>) -> Result<(), VirtioError> {
        self.core = Some(core);
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        [self.mac.as_slice(), &self.status.to_le_bytes()].concat()
    }
    // On another host nothing is taken from it: address and status are in the device's part as well.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // Legacy drivers may set the address here (virtio 1.2, 5.1.4.1).
        if self.has(features::VERSION_1) || self.has(feature::CTRL_MAC_ADDR) {
            return;
        }
        for (at, value) in (offset..).zip(data) {
            if let Some(byte) = self.mac.get_mut(at) {
                *byte = *value;
            }
        }
    }
    fn features_accepted(&mut self, accepted: u64) {
        let modern = accepted & (features::VERSION_1 | feature::MRG_RXBUF) != 0;
        self.header_len = if modern { HEADER } else { HEADER - 2 };
        self.filter.set_vlan_filtering(accepted & feature::CTRL_VLAN != 0);
        self.set_offloads(accepted & feature::GUEST_OFFLOADS);
    }
    fn reset(&mut self) {
        self.mac = self.permanent_mac;
        self.status &= !link::ANNOUNCE;
        self.filter = Filter::default();
        self.waiting = None;
        self.held_up = false;
    }

    fn kick(&mut self, queue: usize) {
        match queue {
            RX => self.receive(),
            TX => self.transmit(),
            CTRL => {
                let Some(core) = self.core.clone() else { return };
                core.serve(CTRL, |chain| self.control(chain));
            }
            _ => {}
        }
    }
    fn event_fd(&self) -> Option<RawFd> {
        Some(self.watch.as_raw_fd())
    }
    fn event(&mut self) {
        // Takes the edge; what it was is found out by trying.
        let mut events = [EpollEvent::default()];
        if let Err(error) = self.watch.wait(0, &mut events) {
            tracing::debug!("{}: {error}", self.id);
        }
        self.backend.flush();
        self.receive();
        if self.held_up {
            self.transmit();
        }
    }

    fn open(&mut self) -> Result<(), BackendError> {
        if self.is_open {
            return Ok(());
        }
        let fd = self.backend.open().map_err(|e| self.backend_error(e))?;
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        self.watch
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))
            .map_err(|e| self.backend_error(e))?;
        self.is_open = true;
        self.set_offloads(self.offloads);
        if let Some(core) = &self.core {
            core.kick(RX);
        }
        Ok(())
    }
    fn close(&mut self) -> Result<(), BackendError> {
        // Closing the descriptor ends the watch.
        self.backend.close();
        self.is_open = false;
        self.waiting = None;
        Ok(())
    }
    fn try_backend(&mut self) -> Vec<Trouble> {
        // Connecting to a stream's other end would be noticed there.
        if self.is_open || !self.backend.has_vnet_header() {
            return Vec::new();
        }
        let what = self.backend.name();
        match self.backend.open() {
            Ok(_) => {}
            // By the source, if that is on this host, until it gives the VM away.
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => return Vec::new(),
            Err(source) => return vec![Trouble::Missing { what, source }],
        }
        let csum = Offloads { csum: true, ..Offloads::default() };
        let mut troubles = Vec::new();
        for (offload, offloads) in [
            ("TUN_F_CSUM", csum),
            ("TUN_F_TSO4", Offloads { tso4: true, ..csum }),
            ("TUN_F_TSO6", Offloads { tso6: true, ..csum }),
            ("TUN_F_TSO_ECN", Offloads { tso4: true, tso6: true, ecn: true, ..csum }),
            ("TUN_F_UFO", Offloads { ufo: true, ..csum }),
        ] {
            if let Err(source) = self.backend.set_offloads(offloads) {
                troubles.push(Trouble::Offload { what: what.clone(), offload, source });
            }
        }
        self.backend.close();
        troubles
    }
    fn announce(&mut self) {
        if self.is_open && self.status & link::UP != 0 {
            let frame = [[0; HEADER].as_slice(), &rarp_frame(self.mac)].concat();
            if let Err(error) = self.backend.send(&frame) {
                tracing::warn!("{}: cannot announce its address: {error}", self.id);
            }
        }
        if self.status & link::UP != 0
            && self.has(feature::GUEST_ANNOUNCE)
            && let Some(core) = self.core.as_ref().filter(|core| core.is_live())
        {
            self.status |= link::ANNOUNCE;
            core.interrupts().config();
        }
    }

    fn part_layout(&self, layout: LayoutDigest) -> LayoutDigest {
        state::layout(layout)
    }
    fn save_part(&self, to: &mut Encoder, _: Audience) -> Result<(), StateError> {
        self.save_state(to)
    }
    fn decode_part(&self, from: &mut PartDecoder<'_, '_>) -> Result<Part, StateError> {
        self.decode_state(from)
    }
    fn restore_part(&mut self, part: Part) -> Result<(), FieldError> {
        self.restore_state(part)
    }
}
