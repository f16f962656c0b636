//! The journal: which snapshot windows were opened on a lane, so that every relay reads the same ones again.
//!
//! Window `n` holds what is visible in the snapshot `s2` of plan `n` and was not in its `s1`, the `s2` of plan
//! `n - 1`. A plan is committed, flushed and replicated before anything of its window is published: its commit
//! record lies behind those of all rows it covers. Plans are only ever inserted.

use super::offsets::Offsets;
use crate::db::{self, DbError};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use std::collections::VecDeque;
use std::time::Duration;
use uuid::Uuid;

/// Every so many plans one records all counters, so that a take-over reads at most this many.
pub const KEYFRAME_EVERY: i64 = 1_000;
/// Longest wait for one of these statements.
const LIMIT: Duration = Duration::from_secs(20);

/// One window, as recorded. Snapshots and xids travel as the text Postgres prints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Which lane.
    pub lane: i16,
    /// Number of the window, dense from 0.
    pub n: i64,
    /// The source its messages carry.
    pub source: Uuid,
    /// Snapshot before.
    pub s1: String,
    /// Transaction that recorded `s1`.
    pub p1: String,
    /// Last value of the sequence, read before `p1` was assigned.
    pub q1: i64,
    /// Snapshot after.
    pub s2: String,
    /// Transaction that recorded `s2`.
    pub p2: String,
    /// Last value of the sequence, read before `p2` was assigned.
    pub q2: i64,
    /// Last value of the sequence, read after `s2`: where the window's rows end.
    pub q_top: i64,
    /// When it was made, in microseconds since 1970: tells it from another one with the same number.
    pub planned_at_us: i64,
}

impl Plan {
    /// No transaction was open at `s1`: rows of this window can only have numbers beyond `q1`.
    pub fn began_calm(&self) -> bool {
        nothing_was_open(&self.s1, &self.p1)
    }

    /// No transaction was open at `s2`: rows of the next window can only have numbers beyond `q2`.
    pub fn ended_calm(&self) -> bool {
        nothing_was_open(&self.s2, &self.p2)
    }
}

/// The snapshot lists no xid, and ends at the xid of the transaction that recorded it.
fn nothing_was_open(snapshot: &str, recorded_by: &str) -> bool {
    snapshot.strip_suffix(':').and_then(|ends| ends.split_once(':')) == Some((recorded_by, recorded_by))
}

/// A place in the log: the window, and the sequence number in it up to which everything is read, or settled. The end of
/// a window is the beginning of the next, with sequence number 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LogPlace {
    /// Number of the window.
    pub n: i64,
    /// Sequence number.
    pub seq: i64,
}

/// A plan with the counters recorded at its start.
#[derive(Debug, Clone)]
pub struct RecordedPlan {
    /// The window.
    pub plan: Plan,
    /// Streams whose counters it records.
    pub streams: Vec<String>,
    /// Their counters.
    pub bases: Vec<i64>,
}

/// Where a relay that takes a lane over goes on.
#[derive(Debug)]
pub struct Resume {
    /// Everything up to here is confirmed, held or parked.
    pub settled: LogPlace,
    /// The windows from the settled one to the newest, which is never missing.
    pub plans: VecDeque<RecordedPlan>,
    /// Counters at the start of the first of them.
    pub offsets: Offsets,
    /// The newest plan was made by a transaction that this cluster has yet to begin.
    pub xids_moved_back: bool,
}

// Settled places are saved with every plan and, when none is made for a while, with the lease.
const NEWEST: &str = "
    select p.n, s.n, s.seq,
        (select max(k.n) from oncebox.outbox_plan as k where k.lane = $1 and k.keyframe and k.n <= s.n),
        p.p2 >= pg_snapshot_xmax(pg_current_snapshot())
    from (
        select n, p2, settled_n, settled_seq from oncebox.outbox_plan where lane = $1 order by n desc limit 1
    ) as p
    join oncebox.outbox_lease as l on l.lane = $1
    cross join lateral (
        select n, seq from (values (p.settled_n, p.settled_seq), (l.settled_n, l.settled_seq)) as v (n, seq)
        order by n desc, seq desc limit 1
    ) as s";

const SINCE: &str = "
    select n, source, s1::text, p1::text, q1, s2::text, p2::text, q2, streams, bases, q_top,
        (extract(epoch from planned_at) * 1000000)::bigint
    from oncebox.outbox_plan
    where lane = $1 and n between $2 and $3
    order by n";

/// Reads where the lane stands.
pub async fn resume(conn: &mut PgConnection, lane: i16) -> Result<Resume, DbError> {
    let broken = |n: i64, reason: &str| DbError::JournalBroken { lane, n, reason: reason.to_owned() };
    let newest = sqlx::query(NEWEST).bind(lane).fetch_optional(&mut *conn);
    let newest = db::bounded("the newest plan", LIMIT, newest).await?;
    let newest = newest.ok_or_else(|| broken(0, "the first plan is missing"))?;
    let tail: i64 = newest.try_get(0)?;
    let mut settled = LogPlace { n: newest.try_get(1)?, seq: newest.try_get(2)? };
    if settled.n > tail {
        // The newest window is settled to its end, and nobody has recorded the counters behind it.
        settled = LogPlace { n: tail, seq: i64::MAX };
    }
    let keyframe: Option<i64> = newest.try_get(3)?;
    let keyframe = keyframe.ok_or_else(|| broken(settled.n, "no plan up to here records all counters"))?;

    let rows = sqlx::query(SINCE).bind(lane).bind(keyframe).bind(tail).fetch_all(conn);
    let rows = db::bounded("the plans", LIMIT, rows).await?;
    let mut offsets = Offsets::new(lane);
    let mut plans = VecDeque::new();
    for (expected, row) in (keyframe..).zip(&rows) {
        let recorded = recorded(lane, row)?;
        if recorded.plan.n != expected {
            return Err(broken(expected, "the plan is missing"));
        }
        if recorded.plan.n <= settled.n {
            offsets.apply(&recorded.streams, &recorded.bases);
        }
        if recorded.plan.n >= settled.n {
            plans.push_back(recorded);
        }
    }
    if plans.is_empty() {
        return Err(broken(settled.n, "the settled plan is missing"));
    }
    Ok(Resume { settled, plans, offsets, xids_moved_back: newest.try_get(4)? })
}

/// Reads the columns of [`SINCE`].
pub(super) fn recorded(lane: i16, row: &PgRow) -> Result<RecordedPlan, DbError> {
    Ok(RecordedPlan {
        plan: Plan {
            lane,
            n: row.try_get(0)?,
            source: row.try_get(1)?,
            s1: row.try_get(2)?,
            p1: row.try_get(3)?,
            q1: row.try_get(4)?,
            s2: row.try_get(5)?,
            p2: row.try_get(6)?,
            q2: row.try_get(7)?,
            q_top: row.try_get(10)?,
            planned_at_us: row.try_get(11)?,
        },
        streams: row.try_get(8)?,
        bases: row.try_get(9)?,
    })
}

const SOURCE_STANDS: &str = "select $1 is not distinct from oncebox.outbox_source_in_force()";

/// Whether plans may still carry this source here.
pub async fn source_stands(conn: &mut PgConnection, source: Uuid) -> Result<bool, DbError> {
    let query = sqlx::query_scalar(SOURCE_STANDS).bind(source).fetch_one(conn);
    db::bounded("the source", LIMIT, query).await
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[NEWEST, SINCE, SOURCE_STANDS];
