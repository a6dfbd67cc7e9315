//! What is done in the pause, done once before it, for nothing.
//!
//! Code that has not run for a while is slow: nothing of it is in the processor's caches any more, through which the
//! guest's memory went meanwhile.

use arch::wire::{IrqchipWire, VcpuWire};
use migration::vmstate::{self, Audience, SectionId, SliceSource, VmState};

use crate::machine::Machine;

/// Writes all sections and reads them. What becomes of that is nobody's business. The devices' is their state of this
/// moment, and they may be at work; the kernel's part is what it was when the machine was switched on, so that no
/// vCPU is looked at.
pub(super) fn exercise(machine: &Machine) {
    for section in machine.board.sections() {
        if let Ok(body) = section.save(Audience::MiniVmm) {
            // It is decoded and checked, and changes nothing.
            let _ = section.decode(section.version(), &mut SliceSource::new(&body));
        }
    }
    let (vcpus, chips) = machine.power_on_state();
    let context = machine.wire_context(0);
    let vcpu = vcpus.first().map(|vcpu| VcpuWire::from_state(vcpu, Audience::MiniVmm, &context));
    if let Some(Ok(VcpuWire { cpu, common, apic })) = vcpu {
        there_and_back(&cpu);
        there_and_back(&common);
        there_and_back(&apic);
    }
    let IrqchipWire { pic, ioapic, pit } = IrqchipWire::from_state(chips, Audience::MiniVmm, 0, 0);
    pic.iter().for_each(there_and_back);
    there_and_back(&ioapic);
    there_and_back(&pit);
}

fn there_and_back<T: VmState>(state: &T) {
    let id = SectionId::new("exercise", 0);
    if let Ok(body) = vmstate::to_bytes(&id, state) {
        let _ = vmstate::from_source::<T>(&id, T::VERSION, &mut SliceSource::new(&body));
    }
}
