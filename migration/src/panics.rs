//! A panic on a thread of the engine ends a step of the migration, not the thread.
//!
//! A panic is a fault of this program, wherever it is. A thread that ended by one would leave whoever
//! watches with a migration that never ends, and a guest that nobody resumes. So each step that a
//! hand-over's machine asks for runs by itself, and its panic is one more way in which it failed: the
//! machine, which was not there, decides what that means for the guest.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::guest::VmError;

/// What a panic said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a fault of mini-vmm itself (a panic, which should be reported): {0}")]
pub struct Panicked(String);

impl Panicked {
    fn new(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        Self(text.unwrap_or_else(|| "it said nothing".to_owned()))
    }
}

/// Runs `body`, and gives what it gives, or what its panic said.
///
/// What `body` was about to change may be half changed. Whoever calls this uses of it afterwards only
/// what is whole at every moment (locks that ignore poison, the hand-over's machine), or throws it away.
pub fn guarded<T>(body: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(body)).map_err(|payload| {
        let panicked = Panicked::new(&*payload);
        tracing::error!("{panicked}");
        panicked
    })
}

/// The same of something that the VM is asked to do: a panic is its failure.
pub(crate) fn asked_of_vm<T>(body: impl FnOnce() -> Result<T, VmError>) -> Result<T, VmError> {
    guarded(body).unwrap_or_else(|panicked| Err(VmError::new(panicked.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_panic_said_is_kept() {
        assert_eq!(guarded(|| 5), Ok(5));
        let said = |result: Result<(), Panicked>| result.unwrap_err().to_string();
        assert!(said(guarded(|| panic!("the word"))).ends_with(": the word"));
        assert!(said(guarded(|| panic!("the {}", 2))).ends_with(": the 2"));
        assert!(said(guarded(|| std::panic::panic_any(7))).ends_with(": it said nothing"));
        let of_vm = asked_of_vm(|| -> Result<(), VmError> { panic!("the VM's") });
        assert!(of_vm.unwrap_err().to_string().ends_with(": the VM's"));
    }
}
