//! Device sections: decode all, check all, and only then apply.

use std::any::Any;

use super::DestinationError;
use crate::guest::DestinationVm;
use crate::manifest::SectionDigest;
use crate::supplement::FullerSection;
use crate::transport::StreamReader;
use crate::verify::section_digest;
use crate::vmstate::{Audience, FieldError, Section, SectionId, SliceSource, StateError};
use crate::wire::section::SectionHeader;

/// This machine's sections, and what has come for them.
pub(super) struct Loader {
    sections: Vec<Box<dyn Section>>,
    ids: Vec<SectionId>,
    loaded: Vec<Option<Loaded>>,
}

struct Loaded {
    version: u32,
    state: Option<Box<dyn Any + Send>>,
    body: Option<Vec<u8>>,
}

impl Loader {
    pub(super) fn new(sections: Vec<Box<dyn Section>>) -> Self {
        let ids = sections.iter().map(|s| s.id()).collect();
        let loaded = sections.iter().map(|_| None).collect();
        Self { sections, ids, loaded }
    }

    pub(super) fn sections(&self) -> &[Box<dyn Section>] {
        &self.sections
    }

    fn index(&self, key: &SectionId) -> Option<usize> {
        self.ids.iter().position(|id| id == key)
    }

    /// Decodes and checks a section's body.
    pub(super) fn read(
        &mut self,
        reader: &mut StreamReader,
        header: &SectionHeader,
    ) -> Result<(), DestinationError> {
        let found = self
            .index(&header.key)
            .and_then(|index| Some((self.sections.get(index)?, self.loaded.get_mut(index)?)));
        let Some((section, slot)) = found else {
            return Err(DestinationError::UnknownSection { section: header.key.clone() });
        };
        if slot.is_some() {
            return Err(DestinationError::DuplicateSection { section: header.key.clone() });
        }
        let (min, max) = (section.min_version(), section.version());
        if !(min..=max).contains(&header.version) {
            return Err(DestinationError::state(StateError::Version {
                section: header.key.to_string(),
                found: header.version,
                min,
                max,
            }));
        }
        let state = section.decode(header.version, reader).map_err(DestinationError::state)?;
        *slot = Some(Loaded { version: header.version, state: Some(state), body: None });
        Ok(())
    }

    /// Decodes and checks a section's fuller body, which takes the place of what the stream had.
    pub(super) fn replace(&mut self, fuller: FullerSection) -> Result<(), DestinationError> {
        let key = fuller.key();
        let found = self
            .index(&key)
            .and_then(|index| Some((self.sections.get(index)?, self.loaded.get_mut(index)?)));
        let Some((section, slot)) = found else {
            return Err(DestinationError::UnknownSection { section: key });
        };
        let (min, max) = (section.min_version(), section.version());
        if !(min..=max).contains(&fuller.version) {
            return Err(DestinationError::state(StateError::Version {
                section: key.to_string(),
                found: fuller.version,
                min,
                max,
            }));
        }
        let mut source = SliceSource::new(&fuller.body);
        let state = section.decode(fuller.version, &mut source).map_err(DestinationError::state)?;
        if !source.rest().is_empty() {
            return Err(DestinationError::Surplus { section: key, bytes: source.rest().len() });
        }
        let (version, body) = (fuller.version, Some(fuller.body));
        *slot = Some(Loaded { version, state: Some(state), body });
        Ok(())
    }

    /// Keeps a section's bytes for [`compare`](Self::compare).
    pub(super) fn keep_body(&mut self, key: &SectionId, body: Option<Vec<u8>>) {
        let slot = self.index(key).and_then(|index| self.loaded.get_mut(index));
        if let Some(Some(loaded)) = slot {
            loaded.body = body;
        }
    }

    /// Compares what has come with the source's digests of what it has sent, if it says them.
    pub(super) fn check_digests(&self, digests: &[SectionDigest]) -> Result<(), DestinationError> {
        if digests.is_empty() {
            return Ok(());
        }
        for (id, loaded) in self.ids.iter().zip(&self.loaded) {
            let Some(Loaded { version, body: Some(body), .. }) = loaded else { continue };
            let theirs = digests.iter().find(|d| d.id == id.idstr && d.instance == id.instance);
            let expected = theirs.map(|theirs| theirs.digest);
            let found = section_digest(*version, body);
            if expected != Some(found) {
                let section = id.clone();
                return Err(DestinationError::SectionDamaged { section, expected, found });
            }
        }
        Ok(())
    }

    /// The sections of this machine that have not come.
    pub(super) fn missing(&self) -> Vec<String> {
        self.ids
            .iter()
            .zip(&self.loaded)
            .filter(|(_, loaded)| loaded.is_none())
            .map(|(id, _)| id.to_string())
            .collect()
    }

    /// Applies everything that has come, in the order of this machine's sections, whatever order
    /// it came in. Calls `between` before each.
    pub(super) fn apply(&mut self, mut between: impl FnMut()) -> Result<(), DestinationError> {
        for (section, loaded) in self.sections.iter_mut().zip(&mut self.loaded) {
            between();
            if let Some(state) = loaded.as_mut().and_then(|l| l.state.take()) {
                section.apply(state).map_err(DestinationError::state)?;
            }
        }
        Ok(())
    }

    /// Saves every section again and compares it with what came. Gives the number of sections.
    pub(super) fn compare(&self, vm: &dyn DestinationVm) -> Result<u64, DestinationError> {
        let mut count = 0u64;
        for ((section, id), loaded) in self.sections.iter().zip(&self.ids).zip(&self.loaded) {
            let Some(Loaded { version, body: Some(body), .. }) = loaded else { continue };
            // An older layout can't be written again.
            if *version != section.version() {
                continue;
            }
            // It came in the form that the source writes for this side, or in that for any mini-vmm.
            let mut again = section.save(Audience::MiniVmm).map_err(DestinationError::state)?;
            if again != *body {
                again = section.save(Audience::Restore).map_err(DestinationError::state)?;
            }
            if again != *body {
                let differences: Vec<FieldError> = vm.section_differences(id, body, &again);
                if !differences.is_empty() {
                    return Err(DestinationError::SectionDiffers {
                        section: id.clone(),
                        differences,
                    });
                }
            }
            count = count.saturating_add(1);
        }
        Ok(count)
    }
}
