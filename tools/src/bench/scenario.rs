//! What the guest does while it is moved.

/// One load of the self-checking guest (`resources/selfcheck/README.md` has its parameters).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// The guest's parameters.
    pub guest: String,
}

/// The names of all, those first that are run when none is named.
pub const NAMES: [&str; 3] = ["idle", "dirty", "hot"];
/// How many of them are run when none is named.
pub const USUAL: usize = 2;

impl Scenario {
    /// The scenario of this name for a guest of `memory_mib`. In each, no page of RAM is zero and
    /// the guest ticks 250 times a second, so that it feels gaps of 4 ms and more.
    ///
    /// - `idle`: nothing is written but what the ticks write.
    /// - `dirty`: an eighth of memory is rewritten at 20,000 pages (78 MiB) a second.
    /// - `hot`: a quarter of memory is rewritten as fast as the guest can.
    pub fn named(name: &str, memory_mib: u64) -> Option<Scenario> {
        let name = NAMES.into_iter().find(|known| *known == name)?;
        let load = match name {
            "idle" => "set=0".to_owned(),
            "dirty" => format!("set={}M,rate=20000", memory_mib / 8),
            _ => format!("set={}M,rate=0", memory_mib / 4),
        };
        Some(Scenario { name, guest: format!("{load},verify=0,hz=250") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_scenario_and_the_load_grows_with_memory() {
        for name in NAMES {
            assert_eq!(Scenario::named(name, 64).unwrap().name, name);
        }
        assert_eq!(Scenario::named("ilde", 64), None);
        assert!(Scenario::named("dirty", 2048).unwrap().guest.starts_with("set=256M,"));
    }
}
