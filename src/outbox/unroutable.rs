//! The way back of messages that no queue was bound for: probed one a topic, released when a probe is confirmed.
//!
//! Nothing of a release is kept in memory: what waits as `unroutable` was set to it here (or by an operator), and the
//! last of those to be confirmed sets the next ones. A relay that dies leaves the rest to the next probe.

use super::held::LIMIT;
use crate::db::{self, DbError};
use sqlx::PgConnection;

/// Topics probed at a time, those longest not tried first: what one round may cost the broker.
const PROBE_TOPICS: i64 = 20;
/// Messages of a topic released at a time: a tenth of what may wait in a lane.
const RELEASE_BATCH: i64 = 1_000;

// One index probe for each topic, not one for each message: the first row of the next topic is its oldest.
const PROBE: &str = "
    with recursive first(topic, seq, changed_at) as (
        (select h.topic, h.seq, h.changed_at from oncebox.outbox_held as h
        where h.lane = $1 and h.reason = 'unroutable' and h.state = 'parked'
        order by h.topic, h.seq limit 1)
        union all
        select next.topic, next.seq, next.changed_at from first cross join lateral (
            select h.topic, h.seq, h.changed_at from oncebox.outbox_held as h
            where h.lane = $1 and h.reason = 'unroutable' and h.state = 'parked' and h.topic > first.topic
            order by h.topic, h.seq limit 1) as next
    ), oldest(seq) as (
        select first.seq from first
        where not exists (
            select from oncebox.outbox_pause as p
            where coalesce(p.lane, $1) = $1 and oncebox.topic_matches(p.topic_pattern, first.topic))
        order by first.changed_at, first.seq limit $3
    )
    update oncebox.outbox_held as h
    set state = 'waiting', next_at = clock_timestamp(), changed_at = clock_timestamp()
    from oldest, (select lane from oncebox.outbox_lease where lane = $1 and epoch = $2 for update) as lease
    where h.lane = lease.lane and h.seq = oldest.seq and h.state = 'parked'";

/// Sets the oldest unroutable message of a few topics to waiting; returns how many.
pub async fn probe(conn: &mut PgConnection, lane: i16, epoch: i64) -> Result<u64, DbError> {
    let query = sqlx::query(PROBE).bind(lane).bind(epoch).bind(PROBE_TOPICS);
    Ok(db::bounded("probing unroutable topics", LIMIT, query.execute(conn)).await?.rows_affected())
}

const RELEASE_NEXT: &str = "
    with batch as (
        select h.seq from oncebox.outbox_held as h
        where h.lane = $1 and h.reason = 'unroutable' and h.state = 'parked' and h.topic = $3
            and not exists (
                select from oncebox.outbox_held as w
                where w.lane = $1 and w.reason = 'unroutable' and w.state = 'waiting' and w.topic = $3)
        order by h.seq limit $4
    )
    update oncebox.outbox_held as h
    set state = 'waiting', next_at = clock_timestamp(), changed_at = clock_timestamp()
    from batch, (select lane from oncebox.outbox_lease where lane = $1 and epoch = $2 for update) as lease
    where h.lane = lease.lane and h.seq = batch.seq and h.state = 'parked'";

/// A message of the topic has found a queue: once none of those released before waits any more, the next of the topic
/// wait for their turn. Returns how many.
pub async fn release_next(conn: &mut PgConnection, lane: i16, epoch: i64, topic: &str) -> Result<u64, DbError> {
    let query = sqlx::query(RELEASE_NEXT).bind(lane).bind(epoch).bind(topic).bind(RELEASE_BATCH);
    Ok(db::bounded("releasing a topic", LIMIT, query.execute(conn)).await?.rows_affected())
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[PROBE, RELEASE_NEXT];
