//! Goal: a database that was restored, reset, copied or promoted is noticed; the windows that were recorded are
//! finished under their source, everything else arrives under a new one, nothing is lost, and no two messages share
//! an offset.

use crate::support::proxy::Proxy;
use crate::support::wire::{Tap, Wire};
use crate::support::{Lab, Process, connect, eventually, eventually_number, folder};
use oncebox::node::{Postgres, PostgresOptions};
use sqlx::{AssertSqlSafe, Executor, PgConnection};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::process::Command;
use tokio::task::JoinSet;

/// Messages the newest plan or an earlier one covers, told by the database that made the plans.
const PLANNED: &str = "
    select o.message_id::text
    from oncebox.outbox as o
    join lateral (select s2 from oncebox.outbox_plan where lane = o.lane order by n desc limit 1) as p
        on pg_visible_in_snapshot(o.xid, p.s2)";

/// 0 once every row of every lane is in a settled window.
const UNSETTLED: &str = "
    select count(*)
    from oncebox.outbox as o
    join oncebox.outbox_lease as l on l.lane = o.lane
    join lateral (select * from oncebox.outbox_plan where lane = o.lane order by n desc limit 1) as p on true
    where not pg_visible_in_snapshot(o.xid, p.s2) or greatest(p.settled_n, l.settled_n) <= p.n";

const SOURCES: &str = "select count(*) from oncebox.outbox_source";

/// Publishes and keeps the ids, in the app's own transaction.
fn publish(key: &str, count: u32) -> String {
    format!(
        "insert into app (id, key) select oncebox.publish('t.' || i % 3, to_jsonb(i), key => '{key}'), '{key}'
        from generate_series(1, {count}) as i;"
    )
}

async fn app(lab: &Lab) {
    lab.sql("create table app (n bigserial primary key, id uuid not null, key text)").await;
}

async fn ids(url: &str, query: &str) -> HashSet<String> {
    let query = sqlx::query_scalar(AssertSqlSafe(query));
    query.fetch_all(&mut connect(url).await).await.expect("reads").into_iter().collect()
}

async fn sources(lab: &Lab) -> Vec<String> {
    let query = sqlx::query_scalar("select source::text from oncebox.outbox_source order by ordinal");
    query.fetch_all(&mut lab.connect().await).await.expect("reads")
}

/// A relay that dies at a failpoint.
fn armed(lab: &Lab, failpoint: &str) -> Process {
    let mut command = lab.command(&["relay"]);
    command.env("ONCEBOX_FAILPOINT", failpoint);
    Process::spawn(command)
}

/// A backlog, and a relay that died in the middle of publishing it; then more, of transactions that were open when the
/// backlog's window was recorded, and of later ones. The window is not settled.
async fn die_in_a_backlog(lab: &Lab) {
    let mut slow = lab.connect().await;
    slow.execute(AssertSqlSafe(format!("begin; {}", publish("slow", 20)))).await.expect("publishes");
    lab.sql(&(0..10).map(|key| publish(&format!("k{key}"), 300)).collect::<String>()).await;
    let mut doomed = armed(lab, "relay.confirmed=8");
    doomed.end().await;
    assert!(doomed.log().contains("failpoint relay.confirmed"), "{}", doomed.log());
    slow.execute(AssertSqlSafe(format!("{}; commit", publish("slow", 20)))).await.expect("commits");
    for key in 0..10 {
        lab.sql(&publish(&format!("k{key}"), 30)).await;
    }
    assert!(lab.number(UNSETTLED).await > 0, "everything is settled: the test shows nothing");
    free_the_lanes(lab).await;
}

/// How long a take-over takes is another test's matter.
async fn free_the_lanes(lab: &Lab) {
    lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
}

/// Dumps the lab's database, restores it on a new cluster that `prepare` was done to, and leads the lab there. The old
/// server is returned.
async fn restore_elsewhere(lab: &mut Lab, new_xids: &[&str]) -> Postgres {
    let mut postgres = Postgres::start(&folder("restored"), PostgresOptions::default()).await.expect("starts");
    if !new_xids.is_empty() {
        postgres.stop().await.expect("stops");
        postgres.reset_wal(new_xids).await.expect("resets");
        postgres.restart().await.expect("starts");
    }
    postgres.create_database(&lab.name).await.expect("a database");
    let url = postgres.url(&lab.name);
    let mut conn = connect(&url).await;
    for role in ["producer", "consumer", "relay", "orchestrator", "admin"] {
        conn.execute(AssertSqlSafe(format!("create role oncebox_{role}"))).await.expect("a role");
    }
    let file = folder("dump").join("dump");
    run(Command::new(postgres.program("pg_dump")).args(["-Fc", "-d", &lab.database_url, "-f"]).arg(&file));
    run(Command::new(postgres.program("pg_restore")).args(["--exit-on-error", "-d", &url]).arg(&file));
    lab.database_url = url;
    std::mem::replace(&mut lab.postgres, postgres)
}

fn run(command: &mut Command) {
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Xids pass by, one subtransaction each.
async fn burn_xids(conn: &mut PgConnection, count: u32) {
    let burn = format!(
        "create temp table burnt (i int);
        do $$ begin
            for i in 1..{count} loop
                begin insert into burnt values (i); exception when others then null; end;
            end loop;
        end $$;"
    );
    conn.execute(AssertSqlSafe(burn)).await.expect("burns");
}

/// What came, by source: where each message lies. No place has two messages, no message two places in one source.
fn places(wire: &Wire) -> BTreeMap<String, HashMap<String, (String, i64)>> {
    let mut places: BTreeMap<String, HashMap<String, (String, i64)>> = BTreeMap::new();
    let mut taken: HashMap<(String, String, i64), String> = HashMap::new();
    for delivery in &wire.deliveries {
        let id = delivery.message_id.clone().expect("an id");
        let at = delivery.position().expect("a position");
        let source = at.source.to_string();
        let other = taken.insert((source.clone(), at.stream.clone(), at.offset), id.clone());
        assert!(other.as_ref().is_none_or(|other| *other == id), "two messages at {at:?}: {id} and {other:?}");
        let place = (at.stream, at.offset);
        let other = places.entry(source).or_default().insert(id.clone(), place.clone());
        assert!(other.as_ref().is_none_or(|other| *other == place), "{id} at {place:?} and {other:?}");
    }
    for (source, places) in &places {
        let mut streams: BTreeMap<&str, BTreeSet<i64>> = BTreeMap::new();
        for (stream, offset) in places.values() {
            streams.entry(stream).or_default().insert(*offset);
        }
        for (stream, offsets) in streams {
            assert!(
                offsets.iter().copied().eq(1..=offsets.len() as i64),
                "offsets of {stream} in {source}: {offsets:?}"
            );
        }
    }
    places
}

/// Each committed message came, under the old source if it was planned there and under the newest one otherwise; of
/// each key in order; nothing else came.
async fn assert_moved(lab: &Lab, wire: &Wire, planned: &HashSet<String>) {
    let sources = sources(lab).await;
    let places = places(wire);
    let at = |n: usize| places.get(&sources[n]).map(|p| p.keys().cloned().collect::<HashSet<_>>()).unwrap_or_default();
    let (old, new) = (at(0), at(sources.len() - 1));
    let committed = ids(&lab.database_url, "select id::text from app").await;
    let unplanned: HashSet<String> = committed.difference(planned).cloned().collect();
    assert_eq!((old.len(), new.len()), (planned.len(), unplanned.len()), "messages of the old and of the new source");
    assert_eq!(&old, planned, "messages of the old source");
    assert_eq!(new, unplanned, "messages of the new source");
    let came: usize = places.values().map(HashMap::len).sum();
    assert_eq!(came, committed.len(), "messages of other sources");

    let rows: Vec<(String, String)> = sqlx::query_as("select key, id::text from app order by n")
        .fetch_all(&mut lab.connect().await)
        .await
        .expect("reads");
    let mut seen = HashSet::new();
    let firsts = wire.deliveries.iter().filter(|d| seen.insert(d.message_id.clone()));
    let mut came: HashMap<&str, Vec<&str>> = HashMap::new();
    for delivery in firsts {
        came.entry(delivery.key().expect("a key")).or_default().push(delivery.message_id.as_deref().expect("an id"));
    }
    let mut order: HashMap<&str, Vec<&str>> = HashMap::new();
    for (key, id) in &rows {
        order.entry(key).or_default().push(id);
    }
    assert_eq!(came, order, "the order of the keys");
}

/// Writers of one key each, until told to stop.
async fn write_on(url: String, writers: u32, stop: tokio_util::sync::CancellationToken) {
    let mut tasks = JoinSet::new();
    for writer in 0..writers {
        let (url, stop) = (url.clone(), stop.clone());
        tasks.spawn(async move {
            let mut conn = connect(&url).await;
            while !stop.is_cancelled() {
                let text = format!("begin; {} commit", publish(&format!("writer{writer}"), 3));
                conn.execute(AssertSqlSafe(text)).await.expect("publishes");
                // A pace that a relay on a busy machine has caught up with a minute later.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("a writer does not panic");
    }
}

/// Restores a dump of a busy database on a cluster with other transaction ids; apps write there before the relay comes
/// and while it moves.
async fn a_dump_is_restored(old_xids: &[&str], new_xids: &[&str], failpoints: &[&str]) {
    let mut lab = Lab::own().await;
    if !old_xids.is_empty() {
        lab.postgres.stop().await.expect("stops");
        lab.postgres.reset_wal(old_xids).await.expect("resets");
        lab.postgres.restart().await.expect("starts");
    }
    app(&lab).await;
    let tap = Tap::on(&lab).await;
    die_in_a_backlog(&lab).await;
    let planned = ids(&lab.database_url, PLANNED).await;
    let mut lost = lab.connect().await;
    lost.execute(AssertSqlSafe(format!("begin; {}", publish("lost", 5)))).await.expect("publishes");
    let _old = restore_elsewhere(&mut lab, new_xids).await;
    // Open while the lane moves: one with messages already, one that has an xid only, one that rolls back.
    let (mut long, mut late, mut aborted) = (lab.connect().await, lab.connect().await, lab.connect().await);
    long.execute(AssertSqlSafe(format!("begin; {}", publish("long", 10)))).await.expect("publishes");
    late.execute("begin; select pg_current_xact_id()").await.expect("begins");
    aborted.execute(AssertSqlSafe(format!("begin; {}", publish("aborted", 10)))).await.expect("publishes");
    lab.sql(&(0..10).map(|key| publish(&format!("k{key}"), 10)).collect::<String>()).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let writers = tokio::spawn(write_on(lab.database_url.clone(), 2, stop.clone()));
    for failpoint in failpoints {
        let mut doomed = armed(&lab, failpoint);
        doomed.end().await;
        assert!(doomed.log().contains(&format!("failpoint {}", &failpoint[..failpoint.len() - 2])), "{}", doomed.log());
        free_the_lanes(&lab).await;
    }
    let relay = lab.spawn(&["relay"]);
    if !failpoints.contains(&"relay.source_moved=1") {
        relay.wait_for_log("recorded windows are finished, then the lane moves").await;
        relay.wait_for_log("the lane has moved to its new source").await;
        assert!(relay.log().contains("another cluster than"), "{}", relay.log());
    }
    relay.wait_for_log("lane resumed").await;
    stop.cancel();
    writers.await.expect("the writers end");
    long.execute(AssertSqlSafe(format!("{} commit", publish("long", 10)))).await.expect("commits");
    late.execute(AssertSqlSafe(format!("{} commit", publish("late", 10)))).await.expect("commits");
    aborted.execute("rollback").await.expect("rolls back");
    // Ids that rows had in the old cluster are given to transactions of this one.
    let mut conn = lab.connect().await;
    burn_xids(&mut conn, 8_000).await;
    lab.sql(&publish("k1", 10)).await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    let committed = lab.number("select count(*) from app").await;
    let wire = tap.read(committed as usize).await;
    assert_moved(&lab, &wire, &planned).await;
    assert_eq!(lab.number(SOURCES).await, 2);
    let ended = "select count(*) from oncebox.outbox_source_end as e join oncebox.outbox_source as s using (source)
        where s.ordinal = 1 and e.stream like 't.%'";
    assert_eq!(lab.number(ended).await, 3, "where the old source's streams ended is not recorded");
    let total = "select sum(next_offset - 1)::bigint from oncebox.outbox_source_end where stream like 't.%'";
    assert_eq!(lab.number(total).await, planned.len() as i64);
}

/// Goal: as the file says, where the new cluster's transaction ids are lower than those in the dump, and pass them later.
#[tokio::test(flavor = "multi_thread")]
async fn a_dump_restored_on_a_cluster_with_lower_xids_loses_nothing() {
    a_dump_is_restored(&["-x", "6000"], &[], &[]).await;
}

/// Goal: as the file says, where they are higher than any in the dump.
#[tokio::test(flavor = "multi_thread")]
async fn a_dump_restored_on_a_cluster_with_higher_xids_loses_nothing() {
    a_dump_is_restored(&[], &["-e", "1"], &[]).await;
}

/// Goal: a relay that dies at each step of the move, one after the other, changes nothing of that.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_at_each_step_of_the_move_loses_nothing() {
    let steps = [
        "relay.lease_taken=1",
        "relay.window_read=1",
        "relay.confirmed=1",
        "relay.source_finished=1",
        "relay.source_moved=1",
    ];
    a_dump_is_restored(&["-x", "6000"], &[], &steps).await;
}

/// Goal: an epoch set back by pg_resetwal is noticed, and everything arrives; one moved forwards is nobody's business.
#[tokio::test(flavor = "multi_thread")]
async fn transaction_ids_set_back_by_pg_resetwal_lose_nothing() {
    let mut lab = Lab::own().await;
    lab.postgres.stop().await.expect("stops");
    lab.postgres.reset_wal(&["-e", "5"]).await.expect("resets");
    lab.postgres.restart().await.expect("starts");
    app(&lab).await;
    let tap = Tap::on(&lab).await;
    die_in_a_backlog(&lab).await;
    let planned = ids(&lab.database_url, PLANNED).await;
    lab.postgres.stop().await.expect("stops");
    lab.postgres.reset_wal(&["-e", "0"]).await.expect("resets");
    lab.postgres.restart().await.expect("starts");
    lab.sql(&publish("k2", 10)).await;
    let relay = lab.spawn(&["relay"]);
    relay.wait_for_log("the lane has moved to its new source").await;
    assert!(relay.log().contains("transaction ids moved backwards"), "{}", relay.log());
    lab.sql(&publish("k3", 10)).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    assert_eq!(lab.number(SOURCES).await, 2);

    lab.postgres.stop().await.expect("stops");
    lab.postgres.reset_wal(&["-x", "20000"]).await.expect("resets");
    lab.postgres.restart().await.expect("starts");
    lab.sql(&publish("k4", 10)).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    assert_eq!(lab.number(SOURCES).await, 2, "a new source for nothing");
    let committed = lab.number("select count(*) from app").await;
    let wire = tap.read(committed as usize).await;
    assert_moved(&lab, &wire, &planned).await;
}

/// Loses everything since the last checkpoint: the plans of messages that were published among it.
async fn lose_the_log(lab: &mut Lab, args: &[&str]) {
    lab.postgres.kill9();
    lab.postgres.reset_wal(&[&["-f"], args].concat()).await.expect("resets");
    lab.postgres.restart().await.expect("starts");
}

/// What was published and lost keeps its offsets: what comes later has a source of its own.
async fn offsets_are_not_given_twice(resets: &[&str], relay_survives: bool, says: &str) {
    let mut lab = Lab::own().await;
    lab.postgres.stop().await.expect("stops");
    lab.postgres.reset_wal(&["-e", "5"]).await.expect("resets");
    lab.postgres.restart().await.expect("starts");
    app(&lab).await;
    let tap = Tap::on(&lab).await;
    let mut relay = lab.relay().await;
    let mut conn = lab.connect().await;
    lab.sql(&publish("before", 30)).await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    conn.execute("checkpoint").await.expect("a checkpoint");
    let survivors = lab.number("select count(*) from app").await;
    lab.sql(&publish("lost", 30)).await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    if !relay_survives {
        relay.kill9();
    }
    lose_the_log(&mut lab, resets).await;
    assert_eq!(lab.number("select count(*) from app").await, survivors, "nothing was lost: the test shows nothing");
    free_the_lanes(&lab).await;
    lab.sql(&publish("after", 30)).await;
    if !relay_survives {
        relay = lab.spawn(&["relay"]);
    }
    relay.wait_for_log(says).await;
    relay.wait_for_log("the lane has moved to its new source").await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    let wire = tap.read(90).await;
    let places = places(&wire);
    assert_eq!(places.values().map(HashMap::len).collect::<BTreeSet<_>>(), BTreeSet::from([60, 30]));
}

/// Goal: transaction ids that moved backwards come with lost plans: offsets that were used are not given again.
#[tokio::test(flavor = "multi_thread")]
async fn a_forced_reset_with_lower_xids_gives_no_offset_twice() {
    offsets_are_not_given_twice(&["-e", "0"], false, "transaction ids moved backwards").await;
}

/// Goal: where nothing in the database tells that it was put back, a relay that saw more of it does.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_saw_more_notices_a_database_put_back() {
    offsets_are_not_given_twice(&[], true, "windows that were published are missing").await;
}

/// A standby is promoted after `fail` was done to the primary; the relay follows.
async fn a_standby_is_promoted(synchronous: bool) {
    let mut lab = Lab::own().await;
    app(&lab).await;
    let standby = Postgres::standby_of(&lab.postgres, &folder("standby")).await.expect("a standby");
    let streaming =
        "select count(*) from pg_stat_replication where application_name = 'standby' and state = 'streaming'";
    eventually_number(&mut lab.connect().await, streaming, 1).await;
    if synchronous {
        lab.sql("alter system set synchronous_standby_names = 'standby'").await;
        lab.sql("select pg_reload_conf()").await;
        let sync = "select count(*) from pg_stat_replication where sync_state = 'sync'";
        eventually_number(&mut lab.connect().await, sync, 1).await;
    }
    let tap = Tap::on(&lab).await;
    die_in_a_backlog(&lab).await;
    let planned = ids(&lab.database_url, PLANNED).await;
    let standby_url = standby.url(&lab.name);
    let committed = lab.number("select count(*) from app").await;
    eventually_number(&mut connect(&standby_url).await, "select count(*) from app", committed).await;
    let proxy = Proxy::to(lab.postgres.port()).await;
    let mut command = lab.command(&["relay"]);
    command.env("ONCEBOX_DATABASE_URL", proxy.instead_of(&lab.database_url, lab.postgres.port()));
    let relay;
    let mut lost = HashSet::new();
    if synchronous {
        lab.postgres.kill9();
        standby.promote().await.expect("promotes");
        proxy.lead_to(standby.port());
        proxy.cut();
        relay = Process::spawn(command);
    } else {
        // Published by the relay, and never seen by the standby.
        let mut away = connect(&standby_url).await;
        away.execute("alter system set primary_conninfo = ''").await.expect("sets");
        away.execute("select pg_reload_conf()").await.expect("reloads");
        eventually_number(&mut lab.connect().await, "select count(*) from pg_stat_replication", 0).await;
        relay = Process::spawn(command);
        lab.sql(&publish("lost", 50)).await;
        lost = ids(&lab.database_url, "select id::text from app where key = 'lost'").await;
        eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
        standby.promote().await.expect("promotes");
        // The old primary lives on, unseen: what the relay held open ends with the proxy's cut.
        proxy.lead_to(standby.port());
        proxy.cut();
    }
    lab.database_url = standby_url;
    let old = std::mem::replace(&mut lab.postgres, standby);
    relay.wait_for_log("the lane has moved to its new source").await;
    assert!(relay.log().contains("another timeline than") && relay.log().contains("rewritten=0"), "{}", relay.log());
    lab.sql(&publish("k5", 10)).await;
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    let committed = lab.number("select count(*) from app").await;
    // Without loss every message came once; else some came under both sources, and the lost ones under the old one.
    let wire = tap.read(committed as usize + lost.len()).await;
    if synchronous {
        assert_moved(&lab, &wire, &planned).await;
    } else {
        let came: HashSet<String> = places(&wire).into_values().flat_map(HashMap::into_keys).collect();
        let expected: HashSet<String> =
            ids(&lab.database_url, "select id::text from app").await.union(&lost).cloned().collect();
        assert_eq!(came, expected);
    }
    assert_eq!(lab.number(SOURCES).await, 2);
    drop(old);
}

/// Goal: after the promotion of a synchronous standby the lane follows to a new source without rewriting a row.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_synchronous_standby_loses_nothing() {
    a_standby_is_promoted(true).await;
}

/// Goal: after the promotion of a standby that lacks messages which were published, all it has arrives, and no offset
/// of those it lacks is given again.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_asynchronous_standby_gives_no_offset_twice() {
    a_standby_is_promoted(false).await;
}

/// Goal: a copy of a database in the same cluster gets its own source; and consumers who hear both it and the original
/// apply each message once and know both its places.
#[tokio::test(flavor = "multi_thread")]
async fn a_copied_database_gets_its_own_source() {
    let mut lab = Lab::own().await;
    app(&lab).await;
    let inbox = Lab::shared().await;
    inbox
        .sql(
            "create schema shop; create table shop.effect (id uuid);
            create function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
            language sql as 'insert into shop.effect values (message_id)'",
        )
        .await;
    let config =
        lab.config("[[consumer]]\nname = \"shop\"\nbindings = [\"t.#\"]\nhandler = { sql = \"shop.on_message\" }\n");
    let mut command = lab.command(&["consume", "--config", &config]);
    command.env("ONCEBOX_DATABASE_URL", &inbox.database_url);
    let consumer = Process::spawn(command);
    consumer.wait_for_log("consuming").await;
    let tap = Tap::on(&lab).await;
    die_in_a_backlog(&lab).await;
    let planned = ids(&lab.database_url, PLANNED).await;
    let copied = lab.number("select count(*) from app").await;
    eventually("nobody is connected", async || {
        let text = format!("create database copy template {}", lab.name);
        connect(&lab.postgres.url("postgres")).await.execute(AssertSqlSafe(text)).await.ok()
    })
    .await;
    let mut original = lab.relay().await;
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    assert!(original.stop().await.0.success());
    let wire = tap.read(copied as usize).await;
    assert_eq!(places(&wire).len(), 1);
    assert_eq!(lab.number(SOURCES).await, 1);

    lab.database_url = lab.postgres.url("copy");
    lab.sql(&publish("k6", 10)).await;
    let relay = lab.spawn(&["relay"]);
    relay.wait_for_log("the lane has moved to its new source").await;
    assert!(relay.log().contains("another database than"), "{}", relay.log());
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    let wire = tap.read(copied as usize + 10 - planned.len()).await;
    assert_eq!(places(&wire)[&sources(&lab).await[1]].len(), copied as usize + 10 - planned.len());
    let mut conn = inbox.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", copied + 10).await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_alias", copied - planned.len() as i64).await;
    assert_eq!(inbox.number("select count(distinct id) from shop.effect").await, copied + 10);
}

/// Goal: the lanes of a database agree on one new source, also when one of them is told of it while it publishes; and
/// tables that were restored in place are noticed.
#[tokio::test(flavor = "multi_thread")]
async fn lanes_agree_on_one_source() {
    let lab = Lab::own().await;
    app(&lab).await;
    lab.sql("update oncebox.setting set lanes = 4").await;
    let tap = Tap::on(&lab).await;
    let text: String = (0..20).map(|key| publish(&format!("k{key}"), 20)).collect();
    lab.sql(&text).await;
    // Two processes share the lanes as it falls.
    let relays = [lab.spawn(&["relay"]), lab.spawn(&["relay"])];
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    lab.sql("select oncebox.outbox_renew_source('a snapshot was put back')").await;
    lab.sql(&text).await;
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    let wire = tap.read(800).await;
    let places_then = places(&wire);
    assert_eq!(places_then.values().map(HashMap::len).collect::<Vec<_>>(), [400, 400]);
    drop(relays);

    let file = folder("dump").join("dump");
    run(Command::new(lab.postgres.program("pg_dump")).args(["-Fc", "-d", &lab.database_url, "-f"]).arg(&file));
    lab.sql("drop schema oncebox cascade").await;
    let restore = ["--exit-on-error", "-d", &lab.database_url];
    run(Command::new(lab.postgres.program("pg_restore")).args(restore).arg(&file));
    free_the_lanes(&lab).await;
    lab.sql(&text).await;
    let relays = [lab.spawn(&["relay"]), lab.spawn(&["relay"])];
    let moved =
        "select count(distinct p.lane) from oncebox.outbox_plan as p join oncebox.outbox_source as s using (source)
        where s.ordinal = 3 and s.reason like 'restored tables than%'";
    eventually_number(&mut lab.connect().await, moved, 4).await;
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    let wire = tap.read(400).await;
    let third = &sources(&lab).await[2];
    assert_eq!(places(&wire)[third].len(), 400);
    assert_eq!(lab.number(SOURCES).await, 3);
    drop(relays);
}

/// Goal: with no transaction open the move's snapshot looks as if nothing waited; rows with numbers below the
/// sequence's last value are found all the same.
#[tokio::test]
async fn a_calm_move_misses_no_row() {
    let mut lab = Lab::own().await;
    app(&lab).await;
    let tap = Tap::on(&lab).await;
    lab.sql(&publish("k", 10)).await;
    let _old = restore_elsewhere(&mut lab, &[]).await;
    lab.sql(&publish("k", 10)).await;
    let relay = lab.spawn(&["relay"]);
    relay.wait_for_log("rewritten=20").await;
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    let calm = "select count(*) from oncebox.outbox_plan
        where n = 1 and s2::text = p2::text || ':' || p2::text || ':' and q2 = 0 and q_top = 20";
    assert_eq!(lab.number(calm).await, 1, "a transaction was open: the test shows nothing");
    let wire = tap.read(20).await;
    assert_moved(&lab, &wire, &HashSet::new()).await;
}

/// Goal: a relay whose sessions lead to different servers, because one was promoted between the first and the others,
/// does not work with such a mixture: the server it left gets no plan, and all goes on with the other one.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_with_different_servers_are_not_mixed() {
    let mut lab = Lab::own().await;
    app(&lab).await;
    let standby = Postgres::standby_of(&lab.postgres, &folder("standby")).await.expect("a standby");
    let tap = Tap::on(&lab).await;
    lab.sql(&publish("k", 10)).await;
    let standby_url = standby.url(&lab.name);
    eventually_number(&mut connect(&standby_url).await, "select count(*) from app", 10).await;
    let proxy = Proxy::to(lab.postgres.port()).await;
    let mut command = lab.command(&["relay"]);
    command.env("ONCEBOX_DATABASE_URL", proxy.instead_of(&lab.database_url, lab.postgres.port()));
    let mut lock = lab.connect().await;
    lock.execute("begin; lock table oncebox.outbox_plan in access exclusive mode").await.expect("locks");
    let relay = Process::spawn(command);
    relay.wait_for_log("lane taken").await;
    standby.promote().await.expect("promotes");
    proxy.lead_to(standby.port());
    lock.execute("rollback").await.expect("unlocks");
    relay.wait_for_log("must move to a new source").await;
    relay.wait_for_log("the lane has moved to its new source").await;
    assert_eq!(lab.number("select count(*) from oncebox.outbox_plan").await, 1, "the old server got a plan");
    lab.database_url = standby_url;
    let old = std::mem::replace(&mut lab.postgres, standby);
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    let wire = tap.read(10).await;
    assert_moved(&lab, &wire, &HashSet::new()).await;
    drop(old);
}

/// Goal: a lane without new messages moves to a renewed source too: until then nothing in the log counts as settled.
#[tokio::test]
async fn an_idle_lane_moves_to_a_renewed_source() {
    let lab = Lab::shared().await;
    let _tap = Tap::on(&lab).await;
    let relay = lab.relay().await;
    lab.sql("select oncebox.publish('t', '1')").await;
    eventually_number(&mut lab.connect().await, "select count(*) from oncebox.outbox_lease where settled_n > 1", 1)
        .await;
    lab.sql("select oncebox.outbox_renew_source('a test')").await;
    relay.wait_for_log("the lane has moved to its new source").await;
}
