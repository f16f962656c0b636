//! The figures an audit rests on, read from an outbox's counters and from inboxes' ledgers.

use super::judge::{Applied, Expected, Inbox, Outbox, Produced, StreamId};
use crate::db::{self, DbError};
use crate::outbox::journal;
use crate::outbox::{lease, window};
use crate::ranges::Ranges;
use sqlx::PgConnection;
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

/// Longest wait for one of these statements.
const LIMIT: Duration = Duration::from_secs(60);

const FOLD: &str = "select oncebox.inbox_fold()";

// What was discarded is in the ledger too: accept must refuse its copies.
const INBOX: &str = "
    select consumer, source, stream, 'applied', offsets::text from oncebox.inbox_ledger
    union all
    select consumer, source, stream, 'applied', range_agg(int8range(\"offset\", \"offset\" + 1))::text
    from oncebox.inbox_alias
    group by consumer, source, stream
    union all
    select consumer, source, stream, state, range_agg(int8range(\"offset\", \"offset\" + 1))::text
    from oncebox.inbox_held where source is not null
    group by consumer, source, stream, state
    union all
    select consumer, source, stream, 'discarded', range_agg(int8range(\"offset\", \"offset\" + 1))::text
    from oncebox.inbox_discarded where source is not null
    group by consumer, source, stream
    union all
    select consumer, source, stream, 'discarded', range_agg(int8range(\"offset\", \"offset\" + 1))::text
    from oncebox.inbox_given_up
    group by consumer, source, stream
    union all
    select consumer, source, stream, 'doubled', range_agg(int8range(\"offset\", \"offset\" + 1))::text
    from oncebox.inbox_doubled
    group by consumer, source, stream
    order by 1, 2, 3, 4";

/// What the consumers of one database have made of what came.
pub(super) async fn inbox(conn: &mut PgConnection) -> Result<Vec<Inbox>, DbError> {
    db::bounded("folding the inbox", LIMIT, sqlx::query(FOLD).execute(&mut *conn)).await?;
    let rows = sqlx::query_as::<_, (String, Uuid, String, String, String)>(INBOX).fetch_all(conn);
    let mut found: BTreeMap<(String, StreamId), Applied> = BTreeMap::new();
    for (consumer, source, stream, state, offsets) in db::bounded("the ledgers", LIMIT, rows).await? {
        let applied = found.entry((consumer, StreamId { source, stream })).or_default();
        let set = match state.as_str() {
            "applied" => &mut applied.applied,
            "waiting" => &mut applied.waiting,
            "parked" => &mut applied.parked,
            "discarded" => &mut applied.discarded,
            _ => &mut applied.doubled,
        };
        *set = set.union(&offset_set(&offsets)?);
    }
    Ok(found.into_iter().map(|((consumer, id), applied)| Inbox { consumer, id, applied }).collect())
}

const COUNTERS: &str = "
    select source, stream, next_offset, false from oncebox.outbox_counters()
    union all
    select source, stream, next_offset, true from oncebox.outbox_source_end where stream <> '#' || lane
    order by 1, 2";

const HELD: &str = "
    select source, stream, state, range_agg(int8range(\"offset\", \"offset\" + 1))::text
    from oncebox.outbox_held
    group by source, stream, state
    union all
    select source, stream, 'discarded', range_agg(int8range(\"offset\", \"offset\" + 1))::text
    from oncebox.outbox_discarded
    group by source, stream
    order by 1, 2, 3";

const EXPECTED: &str = "
    with counter as materialized (
        select source, stream, null::timestamptz as ended_at from oncebox.outbox_counters()
        union all
        select source, stream, ended_at from oncebox.outbox_source_end where stream <> '#' || lane
    )
    select b.consumer, c.source, c.stream, coalesce(s.\"offset\", 1)
    from counter as c
    cross join (select distinct consumer from oncebox.consumer_binding) as b
    left join oncebox.consumer_start as s
        on s.consumer = b.consumer and s.source = c.source and s.stream = c.stream
    where exists (
        select from oncebox.consumer_binding as k
        where k.consumer = b.consumer and (c.ended_at is null or k.bound_at < c.ended_at)
            and oncebox.topic_matches(k.binding, oncebox.stream_topic(c.stream)))
    order by 1, 2, 3";

/// What was produced, how far it is settled, and who is to apply it.
pub(super) async fn outbox(conn: &mut PgConnection) -> Result<Outbox, DbError> {
    let mut streams: BTreeMap<StreamId, Produced> = BTreeMap::new();
    // Settled places first: they only move on.
    let unsettled = unsettled(conn).await?;
    let rows = sqlx::query_as::<_, (Uuid, String, i64, bool)>(COUNTERS).fetch_all(&mut *conn);
    for (source, stream, next_offset, ended) in db::bounded("the counters", LIMIT, rows).await? {
        let id = StreamId { source, stream };
        // A source ends when everything of it is settled.
        let unsettled_from = if ended { next_offset } else { unsettled.get(&id).copied().unwrap_or(1) };
        streams.insert(id, Produced { next_offset, unsettled_from, ..Produced::default() });
    }
    let rows = sqlx::query_as::<_, (Uuid, String, String, String)>(HELD).fetch_all(&mut *conn);
    for (source, stream, state, offsets) in db::bounded("held messages", LIMIT, rows).await? {
        let produced = streams.entry(StreamId { source, stream }).or_default();
        let set = match state.as_str() {
            "waiting" => &mut produced.waiting,
            "parked" => &mut produced.parked,
            _ => &mut produced.discarded,
        };
        *set = set.union(&offset_set(&offsets)?);
    }
    let rows = sqlx::query_as::<_, (String, Uuid, String, i64)>(EXPECTED).fetch_all(conn);
    let expected = db::bounded("the consumers", LIMIT, rows).await?;
    let expected = expected
        .into_iter()
        .map(|(consumer, source, stream, start)| Expected { consumer, id: StreamId { source, stream }, start })
        .collect();
    Ok(Outbox { streams, expected })
}

/// The first offset of each stream that may not be settled.
async fn unsettled(conn: &mut PgConnection) -> Result<BTreeMap<StreamId, i64>, DbError> {
    let mut found = BTreeMap::new();
    for lane in lease::lanes(conn).await? {
        let resume = journal::resume(conn, lane).await?;
        let settled = &resume.plans.front().expect("a resume holds the settled plan").plan;
        let mut offsets = resume.offsets;
        for (topic, count) in window::count_upto(conn, settled, resume.settled.seq).await? {
            offsets.skip(&topic, count);
        }
        let (streams, bases) = offsets.keyframe();
        let source = settled.source;
        found.extend(streams.into_iter().map(|stream| StreamId { source, stream }).zip(bases));
    }
    Ok(found)
}

fn offset_set(text: &str) -> Result<Ranges, DbError> {
    let unreadable = || sqlx::Error::Decode(format!("not a multirange of offsets: {text:.80}").into());
    Ok(Ranges::parse(text).ok_or_else(unreadable)?)
}

/// Every statement of this room, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[FOLD, INBOX, COUNTERS, HELD, EXPECTED];
