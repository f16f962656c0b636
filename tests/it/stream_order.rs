//! Goal: with order "stream" each stream is applied in offset order with no gap, through killed processes, copies,
//! failing handlers and reordered queues; what will never come is passed, and what is missing is waited for visibly.

use crate::support::wire::{Tap, Wire};
use crate::support::{Lab, Process, connect, eventually, eventually_number, unique};
use lapin::options::QueuePurgeOptions;
use oncebox::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use oncebox::broker::{Broker, Publisher, QueueSpec, Subscription};
use oncebox::message::{Delivery, Envelope, Message, MessageId};
use sqlx::PgConnection;
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

/// Effects are numbered in the order in which their transactions wrote them; nothing hides a double one. A message
/// with `poison` always fails, one with `gate` until that gate is open.
const EFFECTS: &str = "
    create schema shop;
    create table shop.effect (n bigserial primary key, message_id uuid not null, stream text, place bigint, number bigint);
    create table shop.gate (name text primary key);
    create function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    begin
        if payload ? 'poison' then
            raise exception 'poison %', payload ->> 'poison';
        end if;
        if payload ? 'gate' and not exists (select from shop.gate where name = payload ->> 'gate') then
            raise exception 'gate % is closed', payload ->> 'gate';
        end if;
        insert into shop.effect (message_id, stream, place, number)
        values (message_id, headers ->> 'oncebox-stream', (headers ->> 'oncebox-offset')::bigint, (payload ->> 'n')::bigint);
    end
    $$;";

const CONFIG: &str = r#"
drain_deadline = "5s"
[[consumer]]
name = "shop"
bindings = ["order.#"]
handler = { sql = "shop.on_message" }
order = "stream"
concurrency = 3
backoff_initial = "50ms"
backoff_cap = "200ms"
max_attempts = 4
"#;

/// Offsets in the order of their effects, a stream.
async fn effects(conn: &mut PgConnection) -> BTreeMap<String, Vec<i64>> {
    let rows: Vec<(String, i64)> =
        sqlx::query_as("select stream, place from shop.effect order by n").fetch_all(conn).await.expect("reads");
    let mut effects: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for (stream, place) in rows {
        effects.entry(stream).or_default().push(place);
    }
    effects
}

/// Every stream was applied from 1 on, in order, without a gap.
fn assert_dense(effects: &BTreeMap<String, Vec<i64>>, streams: usize) {
    assert_eq!(effects.len(), streams, "{:?}", effects.keys());
    for (stream, places) in effects {
        assert!(places.iter().copied().eq(1..=places.len() as i64), "{stream}: {places:?}");
    }
}

/// Publishes `count` messages to `topics` topics in turn, each lane's share by key; numbered from `from`.
async fn publish(lab: &Lab, from: i64, count: i64, topics: i64) {
    lab.sql(&format!(
        "select oncebox.publish('order.' || i % {topics}, jsonb_build_object('n', i), key => 'k' || i % 17)
        from generate_series({from}, {}) as i",
        from + count - 1
    ))
    .await;
}

fn broker(lab: &Lab) -> RabbitMq {
    RabbitMq::new(RabbitMqOptions::new(&lab.amqp_url)).expect("a valid URL")
}

/// Sends deliveries once more, as they came.
async fn resend<'a>(lab: &Lab, deliveries: impl Iterator<Item = &'a Delivery>) {
    let mut publisher = broker(lab).publisher("oncebox").await.expect("a session");
    let mut outcomes = Vec::new();
    for (ticket, delivery) in (0..).zip(deliveries) {
        let mut headers = delivery.headers.clone();
        headers.retain(|name, _| !name.starts_with("oncebox-"));
        let message = Message {
            id: MessageId(delivery.message_id.as_deref().and_then(|id| id.parse().ok()).expect("a uuid")),
            topic: delivery.topic.clone(),
            key: delivery.key().map(str::to_owned),
            content_type: "application/json".to_owned(),
            headers,
            body: delivery.body.clone(),
            published_at_s: 0,
        };
        let position = delivery.position().expect("its headers");
        let ordinal = delivery.lane_place().expect("its headers").2;
        while publisher.capacity() == 0 {
            publisher.outcomes(&mut outcomes).await.expect("confirms");
        }
        publisher.publish(ticket, &Envelope { message, position, ordinal }).await.expect("publishes");
    }
    while publisher.unconfirmed() > 0 {
        publisher.outcomes(&mut outcomes).await.expect("confirms");
    }
    publisher.close().await;
}

/// The wire in an order that looks random, each delivery twice.
fn shuffled(wire: &Wire) -> Vec<&Delivery> {
    let mut all: Vec<_> = (0u64..).zip(wire.deliveries.iter().chain(&wire.deliveries)).collect();
    all.sort_by_key(|(n, _)| (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20);
    all.into_iter().map(|(_, delivery)| delivery).collect()
}

async fn eventually_empty(lab: &Lab) {
    eventually("the queue is empty", async || {
        let list = ["list_queues", "-p", &lab.name, "--quiet", "--no-table-headers", "name", "messages"];
        let listing = lab.rabbit.ctl(&list).await.expect("rabbitmqctl answers");
        listing.lines().any(|line| line.trim() == "shop\t0").then_some(())
    })
    .await;
}

/// Declares the consumer's queue as it does, and has it gone again.
async fn bind(lab: &Lab, config: &str) {
    let mut consumer = lab.consume(config).await;
    assert!(consumer.stop().await.0.success());
}

async fn channel(lab: &Lab) -> (lapin::Connection, lapin::Channel) {
    let connection = lapin::Connection::connect(&lab.amqp_url, Default::default()).await.expect("connects");
    let channel = connection.create_channel().await.expect("a channel");
    (connection, channel)
}

/// Goal: several streams over several lanes, relay and consumers killed -9 again and again, copies of everything sent
/// meanwhile in any order: each message has one effect, in offset order, with no gap.
#[tokio::test(flavor = "multi_thread")]
async fn streams_keep_their_order_through_kills_and_copies() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    lab.sql("update oncebox.setting set lanes = 2").await;
    let config = lab.config(CONFIG);
    let mut consumers = [lab.consume(&config).await, lab.spawn(&["consume", "--config", &config])];
    let mut relay = lab.relay().await;
    let tap = Tap::bound(&lab, "tap", &["order.#"]).await;
    let (count, topics, rounds) = (1_800, 3, 6);
    for round in 0..rounds {
        publish(&lab, 1 + round * count / rounds, count / rounds, topics).await;
        tokio::time::sleep(Duration::from_millis(150 + 60 * round as u64)).await;
        let consumer = &mut consumers[round as usize % 2];
        consumer.kill9();
        *consumer = lab.spawn(&["consume", "--config", &config]);
        if round % 2 == 1 {
            relay.kill9();
            relay = lab.spawn(&["relay"]);
            lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
        }
        if round == 3 {
            let wire = tap.read(200).await;
            resend(&lab, shuffled(&wire).into_iter().step_by(4)).await;
        }
    }
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", count).await;
    eventually_empty(&lab).await;
    assert_eq!(lab.number("select count(*) from shop.effect").await, count);
    assert_dense(&effects(&mut conn).await, 2 * topics as usize);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held").await, 0);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_void").await, 0);
}

/// Goal: a queue in any order, with copies: what comes early is held and applied when its turn comes, and the look for
/// it keeps up with a thousand held ones.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_early_is_held() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let config = lab.config(CONFIG);
    bind(&lab, &config).await;
    let tap = Tap::bound(&lab, "tap", &["order.#"]).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 1_000, 2).await;
    let wire = tap.read(1_000).await;
    let (_connection, channel) = channel(&lab).await;
    channel.queue_purge("shop".into(), QueuePurgeOptions::default()).await.expect("purges");
    let early = shuffled(&wire);
    let first = early.iter().position(|delivery| delivery.position().expect("ours").offset == 1).expect("there");
    assert!(first > 3, "the first of a stream comes first: the test shows little");
    resend(&lab, early.into_iter()).await;
    let _consumer = lab.consume(&config).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 1_000).await;
    eventually_empty(&lab).await;
    assert_dense(&effects(&mut conn).await, 2);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held").await, 0);
}

/// Goal: a failing message holds up its own stream and no other, also over a kill; when it succeeds the stream goes on
/// in order.
#[tokio::test]
async fn a_failing_message_holds_up_its_own_stream_only() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let config = lab.config(&CONFIG.replace("max_attempts = 4", "max_attempts = 100000"));
    let mut consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    let mut conn = lab.connect().await;
    lab.sql("select oncebox.publish('order.1', '{\"n\": 0, \"gate\": \"g\"}')").await;
    publish(&lab, 1, 200, 4).await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 150).await;
    let waiting =
        "select count(*) from oncebox.inbox_held where state = 'waiting' and reason in ('failed', 'behind_stream')";
    eventually_number(&mut conn, waiting, 51).await;
    assert_eq!(lab.number("select count(*) from oncebox.inbox_gap").await, 0, "nothing is missing");
    consumer.kill9();
    let _consumer = lab.consume(&config).await;
    lab.sql("insert into shop.gate values ('g')").await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 201).await;
    assert_dense(&effects(&mut conn).await, 4);
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held", 0).await;
}

/// Goal: a message that fails too often is parked and its stream goes on; so it does when an operator discards one that
/// waits; retried later, a parked one is applied late.
#[tokio::test]
async fn parked_and_discarded_messages_are_passed() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let _consumer = lab.consume(&lab.config(CONFIG)).await;
    let _relay = lab.relay().await;
    let mut conn = lab.connect().await;
    let id = Uuid::now_v7();
    lab.sql(&format!("select oncebox.publish('order.1', '{{\"n\": 0, \"poison\": \"p\"}}', message_id => '{id}')"))
        .await;
    publish(&lab, 1, 20, 2).await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 20).await;
    assert_eq!(lab.number("select attempts::bigint from oncebox.inbox_held where state = 'parked'").await, 4);
    assert_eq!(effects(&mut conn).await["order.1#0"], (2..=11).collect::<Vec<i64>>());

    lab.sql("create or replace function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language sql as $$ insert into shop.effect (message_id, stream, place) values ($1, $4 ->> 'oncebox-stream', ($4 ->> 'oncebox-offset')::bigint) $$")
    .await;
    lab.sql("update oncebox.inbox_held set state = 'waiting', next_at = now()").await;
    eventually_number(&mut conn, &format!("select count(*) from shop.effect where message_id = '{id}'"), 1).await;

    lab.sql("create or replace function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language plpgsql as $$ begin
            if payload ? 'gate' then raise 'closed'; end if;
            insert into shop.effect (message_id, stream, place) values ($1, $4 ->> 'oncebox-stream', ($4 ->> 'oncebox-offset')::bigint);
        end $$")
    .await;
    let config = lab.config(&CONFIG.replace("max_attempts = 4", "max_attempts = 100000"));
    drop(_consumer);
    let _consumer = lab.consume(&config).await;
    lab.sql("select oncebox.publish('order.1', '{\"gate\": \"never\"}') from generate_series(1, 2)").await;
    publish(&lab, 21, 20, 2).await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 31).await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held", 12).await;
    // The second of the two before its turn, and the first at its.
    for place in [13, 12] {
        lab.sql(&format!("delete from oncebox.inbox_held where stream = 'order.1#0' and \"offset\" = {place}")).await;
    }
    eventually_number(&mut conn, "select count(*) from shop.effect", 41).await;
    let places = effects(&mut conn).await.remove("order.1#0").expect("its effects");
    assert_eq!(places[10..], [vec![1], (14..=23).collect::<Vec<i64>>()].concat());
    assert_eq!(lab.number("select count(*) from oncebox.inbox_void").await, 0);
}

/// A lab whose consumer has a database of its own, and a session there.
async fn apart(lab: &Lab) -> (String, PgConnection) {
    let name = unique("apart");
    lab.postgres.create_database(&name).await.expect("a database");
    let url = lab.postgres.url(&name);
    oncebox::migrate::migrate(&url).await.expect("the migrations apply");
    let mut conn = connect(&url).await;
    sqlx::raw_sql(EFFECTS).execute(&mut conn).await.expect("the handler");
    (CONFIG.replace("name = \"shop\"", &format!("name = \"shop\"\ndatabase_url = \"{url}\"")), conn)
}

/// Goal: expired and refused offsets in the middle of a stream are announced to a consumer in another database, which
/// passes them; a message that is sent after all is applied late, once; no other consumer sees the notices.
#[tokio::test]
async fn expired_and_refused_offsets_are_passed() {
    let lab = Lab::own().await;
    let tap = Tap::on(&lab).await;
    lab.rabbit.ctl(&["eval", "application:set_env(rabbit, max_message_size, 1000)."]).await.expect("a small limit");
    let (config, mut conn) = apart(&lab).await;
    let _consumer = lab.consume(&lab.config(&config)).await;
    // 10 and 11 expire, 20 is too large, so is the last; the first expires too.
    lab.sql(
        "select oncebox.publish('order.x', jsonb_build_object('n', i, 'x', repeat('x', case when i in (20, 40) then 2000 else 1 end)),
            expires_at => case when i in (1, 10, 11) then clock_timestamp() end)
        from generate_series(1, 40) as i",
    )
    .await;
    let relay = lab.relay().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 35).await;
    eventually_number(&mut conn, "select next_offset from oncebox.inbox_stream", 41).await;
    let expected: Vec<i64> = (1..=40).filter(|n| ![1, 10, 11, 20, 40].contains(n)).collect();
    assert_eq!(effects(&mut conn).await["order.x#0"], expected);
    eventually_number(&mut lab.connect().await, "select count(*) from oncebox.outbox_void", 0).await;
    assert_eq!(lab.number("select count(*) from oncebox.outbox_held where state = 'parked'").await, 5);
    assert!(tap.read(35).await.deliveries.iter().all(|delivery| delivery.void().is_none()));

    lab.sql(
        "update oncebox.outbox_held set state = 'waiting', next_at = now(), expires_at = null where \"offset\" = 10",
    )
    .await;
    eventually_number(&mut conn, "select count(*) from shop.effect where place = 10", 1).await;
    lab.sql("select oncebox.publish('order.x', '{\"n\": 41}')").await;
    eventually_number(&mut conn, "select count(*) from shop.effect where place = 41", 1).await;
    let places = effects(&mut conn).await.remove("order.x#0").expect("its effects");
    assert_eq!(places, [expected, vec![10, 41]].concat());
    assert_eq!(number_of(&mut conn, "oncebox.inbox_void").await + number_of(&mut conn, "oncebox.inbox_held").await, 0);
    drop(relay);
}

async fn number_of(conn: &mut PgConnection, table: &str) -> i64 {
    crate::support::number(conn, &format!("select count(*) from {table}")).await
}

/// Goal: a relay that dies with void notices in hand loses none: the next one sends them.
#[tokio::test]
async fn voids_survive_a_relay_that_dies_with_them() {
    let lab = Lab::shared().await;
    let (config, mut conn) = apart(&lab).await;
    let _consumer = lab.consume(&lab.config(&config)).await;
    let mut command = lab.command(&["relay"]);
    command.env("ONCEBOX_FAILPOINT", "relay.voids_read=1");
    let mut doomed = Process::spawn(command);
    doomed.wait_for_log("lane resumed").await;
    lab.sql(
        "select oncebox.publish('order.x', jsonb_build_object('n', i), expires_at => case when i % 10 = 5 then clock_timestamp() end)
        from generate_series(1, 100) as i",
    )
    .await;
    doomed.end().await;
    assert!(doomed.log().contains("failpoint relay.voids_read"), "{}", doomed.log());
    lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
    let _relay = lab.relay().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 90).await;
    eventually_number(&mut conn, "select next_offset from oncebox.inbox_stream", 101).await;
    assert_eq!(effects(&mut conn).await["order.x#0"], (1..=100).filter(|n| n % 10 != 5).collect::<Vec<i64>>());
    eventually_number(&mut lab.connect().await, "select count(*) from oncebox.outbox_void", 0).await;
}

/// Goal: a consumer that is bound late, and one that binds another pattern late, waits for nothing from before, begins
/// at once and misses nothing published after, though messages come all the time.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_bound_late_begins_at_once() {
    let lab = Lab::shared().await;
    let _tap = Tap::on(&lab).await;
    let mut relay = lab.relay().await;
    lab.sql("select oncebox.publish('bill.1', jsonb_build_object('n', i)) from generate_series(1, 50) as i").await;
    publish(&lab, 1, 500, 2).await;
    let (config, mut conn) = apart(&lab).await;
    let url = lab.database_url.clone();
    let all_the_time = tokio::spawn(async move {
        let mut app = connect(&url).await;
        for i in 501..1_500 {
            sqlx::query("select oncebox.publish('order.' || $1 % 2, jsonb_build_object('n', $1))")
                .bind(i)
                .execute(&mut app)
                .await
                .expect("publishes");
        }
    });
    let mut consumer = lab.consume(&lab.config(&config)).await;
    let bound: i64 = lab.number("select count(*) from oncebox.outbox where topic like 'order.%'").await;
    relay.kill9();
    relay = lab.relay().await;
    all_the_time.await.expect("no panic");
    publish(&lab, 1_500, 100, 2).await;
    for number in [bound + 1, 1_599] {
        eventually_number(&mut conn, &format!("select count(*) from shop.effect where number = {number}"), 1).await;
    }
    let missing = format!(
        "select count(*) from generate_series({bound} + 1, 1599) as sent where not exists (select from shop.effect where number = sent)"
    );
    eventually_number(&mut conn, &missing, 0).await;
    for (stream, places) in effects(&mut conn).await {
        assert!(places.windows(2).all(|pair| pair[1] == pair[0] + 1), "{stream}: {places:?}");
    }
    assert_eq!(number_of(&mut conn, "oncebox.inbox_gap").await, 0);

    assert!(consumer.stop().await.0.success());
    let more = lab.config(&config.replace("[\"order.#\"]", "[\"order.#\", \"bill.*\"]"));
    let _consumer = lab.consume(&more).await;
    lab.sql("select oncebox.publish('bill.1', '{\"n\": 51}'), oncebox.publish('bill.2', '{\"n\": 1}')").await;
    publish(&lab, 1_600, 2, 2).await;
    eventually_number(&mut conn, "select count(*) from shop.effect where number in (1600, 1601)", 2).await;
    eventually_number(&mut conn, "select count(*) from shop.effect where stream like 'bill.%'", 2).await;
    assert_eq!(effects(&mut conn).await["bill.1#0"], [51]);
    drop(relay);
}

/// Goal: the counters that streams begin by are the relay's own: after windows, take-overs and rows that rolled back, the
/// next message of each stream gets exactly the offset they say.
#[tokio::test]
async fn counters_say_the_next_offset() {
    let lab = Lab::shared().await;
    lab.sql("update oncebox.setting set lanes = 3").await;
    let tap = Tap::on(&lab).await;
    let mut count = 0;
    for round in 0..4 {
        let mut relay = lab.relay().await;
        for _ in 0..3 {
            publish(&lab, count + 1, 40, 4).await;
            lab.sql("begin; select oncebox.publish('order.1', '0', key => 'k1'); rollback").await;
            count += 40;
            // The newest window, and nothing beyond it: else the counters are of an earlier moment.
            let planned = "select count(*) from oncebox.outbox as o join (
                    select distinct on (lane) lane, s2 from oncebox.outbox_plan order by lane, n desc) as p using (lane)
                where not pg_visible_in_snapshot(o.xid, p.s2)";
            eventually_number(&mut lab.connect().await, planned, 0).await;
        }
        if round % 2 == 0 {
            relay.kill9();
            lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
        } else {
            relay.stop().await;
        }
        let wire = tap_offsets(&tap, if round == 0 { 120 } else { 1 }).await;
        let said: BTreeMap<String, i64> = sqlx::query_as("select stream, next_offset from oncebox.outbox_counters()")
            .fetch_all(&mut lab.connect().await)
            .await
            .expect("counters")
            .into_iter()
            .collect();
        assert_eq!(said.values().map(|next| next - 1).sum::<i64>(), count, "{said:?}");
        for (stream, top) in wire {
            assert!(said[&stream] > top, "{stream}: {} after {top}", said[&stream]);
        }
    }
}

/// The highest offset of each stream that came.
async fn tap_offsets(tap: &Tap, distinct: usize) -> BTreeMap<String, i64> {
    let mut top = BTreeMap::new();
    for delivery in tap.read(distinct).await.deliveries {
        let at = delivery.position().expect("ours");
        let highest: &mut i64 = top.entry(at.stream).or_default();
        *highest = at.offset.max(*highest);
    }
    top
}

/// Goal: a stream of which a message is missing waits, visibly, and the others go on; sent again by hand, or declared
/// void by an operator, the stream goes on.
#[tokio::test]
async fn a_missing_message_is_waited_for() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let config = lab.config(CONFIG);
    bind(&lab, &config).await;
    let tap = Tap::bound(&lab, "tap", &["order.#"]).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 60, 2).await;
    let wire = tap.read(60).await;
    // The first five of the queue are gone for good: three of one stream, two of the other.
    let queue = QueueSpec {
        name: "shop".to_owned(),
        exchange: "oncebox".to_owned(),
        bindings: Vec::new(),
        single_active_consumer: true,
        voids: false,
    };
    let mut thief = broker(&lab).subscribe(&queue, 5).await.expect("subscribes");
    let mut lost = Vec::new();
    for _ in 0..5 {
        let gone = thief.next().await.expect("a delivery");
        lost.push(gone.message_id.expect("its id"));
        thief.ack(gone.tag).await.expect("acknowledges");
    }
    thief.close().await;
    let mut consumer = lab.consume(&config).await;
    let mut conn = lab.connect().await;
    let gaps = "select count(*) from oncebox.inbox_gap where missing_offset = 1 and waiting in (27, 28)";
    eventually_number(&mut conn, gaps, 2).await;
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held where reason = 'gap'").await, 55);
    publish(&lab, 61, 10, 1).await;
    lab.sql("select oncebox.publish('order.other', '{\"n\": 1}') from generate_series(1, 3)").await;
    eventually_number(&mut conn, "select count(*) from shop.effect where stream = 'order.other#0'", 3).await;
    assert_eq!(lab.number("select count(*) from shop.effect").await, 3);
    consumer.kill9();
    consumer = lab.consume(&config).await;

    let (again, void): (Vec<&Delivery>, Vec<&Delivery>) = wire
        .deliveries
        .iter()
        .filter(|delivery| delivery.message_id.as_ref().is_some_and(|id| lost.contains(id)))
        .rev()
        .partition(|delivery| delivery.topic == "order.1");
    resend(&lab, again.iter().copied()).await;
    eventually_number(&mut conn, "select count(*) from shop.effect where stream = 'order.1#0'", 30).await;
    assert_eq!(lab.number("select count(*) from oncebox.inbox_gap").await, 1);
    for delivery in &void {
        let at = delivery.position().expect("ours");
        lab.sql(&format!(
            "select oncebox.inbox_void_stream('shop', '{}', '{}', {}, 'lost')",
            at.source, at.stream, at.offset
        ))
        .await;
    }
    eventually_number(&mut conn, "select count(*) from shop.effect", 3 + 30 + 40 - void.len() as i64).await;
    let effects = effects(&mut conn).await;
    assert_eq!(effects["order.1#0"], (1..=30).collect::<Vec<i64>>());
    assert_eq!(effects["order.0#0"], (1 + void.len() as i64..=40).collect::<Vec<i64>>());
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held").await, 0);
    drop(consumer);
}

/// Goal: one message id published several times, in one stream and in two, is one effect at its first place, and holds
/// up neither stream, in whatever order the copies come and while the first of them fails.
#[tokio::test]
async fn a_message_published_twice_holds_up_no_stream() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let config = lab.config(&CONFIG.replace("max_attempts = 4", "max_attempts = 100000"));
    bind(&lab, &config).await;
    let tap = Tap::bound(&lab, "tap", &["order.#"]).await;
    let _relay = lab.relay().await;
    let (once, gated) = (Uuid::now_v7(), Uuid::now_v7());
    for i in 1..=8 {
        let id = if i % 3 == 2 { once } else { Uuid::now_v7() };
        lab.sql(&format!("select oncebox.publish('order.a', '{{\"n\": {i}}}', message_id => '{id}')")).await;
    }
    for topic in ["order.b", "order.c", "order.b"] {
        lab.sql(&format!(
            "select oncebox.publish('{topic}', '{{\"n\": 1, \"gate\": \"g\"}}', message_id => '{gated}')"
        ))
        .await;
        lab.sql(&format!("select oncebox.publish('{topic}', '{{\"n\": 2}}')")).await;
    }
    let wire = tap.read(14).await;
    let (_connection, channel) = channel(&lab).await;
    channel.queue_purge("shop".into(), QueuePurgeOptions::default()).await.expect("purges");
    resend(&lab, wire.deliveries.iter().rev()).await;
    let _consumer = lab.consume(&config).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect where stream = 'order.a#0'", 6).await;
    assert_eq!(effects(&mut conn).await["order.a#0"], [1, 2, 3, 4, 6, 7]);
    eventually_empty(&lab).await;
    lab.sql("insert into shop.gate values ('g')").await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 10).await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held", 0).await;
    assert_eq!(lab.number("select count(*) from oncebox.inbox_void").await, 0);
    assert_eq!(lab.number(&format!("select count(*) from shop.effect where message_id = '{gated}'")).await, 1);
    let next = "select count(*) from oncebox.inbox_stream where (stream, next_offset) in (('order.a#0', 9), ('order.b#0', 5), ('order.c#0', 3))";
    assert_eq!(lab.number(next).await, 3);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_alias").await, 4);
}

/// Goal: a role with a consumer's rights runs a consumer in stream order, starts and voids among it.
#[tokio::test]
async fn a_consumer_role_applies_streams() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let role = unique("login");
    lab.sql(&format!(
        "create role {role} login in role oncebox_consumer; grant usage on schema shop to {role};
        grant all on all tables in schema shop to {role}; grant all on all sequences in schema shop to {role}"
    ))
    .await;
    let config = lab.config(CONFIG);
    let mut command = lab.command(&["consume", "--config", &config]);
    command.env("ONCEBOX_DATABASE_URL", lab.database_url.replace("oncebox@", &format!("{role}@")));
    let mut consumer = Process::spawn(command);
    consumer.wait_for_log("consuming").await;
    let _relay = lab.relay().await;
    lab.sql(
        "select oncebox.publish('order.x', jsonb_build_object('n', i) || case when i = 7 then '{\"poison\": 1}' else '{}' end::jsonb,
            expires_at => case when i = 5 then clock_timestamp() end)
        from generate_series(1, 10) as i",
    )
    .await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 8).await;
    assert_eq!(effects(&mut conn).await["order.x#0"], [1, 2, 3, 4, 6, 8, 9, 10]);
    assert!(consumer.stop().await.0.success());
    assert!(!consumer.log().contains("permission denied"), "{}", consumer.log());
}

/// Goal: a stream whose very first message is parked goes on.
#[tokio::test]
async fn a_stream_whose_first_message_is_parked_goes_on() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let _consumer = lab.consume(&lab.config(CONFIG)).await;
    let _relay = lab.relay().await;
    let mut conn = lab.connect().await;
    lab.sql("select oncebox.publish('order.1', '{\"n\": 0, \"poison\": \"p\"}')").await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held where state = 'parked'", 1).await;
    publish(&lab, 1, 6, 2).await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 6).await;
}

/// Goal: a replay mends a stream whose queue was lost, though a message of it has expired since: that one is announced.
#[tokio::test]
async fn a_replay_mends_a_stream_with_an_expired_message() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let config = lab.config(CONFIG);
    let mut consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    let mut conn = lab.connect().await;
    lab.sql("select oncebox.publish('order.1', '{\"n\": 1}')").await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 1).await;
    assert!(consumer.stop().await.0.success());
    lab.sql(
        "select oncebox.publish('order.1', '{\"n\": 2}', expires_at => clock_timestamp() + interval '2 s');
        select oncebox.publish('order.1', '{\"n\": 3}')",
    )
    .await;
    let settled = "select count(*) from oncebox.outbox_settled() as s where s.n > s.newest_n or s.seq >= 3";
    eventually_number(&mut conn, settled, 1).await;
    let url = lab.amqp_url.clone();
    let connection = lapin::Connection::connect(&url, Default::default()).await.expect("connects");
    let channel = connection.create_channel().await.expect("a channel");
    channel.queue_purge("shop".into(), QueuePurgeOptions::default()).await.expect("purges");
    let expired = "select count(*) from oncebox.outbox where expires_at < clock_timestamp()";
    eventually_number(&mut conn, expired, 1).await;
    let _consumer = lab.consume(&config).await;
    lab.sql("select oncebox.publish('order.1', '{\"n\": 4}')").await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_gap", 1).await;
    let replay = lab.command(&["replay", "--since", "1h"]).output().expect("runs");
    assert!(replay.status.success(), "{replay:?}");
    eventually_number(&mut conn, "select count(*) from shop.effect", 3).await;
    assert_eq!(effects(&mut conn).await["order.1#0"], [1, 3, 4]);
}
