//! Goal: sagas end as they should, over real servers: their steps happen in order, or what happened is undone in
//! reverse, each once; signals, times, operators and participants that misbehave are dealt with as the design says.

use crate::support::participant::{self, Shop};
use crate::support::{Lab, eventually, eventually_number};
use oncebox::saga::state::{Event, Operator};
use serde_json::{Value, json};
use uuid::Uuid;

fn command(id: &str, more: Value) -> Value {
    step(
        json!({
            "id": id,
            "do": {"topic": format!("do.{id}"), "body": {"plan": "$.input.plan", "key": "$.business_key"}},
            "undo": {"topic": format!("undo.{id}"), "body": {"plan": "$.input.plan", "did": format!("$.steps.{id}.output.id")}},
            "timeout": "30s",
            "retry": {"max": 4, "initial": "20ms", "factor": 2, "cap": "100ms", "jitter": "full"},
            "undo_retry": {"max": 4, "initial": "20ms", "factor": 2, "cap": "100ms", "jitter": "none"},
        }),
        more,
    )
}

/// `base` with `more` laid over it; null takes a field away.
fn step(mut base: Value, more: Value) -> Value {
    for (name, value) in more.as_object().expect("fields") {
        match value {
            Value::Null => drop(base.as_object_mut().expect("fields").remove(name)),
            value => base[name] = value.clone(),
        }
    }
    base
}

fn definition(name: &str, steps: Value) -> Value {
    json!({"name": name, "version": 1, "steps": steps})
}

/// Three steps in a row.
fn trip() -> Value {
    definition("trip", json!([command("flight", json!({})), command("hotel", json!({})), command("car", json!({}))]))
}

fn operator() -> Operator {
    Operator { who: "a test".to_owned(), why: "to see".to_owned() }
}

/// Goal: steps run one after the other, each once, a later one's body holds what an earlier one gave, and nothing is
/// left behind.
#[tokio::test]
async fn steps_happen_in_order() {
    let shop = Shop::open().await;
    let mut last = command("car", json!({}));
    last["do"]["body"] =
        json!({"flight": "$.steps.flight.output.id", "hotel": "$.steps.hotel.output", "to": "$.input.to"});
    shop.define(definition("trip", json!([command("flight", json!({})), command("hotel", json!({})), last]))).await;
    let saga = shop.start("trip", "a", json!({"to": "Rome"})).await;
    shop.ends(saga, "completed").await;
    assert_eq!(shop.effects(saga).await, ["flight do", "hotel do", "car do"]);
    assert_eq!(
        shop.body(saga, "car", "do").await,
        json!({"flight": "flight 1", "hotel": {"id": "hotel 1"}, "to": "Rome"})
    );
    shop.sound(saga).await;
}

/// Goal: when a step fails for good, those before it are undone in reverse order, with what they gave; the failed one
/// is not, and what was to come never runs.
#[tokio::test]
async fn a_failed_step_is_undone_in_reverse() {
    let shop = Shop::open().await;
    shop.define(trip()).await;
    let saga = shop.start("trip", "a", json!({"plan": {"car": {"do": ["failed"]}}})).await;
    shop.ends(saga, "compensated").await;
    assert_eq!(shop.effects(saga).await, ["flight do", "hotel do", "hotel undo", "flight undo"]);
    assert_eq!(shop.body(saga, "flight", "undo").await["did"], "flight 1");
    assert_eq!(shop.steps(saga).await, "flight undone, hotel undone, car failed");
    shop.sound(saga).await;
}

/// Goal: the pivot that failed turns the saga back; after it succeeded a failing step is tried again, in another epoch,
/// until it succeeds, and cancelling is refused.
#[tokio::test]
async fn after_the_pivot_there_is_no_way_back() {
    let shop = Shop::open().await;
    let steps = json!([
        command("flight", json!({})),
        command("pay", json!({"pivot": true, "undo": null})),
        command("mail", json!({"undo": null}))
    ]);
    shop.define(definition("trip", steps)).await;
    let back = shop.start("trip", "a", json!({"plan": {"pay": {"do": ["failed"]}}})).await;
    let forth = shop.start("trip", "b", json!({"plan": {"mail": {"do": ["failed", "failed", "succeeded"]}}})).await;
    let held = shop.start("trip", "c", json!({"plan": {"mail": {"do": ["silent"]}}})).await;
    shop.ends(back, "compensated").await;
    assert_eq!(shop.effects(back).await, ["flight do", "flight undo"]);
    shop.ends(forth, "completed").await;
    assert_eq!(shop.effects(forth).await, ["flight do", "pay do", "mail do"]);
    assert_eq!(shop.calls(forth, "mail", "do").await, [(1, 1), (2, 2), (3, 3)], "epochs and attempts");
    shop.has_done(held, "mail").await;
    let refused = shop.act(held, Event::Cancel(operator())).await.expect_err("the pivot is done");
    assert!(refused.contains("cancel"), "{refused}");
    for saga in [back, forth] {
        shop.sound(saga).await;
    }
}

/// Goal: an attempt that says retry is made again after a delay, and one nobody answers after its timeout; what ran
/// once does not run again, and its reply counts whichever attempt it answers.
#[tokio::test]
async fn attempts_are_made_again() {
    let shop = Shop::open().await;
    let quick = json!({"timeout": "300ms"});
    let steps = json!([command("flight", json!({})), command("hotel", quick.clone()), command("car", quick)]);
    shop.define(definition("trip", steps)).await;
    let plan = json!({"flight": {"do": ["retry", "retry", "succeeded"]}, "hotel": {"do": ["lost", "succeeded"]}});
    let saga = shop.start("trip", "a", json!({"plan": plan})).await;
    shop.ends(saga, "completed").await;
    assert_eq!(shop.effects(saga).await, ["flight do", "hotel do", "car do"]);
    assert_eq!(shop.calls(saga, "flight", "do").await, [(1, 1), (1, 2), (1, 3)]);
    let calls = shop.calls(saga, "hotel", "do").await;
    assert!(calls.len() >= 2 && calls[..2] == [(1, 1), (1, 2)], "{calls:?}");
    shop.sound(saga).await;
}

/// Goal: a step whose attempts are used up without an answer may have run: it is undone too, whether it did run or not;
/// a command that comes after its undo does nothing.
#[tokio::test]
async fn what_may_have_run_is_undone() {
    let shop = Shop::open().await;
    let quick = json!({"timeout": "200ms", "retry": {"max": 2, "initial": "10ms"}});
    let steps = json!([command("flight", json!({})), command("hotel", quick)]);
    shop.define(definition("trip", steps)).await;
    let ran = shop.start("trip", "a", json!({"plan": {"hotel": {"do": ["silent"]}}})).await;
    let lost = shop.start("trip", "b", json!({"plan": {"hotel": {"do": ["lost"]}}})).await;
    shop.ends(ran, "compensated").await;
    assert_eq!(shop.effects(ran).await, ["flight do", "hotel do", "hotel undo", "flight undo"]);
    shop.ends(lost, "compensated").await;
    assert_eq!(shop.effects(lost).await, ["flight do", "flight undo"]);
    assert_eq!(shop.steps(lost).await, "flight undone, hotel undo_noop");
    // A copy of the command from before arrives now.
    let copy = "select part.on_command(oncebox.uuid_v7(now()), 'late', '{}', c.headers) from part.call as c
        where c.step = 'hotel' and c.op = 'do' and c.saga = ";
    shop.lab.sql(&format!("{copy} '{lost}' order by c.n limit 1")).await;
    assert_eq!(shop.effects(lost).await, ["flight do", "flight undo"]);
    for saga in [ran, lost] {
        shop.sound(saga).await;
    }
}

/// Goal: what does not wait for each other runs side by side, what waits for both waits for both; on the way back too.
#[tokio::test]
async fn steps_run_side_by_side() {
    let shop = Shop::open().await;
    let fork = json!({"after": ["flight"]});
    let steps = json!([
        command("flight", json!({})),
        command("hotel", fork.clone()),
        command("car", fork),
        command("mail", json!({"after": ["hotel", "car"]}))
    ]);
    shop.define(definition("trip", steps)).await;
    let both = shop.start("trip", "a", json!({})).await;
    // Neither answers until both have been called.
    let waiting = json!({"hotel": {"do": ["in_progress"]}, "car": {"do": ["in_progress"]}, "mail": {"do": ["failed"]}});
    let back = shop.start("trip", "b", json!({"plan": waiting})).await;
    shop.ends(both, "completed").await;
    let effects = shop.effects(both).await;
    assert_eq!((effects[0].as_str(), effects[3].as_str(), effects.len()), ("flight do", "mail do", 4), "{effects:?}");
    for step in ["hotel", "car"] {
        shop.has_done(back, step).await;
    }
    // Both wait for the orchestrator when it wakes up, so they are of one batch.
    shop.signal_orchestrator("STOP");
    shop.reply(back, "hotel", "succeeded").await;
    shop.reply(back, "car", "succeeded").await;
    let lag = "select messages from oncebox.outbox_lag(0::smallint)";
    eventually_number(&mut shop.lab.connect().await, lag, 0).await;
    shop.signal_orchestrator("CONT");
    shop.ends(back, "compensated").await;
    let effects = shop.effects(back).await;
    assert_eq!(
        (effects[0].as_str(), effects[5].as_str(), effects.len()),
        ("flight do", "flight undo", 6),
        "{effects:?}"
    );
    for saga in [both, back] {
        shop.sound(saga).await;
    }
}

/// Goal: a signal is taken once, whether it comes before its step waits or after; what it carries is the step's output.
#[tokio::test]
async fn signals_come_early_and_late() {
    let shop = Shop::open().await;
    let mut last = command("car", json!({}));
    last["do"]["body"] = json!({"who": "$.steps.approve.output.who"});
    let steps = json!([
        command("flight", json!({})),
        {"id": "approve", "wait": {"signal": "approved", "timeout": "1h"}},
        last
    ]);
    shop.define(definition("trip", steps)).await;
    let late = shop.start("trip", "late", json!({})).await;
    let early = shop.start("trip", "early", json!({"plan": {"flight": {"do": ["in_progress"]}}})).await;
    shop.signal(early, "approved", json!({"who": "Ann"})).await;
    // Seen while its step does not wait yet.
    let kept = format!("select count(*) from oncebox.saga_signal where saga_id = '{early}' and state = 'kept'");
    eventually_number(&mut shop.lab.connect().await, &kept, 1).await;
    shop.has_done(early, "flight").await;
    shop.reply(early, "flight", "succeeded").await;
    shop.step_is(late, "approve", "dispatched").await;
    for _ in 0..2 {
        shop.signal(late, "approved", json!({"who": "Bob"})).await;
    }
    for (saga, who) in [(early, "Ann"), (late, "Bob")] {
        shop.ends(saga, "completed").await;
        assert_eq!(shop.body(saga, "car", "do").await, json!({"who": who}));
        shop.sound(saga).await;
    }
}

/// Goal: a signal that does not come in time turns the saga back.
#[tokio::test]
async fn a_signal_that_does_not_come_turns_back() {
    let shop = Shop::open().await;
    let wait = json!({"id": "approve", "wait": {"signal": "approved", "timeout": "300ms"}});
    shop.define(definition("trip", json!([command("flight", json!({})), wait, command("car", json!({}))]))).await;
    let saga = shop.start("trip", "a", json!({})).await;
    shop.ends(saga, "compensated").await;
    assert_eq!(shop.effects(saga).await, ["flight do", "flight undo"]);
    shop.sound(saga).await;
}

/// Goal: a saga begins at its time and not before; one that is cancelled before it never begins.
#[tokio::test]
async fn sagas_begin_at_their_time() {
    let shop = Shop::open().await;
    shop.define(trip()).await;
    let at = |key: &str, delay: &str| {
        format!("select oncebox.saga_start('trip', '{key}', '{{}}', start_at => now() + interval '{delay}')")
    };
    let soon = shop.started(&at("soon", "1 second")).await;
    let never = shop.started(&at("never", "1 hour")).await;
    shop.act(never, Event::Cancel(operator())).await.expect("it has not begun");
    shop.ends(never, "cancelled").await;
    shop.ends(soon, "completed").await;
    let early = "select count(*) from oncebox.saga_step as t join oncebox.saga as s on s.id = t.saga_id
        where t.dispatched_at < s.start_at";
    assert_eq!(shop.lab.number(early).await, 0);
    assert_eq!(shop.effects(never).await, [""; 0]);
    for saga in [soon, never] {
        shop.sound(saga).await;
    }
}

/// Goal: a saga that is not done by its deadline turns back.
#[tokio::test]
async fn deadlines_turn_back() {
    let shop = Shop::open().await;
    shop.define(trip()).await;
    let plan = r#"{"plan": {"car": {"do": ["retry"]}}}"#;
    // Attempts that never end: only the deadline can.
    shop.define(step(
        trip(),
        json!({"version": 2, "steps": [
            command("flight", json!({})),
            command("car", json!({"retry": {"max": 1000, "initial": "50ms", "cap": "50ms"}}))
        ]}),
    ))
    .await;
    let start = format!("select oncebox.saga_start('trip', 'a', '{plan}', deadline => interval '1500 ms')");
    let saga = shop.started(&start).await;
    shop.ends(saga, "compensated").await;
    assert_eq!(shop.effects(saga).await, ["flight do", "flight undo"]);
    let reason: String = shop.value(&format!("select reason from oncebox.saga where id = '{saga}'")).await;
    assert!(reason.contains("deadline"), "{reason}");
    shop.sound(saga).await;
}

/// Goal: a cancel turns a running saga back once what is under way was answered.
#[tokio::test]
async fn cancelling_turns_back() {
    let shop = Shop::open().await;
    shop.define(trip()).await;
    let saga = shop.start("trip", "a", json!({"plan": {"hotel": {"do": ["in_progress"]}}})).await;
    shop.has_done(saga, "hotel").await;
    shop.act(saga, Event::Cancel(operator())).await.expect("it is running");
    shop.reply(saga, "hotel", "succeeded").await;
    shop.ends(saga, "compensated").await;
    assert_eq!(shop.effects(saga).await, ["flight do", "hotel do", "hotel undo", "flight undo"]);
    shop.sound(saga).await;
}

/// Goal: nothing is sent while a saga is paused, what comes in is kept, and it goes on when resumed.
#[tokio::test]
async fn pausing_holds_and_resuming_goes_on() {
    let shop = Shop::open().await;
    shop.define(trip()).await;
    let saga = shop.start("trip", "a", json!({"plan": {"hotel": {"do": ["in_progress"]}}})).await;
    shop.has_done(saga, "hotel").await;
    shop.act(saga, Event::Pause(operator())).await.expect("it is running");
    shop.reply(saga, "hotel", "succeeded").await;
    shop.step_is(saga, "hotel", "succeeded").await;
    // One that was started after it is done: this one had its chance.
    let other = shop.start("trip", "b", json!({})).await;
    shop.ends(other, "completed").await;
    assert_eq!(shop.steps(saga).await, "flight succeeded, hotel succeeded, car pending");
    shop.act(saga, Event::Resume(operator())).await.expect("it is paused");
    shop.ends(saga, "completed").await;
    shop.sound(saga).await;
}

/// Goal: a step after the pivot whose attempts are used up, and an undo that never succeeds, wait for an operator, who
/// has them tried again or goes on without.
#[tokio::test]
async fn what_is_stuck_waits_for_an_operator() {
    let shop = Shop::open().await;
    let few = json!({"retry": {"max": 2, "initial": "10ms"}, "undo_retry": {"max": 2, "initial": "10ms"}});
    let mut after = few.clone();
    after["undo"] = Value::Null;
    let steps = json!([
        command("flight", few.clone()),
        command("pay", step(json!({"pivot": true, "undo": null}), few)),
        command("mail", after)
    ]);
    shop.define(definition("trip", steps)).await;
    let undo = json!({"pay": {"do": ["failed"]}, "flight": {"undo": ["failed", "failed", "succeeded"]}});
    let forth = json!({"mail": {"do": ["failed", "failed", "succeeded"]}});
    let [retried, skipped] =
        [shop.start("trip", "a", json!({"plan": undo})).await, shop.start("trip", "b", json!({"plan": undo})).await];
    let [again, without] =
        [shop.start("trip", "c", json!({"plan": forth})).await, shop.start("trip", "d", json!({"plan": forth})).await];
    for saga in [retried, skipped, again, without] {
        shop.ends(saga, "stuck").await;
    }
    shop.act(retried, Event::Retry(operator())).await.expect("it is stuck");
    shop.act(skipped, Event::SkipStep { step: "flight".to_owned(), by: operator() }).await.expect("it is stuck");
    shop.act(again, Event::RetryStep { step: "mail".to_owned(), by: operator() }).await.expect("it is stuck");
    shop.act(without, Event::SkipStep { step: "mail".to_owned(), by: operator() }).await.expect("it is stuck");
    for (saga, status, effects) in [
        (retried, "compensated", &["flight do", "flight undo"][..]),
        (skipped, "compensated", &["flight do"]),
        (again, "completed", &["flight do", "pay do", "mail do"]),
        (without, "completed", &["flight do", "pay do"]),
    ] {
        shop.ends(saga, status).await;
        assert_eq!(shop.effects(saga).await, effects);
        shop.sound(saga).await;
    }
}

/// Goal: without a definition: what participants enlisted is undone in reverse order when the app aborts, and released
/// when it completes.
#[tokio::test]
async fn enlisted_compensations_run_when_aborted() {
    let shop = Shop::open().await;
    let mut sagas = Vec::new();
    for key in ["aborted", "completed"] {
        let saga = shop.started(&format!("select oncebox.saga_open('{key}')")).await;
        for step in ["one", "two", "three"] {
            let enlist = format!(
                "select oncebox.saga_compensate_with('{saga}', '{step}', 'undo.{step}', '{{\"was\": \"$.input\"}}')"
            );
            shop.lab.sql(&enlist).await;
        }
        sagas.push(saga);
    }
    shop.lab.sql(&format!("select oncebox.saga_abort('{}', 'no more')", sagas[0])).await;
    shop.lab.sql(&format!("select oncebox.saga_complete('{}')", sagas[1])).await;
    shop.ends(sagas[0], "compensated").await;
    assert_eq!(shop.effects(sagas[0]).await, ["three undo", "two undo", "one undo"]);
    assert_eq!(shop.body(sagas[0], "two", "undo").await, json!({"was": "$.input"}));
    shop.ends(sagas[1], "completed").await;
    assert_eq!(shop.effects(sagas[1]).await, [""; 0]);
    for saga in sagas {
        shop.sound(saga).await;
    }
}

/// Goal: a reply that cannot be meant is parked and says why; its saga is as it was, and goes on. One that comes too
/// late goes into the history, one for a saga that is gone nowhere.
#[tokio::test]
async fn replies_that_cannot_be_meant_are_parked() {
    let shop = Shop::open().await;
    shop.define(trip()).await;
    let saga = shop.start("trip", "a", json!({"plan": {"hotel": {"do": ["in_progress"]}}})).await;
    shop.has_done(saga, "hotel").await;
    let nobody = Uuid::now_v7();
    let gone = Uuid::now_v7();
    shop.lab
        .sql(&format!("insert into oncebox.saga_purged (id, status, ended_at) values ('{gone}', 'completed', now())"))
        .await;
    // Created, begun, an answer, and one that says to wait.
    let answered = format!("select seq from oncebox.saga where id = '{saga}'");
    eventually_number(&mut shop.lab.connect().await, &answered, 4).await;
    let before = shop.seq(saga).await;
    for (saga, step, op, epoch) in [
        (nobody, "hotel", "do", 1),
        (saga, "hostel", "do", 1),
        (saga, "car", "do", 1),
        (saga, "hotel", "do", 2),
        (saga, "hotel", "undo", 1),
        (gone, "hotel", "do", 1),
    ] {
        shop.raw_reply(saga, step, op, epoch, r#"{"outcome": "succeeded"}"#).await;
    }
    shop.raw_reply(saga, "hotel", "do", 1, r#"{"outcome": "perhaps"}"#).await;
    let mut conn = shop.lab.connect().await;
    let parked = "select count(*) from oncebox.inbox_held where consumer = 'oncebox.saga' and state = 'parked'";
    eventually_number(&mut conn, parked, 6).await;
    let errors: Vec<String> =
        sqlx::query_scalar("select last_error from oncebox.inbox_held order by n").fetch_all(&mut conn).await.unwrap();
    for named in [&nobody.to_string(), "hostel", "\"car\"", "epoch 2", "undo", "perhaps"] {
        assert!(errors.iter().any(|error| error.contains(named)), "{named}: {errors:#?}");
    }
    assert_eq!(shop.seq(saga).await, before, "it was touched");
    // An answer that was given already.
    shop.raw_reply(saga, "flight", "do", 1, r#"{"outcome": "failed"}"#).await;
    let ignored = format!("select count(*) from oncebox.saga_history where saga_id = '{saga}' and changes ? 'ignored'");
    eventually_number(&mut conn, &ignored, 1).await;
    shop.reply(saga, "hotel", "succeeded").await;
    shop.ends(saga, "completed").await;
    // Whatever arrives is accepted: the reply to the saga that is gone among them.
    assert_eq!(shop.lab.number("select count(*) from oncebox.inbox_held").await, 6);
}

/// Goal: a definition that cannot be read stops its own sagas and no others, and they go on once it can.
#[tokio::test]
async fn a_broken_definition_stops_no_other() {
    let shop = Shop::open().await;
    shop.define(trip()).await;
    let mut other = trip();
    other["name"] = json!("other");
    shop.define(other).await;
    let broken =
        shop.started("select oncebox.saga_start('trip', 'a', '{}', start_at => now() + interval '1 second')").await;
    let document: Value = shop.value("select document from oncebox.saga_definition where name = 'trip'").await;
    let replace = |steps: &Value| {
        let document = json!({"name": "trip", "version": 1, "steps": steps});
        format!(
            "set session_replication_role = replica;
            update oncebox.saga_definition set document = '{document}', hash = sha256('{document}') where name = 'trip'"
        )
    };
    shop.lab.sql(&replace(&json!("a program of tomorrow knows what this is"))).await;
    let other = shop.start("other", "b", json!({})).await;
    shop.ends(other, "completed").await;
    eventually("the log names it", async || {
        let log = shop.log();
        (log.contains("ERROR") && log.contains("trip") && log.contains(&broken.to_string())).then_some(())
    })
    .await;
    // Put off: it is not looked at again and again.
    let put_off =
        format!("select count(*) from oncebox.saga where id = '{broken}' and next_due > now() + interval '10 s'");
    eventually_number(&mut shop.lab.connect().await, &put_off, 1).await;
    shop.lab.sql(&replace(&document["steps"])).await;
    shop.lab.sql(&format!("update oncebox.saga set next_due = now() where id = '{broken}'")).await;
    shop.ends(broken, "completed").await;
}

/// Goal: several orchestrators share the work: every step still happens once.
#[tokio::test]
async fn two_orchestrators_share_the_work() {
    let shop = Shop::open().await;
    let _second = shop.orchestrator().await;
    shop.define(trip()).await;
    let count = 100;
    shop.lab
        .sql(&format!(
            "select oncebox.saga_start('trip', 'k' || i, case when i % 3 = 0
                then '{{\"plan\": {{\"car\": {{\"do\": [\"failed\"]}}}}}}'::jsonb else '{{}}' end)
            from generate_series(1, {count}) as i"
        ))
        .await;
    let mut conn = shop.lab.connect().await;
    eventually_number(
        &mut conn,
        "select count(*) from oncebox.saga where status in ('completed', 'compensated')",
        count,
    )
    .await;
    let failed = count / 3;
    assert_eq!(shop.lab.number("select count(*) from oncebox.saga where status = 'compensated'").await, failed);
    assert_eq!(shop.lab.number("select count(*) from part.effect").await, (count - failed) * 3 + failed * 4);
    let distinct = "select count(*) from (select distinct saga, step, op from part.effect) as e";
    assert_eq!(shop.lab.number(distinct).await, (count - failed) * 3 + failed * 4);
    assert_eq!(shop.lab.number("select count(*) from oncebox.inbox_held").await, 0);
}

/// Goal: a participant with a database of its own, whose replies come from that database's outbox.
#[tokio::test]
async fn participants_have_their_own_databases() {
    let elsewhere = Lab::shared().await;
    participant::prepare(&elsewhere.database_url).await;
    let shop = Shop::with(&participant::consumer("elsewhere", Some(&elsewhere.database_url), &["far.#"])).await;
    let mut relay = shop.lab.command(&["relay"]);
    relay.env("ONCEBOX_DATABASE_URL", &elsewhere.database_url);
    let relay = crate::support::Process::spawn(relay);
    relay.wait_for_log("lane resumed").await;
    let far =
        json!({"do": {"topic": "far.do", "body": {"plan": "$.input.plan"}}, "undo": {"topic": "far.undo", "body": {}}});
    shop.define(definition(
        "trip",
        json!([command("flight", json!({})), command("hotel", far), command("car", json!({}))]),
    ))
    .await;
    let forth = shop.start("trip", "a", json!({})).await;
    let back = shop.start("trip", "b", json!({"plan": {"car": {"do": ["failed"]}}})).await;
    shop.ends(forth, "completed").await;
    shop.ends(back, "compensated").await;
    assert_eq!(shop.effects(back).await, ["flight do", "flight undo"]);
    for (saga, expected) in [(forth, 1), (back, 2)] {
        assert_eq!(
            elsewhere.number(&format!("select count(*) from part.effect where saga = '{saga}'")).await,
            expected
        );
    }
}

/// Goal: a role that may do what an orchestrator and a consumer may, and nothing else, runs all of it.
#[tokio::test]
async fn an_orchestrator_role_runs_sagas() {
    let role = crate::support::unique("orchestrator");
    let shop = Shop::run_by(&role).await;
    shop.define(trip()).await;
    let wait = json!({"id": "approve", "wait": {"signal": "approved", "timeout": "1h"}});
    let signalled = json!([command("flight", json!({})), wait, command("car", json!({}))]);
    shop.define(definition("signalled", signalled)).await;
    let back = shop.start("trip", "a", json!({"plan": {"car": {"do": ["retry", "failed"]}}})).await;
    let forth = shop.start("signalled", "b", json!({})).await;
    shop.signal(forth, "approved", json!(1)).await;
    // The purge too.
    let old = shop.start("trip", "old", json!({})).await;
    shop.ends(back, "compensated").await;
    shop.ends(forth, "completed").await;
    shop.ends(old, "completed").await;
    // One by one, with the park and the retry of the inbox.
    shop.raw_reply(Uuid::now_v7(), "car", "do", 1, "{}").await;
    eventually_number(
        &mut shop.lab.connect().await,
        "select count(*) from oncebox.inbox_held where state = 'parked'",
        1,
    )
    .await;
    assert!(!shop.log().contains("permission denied"), "{}", shop.log());
}
