//! Takes the virtio devices in an inspected stream apart. QEMU's description has one field for each,
//! without saying what is in it.
//!
//! A body that does not fit what is known here stays as it is: bytes.

use migration::inspect::{Member, Part, Report, Value};
use migration::vmstate::SUBSECTION;

/// The field that holds the whole device.
const FIELD: &str = "virtio";
/// Queue arrays always have room for as many queues as a virtio device may have.
const QUEUES: u64 = 1024;
/// The PCI capability of MSI-X (PCI Local Bus 3.0, 6.8.2).
const MSIX: u8 = 0x11;
/// A request that the device has taken and not answered, as QEMU holds it in memory: three counts,
/// then room for 1024 addresses and lengths each way.
const ELEMENT: u64 = 49_168;
/// VIRTIO_NET_F_CTRL_GUEST_OFFLOADS (virtio 1.2, 5.1.3).
const NET_GUEST_OFFLOADS: u64 = 1 << 2;

/// Replaces the bytes of each virtio device by its fields.
pub fn take_apart(report: &mut Report) {
    for part in &mut report.parts {
        let Part::Device(section) = part else { continue };
        let Some(Value::Struct(members)) = &mut section.value else { continue };
        let kind = section.key.idstr.rsplit('/').next().unwrap_or_default();
        let Some(field) = members.iter_mut().find(|member| member.name == FIELD) else { continue };
        let Value::Bytes(bytes) = &field.value else { continue };
        if let Some(fields) = device(kind, bytes, field.offset) {
            field.value = Value::Struct(fields);
        }
    }
}

fn device(kind: &str, bytes: &[u8], base: u64) -> Option<Vec<Member>> {
    let mut all = Taker { bytes, at: 0, base, members: Vec::new() };
    all.int("pci_version", 4)?;
    let config = all.bytes("pci_config", 256)?;
    all.ints("pci_irq_state", 4, 4)?;
    let vectors = msix_vectors(&config);
    if vectors > 0 {
        all.repeat("msix_table", vectors, |entry| {
            // As on the bus: address, upper address, data, vector control, little-endian.
            entry.bytes("address", 8)?;
            entry.bytes("data", 4)?;
            entry.bytes("control", 4).map(drop)
        })?;
        all.bytes("msix_pending", vectors.div_ceil(8))?;
        all.int("config_vector", 2)?;
    }
    all.int("status", 1)?;
    all.int("isr", 1)?;
    all.int("queue_sel", 2)?;
    let features = all.int("guest_features", 4)?;
    let len = all.int("config_len", 4)?;
    all.bytes("config", len)?;
    let queues = all.int("queues", 4)?;
    if queues > QUEUES {
        return None;
    }
    all.repeat("vq", queues, |queue| {
        queue.int("num", 4)?;
        queue.int("desc", 8)?;
        queue.int("last_avail_idx", 2)?;
        if vectors > 0 {
            queue.int("vector", 2)?;
        }
        Some(())
    })?;
    match kind {
        "virtio-net" => net(&mut all, queues, features)?,
        "virtio-blk" => block(&mut all, queues)?,
        "virtio-balloon" => {
            all.int("num_pages", 4)?;
            all.int("actual", 4)?;
        }
        "virtio-console" => console(&mut all)?,
        "virtio-rng" => {}
        _ => return None,
    }
    while all.subsection("virtio/")? {}
    (all.at == bytes.len()).then_some(all.members)
}

/// How many vectors the MSI-X capability in a configuration space has.
fn msix_vectors(config: &[u8]) -> u64 {
    let byte = |at: u8| config.get(usize::from(at)).copied().unwrap_or_default();
    let mut at = byte(0x34);
    // Capabilities are 4 bytes at least: more than 64 of them is a circle.
    for _ in 0..64 {
        if at == 0 {
            break;
        }
        if byte(at) == MSIX {
            let control = [byte(at.saturating_add(2)), byte(at.saturating_add(3))];
            return u64::from(u16::from_le_bytes(control) & 0x7ff) + 1;
        }
        at = byte(at.saturating_add(1));
    }
    0
}

fn net(all: &mut Taker<'_>, queues: u64, features: u64) -> Option<()> {
    all.bytes("mac", 6)?;
    all.int("tx_waiting", 4)?;
    all.int("mergeable_rx_bufs", 4)?;
    all.int("link_status", 2)?;
    all.int("promisc", 1)?;
    all.int("allmulti", 1)?;
    let macs = all.int("mac_table_entries", 4)?;
    all.repeat("mac_table", macs, |entry| entry.bytes("mac", 6).map(drop))?;
    all.bytes("vlans", 512)?;
    all.int("has_vnet_hdr", 4)?;
    for flag in
        ["multi_overflow", "uni_overflow", "alluni", "nomulti", "nouni", "nobcast", "has_ufo"]
    {
        all.int(flag, 1)?;
    }
    if queues > 3 {
        all.int("max_queue_pairs", 2)?;
        let pairs = all.int("curr_queue_pairs", 2)?;
        all.ints("tx_waiting_more", pairs.saturating_sub(1), 4)?;
    }
    if features & NET_GUEST_OFFLOADS != 0 {
        all.int("guest_offloads", 8)?;
    }
    Some(())
}

fn block(all: &mut Taker<'_>, queues: u64) -> Option<()> {
    while all.peek()? == 1 {
        all.int("request", 1)?;
        if queues > 1 {
            all.int("request_queue", 4)?;
        }
        all.bytes("request_element", ELEMENT)?;
    }
    all.int("requests_end", 1).map(drop)
}

fn console(all: &mut Taker<'_>) -> Option<()> {
    all.int("columns", 2)?;
    all.int("rows", 2)?;
    let max = all.int("max_ports", 4)?;
    all.ints("ports_map", max.div_ceil(32), 4)?;
    let ports = all.int("ports", 4)?;
    all.repeat("port", ports, |port| {
        port.int("id", 4)?;
        port.int("guest_connected", 1)?;
        port.int("host_connected", 1)?;
        if port.int("element_popped", 4)? != 0 {
            port.int("iov_idx", 4)?;
            port.int("iov_offset", 8)?;
            port.bytes("element", ELEMENT)?;
        }
        Some(())
    })
}

/// Takes fields from the front of a body. `None`: it is not as was thought.
struct Taker<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The offset of the first byte in the section.
    base: u64,
    members: Vec<Member>,
}

impl Taker<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn take(&mut self, len: u64) -> Option<(u64, &[u8])> {
        let offset = self.base + self.at as u64;
        let end = self.at.checked_add(usize::try_from(len).ok()?)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some((offset, taken))
    }

    fn push(&mut self, name: &str, offset: u64, value: Value) {
        self.members.push(Member { name: name.to_owned(), offset, subsection: None, value });
    }

    fn int(&mut self, name: &str, size: u8) -> Option<u64> {
        let (offset, bytes) = self.take(size.into())?;
        let bits = bytes.iter().fold(0, |bits, byte| bits << 8 | u64::from(*byte));
        self.push(name, offset, Value::Int { bits, size, signed: false });
        Some(bits)
    }

    fn bytes(&mut self, name: &str, len: u64) -> Option<Vec<u8>> {
        let (offset, bytes) = self.take(len)?;
        let bytes = bytes.to_vec();
        self.push(name, offset, Value::Bytes(bytes.clone()));
        Some(bytes)
    }

    fn ints(&mut self, name: &str, count: u64, size: u8) -> Option<()> {
        let (offset, bytes) = self.take(count.checked_mul(size.into())?)?;
        let value = |bytes: &[u8]| Value::Int {
            bits: bytes.iter().fold(0, |bits, byte| bits << 8 | u64::from(*byte)),
            size,
            signed: false,
        };
        let values = bytes.chunks(usize::from(size)).map(value).collect();
        self.push(name, offset, Value::Array(values));
        Some(())
    }

    /// Several structs; each has one byte at least, so a count beyond the body's end ends with it.
    fn repeat(
        &mut self,
        name: &str,
        count: u64,
        mut one: impl FnMut(&mut Taker<'_>) -> Option<()>,
    ) -> Option<()> {
        let offset = self.base + self.at as u64;
        let mut values = Vec::new();
        for _ in 0..count {
            let mut taker =
                Taker { bytes: self.bytes, at: self.at, base: self.base, members: Vec::new() };
            one(&mut taker)?;
            self.at = taker.at;
            values.push(Value::Struct(taker.members));
        }
        self.push(name, offset, Value::Array(values));
        Some(())
    }

    /// One subsection of this owner, if another one is there.
    fn subsection(&mut self, owner: &str) -> Option<bool> {
        let ahead = self.bytes.get(self.at..).unwrap_or_default();
        let name = ahead.get(2..).unwrap_or_default();
        if ahead.first() != Some(&SUBSECTION) || !name.starts_with(owner.as_bytes()) {
            return Some(false);
        }
        let (offset, _) = self.take(1)?;
        let (_, len) = self.take(1)?;
        let len = *len.first()?;
        let (_, name) = self.take(len.into())?;
        let name = String::from_utf8(name.to_vec()).ok()?;
        let (_, version) = self.take(4)?;
        let version = u32::from_be_bytes(*version.first_chunk()?);
        let mut inner =
            Taker { bytes: self.bytes, at: self.at, base: self.base, members: Vec::new() };
        inner.subsection_body(&name)?;
        self.at = inner.at;
        let value = Value::Struct(inner.members);
        self.members.push(Member { name, offset, subsection: Some(version), value });
        Some(true)
    }

    fn subsection_body(&mut self, name: &str) -> Option<()> {
        match name {
            "virtio/device_endian" => self.int("device_endian", 1).map(drop),
            "virtio/64bit_features" => self.int("guest_features", 8).map(drop),
            "virtio/virtqueues" => self.repeat("ring", QUEUES, |ring| {
                ring.int("avail", 8)?;
                ring.int("used", 8).map(drop)
            }),
            "virtio/ringsize" => self.ints("num_default", QUEUES, 4),
            "virtio/broken" => self.int("broken", 1).map(drop),
            "virtio/started" => self.int("started", 1).map(drop),
            "virtio/disabled" => self.int("disabled", 1).map(drop),
            "virtio/packed_virtqueues" => self.repeat("packed", QUEUES, |queue| {
                queue.int("last_avail_idx", 2)?;
                queue.int("last_avail_wrap", 1)?;
                queue.int("used_idx", 2)?;
                queue.int("used_wrap", 1)?;
                queue.int("inuse", 4).map(drop)
            }),
            "virtio/extra_state" => {
                while self.subsection("virtio_pci/")? {}
                Some(())
            }
            "virtio_pci/modern_state" => {
                self.int("dfselect", 4)?;
                self.int("gfselect", 4)?;
                self.ints("guest_features", 2, 4)?;
                self.repeat("vq", QUEUES, |queue| {
                    queue.int("num", 2)?;
                    queue.int("pad", 1)?;
                    queue.int("enabled", 1)?;
                    // Each address as two halves, the lower one first.
                    queue.ints("desc", 2, 4)?;
                    queue.ints("avail", 2, 4)?;
                    queue.ints("used", 2, 4)
                })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_circle_of_capabilities_ends() {
        let mut config = vec![0; 256];
        config[0x34] = 0x40;
        config[0x41] = 0x40;
        assert_eq!(msix_vectors(&config), 0);
        config[0x41] = 0x50;
        config[0x50] = MSIX;
        config[0x52] = 3;
        assert_eq!(msix_vectors(&config), 4);
        assert_eq!(msix_vectors(&[]), 0);
    }

    #[test]
    fn what_does_not_fit_stays_bytes() {
        assert!(device("virtio-rng", &[0; 300], 0).is_none());
        assert!(device("virtio-rng", &[], 0).is_none());
        assert!(device("virtio-rng", &[0xff; 4096], 0).is_none());
        let mut body = vec![0; 4 + 256 + 16 + 8 + 4 + 4];
        assert!(device("virtio-rng", &body, 0).is_some());
        assert!(device("virtio-gpu", &body, 0).is_none());
        body.push(SUBSECTION);
        assert!(device("virtio-rng", &body, 0).is_none());
    }
}
