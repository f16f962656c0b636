//! Goal: sagas are started once however often they are asked for, what was decided is what the tables hold, all of it or
//! nothing, commands leave through the outbox, and each role may do its part alone.

use crate::support::wire::Tap;
use crate::support::{Lab, connect, eventually, unique};
use oncebox::message::MessageId;
use oncebox::saga::decide::{Action, Refusal, decide};
use oncebox::saga::definition::Definition;
use oncebox::saga::fold;
use oncebox::saga::state::{Event, Op, Operator, Outcome, Saga, SagaStatus, StepStatus};
use oncebox::saga::store::{self, ActError, Applied, Defined, DefinitionError, Definitions, Undefined};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use uuid::Uuid;

/// Reserve, wait for an approval, take the money, send.
fn order(version: i32) -> Value {
    json!({
        "name": "order", "version": version, "deadline": "10m",
        "steps": [
            {"id": "reserve", "do": {"topic": "stock.reserve", "body": {"sku": "$.input.sku"}},
                "undo": {"topic": "stock.release", "body": {"id": "$.steps.reserve.output.id"}}},
            {"id": "approve", "wait": {"signal": "approved", "timeout": "1h"}},
            {"id": "charge", "pivot": true, "do": {"topic": "pay.charge", "body": {"order": "$.business_key"}}},
            {"id": "send", "do": {"topic": "parcel.send", "body": {}}}
        ]
    })
}

async fn define(conn: &mut PgConnection, document: &Value) {
    let (name, version) = (document["name"].as_str().unwrap(), document["version"].as_i64().unwrap());
    Definition::parse(document).expect("a valid definition");
    let defined = store::define(conn, name, version as i32, document, Some("test")).await.unwrap();
    assert_eq!(defined, Defined::New);
}

/// Evaluates a call that returns a uuid.
async fn call(conn: &mut PgConnection, call: &str) -> Result<Uuid, sqlx::Error> {
    sqlx::query_scalar(AssertSqlSafe(format!("select oncebox.{call}"))).fetch_one(conn).await
}

async fn start(conn: &mut PgConnection, arguments: &str) -> Uuid {
    let text = format!("saga_start({arguments})");
    call(conn, &text).await.unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The SQLSTATE, and the field that the message names.
fn refusal(error: sqlx::Error) -> (String, String) {
    let error = error.into_database_error().expect("an error of the database");
    let field = error.message().split(": ").next().unwrap_or_default().to_owned();
    (error.code().unwrap_or_default().into_owned(), field)
}

async fn assert_refused(conn: &mut PgConnection, text: &str, code: &str, field: &str) {
    let result = conn.execute(AssertSqlSafe(format!("select oncebox.{text}"))).await;
    let found = refusal(result.expect_err(text));
    assert_eq!((found.0.as_str(), found.1.as_str()), (code, field), "{text}");
}

async fn load(conn: &mut PgConnection, id: Uuid) -> Saga {
    store::load(conn, &[id]).await.unwrap().remove(0)
}

fn reply(step: &str, op: Op, outcome: Outcome, output: Option<Value>) -> Event {
    Event::Reply { step: step.into(), op, epoch: 1, outcome, output, error: None }
}

fn operator() -> Operator {
    Operator { who: "me".into(), why: "because".into() }
}

/// Applies an event that must go through.
async fn act(conn: &mut PgConnection, definitions: &Definitions, id: Uuid, event: Event) -> Saga {
    let acted = store::act(conn, definitions, id, &event, None).await;
    acted.unwrap_or_else(|error| panic!("{event:?}: {error}")).saga
}

fn status(saga: &Saga, step: &str) -> StepStatus {
    saga.steps.iter().find(|known| known.id == step).expect("a step of it").status
}

/// Goal: the same start again is the same saga, also with another version of its definition since; another start under
/// its key is refused, and so is nothing else.
#[tokio::test]
async fn the_same_start_is_the_same_saga() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    define(&mut conn, &order(1)).await;
    let id = start(&mut conn, r#"'order', 'k', '{"a": 1, "b": 2}', labels => '{"tenant": "x"}'"#).await;
    let at = r#"'order', 'at', null, 1, '2040-01-01 00:00:00.1234567Z', '90 minutes'"#;
    let other = start(&mut conn, at).await;
    define(&mut conn, &order(2)).await;
    for same in [
        r#"'order', 'k', '{"b": 2, "a": 1.0}', labels => '{"tenant": "x"}'"#,
        r#"'order', 'k', '{"a": 1, "b": 2}', 1, labels => '{"tenant": "x"}'"#,
        // What the definition says anyway.
        r#"'order', 'k', '{"a": 1, "b": 2}', deadline => '10 minutes', labels => '{"tenant": "x"}'"#,
    ] {
        assert_eq!(start(&mut conn, same).await, id, "{same}");
    }
    assert_eq!(start(&mut conn, at).await, other);
    assert_eq!(start(&mut conn, "'order', 'at', '{}', 1, '2040-01-01 00:00:00.1239Z', '01:30'").await, other);
    for otherwise in [
        r#"'order', 'k', '{"a": 1, "b": 3}', labels => '{"tenant": "x"}'"#,
        r#"'order', 'k', '{"a": 1, "b": 2}', labels => '{"tenant": "y"}'"#,
        r#"'order', 'k', '{"a": 1, "b": 2}'"#,
        r#"'order', 'k', '{"a": 1, "b": 2}', 2, labels => '{"tenant": "x"}'"#,
        r#"'order', 'k', '{"a": 1, "b": 2}', deadline => '11 minutes', labels => '{"tenant": "x"}'"#,
        r#"'order', 'k', '{"a": 1, "b": 2}', start_at => '2040-01-01', labels => '{"tenant": "x"}'"#,
        "'order', 'at', null, 1, '2040-01-01 00:00:00.124Z', '90 minutes'",
        "'order', 'at', null, 1, '2040-01-01 00:00:00.123Z', '91 minutes'",
        "'order', 'at', null, 1, '2040-01-01 00:00:00.123Z'",
    ] {
        assert_refused(&mut conn, &format!("saga_start({otherwise})"), "23505", "business_key").await;
    }
    assert_eq!(lab.number("select count(*) from oncebox.saga").await, 2);

    let saga = load(&mut conn, id).await;
    assert_eq!(
        (saga.status, saga.seq, saga.definition.as_ref()),
        (SagaStatus::Scheduled, 1, Some(&("order".into(), 1)))
    );
    assert_eq!(saga.deadline, Some(saga.start_at + 600_000));
    assert_eq!(saga.next_due, Some(saga.start_at));
    let steps: Vec<_> = saga.steps.iter().map(|step| (step.id.as_str(), step.status)).collect();
    assert_eq!(steps, ["reserve", "approve", "charge", "send"].map(|id| (id, StepStatus::Pending)));
    let saga = load(&mut conn, other).await;
    assert_eq!((saga.start_at, saga.deadline), (2_208_988_800_123, Some(2_208_994_200_123)));
    assert_eq!(saga.next_due, Some(2_208_988_800_123));
    let third = start(&mut conn, "'order', 'new', null").await;
    assert_eq!(load(&mut conn, third).await.definition, Some(("order".into(), 2)), "the highest");
}

/// Goal: steps are kept in the order in which the program keeps them, whatever the order of the document.
#[tokio::test]
async fn steps_are_kept_in_the_definitions_order() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let command = json!({"topic": "t", "body": {}});
    for (name, steps) in [
        (
            "a",
            json!([{"id": "c", "after": ["a", "b"]}, {"id": "a", "after": []}, {"id": "b", "after": []}, {"id": "d"}]),
        ),
        ("b", json!([{"id": "z", "after": ["x"]}, {"id": "y"}, {"id": "x", "after": []}])),
        ("c", json!([{"id": "one"}, {"id": "two"}, {"id": "three", "after": ["one"]}, {"id": "four"}])),
        (
            "d",
            json!([{"id": "4", "after": ["3"]}, {"id": "3", "after": ["2"]}, {"id": "2", "after": ["1"]}, {"id": "1", "after": []}]),
        ),
    ] {
        let mut document = json!({"name": name, "version": 1, "steps": steps});
        for step in document["steps"].as_array_mut().unwrap() {
            step["do"] = command.clone();
        }
        define(&mut conn, &document).await;
        let id = start(&mut conn, &format!("'{name}', 'k', null")).await;
        let expected: Vec<String> =
            Definition::parse(&document).unwrap().steps.into_iter().map(|step| step.id).collect();
        let found: Vec<String> = load(&mut conn, id).await.steps.into_iter().map(|step| step.id).collect();
        assert_eq!(found, expected, "{document}");
    }
}

/// Goal: what makes no saga is refused by the argument's name, and nothing of it is written.
#[tokio::test]
async fn refused_starts_name_the_argument() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    define(&mut conn, &order(1)).await;
    conn.execute("update oncebox.setting set payload_limit_bytes = 10000").await.unwrap();
    let deep = format!("{}1{}", "[".repeat(101), "]".repeat(101));
    let many: Vec<String> = (0..33).map(|n| format!("\"l{n}\": \"v\"")).collect();
    let cases = [
        ("null, 'k', '{}'".to_owned(), "definition"),
        ("'', 'k', '{}'".to_owned(), "definition"),
        ("'other', 'k', '{}'".to_owned(), "definition"),
        ("'other', 'k', '{}', 1".to_owned(), "definition"),
        ("'order', 'k', '{}', 2".to_owned(), "version"),
        ("'order', 'k', '{}', 0".to_owned(), "version"),
        ("'order', null, '{}'".to_owned(), "business_key"),
        ("'order', '', '{}'".to_owned(), "business_key"),
        ("'order', repeat('é', 128), '{}'".to_owned(), "business_key"),
        ("'order', 'k', to_jsonb(repeat('x', 9999))".to_owned(), "input"),
        ("'order', 'k', '{\"a\": [1e400]}'".to_owned(), "input"),
        ("'order', 'k', '{\"a\": {\"b\": 12345678901234567890}}'".to_owned(), "input"),
        (format!("'order', 'k', '{deep}'"), "input"),
        ("'order', 'k', '{}', start_at => 'infinity'".to_owned(), "start_at"),
        ("'order', 'k', '{}', start_at => '-infinity'".to_owned(), "start_at"),
        ("'order', 'k', '{}', start_at => '9999-02-01'".to_owned(), "start_at"),
        ("'order', 'k', '{}', start_at => '1969-12-31'".to_owned(), "start_at"),
        ("'order', 'k', '{}', deadline => '0'".to_owned(), "deadline"),
        ("'order', 'k', '{}', deadline => '-1 s'".to_owned(), "deadline"),
        ("'order', 'k', '{}', deadline => '20 years'".to_owned(), "deadline"),
        ("'order', 'k', '{}', labels => '[]'".to_owned(), "labels"),
        ("'order', 'k', '{}', labels => 'null'".to_owned(), "labels"),
        ("'order', 'k', '{}', labels => '{\"a\": 1}'".to_owned(), "labels"),
        ("'order', 'k', '{}', labels => '{\"a\": null}'".to_owned(), "labels"),
        ("'order', 'k', '{}', labels => jsonb_build_object('a', repeat('x', 4090))".to_owned(), "labels"),
        (format!("'order', 'k', '{{}}', labels => '{{{}}}'", many.join(", ")), "labels"),
    ];
    for (arguments, argument) in cases {
        assert_refused(&mut conn, &format!("saga_start({arguments})"), "22023", argument).await;
    }
    assert_eq!(lab.number("select count(*) from oncebox.saga").await, 0);
    // The limits themselves are within bounds.
    let full = format!(
        "'order', repeat('k', 255), to_jsonb(repeat('x', 9998)), labels => '{{{}}}', start_at => '9998-12-31'",
        many[..32].join(", ")
    );
    let id = start(&mut conn, &full).await;
    load(&mut conn, id).await;
    let numbers = r#"'order', 'n', '[9223372036854775807, -9223372036854775808, 0.1, 1e300, -2.5e-300, 1.10]'"#;
    let id = start(&mut conn, numbers).await;
    assert_eq!(load(&mut conn, id).await.input, json!([i64::MAX, i64::MIN, 0.1, 1e300, -2.5e-300, 1.1]));
}

/// Goal: of starts at the same moment one makes the saga; the others wait for it and get its id, or its refusal, or
/// make the saga themselves if it was rolled back.
#[tokio::test]
async fn twins_start_one_saga() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    define(&mut conn, &order(1)).await;
    let blocked =
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()";
    for (key, commits) in [("kept", true), ("dropped", false)] {
        let same = format!("'order', '{key}', '{{}}'");
        let mut first = conn.begin().await.unwrap();
        let id = start(&mut first, &same).await;
        let twins: Vec<_> = [same.clone(), same.clone(), same.clone(), format!("'order', '{key}', '1'")]
            .into_iter()
            .map(|arguments| {
                let url = lab.database_url.clone();
                tokio::spawn(async move { call(&mut connect(&url).await, &format!("saga_start({arguments})")).await })
            })
            .collect();
        eventually("the twins wait", async || (lab.number(blocked).await == 4).then_some(())).await;
        if commits { first.commit().await } else { first.rollback().await }.unwrap();
        let mut results = Vec::new();
        for twin in twins {
            results.push(twin.await.unwrap().map_err(refusal));
        }
        let made: std::collections::BTreeSet<Uuid> = results.iter().filter_map(|result| result.clone().ok()).collect();
        assert_eq!(made.len(), 1, "{results:?}");
        assert_eq!(made.contains(&id), commits);
        let refused = ("23505".to_owned(), "business_key".to_owned());
        if commits {
            assert_eq!(results[3], Err(refused));
        } else {
            assert!(results.iter().filter_map(|result| result.clone().err()).all(|error| error == refused));
        }
        let count = format!("select count(*) from oncebox.saga where business_key = '{key}'");
        assert_eq!(lab.number(&count).await, 1);
    }
    // Under an older snapshot the twin cannot be seen: the caller must run again, as for every conflict.
    let mut older = lab.connect().await;
    older.execute("begin isolation level repeatable read; select from oncebox.saga").await.unwrap();
    start(&mut conn, "'order', 'late', '{}'").await;
    let error = call(&mut older, "saga_start('order', 'late', '{}')").await.unwrap_err();
    assert!(oncebox::db::is_conflict(&error), "{error}");
}

/// Goal: through a whole life, forward and back, what the tables hold is what was decided, the history computes it again,
/// and its hashes hold.
#[tokio::test]
async fn what_is_kept_is_what_was_decided() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let definitions = Definitions::default();
    define(&mut conn, &order(1)).await;
    let forward = [
        Event::Due {},
        reply("reserve", Op::Do, Outcome::InProgress, None),
        reply("reserve", Op::Do, Outcome::Succeeded, Some(json!({"id": 7, "of": [0.1, "é", null]}))),
        Event::Signal { name: "approved".into(), payload: Some(json!({"by": "boss"})) },
        reply("charge", Op::Do, Outcome::Succeeded, None),
        Event::Pause(operator()),
        reply("reserve", Op::Do, Outcome::Succeeded, None),
        Event::Resume(operator()),
        reply("send", Op::Do, Outcome::Succeeded, None),
        // Too late: in the history, and nowhere else.
        reply("send", Op::Do, Outcome::Failed, None),
    ];
    let back = [
        Event::Due {},
        reply("reserve", Op::Do, Outcome::Succeeded, Some(json!({"id": 7}))),
        Event::Cancel(operator()),
        reply("reserve", Op::Undo, Outcome::Succeeded, None),
    ];
    for (key, events, end) in
        [("forward", &forward[..], SagaStatus::Completed), ("back", &back[..], SagaStatus::Compensated)]
    {
        let id = start(&mut conn, &format!(r#"'order', '{key}', '{{"sku": "x"}}'"#)).await;
        if key == "forward" {
            conn.execute(AssertSqlSafe(format!(
                "select oncebox.saga_signal('{id}', 'approved', '{{\"by\": \"boss\"}}')"
            )))
            .await
            .unwrap();
        }
        let mut seq = 1;
        for event in events {
            let mut saga = act(&mut conn, &definitions, id, event.clone()).await;
            // What is left is done at once.
            while saga.next_due.is_some_and(|due| due <= saga.start_at + 60_000)
                && saga.steps.iter().all(|step| step.due_at.is_none())
            {
                assert_eq!(load(&mut conn, id).await, saga, "{key} {event:?}");
                saga = act(&mut conn, &definitions, id, Event::Due {}).await;
            }
            assert_eq!(load(&mut conn, id).await, saga, "{key} {event:?}");
            assert!(saga.seq > seq);
            seq = saga.seq;
        }
        let saga = load(&mut conn, id).await;
        assert_eq!(saga.status, end, "{saga:?}");
        assert_eq!(store::broken_at(&mut conn, id).await.unwrap(), None);

        let rows: Vec<(i64, i64, String, Value, Value)> = sqlx::query_as(
            "select seq, (extract(epoch from at) * 1000)::bigint, event, detail, changes from oncebox.saga_history
            where saga_id = $1 order by seq",
        )
        .bind(id)
        .fetch_all(&mut conn)
        .await
        .unwrap();
        let commands: Vec<&Value> = rows.iter().filter_map(|row| row.4["commands"].as_array()).flatten().collect();
        let sent: Vec<(Uuid, String)> =
            sqlx::query_as("select message_id, topic from oncebox.outbox where key = $1 order by seq")
                .bind(id.to_string())
                .fetch_all(&mut conn)
                .await
                .unwrap();
        let recorded: Vec<(Uuid, String)> = commands
            .iter()
            .map(|command| {
                (
                    command["message_id"].as_str().unwrap().parse().unwrap(),
                    command["topic"].as_str().unwrap().to_owned(),
                )
            })
            .collect();
        assert_eq!(recorded, sent, "the history's commands and the outbox's");
        let history: Vec<fold::Past> = rows
            .into_iter()
            .map(|(seq, at, event, detail, changes)| fold::Past {
                seq,
                at,
                event: serde_json::from_value(json!({"event": event, "detail": detail})).unwrap(),
                payload_limit_bytes: changes["payload_limit_bytes"].as_u64().map(|bytes| bytes as usize),
            })
            .collect();
        let origin = fold::Origin { id, definition: saga.definition.clone(), business_key: key.to_owned() };
        let parsed = Definition::parse(&order(1)).unwrap();
        let mut again = fold::replay(&origin, Some(&parsed), &history).expect("the history leads somewhere");
        // Events name no messages.
        for (step, known) in again.steps.iter_mut().zip(&saga.steps) {
            step.message_id = known.message_id;
        }
        assert_eq!(again, saga);
    }
    let taken = "select count(*) from oncebox.saga_signal where state = 'taken'";
    assert_eq!(lab.number(taken).await, 1);
}

/// Goal: a transition of a saga that has moved on fails with 40001, and with it the whole batch: nothing is written.
#[tokio::test]
async fn a_stale_transition_writes_nothing() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let definitions = Definitions::default();
    define(&mut conn, &order(1)).await;
    let mut sagas = Vec::new();
    for key in ["a", "b", "c"] {
        let id = start(&mut conn, &format!("'order', '{key}', null")).await;
        sagas.push(load(&mut conn, id).await);
    }
    act(&mut conn, &definitions, sagas[1].id, Event::Due {}).await;
    let all = "select (select sum(seq) from oncebox.saga) + (select count(*) from oncebox.saga_history)
        + (select count(*) from oncebox.outbox) + (select count(*) from oncebox.saga_compensation)";
    let all = format!("select ({all})::bigint");
    let before = lab.number(&all).await;
    let definition = Definition::parse(&order(1)).unwrap();
    let limits = store::limits(&mut conn).await.unwrap();
    let at = store::now(&mut conn).await.unwrap();
    let event = Event::Due {};
    let batch = |sagas: &'static [Saga]| -> Vec<Applied<'static>> {
        let event: &'static Event = Box::leak(Box::new(event.clone()));
        let decide = |saga| decide(saga, &definition, event, at, &limits).unwrap();
        sagas.iter().map(|saga| Applied { before: saga, transition: decide(saga), event, at, cause: None }).collect()
    };
    let sagas: &'static [Saga] = sagas.leak();
    let error = store::apply(&mut conn, &mut batch(sagas)).await.unwrap_err();
    assert!(matches!(&error, oncebox::db::DbError::Sqlx(error) if oncebox::db::is_conflict(error)), "{error}");
    assert_eq!(lab.number(&all).await, before);
    // The same saga twice in one batch is a mistake, not a conflict.
    let mut twice = batch(&sagas[..1]);
    twice.extend(batch(&sagas[..1]));
    assert!(store::apply(&mut conn, &mut twice).await.is_err());
    assert_eq!(lab.number(&all).await, before);
    let mut rest = batch(&sagas[..1]);
    rest.extend(batch(&sagas[2..]));
    store::apply(&mut conn, &mut rest).await.unwrap();
    for saga in [0, 2] {
        assert_eq!(load(&mut conn, sagas[saga].id).await.status, SagaStatus::Running);
    }
}

/// Goal: a command goes through the outbox and a real relay to the broker, with the headers that say what it belongs
/// to, and its saga's id as key; one that is rolled back does not.
#[tokio::test]
async fn commands_reach_the_broker() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let mut conn = lab.connect().await;
    let definitions = Definitions::default();
    define(&mut conn, &order(1)).await;
    let id = start(&mut conn, r#"'order', 'k', '{"sku": "é"}'"#).await;
    let dropped = start(&mut conn, "'order', 'dropped', null").await;
    let saga = act(&mut conn, &definitions, id, Event::Due {}).await;
    let mut transaction = conn.begin().await.unwrap();
    let other = load(&mut transaction, dropped).await;
    let definition = Definition::parse(&order(1)).unwrap();
    let limits = store::limits(&mut transaction).await.unwrap();
    let at = store::now(&mut transaction).await.unwrap();
    let transition = decide(&other, &definition, &Event::Due {}, at, &limits).unwrap();
    assert_eq!(transition.commands.len(), 1);
    let event = Event::Due {};
    let mut applied = [Applied { before: &other, transition, event: &event, at, cause: None }];
    store::apply(&mut transaction, &mut applied).await.unwrap();
    transaction.rollback().await.unwrap();

    let _relay = lab.relay().await;
    let wire = tap.read(1).await;
    assert_eq!(wire.deliveries.len(), 1, "the one that was rolled back came too");
    let delivery = &wire.deliveries[0];
    assert_eq!(delivery.topic, "stock.reserve");
    assert_eq!(delivery.key(), Some(id.to_string().as_str()));
    assert_eq!(delivery.content_type.as_deref(), Some("application/json"));
    assert_eq!(delivery.body, r#"{"sku":"é"}"#.as_bytes());
    let step = &saga.steps[0];
    let message_id = delivery.message_id.as_deref().unwrap();
    assert_eq!(Some(message_id.parse::<Uuid>().unwrap()), step.message_id);
    let deadline: String = sqlx::query_scalar(
        "select to_char(due_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"') from oncebox.saga_step
        where saga_id = $1 and step = 'reserve'",
    )
    .bind(id)
    .fetch_one(&mut conn)
    .await
    .unwrap();
    for (name, value) in [
        ("oncebox-saga", json!(id)),
        ("oncebox-step", json!("reserve")),
        ("oncebox-op", json!("do")),
        ("oncebox-epoch", json!(1)),
        ("oncebox-attempt", json!(1)),
        ("oncebox-deadline", json!(deadline)),
    ] {
        assert_eq!(delivery.headers.get(name), Some(&value), "{name} in {:?}", delivery.headers);
    }
    // Consumers of the dedup window take it for what it is: a new message.
    let accepted = oncebox::inbox::accept(&mut conn, "c", MessageId(message_id.parse().unwrap()), None).await;
    assert!(accepted.unwrap());
}

/// Goal: a signal that no step can take is refused by name, the same again is fine, another one is not, and neither the
/// app nor the orchestrator waits for the other's transaction.
#[tokio::test]
async fn signals_are_taken_once() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let definitions = Definitions::default();
    define(&mut conn, &order(1)).await;
    let id = start(&mut conn, "'order', 'k', null").await;
    let nobody = Uuid::from_u128(1);
    for (arguments, code, field) in [
        (format!("'{nobody}', 'approved'"), "P0002", "saga_id"),
        ("null, 'approved'".to_owned(), "22023", "saga_id"),
        (format!("'{id}', 'other'"), "22023", "name"),
        (format!("'{id}', null"), "22023", "name"),
        (format!("'{id}', 'approved', '1e400'"), "22023", "payload"),
    ] {
        assert_refused(&mut conn, &format!("saga_signal({arguments})"), code, field).await;
    }
    conn.execute(
        "insert into oncebox.saga (id, business_key, status, created_at, start_at, changed_at)
        values ('00000000-0000-0000-0000-000000000002', 'open', 'running', now(), now(), now())",
    )
    .await
    .unwrap();
    assert_refused(&mut conn, "saga_signal('00000000-0000-0000-0000-000000000002', 'approved')", "55000", "saga_id")
        .await;

    // An app's transaction that signals, and the orchestrator's that has the saga, at the same time.
    let mut orchestrator = lab.connect().await;
    let mut working = orchestrator.begin().await.unwrap();
    let locked = store::load(&mut working, &[id]).await.unwrap();
    assert_eq!(locked.len(), 1);
    let mut app = lab.connect().await;
    app.execute("begin; set local lock_timeout = '5s'").await.unwrap();
    let signal = format!(r#"select oncebox.saga_signal('{id}', 'approved', '{{"by": 1}}')"#);
    app.execute(AssertSqlSafe(signal.as_str())).await.expect("does not wait for the orchestrator");
    working.execute("set local lock_timeout = '5s'").await.unwrap();
    working
        .execute("update oncebox.saga set seq = seq + 1 where definition is not null")
        .await
        .expect("does not wait for the app");
    working.rollback().await.unwrap();
    assert_eq!(store::due(&mut conn, 100).await.unwrap()[0].signals, []);
    app.execute("commit").await.unwrap();

    conn.execute(AssertSqlSafe(signal.as_str())).await.expect("the same again is fine");
    let other = format!("saga_signal('{id}', 'approved', '2')");
    assert_refused(&mut conn, &other, "23505", "payload").await;
    let due = store::due(&mut conn, 100).await.unwrap();
    assert_eq!(due.len(), 1);
    assert_eq!((due[0].id, due[0].due), (id, true));
    let new = &due[0].signals[0];
    assert_eq!((new.name.as_str(), &new.payload), ("approved", &Some(json!({"by": 1}))));
    assert_eq!(load(&mut conn, id).await.signals, [], "not the saga's before its history says so");

    act(&mut conn, &definitions, id, Event::Due {}).await;
    let signal_event = Event::Signal { name: new.name.clone(), payload: new.payload.clone() };
    let saga = act(&mut conn, &definitions, id, signal_event).await;
    assert_eq!(saga.signals.len(), 1, "its step does not wait yet");
    assert!(store::due(&mut conn, 100).await.unwrap().is_empty(), "neither due nor new");
    assert_eq!(lab.number("select count(*) from oncebox.saga_signal where state = 'kept'").await, 1);
    act(&mut conn, &definitions, id, reply("reserve", Op::Do, Outcome::Succeeded, None)).await;
    let saga = act(&mut conn, &definitions, id, Event::Due {}).await;
    assert_eq!(status(&saga, "approve"), StepStatus::Succeeded);
    assert_eq!(load(&mut conn, id).await.signals, []);
    assert_eq!(lab.number("select count(*) from oncebox.saga_signal where state = 'taken'").await, 1);

    for event in ["charge", "send"].map(|step| reply(step, Op::Do, Outcome::Succeeded, None)) {
        act(&mut conn, &definitions, id, event).await;
    }
    assert_eq!(load(&mut conn, id).await.status, SagaStatus::Completed);
    conn.execute(AssertSqlSafe(signal.as_str())).await.expect("the same again is fine after the end as well");
    assert_refused(&mut conn, &other, "23505", "payload").await;
    let ended = start(&mut conn, "'order', 'ended', null").await;
    act(&mut conn, &definitions, ended, Event::Cancel(operator())).await;
    assert_refused(&mut conn, &format!("saga_signal('{ended}', 'approved')"), "55000", "saga_id").await;

    // What a saga cannot take is set aside.
    let early = start(&mut conn, "'order', 'early', null, start_at => '2040-01-01'").await;
    conn.execute(AssertSqlSafe(format!("select oncebox.saga_signal('{early}', 'approved')"))).await.unwrap();
    assert_eq!(store::due(&mut conn, 100).await.unwrap().len(), 1);
    store::keep_signal(&mut conn, early, "approved").await.unwrap();
    assert!(store::due(&mut conn, 100).await.unwrap().is_empty());
}

/// Goal: each due saga goes to one orchestrator; those that are locked, wait for their time or are too many stay for the
/// next look.
#[tokio::test]
async fn due_sagas_go_to_one_orchestrator() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    define(&mut conn, &order(1)).await;
    let mut ids = Vec::new();
    for n in 0..10 {
        ids.push(start(&mut conn, &format!("'order', '{n}', null")).await);
    }
    let later = start(&mut conn, "'order', 'later', null, start_at => now() + interval '1 hour'").await;
    conn.execute(AssertSqlSafe(format!("select oncebox.saga_signal('{later}', 'approved')"))).await.unwrap();
    let (mut first, mut second) = (lab.connect().await, lab.connect().await);
    let mut one = first.begin().await.unwrap();
    let mut other = second.begin().await.unwrap();
    let of_one: Vec<store::Due> = store::due(&mut one, 6).await.unwrap();
    let of_other: Vec<store::Due> = store::due(&mut other, 100).await.unwrap();
    assert_eq!((of_one.len(), of_other.len()), (6, 5));
    let mut all: Vec<Uuid> = of_one.iter().chain(&of_other).map(|due| due.id).collect();
    all.sort_unstable();
    ids.push(later);
    ids.sort_unstable();
    assert_eq!(all, ids);
    for due in of_one.iter().chain(&of_other) {
        assert_eq!((due.due, due.signals.len()), if due.id == later { (false, 1) } else { (true, 0) });
    }
    assert!(store::due(&mut conn, 100).await.unwrap().is_empty());
    other.rollback().await.unwrap();
    assert_eq!(store::due(&mut conn, 100).await.unwrap().len(), 5);
}

/// Goal: an operator's event is refused with what could be done instead, when the saga has moved on, when it is gone, and
/// when its definition cannot be followed; a conflict is tried again.
#[tokio::test]
async fn operators_are_told_why_not() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let definitions = Definitions::default();
    define(&mut conn, &order(1)).await;
    let id = start(&mut conn, "'order', 'k', null").await;
    let cancel = Event::Cancel(operator());
    let act =
        async |conn: &mut PgConnection, id, event: &Event, seq| store::act(conn, &definitions, id, event, seq).await;
    let stale = act(&mut conn, id, &cancel, Some(7)).await.unwrap_err();
    assert!(matches!(stale, ActError::Stale { seq: 1 }), "{stale:?}");
    let refused = act(&mut conn, id, &Event::Retry(operator()), Some(1)).await.unwrap_err();
    match refused {
        ActError::Refused { refusal: Refusal::NotNow { .. }, status: SagaStatus::Scheduled, seq: 1, allowed } => {
            assert_eq!(allowed, [Action::Cancel, Action::Pause]);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(load(&mut conn, id).await.seq, 1);
    let nobody = act(&mut conn, Uuid::from_u128(1), &cancel, None).await.unwrap_err();
    assert!(matches!(nobody, ActError::NotFound(_)), "{nobody:?}");

    // Operators at the same moment: each gets its turn, or is told that the saga has moved on.
    let events = [Event::Pause(operator()), Event::Due {}, Event::Pause(operator()), Event::Due {}];
    let definitions = std::sync::Arc::new(Definitions::default());
    let actors: Vec<_> = events
        .into_iter()
        .map(|event| {
            let (url, definitions) = (lab.database_url.clone(), definitions.clone());
            tokio::spawn(async move { store::act(&mut connect(&url).await, &definitions, id, &event, Some(1)).await })
        })
        .collect();
    let mut done = 0;
    for actor in actors {
        match actor.await.unwrap() {
            Ok(acted) => {
                assert_eq!(acted.saga.seq, 2);
                done += 1;
            }
            Err(ActError::Stale { seq: 2 }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(done, 1);

    // A document that only the database has looked at.
    conn.execute(r#"insert into oncebox.saga_definition (name, version, document) values ('bad', 1, '{"name": "bad", "version": 1, "steps": [{"id": "a"}]}')"#)
        .await
        .unwrap();
    let bad = start(&mut conn, "'bad', 'k', null").await;
    let invalid = store::act(&mut conn, &definitions, bad, &Event::Due {}, None).await.unwrap_err();
    assert!(
        matches!(&invalid, ActError::Definition(DefinitionError::Invalid { name, .. }) if name == "bad"),
        "{invalid:?}"
    );

    // Under an older snapshot the first try meets a conflict; the second one is a transaction of its own.
    conn.execute(
        "update oncebox.setting set saga_retention = '1 hour';
        set session_replication_role = replica;
        update oncebox.saga set status = 'cancelled', phase = 'forward', paused = false, next_due = null,
            ended_at = now() - interval '2 hours';
        set session_replication_role = origin;
        select oncebox.saga_purge(10)",
    )
    .await
    .unwrap();
    let purged = store::act(&mut conn, &definitions, id, &cancel, None).await.unwrap_err();
    assert!(matches!(purged, ActError::Purged(_)), "{purged:?}");
}

/// Goal: a version keeps its document; one that nothing follows can go, and what takes its place is what is followed.
#[tokio::test]
async fn a_definition_keeps_its_document() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let definitions = Definitions::default();
    define(&mut conn, &order(1)).await;
    assert_eq!(store::define(&mut conn, "order", 1, &order(1), None).await.unwrap(), Defined::AlreadySame);
    let mut changed = order(1);
    changed["deadline"] = json!("11m");
    assert_eq!(store::define(&mut conn, "order", 1, &changed, None).await.unwrap(), Defined::Conflict);
    let error = store::define(&mut conn, "order", 2, &order(3), None).await.unwrap_err();
    assert!(error.to_string().contains("document: "), "{error}");
    let mut cycle = order(2);
    cycle["steps"][0]["after"] = json!(["send"]);
    assert!(store::define(&mut conn, "order", 2, &cycle, None).await.is_err(), "no order");

    let saga = |id: Uuid| Saga {
        id,
        ..serde_json::from_value(json!({
        "id": id, "definition": ["order", 1], "business_key": "k", "status": "running", "phase": "forward",
        "paused": false, "seq": 1, "input": {}, "labels": {}, "start_at": 0, "steps": [], "signals": []}))
        .unwrap()
    };
    let sagas = [saga(Uuid::from_u128(1)), saga(Uuid::from_u128(2))];
    let followed = definitions.of(&mut conn, &sagas).await.unwrap();
    assert_eq!(followed.len(), 2);
    assert_eq!(followed[0].as_ref().unwrap().deadline_ms, Some(600_000));
    assert_eq!(store::undefine(&mut conn, "order", 1).await.unwrap(), Undefined::Removed);
    assert_eq!(store::undefine(&mut conn, "order", 1).await.unwrap(), Undefined::NotThere);
    let missing = definitions.of(&mut conn, &sagas).await.unwrap().remove(0).unwrap_err();
    assert!(matches!(missing, DefinitionError::Missing { version: 1, .. }), "{missing:?}");
    assert_eq!(store::define(&mut conn, "order", 1, &changed, None).await.unwrap(), Defined::New);
    let followed = definitions.of(&mut conn, &sagas[..1]).await.unwrap();
    assert_eq!(followed[0].as_ref().unwrap().deadline_ms, Some(660_000), "a definition that is gone was followed");
    start(&mut conn, "'order', 'k', null").await;
    match store::undefine(&mut conn, "order", 1).await.unwrap() {
        Undefined::InUse(by) => assert!(by.contains("1 saga"), "{by}"),
        other => panic!("{other:?}"),
    }
}

/// Goal: sagas go after their retention, with everything of theirs, and leave a note; those that run or are young stay,
/// and so do young rows of the barrier and requests.
#[tokio::test]
async fn only_old_sagas_go() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    define(&mut conn, &order(1)).await;
    for key in ["old", "older", "young", "running", "locked"] {
        start(&mut conn, &format!("'order', '{key}', null")).await;
    }
    let ended = |key: &str, days: i32| {
        format!(
            "update oncebox.saga set status = 'cancelled', next_due = null, ended_at = now() - interval '{days} days'
            where business_key = '{key}';"
        )
    };
    let text = [ended("old", 91), ended("older", 92), ended("locked", 99), ended("young", 89)].concat();
    conn.execute(AssertSqlSafe(format!(
        "set session_replication_role = replica; {text}
        insert into oncebox.saga_signal (saga_id, name, sent_at) select id, 'approved', now() from oncebox.saga;
        insert into oncebox.saga_compensation (saga_id, step, ordinal, topic, recorded_at, changed_at)
        select id, 'reserve', 0, 't', now(), now() from oncebox.saga;
        set session_replication_role = origin;
        insert into oncebox.saga_barrier (saga_id, step, op, epoch, at)
        select gen_random_uuid(), 's', 'do', 1, now() - n * interval '1 day' from unnest(array[59, 61, 62]) as n;
        insert into oncebox.saga_request (idempotency_key, request_hash, saga_id, at)
        select n::text, '', gen_random_uuid(), now() - n * interval '1 day' from unnest(array[89, 91]) as n"
    )))
    .await
    .unwrap();
    let mut app = lab.connect().await;
    app.execute("begin; select from oncebox.saga where business_key = 'locked' for key share").await.unwrap();
    let keys = async |conn: &mut PgConnection| -> Vec<String> {
        sqlx::query_scalar("select business_key from oncebox.saga order by 1").fetch_all(conn).await.unwrap()
    };
    assert_eq!(store::purge(&mut conn, 1).await.unwrap(), 3, "one of each kind");
    assert_eq!(keys(&mut conn).await, ["locked", "old", "running", "young"]);
    assert_eq!(store::purge(&mut conn, 100).await.unwrap(), 2);
    assert_eq!(store::purge(&mut conn, 100).await.unwrap(), 0);
    assert_eq!(keys(&mut conn).await, ["locked", "running", "young"]);
    app.execute("commit").await.unwrap();
    assert_eq!(store::purge(&mut conn, 100).await.unwrap(), 1);
    for (table, rows) in [
        ("saga", 2),
        ("saga_step", 8),
        ("saga_compensation", 2),
        ("saga_history", 2),
        ("saga_signal", 2),
        ("saga_purged", 3),
        ("saga_barrier", 1),
        ("saga_request", 1),
    ] {
        assert_eq!(lab.number(&format!("select count(*) from oncebox.{table}")).await, rows, "{table}");
    }
    // Its key is free again.
    start(&mut conn, "'order', 'old', '1'").await;
}

/// Goal: in a database that was never analysed, however many sagas there are, no statement of a batch reads a whole
/// table.
#[tokio::test]
async fn batches_find_their_rows_by_key() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    define(&mut conn, &order(1)).await;
    conn.execute(
        "alter table oncebox.saga set (autovacuum_enabled = off);
        alter table oncebox.saga_step set (autovacuum_enabled = off)",
    )
    .await
    .unwrap();
    // The plans are made while there is next to nothing, and kept.
    for size in [1, 500] {
        let many =
            format!("select oncebox.saga_start('order', '{size}-' || n, null) from generate_series(1, {size}) as n");
        conn.execute(AssertSqlSafe(many)).await.unwrap();
        let mut transaction = conn.begin().await.unwrap();
        let due = store::due(&mut transaction, 100).await.unwrap();
        let ids: Vec<Uuid> = due.iter().map(|due| due.id).collect();
        let sagas = store::load(&mut transaction, &ids).await.unwrap();
        assert_eq!(sagas.len(), 100.min(size));
        let definition = Definition::parse(&order(1)).unwrap();
        let limits = store::limits(&mut transaction).await.unwrap();
        let at = store::now(&mut transaction).await.unwrap();
        let event = Event::Due {};
        let mut applied: Vec<Applied<'_>> = sagas
            .iter()
            .map(|saga| {
                let transition = decide(saga, &definition, &event, at, &limits).unwrap();
                Applied { before: saga, transition, event: &event, at, cause: None }
            })
            .collect();
        store::apply(&mut transaction, &mut applied).await.unwrap();
        store::purge(&mut transaction, 100).await.unwrap();
        let scans: Vec<(String, i64)> = sqlx::query_as(
            "select relname::text, seq_scan from pg_stat_xact_user_tables
            where schemaname = 'oncebox' and relname in ('saga', 'saga_step', 'saga_compensation', 'saga_history',
                'saga_signal', 'saga_definition') and seq_scan > 0 order by 1",
        )
        .fetch_all(&mut *transaction)
        .await
        .unwrap();
        assert_eq!(scans, [], "with {size} sagas");
        transaction.commit().await.unwrap();
    }
}

/// Goal: an app that only publishes may start and signal sagas and nothing else; the orchestrator moves them through the
/// functions alone.
#[tokio::test]
async fn each_role_does_its_part() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    define(&mut conn, &order(1)).await;
    let login = async |group: &str| {
        let role = unique("login");
        lab.sql(&format!("create role {role} login in role {group}")).await;
        connect(&lab.database_url.replace("oncebox@", &format!("{role}@"))).await
    };
    let mut producer = login("oncebox_producer").await;
    let id = start(&mut producer, "'order', 'k', null").await;
    let moves =
        [format!("saga_load('{{{id}}}')"), "saga_due(1)".into(), "saga_apply('[]')".into(), "saga_purge(1)".into()];
    let inner = format!("saga_record('{id}', 'due', '{{}}', '{{}}', now())");
    for call in moves.iter().chain([&inner]) {
        let result = producer.execute(AssertSqlSafe(format!("select oncebox.{call}"))).await;
        assert_eq!(refusal(result.expect_err(call)).0, "42501", "{call}");
    }
    let mut orchestrator = login("oncebox_orchestrator").await;
    for call in &moves {
        orchestrator.execute(AssertSqlSafe(format!("select oncebox.{call}"))).await.expect(call);
    }
    for refused in [
        format!("select oncebox.{inner}"),
        "update oncebox.saga set seq = seq + 1".to_owned(),
        "delete from oncebox.saga_history".to_owned(),
        "insert into oncebox.saga_definition (name, version, document) values ('a', 1, '{}')".to_owned(),
    ] {
        let result = orchestrator.execute(AssertSqlSafe(refused.clone())).await;
        assert_eq!(refusal(result.expect_err(&refused)).0, "42501", "{refused}");
    }
    // All that the program itself asks of it.
    let saga = act(&mut orchestrator, &Definitions::default(), id, Event::Due {}).await;
    assert_eq!(saga.status, SagaStatus::Running);
    assert_eq!(store::broken_at(&mut orchestrator, id).await.unwrap(), None);
    let mut admin = login("oncebox_admin").await;
    act(&mut admin, &Definitions::default(), id, Event::Cancel(operator())).await;
    let undefined = store::undefine(&mut admin, "order", 1).await.unwrap();
    assert!(matches!(undefined, Undefined::InUse(_)), "{undefined:?}");
    assert_eq!(store::define(&mut admin, "order", 2, &order(2), None).await.unwrap(), Defined::New);
}
