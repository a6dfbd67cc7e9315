//! An existing tap interface.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::backend::{HEADER, NetBackend, Offloads, Sent};

/// Requests of `linux/if_tun.h`.
mod ioctl {
    nix::ioctl_write_ptr_bad!(set_iff, libc::TUNSETIFF, libc::ifreq);
    nix::ioctl_write_ptr_bad!(set_vnet_header_size, libc::TUNSETVNETHDRSZ, libc::c_int);
    nix::ioctl_write_int_bad!(set_offload, libc::TUNSETOFFLOAD);
}

/// A tap interface, opened with vnet headers.
pub struct Tap {
    interface: String,
    file: Option<File>,
}

impl Tap {
    /// The interface of that name, which must exist when it is opened.
    pub fn new(interface: impl Into<String>) -> Self {
        Self { interface: interface.into(), file: None }
    }

    fn file(&mut self) -> io::Result<&mut File> {
        self.file.as_mut().ok_or_else(|| io::Error::other("the tap is not open"))
    }
}

/// Opens interface `name`. The kernel would make one that is not there, hence the check.
fn open(name: &str) -> io::Result<File> {
    let known = !name.is_empty() && !name.contains('/') && name.len() < libc::IFNAMSIZ;
    if !known || !Path::new("/sys/class/net").join(name).exists() {
        let hint =
            format!("there is no interface {name}: make one with `ip tuntap add {name} mode tap`");
        return Err(io::Error::new(ErrorKind::NotFound, hint));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: libc::c_short::try_from(flags).map_err(io::Error::other)?,
        },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // SAFETY: the descriptor is open, and the request is complete and lives through the call; its
    // name ends with a zero, since it is shorter than the field.
    unsafe { ioctl::set_iff(file.as_raw_fd(), &request) }.map_err(|errno| match errno {
        nix::errno::Errno::EBUSY => {
            io::Error::new(ErrorKind::ResourceBusy, format!("{name} is in use by another process"))
        }
        other => other.into(),
    })?;
    let size = libc::c_int::try_from(HEADER).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the kernel reads one int.
    unsafe { ioctl::set_vnet_header_size(file.as_raw_fd(), &size) }?;
    Ok(file)
}

impl NetBackend for Tap {
    fn name(&self) -> String {
        format!("tap {}", self.interface)
    }
    fn has_vnet_header(&self) -> bool {
        true
    }

    fn open(&mut self) -> io::Result<RawFd> {
        let file = open(&self.interface)?;
        let fd = file.as_raw_fd();
        self.file = Some(file);
        Ok(fd)
    }

    fn close(&mut self) {
        self.file = None;
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let Offloads { csum, tso4, tso6, ecn, ufo } = offloads;
        let flags: libc::c_uint = [
            (csum, libc::TUN_F_CSUM),
            (tso4, libc::TUN_F_TSO4),
            (tso6, libc::TUN_F_TSO6),
            (ecn, libc::TUN_F_TSO_ECN),
            (ufo, libc::TUN_F_UFO),
        ]
        .into_iter()
        .filter_map(|(on, flag)| on.then_some(flag))
        .fold(0, |flags, flag| flags | flag);
        let flags = libc::c_int::try_from(flags).map_err(io::Error::other)?;
        let fd = self.file()?.as_raw_fd();
        // SAFETY: the descriptor is open, and the argument is a plain number.
        unsafe { ioctl::set_offload(fd, flags) }?;
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.file()?.read(buffer) {
                Ok(n) if n > HEADER => return Ok(Some(n)),
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// A tap takes a frame as a whole, or not at all.
    fn flush(&mut self) {}

    fn send(&mut self, frame: &[u8]) -> io::Result<Sent> {
        match self.file()?.write(frame) {
            Ok(_) => Ok(Sent::Done),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(Sent::Blocked),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_not_made() {
        for name in ["mini-vmm-none", "", "a/b", "a-name-that-is-far-too-long"] {
            let error = Tap::new(name).open().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound, "{name}");
            assert!(error.to_string().contains("ip tuntap add"), "{error}");
        }
    }
}
