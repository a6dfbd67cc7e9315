//! A popped request as QEMU writes it into a stream: a raw little-endian image of its buffers.

use serde::{Deserialize, Serialize};

use migration::vmstate::{Bytes, FieldError};

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
pub(super) struct RawElement(Bytes<SIZE>);

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
        Chain::from_pieces(ram, head, readable.chain(writable).collect())
    }

    /// The element that stands for `chain`.
    pub(super) fn of(chain: &Chain<'_>) -> Self {
        let side = |wanted| {
            chain
                .pieces
                .iter()
                .filter(move |piece| piece.2 == wanted)
                .map(|piece| (piece.0, piece.1))
        };
        let mut element = Self::default();
        element.set_u32(0, chain.head.into());
        for (count_at, addresses, lengths, writable) in
            [(4, OUT_ADDRESSES, OUT_LENGTHS, false), (8, IN_ADDRESSES, IN_LENGTHS, true)]
        {
            let mut count = 0;
            for (i, (address, length)) in side(writable).take(MAX).enumerate() {
                element.set_u64(addresses + 8 * i, address);
                element.set_u64(lengths + 16 * i + 8, length.into());
                count += 1;
            }
            element.set_u32(count_at, count);
        }
        element
    }

    /// How many bytes the device reads.
    pub(super) fn readable_len(&self) -> u64 {
        self.readable_lengths().fold(0, u64::saturating_add)
    }

    /// The lengths of the buffers that the device reads.
    pub(super) fn readable_lengths(&self) -> impl Iterator<Item = u64> {
        (0..self.count(4).min(MAX)).map(|i| self.u64(OUT_LENGTHS + 16 * i + 8))
    }

    fn set_u32(&mut self, at: usize, value: u32) {
        if let Some(bytes) = self.0.get_mut(at..at + 4) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn set_u64(&mut self, at: usize, value: u64) {
        if let Some(bytes) = self.0.get_mut(at..at + 8) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}

const _: () = assert!(SIZE == 49168);
