//! Goal: operators see what is parked on both sides, and each message they retry or discard is sent, or given up,
//! exactly once, whoever else does the same at that moment.

use crate::support::wire::Tap;
use crate::support::{LIMIT, Lab, Process, connect, eventually, eventually_number};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor};
use std::collections::HashSet;
use std::process::Output;

const PARKED: &str = "select count(*) from oncebox.parked";

/// Runs a command to its end, away from the test's own tasks.
async fn oncebox(lab: &Lab, args: &[&str]) -> Output {
    let mut command = lab.command(args);
    command.stdin(std::process::Stdio::null());
    let run = tokio::task::spawn_blocking(move || command.output().expect("the program starts"));
    tokio::time::timeout(LIMIT, run).await.expect("an end in time").expect("no panic")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn json_of(lab: &Lab, args: &[&str]) -> Value {
    let output = oncebox(lab, args).await;
    assert!(output.status.success(), "{args:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output.stdout)))
}

/// Parks `count` messages of topic `nowhere.<i % 2>` as unroutable.
async fn park(lab: &Lab, count: i64) -> Process {
    let relay = lab.relay().await;
    lab.sql(&format!(
        "select oncebox.publish('nowhere.' || i % 2, jsonb_build_object('n', i), key => 'k' || i % 3,
            headers => '{{\"colour\": \"red\"}}')
        from generate_series(1, {count}) as i"
    ))
    .await;
    eventually_number(&mut lab.connect().await, PARKED, count).await;
    relay
}

/// The delivery that no attempt can apply, parked by a consumer.
const HANDLER: &str = "
    create schema app;
    create table app.effect (n bigserial primary key, id uuid);
    create table app.mended (yes boolean);
    create function app.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    begin
        if not exists (select from app.mended) then raise 'the table is missing'; end if;
        insert into app.effect (id) values (message_id);
    end $$;";

const CONFIG: &str = "[[consumer]]\nname = \"app\"\nbindings = [\"order.#\"]\nhandler = { sql = \"app.on_message\" }\n\
    max_attempts = 2\nbackoff_initial = \"10ms\"\n";

/// Goal: the view and the command show both sides, filters narrow, and a message is shown with headers and payload.
#[tokio::test]
async fn parked_messages_are_listed_and_shown() {
    let lab = Lab::shared().await;
    lab.sql(HANDLER).await;
    let _consumer = lab.consume(&lab.config(CONFIG)).await;
    let _relay = park(&lab, 4).await;
    lab.sql("select oncebox.publish('order.placed', '{\"big\": 12345678901234567890}')").await;
    eventually_number(&mut lab.connect().await, PARKED, 5).await;

    let all = json_of(&lab, &["parked", "list", "--json"]).await;
    assert_eq!((&all["total"], all["parked"].as_array().unwrap().len()), (&json!(5), 5));
    let inbox = json_of(&lab, &["parked", "list", "--side", "inbox", "--json"]).await;
    let message = &inbox["parked"][0];
    assert_eq!(inbox["total"], 1);
    assert_eq!(
        (&message["side"], &message["consumer"], &message["reason"], &message["attempts"], &message["offset"]),
        (&json!("inbox"), &json!("app"), &json!("too_many_attempts"), &json!(2), &json!(1))
    );
    assert!(message["last_error"].as_str().unwrap().contains("the table is missing"), "{message}");
    for (filter, count) in [
        (&["--reason", "unroutable"][..], 4),
        (&["--topic", "nowhere.1"], 2),
        (&["--topic", "nowhere.*"], 4),
        (&["--topic", "*"], 0),
        (&["--topic", "#"], 5),
        (&["--topic", "#.placed"], 1),
        (&["--topic", "nowhere.1.#", "--side", "outbox"], 2),
        (&["--consumer", "app"], 1),
        (&["--since", "1h"], 5),
        (&["--since", "2999-01-01"], 0),
        (&["--reason", "expired"], 0),
    ] {
        let found = json_of(&lab, &[&["parked", "list", "--json"], filter].concat()).await;
        assert_eq!(found["total"], count, "{filter:?}");
    }
    let limited = json_of(&lab, &["parked", "list", "--limit", "2", "--json"]).await;
    assert_eq!((&limited["total"], limited["parked"].as_array().unwrap().len()), (&json!(5), 2));
    let table = text(&oncebox(&lab, &["parked", "list"]).await.stdout);
    assert!(
        table.contains("inbox of app") && table.contains("nowhere.0#0, 2") && table.contains("312 NO_ROUTE"),
        "{table}"
    );

    let id = message["message_id"].as_str().unwrap();
    let shown = text(&oncebox(&lab, &["parked", "show", id, "--json"]).await.stdout);
    assert!(shown.contains("12345678901234567890") && shown.contains("\"encoding\": \"json\""), "{shown}");
    assert!(shown.contains("\"oncebox-stream\": \"order.placed#0\""), "{shown}");
    let id = all["parked"][0]["message_id"].as_str().unwrap();
    let shown = text(&oncebox(&lab, &["parked", "show", id]).await.stdout);
    assert!(shown.contains("{\"colour\":\"red\"}") && shown.contains("{\"n\": 1}"), "{shown}");
}

/// Goal: wrong usage is exit 2, what is not parked exit 1, each with one clear line; bulk work says what it is about.
#[tokio::test]
async fn bulk_work_must_be_asked_for() {
    let lab = Lab::shared().await;
    let unknown = "00000000-0000-7000-8000-000000000000";
    for (args, code, said) in [
        (&["retry"][..], 2, "oncebox: parked: say which: message ids, --reason"),
        (&["retry", "--side", "inbox"], 2, "say which"),
        (&["discard", "--why", "x"], 2, "say which"),
        (&["discard", "--all", "--why", " "], 2, "--why: must not be empty"),
        (&["discard", "--all"], 2, "--why <TEXT>"),
        (&["discard", "--all", "--why", "x", "--by", " "], 2, "--by: must not be empty"),
        (&["retry", "--all", unknown], 2, "cannot be used with"),
        (&["list", "--since", "soon"], 2, "oncebox: --since: \"soon\" is neither a duration"),
        (&["show", "x"], 2, "invalid value 'x'"),
        (&["retry", unknown], 1, &format!("oncebox: not parked: {unknown}")),
        (&["show", unknown], 1, &format!("oncebox: {unknown} is not parked")),
        (&["retry", "--all"], 0, "nothing to retry"),
        (&["list"], 0, "nothing is parked"),
    ] {
        let output = oncebox(&lab, &[&["parked"], args].concat()).await;
        let said_all = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said_all}");
        assert!(said_all.contains(said), "{args:?}: {said_all}");
        if code == 2 && said.starts_with("oncebox:") {
            assert_eq!(output.stderr.iter().filter(|byte| **byte == b'\n').count(), 1, "{said_all}");
        }
    }
}

/// Goal: a retried message goes out once under its own id and offset, however many retry it at once; a dry run changes
/// nothing; bulk work spans batches.
#[tokio::test(flavor = "multi_thread")]
async fn two_retries_at_once_send_one_copy() {
    let lab = Lab::shared().await;
    let _relay = park(&lab, 1_203).await;
    let mut conn = lab.connect().await;
    let before: Vec<(String, i64)> =
        sqlx::query_as("select message_id::text, \"offset\" from oncebox.parked").fetch_all(&mut conn).await.unwrap();

    let dry = json_of(&lab, &["parked", "retry", "--topic", "nowhere.*", "--dry-run", "--json"]).await;
    assert_eq!((&dry["dry_run"], &dry["retry"]), (&json!(true), &json!(1_203)));
    assert_eq!(lab.number(PARKED).await, 1_203);

    let tap = Tap::bound(&lab, "late", &["nowhere.#"]).await;
    let calls = ["parked", "retry", "--reason", "unroutable", "--json"];
    let (one, two, sql) = tokio::join!(json_of(&lab, &calls), json_of(&lab, &calls), async {
        let retry =
            "select count(*) filter (where oncebox.outbox_retry(lane, seq)) from oncebox.parked where side = 'outbox'";
        lab.number(retry).await
    });
    let retried = one["retried"].as_i64().unwrap() + two["retried"].as_i64().unwrap() + sql;
    assert_eq!(retried, 1_203, "{one} {two} {sql}");
    let wire = tap.read(1_203).await;
    assert_eq!((wire.deliveries.len(), wire.duplicates()), (1_203, 0));
    let after: HashSet<(String, i64)> =
        wire.deliveries.iter().map(|d| (d.message_id.clone().unwrap(), d.position().unwrap().offset)).collect();
    assert_eq!(after, before.iter().cloned().collect());
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 0).await;
    // By now it is neither parked nor waiting.
    let (id, _) = &before[0];
    let output = oncebox(&lab, &["parked", "retry", id]).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

/// Goal: of a retry and a discard at once one wins, whole: the message is sent, or it is recorded as discarded.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_and_a_discard_at_once_do_one_of_them() {
    let lab = Lab::shared().await;
    let relay = park(&lab, 600).await;
    let tap = Tap::bound(&lab, "late", &["nowhere.#"]).await;
    let one = |call: &'static str, order: &'static str| {
        let url = lab.database_url.clone();
        async move {
            let mut conn = connect(&url).await;
            let parked: Vec<(i16, i64)> = sqlx::query_as(AssertSqlSafe(format!(
                "select lane, seq from oncebox.parked where side = 'outbox' order by seq {order}"
            )))
            .fetch_all(&mut conn)
            .await
            .unwrap();
            let mut won = 0;
            for (lane, seq) in parked {
                let call = AssertSqlSafe(format!("select oncebox.{call}"));
                let done: bool = sqlx::query_scalar(call).bind(lane).bind(seq).fetch_one(&mut conn).await.unwrap();
                won += i64::from(done);
            }
            won
        }
    };
    let (retried, discarded) = tokio::join!(
        tokio::spawn(one("outbox_retry($1, $2)", "asc")),
        tokio::spawn(one("outbox_discard($1, $2, 'stale')", "desc"))
    );
    let (retried, discarded) = (retried.unwrap(), discarded.unwrap());
    assert!(retried > 0 && discarded > 0, "{retried} retried, {discarded} discarded: they did not race");
    assert_eq!(retried + discarded, 600);
    let wire = tap.read(retried as usize).await;
    assert_eq!((wire.deliveries.len() as i64, wire.duplicates()), (retried, 0));
    let sent: HashSet<String> = wire.deliveries.iter().filter_map(|d| d.message_id.clone()).collect();
    let gone: Vec<(String,)> = sqlx::query_as("select message_id::text from oncebox.outbox_discarded")
        .fetch_all(&mut lab.connect().await)
        .await
        .unwrap();
    assert_eq!(gone.len() as i64, discarded);
    assert!(gone.iter().all(|(id,)| !sent.contains(id)));
    drop(relay);
}

/// Goal: while operators retry what nobody is bound for again and again, the relay parks it again each time; nothing
/// is lost, and in the end each message arrives.
#[tokio::test(flavor = "multi_thread")]
async fn retries_while_the_relay_parks_again_lose_nothing() {
    let lab = Lab::shared().await;
    let _relay = park(&lab, 40).await;
    let mut conn = lab.connect().await;
    let again = "select count(*) from oncebox.outbox_held where attempts >= 4";
    // One that has been parked four times is left: the first of a key would keep those behind it waiting for ever.
    let retry = "select oncebox.outbox_retry(lane, seq) from oncebox.parked where side = 'outbox' and attempts < 4";
    eventually("each was parked several times", async || {
        let mut conn = connect(&lab.database_url).await;
        conn.execute(retry).await.unwrap();
        let enough: i64 = sqlx::query_scalar(again).fetch_one(&mut conn).await.unwrap();
        (enough == 40).then_some(())
    })
    .await;
    let tap = Tap::bound(&lab, "late", &["nowhere.#"]).await;
    eventually("all are sent", async || {
        let mut conn = connect(&lab.database_url).await;
        conn.execute("select oncebox.outbox_retry(lane, seq) from oncebox.parked where side = 'outbox'").await.unwrap();
        let held: i64 =
            sqlx::query_scalar("select count(*) from oncebox.outbox_held").fetch_one(&mut conn).await.unwrap();
        (held == 0).then_some(())
    })
    .await;
    let wire = tap.read(40).await;
    assert_eq!((wire.deliveries.len(), wire.duplicates()), (40, 0));
    assert_eq!(number(&mut conn, PARKED).await, 0);
}

async fn number(conn: &mut sqlx::PgConnection, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(conn).await.unwrap()
}

/// Goal: an expired message that is retried is sent although its time has passed.
#[tokio::test]
async fn an_expired_message_can_be_sent_all_the_same() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    lab.sql("select oncebox.publish('t', '1', expires_at => now() - interval '1 second')").await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from oncebox.parked where reason = 'expired'", 1).await;
    let done = json_of(&lab, &["parked", "retry", "--reason", "expired", "--json"]).await;
    assert_eq!((&done["retried"], &done["by_place"]), (&json!(1), &json!({ "outbox": 1 })));
    assert_eq!(tap.read(1).await.deliveries.len(), 1);
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 0).await;
}

/// Goal: on the inbox's side a retried delivery has its effect once, with all its attempts anew; a discarded one has
/// none, and a later copy of it is done already.
#[tokio::test(flavor = "multi_thread")]
async fn the_inbox_has_the_same_verbs() {
    let lab = Lab::shared().await;
    lab.sql(HANDLER).await;
    let _consumer = lab.consume(&lab.config(CONFIG)).await;
    let _relay = lab.relay().await;
    let ids: Vec<(uuid::Uuid,)> = sqlx::query_as(
        "select oncebox.publish('order.placed', to_jsonb(i), key => 'k' || i) from generate_series(1, 6) as i",
    )
    .fetch_all(&mut lab.connect().await)
    .await
    .unwrap();
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from oncebox.parked where side = 'inbox' and attempts = 2", 6).await;
    // Not mended yet: all the attempts are made again.
    let first = ids[0].0;
    let before: String =
        sqlx::query_scalar("select max(last_at)::text from oncebox.parked").fetch_one(&mut conn).await.unwrap();
    lab.sql(&format!("select oncebox.inbox_retry('app', '{first}')")).await;
    let again = format!(
        "select count(*) from oncebox.parked where message_id = '{first}' and attempts = 2 and last_at > '{before}'"
    );
    eventually_number(&mut conn, &again, 1).await;

    let (given_up, kept) = (ids[5].0.to_string(), ids.len() as i64 - 1);
    let args = ["parked", "discard", &given_up, "--why", "a test order", "--json"];
    let done = json_of(&lab, &args).await;
    assert_eq!((&done["discarded"], &done["by_place"]), (&json!(1), &json!({ "inbox of app": 1 })));
    let (by, why): (String, String) =
        sqlx::query_as("select discarded_by, why from oncebox.inbox_discarded").fetch_one(&mut conn).await.unwrap();
    assert!(why == "a test order" && by.contains('@') && !by.contains("unknown"), "{by}: {why}");

    lab.sql("insert into app.mended values (true)").await;
    let calls = ["parked", "retry", "--consumer", "app", "--json"];
    let (one, two) = tokio::join!(json_of(&lab, &calls), json_of(&lab, &calls));
    assert_eq!(one["retried"].as_i64().unwrap() + two["retried"].as_i64().unwrap(), kept, "{one} {two}");
    eventually_number(&mut conn, "select count(*) from app.effect", kept).await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held", 0).await;

    // A copy of each comes again: the relay would send it after a crash.
    let replayed = oncebox(&lab, &["replay", "--stream", "order.placed#0"]).await;
    assert!(replayed.status.success(), "{replayed:?}");
    lab.sql("select oncebox.publish('order.placed', '7')").await;
    eventually_number(&mut conn, "select count(*) from app.effect", kept + 1).await;
    assert_eq!(number(&mut conn, "select count(distinct id) from app.effect").await, kept + 1);
    let given_up = format!("select count(*) from app.effect where id = '{given_up}'");
    assert_eq!(lab.number(&given_up).await, 0, "a discarded delivery took effect");
}

/// Goal: a delivery too old to be proven new can be discarded too: a copy is refused anyway.
#[tokio::test]
async fn a_delivery_too_old_for_the_inbox_can_be_discarded() {
    let lab = Lab::shared().await;
    lab.sql(
        "insert into oncebox.inbox_held (consumer, message_id, state, reason, topic, headers, body)
        values ('app', oncebox.uuid_v7(now() - interval '30 days'), 'parked', 'rejected', 't', '{}', '')",
    )
    .await;
    let discard = "select oncebox.inbox_discard(consumer, message_id, 'old', 'me')::int::bigint from oncebox.parked";
    assert_eq!(lab.number(discard).await, 1);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_discarded where discarded_by = 'me'").await, 1);
    assert_eq!(lab.number("select count(*) from oncebox.inbox").await, 0);
}

/// Goal: a discard says who and why, in words; the whole message is kept, and by default the session's user did it.
#[tokio::test]
async fn a_discard_is_recorded_with_who_and_why() {
    let lab = Lab::shared().await;
    let _relay = park(&lab, 3).await;
    let mut conn = lab.connect().await;
    for (arguments, named) in [("''", "why: "), ("null", "why: "), ("'x', ' '", "by: "), ("'x', null", "by: ")] {
        for call in [
            format!("select oncebox.outbox_discard(0, 1, {arguments})"),
            format!("select oncebox.inbox_discard('app', gen_random_uuid(), {arguments})"),
        ] {
            let error = sqlx::query(AssertSqlSafe(call)).execute(&mut conn).await.unwrap_err();
            let error = error.as_database_error().unwrap();
            assert_eq!(error.code().as_deref(), Some("22023"));
            assert!(error.message().starts_with(named), "{error}");
        }
    }
    let output = oncebox(&lab, &["parked", "discard", "--topic", "nowhere.1", "--why", "stale", "--by", "ann"]).await;
    assert_eq!(text(&output.stdout), "discarded 2 of the outbox\n", "{output:?}");
    let recorded = "select count(*) from oncebox.outbox_discarded where discarded_by = 'ann' and why = 'stale'
        and stream = 'nowhere.1#0' and \"offset\" in (1, 2) and headers = '{\"colour\": \"red\"}' and plan_n > 0
        and convert_from(body, 'UTF8')::jsonb ? 'n' and reason = 'unroutable' and ordinal > 0";
    assert_eq!(lab.number(recorded).await, 2);
    lab.sql("select oncebox.outbox_discard(lane, seq, 'and this') from oncebox.parked").await;
    assert_eq!(lab.number("select count(*) from oncebox.outbox_discarded where discarded_by = session_user").await, 1);
    assert_eq!(lab.number("select count(*) from oncebox.outbox_held").await, 0);
    assert_eq!(lab.number("select oncebox.outbox_retry(0, 1)::int::bigint").await, 0);
}

/// Goal: a message discarded before the relay's settled place was saved is not sent by the relay that comes after a
/// kill -9.
#[tokio::test]
async fn a_discarded_message_is_not_sent_by_the_next_relay() {
    let lab = Lab::shared().await;
    let mut relay = park(&lab, 3).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_lease where settled_n > 1 or settled_seq > 0", 1)
        .await;
    relay.kill9();
    let tap = Tap::bound(&lab, "late", &["nowhere.#"]).await;
    assert_eq!(oncebox(&lab, &["parked", "discard", "--all", "--why", "stale"]).await.status.code(), Some(0));
    // As a relay leaves it that dies before it saves: nothing is settled, here and in the journal.
    lab.sql(
        "update oncebox.outbox_lease set settled_n = 0, settled_seq = 0, expires_at = '-infinity';
        update oncebox.outbox_plan set settled_n = 0, settled_seq = 0",
    )
    .await;
    let _relay = lab.relay().await;
    lab.sql("select oncebox.publish('nowhere.end', '1')").await;
    let wire = tap.read(1).await;
    let topics: Vec<&str> = wire.deliveries.iter().map(|d| d.topic.as_str()).collect();
    assert_eq!(topics, ["nowhere.end"]);
    assert_eq!(lab.number("select count(*) from oncebox.outbox_held").await, 0);
}

/// Goal: an operator's role is enough for every verb, and a producer's for none.
#[tokio::test]
async fn an_admin_role_is_enough() {
    let lab = Lab::shared().await;
    let tap = Tap::bound(&lab, "tap", &["t"]).await;
    lab.sql("select oncebox.publish('t', '1')").await;
    let _relay = park(&lab, 4).await;
    let admin = crate::support::unique("login");
    let producer = crate::support::unique("login");
    lab.sql(&format!(
        "create role {admin} login in role oncebox_admin; create role {producer} login in role oncebox_producer"
    ))
    .await;
    let url = |role: &str| lab.database_url.replace("oncebox@", &format!("{role}@"));
    let (url, other) = (url(&admin), url(&producer));
    // Only what is settled is replayed, and that is saved a moment after the confirm.
    let settled = "select count(*) from oncebox.outbox_settled() as s where s.n > s.newest_n or s.seq >= 5";
    eventually_number(&mut lab.connect().await, settled, 1).await;
    for args in [
        &["parked", "list", "--database-url", &url][..],
        &["parked", "retry", "--topic", "nowhere.0", "--database-url", &url],
        &["parked", "discard", "--topic", "nowhere.1", "--why", "x", "--database-url", &url],
        &["replay", "--stream", "t#0", "--database-url", &url],
        &["replay", "--since", "1h", "--dry-run", "--database-url", &url],
    ] {
        let output = oncebox(&lab, args).await;
        assert!(output.status.success(), "{args:?}: {output:?}");
    }
    assert_eq!(tap.read(1).await.deliveries.len(), 2);
    assert_eq!(lab.number("select count(*) from oncebox.outbox_discarded").await, 2);
    let mut conn = sqlx::PgConnection::connect(&other).await.unwrap();
    for refused in [
        "select from oncebox.parked",
        "select from oncebox.outbox_discarded",
        "select oncebox.outbox_retry(0, 1)",
        "select oncebox.inbox_retry('app', gen_random_uuid())",
        "select oncebox.outbox_discard(0, 1, 'x')",
        "select oncebox.inbox_discard('app', gen_random_uuid(), 'x')",
    ] {
        let error = conn.execute(refused).await.expect_err(refused);
        assert_eq!(error.as_database_error().and_then(|e| e.code()).as_deref(), Some("42501"), "{refused}: {error}");
    }
}
