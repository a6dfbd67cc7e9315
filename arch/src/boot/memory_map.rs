//! The memory map that the guest is told (what a BIOS answers to `int 15h, ax=e820h`).

use super::{AcpiArea, RamMap, at};

/// What a piece of the map is; the numbers are those of ACPI 6.5, table 15.2, and of PVH's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// One piece of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) kind: Kind,
}

/// The whole map, sorted, without overlaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MemoryMap {
    pieces: Vec<Piece>,
}

/// What a PC keeps for itself: the extended BIOS data area, the BIOS below 1 MiB,
/// KVM's identity map and TSS pages on Intel, the BIOS below 4 GiB.
const RESERVED: [(u64, u64); 4] = [
    (0x9_fc00, 0xa_0000),
    (0xe_0000, 0x10_0000),
    (0xfeff_c000, 0xff00_0000),
    (0xfffc_0000, 0x1_0000_0000),
];
/// Video memory and option ROMs: neither RAM nor reserved, a hole in the map.
const LEGACY_HOLE: (u64, u64) = (0xa_0000, 0xe_0000);

impl MemoryMap {
    pub(super) fn new(ram: RamMap, acpi: Option<AcpiArea>) -> Self {
        const FOUR_GIB: u64 = 1 << 32;
        let mut reserved: Vec<(u64, u64)> = RESERVED.into();
        if let Some(acpi) = acpi {
            let area = (acpi.start, acpi.start.saturating_add(acpi.size));
            let known = |r: &&(u64, u64)| r.0 <= area.0 && area.1 <= r.1;
            if area.0 < area.1 && reserved.iter().find(known).is_none() {
                reserved.push(area);
            }
        }
        let mut free = vec![(0, ram.low), (FOUR_GIB, FOUR_GIB.saturating_add(ram.high))];
        for &(start, end) in reserved.iter().chain([&LEGACY_HOLE]) {
            free = free
                .into_iter()
                .flat_map(|(from, to)| [(from, to.min(start)), (from.max(end), to)])
                .filter(|(from, to)| from < to)
                .collect();
        }
        let piece = |kind| move |(start, end)| Piece { start, end, kind };
        let mut pieces: Vec<Piece> = free.into_iter().map(piece(Kind::Ram)).collect();
        pieces.extend(reserved.into_iter().map(piece(Kind::Reserved)));
        pieces.sort_by_key(|piece| piece.start);
        Self { pieces }
    }

    /// The pieces in order of address.
    pub(super) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// RAM from 1 MiB on in which loaded things may lie.
    fn extended_ram(&self) -> impl DoubleEndedIterator<Item = &Piece> {
        let usable = |piece: &&Piece| piece.kind == Kind::Ram && piece.start >= at::HIGH_MEMORY;
        self.pieces.iter().filter(usable)
    }

    /// Whether `start..end` is RAM, all in one piece, from 1 MiB on.
    pub(super) fn holds(&self, start: u64, end: u64) -> bool {
        self.extended_ram().any(|piece| piece.start <= start && start <= end && end <= piece.end)
    }

    /// The highest page-aligned address at which `size` bytes fit into RAM between `min` and `max`.
    pub(super) fn highest_fit(&self, size: u64, min: u64, max: u64) -> Option<u64> {
        self.extended_ram().rev().find_map(|piece| {
            let address = piece.end.min(max).checked_sub(size)? & !0xfff;
            (address >= piece.start.max(min)).then_some(address)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_a_pcs() {
        let map = MemoryMap::new(RamMap { low: 3 << 30, high: 2 << 30 }, None);
        let found: Vec<_> = map.pieces().iter().map(|p| (p.start, p.end, p.kind)).collect();
        assert_eq!(
            found,
            [
                (0, 0x9_fc00, Kind::Ram),
                (0x9_fc00, 0xa_0000, Kind::Reserved),
                (0xe_0000, 0x10_0000, Kind::Reserved),
                (0x10_0000, 3 << 30, Kind::Ram),
                (0xfeff_c000, 0xff00_0000, Kind::Reserved),
                (0xfffc_0000, 1 << 32, Kind::Reserved),
                (1 << 32, 6 << 30, Kind::Ram),
            ]
        );
    }

    #[test]
    fn acpi_tables_are_cut_out_of_ram() {
        let acpi = AcpiArea { rsdp: 0x3ff_0000, start: 0x3ff_0000, size: 0x8000 };
        let map = MemoryMap::new(RamMap { low: 64 << 20, high: 0 }, Some(acpi));
        assert!(map.holds(0x10_0000, 0x3ff_0000));
        assert!(!map.holds(0x10_0000, 0x3ff_0001));
        assert!(map.holds(0x3ff_8000, 0x400_0000));
        assert_eq!(map.highest_fit(0x8001, 0, u64::MAX), Some(0x3fe_7000));
        // In the BIOS area they are covered already.
        let acpi = AcpiArea { rsdp: 0xf_0000, start: 0xf_0000, size: 0x1_0000 };
        let ram = RamMap { low: 64 << 20, high: 0 };
        assert_eq!(MemoryMap::new(ram, Some(acpi)), MemoryMap::new(ram, None));
    }

    #[test]
    fn absurd_sizes_do_no_harm() {
        for (low, high) in [(0, 0), (0x1000, 0), (u64::MAX, u64::MAX)] {
            let acpi = AcpiArea { rsdp: 0, start: u64::MAX, size: u64::MAX };
            let map = MemoryMap::new(RamMap { low, high }, Some(acpi));
            assert!(!map.holds(0, 4096));
            map.highest_fit(u64::MAX, 0, u64::MAX);
        }
    }
}
