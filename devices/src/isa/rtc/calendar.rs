//! Seconds since 1970 as a date of the proleptic Gregorian calendar, and back.

const SECONDS_PER_DAY: i64 = 86_400;

/// A moment in UTC. Values outside of their range are carried over by
/// [`to_unix`](DateTime::to_unix): the 31st of April is the 1st of May.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: i64,
    /// From 1.
    pub(super) month: u8,
    /// From 1.
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
    /// From 0, which is Sunday. Not looked at by [`to_unix`](DateTime::to_unix).
    pub(super) weekday: u8,
}

/// Days from 1970-01-01 to the first day of a month (from 0, any number of them). Years are
/// counted from March, so that the leap day is the last.
fn days_to_month(year: i64, month0: i64) -> i64 {
    let months = year * 12 + month0 - 2;
    let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leap_days + (month * 153 + 2) / 5 - 719_468
}

impl DateTime {
    pub(super) fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(SECONDS_PER_DAY);
        let of_day = seconds.rem_euclid(SECONDS_PER_DAY);
        // A guess that is never too late and at most a year and a day too early.
        let mut year = 1970 + (days * 400).div_euclid(146_097) - 1;
        while days_to_month(year + 1, 0) <= days {
            year += 1;
        }
        let month0 = (0..12).rev().find(|m| days_to_month(year, *m) <= days).unwrap_or(0);
        Self {
            year,
            month: (month0 + 1) as u8,
            day: (days - days_to_month(year, month0) + 1) as u8,
            hour: (of_day / 3600) as u8,
            minute: (of_day / 60 % 60) as u8,
            second: (of_day % 60) as u8,
            weekday: (days + 4).rem_euclid(7) as u8,
        }
    }

    pub(super) fn to_unix(self) -> i64 {
        let days = days_to_month(self.year, i64::from(self.month) - 1) + i64::from(self.day) - 1;
        let hours = days * 24 + i64::from(self.hour);
        (hours * 60 + i64::from(self.minute)) * 60 + i64::from(self.second)
    }
}

/// The first second from `from` on at which the time of day has the given parts; `None` matches
/// every value. No such second: `None`.
pub(super) fn next_match(
    from: i64,
    hour: Option<u8>,
    minute: Option<u8>,
    second: Option<u8>,
) -> Option<i64> {
    let matches = |part: Option<u8>, value: i64| part.is_none_or(|p| i64::from(p) == value);
    let end = from.checked_add(SECONDS_PER_DAY + 3600)?;
    let mut at = from;
    while at < end {
        let of_day = at.rem_euclid(SECONDS_PER_DAY);
        if !matches(hour, of_day / 3600) {
            at += 3600 - of_day % 3600;
        } else if !matches(minute, of_day / 60 % 60) {
            at += 60 - of_day % 60;
        } else if !matches(second, of_day % 60) {
            at += 1;
        } else {
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        let date = |s| {
            let t = DateTime::from_unix(s);
            assert_eq!(t.to_unix(), s);
            (t.year, t.month, t.day, t.hour, t.minute, t.second, t.weekday)
        };
        assert_eq!(date(0), (1970, 1, 1, 0, 0, 0, 4));
        assert_eq!(date(-1), (1969, 12, 31, 23, 59, 59, 3));
        assert_eq!(date(951_782_400), (2000, 2, 29, 0, 0, 0, 2));
        assert_eq!(date(1_000_000_000), (2001, 9, 9, 1, 46, 40, 0));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 0, 0, 0, 1));
        assert_eq!(date(0x6b00_a9cd), (2026, 11, 20, 20, 13, 1, 5));
    }

    #[test]
    fn every_day_of_eight_centuries_round_trips() {
        let mut last = (0, 0, 0);
        for day in -146_097..146_097 {
            let t = DateTime::from_unix(day * SECONDS_PER_DAY);
            assert_eq!(t.to_unix(), day * SECONDS_PER_DAY);
            assert_ne!((t.year, t.month, t.day), last);
            last = (t.year, t.month, t.day);
        }
    }

    #[test]
    fn alarms_match() {
        assert_eq!(next_match(10, None, None, None), Some(10));
        assert_eq!(next_match(10, None, None, Some(9)), Some(69));
        assert_eq!(next_match(7200, Some(1), Some(2), Some(3)), Some(86_400 + 3723));
        assert_eq!(next_match(3723, Some(1), Some(2), Some(3)), Some(3723));
        assert_eq!(next_match(0, Some(24), None, None), None);
        assert_eq!(next_match(0, None, None, Some(60)), None);
    }
}
