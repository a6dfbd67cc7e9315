//! The interrupt controllers and the timer that KVM emulates for the whole VM: two PICs, the IOAPIC
//! and the PIT, as the kernel tells them.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state,
    kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_pic_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use crate::error::{KvmError, vm_error};
use crate::layout;

/// Which lines of the master and of the slave PIC a guest may make level-triggered (82371SB data
/// sheet, ELCR1 and ELCR2): not timer, keyboard, cascade; not RTC and FPU.
pub(crate) const ELCR_MASK: [u8; 2] = [0xf8, 0xde];

/// The IOAPIC's registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoapicState {
    /// The register that the guest has selected.
    pub select: u32,
    /// Its identification.
    pub id: u32,
    /// Lines that are asserted and not yet delivered.
    pub irr: u32,
    /// One entry for each of the 24 lines.
    pub redirection: [u64; 24],
}

/// All of them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct IrqchipState {
    /// Master and slave.
    pub pic: [kvm_pic_state; 2],
    /// The IOAPIC.
    pub ioapic: IoapicState,
    /// The PIT; its times are on the host's `CLOCK_MONOTONIC`.
    pub pit: kvm_pit_state2,
}

impl IrqchipState {
    /// Reads all. Call it with all vCPUs stopped and all devices paused, after the vCPUs' capture:
    /// an interrupt that a LAPIC has accepted leaves the chips.
    pub fn capture(vm: &VmFd) -> Result<Self, KvmError> {
        let get = |chip_id: u32, name: &str| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(vm_error(format_args!("KVM_GET_IRQCHIP({name})")))?;
            Ok::<_, KvmError>(chip.chip)
        };
        let master = get(KVM_IRQCHIP_PIC_MASTER, "master PIC")?;
        let slave = get(KVM_IRQCHIP_PIC_SLAVE, "slave PIC")?;
        let ioapic = get(KVM_IRQCHIP_IOAPIC, "IOAPIC")?;
        // SAFETY: the kernel has filled the union's member that belongs to the chip id; all members
        // are plain old data.
        let (master, slave, ioapic) = unsafe { (master.pic, slave.pic, ioapic.ioapic) };
        Ok(Self {
            pic: [master, slave],
            ioapic: IoapicState {
                select: ioapic.ioregsel,
                id: ioapic.id,
                irr: ioapic.irr,
                // SAFETY: an entry is its 64 bits, whatever its fields are called.
                redirection: ioapic.redirtbl.map(|entry| unsafe { entry.bits }),
            },
            pit: vm.get_pit2().map_err(vm_error("KVM_GET_PIT2"))?,
        })
    }

    /// Gives all to a VM. Call it after the vCPUs' restore: what the IOAPIC still has to deliver goes
    /// into the LAPICs at once, and setting these afterwards would lose it.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        let set = |chip: kvm_irqchip, name: &str| {
            vm.set_irqchip(&chip).map_err(vm_error(format_args!("KVM_SET_IRQCHIP({name})")))
        };
        for (chip_id, name, pic, elcr_mask) in [
            (KVM_IRQCHIP_PIC_MASTER, "master PIC", self.pic[0], ELCR_MASK[0]),
            (KVM_IRQCHIP_PIC_SLAVE, "slave PIC", self.pic[1], ELCR_MASK[1]),
        ] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            chip.chip.pic = kvm_pic_state { elcr_mask, ..pic };
            set(chip, name)?;
        }
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        chip.chip.ioapic = kvm_ioapic_state {
            base_address: layout::IOAPIC.start,
            ioregsel: self.ioapic.select,
            id: self.ioapic.id,
            irr: self.ioapic.irr,
            pad: 0,
            redirtbl: self.ioapic.redirection.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits }),
        };
        set(chip, "IOAPIC")?;
        vm.set_pit2(&self.pit).map_err(vm_error(format_args!(
            "KVM_SET_PIT2(modes {:?}, flags {:#x})",
            self.pit.channels.map(|channel| channel.mode),
            self.pit.flags
        )))
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of the PIT's times.
pub fn monotonic_ns() -> i64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec to write to.
    if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) } != 0 {
        return 0;
    }
    now.tv_sec.wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec)
}
