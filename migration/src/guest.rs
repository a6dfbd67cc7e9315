//! What a migration needs from a VM: its memory, its dirty pages, its life.
//!
//! The `vmm` crate implements these traits over a real machine, the tests of this crate over a
//! vector of bytes. Nothing here knows KVM.
//!
//! Who calls what, and in which order, on the source:
//!
//! ```text
//! blockers · manifest parts (machine_type, vcpus, ram, sections, details),
//!   or against_qemu and prepare_for_qemu
//! dirty_tracker → start → (fetch → (clear → read the pages)…)…        the guest runs
//! throttle, between two passes; none behind a pause or a failure
//! share_memory, in the place of all that reads pages                  the guest runs
//! exercise                                                            the guest runs
//! pause → drain → read_state                                          the guest stands still
//!   → fetch → … → Section::save for all; for a QEMU and a file the other way round
//! release_disks → hand_over                                           the other side runs it
//!                 reacquire_disks → resume                            or this side goes on
//! offer_memory, reclaim_memory: behind release_disks, ahead of reacquire_disks, if it was shared
//! stop (tracker)                                                      whatever it was
//! ```
//!
//! and on the destination:
//!
//! ```text
//! ram, accept_block, sections, check_details → expect                 before any page moves
//! GuestRam writes → exercise, pass after pass, or adopt_memory        the source's guest runs
//! Section::decode for all → Section::apply for all → prepare          nothing runs yet
//! take_disks → (claim_memory) → start                                 this side runs it
//! give_memory_back                                                    it never will
//! ```

use std::error::Error;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::dirty::DirtyBitmap;
use crate::handover::Arbiter;
use crate::manifest::{Problem, Scrap};
use crate::throttle::Rest;
use crate::transport::Connection;
use crate::vmstate::{FieldError, Section, SectionId};

/// The size of the pages that travel, in bytes: x86's small page, whatever backs the memory.
pub const PAGE_SIZE: u64 = 4096;

/// One named, contiguous piece of memory that moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlock {
    /// The name on the wire, for example `pc.ram`; at most 255 bytes.
    pub name: String,
    /// Length in bytes, a multiple of [`PAGE_SIZE`].
    pub len: u64,
}

/// A part of what is written to the stream: bytes of the format, or guest memory itself.
#[derive(Debug, Clone, Copy)]
pub enum IoPart<'a> {
    /// Headers and records.
    Bytes(&'a [u8]),
    /// `len` bytes of block number `block` from byte `offset` on. May cross as many of the
    /// implementer's mappings as it likes.
    Ram {
        /// Index into [`GuestRam::blocks`].
        block: usize,
        /// Offset in the block, in bytes.
        offset: u64,
        /// Length in bytes.
        len: usize,
    },
}

/// A part of what is read from the stream: into a buffer, or into guest memory itself.
#[derive(Debug)]
pub enum ReadPart<'a> {
    /// A buffer of the stream's reader.
    Bytes(&'a mut [u8]),
    /// `len` bytes of block number `block` from byte `offset` on.
    Ram {
        /// Index into [`GuestRam::blocks`].
        block: usize,
        /// Offset in the block, in bytes.
        offset: u64,
        /// Length in bytes.
        len: usize,
    },
}

/// Guest memory, by block and offset.
///
/// The engine has checked every block index, offset and length against [`blocks`](Self::blocks)
/// before it calls; an implementer that finds one out of range all the same returns
/// `InvalidInput`.
pub trait GuestRam: Send + Sync {
    /// The blocks, always in the same order; an index into this list names a block everywhere.
    /// It grows at its end only, by [`DestinationVm::accept_block`] and
    /// [`SourceVm::prepare_for_qemu`].
    fn blocks(&self) -> Vec<RamBlock>;

    /// Writes all parts to `out`, in order, with vectored writes straight from guest memory; any
    /// number of parts (split at the system's `IOV_MAX`). An interrupted call is repeated, a partial
    /// one continued. When `out` takes no more (`WouldBlock`: a blocking socket whose send timeout is
    /// over, or a non-blocking pipe that is full) `full` is asked: it returns when the write may be
    /// tried again, or the error that ends it.
    fn write_parts(
        &self,
        out: BorrowedFd<'_>,
        parts: &[IoPart<'_>],
        full: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()>;

    /// Puts at most `len` bytes, for which `pipe` has room, into it by reference, and returns how many; at least
    /// one. Whoever takes them out of there, or of the socket to which they go on, gets what is in memory then: a page
    /// is sent so when it was cleared in the log before ([`DirtyTracker`]), or when nobody writes to it any more. An
    /// implementer may copy instead, and one that can't do it at all says `Unsupported`, and is asked
    /// [`write_parts`](Self::write_parts).
    fn lend(
        &self,
        pipe: BorrowedFd<'_>,
        block: usize,
        offset: u64,
        len: usize,
    ) -> io::Result<usize> {
        let _ = (pipe, block, offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// One vectored read from `from` into the parts, in order. Returns how many bytes came, as
    /// `readv` does: 0 is the end of the stream, fewer than asked for is no error. An interrupted
    /// call is repeated; `WouldBlock` (a receive timeout, or an empty pipe) is returned as it is.
    fn read_parts(&self, from: BorrowedFd<'_>, parts: &mut [ReadPart<'_>]) -> io::Result<usize>;

    /// Copies `bytes` to the block from byte `offset` on.
    fn copy_in(&self, block: usize, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Copies from the block into `buf`: for digests and comparisons, not for the data path.
    fn copy_out(&self, block: usize, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Sets `len` bytes to `byte`. Filling with zero a range that reads as zero already should
    /// not make the host allocate memory for it.
    fn fill(&self, block: usize, offset: u64, len: u64, byte: u8) -> io::Result<()>;

    /// Asks the host for the memory of `len` bytes now, so that writing there later is quick.
    /// Changes no content. Only a hint: where it can't be followed, nothing is lost.
    fn populate(&self, block: usize, offset: u64, len: u64);

    /// Which pages of `len` bytes from `offset` on (both whole pages) the host has no memory for, so
    /// that they read as zero and need not be looked at: bit `i` of word `n` is page `64 * n + i` of
    /// them. May be raced by the guest as [`is_zero`](Self::is_zero). `None` where that is not known.
    fn absent(&self, block: usize, offset: u64, len: u64) -> Option<Vec<u64>> {
        let _ = (block, offset, len);
        None
    }

    /// How many pages from `offset` on, one after the other and within `len` bytes (both whole pages), the host has
    /// no memory for: what [`absent`](Self::absent) says, in one step for memory that was never used. 0 also
    /// where that is not known.
    fn absent_ahead(&self, block: usize, offset: u64, len: u64) -> u64 {
        let _ = (block, offset, len);
        0
    }

    /// Whether the page at `offset` is all zero. May be raced by the guest: a page that changes
    /// afterwards is dirty and comes again.
    fn is_zero(&self, block: usize, offset: u64) -> bool;
}

/// The record of which pages have been written: the hypervisor's log and the devices' bitmap.
///
/// A page counts as dirty until it is *cleared*, and the engine clears it **before** it reads it,
/// so that a write that comes between is not lost:
///
/// ```text
/// fetch: bits ORed into the engine's bitmap  →  clear(chunk)  →  read and send the chunk's pages
/// ```
///
/// What was fetched and not delivered stays in the engine's bitmap, so nothing is ever given back.
pub trait DirtyTracker: Send {
    /// Starts recording. From here on every write is noted; what was written before is not, so
    /// the engine sends every page once after it.
    fn start(&mut self) -> Result<(), VmError>;

    /// ORs every page written since it was last cleared into `into`. An implementation whose
    /// log clears itself when it is read may do so: the bits are in `into` then.
    fn fetch(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError>;

    /// Forgets exactly the pages whose bits are set: bit `i` of `bits[n]` is page
    /// `first_page + 64 * n + i` of the block. `first_page` is a multiple of 64; bits behind the
    /// block's end are 0. Pages whose bit is 0 keep their state, also when they are dirty.
    fn clear(&mut self, block: usize, first_page: u64, bits: &[u64]) -> Result<(), VmError>;

    /// How many pages each vCPU has been found to write since [`start`](Self::start), by their indices; one
    /// that was fetched in between counts again, and one that several write belongs to the first. Of two
    /// answers only the difference means something. `None` where it is not known who wrote what.
    fn by_vcpu(&self) -> Option<Vec<u64>> {
        None
    }

    /// Stops recording. Called once after every successful [`start`](Self::start), also after a
    /// failure; must be able to run when the guest runs.
    fn stop(&mut self);
}

/// Something that the machine could not do, and why.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct VmError {
    /// What failed, as a sentence that names the part of the machine.
    pub what: String,
    /// The operating system's or the hypervisor's reason.
    #[source]
    pub source: Option<Box<dyn Error + Send + Sync>>,
}

impl VmError {
    /// A failure that has no further cause.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None }
    }

    /// A failure with its cause.
    pub fn with(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { what: what.into(), source: Some(source.into()) }
    }
}

/// What both sides of a migration can say about their machine.
pub trait Machine: Send {
    /// The versioned machine type, for example `pc-i440fx-7.2`.
    fn machine_type(&self) -> String;

    /// The number of vCPUs.
    fn vcpus(&self) -> u32;

    /// Its UUID; zero where it has none.
    fn uuid(&self) -> [u8; 16];

    /// Its memory.
    fn ram(&self) -> Arc<dyn GuestRam>;

    /// Its sections, in the order in which they travel. Called more than once; every call gives
    /// handles to the same devices.
    fn sections(&self) -> Vec<Box<dyn Section>>;

    /// What else the other side must have: PCI slots, queue counts, CPU features, disk sizes. An
    /// opaque object to the engine; compared by [`DestinationVm::check_details`].
    fn details(&self) -> serde_json::Value;

    /// Does once, for nothing, what will be done when the guest stands still, so that it is done faster then.
    /// Called right before that, and more than once; the source's guest runs, and neither changes nor waits for it.
    fn exercise(&self) {}
}

/// How disks are found that are taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TakenBack {
    /// Nobody has written to them.
    AsLeft,
    /// Somebody has; a sentence says to which, and when. The locks are held.
    Changed(String),
    /// Someone else holds a lock; a sentence says on which. None is held.
    Held(String),
}

/// Who holds the locks on disks that have been given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// Nobody.
    Nobody,
    /// Someone, of whom nothing is known; a sentence says on which disk.
    Someone(String),
    /// A mini-vmm to which a guest has come and has started; a sentence says on which disk.
    RunningGuest(String),
}

/// How memory is found that was offered to a destination on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reclaimed {
    /// It is this side's, for ever.
    Kept,
    /// The destination has taken it.
    Taken,
    /// ... and has let its vCPUs run.
    Runs,
}

/// What a VM says whose memory can't be given to another process.
fn no_shared_memory() -> VmError {
    VmError::new("the memory of this VM can't be given to another process")
}

/// A VM that can be given away.
pub trait SourceVm: Machine {
    /// Why this VM can't be migrated at all, each a sentence; empty when it can.
    fn blockers(&self) -> Vec<String>;

    /// What stands against a QEMU as the destination, which can't be asked, as the VM is now: what is
    /// fatal is state that the guest would lose there. Nothing changes, and the guest runs on.
    fn against_qemu(&self) -> Result<Vec<Problem>, VmError>;

    /// The destination has turned out to be a QEMU, which can't be asked whether the VM fits:
    /// gets ready what only such a destination is sent (more RAM blocks), and refuses what it
    /// could not be given. Nothing but the header has been sent so far.
    fn prepare_for_qemu(&mut self) -> Result<(), VmError>;

    /// The scraps of RAM that the devices' states rely on while they are loaded. Called when everything
    /// stands still.
    fn scraps(&self) -> Vec<Scrap>;

    /// A tracker for this VM's memory, not yet started.
    fn dirty_tracker(&mut self) -> Result<Box<dyn DirtyTracker>, VmError>;

    /// Makes the vCPUs rest for so much of the time (0 to 99 percent), in turns so short that the guest
    /// feels it evenly; [`Rest::NONE`] ends it at once. It has no meaning for a VM that stands still, must
    /// not delay a [`pause`](Self::pause), and is over at the latest when this is dropped.
    fn throttle(&mut self, rest: &Rest) -> Result<(), VmError>;

    /// Asks the disks to bring to safety what was written, while the guest runs, so that
    /// [`drain`](Self::drain) has little left to do. Returns at once; what fails is told to the guest by its
    /// own next flush, and to `drain`. Called in every pass.
    fn flush_ahead(&mut self) {}

    /// Stops every vCPU and notes whether they were running. When it fails, whatever it had
    /// stopped runs again. A VM that was paused before stays paused and this succeeds.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Called once after [`pause`](Self::pause): finishes all requests in flight, flushes the
    /// disks, and leaves every device such that it writes nothing any more, neither to guest
    /// memory nor to its back end. After a failure [`resume`](Self::resume) is called.
    fn drain(&mut self) -> Result<(), VmError>;

    /// Called once after [`drain`](Self::drain): reads what the hypervisor holds of vCPUs and devices, which may
    /// make it write to guest memory. [`Section::save`] then only writes down what was read.
    fn read_state(&mut self) -> Result<(), VmError>;

    /// Back to the run state that [`pause`](Self::pause) found: devices first, then vCPUs if they
    /// were running.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Gives up the locks on the disks' images; from here on nothing is written to them. When it
    /// fails some may be held and some not, and [`reacquire_disks`](Self::reacquire_disks) is called.
    fn release_disks(&mut self) -> Result<(), VmError>;

    /// How [`release_disks`](Self::release_disks) has left the disks: what the destination must find
    /// ([`DestinationVm::take_disks`]), or the order to run the VM is no longer good.
    fn left_disks(&self) -> serde_json::Value;

    /// What tells who may run the VM when nobody answers: the locks on its disks, if it writes to
    /// any whose locks every host sees that may run it.
    fn arbiter(&self) -> Arbiter;

    /// Takes back the locks that [`release_disks`](Self::release_disks) gave up; those that are held
    /// stay so. When someone else holds one, or it fails, none is held and the VM must not run. Disks
    /// that are found as they were left are changed such that
    /// [`left_disks`](Self::left_disks) is true of them no more.
    fn reacquire_disks(&mut self) -> Result<TakenBack, VmError>;

    /// Looks who holds the locks that [`release_disks`](Self::release_disks) gave up, and takes
    /// none.
    fn probe_disks(&mut self) -> Result<Holder, VmError>;

    /// Gives a destination on this host the first block's memory itself, and a new
    /// [ledger](crate::handover::ledger) for this attempt: as descriptors, with one byte that begins nothing
    /// else, over this Unix socket. The guest runs, and nothing changes for it.
    fn share_memory(&mut self, over: BorrowedFd<'_>) -> Result<(), VmError> {
        let _ = over;
        Err(no_shared_memory())
    }

    /// Notes in the ledger that the memory is whose who takes it. Called when everything stands still, right
    /// before COMMIT.
    fn offer_memory(&mut self) -> Result<(), VmError> {
        Err(no_shared_memory())
    }

    /// Takes the memory back, if the ledger lets it. May be called again and again.
    fn reclaim_memory(&mut self) -> Result<Reclaimed, VmError> {
        Err(no_shared_memory())
    }

    /// The other side runs the VM. This one must never run it again, nor touch memory that it has shared.
    fn hand_over(&mut self);
}

/// A VM that waits to become what another one was. Its vCPUs have never run.
pub trait DestinationVm: Machine {
    /// Compares what the source's [`Machine::details`] says with this machine; every difference
    /// that would make the migration fail or the guest misbehave is one problem.
    fn check_details(&mut self, source: &serde_json::Value) -> Vec<Problem>;

    /// The VM comes now: does what need not wait for its state, so that the guest need not wait for it.
    fn expect(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// How a thread that brings pages in is told, on that thread, to give way to the guests of this host (`true`) or
    /// not to any more (`false`). It does so while it reads a section of RAM and the source's guest runs.
    fn give_way(&self) -> fn(bool) {
        |_| ()
    }

    /// A block comes that [`GuestRam::blocks`] does not have: a QEMU sends its firmware, option
    /// ROMs and ACPI tables as blocks of their own. `true` when this machine can keep it; from
    /// then on it is the last of its blocks, zeroed, and written to like any other.
    fn accept_block(&mut self, block: &RamBlock) -> bool;

    /// A further connection of the source's, which waits to be taken or comes within `timeout`; none where
    /// only one can come.
    fn next_connection(&mut self, timeout: Duration) -> Result<Option<Connection>, VmError> {
        let _ = timeout;
        Ok(None)
    }

    /// Called after each RAM section of a source that is no mini-vmm, and before [`prepare`](Self::prepare). An error ends the migration: what
    /// such a source sends beside this stream is nothing that the VM could do without.
    fn between_sections(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Takes the first block's memory and a ledger as [`SourceVm::share_memory`] sends them: reads that one
    /// byte, and no other. The source's guest runs in that memory, so that not a byte may be written there
    /// before [`claim_memory`](Self::claim_memory). When it fails, this VM's memory is as it was.
    fn adopt_memory(&mut self, from: BorrowedFd<'_>) -> Result<(), VmError> {
        let _ = from;
        Err(no_shared_memory())
    }

    /// Takes the memory that was adopted for this side's own, by the ledger. Everything that could fail has
    /// been done when it returns, so that [`start`](Self::start) hardly will. Fails if the source has taken the
    /// guest back.
    fn claim_memory(&mut self) -> Result<(), VmError> {
        Err(no_shared_memory())
    }

    /// The guest will never run here: lets go of the memory that was adopted, and then notes in the ledger
    /// that it is the source's, if it was taken.
    fn give_memory_back(&mut self) {}

    /// Called after every section has been applied: builds what is still missing, and does
    /// everything that could fail, so that [`start`](Self::start) will not. Nothing runs yet, no
    /// disk is written.
    fn prepare(&mut self) -> Result<(), VmError>;

    /// A rehearsal begins: puts the scraps into memory, wherever they belong.
    fn begin_rehearsal(&mut self, scraps: &[Scrap]) -> Result<(), VmError>;

    /// A rehearsal is over, and every section has the state again that it had before; takes the scraps
    /// out of memory, and builds what follows from the state, so that the VM is as it was.
    fn end_rehearsal(&mut self, scraps: &[Scrap]) -> Result<(), VmError>;

    /// Locks the disks' images and opens them for writing; fails if they are not as the source has left
    /// them ([`SourceVm::left_disks`]; null where it does not say). When it fails none is locked.
    fn take_disks(&mut self, left: &serde_json::Value) -> Result<(), VmError>;

    /// Gives the locks back, after a failed start.
    fn release_disks(&mut self);

    /// Lets the machine go on in the run state that came with it (a VM that was paused stays
    /// paused), notes that in the ledger if there is one, and announces it on its networks. Gives the time
    /// since which it does. An error means that no vCPU has run.
    fn start(&mut self) -> Result<Instant, VmError>;

    /// For a verified migration: the differences between a section's body as it was received and
    /// as this machine saves it again, leaving out what changes by itself (a running TSC). Called
    /// only when the bytes differ.
    fn section_differences(
        &self,
        section: &SectionId,
        received: &[u8],
        saved_again: &[u8],
    ) -> Vec<FieldError>;
}
