//! Times and durations as clients write them.

use serde::Deserialize;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A time of RFC 3339, in microseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Time {
    /// Since the epoch.
    pub micros: i64,
}

/// A number and a unit, as in definitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Span {
    /// How long.
    pub ms: i64,
}

/// What is wrong with a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unreadable(&'static str);

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

const NO_TIME: Unreadable = Unreadable("must be a time as RFC 3339 writes it, such as 2026-01-15T10:00:00Z");
const NO_SPAN: Unreadable = Unreadable("must be a duration such as 500ms, 30s, 10m, 24h or 7d");

impl Span {
    /// As the standard library has it.
    pub(super) fn duration(self) -> Duration {
        Duration::from_millis(u64::try_from(self.ms).unwrap_or(0))
    }
}

impl FromStr for Span {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let unit_ms = match &text[digits..] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(NO_SPAN),
        };
        let number: i64 = text[..digits].parse().map_err(|_| NO_SPAN)?;
        number.checked_mul(unit_ms).map(|ms| Self { ms }).ok_or(NO_SPAN)
    }
}

impl TryFrom<String> for Span {
    type Error = Unreadable;

    fn try_from(text: String) -> Result<Self, Unreadable> {
        text.parse()
    }
}

impl FromStr for Time {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        parse(text.as_bytes()).map(|micros| Self { micros }).ok_or(NO_TIME)
    }
}

impl TryFrom<String> for Time {
    type Error = Unreadable;

    fn try_from(text: String) -> Result<Self, Unreadable> {
        text.parse()
    }
}

fn number(bytes: &[u8]) -> Option<i64> {
    let digit = |byte: &u8| byte.is_ascii_digit().then(|| i64::from(byte - b'0'));
    bytes.iter().try_fold(0i64, |number, byte| number.checked_mul(10)?.checked_add(digit(byte)?))
}

fn parse(text: &[u8]) -> Option<i64> {
    if text.len() < 20 || !text.is_ascii() {
        return None;
    }
    let at = |from: usize, to: usize, range: std::ops::RangeInclusive<i64>| {
        number(&text[from..to]).filter(|number| range.contains(number))
    };
    let is = |place: usize, byte: u8| (text[place].to_ascii_uppercase() == byte).then_some(());
    let (year, month) = (at(0, 4, 0..=9999)?, at(5, 7, 1..=12)?);
    let day = at(8, 10, 1..=days(year, month))?;
    let (hour, minute, second) = (at(11, 13, 0..=23)?, at(14, 16, 0..=59)?, at(17, 19, 0..=59)?);
    is(4, b'-').and(is(7, b'-')).and(is(10, b'T').or(is(10, b' '))).and(is(13, b':')).and(is(16, b':'))?;
    let rest = &text[19..];
    let (fraction, zone) = match rest.strip_prefix(b".") {
        Some(rest) => {
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let kept = digits.min(6);
            let micros = number(&rest[..kept])? * 10i64.pow(u32::try_from(6 - kept).ok()?);
            (Some(micros).filter(|_| digits > 0)?, &rest[digits..])
        }
        None => (0, rest),
    };
    let offset_minutes = match zone {
        [b'Z' | b'z'] => 0,
        // In a query `+` is a space unless it is escaped, and nobody escapes it.
        [sign @ (b'+' | b'-' | b' '), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (number(&[*h1, *h2])?, number(&[*m1, *m2])?);
            let minutes = (hours <= 23 && minutes <= 59).then_some(hours * 60 + minutes)?;
            if *sign == b'-' { -minutes } else { minutes }
        }
        _ => return None,
    };
    let minutes = (days_since_epoch(year, month, day) * 24 + hour) * 60 + minute - offset_minutes;
    Some((minutes * 60 + second) * 1_000_000 + fraction)
}

fn days(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 in the proleptic Gregorian calendar; years begin in March, so that the leap day is their last.
fn days_since_epoch(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: times of RFC 3339 are read to the microsecond, and nothing else is one.
    #[test]
    fn times_are_those_of_rfc_3339() {
        for (text, micros) in [
            ("1970-01-01T00:00:00Z", 0),
            ("1969-12-31T23:59:59.999999Z", -1),
            ("2024-02-29T12:00:00.5z", 1_709_208_000_500_000),
            ("2026-11-23T14:50:12.1234567+01:30", 1_795_440_012_123_456),
            ("2026-11-23t14:50:12 01:30", 1_795_440_012_000_000),
            ("2000-03-01T00:00:00-00:01", 951_868_860_000_000),
        ] {
            assert_eq!(text.parse::<Time>().map(|time| time.micros), Ok(micros), "{text}");
        }
        for text in [
            "",
            "yesterday",
            "2026-11-23",
            "2026-11-23T14:50:12",
            "2023-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:00:60Z",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00+1:00",
            "2026-01-01T00:00:00+24:00",
            "2026-01-01T00:00:00ZZ",
            "+026-01-01T00:00:00Z",
            "2026-01-01T00:00:0äZ",
        ] {
            assert!(text.parse::<Time>().is_err(), "{text}");
        }
    }

    /// Goal: durations are those of definitions.
    #[test]
    fn spans_have_a_unit() {
        for (text, ms) in [("500ms", 500), ("30s", 30_000), ("10m", 600_000), ("24h", 86_400_000), ("7d", 604_800_000)]
        {
            assert_eq!(text.parse::<Span>().map(|span| span.ms), Ok(ms), "{text}");
        }
        for text in ["", "30", "s", "1.5s", "-1s", "30 s", "1w", "9999999999999999999s", "999999999999999999d", "3ä"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }
}
