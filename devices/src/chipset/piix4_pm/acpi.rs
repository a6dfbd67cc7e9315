//! ACPI's fixed hardware (ACPI 6.4, 4.8.3): PM1 status, enable and control, the power management
//! timer, and general purpose event block 0.

/// The timer's frequency in Hz (ACPI 6.4, 4.8.3.3).
const TIMER_HZ: i128 = 3_579_545;
const NS_PER_SECOND: i128 = 1_000_000_000;
/// The timer has 24 bits, and its status is set whenever the highest one changes.
const TIMER_MASK: i64 = 0xff_ffff;
const HALF_TURN: i64 = 0x80_0000;

/// Bits of PM1_STS and PM1_EN.
mod pm1 {
    pub(super) const TIMER: u16 = 1 << 0;
    pub(super) const GLOBAL: u16 = 1 << 5;
    pub(super) const POWER_BUTTON: u16 = 1 << 8;
    pub(super) const RTC: u16 = 1 << 10;
    /// Those that interrupt.
    pub(super) const EVENTS: u16 = TIMER | GLOBAL | POWER_BUTTON | RTC;
}

/// Bits of PM1_CNT.
mod control {
    pub(super) const SCI_ENABLE: u16 = 1 << 0;
    pub(super) const SLEEP_TYPE_SHIFT: u32 = 10;
    pub(super) const SLEEP_ENABLE: u16 = 1 << 13;
}

/// The sleep type of S5, as the ACPI tables give it.
const SLEEP_OFF: u16 = 0;

/// What writing PM1_CNT asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sleep {
    /// S5.
    Off,
    /// Something that the ACPI tables don't offer.
    Unsupported(u16),
}

/// The registers. Times are nanoseconds of the machine's own clock.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct AcpiRegisters {
    /// Without the timer's bit, which follows from `overflow_at` unless it is set here.
    pub(super) status: u16,
    pub(super) enable: u16,
    pub(super) control: u16,
    /// The tick (not cut to 24 bits) at which the timer's status will be set.
    pub(super) overflow_at: i64,
    pub(super) gpe_status: u16,
    pub(super) gpe_enable: u16,
}

/// How often the timer has ticked.
pub(super) fn ticks(now_ns: i64) -> i64 {
    i64::try_from(i128::from(now_ns) * TIMER_HZ / NS_PER_SECOND).unwrap_or(i64::MAX)
}

/// The first nanosecond at which the timer has ticked `ticks` times.
fn ns_of(ticks: i64) -> i64 {
    let ns = (i128::from(ticks) * NS_PER_SECOND + TIMER_HZ - 1).div_euclid(TIMER_HZ);
    i64::try_from(ns).unwrap_or(i64::MAX)
}

impl AcpiRegisters {
    /// PM1_STS.
    pub(super) fn status(&self, now_ns: i64) -> u16 {
        let timer = if ticks(now_ns) >= self.overflow_at { pm1::TIMER } else { 0 };
        self.status | timer
    }

    /// The level of the system control interrupt.
    pub(super) fn sci(&self, now_ns: i64) -> bool {
        let fixed = self.status(now_ns) & self.enable & pm1::EVENTS != 0;
        let general = self.gpe_status & self.gpe_enable != 0;
        // With SCI_EN clear the events would be SMIs.
        self.sci_enabled() && (fixed || general)
    }

    /// When the timer will interrupt, if it will.
    pub(super) fn deadline_ns(&self, now_ns: i64) -> Option<i64> {
        let waits = self.enable & pm1::TIMER != 0 && self.status(now_ns) & pm1::TIMER == 0;
        waits.then(|| ns_of(self.overflow_at))
    }

    /// When the timer interrupts, or has done so since its status was last cleared: what is saved. It is the same at
    /// every moment; whether the status is set by then is found by who looks at it next.
    pub(super) fn saved_deadline_ns(&self) -> Option<i64> {
        let waits = self.enable & pm1::TIMER != 0 && self.status & pm1::TIMER == 0;
        waits.then(|| ns_of(self.overflow_at))
    }

    pub(super) fn sci_enabled(&self) -> bool {
        self.control & control::SCI_ENABLE != 0
    }

    pub(super) fn set_sci_enabled(&mut self, on: bool) {
        if on {
            self.control |= control::SCI_ENABLE;
        } else {
            self.control &= !control::SCI_ENABLE;
        }
    }

    pub(super) fn press_power_button(&mut self) {
        self.status |= pm1::POWER_BUTTON;
    }

    /// A read of the block at PMBA, all of it at the same moment.
    pub(super) fn read(&self, offset: u16, data: &mut [u8], now_ns: i64) {
        let [s0, s1] = self.status(now_ns).to_le_bytes();
        let [e0, e1] = self.enable.to_le_bytes();
        let [c0, c1] = self.control.to_le_bytes();
        let [t0, t1, t2, t3, ..] = (ticks(now_ns) & TIMER_MASK).to_le_bytes();
        let block = [s0, s1, e0, e1, c0, c1, 0, 0, t0, t1, t2, t3];
        for (byte, value) in data.iter_mut().zip(block.iter().skip(offset.into())) {
            *byte = *value;
        }
    }

    /// A write to the block at PMBA.
    pub(super) fn write(&mut self, offset: u16, data: &[u8], now_ns: i64) -> Option<Sleep> {
        for (value, at) in data.iter().zip(offset..) {
            let (register, shift) = (at & !1, 8 * u32::from(at & 1));
            let (mask, value) = (0xff << shift, u16::from(*value) << shift);
            match register {
                0 => {
                    if self.status(now_ns) & value & pm1::TIMER != 0 {
                        self.overflow_at = (ticks(now_ns) + HALF_TURN) & !(HALF_TURN - 1);
                    }
                    self.status &= !value;
                }
                2 => self.enable = (self.enable & !mask) | value,
                4 => self.control = (self.control & !mask) | value,
                _ => {}
            }
        }
        if self.control & control::SLEEP_ENABLE == 0 {
            return None;
        }
        // The bit reads as zero.
        self.control &= !control::SLEEP_ENABLE;
        match (self.control >> control::SLEEP_TYPE_SHIFT) & 7 {
            SLEEP_OFF => Some(Sleep::Off),
            kind => Some(Sleep::Unsupported(kind)),
        }
    }

    /// A read of general purpose event block 0.
    pub(super) fn read_gpe(&self, offset: u16, data: &mut [u8]) {
        let [s0, s1] = self.gpe_status.to_le_bytes();
        let [e0, e1] = self.gpe_enable.to_le_bytes();
        for (byte, value) in data.iter_mut().zip([s0, s1, e0, e1].iter().skip(offset.into())) {
            *byte = *value;
        }
    }

    /// A write to it: status bits are cleared by ones.
    pub(super) fn write_gpe(&mut self, offset: u16, data: &[u8]) {
        for (value, at) in data.iter().zip(offset..) {
            let shift = 8 * u32::from(at & 1);
            let (mask, value) = (0xff << shift, u16::from(*value) << shift);
            match at & !1 {
                0 => self.gpe_status &= !value,
                2 => self.gpe_enable = (self.gpe_enable & !mask) | value,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn the_timer_runs_at_its_frequency_and_turns_at_24_bits() {
        let registers = AcpiRegisters::default();
        let at = |ns| {
            let mut data = [0; 4];
            registers.read(8, &mut data, ns);
            u32::from_le_bytes(data)
        };
        assert_eq!(at(0), 0);
        assert_eq!(at(SECOND), 3_579_545);
        assert_eq!(at(100 * SECOND), 357_954_500 & 0xff_ffff);
        // A captured machine: 0x78aa7d64 ns.
        assert_eq!(i64::from(at(0x78aa_7d64)), (0x78aa_7d64 * 3_579_545 / SECOND) & 0xff_ffff);
    }

    #[test]
    fn every_half_turn_sets_the_timers_status() {
        let mut registers = AcpiRegisters { control: 1, enable: 1, ..Default::default() };
        assert!(registers.sci(0));
        registers.write(0, &[1, 0], SECOND);
        assert_eq!(registers.status(SECOND), 0);
        let deadline = registers.deadline_ns(SECOND).unwrap();
        assert_eq!(ticks(deadline), HALF_TURN);
        assert_eq!(ticks(deadline - 1), HALF_TURN - 1);
        assert!(!registers.sci(deadline - 1));
        assert!(registers.sci(deadline));
        assert_eq!(registers.deadline_ns(deadline), None);
    }

    #[test]
    fn registers_take_bytes_and_words() {
        let mut registers = AcpiRegisters::default();
        registers.write(2, &[0x21, 0x05], 0);
        registers.write(5, &[0x1c], 0);
        registers.write(4, &[0x01], 0);
        assert_eq!((registers.enable, registers.control), (0x0521, 0x1c01));
        let mut data = [0xff; 4];
        registers.read(2, &mut data, 0);
        assert_eq!(data, [0x21, 0x05, 0x01, 0x1c]);
        let mut beyond = [0xff; 4];
        registers.read(12, &mut beyond, 0);
        assert_eq!(beyond, [0xff; 4]);
    }

    #[test]
    fn sleep_is_asked_for_once() {
        let mut registers = AcpiRegisters::default();
        assert_eq!(registers.write(4, &0x0001u16.to_le_bytes(), 0), None);
        assert_eq!(registers.write(4, &0x2001u16.to_le_bytes(), 0), Some(Sleep::Off));
        assert_eq!(registers.control, 0x0001);
        assert_eq!(registers.write(5, &[0x24], 0), Some(Sleep::Unsupported(1)));
        assert_eq!(registers.write(4, &[0x01], 0), None);
    }

    #[test]
    fn general_purpose_events() {
        let mut registers = AcpiRegisters { control: 1, overflow_at: 1, ..Default::default() };
        registers.write_gpe(2, &[0x06, 0x80]);
        assert!(!registers.sci(0));
        registers.gpe_status = 0x8002;
        assert!(registers.sci(0));
        registers.write_gpe(0, &[0x02]);
        assert!(registers.sci(0));
        registers.write_gpe(1, &[0x80]);
        assert!(!registers.sci(0));
        let mut data = [0; 4];
        registers.read_gpe(0, &mut data);
        assert_eq!(data, [0, 0, 0x06, 0x80]);
    }
}
