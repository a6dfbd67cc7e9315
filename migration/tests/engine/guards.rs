//! Guards of the hot paths, by counts and by ratios within one run: how long anything takes depends on
//! the machine, and how often something is done does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::*;
use migration::dirty::{DirtyBitmap, runs};
use migration::guest::{PAGE_SIZE, RamBlock};

/// Pages of the guest: 64 MiB, none of them zero.
const PAGES: u64 = 16 << 10;
const MIB: u64 = (PAGES * PAGE_SIZE) >> 20;

fn count(of: &AtomicU64) -> u64 {
    of.load(Ordering::Relaxed)
}

/// Moves a quiet guest over TCP.
fn moved() -> (Arc<FakeRam>, Arc<FakeRam>) {
    let (source, destination, _) = two_vms(PAGES);
    for page in 0..PAGES {
        source.ram.write(0, page * PAGE_SIZE + page % PAGE_SIZE, &[1]);
    }
    let ended = migrate(source, destination, tcp_pair(), (control(), control()));
    assert_moved(&ended);
    (ended.source.ram, ended.destination.ram)
}

#[test]
fn pages_are_written_a_mebibyte_at_a_time_and_looked_at_once() {
    let (source, _) = moved();
    let (writes, looks) = (count(&source.calls.writes), count(&source.calls.looks));
    assert!(writes <= MIB + 24, "{writes} writes for {MIB} MiB and a dozen messages");
    // Three pages of BIOS, and what is written while the devices are read and goes out again.
    assert!((PAGES + 3..PAGES + 8).contains(&looks), "{looks} looks at {PAGES} pages");
}

#[test]
fn pages_that_follow_each_other_are_lent_and_written_where_they_cannot_be() {
    let (source, _) = moved();
    let lent = count(&source.calls.lent);
    assert!(lent >= PAGES * PAGE_SIZE, "{lent} bytes were lent of {MIB} MiB");

    let (source, destination, _) = two_vms(PAGES);
    source.ram.lends_nothing.store(true, Ordering::Relaxed);
    for page in 0..PAGES {
        source.ram.write(0, page * PAGE_SIZE, &[1]);
    }
    let ended = migrate(source, destination, tcp_pair(), (control(), control()));
    assert_moved(&ended);
    assert!(count(&ended.source.ram.calls.writes) <= MIB + 24);
}

#[test]
fn memory_that_was_never_used_costs_no_look_and_hardly_a_byte() {
    // 280 MiB, so that it takes more than one leap.
    const MANY: u64 = 280 << 8;
    let (_, destination, world) = two_vms(MANY);
    let source = FakeVm::new("source", &world, MANY);
    for page in (0..1000).chain(MANY - 10..MANY) {
        source.ram.write(0, page * PAGE_SIZE, &[1]);
    }
    *source.ram.unused.lock().unwrap() = 1000..MANY - 10;
    let there = control();
    let ended = migrate(source, destination, tcp_pair(), (there.clone(), control()));
    assert_moved(&ended);
    let calls = &ended.source.ram.calls;
    // Beside those pages, the rest of the chunk in which the next leap begins or ends.
    let looks = count(&calls.looks);
    let report = there.report();
    assert!(looks < 1000 + 10 + 3 * 512, "{looks} looks");
    // What is written page by page has a header each; 17 bytes are one.
    assert!(report.transferred_bytes < 1600 << 12, "{} bytes", report.transferred_bytes);
    assert!(report.normal_pages + report.zero_pages >= MANY + 3);
}

#[test]
fn pages_are_read_straight_into_memory() {
    let (_, destination) = moved();
    let copied = count(&destination.calls.copied);
    // What comes in front of a record's header in one read with it, at most the reader's 64 KiB for each
    // record of a mebibyte.
    assert!(copied <= MIB << 16, "{copied} bytes were copied");
}

#[test]
fn a_bitmap_with_nothing_in_it_costs_a_look_at_each_word() {
    // 64 GiB; against the same words counted one by one.
    let block = RamBlock { name: "pc.ram".into(), len: 64 << 30 };
    let mut bitmap = DirtyBitmap::new(std::slice::from_ref(&block));
    let pages = block.len / PAGE_SIZE;
    bitmap.set(0, pages - 1);
    let words = vec![0_u64; (pages / 64) as usize];
    let mut best = [Duration::MAX; 2];
    for _ in 0..20 {
        let begin = Instant::now();
        let set: u64 = words.iter().map(|w| u64::from(std::hint::black_box(*w).count_ones())).sum();
        assert_eq!(set, 0);
        best[0] = best[0].min(begin.elapsed());
        let mut walked = bitmap.clone();
        let begin = Instant::now();
        let mut found = Vec::new();
        for first in (0..pages).step_by(512) {
            if let Some(bits) = walked.take(0, first..first + 512) {
                found.extend(runs(first, &bits));
            }
        }
        best[1] = best[1].min(begin.elapsed());
        assert_eq!((found.len(), found[0].start), (1, pages - 1));
    }
    assert!(best[1] < best[0] * 4, "counted in {:?}, walked in {:?}", best[0], best[1]);
}
