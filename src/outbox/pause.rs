//! Pauses: what operators have stopped, by topic pattern, lane, or everything.
//!
//! `oncebox.pause` and `oncebox.resume` make and lift them, in SQL; relays read them about once a second. Patterns
//! are those of an AMQP topic exchange.

use super::held::LIMIT;
use crate::db::{self, DbError};
use sqlx::{PgConnection, Row};

/// A pause in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// Never used again.
    pub id: i64,
    /// Which topics; none: everything of the lane.
    pub topic_pattern: Option<String>,
    /// Which lane; none: every lane.
    pub lane: Option<i16>,
}

const IN_FORCE: &str = "
    select id, topic_pattern, lane from oncebox.outbox_pause
    where lane is null or lane = $1
    order by id";

/// The pauses that concern a lane.
pub async fn in_force(conn: &mut PgConnection, lane: i16) -> Result<Vec<Pause>, DbError> {
    let rows = db::bounded("the pauses", LIMIT, sqlx::query(IN_FORCE).bind(lane).fetch_all(conn)).await?;
    let pause = |row: &sqlx::postgres::PgRow| {
        Ok(Pause { id: row.try_get(0)?, topic_pattern: row.try_get(1)?, lane: row.try_get(2)? })
    };
    rows.iter().map(pause).collect()
}

const HOLD_PAUSED: &str = "
    update oncebox.outbox_held as h
    set reason = 'paused', next_at = 'infinity', changed_at = clock_timestamp()
    from (select lane from oncebox.outbox_lease where lane = $1 and epoch = $2 for update) as lease
    where h.lane = lease.lane and h.state = 'waiting' and h.seq = any($3)";

/// Held messages wait until their topics are resumed.
pub async fn hold_paused(conn: &mut PgConnection, lane: i16, epoch: i64, seqs: &[i64]) -> Result<(), DbError> {
    let query = sqlx::query(HOLD_PAUSED).bind(lane).bind(epoch).bind(seqs);
    db::bounded("holding paused messages", LIMIT, query.execute(conn)).await?;
    Ok(())
}

const RELEASE_RESUMED: &str = "
    update oncebox.outbox_held as h
    set next_at = clock_timestamp(), changed_at = clock_timestamp()
    from (select lane from oncebox.outbox_lease where lane = $1 and epoch = $2 for update) as lease
    where h.lane = lease.lane and h.state = 'waiting' and h.reason = 'paused' and h.next_at = 'infinity'
        and not exists (
            select from oncebox.outbox_pause as p
            where coalesce(p.lane, h.lane) = h.lane and oncebox.topic_matches(p.topic_pattern, h.topic))";

/// Held messages whose topics no pause matches any more are due now; returns how many.
pub async fn release_resumed(conn: &mut PgConnection, lane: i16, epoch: i64) -> Result<u64, DbError> {
    let query = sqlx::query(RELEASE_RESUMED).bind(lane).bind(epoch);
    Ok(db::bounded("releasing resumed messages", LIMIT, query.execute(conn)).await?.rows_affected())
}

const PAUSE: &str = "select oncebox.pause($1, $2, $3, coalesce($4, session_user))";

/// Pauses topics, a lane or everything; returns the pause's id, also of one that was there before.
pub async fn pause(
    conn: &mut PgConnection,
    topic_pattern: Option<&str>,
    lane: Option<i32>,
    why: &str,
    by: Option<&str>,
) -> Result<i64, DbError> {
    let query = sqlx::query_scalar(PAUSE).bind(topic_pattern).bind(lane).bind(why).bind(by);
    db::bounded("the pause", LIMIT, query.fetch_one(conn)).await
}

const RESUME: &str = "select oncebox.resume($1, $2)";

/// Lifts the pause that was made with the same pattern and lane; returns how many that were.
pub async fn resume(conn: &mut PgConnection, topic_pattern: Option<&str>, lane: Option<i32>) -> Result<i32, DbError> {
    let query = sqlx::query_scalar(RESUME).bind(topic_pattern).bind(lane);
    db::bounded("the end of the pause", LIMIT, query.fetch_one(conn)).await
}

const RESUME_ALL: &str = "select oncebox.resume_all()";

/// Lifts every pause; returns how many there were.
pub async fn resume_all(conn: &mut PgConnection) -> Result<i32, DbError> {
    db::bounded("the end of the pauses", LIMIT, sqlx::query_scalar(RESUME_ALL).fetch_one(conn)).await
}

/// A pause as operators see it.
#[derive(Debug, Clone, PartialEq, serde::Serialize, utoipa::ToSchema)]
#[schema(as = Pause)]
pub struct PauseEntry {
    /// Its id.
    pub id: i64,
    /// Which topics; none: everything of the lane.
    pub topic: Option<String>,
    /// Which lane; none: every lane.
    pub lane: Option<i16>,
    /// Since when, RFC 3339.
    pub paused_at: String,
    /// By whom.
    pub paused_by: String,
    /// Why.
    pub why: Option<String>,
    /// Messages that are held back by it one by one; a lane or everything is held back in the log instead.
    pub held: i64,
}

const LIST: &str = "
    select p.id, p.topic_pattern, p.lane, to_char(p.paused_at at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),
        p.paused_by, p.why,
        (select count(*) from oncebox.outbox_held as h
        where h.state = 'waiting' and h.reason = 'paused' and coalesce(p.lane, h.lane) = h.lane
            and oncebox.topic_matches(p.topic_pattern, h.topic))
    from oncebox.outbox_pause as p
    order by p.id";

/// Every pause in force, oldest first.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<PauseEntry>, DbError> {
    let rows = db::bounded("the pauses", LIMIT, sqlx::query(LIST).fetch_all(conn)).await?;
    let entry = |row: &sqlx::postgres::PgRow| {
        Ok(PauseEntry {
            id: row.try_get(0)?,
            topic: row.try_get(1)?,
            lane: row.try_get(2)?,
            paused_at: row.try_get(3)?,
            paused_by: row.try_get(4)?,
            why: row.try_get(5)?,
            held: row.try_get(6)?,
        })
    };
    rows.iter().map(entry).collect()
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[IN_FORCE, HOLD_PAUSED, RELEASE_RESUMED, PAUSE, RESUME, RESUME_ALL, LIST];
