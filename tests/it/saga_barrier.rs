//! Goal: an action and what undoes it run once each in an epoch, in whatever order, however often and however
//! concurrently their commands come; what a participant replies is what the saga's side reads.

use crate::support::{LIMIT, Lab};
use oncebox::db::sqlstate;
use oncebox::message::Headers;
use oncebox::outbox::{NewMessage, publish};
use oncebox::saga::participant::{Barrier, CommandHeaders, Reply, barrier, reply};
use oncebox::saga::state::Op;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use uuid::Uuid;

fn command(saga: Uuid, op: Op, epoch: i32) -> CommandHeaders {
    CommandHeaders { saga, step: "reserve".to_owned(), op, epoch, attempt: Some(1), deadline: None }
}

async fn ask(conn: &mut PgConnection, saga: Uuid, op: Op) -> Barrier {
    barrier(conn, &command(saga, op, 1)).await.unwrap()
}

async fn begin(conn: &mut PgConnection) {
    conn.execute("begin").await.unwrap();
}

async fn end(conn: &mut PgConnection, how: &'static str) {
    conn.execute(how).await.unwrap();
}

/// Headers, outcome, output and error of a saga's replies, in the order of their publishing.
async fn replies(lab: &Lab, saga: Uuid) -> Vec<(Value, Value)> {
    sqlx::query_as(
        "select headers, convert_from(body, 'UTF8')::jsonb from oncebox.outbox
        where topic = 'oncebox.saga.reply' and key = $1 and content_type = 'application/json' order by seq",
    )
    .bind(saga.to_string())
    .fetch_all(&mut lab.connect().await)
    .await
    .unwrap()
}

async fn outcomes(lab: &Lab, saga: Uuid) -> Vec<String> {
    let text = |(headers, body): &(Value, Value)| {
        format!("{} {} {}", headers["oncebox-op"], headers["oncebox-epoch"], body["outcome"]).replace('"', "")
    };
    replies(lab, saga).await.iter().map(text).collect()
}

/// Goal: in every order and number of do and undo, each in a transaction of its own, the barrier lets each run at most
/// once, no undo before its do, no do after its undo; and it speaks for an undo that has nothing to undo, once.
#[tokio::test]
async fn barrier_answers_every_order() {
    use Barrier::{Duplicate, Run, Void};
    use Op::{Do, Undo};
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    for (asked, answered, said) in [
        (vec![Do, Do, Do], vec![Run, Duplicate, Duplicate], 0),
        (vec![Do, Undo], vec![Run, Run], 0),
        (vec![Do, Undo, Undo, Do], vec![Run, Run, Duplicate, Void], 0),
        (vec![Undo], vec![Void], 1),
        (vec![Undo, Do, Do], vec![Void, Void, Void], 1),
        (vec![Undo, Undo, Do, Undo], vec![Void, Duplicate, Void, Duplicate], 1),
    ] {
        for in_one in [false, true] {
            let saga = Uuid::now_v7();
            let mut got = Vec::new();
            if in_one {
                begin(&mut conn).await;
            }
            for op in &asked {
                got.push(ask(&mut conn, saga, *op).await);
            }
            if in_one {
                end(&mut conn, "commit").await;
            }
            assert_eq!(got, answered, "{asked:?}, in one transaction: {in_one}");
            assert_eq!(outcomes(&lab, saga).await, vec!["undo 1 undo_noop"; said], "{asked:?}");
        }
    }
}

/// Goal: another epoch, step or saga is another barrier.
#[tokio::test]
async fn barrier_keeps_epochs_and_steps_apart() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let saga = Uuid::now_v7();
    assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Void);
    assert_eq!(barrier(&mut conn, &command(saga, Op::Do, 2)).await.unwrap(), Barrier::Run);
    assert_eq!(barrier(&mut conn, &command(saga, Op::Undo, 2)).await.unwrap(), Barrier::Run);
    let other = CommandHeaders { step: "charge".to_owned(), ..command(saga, Op::Do, 1) };
    assert_eq!(barrier(&mut conn, &other).await.unwrap(), Barrier::Run);
    assert_eq!(ask(&mut conn, Uuid::now_v7(), Op::Do).await, Barrier::Run);
}

/// Goal: what was rolled back was never asked; a savepoint after the barrier keeps its row, one before it does not.
#[tokio::test]
async fn barrier_rolls_back_with_its_transaction() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let saga = Uuid::now_v7();
    for op in [Op::Do, Op::Undo] {
        begin(&mut conn).await;
        ask(&mut conn, saga, op).await;
        end(&mut conn, "rollback").await;
    }
    assert_eq!(lab.number("select count(*) from oncebox.saga_barrier").await, 0);
    assert!(outcomes(&lab, saga).await.is_empty());

    begin(&mut conn).await;
    end(&mut conn, "savepoint before").await;
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Run);
    end(&mut conn, "rollback to before").await;
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Run);
    end(&mut conn, "savepoint after").await;
    publish(&mut conn, NewMessage::json("effect", json!(1))).await.unwrap();
    end(&mut conn, "rollback to after").await;
    reply(&mut conn, &command(saga, Op::Do, 1), Reply::Failed("sold out".to_owned())).await.unwrap();
    end(&mut conn, "commit").await;
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Duplicate);
    assert_eq!(lab.number("select count(*) from oncebox.outbox where topic = 'effect'").await, 0);
    assert_eq!(outcomes(&lab, saga).await, ["do 1 failed"]);
}

/// Waits until a backend waits for a lock of a transaction.
async fn until_blocked(lab: &Lab) {
    let waiting =
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'transactionid'";
    crate::support::eventually_number(&mut lab.connect().await, waiting, 1).await;
}

/// Goal: of two at the same time the second waits for the outcome of the first, whichever op each is; nothing of a first
/// that rolls back is left.
#[tokio::test]
async fn barrier_waits_for_its_twin() {
    use Barrier::{Duplicate, Run, Void};
    use Op::{Do, Undo};
    let lab = Lab::shared().await;
    let (mut first, mut probe) = (lab.connect().await, lab.connect().await);
    for (one, other, after_commit, after_rollback) in
        [(Do, Do, Duplicate, Run), (Do, Undo, Run, Void), (Undo, Do, Void, Run), (Undo, Undo, Duplicate, Void)]
    {
        for (how, expected) in [("commit", after_commit), ("rollback", after_rollback)] {
            let saga = Uuid::now_v7();
            let mut second = lab.connect().await;
            begin(&mut first).await;
            ask(&mut first, saga, one).await;
            let waits = tokio::spawn(async move { ask(&mut second, saga, other).await });
            until_blocked(&lab).await;
            // A third one, of another saga, is not held up.
            assert_eq!(ask(&mut probe, Uuid::now_v7(), Do).await, Run);
            end(&mut first, how).await;
            let got = tokio::time::timeout(LIMIT, waits).await.expect("it goes on").unwrap();
            assert_eq!(got, expected, "{one} {how}, then {other}");
        }
    }
}

/// Goal: sixteen sessions, half with the do and half with the undo of the same steps: each step's effects agree. Either
/// both ran, the do first, or neither did and the barrier said so once.
#[tokio::test(flavor = "multi_thread")]
async fn barrier_holds_under_a_storm() {
    let lab = Lab::shared().await;
    lab.sql("create table effect (saga uuid, op text, n bigint generated always as identity)").await;
    let sagas: Vec<Uuid> = (0..40).map(|_| Uuid::now_v7()).collect();
    let mut sessions = Vec::new();
    for session in 0..16_usize {
        let (mut conn, sagas) = (lab.connect().await, sagas.clone());
        sessions.push(tokio::spawn(async move {
            for index in 0..sagas.len() {
                // From different places on, so that both orders occur.
                let at = (index + session * 13) % sagas.len();
                let op = if session % 2 == 0 { Op::Do } else { Op::Undo };
                let command = command(sagas[at], op, 1);
                let mut tx = conn.begin().await.unwrap();
                if barrier(&mut tx, &command).await.unwrap() == Barrier::Run {
                    let insert = sqlx::query("insert into effect (saga, op) values ($1, $2)");
                    insert.bind(command.saga).bind(op.to_string()).execute(&mut *tx).await.unwrap();
                    reply(&mut tx, &command, Reply::Succeeded(None)).await.unwrap();
                }
                tx.commit().await.unwrap();
            }
        }));
    }
    for session in sessions {
        tokio::time::timeout(LIMIT, session).await.expect("no deadlock").unwrap();
    }
    let (mut undone, mut noop) = (0, 0);
    for saga in sagas {
        let effects: Vec<String> = sqlx::query_scalar("select op from effect where saga = $1 order by n")
            .bind(saga)
            .fetch_all(&mut lab.connect().await)
            .await
            .unwrap();
        match effects.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["do", "undo"] => {
                undone += 1;
                assert_eq!(outcomes(&lab, saga).await, ["do 1 succeeded", "undo 1 succeeded"]);
            }
            [] => {
                noop += 1;
                assert_eq!(outcomes(&lab, saga).await, ["undo 1 undo_noop"]);
            }
            _ => panic!("{effects:?}"),
        }
    }
    assert!(undone > 0 && noop > 0, "{undone} undone, {noop} had nothing to undo: the storm proves nothing");
}

/// Goal: an action that failed for good is never undone and never succeeds, also when nobody waited for its reply.
#[tokio::test]
async fn failed_action_is_not_undone() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let saga = Uuid::now_v7();
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Run);
    reply(&mut conn, &command(saga, Op::Do, 1), Reply::Failed("no".to_owned())).await.unwrap();
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Duplicate);
    let error = reply(&mut conn, &command(saga, Op::Do, 1), Reply::Succeeded(None)).await.expect_err("it has failed");
    assert_eq!(sqlstate(&error).as_deref(), Some("55000"), "{error}");
    assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Void);
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Void);
    assert_eq!(outcomes(&lab, saga).await, ["do 1 failed", "undo 1 undo_noop"]);
    // Its next epoch is another matter.
    assert_eq!(barrier(&mut conn, &command(saga, Op::Do, 2)).await.unwrap(), Barrier::Run);
    reply(&mut conn, &command(saga, Op::Do, 2), Reply::Succeeded(None)).await.unwrap();
}

/// Goal: an action that fails for good behind an `in_progress` never runs again: another attempt may be on its way.
#[tokio::test]
async fn what_failed_while_in_progress_stays_failed() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let saga = Uuid::now_v7();
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Run);
    reply(&mut conn, &command(saga, Op::Do, 1), Reply::InProgress).await.unwrap();
    reply(&mut conn, &command(saga, Op::Do, 1), Reply::Failed("no".to_owned())).await.unwrap();
    assert_ne!(ask(&mut conn, saga, Op::Do).await, Barrier::Run, "nobody would undo it");
    let error = reply(&mut conn, &command(saga, Op::Do, 1), Reply::Succeeded(None)).await.expect_err("it has failed");
    assert_eq!(sqlstate(&error).as_deref(), Some("55000"), "{error}");
    assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Void);
}

/// Goal: an undo that was in progress when its participant died runs again with its next attempt, and once done does not.
#[tokio::test]
async fn an_undo_in_progress_is_not_lost() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let saga = Uuid::now_v7();
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Run);
    assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Run);
    reply(&mut conn, &command(saga, Op::Undo, 1), Reply::InProgress).await.unwrap();
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Duplicate);
    assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Run);
    reply(&mut conn, &command(saga, Op::Undo, 1), Reply::InProgress).await.unwrap();
    reply(&mut conn, &command(saga, Op::Undo, 1), Reply::Succeeded(None)).await.unwrap();
    assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Duplicate);
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Void);
}

/// Goal: what a saga of this database did is not forgotten before its end, however long that takes.
#[tokio::test]
async fn a_long_saga_keeps_its_rows() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let saga: Uuid =
        sqlx::query_scalar("select oncebox.saga_open('long', '300 days')").fetch_one(&mut conn).await.unwrap();
    let gone = Uuid::now_v7();
    assert_eq!(ask(&mut conn, gone, Op::Do).await, Barrier::Run);
    lab.sql(&format!("select oncebox.saga_compensate_with('{saga}', 'reserve', 'stock.undo', '{{}}')")).await;
    lab.sql("update oncebox.saga_barrier set at = now() - interval '61 days'").await;
    assert_eq!(lab.number("select oncebox.saga_barrier_clear(100)").await, 1);
    lab.sql(&format!("select oncebox.saga_abort('{saga}', 'no')")).await;
    assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Run, "it was done");
}

/// Goal: work done in spite of `void` cannot report success: its transaction fails, and the work with it.
#[tokio::test]
async fn void_action_cannot_succeed() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let saga = Uuid::now_v7();
    assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Void);
    let error = reply(&mut conn, &command(saga, Op::Do, 1), Reply::Succeeded(None)).await.expect_err("void");
    assert_eq!(sqlstate(&error).as_deref(), Some("55000"), "{error}");
    // What is superfluous does no harm.
    reply(&mut conn, &command(saga, Op::Do, 1), Reply::Failed("late".to_owned())).await.unwrap();
    reply(&mut conn, &command(saga, Op::Do, 1), Reply::Retry("late".to_owned())).await.unwrap();
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Void);
    reply(&mut conn, &command(saga, Op::Undo, 1), Reply::Retry("confused".to_owned())).await.unwrap();
    assert_ne!(ask(&mut conn, saga, Op::Do).await, Barrier::Run);
    assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Void);
}

/// Goal: `retry`, and `failed` of an undo, let the next attempt run, once for each reply however often it is said; the
/// undo of an action that said `retry` has nothing to undo.
#[tokio::test]
async fn retry_lets_the_next_attempt_run() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let saga = Uuid::now_v7();
    let retry = || Reply::Retry("busy".to_owned());
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Run);
    for _ in 0..2 {
        reply(&mut conn, &command(saga, Op::Do, 1), retry()).await.unwrap();
    }
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Run);
    assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Duplicate);
    reply(&mut conn, &command(saga, Op::Do, 1), Reply::InProgress).await.unwrap();
    reply(&mut conn, &command(saga, Op::Do, 1), Reply::Succeeded(Some(json!({"id": 7})))).await.unwrap();
    for answer in [retry(), Reply::Failed("locked".to_owned())] {
        assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Run);
        assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Duplicate);
        reply(&mut conn, &command(saga, Op::Undo, 1), answer).await.unwrap();
        assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Duplicate);
    }
    assert_eq!(ask(&mut conn, saga, Op::Undo).await, Barrier::Run);
    assert_eq!(
        outcomes(&lab, saga).await,
        ["do 1 retry", "do 1 retry", "do 1 in_progress", "do 1 succeeded", "undo 1 retry", "undo 1 failed"]
    );

    let taken_back = Uuid::now_v7();
    assert_eq!(ask(&mut conn, taken_back, Op::Do).await, Barrier::Run);
    reply(&mut conn, &command(taken_back, Op::Do, 1), retry()).await.unwrap();
    assert_eq!(ask(&mut conn, taken_back, Op::Undo).await, Barrier::Void);
    assert_eq!(ask(&mut conn, taken_back, Op::Do).await, Barrier::Void);
}

/// Goal: an action that says `retry` in a later transaction, while its undo runs, does not open the way for another
/// attempt behind the undo; under read committed it waits for the undo, with an older snapshot it fails.
#[tokio::test]
async fn retry_meets_the_undo_in_flight() {
    let lab = Lab::shared().await;
    let (mut undoing, mut later) = (lab.connect().await, lab.connect().await);
    for isolation in ["read committed", "repeatable read"] {
        let saga = Uuid::now_v7();
        assert_eq!(ask(&mut later, saga, Op::Do).await, Barrier::Run);
        begin(&mut undoing).await;
        assert_eq!(ask(&mut undoing, saga, Op::Undo).await, Barrier::Run);
        let mut worker = lab.connect().await;
        worker.execute(AssertSqlSafe(format!("begin isolation level {isolation}"))).await.unwrap();
        let says = tokio::spawn(async move {
            let said = reply(&mut worker, &command(saga, Op::Do, 1), Reply::Retry("gave up".to_owned())).await;
            worker.execute(if said.is_ok() { "commit" } else { "rollback" }).await.unwrap();
            said
        });
        until_blocked(&lab).await;
        end(&mut undoing, "commit").await;
        let said = tokio::time::timeout(LIMIT, says).await.expect("it goes on").unwrap();
        match isolation {
            "read committed" => said.unwrap(),
            _ => assert_eq!(sqlstate(&said.expect_err("an older snapshot")).as_deref(), Some("40001")),
        }
        assert_eq!(ask(&mut later, saga, Op::Do).await, Barrier::Void, "{isolation}");
    }
}

/// Goal: the other way round, an undo that meets a `retry` in flight waits for it, and finds nothing to undo.
#[tokio::test]
async fn undo_meets_the_retry_in_flight() {
    let lab = Lab::shared().await;
    let (mut worker, mut conn) = (lab.connect().await, lab.connect().await);
    for (how, expected) in [("commit", Barrier::Void), ("rollback", Barrier::Run)] {
        let saga = Uuid::now_v7();
        assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Run);
        begin(&mut worker).await;
        reply(&mut worker, &command(saga, Op::Do, 1), Reply::Retry("gave up".to_owned())).await.unwrap();
        let mut undoing = lab.connect().await;
        let undo = tokio::spawn(async move { ask(&mut undoing, saga, Op::Undo).await });
        until_blocked(&lab).await;
        end(&mut worker, how).await;
        assert_eq!(tokio::time::timeout(LIMIT, undo).await.expect("it goes on").unwrap(), expected, "{how}");
        assert_eq!(ask(&mut conn, saga, Op::Do).await, Barrier::Void);
    }
}

/// Goal: with an older snapshot a twin that committed meanwhile is a conflict to run again, never a second `run`.
#[tokio::test]
async fn barrier_conflicts_under_repeatable_read() {
    let lab = Lab::shared().await;
    let (mut old, mut new) = (lab.connect().await, lab.connect().await);
    for (first, second) in [(Op::Do, Op::Do), (Op::Do, Op::Undo), (Op::Undo, Op::Do), (Op::Undo, Op::Undo)] {
        let saga = Uuid::now_v7();
        old.execute("begin isolation level repeatable read").await.unwrap();
        old.execute("select 1 from oncebox.setting").await.unwrap();
        ask(&mut new, saga, first).await;
        let error = barrier(&mut old, &command(saga, second, 1)).await.expect_err("a conflict");
        assert_eq!(sqlstate(&error).as_deref(), Some("40001"), "{first}, {second}: {error}");
        end(&mut old, "rollback").await;
    }
    // Alone it works as ever.
    old.execute("begin isolation level serializable").await.unwrap();
    let saga = Uuid::now_v7();
    assert_eq!(ask(&mut old, saga, Op::Do).await, Barrier::Run);
    assert_eq!(ask(&mut old, saga, Op::Undo).await, Barrier::Run);
    end(&mut old, "commit").await;
}

/// Goal: arguments that make no sense are refused by name, and leave nothing.
#[tokio::test]
async fn bad_arguments_are_named() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let id = Uuid::now_v7();
    let long = "x".repeat(101);
    let mut cases = vec![
        ("saga_id", "saga_barrier(null, 's', 'do', 1)".to_owned()),
        ("step", format!("saga_barrier('{id}', null, 'do', 1)")),
        ("step", format!("saga_barrier('{id}', '', 'do', 1)")),
        ("step", format!("saga_barrier('{id}', '{long}', 'do', 1)")),
        ("op", format!("saga_barrier('{id}', 's', null, 1)")),
        ("op", format!("saga_barrier('{id}', 's', 'redo', 1)")),
        ("epoch", format!("saga_barrier('{id}', 's', 'do', null)")),
        ("epoch", format!("saga_barrier('{id}', 's', 'undo', 0)")),
        ("command_headers", "saga_reply(null, 'succeeded')".to_owned()),
        ("command_headers", "saga_reply('[]', 'succeeded')".to_owned()),
    ];
    let headers = |change: &str| {
        let good = json!({"oncebox-saga": id, "oncebox-step": "s", "oncebox-op": "do", "oncebox-epoch": 1,
            "oncebox-attempt": 1});
        let mut headers = good.as_object().unwrap().clone();
        headers.extend(serde_json::from_str::<Headers>(change).unwrap());
        Value::Object(headers).to_string()
    };
    for (name, values) in [
        ("oncebox-saga", vec!["null", "7", "\"x\"", "{}"]),
        ("oncebox-step", vec!["null", "\"\"", &format!("\"{long}\"")]),
        ("oncebox-op", vec!["null", "\"Do\"", "1"]),
        ("oncebox-epoch", vec!["null", "0", "\"-1\"", "\"\"", "1.5", "true", "2147483648", "\"99999999999999999999\""]),
        ("oncebox-attempt", vec!["0", "\"one\"", "[1]"]),
    ] {
        for value in values {
            let headers = headers(&format!("{{\"{name}\": {value}}}"));
            cases.push((name, format!("saga_reply('{headers}', 'succeeded')")));
        }
    }
    let good = headers("{}");
    for outcome in ["null", "'undo_noop'", "'done'", "''"] {
        cases.push(("outcome", format!("saga_reply('{good}', {outcome})")));
    }
    cases.push(("output", format!("saga_reply('{good}', 'succeeded', to_jsonb(repeat('x', 1048576)))")));
    for (name, call) in cases {
        let error = sqlx::query(AssertSqlSafe(format!("select oncebox.{call}"))).execute(&mut conn).await;
        let error = error.expect_err(&call);
        assert_eq!(sqlstate(&error).as_deref(), Some("22023"), "{call}: {error}");
        let text = error.as_database_error().unwrap().message();
        assert!(text.starts_with(name) || text.starts_with(&format!("command_headers: \"{name}\"")), "{call}: {text}");
    }
    assert_eq!(lab.number("select count(*) from oncebox.saga_barrier").await, 0);
    assert_eq!(lab.number("select count(*) from oncebox.outbox").await, 0);
}

/// Goal: the reply on its way to the broker is as the sagas' side reads it, whether the headers came as numbers or as
/// strings, with or without the barrier; a long error is cut to 4 KiB at a character.
#[tokio::test]
async fn replies_say_what_they_answer() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let saga = Uuid::now_v7();
    let expected = json!({"oncebox-saga": saga, "oncebox-step": "reserve", "oncebox-op": "do", "oncebox-epoch": 2,
        "oncebox-attempt": 3});
    let numbers = json!({"oncebox-saga": saga, "oncebox-step": "reserve", "oncebox-op": "do", "oncebox-epoch": 2,
        "oncebox-attempt": 3, "oncebox-deadline": "2026-01-01T00:00:00.000Z", "oncebox-source": "x", "mine": true});
    let strings = json!({"oncebox-saga": saga.to_string().to_uppercase(), "oncebox-step": "reserve",
        "oncebox-op": "do", "oncebox-epoch": "2", "oncebox-attempt": "03"});
    let call = "select oncebox.saga_reply($1, $2, $3, $4)";
    let long = format!("x{}", "ü☃".repeat(2_000));
    for (headers, outcome, output, error) in [
        (&numbers, "in_progress", None, None),
        (&strings, "succeeded", Some(json!({"id": 7})), None),
        (&strings, "failed", Some(json!(null)), Some(long.as_str())),
        (&numbers, "retry", None, Some("")),
    ] {
        let query = sqlx::query(call).bind(headers).bind(outcome).bind(output).bind(error);
        query.execute(&mut conn).await.unwrap();
    }
    let replies = replies(&lab, saga).await;
    assert!(replies.iter().all(|(headers, _)| *headers == expected), "{replies:?}");
    assert_eq!(replies[0].1, json!({"outcome": "in_progress", "output": null, "error": null}));
    assert_eq!(replies[1].1, json!({"outcome": "succeeded", "output": {"id": 7}, "error": null}));
    let cut = replies[2].1["error"].as_str().unwrap();
    assert!(long.starts_with(cut) && (4_092..=4_096).contains(&cut.len()), "{} bytes", cut.len());
    assert_eq!(replies[3].1, json!({"outcome": "retry", "output": null, "error": ""}));
    assert_eq!(lab.number("select count(distinct message_id) from oncebox.outbox").await, 4);
    let without = json!({"oncebox-saga": saga, "oncebox-step": "reserve", "oncebox-op": "undo", "oncebox-epoch": 1});
    sqlx::query(call)
        .bind(&without)
        .bind("succeeded")
        .bind(None::<Value>)
        .bind(None::<&str>)
        .execute(&mut conn)
        .await
        .unwrap();
    assert_eq!(self::replies(&lab, saga).await[4].0, without);
}

/// Goal: a SQL handler, written as the README says, takes part through the consumer and the relay: the headers it hands
/// back are those on the wire, a failure rolls its work back to the savepoint and still replies, and the barrier's own
/// reply is on the wire too. It runs in another database than the one that asks, under a consumer's rights.
#[tokio::test(flavor = "multi_thread")]
async fn sql_participant_replies_through_the_relay() {
    let (sagas, stock) = (Lab::shared().await, Lab::shared().await);
    stock
        .sql(
            "create schema shop;
            create table shop.stock (sku text primary key, left_over int not null check (left_over >= 0));
            insert into shop.stock values ('a', 1);
            create table shop.reservation (saga uuid primary key, sku text not null);
            create function shop.on_stock(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
            language plpgsql as $$
            begin
                if oncebox.saga_barrier((headers ->> 'oncebox-saga')::uuid, headers ->> 'oncebox-step',
                    headers ->> 'oncebox-op', (headers ->> 'oncebox-epoch')::int) <> 'run' then
                    return;
                end if;
                begin  -- a savepoint
                    if topic = 'stock.reserve' then
                        insert into shop.reservation values ((headers ->> 'oncebox-saga')::uuid, payload ->> 'sku');
                        update shop.stock set left_over = left_over - 1 where sku = payload ->> 'sku';
                    else
                        delete from shop.reservation where saga = (headers ->> 'oncebox-saga')::uuid;
                        update shop.stock set left_over = left_over + 1 where sku = payload ->> 'sku';
                    end if;
                    perform oncebox.saga_reply(headers, 'succeeded', payload);
                exception when check_violation then
                    perform oncebox.saga_reply(headers, 'failed', error => 'sold out');
                end;
            end $$;",
        )
        .await;
    // One broker for both: the vhost of the sagas' side.
    let login = crate::support::unique("participant");
    stock
        .sql(&format!(
            "create role {login} login in role oncebox_consumer; grant usage on schema shop to {login}; grant all on all tables in schema shop to {login}"
        ))
        .await;
    let config = sagas
        .config("[[consumer]]\nname = \"stock\"\nbindings = [\"stock.*\"]\nhandler = { sql = \"shop.on_stock\" }\n");
    let on_stock = |args: &[&str], url: &str| {
        let mut command = sagas.command(args);
        command.env("ONCEBOX_DATABASE_URL", url);
        crate::support::Process::spawn(command)
    };
    let tap = crate::support::wire::Tap::bound(&sagas, "replies", &["oncebox.saga.reply"]).await;
    let url = stock.database_url.replace("oncebox@", &format!("{login}@"));
    let consumer = on_stock(&["consume", "--config", &config], &url);
    consumer.wait_for_log("consuming").await;
    let _relays = (sagas.relay().await, on_stock(&["relay"], &stock.database_url));

    let (first, second, third) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    let mut conn = sagas.connect().await;
    let mut send = async |topic: &'static str, command: &CommandHeaders| {
        sqlx::query(
            "select oncebox.outbox_insert($1, convert_to('{\"sku\": \"a\"}', 'UTF8'), 'application/json', $2, $3,
                oncebox.uuid_v7(clock_timestamp()), clock_timestamp(), null)",
        )
        .bind(topic)
        .bind(command.saga.to_string())
        .bind(Value::Object(command.to_headers()))
        .execute(&mut conn)
        .await
        .unwrap();
    };
    send("stock.reserve", &command(first, Op::Do, 1)).await;
    let mut observer = stock.connect().await;
    crate::support::eventually_number(&mut observer, "select count(*) from shop.reservation", 1).await;
    send("stock.reserve", &command(second, Op::Do, 1)).await;
    send("stock.release", &command(third, Op::Undo, 1)).await;
    crate::support::eventually_number(&mut observer, "select count(*) from oncebox.outbox", 3).await;
    send("stock.reserve", &command(third, Op::Do, 1)).await;
    send("stock.reserve", &command(first, Op::Do, 1)).await;
    send("stock.release", &command(first, Op::Undo, 1)).await;
    let wire = tap.read(4).await;
    let mut seen: Vec<(Uuid, String)> = wire
        .deliveries
        .iter()
        .map(|delivery| {
            let command = CommandHeaders::of(&delivery.headers).unwrap();
            assert_eq!(delivery.key(), Some(command.saga.to_string().as_str()));
            let body: Value = serde_json::from_slice(&delivery.body).unwrap();
            (command.saga, format!("{} {} {}", command.op, body["outcome"], body["error"]).replace('"', ""))
        })
        .collect();
    seen.sort();
    let mut expected = vec![
        (first, "do succeeded null".to_owned()),
        (first, "undo succeeded null".to_owned()),
        (second, "do failed sold out".to_owned()),
        (third, "undo undo_noop null".to_owned()),
    ];
    expected.sort();
    assert_eq!(seen, expected, "{}", consumer.log());
    assert_eq!(stock.number("select left_over::bigint from shop.stock").await, 1);
    assert_eq!(stock.number("select count(*) from shop.reservation").await, 0);
    assert_eq!(stock.number("select count(*) from oncebox.inbox_held").await, 0);
}
