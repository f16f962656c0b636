//! Goal: each message's effect happens exactly once and in the order of its key, through killed processes, copies on
//! the wire, failing handlers and absent servers; what cannot be applied is parked by name.

use crate::support::proxy::Proxy;
use crate::support::wire::Tap;
use crate::support::{Lab, Process, connect, eventually, eventually_number};
use oncebox::backoff::Backoff;
use oncebox::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use oncebox::broker::{Broker, Publisher, QueueSpec, Subscription};
use oncebox::consumer::{self, ConsumerError, ConsumerOptions, Order};
use oncebox::inbox::Received;
use oncebox::inbox::handler::{Handler, HandlerError, Handling};
use oncebox::message::{Envelope, Message, MessageId};
use oncebox::outbox::{self, NewMessage};
use serde_json::json;
use sqlx::PgConnection;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Effects are numbered in the order in which their transactions wrote them; nothing hides a double one. A message
/// with `poison` always fails, one with `gate` until that gate is open.
const EFFECTS: &str = "
    create schema shop;
    create table shop.effect (n bigserial primary key, message_id uuid not null, key text, payload jsonb, at timestamptz default clock_timestamp());
    create function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    begin
        if payload ? 'poison' then
            raise exception 'poison %', payload ->> 'poison';
        end if;
        if payload ? 'gate' and not exists (select from shop.gate where name = payload ->> 'gate') then
            raise exception 'gate % is closed', payload ->> 'gate';
        end if;
        insert into shop.effect (message_id, key, payload) values (message_id, headers ->> 'oncebox-key', payload);
    end
    $$;
    create table shop.gate (name text primary key);";

const CONFIG: &str = r#"
drain_deadline = "5s"
[[consumer]]
name = "shop"
bindings = ["order.#"]
handler = { sql = "shop.on_message" }
backoff_initial = "50ms"
backoff_cap = "200ms"
max_attempts = 4
"#;

async fn shop(lab: &Lab) {
    lab.sql(EFFECTS).await;
}

/// Effects, in order, a key: the numbers of their payloads.
async fn effects(lab: &Lab) -> HashMap<String, Vec<i64>> {
    let rows: Vec<(Option<String>, i64)> =
        sqlx::query_as("select key, (payload ->> 'n')::bigint from shop.effect order by n")
            .fetch_all(&mut connect(&lab.database_url).await)
            .await
            .expect("reads");
    let mut effects: HashMap<String, Vec<i64>> = HashMap::new();
    for (key, n) in rows {
        effects.entry(key.unwrap_or_default()).or_default().push(n);
    }
    effects
}

/// Publishes `count` messages over `keys` keys, numbered from `from`.
async fn publish(lab: &Lab, from: i64, count: i64, keys: i64) {
    lab.sql(&format!(
        "select oncebox.publish('order.placed', jsonb_build_object('n', i), key => 'k' || i % {keys})
        from generate_series({from}, {}) as i",
        from + count - 1
    ))
    .await;
}

/// Every number once, and in order within its key.
fn assert_in_order(effects: &HashMap<String, Vec<i64>>, count: i64, keys: i64) {
    for key in 0..keys {
        let expected: Vec<i64> = (1..=count).filter(|n| n % keys == key).collect();
        assert_eq!(effects.get(&format!("k{key}")), Some(&expected), "the effects of key k{key}");
    }
}

/// Goal: relay and consumers killed -9 again and again, and every message sent to the queue once more by hand: each
/// effect happens once, in the order of its key.
#[tokio::test(flavor = "multi_thread")]
async fn effects_happen_once_and_in_order_through_kills_and_copies() {
    let lab = Lab::shared().await;
    shop(&lab).await;
    let config = lab.config(CONFIG);
    let mut consumers = [lab.consume(&config).await, lab.spawn(&["consume", "--config", &config])];
    let mut relay = lab.relay().await;
    let tap = Tap::bound(&lab, "tap", &["order.#"]).await;
    let (count, keys) = (6_000, 23);
    for round in 0..6 {
        publish(&lab, 1 + round * count / 6, count / 6, keys).await;
        tokio::time::sleep(Duration::from_millis(150 + 60 * round as u64)).await;
        let consumer = &mut consumers[round as usize % 2];
        consumer.kill9();
        *consumer = lab.spawn(&["consume", "--config", &config]);
        if round % 2 == 1 {
            relay.kill9();
            relay = lab.spawn(&["relay"]);
            lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
        }
    }
    // Copies of everything, as a resend after a lost confirm would make them.
    let wire = tap.read(count as usize).await;
    let mut publisher = broker(&lab).publisher("oncebox").await.expect("a session");
    let mut outcomes = Vec::new();
    for (ticket, delivery) in (0..).zip(&wire.deliveries) {
        let message = Message {
            id: MessageId(delivery.message_id.as_deref().and_then(|id| id.parse().ok()).expect("a uuid")),
            topic: delivery.topic.clone(),
            key: delivery.key().map(str::to_owned),
            content_type: "application/json".to_owned(),
            headers: Default::default(),
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
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", count).await;
    eventually("the queue is empty", async || {
        let list = ["list_queues", "-p", &lab.name, "--quiet", "--no-table-headers", "name", "messages"];
        let listing = lab.rabbit.ctl(&list).await.expect("rabbitmqctl answers");
        listing.lines().any(|line| line.trim() == "shop\t0").then_some(())
    })
    .await;
    assert_eq!(lab.number("select count(*) from shop.effect").await, count);
    assert_in_order(&effects(&lab).await, count, keys);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held").await, 0);
}

fn broker(lab: &Lab) -> RabbitMq {
    RabbitMq::new(RabbitMqOptions::new(&lab.amqp_url)).expect("a valid URL")
}

/// Goal: a failing message holds up its own key only; once it succeeds, its key goes on in order, even if the
/// consumer was killed and copies came meanwhile; one that fails too often is parked and releases its key.
#[tokio::test]
async fn failures_hold_up_their_own_key_only() {
    let lab = Lab::shared().await;
    shop(&lab).await;
    // As many attempts as the gate needs to open.
    let config = lab.config(&CONFIG.replace("max_attempts = 4", "max_attempts = 100000"));
    let mut consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    let mut conn = lab.connect().await;
    lab.sql("select oncebox.publish('order.placed', jsonb_build_object('n', 0, 'gate', 'g'), key => 'k1')").await;
    publish(&lab, 1, 200, 4).await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 150).await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held where state = 'waiting'", 51).await;
    consumer.kill9();
    let _consumer = lab.consume(&config).await;
    lab.sql("insert into shop.gate values ('g')").await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 201).await;
    let effects = effects(&lab).await;
    let expected: Vec<i64> = std::iter::once(0).chain((1..=200).filter(|n| n % 4 == 1)).collect();
    assert_eq!(effects["k1"], expected);
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held", 0).await;
}

/// Goal: a message that fails `max_attempts` times is parked with its error and attempts, and its key goes on; a
/// copy of it that comes later is not applied behind the operator's back.
#[tokio::test]
async fn a_message_that_always_fails_is_parked() {
    let lab = Lab::shared().await;
    shop(&lab).await;
    let config = lab.config(CONFIG);
    let _consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    let id = Uuid::now_v7();
    let poison = format!(
        "select oncebox.publish('order.placed', '{{\"n\": 0, \"poison\": \"p\"}}', key => 'k1', message_id => '{id}')"
    );
    lab.sql(&poison).await;
    publish(&lab, 1, 20, 2).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 20).await;
    let parked: (Uuid, String, String, i32) = sqlx::query_as(
        "select message_id, reason, last_error, attempts from oncebox.inbox_held where state = 'parked'",
    )
    .fetch_one(&mut conn)
    .await
    .expect("one parked delivery");
    assert_eq!((parked.0, parked.1.as_str(), parked.3), (id, "too_many_attempts", 4));
    assert!(parked.2.contains("poison p"), "{}", parked.2);
    assert_in_order(&effects(&lab).await, 20, 2);
    // Now it could succeed: but it is the operator's to say so.
    lab.sql("create or replace function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language sql as $$ insert into shop.effect (message_id, key, payload) values ($1, $4 ->> 'oncebox-key', $3) $$")
    .await;
    lab.sql(&poison).await;
    publish(&lab, 21, 2, 2).await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 22).await;
    assert_eq!(lab.number(&format!("select count(*) from shop.effect where message_id = '{id}'")).await, 0);
    lab.sql("update oncebox.inbox_held set state = 'waiting', next_at = now()").await;
    eventually_number(&mut conn, &format!("select count(*) from shop.effect where message_id = '{id}'"), 1).await;
}

/// Goal: the attempts of a failing handler do not count while the database is away, and nothing is lost or doubled
/// when it dies in the middle of the work, the broker too.
#[tokio::test(flavor = "multi_thread")]
async fn absent_servers_cost_no_attempts() {
    let mut lab = Lab::own().await;
    shop(&lab).await;
    let config = lab.config(&CONFIG.replace("max_attempts = 4", "max_attempts = 1"));
    let _consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    let (count, keys) = (3_000, 7);
    // RabbitMQ 3.10 does not start a quorum queue again that was declared in the last moments before a kill -9.
    tokio::time::sleep(Duration::from_secs(5)).await;
    for round in 0..4 {
        publish(&lab, 1 + round * count / 4, count / 4, keys).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        if round % 2 == 0 {
            lab.postgres.kill9();
            lab.postgres.restart().await.expect("Postgres restarts");
        } else {
            lab.rabbit.kill9();
            lab.rabbit.restart().await.expect("RabbitMQ restarts");
        }
    }
    eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", count).await;
    assert_in_order(&effects(&lab).await, count, keys);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held").await, 0);
}

/// Goal: without order, several processes share a queue and each effect still happens once.
#[tokio::test]
async fn without_order_processes_share_a_queue() {
    let lab = Lab::shared().await;
    shop(&lab).await;
    let config = lab.config(&format!("{CONFIG}order = \"none\"\n"));
    let _consumers = [lab.consume(&config).await, lab.consume(&config).await];
    let _relay = lab.relay().await;
    publish(&lab, 1, 1_000, 3).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 1_000).await;
    assert_eq!(lab.number("select count(distinct message_id) from shop.effect").await, 1_000);
}

/// Goal: messages of other producers: a text id is deduplicated as such, no id at all is parked, and so is a payload
/// that is no JSON.
#[tokio::test]
async fn foreign_messages_are_deduplicated_or_parked() {
    let lab = Lab::shared().await;
    shop(&lab).await;
    let config = lab.config(CONFIG);
    let _consumer = lab.consume(&config).await;
    let connection = lapin::Connection::connect(&lab.amqp_url, Default::default()).await.expect("connects");
    let channel = connection.create_channel().await.expect("a channel");
    let send = async |id: Option<&str>, body: &[u8]| {
        let properties = match id {
            Some(id) => lapin::BasicProperties::default().with_message_id(id.into()),
            None => lapin::BasicProperties::default(),
        };
        let options = lapin::options::BasicPublishOptions::default();
        channel
            .basic_publish("oncebox".into(), "order.foreign".into(), options, body, properties)
            .await
            .expect("sends");
    };
    for _ in 0..3 {
        send(Some("invoice-17"), br#"{"n": 1}"#).await;
    }
    send(Some("invoice-18"), b"no json").await;
    send(None, br#"{"n": 2}"#).await;
    send(Some("invoice-19"), br#"{"n": 3}"#).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect where payload ->> 'n' = '3'", 1).await;
    assert_eq!(lab.number("select count(*) from shop.effect").await, 2);
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held where state = 'parked'", 2).await;
    let reasons: Vec<String> = sqlx::query_scalar("select reason from oncebox.inbox_held order by reason")
        .fetch_all(&mut conn)
        .await
        .expect("reads");
    assert_eq!(reasons, ["no_message_id", "rejected"]);
}

/// Goal: after SIGTERM a consumer finishes what it has begun, acknowledges it and ends with exit 0; the next process
/// goes on, and no effect is doubled.
#[tokio::test]
async fn a_stopped_consumer_finishes_what_it_began() {
    let lab = Lab::shared().await;
    shop(&lab).await;
    lab.sql("create or replace function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language sql as $$ select pg_sleep(0.05); insert into shop.effect (message_id, key, payload) values ($1, $4 ->> 'oncebox-key', $3) $$")
    .await;
    let config = lab.config(CONFIG);
    let mut consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 200, 10).await;
    eventually("some effects", async || (lab.number("select count(*) from shop.effect").await > 10).then_some(()))
        .await;
    let (status, took) = consumer.stop().await;
    assert!(status.success() && took < Duration::from_secs(5), "{status} after {took:?}");
    let done = lab.number("select count(*) from shop.effect").await;
    assert!(done < 200, "it did not stop in the middle");
    let _consumer = lab.consume(&config).await;
    eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", 200).await;
    assert_in_order(&effects(&lab).await, 200, 10);
}

/// Goal: a handler that runs too long counts as failed, and holds up only its own key.
#[tokio::test]
async fn a_handler_that_runs_too_long_has_failed() {
    let lab = Lab::shared().await;
    shop(&lab).await;
    lab.sql("create or replace function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language plpgsql as $$ begin
            if payload ? 'slow' then perform pg_sleep(60); end if;
            insert into shop.effect (message_id, key, payload) values (message_id, headers ->> 'oncebox-key', payload);
        end $$")
    .await;
    let config =
        lab.config(&format!("{}handler_timeout = \"300ms\"\n", CONFIG.replace("max_attempts = 4", "max_attempts = 2")));
    let _consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    lab.sql("select oncebox.publish('order.placed', '{\"n\": 0, \"slow\": 1}', key => 'k0')").await;
    publish(&lab, 1, 20, 2).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 20).await;
    eventually_number(
        &mut conn,
        "select count(*) from oncebox.inbox_held where reason = 'too_many_attempts' and attempts = 2",
        1,
    )
    .await;
}

/// A consumer in this process, with a handler given as a function.
struct InProcess {
    stop: CancellationToken,
    running: tokio::task::JoinHandle<Result<(), ConsumerError>>,
}

impl InProcess {
    async fn start(lab: &Lab, handler: impl Handler, change: impl FnOnce(&mut ConsumerOptions)) -> Self {
        let mut options = ConsumerOptions {
            name: "shop".to_owned(),
            database_url: lab.database_url.clone(),
            outbox_url: Some(lab.database_url.clone()),
            queue: "shop".to_owned(),
            exchange: "oncebox".to_owned(),
            bindings: vec!["order.*".to_owned()],
            concurrency: 2,
            batch: 1,
            max_attempts: 5,
            order: Order::Key,
            backoff: Backoff { initial: Duration::from_millis(20), cap: Duration::from_millis(50) },
            handler_timeout: Duration::from_secs(10),
            drain_deadline: Duration::from_secs(5),
        };
        change(&mut options);
        let stop = CancellationToken::new();
        let running = consumer::run(Arc::new(broker(lab)), Arc::new(handler), options, stop.clone());
        let running = tokio::spawn(running);
        eventually("the queue is there", async || {
            let list = ["list_queues", "-p", &lab.name, "--quiet", "--no-table-headers", "name"];
            lab.rabbit.ctl(&list).await.expect("rabbitmqctl answers").lines().any(|name| name == "shop").then_some(())
        })
        .await;
        Self { stop, running }
    }

    async fn stop(self) -> Duration {
        let began = Instant::now();
        self.stop.cancel();
        self.running.await.expect("no panic").expect("it ends in order");
        began.elapsed()
    }
}

async fn insert(conn: &mut PgConnection, message: &Received) -> Result<(), HandlerError> {
    let n: i64 =
        serde_json::from_slice::<serde_json::Value>(&message.body).ok().and_then(|p| p["n"].as_i64()).unwrap_or(0);
    sqlx::query(
        "insert into shop.effect (message_id, key, payload) values ($1, $2, jsonb_build_object('n', $3::bigint))",
    )
    .bind(message.id.0)
    .bind(&message.key)
    .bind(n)
    .execute(conn)
    .await?;
    Ok(())
}

/// Goal: a Rust handler's rows and its outbox rows are one transaction with the acceptance.
#[tokio::test]
async fn a_rust_handler_writes_in_the_transaction_of_accept() {
    struct Ship {
        failures: AtomicU32,
    }
    impl Handler for Ship {
        fn handle<'a>(&'a self, conn: &'a mut PgConnection, message: &'a Received) -> Handling<'a> {
            Box::pin(async move {
                insert(conn, message).await?;
                let shipped = NewMessage::json("shipped", json!({"of": message.id})).key("k");
                outbox::publish(conn, shipped).await.map_err(|error| HandlerError::Failed(error.to_string()))?;
                if self.failures.fetch_add(1, Ordering::SeqCst) < 2 {
                    return Err(HandlerError::Failed("not yet".to_owned()));
                }
                Ok(())
            })
        }
    }

    let lab = Lab::shared().await;
    shop(&lab).await;
    let running = InProcess::start(&lab, Ship { failures: AtomicU32::new(0) }, |_| {}).await;
    let tap = Tap::bound(&lab, "shipped", &["shipped"]).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 1, 1).await;
    let wire = tap.read(1).await;
    assert_eq!(wire.deliveries.len(), 1, "a rolled-back attempt published");
    assert_eq!(lab.number("select count(*) from shop.effect").await, 1);
    running.stop().await;
}

/// Goal: a handler that passes over a failed statement, ends its transaction, panics or hangs has failed: nothing is
/// acknowledged as done that was not, and the others' work goes on.
#[tokio::test(flavor = "multi_thread")]
async fn handlers_that_misbehave_have_failed() {
    struct Careless;
    impl Handler for Careless {
        fn handle<'a>(&'a self, conn: &'a mut PgConnection, message: &'a Received) -> Handling<'a> {
            Box::pin(async move {
                insert(conn, message).await?;
                match message.key.as_deref() {
                    Some("k0") => drop(sqlx::query("select 1 / 0").execute(conn).await),
                    Some("k1") => drop(sqlx::query("rollback").execute(conn).await),
                    Some("k2") => panic!("a careless handler"),
                    Some("k3") => std::future::pending().await,
                    _ => {}
                }
                Ok(())
            })
        }
    }

    let lab = Lab::shared().await;
    shop(&lab).await;
    let running = InProcess::start(&lab, Careless, |options| {
        options.max_attempts = 2;
        options.handler_timeout = Duration::from_millis(200);
    })
    .await;
    let _relay = lab.relay().await;
    publish(&lab, 0, 60, 6).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 20).await;
    eventually("the first of each bad key is parked", async || {
        (lab.number("select count(distinct key) from oncebox.inbox_held where state = 'parked'").await == 4)
            .then_some(())
    })
    .await;
    let errors: Vec<String> = sqlx::query_scalar(
        "select distinct on (key) last_error from oncebox.inbox_held where state = 'parked' order by key, n",
    )
    .fetch_all(&mut conn)
    .await
    .expect("reads");
    for (error, part) in
        errors.iter().zip(["a statement failed", "ended the transaction", "panicked: a careless handler", "ran longer"])
    {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
    assert_eq!(lab.number("select count(*) from shop.effect where key in ('k0', 'k1', 'k2', 'k3')").await, 0);
    running.stop().await;
}

/// Goal: a handler that does not end holds the process up no longer than the drain deadline; its work is rolled back
/// and done by the next.
#[tokio::test]
async fn the_drain_deadline_holds() {
    struct Endless;
    impl Handler for Endless {
        fn handle<'a>(&'a self, conn: &'a mut PgConnection, message: &'a Received) -> Handling<'a> {
            Box::pin(async move {
                insert(conn, message).await?;
                sqlx::query("select pg_sleep(8)").execute(conn).await?;
                Ok(())
            })
        }
    }

    let lab = Lab::shared().await;
    shop(&lab).await;
    let running = InProcess::start(&lab, Endless, |options| options.drain_deadline = Duration::from_secs(1)).await;
    let _relay = lab.relay().await;
    publish(&lab, 1, 1, 1).await;
    eventually("the handler runs", async || {
        (lab.number("select count(*) from pg_stat_activity where query like 'select pg_sleep(8)%'").await > 0)
            .then_some(())
    })
    .await;
    let took = running.stop().await;
    assert!(took < Duration::from_secs(4), "it took {took:?}");
    assert_eq!(lab.number("select count(*) from shop.effect").await, 0);
    let _consumer = lab.consume(&lab.config(CONFIG)).await;
    eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", 1).await;
}

/// Goal: a zombie of the same consumer, frozen in the middle of a transaction, neither blocks its successor for long
/// nor doubles or reorders effects when it wakes.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_consumer_is_replaced() {
    let lab = Lab::shared().await;
    shop(&lab).await;
    let config = lab.config(CONFIG);
    let frozen = lab.consume(&config).await;
    let _relay = lab.relay().await;
    let (count, keys) = (2_000, 5);
    publish(&lab, 1, count / 2, keys).await;
    eventually("some effects", async || (lab.number("select count(*) from shop.effect").await > 50).then_some(()))
        .await;
    frozen.signal("STOP");
    let _successor = lab.spawn(&["consume", "--config", &config]);
    // The broker gives a silent consumer up after its heartbeat; closing its connection is what that does.
    let close = ["close_all_connections", "--vhost", &lab.name, "frozen"];
    lab.rabbit.ctl(&close).await.expect("rabbitmqctl answers");
    publish(&lab, 1 + count / 2, count / 2, keys).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    frozen.signal("CONT");
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", count).await;
    assert_in_order(&effects(&lab).await, count, keys);
}

/// Goal: after two sessions that died with messages in hand, the broker hands them back out of order; their effects are
/// in order all the same.
#[tokio::test]
async fn returned_messages_are_put_in_order() {
    let lab = Lab::shared().await;
    shop(&lab).await;
    // The queue as the consumer declares it.
    let queue = QueueSpec {
        name: "shop".to_owned(),
        exchange: "oncebox".to_owned(),
        bindings: vec!["order.#".to_owned()],
        single_active_consumer: true,
        voids: false,
    };
    let broker = broker(&lab);
    let mut first = broker.subscribe(&queue, 4).await.expect("subscribes");
    let _relay = lab.relay().await;
    publish(&lab, 1, 6, 1).await;
    let mut came = Vec::new();
    for _ in 0..4 {
        came.push(first.next().await.expect("a delivery"));
    }
    drop(first);
    let mut second = broker.subscribe(&queue, 1).await.expect("subscribes");
    second.next().await.expect("a delivery");
    drop(second);
    // How the next session would get them: if this is in order, the test shows nothing.
    let mut third = broker.subscribe(&queue, 1).await.expect("subscribes");
    let head = third.next().await.expect("a delivery");
    assert_ne!(head.message_id, came[0].message_id, "the broker has kept the order");
    drop(third);
    let _consumer = lab.consume(&lab.config(CONFIG)).await;
    eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", 6).await;
    assert_in_order(&effects(&lab).await, 6, 1);
}

/// Goal: with the network cut again and again, between any two bytes and in the middle of any commit, each effect
/// happens once, in the order of its key.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_network_loses_doubles_and_reorders_nothing() {
    let lab = Lab::shared().await;
    shop(&lab).await;
    let (database, broker) = (Proxy::to(lab.postgres.port()).await, Proxy::to(lab.rabbit.port()).await);
    let through = |args: &[&str]| {
        let mut command = lab.command(args);
        command
            .env("ONCEBOX_DATABASE_URL", database.instead_of(&lab.database_url, lab.postgres.port()))
            .env("ONCEBOX_AMQP_URL", broker.instead_of(&lab.amqp_url, lab.rabbit.port()));
        Process::spawn(command)
    };
    let config = lab.config(CONFIG);
    let consumer = through(&["consume", "--config", &config]);
    consumer.wait_for_log("consuming").await;
    let relay = through(&["relay"]);
    let (count, keys) = (4_000, 11);
    for round in 0..10 {
        publish(&lab, 1 + round * count / 10, count / 10, keys).await;
        tokio::time::sleep(Duration::from_millis(150 + 40 * round as u64)).await;
        if round % 3 != 1 {
            database.cut();
        }
        if round % 3 != 0 {
            broker.cut();
        }
    }
    eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", count).await;
    assert_in_order(&effects(&lab).await, count, keys);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held").await, 0);
    assert!(relay.log().contains("begins anew"), "no cut was noticed: the test shows nothing");
}
