//! From a device to a section.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{
    Audience, ByteSource, Description, FieldError, Migratable, Section, SectionId, StateError,
    VmState, describe, from_source, layout_digest, to_bytes,
};

/// The section of a device that others hold as well.
#[derive(Debug)]
pub struct SectionOf<D> {
    id: SectionId,
    device: Arc<Mutex<D>>,
}

impl<D: Migratable + Send + 'static> SectionOf<D> {
    /// The state of `device`, as the section `id`.
    pub fn new(id: SectionId, device: Arc<Mutex<D>>) -> Self {
        Self { id, device }
    }

    fn lock(&self) -> Result<MutexGuard<'_, D>, StateError> {
        self.device.lock().map_err(|_| {
            self.device_error("a thread panicked while it worked on the device".to_owned())
        })
    }

    fn field_error(&self, error: FieldError) -> StateError {
        StateError::Field { section: self.id.to_string(), error }
    }

    fn device_error(&self, what: String) -> StateError {
        StateError::Device { section: self.id.to_string(), what, source: None }
    }

    fn state(&self, audience: Audience) -> Result<D::State, StateError> {
        self.lock()?.save(audience).map_err(|error| self.field_error(error))
    }
}

impl<D: Migratable + Send + 'static> Section for SectionOf<D> {
    fn id(&self) -> SectionId {
        self.id.clone()
    }
    fn version(&self) -> u32 {
        D::State::VERSION
    }
    fn min_version(&self) -> u32 {
        D::State::MIN_VERSION
    }
    fn save(&self, audience: Audience) -> Result<Vec<u8>, StateError> {
        to_bytes(&self.id, &self.state(audience)?)
    }
    fn decode(
        &self,
        version: u32,
        source: &mut dyn ByteSource,
    ) -> Result<Box<dyn Any + Send>, StateError> {
        let state: D::State = from_source(&self.id, version, source)?;
        self.lock()?.check(&state).map_err(|error| self.field_error(error))?;
        Ok(Box::new(state))
    }
    fn apply(&mut self, state: Box<dyn Any + Send>) -> Result<(), StateError> {
        let state = state.downcast::<D::State>().map_err(|_| {
            self.device_error("was given a state that another section has decoded".to_owned())
        })?;
        self.lock()?.restore(*state).map_err(|error| self.field_error(error))
    }
    fn save_described(&self, audience: Audience) -> Result<(Vec<u8>, Description), StateError> {
        let (id, state) = (self.id.clone(), self.state(audience)?);
        Ok((to_bytes(&id, &state)?, Box::new(move || describe(&id, &state))))
    }
    fn layout_digest(&self) -> u64 {
        layout_digest::<D::State>()
    }
}
