//! Keeps the ledger up to date and the inbox within its window.
//!
//! Every step is one call of a function in a transaction of its own, so a janitor that dies or freezes between two
//! leaves nothing half-done and no lock behind.

use super::Rounds;
use crate::db::{self, DbError};
use crate::inbox::ledger;
use sqlx::PgConnection;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Longest fold or step of clearing: the first fold of an inbox that has never been folded takes all of it.
const LIMIT: Duration = Duration::from_secs(600);
/// Pause between folds: the audit is behind by this much at most.
const FOLD_EVERY: Duration = Duration::from_secs(1);
/// Pause between looks for what the window has passed. Days pass slowly; the plain leaf's rows go every minute.
const CLEAR_EVERY: Duration = Duration::from_secs(60);
/// Rows forgotten at a time: a transaction of some ten milliseconds.
const CLEAR_BATCH: i32 = 10_000;
/// Steps of clearing in a row, so that arrears do not keep folds waiting for long.
const CLEAR_STEPS: u32 = 20;

const CLEAR_BARRIER: &str = "select oncebox.saga_barrier_clear($1)";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[CLEAR_BARRIER];

/// How a janitor of the inbox runs.
#[derive(Debug, Clone)]
pub struct InboxJanitorOptions {
    /// Where the inbox is.
    pub database_url: String,
}

/// Folds and clears until `shutdown` is cancelled. Errors are logged and everything is tried again: what the janitor
/// leaves undone costs space and the audit's freshness, never effects.
pub async fn run(options: InboxJanitorOptions, shutdown: CancellationToken) {
    super::go_round(&options.database_url, Janitor { clear_at: Instant::now() }, shutdown).await;
}

struct Janitor {
    clear_at: Instant,
}

impl Rounds for Janitor {
    const FAILED: &'static str = "the inbox was not folded";
    const LIMIT: Duration = LIMIT;

    async fn round(&mut self, conn: &mut PgConnection) -> Result<Duration, DbError> {
        round(conn, &mut self.clear_at).await?;
        Ok(FOLD_EVERY)
    }
}

async fn round(conn: &mut PgConnection, clear_at: &mut Instant) -> Result<(), DbError> {
    let rows = db::bounded("a fold of the inbox", LIMIT, ledger::fold(conn)).await?;
    if rows > 0 {
        tracing::debug!(rows, "folded");
    }
    if Instant::now() < *clear_at {
        return Ok(());
    }
    for _ in 0..CLEAR_STEPS {
        let inbox = db::bounded("clearing the inbox", LIMIT, ledger::clear(conn, CLEAR_BATCH)).await?;
        let barrier = sqlx::query_scalar::<_, i64>(CLEAR_BARRIER).bind(CLEAR_BATCH).fetch_one(&mut *conn);
        let barrier = db::bounded("clearing the barrier of sagas", LIMIT, barrier).await?;
        if !inbox && barrier == 0 {
            *clear_at = Instant::now() + CLEAR_EVERY;
            return Ok(());
        }
        tracing::debug!(barrier, "forgot rows that their window has passed");
    }
    Ok(())
}
