//! INTx: the level-triggered interrupts of PCI, from a function's pin to one of the four PIRQ
//! lines of the board.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many interrupt lines lead from the PCI bus to the ISA bridge.
pub const PIRQ_LINES: usize = 4;
const SLOTS: usize = 32;
const PINS: usize = 4;

/// The ISA bridge's side: where the four lines end.
pub trait IntxRouter: Send + Sync {
    /// PIRQ line `line` (0 for PIRQA to 3 for PIRQD) has a new level. Called with the lock of the
    /// function that drives the pin, and must not touch any other PCI function's.
    fn set_pirq(&self, line: usize, high: bool);
}

/// All INTx pins of the bus, and the lines that they share.
///
/// A line is high while at least one of its pins is: how many are is what the section `PCIBUS`
/// calls `irq_count`. It is derived, here, from the pins, so that no stream can bring the two apart.
pub struct IntxLines {
    router: Arc<dyn IntxRouter>,
    /// The level of each pin of each slot.
    pins: Mutex<[[bool; PINS]; SLOTS]>,
}

impl IntxLines {
    /// Lines that end at `router`, all low.
    pub fn new(router: Arc<dyn IntxRouter>) -> Arc<Self> {
        Arc::new(Self { router, pins: Mutex::new([[false; PINS]; SLOTS]) })
    }

    /// The pin INTA of `slot` (taken modulo 32).
    pub fn inta(self: &Arc<Self>, slot: u8) -> IntxPin {
        IntxPin {
            lines: self.clone(),
            slot: usize::from(slot) % SLOTS,
            pin: 0,
            asserted: false,
            disabled: false,
        }
    }

    /// How many pins assert each line.
    pub fn counts(&self) -> [u8; PIRQ_LINES] {
        count(&self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, [[bool; PINS]; SLOTS]> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, slot: usize, pin: usize, high: bool) {
        let mut pins = self.lock();
        let line = line_of(slot, pin);
        let before = count(&pins)[line];
        pins[slot][pin] = high;
        let after = count(&pins)[line];
        // The lock is held meanwhile, so that the router sees levels in the order they came.
        if (before == 0) != (after == 0) {
            self.router.set_pirq(line, after != 0);
        }
    }
}

/// The board's wiring: neighbouring slots begin at neighbouring lines.
fn line_of(slot: usize, pin: usize) -> usize {
    (slot + pin + PIRQ_LINES - 1) % PIRQ_LINES
}

fn count(pins: &[[bool; PINS]; SLOTS]) -> [u8; PIRQ_LINES] {
    let mut counts = [0; PIRQ_LINES];
    for (slot, levels) in pins.iter().enumerate() {
        for (pin, high) in levels.iter().enumerate() {
            counts[line_of(slot, pin)] += u8::from(*high);
        }
    }
    counts
}

/// One function's interrupt pin.
pub struct IntxPin {
    lines: Arc<IntxLines>,
    slot: usize,
    pin: usize,
    /// What the device wants.
    asserted: bool,
    /// What the command register forbids.
    disabled: bool,
}

impl IntxPin {
    /// Asserts or releases the pin.
    pub fn set(&mut self, asserted: bool) {
        self.asserted = asserted;
        self.drive();
    }

    /// Follows the bit "interrupt disable" of the command register.
    pub fn set_disabled(&mut self, disabled: bool) {
        self.disabled = disabled;
        self.drive();
    }

    /// What the device wants, whether or not the command register lets it through.
    pub fn asserted(&self) -> bool {
        self.asserted
    }

    fn drive(&self) {
        self.lines.set(self.slot, self.pin, self.asserted && !self.disabled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(usize, bool)>>);

    impl IntxRouter for Recorder {
        fn set_pirq(&self, line: usize, high: bool) {
            self.0.lock().unwrap().push((line, high));
        }
    }

    #[test]
    fn a_line_is_high_while_one_of_its_pins_is() {
        let router = Arc::new(Recorder::default());
        let lines = IntxLines::new(router.clone());
        // Slots 2 and 6 share PIRQB.
        let (mut two, mut six, mut three) = (lines.inta(2), lines.inta(6), lines.inta(3));
        two.set(true);
        two.set(true);
        six.set(true);
        assert_eq!(lines.counts(), [0, 2, 0, 0]);
        three.set(true);
        two.set(false);
        six.set_disabled(true);
        assert!(six.asserted());
        six.set_disabled(false);
        six.set(false);
        assert_eq!(lines.counts(), [0, 0, 1, 0]);
        assert_eq!(
            *router.0.lock().unwrap(),
            [(1, true), (2, true), (1, false), (1, true), (1, false)]
        );
    }

    #[test]
    fn slots_are_wired_as_on_the_board() {
        assert_eq!([1, 2, 3, 4, 5].map(|slot| line_of(slot, 0)), [0, 1, 2, 3, 0]);
        assert_eq!(line_of(0, 0), 3);
        assert_eq!(line_of(1, 3), 3);
    }
}
