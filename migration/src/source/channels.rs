//! Pages on further connections: a thread for each, and one queue for all.
//!
//! ```text
//! migration-out                         migration-chN
//! submit(chunk) ──→ queue of chunks ──→ packets, straight from guest memory
//! sync()            generation + 1  ──→ what is left of the section, then a packet with SYNC
//! ```
//! A chunk is one huge page at most and goes to one connection, so that no two of them write to the
//! same huge page of the destination at once, which both would have to clear.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::SourceError;
use crate::control::Control;
use crate::guest::{GuestRam, IoPart, PAGE_SIZE};
use crate::panics::guarded;
use crate::stats::Moved;
use crate::transport::lender::Lender;
use crate::transport::{Connection, is_stall};
use crate::wire::multifd::{Initial, MAX_PAGES, Packet};
use crate::wire::zstd::Compressor;

/// Chunks that may wait for each connection.
const WAITING: usize = 2;
/// Bytes of pages by which the next ones' size is judged.
const LATELY: u64 = 64 << 20;
/// How often whoever waits looks whether it is to be given up.
const LOOK: Duration = Duration::from_millis(50);

/// The connections and their threads. Dropping it closes them.
pub(super) struct Channels {
    shared: Arc<Shared>,
    connections: Vec<Connection>,
    threads: Vec<JoinHandle<()>>,
    /// Bytes of pages that were submitted.
    submitted: u64,
}

struct Shared {
    ram: Arc<dyn GuestRam>,
    /// The names of its blocks.
    names: Vec<String>,
    state: Mutex<State>,
    /// Something is to be done.
    work: Condvar,
    /// Something has been done.
    done: Condvar,
    numbers: AtomicU64,
    stall: Duration,
    /// Pages are compressed by zstd of this level.
    zstd: Option<u8>,
}

#[derive(Default)]
struct State {
    chunks: VecDeque<Chunk>,
    /// The section that chunks are of.
    generation: u64,
    /// The section up to which each connection has said SYNC.
    synced: Vec<u64>,
    /// What the threads have moved and nobody has counted yet.
    moved: Moved,
    /// Bytes that have been written.
    written: u64,
    /// Bytes of pages that have been written, in whatever form.
    done: u64,
    /// What pages of late became.
    lately: Lately,
    failed: Option<SourceError>,
    closing: bool,
}

/// How many bytes pages of late became: of headers and pages, or less where they are compressed.
#[derive(Default)]
struct Lately {
    written: u64,
    pages: u64,
}

impl Lately {
    fn add(&mut self, moved: &Moved) {
        if self.pages > LATELY {
            self.written /= 2;
            self.pages /= 2;
        }
        self.written += moved.bytes;
        self.pages += moved.normal_pages * PAGE_SIZE;
    }

    fn ratio(&self) -> f64 {
        if self.pages == 0 { 1.0 } else { self.written as f64 / self.pages as f64 }
    }
}

struct Chunk {
    generation: u64,
    block: usize,
    offsets: Vec<u64>,
}

enum Job {
    Chunk(Chunk),
    Sync,
}

impl Channels {
    /// Introduces the connections, and starts a thread for each.
    pub(super) fn open(
        connections: Vec<Connection>,
        ram: Arc<dyn GuestRam>,
        stall: Duration,
        zstd: Option<u8>,
    ) -> Result<Self, SourceError> {
        let thread = |e| SourceError::send("pages: their thread could not be started", e);
        let state = State { synced: vec![0; connections.len()], ..State::default() };
        let names = ram.blocks().into_iter().map(|block| block.name).collect();
        let shared = Arc::new(Shared {
            ram,
            names,
            state: Mutex::new(state),
            work: Condvar::new(),
            done: Condvar::new(),
            numbers: AtomicU64::new(0),
            stall,
            zstd,
        });
        let mut channels = Self { shared, connections, threads: Vec::new(), submitted: 0 };
        for (index, connection) in channels.connections.iter().enumerate() {
            let timed = connection.set_stall_timeout(stall);
            timed.map_err(|e| SourceError::send("the first bytes of a channel", e))?;
            let (shared, connection) = (channels.shared.clone(), connection.clone());
            let thread = thread::Builder::new()
                .name(format!("migration-ch{index}"))
                .spawn(move || shared.serve(index, &connection))
                .map_err(thread)?;
            channels.threads.push(thread);
        }
        Ok(channels)
    }

    /// Hands over pages of `block` at these offsets; waits for room.
    pub(super) fn submit(
        &mut self,
        block: usize,
        offsets: Vec<u64>,
        control: &Control,
    ) -> Result<(), SourceError> {
        self.submitted += offsets.len() as u64 * PAGE_SIZE;
        let most = WAITING * self.connections.len();
        let mut state = self.wait(control, |state| state.chunks.len() < most)?;
        let generation = state.generation;
        state.chunks.push_back(Chunk { generation, block, offsets });
        count(&mut state, control);
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }

    /// Bytes that have gone out, or will for the pages that wait.
    pub(super) fn sent(&self) -> u64 {
        let state = self.shared.lock();
        let waiting = self.submitted.saturating_sub(state.done);
        state.written + (waiting as f64 * state.lately.ratio()) as u64
    }

    /// Bytes that a byte of a page becomes on its way.
    pub(super) fn ratio(&self) -> f64 {
        self.shared.lock().lately.ratio()
    }

    /// Ends the section: returns when every connection has sent what it had, and SYNC.
    pub(super) fn sync(&mut self, control: &Control) -> Result<(), SourceError> {
        let generation = {
            let mut state = self.shared.lock();
            state.generation += 1;
            state.generation
        };
        self.shared.work.notify_all();
        let synced = |state: &State| state.synced.iter().all(|synced| *synced == generation);
        let mut state = self.wait(control, synced)?;
        count(&mut state, control);
        Ok(())
    }

    /// Waits until `condition` holds. A write that is stuck ends by itself, when its time is over.
    fn wait(
        &self,
        control: &Control,
        condition: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'_, State>, SourceError> {
        let mut state = self.shared.lock();
        loop {
            if let Some(error) = state.failed.take() {
                return Err(error);
            }
            if state.closing {
                return Err(SourceError::Closed { during: "its pages were sent" });
            }
            if control.cancelled().is_some() {
                return Err(SourceError::Cancelled);
            }
            if condition(&state) {
                return Ok(state);
            }
            let woken = self.shared.done.wait_timeout(state, LOOK);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Adds what the threads have moved to the migration's numbers.
fn count(state: &mut State, control: &Control) {
    control.stats().moved_beside(std::mem::take(&mut state.moved));
}

impl Drop for Channels {
    fn drop(&mut self) {
        let whole = {
            let mut state = self.shared.lock();
            state.closing = true;
            state.chunks.is_empty() && state.failed.is_none()
        };
        self.shared.work.notify_all();
        for connection in &self.connections {
            // What has been written still arrives.
            connection.shutdown(if whole { Shutdown::Write } else { Shutdown::Both });
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
    fn serve(&self, index: usize, connection: &Connection) {
        let (mut head, mut lender) = (Vec::new(), Lender::default());
        let mut smaller = self.zstd.map(Smaller::new);
        while let Some(job) = self.next(index) {
            let written = guarded(|| match &job {
                Job::Chunk(chunk) => match &mut smaller {
                    None => self.send(connection, chunk, &mut head, &mut lender),
                    Some(smaller) => self.send_smaller(connection, chunk, &mut head, smaller),
                },
                Job::Sync => self.send_sync(connection, &mut head),
            });
            let written = written.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            let mut state = self.lock();
            match written {
                Ok(moved) => {
                    state.moved.bytes += moved.bytes;
                    state.moved.normal_pages += moved.normal_pages;
                    state.written += moved.bytes;
                    state.done += moved.normal_pages * PAGE_SIZE;
                    if moved.normal_pages > 0 {
                        state.lately.add(&moved);
                    }
                    if let (Job::Sync, Some(synced)) = (job, state.synced.get_mut(index)) {
                        *synced += 1;
                    }
                }
                Err(error) => {
                    let what = "pages on a further connection";
                    let failed = if is_stall(&error) {
                        SourceError::Stalled { during: what, timeout: self.stall }
                    } else {
                        SourceError::send(what, error)
                    };
                    tracing::debug!(channel = index, error = %failed.chain(), "a channel failed");
                    if !state.closing {
                        state.failed.get_or_insert(failed);
                    }
                    state.closing = true;
                }
            }
            drop(state);
            self.done.notify_all();
        }
    }

    /// What the connection is to do next; nothing any more when it is to be closed.
    fn next(&self, index: usize) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.closing {
                self.done.notify_all();
                self.work.notify_all();
                return None;
            }
            let mine = state.synced.get(index).copied().unwrap_or_default();
            // Sections end one after the other: what is in front is of this one or a later one.
            if state.chunks.front().is_some_and(|chunk| chunk.generation == mine) {
                return state.chunks.pop_front().map(Job::Chunk);
            }
            if mine < state.generation {
                return Some(Job::Sync);
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn send(
        &self,
        to: &Connection,
        chunk: &Chunk,
        head: &mut Vec<u8>,
        lender: &mut Lender,
    ) -> io::Result<Moved> {
        let mut moved = Moved::default();
        let name = self.names.get(chunk.block).map_or("", String::as_str);
        for offsets in chunk.offsets.chunks(MAX_PAGES) {
            head.clear();
            self.head(false, name, offsets, None).write(head);
            let mut parts = Vec::with_capacity(offsets.len() + 1);
            parts.push(IoPart::Bytes(head));
            for (offset, len) in neighbours(offsets) {
                parts.push(IoPart::Ram { block: chunk.block, offset, len });
            }
            let mut full = || Err(io::ErrorKind::WouldBlock.into());
            lender.write_parts(&*self.ram, to.as_fd(), &parts, &mut full)?;
            let pages = offsets.len() as u64;
            moved.normal_pages += pages;
            moved.bytes += head.len() as u64 + pages * PAGE_SIZE;
        }
        Ok(moved)
    }

    /// The same, compressed. The pages are copied first: the guest may write to them meanwhile, and zstd
    /// looks at its input more than once.
    fn send_smaller(
        &self,
        to: &Connection,
        chunk: &Chunk,
        head: &mut Vec<u8>,
        smaller: &mut Smaller,
    ) -> io::Result<Moved> {
        let mut moved = Moved::default();
        let name = self.names.get(chunk.block).map_or("", String::as_str);
        for offsets in chunk.offsets.chunks(MAX_PAGES) {
            let bytes = smaller.packet(&*self.ram, chunk.block, offsets)?;
            head.clear();
            self.head(false, name, offsets, Some(bytes.len())).write(head);
            let parts = [IoPart::Bytes(head), IoPart::Bytes(bytes)];
            let mut full = || Err(io::ErrorKind::WouldBlock.into());
            self.ram.write_parts(to.as_fd(), &parts, &mut full)?;
            moved.normal_pages += offsets.len() as u64;
            moved.bytes += (head.len() + bytes.len()) as u64;
        }
        Ok(moved)
    }

    fn send_sync(&self, to: &Connection, head: &mut Vec<u8>) -> io::Result<Moved> {
        head.clear();
        self.head(true, "", &[], None).write(head);
        let mut to = to;
        to.write_all(head)?;
        Ok(Moved { bytes: head.len() as u64, ..Moved::default() })
    }

    fn head(&self, sync: bool, block: &str, offsets: &[u64], zstd: Option<usize>) -> Packet {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let (block, offsets) = (block.to_owned(), offsets.to_vec());
        Packet { sync, number, block, offsets, zeros: vec![], zstd }
    }
}

/// One connection's pages on their way through zstd.
struct Smaller {
    level: u8,
    /// Made when the first pages come.
    zstd: Option<Compressor>,
    pages: Vec<u8>,
}

impl Smaller {
    fn new(level: u8) -> Self {
        Self { level, zstd: None, pages: Vec::new() }
    }

    /// The bytes of these pages.
    fn packet(&mut self, ram: &dyn GuestRam, block: usize, offsets: &[u64]) -> io::Result<&[u8]> {
        self.pages.resize(offsets.len() * PAGE_SIZE as usize, 0);
        let mut rest = self.pages.as_mut_slice();
        for (offset, len) in neighbours(offsets) {
            let (piece, behind) = rest.split_at_mut_checked(len).unwrap_or_default();
            ram.copy_out(block, offset, piece)?;
            rest = behind;
        }
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(Compressor::new(self.level).map_err(io::Error::other)?),
        };
        zstd.compress(&self.pages).map_err(io::Error::other)
    }
}

/// Where pages that lie next to each other begin, and how many bytes they are.
fn neighbours(offsets: &[u64]) -> impl Iterator<Item = (u64, usize)> {
    let groups = offsets.chunk_by(|a, b| a + PAGE_SIZE == *b);
    groups.filter_map(|group| Some((*group.first()?, group.len() * PAGE_SIZE as usize)))
}

/// Says on each connection whose it is. A QEMU reads nothing at all before all have done so.
pub(super) fn introduce(
    connections: &[Connection],
    uuid: [u8; 16],
    token: [u8; 16],
) -> Result<(), SourceError> {
    for (connection, channel) in connections.iter().zip(0..) {
        let mut first = Vec::with_capacity(Initial::LEN);
        Initial { uuid, channel, token }.write(&mut first);
        let mut to = connection;
        to.write_all(&first).map_err(|e| SourceError::send("the first bytes of a channel", e))?;
    }
    Ok(())
}
