//! Frames, filters and state of a network device.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::Device;
use crate::virtio::net::{HEADER, Offloads, Sent};
use crate::virtio::testing::{Guest, go_on, until};
use crate::virtio::{
    Generation, Net, NetBackend, NetOptions, StreamAddress, StreamSocket, features, rarp_frame,
    status,
};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const MRG: u64 = 1 << 15;
const CTRL: u64 = 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23 | 1 << 2;
const RX: usize = 0;
const TX: usize = 1;

/// A backend in memory, shared with the test.
#[derive(Clone)]
struct Wire(Arc<Mutex<Ends>>);

struct Ends {
    vnet: bool,
    incoming: VecDeque<Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
    blocked: bool,
    offloads: Offloads,
    fd: EventFd,
}

impl Wire {
    fn new(vnet: bool) -> Self {
        Self(Arc::new(Mutex::new(Ends {
            vnet,
            incoming: VecDeque::new(),
            outgoing: Vec::new(),
            blocked: false,
            offloads: Offloads::default(),
            fd: EventFd::new(EFD_NONBLOCK).unwrap(),
        })))
    }

    fn put(&self, header: u8, frame: &[u8]) {
        let frame = [[header; HEADER].as_slice(), frame].concat();
        self.0.lock().unwrap().incoming.push_back(frame);
    }

    fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.0.lock().unwrap().outgoing)
    }
}

impl NetBackend for Wire {
    fn name(&self) -> String {
        "wire".into()
    }
    fn has_vnet_header(&self) -> bool {
        self.0.lock().unwrap().vnet
    }
    fn open(&mut self) -> io::Result<RawFd> {
        Ok(self.0.lock().unwrap().fd.as_raw_fd())
    }
    fn close(&mut self) {}
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.0.lock().unwrap().offloads = offloads;
        Ok(())
    }
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(frame) = self.0.lock().unwrap().incoming.pop_front() else { return Ok(None) };
        buffer[..frame.len()].copy_from_slice(&frame);
        Ok(Some(frame.len()))
    }
    fn flush(&mut self) {}
    fn send(&mut self, frame: &[u8]) -> io::Result<Sent> {
        let mut ends = self.0.lock().unwrap();
        if ends.blocked {
            return Ok(Sent::Blocked);
        }
        ends.outgoing.push(frame.to_vec());
        Ok(Sent::Done)
    }
}

fn net(backend: impl NetBackend + 'static) -> Box<Net> {
    let options = NetOptions { id: "net0".into(), mac: MAC, backend: Box::new(backend) };
    Box::new(Net::new(options).unwrap())
}

fn event(guest: &Guest) {
    guest.function.lock().unwrap().device().event();
    guest.serve();
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|i| seed.wrapping_add((i % 199) as u8)).collect();
    frame[..6].copy_from_slice(&MAC);
    frame
}

#[test]
fn drivers_are_offered_what_qemu_offers() {
    for (vnet, offered) in [(true, 0x101_79bf_ffe7), (false, 0x101_79bf_8064)] {
        let guest = Guest::new(net(Wire::new(vnet)));
        assert_eq!(guest.function.lock().unwrap().offered, offered);
        assert_eq!(guest.offered(), offered & !0x4900_0040);
        assert_eq!(guest.config_read(0x98) >> 16, 3);
        guest.config_write(0x10, u32::MAX);
        assert_eq!(guest.config_read(0x10), 0xffff_ffe1);
    }
}

#[test]
fn frames_come_in_one_buffer_or_in_several() {
    let wire = Wire::new(true);
    let mut guest = Guest::new(net(wire.clone()));
    guest.start(MRG | features::EVENT_IDX | features::INDIRECT_DESC);
    let buffers: Vec<u64> = (0..8).map(|_| guest.buffer(&[0xee; 256])).collect();
    for at in &buffers[..3] {
        guest.add(RX, &[(*at, 256, true)]);
    }
    let (small, large) = (frame(60, 1), frame(400, 7));
    wire.put(0x11, &small);
    wire.put(0x22, &large);
    wire.put(0x33, &small);
    guest.clean();
    event(&guest);
    assert_eq!(guest.used(RX), [(0, 72), (1, 256), (2, 156)]);
    let mut expected = vec![0x11; 10];
    expected.extend([1, 0]);
    expected.extend(&small);
    assert_eq!(guest.bytes(buffers[0], 72), expected);
    let mut expected = vec![0x22; 10];
    expected.extend([2, 0]);
    expected.extend(&large);
    let mut found = guest.bytes(buffers[1], 256);
    found.extend(guest.bytes(buffers[2], 156));
    assert_eq!(found, expected);
    assert_eq!(guest.msi.take(), [1], "one interrupt for all");
    let ring = Guest::ring(RX) + 0x2000;
    assert_eq!(guest.dirty(), [buffers[0] & !0xfff, ring].into_iter().collect());
    // The third frame waits for buffers; half of what a large one needs is not enough.
    wire.put(0x44, &large);
    guest.want_interrupt(RX, 0);
    guest.add(RX, &[(buffers[3], 256, true)]);
    guest.kick(RX);
    assert_eq!(guest.used(RX), [(3, 72)]);
    assert_eq!(guest.msi.take(), [1], "for a frame that had waited, too");
    guest.add(RX, &[(buffers[4], 256, true)]);
    guest.kick(RX);
    assert_eq!(guest.used(RX), []);
    guest.add_indirect(RX, &[(buffers[5], 100, true), (buffers[6], 256, true)]);
    guest.kick(RX);
    assert_eq!(guest.used(RX), [(4, 256), (5, 156)]);
}

#[test]
fn without_mergeable_buffers_a_frame_needs_one() {
    let wire = Wire::new(false);
    let mut guest = Guest::new(net(wire.clone()));
    guest.start(0);
    let (small, large) = (guest.buffer(&[0; 64]), guest.buffer(&[0; 2048]));
    guest.add(RX, &[(small, 64, true)]);
    wire.put(0, &frame(400, 1));
    wire.put(0, &frame(52, 2));
    event(&guest);
    assert_eq!(guest.used(RX), [(0, 64)], "the large frame is lost, the small one fits");
    guest.add(RX, &[(large, 2048, true)]);
    wire.put(0, &frame(1514, 3));
    event(&guest);
    assert_eq!(guest.used(RX), [(1, 1526)]);
    // A buffer that cannot take the header.
    guest.add(RX, &[(small, 8, true)]);
    wire.put(0, &frame(60, 3));
    event(&guest);
    assert_ne!(guest.status() & status::NEEDS_RESET, 0);
}

#[test]
fn frames_go_out_with_their_header() {
    let wire = Wire::new(true);
    let mut guest = Guest::new(net(wire.clone()));
    guest.start(MRG | features::INDIRECT_DESC);
    let header = guest.buffer(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    let payload = frame(1000, 3);
    let (first, second) = (guest.buffer(&payload[..300]), guest.buffer(&payload[300..]));
    let pieces = [(header, 12, false), (first, 300, false), (second, 700, false)];
    guest.add(TX, &pieces);
    guest.add_indirect(TX, &pieces);
    guest.kick(TX);
    let expected = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0].as_slice(), &payload].concat();
    assert_eq!(wire.sent(), [expected.clone(), expected.clone()]);
    assert_eq!(guest.used(TX), [(0, 0), (3, 0)]);
    // A backend without room holds them up; a short header and an endless frame are lost.
    wire.0.lock().unwrap().blocked = true;
    guest.add(TX, &pieces);
    guest.kick(TX);
    assert_eq!((guest.used(TX), wire.sent()), (vec![], vec![]));
    wire.0.lock().unwrap().blocked = false;
    event(&guest);
    assert_eq!((guest.used(TX).len(), wire.sent()), (1, vec![expected]));
    guest.add(TX, &[(header, 6, false)]);
    guest.add(TX, &[(header, 12, false), (0, 4 << 20, false)]);
    guest.kick(TX);
    assert_eq!((guest.used(TX).len(), wire.sent()), (2, vec![]));
}

#[test]
fn legacy_drivers_have_a_short_header() {
    let wire = Wire::new(true);
    let mut guest = Guest::new(net(wire.clone()));
    guest.start(0);
    guest.function.lock().unwrap().set_features(0);
    let at = guest.buffer(&[0; 256]);
    guest.add(RX, &[(at, 256, true)]);
    wire.put(5, &frame(60, 9));
    event(&guest);
    assert_eq!(guest.used(RX), [(0, 70)]);
    assert_eq!(guest.bytes(at + 10, 60), frame(60, 9));
    guest.add(TX, &[(at, 70, false)]);
    guest.kick(TX);
    assert_eq!(wire.sent()[0][HEADER..], frame(60, 9));
}

/// One command of the control queue; returns its answer.
fn control(guest: &mut Guest, class: u8, command: u8, data: &[u8]) -> u8 {
    let (head, data_at) = (guest.buffer(&[class, command]), guest.buffer(data));
    let answer = guest.buffer(&[0xee]);
    let len = u32::try_from(data.len()).unwrap();
    let mut pieces = vec![(head, 2, false)];
    if len > 0 {
        pieces.push((data_at, len, false));
    }
    pieces.push((answer, 1, true));
    guest.add(2, &pieces);
    guest.kick(2);
    assert_eq!(guest.used(2).len(), 1);
    guest.bytes(answer, 1)[0]
}

#[test]
fn the_driver_chooses_what_it_hears() {
    let wire = Wire::new(true);
    let mut guest = Guest::new(net(wire.clone()));
    guest.start(CTRL | MRG);
    let heard = |guest: &mut Guest, to: [u8; 6], vlan: Option<u16>| {
        let at = guest.buffer(&[0; 128]);
        guest.add(RX, &[(at, 128, true)]);
        let mut frame = vec![0; 60];
        frame[..6].copy_from_slice(&to);
        if let Some(vlan) = vlan {
            frame[12..14].copy_from_slice(&[0x81, 0]);
            frame[14..16].copy_from_slice(&vlan.to_be_bytes());
        }
        wire.put(0, &frame);
        event(guest);
        !guest.used(RX).is_empty()
    };
    let (other, group, all) = ([2, 0, 0, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1], [0xff; 6]);
    assert!(heard(&mut guest, other, None), "promiscuous until it says otherwise");
    assert_eq!(control(&mut guest, 0, 0, &[0]), 0);
    assert!(!heard(&mut guest, other, None) && !heard(&mut guest, group, None));
    assert!(heard(&mut guest, MAC, None) && heard(&mut guest, all, None));
    assert_eq!(control(&mut guest, 0, 1, &[1]), 0);
    assert!(heard(&mut guest, group, None));
    assert_eq!(control(&mut guest, 0, 3, &[1]), 0);
    assert!(!heard(&mut guest, group, None));
    control(&mut guest, 0, 3, &[0]);
    control(&mut guest, 0, 1, &[0]);
    assert_eq!(control(&mut guest, 0, 5, &[1]), 0);
    assert!(!heard(&mut guest, all, None));
    assert_eq!(control(&mut guest, 0, 2, &[1]), 0);
    assert!(heard(&mut guest, other, None));
    assert_eq!(control(&mut guest, 0, 4, &[1]), 0);
    assert!(!heard(&mut guest, MAC, None));
    control(&mut guest, 0, 2, &[0]);
    control(&mut guest, 0, 4, &[0]);
    // A table: one address, one group.
    let table = [&[1, 0, 0, 0], other.as_slice(), &[1, 0, 0, 0], &group].concat();
    assert_eq!(control(&mut guest, 1, 0, &table), 0);
    assert!(heard(&mut guest, other, None) && heard(&mut guest, group, None));
    assert!(!heard(&mut guest, [2, 0, 0, 0, 0, 9], None));
    // More than fit: everything of that kind.
    let many = [&65_u32.to_le_bytes(), [2; 65 * 6].as_slice(), &[0; 4]].concat();
    assert_eq!(control(&mut guest, 1, 0, &many), 0);
    assert!(heard(&mut guest, other, None) && !heard(&mut guest, group, None));
    assert_eq!(control(&mut guest, 1, 0, &[0; 8]), 0);
    // A table that promises more than it has.
    assert_eq!(control(&mut guest, 1, 0, &[0xff, 0xff, 0xff, 0xff, 1, 2]), 1);
    // VLANs: none, then one.
    assert!(!heard(&mut guest, MAC, Some(77)));
    assert_eq!(control(&mut guest, 2, 0, &[77, 0]), 0);
    assert!(heard(&mut guest, MAC, Some(0xe04d)), "priority bits do not count");
    assert_eq!(control(&mut guest, 2, 1, &[77, 0]), 0);
    assert!(!heard(&mut guest, MAC, Some(77)));
    assert_eq!(control(&mut guest, 2, 0, &[0, 0x10]), 1, "there is no VLAN 4096");
    // Another address.
    assert_eq!(control(&mut guest, 1, 1, &other), 0);
    assert!(heard(&mut guest, other, None) && !heard(&mut guest, MAC, None));
    assert_eq!(guest.read::<6>(0x2000), other);
    for (class, command, data) in [
        (9, 0, [0].as_slice()),
        (0, 9, &[1]),
        (0, 0, &[]),
        (1, 1, &[1]),
        (3, 0, &[]),
        (4, 0, &[1, 0]),
    ] {
        assert_eq!(control(&mut guest, class, command, data), 1, "{class}.{command}");
    }
}

#[test]
fn the_backend_hears_what_the_guest_can_take() {
    let wire = Wire::new(true);
    let mut guest = Guest::new(net(wire.clone()));
    guest.start(CTRL | 1 << 1 | 1 << 7 | 1 << 10);
    let offloads = || wire.0.lock().unwrap().offloads;
    let all = Offloads { csum: true, tso4: true, ufo: true, ..Offloads::default() };
    assert_eq!(offloads(), all);
    assert_eq!(control(&mut guest, 5, 0, &2_u64.to_le_bytes()), 0);
    assert_eq!(offloads(), Offloads { csum: true, ..Offloads::default() });
    assert_eq!(control(&mut guest, 5, 0, &(1_u64 << 8).to_le_bytes()), 1, "not negotiated");
    guest.write8(0x14, 0);
    assert_eq!(offloads(), Offloads::default());
}

#[test]
fn it_announces_itself_on_the_wire_and_to_the_driver() {
    let wire = Wire::new(false);
    let mut guest = Guest::new(net(wire.clone()));
    guest.start(CTRL);
    guest.function.lock().unwrap().device().announce();
    let sent = wire.sent();
    assert_eq!(sent[0][HEADER..], rarp_frame(MAC));
    assert_eq!(rarp_frame(MAC)[..6], [0xff; 6]);
    assert_eq!(
        rarp_frame(MAC)[6..22],
        [MAC.as_slice(), &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]].concat()
    );
    assert_eq!(rarp_frame(MAC)[22..42], [MAC.as_slice(), &[0; 4], &MAC, &[0; 4]].concat());
    assert_eq!(guest.read::<2>(0x2006), [3, 0]);
    assert_eq!(guest.msi.take(), [0]);
    assert_eq!(control(&mut guest, 3, 0, &[]), 0);
    assert_eq!(guest.read::<2>(0x2006), [1, 0]);
    assert_eq!(control(&mut guest, 3, 0, &[]), 1);
}

#[test]
fn nothing_moves_while_paused() {
    let wire = Wire::new(false);
    let mut guest = Guest::new(net(wire.clone()));
    guest.start(MRG | features::EVENT_IDX);
    let at = guest.buffer(&[0; 2048]);
    guest.add(RX, &[(at, 1024, true)]);
    guest.add(TX, &[(at + 1024, 100, false)]);
    guest.function.lock().unwrap().pause();
    guest.clean();
    wire.put(0, &frame(60, 1));
    event(&guest);
    guest.kick(RX);
    guest.kick(TX);
    assert!(guest.dirty().is_empty() && wire.sent().is_empty());
    go_on(&guest.function);
    guest.serve();
    assert_eq!((guest.used(RX).len(), guest.used(TX).len()), (1, 1));
    assert_eq!(wire.sent().len(), 1);
}

#[test]
fn every_field_moves() {
    let wire = Wire::new(true);
    let mut source = Guest::new(net(wire.clone()));
    source.start(CTRL | MRG | 1 << 1 | 1 << 7 | features::EVENT_IDX);
    control(&mut source, 0, 0, &[0]);
    control(&mut source, 0, 1, &[1]);
    control(&mut source, 0, 4, &[1]);
    control(&mut source, 1, 1, &[2, 3, 4, 5, 6, 7]);
    let table = [&[1, 0, 0, 0], [2, 9, 9, 9, 9, 9].as_slice(), &65_u32.to_le_bytes(), &[3; 390]];
    control(&mut source, 1, 0, &table.concat());
    control(&mut source, 2, 0, &[5, 1]);
    control(&mut source, 5, 0, &2_u64.to_le_bytes());
    source.function.lock().unwrap().device().announce();
    let at = source.buffer(&[0; 256]);
    source.add(RX, &[(at, 256, true)]);
    source.function.lock().unwrap().pause();
    let body = source.save();

    let second = Wire::new(true);
    let destination =
        Guest::cold(net(second.clone()), Generation::Transitional, source.ram.clone());
    destination.load(&body).unwrap();
    assert_eq!(destination.save(), body);
    assert_eq!(destination.read::<8>(0x2000), [2, 3, 4, 5, 6, 7, 3, 0]);
    let mut guest = destination.driven_like(&source);
    guest.function.lock().unwrap().open().unwrap();
    let csum = Offloads { csum: true, ..Offloads::default() };
    assert_eq!(second.0.lock().unwrap().offloads, csum, "as soon as the tap is open");
    // Whatever the source has still said or not, the driver hears of the first frame here.
    guest.want_interrupt(RX, 7);
    second.put(0, &[&[3; 6], [7; 54].as_slice()].concat());
    go_on(&guest.function);
    guest.serve();
    assert_eq!(guest.used(RX), [(0, 72)]);
    assert_eq!(guest.msi.take(), [1]);

    // The mac, one group too many, all multicast; behind PCI block, MSI-X and registers.
    let part = 276 + 64 + 1 + 2 + 8 + 4 + 8 + 4 + 3 * 16;
    assert_eq!(body[part..part + 6], [2, 3, 4, 5, 6, 7]);
    let offloads = part + 6 + 4 + 4 + 2 + 2 + 4 + 6 + 512 + 4 + 7;
    assert_eq!(body[offloads..offloads + 8], 2_u64.to_be_bytes());
    for (at, bytes, needle) in [
        (part + 18, [0xff; 4].as_slice(), "net.mac_table.in_use"),
        (offloads, &[0; 7], "net.curr_guest_offloads"),
    ] {
        let mut bad = body.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        if needle.ends_with("offloads") {
            bad[at + 6] = 1;
        }
        let fresh = Guest::cold(net(Wire::new(true)), Generation::Transitional, source.ram.clone());
        let error = fresh.load(&bad).unwrap_err().to_string();
        assert!(error.contains(needle), "{error}");
    }
    let plain = Guest::cold(net(Wire::new(false)), Generation::Transitional, source.ram.clone());
    let error = plain.load(&body).unwrap_err().to_string();
    assert!(error.contains("vnet_hdr=on"), "{error}");
}

/// A device connected to a test by a real socket.
fn over_socket() -> (Guest, UnixStream, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("net.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut guest = Guest::new(net(StreamSocket::new(StreamAddress::Unix(path))));
    let (peer, _) = listener.accept().unwrap();
    guest.start(MRG);
    (guest, peer, dir)
}

#[test]
fn frames_travel_over_a_socket_behind_their_length() {
    let (mut guest, mut peer, _dir) = over_socket();
    let at = guest.buffer(&[0; 4096]);
    for i in 0..2 {
        guest.add(RX, &[(at + i * 2048, 2048, true)]);
    }
    let bytes = |frame: &[u8]| {
        [u32::try_from(frame.len()).unwrap().to_be_bytes().as_slice(), frame].concat()
    };
    // One frame and a half, then the other half.
    let both = [bytes(&frame(100, 1)), bytes(&frame(200, 2))].concat();
    peer.write_all(&both[..150]).unwrap();
    until("the first frame comes", || {
        event(&guest);
        !guest.used(RX).is_empty()
    });
    peer.write_all(&both[150..]).unwrap();
    until("the second frame comes", || {
        event(&guest);
        !guest.used(RX).is_empty()
    });
    assert_eq!(guest.bytes(at + 12, 100), frame(100, 1));
    assert_eq!(guest.bytes(at + 2048 + 12, 200), frame(200, 2));

    let out = guest.buffer(&[[0; 12].as_slice(), &frame(300, 5)].concat());
    guest.add(TX, &[(out, 312, false)]);
    guest.kick(TX);
    let mut received = vec![0; 304];
    peer.read_exact(&mut received).unwrap();
    assert_eq!(received, bytes(&frame(300, 5)));
}

#[test]
fn a_peer_that_does_not_read_holds_frames_up_and_loses_none() {
    let (mut guest, mut peer, _dir) = over_socket();
    const LEN: u32 = 60_000;
    const FRAMES: u32 = 100;
    let out = guest.buffer(&vec![0; 12 + 60_000]);
    for _ in 0..FRAMES {
        guest.add(TX, &[(out, 12 + LEN, false)]);
    }
    guest.kick(TX);
    let before = guest.used(TX).len();
    assert!(before < usize::try_from(FRAMES).unwrap(), "6 MB fit nowhere");
    guest.function.lock().unwrap().pause();
    let in_flight = guest.function.lock().unwrap().core.queue(TX).unwrap().in_flight();
    assert_eq!(in_flight, 0, "what was not sent is back in the queue");
    go_on(&guest.function);
    let total = usize::try_from(FRAMES * (4 + LEN)).unwrap();
    let reader = std::thread::spawn(move || {
        let mut received = vec![0; total];
        peer.read_exact(&mut received).unwrap();
        received
    });
    let mut done = before;
    until("all are sent", || {
        event(&guest);
        done += guest.used(TX).len();
        done == usize::try_from(FRAMES).unwrap() && {
            // The rest of the last frames leaves when the socket has room.
            reader.is_finished()
        }
    });
    let received = reader.join().unwrap();
    for piece in received.chunks_exact(usize::try_from(4 + LEN).unwrap()) {
        assert_eq!(piece[..4], LEN.to_be_bytes());
    }
}

#[test]
fn a_peer_that_lies_or_leaves_is_cut_off() {
    for lie in [true, false] {
        let (mut guest, mut peer, _dir) = over_socket();
        if lie {
            peer.write_all(&u32::MAX.to_be_bytes()).unwrap();
        } else {
            drop(peer);
        }
        let at = guest.buffer(&[0; 2048]);
        guest.add(RX, &[(at, 2048, true)]);
        event(&guest);
        assert_eq!(guest.used(RX), []);
        guest.add(TX, &[(at, 200, false)]);
        guest.kick(TX);
        assert_eq!(guest.used(TX).len(), 1, "the guest goes on, its frames are lost");
    }
}
