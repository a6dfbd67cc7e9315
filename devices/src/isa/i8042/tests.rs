use migration::vmstate::{Audience, Migratable};

use super::state::*;
use super::*;
use crate::isa::testing::{FakeLine, FakePower};

struct Rig {
    chip: I8042,
    lines: [Arc<FakeLine>; 2],
    power: Arc<FakePower>,
}

impl Rig {
    fn new() -> Self {
        let lines = [FakeLine::new(), FakeLine::new()];
        let power = FakePower::new();
        let chip = I8042::new(
            Arc::default(),
            Arc::default(),
            lines[0].clone(),
            lines[1].clone(),
            power.clone(),
        );
        Self { chip, lines, power }
    }

    fn command(&mut self, command: u8) {
        self.chip.write_port(COMMAND_PORT, command);
    }

    fn data(&mut self, byte: u8) {
        self.chip.write_port(DATA_PORT, byte);
    }

    /// Reads until the output buffer is empty: (is it the mouse's?, byte).
    fn drain(&mut self) -> Vec<(bool, u8)> {
        let mut bytes = Vec::new();
        loop {
            let status = self.chip.read_port(COMMAND_PORT);
            if status & 0x01 == 0 {
                return bytes;
            }
            bytes.push((status & 0x20 != 0, self.chip.read_port(DATA_PORT)));
        }
    }

    fn irqs(&self) -> [bool; 2] {
        [self.lines[0].is_high(), self.lines[1].is_high()]
    }
}

#[test]
fn passes_its_self_tests() {
    let mut rig = Rig::new();
    assert_eq!(rig.chip.read_port(COMMAND_PORT), 0x18);
    rig.command(0xaa);
    assert_eq!(rig.drain(), [(false, 0x55)]);
    assert_eq!(rig.chip.read_port(COMMAND_PORT), 0x1c);
    rig.command(0xab);
    assert_eq!(rig.drain(), [(false, 0x00)]);
    rig.command(0xa9);
    assert_eq!(rig.drain(), [(false, 0x00)]);
}

/// The steps of Linux's i8042 driver: flush, read the command byte, loop a byte back through the
/// mouse port, switch the port off and on, look for a multiplexer (there is none).
#[test]
fn linux_finds_a_mouse_port_and_no_multiplexer() {
    let mut rig = Rig::new();
    rig.command(0x20);
    assert_eq!(rig.drain(), [(false, 0x03)]);
    rig.command(0x60);
    rig.data(0x70);
    rig.command(0xd3);
    rig.data(0x5a);
    assert_eq!(rig.drain(), [(true, 0x5a)]);
    rig.command(0xa7);
    rig.command(0x20);
    assert_eq!(rig.drain(), [(false, 0x70)]);
    rig.command(0xa8);
    rig.command(0x20);
    assert_eq!(rig.drain(), [(false, 0x50)]);
    for byte in [0xf0, 0x56, 0xa4] {
        rig.command(0xd3);
        rig.data(byte);
        assert_eq!(rig.drain(), [(true, byte)], "an echo: not a multiplexer");
    }
}

#[test]
fn keyboard_and_mouse_interrupt_on_their_own_lines() {
    let mut rig = Rig::new();
    rig.data(0xf2);
    assert_eq!(rig.irqs(), [true, false]);
    assert_eq!(rig.drain(), [(false, 0xfa), (false, 0xab), (false, 0x83)]);
    assert_eq!(rig.irqs(), [false, false]);
    rig.command(0xd4);
    rig.data(0xf2);
    assert_eq!(rig.irqs(), [false, true]);
    assert_eq!(rig.drain(), [(true, 0xfa), (true, 0x00)]);
    rig.command(0x60);
    rig.data(0x40);
    rig.data(0xf2);
    assert_eq!(rig.irqs(), [false, false], "both interrupts are off");
    assert_eq!(rig.drain(), [(false, 0xfa), (false, 0xab), (false, 0x41)]);
}

#[test]
fn a_disabled_device_keeps_its_bytes() {
    let mut rig = Rig::new();
    rig.data(0xee);
    rig.command(0xad);
    rig.chip.read_port(DATA_PORT);
    lock(&rig.chip.keyboard).send(0xee);
    rig.chip.update();
    assert_eq!(rig.drain(), []);
    rig.command(0xae);
    assert_eq!(rig.drain(), [(false, 0xee)]);
}

#[test]
fn resets_the_machine_two_ways() {
    let mut rig = Rig::new();
    rig.command(0xfe);
    assert_eq!(rig.power.requests(), [PowerRequest::Reset]);
    rig.command(0xff);
    rig.command(0xd1);
    rig.data(0x02);
    assert_eq!(rig.power.requests().len(), 2);
}

#[test]
fn a20_is_remembered() {
    let mut rig = Rig::new();
    rig.command(0xdd);
    rig.command(0xd0);
    assert_eq!(rig.drain(), [(false, 0xcd)]);
    rig.command(0xdf);
    rig.command(0xd0);
    assert_eq!(rig.drain(), [(false, 0xcf)]);
}

fn full_state() -> I8042State {
    I8042State {
        kbd: Controller {
            write_cmd: 0x60,
            status: 0x3d,
            mode: 0x47,
            pending_tmp: pending::REPLY_AS_MOUSE,
            subsections: Subsections {
                outport: Some(Outport { outport: 0xcd }),
                extended_state: Some(ExtendedState {
                    migration_flags: 0,
                    obsrc: 2,
                    obdata: 0x77,
                    cbdata: 0x88,
                }),
            },
        },
    }
}

#[test]
fn state_travels_whole() {
    let mut rig = Rig::new();
    let sent = full_state();
    rig.chip.check(&sent).unwrap();
    rig.chip.restore(sent.clone()).unwrap();
    assert_eq!(rig.chip.save(Audience::Qemu).unwrap(), sent);
    assert_eq!(rig.irqs(), [false, true]);
    assert_eq!(rig.drain(), [(true, 0x77), (true, 0x88)]);
    assert!(rig.power.requests().is_empty());
}

#[test]
fn what_waits_in_the_devices_is_told() {
    let mut rig = Rig::new();
    lock(&rig.chip.keyboard).send(0xff);
    lock(&rig.chip.mouse).send(0xff);
    let state = rig.chip.save(Audience::Qemu).unwrap();
    assert_eq!(state.kbd.pending_tmp, pending::KEYBOARD | pending::MOUSE);
    let mut odd = full_state();
    odd.kbd.subsections.extended_state.as_mut().unwrap().obsrc = 3;
    assert_eq!(rig.chip.check(&odd).unwrap_err().field, "obsrc");
    rig.chip.reset();
    assert_eq!(rig.chip.regs, Registers::new());
}
