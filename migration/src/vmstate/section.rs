//! Sections: the parts of a machine that have state of their own.

use std::any::Any;
use std::fmt;
use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{FieldError, StateError, Words};

/// Who will read what is being written. A QEMU gets exactly QEMU's layouts; a mini-vmm also gets the
/// subsections named `mini-vmm/…`, for what QEMU's layouts have no place for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// A QEMU 7.2.
    Qemu,
    /// A mini-vmm that restores a saved VM, in which a QEMU finds what is for it, or one that has never heard of
    /// shorter forms.
    Restore,
    /// A mini-vmm that waits for it while the guest stands still, and has said that it reads shorter forms
    /// ([`SHORT`](crate::manifest::SHORT)): where QEMU's layouts have room for far more than there is, it gets a
    /// `mini-vmm/…` subsection instead. No digest of a layout tells of that one.
    MiniVmm,
}

/// The key of a section on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SectionId {
    /// For example `cpu`, or `0000:00:02.0/virtio-net`.
    pub idstr: String,
    /// The vCPU's index for `cpu` and `cpu_common`, the APIC id for `apic`, mostly 0.
    pub instance: u32,
}

impl SectionId {
    /// The section `idstr`, instance `instance`.
    pub fn new(idstr: impl Into<String>, instance: u32) -> Self {
        Self { idstr: idstr.into(), instance }
    }
}

impl fmt::Display for SectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.instance {
            0 => f.write_str(&self.idstr),
            n => write!(f, "{} (instance {n})", self.idstr),
        }
    }
}

/// Bytes of a stream, read in order, with a view of what comes next.
pub trait ByteSource {
    /// Fills `buf`, or fails with `UnexpectedEof`.
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()>;
    /// The next `n` bytes (`n` at most 512) without taking them; fewer only at the stream's end.
    fn peek(&mut self, n: usize) -> io::Result<&[u8]>;
    /// How many bytes of the stream have been taken so far.
    fn offset(&self) -> u64;
}

/// State as it is declared: a plain struct that QEMU's format can write and read.
pub trait VmState: Serialize + DeserializeOwned + Send + fmt::Debug + 'static {
    /// The version that is written.
    const VERSION: u32;
    /// The oldest version that is read.
    const MIN_VERSION: u32 = Self::VERSION;
    /// QEMU's words for the description.
    const WORDS: Words = Words::DECLARED;
}

/// A device whose state moves.
///
/// What is saved and restored is read and set with every vCPU stopped and the device paused. `save` and `check` may be
/// called at any other time too, for nothing: they change nothing, and wait for nothing that takes long.
pub trait Migratable {
    /// What is written down.
    type State: VmState;

    /// The state as it is now. For [`Audience::Qemu`] every `mini-vmm/…` subsection stays `None`.
    fn save(&self, audience: Audience) -> Result<Self::State, FieldError>;

    /// Checks every value that indexes, sizes or addresses something, against this device as it
    /// is configured. Touches nothing.
    fn check(&self, state: &Self::State) -> Result<(), FieldError>;

    /// Takes a state that [`check`](Self::check) has accepted, and rebuilds every fact that is
    /// derived from it with the same functions that a register write uses.
    fn restore(&mut self, state: Self::State) -> Result<(), FieldError>;
}

/// Makes a section's description in QEMU's words.
pub type Description = Box<dyn FnOnce() -> Result<Value, StateError>>;

/// One section of a machine, whatever device stands behind it.
pub trait Section: Send {
    /// Its key on the wire.
    fn id(&self) -> SectionId;
    /// The version that is written.
    fn version(&self) -> u32;
    /// The oldest version that is read.
    fn min_version(&self) -> u32;
    /// The section's body, without header and footer. Writes nothing to guest memory, and asks the hypervisor nothing
    /// that would: on its way to a mini-vmm a section is saved behind the last pages.
    fn save(&self, audience: Audience) -> Result<Vec<u8>, StateError>;
    /// Reads a body of the given version and checks it. Touches nothing.
    fn decode(
        &self,
        version: u32,
        source: &mut dyn ByteSource,
    ) -> Result<Box<dyn Any + Send>, StateError>;
    /// Takes what [`decode`](Self::decode) gave.
    fn apply(&mut self, state: Box<dyn Any + Send>) -> Result<(), StateError>;
    /// The same with its description, both of one and the same state. The device is read once, and the
    /// description is not made before it is asked for: the guest stands still, and the other side can
    /// already load what has been sent.
    fn save_described(&self, audience: Audience) -> Result<(Vec<u8>, Description), StateError>;
    /// A digest of everything that [`save`](Self::save) could write: two sides whose digests are
    /// equal understand each other.
    fn layout_digest(&self) -> u64;
}
