//! The board `pc-i440fx-7.2`: which device is where, on which interrupt, and in which order their
//! states travel. This is the only file that knows all devices by name.

use std::sync::{Arc, Mutex};

use devices::bus::{BusError, IoBus};
use devices::chipset::holders::{AcpiBuildState, Holder, I2cBusState, TprOptState};
use devices::chipset::i440fx::{I440fx, PamAccess, PamHook};
use devices::chipset::ide::{self, Ide};
use devices::chipset::piix3::{Piix3, ResetRegister};
use devices::chipset::piix4_pm::{Piix4Pm, PmSection};
use devices::chipset::pirq::PirqRouter;
use devices::device::{Device, PowerControl};
use devices::irq::{IoEvents, IrqLine, MsiController};
use devices::isa::debugcon::{self, DebugConsole};
use devices::isa::dma::{Dma, Which};
use devices::isa::fdc::Fdc;
use devices::isa::fw_cfg::{self, AcpiSizes, FileError, FwCfg};
use devices::isa::i8042::I8042;
use devices::isa::pcspk::PcSpeaker;
use devices::isa::port92::Port92;
use devices::isa::post::SinkPort;
use devices::isa::ps2::{Keyboard, Mouse};
use devices::isa::rtc::{CmosConfig, Rtc};
use devices::isa::serial::SerialPort;
use devices::pci::{PciBus, PciBusError, PciBusLines, PciHost};
use devices::timer::Timed;
use devices::virtio::{
    BackendError, Balloon, BalloonControl, Block, BlockOptions, CacheMode, Console, ConsoleLine,
    DiskImage, Generation, Net, NetBackend, NetOptions, Rng, StreamAddress, StreamSocket, Tap,
    Trouble, VirtioDevice, VirtioError, VirtioEvents, VirtioPci, VirtioSection, Wiring,
};
use migration::vmstate::{Migratable, Section, SectionId, SectionOf};

use crate::announce::{Announcer, Rounds};
use crate::balloon::GuestBalloon;
use crate::chardev::{CharError, CharService, Chardev};
use crate::clock::VirtualClock;
use crate::config::{self, Config, DiskCache, SocketUri, VirtioVersion};
use crate::event_loop::EventLoop;
use crate::kvm::KvmRouting;
use crate::memory::Ram;
use crate::migrate::DeviceDetails;
use crate::power::MachineEvents;
use crate::timers::TimerBell;

/// First port and number of ports of the two DMA controllers and their page registers.
const DMA1_PORTS: [(u16, u16); 3] = [(0x00, 16), (0x81, 3), (0x87, 1)];
const DMA2_PORTS: [(u16, u16); 3] = [(0xc0, 32), (0x89, 3), (0x8f, 1)];

/// Everything that devices are built from.
pub struct BoardParts<'a> {
    /// What the machine shall have.
    pub config: &'a Config,
    /// Guest memory.
    pub ram: &'a Ram,
    /// Ports and device memory.
    pub bus: &'a Arc<IoBus>,
    /// Time.
    pub clock: &'a Arc<VirtualClock>,
    /// Rung when a deadline moves.
    pub bell: &'a Arc<TimerBell>,
    /// Interrupt lines.
    pub routing: &'a Arc<KvmRouting>,
    /// Message-signalled interrupts.
    pub msi: Arc<dyn MsiController>,
    /// Doorbells.
    pub doorbells: Arc<dyn IoEvents>,
    /// What guests ask of the machine.
    pub events: &'a MachineEvents,
    /// The I/O thread.
    pub io: &'a mut EventLoop,
}

/// A device could not be built or put where it belongs.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// Two devices want the same ports.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A PCI slot.
    #[error(transparent)]
    Pci(#[from] PciBusError),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// The host side of a virtio device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A serial line or console.
    #[error(transparent)]
    Char(#[from] CharError),
    /// The host has no more descriptors.
    #[error("cannot make an eventfd")]
    EventFd(#[source] std::io::Error),
}

type MakeSection = Box<dyn Fn() -> Box<dyn Section> + Send + Sync>;

/// A network device's number (virtio 1.2, 5).
const VIRTIO_NET: u16 = 1;

/// A virtio function and where it is.
struct VirtioSlot {
    slot: u8,
    version: VirtioVersion,
    function: Arc<Mutex<VirtioPci>>,
}

/// The devices of a machine.
#[derive(Default)]
pub struct Board {
    /// All that have a life, in the order of the bus.
    pub devices: Vec<Arc<Mutex<dyn Device>>>,
    /// Those that have deadlines.
    pub timed: Vec<Arc<Mutex<dyn Timed>>>,
    /// The disks' images.
    pub images: Vec<DiskImage>,
    /// Where a terminal can attach to the serial port.
    pub serial_path: Option<std::path::PathBuf>,
    /// The same for the virtio console.
    pub console_path: Option<std::path::PathBuf>,
    /// The guest's memory balloon.
    pub balloon: Option<GuestBalloon>,
    pm: Option<Arc<Mutex<Piix4Pm>>>,
    pci: Option<Arc<PciBus>>,
    fw_cfg: Option<Arc<Mutex<FwCfg>>>,
    host_bridge: Option<Arc<Mutex<I440fx>>>,
    virtio: Vec<VirtioSlot>,
    announcer: Option<Arc<Mutex<Announcer>>>,
    sections: Vec<MakeSection>,
}

impl Board {
    /// Builds and wires all devices.
    pub fn build(mut parts: BoardParts<'_>) -> Result<Self, BoardError> {
        let mut board = Self::default();
        let p = &mut parts;
        let power: Arc<dyn PowerControl> = Arc::new(p.events.clone());
        let line = |irq: u32| -> Arc<dyn IrqLine> { p.routing.line(irq) };

        let cpus = u16::try_from(p.config.smp).unwrap_or(u16::MAX);
        board.device("kvm-tpr-opt", 0, Holder::<TprOptState>::new());
        let uuid = *p.config.uuid.as_bytes();
        let device = FwCfg::new(p.ram.guest().clone(), uuid, p.ram.size(), cpus, cpus);
        let device = board.device("fw_cfg", 0, device);
        board.fw_cfg = Some(device.clone());
        for (base, len) in fw_cfg::PORTS {
            p.bus.map_pio(base, len, device.clone())?;
        }

        let router = PirqRouter::new(std::array::from_fn(|irq| line(irq as u32)));
        let reset_register = ResetRegister::new(power.clone());
        let pci = PciBus::new(p.bus.clone(), router.clone(), reset_register.clone())?;
        board.devices.push(Arc::new(Mutex::new(pci.clone())));
        board.state("PCIHost", 0, Arc::new(Mutex::new(PciHost(pci.clone()))));
        board.state("PCIBUS", 0, Arc::new(Mutex::new(PciBusLines(pci.clone()))));
        let host = board.device("0000:00:00.0/I440FX", 0, I440fx::new());
        board.host_bridge = Some(host.clone());
        pci.attach(0, 0, host)?;

        for (instance, which, ports) in
            [(0, Which::First, DMA1_PORTS), (1, Which::Second, DMA2_PORTS)]
        {
            let dma = board.device("dma", instance, Dma::new(which));
            for (base, len) in ports {
                p.bus.map_pio(base, len, dma.clone())?;
            }
        }

        let piix3 = Piix3::new(router, reset_register);
        let piix3 = board.device("0000:00:01.0/PIIX3", 0, piix3);
        pci.attach(1, 0, piix3)?;

        let low = arch::layout::low_ram_size(p.ram.size());
        let cmos =
            CmosConfig { ram_below_4g: low, ram_above_4g: p.ram.size() - low, cpus: p.config.smp };
        let rtc = Rtc::new(cmos, line(8), p.clock.clone(), p.bell.clone());
        let rtc = board.device("mc146818rtc", 0, rtc);
        board.timed.push(rtc.clone());
        p.bus.map_pio(0x70, 2, rtc)?;

        board.device("pcspk", 0, PcSpeaker::new());

        let chardev = Chardev::open(&p.config.serial)?;
        board.serial_path = chardev.path();
        let serial = SerialPort::new(arch::layout::port::COM1, line(4), chardev.writer());
        let serial = board.device("serial", 0, serial);
        let (service, room) =
            CharService::new(chardev, serial.clone()).map_err(BoardError::EventFd)?;
        lock(&serial).on_room(Box::new(move || {
            let _ = room.write(1);
        }));
        p.io.add(Arc::new(Mutex::new(service)));
        p.bus.map_pio(arch::layout::port::COM1, 8, serial)?;

        board.device("fdc", 0, Fdc::new());
        let keyboard = board.device("ps2kbd", 0, Keyboard::new());
        let mouse = board.device("ps2mouse", 0, Mouse::new());
        let i8042 = I8042::new(keyboard, mouse, line(1), line(12), power.clone());
        let i8042 = board.device("pckbd", 0, i8042);
        p.bus.map_pio(0x60, 1, i8042.clone())?;
        p.bus.map_pio(0x64, 1, i8042)?;
        let port92 = board.device("port92", 0, Port92::new(power.clone()));
        p.bus.map_pio(0x92, 1, port92)?;
        let ide = board.device("0000:00:01.1/ide", 0, Ide::new());
        for (base, len) in ide::PORTS {
            p.bus.map_pio(base, len, ide.clone())?;
        }
        pci.attach(1, 1, ide)?;
        board.device("i2c_bus", 0, Holder::<I2cBusState>::new());
        let pm = Piix4Pm::new(
            p.config.smp,
            p.bus.clone(),
            line(9),
            p.clock.clone(),
            p.bell.clone(),
            power,
        )?;
        board.devices.push(pm.clone());
        board.timed.push(pm.clone());
        let (state, cpus) = (pm.clone(), p.config.smp);
        board.sections.push(Box::new(move || {
            let id = SectionId::new("0000:00:01.3/piix4_pm", 0);
            Box::new(PmSection::new(id, state.clone(), cpus))
        }));
        pci.attach(1, 3, pm.clone())?;
        board.pm = Some(pm);
        board.virtio_devices(p, &pci)?;
        board.device("acpi_build", 0, Holder::<AcpiBuildState>::new());
        board.pci = Some(pci);
        // Only for those who listen: each character is an exit.
        if tracing::enabled!(tracing::Level::DEBUG) {
            p.bus.map_pio(debugcon::PORT, 1, Arc::new(Mutex::new(DebugConsole::default())))?;
        }
        for port in [0x80, 0xf0] {
            p.bus.map_pio(port, 1, Arc::new(Mutex::new(SinkPort)))?;
        }
        Ok(board)
    }

    /// The devices that the configuration asks for, in the order of their slots.
    fn virtio_devices(
        &mut self,
        p: &mut BoardParts<'_>,
        pci: &Arc<PciBus>,
    ) -> Result<(), BoardError> {
        let mut wanted: Vec<(u8, VirtioVersion, Box<dyn VirtioDevice>)> = Vec::new();
        for disk in &p.config.disk {
            let image = DiskImage {
                path: disk.path.clone(),
                readonly: disk.readonly,
                cache: match disk.cache {
                    DiskCache::Writeback => CacheMode::Writeback,
                    DiskCache::None => CacheMode::Direct,
                },
            };
            self.images.push(image.clone());
            let block = Block::new(BlockOptions {
                image,
                id: disk.id.to_string(),
                // QEMU's drives have no serial number unless they are given one.
                serial: String::new(),
                queues: disk.queues,
            })?;
            wanted.push((disk.addr.number(), disk.virtio, Box::new(block)));
        }
        for net in &p.config.net {
            let backend: Box<dyn NetBackend> = match &net.backend {
                config::NetBackend::Tap(name) => Box::new(Tap::new(name.clone())),
                config::NetBackend::Stream(uri) => Box::new(StreamSocket::new(match uri {
                    SocketUri::Tcp { host, port } => StreamAddress::Tcp(host.clone(), *port),
                    SocketUri::Unix(path) => StreamAddress::Unix(path.clone()),
                })),
            };
            let options = NetOptions { id: net.id.to_string(), mac: net.mac.0, backend };
            wanted.push((net.addr.number(), net.virtio, Box::new(Net::new(options)?)));
        }
        if let Some(rng) = &p.config.rng {
            wanted.push((rng.addr.number(), rng.virtio, Box::new(Rng::new(rng.id.to_string()))));
        }
        let mut console = None;
        if let Some(config) = &p.config.console {
            let chardev = Chardev::open(&config.backend)?;
            self.console_path = chardev.path();
            let device = Console::new(config.id.to_string(), chardev.writer());
            wanted.push((config.addr.number(), config.virtio, Box::new(device)));
            console = Some((config.addr.number(), chardev));
        }
        if let Some(balloon) = &p.config.balloon {
            let device = Balloon::new(balloon.id.to_string(), Box::new(p.ram.clone()));
            wanted.push((balloon.addr.number(), balloon.virtio, Box::new(device)));
        }
        wanted.sort_by_key(|(slot, _, _)| *slot);
        for (slot, version, device) in wanted {
            let wiring = Wiring {
                ram: p.ram.guest().clone(),
                msi: p.msi.clone(),
                io_events: p.doorbells.clone(),
                pin: pci.inta(slot),
                slot,
                generation: match version {
                    VirtioVersion::Transitional => Generation::Transitional,
                    VirtioVersion::Modern => Generation::Modern,
                    VirtioVersion::Legacy => Generation::Legacy,
                },
            };
            let function = Arc::new(Mutex::new(VirtioPci::new(device, wiring)?));
            pci.attach(slot, 0, function.clone())?;
            p.io.add(Arc::new(Mutex::new(VirtioEvents(function.clone()))));
            self.devices.push(function.clone());
            let (state, bus) = (function.clone(), pci.clone());
            self.sections
                .push(Box::new(move || Box::new(VirtioSection::new(state.clone(), bus.clone()))));
            let its_line = console.take_if(|(its_slot, _)| *its_slot == slot);
            if let Some(((_, chardev), line)) = its_line.zip(ConsoleLine::new(function.clone())) {
                let frontend = Arc::new(Mutex::new(line.clone()));
                let (service, room) =
                    CharService::new(chardev, frontend).map_err(BoardError::EventFd)?;
                line.on_room(Box::new(move || {
                    let _ = room.write(1);
                }));
                p.io.add(Arc::new(Mutex::new(service)));
            }
            if let Some(control) = BalloonControl::new(function.clone()) {
                let (clock, bell) = (p.clock.clone(), p.bell.clone());
                let balloon = GuestBalloon::new(control, p.ram.size(), clock, bell);
                self.timed.push(balloon.timed());
                self.balloon = Some(balloon);
            }
            self.virtio.push(VirtioSlot { slot, version, function });
        }
        let interface = |net: &config::NetConfig| {
            let at = net.addr.number();
            let there = self.virtio.iter().find(|there| there.slot == at)?;
            Some((net.id.to_string(), there.function.clone()))
        };
        let interfaces = p.config.net.iter().filter_map(interface).collect();
        let announcer = Announcer::new(interfaces, p.clock.clone(), p.bell.clone());
        let announcer = Arc::new(Mutex::new(announcer));
        self.timed.push(announcer.clone());
        self.announcer = Some(announcer);
        Ok(())
    }

    /// Takes a device in: it lives with the machine, and its state travels as section `name`.
    fn device<D>(&mut self, name: &str, instance: u32, device: D) -> Arc<Mutex<D>>
    where
        D: Device + Migratable + 'static,
    {
        let device = Arc::new(Mutex::new(device));
        self.devices.push(device.clone());
        self.state(name, instance, device.clone());
        device
    }

    /// Lets a device's state travel as section `name`.
    fn state<D>(&mut self, name: &str, instance: u32, device: Arc<Mutex<D>>)
    where
        D: Migratable + Send + 'static,
    {
        let id = SectionId::new(name, instance);
        self.sections.push(Box::new(move || Box::new(SectionOf::new(id.clone(), device.clone()))));
    }

    /// Presses the power button on behalf of the host.
    pub fn press_power_button(&self) {
        if let Some(pm) = &self.pm {
            lock(pm).power_button();
        }
    }

    /// Opens the host sides of all devices for use by this machine, disks with their locks. When
    /// one can't be opened, all are closed again.
    pub fn open_backends(&self) -> Result<(), BackendError> {
        self.open_all(false)
    }

    /// The same for a guest that goes on here: an interface that is not there any more is said, and
    /// done without, as the guest may have done before.
    pub fn reopen_backends(&self) -> Result<(), BackendError> {
        self.open_all(true)
    }

    fn open_all(&self, without_lost_networks: bool) -> Result<(), BackendError> {
        for VirtioSlot { function, .. } in &self.virtio {
            // Not in the condition: its lock would be held while all are closed again.
            let opened = lock(function).open();
            match opened {
                Ok(()) => {}
                Err(e) if without_lost_networks && is_lost_network(function, &e) => {
                    tracing::warn!(
                        "the guest goes on without this network: {}",
                        crate::error_chain(&e)
                    );
                }
                Err(e) => {
                    let _ = self.close_backends();
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    /// Gives the host sides up, for another process to open them.
    pub fn close_backends(&self) -> Result<(), BackendError> {
        let closed = self.virtio.iter().map(|there| lock(&there.function).close());
        closed.fold(Ok(()), Result::and)
    }

    /// Where in guest memory the devices' states are looked up while they are loaded, a word each.
    pub fn positions(&self) -> Vec<u64> {
        self.virtio.iter().flat_map(|slot| lock(&slot.function).positions()).collect()
    }

    /// Lets the hosts that see the disks know that a guest that was migrated here has started.
    pub fn guest_started(&self) -> Result<(), BackendError> {
        self.virtio.iter().try_for_each(|slot| lock(&slot.function).guest_started())
    }

    /// What a guest that has just been let run does not wait for. First all devices are at work again: doorbells take
    /// longer.
    pub fn catch_up(&self) {
        self.virtio.iter().for_each(|slot| lock(&slot.function).catch_up());
        self.virtio.iter().for_each(|slot| lock(&slot.function).update_doorbells());
    }

    /// Asks the disks to bring to safety what was written, while the guest runs.
    pub fn flush_ahead(&self) {
        self.virtio.iter().for_each(|slot| lock(&slot.function).flush_ahead());
    }

    /// Rebuilds what follows from several devices' states at once.
    pub fn refresh(&self) {
        if let Some(pci) = &self.pci {
            pci.refresh();
        }
    }

    /// What the guest has programmed of the memory below 1 MiB, in the order of the chipset's segments.
    pub fn pam(&self) -> Option<[PamAccess; 13]> {
        self.host_bridge.as_ref().map(|bridge| lock(bridge).pam_all())
    }

    /// Has `hook` called whenever the guest programs that anew.
    pub fn on_pam(&self, hook: PamHook) {
        if let Some(bridge) = &self.host_bridge {
            lock(bridge).on_pam(hook);
        }
    }

    /// How large the ACPI files are that a firmware fetches, where that has been said.
    pub fn acpi_sizes(&self) -> Option<AcpiSizes> {
        self.fw_cfg.as_ref().and_then(|device| lock(device).acpi_sizes().cloned())
    }

    /// Offers these files to a firmware, and no others; `sizes` are those of its ACPI files.
    pub fn offer_files(
        &self,
        files: Vec<(String, Vec<u8>)>,
        sizes: Option<AcpiSizes>,
    ) -> Result<(), FileError> {
        let Some(device) = &self.fw_cfg else { return Ok(()) };
        let mut device = lock(device);
        if let Some(sizes) = sizes {
            device.set_acpi_sizes(sizes);
        }
        device.replace_files(files)
    }

    /// The network interfaces' identifiers.
    pub fn interfaces(&self) -> Vec<String> {
        self.announcer
            .as_ref()
            .map_or_else(Vec::new, |all| lock(all).ids().map(str::to_owned).collect())
    }

    /// Tells the networks where the guest is now: those of the interfaces `only`, or all.
    pub fn announce(&self, rounds: Rounds, only: Option<Vec<String>>) {
        if let Some(announcer) = &self.announcer {
            lock(announcer).start(rounds, only);
        }
    }

    /// What there is on the PCI bus, for a manifest.
    pub fn describe_devices(&self) -> Vec<DeviceDetails> {
        let describe = |there: &VirtioSlot| {
            let mut function = lock(&there.function);
            let (config, bars) = DeviceDetails::describe_config(function.configuration());
            let device = function.device();
            let kind = device.kind().name;
            // Capacity, the first field of a block device's configuration (virtio 1.2, 5.2.4).
            let sectors = (kind == "virtio-blk")
                .then(|| device.config().first_chunk().map(|bytes| u64::from_le_bytes(*bytes)))
                .flatten();
            DeviceDetails {
                kind: kind.into(),
                slot: there.slot,
                queues: device.queue_sizes().len() as u32,
                vectors: device.vectors().into(),
                features: device.features(),
                virtio: there.version,
                sectors,
                config,
                bars,
            }
        };
        self.virtio.iter().map(describe).collect()
    }

    /// What opening the host sides would come upon, with each device's name in messages. Nothing is
    /// taken from whoever uses them.
    pub fn try_backends(&self) -> Vec<(String, Trouble)> {
        let of = |VirtioSlot { slot, function, .. }: &VirtioSlot| {
            let mut function = lock(function);
            let device = function.device();
            let name = format!("{} in PCI slot {slot:02x}", device.kind().name);
            let troubles = device.try_backend();
            troubles.into_iter().map(|trouble| (name.clone(), trouble)).collect::<Vec<_>>()
        };
        self.virtio.iter().flat_map(of).collect()
    }

    /// The devices' sections, in the order in which they travel.
    pub fn sections(&self) -> Vec<Box<dyn Section>> {
        self.sections.iter().map(|make| make()).collect()
    }
}

/// Whether it is a network whose interface is gone.
fn is_lost_network(function: &Mutex<VirtioPci>, error: &BackendError) -> bool {
    let net = lock(function).device().kind().id == VIRTIO_NET;
    net && error.source.kind() == std::io::ErrorKind::NotFound
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
