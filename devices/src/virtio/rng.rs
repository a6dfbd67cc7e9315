//! virtio-rng (virtio 1.2, 5.4): random bytes of the host's.

use std::any::Any;
use std::fs::File;
use std::sync::Arc;

use super::core::{Core, VirtioError};
use super::device::{BackendError, Kind, VirtioDevice};

static KIND: Kind = Kind {
    name: "virtio-rng",
    version: 1,
    id: 4,
    transitional_id: 0x1005,
    class: 0x00ff,
    legacy_features: 0,
};

const QUEUE_SIZE: u16 = 8;
const VECTORS: u16 = 2;
/// The most that one request gets; drivers ask again.
const MAX_BYTES: usize = 64 << 10;

/// A virtio entropy device.
pub struct Rng {
    id: String,
    /// The host's generator, which never blocks once the host is up.
    source: Option<File>,
    core: Option<Arc<Core>>,
}

impl Rng {
    /// A device that errors call `id`.
    pub fn new(id: impl Into<String>) -> Self {
        Self { id: id.into(), source: None, core: None }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> &'static Kind {
        &KIND
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }
    fn vectors(&self) -> u16 {
        VECTORS
    }
    fn features(&self) -> u64 {
        0
    }
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
    fn connect(&mut self, core: Arc<Core>) -> Result<(), VirtioError> {
        self.core = Some(core);
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn reset(&mut self) {}

    fn kick(&mut self, queue: usize) {
        let (Some(core), Some(source)) = (&self.core, &self.source) else { return };
        core.serve(queue, |chain| {
            chain.writable.split_off(MAX_BYTES);
            chain.writable.fill_from(&mut &*source).unwrap_or_else(|error| {
                tracing::error!("{}: the host has no random bytes: {error}", self.id);
                0
            })
        });
    }

    fn open(&mut self) -> Result<(), BackendError> {
        let source = File::open("/dev/urandom").map_err(|source| BackendError {
            device: self.id.clone(),
            what: "cannot open /dev/urandom".to_owned(),
            source,
        })?;
        self.source = Some(source);
        Ok(())
    }
    fn close(&mut self) -> Result<(), BackendError> {
        self.source = None;
        Ok(())
    }
}
