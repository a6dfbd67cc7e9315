//! Small sections of a `pc-i440fx-7.2`, with the bytes that they have on the wire.

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct TimerState {
    cpu_ticks_offset: i64,
    unused: Pad<8>,
    cpu_clock_offset: i64,
}
impl VmState for TimerState {
    const VERSION: u32 = 2;
}

#[test]
fn timer() {
    let state =
        TimerState { cpu_ticks_offset: 0x1_39bb_bad1, unused: Pad, cpu_clock_offset: 0x78aa_7d64 };
    let bytes = b"\0\0\0\x01\x39\xbb\xba\xd1\0\0\0\0\0\0\0\0\0\0\0\0\x78\xaa\x7d\x64";
    assert_eq!(write("timer", &state), bytes);
    assert_eq!(read::<TimerState>("timer", 2, bytes).unwrap(), state);
    let error = read::<TimerState>("timer", 3, bytes).unwrap_err();
    assert_eq!(error.to_string(), "timer: version 3 is not supported, this side takes 2 to 2");
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct PicState {
    last_irr: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    priority_add: u8,
    irq_base: u8,
    read_reg_select: u8,
    poll: u8,
    special_mask: u8,
    init_state: u8,
    auto_eoi: u8,
    rotate_on_auto_eoi: u8,
    special_fully_nested_mode: u8,
    init4: u8,
    single_mode: u8,
    elcr: u8,
}
impl VmState for PicState {
    const VERSION: u32 = 1;
}

#[test]
fn i8259() {
    let state = PicState {
        irr: 0x13,
        imr: 0xff,
        irq_base: 0x30,
        auto_eoi: 1,
        init4: 1,
        elcr: 0x0c,
        ..Default::default()
    };
    let bytes = [0, 0x13, 0xff, 0, 0, 0x30, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0x0c];
    assert_eq!(write("i8259", &state), bytes);
    assert_eq!(read::<PicState>("i8259", 1, &bytes).unwrap(), state);
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct IoApicState {
    id: u8,
    ioregsel: u8,
    unused: Pad<8>,
    irr: u32,
    pub(super) ioredtbl: [u64; 24],
}
impl VmState for IoApicState {
    const VERSION: u32 = 3;
}

#[test]
fn ioapic() {
    let mut state = IoApicState { ioregsel: 0x10, irr: 4, ..Default::default() };
    state.ioredtbl = [0x10000; 24];
    state.ioredtbl[9] = 0x8021;
    let mut bytes = vec![0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4];
    for pin in 0..24 {
        let low = if pin == 9 { [0, 0, 0x80, 0x21] } else { [0, 1, 0, 0] };
        bytes.extend([[0; 4], low].concat());
    }
    assert_eq!(bytes.len(), 206);
    assert_eq!(write("ioapic", &state), bytes);
    // Bytes that mean nothing are not looked at.
    bytes[5] = 0xa5;
    assert_eq!(read::<IoApicState>("ioapic", 3, &bytes).unwrap(), state);
}

/// The registers of a 16550.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct SerialState {
    pub(super) state: SerialRegs,
}
impl VmState for SerialState {
    const VERSION: u32 = 3;
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename = "serial")]
pub(super) struct SerialRegs {
    divider: u16,
    rbr: u8,
    ier: u8,
    iir: u8,
    lcr: u8,
    mcr: u8,
    lsr: u8,
    msr: u8,
    scr: u8,
    fcr_vmstate: u8,
    pub(super) subsections: SerialSubs,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub(super) struct SerialSubs {
    #[serde(rename = "serial/thr_ipending")]
    thr_ipending: Option<i32>,
    #[serde(rename = "serial/tsr")]
    tsr: Option<Tsr>,
    #[serde(rename = "serial/recv_fifo")]
    pub(super) recv_fifo: Option<Fifo>,
    #[serde(rename = "serial/fifo_timeout_timer")]
    fifo_timeout_timer: Option<Timer>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Tsr {
    retry: u32,
    thr: u8,
    tsr: u8,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Fifo {
    data: [u8; 16],
    head: u32,
    num: u32,
}

pub(super) fn serial_state() -> SerialState {
    let subsections = SerialSubs {
        thr_ipending: Some(-2),
        recv_fifo: Some(Fifo { data: *b"login: root\n\0\0\0\0", head: 3, num: 9 }),
        fifo_timeout_timer: Some(Timer(None)),
        ..Default::default()
    };
    SerialState {
        state: SerialRegs {
            divider: 12,
            ier: 5,
            iir: 0xc1,
            lcr: 0x13,
            mcr: 0x0b,
            lsr: 0x60,
            msr: 0xb0,
            fcr_vmstate: 0x81,
            subsections,
            ..Default::default()
        },
    }
}

const SERIAL_REGS: &[u8] = b"\0\x0c\0\x05\xc1\x13\x0b\x60\xb0\0\x81";
const THR_IPENDING: &[u8] = b"\x05\x13serial/thr_ipending\0\0\0\x01\xff\xff\xff\xfe";
const RECV_FIFO: &[u8] =
    b"\x05\x10serial/recv_fifo\0\0\0\x01login: root\n\0\0\0\0\0\0\0\x03\0\0\0\x09";
const TIMEOUT: &[u8] =
    b"\x05\x19serial/fifo_timeout_timer\0\0\0\x01\xff\xff\xff\xff\xff\xff\xff\xff";

#[test]
fn serial() {
    let state = serial_state();
    let bytes = [SERIAL_REGS, THR_IPENDING, RECV_FIFO, TIMEOUT].concat();
    assert_eq!(write("serial", &state), bytes);
    assert_eq!(read::<SerialState>("serial", 3, &bytes).unwrap(), state);
    let mut quiet = state;
    quiet.state.subsections = SerialSubs::default();
    assert_eq!(write("serial", &quiet), SERIAL_REGS);
    assert_eq!(read::<SerialState>("serial", 3, SERIAL_REGS).unwrap(), quiet);
}

#[test]
fn subsections_in_any_order() {
    let parts = [THR_IPENDING, RECV_FIFO, TIMEOUT];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let subs = order.map(|part| parts[part]).concat();
        let bytes = [SERIAL_REGS, &subs].concat();
        assert_eq!(read::<SerialState>("serial", 3, &bytes).unwrap(), serial_state());
    }
}

#[test]
fn the_last_of_a_repeated_subsection_counts() {
    let early = b"\x05\x13serial/thr_ipending\0\0\0\x01\0\0\0\x07";
    let bytes = [SERIAL_REGS, early, RECV_FIFO, early, TIMEOUT, RECV_FIFO, THR_IPENDING].concat();
    assert_eq!(read::<SerialState>("serial", 3, &bytes).unwrap(), serial_state());
    let many = [SERIAL_REGS, &early.repeat(1000)].concat();
    let error = read::<SerialState>("serial", 3, &many).unwrap_err();
    assert!(error.to_string().contains("repetitions"), "{error}");
}

#[test]
fn unknown_subsections_are_named() {
    for name in ["serial/poll", "serial/", "mini-vmm/else", "other"] {
        let mut bytes = SERIAL_REGS.to_vec();
        bytes.extend([5, u8::try_from(name.len()).unwrap()]);
        bytes.extend(name.bytes());
        bytes.extend([0, 0, 0, 1, 9]);
        let mut source = SliceSource::at(&bytes, 0x1000);
        let error =
            from_source::<SerialState>(&SectionId::new("serial", 1), 3, &mut source).unwrap_err();
        let StateError::Malformed { section, offset, problem, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(section, "serial (instance 1)");
        assert_eq!(*offset, 0x100b);
        assert_eq!(problem, &format!("the subsection \"{name}\" is not known here"));
    }
}

#[test]
fn a_newer_subsection_is_refused() {
    let mut bytes = [SERIAL_REGS, THR_IPENDING].concat();
    let version = SERIAL_REGS.len() + 2 + "serial/thr_ipending".len() + 3;
    bytes[version] = 2;
    let error = read::<SerialState>("serial", 3, &bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "serial, subsection serial/thr_ipending: version 2 is not supported, this side takes 0 to 1"
    );
}
