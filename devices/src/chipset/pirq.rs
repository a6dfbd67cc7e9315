//! Where PCI's interrupt lines end: the ISA bridge routes each of PIRQA to PIRQD to an ISA IRQ.
//!
//! This is an object of its own, with a lock of its own, because PCI functions drive their pins
//! with their own locks held.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::irq::IrqLine;
use crate::pci::{IntxRouter, PIRQ_LINES};

/// How many ISA IRQs there are.
pub const ISA_IRQS: usize = 16;

/// Route register bit 7: routed nowhere.
const DISABLED: u8 = 0x80;
/// The IRQs that a PCI interrupt can go to (data sheet of the PIIX3, PIRQRC); the others are
/// reserved: 0, 1, 2, 8 and 13 belong to devices of the bridge.
const ROUTABLE: u16 = 0xdef8;

/// The four lines, and where each goes.
pub struct PirqRouter {
    lines: [Arc<dyn IrqLine>; ISA_IRQS],
    state: Mutex<Routing>,
}

struct Routing {
    /// The route registers.
    routes: [u8; PIRQ_LINES],
    levels: [bool; PIRQ_LINES],
    /// The IRQs that are held high, one bit each.
    driven: u16,
}

impl Routing {
    /// What the IRQs have to be: each the OR of all lines routed to it.
    fn wanted(&self) -> u16 {
        let routed = self.routes.iter().zip(self.levels).filter(|(_, high)| *high);
        routed.fold(0, |mask, (route, _)| mask | bit(*route))
    }
}

/// The IRQ of a route register as a bit; none if it is off or reserved.
fn bit(route: u8) -> u16 {
    if route & DISABLED != 0 { 0 } else { (1 << (route & 0x0f)) & ROUTABLE }
}

impl PirqRouter {
    /// A router with all lines low and routed nowhere. `lines[n]` is ISA IRQ `n`; only the
    /// routable ones are ever driven.
    pub fn new(lines: [Arc<dyn IrqLine>; ISA_IRQS]) -> Arc<Self> {
        let routing =
            Routing { routes: [DISABLED; PIRQ_LINES], levels: [false; PIRQ_LINES], driven: 0 };
        Arc::new(Self { lines, state: Mutex::new(routing) })
    }

    /// The route registers have these values now.
    pub fn set_routes(&self, routes: [u8; PIRQ_LINES]) {
        let mut state = self.lock();
        state.routes = routes;
        self.drive(&mut state);
    }

    /// The levels of PIRQA to PIRQD.
    pub fn levels(&self) -> [bool; PIRQ_LINES] {
        self.lock().levels
    }

    fn lock(&self) -> MutexGuard<'_, Routing> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one place where levels and routes become IRQs. Called with the lock held, so that the
    /// controllers see the changes in the order they came.
    fn drive(&self, state: &mut Routing) {
        let wanted = state.wanted();
        let changed = wanted ^ state.driven;
        for (n, line) in self.lines.iter().enumerate() {
            if changed & (1 << n) != 0 {
                line.set_level(wanted & (1 << n) != 0);
            }
        }
        state.driven = wanted;
    }
}

impl IntxRouter for PirqRouter {
    fn set_pirq(&self, line: usize, high: bool) {
        let mut state = self.lock();
        if let Some(level) = state.levels.get_mut(line) {
            *level = high;
        }
        self.drive(&mut state);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::isa::testing::FakeLine;

    /// A router, and the lines that it drives.
    pub(in crate::chipset) fn router() -> (Arc<PirqRouter>, [Arc<FakeLine>; ISA_IRQS]) {
        let lines: [Arc<FakeLine>; ISA_IRQS] = std::array::from_fn(|_| FakeLine::new());
        (PirqRouter::new(lines.clone().map(|line| line as Arc<dyn IrqLine>)), lines)
    }

    /// The IRQs that are high, one bit each.
    pub(in crate::chipset) fn high(lines: &[Arc<FakeLine>; ISA_IRQS]) -> u16 {
        (0..ISA_IRQS).filter(|n| lines[*n].is_high()).fold(0, |mask, n| mask | 1 << n)
    }

    #[test]
    fn an_irq_is_the_or_of_the_lines_routed_to_it() {
        let (router, lines) = router();
        router.set_routes([10, 10, 11, 0x80]);
        router.set_pirq(0, true);
        router.set_pirq(1, true);
        assert_eq!(high(&lines), 1 << 10);
        router.set_pirq(0, false);
        assert_eq!(high(&lines), 1 << 10);
        router.set_pirq(1, false);
        assert_eq!(high(&lines), 0);
        router.set_pirq(3, true);
        assert_eq!(high(&lines), 0);
        assert_eq!(router.levels(), [false, false, false, true]);
    }

    #[test]
    fn a_new_route_moves_the_level() {
        let (router, lines) = router();
        router.set_pirq(2, true);
        router.set_routes([0x80, 0x80, 11, 0x80]);
        assert_eq!(high(&lines), 1 << 11);
        router.set_routes([0x80, 0x80, 5, 0x80]);
        assert_eq!(high(&lines), 1 << 5);
        router.set_routes([0x80; 4]);
        assert_eq!(high(&lines), 0);
    }

    #[test]
    fn reserved_irqs_are_never_driven() {
        let (router, lines) = router();
        router.set_pirq(0, true);
        for route in 0..=255 {
            router.set_routes([route, 0x80, 0x80, 0x80]);
            let allowed =
                route < 0x80 && [3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15].contains(&(route & 15));
            assert_eq!(high(&lines) != 0, allowed, "{route:#x}");
        }
    }
}
