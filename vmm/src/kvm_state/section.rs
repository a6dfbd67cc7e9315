//! The sections themselves: which part of the snapshot each writes, and where what came is kept.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

use arch::wire::{self, VcpuWire};
use devices::chipset::holders::GlobalState;
use migration::vmstate::{
    self, Audience, ByteSource, Description, FieldError, Section, SectionId, StateError, VmState,
};

use super::{Arrived, Snapshot};
use crate::control::RunState;
use crate::vm::Vm;

/// Makes a section's state out of the snapshot.
type Save<T> = Box<dyn Fn(&Snapshot, Audience) -> Result<T, FieldError> + Send>;
/// Keeps a state that came.
type Keep<T> = Box<dyn Fn(&mut Arrived, T) + Send>;
/// Says what is wrong with a state.
type Check<T> = fn(&T) -> Result<(), FieldError>;

struct Part<T> {
    vm: Arc<Vm>,
    id: SectionId,
    save: Save<T>,
    check: Check<T>,
    keep: Keep<T>,
}

impl<T: VmState> Part<T> {
    fn device_error(
        &self,
        what: &str,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> StateError {
        StateError::Device {
            section: self.id.to_string(),
            what: what.into(),
            source: Some(Box::new(source)),
        }
    }

    fn state(&self, audience: Audience) -> Result<T, StateError> {
        let snapshot = self
            .vm
            .kvm_state
            .snapshot(&self.vm.machine)
            .map_err(|e| self.device_error("its state could not be read", e))?;
        (self.save)(&snapshot, audience)
            .map_err(|error| StateError::Field { section: self.id.to_string(), error })
    }
}

impl<T: VmState> Section for Part<T> {
    fn id(&self) -> SectionId {
        self.id.clone()
    }
    fn version(&self) -> u32 {
        T::VERSION
    }
    fn min_version(&self) -> u32 {
        T::MIN_VERSION
    }
    fn save(&self, audience: Audience) -> Result<Vec<u8>, StateError> {
        vmstate::to_bytes(&self.id, &self.state(audience)?)
    }
    fn decode(
        &self,
        version: u32,
        source: &mut dyn ByteSource,
    ) -> Result<Box<dyn Any + Send>, StateError> {
        let state: T = vmstate::from_source(&self.id, version, source)?;
        (self.check)(&state)
            .map_err(|error| StateError::Field { section: self.id.to_string(), error })?;
        Ok(Box::new(state))
    }
    fn apply(&mut self, state: Box<dyn Any + Send>) -> Result<(), StateError> {
        let state = state.downcast::<T>().map_err(|_| StateError::Device {
            section: self.id.to_string(),
            what: "it was given another section's state".into(),
            source: None,
        })?;
        (self.keep)(&mut self.vm.kvm_state.arrived(), *state);
        Ok(())
    }
    fn save_described(&self, audience: Audience) -> Result<(Vec<u8>, Description), StateError> {
        let (id, state) = (self.id.clone(), self.state(audience)?);
        Ok((vmstate::to_bytes(&id, &state)?, Box::new(move || vmstate::describe(&id, &state))))
    }
    fn layout_digest(&self) -> u64 {
        vmstate::layout_digest::<T>()
    }
}

fn anything<T>(_: &T) -> Result<(), FieldError> {
    Ok(())
}

/// The sections of the kernel's half, in three groups that stand at different places among the
/// devices' sections: clocks and vCPUs first, chips before the RTC, the PIT behind it.
pub fn sections(vm: &Arc<Vm>) -> [Vec<Box<dyn Section>>; 3] {
    fn part<T: VmState>(
        vm: &Arc<Vm>,
        name: &str,
        instance: u32,
        save: impl Fn(&Snapshot, Audience) -> Result<T, FieldError> + Send + 'static,
        keep: impl Fn(&mut Arrived, T) + Send + 'static,
    ) -> Box<dyn Section> {
        Box::new(Part {
            vm: vm.clone(),
            id: SectionId::new(name, instance),
            save: Box::new(save),
            check: anything,
            keep: Box::new(keep),
        })
    }
    /// What is part of a vCPU, kept by its index.
    fn of_vcpu<T: VmState>(
        vm: &Arc<Vm>,
        name: &str,
        index: u32,
        part_of: impl Fn(&VcpuWire) -> T + Send + 'static,
        place: impl Fn(&mut Arrived) -> &mut BTreeMap<u32, T> + Send + 'static,
    ) -> Box<dyn Section> {
        part(
            vm,
            name,
            index,
            move |s, audience| s.vcpu(index, audience).map(|vcpu| part_of(&vcpu)),
            move |a, t| {
                let _ = place(a).insert(index, t);
            },
        )
    }
    let mut first = vec![part(
        vm,
        "timer",
        0,
        |s, _| {
            Ok(wire::TimerSection {
                cpu_clock_offset: s.context.virtual_ns,
                cpu_ticks_offset: s.clock.host_tsc.unwrap_or(0) as i64,
                ..Default::default()
            })
        },
        |a, t| a.timer = Some(t),
    )];
    for index in 0..vm.config().smp {
        first.push(of_vcpu(vm, "cpu_common", index, |v| v.common, |a| &mut a.cpu_common));
        first.push(of_vcpu(vm, "cpu", index, |v| v.cpu.clone(), |a| &mut a.cpu));
        first.push(of_vcpu(vm, "apic", index, |v| v.apic.clone(), |a| &mut a.apic));
    }
    first.push(part(
        vm,
        "kvmclock",
        0,
        |s, audience| Ok(wire::Kvmclock::from_state(&s.clock, audience)),
        |a, t| a.kvmclock = Some(t),
    ));
    let [master, slave] = [0, 1].map(|n: u32| {
        part(
            vm,
            "i8259",
            n,
            move |s, audience| {
                let [master, slave] = s.chips(audience).pic;
                Ok(if n == 0 { master } else { slave })
            },
            move |a, t| {
                let _ = a.pic.insert(n, t);
            },
        )
    });
    let ioapic = part(
        vm,
        "ioapic",
        0,
        |s, audience| Ok(s.chips(audience).ioapic),
        |a, t| a.ioapic = Some(t),
    );
    let pit = part(vm, "i8254", 0, |s, audience| Ok(s.chips(audience).pit), |a, t| a.pit = Some(t));
    [first, vec![master, slave, ioapic], vec![pit]]
}

/// Whether the VM ran when it was stopped for the move.
pub(crate) fn global_state(vm: &Arc<Vm>, state: RunState) -> Box<dyn Section> {
    let name = if state == RunState::Running { "running" } else { "paused" };
    let arrived = vm.clone();
    Box::new(Part {
        vm: vm.clone(),
        id: SectionId::new("globalstate", 0),
        // A machine that has just arrived is in the state that it came with.
        save: Box::new(move |_, _| {
            let came = arrived.kvm_state.arrived().global.clone();
            Ok(came.unwrap_or_else(|| GlobalState::new(name)))
        }),
        check: |state: &GlobalState| state.runstate().map(drop),
        keep: Box::new(|a, t| a.global = Some(t)),
    })
}
