//! A stream that is read once, from a file, a pipe or a socket.

use std::io::{self, Read};

use crate::vmstate::ByteSource;

/// How much of a stream is held to find the description behind the devices, in bytes. QEMU's devices
/// and their description are below 1 MiB, with queues full of requests some ten.
pub const MAX_TAIL: usize = 256 << 20;

const CAPACITY: usize = 256 << 10;

/// A buffered stream that can be looked into as far as is needed.
pub struct Input<R> {
    from: R,
    buffer: Vec<u8>,
    start: usize,
    taken: u64,
}

impl<R: Read> Input<R> {
    /// Reads `from` its beginning on.
    pub fn new(from: R) -> Self {
        Self { from, buffer: Vec::new(), start: 0, taken: 0 }
    }

    fn buffered(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }

    /// Reads more; `false` at the end.
    fn fill(&mut self) -> io::Result<bool> {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        let len = self.buffer.len();
        let want = len.max(CAPACITY) as u64;
        Ok((&mut self.from).take(want).read_to_end(&mut self.buffer)? > 0)
    }

    /// All that is left of the stream, if that is at most `limit` bytes; else nothing is lost.
    pub fn rest(&mut self, limit: usize) -> io::Result<Option<&[u8]>> {
        while self.buffered().len() <= limit {
            if !self.fill()? {
                return Ok(Some(self.buffered()));
            }
        }
        Ok(None)
    }
}

impl<R: Read> ByteSource for Input<R> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        while self.buffered().len() < buf.len() {
            if !self.fill()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        buf.copy_from_slice(self.buffered().get(..buf.len()).unwrap_or_default());
        self.start = self.start.saturating_add(buf.len());
        self.taken = self.taken.saturating_add(buf.len() as u64);
        Ok(())
    }

    fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        while self.buffered().len() < n && self.fill()? {}
        let have = self.buffered();
        Ok(have.get(..n).unwrap_or(have))
    }

    fn offset(&self) -> u64 {
        self.taken
    }
}
