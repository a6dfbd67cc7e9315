//! A vCPU's thread and the handle that the machine has on it.

use std::collections::VecDeque;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use devices::bus::IoBus;
use devices::memory::GuestRamRef;
use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::{Armed, kick};
use super::report::{CrashKind, CrashReport};
use crate::kvm::DirtyLog;
use crate::power::PendingPower;

/// Takes the reports of vCPUs that died. Called on the vCPU's thread; must not wait.
pub type ExitSink = Arc<dyn Fn(CrashReport) + Send + Sync>;

/// A vCPU did not do as it was told.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// Its thread could not be started.
    #[error("cannot start the thread of vCPU {0}")]
    Spawn(u32, #[source] std::io::Error),
    /// It stayed in the kernel.
    #[error("vCPU {index} did not pause within {} ms", .deadline.as_millis())]
    NotPaused {
        /// Which.
        index: u32,
        /// How long it was waited for.
        deadline: Duration,
    },
    /// It runs, and what was to be done is for one that stands still.
    #[error("vCPU {0} runs, and should stand still")]
    Running(u32),
    /// Its thread has ended.
    #[error("vCPU {0} has stopped")]
    Stopped(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    Running,
    Paused,
    Stopped,
}

type Job = Box<dyn FnOnce(&mut VcpuFd) + Send>;

struct Mailbox {
    thread_id: i32,
    wanted: Wanted,
    is: Is,
    /// It was let run together with others, which it wakes before it does.
    wakes: bool,
    /// Until then it does not enter the guest, although it may.
    rest: Option<Instant>,
    jobs: VecDeque<Job>,
}

impl Mailbox {
    /// Of a vCPU that is paused.
    fn new() -> Self {
        let jobs = VecDeque::new();
        Self { thread_id: 0, wanted: Wanted::Pause, is: Is::Paused, wakes: false, rest: None, jobs }
    }
}

struct Shared {
    mailbox: Mutex<Mailbox>,
    changed: Condvar,
    /// The vCPUs that this one wakes.
    next: OnceLock<Vec<Arc<Shared>>>,
}

impl Shared {
    fn new() -> Self {
        Self { mailbox: Mutex::new(Mailbox::new()), changed: Condvar::new(), next: OnceLock::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that it may run, without waking it.
    fn allow(&self, wakes: bool) {
        let mut mailbox = self.lock();
        if mailbox.wanted == Wanted::Pause {
            mailbox.wanted = Wanted::Run;
            mailbox.wakes = wakes;
            if mailbox.is == Is::Paused {
                // Said here and not by the thread, so that a pause right after this one waits for
                // the thread and is not satisfied by the old state.
                mailbox.is = Is::Running;
            }
        }
    }

    /// It runs from now on; those that it wakes may do so too.
    fn go(&self, mut mailbox: MutexGuard<'_, Mailbox>) {
        mailbox.is = Is::Running;
        let wakes = std::mem::take(&mut mailbox.wakes);
        drop(mailbox);
        if wakes {
            self.next.get().into_iter().flatten().for_each(|next| next.changed.notify_all());
        }
    }
}

/// Has each wake two others, the first the second and the third, so that all are awake after a few steps.
fn link(all: &[Arc<Shared>]) {
    for (index, shared) in all.iter().enumerate() {
        let next = all.iter().skip(2 * index + 1).take(2).cloned().collect();
        // Linked once.
        let _ = shared.next.set(next);
    }
}

/// One vCPU. Dropping it stops the vCPU and joins its thread.
pub struct Vcpu {
    index: u32,
    handle: Arc<VcpuFd>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread of vCPU `index`, paused, which has it as `fd`; `handle` is a second one for others.
    /// While something is `pending` it does not run. `log` is where it empties a dirty ring that is full.
    #[expect(clippy::too_many_arguments, reason = "each is another part of the machine")]
    pub fn spawn(
        index: u32,
        handle: VcpuFd,
        fd: VcpuFd,
        bus: Arc<IoBus>,
        ram: GuestRamRef,
        log: Arc<DirtyLog>,
        pending: PendingPower,
        died: ExitSink,
    ) -> Result<Self, VcpuError> {
        let shared = Arc::new(Shared::new());
        let runner = Runner { index, fd, bus, ram, log, pending, died, shared: shared.clone() };
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || runner.live())
            .map_err(|e| VcpuError::Spawn(index, e))?;
        Ok(Self { index, handle: Arc::new(handle), shared, thread: Some(thread) })
    }

    /// The vCPU for threads other than its own, while it is paused, and only then: the kernel lets one caller
    /// at a time have it, and a call would wait for the next exit of one that runs, perhaps for ever.
    pub fn paused(&self) -> Result<&Arc<VcpuFd>, VcpuError> {
        match self.shared.lock().is {
            Is::Running => Err(VcpuError::Running(self.index)),
            Is::Paused | Is::Stopped => Ok(&self.handle),
        }
    }

    /// Its number, from 0.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The host's id of its thread; 0 until it has started.
    pub fn thread_id(&self) -> i32 {
        self.shared.lock().thread_id
    }

    /// Asks for a pause and returns at once, so that all vCPUs can be asked before any is waited
    /// for.
    pub fn ask_pause(&self) {
        let mut mailbox = self.shared.lock();
        if mailbox.wanted == Wanted::Run {
            mailbox.wanted = Wanted::Pause;
            drop(mailbox);
            // Where it rests, and where it runs.
            self.shared.changed.notify_all();
            self.kick();
        }
    }

    /// Keeps the vCPU out of the guest until then, or lets it back at once; returns at once. A
    /// pause does not wait for the end of it.
    pub fn rest(&self, until: Option<Instant>) {
        let mut mailbox = self.shared.lock();
        mailbox.rest = until;
        let runs = mailbox.is == Is::Running;
        drop(mailbox);
        match until {
            Some(_) if runs => self.kick(),
            _ => self.shared.changed.notify_all(),
        }
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            kick(thread);
        }
    }

    /// Waits until the vCPU has paused. A vCPU that died counts as paused: it executes nothing.
    pub fn wait_paused(&self, deadline: Duration) -> Result<(), VcpuError> {
        let until = Instant::now() + deadline;
        let mut mailbox = self.shared.lock();
        while mailbox.is == Is::Running {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(VcpuError::NotPaused { index: self.index, deadline });
            }
            mailbox = self
                .shared
                .changed
                .wait_timeout(mailbox, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Lets the vCPU run. Nothing happens to one that has stopped.
    pub fn resume(&self) {
        self.shared.allow(false);
        self.shared.changed.notify_all();
    }

    /// All vCPUs of a machine have been started: from now on they can be let run together.
    pub fn know_each_other(all: &[Vcpu]) {
        let all: Vec<_> = all.iter().map(|vcpu| vcpu.shared.clone()).collect();
        link(&all);
    }

    /// Lets all run, and gives the time at which all of them might. Who wakes a thread may have to leave it its
    /// processor, for as long as the guest has work, before it has woken the next. So those that are awake wake the
    /// others before they enter the guest.
    pub fn resume_all(all: &[Vcpu]) -> Instant {
        all.iter().for_each(|vcpu| vcpu.shared.allow(true));
        let since = Instant::now();
        all.iter().for_each(|vcpu| vcpu.shared.changed.notify_all());
        since
    }

    /// Runs `f` on the vCPU's own thread, which must be paused; the answer comes through the
    /// receiver, so that many vCPUs can be asked at the same time. A vCPU that is let run meanwhile does so
    /// behind it.
    pub fn start_job<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut VcpuFd) -> R + Send + 'static,
    ) -> mpsc::Receiver<R> {
        let (tx, rx) = mpsc::sync_channel(1);
        let mut mailbox = self.shared.lock();
        if mailbox.is != Is::Stopped {
            mailbox.jobs.push_back(Box::new(move |fd| {
                let _ = tx.send(f(fd));
            }));
            self.shared.changed.notify_all();
        }
        rx
    }

    /// Runs `f` on the vCPU's own thread between two instructions of the guest, if it runs. Nobody
    /// else may stop or start it meanwhile.
    pub fn peek<R: Send + 'static>(
        &self,
        deadline: Duration,
        f: impl FnOnce(&mut VcpuFd) -> R + Send + 'static,
    ) -> Result<R, VcpuError> {
        // One that has died by itself, or was stopped, stays so.
        let runs = self.shared.lock().wanted == Wanted::Run;
        if !runs {
            return self.job(f);
        }
        self.ask_pause();
        let answer = self.wait_paused(deadline).and_then(|()| self.job(f));
        self.resume();
        answer
    }

    /// Runs `f` on the vCPU's own thread, which must be paused, and waits for its answer.
    pub fn job<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut VcpuFd) -> R + Send + 'static,
    ) -> Result<R, VcpuError> {
        self.start_job(f).recv().map_err(|_| VcpuError::Stopped(self.index))
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.shared.lock().wanted = Wanted::Stop;
        self.shared.changed.notify_all();
        self.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(vcpu = self.index, "the vCPU's thread panicked");
        }
    }
}

struct Runner {
    index: u32,
    fd: VcpuFd,
    bus: Arc<IoBus>,
    ram: GuestRamRef,
    log: Arc<DirtyLog>,
    pending: PendingPower,
    died: ExitSink,
    shared: Arc<Shared>,
}

/// What to do after one stay in the kernel.
enum Next {
    Again,
    LookAtMailbox,
    /// The guest has asked for a reset or to be switched off.
    StandStill,
    Dead(CrashKind),
}

impl Runner {
    fn live(mut self) {
        let _armed = Armed::new(&mut self.fd);
        self.shared.lock().thread_id = nix::unistd::gettid().as_raw();
        loop {
            match self.wait_for_work() {
                Wanted::Run => {}
                Wanted::Pause => continue,
                Wanted::Stop => break,
            }
            let crash = loop {
                match self.run_once() {
                    Next::Again => {}
                    Next::LookAtMailbox => {
                        if self.rest() != Wanted::Run {
                            self.finish_access();
                            break None;
                        }
                    }
                    Next::StandStill => {
                        self.finish_access();
                        self.pause_itself();
                        break None;
                    }
                    Next::Dead(kind) => break Some(kind),
                }
            };
            if let Some(kind) = crash {
                (self.died)(CrashReport::collect(self.index, kind, &self.fd, &self.ram));
                self.pause_itself();
            }
        }
        let mut mailbox = self.shared.lock();
        mailbox.is = Is::Stopped;
        mailbox.jobs.clear();
        self.shared.changed.notify_all();
    }

    /// Waits while the vCPU is to rest and nothing else is wanted of it; says what is wanted. The
    /// access that brought it out of the guest may be unfinished: it is finished when it goes back.
    fn rest(&self) -> Wanted {
        let mut mailbox = self.shared.lock();
        while let (Wanted::Run, Some(until)) = (mailbox.wanted, mailbox.rest) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                mailbox.rest = None;
                break;
            }
            let woken = self.shared.changed.wait_timeout(mailbox, left);
            mailbox = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        mailbox.wanted
    }

    /// Until somebody lets it run again.
    fn pause_itself(&self) {
        let mut mailbox = self.shared.lock();
        if mailbox.wanted == Wanted::Run {
            mailbox.wanted = Wanted::Pause;
        }
    }

    /// Does the jobs of a paused vCPU until it is wanted otherwise.
    fn wait_for_work(&mut self) -> Wanted {
        let mut mailbox = self.shared.lock();
        loop {
            match mailbox.wanted {
                // What it was given before it was let run comes first.
                Wanted::Run if mailbox.jobs.is_empty() => {
                    self.shared.go(mailbox);
                    return Wanted::Run;
                }
                Wanted::Stop => return Wanted::Stop,
                Wanted::Run | Wanted::Pause => {}
            }
            if mailbox.is == Is::Running && mailbox.wanted == Wanted::Pause {
                mailbox.is = Is::Paused;
                self.shared.changed.notify_all();
            }
            if let Some(job) = mailbox.jobs.pop_front() {
                drop(mailbox);
                job(&mut self.fd);
                mailbox = self.shared.lock();
                continue;
            }
            mailbox = self.shared.changed.wait(mailbox).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run_once(&mut self) -> Next {
        // Behind its own reset a firmware may have left nothing to execute.
        if self.pending.get().is_some() {
            return Next::StandStill;
        }
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                self.fd.set_kvm_immediate_exit(0);
                return Next::LookAtMailbox;
            }
            Err(e) => return Next::Dead(CrashKind::Run(e.errno())),
        };
        match exit {
            VcpuExit::IoIn(port, data) => self.bus.pio_read(port, data),
            VcpuExit::IoOut(port, data) => self.bus.pio_write(port, data),
            VcpuExit::MmioRead(address, data) => self.bus.mmio_read(address, data),
            VcpuExit::MmioWrite(address, data) => self.bus.mmio_write(address, data),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => return Next::LookAtMailbox,
            VcpuExit::Shutdown => return Next::Dead(CrashKind::TripleFault),
            VcpuExit::FailEntry(reason, _) => return Next::Dead(CrashKind::FailEntry(reason)),
            VcpuExit::InternalError => {
                // SAFETY: the exit reason says that this member of the union is the valid one.
                let sub = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
                return Next::Dead(CrashKind::InternalError(sub));
            }
            // Also when nobody is interested any more: it has to be emptied before the vCPU can go on.
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                if let Err(e) = self.log.empty_rings() {
                    let why = format!("DIRTY_RING_FULL ({})", crate::error_chain(&e));
                    return Next::Dead(CrashKind::UnexpectedExit(why));
                }
            }
            other => return Next::Dead(CrashKind::UnexpectedExit(format!("{other:?}"))),
        }
        Next::Again
    }

    /// The kernel finishes a port or memory access only on the next entry (Linux, api.rst, 5.):
    /// enter once more with `immediate_exit`, so that it does so and nothing else.
    fn finish_access(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        loop {
            match self.fd.run() {
                // A string instruction may ask for its next element; it is asked for again after
                // the vCPU resumes.
                Err(e) if e.errno() == libc::EINTR => break,
                Err(e) if e.errno() == libc::EAGAIN => continue,
                Err(e) => {
                    tracing::error!(vcpu = self.index, "KVM_RUN to finish an access failed: {e}");
                    break;
                }
                Ok(VcpuExit::IoIn(port, data)) => self.bus.pio_read(port, data),
                Ok(VcpuExit::IoOut(port, data)) => self.bus.pio_write(port, data),
                Ok(VcpuExit::MmioRead(address, data)) => self.bus.mmio_read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.bus.mmio_write(address, data),
                Ok(_) => break,
            }
        }
        self.fd.set_kvm_immediate_exit(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_the_first_is_woken_all_that_may_run_wake_up() {
        for count in [1, 2, 3, 8, 13] {
            let all: Vec<_> = (0..count).map(|_| Arc::new(Shared::new())).collect();
            link(&all);
            let (ran, run) = mpsc::channel();
            let threads: Vec<_> = all
                .iter()
                .cloned()
                .map(|shared| {
                    let ran = ran.clone();
                    thread::spawn(move || {
                        let mut mailbox = shared.lock();
                        ran.send(()).unwrap();
                        while mailbox.wanted != Wanted::Run {
                            mailbox = shared.changed.wait(mailbox).unwrap();
                        }
                        assert!(mailbox.wakes && mailbox.is == Is::Running);
                        shared.go(mailbox);
                        ran.send(()).unwrap();
                    })
                })
                .collect();
            let wait = || run.recv_timeout(Duration::from_secs(20)).unwrap();
            (0..count).for_each(|_| wait());
            // Each holds its mailbox until it waits.
            all.iter().for_each(|shared| shared.allow(true));
            all[0].changed.notify_all();
            (0..count).for_each(|_| wait());
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        }
    }

    #[test]
    fn one_that_has_stopped_or_runs_is_let_be() {
        for (wanted, is) in [(Wanted::Stop, Is::Stopped), (Wanted::Run, Is::Running)] {
            let shared = Shared::new();
            *shared.lock() = Mailbox { wanted, is, ..Mailbox::new() };
            shared.allow(true);
            let mailbox = shared.lock();
            assert_eq!((mailbox.wanted, mailbox.is, mailbox.wakes), (wanted, is, false));
        }
    }
}
