//! What each command does: the dispatch table.
//!
//! The transcripts in the comments of the sub-modules are run as tests: `->` is what a client
//! sends, `<-` what it gets, in that order and in full (but for the time of an event).

mod migrate;
mod preflight;
mod query;
mod recover;
mod run;

use std::os::fd::OwnedFd;

use serde_json::{Value, json};

use super::QmpError;
use super::args::Args;
use super::passing::Passed;
use super::session::Shared;

type Outcome = Result<Value, QmpError>;

/// A command.
pub(super) struct Command {
    pub(super) name: &'static str,
    handler: Handler,
}

#[derive(Clone, Copy)]
enum Handler {
    Plain(fn(&Shared, Args) -> Outcome),
    /// Takes the descriptor that came along.
    Descriptor(fn(&Shared, Args, Option<OwnedFd>) -> Outcome),
}

impl Command {
    const fn new(name: &'static str, handler: fn(&Shared, Args) -> Outcome) -> Self {
        Self { name, handler: Handler::Plain(handler) }
    }

    /// Carries it out; may block.
    pub(super) fn run(&self, shared: &Shared, args: Args, passed: &Passed) -> Outcome {
        match self.handler {
            Handler::Plain(handler) => handler(shared, args),
            Handler::Descriptor(handler) => handler(shared, args, passed.take()),
        }
    }
}

/// All commands, by name. `qmp_capabilities` is the session's own, and stands here to be listed.
static COMMANDS: &[Command] = &[
    Command::new("announce-self", run::announce_self),
    Command::new("balloon", run::balloon),
    Command::new("closefd", migrate::closefd),
    Command::new("cont", run::cont),
    Command { name: "getfd", handler: Handler::Descriptor(migrate::getfd) },
    Command::new("migrate", migrate::migrate),
    Command::new("migrate-continue", migrate::migrate_continue),
    Command::new("migrate-incoming", migrate::migrate_incoming),
    Command::new("migrate-set-capabilities", migrate::set_capabilities),
    Command::new("migrate-set-parameters", migrate::set_parameters),
    Command::new("migrate_cancel", migrate::migrate_cancel),
    Command::new("qmp_capabilities", |_, _| Err(QmpError::AlreadyNegotiated)),
    Command::new("query-balloon", query::balloon),
    Command::new("query-commands", query_commands),
    Command::new("query-cpus-fast", query::cpus_fast),
    Command::new("query-migrate", migrate::query_migrate),
    Command::new("query-migrate-capabilities", migrate::query_capabilities),
    Command::new("query-migrate-parameters", migrate::query_parameters),
    Command::new("query-name", query::name),
    Command::new("query-status", query::status),
    Command::new("query-uuid", query::uuid),
    Command::new("query-version", query::version),
    Command::new("quit", run::quit),
    Command::new("stop", run::stop),
    Command::new("system_powerdown", run::system_powerdown),
    Command::new("system_reset", run::system_reset),
    Command::new("x-mini-vmm-preflight", preflight::preflight),
    Command::new("x-mini-vmm-status", query::full_status),
    Command::new("x-recover", recover::recover),
];

/// The command of that name.
pub(super) fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

/// All commands.
fn query_commands(_: &Shared, args: Args) -> Outcome {
    args.finish()?;
    Ok(COMMANDS.iter().map(|command| json!({ "name": command.name })).collect())
}

/// The modules' own texts, whose transcripts are run.
#[cfg(test)]
pub(super) const TRANSCRIPTS: [(&str, &str); 5] = [
    ("run.rs", include_str!("run.rs")),
    ("query.rs", include_str!("query.rs")),
    ("migrate.rs", include_str!("migrate.rs")),
    ("recover.rs", include_str!("recover.rs")),
    ("preflight.rs", include_str!("preflight.rs")),
];
