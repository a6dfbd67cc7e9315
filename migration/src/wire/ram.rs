//! The records in the `ram` section.
//!
//! ```text
//! u64 (value | flags)
//!   MEM_SIZE   value = sum of the lengths    (str8 block, u64 length) until the sum is reached
//!   ZERO       value = offset in the block   [str8 block]  u8 fill
//!   PAGE       value = offset in the block   [str8 block]  4096 bytes
//!   EOS        end of this section's records
//! CONTINUE: the block is the one of the record before, and is not named
//! RUN:      with ZERO or PAGE, between mini-vmms that have agreed on it: u32 pages behind the block's
//!           name; that many pages follow each other, in the block and in the stream
//! ```

use super::limits::MAX_RAM_BLOCKS;
use super::{WireError, read_str8, read_u8, read_u32, read_u64, write_str8};
use crate::guest::{PAGE_SIZE, RamBlock};
use crate::vmstate::ByteSource;

/// The section's name on the wire.
pub const SECTION: &str = "ram";
/// The only version in use.
pub const VERSION: u32 = 4;

/// A page of one repeated byte.
pub const ZERO: u64 = 0x02;
/// The list of blocks.
pub const MEM_SIZE: u64 = 0x04;
/// A raw page.
pub const PAGE: u64 = 0x08;
/// End of the records.
pub const EOS: u64 = 0x10;
/// Same block as before.
pub const CONTINUE: u64 = 0x20;
/// A difference to the page that was sent before.
pub const XBZRLE: u64 = 0x40;
const HOOK: u64 = 0x80;
/// A page that zlib has made smaller.
pub const COMPRESS: u64 = 0x100;
/// QEMU 8.1 and later: pages on further connections up to here belong together.
pub const MULTIFD_FLUSH: u64 = 0x200;

/// Many pages that follow each other; our own, where QEMU has no flag (7.2 refuses it, and 10.0 has none
/// there either). Said only to a peer that [can read it](crate::manifest::RUNS).
pub const RUN: u64 = 0x400;

const PAGE_RUN: u64 = PAGE | RUN;
const ZERO_RUN: u64 = ZERO | RUN;

/// The bits of a header that are flags.
pub const FLAGS: u64 = PAGE_SIZE - 1;

/// The first eight bytes of a record, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordHeader {
    /// The list of blocks follows, until their lengths add up to this.
    MemSize(u64),
    /// A page of one repeated byte.
    Zero {
        /// Offset in the block, in bytes.
        offset: u64,
        /// The block is the one of the record before.
        same_block: bool,
    },
    /// A raw page.
    Page {
        /// Offset in the block, in bytes.
        offset: u64,
        /// The block is the one of the record before.
        same_block: bool,
    },
    /// Pages of one repeated byte; [their number](read_run) follows the block's name.
    ZeroRun {
        /// Offset of the first in the block, in bytes.
        offset: u64,
        /// The block is the one of the record before.
        same_block: bool,
    },
    /// Raw pages; [their number](read_run) follows the block's name.
    PageRun {
        /// Offset of the first in the block, in bytes.
        offset: u64,
        /// The block is the one of the record before.
        same_block: bool,
    },
    /// End of the records.
    Eos,
}

impl RecordHeader {
    /// Takes the first eight bytes of a record apart; `at` is their offset in the stream.
    pub fn parse(header: u64, at: u64) -> Result<Self, WireError> {
        let offset = header & !FLAGS;
        let flags = header & FLAGS;
        let same_block = flags & CONTINUE != 0;
        let unsupported = |feature| Err(WireError::Unsupported { feature, offset: at });
        match flags & !CONTINUE {
            PAGE => Ok(Self::Page { offset, same_block }),
            ZERO => Ok(Self::Zero { offset, same_block }),
            PAGE_RUN => Ok(Self::PageRun { offset, same_block }),
            ZERO_RUN => Ok(Self::ZeroRun { offset, same_block }),
            MEM_SIZE => Ok(Self::MemSize(offset)),
            EOS => Ok(Self::Eos),
            XBZRLE => unsupported("xbzrle"),
            COMPRESS => unsupported("compress"),
            HOOK => unsupported("rdma"),
            MULTIFD_FLUSH => unsupported("multifd of QEMU 8.1 and later"),
            other => Err(WireError::Unexpected {
                what: "the flags of a RAM record",
                offset: at,
                expected: "a known combination".into(),
                found: format!("{other:#x}"),
            }),
        }
    }

    /// Reads and takes apart the first eight bytes of a record.
    pub fn read(source: &mut dyn ByteSource) -> Result<Self, WireError> {
        let at = source.offset();
        Self::parse(read_u64(source, "a RAM record")?, at)
    }
}

/// A block as a source lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedBlock {
    /// Name and length.
    pub block: RamBlock,
    /// Its guest address, which stands in the list when memory is shared (`x-ignore-shared`).
    pub address: Option<u64>,
}

/// Reads the list of blocks whose lengths add up to `total`.
pub fn read_blocks(source: &mut dyn ByteSource, total: u64) -> Result<Vec<RamBlock>, WireError> {
    let listed = read_block_list(source, total, false)?;
    Ok(listed.into_iter().map(|listed| listed.block).collect())
}

/// The same; each block's length is followed by its address where there are `addresses`.
pub fn read_block_list(
    source: &mut dyn ByteSource,
    total: u64,
    addresses: bool,
) -> Result<Vec<ListedBlock>, WireError> {
    let mut blocks = Vec::new();
    let mut left = total;
    while left > 0 {
        let at = source.offset();
        if blocks.len() >= MAX_RAM_BLOCKS {
            return Err(WireError::TooLarge {
                what: "the number of RAM blocks",
                offset: at,
                found: MAX_RAM_BLOCKS.saturating_add(1) as u64,
                max: MAX_RAM_BLOCKS as u64,
            });
        }
        let name = read_str8(source, "a RAM block's name")?;
        let len = read_u64(source, "a RAM block's length")?;
        if len == 0 || len & FLAGS != 0 || len > left {
            return Err(WireError::Unexpected {
                what: "a RAM block's length",
                offset: at,
                expected: format!("pages, and at most the {left:#x} bytes left of the sum"),
                found: format!("{len:#x} for {name}"),
            });
        }
        left = left.saturating_sub(len);
        let address = addresses.then(|| read_u64(source, "a RAM block's address")).transpose()?;
        blocks.push(ListedBlock { block: RamBlock { name, len }, address });
    }
    Ok(blocks)
}

/// Writes the list of blocks.
pub fn write_blocks(out: &mut Vec<u8>, blocks: &[RamBlock]) {
    let listed = |block: &RamBlock| ListedBlock { block: block.clone(), address: None };
    write_block_list(out, &blocks.iter().map(listed).collect::<Vec<_>>());
}

/// The same, with their addresses where they have one.
pub fn write_block_list(out: &mut Vec<u8>, blocks: &[ListedBlock]) {
    let total = blocks.iter().fold(0u64, |sum, b| sum.saturating_add(b.block.len));
    out.extend_from_slice(&(total | MEM_SIZE).to_be_bytes());
    for ListedBlock { block, address } in blocks {
        write_str8(out, &block.name);
        out.extend_from_slice(&block.len.to_be_bytes());
        if let Some(address) = address {
            out.extend_from_slice(&address.to_be_bytes());
        }
    }
}

/// Writes the end of the records.
pub fn write_eos(out: &mut Vec<u8>) {
    out.extend_from_slice(&EOS.to_be_bytes());
}

/// Writes the header of a record of this kind, up to what [`RecordHeader`] says follows it. `block` is
/// `None` when it is the one of the record before.
pub fn write_record(out: &mut Vec<u8>, block: Option<&str>, offset: u64, kind: u64) {
    match block {
        None => out.extend_from_slice(&(offset | kind | CONTINUE).to_be_bytes()),
        Some(name) => {
            out.extend_from_slice(&(offset | kind).to_be_bytes());
            write_str8(out, name);
        }
    }
}

/// Writes the number of pages of a run; 1 at least.
pub fn write_run(out: &mut Vec<u8>, pages: u32) {
    out.extend_from_slice(&pages.to_be_bytes());
}

/// Reads the number of pages of a run. Whether they are inside their block is for the caller to see.
pub fn read_run(source: &mut dyn ByteSource) -> Result<u32, WireError> {
    let (what, offset) = ("the number of pages in a run", source.offset());
    match read_u32(source, what)? {
        0 => Err(WireError::Unexpected {
            what,
            offset,
            expected: "one at least".into(),
            found: "0".into(),
        }),
        pages => Ok(pages),
    }
}

/// Reads the byte that a ZERO record's page is filled with.
pub fn read_fill(source: &mut dyn ByteSource) -> Result<u8, WireError> {
    read_u8(source, "the fill byte of a RAM record")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmstate::SliceSource;

    #[test]
    fn records_are_qemus_bytes() {
        let mut out = Vec::new();
        write_blocks(&mut out, &[RamBlock { name: "pc.ram".into(), len: 0x100_0000 }]);
        assert_eq!(out, b"\0\0\0\0\x01\0\0\x04\x06pc.ram\0\0\0\0\x01\0\0\0");
        out.clear();
        write_record(&mut out, Some("pc.ram"), 0x1000, PAGE);
        write_record(&mut out, None, 0x2000, PAGE);
        write_record(&mut out, None, 0x3000, ZERO);
        out.push(0);
        write_eos(&mut out);
        assert_eq!(
            out,
            b"\0\0\0\0\0\0\x10\x08\x06pc.ram\0\0\0\0\0\0\x20\x28\0\0\0\0\0\0\x30\x22\0\
              \0\0\0\0\0\0\0\x10"
        );
    }

    #[test]
    fn headers_are_taken_apart() {
        let parse = |h| RecordHeader::parse(h, 0);
        assert_eq!(
            parse(0x1008).unwrap(),
            RecordHeader::Page { offset: 0x1000, same_block: false }
        );
        assert_eq!(parse(0x1028).unwrap(), RecordHeader::Page { offset: 0x1000, same_block: true });
        assert_eq!(parse(0x22).unwrap(), RecordHeader::Zero { offset: 0, same_block: true });
        assert_eq!(parse(0x10).unwrap(), RecordHeader::Eos);
        assert_eq!(parse(0x2004).unwrap(), RecordHeader::MemSize(0x2000));
        let offset = 0x3000;
        let run = parse(offset | PAGE | RUN).unwrap();
        assert_eq!(run, RecordHeader::PageRun { offset, same_block: false });
        let run = parse(offset | ZERO | RUN | CONTINUE).unwrap();
        assert_eq!(run, RecordHeader::ZeroRun { offset, same_block: true });
        for (header, word) in
            [(0x40, "xbzrle"), (0x60, "xbzrle"), (0x100, "compress"), (0x200, "multifd")]
        {
            assert!(parse(header).unwrap_err().to_string().contains(word));
        }
        for header in [0x00, 0x01, 0x0a, 0x18, 0x400, 0x410, 0x404, 0x800] {
            assert!(matches!(parse(header), Err(WireError::Unexpected { .. })), "{header:#x}");
        }
    }

    #[test]
    fn a_run_has_pages() {
        let mut out = Vec::new();
        write_run(&mut out, 300);
        assert_eq!(out, b"\0\0\x01\x2c");
        assert_eq!(read_run(&mut SliceSource::new(&out)).unwrap(), 300);
        assert!(read_run(&mut SliceSource::new(&[0; 4])).is_err());
    }

    #[test]
    fn block_lists_are_bounded() {
        let read = |total: u64, bytes: &[u8]| read_blocks(&mut SliceSource::new(bytes), total);
        assert_eq!(read(0x1000, b"\x01a\0\0\0\0\0\0\x10\0").unwrap()[0].len, 0x1000);
        // More than the sum, not whole pages, and nothing at all.
        assert!(read(0x1000, b"\x01a\0\0\0\0\0\0\x20\0").is_err());
        assert!(read(0x1000, b"\x01a\0\0\0\0\0\0\x0f\xff").is_err());
        assert!(read(0x1000, b"\x01a\0\0\0\0\0\0\0\0").is_err());
        let many = b"\x01a\0\0\0\0\0\0\x10\0".repeat(MAX_RAM_BLOCKS + 1);
        let total = (MAX_RAM_BLOCKS as u64 + 1) * PAGE_SIZE;
        assert!(matches!(read(total, &many), Err(WireError::TooLarge { .. })));
    }
}
