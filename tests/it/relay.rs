//! Goal: what is committed reaches the broker, nothing else does, in the order of each key, under dense offsets,
//! through every fault; and what the broker does not take is held or parked by name, holding up nobody else.

use crate::support::storm::{self, Storm};
use crate::support::wire::{Published, Tap};
use crate::support::{Lab, connect, eventually, eventually_number};
use sqlx::{Connection, Executor};
use std::time::{Duration, Instant};

/// 0 once every outbox row is settled: the lane has settled past the newest window, which reaches the last row.
const UNSETTLED: &str = "
    select case when greatest(p.settled_n, l.settled_n) > p.n
        and p.q_top >= (select coalesce(max(seq), 0) from oncebox.outbox) then 0 else 1 end::bigint
    from oncebox.outbox_lease as l
    cross join lateral (select * from oncebox.outbox_plan where lane = 0 order by n desc limit 1) as p
    where l.lane = 0";

/// Goal: 40,000 messages of 8 writers, a tenth of the transactions rolled back, a third committed asynchronously, the
/// relay killed -9 six times: nothing lost, no ghosts, key order on the wire, offsets dense and the same over
/// duplicates.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_six_times_loses_doubles_and_reorders_nothing() {
    let lab = Lab::shared().await;
    let storm = Storm { writers: 8, transactions: 1_400, batch: 4, keys: 50 };
    storm::prepare(&lab, storm).await;
    let tap = Tap::on(&lab).await;
    let mut relays = [lab.relay().await, lab.spawn(&["relay"])];
    let kills = async {
        for kill in 0..6u64 {
            let active = eventually("a relay holds the lane", async || {
                relays.iter().position(|relay| relay.log().contains("lane resumed"))
            })
            .await;
            // Somewhere in the middle of its work, each time at another place.
            tokio::time::sleep(Duration::from_millis(100 + 130 * kill)).await;
            relays[active].kill9();
            relays[active] = lab.spawn(&["relay"]);
            // How long a take-over takes is another test's matter.
            lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
        }
    };
    tokio::join!(storm::run(lab.database_url.clone(), storm), kills);
    let committed = storm::committed(&lab).await;
    assert!(committed.len() > 38_000, "only {} messages were committed", committed.len());
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    let wire = tap.read(committed.len()).await;
    wire.assert_exactly(&committed);
    assert!(wire.duplicates() > 0, "the kills caused no duplicate: the test shows nothing");
}

/// Goal: the same through kills of Postgres, with asynchronous commits that it loses, and of the broker.
#[tokio::test(flavor = "multi_thread")]
async fn killed_servers_lose_double_and_reorder_nothing() {
    let mut lab = Lab::own().await;
    let storm = Storm { writers: 4, transactions: 1_200, batch: 3, keys: 20 };
    storm::prepare(&lab, storm).await;
    let tap = Tap::on(&lab).await;
    let relay = lab.relay().await;
    let writers = tokio::spawn(storm::run(lab.database_url.clone(), storm));
    for kill in 0..4 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        if kill % 2 == 0 {
            lab.postgres.kill9();
            lab.postgres.restart().await.expect("Postgres restarts");
        } else {
            lab.rabbit.kill9();
            lab.rabbit.restart().await.expect("RabbitMQ restarts");
        }
    }
    writers.await.expect("the writers end");
    let committed = storm::committed(&lab).await;
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    tap.read(committed.len()).await.assert_exactly(&committed);
    drop(relay);
}

/// Goal: an open write transaction, in this or another database, and a prepared one delay nobody else's messages.
#[tokio::test]
async fn open_transactions_delay_nobody() {
    let lab = Lab::shared().await;
    let other = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    let (mut here, mut elsewhere) = (lab.connect().await, other.connect().await);
    here.execute("begin; select oncebox.publish('slow', '1', key => 'k')").await.expect("publishes");
    elsewhere.execute("begin; select oncebox.publish('slow', '1')").await.expect("publishes");
    lab.sql("begin; select oncebox.publish('slow', '2'); prepare transaction 'slow'").await;
    let mut conn = lab.connect().await;
    for _ in 0..20 {
        let id: uuid::Uuid = sqlx::query_scalar("select oncebox.publish('fast', '1', key => 'k')")
            .fetch_one(&mut conn)
            .await
            .expect("publishes");
        let wire = tap.read(1).await;
        assert_eq!(wire.deliveries[0].message_id, Some(id.to_string()));
    }
    here.execute("commit").await.expect("commits");
    elsewhere.execute("rollback").await.expect("rolls back");
    lab.sql("commit prepared 'slow'").await;
    let wire = tap.read(2).await;
    assert!(wire.deliveries.iter().all(|delivery| delivery.topic == "slow"));
}

/// Goal: an unroutable message is parked with its reason, holds up nobody, and is sent under its own offset once an
/// operator sets it to waiting.
#[tokio::test]
async fn unroutable_messages_are_parked_and_can_be_sent_later() {
    let lab = Lab::shared().await;
    let tap = Tap::bound(&lab, "tap", &["known"]).await;
    let _relay = lab.relay().await;
    lab.sql(
        "select oncebox.publish(case when i % 12 = 0 then 'unknown' else 'known' end, to_jsonb(i), key => 'k' || i % 7)
        from generate_series(1, 600) as i",
    )
    .await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    let parked: Vec<(String, String, String, i64)> = sqlx::query_as(
        "select convert_from(body, 'UTF8'), reason, last_error, \"offset\" from oncebox.outbox_held
        where state = 'parked' order by \"offset\"",
    )
    .fetch_all(&mut conn)
    .await
    .expect("reads");
    let expected: Vec<_> =
        (1..=50).map(|i| ((i * 12).to_string(), "unroutable".to_owned(), "312 NO_ROUTE".to_owned(), i)).collect();
    assert_eq!(parked, expected);
    assert_eq!(tap.read(550).await.deliveries.len(), 550);

    let late = Tap::bound(&lab, "late", &["unknown"]).await;
    lab.sql("update oncebox.outbox_held set state = 'waiting', next_at = now()").await;
    let wire = late.read(50).await;
    let mut offsets: Vec<i64> = wire.deliveries.iter().filter_map(|d| d.position()).map(|at| at.offset).collect();
    offsets.sort_unstable();
    assert!(offsets.into_iter().eq(1..=50));
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 0).await;
}

/// Goal: nacked messages wait and are sent again; no later one of their key passes them, other keys go on, and a
/// relay killed meanwhile changes nothing of that.
#[tokio::test]
async fn nacks_keep_the_order_of_their_key() {
    let lab = Lab::shared().await;
    // A full queue nacks: three messages of room, until the tap empties it.
    let tap = Tap::bound(&lab, "wide", &["wide"]).await;
    let limited = Tap::limited(&lab, "narrow", &["narrow"], 3).await;
    let mut relay = lab.relay().await;
    let published: Vec<(String,)> = sqlx::query_as(
        "select oncebox.publish('narrow', to_jsonb(i), key => 'narrow' || i % 2)::text from generate_series(1, 40) as i",
    )
    .fetch_all(&mut lab.connect().await)
    .await
    .expect("publishes");
    let mut conn = lab.connect().await;
    eventually("held messages", async || {
        let held: i64 = sqlx::query_scalar("select count(*) from oncebox.outbox_held where reason = 'nacked'")
            .fetch_one(&mut connect(&lab.database_url).await)
            .await
            .expect("reads");
        (held > 0).then_some(())
    })
    .await;
    lab.sql("select oncebox.publish('wide', to_jsonb(i), key => 'wide') from generate_series(1, 50) as i").await;
    assert_eq!(tap.read(50).await.deliveries.len(), 50);
    relay.kill9();
    let _relay = lab.relay().await;
    let wire = limited.read(40).await;
    let committed: Vec<Published> = published
        .into_iter()
        .zip(1..)
        .map(|((id,), i)| Published { id, key: Some(format!("narrow{}", i % 2)) })
        .collect();
    wire.assert_exactly(&committed);
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 0).await;
}

/// Goal: of many messages in flight, the one that makes the broker close the channel is found and parked as refused;
/// every other one arrives.
#[tokio::test]
async fn a_refused_message_is_found_and_parked() {
    let lab = Lab::own().await;
    let tap = Tap::on(&lab).await;
    lab.rabbit.ctl(&["eval", "application:set_env(rabbit, max_message_size, 1000)."]).await.expect("a small limit");
    lab.sql("select oncebox.publish('t', to_jsonb(repeat('x', case when i in (50, 77) then 2000 else 10 end)), key => 'k' || i % 20)
        from generate_series(1, 200) as i")
    .await;
    let _relay = lab.relay().await;
    let mut conn = lab.connect().await;
    eventually_number(
        &mut conn,
        "select count(*) from oncebox.outbox_held where reason = 'refused' and state = 'parked'",
        2,
    )
    .await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    let wire = tap.read(198).await;
    let distinct: std::collections::HashSet<_> = wire.deliveries.iter().map(|d| d.message_id.clone()).collect();
    assert_eq!(distinct.len(), 198);
    assert_eq!(lab.number("select count(*) from oncebox.outbox_held").await, 2);
}

/// Goal: a broker under alarm pauses the relay, which keeps its lease and goes on by itself.
#[tokio::test]
async fn a_blocked_broker_pauses_the_relay() {
    let lab = Lab::own().await;
    let tap = Tap::on(&lab).await;
    let relay = lab.relay().await;
    lab.rabbit.ctl(&["set_vm_memory_high_watermark", "0"]).await.expect("an alarm");
    // The broker tells a connection that it is blocked when it next publishes.
    lab.sql("select oncebox.publish('t', to_jsonb(i)) from generate_series(1, 500) as i").await;
    relay.wait_for_log("blocked=true").await;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(8) {
        let held = lab.number("select count(*) from oncebox.outbox_lease where epoch = 1 and expires_at > now()").await;
        assert_eq!(held, 1, "the lease was lost while blocked");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    lab.rabbit.ctl(&["set_vm_memory_high_watermark", "0.4"]).await.expect("no alarm");
    assert_eq!(tap.read(500).await.duplicates(), 0);
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
}

/// Goal: a relay that is frozen is replaced within 10 s; when it wakes up it settles nothing and plans nothing, and
/// what it still sends is a duplicate.
#[tokio::test]
async fn a_frozen_relay_is_replaced_and_changes_nothing_when_it_wakes() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let frozen = lab.relay().await;
    let standby = lab.spawn(&["relay"]);
    let mut conn = lab.connect().await;
    let publish =
        "insert into app (id, key) select oncebox.publish('t', to_jsonb(i), key => 'k' || i % 5), 'k' || i % 5
        from generate_series(1, 2000) as i";
    lab.sql("create table app (n bigserial primary key, id uuid not null, key text)").await;
    lab.sql(publish).await;
    eventually("it publishes", async || {
        let n: i64 = sqlx::query_scalar("select max(n) from oncebox.outbox_plan")
            .fetch_one(&mut connect(&lab.database_url).await)
            .await
            .expect("reads");
        (n > 0).then_some(())
    })
    .await;
    frozen.signal("STOP");
    let began = Instant::now();
    standby.wait_for_log("lane resumed").await;
    assert!(began.elapsed() < Duration::from_secs(10), "the take-over took {:?}", began.elapsed());
    lab.sql(publish).await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    let plans = lab.number("select count(*) from oncebox.outbox_plan").await;
    frozen.signal("CONT");
    frozen.wait_for_log("the lane").await;
    lab.sql(publish).await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    assert_eq!(lab.number("select epoch from oncebox.outbox_lease").await, 2);
    assert!(lab.number("select count(*) from oncebox.outbox_plan").await > plans);
    let committed = storm::committed(&lab).await;
    tap.read(committed.len()).await.assert_exactly(&committed);
}

/// Goal: after SIGTERM in the middle of a backlog the relay ends within its deadline with exit 0, what was confirmed
/// is settled, and the next relay begins behind it at once.
#[tokio::test]
async fn a_stopped_relay_drains_and_gives_its_lane_back() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    lab.sql(
        "create table app (n bigserial primary key, id uuid not null, key text);
        insert into app (id) select oncebox.publish('t', to_jsonb(i)) from generate_series(1, 20000) as i",
    )
    .await;
    let mut relay = lab.relay().await;
    let mut conn = lab.connect().await;
    eventually("it publishes", async || (tap.depth().await > 0).then_some(())).await;
    let (status, took) = relay.stop().await;
    assert!(status.success(), "{}", relay.log());
    assert!(took < Duration::from_secs(10), "it took {took:?}");
    let free =
        lab.number("select count(*) from oncebox.outbox_lease where owner is null and expires_at = '-infinity'").await;
    assert_eq!(free, 1, "the lane was not given back");
    let _relay = lab.relay().await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    let committed = storm::committed(&lab).await;
    let wire = tap.read(committed.len()).await;
    wire.assert_exactly(&committed);
    assert_eq!(wire.duplicates(), 0, "a drained relay leaves nothing to send again");
}

/// Goal: a broker that freezes is noticed, the session is given up, and everything arrives after it thaws.
#[tokio::test]
async fn a_frozen_broker_is_noticed() {
    let mut lab = Lab::own().await;
    let tap = Tap::on(&lab).await;
    let relay = lab.relay().await;
    lab.rabbit.freeze();
    lab.sql("create table app (n bigserial primary key, id uuid not null, key text);
        insert into app (id, key) select oncebox.publish('t', to_jsonb(i), key => 'k'), 'k' from generate_series(1, 100) as i")
    .await;
    relay.wait_for_log("no session with the broker").await;
    lab.rabbit.thaw();
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    let committed = storm::committed(&lab).await;
    tap.read(committed.len()).await.assert_exactly(&committed);
}

/// Goal: a message is not sent before its time, and not after its expiry.
#[tokio::test]
async fn scheduled_messages_wait_and_expired_ones_are_parked() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    lab.sql("select oncebox.publish('t', '\"expired\"', expires_at => now() - interval '1 second', key => 'k')").await;
    lab.sql("select oncebox.publish('t', '\"later\"', deliver_at => now() + interval '3 seconds', key => 'k')").await;
    lab.sql("select oncebox.publish('t', '\"now\"', expires_at => now() + interval '1 hour', key => 'k')").await;
    let _relay = lab.relay().await;
    let first = tap.read(1).await;
    assert_eq!(first.deliveries.len(), 1);
    assert_eq!(first.deliveries[0].body, b"\"now\"");
    let early = lab.number("select count(*) from oncebox.outbox_scheduled where deliver_at > clock_timestamp()").await;
    let later = tap.read(1).await;
    assert_eq!(later.deliveries[0].body, b"\"later\"");
    let due = lab.number("select count(*) from oncebox.outbox where published_at >= now() - interval '1 minute'").await;
    assert_eq!((early, due), (1, 3), "the message was in the log before its time");
    let reason: String = sqlx::query_scalar("select reason from oncebox.outbox_held where state = 'parked'")
        .fetch_one(&mut lab.connect().await)
        .await
        .expect("one parked message");
    assert_eq!(reason, "expired");
}

/// Goal: every value of body and headers arrives as it was published.
#[tokio::test]
async fn body_and_headers_arrive_equal() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let _relay = lab.relay().await;
    let mut conn = lab.connect().await;
    let headers = serde_json::json!({
        "text": "grüße ✓", "empty": "", "yes": true, "no": false, "int": -42, "max": i64::MAX, "min": i64::MIN,
        "double": 0.1, "tiny": 1e-300, "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    });
    let payload = r#"{"b": 1.10, "a": "\u00e9\n", "big": 12345678901234567890.123}"#;
    let publish = "select oncebox.publish('t', $1::jsonb, key => 'clé', headers => $2)::text, ($1::jsonb)::text";
    let (id, text): (String, String) =
        sqlx::query_as(publish).bind(payload).bind(&headers).fetch_one(&mut conn).await.expect("publishes");
    let bytes: Vec<u8> = (0..=255).collect();
    sqlx::query("select oncebox.publish_bytes('t', $1, 'application/x-any')")
        .bind(&bytes)
        .execute(&mut conn)
        .await
        .expect("publishes");
    let wire = tap.read(2).await;
    let first = wire.deliveries.iter().find(|d| d.message_id.as_ref() == Some(&id)).expect("it arrived");
    assert_eq!(first.body, text.as_bytes());
    assert_eq!(first.content_type.as_deref(), Some("application/json"));
    assert_eq!(first.key(), Some("clé"));
    let mut arrived = first.headers.clone();
    arrived.retain(|name, _| !name.starts_with("oncebox-"));
    assert_eq!(serde_json::Value::Object(arrived), headers);
    let second = wire.deliveries.iter().find(|d| d.message_id.as_ref() != Some(&id)).expect("it arrived");
    assert_eq!((&second.body, second.content_type.as_deref()), (&bytes, Some("application/x-any")));
    conn.close().await.expect("closes");
}

/// Goal: held messages that the broker refuses are found one at a time too, and hold up nobody for good.
#[tokio::test]
async fn refused_messages_among_the_held_are_found() {
    let lab = Lab::own().await;
    let _relay = lab.relay().await;
    lab.sql("select oncebox.publish('late', to_jsonb(repeat('x', case when i % 2 = 0 then 2000 else 10 end)), key => 'k' || i)
        from generate_series(1, 6) as i")
    .await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held where reason = 'unroutable'", 6).await;
    let tap = Tap::on(&lab).await;
    lab.rabbit.ctl(&["eval", "application:set_env(rabbit, max_message_size, 1000)."]).await.expect("a small limit");
    // Open channels keep the limit they began with.
    lab.rabbit.ctl(&["close_all_connections", "--global", "limit"]).await.expect("rabbitmqctl answers");
    lab.sql("update oncebox.outbox_held set state = 'waiting', next_at = now()").await;
    lab.sql("select oncebox.publish('t', to_jsonb(i)) from generate_series(1, 100) as i").await;
    eventually_number(
        &mut conn,
        "select count(*) from oncebox.outbox_held where reason = 'refused' and state = 'parked'",
        3,
    )
    .await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 3).await;
    eventually_number(&mut conn, UNSETTLED, 0).await;
    let wire = tap.read(103).await;
    assert!(wire.deliveries.iter().filter(|delivery| delivery.topic == "late").count() >= 3);
}

/// Goal: a relay that takes over reads no settled window again, however many there are, and nothing beyond the
/// window it reads.
#[tokio::test]
async fn settled_windows_are_not_read_again() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    let mut relay = lab.relay().await;
    let mut conn = lab.connect().await;
    for i in 0..30 {
        sqlx::query("select oncebox.publish('t', to_jsonb($1::int))")
            .bind(i)
            .execute(&mut conn)
            .await
            .expect("publishes");
        eventually_number(&mut conn, UNSETTLED, 0).await;
    }
    relay.kill9();
    lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
    let again = lab.relay().await;
    let newest = lab.number("select max(n) from oncebox.outbox_plan").await;
    again.wait_for_log(&format!("window={newest}")).await;
    assert_eq!(tap.read(30).await.duplicates(), 0, "{}", again.log());
}

/// Stands before `outbox_look`: each waits while advisory lock 1 is taken, and says afterwards what it was asked for.
const LOOKS_SEEN: &str = "
    create table public.looks (n bigserial primary key, forced boolean, max_rows bigint, took interval);
    alter function oncebox.outbox_look rename to look_itself;
    do $$ begin
        execute (select format('create function oncebox.outbox_look(%s) returns %s language plpgsql as $f$ begin
                perform pg_advisory_xact_lock_shared(1);
                return query select * from oncebox.look_itself(%s);
                insert into public.looks (forced, max_rows, took)
                values ($8, $14, clock_timestamp() - statement_timestamp());
            end $f$', pg_get_function_arguments(p.oid), pg_get_function_result(p.oid),
            (select string_agg('$' || i, ', ' order by i) from generate_series(1, p.pronargs) as i))
        from pg_proc as p where p.proname = 'look_itself');
    end $$";

/// Goal: where much can have come since the last look, at first and after one that took long, the next makes a plan and
/// brings no rows: it would walk all that nobody may see yet while it keeps the lease from being renewed.
#[tokio::test]
async fn a_look_after_long_only_makes_a_plan() {
    let lab = Lab::shared().await;
    let tap = Tap::on(&lab).await;
    lab.sql(LOOKS_SEEN).await;
    lab.sql("select oncebox.publish('t', '1')").await;
    let _relay = lab.relay().await;
    tap.read(1).await;
    let mut gate = lab.connect().await;
    gate.execute("select pg_advisory_lock(1); select oncebox.publish('t', '2')").await.expect("publishes");
    let waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted
        and database = (select oid from pg_database where datname = current_database())";
    eventually_number(&mut gate, waiting, 1).await;
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    gate.execute("select pg_advisory_unlock(1)").await.expect("lets it look");
    tap.read(1).await;
    let after_long = "select count(*) from (
            select l.forced, l.max_rows, lag(l.took, 1, '1 hour') over (order by l.n) as before from public.looks as l
        ) as l where l.before > '1 second' and l.forced and l.max_rows = 0";
    eventually_number(&mut gate, after_long, 2).await;
    let others = "select count(*) from (
            select l.max_rows, lag(l.took, 1, '1 hour') over (order by l.n) as before from public.looks as l
        ) as l where l.before > '1 second' and l.max_rows > 0";
    assert_eq!(lab.number(others).await, 0);
    assert!(lab.number("select count(*) from public.looks where max_rows > 0").await > 0);
}

/// Goal: a database that answers nothing is noticed within the lease's term; nothing is published meanwhile, and
/// everything is after it answers again.
#[tokio::test]
async fn a_frozen_database_is_noticed() {
    let mut lab = Lab::own().await;
    let tap = Tap::on(&lab).await;
    let relay = lab.relay().await;
    lab.sql("create table app (n bigserial primary key, id uuid not null, key text);
        insert into app (id, key) select oncebox.publish('t', to_jsonb(i), key => 'k'), 'k' from generate_series(1, 100) as i")
    .await;
    lab.postgres.freeze();
    let began = Instant::now();
    relay.wait_for_log("begins anew").await;
    assert!(began.elapsed() < Duration::from_secs(8), "it took {:?}", began.elapsed());
    lab.postgres.thaw();
    lab.sql("insert into app (id, key) select oncebox.publish('t', to_jsonb(i), key => 'k'), 'k' from generate_series(1, 100) as i").await;
    eventually_number(&mut lab.connect().await, UNSETTLED, 0).await;
    let committed = storm::committed(&lab).await;
    tap.read(committed.len()).await.assert_exactly(&committed);
}
