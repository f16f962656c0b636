//! Goal: the audit finds what is lost and what is doubled, by name, and nothing else, whatever was killed, held, parked
//! or bound late.

use crate::support::wire::Tap;
use crate::support::{Lab, connect, eventually, eventually_number, storm};
use oncebox::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use oncebox::broker::{Broker, QueueSpec, Subscription};
use serde_json::Value;
use std::process::Command;

const EFFECTS: &str = "
    create schema shop;
    create table shop.effect (message_id uuid not null, topic text not null, payload jsonb);
    create function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    begin
        if payload ? 'poison' then
            raise exception 'poison';
        end if;
        insert into shop.effect values (message_id, topic, payload);
    end $$;";

const CONFIG: &str = r##"
[[consumer]]
name = "shop"
bindings = ["#"]
handler = { sql = "shop.on_message" }
max_attempts = 2
backoff_initial = "20ms"
backoff_cap = "50ms"
"##;

/// What `oncebox audit --json` says, and whether it was content.
fn audit(lab: &Lab, args: &[&str]) -> (Value, bool) {
    let mut command: Command = lab.command(&["audit", "--json", "--grace", "1s"]);
    let output = command.args(args).output().expect("the program starts");
    let text = String::from_utf8(output.stdout).unwrap();
    let report = serde_json::from_str(&text);
    let report = report.unwrap_or_else(|error| panic!("{error}: {text} {}", String::from_utf8_lossy(&output.stderr)));
    assert!(matches!(output.status.code(), Some(0 | 1)), "{:?}", output.status);
    (report, output.status.success())
}

/// One figure of a consumer, summed over its streams.
fn sum(report: &Value, consumer: &str, figure: &str) -> i64 {
    let streams = report["consumers"].as_array().unwrap().iter().filter(|entry| entry["consumer"] == consumer);
    streams.map(|entry| count(&entry[figure])).sum()
}

/// A number, or how many offsets a list of ranges holds.
fn count(figure: &Value) -> i64 {
    match figure.as_array() {
        Some(ranges) => ranges.iter().map(|range| range[1].as_i64().unwrap() - range[0].as_i64().unwrap() + 1).sum(),
        None => figure.as_i64().unwrap(),
    }
}

async fn publish(lab: &Lab, topic: &str, count: i64) {
    lab.sql(&format!(
        "select oncebox.publish('{topic}', jsonb_build_object('n', i)) from generate_series(1, {count}) as i"
    ))
    .await;
}

/// Waits until the relay has saved that everything is settled, a moment after the last confirm.
async fn settled(lab: &Lab) {
    eventually("everything is settled", async || {
        let (report, _) = audit(lab, &[]);
        let streams = report["streams"].as_array().unwrap();
        (streams.iter().all(|stream| stream["unpublished"] == 0)).then_some(())
    })
    .await;
}

async fn effects(lab: &Lab, expected: i64) {
    eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", expected).await;
}

fn broker(lab: &Lab) -> RabbitMq {
    RabbitMq::new(RabbitMqOptions::new(&lab.amqp_url)).expect("a valid URL")
}

/// The queue that `oncebox consume` declares.
fn queue(bindings: &[&str]) -> QueueSpec {
    QueueSpec {
        name: "shop".to_owned(),
        exchange: "oncebox".to_owned(),
        bindings: bindings.iter().map(|binding| binding.to_string()).collect(),
        single_active_consumer: true,
        voids: false,
    }
}

/// Goal: after a storm with a killed relay and a killed consumer every message is accounted for, and nothing is said to
/// be missing or doubled while work is under way.
#[tokio::test(flavor = "multi_thread")]
async fn audit_is_clean_under_kills_and_in_the_end() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let config = lab.config(CONFIG);
    let mut consumer = lab.consume(&config).await;
    let mut relay = lab.relay().await;
    let storm = storm::Storm { writers: 4, transactions: 100, batch: 5, keys: 7 };
    storm::prepare(&lab, storm).await;
    let writing = tokio::spawn(storm::run(lab.database_url.clone(), storm));
    for _ in 0..3 {
        let (report, clean) = audit(&lab, &[]);
        assert!(clean, "{report:#}");
        relay.kill9();
        consumer.kill9();
        consumer = lab.consume(&config).await;
        relay = lab.relay().await;
    }
    writing.await.expect("the writers end");
    let committed = storm::committed(&lab).await.len() as i64;
    effects(&lab, committed).await;
    settled(&lab).await;
    let (report, clean) = audit(&lab, &[]);
    assert!(clean, "{report:#}");
    let total = |figure: &str| report["streams"].as_array().unwrap().iter().map(|s| count(&s[figure])).sum::<i64>();
    assert_eq!((total("produced"), total("published"), total("unpublished")), (committed, committed, 0), "{report:#}");
    for (figure, expected) in [("applied", committed), ("behind", 0), ("missing", 0), ("doubled", 0), ("unknown", 0)] {
        assert_eq!(sum(&report, "shop", figure), expected, "{figure}: {report:#}");
    }
}

/// Goal: a message that somebody took out of the queue is named by offset and id, a redrive brings it, and then nothing
/// is missing.
#[tokio::test(flavor = "multi_thread")]
async fn audit_names_what_is_missing_and_redrives_it() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let config = lab.config(CONFIG);
    let _relay = lab.relay().await;
    let mut consumer = lab.consume(&config).await;
    eventually_number(&mut lab.connect().await, "select count(*) from oncebox.consumer_binding", 1).await;
    publish(&lab, "order.placed", 3).await;
    effects(&lab, 3).await;
    assert!(consumer.stop().await.0.success());

    publish(&lab, "order.placed", 2).await;
    let mut subscription = broker(&lab).subscribe(&queue(&["#"]), 2).await.expect("subscribes");
    let mut lost = Vec::new();
    for _ in 0..2 {
        let delivery = subscription.next().await.expect("delivers");
        lost.push(delivery.message_id.clone().expect("an id"));
        subscription.ack(delivery.tag).await.expect("acks");
    }
    subscription.close().await;
    settled(&lab).await;
    // Nothing later was applied: they may as well be on their way.
    let (report, clean) = audit(&lab, &[]);
    assert!(clean && sum(&report, "shop", "behind") == 2, "{report:#}");

    let _consumer = lab.consume(&config).await;
    publish(&lab, "order.placed", 1).await;
    effects(&lab, 4).await;
    settled(&lab).await;
    let (report, clean) = audit(&lab, &[]);
    assert!(!clean, "{report:#}");
    assert_eq!(report["consumers"][0]["missing"], serde_json::json!([[4, 5]]), "{report:#}");
    let named: Vec<&str> =
        report["missing"].as_array().unwrap().iter().map(|m| m["message_id"].as_str().unwrap()).collect();
    assert_eq!(named, lost, "{report:#}");

    let (_, clean) = audit(&lab, &["--redrive"]);
    assert!(!clean, "what was missing is said once more");
    effects(&lab, 6).await;
    let (report, clean) = audit(&lab, &[]);
    assert!(clean && sum(&report, "shop", "applied") == 6, "{report:#}");
}

/// Goal: an offset that was applied under two ids is found, and so is one that this outbox never produced.
#[tokio::test(flavor = "multi_thread")]
async fn audit_finds_doubled_and_unknown_offsets() {
    let lab = Lab::shared().await;
    let _relay = lab.relay().await;
    let _tap = Tap::on(&lab).await;
    publish(&lab, "t", 5).await;
    settled(&lab).await;
    let accept = |offset: i64| {
        format!(
            "select oncebox.accept('own', oncebox.uuid_v7(now()), source, 't#0', {offset}) from oncebox.outbox_source"
        )
    };
    for offset in [1, 2, 3] {
        lab.sql(&accept(offset)).await;
    }
    let (report, clean) = audit(&lab, &[]);
    assert!(clean, "{report:#}");
    lab.sql(&accept(2)).await;
    let (report, clean) = audit(&lab, &[]);
    assert!(!clean, "{report:#}");
    assert_eq!(report["consumers"][0]["doubled"], serde_json::json!([[2, 2]]), "{report:#}");
    lab.sql(&accept(7)).await;
    let (report, _) = audit(&lab, &[]);
    assert_eq!(report["consumers"][0]["unknown"], serde_json::json!([[7, 7]]), "{report:#}");
}

/// Goal: a consumer in another database is audited there; without its URL its messages are behind, not missing.
#[tokio::test(flavor = "multi_thread")]
async fn audit_reads_consumers_in_other_databases() {
    let lab = Lab::shared().await;
    let other = format!("{}_other", lab.name);
    lab.postgres.create_database(&other).await.expect("a database");
    let other = lab.postgres.url(&other);
    oncebox::migrate::migrate(&other).await.expect("the migrations apply");
    let mut conn = connect(&other).await;
    sqlx::raw_sql(EFFECTS).execute(&mut conn).await.expect("the shop");
    let config =
        lab.config(&CONFIG.replace("name = \"shop\"", &format!("name = \"shop\"\ndatabase_url = \"{other}\"")));
    let _relay = lab.relay().await;
    let _consumer = lab.consume(&config).await;
    eventually_number(&mut lab.connect().await, "select count(*) from oncebox.consumer_binding", 1).await;
    publish(&lab, "t", 9).await;
    eventually_number(&mut conn, "select count(*) from shop.effect", 9).await;
    settled(&lab).await;
    let (report, clean) = audit(&lab, &[]);
    assert!(clean && sum(&report, "shop", "behind") == 9 && sum(&report, "shop", "applied") == 0, "{report:#}");
    for args in [["--consumer-database-url", &other], ["--config", &config]] {
        let (report, clean) = audit(&lab, &args);
        assert!(clean && sum(&report, "shop", "behind") == 0 && sum(&report, "shop", "applied") == 9, "{report:#}");
    }
}

/// Goal: what is parked on either side, expired or discarded is not missing, and a consumer that was bound late, or
/// whose bindings grew, owes nothing from before.
#[tokio::test(flavor = "multi_thread")]
async fn audit_knows_what_is_kept_back_and_where_a_consumer_begins() {
    let lab = Lab::shared().await;
    lab.sql(EFFECTS).await;
    let _relay = lab.relay().await;
    let tap = Tap::bound(&lab, "early", &["order.*", "bill.*"]).await;
    publish(&lab, "order.placed", 4).await;
    publish(&lab, "bill.sent", 3).await;
    eventually("the early ones are published", async || (tap.depth().await == 7).then_some(())).await;

    let config = |bindings: &str| lab.config(&CONFIG.replace("[\"#\"]", bindings));
    let mut consumer = lab.consume(&config("[\"order.*\"]")).await;
    eventually_number(&mut lab.connect().await, "select count(*) from oncebox.consumer_binding", 1).await;
    publish(&lab, "order.placed", 1).await;
    lab.sql("select oncebox.publish('order.placed', '{\"poison\": 1}')").await;
    lab.sql("select oncebox.publish('order.placed', '{}', expires_at => now() - interval '1 s')").await;
    publish(&lab, "order.placed", 1).await;
    effects(&lab, 2).await;
    eventually_number(&mut lab.connect().await, "select count(*) from oncebox.inbox_held where state = 'parked'", 1)
        .await;
    let (report, clean) = audit(&lab, &[]);
    assert!(clean && sum(&report, "shop", "from") == 5, "{report:#}");
    assert_eq!((sum(&report, "shop", "applied"), sum(&report, "shop", "parked")), (2, 1), "{report:#}");

    assert!(consumer.stop().await.0.success());
    let _consumer = lab.consume(&config("[\"order.*\", \"bill.*\"]")).await;
    eventually_number(&mut lab.connect().await, "select count(*) from oncebox.consumer_binding", 2).await;
    publish(&lab, "bill.sent", 1).await;
    publish(&lab, "order.placed", 1).await;
    effects(&lab, 4).await;
    let (report, clean) = audit(&lab, &[]);
    assert!(clean, "{report:#}");
    let from: Vec<i64> = report["consumers"].as_array().unwrap().iter().map(|c| c["from"].as_i64().unwrap()).collect();
    assert_eq!(from, [4, 5], "{report:#}");

    lab.sql("select oncebox.consumer_forget('shop')").await;
    let (report, clean) = audit(&lab, &[]);
    assert!(clean && sum(&report, "shop", "applied") == 4, "{report:#}");
}
