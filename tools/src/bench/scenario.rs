//! What the guest does while it is moved.

use super::rival::Size;

/// One load of the self-checking guest (`resources/selfcheck/README.md` has its parameters).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// The guest's parameters.
    pub guest: String,
    /// How many bytes a second the source may send.
    pub bandwidth: u64,
}

/// The time between two ticks of the guest, in ms: as short as those of most kernels (`CONFIG_HZ=1000`), for what
/// a guest is kept waiting is known no better than by its ticks.
pub const TICK_MS: f64 = 1.0;
/// Bytes a second that no link reaches: no limit for anyone.
pub const UNLIMITED: u64 = 100 << 30;
/// Bytes a second of a link of 10 Gbit/s, as hosts have.
const LINK: u64 = 10_000_000_000 / 8;
/// The scenario in which the guest's own work is measured.
pub const WORK: &str = "work";

/// The names of all, those first that are run when none is named.
pub const NAMES: [&str; 4] = ["idle", "dirty", "hot", WORK];
/// How many of them are run when none is named.
pub const USUAL: usize = 2;

impl Scenario {
    /// The scenario of this name for a guest of this size. In each, no page of RAM is zero and
    /// the guest ticks 1000 times a second, so that it feels gaps of 1 ms and more.
    ///
    /// - `idle`: nothing is written but what the ticks write.
    /// - `dirty`: an eighth of memory is rewritten at 20,000 pages (78 MiB) a second.
    /// - `hot`: a quarter of memory is rewritten as fast as the guest can.
    /// - `work`: the guest never rests. In turns it rewrites 64 pages of a thirty-second of memory and verifies
    ///   64 pages of all memory; how many it gets done says how fast it is. So it pays for every page of its
    ///   working set that is protected again, and all over memory for huge pages that are split; and
    ///   its move still comes to an end, for the working set goes through the link in about a sixth of the
    ///   downtime limit. Source and destination get 10 Gbit/s: without a limit they would take 2 GiB in too
    ///   short a time to measure anything, and the host's processors from the guest, which on a host of two
    ///   processors has not one for itself as it is. It says how far it is ten times a second.
    pub fn named(name: &str, Size { memory_mib, vcpus }: Size) -> Option<Scenario> {
        let name = NAMES.into_iter().find(|known| *known == name)?;
        let load = match name {
            "idle" => "set=0,verify=0".to_owned(),
            "dirty" => format!("set={}M,rate=20000,verify=0", memory_mib / 8),
            // More pages to verify in a second than anyone can.
            WORK => format!("set={}M,rate=0,verify=1000000000,every=100", memory_mib / 32),
            _ => format!("set={}M,rate=0,verify=0", memory_mib / 4),
        };
        let bandwidth = if name == WORK { LINK } else { UNLIMITED };
        let hz = 1e3 / TICK_MS;
        let all = if vcpus > 1 { format!(",vcpus={vcpus}") } else { String::new() };
        Some(Scenario { name, guest: format!("{load},hz={hz}{all}"), bandwidth })
    }

    /// Whether the guest's own work is measured.
    pub fn works(&self) -> bool {
        self.name == WORK
    }

    /// The guest's parameters, and what the link is limited to, if it is.
    pub fn described(&self) -> String {
        match self.bandwidth {
            UNLIMITED => self.guest.clone(),
            limit => format!("{}; sent at {} MB/s at most", self.guest, limit / 1_000_000),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_scenario_and_the_load_grows_with_memory() {
        let small = Size { memory_mib: 64, vcpus: 1 };
        let large = Size { memory_mib: 2048, vcpus: 4 };
        assert!(Scenario::named("idle", large).unwrap().guest.ends_with(",vcpus=4"));
        assert!(!Scenario::named("idle", small).unwrap().guest.contains("vcpus"));
        for name in NAMES {
            assert_eq!(Scenario::named(name, small).unwrap().name, name);
        }
        assert_eq!(Scenario::named("ilde", small), None);
        assert!(Scenario::named("dirty", large).unwrap().guest.starts_with("set=256M,"));
        assert!(!Scenario::named("hot", small).unwrap().described().contains("MB/s"));
        assert!(
            Scenario::named(WORK, small)
                .unwrap()
                .described()
                .ends_with("; sent at 1250 MB/s at most")
        );
    }
}
