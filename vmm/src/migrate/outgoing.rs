//! Starting a migration, out or in, and acting on how it ended.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use devices::virtio::DiskImage;
use migration::control::{Control, Owed};
use migration::destination::{self, DestinationError, Failure};
use migration::guest::GuestRam;
use migration::panics::{Panicked, guarded};
use migration::params::Parameters;
use migration::source::{self, Outcome};
use migration::transport::{Address, Listener, TransportError};

use super::arriving::Arriving;
use super::leaving::Leaving;
use super::settle::{Asker, Whom};
use super::trial::Trial;
use super::way::{WayError, WayIn, WayOut};
use super::{MigrationDesk, Tell};
use crate::config::{MigrationUri, SocketUri};
use crate::control::RunState;
use crate::power::MachineEvent;
use crate::vm::Vm;

/// How often a thread that waits for a source looks whether the process is ending.
const ACCEPT_STEP: Duration = Duration::from_millis(100);
/// How long one that asks may be silent.
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);
/// How much longer a destination that has failed answers than the source may take to find out that it
/// does not know.
const STAY: Duration = Duration::from_secs(3);
/// ... and how long at most, whatever a source proposes.
const LONGEST_STAY: Duration = Duration::from_secs(60);

/// Why a migration was not started.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// Another one, or a preflight, is under way.
    #[error("a migration or a preflight of this VM is under way")]
    Busy,
    /// Memory goes as a descriptor to another process of this host only.
    #[error(
        "memory that is not copied (--local, x-local) goes to another mini-vmm of this host only, which waits at \
         unix:PATH ('mini-vmm run … --migrate-listen unix:PATH'), not to '{uri}'"
    )]
    NotHere {
        /// The address.
        uri: String,
    },
    /// The memory is this process' own.
    #[error(
        "the VM's memory is private, and can't be given to another process: --local is for a VM that was started \
         with --shared-memory. To get there, migrate it once as usual, to a process that was ('mini-vmm run \
         --shared-memory … --migrate-listen unix:PATH')"
    )]
    PrivateMemory,
    /// What is asked for is about memory that travels.
    #[error(
        "memory that is not copied (--local, x-local) can't be combined with {0}: switch one of them off"
    )]
    NothingTravels(&'static str),
    /// The destination can't be reached.
    #[error(transparent)]
    Way(#[from] WayError),
    /// The thread.
    #[error("cannot start the migration's thread")]
    Thread(#[source] std::io::Error),
}

/// Why the VM that was waited for is not here.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// The address can't be listened at, or restored from.
    #[error(transparent)]
    Way(#[from] WayError),
    /// The listener failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The thread.
    #[error("cannot start the thread that waits for the migration")]
    Thread(#[source] std::io::Error),
    /// The thread that waited has a fault.
    #[error("the thread that waits for the migration has ended")]
    Panicked(#[from] Panicked),
    /// It came, but could not be taken.
    #[error("the incoming migration failed")]
    Failed(#[from] Failure),
}

impl MigrationDesk {
    fn control(&self, vm: &Vm) -> Arc<Control> {
        let parameters = self.lock().parameters.clone();
        Arc::new(Control::new(parameters, Box::new(Tell(vm.events.clone()))))
    }
}

impl Vm {
    /// Opens `uri` and starts to migrate there. The caller has made sure that none runs.
    pub(crate) fn begin_outgoing(self: &Arc<Self>, uri: &MigrationUri) -> Result<(), MigrateError> {
        let channels = {
            let desk = self.migration.lock();
            self.check_local(uri, &desk.parameters)?;
            if desk.parameters.multifd { desk.parameters.multifd_channels } else { 0 }
        };
        let way = WayOut::open(uri, channels, &self.migration.grants)?;
        // Where it can be asked again.
        let address = match uri {
            MigrationUri::Socket(uri) => Some(super::way::address(uri)),
            _ => None,
        };
        let control = self.migration.control(self);
        let (vm, shared) = (self.clone(), control.clone());
        // A client may ask how it goes as soon as this returns.
        control.begin(self.machine.ram.blocks().iter().map(|block| block.len).sum());
        // Held until the new migration is noted, so that its end finds itself there.
        let mut desk = self.migration.lock();
        if desk.is_busy() {
            return Err(MigrateError::Busy);
        }
        let thread = thread::Builder::new()
            .name("migration-out".into())
            .spawn(move || {
                // What it panicked with has been said, and stands in the migration's report.
                let _ = shared.watch(|| vm.go(way, address, &shared));
            })
            .map_err(MigrateError::Thread)?;
        desk.begin(control, thread);
        Ok(())
    }

    /// Whether the memory itself can go there, if it is to.
    fn check_local(&self, uri: &MigrationUri, p: &Parameters) -> Result<(), MigrateError> {
        if !p.local {
            return Ok(());
        }
        for (on, what) in [
            (p.multifd, "further connections (--channels, --compress, the capability 'multifd')"),
            (p.verify, "a comparison of both sides' memory (--verify, x-verify): it is the same"),
            (p.auto_converge, "--auto-converge (the capability 'auto-converge')"),
        ] {
            if on {
                return Err(MigrateError::NothingTravels(what));
            }
        }
        if !matches!(uri, MigrationUri::Socket(SocketUri::Unix(_))) {
            return Err(MigrateError::NotHere { uri: uri.to_string() });
        }
        if self.machine.ram.shared().is_none() {
            return Err(MigrateError::PrivateMemory);
        }
        Ok(())
    }

    fn go(self: &Arc<Self>, way: WayOut, address: Option<Address>, control: &Control) {
        let mut leaving = Leaving::new(self.clone());
        let outcome = match way {
            WayOut::Connection(links) => source::run(&mut leaving, links, control),
            WayOut::Sink(sink) => source::save(&mut leaving, sink, control),
        };
        match outcome {
            Outcome::Completed(_) => self.queue(MachineEvent::HandedOver),
            Outcome::Kept { error } => {
                crate::heap::give_back();
                tracing::warn!("the migration ended and the guest stays here: {}", error.chain());
            }
            Outcome::KeptStopped { error, resume } => {
                tracing::error!(
                    "the migration failed ({}), and the guest stands still here: {}",
                    error.chain(),
                    crate::error_chain(&resume)
                );
            }
            Outcome::InDoubt { error, doubt } => {
                tracing::error!(
                    "the destination was told to run the guest and has not answered ({}). The \
                     guest stands still here with everything it has; find out whether it runs \
                     there before doing anything else: 'mini-vmm recover' says what is known here",
                    error.chain()
                );
                let asker = Arc::new(Asker::default());
                let whom = address.zip(doubt.id()).map(|(address, id)| Whom { address, id });
                self.migration.stand(doubt, leaving, asker.clone());
                if let Some(whom) = whom.filter(|_| control.parameters().settle) {
                    self.begin_asking_after(whom, &asker);
                }
            }
        }
    }

    /// Listens at `uri` and waits for a source there, or restores what is saved there.
    pub(crate) fn begin_incoming(
        self: &Arc<Self>,
        uri: &MigrationUri,
    ) -> Result<(), IncomingError> {
        let way = WayIn::open(uri, &self.migration.grants)?;
        let control = self.migration.control(self);
        let (vm, shared) = (self.clone(), control.clone());
        let mut desk = self.migration.lock();
        desk.listening = way.listening();
        let thread = thread::Builder::new()
            .name("migration-in".into())
            .spawn(move || {
                let received = guarded(|| match way {
                    WayIn::Listener(listener) => vm.receive(listener, shared),
                    only => vm.receive_only(only, &shared),
                });
                if let Err(panicked) = &received {
                    // The one that is served now; there may have been others before.
                    let control = vm.migration.lock().control.clone();
                    control.iter().for_each(|control| control.panicked(panicked));
                }
                match received {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) => vm.queue(MachineEvent::IncomingFailed(e)),
                    // Nobody waits here any more, and nobody will come.
                    Err(panicked) if vm.state() == RunState::Inmigrate => {
                        vm.life().state = RunState::InternalError;
                        vm.queue(MachineEvent::IncomingFailed(panicked.into()));
                    }
                    // The guest is here, and lives on without that thread.
                    Err(_) => {}
                }
            })
            .map_err(IncomingError::Thread)?;
        desk.begin(control, thread);
        Ok(())
    }

    /// Waits for sources until one has given its VM, or the process ends. Whoever connects and is
    /// no source, or one whose VM does not fit, is sent away, and the next may come.
    fn receive(
        self: &Arc<Self>,
        listener: Listener,
        mut control: Arc<Control>,
    ) -> Result<(), IncomingError> {
        loop {
            let mut trial = Trial::default();
            trial.prepare(self);
            let connection = loop {
                if self.migration.lock().closing {
                    return Ok(());
                }
                match listener.accept(ACCEPT_STEP) {
                    Ok(Some(connection)) => break connection,
                    Ok(None) => {}
                    Err(e) => return Err(e.into()),
                }
            };
            let peer = connection.peer().to_string();
            let mut arriving = Arriving::new(self.clone(), Some(&listener), trial);
            match destination::run(&mut arriving, connection, &control) {
                Ok(_) => {
                    drop(arriving);
                    crate::heap::give_back();
                    self.migration.lock().listening = None;
                    if let Some(owed) = control.owed() {
                        self.answer_later(listener, owed);
                    }
                    return Ok(());
                }
                Err(failure) if failure.vm_untouched && !self.migration.lock().closing => {
                    if let DestinationError::OnlyAsked { .. } = failure.error {
                        tracing::info!("{peer}: {}", crate::error_chain(&failure));
                    } else {
                        tracing::warn!(
                            "{peer} was sent away, waiting for the next: {}",
                            crate::error_chain(&failure)
                        );
                    }
                    control = self.migration.control(self);
                    self.migration.lock().control = Some(control.clone());
                }
                Err(failure) => {
                    self.life().state = RunState::InternalError;
                    // Where there are disks, they tell the source, and this process can go.
                    let disks = self.machine.board.images.iter().any(DiskImage::arbitrates);
                    if let Some(owed) = control.owed().filter(|_| !disks) {
                        let until = Instant::now() + owed.patience.min(LONGEST_STAY) + STAY;
                        tracing::warn!(
                            "{}; the source may not know that: it is answered here for a while",
                            crate::error_chain(&failure)
                        );
                        self.answer(&listener, &owed, Some(until));
                    }
                    return Err(failure.into());
                }
            }
        }
    }

    /// The guest runs here, and the source may not know: tells it, whenever it asks.
    fn answer_later(self: &Arc<Self>, listener: Listener, owed: Owed) {
        tracing::warn!(
            "the source may not know that the guest runs here, and is answered if it asks"
        );
        let vm = self.clone();
        let thread = thread::Builder::new().name("migration-answer".into()).spawn(move || {
            if !vm.answer(&listener, &owed, None) {
                vm.leave_mark();
            }
        });
        match thread {
            Ok(thread) => self.migration.lock().helps(thread),
            Err(e) => tracing::error!("cannot start the thread that answers the source: {e}"),
        }
    }

    /// The guest ends here, and its source has never heard that it ran: even if it has written nothing,
    /// its disks shall not look as if it had not.
    pub(super) fn leave_mark(&self) {
        // What is given away is another's.
        if matches!(self.state(), RunState::FinishMigrate | RunState::Postmigrate) {
            return;
        }
        for image in self.machine.board.images.iter().filter(|image| image.arbitrates()) {
            if let Err(e) = image.touch() {
                tracing::warn!("{}: its time can't be set: {e}", image.path.display());
            }
        }
    }

    /// Answers until the source has heard, the time is over, or the process ends; whether it has heard.
    fn answer(&self, listener: &Listener, owed: &Owed, until: Option<Instant>) -> bool {
        while !self.migration.lock().closing && until.is_none_or(|until| Instant::now() < until) {
            match listener.accept(ACCEPT_STEP) {
                Ok(Some(connection)) => {
                    let answered =
                        guarded(|| destination::answer(connection, owed, ANSWER_PATIENCE));
                    // One that makes this side panic has not been answered; the next may be.
                    if answered.unwrap_or(false) {
                        tracing::warn!("the source knows now what became of the guest");
                        return true;
                    }
                }
                Ok(None) => {}
                // One that could not be set up; the next may.
                Err(e) => {
                    tracing::warn!("{}", crate::error_chain(&e));
                    thread::sleep(ACCEPT_STEP);
                }
            }
        }
        false
    }

    /// Takes the VM that comes this way; there is no other to wait for.
    fn receive_only(self: &Arc<Self>, way: WayIn, control: &Control) -> Result<(), IncomingError> {
        let mut arriving = Arriving::new(self.clone(), None, Trial::default());
        let result = match way {
            WayIn::Supply(supply) => destination::restore(&mut arriving, supply, control),
            WayIn::Connection(connection) => destination::run(&mut arriving, connection, control),
            WayIn::Listener(listener) => {
                return self.receive(listener, self.migration.control(self));
            }
        };
        match result {
            Ok(_) => {
                drop(arriving);
                crate::heap::give_back();
                Ok(())
            }
            Err(_) if self.migration.lock().closing => Ok(()),
            Err(failure) => {
                self.life().state = RunState::InternalError;
                Err(failure.into())
            }
        }
    }
}
