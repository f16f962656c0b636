//! Pieces of text for a terminal: times and durations as people say them, nothing that moves the cursor, lines that fit.

use crate::saga::state::Millis;
use time::OffsetDateTime;

/// Two units at most.
pub(super) fn duration(ms: Millis) -> String {
    let ms = ms.max(0);
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{}.{} s", ms / 1_000, ms / 100 % 10),
        _ => {
            let s = ms / 1_000;
            match (s / 86_400, s / 3_600 % 24, s / 60 % 60, s % 60) {
                (0, 0, minutes, seconds) => format!("{minutes} m {seconds} s"),
                (0, hours, minutes, _) => format!("{hours} h {minutes} m"),
                (days, hours, ..) => format!("{days} d {hours} h"),
            }
        }
    }
}

/// `2026-11-23 13:40:02.120`, in UTC.
pub(super) fn date_time(at: Millis) -> String {
    let Ok(time) = OffsetDateTime::from_unix_timestamp_nanos(i128::from(at) * 1_000_000) else {
        return format!("{at} ms");
    };
    format!("{:04}-{:02}-{:02} {}", time.year(), u8::from(time.month()), time.day(), time_of_day(time))
}

fn time_of_day(time: OffsetDateTime) -> String {
    format!("{:02}:{:02}:{:02}.{:03}", time.hour(), time.minute(), time.second(), time.millisecond())
}

/// Without what would move a terminal's cursor.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// At most `width` characters, with an ellipsis if some are missing.
pub(super) fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// Lines of at most `width` characters, broken at spaces where there are any.
pub(super) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        let current = lines.last().map_or(0, |line| line.chars().count());
        if current > 0 && current + 1 + word.len() > width {
            lines.push(String::new());
        }
        while word.len() > width {
            let rest = word.split_off(width);
            let line: String = word.into_iter().collect();
            match lines.last_mut() {
                Some(last) if last.is_empty() => *last = line,
                _ => lines.push(line),
            }
            lines.push(String::new());
            word = rest;
        }
        if let Some(last) = lines.last_mut() {
            if !last.is_empty() {
                last.push(' ');
            }
            last.extend(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: durations read as people say them.
    #[test]
    fn durations_are_told() {
        for (ms, expected) in [
            (-5, "0 ms"),
            (999, "999 ms"),
            (59_999, "59.9 s"),
            (61_000, "1 m 1 s"),
            (86_399_000, "23 h 59 m"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(duration(ms), expected);
        }
    }

    /// Goal: text breaks at its spaces, and words that are too long break anyway.
    #[test]
    fn text_is_wrapped() {
        assert_eq!(wrap("a bc def", 4), ["a bc", "def"]);
        assert_eq!(wrap("abcdefghij k", 4), ["abcd", "efgh", "ij k"]);
        assert_eq!(wrap("", 4), [""]);
        assert_eq!(wrap("abcd efgh", 4), ["abcd", "efgh"]);
    }
}
