//! Logs, on stderr.

use crate::config::ConfigError;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Said whatever the filter: the client library logs whole messages when the broker returns them, and payloads are
/// never logged; its errors we report ourselves.
const ALWAYS: &str = "lapin=off,refinery_core=warn,sqlx=warn";

/// Starts logging by a filter such as `info` or `oncebox=debug`.
pub fn start(filter: &str) -> Result<(), ConfigError> {
    let filter = EnvFilter::try_new(format!("{filter},{ALWAYS}"))
        .map_err(|error| ConfigError { setting: "log".to_owned(), reason: format!("\"{filter}\": {error}") })?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A second start in one process, as in tests, keeps the first.
    let _ = logs.try_init();
    Ok(())
}
