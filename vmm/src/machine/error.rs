//! Why a machine cannot be built, stopped or started.

use std::io;

use crate::board::BoardError;
use crate::event_loop::EventLoopError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use crate::vcpu::VcpuError;

/// Something the machine could not do.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM itself.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A part of the state that KVM holds.
    #[error(transparent)]
    State(#[from] arch::error::KvmError),
    /// The processor that the guest is to see.
    #[error(transparent)]
    Cpu(#[from] arch::cpuid::CpuidError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel to boot.
    #[error(transparent)]
    Boot(#[from] arch::boot::BootError),
    /// Parameters of the self-checking guest.
    #[error(transparent)]
    Selfcheck(#[from] crate::selfcheck::SelfcheckError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] arch::acpi::AcpiError),
    /// The devices.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// What a firmware would have done.
    #[error(transparent)]
    Firmware(#[from] crate::firmware::FirmwareError),
    /// The BIOS that the guest boots by, or that a QEMU would be given.
    #[error(transparent)]
    Rom(#[from] crate::rom::RomError),
    /// What a firmware is told.
    #[error(transparent)]
    FirmwareFile(#[from] devices::isa::fw_cfg::FileError),
    /// The I/O thread.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// A vCPU's thread.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// More vCPUs than KVM takes.
    #[error("{wanted} vCPUs were asked for, this host's KVM takes at most {most}: use --smp")]
    TooManyCpus {
        /// Asked for.
        wanted: u32,
        /// What KVM takes.
        most: u32,
    },
    /// The guest asked for a reset, and there is nothing to boot.
    #[error(
        "the guest asked for a reset, but it came without a firmware, and this VM was started with no \
         kernel to boot: give --kernel (or --selfcheck) beside --migrate-listen when a guest that may \
         reboot is to arrive"
    )]
    NothingToBoot,
    /// The host refused something small.
    #[error("{what}")]
    Host {
        /// What.
        what: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

impl MachineError {
    pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}
