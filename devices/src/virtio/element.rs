//! A popped request as QEMU writes it into a stream: a raw little-endian image of its buffers.

use serde::{Deserialize, Serialize};

use migration::vmstate::{FieldError, FixedVec};

use super::chain::{Chain, ChainError};
use crate::memory::GuestRam;

/// Most buffers in each direction.
const MAX: usize = 1024;
/// index, out_num, in_num, padding; addresses; {unused, length} pairs.
const SIZE: usize = 16 + 2 * MAX * 8 + 2 * MAX * 16;
const IN_ADDRESSES: usize = 16;
const OUT_ADDRESSES: usize = IN_ADDRESSES + 8 * MAX;
const IN_LENGTHS: usize = OUT_ADDRESSES + 8 * MAX;
const OUT_LENGTHS: usize = IN_LENGTHS + 16 * MAX;

/// 49168 bytes: one request that was taken from a queue and not finished.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct RawElement(FixedVec<u8, SIZE>);

impl RawElement {
    fn u32(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(self.0.get(at..).unwrap_or_default()) {
            *to = *from;
        }
        u32::from_le_bytes(bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at + 4)) << 32 | u64::from(self.u32(at))
    }

    fn count(&self, at: usize) -> usize {
        usize::try_from(self.u32(at)).unwrap_or(usize::MAX)
    }

    /// The first descriptor's index.
    pub(super) fn index(&self) -> u32 {
        self.u32(0)
    }

    /// Checks the counts, the index and every buffer.
    pub(super) fn check(&self, field: &str, ram: &GuestRam) -> Result<(), FieldError> {
        for (name, at) in [("out_num", 4), ("in_num", 8)] {
            if self.count(at) > MAX {
                let field = format!("{field}.{name}");
                return Err(FieldError::new(field, format_args!("at most {MAX}"), self.count(at)));
            }
        }
        let index = self.index();
        if usize::try_from(index).is_ok_and(|index| index >= MAX) {
            let expected = format_args!("less than {MAX}");
            return Err(FieldError::new(format!("{field}.index"), expected, index));
        }
        let lengths = |base: usize, n| (0..n).map(move |i| (i, self.u64(base + 16 * i + 8)));
        for (i, length) in
            lengths(OUT_LENGTHS, self.count(4)).chain(lengths(IN_LENGTHS, self.count(8)))
        {
            if u32::try_from(length).is_err() {
                let field = format!("{field}.sg[{i}].length");
                return Err(FieldError::new(field, "less than 4 GiB", length));
            }
        }
        self.chain(ram).map(drop).map_err(|error| {
            FieldError::new(field, "a request with its buffers in guest memory", error)
        })
    }

    /// The request itself.
    pub(super) fn chain<'a>(&self, ram: &'a GuestRam) -> Result<Chain<'a>, ChainError> {
        let buffers = |n: usize, addresses: usize, lengths: usize, writable| {
            (0..n.min(MAX)).map(move |i| {
                let length = self.u64(lengths + 16 * i + 8);
                let length = u32::try_from(length).unwrap_or(u32::MAX);
                (self.u64(addresses + 8 * i), length, writable)
            })
        };
        let head = u16::try_from(self.index()).unwrap_or(u16::MAX);
        let readable = buffers(self.count(4), OUT_ADDRESSES, OUT_LENGTHS, false);
        let writable = buffers(self.count(8), IN_ADDRESSES, IN_LENGTHS, true);
        Chain::from_pieces(ram, head, readable.chain(writable))
    }

    /// An element with these buffers `(address, length)`, for tests.
    #[cfg(test)]
    pub(super) fn build(index: u32, readable: &[(u64, u64)], writable: &[(u64, u64)]) -> Self {
        let mut element = Self::default();
        let mut set =
            |at: usize, bytes: &[u8]| element.0[at..at + bytes.len()].copy_from_slice(bytes);
        set(0, &index.to_le_bytes());
        set(4, &u32::try_from(readable.len()).unwrap().to_le_bytes());
        set(8, &u32::try_from(writable.len()).unwrap().to_le_bytes());
        for (i, (address, length)) in readable.iter().enumerate() {
            set(OUT_ADDRESSES + 8 * i, &address.to_le_bytes());
            set(OUT_LENGTHS + 16 * i + 8, &length.to_le_bytes());
        }
        for (i, (address, length)) in writable.iter().enumerate() {
            set(IN_ADDRESSES + 8 * i, &address.to_le_bytes());
            set(IN_LENGTHS + 16 * i + 8, &length.to_le_bytes());
        }
        element
    }
}

const _: () = assert!(SIZE == 49168);
