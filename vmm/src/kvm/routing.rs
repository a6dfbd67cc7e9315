//! Interrupt routing: which global system interrupt reaches which controller pin or message.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::irq::{IrqLine, MsiController, MsiMessage, MsiVector};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::KvmError;

/// Pins of the IOAPIC (82093AA). Messages get numbers from here on.
const IOAPIC_PINS: u32 = 24;
/// Numbers that this machine hands out at most; KVM itself allows 4096 (KVM_MAX_IRQ_ROUTES).
const MAX_GSI: u32 = 1024;

/// The routing table of one VM.
///
/// The kernel is given a table as a whole, and waits for whoever reads the one before. A driver changes a
/// route at a time, and a guest that arrives has hundreds that nobody has used yet. So a change is noted, and the
/// kernel given all of them when the next message is sent. It refuses none for what is in it, as it would with
/// KVM_CAP_X2APIC_API, which is not asked for.
pub struct KvmRouting {
    vm: Arc<VmFd>,
    messages: Mutex<Messages>,
    /// Whether the kernel's table is another; set and cleared with `messages` locked.
    stale: AtomicBool,
}

type Messages = BTreeMap<u32, Option<MsiMessage>>;

impl KvmRouting {
    /// The table of a PC with no messages, installed.
    pub fn new(vm: Arc<VmFd>) -> Result<Arc<Self>, KvmError> {
        let routing = Self { vm, messages: Mutex::default(), stale: AtomicBool::new(false) };
        routing.install(&Messages::new()).map_err(|e| KvmError::ioctl("KVM_SET_GSI_ROUTING", e))?;
        Ok(Arc::new(routing))
    }

    fn lock(&self) -> MutexGuard<'_, Messages> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the kernel what was changed since it was last asked to send a message.
    fn bring_up_to_date(&self) -> Result<(), kvm_ioctls::Error> {
        if !self.stale.load(Ordering::Acquire) {
            return Ok(());
        }
        let messages = self.lock();
        self.install(&messages)?;
        self.stale.store(false, Ordering::Release);
        Ok(())
    }

    fn install(&self, messages: &Messages) -> Result<(), kvm_ioctls::Error> {
        let pin = |gsi, irqchip, pin| {
            let mut e =
                kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            e.u.irqchip.irqchip = irqchip;
            e.u.irqchip.pin = pin;
            e
        };
        let mut entries = Vec::new();
        for gsi in 0..8 {
            entries.push(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
        }
        for gsi in 8..16 {
            entries.push(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8));
        }
        // On a PC the timer's interrupt 0 arrives at pin 2, and pin 0 has nobody (the MADT's
        // interrupt source override says the same).
        entries.push(pin(0, KVM_IRQCHIP_IOAPIC, 2));
        for gsi in (1..IOAPIC_PINS).filter(|&gsi| gsi != 2) {
            entries.push(pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        }
        for (&gsi, message) in messages {
            let Some(message) = message else { continue };
            let mut e =
                kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            e.u.msi.address_lo = message.address as u32;
            e.u.msi.address_hi = (message.address >> 32) as u32;
            e.u.msi.data = message.data;
            entries.push(e);
        }
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        self.vm.set_gsi_routing(&table)
    }

    /// The line of an ISA interrupt or IOAPIC pin.
    pub fn line(self: &Arc<Self>, gsi: u32) -> Arc<GsiLine> {
        Arc::new(GsiLine { vm: self.vm.clone(), gsi, level: Mutex::new(false) })
    }
}

/// One interrupt line.
pub struct GsiLine {
    vm: Arc<VmFd>,
    gsi: u32,
    level: Mutex<bool>,
}

impl IrqLine for GsiLine {
    fn set_level(&self, high: bool) {
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        if *level == high {
            return;
        }
        match self.vm.set_irq_line(self.gsi, high) {
            Ok(()) => *level = high,
            Err(e) => tracing::error!(gsi = self.gsi, high, "KVM_IRQ_LINE failed: {e}"),
        }
    }
}

/// The controller that devices allocate their vectors from.
pub struct KvmMsi(pub Arc<KvmRouting>);

impl MsiController for KvmMsi {
    fn allocate(&self) -> io::Result<Box<dyn MsiVector>> {
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mut messages = self.0.lock();
        let gsi = (IOAPIC_PINS..MAX_GSI)
            .find(|gsi| !messages.contains_key(gsi))
            .ok_or_else(|| io::Error::other(format!("all {MAX_GSI} interrupt routes are taken")))?;
        self.0.vm.register_irqfd(&fd, gsi).map_err(io::Error::from)?;
        messages.insert(gsi, None);
        Ok(Box::new(Vector { routing: self.0.clone(), gsi, fd }))
    }
}

struct Vector {
    routing: Arc<KvmRouting>,
    gsi: u32,
    fd: EventFd,
}

impl MsiVector for Vector {
    fn set_message(&self, message: MsiMessage) {
        let mut messages = self.routing.lock();
        if messages.insert(self.gsi, Some(message)).flatten() != Some(message) {
            self.routing.stale.store(true, Ordering::Release);
        }
    }

    fn trigger(&self) -> io::Result<()> {
        self.routing.bring_up_to_date()?;
        self.fd.write(1)
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        let mut messages = self.routing.lock();
        let _ = self.routing.vm.unregister_irqfd(&self.fd, self.gsi);
        messages.remove(&self.gsi);
        self.routing.stale.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use kvm_ioctls::{Kvm, VcpuFd};

    use super::*;

    /// Spurious interrupt vector register: vector 0xff, APIC on (Intel SDM vol. 3, 11.9).
    const SPURIOUS: (usize, i8) = (0xf0, 1);
    /// Interrupt request register: eight dwords, 16 bytes apart (11.8.4).
    const IRR: usize = 0x200;

    fn is_requested(vcpu: &VcpuFd, vector: usize) -> bool {
        let registers = vcpu.get_lapic().unwrap().regs;
        registers[IRR + vector / 32 * 16 + vector % 32 / 8] as u8 & 1 << (vector % 8) != 0
    }

    /// Sends a vector's message, which has to arrive as `vector`.
    fn sends(vcpu: &VcpuFd, from: &dyn MsiVector, vector: usize) {
        assert!(!is_requested(vcpu, vector));
        from.trigger().unwrap();
        let begin = Instant::now();
        while !is_requested(vcpu, vector) {
            assert!(begin.elapsed() < Duration::from_secs(10), "vector {vector:#x} did not come");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_message_goes_where_its_route_was_changed_to_last() {
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[SPURIOUS.0] = -1;
        lapic.regs[SPURIOUS.0 + 1] = SPURIOUS.1;
        vcpu.set_lapic(&lapic).unwrap();

        let controller = KvmMsi(KvmRouting::new(vm).unwrap());
        let message = |data| MsiMessage { address: 0xfee0_0000, data };
        let (one, other) = (controller.allocate().unwrap(), controller.allocate().unwrap());
        one.set_message(message(0x41));
        other.set_message(message(0x42));
        sends(&vcpu, &*other, 0x42);
        sends(&vcpu, &*one, 0x41);
        one.set_message(message(0x53));
        // Whoever sends first brings everybody's changes to the kernel, once.
        assert!(controller.0.stale.load(Ordering::Acquire));
        drop(other);
        let third = controller.allocate().unwrap();
        third.set_message(message(0x54));
        sends(&vcpu, &*third, 0x54);
        assert!(!controller.0.stale.load(Ordering::Acquire));
        sends(&vcpu, &*one, 0x53);
        one.set_message(message(0x53));
        assert!(!controller.0.stale.load(Ordering::Acquire), "nothing has changed");
    }
}
