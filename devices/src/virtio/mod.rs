//! virtio: devices that know they are in a virtual machine (virtio 1.2).
//!
//! - [`VirtioPci`] is a device as a PCI function, for legacy and modern drivers; `registers` is
//!   what drivers see of it, [`VirtioSection`] its state;
//! - a device type implements [`VirtioDevice`]: [`block`], [`net`], [`rng`], [`console`],
//!   [`balloon`];
//! - [`Core`] holds the queues. All guest memory is reached through [`Chain`]s, whose writes mark
//!   it dirty.
//!
//! A device is made paused; its first [`resume`](crate::device::Device::resume) sets it going. Its
//! host side is opened when the VM is to run here, and not before: see
//! [`VirtioPci::open`].

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
mod core;
mod device;
mod disk;
mod element;
pub mod features;
mod handle;
mod interrupt;
pub mod net;
mod pci;
mod queue;
mod registers;
pub mod rng;
mod state;
mod take_apart;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod trouble;

pub use self::core::{Core, VirtioError, status};
pub use balloon::{Balloon, BalloonControl, PageDiscard};
pub use block::{Block, BlockOptions};
pub use chain::{Buffers, Chain, ChainError, Slice};
pub use console::{Console, ConsoleLine};
pub use device::{BackendError, Kind, Part, PartDecoder, VirtioDevice};
pub use disk::{CacheMode, DiskImage, ImageHolder, ImageInUse, ImageStamp, OpenDisk};
pub use interrupt::Interrupts;
pub use net::{Net, NetBackend, NetOptions, StreamAddress, StreamSocket, Tap, rarp_frame};
pub use pci::{Generation, VirtioEvents, VirtioPci, Wiring};
pub use queue::{MAX_QUEUE_SIZE, NO_VECTOR, QueueError, RingAddresses, VirtQueue};
pub use rng::Rng;
pub use state::VirtioSection;
pub use take_apart::take_apart;
pub use trouble::Trouble;
