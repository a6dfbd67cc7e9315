//! Why a source's migration did not complete.

use std::io;
use std::time::Duration;

use crate::guest::VmError;
use crate::manifest::Problem;
use crate::panics::Panicked;
use crate::transport::StreamError;
use crate::vmstate::StateError;
use crate::wire::WireError;

/// Why a source's migration did not complete.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// This VM can't be migrated.
    #[error("this VM can't be migrated: {}", reasons.join("; "))]
    Blocked {
        /// Each a sentence.
        reasons: Vec<String>,
    },
    /// The destination compared, and refuses.
    #[error("the destination refuses the VM: {}", list(problems))]
    Refused {
        /// Everything that is wrong.
        problems: Vec<Problem>,
    },
    /// The destination is a QEMU, and the guest would lose something there.
    #[error("the destination is a QEMU, which can't take the VM as it is: {}", list(problems))]
    NotForQemu {
        /// Everything that is wrong.
        problems: Vec<Problem>,
    },
    /// Whoever waits there can't say whether the VM would fit.
    #[error(
        "the destination can't be asked: {}",
        match program {
            Some(program) => format!(
                "it is {program:.100}, which knows no preflight; a migration compares all the same \
                 before it sends a page"
            ),
            None => "it answers as a QEMU does, which knows no preflight and finds what does not fit \
                     when it has come; 'preflight --qemu' tells what stands against any QEMU, and a mini-vmm with the \
                     same devices can be asked".into(),
        }
    )]
    NotToBeAsked {
        /// A mini-vmm's name and version.
        program: Option<String>,
    },
    /// Whoever waits there can't rehearse.
    #[error(
        "the destination is {program:.100}, which can't rehearse a migration; 'preflight' compares"
    )]
    NoRehearsal {
        /// Its name and version.
        program: String,
    },
    /// Whoever waits there takes no memory as a descriptor.
    #[error(
        "the destination can't take memory that is not copied (--local): {}",
        match program {
            Some(program) => format!("it is {program:.100}, which does not know of that"),
            None => "it answers as a QEMU does".into(),
        }
    )]
    NotLocal {
        /// A mini-vmm's name and version.
        program: Option<String>,
    },
    /// The destination gave up, in its own words.
    #[error("the destination failed: {reason}")]
    Destination {
        /// The destination's words.
        reason: String,
    },
    /// The destination gave up without words, as a QEMU does.
    #[error("the destination failed (status {status}); its own log says why")]
    DestinationStatus {
        /// The status in its last message.
        status: u32,
    },
    /// This program has a fault.
    #[error("while {during}")]
    Panicked {
        /// What was under way.
        during: &'static str,
        /// What the panic said.
        #[source]
        source: Panicked,
    },
    /// The destination closed the connection without a word.
    #[error("the destination closed the connection while {during}; its own log may say why")]
    Closed {
        /// What was under way.
        during: &'static str,
    },
    /// The destination sent something that can't be read.
    #[error("the destination's answer can't be understood")]
    BadAnswer {
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
    /// The destination sent a message out of its turn.
    #[error("the destination sent '{found}' while {expected} was expected")]
    Unexpected {
        /// What came.
        found: &'static str,
        /// What should have come.
        expected: &'static str,
    },
    /// No common version of the private messages.
    #[error("no common protocol: the destination speaks {theirs:?}, this side {ours:?}")]
    Protocol {
        /// The destination's versions.
        theirs: Vec<u32>,
        /// Ours.
        ours: &'static [u32],
    },
    /// The destination is silent, or takes no bytes.
    #[error("the destination stands still: nothing for {timeout:?} while {during}")]
    Stalled {
        /// What was awaited.
        during: &'static str,
        /// How long.
        timeout: Duration,
    },
    /// The disks could not be given up in time.
    #[error(
        "giving up the disks took {waited:?}; the destination waits only {agreed:?} for its order, as was \
         agreed, and was not given it"
    )]
    TooLate {
        /// How long the destination waits after PREPARED.
        agreed: Duration,
        /// How long it took.
        waited: Duration,
    },
    /// Whoever was asked what became of a migration can't be understood.
    #[error("the question what became of the migration was answered with '{found}'")]
    NoAnswer {
        /// What came.
        found: &'static str,
    },
    /// A write failed.
    #[error("sending {what} failed")]
    Send {
        /// What was being sent.
        what: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The file, pipe or command did not take the VM.
    #[error("the VM was not saved: {during} could not be written")]
    NotSaved {
        /// What was being written.
        during: &'static str,
        /// Why.
        #[source]
        source: StreamError,
    },
    /// The machine could not do what was asked of it.
    #[error("{during} failed")]
    Vm {
        /// What was asked.
        during: &'static str,
        /// The machine's reason.
        #[source]
        source: VmError,
    },
    /// A device's state could not be written down.
    #[error("a device's state can't be saved")]
    State {
        /// Which, and why.
        #[source]
        source: StateError,
    },
    /// Guest memory could not be read for the comparison.
    #[error("guest memory can't be read for the comparison")]
    Memory {
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The dirty pages did not become few enough in time.
    #[error(
        "the migration did not converge within {timeout:?}: {remaining} bytes are left, and the \
         guest dirties {dirty_pages_per_s} pages a second; allow more downtime or bandwidth, or \
         force it"
    )]
    NotConverged {
        /// The time that was allowed.
        timeout: Duration,
        /// Bytes left.
        remaining: u64,
        /// How fast the guest dirties them.
        dirty_pages_per_s: u64,
    },
    /// Someone asked for it.
    #[error("the migration was cancelled")]
    Cancelled,
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl SourceError {
    pub(super) fn send(what: &'static str, source: io::Error) -> Self {
        Self::Send { what, source }
    }

    pub(super) fn vm(during: &'static str) -> impl FnOnce(VmError) -> Self {
        move |source| Self::Vm { during, source }
    }

    /// The error and its causes, as one line.
    pub fn chain(&self) -> String {
        crate::wire::error_chain(self)
    }
}
