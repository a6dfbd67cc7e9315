//! What a device type (block, net, …) is to its transport.

use std::any::Any;
use std::os::fd::RawFd;
use std::sync::Arc;

use migration::vmstate::{Audience, Decoder, Encoder, FieldError, LayoutDigest, StateError};

use super::core::{Core, VirtioError};
use super::trouble::Trouble;

/// What is the same for all devices of a type.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// The name in the section's key, for example `virtio-net`.
    pub name: &'static str,
    /// The section's version.
    pub version: u32,
    /// The virtio device id (virtio 1.2, 5).
    pub id: u16,
    /// The PCI device id of the transitional form.
    pub transitional_id: u16,
    /// The PCI class of the transitional form.
    pub class: u16,
    /// Bits of the type's own that only a legacy driver is shown.
    pub legacy_features: u64,
}

/// The device's host side could not be opened or closed.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {what}")]
pub struct BackendError {
    /// The device, as the user knows it.
    pub device: String,
    /// What did not work.
    pub what: String,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// Reads a device part, whose layout depends on what was negotiated.
pub struct PartDecoder<'a, 'b> {
    pub(super) decoder: &'a mut Decoder<'b>,
    pub(super) section: String,
    /// The low 32 bits of the accepted features.
    pub features: u64,
}

impl PartDecoder<'_, '_> {
    /// The next value.
    pub fn get<T: serde::de::DeserializeOwned>(&mut self, field: &str) -> Result<T, StateError> {
        self.decoder.get(field)
    }

    /// The next `n` values; `n` must have been checked.
    pub fn get_seq<T: serde::de::DeserializeOwned>(
        &mut self,
        field: &str,
        n: usize,
    ) -> Result<Vec<T>, StateError> {
        self.decoder.get_seq(field, n)
    }

    /// An error about a value that was read.
    pub fn error(&self, error: FieldError) -> StateError {
        StateError::Field { section: self.section.clone(), error }
    }
}

/// A device type. Its transport calls it with its own lock held; what a worker thread of the device
/// shares with it is the device's own business.
///
/// What has a default is for devices that have more than queues which the I/O thread serves: a
/// configuration space that can be written, a worker or a host side, a part of their own in the section.
pub trait VirtioDevice: Send {
    /// What it is.
    fn kind(&self) -> &'static Kind;
    /// The sizes of its queues after a reset.
    fn queue_sizes(&self) -> Vec<u16>;
    /// How many MSI-X vectors it has; 0 for no MSI-X.
    fn vectors(&self) -> u16;
    /// The features of its type that it offers, and those of [`features`](super::features) that
    /// it offers beyond [`COMMON`](super::features::COMMON).
    fn features(&self) -> u64;

    /// The device as its own type, for what only that type can do.
    fn as_any(&mut self) -> &mut dyn Any;

    /// Called once, before anything else.
    fn connect(&mut self, core: Arc<Core>) -> Result<(), VirtioError>;

    /// Its configuration space, as it is now. The length never changes.
    fn config(&self) -> Vec<u8>;
    /// A driver's write to its configuration space; the range lies inside.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// Checks a configuration space that another host's device had.
    fn check_config(&self, _config: &[u8]) -> Result<(), FieldError> {
        Ok(())
    }
    /// Takes what a driver has written to the configuration space on another host.
    fn restore_config(&mut self, _config: &[u8]) {}

    /// The driver has accepted these features.
    fn features_accepted(&mut self, _features: u64) {}
    /// Back to the state after power-on. Its queues are reset already.
    fn reset(&mut self);

    /// Whether [`kick`](Self::kick) is never to be called, since a worker thread listens to the
    /// queues' eventfds.
    fn serves_itself(&self) -> bool {
        false
    }
    /// A queue was rung for. The device may be paused or not live: what it pops it gets only then.
    fn kick(&mut self, queue: usize);
    /// A descriptor that becomes readable when the host side has something, the same one for the
    /// device's whole life.
    fn event_fd(&self) -> Option<RawFd> {
        None
    }
    /// It has become readable.
    fn event(&mut self) {}

    /// Ends everything that is under way, and begins nothing new. Called before a queue or the
    /// device is reset, and when the VM pauses.
    fn quiesce(&mut self) {}
    /// Begins again, if the VM is not paused.
    fn unquiesce(&mut self) {}
    /// The VM has paused: what was written is brought to safety. Follows [`quiesce`](Self::quiesce).
    fn flush(&mut self) {}

    /// While the VM runs: what was written is to be brought to safety soon. Returns at once.
    fn flush_ahead(&mut self) {}

    /// Opens the host side for use. On a destination of a migration this comes last.
    fn open(&mut self) -> Result<(), BackendError> {
        Ok(())
    }
    /// Gives the host side up, so that another process can open it.
    fn close(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Everything that opening the host side now would come upon. Takes nothing from whoever uses it,
    /// and nothing is open afterwards that was not before.
    fn try_backend(&mut self) -> Vec<Trouble> {
        Vec::new()
    }

    /// Tells the network that it is here now; nothing for devices without one.
    fn announce(&mut self) {}
    /// A guest that was migrated here has started: a disk lets others see it.
    fn guest_started(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Adds what decides the form of the device's own part to the section's layout.
    fn part_layout(&self, layout: LayoutDigest) -> LayoutDigest {
        layout
    }
    /// Writes the device's own part of the section. A device that serves a request does not have to.
    fn save_part(&self, _to: &mut Encoder, _audience: Audience) -> Result<(), StateError> {
        Ok(())
    }
    /// Reads and checks it.
    fn decode_part(&self, _from: &mut PartDecoder<'_, '_>) -> Result<Part, StateError> {
        Ok(Box::new(()))
    }
    /// Whether the device keeps requests of that queue until the host wants something, without a list of
    /// them in its part: on another host it takes them again.
    fn keeps_requests(&self, _queue: usize) -> bool {
        false
    }
    /// Takes it. The queues are restored already; the host side is not open yet.
    fn restore_part(&mut self, _part: Part) -> Result<(), FieldError> {
        Ok(())
    }
}

/// What [`VirtioDevice::decode_part`] has read.
pub type Part = Box<dyn Any + Send>;
