//! What guests, vCPUs and signals ask of the machine as a whole, queued for its main thread.
//!
//! What a guest asks for stands in a place of its own until it is done, and the queue only rings: no vCPU
//! runs meanwhile (a firmware has nothing to execute any more behind its own reset), and a request that
//! comes while the VM is stopped or on its way to another host is not forgotten.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use devices::device::{PowerControl, PowerRequest};

use crate::control::ShutdownReason;
use crate::migrate::IncomingError;
use crate::vcpu::CrashReport;

/// Something for the machine's main thread.
#[derive(Debug)]
pub enum MachineEvent {
    /// The machine has been built, or could not be.
    Built,
    /// The guest asked for something; see [`PendingPower`].
    Guest,
    /// A vCPU died.
    Crashed(Box<CrashReport>),
    /// The destination runs the guest; nothing is left to do here.
    HandedOver,
    /// The guest that was waited for has not come.
    IncomingFailed(IncomingError),
    /// The process is to end.
    Quit(ShutdownReason),
}

/// What the guest has asked for and what has not been done yet.
#[derive(Clone, Default)]
pub struct PendingPower(Arc<AtomicU8>);

/// The values of [`PendingPower`], the stronger the higher.
const NOTHING: u8 = 0;
const RESET: u8 = 1;
const OFF: u8 = 2;

impl PendingPower {
    /// What it is.
    pub fn get(&self) -> Option<PowerRequest> {
        match self.0.load(Ordering::Acquire) {
            NOTHING => None,
            RESET => Some(PowerRequest::Reset),
            _ => Some(PowerRequest::PowerOff),
        }
    }

    /// It is done.
    pub fn clear(&self) {
        self.0.store(NOTHING, Ordering::Release);
    }

    /// Notes a request. One that is off is not switched on again.
    fn set(&self, request: PowerRequest) {
        let value = match request {
            PowerRequest::Reset => RESET,
            PowerRequest::PowerOff => OFF,
        };
        self.0.fetch_max(value, Ordering::AcqRel);
    }
}

/// The queue's near end. Cheap to clone; sending never waits.
#[derive(Clone)]
pub struct MachineEvents {
    queue: Sender<MachineEvent>,
    pending: PendingPower,
}

impl MachineEvents {
    /// A queue.
    pub fn new() -> (Self, Receiver<MachineEvent>) {
        let (tx, rx) = channel();
        (Self { queue: tx, pending: PendingPower::default() }, rx)
    }

    /// Queues an event. When nobody listens any more the process is ending anyway.
    pub fn send(&self, event: MachineEvent) {
        let _ = self.queue.send(event);
    }

    /// What the guest waits for.
    pub fn pending(&self) -> &PendingPower {
        &self.pending
    }
}

impl PowerControl for MachineEvents {
    fn request(&self, request: PowerRequest) {
        self.pending.set(request);
        self.send(MachineEvent::Guest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_stands_until_it_is_done_and_off_stays_off() {
        let (events, queue) = MachineEvents::new();
        assert_eq!(events.pending().get(), None);
        events.request(PowerRequest::Reset);
        assert!(matches!(queue.try_recv(), Ok(MachineEvent::Guest)));
        assert_eq!(events.pending().get(), Some(PowerRequest::Reset));
        events.request(PowerRequest::PowerOff);
        events.clone().request(PowerRequest::Reset);
        assert_eq!(events.pending().get(), Some(PowerRequest::PowerOff));
        events.pending().clear();
        assert_eq!(events.pending().get(), None);
    }
}
