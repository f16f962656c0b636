//! Order by stream, the consumer's side: where streams begin for it, which worker has which stream, and void notices.
//!
//! A queue bound to a stream of which much was published before must not wait for that. So once it is bound, and
//! before the first delivery is looked at, the outbox is asked how far each stream has come.

use super::{ConsumerOptions, LOOK_LIMIT, Order, RECONNECT_BACKOFF};
use crate::db::{self, DbError};
use crate::inbox::held::{Due, Reason};
use crate::inbox::{self, Received, Reception, held, stream};
use crate::message::{Delivery, Position, header};
use crate::topic;
use sqlx::PgConnection;
use std::collections::BTreeSet;
use uuid::Uuid;

/// What a delivery must stay behind: its key or its stream, as ordered.
pub(super) fn line(order: Order, delivery: &Delivery) -> Option<&str> {
    match order {
        Order::Key => delivery.key(),
        Order::Stream => delivery.headers.get(header::STREAM)?.as_str(),
        Order::None => None,
    }
}

/// Accepts a delivery, or says why not, as its order asks.
pub(super) async fn receive(
    conn: &mut PgConnection,
    options: &ConsumerOptions,
    message: &Received,
) -> Result<Reception, sqlx::Error> {
    match (options.order, stream::place(message)) {
        (Order::Stream, Some(at)) => stream::receive(conn, &options.name, message, at).await,
        (order, _) => inbox::receive(conn, &options.name, message, order == Order::Key).await,
    }
}

/// Holds a delivery, as its order asks.
pub(super) async fn hold(
    conn: &mut PgConnection,
    options: &ConsumerOptions,
    message: &Received,
    reason: &Reason,
) -> Result<(), sqlx::Error> {
    match options.order {
        Order::Stream => stream::hold(conn, &options.name, message, reason).await,
        Order::Key | Order::None => held::hold(conn, &options.name, message, reason).await,
    }
}

/// Takes a held delivery for the run that was counted as its `attempt`, if it is its turn, as its order asks.
pub(super) async fn claim(
    conn: &mut PgConnection,
    options: &ConsumerOptions,
    id: Uuid,
    attempt: u32,
) -> Result<Option<Received>, sqlx::Error> {
    match options.order {
        Order::Stream => stream::claim(conn, &options.name, id, attempt).await,
        Order::Key | Order::None => held::claim(conn, &options.name, id, attempt).await,
    }
}

/// Held deliveries whose turn has come; those whose last run never ended only if `unended`.
pub(super) async fn due(
    conn: &mut PgConnection,
    options: &ConsumerOptions,
    under_way: &[Uuid],
    unended: bool,
    limit: i64,
) -> Result<Vec<Due>, sqlx::Error> {
    match options.order {
        Order::Stream => stream::due(conn, &options.name, under_way, unended, limit).await,
        order => held::due(conn, &options.name, under_way, order == Order::Key, unended, limit).await,
    }
}

/// The held delivery that goes on in the stream of one just applied.
pub(super) async fn successor(
    conn: &mut PgConnection,
    options: &ConsumerOptions,
    message: &Received,
) -> Result<Option<Due>, sqlx::Error> {
    match (options.order, stream::place(message)) {
        (Order::Stream, Some(at)) => stream::successor(conn, &options.name, at).await,
        _ => Ok(None),
    }
}

/// Passes the offset of a void notice, if this consumer would wait for it.
pub(super) async fn void(
    conn: &mut PgConnection,
    options: &ConsumerOptions,
    at: &Position,
    topic: &str,
    reason: &str,
) -> Result<(), sqlx::Error> {
    if options.order == Order::Stream && stream::is_ordered(&at.stream) && is_bound(&patterns(options), topic) {
        stream::void(conn, &options.name, at, reason).await?;
    }
    Ok(())
}

/// The configured patterns. Without any the queue is bound by hand, nobody knows to what.
fn patterns(options: &ConsumerOptions) -> Vec<String> {
    match options.bindings.is_empty() {
        true => vec!["#".to_owned()],
        false => options.bindings.clone(),
    }
}

fn is_bound(patterns: &[String], topic: &str) -> bool {
    patterns.iter().any(|pattern| topic::matches(pattern, topic))
}

/// Records where the streams of newly bound patterns begin. Waits until both databases answer.
///
/// # Errors
/// What no waiting can mend.
pub(super) async fn begin(options: &ConsumerOptions) -> Result<(), DbError> {
    let mut failures = 0;
    loop {
        let error = match record_starts(options).await {
            Ok(()) => return Ok(()),
            Err(error) if !error.is_transient() => return Err(error),
            Err(error) => error,
        };
        failures += 1;
        let delay = RECONNECT_BACKOFF.jittered(failures);
        tracing::warn!(consumer = options.name, %error, ?delay, "where streams begin is not known yet");
        tokio::time::sleep(delay).await;
    }
}

async fn record_starts(options: &ConsumerOptions) -> Result<(), DbError> {
    let Some(outbox_url) = &options.outbox_url else { return Ok(()) };
    let session = db::SessionOptions {
        application_name: "oncebox consume",
        statement_timeout: LOOK_LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let mut inbox = db::connect(&options.database_url, session).await?;
    let mut outbox = db::connect(outbox_url, session).await?;
    let work = async {
        let sources = stream::sources(&mut outbox).await?;
        let known = stream::bound(&mut inbox, &options.name, &sources).await?;
        let (Some(source), fresh) = (sources.last(), fresh(patterns(options), &known)) else { return Ok(()) };
        if fresh.is_empty() {
            return Ok(());
        }
        let counters = stream::counters(&mut outbox).await?;
        let starts = starts(counters, *source, &fresh, &known);
        tracing::info!(consumer = options.name, ?fresh, streams = starts.len(), "bound: streams begin here");
        stream::begin(&mut inbox, &options.name, *source, &fresh, &starts).await
    };
    db::bounded("where streams begin", LOOK_LIMIT, work).await?;
    db::close(inbox).await;
    db::close(outbox).await;
    Ok(())
}

/// The patterns that were not bound before.
fn fresh(patterns: Vec<String>, known: &[String]) -> Vec<String> {
    let fresh: BTreeSet<String> = patterns.into_iter().filter(|pattern| !known.contains(pattern)).collect();
    fresh.into_iter().collect()
}

/// The streams that only the fresh patterns match, with the first offset to wait for.
fn starts(counters: Vec<(Uuid, String, i64)>, source: Uuid, fresh: &[String], known: &[String]) -> Vec<(String, i64)> {
    let only_now = |stream: &str| {
        let topic = stream.rsplit_once('#').map_or(stream, |(topic, _)| topic);
        is_bound(fresh, topic) && !is_bound(known, topic)
    };
    counters
        .into_iter()
        .filter(|(of, stream, _)| *of == source && only_now(stream))
        .map(|(_, stream, next)| (stream, next))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a stream begins where the outbox is when the first pattern that matches it is bound, and never again.
    #[test]
    fn streams_begin_with_their_first_pattern() {
        let (ours, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let text = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let counters = [(ours, "a.x#0", 7), (ours, "b#1", 3), (ours, "c#0", 9), (other, "b#0", 5)];
        let counters = counters.map(|(source, stream, next)| (source, stream.to_owned(), next)).to_vec();
        let known = text(&["a.*"]);
        let fresh = fresh(text(&["a.*", "#.x", "b", "b"]), &known);
        assert_eq!(fresh, ["#.x", "b"]);
        assert_eq!(starts(counters, ours, &fresh, &known), [("b#1".to_owned(), 3)]);
    }
}
