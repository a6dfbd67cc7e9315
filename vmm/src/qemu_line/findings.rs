//! What reading a QEMU command line finds beside settings: what matters, and what does not.

use std::fmt;

use thiserror::Error;

/// One thing that keeps a VM of ours from being the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The option: "-device e1000".
    pub option: String,
    /// Why it matters, and what to do.
    pub why: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.option, self.why)
    }
}

/// Why there can be no VM like the one that a QEMU command line describes.
#[derive(Debug, Error)]
pub enum LikeError {
    /// Not a command line.
    #[error(
        "--like: the QEMU command line can't be split into words: a quote in it is not closed; put \
         all of it in single quotes, and the quotes within it in double quotes"
    )]
    Quote,
    /// Another program, or another architecture.
    #[error(
        "--like: the command line begins with '{0}', which is not qemu-system-x86_64: begin with the \
         program or with its first option, without sudo or variables"
    )]
    Program(String),
    /// Some of it matters to the guest, and can't be had.
    #[error(
        "--like: a VM of mini-vmm can't be like this QEMU's:{}{}",
        if .0.len() == 1 { " " } else { "\n  " },
        list(.0)
    )]
    Matters(Vec<Problem>),
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  ")
}

/// Collects both kinds while a command line is read.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) problems: Vec<Problem>,
    pub(super) notes: Vec<String>,
}

impl Findings {
    /// The guest would see it, or a migration would fail.
    pub(super) fn matters(&mut self, option: impl Into<String>, why: impl Into<String>) {
        self.problems.push(Problem { option: option.into(), why: why.into() });
    }

    /// The guest does not see it.
    pub(super) fn note(&mut self, option: &str, what: &str) {
        self.notes.push(format!("{option}: {what}"));
    }
}
