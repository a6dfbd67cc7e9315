//! This machine as the engine's source sees it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use devices::device::PowerRequest;
use devices::virtio::DiskImage;
use migration::guest::{
    DirtyTracker, GuestRam, Holder, Machine, Reclaimed, SourceVm, TakenBack, VmError,
};
use migration::handover::Arbiter;
use migration::handover::ledger::{Entry, Mark};
use migration::manifest::{Problem, Scrap};
use migration::throttle::Rest;
use migration::vmstate::Section;
use vm_memory::{Bytes, GuestAddress};

use super::disks::{self, LeftDisks};
use super::exercise::exercise;
use super::local::{self, LedgerPage};
use super::{details, for_qemu};
use crate::control::RunState;
use crate::dirty::RamTracker;
use crate::rom::{self, PC_BIOS};
use crate::vcpu::Throttle;
use crate::vm::Vm;

/// A VM that is being given away.
pub(super) struct Leaving {
    vm: Arc<Vm>,
    /// What it was doing before the engine stopped it.
    before: Option<RunState>,
    /// How the disks were left.
    left: LeftDisks,
    /// Makes the vCPUs rest, since they first had to.
    throttle: Option<Throttle>,
    /// Whose the memory is, since another process has it too.
    ledger: Option<LedgerPage>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.vm.machine.dismiss();
    }
}

impl Leaving {
    pub(super) fn new(vm: Arc<Vm>) -> Self {
        Self { vm, before: None, left: LeftDisks::default(), throttle: None, ledger: None }
    }

    /// Whether the ledger says that the guest's memory is this side's for ever.
    pub(super) fn memory_is_kept(&self) -> bool {
        self.ledger.as_ref().is_some_and(|ledger| ledger.entry() == Entry::Kept)
    }

    /// Whether the destination has taken the guest's memory.
    pub(super) fn memory_is_taken(&self) -> bool {
        let entry = self.ledger.as_ref().map(LedgerPage::entry);
        matches!(entry, Some(Entry::Taken | Entry::Runs))
    }
}

impl Leaving {
    /// Which disk has been written to since it was given up, as a sentence.
    pub(super) fn disks_changed(&self) -> Option<String> {
        self.left.changed()
    }
}

impl Machine for Leaving {
    fn machine_type(&self) -> String {
        self.vm.config().machine.to_string()
    }
    fn vcpus(&self) -> u32 {
        self.vm.config().smp
    }
    fn uuid(&self) -> [u8; 16] {
        self.vm.config().uuid.into_bytes()
    }
    fn ram(&self) -> Arc<dyn GuestRam> {
        Arc::new(self.vm.machine.ram.clone())
    }
    fn sections(&self) -> Vec<Box<dyn Section>> {
        self.vm.sections(self.before.unwrap_or(self.vm.state()))
    }
    fn details(&self) -> serde_json::Value {
        details::of(&self.vm)
    }
    fn exercise(&self) {
        exercise(&self.vm.machine);
    }
}

impl SourceVm for Leaving {
    fn blockers(&self) -> Vec<String> {
        self.vm.blockers()
    }

    fn against_qemu(&self) -> Result<Vec<Problem>, VmError> {
        for_qemu::problems(&self.vm)
    }

    fn prepare_for_qemu(&mut self) -> Result<(), VmError> {
        let roms = self.vm.machine.ram.roms();
        if roms.has(PC_BIOS) {
            return Ok(());
        }
        let file = self.vm.config().firmware.as_deref();
        rom::read_bios(file)
            .and_then(|bios| roms.add_filled(PC_BIOS, &bios))
            .map_err(|e| VmError::with("the guest has no firmware for a QEMU", e))
    }

    fn scraps(&self) -> Vec<Scrap> {
        let memory = self.vm.machine.ram.guest();
        let positions = self.vm.machine.board.positions().into_iter();
        let read = |address| {
            let value = memory.read_obj::<u32>(GuestAddress(address)).ok()?;
            Some(Scrap { address, value })
        };
        positions.filter_map(read).collect()
    }

    fn dirty_tracker(&mut self) -> Result<Box<dyn DirtyTracker>, VmError> {
        let machine = &self.vm.machine;
        crate::heap::warm(machine.board.devices.len());
        Ok(Box::new(RamTracker::new(machine.ram.clone(), machine.dirty_log.clone())))
    }

    fn throttle(&mut self, rest: &Rest) -> Result<(), VmError> {
        let percent: Vec<_> = (0..self.vm.machine.vcpus().len()).map(|n| rest.of(n)).collect();
        if let Some(throttle) = &self.throttle {
            throttle.set(percent);
        } else if rest.most() > 0 {
            let vm = self.vm.clone();
            let rest = move |vcpu, until| vm.machine.rest_vcpu(vcpu, until);
            let throttle = Throttle::start(percent, rest)
                .map_err(|e| VmError::with("the thread that makes vCPUs rest does not start", e))?;
            self.throttle = Some(throttle);
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        let mut life = self.vm.life();
        match life.state {
            RunState::Running => {
                // Whatever interrupts this, they are to go on.
                self.before = Some(life.state);
                if let Err(e) = self.vm.machine.pause_vcpus() {
                    // They do already.
                    self.before = None;
                    return Err(VmError::with("the vCPUs could not be stopped", e));
                }
                self.vm.says_stopped();
            }
            RunState::Paused | RunState::Prelaunch => {}
            state => return Err(VmError::new(format!("the VM is in state '{state}' now"))),
        }
        self.before = Some(life.state);
        life.state = RunState::FinishMigrate;
        match self.vm.asked() {
            // Nobody would switch it off over there.
            Some(PowerRequest::PowerOff) => {
                Err(VmError::new("the guest has switched itself off meanwhile"))
            }
            Some(PowerRequest::Reset) | None => Ok(()),
        }
    }

    fn flush_ahead(&mut self) {
        self.vm.machine.board.flush_ahead();
    }

    fn drain(&mut self) -> Result<(), VmError> {
        if self.before == Some(RunState::Running) {
            self.vm.machine.pause_devices();
        }
        self.vm
            .reset_if_asked()
            .map_err(|e| VmError::with("the reset that the guest asked for failed", e))?;
        self.vm.kvm_state.forget();
        Ok(())
    }

    fn read_state(&mut self) -> Result<(), VmError> {
        let read = self.vm.kvm_state.snapshot(&self.vm.machine);
        read.map(drop).map_err(|e| VmError::with("KVM did not give it", e))
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.vm.kvm_state.forget();
        let mut life = self.vm.life();
        let Some(before) = self.before.take() else { return Ok(()) };
        life.state = before;
        if before == RunState::Running {
            self.vm.start_running(&mut life);
            self.vm.machine.catch_up();
        }
        Ok(())
    }

    fn release_disks(&mut self) -> Result<(), VmError> {
        let board = &self.vm.machine.board;
        let closed = board.close_backends();
        // The first time only: what is released again was not written to in between.
        if self.left.is_empty() {
            self.left = LeftDisks::note(&board.images);
        }
        closed.map_err(|e| VmError::with("a disk could not be given up", e))
    }

    fn left_disks(&self) -> serde_json::Value {
        self.left.to_json()
    }

    fn arbiter(&self) -> Arbiter {
        match self.vm.machine.board.images.iter().any(DiskImage::arbitrates) {
            true => Arbiter::DiskLocks,
            false => Arbiter::Nothing,
        }
    }

    fn reacquire_disks(&mut self) -> Result<TakenBack, VmError> {
        let board = &self.vm.machine.board;
        match board.reopen_backends() {
            Ok(()) => Ok(self.left.changed().map_or_else(
                || {
                    if let Err(e) = self.left.touch() {
                        tracing::warn!("a disk image's time can't be set: {e}");
                    }
                    TakenBack::AsLeft
                },
                TakenBack::Changed,
            )),
            Err(e) if disks::is_held(&e) => Ok(TakenBack::Held(crate::error_chain(&e))),
            Err(e) => Err(VmError::with("a disk could not be taken back", e)),
        }
    }

    fn probe_disks(&mut self) -> Result<Holder, VmError> {
        disks::holder(&self.vm.machine.board.images)
            .map_err(|e| VmError::with("a disk's locks could not be looked at", e))
    }

    fn share_memory(&mut self, over: BorrowedFd<'_>) -> Result<(), VmError> {
        let Some(memory) = self.vm.machine.ram.shared() else {
            return Err(VmError::new("it is private memory: start the VM with --shared-memory"));
        };
        let ledger = LedgerPage::new()?;
        local::send(over, memory.as_fd(), ledger.as_fd())
            .map_err(|e| VmError::with("its descriptor could not be sent", e))?;
        self.ledger = Some(ledger);
        Ok(())
    }

    fn offer_memory(&mut self) -> Result<(), VmError> {
        let offered = self.ledger.as_ref().map(|ledger| ledger.mark(Mark::Offer));
        match offered {
            Some(Ok(_)) => Ok(()),
            other => Err(VmError::new(format!("the ledger says otherwise: {other:?}"))),
        }
    }

    fn reclaim_memory(&mut self) -> Result<Reclaimed, VmError> {
        match self.ledger.as_ref().map(|ledger| ledger.mark(Mark::Keep)) {
            Some(Ok(_)) => Ok(Reclaimed::Kept),
            Some(Err(Entry::Runs)) => Ok(Reclaimed::Runs),
            Some(Err(_)) => Ok(Reclaimed::Taken),
            None => Err(VmError::new("there is no ledger of who has the guest's memory")),
        }
    }

    fn hand_over(&mut self) {
        self.vm.life().state = RunState::Postmigrate;
        // Whatever this process still does, it does not do it to the guest.
        if self.ledger.is_some()
            && let Err(e) = self.vm.machine.ram.let_go()
        {
            tracing::error!("the guest's memory can't be let go of before this process ends: {e}");
        }
    }
}
