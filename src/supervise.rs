//! The life of a process: signals, and waiting for what it depends on.

use crate::backoff::Backoff;
use crate::db::{self, DbError, SessionOptions};
use crate::migrate;
use sqlx::PgConnection;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Delay between looks at a server that is not there yet.
const WAIT_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(250), cap: Duration::from_secs(5) };

/// Cancelled by SIGTERM or SIGINT; a second signal ends the process at once.
pub fn shutdown_on_signal() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let cancelled = token.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if cancelled.is_cancelled() {
                tracing::warn!("second signal: ending at once");
                std::process::exit(1);
            }
            tracing::info!("stopping");
            cancelled.cancel();
        }
    });
    Ok(token)
}

/// A session with a database whose schema fits this program; none if the process is to end first. Waits for a server
/// that is down or starting; any other trouble is an error.
pub async fn wait_for_database(url: &str, shutdown: &CancellationToken) -> Result<Option<PgConnection>, DbError> {
    let session = SessionOptions {
        application_name: "oncebox",
        statement_timeout: Duration::from_secs(10),
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let mut failures = 0;
    loop {
        let attempt = async {
            let mut conn = db::connect(url, session).await?;
            migrate::check(&mut conn).await?;
            Ok::<_, DbError>(conn)
        };
        match attempt.await {
            Err(error) if error.is_transient() => {
                failures += 1;
                let delay = WAIT_BACKOFF.jittered(failures);
                tracing::warn!(%error, ?delay, "waiting for the database");
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    () = shutdown.cancelled() => return Ok(None),
                }
            }
            result => return result.map(Some),
        }
    }
}
