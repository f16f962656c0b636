//! `--since`: a duration before now, or a time as Postgres reads it.

use crate::config::ConfigError;
use crate::db::{self, DbError};
use sqlx::PgConnection;
use std::time::Duration;

/// Longest wait for the answer.
const LIMIT: Duration = Duration::from_secs(10);

// The database's clock stamped what is looked for.
const AGO: &str = "select extract(epoch from clock_timestamp() - make_interval(secs => $1))::float8";
const AT: &str = "select extract(epoch from $1::text::timestamptz)::float8";

/// Seconds since the Unix epoch.
///
/// # Errors
/// [`ConfigError`] when it is neither.
pub(super) async fn resolve(conn: &mut PgConnection, text: &str) -> anyhow::Result<f64> {
    let query = match seconds(text) {
        Some(seconds) => sqlx::query_scalar(AGO).bind(seconds),
        None => sqlx::query_scalar(AT).bind(text),
    };
    let wrong = || {
        let reason = format!("\"{text}\" is neither a duration (90s, 15m, 2h, 3d) nor a time (2026-01-31T08:00:00Z)");
        ConfigError { setting: "--since".to_owned(), reason }
    };
    match db::bounded("the time", LIMIT, query.fetch_one(conn)).await {
        Ok(at) if f64::is_finite(at) => Ok(at),
        Ok(_) => Err(wrong().into()),
        // Invalid text, or a field out of range.
        Err(DbError::Sqlx(error)) if db::sqlstate(&error).is_some_and(|code| code.starts_with("22")) => {
            Err(wrong().into())
        }
        Err(error) => Err(error.into()),
    }
}

/// A duration of the command line: `250ms`, `90s`, `15m`, `2h`, `3d`.
pub(super) fn seconds(text: &str) -> Option<f64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let unit_s = match &text[digits..] {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return None,
    };
    // A century: what lies farther back is a typing error, and Postgres' intervals have their limits.
    text[..digits].parse().ok().map(|number: f64| number * unit_s).filter(|seconds| *seconds <= 3.2e9)
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[AGO, AT];

#[cfg(test)]
mod tests {
    use super::seconds;

    /// Goal: durations are told from times.
    #[test]
    fn durations_are_told_from_times() {
        assert_eq!(seconds("90s"), Some(90.0));
        assert_eq!(seconds("3d"), Some(259_200.0));
        assert_eq!(seconds("250ms"), Some(0.25));
        for time in ["2026-01-31T08:00:00Z", "2026-01-31", "yesterday", "5", "s", "", "5 m", "99999999999d"] {
            assert_eq!(seconds(time), None, "{time}");
        }
    }
}
