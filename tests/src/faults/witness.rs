//! Who ran when, seen from outside both processes: by the log that the guest keeps on its disk
//! (`resources/selfcheck/README.md`), and by what it says on its two serial lines.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::locks::is_locked;
use crate::guest::number;
use crate::wait;

/// Bytes of a record.
const SECTOR: usize = 512;
/// "SELCKCRD", as in `resources/selfcheck/disk.c`.
const MAGIC: u64 = 0x4452_434b_434c_4553;
/// How often the image is looked at.
const STEP: Duration = Duration::from_millis(1);

/// A record of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    number: u64,
    nonce: u64,
    before: u64,
}

/// What is in a sector.
#[derive(Debug, PartialEq, Eq)]
enum Sector {
    Blank,
    Record(Record),
    Other,
}

fn parse(bytes: &[u8; SECTOR]) -> Sector {
    if bytes.iter().all(|b| *b == 0) {
        return Sector::Blank;
    }
    let words: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default()))
        .collect();
    let sum = words[..63].iter().enumerate().fold(0u64, |sum, (i, word)| {
        (sum ^ word).wrapping_mul(0xc2b2_ae3d_27d4_eb4f).wrapping_add(i as u64)
    });
    if words[0] != MAGIC || words[63] != sum {
        return Sector::Other;
    }
    Sector::Record(Record { number: words[1], nonce: words[2], before: words[3] })
}

fn sector(file: &File, number: u64) -> Sector {
    let mut bytes = [0; SECTOR];
    match file.read_exact_at(&mut bytes, number * SECTOR as u64) {
        Ok(()) => parse(&bytes),
        Err(_) => Sector::Blank,
    }
}

/// Watches a log while it is written.
pub struct Witness {
    path: PathBuf,
    end: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    watcher: Option<JoinHandle<Vec<Record>>>,
}

impl Witness {
    /// Watches the image, from now until [`Self::testify`].
    pub fn new(image: &Path) -> Self {
        let path = image.to_owned();
        let file = File::open(image).expect("the image");
        let end = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let (until, counted) = (end.clone(), count.clone());
        let watcher = thread::spawn(move || {
            let mut seen = Vec::new();
            loop {
                let last = until.load(Ordering::Acquire);
                // A record that is being written is not whole yet.
                while let Sector::Record(record) = sector(&file, seen.len() as u64) {
                    seen.push(record);
                    counted.store(seen.len() as u64, Ordering::Release);
                }
                if last {
                    return seen;
                }
                thread::sleep(STEP);
            }
        });
        Self { path, end, count, watcher: Some(watcher) }
    }

    /// How many records it has seen so far.
    pub fn seen(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Returns when it has seen more than `count` records.
    pub fn wait_for_more_than(&self, count: u64) {
        wait::until(
            "records on the disk",
            60,
            || (self.seen() > count).then_some(()),
            || format!("{} of them", self.seen()),
        );
    }

    /// What was seen, when no process has the image any more: every record was written once, by a guest
    /// that went on from the one before. Gives how many there are.
    ///
    /// # Errors
    /// What was otherwise, also if some process still may write.
    pub fn testify(mut self) -> Result<u64, String> {
        if is_locked(&self.path) {
            return Err(
                "the image is still locked: its guest may write while it is looked at".into()
            );
        }
        self.end.store(true, Ordering::Release);
        let watcher = self.watcher.take().ok_or("nobody watched")?;
        let seen = watcher.join().map_err(|_| "the witness panicked".to_owned())?;
        let file = File::open(&self.path).map_err(|e| e.to_string())?;
        let mut before = 0;
        for (number, first) in (0..).zip(&seen) {
            match sector(&file, number) {
                Sector::Record(now) if now == *first => {}
                now => return Err(format!("record {number} was {first:x?}, and is now {now:x?}")),
            }
            if (first.number, first.before) != (number, before) {
                return Err(format!("record {number} does not follow {before:#x}: {first:x?}"));
            }
            before = first.nonce;
        }
        let count = seen.len() as u64;
        let sectors = file.metadata().map_err(|e| e.to_string())?.len() / SECTOR as u64;
        match (count..sectors).find(|n| sector(&file, *n) != Sector::Blank) {
            Some(n) => Err(format!("the log ends at {count}, but something is at {n}")),
            None => Ok(count),
        }
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Release);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

/// The first and the last number of ticks that a guest has told on a line, if it told any.
pub fn told_ticks(text: &str) -> Option<(u64, u64)> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut ticks = whole
        .lines()
        .filter(|line| line.starts_with("selfcheck: up_ms=") && line.contains("disk_errors="))
        .map(|line| number(line, "ticks"));
    let first = ticks.next()?;
    Some((first, ticks.next_back().unwrap_or(first)))
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;
    use crate::wait;

    fn write(path: &Path, number: u64, nonce: u64, before: u64) {
        let mut words = [0u64; 64];
        words[..4].copy_from_slice(&[MAGIC, number, nonce, before]);
        words[63] = words[..63].iter().enumerate().fold(0u64, |sum, (i, word)| {
            (sum ^ word).wrapping_mul(0xc2b2_ae3d_27d4_eb4f).wrapping_add(i as u64)
        });
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&bytes, number * SECTOR as u64).unwrap();
    }

    fn image() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        File::create(&path).unwrap().set_len(1 << 16).unwrap();
        (dir, path)
    }

    #[test]
    fn a_log_that_one_guest_has_written_is_well() {
        let (_dir, path) = image();
        let witness = Witness::new(&path);
        write(&path, 0, 5, 0);
        write(&path, 1, 6, 5);
        assert_eq!(witness.testify(), Ok(2));
    }

    #[test]
    fn a_record_that_is_written_twice_is_seen() {
        let (_dir, path) = image();
        write(&path, 0, 5, 0);
        let witness = Witness::new(&path);
        wait::until("it to be seen", 20, || (witness.seen() == 1).then_some(()), || "");
        write(&path, 0, 7, 0);
        assert!(witness.testify().unwrap_err().contains("record 0 was"));
    }

    #[test]
    fn two_guests_that_take_turns_break_the_chain() {
        let (_dir, path) = image();
        write(&path, 0, 5, 0);
        write(&path, 1, 6, 5);
        write(&path, 2, 9, 8);
        assert!(Witness::new(&path).testify().unwrap_err().contains("does not follow 0x6"));
        let (_dir, path) = image();
        write(&path, 0, 5, 0);
        write(&path, 2, 9, 8);
        assert!(Witness::new(&path).testify().unwrap_err().contains("something is at 2"));
    }

    #[test]
    fn ticks_are_read_from_whole_lines() {
        let line = |n| format!("selfcheck: up_ms=1 ticks={n} records=0 disk_errors=0\r\n");
        assert_eq!(told_ticks(&format!("{}{}selfcheck: up_ms", line(3), line(9))), Some((3, 9)));
        assert_eq!(told_ticks("selfcheck: up_ms=1 ti"), None);
    }
}
