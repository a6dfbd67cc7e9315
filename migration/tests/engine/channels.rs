//! Pages on connections of their own.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::*;
use migration::destination;
use migration::guest::{GuestRam, PAGE_SIZE, RamBlock};
use migration::params::Compression;
use migration::transport::{Connection, Links};
use migration::vmstate::SectionId;
use migration::wire::header::{self, Configuration};
use migration::wire::multifd::{Initial, Packet};
use migration::wire::ram;
use migration::wire::section::{self, PartType, SectionHeader};
use migration::wire::zstd::{Compressor, MAX_COMPRESSED};

/// A connection of the source's and so many beside it; the destination has the other ends.
pub(crate) fn links(count: usize, destination: &mut FakeVm) -> (Links, Connection) {
    let (main, there) = pair();
    let mut pages = Vec::new();
    for _ in 0..count {
        let (a, b) = pair();
        pages.push(a);
        destination.beside.push(b);
    }
    (Links { main, pages }, there)
}

#[test]
fn a_guest_that_writes_without_pause_arrives_over_any_number_of_connections() {
    for count in [1, 2, 4, 16] {
        let (mut source, mut destination, _) = two_vms(4096);
        source.dirty(700, 20);
        let connections = links(count, &mut destination);
        let control = control_with(|p| p.verify = true);
        let other = crate::common::control();
        let ended = migrate(source, destination, connections, (control.clone(), other.clone()));
        assert_moved(&ended);
        let (here, there) = (control.report(), other.report());
        assert_eq!(here.verified_ram_bytes, (4096 + 3) * PAGE_SIZE);
        assert!(here.passes >= 2 && here.zero_pages > 1000 && here.normal_pages > 2000);
        // Both sides count all connections.
        assert_eq!((here.normal_pages, here.zero_pages), (there.normal_pages, there.zero_pages));
        assert!(here.transferred_bytes > here.normal_pages * PAGE_SIZE);
        assert!(there.transferred_bytes > there.normal_pages * PAGE_SIZE);
        // Pages go over the further ones, and the rest does not.
        for (report, control) in [(&here, &control), (&there, &other)] {
            let ram = control.info().ram.unwrap();
            assert!(ram.multifd_bytes > report.normal_pages * PAGE_SIZE);
            assert!(ram.multifd_bytes < report.transferred_bytes);
        }
    }
}

#[test]
fn a_limit_holds_for_one_connection_and_for_all_together_also_after_a_change() {
    const LIMIT: u64 = 8 << 20;
    for (count, compression) in [
        (0, Compression::None),
        (1, Compression::None),
        (4, Compression::None),
        (2, Compression::Zstd),
    ] {
        let (mut source, mut destination, _) = two_vms(16 << 10);
        source.fill_with_noise();
        let connections = links(count, &mut destination);
        let control = control_with(|p| {
            p.max_bandwidth = 2 * LIMIT;
            p.compression = compression;
        });
        let started =
            start(source, destination, connections, (control.clone(), crate::common::control()));
        let reach = |bytes: u64| {
            wait_for("so many bytes", || control.report().transferred_bytes >= bytes);
            let before = Instant::now();
            (before, control.report().transferred_bytes, Instant::now())
        };
        // Both ends of what is measured lie within the first pass.
        for limit in [2 * LIMIT, LIMIT] {
            let mut p = control.parameters();
            p.max_bandwidth = limit;
            control.set_parameters(p);
            let (begin, before, _) = reach(control.report().transferred_bytes + limit / 4);
            let (_, after, end) = reach(before + 3 * limit / 2);
            let rate = (after - before) as f64 / (end - begin).as_secs_f64() / limit as f64;
            // A piece of a tenth of a second may lie on either side of each end; `pace` is exact.
            assert!((0.4..1.25).contains(&rate), "{count} connections: {rate:.3} of the limit");
        }
        let mut p = control.parameters();
        p.max_bandwidth = 0;
        control.set_parameters(p);
        assert_moved(&started.join());
    }
}

#[test]
fn compressed_pages_arrive_whole_and_take_less_of_the_wire() {
    for (count, level) in [(1, 1), (4, 1), (2, 0), (2, 19), (1, 20)] {
        let (mut source, mut destination, _) = two_vms(4096);
        source.dirty(700, 20);
        let connections = links(count, &mut destination);
        let control = control_with(|p| {
            (p.compression, p.zstd_level) = (Compression::Zstd, level);
            p.verify = true;
        });
        let other = crate::common::control();
        let ended = migrate(source, destination, connections, (control.clone(), other.clone()));
        assert_moved(&ended);
        let (here, there) = (control.report(), other.report());
        assert_eq!((here.normal_pages, here.zero_pages), (there.normal_pages, there.zero_pages));
        assert!(here.normal_pages > 2000, "{here:?}");
        for report in [here, there] {
            let pages = report.normal_pages * PAGE_SIZE;
            assert!(report.transferred_bytes < pages / 4, "{report:?}");
        }
    }
}

#[test]
fn what_cannot_be_compressed_moves_as_well() {
    let (mut source, mut destination, _) = two_vms(2048);
    source.fill_with_noise();
    let connections = links(3, &mut destination);
    let control = control_with(|p| p.compression = Compression::Zstd);
    let ended =
        migrate(source, destination, connections, (control.clone(), crate::common::control()));
    assert_moved(&ended);
    let report = control.report();
    let pages = (report.normal_pages * PAGE_SIZE) as f64;
    assert!((report.transferred_bytes as f64) < 1.02 * pages, "{report:?}");
}

#[test]
fn a_destination_that_was_not_told_of_a_connection_waits_no_longer_than_allowed() {
    let (source, mut destination, _) = two_vms(64);
    let connections = links(3, &mut destination);
    let kept = destination.beside.pop();
    let other = control_with(|p| p.stall_timeout = Duration::from_millis(300));
    let ended = migrate(source, destination, connections, (control(), other));
    assert_kept(&ended, "3 further connections (multifd), and 2 have come");
    drop(kept);
}

#[test]
fn whoever_else_connects_is_no_channel() {
    let (source, mut destination, _) = two_vms(512);
    let connections = links(2, &mut destination);
    let (stranger, end) = pair();
    let mut first = Vec::new();
    Initial { uuid: [0; 16], channel: 1, token: [1; 16] }.write(&mut first);
    (&stranger).write_all(&first).unwrap();
    let (silent, other_end) = pair();
    destination.beside.insert(0, end);
    destination.beside.insert(1, other_end);
    let ended = migrate(source, destination, connections, (control(), control()));
    assert_moved(&ended);
    drop((stranger, silent));
}

#[test]
fn a_connection_that_is_lost_is_named_on_both_sides_and_the_guest_stays() {
    let (mut source, mut destination, _) = two_vms(4096);
    source.dirty(2000, 20);
    let connections = links(3, &mut destination);
    let lost = destination.beside[1].clone();
    let control = control_with(|p| {
        p.downtime_limit = Duration::ZERO;
        p.max_bandwidth = 64 << 20;
    });
    let started =
        start(source, destination, connections, (control.clone(), crate::common::control()));
    wait_for("pages", || control.report().normal_pages > 300);
    lost.shutdown(std::net::Shutdown::Both);
    let ended = started.join();
    assert_kept(&ended, "");
    let Err(failure) = ended.arrived else { panic!("it arrived") };
    let words = failure.error.chain();
    assert!(
        words.contains("connection 1 of those that bring pages")
            || words.contains("further connection"),
        "{words}"
    );
}

#[test]
fn a_connection_that_stands_still_ends_the_migration_in_time() {
    let (mut source, mut destination, _) = two_vms(4096);
    source.dirty(2000, 20);
    let (mut here, there) = links(2, &mut destination);
    // What the source writes to one of them ends in a process that passes on the first packet only.
    let (a, b) = pair();
    let swallowed = std::mem::replace(&mut here.pages[1], a);
    let passing = thread::spawn(move || {
        let mut first = [0; Initial::LEN];
        (&b).read_exact(&mut first).unwrap();
        (&swallowed).write_all(&first).unwrap();
        let mut rest = [0; 4096];
        while (&b).read(&mut rest).is_ok_and(|n| n > 0) {}
        swallowed
    });
    let other = control_with(|p| p.stall_timeout = Duration::from_millis(500));
    let ended = migrate(source, destination, (here, there), (control(), other));
    assert_kept(&ended, "connection 1 of those that bring pages (multifd) stands still");
    drop(join(passing));
}

#[test]
fn a_cancel_reaches_a_source_whose_connections_are_stuck() {
    let (source, mut destination, _) = two_vms(8192);
    let (mut here, there) = links(2, &mut destination);
    // What is written to one of them is not read behind the first packet.
    let (a, b) = pair();
    let unread = std::mem::replace(&mut here.pages[0], a);
    let passing = thread::spawn(move || {
        let mut first = [0; Initial::LEN];
        (&b).read_exact(&mut first).unwrap();
        (&unread).write_all(&first).unwrap();
        (b, unread)
    });
    let control = control();
    let other = control_with(|p| p.stall_timeout = Duration::from_secs(1));
    let started = start(source, destination, (here, there), (control.clone(), other));
    wait_until_stuck(&control);
    control.cancel().unwrap();
    let ended = started.join();
    assert_kept(&ended, "cancelled");
    let words = ended.arrived.unwrap_err().error.chain();
    assert!(words.contains("the source gave up"), "{words}");
    drop(join(passing));
}

fn page(number: u64, sync: bool, at: Option<(u64, u8)>) -> Vec<u8> {
    let mut out = Vec::new();
    let offsets = at.iter().map(|(offset, _)| *offset).collect();
    let (block, zeros) = ("pc.ram".into(), vec![]);
    Packet { sync, number, block, offsets, zeros, zstd: None }.write(&mut out);
    if let Some((_, byte)) = at {
        out.extend_from_slice(&[byte; PAGE_SIZE as usize]);
    }
    out
}

/// A packet that says only that these pages are zero, as QEMUs do from 9.0 on.
fn zeros(number: u64, zeros: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    let (block, zeros) = ("pc.ram".into(), zeros.to_vec());
    Packet { sync: false, number, block, offsets: vec![], zeros, zstd: None }.write(&mut out);
    out
}

fn byte(ram: &dyn GuestRam, offset: u64) -> u8 {
    let mut byte = [0];
    ram.copy_out(0, offset, &mut byte).unwrap();
    byte[0]
}

/// A further connection that has said whose it is: the source's end and the destination's.
fn further(channel: u8) -> (UnixStream, UnixStream) {
    let (mut mine, its) = UnixStream::pair().unwrap();
    let mut first = Vec::new();
    Initial { uuid: [0; 16], channel, token: [0; 16] }.write(&mut first);
    mine.write_all(&first).unwrap();
    (mine, its)
}

/// How a QEMU's stream of these blocks begins.
fn beginning(blocks: &[RamBlock]) -> Vec<u8> {
    let mut out = Vec::new();
    let machine = MACHINE.to_owned();
    header::write(&mut out, &Configuration { machine, ..Configuration::default() });
    let key = SectionId::new("ram", 0);
    section::write_header(&mut out, PartType::Start, &SectionHeader { id: 2, key, version: 4 });
    ram::write_blocks(&mut out, blocks);
    ram::write_eos(&mut out);
    section::write_footer(&mut out, 2);
    out
}

/// A source that speaks as a QEMU does, nothing of ours: a first connection on which sections of RAM have come, and
/// none of their pages, and two further ones, announced on the destination's side.
struct QemuLike {
    main: UnixStream,
    pages: [UnixStream; 2],
    ram: std::sync::Arc<dyn GuestRam>,
    receiving: thread::JoinHandle<Result<(), String>>,
}

impl QemuLike {
    fn begin(sections: usize) -> Self {
        let (_, mut destination, _) = two_vms(16);
        let ram = destination.ram.clone();
        let pages = [0, 1].map(|channel| {
            let (mine, its) = further(channel);
            destination.beside.push(Connection::from_unix(its, "unix:channel".into()));
            mine
        });
        let (mut main, there) = UnixStream::pair().unwrap();
        let mut out = beginning(&ram.blocks());
        for _ in 0..sections {
            section::write_part_header(&mut out, PartType::Part, 2);
            ram::write_eos(&mut out);
            section::write_footer(&mut out, 2);
        }
        main.write_all(&out).unwrap();
        let there = Connection::from_unix(there, "unix:main".into());
        let control = control_with(|p| {
            p.multifd = true;
            p.stall_timeout = Duration::from_secs(20);
        });
        let receiving = thread::spawn(move || {
            let result = destination::run(&mut destination, there, &control);
            result.map(drop).map_err(|failure| failure.error.chain())
        });
        Self { main, pages, ram, receiving }
    }

    /// A byte of the destination's memory.
    fn byte(&self, offset: u64) -> u8 {
        byte(&*self.ram, offset)
    }

    /// Hangs up, and gives why the destination gave up.
    fn end(self) -> String {
        drop((self.main, self.pages));
        join(self.receiving).unwrap_err()
    }
}

#[test]
fn an_older_page_never_lies_over_a_newer_one() {
    let source = QemuLike::begin(2);
    let [mut slow, mut quick] = source.pages.each_ref().map(|end| end.try_clone().unwrap());
    // The quick one is a section ahead: the new page, and one that tells that it has been read.
    quick.write_all(&page(0, true, None)).unwrap();
    quick.write_all(&page(1, true, None)).unwrap();
    quick.write_all(&page(4, true, Some((0x3000, 2)))).unwrap();
    slow.write_all(&page(2, true, None)).unwrap();
    // Time enough for one that did not wait to write the new page before the old one comes.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(source.byte(0x3000), 0, "read before the section in front of it had ended");
    slow.write_all(&page(3, true, Some((0x3000, 1)))).unwrap();
    slow.write_all(&page(5, true, None)).unwrap();
    wait_for("the newer page", || source.byte(0x3000) == 2);
    drop((slow, quick));
    let ram = source.ram.clone();
    let words = source.end();
    assert!(words.contains("broke off"), "{words}");
    assert_eq!(byte(&*ram, 0x3000), 2);
}

#[test]
fn a_page_that_a_later_qemu_says_is_zero_becomes_so() {
    let mut source = QemuLike::begin(1);
    let last = 0xf000;
    for (number, at) in [(0, 0x3000), (1, 0x4000), (2, 0x6000), (3, last)] {
        source.pages[0].write_all(&page(number, false, Some((at, 7)))).unwrap();
    }
    wait_for("the pages", || source.byte(last) == 7);
    source.pages[0].write_all(&zeros(4, &[0x3000, 0x4000, last])).unwrap();
    wait_for("the zero pages", || source.byte(last) == 0);
    assert_eq!([0x3000, 0x4fff, 0x6000].map(|at| source.byte(at)), [0, 0, 7]);
    source.pages[0].write_all(&zeros(5, &[0x6000, 0x10000])).unwrap();
    // Nobody hangs up: that might be seen first.
    let words = join(source.receiving).unwrap_err();
    assert!(words.contains("Illegal RAM offset 0x10000"), "{words}");
    assert_eq!(byte(&*source.ram, 0x6000), 7, "done before the packet was checked");
}

#[test]
fn a_first_connection_that_has_nothing_to_say_for_long_is_not_taken_for_dead() {
    let (mut source, mut destination, _) = two_vms(2048);
    source.fill_with_noise();
    let connections = links(2, &mut destination);
    // A pass of eight seconds, and two of patience.
    let patience = Duration::from_secs(2);
    let control = control_with(|p| {
        p.max_bandwidth = 1 << 20;
        p.stall_timeout = patience;
    });
    let other = control_with(|p| p.stall_timeout = patience);
    let ended = migrate(source, destination, connections, (control.clone(), other));
    assert_moved(&ended);
    assert!(control.report().total > 2 * patience, "it was over too soon to show anything");
}

/// A packet that says that `bytes` are the page at `offset`, compressed.
fn compressed(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let (block, offsets, zeros) = ("pc.ram".into(), vec![offset], vec![]);
    let zstd = Some(bytes.len());
    Packet { sync: false, number: 0, block, offsets, zeros, zstd }.write(&mut out);
    out.extend_from_slice(bytes);
    out
}

#[test]
fn a_packet_is_checked_before_anything_is_written() {
    let two_pages = Compressor::new(1).unwrap().compress(&[3; 8192]).unwrap().to_vec();
    let half_a_page = Compressor::new(1).unwrap().compress(&[3; 2048]).unwrap().to_vec();
    let one_page = Compressor::new(1).unwrap().compress(&[3; 4096]).unwrap().to_vec();
    for (what, packet) in [
        ("Unknown ramblock", {
            let mut out = Vec::new();
            let (block, offsets, zeros) = ("nvram".into(), vec![0], vec![]);
            Packet { sync: false, number: 0, block, offsets, zeros, zstd: None }.write(&mut out);
            out
        }),
        ("Illegal RAM offset 0x10000", page(0, false, Some((0x10000, 1)))),
        ("Illegal RAM offset 0xfff", page(0, false, Some((0xfff, 1)))),
        ("Illegal RAM offset 0xffff", page(0, false, Some((!0xfff, 1)))),
        ("magic", vec![7; 4096]),
        ("Illegal RAM offset 0x10000", compressed(0x10000, &one_page)),
        ("more than the packet's 4096 bytes", compressed(0, &two_pages)),
        ("2048 bytes of pages are in a packet of 4096", compressed(0, &half_a_page)),
        (
            "0 bytes of pages are in a packet of 4096",
            compressed(0, &one_page[..one_page.len() - 1]),
        ),
        ("0 bytes of pages are in a packet of 4096", compressed(0, &[])),
        ("zstd: Unknown frame descriptor", compressed(0, &[7; 4096])),
        ("a packet's length", compressed(0, &vec![7; MAX_COMPRESSED + 1])),
        ("unexpected end of file", compressed(0, &one_page)[..1350].to_vec()),
    ] {
        let (_, mut destination, _) = two_vms(16);
        let (mut channel, end) = further(0);
        // It may hang up before all has been written.
        let packet = packet.get(..16 << 10).unwrap_or(&packet);
        channel.write_all(packet).unwrap();
        channel.shutdown(std::net::Shutdown::Write).unwrap();
        destination.beside.push(Connection::from_unix(end, "unix:channel".into()));
        let (mut main, there) = UnixStream::pair().unwrap();
        main.write_all(&beginning(&destination.ram.blocks())).unwrap();
        let control = control_with(|p| (p.multifd, p.multifd_channels) = (true, 1));
        let there = Connection::from_unix(there, "unix:main".into());
        let receiving = thread::spawn(move || {
            let result = destination::run(&mut destination, there, &control);
            (result.map(drop).map_err(|failure| failure.error.chain()), destination)
        });
        let (result, destination) = join(receiving);
        let words = result.unwrap_err();
        assert!(words.contains(what), "no '{what}' in {words}");
        assert!(destination.ram.contents().iter().flatten().all(|byte| *byte == 0));
    }
}
