//! The hand-over under a model checker: the same machines that the engine drives, in a world in
//! which everything goes wrong that can.
//!
//! The world has two sides, each a process that may be killed at any moment; the locks on the
//! disks, and in one host a ledger of whose the memory is; a connection whose messages are lost, delayed, and come twice; questions of a source in
//! doubt, whose answers are lost, late, or another process's; and an operator, who asks for anything
//! at any time, but says in so many words only what is true. A killed VM with disks
//! may be booted anew from them; a destination may be started again; a migration that failed may
//! be tried again. The checker goes through every order of all this.
//!
//! The bounds: two attempts, one message that comes twice, one death of each process. A machine
//! that was booted anew lives on: what happens to its disk is no concern of a hand-over.

mod checks;
mod guards;
mod steps;

use super::destination::{Action as DAction, Destination};
use super::ledger::Entry;
use super::source::{Action as SAction, Source};
use super::{Arbiter, Peer};

use guards::Guard;

/// A message between the two, as far as the hand-over cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Msg {
    /// All that comes before the point of no return.
    State,
    Prepared,
    /// COMMIT; to a QEMU, the end of the stream.
    Commit,
    Shut0,
    Refused,
}

/// What a destination says when it is asked what became of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Answer {
    Runs,
    NeverHere,
    /// It is another one.
    Unknown,
}

/// One of the two processes, and what is really so there, whatever its machine believes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Side {
    /// The process that takes part in the migration lives.
    alive: bool,
    /// It is dead, and the VM has been booted anew from its disks in another.
    booted: bool,
    /// vCPUs execute.
    runs: bool,
    /// The disks' locks are held.
    locks: bool,
}

impl Side {
    const DEAD: Self = Self { alive: false, booted: false, runs: false, locks: false };
    const BOOTED: Self = Self { alive: false, booted: true, runs: true, locks: true };
}

/// What has gone wrong for good in one step and can't be seen in the world after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Harm {
    /// Memory went on, on either side, over disks on which the guest had gone on since; or memory in which
    /// it had gone on since went on with older registers.
    OldMemory,
    /// The last copy of the guest was ended by a command that did not say so.
    CopyLost,
    /// The guest was given away to somebody who never ran it.
    GivenToNobody,
}

/// Both machines and all there is around them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    source: Source,
    source_todo: SAction,
    here: Side,
    destination: Destination,
    destination_todo: DAction,
    there: Side,
    forth: Vec<Msg>,
    back: Vec<Msg>,
    connected: bool,
    /// A question of the source is on its way, over a connection of its own.
    asked: bool,
    /// An answer to it is.
    answer: Option<Answer>,
    /// A message has come twice.
    duplicated: bool,
    /// A destination has been started again.
    restarted: bool,
    /// ... and nobody has connected to it.
    new_there: bool,
    /// A second attempt has begun.
    second: bool,
    /// Whose memory it is, where that is not copied.
    ledger: Option<Entry>,
    /// Somebody has written to the disks since the source gave them up.
    disk_changed: bool,
    /// The source has taken the disks back since, and has changed their stamp by that.
    taken_back: bool,
    /// The operator has accepted that.
    change_accepted: bool,
    /// COMMIT has left the source.
    committed: bool,
    /// The destination has held everything.
    prepared: bool,
    /// The guest has run at the destination.
    ran_there: bool,
    /// Since COMMIT there has been more than silence: an answer or the operator's word.
    evidence: bool,
    harm: Option<Harm>,
}

/// What is checked.
#[derive(Debug, Clone)]
struct Handover {
    arbiter: Arbiter,
    /// What the destination is: a QEMU says neither PREPARED nor hears COMMIT.
    peer: Peer,
    /// Both are processes of one host, and the memory changes hands by a ledger.
    local: bool,
    /// The guard that is broken on purpose.
    broken: Option<Guard>,
    /// Worlds from which a good end is known to be in reach.
    hopeful: checks::Hopeful,
    /// ... and needs no operator.
    hopeful_alone: checks::Hopeful,
}

impl Handover {
    fn new(arbiter: Arbiter, peer: Peer) -> Self {
        let (hopeful, hopeful_alone) = Default::default();
        Self { arbiter, peer, local: false, broken: None, hopeful, hopeful_alone }
    }

    /// The memory changes hands, and is not copied.
    fn local(self) -> Self {
        Self { local: true, ..self }
    }

    fn new_destination(&self) -> Destination {
        // A QEMU that has loaded everything waits for the end of the stream as a mini-vmm
        // waits for COMMIT; it only does not say so.
        let destination = Destination::new(Peer::MiniVmm);
        if self.local { destination.by_ledger() } else { destination }
    }

    fn has_disks(&self) -> bool {
        self.arbiter == Arbiter::DiskLocks
    }

    fn beginning(&self) -> World {
        let source = Source::new(self.peer, self.arbiter);
        let source = if self.local { source.by_ledger() } else { source };
        World {
            // A QEMU can't be asked, and looks at no stamp.
            source: if self.peer == Peer::MiniVmm { source.fenced() } else { source },
            source_todo: SAction::None,
            here: Side { alive: true, booted: false, runs: true, locks: true },
            destination: self.new_destination(),
            destination_todo: DAction::None,
            there: Side { alive: true, booted: false, runs: false, locks: false },
            forth: Vec::new(),
            back: Vec::new(),
            connected: true,
            asked: false,
            answer: None,
            duplicated: false,
            restarted: false,
            new_there: false,
            second: false,
            ledger: self.local.then_some(Entry::Unused),
            disk_changed: false,
            taken_back: false,
            change_accepted: false,
            committed: false,
            prepared: false,
            ran_there: false,
            evidence: false,
            harm: None,
        }
    }
}
