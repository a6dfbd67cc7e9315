//! QEMU's firmware configuration device: items that a firmware or a guest reads by their number,
//! byte by byte or by the device's own DMA (QEMU's `docs/specs/fw_cfg`).

use vm_device::MutDevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_memory::{Bytes, GuestAddress};

use crate::device::Device;
use crate::memory::GuestRamRef;

mod state;

pub use state::{AcpiSizes, FwCfgState};

/// The selector; the data port follows it.
pub const BASE_PORT: u16 = 0x510;
/// First port and number of ports: selector and data, and the DMA address register.
pub const PORTS: [(u16, u16); 2] = [(BASE_PORT, 2), (BASE_PORT + DMA_HIGH, 8)];

/// Offsets from [`BASE_PORT`].
const SELECTOR: u16 = 0;
const DATA: u16 = 1;
const DMA_HIGH: u16 = 4;
const DMA_LOW: u16 = 8;

/// Numbers of the items.
mod item {
    pub(super) const SIGNATURE: u16 = 0x00;
    pub(super) const INTERFACE: u16 = 0x01;
    pub(super) const UUID: u16 = 0x02;
    pub(super) const RAM_SIZE: u16 = 0x03;
    pub(super) const NO_GRAPHICS: u16 = 0x04;
    pub(super) const NB_CPUS: u16 = 0x05;
    pub(super) const MAX_CPUS: u16 = 0x0f;
    pub(super) const FILE_DIR: u16 = 0x19;
    pub(super) const FILE_FIRST: u16 = 0x20;
    /// Bit 14 was "write" in old versions. Bit 15 marks what depends on the architecture; this board has
    /// nothing of that kind.
    pub(super) const MASK: u16 = 0xbfff;
}

/// There is no display: a firmware takes the serial port for its console.
const NO_GRAPHICS: [u8; 2] = [1, 0];
/// The traditional interface, and DMA.
const INTERFACES: u32 = 1 | 2;
/// What the DMA address register reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// Bits of the DMA control word.
mod dma {
    pub(super) const ERROR: u32 = 1 << 0;
    pub(super) const READ: u32 = 1 << 1;
    pub(super) const SKIP: u32 = 1 << 2;
    pub(super) const SELECT: u32 = 1 << 3;
    pub(super) const WRITE: u32 = 1 << 4;
}

/// A file's name, with its final NUL.
const NAME_SIZE: usize = 56;
/// How many files fit the numbers that QEMU's own device has for them.
const MAX_FILES: usize = 0x20;

/// A file cannot be offered to the guest.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The directory has 55 bytes for the name.
    #[error("the file name {0:?} is not 1 to 55 bytes of ASCII")]
    Name(String),
    /// There is one of this name.
    #[error("there are two files {0:?}")]
    Duplicate(String),
    /// The directory is full.
    #[error("there is no room for the file {0:?}: {MAX_FILES} files are the most")]
    Full(String),
    /// The directory has 32 bits for the size.
    #[error("the file {0:?} is larger than 4 GiB")]
    Size(String),
}

/// The device.
pub struct FwCfg {
    ram: GuestRamRef,
    signature: [u8; 4],
    interface: [u8; 4],
    uuid: [u8; 16],
    ram_size: [u8; 8],
    nb_cpus: [u8; 2],
    max_cpus: [u8; 2],
    directory: Vec<u8>,
    /// In the order of their names; the first is item 0x20.
    files: Vec<(String, Vec<u8>)>,
    selected: u16,
    offset: u32,
    dma_address: u64,
    acpi_sizes: Option<AcpiSizes>,
}

impl FwCfg {
    /// A device that knows the machine's name and size and has no files yet. `ram` is where its DMA
    /// goes.
    pub fn new(ram: GuestRamRef, uuid: [u8; 16], ram_size: u64, cpus: u16, max_cpus: u16) -> Self {
        let mut device = Self {
            ram,
            signature: *b"QEMU",
            interface: INTERFACES.to_le_bytes(),
            uuid,
            ram_size: ram_size.to_le_bytes(),
            nb_cpus: cpus.to_le_bytes(),
            max_cpus: max_cpus.to_le_bytes(),
            directory: Vec::new(),
            files: Vec::new(),
            selected: 0,
            offset: 0,
            dma_address: 0,
            acpi_sizes: None,
        };
        device.rebuild_directory();
        device
    }

    /// Offers a file to the guest. Files are numbered in the order of their names, so add them all
    /// before the guest runs.
    pub fn add_file(&mut self, name: &str, bytes: Vec<u8>) -> Result<(), FileError> {
        if name.is_empty() || name.len() >= NAME_SIZE || !name.is_ascii() || name.contains('\0') {
            return Err(FileError::Name(name.into()));
        }
        if u32::try_from(bytes.len()).is_err() {
            return Err(FileError::Size(name.into()));
        }
        if self.files.len() == MAX_FILES {
            return Err(FileError::Full(name.into()));
        }
        match self.files.binary_search_by(|(other, _)| other.as_str().cmp(name)) {
            Ok(_) => return Err(FileError::Duplicate(name.into())),
            Err(place) => self.files.insert(place, (name.into(), bytes)),
        }
        self.rebuild_directory();
        Ok(())
    }

    /// Offers these files in the place of all that were there.
    pub fn replace_files(
        &mut self,
        files: impl IntoIterator<Item = (String, Vec<u8>)>,
    ) -> Result<(), FileError> {
        self.files.clear();
        let added = files.into_iter().try_for_each(|(name, bytes)| self.add_file(&name, bytes));
        self.rebuild_directory();
        added
    }

    /// The sizes of QEMU's ACPI blobs as they came, or as [`set_acpi_sizes`](Self::set_acpi_sizes) said.
    pub fn acpi_sizes(&self) -> Option<&AcpiSizes> {
        self.acpi_sizes.as_ref()
    }

    /// Says how large the ACPI blobs are that this board offers, for a QEMU to come.
    pub fn set_acpi_sizes(&mut self, sizes: AcpiSizes) {
        self.acpi_sizes = Some(sizes);
    }

    /// All in big-endian: the number of files; then of each its size, its item, two bytes of
    /// nothing, its name.
    fn rebuild_directory(&mut self) {
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for ((name, bytes), number) in self.files.iter().zip(item::FILE_FIRST..) {
            directory.extend((bytes.len() as u32).to_be_bytes());
            directory.extend(number.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(name.as_bytes());
            directory.resize(directory.len() + NAME_SIZE - name.len(), 0);
        }
        self.directory = directory;
    }

    /// The item that is selected; one that does not exist is empty.
    fn bytes(&self) -> &[u8] {
        match self.selected & item::MASK {
            item::SIGNATURE => &self.signature,
            item::INTERFACE => &self.interface,
            item::UUID => &self.uuid,
            item::NO_GRAPHICS => &NO_GRAPHICS,
            item::RAM_SIZE => &self.ram_size,
            item::NB_CPUS => &self.nb_cpus,
            item::MAX_CPUS => &self.max_cpus,
            item::FILE_DIR => &self.directory,
            number => number
                .checked_sub(item::FILE_FIRST)
                .and_then(|n| self.files.get(usize::from(n)))
                .map_or(&[], |(_, bytes)| bytes),
        }
    }

    /// What is left of the item from the current offset on.
    fn rest(&self) -> &[u8] {
        self.bytes().get(self.offset as usize..).unwrap_or(&[])
    }

    fn select(&mut self, number: u16) {
        self.selected = number;
        self.offset = 0;
    }

    fn next_byte(&mut self) -> u8 {
        match self.rest().first().copied() {
            Some(byte) => {
                self.offset = self.offset.saturating_add(1);
                byte
            }
            None => 0,
        }
    }

    /// Does what the 16 bytes at the DMA address ask: control, length, address, big-endian. The
    /// control word is overwritten with 0, or with the error bit.
    fn run_dma(&mut self) {
        let descriptor = GuestAddress(std::mem::take(&mut self.dma_address));
        let mut raw = [0; 16];
        if let Err(error) = self.ram.read_slice(&mut raw, descriptor) {
            tracing::debug!(address = descriptor.0, %error, "fw_cfg: no DMA descriptor");
            return;
        }
        let value = u128::from_be_bytes(raw);
        let (control, length, address) = ((value >> 96) as u32, (value >> 64) as u32, value as u64);
        let done = self.transfer(control, length, GuestAddress(address));
        let answer = if done { 0 } else { dma::ERROR };
        if let Err(error) = self.ram.write_slice(&answer.to_be_bytes(), descriptor) {
            tracing::debug!(address = descriptor.0, %error, "fw_cfg: DMA answer lost");
        }
    }

    fn transfer(&mut self, control: u32, length: u32, address: GuestAddress) -> bool {
        if control & dma::SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        if control & dma::READ != 0 {
            let data = self.rest();
            let data = data.get(..length as usize).unwrap_or(data);
            let copied = data.len();
            if self.ram.write_slice(data, address).is_err() {
                return false;
            }
            // Behind an item's end there are zeros.
            let fill = u64::from(length) - copied as u64;
            self.offset = self.offset.saturating_add(copied as u32);
            address
                .0
                .checked_add(copied as u64)
                .is_some_and(|at| self.zero_fill(GuestAddress(at), fill))
        } else if control & dma::WRITE != 0 {
            // No item may be written.
            false
        } else {
            if control & dma::SKIP != 0 {
                let end = self.bytes().len() as u32;
                self.offset = self.offset.saturating_add(length).min(end.max(self.offset));
            }
            true
        }
    }

    fn zero_fill(&self, mut at: GuestAddress, mut length: u64) -> bool {
        let zeros = [0; 4096];
        while length > 0 {
            let n = length.min(zeros.len() as u64);
            let part = zeros.get(..n as usize).unwrap_or(&zeros);
            if self.ram.write_slice(part, at).is_err() {
                return false;
            }
            let Some(next) = at.0.checked_add(n) else { return false };
            at = GuestAddress(next);
            length -= n;
        }
        true
    }

    fn write_dma_half(&mut self, offset: u16, data: &[u8]) {
        let mut address = self.dma_address.to_be_bytes();
        let from = usize::from(offset - DMA_HIGH);
        let Some(place) = address.get_mut(from..from + data.len()) else { return };
        place.copy_from_slice(data);
        self.dma_address = u64::from_be_bytes(address);
        if from + data.len() == address.len() {
            self.run_dma();
        }
    }
}

/// Where in the device a port is, whichever of its [`PORTS`] it belongs to.
fn from_selector(base: PioAddress, offset: PioAddressOffset) -> u16 {
    base.0.wrapping_sub(BASE_PORT).wrapping_add(offset)
}

impl MutDevicePio for FwCfg {
    fn pio_read(&mut self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        match from_selector(base, offset) {
            DATA => data.fill_with(|| self.next_byte()),
            DMA_HIGH.. => {
                let from = usize::from(from_selector(base, offset) - DMA_HIGH);
                for (byte, n) in data.iter_mut().zip(from..) {
                    *byte = DMA_SIGNATURE.get(n).copied().unwrap_or(0);
                }
            }
            // The selector cannot be read back.
            _ => data.fill(0),
        }
    }

    fn pio_write(&mut self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let offset = from_selector(base, offset);
        match (offset, data) {
            (SELECTOR, [low, high]) => self.select(u16::from_le_bytes([*low, *high])),
            (SELECTOR, [low]) => self.select((*low).into()),
            // Writing through the data port went away with QEMU 2.4.
            (DATA, _) => {}
            (DMA_HIGH | DMA_LOW, [_, _, _, _]) | (DMA_HIGH, [_, _, _, _, _, _, _, _]) => {
                self.write_dma_half(offset, data);
            }
            _ => {}
        }
    }
}

impl Device for FwCfg {
    fn reset(&mut self) {
        self.select(0);
        self.dma_address = 0;
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

#[cfg(test)]
mod tests;
