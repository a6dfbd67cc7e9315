//! What can happen next in a world, and the world after it.

use super::super::destination::{Action as DAction, Event as DEvent, State as DState};
use super::super::ledger::{Entry, Mark};
use super::super::source::{Action as SAction, Event as SEvent, State as SState};
use super::guards::Guard;
use super::{Answer, Handover, Harm, Msg, Peer, Side, World};

impl World {
    /// Does it in the ledger, if it can be done.
    fn mark(&mut self, mark: Mark) {
        if let Some(next) = self.ledger.and_then(|entry| entry.after(mark)) {
            self.ledger = Some(next);
        }
    }
}

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// The source's work ended so.
    SourceDoes(SEvent),
    /// The destination's work ended so.
    DestinationDoes(DEvent),
    /// The source hears the next message; which may come again.
    SourceHears { again: bool },
    /// The destination hears the next message; which may come again.
    DestinationHears { again: bool },
    /// The source's patience is over, its connection broke, or something in it failed.
    SourceGivesUp(SEvent),
    /// The same there.
    DestinationGivesUp(DEvent),
    /// The connection breaks: so many messages still arrive in each direction.
    Break { forth: usize, back: usize },
    /// The source's process is killed.
    KillSource,
    /// The destination's process is killed.
    KillDestination,
    /// A new destination is started in place of one that is dead.
    RestartDestination,
    /// The operator boots the VM from its disks where the source was.
    BootHere,
    /// The operator boots the VM from its disks where the destination was.
    BootThere,
    /// The guest at the destination writes to its disk.
    WriteThere,
    /// The operator speaks to the source.
    Operator(SEvent),
    /// The source in doubt asks what became of the migration.
    Ask,
    /// Whoever is there answers.
    Answer,
    /// The source hears the answer; which may come again.
    HearAnswer { again: bool },
    /// Question or answer are lost.
    LoseQuestion,
    /// The source looks at the disks of its own accord.
    Look,
    /// The operator lets a guest go on that could not be resumed at once.
    Cont,
    /// The VM that stayed is migrated again.
    Retry,
}

impl Step {
    /// Whether it is somebody's work rather than somebody's misfortune.
    pub(super) fn is_benign(self) -> bool {
        !matches!(
            self,
            Self::SourceHears { again: true }
                | Self::DestinationHears { again: true }
                | Self::HearAnswer { again: true }
                | Self::LoseQuestion
                | Self::Break { .. }
                | Self::KillSource
                | Self::KillDestination
                | Self::Retry
        )
    }

    /// Whether it happens without an operator.
    pub(super) fn is_by_itself(self) -> bool {
        !matches!(
            self,
            Self::Operator(_)
                | Self::Cont
                | Self::BootHere
                | Self::BootThere
                | Self::RestartDestination
        )
    }
}

impl Handover {
    /// All that can happen in `w`.
    pub(super) fn steps(&self, w: &World, out: &mut Vec<Step>) {
        if w.here.alive {
            self.source_steps(w, out);
            out.push(Step::KillSource);
        }
        if w.there.alive {
            self.destination_steps(w, out);
            out.push(Step::KillDestination);
        }
        if w.connected {
            for forth in 0..=w.forth.len() {
                out.extend((0..=w.back.len()).map(|back| Step::Break { forth, back }));
            }
        }
        self.question_steps(w, out);
        let gone = |side: &Side| !side.alive && !side.booted;
        // A process that has given up, or given its guest away, ends.
        let failed_there = w.there.alive
            && w.destination.state() == DState::Failed
            && w.destination_todo == DAction::None;
        let given_away = w.here.alive && w.source.state() == SState::HandedOver;
        if self.has_disks() && !w.here.locks && !w.there.locks {
            if gone(&w.here) || given_away {
                out.push(Step::BootHere);
            }
            if gone(&w.there) || failed_there {
                out.push(Step::BootThere);
            }
        }
        if gone(&w.there) && !w.restarted {
            out.push(Step::RestartDestination);
        }
        if w.there.runs && self.has_disks() && !w.disk_changed {
            out.push(Step::WriteThere);
        }
        let over = gone(&w.there) || w.there.alive && w.destination.state() == DState::Failed;
        if w.source.state() == SState::Kept && w.here.runs && !w.here.booted && over && !w.second {
            out.push(Step::Retry);
        }
    }

    fn question_steps(&self, w: &World, out: &mut Vec<Step>) {
        let idle = matches!(w.source_todo, SAction::None | SAction::Hold | SAction::AskForWord);
        if w.here.alive && idle && w.source.state() == SState::InDoubt {
            out.push(Step::Look);
            if self.peer == Peer::MiniVmm && !w.asked && w.answer.is_none() {
                out.push(Step::Ask);
            }
        }
        if w.asked && w.there.alive && self.answer(w).is_some() {
            out.push(Step::Answer);
        }
        if w.here.alive && idle && w.answer.is_some() {
            out.push(Step::HearAnswer { again: false });
            if !w.duplicated {
                out.push(Step::HearAnswer { again: true });
            }
        }
        if w.asked || w.answer.is_some() {
            out.push(Step::LoseQuestion);
        }
    }

    /// What the process there says: nothing before it has decided for ever.
    fn answer(&self, w: &World) -> Option<Answer> {
        if self.broken == Some(Guard::QuestionsAreAnswered) {
            return None;
        }
        let hasty = self.broken == Some(Guard::AnswersWhatIsForEver);
        match w.destination.state() {
            _ if w.new_there => Some(Answer::Unknown),
            DState::Running => Some(Answer::Runs),
            DState::Failed => Some(Answer::NeverHere),
            DState::AwaitingCommit if hasty => Some(Answer::NeverHere),
            _ => None,
        }
    }

    /// Whether the disks are no longer as the source left them.
    fn stale(w: &World) -> bool {
        w.disk_changed || w.taken_back
    }

    fn source_steps(&self, w: &World, out: &mut Vec<Step>) {
        use SAction as A;
        use SEvent as E;
        let done: &[E] = match w.source_todo {
            A::Pause => &[E::Paused, E::Failed],
            A::Send => &[E::StateSent, E::Failed],
            A::ReleaseDisks => &[E::DisksReleased, E::DisksKept],
            // COMMIT goes out, which ends no work, or certainly does not.
            A::Commit => &[E::Confirmed, E::NotCommitted],
            A::Reclaim => match w.ledger {
                Some(Entry::Runs) => &[E::Confirmed],
                Some(Entry::Taken) | None => &[E::MemoryTaken],
                Some(_) => &[E::MemoryKept],
            },
            A::RetakeDisks if self.has_disks() => match (w.there.locks, w.disk_changed) {
                (true, _) => &[E::DisksLost, E::DisksFailed],
                (false, true) => &[E::DisksChanged, E::DisksFailed],
                (false, false) => &[E::DisksTaken, E::DisksFailed],
            },
            A::RetakeDisks => &[E::DisksTaken],
            // A mini-vmm marks the disks of a guest that has arrived; a QEMU does not.
            A::ProbeDisks if w.there.alive && w.there.runs && self.peer == Peer::MiniVmm => {
                &[E::DisksInUse, E::DisksFailed]
            }
            A::ProbeDisks if w.there.locks => &[E::DisksLost, E::DisksFailed],
            A::ProbeDisks => &[E::DisksFree, E::DisksFailed],
            A::Resume => &[E::Resumed, E::ResumeFailed],
            A::None | A::AwaitPrepared | A::Hold | A::HandOver | A::AskForWord => &[],
            A::ReleaseDisksAndHold => &[E::DisksReleased],
        };
        if !done.is_empty() {
            out.extend(done.iter().map(|event| Step::SourceDoes(*event)));
            return;
        }
        if !w.back.is_empty() {
            out.push(Step::SourceHears { again: false });
            if !w.duplicated {
                out.push(Step::SourceHears { again: true });
            }
        }
        match w.source.state() {
            SState::Running => out.extend([E::Switch, E::Failed].map(Step::SourceDoes)),
            SState::AwaitingPrepared | SState::Committing => {
                out.extend([E::Lost, E::Failed].map(Step::SourceGivesUp));
            }
            SState::InDoubt => self.operator_steps(w, out),
            SState::KeptStopped if !w.here.runs => out.push(Step::Cont),
            _ => {}
        }
    }

    /// Plain commands at any time; words that are true only.
    fn operator_steps(&self, w: &World, out: &mut Vec<Step>) {
        let never_there = if w.there.alive {
            w.destination.state() == DState::Failed || w.new_there
        } else {
            !w.there.booted
        };
        let mut say = |event| out.push(Step::Operator(event));
        say(SEvent::ResumeHere { known_dead: false, even_changed: false });
        say(SEvent::Discard { known_running: false });
        if never_there {
            say(SEvent::ResumeHere { known_dead: true, even_changed: false });
            say(SEvent::ResumeHere { known_dead: true, even_changed: true });
        }
        if w.there.runs {
            say(SEvent::Discard { known_running: true });
        }
    }

    fn destination_steps(&self, w: &World, out: &mut Vec<Step>) {
        use DAction as A;
        use DEvent as E;
        let done: &[E] = match w.destination_todo {
            A::Prepare => &[E::Prepared, E::Failed],
            A::TakeDisks if self.has_disks() && w.here.locks => &[E::DisksRefused],
            // COMMIT says how they were left; a QEMU's order does not.
            A::TakeDisks
                if self.has_disks()
                    && self.peer == Peer::MiniVmm
                    && Self::stale(w)
                    && self.broken != Some(Guard::StaleOrderIsRefused) =>
            {
                &[E::DisksRefused]
            }
            A::TakeDisks => &[E::DisksTaken, E::DisksRefused],
            A::Claim if w.ledger == Some(Entry::Offered) => &[E::Claimed, E::StartFailed],
            A::Claim => &[E::StartFailed],
            A::Acknowledge => &[E::Acknowledged],
            A::Start => &[E::Started, E::StartFailed],
            A::SendPrepared | A::Announce | A::Refuse | A::ReleaseDisksAndRefuse => {
                // What is said ends no work; the event has no meaning.
                &[E::Acknowledged]
            }
            A::None => &[],
        };
        if !done.is_empty() {
            out.extend(done.iter().map(|event| Step::DestinationDoes(*event)));
            return;
        }
        if !w.forth.is_empty() {
            out.push(Step::DestinationHears { again: false });
            if !w.duplicated {
                out.push(Step::DestinationHears { again: true });
            }
        }
        if matches!(w.destination.state(), DState::Receiving | DState::AwaitingCommit) {
            out.extend([E::Lost, E::Failed].map(Step::DestinationGivesUp));
        }
    }

    /// The world after `step`.
    pub(super) fn after(&self, w: &World, step: Step) -> World {
        let mut w = w.clone();
        match step {
            Step::SourceDoes(event) => self.source_does(&mut w, event),
            Step::DestinationDoes(event) => self.destination_does(&mut w, event),
            Step::SourceHears { again } => {
                w.duplicated |= again;
                let msg = if again { w.back[0] } else { w.back.remove(0) };
                let event = match msg {
                    Msg::Prepared => SEvent::Prepared,
                    // Out of its turn it is no answer but a mistake.
                    Msg::Shut0 if !w.committed => SEvent::Failed,
                    Msg::Shut0 => SEvent::Confirmed,
                    _ => SEvent::Refused,
                };
                self.tell_source(&mut w, event);
            }
            Step::DestinationHears { again } => {
                w.duplicated |= again;
                let msg = if again { w.forth[0] } else { w.forth.remove(0) };
                self.tell_destination(
                    &mut w,
                    match msg {
                        Msg::State => DEvent::Received,
                        _ => DEvent::Commit,
                    },
                );
            }
            Step::SourceGivesUp(event) | Step::Operator(event) => {
                self.tell_source(&mut w, event);
            }
            Step::DestinationGivesUp(event) => self.tell_destination(&mut w, event),
            Step::Ask => w.asked = true,
            Step::Answer => {
                w.answer = self.answer(&w);
                w.asked = false;
            }
            Step::HearAnswer { again } => {
                w.duplicated |= again;
                let answer = if again { w.answer } else { w.answer.take() };
                let event = match answer {
                    Some(Answer::Runs) => SEvent::Confirmed,
                    Some(Answer::NeverHere) => SEvent::Refused,
                    Some(Answer::Unknown) | None => SEvent::Unknown,
                };
                self.tell_source(&mut w, event);
            }
            Step::LoseQuestion => (w.asked, w.answer) = (false, None),
            Step::Look => self.tell_source(&mut w, SEvent::Look),
            Step::Break { forth, back } => {
                w.connected = false;
                w.forth.truncate(forth);
                w.back.truncate(back);
            }
            Step::KillSource => {
                (w.here, w.source_todo) = (Side::DEAD, SAction::None);
                (w.asked, w.answer) = (false, None);
                w.back.clear();
            }
            Step::KillDestination => {
                (w.there, w.destination_todo) = (Side::DEAD, DAction::None);
                w.forth.clear();
            }
            Step::RestartDestination => {
                (w.restarted, w.new_there) = (true, true);
                w.connected = false;
                self.restart_destination(&mut w);
            }
            Step::BootHere => w.here = Side::BOOTED,
            Step::BootThere => w.there = Side::BOOTED,
            Step::WriteThere => w.disk_changed = true,
            Step::Cont => w.here.runs = true,
            Step::Retry => {
                let before = w;
                w = self.beginning();
                (w.second, w.restarted) = (true, before.restarted);
                w.duplicated = before.duplicated;
            }
        }
        w
    }

    fn restart_destination(&self, w: &mut World) {
        w.there = Side { alive: true, ..Side::DEAD };
        w.destination = Handover::new_destination(self);
        w.destination_todo = DAction::None;
        w.forth.clear();
    }

    fn tell_source(&self, w: &mut World, event: SEvent) {
        use SEvent as E;
        let silent = match event {
            E::Lost | E::Failed | E::Unknown => true,
            // The ledger is what tells, and is looked at next.
            E::Look => !self.has_disks() || self.local,
            _ => false,
        };
        w.evidence |= !silent;
        if let E::ResumeHere { even_changed, .. } = event {
            w.change_accepted = even_changed;
        }
        w.source_todo = self.source_on(&mut w.source, event);
        if w.source_todo == SAction::HandOver {
            w.source_todo = SAction::None;
            match event {
                E::Confirmed if !w.ran_there => w.harm = Some(Harm::GivenToNobody),
                E::Confirmed => {}
                // An operator's wish: somebody else must have the guest.
                _ if !w.there.runs => w.harm = Some(Harm::CopyLost),
                _ => {}
            }
        }
    }

    fn tell_destination(&self, w: &mut World, event: DEvent) {
        w.destination_todo = self.destination_on(&mut w.destination, event);
    }

    fn source_does(&self, w: &mut World, event: SEvent) {
        use SAction as A;
        use SEvent as E;
        let send = |w: &mut World, msg| {
            if w.connected {
                w.forth.push(msg);
            }
        };
        match (w.source_todo, event) {
            (A::Pause, E::Paused) => w.here.runs = false,
            (A::Send, E::StateSent) => send(w, Msg::State),
            (A::ReleaseDisks, E::DisksReleased) => {
                w.here.locks = false;
                (w.disk_changed, w.taken_back) = (false, false);
            }
            (A::Commit, E::Confirmed) => {
                w.committed = true;
                w.mark(Mark::Offer);
                w.evidence = false;
                w.source_todo = A::None;
                return send(w, Msg::Commit);
            }
            // The worst of it: nothing is held any more, although it failed.
            (A::ReleaseDisks, E::DisksKept) => w.here.locks = false,
            (A::Reclaim, E::MemoryKept) => w.mark(Mark::Keep),
            (A::RetakeDisks, E::DisksTaken | E::DisksChanged) => {
                w.here.locks = true;
                w.taken_back |= event == E::DisksTaken;
            }
            (A::ReleaseDisksAndHold, _) => {
                w.here.locks = false;
                w.source_todo = A::Hold;
                return;
            }
            (A::Resume, E::Resumed) => {
                w.here.runs = true;
                let disks = w.disk_changed && !w.change_accepted;
                if w.committed && (disks || self.local && w.ran_there) {
                    w.harm = Some(Harm::OldMemory);
                }
            }
            // The work before the pause failed; whatever had been stopped runs again.
            _ => {}
        }
        let ledger = w.source_todo == A::Reclaim && event != E::MemoryTaken;
        let evidence = w.evidence || ledger || matches!(event, E::NotCommitted | E::DisksKept);
        self.tell_source(w, event);
        w.evidence = evidence;
    }

    fn destination_does(&self, w: &mut World, event: DEvent) {
        use DAction as A;
        use DEvent as E;
        let say = |w: &mut World, msg| {
            if w.connected {
                w.back.push(msg);
            }
        };
        match (w.destination_todo, event) {
            (A::Prepare, E::Prepared) => w.prepared = true,
            (A::SendPrepared, _) => {
                w.destination_todo = A::None;
                if self.peer == Peer::MiniVmm {
                    say(w, Msg::Prepared);
                }
                return;
            }
            (A::TakeDisks, E::DisksTaken) => w.there.locks = true,
            (A::Claim, E::Claimed) => w.mark(Mark::Take),
            (A::Acknowledge, _) => say(w, Msg::Shut0),
            (A::Start, E::Started) => {
                (w.there.runs, w.ran_there) = (true, true);
                w.mark(Mark::Start);
                if self.has_disks() && self.peer == Peer::MiniVmm && Self::stale(w) {
                    w.harm = Some(Harm::OldMemory);
                }
            }
            (A::Announce, _) => {
                w.destination_todo = A::None;
                return say(w, Msg::Shut0);
            }
            (A::Refuse | A::ReleaseDisksAndRefuse, _) => {
                if w.destination_todo == A::ReleaseDisksAndRefuse {
                    w.there.locks = false;
                }
                if self.broken != Some(Guard::FailedStartReturnsMemory) {
                    w.mark(Mark::Return);
                }
                w.destination_todo = A::None;
                return say(w, Msg::Refused);
            }
            _ => {}
        }
        self.tell_destination(w, event);
    }

    /// A source whose attempt failed before COMMIT, left alone with its failure: does its guest
    /// run in the end?
    pub(super) fn falls_back(&self, w: &World) -> bool {
        use SAction as A;
        let mut w = w.clone();
        for _ in 0..12 {
            if w.here.runs && w.source.state() == SState::Kept {
                return true;
            }
            match w.source_todo {
                A::Pause | A::Send => self.source_does(&mut w, SEvent::Failed),
                A::ReleaseDisks => self.source_does(&mut w, SEvent::DisksReleased),
                A::Commit => self.source_does(&mut w, SEvent::NotCommitted),
                A::Reclaim => self.source_does(&mut w, SEvent::MemoryKept),
                A::RetakeDisks if w.there.locks && self.has_disks() => return false,
                A::RetakeDisks => self.source_does(&mut w, SEvent::DisksTaken),
                A::Resume => self.source_does(&mut w, SEvent::Resumed),
                A::ProbeDisks => self.source_does(&mut w, SEvent::DisksFree),
                A::ReleaseDisksAndHold => self.source_does(&mut w, SEvent::DisksReleased),
                _ => match w.source.state() {
                    // Its disks did not come back, or its vCPUs: the operator tries again.
                    SState::InDoubt if w.evidence => {
                        let resume = SEvent::ResumeHere { known_dead: false, even_changed: false };
                        self.tell_source(&mut w, resume);
                    }
                    SState::KeptStopped => return true,
                    _ => self.tell_source(&mut w, SEvent::Lost),
                },
            }
        }
        false
    }
}
