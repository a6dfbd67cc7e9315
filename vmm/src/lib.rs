//! The machine put together: configuration, board wiring, vCPU threads, lifecycle, control socket.

pub mod announce;
pub mod background;
pub mod balloon;
pub mod board;
pub mod chardev;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod control;
pub mod dirty;
pub mod event_loop;
pub mod firmware;
pub mod grants;
pub mod heap;
pub mod kvm;
pub mod kvm_state;
pub mod machine;
pub mod memfd;
pub mod memory;
pub mod migrate;
mod pagemap;
pub mod power;
pub mod qemu_line;
pub mod qmp;
pub mod ram_access;
pub mod rom;
pub mod run;
pub mod rundir;
pub mod selfcheck;
pub mod timers;
pub mod vcpu;
pub mod vm;
mod vm_control;
mod zero;

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
