//! Every section of the old board, as it goes over the wire: its length, what happens to it when
//! it is cut or followed by strangers, and what a device does with one that somebody has tampered
//! with.

use std::sync::{Arc, Mutex};

use devices::bus::IoBus;
use devices::chipset::holders::{AcpiBuildState, Holder, I2cBusState};
use devices::chipset::i440fx::I440fx;
use devices::chipset::ide::{self, Ide};
use devices::chipset::piix3::{Piix3, ResetRegister};
use devices::chipset::piix4_pm::{Piix4Pm, PmSection};
use devices::chipset::pirq::PirqRouter;
use devices::clock::Clock;
use devices::device::{Device, PowerControl, PowerRequest};
use devices::irq::IrqLine;
use devices::isa::dma::{self, Dma, Which};
use devices::isa::fdc::Fdc;
use devices::isa::fw_cfg::{self, FwCfg};
use devices::isa::i8042::{self, I8042};
use devices::isa::pcspk::PcSpeaker;
use devices::isa::port92::{self, Port92};
use devices::isa::ps2::{Keyboard, Mouse};
use devices::isa::rtc::{self, CmosConfig, Rtc};
use devices::isa::serial::{self, SerialPort};
use devices::memory::GuestRam;
use devices::pci::{PciFunction, ResetControl};
use devices::timer::{Timed, TimerHost};
use migration::vmstate::{Audience, Migratable, Section, SectionId, SectionOf, SliceSource};
use vm_device::DevicePio;
use vm_memory::GuestAddress;

/// A world that takes everything and stands still.
struct World;

impl Clock for World {
    fn virtual_ns(&self) -> i64 {
        14_000_000_000
    }
    fn realtime_ns(&self) -> i64 {
        1_795_206_000_000_000_000
    }
}

impl PowerControl for World {
    fn request(&self, _: PowerRequest) {}
}

impl IrqLine for World {
    fn set_level(&self, _: bool) {}
}

impl TimerHost for World {
    fn deadline_changed(&self) {}
}

/// A section, the length of a fresh machine's, and its device's life after loading it.
struct Case {
    section: Box<dyn Section>,
    length: usize,
    live: Box<dyn Fn()>,
}

/// What comes after a state was taken: the machine resumes, and the guest touches everything.
fn poke(io: &IoBus) {
    for port in (0..=0x3ff).chain(0x510..0x51c).chain(0xae00..0xb000) {
        for width in [1, 2, 4] {
            let mut data = vec![0x5a; width];
            io.pio_read(port, &mut data);
            io.pio_write(port, &data);
        }
    }
}

fn case<D>(
    id: &str,
    instance: u32,
    length: usize,
    device: Arc<Mutex<D>>,
    live: impl Fn() + 'static,
) -> Case
where
    D: Migratable + Send + 'static,
{
    let section = Box::new(SectionOf::new(SectionId::new(id, instance), device));
    Case { section, length, live: Box::new(live) }
}

/// A device that only the guest's ports and the machine's pauses reach.
fn on_ports<D>(id: &str, instance: u32, length: usize, device: D, ports: &[(u16, u16)]) -> Case
where
    D: Migratable + Device + Send + 'static,
    Mutex<D>: DevicePio,
{
    let (device, io) = (Arc::new(Mutex::new(device)), IoBus::new());
    for (base, size) in ports {
        io.map_pio(*base, *size, device.clone()).unwrap();
    }
    let alive = device.clone();
    case(id, instance, length, device, move || {
        alive.lock().unwrap().resume();
        poke(&io);
        alive.lock().unwrap().pause();
        alive.lock().unwrap().reset();
    })
}

fn quiet<D>(id: &str, length: usize, device: D) -> Case
where
    D: Migratable + Device + Send + 'static,
{
    let device = Arc::new(Mutex::new(device));
    let alive = device.clone();
    case(id, 0, length, device, move || {
        alive.lock().unwrap().resume();
        alive.lock().unwrap().reset();
    })
}

fn function<D>(id: &str, length: usize, device: D) -> Case
where
    D: Migratable + PciFunction + Device + Send + 'static,
{
    let device = Arc::new(Mutex::new(device));
    let alive = device.clone();
    case(id, 0, length, device, move || {
        let mut function = alive.lock().unwrap();
        function.resume();
        for offset in (0..256).step_by(4) {
            let mut data = [0; 4];
            function.config_read(offset, &mut data);
            function.config_write(offset, &data);
        }
        for offset in 0..16 {
            function.bar_read(4, offset, &mut [0; 4]);
            function.bar_write(4, offset, &[0xff; 4]);
        }
        Device::reset(&mut *function);
    })
}

fn cases() -> Vec<Case> {
    let world = Arc::new(World);
    let line = || Arc::new(World) as Arc<dyn IrqLine>;

    let config = CmosConfig { ram_below_4g: 1 << 28, ram_above_4g: 0, cpus: 2 };
    let clock = Arc::new(Mutex::new(Rtc::new(config, line(), world.clone(), world.clone())));
    let clock_ports = IoBus::new();
    clock_ports.map_pio(rtc::INDEX_PORT, rtc::PORTS, clock.clone()).unwrap();
    let ticking = clock.clone();
    let live_clock = move || {
        ticking.lock().unwrap().resume();
        poke(&clock_ports);
        for now in [0, 1_795_206_000_000_000_000, i64::MAX] {
            ticking.lock().unwrap().expire(now);
            ticking.lock().unwrap().next_deadline();
        }
        ticking.lock().unwrap().reset();
    };

    let io = Arc::new(IoBus::new());
    let pm = Piix4Pm::new(2, io.clone(), line(), world.clone(), world.clone(), world.clone());
    let pm = pm.unwrap();
    let alive = pm.clone();
    let live_pm = move || {
        alive.lock().unwrap().resume();
        poke(&io);
        for now in [0, i64::MAX] {
            alive.lock().unwrap().expire(now);
            alive.lock().unwrap().next_deadline();
        }
        Device::reset(&mut *alive.lock().unwrap());
    };
    let id = SectionId::new("0000:00:01.3/piix4_pm", 0);
    let pm = Case {
        section: Box::new(PmSection::new(id, pm, 2)),
        // With the subsection `piix4_pm/memhp`.
        length: 2408 + 24,
        live: Box::new(live_pm),
    };

    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap());
    let router = PirqRouter::new(std::array::from_fn(|_| line()));
    let reset = ResetRegister::new(world.clone());
    assert_eq!(reset.read(), 0);
    let keyboard = I8042::new(Arc::default(), Arc::default(), line(), line(), world.clone());
    let uart = SerialPort::new(serial::COM1, line(), Box::new(std::io::sink()));
    let mut fw_cfg = FwCfg::new(ram, [0; 16], 1 << 28, 2, 2);
    fw_cfg.add_file("etc/test", vec![1; 100]).unwrap();
    vec![
        // With the subsection `fw_cfg/dma`.
        on_ports("fw_cfg", 0, 6 + 24, fw_cfg, &fw_cfg::PORTS),
        function("0000:00:00.0/I440FX", 277, I440fx::new()),
        on_ports("dma", 0, 75, Dma::new(Which::First), &[dma::FIRST_PORTS, dma::FIRST_PAGES[0]]),
        on_ports("dma", 1, 75, Dma::new(Which::Second), &[dma::SECOND_PORTS]),
        function("0000:00:01.0/PIIX3", 292, Piix3::new(router, reset)),
        case("mc146818rtc", 0, 245, clock, live_clock),
        quiet("pcspk", 2, PcSpeaker::new()),
        on_ports("serial", 0, 11, uart, &[(serial::COM1, serial::PORTS)]),
        quiet("fdc", 593, Fdc::new()),
        quiet("ps2kbd", 284, Keyboard::new()),
        quiet("ps2mouse", 291, Mouse::new()),
        on_ports("pckbd", 0, 40, keyboard, &[(i8042::DATA_PORT, 1), (i8042::COMMAND_PORT, 1)]),
        on_ports("port92", 0, 1, Port92::new(world), &[(port92::PORT, 1)]),
        function("0000:00:01.1/ide", 430, Ide::new()),
        on_ports("0000:00:01.1/ide", 0, 430, Ide::new(), &ide::PORTS),
        quiet("i2c_bus", 1, Holder::<I2cBusState>::new()),
        pm,
        quiet("acpi_build", 1, Holder::<AcpiBuildState>::new()),
    ]
}

/// Where a body ends, the section's footer begins.
const FOOTER: u8 = 0x7e;

#[test]
fn a_fresh_machines_sections_have_the_known_lengths_and_come_back_the_same() {
    for mut case in cases() {
        let name = case.section.id().to_string();
        let bytes = case.section.save(Audience::Qemu).unwrap();
        assert_eq!(bytes.len(), case.length, "{name}");
        let stream = [&bytes[..], &[FOOTER]].concat();
        let mut source = SliceSource::new(&stream);
        let state = case.section.decode(case.section.version(), &mut source).unwrap();
        assert_eq!(source.rest(), [FOOTER], "{name}");
        case.section.apply(state).unwrap();
        assert_eq!(case.section.save(Audience::Qemu).unwrap(), bytes, "{name}");
        assert_eq!(case.section.save_described(Audience::Qemu).unwrap().0, bytes, "{name}");
    }
}

#[test]
fn a_cut_or_continued_section_is_refused() {
    for case in cases() {
        let name = case.section.id().to_string();
        let version = case.section.version();
        let bytes = case.section.save(Audience::Qemu).unwrap();
        let cuts = (1..bytes.len().min(64)).map(|n| &bytes[..bytes.len() - n]);
        for cut in cuts.chain([&[][..]]) {
            // A cut between two subsections leaves a whole section.
            if let Ok(state) = case.section.decode(version, &mut SliceSource::new(cut)) {
                drop(state);
                assert!(
                    ["fw_cfg", "piix4_pm", "pckbd", "fdc"].iter().any(|n| name.contains(n)),
                    "{name}"
                );
            }
        }
        let stranger = [&bytes[..], b"\x05\x05alien\0\0\0\x01"].concat();
        let error = case.section.decode(version, &mut SliceSource::new(&stranger)).err().unwrap();
        assert!(error.to_string().contains("alien"), "{error}");
        let error = case.section.decode(version + 1, &mut SliceSource::new(&bytes)).err().unwrap();
        assert!(error.to_string().contains("version"), "{error}");
    }
}

#[test]
fn tampered_sections_are_refused_or_survived() {
    for mut case in cases() {
        let bytes = case.section.save(Audience::Qemu).unwrap();
        let version = case.section.version();
        let (mut taken, mut refused) = (0, 0);
        for at in 0..bytes.len() {
            for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[at] = value;
                bad.push(FOOTER);
                match case.section.decode(version, &mut SliceSource::new(&bad)) {
                    Ok(state) => {
                        case.section.apply(state).unwrap();
                        case.section.save(Audience::Qemu).unwrap();
                        // The large sections are mostly arrays: not each element is worth the time.
                        if at < 64 || at % 16 == 0 {
                            (case.live)();
                        }
                        taken += 1;
                    }
                    Err(_) => refused += 1,
                }
            }
        }
        assert!(taken > 0, "{}: {taken} taken, {refused} refused", case.section.id());
    }
}
