//! What an operator does whose source is in doubt.

use std::thread;
use std::time::Instant;

use serde_json::json;

use super::case::{Action, Side};
use super::process::{State, command, state};
use super::run::{STEP, Trial};

impl Trial {
    /// What docs/recover.md tells him to do.
    pub(super) fn operator(&mut self) -> Result<(), String> {
        let start = Instant::now();
        let resume = json!({ "action": "resume" });
        let discard = json!({ "action": "discard" });
        let waits = matches!(self.action, Action::Late | Action::Freeze(Side::Destination));
        let mut tried = false;
        let mut said = String::new();
        while start.elapsed() < Self::limit() {
            match state(&mut self.there.vm) {
                State::Ended(_) => match command(&self.here.vm, "x-recover", resume.clone()) {
                    Ok(_) => return Ok(()),
                    Err(why) if why.contains("written to since") => {
                        // It must not be let go on, and is of no use.
                        self.outlived = true;
                        if state(&mut self.here.vm).runs() {
                            return Err("it runs although that was refused".into());
                        }
                        return Ok(());
                    }
                    Err(why) => said = why,
                },
                now if now.runs() => {
                    // A copy that runs must be proof against this.
                    if !tried {
                        tried = true;
                        let forced = json!({
                            "action": "resume",
                            "destination-does-not-run": true,
                            "disks-may-have-changed": true,
                        });
                        if command(&self.here.vm, "x-recover", forced).is_ok() {
                            return Err("the source was resumed while the guest runs there".into());
                        }
                    }
                    match command(&self.here.vm, "x-recover", discard.clone()) {
                        Ok(_) => return Ok(()),
                        Err(why) => said = why,
                    }
                }
                _ if waits && !tried => {
                    // He does not wait: the locks must tell.
                    tried = true;
                    match command(&self.here.vm, "x-recover", resume.clone()) {
                        Ok(_) => return Ok(()),
                        Err(why) => said = why,
                    }
                    self.thaw(Side::Destination);
                    self.relay.release();
                }
                _ => {}
            }
            thread::sleep(STEP);
        }
        Err(format!("the doubt can't be settled: {said}"))
    }
}
