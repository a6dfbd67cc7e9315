//! Guest memory by block and offset, and through sockets.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use migration::transport::lender::Lender;
use migration::transport::{Connection, is_stall};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::*;

fn timeout() -> io::Result<()> {
    Err(io::ErrorKind::WouldBlock.into())
}

fn ram() -> Ram {
    Ram::new(4 << 20, 40).unwrap()
}

/// Private memory, and such as can be given to another process.
fn both() -> [Ram; 2] {
    [ram(), Ram::new_shared(4 << 20, 40).unwrap()]
}

#[test]
fn pages_go_out_and_come_in_between_headers() {
    let ram = ram();
    ram.copy_in(0, 0x3000, &[7; 8192]).unwrap();
    let (a, mut b) = UnixStream::pair().unwrap();
    let parts = [
        IoPart::Bytes(b"head"),
        IoPart::Ram { block: 0, offset: 0x3ffe, len: 4 },
        IoPart::Bytes(b""),
        IoPart::Bytes(b"tail"),
    ];
    ram.write_parts(a.as_fd(), &parts, &mut timeout).unwrap();
    let mut got = [0; 12];
    b.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"head\x07\x07\x07\x07tail");

    b.write_all(b"xyPAGE").unwrap();
    let mut head = [0; 2];
    let n = ram
        .read_parts(
            a.as_fd(),
            &mut [
                ReadPart::Bytes(&mut head),
                ReadPart::Ram { block: 0, offset: 0x10_0000, len: 4096 },
            ],
        )
        .unwrap();
    let mut page = [0; 5];
    ram.copy_out(0, 0x10_0000, &mut page).unwrap();
    assert_eq!((n, &head, &page), (6, b"xy", b"PAGE\0"));
    a.shutdown(std::net::Shutdown::Both).unwrap();
}

#[test]
fn zeroes_go_where_something_was_and_allocate_nothing_else() {
    both().iter().for_each(zeroes_allocate_nothing);
}

fn zeroes_allocate_nothing(ram: &Ram) {
    let all = |ram: &Ram| ram.absent(0, 0, 4 << 20).expect("the host tells");
    let present = |ram: &Ram| {
        let absent: u32 = all(ram).iter().map(|word| word.count_ones()).sum();
        1024 - absent
    };
    assert_eq!(present(ram), 0);
    ram.fill(0, 0, 4 << 20, 0).unwrap();
    assert_eq!(present(ram), 0, "zero was zero");
    ram.copy_in(0, 0x20_1000, &[7; 4096]).unwrap();
    // One page, or a huge one.
    let touched = present(ram);
    assert!((1..=512).contains(&touched), "{touched}");
    assert!(!has(&all(ram), 0x201));
    ram.fill(0, 0, 4 << 20, 0).unwrap();
    assert!(ram.is_zero(0, 0x20_1000));
    assert_eq!(present(ram), touched);
    ram.fill(0, 0x1ffe, 4, 9).unwrap();
    let mut bytes = [1; 6];
    ram.copy_out(0, 0x1ffd, &mut bytes).unwrap();
    assert_eq!(bytes, [0, 9, 9, 9, 9, 0]);
    assert!(!has(&all(ram), 1) && ram.fill(0, 4 << 20, 1, 0).is_err());
}

#[test]
fn more_parts_than_one_call_takes_all_arrive() {
    let ram = ram();
    for page in 0..700u64 {
        ram.copy_in(0, page * 4096, &[page as u8; 4096]).unwrap();
    }
    let (a, mut b) = UnixStream::pair().unwrap();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        b.read_to_end(&mut all).map(|_| all)
    });
    let parts: Vec<_> = (0..700)
        .flat_map(|page| {
            [IoPart::Bytes(b"h"), IoPart::Ram { block: 0, offset: page * 4096, len: 4096 }]
        })
        .collect();
    ram.write_parts(a.as_fd(), &parts, &mut timeout).unwrap();
    drop(a);
    let all = reader.join().unwrap().unwrap();
    assert_eq!(all.len(), 700 * 4097);
    for (page, record) in all.chunks(4097).enumerate() {
        assert_eq!(record[0], b'h');
        assert!(record[1..].iter().all(|b| *b == page as u8), "page {page}");
    }
}

/// Two ends of a connection, of either kind.
fn sockets() -> [(OwnedFd, Box<dyn Read + Send>); 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (unix, there) = UnixStream::pair().unwrap();
    [(tcp.into(), Box::new(listener.accept().unwrap().0)), (unix.into(), Box::new(there))]
}

#[test]
fn lent_memory_is_read_when_it_is_received_and_copied_memory_is_not() {
    const LEN: usize = 64 << 10;
    for ram in both() {
        for (here, mut there) in sockets() {
            ram.copy_in(0, 0x10_0000, &[1; LEN]).unwrap();
            let lent = IoPart::Ram { block: 0, offset: 0x10_0000, len: LEN };
            let copied = IoPart::Ram { block: 0, offset: 0x10_0000, len: 4096 };
            let parts = [IoPart::Bytes(b"head"), lent, copied];
            Lender::default().write_parts(&ram, here.as_fd(), &parts, &mut timeout).unwrap();
            ram.copy_in(0, 0x10_0000, &[2; LEN]).unwrap();
            let mut got = vec![0; 4 + LEN + 4096];
            there.read_exact(&mut got).unwrap();
            let (head, rest) = got.split_at(4);
            let (lent, copied) = rest.split_at(LEN);
            assert_eq!(head, b"head");
            assert!(lent.iter().all(|b| *b == 2), "it was copied");
            assert!(copied.iter().all(|b| *b == 1), "it was lent");
        }
    }
}

#[test]
fn lent_memory_is_there_for_whoever_receives_it_when_its_owner_is_gone() {
    for ram in both() {
        ram.copy_in(0, 0, &[5; 64 << 10]).unwrap();
        let (here, mut there) = sockets().into_iter().next().unwrap();
        let part = IoPart::Ram { block: 0, offset: 0, len: 64 << 10 };
        Lender::default().write_parts(&ram, here.as_fd(), &[part], &mut timeout).unwrap();
        drop((ram, here));
        let mut got = Vec::new();
        there.read_to_end(&mut got).unwrap();
        assert!(got.len() == 64 << 10 && got.iter().all(|b| *b == 5));
    }
}

#[test]
fn long_and_short_parts_arrive_in_order() {
    let ram = ram();
    let bytes: Vec<u8> = (0..4 << 20).map(|n: u32| (n / 7) as u8 ^ (n >> 12) as u8).collect();
    ram.copy_in(0, 0, &bytes).unwrap();
    // More than a pipe holds, as much as is lent, a little less, and what begins inside of a page.
    let pieces =
        [(0, 3 << 20), (0x1000, 64 << 10), (0x5000, (64 << 10) - 1), (0x20_0123, 1 << 20), (7, 9)];
    let mut parts = vec![IoPart::Bytes(b"first")];
    let mut expected = b"first".to_vec();
    for (offset, len) in pieces {
        parts.push(IoPart::Ram { block: 0, offset: offset as u64, len });
        parts.push(IoPart::Bytes(b"head"));
        expected.extend_from_slice(&bytes[offset..offset + len]);
        expected.extend_from_slice(b"head");
    }
    for (here, mut there) in sockets() {
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            there.read_to_end(&mut all).map(|_| all)
        });
        let mut lender = Lender::default();
        for _ in 0..3 {
            lender.write_parts(&ram, here.as_fd(), &parts, &mut timeout).unwrap();
        }
        drop(here);
        assert!(reader.join().unwrap().unwrap() == expected.repeat(3));
    }
}

#[test]
fn where_nothing_can_be_lent_it_is_written() {
    let ram = ram();
    ram.copy_in(0, 0, &[3; 1 << 20]).unwrap();
    // splice(2): EINVAL, the target file is opened in append mode.
    let path = tempfile::NamedTempFile::new().unwrap();
    let file = File::options().append(true).open(&path).unwrap();
    let part = IoPart::Ram { block: 0, offset: 0, len: 1 << 20 };
    let mut lender = Lender::default();
    for _ in 0..2 {
        lender.write_parts(&ram, file.as_fd(), &[part, part], &mut timeout).unwrap();
    }
    assert!(std::fs::read(&path).unwrap() == [3; 4 << 20]);
}

#[test]
fn a_peer_that_takes_nothing_or_is_gone_ends_lending() {
    let ram = ram();
    let part = IoPart::Ram { block: 0, offset: 0, len: 4 << 20 };
    for (here, there) in sockets() {
        let wait = TimeVal::milliseconds(20);
        setsockopt(&here, sockopt::SendTimeout, &wait).unwrap();
        let mut asked = 0;
        let mut full = || {
            asked += 1;
            if asked < 3 { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
        };
        let mut until = || Lender::default().write_parts(&ram, here.as_fd(), &[part; 8], &mut full);
        assert_eq!(until().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(asked, 3);
        drop(there);
        let gone = Lender::default().write_parts(&ram, here.as_fd(), &[part; 8], &mut timeout);
        let kind = gone.unwrap_err().kind();
        let ends = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
        assert!(ends.contains(&kind), "{kind}");
    }
}

/// The kernel says once why it broke a connection, and splice(2) keeps that to itself if it has moved something in
/// the same call.
#[test]
fn whoever_stands_still_while_memory_is_lent_is_told_from_one_who_is_gone() {
    let ram = ram();
    let part = IoPart::Ram { block: 0, offset: 0, len: 4 << 20 };
    for _ in 0..4 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let here = Connection::from_tcp(TcpStream::connect(to).unwrap(), to).unwrap();
        let (there, _) = listener.accept().unwrap();
        let stall = Duration::from_millis(400);
        here.set_stall_timeout(stall).unwrap();
        let began = Instant::now();
        let mut lender = Lender::default();
        let error = loop {
            let written = lender.write_parts(&ram, here.as_fd(), &[part; 8], &mut timeout);
            if let Err(error) = written {
                break error;
            }
        };
        assert!(is_stall(&error), "{error}");
        assert!(began.elapsed() > stall, "{:?}", began.elapsed());
        drop(there);
    }
}

#[test]
fn zero_is_seen_and_filling_writes_every_byte() {
    let ram = ram();
    assert!(ram.is_zero(0, 0x5000));
    ram.copy_in(0, 0x5fff, &[1]).unwrap();
    assert!(!ram.is_zero(0, 0x5000) && ram.is_zero(0, 0x6000));
    ram.fill(0, 0x5000, 4096, 0).unwrap();
    assert!(ram.is_zero(0, 0x5000));
    ram.fill(0, 0x6ffc, 8, 9).unwrap();
    let mut got = [0; 10];
    ram.copy_out(0, 0x6ffb, &mut got).unwrap();
    assert_eq!(got, [0, 9, 9, 9, 9, 9, 9, 9, 9, 0]);
}

#[test]
fn what_the_host_has_given_is_counted() {
    for ram in both() {
        assert_eq!(ram.held(), 0);
        ram.populate(0, 0, ram.size());
        assert_eq!(ram.held(), ram.size());
    }
}

#[test]
fn populating_changes_nothing_and_takes_any_range() {
    let ram = ram();
    ram.copy_in(0, 0x5000, &[7; 16]).unwrap();
    ram.populate(0, 0, ram.size());
    ram.populate(0, ram.size(), 1);
    ram.populate(9, 0, 4096);
    let mut got = [0; 17];
    ram.copy_out(0, 0x5000, &mut got).unwrap();
    assert_eq!((&got[..16], got[16]), (&[7; 16][..], 0));
}

#[test]
fn discarded_pages_read_as_zeros_and_their_neighbours_stay() {
    for ram in both() {
        ram.copy_in(0, 0x4000, &[7; 4 * 4096]).unwrap();
        ram.discard(0x5000, 2 * 4096).unwrap();
        if ram.shared().is_some() {
            // They are nobody's any more, also not in the file.
            let absent = ram.absent(0, 0x4000, 4 * 4096);
            assert_eq!(absent, Some(vec![0b0110]));
        }
        let zero = |page: u64| ram.is_zero(0, page * 4096);
        assert_eq!([4, 5, 6, 7].map(zero), [false, true, true, false]);
        for (address, len) in [(ram.size() - 4096, 8192), (1 << 32, 4096), (u64::MAX, 4096)] {
            assert!(ram.discard(address, len).is_err(), "{address:#x}+{len:#x}");
        }
    }
}

#[test]
fn nothing_outside_of_the_block_is_reached() {
    let ram = ram();
    let len = ram.size();
    assert!(ram.copy_in(0, len - 1, &[0; 2]).is_err());
    assert!(ram.copy_in(0, u64::MAX, &[0; 2]).is_err());
    assert!(ram.copy_in(1, 0, &[0; 2]).is_err());
    assert!(ram.fill(0, len, 1, 1).is_err());
    assert!(!ram.is_zero(0, len));
}
