//! From power-on to the first instruction, and back to it on a reset.

use std::sync::PoisonError;

use arch::acpi::{self, AcpiConfig};
use arch::boot::{self, AcpiArea, BootConfig, KernelSource, RamMap};
use arch::layout;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::{Machine, MachineError};
use crate::config::Boot;
use crate::firmware;
use crate::rom::PC_BIOS;
use crate::selfcheck::{self, SelfcheckParams};

impl Machine {
    /// Puts the kernel, what it is told, and the board where a firmware would have put them.
    pub(super) fn boot(&self) -> Result<(), MachineError> {
        let (kernel, initrd, cmdline) = match &self.config.boot {
            Boot::Incoming {} => return Ok(()),
            Boot::Firmware {} => return self.boot_firmware(),
            Boot::Kernel { kernel, initrd, append } => {
                (KernelSource::File(kernel), initrd.as_deref(), append.clone())
            }
            Boot::SelfCheck { selfcheck: params } => (
                KernelSource::Image { name: "the self-checking guest", bytes: selfcheck::IMAGE },
                None,
                {
                    let mut params: SelfcheckParams = params.parse()?;
                    params.vcpus.get_or_insert(self.config.smp.into());
                    params.to_string()
                },
            ),
        };
        self.show_firmware()?;
        firmware::set_up(&self.bus, self.ram.size())?;
        // APIC ids are a byte, and the configuration has been checked for that.
        let vcpus = u8::try_from(self.config.smp).unwrap_or(u8::MAX);
        let tables = acpi::build(AcpiConfig { vcpus, ram: self.ram.size() })?;
        self.ram.guest().write_slice(&tables.image, GuestAddress(acpi::AREA_START)).map_err(
            |e| MachineError::Host {
                what: "the ACPI tables do not fit guest memory",
                source: std::io::Error::other(e),
            },
        )?;
        let low = layout::low_ram_size(self.ram.size());
        let entry = boot::load(
            self.ram.guest().as_ref(),
            &BootConfig {
                kernel,
                initrd,
                cmdline: &cmdline,
                ram: RamMap { low, high: self.ram.size() - low },
                acpi: Some(AcpiArea {
                    rsdp: tables.rsdp,
                    start: acpi::AREA_START,
                    size: acpi::AREA_LEN as u64,
                }),
            },
        )?;
        self.on_all(|index| {
            move |fd: &VcpuFd| {
                arch::vcpu_init::reset_msrs(index, fd)?;
                if index == 0 {
                    boot::setup_bsp(fd, &entry)?;
                }
                Ok::<_, MachineError>(())
            }
        })?;
        Ok(())
    }

    /// Leaves the vCPUs at the reset vector, where the firmware begins.
    fn boot_firmware(&self) -> Result<(), MachineError> {
        self.provide_firmware()?;
        self.show_firmware()?;
        self.on_all(|index| move |fd: &VcpuFd| arch::vcpu_init::reset_misc(index, fd))?;
        Ok(())
    }

    /// Switches the machine off and on again; it then stands at the first instruction of its kernel, or
    /// of its firmware. The vCPUs must be paused and the devices too.
    pub fn reset(&self) -> Result<(), MachineError> {
        // What came from a QEMU starts as it did there, unless a kernel was named here.
        let incoming = matches!(self.config.boot, Boot::Incoming {});
        if incoming && !self.ram.roms().has(PC_BIOS) {
            return Err(MachineError::NothingToBoot);
        }
        for device in &self.board.devices {
            device.lock().unwrap_or_else(PoisonError::into_inner).reset();
        }
        self.power_on.chips.restore(&self.vm)?;
        self.restore_vcpus(&self.power_on.vcpus)?;
        if incoming {
            return self.boot_firmware();
        }
        self.boot()
    }
}
