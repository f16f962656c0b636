//! The ledger: what each consumer has applied, as ranges of offsets, and what becomes of rows once it holds them.
//!
//! `accept` writes a row a message; [`fold`] adds the rows' places to the ledger as they come, [`clear`] takes rows away
//! once the dedup window has passed. Both are calls of SQL functions that a cron job can make as well. Left out on
//! purpose: when they run, which is the janitor's matter.

use sqlx::PgConnection;

const FOLD: &str = "select oncebox.inbox_fold()";

/// Adds every row that is committed and not in the ledger yet; returns how many. Waits for another caller's fold. A
/// transaction of its own unless the caller is in one; idle, it takes no lock and writes nothing.
///
/// # Errors
/// The database's; nothing is folded then.
pub async fn fold(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(FOLD).fetch_one(conn).await
}

const CLEAR: &str = "select oncebox.inbox_clear($1)";

/// Forgets one leaf, or at most `max_rows` rows, that the dedup window has passed, after having folded what was in it;
/// true if it did, and there may be more. Must not share a transaction with an accept. Waits for nobody longer than
/// 100 ms: what is locked is another call's.
///
/// # Errors
/// The database's; nothing is forgotten then.
pub async fn clear(conn: &mut PgConnection, max_rows: i32) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(CLEAR).bind(max_rows).fetch_one(conn).await
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[FOLD, CLEAR];
