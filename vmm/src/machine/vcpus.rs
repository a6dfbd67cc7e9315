//! The same for every vCPU, while all of them stand still.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;

use arch::clock::ClockBase;
use arch::cpuid::CpuProfile;
use arch::error::KvmError;
use arch::host::KvmHost;
use arch::vcpu_state::VcpuState;
use kvm_ioctls::VcpuFd;

use super::crew::Crew;
use super::{Machine, MachineError};
use crate::vcpu::VcpuError;

impl Machine {
    /// All vCPUs' states.
    pub fn capture_vcpus(&self) -> Result<Vec<VcpuState>, MachineError> {
        self.on_all(|index| {
            let host = self.host.clone();
            move |fd: &VcpuFd| VcpuState::capture(index, fd, &host)
        })
    }

    /// Gives all vCPUs their states.
    pub fn restore_vcpus(&self, states: &[VcpuState]) -> Result<(), MachineError> {
        self.give_each(states, |state, fd, host| state.restore(fd, host))
    }

    /// Sets all vCPUs' TSCs to what they must be now that the VM's clock has been set.
    pub fn restore_tscs(&self, states: &[VcpuState], base: ClockBase) -> Result<(), MachineError> {
        self.give_each(states, move |state, fd, host| state.restore_tsc(fd, host, &base))
    }

    /// Gives vCPUs that have never run another processor's CPUID.
    pub fn show_cpu(&self, cpu: &CpuProfile) -> Result<(), MachineError> {
        let count = self.config.smp;
        self.on_all(|index| {
            let (cpu, host) = (cpu.clone(), self.host.clone());
            move |fd: &VcpuFd| arch::vcpu_init::init_vcpu(index, count, fd, &cpu, &host)
        })?;
        Ok(())
    }

    /// Gives every vCPU that has a state that state by `give`.
    fn give_each(
        &self,
        states: &[VcpuState],
        give: impl Fn(&VcpuState, &VcpuFd, &KvmHost) -> Result<(), KvmError> + Copy + Send + 'static,
    ) -> Result<(), MachineError> {
        self.on_all(|index| {
            let (state, host) = (states.get(index as usize).cloned(), self.host.clone());
            move |fd: &VcpuFd| state.map_or(Ok(()), |state| give(&state, fd, &host))
        })?;
        Ok(())
    }

    /// Has threads stand by for what is done for all vCPUs, until they run or are [not needed](Self::dismiss).
    pub fn muster(&self) {
        let mut crew = self.crew();
        if crew.is_none() {
            let hands = self.vcpus.chunks(self.share()).len().saturating_sub(1);
            match Crew::muster(hands) {
                Ok(mustered) => *crew = Some(Arc::new(mustered)),
                // The vCPUs' own threads can do it.
                Err(error) => tracing::debug!(%error, "no threads stand by"),
            }
        }
    }

    /// Sends them away.
    pub fn dismiss(&self) {
        let crew = self.crew().take();
        drop(crew);
    }

    fn crew(&self) -> MutexGuard<'_, Option<Arc<Crew>>> {
        self.crew.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many vCPUs a thread has to do with, where each is shared out.
    fn share(&self) -> usize {
        self.vcpus.len().div_ceil(self.processors).max(1)
    }

    /// Does for every vCPU, which must be paused, the job that is made for its index; gives the answers in the
    /// vCPUs' order. The vCPUs are shared out to no more threads than there are processors, this one among them:
    /// a thread that is woken for some microseconds of work and finds no processor costs more than it brings. The
    /// others are those that [stand by](Self::muster), if any do, and else vCPUs' own.
    pub(super) fn on_all<T, E, J>(
        &self,
        mut job: impl FnMut(u32) -> J,
    ) -> Result<Vec<T>, MachineError>
    where
        T: Send + 'static,
        E: Into<MachineError> + Send + 'static,
        J: FnOnce(&VcpuFd) -> Result<T, E> + Send + 'static,
    {
        let mut shares = Vec::new();
        for vcpus in self.vcpus.chunks(self.share()) {
            let mut work: Vec<(Arc<VcpuFd>, J)> = Vec::new();
            for vcpu in vcpus {
                work.push((vcpu.paused()?.clone(), job(vcpu.index())));
            }
            let share: Share<T, E> = Box::new(move || {
                let all = || work.into_iter().map(|(fd, job)| job(&fd)).collect();
                catch_unwind(AssertUnwindSafe(all))
            });
            shares.push((&vcpus[0], share));
        }
        let mut shares = shares.into_iter();
        let mine = shares.next();
        // All are started before the first is waited for ...
        let crew = self.crew().clone();
        let mut hands = crew.iter().flat_map(|crew| crew.hands());
        let others: Vec<_> = shares
            .map(|(vcpu, share)| match hands.next() {
                Some(hand) => (vcpu.index(), hand.start(share)),
                None => (vcpu.index(), vcpu.start_job(move |_| share())),
            })
            .collect();
        let mine = mine.map_or(Ok(Ok(Vec::new())), |(_, share)| share());
        // ... and all have ended before anyone hears of an error, and lets vCPUs run that they still work on.
        let others: Vec<_> =
            others.into_iter().map(|(index, answer)| (index, answer.recv())).collect();
        let answer = |done: thread::Result<Result<Vec<T>, E>>| {
            done.unwrap_or_else(|panicked| resume_unwind(panicked)).map_err(E::into)
        };
        let mut answers = answer(mine)?;
        for (index, done) in others {
            answers.extend(answer(done.map_err(|_| VcpuError::Stopped(index))?)?);
        }
        Ok(answers)
    }
}

/// What one thread does for its share of the vCPUs; a panic is the caller's.
type Share<T, E> = Box<dyn FnOnce() -> thread::Result<Result<Vec<T>, E>> + Send>;
