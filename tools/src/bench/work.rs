//! How fast the guest gets on with its own work, by its status lines.

use super::moved::figure;

/// How a status line begins.
const STATUS: &str = "selfcheck: up_ms=";
/// What lies less than this far apart, in ms, tells nothing of speed.
const SHORTEST_MS: f64 = 200.0;

/// How many pages the guest verified or rewrote in a millisecond of its own time, from the first to the last
/// status line in this piece of what it said; cut lines at its ends don't count. `None` if they are less than
/// 200 ms apart.
pub(super) fn rate(said: &str) -> Option<f64> {
    let whole = &said[..said.rfind('\n')?];
    // Time in ms, and pages by then.
    let status = |line: &str| {
        line.starts_with(STATUS).then_some(())?;
        let pages = figure(line, "verified")? + figure(line, "rewritten")?;
        Some((figure(line, "up_ms")?, pages))
    };
    let mut all = whole.lines().filter_map(status);
    let (from, begin) = all.next()?;
    let (to, end) = all.next_back()?;
    (to - from >= SHORTEST_MS).then(|| (end - begin) / (to - from))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(up: u64, verified: u64, rewritten: u64) -> String {
        format!(
            "selfcheck: up_ms={up} gen=1 pages=9 verified={verified} rewritten={rewritten} ticks=1\r\n"
        )
    }

    #[test]
    fn the_first_and_the_last_whole_line_count() {
        let text = line(1000, 100, 10) + &line(1100, 9, 9) + &line(1500, 500, 110);
        assert_eq!(rate(&text), Some(1.0));
        // Cut at both ends, and something else between.
        let text = format!("ok r\r\nlfcheck: up_ms=1 verified=1\r\n{text}selfcheck: ok h\r\n");
        assert_eq!(rate(&(text + "selfcheck: up_ms=9000 verified=9 rewr")), Some(1.0));
    }

    #[test]
    fn too_little_tells_nothing() {
        for text in [String::new(), line(1000, 1, 1), line(1000, 1, 1) + &line(1199, 2, 2)] {
            assert_eq!(rate(&text), None, "{text}");
        }
    }
}
