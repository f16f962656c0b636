//! Goal: operators pause topics, lanes or everything and resume them, from the command line and SQL; nothing is lost
//! and no key loses its order meanwhile, through restarts and kills, and what is not paused goes on.

use crate::support::storm;
use crate::support::wire::{Tap, Wire};
use crate::support::{Lab, Process, connect, eventually, eventually_number, number};
use oncebox::broker::memory::{Fault, MemoryBroker};
use oncebox::broker::{Broker, QueueSpec, Subscription};
use oncebox::relay::{self, RelayOptions};
use oncebox::topic;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const UNSETTLED: &str = "
    select count(*) from oncebox.outbox_lease as l
    cross join lateral (select * from oncebox.outbox_plan where lane = l.lane order by n desc limit 1) as p
    where greatest(p.settled_n, l.settled_n) <= p.n
        or p.q_top < (select coalesce(max(seq), 0) from oncebox.outbox where lane = l.lane)";

/// Runs the program to its end: exit code and output.
async fn oncebox(lab: &Lab, args: &[&str]) -> (i32, String) {
    let mut process = Process::spawn(lab.command(args));
    let status = process.end().await;
    (status.code().unwrap_or(-1), process.log())
}

/// Publishes 12 messages of each topic, of four keys that run across all topics; remembers them in table app.
async fn publish(lab: &Lab, topics: &[&str]) {
    let list = topics.iter().map(|topic| format!("'{topic}'")).collect::<Vec<_>>().join(", ");
    lab.sql(&format!(
        "create table if not exists app (n bigserial primary key, id uuid not null, key text);
        insert into app (id, key)
        select oncebox.publish(topic, to_jsonb(i), key => 'k' || i % 4), 'k' || i % 4
        from (
            select i, topic from generate_series(1, 12) as i
            cross join unnest(array[{list}]) with ordinality as t (topic, place)
            order by i, place
        ) as message"
    ))
    .await;
}

/// What everything but `settled` says.
const PAUSED: &str = "select count(*) from oncebox.outbox_held where state = 'waiting' and reason = 'paused'";

/// Goal: a paused topic's messages wait, and those of their keys behind them; keys and messages without a key go on;
/// after the end of the pause everything arrives in the order of its key; a relay killed in the middle of either, and
/// one started while it lasts, change nothing of that.
#[tokio::test]
async fn a_topic_is_paused_and_resumed() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let mut relay = lab.relay().await;
    publish(&lab, &["order.placed", "order.paid.late", "stock"]).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    let mut wire = tap.read(36).await;

    let (code, said) = oncebox(&lab, &["pause", "--topic", "order.#", "--why", "the shop moves", "--by", "ann"]).await;
    assert_eq!(code, 0, "{said}");
    relay.wait_for_log("the pauses have changed").await;
    publish(&lab, &["stock", "order.placed", "order.paid.late"]).await;
    lab.sql("insert into app (id) select oncebox.publish('stock', to_jsonb(i)) from generate_series(1, 5) as i;
        insert into app (id, key) select oncebox.publish('stock', to_jsonb(i), key => 'other'), 'other' from generate_series(1, 5) as i")
    .await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    // The first of each key was before the first paused one of that key.
    let early = tap.read(14).await;
    assert_eq!(early.deliveries.len(), 14);
    assert!(early.deliveries.iter().all(|delivery| delivery.topic == "stock"), "a paused message was sent");
    assert_eq!(lab.number("select count(*) from oncebox.outbox_held").await, 32);
    assert_eq!(lab.number(PAUSED).await, 4, "the heads of four keys");

    let (_, list) = oncebox(&lab, &["pause", "--list", "--json"]).await;
    let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    assert_eq!(
        (&list[0]["topic"], &list[0]["paused_by"], &list[0]["held"]),
        (&"order.#".into(), &"ann".into(), &4.into())
    );
    assert_eq!(list[0]["why"], "the shop moves");

    // Another relay keeps to it from its first message on.
    relay.kill9();
    lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
    publish(&lab, &["order.placed"]).await;
    let mut relay = lab.relay().await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 44).await;
    assert_eq!(tap.read(0).await.deliveries.len(), 0, "a paused message was sent");

    assert_eq!(oncebox(&lab, &["resume", "--topic", "order.#"]).await.0, 0);
    eventually("it begins", async || (tap.depth().await > 0).then_some(())).await;
    relay.kill9();
    lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
    relay = lab.relay().await;
    publish(&lab, &["order.placed"]).await;
    let committed = storm::committed(&lab).await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 0).await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    wire.deliveries.extend(early.deliveries);
    wire.deliveries.extend(tap.read(56).await.deliveries);
    wire.assert_exactly(&committed);
    drop(relay);
}

/// Goal: messages that are held for another cause when their topic is paused are not sent either.
#[tokio::test]
async fn held_messages_of_a_paused_topic_wait() {
    let lab = Lab::shared().await;
    let limited = Tap::limited(&lab, "narrow", &["narrow"], 2).await;
    lab.sql("create table app (n bigserial primary key, id uuid not null, key text)").await;
    let relay = lab.relay().await;
    lab.sql(
        "insert into app (id, key) select oncebox.publish('narrow', to_jsonb(i), key => 'k' || i % 2), 'k' || i % 2
        from generate_series(1, 20) as i",
    )
    .await;
    let mut conn = lab.connect().await;
    eventually("held messages", async || {
        let mut conn = connect(&lab.database_url).await;
        let held = number(&mut conn, "select count(*) from oncebox.outbox_held where reason = 'nacked'").await;
        (held > 0).then_some(())
    })
    .await;
    lab.sql("select oncebox.pause('narrow')").await;
    relay.wait_for_log("the pauses have changed").await;
    let before = limited.read(1).await;
    eventually_number(&mut conn, PAUSED, 2).await;
    // What was in flight when it was paused has come by now.
    let mut all = before.deliveries;
    all.extend(limited.read(0).await.deliveries);
    assert_eq!(limited.read(0).await.deliveries.len(), 0);
    assert!(all.len() < 20);
    lab.sql("select oncebox.resume('narrow')").await;
    let committed = storm::committed(&lab).await;
    let rest = limited.read(20 - all.len()).await;
    all.extend(rest.deliveries);
    Wire { deliveries: all }.assert_exactly(&committed);
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 0).await;
}

/// Goal: a paused lane, and a pause of everything, stop sending at once and for good, also over a restart; the lease is
/// kept, other lanes go on, and the end of the pause loses nothing.
#[tokio::test]
async fn lanes_and_everything_are_paused() {
    let lab = Lab::shared().await;
    lab.sql("update oncebox.setting set lanes = 2").await;
    let tap = Tap::on(&lab).await;
    let mut relay = lab.spawn(&["relay"]);
    assert_eq!(oncebox(&lab, &["pause", "--lane", "1", "--why", "w"]).await.0, 0);
    relay.wait_for_log("lane_paused=true").await;
    publish(&lab, &["t"]).await;
    let mut conn = lab.connect().await;
    let in_lane = |lane: i32| format!("select count(*) from oncebox.outbox where lane = {lane}");
    let (zero, one) = (lab.number(&in_lane(0)).await as usize, lab.number(&in_lane(1)).await as usize);
    assert!(zero > 0 && one > 0, "{zero} and {one}");
    let mut all = tap.read(zero).await.deliveries;
    assert_eq!(all.len(), zero, "a message of the paused lane was sent");

    assert_eq!(oncebox(&lab, &["pause", "--all", "--why", "w"]).await.0, 0);
    relay.stop().await;
    publish(&lab, &["t"]).await;
    let relay = lab.spawn(&["relay"]);
    let held = "select count(*) from oncebox.outbox_lease where owner is not null and expires_at > clock_timestamp()";
    eventually_number(&mut conn, held, 2).await;
    eventually("both lanes are paused", async || (relay.log().matches("lane_paused=true").count() == 2).then_some(()))
        .await;
    assert_eq!(tap.read(0).await.deliveries.len(), 0, "a message was sent while everything was paused");
    assert_eq!(lab.number(held).await, 2);
    assert_eq!(lab.number("select count(*) from oncebox.outbox_held").await, 0);

    // The end of one pause leaves the others.
    let (code, said) = oncebox(&lab, &["resume", "--all"]).await;
    assert!(code == 0 && said.contains("still paused: lane 1"), "{said}");
    all.extend(tap.read(zero).await.deliveries);
    assert_eq!(all.len(), 2 * zero);
    assert_eq!(lab.number("select oncebox.resume(lane => 1)::bigint").await, 1);
    all.extend(tap.read(2 * one).await.deliveries);
    eventually_number(&mut conn, UNSETTLED, 0).await;
    Wire { deliveries: all }.assert_exactly(&storm::committed(&lab).await);
}

/// Goal: pausing twice is one pause; each pause ends by the words it was made with; what makes no sense is refused by
/// name, exit 2 on the command line and 22023 in SQL.
#[tokio::test]
async fn pauses_are_made_and_lifted_by_name() {
    let lab = Lab::shared().await;
    let call = async |text: &str| lab.number(&format!("select oncebox.{text}::bigint")).await;
    assert_eq!(call("pause('a.*')").await, call("pause('a.*', why => 'again')").await);
    call("pause('a.*', 0)").await;
    call("pause(lane => 0)").await;
    call("pause()").await;
    assert_eq!(lab.number("select count(*) from oncebox.outbox_pause").await, 4);
    assert_eq!(call("resume()").await, 1);
    assert_eq!(call("resume()").await, 0);
    assert_eq!(call("resume('a.*')").await, 1);
    assert_eq!(call("resume_all()").await, 2);
    for (refused, argument) in [
        ("pause('')", "topic"),
        ("pause(repeat('x', 256))", "topic"),
        ("pause('order*')", "topic"),
        ("pause('a.##')", "topic"),
        ("pause(lane => 1)", "lane"),
        ("pause(lane => -1)", "lane"),
    ] {
        let error = sqlx::query(sqlx::AssertSqlSafe(format!("select oncebox.{refused}")))
            .execute(&mut lab.connect().await)
            .await
            .expect_err(refused);
        let error = error.as_database_error().expect("a refusal");
        assert_eq!(error.code().as_deref(), Some("22023"), "{refused}: {error}");
        assert!(error.message().starts_with(argument), "{refused}: {error}");
    }
    for (args, expected) in [
        (&["pause", "--why", "w"][..], 2),
        (&["pause", "--all", "--lane", "0", "--why", "w"], 2),
        (&["pause", "--topic", "t"], 2),
        (&["pause", "--topic", "t*", "--why", "w"], 2),
        (&["pause", "--lane", "9", "--why", "w"], 2),
        (&["pause", "--list", "--all"], 2),
        (&["pause", "--json", "--all", "--why", "w"], 2),
        (&["resume"], 2),
        (&["resume", "--all", "--every"], 2),
        (&["resume", "--topic", "t"], 1),
        (&["resume", "--every"], 0),
        (&["pause", "--topic", "t", "--lane", "0", "--why", "w"], 0),
        (&["pause", "--list"], 0),
        (&["resume", "--topic", "t", "--lane", "0"], 0),
    ] {
        let (code, said) = oncebox(&lab, args).await;
        assert_eq!(code, expected, "{args:?}: {said}");
    }
    assert_eq!(lab.number("select count(*) from oncebox.outbox_pause").await, 0);
}

/// Patterns and topics that try each rule of matching.
const PATTERNS: &[&str] = &[
    "#", "*", "a", "a.*", "a.#", "#.a", "*.a", "a.*.b", "a.#.b", "#.#", "*.#", "#.*", "a.#.b.#", "*.*", "a.", ".a",
    "a..b", ".",
];
const TOPICS: &[&str] =
    &["a", "b", "a.b", "a.b.c", "a.c.b", "a.b.b", "b.a", "a.a", "a.", ".a", "a..b", ".", "..", "a.x.y.b", "A"];

/// Goal: a pattern means what it means to the broker: a queue bound by it gets exactly the topics that match.
#[tokio::test]
async fn patterns_match_as_the_broker_matches() {
    let lab = Lab::shared().await;
    let mut taps = Vec::new();
    for (i, pattern) in PATTERNS.iter().enumerate() {
        taps.push(Tap::bound(&lab, &format!("tap{i}"), &[pattern]).await);
    }
    let _all = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    let list = TOPICS.iter().map(|topic| format!("'{topic}'")).collect::<Vec<_>>().join(", ");
    lab.sql(&format!("select oncebox.publish(topic, '1') from unnest(array[{list}]) as topic")).await;
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    for (tap, pattern) in taps.iter().zip(PATTERNS) {
        let expected: Vec<&str> = TOPICS.iter().copied().filter(|topic| topic::matches(pattern, topic)).collect();
        let mut routed: Vec<String> = tap.read(0).await.deliveries.into_iter().map(|delivery| delivery.topic).collect();
        routed.sort_unstable();
        let mut sorted = expected.clone();
        sorted.sort_unstable();
        assert_eq!(routed, sorted, "{pattern}");
    }
}

/// Goal: the SQL function and its twin in Rust agree on every pattern and topic.
#[tokio::test]
async fn both_matchers_agree() {
    let lab = Lab::shared().await;
    let words = prop::collection::vec(prop::sample::select(vec!["a", "b", "*", "#", "", "é"]), 1..7);
    let texts = words.prop_map(|words| words.join("."));
    let mut runner = TestRunner::deterministic();
    let mut draw = || texts.new_tree(&mut runner).expect("a text").current();
    let pairs: Vec<(String, String)> = (0..20_000).map(|_| (draw(), draw())).collect();
    let (patterns, topics): (Vec<String>, Vec<String>) = pairs.iter().cloned().unzip();
    let answers: Vec<bool> = sqlx::query_scalar(
        "select oncebox.topic_matches(p, t) from unnest($1::text[], $2::text[]) with ordinality as u (p, t, i) order by i",
    )
    .bind(&patterns)
    .bind(&topics)
    .fetch_all(&mut lab.connect().await)
    .await
    .expect("answers");
    let mut matches = 0;
    for ((pattern, topic), answer) in pairs.iter().zip(answers) {
        assert_eq!(answer, topic::matches(pattern, topic), "{pattern:?} {topic:?}");
        matches += usize::from(answer);
    }
    assert!(matches > 1_000, "only {matches} matched: the test shows little");
}

/// Goal: waiting messages of a paused topic are bounded: the lane waits then, and goes on when the pause ends.
#[tokio::test]
async fn what_a_pause_holds_is_bounded() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    lab.sql("select oncebox.pause('t')").await;
    let _relay = lab.relay().await;
    lab.sql(
        "create table app (n bigserial primary key, id uuid not null, key text);
        insert into app (id, key) select oncebox.publish('t', to_jsonb(i), key => 'k' || i % 500), 'k' || i % 500
        from generate_series(1, 30000) as i",
    )
    .await;
    let mut conn = lab.connect().await;
    let held = "select count(*) from oncebox.outbox_held";
    eventually("the lane waits", async || {
        let mut conn = connect(&lab.database_url).await;
        (number(&mut conn, held).await >= 10_000).then_some(())
    })
    .await;
    // Longer than any look: nothing more is held.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let waiting = lab.number(held).await;
    assert!(waiting <= 20_000, "{waiting} are held");
    assert_eq!(tap.depth().await, 0);
    lab.sql("select oncebox.resume('t')").await;
    let committed = storm::committed(&lab).await;
    tap.read(committed.len()).await.assert_exactly(&committed);
    eventually_number(&mut conn, held, 0).await;
}

/// Goal: a name that is empty by mistake lifts no other pause.
#[tokio::test]
async fn an_empty_name_resumes_nothing() {
    let lab = Lab::shared().await;
    lab.sql("select oncebox.pause(why => 'a test')").await;
    for call in ["oncebox.resume('')", "oncebox.resume(null, -1)"] {
        assert_eq!(lab.number(&format!("select {call}::bigint")).await, 0, "{call}");
    }
    assert_eq!(lab.number("select oncebox.resume()::bigint").await, 1);
}

/// Goal: a message that was held as paused when the session with the broker broke, and whose pause was lifted before
/// the next one, goes out.
#[tokio::test]
async fn a_pause_lifted_during_an_outage_holds_nothing() {
    let lab = Lab::shared().await;
    let broker = MemoryBroker::new();
    let queue = QueueSpec {
        name: "q".to_owned(),
        exchange: "oncebox".to_owned(),
        bindings: vec!["#".to_owned()],
        single_active_consumer: false,
        voids: false,
    };
    let mut subscription = broker.subscribe(&queue, 0).await.expect("subscribes");
    lab.sql("select oncebox.pause(topic => 'paused', why => 'a test')").await;
    let options = RelayOptions {
        database_url: lab.database_url.clone(),
        exchange: "oncebox".to_owned(),
        key_window: 1,
        drain_deadline: Duration::from_secs(5),
        unroutable_probe: None,
    };
    let stop = CancellationToken::new();
    let running = tokio::spawn(relay::run(Arc::new(broker.clone()), options, stop.clone()));
    let mut conn = lab.connect().await;
    lab.sql("select oncebox.publish('b', '0')").await;
    subscription.next().await.expect("the session stands");
    broker.inject(Fault::DropBeforeRouting, 1, |_| true);
    broker.refuse_connections(true);
    lab.sql("select oncebox.publish('paused', '1', key => 'k'), oncebox.publish('b', '1'), oncebox.publish('b', '2')")
        .await;
    eventually_number(&mut conn, PAUSED, 1).await;
    lab.sql("select oncebox.resume_all()").await;
    broker.refuse_connections(false);
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 0).await;
    stop.cancel();
    running.await.expect("no panic").expect("it ends in order");
}
