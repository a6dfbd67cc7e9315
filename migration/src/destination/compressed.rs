//! Pages that come compressed.

use super::DestinationError;
use super::channels::{end_of_page, lost};
use crate::guest::{GuestRam, PAGE_SIZE};
use crate::transport::StreamReader;
use crate::vmstate::ByteSource;
use crate::wire::zstd::Decompressor;

/// One connection's pages on their way through zstd.
pub(super) struct Compressed {
    channel: usize,
    /// Made when the first compressed pages come.
    zstd: Option<Decompressor>,
    bytes: Vec<u8>,
}

impl Compressed {
    pub(super) fn new(channel: usize) -> Self {
        Self { channel, zstd: None, bytes: Vec::new() }
    }

    /// Reads the pages of a packet at these offsets of a block, of which `len` bytes of the stream
    /// follow; the packet's reader has looked that they are not too many. Nothing is written before all
    /// of them are there.
    pub(super) fn read(
        &mut self,
        reader: &mut StreamReader,
        ram: &dyn GuestRam,
        (name, block, block_len): &(String, usize, u64),
        offsets: &[u64],
        len: usize,
    ) -> Result<(), DestinationError> {
        for offset in offsets {
            end_of_page(name, *block_len, *offset)?;
        }
        self.bytes.resize(len, 0);
        reader.read_exact(&mut self.bytes).map_err(lost(self.channel))?;
        let channel = self.channel;
        let broken = |source| DestinationError::Compressed { channel, source };
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(Decompressor::new().map_err(broken)?),
        };
        let expected = offsets.len().saturating_mul(PAGE_SIZE as usize);
        let pages = zstd.decompress(&self.bytes, expected).map_err(broken)?;
        let mut rest = pages;
        for group in offsets.chunk_by(|a, b| a.checked_add(PAGE_SIZE) == Some(*b)) {
            let len = group.len().saturating_mul(PAGE_SIZE as usize);
            let (piece, behind) = rest.split_at_checked(len).unwrap_or_default();
            let offset = group.first().copied().unwrap_or_default();
            let at = reader.offset();
            ram.copy_in(*block, offset, piece)
                .map_err(|source| DestinationError::Page { offset: at, source })?;
            rest = behind;
        }
        Ok(())
    }
}
