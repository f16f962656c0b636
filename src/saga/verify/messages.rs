//! A saga's commands against the outbox's messages, and its replies against the barrier's rows.

use super::refold::{Answer, Refolded, Sent};
use super::{Check, Finding};
use crate::db::{self, DbError};
use crate::saga::read::Detail;
use crate::saga::state::{Event, Millis, Op, Outcome};
use serde_json::{Value, json};
use sqlx::PgConnection;
use sqlx::types::Json;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// Longest wait for one statement.
const LIMIT: Duration = Duration::from_secs(60);
/// Clocks of transactions that write beside each other: what is this much younger than a retained row is retained.
const MARGIN_MS: Millis = 60_000;

// A command is in its history row's transaction, whose id leads to it without an index on message ids. xmin is an xid8
// without its upper half, which is that of the present or the one before.
const BY_TRANSACTION: &str = "
    select o.message_id, o.topic, o.key, o.content_type, o.headers, o.body
    from (
        select (x.whole - case when x.whole > x.present then 4294967296 else 0 end)::text::xid8 as xid
        from (
            select distinct p.present, p.present - p.present % 4294967296 + h.xmin::text::bigint as whole
            from oncebox.saga_history as h
            cross join (select pg_snapshot_xmax(pg_current_snapshot())::text::bigint as present) as p
            where h.saga_id = $1 and h.changes ? 'commands') as x
        where x.whole <= x.present or x.whole >= 4294967296) as x
    cross join (select l.lane from oncebox.outbox_lease as l order by l.lane) as l
    cross join lateral (
        select i.message_id, i.topic, i.key, i.content_type, i.headers, i.body
        from oncebox.outbox as i where i.lane = l.lane and i.xid = x.xid) as o
    where o.message_id = any($2)
    order by o.message_id";

// The whole log: only for what the transaction did not lead to, as in a database that was dumped and restored.
const BY_ID: &str = "
    select o.message_id, o.topic, o.key, o.content_type, o.headers, o.body
    from oncebox.outbox as o where o.message_id = any($1)
    order by o.message_id";

// Null: nothing was ever cleared, so that every message is there.
const RETAINED_SINCE: &str = "
    select case when exists (select from oncebox.outbox_slot where cleared_at is not null) then
        coalesce((select (extract(epoch from min(f.published_at)) * 1000)::bigint
            from oncebox.outbox_lease as l
            cross join lateral (
                select i.published_at from oncebox.outbox as i where i.lane = l.lane order by i.seq limit 1) as f),
            9223372036854775807) end";

const BARRIER: &str = "
    select b.step, b.op, b.epoch, b.tombstone from oncebox.saga_barrier as b
    where b.saga_id = $1 order by b.step, b.op, b.epoch";

// Whether participants in this database use the barrier for sagas of this definition, and since when rows are kept.
const BARRIER_IN_USE: &str = "
    select
        exists (
            select from (
                select s.id from oncebox.saga as s
                where s.definition = $1 and s.version = $2 order by s.id desc limit 20) as s
            join oncebox.saga_barrier as b on b.saga_id = s.id),
        (select (extract(epoch from clock_timestamp() - g.barrier_retention) * 1000)::bigint
        from oncebox.setting as g)";

// Replies that came through this database's own outbox: their participants' barrier lies here.
const REPLIED_HERE: &str = "
    select i.message_id from oncebox.inbox as i
    join oncebox.outbox_source as s on s.source = i.source
    where i.leaf = any(array(select generate_series(0, 16)::smallint)) and i.consumer = 'oncebox.saga'
        and i.message_id = any($1)
    order by i.message_id";

pub(super) const STATEMENTS: &[&str] = &[BY_TRANSACTION, BY_ID, RETAINED_SINCE, BARRIER, BARRIER_IN_USE, REPLIED_HERE];

type Message = (Uuid, String, Option<String>, String, Json<Value>, Vec<u8>);

/// Compares each command with its message; how many messages there were.
pub(super) async fn outbox(
    conn: &mut PgConnection,
    id: Uuid,
    sent: &[Sent],
    findings: &mut Vec<Finding>,
) -> Result<i64, DbError> {
    if sent.is_empty() {
        return Ok(0);
    }
    let ids: Vec<Uuid> = sent.iter().map(|sent| sent.message_id).collect();
    let query = sqlx::query_as(BY_TRANSACTION).bind(id).bind(&ids).fetch_all(&mut *conn);
    let mut messages: Vec<Message> = db::bounded("the commands in the outbox", LIMIT, query).await?;
    let query = sqlx::query_scalar(RETAINED_SINCE).fetch_one(&mut *conn);
    let since: Option<Millis> = db::bounded("what the outbox retains", LIMIT, query).await?;
    let is_retained = |at: Millis| since.is_none_or(|since| at.saturating_sub(MARGIN_MS) >= since);
    let known: HashSet<Uuid> = messages.iter().map(|message| message.0).collect();
    let missing: Vec<Uuid> = sent
        .iter()
        .filter(|sent| is_retained(sent.at))
        .map(|sent| sent.message_id)
        .filter(|id| !known.contains(id))
        .collect();
    if !missing.is_empty() {
        let query = sqlx::query_as(BY_ID).bind(&missing).fetch_all(conn);
        let more: Vec<Message> = db::bounded("the commands in the whole outbox", LIMIT, query).await?;
        messages.extend(more);
    }
    let messages: HashMap<Uuid, Message> = messages.into_iter().map(|message| (message.0, message)).collect();
    for sent in sent {
        match messages.get(&sent.message_id) {
            Some(message) => compare(id, sent, message, findings),
            None if is_retained(sent.at) => {
                let what = format!("the message {} of its command is not in the outbox", sent.message_id);
                findings.push(Finding::new(Check::Outbox, what).at(sent.seq).of(&sent.command.step));
            }
            None => {}
        }
    }
    Ok(messages.len() as i64)
}

fn compare(id: Uuid, sent: &Sent, message: &Message, findings: &mut Vec<Finding>) {
    let (message_id, topic, key, content_type, Json(headers), body) = message;
    let mut differ = |what: &str, found: Value, expected: Value| {
        if found != expected {
            let what = format!("message {message_id}: {what} is {found}, and its command had {expected}");
            findings.push(Finding::new(Check::Outbox, what).at(sent.seq).of(&sent.command.step));
        }
    };
    let command = &sent.command;
    differ("topic", json!(topic), json!(command.topic));
    differ("key", json!(key), json!(id.to_string()));
    differ("content type", json!(content_type), json!("application/json"));
    let found = serde_json::from_slice(body).unwrap_or_else(|_| json!(format!("{} bytes, no JSON", body.len())));
    differ("body", found, command.body.clone());
    let deadline = headers["oncebox-deadline"].as_str().map(crate::saga::snapshot::millis);
    differ("header oncebox-deadline", json!(deadline.map(rfc3339)), json!(rfc3339(command.deadline)));
    for (name, expected) in [
        ("oncebox-saga", json!(id.to_string())),
        ("oncebox-step", json!(command.step)),
        ("oncebox-op", json!(command.op)),
        ("oncebox-epoch", json!(command.epoch)),
        ("oncebox-attempt", json!(command.attempt)),
    ] {
        differ(&format!("header {name}"), headers[name].clone(), expected);
    }
}

fn rfc3339(at: Millis) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(at) * 1_000_000);
    time.ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_else(|| at.to_string())
}

/// Compares the replies with the barrier, as far as it lies here; how many rows of it there were.
pub(super) async fn barrier(
    conn: &mut PgConnection,
    id: Uuid,
    detail: &Detail,
    folded: &Refolded,
    findings: &mut Vec<Finding>,
) -> Result<i64, DbError> {
    let query = sqlx::query_as(BARRIER).bind(id).fetch_all(&mut *conn);
    let rows: Vec<(String, String, i32, bool)> = db::bounded("the barrier", LIMIT, query).await?;
    let summary = &detail.summary;
    let query = sqlx::query_as(BARRIER_IN_USE).bind(&summary.definition).bind(summary.version).fetch_one(&mut *conn);
    let (in_use, kept_since): (bool, Millis) = db::bounded("the barrier's use", LIMIT, query).await?;
    let causes: Vec<Uuid> = folded.answers.iter().filter_map(|answer| answer.cause).collect();
    let query = sqlx::query_scalar(REPLIED_HERE).bind(causes).fetch_all(conn);
    let here: Vec<Uuid> = db::bounded("where the replies came from", LIMIT, query).await?;
    let barrier = Barrier {
        rows: rows.into_iter().map(|(step, op, epoch, tombstone)| ((step, op, epoch), tombstone)).collect(),
        replied_here: here.into_iter().collect(),
        in_use,
        kept_since: kept_since + MARGIN_MS,
    };
    barrier.compare(folded, findings);
    Ok(barrier.rows.len() as i64)
}

struct Barrier {
    /// Step, op and epoch; whether it is a tombstone.
    rows: HashMap<(String, String, i32), bool>,
    replied_here: HashSet<Uuid>,
    in_use: bool,
    kept_since: Millis,
}

impl Barrier {
    /// Whether rows of the step would be here.
    fn is_here(&self, step: &str, answer: &Answer) -> bool {
        let known = self.rows.keys().any(|(known, ..)| known == step);
        let replied_here = answer.cause.is_some_and(|cause| self.replied_here.contains(&cause));
        answer.at > self.kept_since && (known || (replied_here && (self.in_use || !self.rows.is_empty())))
    }

    fn row(&self, step: &str, op: Op, epoch: i32) -> Option<bool> {
        self.rows.get(&(step.to_owned(), op.to_string(), epoch)).copied()
    }

    fn compare(&self, folded: &Refolded, findings: &mut Vec<Finding>) {
        for answer in &folded.answers {
            let Event::Reply { step, op, epoch, outcome, .. } = &answer.event else { continue };
            if !self.is_here(step, answer) {
                continue;
            }
            let did = self.row(step, Op::Do, *epoch);
            let wrong = match (op, outcome) {
                (Op::Do, Outcome::Succeeded) => match did {
                    Some(false) => None,
                    Some(true) => Some("succeeded, and the barrier says it must never run"),
                    None => Some("succeeded, and the barrier has no row of it"),
                },
                (Op::Undo, Outcome::Succeeded) => match self.row(step, Op::Undo, *epoch) {
                    Some(_) => None,
                    None => Some("was undone, and the barrier has no row of that"),
                },
                (Op::Undo, Outcome::UndoNoop) => match did {
                    Some(true) => None,
                    Some(false) => Some("had nothing to undo, and the barrier says it has run"),
                    None => Some("had nothing to undo, and the barrier has no tombstone of it"),
                },
                _ => None,
            };
            if let Some(wrong) = wrong {
                let what = format!("in epoch {epoch} it {wrong}");
                findings.push(Finding::new(Check::Barrier, what).at(answer.seq).of(step));
            }
        }
        self.never_asked(folded, findings);
    }

    /// Rows of commands that were never sent.
    fn never_asked(&self, folded: &Refolded, findings: &mut Vec<Finding>) {
        let Some(saga) = &folded.saga else { return };
        let asked: HashSet<(&str, Op, i32)> =
            folded.sent.iter().map(|sent| (&*sent.command.step, sent.command.op, sent.command.epoch)).collect();
        for (step, op, epoch) in self.rows.keys() {
            let what = if op == "undo" { Op::Undo } else { Op::Do };
            // An undo leaves a row of its action too; a saga without a definition was told what had been done.
            let known = asked.contains(&(step.as_str(), what, *epoch))
                || (what == Op::Do && asked.contains(&(step.as_str(), Op::Undo, *epoch)))
                || (what == Op::Do && saga.definition.is_none() && saga.steps.iter().any(|known| known.id == *step));
            if !known {
                let what = format!("the barrier has a row of its {op} in epoch {epoch}, which was never asked for");
                findings.push(Finding::new(Check::Barrier, what).of(step));
            }
        }
    }
}
