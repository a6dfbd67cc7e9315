//! Why a destination did not take the VM.

use std::io;
use std::time::Duration;

use crate::fate::MigrationId;
use crate::guest::VmError;
use crate::handover::destination::Event;
use crate::manifest::{PROTOCOL_VERSIONS, Problem};
use crate::panics::Panicked;
use crate::transport::{StreamError, is_stall};
use crate::verify::RamDifference;
use crate::vmstate::{FieldError, SectionId, StateError};
use crate::wire::WireError;
use crate::wire::zstd::ZstdError;

/// Why the VM was not taken, and what is left of the one that waited.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Failure {
    /// Why.
    #[source]
    pub error: DestinationError,
    /// Nothing of the stream has reached the VM; it can go on waiting for another source.
    pub vm_untouched: bool,
}

/// Why a destination did not take the VM.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// Whoever connected does not speak the protocol at all.
    #[error("Not a migration stream: whoever connected is no migration source")]
    Stranger {
        /// What came instead.
        #[source]
        source: WireError,
    },
    /// The file holds something else, or the pipe brings it.
    #[error("there is no saved VM in {name}")]
    NoVm {
        /// Which.
        name: String,
        /// What stands there instead.
        #[source]
        source: WireError,
    },
    /// The file, pipe or command did not bring all of it.
    #[error("the VM can't be restored")]
    Stream {
        /// Why.
        #[source]
        source: StreamError,
    },
    /// The bytes are not those of a migration that this side can take.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The machines are not the same.
    #[error("this VM can't take the source's: {}", list(problems))]
    Refused {
        /// Everything that is wrong.
        problems: Vec<Problem>,
    },
    /// The source wanted to know whether its VM would fit, and knows.
    #[error("the source only asked whether its VM would fit (preflight): {} found", problems(*count))]
    OnlyAsked {
        /// The fatal problems that it was told.
        count: usize,
    },
    /// The source wanted to know what became of a migration that is unknown here.
    #[error("a source asked what became of migration {id}, which never came here")]
    AskedAfter {
        /// The migration's name.
        id: MigrationId,
    },
    /// The source did not say COMMIT in the time that both sides had agreed on.
    #[error(
        "the source did not give the order to run the guest within the {agreed:?} that both sides had \
         agreed on, counted from when all was ready here: the guest has not run here and stays the source's"
    )]
    NoOrder {
        /// How long this side waits.
        agreed: Duration,
    },
    /// Another machine type.
    #[error("Machine type received is '{found}' and local is '{expected}'")]
    MachineType {
        /// This side's.
        expected: String,
        /// The source's.
        found: String,
    },
    /// The source uses a capability that both sides must have.
    #[error("the source has capability '{name}' on, which this side does not have")]
    Capability {
        /// Its name.
        name: String,
    },
    /// Another page size.
    #[error("the source's pages have 2^{found} bytes, expected 2^12")]
    PageSize {
        /// The source's, as a power of two.
        found: u32,
    },
    /// A version of the private messages that this side does not speak.
    #[error("the source speaks protocol {found}, this side {PROTOCOL_VERSIONS:?}")]
    Protocol {
        /// The source's.
        found: u32,
    },
    /// A device that this machine does not have.
    #[error(
        "Unknown savevm section or instance '{}' {}: the source has a device that this VM has not, \
         or has it in another slot",
        section.idstr, section.instance
    )]
    UnknownSection {
        /// Its name and instance.
        section: SectionId,
    },
    /// A PART or END section that no START has announced.
    #[error("Unknown savevm section {id}: no START section has announced it")]
    UnknownSectionId {
        /// The id on the wire.
        id: u32,
    },
    /// A version of the RAM section that nobody speaks any more.
    #[error("unsupported version {found} of the RAM section, expected 4")]
    RamVersion {
        /// The version on the wire.
        found: u32,
    },
    /// A device that this machine has did not come.
    #[error("the source did not send {}", sections.join(", "))]
    MissingSections {
        /// Which.
        sections: Vec<String>,
    },
    /// The same device twice.
    #[error("section {section} came twice")]
    DuplicateSection {
        /// Its name and instance.
        section: SectionId,
    },
    /// A section that was saved for a mini-vmm is longer than its fields.
    #[error("section {section} has {bytes} bytes more than its fields take")]
    Surplus {
        /// Its name and instance.
        section: SectionId,
        /// How many.
        bytes: usize,
    },
    /// A RAM block that this machine does not have.
    #[error(
        "Unknown ramblock \"{name}\", cannot accept migration: the source has a device with memory of its own that this VM has not"
    )]
    UnknownBlock {
        /// Its name.
        name: String,
    },
    /// A RAM block of another size.
    #[error(
        "Size mismatch: {name}: {found:#x} != {expected:#x}: start this side with as much memory as the source"
    )]
    BlockSize {
        /// Its name.
        name: String,
        /// This side's length in bytes.
        expected: u64,
        /// The source's.
        found: u64,
    },
    /// A page beyond its block.
    #[error("Illegal RAM offset {offset:#x} in {name}, which has {len:#x} bytes")]
    Offset {
        /// The block.
        name: String,
        /// The offset on the wire.
        offset: u64,
        /// The block's length.
        len: u64,
    },
    /// A page of memory that came as a descriptor.
    #[error("the stream has a page of RAM block {name}, whose memory has come as a descriptor")]
    AlreadyHere {
        /// The block.
        name: String,
    },
    /// A page record that continues no other.
    #[error(
        "Ack, bad migration stream: the first page record at offset {offset:#x} names no RAM block"
    )]
    NoBlock {
        /// Offset in the stream.
        offset: u64,
    },
    /// Something that has no place here.
    #[error("the stream has {what}, at offset {offset:#x}")]
    OutOfTurn {
        /// What.
        what: &'static str,
        /// Offset in the stream.
        offset: u64,
    },
    /// A device's state can't be taken.
    #[error("error while loading state: a device's state can't be loaded")]
    State {
        /// Which, and why.
        #[source]
        source: StateError,
    },
    /// Guest memory could not be reached.
    #[error("guest memory can't be written or read")]
    Memory {
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Bytes of a page did not come.
    #[error("the stream broke off at offset {offset:#x}, in a page of RAM")]
    Page {
        /// Offset in the stream.
        offset: u64,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A packet's compressed pages are none.
    #[error(
        "the compressed pages on connection {channel} of those that bring pages (multifd) can't be had"
    )]
    Compressed {
        /// Its number.
        channel: usize,
        /// Why.
        #[source]
        source: ZstdError,
    },
    /// One of the connections that pages come through.
    #[error(
        "connection {channel} of those that bring pages (multifd) {}",
        if crate::transport::is_stall(source) { "stands still" } else { "is lost" }
    )]
    Channel {
        /// Its number, from 0 on.
        channel: usize,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Not all connections have come.
    #[error(
        "the source sends pages over {expected} further connections (multifd), and {found} have come"
    )]
    ChannelsMissing {
        /// How many were announced.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// The comparison of RAM found a difference.
    #[error("the comparison at the switch-over failed")]
    RamDiffers {
        /// Where.
        #[source]
        source: RamDifference,
    },
    /// A device section has changed on its way.
    #[error(
        "device section {section} is not as the source sent it: its digest is {found:#018x}, the \
         source's {}", expected.map_or("missing".to_owned(), |digest| format!("{digest:#018x}"))
    )]
    SectionDamaged {
        /// Which.
        section: SectionId,
        /// The source's digest.
        expected: Option<u64>,
        /// This side's.
        found: u64,
    },
    /// The manifest has changed on its way.
    #[error(
        "the manifest is not as the source sent it: its digest is {found}, the source's {expected:?}"
    )]
    ManifestDamaged {
        /// The source's digest.
        expected: String,
        /// This side's.
        found: String,
    },
    /// The comparison of device state found a difference.
    #[error(
        "the comparison at the switch-over failed: section {section} differs when it is saved again: {}",
        differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    )]
    SectionDiffers {
        /// Its name and instance.
        section: SectionId,
        /// Which fields.
        differences: Vec<FieldError>,
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
    /// The disks can't be locked.
    #[error("the disks can't be taken")]
    Disks {
        /// The machine's reason.
        #[source]
        source: VmError,
    },
    /// The vCPUs can't be started.
    #[error("the VM can't be started")]
    Start {
        /// The machine's reason.
        #[source]
        source: VmError,
    },
    /// An answer could not be sent.
    #[error("{what}: the source can't be answered")]
    Answer {
        /// Which answer.
        what: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The source keeps the guest.
    #[error("the source gave up: {reason}")]
    SourceGaveUp {
        /// In its words.
        reason: String,
    },
    /// The source has said nothing for too long.
    #[error("the source stands still: nothing for {timeout:?}")]
    Stalled {
        /// How long this side has waited.
        timeout: Duration,
        /// What was to come.
        #[source]
        source: Box<DestinationError>,
    },
    /// Someone on this side asked for it.
    #[error("the migration was given up on this side")]
    Cancelled,
    /// This program has a fault.
    #[error("the destination can't go on")]
    Panicked {
        /// What the panic said.
        #[source]
        source: Panicked,
    },
}

fn problems(count: usize) -> String {
    match count {
        0 => "no problem".into(),
        1 => "one problem".into(),
        n => format!("{n} problems"),
    }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl DestinationError {
    pub(super) fn state(source: StateError) -> Self {
        Self::State { source }
    }

    /// What the error is to the hand-over.
    pub(super) fn event(&self) -> Event {
        match self {
            Self::Disks { .. } => Event::DisksRefused,
            Self::Start { .. } => Event::StartFailed,
            Self::Answer { .. } | Self::Page { .. } | Self::Stalled { .. } => Event::Lost,
            Self::Wire(error) if error.io().is_some() => Event::Lost,
            _ => Event::Failed,
        }
    }

    /// Whether nothing came in time.
    pub(super) fn is_stall(&self) -> bool {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            if error.downcast_ref::<io::Error>().is_some_and(is_stall) {
                return true;
            }
            cause = error.source();
        }
        false
    }

    /// The error and its causes, as one line.
    pub fn chain(&self) -> String {
        crate::wire::error_chain(self)
    }
}
