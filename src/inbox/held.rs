//! Deliveries that wait for another attempt, or behind one of their key, and parked ones: one copy each in
//! `inbox_held`, written before the broker was told that they are done with.

use super::{Received, handler::HandlerError};
use crate::message::{Headers, MessageId, Position};
use serde_json::Value;
use sqlx::types::Json;
use sqlx::{PgConnection, Row};
use std::time::Duration;
use uuid::Uuid;

/// Why a delivery is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The handler failed; tried again after a delay.
    Failed {
        /// Delay before the next attempt.
        retry_in: Duration,
        /// What the handler said.
        error: String,
    },
    /// An earlier delivery of its key waits.
    BehindKey,
    /// The handler failed as often as it may.
    TooManyAttempts(String),
    /// No attempt can succeed: the handler said so, or cannot take such a payload.
    Rejected(String),
    /// It carries no message id: there is nothing to deduplicate by.
    NoMessageId,
}

impl Reason {
    /// What a failure of the handler leads to after `attempts` attempts, this one included.
    pub fn of_failure(error: &HandlerError, attempts: u32, max_attempts: u32, retry_in: Duration) -> Self {
        let text = error.to_string();
        match error {
            HandlerError::Park(_) => Self::Rejected(text),
            _ if attempts >= max_attempts => Self::TooManyAttempts(text),
            _ => Self::Failed { retry_in, error: text },
        }
    }

    fn columns(&self) -> (&'static str, &'static str, Option<&str>, i32, f64) {
        match self {
            Self::Failed { retry_in, error } => ("waiting", "failed", Some(error), 1, retry_in.as_secs_f64()),
            Self::BehindKey => ("waiting", "behind_key", None, 0, 0.0),
            Self::TooManyAttempts(error) => ("parked", "too_many_attempts", Some(error), 1, 0.0),
            Self::Rejected(error) => ("parked", "rejected", Some(error), 1, 0.0),
            Self::NoMessageId => ("parked", "no_message_id", None, 0, 0.0),
        }
    }
}

// A copy that another process has applied meanwhile is not held.
const HOLD: &str = "
    insert into oncebox.inbox_held (
        consumer, message_id, state, reason, last_error, attempts, next_at, source, stream, \"offset\", key, topic,
        content_type, headers, body)
    select
        $1, $2, $3, $4, $5, $6, clock_timestamp() + make_interval(secs => $7), $8, $9, $10, $11, $12, $13, $14, $15
    where not exists (
        select from oncebox.inbox as i
        where i.leaf = any (array[oncebox.inbox_day_leaf($2), 16]) and i.consumer = $1 and i.message_id = $2)
    on conflict (consumer, message_id) do nothing";

/// Holds a delivery; once this is committed it may be acknowledged. One that is held already stays as it is.
pub async fn hold(
    conn: &mut PgConnection,
    consumer: &str,
    message: &Received,
    reason: &Reason,
) -> Result<(), sqlx::Error> {
    let (state, name, error, attempts, retry_in_s) = reason.columns();
    let position = message.position.as_ref();
    sqlx::query(HOLD)
        .bind(consumer)
        .bind(message.id.0)
        .bind(state)
        .bind(name)
        .bind(error)
        .bind(attempts)
        .bind(retry_in_s)
        .bind(position.map(|at| at.source))
        .bind(position.map(|at| at.stream.as_str()))
        .bind(position.map(|at| at.offset))
        .bind(&message.key)
        .bind(&message.topic)
        .bind(&message.content_type)
        .bind(Json(storable(&message.headers)))
        .bind(&message.body)
        .execute(conn)
        .await?;
    Ok(())
}

/// `jsonb` cannot store the NUL character, which other producers' headers may hold.
fn storable(headers: &Headers) -> Headers {
    fn clean(value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(text.replace('\0', "\u{fffd}")),
            Value::Array(values) => values.iter().map(clean).collect(),
            Value::Object(map) => Value::Object(storable(map)),
            other => other.clone(),
        }
    }
    headers.iter().map(|(name, value)| (name.replace('\0', "\u{fffd}"), clean(value))).collect()
}

// One index probe for each key that waits, not one for each delivery.
const DUE_BY_KEY: &str = "
    with recursive waiting_key(key) as (
        select min(h.key) from oncebox.inbox_held as h where h.consumer = $1 and h.state = 'waiting'
        union all
        select (
            select min(h.key) from oncebox.inbox_held as h
            where h.consumer = $1 and h.state = 'waiting' and h.key > waiting_key.key)
        from waiting_key where waiting_key.key is not null
    ), head as (
        select h.* from waiting_key cross join lateral (
            select h.message_id, h.key, h.n, h.next_at from oncebox.inbox_held as h
            where h.consumer = $1 and h.state = 'waiting' and h.key = waiting_key.key
            order by h.n limit 1) as h
        union all
        select h.message_id, h.key, h.n, h.next_at from oncebox.inbox_held as h
        where h.consumer = $1 and h.state = 'waiting' and h.key is null
    )
    select message_id, key from head
    where next_at <= clock_timestamp() and message_id <> all($2)
    order by n limit $3";

const DUE: &str = "
    select h.message_id, h.key from oncebox.inbox_held as h
    where h.consumer = $1 and h.state = 'waiting' and h.next_at <= clock_timestamp() and h.message_id <> all($2)
    order by h.next_at, h.n limit $3";

/// Ids and keys of the deliveries whose turn has come, without those `under_way`; `by_key` only the first of each key.
pub async fn due(
    conn: &mut PgConnection,
    consumer: &str,
    under_way: &[Uuid],
    by_key: bool,
    limit: i64,
) -> Result<Vec<(Uuid, Option<String>)>, sqlx::Error> {
    let query = sqlx::query_as(if by_key { DUE_BY_KEY } else { DUE });
    query.bind(consumer).bind(under_way).bind(limit).fetch_all(conn).await
}

// Locked, and looked at again under the lock: another process may have had the same idea.
const CLAIM: &str = "
    select h.attempts, h.source, h.stream, h.\"offset\", h.key, h.topic, h.content_type, h.headers, h.body
    from oncebox.inbox_held as h
    where h.consumer = $1 and h.message_id = $2 and h.state = 'waiting' and h.next_at <= clock_timestamp()
        and (not $3 or h.key is null or not exists (
            select from oncebox.inbox_held as e
            where e.consumer = h.consumer and e.state = 'waiting' and e.key = h.key and e.n < h.n))
    for update skip locked";

/// Takes a waiting delivery for this transaction, with its attempts so far; nothing if its turn has passed.
pub async fn claim(
    conn: &mut PgConnection,
    consumer: &str,
    id: Uuid,
    by_key: bool,
) -> Result<Option<(Received, u32)>, sqlx::Error> {
    let Some(row) = sqlx::query(CLAIM).bind(consumer).bind(id).bind(by_key).fetch_optional(conn).await? else {
        return Ok(None);
    };
    let source: Option<Uuid> = row.try_get(1)?;
    let position = match source {
        Some(source) => Some(Position { source, stream: row.try_get(2)?, offset: row.try_get(3)? }),
        None => None,
    };
    let message = Received {
        id: MessageId(id),
        position,
        key: row.try_get(4)?,
        topic: row.try_get(5)?,
        content_type: row.try_get(6)?,
        headers: row.try_get::<Json<Headers>, _>(7)?.0,
        body: row.try_get(8)?,
    };
    Ok(Some((message, row.try_get::<i32, _>(0)?.try_into().unwrap_or_default())))
}

const FORGET: &str = "delete from oncebox.inbox_held where consumer = $1 and message_id = $2";

/// Forgets a delivery, in the transaction that applied it.
pub async fn forget(conn: &mut PgConnection, consumer: &str, id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(FORGET).bind(consumer).bind(id).execute(conn).await?;
    Ok(())
}

// `attempts` guards against recording one failure twice.
const RECORD: &str = "
    update oncebox.inbox_held
    set state = $3, reason = $4, last_error = $5, attempts = attempts + $6, changed_at = clock_timestamp(),
        next_at = clock_timestamp() + make_interval(secs => $7)
    where consumer = $1 and message_id = $2 and state = 'waiting' and attempts = $8";

/// Records another failed attempt of a waiting delivery that had `attempts` before, or parks it.
pub async fn record(
    conn: &mut PgConnection,
    consumer: &str,
    id: Uuid,
    attempts: u32,
    reason: &Reason,
) -> Result<(), sqlx::Error> {
    let (state, name, error, more, retry_in_s) = reason.columns();
    sqlx::query(RECORD)
        .bind(consumer)
        .bind(id)
        .bind(state)
        .bind(name)
        .bind(error)
        .bind(more)
        .bind(retry_in_s)
        .bind(i32::try_from(attempts).unwrap_or(i32::MAX))
        .execute(conn)
        .await?;
    Ok(())
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[HOLD, DUE_BY_KEY, DUE, CLAIM, FORGET, RECORD];
