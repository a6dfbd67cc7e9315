//! The network device's own part of the section.

use serde::{Deserialize, Serialize};

use migration::vmstate::{Bytes, Encoder, FieldError, LayoutDigest, StateError};

use super::super::device::{Part, PartDecoder};
use super::control::{Filter, MAX_MACS, VLAN_BYTES};
use super::{Net, feature};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    mac: [u8; 6],
    tx_waiting: u32,
    mergeable_rx_bufs: u32,
    status: u16,
    promisc: u8,
    allmulti: u8,
    macs_in_use: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Tail {
    vlans: Bytes<VLAN_BYTES>,
    has_vnet_hdr: u32,
    multi_overflow: u8,
    uni_overflow: u8,
    alluni: u8,
    nomulti: u8,
    nouni: u8,
    nobcast: u8,
    has_ufo: u8,
}

/// The part, decoded and checked.
struct State {
    head: Head,
    macs: Vec<[u8; 6]>,
    tail: Tail,
    /// `None` when that is not negotiated.
    offloads: Option<u64>,
}

/// More addresses than this are nobody's.
const MAX_MACS_ON_WIRE: u32 = 4096;

pub(super) fn layout(layout: LayoutDigest) -> LayoutDigest {
    layout.part::<Head>("net").part::<[u8; 6]>("mac").part::<Tail>("filter").part::<u64>("offloads")
}

impl Net {
    pub(super) fn save_state(&self, to: &mut Encoder) -> Result<(), StateError> {
        let filter = &self.filter;
        let vnet_header = self.backend.has_vnet_header();
        to.put(&Head {
            mac: self.mac,
            // Frames that could not be sent are still in the queue.
            tx_waiting: 0,
            mergeable_rx_bufs: self.has(feature::MRG_RXBUF).into(),
            status: self.status,
            promisc: filter.promisc.into(),
            allmulti: filter.allmulti.into(),
            macs_in_use: u32::try_from(filter.macs.len()).unwrap_or(0),
        })?;
        for mac in &filter.macs {
            to.put(mac)?;
        }
        to.put(&Tail {
            vlans: Bytes::from_fn(|i| filter.vlans.get(i).copied().unwrap_or(0)),
            has_vnet_hdr: vnet_header.into(),
            multi_overflow: filter.multi_overflow.into(),
            uni_overflow: filter.uni_overflow.into(),
            alluni: filter.alluni.into(),
            nomulti: filter.nomulti.into(),
            nouni: filter.nouni.into(),
            nobcast: filter.nobcast.into(),
            has_ufo: vnet_header.into(),
        })?;
        if self.has(feature::CTRL_GUEST_OFFLOADS) {
            to.put(&self.offloads)?;
        }
        Ok(())
    }

    pub(super) fn decode_state(&self, from: &mut PartDecoder<'_, '_>) -> Result<Part, StateError> {
        let head: Head = from.get("net")?;
        if head.macs_in_use > MAX_MACS_ON_WIRE {
            let expected = format_args!("at most {MAX_MACS_ON_WIRE}");
            let error = FieldError::new("net.mac_table.in_use", expected, head.macs_in_use);
            return Err(from.error(error));
        }
        let count = usize::try_from(head.macs_in_use).unwrap_or(0);
        let macs = from.get_seq("net.mac_table", count)?;
        let tail: Tail = from.get("net")?;
        let vnet_header = self.backend.has_vnet_header();
        if tail.has_vnet_hdr != 0 && !vnet_header {
            return Err(from.error(FieldError::new(
                "net.has_vnet_hdr",
                "0, since the backend here has no vnet headers",
                format_args!("{} (saved image requires vnet_hdr=on)", tail.has_vnet_hdr),
            )));
        }
        if tail.has_ufo != 0 && !vnet_header {
            return Err(from.error(FieldError::new(
                "net.has_ufo",
                "0, since the backend here has no offloads",
                format_args!("{} (saved image requires TUN_F_UFO support)", tail.has_ufo),
            )));
        }
        let mut offloads = None;
        if from.features & feature::CTRL_GUEST_OFFLOADS != 0 {
            let value: u64 = from.get("net.curr_guest_offloads")?;
            let allowed = from.features & feature::GUEST_OFFLOADS;
            if value & !allowed != 0 {
                let expected = format_args!("bits of {allowed:#x}");
                let found = format_args!("{value:#x}");
                let error = FieldError::new("net.curr_guest_offloads", expected, found);
                return Err(from.error(error));
            }
            offloads = Some(value);
        }
        Ok(Box::new(State { head, macs, tail, offloads }))
    }

    pub(super) fn restore_state(&mut self, part: Part) -> Result<(), FieldError> {
        let State { head, mut macs, tail, offloads } = *part.downcast::<State>().map_err(|_| {
            FieldError::new("net", "the part that this device has decoded", "another's")
        })?;
        self.mac = head.mac;
        self.status = head.status;
        let overflow = macs.len() > MAX_MACS;
        if overflow {
            macs.clear();
        }
        self.filter = Filter {
            promisc: head.promisc != 0,
            allmulti: head.allmulti != 0,
            alluni: tail.alluni != 0,
            nomulti: tail.nomulti != 0,
            nouni: tail.nouni != 0,
            nobcast: tail.nobcast != 0,
            multi_overflow: overflow || tail.multi_overflow != 0,
            uni_overflow: overflow || tail.uni_overflow != 0,
            macs,
            vlans: tail.vlans.to_vec(),
        };
        if let Some(offloads) = offloads {
            self.set_offloads(offloads);
        }
        Ok(())
    }
}
