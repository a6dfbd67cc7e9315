use std::sync::atomic::Ordering;

use migration::vmstate::{Audience, Bytes, Migratable, Pad, Timer};

use super::state::*;
use super::*;
use crate::isa::testing::{FakeClock, FakeLine};

/// 2026-11-20 20:12:45.25 UTC, a Friday.
const NOW: i64 = 0x6b00_a9bd * NS_PER_SECOND + NS_PER_SECOND / 4;
const MS: i64 = 1_000_000;

struct Rig {
    rtc: Rtc,
    line: Arc<FakeLine>,
    clock: Arc<FakeClock>,
}

impl Rig {
    fn new() -> Self {
        Self::at(NOW)
    }

    fn at(now: i64) -> Self {
        let (line, clock) = (FakeLine::new(), FakeClock::at(now));
        let config = CmosConfig {
            ram_below_4g: 0xc000_0000,
            ram_above_4g: 0x0203_0405_0000 & !0xffff,
            cpus: 3,
        };
        let rtc = Rtc::new(config, line.clone(), clock.clone(), clock.clone());
        Self { rtc, line, clock }
    }

    fn read(&mut self, register: u8) -> u8 {
        self.rtc.write_port(INDEX_PORT, register);
        self.rtc.read_port(DATA_PORT)
    }

    fn write(&mut self, register: u8, value: u8) {
        self.rtc.write_port(INDEX_PORT, register);
        self.rtc.write_port(DATA_PORT, value);
    }

    /// Lets time pass as the I/O thread does: from deadline to deadline.
    fn run_for(&mut self, ns: i64) {
        let end = self.clock.realtime_ns() + ns;
        while let Some(at) = self.rtc.next_deadline().filter(|at| *at <= end) {
            let now = at.max(self.clock.realtime_ns());
            self.clock.realtime_ns.store(now, Ordering::SeqCst);
            self.rtc.expire(now);
        }
        self.clock.realtime_ns.store(end, Ordering::SeqCst);
    }
}

#[test]
fn shows_the_hosts_time_in_bcd() {
    let mut rig = Rig::new();
    let shown = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32, 0x37].map(|r| rig.read(r));
    assert_eq!(shown, [0x45, 0x12, 0x20, 0x06, 0x20, 0x11, 0x26, 0x20, 0x20]);
    assert_eq!([rig.read(0x0a), rig.read(0x0b), rig.read(0x0d)], [0x26, 0x02, 0x80]);
    rig.clock.advance(15 * NS_PER_SECOND);
    assert_eq!([rig.read(0x00), rig.read(0x02)], [0x00, 0x13]);
    assert_eq!(rig.rtc.read_port(INDEX_PORT), 0xff);
}

#[test]
fn shows_it_in_binary_and_twelve_hours_when_asked() {
    let mut rig = Rig::new();
    rig.write(0x0b, 0x06);
    assert_eq!([rig.read(0x00), rig.read(0x04), rig.read(0x09)], [45, 20, 26]);
    rig.write(0x0b, 0x00);
    assert_eq!(rig.read(0x04), 0x88, "8 p.m.");
    rig.clock.advance(4 * 3600 * NS_PER_SECOND);
    assert_eq!(rig.read(0x04), 0x12, "12 a.m. is midnight");
}

#[test]
fn memory_sizes_stand_where_firmware_looks() {
    let mut rig = Rig::new();
    assert_eq!([rig.read(0x15), rig.read(0x16)], [0x80, 0x02], "640 KiB");
    assert_eq!([rig.read(0x17), rig.read(0x18)], [0xff, 0xff]);
    assert_eq!([rig.read(0x30), rig.read(0x31)], [0xff, 0xff]);
    assert_eq!([rig.read(0x34), rig.read(0x35)], [0x00, 0xbf], "3 GiB - 16 MiB in 64 KiB");
    assert_eq!([rig.read(0x5b), rig.read(0x5c), rig.read(0x5d)], [0x05, 0x04, 0x03]);
    assert_eq!(rig.read(0x5f), 2);
}

#[test]
fn free_memory_holds_what_is_written() {
    let mut rig = Rig::new();
    rig.write(0x0f | 0x80, 0x0a);
    assert_eq!(rig.read(0x0f), 0x0a, "bit 7 of the index is no address");
    rig.write(0x0d, 0);
    assert_eq!(rig.read(0x0d), 0x80, "register D is read-only");
}

#[test]
fn update_in_progress_is_seen_just_before_the_second() {
    let mut rig = Rig::new();
    rig.clock.advance(750 * MS - 244_142);
    assert_eq!(rig.read(0x0a) & 0x80, 0);
    rig.clock.advance(1);
    assert_eq!(rig.read(0x0a) & 0x80, 0x80);
    rig.clock.advance(244_141);
    assert_eq!(rig.read(0x0a) & 0x80, 0);
    assert_eq!(rig.read(0x00), 0x46);
}

#[test]
fn setting_the_time_as_linux_does() {
    let mut rig = Rig::new();
    rig.write(0x0b, 0x82);
    rig.write(0x0a, 0x70);
    for (register, value) in
        [(9, 0x25), (8, 0x02), (7, 0x28), (4, 0x23), (2, 0x59), (0, 0x58), (0x32, 0x20)]
    {
        rig.write(register, value);
    }
    rig.clock.advance(5 * NS_PER_SECOND);
    assert_eq!(rig.read(0), 0x58, "the clock stands still");
    rig.write(0x0b, 0x02);
    rig.write(0x0a, 0x26);
    // The first update comes half a second after the divider leaves reset.
    rig.clock.advance(499 * MS);
    assert_eq!(rig.read(0), 0x58);
    rig.clock.advance(1001 * MS);
    let shown = [9, 8, 7, 4, 2, 0].map(|r| rig.read(r));
    assert_eq!(shown, [0x25, 0x03, 0x01, 0x00, 0x00, 0x00]);
}

#[test]
fn setting_a_running_clock_keeps_the_fraction() {
    let mut rig = Rig::new();
    rig.write(0x02, 0x30);
    assert_eq!([rig.read(0x00), rig.read(0x02), rig.read(0x04)], [0x45, 0x30, 0x20]);
    rig.clock.advance(750 * MS);
    assert_eq!(rig.read(0x00), 0x46);
}

#[test]
fn update_ended_interrupts_each_second_while_it_is_acknowledged() {
    let mut rig = Rig::new();
    rig.write(0x0b, 0x12);
    rig.run_for(749 * MS);
    assert!(!rig.line.is_high());
    rig.run_for(MS);
    assert!(rig.line.is_high());
    assert_eq!(rig.rtc.next_deadline().map(|at| at > NOW + 3600 * NS_PER_SECOND), Some(true));
    assert_eq!(rig.read(0x0c), 0x90);
    assert!(!rig.line.is_high());
    assert_eq!(rig.read(0x0c), 0);
    rig.run_for(NS_PER_SECOND);
    assert_eq!(rig.read(0x0c), 0x90);
}

#[test]
fn the_alarm_rings_at_its_time_of_day() {
    let mut rig = Rig::new();
    for (register, value) in [(1, 0x47), (3, 0xff), (5, 0x20), (0x0b, 0x22)] {
        rig.write(register, value);
    }
    rig.run_for(1749 * MS);
    assert!(!rig.line.is_high());
    rig.run_for(MS);
    assert!(rig.line.is_high());
    assert_eq!(rig.read(0x0c) & 0xa0, 0xa0);
    rig.run_for(59 * NS_PER_SECOND);
    assert!(!rig.line.is_high());
    rig.run_for(NS_PER_SECOND);
    assert!(rig.line.is_high(), "and again in the next minute");
}

#[test]
fn the_periodic_interrupt_keeps_its_rate() {
    let mut rig = Rig::new();
    rig.write(0x0b, 0x42);
    let mut ticks = 0;
    let end = NOW + NS_PER_SECOND + 1;
    while let Some(at) = rig.rtc.next_deadline().filter(|at| *at <= end) {
        rig.clock.realtime_ns.store(at, Ordering::SeqCst);
        rig.rtc.expire(at);
        ticks += u32::from(rig.read(0x0c) & 0x40 != 0);
    }
    assert_eq!(ticks, 1024, "rate 6 is 1024 Hz");
    rig.write(0x0b, 0x02);
    rig.read(0x0c);
    rig.run_for(NS_PER_SECOND);
    assert_eq!(rig.read(0x0c) & 0x40, 0);
}

#[test]
fn a_late_tick_is_one_tick() {
    let mut rig = Rig::new();
    rig.write(0x0b, 0x42);
    let late = rig.rtc.next_deadline().unwrap() + NS_PER_SECOND;
    rig.rtc.expire(late);
    let next = rig.rtc.periodic_deadline.unwrap();
    assert!(next > late && next <= late + NS_PER_SECOND / 1024 + 1);
}

#[test]
fn reset_keeps_time_and_memory() {
    let mut rig = Rig::new();
    rig.write(0x0b, 0x72);
    rig.write(0x40, 0x55);
    rig.run_for(NS_PER_SECOND);
    assert!(rig.line.is_high());
    rig.rtc.reset();
    assert!(!rig.line.is_high());
    assert_eq!([rig.read(0x0b), rig.read(0x40), rig.read(0x00)], [0x02, 0x55, 0x46]);
}

fn full_state() -> RtcState {
    let mut cmos: Bytes<CMOS_SIZE> = Bytes::from_fn(|i| i as u8 ^ 0x5a);
    // Stopped (SET), so that the registers hold still; periodic and alarm interrupts on.
    cmos[0x0a] = 0x2a;
    cmos[0x0b] = 0xe6;
    cmos[0x0c] = 0xc0;
    cmos[0x0d] = 0x80;
    RtcState {
        cmos_data: cmos,
        cmos_index: 0x33,
        unused0: Pad,
        periodic_timer: Timer(Some(NOW - 7)),
        next_periodic_time: NOW - 7,
        unused1: Pad,
        irq_coalesced: 2,
        period: 512,
        base_rtc: 0x1234_5678,
        last_update: (NOW - 9) as u64,
        offset: 123_456_789,
        update_timer: Timer(None),
        next_alarm_time: i64::MAX as u64,
        subsections: Subsections {
            irq_reinject: Some(IrqReinject { irq_reinject_on_ack_count: 5 }),
        },
    }
}

#[test]
fn state_travels_whole() {
    let mut rig = Rig::new();
    let sent = full_state();
    rig.rtc.check(&sent).unwrap();
    rig.rtc.restore(sent.clone()).unwrap();
    assert_eq!(rig.rtc.save(Audience::Qemu).unwrap(), sent);
    assert!(rig.line.is_high(), "the periodic flag is up and enabled");
    assert_eq!(rig.rtc.next_deadline(), Some(NOW - 7), "and the next one is overdue");
}

#[test]
fn a_running_clock_goes_on_over_a_move() {
    let mut from = Rig::new();
    from.write(0x04, 0x03);
    from.write(0x0b, 0x22);
    for (register, value) in [(1, 0x46), (3, 0xff), (5, 0xff)] {
        from.write(register, value);
    }
    let state = from.rtc.save(Audience::Qemu).unwrap();
    assert!(state.update_timer.0.is_some());
    let mut to = Rig::at(NOW + 3 * NS_PER_SECOND);
    to.rtc.restore(state).unwrap();
    assert_eq!([to.read(0x00), to.read(0x04)], [0x48, 0x03]);
    assert!(!to.line.is_high());
    to.run_for(0);
    assert!(to.line.is_high(), "the alarm that rang on the way");
}

#[test]
fn bad_state_is_named() {
    let rig = Rig::new();
    let refused = |change: fn(&mut RtcState)| {
        let mut state = full_state();
        change(&mut state);
        rig.rtc.check(&state).unwrap_err().field
    };
    assert_eq!(refused(|s| s.cmos_index = 128), "cmos_index");
    assert_eq!(refused(|s| s.base_rtc = u64::MAX / 2), "base_rtc");
    assert_eq!(refused(|s| s.last_update = u64::MAX), "last_update");
    assert_eq!(refused(|s| s.offset = i64::MIN), "offset");
}
