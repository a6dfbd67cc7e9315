//! A way to one device behind its transport, for whoever serves its host side.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::VirtioDevice;
use super::pci::VirtioPci;

/// A function whose device is known to be a `D`.
pub(super) struct Handle<D> {
    function: Arc<Mutex<VirtioPci>>,
    kind: PhantomData<fn() -> D>,
}

impl<D> Clone for Handle<D> {
    fn clone(&self) -> Self {
        Self { function: self.function.clone(), kind: PhantomData }
    }
}

impl<D: VirtioDevice + 'static> Handle<D> {
    /// A way to the device of `function`; `None` when that is no `D`.
    pub(super) fn new(function: Arc<Mutex<VirtioPci>>) -> Option<Self> {
        let handle = Self { function, kind: PhantomData };
        handle.with(|_| ()).map(|()| handle)
    }

    /// Calls `f` with the device, locked.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut D) -> R) -> Option<R> {
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        function.device().as_any().downcast_mut().map(f)
    }
}
