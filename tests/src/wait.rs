//! Waiting for a condition, with a deadline.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

/// How often a condition is looked at, times [`slowness`].
const STEP: Duration = Duration::from_millis(5);

/// How much longer everything takes where this runs: the lab sets it, since its processors are
/// emulated (`MINI_VMM_TEST_SLOWNESS`, a factor).
pub fn slowness() -> u32 {
    std::env::var("MINI_VMM_TEST_SLOWNESS").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

/// Waits until `condition` gives something, and panics with `what` and `state()` when it has not
/// within `seconds` (times [`slowness`]).
pub fn until<T, D: Display>(
    what: &str,
    seconds: u32,
    mut condition: impl FnMut() -> Option<T>,
    state: impl FnOnce() -> D,
) -> T {
    let deadline = Duration::from_secs(u64::from(seconds * slowness()));
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            start.elapsed() < deadline,
            "waited {} s for {what}, in vain\n{}",
            deadline.as_secs(),
            state()
        );
        thread::sleep(STEP * slowness());
    }
}
