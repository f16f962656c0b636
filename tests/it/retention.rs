//! Goal: the log and its journal stay small while messages pour in, nothing unsettled is ever cleared, and no producer
//! fails or waits because of it: not with long transactions open, not with the janitor frozen.

use crate::support::storm;
use crate::support::wire::Tap;
use crate::support::{LIMIT, Lab, connect, eventually, eventually_number, number, unique};
use sqlx::{AssertSqlSafe, Executor, PgConnection};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// On a loaded machine a commit may take its time; a producer that waited for a lock until its holder ends would wait
/// for as long as the test holds it.
const LONGEST_PUBLISH: Duration = Duration::from_secs(3);

const NEWEST_SETTLED: &str = "
    select case when greatest(p.settled_n, l.settled_n) > p.n
        and p.q_top >= (select coalesce(max(seq), 0) from oncebox.outbox) then 0 else 1 end::bigint
    from oncebox.outbox_lease as l
    cross join lateral (select n, settled_n, q_top from oncebox.outbox_plan where lane = 0 order by n desc limit 1) as p
    where l.lane = 0";

/// Up to which plan lane 0 is settled.
const SETTLED: &str = "select greatest(l.settled_n, (
        select p.settled_n from oncebox.outbox_plan as p where p.lane = 0 order by p.n desc limit 1))
    from oncebox.outbox_lease as l where l.lane = 0";

const ROWS: &str = "select count(*) from oncebox.outbox";

async fn lab(retention: &str) -> Lab {
    let lab = Lab::shared().await;
    lab.sql(&format!(
        "update oncebox.setting set retention = '{retention}';
        create table app (n bigserial primary key, id uuid not null, key text)"
    ))
    .await;
    lab
}

/// Producers that write without a pause until they are stopped, and an observer of what they wait for.
struct Producers {
    stop: Arc<AtomicBool>,
    writers: JoinSet<Vec<Duration>>,
    observer: tokio::task::JoinHandle<(u64, Vec<String>)>,
}

/// Locks on tables that producers wait for: apart from each other nobody may make them wait.
const WAITING: &str = "
    select a.pid || ' waits for ' || coalesce((
        select string_agg(b.application_name || ': ' || b.query, '; ')
        from pg_stat_activity as b where b.pid = any(pg_blocking_pids(a.pid))), 'nobody')
    from pg_stat_activity as a
    where a.datname = current_database() and a.application_name = 'producer' and a.wait_event_type = 'Lock'
        and a.wait_event in ('relation', 'tuple', 'transactionid')";

impl Producers {
    fn start(lab: &Lab, count: usize, batch: i32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = JoinSet::new();
        for writer in 0..count {
            let (url, stop) = (lab.database_url.clone(), Arc::clone(&stop));
            writers.spawn(async move {
                let mut conn = connect(&url).await;
                conn.execute("set application_name = 'producer'").await.unwrap();
                let mut took = Vec::new();
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let began = Instant::now();
                    sqlx::query(
                        "insert into app (id, key)
                        select oncebox.publish('t.' || i % 3, to_jsonb(repeat('x', 100)), key => $1), $1
                        from generate_series(1, $2) as i",
                    )
                    .bind(format!("k{writer}.{}", n % 50))
                    .bind(batch)
                    .execute(&mut conn)
                    .await
                    .expect("no publish fails");
                    took.push(began.elapsed());
                }
                took
            });
        }
        let (url, stopped) = (lab.database_url.clone(), Arc::clone(&stop));
        let observer = tokio::spawn(async move {
            let mut conn = connect(&url).await;
            let (mut looks, mut waits) = (0, Vec::new());
            while !stopped.load(Ordering::Relaxed) {
                let seen: Vec<String> = sqlx::query_scalar(WAITING).fetch_all(&mut conn).await.unwrap();
                waits.extend(seen);
                looks += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            (looks, waits)
        });
        Self { stop, writers, observer }
    }

    /// Ends them; none failed, none waited for a lock, and none took too long. Returns how often they wrote.
    async fn end(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let mut took = Vec::new();
        while let Some(writer) = self.writers.join_next().await {
            took.extend(writer.expect("no producer fails"));
        }
        let (looks, waits) = self.observer.await.expect("the observer does not fail");
        assert!(looks > 20, "only {looks} looks: the test shows nothing");
        assert!(waits.is_empty(), "producers waited {} times, e.g. {:?}", waits.len(), waits.first());
        let longest = took.iter().max().copied().unwrap_or_default();
        assert!(longest < LONGEST_PUBLISH, "a publish took {longest:?}");
        assert!(took.len() > 100, "only {} transactions", took.len());
        took.len()
    }
}

/// Waits until the ring has been turned so many times more than now.
async fn turns(lab: &Lab, count: i64) {
    let mut conn = lab.connect().await;
    let mut turned = 0;
    let mut last: i64 = -1;
    let mut since = Instant::now();
    while turned < count {
        assert!(since.elapsed() < 2 * LIMIT, "{turned} of {count} turns, and no more within {:?}", since.elapsed());
        let slot = number(&mut conn, "select slot::bigint from oncebox.outbox_ring").await;
        if slot != last {
            turned += i64::from(last >= 0);
            (last, since) = (slot, Instant::now());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a cron job would do: one round of the janitor's functions.
async fn sweep(conn: &mut PgConnection) {
    for slot in 0..8 {
        sqlx::query("select oncebox.outbox_clear($1::smallint)").bind(slot).execute(&mut *conn).await.unwrap();
    }
    for call in ["select * from oncebox.outbox_turn()", "select oncebox.outbox_trim_journal(0::smallint)"] {
        conn.execute(call).await.unwrap();
    }
}

/// Sweeps for as long as several retentions last.
async fn sweep_for(conn: &mut PgConnection, time: Duration) {
    let began = Instant::now();
    while began.elapsed() < time {
        sweep(conn).await;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

async fn text(conn: &mut PgConnection, query: &str) -> String {
    let text = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(conn).await;
    text.unwrap_or_else(|error| panic!("{query}: {error}"))
}

async fn assert_all_on_the_wire(lab: &Lab, tap: &Tap) {
    let committed = storm::committed(lab).await;
    // Who wrote flat out may have left a long backlog: the limit is on a standstill.
    let mut conn = lab.connect().await;
    let (mut settled, mut since) = (-1, Instant::now());
    while number(&mut conn, NEWEST_SETTLED).await != 0 {
        let now = number(&mut conn, SETTLED).await;
        if now != settled {
            (settled, since) = (now, Instant::now());
        }
        assert!(since.elapsed() < LIMIT, "nothing settled after plan {settled} within {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tap.read(committed.len()).await.assert_exactly(&committed);
}

/// Goal: four producers write flat out while slots turn and are cleared many times: none fails or waits for a lock,
/// everything reaches the wire exactly, and what is left is small and without dead tuples.
#[tokio::test(flavor = "multi_thread")]
async fn producers_write_flat_out_while_slots_turn() {
    let lab = lab("2 seconds").await;
    let tap = Tap::on(&lab).await;
    let relay = lab.relay().await;
    let producers = Producers::start(&lab, 4, 3);
    turns(&lab, 20).await;
    let transactions = producers.end().await;
    assert_all_on_the_wire(&lab, &tap).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, ROWS, 0).await;
    let cleared = relay.log().matches("slot of the log cleared").count();
    assert!(cleared >= 12, "only {cleared} slots were cleared");
    let size = lab
        .number(
            "select sum(pg_total_relation_size(inhrelid))::bigint from pg_inherits
        where inhparent = 'oncebox.outbox'::regclass",
        )
        .await;
    assert!(size < 8 << 20, "{size} bytes are left of {} messages", transactions * 5);
    let dead = "select coalesce(sum(n_dead_tup), 0)::bigint from pg_stat_user_tables
        where schemaname = 'oncebox' and relname ~ '^outbox_[0-7]$'";
    // Counters are sent when a session has been idle for a moment.
    eventually_number(
        &mut conn,
        "select (sum(n_tup_ins) > 0)::int::bigint from pg_stat_user_tables where relname ~ '^outbox_[0-7]$'",
        1,
    )
    .await;
    eventually_number(&mut conn, dead, 0).await;
    assert!(!relay.log().contains("not tidied up"), "{}", relay.log());
}

/// Goal: open write transactions, prepared ones, old snapshots and readers of everything make the janitor wait, not the
/// producers; what they write is never cleared before it is settled.
#[tokio::test(flavor = "multi_thread")]
async fn long_transactions_lose_nothing_and_delay_nobody() {
    let lab = lab("1 second").await;
    let tap = Tap::on(&lab).await;
    let mut relay = lab.relay().await;
    let publish =
        |key: &str| format!("insert into app (id, key) select oncebox.publish('t.1', '1', key => '{key}'), '{key}'");
    let (mut writer, mut reader) = (lab.connect().await, lab.connect().await);
    let mut old = lab.connect().await;
    writer.execute(AssertSqlSafe(format!("begin; {}", publish("open")))).await.unwrap();
    let gid = unique("gid");
    lab.sql(&format!("begin; {}; prepare transaction '{gid}'", publish("prepared"))).await;
    old.execute("begin isolation level repeatable read").await.unwrap();
    let first = number(&mut old, "select slot::bigint from oncebox.outbox_ring").await;

    let producers = Producers::start(&lab, 2, 1);
    turns(&lab, 16).await;
    producers.end().await;

    // A dump reads every slot: none can be cleared, the ring is stuck and says so.
    reader.execute("begin; select count(*) from oncebox.outbox").await.unwrap();
    let producers = Producers::start(&lab, 2, 1);
    relay.wait_for_log("the ring is stuck").await;
    producers.end().await;
    reader.execute("commit").await.unwrap();
    let producers = Producers::start(&lab, 2, 1);
    turns(&lab, 8).await;
    producers.end().await;

    // With no relay nothing is settled any more: what the old snapshot wrote to its slot must stay.
    assert!(relay.stop().await.0.success());
    lab.sql("select oncebox.publish('t.2', '1', key => 'later')").await;
    lab.sql("insert into app (id, key) select message_id, key from oncebox.outbox where key = 'later'").await;
    old.execute(AssertSqlSafe(publish("old"))).await.unwrap();
    old.execute("commit").await.unwrap();
    writer.execute("commit").await.unwrap();
    lab.sql(&format!("commit prepared '{gid}'")).await;
    let mut conn = lab.connect().await;
    let slot = number(&mut conn, "select slot::bigint from oncebox.outbox where key = 'old'").await;
    assert_eq!(slot, first, "an old snapshot writes to the slot it sees");
    sweep_for(&mut conn, Duration::from_secs(3)).await;
    let late = "select count(*) from oncebox.outbox where key in ('open', 'prepared', 'old', 'later')";
    assert_eq!(number(&mut conn, late).await, 4, "unsettled rows were cleared");

    let _relay = lab.relay().await;
    assert_all_on_the_wire(&lab, &tap).await;
    eventually_number(&mut conn, ROWS, 0).await;
}

/// Goal: a janitor that freezes, at any moment, holds up nobody: producers write on, another relay's janitor takes care
/// of the ring, and it goes on itself once it thaws.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_janitor_holds_up_nobody() {
    let lab = lab("1 second").await;
    let tap = Tap::on(&lab).await;
    let first = lab.relay().await;
    let producers = Producers::start(&lab, 2, 1);
    turns(&lab, 4).await;
    for pause_ms in 1..=10 {
        first.signal("STOP");
        tokio::time::sleep(Duration::from_millis(17 * pause_ms)).await;
        first.signal("CONT");
        tokio::time::sleep(Duration::from_millis(23 * pause_ms)).await;
    }
    turns(&lab, 4).await;
    let second = lab.spawn(&["relay"]);
    second.wait_for_log("relay started").await;
    first.signal("STOP");
    second.wait_for_log("lane resumed").await;
    second.wait_for_log("slot of the log cleared").await;
    turns(&lab, 12).await;
    first.signal("CONT");
    turns(&lab, 4).await;
    producers.end().await;
    assert_all_on_the_wire(&lab, &tap).await;
    eventually_number(&mut lab.connect().await, ROWS, 0).await;
}

/// Goal: what is not settled stays, whatever its age and whoever calls the functions how often; and what is settled stays
/// for as long as the retention.
#[tokio::test]
async fn unsettled_messages_are_never_cleared() {
    let lab = lab("1 second").await;
    let mut conn = lab.connect().await;
    let mut published = 0;
    for _ in 0..12 {
        lab.sql("insert into app (id) select oncebox.publish('t', '1') from generate_series(1, 10)").await;
        published += 10;
        sweep_for(&mut conn, Duration::from_millis(250)).await;
    }
    sweep_for(&mut conn, Duration::from_secs(2)).await;
    assert_eq!(number(&mut conn, ROWS).await, published);
    let slots = number(&mut conn, "select count(distinct slot) from oncebox.outbox").await;
    assert_eq!(slots, 8, "the ring turned until every slot was taken");
    assert_eq!(text(&mut conn, "select outcome from oncebox.outbox_turn()").await, "full");
    let states =
        "select string_agg(distinct oncebox.outbox_slot_state(slot), ' ' order by oncebox.outbox_slot_state(slot))
        from oncebox.outbox_slot";
    assert_eq!(text(&mut conn, states).await, "current unsettled");

    // Settled, but a longer retention is asked for.
    lab.sql("update oncebox.setting set retention = '1 hour'").await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    assert_all_on_the_wire(&lab, &tap).await;
    sweep_for(&mut conn, Duration::from_millis(300)).await;
    assert_eq!(text(&mut conn, states).await, "current young");
    assert_eq!(number(&mut conn, ROWS).await, published);
    lab.sql("update oncebox.setting set retention = '1 second'").await;
    eventually_number(&mut conn, ROWS, 0).await;
}

/// Goal: in a database that was restored where transaction ids are lower, the recorded snapshots show what was never
/// published. It stays until the lane has moved.
#[tokio::test]
async fn a_lane_that_has_yet_to_move_is_not_cleared() {
    let lab = lab("1 second").await;
    let mut conn = lab.connect().await;
    let tap = Tap::on(&lab).await;
    let mut relay = lab.relay().await;
    lab.sql("insert into app (id) select oncebox.publish('t', '1') from generate_series(1, 10)").await;
    assert_all_on_the_wire(&lab, &tap).await;
    assert!(relay.stop().await.0.success());
    // What a restore on another cluster looks like: another identity, and new rows with low ids.
    lab.sql("update oncebox.outbox_source set identity = 'elsewhere'").await;
    lab.sql("insert into app (id) select oncebox.publish('t', '2') from generate_series(1, 10)").await;
    let count = number(&mut conn, ROWS).await;
    lab.sql("update oncebox.outbox set xid = '5'").await;
    sweep_for(&mut conn, Duration::from_secs(3)).await;
    assert_eq!(number(&mut conn, ROWS).await, count, "nothing is known to be settled");
}

/// Goal: the journal is trimmed with the log; what a replay of the retained rows needs is kept, and a relay that takes
/// over goes on with the right offsets, also after everything was cleared.
#[tokio::test(flavor = "multi_thread")]
async fn a_trimmed_journal_keeps_the_offsets() {
    let lab = lab("1 second").await;
    let tap = Tap::on(&lab).await;
    let mut relay = lab.relay().await;
    let mut conn = lab.connect().await;
    // One short transaction after another: a window each.
    let below = "select coalesce(max(below_n), 0) from oncebox.outbox_trim";
    let began = Instant::now();
    while number(&mut conn, below).await < 1_000 {
        assert!(began.elapsed() < 2 * LIMIT, "the journal was not trimmed");
        for i in 0..50 {
            sqlx::query("insert into app (id, key) select oncebox.publish('t.' || $1 % 7, '1', key => 'k'), 'k'")
                .bind(i)
                .execute(&mut conn)
                .await
                .unwrap();
        }
    }
    relay.kill9();
    // Nobody trims now: what is retained can be read again.
    let needed = "
        with oldest as (
            select o.xid from oncebox.outbox as o join oncebox.outbox_settled() as s on s.lane = o.lane
            where pg_visible_in_snapshot(o.xid, s.snapshot) order by o.xid limit 1
        ), own as (
            select min(p.n) as n from oncebox.outbox_plan as p cross join oldest as o
            where pg_visible_in_snapshot(o.xid, p.s2) and not pg_visible_in_snapshot(o.xid, p.s1)
        )
        select (exists (select from oldest))::int::bigint
            - (select count(*) from own where exists (
                select from oncebox.outbox_plan as k where k.keyframe and k.n <= own.n))";
    assert_eq!(number(&mut conn, needed).await, 0, "the window of the oldest row, or its keyframe, is gone");
    let gaps = "select max(n) - min(n) + 1 - count(*) from oncebox.outbox_plan";
    assert_eq!(number(&mut conn, gaps).await, 0, "plans are missing in the middle");
    lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;

    let mut relay = lab.relay().await;
    lab.sql("insert into app (id, key) select oncebox.publish('t.' || i % 7, '2', key => 'k'), 'k' from generate_series(1, 100) as i").await;
    eventually_number(&mut conn, NEWEST_SETTLED, 0).await;
    eventually_number(&mut conn, ROWS, 0).await;
    eventually("no plan before the newest needed keyframe", async || {
        let mut conn = lab.connect().await;
        let extra = "select count(*) from oncebox.outbox_plan as p where p.n < (
            select max(k.n) from oncebox.outbox_plan as k, oncebox.outbox_settled() as s where k.keyframe and k.n <= s.n)";
        (number(&mut conn, extra).await == 0).then_some(())
    })
    .await;
    relay.kill9();
    lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
    let _relay = lab.relay().await;
    lab.sql("insert into app (id, key) select oncebox.publish('t.' || i % 7, '3', key => 'k'), 'k' from generate_series(1, 100) as i").await;
    assert_all_on_the_wire(&lab, &tap).await;
}

/// Goal: relays and admins may do the janitor's work from SQL, nobody else; senseless values are refused by name.
#[tokio::test]
async fn only_relays_and_admins_sweep() {
    let lab = lab("1 second").await;
    lab.sql("select oncebox.publish('t', '1')").await;
    for (group, may) in
        [("oncebox_relay", true), ("oncebox_admin", true), ("oncebox_producer", false), ("oncebox_consumer", false)]
    {
        let role = unique("login");
        lab.sql(&format!("create role {role} login in role {group}")).await;
        let mut conn = connect(&lab.database_url.replace("oncebox@", &format!("{role}@"))).await;
        for call in [
            "outbox_turn()",
            "outbox_clear(0::smallint)",
            "outbox_slot_state(0::smallint)",
            "outbox_trim_journal(0::smallint, 10)",
        ] {
            let result = conn.execute(AssertSqlSafe(format!("select oncebox.{call}"))).await;
            let refused =
                result.err().and_then(|error| error.as_database_error()?.code().map(|code| code.into_owned()));
            assert_eq!(refused.as_deref(), if may { None } else { Some("42501") }, "{group} calls {call}");
        }
    }
    let mut conn = lab.connect().await;
    for (wrong, code, said) in [
        ("update oncebox.setting set retention = '0.5 seconds'", "23514", "retention"),
        ("update oncebox.setting set retention = '2 years'", "23514", "retention"),
        ("select oncebox.outbox_clear(8::smallint)", "22023", "slot: must be 0 to 7, got 8"),
        ("select oncebox.outbox_clear(null)", "22023", "slot: must be 0 to 7, got null"),
        ("select oncebox.outbox_trim_journal(7::smallint)", "22023", "lane: there is no lane 7"),
        ("select oncebox.outbox_trim_journal(0::smallint, 0)", "22023", "at_most: must be 1 to 100000, got 0"),
        ("begin isolation level repeatable read; select oncebox.outbox_clear(0::smallint)", "25001", "read committed"),
    ] {
        let error = conn.execute(wrong).await.expect_err(wrong);
        let error = error.as_database_error().expect(wrong);
        assert_eq!(error.code().as_deref(), Some(code), "{wrong}: {error}");
        assert!(error.message().contains(said), "{wrong}: {error}");
    }
}
