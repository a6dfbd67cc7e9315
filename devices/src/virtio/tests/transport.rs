//! Registers, interrupts, doorbells and state, on a block device.

use crate::device::Device;
use crate::virtio::testing::{Guest, HIGH, LEGACY_PORTS, MODERN_BASE, MSIX_BASE, PIECE, ram};
use crate::virtio::{Generation, MAX_QUEUE_SIZE, features, status};
use migration::vmstate::Audience;
use vm_memory::{Bytes, GuestAddress};

use super::block;

const FLUSH: u32 = 4;

/// A flush request; returns its head.
fn flush(guest: &mut Guest) -> u16 {
    let header = guest.buffer(&[FLUSH.to_le_bytes().as_slice(), &[0; 12]].concat());
    let status = guest.buffer(&[0xee]);
    guest.add(0, &[(header, 16, false), (status, 1, true)])
}

#[test]
fn capabilities_are_the_boards_byte_for_byte() {
    let (device, _file) = block(&[0; 4096], |_| ());
    let guest = Guest::cold(device, Generation::Transitional, ram());
    let mut bytes = Vec::new();
    for register in (0x40..0xa4).step_by(4) {
        bytes.extend_from_slice(&guest.config_read(register).to_le_bytes());
    }
    let expected: Vec<u8> = [
        [0x09, 0x00, 0x10, 0x01, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0].as_slice(),
        &[0x09, 0x40, 0x10, 0x03, 4, 0, 0, 0, 0, 0x10, 0, 0, 0, 0x10, 0, 0],
        &[0x09, 0x50, 0x10, 0x04, 4, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0, 0],
        &[0x09, 0x60, 0x14, 0x02, 4, 0, 0, 0, 0, 0x30, 0, 0, 0, 0x10, 0, 0, 4, 0, 0, 0],
        &[0x09, 0x70, 0x14, 0x05, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0x11, 0x84, 0x01, 0x00, 0x01, 0, 0, 0, 0x01, 0x08, 0, 0],
    ]
    .concat();
    assert_eq!(bytes, expected);
    assert_eq!(guest.config_read(0x34) & 0xff, 0x98);
    assert_eq!(guest.config_read(0x00), 0x1001_1af4);
    assert_eq!(guest.config_read(0x08), 0x0100_0000);
    assert_eq!(guest.config_read(0x2c), 0x0002_1af4);
    assert_eq!(guest.config_read(0x3c), 0x0100);
    for (register, size) in [(0x10, 0xffff_ff81), (0x14, 0xffff_f000), (0x20, 0xffff_c00c)] {
        guest.config_write(register, u32::MAX);
        assert_eq!(guest.config_read(register), size);
    }
}

#[test]
fn the_other_generations_are_the_boards_too() {
    let (device, _file) = block(&[0; 4096], |_| ());
    let guest = Guest::cold(device, Generation::Modern, ram());
    assert_eq!(guest.config_read(0x00), 0x1042_1af4);
    assert_eq!(guest.config_read(0x08), 0x0100_0001);
    assert_eq!(guest.config_read(0x2c), 0x1100_1af4);
    guest.config_write(0x10, u32::MAX);
    assert_eq!(guest.config_read(0x10), 0);
    assert_eq!(guest.config_read(0x34) & 0xff, 0x98);

    let (device, _file) = block(&[0; 4096], |_| ());
    let guest = Guest::cold(device, Generation::Legacy, ram());
    assert_eq!(guest.config_read(0x34) & 0xff, 0x40);
    assert_eq!(guest.config_read(0x40), 0x0001_0011);
    guest.config_write(0x20, u32::MAX);
    assert_eq!(guest.config_read(0x20), 0);
}

#[test]
fn drivers_are_offered_what_qemu_offers() {
    let (device, _file) = block(&[0; 4096], |_| ());
    let guest = Guest::new(device);
    assert_eq!(guest.function.lock().unwrap().offered, 0x101_7900_6e54);
    // A modern driver is not shown bits 24, 27 and 30.
    assert_eq!(guest.offered(), 0x101_3000_6e54);
    assert_eq!(u32::from_le_bytes(guest.legacy_read(0)), 0x7900_6e54);
    let (device, _file) = block(&[0; 4096], |o| (o.queues, o.image.readonly) = (2, true));
    let guest = Guest::new(device);
    assert_eq!(guest.offered(), 0x101_3000_7e74);
}

#[test]
fn doorbells_follow_driver_and_bars() {
    let (device, _file) = block(&[0; 4096], |o| o.queues = 2);
    let mut guest = Guest::new(device);
    let doorbells =
        |guest: &Guest| -> Vec<_> { guest.io_events.0.lock().unwrap().iter().copied().collect() };
    assert_eq!(doorbells(&guest), []);
    guest.start(0);
    let port = u64::from(LEGACY_PORTS) + 16;
    let all = [
        (port, Some(0)),
        (port, Some(1)),
        (MODERN_BASE + 0x3000, None),
        (MODERN_BASE + 0x3004, None),
    ];
    assert_eq!(doorbells(&guest), all);
    guest.config_write(4, 2 | 4);
    assert_eq!(doorbells(&guest), all[2..]);
    guest.config_write(4, 7);
    guest.config_write(0x20, 0xfd00_0000);
    assert_eq!(doorbells(&guest)[2], (0xfd00_3000, None));
    guest.config_write(0x20, u32::try_from(MODERN_BASE).unwrap());
    guest.write8(0x14, 0);
    assert_eq!(doorbells(&guest), []);
    guest.start(0);
    let io_events = guest.io_events.clone();
    drop(guest);
    assert!(io_events.0.lock().unwrap().is_empty(), "doorbells outlive their device");
}

#[test]
fn intx_goes_up_with_the_isr_and_down_when_it_is_read() {
    let (device, _file) = block(&[0; 4096], |_| ());
    let mut guest = Guest::new(device);
    guest.start(0);
    let control = guest.config_read(0x98);
    guest.config_write(0x98, control & !0x8000_0000);
    flush(&mut guest);
    guest.kick(0);
    guest.wait_used(0, 1);
    crate::virtio::testing::until("INTx is asserted", || guest.intx());
    assert!(guest.msi.sent().is_empty());
    guest.config_write(4, 7 | 0x400);
    assert!(!guest.intx(), "interrupt disable");
    guest.config_write(4, 7);
    assert!(guest.intx());
    assert_eq!(guest.read::<1>(0x1000), [1]);
    assert!(!guest.intx());
    assert_eq!(guest.read::<1>(0x1000), [0]);
}

#[test]
fn the_configuration_window_reaches_the_registers() {
    let (device, _file) = block(&[0; 4096], |_| ());
    let guest = Guest::new(device);
    let window = |bar: u32, offset: u32, length: u32| {
        guest.config_write(0x88, bar);
        guest.config_write(0x8c, offset);
        guest.config_write(0x90, length);
    };
    window(4, 0x14, 1);
    guest.config_write(0x94, 3);
    assert_eq!(guest.status(), 3);
    window(4, 0x12, 2);
    assert_eq!(guest.config_read(0x94) & 0xffff, 1);
    window(4, 0x2000, 4);
    assert_eq!(guest.config_read(0x94), 8, "capacity");
    for (bar, offset, length) in [(0, 0x14, 1), (4, 0x13, 2), (4, 0x14, 3), (4, 0x4000, 4)] {
        window(bar, offset, length);
        guest.config_write(0x94, 0);
        guest.config_read(0x94);
        assert_eq!(guest.status(), 3, "bar {bar} offset {offset:#x} length {length}");
    }
}

#[test]
fn one_queue_can_be_reset() {
    let (device, _file) = block(&[0; 4096], |o| o.queues = 2);
    let mut guest = Guest::new(device);
    guest.start(features::RING_RESET);
    flush(&mut guest);
    guest.kick(0);
    guest.wait_used(0, 1);
    guest.write16(0x16, 0);
    guest.write16(0x18, 64);
    guest.write16(0x3a, 1);
    assert_eq!(guest.read::<2>(0x3a), [0, 0]);
    assert_eq!(guest.read::<2>(0x1c), [0, 0], "not enabled");
    assert_eq!(guest.read::<2>(0x18), [0, 1], "the size is the default again");
    assert_eq!(guest.io_events.0.lock().unwrap().len(), 2, "the other queue's doorbells");
    guest.write16(0x16, 1);
    assert_eq!(guest.read::<2>(0x1c), [1, 0]);
}

#[test]
fn legacy_drivers_find_their_registers() {
    let (device, _file) = block(&[7; 4096], |_| ());
    let mut guest = Guest::with(device, Generation::Legacy, ram());
    guest.legacy_write(18, &[1]);
    guest.legacy_write(18, &[3]);
    guest.legacy_write(4, &0x2000_0200_u32.to_le_bytes());
    assert_eq!(u32::from_le_bytes(guest.legacy_read(4)), 0x2000_0200);
    assert_eq!(u16::from_le_bytes(guest.legacy_read(12)), 256);
    assert_eq!(u64::from_le_bytes(guest.legacy_read(20)), 8, "capacity");
    // MSI-X moves the device's configuration by four bytes.
    let control = guest.config_read(0x40);
    guest.config_write(0x40, control | 0x8000_0000);
    assert_eq!(u64::from_le_bytes(guest.legacy_read(24)), 8);
    guest.legacy_write(22, &9_u16.to_le_bytes());
    assert_eq!(u16::from_le_bytes(guest.legacy_read(22)), 0xffff, "there is no vector 9");
    guest.config_write(0x40, control);

    let desc = Guest::ring(0);
    guest.legacy_write(8, &u32::try_from(desc >> 12).unwrap().to_le_bytes());
    assert_eq!(u32::from_le_bytes(guest.legacy_read(8)), u32::try_from(desc >> 12).unwrap());
    guest.legacy_write(18, &[7]);
    // 256 entries: available ring behind the descriptors, used ring on the next page: as the
    // fixture has them.
    flush(&mut guest);
    guest.legacy_write(16, &0_u16.to_le_bytes());
    let used = guest.wait_used(0, 1);
    assert_eq!(used, [(0, 1)]);
    crate::virtio::testing::until("INTx is asserted", || guest.intx());
    assert_eq!(guest.legacy_read::<1>(19), [1]);
    assert!(!guest.intx());
    guest.legacy_write(18, &[0]);
    assert_eq!(u32::from_le_bytes(guest.legacy_read(8)), 0);
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let cases: [(u64, u64, u64); 6] = [
        (0x1008, 0x3000, 0x5000),
        (0x1000, 0x3001, 0x5000),
        (0x1000, 0x3000, 0x5002),
        (PIECE - 0x800, 0x3000, 0x5000),
        (0x1000, HIGH + PIECE, 0x5000),
        (0x1000, 0x3000, u64::MAX - 3),
    ];
    for (desc, avail, used) in cases {
        let (device, _file) = block(&[0; 4096], |_| ());
        let mut guest = Guest::new(device);
        guest.start(0);
        guest.write8(0x14, 0);
        guest.write32(8, 1);
        guest.write32(0xc, 1);
        guest.write8(0x14, 11);
        for (register, value) in [(0x20, desc), (0x28, avail), (0x30, used)] {
            guest.write32(register, u32::try_from(value & 0xffff_ffff).unwrap());
            guest.write32(register + 4, u32::try_from(value >> 32).unwrap());
        }
        guest.write16(0x1c, 1);
        assert_eq!(guest.status() & status::NEEDS_RESET, status::NEEDS_RESET, "{desc:#x}");
        guest.write8(0x14, 15);
        guest.kick(0);
        assert!(guest.io_events.0.lock().unwrap().is_empty());
        guest.start(0);
        flush(&mut guest);
        guest.kick(0);
        guest.wait_used(0, 1);
    }
}

#[test]
fn sizes_that_cannot_be_are_not_taken() {
    let (device, _file) = block(&[0; 4096], |_| ());
    let guest = Guest::new(device);
    for size in [0, 3, MAX_QUEUE_SIZE + 1, 2 * MAX_QUEUE_SIZE] {
        guest.write16(0x18, size);
        assert_eq!(u16::from_le_bytes(guest.read(0x18)), 256);
    }
    guest.write16(0x18, MAX_QUEUE_SIZE);
    assert_eq!(u16::from_le_bytes(guest.read(0x18)), MAX_QUEUE_SIZE);
}

#[test]
fn any_register_can_be_touched_in_any_width() {
    let (device, _file) = block(&[0; 4096], |_| ());
    let guest = Guest::new(device);
    for offset in (0..0x4000).chain([0x4000, u64::MAX - 3]) {
        for width in [1, 2, 4, 8] {
            let mut data = [0xff; 8];
            let mut function = guest.function.lock().unwrap();
            use crate::pci::PciFunction;
            for bar in [0, 1, 4, 5] {
                function.bar_read(bar, offset, &mut data[..width]);
                function.bar_write(bar, offset, &data[..width]);
            }
        }
    }
}

#[test]
fn a_chain_that_cannot_be_followed_breaks_the_device_until_reset() {
    type Case = fn(&mut Guest);
    let cases: [(&str, Case); 9] = [
        ("a loop", |guest| {
            let at = guest.buffer(&[0; 16]);
            guest.set_desc(Guest::ring(0), 0, at, 16, 1, 0);
            guest.make_available(0, 0);
        }),
        ("a next index out of range", |guest| {
            let at = guest.buffer(&[0; 16]);
            guest.set_desc(Guest::ring(0), 0, at, 16, 1, 256);
            guest.make_available(0, 0);
        }),
        ("a head out of range", |guest| guest.make_available(0, 256)),
        ("a buffer behind memory", |guest| {
            guest.add(0, &[(PIECE - 8, 16, false)]);
        }),
        ("a buffer that wraps", |guest| {
            guest.add(0, &[(u64::MAX - 7, 16, false)]);
        }),
        ("more than 4 GiB", |guest| {
            guest.add(0, &[(0, u32::MAX, false), (0, u32::MAX, false)]);
        }),
        ("readable behind writable", |guest| {
            guest.add(0, &[(0x40_0000, 16, true), (0x40_0000, 16, false)]);
        }),
        ("an indirect table in an indirect table", |guest| {
            let table = guest.buffer(&[0; 16]);
            guest.set_desc(table, 0, table, 16, 4, 0);
            guest.set_desc(Guest::ring(0), 0, table, 16, 4, 0);
            guest.make_available(0, 0);
        }),
        ("too many available at once", |guest| {
            let avail = GuestAddress(Guest::ring(0) + 0x1002);
            guest.ram.write_obj(1000_u16, avail).unwrap();
        }),
    ];
    let (device, _file) = block(&[0; 4096], |_| ());
    let mut guest = Guest::new(device);
    for (name, case) in cases {
        guest.start(features::INDIRECT_DESC);
        guest.msi.take();
        case(&mut guest);
        guest.kick(0);
        crate::virtio::testing::until(name, || guest.status() & status::NEEDS_RESET != 0);
        crate::virtio::testing::until("a configuration interrupt", || {
            guest.msi.sent().iter().any(|(vector, _)| *vector == 0)
        });
        assert_eq!(guest.used(0), [], "{name}");
        assert!(guest.function.lock().unwrap().core.is_broken());
    }
    // And then it works.
    guest.start(0);
    let head = flush(&mut guest);
    guest.kick(0);
    assert_eq!(guest.wait_used(0, 1), [(head, 1)]);
}

/// A driver in the middle of its work, with a distinct value wherever there is one.
fn busy() -> (Guest, tempfile::NamedTempFile) {
    let (device, file) = block(&[0; 4096], |o| o.queues = 3);
    let mut guest = Guest::new(device);
    guest.start(features::EVENT_IDX | features::RING_RESET | 0x6e54);
    // Queue 1 of another size, queue 2 without a vector.
    guest.write16(0x16, 1);
    guest.write16(0x3a, 1);
    guest.write16(0x18, 512);
    guest.write16(0x1a, 3);
    for (register, offset) in [(0x20, 0x0), (0x28, 0x2000), (0x30, 0x3000)] {
        guest.write32(register, 0x20_0000 + offset);
    }
    guest.write16(0x1c, 1);
    guest.write16(0x16, 2);
    guest.write16(0x1a, 0xffff);
    guest.write32(0, 1);
    guest.write32(8, 1);
    for _ in 0..5 {
        flush(&mut guest);
    }
    guest.kick(0);
    guest.wait_used(0, 5);
    // The interrupt comes after the request; pausing waits for both.
    guest.function.lock().unwrap().pause();
    guest.config_write(0x3c, 11);
    guest.config_write(0xb0, 0x1234_5678);
    guest.write8(0x2000 + 32, 0);
    // Vector 2 is masked and pending.
    guest.io.mmio_write(MSIX_BASE + 2 * 16 + 12, &[1]);
    guest.function.lock().unwrap().core.interrupts().queue(2);
    (guest, file)
}

#[test]
fn a_busy_device_moves_with_every_field() {
    let (source, file) = busy();
    let body = source.save();
    let short = source.save_for(Audience::MiniVmm);
    assert_eq!(source.save_for(Audience::Restore), body);
    drop(source.function.lock().unwrap().close());
    let device = super::block_on(&file, |o| o.queues = 3);
    let destination = Guest::cold(device, Generation::Transitional, source.ram.clone());
    for form in [&body, &short] {
        destination.load(form).unwrap();
        assert_eq!(destination.save(), body);
        assert_eq!(destination.save_for(Audience::MiniVmm), short);
    }
    // Without room for a thousand queues; one of the three was resized.
    assert!(short.len() < 800 && body.len() > 50 * short.len(), "{} {}", short.len(), body.len());
    assert!(destination.io_events.0.lock().unwrap().is_empty(), "doorbells can wait");
    assert_eq!(destination.read::<1>(0x2020), [0], "the write cache is off");
    {
        let function = destination.function.lock().unwrap();
        let (one, two) = (function.core.queue(1).unwrap(), function.core.queue(2).unwrap());
        assert_eq!((one.size(), one.vector), (512, 3));
        assert_eq!((two.size(), two.vector), (256, 0xffff));
        drop((one, two));
        let zero = function.core.queue(0).unwrap();
        assert_eq!((zero.last_avail(), zero.in_flight()), (5, 0));
    }
    assert!(destination.msi.sent().is_empty());
    destination.io.mmio_write(MSIX_BASE + 2 * 16 + 12, &[0]);
    assert_eq!(destination.msi.take(), [2], "what was pending fires when it is unmasked");

    // The driver goes on as if nothing had happened.
    let mut guest = destination.driven_like(&source);
    guest.function.lock().unwrap().open().unwrap();
    guest.function.lock().unwrap().resume();
    let header = guest.buffer(&[8_u32.to_le_bytes().as_slice(), &[0; 12]].concat());
    let id = guest.buffer(&[0; 21]);
    let head = guest.add(0, &[(header, 16, false), (id, 21, true)]);
    guest.kick(0);
    // Its doorbells come when it runs already, and it has rung before.
    assert!(guest.io_events.0.lock().unwrap().is_empty());
    guest.function.lock().unwrap().catch_up();
    guest.function.lock().unwrap().update_doorbells();
    let doorbells = source.io_events.0.lock().unwrap().clone();
    assert_eq!((doorbells.len(), &*guest.io_events.0.lock().unwrap()), (6, &doorbells));
    assert_eq!(guest.wait_used(0, 1), [(head, 21)]);
    assert_eq!(&guest.bytes(id, 21), b"serial-of-disk0\0\0\0\0\0\0");
}

/// Where the subsection of a short form begins that has its queues.
fn few_queues(short: &[u8]) -> usize {
    let name = b"mini-vmm/virtqueues";
    short.windows(name.len()).position(|w| w == name).expect("a short form") - 2
}

#[test]
fn queues_that_are_not_the_devices_are_refused() {
    let (source, _file) = busy();
    let (full, short) = (source.save(), source.save_for(Audience::MiniVmm));
    let at = few_queues(&short);
    let refused = |body: &[u8]| source.load(body).unwrap_err().to_string();

    let error = refused(&[&full, &short[at..]].concat());
    assert!(error.contains("mini-vmm/virtqueues") && error.contains("QEMU's arrays"), "{error}");

    // Behind type, length, name and version: two rings of three, whose bytes are gone too.
    let rings = at + 2 + 19 + 4;
    assert_eq!(short[rings..rings + 2], [0, 3]);
    let two = [&short[..rings], &[0, 2], &short[rings + 2..rings + 34], &short[rings + 50..]];
    let error = refused(&two.concat());
    assert!(error.contains("mini-vmm/virtqueues.rings: expected 3, found 2"), "{error}");

    // Behind the rings and four words: no modern queue.
    let vqs = rings + 2 + 3 * 16 + 4 * 4;
    assert_eq!(short[vqs..vqs + 2], [0, 3]);
    let error = refused(&[&short[..vqs], &[0, 0]].concat());
    assert!(error.contains("mini-vmm/virtqueues.vqs: expected 3, found 0"), "{error}");

    let mut many = short.clone();
    many[vqs..vqs + 2].copy_from_slice(&[4, 1]);
    let error = refused(&many);
    assert!(error.contains("1025 elements, at most 1024"), "{error}");
    source.load(&short).unwrap();
}

#[test]
fn intx_moves_while_it_is_asserted() {
    let (device, file) = block(&[0; 4096], |_| ());
    let mut source = Guest::new(device);
    source.start(0);
    let control = source.config_read(0x98);
    source.config_write(0x98, control & !0x8000_0000);
    flush(&mut source);
    source.kick(0);
    source.wait_used(0, 1);
    source.function.lock().unwrap().pause();
    assert!(source.intx());
    let body = source.save();
    source.function.lock().unwrap().close().unwrap();
    let device = super::block_on(&file, |_| ());
    let destination = Guest::cold(device, Generation::Transitional, source.ram.clone());
    destination.load(&body).unwrap();
    assert!(destination.intx());
    assert_eq!(destination.read::<1>(0x1000), [1]);
    assert!(!destination.intx());
}

#[test]
fn what_cannot_be_restored_is_refused_by_name() {
    let (source, file) = busy();
    let body = source.save();
    source.function.lock().unwrap().close().unwrap();
    // Offsets: 276 PCI block, 64 table, 1 pending, 2 config vector, then the registers.
    let (registers, vectors) = (276 + 64 + 1 + 2, 276 + 64 + 1);
    let config = registers + 8 + 4;
    let count = config + 57;
    let queue = |i: usize| count + 4 + 16 * i;
    let edits: [(&str, usize, &[u8]); 9] = [
        ("pci.config[0x0]", 4, &[0]),
        ("config_vector", vectors, &[0, 4]),
        ("config.capacity", config, &[9]),
        ("num_queues", count, &[0, 0, 0, 2]),
        ("queue[0].num", queue(0), &[0, 0, 0, 0]),
        ("queue[1].num", queue(1), &[0, 0, 0, 3]),
        ("queue[0].desc", queue(0) + 4, &[0xff; 8]),
        ("queue[0].last_avail_idx", queue(0) + 12, &[0x20, 0]),
        ("queue[2].vector", queue(2) + 14, &[0, 4]),
    ];
    for (field, at, bytes) in edits {
        let mut bad = body.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        let device = super::block_on(&file, |o| o.queues = 3);
        let destination = Guest::cold(device, Generation::Transitional, source.ram.clone());
        let pristine = destination.save();
        let error = destination.load(&bad).unwrap_err();
        let text = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source())
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(": ");
        assert!(text.contains(field), "{field}: {text}");
        assert_eq!(destination.save(), pristine, "{field}: something was touched");
    }
    let mut features = body.clone();
    features[registers + 4] |= 0x80;
    let at = body.windows(21).position(|w| w == b"virtio/64bit_features").unwrap();
    features[at + 25 + 4] |= 0x80;
    let device = super::block_on(&file, |o| o.queues = 3);
    let destination = Guest::cold(device, Generation::Transitional, source.ram.clone());
    let error = destination.load(&features).unwrap_err().to_string();
    assert!(error.contains("unsupported. Allowed features: 0x10179007e54"), "{error}");
    for cut in (0..body.len()).step_by(97) {
        assert!(destination.load(&body[..cut]).is_err(), "cut at {cut}");
    }
}
