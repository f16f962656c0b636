//! Goal: a replay sends what is retained again exactly as it was, in the asked range and no other, never ahead of the
//! relay, and says what it did not send.

use crate::support::proxy::Proxy;
use crate::support::wire::Tap;
use crate::support::{LIMIT, Lab, Process, eventually, eventually_number};
use oncebox::message::Delivery;
use oncebox::ranges::Ranges;
use oncebox::replay::{self, Selection};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::process::Output;
use std::time::{Duration, Instant};

/// 0 once every outbox row is settled.
const UNSETTLED: &str = "
    select case when greatest(p.settled_n, l.settled_n) > p.n
        and p.q_top >= (select coalesce(max(seq), 0) from oncebox.outbox) then 0 else 1 end::bigint
    from oncebox.outbox_lease as l
    cross join lateral (select * from oncebox.outbox_plan where lane = 0 order by n desc limit 1) as p
    where l.lane = 0";

async fn oncebox(lab: &Lab, args: &[&str]) -> Output {
    let mut command = lab.command(args);
    command.stdin(std::process::Stdio::null());
    let run = tokio::task::spawn_blocking(move || command.output().expect("the program starts"));
    tokio::time::timeout(LIMIT, run).await.expect("an end in time").expect("no panic")
}

/// Runs `oncebox replay … --json`; its exit code and summary.
async fn replay(lab: &Lab, args: &[&str]) -> (Option<i32>, Value) {
    let output = oncebox(lab, &[&["replay", "--json"], args].concat()).await;
    let summary = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.status.code(), summary)
}

/// Publishes numbered messages in `windows` windows of their own, over topics t.0 to t.2, and waits until all are
/// settled.
async fn publish(lab: &Lab, from: i64, to: i64, windows: i64) {
    let mut conn = lab.connect().await;
    let each = (to - from + 1) / windows;
    for window in 0..windows {
        let first = from + window * each;
        let last = if window + 1 == windows { to } else { first + each - 1 };
        lab.sql(&format!(
            "select oncebox.publish('t.' || i % 3, jsonb_build_object('n', i), key => 'k' || i % 7,
                headers => jsonb_build_object('n', i, 'name', 'x' || i))
            from generate_series({first}, {last}) as i"
        ))
        .await;
        eventually_number(&mut conn, UNSETTLED, 0).await;
    }
}

/// What makes a copy the same message.
fn essence(delivery: &Delivery) -> (Option<String>, String, Option<String>, String, Vec<u8>) {
    let headers = serde_json::to_string(&delivery.headers).unwrap();
    (delivery.message_id.clone(), delivery.topic.clone(), delivery.content_type.clone(), headers, delivery.body.clone())
}

fn place(delivery: &Delivery) -> (String, i64) {
    let at = delivery.position().unwrap();
    (at.stream, at.offset)
}

fn ranges(spans: &Value) -> Vec<(String, i64, i64)> {
    let spans = spans.as_array().unwrap().iter();
    spans
        .map(|s| (s["stream"].as_str().unwrap().to_owned(), s["from"].as_i64().unwrap(), s["to"].as_i64().unwrap()))
        .collect()
}

/// Goal: a range is sent again, exact at both ends, with the same ids, headers, offsets, ordinals and bodies, in order.
#[tokio::test]
async fn a_range_is_sent_again_as_it_was() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    // Beyond a keyframe of the journal is another test's matter; several windows, and one of several pages.
    publish(&lab, 1, 60, 6).await;
    publish(&lab, 61, 1_800, 1).await;
    publish(&lab, 1_801, 1_830, 3).await;
    let first: HashMap<_, _> = tap.read(1_830).await.deliveries.iter().map(|d| (place(d), essence(d))).collect();
    assert_eq!(first.len(), 1_830);
    for (from, to) in [(1, 1), (15, 25), (19, 606), (610, 610), (1, 610)] {
        let (code, summary) = replay(
            &lab,
            &[
                "--stream",
                "t.1#0",
                "--from-offset",
                &from.to_string(),
                "--to-offset",
                &to.to_string(),
                "--rate",
                "100000/s",
            ],
        )
        .await;
        assert_eq!((code, summary["sent"].as_i64()), (Some(0), Some(to - from + 1)), "{summary}");
        let wire = tap.read((to - from + 1) as usize).await;
        let offsets: Vec<i64> = wire.deliveries.iter().map(|d| place(d).1).collect();
        assert!(offsets.len() as i64 == to - from + 1, "{from} to {to}: {} came", offsets.len());
        for delivery in &wire.deliveries {
            assert_eq!(essence(delivery), first[&place(delivery)]);
            assert_eq!(place(delivery).0, "t.1#0");
        }
        let mut by_key: BTreeMap<Option<&str>, Vec<i64>> = BTreeMap::new();
        for delivery in &wire.deliveries {
            by_key.entry(delivery.key()).or_default().push(place(delivery).1);
        }
        assert!(by_key.values().all(|offsets| offsets.is_sorted()), "keys keep their order");
        let mut offsets = offsets;
        offsets.sort_unstable();
        assert!(offsets.into_iter().eq(from..=to));
    }
    // An open end, and everything.
    let (code, summary) = replay(&lab, &["--stream", "t.2#0", "--from-offset", "600"]).await;
    assert_eq!((code, &summary["sent"], &summary["not_settled"]), (Some(0), &json!(11), &json!([])));
    tap.read(11).await;
    let (code, summary) = replay(&lab, &["--since", "1h", "--rate", "100000"]).await;
    assert_eq!((code, &summary["sent"]), (Some(0), &json!(1_830)));
    let wire = tap.read(1_830).await;
    assert_eq!(wire.deliveries.len(), 1_830);
    assert!(wire.deliveries.iter().all(|d| essence(d) == first[&place(d)]));

    // Named without sending.
    let wanted = BTreeMap::from([("t.0#0".to_owned(), Ranges::of(7, 9)), ("t.2#0".to_owned(), Ranges::of(610, 700))]);
    let selection = Selection::Offsets { source: None, streams: wanted };
    let found = replay::find(&mut lab.connect().await, &selection, 100).await.unwrap();
    assert_eq!(found.len(), 4);
    for found in found {
        let (id, topic, ..) = &first[&(found.stream, found.offset)];
        assert_eq!((id.clone(), topic), (Some(found.message_id.to_string()), &found.topic));
    }
    assert_eq!(replay::find(&mut lab.connect().await, &selection, 2).await.unwrap().len(), 2);
}

/// Goal: since a time: what was published before it is not sent, everything since is, of one stream or of all.
#[tokio::test]
async fn since_a_time() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 30, 2).await;
    let time: String =
        sqlx::query_scalar("select (date_trunc('second', clock_timestamp()) + interval '1 second')::text")
            .fetch_one(&mut lab.connect().await)
            .await
            .unwrap();
    let arrived = format!("select (clock_timestamp() >= '{time}')::int::bigint");
    eventually_number(&mut lab.connect().await, Box::leak(arrived.into_boxed_str()), 1).await;
    publish(&lab, 31, 60, 2).await;
    tap.read(60).await;
    let (code, dry) = replay(&lab, &["--since", &time, "--dry-run"]).await;
    assert_eq!((code, &dry["sent"], &dry["dry_run"]), (Some(0), &json!(30), &json!(true)));
    let (code, summary) = replay(&lab, &["--since", &time]).await;
    assert_eq!((code, &summary["sent"], &summary["dry_run"]), (Some(0), &json!(30), &json!(false)));
    let wire = tap.read(30).await;
    let mut numbers: Vec<i64> = wire.deliveries.iter().map(|d| d.headers["n"].as_i64().unwrap()).collect();
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(31..=60));
    let (_, summary) = replay(&lab, &["--since", &time, "--stream", "t.0#0"]).await;
    assert_eq!(summary["sent"], 10);
    assert_eq!(tap.read(10).await.deliveries.len(), 10);
    let (code, summary) = replay(&lab, &["--since", "2999-01-01"]).await;
    assert_eq!((code, &summary["sent"]), (Some(0), &json!(0)));
}

const HANDLER: &str = "
    create schema app;
    create table app.effect (n bigserial primary key, consumer text, id uuid, key text, number int);
    create function app.old(message_id uuid, topic text, payload jsonb, headers jsonb) returns void language sql as
    $$ insert into app.effect (consumer, id, key, number)
       values ('old', message_id, headers ->> 'oncebox-key', (payload ->> 'n')::int) $$;
    create function app.new(message_id uuid, topic text, payload jsonb, headers jsonb) returns void language sql as
    $$ insert into app.effect (consumer, id, key, number)
       values ('new', message_id, headers ->> 'oncebox-key', (payload ->> 'n')::int) $$;";

/// Goal: the consumer that has everything sees no second effect, and a new one catches up, each key in its order.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_consumer_catches_up_and_an_old_one_has_no_second_effect() {
    let lab = Lab::shared().await;
    lab.sql(HANDLER).await;
    let config = |name: &str| {
        lab.config(&format!(
            "[[consumer]]\nname = \"{name}\"\nbindings = [\"t.*\"]\nhandler = {{ sql = \"app.{name}\" }}\n"
        ))
    };
    let _old = lab.consume(&config("old")).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 300, 3).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from app.effect", 300).await;
    let _new = lab.consume(&config("new")).await;
    let (code, summary) = replay(&lab, &["--since", "1h"]).await;
    assert_eq!((code, &summary["sent"]), (Some(0), &json!(300)));
    eventually_number(&mut conn, "select count(*) from app.effect where consumer = 'new'", 300).await;
    // What comes behind the copies is applied behind them.
    publish(&lab, 301, 301, 1).await;
    eventually_number(&mut conn, "select count(*) from app.effect where number = 301", 2).await;
    assert_eq!(lab.number("select count(*) from app.effect where consumer = 'old'").await, 301);
    let disorder = "select count(*) from (
        select number < lag(number) over (partition by consumer, key order by n) as back from app.effect) as e where back";
    assert_eq!(lab.number(disorder).await, 0);
    assert_eq!(lab.number("select count(*) from (select distinct consumer, id from app.effect) as e").await, 602);
}

/// Goal: no more goes out than the rate allows.
#[tokio::test]
async fn the_rate_is_a_limit() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 200, 1).await;
    tap.read(200).await;
    let began = Instant::now();
    let (code, summary) = replay(&lab, &["--since", "1h", "--rate", "100/s"]).await;
    let took = began.elapsed();
    assert_eq!((code, &summary["sent"]), (Some(0), &json!(200)));
    assert!(took >= Duration::from_millis(1_950), "200 at 100/s took {took:?}");
}

/// Goal: held, discarded and expired messages are passed over and counted, and what nobody is bound for is named.
#[tokio::test]
async fn held_discarded_and_expired_messages_are_passed_over() {
    let lab = Lab::shared().await;
    let tap = Tap::bound(&lab, "tap", &["known", "lost"]).await;
    let lost = Tap::bound(&lab, "lost", &["lost"]).await;
    let _relay = lab.relay().await;
    lab.sql(
        "select oncebox.publish(case when i % 5 = 0 then 'unknown' else 'known' end, to_jsonb(i)) from generate_series(1, 40) as i;
        select oncebox.publish('known', '1', expires_at => clock_timestamp() + interval '1 second');
        select oncebox.publish('lost', to_jsonb(i)) from generate_series(1, 3) as i",
    )
    .await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    eventually_number(&mut conn, "select count(*) from oncebox.parked", 8).await;
    lab.sql("select oncebox.outbox_discard(lane, seq, 'x') from oncebox.parked order by seq limit 3").await;
    assert_eq!((tap.read(36).await.deliveries.len(), lost.read(3).await.deliveries.len()), (36, 3));
    eventually_number(&mut conn, "select count(*) from oncebox.outbox where expires_at <= clock_timestamp()", 1).await;
    // The topic `lost` is routed by two queues: unbind by removing both is not what this is about; a vhost's policy
    // cannot unbind, so the broker is told directly.
    for queue in ["tap", "lost"] {
        unbind(&lab, queue, "lost").await;
    }
    let (code, summary) = replay(&lab, &["--since", "1h"]).await;
    assert_eq!(code, Some(0), "{summary}");
    let counts = ["sent", "held", "discarded", "expired"].map(|name| summary[name].as_i64().unwrap());
    assert_eq!(counts, [32, 5, 3, 1], "{summary}");
    assert_eq!(ranges(&summary["unroutable"]), [("lost#0".to_owned(), 1, 3)]);
    assert_eq!(tap.read(32).await.deliveries.len(), 32);
}

async fn unbind(lab: &Lab, queue: &str, key: &str) {
    let connection = lapin::Connection::connect(&lab.amqp_url, Default::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.queue_unbind(queue.into(), "oncebox".into(), key.into(), Default::default()).await.unwrap();
}

/// Goal: what is beyond the settled place is not sent but named, exactly; a relay that is away does not lose its place.
#[tokio::test]
async fn nothing_unsettled_is_sent() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let mut relay = lab.relay().await;
    publish(&lab, 1, 30, 2).await;
    relay.stop().await;
    lab.sql("select oncebox.publish('t.0', '1') from generate_series(1, 5)").await;
    tap.read(30).await;
    let (code, summary) = replay(&lab, &["--stream", "t.0#0", "--from-offset", "8", "--to-offset", "14"]).await;
    assert_eq!((code, &summary["sent"]), (Some(0), &json!(3)), "{summary}");
    assert_eq!(ranges(&summary["not_settled"]), [("t.0#0".to_owned(), 11, 14)]);
    assert_eq!(tap.read(3).await.deliveries.len(), 3);
    let (code, summary) = replay(&lab, &["--stream", "t.0#0", "--from-offset", "11", "--to-offset", "12"]).await;
    assert_eq!((code, &summary["sent"]), (Some(1), &json!(0)), "{summary}");
    let said = oncebox(&lab, &["replay", "--stream", "t.0#0", "--from-offset", "10", "--to-offset", "14"]).await;
    let said = String::from_utf8(said.stdout).unwrap();
    assert_eq!(said, "sent 1\n4 not sent, beyond what the relay has settled:\n  t.0#0 11-14\n");
    tap.read(1).await;
    // The settled place in the middle of a window, as a relay leaves it that was killed: rows behind it are not sent.
    let middle = lab.number("select seq from oncebox.outbox where topic = 't.1' order by seq offset 7 limit 1").await;
    let window =
        lab.number("select max(n) from oncebox.outbox_plan where q1 < (select max(seq) - 5 from oncebox.outbox)").await;
    lab.sql(&format!(
        "update oncebox.outbox_lease set settled_n = {window}, settled_seq = {middle};
        update oncebox.outbox_plan set settled_n = 0, settled_seq = 0"
    ))
    .await;
    let (_, summary) = replay(&lab, &["--stream", "t.1#0", "--from-offset", "1", "--to-offset", "10"]).await;
    assert_eq!((&summary["sent"], ranges(&summary["not_settled"])), (&json!(8), vec![("t.1#0".to_owned(), 9, 10)]));
}

/// Goal: where part of the log was cleared, the offsets that are gone are named, and the others keep theirs: also in a
/// window of which only some rows are left, and where the journal was cut off.
#[tokio::test]
async fn what_is_no_longer_retained_is_named() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 90, 3).await;
    // One window over two partitions, of which the first will be cleared.
    let mut conn = lab.connect().await;
    sqlx::Executor::execute(
        &mut conn,
        "begin; select oncebox.publish('t.0', '0') from generate_series(1, 3);
        update oncebox.outbox_ring set slot = 1;
        select oncebox.publish('t.0', '0') from generate_series(1, 3); commit",
    )
    .await
    .unwrap();
    eventually_number(&mut conn, UNSETTLED, 0).await;
    publish(&lab, 91, 150, 2).await;
    let first: HashMap<_, _> = tap.read(156).await.deliveries.iter().map(|d| (place(d), essence(d))).collect();
    lab.sql("truncate oncebox.outbox_0").await;

    let (code, summary) = replay(&lab, &["--stream", "t.0#0", "--from-offset", "28", "--to-offset", "40"]).await;
    assert_eq!((code, &summary["sent"]), (Some(0), &json!(4)), "{summary}");
    assert_eq!(ranges(&summary["not_retained"]), [("t.0#0".to_owned(), 28, 36)]);
    let wire = tap.read(4).await;
    assert!(wire.deliveries.iter().all(|d| essence(d) == first[&place(d)]));
    let (code, summary) = replay(&lab, &["--stream", "t.0#0", "--from-offset", "3", "--to-offset", "4"]).await;
    assert_eq!((code, ranges(&summary["not_retained"])), (Some(1), vec![("t.0#0".to_owned(), 3, 4)]), "{summary}");

    // The journal too is cut off, behind a plan with all counters.
    let keep = lab.number("select n from oncebox.outbox_plan where streams @> '{t.1#0}' and bases[array_position(streams, 't.1#0')] >= 31 order by n limit 1").await;
    lab.sql(&format!(
        "update oncebox.outbox_plan as p set keyframe = true, streams = c.streams, bases = c.bases
        from (select array_agg(s order by s) as streams, array_agg(b order by s) as bases from (
            select distinct on (s) s, b from oncebox.outbox_plan as e, unnest(e.streams, e.bases) as u (s, b)
            where e.n <= {keep} order by s, e.n desc) as l) as c
        where p.n = {keep}"
    ))
    .await;
    // The same with such a plan in the middle, over it and from it on.
    for (from, sent, missing) in [("28", 4, vec![("t.0#0".to_owned(), 28, 36)]), ("37", 4, vec![])] {
        let (_, summary) = replay(&lab, &["--stream", "t.0#0", "--from-offset", from, "--to-offset", "40"]).await;
        assert_eq!((&summary["sent"], ranges(&summary["not_retained"])), (&json!(sent), missing), "{summary}");
        assert!(tap.read(4).await.deliveries.iter().all(|d| essence(d) == first[&place(d)]));
    }
    lab.sql(&format!("delete from oncebox.outbox_plan where n < {keep}")).await;
    let (code, summary) = replay(&lab, &["--since", "1h"]).await;
    assert_eq!((code, &summary["sent"]), (Some(0), &json!(60)), "{summary}");
    assert_eq!(
        ranges(&summary["not_retained"]),
        [("t.0#0".to_owned(), 1, 36), ("t.1#0".to_owned(), 1, 30), ("t.2#0".to_owned(), 1, 30)]
    );
    let wire = tap.read(60).await;
    assert_eq!(wire.deliveries.len(), 60);
    assert!(wire.deliveries.iter().all(|d| essence(d) == first[&place(d)]));
}

/// Goal: a partition cleared while its window is being sent again shifts no offset: what is left is named.
#[tokio::test]
async fn a_log_cleared_meanwhile_shifts_no_offset() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    // Two partitions in turn, in one window of many pages.
    let mut conn = lab.connect().await;
    let insert = |from: i64, to: i64| {
        format!("select oncebox.publish('t', to_jsonb(i)) from generate_series({from}, {to}) as i")
    };
    let text = format!(
        "begin; {}; update oncebox.outbox_ring set slot = 1; {}; update oncebox.outbox_ring set slot = 0; {}; commit",
        insert(1, 2_000),
        insert(2_001, 3_000),
        insert(3_001, 4_000)
    );
    sqlx::Executor::execute(&mut conn, sqlx::AssertSqlSafe(text)).await.unwrap();
    eventually_number(&mut conn, UNSETTLED, 0).await;
    publish(&lab, 1, 3, 1).await;
    let first: HashMap<_, _> = tap.read(4_003).await.deliveries.iter().map(|d| (place(d), essence(d))).collect();
    let mut replay = lab.spawn(&["replay", "--stream", "t#0", "--rate", "500", "--json", "--log", "warn"]);
    eventually("it sends", async || (tap.depth().await > 20).then_some(())).await;
    lab.sql("truncate oncebox.outbox_0").await;
    let status = replay.end().await;
    let summary: Value = serde_json::from_str(&replay.log()).unwrap();
    let sent = summary["sent"].as_i64().unwrap();
    assert!(status.success() && sent > 0 && sent < 4_000, "{summary}");
    assert_eq!(ranges(&summary["not_retained"]), [("t#0".to_owned(), sent + 1, 4_000)]);
    let wire = tap.read(sent as usize).await;
    assert_eq!(wire.deliveries.len() as i64, sent);
    assert!(wire.deliveries.iter().all(|d| essence(d) == first[&place(d)]));
}

/// Goal: connections to broker and database that are cut, and a broker killed in the middle, cost copies, never a
/// message.
#[tokio::test(flavor = "multi_thread")]
async fn servers_may_be_away_in_the_middle() {
    let mut lab = Lab::own().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 6_000, 2).await;
    let first: HashMap<_, _> = tap.read(6_000).await.deliveries.iter().map(|d| (place(d), essence(d))).collect();
    let port = |url: &str| -> u16 {
        url.rsplit_once(':').and_then(|(_, rest)| rest.split('/').next()?.parse().ok()).expect("a port")
    };
    let (database, broker) = (port(&lab.database_url), port(&lab.amqp_url));
    let (to_database, to_broker) = (Proxy::to(database).await, Proxy::to(broker).await);
    let mut command = lab.command(&["replay", "--since", "1h", "--rate", "1000/s", "--json"]);
    command
        .env("ONCEBOX_DATABASE_URL", to_database.instead_of(&lab.database_url, database))
        .env("ONCEBOX_AMQP_URL", to_broker.instead_of(&lab.amqp_url, broker));
    let mut replay = Process::spawn(command);
    for step in 0..4 {
        let depth = tap.depth().await;
        eventually("it sends", async || (tap.depth().await > depth + 300).then_some(())).await;
        match step {
            0 => to_broker.cut(),
            1 => to_database.cut(),
            2 => {
                lab.rabbit.kill9();
                lab.rabbit.restart().await.expect("RabbitMQ restarts");
            }
            _ => to_broker.cut(),
        }
    }
    let status = replay.end().await;
    assert!(status.success(), "{}", replay.log());
    assert!(replay.log().contains("\"sent\": 6000"), "{}", replay.log());
    assert!(replay.log().contains("no session with the broker"), "nothing was cut: {}", replay.log());
    let wire = tap.read(6_000).await;
    let distinct: HashMap<_, _> = wire.deliveries.iter().map(|d| (place(d), essence(d))).collect();
    assert_eq!(distinct, first);
}

/// Goal: stopped in the middle it waits for what is in flight, says what it did not come to, and ends with exit 1.
#[tokio::test]
async fn a_stopped_replay_says_how_far_it_came() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 900, 1).await;
    tap.read(900).await;
    for signal in ["TERM", "INT"] {
        let args = [
            "replay",
            "--stream",
            "t.0#0",
            "--from-offset",
            "1",
            "--to-offset",
            "300",
            "--rate",
            "50",
            "--log",
            "warn",
        ];
        let mut replay = lab.spawn(&args);
        eventually("it sends", async || (tap.depth().await > 10).then_some(())).await;
        replay.signal(signal);
        let status = replay.end().await;
        assert_eq!(status.code(), Some(1), "{}", replay.log());
        let sent = tap.read(1).await.deliveries.len();
        let said = replay.log();
        assert!(said.contains(&format!("sent {sent}\n")) && said.contains("stopped before the end"), "{sent}: {said}");
        assert!(said.contains(&format!("\n  t.0#0 {}-300\n", sent + 1)), "{sent}: {said}");
    }
}

/// Goal: wrong usage is exit 2 with one clear line.
#[tokio::test]
async fn usage_is_checked() {
    let lab = Lab::shared().await;
    for (args, said) in [
        (&[][..], "--stream <TOPIC#LANE>"),
        (&["--stream", "t"], "oncebox: --stream: \"t\" is no stream of this outbox"),
        (&["--stream", "t#7"], "oncebox: --stream: \"t#7\" is no stream of this outbox"),
        (&["--stream", "t#0", "--from-offset", "0"], "0 is not in 1.."),
        (&["--stream", "t#0", "--from-offset", "5", "--to-offset", "4"], "oncebox: --to-offset: 4 lies before"),
        (&["--since", "soon"], "oncebox: --since: \"soon\" is neither"),
        (&["--since", "1h", "--rate", "0"], "must be 1/s to 1000000/s"),
        (&["--since", "1h", "--from-offset", "1"], "--from-offset"),
    ] {
        let output = oncebox(&lab, &[&["replay"], args].concat()).await;
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(error.contains(said), "{args:?}: {error}");
    }
}

/// Goal: nacked messages are sent again until the queue takes them, and each key keeps its order.
#[tokio::test(flavor = "multi_thread")]
async fn nacks_keep_the_order_of_their_key() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 40, 1).await;
    tap.read(40).await;
    // A full queue nacks: three messages of room, until the tap empties it.
    let narrow = Tap::limited(&lab, "narrow", &["t.#"], 3).await;
    let mut replay = lab.spawn(&["replay", "--since", "1h", "--json"]);
    // Every key has been sent once, and the first ones fill the queue.
    eventually("the queue is full", async || (narrow.depth().await >= 3).then_some(())).await;
    let wire = narrow.read(40).await;
    let status = replay.end().await;
    assert!(status.success() && replay.log().contains("\"sent\": 40"), "{}", replay.log());
    let mut firsts: BTreeMap<Option<&str>, Vec<i64>> = BTreeMap::new();
    for delivery in &wire.deliveries {
        let numbers = firsts.entry(delivery.key()).or_default();
        let number = delivery.headers["n"].as_i64().unwrap();
        if !numbers.contains(&number) {
            numbers.push(number);
        }
    }
    assert_eq!(firsts.values().map(Vec::len).sum::<usize>(), 40);
    assert!(firsts.values().all(|numbers| numbers.is_sorted()), "{firsts:?}");
    assert!(tap.read(40).await.duplicates() > 0, "nothing was nacked: the test shows nothing");
}

/// Goal: a message that the broker refuses now is found among those in flight and named; every other one is sent.
#[tokio::test]
async fn a_refused_message_is_found_and_named() {
    let lab = Lab::own().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    lab.sql(
        "select oncebox.publish('t', to_jsonb(repeat('x', case when i in (50, 77) then 2000 else 10 end)))
        from generate_series(1, 200) as i",
    )
    .await;
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    tap.read(200).await;
    lab.rabbit.ctl(&["eval", "application:set_env(rabbit, max_message_size, 1000)."]).await.expect("a small limit");
    let (code, summary) = replay(&lab, &["--stream", "t#0", "--rate", "100000"]).await;
    assert_eq!((code, &summary["sent"]), (Some(0), &json!(198)), "{summary}");
    assert_eq!(ranges(&summary["refused"]), [("t#0".to_owned(), 50, 50), ("t#0".to_owned(), 77, 77)]);
    let wire = tap.read(198).await;
    assert_eq!(wire.deliveries.len() - wire.duplicates(), 198);
}

/// Goal: nothing is sent before a commit of the replay's own session has reached the synchronous standby.
#[tokio::test]
async fn a_replay_begins_with_a_fence() {
    let lab = Lab::own().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 5, 1).await;
    tap.read(5).await;
    lab.require_absent_standby().await;
    let mut replay = lab.spawn(&["replay", "--since", "1h"]);
    let waits =
        "select count(*) from pg_stat_activity where application_name = 'oncebox replay' and wait_event = 'SyncRep'";
    eventually_number(&mut lab.connect().await, waits, 1).await;
    assert_eq!(tap.depth().await, 0, "it was sent before the fence held");
    lab.require_no_standby().await;
    let status = replay.end().await;
    assert!(status.success() && replay.log().contains("sent 5\n"), "{}", replay.log());
    assert_eq!(tap.read(5).await.deliveries.len(), 5);
}
