//! TCP between two processes of one host: nothing lies between them but the kernel.
//!
//! There is no network to be fair to, and no queue to keep short. What paces its sending, as BBR does, leaves half of
//! what the processors could copy, and has the kernel start a timer for each portion. Reno is in every kernel, and
//! anybody may choose it. It has to be chosen before the connection is made: one that began with BBR is paced for as
//! long as it lives, by twice what it has found it can send.
//!
//! And nothing has to be under way for as long as a network takes. The kernel lets a receiver's buffer grow to many
//! megabytes, and whoever finds them full is at work for milliseconds without waiting for anyone: for so long does a
//! guest that wants its processor back wait for the scheduler's tick. Where the buffer is short, both ends wait for each
//! other again and again, and the guest gets its turn.

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// Whether these two addresses are of one host.
pub(super) fn is_both(here: IpAddr, there: IpAddr) -> bool {
    here == there || there.to_canonical().is_loopback()
}

/// Connects within `timeout`; without BBR if `to` is this host.
pub(super) fn connect(to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    if is_here(to) {
        without_bbr(&socket);
    }
    socket.connect_timeout(&to.into(), timeout)?;
    Ok(socket.into())
}

/// Whether `to` is this host: a loopback address, or one from which this host would send to it. A UDP socket that is
/// connected has looked that up, and sends nothing.
fn is_here(to: SocketAddr) -> bool {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    if is_both(any, to.ip()) {
        return true;
    }
    let from = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(to)?;
        socket.local_addr()
    });
    from.is_ok_and(|from| is_both(from.ip(), to.ip()))
}

/// How much a receiver is to hold, in bytes (the kernel doubles it for what it needs itself, socket(7)). Measured,
/// with a guest of 2 GiB on two processors: its longest gap is 6.1 ms if the kernel decides, 5.8 with 1 MiB, 4.3 with
/// 512 KiB, and then the move takes a twentieth longer; with 128 KiB it takes a seventh longer.
const HELD: usize = 512 << 10;

/// What two processes of one host want of a connected socket between them.
pub(super) fn set_up(socket: &impl AsFd) {
    without_bbr(socket);
    // Beyond net.core.rmem_max only root may go; for all others that is the most.
    let set = setsockopt(socket, sockopt::RcvBufForce, &HELD)
        .or_else(|_| setsockopt(socket, sockopt::RcvBuf, &HELD));
    if let Err(error) = set {
        tracing::debug!(%error, "a receive buffer as long as the kernel likes");
    }
}

/// Chooses Reno.
fn without_bbr(socket: &impl AsFd) {
    if let Err(error) = setsockopt(socket, sockopt::TcpCongestion, &OsString::from("reno")) {
        tracing::debug!(%error, "the host's own congestion control is kept");
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use nix::sys::socket::getsockopt;

    use super::*;
    use crate::transport::{Address, Connection};

    #[test]
    fn inside_a_host_reno_and_a_short_buffer_are_asked_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let plain = TcpStream::connect(to).unwrap();
        let usual = setsockopt(&plain, sockopt::TcpCongestion, &OsString::from("cubic"))
            .map_or_else(|_| OsString::from("reno"), |()| OsString::from("cubic"));
        assert_eq!(getsockopt(&plain, sockopt::TcpCongestion).unwrap(), usual);
        let here = Connection::from_tcp(plain, to).unwrap();
        assert_eq!(getsockopt(&here, sockopt::TcpCongestion).unwrap(), "reno");

        // Twice that, or twice what the host allows anyone.
        let limit = std::fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap();
        let limit = limit.trim().parse::<usize>().unwrap().min(HELD);
        let held = getsockopt(&here, sockopt::RcvBuf).unwrap();
        assert!([2 * limit, 2 * HELD].contains(&held), "{held}");

        let own = connect(to, Duration::from_secs(5)).unwrap();
        assert_eq!(getsockopt(&own, sockopt::TcpCongestion).unwrap(), "reno");
        let address = Address::Tcp { host: "localhost".into(), port: to.port() };
        Connection::connect(&address, Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn this_host_is_told_from_others_by_the_way_there() {
        for (to, here) in [("127.0.0.1:9", true), ("127.1.2.3:9", true), ("[::1]:9", true)] {
            assert_eq!(is_here(to.parse().unwrap()), here, "{to}");
        }
        // Documentation's addresses (RFC 5737, RFC 3849): no way there, or one that leads elsewhere.
        for to in ["192.0.2.1:9", "[2001:db8::1]:9"] {
            assert!(!is_here(to.parse().unwrap()), "{to}");
        }
    }

    #[test]
    fn a_host_is_told_from_a_network() {
        for (here, there, same) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "127.0.0.2", true),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("::1", "::1", true),
            ("::ffff:127.0.0.1", "::ffff:127.0.0.1", true),
            ("2001:db8::1", "2001:db8::2", false),
        ] {
            let found = is_both(here.parse().unwrap(), there.parse().unwrap());
            assert_eq!(found, same, "{here} to {there}");
        }
    }
}
