//! Goal: `verify` finds nothing in sagas that were moved by the program alone, however they went, and finds every row and
//! column that was changed behind its back.

use crate::support::saga::{Driven, ORDER, define, operator};
use crate::support::{Lab, unique};
use oncebox::saga::state::{Event, Op, Outcome, SagaStatus};
use oncebox::saga::verify::{Check, Report, verify};
use serde_json::json;
use sqlx::{AssertSqlSafe, Executor};
use std::collections::BTreeSet;
use uuid::Uuid;

async fn report(lab: &Lab, id: Uuid) -> Report {
    verify(&mut lab.connect().await, id).await.expect("verifies").expect("a saga")
}

async fn assert_clean(lab: &Lab, id: Uuid) -> Report {
    let report = report(lab, id).await;
    assert!(report.is_clean(), "{report:#?}");
    report
}

/// Goal: completed, compensated, stuck, retried, cancelled, terminated, paused, under way, opened without a definition:
/// all fits, and what could be compared was.
#[tokio::test]
async fn verify_finds_nothing_in_honest_sagas() {
    let lab = Lab::shared().await;
    define(&lab, ORDER).await;

    let mut saga = Driven::start(&lab, "completed").await;
    assert_clean(&lab, saga.id).await;
    assert_eq!(saga.complete().await.status, SagaStatus::Completed);
    let report = assert_clean(&lab, saga.id).await;
    assert_eq!((report.commands, report.messages, report.barrier_rows), (4, 4, 4), "{report:?}");
    assert!(report.rows >= 8, "{report:?}");

    let mut saga = Driven::start(&lab, "compensated").await;
    assert_eq!(saga.compensate().await.status, SagaStatus::Compensated);
    let report = assert_clean(&lab, saga.id).await;
    assert_eq!((report.commands, report.messages, report.barrier_rows), (4, 4, 4), "{report:?}");

    // The step after the pivot fails for good, an operator has it tried again: another epoch.
    let mut saga = Driven::start(&lab, "stuck").await;
    saga.settle().await;
    saga.done("reserve").await;
    saga.happen(Event::Pause(operator()), None).await;
    assert_clean(&lab, saga.id).await;
    saga.happen(Event::Resume(operator()), None).await;
    saga.settle().await;
    saga.answer("label", Op::Do, Outcome::Succeeded, None).await;
    saga.signal().await;
    saga.done("charge").await;
    let stuck = saga.answer("ship", Op::Do, Outcome::Failed, None).await;
    assert_eq!(stuck.status, SagaStatus::Stuck, "{stuck:#?}");
    assert_clean(&lab, saga.id).await;
    let step = "ship".to_owned();
    saga.happen(Event::RetryStep { step: step.clone(), by: operator() }, None).await;
    saga.settle().await;
    let stuck = saga.answer("ship", Op::Do, Outcome::Failed, None).await;
    assert_eq!((stuck.status, stuck.steps[4].epoch), (SagaStatus::Stuck, 2), "{stuck:#?}");
    let outcome = Outcome::Succeeded;
    saga.happen(Event::ResolveStep { step, outcome, output: Some(json!({ "by": "hand" })), by: operator() }, None)
        .await;
    assert_eq!(saga.settle().await.status, SagaStatus::Completed);
    assert_clean(&lab, saga.id).await;

    // An undo that does not come through; then it is given up.
    let mut saga = Driven::start(&lab, "terminated").await;
    saga.settle().await;
    saga.done("reserve").await;
    saga.happen(Event::Cancel(operator()), None).await;
    saga.elapse(30_000).await;
    saga.answer("label", Op::Undo, Outcome::UndoNoop, None).await;
    let stuck = saga.elapse(30_000).await;
    assert_eq!(stuck.status, SagaStatus::Stuck, "{stuck:#?}");
    assert_clean(&lab, saga.id).await;
    saga.happen(Event::Terminate(operator()), None).await;
    assert_clean(&lab, saga.id).await;
    // A reply that comes when all is over.
    let late = saga.undone("reserve").await;
    assert_eq!(late.status, SagaStatus::Terminated);
    assert_clean(&lab, saga.id).await;

    let mut saga = Driven::start(&lab, "cancelled").await;
    saga.happen(Event::Cancel(operator()), None).await;
    assert_clean(&lab, saga.id).await;

    // Without a definition.
    let mut conn = lab.connect().await;
    for end in ["saga_complete($1)", "saga_abort($1, 'no money')"] {
        let open = "select oncebox.saga_open($1, '1 hour')";
        let id: Uuid = sqlx::query_scalar(open).bind(unique("trip")).fetch_one(&mut conn).await.expect("opened");
        for step in ["hotel", "flight"] {
            let enlist = "select oncebox.saga_compensate_with($1, $2, $2 || '.cancel', '{\"id\": 7}')";
            sqlx::query(enlist).bind(id).bind(step).execute(&mut conn).await.expect("enlisted");
        }
        assert_clean(&lab, id).await;
        let end = AssertSqlSafe(format!("select oncebox.{end}"));
        sqlx::query(end).bind(id).execute(&mut conn).await.expect("ended");
        assert_clean(&lab, id).await;
        let mut saga = Driven::of(lab.connect().await, id);
        let now = saga.settle().await;
        if now.status == SagaStatus::Completed {
            continue;
        }
        assert_clean(&lab, id).await;
        saga.undone("flight").await;
        assert_eq!(saga.undone("hotel").await.status, SagaStatus::Compensated);
        let report = assert_clean(&lab, id).await;
        assert_eq!((report.commands, report.messages, report.barrier_rows), (2, 2, 4), "{report:?}");
    }
    assert!(verify(&mut conn, Uuid::nil()).await.expect("verifies").is_none());
}

/// What a forger writes into each column, and what finds it. `$` is the saga; a column that can be changed in two ways has
/// two lines.
const FORGED: &[(&str, &str, &str, Check)] = &[
    ("saga", "definition", "'other'", Check::State),
    ("saga", "version", "4", Check::State),
    ("saga", "definition_hash", "'\\x00'", Check::Definition),
    ("saga", "business_key", "business_key || 'x'", Check::State),
    ("saga", "status", "'compensated', phase = 'backward'", Check::State),
    ("saga", "phase", "'backward', status = 'terminated'", Check::State),
    ("saga", "paused", "true, ended_at = null, status = 'running'", Check::State),
    ("saga", "cancel", "'because'", Check::State),
    ("saga", "reason", "'because'", Check::State),
    ("saga", "seq", "seq + 1", Check::State),
    ("saga", "seq", "seq - 1", Check::Chain),
    ("saga", "head", "'\\x00'", Check::Chain),
    ("saga", "input", "'{\"sku\": \"s-2\"}'", Check::State),
    ("saga", "labels", "'{}'", Check::State),
    ("saga", "created_at", "created_at - interval '1 second'", Check::State),
    ("saga", "start_at", "start_at - interval '1 second'", Check::State),
    ("saga", "deadline", "null", Check::State),
    ("saga", "ended_at", "ended_at + interval '1 second'", Check::State),
    ("saga", "changed_at", "changed_at + interval '1 second'", Check::State),
    ("saga", "next_due", "now(), ended_at = null, status = 'running'", Check::State),
    ("saga_step", "step", "step || 'x'", Check::State),
    ("saga_step", "ordinal", "ordinal + 10", Check::State),
    ("saga_step", "pivot", "not pivot", Check::State),
    ("saga_step", "status", "'skipped'", Check::State),
    ("saga_step", "epoch", "epoch + 1", Check::State),
    ("saga_step", "attempt", "attempt + 1", Check::State),
    ("saga_step", "message_id", "gen_random_uuid()", Check::State),
    ("saga_step", "due_at", "now()", Check::State),
    ("saga_step", "output", "'{\"id\": \"forged\"}'", Check::State),
    ("saga_step", "error", "'forged'", Check::State),
    ("saga_step", "dispatched_at", "now() - interval '1 hour'", Check::State),
    ("saga_step", "changed_at", "now() - interval '1 hour'", Check::State),
    ("saga_compensation", "step", "'charge'", Check::State),
    ("saga_compensation", "ordinal", "3", Check::State),
    ("saga_compensation", "topic", "'other'", Check::State),
    ("saga_compensation", "payload", "'{\"id\": \"forged\"}'", Check::State),
    ("saga_compensation", "status", "'stuck'", Check::State),
    ("saga_compensation", "recorded_at", "now() - interval '1 hour'", Check::State),
    ("saga_compensation", "changed_at", "now() - interval '1 hour'", Check::State),
    ("saga_history", "seq", "seq + 100", Check::Chain),
    ("saga_history", "at", "at + interval '1 microsecond'", Check::Chain),
    ("saga_history", "event", "'pause'", Check::Chain),
    ("saga_history", "detail", "detail || '{\"why\": \"forged\"}'", Check::Chain),
    ("saga_history", "changes", "changes || '{\"ignored\": \"forged\"}'", Check::Chain),
    ("saga_history", "changes", "changes || '{\"ignored\": \"forged\"}'", Check::Changes),
    ("saga_history", "cause", "gen_random_uuid()", Check::Chain),
    ("saga_history", "hash", "'\\x00'", Check::Chain),
    ("saga_signal", "name", "'other'", Check::Signals),
    ("saga_signal", "payload", "'{\"who\": \"bob\"}'", Check::Signals),
    ("saga_signal", "state", "'kept'", Check::Signals),
    ("saga_barrier", "step", "step || 'x'", Check::Barrier),
    ("saga_barrier", "op", "'undo'", Check::Barrier),
    ("saga_barrier", "epoch", "epoch + 1", Check::Barrier),
    ("saga_barrier", "tombstone", "true", Check::Barrier),
    ("outbox", "message_id", "gen_random_uuid()", Check::Outbox),
    ("outbox", "topic", "'other'", Check::Outbox),
    ("outbox", "key", "'other'", Check::Outbox),
    ("outbox", "content_type", "'text/plain'", Check::Outbox),
    ("outbox", "headers", "headers || '{\"oncebox-epoch\": 7}'", Check::Outbox),
    ("outbox", "headers", "headers - 'oncebox-deadline'", Check::Outbox),
    ("outbox", "body", "'{\"forged\": true}'", Check::Outbox),
    ("outbox", "body", "'no JSON'", Check::Outbox),
    ("saga_definition", "document", "jsonb_set(document, '{steps,0,do,topic}', '\"forged\"')", Check::Definition),
    ("saga_definition", "hash", "'\\x00'", Check::Definition),
    ("saga_definition", "steps", "'{}'", Check::Definition),
    ("saga_definition", "pivot", "'ship'", Check::Definition),
    ("saga_definition", "signals", "'{}'", Check::Definition),
    ("saga_definition", "deadline_ms", "1", Check::Definition),
    ("saga_purged", "id", "", Check::State),
];

/// Columns that nothing else speaks of: of the barrier and the log's own bookkeeping, and who wrote a definition when.
/// The keys of the rest name the saga: changed, the row is missing there.
const FREE: &[(&str, &str)] = &[
    ("saga", "id"),
    ("saga_step", "saga_id"),
    ("saga_compensation", "saga_id"),
    ("saga_history", "saga_id"),
    ("saga_signal", "saga_id"),
    ("saga_signal", "look_at"),
    ("saga_signal", "sent_at"),
    ("saga_barrier", "saga_id"),
    ("saga_barrier", "at"),
    ("outbox", "slot"),
    ("outbox", "lane"),
    ("outbox", "seq"),
    ("outbox", "xid"),
    ("outbox", "published_at"),
    ("outbox", "expires_at"),
    ("saga_definition", "name"),
    ("saga_definition", "version"),
    ("saga_definition", "created_at"),
    ("saga_definition", "created_by"),
    ("saga_purged", "status"),
    ("saga_purged", "ended_at"),
    ("saga_purged", "purged_at"),
];

/// The row of the saga that a forger changes.
fn row_of(table: &str, id: Uuid) -> String {
    match table {
        "saga" => format!("id = '{id}'"),
        "saga_step" | "saga_compensation" => format!("saga_id = '{id}' and step = 'reserve'"),
        "saga_history" => format!("saga_id = '{id}' and seq = 3"),
        "saga_signal" => format!("saga_id = '{id}'"),
        "saga_barrier" => format!("saga_id = '{id}' and step = 'reserve'"),
        "outbox" => format!("key = '{id}' and topic = 'stock.reserve'"),
        "saga_definition" => "name = 'order'".to_owned(),
        _ => panic!("{table}"),
    }
}

async fn forge(lab: &Lab, statement: &str) {
    let mut conn = lab.connect().await;
    // No trigger and no foreign key stands in the way.
    let text = format!("set session_replication_role = replica; {statement}");
    conn.execute(AssertSqlSafe(text)).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
}

/// Goal: each column of each table, changed to something a constraint allows, is found, by the check that should find it;
/// and no column is forgotten here.
#[tokio::test]
async fn verify_finds_every_forged_column() {
    let lab = Lab::shared().await;
    let listed: BTreeSet<(String, String)> = FORGED
        .iter()
        .map(|(table, column, ..)| (*table, *column))
        .chain(FREE.iter().copied())
        .map(|(table, column)| (table.to_owned(), column.to_owned()))
        .collect();
    let columns: Vec<(String, String)> = sqlx::query_as(
        "select table_name::text, column_name::text from information_schema.columns
        where table_schema = 'oncebox' and (table_name = 'outbox' or table_name like 'saga%')
            and table_name <> 'saga_request'",
    )
    .fetch_all(&mut lab.connect().await)
    .await
    .expect("columns");
    assert_eq!(listed, columns.into_iter().collect::<BTreeSet<_>>());

    define(&lab, ORDER).await;
    for (n, (table, column, value, check)) in FORGED.iter().enumerate() {
        let mut saga = Driven::start(&lab, &format!("forged-{n}")).await;
        saga.complete().await;
        assert_clean(&lab, saga.id).await;
        let id = saga.id;
        match *table {
            "saga_purged" => {
                forge(&lab, &format!("insert into oncebox.saga_purged values ('{id}', 'completed', now())")).await;
            }
            table => {
                let row = row_of(table, id);
                forge(&lab, &format!("update oncebox.{table} set {column} = {value} where {row}")).await;
            }
        }
        let found = report(&lab, id).await;
        let by_check = found.findings.iter().any(|finding| finding.check == *check);
        assert!(by_check, "{table}.{column} = {value}: no {check:?} in {found:#?}");
        if *table == "saga_definition" {
            // The next one needs a definition as it was.
            forge(&lab, "delete from oncebox.saga_definition").await;
            define(&lab, ORDER).await;
        }
    }
}

/// Goal: rows that are gone or were added are found, in each table.
#[tokio::test]
async fn verify_finds_missing_and_added_rows() {
    let lab = Lab::shared().await;
    define(&lab, ORDER).await;
    for (n, (table, row, check)) in [
        ("saga_step", "step = 'ship'", Check::State),
        ("saga_compensation", "step = 'reserve'", Check::State),
        ("saga_history", "seq = 1", Check::Chain),
        ("saga_history", "seq = 4", Check::Chain),
        ("saga_history", "seq = (select max(seq) from oncebox.saga_history)", Check::Chain),
        ("saga_history", "true", Check::Chain),
        ("saga_signal", "true", Check::Signals),
        ("saga_barrier", "step = 'charge'", Check::Barrier),
        ("saga_barrier", "true", Check::Barrier),
        ("outbox", "topic = 'pay.charge'", Check::Outbox),
    ]
    .into_iter()
    .enumerate()
    {
        let mut saga = Driven::start(&lab, &format!("gone-{n}")).await;
        saga.complete().await;
        let key = if table == "outbox" { format!("key = '{}'", saga.id) } else { format!("saga_id = '{}'", saga.id) };
        let row = row.replace("oncebox.saga_history)", &format!("oncebox.saga_history where {key})"));
        forge(&lab, &format!("delete from oncebox.{table} where {key} and {row}")).await;
        let found = report(&lab, saga.id).await;
        assert!(found.findings.iter().any(|finding| finding.check == check), "{table}, {row}: {found:#?}");
    }
    for (n, (statement, check)) in [
        (
            "insert into oncebox.saga_step (saga_id, step, ordinal, changed_at) values ($, 'more', 5, now())",
            Check::State,
        ),
        (
            "insert into oncebox.saga_compensation (saga_id, step, ordinal, topic, recorded_at, changed_at)
            values ($, 'charge', 3, 'pay.back', now(), now())",
            Check::State,
        ),
        (
            "insert into oncebox.saga_history (saga_id, seq, at, event, detail, changes, hash)
            select saga_id, seq + 1, at, 'due', '{}', '{}', hash from oncebox.saga_history where saga_id = $
            order by seq desc limit 1",
            Check::Chain,
        ),
        (
            "insert into oncebox.saga_signal (saga_id, name, sent_at, state) values ($, 'more', now(), 'taken')",
            Check::Signals,
        ),
        ("insert into oncebox.saga_barrier (saga_id, step, op, epoch) values ($, 'charge', 'undo', 1)", Check::Barrier),
    ]
    .into_iter()
    .enumerate()
    {
        let mut saga = Driven::start(&lab, &format!("added-{n}")).await;
        saga.complete().await;
        forge(&lab, &statement.replace('$', &format!("'{}'", saga.id))).await;
        let found = report(&lab, saga.id).await;
        assert!(found.findings.iter().any(|finding| finding.check == check), "{statement}: {found:#?}");
    }
}

/// Goal: who rewrites a history with its hashes is found out by what it comes to.
#[tokio::test]
async fn verify_finds_a_history_that_was_rewritten_whole() {
    let lab = Lab::shared().await;
    define(&lab, ORDER).await;
    let mut saga = Driven::start(&lab, "rewritten").await;
    saga.complete().await;
    let id = saga.id;
    forge(
        &lab,
        &format!(
            "do $$
            declare
                v_row record;
                v_head bytea := '';
            begin
                update oncebox.saga_history set detail = jsonb_set(detail, '{{output}}', '{{\"id\": \"forged\"}}')
                where saga_id = '{id}' and event = 'reply' and detail ->> 'step' = 'reserve';
                for v_row in select * from oncebox.saga_history where saga_id = '{id}' order by seq loop
                    v_head := oncebox.saga_history_hash(
                        v_head, v_row.saga_id, v_row.seq, v_row.at, v_row.event, v_row.detail, v_row.changes, v_row.cause);
                    update oncebox.saga_history set hash = v_head where saga_id = '{id}' and seq = v_row.seq;
                end loop;
                update oncebox.saga set head = v_head where id = '{id}';
            end $$"
        ),
    )
    .await;
    let found = report(&lab, id).await;
    let checks: BTreeSet<Check> = found.findings.iter().map(|finding| finding.check).collect();
    assert_eq!(checks, BTreeSet::from([Check::State, Check::Outbox]), "{found:#?}");
}

/// Goal: what retention has taken is not missed: messages of a slot that was cleared, barrier rows past their time.
#[tokio::test]
async fn verify_does_not_miss_what_retention_took() {
    let lab = Lab::shared().await;
    define(&lab, ORDER).await;
    let mut saga = Driven::start(&lab, "old").await;
    saga.complete().await;
    lab.sql("truncate oncebox.outbox; update oncebox.outbox_slot set cleared_at = now() where slot = 0").await;
    let report = assert_clean(&lab, saga.id).await;
    assert_eq!((report.commands, report.messages), (4, 0), "{report:?}");
    // A message from after that is there; what is older than it is not missed.
    lab.sql("select oncebox.publish('t', '1')").await;
    assert_clean(&lab, saga.id).await;

    // In a database that was dumped and restored, transactions lead nowhere: the whole log is looked through.
    let mut saga = Driven::start(&lab, "restored").await;
    saga.complete().await;
    let id = saga.id;
    lab.sql(&format!("update oncebox.outbox set xid = (xid::text::bigint - 1)::text::xid8 where key = '{id}'")).await;
    lab.sql("update oncebox.outbox_slot set cleared_at = null").await;
    let report = assert_clean(&lab, id).await;
    assert_eq!((report.commands, report.messages), (4, 4), "{report:?}");
}
