//! A relay's look at its lane: one round trip finds what was committed, opens the next window and brings its first rows.
//!
//! `oncebox.outbox_look` takes a snapshot for each of its steps; the journal's rules hold as for single statements. Its
//! rows come before the commit that makes them safe to publish: they are handed on only once that is known.

use super::journal::{LogPlace, Plan, RecordedPlan, source_stands};
use super::window::{self, LogRow};
use crate::db::{self, DbError};
use sqlx::{PgConnection, Row};
use std::time::{Duration, Instant};

/// Longest wait for a look.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of rows that a look brings at most: less than any pair of sockets keeps, so that it ends, and
/// with it the lock on the lease, also when this process is frozen.
const MAX_BYTES: i64 = 32 << 10;

const LAST_NUMBER: &str = "select case when is_called then last_value else last_value - 1 end from oncebox.outbox_seq";

const LOOK: &str = "
    select seq, message_id, topic, key, content_type, headers, body, published_at, expires_in_s,
        q, opened, s2, p2, q_top, planned_at_us, complete
    from oncebox.outbox_look($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)";

/// What a new plan records besides its window.
#[derive(Debug)]
pub struct PlanRecord {
    /// How far everything is settled.
    pub settled: LogPlace,
    /// `streams` and `bases` hold every stream.
    pub keyframe: bool,
    /// Streams whose counters are recorded.
    pub streams: Vec<String>,
    /// Offset the next message of each of them gets.
    pub bases: Vec<i64>,
}

/// What a look saw.
#[derive(Debug)]
pub struct Sight {
    /// Last value of the sequence.
    pub q: i64,
    /// The next window, if there was something for it or it was asked for anyway.
    pub opened: Option<Opened>,
}

/// A window that was opened by a look.
#[derive(Debug)]
pub struct Opened {
    /// Its plan, with what was recorded.
    pub recorded: RecordedPlan,
    /// Its first rows.
    pub rows: Vec<LogRow>,
    /// Nothing of it follows.
    pub complete: bool,
}

/// Whether nothing can have come since the newest plan. Cheaper than a [`look`]: relays without work live on it.
pub async fn nothing_new(conn: &mut PgConnection, newest: &Plan) -> Result<bool, DbError> {
    if !newest.ended_calm() {
        return Ok(false);
    }
    let query = sqlx::query_scalar(LAST_NUMBER).fetch_one(conn);
    let q: i64 = db::bounded("the last number", LIMIT, query).await?;
    Ok(q == newest.q2)
}

/// Looks beyond the newest plan, and opens the next window if anything was committed there, or if `forced`. On return
/// the window is durable as far as Postgres was asked to make commits durable, and with it every row it covers: at most
/// `max_rows` of them come along and may be published.
///
/// # Errors
/// [`DbError::LeaseLost`] when another relay holds the lane: publish nothing more. [`DbError::SourceReplaced`] when
/// the lane must move to a new source first. [`DbError::FenceBroken`] when the
/// standby did not confirm: the plan stands, but publish nothing before a later fence.
pub async fn look(
    conn: &mut PgConnection,
    epoch: i64,
    newest: &Plan,
    forced: bool,
    record: PlanRecord,
    max_rows: i64,
) -> Result<Sight, DbError> {
    let now = Instant::now();
    let query = sqlx::query(LOOK)
        .bind(newest.lane)
        .bind(epoch)
        .bind(newest.n)
        .bind(&newest.s2)
        .bind(&newest.p2)
        .bind(newest.q2)
        .bind(newest.ended_calm())
        .bind(forced)
        .bind(record.settled.n)
        .bind(record.settled.seq)
        .bind(record.keyframe)
        .bind(&record.streams)
        .bind(&record.bases)
        .bind(max_rows)
        .bind(MAX_BYTES);
    // To the end of the answer, which comes after the commit.
    let rows = match db::fenced(db::bounded("a look", LIMIT, query.fetch_all(&mut *conn))).await {
        // Somebody else appended plan n + 1.
        Err(DbError::Sqlx(error)) if db::sqlstate(&error).as_deref() == Some("23505") => {
            return Err(DbError::LeaseLost { lane: newest.lane });
        }
        other => other?,
    };
    let (last, rows) = rows.split_last().ok_or(sqlx::Error::RowNotFound)?;
    let q = last.try_get(9)?;
    match last.try_get(10)? {
        None => return Ok(Sight { q, opened: None }),
        Some(true) => {}
        Some(false) => {
            let stands = source_stands(conn, newest.source).await?;
            let lane = newest.lane;
            return Err(if stands { DbError::LeaseLost { lane } } else { DbError::SourceReplaced { lane } });
        }
    }
    let plan = Plan {
        lane: newest.lane,
        n: newest.n + 1,
        source: newest.source,
        s1: newest.s2.clone(),
        p1: newest.p2.clone(),
        q1: newest.q2,
        s2: last.try_get(11)?,
        p2: last.try_get(12)?,
        q2: q,
        q_top: last.try_get(13)?,
        planned_at_us: last.try_get(14)?,
    };
    let rows = rows.iter().map(|row| window::log_row(plan.n, now, row)).collect::<Result<_, _>>()?;
    let recorded = RecordedPlan { plan, streams: record.streams, bases: record.bases };
    Ok(Sight { q, opened: Some(Opened { recorded, rows, complete: last.try_get(15)? }) })
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[LAST_NUMBER, LOOK];
