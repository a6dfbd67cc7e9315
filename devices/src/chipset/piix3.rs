//! The ISA bridge: 82371SB (PIIX3), function 01.0, with the PIRQ routing registers and the reset
//! control register.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use migration::vmstate::{Audience, FieldError, Migratable, VmState, Words};
use serde::{Deserialize, Serialize};

use super::identity;
use super::pirq::PirqRouter;
use crate::device::{Device, PowerControl, PowerRequest};
use crate::pci::{
    PCI_DEVICE_WORDS, PIRQ_LINES, PciConfig, PciDeviceState, PciFunction, ResetControl,
};

/// Status register: medium DEVSEL timing.
const STATUS: (usize, [u8; 2]) = (0x06, [0x00, 0x02]);
/// PIRQRCA to PIRQRCD.
const PIRQ_ROUTES: usize = 0x60;
/// Registers that are not zero after power-on.
const POWER_ON: [(usize, u8); 13] = [
    (0x4c, 0x4d),
    (0x4e, 0x03),
    (PIRQ_ROUTES, 0x80),
    (PIRQ_ROUTES + 1, 0x80),
    (PIRQ_ROUTES + 2, 0x80),
    (PIRQ_ROUTES + 3, 0x80),
    (0x69, 0x02),
    (0x70, 0x80),
    (0x76, 0x0c),
    (0x77, 0x0c),
    (0x78, 0x02),
    (0xa0, 0x08),
    (0xa8, 0x0f),
];

/// The reset control register, port 0xcf9.
pub struct ResetRegister {
    value: AtomicU8,
    power: Arc<dyn PowerControl>,
}

/// Bit 1: a hard reset, not only of the CPU. The only bit that stays.
const HARD_RESET: u8 = 1 << 1;
/// Bit 2: reset now.
const RESET_CPU: u8 = 1 << 2;

impl ResetRegister {
    /// The register after power-on.
    pub fn new(power: Arc<dyn PowerControl>) -> Arc<Self> {
        Arc::new(Self { value: AtomicU8::new(0), power })
    }
}

impl ResetControl for ResetRegister {
    fn read(&self) -> u8 {
        self.value.load(Ordering::Relaxed)
    }

    fn write(&self, value: u8) {
        if value & RESET_CPU != 0 {
            self.power.request(PowerRequest::Reset);
        } else {
            self.value.store(value & HARD_RESET, Ordering::Relaxed);
        }
    }
}

/// The ISA bridge.
pub struct Piix3 {
    config: PciConfig,
    router: Arc<PirqRouter>,
    reset_register: Arc<ResetRegister>,
}

impl Piix3 {
    /// The bridge after power-on. The PCI bus gets the same `router` and `reset_register`.
    pub fn new(router: Arc<PirqRouter>, reset_register: Arc<ResetRegister>) -> Self {
        let mut config = PciConfig::new(identity(0x7000, 0, 0x0601, 0));
        config.set_multifunction();
        config.set(STATUS.0, &STATUS.1);
        for (offset, value) in POWER_ON {
            config.set(offset, &[value]);
        }
        let bridge = Self { config, router, reset_register };
        bridge.update_routes();
        bridge
    }

    fn update_routes(&self) {
        let mut routes = [0; PIRQ_LINES];
        self.config.read(PIRQ_ROUTES, &mut routes);
        self.router.set_routes(routes);
    }

    fn reset_all(&mut self) {
        self.config.reset();
        self.reset_register.value.store(0, Ordering::Relaxed);
        self.update_routes();
    }
}

impl PciFunction for Piix3 {
    fn name(&self) -> &str {
        "PIIX3"
    }

    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        self.update_routes();
    }

    fn reset(&mut self) {
        self.reset_all();
    }
}

impl Device for Piix3 {
    fn reset(&mut self) {
        self.reset_all();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

/// Section `0000:00:01.0/PIIX3` v3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piix3State {
    dev: PciDeviceState,
    /// The levels of PIRQA to PIRQD. Not used when loading: they follow from the functions' pins.
    #[serde(rename = "pci_irq_levels_vmstate")]
    pci_irq_levels: [i32; PIRQ_LINES],
    subsections: Subsections,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct Subsections {
    #[serde(rename = "PIIX3/rcr")]
    rcr: Option<Rcr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Rcr {
    rcr: u8,
}

impl VmState for Piix3State {
    const VERSION: u32 = 3;
    const MIN_VERSION: u32 = 2;
    const WORDS: Words = Words { prefix: "", fields: &[PCI_DEVICE_WORDS] };
}

impl Migratable for Piix3 {
    type State = Piix3State;

    fn save(&self, _: Audience) -> Result<Piix3State, FieldError> {
        let rcr = self.reset_register.read();
        Ok(Piix3State {
            dev: self.config.save(false),
            pci_irq_levels: self.router.levels().map(i32::from),
            subsections: Subsections { rcr: (rcr != 0).then_some(Rcr { rcr }) },
        })
    }

    fn check(&self, state: &Piix3State) -> Result<(), FieldError> {
        self.config.check(&state.dev)?;
        match &state.subsections.rcr {
            Some(Rcr { rcr }) if rcr & !HARD_RESET != 0 => {
                Err(FieldError::new("rcr", "0 or 2", rcr))
            }
            _ => Ok(()),
        }
    }

    fn restore(&mut self, state: Piix3State) -> Result<(), FieldError> {
        self.config.restore(&state.dev);
        let rcr = state.subsections.rcr.map_or(0, |sub| sub.rcr);
        self.reset_register.value.store(rcr, Ordering::Relaxed);
        self.update_routes();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::pirq::tests::{high, router};
    use super::*;
    use crate::isa::testing::FakePower;
    use crate::pci::IntxRouter;

    fn bridge() -> Piix3 {
        Piix3::new(router().0, ResetRegister::new(FakePower::new()))
    }

    #[test]
    fn is_an_isa_bridge_with_more_functions() {
        let mut bridge = bridge();
        let mut header = [0; 16];
        bridge.config_read(0, &mut header);
        assert_eq!(header, [0x86, 0x80, 0, 0x70, 0, 0, 0, 2, 0, 0, 1, 6, 0, 0, 0x80, 0]);
        let mut routes = [0; 4];
        bridge.config_read(0x60, &mut routes);
        assert_eq!(routes, [0x80; 4]);
    }

    #[test]
    fn route_registers_route() {
        let (router, lines) = router();
        let mut bridge = Piix3::new(router.clone(), ResetRegister::new(FakePower::new()));
        router.set_pirq(1, true);
        assert_eq!(high(&lines), 0);
        bridge.config_write(0x60, &[10, 10, 11, 11]);
        assert_eq!(high(&lines), 1 << 10);
        bridge.config_write(0x61, &[11]);
        assert_eq!(high(&lines), 1 << 11);
        PciFunction::reset(&mut bridge);
        assert_eq!(high(&lines), 0);
    }

    #[test]
    fn reset_control_resets_on_bit_2() {
        let power = FakePower::new();
        let register = ResetRegister::new(power.clone());
        register.write(0x02);
        assert_eq!(register.read(), 0x02);
        assert!(power.requests().is_empty());
        register.write(0x06);
        assert_eq!(power.requests(), [PowerRequest::Reset]);
    }

    #[test]
    fn state_travels_whole_and_routes_again() {
        let mut from = bridge();
        for offset in 0x40..0x100 {
            from.config_write(offset, &[offset as u8]);
        }
        from.config_write(0x60, &[5, 9, 10, 11]);
        from.router.set_pirq(3, true);
        from.reset_register.write(0x02);
        let state = from.save(Audience::Qemu).unwrap();
        assert_eq!(state.pci_irq_levels, [0, 0, 0, 1]);
        assert_eq!(state.subsections.rcr, Some(Rcr { rcr: 2 }));

        let (router, lines) = router();
        let power = FakePower::new();
        let mut to = Piix3::new(router.clone(), ResetRegister::new(power.clone()));
        to.check(&state).unwrap();
        to.restore(state.clone()).unwrap();
        // The function that holds the line is restored by itself.
        router.set_pirq(3, true);
        assert_eq!(to.save(Audience::Qemu).unwrap(), state);
        assert_eq!(high(&lines), 1 << 11);
        assert!(power.requests().is_empty());

        let mut bad = state;
        bad.subsections.rcr = Some(Rcr { rcr: 4 });
        assert_eq!(to.check(&bad).unwrap_err().field, "rcr");
    }
}
