//! Pages on connections of their own: QEMU 7.2's multifd, plain or through [zstd](super::zstd); and, to be read, that of
//! QEMU 9.0 and later, whose packets may name zero pages as well.
//!
//! ```text
//! main connection                          each further one
//!                                          initial packet: who it belongs to
//! START ram: block list                    (packets)
//!       EOS                                packet with SYNC
//! PART  ram: zero pages                    packet: up to 128 offsets of one block, then their pages
//!       EOS                                … packet with SYNC
//! ```
//! A RAM section has ended when its EOS and one SYNC on each connection have come. What belongs to the
//! next section is not read before, so that an older page never overwrites a newer one.
//!
//! QEMU leaves 40 bytes of the initial packet zero; between mini-vmms the last 16 of them hold a token
//! from the [manifest](crate::manifest::Channels).

use super::zstd::MAX_COMPRESSED;
use super::{WireError, read_array, read_u8, read_u32, read_u64};
use crate::guest::PAGE_SIZE;
use crate::vmstate::ByteSource;

/// How every packet begins (`MULTIFD_MAGIC`).
pub const MAGIC: u32 = 0x1122_3344;
/// The only version.
const VERSION: u32 = 1;
/// The most pages of one packet: 512 KiB of them.
pub const MAX_PAGES: usize = 128;
/// The section ends here (`MULTIFD_FLAG_SYNC`).
pub const SYNC: u32 = 1;
/// The bits that say how pages are compressed; 0 is not at all. QEMU 7.2 has three, later ones more.
const COMPRESSION: u32 = 0x1f << 1;
/// By zstd (`MULTIFD_FLAG_ZSTD`); zlib is `1 << 1`.
const BY_ZSTD: u32 = 2 << 1;
/// Bytes of a block's name.
const NAME: usize = 256;
/// Bytes behind the number of zero pages that mean nothing. QEMU 7.2's have none of either: all 32 are zero.
const RESERVED: usize = 28;
/// Most connections that are taken or made.
pub const MAX_CHANNELS: usize = 16;

/// The first packet of a connection: 64 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initial {
    /// The VM's UUID; a QEMU insists on its own.
    pub uuid: [u8; 16],
    /// The connection's number, from 0 on.
    pub channel: u8,
    /// What the manifest said; zero from and to a QEMU.
    pub token: [u8; 16],
}

impl Initial {
    /// Bytes on the wire.
    pub const LEN: usize = 64;

    /// Its bytes.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&MAGIC.to_be_bytes());
        out.extend_from_slice(&VERSION.to_be_bytes());
        out.extend_from_slice(&self.uuid);
        out.push(self.channel);
        out.extend_from_slice(&[0; 23]);
        out.extend_from_slice(&self.token);
    }

    /// Reads one.
    pub fn read(source: &mut dyn ByteSource) -> Result<Self, WireError> {
        begin(source)?;
        let uuid = read_array(source, "a channel's UUID")?;
        let channel = read_u8(source, "a channel's number")?;
        read_array::<23>(source, "a channel's first packet")?;
        let token = read_array(source, "a channel's first packet")?;
        Ok(Self { uuid, channel, token })
    }
}

/// The head of a packet; the pages follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The section ends behind it on this connection.
    pub sync: bool,
    /// Its number among the packets of all connections.
    pub number: u64,
    /// The pages' block; of no meaning without pages.
    pub block: String,
    /// Where the pages belong, in bytes; at most [`MAX_PAGES`].
    pub offsets: Vec<u64>,
    /// Pages that are all zero, of which nothing else is sent; with the others at most [`MAX_PAGES`]. A QEMU names them
    /// here from 9.0 on, where it looks for them by `zero-page-detection=multifd` (of pc-i440fx-7.2 only if it is told
    /// to, and then also to who does not know them). A source of this project names them on the main connection.
    pub zeros: Vec<u64>,
    /// So many bytes of the connection's zstd stream follow, instead of the pages; at most
    /// [`MAX_COMPRESSED`].
    pub zstd: Option<usize>,
}

impl Packet {
    /// Bytes of its head as this program and QEMU write it.
    pub const LEN: usize = 320 + 8 * MAX_PAGES;

    /// Its bytes, up to the pages.
    pub fn write(&self, out: &mut Vec<u8>) {
        let offsets = self.offsets.get(..MAX_PAGES).unwrap_or(&self.offsets);
        let room = MAX_PAGES.saturating_sub(offsets.len());
        let zeros = self.zeros.get(..room).unwrap_or(&self.zeros);
        let name = self.block.as_bytes();
        let name = name.get(..NAME.saturating_sub(1)).unwrap_or(name);
        let pages = offsets.len() as u32;
        for word in [
            MAGIC,
            VERSION,
            if self.sync { SYNC } else { 0 } | if self.zstd.is_some() { BY_ZSTD } else { 0 },
            MAX_PAGES as u32,
            pages,
            self.zstd.map_or(pages.saturating_mul(PAGE_SIZE as u32), |len| len as u32),
        ] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(&self.number.to_be_bytes());
        out.extend_from_slice(&(zeros.len() as u32).to_be_bytes());
        out.extend_from_slice(&[0; RESERVED]);
        out.extend_from_slice(name);
        out.resize(out.len().saturating_add(NAME.saturating_sub(name.len())), 0);
        let all = offsets.iter().chain(zeros).copied().chain(std::iter::repeat(0));
        for offset in all.take(MAX_PAGES) {
            out.extend_from_slice(&offset.to_be_bytes());
        }
    }

    /// Reads one up to its pages. Whether block and offsets are there is for the caller to see.
    pub fn read(source: &mut dyn ByteSource) -> Result<Self, WireError> {
        begin(source)?;
        let offset = source.offset();
        let flags = read_u32(source, "a packet's flags")?;
        let zstd = flags & COMPRESSION == BY_ZSTD;
        if flags & COMPRESSION != 0 && !zstd {
            return Err(WireError::Unsupported { feature: "multifd-compression", offset });
        }
        if flags & !(SYNC | COMPRESSION) != 0 {
            return Err(WireError::Unexpected {
                what: "a packet's flags",
                offset,
                expected: "SYNC, zstd or none".into(),
                found: format!("{flags:#x}"),
            });
        }
        let room = count(source, "the room for offsets in a packet")?;
        let pages = count(source, "the number of pages in a packet")?;
        // Of no meaning without pages, and the same as their number where they are not compressed.
        let (what, len_at) = ("a packet's length", source.offset());
        let len = read_u32(source, what)?;
        let zstd = if zstd && pages > 0 {
            let max = MAX_COMPRESSED;
            let fits = usize::try_from(len).ok().filter(|len| *len <= max);
            let too_large =
                WireError::TooLarge { what, offset: len_at, found: len.into(), max: max as u64 };
            Some(fits.ok_or(too_large)?)
        } else {
            None
        };
        let number = read_u64(source, "a packet's number")?;
        let zeros = count(source, "the number of zero pages in a packet")?;
        read_array::<RESERVED>(source, "a packet's head")?;
        let name = read_array::<NAME>(source, "a packet's block")?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let block = String::from_utf8_lossy(name).into_owned();
        let all = pages.saturating_add(zeros);
        if all > room {
            return Err(WireError::TooLarge {
                what: "the number of pages in a packet",
                offset,
                found: all as u64,
                max: room as u64,
            });
        }
        let mut offsets = Vec::with_capacity(all);
        for n in 0..room {
            let offset = read_u64(source, "a page's offset")?;
            if n < all {
                offsets.push(offset);
            }
        }
        // There are as many as were counted.
        let zeros = offsets.split_off(pages.min(offsets.len()));
        Ok(Self { sync: flags & SYNC != 0, number, block, offsets, zeros, zstd })
    }
}

/// Magic and version.
fn begin(source: &mut dyn ByteSource) -> Result<(), WireError> {
    for (what, expected) in [("a packet's magic", MAGIC), ("a packet's version", VERSION)] {
        let offset = source.offset();
        let found = read_u32(source, what)?;
        if found != expected {
            let (expected, found) = (format!("{expected:#x}"), format!("{found:#x}"));
            return Err(WireError::Unexpected { what, offset, expected, found });
        }
    }
    Ok(())
}

fn count(source: &mut dyn ByteSource, what: &'static str) -> Result<usize, WireError> {
    let offset = source.offset();
    let found = read_u32(source, what)?;
    let max = MAX_PAGES as u64;
    match usize::try_from(found) {
        Ok(n) if n <= MAX_PAGES => Ok(n),
        _ => Err(WireError::TooLarge { what, offset, found: found.into(), max }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmstate::SliceSource;

    #[test]
    fn packets_are_qemus_bytes_and_come_back() {
        let initial = Initial { uuid: [7; 16], channel: 3, token: [9; 16] };
        let mut out = Vec::new();
        initial.write(&mut out);
        assert_eq!(out.len(), Initial::LEN);
        assert_eq!(out[..9], *b"\x11\x22\x33\x44\0\0\0\x01\x07");
        assert_eq!(out[24], 3);
        assert_eq!(Initial::read(&mut SliceSource::new(&out)).unwrap(), initial);

        for pages in [0, 1, MAX_PAGES as u64] {
            let offsets = (0..pages).map(|n| n * 0x2000).collect();
            let block = "pc.ram".into();
            let zeros = vec![];
            let packet = Packet { sync: pages == 1, number: 5, block, offsets, zeros, zstd: None };
            out.clear();
            packet.write(&mut out);
            // 320 + 8 for each of 128 offsets.
            assert_eq!((out.len(), Packet::LEN), (1344, 1344));
            assert_eq!(out[20..24], ((pages * 4096) as u32).to_be_bytes());
            assert_eq!(out[64..71], *b"pc.ram\0");
            assert_eq!(Packet::read(&mut SliceSource::new(&out)).unwrap(), packet);
            // The same through zstd.
            let packet = Packet { zstd: (pages > 0).then_some(1234), ..packet };
            out.clear();
            packet.write(&mut out);
            if pages > 0 {
                assert_eq!((out[11] & !1, &out[20..24]), (4, &1234u32.to_be_bytes()[..]));
            }
            assert_eq!(Packet::read(&mut SliceSource::new(&out)).unwrap(), packet);
        }
        // Later QEMUs say so of packets without pages as well, and the length is what it was.
        out[11] |= 4;
        out[16..24].copy_from_slice(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        let empty = Packet::read(&mut SliceSource::new(&out)).unwrap();
        assert_eq!((empty.zstd, empty.offsets.len()), (None, 0));
    }

    #[test]
    fn zero_pages_stand_behind_the_others() {
        let (block, offsets, zeros) = ("b".into(), vec![0x1000, 0x5000], vec![0x2000, 0, 0x9000]);
        let packet = Packet { sync: false, number: 1, block, offsets, zeros, zstd: None };
        let mut out = Vec::new();
        packet.write(&mut out);
        assert_eq!(out.len(), Packet::LEN);
        // Both counts, and the length of what follows, which is that of the pages that are there.
        assert_eq!((&out[16..20], &out[32..36]), (&[0, 0, 0, 2][..], &[0, 0, 0, 3][..]));
        assert_eq!(out[20..24], 0x2000u32.to_be_bytes());
        for (n, offset) in [0x1000u64, 0x5000, 0x2000, 0, 0x9000, 0].into_iter().enumerate() {
            assert_eq!(out[320 + 8 * n..][..8], offset.to_be_bytes(), "{n}");
        }
        assert_eq!(Packet::read(&mut SliceSource::new(&out)).unwrap(), packet);
        // As many as there is room for, of either kind.
        let all: Vec<u64> = (0..MAX_PAGES as u64).map(|n| n << 12).collect();
        let full = Packet { offsets: vec![], zeros: all, ..packet };
        out.clear();
        full.write(&mut out);
        assert_eq!(Packet::read(&mut SliceSource::new(&out)).unwrap(), full);
    }

    #[test]
    fn what_a_packet_may_not_say_is_refused() {
        let mut good = Vec::new();
        let (block, offsets) = ("b".into(), vec![0]);
        let (zeros, zstd) = (vec![], Some(1 << 20));
        let packet = Packet { sync: false, number: 0, block, offsets, zeros, zstd };
        packet.write(&mut good);
        for (at, byte, word) in [
            (0, 0x12, "magic"),
            (7, 2, "version"),
            (11, 2, "multifd-compression"),
            (11, 6, "multifd-compression"),
            (11, 0x20, "multifd-compression"),
            (11, 0x80, "flags"),
            (10, 1, "flags"),
            (23, 1, "a packet's length"),
            (15, 129, "room"),
            (19, 129, "number of pages"),
            (15, 0, "number of pages"),
            (35, 128, "number of pages"),
            (35, 129, "number of zero pages"),
            (32, 1, "number of zero pages"),
        ] {
            let mut bad = good.clone();
            bad[at] = byte;
            let error = Packet::read(&mut SliceSource::new(&bad)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(Packet::read(&mut SliceSource::new(&good[..1343])).is_err());
    }
}
