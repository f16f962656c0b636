//! Streams by the page: what the outbox has counted in each, and what consumers here have settled of each.
//!
//! Figures, not messages: both are read from counters and ledgers, which hold a row a stream. The inbox's side is as of
//! the ledger's last fold, which the janitor does about once a second. Left out on purpose: judging the two against each
//! other, which is the audit's.

use crate::db::{self, DbError};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, Row};
use std::time::Duration;
use utoipa::ToSchema;
use uuid::Uuid;

/// Longest wait for one statement.
const LIMIT: Duration = Duration::from_secs(15);

/// A stream of this outbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct OutboxStream {
    /// The outbox.
    pub source: Uuid,
    /// `topic#lane`.
    #[schema(example = "order.placed#0")]
    pub stream: String,
    /// Messages that have an offset, up to the newest window: the last offset given.
    pub produced: i64,
    /// Held for another attempt.
    pub waiting: i64,
    /// Need an operator.
    pub parked: i64,
}

/// A consumer's stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct InboxStream {
    /// The logical consumer.
    pub consumer: String,
    /// The outbox it comes from.
    pub source: Uuid,
    /// `topic#lane`.
    #[schema(example = "order.placed#0")]
    pub stream: String,
    /// Offsets that were applied or discarded.
    pub settled: i64,
    /// The last of them.
    pub last_offset: Option<i64>,
    /// The offset that is next in turn; only for consumers with the order `stream`.
    pub next_offset: Option<i64>,
}

/// Where a page of the outbox's streams ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OutboxPlace(pub Uuid, pub String);

/// Where a page of the inbox's streams ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InboxPlace(pub String, pub Uuid, pub String);

const OUTBOX: &str = "
    select c.source, c.stream, c.next_offset - 1, coalesce(h.waiting, 0), coalesce(h.parked, 0)
    from oncebox.outbox_counters() as c
    left join (
        select source, stream, count(*) filter (where state = 'waiting') as waiting,
            count(*) filter (where state = 'parked') as parked
        from oncebox.outbox_held group by source, stream) as h on h.source = c.source and h.stream = c.stream
    where $1::uuid is null or (c.source, c.stream) > ($1, $2)
    order by c.source, c.stream limit $3";

/// Streams behind a place, by source and name.
pub async fn of_outbox(
    conn: &mut PgConnection,
    after: Option<&OutboxPlace>,
    limit: i64,
) -> Result<Vec<OutboxStream>, DbError> {
    let query = sqlx::query(OUTBOX).bind(after.map(|after| after.0)).bind(after.map(|after| &after.1)).bind(limit);
    let rows = db::bounded("the streams", LIMIT, query.fetch_all(conn)).await?;
    let stream = |row: &sqlx::postgres::PgRow| {
        Ok(OutboxStream {
            source: row.try_get(0)?,
            stream: row.try_get(1)?,
            produced: row.try_get(2)?,
            waiting: row.try_get(3)?,
            parked: row.try_get(4)?,
        })
    };
    Ok(rows.iter().map(stream).collect::<Result<_, sqlx::Error>>()?)
}

const INBOX: &str = "
    select l.consumer, l.source, l.stream,
        (select coalesce(sum(upper(r) - lower(r)), 0)::bigint from unnest(l.offsets) as r), upper(l.offsets) - 1,
        s.next_offset
    from oncebox.inbox_ledger as l
    left join oncebox.inbox_stream as s
        on s.consumer = l.consumer and s.source = l.source and s.stream = l.stream
    where ($1::text is null or l.consumer = $1)
        and ($2::text is null or (l.consumer, l.source, l.stream) > ($2, $3, $4))
    order by l.consumer, l.source, l.stream limit $5";

/// Streams behind a place, by consumer, source and name.
pub async fn of_inbox(
    conn: &mut PgConnection,
    consumer: Option<&str>,
    after: Option<&InboxPlace>,
    limit: i64,
) -> Result<Vec<InboxStream>, DbError> {
    let query = sqlx::query(INBOX).bind(consumer).bind(after.map(|after| &after.0));
    let query = query.bind(after.map(|after| after.1)).bind(after.map(|after| &after.2)).bind(limit);
    let rows = db::bounded("the streams", LIMIT, query.fetch_all(conn)).await?;
    let stream = |row: &sqlx::postgres::PgRow| {
        Ok(InboxStream {
            consumer: row.try_get(0)?,
            source: row.try_get(1)?,
            stream: row.try_get(2)?,
            settled: row.try_get(3)?,
            last_offset: row.try_get(4)?,
            next_offset: row.try_get(5)?,
        })
    };
    Ok(rows.iter().map(stream).collect::<Result<_, sqlx::Error>>()?)
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[OUTBOX, INBOX];
