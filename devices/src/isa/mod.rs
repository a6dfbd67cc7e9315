//! The devices of an old PC's ISA bus: serial port, clock, keyboard controller, DMA, and what is
//! left of the floppy.
//!
//! Most of them are one byte wide, and split wider accesses with the macro `byte_ports`.

pub mod debugcon;
pub mod dma;
pub mod fdc;
pub mod fw_cfg;
pub mod i8042;
pub mod pcspk;
pub mod port92;
pub mod post;
pub mod ps2;
pub mod rtc;
pub mod serial;

#[cfg(test)]
pub(crate) mod testing;

/// Makes a device with `read_port(&mut self, port: u16) -> u8` and `write_port(&mut self, port:
/// u16, value: u8)` a [`vm_device::MutDevicePio`] (and so its `Mutex` a `DevicePio`). `port` is the
/// absolute port number. An access wider than a byte is split into accesses to consecutive
/// ports, low byte first, as the bus of the PC does.
macro_rules! byte_ports {
    ($device:ty) => {
        impl vm_device::MutDevicePio for $device {
            fn pio_read(
                &mut self,
                base: vm_device::bus::PioAddress,
                offset: vm_device::bus::PioAddressOffset,
                data: &mut [u8],
            ) {
                let first = base.0.wrapping_add(offset);
                for (byte, n) in data.iter_mut().zip(0u16..) {
                    *byte = self.read_port(first.wrapping_add(n));
                }
            }

            fn pio_write(
                &mut self,
                base: vm_device::bus::PioAddress,
                offset: vm_device::bus::PioAddressOffset,
                data: &[u8],
            ) {
                let first = base.0.wrapping_add(offset);
                for (byte, n) in data.iter().zip(0u16..) {
                    self.write_port(first.wrapping_add(n), *byte);
                }
            }
        }
    };
}
pub(crate) use byte_ports;

/// What a port reads as when nobody drives the bus.
pub(crate) const FLOATING: u8 = 0xff;
