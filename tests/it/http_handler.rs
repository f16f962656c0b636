//! Goal: an HTTP endpoint gets each message, byte for byte, at least once and always under the same key; what it answers
//! decides; while it is away nothing is lost, reordered or counted, and nobody else waits for it.

use crate::support::endpoint::{Call, Endpoint, Reply};
use crate::support::{Lab, eventually, eventually_number};
use serde_json::json;
use sqlx::Row;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

fn consumer(name: &str, url: &str, lines: &str) -> String {
    format!(
        "[[consumer]]\nname = \"{name}\"\nbindings = [\"{name}.#\"]\nbackoff_initial = \"20ms\"\nbackoff_cap = \"50ms\"\n\
         handler = {{ http = \"{url}\" }}\n{lines}\n"
    )
}

/// Publishes messages numbered `from` to `to` over `keys` keys.
async fn publish(lab: &Lab, topic: &str, from: i64, to: i64, keys: i64) {
    lab.sql(&format!(
        "select oncebox.publish('{topic}', jsonb_build_object('n', i), key => 'k' || i % {keys})
        from generate_series({from}, {to}) as i"
    ))
    .await;
}

/// Waits until the inbox has accepted so many.
async fn accepted(lab: &Lab, count: i64) {
    eventually_number(&mut lab.connect().await, "select count(*) from oncebox.inbox", count).await;
}

/// First calls of each key, in the order they came.
fn firsts(endpoint: &Endpoint) -> HashMap<i64, Vec<i64>> {
    let (mut seen, mut firsts): (HashSet<String>, HashMap<i64, Vec<i64>>) = Default::default();
    for call in endpoint.calls() {
        if seen.insert(call.key().to_owned()) {
            firsts.entry(call.number() % 5).or_default().push(call.number());
        }
    }
    firsts
}

fn assert_in_order(endpoint: &Endpoint, count: i64) {
    let firsts = firsts(endpoint);
    for key in 0..5 {
        let expected: Vec<i64> = (1..=count).filter(|n| n % 5 == key).collect();
        assert_eq!(firsts.get(&key), Some(&expected), "the calls of key {key}");
    }
}

/// Goal: the body arrives byte for byte, and the request says which message it carries: A1.
#[tokio::test]
async fn a_message_is_posted_as_it_is() {
    let lab = Lab::shared().await;
    let endpoint = Endpoint::answering(|_| Reply::status(204)).await;
    let url = endpoint.url();
    let handler = format!(
        "[[consumer]]\nname = \"a\"\nbindings = [\"a.#\"]\n\
         handler = {{ http = \"{url}?q=1\", headers = {{ Authorization = \"Bearer se-cret\" }} }}"
    );
    let mut consumer = lab.consume(&lab.config(&handler)).await;
    let _relay = lab.relay().await;
    let binary: Vec<u8> = (0..=255).chain([0, 13, 10, 13, 10]).collect();
    let mut conn = lab.connect().await;
    let id: uuid::Uuid = sqlx::query_scalar(
        "select oncebox.publish_bytes('a.bytes', $1, 'application/x-thing', key => 'Zürich', headers => $2)",
    )
    .bind(&binary)
    .bind(json!({"tenant": "acme", "traceparent": "00-ab-cd-01", "host": "evil", "n": 1}))
    .fetch_one(&mut conn)
    .await
    .expect("publishes");
    lab.sql("select oncebox.publish('a.json', '{\"ü\": 1.50}')").await;
    accepted(&lab, 2).await;
    let mut calls = endpoint.calls();
    calls.sort_by_key(|call| call.fields["oncebox-topic"].clone());
    let field = |name: &str| calls[0].fields.get(name).map(String::as_str);
    assert_eq!(calls[0].line, "POST /hook?q=1 HTTP/1.1");
    assert_eq!(calls[0].body, binary);
    for (name, value) in [
        ("idempotency-key", id.to_string().as_str()),
        ("content-type", "application/x-thing"),
        ("content-length", "261"),
        ("host", url.trim_start_matches("http://").trim_end_matches("/hook")),
        ("authorization", "Bearer se-cret"),
        ("oncebox-topic", "a.bytes"),
        ("oncebox-stream", "a.bytes#0"),
        ("oncebox-offset", "1"),
        ("tenant", "acme"),
        ("traceparent", "00-ab-cd-01"),
        ("n", "1"),
        ("oncebox-headers", r#"{"host":"evil","oncebox-key":"Z\u00fcrich"}"#),
    ] {
        assert_eq!(field(name), Some(value), "{name}: {:?}", calls[0].fields);
    }
    assert_eq!(calls[1].body, "{\"ü\": 1.50}".as_bytes());
    assert_eq!(calls[1].fields["content-type"], "application/json");
    assert!(consumer.stop().await.0.success());
    assert!(!consumer.log().contains("se-cret"), "{}", consumer.log());
}

/// Goal: 2xx is done, 409 and 422 park, a redirect and anything else fail and count; the words of the answer are kept,
/// as far as they are short: A2.
#[tokio::test]
async fn the_status_decides() {
    let lab = Lab::shared().await;
    let endpoint = Endpoint::answering(|call| {
        let status = call.number() as u16;
        let fields = if status == 302 { "location: /elsewhere\r\n".to_owned() } else { String::new() };
        let length = if status == 500 { 3_000_000 } else { 3 };
        Reply { fields, body: vec![b'w'; length], ..Reply::status(status) }
    })
    .await;
    let config = lab.config(&consumer("a", &endpoint.url(), "max_attempts = 3"));
    let _consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    for status in [200, 202, 204, 302, 400, 409, 422, 500] {
        publish(&lab, "a.x", status, status, 1_000).await;
    }
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held where state = 'parked'", 5).await;
    accepted(&lab, 3).await;
    let rows = sqlx::query(
        "select body, reason, attempts, last_error from oncebox.inbox_held order by convert_from(body, 'utf8')",
    )
    .fetch_all(&mut conn)
    .await
    .expect("reads");
    let parked: Vec<(String, String, i32, String)> = rows
        .iter()
        .map(|row| (String::from_utf8(row.get(0)).expect("text"), row.get(1), row.get(2), row.get(3)))
        .collect();
    let expected = [
        (302, "too_many_attempts", 3, "redirects are not followed"),
        (400, "too_many_attempts", 3, "answered 400: www"),
        (409, "rejected", 1, "answered 409: www"),
        (422, "rejected", 1, "answered 422: www"),
        (500, "too_many_attempts", 3, "answered 500: www"),
    ];
    assert_eq!(parked.len(), expected.len());
    for ((body, reason, attempts, error), (status, expected_reason, expected_attempts, text)) in
        parked.iter().zip(expected)
    {
        assert_eq!(
            (body.as_str(), reason.as_str(), *attempts),
            (&*format!("{{\"n\": {status}}}"), expected_reason, expected_attempts)
        );
        assert!(error.contains(text) && error.len() < 600, "{status}: {error}");
    }
    let calls = endpoint.calls();
    let count = |status: i64| calls.iter().filter(|call| call.number() == status).count();
    assert_eq!([200, 302, 409, 500].map(count), [1, 3, 1, 3]);
    assert!(calls.iter().all(|call| call.line.starts_with("POST /hook ")), "a redirect was followed");
}

/// Goal: an endpoint that refuses connections or says 503 costs no attempt, loses nothing and keeps the order of keys,
/// also of a message that waits for another attempt: A3.
#[tokio::test]
async fn an_absent_endpoint_costs_no_attempts() {
    let lab = Lab::shared().await;
    let unavailable = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&unavailable);
    let failed = AtomicBool::new(false);
    let mut endpoint = Endpoint::answering(move |call| match asked.load(Ordering::SeqCst) {
        true => Reply::status(503),
        // One message has an attempt behind it when the endpoint goes.
        false if call.number() == 7 && !failed.swap(true, Ordering::SeqCst) => Reply::status(500),
        false => Reply::status(200),
    })
    .await;
    let config = lab.config(&consumer("a", &endpoint.url(), "max_attempts = 2\nconcurrency = 4"));
    let consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    publish(&lab, "a.x", 1, 50, 5).await;
    accepted(&lab, 50).await;
    endpoint.down().await;
    publish(&lab, "a.x", 51, 100, 5).await;
    consumer.wait_for_log("is not there").await;
    unavailable.store(true, Ordering::SeqCst);
    endpoint.up().await;
    consumer.wait_for_log("answered 503").await;
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held").await, 0);
    unavailable.store(false, Ordering::SeqCst);
    accepted(&lab, 100).await;
    assert_in_order(&endpoint, 100);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held").await, 0);
}

/// Goal: a slow endpoint slows its own consumer only; requests at a time stay within `concurrency`, and their
/// connections are used again: A4.
#[tokio::test]
async fn a_slow_endpoint_slows_its_own_consumer_only() {
    let lab = Lab::shared().await;
    let slow = Endpoint::answering(|_| Reply { after: Duration::from_secs(3600), ..Reply::status(200) }).await;
    let quick = Endpoint::answering(|_| Reply {
        after: Duration::from_millis(2),
        body: vec![b'x'; 20_000],
        ..Reply::status(200)
    })
    .await;
    let text = consumer("slow", &slow.url(), "concurrency = 3") + &consumer("quick", &quick.url(), "concurrency = 4");
    let process = lab.spawn(&["consume", "--config", &lab.config(&text)]);
    eventually("both consume", async || (process.log().matches("consuming").count() == 2).then_some(())).await;
    let _relay = lab.relay().await;
    publish(&lab, "slow.x", 1, 200, 50).await;
    eventually("the slow one is in the middle of it", async || (slow.calls().len() == 3).then_some(())).await;
    publish(&lab, "quick.x", 1, 300, 50).await;
    accepted(&lab, 300).await;
    assert_eq!((slow.most_at_a_time(), slow.calls().len()), (3, 3));
    assert!((2..=4).contains(&quick.most_at_a_time()), "{}", quick.most_at_a_time());
    // Up to one a worker, and some that idled through a pause of the machine.
    assert!(quick.accepted() <= 30, "{} connections for 300 requests", quick.accepted());
    // No transaction is open while the slow one is waited for.
    let open = "select count(*) from pg_stat_activity where datname = current_database() and xact_start is not null
        and pid <> pg_backend_pid() and application_name = 'oncebox consume' and state like 'idle in transaction%'";
    assert_eq!(lab.number(open).await, 0);
}

/// Goal: a consumer that is killed -9 again and again repeats calls under the same key only, and each message is accepted
/// once: A5.
#[tokio::test]
async fn kills_repeat_calls_under_the_same_key() {
    let lab = Lab::shared().await;
    let endpoint = Endpoint::answering(|_| Reply { after: Duration::from_millis(5), ..Reply::status(200) }).await;
    let config = lab.config(&consumer("a", &endpoint.url(), "concurrency = 4"));
    let mut consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    publish(&lab, "a.x", 1, 400, 5).await;
    for round in 1..=4 {
        eventually("some calls", async || (endpoint.keys().len() >= round * 60).then_some(())).await;
        consumer.kill9();
        consumer = lab.spawn(&["consume", "--config", &config]);
    }
    accepted(&lab, 400).await;
    let calls = endpoint.calls();
    let mut number_of: HashMap<&str, i64> = HashMap::new();
    for call in &calls {
        assert_eq!(*number_of.entry(call.key()).or_insert(call.number()), call.number(), "one key, two messages");
    }
    assert_eq!(number_of.len(), 400);
    assert!(calls.len() > 400, "no kill met a call: the test shows nothing");
    assert!(calls.len() <= 400 + 4 * 4, "{} calls: more than were in hand at the kills", calls.len());
    assert_in_order(&endpoint, 400);
}

/// Goal: an endpoint that takes the request and never answers has failed after `handler_timeout`, and it counts: A6.
#[tokio::test]
async fn an_endpoint_that_hangs_has_failed() {
    let lab = Lab::shared().await;
    let endpoint = Endpoint::answering(|call| match call.number() {
        1 => Reply { after: Duration::from_secs(3600), ..Reply::status(200) },
        _ => Reply::status(200),
    })
    .await;
    let config = lab.config(&consumer("a", &endpoint.url(), "max_attempts = 2\nhandler_timeout = \"300ms\""));
    let _consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    publish(&lab, "a.x", 1, 6, 1).await;
    accepted(&lab, 5).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select attempts::bigint from oncebox.inbox_held where state = 'parked'", 2).await;
    let error: String =
        sqlx::query_scalar("select last_error from oncebox.inbox_held").fetch_one(&mut conn).await.expect("one");
    assert!(error.contains("no answer within 300ms"), "{error}");
    assert_eq!(endpoint.calls().iter().filter(|call| call.number() == 1).count(), 2);
}

/// Goal: `Retry-After` is kept to by all workers together: A7.
#[tokio::test]
async fn retry_after_is_honoured() {
    let lab = Lab::shared().await;
    let calls = AtomicUsize::new(0);
    let endpoint = Endpoint::answering(move |_: &Call| match calls.fetch_add(1, Ordering::SeqCst) {
        0 => Reply { fields: "retry-after: 2\r\n".to_owned(), ..Reply::status(429) },
        _ => Reply::status(200),
    })
    .await;
    let config = lab.config(&consumer("a", &endpoint.url(), "max_attempts = 1\nconcurrency = 4\norder = \"none\""));
    let _consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    publish(&lab, "a.x", 1, 1, 5).await;
    eventually("the first call", async || (!endpoint.calls().is_empty()).then_some(())).await;
    publish(&lab, "a.x", 2, 40, 5).await;
    accepted(&lab, 40).await;
    let calls = endpoint.calls();
    assert_eq!(calls.len(), 41);
    // A worker could be past its look at the pause while the answer is on its way.
    let early = calls[1..].iter().filter(|call| call.at - calls[0].at < Duration::from_millis(1_900)).count();
    assert!(early <= 3, "{early} calls within the pause");
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held").await, 0);
}

/// Goal: with two processes, a repeated call that takes longer than a run's lease is neither made by the other one too nor
/// held against the message.
#[tokio::test]
async fn a_long_call_is_left_to_its_process() {
    let lab = Lab::shared().await;
    let first = AtomicBool::new(true);
    let endpoint = Endpoint::answering(move |_| match first.swap(false, Ordering::SeqCst) {
        true => Reply::status(500),
        false => Reply { after: Duration::from_secs(12), ..Reply::status(200) },
    })
    .await;
    let config = lab.config(&consumer("a", &endpoint.url(), "handler_timeout = \"30s\""));
    let _consumers = [lab.consume(&config).await, lab.spawn(&["consume", "--config", &config])];
    let _relay = lab.relay().await;
    publish(&lab, "a.x", 1, 1, 1).await;
    accepted(&lab, 1).await;
    assert_eq!(endpoint.calls().len(), 2);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held").await, 0);
}
