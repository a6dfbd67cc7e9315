//! Who runs the VM: the hand-over as two state machines without I/O.
//!
//! Events go in, an [`Action`](source::Action) comes out; the drivers in [`crate::source`] and
//! [`crate::destination`] carry actions out and report what came of them, and a model checker
//! (`handover/model.rs`) does the same with every loss, crash and delay. Neither machine has a
//! clock, a socket or a VM.
//!
//! ```text
//! SOURCE
//!                   Switch             Paused                StateSent (mini-vmm)
//!        ┌───────┐ ─Pause──→ ┌───────┐ ─Send──→ ┌───────┐ ────────────→ ┌────────────────┐
//!        │Running│           │Pausing│          │Sending│               │AwaitingPrepared│
//!        └───────┘           └───────┘          └───────┘               └────────────────┘
//!            │Failed             │Failed            │Failed  │StateSent(QEMU)  │Prepared │Failed
//!            ↓                   ↓                  ↓        └────────┐        │         ↓
//!         ┌────┐  Resumed    ┌────────┐←────────────┴─────────────────┼────────┼─────────┘
//!         │Kept│←────────────│Resuming│                               ↓        ↓ ReleaseDisks
//!         └────┘             └────────┘                        ┌──────────────┐
//!         ┌───────────┐        │   ↑         DisksKept          │ReleasingDisks│
//!         │KeptStopped│←───────┘   │        ┌───────────────────└──────────────┘
//!         └───────────┘ ResumeFailed│DisksTaken                     │DisksReleased → Commit
//!                            ┌─────────────┐ Refused, NotCommitted  ↓  ← POINT OF NO RETURN
//!                            │RetakingDisks│←─────────────────┌──────────┐
//!                            └─────────────┘                  │Committing│
//!     ResumeHere (guarded),↑  │DisksLost, DisksFailed,        └──────────┘
//!                  Refused │  ↓DisksChanged (guarded)     Lost,  │    │Confirmed
//!                         ┌───────┐                      Failed   │    ↓ HandOver
//!                         │InDoubt│←──────────────────────────────┘  ┌──────────┐
//!                         └───────┘ Confirmed, Discard (said so)  ──→│HandedOver│
//!     DisksLost, DisksFree,↑  │Discard (guarded)                     └──────────┘
//!              DisksFailed │  ↓ or Look              DisksInUse        ↑
//!                         ┌────────────┐ ──────────────────────────────┘
//!                         │ProbingDisks│ ── after Look: DisksFree → RetakingDisks
//!                         └────────────┘
//!
//! DESTINATION
//!  ┌─────────┐ Received  ┌─────────┐ Prepared (mini-vmm)  ┌──────────────┐ Commit
//!  │Receiving│─Prepare──→│Preparing│────SendPrepared─────→│AwaitingCommit│───┐ TakeDisks
//!  └─────────┘           └─────────┘                      └──────────────┘   ↓
//!       │Failed               │ │ Prepared (QEMU)                │Failed  ┌───────────┐
//!       ↓                     │ └────────────────TakeDisks───────┼───────→│TakingDisks│
//!   ┌──────┐←─────────────────┴──────────────────────────────────┘        └───────────┘
//!   │Failed│←──────────────────────────DisksRefused─────────────────────────│   │DisksTaken
//!   └──────┘                                                 (mini-vmm) Start   │(QEMU) SendShut
//!       ↑   StartFailed: ReleaseDisks   ┌────────┐←─────────────────────────┘   ↓
//!       ├───────────────────────────────│Starting│  Acknowledged: Start ┌─────────────┐
//!       │                               └────────┘←─────────────────────│Acknowledging│
//!       │                                   │Started                    └─────────────┘
//!       │                                   ↓                                   │Failed:
//!       │                               ┌───────┐                               │ReleaseDisks
//!       └───────────────────────────────│Running│───────────────────────────────┘
//!                                       └───────┘
//! ```
//!
//! The rules behind it:
//!
//! - **The point of no return is the first byte of COMMIT**, not the last: a write that fails half
//!   way may have been enough. A QEMU knows no COMMIT; the last bytes of the stream (EOF and the
//!   description) take its place, after everything else has gone.
//! - Before it, every failure resumes the source. After it, only an *answer* moves the source:
//!   `shut(0)` says that the other side runs, an explicit refusal says that it never will. A broken
//!   connection, or silence, is neither.
//! - In doubt the source asks over another connection, and the answer is as good as one on the first:
//!   a destination says that the guest runs when it has started, and that it never will when it has
//!   failed for good; before that it says nothing. Who knows nothing of the migration decides nothing.
//! - Where nobody answers, disks that nobody holds and that are as they were left may be taken back
//!   unasked, since COMMIT is good only for disks as they were left ("fenced"), and taking them back
//!   changes them: a destination that wakes up late finds them taken, or changed, and refuses.
//! - An operator may settle a doubt, but a plain word of his makes neither two running guests nor
//!   none: to resume, the disks must be free and as they were left; to end this copy, they must be
//!   marked as those of a guest that has started elsewhere (that somebody holds them is not enough,
//!   for a destination takes them before it starts, and may fail to). Where no disk can tell, he has
//!   to say in so many words what is so there.
//! - A destination that refuses after COMMIT has decided for ever before it says so.
//! - Disk locks are given up before COMMIT and taken before the first vCPU runs, so that the
//!   kernel arbitrates between two sides that both believe the VM is theirs.
//! - Where the memory itself changes hands and is not copied ([`ledger`]), a source takes nothing back
//!   before the ledger says that it may, whoever wishes it: neither an operator's word nor a free disk is
//!   worth more. So it may look there at once when the connection breaks; and the destination lets no vCPU
//!   run before it has the memory.
//! - Where nobody answers, nobody runs the guest before the stream is whole: a write or a flush that
//!   fails is a refusal, and so is a command that ends badly.
//! - A QEMU source resumes when the connection breaks before it has read `shut(0)`; so to a QEMU
//!   `shut(0)` is sent before the guest starts, and the guest does not start when it can't be sent.

pub mod destination;
pub mod ledger;
pub mod source;

use serde::{Deserialize, Serialize};

/// What the other side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Peer {
    /// It knows PREPARED and COMMIT.
    MiniVmm,
    /// It knows the stream and `shut`.
    Qemu,
    /// A file, a pipe or a command, which answers nothing: what was written is all that is known.
    /// Only a source has such a peer.
    Nobody,
}

/// What tells who may run the guest when nobody answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arbiter {
    /// The locks on its disks' images: whoever holds them may run it, and only one can.
    DiskLocks,
    /// Nothing: the VM has no disk that it writes to, or none whose locks both sides see.
    Nothing,
}

#[cfg(test)]
mod diagram;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
