//! Goal: `oncebox.publish` refuses what could not be carried and writes nothing then, takes everything up to its limits
//! byte for byte, follows the caller's transaction in all its forms, and runs none of the caller's code as the owner.

use crate::support::{Lab, connect, unique};
use oncebox::message::MessageId;
use oncebox::outbox::{self, NewMessage, PublishError};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::time::{Duration, SystemTime};
use uuid::Uuid;

/// What the log and the schedule hold.
const WRITTEN: &str = "select (select count(*) from oncebox.outbox) + (select count(*) from oncebox.outbox_scheduled)";

/// Evaluates `call`; its result as text.
async fn call(conn: &mut PgConnection, call: &str) -> Result<String, sqlx::Error> {
    sqlx::query_scalar(AssertSqlSafe(format!("select ({call})::text"))).fetch_one(conn).await
}

async fn accepted(conn: &mut PgConnection, text: &str) -> Uuid {
    let id = call(conn, text).await.unwrap_or_else(|error| panic!("{text}: {error}"));
    id.parse().expect("publish returns a uuid")
}

/// `call` is refused with 22023 and a message that begins with the argument's name.
async fn assert_refused(conn: &mut PgConnection, text: &str, argument: &str) {
    let error = match call(conn, text).await {
        Ok(id) => panic!("{text}: accepted as {id}"),
        Err(error) => error,
    };
    let error = error.into_database_error().unwrap_or_else(|| panic!("{text}: no database error"));
    assert_eq!(error.code().as_deref(), Some("22023"), "{text}: {error}");
    assert!(error.message().starts_with(&format!("{argument}: ")), "{text}: {error}");
}

fn database_error(error: sqlx::Error) -> (String, String) {
    let error = error.into_database_error().expect("an error of the database");
    (error.code().unwrap_or_default().into_owned(), error.message().to_owned())
}

async fn body(conn: &mut PgConnection, id: Uuid) -> Vec<u8> {
    sqlx::query_scalar("select body from oncebox.outbox where message_id = $1").bind(id).fetch_one(conn).await.unwrap()
}

/// Goal: every argument that broker, relay or consumer could not carry is refused by name, through both functions, and
/// nothing of it is written.
#[tokio::test]
async fn refusals_name_the_argument_and_write_nothing() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let headers = |headers: &str| format!("headers => {headers}");
    let old = "message_id => oncebox.uuid_v7(clock_timestamp() - interval '7 days 1 minute')";
    let mut cases: Vec<(String, &str)> = vec![
        (old.to_owned(), "message_id"),
        ("key => repeat('k', 256)".to_owned(), "key"),
        ("key => repeat('é', 128)".to_owned(), "key"),
        ("deliver_at => 'infinity'".to_owned(), "deliver_at"),
        ("deliver_at => '-infinity'".to_owned(), "deliver_at"),
        ("deliver_at => '9999-01-02'".to_owned(), "deliver_at"),
        ("expires_at => 'infinity'".to_owned(), "expires_at"),
        ("expires_at => '-infinity'".to_owned(), "expires_at"),
        ("deliver_at => now() + interval '2 h', expires_at => now() + interval '1 h'".to_owned(), "expires_at"),
        ("deliver_at => '2100-01-01', expires_at => '2100-01-01'".to_owned(), "expires_at"),
        (headers("null"), "headers"),
        (headers("jsonb_build_object('a', repeat('v', 8192))"), "headers"),
        // {"a": "…"} is 9 bytes longer than the value.
        (headers("jsonb_build_object('a', repeat('v', 8184))"), "headers"),
        (headers("jsonb_build_object(repeat('n', 256), 1)"), "headers"),
        (headers("jsonb_build_object(repeat('é', 128), 1)"), "headers"),
    ];
    for value in ["null", "[]", "1", "\"a\"", "true"] {
        cases.push((headers(&format!("'{value}'")), "headers"));
    }
    for name in ["", "CC", "BCC", "x-", "x-delay", "x-death", "oncebox-", "oncebox-key", "oncebox-anything"] {
        cases.push((headers(&format!("'{{\"{name}\": \"v\"}}'")), "headers"));
    }
    for value in [
        "null",
        "[]",
        "{}",
        "[1]",
        "{\"b\": 1}",
        "9223372036854775808",
        "-9223372036854775809",
        "1e400",
        "-1e400",
        "1e-400",
        "5e-324",
        "0.1000000000000000055511151231257827",
        "12345678901234567890",
        "18446744073709551615",
    ] {
        cases.push((headers(&format!("'{{\"ok\": 1, \"a\": {value}}}'")), "headers"));
    }
    for (arguments, argument) in &cases {
        assert_refused(&mut conn, &format!("oncebox.publish('t', '1', {arguments})"), argument).await;
        assert_refused(&mut conn, &format!("oncebox.publish_bytes('t', '1', 'text/plain', {arguments})"), argument)
            .await;
    }
    for topic in ["null", "''", "repeat('t', 256)", "repeat('é', 128)"] {
        assert_refused(&mut conn, &format!("oncebox.publish({topic}, '1')"), "topic").await;
        assert_refused(&mut conn, &format!("oncebox.publish_bytes({topic}, '1', 'text/plain')"), "topic").await;
    }
    for content_type in ["null", "''", "repeat('t', 256)", "repeat('é', 128)"] {
        assert_refused(&mut conn, &format!("oncebox.publish_bytes('t', '1', {content_type})"), "content_type").await;
    }
    for call in [
        "oncebox.publish('t', null)",
        "oncebox.publish_bytes('t', null, 'text/plain')",
        // The quotes count.
        "oncebox.publish('t', to_jsonb(repeat('p', 1048575)))",
        "oncebox.publish('t', to_jsonb(repeat('é', 524288)))",
        "oncebox.publish_bytes('t', convert_to(repeat('p', 1048577), 'UTF8'), 'text/plain')",
    ] {
        assert_refused(&mut conn, call, "payload").await;
    }
    assert_eq!(lab.number(WRITTEN).await, 0);
}

/// Goal: the limits themselves are within bounds, and what was given is in the log as given.
#[tokio::test]
async fn the_limits_are_within_bounds() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    // 255 bytes: 127 letters of two bytes, and one of one.
    let text = format!("{}x", "é".repeat(127));
    let id = accepted(
        &mut conn,
        &format!(
            "oncebox.publish_bytes('{text}', '', '{text}', key => '{text}',
                headers => jsonb_build_object('{text}', 1), deliver_at => '4000-01-01 BC')"
        ),
    )
    .await;
    let found: (String, String, String, Value, Vec<u8>) =
        sqlx::query_as("select topic, content_type, key, headers, body from oncebox.outbox where message_id = $1")
            .bind(id)
            .fetch_one(&mut conn)
            .await
            .unwrap();
    assert_eq!(found, (text.clone(), text.clone(), text.clone(), json!({ &text: 1 }), vec![]));

    for arguments in [
        // {"a": "…"} is 9 bytes longer than the value: 8 KiB to the byte.
        "headers => jsonb_build_object('a', repeat('v', 8183))",
        "headers => jsonb_build_object('a', repeat('é', 4091) || 'v')",
        "headers => '{}'",
        "key => ''",
        "key => null",
        "expires_at => now() - interval '1 year'",
        "deliver_at => now() - interval '1 year', expires_at => now()",
        "message_id => oncebox.uuid_v7(clock_timestamp() - interval '6 days 23 hours 59 minutes')",
        "message_id => oncebox.uuid_v7(clock_timestamp() + interval '100 years')",
        "message_id => gen_random_uuid()",
        "message_id => '00000000-0000-0000-0000-000000000000'",
        "message_id => 'ffffffff-ffff-ffff-ffff-ffffffffffff'",
    ] {
        accepted(&mut conn, &format!("oncebox.publish('t', '1', {arguments})")).await;
        accepted(&mut conn, &format!("oncebox.publish_bytes('t', '1', 'text/plain', {arguments})")).await;
    }
    for payload in ["to_jsonb(repeat('p', 1048574))", "to_jsonb(repeat('é', 524287))", "'null'"] {
        accepted(&mut conn, &format!("oncebox.publish('t', {payload})")).await;
    }
    let largest = "oncebox.publish_bytes('t', convert_to(repeat('p', 1048576), 'UTF8'), 'text/plain')";
    assert_eq!(accepted_body(&mut conn, largest).await, vec![b'p'; 1 << 20]);
}

async fn accepted_body(conn: &mut PgConnection, call: &str) -> Vec<u8> {
    let id = accepted(conn, call).await;
    body(conn, id).await
}

/// Goal: every header value that AMQP has a type for is taken, and comes out of the log as the same number: int64 to
/// its ends, doubles that are exact.
#[tokio::test]
async fn header_values_are_kept() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    // What a session prints of doubles must not decide what is exact.
    conn.execute("set extra_float_digits = -15").await.unwrap();
    for (text, value) in [
        ("true", json!(true)),
        ("false", json!(false)),
        ("\"\"", json!("")),
        ("\"é\\\"\\n\"", json!("é\"\n")),
        ("9223372036854775807", json!(i64::MAX)),
        ("-9223372036854775808", json!(i64::MIN)),
        ("0", json!(0)),
        ("-1", json!(-1)),
        ("0.1", json!(0.1)),
        ("-0.30000000000000004", json!(-0.30000000000000004)),
        ("2.5e-308", json!(2.5e-308)),
        ("-2.3e-308", json!(-2.3e-308)),
        ("1.79e308", json!(1.79e308)),
        ("1e22", json!(1e22)),
        ("2.2250738585072014e-307", json!(2.2250738585072014e-307)),
        ("1.2345678901234566e-7", json!(1.2345678901234566e-7)),
        ("123456789.12345679", json!(123456789.12345679)),
    ] {
        let id = accepted(&mut conn, &format!("oncebox.publish('t', '1', headers => '{{\"a\": {text}}}')")).await;
        let headers: String = sqlx::query_scalar("select headers::text from oncebox.outbox where message_id = $1")
            .bind(id)
            .fetch_one(&mut conn)
            .await
            .unwrap();
        // As the relay reads it.
        let found: Value = serde_json::from_str(&headers).unwrap();
        match value.as_f64().filter(|_| value.is_f64()) {
            Some(double) => assert_eq!(found["a"].as_f64(), Some(double), "{text}"),
            None => assert_eq!(found["a"], value, "{text}"),
        }
    }
}

/// Goal: bytes arrive as given, none and all 256 values among them; JSON arrives as Postgres prints the jsonb.
#[tokio::test]
async fn payloads_are_kept_byte_for_byte() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    // What a session prints of bytes must not reach the log.
    conn.execute("set bytea_output = 'escape'").await.unwrap();
    let every: Vec<u8> = (0..=255).rev().chain(0..=255).collect();
    for bytes in [vec![], vec![0], every] {
        let id: Uuid = sqlx::query_scalar("select oncebox.publish_bytes('t', $1, 'application/octet-stream')")
            .bind(&bytes)
            .fetch_one(&mut conn)
            .await
            .unwrap();
        assert_eq!(body(&mut conn, id).await, bytes);
    }
    for payload in ["null", "{\"b\": 1, \"a\": [1.50, \"\\u00e9\\n\", 1e3], \"b\": 2}", "\"\"", "[]", "0.10"] {
        let (id, text): (Uuid, String) =
            sqlx::query_as("select oncebox.publish('t', $1::text::jsonb), $1::text::jsonb::text")
                .bind(payload)
                .fetch_one(&mut conn)
                .await
                .unwrap();
        assert_eq!(String::from_utf8(body(&mut conn, id).await).unwrap(), text, "{payload}");
    }
    let types = "select count(*) from oncebox.outbox where content_type = 'application/json'";
    assert_eq!(lab.number(types).await, 5);
}

/// Goal: published in the `returning` of the statement that writes the business rows, each row's message is there once,
/// in the order of the rows, and all of them go with the statement.
#[tokio::test]
async fn one_statement_writes_rows_and_their_messages() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    conn.execute("create table public.purchase (id int primary key, amount numeric check (amount > 0))").await.unwrap();
    let insert = "insert into public.purchase select n, 100 - n from generate_series($1::int, $2::int) as n
        returning id, oncebox.publish('t', jsonb_build_object('id', id), key => (id % 3)::text)";
    let rows: Vec<(i32, Uuid)> = sqlx::query_as(insert).bind(1).bind(50).fetch_all(&mut conn).await.unwrap();
    let log = "select (convert_from(body, 'UTF8')::jsonb ->> 'id')::int, message_id from oncebox.outbox order by seq";
    let written: Vec<(i32, Uuid)> = sqlx::query_as(log).fetch_all(&mut conn).await.unwrap();
    assert_eq!(written, rows);
    assert_eq!(rows.iter().map(|(n, _)| *n).collect::<Vec<_>>(), (1..=50).collect::<Vec<_>>());
    // The row of 100 fails: the messages of the others go with it.
    sqlx::query(insert).bind(51).bind(100).execute(&mut conn).await.unwrap_err();
    assert_eq!(lab.number(WRITTEN).await, 50);
    conn.execute("update public.purchase set amount = 1 where id <= 3 returning oncebox.publish('t', '1')")
        .await
        .unwrap();
    assert_eq!(lab.number(WRITTEN).await, 53);
}

/// Goal: a message is there exactly when its transaction commits: plain, prepared, under repeatable read and
/// serializable, and in a savepoint.
#[tokio::test]
async fn only_commits_write() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let publish = |n: i32| AssertSqlSafe(format!("select oncebox.publish('t', '{n}')"));
    let later =
        |n: i32| AssertSqlSafe(format!("select oncebox.publish('t', '{n}', deliver_at => now() + interval '1 hour')"));
    // Gone: 1 to 6.
    conn.execute("begin").await.unwrap();
    conn.execute(publish(1)).await.unwrap();
    conn.execute(later(2)).await.unwrap();
    assert_eq!(crate::support::number(&mut conn, WRITTEN).await, 2);
    conn.execute("rollback").await.unwrap();
    conn.execute("begin").await.unwrap();
    conn.execute(publish(3)).await.unwrap();
    conn.execute("select 1 / 0").await.unwrap_err();
    conn.execute("commit").await.unwrap();
    conn.execute("begin; select oncebox.publish('t', '4')").await.unwrap();
    drop(conn);
    let mut conn = lab.connect().await;
    conn.execute("begin").await.unwrap();
    conn.execute(publish(5)).await.unwrap();
    conn.execute("prepare transaction 'gone'").await.unwrap();
    conn.execute("rollback prepared 'gone'").await.unwrap();
    // Kept: 10 to 14, around a savepoint that goes.
    conn.execute("begin").await.unwrap();
    conn.execute(publish(10)).await.unwrap();
    conn.execute("savepoint s").await.unwrap();
    conn.execute(publish(6)).await.unwrap();
    conn.execute("rollback to s").await.unwrap();
    conn.execute(publish(11)).await.unwrap();
    assert_eq!(lab.number(WRITTEN).await, 0, "visible before the commit");
    conn.execute("commit").await.unwrap();
    for (n, level) in [(12, "repeatable read"), (13, "serializable")] {
        conn.execute(AssertSqlSafe(format!("begin isolation level {level}"))).await.unwrap();
        conn.execute("select count(*) from oncebox.outbox").await.unwrap();
        // Another one commits meanwhile, to no harm.
        lab.sql(&format!("select oncebox.publish('t', '{}')", n + 10)).await;
        conn.execute(publish(n)).await.unwrap();
        conn.execute("commit").await.unwrap();
    }
    conn.execute("begin").await.unwrap();
    conn.execute(publish(14)).await.unwrap();
    conn.execute("prepare transaction 'kept'").await.unwrap();
    let before: Vec<i32> = published(&lab).await;
    assert_eq!(before, [10, 11, 12, 13, 22, 23], "a prepared transaction is not committed yet");
    conn.execute("commit prepared 'kept'").await.unwrap();
    assert_eq!(published(&lab).await, [10, 11, 12, 13, 14, 22, 23]);
    assert_eq!(lab.number("select count(*) from oncebox.outbox_scheduled").await, 0);
    // The relay's windows rely on it.
    let others = "select count(*) from oncebox.outbox where xid::xid <> xmin";
    assert_eq!(lab.number(others).await, 1, "all but the row of the savepoint carry their own transaction");
}

async fn published(lab: &Lab) -> Vec<i32> {
    sqlx::query_scalar("select convert_from(body, 'UTF8')::int from oncebox.outbox order by 1")
        .fetch_all(&mut lab.connect().await)
        .await
        .unwrap()
}

/// Goal: default ids are UUIDv7 of the call, or of `deliver_at` when that lies ahead, all different; a given id is
/// returned, and twice the same makes two rows.
#[tokio::test]
async fn ids_are_of_the_time_of_delivery() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    for (arguments, hours) in [
        ("", 0),
        (", deliver_at => clock_timestamp() + interval '48 h'", 48),
        (", deliver_at => clock_timestamp() - interval '48 h'", 0),
    ] {
        for function in ["publish('t', '1'", "publish_bytes('t', '1', 'text/plain'"] {
            let clock = "(extract(epoch from clock_timestamp()) * 1000)::bigint";
            let before = crate::support::number(&mut conn, &format!("select {clock}")).await;
            let id = accepted(&mut conn, &format!("oncebox.{function}{arguments})")).await;
            let after = crate::support::number(&mut conn, &format!("select {clock}")).await;
            assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122), "{id}");
            let (seconds, nanos) = id.get_timestamp().expect("a version 7").to_unix();
            let id_ms = (seconds * 1_000 + u64::from(nanos) / 1_000_000) as i64 - hours * 3_600_000;
            assert!((before..=after).contains(&id_ms), "{function}{arguments}: {id_ms} is not in {before}..={after}");
        }
    }
    let ids = "select count(distinct oncebox.publish('t', '1')) from generate_series(1, 1000)";
    assert_eq!(lab.number(ids).await, 1_000);

    let id = Uuid::now_v7();
    for _ in 0..2 {
        assert_eq!(accepted(&mut conn, &format!("oncebox.publish('t', '1', message_id => '{id}')")).await, id);
    }
    assert_eq!(lab.number(&format!("select count(*) from oncebox.outbox where message_id = '{id}'")).await, 2);
}

/// Goal: a message with `deliver_at` ahead stays out of the log until it is due, then moves there whole, in order of
/// its time, at most as many as asked for and each once, also with several relays asking.
#[tokio::test]
async fn scheduled_messages_are_released_when_due() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    for n in [3, 1, 2, 4] {
        let call = format!(
            "oncebox.publish_bytes('t.{n}', '\\x00ff', 'text/x', key => 'k', headers => '{{\"a\": {n}}}',
                deliver_at => clock_timestamp() + interval '{n} h', expires_at => '2999-01-01')"
        );
        accepted(&mut conn, &call).await;
    }
    accepted(&mut conn, "oncebox.publish('now', '1', deliver_at => clock_timestamp())").await;
    let release = async |conn: &mut PgConnection, at_most: i32| -> i32 {
        sqlx::query_scalar("select oncebox.outbox_release_due($1)").bind(at_most).fetch_one(conn).await.unwrap()
    };
    assert_eq!(release(&mut conn, 10).await, 0, "nothing is due");
    assert_eq!(lab.number("select count(*) from oncebox.outbox").await, 1, "what is due at once goes to the log");

    // As if 3.5 hours had passed.
    let hours_pass = "update oncebox.outbox_scheduled set deliver_at = deliver_at - interval '210 min'";
    conn.execute(hours_pass).await.unwrap();
    let before: Vec<Uuid> = sqlx::query_scalar("select message_id from oncebox.outbox_scheduled order by deliver_at")
        .fetch_all(&mut conn)
        .await
        .unwrap();
    // Another relay has the first in hand: it is passed over, not waited for.
    conn.execute("set lock_timeout = '5s'").await.unwrap();
    let mut other = lab.connect().await;
    other.execute("begin").await.unwrap();
    assert_eq!(release(&mut other, 1).await, 1);
    assert_eq!(release(&mut conn, 1).await, 1);
    other.execute("commit").await.unwrap();
    assert_eq!(release(&mut conn, 10).await, 1);
    assert_eq!(release(&mut conn, 10).await, 0, "the fourth is not due");
    assert_eq!(lab.number("select count(*) from oncebox.outbox_scheduled where topic = 't.4'").await, 1);
    type Row = (Uuid, String, String, String, Value, Vec<u8>, bool, bool);
    let rows: Vec<Row> = sqlx::query_as(
        "select message_id, topic, content_type, key, headers, body, expires_at = '2999-01-01',
            published_at between clock_timestamp() - interval '1 min' and clock_timestamp()
        from oncebox.outbox where topic <> 'now' order by topic",
    )
    .fetch_all(&mut conn)
    .await
    .unwrap();
    assert_eq!(rows.len(), 3);
    for (n, (row, id)) in (1..).zip(rows.iter().zip(before)) {
        let whole =
            (id, format!("t.{n}"), "text/x".to_owned(), "k".to_owned(), json!({ "a": n }), vec![0, 255], true, true);
        assert_eq!(row, &whole);
    }
    // A rolled-back release leaves it in the schedule.
    conn.execute(hours_pass).await.unwrap();
    conn.execute("begin").await.unwrap();
    assert_eq!(release(&mut conn, 10).await, 1);
    conn.execute("rollback").await.unwrap();
    assert_eq!(release(&mut conn, 10).await, 1);
}

/// Goal: messages due together keep the order of their time, then of their publishing.
#[tokio::test]
async fn released_messages_keep_the_order_of_their_time() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    for (n, minutes) in [(1, 30), (2, 20), (3, 20), (4, 10)] {
        let call =
            format!("oncebox.publish('t', '{n}', deliver_at => date_trunc('hour', now()) + '{minutes} min 2 h')");
        accepted(&mut conn, &call).await;
    }
    conn.execute("update oncebox.outbox_scheduled set deliver_at = deliver_at - interval '5 h'").await.unwrap();
    assert_eq!(lab.number("select oncebox.outbox_release_due(100)::bigint").await, 4);
    let order: Vec<String> = sqlx::query_scalar("select convert_from(body, 'UTF8') from oncebox.outbox order by seq")
        .fetch_all(&mut conn)
        .await
        .unwrap();
    assert_eq!(order, ["4", "2", "3", "1"]);
}

/// Goal: the settings that SQL reads are obeyed at the next call.
#[tokio::test]
async fn settings_are_obeyed() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    conn.execute("update oncebox.setting set payload_limit_bytes = 10, dedup_window = '3 hours'").await.unwrap();
    accepted(&mut conn, "oncebox.publish('t', '1234567890')").await;
    assert_refused(&mut conn, "oncebox.publish('t', '12345678901')", "payload").await;
    let old = |minutes: i32| {
        format!("oncebox.publish('t', '1', message_id => oncebox.uuid_v7(now() - interval '{minutes} min'))")
    };
    accepted(&mut conn, &old(179)).await;
    assert_refused(&mut conn, &old(181), "message_id").await;
    conn.execute("update oncebox.setting set payload_limit_bytes = 2097152").await.unwrap();
    accepted(&mut conn, "oncebox.publish('t', to_jsonb(repeat('p', 2097150)))").await;
    for wrong in [
        "payload_limit_bytes = 0",
        "payload_limit_bytes = 134217729",
        "dedup_window = '15 days'",
        "dedup_window = '1 hour'",
        "only_row = false",
    ] {
        let error = conn.execute(AssertSqlSafe(format!("update oncebox.setting set {wrong}"))).await.unwrap_err();
        assert_eq!(database_error(error).0, "23514", "{wrong}");
    }
}

/// Goal: lanes are set before the first message only, logged or scheduled, and messages of one key share a lane.
#[tokio::test]
async fn lanes_are_fixed_by_the_first_message() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let set = |lanes: i32| AssertSqlSafe(format!("update oncebox.setting set lanes = {lanes}"));
    let lanes = "select count(*) from oncebox.outbox_lease l join oncebox.outbox_plan p using (lane)";
    for n in [8, 2, 5] {
        conn.execute(set(n)).await.unwrap();
        assert_eq!(lab.number(lanes).await, i64::from(n));
    }
    for wrong in [0, 65] {
        assert_eq!(database_error(conn.execute(set(wrong)).await.unwrap_err()).0, "23514");
    }
    for later in ["", ", deliver_at => now() + interval '1 h'"] {
        conn.execute("begin").await.unwrap();
        accepted(&mut conn, &format!("oncebox.publish('t', '1'{later})")).await;
        let error = conn.execute(set(3)).await.unwrap_err();
        let (code, message) = database_error(error);
        assert_eq!((code.as_str(), message.starts_with("lanes: ")), ("55000", true), "{message}");
        conn.execute("rollback").await.unwrap();
    }
    for (n, key) in (0..300).map(|n| (n, n % 30)) {
        let key = if key == 0 { "null".to_owned() } else { format!("'key {key}'") };
        let later = if n % 2 == 0 { "" } else { ", deliver_at => now() + interval '10 ms'" };
        accepted(&mut conn, &format!("oncebox.publish('t{n}', '{n}', key => {key}{later})")).await;
    }
    crate::support::eventually_number(
        &mut conn,
        "select oncebox.outbox_release_due(500) + count(*) from oncebox.outbox_scheduled",
        0,
    )
    .await;
    assert_eq!(lab.number("select count(*) from oncebox.outbox").await, 300);
    assert_eq!(lab.number("select count(distinct lane) from oncebox.outbox where lane between 0 and 4").await, 5);
    let torn = "select count(*) from (
        select from oncebox.outbox where key is not null group by key having count(distinct lane) > 1) as k";
    assert_eq!(lab.number(torn).await, 0, "keys in several lanes");
    lab.number("select count(oncebox.publish('t', '1')) from generate_series(1, 200)").await;
    assert_eq!(lab.number("select count(distinct lane) from oncebox.outbox where key is null").await, 5);
    conn.execute(set(6)).await.unwrap_err();
    conn.execute(set(5)).await.unwrap();
}

/// Goal: a publisher that looked before the lanes changed, or whose snapshot is older, does not put its key into
/// another lane than those after it.
#[tokio::test]
async fn lanes_do_not_change_under_a_publisher() {
    // A session that published before runs plans made before.
    for (level, calls_before) in [("read committed", 0), ("read committed", 20), ("repeatable read", 0)] {
        let lab = Lab::shared().await;
        let mut publisher = lab.connect().await;
        let mut operator = lab.connect().await;
        publisher.execute("begin").await.unwrap();
        for _ in 0..calls_before {
            accepted(&mut publisher, "oncebox.publish('t', '0')").await;
        }
        publisher.execute("rollback; truncate oncebox.outbox").await.unwrap();
        // As if nothing had been published: else the lanes are fixed.
        publisher.execute("select setval('oncebox.outbox_seq', 1, false)").await.unwrap();
        let pid = crate::support::number(&mut publisher, "select pg_backend_pid()::bigint").await;
        publisher.execute(AssertSqlSafe(format!("begin isolation level {level}"))).await.unwrap();
        publisher.execute("select count(*) from oncebox.setting").await.unwrap();
        operator.execute("begin").await.unwrap();
        operator.execute("update oncebox.setting set lanes = 64").await.unwrap();
        let publishing = tokio::spawn(async move {
            for key in 1..=20 {
                call(&mut publisher, &format!("oncebox.publish('t', '1', key => 'key {key}')")).await?;
            }
            publisher.execute("commit").await
        });
        let blocked = format!("select count(*) from pg_stat_activity where pid = {pid} and wait_event_type = 'Lock'");
        crate::support::eventually_number(&mut lab.connect().await, &blocked, 1).await;
        operator.execute("commit").await.unwrap();
        match publishing.await.unwrap() {
            Ok(_) => {}
            // It runs again as a whole, as after any other 40001.
            Err(error) => assert_eq!((database_error(error).0.as_str(), level), ("40001", "repeatable read")),
        }
        for key in 1..=20 {
            accepted(&mut operator, &format!("oncebox.publish('t', '2', key => 'key {key}')")).await;
        }
        let torn = "select count(*) from (
            select from oncebox.outbox group by key having count(distinct lane) > 1) as k";
        assert_eq!(lab.number(torn).await, 0, "keys in several lanes under {level}");
    }
}

/// Goal: the limits hold for scheduled messages and for ids, at the limit and beyond it, also after other settings
/// were changed in the same session.
#[tokio::test]
async fn limits_hold_for_scheduled_messages() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    conn.execute("update oncebox.setting set payload_limit_bytes = 10").await.unwrap();
    let later = "deliver_at => now() + interval '1 h'";
    accepted(&mut conn, &format!("oncebox.publish('t', '1234567890', {later})")).await;
    assert_refused(&mut conn, &format!("oncebox.publish('t', '12345678901', {later})"), "payload").await;
    let id = |minutes: i32| format!("message_id => oncebox.uuid_v7(clock_timestamp() - interval '{minutes} min')");
    conn.execute("update oncebox.setting set dedup_window = '3 hours'").await.unwrap();
    for later in ["", ", deliver_at => now() + interval '1 h'"] {
        accepted(&mut conn, &format!("oncebox.publish('t', '1', {}{later})", id(179))).await;
        assert_refused(&mut conn, &format!("oncebox.publish('t', '1', {}{later})", id(181)), "message_id").await;
    }
    assert_eq!(lab.number(WRITTEN).await, 3);
}

/// Goal: the row that publish reads is a copy of the settings and of the ring after each way they change, rolled-back
/// changes leave none of it, and without settings nothing is published, nor lost silently.
#[tokio::test]
async fn what_publish_reads_follows_the_settings_and_the_ring() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let differs = "select count(*) from oncebox.setting as s, oncebox.outbox_ring as r
        full join oncebox.outbox_current as c on true
        where (c.slot, c.lanes, c.payload_limit_bytes, c.dedup_window)
            is distinct from (r.slot, s.lanes, s.payload_limit_bytes, s.dedup_window)";
    let differs = differs.replace("s, oncebox.outbox_ring as r", "s cross join oncebox.outbox_ring as r");
    for change in [
        "update oncebox.setting set lanes = 3",
        "update oncebox.setting set payload_limit_bytes = 77, dedup_window = '1 day'",
        "update oncebox.outbox_ring set slot = 5",
        "begin; update oncebox.outbox_ring set slot = 6; update oncebox.setting set lanes = 7; rollback",
        "delete from oncebox.setting; insert into oncebox.setting default values",
    ] {
        conn.execute(AssertSqlSafe(change)).await.unwrap();
        assert_eq!(lab.number(&differs).await, 0, "{change}");
    }
    // Both at once, in sessions that do not see each other.
    let mut other = lab.connect().await;
    conn.execute("begin; update oncebox.setting set lanes = 2").await.unwrap();
    let turn = tokio::spawn(async move { other.execute("update oncebox.outbox_ring set slot = 3").await.map(drop) });
    let waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%set slot = 3%'
        and datname = current_database()";
    crate::support::eventually_number(&mut lab.connect().await, waits, 1).await;
    conn.execute("commit").await.unwrap();
    turn.await.unwrap().unwrap();
    assert_eq!(lab.number(&differs).await, 0, "after two at once");
    accepted(&mut conn, "oncebox.publish('t', '1')").await;
    assert_eq!(lab.number("select slot::bigint from oncebox.outbox").await, 3);

    conn.execute("delete from oncebox.setting").await.unwrap();
    for later in ["", ", deliver_at => now() + interval '1 h'"] {
        let error = call(&mut conn, &format!("oncebox.publish('t', '1'{later})")).await.unwrap_err();
        assert_eq!(database_error(error).0, "P0002");
    }
    let insert = "oncebox.outbox_insert('t', '', 't', null, '{}', gen_random_uuid(), now(), null)";
    assert_eq!(database_error(call(&mut conn, insert).await.unwrap_err()).0, "P0002");
    assert_eq!(lab.number(WRITTEN).await, 1);
}

/// Goal: the Rust twin passes on every option, reports refusals by name and everything else as the database's error.
#[tokio::test]
async fn the_rust_twin_publishes_the_same() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let id = MessageId(Uuid::now_v7());
    let at = SystemTime::UNIX_EPOCH + Duration::from_micros(4_000_000_000_123_456);
    let payload = json!({ "total": 9.5, "text": "é" });
    let full = NewMessage::json("order.placed", payload.clone())
        .key("customer 1")
        .header("traceparent", "00-1-2-03")
        .header("n", 5)
        .message_id(id)
        .deliver_at(at)
        .expires_at(at + Duration::from_secs(60));
    let bytes = NewMessage::bytes("blob", vec![0, 255, 10], "image/png");

    let mut transaction = conn.begin().await.unwrap();
    assert_eq!(outbox::publish(&mut transaction, full.clone()).await.unwrap(), id);
    outbox::publish(&mut transaction, bytes.clone()).await.unwrap();
    transaction.rollback().await.unwrap();
    assert_eq!(lab.number(WRITTEN).await, 0);

    let mut transaction = conn.begin().await.unwrap();
    outbox::publish(&mut transaction, full).await.unwrap();
    let plain = outbox::publish(&mut transaction, NewMessage::json("t", Value::Null)).await.unwrap();
    let blob = outbox::publish(&mut transaction, bytes.header("é", true).expires_at(at)).await.unwrap();
    transaction.commit().await.unwrap();

    type Scheduled = (Uuid, String, Option<String>, String, Value, Vec<u8>, i64, i64);
    let scheduled: Scheduled = sqlx::query_as(
        "select message_id, topic, key, content_type, headers, body, (extract(epoch from deliver_at) * 1000000)::bigint,
            extract(epoch from expires_at - deliver_at)::bigint
        from oncebox.outbox_scheduled",
    )
    .fetch_one(&mut conn)
    .await
    .unwrap();
    assert_eq!((scheduled.0, scheduled.1.as_str(), scheduled.2.as_deref()), (id.0, "order.placed", Some("customer 1")));
    assert_eq!(
        (scheduled.3.as_str(), scheduled.4),
        ("application/json", json!({ "n": 5, "traceparent": "00-1-2-03" }))
    );
    assert_eq!(serde_json::from_slice::<Value>(&scheduled.5).unwrap(), payload);
    assert!((scheduled.6 - 4_000_000_000_123_456).abs() <= 1, "{} µs", scheduled.6);
    assert_eq!(scheduled.7, 60);

    type Logged = (String, Option<String>, String, Value, Vec<u8>, Option<i64>);
    let logged = "select topic, key, content_type, headers, body, extract(epoch from expires_at)::bigint
        from oncebox.outbox where message_id = $1";
    let row: Logged = sqlx::query_as(logged).bind(plain.0).fetch_one(&mut conn).await.unwrap();
    assert_eq!(row, ("t".to_owned(), None, "application/json".to_owned(), json!({}), b"null".to_vec(), None));
    assert_eq!(plain.0.get_version_num(), 7);
    let row: Logged = sqlx::query_as(logged).bind(blob.0).fetch_one(&mut conn).await.unwrap();
    let expected = ("blob".to_owned(), None, "image/png".to_owned(), json!({ "é": true }), vec![0, 255, 10]);
    assert_eq!((row.0, row.1, row.2, row.3, row.4), expected);
    assert_eq!(row.5, Some(4_000_000_000));

    let before = lab.number(WRITTEN).await;
    for (message, argument) in [
        (NewMessage::json("", json!(1)), "topic: "),
        (NewMessage::bytes("t", vec![], ""), "content_type: "),
        (NewMessage::json("t", json!(1)).header("CC", "q"), "headers: "),
        (NewMessage::json("t", json!(1)).header("a", json!(null)), "headers: "),
        (NewMessage::json("t", json!(1)).key("k".repeat(256)), "key: "),
        (NewMessage::json("t", json!("p".repeat(1 << 20))), "payload: "),
        (NewMessage::json("t", json!(1)).deliver_at(at).expires_at(at), "expires_at: "),
        (NewMessage::json("t", json!(1)).message_id(MessageId(Uuid::from_u128(7 << 76 | 1 << 63))), "message_id: "),
    ] {
        match outbox::publish(&mut conn, message).await {
            Err(PublishError::Refused(text)) => assert!(text.starts_with(argument), "{text}"),
            other => panic!("{argument}{other:?}"),
        }
    }
    conn.execute(AssertSqlSafe(format!("create role {0}; set role {0}", unique("nobody")))).await.unwrap();
    match outbox::publish(&mut conn, NewMessage::json("t", json!(1))).await {
        Err(PublishError::Database(error)) => assert_eq!(database_error(error).0, "42501"),
        other => panic!("{other:?}"),
    }
    assert_eq!(lab.number(WRITTEN).await, before);
}

/// What a caller can put in the way of code that runs as the owner: its own functions and operators under the names
/// that the code uses, and its own tables. Each says who ran it, then does what the real one does.
pub async fn set_trap(conn: &mut PgConnection, role: &str, group: &str) {
    let schema = format!("{role}_trap");
    let mut sql = format!(
        "create role {role} in role {group};
        create schema {schema} authorization {role};
        set role {role};
        create table {schema}.sprung (who text, what text);
        grant all on {schema}.sprung to public;
        grant usage on schema {schema} to public;"
    );
    let functions = [
        ("nextval", "text", "bigint", "pg_catalog.nextval($1::regclass)"),
        ("octet_length", "text", "int", "pg_catalog.octet_length($1)"),
        ("octet_length", "bytea", "int", "pg_catalog.octet_length($1)"),
        ("convert_to", "text, name", "bytea", "pg_catalog.convert_to($1, $2)"),
        ("jsonb_typeof", "jsonb", "text", "pg_catalog.jsonb_typeof($1)"),
        ("isfinite", "timestamptz", "boolean", "pg_catalog.isfinite($1)"),
        ("clock_timestamp", "", "timestamptz", "pg_catalog.clock_timestamp()"),
        ("pg_current_xact_id", "", "xid8", "pg_catalog.pg_current_xact_id()"),
        ("num_nulls", "uuid, text, bigint", "int", "3"),
        ("hashtextextended", "text, bigint", "bigint", "pg_catalog.hashtextextended($1, $2)"),
        ("md5", "text", "text", "pg_catalog.md5($1)"),
    ];
    let spring = |what: &str| format!("insert into {schema}.sprung values (current_user, '{what}')");
    for (name, arguments, returns, real) in functions {
        sql += &format!(
            "create function {schema}.{name}({arguments}) returns {returns} language plpgsql as
                $f$ begin {}; return {real}; end $f$;",
            spring(name)
        );
    }
    for (name, left, right, symbol) in [
        ("gt", "timestamptz", "timestamptz", ">"),
        ("gt", "integer", "integer", ">"),
        ("lt", "bigint", "integer", "<"),
        ("ne", "jsonb", "jsonb", "<>"),
        ("le", "bigint", "bigint", "<="),
        ("eq", "text", "text", "="),
    ] {
        sql += &format!(
            "create function {schema}.{name}({left}, {right}) returns boolean language plpgsql as
                $f$ begin {}; return $1 operator(pg_catalog.{symbol}) $2; end $f$;
            create operator {schema}.{symbol} (function = {schema}.{name}, leftarg = {left}, rightarg = {right});",
            spring(symbol)
        );
    }
    // Tables of the session that bear the names of the real ones.
    sql += "create temp table setting (payload_limit_bytes int, dedup_window interval, lanes smallint);
        create temp table outbox (n int); create temp table inbox (n int); create temp table outbox_ring (n int);";
    sql += &format!("set search_path = {schema}, pg_temp, pg_catalog, oncebox; reset role;");
    conn.execute(AssertSqlSafe(sql)).await.unwrap();
}

/// Who ran the caller's code.
pub async fn sprung(conn: &mut PgConnection, role: &str) -> Vec<(String, String)> {
    let query = format!("select distinct who, what from {role}_trap.sprung order by 1, 2");
    sqlx::query_as(AssertSqlSafe(query)).fetch_all(conn).await.unwrap()
}

/// Goal: the owner's rights never run the caller's functions, operators or tables, and the trap is one: without the
/// functions' own search path it springs.
#[tokio::test]
async fn the_owner_runs_none_of_the_callers_code() {
    let lab = Lab::shared().await;
    let role = unique("hostile");
    let mut conn = connect(&lab.database_url).await;
    set_trap(&mut conn, &role, "oncebox_producer").await;
    let calls = [
        "oncebox.publish('t', '1', key => 'k', headers => '{\"a\": 1}', message_id => oncebox_id(),
            deliver_at => now() - interval '1 h', expires_at => now() + interval '1 h')",
        "oncebox.publish('t', '1', deliver_at => now() + interval '1 h')",
        "oncebox.publish_bytes('t', '1', 'text/plain', key => 'k', headers => '{\"a\": 1.5}')",
    ]
    .map(|call| call.replace("oncebox_id()", &format!("'{}'", Uuid::now_v7())));
    conn.execute(AssertSqlSafe(format!("set role {role}"))).await.unwrap();
    for text in &calls {
        accepted(&mut conn, text).await;
    }
    assert_eq!(sprung(&mut conn, &role).await, []);
    assert_eq!(lab.number(WRITTEN).await, 3);

    // The trap itself: so that the test cannot pass by being harmless.
    for (function, text) in [("publish", &calls[0]), ("publish_bytes", &calls[2])] {
        let reset = format!(
            "do $$ begin execute format('alter function %s reset search_path', 'oncebox.{function}'::regproc); end $$"
        );
        lab.sql(&reset).await;
        let _ = call(&mut conn, text).await;
        let found = sprung(&mut conn, &role).await;
        assert!(found.iter().any(|(who, _)| who == "oncebox"), "{function}: the trap does not work: {found:?}");
        conn.execute(AssertSqlSafe(format!("delete from {role}_trap.sprung"))).await.unwrap();
    }
}
