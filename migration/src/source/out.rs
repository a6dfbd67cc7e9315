//! Writes the stream: small parts are collected, pages go straight from guest memory.

use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::SourceError;
use crate::control::Control;
use crate::guest::{GuestRam, IoPart, PAGE_SIZE};
use crate::stats::Moved;
use crate::transport::lender::Lender;
use crate::transport::{Connection, Settled, Sink, is_stall};
use crate::wire::command::Command;
use crate::wire::ram::{PAGE, RUN, ZERO, write_eos, write_record, write_run};
use crate::wire::section::{self, PartType};

/// Parts in one vectored write: `IOV_MAX`.
const MAX_PARTS: usize = 1024;
/// Bytes in one write: enough to make its cost small, little enough to cancel and pace by.
const MAX_BYTES: usize = 1 << 20;
/// Pages in one write, most of which are zero then: so that progress is told and a cancel heeded.
const MAX_PAGES: u64 = 16 << 10;
/// The `ram` section's id; any number will do.
pub(super) const RAM_SECTION_ID: u32 = 2;
/// How long a last word may take to be written.
const LAST_WORD: Duration = Duration::from_millis(500);

enum Part {
    Bytes(Range<usize>),
    Ram { block: usize, offset: u64, len: usize },
    Owned(Vec<u8>),
}

/// A record of many pages, at the end of what has been collected.
struct Run {
    kind: u64,
    block: usize,
    /// Offset of the page that would continue it.
    next: u64,
    pages: u32,
    /// Where their number stands in the collected bytes.
    count_at: usize,
}

/// What the stream goes through.
pub(super) enum Channel<'a> {
    /// A connection, on which the destination answers.
    Connection(&'a Connection),
    /// Something that answers nothing; none when all of the stream is in it.
    Sink(Option<Sink>),
}

/// The stream on its way out.
pub(super) struct Out<'a> {
    channel: Channel<'a>,
    lender: Lender,
    ram: Arc<dyn GuestRam>,
    control: &'a Control,
    bytes: Vec<u8>,
    parts: Vec<Part>,
    len: usize,
    moved: Moved,
    /// The block of the last page record.
    block: Option<usize>,
    /// Pages that follow each other go in one record.
    runs: bool,
    /// The record of many pages that is being put together.
    run: Option<Run>,
    /// Pages that have been collected.
    pages: u64,
    /// A `ram` section is open.
    in_ram: bool,
    /// The same for what has been written so far.
    written_in_ram: bool,
    /// A write has failed half way; nothing more can be said.
    broken: bool,
    /// How long a sink may take nothing, if there is a limit.
    pub(super) patience: Option<Duration>,
    /// Time spent in writes, for the rate.
    pub(super) sending: Duration,
    /// Bytes written.
    pub(super) sent: u64,
}

impl<'a> Out<'a> {
    pub(super) fn new(channel: Channel<'a>, ram: Arc<dyn GuestRam>, control: &'a Control) -> Self {
        Self {
            channel,
            lender: Lender::default(),
            ram,
            control,
            bytes: Vec::with_capacity(16 << 10),
            parts: Vec::with_capacity(MAX_PARTS),
            len: 0,
            moved: Moved::default(),
            block: None,
            runs: false,
            run: None,
            pages: 0,
            in_ram: false,
            written_in_ram: false,
            broken: false,
            patience: None,
            sending: Duration::ZERO,
            sent: 0,
        }
    }

    /// The destination reads records of many pages.
    pub(super) fn allow_runs(&mut self) {
        self.runs = true;
    }

    /// Adds bytes that `write` appends.
    pub(super) fn put(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        self.run = None;
        let start = self.bytes.len();
        write(&mut self.bytes);
        let end = self.bytes.len();
        self.len += end - start;
        match self.parts.last_mut() {
            Some(Part::Bytes(range)) => range.end = end,
            _ => self.parts.push(Part::Bytes(start..end)),
        }
    }

    /// Adds bytes that are there already.
    pub(super) fn give(&mut self, bytes: Vec<u8>) {
        self.run = None;
        self.len += bytes.len();
        self.parts.push(Part::Owned(bytes));
    }

    pub(super) fn command(&mut self, command: &Command) {
        self.put(|out| command.write(out));
    }

    pub(super) fn begin_ram(&mut self, kind: PartType) {
        self.put(|out| section::write_part_header(out, kind, RAM_SECTION_ID));
        self.in_ram = true;
    }

    pub(super) fn end_ram(&mut self) {
        self.put(|out| {
            write_eos(out);
            section::write_footer(out, RAM_SECTION_ID);
        });
        self.in_ram = false;
    }

    /// Adds a page of `block`, whose name is `name`, and which is all zero or not.
    pub(super) fn page(&mut self, block: usize, name: &str, offset: u64, zero: bool) {
        let kind = if zero { ZERO } else { PAGE };
        self.pages += 1;
        *(if zero { &mut self.moved.zero_pages } else { &mut self.moved.normal_pages }) += 1;
        if !self.is_next_of_run(block, offset, kind, 1) {
            let named = (self.block != Some(block)).then_some(name);
            self.block = Some(block);
            let runs = self.runs;
            let mut count_at = 0;
            self.put(|out| {
                write_record(out, named, offset, if runs { kind | RUN } else { kind });
                if runs {
                    count_at = out.len();
                    write_run(out, 1);
                }
                if zero {
                    out.push(0);
                }
            });
            let next = offset + PAGE_SIZE;
            self.run = runs.then_some(Run { kind, block, next, pages: 1, count_at });
        }
        if !zero {
            let page = PAGE_SIZE as usize;
            match self.parts.last_mut() {
                Some(Part::Ram { len, .. }) => *len += page,
                _ => self.parts.push(Part::Ram { block, offset, len: page }),
            }
            self.len += page;
        }
    }

    /// Adds `count` zero pages that follow each other.
    pub(super) fn zero_pages(&mut self, block: usize, name: &str, offset: u64, count: u64) {
        if count == 0 {
            return;
        }
        self.page(block, name, offset, true);
        let next = offset + PAGE_SIZE;
        match u32::try_from(count - 1) {
            Ok(rest) if self.is_next_of_run(block, next, ZERO, rest) => {
                self.pages += count - 1;
                self.moved.zero_pages += count - 1;
            }
            // Whoever reads it takes them one by one.
            _ => (1..count).for_each(|n| self.page(block, name, offset + n * PAGE_SIZE, true)),
        }
    }

    /// How many of these pages, from the first on, the host has no memory for.
    /// None where each of them would be a record: they would go out in one burst.
    pub(super) fn absent_ahead(&self, block: usize, pages: Range<u64>) -> u64 {
        if !self.runs {
            return 0;
        }
        self.ram.absent_ahead(block, pages.start * PAGE_SIZE, (pages.end - pages.start) * PAGE_SIZE)
    }

    /// Which of these pages the host has no memory for; none where it doesn't say.
    pub(super) fn absent(&self, block: usize, pages: Range<u64>) -> Option<Vec<u64>> {
        self.ram.absent(block, pages.start * PAGE_SIZE, (pages.end - pages.start) * PAGE_SIZE)
    }

    /// Whether a page is all zero.
    pub(super) fn is_zero(&self, block: usize, offset: u64) -> bool {
        self.ram.is_zero(block, offset)
    }

    /// Adds pages to the run that they continue, if they do; what comes next begins another
    /// otherwise.
    fn is_next_of_run(&mut self, block: usize, offset: u64, kind: u64, pages: u32) -> bool {
        let next = self.run.as_mut().filter(|r| (r.block, r.next, r.kind) == (block, offset, kind));
        let Some(run) = next else { return false };
        run.pages += pages;
        run.next += u64::from(pages) * PAGE_SIZE;
        let end = run.count_at + size_of::<u32>();
        if let Some(count) = self.bytes.get_mut(run.count_at..end) {
            count.copy_from_slice(&run.pages.to_be_bytes());
        }
        true
    }

    /// Whether enough has been collected for a write. Under a bandwidth limit (bytes per second; 0
    /// is none) that is less, so that the destination never waits long for the next one.
    pub(super) fn is_full(&self, bandwidth: u64) -> bool {
        let most = match bandwidth {
            0 => MAX_BYTES,
            limit => usize::try_from(limit / 10).unwrap_or(MAX_BYTES).min(MAX_BYTES),
        };
        self.parts.len() + 2 > MAX_PARTS || self.len >= most || self.pages >= MAX_PAGES
    }

    /// Bytes that have been collected for the next write.
    pub(super) fn collected(&self) -> usize {
        self.len
    }

    /// Writes what has been collected.
    pub(super) fn flush(&mut self, what: &'static str) -> Result<(), SourceError> {
        if self.parts.is_empty() {
            return Ok(());
        }
        let bytes = &self.bytes;
        let parts: Vec<IoPart<'_>> = self
            .parts
            .iter()
            .map(|part| match part {
                Part::Bytes(range) => IoPart::Bytes(bytes.get(range.clone()).unwrap_or_default()),
                Part::Ram { block, offset, len } => {
                    IoPart::Ram { block: *block, offset: *offset, len: *len }
                }
                Part::Owned(bytes) => IoPart::Bytes(bytes),
            })
            .collect();
        let begin = Instant::now();
        let (control, patience) = (self.control, self.patience);
        let given_up = || control.cancelled().is_some();
        // Until all of it is out; also if guest memory panics.
        let broken = std::mem::replace(&mut self.broken, true);
        let result = match &self.channel {
            _ if broken => Err(io::ErrorKind::BrokenPipe.into()),
            Channel::Connection(connection) => {
                // Its send timeout is over.
                let mut full = || Err(io::ErrorKind::WouldBlock.into());
                self.lender.write_parts(&*self.ram, connection.as_fd(), &parts, &mut full)
            }
            Channel::Sink(Some(sink)) => {
                let mut full = || sink.wait_writable(patience, &given_up);
                self.ram.write_parts(sink.as_fd(), &parts, &mut full)
            }
            Channel::Sink(None) => Err(io::ErrorKind::BrokenPipe.into()),
        };
        self.sending += begin.elapsed();
        self.sent += self.len as u64;
        self.moved.bytes = self.len as u64;
        self.control.stats().moved(std::mem::take(&mut self.moved));
        self.bytes.clear();
        self.parts.clear();
        self.len = 0;
        self.run = None;
        self.pages = 0;
        self.written_in_ram = self.in_ram;
        self.broken = result.is_err();
        result.map_err(|source| {
            if let Channel::Sink(Some(sink)) = &mut self.channel {
                let source = sink.explain(source, patience);
                SourceError::NotSaved { during: what, source }
            } else if is_stall(&source) {
                let timeout = self.control.parameters().stall_timeout;
                SourceError::Stalled { during: what, timeout }
            } else {
                SourceError::send(what, source)
            }
        })
    }

    /// Says something after the last whole part of the stream, if the stream is whole; what was
    /// collected and not written is dropped. Never waits long.
    pub(super) fn say_at_border(&mut self, command: &Command) {
        let Channel::Connection(connection) = self.channel else { return };
        if self.broken || self.sent == 0 {
            return;
        }
        // A section that was only collected has not been opened for the reader.
        let mut last = Vec::new();
        if self.written_in_ram {
            write_eos(&mut last);
            section::write_footer(&mut last, RAM_SECTION_ID);
        }
        command.write(&mut last);
        self.broken = true;
        let timed = connection.set_stall_timeout(LAST_WORD);
        let mut to = connection;
        if let Err(error) = timed.and_then(|()| to.write_all(&last)) {
            tracing::debug!(%error, "the destination can't be told");
        }
        connection.shutdown(std::net::Shutdown::Write);
    }

    /// What descriptors can go over.
    pub(super) fn connection(&self) -> Option<&'a Connection> {
        match self.channel {
            Channel::Connection(connection) => Some(connection),
            Channel::Sink(_) => None,
        }
    }

    /// Whether anybody answers.
    pub(super) fn is_one_way(&self) -> bool {
        matches!(self.channel, Channel::Sink(_))
    }

    /// The whole stream has been written to a sink: closes it, and returns when all of it is where
    /// it should be.
    pub(super) fn settle(&mut self, during: &'static str) -> Result<Settled, SourceError> {
        let sink = match &mut self.channel {
            Channel::Sink(sink) => sink.take(),
            Channel::Connection(_) => None,
        };
        let closed = || SourceError::send(during, io::ErrorKind::BrokenPipe.into());
        let given_up = || self.control.cancelled().is_some();
        let settled = sink.ok_or_else(closed)?.settle(&given_up);
        settled.map_err(|source| SourceError::NotSaved { during, source })
    }
}
