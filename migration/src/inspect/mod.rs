//! What a stream contains, without a VM that could take it.
//!
//! ```text
//! bytes ── Input ──► read() ─┬─► Visitor: every part as it passes (an image of the memory, the
//!                            │   stream written anew, or nothing)
//!                            └─► Report: every part with its offset and size, every device's
//!                                fields by the description at the stream's end, and where and
//!                                why it broke, if it did
//! ```
//!
//! A device's section has no length, and the description of its fields comes behind all of them. So
//! from the first device on the rest of the stream is held in memory, up to [`MAX_TAIL`]; everything
//! before, which is the RAM, passes through. Nothing here knows a device: streams of machines that
//! mini-vmm does not have are shown as well as its own.
//!
//! Start with [`read()`], then [`Report`].
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

mod decode;
mod description;
mod diff;
mod input;
mod likely;
mod ram;
mod report;
mod rewrite;
mod value;
mod visit;
mod walk;

pub use decode::DecodeError;
pub use description::{Description, Field, Layout};
pub use diff::{Difference, diff};
pub use input::{Input, MAX_TAIL};
pub use likely::likely_cause;
pub use ram::{BlockReport, Pages};
pub use report::{Broken, CommandPart, DescriptionPart, DeviceSection, Part, RamPart, Report};
pub use rewrite::Rewriter;
pub use value::{Member, Value};
pub use visit::{PageContent, PageRecord, Visitor};
pub use walk::read;

#[cfg(test)]
mod tests;
