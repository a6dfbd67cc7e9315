//! What a block device does with requests.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::device::Device;
use crate::memory::GuestRam;
use crate::virtio::disk::CacheMode;
use crate::virtio::element::RawElement;
use crate::virtio::testing::{Guest, HIGH, PIECE, go_on};
use crate::virtio::{Block, Chain, Generation, VirtioDevice, features, status};

use super::{block, block_on};

/// An element with these buffers `(address, length)`.
fn element(index: u16, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> RawElement {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
    let pieces = readable.iter().map(|(at, len)| (*at, *len, false));
    let pieces = pieces.chain(writable.iter().map(|(at, len)| (*at, *len, true)));
    RawElement::of(&Chain::from_pieces(&ram, index, pieces.collect()).unwrap())
}

const ALL: u64 = features::EVENT_IDX | features::INDIRECT_DESC | 0x6e54;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn pattern(sectors: usize) -> Vec<u8> {
    (0..sectors * 512).map(|i| u8::try_from((i / 512 + i) % 251).unwrap()).collect()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
}

/// One request; `data` is read or written by the device. Returns its result and the length that
/// was given back.
fn request(
    guest: &mut Guest,
    kind: u32,
    sector: u64,
    data: &[(u64, u32, bool)],
    indirect: bool,
) -> (u8, u32) {
    let head = guest.buffer(&header(kind, sector));
    let result = guest.buffer(&[0xee]);
    let mut pieces = vec![(head, 16, false)];
    pieces.extend_from_slice(data);
    pieces.push((result, 1, true));
    let index = if indirect { guest.add_indirect(0, &pieces) } else { guest.add(0, &pieces) };
    guest.kick(0);
    let used = guest.wait_used(0, 1);
    assert_eq!((used.len(), used[0].0), (1, index));
    (guest.bytes(result, 1)[0], used[0].1)
}

#[test]
fn sectors_are_read_and_written() {
    let disk = pattern(64);
    for indirect in [false, true] {
        for cache in
            [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Unsafe, CacheMode::Direct]
        {
            let (device, file) = block(&disk, |o| o.image.cache = cache);
            let mut guest = Guest::new(device);
            guest.start(ALL);
            let first = guest.buffer(&[0; 512]);
            let second = guest.buffer(&[0; 1536]);
            let data = [(first, 512, true), (second, 1536, true)];
            assert_eq!(request(&mut guest, IN, 3, &data, indirect), (0, 2049));
            assert_eq!(guest.bytes(first, 512), disk[3 * 512..4 * 512]);
            assert_eq!(guest.bytes(second, 1536), disk[4 * 512..7 * 512]);

            let new = guest.buffer(&[0x5a; 1024]);
            assert_eq!(request(&mut guest, OUT, 62, &[(new, 1024, false)], indirect), (0, 1));
            assert_eq!(request(&mut guest, FLUSH, 0, &[], indirect), (0, 1));
            let mut expected = disk.clone();
            expected[62 * 512..].fill(0x5a);
            assert_eq!(std::fs::read(file.path()).unwrap(), expected);
        }
    }
}

#[test]
fn what_is_read_is_marked_dirty_and_nothing_else() {
    let (device, _file) = block(&pattern(64), |_| ());
    let mut guest = Guest::new(device);
    guest.start(ALL);
    let at = guest.buffer(&[0; 3 * 4096]).next_multiple_of(4096);
    let (head, result) = (guest.buffer(&header(IN, 0)), guest.buffer(&[0]));
    // Into both pieces of memory, and off the page's boundary.
    let high = HIGH + PIECE - 512;
    let pieces =
        [(head, 16, false), (at + 4096 - 512, 1024, true), (high, 512, true), (result, 1, true)];
    guest.add(0, &pieces);
    guest.clean();
    guest.kick(0);
    guest.wait_used(0, 1);
    guest.function.lock().unwrap().pause();
    let used = Guest::ring(0) + 0x2000;
    let expected = [at, at + 4096, high & !0xfff, result & !0xfff, used].into_iter().collect();
    assert_eq!(guest.dirty(), expected);
    guest.clean();
    assert_eq!(guest.bytes(high, 512), pattern(64)[1024..1536]);
}

#[test]
fn the_end_of_an_unaligned_image_reads_as_zeros_and_grows() {
    for cache in [CacheMode::Writeback, CacheMode::Direct] {
        let disk = pattern(4);
        let (device, file) = block(&disk[..1600], |o| o.image.cache = cache);
        let mut guest = Guest::new(device);
        guest.start(ALL);
        assert_eq!(u64::from_le_bytes(guest.read(0x2000)), 4, "the last sector counts");
        let at = guest.buffer(&[0xff; 1024]);
        assert_eq!(request(&mut guest, IN, 2, &[(at, 1024, true)], false), (0, 1025));
        let mut expected = disk[1024..].to_vec();
        expected[1600 - 1024..].fill(0);
        assert_eq!(guest.bytes(at, 1024), expected);
        let new = guest.buffer(&[7; 512]);
        assert_eq!(request(&mut guest, OUT, 3, &[(new, 512, false)], false), (0, 1));
        let grown = std::fs::read(file.path()).unwrap();
        assert_eq!((grown.len(), &grown[1536..]), (2048, [7; 512].as_slice()));
    }
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let disk = pattern(64);
    let (device, file) = block(&disk, |_| ());
    let mut guest = Guest::new(device);
    guest.start(ALL);
    let mut range = |kind, sector: u64, sectors: u32, flags: u32| {
        let segment =
            [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()]
                .concat();
        let at = guest.buffer(&segment);
        request(&mut guest, kind, 0, &[(at, 16, false)], false).0
    };
    assert_eq!(range(WRITE_ZEROES, 8, 4, 0), 0);
    assert_eq!(range(WRITE_ZEROES, 16, 4, 1), 0);
    assert_eq!(range(DISCARD, 24, 8, 0), 0);
    // Behind the end, too much, nothing, with flags that do not exist.
    assert_eq!(range(WRITE_ZEROES, 61, 4, 0), 1);
    assert_eq!(range(DISCARD, u64::MAX, 1, 0), 1);
    assert_eq!(range(DISCARD, 0, 0x40_0000, 0), 1);
    assert_eq!(range(DISCARD, 0, 0, 0), 1);
    assert_eq!(range(DISCARD, 0, 1, 1), 2);
    assert_eq!(range(WRITE_ZEROES, 0, 1, 2), 2);
    let mut expected = disk;
    expected[8 * 512..12 * 512].fill(0);
    expected[16 * 512..20 * 512].fill(0);
    expected[24 * 512..32 * 512].fill(0);
    assert_eq!(std::fs::read(file.path()).unwrap(), expected);
}

#[test]
fn requests_that_make_no_sense_fail_alone() {
    let disk = pattern(8);
    let (device, file) = block(&disk, |_| ());
    let mut guest = Guest::new(device);
    guest.start(ALL);
    let at = guest.buffer(&[9; 4096]);
    for (kind, sector, len, writable) in [
        (IN, 8, 512, true),
        (IN, u64::MAX, 512, true),
        (IN, u64::MAX / 512, 512, true),
        (IN, 0, 511, true),
        (OUT, 7, 1024, false),
        (OUT, 0, 100, false),
    ] {
        let data = [(at, len, writable)];
        assert_eq!(request(&mut guest, kind, sector, &data, false).0, 1, "{kind} {sector} {len}");
    }
    assert_eq!(request(&mut guest, 99, 0, &[], false).0, 2);
    assert_eq!(request(&mut guest, 2, 0, &[], false).0, 2);
    assert_eq!(guest.status() & status::NEEDS_RESET, 0);
    assert_eq!(std::fs::read(file.path()).unwrap(), disk);
    // Without room for a result, or without a header, nothing can be answered.
    guest.add(0, &[(at, 16, false)]);
    guest.kick(0);
    crate::virtio::testing::until("the device is broken", || {
        guest.status() & status::NEEDS_RESET != 0
    });
    guest.start(ALL);
    guest.add(0, &[(at, 8, false), (at, 1, true)]);
    guest.kick(0);
    crate::virtio::testing::until("the device is broken", || {
        guest.status() & status::NEEDS_RESET != 0
    });
}

#[test]
fn a_readonly_disk_stays_as_it_is() {
    let disk = pattern(8);
    let (device, file) = block(&disk, |o| o.image.readonly = true);
    let mut guest = Guest::new(device);
    guest.start(0x6e74);
    let at = guest.buffer(&[9; 512]);
    assert_eq!(request(&mut guest, OUT, 0, &[(at, 512, false)], false).0, 1);
    let segment = guest.buffer(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(request(&mut guest, WRITE_ZEROES, 0, &[(segment, 16, false)], false).0, 1);
    assert_eq!(request(&mut guest, IN, 0, &[(at, 512, true)], false).0, 0);
    assert_eq!(request(&mut guest, FLUSH, 0, &[], false).0, 0);
    assert_eq!(std::fs::read(file.path()).unwrap(), disk);
}

#[test]
fn an_io_error_is_told_to_the_guest() {
    let (device, file) = block(&pattern(64), |o| o.image.readonly = true);
    let mut guest = Guest::new(device);
    guest.start(ALL & !0x6800);
    // The image shrinks under the device: what is gone reads as zeros, as with QEMU. A host that
    // fails is one whose image is not open.
    file.as_file().set_len(512).unwrap();
    let at = guest.buffer(&[9; 1024]);
    assert_eq!(request(&mut guest, IN, 0, &[(at, 1024, true)], false).0, 0);
    assert_eq!(guest.bytes(at + 512, 512), [0; 512]);
    guest.function.lock().unwrap().pause();
    guest.function.lock().unwrap().close().unwrap();
    go_on(&guest.function);
    assert_eq!(request(&mut guest, IN, 0, &[(at, 512, true)], false).0, 1);
}

#[test]
fn nothing_happens_while_paused_and_everything_after() {
    let (device, file) = block(&[0; 512 * 64], |_| ());
    let mut guest = Guest::new(device);
    guest.start(ALL);
    let at = guest.buffer(&[0xab; 512]);
    let head = guest.buffer(&header(OUT, 1));
    let result = guest.buffer(&[0xee]);
    for round in 0..20 {
        guest.function.lock().unwrap().pause();
        guest.clean();
        let before = std::fs::read(file.path()).unwrap();
        for _ in 0..8 {
            guest.add(0, &[(head, 16, false), (at, 512, false), (result, 1, true)]);
        }
        guest.clean();
        guest.kick(0);
        assert_eq!(guest.used(0), []);
        assert!(guest.dirty().is_empty(), "round {round}: {:x?}", guest.dirty());
        assert_eq!(std::fs::read(file.path()).unwrap(), before);
        go_on(&guest.function);
        // Sometimes the next pause comes while requests are under way.
        if round % 2 == 0 {
            guest.wait_used(0, 8);
        } else {
            guest.function.lock().unwrap().pause();
            let (last, in_flight) = {
                let function = guest.function.lock().unwrap();
                let queue = function.core.queue(0).unwrap();
                (queue.last_avail(), queue.in_flight())
            };
            assert_eq!(in_flight, 0);
            let done = guest.used(0).len();
            assert_eq!(usize::from(last), round / 2 * 16 + 8 + done);
            go_on(&guest.function);
            guest.wait_used(0, 8 - done);
        }
    }
    assert_eq!(&std::fs::read(file.path()).unwrap()[512..1024], [0xab; 512]);
}

#[test]
fn a_flush_ahead_is_the_workers() {
    let (device, _file) = block(&[0; 512 * 64], |_| ());
    let mut guest = Guest::new(device);
    guest.start(ALL);
    let at = guest.buffer(&[0xab; 512]);
    let synced = |guest: &Guest| {
        let mut function = guest.function.lock().unwrap();
        function.device().as_any().downcast_mut::<Block>().unwrap().is_synced()
    };
    for sector in 0..3 {
        assert_eq!(request(&mut guest, OUT, sector, &[(at, 512, false)], false).0, 0);
        assert!(!synced(&guest));
        guest.function.lock().unwrap().flush_ahead();
        let begin = Instant::now();
        while !synced(&guest) {
            assert!(begin.elapsed() < Duration::from_secs(60), "nobody flushes");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    // Nothing happens on a machine that stands still, and a pause does it itself.
    assert_eq!(request(&mut guest, OUT, 7, &[(at, 512, false)], false).0, 0);
    guest.function.lock().unwrap().pause();
    guest.function.lock().unwrap().flush_ahead();
    assert!(synced(&guest));
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let (device, _file) = block(&pattern(64), |_| ());
    let mut guest = Guest::new(device);
    for _ in 0..20 {
        guest.start(ALL);
        let at = guest.buffer(&[0; 4096]);
        let (head, result) = (guest.buffer(&header(IN, 0)), guest.buffer(&[0xee]));
        for _ in 0..8 {
            guest.add(0, &[(head, 16, false), (at, 4096, true), (result, 1, true)]);
        }
        guest.kick(0);
        guest.write8(0x14, 0);
        guest.clean();
        assert_eq!(guest.status(), 0);
        let function = guest.function.clone();
        function.lock().unwrap().pause();
        assert!(guest.dirty().is_empty(), "{:x?}", guest.dirty());
        go_on(&function);
    }
}

#[test]
fn an_image_in_use_cannot_be_opened_again() {
    let (mut first, file) = block(&[0; 4096], |_| ());
    first.open().unwrap();
    let mut second = block_on(&file, |_| ());
    let error = second.open().unwrap_err();
    assert!(error.to_string().contains("disk0: the disk image"), "{error}");
    assert!(error.source.to_string().contains("in use by another virtual machine"));
    let mut reader = block_on(&file, |o| o.image.readonly = true);
    assert!(reader.open().is_err(), "a reader beside a writer");
    first.close().unwrap();
    reader.open().unwrap();
    assert!(second.open().is_err(), "a writer beside a reader");
    block_on(&file, |o| o.image.readonly = true).open().unwrap();
    reader.close().unwrap();
    second.open().unwrap();
    second.close().unwrap();
    file.as_file().set_len(8192).unwrap();
    let error = second.open().unwrap_err();
    assert!(error.source.to_string().contains("8 sectors were expected"), "{error}");
}

#[test]
fn requests_that_another_host_left_are_finished_first() {
    let disk = pattern(64);
    let (device, file) = block(&disk, |o| o.queues = 2);
    let mut source = Guest::new(device);
    source.start(ALL);
    source.function.lock().unwrap().pause();
    // A source that had taken two requests of queue 0 and one of queue 1, and finished none.
    let (at, head, result) =
        (source.buffer(&[0; 512]), source.buffer(&header(IN, 5)), source.buffer(&[0xee; 3]));
    let mut body = source.save();
    let end_of_queues = 276 + 48 + 1 + 2 + 8 + 4 + 57 + 4 + 2 * 16;
    assert_eq!(body[end_of_queues], 0);
    let mut listed = Vec::new();
    for (i, (queue, index)) in [(0_u32, 4), (0, 2), (1, 7)].into_iter().enumerate() {
        let element =
            element(index, &[(head, 16)], &[(at, 512), (result + u64::try_from(i).unwrap(), 1)]);
        let section = migration::vmstate::SectionId::new("test", 0);
        let mut encoder = migration::vmstate::Encoder::new(&section);
        encoder.put(&1_u8).unwrap();
        encoder.put(&queue).unwrap();
        encoder.put(&element).unwrap();
        listed.extend(encoder.into_bytes());
    }
    body.splice(end_of_queues..end_of_queues, listed);
    let last_avail = 276 + 48 + 1 + 2 + 8 + 4 + 57 + 4 + 12;
    body[last_avail + 1] = 2;
    body[last_avail + 16 + 1] = 1;
    source.function.lock().unwrap().close().unwrap();
    source.ram.write_obj(2_u16, GuestAddress(Guest::ring(0) + 0x1002)).unwrap();
    source.ram.write_obj(1_u16, GuestAddress(Guest::ring(1) + 0x1002)).unwrap();

    let device = block_on(&file, |o| o.queues = 2);
    let destination = Guest::cold(device, Generation::Transitional, source.ram.clone());
    destination.load(&body).unwrap();
    assert_eq!(destination.save(), body, "what is not finished goes on to the next host");
    let mut guest = destination.driven_like(&source);
    guest.function.lock().unwrap().open().unwrap();
    go_on(&guest.function);
    assert_eq!(guest.wait_used(0, 2), [(4, 513), (2, 513)]);
    assert_eq!(guest.wait_used(1, 1), [(7, 513)]);
    assert_eq!(guest.bytes(result, 3), [0, 0, 0]);
    assert_eq!(guest.bytes(at, 512), disk[5 * 512..6 * 512]);

    // An element that points out of memory is refused.
    let bad = element(0, &[(PIECE, 16)], &[]);
    assert_eq!(bad.check("inflight[0]", &source.ram).unwrap_err().field, "inflight[0]");
    let bad = element(1024, &[], &[]);
    assert_eq!(bad.check("inflight[0]", &source.ram).unwrap_err().field, "inflight[0].index");
}

#[test]
fn the_write_cache_is_the_guests_to_switch() {
    let (device, _file) = block(&[0; 4096], |_| ());
    let mut guest = Guest::new(device);
    guest.start(ALL);
    assert_eq!(guest.read::<1>(0x2020), [1]);
    guest.write8(0x2020, 0);
    assert_eq!(guest.read::<1>(0x2020), [0]);
    let at = guest.buffer(&[1; 512]);
    assert_eq!(request(&mut guest, OUT, 0, &[(at, 512, false)], false).0, 0);
    guest.start(ALL & !(1 << 11));
    assert_eq!(guest.read::<1>(0x2020), [1], "a reset switches it on again");
    guest.write8(0x2020, 0);
    assert_eq!(guest.read::<1>(0x2020), [1], "only a driver that has negotiated it may");
    assert_eq!(guest.read::<57>(0x2000).len(), 57);
}
