//! Memory asked of the host ahead of the pages that will be written to it.
//!
//! The first write to a stretch of memory makes the kernel clear it, 2 MiB at a time, which takes
//! longer than to copy a page stream into it. A thread of its own has that done ahead of the stream.
//! How far ahead grows with the run of data that has come without a break, so that memory that is
//! never sent (zero pages) is hardly ever allocated by mistake: at most an eighth of what was sent.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use crate::guest::GuestRam;

/// A huge page: what the kernel clears at once.
const CHUNK: u64 = 2 << 20;
/// The part of a run that is asked for ahead of it.
const PART: u64 = 8;
/// The most that is asked for ahead, in chunks.
const MOST: u64 = 16;
/// Requests that may wait. When the thread is behind by more, asking is of no use.
const WAITING: usize = 2 * MOST as usize;

/// Follows the pages as they come, and says what is to be populated.
#[derive(Debug, Default)]
struct Run {
    block: usize,
    /// The chunk with which the run began, and the one that it has reached.
    chunks: Range<u64>,
    /// What was asked for ends here.
    asked: u64,
}

impl Run {
    /// A page has come for `offset` of `block`, which is `len` bytes long. Gives the bytes to be
    /// asked for now.
    fn page(&mut self, block: usize, offset: u64, len: u64) -> Option<Range<u64>> {
        let chunk = offset / CHUNK;
        if block == self.block && chunk == self.chunks.end {
            return None;
        }
        if block != self.block {
            *self = Self { block, ..Self::default() };
        }
        if Some(chunk) != self.chunks.end.checked_add(1) {
            self.chunks.start = chunk;
        }
        self.chunks.end = chunk;
        let run = chunk.saturating_sub(self.chunks.start);
        let ahead = (run / PART).min(MOST);
        let next = chunk.saturating_add(1);
        let from = next.saturating_mul(CHUNK).max(self.asked);
        let to = next.saturating_add(ahead).saturating_mul(CHUNK).min(len);
        if from >= to {
            return None;
        }
        self.asked = to;
        Some(from..to)
    }
}

/// Bytes of a block.
type Request = (usize, Range<u64>);

#[derive(Debug)]
struct Worker {
    requests: SyncSender<Request>,
    /// Where the stream is. What lies before is not worth populating any more, and two threads that
    /// populate the same chunk do it twice.
    reached: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

/// The thread, and what it is told.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    run: Run,
    worker: Option<Worker>,
    /// The thread could not be started: nothing is asked for.
    without: bool,
}

impl Ahead {
    /// Pages come for `bytes` of `block` from `offset` on, which is `len` bytes long.
    pub(super) fn pages(
        &mut self,
        ram: &Arc<dyn GuestRam>,
        block: usize,
        offset: u64,
        bytes: u64,
        len: u64,
    ) {
        let last = offset.saturating_add(bytes).min(len).saturating_sub(1);
        let mut at = offset;
        while at <= last {
            self.page(ram, block, at, len);
            at = (at / CHUNK).saturating_add(1).saturating_mul(CHUNK);
        }
    }

    fn page(&mut self, ram: &Arc<dyn GuestRam>, block: usize, offset: u64, len: u64) {
        let Some(range) = self.run.page(block, offset, len) else { return };
        if self.worker.is_none() && !self.without {
            match Worker::start(ram.clone()) {
                Ok(worker) => self.worker = Some(worker),
                Err(error) => {
                    self.without = true;
                    tracing::debug!(%error, "memory is not populated ahead of the stream");
                }
            }
        }
        if let Some(worker) = &self.worker {
            worker.reached.store(offset, Ordering::Relaxed);
            // Full: the stream is faster, and what it reaches first it populates itself.
            let _ = worker.requests.try_send((block, range));
        }
    }
}

impl Worker {
    fn start(ram: Arc<dyn GuestRam>) -> io::Result<Self> {
        let (requests, asked) = sync_channel::<Request>(WAITING);
        let reached = Arc::new(AtomicU64::new(0));
        let stream = reached.clone();
        let work = move || {
            for (block, range) in asked {
                for at in range.clone().step_by(CHUNK as usize) {
                    if at >= stream.load(Ordering::Relaxed).saturating_add(CHUNK) {
                        ram.populate(block, at, range.end.saturating_sub(at).min(CHUNK));
                    }
                }
            }
        };
        let thread = thread::Builder::new().name("migration-ahead".into()).spawn(work)?;
        Ok(Self { requests, reached, thread })
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        if let Some(Worker { requests, thread, .. }) = self.worker.take() {
            drop(requests);
            if thread.join().is_err() {
                tracing::error!("the thread that populates memory panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::PAGE_SIZE;

    const LEN: u64 = 1 << 30;

    /// What is asked for when every page of these chunks comes.
    fn asked(run: &mut Run, chunks: impl Iterator<Item = u64>) -> u64 {
        let mut bytes = 0;
        for chunk in chunks {
            for page in 0..CHUNK / PAGE_SIZE {
                if let Some(range) = run.page(0, chunk * CHUNK + page * PAGE_SIZE, LEN) {
                    assert!(range.start > chunk * CHUNK && range.end <= LEN);
                    bytes += range.end - range.start;
                }
            }
        }
        bytes
    }

    #[test]
    fn a_long_run_is_populated_ahead_once_and_not_beyond_the_end() {
        let mut run = Run::default();
        let first = asked(&mut run, 0..LEN / CHUNK);
        // All but the beginning, where the run was too short to go by.
        assert!((LEN - 32 * CHUNK..LEN).contains(&first), "{first:#x}");
        assert_eq!(asked(&mut run, 0..LEN / CHUNK), 0, "the second pass needs nothing");
    }

    #[test]
    fn scattered_data_does_not_allocate_what_lies_between() {
        let mut run = Run::default();
        assert_eq!(asked(&mut run, (0..LEN / CHUNK).step_by(2)), 0);
        let short_runs = (0..LEN / CHUNK).filter(|chunk| chunk % 16 < 8);
        assert_eq!(asked(&mut run, short_runs), 0);
    }

    #[test]
    fn another_block_is_another_run() {
        let mut run = Run::default();
        asked(&mut run, 0..100);
        assert_eq!(run.page(1, 101 * CHUNK, LEN), None);
        assert_eq!(run.page(1, 102 * CHUNK, LEN), None);
        // Offsets of a hostile stream are checked before; at worst nothing is asked for.
        assert_eq!(run.page(1, u64::MAX, LEN), None);
    }
}
