//! The janitor: keeps log, journal and inbox from growing for ever, beside the flow and never in its way.
//!
//! [`outbox`] turns the log's ring, clears its settled slots and trims the journal. [`inbox`] folds what was accepted into
//! the ledger and clears what the dedup window has passed. Each part is a loop of its own; any number may run at once, and
//! one that is frozen or gone holds up neither producers nor consumers. Left out on purpose: decisions. What may go is
//! decided in the database, by functions that a cron job could call as well.

pub mod inbox;
pub mod outbox;

use crate::backoff::Backoff;
use crate::db::{self, DbError, SessionOptions};
use sqlx::PgConnection;
use std::future::Future;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Delay after an error.
const ERROR_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(500), cap: Duration::from_secs(30) };

/// A part's work, a round at a time.
trait Rounds {
    /// What is said of a round that failed.
    const FAILED: &'static str;
    /// Longest statement.
    const LIMIT: Duration;

    /// One round; how long to rest after it.
    fn round(&mut self, conn: &mut PgConnection) -> impl Future<Output = Result<Duration, DbError>> + Send;
}

/// Goes round after round until `shutdown` is cancelled. Errors are logged and everything is tried again.
async fn go_round<R: Rounds>(database_url: &str, mut work: R, shutdown: CancellationToken) {
    let session = SessionOptions {
        application_name: "oncebox janitor",
        statement_timeout: R::LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let mut conn = None;
    let mut failures = 0;
    while !shutdown.is_cancelled() {
        let round = async {
            let mut open = match conn.take() {
                Some(open) => open,
                None => db::connect(database_url, session).await?,
            };
            let pause = work.round(&mut open).await?;
            // Only a session that had no error is used again.
            conn = Some(open);
            Ok::<_, DbError>(pause)
        };
        let pause = tokio::select! {
            result = round => match result {
                Ok(pause) => {
                    failures = 0;
                    pause
                }
                Err(error) => {
                    failures += 1;
                    let delay = ERROR_BACKOFF.jittered(failures);
                    tracing::warn!(%error, ?delay, "{}; it is tried again", R::FAILED);
                    delay
                }
            },
            // A statement that is cut off ends in the server, or does nothing.
            () = shutdown.cancelled() => return,
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => {}
        }
    }
    if let Some(conn) = conn {
        db::close(conn).await;
    }
}
