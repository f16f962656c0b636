//! Goal: what `oncebox status` and `/metrics` say is what the tables hold, in a known state and in a busy one, and they
//! say it quickly whatever lies there.

use crate::support::wire::Tap;
use crate::support::{LIMIT, Lab, Process, connect, eventually, eventually_number, number, unique};
use oncebox::status;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Executor};
use std::collections::BTreeMap;
use std::process::Output;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn oncebox_status(lab: &Lab, url: &str, args: &[&str]) -> Output {
    let mut command = lab.command(&[&["status"], args].concat());
    command.env("ONCEBOX_DATABASE_URL", url).env("ONCEBOX_LOG", "warn");
    tokio::task::spawn_blocking(move || command.output().expect("the program starts")).await.expect("it ends")
}

async fn status_json(lab: &Lab) -> Value {
    let output = oncebox_status(lab, &lab.database_url, &["--json"]).await;
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A role with an admin's rights and nothing else.
async fn admin(lab: &Lab) -> String {
    let role = unique("login");
    lab.sql(&format!("create role {role} login in role oncebox_admin")).await;
    lab.database_url.replace("oncebox@", &format!("{role}@"))
}

/// Status, content type and body of a request.
async fn request(address: &str, method: &str, path: &str) -> (u16, String, String) {
    let answer = async {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        let request = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("UTF-8");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let kind = head.lines().find_map(|line| line.strip_prefix("content-type: ")).unwrap_or_default();
        (status, kind.to_owned(), body.to_owned())
    };
    tokio::time::timeout(LIMIT, answer).await.expect("an answer in time")
}

async fn serve(lab: &Lab, url: &str) -> (Process, String) {
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let address = format!("127.0.0.1:{port}");
    let mut command = lab.command(&["serve", "--listen", &address]);
    command.env("ONCEBOX_DATABASE_URL", url);
    let process = Process::spawn(command);
    process.wait_for_log("serving").await;
    (process, address)
}

/// Samples of a page in Prometheus' text format; fails on anything else.
fn parse(page: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    let mut types = BTreeMap::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect(line);
            assert!(matches!(kind, "gauge" | "counter"), "{line}");
            assert_eq!(types.insert(name.to_owned(), kind), None, "{name} is there twice");
        } else if let Some(rest) = line.strip_prefix("# HELP ") {
            assert!(rest.split_once(' ').is_some_and(|(_, help)| help.ends_with('.')), "{line}");
        } else {
            let (sample, value) = line.rsplit_once(' ').expect(line);
            let name = sample.split('{').next().expect("split gives one");
            assert!(types.contains_key(name), "{line} comes before its type");
            let value: f64 = value.parse().expect(line);
            assert!(value.is_finite(), "{line}");
            assert_eq!(samples.insert(sample.to_owned(), value), None, "{sample} is there twice");
        }
    }
    samples
}

/// Goal: the figures of a known state: a backlog nobody publishes, rolled-back and open transactions, held messages on
/// both sides, a schedule, a second source; the same as JSON, as tables and as metrics, with an admin's rights.
#[tokio::test]
async fn figures_are_those_of_the_tables() {
    let lab = Lab::own().await;
    lab.sql("update oncebox.setting set lanes = 2").await;
    lab.sql(
        "begin; select oncebox.publish('t', '1') from generate_series(1, 50); rollback;
        select oncebox.publish('t', to_jsonb(i), key => 'k' || i) from generate_series(1, 500) as i;
        update oncebox.setting set retention = '2 hours';
        select oncebox.publish('t', '1', deliver_at => now() + interval '1 hour' * i) from generate_series(1, 3) as i;
        select oncebox.outbox_renew_source('a test');
        insert into oncebox.outbox_held (lane, seq, plan_n, state, reason, held_at, source, stream, \"offset\", ordinal,
            message_id, topic, content_type, headers, body, published_at)
        select 1, 1000 + i, 0, case when i > 5 then 'parked' else 'waiting' end,
            case when i > 7 then 'expired' when i > 5 then 'unroutable' else 'nacked' end, now() - interval '1 minute' * i,
            gen_random_uuid(), 't#1', i, i, gen_random_uuid(), 't', 'text/plain', '{}', '', now()
        from generate_series(1, 10) as i;
        insert into oncebox.inbox_held (consumer, message_id, state, reason, held_at, topic, headers, body)
        select case when i > 2 then 'billing' else 'a\"b' end, gen_random_uuid(), case when i > 4 then 'parked' else 'waiting' end,
            case when i > 4 then 'rejected' else 'failed' end, now() - interval '1 minute' * i, 't', '{}', ''
        from generate_series(1, 6) as i;
        insert into oncebox.inbox_ledger values ('folded', gen_random_uuid(), 't#0', '{[1,5)}');
        select oncebox.accept('recent', gen_random_uuid()), oncebox.accept('by_day', oncebox.uuid_v7(now()))",
    )
    .await;
    let mut open = lab.connect().await;
    open.execute("set application_name = 'slow report'; begin; select oncebox.publish('t', '1')").await.unwrap();
    let pid = number(&mut open, "select pg_backend_pid()::bigint").await;
    let by_lane = |lane: i64| format!("select count(*) from oncebox.outbox where lane = {lane}");
    let expected = [lab.number(&by_lane(0)).await, lab.number(&by_lane(1)).await];
    assert_eq!(expected[0] + expected[1], 500);

    let status = status_json(&lab).await;
    let lanes = status["lanes"].as_array().expect("lanes");
    for (lane, expected) in lanes.iter().zip(expected) {
        assert_eq!(lane["lag"], json!({ "count": expected, "at_least": false }), "{lane}");
        assert!(lane["lag_s"].as_f64().unwrap() > 0.0 && lane["owner"].is_null() && lane["lease_left_s"].is_null());
        assert_eq!((&lane["published_total"], &lane["epoch"]), (&json!(0), &json!(0)));
    }
    assert_eq!(lanes.len(), 2);
    assert_eq!(lanes[0]["held"], json!({ "waiting": 0, "oldest_waiting_s": null, "parked": {} }));
    assert_eq!(lanes[1]["held"]["waiting"], 5);
    assert_eq!(lanes[1]["held"]["parked"], json!({ "unroutable": 2, "expired": 3 }));
    let oldest_s = lanes[1]["held"]["oldest_waiting_s"].as_f64().unwrap();
    assert!((300.0..400.0).contains(&oldest_s), "{oldest_s}");
    assert_eq!(status["source"]["count"], 2);
    let newest: String = sqlx::query_scalar("select source::text from oncebox.outbox_source where ordinal = 2")
        .fetch_one(&mut lab.connect().await)
        .await
        .unwrap();
    assert_eq!(status["source"]["current"], json!(newest));
    assert_eq!(status["scheduled"]["messages"], json!({ "count": 3, "at_least": false }));
    let due_s = status["scheduled"]["next_due_in_s"].as_f64().unwrap();
    assert!((3_400.0..=3_600.0).contains(&due_s), "{due_s}");
    assert_eq!((&status["ring"]["current"], &status["ring"]["retention_s"]), (&json!(0), &json!(7200.0)));
    assert_eq!(status["ring"]["slots"].as_array().map(Vec::len), Some(8));
    assert_eq!(
        (&status["ring"]["slots"][0]["state"], &status["ring"]["slots"][5]["state"]),
        (&json!("current"), &json!("empty"))
    );
    assert!(status["ring"]["slots"][0]["bytes"].as_i64() > status["ring"]["slots"][5]["bytes"].as_i64());
    let consumers: Vec<_> =
        status["consumers"].as_array().unwrap().iter().map(|c| c["consumer"].as_str().unwrap()).collect();
    let mut sorted = consumers.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, ["a\"b", "billing", "by_day", "folded", "recent"]);
    let billing = status["consumers"].as_array().unwrap().iter().find(|c| c["consumer"] == "billing").unwrap();
    assert_eq!((&billing["held"]["waiting"], &billing["held"]["parked"]), (&json!(2), &json!({ "rejected": 2 })));
    let oldest = &status["oldest_transaction"];
    assert_eq!((&oldest["pid"], &oldest["application"]), (&json!(pid), &json!("slow report")), "{oldest}");
    assert_eq!(oldest["state"], "idle in transaction");
    assert!(oldest["age_s"].as_f64().unwrap() > 0.0);
    assert!(status["rates"]["over_s"].as_f64().unwrap() >= 1.0, "{status}");

    // An admin sees the same, and what a superuser's session does through the owner's eyes.
    let url = admin(&lab).await;
    let output = oncebox_status(&lab, &url, &[]).await;
    let tables = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(output.status.success() && output.stderr.is_empty(), "{tables}{}", String::from_utf8_lossy(&output.stderr));
    for part in ["2 rejected", "3 expired, 2 unroutable", "slow report", &format!("pid {pid}"), "2 h 0 min", &newest] {
        assert!(tables.contains(part), "{part:?} is not in\n{tables}");
    }

    let (_server, address) = serve(&lab, &url).await;
    let (code, kind, page) = request(&address, "GET", "/metrics").await;
    assert_eq!((code, kind.as_str()), (200, "text/plain; version=0.0.4; charset=utf-8"), "{page}");
    let samples = parse(&page);
    for (sample, expected) in [
        ("oncebox_lag_messages{lane=\"0\"}", expected[0] as f64),
        ("oncebox_lag_messages{lane=\"1\"}", expected[1] as f64),
        ("oncebox_lane_held{lane=\"0\"}", 0.0),
        ("oncebox_waiting{side=\"outbox\",lane=\"1\",consumer=\"\"}", 5.0),
        (r#"oncebox_waiting{side="inbox",lane="",consumer="a\"b"}"#, 2.0),
        ("oncebox_parked{side=\"outbox\",reason=\"expired\",consumer=\"\"}", 3.0),
        ("oncebox_parked{side=\"inbox\",reason=\"rejected\",consumer=\"billing\"}", 2.0),
        ("oncebox_sources", 2.0),
        ("oncebox_scheduled", 3.0),
        ("oncebox_retention_seconds", 7200.0),
    ] {
        assert_eq!(samples.get(sample), Some(&expected), "{sample} in\n{page}");
    }
    assert!(samples["oncebox_oldest_transaction_seconds"] > 0.0);
    assert!(samples["oncebox_lag_seconds{lane=\"0\"}"] > 0.0);
    assert_eq!(request(&address, "POST", "/metrics").await.0, 405);

    // A prepared transaction has no session, and a name.
    open.execute("rollback").await.unwrap();
    lab.sql("begin; select oncebox.publish('t', '1'); prepare transaction 'left behind'").await;
    let oldest = status_json(&lab).await["oldest_transaction"].clone();
    assert_eq!(
        (&oldest["gid"], &oldest["pid"], &oldest["state"]),
        (&json!("left behind"), &json!(null), &json!("prepared"))
    );
    lab.sql("rollback prepared 'left behind'").await;
}

/// Goal: while a relay works, the lag is never wrong: it counts exactly what is committed and not settled, late commits of
/// transactions that were open at old windows among them; and all is 0 in the end.
#[tokio::test(flavor = "multi_thread")]
async fn lag_counts_late_commits() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let mut relay = lab.relay().await;
    let mut late = Vec::new();
    for _ in 0..4 {
        let mut conn = lab.connect().await;
        conn.execute("begin; select oncebox.publish('t', '1') from generate_series(1, 3)").await.unwrap();
        lab.sql("select oncebox.publish('t', '1') from generate_series(1, 5)").await;
        tap.read(5).await;
        late.push(conn);
    }
    let mut conn = status::connect(&lab.database_url, "test").await.unwrap();
    // A second after the last message the counters behind it are recorded.
    eventually("all offsets are recorded, and no lag", async || {
        let mut conn = status::connect(&lab.database_url, "test").await.unwrap();
        let status = status::look(&mut conn).await.unwrap();
        let lane = &status.lanes[0];
        assert!(lane.published_total <= 20 && lane.lag.count <= 20, "{lane:?}");
        let held = lane.owner.is_some() && lane.lease_left_s.is_some_and(|left| (0.0..=6.0).contains(&left));
        assert!(held, "{lane:?}");
        (lane.published_total == 20 && lane.lag.count == 0 && lane.lag_s == 0.0).then_some(())
    })
    .await;
    assert!(relay.stop().await.0.success());
    // Nobody publishes now: each commit is lag, though its numbers are older than what is settled.
    for (already, conn) in late.iter_mut().enumerate() {
        conn.execute("commit").await.unwrap();
        let expected = 3 * (already as i64 + 1);
        assert_eq!(lab.number("select messages from oncebox.outbox_lag(0::smallint)").await, expected);
    }
    lab.sql("select oncebox.publish('t', '1') from generate_series(1, 7)").await;
    let stopped = status::look(&mut conn).await.unwrap();
    let lane = &stopped.lanes[0];
    assert_eq!((lane.owner.as_ref(), lane.lag.count, lane.lag.at_least), (None, 19, false));
    assert!(lane.lag_s > 0.0);
    assert_eq!(lab.number("select messages from oncebox.outbox_lag(0::smallint, 10)").await, 10, "the bound");
    // From the middle of a window on.
    let mut relay = lab.relay().await;
    tap.read(19).await;
    eventually_number(&mut lab.connect().await, "select messages from oncebox.outbox_lag(0::smallint)", 0).await;
    assert!(relay.stop().await.0.success());
    lab.sql(
        "update oncebox.outbox_lease set settled_n = p.n, settled_seq = (select min(seq) + 2 from oncebox.outbox where xid = p.xid)
        from (
            select q.n, o.xid from oncebox.outbox_plan as q
            join lateral (select xid from oncebox.outbox order by seq desc limit 1) as o
                on pg_visible_in_snapshot(o.xid, q.s2) and not pg_visible_in_snapshot(o.xid, q.s1)) as p;
        update oncebox.outbox_plan set settled_n = 0, settled_seq = 0",
    )
    .await;
    assert_eq!(lab.number("select messages from oncebox.outbox_lag(0::smallint)").await, 4, "three of the last seven");
}

/// Goal: a look at a large backlog stays cheap: the count stops, and says so.
#[tokio::test]
async fn a_look_at_a_large_backlog_is_bounded() {
    let lab = Lab::shared().await;
    lab.sql("select oncebox.publish('t', '1') from generate_series(1, 100050)").await;
    let mut conn = status::connect(&admin(&lab).await, "test").await.unwrap();
    let began = Instant::now();
    let status = status::look(&mut conn).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
    eprintln!("a look at 100,050 messages took {:?}", began.elapsed());
    assert_eq!((status.lanes[0].lag.count, status.lanes[0].lag.at_least), (100_000, true));
}

/// Goal: nobody below an admin sees it; without a database or a schema the command fails in one line and the metrics
/// are a problem, not an empty page.
#[tokio::test]
async fn failures_are_said() {
    let lab = Lab::shared().await;
    let (_server, address) = serve(&lab, &lab.database_url).await;
    lab.sql("alter schema oncebox rename to elsewhere").await;
    let (code, kind, body) = request(&address, "GET", "/metrics").await;
    assert_eq!((code, kind.as_str()), (503, "application/problem+json"));
    let problem: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(problem["detail"], "the database has no oncebox schema: run `oncebox migrate`");
    let output = oncebox_status(&lab, &lab.database_url, &[]).await;
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "oncebox: the database has no oncebox schema: run `oncebox migrate`\n"
    );
    lab.sql("alter schema elsewhere rename to oncebox").await;
    assert_eq!(request(&address, "GET", "/metrics").await.0, 200);

    for call in ["outbox_lag(0::smallint)", "inbox_consumers()", "oldest_transaction()", "outbox_settled()"] {
        for group in ["oncebox_producer", "oncebox_consumer", "oncebox_relay"] {
            let role = unique("login");
            lab.sql(&format!("create role {role} login in role {group}")).await;
            let mut conn = connect(&lab.database_url.replace("oncebox@", &format!("{role}@"))).await;
            let error = conn.execute(AssertSqlSafe(format!("select oncebox.{call}"))).await.expect_err(call);
            let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned();
            assert_eq!(code, "42501", "{group}: {call}");
        }
    }
    let output = oncebox_status(&lab, &lab.database_url, &["--watch", "0"]).await;
    assert_eq!(output.status.code(), Some(2));
}
