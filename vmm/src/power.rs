//! What guests, vCPUs and signals ask of the machine as a whole, queued for its main thread.

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
    /// The guest asked for it.
    Guest(PowerRequest),
    /// A vCPU died.
    Crashed(Box<CrashReport>),
    /// The destination runs the guest; nothing is left to do here.
    HandedOver,
    /// The guest that was waited for has not come.
    IncomingFailed(IncomingError),
    /// The process is to end.
    Quit(ShutdownReason),
}

/// The queue's near end. Cheap to clone; sending never waits.
#[derive(Clone)]
pub struct MachineEvents(Sender<MachineEvent>);

impl MachineEvents {
    /// A queue.
    pub fn new() -> (Self, Receiver<MachineEvent>) {
        let (tx, rx) = channel();
        (Self(tx), rx)
    }

    /// Queues an event. When nobody listens any more the process is ending anyway.
    pub fn send(&self, event: MachineEvent) {
        let _ = self.0.send(event);
    }
}

impl PowerControl for MachineEvents {
    fn request(&self, request: PowerRequest) {
        self.send(MachineEvent::Guest(request));
    }
}
