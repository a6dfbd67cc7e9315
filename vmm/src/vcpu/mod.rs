//! vCPUs: one thread each, in `KVM_RUN`.
//!
//! ```text
//!              resume                 stop
//!   ┌────────┐ ─────► ┌─────────┐ ──────────────► ┌─────────┐
//!   │ Paused │        │ Running │                 │ Stopped │
//!   └────────┘ ◄───── └─────────┘   (or a fatal   └─────────┘
//!        │     pause                 exit)             ▲
//!        └─────────────────────────────────────────────┘
//! ```
//!
//! A vCPU is paused by asking, then kicking its thread out of `KVM_RUN` with a signal whose
//! handler sets `immediate_exit`: a kick that comes before `KVM_RUN` is entered is not lost. No
//! lock is held while a vCPU runs. Before a vCPU says "paused", the kernel has finished the port
//! or memory access that was under way, so that its registers are whole.
//!
//! A running vCPU that is to *rest* is kicked in the same way and waits outside of the guest until a
//! given time; it counts as running, and a pause reaches it there. [`Throttle`] makes vCPUs rest for a
//! share of every few milliseconds.

mod kick;
mod report;
mod thread;
mod throttle;

pub use kick::install_kick_handler;
pub use report::{CrashKind, CrashReport};
pub use thread::{ExitSink, Vcpu, VcpuError};
pub use throttle::Throttle;
