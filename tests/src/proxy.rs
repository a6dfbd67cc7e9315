//! A TCP proxy that does a connection harm: cuts it somewhere, or changes what passes.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};

/// Which bytes are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From whoever connects to the proxy.
    There,
    /// Back to it.
    Back,
}

/// What is done to them.
#[derive(Debug, Clone, Copy)]
pub enum Harm {
    /// The connection is cut, both ways, when so many bytes have passed.
    CutAt(usize),
    /// It is cut when these bytes have passed for the first time, and so many behind them.
    CutBehind(&'static [u8], usize),
    /// Wherever the first come, the second, which are as many, pass in their place.
    Replace(&'static [u8], &'static [u8]),
}

/// A proxy for one connection.
pub struct Proxy {
    address: SocketAddr,
    worker: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Forwards one connection to `target`, and does harm to `direction`.
    pub fn new(target: &str, direction: Direction, harm: Harm) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let target = target.strip_prefix("tcp:").unwrap_or(target).to_string();
        let worker = thread::spawn(move || {
            let (near, _) = listener.accept().expect("somebody connects");
            // The target may be gone when only a test's end connects.
            let Ok(far) = TcpStream::connect(target) else { return };
            let filter = |d| Filter::new((d == direction).then_some(harm));
            let (there, back) = (filter(Direction::There), filter(Direction::Back));
            let copy = |s: &TcpStream| s.try_clone().expect("a second handle");
            let (near2, far2) = (copy(&near), copy(&far));
            let other = thread::spawn(move || pump(&far2, &near2, back));
            pump(&near, &far, there);
            other.join().expect("the way back does not panic");
        });
        Self { address, worker: Some(worker) }
    }

    /// The URI to migrate to.
    pub fn uri(&self) -> String {
        format!("tcp:{}", self.address)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Wakes one that nobody has connected to.
        let _ = TcpStream::connect(self.address);
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

/// What is between reading and writing.
struct Filter {
    harm: Option<Harm>,
    /// Bytes that have come and may be the beginning of what is looked for: already passed for a
    /// cut, not yet for a replacement.
    held: Vec<u8>,
}

impl Filter {
    fn new(harm: Option<Harm>) -> Self {
        Self { harm, held: Vec::new() }
    }

    /// Whether the cut is due before anything has passed.
    fn is_spent(&self) -> bool {
        matches!(self.harm, Some(Harm::CutAt(0)))
    }

    /// What may pass of everything that has come with `new`.
    fn pass(&mut self, new: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(new);
        match self.harm {
            None => std::mem::take(&mut self.held),
            Some(Harm::CutAt(left)) => {
                let n = self.held.len().min(left);
                self.harm = Some(Harm::CutAt(left - n));
                self.held.drain(..n).collect()
            }
            // Nothing is held back: whoever waits for the end of a message would wait for ever.
            Some(Harm::CutBehind(bytes, more)) => match position(&self.held, bytes) {
                Some(at) => {
                    let end = at + bytes.len() + more;
                    self.harm = Some(Harm::CutAt(end.saturating_sub(self.held.len())));
                    let passed = self.held.len() - new.len();
                    self.held.truncate(end);
                    self.held.drain(..).skip(passed).collect()
                }
                None => {
                    let known = self.held.len().saturating_sub(bytes.len() - 1);
                    self.held.drain(..known);
                    new.to_vec()
                }
            },
            Some(Harm::Replace(bytes, by)) => {
                while let Some(at) = position(&self.held, bytes) {
                    self.held[at..at + bytes.len()].copy_from_slice(by);
                }
                self.pass_all_but_a_beginning(bytes)
            }
        }
    }

    /// All that is held, but for a tail with which `bytes` may begin.
    fn pass_all_but_a_beginning(&mut self, bytes: &[u8]) -> Vec<u8> {
        let longest = self.held.len().min(bytes.len() - 1);
        let tail = (1..=longest).rev().find(|n| self.held.ends_with(&bytes[..*n])).unwrap_or(0);
        self.held.drain(..self.held.len() - tail).collect()
    }
}

fn position(text: &[u8], bytes: &[u8]) -> Option<usize> {
    // Looking at the first byte alone is much faster, and RAM comes through here.
    let first = bytes[0];
    let mut from = 0;
    while let Some(at) = text[from..].iter().position(|b| *b == first) {
        if text[from + at..].starts_with(bytes) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

/// Copies until the filter cuts or either side is gone, then hangs up on both.
fn pump(mut from: &TcpStream, mut to: &TcpStream, mut filter: Filter) {
    let mut buf = vec![0; 64 << 10];
    while !filter.is_spent() {
        match from.read(&mut buf) {
            Ok(n @ 1..) if to.write_all(&filter.pass(&buf[..n])).is_ok() => {}
            _ => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What passes when these parts come one by one, and whether the connection is cut.
    fn passed(harm: Harm, parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut filter = Filter::new(Some(harm));
        let mut out = Vec::new();
        for part in parts {
            if !filter.is_spent() {
                out.extend(filter.pass(part));
            }
        }
        (out, filter.is_spent())
    }

    #[test]
    fn a_cut_is_where_it_was_asked_for() {
        assert_eq!(passed(Harm::CutAt(0), &[b"abc"]), (b"".to_vec(), true));
        assert_eq!(passed(Harm::CutAt(4), &[b"abc", b"def"]), (b"abcd".to_vec(), true));
        let behind = |more| Harm::CutBehind(b"cd", more);
        assert_eq!(passed(behind(0), &[b"abc", b"def"]), (b"abcd".to_vec(), true));
        assert_eq!(passed(behind(1), &[b"abccdef", b"g"]), (b"abccde".to_vec(), true));
        assert_eq!(passed(behind(1), &[b"a", b"b", b"c", b"def"]), (b"abcde".to_vec(), true));
        assert_eq!(passed(behind(3), &[b"abcd", b"ef", b"gh"]), (b"abcdefg".to_vec(), true));
        assert_eq!(passed(behind(0), &[b"abdc"]), (b"abdc".to_vec(), false));
    }

    #[test]
    fn bytes_are_replaced_also_where_they_come_in_two_parts() {
        let harm = Harm::Replace(b"7.2", b"7.1");
        assert_eq!(passed(harm, &[b"a7.2b7", b".2c7.", b"3"]), (b"a7.1b7.1c7.3".to_vec(), false));
    }
}
