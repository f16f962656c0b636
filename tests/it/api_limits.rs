//! Goal: whatever clients send, too much, too slowly, in the wrong form, or not to the end, the API answers with a problem
//! and goes on serving others.

use crate::support::api::{Answer, Api, OPERATE, READ, raw, request};
use crate::support::{LIMIT, Lab, connect, eventually, eventually_number};
use serde_json::json;
use sqlx::Executor;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Database sessions of a server.
const SESSIONS: usize = 8;
/// Requests of a server at a time.
const REQUESTS: usize = 256;

const OPERATING: (&str, &str) = ("authorization", "Bearer operate-token");
const JSON: (&str, &str) = ("content-type", "application/json");

/// Goal: what is wrong with a request is said in a problem of its own kind.
#[tokio::test]
async fn wrong_requests_are_told_apart() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    let pauses = "/v1/outbox/pauses";
    let bad = api.post_text(pauses, "{\"topic\": \"a\",\n \"reason\": }").await.problem(400, "malformed");
    assert!(bad["detail"].as_str().unwrap().contains("line 2 column"), "{bad}");
    for body in [
        "",
        "{",
        "{\"reason\": \"x\"} {}",
        "\u{0}",
        "{\"reason\": \"\\ud800\"}",
        &"[".repeat(1_000),
        &"{\"a\":".repeat(1_000),
    ] {
        api.post_text(pauses, body).await.problem(400, "malformed");
    }
    let unknown = api.post(pauses, &json!({"topic": "a", "reason": "x", "wy": 1})).await.problem(422, "invalid");
    assert_eq!(unknown["errors"][0]["pointer"], "/wy", "{unknown}");
    for kind in ["text/plain", "application/xml", "application/x-www-form-urlencoded", "", "json"] {
        let answer = api.send("POST", pauses, &[OPERATING, ("content-type", kind)], "{}").await;
        answer.problem(415, "unsupported-media-type");
    }
    api.send("POST", pauses, &[OPERATING], "{}").await.problem(415, "unsupported-media-type");
    let charset = [OPERATING, ("content-type", "Application/JSON; charset=utf-8")];
    assert_eq!(api.send("POST", pauses, &charset, r#"{"topic":"a","reason":"x"}"#).await.status, 201);

    for method in ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"] {
        let answer = api.ask(method, pauses, OPERATE).await;
        answer.problem(405, "method-not-allowed");
        let mut allowed: Vec<_> = answer.header("allow").split(',').collect();
        allowed.sort_unstable();
        assert_eq!(allowed, ["GET", "HEAD", "POST"], "{answer:?}");
    }
    let head = api.ask("HEAD", pauses, READ).await;
    let whole = api.get(pauses).await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    assert_eq!(head.header("content-length"), whole.body.len().to_string());

    for query in [
        "x=1",
        "limit=0",
        "limit=201",
        "limit=1&limit=2",
        "limit=",
        "cursor=zz",
        "cursor=7b7d",
        "topic=%ff",
        "topic=%00",
    ] {
        let problem = api.get(&format!("/v1/outbox/parked?{query}")).await.problem(400, "malformed");
        let name = query.split('=').next().unwrap();
        assert_eq!(problem["errors"][0]["parameter"], name, "{problem}");
    }
    api.get("/v1/outbox?x=1").await.problem(400, "malformed");
    api.get("/healthz?x=1").await.problem(400, "malformed");
    for path in ["/v1/outbox/parked/x/1", "/v1/outbox/parked/99999/1", "/v1/inbox/parked/a/1", "/v1/outbox/pauses/x"] {
        api.get(path).await.problem(400, "malformed");
    }
    api.get(&format!("/v1/inbox/parked/a%00b/{}", uuid::Uuid::nil())).await.problem(400, "malformed");
    api.get(&format!("/v1/inbox/parked/%ff/{}", uuid::Uuid::nil())).await.problem(400, "malformed");
    api.get(&format!("/v1/outbox/parked?cursor={}", "0".repeat(4_096))).await.problem(414, "uri-too-long");
    assert_eq!(raw(&api.address, &request(&api.address, "GET", "/v1/outbox", &many_headers(), "")).await.status, 431);
    let huge = "x".repeat(64 << 10);
    let answer = raw(&api.address, &request(&api.address, "GET", "/v1/outbox", &[("x-huge", &huge)], "")).await;
    assert_eq!(answer.status, 431);
}

fn many_headers() -> Vec<(&'static str, &'static str)> {
    vec![("x-many", "1"); 200]
}

/// Goal: a body of 10 MB is refused before it has come, announced or not, and the client gets to read why.
#[tokio::test]
async fn large_bodies_are_refused_early() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    let head = format!(
        "POST /v1/outbox/pauses HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {OPERATE}\r\n\
        content-type: application/json\r\n"
    );
    // Announced: nothing of it needs to be sent.
    let mut stream = TcpStream::connect(&api.address).await.expect("it listens");
    stream.write_all(format!("{head}content-length: 10000000\r\n\r\n").as_bytes()).await.expect("it reads");
    refused(&mut stream).await;
    // All of it is sent, in one piece: the answer is not lost in a reset.
    let whole = format!("{head}content-length: 10000000\r\nconnection: close\r\n\r\n{}", " ".repeat(10_000_000));
    raw(&api.address, whole.as_bytes()).await.problem(413, "too-large");
    // Not announced: the answer comes while there is more to send.
    let mut stream = TcpStream::connect(&api.address).await.expect("it listens");
    stream.write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes()).await.expect("it reads");
    let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x1_0000));
    for _ in 0..20 {
        stream.write_all(chunk.as_bytes()).await.expect("it reads");
    }
    refused(&mut stream).await;
    // One byte less than the limit is read.
    let fits = format!("{{\"reason\": \"{}\"}}", " ".repeat((1 << 20) - 20));
    api.post_text("/v1/outbox/pauses", &fits).await.problem(422, "invalid");
    // Without a token nobody sends much either.
    let whole = request(&api.address, "POST", "/v1/outbox/pauses", &[JSON], &" ".repeat(10_000_000));
    raw(&api.address, &whole).await.problem(401, "unauthorized");
}

/// Reads the first bytes of an answer while the connection stays open.
async fn refused(stream: &mut TcpStream) {
    let mut start = [0; 12];
    let read = tokio::time::timeout(LIMIT, stream.read_exact(&mut start)).await;
    read.expect("an answer while the rest is to come").expect("an answer");
    assert_eq!(&start, b"HTTP/1.1 413");
}

/// Goal: clients that say nothing, or say it slowly, lose their connections and hold up nobody.
#[tokio::test]
async fn slow_heads_are_cut_off() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    let silent = TcpStream::connect(&api.address).await.expect("it listens");
    let mut slow = TcpStream::connect(&api.address).await.expect("it listens");
    slow.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-a: ").await.expect("it reads");
    // One that is kept after an answer, too.
    let mut kept = TcpStream::connect(&api.address).await.expect("it listens");
    kept.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("it reads");
    assert_eq!(api.get("/healthz").await.status, 200);
    for mut stream in [silent, slow, kept] {
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(LIMIT, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the connection stays open: {}", String::from_utf8_lossy(&rest));
    }
}

/// Goal: clients that read nothing of what they asked for lose their connections, and hold up nobody.
#[tokio::test]
async fn answers_that_nobody_reads_are_cut_off() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    let mut deaf = TcpStream::connect(&api.address).await.expect("it listens");
    // More than fits in between.
    let asked = 200;
    let ask = b"GET /openapi.yaml HTTP/1.1\r\nhost: x\r\n\r\n".repeat(asked);
    deaf.write_all(&ask).await.expect("it reads");
    assert_eq!(api.send("GET", "/healthz", &[], "").await.status, 200);
    tokio::time::sleep(Duration::from_secs(20)).await;
    let mut read = Vec::new();
    let ended = tokio::time::timeout(LIMIT, deaf.read_to_end(&mut read)).await;
    assert!(ended.is_ok(), "the connection stays open");
    let answers = String::from_utf8_lossy(&read).matches("HTTP/1.1 200").count();
    assert!((1..asked).contains(&answers), "{answers} answers were sent");
}

/// Goal: whoever reaches the port may ask for the metrics and whether the server is ready, and cannot use up the database's
/// connections by it.
#[tokio::test]
async fn open_paths_hold_few_sessions() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    let mut asking = tokio::task::JoinSet::new();
    for path in ["/metrics", "/readyz"].repeat(40) {
        let bytes = request(&api.address, "GET", path, &[], "");
        let address = api.address.clone();
        asking.spawn(async move { raw(&address, &bytes).await.status });
    }
    let mut conn = lab.connect().await;
    let mut most = 0;
    while asking.try_join_next().is_none() || !asking.is_empty() {
        let sessions = "select count(*) from pg_stat_activity where application_name = 'oncebox serve'
            and datname = current_database()";
        most = most.max(crate::support::number(&mut conn, sessions).await);
    }
    assert!((1..=8).contains(&most), "{most} sessions at a time");
}

/// A parked message of lane 0.
async fn park(lab: &Lab, count: i64) {
    lab.sql(&format!(
        "insert into oncebox.outbox_held (lane, seq, plan_n, state, reason, attempts, source, stream, \"offset\",
            ordinal, message_id, topic, content_type, headers, body, published_at)
        select 0, i, 0, 'parked', 'unroutable', 1, s.source, 'a#0', i, i, gen_random_uuid(), 'a', 'text/plain', '{{}}',
            'x', clock_timestamp()
        from generate_series(1, {count}) as i cross join oncebox.outbox_source as s"
    ))
    .await;
}

/// Goal: a client that hangs up in the middle leaves its work done and its session clean; while all sessions are taken
/// others are told to come back, and too many of them at once.
#[tokio::test]
async fn a_hang_up_leaves_no_session_behind() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    park(&lab, SESSIONS as i64).await;
    // Somebody holds the rows, so that the work of each request is in the middle of it.
    let mut holder = lab.connect().await;
    holder.execute("begin; select from oncebox.outbox_held for update").await.expect("locked");
    let mut clients = Vec::new();
    for seq in 1..=SESSIONS {
        let body = json!({"reason": "again"}).to_string();
        let path = format!("/v1/outbox/parked/0/{seq}/actions/retry");
        let mut stream = TcpStream::connect(&api.address).await.expect("it listens");
        let bytes = request(&api.address, "POST", &path, &[OPERATING, JSON], &body);
        stream.write_all(&bytes).await.expect("it reads");
        clients.push(stream);
    }
    let waiting = "select count(*) from pg_stat_activity where application_name = 'oncebox serve'
        and datname = current_database() and wait_event_type = 'Lock'";
    eventually_number(&mut lab.connect().await, waiting, SESSIONS as i64).await;
    let began = Instant::now();
    let busy = api.get("/v1/outbox").await;
    busy.problem(503, "unavailable");
    assert!(busy.header("retry-after").parse::<u32>().is_ok() && began.elapsed() < Duration::from_secs(8), "{busy:?}");
    // Far more than wait for a session at a time.
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..REQUESTS + 50 {
        let bytes = request(&api.address, "GET", "/v1/outbox", &[("authorization", "Bearer read-token")], "");
        let address = api.address.clone();
        asking.spawn(async move { raw(&address, &bytes).await });
    }
    let answers: Vec<Answer> = asking.join_all().await;
    let turned_away = answers.iter().filter(|a| a.body.contains(&format!("there are {REQUESTS} requests"))).count();
    assert!(answers.iter().all(|a| a.status == 503), "somebody was served");
    assert!(turned_away > 0, "nobody was turned away at the door");
    assert_eq!(api.send("GET", "/healthz", &[], "").await.status, 200, "it shows that it lives");

    drop(clients);
    holder.execute("commit").await.expect("released");
    let retried = "select count(*) from oncebox.outbox_held where state = 'waiting'";
    eventually_number(&mut lab.connect().await, retried, SESSIONS as i64).await;
    let idle = "select count(*) from pg_stat_activity where application_name = 'oncebox serve'
        and datname = current_database() and state <> 'idle'";
    eventually_number(&mut lab.connect().await, idle, 0).await;
    for _ in 0..2 * SESSIONS {
        assert_eq!(api.get("/v1/outbox").await.status, 200);
    }
}

/// Goal: a server whose sessions were cut serves on; one whose database is away says so, and is back when it is.
#[tokio::test]
async fn the_database_may_go_and_come_back() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    assert_eq!(api.get("/v1/outbox").await.status, 200);
    let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity
        where application_name = 'oncebox serve' and datname = current_database()";
    assert!(lab.number(cut).await > 0, "it had no session");
    assert_eq!(api.get("/v1/outbox").await.status, 200, "a session that was cut while idle is nobody's error");
    let mut elsewhere = connect(&lab.postgres.url("postgres")).await;
    let allow = |yes: bool| sqlx::AssertSqlSafe(format!("alter database {} allow_connections {yes}", lab.name));
    let mut here = lab.connect().await;
    elsewhere.execute(allow(false)).await.expect("closed");
    crate::support::number(&mut here, cut).await;
    let away = api.get("/v1/outbox").await;
    away.problem(503, "unavailable");
    assert!(away.header("retry-after").parse::<u32>().is_ok(), "{away:?}");
    elsewhere.execute(allow(true)).await.expect("open");
    eventually("it serves again", || async { (api.get("/v1/outbox").await.status == 200).then_some(()) }).await;
}
