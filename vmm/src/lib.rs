//! The machine put together: configuration, board wiring, vCPU threads, lifecycle, control socket.

pub mod chardev;
pub mod clock;
pub mod config;
pub mod control;
pub mod dirty;
pub mod event_loop;
pub mod firmware;
pub mod kvm;
pub mod memory;
pub mod ram_access;
pub mod selfcheck;
pub mod timers;
pub mod vcpu;

/// An error and all its causes as one line: "this: because of that: because of that".
#[must_use]
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Some libraries repeat their cause in their own text.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
