//! Which database this is, and when its lanes must count their offsets anew.
//!
//! A source is bound to one database at one point of its history. Restored, reset, copied or promoted, a database may
//! stand at an earlier point and would give offsets again that other messages have. Then a new source is made, the
//! windows recorded under the old one are finished, and [`rebase`] moves the lane. Left out on purpose: noticing that
//! all files of a cluster were put back to an earlier state, which only a relay that saw the later one can.

use super::journal::{Plan, Resume};
use crate::db::{self, DbError};
use sqlx::{PgConnection, Row};
use std::time::Duration;
use uuid::Uuid;

/// Longest wait for one of these statements, but for the move itself.
const LIMIT: Duration = Duration::from_secs(20);
/// Longest move: it may rewrite every row of a lane's log, some 20,000 a second.
const REBASE_LIMIT: Duration = Duration::from_secs(2 * 3_600);

const IDENTITY: &str = "select oncebox.outbox_identity()";

/// Which database answers here: its cluster, timeline, oid, and the oid of its table of sources.
pub async fn identity(conn: &mut PgConnection) -> Result<String, DbError> {
    db::bounded("its identity", LIMIT, sqlx::query_scalar(IDENTITY).fetch_one(conn)).await
}

/// A lane has to move.
#[derive(Debug, Clone)]
pub struct Change {
    /// Source of its newest plan.
    pub from: Uuid,
    /// Database that one belongs to.
    pub from_identity: String,
    /// Source in force.
    pub to: Uuid,
    /// This database.
    pub to_identity: String,
    /// Why.
    pub reason: String,
}

const ADOPT: &str = "select oncebox.outbox_adopt_source($1, $2)";

const CHANGE: &str = "
    select coalesce(
            (select identity from oncebox.outbox_source where source = $1 order by ordinal limit 1), 'unknown'),
        identity, reason
    from oncebox.outbox_source
    where source = $2
    order by ordinal limit 1";

const SAME_PLAN: &str = "
    select not exists (select from oncebox.outbox_plan where lane = $1 and n <= $2 order by n limit 1)
        or exists (
        select from oncebox.outbox_plan
        where lane = $1 and n = $2 and source = $3 and s2::text = $4 and p2::text = $5 and q_top = $6
            and (extract(epoch from planned_at) * 1000000)::bigint = $7
        order by n limit 1)";

/// Holds the lane's newest plan against the database it is found in, and against `known`, the newest plan this
/// process has seen of the lane. Makes a new source if there must be one; that is durable with the lane's next plan.
pub async fn check(conn: &mut PgConnection, resume: &Resume, known: Option<&Plan>) -> Result<Option<Change>, DbError> {
    let newest = &resume.plans.back().expect("a resume holds the newest plan").plan;
    let rolled_back = match known {
        Some(known) => rolled_back(conn, known, newest).await?,
        None => false,
    };
    let why = match (resume.xids_moved_back, rolled_back) {
        (true, _) => "transaction ids moved backwards",
        (false, true) => "windows that were published are missing",
        (false, false) => "",
    };
    // A source that another lane has made since is as good.
    let distrusted = (!why.is_empty()).then_some(newest.source);
    let adopt = sqlx::query_scalar(ADOPT).bind(distrusted).bind(why).fetch_one(&mut *conn);
    let source: Uuid = db::bounded("the source", LIMIT, adopt).await?;
    if source == newest.source {
        return Ok(None);
    }
    let row = sqlx::query(CHANGE).bind(newest.source).bind(source).fetch_one(conn);
    let row = db::bounded("the source", LIMIT, row).await?;
    Ok(Some(Change {
        from: newest.source,
        from_identity: row.try_get(0)?,
        to: source,
        to_identity: row.try_get(1)?,
        reason: row.try_get(2)?,
    }))
}

/// The database does not hold a plan that it once held. Plans of another source are no measure, the lane has moved; nor
/// is one as old as plans that have been cleared.
async fn rolled_back(conn: &mut PgConnection, known: &Plan, newest: &Plan) -> Result<bool, DbError> {
    if known.source != newest.source {
        return Ok(false);
    }
    if newest.n < known.n {
        return Ok(true);
    }
    let query = sqlx::query_scalar(SAME_PLAN)
        .bind(known.lane)
        .bind(known.n)
        .bind(known.source)
        .bind(&known.s2)
        .bind(&known.p2)
        .bind(known.q_top)
        .bind(known.planned_at_us);
    let same: bool = db::bounded("a known plan", LIMIT, query.fetch_one(conn)).await?;
    Ok(!same)
}

const PREPARE: &str = "select set_config('statement_timeout', $1, false)";
const REBASE: &str = "select oncebox.outbox_rebase($1, $2, $3, $4, $5)";

/// Moves a lane to the source in force. Everything of `newest` and before must be settled; `streams` and `next` are
/// the counters behind it. Returns how many rows of the log were rewritten. The session is of no other use afterwards.
///
/// On return plan `n + 1` is durable, an empty window under the new source; all else is found as after any take-over.
///
/// # Errors
/// [`DbError::LeaseLost`] when another relay holds the lane, or has moved it.
///
/// # Cancel safety
/// The server may go on, and moves the lane only if nobody else has taken it meanwhile.
pub async fn rebase(
    conn: &mut PgConnection,
    epoch: i64,
    newest: &Plan,
    streams: &[String],
    next: &[i64],
) -> Result<i64, DbError> {
    let prepare = sqlx::query(PREPARE).bind(format!("{}ms", REBASE_LIMIT.as_millis())).execute(&mut *conn);
    db::bounded("a longer limit", LIMIT, prepare).await?;
    let query = sqlx::query_scalar(REBASE).bind(newest.lane).bind(epoch).bind(newest.n).bind(streams).bind(next);
    match db::fenced(db::bounded("the move to a new source", REBASE_LIMIT, query.fetch_one(conn))).await {
        // The lease is gone, or somebody else has inserted plan n + 1.
        Err(DbError::Sqlx(error)) if matches!(db::sqlstate(&error).as_deref(), Some("OB010" | "23505")) => {
            Err(DbError::LeaseLost { lane: newest.lane })
        }
        other => other,
    }
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[IDENTITY, ADOPT, CHANGE, SAME_PLAN, PREPARE, REBASE];
