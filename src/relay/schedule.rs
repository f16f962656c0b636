//! Moves due messages of the schedule into the log: of all lanes, by whoever holds lane 0.
//!
//! Beside that lane's reader, not in it: a lane that is paused or far behind must not keep the others' messages. One
//! process at a time, or batches side by side would part the messages of a key.

use crate::db::{DbError, bounded};
use sqlx::PgConnection;
use std::time::Duration;

/// How often due messages are looked for.
const EVERY: Duration = Duration::from_millis(250);
/// Messages moved at a time.
const BATCH: i32 = 500;
/// Longest wait for a batch.
const LIMIT: Duration = Duration::from_secs(20);

const RELEASE_DUE: &str = "select oncebox.outbox_release_due($1)";

/// Every statement of this file, for the test that prepares them all.
pub(super) const STATEMENTS: &[&str] = &[RELEASE_DUE];

/// Moves what is due until the database fails.
pub(super) async fn release_due(mut conn: PgConnection) -> DbError {
    loop {
        let query = sqlx::query_scalar(RELEASE_DUE).bind(BATCH).fetch_one(&mut conn);
        match bounded("the schedule", LIMIT, query).await {
            Ok(released) if released >= BATCH => {}
            Ok::<i32, _>(_) => tokio::time::sleep(EVERY).await,
            Err(error) => return error,
        }
    }
}
