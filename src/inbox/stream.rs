//! Order by stream: which delivery may run, and what passes an offset that nothing will run at.
//!
//! `inbox_stream` holds the next offset of each stream; whoever works on a stream locks its row first. A delivery that
//! comes early waits in `inbox_held`, and a trigger there moves the stream on when a waiting delivery is applied, parked
//! or discarded. Left out: topics beyond a lane's limit of streams, which share one and are applied as they come.

use super::held::{self, Due, Reason};
use super::{Received, Reception};
use crate::message::Position;
use sqlx::PgConnection;
use uuid::Uuid;

/// Streams whose name begins so hold the topics beyond a lane's limit: whoever is not bound to all of them sees gaps.
const SHARED: &str = "*#";

/// The place by which a message is ordered, if it has one.
pub fn place(message: &Received) -> Option<&Position> {
    message.position.as_ref().filter(|at| is_ordered(&at.stream))
}

/// Whether messages of this stream can be applied without a gap.
pub fn is_ordered(stream: &str) -> bool {
    !stream.starts_with(SHARED)
}

const RECEIVE: &str = "select oncebox.inbox_receive_stream($1, $2, $3, $4, $5)";

/// Accepts a delivery if it is the next of its stream, or late. Part of the handler's transaction; the stream stays
/// locked until it ends.
pub async fn receive(
    conn: &mut PgConnection,
    consumer: &str,
    message: &Received,
    at: &Position,
) -> Result<Reception, sqlx::Error> {
    let answer: String = sqlx::query_scalar(RECEIVE)
        .bind(consumer)
        .bind(message.id.0)
        .bind(at.source)
        .bind(&at.stream)
        .bind(at.offset)
        .fetch_one(conn)
        .await?;
    Ok(match answer.as_str() {
        "new" => Reception::New,
        "done" => Reception::Done,
        "held" => Reception::Held,
        "behind_stream" => Reception::BehindStream,
        _ => Reception::Gap,
    })
}

const BEGIN_STREAM: &str = "select oncebox.inbox_begin_stream($1, $2, $3, 1)";

const PASS_TWIN: &str = "select oncebox.inbox_pass_twin($1, $2, $3, $4, $5)";

/// Holds a delivery. If the same message was applied or held under another place meanwhile, its own is passed: nothing
/// will run there.
pub async fn hold(
    conn: &mut PgConnection,
    consumer: &str,
    message: &Received,
    reason: &Reason,
) -> Result<(), sqlx::Error> {
    // Parking passes the offset of a stream that is known: the attempt that made its row may have been rolled back.
    if let Some(at) = place(message) {
        let begin = sqlx::query(BEGIN_STREAM).bind(consumer).bind(at.source).bind(&at.stream);
        begin.execute(&mut *conn).await?;
    }
    held::hold(conn, consumer, message, reason).await?;
    if let Some(at) = place(message) {
        let pass = sqlx::query(PASS_TWIN).bind(consumer).bind(message.id.0).bind(at.source).bind(&at.stream);
        pass.bind(at.offset).execute(conn).await?;
    }
    Ok(())
}

const VOID: &str = "
    select oncebox.inbox_void_stream($1, $2, $3, $4, $5), pg_logical_emit_message(true, 'oncebox', 'void')::text";

/// Passes an offset that will never come, now or when its turn has come; nothing if its message is in hand. It writes in
/// any case, so that the commit waits for the standby.
pub async fn void(conn: &mut PgConnection, consumer: &str, at: &Position, reason: &str) -> Result<(), sqlx::Error> {
    let query = sqlx::query(VOID).bind(consumer).bind(at.source).bind(&at.stream).bind(at.offset).bind(reason);
    query.execute(conn).await?;
    Ok(())
}

// One index probe for each stream that waits, and of each stream no more than may run: the next, and late ones.
const DUE: &str = "
    with recursive waiting (source, stream) as (
        (select h.source, h.stream from oncebox.inbox_held as h
        where h.consumer = $1 and h.state = 'waiting' and h.source is not null
        order by h.source, h.stream limit 1)
        union all
        select n.source, n.stream from waiting as w cross join lateral (
            select h.source, h.stream from oncebox.inbox_held as h
            where h.consumer = $1 and h.state = 'waiting' and (h.source, h.stream) > (w.source, w.stream)
            order by h.source, h.stream limit 1) as n
    ), turn as (
        select h.message_id, h.stream, h.n, h.attempts, h.reason from waiting as w
        left join oncebox.inbox_stream as s on s.consumer = $1 and s.source = w.source and s.stream = w.stream
        cross join lateral (
            select h.message_id, h.stream, h.n, h.attempts, h.reason from oncebox.inbox_held as h
            where h.consumer = $1 and h.state = 'waiting' and h.source = w.source and h.stream = w.stream
                and h.\"offset\" <= case
                    when starts_with(w.stream, '*#') then 9223372036854775807
                    else coalesce(s.next_offset, 1) end
                and h.next_at <= clock_timestamp() and h.message_id <> all($2)
                and ($4 or h.reason not in ('started', 'started_alone'))
            order by h.\"offset\" limit $3) as h
        union all
        select h.message_id, h.stream, h.n, h.attempts, h.reason from oncebox.inbox_held as h
        where h.consumer = $1 and h.state = 'waiting' and h.source is null and h.next_at <= clock_timestamp()
            and h.message_id <> all($2) and ($4 or h.reason not in ('started', 'started_alone'))
    )
    select message_id, stream, attempts, reason from turn order by n limit $3";

/// The held deliveries whose turn has come, with their streams, without those `under_way`, and those whose last run
/// never ended only if `unended`.
pub async fn due(
    conn: &mut PgConnection,
    consumer: &str,
    under_way: &[Uuid],
    unended: bool,
    limit: i64,
) -> Result<Vec<Due>, sqlx::Error> {
    let query = sqlx::query_as(DUE).bind(consumer).bind(under_way).bind(limit).bind(unended);
    Ok(query.fetch_all(conn).await?.into_iter().map(Due::of).collect())
}

const TURN: &str = "select oncebox.inbox_turn($1, $2)";

/// Takes a delivery for the transaction of the run that was counted as its `attempt`, and locks its stream; nothing if
/// it is not its turn.
pub async fn claim(
    conn: &mut PgConnection,
    consumer: &str,
    id: Uuid,
    attempt: u32,
) -> Result<Option<Received>, sqlx::Error> {
    // The stream is locked before the delivery, as everywhere.
    match sqlx::query_scalar(TURN).bind(consumer).bind(id).fetch_one(&mut *conn).await? {
        true => held::claim(conn, consumer, id, attempt).await,
        false => Ok(None),
    }
}

const SUCCESSOR: &str = "
    select h.message_id, h.stream, h.attempts, h.reason from oncebox.inbox_stream as s
    join oncebox.inbox_held as h on h.consumer = s.consumer and h.source = s.source and h.stream = s.stream
        and h.\"offset\" = s.next_offset
    where s.consumer = $1 and s.source = $2 and s.stream = $3 and h.state = 'waiting'
        and h.next_at <= clock_timestamp() and h.reason not in ('started', 'started_alone')
    order by h.n limit 1";

/// The held delivery that is next in the stream, if its turn has come.
pub async fn successor(conn: &mut PgConnection, consumer: &str, at: &Position) -> Result<Option<Due>, sqlx::Error> {
    let query = sqlx::query_as(SUCCESSOR).bind(consumer).bind(at.source).bind(&at.stream);
    Ok(query.fetch_optional(conn).await?.map(Due::of))
}

const SOURCES: &str = "select s.source from oncebox.outbox_source as s order by s.ordinal";

/// The sources of an outbox, the present one last; `conn` is to the outbox's database.
pub async fn sources(conn: &mut PgConnection) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(SOURCES).fetch_all(conn).await
}

const COUNTERS: &str = "select c.source, c.stream, c.next_offset from oncebox.outbox_counters() as c";

/// Source, name and next offset of each stream of an outbox; `conn` is to the outbox's database.
pub async fn counters(conn: &mut PgConnection) -> Result<Vec<(Uuid, String, i64)>, sqlx::Error> {
    sqlx::query_as(COUNTERS).fetch_all(conn).await
}

const BOUND: &str = "
    select b.pattern from oncebox.inbox_binding as b
    where b.consumer = $1 and b.source = any($2)
    order by b.pattern";

/// The patterns that were bound for `consumer` before, for any of these sources.
pub async fn bound(conn: &mut PgConnection, consumer: &str, sources: &[Uuid]) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(BOUND).bind(consumer).bind(sources).fetch_all(conn).await
}

const BEGIN: &str = "select oncebox.inbox_begin($1, $2, $3, $4, $5)";

/// Records that `patterns` are bound, and the first offset to wait for in each stream; another process's word stands.
pub async fn begin(
    conn: &mut PgConnection,
    consumer: &str,
    source: Uuid,
    patterns: &[String],
    starts: &[(String, i64)],
) -> Result<(), sqlx::Error> {
    sqlx::query(BEGIN)
        .bind(consumer)
        .bind(source)
        .bind(patterns)
        .bind(starts.iter().map(|(stream, _)| stream.as_str()).collect::<Vec<_>>())
        .bind(starts.iter().map(|(_, offset)| *offset).collect::<Vec<_>>())
        .execute(conn)
        .await?;
    Ok(())
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] =
    &[RECEIVE, BEGIN_STREAM, PASS_TWIN, VOID, DUE, TURN, SUCCESSOR, SOURCES, COUNTERS, BOUND, BEGIN];
