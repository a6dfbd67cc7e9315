//! Pages made smaller by zstd, as QEMU's `multifd-compression: zstd` has it.
//!
//! A connection has one zstd stream (RFC 8878) from its first packet to its last. The stream is flushed
//! at the end of each packet's pages, so that all of them can be had from the packet's bytes and those
//! before, and what repeats in later pages is found again.

use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

use super::multifd::MAX_PAGES;
use crate::guest::PAGE_SIZE;

/// Most bytes of pages in a packet.
const MAX_PLAIN: usize = MAX_PAGES * PAGE_SIZE as usize;
/// Most bytes that a packet's pages can have become: QEMU's buffer for them, twice the pages. zstd makes
/// what it can't compress longer by less than 1 %.
pub const MAX_COMPRESSED: usize = 2 * MAX_PLAIN;
/// How far back, as a power of two, a stream may refer to what came before, which the reader must keep: 8
/// MiB, what level 19 uses. QEMU's level 20 uses more, and would take 32 MiB for each connection here.
const WINDOW_LOG: u32 = 23;
/// Entries of a search table at most, as a power of two, of 4 bytes each. zstd's own for the highest levels
/// are up to 2^25, which would be some 200 MiB for each connection, beside a guest that runs.
const TABLE_LOG: u32 = 22;
/// The highest level, QEMU's. Those above 19 use the window of 19 here.
pub const MAX_LEVEL: u8 = 20;

/// Why pages could not be compressed or had again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ZstdError {
    /// There is no memory for it.
    #[error("there is no memory for a zstd stream")]
    Memory,
    /// The library refuses: the bytes are no zstd stream, or its window is beyond 8 MiB.
    #[error("zstd: {0} (windows up to 8 MiB are taken: level 19)")]
    Library(&'static str),
    /// The bytes end within the pages.
    #[error("{found} bytes of pages are in a packet of {expected}")]
    TooShort {
        /// Bytes of pages that the packet has by its head.
        expected: usize,
        /// Bytes that came out.
        found: usize,
    },
    /// The bytes go on behind the pages.
    #[error("more than the packet's {expected} bytes of pages are in it")]
    TooLong {
        /// Bytes of pages that the packet has by its head.
        expected: usize,
    },
}

fn library(code: usize) -> ZstdError {
    ZstdError::Library(get_error_name(code))
}

/// One connection's stream on its way out. Takes up to 60 MiB at the highest levels, some MiB at the usual ones.
pub struct Compressor {
    context: CCtx<'static>,
    out: Box<[u8]>,
}

impl Compressor {
    /// A stream of this level, up to [`MAX_LEVEL`]; 0 is zstd's own choice.
    pub fn new(level: u8) -> Result<Self, ZstdError> {
        let mut context = CCtx::try_create().ok_or(ZstdError::Memory)?;
        let level = i32::from(level.min(MAX_LEVEL));
        context.set_parameter(CParameter::CompressionLevel(level)).map_err(library)?;
        if level > 19 {
            context.set_parameter(CParameter::WindowLog(WINDOW_LOG)).map_err(library)?;
        }
        if level > 15 {
            context.set_parameter(CParameter::ChainLog(TABLE_LOG)).map_err(library)?;
            context.set_parameter(CParameter::HashLog(TABLE_LOG)).map_err(library)?;
        }
        Ok(Self { context, out: vec![0; MAX_COMPRESSED].into_boxed_slice() })
    }

    /// The bytes of the next packet's pages.
    pub fn compress(&mut self, pages: &[u8]) -> Result<&[u8], ZstdError> {
        let mut input = InBuffer::around(pages);
        let mut output = OutBuffer::around(&mut *self.out);
        let flush = ZSTD_EndDirective::ZSTD_e_flush;
        let left =
            self.context.compress_stream2(&mut output, &mut input, flush).map_err(library)?;
        let written = output.pos();
        if left > 0 || input.pos() < pages.len() {
            return Err(ZstdError::TooLong { expected: pages.len() });
        }
        Ok(self.out.get(..written).unwrap_or_default())
    }
}

/// One connection's stream as it comes in. Never uses more than its window and a few blocks, 9 MiB in
/// all, whatever comes.
pub struct Decompressor {
    context: DCtx<'static>,
    out: Box<[u8]>,
}

impl Decompressor {
    /// A stream that has not begun.
    pub fn new() -> Result<Self, ZstdError> {
        let mut context = DCtx::try_create().ok_or(ZstdError::Memory)?;
        context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG)).map_err(library)?;
        Ok(Self { context, out: vec![0; MAX_PLAIN].into_boxed_slice() })
    }

    /// A packet's pages, `expected` bytes of them (no more than a packet can have), from all of its
    /// bytes.
    pub fn decompress(&mut self, bytes: &[u8], expected: usize) -> Result<&[u8], ZstdError> {
        let mut input = InBuffer::around(bytes);
        let room =
            self.out.get_mut(..expected).ok_or(ZstdError::TooLong { expected: MAX_PLAIN })?;
        let mut output = OutBuffer::around(room);
        while output.pos() < expected {
            let before = (input.pos(), output.pos());
            self.context.decompress_stream(&mut output, &mut input).map_err(library)?;
            if before == (input.pos(), output.pos()) {
                return Err(ZstdError::TooShort { expected, found: output.pos() });
            }
        }
        // What may still follow is no page: the end of a block, of a frame. More pages may lie in the
        // stream's state as well.
        loop {
            let before = input.pos();
            let mut spill = [0];
            let mut none = OutBuffer::around(&mut spill[..]);
            self.context.decompress_stream(&mut none, &mut input).map_err(library)?;
            if none.pos() > 0 || (input.pos() == before && before < bytes.len()) {
                return Err(ZstdError::TooLong { expected });
            }
            if input.pos() >= bytes.len() {
                break;
            }
        }
        Ok(self.out.get(..expected).unwrap_or_default())
    }

    /// Bytes that the stream's state takes.
    pub fn memory(&self) -> usize {
        self.context.sizeof().saturating_add(self.out.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_SIZE as usize;

    /// Pages as a guest has them: some that say the same, some that say nothing to anybody.
    fn pages(count: usize, seed: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let mut word = seed | 1;
        for page in 0..count {
            for n in 0..PAGE / 8 {
                word = word.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let bytes = if page % 2 == 0 { word } else { n as u64 / 16 };
                out.extend_from_slice(&bytes.to_le_bytes());
            }
        }
        out
    }

    #[test]
    fn each_packet_can_be_read_as_soon_as_it_is_there_and_finds_what_came_before() {
        for level in [0, 1, 3, 19, 20] {
            let mut there = Compressor::new(level).unwrap();
            let mut here = Decompressor::new().unwrap();
            let mut last = 0;
            for (n, count) in [MAX_PAGES, 1, 2, MAX_PAGES, 77].into_iter().enumerate() {
                let plain = pages(count, n as u64);
                let bytes = there.compress(&plain).unwrap();
                assert!(count == 1 || bytes.len() < plain.len(), "{level} {n}");
                let again = here.decompress(bytes, plain.len()).unwrap();
                assert!(again == plain, "{level} {n}");
                last = n;
            }
            // The same pages again are hardly anything.
            let plain = pages(8, last as u64);
            let again = there.compress(&plain).unwrap();
            assert!(again.len() < plain.len() / 10, "{}", again.len());
            assert!(here.decompress(again, plain.len()).unwrap() == plain);
            assert!(here.memory() < 10 << 20, "{}", here.memory());
        }
    }

    #[test]
    fn what_cannot_be_compressed_fits_as_well() {
        let plain: Vec<u8> =
            pages(2 * MAX_PAGES, 5).chunks(PAGE).step_by(2).flatten().copied().collect();
        let mut there = Compressor::new(1).unwrap();
        let mut here = Decompressor::new().unwrap();
        for _ in 0..3 {
            let bytes = there.compress(&plain).unwrap();
            assert!(bytes.len() < plain.len() + plain.len() / 100);
            assert_eq!(here.decompress(bytes, plain.len()).unwrap(), plain);
        }
    }

    #[test]
    fn what_is_cut_short_too_long_or_garbage_is_refused() {
        let plain = pages(4, 1);
        let good = Compressor::new(1).unwrap().compress(&plain).unwrap().to_vec();
        let read = |bytes: &[u8], expected| {
            Decompressor::new().unwrap().decompress(bytes, expected).map(<[u8]>::to_vec)
        };
        assert_eq!(read(&good, plain.len()).unwrap(), plain);
        for cut in 0..good.len() {
            match read(&good[..cut], plain.len()) {
                Err(error) => assert!(matches!(error, ZstdError::TooShort { .. }), "{error}"),
                // An empty block of three bytes may end a flush.
                Ok(all) => assert!(all == plain && cut + 3 >= good.len(), "{cut}"),
            }
        }
        assert_eq!(
            read(&good, plain.len() + PAGE).unwrap_err(),
            ZstdError::TooShort { expected: plain.len() + PAGE, found: plain.len() }
        );
        let more = ZstdError::TooLong { expected: plain.len() - PAGE };
        assert_eq!(read(&good, plain.len() - PAGE).unwrap_err(), more);
        assert!(matches!(read(&[7; 4096], PAGE).unwrap_err(), ZstdError::Library(_)));
        let mut behind = good.clone();
        behind.extend_from_slice(b"more");
        assert!(read(&behind, plain.len()).is_err());
        assert!(read(&good, MAX_PLAIN + 1).is_err());
        // Every byte changed: an error or other pages, never more than asked for, never a panic.
        for at in 0..good.len().min(600) {
            let mut bad = good.clone();
            bad[at] ^= 0x55;
            if let Ok(other) = read(&bad, plain.len()) {
                assert_eq!(other.len(), plain.len());
            }
        }
    }

    #[test]
    fn a_bomb_gives_no_more_than_the_packet_has_room_for() {
        // 64 MiB of zeros in one flush.
        let mut context = CCtx::try_create().unwrap();
        let zeros = vec![0; 64 << 20];
        let mut out = vec![0; 1 << 20];
        let mut input = InBuffer::around(&zeros);
        let mut output = OutBuffer::around(&mut out[..]);
        let flush = ZSTD_EndDirective::ZSTD_e_flush;
        assert_eq!(context.compress_stream2(&mut output, &mut input, flush).unwrap(), 0);
        let written = output.pos();
        let mut here = Decompressor::new().unwrap();
        let error = here.decompress(&out[..written], MAX_PLAIN).unwrap_err();
        assert_eq!(error, ZstdError::TooLong { expected: MAX_PLAIN });
        assert!(here.memory() < 10 << 20);
    }

    #[test]
    fn a_window_that_would_take_too_much_memory_is_refused_at_its_first_bytes() {
        let mut context = CCtx::try_create().unwrap();
        context.set_parameter(CParameter::WindowLog(24)).unwrap();
        let plain = pages(1, 1);
        let mut out = vec![0; 64 << 10];
        let mut input = InBuffer::around(&plain);
        let mut output = OutBuffer::around(&mut out[..]);
        context.compress_stream2(&mut output, &mut input, ZSTD_EndDirective::ZSTD_e_flush).unwrap();
        let written = output.pos();
        let mut here = Decompressor::new().unwrap();
        let error = here.decompress(&out[..written], PAGE).unwrap_err();
        assert!(error.to_string().contains("8 MiB"), "{error}");
        assert!(here.memory() < 1 << 20);
    }
}
