//! The SMBus host of the PIIX4, on a bus without slaves: every transaction ends with "nobody
//! answered".

use serde::{Deserialize, Serialize};

/// Offsets from SMBBA.
mod reg {
    pub(super) const STATUS: u16 = 0x00;
    pub(super) const CONTROL: u16 = 0x02;
    pub(super) const COMMAND: u16 = 0x03;
    pub(super) const ADDRESS: u16 = 0x04;
    pub(super) const DATA0: u16 = 0x05;
    pub(super) const DATA1: u16 = 0x06;
    pub(super) const BLOCK_DATA: u16 = 0x07;
    pub(super) const AUX_CONTROL: u16 = 0x0d;
}

/// Status: a slave did not answer.
const DEVICE_ERROR: u8 = 1 << 2;
/// Status: the transaction was killed.
const FAILED: u8 = 1 << 4;
/// Control: kill the running transaction.
const KILL: u8 = 1 << 1;
/// Control: start. Reads as zero.
const START: u8 = 1 << 6;
/// Control bits that read back.
const CONTROL_READABLE: u8 = 0x1f;
/// Bytes of block data.
pub(super) const BLOCK: usize = 32;

/// The registers; on the wire as they are here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "pmsmb")]
pub(super) struct SmBus {
    #[serde(rename = "smb_stat")]
    pub(super) stat: u8,
    #[serde(rename = "smb_ctl")]
    pub(super) ctl: u8,
    #[serde(rename = "smb_cmd")]
    pub(super) cmd: u8,
    #[serde(rename = "smb_addr")]
    pub(super) addr: u8,
    #[serde(rename = "smb_data0")]
    pub(super) data0: u8,
    #[serde(rename = "smb_data1")]
    pub(super) data1: u8,
    /// The next byte of `data`.
    #[serde(rename = "smb_index")]
    pub(super) index: u32,
    #[serde(rename = "smb_data")]
    pub(super) data: [u8; BLOCK],
    #[serde(rename = "smb_auxctl")]
    pub(super) auxctl: u8,
    #[serde(rename = "smb_blkdata")]
    pub(super) blkdata: u8,
    pub(super) i2c_enable: bool,
    pub(super) op_done: bool,
    pub(super) in_i2c_block_read: bool,
    #[serde(rename = "start_transaction_on_status_read")]
    pub(super) start_on_status_read: bool,
}

impl Default for SmBus {
    fn default() -> Self {
        Self {
            stat: 0,
            ctl: 0,
            cmd: 0,
            addr: 0,
            data0: 0,
            data1: 0,
            index: 0,
            data: [0; BLOCK],
            // Block buffer on.
            auxctl: 0x02,
            blkdata: 0,
            i2c_enable: false,
            op_done: true,
            in_i2c_block_read: false,
            start_on_status_read: false,
        }
    }
}

impl SmBus {
    pub(super) fn read(&mut self, offset: u16) -> u8 {
        match offset {
            reg::STATUS => self.stat,
            reg::CONTROL => {
                self.index = 0;
                self.ctl & CONTROL_READABLE
            }
            reg::COMMAND => self.cmd,
            reg::ADDRESS => self.addr,
            reg::DATA0 => self.data0,
            reg::DATA1 => self.data1,
            reg::BLOCK_DATA => {
                let byte = self.data.get(self.index as usize).copied().unwrap_or(0);
                self.advance();
                byte
            }
            reg::AUX_CONTROL => self.auxctl,
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, offset: u16, value: u8) {
        match offset {
            // Cleared by ones.
            reg::STATUS => {
                self.stat &= !value;
                self.index = 0;
            }
            reg::CONTROL => {
                self.ctl = value & !START;
                if value & KILL != 0 {
                    self.stat |= FAILED;
                } else if value & START != 0 {
                    self.stat |= DEVICE_ERROR;
                }
            }
            reg::COMMAND => self.cmd = value,
            reg::ADDRESS => self.addr = value,
            reg::DATA0 => self.data0 = value,
            reg::DATA1 => self.data1 = value,
            reg::BLOCK_DATA => {
                if let Some(byte) = self.data.get_mut(self.index as usize) {
                    *byte = value;
                }
                self.advance();
            }
            reg::AUX_CONTROL => self.auxctl = value & 0x03,
            _ => {}
        }
    }

    fn advance(&mut self) {
        self.index = self.index.wrapping_add(1) % BLOCK as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_answers() {
        let mut bus = SmBus::default();
        assert_eq!(bus.read(reg::STATUS), 0);
        bus.write(reg::ADDRESS, 0xa1);
        bus.write(reg::CONTROL, START | 0x08);
        assert_eq!(bus.read(reg::STATUS), DEVICE_ERROR);
        assert_eq!((bus.read(reg::CONTROL), bus.read(reg::ADDRESS)), (0x08, 0xa1));
        bus.write(reg::STATUS, 0xff);
        assert_eq!(bus.read(reg::STATUS), 0);
        bus.write(reg::CONTROL, KILL);
        assert_eq!(bus.read(reg::STATUS), FAILED);
    }

    #[test]
    fn block_data_goes_round() {
        let mut bus = SmBus::default();
        (0..33).for_each(|n| bus.write(reg::BLOCK_DATA, n));
        bus.read(reg::CONTROL);
        assert_eq!([bus.read(reg::BLOCK_DATA), bus.read(reg::BLOCK_DATA)], [32, 1]);
    }
}
