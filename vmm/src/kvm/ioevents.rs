//! Doorbells: a guest's write that the kernel turns into an eventfd.

use std::io;
use std::sync::Arc;

use devices::irq::{IoAddress, IoEvents};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// KVM_IOEVENTFD behind the devices' trait.
pub struct KvmIoEvents(pub Arc<VmFd>);

fn address(address: IoAddress) -> IoEventAddress {
    match address {
        IoAddress::Pio(port) => IoEventAddress::Pio(port.into()),
        IoAddress::Mmio(address) => IoEventAddress::Mmio(address),
    }
}

impl IoEvents for KvmIoEvents {
    fn register(&self, fd: &EventFd, at: IoAddress, value: Option<u16>) -> io::Result<()> {
        match value {
            Some(value) => self.0.register_ioevent(fd, &address(at), value),
            None => self.0.register_ioevent(fd, &address(at), NoDatamatch),
        }
        .map_err(io::Error::from)
    }

    fn unregister(&self, fd: &EventFd, at: IoAddress, value: Option<u16>) -> io::Result<()> {
        match value {
            Some(value) => self.0.unregister_ioevent(fd, &address(at), value),
            None => self.0.unregister_ioevent(fd, &address(at), NoDatamatch),
        }
        .map_err(io::Error::from)
    }
}
