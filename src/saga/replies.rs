//! Replies of participants: broker → inbox → **replies** → saga, history, compensations and next commands, in the one
//! transaction that accepted the reply.
//!
//! A reply that cannot be meant is parked with the reason, and its saga stays as it is: an operator sees it in `oncebox
//! parked`. One that comes too late goes into the history only. One for a saga that was removed after its retention is
//! dropped: nobody could do anything about it. Left out on purpose: the broker and the inbox, which are the consumer's.

use super::decide::{Refusal, decide};
use super::state::{Event, Op, Outcome};
use super::store::{self, Applied, Definitions};
use super::template;
use crate::backoff::Backoff;
use crate::db::DbError;
use crate::failpoints;
use crate::inbox::Received;
use crate::inbox::handler::{BatchHandler, Handler, HandlerError, Handling, jsonb_text};
use crate::message::{Headers, MessageId};
use serde::Deserialize;
use serde_json::Value;
use sqlx::PgConnection;
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

/// The consumer's name, which the inbox deduplicates for, and its queue unless configured.
pub const CONSUMER: &str = "oncebox.saga";
/// Topic of every reply.
pub const TOPIC: &str = "oncebox.saga.reply";
/// Most replies of one transaction.
pub const BATCH: usize = 100;
/// Replies at a time that are taken one by one: those that failed, or came again.
pub const CONCURRENCY: usize = 2;
/// Failures after which a reply is parked. What fails here is a definition that cannot be read: somebody mends it, or
/// a newer program takes over; the delays below add up to a quarter of an hour.
pub const MAX_ATTEMPTS: u32 = 20;
/// Delay between a reply's attempts.
pub const BACKOFF: Backoff = Backoff { initial: Duration::from_millis(500), cap: Duration::from_secs(60) };
/// Longest statement, and longest transaction.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// The handler of replies.
#[derive(Debug, Default)]
pub struct Replies {
    definitions: Definitions,
}

const PURGED: &str = "select p.id from oncebox.saga_purged as p where p.id = any ($1) order by p.id";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[PURGED];

impl Handler for Replies {
    fn handle<'a>(&'a self, conn: &'a mut PgConnection, message: &'a Received) -> Handling<'a> {
        Box::pin(async move { self.take(conn, &[message]).await })
    }

    fn batches(&self) -> Option<&dyn BatchHandler> {
        Some(self)
    }
}

impl BatchHandler for Replies {
    fn handle_all<'a>(&'a self, conn: &'a mut PgConnection, messages: &'a [&'a Received]) -> Handling<'a> {
        Box::pin(self.take(conn, messages))
    }
}

impl Replies {
    /// Takes replies in rounds, one of each saga in each: a saga moves by one event at a time, and the next one meets
    /// it as the one before left it. The first round locks every saga, in the order of their ids.
    async fn take(&self, conn: &mut PgConnection, messages: &[&Received]) -> Result<(), HandlerError> {
        let replies = messages.iter().map(|message| Reply::read(message)).collect::<Result<Vec<_>, _>>();
        let mut replies = replies.map_err(HandlerError::Park)?;
        failpoints::pass("saga.replied");
        while !replies.is_empty() {
            let (mut round, mut later) = (BTreeMap::new(), Vec::new());
            for reply in replies {
                match round.contains_key(&reply.saga) {
                    true => later.push(reply),
                    false => drop(round.insert(reply.saga, reply)),
                }
            }
            self.round(conn, round).await?;
            replies = later;
        }
        Ok(())
    }

    async fn round(&self, conn: &mut PgConnection, mut replies: BTreeMap<Uuid, Reply>) -> Result<(), HandlerError> {
        let ids: Vec<Uuid> = replies.keys().copied().collect();
        let sagas = store::load(conn, &ids).await.map_err(database)?;
        let followed = self.definitions.of(conn, &sagas).await.map_err(database)?;
        let now = store::now(conn).await.map_err(database)?;
        let limits = store::limits(conn).await.map_err(database)?;
        let (mut moved, mut events) = (Vec::with_capacity(sagas.len()), Vec::with_capacity(sagas.len()));
        for (saga, definition) in sagas.iter().zip(followed) {
            let Some(reply) = replies.remove(&saga.id) else { continue };
            let failed = |why: &dyn std::fmt::Display| HandlerError::Failed(format!("saga {}: {why}", saga.id));
            let definition = definition.map_err(|error| failed(&error))?;
            let transition = match decide(saga, &definition, &reply.event, now, &limits) {
                Ok(transition) => transition,
                Err(refusal @ (Refusal::UnknownStep(_) | Refusal::NeverSent { .. })) => {
                    return Err(HandlerError::Park(format!("saga {}: {refusal}", saga.id)));
                }
                Err(refusal) => return Err(failed(&refusal)),
            };
            if let Some(why) = &transition.changes.ignored {
                tracing::debug!(saga.id = %saga.id, message.id = %reply.message_id, why, "a reply came too late");
            }
            events.push(reply);
            moved.push((saga, transition));
        }
        failpoints::pass("saga.decided");
        let unknown: Vec<Uuid> = replies.into_keys().collect();
        if !unknown.is_empty() {
            drop_purged(conn, &unknown).await?;
        }
        let mut applied: Vec<Applied<'_>> = moved
            .into_iter()
            .zip(&events)
            .map(|((before, transition), reply)| Applied {
                before,
                transition,
                event: &reply.event,
                at: now,
                cause: Some(reply.message_id.0),
            })
            .collect();
        store::apply(conn, &mut applied).await.map_err(database)?;
        failpoints::pass("saga.applied");
        Ok(())
    }
}

/// Fails unless all of these sagas, which are not there, were there once.
async fn drop_purged(conn: &mut PgConnection, ids: &[Uuid]) -> Result<(), HandlerError> {
    let purged: Vec<Uuid> = sqlx::query_scalar(PURGED).bind(ids).fetch_all(conn).await?;
    for id in ids {
        if !purged.contains(id) {
            return Err(HandlerError::Park(format!("saga {id} does not exist")));
        }
        tracing::debug!(saga.id = %id, "a reply to a saga that was removed: dropped");
    }
    Ok(())
}

fn database(error: DbError) -> HandlerError {
    match error {
        DbError::Sqlx(error) => HandlerError::Database(error),
        error => HandlerError::Failed(error.to_string()),
    }
}

/// A reply as it came.
#[derive(Debug, Clone, PartialEq)]
struct Reply {
    message_id: MessageId,
    saga: Uuid,
    event: Event,
}

#[derive(Deserialize)]
struct Body {
    outcome: Outcome,
    #[serde(default)]
    output: Option<Value>,
    #[serde(default)]
    error: Option<String>,
}

impl Reply {
    /// Reads it, or says what is wrong with it.
    fn read(message: &Received) -> Result<Self, String> {
        let saga = text(&message.headers, "oncebox-saga")?;
        let saga = Uuid::parse_str(saga).map_err(|_| format!("header oncebox-saga: \"{saga}\" is no uuid"))?;
        let step = text(&message.headers, "oncebox-step")?.to_owned();
        let op = match text(&message.headers, "oncebox-op")? {
            "do" => Op::Do,
            "undo" => Op::Undo,
            other => return Err(format!("header oncebox-op: \"{other}\" is neither do nor undo")),
        };
        let epoch = number(&message.headers, "oncebox-epoch")?;
        let body = jsonb_text(&message.body).map_err(|why| format!("the body {why}"))?;
        let Body { outcome, output, error } =
            serde_json::from_str(body).map_err(|error| format!("the body is no reply: {error}"))?;
        if outcome == Outcome::UndoNoop && op == Op::Do {
            return Err("outcome: undo_noop answers no do".to_owned());
        }
        if output.as_ref().is_some_and(template::is_too_deep) {
            return Err(format!("output: it is nested more than {} levels deep", template::DEPTH_LIMIT));
        }
        let event = Event::Reply { step, op, epoch, outcome, output, error };
        Ok(Self { message_id: message.id, saga, event })
    }
}

fn text<'h>(headers: &'h Headers, name: &str) -> Result<&'h str, String> {
    match headers.get(name) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("header {name} is no text")),
        None => Err(format!("header {name} is missing")),
    }
}

/// Participants may hand a number back as text.
fn number(headers: &Headers, name: &str) -> Result<i32, String> {
    let found = match headers.get(name) {
        Some(Value::String(text)) => text.parse().ok(),
        Some(value) => value.as_i64().and_then(|number| i32::try_from(number).ok()),
        None => return Err(format!("header {name} is missing")),
    };
    found.filter(|number| *number > 0).ok_or_else(|| format!("header {name} is no number from 1"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn received(headers: Value, body: &str) -> Received {
        let Value::Object(headers) = headers else { panic!("an object") };
        Received {
            id: MessageId(Uuid::now_v7()),
            topic: TOPIC.to_owned(),
            key: None,
            position: None,
            content_type: None,
            headers,
            body: body.as_bytes().to_vec(),
        }
    }

    fn headers(changed: &str, to: Value) -> Value {
        let mut headers = json!({"oncebox-saga": Uuid::nil().to_string(), "oncebox-step": "pay", "oncebox-op": "do",
            "oncebox-epoch": 2, "oncebox-attempt": 1, "oncebox-source": "whatever"});
        headers[changed] = to;
        headers
    }

    /// Goal: what `saga_reply` sends is read, also where numbers became text on the way, and with fields of later
    /// versions.
    #[test]
    fn replies_are_read() {
        for epoch in [json!(2), json!("2")] {
            let body = r#"{"outcome": "failed", "output": null, "error": "no money", "more": 1}"#;
            let reply = Reply::read(&received(headers("oncebox-epoch", epoch), body)).expect("a reply");
            let expected = Event::Reply {
                step: "pay".to_owned(),
                op: Op::Do,
                epoch: 2,
                outcome: Outcome::Failed,
                output: None,
                error: Some("no money".to_owned()),
            };
            assert_eq!((reply.saga, reply.event), (Uuid::nil(), expected));
        }
    }

    /// Goal: an output is not deeper than what a state around a body around it can be read with.
    #[test]
    fn deep_outputs_are_refused() {
        for (levels, taken) in [(64, true), (65, false)] {
            let body = format!(r#"{{"outcome": "succeeded", "output": {}{}}}"#, "[".repeat(levels), "]".repeat(levels));
            assert_eq!(Reply::read(&received(headers("x", json!(1)), &body)).is_ok(), taken, "{levels} levels");
        }
    }

    /// Goal: whatever is wrong with a reply is said by name.
    #[test]
    fn what_is_no_reply_is_refused_by_name() {
        let good = r#"{"outcome": "succeeded"}"#;
        for (changed, to, body, named) in [
            ("oncebox-saga", json!("x"), good, "oncebox-saga"),
            ("oncebox-saga", Value::Null, good, "oncebox-saga"),
            ("oncebox-step", json!(1), good, "oncebox-step"),
            ("oncebox-op", json!("redo"), good, "oncebox-op"),
            ("oncebox-epoch", json!(0), good, "oncebox-epoch"),
            ("oncebox-epoch", json!(1.5), good, "oncebox-epoch"),
            ("oncebox-epoch", json!(1_i64 << 40), good, "oncebox-epoch"),
            ("x", json!(1), "{}", "outcome"),
            ("x", json!(1), "[]", "body"),
            ("x", json!(1), "not JSON", "body"),
            ("x", json!(1), r#"{"outcome": "perhaps"}"#, "perhaps"),
            ("x", json!(1), r#"{"outcome": "undo_noop"}"#, "undo_noop"),
            ("x", json!(1), r#"{"outcome": "failed", "error": 7}"#, "body"),
            ("x", json!(1), r#"{"outcome": "failed", "error": "\u0000"}"#, "NUL"),
        ] {
            let error = Reply::read(&received(headers(changed, to), body)).expect_err(named);
            assert!(error.contains(named), "{error} does not name {named}");
        }
        let mut missing = headers("x", json!(1));
        missing.as_object_mut().expect("an object").remove("oncebox-epoch");
        let error = Reply::read(&received(missing, good)).expect_err("nothing to match by");
        assert_eq!(error, "header oncebox-epoch is missing");
    }
}
