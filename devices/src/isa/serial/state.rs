//! Section `serial` v3.

use std::collections::VecDeque;

use migration::vmstate::{Audience, FieldError, Migratable, Timer, VmState};
use serde::{Deserialize, Serialize};

use super::{FIFO_SIZE, Registers, SerialPort, fcr, ier, iir, lsr, mcr};

/// Section `serial` v3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    pub(super) state: Uart,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "serial@3")]
pub(super) struct Uart {
    pub(super) divider: u16,
    pub(super) rbr: u8,
    pub(super) ier: u8,
    pub(super) iir: u8,
    pub(super) lcr: u8,
    pub(super) mcr: u8,
    pub(super) lsr: u8,
    pub(super) msr: u8,
    pub(super) scr: u8,
    #[serde(rename = "fcr_vmstate")]
    pub(super) fcr: u8,
    pub(super) subsections: Subsections,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub(super) struct Subsections {
    /// Sent when it is not what `iir` tells.
    #[serde(rename = "serial/thr_ipending")]
    pub(super) thr_ipending: Option<ThrIpending>,
    /// Sent when the output has held a byte up.
    #[serde(rename = "serial/tsr")]
    pub(super) tsr: Option<Tsr>,
    #[serde(rename = "serial/recv_fifo")]
    pub(super) recv_fifo: Option<RecvFifo>,
    #[serde(rename = "serial/xmit_fifo")]
    pub(super) xmit_fifo: Option<XmitFifo>,
    /// Never sent: here the time-out is due as soon as a byte is received.
    #[serde(rename = "serial/fifo_timeout_timer")]
    pub(super) fifo_timeout_timer: Option<FifoTimeoutTimer>,
    #[serde(rename = "serial/timeout_ipending")]
    pub(super) timeout_ipending: Option<TimeoutIpending>,
    /// Never sent: this port's modem lines are not a real line's.
    #[serde(rename = "serial/poll")]
    pub(super) poll: Option<Poll>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ThrIpending {
    pub(super) thr_ipending: i32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tsr {
    /// How often the output refused the byte; 0 when there is none.
    pub(super) tsr_retry: u32,
    pub(super) thr: u8,
    pub(super) tsr: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecvFifo {
    pub(super) recv_fifo: Fifo,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct XmitFifo {
    pub(super) xmit_fifo: Fifo,
}

/// A ring of 16 bytes: `num` of them from `head` on are in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fifo {
    pub(super) data: [u8; FIFO_SIZE],
    pub(super) head: u32,
    pub(super) num: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FifoTimeoutTimer {
    pub(super) fifo_timeout_timer: Timer,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TimeoutIpending {
    pub(super) timeout_ipending: i32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Poll {
    pub(super) poll_msl: i32,
    pub(super) modem_status_poll: Timer,
}

/// How often QEMU tries before it gives a byte up.
const MAX_RETRIES: u32 = 4;

impl Fifo {
    fn of(bytes: &VecDeque<u8>) -> Option<Self> {
        if bytes.is_empty() {
            return None;
        }
        let mut data = [0; FIFO_SIZE];
        for (slot, byte) in data.iter_mut().zip(bytes) {
            *slot = *byte;
        }
        let num = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Some(Self { data, head: 0, num })
    }

    fn check(&self, name: &str) -> Result<(), FieldError> {
        at_most(&format!("{name}.head"), self.head, FIFO_SIZE as u32 - 1)?;
        at_most(&format!("{name}.num"), self.num, FIFO_SIZE as u32)
    }

    fn bytes(&self) -> VecDeque<u8> {
        let ring = self.data.iter().cycle().skip(self.head as usize);
        ring.take((self.num as usize).min(FIFO_SIZE)).copied().collect()
    }
}

fn at_most<T: PartialOrd + std::fmt::Display>(
    field: &str,
    found: T,
    max: T,
) -> Result<(), FieldError> {
    if found <= max {
        Ok(())
    } else {
        Err(FieldError::new(field, format_args!("at most {max}"), found))
    }
}

fn only_bits(field: &str, found: u8, allowed: u8) -> Result<(), FieldError> {
    if found & !allowed == 0 {
        Ok(())
    } else {
        let expected = format_args!("no bits outside of {allowed:#04x}").to_string();
        Err(FieldError::new(field, expected, format_args!("{found:#04x}")))
    }
}

impl VmState for SerialState {
    const VERSION: u32 = 3;
}

impl Migratable for SerialPort {
    type State = SerialState;

    fn save(&self, _: Audience) -> Result<SerialState, FieldError> {
        let regs = &self.regs;
        let told_by_iir = regs.iir & iir::ID == iir::TRANSMITTER_EMPTY;
        let timed_out = !regs.received.is_empty() && regs.received.len() < regs.trigger();
        let subsections = Subsections {
            thr_ipending: (regs.thr_interrupt != told_by_iir)
                .then(|| ThrIpending { thr_ipending: regs.thr_interrupt.into() }),
            tsr: regs.shift.map(|tsr| Tsr { tsr_retry: 1, thr: regs.thr, tsr }),
            recv_fifo: Fifo::of(&regs.received).map(|recv_fifo| RecvFifo { recv_fifo }),
            xmit_fifo: Fifo::of(&regs.to_send).map(|xmit_fifo| XmitFifo { xmit_fifo }),
            fifo_timeout_timer: None,
            timeout_ipending: timed_out.then_some(TimeoutIpending { timeout_ipending: 1 }),
            poll: None,
        };
        Ok(SerialState {
            state: Uart {
                divider: regs.divisor,
                rbr: regs.rbr,
                ier: regs.ier,
                iir: regs.iir,
                lcr: regs.lcr,
                mcr: regs.mcr,
                lsr: regs.lsr,
                msr: regs.msr,
                scr: regs.scr,
                fcr: regs.fcr,
                subsections,
            },
        })
    }

    fn check(&self, state: &SerialState) -> Result<(), FieldError> {
        let uart = &state.state;
        let subs = &uart.subsections;
        only_bits("ier", uart.ier, ier::ALL)?;
        only_bits("mcr", uart.mcr, mcr::ALL)?;
        only_bits("fcr_vmstate", uart.fcr, fcr::KEPT)?;
        if let Some(fifo) = &subs.recv_fifo {
            fifo.recv_fifo.check("recv_fifo")?;
        }
        if let Some(fifo) = &subs.xmit_fifo {
            fifo.xmit_fifo.check("xmit_fifo")?;
        }
        let retries = subs.tsr.as_ref().map_or(0, |tsr| tsr.tsr_retry);
        at_most("tsr_retry", retries, MAX_RETRIES)?;
        // A byte is in the shift register exactly when the status says that it isn't empty.
        let empty = uart.lsr & lsr::TRANSMITTER_EMPTY != 0;
        if empty != (retries == 0) {
            let expected =
                if empty { "0, for lsr says empty" } else { "1 to 4, for lsr says full" };
            return Err(FieldError::new("tsr_retry", expected, retries));
        }
        Ok(())
    }

    fn restore(&mut self, state: SerialState) -> Result<(), FieldError> {
        let uart = state.state;
        let subs = uart.subsections;
        let mut regs = Registers {
            divisor: uart.divider,
            rbr: uart.rbr,
            ier: uart.ier,
            iir: uart.iir,
            lcr: uart.lcr,
            mcr: uart.mcr,
            lsr: uart.lsr,
            msr: uart.msr,
            scr: uart.scr,
            fcr: uart.fcr,
            thr_interrupt: match subs.thr_ipending {
                Some(pending) => pending.thr_ipending != 0,
                None => uart.iir & iir::ID == iir::TRANSMITTER_EMPTY,
            },
            shift: subs.tsr.as_ref().filter(|tsr| tsr.tsr_retry > 0).map(|tsr| tsr.tsr),
            thr: subs.tsr.as_ref().map_or(0, |tsr| tsr.thr),
            received: subs.recv_fifo.map(|f| f.recv_fifo.bytes()).unwrap_or_default(),
            to_send: subs.xmit_fifo.map(|f| f.xmit_fifo.bytes()).unwrap_or_default(),
        };
        if regs.fifos() {
            regs.lsr &= !lsr::DATA_READY;
            if !regs.received.is_empty() {
                regs.lsr |= lsr::DATA_READY;
            }
            if !regs.to_send.is_empty() {
                regs.lsr &= !lsr::THR_EMPTY;
            }
        } else {
            regs.received.clear();
            regs.to_send.clear();
        }
        self.regs = regs;
        self.update_irq();
        Ok(())
    }
}
