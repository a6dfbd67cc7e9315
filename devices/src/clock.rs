//! The two clocks of a machine.

/// What time it is, for devices that count it.
pub trait Clock: Send + Sync {
    /// The machine's own clock in nanoseconds: it stands still while the VM is stopped, travels
    /// with it, and never goes back.
    fn virtual_ns(&self) -> i64;
    /// The host's wall clock, nanoseconds since 1970.
    fn realtime_ns(&self) -> i64;
}
