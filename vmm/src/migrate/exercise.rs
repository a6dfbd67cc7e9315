//! What sections are written and read with in the pause, run once before it, for nothing.
//!
//! Code that has not run for a while is slow: nothing of it is in the processor's caches any more, through which the
//! guest's memory went meanwhile. Threads that will have a share of the work are made here too.

use arch::wire::{IrqchipWire, VcpuWire};
use migration::vmstate::{self, Audience, SectionId, SliceSource, VmState};

use crate::machine::Machine;

/// Writes the devices' sections, a vCPU's and the chips', and reads them; nothing comes of it. The devices' state is
/// that of this moment, and one that is at work is left alone. A vCPU's and the chips' is what it was when the machine
/// was switched on, so that nobody has to be stopped for it.
pub(super) fn exercise(machine: &Machine) {
    machine.muster();
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
