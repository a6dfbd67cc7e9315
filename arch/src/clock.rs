//! Time: the VM's kvmclock and every vCPU's TSC, across a move.
//!
//! # What was chosen
//! Guests keep time with kvmclock or with the TSC itself. After a move neither may go back, the two
//! must agree, and the guest's wall clock must be right. So
//! - from a mini-vmm, both go on by the time that has really passed since the source read its clock
//!   (from the two hosts' wall clocks, which such hosts keep together by NTP). If these differ by
//!   less than nothing or by more than [`MAX_ADVANCE`], they cannot be right, and the clocks go on
//!   from the saved value instead;
//! - from a QEMU, whose stream has no wall clock, both go on from the saved value, as they do when
//!   QEMU is the destination. The guest's wall clock is then late by the downtime.
//!
//! The TSC goes on by exactly the time by which kvmclock does. Where the kernel lets the TSC offset
//! be set (5.16 and later) all vCPUs keep their exact relation; elsewhere it is written as an MSR,
//! and the kernel recognises values of the same moment as synchronised.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, kvm_clock_data};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::error::{KvmError, vcpu_error, vm_error};
use crate::host::KvmHost;
use crate::msr::{self, Msr};
use crate::sys;
use crate::vcpu_state::{VcpuState, tsc_khz_close};

/// The longest time between capture and restore that is believed.
pub const MAX_ADVANCE: Duration = Duration::from_secs(300);

/// The ticks in a second of a TSC whose speed is not known.
const SLOW_TSC_HZ: u64 = 1_000_000_000;

/// The VM's clock at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockState {
    /// kvmclock in nanoseconds: what the guest sees as time since its boot.
    pub clock: u64,
    /// The host's wall clock at that moment, nanoseconds since 1970; `None` from a QEMU.
    pub realtime: Option<u64>,
    /// The host's TSC at that moment, where the kernel tells it.
    pub host_tsc: Option<u64>,
    /// The clock came from a TSC that all processors share.
    pub stable: bool,
}

/// How far the clocks went on, and from where the TSCs are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockBase {
    /// By how many nanoseconds kvmclock was advanced beyond the saved value.
    pub advanced: u64,
    source: ClockState,
    here: ClockState,
}

impl ClockState {
    /// Reads the VM's clock. Call it with all vCPUs stopped, next to their capture.
    pub fn capture(vm: &VmFd) -> Result<Self, KvmError> {
        let data = vm.get_clock().map_err(vm_error("KVM_GET_CLOCK"))?;
        let has = |flag: u32| data.flags & flag != 0;
        Ok(Self {
            clock: data.clock,
            // Kernels before 5.16 do not tell; then userspace reads it right behind.
            realtime: Some(if has(KVM_CLOCK_REALTIME) { data.realtime } else { realtime_ns() }),
            host_tsc: has(KVM_CLOCK_HOST_TSC).then_some(data.host_tsc),
            stable: has(KVM_CLOCK_TSC_STABLE),
        })
    }

    /// How far the clock must be advanced when it is `now` on this host's wall clock.
    pub fn advance_at(&self, now: u64) -> u64 {
        let Some(then) = self.realtime else { return 0 };
        let limit = u64::try_from(MAX_ADVANCE.as_nanos()).unwrap_or(u64::MAX);
        match now.checked_sub(then) {
            Some(elapsed) if elapsed <= limit => elapsed,
            _ => {
                tracing::warn!(
                    source_ns = then,
                    here_ns = now,
                    "the VM was saved long ago, or the two hosts' wall clocks disagree; the guest's \
                     clocks go on without the time between"
                );
                0
            }
        }
    }

    /// Sets the VM's clock, advanced as the module says. Call it once, when all vCPUs have been
    /// restored and before any runs; then [`VcpuState::restore_tsc`] for each.
    pub fn restore(&self, vm: &VmFd) -> Result<ClockBase, KvmError> {
        let advanced = self.advance_at(realtime_ns());
        let clock = self.clock.saturating_add(advanced);
        let data = kvm_clock_data { clock, ..Default::default() };
        vm.set_clock(&data).map_err(vm_error(format_args!("KVM_SET_CLOCK({clock} ns)")))?;
        Ok(ClockBase { advanced, source: *self, here: Self::capture(vm)? })
    }
}

impl ClockBase {
    /// By how many ticks of `khz` a TSC has gone on since the source's capture.
    fn elapsed_ticks(&self, khz: u32) -> u64 {
        let ns = self.here.clock.saturating_sub(self.source.clock);
        let ticks = u128::from(ns) * u128::from(khz) / 1_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }
}

/// Makes one moment of several: a QEMU reads its vCPUs' TSCs one after the other, and a guest whose
/// thread changes vCPUs must not find that time went back by what lay between. TSCs that differ by less
/// than a second are taken for one, as KVM takes them when they are written (`kvm_synchronize_tsc`);
/// the latest counts, since each has been read by the guest at most up to its own.
pub fn synchronise_tscs(states: &mut [VcpuState]) {
    if states.iter().any(|state| state.tsc_offset.is_some()) {
        // Their exact relation is known.
        return;
    }
    let (Some(least), Some(most)) =
        (states.iter().map(|s| s.tsc).min(), states.iter().map(|s| s.tsc).max())
    else {
        return;
    };
    let second = states.iter().map(|s| u64::from(s.tsc_khz) * 1000).max().unwrap_or(0);
    // A kernel that does not say how fast it counts: the slowest processor with KVM.
    let second = if second == 0 { SLOW_TSC_HZ } else { second };
    if most - least < second {
        states.iter_mut().for_each(|state| state.tsc = most);
    }
}

impl VcpuState {
    /// The guest's TSC at the moment when `clock` was captured on the same host.
    fn tsc_at(&self, clock: &ClockState) -> u64 {
        if let (Some(host), Some(offset)) = (clock.host_tsc, self.tsc_offset) {
            let exact = host.wrapping_add(offset);
            // More than a second from what the guest would have read: these two don't belong together.
            if exact.abs_diff(self.tsc) < u64::from(self.tsc_khz) * 1000 {
                return exact;
            }
        }
        self.tsc
    }

    /// The guest's TSC at the moment when the destination's clock was read.
    fn tsc_after(&self, base: &ClockBase, khz: u32) -> u64 {
        self.tsc_at(&base.source).wrapping_add(base.elapsed_ticks(khz))
    }

    /// Sets the TSC, then its deadline, which the kernel compares with it. Makes the kernel renew
    /// the wall clock in guest memory (16 bytes where the guest asked for it), and tells a kvmclock
    /// guest that it stood still, so that its watchdogs do not bark.
    pub fn restore_tsc(
        &self,
        vcpu: &VcpuFd,
        host: &KvmHost,
        base: &ClockBase,
    ) -> Result<(), KvmError> {
        let index = self.index;
        let khz_here = vcpu.get_tsc_khz().unwrap_or(0);
        let khz = if self.tsc_khz == 0 { khz_here } else { self.tsc_khz };
        let tsc = self.tsc_after(base, khz);
        let unscaled = host.tsc_khz.is_some_and(|native| tsc_khz_close(khz_here, native));
        let mut msrs = Vec::new();
        match base.here.host_tsc {
            Some(host_tsc) if unscaled && host.tsc_offset => {
                let offset = tsc.wrapping_sub(host_tsc);
                sys::set_tsc_offset(vcpu, offset).map_err(vcpu_error(
                    index,
                    format_args!("KVM_SET_DEVICE_ATTR(TSC offset {offset:#x})"),
                ))?;
            }
            _ => msrs.push(Msr { index: msr::IA32_TSC, value: tsc }),
        }
        msrs.extend(self.tsc_deadline.map(|value| Msr { index: msr::IA32_TSC_DEADLINE, value }));
        // One for the whole VM; zero is a guest that has not asked for it.
        let wall_clock = self.msrs.iter().find(|msr| msr.index == msr::KVM_WALL_CLOCK);
        msrs.extend(wall_clock.filter(|msr| index == 0 && msr.value != 0));
        msr::write(index, vcpu, &msrs)?;
        if host.kvmclock_ctrl {
            // EINVAL: this guest has not switched kvmclock on.
            match vcpu.kvmclock_ctrl() {
                Err(e) if e.errno() != libc::EINVAL => {
                    return Err(vcpu_error(index, "KVM_KVMCLOCK_CTRL")(e));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tscs_that_were_read_one_after_the_other_are_of_one_moment() {
        let tscs = |offset, values: &[u64]| -> Vec<u64> {
            let mut states: Vec<_> = values.iter().map(|tsc| vcpu(*tsc, offset)).collect();
            synchronise_tscs(&mut states);
            states.iter().map(|state| state.tsc).collect()
        };
        assert_eq!(tscs(None, &[5_000_000, 7_195_856, 6_000_000]), [7_195_856; 3]);
        // A second apart (2 GHz): the guest has made them so, or a vCPU was added later.
        assert_eq!(tscs(None, &[0, 2_000_000_000]), [0, 2_000_000_000]);
        assert_eq!(tscs(None, &[0, 1_999_999_999]), [1_999_999_999; 2]);
        // Their relation is known exactly.
        assert_eq!(tscs(Some(1), &[5, 7]), [5, 7]);
        assert_eq!(tscs(None, &[]), [0; 0]);
    }

    fn vcpu(tsc: u64, tsc_offset: Option<u64>) -> VcpuState {
        VcpuState { tsc, tsc_offset, tsc_khz: 2_000_000, ..VcpuState::default() }
    }

    #[test]
    fn the_tsc_goes_on_exactly_as_kvmclock_does() {
        let source = ClockState {
            clock: 7_000_000_000,
            realtime: Some(1),
            host_tsc: Some(900_000_000_000),
            stable: true,
        };
        let here = ClockState { clock: 8_500_000_123, host_tsc: Some(5), ..source };
        let base = ClockBase { advanced: 1_500_000_000, source, here };
        // 2 GHz: 1.5 s and 123 ns are 3,000,000,246 ticks.
        assert_eq!(vcpu(1_000, None).tsc_after(&base, 2_000_000), 3_000_001_246);
        // With an offset, the TSC is that of the moment when the clock was read, not of its own.
        let negative = 0u64.wrapping_sub(890_000_000_000);
        let exact = vcpu(10_000_777_777, Some(negative));
        assert_eq!(exact.tsc_after(&base, 2_000_000), 10_000_000_000 + 3_000_000_246);
        // An offset that contradicts the TSC is not believed.
        assert_eq!(vcpu(1_000, Some(negative)).tsc_after(&base, 2_000_000), 3_000_001_246);
    }

    #[test]
    fn clocks_never_overflow_on_hostile_values() {
        let source = ClockState { clock: 0, realtime: None, host_tsc: None, stable: false };
        let here = ClockState { clock: u64::MAX, ..source };
        let base = ClockBase { advanced: 0, source, here };
        let _ = vcpu(u64::MAX, Some(u64::MAX)).tsc_after(&base, u32::MAX);
        let back = ClockBase { source: here, here: source, advanced: 0 };
        assert_eq!(vcpu(5, None).tsc_after(&back, 2_000_000), 5);
    }
}
