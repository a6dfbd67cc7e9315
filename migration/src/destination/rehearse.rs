//! A rehearsal: sections that come behind a mere question are loaded completely, compared, and thrown
//! away.
//!
//! ```text
//! REHEARSE          ──→ this side's own state is saved
//! FULL …, EOF, …    ──→ decoded, checked, applied, given to KVM, saved again and compared
//!                       this side's own state is loaded
//! PREPARED, or FAILED with the reason ──→ source
//! ```

use super::load::Loader;
use super::{Arrival, DestinationError};
use crate::manifest::{Prepared, Rehearse};
use crate::supplement::FullerSection;
use crate::vmstate::Audience;
use crate::wire::limits::MAX_SCRAPS;
use crate::wire::return_path::Message;

/// What it was like before.
pub(super) struct Rehearsal {
    blank: Vec<FullerSection>,
    asked: Rehearse,
}

impl Arrival<'_> {
    /// From here on sections may come, and nothing of them is to last.
    pub(super) fn begin_rehearsal(&mut self, asked: Rehearse) -> Result<(), DestinationError> {
        let fits = self.asked.as_ref().is_some_and(|asked| asked.count == 0);
        if !fits || self.rehearsal.is_some() || asked.scraps.len() > MAX_SCRAPS {
            return Err(self.out_of_turn("a rehearsal"));
        }
        let save = |section: &dyn crate::vmstate::Section| {
            let body = section.save(Audience::MiniVmm).map_err(DestinationError::state)?;
            Ok(FullerSection::new(&section.id(), section.version(), body))
        };
        let blank: Result<_, DestinationError> =
            self.loader.sections().iter().map(|section| save(&**section)).collect();
        let scraps = asked.scraps.clone();
        self.rehearsal = Some(Rehearsal { blank: blank?, asked });
        self.vm
            .begin_rehearsal(&scraps)
            .map_err(|source| DestinationError::Vm { during: "beginning the rehearsal", source })
    }

    /// Everything has come, or it has failed: loads, throws away, and says how it went.
    pub(super) fn end_rehearsal(
        &mut self,
        received: Result<(), DestinationError>,
    ) -> Result<(), DestinationError> {
        let loaded = received.and_then(|()| self.guarded(Self::load_for_show));
        if let Err(error) = self.guarded(Self::undo) {
            self.spoiled = true;
            self.answer.refuse(&error);
            self.answer.linger(&mut self.reader);
            return Err(error);
        }
        // What a panic has left half done is nobody's to load a guest into.
        self.spoiled |= matches!(loaded, Err(DestinationError::Panicked { .. }));
        let count = 0;
        let told = match loaded {
            Ok(prepared) => self.answer.send(&Message::Prepared(prepared)),
            Err(error) => {
                self.answer.refuse(&error);
                tracing::warn!(error = %error.chain(), "a rehearsed migration would have failed");
                Ok(())
            }
        };
        self.answer.linger(&mut self.reader);
        told.and(Err(DestinationError::OnlyAsked { count }))
    }

    fn load_for_show(&mut self) -> Result<Prepared, DestinationError> {
        let answer = &mut self.answer;
        self.loader.apply(|| answer.alive())?;
        self.vm
            .prepare()
            .map_err(|source| DestinationError::Vm { during: "preparing the VM", source })?;
        let verified_sections = self.loader.compare(&*self.vm)?;
        Ok(Prepared { verified_ram_bytes: 0, verified_sections })
    }

    fn undo(&mut self) -> Result<(), DestinationError> {
        let Some(Rehearsal { blank, asked }) = self.rehearsal.take() else { return Ok(()) };
        let mut loader = Loader::new(self.vm.sections());
        for section in blank {
            loader.replace(section)?;
        }
        loader.apply(|| {})?;
        self.vm
            .end_rehearsal(&asked.scraps)
            .map_err(|source| DestinationError::Vm { during: "ending the rehearsal", source })
    }
}
