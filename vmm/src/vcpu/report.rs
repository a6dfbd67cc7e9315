//! What is said when a guest dies: registers, and the bytes it was about to execute.

use std::fmt;

use devices::memory::GuestRam;
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

/// How a guest died.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CrashKind {
    /// A fault while handling a double fault; the processor shut down.
    TripleFault,
    /// KVM could not emulate an instruction, or worse (KVM_EXIT_INTERNAL_ERROR and its suberror).
    InternalError(u32),
    /// The processor refused to enter the guest (KVM_EXIT_FAIL_ENTRY and the hardware's reason).
    FailEntry(u64),
    /// An exit that this machine never asks for.
    UnexpectedExit(String),
    /// `KVM_RUN` itself failed.
    Run(i32),
}

impl fmt::Display for CrashKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TripleFault => f.write_str("triple fault"),
            Self::InternalError(sub) => {
                let what = match sub {
                    1 => "an instruction that it could not emulate",
                    2 => "two exceptions at once that it could not combine",
                    3 => "an exit while delivering an event",
                    4 => "an unexpected reason to exit",
                    _ => "no further explanation",
                };
                write!(f, "KVM internal error {sub}: {what}")
            }
            Self::FailEntry(reason) => {
                write!(f, "the processor refused to run the guest (hardware reason {reason:#x})")
            }
            Self::UnexpectedExit(exit) => write!(f, "unexpected exit {exit}"),
            Self::Run(errno) => {
                write!(f, "KVM_RUN failed: {}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

/// A dead guest's last words.
#[derive(Debug, Clone)]
pub struct CrashReport {
    /// Which vCPU.
    pub vcpu: u32,
    /// How.
    pub kind: CrashKind,
    regs: Option<kvm_regs>,
    sregs: Option<kvm_sregs>,
    code: Option<(u64, Vec<u8>)>,
}

/// An x86 instruction has at most 15 bytes; show the one and a bit of what follows.
const CODE_BYTES: usize = 24;

impl CrashReport {
    /// Collects what can still be read of `vcpu`.
    pub fn collect(index: u32, kind: CrashKind, vcpu: &VcpuFd, ram: &GuestRam) -> Self {
        let regs = vcpu.get_regs().ok();
        let sregs = vcpu.get_sregs().ok();
        let code = regs.zip(sregs).and_then(|(regs, sregs)| {
            let linear = if sregs.cr0 & 1 == 0 || sregs.efer & (1 << 10) == 0 {
                sregs.cs.base.wrapping_add(regs.rip)
            } else {
                regs.rip
            };
            let physical = vcpu.translate_gva(linear).ok().filter(|t| t.valid != 0)?;
            let mut bytes = vec![0; CODE_BYTES];
            let n = ram.read(&mut bytes, GuestAddress(physical.physical_address)).ok()?;
            bytes.truncate(n);
            Some((physical.physical_address, bytes))
        });
        Self { vcpu: index, kind, regs, sregs, code }
    }
}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest died on vCPU {}: {}", self.vcpu, self.kind)?;
        if let Some(r) = &self.regs {
            write!(f, "\n  rip={:016x} rflags={:016x}", r.rip, r.rflags)?;
            for (i, (name, value)) in [
                ("rax", r.rax),
                ("rbx", r.rbx),
                ("rcx", r.rcx),
                ("rdx", r.rdx),
                ("rsi", r.rsi),
                ("rdi", r.rdi),
                ("rsp", r.rsp),
                ("rbp", r.rbp),
                ("r8 ", r.r8),
                ("r9 ", r.r9),
                ("r10", r.r10),
                ("r11", r.r11),
                ("r12", r.r12),
                ("r13", r.r13),
                ("r14", r.r14),
                ("r15", r.r15),
            ]
            .into_iter()
            .enumerate()
            {
                f.write_str(if i % 4 == 0 { "\n  " } else { " " })?;
                write!(f, "{name}={value:016x}")?;
            }
        }
        if let Some(s) = &self.sregs {
            write!(
                f,
                "\n  cr0={:x} cr2={:016x} cr3={:016x} cr4={:x} efer={:x}",
                s.cr0, s.cr2, s.cr3, s.cr4, s.efer
            )?;
            for (name, seg) in [("cs", &s.cs), ("ss", &s.ss), ("ds", &s.ds), ("tr", &s.tr)] {
                write!(
                    f,
                    "\n  {name}={:04x} base={:x} limit={:x}",
                    seg.selector, seg.base, seg.limit
                )?;
            }
            write!(
                f,
                "\n  gdt={:x}/{:x} idt={:x}/{:x}",
                s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit
            )?;
        }
        match &self.code {
            Some((address, bytes)) => {
                write!(f, "\n  code at {address:#x}:")?;
                bytes.iter().try_for_each(|b| write!(f, " {b:02x}"))
            }
            None => write!(f, "\n  code: rip points to no memory"),
        }
    }
}
