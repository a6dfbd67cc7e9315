//! The real-time clock and its CMOS memory: a Motorola MC146818A at ports 0x70 and 0x71.
//!
//! Nothing ticks: the time is computed from the host's wall clock when it is read, and the next
//! interrupt is a deadline on that clock.

use std::sync::Arc;

use super::{FLOATING, byte_ports};
use crate::clock::Clock;
use crate::device::Device;
use crate::irq::IrqLine;
use crate::timer::{Timed, TimerClock, TimerHost};

mod calendar;
mod state;

use calendar::DateTime;
pub use state::RtcState;

/// The index port; the data port follows it.
pub const INDEX_PORT: u16 = 0x70;
/// The data port.
pub const DATA_PORT: u16 = 0x71;
/// How many ports the clock has.
pub const PORTS: u16 = 2;

const CMOS_SIZE: usize = 128;
const NS_PER_SECOND: i64 = 1_000_000_000;
/// The divider chain's input in Hz.
const CRYSTAL_HZ: i64 = 32_768;
/// UIP rises this long before an update (data sheet, figure 16: 244 µs).
const UPDATE_HOLD_NS: i64 = 244_141;

/// Registers of the clock, then the PC's own places in its memory.
mod reg {
    pub(super) const SECONDS: u8 = 0x00;
    pub(super) const SECONDS_ALARM: u8 = 0x01;
    pub(super) const MINUTES: u8 = 0x02;
    pub(super) const MINUTES_ALARM: u8 = 0x03;
    pub(super) const HOURS: u8 = 0x04;
    pub(super) const HOURS_ALARM: u8 = 0x05;
    pub(super) const DAY_OF_WEEK: u8 = 0x06;
    pub(super) const DAY_OF_MONTH: u8 = 0x07;
    pub(super) const MONTH: u8 = 0x08;
    pub(super) const YEAR: u8 = 0x09;
    pub(super) const A: u8 = 0x0a;
    pub(super) const B: u8 = 0x0b;
    pub(super) const C: u8 = 0x0c;
    pub(super) const D: u8 = 0x0d;
    pub(super) const CENTURY: u8 = 0x32;
    /// The PS/2's place of the century, the same byte here.
    pub(super) const PS2_CENTURY: u8 = 0x37;
}

/// Register A.
mod a {
    pub(super) const UPDATE_IN_PROGRESS: u8 = 1 << 7;
    pub(super) const DIVIDER: u8 = 0x70;
    /// The divider's setting for a 32768 Hz crystal; larger ones hold it in reset.
    pub(super) const DIVIDER_32KHZ: u8 = 0x20;
    pub(super) const RATE: u8 = 0x0f;
}

/// Register B.
mod b {
    pub(super) const SET: u8 = 1 << 7;
    pub(super) const PERIODIC_INTERRUPT: u8 = 1 << 6;
    pub(super) const ALARM_INTERRUPT: u8 = 1 << 5;
    pub(super) const UPDATE_INTERRUPT: u8 = 1 << 4;
    pub(super) const SQUARE_WAVE: u8 = 1 << 3;
    pub(super) const BINARY: u8 = 1 << 2;
    pub(super) const HOURS_24: u8 = 1 << 1;
}

/// Register C: bits 4 to 6 as in register B.
mod c {
    pub(super) const INTERRUPT: u8 = 1 << 7;
    pub(super) const PERIODIC: u8 = 1 << 6;
    pub(super) const ALARM: u8 = 1 << 5;
    pub(super) const UPDATE: u8 = 1 << 4;
}

/// Register D: the battery is fine.
const VALID_RAM: u8 = 0x80;
/// Alarm bytes from here on match everything.
const ALARM_ANY: u8 = 0xc0;

/// What the CMOS memory tells firmware about the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CmosConfig {
    /// Bytes of RAM below 4 GiB.
    pub ram_below_4g: u64,
    /// Bytes of RAM from 4 GiB on.
    pub ram_above_4g: u64,
    /// How many vCPUs the machine starts with.
    pub cpus: u32,
}

impl CmosConfig {
    fn write_to(self, cmos: &mut [u8; CMOS_SIZE]) {
        const KIB: u64 = 1 << 10;
        const MIB: u64 = 1 << 20;
        let mut put = |places: [usize; 2], value: u64| {
            let bytes = u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
            for (place, byte) in places.into_iter().zip(bytes) {
                cmos[place] = byte;
            }
        };
        let low = self.ram_below_4g;
        put([0x15, 0x16], (low / KIB).min(640));
        let extended = low.saturating_sub(MIB) / KIB;
        put([0x17, 0x18], extended);
        put([0x30, 0x31], extended);
        put([0x34, 0x35], low.saturating_sub(16 * MIB) / (64 * KIB));
        let high = (self.ram_above_4g / (64 * KIB)).to_le_bytes();
        cmos[0x5b..0x5e].copy_from_slice(&high[..3]);
        // Equipment: a coprocessor and a PS/2 mouse port, no floppy.
        cmos[0x14] = 0x06;
        // Boot order: hard disk, then CD, then floppy.
        cmos[0x3d] = 0x12;
        cmos[0x38] = 0x30;
        cmos[0x5f] = u8::try_from(self.cpus.saturating_sub(1)).unwrap_or(u8::MAX);
    }
}

/// The clock.
pub struct Rtc {
    irq: Arc<dyn IrqLine>,
    clock: Arc<dyn Clock>,
    host: Arc<dyn TimerHost>,
    cmos: [u8; CMOS_SIZE],
    index: u8,
    /// The clock showed `base_s` seconds since 1970 and `offset_ns` when the host's clock showed
    /// `base_host_ns`. While the clock is stopped, it still does.
    base_s: i64,
    base_host_ns: i64,
    offset_ns: i64,
    periodic_deadline: Option<i64>,
    update_deadline: Option<i64>,
    alarm_at: Option<i64>,
    carried: state::Carried,
}

impl Rtc {
    /// A clock that shows the host's time in UTC.
    pub fn new(
        config: CmosConfig,
        irq: Arc<dyn IrqLine>,
        clock: Arc<dyn Clock>,
        host: Arc<dyn TimerHost>,
    ) -> Self {
        let mut cmos = [0; CMOS_SIZE];
        config.write_to(&mut cmos);
        cmos[usize::from(reg::A)] = 0x26;
        cmos[usize::from(reg::B)] = b::HOURS_24;
        cmos[usize::from(reg::D)] = VALID_RAM;
        let now = clock.realtime_ns();
        let mut rtc = Self {
            irq,
            clock,
            host,
            cmos,
            index: 0,
            base_s: now.div_euclid(NS_PER_SECOND),
            base_host_ns: now,
            offset_ns: now.rem_euclid(NS_PER_SECOND),
            periodic_deadline: None,
            update_deadline: None,
            alarm_at: None,
            carried: state::Carried::default(),
        };
        rtc.refresh_time(now);
        rtc.rearm_update(now);
        rtc
    }

    fn get(&self, register: u8) -> u8 {
        self.cmos[usize::from(register) % CMOS_SIZE]
    }

    fn set(&mut self, register: u8, value: u8) {
        self.cmos[usize::from(register) % CMOS_SIZE] = value;
    }

    fn runs(&self) -> bool {
        self.get(reg::B) & b::SET == 0 && self.get(reg::A) & a::DIVIDER <= a::DIVIDER_32KHZ
    }

    /// What the clock shows at host time `now`, in nanoseconds since 1970. Saturates where no
    /// calendar reaches.
    fn guest_ns(&self, now: i64) -> i64 {
        let elapsed = i128::from(now) - i128::from(self.base_host_ns);
        let shown = i128::from(self.base_s) * i128::from(NS_PER_SECOND)
            + i128::from(self.offset_ns)
            + if self.runs() { elapsed } else { 0 };
        i64::try_from(shown).unwrap_or(if shown < 0 { i64::MIN } else { i64::MAX })
    }

    /// Makes the clock show `guest_ns` from host time `now` on.
    fn show(&mut self, now: i64, guest_ns: i64) {
        self.base_s = guest_ns.div_euclid(NS_PER_SECOND);
        self.offset_ns = guest_ns.rem_euclid(NS_PER_SECOND);
        self.base_host_ns = now;
    }

    fn encode(&self, value: u8) -> u8 {
        if self.get(reg::B) & b::BINARY != 0 { value } else { (value / 10 * 16) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.get(reg::B) & b::BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0x0f) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.get(reg::B) & b::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { 0x80 } else { 0 };
        let twelfth = match hour % 12 {
            0 => 12,
            n => n,
        };
        self.encode(twelfth) | pm
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.get(reg::B) & b::HOURS_24 != 0 {
            return self.decode(value);
        }
        let pm = if value & 0x80 != 0 { 12 } else { 0 };
        self.decode(value & 0x7f) % 12 + pm
    }

    /// Writes the time at `now` into the registers.
    fn refresh_time(&mut self, now: i64) {
        for (register, value) in self.time_registers(now) {
            self.set(register, value);
        }
    }

    fn time_registers(&self, now: i64) -> [(u8, u8); 8] {
        let time = DateTime::from_unix(self.guest_ns(now).div_euclid(NS_PER_SECOND));
        [
            (reg::SECONDS, self.encode(time.second)),
            (reg::MINUTES, self.encode(time.minute)),
            (reg::HOURS, self.encode_hour(time.hour)),
            (reg::DAY_OF_WEEK, self.encode(time.weekday + 1)),
            (reg::DAY_OF_MONTH, self.encode(time.day)),
            (reg::MONTH, self.encode(time.month)),
            (reg::YEAR, self.encode(time.year.rem_euclid(100) as u8)),
            (reg::CENTURY, self.encode(time.year.div_euclid(100).rem_euclid(100) as u8)),
        ]
    }

    /// What the registers show, in seconds since 1970.
    fn registers_as_unix(&self) -> i64 {
        let value = |register| self.decode(self.get(register));
        DateTime {
            year: i64::from(value(reg::CENTURY)) * 100 + i64::from(value(reg::YEAR)),
            month: value(reg::MONTH),
            day: value(reg::DAY_OF_MONTH),
            hour: self.decode_hour(self.get(reg::HOURS)),
            minute: value(reg::MINUTES),
            second: value(reg::SECONDS),
            weekday: 0,
        }
        .to_unix()
    }

    fn update_in_progress(&self, now: i64) -> bool {
        self.runs()
            && self.guest_ns(now).rem_euclid(NS_PER_SECOND) >= NS_PER_SECOND - UPDATE_HOLD_NS
    }

    /// The period of the periodic interrupt in cycles of the crystal (data sheet, table 5).
    fn period_cycles(&self) -> Option<i64> {
        let enabled = self.get(reg::B) & b::PERIODIC_INTERRUPT != 0
            && self.get(reg::A) & a::DIVIDER <= a::DIVIDER_32KHZ;
        match self.get(reg::A) & a::RATE {
            _ if !enabled => None,
            0 => None,
            // The first two rates repeat 256 Hz and 128 Hz.
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn rearm_periodic(&mut self, now: i64) {
        self.periodic_deadline = self.period_cycles().map(|period| {
            let to_ns = |cycles: i128| {
                (cycles * i128::from(NS_PER_SECOND)).div_euclid(i128::from(CRYSTAL_HZ)) + 1
            };
            // In phase with the host's clock, so that lateness does not add up.
            let cycle = (i128::from(now) * i128::from(CRYSTAL_HZ)) / i128::from(NS_PER_SECOND);
            let next = (cycle.div_euclid(period.into()) + 1) * i128::from(period);
            i64::try_from(to_ns(next)).unwrap_or(i64::MAX)
        });
        self.carried.period =
            self.period_cycles().and_then(|cycles| u32::try_from(cycles).ok()).unwrap_or(0);
    }

    /// When the clock next reaches the alarm time.
    fn next_alarm(&self, now: i64) -> Option<i64> {
        let field = |register, decode: &dyn Fn(u8) -> u8| {
            Some(self.get(register)).filter(|v| *v < ALARM_ANY).map(decode)
        };
        let hour = field(reg::HOURS_ALARM, &|v| self.decode_hour(v));
        let minute = field(reg::MINUTES_ALARM, &|v| self.decode(v));
        let second = field(reg::SECONDS_ALARM, &|v| self.decode(v));
        let guest = self.guest_ns(now);
        let from = guest.div_euclid(NS_PER_SECOND).checked_add(1)?;
        let at = calendar::next_match(from, hour, minute, second)?;
        at.checked_mul(NS_PER_SECOND)?.checked_sub(guest)?.checked_add(now)
    }

    /// Once the update flag is up, only an alarm is worth waking up for.
    fn rearm_update(&mut self, now: i64) {
        let flags = self.get(reg::C);
        self.alarm_at = if self.runs() { self.next_alarm(now) } else { None };
        self.update_deadline = if !self.runs() {
            None
        } else if flags & c::UPDATE == 0 {
            let into_second = self.guest_ns(now).rem_euclid(NS_PER_SECOND);
            now.checked_add(NS_PER_SECOND - into_second)
        } else if flags & c::ALARM == 0 {
            self.alarm_at
        } else {
            None
        };
    }

    fn update_irq(&mut self) {
        let enabled = b::PERIODIC_INTERRUPT | b::ALARM_INTERRUPT | b::UPDATE_INTERRUPT;
        let flags = self.get(reg::C) & !c::INTERRUPT;
        let active = flags & self.get(reg::B) & enabled != 0;
        self.set(reg::C, if active { flags | c::INTERRUPT } else { flags });
        self.irq.set_level(active);
    }

    fn canonical(register: u8) -> u8 {
        if register == reg::PS2_CENTURY { reg::CENTURY } else { register }
    }

    fn read_port(&mut self, port: u16) -> u8 {
        // The index cannot be read back.
        if port != DATA_PORT {
            return FLOATING;
        }
        let now = self.clock.realtime_ns();
        match Self::canonical(self.index) {
            reg::A if self.update_in_progress(now) => self.get(reg::A) | a::UPDATE_IN_PROGRESS,
            reg::C => {
                let flags = self.get(reg::C);
                self.set(reg::C, 0);
                self.update_irq();
                if flags & (c::UPDATE | c::ALARM) != 0 {
                    self.rearm_update(now);
                    self.host.deadline_changed();
                }
                flags
            }
            register => {
                if self.runs() {
                    self.refresh_time(now);
                }
                self.get(register)
            }
        }
    }

    fn write_port(&mut self, port: u16, value: u8) {
        match port {
            // Bit 7 masks the NMI, which this board never raises.
            INDEX_PORT => self.index = value & 0x7f,
            DATA_PORT => self.write_register(Self::canonical(self.index), value),
            _ => {}
        }
    }

    fn write_register(&mut self, register: u8, value: u8) {
        let now = self.clock.realtime_ns();
        match register {
            reg::SECONDS
            | reg::MINUTES
            | reg::HOURS
            | reg::DAY_OF_WEEK
            | reg::DAY_OF_MONTH
            | reg::MONTH
            | reg::YEAR
            | reg::CENTURY => {
                if self.runs() {
                    self.refresh_time(now);
                }
                self.set(register, value);
                if self.runs() {
                    let fraction = self.guest_ns(now).rem_euclid(NS_PER_SECOND);
                    self.adopt_registers(now, fraction);
                }
            }
            reg::A => {
                let was_running = self.runs();
                let in_reset = self.get(reg::A) & a::DIVIDER > a::DIVIDER_32KHZ;
                self.stop_if(now, value & a::DIVIDER > a::DIVIDER_32KHZ);
                self.set(reg::A, value & !a::UPDATE_IN_PROGRESS);
                if self.runs() && !was_running {
                    // Out of reset, the first update comes after half a second.
                    let fraction = if in_reset { NS_PER_SECOND / 2 } else { self.offset_ns };
                    self.adopt_registers(now, fraction);
                }
                self.rearm_periodic(now);
            }
            reg::B => {
                let was_running = self.runs();
                self.stop_if(now, value & b::SET != 0);
                // Setting SET clears the update interrupt's enable.
                let value = if value & b::SET != 0 { value & !b::UPDATE_INTERRUPT } else { value };
                let mode_changed = (self.get(reg::B) ^ value) & (b::BINARY | b::HOURS_24) != 0;
                self.set(reg::B, value);
                if self.runs() && !was_running {
                    self.adopt_registers(now, self.offset_ns);
                } else if self.runs() && mode_changed {
                    self.refresh_time(now);
                }
                self.rearm_periodic(now);
                self.update_irq();
            }
            reg::C | reg::D => return,
            _ => {
                self.set(register, value);
                if !(reg::SECONDS_ALARM..=reg::HOURS_ALARM).contains(&register) {
                    return;
                }
            }
        }
        self.rearm_update(now);
        self.host.deadline_changed();
    }

    /// Freezes what the clock shows, if it runs and is about to `stop`.
    fn stop_if(&mut self, now: i64, stop: bool) {
        if stop && self.runs() {
            self.refresh_time(now);
            self.show(now, self.guest_ns(now));
        }
    }

    /// Takes the registers for the time, `fraction_ns` into the second.
    fn adopt_registers(&mut self, now: i64, fraction_ns: i64) {
        self.base_s = self.registers_as_unix();
        self.offset_ns = fraction_ns;
        self.base_host_ns = now;
    }
}

byte_ports!(Rtc);

impl Timed for Rtc {
    fn timer_clock(&self) -> TimerClock {
        TimerClock::Realtime
    }

    fn next_deadline(&self) -> Option<i64> {
        [self.periodic_deadline, self.update_deadline].into_iter().flatten().min()
    }

    fn expire(&mut self, now_ns: i64) {
        let due = |deadline: Option<i64>| deadline.is_some_and(|at| at <= now_ns);
        if due(self.periodic_deadline) {
            self.set(reg::C, self.get(reg::C) | c::PERIODIC);
            self.rearm_periodic(now_ns);
        }
        if due(self.update_deadline) {
            let alarm = if due(self.alarm_at) { c::ALARM } else { 0 };
            self.set(reg::C, self.get(reg::C) | c::UPDATE | alarm);
            self.rearm_update(now_ns);
        }
        self.update_irq();
    }
}

impl Device for Rtc {
    /// The time and the memory outlive a reset; interrupts are off after it (data sheet, RESET).
    fn reset(&mut self) {
        let off = b::PERIODIC_INTERRUPT | b::ALARM_INTERRUPT | b::UPDATE_INTERRUPT;
        self.set(reg::B, self.get(reg::B) & !(off | b::SQUARE_WAVE));
        self.set(reg::C, 0);
        self.carried = state::Carried::default();
        let now = self.clock.realtime_ns();
        self.rearm_periodic(now);
        self.rearm_update(now);
        self.update_irq();
        self.host.deadline_changed();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {
        self.host.deadline_changed();
    }
}

#[cfg(test)]
mod tests;
