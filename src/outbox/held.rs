//! Messages taken out of the log's order, one copy each in `outbox_held`.
//!
//! Waiting: the broker refused responsibility for them, or they follow such a message of the same key; sent again
//! in order, a key one at a time. Parked: they need an operator, and hold up nobody. Every write names the epoch of
//! the lease, so a relay that lost its lane changes nothing.

use super::journal::LogPlace;
use crate::db::{self, DbError};
use crate::message::{Envelope, Headers, Message, MessageId, Position};
use sqlx::types::Json;
use sqlx::{PgConnection, Row};
use std::collections::HashSet;
use std::time::Duration;

/// Waiting messages of a lane beyond which the relay reads no further: the lane waits, and its lag shows.
pub const MAX_WAITING: i64 = 10_000;
/// Longest wait for one of these statements.
pub(super) const LIMIT: Duration = Duration::from_secs(20);

/// Why a message is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The broker refused responsibility; tried again after a delay.
    Nacked {
        /// Delay before the next attempt.
        retry_in: Duration,
    },
    /// An earlier message of its key is held.
    BehindKey,
    /// An operator has paused its topic.
    Paused,
    /// No queue is bound for it.
    Unroutable(String),
    /// The broker closed the channel because of it.
    Refused(String),
    /// Its time had passed before it could be sent.
    Expired,
}

impl Reason {
    /// State, reason, last error, attempts, and seconds until it is due: none for a message that waits for a word.
    fn columns(&self) -> (&'static str, &'static str, Option<&str>, i32, Option<f64>) {
        match self {
            Self::Nacked { retry_in } => {
                ("waiting", "nacked", Some("the broker nacked it"), 1, Some(retry_in.as_secs_f64()))
            }
            Self::BehindKey => ("waiting", "behind_key", None, 0, Some(0.0)),
            Self::Paused => ("waiting", "paused", None, 0, None),
            Self::Unroutable(text) => ("parked", "unroutable", Some(text), 1, Some(0.0)),
            Self::Refused(text) => ("parked", "refused", Some(text), 1, Some(0.0)),
            Self::Expired => ("parked", "expired", None, 0, Some(0.0)),
        }
    }

    /// True when it waits for another attempt, false when it is parked.
    pub fn waits(&self) -> bool {
        self.columns().0 == "waiting"
    }
}

const HOLD: &str = "
    with lease as (
        select lane from oncebox.outbox_lease where lane = $1 and epoch = $2 for update
    ), leaving as (
        select * from unnest($3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[], $8::int[], $9::float8[],
            $10::uuid[], $11::text[], $12::bigint[], $13::bigint[])
            as l (plan_n, seq, state, reason, last_error, attempts, retry_in_s, source, stream, \"offset\", ordinal)
    ), held as (
        insert into oncebox.outbox_held (
            lane, seq, plan_n, state, reason, last_error, attempts, next_at, source, stream, \"offset\",
            ordinal, message_id, topic, key, content_type, headers, body, published_at, expires_at)
        select
            o.lane, o.seq, l.plan_n, l.state, l.reason, l.last_error, l.attempts,
            coalesce(clock_timestamp() + make_interval(secs => l.retry_in_s), 'infinity'), l.source, l.stream, l.\"offset\",
            l.ordinal, o.message_id, o.topic, o.key, o.content_type, o.headers, o.body, o.published_at, o.expires_at
        from lease
        cross join leaving as l
        join oncebox.outbox as o on o.lane = $1 and o.seq = l.seq
        on conflict (lane, seq) do nothing
    )
    select (select count(*) from lease), (select count(*) from leaving as l join oncebox.outbox as o on o.lane = $1 and o.seq = l.seq)";

/// Moves messages out of the log's order. On return they are durable here, and the log may settle past them.
pub async fn hold(
    conn: &mut PgConnection,
    lane: i16,
    epoch: i64,
    leaving: &[(LogPlace, &Envelope, &Reason)],
) -> Result<(), DbError> {
    let columns: Vec<_> = leaving.iter().map(|(_, _, reason)| reason.columns()).collect();
    let query = sqlx::query_as(HOLD)
        .bind(lane)
        .bind(epoch)
        .bind(leaving.iter().map(|(place, ..)| place.n).collect::<Vec<_>>())
        .bind(leaving.iter().map(|(place, ..)| place.seq).collect::<Vec<_>>())
        .bind(columns.iter().map(|c| c.0).collect::<Vec<_>>())
        .bind(columns.iter().map(|c| c.1).collect::<Vec<_>>())
        .bind(columns.iter().map(|c| c.2).collect::<Vec<_>>())
        .bind(columns.iter().map(|c| c.3).collect::<Vec<_>>())
        .bind(columns.iter().map(|c| c.4).collect::<Vec<_>>())
        .bind(leaving.iter().map(|(_, envelope, _)| envelope.position.source).collect::<Vec<_>>())
        .bind(leaving.iter().map(|(_, envelope, _)| envelope.position.stream.as_str()).collect::<Vec<_>>())
        .bind(leaving.iter().map(|(_, envelope, _)| envelope.position.offset).collect::<Vec<_>>())
        .bind(leaving.iter().map(|(_, envelope, _)| envelope.ordinal).collect::<Vec<_>>());
    let (leases, found): (i64, i64) = db::bounded("holding messages", LIMIT, query.fetch_one(conn)).await?;
    if leases != 1 {
        return Err(DbError::LeaseLost { lane });
    }
    if found != leaving.len() as i64 {
        let reason =
            format!("{} of {} rows to be held are not in the log", leaving.len() as i64 - found, leaving.len());
        return Err(DbError::JournalBroken { lane, n: leaving.first().map_or(0, |(place, ..)| place.n), reason });
    }
    Ok(())
}

/// A waiting message whose turn has come.
#[derive(Debug, Clone)]
pub struct Due {
    /// Its sequence number.
    pub seq: i64,
    /// What is to be sent, as it would have been from the log.
    pub envelope: Envelope,
    /// Attempts so far.
    pub attempts: u32,
    /// Its time has passed.
    pub expired: bool,
    /// No queue was bound for it when it was sent before.
    pub was_unroutable: bool,
}

// One index probe for each key that waits, not one for each message: the first row of the next key is its head. Asked
// for the first seq of one key, the planner may walk the whole lane by seq instead.
const DUE: &str = "
    with recursive keyed(key, seq) as (
        (select h.key, h.seq from oncebox.outbox_held as h
        where h.lane = $1 and h.state = 'waiting' and h.key is not null
        order by h.key, h.seq limit 1)
        union all
        select next.key, next.seq from keyed cross join lateral (
            select h.key, h.seq from oncebox.outbox_held as h
            where h.lane = $1 and h.state = 'waiting' and h.key > keyed.key
            order by h.key, h.seq limit 1) as next
    ), head(seq) as (
        select keyed.seq from keyed
        union all
        select h.seq from oncebox.outbox_held as h where h.lane = $1 and h.state = 'waiting' and h.key is null
    )
    select h.seq, h.attempts, coalesce(h.expires_at <= clock_timestamp(), false), h.source, h.stream, h.\"offset\",
        h.message_id, h.topic, h.key, h.content_type, h.headers, h.body, floor(extract(epoch from h.published_at))::bigint,
        h.ordinal, h.reason = 'unroutable'
    from head join oncebox.outbox_held as h on h.lane = $1 and h.seq = head.seq
    where h.next_at <= clock_timestamp() and h.seq <> all($2)
    order by h.seq limit $3";

/// The due messages that no earlier one of their key holds up, oldest first, without those in `sent`.
pub async fn due(conn: &mut PgConnection, lane: i16, sent: &[i64], limit: i64) -> Result<Vec<Due>, DbError> {
    let query = sqlx::query(DUE).bind(lane).bind(sent).bind(limit);
    let rows = db::bounded("held messages", LIMIT, query.fetch_all(conn)).await?;
    rows.iter()
        .map(|row| {
            Ok(Due {
                seq: row.try_get(0)?,
                attempts: row.try_get::<i32, _>(1)?.try_into().unwrap_or_default(),
                expired: row.try_get(2)?,
                was_unroutable: row.try_get(14)?,
                envelope: Envelope {
                    position: Position { source: row.try_get(3)?, stream: row.try_get(4)?, offset: row.try_get(5)? },
                    ordinal: row.try_get(13)?,
                    message: Message {
                        id: MessageId(row.try_get(6)?),
                        topic: row.try_get(7)?,
                        key: row.try_get(8)?,
                        content_type: row.try_get(9)?,
                        headers: row.try_get::<Json<Headers>, _>(10)?.0,
                        body: row.try_get(11)?,
                        published_at_s: row.try_get::<i64, _>(12)?.try_into().unwrap_or_default(),
                    },
                },
            })
        })
        .collect()
}

const RELEASE: &str = "
    delete from oncebox.outbox_held as h
    using (select lane from oncebox.outbox_lease where lane = $1 and epoch = $2 for update) as lease
    where h.lane = lease.lane and h.seq = any($3)";

/// Forgets held messages that the broker has confirmed.
pub async fn release(conn: &mut PgConnection, lane: i16, epoch: i64, seqs: &[i64]) -> Result<(), DbError> {
    let query = sqlx::query(RELEASE).bind(lane).bind(epoch).bind(seqs);
    db::bounded("releasing held messages", LIMIT, query.execute(conn)).await?;
    Ok(())
}

const RECORD: &str = "
    update oncebox.outbox_held as h
    set state = $4, reason = $5, last_error = $6, attempts = h.attempts + $7, changed_at = clock_timestamp(),
        next_at = coalesce(clock_timestamp() + make_interval(secs => $8), 'infinity')
    from (select lane from oncebox.outbox_lease where lane = $1 and epoch = $2 for update) as lease
    where h.lane = lease.lane and h.seq = $3";

/// Records another failed attempt of a held message, or parks it.
pub async fn record(conn: &mut PgConnection, lane: i16, epoch: i64, seq: i64, reason: &Reason) -> Result<(), DbError> {
    let (state, name, error, attempts, retry_in_s) = reason.columns();
    let query = sqlx::query(RECORD)
        .bind(lane)
        .bind(epoch)
        .bind(seq)
        .bind(state)
        .bind(name)
        .bind(error)
        .bind(attempts)
        .bind(retry_in_s);
    db::bounded("recording an attempt", LIMIT, query.execute(conn)).await?;
    Ok(())
}

const WAITING: &str = "
    select key, count(*), count(*) filter (where reason = 'nacked') from oncebox.outbox_held
    where lane = $1 and state = 'waiting'
    group by key order by key";

/// What waits in a lane.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Waiting {
    /// How many messages.
    pub count: i64,
    /// How many of them wait for their next attempt.
    pub nacked: i64,
    /// For which keys.
    pub keys: HashSet<String>,
}

/// How many messages wait, and for which keys.
pub async fn waiting(conn: &mut PgConnection, lane: i16) -> Result<Waiting, DbError> {
    let query = sqlx::query_as::<_, (Option<String>, i64, i64)>(WAITING).bind(lane);
    let rows = db::bounded("waiting keys", LIMIT, query.fetch_all(conn)).await?;
    Ok(Waiting {
        count: rows.iter().map(|(_, count, _)| count).sum(),
        nacked: rows.iter().map(|(.., nacked)| nacked).sum(),
        keys: rows.into_iter().filter_map(|(key, ..)| key).collect(),
    })
}

const HELD_BEYOND: &str = "
    select h.plan_n, h.seq from oncebox.outbox_held as h
    where h.lane = $1 and (h.plan_n, h.seq) > ($2, $3)
    union all
    select d.plan_n, d.seq from oncebox.outbox_discarded as d
    where d.lane = $1 and (d.plan_n, d.seq) > ($2, $3)
    order by 1, 2";

/// Places beyond `settled` that are held already, or were and have been discarded: a replay passes over them.
pub async fn held_beyond(conn: &mut PgConnection, lane: i16, settled: LogPlace) -> Result<HashSet<LogPlace>, DbError> {
    let query = sqlx::query_as(HELD_BEYOND).bind(lane).bind(settled.n).bind(settled.seq);
    let rows: Vec<(i64, i64)> = db::bounded("held places", LIMIT, query.fetch_all(conn)).await?;
    Ok(rows.into_iter().map(|(n, seq)| LogPlace { n, seq }).collect())
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[HOLD, DUE, RELEASE, RECORD, WAITING, HELD_BEYOND];
