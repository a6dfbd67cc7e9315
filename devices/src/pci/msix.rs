//! MSI-X (PCI 3.0, 6.8.2): the vector table, the pending bits, and the kernel's routes.
//!
//! A vector's route in the kernel follows its table entry; whether it may fire follows its mask,
//! the function's mask and the enable bit. A notice to a masked vector stays pending, and goes out
//! when the last mask is lifted.

use std::io;

use migration::vmstate::FieldError;

use crate::irq::{MsiController, MsiMessage, MsiVector};

/// What there is to know about the capability besides its body.
pub mod msix_capability {
    /// Its id.
    pub const ID: u8 = 0x11;
    /// The bits that a guest may write in the high byte of message control.
    pub const CONTROL_WRITABLE: u8 = 0xc0;
}
/// Where the pending bits begin in the BAR; the table begins at 0.
pub const PBA_OFFSET: u64 = 0x800;
/// Message control: the function is masked as a whole.
const CONTROL_MASK: u16 = 1 << 14;
/// Message control: MSI-X is on, INTx is off.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Vector control: this vector is masked.
const ENTRY_MASK: u8 = 1;
/// Bytes of a table entry: address (8), data (4), vector control (4).
const ENTRY: usize = 16;
/// How many vectors fit in front of the pending bits.
const MAX_VECTORS: u16 = 0x800 / 16;

/// The MSI-X side of one function.
pub struct Msix {
    vectors: Vec<Vector>,
    enabled: bool,
    masked: bool,
}

struct Vector {
    entry: [u8; ENTRY],
    pending: bool,
    route: Box<dyn MsiVector>,
    /// What the route was last set to.
    routed: Option<MsiMessage>,
}

impl Vector {
    fn is_masked(&self) -> bool {
        self.entry[12] & ENTRY_MASK != 0
    }

    fn message(&self) -> MsiMessage {
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = self.entry;
        MsiMessage {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        }
    }

    /// Brings the route into line with the entry, and sends what was waiting.
    fn update(&mut self, live: bool) {
        let live = live && !self.is_masked();
        if !live {
            return;
        }
        let message = self.message();
        if self.routed != Some(message) {
            self.route.set_message(message);
            self.routed = Some(message);
        }
        if self.pending {
            match self.route.trigger() {
                Ok(()) => self.pending = false,
                Err(error) => {
                    tracing::error!("an MSI-X vector's {message:x?} cannot be sent: {error}");
                }
            }
        }
    }
}

impl Msix {
    /// `vectors` vectors, at most 128, all masked.
    pub fn new(vectors: u16, controller: &dyn MsiController) -> io::Result<Self> {
        let vectors = (0..vectors.min(MAX_VECTORS))
            .map(|_| {
                let mut entry = [0; ENTRY];
                entry[12] = ENTRY_MASK;
                let route = controller.allocate()?;
                Ok(Vector { entry, pending: false, route, routed: None })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { vectors, enabled: false, masked: false })
    }

    /// The capability behind id and next pointer, for a table and pending bits in BAR `bar`.
    pub fn capability(&self, bar: u8) -> [u8; 10] {
        let [low, high] = self.len().saturating_sub(1).to_le_bytes();
        let [.., p1, p0] = PBA_OFFSET.to_be_bytes();
        [low, high, bar, 0, 0, 0, p0 | bar, p1, 0, 0]
    }

    /// How many vectors there are.
    pub fn len(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(MAX_VECTORS)
    }

    /// Whether there is no vector at all.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Whether interrupts go out as messages, and not by INTx.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The message control register of the capability has this value now.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.masked = control & CONTROL_MASK != 0;
        self.update_all();
    }

    fn update_all(&mut self) {
        let live = self.enabled && !self.masked;
        for vector in &mut self.vectors {
            vector.update(live);
        }
    }

    /// Sends the message of `vector`, or notes that it is pending. A vector that is not there
    /// (such as 0xffff, "none") sends nothing.
    pub fn notify(&mut self, vector: u16) {
        let live = self.enabled && !self.masked;
        let Some(vector) = self.vectors.get_mut(usize::from(vector)) else { return };
        vector.pending = true;
        vector.update(live);
    }

    /// A guest's read of the BAR.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (0..).zip(data) {
            *byte = self.byte(offset.saturating_add(at));
        }
    }

    fn byte(&self, at: u64) -> u8 {
        let Ok(index) = usize::try_from(at) else { return 0 };
        if at < PBA_OFFSET {
            let entry = self.vectors.get(index / ENTRY).map(|vector| &vector.entry);
            return entry.and_then(|entry| entry.get(index % ENTRY)).copied().unwrap_or(0);
        }
        let first = at.saturating_sub(PBA_OFFSET).saturating_mul(8);
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        self.vectors
            .get(first..)
            .unwrap_or_default()
            .iter()
            .take(8)
            .enumerate()
            .fold(0, |bits, (bit, vector)| bits | u8::from(vector.pending) << bit)
    }

    /// A guest's write to the BAR. Pending bits are not writable.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let live = self.enabled && !self.masked;
        for (at, value) in (offset..PBA_OFFSET).zip(data) {
            let Ok(index) = usize::try_from(at) else { return };
            if let Some(vector) = self.vectors.get_mut(index / ENTRY) {
                vector.entry[index % ENTRY] = *value;
            }
        }
        // Only when the write is whole, so that no half-written message is routed.
        let Ok(first) = usize::try_from(offset) else { return };
        let last = first.saturating_add(data.len().saturating_sub(1));
        for index in first / ENTRY..=last / ENTRY {
            if let Some(vector) = self.vectors.get_mut(index) {
                vector.update(live);
            }
        }
    }

    /// Back to all masked, none pending, off.
    pub fn reset(&mut self) {
        self.enabled = false;
        self.masked = false;
        for vector in &mut self.vectors {
            vector.entry = [0; ENTRY];
            vector.entry[12] = ENTRY_MASK;
            vector.pending = false;
        }
    }

    /// The table and the pending bits, as they are in the BAR.
    pub fn save(&self) -> (Vec<u8>, Vec<u8>) {
        let table = self.vectors.iter().flat_map(|vector| vector.entry).collect();
        let mut pba = vec![0; self.vectors.len().div_ceil(8)];
        self.read(PBA_OFFSET, &mut pba);
        (table, pba)
    }

    /// Checks that a table and pending bits are those of a function with as many vectors.
    pub fn check(&self, table: &[u8], pba: &[u8]) -> Result<(), FieldError> {
        let (rows, bits) = (self.vectors.len() * ENTRY, self.vectors.len().div_ceil(8));
        if table.len() != rows {
            return Err(FieldError::new("msix.table", format_args!("{rows} bytes"), table.len()));
        }
        if pba.len() != bits {
            return Err(FieldError::new("msix.pba", format_args!("{bits} bytes"), pba.len()));
        }
        Ok(())
    }

    /// Takes what [`save`](Self::save) gave; `control` is the restored message control register.
    /// What is pending and not masked goes out at once.
    pub fn restore(&mut self, table: &[u8], pba: &[u8], control: u16) {
        for (index, (vector, entry)) in
            self.vectors.iter_mut().zip(table.chunks_exact(ENTRY)).enumerate()
        {
            vector.entry.copy_from_slice(entry);
            let bits = pba.get(index / 8).copied().unwrap_or(0);
            vector.pending = bits & 1 << (index % 8) != 0;
        }
        self.set_control(control);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::FakeMsi;

    fn program(msix: &mut Msix, vector: u64, address: u64, data: u32) {
        msix.write(vector * 16, &address.to_le_bytes());
        msix.write(vector * 16 + 8, &data.to_le_bytes());
    }

    fn unmask(msix: &mut Msix, vector: u64, unmasked: bool) {
        msix.write(vector * 16 + 12, &u32::from(!unmasked).to_le_bytes());
    }

    #[test]
    fn a_masked_vector_waits_and_then_fires_once() {
        let controller = FakeMsi::default();
        let mut msix = Msix::new(10, &controller).unwrap();
        program(&mut msix, 9, 0xfee0_1000, 0x41);
        msix.notify(9);
        assert!(controller.sent().is_empty(), "switched off");
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        unmask(&mut msix, 9, true);
        assert!(controller.sent().is_empty(), "the function is masked");
        let mut pba = [0; 2];
        msix.read(PBA_OFFSET, &mut pba);
        assert_eq!(pba, [0, 2]);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(controller.sent(), [(9, MsiMessage { address: 0xfee0_1000, data: 0x41 })]);
        msix.read(PBA_OFFSET, &mut pba);
        assert_eq!(pba, [0, 0]);
        unmask(&mut msix, 9, false);
        msix.notify(9);
        msix.notify(9);
        assert_eq!(controller.sent().len(), 1);
        unmask(&mut msix, 9, true);
        assert_eq!(controller.sent().len(), 2);
        msix.notify(0xffff);
        msix.notify(10);
        assert_eq!(controller.sent().len(), 2);
    }

    #[test]
    fn a_vector_follows_its_entry() {
        let controller = FakeMsi::default();
        let mut msix = Msix::new(2, &controller).unwrap();
        msix.set_control(CONTROL_ENABLE);
        for (address, data) in [(0xfee0_0000, 1), (0xfee0_0000, 2), (0xfee0_2000, 2)] {
            unmask(&mut msix, 1, false);
            program(&mut msix, 1, address, data);
            unmask(&mut msix, 1, true);
            msix.notify(1);
            assert_eq!(controller.sent().last(), Some(&(1, MsiMessage { address, data })));
        }
        let mut entry = [0; 16];
        msix.read(16, &mut entry);
        assert_eq!(entry, [0, 0x20, 0xe0, 0xfe, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn accesses_outside_of_the_table_do_nothing() {
        let controller = FakeMsi::default();
        let mut msix = Msix::new(2, &controller).unwrap();
        msix.write(PBA_OFFSET, &[0xff; 8]);
        msix.write(PBA_OFFSET - 4, &[0xff; 8]);
        msix.write(u64::MAX - 3, &[0xff; 4]);
        let mut data = [0xaa; 8];
        for offset in [PBA_OFFSET - 4, PBA_OFFSET, 0xffc, u64::MAX - 7] {
            msix.read(offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
    }

    #[test]
    fn a_restored_table_fires_what_was_pending() {
        let controller = FakeMsi::default();
        let mut source = Msix::new(3, &controller).unwrap();
        for vector in 0..3_u32 {
            program(&mut source, vector.into(), 0xfee0_0000, 0x30 + vector);
        }
        unmask(&mut source, 2, true);
        source.notify(1);
        source.notify(2);
        let (table, pba) = source.save();
        assert_eq!((table.len(), pba.as_slice()), (48, &[6][..]));

        let controller = FakeMsi::default();
        let mut destination = Msix::new(3, &controller).unwrap();
        destination.check(&table, &pba).unwrap();
        destination.restore(&table, &pba, CONTROL_ENABLE | 2);
        assert_eq!(controller.sent(), [(2, MsiMessage { address: 0xfee0_0000, data: 0x32 })]);
        assert_eq!(destination.save(), (table.clone(), vec![2]));
        assert_eq!(destination.check(&table[1..], &pba).unwrap_err().field, "msix.table");
        assert_eq!(destination.check(&table, &[]).unwrap_err().field, "msix.pba");
    }

    #[test]
    fn the_capability_is_the_boards() {
        let msix = Msix::new(4, &FakeMsi::default()).unwrap();
        assert_eq!(msix.capability(1), [3, 0, 1, 0, 0, 0, 1, 8, 0, 0]);
    }
}
