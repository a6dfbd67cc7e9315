//! Reads a stream: small parts through a buffer, pages straight into guest memory.
//!
//! ```text
//! buffer:  …taken│ 8-byte header │ first part of a page │
//!                                └── handed to the guest's memory
//! socket:                        the rest of the page ──→ guest memory   } one readv
//!                                the next header      ──→ buffer         }
//! ```

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{Abort, Connection, Supply};
use crate::guest::{GuestRam, ReadPart};
use crate::vmstate::ByteSource;

/// Capacity of the buffer. Small records (zero pages, device fields) come by the thousand in one
/// read; it must hold the 512 bytes that [`ByteSource::peek`] promises.
const CAPACITY: usize = 64 << 10;

/// What a stream is read from.
#[derive(Debug)]
pub enum Input {
    /// One direction of a connection.
    Connection(Connection),
    /// A file, a pipe, a command.
    Supply(Supply),
}

impl From<Connection> for Input {
    fn from(connection: Connection) -> Self {
        Self::Connection(connection)
    }
}

impl From<Supply> for Input {
    fn from(supply: Supply) -> Self {
        Self::Supply(supply)
    }
}

impl Input {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Connection(connection) => (&mut &*connection).read(buf),
            Self::Supply(supply) => (&mut &*supply).read(buf),
        }
    }

    fn read_parts(&self, ram: &dyn GuestRam, parts: &mut [ReadPart<'_>]) -> io::Result<usize> {
        let supply = match self {
            Self::Connection(connection) => return ram.read_parts(connection.as_fd(), parts),
            Self::Supply(supply) => supply,
        };
        loop {
            match ram.read_parts(supply.as_fd(), parts) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => supply.wait_readable()?,
                result => return result,
            }
        }
    }

    /// A handle that ends blocked calls from another thread.
    pub(crate) fn abort_handle(&self) -> Abort {
        match self {
            Self::Connection(connection) => connection.abort_handle(),
            Self::Supply(supply) => Abort::Flag(supply.given_up()),
        }
    }
}

/// A buffered reader of a stream.
#[derive(Debug)]
pub struct StreamReader {
    input: Input,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    taken: u64,
    body: Option<Body>,
}

/// The section body that is being read.
#[derive(Debug)]
struct Body {
    left: u64,
    record: Option<Vec<u8>>,
}

impl StreamReader {
    /// Reads what comes from a connection or a supply.
    pub fn new(input: impl Into<Input>) -> Self {
        Self {
            input: input.into(),
            buffer: vec![0; CAPACITY].into_boxed_slice(),
            start: 0,
            end: 0,
            taken: 0,
            body: None,
        }
    }

    /// What nobody answers, if that is what is read from.
    pub(crate) fn supply(&mut self) -> Option<&mut Supply> {
        match &mut self.input {
            Input::Connection(_) => None,
            Input::Supply(supply) => Some(supply),
        }
    }

    /// Bytes that have come and have not been taken.
    fn buffered(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Whether something has come already, so that a read would not wait.
    pub fn has_buffered(&self) -> bool {
        self.start < self.end
    }

    /// From here on at most `limit` bytes may be taken until [`end_body`](Self::end_body), and they
    /// are recorded when `record` is set.
    pub fn begin_body(&mut self, limit: u64, record: bool) {
        self.body = Some(Body { left: limit, record: record.then(Vec::new) });
    }

    /// Ends the limit; gives the bytes that were recorded.
    pub fn end_body(&mut self) -> Option<Vec<u8>> {
        self.body.take().and_then(|b| b.record)
    }

    fn consume(&mut self, n: usize) {
        self.start = self.start.saturating_add(n).min(self.end);
        self.taken = self.taken.saturating_add(n as u64);
    }

    /// Reads once, so that at least one more byte is in the buffer; `false` at the stream's end.
    fn fill(&mut self) -> io::Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end.saturating_sub(self.start));
        }
        let Some(free) = self.buffer.get_mut(self.end..) else { return Ok(false) };
        loop {
            match self.input.read(free) {
                Ok(n) => {
                    self.end = self.end.saturating_add(n).min(self.buffer.len());
                    return Ok(n > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads `len` bytes into guest memory. Together with them up to `ahead` bytes are read that stand
    /// behind them: as much as is needed to know what comes next, and no page that would be copied.
    pub fn read_ram(
        &mut self,
        ram: &dyn GuestRam,
        block: usize,
        offset: u64,
        len: usize,
        ahead: usize,
    ) -> io::Result<()> {
        let have = self.buffered();
        let have = have.get(..len).unwrap_or(have);
        let mut done = have.len();
        if done > 0 {
            ram.copy_in(block, offset, have)?;
            self.consume(done);
        }
        while done < len {
            // The buffer is empty: the rest comes directly, the next header behind it.
            (self.start, self.end) = (0, 0);
            let rest = len.saturating_sub(done);
            let Some(behind) = self.buffer.get_mut(..ahead) else { break };
            let to = ReadPart::Ram { block, offset: offset.saturating_add(done as u64), len: rest };
            let mut parts = [to, ReadPart::Bytes(behind)];
            let n = self.input.read_parts(ram, &mut parts)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let direct = n.min(rest);
            done = done.saturating_add(direct);
            self.taken = self.taken.saturating_add(direct as u64);
            self.end = n.saturating_sub(direct).min(ahead);
        }
        Ok(())
    }

    /// Reads and throws away until the stream ends, a read fails, or `limit` bytes or `time` since
    /// `begin` are over.
    pub fn drain(&mut self, limit: u64, begin: Instant, time: Duration) {
        let mut left = limit;
        self.start = self.end;
        while left > 0 && begin.elapsed() < time && matches!(self.fill(), Ok(true)) {
            left = left.saturating_sub(self.buffered().len() as u64);
            self.start = self.end;
        }
    }
}

impl ByteSource for StreamReader {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        if let Some(body) = &mut self.body {
            body.left = body.left.checked_sub(buf.len() as u64).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "the section's body is too long")
            })?;
        }
        let mut to = &mut *buf;
        while !to.is_empty() {
            if !self.has_buffered() && !self.fill()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let n = to.len().min(self.buffered().len());
            let (head, tail) = to.split_at_mut(n);
            head.copy_from_slice(self.buffered().get(..n).unwrap_or_default());
            self.consume(n);
            to = tail;
        }
        if let Some(record) = self.body.as_mut().and_then(|b| b.record.as_mut()) {
            record.extend_from_slice(buf);
        }
        Ok(())
    }

    fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        while self.buffered().len() < n && self.buffered().len() < CAPACITY {
            if !self.fill()? {
                break;
            }
        }
        let have = self.buffered();
        Ok(have.get(..n).unwrap_or(have))
    }

    fn offset(&self) -> u64 {
        self.taken
    }
}
