//! Random numbers, the console and the balloon.

use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use crate::device::Device;
use crate::memory::GuestRamRef;
use crate::virtio::console::TURN;
use crate::virtio::testing::{Guest, HIGH, PIECE, go_on, ram};
use crate::virtio::{
    Balloon, BalloonControl, Console, ConsoleLine, Generation, PageDiscard, Rng, VirtioDevice,
    balloon as balloon_file, features,
};

#[test]
fn devices_are_the_boards() {
    let rng: Box<dyn VirtioDevice> = Box::new(Rng::new("rng0"));
    for (device, offered, id, class, ports, queues) in [
        (rng, 0x101_7900_0000, 0x1005, 0x00ff, 0x20, 1),
        (balloon(ram()).0, 0x101_7900_0012, 0x1002, 0x00ff, 0x40, 3),
        (console().0, 0x101_7900_0006, 0x1003, 0x0780, 0x40, 64),
    ] {
        let vectors = device.vectors();
        let guest = Guest::cold(device, Generation::Transitional, ram());
        let function = guest.function.lock().unwrap();
        assert_eq!((function.offered, function.core.len()), (offered, queues));
        drop(function);
        assert_eq!(guest.config_read(0), id << 16 | 0x1af4);
        assert_eq!(guest.config_read(8) >> 16, class);
        guest.config_write(0x10, u32::MAX);
        assert_eq!(!(guest.config_read(0x10) & !1) + 1, ports);
        let first = if vectors == 0 { 0x84 } else { 0x98 };
        assert_eq!(guest.config_read(0x34) & 0xff, first);
    }
}

#[test]
fn random_bytes_are_random() {
    let mut guest = Guest::new(Box::new(Rng::new("rng0")));
    guest.start(features::EVENT_IDX | features::INDIRECT_DESC);
    let at = guest.buffer(&[0; 256]);
    guest.add(0, &[(at, 64, true)]);
    guest.add_indirect(0, &[(at + 64, 64, true), (at + 128, 128, true)]);
    guest.clean();
    guest.kick(0);
    assert_eq!(guest.used(0), [(0, 64), (1, 192)]);
    let bytes = guest.bytes(at, 256);
    assert!(bytes.chunks(64).all(|piece| piece.iter().any(|byte| *byte != 0)));
    assert_ne!(bytes[..64], bytes[64..128]);
    assert!(guest.dirty().contains(&(at & !0xfff)));
    // A request for all of memory gets a part.
    guest.add(0, &[(at, 4 << 20, true)]);
    guest.kick(0);
    assert_eq!(guest.used(0), [(2, 64 << 10)]);
    guest.function.lock().unwrap().pause();
    let body = guest.save();
    let other =
        Guest::cold(Box::new(Rng::new("rng0")), Generation::Transitional, guest.ram.clone());
    other.load(&body).unwrap();
    assert_eq!(other.save(), body);
}

/// What a console has written, and how much more it may.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<(Vec<u8>, usize)>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (shown, room) = &mut *self.0.lock().unwrap();
        let n = bytes.len().min(*room);
        if n == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        *room -= n;
        shown.extend_from_slice(&bytes[..n]);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    fn shown(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap().0)
    }
    fn set_room(&self, room: usize) {
        self.0.lock().unwrap().1 = room;
    }
}

fn console() -> (Box<Console>, Screen) {
    let screen = Screen::default();
    screen.set_room(usize::MAX);
    (Box::new(Console::new("con0", Box::new(screen.clone()))), screen)
}

/// Does what a driver does to open the console.
fn open_console(guest: &mut Guest) {
    guest.start(2 | features::EVENT_IDX | features::INDIRECT_DESC);
    let room = guest.buffer(&[0; 8 * 4]);
    for i in 0..4 {
        guest.add(2, &[(room + 8 * i, 8, true)]);
    }
    let say = |guest: &mut Guest, port: u8, event: u8, value: u8| {
        let at = guest.buffer(&[port, 0, 0, 0, event, 0, value, 0]);
        guest.add(3, &[(at, 8, false)]);
        guest.kick(3);
        assert_eq!(guest.used(3).len(), 1);
    };
    say(guest, 0, 0, 1);
    assert_eq!(guest.used(2), [(0, 8)]);
    assert_eq!(guest.bytes(room, 8), [0, 0, 0, 0, 1, 0, 1, 0], "port 0 is added");
    say(guest, 0, 3, 1);
    assert_eq!(guest.used(2), [(1, 8), (2, 8)]);
    assert_eq!(guest.bytes(room + 8, 8), [0, 0, 0, 0, 4, 0, 1, 0], "it is a console");
    assert_eq!(guest.bytes(room + 16, 8), [0, 0, 0, 0, 6, 0, 1, 0], "and open");
    say(guest, 7, 6, 1);
    say(guest, 0, 6, 1);
}

#[test]
fn a_console_speaks_and_listens() {
    let (device, screen) = console();
    let mut guest = Guest::new(device);
    assert_eq!(guest.read::<12>(0x2000), [0, 0, 0, 0, 31, 0, 0, 0, 0, 0, 0, 0]);
    let line = ConsoleLine::new(guest.function.clone()).unwrap();
    let rooms = Arc::new(AtomicUsize::new(0));
    let counter = rooms.clone();
    line.on_room(Box::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    assert_eq!(line.receive(b"lost"), 0, "nobody has opened it");
    open_console(&mut guest);
    let at = guest.buffer(b"hello, world");
    guest.add(1, &[(at, 5, false), (at + 5, 7, false)]);
    guest.add_indirect(1, &[(at, 5, false)]);
    guest.kick(1);
    assert_eq!(screen.shown(), b"hello, worldhello");
    assert_eq!(guest.used(1).len(), 2);

    assert!(!line.wants_input());
    let input = guest.buffer(&[0; 16]);
    guest.add(0, &[(input, 4, true)]);
    guest.add(0, &[(input + 4, 12, true)]);
    guest.kick(0);
    assert!(line.wants_input());
    assert_eq!(rooms.load(Ordering::Relaxed), 1);
    assert_eq!(line.receive(b"typed"), 5);
    assert_eq!(guest.used(0), [(0, 4), (1, 1)]);
    assert_eq!(guest.bytes(input, 5), b"typed");
    assert_eq!(line.receive(b"too much"), 0);
    guest.add(0, &[(input, 4, true)]);
    guest.kick(0);
    assert_eq!(rooms.load(Ordering::Relaxed), 2, "the driver rings when it has room again");
    guest.write8(0x2008, b'!');
    assert_eq!(screen.shown(), b"!");
}

#[test]
fn output_that_is_held_up_goes_on_even_on_another_host() {
    let (device, screen) = console();
    let mut source = Guest::new(device);
    open_console(&mut source);
    let line = ConsoleLine::new(source.function.clone()).unwrap();
    let text: Vec<u8> = (0..10_000_u32).map(|i| (i % 251) as u8).collect();
    let at = source.buffer(&text);
    source.add(1, &[(at, 3000, false), (at + 3000, 7000, false)]);
    source.add(1, &[(at, 10, false)]);
    screen.set_room(3500);
    source.kick(1);
    assert_eq!(screen.shown(), text[..3500]);
    assert!(line.has_pending_output());
    assert_eq!(source.used(1), []);
    screen.set_room(100);
    line.flush_output();
    assert_eq!(screen.shown(), text[3500..3600]);
    source.function.lock().unwrap().pause();
    screen.set_room(100);
    line.flush_output();
    assert!(screen.shown().is_empty(), "paused");
    let body = source.save();
    // Port 0: open on both sides, one request popped, in its second buffer, at 600.
    let part = 276 + 32 + 1 + 2 + 8 + 4 + 12 + 4 + 64 * 16;
    let head = [0, 0, 0, 0, 0, 0, 0, 31, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1];
    assert_eq!(body[part..part + 22], head);
    assert_eq!(body[part + 22..part + 38], [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 88]);

    let (device, screen) = console();
    let destination = Guest::cold(device, Generation::Transitional, source.ram.clone());
    destination.load(&body).unwrap();
    assert_eq!(destination.save(), body);
    let mut guest = destination.driven_like(&source);
    guest.function.lock().unwrap().open().unwrap();
    go_on(&guest.function);
    guest.serve();
    assert_eq!(screen.shown(), [&text[3600..], &text[..10]].concat());
    assert_eq!(guest.used(1).len(), 2);

    for (offset, value, needle) in [
        (7, 255, "ports_map"),
        (11, 3, "ports_map"),
        (15, 2, "nr_active_ports"),
        (19, 1, "port[0].id"),
        (37, 0xff, "iov_offset"),
        (38 + 1, 4, "element.index"),
    ] {
        let mut bad = body.clone();
        bad[part + offset] = value;
        if needle == "iov_offset" {
            bad[part + 30] = 1;
        }
        let (device, _) = console();
        let fresh = Guest::cold(device, Generation::Transitional, source.ram.clone());
        let error = fresh.load(&bad).unwrap_err().to_string();
        assert!(error.contains(needle), "{needle}: {error}");
    }
}

#[test]
fn a_flood_of_output_is_written_in_turns() {
    let (device, screen) = console();
    let mut guest = Guest::new(device);
    open_console(&mut guest);
    let len = 2 * TURN.bytes + 100;
    let at = guest.buffer(&vec![b'x'; len]);
    guest.add(1, &[(at, u32::try_from(len).unwrap(), false)]);
    guest.kick(1);
    for (shown, done) in [(TURN.bytes, 0), (TURN.bytes, 0), (100, 1), (0, 0)] {
        assert_eq!((screen.shown().len(), guest.used(1).len()), (shown, done));
        guest.serve();
    }
    for _ in 0..TURN.requests + 10 {
        guest.add(1, &[(at, 1, false)]);
    }
    guest.kick(1);
    for done in [TURN.requests, 10, 0] {
        assert_eq!((screen.shown().len(), guest.used(1).len()), (done, done));
        guest.serve();
    }
}

#[test]
fn input_passes_over_requests_without_room_in_turns() {
    let (device, _) = console();
    let mut guest = Guest::new(device);
    open_console(&mut guest);
    let line = ConsoleLine::new(guest.function.clone()).unwrap();
    let rooms = Arc::new(AtomicUsize::new(0));
    let counter = rooms.clone();
    line.on_room(Box::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    let at = guest.buffer(&[0; 4]);
    for _ in 0..TURN.requests {
        guest.add(0, &[(at, 4, false)]);
    }
    guest.add(0, &[(at, 4, true)]);
    assert_eq!(line.receive(b"ab"), 0, "a request to read from takes nothing");
    assert_eq!((guest.used(0).len(), rooms.load(Ordering::Relaxed)), (TURN.requests, 1));
    assert_eq!(line.receive(b"ab"), 2);
    assert_eq!(guest.bytes(at, 2), b"ab");
}

/// Discards by writing zeros.
struct Zeroing(GuestRamRef, Discarded);

impl PageDiscard for Zeroing {
    fn discard(&self, address: u64, len: u64) -> io::Result<()> {
        self.1.lock().unwrap().push((address, len));
        let zeros = vec![0; usize::try_from(len).unwrap()];
        self.0.write_slice(&zeros, GuestAddress(address)).map_err(io::Error::other)
    }
}

/// Ranges that were discarded.
type Discarded = Arc<Mutex<Vec<(u64, u64)>>>;

fn balloon(ram: GuestRamRef) -> (Box<Balloon>, Discarded) {
    let log = Discarded::default();
    (Box::new(Balloon::new("balloon0", Box::new(Zeroing(ram, log.clone())))), log)
}

#[test]
fn ballooned_pages_are_given_back() {
    let memory = ram();
    let (device, log) = balloon(memory.clone());
    let mut guest = Guest::with(device, Generation::Transitional, memory);
    guest.start(2 | features::EVENT_IDX);
    let pages: [u32; 6] = [0x500, 0x501, 0x502, 0x600, 0x7fff_ffff, u32::MAX];
    let at = guest.buffer(&pages.map(u32::to_le_bytes).concat());
    guest.ram.write_slice(&[7; 4096], GuestAddress(0x50_1000)).unwrap();
    guest.add(0, &[(at, 24, false)]);
    guest.clean();
    guest.kick(0);
    assert_eq!(guest.used(0), [(0, 0)]);
    assert_eq!(*log.lock().unwrap(), [(0x50_0000, 0x3000), (0x60_0000, 0x1000)]);
    assert_eq!(guest.bytes(0x50_1000, 1), [0]);
    for page in [0x50_0000, 0x50_1000, 0x50_2000, 0x60_0000] {
        assert!(guest.dirty().contains(&page), "{page:#x}");
    }
    assert!(!guest.dirty().contains(&0x50_3000));
    guest.add(1, &[(at, 24, false)]);
    guest.kick(1);
    assert_eq!(guest.used(1), [(0, 0)]);
    // A buffer that is no whole number of pages, and one behind the memory.
    guest.add(0, &[(at, 7, false)]);
    guest.kick(0);
    assert_eq!(guest.used(0).len(), 1);
    guest.add(0, &[(PIECE, 4, false)]);
    guest.kick(0);
    assert!(guest.function.lock().unwrap().core.is_broken());
}

#[test]
fn a_run_of_pages_that_reaches_into_the_hole_is_given_back_up_to_it() {
    let memory = ram();
    let (device, log) = balloon(memory.clone());
    let mut guest = Guest::with(device, Generation::Transitional, memory);
    guest.start(2);
    let (end, high) = ((PIECE >> 12) as u32, (HIGH >> 12) as u32);
    // Over the end of the low piece, over the beginning of the high one, and all in the hole.
    let runs = [end - 2..end + 2, high - 1..high + 2, 0x8_0000..0x8_0003];
    let pages: Vec<u8> = runs.into_iter().flatten().flat_map(u32::to_le_bytes).collect();
    let at = guest.buffer(&pages);
    guest.add(0, &[(at, u32::try_from(pages.len()).unwrap(), false)]);
    guest.clean();
    guest.kick(0);
    assert_eq!(guest.used(0), [(0, 0)]);
    assert_eq!(*log.lock().unwrap(), [(PIECE - 0x2000, 0x2000), (HIGH, 0x2000)]);
    for page in [PIECE - 0x2000, PIECE - 0x1000, HIGH, HIGH + 0x1000] {
        assert!(guest.dirty().contains(&page), "{page:#x}");
    }
    assert!(!guest.dirty().contains(&(HIGH + 0x2000)));
}

#[test]
fn a_guest_is_asked_for_memory_and_says_what_it_gives() {
    let memory = ram();
    let (device, _) = balloon(memory.clone());
    let mut guest = Guest::with(device, Generation::Transitional, memory);
    let control = BalloonControl::new(guest.function.clone()).unwrap();
    let said = Arc::new(Mutex::new(Vec::new()));
    let told = said.clone();
    control.on_change(Box::new(move |pages| told.lock().unwrap().push(pages)));
    control.set_target(5);
    assert_eq!(guest.read::<1>(0x1000), [0], "there is no driver to interrupt");
    guest.start(2);
    guest.function.lock().unwrap().pause();
    control.set_target(0x300);
    assert_eq!(guest.read::<4>(0x2000), [0, 3, 0, 0]);
    assert_eq!(guest.read::<1>(0x1000), [3], "a guest that stands still is told, too");
    for actual in [1_u32, 1, 0x300] {
        guest.write32(0x2004, actual);
    }
    assert_eq!((control.actual(), said.lock().unwrap().as_slice()), (0x300, &[1, 0x300][..]));
    let (other, _) = console();
    assert!(BalloonControl::new(Guest::new(other).function.clone()).is_none());
}

#[test]
fn a_flood_of_pages_is_given_back_in_turns_and_a_request_has_its_most() {
    let memory = ram();
    let (device, log) = balloon(memory.clone());
    let mut guest = Guest::with(device, Generation::Transitional, memory);
    guest.start(2);
    let given = || log.lock().unwrap().drain(..).fold(0, |sum, (_, len)| sum + len) >> 12;
    let most = u32::try_from(balloon_file::MAX_PAGES).unwrap();
    let numbers: Vec<u8> = (0..most + 5).flat_map(|n| (0x500 + n % 0x100).to_le_bytes()).collect();
    let at = guest.buffer(&numbers);
    guest.add(0, &[(at, 4 * (most + 5), false)]);
    guest.kick(0);
    assert_eq!((guest.used(0).len(), given()), (1, u64::from(most)));
    for _ in 0..balloon_file::TURN + 3 {
        guest.add(0, &[(at, 4, false)]);
    }
    guest.kick(0);
    for done in [balloon_file::TURN, 3, 0] {
        assert_eq!((guest.used(0).len(), given()), (done, done as u64));
        guest.serve();
    }
    // Of the statistics one is always kept.
    for _ in 0..balloon_file::TURN + 3 {
        guest.add(2, &[(at, 10, false)]);
    }
    guest.kick(2);
    for done in [balloon_file::TURN - 1, 3, 0] {
        assert_eq!(guest.used(2).len(), done);
        guest.serve();
    }
}

#[test]
fn a_balloon_moves_with_the_request_it_holds() {
    let memory = ram();
    let (device, _) = balloon(memory.clone());
    let mut source = Guest::with(device, Generation::Transitional, memory.clone());
    source.start(2 | 1 << 4);
    let at = source.buffer(&[6, 0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1]);
    source.add(2, &[(at, 21, false)]);
    source.kick(2);
    assert_eq!(source.used(2), [], "the device keeps it");
    {
        let mut function = source.function.lock().unwrap();
        let balloon: &mut Balloon = function.device().as_any().downcast_mut().unwrap();
        balloon.set_target(0x1122);
        assert_eq!(balloon.stats(), [(6, 0x0807_0605_0403_0201), (4, 9)]);
    }
    source.io.mmio_write(crate::virtio::testing::MODERN_BASE + 0x2004, &[0x33, 0x44, 0, 0]);
    source.io.mmio_write(crate::virtio::testing::MODERN_BASE + 0x200c, &[0xaa, 0xbb, 0xcc, 0]);
    source.function.lock().unwrap().pause();
    let body = source.save();
    let part = 276 + 8 + 4 + 16 + 4 + 3 * 14;
    assert_eq!(body[part..part + 8], [0, 0, 0x11, 0x22, 0, 0, 0x44, 0x33]);
    let idx = 276 + 8 + 4 + 16 + 4 + 2 * 14 + 12;
    assert_eq!(body[idx..idx + 2], [0, 1]);

    let (device, _) = balloon(memory.clone());
    let destination = Guest::cold(device, Generation::Transitional, memory);
    destination.load(&body).unwrap();
    // A QEMU takes a request again that counts as taken, and none that does not: its driver does not
    // ring again.
    assert_eq!(destination.save(), body, "it counts as taken before the guest has run");
    let mut guest = destination.driven_like(&source);
    guest.function.lock().unwrap().open().unwrap();
    go_on(&guest.function);
    guest.serve();
    guest.function.lock().unwrap().pause();
    assert_eq!(guest.save(), body, "the request is held again");
    go_on(&guest.function);
    let expected = [0x22, 0x11, 0, 0, 0x33, 0x44, 0, 0, 0, 0, 0, 0, 0xaa, 0xbb, 0xcc, 0];
    assert_eq!(guest.read::<16>(0x2000), expected);
    let mut function = guest.function.lock().unwrap();
    function.device().as_any().downcast_mut::<Balloon>().unwrap().poll_stats();
    drop(function);
    assert_eq!(guest.used(2), [(0, 0)]);
}
