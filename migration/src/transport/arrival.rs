//! When what can be read came in: whoever waits for it may get a processor much later.

use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt,
};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use super::{Connection, Socket};

impl Connection {
    /// Has the kernel note when something comes in, from soon on. Only TCP does (Linux, timestamping.rst, 1.1).
    pub(crate) fn note_arrivals(&self) {
        if let Socket::Tcp(stream) = &*self.socket
            && let Err(error) = setsockopt(stream, sockopt::ReceiveTimestampns, &true)
        {
            tracing::debug!(%error, "when an answer comes in is not known");
        }
    }

    /// How long ago what can be read next came in, if that was noted. What comes in pieces may be put together, and is
    /// as old as the last of them then. What has become of a broken connection is said once, so whoever asks here has
    /// to heed the error.
    pub(crate) fn waited(&self) -> io::Result<Option<Duration>> {
        let Socket::Tcp(stream) = &*self.socket else { return Ok(None) };
        let mut byte = [0];
        let mut bytes = [IoSliceMut::new(&mut byte)];
        let mut room = nix::cmsg_space!(TimeSpec);
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let peeked =
            recvmsg::<SockaddrStorage>(stream.as_raw_fd(), &mut bytes, Some(&mut room), flags);
        let peeked = match peeked {
            Ok(peeked) => peeked,
            // There is nothing, after all.
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let came = peeked.cmsgs()?.find_map(|note| match note {
            ControlMessageOwned::ScmTimestampns(time) => Some(Duration::from(time)),
            _ => None,
        });
        // The kernel notes the time of day. Somebody may have set it meanwhile.
        let now = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME)?);
        Ok(came.and_then(|came| now.checked_sub(came)))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::thread::sleep;
    use std::time::Instant;

    use super::*;

    /// Two ends of which the first notes what comes from the second: the kernel begins some time after it is told to.
    pub(crate) fn noting() -> (Connection, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let here = Connection::from_tcp(TcpStream::connect(to).unwrap(), to).unwrap();
        let mut there = listener.accept().unwrap().0;
        here.note_arrivals();
        let began = Instant::now();
        loop {
            there.write_all(b"?").unwrap();
            sleep(Duration::from_millis(1));
            let noted = here.waited().unwrap();
            (&here).read_exact(&mut [0]).unwrap();
            if noted.is_some() {
                return (here, there);
            }
            assert!(began.elapsed() < Duration::from_secs(20), "nothing is ever noted");
        }
    }

    #[test]
    fn what_lies_unread_has_come_when_it_came() {
        let (here, mut there) = noting();
        assert_eq!(here.waited().unwrap(), None, "there is nothing");
        there.write_all(b"a").unwrap();
        sleep(Duration::from_millis(50));
        let waited = here.waited().unwrap().unwrap();
        assert!(waited >= Duration::from_millis(45), "{waited:?}");
        // It has not been taken, and what comes then is newer.
        let mut byte = [0];
        (&here).read_exact(&mut byte).unwrap();
        assert_eq!((byte, here.waited().unwrap()), (*b"a", None));
        let written = Instant::now();
        there.write_all(b"b").unwrap();
        let waited = loop {
            if let Some(waited) = here.waited().unwrap() {
                break waited;
            }
            assert!(written.elapsed() < Duration::from_secs(20), "it does not come");
        };
        assert!(waited <= written.elapsed() + Duration::from_millis(5), "{waited:?}");
    }

    #[test]
    fn what_broke_the_connection_is_said() {
        let (here, there) = noting();
        // What is closed before all has been read is reset.
        (&here).write_all(b"a").unwrap();
        sleep(Duration::from_millis(20));
        drop(there);
        let began = Instant::now();
        let error = loop {
            match here.waited() {
                Err(error) => break error,
                Ok(_) => assert!(began.elapsed() < Duration::from_secs(20), "it is not broken"),
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn a_unix_socket_notes_nothing() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let here = Connection::from_unix(here, "there".to_owned());
        here.note_arrivals();
        there.write_all(b"a").unwrap();
        assert_eq!(here.waited().unwrap(), None);
    }
}
