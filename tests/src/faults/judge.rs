//! Whether all is as it must be when a case is over: who runs the guest, what both sides have said, and
//! what is left.

use std::fs;

use serde_json::json;

use super::case::{Action, Case, Direction, Inside, Place, Side};
use super::locks::{holds, is_locked};
use super::process::{State, command, state};
use super::run::{End, Trial};
use super::witness::told_ticks;

impl Trial {
    /// Who runs the guest, and whether all is as it must be.
    pub(super) fn judge(&mut self) -> Result<End, String> {
        if self.source == "completed" && !self.here.vm.has_ended() {
            // It would wait three seconds for someone who wants to know how it went.
            let _ = command(&self.here.vm, "quit", json!({}));
            self.here.vm.wait_exit(20);
        }
        let (mut here, there) = (state(&mut self.here.vm), state(&mut self.there.vm));
        if self.doubted && !self.outlived && there.runs() {
            let code = self.here.vm.wait_exit(20);
            here = State::Ended(code);
        }
        let (died_here, died_there) = (here == State::Ended(-1), there == State::Ended(-1));
        let end = match (here.runs(), there.runs()) {
            (true, true) => return Err("both sides run the guest".into()),
            (true, false) if self.doubted => End::DoubtResumed,
            (true, false) => End::Stayed,
            (false, true) if self.doubted => End::DoubtMoved,
            (false, true) => End::Moved,
            (false, false) if died_here || died_there || self.outlived => End::Died,
            (false, false) => return Err(format!("nobody runs the guest: {here:?}, {there:?}")),
        };
        let killed = |side| matches!(self.action, Action::Kill(of, _) if of == side);
        if (died_here && !killed(Side::Source)) || (died_there && !killed(Side::Destination)) {
            return Err(format!("a process died by itself: {here:?}, {there:?}"));
        }
        if end == End::Died {
            self.death_was_due(&here, died_here)?;
        }
        for (side, guest, state) in
            [("source", &self.here, &here), ("destination", &self.there, &there)]
        {
            let said = guest.vm.stderr();
            if said.contains("panicked") {
                return Err(format!("the {side} panicked"));
            }
            if matches!(state, State::Ended(1)) && said.trim().is_empty() {
                return Err(format!("the {side} ended without a word"));
            }
        }
        self.nobody_else_spoke(end)?;
        self.locks_are_right(end)?;
        match end {
            End::Moved | End::DoubtMoved => {
                if !matches!(here, State::Ended(0 | -1)) {
                    return Err(format!("the source is left over: {here:?}"));
                }
                self.there.is_whole();
            }
            End::Stayed | End::DoubtResumed => {
                if !matches!(there, State::Ended(_)) {
                    return Err(format!("the destination is left over: {there:?}"));
                }
                self.here.is_whole();
            }
            End::Died => {}
        }
        Ok(end)
    }

    /// The guest may die with the process that has it, and with no other.
    fn death_was_due(&mut self, here: &State, died_here: bool) -> Result<(), String> {
        // A source that was killed has the guest until it has given it up, and a destination that
        // refuses it after that would be a loss: it has no reason to.
        if died_here {
            let says = !self.there.vm.stderr().trim().is_empty();
            return if self.there.vm.has_ended() && says {
                Ok(())
            } else {
                Err("the source was killed, and the destination does not say what became of it"
                    .into())
            };
        }
        let ran = self.source == "completed" || self.outlived;
        if ran {
            return Ok(());
        }
        Err(format!("the destination was killed, and the source does not run the guest: {here:?}"))
    }

    /// What the guest has said on the lines fits: it has never been on both at once.
    fn nobody_else_spoke(&self, end: End) -> Result<(), String> {
        let (here, there) = (self.here.line.text(), self.there.line.text());
        for text in [&here, &there] {
            if let Some(line) = text.lines().find(|line| line.contains("FAIL")) {
                return Err(format!("the guest found a difference: {line}"));
            }
        }
        // A destination that was killed before its guest wrote to the disk may have spoken: the source
        // goes on from a moment before, and nothing contradicts it but that (docs/recover.md).
        if end == End::DoubtResumed && matches!(self.action, Action::Kill(Side::Destination, _)) {
            return Ok(());
        }
        if matches!(end, End::Stayed | End::DoubtResumed) && !there.is_empty() {
            return Err(format!(
                "the guest ran at the destination as well, and said there: {there}"
            ));
        }
        if let (Some((_, last)), Some((first, _))) = (told_ticks(&here), told_ticks(&there))
            && first < last
        {
            return Err(format!("{last} ticks at the source, but {first} at the destination"));
        }
        Ok(())
    }

    /// Who runs the guest holds the lock on its disk, and nobody else does.
    fn locks_are_right(&self, end: End) -> Result<(), String> {
        let (here, there) = match end {
            End::Stayed | End::DoubtResumed => (true, false),
            End::Moved | End::DoubtMoved => (false, true),
            End::Died => (false, false),
        };
        for (side, pid, should) in
            [("source", self.pids.source, here), ("destination", self.pids.destination, there)]
        {
            if holds(pid, &self.image.path) != should {
                return Err(format!("the {side} holds the disk's lock: {}", !should));
            }
        }
        Ok(())
    }

    /// What is stricter for some cases.
    pub(super) fn expect(
        &self,
        case: &Case,
        end: End,
        fired: bool,
        at: &str,
    ) -> Result<(), String> {
        let moved = end == End::Moved && self.source == "completed";
        // On a machine that does much else even an answer that nobody holds up may come too late.
        let slow = end == End::Stayed && self.why.contains("stands still");
        if !fired && !moved && !slow {
            return Err(format!("nothing was done, but the guest has not moved: {end:?}"));
        }
        if fired && end == End::Died && was_given(case) {
            return Err(
                "all of COMMIT had passed when its source was killed, and nobody runs the guest"
                    .into(),
            );
        }
        if matches!(case.action, Action::Delay(_)) && !moved && !slow {
            return Err(format!("a delay is no reason to fail: {end:?}"));
        }
        let matters = at.starts_with("section")
            || matches!(at, "manifest" | "verify" | "configuration" | "ram blocks" | "ram start");
        let through = matches!(case.action, Action::Corrupt(_)) && matters && end == End::Moved;
        if fired && through && case.direction == Direction::There {
            return Err(format!("a changed byte in {at} went through unnoticed"));
        }
        Ok(())
    }

    /// Ends what is still there, and looks at what is left. Gives the number of records.
    pub(super) fn clear(&mut self, end: End) -> Result<u64, String> {
        for guest in [&mut self.here, &mut self.there] {
            if !guest.vm.has_ended() {
                let _ = command(&guest.vm, "quit", json!({}));
                let code = guest.vm.wait_exit(20);
                if code != 0 {
                    return Err(format!("it ends with {code} when it is told to end"));
                }
            }
            // Whoever was killed could not tidy up.
            if guest.vm.wait_exit(1) != -1 {
                guest.nothing_is_left();
            }
        }
        if is_locked(&self.image.path) {
            return Err("the disk is still locked".into());
        }
        let left: Vec<_> = fs::read_dir(self.dir.path())
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name())
            .filter(|name| Some(name.as_os_str()) != self.image.path.file_name())
            .collect();
        if !left.is_empty() {
            return Err(format!("files are left over: {left:?}"));
        }
        let witness = self.witness.take().ok_or("no witness")?;
        let records = witness.testify()?;
        if records == 0 && end != End::Died {
            return Err("the guest has written nothing".into());
        }
        Ok(records)
    }
}

/// Whether the source is killed when the destination has been told everything: the guest is its to run then,
/// and nobody else has it.
fn was_given(case: &Case) -> bool {
    let Place::At { unit, inside, .. } = &case.place else { return false };
    let behind = match case.direction {
        Direction::There => unit == "commit" && *inside == Inside::Behind,
        Direction::Back => unit == "running" || unit == "shut",
    };
    behind && matches!(case.action, Action::Kill(Side::Source, _))
}
