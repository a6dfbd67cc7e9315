//! One pass over memory: chunk by chunk the log is cleared, and the chunk's pages are sent.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::absent::{self, Absent};
use super::precopy::{Passes, SAMPLE};
use super::{Migration, SourceError};
use crate::dirty::runs;
use crate::guest::PAGE_SIZE;
use crate::wire::section::PartType;

/// Pages whose bits are cleared at once, where there are any: a huge page's worth.
pub(super) const CHUNK_PAGES: u64 = 512;
/// Bytes after which a PART section is ended and the next one begun.
const PART_BYTES: u64 = 64 << 20;
/// How long one takes at most where pages have connections of their own, all of which stop at its end: whoever reads
/// this connection must not take us for dead.
const PART_TIME: Duration = Duration::from_secs(1);

/// The section of RAM that is being sent.
struct Part {
    kind: PartType,
    /// What had been sent when it began.
    sent: u64,
    began: Instant,
}

/// Why a pass ended.
#[derive(PartialEq, Eq)]
pub(super) enum PassEnd {
    /// Every page that was dirty has been sent.
    Whole,
    /// Time was over; what was not sent is still marked.
    TimeOver,
}

impl Migration<'_> {
    /// Sends every page that is marked, while the guest runs (`PartType::Part`) or after it has stopped.
    pub(super) fn send_pass(
        &mut self,
        passes: &mut Passes,
        kind: PartType,
    ) -> Result<PassEnd, SourceError> {
        let running = kind == PartType::Part;
        if running && passes.dirty.count() == 0 {
            return Ok(PassEnd::Whole);
        }
        let mut part = Part { kind, sent: self.sent(), began: Instant::now() };
        self.out.begin_ram(kind);
        if !running && self.channels.is_some() {
            // Nothing else goes this way before all pages have gone the others, and whoever reads them is to know that
            // the guest stands still.
            self.send("RAM")?;
        }
        for block in 0..passes.blocks.len() {
            let pages = passes.dirty.pages(block);
            let mut first = 0;
            while first < pages {
                // Only the first pass comes to pages that nobody has written to.
                let end = match passes.first {
                    true => absent::chunk_end(&self.out, block, first, pages),
                    false => pages.min(first + CHUNK_PAGES),
                };
                let chunk = std::mem::replace(&mut first, end)..end;
                let Some(bits) = passes.dirty.take(block, chunk.clone()) else { continue };
                if running && let Some(tracker) = &mut self.tracker {
                    tracker
                        .clear(block, chunk.start, &bits)
                        .map_err(SourceError::vm("clearing the dirty log"))?;
                }
                self.send_chunk(passes, &mut part, block, chunk, &bits)?;
                if !running {
                    continue;
                }
                self.sample(passes, SAMPLE);
                self.pace(passes);
                if self.time_is_over(passes)? {
                    self.end_ram()?;
                    self.send("RAM")?;
                    return Ok(PassEnd::TimeOver);
                }
                self.renew(&mut part)?;
            }
        }
        self.end_ram()?;
        self.send("RAM")?;
        self.check()?;
        if running {
            self.sample(passes, Duration::ZERO);
        }
        Ok(PassEnd::Whole)
    }

    /// Sends the pages of `chunk` whose bits are set, now that the log would tell if they changed.
    fn send_chunk(
        &mut self,
        passes: &mut Passes,
        part: &mut Part,
        block: usize,
        chunk: Range<u64>,
        bits: &[u64],
    ) -> Result<(), SourceError> {
        let running = part.kind == PartType::Part;
        let name = passes.blocks.get(block).map_or_else(String::new, |b| b.name.clone());
        let absent = match passes.first {
            true => Absent::of(&self.out, block, chunk.clone()),
            false => Absent::default(),
        };
        // Pages for other connections.
        let mut theirs = Vec::new();
        for run in runs(chunk.start, bits) {
            let ahead = absent.ahead(&run);
            self.out.zero_pages(block, &name, run.start * PAGE_SIZE, ahead);
            passes.pages += ahead;
            for page in run.start + ahead..run.end {
                let offset = page * PAGE_SIZE;
                passes.pages += 1;
                let zero = absent.has(page) || self.out.is_zero(block, offset);
                if self.channels.is_some() && !zero {
                    theirs.push(offset);
                    if running && theirs.len() as u64 * PAGE_SIZE >= passes.piece() {
                        self.submit(block, std::mem::take(&mut theirs))?;
                        self.sample(passes, SAMPLE);
                        self.pace(passes);
                        self.renew(part)?;
                    }
                    continue;
                }
                self.out.page(block, &name, offset, zero);
                self.send_if_full(passes, running)?;
            }
            self.send_if_full(passes, running)?;
        }
        self.submit(block, theirs)
    }

    /// Writes what has been collected, if that is enough for a write.
    fn send_if_full(&mut self, passes: &mut Passes, running: bool) -> Result<(), SourceError> {
        if self.out.is_full(if running { passes.limit } else { 0 }) {
            self.send("RAM")?;
            self.check()?;
            if running {
                self.sample(passes, SAMPLE);
                self.pace(passes);
            }
        }
        Ok(())
    }

    /// Gives a chunk's pages to the connections that they go through.
    fn submit(&mut self, block: usize, chunk: Vec<u64>) -> Result<(), SourceError> {
        let Some(channels) = self.channels.as_mut().filter(|_| !chunk.is_empty()) else {
            return Ok(());
        };
        let done = channels.submit(block, chunk, self.control);
        done.map_err(|e| self.write_failed(e))?;
        self.check()
    }

    /// Ends the section of RAM and begins the next, if it has become long.
    fn renew(&mut self, part: &mut Part) -> Result<(), SourceError> {
        let several = self.channels.is_some();
        let is_long = match several {
            true => part.began.elapsed() > (self.parameters.stall_timeout / 8).min(PART_TIME),
            false => self.sent().saturating_sub(part.sent) > PART_BYTES,
        };
        if is_long {
            self.end_ram()?;
            // The other side's connections wait for this end, and ours for them.
            if several {
                self.send("RAM")?;
            }
            self.out.begin_ram(part.kind);
            (part.sent, part.began) = (self.sent(), Instant::now());
        }
        Ok(())
    }

    /// Ends a section of RAM here and on the other connections.
    pub(super) fn end_ram(&mut self) -> Result<(), SourceError> {
        if let Some(channels) = &mut self.channels {
            channels.sync(self.control).map_err(|e| self.write_failed(e))?;
        }
        self.out.end_ram();
        Ok(())
    }
}
