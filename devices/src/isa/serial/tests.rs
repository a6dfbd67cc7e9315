use std::sync::atomic::{AtomicUsize, Ordering};

use migration::vmstate::{Audience, Migratable, Timer};

use super::state::*;
use super::*;
use crate::isa::testing::{FakeLine, FakeOutput};

struct Rig {
    port: SerialPort,
    line: Arc<FakeLine>,
    output: FakeOutput,
}

impl Rig {
    fn new() -> Self {
        let (line, output) = (FakeLine::new(), FakeOutput::default());
        let port = SerialPort::new(COM1, line.clone(), Box::new(output.clone()));
        Self { port, line, output }
    }

    fn read(&mut self, register: u16) -> u8 {
        self.port.read_port(COM1 + register)
    }

    fn write(&mut self, register: u16, value: u8) {
        self.port.write_port(COM1 + register, value);
    }
}

#[test]
fn after_reset_it_is_idle_at_9600_baud() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(1), 0);
    assert_eq!(rig.read(2), 0x01);
    assert_eq!(rig.read(5), 0x60);
    assert_eq!(rig.read(6), 0xb0);
    rig.write(3, 0x80);
    assert_eq!((rig.read(0), rig.read(1)), (12, 0));
}

#[test]
fn a_driver_tells_it_from_older_chips() {
    let mut rig = Rig::new();
    // The scratch register of everything after the 8250.
    rig.write(7, 0xa5);
    assert_eq!(rig.read(7), 0xa5);
    // The upper four bits of IER do not exist (a 16750 has two of them).
    rig.write(1, 0xff);
    assert_eq!(rig.read(1), 0x0f);
    rig.write(1, 0);
    // Working FIFOs: a 16550A, not a 16550.
    rig.write(2, 0x01);
    assert_eq!(rig.read(2) & 0xc0, 0xc0);
    rig.write(2, 0x00);
    assert_eq!(rig.read(2) & 0xc0, 0x00);
    // The loopback test: RTS and OUT2 come back as CTS and DCD.
    rig.write(4, 0x10 | 0x0a);
    assert_eq!(rig.read(6) & 0xf0, 0x90);
}

#[test]
fn what_is_written_goes_out_at_once() {
    let mut rig = Rig::new();
    for byte in b"hello" {
        rig.write(0, *byte);
        assert_eq!(rig.read(5) & 0x60, 0x60);
    }
    assert_eq!(rig.output.text(), b"hello");
}

#[test]
fn transmitter_empty_interrupts_once_until_the_next_byte() {
    let mut rig = Rig::new();
    rig.write(1, 0x02);
    assert!(rig.line.is_high(), "enabling it with the transmitter empty interrupts");
    assert_eq!(rig.read(2), 0x02);
    assert!(!rig.line.is_high(), "reading IIR takes it back");
    assert_eq!(rig.read(2), 0x01);
    rig.write(0, b'x');
    assert!(rig.line.is_high());
}

#[test]
fn a_stuck_output_holds_the_transmitter_up_and_loses_nothing() {
    let mut rig = Rig::new();
    rig.write(2, 0x01);
    rig.output.stuck.store(true, Ordering::SeqCst);
    for byte in b"abc" {
        rig.write(0, *byte);
    }
    assert_eq!(rig.read(5) & 0x60, 0);
    assert!(rig.port.has_pending_output());
    rig.output.stuck.store(false, Ordering::SeqCst);
    rig.port.flush_output();
    assert_eq!(rig.output.text(), b"abc");
    assert_eq!(rig.read(5) & 0x60, 0x60);
    assert!(!rig.port.has_pending_output());
}

#[test]
fn without_fifos_one_byte_is_received_at_a_time() {
    let mut rig = Rig::new();
    rig.write(1, 0x01);
    assert_eq!(rig.port.receive(b"xy"), 1);
    assert!(!rig.port.wants_input());
    assert!(rig.line.is_high());
    assert_eq!(rig.read(2), 0x04);
    assert_eq!(rig.read(0), b'x');
    assert!(!rig.line.is_high());
    assert!(rig.port.wants_input());
}

#[test]
fn fifo_trigger_and_timeout_have_their_own_identification() {
    let mut rig = Rig::new();
    rig.write(2, 0x81);
    rig.write(1, 0x01);
    assert_eq!(rig.port.receive(b"1234567"), 7);
    assert_eq!(rig.read(2), 0xcc, "seven of eight: the character time-out");
    assert_eq!(rig.port.receive(b"8"), 1);
    assert_eq!(rig.read(2), 0xc4);
    assert_eq!(rig.port.receive(&[b'9'; 20]), 8, "sixteen bytes fit");
    for expected in b"12345678" {
        assert_eq!(rig.read(0), *expected);
    }
    assert_eq!(rig.read(5) & 1, 1);
    rig.write(2, 0x83);
    assert_eq!(rig.read(5) & 1, 0, "cleared by FCR bit 1");
    assert!(!rig.line.is_high());
}

#[test]
fn room_again_is_told() {
    let mut rig = Rig::new();
    let told = Arc::new(AtomicUsize::new(0));
    let count = told.clone();
    rig.port.on_room(Box::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    }));
    rig.port.receive(b"x");
    assert_eq!(told.load(Ordering::SeqCst), 0);
    rig.read(0);
    assert_eq!(told.load(Ordering::SeqCst), 1);
}

#[test]
fn loopback_keeps_bytes_inside_and_overruns() {
    let mut rig = Rig::new();
    rig.write(4, 0x10);
    assert_eq!(rig.port.receive(b"z"), 0, "the line is cut");
    rig.write(1, 0x04);
    rig.write(0, b'a');
    rig.write(0, b'b');
    assert!(rig.output.text().is_empty());
    assert_eq!(rig.read(2), 0x06);
    assert_eq!(rig.read(5) & 0x03, 0x03, "data ready and overrun");
    assert_eq!(rig.read(5) & 0x02, 0, "reading LSR clears the error");
    assert_eq!(rig.read(0), b'b');
}

#[test]
fn paused_it_neither_sends_nor_receives() {
    let mut rig = Rig::new();
    rig.output.stuck.store(true, Ordering::SeqCst);
    rig.write(0, b'q');
    rig.port.pause();
    rig.output.stuck.store(false, Ordering::SeqCst);
    rig.port.flush_output();
    assert_eq!(rig.port.receive(b"in"), 0);
    assert!(rig.output.text().is_empty());
    rig.port.resume();
    assert_eq!(rig.output.text(), b"q");
}

#[test]
fn a_wide_access_is_split_into_bytes() {
    use vm_device::MutDevicePio;
    use vm_device::bus::PioAddress;
    let mut rig = Rig::new();
    rig.write(7, 0x77);
    let mut data = [0; 2];
    MutDevicePio::pio_read(&mut rig.port, PioAddress(COM1), 7, &mut data);
    assert_eq!(data, [0x77, 0xff], "nobody answers behind the last port");
}

/// Every field differs from what it is after reset, and from its neighbours.
fn full_state() -> SerialState {
    let mut recv = [0; 16];
    recv[14..].copy_from_slice(b"rs");
    recv[..1].copy_from_slice(b"t");
    let mut xmit = [0; 16];
    xmit[..2].copy_from_slice(b"uv");
    SerialState {
        state: Uart {
            divider: 0x0102,
            rbr: 3,
            ier: 0x0a,
            iir: 0xc1,
            lcr: 0x13,
            mcr: 0x0b,
            lsr: 0x01,
            msr: 0x70,
            scr: 9,
            fcr: 0x81,
            subsections: Subsections {
                thr_ipending: Some(ThrIpending { thr_ipending: 1 }),
                tsr: Some(Tsr { tsr_retry: 2, thr: 11, tsr: b'w' }),
                recv_fifo: Some(RecvFifo { recv_fifo: Fifo { data: recv, head: 14, num: 3 } }),
                xmit_fifo: Some(XmitFifo { xmit_fifo: Fifo { data: xmit, head: 0, num: 2 } }),
                fifo_timeout_timer: Some(FifoTimeoutTimer { fifo_timeout_timer: Timer(Some(5)) }),
                timeout_ipending: Some(TimeoutIpending { timeout_ipending: 1 }),
                poll: Some(Poll { poll_msl: -1, modem_status_poll: Timer(None) }),
            },
        },
    }
}

#[test]
fn state_travels_whole() {
    let mut rig = Rig::new();
    let sent = full_state();
    rig.port.check(&sent).unwrap();
    rig.port.restore(sent.clone()).unwrap();
    let back = rig.port.save(Audience::Qemu).unwrap().state;

    let mut expected = sent.state;
    // Derived: the interrupt that is pending now. Rings start at 0 again; one retry is as good as
    // two; the two parts that this port has no use for are not sent on.
    expected.iir = 0xc2;
    expected.subsections.thr_ipending = None;
    expected.subsections.tsr = Some(Tsr { tsr_retry: 1, thr: 11, tsr: b'w' });
    let mut data = [0; 16];
    data[..3].copy_from_slice(b"rst");
    expected.subsections.recv_fifo = Some(RecvFifo { recv_fifo: Fifo { data, head: 0, num: 3 } });
    expected.subsections.fifo_timeout_timer = None;
    expected.subsections.poll = None;
    assert_eq!(back, expected);

    assert!(rig.line.is_high());
    rig.port.resume();
    assert_eq!(rig.output.text(), b"wuv");
    assert_eq!([rig.read(0), rig.read(0), rig.read(0)], *b"rst");
}

#[test]
fn a_masked_transmitter_interrupt_survives() {
    let mut rig = Rig::new();
    rig.write(0, b'x');
    let state = rig.port.save(Audience::Qemu).unwrap();
    assert_eq!(
        state.state.subsections.thr_ipending,
        Some(ThrIpending { thr_ipending: 1 }),
        "iir does not show it"
    );
    let mut to = Rig::new();
    to.port.restore(state).unwrap();
    assert!(to.port.regs.thr_interrupt);
    assert!(!to.line.is_high());
}

#[test]
fn bad_state_is_named() {
    let port = Rig::new().port;
    let refused = |change: fn(&mut Uart)| {
        let mut state = full_state();
        change(&mut state.state);
        port.check(&state).unwrap_err().field
    };
    assert_eq!(refused(|s| s.ier = 0x10), "ier");
    assert_eq!(refused(|s| s.mcr = 0x20), "mcr");
    assert_eq!(refused(|s| s.fcr = 0x02), "fcr_vmstate");
    assert_eq!(refused(|s| s.lsr = 0x60), "tsr_retry");
    assert_eq!(refused(|s| s.subsections.tsr = None), "tsr_retry");
    assert_eq!(refused(|s| s.subsections.tsr.as_mut().unwrap().tsr_retry = 5), "tsr_retry");
    let recv = |s: &mut Uart| s.subsections.recv_fifo.as_mut().unwrap().recv_fifo.head = 16;
    assert_eq!(refused(recv), "recv_fifo.head");
    let xmit = |s: &mut Uart| s.subsections.xmit_fifo.as_mut().unwrap().xmit_fifo.num = 17;
    assert_eq!(refused(xmit), "xmit_fifo.num");
}
