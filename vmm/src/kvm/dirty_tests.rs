//! A guest of a few instructions writes to pages; the log and the rings of real KVM find the same ones.

use std::collections::BTreeSet;
use std::sync::Arc;

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};
use migration::guest::DirtyTracker;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::dirty::RamTracker;
use crate::memory::Ram;

/// Adds one to the first word of every page from 128 KiB to 960 KiB, past the window's beginning.
#[rustfmt::skip]
const PROGRAM: [u8; 19] = [
    0xb8, 0x00, 0x20,             //       mov ax, 0x2000
    0x8e, 0xc0,                   // next: mov es, ax
    0x26, 0xff, 0x06, 0x00, 0x00, //       inc word [es:0]
    0x05, 0x00, 0x01,             //       add ax, 0x100
    0x3d, 0x00, 0xf0,             //       cmp ax, 0xf000
    0x72, 0xf1,                   //       jb next
    0xf4,                         //       hlt
];
const ENTRY: u64 = 0x1000;
const PAGES: std::ops::Range<u64> = 0x20..0xf0;

struct Tiny {
    vcpu: VcpuFd,
    log: Arc<DirtyLog>,
    // Dropped last.
    ram: Ram,
}

impl Tiny {
    fn new(ring: Option<u32>) -> Self {
        let vm = create_vm(&open().unwrap()).unwrap();
        let ram = Ram::new(64 << 20, 40).unwrap();
        // SAFETY: the memory is dropped behind everything that holds the VM.
        let log = unsafe { DirtyLog::new(vm.clone(), ram.slots(), ring) }.unwrap();
        log.map().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        log.add_vcpu(&vcpu).unwrap();
        ram.guest().write_slice(&PROGRAM, GuestAddress(ENTRY)).unwrap();
        Self { vcpu, log: Arc::new(log), ram }
    }

    /// Runs the program once, with a stop for each full ring.
    fn run(&mut self) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (ENTRY, 2);
        self.vcpu.set_regs(&regs).unwrap();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    self.log.empty_rings().unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The pages that were written, which then count anew.
    fn fetch(&self) -> BTreeSet<u64> {
        let mut all = Vec::new();
        self.log.fetch(|first, bits| all.push((first, bits.to_vec()))).unwrap();
        let mut pages = BTreeSet::new();
        for (first, bits) in all {
            self.log.clear(first, &bits).unwrap();
            pages.extend(migration::dirty::runs(first, &bits).flatten());
        }
        pages
    }
}

#[test]
fn the_log_and_the_rings_find_the_same_pages() {
    for ring in [None, Some(1024)] {
        let mut tiny = Tiny::new(ring);
        // Before anybody asks, nothing is noted.
        tiny.run();
        tiny.log.set_logging(true).unwrap();
        let _ = tiny.fetch();
        assert_eq!(tiny.fetch(), BTreeSet::new(), "{ring:?}");
        for round in 1..=3 {
            tiny.run();
            assert_eq!(tiny.fetch(), PAGES.collect(), "{ring:?}, round {round}");
            assert_eq!(tiny.fetch(), BTreeSet::new(), "{ring:?}, round {round}");
        }
        let found = ring.map(|_| vec![3 * (PAGES.end - PAGES.start)]);
        assert_eq!(tiny.log.by_vcpu(), found);
        let times: u16 = tiny.ram.guest().read_obj(GuestAddress(PAGES.start * 4096)).unwrap();
        assert_eq!(times, 4);
    }
}

#[test]
fn a_log_that_protects_at_once_begins_with_nothing_and_finds_the_same() {
    let mut tiny = Tiny::new(None);
    for _ in 0..2 {
        for at_once in [true, false] {
            tiny.log.protect_at_once(at_once).unwrap();
            tiny.log.set_logging(true).unwrap();
            let first = tiny.fetch();
            assert!(first.is_empty() || !at_once, "{} pages", first.len());
            for round in 1..=2 {
                tiny.run();
                assert_eq!(tiny.fetch(), PAGES.collect(), "{at_once}, round {round}");
                assert_eq!(tiny.fetch(), BTreeSet::new(), "{at_once}, round {round}");
            }
            tiny.log.set_logging(false).unwrap();
            tiny.run();
        }
    }
}

#[test]
fn a_log_that_was_left_on_begins_anew() {
    let mut tiny = Tiny::new(None);
    for _ in 0..2 {
        // As a migration leaves it whose end failed: every page is marked, and huge pages are not protected.
        tiny.log.protect_at_once(false).unwrap();
        tiny.log.set_logging(true).unwrap();
        tiny.run();
        // Hardly any of this memory is there.
        let mut tracker = RamTracker::new(tiny.ram.clone(), tiny.log.clone());
        tracker.start().unwrap();
        assert_eq!(tiny.fetch(), BTreeSet::new());
        tiny.run();
        assert_eq!(tiny.fetch(), PAGES.collect());
        tracker.stop();
    }
}

#[test]
fn a_ring_that_fills_up_lets_its_vcpu_go_on_and_nothing_is_lost() {
    let mut tiny = Tiny::new(Some(1024));
    // Few enough for KVM's reserve, also where each write is an entry.
    let last = 0x2000 + 0x100 * 16_u16;
    tiny.ram.guest().write_obj(last, GuestAddress(ENTRY + 14)).unwrap();
    tiny.log.set_logging(true).unwrap();
    for _ in 0..500 {
        tiny.run();
    }
    assert_eq!(tiny.fetch(), (0x20..0x30).collect());
    assert_eq!(tiny.log.by_vcpu(), Some(vec![16]));
    assert_eq!(tiny.fetch(), BTreeSet::new());
}

#[test]
fn what_is_left_in_a_ring_is_forgotten_and_begins_anew() {
    let mut tiny = Tiny::new(Some(1024));
    for _ in 0..20 {
        tiny.log.set_logging(true).unwrap();
        assert_eq!(tiny.log.by_vcpu(), Some(vec![0]));
        tiny.run();
        assert!(!tiny.log.rings_fill());
        // Emptied, and nobody told.
        tiny.log.empty_rings().unwrap();
        tiny.run();
        tiny.log.set_logging(false).unwrap();
        // So often that a ring which was not emptied would be full by now.
        tiny.run();
    }
    tiny.log.set_logging(true).unwrap();
    assert_eq!(tiny.fetch(), BTreeSet::new());
    tiny.run();
    tiny.log.empty_rings().unwrap();
    tiny.run();
    assert_eq!(tiny.fetch(), PAGES.collect());
}

#[test]
fn a_window_that_changes_meanwhile_is_sent_whole() {
    let mut tiny = Tiny::new(Some(1024));
    tiny.log.set_logging(true).unwrap();
    tiny.run();
    let mut some = BelowOneMib::default();
    some.segments[12] = View::RamReadOnly;
    tiny.log.show(&some).unwrap();
    assert_eq!(tiny.fetch(), (PAGES.start..0x100).collect());
    assert_eq!(tiny.fetch(), BTreeSet::new());
    tiny.run();
    assert_eq!(tiny.fetch(), PAGES.collect());
}

#[test]
fn a_ring_that_is_too_long_is_refused_by_its_length() {
    let vm = create_vm(&open().unwrap()).unwrap();
    // SAFETY: there is no memory.
    let error = unsafe { DirtyLog::new(vm, &[], Some(1 << 30)) }.err().unwrap();
    assert!(matches!(error, KvmError::DirtyRingTooLarge { wanted: 0x4000_0000, .. }), "{error}");
}
