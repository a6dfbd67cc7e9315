use migration::vmstate::{Audience, Migratable, Section, SectionId, SliceSource, Timer};

use super::state::{Apm, Gpe, MemoryHotplug, MemorySelector, PciSlots, PerCpu, Subsections};
use super::state::{CpuHotplug as CpuHotplugSub, CpuHotplugState, CpuState};
use super::*;
use crate::isa::testing::{FakeClock, FakeLine, FakePower};

const SECOND: i64 = 1_000_000_000;

struct Rig {
    pm: Arc<Mutex<Piix4Pm>>,
    io: Arc<IoBus>,
    sci: Arc<FakeLine>,
    clock: Arc<FakeClock>,
    power: Arc<FakePower>,
}

impl Rig {
    fn with_cpus(cpus: u32) -> Self {
        let (io, sci) = (Arc::new(IoBus::new()), FakeLine::new());
        let (clock, power) = (FakeClock::at(0), FakePower::new());
        let pm = Piix4Pm::new(
            cpus,
            io.clone(),
            sci.clone(),
            clock.clone(),
            clock.clone(),
            power.clone(),
        )
        .unwrap();
        Self { pm, io, sci, clock, power }
    }

    /// With the ranges where SeaBIOS puts them.
    fn placed() -> Self {
        let rig = Self::with_cpus(2);
        rig.config(0x40, &0x601u32.to_le_bytes());
        rig.config(0x80, &[1]);
        rig.config(0x90, &0x701u32.to_le_bytes());
        rig.config(0xd2, &[9]);
        rig
    }

    fn config(&self, offset: usize, data: &[u8]) {
        self.pm.lock().unwrap().config_write(offset, data);
    }

    fn word(&self, port: u16) -> u16 {
        let mut data = [0; 2];
        self.io.pio_read(port, &mut data);
        u16::from_le_bytes(data)
    }

    fn write(&self, port: u16, value: u16) {
        self.io.pio_write(port, &value.to_le_bytes());
    }
}

#[test]
fn is_a_bridge_with_an_interrupt() {
    let rig = Rig::with_cpus(1);
    let mut header = [0; 16];
    rig.pm.lock().unwrap().config_read(0, &mut header);
    assert_eq!(header[..12], [0x86, 0x80, 0x13, 0x71, 0, 0, 0x80, 2, 3, 0, 0x80, 6]);
    let mut interrupt = [0; 2];
    rig.pm.lock().unwrap().config_read(0x3c, &mut interrupt);
    assert_eq!(interrupt, [9, 1]);
}

#[test]
fn its_ports_move_with_the_base_register() {
    let rig = Rig::with_cpus(1);
    rig.config(0x40, &0x601u32.to_le_bytes());
    assert_eq!(rig.word(0x600), 0xffff, "not enabled yet");
    rig.config(0x80, &[1]);
    assert_eq!(rig.word(0x600), 1);
    rig.config(0x40, &0xb001u32.to_le_bytes());
    assert_eq!((rig.word(0x600), rig.word(0xb000)), (0xffff, 1));
    // Over its own fixed ports: refused, and back again.
    rig.config(0x40, &0xafc1u32.to_le_bytes());
    assert_eq!((rig.word(0xb000), rig.word(0xafe0)), (0xffff, 0));
    rig.config(0x40, &0xb001u32.to_le_bytes());
    assert_eq!(rig.word(0xb000), 1);
    PciFunction::reset(&mut *rig.pm.lock().unwrap());
    assert_eq!(rig.word(0xb000), 0xffff);
}

#[test]
fn acpi_is_switched_on_by_the_smi_command_port() {
    let rig = Rig::placed();
    assert_eq!(rig.word(0x604), 0);
    rig.io.pio_write(0xb2, &[0xf1]);
    assert_eq!(rig.word(0x604), 1);
    assert_eq!(rig.word(0xb2), 0x00f1);
    assert!(rig.pm.lock().unwrap().acpi_enabled());
    rig.io.pio_write(0xb2, &[0xf0]);
    assert_eq!(rig.word(0x604), 0);
}

#[test]
fn the_power_button_interrupts_when_it_is_listened_to() {
    let rig = Rig::placed();
    rig.io.pio_write(0xb2, &[0xf1]);
    rig.pm.lock().unwrap().power_button();
    assert!(!rig.sci.is_high());
    rig.write(0x602, 0x0100);
    assert!(rig.sci.is_high());
    assert_eq!(rig.word(0x600) & 0x0100, 0x0100);
    rig.write(0x600, 0x0100);
    assert!(!rig.sci.is_high());
}

#[test]
fn soft_off_is_asked_of_the_machine() {
    let rig = Rig::placed();
    rig.write(0x604, 0x2401);
    assert!(rig.power.requests().is_empty(), "S1 is not offered");
    rig.write(0x604, 0x2001);
    assert_eq!(rig.power.requests(), [PowerRequest::PowerOff]);
}

#[test]
fn the_timer_counts_and_interrupts() {
    let rig = Rig::placed();
    rig.io.pio_write(0xb2, &[0xf1]);
    rig.clock.advance(SECOND);
    let mut timer = [0; 4];
    rig.io.pio_read(0x608, &mut timer);
    assert_eq!(u32::from_le_bytes(timer), 3_579_545);
    rig.write(0x600, 0x0001);
    rig.write(0x602, 0x0001);
    assert!(!rig.sci.is_high());
    let mut pm = rig.pm.lock().unwrap();
    let deadline = pm.next_deadline().unwrap();
    assert!((2 * SECOND..3 * SECOND).contains(&deadline), "half a turn is 2.3 s");
    pm.expire(deadline - 1);
    assert!(!rig.sci.is_high());
    rig.clock.advance(deadline - SECOND);
    pm.expire(deadline);
    assert!(rig.sci.is_high());
    assert_eq!(pm.next_deadline(), None);
}

#[test]
fn hot_plug_ports_find_nothing_new() {
    let rig = Rig::placed();
    let mut dword = [0xee; 4];
    rig.io.pio_read(0xae00, &mut dword);
    assert_eq!(dword, [0; 4]);
    rig.io.pio_write(0xaf00, &[0; 4]);
    rig.io.pio_write(0xaf00, &1u32.to_le_bytes());
    let mut status = [0];
    rig.io.pio_read(0xaf04, &mut status);
    assert_eq!(status, [1]);
    rig.io.pio_read(0x70d, &mut status);
    assert_eq!(status, [2], "the SMBus host is there");
}

/// Every field differs from what it is after reset, and from its neighbours.
fn full_state(rig: &Rig) -> PmState {
    let mut state = rig.pm.lock().unwrap().save(Audience::Qemu).unwrap();
    state.parent_obj.config[4] = 3;
    state.pm1_sts = 0x8100;
    state.pm1_en = 0x0521;
    state.pm1_cnt = 0x1c01;
    state.apm = Apm { apmc: 0xf1, apms: 0x12 };
    state.smb = smbus::SmBus {
        stat: 1,
        ctl: 2,
        cmd: 3,
        addr: 4,
        data0: 5,
        data1: 6,
        index: 7,
        data: std::array::from_fn(|i| i as u8 + 100),
        auxctl: 3,
        blkdata: 9,
        i2c_enable: true,
        op_done: false,
        in_i2c_block_read: true,
        start_on_status_read: true,
    };
    state.overflow_time = 0x80_0000;
    state.timer = Timer(Some(2_343_484_438));
    state.gpe = Gpe { sts: 0x0102, en: 0x0406 };
    state.hotplug_select = 5;
    for (bus, slots) in state.pci_slots.iter_mut().enumerate() {
        *slots = PciSlots { up: bus as u32 + 1, down: bus as u32 * 3 + 2 };
    }
    state.acpi_index = 11;
    let dev = |n: u32| CpuState {
        is_inserting: n == 1,
        is_removing: n == 2,
        ost_event: n + 20,
        ost_status: n + 30,
    };
    state.subsections = Subsections {
        memhp: Some(MemoryHotplug { acpi_memory_hotplug: MemorySelector { selector: 13 } }),
        cpuhp: Some(CpuHotplugSub {
            cpuhp_state: CpuHotplugState {
                selector: 1,
                command: 3,
                devs: PerCpu(vec![dev(1), dev(2)]),
            },
        }),
    };
    state
}

#[test]
fn state_travels_whole_and_the_ports_move_with_it() {
    let sent = full_state(&Rig::placed());
    let to = Rig::with_cpus(2);
    {
        let mut pm = to.pm.lock().unwrap();
        pm.check(&sent).unwrap();
        pm.restore(sent.clone()).unwrap();
        assert_eq!(pm.save(Audience::Qemu).unwrap(), sent);
    }
    assert_eq!((to.word(0x600), to.word(0x602), to.word(0x604)), (0x8100, 0x0521, 0x1c01));
    assert!(to.sci.is_high());
    assert!(to.power.requests().is_empty());
}

/// A stopped machine's clock goes on, and what is read of the interrupt controllers is of another moment than what is
/// saved here: the timer's status must be found out by whoever runs, or the interrupt is raised by neither.
#[test]
fn a_timer_that_turns_over_while_the_machine_stands_still_interrupts_where_it_runs() {
    let from = Rig::placed();
    from.write(0x604, 1);
    from.write(0x602, 1);
    // Its status is cleared, and comes again after half a turn: 2.34 s.
    from.write(0x600, 1);
    assert!(!from.sci.is_high());
    let state = |rig: &Rig| rig.pm.lock().unwrap().save(Audience::Restore).unwrap();
    let stopped = state(&from);
    from.clock.advance(3 * SECOND);
    assert_eq!(state(&from), stopped, "it is the same at whichever moment it is saved");

    let to = Rig::with_cpus(2);
    to.pm.lock().unwrap().restore(stopped).unwrap();
    assert!(!to.sci.is_high(), "the interrupt controllers come later, and know of none");
    to.clock.advance(3 * SECOND);
    to.pm.lock().unwrap().resume();
    assert!(to.sci.is_high());
    assert_eq!(to.word(0x600) & 1, 1);
}

#[test]
fn the_section_has_one_element_per_vcpu() {
    for (cpus, length) in [(1, 2408 + 24 + 35), (2, 2408 + 24 + 45)] {
        let id = SectionId::new("0000:00:01.3/piix4_pm", 0);
        let from = Rig::with_cpus(cpus);
        from.io.pio_write(0xaf00, &[0; 4]);
        let section = PmSection::new(id.clone(), from.pm.clone(), cpus);
        let bytes = section.save(Audience::Qemu).unwrap();
        assert_eq!(bytes.len(), length);
        let to = Rig::with_cpus(cpus);
        let mut section = PmSection::new(id.clone(), to.pm.clone(), cpus);
        let mut source = SliceSource::new(&bytes);
        let state = section.decode(3, &mut source).unwrap();
        assert!(source.rest().is_empty());
        section.apply(state).unwrap();
        assert_eq!(section.save(Audience::Qemu).unwrap(), bytes);
        // A machine with more vCPUs does not take it.
        let other = PmSection::new(id, Rig::with_cpus(cpus + 1).pm, cpus + 1);
        assert!(other.decode(3, &mut SliceSource::new(&bytes)).is_err());
    }
}

#[test]
fn bad_state_is_named() {
    let rig = Rig::placed();
    let refused = |change: fn(&mut PmState)| {
        let mut state = full_state(&rig);
        change(&mut state);
        rig.pm.lock().unwrap().check(&state).unwrap_err().field
    };
    assert_eq!(refused(|s| s.smb.index = 32), "smb.smb_index");
    assert_eq!(refused(|s| s.overflow_time = -1), "ar.tmr.overflow_time");
    assert_eq!(refused(|s| s.parent_obj.config[2] = 0), "pci.config[0x2]");
    let devs = |s: &mut PmState| s.subsections.cpuhp.as_mut().unwrap().cpuhp_state.devs.0.clear();
    assert_eq!(refused(devs), "cpuhp_state.devs");
}
