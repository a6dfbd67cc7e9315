//! Section `mc146818rtc` v3.

use migration::vmstate::{Audience, Bytes, FieldError, Migratable, Pad, Timer, VmState};
use serde::{Deserialize, Serialize};

use super::{CMOS_SIZE, NS_PER_SECOND, Rtc};

/// Section `mc146818rtc` v3. The timers are on the host's wall clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    pub(super) cmos_data: Bytes<CMOS_SIZE>,
    pub(super) cmos_index: u8,
    pub(super) unused0: Pad<28>,
    pub(super) periodic_timer: Timer,
    pub(super) next_periodic_time: i64,
    pub(super) unused1: Pad<24>,
    pub(super) irq_coalesced: u32,
    /// In cycles of 1/32768 s; 0 when the periodic interrupt is off.
    pub(super) period: u32,
    /// Seconds since 1970 that the clock showed at `last_update`.
    pub(super) base_rtc: u64,
    /// The host's wall clock then, in nanoseconds.
    pub(super) last_update: u64,
    /// Nanoseconds to add to what the clock showed.
    pub(super) offset: i64,
    pub(super) update_timer: Timer,
    pub(super) next_alarm_time: u64,
    pub(super) subsections: Subsections,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub(super) struct Subsections {
    #[serde(rename = "mc146818rtc/irq_reinject_on_ack_count")]
    pub(super) irq_reinject: Option<IrqReinject>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct IrqReinject {
    pub(super) irq_reinject_on_ack_count: u16,
}

/// What this clock does not use itself and hands on as it came: the bookkeeping of interrupts
/// that a guest was too slow to take.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Carried {
    irq_coalesced: u32,
    irq_reinject: u16,
    pub(super) period: u32,
}

impl VmState for RtcState {
    const VERSION: u32 = 3;
}

/// Seconds since 1970 that four BCD digits of a year, however wrong, cannot exceed.
const MAX_SECONDS: u64 = 1_000_000_000_000;

impl Migratable for Rtc {
    type State = RtcState;

    fn save(&self, _: Audience) -> Result<RtcState, FieldError> {
        let mut cmos = self.cmos;
        if self.runs() {
            for (register, value) in self.time_registers(self.clock.realtime_ns()) {
                cmos[usize::from(register)] = value;
            }
        }
        let Carried { irq_coalesced, irq_reinject, period } = self.carried;
        Ok(RtcState {
            cmos_data: Bytes::from_fn(|i| cmos[i]),
            cmos_index: self.index,
            unused0: Pad,
            periodic_timer: Timer(self.periodic_deadline),
            next_periodic_time: self.periodic_deadline.unwrap_or(0),
            unused1: Pad,
            irq_coalesced,
            period,
            base_rtc: self.base_s as u64,
            last_update: self.base_host_ns as u64,
            offset: self.offset_ns,
            update_timer: Timer(self.update_deadline),
            next_alarm_time: self.alarm_at.unwrap_or(i64::MAX) as u64,
            subsections: Subsections {
                irq_reinject: (irq_reinject != 0)
                    .then_some(IrqReinject { irq_reinject_on_ack_count: irq_reinject }),
            },
        })
    }

    fn check(&self, state: &RtcState) -> Result<(), FieldError> {
        let reject = |field: &str, expected: &str, found: &dyn std::fmt::Display| {
            Err(FieldError::new(field, expected, found))
        };
        if usize::from(state.cmos_index) >= CMOS_SIZE {
            return reject("cmos_index", "at most 127", &state.cmos_index);
        }
        if (state.base_rtc as i64).unsigned_abs() > MAX_SECONDS {
            return reject("base_rtc", "a year of at most five digits", &(state.base_rtc as i64));
        }
        if i64::try_from(state.last_update).is_err() {
            return reject("last_update", "a time before 2262", &state.last_update);
        }
        // A clock that is set keeps the fraction of a second here, never more.
        if state.offset.unsigned_abs() > NS_PER_SECOND.unsigned_abs() {
            return reject("offset", "at most a second", &state.offset);
        }
        Ok(())
    }

    fn restore(&mut self, state: RtcState) -> Result<(), FieldError> {
        for (byte, from) in self.cmos.iter_mut().zip(state.cmos_data.iter()) {
            *byte = *from;
        }
        self.index = state.cmos_index;
        self.base_s = state.base_rtc as i64;
        self.base_host_ns = state.last_update as i64;
        self.offset_ns = state.offset;
        self.carried = Carried {
            irq_coalesced: state.irq_coalesced,
            irq_reinject: state
                .subsections
                .irq_reinject
                .map_or(0, |sub| sub.irq_reinject_on_ack_count),
            period: 0,
        };
        let now = self.clock.realtime_ns();
        self.rearm_periodic(now);
        self.rearm_update(now);
        // An interrupt that fell due on the way is not lost: it is still due.
        if self.periodic_deadline.is_some() && state.periodic_timer.0.is_some() {
            self.periodic_deadline = state.periodic_timer.0;
        }
        if self.runs() && state.update_timer.0.is_some() {
            self.update_deadline = state.update_timer.0;
            self.alarm_at = i64::try_from(state.next_alarm_time).ok();
        }
        self.update_irq();
        self.host.deadline_changed();
        Ok(())
    }
}
