//! This machine as the engine's destination sees it.

use std::os::fd::BorrowedFd;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration::guest::{DestinationVm, GuestRam, Machine, RamBlock, VmError};
use migration::handover::ledger::{Entry, Mark};
use migration::manifest::{Problem, Scrap};
use migration::panics::guarded;
use migration::transport::{Connection, Listener};
use migration::vmstate::{FieldError, Section, SectionId};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

use super::exercise::exercise;
use super::local::{self, LedgerPage};
use super::trial::Trial;
use super::{details, disks, fit};
use crate::announce::Rounds;
use crate::background;
use crate::control::RunState;
use crate::memfd::Memfd;
use crate::vm::Vm;

/// How a QEMU's further connections begin, each with a packet of its own (`MULTIFD_MAGIC`; the stream
/// of the first one begins otherwise).
const MULTIFD_MAGIC: [u8; 4] = 0x1122_3344_u32.to_be_bytes();

/// A VM that waits to become what another one was.
pub(super) struct Arriving<'a> {
    vm: Arc<Vm>,
    listener: Option<&'a Listener>,
    /// Whose the memory is, which came as a descriptor.
    ledger: Option<LedgerPage>,
    /// Shows what KVM would refuse.
    trial: Trial,
    /// All that could fail has been done.
    ready: bool,
}

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        self.vm.machine.dismiss();
    }
}

impl<'a> Arriving<'a> {
    /// For a source that has connected to `listener`, or what comes from elsewhere.
    pub(super) fn new(vm: Arc<Vm>, listener: Option<&'a Listener>, trial: Trial) -> Self {
        vm.kvm_state.forget();
        vm.machine.ram.roms().clear();
        Self { vm, listener, ledger: None, trial, ready: false }
    }
}

impl Machine for Arriving<'_> {
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
        self.vm.sections(RunState::Running)
    }
    fn details(&self) -> Value {
        details::of(&self.vm)
    }
    fn exercise(&self) {
        exercise(&self.vm.machine);
    }
}

impl Arriving<'_> {
    /// Everything that can fail before the guest runs.
    fn get_ready(&self) -> Result<(), VmError> {
        self.vm
            .kvm_state
            .start_clocks(&self.vm.machine)
            .map_err(|e| VmError::with("the clocks could not be set", e))
    }

    /// Since when it does what it shall do.
    fn let_run(&self) -> Instant {
        // First, so that the guest never runs unseen; and not before the memory was taken, if it is the
        // source's own: who sees the mark may end the other copy.
        if let Err(e) = self.vm.machine.board.guest_started() {
            tracing::warn!("{}", crate::error_chain(&e));
        }
        let mut life = self.vm.life();
        if self.vm.came_running() && life.autostart {
            self.vm.start_running(&mut life)
        } else {
            life.state = RunState::Paused;
            Instant::now()
        }
    }
}

impl DestinationVm for Arriving<'_> {
    fn check_details(&mut self, source: &Value) -> Vec<Problem> {
        fit::compare(&self.vm, &mut self.trial, source)
    }

    fn expect(&mut self) -> Result<(), VmError> {
        crate::heap::warm(self.vm.machine.board.devices.len());
        self.vm
            .kvm_state
            .show_promised(&self.vm.machine)
            .map_err(|e| VmError::with("the vCPUs do not take the source's processor", e))
    }

    fn give_way(&self) -> fn(bool) {
        background::give_way
    }

    fn accept_block(&mut self, block: &RamBlock) -> bool {
        match self.vm.machine.ram.roms().add(block) {
            Ok(()) => true,
            Err(e) => {
                tracing::warn!("{e}");
                false
            }
        }
    }

    fn next_connection(&mut self, timeout: Duration) -> Result<Option<Connection>, VmError> {
        let Some(listener) = self.listener else {
            // A socket that was handed over is the only one.
            thread::sleep(timeout);
            return Ok(None);
        };
        let failed = |e| VmError::with("the listener could not be looked at", e);
        listener.accept(timeout).map_err(failed)
    }

    fn between_sections(&mut self) -> Result<(), VmError> {
        // Nothing in the first connection says so, and its pages would be missing.
        let others = self.listener.map_or(Ok(false), |l| l.waiting_with(MULTIFD_MAGIC));
        if others.map_err(|e| VmError::with("the listener could not be looked at", e))? {
            return Err(VmError::new(
                "the source sends its pages over several connections, and none were expected: switch \
                 the capability 'multifd' on here before 'migrate-incoming', with as many \
                 'multifd-channels' as there, or off there",
            ));
        }
        Ok(())
    }

    fn begin_rehearsal(&mut self, scraps: &[Scrap]) -> Result<(), VmError> {
        let memory = self.vm.machine.ram.guest();
        for Scrap { address, value } in scraps {
            memory
                .write_obj(*value, GuestAddress(*address))
                .map_err(|e| VmError::with("a word of memory could not be set", e))?;
        }
        Ok(())
    }

    fn end_rehearsal(&mut self, scraps: &[Scrap]) -> Result<(), VmError> {
        let blank: Vec<_> = scraps.iter().map(|scrap| Scrap { value: 0, ..*scrap }).collect();
        self.begin_rehearsal(&blank)?;
        // It has shown the source's processor meanwhile.
        self.vm.kvm_state.promise(self.vm.machine.cpu.clone());
        self.prepare()?;
        self.vm.kvm_state.forget();
        Ok(())
    }

    fn prepare(&mut self) -> Result<(), VmError> {
        self.vm
            .kvm_state
            .install(&self.vm.machine)
            .map_err(|e| VmError::with("the vCPUs' state could not be loaded", e))?;
        self.vm.machine.board.refresh();
        self.vm
            .machine
            .show_firmware()
            .map_err(|e| VmError::with("the guest's firmware could not be put in its place", e))
    }

    fn take_disks(&mut self, left: &Value) -> Result<(), VmError> {
        let board = &self.vm.machine.board;
        board.open_backends().map_err(|e| VmError::with("a disk could not be taken", e))?;
        let unlike = disks::unlike(&board.images, left)
            .map_err(|e| VmError::with("a disk can't be compared with how it was left", e));
        let error = match unlike {
            Ok(None) => return Ok(()),
            Ok(Some(what)) => VmError::new(what),
            Err(error) => error,
        };
        self.release_disks();
        Err(error)
    }

    fn release_disks(&mut self) {
        if let Err(e) = self.vm.machine.board.close_backends() {
            tracing::error!("a disk could not be given back: {e}");
        }
    }

    fn adopt_memory(&mut self, from: BorrowedFd<'_>) -> Result<(), VmError> {
        let ram = &self.vm.machine.ram;
        let unusable = |e| VmError::with("the descriptors of memory and ledger", e);
        let [memory, ledger] = local::receive(from).map_err(unusable)?;
        let memory = Memfd::received(memory, ram.size(), "the guest's memory");
        let memory = memory.map_err(|e| VmError::with("what the source sent can't be used", e))?;
        let ledger = LedgerPage::received(ledger)?;
        ram.adopt(memory).map_err(|e| VmError::with("the guest's memory can't be mapped", e))?;
        self.ledger = Some(ledger);
        Ok(())
    }

    fn claim_memory(&mut self) -> Result<(), VmError> {
        // The memory can't be written to until it is taken: what would change it now fails.
        self.get_ready()?;
        self.ready = true;
        match self.ledger.as_ref().map(|ledger| ledger.mark(Mark::Take)) {
            Some(Ok(_)) => {}
            Some(Err(Entry::Kept)) => {
                return Err(VmError::new("the source has taken the guest back meanwhile"));
            }
            other => {
                let what = format!("the source's ledger does not offer the memory: {other:?}");
                return Err(VmError::new(what));
            }
        }
        let writable = self.vm.machine.ram.make_writable();
        writable.map_err(|e| VmError::with("the guest's memory can't be made writable", e))
    }

    fn give_memory_back(&mut self) {
        let Some(ledger) = &self.ledger else { return };
        match self.vm.machine.ram.let_go() {
            // Of memory that was not taken there is nothing to say.
            Ok(()) => drop(ledger.mark(Mark::Return)),
            Err(e) => tracing::error!(
                "the guest's memory can't be let go of, so that the source is not given it: {e}"
            ),
        }
    }

    fn start(&mut self) -> Result<Instant, VmError> {
        if !self.ready {
            guarded(|| self.get_ready())
                .unwrap_or_else(|panicked| Err(VmError::new(panicked.to_string())))?;
        }
        let since = guarded(|| self.let_run()).unwrap_or_else(|panicked| {
            // It may have run for a moment. Whoever looks at the disks shall take it neither for one that
            // runs on nor for one that never did.
            self.vm.leave_mark();
            self.release_disks();
            resume_unwind(Box::new(panicked.to_string()));
        });
        if let Some(Err(entry)) = self.ledger.as_ref().map(|ledger| ledger.mark(Mark::Start)) {
            tracing::error!("the guest runs, and the source's ledger says otherwise: {entry:?}");
        }
        // It runs, whatever becomes of these.
        let _ = guarded(|| self.vm.machine.catch_up());
        let rounds = Rounds::from(&self.vm.migration.lock().parameters);
        let _ = guarded(|| self.vm.machine.board.announce(rounds, None));
        Ok(since)
    }

    fn section_differences(
        &self,
        section: &SectionId,
        received: &[u8],
        saved_again: &[u8],
    ) -> Vec<FieldError> {
        self.vm.kvm_state.differences(section, received, saved_again)
    }
}
