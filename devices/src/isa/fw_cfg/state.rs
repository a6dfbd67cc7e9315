//! Section `fw_cfg` v2.

use migration::vmstate::{Audience, FieldError, Migratable, VmState};
use serde::{Deserialize, Serialize};

use super::FwCfg;

/// Section `fw_cfg` v2. The items are the machine's configuration, not state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgState {
    pub(super) cur_entry: u16,
    #[serde(rename = "cur_offset[1]")]
    pub(super) cur_offset: u32,
    pub(super) subsections: Subsections,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub(super) struct Subsections {
    #[serde(rename = "fw_cfg/dma@0")]
    pub(super) dma: Option<Dma>,
    #[serde(rename = "fw_cfg/acpi_mr")]
    pub(super) acpi_mr: Option<AcpiSizes>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Dma {
    pub(super) dma_addr: u64,
}

/// The sizes in bytes of the ACPI blobs that a firmware fetches: the files as they are offered, of which
/// the RAM blocks that hold them are whole pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiSizes {
    /// `etc/acpi/tables`.
    pub table_mr_size: u64,
    /// `etc/table-loader`.
    pub linker_mr_size: u64,
    /// `etc/acpi/rsdp`.
    pub rsdp_mr_size: u64,
}

/// The largest of QEMU's resizable ACPI blobs, and so the most that can come.
const MAX_BLOB: u64 = 0x20_0000;

impl VmState for FwCfgState {
    const VERSION: u32 = 2;
}

impl Migratable for FwCfg {
    type State = FwCfgState;

    fn save(&self, _: Audience) -> Result<FwCfgState, FieldError> {
        Ok(FwCfgState {
            cur_entry: self.selected,
            cur_offset: self.offset,
            subsections: Subsections {
                dma: Some(Dma { dma_addr: self.dma_address }),
                acpi_mr: self.acpi_sizes.clone(),
            },
        })
    }

    /// Item and offset are checked when they are used: an item that this machine does not have
    /// reads as empty, here as there.
    fn check(&self, state: &FwCfgState) -> Result<(), FieldError> {
        let Some(sizes) = &state.subsections.acpi_mr else { return Ok(()) };
        for (field, size) in [
            ("table_mr_size", sizes.table_mr_size),
            ("linker_mr_size", sizes.linker_mr_size),
            ("rsdp_mr_size", sizes.rsdp_mr_size),
        ] {
            if size > MAX_BLOB {
                return Err(FieldError::new(field, format_args!("at most {MAX_BLOB:#x}"), size));
            }
        }
        Ok(())
    }

    fn restore(&mut self, state: FwCfgState) -> Result<(), FieldError> {
        self.selected = state.cur_entry;
        self.offset = state.cur_offset;
        self.dma_address = state.subsections.dma.map_or(0, |sub| sub.dma_addr);
        self.acpi_sizes = state.subsections.acpi_mr;
        Ok(())
    }
}
