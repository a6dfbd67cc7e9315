//! virtio-console (virtio 1.2, 5.3): a virtio-serial device with one port, a console.
//!
//! Output goes to a writer that does not block. What it does not take stays in the request, which
//! the device holds until [`ConsoleLine::flush_output`] has brought it to its end.

use std::any::Any;
use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::sync::{Arc, Mutex};

use migration::vmstate::{Audience, Encoder, FieldError, LayoutDigest, StateError};
use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::core::{Core, VirtioError, status};
use super::device::{Kind, Part, PartDecoder, VirtioDevice};
use super::element::RawElement;
use super::handle::Handle;
use super::pci::VirtioPci;

static KIND: Kind = Kind {
    name: "virtio-console",
    version: 3,
    id: 3,
    transitional_id: 0x1003,
    class: 0x0780,
    legacy_features: 0,
};

/// Feature bits (virtio 1.2, 5.3.3).
mod feature {
    pub(super) const MULTIPORT: u64 = 1 << 1;
    pub(super) const EMERG_WRITE: u64 = 1 << 2;
}

/// Control messages (virtio 1.2, 5.3.6.2).
mod message {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const PORT_OPEN: u16 = 6;
    /// Bytes of a message: port, event, value.
    pub(super) const LEN: usize = 8;
}

const RX: usize = 0;
const TX: usize = 1;
const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;
/// Ports that could be, which decides the number of queues.
const MAX_PORTS: u32 = 31;
const QUEUES: usize = 64;
const QUEUE_SIZE: u16 = 128;
const CONTROL_QUEUE_SIZE: u16 = 32;
const VECTORS: u16 = 2;
/// The most ports that any device of this kind has.
const MAX_PORTS_ON_WIRE: u32 = 511;
/// Control messages that wait for the driver's buffers; it has answered none of so many.
const MAX_MESSAGES: usize = 64;
/// How much of a request is written at once.
const CHUNK: usize = 4096;
/// How many requests are served in a row, and how many bytes of theirs are written, before others on
/// the same thread have a turn.
pub(super) const TURN: Turn = Turn { requests: 64, bytes: 256 << 10 };
/// Offset of the emergency-write register in the configuration.
const EMERGENCY: usize = 8;

/// What is left of a turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) requests: usize,
    pub(super) bytes: usize,
}

/// A virtio console.
pub struct Console {
    id: String,
    output: Box<dyn Write + Send>,
    room_again: Option<Box<dyn Fn() + Send>>,
    core: Option<Arc<Core>>,
    columns: u16,
    rows: u16,
    guest_connected: bool,
    /// A request of which the output has not taken everything, and how much it has.
    held: Option<(RawElement, usize)>,
    messages: VecDeque<[u8; message::LEN]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    cols: u16,
    rows: u16,
    max_nr_ports: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct PortHead {
    id: u32,
    guest_connected: u8,
    host_connected: u8,
    popped: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Popped {
    iov_idx: u32,
    iov_offset: u64,
    element: RawElement,
}

/// The part, decoded and checked.
struct State {
    head: Head,
    port: Option<(PortHead, Option<Popped>)>,
}

impl Console {
    /// A console that errors call `id`. `output` must not block: it fails with `WouldBlock`.
    pub fn new(id: impl Into<String>, output: Box<dyn Write + Send>) -> Self {
        Self {
            id: id.into(),
            output,
            room_again: None,
            core: None,
            columns: 0,
            rows: 0,
            guest_connected: false,
            held: None,
            messages: VecDeque::new(),
        }
    }

    /// `room_again` is called, with the device locked, when the driver has given buffers for input.
    pub fn on_room(&mut self, room_again: Box<dyn Fn() + Send>) {
        self.room_again = Some(room_again);
    }

    fn wants_input(&self) -> bool {
        self.guest_connected && self.core.as_ref().is_some_and(|core| core.has_request(RX))
    }

    fn receive(&mut self, bytes: &[u8]) -> usize {
        let Some(core) = self.core.as_ref().filter(|_| self.guest_connected) else { return 0 };
        let mut rest = bytes;
        // A request without room takes nothing, so it is they that are counted.
        let mut left = TURN.requests;
        while !rest.is_empty()
            && left > 0
            && let Some(mut chain) = core.pop(RX)
        {
            left -= 1;
            let n = chain.writable.write(rest);
            core.push(RX, chain.head, n);
            rest = rest.get(n..).unwrap_or_default();
        }
        if rest.len() < bytes.len() {
            core.interrupt(RX);
        }
        // With its last buffer gone, the driver has to say when there are more.
        let later = left == 0 && !rest.is_empty();
        if later || (!core.has_request(RX) && core.set_notification(RX, true)) {
            self.room();
        }
        bytes.len() - rest.len()
    }

    /// Goes on with the request that is held, then with those that wait.
    fn transmit(&mut self) {
        let Some(core) = self.core.clone() else { return };
        let mut turn = TURN;
        loop {
            if let Some((element, done)) = self.held.take() {
                if !core.is_live() {
                    self.held = Some((element, done));
                    return;
                }
                match element.chain(core.ram()) {
                    Ok(mut chain) => {
                        chain.readable.skip(done);
                        if !self.write_out(&core, chain, done, &mut turn) {
                            return;
                        }
                    }
                    Err(error) => core.fail(&error),
                }
            }
            core.set_notification(TX, false);
            while turn.requests > 0
                && let Some(chain) = core.pop(TX)
            {
                turn.requests -= 1;
                if !self.write_out(&core, chain, 0, &mut turn) {
                    return;
                }
            }
            if turn.requests == 0 {
                core.kick(TX);
                return;
            }
            if !core.set_notification(TX, true) {
                return;
            }
        }
    }

    /// Writes a request, of which `done` bytes are written; false when the output takes no more, or
    /// the turn is over.
    fn write_out(
        &mut self,
        core: &Core,
        mut chain: Chain<'_>,
        done: usize,
        turn: &mut Turn,
    ) -> bool {
        let mut done = done;
        let mut chunk = [0; CHUNK];
        while !chain.readable.is_empty() {
            if turn.bytes == 0 {
                self.held = Some((RawElement::of(&chain), done));
                core.kick(TX);
                return false;
            }
            let mut copy = chain.readable.clone();
            let n = copy.read(chunk.get_mut(..turn.bytes.min(CHUNK)).unwrap_or_default());
            match self.output.write(chunk.get(..n).unwrap_or_default()) {
                Ok(written) if written > 0 => {
                    let written = written.min(n);
                    turn.bytes -= written;
                    done = done.saturating_add(written);
                    chain.readable.skip(written);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() != ErrorKind::WouldBlock => {
                    tracing::debug!("{}: output is lost: {e}", self.id);
                    break;
                }
                Ok(_) | Err(_) => {
                    self.held = Some((RawElement::of(&chain), done));
                    return false;
                }
            }
        }
        core.push(TX, chain.head, 0);
        core.interrupt(TX);
        true
    }

    fn send(&mut self, event: u16, value: u16) {
        if self.messages.len() < MAX_MESSAGES {
            let [e0, e1] = event.to_le_bytes();
            let [v0, v1] = value.to_le_bytes();
            self.messages.push_back([0, 0, 0, 0, e0, e1, v0, v1]);
        }
    }

    /// Gives the driver the messages that it has buffers for.
    fn flush_messages(&mut self, core: &Core) {
        let mut sent = false;
        while !self.messages.is_empty()
            && let Some(mut chain) = core.pop(CONTROL_IN)
            && let Some(message) = self.messages.pop_front()
        {
            let n = chain.writable.write(&message);
            core.push(CONTROL_IN, chain.head, n);
            sent = true;
        }
        if sent {
            core.interrupt(CONTROL_IN);
        }
        if !self.messages.is_empty() && core.set_notification(CONTROL_IN, true) {
            core.kick(CONTROL_IN);
        }
    }

    fn take_message(&mut self, bytes: [u8; message::LEN]) {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = bytes;
        let port = u32::from_le_bytes([p0, p1, p2, p3]);
        let (event, value) = (u16::from_le_bytes([e0, e1]), u16::from_le_bytes([v0, v1]));
        match (event, port) {
            (message::DEVICE_READY, _) if value != 0 => self.send(message::PORT_ADD, 1),
            (message::PORT_READY, 0) if value != 0 => {
                self.send(message::CONSOLE_PORT, 1);
                self.send(message::PORT_OPEN, 1);
            }
            (message::PORT_OPEN, 0) => {
                self.guest_connected = value != 0;
                self.room();
            }
            _ => tracing::debug!("{}: message {event} for port {port} means nothing", self.id),
        }
    }

    fn room(&self) {
        if let Some(room_again) = &self.room_again
            && self.wants_input()
        {
            room_again();
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> &'static Kind {
        &KIND
    }
    fn queue_sizes(&self) -> Vec<u16> {
        let size = |queue| match queue {
            CONTROL_IN | CONTROL_OUT => CONTROL_QUEUE_SIZE,
            _ => QUEUE_SIZE,
        };
        (0..QUEUES).map(size).collect()
    }
    fn vectors(&self) -> u16 {
        VECTORS
    }
    fn features(&self) -> u64 {
        feature::MULTIPORT | feature::EMERG_WRITE
    }
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
    fn connect(&mut self, core: Arc<Core>) -> Result<(), VirtioError> {
        self.core = Some(core);
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        let mut config = [self.columns, self.rows].map(u16::to_le_bytes).concat();
        config.extend_from_slice(&MAX_PORTS.to_le_bytes());
        config.extend_from_slice(&[0; 4]);
        config
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset == EMERGENCY
            && let Some(byte) = data.first()
            && let Err(error) = self.output.write(&[*byte])
        {
            tracing::debug!("{}: an emergency write is lost: {error}", self.id);
        }
    }

    fn reset(&mut self) {
        self.guest_connected = false;
        self.held = None;
        self.messages.clear();
    }

    fn kick(&mut self, queue: usize) {
        let Some(core) = self.core.clone() else { return };
        // A driver without ports has port 0 open from the start.
        if !core.has(feature::MULTIPORT) && core.status() & status::DRIVER_OK != 0 {
            self.guest_connected = true;
        }
        match queue {
            RX => self.room(),
            TX => self.transmit(),
            CONTROL_IN => self.flush_messages(&core),
            CONTROL_OUT => {
                core.serve(CONTROL_OUT, |chain| {
                    if let Some(bytes) = chain.readable.read_array() {
                        self.take_message(bytes);
                    }
                    0
                });
                self.flush_messages(&core);
            }
            _ => {}
        }
    }

    fn part_layout(&self, layout: LayoutDigest) -> LayoutDigest {
        layout.part::<Head>("console").part::<PortHead>("port").part::<Popped>("popped")
    }
    fn save_part(&self, to: &mut Encoder, _: Audience) -> Result<(), StateError> {
        to.put(&Head { cols: self.columns, rows: self.rows, max_nr_ports: MAX_PORTS })?;
        to.put(&1_u32)?; // ports_map: port 0
        to.put(&1_u32)?; // nr_active
        to.put(&PortHead {
            id: 0,
            guest_connected: self.guest_connected.into(),
            host_connected: 1,
            popped: self.held.is_some().into(),
        })?;
        let Some((element, done)) = &self.held else { return Ok(()) };
        let (mut iov_idx, mut iov_offset) = (0, u64::try_from(*done).unwrap_or(u64::MAX));
        for length in element.readable_lengths() {
            if iov_offset < length {
                break;
            }
            iov_offset -= length;
            iov_idx += 1;
        }
        to.put(&Popped { iov_idx, iov_offset, element: element.clone() })
    }

    fn decode_part(&self, from: &mut PartDecoder<'_, '_>) -> Result<Part, StateError> {
        let head: Head = from.get("console")?;
        if head.max_nr_ports > MAX_PORTS_ON_WIRE {
            let expected = format_args!("at most {MAX_PORTS_ON_WIRE}");
            let error = FieldError::new("console.max_nr_ports", expected, head.max_nr_ports);
            return Err(from.error(error));
        }
        let words = usize::try_from(head.max_nr_ports.div_ceil(32)).unwrap_or(0);
        let map: Vec<u32> = from.get_seq("console.ports_map", words)?;
        for (index, word) in map.iter().enumerate() {
            let allowed = u32::from(index == 0);
            if word & !allowed != 0 {
                let field = format!("console.ports_map[{index}]");
                let expected = "no port but port 0";
                return Err(from.error(FieldError::new(
                    field,
                    expected,
                    format_args!("{word:#x}"),
                )));
            }
        }
        let active: u32 = from.get("console.nr_active_ports")?;
        if active > 1 {
            let error = FieldError::new("console.nr_active_ports", "at most 1", active);
            return Err(from.error(error));
        }
        let mut port = None;
        if active == 1 {
            let found: PortHead = from.get("console.port[0]")?;
            if found.id != 0 {
                let error =
                    FieldError::new("console.port[0].id", "0, the only port here", found.id);
                return Err(from.error(error));
            }
            let mut popped = None;
            if found.popped != 0 {
                let request: Popped = from.get("console.port[0]")?;
                let field = "console.port[0].element";
                if let Some(core) = &self.core {
                    request.element.check(field, core.ram()).map_err(|e| from.error(e))?;
                }
                if request.done() > request.element.readable_len() {
                    let expected = "a place inside of the request";
                    let field = "console.port[0].iov_offset";
                    return Err(from.error(FieldError::new(field, expected, request.iov_offset)));
                }
                popped = Some(request);
            }
            port = Some((found, popped));
        }
        Ok(Box::new(State { head, port }))
    }

    fn restore_part(&mut self, part: Part) -> Result<(), FieldError> {
        let State { head, port } = *part.downcast::<State>().map_err(|_| {
            FieldError::new("console", "the part that this device has decoded", "another's")
        })?;
        self.columns = head.cols;
        self.rows = head.rows;
        let Some((port, popped)) = port else { return Ok(()) };
        self.guest_connected = port.guest_connected != 0;
        self.held = popped.map(|popped| {
            let done = usize::try_from(popped.done()).unwrap_or(usize::MAX);
            (popped.element, done)
        });
        if self.held.is_some()
            && let Some(mut queue) = self.core.as_ref().and_then(|core| core.queue(TX))
        {
            let used = queue.last_avail();
            queue.set_position(used.wrapping_add(1), used);
        }
        Ok(())
    }
}

impl Popped {
    /// How many bytes of the request are written.
    fn done(&self) -> u64 {
        let before = usize::try_from(self.iov_idx).unwrap_or(usize::MAX);
        let passed = self.element.readable_lengths().take(before).fold(0, u64::saturating_add);
        passed.saturating_add(self.iov_offset)
    }
}

/// The character line of a console, for whoever serves its other end on the I/O thread.
#[derive(Clone)]
pub struct ConsoleLine(Handle<Console>);

impl ConsoleLine {
    /// The line of `function`; `None` when that is not a [`Console`].
    pub fn new(function: Arc<Mutex<VirtioPci>>) -> Option<Self> {
        Handle::new(function).map(Self)
    }

    /// Whether [`receive`](Self::receive) would take a byte now.
    pub fn wants_input(&self) -> bool {
        self.0.with(|console| console.wants_input()) == Some(true)
    }

    /// Gives bytes to the guest; takes as many as it has room for, and says how many.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        self.0.with(|console| console.receive(bytes)).unwrap_or(0)
    }

    /// Whether the output has not taken everything.
    pub fn has_pending_output(&self) -> bool {
        self.0.with(|console| console.held.is_some()) == Some(true)
    }

    /// Goes on with the output.
    pub fn flush_output(&self) {
        self.0.with(Console::transmit);
    }

    /// See [`Console::on_room`].
    pub fn on_room(&self, room_again: Box<dyn Fn() + Send>) {
        self.0.with(|console| console.on_room(room_again));
    }
}
