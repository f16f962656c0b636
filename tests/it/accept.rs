//! Goal: `oncebox.accept` says true once for a message, whatever transactions, twins in flight, clocks and folds there
//! are, and forgets nothing when its transaction rolls back.

use crate::publish::{set_trap, sprung};
use crate::support::{Lab, eventually_number, number, unique};
use oncebox::inbox;
use oncebox::message::{MessageId, Position};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// Calls accept with `arguments` after the consumer's name.
async fn accept(conn: &mut PgConnection, arguments: &str) -> Result<bool, sqlx::Error> {
    let call = format!("select oncebox.accept('c', {arguments})");
    sqlx::query_scalar(AssertSqlSafe(call)).fetch_one(conn).await
}

async fn accepted(conn: &mut PgConnection, arguments: &str) -> bool {
    accept(conn, arguments).await.unwrap_or_else(|error| panic!("{arguments}: {error}"))
}

/// The SQLSTATE and text of a refusal.
async fn refused(conn: &mut PgConnection, arguments: &str) -> (String, String) {
    match accept(conn, arguments).await {
        Ok(answer) => panic!("{arguments}: {answer}"),
        Err(error) => code(error),
    }
}

fn code(error: sqlx::Error) -> (String, String) {
    let error = error.into_database_error().expect("an error of the database");
    (error.code().unwrap_or_default().into_owned(), error.message().to_owned())
}

/// A UUIDv7 of now plus `interval`.
async fn id(conn: &mut PgConnection, interval: &str) -> Uuid {
    let query = format!("select oncebox.uuid_v7(clock_timestamp() + interval '{interval}')");
    sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(conn).await.unwrap()
}

/// A version 4 uuid, which this crate's features do not make.
fn v4() -> Uuid {
    uuid::Builder::from_random_bytes(Uuid::now_v7().as_u128().to_le_bytes()).into_uuid()
}

async fn run(conn: &mut PgConnection, sql: &str) {
    conn.execute(AssertSqlSafe(sql)).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Calls accept on a task of its own, and returns when it waits for a lock.
async fn accept_and_wait(
    lab: &Lab,
    mut conn: PgConnection,
    arguments: String,
) -> JoinHandle<(PgConnection, Result<bool, sqlx::Error>)> {
    let pid = number(&mut conn, "select pg_backend_pid()::bigint").await;
    let task = tokio::spawn(async move {
        let answer = accept(&mut conn, &arguments).await;
        (conn, answer)
    });
    let waits = format!("select count(*) from pg_stat_activity where pid = {pid} and wait_event_type = 'Lock'");
    eventually_number(&mut lab.connect().await, &waits, 1).await;
    task
}

const ROWS: &str = "select count(*) from oncebox.inbox";

/// Goal: true the first time, false ever after, for each consumer by itself, for ids of any version, in SQL and Rust.
#[tokio::test]
async fn a_message_is_new_once() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let place = Position { source: v4(), stream: "t#0".to_owned(), offset: 7 };
    let ids = [
        id(&mut conn, "0").await,
        id(&mut conn, "-6 days").await,
        id(&mut conn, "23 hours").await,
        id(&mut conn, "25 hours").await,
        id(&mut conn, "90 days").await,
        v4(),
        Uuid::new_v5(&Uuid::NAMESPACE_URL, b"x"),
        Uuid::nil(),
        Uuid::max(),
    ];
    for id in ids {
        for consumer in ["a", "b"] {
            for first in [true, false, false] {
                let answer = inbox::accept(&mut conn, consumer, MessageId(id), Some(&place)).await.unwrap();
                assert_eq!(answer, first, "{id} for {consumer}");
            }
            assert!(!inbox::accept(&mut conn, consumer, MessageId(id), None).await.unwrap());
        }
    }
    assert_eq!(lab.number(ROWS).await, 2 * ids.len() as i64);
    let whole = "select count(*) from oncebox.inbox where stream = 't#0' and \"offset\" = 7 and source is not null
        and accepted_at between now() - interval '1 min' and clock_timestamp()";
    assert_eq!(lab.number(whole).await, 2 * ids.len() as i64);
    let far = "select count(*) from oncebox.inbox_16";
    assert_eq!(lab.number(far).await, 2 * 6, "no UUIDv7, or more than a day ahead");
}

/// Goal: what rolled back was not accepted: plain, by an error, in a savepoint and prepared.
#[tokio::test]
async fn a_rollback_forgets() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let id = format!("'{}'", id(&mut conn, "0").await);
    for undo in ["rollback", "prepare transaction 'a'; rollback prepared 'a'"] {
        run(&mut conn, "begin").await;
        assert!(accepted(&mut conn, &id).await);
        for statement in undo.split("; ") {
            run(&mut conn, statement).await;
        }
        assert_eq!(lab.number(ROWS).await, 0);
    }
    run(&mut conn, "begin").await;
    assert!(accepted(&mut conn, &id).await);
    conn.execute("select 1 / 0").await.unwrap_err();
    run(&mut conn, "commit").await;

    run(&mut conn, "begin").await;
    run(&mut conn, "savepoint s").await;
    assert!(accepted(&mut conn, &id).await);
    run(&mut conn, "rollback to s").await;
    assert!(accepted(&mut conn, &id).await);
    assert!(!accepted(&mut conn, &id).await, "twice in one transaction");
    run(&mut conn, "commit").await;
    assert!(!accepted(&mut conn, &id).await);
}

/// Goal: a second caller waits for the first one's outcome: false when it commits, true when it rolls back.
#[tokio::test]
async fn a_twin_in_flight_is_waited_for() {
    let lab = Lab::shared().await;
    let mut first = lab.connect().await;
    for (end, expected) in [("commit", false), ("rollback", true), ("prepare", false)] {
        for uuid in [id(&mut first, "0").await, id(&mut first, "25 h").await, v4()] {
            let arguments = format!("'{uuid}'");
            run(&mut first, "begin").await;
            assert!(accepted(&mut first, &arguments).await);
            if end == "prepare" {
                run(&mut first, "prepare transaction 'twin'").await;
            }
            let second = accept_and_wait(&lab, lab.connect().await, arguments.clone()).await;
            run(&mut first, if end == "prepare" { "commit prepared 'twin'" } else { end }).await;
            let (mut second, answer) = second.await.unwrap();
            assert_eq!(answer.unwrap(), expected, "after {end}");
            assert!(!accepted(&mut second, &arguments).await);
        }
    }
    let none = "select count(*) from (select from oncebox.inbox group by message_id having count(*) > 1) as twice";
    assert_eq!(lab.number(none).await, 0);
}

/// Goal: under repeatable read and serializable, a twin that committed after the snapshot is 40001, never a second
/// `true`; the transaction run again gets `false`.
#[tokio::test]
async fn an_older_snapshot_is_a_conflict() {
    let lab = Lab::shared().await;
    let mut old = lab.connect().await;
    let mut other = lab.connect().await;
    for level in ["repeatable read", "serializable"] {
        for uuid in [id(&mut old, "0").await, id(&mut old, "-20 days").await, v4()] {
            let arguments = format!("'{uuid}', gen_random_uuid(), 's', 1");
            run(&mut old, &format!("begin isolation level {level}")).await;
            run(&mut old, "select count(*) from oncebox.inbox").await;
            assert!(accepted(&mut other, &arguments).await);
            assert_eq!(refused(&mut old, &arguments).await.0, "40001");
            run(&mut old, "rollback").await;
            run(&mut old, &format!("begin isolation level {level}")).await;
            assert!(!accepted(&mut old, &arguments).await);
            run(&mut old, "commit").await;
        }
    }
}

/// Goal: arguments that make no sense are refused by name; a place is whole or absent.
#[tokio::test]
async fn arguments_are_checked() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let uuid = "gen_random_uuid()";
    for (arguments, name) in [
        ("null".to_owned(), "message_id"),
        (format!("{uuid}, {uuid}"), "source, stream and offset"),
        (format!("{uuid}, null, 's'"), "source, stream and offset"),
        (format!("{uuid}, null, null, 1"), "source, stream and offset"),
        (format!("{uuid}, {uuid}, 's'"), "source, stream and offset"),
        (format!("{uuid}, {uuid}, null, 1"), "source, stream and offset"),
        (format!("{uuid}, null, 's', 1"), "source, stream and offset"),
        (format!("{uuid}, {uuid}, 's', 0"), "offset"),
        (format!("{uuid}, {uuid}, 's', -1"), "offset"),
    ] {
        let (code, message) = refused(&mut conn, &arguments).await;
        assert_eq!(
            (code.as_str(), message.starts_with(&format!("{name}: "))),
            ("22023", true),
            "{arguments}: {message}"
        );
    }
    for consumer in ["null", "''", "repeat('c', 256)", "repeat('é', 128)"] {
        let call = format!("select oncebox.accept({consumer}, {uuid})");
        let (code, message) = code(conn.execute(AssertSqlSafe(call)).await.unwrap_err());
        assert_eq!((code.as_str(), message.starts_with("consumer: ")), ("22023", true), "{consumer}: {message}");
    }
    assert_eq!(lab.number(ROWS).await, 0);
    let longest = format!("select oncebox.accept(repeat('é', 127) || 'x', {uuid}, {uuid}, 's', 9223372036854775807)");
    run(&mut conn, &longest).await;
    run(&mut conn, "select oncebox.accept(consumer => 'c', message_id => gen_random_uuid())").await;
    assert_eq!(lab.number(ROWS).await, 2);
}

/// Goal: the same id at a second place is applied once, and both places are settled: the second is remembered.
#[tokio::test]
async fn a_second_place_is_an_alias() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let source = v4();
    for uuid in [id(&mut conn, "0").await, v4(), id(&mut conn, "25 h").await] {
        let at = |stream: &str, offset: i64| format!("'{uuid}', '{source}', '{stream}', {offset}");
        let aliases = format!("select count(*) from oncebox.inbox_alias where message_id = '{uuid}'");
        let s = &uuid.to_string();
        assert!(accepted(&mut conn, &at(s, 1)).await);
        for again in [at(s, 1), format!("'{uuid}'")] {
            assert!(!accepted(&mut conn, &again).await);
        }
        assert_eq!(lab.number(&aliases).await, 0, "the same place is no other");
        for _ in 0..2 {
            assert!(!accepted(&mut conn, &at(s, 2)).await);
            assert!(!accepted(&mut conn, &at(&format!("{s} other"), 1)).await);
        }
        assert_eq!(lab.number(&aliases).await, 2);
        let mine = format!(
            "{aliases} and consumer = 'c' and source = '{source}' and (stream, \"offset\") in (('{s}', 2), ('{s} other', 1))"
        );
        assert_eq!(lab.number(&mine).await, 2);
    }
    // First without a place, then with one.
    let uuid = v4();
    assert!(accepted(&mut conn, &format!("'{uuid}'")).await);
    assert!(!accepted(&mut conn, &format!("'{uuid}', '{source}', 's', 9")).await);
    assert_eq!(lab.number(&format!("select count(*) from oncebox.inbox_alias where message_id = '{uuid}'")).await, 1);
}

/// Goal: a UUIDv7 older than the window without its place cannot be proven new: OB001, and no row; with its place it is
/// accepted, once; the window is the setting's.
#[tokio::test]
async fn an_old_id_needs_its_place() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let source = v4();
    let (young, old) = (id(&mut conn, "-6 days -23 h -59 min").await, id(&mut conn, "-7 days -1 min").await);
    assert!(accepted(&mut conn, &format!("'{young}'")).await);
    let (code, message) = refused(&mut conn, &format!("'{old}'")).await;
    assert_eq!(code, "OB001");
    assert!(message.contains(&old.to_string()), "{message}");
    assert_eq!(lab.number(ROWS).await, 1);
    for first in [true, false] {
        assert_eq!(accepted(&mut conn, &format!("'{old}', '{source}', 's', 1")).await, first);
    }
    // Its row is there: it is proven done.
    assert!(!accepted(&mut conn, &format!("'{old}'")).await);
    let ancient = format!("'{}', '{source}', 's', 2", id(&mut conn, "-20 years").await);
    assert!(accepted(&mut conn, &ancient).await);
    assert!(!accepted(&mut conn, &ancient).await);

    run(&mut conn, "update oncebox.setting set dedup_window = '2 hours'").await;
    let (young, old) = (id(&mut conn, "-119 min").await, id(&mut conn, "-121 min").await);
    assert!(accepted(&mut conn, &format!("'{young}'")).await);
    assert_eq!(refused(&mut conn, &format!("'{old}'")).await.0, "OB001");
    // Without a time there is nothing to be too old.
    assert!(accepted(&mut conn, &format!("'{}'", v4())).await);
}

/// Goal: what was folded into the ledger stays done, without leaving a row; the ledger is each consumer's, source's and
/// stream's own; and it is looked at before the window has quite ended, since a fold may be ahead of this clock.
#[tokio::test]
async fn the_ledger_never_forgets() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let (source, other) = (v4(), v4());
    let entry = format!("insert into oncebox.inbox_ledger values ('c', '{source}', 's', '{{[1,11),[20,21)}}')");
    run(&mut conn, &entry).await;
    for age in ["-8 days", "-6 days -23 h -30 min", "-300 days"] {
        for (source, stream, offset, new) in [
            (source, "s", 1, false),
            (source, "s", 10, false),
            (source, "s", 20, false),
            (source, "s", 11, true),
            (source, "s", 19, true),
            (source, "t", 1, true),
            (other, "s", 1, true),
        ] {
            let uuid = id(&mut conn, age).await;
            let arguments = format!("'{uuid}', '{source}', '{stream}', {offset}");
            assert_eq!(accepted(&mut conn, &arguments).await, new, "{age}, {stream}, {offset}");
            let rows = format!("{ROWS} where message_id = '{uuid}'");
            assert_eq!(lab.number(&rows).await, i64::from(new), "{age}, {stream}, {offset}");
            let call = format!("select case oncebox.accept('d', {arguments}) when true then 1 else 0 end::bigint");
            assert_eq!(lab.number(&call).await, 1, "another consumer");
        }
    }
}

/// Goal: a fold that is under way is waited for: its row or its ledger entry is seen, never neither.
#[tokio::test]
async fn a_fold_in_flight_is_waited_for() {
    let lab = Lab::shared().await;
    let mut folder = lab.connect().await;
    let source = v4();
    let arguments = format!("'{}', '{source}', 's', 1", id(&mut folder, "-8 days").await);
    assert!(accepted(&mut folder, &arguments).await);
    run(&mut folder, "begin").await;
    run(&mut folder, "update oncebox.inbox_horizon set folded_until = now()").await;
    run(&mut folder, &format!("insert into oncebox.inbox_ledger values ('c', '{source}', 's', '{{[1,2)}}')")).await;
    run(&mut folder, "delete from oncebox.inbox").await;
    let late = accept_and_wait(&lab, lab.connect().await, arguments.clone()).await;
    run(&mut folder, "commit").await;
    assert!(!late.await.unwrap().1.unwrap(), "applied twice");
    assert_eq!(lab.number(ROWS).await, 0);
    // With an older snapshot it is a conflict.
    let mut old = lab.connect().await;
    run(&mut old, "begin isolation level repeatable read").await;
    run(&mut old, "select 1 from oncebox.inbox").await;
    run(&mut folder, "update oncebox.inbox_horizon set folded_until = now()").await;
    assert_eq!(refused(&mut old, &arguments).await.0, "40001");
}

/// Goal: an id that lay more than a day ahead when it was accepted stays done when it lies within the day, and the
/// other way round for a clock that was set back.
#[tokio::test]
async fn the_border_of_a_day_is_no_gap() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    for (ahead, leaf) in [
        ("0", "16"),
        ("23 h", "16"),
        ("23 h 59 min", "16"),
        ("24 h 30 min", "(oncebox.uuid_v7_ms(m.id) / 86400000) % 16"),
    ] {
        let uuid = id(&mut conn, ahead).await;
        let by_hand = format!(
            "insert into oncebox.inbox (leaf, consumer, message_id, source, stream, \"offset\", accepted_at)
            select {leaf}, 'c', m.id, null, null, null, now() from (values ('{uuid}'::uuid)) as m (id)"
        );
        run(&mut conn, &by_hand).await;
        assert!(!accepted(&mut conn, &format!("'{uuid}'")).await, "{ahead} ahead");
        assert_eq!(lab.number(&format!("{ROWS} where message_id = '{uuid}'")).await, 1, "{ahead} ahead");
        // The alias finds the row where it lies.
        assert!(!accepted(&mut conn, &format!("'{uuid}', '{uuid}', 's', 1")).await, "{ahead} ahead");
        assert_eq!(lab.number(&format!("select count(*) from oncebox.inbox_alias where source = '{uuid}'")).await, 1);
    }
}

/// Goal: of two callers around the moment at which an id comes to lie within the day, one gets true: also when the
/// first is in flight meanwhile, and when the second has an older snapshot.
#[tokio::test]
async fn the_border_passes_between_two_callers() {
    let lab = Lab::shared().await;
    let mut first = lab.connect().await;
    for (end, level, expected) in [
        ("commit", "read committed", Some(false)),
        ("rollback", "read committed", Some(true)),
        ("commit", "repeatable read", None),
    ] {
        let uuid = id(&mut first, "1 day 1 s").await;
        let arguments = format!("'{uuid}'");
        let mut second = lab.connect().await;
        run(&mut second, &format!("begin isolation level {level}")).await;
        run(&mut second, ROWS).await;
        run(&mut first, "begin").await;
        assert!(accepted(&mut first, &arguments).await);
        assert_eq!(number(&mut first, "select count(*) from oncebox.inbox_16").await, 1, "it was too slow");
        let ahead = format!(
            "select (oncebox.uuid_v7_ms('{uuid}') >= extract(epoch from clock_timestamp()) * 1000 + 86400000)::int::bigint"
        );
        eventually_number(&mut lab.connect().await, &ahead, 0).await;
        let second = accept_and_wait(&lab, second, arguments.clone()).await;
        run(&mut first, end).await;
        let (mut second, answer) = second.await.unwrap();
        match (answer, expected) {
            (Ok(answer), Some(expected)) => assert_eq!(answer, expected, "{level}, {end}"),
            (Err(error), None) => assert_eq!(code(error).0, "40001", "{level}, {end}"),
            (answer, _) => panic!("{level}, {end}: {answer:?}"),
        }
        run(&mut second, "commit").await;
        assert!(!accepted(&mut second, &arguments).await || end == "commit" && expected.is_none());
        assert_eq!(lab.number(&format!("{ROWS} where message_id = '{uuid}'")).await, 1);
        run(&mut second, "delete from oncebox.inbox").await;
    }
}

/// Goal: accept runs none of the caller's functions, operators or tables as its owner; without its own search path it
/// would.
#[tokio::test]
async fn the_owner_runs_none_of_the_callers_code() {
    let lab = Lab::shared().await;
    let role = unique("hostile");
    let mut conn = lab.connect().await;
    set_trap(&mut conn, &role, "oncebox_consumer").await;
    let mut calls = Vec::new();
    for age in ["-8 days", "0", "1 day", "2 days"] {
        calls.push(format!("'{}', gen_random_uuid(), 's', 1", id(&mut lab.connect().await, age).await));
    }
    run(&mut conn, &format!("set role {role}")).await;
    for first in [true, false] {
        for arguments in &calls {
            assert_eq!(accepted(&mut conn, arguments).await, first);
        }
    }
    assert_eq!(sprung(&mut conn, &role).await, []);

    lab.sql("alter function oncebox.accept reset search_path").await;
    let _ = accept(&mut conn, &calls[0]).await;
    let found = sprung(&mut conn, &role).await;
    assert!(found.iter().any(|(who, _)| who == "oncebox"), "the trap does not work: {found:?}");
    conn.close().await.unwrap();
}
