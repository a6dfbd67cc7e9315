//! Segment registers: KVM's fields and QEMU's descriptor bits.

use kvm_bindings::{kvm_dtable, kvm_segment};
use migration::vmstate::FieldError;

use super::cpu::Segment;
use super::hex;

const P: u32 = 1 << 15;

/// QEMU's form of a KVM segment. An unusable one has no flags.
pub(crate) fn to_wire(s: &kvm_segment) -> Segment {
    let bit = |value: u8, n: u32| u32::from(value & 1) << n;
    let flags = (u32::from(s.type_ & 0xf) << 8)
        | bit(s.s, 12)
        | (u32::from(s.dpl & 3) << 13)
        | bit(s.present, 15)
        | bit(s.avl, 20)
        | bit(s.l, 21)
        | bit(s.db, 22)
        | bit(s.g, 23);
    Segment {
        selector: s.selector.into(),
        base: s.base,
        limit: s.limit,
        flags: if s.unusable != 0 { 0 } else { flags },
    }
}

/// KVM's form of QEMU's segment. One that is not present is unusable.
pub(crate) fn from_wire(name: &str, s: &Segment) -> Result<kvm_segment, FieldError> {
    let bit = |n: u32| (s.flags >> n & 1) as u8;
    Ok(kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: u16::try_from(s.selector).map_err(|_| {
            FieldError::new(format!("{name}.selector"), "at most 0xffff", hex(s.selector))
        })?,
        type_: (s.flags >> 8 & 0xf) as u8,
        present: bit(15),
        dpl: (s.flags >> 13 & 3) as u8,
        db: bit(22),
        s: bit(12),
        l: bit(21),
        g: bit(23),
        avl: bit(20),
        unusable: u8::from(s.flags & P == 0),
        padding: 0,
    })
}

/// A segment as virtual-8086 mode has it, whatever the wire says beside base and selector.
pub(crate) fn from_wire_v86(name: &str, s: &Segment) -> Result<kvm_segment, FieldError> {
    Ok(kvm_segment {
        type_: 3,
        present: 1,
        dpl: 3,
        db: 0,
        s: 1,
        l: 0,
        g: 0,
        avl: 0,
        unusable: 0,
        ..from_wire(name, s)?
    })
}

/// QEMU's form of GDTR or IDTR.
pub(crate) fn table_to_wire(t: &kvm_dtable) -> Segment {
    Segment { base: t.base, limit: t.limit.into(), ..Segment::default() }
}

/// KVM's form of GDTR or IDTR.
pub(crate) fn table_from_wire(name: &str, s: &Segment) -> Result<kvm_dtable, FieldError> {
    let limit = u16::try_from(s.limit)
        .map_err(|_| FieldError::new(format!("{name}.limit"), "at most 0xffff", hex(s.limit)))?;
    Ok(kvm_dtable { base: s.base, limit, padding: [0; 3] })
}
