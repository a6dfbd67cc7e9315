//! The section of a device whose state has one element per vCPU.

use std::any::Any;
use std::sync::{Arc, Mutex};

use migration::vmstate::{
    Audience, ByteSource, Description, Section, SectionId, SectionOf, StateError,
};

use super::Piix4Pm;
use super::state::with_cpus;

/// [`SectionOf`] that knows how many vCPUs there are.
pub struct PmSection {
    inner: SectionOf<Piix4Pm>,
    cpus: usize,
}

impl PmSection {
    /// The state of `pm`, which was made for `cpus` vCPUs, as the section `id`.
    pub fn new(id: SectionId, pm: Arc<Mutex<Piix4Pm>>, cpus: u32) -> Self {
        Self { inner: SectionOf::new(id, pm), cpus: cpus as usize }
    }
}

impl Section for PmSection {
    fn id(&self) -> SectionId {
        self.inner.id()
    }

    fn version(&self) -> u32 {
        self.inner.version()
    }

    fn min_version(&self) -> u32 {
        self.inner.min_version()
    }

    fn save(&self, audience: Audience) -> Result<Vec<u8>, StateError> {
        self.inner.save(audience)
    }

    fn decode(
        &self,
        version: u32,
        source: &mut dyn ByteSource,
    ) -> Result<Box<dyn Any + Send>, StateError> {
        with_cpus(self.cpus, || self.inner.decode(version, source))
    }

    fn apply(&mut self, state: Box<dyn Any + Send>) -> Result<(), StateError> {
        self.inner.apply(state)
    }

    fn save_described(&self, audience: Audience) -> Result<(Vec<u8>, Description), StateError> {
        self.inner.save_described(audience)
    }

    fn layout_digest(&self) -> u64 {
        with_cpus(self.cpus, || self.inner.layout_digest())
    }
}
