//! The tables for a firmware that decides where they go: three files, of which one is the list of what
//! it has to do (QEMU's interface, `docs/specs/` there and SeaBIOS's `romfile_loader`). A command has 128
//! bytes: its number, names of files with 56 bytes each, and numbers, all little-endian.

use super::{AcpiConfig, AcpiError, Area, tables};

/// The file with the tables.
pub const TABLES_FILE: &str = "etc/acpi/tables";
/// The file with the root pointer.
pub const RSDP_FILE: &str = "etc/acpi/rsdp";
/// The file with the commands.
pub const SCRIPT_FILE: &str = "etc/table-loader";

/// As large as QEMU makes the file of the tables, and the most that fits.
const TABLES_LEN: usize = 0x2_0000;
/// The same for the commands: 32 of them.
const SCRIPT_LEN: usize = 0x1000;
const COMMAND_LEN: usize = 128;
const NAME_LEN: usize = 56;

const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;

/// Anywhere in memory below 4 GiB.
const ZONE_HIGH: u8 = 1;
/// 0xf0000 to 0xfffff, where the root pointer is looked for.
const ZONE_F_SEGMENT: u8 = 2;

/// Where an RSDP has its RSDT's address and its checksum, and its length.
const RSDP_RSDT: u32 = 16;
const RSDP_CHECKSUM: u32 = 8;
const RSDP_LEN: u32 = 20;
/// Where every other table has its checksum.
const TABLE_CHECKSUM: u32 = 9;
/// The FADT's pointers to FACS and DSDT.
const FADT_FACS: u32 = 36;
const FADT_DSDT: u32 = 40;
/// An RSDT's first pointer.
const RSDT_ENTRIES: u32 = 36;

/// The files.
#[derive(Debug, Clone)]
pub struct FirmwareTables {
    /// [`TABLES_FILE`]; pointers are offsets in it.
    pub tables: Vec<u8>,
    /// [`RSDP_FILE`].
    pub rsdp: Vec<u8>,
    /// [`SCRIPT_FILE`].
    pub script: Vec<u8>,
}

struct Script(Vec<u8>);

impl Script {
    fn command(&mut self, number: u32, parts: &[&[u8]]) {
        let start = self.0.len();
        self.0.extend(number.to_le_bytes());
        parts.iter().for_each(|part| self.0.extend_from_slice(part));
        self.0.resize(start + COMMAND_LEN, 0);
    }

    fn allocate(&mut self, file: &str, align: u32, zone: u8) {
        self.command(ALLOCATE, &[&name(file), &align.to_le_bytes(), &[zone]]);
    }

    /// The four bytes at `offset` of `file` are an offset in the tables, and become an address.
    fn pointer(&mut self, file: &str, offset: u32) {
        let size = [4];
        self.command(ADD_POINTER, &[&name(file), &name(TABLES_FILE), &offset.to_le_bytes(), &size]);
    }

    fn checksum(&mut self, file: &str, offset: u32, start: u32, len: u32) {
        let [offset, start, len] = [offset, start, len].map(u32::to_le_bytes);
        self.command(ADD_CHECKSUM, &[&name(file), &offset, &start, &len]);
    }
}

fn name(file: &str) -> [u8; NAME_LEN] {
    let mut bytes = [0; NAME_LEN];
    for (to, from) in bytes.iter_mut().zip(file.bytes()) {
        *to = from;
    }
    bytes
}

/// Makes the files of a machine.
pub fn for_firmware(config: AcpiConfig) -> Result<FirmwareTables, AcpiError> {
    let mut area = Area { start: 0, image: Vec::new() };
    let placed = area.add_all(config);
    let mut tables = area.image;
    if tables.len() > TABLES_LEN {
        return Err(AcpiError { needed: tables.len(), room: TABLES_LEN });
    }
    let mut script = Script(Vec::new());
    // The FACS' alignment is the strictest (ACPI 1.0b, 5.2.6); the root pointer's is 16 (5.2.4.1).
    script.allocate(RSDP_FILE, 16, ZONE_F_SEGMENT);
    script.allocate(TABLES_FILE, 64, ZONE_HIGH);
    let fields = [
        placed.fadt + FADT_FACS,
        placed.fadt + FADT_DSDT,
        placed.rsdt + RSDT_ENTRIES,
        placed.rsdt + RSDT_ENTRIES + 4,
    ];
    fields.into_iter().for_each(|offset| script.pointer(TABLES_FILE, offset));
    script.pointer(RSDP_FILE, RSDP_RSDT);
    for table in [placed.fadt, placed.rsdt] {
        let len = length(&tables, table);
        script.checksum(TABLES_FILE, table + TABLE_CHECKSUM, table, len);
    }
    script.checksum(RSDP_FILE, RSDP_CHECKSUM, 0, RSDP_LEN);
    let mut script = script.0;
    script.resize(SCRIPT_LEN, 0);
    tables.resize(TABLES_LEN, 0);
    Ok(FirmwareTables { tables, rsdp: tables::rsdp(placed.rsdt).to_vec(), script })
}

/// A table's length, as it says itself.
fn length(tables: &[u8], at: u32) -> u32 {
    let bytes = tables.get(at as usize + 4..).and_then(|rest| rest.first_chunk());
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Does what the commands say, with these addresses.
    fn load(files: &FirmwareTables, tables_at: u32) -> (Vec<u8>, Vec<u8>) {
        let (mut tables, mut rsdp) = (files.tables.clone(), files.rsdp.clone());
        for command in files.script.chunks(COMMAND_LEN) {
            let number = |at: usize| u32::from_le_bytes(command[at..at + 4].try_into().unwrap());
            let is_rsdp = command[4..].starts_with(RSDP_FILE.as_bytes());
            let file = if is_rsdp { &mut rsdp } else { &mut tables };
            match number(0) {
                0 | ALLOCATE => {}
                ADD_POINTER => {
                    assert!(command[60..].starts_with(TABLES_FILE.as_bytes()) && command[120] == 4);
                    let place = &mut file[number(116) as usize..][..4];
                    let old = u32::from_le_bytes(place[..].try_into().unwrap());
                    place.copy_from_slice(&(old + tables_at).to_le_bytes());
                }
                ADD_CHECKSUM => {
                    let (start, len) = (number(64) as usize, number(68) as usize);
                    let sum = file[start..start + len].iter().fold(0u8, |s, b| s.wrapping_add(*b));
                    let place = &mut file[number(60) as usize];
                    *place = place.wrapping_sub(sum);
                }
                other => panic!("command {other}"),
            }
        }
        (tables, rsdp)
    }

    #[test]
    fn a_firmware_that_obeys_has_the_tables_of_a_direct_boot() {
        let config = AcpiConfig { vcpus: 3, ram: 5 << 30 };
        let files = for_firmware(config).unwrap();
        assert_eq!(
            (files.tables.len(), files.script.len(), files.rsdp.len()),
            (0x2_0000, 0x1000, 20)
        );
        // The direct boot has its root pointer in front.
        let at = super::super::AREA_START as u32 + super::super::RSDP_LEN as u32;
        let (tables, rsdp) = load(&files, at);
        let direct = super::super::build(config).unwrap().image;
        assert_eq!(rsdp, direct[..20]);
        assert_eq!(tables[..direct.len() - 64], direct[64..]);
        // Elsewhere only pointers and checksums differ.
        let (elsewhere, _) = load(&files, 0x7fe_0000);
        assert_ne!(elsewhere, tables);
    }
}
