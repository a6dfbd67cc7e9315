//! A TCP proxy that cuts the connection after a given number of bytes.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};

/// Which bytes are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From whoever connects to the proxy.
    There,
    /// Back to it.
    Back,
}

/// A proxy for one connection.
pub struct Proxy {
    address: SocketAddr,
    worker: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Forwards one connection to `target`, and cuts it both ways as soon as `bytes` have passed in
    /// `direction`.
    pub fn cutting(target: &str, direction: Direction, bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let target = target.strip_prefix("tcp:").unwrap_or(target).to_string();
        let worker = thread::spawn(move || {
            let (near, _) = listener.accept().expect("somebody connects");
            let far = TcpStream::connect(target).expect("the target listens");
            let limit = |d| if d == direction { bytes } else { usize::MAX };
            let (there, back) = (limit(Direction::There), limit(Direction::Back));
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

/// Copies until `limit` bytes have passed or either side is gone, then hangs up on both.
fn pump(mut from: &TcpStream, mut to: &TcpStream, mut limit: usize) {
    let mut buf = vec![0; 64 << 10];
    while limit > 0 {
        let wanted = buf.len().min(limit);
        match from.read(&mut buf[..wanted]) {
            Ok(n @ 1..) if to.write_all(&buf[..n]).is_ok() => limit -= n,
            _ => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
