//! One move of a guest, and what it came to.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::rival::{Kind, Rival};
use super::scenario::TICK_MS;
use super::vm::Vm;
use crate::error::{Error, Result};

/// How long the guest may stand still, in ms: QEMU's default.
const DOWNTIME_LIMIT: u64 = 300;

/// How long a guest that has arrived may take until it ticks.
const PATIENCE: Duration = Duration::from_secs(10);

/// How a guest is to be moved.
pub(super) struct Order<'a> {
    /// The destination listens at this port of loopback.
    pub(super) port: u16,
    /// The source may send so many bytes a second.
    pub(super) bandwidth: u64,
    /// Called again and again with source, destination, and what the source's `query-migrate` says.
    pub(super) meanwhile: &'a mut dyn FnMut(&Vm, &Vm, &Value) -> Result<()>,
}

/// What a move came to; times in ms.
pub(super) struct Moved {
    pub(super) total: f64,
    pub(super) bytes: f64,
    pub(super) downtime: f64,
    pub(super) downtime_destination: Option<f64>,
    /// The guest's longest time between two ticks, the whole move included.
    pub(super) gap: f64,
    /// That between the two between which it was handed over.
    pub(super) hand_over: HandOver,
    /// Side, step and its time: what a mini-vmm tells of the standstill, in order.
    pub(super) steps: Vec<(&'static str, String, f64)>,
}

impl Moved {
    /// By how many ms a figure of the downtime contradicts the gap between the two of the guest's ticks between which
    /// it was handed over, if that is known.
    ///
    /// The first tick after a standstill comes at once if it was due meanwhile, or when what was left of its
    /// period is over, if the timer stood still as well. So a guest that stood still for D, and was delayed
    /// by nothing else, sees a gap between D and D plus one period; a figure less than the gap by up to a
    /// period is right for all that can be seen. What is more than the gap, or less than the gap without a
    /// period, is off by the difference. Whatever else kept the guest waiting then counts as well, so on a busy
    /// machine this is too high.
    pub(super) fn off(&self, downtime: f64) -> Option<f64> {
        let HandOver::Gap(gap) = self.hand_over else { return None };
        Some((downtime - gap).max(gap - TICK_MS - downtime).max(0.0))
    }
}

/// The QMP commands of a migration to this address, with so many bytes a second at most.
pub(super) fn orders(uri: &str, bandwidth: u64) -> [(&'static str, Value); 2] {
    let parameters = json!({ "max-bandwidth": bandwidth, "downtime-limit": DOWNTIME_LIMIT });
    [("migrate-set-parameters", parameters), ("migrate", json!({ "uri": uri }))]
}

/// Moves a guest that is ready to a destination that listens, and ends its source. Both are connected. What came
/// of it counts if the guest finds all of its memory right ([`Arrival`](super::arrival::Arrival)).
pub(super) fn move_guest(
    mut source: Vm,
    destination: &mut Vm,
    rival: &Rival,
    order: Order<'_>,
) -> Result<Moved> {
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    // From here on the guest's longest gap counts; its answer says that it has heard.
    source.say(b'r')?;
    let from = source.say(b's')?;
    source.line(from, "up_ms=")?;
    let own = rival.several().into_iter().chain(rival.own_parameters());
    let uri = rival.uri(&order.port.to_string());
    for (command, arguments) in own.chain(orders(&uri, order.bandwidth)) {
        source.ask(command, arguments)?;
    }
    let info = source.migrated(&mut |source, info| (order.meanwhile)(source, destination, info))?;
    let mut steps = Vec::new();
    let mut downtime = number(&info["downtime"]);
    if rival.kind == Kind::MiniVmm {
        let report = source.ask("x-mini-vmm-status", json!({}))?["report"].take();
        steps.extend(steps_of("source", &report));
        // The same figure as `mini-vmm migrate` prints it; `query-migrate` has whole ms, as QEMU does.
        downtime = report["downtime-ms"].as_f64().ok_or_else(|| Error::Bench {
            what: "a source that has given its guest away says for how long that stood still"
                .to_owned(),
            found: report.to_string(),
        })?;
    }
    // Asked before the source's process ends: what the kernel has to do to take back its memory would be felt by
    // the guest on this host only.
    let asked = Instant::now();
    let (gaps, hand_over) = loop {
        let gaps = gaps_in(&destination.told(b'l')?);
        match source.stopped().and_then(|stopped| gap_around(&gaps, stopped)) {
            Some(hand_over) => break (gaps, hand_over),
            // One that stood still between a tick and its look at the serial port answers before it has ticked again.
            None if asked.elapsed() < PATIENCE => {}
            None => {
                return Err(Error::Bench {
                    what: format!(
                        "{}: the guest's longest gaps are of the time of its move",
                        rival.name
                    ),
                    found: format!("its source stopped it at {:?} µs; {gaps:?}", source.stopped()),
                });
            }
        }
    };
    let gap = gaps.iter().map(|(gap, _)| gap / 1e3).fold(0.0, f64::max);
    drop(source);
    let downtime_destination = match rival.kind {
        Kind::MiniVmm => {
            let report = destination.ask("x-mini-vmm-status", json!({}))?["report"].take();
            steps.extend(steps_of("destination", &report));
            Some(number(&report["downtime-ms"]))
        }
        Kind::Qemu => None,
    };
    Ok(Moved {
        total: number(&info["total-time"]),
        bytes: number(&info["ram"]["transferred"]),
        downtime,
        downtime_destination,
        gap,
        hand_over,
        steps,
    })
}

/// What a guest's longest gaps tell of that in which a moment lies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum HandOver {
    /// Its length, in ms.
    Gap(f64),
    /// So many others were longer that it is not among them; the shortest of those, in ms.
    Short(f64),
}

/// The longest gaps that a guest tells: how long, and when it ended, in µs.
fn gaps_in(told: &str) -> Vec<(f64, f64)> {
    // A status line that was begun before the order is no such line.
    told.lines()
        .filter_map(|line| Some((figure(line, "gap_us")?, figure(line, "end_us")?)))
        .collect()
}

/// The gap in which this moment lies, in µs since 1970. None if all gaps are of another time.
fn gap_around(gaps: &[(f64, f64)], moment: u64) -> Option<HandOver> {
    let moment = moment as f64;
    if let Some((gap, _)) = gaps.iter().find(|(gap, end)| (end - gap..=*end).contains(&moment)) {
        return Some(HandOver::Gap(gap / 1e3));
    }
    let before = gaps.iter().any(|(_, end)| *end < moment && *end > 0.0);
    let after = gaps.iter().any(|(_, end)| *end > moment);
    let shortest = gaps.iter().map(|(gap, _)| gap / 1e3).fold(f64::INFINITY, f64::min);
    (before && after).then_some(HandOver::Short(shortest))
}

/// The steps of the standstill in a side's report.
fn steps_of(side: &'static str, report: &Value) -> Vec<(&'static str, String, f64)> {
    let all = report["downtime-steps"].as_array().into_iter().flatten();
    all.filter_map(|step| Some((side, step["step"].as_str()?.to_owned(), step["ms"].as_f64()?)))
        .collect()
}

/// The number behind `key=` in a line of the guest.
pub(super) fn figure(line: &str, key: &str) -> Option<f64> {
    line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_downtime_is_right_within_a_tick_below_the_gap() {
        let moved = Moved {
            total: 0.0,
            bytes: 0.0,
            downtime: 0.0,
            downtime_destination: None,
            gap: 12.0,
            hand_over: HandOver::Gap(10.0),
            steps: vec![],
        };
        for (less, off) in
            [(0.0, 0.0), (TICK_MS, 0.0), (TICK_MS / 2.0, 0.0), (TICK_MS + 0.5, 0.5), (-2.0, 2.0)]
        {
            assert_eq!(moved.off(10.0 - less), Some(off), "less than the gap by {less}");
        }
        let moved = Moved { hand_over: HandOver::Short(3.0), ..moved };
        assert_eq!(moved.off(10.0), None);
    }

    #[test]
    fn the_hand_over_is_found_by_when_the_source_stopped_it() {
        let told = "gap_us=9 max_gap_us=9100\r\nselfcheck: gap_us=5100 end_us=1795356000100000\r\n\
                    selfcheck: gap_us=4000 end_us=1795356000204000\r\n\
                    selfcheck: gap_us=2100 end_us=1795356000300000\r\nselfcheck: ok l\r\n";
        let gaps = gaps_in(told);
        assert_eq!(gaps.len(), 3);
        let at = |micros: u64| gap_around(&gaps, 1_795_356_000_000_000 + micros);
        assert_eq!(at(203_999), Some(HandOver::Gap(4.0)));
        assert_eq!(at(200_000), Some(HandOver::Gap(4.0)));
        // Between two that are told, and before and behind all of them.
        assert_eq!(at(199_999), Some(HandOver::Short(2.1)));
        assert_eq!((at(90_000), at(300_001)), (None, None));
        assert_eq!(gap_around(&[(0.0, 0.0)], 1), None);
    }

    #[test]
    fn steps_are_read_from_a_report() {
        let report = json!({ "downtime-steps": [{ "step": "pause", "ms": 0.5 }, { "step": 1 }] });
        assert_eq!(steps_of("source", &report), [("source", "pause".to_owned(), 0.5)]);
        assert!(steps_of("source", &Value::Null).is_empty());
    }

    #[test]
    fn a_figure_is_found_by_its_whole_key() {
        let line = "selfcheck: up_ms=20 gap_us=10 max_gap_us=1211 guest_gap_us=7";
        assert_eq!(figure(line, "max_gap_us"), Some(1211.0));
        assert_eq!(figure(line, "gap_us"), Some(10.0));
        assert_eq!(figure(line, "gap"), None);
    }
}
