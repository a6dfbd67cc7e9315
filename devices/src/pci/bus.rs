//! PCI bus 0: configuration mechanism 1, and the BARs on the machine's I/O buses.
//!
//! Locks are taken in this order: a function's BAR table, the function, the I/O bus.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use serde::{Deserialize, Serialize};
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::{DeviceMmio, DevicePio};

use migration::vmstate::{Audience, FieldError, Form, Migratable, VmState, Word, Words};

use super::{BarKind, BarRange, IntxLines, IntxPin, IntxRouter, PIRQ_LINES, PciFunction};
use crate::bus::IoBus;
use crate::device::Device;

/// CONFIG_ADDRESS (PCI 3.0, 3.2.2.3.2) and the ports up to the end of CONFIG_DATA.
const FIRST_PORT: u16 = 0xcf8;
const PORTS: u16 = 8;
/// Offset of PIIX3's reset control register, in the middle of CONFIG_ADDRESS.
const RESET_CONTROL: u16 = 1;
/// Offset of CONFIG_DATA.
const CONFIG_DATA: u16 = 4;
/// CONFIG_ADDRESS bit 31: accesses to CONFIG_DATA are configuration cycles.
const ENABLE: u32 = 1 << 31;
const SLOTS: u8 = 32;
const FUNCTIONS: u8 = 8;
const BARS: usize = 6;

/// Port 0xcf9, which belongs to the ISA bridge.
pub trait ResetControl: Send + Sync {
    /// A guest's `in`.
    fn read(&self) -> u8;
    /// A guest's `out`.
    fn write(&self, value: u8);
}

/// A function cannot be put where it was asked to be.
#[derive(Debug, thiserror::Error)]
pub enum PciBusError {
    /// There is no such slot or function.
    #[error(
        "PCI address {slot:02x}.{function} does not exist: slots are 0 to 1f, functions 0 to 7"
    )]
    NoSuchAddress {
        /// The slot.
        slot: u8,
        /// The function.
        function: u8,
    },
    /// Another function is there.
    #[error("PCI address {slot:02x}.{function} is taken by {by}: choose another addr=")]
    Taken {
        /// The slot.
        slot: u8,
        /// The function.
        function: u8,
        /// Who is there.
        by: String,
    },
    /// The configuration ports are taken.
    #[error("the PCI configuration ports cannot be claimed")]
    Ports(#[source] crate::bus::BusError),
}

/// Bus 0 of the machine.
pub struct PciBus {
    io: Arc<IoBus>,
    intx: Arc<IntxLines>,
    reset_control: Arc<dyn ResetControl>,
    /// CONFIG_ADDRESS.
    config_address: AtomicU32,
    functions: RwLock<Vec<Arc<Attached>>>,
}

impl PciBus {
    /// An empty bus whose interrupts end at `router`, answering at ports 0xcf8 to 0xcff of `io` for
    /// as long as the caller keeps it.
    pub fn new(
        io: Arc<IoBus>,
        router: Arc<dyn IntxRouter>,
        reset_control: Arc<dyn ResetControl>,
    ) -> Result<Arc<Self>, PciBusError> {
        let bus = Arc::new(Self {
            io: io.clone(),
            intx: IntxLines::new(router),
            reset_control,
            config_address: AtomicU32::new(0),
            functions: RwLock::default(),
        });
        let ports = Arc::new(ConfigPorts(Arc::downgrade(&bus)));
        io.map_pio(FIRST_PORT, PORTS, ports).map_err(PciBusError::Ports)?;
        Ok(bus)
    }

    /// The pin INTA of `slot`, for the function that will be attached there.
    pub fn inta(&self, slot: u8) -> IntxPin {
        self.intx.inta(slot)
    }

    /// Puts `function` at `slot`.`number`.
    pub fn attach(
        &self,
        slot: u8,
        number: u8,
        function: Arc<Mutex<dyn PciFunction>>,
    ) -> Result<(), PciBusError> {
        if slot >= SLOTS || number >= FUNCTIONS {
            return Err(PciBusError::NoSuchAddress { slot, function: number });
        }
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = functions.iter().find(|f| f.address == (slot, number)) {
            let by = lock(&there.function).name().to_owned();
            return Err(PciBusError::Taken { slot, function: number, by });
        }
        functions.push(Arc::new(Attached {
            address: (slot, number),
            windows: std::array::from_fn(|bar| {
                Arc::new(Window { function: Arc::downgrade(&function), bar })
            }),
            function,
            bars: Mutex::default(),
        }));
        Ok(())
    }

    /// Maps every BAR where its register says it is. Done after each configuration write, and to
    /// be done after a function's state was restored.
    pub fn refresh(&self) {
        for attached in self.attached() {
            self.update(&attached);
        }
    }

    fn attached(&self) -> Vec<Arc<Attached>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The function that CONFIG_ADDRESS selects, and the register.
    fn selected(&self, port: u16) -> Option<(Arc<Attached>, usize)> {
        let address = self.config_address.load(Ordering::Relaxed);
        let [register, devfn, bus, _] = address.to_le_bytes();
        if address & ENABLE == 0 || bus != 0 {
            return None;
        }
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        let attached = functions.iter().find(|f| f.address == (devfn >> 3, devfn & 7))?;
        let register = usize::from(register & 0xfc) + usize::from(port & 3);
        Some((attached.clone(), register))
    }

    fn config_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((attached, register)) = self.selected(port) {
            // What would reach beyond the dword goes nowhere.
            let width = data.len().min(4 - usize::from(port & 3));
            if let Some(data) = data.get_mut(..width) {
                lock(&attached.function).config_read(register, data);
            }
        }
    }

    fn config_write(&self, port: u16, data: &[u8]) {
        let Some((attached, register)) = self.selected(port) else { return };
        let width = data.len().min(4 - usize::from(port & 3));
        lock(&attached.function).config_write(register, data.get(..width).unwrap_or_default());
        if self.update(&attached) {
            // Room was made: somebody else may have been waiting for it.
            for other in self.attached() {
                if lock(&other.bars).waiting && !Arc::ptr_eq(&other, &attached) {
                    self.update(&other);
                }
            }
        }
    }

    /// Maps and unmaps one function's BARs as its registers say. True when something was unmapped.
    fn update(&self, attached: &Attached) -> bool {
        let mut bars = lock(&attached.bars);
        let mut function = lock(&attached.function);
        let mut unmapped = false;
        bars.waiting = false;
        let BarTable { mapped, waiting } = &mut *bars;
        for (bar, slot) in mapped.iter_mut().enumerate() {
            let wanted = function.config().bar(bar);
            if *slot == wanted {
                continue;
            }
            if let Some(old) = slot.take() {
                function.bar_mapped(bar, None);
                match old.kind {
                    BarKind::Io => self.io.unmap_pio(port(old.base)),
                    BarKind::Memory32 | BarKind::Memory64 => self.io.unmap_mmio(old.base),
                }
                unmapped = true;
            }
        }
        for (bar, (slot, window)) in mapped.iter_mut().zip(&attached.windows).enumerate() {
            let Some(wanted) = function.config().bar(bar).filter(|_| slot.is_none()) else {
                continue;
            };
            let done = match wanted.kind {
                BarKind::Io => {
                    self.io.map_pio(port(wanted.base), port(wanted.size), window.clone())
                }
                BarKind::Memory32 | BarKind::Memory64 => {
                    self.io.map_mmio(wanted.base, wanted.size, window.clone())
                }
            };
            match done {
                Ok(()) => {
                    *slot = Some(wanted);
                    function.bar_mapped(bar, Some(wanted.base));
                }
                Err(error) => {
                    *waiting = true;
                    let (slot, number) = attached.address;
                    tracing::debug!(
                        "{} at {slot:02x}.{number}: BAR {bar} stays unmapped: {error}",
                        function.name()
                    );
                }
            }
        }
        unmapped
    }
}

/// A port number from a BAR whose range [`super::PciConfig::bar`] has checked.
fn port(value: u64) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A function in its place.
struct Attached {
    address: (u8, u8),
    function: Arc<Mutex<dyn PciFunction>>,
    windows: [Arc<Window>; BARS],
    bars: Mutex<BarTable>,
}

#[derive(Default)]
struct BarTable {
    /// Where each BAR is mapped.
    mapped: [Option<BarRange>; BARS],
    /// A BAR could not be mapped, since somebody else is there.
    waiting: bool,
}

/// What stands on the I/O bus for one BAR.
struct Window {
    function: Weak<Mutex<dyn PciFunction>>,
    bar: usize,
}

impl Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.function.upgrade() {
            Some(function) => lock(&function).bar_read(self.bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(function) = self.function.upgrade() {
            lock(&function).bar_write(self.bar, offset, data);
        }
    }
}

impl DevicePio for Window {
    fn pio_read(&self, _: PioAddress, offset: u16, data: &mut [u8]) {
        self.read(offset.into(), data);
    }
    fn pio_write(&self, _: PioAddress, offset: u16, data: &[u8]) {
        self.write(offset.into(), data);
    }
}

impl DeviceMmio for Window {
    fn mmio_read(&self, _: MmioAddress, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
    }
    fn mmio_write(&self, _: MmioAddress, offset: u64, data: &[u8]) {
        self.write(offset, data);
    }
}

/// What stands on the I/O bus for the configuration ports. It does not keep the bus alive, which
/// keeps the I/O bus alive.
struct ConfigPorts(Weak<PciBus>);

impl DevicePio for ConfigPorts {
    fn pio_read(&self, _: PioAddress, offset: u16, data: &mut [u8]) {
        match self.0.upgrade() {
            Some(bus) => bus.port_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn pio_write(&self, _: PioAddress, offset: u16, data: &[u8]) {
        if let Some(bus) = self.0.upgrade() {
            bus.port_write(offset, data);
        }
    }
}

impl PciBus {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        match (offset, data) {
            (0, data) if data.len() == 4 => {
                let address = self.config_address.load(Ordering::Relaxed);
                data.copy_from_slice(&address.to_le_bytes());
            }
            (RESET_CONTROL, [byte]) => *byte = self.reset_control.read(),
            (CONFIG_DATA.., data) => self.config_read(offset, data),
            (_, data) => data.fill(0xff),
        }
    }

    fn port_write(&self, offset: u16, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                self.config_address.store(u32::from_le_bytes([a, b, c, d]), Ordering::Relaxed);
            }
            (RESET_CONTROL, &[byte]) => self.reset_control.write(byte),
            (CONFIG_DATA.., data) => self.config_write(offset, data),
            _ => {}
        }
    }
}

/// A reset resets every function; a resume maps the BARs of what was restored.
impl Device for Arc<PciBus> {
    fn reset(&mut self) {
        self.config_address.store(0, Ordering::Relaxed);
        for attached in self.attached() {
            lock(&attached.function).reset();
        }
        self.refresh();
    }
    /// Functions pause by themselves; the bus does nothing on its own.
    fn pause(&mut self) {}
    fn resume(&mut self) {
        self.refresh();
    }
}

/// The section `PCIHost`, version 1: CONFIG_ADDRESS.
pub struct PciHost(pub Arc<PciBus>);

/// What `PCIHost` carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciHostState {
    /// CONFIG_ADDRESS.
    pub config_reg: u32,
}

impl VmState for PciHostState {
    const VERSION: u32 = 1;
}

impl Migratable for PciHost {
    type State = PciHostState;
    fn save(&self, _: Audience) -> Result<PciHostState, FieldError> {
        Ok(PciHostState { config_reg: self.0.config_address.load(Ordering::Relaxed) })
    }
    /// Any value is one that a guest may have written.
    fn check(&self, _: &PciHostState) -> Result<(), FieldError> {
        Ok(())
    }
    fn restore(&mut self, state: PciHostState) -> Result<(), FieldError> {
        self.0.config_address.store(state.config_reg, Ordering::Relaxed);
        Ok(())
    }
}

/// The section `PCIBUS`, version 1: how many functions assert each interrupt line.
pub struct PciBusLines(pub Arc<PciBus>);

/// What `PCIBUS` carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciBusState {
    /// How many lines follow: 4.
    pub nirq: u32,
    /// How many functions assert each line.
    pub irq_count: [i32; PIRQ_LINES],
}

/// [`PIRQ_LINES`] as it stands on the wire.
const NIRQ: u32 = 4;

impl VmState for PciBusState {
    const VERSION: u32 = 1;
    const WORDS: Words = Words {
        prefix: "",
        fields: &[&[Word::shown("PCIBUS", "nirq", Form::Type("int32 equal"))]],
    };
}

impl Migratable for PciBusLines {
    type State = PciBusState;
    fn save(&self, _: Audience) -> Result<PciBusState, FieldError> {
        Ok(PciBusState { nirq: NIRQ, irq_count: self.0.intx.counts().map(i32::from) })
    }
    fn check(&self, state: &PciBusState) -> Result<(), FieldError> {
        if state.nirq != NIRQ {
            return Err(FieldError::new("nirq", NIRQ, state.nirq));
        }
        let pins = i32::from(SLOTS) * i32::from(FUNCTIONS);
        match state.irq_count.iter().enumerate().find(|(_, n)| !(0..=pins).contains(*n)) {
            Some((line, count)) => Err(FieldError::new(
                format!("irq_count[{line}]"),
                format_args!("0 to {pins}"),
                count,
            )),
            None => Ok(()),
        }
    }
    /// The counts follow from the functions' own sections, which say whether each asserts its pin.
    fn restore(&mut self, _: PciBusState) -> Result<(), FieldError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{PciConfig, PciIdentity};

    #[derive(Default)]
    struct Bridge {
        reset: Mutex<Vec<u8>>,
    }

    impl IntxRouter for Bridge {
        fn set_pirq(&self, _: usize, _: bool) {}
    }

    impl ResetControl for Bridge {
        fn read(&self) -> u8 {
            0x5c
        }
        fn write(&self, value: u8) {
            self.reset.lock().unwrap().push(value);
        }
    }

    struct Function {
        config: PciConfig,
        mapped: Vec<(usize, Option<u64>)>,
        written: Vec<(usize, u64, Vec<u8>)>,
    }

    impl PciFunction for Function {
        fn name(&self) -> &str {
            "test"
        }
        fn config(&self) -> &PciConfig {
            &self.config
        }
        fn config_write(&mut self, offset: usize, data: &[u8]) {
            self.config.write(offset, data);
        }
        fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(bar).unwrap() * 16 + u8::try_from(offset).unwrap());
        }
        fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
            self.written.push((bar, offset, data.to_vec()));
        }
        fn bar_mapped(&mut self, bar: usize, base: Option<u64>) {
            self.mapped.push((bar, base));
        }
        fn reset(&mut self) {
            self.config.reset();
        }
    }

    fn function() -> Arc<Mutex<Function>> {
        let mut config = PciConfig::new(PciIdentity {
            id: (0x1234, 0x5678),
            revision: 0,
            class: 0xff00,
            prog_if: 0,
            subsystem: (0, 0),
        });
        config.add_bar(0, BarKind::Io, 16);
        config.add_bar(4, BarKind::Memory64, 0x4000);
        Arc::new(Mutex::new(Function { config, mapped: vec![], written: vec![] }))
    }

    fn board() -> (Arc<IoBus>, Arc<PciBus>, Arc<Bridge>) {
        let (io, bridge) = (Arc::new(IoBus::new()), Arc::new(Bridge::default()));
        let bus = PciBus::new(io.clone(), bridge.clone(), bridge.clone()).unwrap();
        (io, bus, bridge)
    }

    fn write(io: &IoBus, slot: u8, register: u8, value: u32) {
        let address = ENABLE | u32::from(slot) << 11 | u32::from(register);
        io.pio_write(0xcf8, &address.to_le_bytes());
        io.pio_write(0xcfc, &value.to_le_bytes());
    }

    fn read(io: &IoBus, address: u32, port: u16, data: &mut [u8]) {
        io.pio_write(0xcf8, &address.to_le_bytes());
        io.pio_read(port, data);
    }

    #[test]
    fn mechanism_one_finds_functions() {
        let (io, bus, bridge) = board();
        bus.attach(3, 0, function()).unwrap();
        let mut dword = [0; 4];
        read(&io, 0x8000_1800, 0xcfc, &mut dword);
        assert_eq!(u32::from_le_bytes(dword), 0x5678_1234);
        let mut word = [0; 2];
        read(&io, 0x8000_1800, 0xcfe, &mut word);
        assert_eq!(u16::from_le_bytes(word), 0x5678);
        // What reaches beyond the dword, other slots, functions and buses, a closed window.
        read(&io, 0x8000_1800, 0xcff, &mut dword);
        assert_eq!(dword, [0x56, 0xff, 0xff, 0xff]);
        for address in [0x8000_2000, 0x8000_1900, 0x8001_1800, 0x0000_1800] {
            read(&io, address, 0xcfc, &mut dword);
            assert_eq!(dword, [0xff; 4], "{address:#x}");
        }
        io.pio_read(0xcf8, &mut dword);
        assert_eq!(u32::from_le_bytes(dword), 0x1800);
        // Port 0xcf9 is not CONFIG_ADDRESS.
        io.pio_write(0xcf9, &[6]);
        let mut byte = [0];
        io.pio_read(0xcf9, &mut byte);
        assert_eq!((byte, bridge.reset.lock().unwrap().as_slice()), ([0x5c], &[6][..]));
        io.pio_read(0xcf8, &mut dword);
        assert_eq!(u32::from_le_bytes(dword), 0x1800);
    }

    #[test]
    fn bars_follow_their_registers() {
        let (io, bus, _) = board();
        let f = function();
        bus.attach(2, 0, f.clone()).unwrap();
        write(&io, 2, 0x10, 0xc000);
        write(&io, 2, 0x20, 0xfe00_0000);
        assert!(f.lock().unwrap().mapped.is_empty());
        write(&io, 2, 4, 3);
        let mut byte = [0];
        io.pio_read(0xc003, &mut byte);
        assert_eq!(byte, [3]);
        io.mmio_read(0xfe00_0005, &mut byte);
        assert_eq!(byte, [0x45]);
        io.mmio_write(0xfe00_3000, &[1, 2]);
        assert_eq!(f.lock().unwrap().written, [(4, 0x3000, vec![1, 2])]);
        write(&io, 2, 0x10, 0xc100);
        io.pio_read(0xc003, &mut byte);
        assert_eq!(byte, [0xff]);
        write(&io, 2, 4, 1);
        io.mmio_read(0xfe00_0005, &mut byte);
        assert_eq!(byte, [0xff]);
        assert_eq!(
            f.lock().unwrap().mapped,
            [(0, Some(0xc000)), (4, Some(0xfe00_0000)), (0, None), (0, Some(0xc100)), (4, None)]
        );
        Device::reset(&mut bus.clone());
        io.pio_read(0xc103, &mut byte);
        assert_eq!(byte, [0xff]);
    }

    #[test]
    fn a_bar_in_the_way_of_another_waits_for_its_place() {
        let (io, bus, _) = board();
        let (a, b) = (function(), function());
        bus.attach(2, 0, a.clone()).unwrap();
        bus.attach(3, 0, b.clone()).unwrap();
        for slot in [2, 3] {
            write(&io, slot, 0x10, 0xc000);
            write(&io, slot, 4, 1);
        }
        assert!(b.lock().unwrap().mapped.is_empty());
        // Over the configuration ports: refused too.
        write(&io, 3, 0x10, 0xcf0);
        assert!(b.lock().unwrap().mapped.is_empty());
        write(&io, 3, 0x10, 0xc000);
        write(&io, 2, 0x10, 0xd000);
        assert_eq!(b.lock().unwrap().mapped, [(0, Some(0xc000))]);
    }

    #[test]
    fn a_restored_function_is_mapped_when_the_machine_resumes() {
        let (io, mut bus, _) = board();
        let f = function();
        bus.attach(2, 0, f.clone()).unwrap();
        let mut source = f.lock().unwrap().config.clone();
        source.write(0x10, &0xc000_u32.to_le_bytes());
        source.write(4, &[1]);
        f.lock().unwrap().config.restore(&source.save(false));
        bus.resume();
        let mut byte = [0];
        io.pio_read(0xc007, &mut byte);
        assert_eq!(byte, [7]);
    }

    #[test]
    fn an_address_is_given_once() {
        let (_, bus, _) = board();
        bus.attach(2, 0, function()).unwrap();
        let error = bus.attach(2, 0, function()).unwrap_err();
        assert!(error.to_string().contains("02.0 is taken by test"), "{error}");
        assert!(matches!(bus.attach(32, 0, function()), Err(PciBusError::NoSuchAddress { .. })));
    }

    #[test]
    fn sections_carry_the_latch_and_the_counts() {
        let (io, bus, _) = board();
        let mut pin = bus.inta(2);
        pin.set(true);
        io.pio_write(0xcf8, &0x8000_3098_u32.to_le_bytes());
        let (mut host, mut lines) = (PciHost(bus.clone()), PciBusLines(bus));
        let saved = host.save(Audience::Qemu).unwrap();
        assert_eq!(saved.config_reg, 0x8000_3098);
        let counts = lines.save(Audience::Qemu).unwrap();
        assert_eq!(counts, PciBusState { nirq: 4, irq_count: [0, 1, 0, 0] });
        io.pio_write(0xcf8, &[0; 4]);
        host.restore(saved).unwrap();
        assert_eq!(host.save(Audience::Qemu).unwrap(), saved);
        lines.check(&counts).unwrap();
        lines.restore(counts).unwrap();
        assert_eq!(lines.check(&PciBusState { nirq: 5, ..counts }).unwrap_err().field, "nirq");
        let negative = PciBusState { irq_count: [0, 0, -1, 0], ..counts };
        assert_eq!(lines.check(&negative).unwrap_err().field, "irq_count[2]");
    }
}
