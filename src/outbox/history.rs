//! The journal read backwards in time: which windows held which messages, for those who send or name them again.
//!
//! Read only, and without the lease: what is settled no relay changes any more. Plans and rows that are no longer
//! retained leave holes, which the reader must expect.

use super::journal::{LogPlace, RecordedPlan, recorded};
use crate::db::{self, DbError};
use sqlx::{PgConnection, Row};
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

/// Longest wait for one of these statements.
const LIMIT: Duration = Duration::from_secs(60);

/// How far a lane goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Number of the newest window.
    pub newest: i64,
    /// Everything up to here is confirmed, held or parked.
    pub settled: LogPlace,
    /// The source of what is published now.
    pub source: Uuid,
}

// The lease may know more than the newest plan.
const EXTENT: &str = "
    select p.n, s.n, s.seq, p.source
    from (
        select n, source, settled_n, settled_seq from oncebox.outbox_plan where lane = $1 order by n desc limit 1
    ) as p
    join oncebox.outbox_lease as l on l.lane = $1
    cross join lateral (
        select n, seq from (values (p.settled_n, p.settled_seq), (l.settled_n, l.settled_seq)) as v (n, seq)
        order by n desc, seq desc limit 1
    ) as s";

/// How far the lane goes; nothing if there is no such lane.
pub async fn extent(conn: &mut PgConnection, lane: i16) -> Result<Option<Extent>, DbError> {
    let query = sqlx::query(EXTENT).bind(lane).fetch_optional(conn);
    let row = db::bounded("the newest plan", LIMIT, query).await?;
    row.map(|row| {
        Ok(Extent {
            newest: row.try_get(0)?,
            settled: LogPlace { n: row.try_get(1)?, seq: row.try_get(2)? },
            source: row.try_get(3)?,
        })
    })
    .transpose()
}

// Counters only rise, so the newest that has passed none of the wanted offsets is the nearest.
const BY_OFFSETS: &str = "
    select k.n from oncebox.outbox_plan as k
    where k.lane = $1 and k.keyframe and k.source = $2 and not exists (
        select from unnest($3::text[], $4::bigint[]) as w (stream, first)
        join unnest(k.streams, k.bases) as c (stream, base) on c.stream = w.stream
        where c.base > w.first)
    order by k.n desc limit 1";

/// The newest plan with all counters at or before these offsets, given by stream.
pub async fn keyframe_of_offsets(
    conn: &mut PgConnection,
    lane: i16,
    source: Uuid,
    firsts: &BTreeMap<&str, i64>,
) -> Result<Option<i64>, DbError> {
    let query = sqlx::query_scalar(BY_OFFSETS)
        .bind(lane)
        .bind(source)
        .bind(firsts.keys().copied().collect::<Vec<_>>())
        .bind(firsts.values().copied().collect::<Vec<_>>());
    db::bounded("a plan with all counters", LIMIT, query.fetch_optional(conn)).await
}

const BY_TIME: &str = "
    select k.n from oncebox.outbox_plan as k
    where k.lane = $1 and k.keyframe and k.source = $2 and k.planned_at < to_timestamp($3)
    order by k.n desc limit 1";

/// The newest plan with all counters that was made before this time, in seconds since the Unix epoch.
pub async fn keyframe_of_time(
    conn: &mut PgConnection,
    lane: i16,
    source: Uuid,
    at_s: f64,
) -> Result<Option<i64>, DbError> {
    let query = sqlx::query_scalar(BY_TIME).bind(lane).bind(source).bind(at_s);
    db::bounded("a plan with all counters", LIMIT, query.fetch_optional(conn)).await
}

const OLDEST: &str = "
    select k.n from oncebox.outbox_plan as k
    where k.lane = $1 and k.keyframe and k.source = $2
    order by k.n limit 1";

/// The oldest plan with all counters that is retained.
pub async fn first_keyframe(conn: &mut PgConnection, lane: i16, source: Uuid) -> Result<Option<i64>, DbError> {
    let query = sqlx::query_scalar(OLDEST).bind(lane).bind(source);
    db::bounded("the oldest plan with all counters", LIMIT, query.fetch_optional(conn)).await
}

/// A plan as the past has it.
#[derive(Debug, Clone)]
pub struct PastPlan {
    /// The window and the counters recorded at its start.
    pub recorded: RecordedPlan,
    /// They are all there are.
    pub keyframe: bool,
    /// When it was made: every row of its window was published before. Seconds since the Unix epoch.
    pub planned_at_s: f64,
}

const PLANS: &str = "
    select n, source, s1::text, p1::text, q1, s2::text, p2::text, q2, streams, bases, q_top,
        (extract(epoch from planned_at) * 1000000)::bigint, keyframe, extract(epoch from planned_at)::float8
    from oncebox.outbox_plan
    where lane = $1 and source = $2 and n between $3 and $4
    order by n limit $5";

/// The plans of one source from number `from` to `upto`, at most `limit`.
pub async fn plans(
    conn: &mut PgConnection,
    lane: i16,
    source: Uuid,
    from: i64,
    upto: i64,
    limit: i64,
) -> Result<Vec<PastPlan>, DbError> {
    let query = sqlx::query(PLANS).bind(lane).bind(source).bind(from).bind(upto).bind(limit);
    let rows = db::bounded("the plans", LIMIT, query.fetch_all(conn)).await?;
    rows.iter()
        .map(|row| {
            Ok(PastPlan { recorded: recorded(lane, row)?, keyframe: row.try_get(12)?, planned_at_s: row.try_get(13)? })
        })
        .collect()
}

// A TRUNCATE gives the leaf another file.
const LEAVES: &str = "
    select coalesce(string_agg(pg_relation_filenode(i.inhrelid)::text, ' ' order by i.inhrelid), '')
    from pg_inherits as i where i.inhparent = 'oncebox.outbox'::regclass";

/// Changes whenever a part of the log is cleared: what was read between two equal answers was there all the time.
pub async fn leaves(conn: &mut PgConnection) -> Result<String, DbError> {
    db::bounded("the log's partitions", LIMIT, sqlx::query_scalar(LEAVES).fetch_one(conn)).await
}

const OUT_OF_ORDER: &str = "
    select h.seq, 'held' from oncebox.outbox_held as h where h.lane = $1 and h.seq = any($2)
    union all
    select d.seq, 'discarded' from oncebox.outbox_discarded as d where d.lane = $1 and d.seq = any($2)
    order by 1";

/// Which of these rows were taken out of the log's order and not sent since: true for those discarded.
pub async fn out_of_order(conn: &mut PgConnection, lane: i16, seqs: &[i64]) -> Result<BTreeMap<i64, bool>, DbError> {
    let query = sqlx::query_as(OUT_OF_ORDER).bind(lane).bind(seqs);
    let rows: Vec<(i64, String)> = db::bounded("held messages", LIMIT, query.fetch_all(conn)).await?;
    Ok(rows.into_iter().map(|(seq, state)| (seq, state == "discarded")).collect())
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[EXTENT, BY_OFFSETS, BY_TIME, OLDEST, PLANS, LEAVES, OUT_OF_ORDER];
