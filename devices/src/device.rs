//! What every device is to the machine.

/// What a guest asks of the whole machine through a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Start anew from the first instruction.
    Reset,
    /// S5: the machine is off.
    PowerOff,
}

/// Takes what a guest asks of the whole machine. Returns at once; the machine acts later, outside
/// of the access that asked.
pub trait PowerControl: Send + Sync {
    /// Notes the request.
    fn request(&self, request: PowerRequest);
}

/// A device's life. No method has a default: saying "nothing to do" is a decision.
pub trait Device: Send {
    /// Back to the state after power-on. All vCPUs are stopped.
    fn reset(&mut self);

    /// Called after every vCPU has stopped, before the last dirty bitmap is taken. When it
    /// returns, all requests in flight are finished, and from then on the device writes neither to
    /// guest memory nor to its back end.
    fn pause(&mut self);

    /// Called before any vCPU runs again, also on a destination after `restore`. What the guest need not wait for
    /// comes later, as a virtio device's look at its queues for what was rung while it was paused.
    fn resume(&mut self);
}
