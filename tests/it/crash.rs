//! Goal: whichever named step of the protocol relay or consumer die at, every message is applied exactly once, in the
//! order of its key, and nothing is left behind.

use crate::support::{Lab, Process, eventually, eventually_number};
use oncebox::failpoints;
use std::collections::HashMap;

const SCHEMA: &str = "
    create schema shop;
    create table shop.effect (n bigserial primary key, key text, number bigint);
    create function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    begin
        -- Retries are on the way too. By chance: counted calls fall into step with batches, and then none fails alone.
        if random() < 0.15 then raise exception 'unlucky'; end if;
        insert into shop.effect (key, number) values (headers ->> 'oncebox-key', (payload ->> 'n')::bigint);
    end
    $$;";

const CONFIG: &str = r#"
[[consumer]]
name = "shop"
bindings = ["order.#"]
handler = { sql = "shop.on_message" }
concurrency = 3
backoff_initial = "20ms"
backoff_cap = "50ms"
max_attempts = 1000
"#;

const COUNT: i64 = 240;

fn armed(lab: &Lab, args: &[&str], failpoint: &str, hit: u32) -> Process {
    let mut command = lab.command(args);
    command.env("ONCEBOX_FAILPOINT", format!("{failpoint}={hit}"));
    Process::spawn(command)
}

/// Publishes, lets a process die at the failpoint, starts an ordinary one, and holds the effects against the input.
async fn die_at(failpoint: &str, hit: u32) {
    let lab = Lab::shared().await;
    lab.sql(SCHEMA).await;
    let config = lab.config(CONFIG);
    let consume = ["consume", "--config", config.as_str()];
    // The queue must be there before the first message.
    let mut consumer = lab.consume(&config).await;
    let mut relay;
    // A message that cannot be routed goes the way of those that leave the log's order.
    let publish = |from: i64, to: i64| {
        format!(
            "select oncebox.publish(case when i % 40 = 0 then 'nobody' else 'order.placed' end,
                jsonb_build_object('n', i), key => 'k' || i % 5)
            from generate_series({from}, {to}) as i"
        )
    };
    // One that never reaches the broker is announced as void.
    let expired = "; select oncebox.publish('order.placed', '{}', expires_at => clock_timestamp())";
    let (first, second) = (publish(1, COUNT / 2) + expired, publish(COUNT / 2 + 1, COUNT));
    if failpoint.starts_with("relay.") {
        let mut doomed = armed(&lab, &["relay"], failpoint, hit);
        doomed.wait_for_log("relay started").await;
        lab.sql(&first).await;
        // A second window, unless it has died in the first.
        eventually("a window", async || {
            let planned = lab.number("select count(*) from oncebox.outbox_plan where n > 0").await > 0;
            (planned || doomed.log().contains("failpoint")).then_some(())
        })
        .await;
        if failpoint.starts_with("relay.source_") {
            lab.sql("select oncebox.outbox_renew_source('a crash on the way to it')").await;
        }
        lab.sql(&second).await;
        if failpoint == "relay.before_release" {
            doomed.wait_for_log("lane resumed").await;
            doomed.signal("TERM");
        }
        let status = doomed.end().await;
        assert!(doomed.log().contains(&format!("failpoint {failpoint}")), "{status}: {}", doomed.log());
        lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
        relay = lab.relay().await;
    } else {
        consumer.kill9();
        let mut doomed = armed(&lab, &consume, failpoint, hit);
        doomed.wait_for_log("consuming").await;
        relay = lab.relay().await;
        lab.sql(&first).await;
        lab.sql(&second).await;
        let status = doomed.end().await;
        assert!(doomed.log().contains(&format!("failpoint {failpoint}")), "{status}: {}", doomed.log());
        consumer = lab.consume(&config).await;
    }
    let routed = COUNT - COUNT / 40;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", routed).await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held", 0).await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held where state = 'parked'", COUNT / 40 + 1)
        .await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_void", 0).await;
    let rows: Vec<(String, i64)> =
        sqlx::query_as("select key, number from shop.effect order by n").fetch_all(&mut conn).await.expect("reads");
    let mut effects: HashMap<String, Vec<i64>> = HashMap::new();
    for (key, number) in rows {
        effects.entry(key).or_default().push(number);
    }
    for key in 0..5 {
        let expected: Vec<i64> = (1..=COUNT).filter(|n| n % 5 == key && n % 40 != 0).collect();
        assert_eq!(effects[&format!("k{key}")], expected, "{failpoint} at pass {hit}: key k{key}");
    }
    // Ends in order: nothing is in the middle of anything.
    assert!(relay.stop().await.0.success() && consumer.stop().await.0.success());
}

/// Says which crash it was that failed.
struct Crash(&'static str, u32);

impl Drop for Crash {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- at pass {} of {}", self.1, self.0);
        }
    }
}

/// Every point of one side, at its first and at a later pass.
async fn die_at_each_of(side: &str) {
    for failpoint in failpoints::ALL.iter().filter(|point| point.starts_with(side)) {
        // A handler that fails so often ends most batches: `batches` has a crash test for those.
        if failpoint.starts_with("consumer.batch_") {
            continue;
        }
        // These are passed once in a process.
        let once =
            matches!(*failpoint, "relay.lease_taken" | "relay.before_release" | "relay.held" | "relay.voids_read")
                || failpoint.starts_with("relay.source_");
        for hit in if once { &[1][..] } else { &[1, 2][..] } {
            let _crash = Crash(failpoint, *hit);
            die_at(failpoint, *hit).await;
        }
    }
}

/// Goal: as the file says, for every point of the relay.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_of_the_relay_at_any_step_loses_doubles_and_reorders_nothing() {
    die_at_each_of("relay.").await;
}

/// Goal: as the file says, for every point of the consumer.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_of_the_consumer_at_any_step_loses_doubles_and_reorders_nothing() {
    die_at_each_of("consumer.").await;
}

/// Goal: every point is on a side that has a crash test; `saga_crash` has those of sagas.
#[test]
fn every_point_has_a_side() {
    for point in failpoints::ALL {
        assert!(["relay.", "consumer.", "saga."].iter().any(|side| point.starts_with(side)), "{point}");
    }
}

/// Goal: the list of points is the code's: each is passed somewhere, and nothing passes one that is not listed.
#[test]
fn every_point_is_in_the_code() {
    let mut found: Vec<String> = Vec::new();
    for (_, text) in crate::statements::sources().iter().filter(|(file, _)| file != "src/failpoints.rs") {
        found.extend(
            text.split("failpoints::pass(\"").skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())),
        );
    }
    let mut listed: Vec<&str> = failpoints::ALL.to_vec();
    found.sort_unstable();
    found.dedup();
    listed.sort_unstable();
    assert_eq!(found, listed);
}
