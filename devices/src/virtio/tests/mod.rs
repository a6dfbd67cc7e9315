//! Tests that drive whole devices as a driver does.

mod block;
mod net;
mod small;
mod transport;

use super::disk::{CacheMode, DiskImage};
use super::{Block, BlockOptions};
use tempfile::NamedTempFile;

/// A block device on a file with these bytes.
fn block(bytes: &[u8], change: impl FnOnce(&mut BlockOptions)) -> (Box<Block>, NamedTempFile) {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    (block_on(&file, change), file)
}

fn block_on(file: &NamedTempFile, change: impl FnOnce(&mut BlockOptions)) -> Box<Block> {
    let image =
        DiskImage { path: file.path().to_owned(), readonly: false, cache: CacheMode::Writeback };
    let mut options =
        BlockOptions { image, id: "disk0".into(), serial: "serial-of-disk0".into(), queues: 1 };
    change(&mut options);
    Box::new(Block::new(options).unwrap())
}
