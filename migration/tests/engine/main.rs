//! The engine without KVM: two sides in one process, over real sockets, with a guest that is a
//! thread and faults wherever there is a message.

mod channels;
mod common;
mod cut;
mod failures;
mod guards;
mod hostile;
mod local;
mod loopback;
mod panics;
mod preflight;
mod qemu;
mod recorded;
mod recover;
mod saved;
mod throttle;
mod verify;
