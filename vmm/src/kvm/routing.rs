//! Interrupt routing: which global system interrupt reaches which controller pin or message.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

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
pub struct KvmRouting {
    vm: Arc<VmFd>,
    messages: Mutex<BTreeMap<u32, Option<MsiMessage>>>,
}

impl KvmRouting {
    /// The table of a PC with no messages, installed.
    pub fn new(vm: Arc<VmFd>) -> Result<Arc<Self>, KvmError> {
        let routing = Self { vm, messages: Mutex::default() };
        routing.install(&BTreeMap::new()).map_err(|e| KvmError::ioctl("KVM_SET_GSI_ROUTING", e))?;
        Ok(Arc::new(routing))
    }

    fn install(
        &self,
        messages: &BTreeMap<u32, Option<MsiMessage>>,
    ) -> Result<(), kvm_ioctls::Error> {
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
        let mut messages = self.0.messages.lock().unwrap_or_else(PoisonError::into_inner);
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
    fn set_message(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut messages = self.routing.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.get(&self.gsi) == Some(&message) {
            return Ok(());
        }
        let before = messages.insert(self.gsi, message);
        self.routing.install(&messages).map_err(|e| {
            messages.insert(self.gsi, before.flatten());
            io::Error::from(e)
        })
    }

    fn trigger(&self) -> io::Result<()> {
        self.fd.write(1)
    }

    fn eventfd(&self) -> &EventFd {
        &self.fd
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        let mut messages = self.routing.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.routing.vm.unregister_irqfd(&self.fd, self.gsi);
        messages.remove(&self.gsi);
        if let Err(e) = self.routing.install(&messages) {
            tracing::warn!(gsi = self.gsi, "KVM_SET_GSI_ROUTING failed: {e}");
        }
    }
}
