//! The control socket: QEMU's Machine Protocol, so that clients that only know QEMU can drive us.
//!
//! ```text
//! server.rs    sockets, clients, start and stop              (one thread, named "qmp")
//! session.rs   one client: greeting, negotiation, replies and events in their order
//! passing.rs   a client's socket, and descriptors that it hands over
//! framer.rs    bytes → JSON texts; bounded, tolerant of garbage
//! request.rs   JSON text → command, arguments, id
//! args.rs      typed arguments, with QEMU's words for what is wrong with them
//! commands/    what each command does: one dispatch table, transcripts that are run as tests
//! event.rs     events → JSON
//! error.rs     error classes and texts
//! ```
//!
//! A command may block (`stop` waits for vCPUs), so each runs on a blocking thread of the runtime;
//! a client's next command waits for it, other clients and all events don't.

mod args;
mod commands;
mod error;
mod event;
mod framer;
mod passing;
mod request;
mod server;
mod session;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use error::QmpError;
pub use server::{PreparedServer, QmpServer, ServerError, bind};
