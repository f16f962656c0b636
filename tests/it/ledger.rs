//! Goal: dedup never forgets a message that carries its place: rows become ranges in the ledger as they come, rows go
//! when the window has passed, and no order of accepts, folds, clears and crashes gives a second true or loses a place.

use crate::support::{LIMIT, Lab, eventually_number, number};
use oncebox::db;
use oncebox::inbox::ledger;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::task::{JoinHandle, JoinSet};

const SOURCE: &str = "00000000-0000-0000-0000-00000000000a";

async fn run(conn: &mut PgConnection, sql: &str) {
    conn.execute(AssertSqlSafe(sql)).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

async fn text(conn: &mut PgConnection, query: &str) -> String {
    let text: Option<String> = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(conn).await.expect(query);
    text.unwrap_or_default()
}

async fn accept(conn: &mut PgConnection, arguments: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(AssertSqlSafe(format!("select oncebox.accept('c', {arguments})"))).fetch_one(conn).await
}

async fn accepted(conn: &mut PgConnection, arguments: &str) -> bool {
    accept(conn, arguments).await.unwrap_or_else(|error| panic!("{arguments}: {error}"))
}

async fn refused(conn: &mut PgConnection, arguments: &str) -> String {
    let error = accept(conn, arguments).await.expect_err(arguments);
    db::sqlstate(&error).expect("an error of the database")
}

/// A new message of this age at a place of its own, as arguments for accept.
async fn message(conn: &mut PgConnection, age: &str, stream: &str, offset: i64) -> String {
    let id = match age {
        "v4" => text(conn, "select gen_random_uuid()::text").await,
        age => text(conn, &format!("select oncebox.uuid_v7(clock_timestamp() - interval '{age}')::text")).await,
    };
    format!("'{id}', '{SOURCE}', '{stream}', {offset}")
}

/// The id alone, without its place.
fn id_of(message: &str) -> &str {
    message.split(',').next().unwrap()
}

async fn fold(conn: &mut PgConnection) -> i64 {
    ledger::fold(conn).await.expect("folds")
}

/// Clears until nothing is left to clear; how many steps it took.
async fn clear(conn: &mut PgConnection) -> usize {
    for steps in 0..1_000 {
        if !ledger::clear(conn, 1_000).await.expect("clears") {
            return steps;
        }
    }
    panic!("it does not end");
}

/// As if the rows had been accepted when their ids were made, those without a time 30 days ago.
const AGE: &str = "update oncebox.inbox set accepted_at = least(accepted_at,
    coalesce(to_timestamp(oncebox.uuid_v7_ms(message_id) / 1000.0), clock_timestamp() - interval '30 days'));
    update oncebox.inbox_alias set seen_at = clock_timestamp() - interval '30 days'";
/// The same for every row to come.
const AGE_AT_ONCE: &str = "create function public.age() returns trigger language plpgsql as $$ begin
        new.accepted_at := clock_timestamp() - interval '30 days'; return new; end $$;
    create trigger age before insert on oncebox.inbox for each row execute function public.age()";
const SHRINK: &str = "update oncebox.setting set dedup_window = '2 hours'";
const ROWS: &str = "select count(*) from oncebox.inbox";
const DOUBLED: &str = "select count(*) from oncebox.inbox_doubled";

async fn offsets(conn: &mut PgConnection, stream: &str) -> String {
    text(conn, &format!("select max(offsets::text) from oncebox.inbox_ledger where stream = '{stream}'")).await
}

/// Every place of a row or an alias is in the ledger, and the ledger has no other.
const ODD_PLACES: &str = "
    select count(*) from (
        select consumer, source, stream, \"offset\" from oncebox.inbox where \"offset\" is not null
        union select consumer, source, stream, \"offset\" from oncebox.inbox_alias) as p
    where not exists (select from oncebox.inbox_ledger as l where (l.consumer, l.source, l.stream)
        = (p.consumer, p.source, p.stream) and l.offsets @> p.\"offset\")";

/// Goal: everything ever sent, sent again in random order under a shrunken window, across folds and clears, has no
/// second effect: old and new ids, ids that are no UUIDv7, copies under another place, several consumers and streams.
#[tokio::test]
async fn a_replay_of_everything_has_no_second_effect() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    run(&mut conn, "update oncebox.setting set dedup_window = '14 days'").await;
    run(
        &mut conn,
        "create table sent as
            select row_number() over () as n, consumer, kind, days, i,
                case when kind like 'v4%' then gen_random_uuid()
                    else oncebox.uuid_v7(clock_timestamp() - days * interval '1 day') end as id
            from unnest(array['a', 'b']) as consumer, unnest(array['v7', 'v7 twin', 'v7 bare', 'v4', 'v4 twin', 'v4 bare'])
                as kind, unnest(array[0, 1, 2, 9, 13, 17, 40]) as days, generate_series(1, 12) as i;
        create table effect (n bigint);
        create table unproven (n bigint);
        create sequence place;
        create table copy as
            select s.n, t as twin, case when kind not like '% bare' then nextval('place') end as at
            from sent as s cross join generate_series(1, 2) as t where t = 1 or kind like '% twin';
        create function deliver(m bigint, at bigint) returns void language plpgsql as $$
        declare s sent; begin
            select * into s from sent where n = m;
            if oncebox.accept(s.consumer, s.id, case when at is not null then '00000000-0000-0000-0000-00000000000a'::uuid end,
                case when at is not null then 'stream ' || at % 3 end, at) then
                insert into effect values (m);
            end if;
        exception when sqlstate 'OB001' then insert into unproven values (m);
        end $$",
    )
    .await;
    let total = number(&mut conn, "select count(*) from sent").await;
    let replay = "select deliver(n, at) from copy order by random()";
    run(&mut conn, replay).await;
    let bare_and_ancient = "kind = 'v7 bare' and days > 14";
    let missing =
        format!("select count(*) from sent where not ({bare_and_ancient}) and n not in (select n from effect)");
    let twice = "select count(*) from (select n from effect group by n having count(*) > 1) as t";
    assert_eq!((number(&mut conn, &missing).await, number(&mut conn, twice).await), (0, 0));
    fold(&mut conn).await;

    run(&mut conn, SHRINK).await;
    let mut forgotten = 0;
    for _ in 0..3 {
        run(&mut conn, AGE).await;
        // Without time or place they are remembered for the window only.
        run(
            &mut conn,
            "update oncebox.inbox set accepted_at = clock_timestamp() where leaf = 16 and \"offset\" is null",
        )
        .await;
        let before = number(&mut conn, ROWS).await;
        clear(&mut conn).await;
        forgotten += before - number(&mut conn, ROWS).await;
        run(&mut conn, replay).await;
        assert_eq!((number(&mut conn, &missing).await, number(&mut conn, twice).await), (0, 0));
        fold(&mut conn).await;
        assert_eq!(number(&mut conn, ODD_PLACES).await, 0);
    }
    assert!(forgotten > total / 2, "only {forgotten} of {total} were forgotten: the test does not test");
    assert_eq!(number(&mut conn, DOUBLED).await, 0);
    // Every place is settled, those of copies too, and nothing else is.
    let settled = "select sum(upper(r) - lower(r))::bigint from oncebox.inbox_ledger, unnest(offsets) as r";
    let places = number(&mut conn, "select count(at) from copy").await;
    assert_eq!(number(&mut conn, settled).await, places);
    let refusals = format!(
        "select count(*) from sent where {bare_and_ancient} and n in (select n from effect) or (kind like 'v4%'
            or kind = 'v7 twin') and n in (select n from unproven)"
    );
    assert_eq!(number(&mut conn, &refusals).await, 0);
}

/// Goal: with accepts of one message in many sessions, rollbacks and snapshots of every age, against folds and clears
/// without a pause, each message has exactly one committed true, and the ledger every place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accepts_race_with_folds_and_clears() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    run(&mut conn, &format!("{SHRINK}; {AGE_AT_ONCE}; create table effect (id uuid)")).await;
    let mut messages = Vec::new();
    for n in 0..240 {
        let age = ["1 day", "3 days", "v4", "0", "17 days"][n % 5];
        messages.push(message(&mut conn, age, &format!("s{}", n % 3), 1 + n as i64 / 3).await);
    }
    let messages = std::sync::Arc::new(messages);
    let mut sessions = JoinSet::new();
    for session in 0..6_usize {
        let (mut conn, messages) = (lab.connect().await, messages.clone());
        sessions.spawn(async move {
            let mut conflicts = 0;
            for step in 0..300_usize {
                let mixed = (step * 6 + session).wrapping_mul(0x9e37_79b9) >> 3;
                let message = &messages[(step / 2 + mixed % 40) % messages.len()];
                let level = if mixed % 3 == 0 { "repeatable read" } else { "read committed" };
                run(&mut conn, &format!("begin isolation level {level}")).await;
                if mixed % 3 == 0 {
                    run(&mut conn, "select count(*) from oncebox.setting").await;
                    tokio::task::yield_now().await;
                }
                match accept(&mut conn, message).await {
                    Ok(true) => run(&mut conn, &format!("insert into effect values ({})", id_of(message))).await,
                    Ok(false) => {}
                    Err(error) if db::is_conflict(&error) => {
                        conflicts += 1;
                        run(&mut conn, "rollback").await;
                        continue;
                    }
                    Err(error) => panic!("{message}: {error}"),
                }
                run(&mut conn, if mixed % 5 == 0 { "rollback" } else { "commit" }).await;
            }
            conflicts
        });
    }
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut janitors = JoinSet::new();
    for _ in 0..2 {
        let (mut conn, stopped) = (lab.connect().await, stopped.clone());
        janitors.spawn(async move {
            let mut steps = 0;
            while !*stopped.borrow() {
                fold(&mut conn).await;
                steps += usize::from(ledger::clear(&mut conn, 10).await.expect("clears"));
            }
            steps
        });
    }
    let conflicts: usize = sessions.join_all().await.into_iter().sum();
    stop.send_replace(true);
    let steps: usize = janitors.join_all().await.into_iter().sum();
    assert!(steps > 5 && conflicts > 0, "{steps} steps, {conflicts} conflicts: the test does not test");
    for message in messages.iter() {
        if accepted(&mut conn, message).await {
            run(&mut conn, &format!("insert into effect values ({})", id_of(message))).await;
        }
    }
    assert_eq!(number(&mut conn, "select count(*) from effect").await, 240);
    assert_eq!(number(&mut conn, "select count(distinct id) from effect").await, 240);
    clear(&mut conn).await;
    fold(&mut conn).await;
    for stream in ["s0", "s1", "s2"] {
        assert_eq!(offsets(&mut conn, stream).await, "{[1,81)}");
    }
    assert_eq!(number(&mut conn, DOUBLED).await, 0);
}

/// Starts a fold and returns when it waits for a lock.
async fn fold_and_wait(lab: &Lab) -> (i64, JoinHandle<Result<i64, sqlx::Error>>) {
    let mut conn = lab.connect().await;
    let pid = number(&mut conn, "select pg_backend_pid()::bigint").await;
    let task = tokio::spawn(async move { ledger::fold(&mut conn).await });
    let waits = format!("select count(*) from pg_stat_activity where pid = {pid} and wait_event_type = 'Lock'");
    eventually_number(&mut lab.connect().await, &waits, 1).await;
    (pid, task)
}

/// Goal: a fold that is killed half-way loses nothing and doubles nothing; what is committed while a fold runs is the
/// next one's.
#[tokio::test]
async fn a_killed_fold_changes_nothing() {
    let lab = Lab::shared().await;
    let (mut conn, mut holder) = (lab.connect().await, lab.connect().await);
    let mut arguments = Vec::new();
    for offset in 1..=6 {
        arguments.push(message(&mut conn, "0", "s", offset).await);
    }
    assert!(accepted(&mut conn, &arguments[0]).await);
    assert_eq!(fold(&mut conn).await, 1);
    for (kill, next) in [(true, 1), (false, 3)] {
        assert!(accepted(&mut conn, &arguments[next]).await);
        run(&mut holder, "begin; select from oncebox.inbox_ledger for update").await;
        let (pid, task) = fold_and_wait(&lab).await;
        assert!(accepted(&mut conn, &arguments[next + 1]).await);
        if kill {
            run(&mut conn, &format!("select pg_terminate_backend({pid})")).await;
            task.await.unwrap().unwrap_err();
            run(&mut holder, "commit").await;
            assert_eq!(offsets(&mut conn, "s").await, "{[1,2)}");
            assert_eq!(fold(&mut conn).await, 2);
            assert_eq!(offsets(&mut conn, "s").await, "{[1,4)}");
        } else {
            run(&mut holder, "commit").await;
            assert_eq!(task.await.unwrap().unwrap(), 1);
            assert_eq!(offsets(&mut conn, "s").await, "{[1,5)}");
            assert_eq!(fold(&mut conn).await, 1);
            assert_eq!(offsets(&mut conn, "s").await, "{[1,6)}");
        }
    }
    assert_eq!(fold(&mut conn).await, 0);
    assert_eq!(number(&mut conn, DOUBLED).await, 0);
}

/// Goal: one offset with two ids is found, in one fold and over several, and said; a copy under another place is none.
#[tokio::test]
async fn doubled_offsets_are_found() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let found = "select coalesce(string_agg(stream || ' ' || \"offset\", ', ' order by stream, \"offset\"), '')
        from oncebox.inbox_doubled where consumer = 'c' and source is not null and found_at is not null";
    for (stream, offset) in [("a", 1), ("a", 2), ("a", 2), ("a", i64::MAX), ("b", 5)] {
        let message = message(&mut conn, "0", stream, offset).await;
        assert!(accepted(&mut conn, &message).await);
    }
    let twin = message(&mut conn, "v4", "b", 6).await;
    assert!(accepted(&mut conn, &twin).await);
    assert!(!accepted(&mut conn, &twin.replace(", 6", ", 7")).await);
    fold(&mut conn).await;
    assert_eq!(text(&mut conn, found).await, "a 2");
    assert_eq!(offsets(&mut conn, "a").await, "{[1,3),[9223372036854775807,)}");
    for (stream, offset) in [("a", 1), ("a", 3), ("a", i64::MAX), ("b", 7)] {
        let message = message(&mut conn, "0", stream, offset).await;
        assert!(accepted(&mut conn, &message).await);
    }
    fold(&mut conn).await;
    assert_eq!(text(&mut conn, found).await, format!("a 1, a 2, a {}, b 7", i64::MAX));
    // The copy claims a place that is another message's.
    assert!(!accepted(&mut conn, &twin.replace(", 6", ", 5")).await);
    fold(&mut conn).await;
    assert_eq!(text(&mut conn, found).await, format!("a 1, a 2, a {}, b 5, b 7", i64::MAX));
    // A copy that comes again after its alias could have gone is no second message.
    run(&mut conn, &format!("{SHRINK}; {AGE}")).await;
    run(&mut conn, "update oncebox.inbox set accepted_at = clock_timestamp()").await;
    clear(&mut conn).await;
    assert!(!accepted(&mut conn, &twin.replace(", 6", ", 7")).await);
    fold(&mut conn).await;
    assert_eq!(number(&mut conn, DOUBLED).await, 5);
}

/// Goal: a million messages on ten streams, folded two hundred times, leave a ledger of at most 100 kB: it grows with
/// gaps, not with messages or folds. Rows are written as accept writes them, but by the set: that is quicker.
#[tokio::test]
async fn a_million_messages_leave_a_small_ledger() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    run(&mut conn, "set synchronous_commit = off").await;
    // Of each slice, every fiftieth offset comes with the next one, as messages that were sent again do.
    let slice = "insert into oncebox.inbox (leaf, consumer, message_id, source, stream, \"offset\", accepted_at)
        select oncebox.inbox_day_leaf(m.id), 'c', m.id, m.source, m.stream, m.n, clock_timestamp()
        from (
            select oncebox.uuid_v7(clock_timestamp()) as id, '00000000-0000-0000-0000-00000000000a'::uuid as source,
                'orders.placed#' || s as stream, n
            from generate_series(1, 10) as s, generate_series($1 * 500 - 499, $1 * 500) as n
            where n <= 100000 and n % 50 <> 0
            union all
            select oncebox.uuid_v7(clock_timestamp()), '00000000-0000-0000-0000-00000000000a', 'orders.placed#' || s, n
            from generate_series(1, 10) as s, generate_series($1 * 500 - 999, $1 * 500 - 500) as n
            where n >= 1 and n % 50 = 0
        ) as m";
    for n in 1..=201_i64 {
        sqlx::query(AssertSqlSafe(slice)).bind(n).execute(&mut conn).await.unwrap();
        assert!(fold(&mut conn).await > 0);
    }
    assert_eq!(number(&mut conn, ROWS).await, 1_000_000);
    let size = |table| format!("select pg_total_relation_size('oncebox.{table}')::bigint");
    // Whoever analyses a table meanwhile, catalogs too, holds a snapshot, and as long as that takes old versions of other
    // rows stay: what counts is what is left without them.
    let began = std::time::Instant::now();
    let (bytes, beside) = loop {
        run(&mut conn, "vacuum full oncebox.inbox_ledger").await;
        run(&mut conn, "vacuum full oncebox.inbox_fold").await;
        let sizes = (number(&mut conn, &size("inbox_ledger")).await, number(&mut conn, &size("inbox_fold")).await);
        if sizes.0.max(sizes.1) <= 100_000 || began.elapsed() > LIMIT {
            break sizes;
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    };
    println!("1,000,000 messages on 10 streams: ledger {bytes} bytes, fold {beside} bytes");
    assert!(bytes <= 100_000 && beside <= 100_000, "ledger {bytes} bytes, fold {beside} bytes");
    let whole = "select count(*) from oncebox.inbox_ledger where offsets = '{[1,100001)}'";
    assert_eq!((number(&mut conn, whole).await, number(&mut conn, DOUBLED).await), (10, 0));
    // A fold of a few reads a few, in tables that were never analysed.
    let mut lone = lab.connect().await;
    let message = message(&mut lone, "0", "orders.placed#1", 100_001).await;
    assert!(accepted(&mut lone, &message).await);
    let read = "select (sum(idx_tup_read))::bigint from pg_stat_all_indexes where relname like 'inbox\\_%'";
    run(&mut lone, "select pg_stat_force_next_flush()").await;
    let before = number(&mut lone, read).await;
    assert_eq!(fold(&mut lone).await, 1);
    run(&mut lone, "select pg_stat_force_next_flush()").await;
    let now = number(&mut lone, read).await;
    assert!(now - before < 100, "a fold of one row read {} index entries", now - before);
}

/// Goal: the ledger's size is its gaps': a thousand of them some 16 bytes each, and none once they are filled.
#[tokio::test]
async fn the_ledger_grows_with_gaps() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let rows = |every: &str| {
        format!(
            "insert into oncebox.inbox (leaf, consumer, message_id, source, stream, \"offset\", accepted_at)
            select 16, 'c', gen_random_uuid(), '{SOURCE}', 's', n, now() from generate_series(1, 10000) as n where {every}"
        )
    };
    run(&mut conn, &rows("n % 10 <> 0")).await;
    assert_eq!(fold(&mut conn).await, 9_000);
    let ranges = "select count(*) from oncebox.inbox_ledger, unnest(offsets)";
    assert_eq!(number(&mut conn, ranges).await, 1_000);
    let stored = "select sum(pg_column_size(offsets))::bigint from oncebox.inbox_ledger";
    assert!((2_000..20_000).contains(&number(&mut conn, stored).await));
    run(&mut conn, &rows("n % 10 = 0")).await;
    fold(&mut conn).await;
    assert_eq!(offsets(&mut conn, "s").await, "{[1,10001)}");
    assert!(number(&mut conn, stored).await < 100);
}

/// Goal: ids that are no UUIDv7 and messages of other producers, without a place, are remembered for the window and then
/// forgotten; a UUIDv7 without a place is then refused, whatever becomes of the window.
#[tokio::test]
async fn messages_without_a_place_are_forgotten() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    run(&mut conn, SHRINK).await;
    let mut ids = Vec::new();
    for age in ["v4", "30 hours", "-3 days"] {
        // The third lies ahead.
        let age = age.replace("-3 days", "-72 hours");
        ids.push(id_of(&message(&mut conn, &age, "s", 1).await).to_owned());
    }
    run(&mut conn, "update oncebox.setting set dedup_window = '3 days'").await;
    for id in &ids {
        assert!(accepted(&mut conn, id).await);
        assert!(!accepted(&mut conn, id).await);
    }
    assert_eq!(fold(&mut conn).await, 3);
    assert_eq!((clear(&mut conn).await, number(&mut conn, ROWS).await), (0, 3), "all are within the window");
    run(&mut conn, SHRINK).await;
    run(&mut conn, "update oncebox.inbox set accepted_at = accepted_at - interval '29 hours'").await;
    assert!(clear(&mut conn).await >= 1);
    assert_eq!(number(&mut conn, ROWS).await, 1, "the one ahead stays: its time has not come");
    assert!(!accepted(&mut conn, &ids[2]).await);
    assert!(accepted(&mut conn, &ids[0]).await, "forgotten");
    assert_eq!(refused(&mut conn, &ids[1]).await, "OB001");
    // A longer window does not make it new: the horizon stays.
    run(&mut conn, "update oncebox.setting set dedup_window = '14 days'").await;
    assert_eq!(refused(&mut conn, &ids[1]).await, "OB001");
    assert_eq!(number(&mut conn, "select count(*) from oncebox.inbox_ledger").await, 0);
}

/// Goal: a long transaction's messages are folded when it commits, a prepared one's too, and those of the folding
/// transaction itself; what rolled back never is.
#[tokio::test]
async fn an_open_transaction_is_not_passed_over() {
    let lab = Lab::shared().await;
    let (mut conn, mut long) = (lab.connect().await, lab.connect().await);
    let mut arguments = vec![String::new()];
    for offset in 1..=9 {
        arguments.push(message(&mut conn, "0", "s", offset).await);
    }
    run(&mut long, "begin").await;
    assert!(accepted(&mut long, &arguments[1]).await);
    for rest in [&arguments[3], &arguments[4]] {
        assert!(accepted(&mut conn, rest).await);
        assert_eq!(fold(&mut conn).await, 1);
        assert_eq!(fold(&mut conn).await, 0);
    }
    assert_eq!(offsets(&mut conn, "s").await, "{[3,5)}");
    run(&mut long, "savepoint s").await;
    assert!(accepted(&mut long, &arguments[9]).await);
    run(&mut long, "rollback to s").await;
    assert!(accepted(&mut long, &arguments[2]).await);
    run(&mut long, "prepare transaction 'long'").await;
    assert_eq!(fold(&mut conn).await, 0);
    run(&mut long, "commit prepared 'long'").await;
    assert_eq!(fold(&mut conn).await, 2);
    assert_eq!(offsets(&mut conn, "s").await, "{[1,5)}");

    for level in ["read committed", "repeatable read"] {
        let first = if level == "read committed" { 5 } else { 7 };
        run(&mut long, &format!("begin isolation level {level}")).await;
        assert!(accepted(&mut long, &arguments[first]).await);
        // Another commits meanwhile: the open transaction's number lies below the snapshot's end.
        run(&mut conn, "select pg_current_xact_id()").await;
        fold(&mut long).await;
        assert!(accepted(&mut long, &arguments[first + 1]).await);
        run(&mut long, "commit").await;
        fold(&mut conn).await;
    }
    assert_eq!(offsets(&mut conn, "s").await, "{[1,9)}");
    assert_eq!(number(&mut conn, DOUBLED).await, 0);
    // What was accepted in the clearing transaction cannot be forgotten with the rest.
    run(&mut conn, &format!("{SHRINK}; {AGE_AT_ONCE}")).await;
    let old = message(&mut conn, "5 days", "t", 1).await;
    run(&mut conn, "begin").await;
    assert!(accepted(&mut conn, &old).await);
    assert_eq!(db::sqlstate(&ledger::clear(&mut conn, 10).await.unwrap_err()).unwrap(), "25001");
    run(&mut conn, "rollback").await;
}

/// Goal: a snapshot from before rows went is a conflict, never a second true: after a clear, after rows of the plain
/// leaf went, and when the window was shortened meanwhile.
#[tokio::test]
async fn an_older_snapshot_conflicts_with_a_clear() {
    let lab = Lab::shared().await;
    let (mut conn, mut old) = (lab.connect().await, lab.connect().await);
    for level in ["repeatable read", "serializable"] {
        for (n, age) in ["v4", "50 hours"].iter().enumerate() {
            run(&mut conn, "update oncebox.setting set dedup_window = '7 days'").await;
            run(&mut conn, "update oncebox.inbox_horizon set folded_until = '-infinity'").await;
            let stream = format!("{level} {n}");
            let mine = message(&mut conn, age, &stream, 1).await;
            run(&mut old, &format!("begin isolation level {level}; select from oncebox.setting")).await;
            assert!(accepted(&mut conn, &mine).await);
            fold(&mut conn).await;
            run(&mut conn, &format!("{SHRINK}; {AGE}")).await;
            assert!(clear(&mut conn).await >= 1);
            assert_eq!(number(&mut conn, ROWS).await, 0);
            assert_eq!(refused(&mut old, &mine).await, "40001");
            run(&mut old, "rollback").await;
            assert!(!accepted(&mut old, &mine).await);
            assert_eq!(number(&mut conn, ROWS).await, 0);
        }
    }
}

/// Goal: while a handler works on an old message, its leaf waits; one on a new message, or on an id without a time,
/// holds up nothing; and a reader of the whole inbox holds up accept for no longer than the clear's patience.
#[tokio::test]
async fn handlers_hold_up_only_their_own_leaf() {
    let lab = Lab::shared().await;
    let (mut conn, mut handler) = (lab.connect().await, lab.connect().await);
    run(&mut conn, &format!("{SHRINK}; {AGE_AT_ONCE}")).await;
    let (old, copy) = (message(&mut conn, "5 days", "s", 1).await, message(&mut conn, "5 days", "s", 2).await);
    let fresh = [message(&mut conn, "0", "t", 1).await, message(&mut conn, "v4", "t", 2).await];
    assert!(accepted(&mut conn, &old).await);
    // Often enough for plans that do not know their leaf.
    for _ in 0..10 {
        accepted(&mut handler, &fresh[0]).await;
        accepted(&mut handler, &fresh[1]).await;
    }
    run(&mut handler, "begin").await;
    assert!(accepted(&mut handler, &copy).await);
    assert_eq!(clear(&mut conn).await, 1, "the plain one only");
    assert_eq!(number(&mut conn, ROWS).await, 2);
    run(&mut handler, "commit; begin").await;
    for offset in 3..10 {
        let fresh = message(&mut conn, "0", "t", offset).await;
        assert!(accepted(&mut handler, &fresh).await);
        let plain = message(&mut conn, "v4", "t", 10 + offset).await;
        assert!(accepted(&mut handler, &plain).await);
    }
    assert_eq!(clear(&mut conn).await, 1);
    assert_eq!(number(&mut conn, ROWS).await, 1);
    run(&mut handler, "commit").await;
    assert!(!accepted(&mut conn, &old).await && !accepted(&mut conn, &copy).await);
}

/// Goal: days that share a leaf do not take each other along: the old rows go alone.
#[tokio::test]
async fn a_leaf_of_two_days_keeps_the_younger() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    run(&mut conn, &format!("{SHRINK}; {AGE_AT_ONCE}")).await;
    let (young, old) = (message(&mut conn, "0", "s", 1).await, message(&mut conn, "16 days", "s", 2).await);
    for message in [&young, &old] {
        assert!(accepted(&mut conn, message).await);
    }
    assert_eq!(number(&mut conn, "select count(distinct leaf) from oncebox.inbox").await, 1);
    clear(&mut conn).await;
    assert_eq!(number(&mut conn, "select count(*) from oncebox.inbox where \"offset\" = 1").await, 1);
    assert_eq!(number(&mut conn, ROWS).await, 1);
    assert!(!accepted(&mut conn, &young).await && !accepted(&mut conn, &old).await);
}

/// Goal: in a restored database, where transactions have other numbers, everything is folded anew, nothing is passed
/// over, and nothing counts as doubled.
#[tokio::test]
async fn a_restored_database_is_folded_anew() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    for (offset, moved) in [(1, "cluster_id = 1"), (2, "folded = '900000000:900000000:'")] {
        let before = message(&mut conn, "0", "s", 10 * offset).await;
        assert!(accepted(&mut conn, &before).await);
        fold(&mut conn).await;
        run(&mut conn, "update oncebox.inbox set xid = '800000000'").await;
        run(&mut conn, &format!("update oncebox.inbox_fold set {moved}")).await;
        let after = message(&mut conn, "0", "s", 10 * offset + 1).await;
        assert!(accepted(&mut conn, &after).await);
        assert!(fold(&mut conn).await >= 2);
        let last = message(&mut conn, "0", "s", 10 * offset + 2).await;
        assert!(accepted(&mut conn, &last).await);
        assert_eq!(fold(&mut conn).await, 1);
    }
    assert_eq!(offsets(&mut conn, "s").await, "{[10,13),[20,23)}");
    assert_eq!(number(&mut conn, DOUBLED).await, 0);
}

/// Goal: the consumer's process folds and clears by itself, with a consumer's rights, and so can SQL.
#[tokio::test]
async fn the_janitor_folds_and_clears() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    run(&mut conn, &format!("{SHRINK}; {AGE_AT_ONCE}")).await;
    run(
        &mut conn,
        "create function public.work(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language sql as 'select'",
    )
    .await;
    let old = message(&mut conn, "5 days", "s", 1).await;
    assert!(accepted(&mut conn, &old).await);
    let config = "[[consumer]]\nname = \"w\"\nbindings = [\"t\"]\nhandler = { sql = \"public.work\" }\n";
    let consumer = lab.consume(&lab.config(config)).await;
    eventually_number(&mut conn, ROWS, 0).await;
    let ledger = "select count(*) from oncebox.inbox_ledger where offsets = '{[1,3)}'";
    let next = message(&mut conn, "0", "s", 2).await;
    assert!(accepted(&mut conn, &next).await);
    eventually_number(&mut conn, ledger, 1).await;
    assert!(!accepted(&mut conn, &old).await);
    drop(consumer);
    run(&mut conn, "set role oncebox_consumer; select oncebox.inbox_fold(); select oncebox.inbox_clear()").await;
    conn.close().await.unwrap();
}
