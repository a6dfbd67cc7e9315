//! What a device's host side would have against being opened now, found out without taking it from
//! whoever has it: a destination that waits for a VM is asked this before the VM comes.

use std::io;

/// One thing that is wrong with a host side, or may be.
#[derive(Debug)]
pub enum Trouble {
    /// It can't be opened, not even for reading.
    Missing {
        /// The image, or the interface.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// It can't be opened for writing.
    NotWritable {
        /// The image.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// Its size is not the one that it had when the device was made.
    Size {
        /// The image.
        what: String,
        /// In 512-byte sectors, as it was.
        was: u64,
        /// As it is.
        is: u64,
    },
    /// Nobody has locked it, although a VM that writes to it does.
    Unlocked {
        /// The image.
        what: String,
    },
    /// It can't do what it says that it can.
    Offload {
        /// The interface.
        what: String,
        /// The `TUN_F_…` of the offload.
        offload: &'static str,
        /// Why.
        source: io::Error,
    },
}
