//! All of a vCPU, as KVM tells it, and how it is taken and given back.

use kvm_bindings::{
    KVM_MP_STATE_SIPI_RECEIVED, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_sregs2, kvm_vcpu_events,
    kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use crate::error::{KvmError, vcpu_error};
use crate::host::KvmHost;
use crate::msr::{self, Msr};
use crate::sys;

/// CR4.VMXE: the guest may be a hypervisor on an Intel processor.
const CR4_VMXE: u64 = 1 << 13;
/// EFER.SVME: the guest may be a hypervisor on an AMD processor.
const EFER_SVME: u64 = 1 << 12;
/// What a processor and its crystal may differ by: 250 parts per million, as KVM has it.
const TSC_TOLERANCE_PPM: u64 = 250;

/// The registers of a local APIC: 1024 bytes of its page, one 32-bit register every 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LapicPage(pub [u8; 1024]);

impl std::fmt::Debug for LapicPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map()
            .entries((0..64).map(|n| (n * 16, self.get(n * 16))).filter(|(_, v)| *v != 0))
            .finish()
    }
}

impl Default for LapicPage {
    fn default() -> Self {
        Self([0; 1024])
    }
}

impl LapicPage {
    /// The register at byte offset `offset` (Intel SDM volume 3, table "Local APIC Register
    /// Address Map"); 0 outside of the page.
    pub fn get(&self, offset: usize) -> u32 {
        let bytes = self.0.get(offset..).and_then(|tail| tail.first_chunk());
        bytes.map_or(0, |b| u32::from_le_bytes(*b))
    }

    /// Sets the register at byte offset `offset`; nothing happens outside of the page.
    pub fn set(&mut self, offset: usize, value: u32) {
        if let Some(slot) = self.0.get_mut(offset..).and_then(|tail| tail.first_chunk_mut()) {
            *slot = value.to_le_bytes();
        }
    }
}

/// A vCPU that stands still, complete.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct VcpuState {
    /// Its index, which is its APIC id.
    pub index: u32,
    /// General registers, instruction pointer, flags.
    pub regs: kvm_regs,
    /// Segments, tables, control registers, EFER, APIC base; PDPTEs where the host tells them.
    pub sregs: kvm_sregs2,
    /// Extended control registers, number and value (only XCR0 exists so far).
    pub xcrs: Vec<(u32, u64)>,
    /// FPU, SSE, AVX and all further extended state: the XSAVE area in standard format.
    pub xsave: Vec<u8>,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Model-specific registers, ascending, without TSC and deadline.
    pub msrs: Vec<Msr>,
    /// The time stamp counter when it was read.
    pub tsc: u64,
    /// What KVM adds to the host's TSC to get the guest's, where the kernel tells it and the TSC is
    /// not scaled.
    pub tsc_offset: Option<u64>,
    /// The TSC's frequency in kHz; 0 if the kernel does not say.
    pub tsc_khz: u32,
    /// When the LAPIC timer fires in TSC-deadline mode, in guest TSC; 0 if not armed, `None` if
    /// this vCPU has no such mode.
    pub tsc_deadline: Option<u64>,
    /// The local APIC, with the timer's current count.
    pub lapic: LapicPage,
    /// Running, halted, waiting for INIT or SIPI (`KVM_MP_STATE_*`).
    pub mp_state: u32,
    /// Exceptions, interrupts, NMIs and SMIs on their way.
    pub events: kvm_vcpu_events,
    /// A hypervisor inside the guest: the kernel's `struct kvm_nested_state` with its data. `None`
    /// if the guest is no hypervisor.
    pub nested: Option<Vec<u8>>,
}

impl VcpuState {
    /// Reads everything. The vCPU must stand still, outside of `KVM_RUN`, with its last exit
    /// completed (`KVM_RUN` once more with `immediate_exit` after an I/O exit).
    pub fn capture(index: u32, vcpu: &VcpuFd, host: &KvmHost) -> Result<Self, KvmError> {
        // The order, and why:
        // - MP_STATE first: the kernel delivers a pending INIT or SIPI before it answers, which
        //   changes CS, RIP and the LAPIC.
        // - LAPIC before the MSRs: reading the page moves posted interrupts into it.
        // - NESTED_STATE before VCPU_EVENTS: an exception meant for the inner guest is told by the
        //   events.
        // - The TSC and its deadline side by side, and all MSRs late for their sake: as near to the clock's
        //   capture as can be.
        // - VCPU_EVENTS last: any of the calls above may have queued something.
        let mp_state = vcpu.get_mp_state().map_err(vcpu_error(index, "KVM_GET_MP_STATE"))?.mp_state;
        let regs = vcpu.get_regs().map_err(vcpu_error(index, "KVM_GET_REGS"))?;
        let sregs = get_sregs(index, vcpu, host)?;
        let xsave =
            sys::get_xsave(vcpu, host.xsave_size).map_err(vcpu_error(index, "KVM_GET_XSAVE2"))?;
        let xcrs = vcpu.get_xcrs().map_err(vcpu_error(index, "KVM_GET_XCRS"))?;
        let debug = vcpu.get_debug_regs().map_err(vcpu_error(index, "KVM_GET_DEBUGREGS"))?;
        let lapic = vcpu.get_lapic().map_err(vcpu_error(index, "KVM_GET_LAPIC"))?;
        let nested = get_nested(index, vcpu, host, &sregs)?;
        let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        // With a scaled TSC the offset says nothing without the ratio.
        let unscaled = host.tsc_khz.is_some_and(|host| tsc_khz_close(tsc_khz, host));
        let tsc_offset = match host.tsc_offset && unscaled {
            true => Some(
                sys::tsc_offset(vcpu)
                    .map_err(vcpu_error(index, "KVM_GET_DEVICE_ATTR(TSC offset)"))?,
            ),
            false => None,
        };
        let wanted = [&host.msrs[..], &[msr::IA32_TSC_DEADLINE, msr::IA32_TSC]].concat();
        let mut msrs = msr::read(index, vcpu, &wanted)?;
        let mut take = |index| msrs.pop_if(|msr| msr.index == index).map(|msr| msr.value);
        let tsc = take(msr::IA32_TSC).unwrap_or(0);
        let tsc_deadline = take(msr::IA32_TSC_DEADLINE);
        let events = vcpu.get_vcpu_events().map_err(vcpu_error(index, "KVM_GET_VCPU_EVENTS"))?;
        let known = usize::try_from(xcrs.nr_xcrs).unwrap_or(0).min(xcrs.xcrs.len());
        Ok(Self {
            index,
            regs,
            sregs,
            xcrs: xcrs.xcrs[..known].iter().map(|x| (x.xcr, x.value)).collect(),
            xsave,
            debug,
            msrs,
            tsc,
            tsc_offset,
            tsc_khz,
            tsc_deadline,
            lapic: LapicPage(lapic.regs.map(|byte| byte as u8)),
            mp_state,
            events,
            nested,
        })
    }

    /// Gives everything but TSC and deadline to a vCPU that has its CPUID
    /// ([`VcpuState::restore_tsc`] follows when the clock has been set). The kernel refuses what it
    /// does not like; the error says which part, and the vCPU is then good for nothing but another
    /// complete restore. Guest memory must be mapped already: some MSRs name an address in it.
    pub fn restore(&self, vcpu: &VcpuFd, host: &KvmHost) -> Result<(), KvmError> {
        // The order, and why (CPUID comes before all: it decides which bits are legal below):
        // - TSC_KHZ before anything that counts in TSC ticks.
        // - REGS, then SREGS: SREGS wakes a boot processor that stands at the reset vector, which
        //   MP_STATE puts right afterwards; EFER.SVME and CR4 must be there for NESTED_STATE.
        // - NESTED_STATE after SREGS, before MSRs and events, which it may redirect.
        // - XSAVE before XCRS: components may be present that XCR0 has switched off.
        // - DEBUGREGS at any time after SREGS.
        // - LAPIC after SREGS: the APIC base decides in which mode the page is read; before the
        //   MSRs, because a TSC deadline can be armed only in a timer that is in that mode.
        // - MSRs after LAPIC and XSAVE; MCG_STATUS is an ordinary one, the kernel takes it any time.
        // - MP_STATE after SREGS and LAPIC: SIPI_RECEIVED leaves a pending event in the LAPIC.
        // - VCPU_EVENTS last: the calls above may clear what is pending.
        let index = self.index;
        self.restore_tsc_khz(vcpu, host)?;
        vcpu.set_regs(&self.regs)
            .map_err(vcpu_error(index, format_args!("KVM_SET_REGS(rip {:#x})", self.regs.rip)))?;
        set_sregs(index, vcpu, host, &self.sregs)?;
        self.restore_nested(vcpu, host)?;
        self.restore_fpu(vcpu, host)?;
        vcpu.set_debug_regs(&self.debug).map_err(vcpu_error(
            index,
            format_args!("KVM_SET_DEBUGREGS(DR6 {:#x}, DR7 {:#x})", self.debug.dr6, self.debug.dr7),
        ))?;
        let lapic = kvm_lapic_state { regs: self.lapic.0.map(|byte| byte as _) };
        vcpu.set_lapic(&lapic).map_err(vcpu_error(
            index,
            format_args!(
                "KVM_SET_LAPIC(id {:#x}, APIC base {:#x})",
                self.lapic.get(0x20),
                self.sregs.apic_base
            ),
        ))?;
        // Writing this one makes the kernel compute the wall clock and store it in guest memory: it
        // waits for the VM's clock.
        let mut msrs = self.msrs.clone();
        msrs.retain(|msr| msr.index != msr::KVM_WALL_CLOCK);
        msr::write(index, vcpu, &msrs)?;
        if self.mp_state > KVM_MP_STATE_SIPI_RECEIVED {
            return Err(self.unsupported("MP state", "0 to 4", self.mp_state));
        }
        vcpu.set_mp_state(kvm_mp_state { mp_state: self.mp_state })
            .map_err(vcpu_error(index, format_args!("KVM_SET_MP_STATE({})", self.mp_state)))?;
        self.restore_events(vcpu, host)
    }

    fn unsupported(
        &self,
        what: &'static str,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> KvmError {
        KvmError::Unsupported {
            vcpu: self.index,
            what,
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// A guest that has measured its TSC must find it at the same speed. A difference that a
    /// crystal may have is left alone, a larger one needs a processor that can scale.
    fn restore_tsc_khz(&self, vcpu: &VcpuFd, host: &KvmHost) -> Result<(), KvmError> {
        let here = vcpu.get_tsc_khz().unwrap_or(0);
        if self.tsc_khz == 0 || tsc_khz_close(self.tsc_khz, here) {
            return Ok(());
        }
        if !host.tsc_scaling {
            let expected = format!("{here} kHz, this processor cannot scale it");
            return Err(self.unsupported(
                "TSC frequency",
                expected,
                format!("{} kHz", self.tsc_khz),
            ));
        }
        vcpu.set_tsc_khz(self.tsc_khz)
            .map_err(vcpu_error(self.index, format_args!("KVM_SET_TSC_KHZ({})", self.tsc_khz)))
    }

    fn restore_nested(&self, vcpu: &VcpuFd, host: &KvmHost) -> Result<(), KvmError> {
        let Some(nested) = &self.nested else { return Ok(()) };
        let most = host.nested_state_size.min(sys::NESTED_MAX);
        if nested.len() < sys::NESTED_HEADER || nested.len() > most {
            let expected = match host.nested_state_size {
                0 => "none, this kernel has no KVM_CAP_NESTED_STATE".to_string(),
                _ => format!("{} to {most} bytes", sys::NESTED_HEADER),
            };
            return Err(self.unsupported(
                "nested state",
                expected,
                format!("{} bytes", nested.len()),
            ));
        }
        sys::set_nested_state(vcpu, nested).map_err(vcpu_error(
            self.index,
            format_args!("KVM_SET_NESTED_STATE({} bytes)", nested.len()),
        ))
    }

    fn restore_fpu(&self, vcpu: &VcpuFd, host: &KvmHost) -> Result<(), KvmError> {
        let size = host.xsave_size.max(4096);
        // A larger area is fine as long as what does not fit says nothing.
        let tail = self.xsave.get(size..).unwrap_or(&[]);
        if tail.iter().any(|&byte| byte != 0) {
            return Err(self.unsupported(
                "XSAVE area",
                format!("at most {size} bytes"),
                format!("{} bytes", self.xsave.len()),
            ));
        }
        let area = &self.xsave[..self.xsave.len().min(size)];
        sys::set_xsave(vcpu, host.xsave_size, area).map_err(vcpu_error(
            self.index,
            format_args!("KVM_SET_XSAVE(components {:#x})", xstate_bv(area)),
        ))?;
        let mut xcrs = kvm_xcrs::default();
        if self.xcrs.len() > xcrs.xcrs.len() {
            return Err(self.unsupported("XCRs", "at most 16", self.xcrs.len()));
        }
        for (slot, &(xcr, value)) in xcrs.xcrs.iter_mut().zip(&self.xcrs) {
            *slot = kvm_xcr { xcr, value, ..Default::default() };
            xcrs.nr_xcrs += 1;
        }
        let xcr0 = self.xcrs.first().map_or(0, |(_, value)| *value);
        vcpu.set_xcrs(&xcrs)
            .map_err(vcpu_error(self.index, format_args!("KVM_SET_XCRS(XCR0 {xcr0:#x})")))
    }

    fn restore_events(&self, vcpu: &VcpuFd, host: &KvmHost) -> Result<(), KvmError> {
        let mut events = self.events;
        if !host.exception_payload {
            if events.exception_has_payload != 0 {
                return Err(self.unsupported(
                    "exception payload",
                    "none, this kernel has no KVM_CAP_EXCEPTION_PAYLOAD",
                    format!("{:#x}", events.exception_payload),
                ));
            }
            // Without the capability the kernel cannot tell pending from injected.
            events.exception.injected |= events.exception.pending;
            events.exception.pending = 0;
            events.flags &= !KVM_VCPUEVENT_VALID_PAYLOAD;
        }
        if !host.triple_fault {
            if events.triple_fault.pending != 0 {
                return Err(self.unsupported("pending triple fault", "none", "one"));
            }
            events.flags &= !KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        vcpu.set_vcpu_events(&events).map_err(vcpu_error(
            self.index,
            format_args!(
                "KVM_SET_VCPU_EVENTS(flags {:#x}, {:?}, {:?})",
                events.flags, events.exception, events.interrupt
            ),
        ))
    }
}

/// Whether two TSC frequencies differ by no more than crystals do. 0 means unknown, and is close
/// to nothing but itself.
pub fn tsc_khz_close(a: u32, b: u32) -> bool {
    let (a, b) = (u64::from(a), u64::from(b));
    a.abs_diff(b) * 1_000_000 <= b * TSC_TOLERANCE_PPM
}

/// `XSTATE_BV` of an XSAVE area: which components it holds (Intel SDM volume 1, 13.4.2).
pub(crate) fn xstate_bv(area: &[u8]) -> u64 {
    let bytes = area.get(512..).and_then(|tail| tail.first_chunk());
    bytes.map_or(0, |b| u64::from_le_bytes(*b))
}

fn get_sregs(index: u32, vcpu: &VcpuFd, host: &KvmHost) -> Result<kvm_sregs2, KvmError> {
    if host.sregs2 {
        return sys::get_sregs2(vcpu).map_err(vcpu_error(index, "KVM_GET_SREGS2"));
    }
    let s = vcpu.get_sregs().map_err(vcpu_error(index, "KVM_GET_SREGS"))?;
    // The interrupt bitmap repeats what VCPU_EVENTS says.
    Ok(kvm_sregs2 {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        flags: 0,
        pdptrs: [0; 4],
    })
}

/// Those of the special registers for which they are refused, if they are.
struct Named<'a>(&'a kvm_sregs2);

impl std::fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kvm_sregs2 { cr0, cr3, cr4, efer, apic_base, .. } = self.0;
        write!(f, "CR0 {cr0:#x}, CR3 {cr3:#x}, CR4 {cr4:#x}, EFER {efer:#x}, ")?;
        write!(f, "APIC base {apic_base:#x}")
    }
}

fn set_sregs(index: u32, vcpu: &VcpuFd, host: &KvmHost, s: &kvm_sregs2) -> Result<(), KvmError> {
    if host.sregs2 {
        return sys::set_sregs2(vcpu, s)
            .map_err(vcpu_error(index, format_args!("KVM_SET_SREGS2({})", Named(s))));
    }
    // Without SREGS2 the kernel reads the PDPTEs from guest memory, as the processor did.
    let old = kvm_sregs {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: [0; 4],
    };
    vcpu.set_sregs(&old).map_err(vcpu_error(index, format_args!("KVM_SET_SREGS({})", Named(s))))
}

/// The nested state, if the guest has made itself a hypervisor. Without the capability such a
/// guest cannot be moved, and the error says so.
fn get_nested(
    index: u32,
    vcpu: &VcpuFd,
    host: &KvmHost,
    sregs: &kvm_sregs2,
) -> Result<Option<Vec<u8>>, KvmError> {
    if sregs.cr4 & CR4_VMXE == 0 && sregs.efer & EFER_SVME == 0 {
        return Ok(None);
    }
    if host.nested_state_size == 0 {
        return Err(KvmError::Unsupported {
            vcpu: index,
            what: "nested state",
            expected: "a guest that is no hypervisor (this kernel has no KVM_CAP_NESTED_STATE)"
                .into(),
            found: format!("CR4 {:#x}, EFER {:#x}", sregs.cr4, sregs.efer),
        });
    }
    sys::get_nested_state(vcpu).map(Some).map_err(vcpu_error(index, "KVM_GET_NESTED_STATE"))
}
