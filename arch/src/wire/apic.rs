//! Section `apic`, version 3: a local APIC. `instance` is the APIC id.

use migration::vmstate::VmState;
use serde::{Deserialize, Serialize};

use crate::vcpu_state::LapicPage;

/// Byte offsets of registers in the LAPIC's page (Intel SDM volume 3, table "Local APIC Register
/// Address Map").
pub(crate) mod reg {
    pub(crate) const ID: usize = 0x20;
    pub(crate) const TPR: usize = 0x80;
    pub(crate) const LDR: usize = 0xd0;
    pub(crate) const DFR: usize = 0xe0;
    pub(crate) const SPURIOUS: usize = 0xf0;
    pub(crate) const ISR: usize = 0x100;
    pub(crate) const TMR: usize = 0x180;
    pub(crate) const IRR: usize = 0x200;
    pub(crate) const ESR: usize = 0x280;
    pub(crate) const ICR: usize = 0x300;
    pub(crate) const LVT: usize = 0x320;
    pub(crate) const TIMER_INITIAL: usize = 0x380;
    pub(crate) const TIMER_CURRENT: usize = 0x390;
    pub(crate) const TIMER_DIVIDE: usize = 0x3e0;
}

const LVT_MASKED: u32 = 1 << 16;
const LVT_TIMER_MODE: u32 = 3 << 17;
const LVT_TIMER_PERIODIC: u32 = 1 << 17;
const LVT_TIMER_DEADLINE: u32 = 2 << 17;

/// The section.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Apic {
    /// The lower half of `IA32_APIC_BASE`.
    pub apicbase: u32,
    pub id: u8,
    pub arb_id: u8,
    pub tpr: u8,
    pub spurious_vec: u32,
    /// Logical destination, the register's upper byte.
    pub log_dest: u8,
    /// Destination format, the register's upper four bits: 15 flat, 0 cluster.
    pub dest_mode: u8,
    pub isr: [u32; 8],
    pub tmr: [u32; 8],
    pub irr: [u32; 8],
    /// Timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 6],
    pub esr: u32,
    pub icr: [u32; 2],
    pub divide_conf: u32,
    /// Base-2 logarithm of the divisor that `divide_conf` says.
    pub count_shift: i32,
    pub initial_count: u32,
    /// When the timer was started, in nanoseconds of the virtual clock.
    pub initial_count_load_time: i64,
    pub next_time: i64,
    /// -1 when the timer is off.
    pub timer_expiry: i64,
    pub subs: ApicSubs,
}

impl VmState for Apic {
    const VERSION: u32 = 3;
}

/// Subsections of `apic`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub struct ApicSubs {
    /// Sent by an emulating QEMU for a vCPU that waits for its SIPI.
    #[serde(rename = "apic_sipi")]
    pub sipi: Option<ApicSipi>,
}

/// `apic_sipi`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ApicSipi {
    pub sipi_vector: i32,
    pub wait_for_sipi: i32,
}

impl Apic {
    /// The section for a LAPIC page. As QEMU does with KVM's LAPIC, the timer is said to have been
    /// started just now, at `virtual_ns`: the layout has no place for the current count.
    pub fn from_page(page: &LapicPage, apic_base: u64, virtual_ns: i64) -> Self {
        let block = |first: usize| std::array::from_fn(|n| page.get(first + 16 * n));
        let divide_conf = page.get(reg::TIMER_DIVIDE);
        let mut apic = Self {
            apicbase: apic_base as u32,
            id: (page.get(reg::ID) >> 24) as u8,
            arb_id: 0,
            tpr: page.get(reg::TPR) as u8,
            spurious_vec: page.get(reg::SPURIOUS),
            log_dest: (page.get(reg::LDR) >> 24) as u8,
            dest_mode: (page.get(reg::DFR) >> 28) as u8,
            isr: block(reg::ISR),
            tmr: block(reg::TMR),
            irr: block(reg::IRR),
            lvt: std::array::from_fn(|n| page.get(reg::LVT + 16 * n)),
            esr: page.get(reg::ESR),
            icr: std::array::from_fn(|n| page.get(reg::ICR + 16 * n)),
            divide_conf,
            count_shift: count_shift(divide_conf),
            initial_count: page.get(reg::TIMER_INITIAL),
            initial_count_load_time: virtual_ns,
            next_time: 0,
            timer_expiry: -1,
            subs: ApicSubs::default(),
        };
        let counts = apic.lvt[0] & (LVT_MASKED | LVT_TIMER_DEADLINE) == 0;
        if counts && apic.initial_count != 0 {
            let ns = (i64::from(apic.initial_count) + 1) << apic.count_shift;
            apic.next_time = virtual_ns.wrapping_add(ns);
            apic.timer_expiry = apic.next_time;
        }
        apic
    }

    /// The LAPIC page, with the timer's current count as it is at `virtual_ns`. Registers that
    /// belong to the processor (version) are left to the kernel.
    pub fn to_page(&self, virtual_ns: i64) -> LapicPage {
        let mut page = LapicPage::default();
        page.set(reg::ID, u32::from(self.id) << 24);
        page.set(reg::TPR, self.tpr.into());
        page.set(reg::LDR, u32::from(self.log_dest) << 24);
        page.set(reg::DFR, (u32::from(self.dest_mode) << 28) | 0x0fff_ffff);
        page.set(reg::SPURIOUS, self.spurious_vec);
        for n in 0..8 {
            page.set(reg::ISR + 16 * n, self.isr[n]);
            page.set(reg::TMR + 16 * n, self.tmr[n]);
            page.set(reg::IRR + 16 * n, self.irr[n]);
        }
        page.set(reg::ESR, self.esr);
        for (n, icr) in self.icr.iter().enumerate() {
            page.set(reg::ICR + 16 * n, *icr);
        }
        for (n, lvt) in self.lvt.iter().enumerate() {
            page.set(reg::LVT + 16 * n, *lvt);
        }
        page.set(reg::TIMER_DIVIDE, self.divide_conf);
        let (initial, current) = self.timer_at(virtual_ns);
        page.set(reg::TIMER_INITIAL, initial);
        page.set(reg::TIMER_CURRENT, current);
        page
    }

    /// Initial and current count. A one-shot timer that has run out is told as one that was never
    /// started, because the kernel fires at once when the current count is 0 and the initial is not.
    fn timer_at(&self, virtual_ns: i64) -> (u32, u32) {
        if self.lvt[0] & LVT_TIMER_MODE == LVT_TIMER_DEADLINE || self.initial_count == 0 {
            return (self.initial_count, 0);
        }
        let elapsed = virtual_ns.saturating_sub(self.initial_count_load_time).max(0) as u64;
        let ticks = elapsed >> count_shift(self.divide_conf);
        let period = u64::from(self.initial_count) + 1;
        let periodic = self.lvt[0] & LVT_TIMER_MODE == LVT_TIMER_PERIODIC;
        let ticks = if periodic { ticks % period } else { ticks };
        match u32::try_from(ticks) {
            Ok(ticks) if ticks < self.initial_count => {
                (self.initial_count, self.initial_count - ticks)
            }
            _ if periodic => (self.initial_count, 1),
            _ => (0, 0),
        }
    }
}

/// Divide configuration register: bits 0, 1 and 3 are 2, 4, 8, … 128, and last 1.
fn count_shift(divide_conf: u32) -> i32 {
    let n = (divide_conf & 3) | (divide_conf >> 1 & 4);
    ((n + 1) & 7) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_are_those_of_the_manual() {
        for (conf, divisor) in
            [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xa, 128), (0xb, 1)]
        {
            assert_eq!(1 << count_shift(conf), divisor, "{conf:#x}");
        }
    }

    #[test]
    fn the_timer_counts_on_from_its_load_time() {
        let apic = |lvt, initial, load| Apic {
            lvt: [lvt, 0, 0, 0, 0, 0],
            divide_conf: 3,
            initial_count: initial,
            initial_count_load_time: load,
            ..Apic::default()
        };
        let periodic = apic(0x200ec, 999, 1_000);
        assert_eq!(periodic.timer_at(1_000), (999, 999));
        assert_eq!(periodic.timer_at(1_000 + 16 * 100), (999, 899));
        assert_eq!(periodic.timer_at(1_000 + 16 * 1_100), (999, 899));
        assert_eq!(periodic.timer_at(1_000 + 16 * 999), (999, 1));
        assert_eq!(apic(0xec, 999, 1_000).timer_at(1_000 + 16 * 100), (999, 899));
        assert_eq!(apic(0xec, 999, 1_000).timer_at(1_000_000), (0, 0));
        assert_eq!(apic(0x400ec, 0, 0).timer_at(5), (0, 0));
        assert_eq!(apic(0xec, u32::MAX, i64::MIN).timer_at(i64::MAX), (0, 0));
        assert_eq!(apic(0x200ec, u32::MAX, i64::MAX).timer_at(i64::MIN), (u32::MAX, u32::MAX));
    }
}
