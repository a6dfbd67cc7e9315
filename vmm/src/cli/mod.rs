//! The command line: what can be said, and who does it.
//!
//! Exit status: 0 done, 1 failed, 2 not understood. What went wrong is said once, on standard
//! error.

mod console;
mod control;
mod demo;
mod documents;
mod inspect;
mod migrate;
mod preflight;
mod qemu;
mod recover;
mod terminal;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::client::{ClientError, QmpClient};
use crate::config::{ByteSize, Config, ConfigError, MigrationUri, Settings, nearest};
use crate::grants::Grants;
use crate::qemu_line::{LikeError, WriteError};
use crate::run::RunError;
use crate::rundir::{self, RunDirError};

const EXAMPLES: &str = "\
Examples:
  mini-vmm run --selfcheck                                  a VM that checks itself
  mini-vmm run --name web --smp 2 -m 2G --kernel vmlinuz --initrd initrd.img \\
      --disk path=web.img --net tap=tap0                    a VM of one's own
  mini-vmm run --name web --smp 2 -m 2G --disk path=web.img --net tap=tap0 \\
      --migrate-listen tcp:0.0.0.0:7000                     ... waits for it on another host
  mini-vmm preflight --vm web tcp:other-host:7000           ... would it fit there?
  mini-vmm migrate --vm web tcp:other-host:7000             ... and this moves it there
  mini-vmm status --json                                    the recorded configuration
  mini-vmm run --like 'qemu-system-x86_64 ...' --migrate-listen tcp:0.0.0.0:7000
                                                            ... waits for a QEMU's VM
  mini-vmm qemu-command --incoming tcp:0.0.0.0:7001         the QEMU that could take it
";

const SAVE_EXAMPLES: &str = "\
Examples:
  mini-vmm migrate --vm web tcp:other-host:7000         moves it
  mini-vmm migrate --vm web file:web.mig                saves it, and ends its process
  mini-vmm run ... --migrate-listen file:web.mig        ... and it goes on
  mini-vmm migrate --vm web 'exec:zstd >web.mig.zst'    saves it through a command, if the
                                                        VM was started with --allow-exec
  mini-vmm migrate --vm web fd:5 5>web.mig              saves it to a file of this shell
";

/// A KVM virtual machine monitor whose reason to exist is live migration that cannot lose a VM.
#[derive(Debug, Parser)]
#[command(name = "mini-vmm", version, after_long_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a VM, or wait for one to arrive
    #[command(after_long_help = EXAMPLES)]
    Run(Box<RunArgs>),
    /// Move a running VM to another mini-vmm, or save it
    ///
    /// The destination has been started with the same machine, memory, vCPUs and devices, and with
    /// --migrate-listen. The guest runs on meanwhile, here until the destination holds all of it.
    /// Ctrl-C cancels, and the guest stays.
    ///
    /// To file:PATH, fd:N and exec:COMMAND the VM is saved: its process ends when all of it is there, and
    /// 'mini-vmm run ... --migrate-listen' with such an address lets it go on, later.
    #[command(after_long_help = SAVE_EXAMPLES)]
    Migrate(migrate::MigrateArgs),
    /// Ask a destination whether a VM could move there, and how long it would take
    ///
    /// Nothing changes on either side: the guest runs on, and the destination goes on waiting. All
    /// that stands against it is told at once. Exit status: 0 it would move, 1 it would not or nobody
    /// could be asked, 2 not understood.
    #[command(after_long_help = preflight::EXAMPLES)]
    Preflight(preflight::PreflightArgs),
    /// Print the QEMU command line that equals a VM
    ///
    /// Of a running VM, or of the one that a configuration file describes. With --incoming that QEMU
    /// waits for the VM, and 'mini-vmm migrate' moves it there. The other way round, 'mini-vmm run
    /// --like' reads such a line.
    #[command(name = "qemu-command")]
    Qemu(qemu::QemuArgs),
    /// Show the VMs of this user that run on this host
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what a VM does, and its last migration
    Status {
        #[command(flatten)]
        vm: VmArg,
        /// Everything, with the effective configuration, as JSON
        #[arg(long)]
        json: bool,
    },
    /// Stop a VM's vCPUs
    Stop(VmArg),
    /// Let a stopped VM go on
    Cont(VmArg),
    /// Cancel the migration that is under way; the guest stays
    Cancel(VmArg),
    /// End a VM at once, without asking its guest
    Quit(VmArg),
    /// Settle a migration of which nobody here knows whether it succeeded
    ///
    /// Without a flag it says what is known. What could make two running copies of the guest, or none,
    /// is refused, unless you say in so many words what can't be seen from here.
    Recover(recover::RecoverArgs),
    /// Press a VM's power button
    Powerdown(VmArg),
    /// Reset a VM
    Reset(VmArg),
    /// Show how much memory a VM's guest has, or ask it to make do with less or more
    ///
    /// Needs a VM with --balloon, and a guest with a driver for it, which takes its time.
    Balloon {
        #[command(flatten)]
        vm: VmArg,
        /// How much it shall have, like 512M or 2G; at most what the VM was started with
        size: Option<ByteSize>,
    },
    /// Attach this terminal to a VM's serial port (leave with Ctrl-])
    Console(VmArg),
    /// Show what a migration stream contains, QEMU's or our own
    ///
    /// A broken stream is shown up to the break, with what was expected there and what it mostly comes
    /// from. Devices are taken apart by the description at the stream's end, so any machine's can be
    /// shown.
    Inspect(inspect::InspectArgs),
    /// Watch a running VM leave one process and go on in another
    Demo {
        /// Memory of the VM
        #[arg(long, default_value = "256M")]
        memory: String,
        /// Number of vCPUs
        #[arg(long, default_value_t = 1)]
        smp: u32,
    },
    /// Write the self-checking guest to a file, for another VMM to boot (an ELF file with a PVH entry)
    #[command(hide = true)]
    SelfcheckImage {
        /// Where to
        file: PathBuf,
    },
    /// Print a shell's completions
    #[command(hide = true)]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    #[command(hide = true)]
    Man,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Read settings from a TOML file; the keys are the flags' names
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Be like the VM of this QEMU command line: 'qemu-system-x86_64 ...', all in one argument
    ///
    /// What the guest does not see is left out with a note; what it sees and mini-vmm has not is an
    /// error, so that a guest that QEMU runs with this line can be migrated here. Other flags are
    /// said over it.
    #[arg(
        long,
        value_name = "COMMAND LINE",
        conflicts_with = "config",
        allow_hyphen_values = true
    )]
    like: Option<String>,
    /// Let 'exec:COMMAND' addresses run commands as the user that the VM runs as
    #[arg(long)]
    allow_exec: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Which VM.
#[derive(Debug, Args)]
struct VmArg {
    /// Name of the VM; may be left out where only one runs
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Control socket of the VM, instead of its name
    #[arg(long, value_name = "SOCKET", conflicts_with = "vm")]
    qmp: Option<PathBuf>,
}

impl VmArg {
    fn connect(&self) -> Result<QmpClient, CliError> {
        let path = match &self.qmp {
            Some(path) => path.strip_prefix("unix:").unwrap_or(path).to_path_buf(),
            None => rundir::find(self.vm.as_deref())?.socket,
        };
        Ok(QmpClient::connect(&path)?)
    }
}

/// Why a command did not do what it was told.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// It was not understood.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No such VM.
    #[error(transparent)]
    Directory(#[from] RunDirError),
    /// The VM does not answer, or refuses.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A QEMU command line that can't be taken.
    #[error(transparent)]
    Like(#[from] LikeError),
    /// No QEMU equals the VM.
    #[error(transparent)]
    Qemu(#[from] WriteError),
    /// A VM of another version.
    #[error("the configuration that the VM shows is not one of this version of mini-vmm")]
    Recorded(#[source] serde_json::Error),
    /// The VM could not run.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The migration did not take place.
    #[error("{0}")]
    Migration(String),
    /// The VM could not move there; the reasons have been shown.
    #[error("the VM would not move to {0}")]
    WouldNotMove(String),
    /// The VM itself can't ask.
    #[error(
        "this VM can't ask: its process is a QEMU or an older mini-vmm, which knows no preflight; 'migrate' \
         to a mini-vmm compares before it sends a page"
    )]
    CannotAsk,
    /// The VM's answer is not one of this version.
    #[error("the VM's answer is not one of this version of mini-vmm")]
    Answer(#[source] serde_json::Error),
    /// The terminal, a file or a process.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// A stream that is not as it should be.
    #[error("{0}")]
    Inspect(String),
    /// The demonstration went wrong.
    #[error("the demonstration failed: {0}")]
    Demo(String),
}

impl CliError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            // A file that can't be read is no mistake in what was said.
            Self::Config(ConfigError::File { .. }) => ExitCode::FAILURE,
            Self::Config(_) | Self::Like(_) | Self::Directory(RunDirError::Which(_)) => {
                ExitCode::from(2)
            }
            _ => ExitCode::FAILURE,
        }
    }
}

/// The program: reads the command line, does what it says, and gives the exit status.
pub fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| misunderstood(&error));
    start_log();
    crate::heap::share();
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("mini-vmm: {}", crate::error_chain(&e));
            e.exit_code()
        }
    }
}

/// Says what was wrong with the command line, or what was asked for instead, and ends.
fn misunderstood(error: &clap::Error) -> ! {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let said = |kind| match error.get(kind) {
        Some(ContextValue::String(word)) => Some(word.as_str()),
        _ => None,
    };
    // clap only suggests what begins alike; a transposition is the commoner slip.
    if let (ErrorKind::InvalidSubcommand, Some(found), None) = (
        error.kind(),
        said(ContextKind::InvalidSubcommand),
        error.get(ContextKind::SuggestedSubcommand),
    ) {
        let command = Cli::command();
        let known = command.get_subcommands().filter(|c| !c.is_hide_set()).map(|c| c.get_name());
        if let Some(word) = nearest(found, known) {
            eprintln!("mini-vmm: there is no command '{found}': did you mean '{word}'?");
            std::process::exit(2);
        }
    }
    error.exit()
}

/// What happens inside goes to standard error; `MINI_VMM_LOG` says how much (`warn` if not set).
fn start_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("MINI_VMM_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_env_filter(filter)
        .with_target(false)
        .init();
}

fn dispatch(command: Command) -> Result<(), CliError> {
    match command {
        Command::Run(args) => run(*args),
        Command::Migrate(args) => migrate::migrate(&args),
        Command::Preflight(args) => preflight::preflight(&args),
        Command::Qemu(args) => qemu::command(&args),
        Command::List { json } => control::list(json),
        Command::Status { vm, json } => control::status(&vm, json),
        Command::Stop(vm) => control::simple(&vm, "stop"),
        Command::Cont(vm) => control::simple(&vm, "cont"),
        Command::Cancel(vm) => control::cancel(&vm),
        Command::Quit(vm) => control::quit(&vm),
        Command::Recover(args) => recover::recover(&args),
        Command::Powerdown(vm) => control::simple(&vm, "system_powerdown"),
        Command::Reset(vm) => control::simple(&vm, "system_reset"),
        Command::Balloon { vm, size } => control::balloon(&vm, size),
        Command::Console(vm) => console::attach(&vm),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Demo { memory, smp } => demo::demo(&memory, smp),
        Command::SelfcheckImage { file } => std::fs::write(file, crate::selfcheck::IMAGE)
            .map_err(CliError::io("cannot write the self-checking guest")),
        Command::Completions { shell } => {
            documents::completions(shell, &mut Cli::command());
            Ok(())
        }
        Command::Man => documents::man(Cli::command()),
    }
}

fn run(args: RunArgs) -> Result<(), CliError> {
    // First of all, while nothing else is open.
    let grants = Grants::of_this_process(args.allow_exec);
    let settings = match (&args.config, &args.like) {
        (Some(file), _) => Settings::from_file(file)?.overruled_by(args.settings),
        (None, Some(line)) => qemu::like(line)?.overruled_by(args.settings),
        (None, None) => args.settings,
    };
    let config = Config::resolve(settings)?;
    crate::run::run(&config, grants)?;
    Ok(())
}

/// An address as it was typed, checked before anybody is bothered with it.
fn checked_uri(text: &str) -> Result<MigrationUri, CliError> {
    let uri: MigrationUri = text.parse()?;
    // The VM's process has a directory of its own.
    uri.absolute().map_err(CliError::io("cannot find out the current directory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_unknown_flag_is_a_usage_error_and_the_nearest_is_named() {
        let error = Cli::try_parse_from(["mini-vmm", "run", "--memroy", "1G"]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("--memory"), "{error}");
    }
}
