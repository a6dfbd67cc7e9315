//! Extended processor state: the XSAVE area and QEMU's fields.
//!
//! The area is in the standard format of Intel SDM volume 1, chapter 13: 512 bytes as FXSAVE has
//! them, a header with `XSTATE_BV`, and the components at the places that CPUID leaf 0xd tells.
//! They differ between vendors, so they are asked for, not known.

use migration::vmstate::FieldError;

use super::cpu::{Cpu, FpReg, Q2};
use super::cpu_subs::{Avx512, Bound, FpopIpDp, Mpx, One32};
use super::hex;
use crate::cpuid::CpuProfile;
use crate::vcpu_state::xstate_bv;

/// Numbers of the components (Intel SDM volume 1, 13.1).
const X87: usize = 0;
const SSE: usize = 1;
const AVX: usize = 2;
const BNDREGS: usize = 3;
const BNDCSR: usize = 4;
const OPMASK: usize = 5;
const ZMM_HIGH: usize = 6;
const ZMM16: usize = 7;
const PKRU: usize = 9;

/// Offset of `XSTATE_BV`, and the size of legacy area and header.
const HEADER: usize = 512;
const HEADER_END: usize = 576;
/// Offsets in the legacy area (Intel SDM volume 1, 10.5.1).
const ST0: usize = 32;
const XMM0: usize = 160;

/// Where each component lies in the XSAVE area, in bytes: offset and size, 0 if it does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct XsaveLayout {
    components: [(usize, usize); 32],
    /// Size of the whole area.
    size: usize,
}

impl XsaveLayout {
    /// The layout that a processor with this profile has. Give it the host's
    /// ([`CpuProfile::host`]): a guest's may hide components that the area nevertheless holds.
    pub fn new(profile: &CpuProfile) -> Self {
        let mut layout = Self::default();
        layout.components[X87] = (0, XMM0);
        layout.components[SSE] = (XMM0, 256);
        layout.size = 4096;
        for n in AVX..layout.components.len() {
            let leaf = profile.leaf(0xd, n as u32);
            let place = (leaf.ebx as usize, leaf.eax as usize);
            // Supervisor components (bit 0 of ECX) are not in an XSAVE area.
            if place.1 != 0 && leaf.ecx & 1 == 0 && place.0 >= HEADER_END {
                layout.components[n] = place;
                layout.size = layout.size.max(place.0.saturating_add(place.1));
            }
        }
        layout
    }

    fn get<'a>(&self, area: &'a [u8], n: usize) -> Option<&'a [u8]> {
        let (offset, size) = self.components[n];
        let held = n < AVX || xstate_bv(area) >> n & 1 != 0;
        if size == 0 || !held { None } else { area.get(offset..offset.checked_add(size)?) }
    }

    /// The component's bytes to write into, and its bit set in `XSTATE_BV`.
    fn put<'a>(
        &self,
        area: &'a mut [u8],
        n: usize,
        what: &str,
    ) -> Result<&'a mut [u8], FieldError> {
        let lacking =
            || FieldError::new(what, format!("a processor with XSAVE component {n}"), "none here");
        let (offset, size) = self.components[n];
        if size == 0 {
            return Err(lacking());
        }
        let bv = xstate_bv(area) | 1 << n;
        if let Some(slot) = area.get_mut(HEADER..HEADER + 8) {
            slot.copy_from_slice(&bv.to_le_bytes());
        }
        area.get_mut(offset..offset.saturating_add(size)).ok_or_else(lacking)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

fn set(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(slot) = bytes.get_mut(at..at + value.len()) {
        slot.copy_from_slice(value);
    }
}

/// Fills QEMU's fields from an XSAVE area.
pub(crate) fn to_wire(area: &[u8], layout: &XsaveLayout, cpu: &mut Cpu) {
    let bv = xstate_bv(area);
    // A component whose bit is clear is in its initial state, whatever its bytes are.
    let (x87, sse) = (bv & 1 != 0, bv & 2 != 0);
    (cpu.fpuc, cpu.fpus, cpu.fptag) = if x87 {
        (u16_at(area, 0), u16_at(area, 2), area.get(4).copied().unwrap_or(0).into())
    } else {
        (0x37f, 0, 0)
    };
    if x87 {
        for (n, reg) in cpu.fpregs.iter_mut().enumerate() {
            let at = ST0 + 16 * n;
            *reg = FpReg { mantissa: u64_at(area, at), exponent: u16_at(area, at + 8) };
        }
        let (fpop, fpip, fpdp) = (u16_at(area, 6), u64_at(area, 8), u64_at(area, 16));
        let last = FpopIpDp { fpop, fpip, fpdp };
        cpu.subs.fpop_ip_dp = (last != FpopIpDp::default()).then_some(last);
    }
    // MXCSR belongs to SSE and AVX, but is always in its place.
    cpu.mxcsr = u32_at(area, 24);
    if sse {
        cpu.xmm = std::array::from_fn(|n| q2(area, XMM0 + 16 * n));
    }
    cpu.xstate_bv = bv;
    if let Some(avx) = layout.get(area, AVX) {
        cpu.ymm_high = std::array::from_fn(|n| q2(avx, 16 * n));
    }
    let regs = layout.get(area, BNDREGS).unwrap_or(&[]);
    let csr = layout.get(area, BNDCSR).unwrap_or(&[]);
    let mpx = Mpx {
        bnd: std::array::from_fn(|n| Bound {
            lower: u64_at(regs, 16 * n),
            upper: u64_at(regs, 16 * n + 8),
        }),
        cfgu: u64_at(csr, 0),
        status: u64_at(csr, 8),
        cfgs: cpu.subs.mpx.as_ref().map_or(0, |mpx| mpx.cfgs),
    };
    cpu.subs.mpx = (mpx != Mpx::default()).then_some(mpx);
    let opmask = layout.get(area, OPMASK).unwrap_or(&[]);
    let high = layout.get(area, ZMM_HIGH).unwrap_or(&[]);
    let zmm16 = layout.get(area, ZMM16).unwrap_or(&[]);
    let avx512 = Avx512 {
        opmask: std::array::from_fn(|n| u64_at(opmask, 8 * n)),
        zmm_high: std::array::from_fn(|n| std::array::from_fn(|k| u64_at(high, 32 * n + 8 * k))),
        zmm16: std::array::from_fn(|n| std::array::from_fn(|k| u64_at(zmm16, 64 * n + 8 * k))),
    };
    cpu.subs.avx512 = (avx512 != Avx512::default()).then_some(avx512);
    let pkru = layout.get(area, PKRU).map_or(0, |bytes| u32_at(bytes, 0));
    cpu.subs.pkru = (pkru != 0).then_some(One32 { value: pkru });
}

/// The components in use that QEMU 7.2's layouts do not have.
pub(crate) fn inexpressible<'a>(
    area: &'a [u8],
    layout: &'a XsaveLayout,
) -> impl Iterator<Item = usize> + 'a {
    [8].into_iter()
        .chain(PKRU + 1..layout.components.len())
        .filter(move |n| layout.get(area, *n).unwrap_or(&[]).iter().any(|&byte| byte != 0))
}

/// Refuses an area in which a component is in use that QEMU 7.2's layouts do not have.
pub(crate) fn expressible(area: &[u8], layout: &XsaveLayout) -> Result<(), FieldError> {
    inexpressible(area, layout).next().map_or(Ok(()), |n| {
        Err(FieldError::new(
            format!("XSAVE component {n}"),
            "one that QEMU 7.2's layouts have",
            "a component in use",
        ))
    })
}

/// The XSAVE area that QEMU's fields describe.
pub(crate) fn from_wire(cpu: &Cpu, layout: &XsaveLayout) -> Result<Vec<u8>, FieldError> {
    if cpu.fpregs_format != 0 {
        return Err(FieldError::new("env.fpregs_format_vmstate", 0, cpu.fpregs_format));
    }
    let tag = u8::try_from(cpu.fptag)
        .map_err(|_| FieldError::new("env.fptag_vmstate", "at most 0xff", hex(cpu.fptag)))?;
    let mut area = vec![0; layout.size];
    set(&mut area, 0, &cpu.fpuc.to_le_bytes());
    set(&mut area, 2, &cpu.fpus.to_le_bytes());
    set(&mut area, 4, &[tag]);
    if let Some(last) = &cpu.subs.fpop_ip_dp {
        set(&mut area, 6, &last.fpop.to_le_bytes());
        set(&mut area, 8, &last.fpip.to_le_bytes());
        set(&mut area, 16, &last.fpdp.to_le_bytes());
    }
    set(&mut area, 24, &cpu.mxcsr.to_le_bytes());
    for (n, reg) in cpu.fpregs.iter().enumerate() {
        set(&mut area, ST0 + 16 * n, &reg.mantissa.to_le_bytes());
        set(&mut area, ST0 + 16 * n + 8, &reg.exponent.to_le_bytes());
    }
    for (n, xmm) in cpu.xmm.iter().enumerate() {
        put_q2(&mut area, XMM0 + 16 * n, *xmm);
    }
    // An emulating QEMU says 0 for XSTATE_BV; x87 and SSE are always there, the others when they
    // hold something or are said to.
    set(&mut area, HEADER, &3u64.to_le_bytes());
    let said = |n: usize| cpu.xstate_bv >> n & 1 != 0 && layout.components[n].1 != 0;
    if said(AVX) || cpu.ymm_high != [Q2::default(); 16] {
        let avx = layout.put(&mut area, AVX, "env.ymmh_regs")?;
        for (n, half) in cpu.ymm_high.iter().enumerate() {
            put_q2(avx, 16 * n, *half);
        }
    }
    if let Some(mpx) = &cpu.subs.mpx {
        if mpx.bnd != <[Bound; 4]>::default() {
            let regs = layout.put(&mut area, BNDREGS, "env.bnd_regs")?;
            for (n, bound) in mpx.bnd.iter().enumerate() {
                set(regs, 16 * n, &bound.lower.to_le_bytes());
                set(regs, 16 * n + 8, &bound.upper.to_le_bytes());
            }
        }
        if (mpx.cfgu, mpx.status) != (0, 0) {
            let csr = layout.put(&mut area, BNDCSR, "env.bndcs_regs")?;
            set(csr, 0, &mpx.cfgu.to_le_bytes());
            set(csr, 8, &mpx.status.to_le_bytes());
        }
    }
    let zero = Avx512::default();
    let avx512 = cpu.subs.avx512.as_ref().unwrap_or(&zero);
    if said(OPMASK) || avx512.opmask != zero.opmask {
        let opmask = layout.put(&mut area, OPMASK, "env.opmask_regs")?;
        for (n, mask) in avx512.opmask.iter().enumerate() {
            set(opmask, 8 * n, &mask.to_le_bytes());
        }
    }
    if said(ZMM_HIGH) || avx512.zmm_high != zero.zmm_high {
        let high = layout.put(&mut area, ZMM_HIGH, "env.zmmh_regs")?;
        for (n, word) in avx512.zmm_high.as_flattened().iter().enumerate() {
            set(high, 8 * n, &word.to_le_bytes());
        }
    }
    if said(ZMM16) || avx512.zmm16 != zero.zmm16 {
        let zmm16 = layout.put(&mut area, ZMM16, "env.hi16_zmm_regs")?;
        for (n, word) in avx512.zmm16.as_flattened().iter().enumerate() {
            set(zmm16, 8 * n, &word.to_le_bytes());
        }
    }
    let pkru = cpu.subs.pkru.as_ref().map_or(0, |pkru| pkru.value);
    if said(PKRU) || pkru != 0 {
        set(layout.put(&mut area, PKRU, "env.pkru")?, 0, &pkru.to_le_bytes());
    }
    if let Some(amx) = &cpu.subs.amx_xtile
        && amx.config.iter().chain(amx.data.iter()).any(|&byte| byte != 0)
    {
        return Err(FieldError::new("cpu/intel_amx_xtile", "no AMX tiles in use", "some"));
    }
    Ok(area)
}

fn q2(bytes: &[u8], at: usize) -> Q2 {
    Q2 { low: u64_at(bytes, at), high: u64_at(bytes, at + 8) }
}

fn put_q2(bytes: &mut [u8], at: usize, value: Q2) {
    set(bytes, at, &value.low.to_le_bytes());
    set(bytes, at + 8, &value.high.to_le_bytes());
}
