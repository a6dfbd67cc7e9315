//! QEMU's command line, read and written, so that a VM can change over without anybody comparing two
//! lists of options by hand.
//!
//! - [`QemuLine`]: a configuration as the QEMU command line that equals it.
//! - [`Like`]: a QEMU command line as settings of ours.
//!
//! Reading sorts every option and property into one of three classes:
//!
//! | class | what happens |
//! |---|---|
//! | honoured | it is in the settings, or says what is so anyway |
//! | the guest does not see it | told in a note, and left out |
//! | it matters | an error that names it; so does everything that is not known here |
//!
//! All that matters is told at once. Devices without `addr=` get the slot that QEMU gives them: the
//! first free one, in the order of the command line.

mod backends;
mod board;
mod device_rules;
mod devices;
mod drives;
mod findings;
mod like;
mod options;
mod props;
mod write;

pub use findings::{LikeError, Problem};
pub use like::Like;
pub use write::{QemuLine, WriteError};

#[cfg(test)]
mod tests;
