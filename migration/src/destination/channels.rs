//! Further connections that bring pages: a thread for each.
//!
//! A connection that has come to its SYNC is not read on before all have, and the main connection has
//! come to the section's end: so what belongs to the next section never lies under what belongs to this.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::compressed::Compressed;
use super::{Arrival, DestinationError};
use crate::guest::{GuestRam, PAGE_SIZE};
use crate::handover::destination::Event;
use crate::manifest::Channels as Announced;
use crate::panics::guarded;
use crate::stats::{MigrationStats, Moved};
use crate::transport::{Connection, StreamReader};
use crate::vmstate::ByteSource;
use crate::wire::WireError;
use crate::wire::multifd::{Initial, MAX_CHANNELS, Packet};

/// How often whoever waits looks whether anything has come.
const LOOK: Duration = Duration::from_millis(50);

/// How long a connection may take to say whose it is, which its source does at once.
const FIRST_WORD: Duration = Duration::from_secs(1);

/// The connections, and once pages may come their threads. Dropping it closes them.
#[derive(Default)]
pub(super) struct Channels {
    connections: Vec<Connection>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    generation: u64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The section up to which each connection has said SYNC.
    synced: Vec<u64>,
    /// The section up to which they may be read.
    released: u64,
    /// What has come and nobody has counted yet.
    moved: Moved,
    failed: Option<DestinationError>,
    /// The source's guest waits for what comes.
    hurry: bool,
    closing: bool,
}

impl Arrival<'_> {
    /// Takes the connections that pages will come through: those that begin with `token`, or all that
    /// belong to one VM where a source says none.
    pub(super) fn take_channels(
        &mut self,
        count: u8,
        token: Option<[u8; 16]>,
    ) -> Result<(), DestinationError> {
        let stall = self.parameters.stall_timeout;
        let begin = Instant::now();
        let mut taken: BTreeMap<u8, Connection> = BTreeMap::new();
        while taken.len() < usize::from(count) {
            let failed = |source| DestinationError::Vm { during: "taking a connection", source };
            let left = stall.saturating_sub(begin.elapsed());
            if left.is_zero() || self.control.cancelled().is_some() {
                let found = taken.len();
                return Err(DestinationError::ChannelsMissing { expected: count.into(), found });
            }
            let Some(connection) = self.vm.next_connection(left.min(LOOK)).map_err(failed)? else {
                continue;
            };
            let timed = connection.set_stall_timeout(FIRST_WORD).map_err(lost(taken.len()));
            match timed.and_then(|()| introduction(&connection)) {
                Ok(initial) if token.is_none_or(|token| token == initial.token) => {
                    taken.insert(initial.channel, connection);
                }
                Ok(_) => tracing::warn!("a connection that is no part of this migration"),
                Err(error) => tracing::warn!("no channel: {}", error.chain()),
            }
        }
        self.channels.connections = taken.into_values().collect();
        Ok(())
    }

    /// Takes the connections that `manifest` announces, if it does.
    pub(super) fn take_announced(
        &mut self,
        announced: Option<Announced>,
    ) -> Result<(), DestinationError> {
        match announced {
            None => Ok(()),
            Some(Announced { count, token })
                if (1..=MAX_CHANNELS).contains(&usize::from(count)) =>
            {
                self.take_channels(count, Some(token.to_bytes()))
            }
            Some(_) => Err(self.out_of_turn("a manifest with more connections than may be")),
        }
    }
}

/// What a connection has begun with; the bytes behind it are still to be read.
pub(super) fn introduction(connection: &Connection) -> Result<Initial, DestinationError> {
    let mut first = [0; Initial::LEN];
    let mut read = 0;
    while let Some(rest) = first.get_mut(read..).filter(|rest| !rest.is_empty()) {
        let n = io::Read::read(&mut &*connection, rest).map_err(lost(0))?;
        if n == 0 {
            return Err(lost(0)(io::ErrorKind::UnexpectedEof.into()));
        }
        read = read.saturating_add(n);
    }
    Ok(Initial::read(&mut crate::vmstate::SliceSource::new(&first))?)
}

pub(super) fn lost(channel: usize) -> impl FnOnce(io::Error) -> DestinationError {
    move |source| DestinationError::Channel { channel, source }
}

impl Channels {
    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// The source's guest stands still: a thread that gives way does so no longer than until the packet that it reads
    /// has come.
    pub(super) fn hurry(&self) {
        self.shared.lock().hurry = true;
    }

    /// Pages may come from now on, and the threads that bring them in
    /// [give way](crate::guest::DestinationVm::give_way) to guests. `main` is the connection that everything else
    /// comes over.
    pub(super) fn start(
        &mut self,
        ram: &Arc<dyn GuestRam>,
        main: Option<&Connection>,
        give_way: fn(bool),
    ) -> Result<(), DestinationError> {
        self.shared.lock().synced = vec![0; self.connections.len()];
        for (index, connection) in self.connections.iter().enumerate() {
            let (shared, ram, connection) = (self.shared.clone(), ram.clone(), connection.clone());
            let main = main.cloned();
            let work = move || shared.receive(index, &connection, ram, main, give_way);
            let thread = thread::Builder::new()
                .name(format!("migration-ch{index}"))
                .spawn(work)
                .map_err(lost(index))?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// What a thread has found wrong on this side, or in what came: whoever waits at the main connection
    /// was woken for it.
    pub(super) fn failure(&self) -> Option<DestinationError> {
        self.shared.lock().failed.take_if(|error| !is_of_connection(error))
    }

    /// Waits until the section has ended on each connection, and lets them be read on. It is a failure when
    /// none of those that are missing brings anything for as long as `stall`.
    pub(super) fn sync(
        &mut self,
        stall: Duration,
        stats: &MigrationStats,
    ) -> Result<(), DestinationError> {
        if self.is_empty() {
            return Ok(());
        }
        self.generation = self.generation.saturating_add(1);
        let mut since = Instant::now();
        let mut state = self.shared.lock();
        loop {
            if let Some(error) = state.failed.take() {
                return Err(error);
            }
            if state.moved != Moved::default() {
                since = Instant::now();
                stats.moved_beside(std::mem::take(&mut state.moved));
            }
            let missing = state.synced.iter().position(|synced| *synced < self.generation);
            let Some(channel) = missing else { break };
            if since.elapsed() > stall {
                let source = io::ErrorKind::WouldBlock.into();
                return Err(DestinationError::Channel { channel, source });
            }
            let woken = self.shared.changed.wait_timeout(state, LOOK);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.released = self.generation;
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        for connection in &self.connections {
            connection.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a channel's thread panicked");
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One connection's thread.
    fn receive(
        &self,
        index: usize,
        connection: &Connection,
        ram: Arc<dyn GuestRam>,
        main: Option<Connection>,
        give_way: fn(bool),
    ) {
        let received = guarded(|| self.packets(index, connection, &*ram, give_way));
        let received = received.unwrap_or_else(|source| Err(DestinationError::Panicked { source }));
        if let Err(error) = received {
            let of_connection = is_of_connection(&error);
            let mut state = self.lock();
            if !state.closing {
                tracing::debug!(channel = index, error = %error.chain(), "a channel failed");
                state.failed.get_or_insert(error);
            }
            drop(state);
            self.changed.notify_all();
            // A source whose pages nobody reads says nothing on the main connection either. One that
            // has lost a connection does.
            if let Some(main) = main.filter(|_| !of_connection) {
                main.shutdown(Shutdown::Read);
            }
        }
    }

    fn packets(
        &self,
        index: usize,
        connection: &Connection,
        ram: &dyn GuestRam,
        give_way: fn(bool),
    ) -> Result<(), DestinationError> {
        // Its timeout would count the time in which nothing is to come; the main connection waits.
        connection.set_patient().map_err(lost(index))?;
        let mut reader = StreamReader::new(connection.clone());
        let mut section = 0u64;
        // The block of the last packet: its name, number and length.
        let mut block = (String::new(), 0, 0);
        let mut compressed = Compressed::new(index);
        // The first packet of a section may be the first for which the source's guest waits.
        let mut gives_way = false;
        loop {
            let before = reader.offset();
            let packet = Packet::read(&mut reader).map_err(|error| match error {
                WireError::BrokenOff { source, .. } => lost(index)(source),
                other => other.into(),
            })?;
            let any = !packet.offsets.is_empty() || !packet.zeros.is_empty();
            if any && block.0 != packet.block {
                block = find(ram, packet.block)?;
            }
            clear_pages(ram, &block, &packet.zeros)?;
            if !packet.offsets.is_empty() {
                match packet.zstd {
                    None => read_pages(&mut reader, ram, &block, &packet.offsets)?,
                    Some(len) => compressed.read(&mut reader, ram, &block, &packet.offsets, len)?,
                }
            }
            let bytes = reader.offset().saturating_sub(before);
            let mut state = self.lock();
            if state.closing {
                return Ok(());
            }
            let moved = &mut state.moved;
            moved.bytes = moved.bytes.saturating_add(bytes);
            moved.normal_pages = moved.normal_pages.saturating_add(packet.offsets.len() as u64);
            moved.zero_pages = moved.zero_pages.saturating_add(packet.zeros.len() as u64);
            let way = !state.hurry && !packet.sync;
            if std::mem::replace(&mut gives_way, way) != way {
                // Not while it has what others wait for.
                drop(state);
                give_way(way);
                state = self.lock();
            }
            if !packet.sync {
                continue;
            }
            section = section.saturating_add(1);
            if let Some(synced) = state.synced.get_mut(index) {
                *synced = section;
            }
            self.changed.notify_all();
            while state.released < section && !state.closing {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closing {
                return Ok(());
            }
        }
    }
}

/// Whether it is the way here that failed.
fn is_of_connection(error: &DestinationError) -> bool {
    matches!(error, DestinationError::Channel { .. }) || error.event() == Event::Lost
}

/// A block's name, number and length.
fn find(ram: &dyn GuestRam, name: String) -> Result<(String, usize, u64), DestinationError> {
    let found =
        ram.blocks().iter().enumerate().find_map(|(n, b)| (b.name == name).then_some((n, b.len)));
    match found {
        Some((index, len)) => Ok((name, index, len)),
        None => Err(DestinationError::UnknownBlock { name }),
    }
}

/// The end of the page at `offset` of a block of so many bytes, which it must be in.
pub(super) fn end_of_page(name: &str, len: u64, offset: u64) -> Result<u64, DestinationError> {
    let end = offset.checked_add(PAGE_SIZE).filter(|end| *end <= len);
    end.filter(|_| offset.is_multiple_of(PAGE_SIZE)).ok_or_else(|| DestinationError::Offset {
        name: name.to_owned(),
        offset,
        len,
    })
}

/// The stretches of a block that pages at these offsets make, neighbours together.
fn stretches<'a>(
    (name, _, len): &'a (String, usize, u64),
    offsets: &'a [u64],
) -> impl Iterator<Item = Result<Range<u64>, DestinationError>> + 'a {
    let mut offsets = offsets.iter().peekable();
    std::iter::from_fn(move || {
        let start = *offsets.next()?;
        let mut end = end_of_page(name, *len, start);
        while let Ok(at) = end
            && offsets.next_if_eq(&&at).is_some()
        {
            end = end_of_page(name, *len, at);
        }
        Some(end.map(|end| start..end))
    })
}

/// The pages behind a packet's head.
fn read_pages(
    reader: &mut StreamReader,
    ram: &dyn GuestRam,
    block: &(String, usize, u64),
    offsets: &[u64],
) -> Result<(), DestinationError> {
    let mut stretches = stretches(block, offsets).peekable();
    while let Some(stretch) = stretches.next() {
        // Behind the last page another packet's head is expected.
        let ahead = if stretches.peek().is_none() { Packet::LEN } else { 0 };
        read_run(reader, ram, block.1, &stretch?, ahead)?;
    }
    Ok(())
}

/// Pages of which a packet says no more than that they are zero.
fn clear_pages(
    ram: &dyn GuestRam,
    block: &(String, usize, u64),
    offsets: &[u64],
) -> Result<(), DestinationError> {
    // Checked before anything is written.
    let stretches: Vec<_> = stretches(block, offsets).collect::<Result<_, _>>()?;
    for stretch in stretches {
        let len = stretch.end.saturating_sub(stretch.start);
        let filled = ram.fill(block.1, stretch.start, len, 0);
        filled.map_err(|source| DestinationError::Memory { source })?;
    }
    Ok(())
}

fn read_run(
    reader: &mut StreamReader,
    ram: &dyn GuestRam,
    block: usize,
    run: &Range<u64>,
    ahead: usize,
) -> Result<(), DestinationError> {
    let at = reader.offset();
    let len = usize::try_from(run.end.saturating_sub(run.start)).unwrap_or(usize::MAX);
    let read = reader.read_ram(ram, block, run.start, len, ahead);
    read.map_err(|source| DestinationError::Page { offset: at, source })
}
