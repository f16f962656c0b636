//! The tables of sagas: states are read for a decision, and what was decided is written, each in one statement.
//!
//! ```text
//! due → load → decide → apply → commit
//! ```
//!
//! [`due`] says what there is to do, [`load`] locks sagas and reads them, [`apply`] writes transitions: states,
//! compensations, history, and commands into the outbox. All three work on many sagas at once and in the caller's
//! transaction. [`act`](act::act) is one whole such transaction, for an operator; [`definitions`] are what sagas
//! follow. Triggers refuse what no transition may do, so a mistake here ends in an error, not in a broken saga. Left out
//! on purpose: starting sagas and sending signals, which are SQL functions that apps call in transactions of their own.

pub mod act;
pub mod definitions;
mod rows;

pub use act::{ActError, Acted, act};
pub use definitions::{Defined, DefinitionError, Definitions, Undefined, define, undefine};

use super::decide::{Limits, Transition};
use super::state::{Event, Millis, Saga, Signal};
use crate::db::{self, DbError};
use sqlx::PgConnection;
use sqlx::types::Json;
use std::time::Duration;
use uuid::{NoContext, Timestamp, Uuid};

/// Longest wait for one statement: many times what a batch takes, and what the locks of another one may take.
const LIMIT: Duration = Duration::from_secs(30);

const NOW: &str = "select floor(extract(epoch from clock_timestamp()) * 1000)::bigint";

/// The time by the database's clock, which every time of a saga is.
pub async fn now(conn: &mut PgConnection) -> Result<Millis, DbError> {
    db::bounded("the time", LIMIT, sqlx::query_scalar(NOW).fetch_one(conn)).await
}

const LIMITS: &str = "select s.payload_limit_bytes from oncebox.setting as s where s.only_row";

/// What the database allows.
pub async fn limits(conn: &mut PgConnection) -> Result<Limits, DbError> {
    let payload_bytes: i32 = db::bounded("the settings", LIMIT, sqlx::query_scalar(LIMITS).fetch_one(conn)).await?;
    Ok(Limits { payload_bytes: usize::try_from(payload_bytes).unwrap_or_default() })
}

/// A saga that there is something to do for.
#[derive(Debug, Clone, PartialEq)]
pub struct Due {
    /// Which saga.
    pub id: Uuid,
    /// Its time has come: [`Event::Due`].
    pub due: bool,
    /// Signals that nobody has seen, the oldest first: [`Event::Signal`] each.
    pub signals: Vec<Signal>,
}

const DUE: &str = "select d.id, d.due, d.signals from oncebox.saga_due($1) as d order by d.id";

/// Locks `at_most` sagas for which there is something to do, until the transaction ends; those that another transaction
/// has locked are passed over.
pub async fn due(conn: &mut PgConnection, at_most: i32) -> Result<Vec<Due>, DbError> {
    let query = sqlx::query_as::<_, (Uuid, bool, Json<Vec<Signal>>)>(DUE).bind(at_most);
    let rows = db::bounded("the sagas that are due", LIMIT, query.fetch_all(conn)).await?;
    Ok(rows.into_iter().map(|(id, due, Json(signals))| Due { id, due, signals }).collect())
}

const LOAD: &str = "select l.state from oncebox.saga_load($1) as l order by l.id";

/// Locks sagas until the transaction ends, and reads them, in the order of their ids; those there are not are missing.
/// Their signals are those kept: one that is new is an event first.
pub async fn load(conn: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<Saga>, DbError> {
    let query = sqlx::query_scalar::<_, Json<Saga>>(LOAD).bind(ids);
    let rows = db::bounded("sagas", LIMIT, query.fetch_all(conn)).await?;
    Ok(rows.into_iter().map(|Json(saga)| saga).collect())
}

/// A transition to be written.
#[derive(Debug)]
pub struct Applied<'a> {
    /// The saga as it was loaded.
    pub before: &'a Saga,
    /// What became of it.
    pub transition: Transition,
    /// By what.
    pub event: &'a Event,
    /// When.
    pub at: Millis,
    /// The message that brought the event.
    pub cause: Option<Uuid>,
}

const APPLY: &str = "select oncebox.saga_apply($1)";

/// Writes transitions, one a saga at most. Each command gets a fresh UUIDv7, which is its step's `message_id` then, in
/// `applied` as well; it is published when the transaction commits.
///
/// # Errors
/// SQLSTATE 40001 when a saga has moved on since it was loaded, 23514 when a trigger forbids a transition: nothing is
/// written then, and the transaction can only be rolled back.
pub async fn apply(conn: &mut PgConnection, applied: &mut [Applied<'_>]) -> Result<(), DbError> {
    if applied.is_empty() {
        return Ok(());
    }
    let ids: Vec<Vec<Uuid>> = applied.iter_mut().map(give_ids).collect();
    let rows: Vec<rows::Row<'_>> =
        applied.iter().zip(&ids).map(|(applied, ids)| rows::Row::new(applied, ids)).collect();
    let query = sqlx::query(APPLY).bind(Json(rows));
    db::bounded("transitions of sagas", LIMIT, query.execute(conn)).await?;
    Ok(())
}

/// A message id for each command, noted in its step.
fn give_ids(applied: &mut Applied<'_>) -> Vec<Uuid> {
    let at_ms = u64::try_from(applied.at).unwrap_or_default();
    let nanos = u32::try_from(at_ms % 1_000 * 1_000_000).unwrap_or_default();
    let Transition { saga, commands, .. } = &mut applied.transition;
    let give = |command: &super::state::Command| {
        let id = Uuid::new_v7(Timestamp::from_unix(NoContext, at_ms / 1_000, nanos));
        if let Some(step) = saga.steps.iter_mut().find(|step| step.id == command.step) {
            step.message_id = Some(id);
        }
        id
    };
    commands.iter().map(give).collect()
}

const KEEP_SIGNAL: &str = "select oncebox.saga_keep_signal($1, $2)";

/// Sets a new signal aside that the saga refuses, so that [`due`] does not bring it again.
pub async fn keep_signal(conn: &mut PgConnection, id: Uuid, name: &str) -> Result<(), DbError> {
    let query = sqlx::query(KEEP_SIGNAL).bind(id).bind(name);
    db::bounded("a signal", LIMIT, query.execute(conn)).await?;
    Ok(())
}

const BROKEN: &str = "select oncebox.saga_history_broken($1)";

/// The first row of a saga's history that was changed, is out of its place or follows one that is missing; the saga's
/// own `seq` if its newest row is missing. None: every row is as it was written.
pub async fn broken_at(conn: &mut PgConnection, id: Uuid) -> Result<Option<i64>, DbError> {
    db::bounded("the history of a saga", LIMIT, sqlx::query_scalar(BROKEN).bind(id).fetch_one(conn)).await
}

const PURGE: &str = "select oncebox.saga_purge($1)";

/// Removes sagas, rows of the barrier and requests past their retention, `at_most` of each; how many rows.
pub async fn purge(conn: &mut PgConnection, at_most: i32) -> Result<i64, DbError> {
    db::bounded("the removal of old sagas", LIMIT, sqlx::query_scalar(PURGE).bind(at_most).fetch_one(conn)).await
}

/// The statements of this file, for a test that prepares them.
pub const STATEMENTS: &[&str] = &[NOW, LIMITS, DUE, LOAD, APPLY, KEEP_SIGNAL, BROKEN, PURGE];
