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
    /// It was delivered before, perhaps to a process that ended while handling it: its start is to be counted.
    Redelivered,
    /// An offset of its stream before its own has not come.
    Gap,
    /// An earlier delivery of its stream waits.
    BehindStream,
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
        // Postgres cannot store the NUL character.
        let text = error.to_string().replace('\0', "\u{fffd}");
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
            Self::Redelivered => ("waiting", "redelivered", None, 0, 0.0),
            Self::Gap => ("waiting", "gap", None, 0, 0.0),
            Self::BehindStream => ("waiting", "behind_stream", None, 0, 0.0),
            Self::TooManyAttempts(error) => ("parked", "too_many_attempts", Some(error), 1, 0.0),
            Self::Rejected(error) => ("parked", "rejected", Some(error), 1, 0.0),
            Self::NoMessageId => ("parked", "no_message_id", None, 0, 0.0),
        }
    }
}

// A copy that another process has applied meanwhile is not held. Where nothing is, a mark is written: the commit of what is
// there already may not have waited for the standby.
const HOLD: &str = "
    with held as (
        insert into oncebox.inbox_held (
            consumer, message_id, state, reason, last_error, attempts, next_at, source, stream, \"offset\", key, topic,
            content_type, headers, body)
        select
            $1, $2, $3, $4, $5, $6, clock_timestamp() + make_interval(secs => $7), $8, $9, $10, $11, $12, $13, $14, $15
        where not exists (
            select from oncebox.inbox as i
            where i.leaf = any (array[oncebox.inbox_day_leaf($2), 16]) and i.consumer = $1 and i.message_id = $2)
        on conflict (consumer, message_id) do nothing
        returning 1
    )
    select pg_logical_emit_message(true, 'oncebox', 'held')::text where not exists (select from held)";

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
            select h.message_id, h.key, h.n, h.next_at, h.attempts, h.reason from oncebox.inbox_held as h
            where h.consumer = $1 and h.state = 'waiting' and h.key = waiting_key.key
            order by h.n limit 1) as h
        union all
        select h.message_id, h.key, h.n, h.next_at, h.attempts, h.reason from oncebox.inbox_held as h
        where h.consumer = $1 and h.state = 'waiting' and h.key is null
    )
    select message_id, key, attempts, reason from head
    where next_at <= clock_timestamp() and message_id <> all($2)
        and ($4 or reason not in ('started', 'started_alone'))
    order by n limit $3";

const DUE: &str = "
    select h.message_id, h.key, h.attempts, h.reason from oncebox.inbox_held as h
    where h.consumer = $1 and h.state = 'waiting' and h.next_at <= clock_timestamp() and h.message_id <> all($2)
        and ($4 or h.reason not in ('started', 'started_alone'))
    order by h.next_at, h.n limit $3";

/// A waiting delivery whose turn has come.
#[derive(Debug, Clone)]
pub struct Due {
    /// What it is deduplicated by.
    pub id: Uuid,
    /// What it stays behind: its key or, in order by stream, its stream.
    pub key: Option<String>,
    /// Runs that have begun so far.
    pub attempts: u32,
    /// Why it waits.
    reason: String,
}

impl Due {
    /// From its id, its key or stream, its attempts and its reason.
    pub(super) fn of((id, key, attempts, reason): (Uuid, Option<String>, i32, String)) -> Self {
        Self { id, key, attempts: u32::try_from(attempts).unwrap_or(0), reason }
    }

    /// Its last run has begun and its end was never recorded: the process that ran it has ended, by its fault or not.
    pub fn is_unended(&self) -> bool {
        matches!(self.reason.as_str(), STARTED | STARTED_ALONE)
    }

    /// It alone was running when its process ended, and that was the last of its attempts.
    pub fn is_to_blame(&self, max_attempts: u32) -> bool {
        self.reason == STARTED_ALONE && self.attempts >= max_attempts
    }
}

/// Reason of a delivery whose run has begun beside others.
const STARTED: &str = "started";
/// Reason of a delivery whose run has begun with no other in its process.
const STARTED_ALONE: &str = "started_alone";

/// The deliveries whose turn has come, without those `under_way`; `by_key` only the first of each key, and those whose
/// last run never ended only if `unended`.
pub async fn due(
    conn: &mut PgConnection,
    consumer: &str,
    under_way: &[Uuid],
    by_key: bool,
    unended: bool,
    limit: i64,
) -> Result<Vec<Due>, sqlx::Error> {
    let query = sqlx::query_as(if by_key { DUE_BY_KEY } else { DUE });
    let rows: Vec<(Uuid, Option<String>, i32, String)> =
        query.bind(consumer).bind(under_way).bind(limit).bind(unended).fetch_all(conn).await?;
    Ok(rows.into_iter().map(Due::of).collect())
}

const FREE: &str = "
    select h.message_id from oncebox.inbox_held as h
    where h.consumer = $1 and h.message_id = $2 and h.state = 'waiting' and h.attempts = $3
    for update skip locked";

/// Whether no process is running the delivery at this moment: a run holds its row's lock.
pub async fn is_free(conn: &mut PgConnection, consumer: &str, due: &Due) -> Result<bool, sqlx::Error> {
    let found = sqlx::query(FREE).bind(consumer).bind(due.id).bind(count(due.attempts)).fetch_optional(conn).await?;
    Ok(found.is_some())
}

// Looked at again under the lock: another process may have had the same idea, and then the attempts have changed.
const START: &str = "
    with turn as (
        select h.message_id from oncebox.inbox_held as h
        where h.consumer = $1 and h.message_id = $2 and h.state = 'waiting' and h.next_at <= clock_timestamp()
            and h.attempts = $3 and h.reason = $4
            and (not $5 or h.key is null or not exists (
                select from oncebox.inbox_held as e
                where e.consumer = h.consumer and e.state = 'waiting' and e.key = h.key and e.n < h.n))
        for update skip locked
    )
    update oncebox.inbox_held as h
    set attempts = h.attempts + 1, reason = $6, changed_at = clock_timestamp(),
        next_at = clock_timestamp() + make_interval(secs => $7)
    from turn
    where h.consumer = $1 and h.message_id = turn.message_id
    returning h.attempts";

/// Counts the start of a run, before it begins: a process that ends in it cannot count it afterwards. For `lease` no
/// other process takes it. Gives the attempts with this one, or nothing if its turn has passed.
pub async fn start(
    conn: &mut PgConnection,
    consumer: &str,
    due: &Due,
    by_key: bool,
    lease: Duration,
) -> Result<Option<u32>, sqlx::Error> {
    let attempts: Option<i32> = sqlx::query_scalar(START)
        .bind(consumer)
        .bind(due.id)
        .bind(count(due.attempts))
        .bind(&due.reason)
        .bind(by_key)
        .bind(if due.is_unended() { STARTED_ALONE } else { STARTED })
        .bind(lease.as_secs_f64())
        .fetch_optional(conn)
        .await?;
    Ok(attempts.map(|attempts| attempts.unsigned_abs()))
}

const RENEW: &str = "
    update oncebox.inbox_held set next_at = clock_timestamp() + make_interval(secs => $4)
    where consumer = $1 and message_id = $2 and state = 'waiting' and attempts = $3
        and reason in ('started', 'started_alone')";

/// Leaves the run that was counted as `attempt` to its process for another `lease`, although no transaction of it holds
/// the row; false if another process has taken it over.
pub async fn renew(
    conn: &mut PgConnection,
    consumer: &str,
    id: Uuid,
    attempt: u32,
    lease: Duration,
) -> Result<bool, sqlx::Error> {
    let query = sqlx::query(RENEW).bind(consumer).bind(id).bind(count(attempt)).bind(lease.as_secs_f64());
    Ok(query.execute(conn).await?.rows_affected() == 1)
}

const TAKE_BACK: &str = "
    update oncebox.inbox_held
    set attempts = attempts - 1, reason = $4, changed_at = clock_timestamp(), next_at = clock_timestamp()
    where consumer = $1 and message_id = $2 and state = 'waiting' and attempts = $3 + 1
        and reason in ('started', 'started_alone')";

/// Takes back a counted start: the run was given up for no fault of the handler.
pub async fn take_back(conn: &mut PgConnection, consumer: &str, due: &Due) -> Result<(), sqlx::Error> {
    let attempts = count(due.attempts);
    sqlx::query(TAKE_BACK).bind(consumer).bind(due.id).bind(attempts).bind(&due.reason).execute(conn).await?;
    Ok(())
}

const BLAME: &str = "
    update oncebox.inbox_held
    set state = 'parked', reason = 'too_many_attempts', changed_at = clock_timestamp(),
        last_error = 'the consumer process ended while handling it'
    where consumer = $1 and message_id = $2 and state = 'waiting' and attempts = $3 and reason = 'started_alone'
        and next_at <= clock_timestamp()";

/// Parks a delivery that has ended as many processes as it may.
pub async fn blame(conn: &mut PgConnection, consumer: &str, due: &Due) -> Result<(), sqlx::Error> {
    sqlx::query(BLAME).bind(consumer).bind(due.id).bind(count(due.attempts)).execute(conn).await?;
    Ok(())
}

// The run's own row: it waits for a look that holds the lock for a moment.
const CLAIM: &str = "
    select h.source, h.stream, h.\"offset\", h.key, h.topic, h.content_type, h.headers, h.body
    from oncebox.inbox_held as h
    where h.consumer = $1 and h.message_id = $2 and h.state = 'waiting' and h.attempts = $3
        and h.reason in ('started', 'started_alone')
    for update";

/// Takes a delivery for the transaction of the run that was counted as its `attempt`; nothing if another process has
/// taken it over since.
pub async fn claim(
    conn: &mut PgConnection,
    consumer: &str,
    id: Uuid,
    attempt: u32,
) -> Result<Option<Received>, sqlx::Error> {
    let Some(row) = sqlx::query(CLAIM).bind(consumer).bind(id).bind(count(attempt)).fetch_optional(conn).await? else {
        return Ok(None);
    };
    let source: Option<Uuid> = row.try_get(0)?;
    let position = match source {
        Some(source) => Some(Position { source, stream: row.try_get(1)?, offset: row.try_get(2)? }),
        None => None,
    };
    Ok(Some(Received {
        id: MessageId(id),
        position,
        key: row.try_get(3)?,
        topic: row.try_get(4)?,
        content_type: row.try_get(5)?,
        headers: row.try_get::<Json<Headers>, _>(6)?.0,
        body: row.try_get(7)?,
    }))
}

fn count(attempts: u32) -> i32 {
    i32::try_from(attempts).unwrap_or(i32::MAX)
}

const FORGET: &str = "delete from oncebox.inbox_held where consumer = $1 and message_id = $2";

/// Forgets a delivery, in the transaction that applied it.
pub async fn forget(conn: &mut PgConnection, consumer: &str, id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(FORGET).bind(consumer).bind(id).execute(conn).await?;
    Ok(())
}

// One failure is recorded once: by the run that was counted, if no other process has taken it over since.
const RECORD: &str = "
    update oncebox.inbox_held
    set state = $3, reason = $4, last_error = $5, changed_at = clock_timestamp(),
        next_at = clock_timestamp() + make_interval(secs => $6)
    where consumer = $1 and message_id = $2 and state = 'waiting' and attempts = $7
        and reason in ('started', 'started_alone')";

/// Records how the run that was counted as `attempt` has failed, or parks the delivery.
pub async fn record(
    conn: &mut PgConnection,
    consumer: &str,
    id: Uuid,
    attempt: u32,
    reason: &Reason,
) -> Result<(), sqlx::Error> {
    let (state, name, error, _, retry_in_s) = reason.columns();
    sqlx::query(RECORD)
        .bind(consumer)
        .bind(id)
        .bind(state)
        .bind(name)
        .bind(error)
        .bind(retry_in_s)
        .bind(count(attempt))
        .execute(conn)
        .await?;
    Ok(())
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[HOLD, DUE_BY_KEY, DUE, FREE, START, RENEW, TAKE_BACK, BLAME, CLAIM, FORGET, RECORD];
