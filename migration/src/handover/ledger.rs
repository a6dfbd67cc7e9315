//! Whose memory it is, when the memory itself changes hands and is not copied: a word that source and
//! destination both see, and that each of them changes only in one step (compare and exchange).
//!
//! ```text
//!          Offer             Take             Start
//! ┌──────┐ source ┌───────┐ dest. ┌─────┐ destination ┌────┐
//! │Unused│───────→│Offered│──────→│Taken│────────────→│Runs│
//! └──────┘        └───────┘       └─────┘             └────┘
//!     │Keep   Keep│  source          │Return: no vCPU has run
//!     │           ↓                  ↓
//!     │        ┌────┐    Keep   ┌────────┐
//!     └───────→│Kept│←──────────│Returned│
//!              └────┘  source   └────────┘
//! ```
//!
//! COMMIT offers the memory. The destination takes it right before its vCPUs run, and the source that wants
//! its guest back keeps it; whoever comes first has it, and the other one finds out. So nobody is in doubt
//! for long: a destination that is gone and had not taken the memory never will, and memory in which a
//! guest has perhaps run elsewhere never goes on here with the registers that it had before.

use std::sync::atomic::{AtomicU32, Ordering};

/// How often a change is tried that another change forestalls. Two sides that keep the rules forestall each
/// other twice at most.
const TRIES: usize = 16;

/// What stands in the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Entry {
    /// The memory is the source's, and has not been offered.
    Unused,
    /// It is whose who takes it first.
    Offered,
    /// It is the destination's, whose vCPUs are about to run or do.
    Taken,
    /// The destination's vCPUs have been let go.
    Runs,
    /// The destination had it, has let no vCPU run, and has given it up for ever.
    Returned,
    /// It is the source's, for ever.
    Kept,
}

/// What somebody wants to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mark {
    /// The source, right before COMMIT.
    Offer,
    /// The destination, right before its vCPUs run.
    Take,
    /// The destination, as soon as they do.
    Start,
    /// The destination, if they don't after all.
    Return,
    /// The source that wants its guest back.
    Keep,
}

impl Entry {
    /// All of them, by their words.
    const ALL: [Self; 6] =
        [Self::Unused, Self::Offered, Self::Taken, Self::Runs, Self::Returned, Self::Kept];

    /// What a word means. One that nobody writes who keeps the rules says the least: that the memory is
    /// perhaps somebody else's.
    fn of(word: u32) -> Self {
        Self::ALL.into_iter().find(|entry| entry.word() == word).unwrap_or(Self::Taken)
    }

    /// Memory that was never written to is [`Unused`](Self::Unused).
    fn word(self) -> u32 {
        self as u32
    }

    /// What stands there afterwards; none if that can't be done.
    #[must_use]
    pub fn after(self, mark: Mark) -> Option<Self> {
        match (self, mark) {
            (Self::Unused, Mark::Offer) => Some(Self::Offered),
            (Self::Offered, Mark::Take) => Some(Self::Taken),
            (Self::Taken, Mark::Start) => Some(Self::Runs),
            (Self::Taken, Mark::Return) => Some(Self::Returned),
            // To keep what was kept before is nothing new.
            (Self::Unused | Self::Offered | Self::Returned | Self::Kept, Mark::Keep) => {
                Some(Self::Kept)
            }
            _ => None,
        }
    }
}

/// The ledger of one attempt, wherever its word is.
#[derive(Debug, Clone, Copy)]
pub struct Ledger<'a>(&'a AtomicU32);

impl<'a> Ledger<'a> {
    /// The ledger in this word, which is 0 at first.
    pub fn new(word: &'a AtomicU32) -> Self {
        Self(word)
    }

    /// What stands there now.
    #[must_use]
    pub fn entry(&self) -> Entry {
        Entry::of(self.0.load(Ordering::SeqCst))
    }

    /// Does it, and gives what stands there then.
    ///
    /// # Errors
    /// What stands there, if it can't be done.
    pub fn mark(&self, mark: Mark) -> Result<Entry, Entry> {
        let mut word = self.0.load(Ordering::SeqCst);
        for _ in 0..TRIES {
            let now = Entry::of(word);
            let next = now.after(mark).ok_or(now)?;
            match self.0.compare_exchange(word, next.word(), Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Ok(next),
                Err(other) => word = other,
            }
        }
        Err(Entry::Taken)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const MARKS: [Mark; 5] = [Mark::Offer, Mark::Take, Mark::Start, Mark::Return, Mark::Keep];

    #[test]
    fn every_pair_of_entry_and_mark_does_what_the_table_says() {
        use Entry::*;
        for (entry, after) in [
            (Unused, [Some(Offered), None, None, None, Some(Kept)]),
            (Offered, [None, Some(Taken), None, None, Some(Kept)]),
            (Taken, [None, None, Some(Runs), Some(Returned), None]),
            (Runs, [None; 5]),
            (Returned, [None, None, None, None, Some(Kept)]),
            (Kept, [None, None, None, None, Some(Kept)]),
        ] {
            for (mark, after) in MARKS.into_iter().zip(after) {
                let word = AtomicU32::new(entry.word());
                let ledger = Ledger::new(&word);
                assert_eq!(ledger.entry(), entry);
                assert_eq!(ledger.mark(mark), after.ok_or(entry), "{entry:?} {mark:?}");
                assert_eq!(ledger.entry(), after.unwrap_or(entry), "{entry:?} {mark:?}");
            }
        }
        assert_eq!(Ledger::new(&AtomicU32::default()).entry(), Unused);
    }

    #[test]
    fn a_word_that_nobody_writes_gives_nobody_the_memory() {
        for strange in [6, 77, u32::MAX] {
            let word = AtomicU32::new(strange);
            let ledger = Ledger::new(&word);
            for mark in [Mark::Offer, Mark::Take, Mark::Keep] {
                assert_eq!(ledger.mark(mark), Err(Entry::Taken), "{strange}");
            }
            assert_eq!(word.into_inner(), strange);
        }
    }

    #[test]
    fn of_two_that_want_it_one_has_it() {
        for _ in 0..200 {
            let word = AtomicU32::new(Entry::Offered.word());
            let begin = std::sync::Barrier::new(2);
            let want = |mark| {
                begin.wait();
                Ledger::new(&word).mark(mark).is_ok()
            };
            let (taken, kept) = thread::scope(|scope| {
                let taker = scope.spawn(|| want(Mark::Take));
                (want(Mark::Keep), taker.join().expect("no panic"))
            });
            assert_ne!(taken, kept, "both have it, or nobody");
        }
    }
}
