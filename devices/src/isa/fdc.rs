//! What is left of the floppy controller: section `fdc`, carried as it came.
//!
//! A QEMU of this board always has a controller with two empty drives, so its stream always has
//! the section. Here no port answers (they read as all ones, which Linux's driver takes for "no
//! controller"), and the ACPI tables do not name one.

use migration::vmstate::{
    Audience, Bytes, FieldError, Form, Migratable, Timer, VmState, Word, Words,
};
use serde::{Deserialize, Serialize};

use crate::device::Device;

const FIFO_SIZE: usize = 512;
/// How many drives QEMU's controller has.
const DRIVES: u8 = 2;

/// The controller's state, and nothing else.
#[derive(Debug, Default)]
pub struct Fdc {
    state: FdcState,
}

impl Fdc {
    /// As QEMU's controller is after power-on without drives.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Section `fdc` v2.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdcState {
    state: Controller,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "fdc@2")]
struct Controller {
    sra: u8,
    srb: u8,
    #[serde(rename = "dor_vmstate")]
    dor: u8,
    tdr: u8,
    dsr: u8,
    msr: u8,
    status0: u8,
    status1: u8,
    status2: u8,
    fifo: Bytes<FIFO_SIZE>,
    data_pos: u32,
    data_len: u32,
    data_state: u8,
    data_dir: u8,
    eot: u8,
    timer0: u8,
    timer1: u8,
    precomp_trk: u8,
    config: u8,
    lock: u8,
    pwrd: u8,
    num_floppies: u8,
    drives: [Drive; DRIVES as usize],
    subsections: ControllerSubs,
}

impl Default for Controller {
    fn default() -> Self {
        Self {
            // No interrupt (active low); drive 1 not there.
            sra: 0x40,
            srb: 0xc0,
            dor: 0x0c,
            tdr: 0,
            dsr: 0,
            // Ready for a command.
            msr: 0x80,
            status0: 0,
            status1: 0,
            status2: 0,
            fifo: Bytes::default(),
            data_pos: 0,
            data_len: 1,
            data_state: 0,
            data_dir: 0,
            eot: 0,
            timer0: 0,
            timer1: 0,
            precomp_trk: 0,
            config: 0x60,
            lock: 0,
            pwrd: 0,
            num_floppies: DRIVES,
            drives: Default::default(),
            subsections: ControllerSubs::default(),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct ControllerSubs {
    #[serde(rename = "fdc/reset_sensei")]
    reset_sensei: Option<ResetSensei>,
    #[serde(rename = "fdc/result_timer")]
    result_timer: Option<ResultTimer>,
    #[serde(rename = "fdc/phase")]
    phase: Option<Phase>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ResetSensei {
    reset_sensei: i32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ResultTimer {
    result_timer: Timer,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Phase {
    phase: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "fdrive")]
struct Drive {
    head: u8,
    track: u8,
    sect: u8,
    subsections: DriveSubs,
}

impl Default for Drive {
    fn default() -> Self {
        let media_rate = Some(MediaRate { media_rate: 0 });
        Self {
            head: 0,
            track: 0,
            sect: 0,
            subsections: DriveSubs { media_rate, ..Default::default() },
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct DriveSubs {
    #[serde(rename = "fdrive/media_changed")]
    media_changed: Option<MediaChanged>,
    #[serde(rename = "fdrive/media_rate")]
    media_rate: Option<MediaRate>,
    #[serde(rename = "fdrive/perpendicular")]
    perpendicular: Option<Perpendicular>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MediaChanged {
    media_changed: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MediaRate {
    media_rate: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Perpendicular {
    perpendicular: u8,
}

impl Device for Fdc {
    fn reset(&mut self) {
        self.state = FdcState::default();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

/// QEMU's words.
const FIELDS: &[Word] = &[
    Word::shown("fdc", "fifo", Form::Bytes),
    Word::shown("fdc", "num_floppies", Form::Type("uint8 equal")),
];

impl VmState for FdcState {
    const VERSION: u32 = 2;
    const WORDS: Words = Words { prefix: "", fields: &[FIELDS] };
}

impl Migratable for Fdc {
    type State = FdcState;

    fn save(&self, _: Audience) -> Result<FdcState, FieldError> {
        Ok(self.state.clone())
    }

    fn check(&self, state: &FdcState) -> Result<(), FieldError> {
        let fdc = &state.state;
        if fdc.num_floppies != DRIVES {
            return Err(FieldError::new("num_floppies", DRIVES, fdc.num_floppies));
        }
        // Whoever gets the state next indexes its FIFO with it.
        for (field, value) in [("data_pos", fdc.data_pos), ("data_len", fdc.data_len)] {
            if value > FIFO_SIZE as u32 {
                return Err(FieldError::new(field, format_args!("at most {FIFO_SIZE}"), value));
            }
        }
        Ok(())
    }

    fn restore(&mut self, state: FdcState) -> Result<(), FieldError> {
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_travels_whole() {
        let drive = |n: u8| Drive {
            head: n,
            track: n + 1,
            sect: n + 2,
            subsections: DriveSubs {
                media_changed: Some(MediaChanged { media_changed: n + 3 }),
                media_rate: Some(MediaRate { media_rate: n + 4 }),
                perpendicular: Some(Perpendicular { perpendicular: n + 5 }),
            },
        };
        let sent = FdcState {
            state: Controller {
                sra: 1,
                srb: 2,
                dor: 3,
                tdr: 4,
                dsr: 5,
                msr: 6,
                status0: 7,
                status1: 8,
                status2: 9,
                fifo: Bytes::from_fn(|i| i as u8 ^ 0x35),
                data_pos: 10,
                data_len: 512,
                data_state: 12,
                data_dir: 13,
                eot: 14,
                timer0: 15,
                timer1: 16,
                precomp_trk: 17,
                config: 18,
                lock: 19,
                pwrd: 20,
                num_floppies: 2,
                drives: [drive(30), drive(40)],
                subsections: ControllerSubs {
                    reset_sensei: Some(ResetSensei { reset_sensei: 21 }),
                    result_timer: Some(ResultTimer { result_timer: Timer(Some(22)) }),
                    phase: Some(Phase { phase: 23 }),
                },
            },
        };
        let mut fdc = Fdc::new();
        fdc.check(&sent).unwrap();
        fdc.restore(sent.clone()).unwrap();
        assert_eq!(fdc.save(Audience::Qemu).unwrap(), sent);
        fdc.reset();
        assert_eq!(fdc.save(Audience::Qemu).unwrap(), FdcState::default());
    }

    #[test]
    fn bad_state_is_named() {
        let fdc = Fdc::new();
        let refused = |change: fn(&mut Controller)| {
            let mut state = FdcState::default();
            change(&mut state.state);
            fdc.check(&state).unwrap_err().field
        };
        assert_eq!(refused(|s| s.num_floppies = 1), "num_floppies");
        assert_eq!(refused(|s| s.data_pos = 513), "data_pos");
        assert_eq!(refused(|s| s.data_len = u32::MAX), "data_len");
    }
}
