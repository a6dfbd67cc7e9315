//! Comparing what two sides have: digests of RAM in chunks, of every device section and of the
//! manifest, taken while the guest stands still.
//!
//! The source sends its digests ahead of the end of the stream; the destination computes its own
//! over what it has received and refuses the VM when one differs, naming block and range, or the
//! section. TCP's own checksum misses one broken segment in 65536.

use std::io;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::guest::{GuestRam, RamBlock};
use crate::manifest::{BlockDigests, Digests};
use crate::wire::limits::MAX_RAM_BLOCKS;

/// How many bytes a digest covers.
const CHUNK: u64 = 1 << 20;

/// The digests of all blocks, by as many threads as the host has processors: the guest, whose they are
/// at other times, stands still.
pub fn digest(ram: &dyn GuestRam) -> io::Result<Digests> {
    let found: Vec<Chunks> = ram
        .blocks()
        .into_iter()
        .map(|RamBlock { name, len }| Chunks {
            name,
            len,
            digests: (0..len.div_ceil(CHUNK)).map(|_| AtomicU64::new(0)).collect(),
        })
        .collect();
    let count = found.iter().map(|block| block.digests.len()).sum();
    let next = AtomicUsize::new(0);
    let work = || {
        let result = digest_some(ram, &found, &next);
        if result.is_err() {
            // Nobody needs the others any more.
            next.store(count, Ordering::Relaxed);
        }
        result
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(count);
    thread::scope(|scope| {
        let start = |n| {
            let named = thread::Builder::new().name(format!("migration-sum{n}"));
            // Those that there are do the work of one that can't be started.
            named.spawn_scoped(scope, work).ok()
        };
        let others: Vec<_> = (1..threads).map_while(start).collect();
        let own = work();
        others
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .fold(own, Result::and)
    })?;
    let blocks = found
        .into_iter()
        .map(|Chunks { name, digests, .. }| {
            let digests = digests.into_iter().map(AtomicU64::into_inner).collect();
            BlockDigests { name, chunk: CHUNK, digests }
        })
        .collect();
    Ok(Digests { blocks, ..Digests::default() })
}

/// A block, and the digests of its chunks as far as they are found.
struct Chunks {
    name: String,
    len: u64,
    digests: Vec<AtomicU64>,
}

/// Finds the digests of chunks whose turn it is, counted over all blocks, until there are none.
fn digest_some(ram: &dyn GuestRam, blocks: &[Chunks], next: &AtomicUsize) -> io::Result<()> {
    let mut buf = vec![0; CHUNK as usize];
    loop {
        let mut turn = next.fetch_add(1, Ordering::Relaxed);
        let place = blocks.iter().enumerate().find_map(|(index, block)| {
            if let Some(digest) = block.digests.get(turn) {
                return Some((index, block, digest));
            }
            turn = turn.saturating_sub(block.digests.len());
            None
        });
        let Some((index, block, digest)) = place else { return Ok(()) };
        let offset = (turn as u64).saturating_mul(CHUNK);
        let len = block.len.saturating_sub(offset).min(CHUNK) as usize;
        let buf = buf.get_mut(..len).unwrap_or_default();
        ram.copy_out(index, offset, buf)?;
        digest.store(xxh3_64(buf), Ordering::Relaxed);
    }
}

/// The digest of a device section: its version and its body.
pub fn section_digest(version: u32, body: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&version.to_be_bytes());
    hasher.update(body);
    hasher.digest()
}

/// The digest of a manifest's JSON, in 16 hexadecimal digits: it names the moment, so its digest is
/// another each time, and the stream is to be as long as the last time.
pub fn manifest_digest(json: &[u8]) -> String {
    format!("{:016x}", xxh3_64(json))
}

/// The first difference between the source's digests and this side's RAM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RamDifference {
    /// The digests are not of these blocks.
    #[error("the source sent RAM digests of {found}, this side has {expected}")]
    Blocks {
        /// The blocks of this side.
        expected: String,
        /// The blocks that digests came for.
        found: String,
    },
    /// The content differs.
    #[error(
        "RAM block {block} differs between the two sides in [{from:#x}, {to:#x}): the source's \
         digest is {expected:#018x}, this side's {found:#018x}"
    )]
    Content {
        /// The block's name.
        block: String,
        /// Where the differing chunk begins, in bytes.
        from: u64,
        /// Where it ends.
        to: u64,
        /// The source's digest.
        expected: u64,
        /// This side's.
        found: u64,
    },
}

/// Compares; gives the number of bytes that were compared.
pub fn compare(ram: &dyn GuestRam, theirs: &Digests) -> io::Result<Result<u64, RamDifference>> {
    let ours = digest(ram)?;
    let shape = |d: &Digests| -> String {
        let blocks = d.blocks.iter().take(MAX_RAM_BLOCKS);
        let one = |b: &BlockDigests| format!("{} ({} × {:#x})", b.name, b.digests.len(), b.chunk);
        blocks.map(one).collect::<Vec<_>>().join(", ")
    };
    let same_shape = |a: &BlockDigests, b: &BlockDigests| {
        a.name == b.name && a.chunk == b.chunk && a.digests.len() == b.digests.len()
    };
    if ours.blocks.len() != theirs.blocks.len()
        || !ours.blocks.iter().zip(&theirs.blocks).all(|(a, b)| same_shape(a, b))
    {
        let (expected, found) = (shape(&ours), shape(theirs));
        return Ok(Err(RamDifference::Blocks { expected, found }));
    }
    let mut bytes = 0u64;
    for (a, b) in ours.blocks.iter().zip(&theirs.blocks) {
        for (n, (found, expected)) in a.digests.iter().zip(&b.digests).enumerate() {
            let from = (n as u64).saturating_mul(CHUNK);
            if found != expected {
                return Ok(Err(RamDifference::Content {
                    block: a.name.clone(),
                    from,
                    to: from.saturating_add(CHUNK),
                    expected: *expected,
                    found: *found,
                }));
            }
        }
    }
    for block in ram.blocks() {
        bytes = bytes.saturating_add(block.len);
    }
    Ok(Ok(bytes))
}
