//! Digests of RAM: the same whoever finds them, and in how many turns.

use std::sync::atomic::Ordering;

use migration::guest::{GuestRam, PAGE_SIZE};
use migration::verify::{RamDifference, compare, digest};
use xxhash_rust::xxh3::xxh3_64;

use crate::common::*;

/// Pages to a digest.
const CHUNK: u64 = 256;

/// Blocks below, at and above the size of a digest's chunks, each page with a content of its own.
fn ram() -> std::sync::Arc<FakeRam> {
    let pages = [("a", 1), ("b", CHUNK - 1), ("c", CHUNK), ("d", CHUNK + 1), ("e", 10 * CHUNK + 7)];
    let ram = FakeRam::new(&pages);
    for (index, (_, pages)) in pages.into_iter().enumerate() {
        for page in 0..pages {
            let mut content = [0; PAGE_SIZE as usize];
            content[..8].copy_from_slice(&(page << 8 | index as u64).to_le_bytes());
            ram.write(index, page * PAGE_SIZE, &content);
        }
    }
    ram
}

#[test]
fn every_chunk_has_the_digest_of_its_bytes_in_its_place() {
    let ram = ram();
    let found = digest(&*ram).unwrap();
    let contents = ram.contents();
    assert_eq!(found.blocks.len(), contents.len());
    for ((block, bytes), named) in found.blocks.iter().zip(&contents).zip(ram.blocks()) {
        let expected: Vec<u64> = bytes.chunks((CHUNK * PAGE_SIZE) as usize).map(xxh3_64).collect();
        assert_eq!((&block.name, &block.digests), (&named.name, &expected));
    }
    let pages: u64 = ram.blocks().iter().map(|block| block.len).sum();
    assert_eq!(compare(&*ram, &found).unwrap(), Ok(pages));
}

#[test]
fn one_byte_that_differs_is_found_wherever_it_is() {
    let ram = ram();
    let before = digest(&*ram).unwrap();
    for (index, block) in ram.blocks().into_iter().enumerate() {
        for offset in [0, block.len / 2, block.len - 1] {
            let mut byte = [0];
            ram.copy_out(index, offset, &mut byte).unwrap();
            ram.copy_in(index, offset, &[byte[0] ^ 0x10]).unwrap();
            let Err(RamDifference::Content { block: name, from, to, .. }) =
                compare(&*ram, &before).unwrap()
            else {
                panic!("{} at {offset:#x} was not found", block.name)
            };
            assert_eq!(name, block.name);
            assert!((from..to).contains(&offset), "{offset:#x} is not in {from:#x} to {to:#x}");
            ram.copy_in(index, offset, &byte).unwrap();
        }
    }
    assert!(compare(&*ram, &before).unwrap().is_ok());
}

#[test]
fn memory_that_cannot_be_read_is_an_error_and_no_digest() {
    let ram = ram();
    ram.unreadable.store(true, Ordering::Relaxed);
    assert!(digest(&*ram).is_err());
}
