//! What is done in one case: everything that is decided follows from a seed and a number.

use std::fmt;

pub use crate::proxy::Direction;

/// Numbers that look random and are the same for the same seed (SplitMix64; Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// Dice for case `number` of `seed`.
    pub fn new(seed: u64, number: u64) -> Self {
        let mut dice = Self(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        dice.roll();
        Self(dice.roll())
    }

    /// Any number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.roll() % n.max(1)
    }

    /// One of these.
    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// Where something is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// At the n-th piece of this name (from 0 on), behind so many of its bytes.
    At {
        /// See [`super::units::Unit::name`].
        unit: String,
        /// Which of them.
        nth: u64,
        /// How far in it.
        inside: Inside,
    },
    /// Behind so many bytes.
    Byte(u64),
}

/// How far in a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inside {
    /// None of it has passed.
    Before,
    /// So many bytes have passed, taken modulo its length, and at least one.
    Bytes(u64),
    /// All of it has passed.
    Behind,
}

/// One of the processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that the guest is to leave.
    Source,
    /// The one that it is to go to.
    Destination,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The connection is closed on both sides.
    Cut,
    /// It is reset on both sides: what was under way is lost.
    Reset,
    /// This direction ends; the other one goes on.
    Truncate,
    /// This direction stands still for good.
    Stall,
    /// Both directions stand still for good.
    StallBoth,
    /// This direction stands still until the source has settled, the operator's help included, and then
    /// goes on.
    Late,
    /// This direction stands still for so many ms.
    Delay(u64),
    /// A byte is changed by XOR.
    Corrupt(u8),
    /// A process is killed, so many ms later.
    Kill(Side, u64),
    /// A process stands still, until the other one has noticed.
    Freeze(Side),
}

impl Action {
    /// What a table has it under.
    pub fn group(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::Reset => "reset",
            Self::Truncate => "truncate",
            Self::Stall => "stall",
            Self::StallBoth => "stall both ways",
            Self::Late => "late",
            Self::Delay(_) => "delay",
            Self::Corrupt(_) => "corrupt",
            Self::Kill(Side::Source, _) => "kill source",
            Self::Kill(Side::Destination, _) => "kill destination",
            Self::Freeze(Side::Source) => "freeze source",
            Self::Freeze(Side::Destination) => "freeze destination",
        }
    }
}

/// What the guest does, and how it is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// vCPUs.
    pub smp: u32,
    /// Pages that the guest rewrites in a second.
    pub rate: u64,
    /// `max-bandwidth`, bytes per second; 0: no limit.
    pub bandwidth: u64,
    /// `downtime-limit`, ms.
    pub downtime_ms: u64,
    /// `pause-before-switchover`.
    pub stops_before: bool,
    /// `x-verify`. Always on where something is corrupted.
    pub verify: bool,
    /// Afterwards a guest that has stayed is moved once more, which must succeed.
    pub again: bool,
}

/// One case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// Of all.
    pub seed: u64,
    /// Which one.
    pub number: u64,
    /// Where.
    pub direction: Direction,
    /// At what.
    pub place: Place,
    /// What.
    pub action: Action,
    /// To whom.
    pub variant: Variant,
}

/// The pieces that a migration of the cases' VM consists of, each name once, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    /// From the source.
    pub there: Vec<String>,
    /// From the destination.
    pub back: Vec<String>,
}

/// Where it is decided who has the guest: attacked so many times as often as other places.
const DECISIVE: [&str; 7] =
    ["verify", "end", "description", "prepared", "commit", "running", "shut"];
const WEIGHT: usize = 4;

impl Map {
    /// The pieces to attack, the decisive ones more than once.
    fn targets(&self) -> Vec<(Direction, &str)> {
        let there = self.there.iter().map(|name| (Direction::There, name.as_str()));
        let back = self.back.iter().map(|name| (Direction::Back, name.as_str()));
        let times = |name| if DECISIVE.contains(&name) { WEIGHT } else { 1 };
        there.chain(back).flat_map(|one| std::iter::repeat_n(one, times(one.1))).collect()
    }
}

/// The most bytes that a case counts to from the source, which is more than mostly pass, and from the
/// destination.
const BYTES_THERE: u64 = 14 << 20;
const BYTES_BACK: u64 = 700;

/// Kinds of action, with a place for each in [`Case::new`]'s count.
const KINDS: u64 = 12;

impl Case {
    /// Case `number` of `seed`: three of four are at a piece of the stream, all pairs of piece and
    /// action after each other in an order that depends on the seed; the others are at any byte.
    pub fn new(seed: u64, number: u64, map: &Map) -> Self {
        let mut dice = Dice::new(seed, number);
        let targets = map.targets();
        let pieces = targets.len() as u64;
        let any_byte = number % 4 == 3;
        // A step that has no factor in common with the count goes through all of it.
        let pairs = pieces * KINDS;
        let step = step(seed, pairs);
        let turn = (number - number / 4).wrapping_mul(step) % pairs;
        let (piece, kind) = if any_byte {
            (dice.below(pieces), dice.below(KINDS))
        } else {
            (turn % pieces, turn / pieces)
        };
        let (mut direction, name) = targets[piece as usize];
        let mut place = Self::at(name.to_owned(), &mut dice);
        if any_byte {
            direction = dice.of(&[Direction::There, Direction::There, Direction::Back]);
            let most = if direction == Direction::There { BYTES_THERE } else { BYTES_BACK };
            // As many small ones as large ones.
            let bits = dice.below(u64::from(most.ilog2()) + 1) + 1;
            place = Place::Byte(dice.below(most.min(1 << bits)));
        }
        let action = Self::action(kind, &mut dice);
        if matches!(action, Action::Corrupt(_))
            && let Place::At { inside, .. } = &mut place
        {
            // One of its own bytes.
            *inside = Inside::Bytes(dice.roll());
        }
        let variant = Variant {
            smp: dice.of(&[1, 1, 1, 2]),
            rate: dice.of(&[1000, 4000, 4000, 20_000]),
            bandwidth: dice.of(&[0, 0, 0, 64 << 20]),
            downtime_ms: dice.of(&[300, 300, 20]),
            stops_before: dice.below(5) == 0,
            verify: matches!(action, Action::Corrupt(_)) || dice.below(3) > 0,
            again: dice.below(6) == 0,
        };
        Self { seed, number, direction, place, action, variant }
    }

    fn at(unit: String, dice: &mut Dice) -> Place {
        let nth = match unit.as_str() {
            "page" => dice.below(2000),
            "zero page" => dice.below(4000),
            "pages" | "zero pages" => dice.below(16),
            "ping" | "pong" | "ram part" | "ram mark" | "ram footer" => dice.below(3),
            _ => 0,
        };
        let inside = match dice.below(3) {
            0 => Inside::Before,
            1 => Inside::Bytes(dice.roll()),
            _ => Inside::Behind,
        };
        Place::At { unit, nth, inside }
    }

    fn action(kind: u64, dice: &mut Dice) -> Action {
        // Half of the deaths are at once, the others some ms later.
        let after = |dice: &mut Dice| dice.below(2) * dice.below(40);
        match kind {
            0 => Action::Cut,
            1 => Action::Reset,
            2 => Action::Truncate,
            3 => Action::Stall,
            4 => Action::StallBoth,
            5 => Action::Late,
            6 => Action::Delay(10 + dice.below(400)),
            7 => Action::Corrupt(1 + dice.below(255) as u8),
            8 => Action::Kill(Side::Source, after(dice)),
            9 => Action::Kill(Side::Destination, after(dice)),
            10 => Action::Freeze(Side::Source),
            _ => Action::Freeze(Side::Destination),
        }
    }
}

/// A number that has no factor in common with `count`, and depends on the seed.
fn step(seed: u64, count: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let mut dice = Dice::new(seed, u64::MAX);
    loop {
        let step = 1 + dice.below(count);
        if gcd(step, count) == 1 {
            return step;
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.action {
            Action::Delay(ms) => write!(f, "delay by {ms} ms")?,
            Action::Corrupt(xor) => write!(f, "corrupt by {xor:#04x}")?,
            Action::Kill(_, ms) if ms > 0 => write!(f, "{}, {ms} ms later,", self.action.group())?,
            action => f.write_str(action.group())?,
        }
        match &self.place {
            Place::Byte(n) => write!(f, " at byte {n}")?,
            Place::At { unit, nth, inside } => {
                match inside {
                    Inside::Before => write!(f, " before {unit}")?,
                    Inside::Bytes(_) => write!(f, " in {unit}")?,
                    Inside::Behind => write!(f, " behind {unit}")?,
                }
                if *nth > 0 {
                    write!(f, " #{nth}")?;
                }
            }
        }
        let to = if self.direction == Direction::There { "there" } else { "back" };
        write!(f, ", on the way {to}")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn map() -> Map {
        let names = |all: &[&str]| all.iter().map(|name| (*name).to_owned()).collect();
        Map { there: names(&["header", "page", "commit"]), back: names(&["pong", "shut"]) }
    }

    #[test]
    fn a_case_is_what_seed_and_number_say() {
        assert_eq!(Case::new(7, 12, &map()), Case::new(7, 12, &map()));
        assert_ne!(Case::new(7, 12, &map()), Case::new(8, 12, &map()));
    }

    #[test]
    fn every_piece_meets_every_action() {
        let mut met = BTreeSet::new();
        // Two of the five are decisive.
        for number in 0..(3 + 2 * WEIGHT as u64) * KINDS * 4 / 3 {
            let case = Case::new(3, number, &map());
            if let Place::At { unit, .. } = case.place {
                met.insert((unit, case.action.group()));
            }
        }
        assert_eq!(met.len() as u64, 5 * KINDS);
    }

    #[test]
    fn a_case_is_told_in_words() {
        let case = Case {
            direction: Direction::Back,
            place: Place::At { unit: "pong".into(), nth: 2, inside: Inside::Behind },
            action: Action::Kill(Side::Source, 7),
            ..Case::new(1, 1, &map())
        };
        let said = "kill source, 7 ms later, behind pong #2, on the way back";
        assert_eq!(case.to_string(), said);
    }
}
