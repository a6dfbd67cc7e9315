//! What can go wrong in the tools, in sentences a person can act on.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Why a tool could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A test program failed in the lab.
    #[error("{program} failed in the lab with status {status}")]
    Lab {
        /// Which.
        program: String,
        /// Its exit status.
        status: u8,
    },
    /// A VM or a program in the benchmark did not do what it should.
    #[error("{what}{}", Indented(.found))]
    Bench {
        /// Which one, and what it did not do.
        what: String,
        /// What was found instead.
        found: String,
    },
    /// The benchmark's figures are not good enough.
    #[error("the benchmark misses targets:{}", Indented(.missed))]
    Targets {
        /// Each on a line.
        missed: String,
    },
    /// No lab test program of this name.
    #[error("there is no lab test program `{name}`; there are {known}")]
    NoLabProgram {
        /// The name.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// No test of a lab program has such a name.
    #[error("`{program}` has no test whose name contains `{filter}`")]
    NoLabTest {
        /// The program.
        program: String,
        /// What was asked for.
        filter: String,
    },
    /// A recorded stream is not read, or not written, as it once was.
    #[error("{}: {why}", file.display())]
    Golden {
        /// The file.
        file: std::path::PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A file, directory or socket operation failed.
    #[error("could not {doing}: {source}")]
    Io {
        /// The operation and the path, as in "create /x/y".
        doing: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// A program could not be started at all.
    #[error("could not start `{program}`: {source}. `cargo xtask setup` installs what is needed")]
    Start {
        /// The program's name.
        program: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// A program ran and failed.
    #[error("`{command}` failed ({status}){}", Indented(.output))]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it printed; empty where it printed to the terminal.
        output: String,
    },
    /// A package could not be fetched or installed.
    #[error(
        "could not get the Debian package(s) {packages} (tried {attempts} times). \
         Is the network there, and does `apt-get update` work?{}", Indented(.output)
    )]
    Package {
        /// The packages' names.
        packages: String,
        /// How many times it was tried.
        attempts: usize,
        /// The end of what apt said.
        output: String,
    },
    /// The machine's apt sources do not offer what is needed.
    #[error("apt offers no {wanted}: {found}")]
    NotOffered {
        /// What was looked for.
        wanted: String,
        /// What was found instead.
        found: String,
    },
    /// Not a system these tools know.
    #[error("these tools need Debian 12 (bookworm) on x86-64; this is {found}")]
    WrongSystem {
        /// The system's own name for itself.
        found: String,
    },
    /// A kernel module is neither in the package nor built into the kernel.
    #[error("kernel {release} has no module `{module}`, neither as a file nor built in")]
    NoModule {
        /// The kernel's release, as `uname -r` tells it.
        release: String,
        /// The module's name.
        module: String,
    },
    /// A kernel package does not contain what kernel packages contain.
    #[error("the kernel package in {} is not as expected: {reason}", .dir.display())]
    OddKernelPackage {
        /// Where it was unpacked.
        dir: PathBuf,
        /// What is missing or doubled.
        reason: &'static str,
    },
    /// A lab host ended or never came up, without saying how its command ended.
    #[error(
        "lab host {host} ended before its command did. The end of its console ({}):{}",
        .console.display(), Indented(.tail)
    )]
    LabHostDied {
        /// The host's letter.
        host: char,
        /// Its console's log.
        console: PathBuf,
        /// The end of that log, and what its QEMU said.
        tail: String,
    },
    /// The time allowed for a lab run is over.
    #[error(
        "the lab command did not end within {} s (see --timeout) on host {host}. \
         The end of its console ({}):{}",
        .limit.as_secs(), .console.display(), Indented(.tail)
    )]
    LabTimeout {
        /// The host's letter.
        host: char,
        /// The limit.
        limit: Duration,
        /// The host's console log.
        console: PathBuf,
        /// The end of that log, and what its QEMU said.
        tail: String,
    },
    /// A lab host runs on and does nothing any more.
    #[error("{}", format_args!(
        "lab host {host} has stood still for {} s: its first process says nothing any more. The end of its \
         console ({}):{}",
        .silence.as_secs(), .console.display(), Indented(.tail)
    ))]
    LabHostSilent {
        /// The host's letter.
        host: char,
        /// For how long.
        silence: Duration,
        /// The host's console log.
        console: PathBuf,
        /// The end of that log, and what its QEMU said.
        tail: String,
    },
    /// SIGINT or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// The exit status that the command line gives this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::LabTimeout { .. } => 124,
            Error::LabHostDied { .. } | Error::LabHostSilent { .. } => 125,
            Error::Interrupted => 130,
            _ => 1,
        }
    }
}

/// What every function here returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Adds to an I/O error what was being done.
pub trait Doing<T> {
    /// Wraps the error; `doing` completes the sentence "could not …".
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { doing: doing(), source: source.into() })
    }
}

/// Shows a program's output below a message, set off from it.
struct Indented<'a>(&'a str);

impl std::fmt::Display for Indented<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.lines().try_for_each(|line| write!(f, "\n    | {}", line.trim_end()))
    }
}
