//! One request of a driver: the guest memory that it lets the device read, and write.

use std::collections::VecDeque;
use std::io;

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{
    GuestAddress, GuestMemory, Permissions, ReadVolatile, VolatileMemoryError, VolatileSlice,
    WriteVolatile,
};

use crate::memory::GuestRam;

/// A piece of guest memory; writing to it marks it dirty.
pub type Slice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// How many descriptors a chain may have, indirect ones included: QEMU's limit.
const MAX_DESCRIPTORS: usize = 1024;

/// What is wrong with a chain.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// No descriptor could be read.
    #[error("descriptor chain {0} is empty, or its table lies outside of memory")]
    Empty(u16),
    /// It goes on after its end: a loop, an index out of range, an indirect table in an indirect
    /// table, more than 4 GiB.
    #[error("descriptor chain {0} has no proper end")]
    Endless(u16),
    /// More descriptors than QEMU takes.
    #[error("descriptor chain {0} has more than {MAX_DESCRIPTORS} descriptors")]
    TooLong(u16),
    /// A buffer that is for reading follows one that is for writing (virtio 1.2, 2.7.4.2).
    #[error("descriptor chain {0} has a readable buffer behind a writable one")]
    Order(u16),
    /// A buffer is not in guest memory.
    #[error("descriptor chain {head} has a buffer outside of guest memory, at {address:#x}")]
    Outside {
        /// The chain's first descriptor.
        head: u16,
        /// Where the buffer begins.
        address: u64,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Buffers in guest memory, consumed from the front.
#[derive(Debug, Clone, Default)]
pub struct Buffers<'a>(VecDeque<Slice<'a>>);

impl<'a> Buffers<'a> {
    /// How many bytes are left.
    pub fn len(&self) -> usize {
        self.0.iter().fold(0, |sum, slice| sum.saturating_add(slice.len()))
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Copies from guest memory; returns how many bytes there were.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let Some(slice) = self.0.front() else { break };
            let copied = slice.copy_to(rest);
            done += copied;
            self.consume(copied);
        }
        done
    }

    /// Copies exactly `N` bytes from guest memory; `None`, and nothing consumed, when there are
    /// fewer.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.len() < N {
            return None;
        }
        let mut array = [0; N];
        self.read(&mut array);
        Some(array)
    }

    /// Copies to guest memory; returns for how many bytes there was room.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty()) {
            let Some(slice) = self.0.front() else { break };
            let n = rest.len().min(slice.len());
            slice.copy_from(rest.get(..n).unwrap_or_default());
            done += n;
            self.consume(n);
        }
        done
    }

    /// Passes over `n` bytes.
    pub fn skip(&mut self, n: usize) {
        let mut left = n;
        while let Some(slice) = self.0.front().filter(|_| left > 0) {
            let step = left.min(slice.len());
            left -= step;
            self.consume(step);
        }
    }

    /// Keeps the first `at` bytes and returns the rest; all of it when there are fewer.
    pub fn split_off(&mut self, at: usize) -> Buffers<'a> {
        let mut head = VecDeque::new();
        let mut left = at;
        while left > 0 {
            let Some(slice) = self.0.pop_front() else { break };
            match slice.split_at(left) {
                Ok((first, second)) if !second.is_empty() => {
                    head.push_back(first);
                    self.0.push_front(second);
                    break;
                }
                _ => {
                    left = left.saturating_sub(slice.len());
                    head.push_back(slice);
                }
            }
        }
        Buffers(std::mem::replace(&mut self.0, head))
    }

    /// Fills guest memory from `source`; returns how much, less than all only at the source's end.
    pub fn fill_from(&mut self, source: &mut impl ReadVolatile) -> io::Result<usize> {
        let mut done = 0;
        while let Some(slice) = self.0.front_mut() {
            match source.read_volatile(slice) {
                Ok(0) => break,
                Ok(n) => {
                    done += n;
                    self.consume(n);
                }
                Err(VolatileMemoryError::IOError(e)) if interrupted(&e) => {}
                Err(error) => return Err(io_error(error)),
            }
        }
        Ok(done)
    }

    /// Gives all of it to `sink`.
    pub fn drain_to(&mut self, sink: &mut impl WriteVolatile) -> io::Result<()> {
        while let Some(slice) = self.0.front() {
            match sink.write_volatile(slice) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.consume(n),
                Err(VolatileMemoryError::IOError(e)) if interrupted(&e) => {}
                Err(error) => return Err(io_error(error)),
            }
        }
        Ok(())
    }

    /// Takes `n` bytes, at most what the first slice has, off the front.
    fn consume(&mut self, n: usize) {
        if let Some(slice) = self.0.pop_front()
            && n < slice.len()
            && let Ok(rest) = slice.offset(n)
        {
            self.0.push_front(rest);
        }
    }

    fn add(
        &mut self,
        ram: &'a GuestRam,
        address: u64,
        len: u32,
        head: u16,
    ) -> Result<(), ChainError> {
        let outside = |source| ChainError::Outside { head, address, source };
        let access = Permissions::ReadWrite;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let slices = ram.get_slices(GuestAddress(address), len, access).map_err(outside)?;
        for slice in slices {
            self.0.push_back(slice.map_err(outside)?);
        }
        Ok(())
    }
}

fn interrupted(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Interrupted
}

fn io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

/// One request.
#[derive(Debug)]
pub struct Chain<'a> {
    /// The first descriptor, by which the driver knows the request.
    pub head: u16,
    /// What the device may read.
    pub readable: Buffers<'a>,
    /// What the device may write.
    pub writable: Buffers<'a>,
    /// All buffers as they were at first: address, length, device-writable.
    pub(super) pieces: Vec<(u64, u32, bool)>,
}

impl<'a> Chain<'a> {
    /// Walks the descriptors, and checks each.
    pub(super) fn new(
        ram: &'a GuestRam,
        mut descriptors: DescriptorChain<&GuestRam>,
    ) -> Result<Self, ChainError> {
        let head = descriptors.head_index();
        let mut pieces = Vec::new();
        let mut complete = false;
        for descriptor in descriptors.by_ref() {
            if pieces.len() == MAX_DESCRIPTORS {
                return Err(ChainError::TooLong(head));
            }
            complete = !descriptor.has_next();
            pieces.push((descriptor.addr().0, descriptor.len(), descriptor.is_write_only()));
        }
        match (pieces.is_empty(), complete) {
            (true, _) => Err(ChainError::Empty(head)),
            (false, false) => Err(ChainError::Endless(head)),
            (false, true) => Self::from_pieces(ram, head, pieces),
        }
    }

    /// A chain from buffers `(address, length, device-writable)`, for requests that a migration
    /// stream lists.
    pub(super) fn from_pieces(
        ram: &'a GuestRam,
        head: u16,
        pieces: Vec<(u64, u32, bool)>,
    ) -> Result<Self, ChainError> {
        let (readable, writable) = (Buffers::default(), Buffers::default());
        let mut chain = Self { head, readable, writable, pieces };
        for (address, len, writable) in chain.pieces.iter().copied() {
            match writable {
                true => chain.writable.add(ram, address, len, head)?,
                false if !chain.writable.is_empty() => return Err(ChainError::Order(head)),
                false => chain.readable.add(ram, address, len, head)?,
            }
        }
        Ok(chain)
    }
}
