//! The rows of a window, in the order of their sequence numbers.
//!
//! A row of the window was invisible in `s1` and is visible in `s2`. Either its sequence number was taken after
//! `q1` was read, or its transaction was open at `s1`: listed there, or of an xid from `xmax(s1)` to `p1`, which
//! `oncebox.outbox_open_then` finds.

use super::journal::{LogPlace, Plan};
use crate::db::{self, DbError};
use crate::message::{Headers, Message, MessageId};
use futures_util::TryStreamExt;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use std::time::{Duration, Instant};

/// Longest wait for one read.
const LIMIT: Duration = Duration::from_secs(60);

/// A row of the log as a relay needs it.
#[derive(Debug, Clone)]
pub struct LogRow {
    /// Where it lies.
    pub place: LogPlace,
    /// What is to be sent.
    pub message: Message,
    /// Not to be sent after this moment.
    pub expires: Option<Instant>,
}

/// Part of a window.
#[derive(Debug)]
pub struct Page {
    /// Rows in order.
    pub rows: Vec<LogRow>,
    /// Nothing of the window follows.
    pub last: bool,
}

/// What [`log_row`] reads. date_part gives a float; extract gives a numeric, which costs more than the rest of a row.
macro_rules! columns {
    () => {
        "o.seq, o.message_id, o.topic, o.key, o.content_type,
        case when o.headers = '{}' then null else o.headers::text end, o.body, o.published_at,
        date_part('epoch', o.expires_at - statement_timestamp())"
    };
}

// Nothing was open at s1: the window's rows have numbers beyond q1. A snapshot in a subquery of its own is read from its
// text once, and not once a row.
const READ_CALM: &str = concat!(
    "select ",
    columns!(),
    "
    from oncebox.outbox as o
    where o.lane = $1 and o.seq > $3 and o.seq <= $6
        and pg_visible_in_snapshot(o.xid, (select $4::text::pg_snapshot))
        and not pg_visible_in_snapshot(o.xid, (select $2::text::pg_snapshot))
    order by o.seq limit $5"
);

const READ: &str = concat!(
    "(select ",
    columns!(),
    "
    from oncebox.outbox as o
    where o.lane = $1 and o.seq > greatest($4::bigint, $6::bigint) and o.seq <= $8
        and pg_visible_in_snapshot(o.xid, (select $5::text::pg_snapshot))
        and not pg_visible_in_snapshot(o.xid, (select $2::text::pg_snapshot))
    order by o.seq limit $7)
    union all
    (select o.* from oncebox.outbox_open_then($1, $2::text::pg_snapshot, $3::text::xid8) as t (xid) cross join lateral (
        select ",
    columns!(),
    "
        from oncebox.outbox as o
        where o.lane = $1 and o.xid = t.xid and o.seq > $6 and o.seq <= $4
        order by o.seq limit $7) as o
    where pg_visible_in_snapshot(t.xid, (select $5::text::pg_snapshot)))
    order by 1 limit $7"
);

/// Reads at most `limit` rows of the window behind sequence number `after`, and stops early once their bodies pass
/// `max_bytes`.
pub async fn read(
    conn: &mut PgConnection,
    plan: &Plan,
    after: i64,
    limit: i64,
    max_bytes: usize,
) -> Result<Page, DbError> {
    let now = Instant::now();
    let reading = async {
        let mut rows = Vec::new();
        let mut bytes = 0;
        let query = match plan.began_calm() {
            true => sqlx::query(READ_CALM)
                .bind(plan.lane)
                .bind(&plan.s1)
                .bind(after.max(plan.q1))
                .bind(&plan.s2)
                .bind(limit)
                .bind(plan.q_top),
            false => sqlx::query(READ)
                .bind(plan.lane)
                .bind(&plan.s1)
                .bind(&plan.p1)
                .bind(plan.q1)
                .bind(&plan.s2)
                .bind(after)
                .bind(limit)
                .bind(plan.q_top),
        };
        let mut stream = query.fetch(conn);
        while bytes <= max_bytes {
            let Some(row) = stream.try_next().await? else {
                let last = (rows.len() as i64) < limit;
                return Ok(Page { rows, last });
            };
            let row = log_row(plan.n, now, &row)?;
            bytes += row.message.body.len();
            rows.push(row);
        }
        Ok(Page { rows, last: false })
    };
    db::bounded("a window", LIMIT, reading).await
}

/// Reads [`columns`], whose types nothing but this file decides: they are not compared again for each row.
pub(super) fn log_row(n: i64, now: Instant, row: &PgRow) -> Result<LogRow, sqlx::Error> {
    let headers: Option<&str> = row.try_get_unchecked(5)?;
    let headers = headers.map(serde_json::from_str::<Headers>).transpose();
    let expires_in_s: Option<f64> = row.try_get_unchecked(8)?;
    Ok(LogRow {
        place: LogPlace { n, seq: row.try_get_unchecked(0)? },
        message: Message {
            id: MessageId(row.try_get_unchecked(1)?),
            topic: row.try_get_unchecked(2)?,
            key: row.try_get_unchecked(3)?,
            content_type: row.try_get_unchecked(4)?,
            headers: headers.map_err(|error| sqlx::Error::Decode(error.into()))?.unwrap_or_default(),
            body: row.try_get_unchecked(6)?,
            published_at_s: (row.try_get_unchecked::<i64, _>(7)?.div_euclid(1_000_000) + EPOCH_S)
                .try_into()
                .unwrap_or_default(),
        },
        expires: expires_in_s.map(|s| now + Duration::try_from_secs_f64(s.max(0.0)).unwrap_or(FAR)),
    })
}

/// Postgres counts microseconds from 2000-01-01: seconds of that moment since the Unix epoch.
const EPOCH_S: i64 = 946_684_800;
/// Stands for every expiry that no process will live to see.
const FAR: Duration = Duration::from_secs(100 * 365 * 86_400);

// `offset 0` keeps the rows of open transactions from being joined to a scan of all the lane's.
const COUNT: &str = "
    select topic, count(*) from (
        select o.topic, o.seq from oncebox.outbox as o
        where o.lane = $1 and o.seq > $4 and o.seq <= least($6::bigint, $7::bigint)
            and pg_visible_in_snapshot(o.xid, (select $5::text::pg_snapshot))
            and not pg_visible_in_snapshot(o.xid, (select $2::text::pg_snapshot))
        union all
        select o.topic, o.seq
        from oncebox.outbox_open_then($1, $2::text::pg_snapshot, $3::text::xid8) as t (xid)
        cross join lateral (
            select o.topic, o.seq from oncebox.outbox as o
            where o.lane = $1 and o.xid = t.xid and o.seq <= least($4::bigint, $6::bigint)
            offset 0) as o
        where pg_visible_in_snapshot(t.xid, (select $5::text::pg_snapshot))
    ) as o
    group by topic order by min(seq)";

/// How many rows of each topic the window holds up to sequence number `upto`, topics in the order of their first rows:
/// what a relay that resumes in the middle of a window passes over.
pub async fn count_upto(conn: &mut PgConnection, plan: &Plan, upto: i64) -> Result<Vec<(String, i64)>, DbError> {
    let query = sqlx::query_as(COUNT)
        .bind(plan.lane)
        .bind(&plan.s1)
        .bind(&plan.p1)
        .bind(plan.q1)
        .bind(&plan.s2)
        .bind(upto)
        .bind(plan.q_top);
    db::bounded("a window's counts", LIMIT, query.fetch_all(conn)).await
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[READ, READ_CALM, COUNT];
