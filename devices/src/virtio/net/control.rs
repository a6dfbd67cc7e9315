//! The control queue (virtio 1.2, 5.1.6.5), and the filter that it programs.

use super::super::chain::Chain;
use super::{Net, feature, link};

/// How many addresses the filter holds; a driver with more gets everything of that kind.
pub(super) const MAX_MACS: usize = 64;
/// Bytes of a bit for each VLAN.
pub(super) const VLAN_BYTES: usize = 512;

const OK: u8 = 0;
const ERROR: u8 = 1;

/// Classes and commands.
mod command {
    pub(super) const RX: u8 = 0;
    pub(super) const RX_PROMISC: u8 = 0;
    pub(super) const RX_ALLMULTI: u8 = 1;
    pub(super) const RX_ALLUNI: u8 = 2;
    pub(super) const RX_NOMULTI: u8 = 3;
    pub(super) const RX_NOUNI: u8 = 4;
    pub(super) const RX_NOBCAST: u8 = 5;
    pub(super) const MAC: u8 = 1;
    pub(super) const MAC_TABLE_SET: u8 = 0;
    pub(super) const MAC_ADDR_SET: u8 = 1;
    pub(super) const VLAN: u8 = 2;
    pub(super) const VLAN_ADD: u8 = 0;
    pub(super) const VLAN_DEL: u8 = 1;
    pub(super) const ANNOUNCE: u8 = 3;
    pub(super) const ANNOUNCE_ACK: u8 = 0;
    pub(super) const GUEST_OFFLOADS: u8 = 5;
    pub(super) const GUEST_OFFLOADS_SET: u8 = 0;
}

/// Which frames the driver wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) promisc: bool,
    pub(super) allmulti: bool,
    pub(super) alluni: bool,
    pub(super) nomulti: bool,
    pub(super) nouni: bool,
    pub(super) nobcast: bool,
    /// More addresses than fit.
    pub(super) multi_overflow: bool,
    pub(super) uni_overflow: bool,
    pub(super) macs: Vec<[u8; 6]>,
    pub(super) vlans: Vec<u8>,
}

impl Default for Filter {
    /// Everything, until a driver says otherwise.
    fn default() -> Self {
        Self {
            promisc: true,
            allmulti: false,
            alluni: false,
            nomulti: false,
            nouni: false,
            nobcast: false,
            multi_overflow: false,
            uni_overflow: false,
            macs: Vec::new(),
            vlans: vec![0xff; VLAN_BYTES],
        }
    }
}

fn is_multicast(mac: &[u8; 6]) -> bool {
    mac[0] & 1 != 0
}

impl Filter {
    pub(super) fn set_vlan_filtering(&mut self, on: bool) {
        self.vlans.fill(if on { 0 } else { 0xff });
    }

    fn has_vlan(&self, vlan: u16) -> bool {
        let vlan = vlan & 0xfff;
        self.vlans.get(usize::from(vlan / 8)).is_some_and(|byte| byte & 1 << (vlan % 8) != 0)
    }

    fn set_vlan(&mut self, vlan: u16, on: bool) -> bool {
        let bit = 1 << (vlan % 8);
        match self.vlans.get_mut(usize::from(vlan / 8)) {
            Some(byte) if on => *byte |= bit,
            Some(byte) => *byte &= !bit,
            None => return false,
        }
        true
    }

    /// Whether the driver wants a frame; `mac` is the device's own address.
    pub(super) fn wants(&self, frame: &[u8], mac: &[u8; 6]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else { return false };
        if self.promisc {
            return true;
        }
        if let Some(&[0x81, 0x00, high, low]) = frame.get(12..16)
            && !self.has_vlan(u16::from_be_bytes([high, low]))
        {
            return false;
        }
        if is_multicast(to) {
            if *to == [0xff; 6] {
                return !self.nobcast;
            }
            return !self.nomulti
                && (self.allmulti || self.multi_overflow || self.macs.contains(to));
        }
        !self.nouni && (self.alluni || self.uni_overflow || to == mac || self.macs.contains(to))
    }

    /// Takes the two lists of a table: other addresses of the device's own, and groups.
    fn set_table(&mut self, uni: Vec<[u8; 6]>, multi: Vec<[u8; 6]>) {
        self.macs.clear();
        self.uni_overflow = uni.len() > MAX_MACS;
        if !self.uni_overflow {
            self.macs.extend(uni);
        }
        self.multi_overflow = self.macs.len() + multi.len() > MAX_MACS;
        if !self.multi_overflow {
            self.macs.extend(multi);
        }
    }
}

/// One list of a table. A longer one than fits is passed over, and comes back one too long.
fn read_list(chain: &mut Chain<'_>) -> Option<Vec<[u8; 6]>> {
    let count = u32::from_le_bytes(chain.readable.read_array()?);
    let count = usize::try_from(count).ok()?;
    if count.checked_mul(6)? > chain.readable.len() {
        return None;
    }
    if count > MAX_MACS {
        chain.readable.skip(count * 6);
        return Some(vec![[0; 6]; MAX_MACS + 1]);
    }
    (0..count).map(|_| chain.readable.read_array()).collect()
}

impl Net {
    /// Serves one request of the control queue; returns how many bytes were written.
    pub(super) fn control(&mut self, chain: &mut Chain<'_>) -> usize {
        let done = self.execute(chain).is_some();
        chain.writable.write(&[if done { OK } else { ERROR }])
    }

    fn execute(&mut self, chain: &mut Chain<'_>) -> Option<()> {
        let [class, command] = chain.readable.read_array()?;
        match (class, command) {
            (command::RX, _) => {
                let [value] = chain.readable.read_array()?;
                let flag = match command {
                    command::RX_PROMISC => &mut self.filter.promisc,
                    command::RX_ALLMULTI => &mut self.filter.allmulti,
                    command::RX_ALLUNI => &mut self.filter.alluni,
                    command::RX_NOMULTI => &mut self.filter.nomulti,
                    command::RX_NOUNI => &mut self.filter.nouni,
                    command::RX_NOBCAST => &mut self.filter.nobcast,
                    _ => return None,
                };
                *flag = value != 0;
            }
            (command::MAC, command::MAC_TABLE_SET) => {
                let uni = read_list(chain)?;
                let multi = read_list(chain)?;
                self.filter.set_table(uni, multi);
            }
            (command::MAC, command::MAC_ADDR_SET) => {
                if chain.readable.len() != 6 {
                    return None;
                }
                self.mac = chain.readable.read_array()?;
            }
            (command::VLAN, command::VLAN_ADD | command::VLAN_DEL) => {
                let vlan = u16::from_le_bytes(chain.readable.read_array()?);
                return self.filter.set_vlan(vlan, command == command::VLAN_ADD).then_some(());
            }
            (command::ANNOUNCE, command::ANNOUNCE_ACK) => {
                if self.status & link::ANNOUNCE == 0 {
                    return None;
                }
                self.status &= !link::ANNOUNCE;
            }
            (command::GUEST_OFFLOADS, command::GUEST_OFFLOADS_SET) => {
                let offloads = u64::from_le_bytes(chain.readable.read_array()?);
                if !self.has(feature::CTRL_GUEST_OFFLOADS)
                    || !self.has(offloads)
                    || offloads & !feature::GUEST_OFFLOADS != 0
                {
                    return None;
                }
                self.set_offloads(offloads);
            }
            _ => return None,
        }
        Some(())
    }
}
