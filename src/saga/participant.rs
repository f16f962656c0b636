//! Taking part in a saga: `command → inbox → `**`barrier`**` → work → `**`reply`**` → outbox`.
//!
//! A handler calls [`barrier`] first and [`reply`] last, both in the transaction of its work; what the barrier knows, the
//! reply and the effect commit together. The SQL functions do the work, so a participant may be written in any language,
//! and its database need not be that of the sagas. Left out on purpose: savepoints, which are the handler's: work that
//! fails for good is rolled back to one made after the barrier, and `failed` is replied in the same transaction.

use super::state::Op;
use crate::message::Headers;
use serde_json::{Value, json};
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

/// Names of the headers of commands and replies.
pub mod header {
    /// The saga: a uuid as text.
    pub const SAGA: &str = "oncebox-saga";
    /// The step.
    pub const STEP: &str = "oncebox-step";
    /// `do` or `undo`.
    pub const OP: &str = "oncebox-op";
    /// An int from 1: rises when a step that failed for good runs again.
    pub const EPOCH: &str = "oncebox-epoch";
    /// An int from 1; the same work whichever it is.
    pub const ATTEMPT: &str = "oncebox-attempt";
    /// Until when the saga waits for the reply: RFC 3339.
    pub const DEADLINE: &str = "oncebox-deadline";
}

/// Which command of which saga: what the barrier knows it by, and what its reply repeats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandHeaders {
    /// The saga.
    pub saga: Uuid,
    /// The step.
    pub step: String,
    /// What is asked for.
    pub op: Op,
    /// From 1.
    pub epoch: i32,
    /// From 1; the barrier's own reply has none.
    pub attempt: Option<i32>,
    /// Until when the saga waits for the reply, as it came.
    pub deadline: Option<String>,
}

/// The message is no command of a saga.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the header \"{name}\" must be {expected}, got {got}")]
pub struct NoCommand {
    /// Which header.
    pub name: &'static str,
    /// What it should be.
    pub expected: &'static str,
    /// What it is.
    pub got: String,
}

impl CommandHeaders {
    /// Where replies go.
    pub const REPLY_TOPIC: &str = "oncebox.saga.reply";

    /// Reads the headers of a delivery; numbers may have become strings on their way.
    ///
    /// # Errors
    /// [`NoCommand`] names the first header that is missing or wrong.
    pub fn of(headers: &Headers) -> Result<Self, NoCommand> {
        let no = |name, expected| {
            let got = headers.get(name).map_or("nothing".to_owned(), Value::to_string);
            NoCommand { name, expected, got: got.chars().take(100).collect() }
        };
        let text = |name| headers.get(name).and_then(Value::as_str);
        let number = |name| {
            let value = headers.get(name)?;
            let number = value.as_i64().or_else(|| value.as_str()?.parse().ok())?;
            i32::try_from(number).ok().filter(|number| *number >= 1)
        };
        let step = text(header::STEP).filter(|step| (1..=100).contains(&step.len()));
        Ok(Self {
            saga: text(header::SAGA)
                .and_then(|saga| Uuid::parse_str(saga).ok())
                .ok_or_else(|| no(header::SAGA, "a uuid"))?,
            step: step.ok_or_else(|| no(header::STEP, "1 to 100 bytes"))?.to_owned(),
            op: match text(header::OP) {
                Some("do") => Op::Do,
                Some("undo") => Op::Undo,
                _ => return Err(no(header::OP, "do or undo")),
            },
            epoch: number(header::EPOCH).ok_or_else(|| no(header::EPOCH, "a whole number from 1"))?,
            attempt: match headers.get(header::ATTEMPT) {
                None | Some(Value::Null) => None,
                Some(_) => Some(number(header::ATTEMPT).ok_or_else(|| no(header::ATTEMPT, "a whole number from 1"))?),
            },
            deadline: text(header::DEADLINE).map(str::to_owned),
        })
    }

    /// As they stand on the wire.
    pub fn to_headers(&self) -> Headers {
        let mut headers = Headers::new();
        headers.insert(header::SAGA.to_owned(), json!(self.saga.to_string()));
        headers.insert(header::STEP.to_owned(), json!(self.step));
        headers.insert(header::OP.to_owned(), json!(self.op.to_string()));
        headers.insert(header::EPOCH.to_owned(), json!(self.epoch));
        if let Some(attempt) = self.attempt {
            headers.insert(header::ATTEMPT.to_owned(), json!(attempt));
        }
        if let Some(deadline) = &self.deadline {
            headers.insert(header::DEADLINE.to_owned(), json!(deadline));
        }
        headers
    }
}

/// What the barrier says of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Barrier {
    /// First time: do the work, then [`reply`].
    Run,
    /// Taken up before, by whatever attempt: do nothing, say nothing.
    Duplicate,
    /// An action whose undo came first, or an undo of an action that had no effect: do nothing, say nothing. What there is
    /// to say, the barrier has published.
    Void,
}

/// What a participant says of a command it ran.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// Done, and what it gave.
    Succeeded(Option<Value>),
    /// Not done, for good, and why. Of an undo: this attempt failed, and the next one runs again.
    Failed(String),
    /// Not done, and why; the next attempt runs again.
    Retry(String),
    /// Still at it: the saga waits for its timeout anew.
    InProgress,
}

const BARRIER: &str = "select oncebox.saga_barrier($1, $2, $3, $4)";
const REPLY: &str = "select oncebox.saga_reply($1, $2, $3, $4)";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[BARRIER, REPLY];

/// Says what is to be done with a command; call it before the work and in its transaction, outside of any savepoint that
/// may be rolled back to. Waits for the outcome of a twin in flight.
///
/// # Errors
/// 40001 under repeatable read when a twin committed meanwhile: run the whole transaction again.
pub async fn barrier(conn: &mut PgConnection, command: &CommandHeaders) -> Result<Barrier, sqlx::Error> {
    let answer: String = sqlx::query_scalar(BARRIER)
        .bind(command.saga)
        .bind(&command.step)
        .bind(command.op.to_string())
        .bind(command.epoch)
        .fetch_one(conn)
        .await?;
    Ok(match answer.as_str() {
        "run" => Barrier::Run,
        "void" => Barrier::Void,
        _ => Barrier::Duplicate,
    })
}

/// Publishes the reply when the transaction open on `conn` commits. A reason over 4 KiB is cut.
///
/// # Errors
/// 22023 for an output over the payload limit; 55000 for `Succeeded` of an action the barrier did not let run.
pub async fn reply(conn: &mut PgConnection, command: &CommandHeaders, reply: Reply) -> Result<(), sqlx::Error> {
    let (outcome, output, error) = match reply {
        Reply::Succeeded(output) => ("succeeded", output, None),
        Reply::Failed(why) => ("failed", None, Some(storable(&why))),
        Reply::Retry(why) => ("retry", None, Some(storable(&why))),
        Reply::InProgress => ("in_progress", None, None),
    };
    sqlx::query(REPLY)
        .bind(Json(command.to_headers()))
        .bind(outcome)
        .bind(output.map(Json))
        .bind(error)
        .execute(conn)
        .await?;
    Ok(())
}

/// Postgres cannot store a NUL character.
fn storable(why: &str) -> String {
    why.replace('\0', "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(changes: Value) -> Headers {
        let mut headers = json!({"oncebox-saga": "0198a0a0-0000-7000-8000-000000000001", "oncebox-step": "s",
            "oncebox-op": "undo", "oncebox-epoch": 2, "oncebox-attempt": 3, "oncebox-deadline": "2026-01-01T00:00:00.000Z"});
        let target = headers.as_object_mut().expect("an object");
        target.extend(changes.as_object().expect("an object").clone());
        target.retain(|_, value| !value.is_null());
        target.clone()
    }

    /// Goal: headers are read as they come, numbers also as strings, and come out again the same.
    #[test]
    fn command_headers_are_read() {
        let command = CommandHeaders::of(&headers(json!({}))).expect("a command");
        assert_eq!((command.op, command.epoch, command.attempt), (Op::Undo, 2, Some(3)));
        assert_eq!(command.to_headers(), headers(json!({})));
        let strings = headers(json!({"oncebox-epoch": "2", "oncebox-attempt": "3"}));
        assert_eq!(CommandHeaders::of(&strings), Ok(command));
        let without = CommandHeaders::of(&headers(json!({"oncebox-attempt": null}))).expect("a command");
        assert_eq!(without.attempt, None);
    }

    /// Goal: what is no command is refused, and the header at fault is named.
    #[test]
    fn wrong_headers_are_named() {
        for (name, wrong) in [
            (header::SAGA, json!(null)),
            (header::SAGA, json!("x")),
            (header::STEP, json!("")),
            (header::STEP, json!("s".repeat(101))),
            (header::OP, json!("redo")),
            (header::EPOCH, json!(0)),
            (header::EPOCH, json!(1.5)),
            (header::EPOCH, json!("two")),
            (header::EPOCH, json!(2_147_483_648_i64)),
            (header::ATTEMPT, json!(-1)),
        ] {
            let error = CommandHeaders::of(&headers(json!({ name: wrong }))).expect_err(name);
            assert_eq!(error.name, name, "{error}");
        }
    }
}
