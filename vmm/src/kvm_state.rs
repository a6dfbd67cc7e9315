//! The state that KVM holds, as sections: vCPUs, interrupt controllers, PIT and clocks.
//!
//! ```text
//! leaving    vCPUs and devices stand still → snapshot(): everything is read once, the vCPUs by several
//!            threads → every section writes its part of it
//! arriving   every section decodes and checks its part → apply() keeps it → install(): everything
//!            is given to KVM → start_clocks(): kvmclock and TSCs, right before the vCPUs run
//! ```

mod differences;
mod section;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::clock::{ClockState, synchronise_tscs};
use arch::cpuid::CpuProfile;
use arch::irqchip::IrqchipState;
use arch::msr::Msr;
use arch::vcpu_state::VcpuState;
use arch::wire::{self, IrqchipWire, Registers, VcpuWire, WireContext};
use devices::chipset::holders::GlobalState;
use devices::clock::Clock;
use migration::vmstate::{Audience, FieldError, SectionId};

pub(crate) use section::global_state;
pub use section::sections;

use crate::clock::monotonic_ns;
use crate::machine::{Machine, MachineError};

/// Everything that KVM holds, at one moment.
pub struct Snapshot {
    vcpus: Vec<VcpuState>,
    chips: IrqchipState,
    clock: ClockState,
    /// What time it was, and what the vCPUs are.
    context: WireContext,
    /// Each vCPU's model-specific registers when the machine was switched on.
    power_on: Vec<Vec<Msr>>,
    /// The host's monotonic clock, on which KVM counts the PIT's times.
    monotonic_ns: i64,
    /// The vCPU that was asked for last, as its sections have it: it has three, which are written one after the other.
    last: Mutex<Option<(u32, Audience, Arc<VcpuWire>)>>,
}

impl Snapshot {
    fn vcpu(&self, index: u32, audience: Audience) -> Result<Arc<VcpuWire>, FieldError> {
        let mut last = lock(&self.last);
        if let Some((of, to, wire)) = last.as_ref()
            && (*of, *to) == (index, audience)
        {
            return Ok(wire.clone());
        }
        let wire = Arc::new(self.wire(index, audience)?);
        *last = Some((index, audience, wire.clone()));
        Ok(wire)
    }

    fn wire(&self, index: u32, audience: Audience) -> Result<VcpuWire, FieldError> {
        let state = self
            .vcpus
            .get(index as usize)
            .ok_or_else(|| FieldError::new("index", "a vCPU of this machine", index))?;
        if audience == Audience::Qemu {
            self.check_nothing_is_lost(state, index)?;
        }
        VcpuWire::from_state(state, audience, &self.context)
    }

    /// What was looked at before the first page may have changed meanwhile.
    fn check_nothing_is_lost(&self, state: &VcpuState, index: u32) -> Result<(), FieldError> {
        let power_on = self.power_on.get(index as usize).map_or(&[][..], Vec::as_slice);
        let lost = Registers::from(state).lost(power_on, &self.context);
        lost.into_iter().find(|loss| loss.harmless.is_none()).map_or(Ok(()), |loss| {
            let expected = format_args!(
                "{:#x}, its value after power-on, since QEMU's layout has no place for it",
                loss.power_on
            );
            Err(FieldError::new(&*loss.register, expected, format_args!("{:#x}", loss.value)))
        })
    }

    fn chips(&self, audience: Audience) -> IrqchipWire {
        let virtual_ns = self.context.virtual_ns;
        IrqchipWire::from_state(&self.chips, audience, virtual_ns, self.monotonic_ns)
    }
}

/// What has come so far.
#[derive(Default)]
pub(crate) struct Arrived {
    pub(crate) timer: Option<wire::TimerSection>,
    pub(crate) cpu_common: BTreeMap<u32, wire::CpuCommon>,
    pub(crate) cpu: BTreeMap<u32, wire::Cpu>,
    pub(crate) apic: BTreeMap<u32, wire::Apic>,
    pub(crate) kvmclock: Option<wire::Kvmclock>,
    pub(crate) pic: BTreeMap<u32, wire::I8259>,
    pub(crate) ioapic: Option<wire::Ioapic>,
    pub(crate) pit: Option<wire::I8254>,
    pub(crate) global: Option<GlobalState>,
    /// Clocks and TSCs that wait for the start.
    clocks: Option<(ClockState, Vec<VcpuState>, i64)>,
}

/// The state of one machine's kernel half, on its way out or in.
#[derive(Default)]
pub struct KvmState {
    snapshot: Mutex<Option<Arc<Snapshot>>>,
    arrived: Mutex<Arrived>,
    /// The processor that the source's guest has been shown.
    promised: Mutex<Option<CpuProfile>>,
}

/// The state that came can't be given to KVM.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A section without which no vCPU can run has not come.
    #[error("the section {0} has not come")]
    Missing(SectionId),
    /// A section has a value that KVM can't be given.
    #[error("{section}: {error}")]
    Field {
        /// Which section.
        section: SectionId,
        /// Which field.
        #[source]
        error: FieldError,
    },
    /// The machine refused.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] arch::error::KvmError),
}

/// Where SeaBIOS puts what it has in system management mode.
const SMBASE_IN_USE: u32 = 0xa_0000;
/// CR0's bit for paging.
const CR0_PG: u64 = 1 << 31;

/// Whether the first vCPU is in a firmware, or a boot loader that calls one, that goes on by system
/// management mode: it would wait for an SMI that never comes. An operating system pages.
fn check_no_smm(cpu: &wire::Cpu) -> Result<(), FieldError> {
    if cpu.smbase == SMBASE_IN_USE && cpu.cr0 & CR0_PG == 0 {
        return Err(FieldError::new(
            "cr0",
            "paging: the guest is in its firmware or boot loader, which uses system management mode, \
             and there is none here; let it boot first",
            format_args!("{:#x}", cpu.cr0),
        ));
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvmState {
    /// Forgets what was read or has come before.
    pub fn forget(&self) {
        *lock(&self.snapshot) = None;
        *lock(&self.arrived) = Arrived::default();
        *lock(&self.promised) = None;
    }

    /// Everything, read from KVM at the first call after [`forget`](Self::forget). The vCPUs and
    /// the devices must stand still.
    pub(crate) fn snapshot(&self, machine: &Machine) -> Result<Arc<Snapshot>, MachineError> {
        let mut slot = lock(&self.snapshot);
        if let Some(snapshot) = slot.as_ref() {
            return Ok(snapshot.clone());
        }
        // The chips after the vCPUs: an interrupt that a LAPIC has accepted leaves the chips. The
        // clocks last, side by side.
        let vcpus = machine.capture_vcpus()?;
        let chips = IrqchipState::capture(&machine.vm)?;
        let clock = ClockState::capture(&machine.vm)?;
        let context = machine.wire_context(machine.clock.virtual_ns());
        let monotonic_ns = monotonic_ns();
        let power_on = |index| machine.power_on_msrs(index).to_vec();
        let power_on = (0..machine.config().smp).map(power_on).collect();
        let snapshot = Arc::new(Snapshot {
            vcpus,
            chips,
            clock,
            context,
            power_on,
            monotonic_ns,
            last: Mutex::default(),
        });
        *slot = Some(snapshot.clone());
        Ok(snapshot)
    }

    pub(crate) fn arrived(&self) -> MutexGuard<'_, Arrived> {
        lock(&self.arrived)
    }

    /// Notes what the source's guest has been told of its processor.
    pub(crate) fn promise(&self, cpu: CpuProfile) {
        *lock(&self.promised) = Some(cpu);
    }

    /// Shows the vCPUs' guest the processor that it has been told of: it must not see it change, not even
    /// for the better.
    pub(crate) fn show_promised(&self, machine: &Machine) -> Result<(), MachineError> {
        let promised = lock(&self.promised).take();
        promised.map_or(Ok(()), |cpu| machine.show_cpu(&cpu))
    }

    /// Gives what has come to KVM. Nothing runs afterwards that did not before.
    pub fn install(&self, machine: &Machine) -> Result<(), InstallError> {
        let mut arrived = self.arrived();
        let missing = |name: &str, instance| InstallError::Missing(SectionId::new(name, instance));
        let virtual_ns = arrived.timer.as_ref().ok_or(missing("timer", 0))?.cpu_clock_offset;
        // What is saved from now on is what KVM has then.
        *lock(&self.snapshot) = None;
        // Devices that look at the time when they go on must see the one that came.
        machine.clock.set(virtual_ns);

        let context = machine.wire_context(virtual_ns);
        let field = |name: &str, instance| {
            let section = SectionId::new(name, instance);
            move |error| InstallError::Field { section, error }
        };
        if let Some(first) = arrived.cpu.get(&0) {
            check_no_smm(first).map_err(field("cpu", 0))?;
        }
        let mut states = Vec::new();
        for index in 0..machine.config().smp {
            let vcpu = VcpuWire {
                cpu: arrived.cpu.remove(&index).ok_or(missing("cpu", index))?,
                common: arrived.cpu_common.remove(&index).unwrap_or_default(),
                apic: arrived.apic.remove(&index).ok_or(missing("apic", index))?,
            };
            states.push(vcpu.to_state(index, &context).map_err(field("cpu", index))?);
        }
        synchronise_tscs(&mut states);
        let pic = |n| arrived.pic.get(&n).copied().ok_or(missing("i8259", n));
        let chips = IrqchipWire {
            pic: [pic(0)?, pic(1)?],
            ioapic: arrived.ioapic.clone().ok_or(missing("ioapic", 0))?,
            pit: arrived.pit.clone().ok_or(missing("i8254", 0))?,
        };
        let chips = chips
            .to_state(virtual_ns, monotonic_ns())
            .map_err(field("interrupt controllers", 0))?;
        let clock = match &arrived.kvmclock {
            Some(section) => section.to_state(),
            None => ClockState {
                clock: virtual_ns.max(0) as u64,
                realtime: None,
                host_tsc: None,
                stable: false,
            },
        };
        // Where it was not done ahead.
        self.show_promised(machine)?;
        // The chips after the LAPICs: what the IOAPIC has to deliver goes into them at once.
        machine.restore_vcpus(&states)?;
        chips.restore(&machine.vm)?;
        arrived.clocks = Some((clock, states, virtual_ns));
        Ok(())
    }

    /// What is different about a section that was received and one saved again after
    /// [`install`](Self::install).
    pub fn differences(
        &self,
        section: &SectionId,
        received: &[u8],
        saved_again: &[u8],
    ) -> Vec<FieldError> {
        differences::find(section, received, saved_again)
    }

    /// Sets the clocks to what they must be now. Called once, right before the vCPUs may run.
    pub fn start_clocks(&self, machine: &Machine) -> Result<(), MachineError> {
        let Some((clock, states, virtual_ns)) = self.arrived().clocks.take() else {
            return Ok(());
        };
        let base = clock.restore(&machine.vm)?;
        let advanced = i64::try_from(base.advanced).unwrap_or(i64::MAX);
        machine.clock.set(virtual_ns.saturating_add(advanced));
        machine.restore_tscs(&states, base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_firmware_that_uses_smm_is_refused() {
        let cpu = |smbase, cr0| wire::Cpu { smbase, cr0, ..wire::Cpu::default() };
        // As SeaBIOS leaves it without SMM, and an operating system with it.
        check_no_smm(&cpu(0x3_0000, 0x11)).unwrap();
        check_no_smm(&cpu(SMBASE_IN_USE, 0x8005_0033)).unwrap();
        let error = check_no_smm(&cpu(SMBASE_IN_USE, 0x11)).unwrap_err();
        assert!(error.to_string().contains("boot loader"), "{error}");
    }
}
