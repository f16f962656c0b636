//! Goal: sagas without a definition: what their functions record in the transactions of the participants is what the
//! orchestrator undoes in reverse order, and nothing of it can be recorded too late, twice or elsewhere.

use crate::support::participant::Shop;
use crate::support::{LIMIT, Lab, connect, eventually_number, unique};
use oncebox::db::sqlstate;
use oncebox::saga::decide::{Limits, decide};
use oncebox::saga::definition::Definition;
use oncebox::saga::state::{Event, Op, Operator, Outcome, Saga, SagaStatus, StepStatus};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use uuid::Uuid;

async fn call<T>(conn: &mut PgConnection, call: &str) -> Result<T, sqlx::Error>
where
    T: Send + Unpin + for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    sqlx::query_scalar(AssertSqlSafe(format!("select oncebox.{call}"))).fetch_one(conn).await
}

async fn run(conn: &mut PgConnection, what: &str) {
    conn.execute(AssertSqlSafe(format!("select oncebox.{what}"))).await.unwrap_or_else(|e| panic!("{what}: {e}"));
}

/// The SQLSTATE and the message of a call that must fail.
async fn refusal(conn: &mut PgConnection, what: &str) -> (String, String) {
    let error = conn.execute(AssertSqlSafe(format!("select oncebox.{what}"))).await.expect_err(what);
    (sqlstate(&error).unwrap_or_default(), error.as_database_error().unwrap().message().to_owned())
}

async fn open(conn: &mut PgConnection, key: &str) -> Uuid {
    call(conn, &format!("saga_open('{key}')")).await.unwrap()
}

async fn load(conn: &mut PgConnection, id: Uuid) -> Saga {
    let state: Value = sqlx::query_scalar("select state from oncebox.saga_load(array[$1::uuid])")
        .bind(id)
        .fetch_one(conn)
        .await
        .unwrap();
    serde_json::from_value(state).unwrap()
}

/// The history as events; its chain is whole.
async fn history(conn: &mut PgConnection, id: Uuid) -> Vec<(Event, Value)> {
    let broken: Option<i64> = call(conn, &format!("saga_history_broken('{id}')")).await.unwrap();
    assert_eq!(broken, None);
    let rows: Vec<(Value, Value)> = sqlx::query_as(
        "select jsonb_build_object('event', event, 'detail', detail), changes from oncebox.saga_history
        where saga_id = $1 order by seq",
    )
    .bind(id)
    .fetch_all(conn)
    .await
    .unwrap();
    rows.into_iter().map(|(event, changes)| (serde_json::from_value(event).unwrap(), changes)).collect()
}

/// Goal: the same key and deadline is the same saga while it runs; anything else under the key is refused by name.
#[tokio::test]
async fn saga_open_is_idempotent() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let id: Uuid = call(&mut conn, "saga_open('order 1', '1 day')").await.unwrap();
    assert_eq!(id.get_version_num(), 7);
    assert_eq!(call::<Uuid>(&mut conn, "saga_open('order 1', '24 hours')").await.unwrap(), id);
    let without = open(&mut conn, "order 2").await;
    assert_eq!(open(&mut conn, "order 2").await, without);
    for other in ["saga_open('order 1')", "saga_open('order 1', '2 days')", "saga_open('order 2', '1 day')"] {
        let (code, text) = refusal(&mut conn, other).await;
        assert!(code == "23505" && text.starts_with("business_key:"), "{other}: {code} {text}");
    }
    run(&mut conn, &format!("saga_complete('{id}')")).await;
    let (code, text) = refusal(&mut conn, "saga_open('order 1', '1 day')").await;
    assert!(code == "23505" && text.contains("completed") && text.contains(&id.to_string()), "{code} {text}");
    for (name, bad) in [
        ("business_key", "saga_open(null)"),
        ("business_key", "saga_open('')"),
        ("business_key", "saga_open(repeat('ü', 128))"),
        ("deadline", "saga_open('k', '0')"),
        ("deadline", "saga_open('k', '-1 s')"),
        ("deadline", "saga_open('k', '11 years')"),
    ] {
        let (code, text) = refusal(&mut conn, bad).await;
        assert!(code == "22023" && text.starts_with(name), "{bad}: {code} {text}");
    }

    let saga = load(&mut conn, without).await;
    assert_eq!((saga.status, saga.seq, saga.next_due, saga.definition), (SagaStatus::Running, 1, None, None));
    let saga = load(&mut conn, id).await;
    assert_eq!(saga.deadline, Some(saga.start_at + 86_400_000));
    let first = history(&mut conn, id).await.swap_remove(0);
    assert_eq!(first, (Event::Opened { deadline: saga.deadline }, json!({})));
}

/// Goal: two who open the same saga at the same time: the second waits, and gets the first's id, or its own.
#[tokio::test]
async fn saga_open_waits_for_its_twin() {
    let lab = Lab::shared().await;
    let (mut first, mut observer) = (lab.connect().await, lab.connect().await);
    for (key, how) in [("k1", "commit"), ("k2", "rollback")] {
        first.execute("begin").await.unwrap();
        let id = open(&mut first, key).await;
        let mut second = lab.connect().await;
        let waits = tokio::spawn(async move { open(&mut second, key).await });
        let waiting =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'transactionid'";
        eventually_number(&mut observer, waiting, 1).await;
        first.execute(how).await.unwrap();
        let other = tokio::time::timeout(LIMIT, waits).await.expect("it goes on").unwrap();
        assert_eq!(other == id, how == "commit");
    }
}

/// Goal: a compensation is recorded with the work or not at all; with it comes the step, the row of the barrier that lets
/// the undo run, and history. The same again does nothing, another one under its name is refused.
#[tokio::test]
async fn saga_compensate_with_records_with_the_work() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let id = open(&mut conn, "order").await;
    let enlist =
        |step: &str, payload: &str| format!("saga_compensate_with('{id}', '{step}', 'stock.release', '{payload}')");
    let mut tx = conn.begin().await.unwrap();
    run(&mut tx, &enlist("lost", "1")).await;
    tx.rollback().await.unwrap();
    run(&mut conn, &enlist("reserve", r#"{"id": 7}"#)).await;
    run(&mut conn, &enlist("reserve", r#"{"id": 7.0}"#)).await;
    run(&mut conn, &enlist("charge", "\"$.input.amount\"")).await;
    let (code, text) = refusal(&mut conn, &enlist("reserve", "8")).await;
    assert!(code == "23505" && text.starts_with("step:"), "{code} {text}");
    let (code, _) = refusal(&mut conn, &enlist("reserve", "{\"id\": 7}").replace("stock.release", "other")).await;
    assert_eq!(code, "23505");

    let saga = load(&mut conn, id).await;
    let steps: Vec<_> =
        saga.steps.iter().map(|step| (step.id.as_str(), step.status, step.epoch, step.attempt)).collect();
    assert_eq!(steps, [("reserve", StepStatus::Succeeded, 1, 0), ("charge", StepStatus::Succeeded, 1, 0)]);
    let records = history(&mut conn, id).await;
    assert_eq!(records.len(), 3);
    let event =
        |step: &str, payload| Event::Enlisted { step: step.to_owned(), topic: "stock.release".to_owned(), payload };
    assert_eq!(records[1].0, event("reserve", json!({"id": 7})));
    assert_eq!(records[2].0, event("charge", json!("$.input.amount")));
    let changes: oncebox::saga::decide::Changes = serde_json::from_value(records[2].1.clone()).unwrap();
    assert_eq!((changes.steps[0].from, changes.steps[0].to), (StepStatus::Pending, StepStatus::Succeeded));
    assert_eq!(lab.number("select count(*) from oncebox.saga_barrier where op = 'do' and epoch = 1").await, 2);
    for (op, answer) in [("undo", "run"), ("do", "void")] {
        let got: String = call(&mut conn, &format!("saga_barrier('{id}', 'reserve', '{op}', 1)")).await.unwrap();
        assert_eq!(got, answer);
    }

    for (name, bad) in [
        ("saga_id", "saga_compensate_with(null, 's', 't', '1')".to_owned()),
        ("saga_id", format!("saga_compensate_with('{}', 's', 't', '1')", Uuid::now_v7())),
        ("step", format!("saga_compensate_with('{id}', null, 't', '1')")),
        ("step", format!("saga_compensate_with('{id}', repeat('x', 101), 't', '1')")),
        ("topic", format!("saga_compensate_with('{id}', 's', '', '1')")),
        ("topic", format!("saga_compensate_with('{id}', 's', repeat('x', 256), '1')")),
        ("payload", format!("saga_compensate_with('{id}', 's', 't', null)")),
        ("payload", format!("saga_compensate_with('{id}', 's', 't', to_jsonb(repeat('x', 1048576)))")),
    ] {
        let (code, text) = refusal(&mut conn, &bad).await;
        assert!(code == "22023" && text.starts_with(name), "{bad}: {code} {text}");
    }
    let error = conn.execute(AssertSqlSafe(format!("select oncebox.saga_abort('{}', 'x')", Uuid::now_v7()))).await;
    let hint = error.unwrap_err().into_database_error().unwrap();
    let hint = hint.downcast_ref::<sqlx::postgres::PgDatabaseError>().hint().unwrap_or_default().to_owned();
    assert!(hint.contains("the orchestrator's database only"), "{hint}");
}

/// Goal: a saga holds a thousand steps and no more; participants that enlist at the same time get places of their own.
#[tokio::test(flavor = "multi_thread")]
async fn steps_are_bounded_and_in_order() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let id = open(&mut conn, "order").await;
    let mut participants = Vec::new();
    for participant in 0..4 {
        let mut conn = lab.connect().await;
        participants.push(tokio::spawn(async move {
            for step in 0..250 {
                run(&mut conn, &format!("saga_compensate_with('{id}', '{participant} {step}', 't', '1')")).await;
            }
        }));
    }
    for participant in participants {
        tokio::time::timeout(2 * LIMIT, participant).await.expect("none waits for ever").unwrap();
    }
    let (code, text) = refusal(&mut conn, &format!("saga_compensate_with('{id}', 'one more', 't', '1')")).await;
    assert!(code == "22023" && text.contains("1000"), "{code} {text}");
    run(&mut conn, &format!("saga_compensate_with('{id}', '3 249', 't', '1')")).await;
    assert_eq!(lab.number("select max(ordinal)::bigint from oncebox.saga_step").await, 999);
    assert_eq!(history(&mut conn, id).await.len(), 1_001);
}

/// Goal: complete and abort end what they should, once; afterwards nothing can be enlisted, and the other is refused by
/// the status it met.
#[tokio::test]
async fn saga_complete_and_abort_are_final() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let (done, undone) = (open(&mut conn, "done").await, open(&mut conn, "undone").await);
    let limit = "saga_open('late', '1 hour')";
    let late: Uuid = call(&mut conn, limit).await.unwrap();
    for id in [done, undone, late] {
        run(&mut conn, &format!("saga_compensate_with('{id}', 's', 't', '1')")).await;
    }
    for _ in 0..2 {
        run(&mut conn, &format!("saga_complete('{done}')")).await;
        run(&mut conn, &format!("saga_abort('{undone}', 'no money')")).await;
        run(&mut conn, &format!("saga_abort('{late}', repeat('ü', 3000))")).await;
    }
    let saga = load(&mut conn, done).await;
    assert_eq!((saga.status, saga.seq, saga.next_due), (SagaStatus::Completed, 3, None));
    assert_eq!(lab.number("select count(*) from oncebox.saga_compensation where status = 'released'").await, 1);
    assert_eq!(lab.number("select count(*) from oncebox.saga where ended_at is not null").await, 1);
    assert_eq!(history(&mut conn, done).await[2].0, Event::Completed {});
    let saga = load(&mut conn, undone).await;
    assert_eq!((saga.status, saga.seq, saga.reason.as_deref()), (SagaStatus::Compensating, 3, Some("no money")));
    assert!(saga.next_due.is_some());
    let aborted = history(&mut conn, undone).await.swap_remove(2);
    assert_eq!(aborted.0, Event::Aborted { reason: "no money".to_owned() });
    assert_eq!(aborted.1, json!({"saga": {"from": "running", "to": "compensating"}}));
    let saga = load(&mut conn, late).await;
    assert_eq!(saga.reason.map(|reason| reason.len()), Some(4_096));
    // Not at its deadline, now.
    assert!(saga.next_due < saga.deadline);

    for (what, status) in [
        (format!("saga_complete('{undone}')"), "compensating"),
        (format!("saga_abort('{done}', 'x')"), "completed"),
        (format!("saga_compensate_with('{done}', 's', 't', '1')"), "completed"),
        (format!("saga_compensate_with('{undone}', 'new', 't', '1')"), "compensating"),
    ] {
        let (code, text) = refusal(&mut conn, &what).await;
        assert!(code == "55000" && text.contains(status), "{what}: {code} {text}");
    }
    let (code, text) = refusal(&mut conn, &format!("saga_abort('{late}', null)")).await;
    assert!(code == "22023" && text.starts_with("reason"), "{code} {text}");
    lab.sql(
        "insert into oncebox.saga_definition (name, version, document)
        values ('d', 1, '{\"name\": \"d\", \"version\": 1, \"steps\": [{\"id\": \"a\", \"do\": {\"topic\": \"t\"}}]}')",
    )
    .await;
    let defined: Uuid = call(&mut conn, "saga_start('d', 'k', '{}')").await.unwrap();
    for what in ["saga_complete('$')", "saga_abort('$', 'x')", "saga_compensate_with('$', 's', 't', '1')"] {
        let (code, text) = refusal(&mut conn, &what.replace('$', &defined.to_string())).await;
        assert!(code == "22023" && text.starts_with("saga_id") && text.contains("\"d\""), "{what}: {code} {text}");
    }
}

/// Goal: an aborted saga is undone from its newest step to its oldest, each after the one before was answered, with the
/// payloads as they were given.
#[tokio::test]
async fn aborted_saga_is_undone_in_reverse() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let id = open(&mut conn, "order").await;
    let steps = ["a", "b", "c"];
    for step in steps {
        run(
            &mut conn,
            &format!("saga_compensate_with('{id}', '{step}', 'undo.{step}', '{{\"of\": \"$.input.{step}\"}}')"),
        )
        .await;
    }
    run(&mut conn, &format!("saga_abort('{id}', 'no')")).await;
    let mut saga = load(&mut conn, id).await;
    let definition = Definition::enlisted(&saga);
    let limits = Limits { payload_bytes: 1_048_576 };
    let now = saga.next_due.expect("it is due");
    let mut event = Event::Due {};
    for step in steps.iter().rev() {
        let transition = decide(&saga, &definition, &event, now, &limits).unwrap();
        let sent: Vec<_> = transition.commands.iter().map(|sent| (sent.step.as_str(), sent.op, sent.epoch)).collect();
        assert_eq!(sent, [(*step, Op::Undo, 1)]);
        assert_eq!(transition.commands[0].topic, format!("undo.{step}"));
        assert_eq!(transition.commands[0].body, json!({"of": format!("$.input.{step}")}));
        event = Event::Reply {
            step: step.to_string(),
            op: Op::Undo,
            epoch: 1,
            outcome: Outcome::Succeeded,
            output: None,
            error: None,
        };
        saga = transition.saga;
    }
    let transition = decide(&saga, &definition, &event, now, &limits).unwrap();
    assert!(transition.commands.is_empty());
    assert_eq!(transition.saga.status, SagaStatus::Compensated);
}

/// Goal: who publishes may also open, enlist, complete and abort, with no right on the tables.
#[tokio::test]
async fn a_producer_enlists() {
    let lab = Lab::shared().await;
    for group in ["oncebox_producer", "oncebox_consumer", "oncebox_admin"] {
        let role = unique("login");
        lab.sql(&format!("create role {role} login in role {group}")).await;
        let mut conn = connect(&lab.database_url.replace("oncebox@", &format!("{role}@"))).await;
        for end in ["saga_complete('$')", "saga_abort('$', 'x')"] {
            let id = open(&mut conn, &unique("order")).await;
            run(&mut conn, &format!("saga_compensate_with('{id}', 's', 't', '1')")).await;
            run(&mut conn, &end.replace('$', &id.to_string())).await;
        }
        let refused = conn.execute("select oncebox.saga_take(gen_random_uuid())").await.unwrap_err();
        assert_eq!(sqlstate(&refused).as_deref(), Some("42501"));
    }
}

/// Goal: end to end, with an orchestrator: the undo of a step goes out when the one before it was answered, not when it
/// was done; a saga that an operator holds waits; one whose deadline passes turns back by itself.
#[tokio::test(flavor = "multi_thread")]
async fn undos_go_out_one_after_the_other() {
    let shop = Shop::open().await;
    let enlist = async |saga: Uuid| {
        for step in ["one", "two", "three"] {
            let payload = json!({"plan": {"two": {"undo": ["silent"]}}});
            shop.lab
                .sql(&format!("select oncebox.saga_compensate_with('{saga}', '{step}', 'undo.{step}', '{payload}')"))
                .await;
        }
    };
    let saga = shop.started("select oncebox.saga_open('order')").await;
    enlist(saga).await;
    let who = || Operator { who: "a test".to_owned(), why: "to see".to_owned() };
    shop.act(saga, Event::Pause(who())).await.expect("it runs");
    shop.lab.sql(&format!("select oncebox.saga_abort('{saga}', 'no money')")).await;
    let late = shop.started("select oncebox.saga_open('late', '2 s')").await;
    enlist(late).await;
    shop.has_done(late, "two").await;
    assert_eq!(shop.effects(saga).await, [""; 0], "it is held");
    shop.act(saga, Event::Resume(who())).await.expect("it is held");
    shop.has_done(saga, "two").await;
    for saga in [saga, late] {
        shop.step_is(saga, "two", "undoing").await;
        assert_eq!(shop.effects(saga).await, ["three undo", "two undo"]);
        assert_eq!(shop.calls(saga, "one", "undo").await, []);
        shop.reply(saga, "two", "succeeded").await;
        shop.ends(saga, "compensated").await;
        assert_eq!(shop.effects(saga).await, ["three undo", "two undo", "one undo"]);
        shop.sound(saga).await;
        assert_eq!(shop.value::<Option<i64>>(&format!("select oncebox.saga_history_broken('{saga}')")).await, None);
    }
}
