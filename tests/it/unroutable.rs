//! Goal: messages that no queue was bound for are sent by themselves once one is, under their id and offset and in the
//! order of their key; what that costs is bounded, and they hold up nobody meanwhile.

use crate::support::wire::{Tap, Wire};
use crate::support::{Lab, Process, connect, eventually, eventually_number, number, storm};
use std::time::{Duration, Instant};

/// A relay that tries again every second.
async fn relay(lab: &Lab) -> Process {
    let config = lab.config("[relay]\nunroutable_probe = \"1s\"\n");
    let relay = lab.spawn(&["relay", "--config", &config]);
    relay.wait_for_log("lane resumed").await;
    relay
}

/// Goal: 3,000 messages of two topics are parked; one topic is bound, and all of it arrives without an operator, in
/// order of its keys, in several batches; the other stays parked, tried once a round; a third goes on meanwhile.
#[tokio::test]
async fn unroutable_messages_are_released_when_a_binding_appears() {
    let lab = Lab::shared().await;
    let tap = Tap::bound(&lab, "tap", &["known"]).await;
    let began = Instant::now();
    let _relay = relay(&lab).await;
    lab.sql("create table app (n bigserial primary key, id uuid not null, key text, topic text);
        insert into app (id, key, topic)
        select oncebox.publish(topic, to_jsonb(i), key => 'k' || i % 40), 'k' || i % 40, topic
        from generate_series(1, 2500) as i cross join lateral (values ('late'), (case when i % 5 = 0 then 'never' else 'known' end)) as t (topic)")
    .await;
    let mut conn = lab.connect().await;
    let parked = "select count(*) from oncebox.outbox_held where reason = 'unroutable'";
    eventually_number(&mut conn, parked, 3_000).await;
    let known = tap.read(2_000).await;
    assert_eq!(known.deliveries.len(), 2_000);
    // Tried again, one of each topic and no other.
    eventually("three rounds", async || {
        let mut conn = connect(&lab.database_url).await;
        let tried = "select max(attempts)::bigint from oncebox.outbox_held where topic = 'never'";
        (number(&mut conn, tried).await >= 4).then_some(())
    })
    .await;
    let attempts = lab.number("select sum(attempts - 1) from oncebox.outbox_held").await;
    let rounds = began.elapsed().as_secs() as i64 + 1;
    assert!(attempts <= 2 * rounds, "{attempts} attempts in {rounds} s");
    let tried = "select count(*) from oncebox.outbox_held where attempts > 1";
    assert!(lab.number(tried).await <= 2, "more than the oldest of each topic was tried");
    // Meanwhile the keys go on.
    lab.sql("select oncebox.publish('known', to_jsonb(i), key => 'k' || i) from generate_series(1, 40) as i").await;
    assert_eq!(tap.read(40).await.deliveries.len(), 40);

    let late = Tap::bound(&lab, "late", &["late"]).await;
    let committed: Vec<_> = {
        lab.sql("delete from app where topic <> 'late'").await;
        storm::committed(&lab).await
    };
    let wire = late.read(2_500).await;
    // Dense offsets from 1, the order of each key, nothing twice but what a retry may double.
    Wire { deliveries: wire.deliveries }.assert_exactly(&committed);
    eventually_number(&mut conn, parked, 500).await;
    assert_eq!(
        lab.number("select count(*) from oncebox.outbox_held where state <> 'parked' and topic <> 'never'").await,
        0
    );
}

/// Goal: a relay that dies in the middle of a release leaves the rest to the next one's probe.
#[tokio::test]
async fn a_release_goes_on_after_a_kill() {
    let lab = Lab::shared().await;
    let mut first = relay(&lab).await;
    lab.sql(
        "create table app (n bigserial primary key, id uuid not null, key text);
        insert into app (id, key) select oncebox.publish('late', to_jsonb(i), key => 'k' || i % 9), 'k' || i % 9
        from generate_series(1, 4000) as i",
    )
    .await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held where state = 'parked'", 4_000).await;
    let tap = Tap::on(&lab).await;
    eventually("some arrive", async || (tap.depth().await > 100).then_some(())).await;
    first.kill9();
    let left = lab.number("select count(*) from oncebox.outbox_held").await;
    assert!(left > 0, "everything was through: the test shows nothing");
    lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
    let _second = relay(&lab).await;
    let committed = storm::committed(&lab).await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 0).await;
    tap.read(committed.len()).await.assert_exactly(&committed);
}

/// Goal: `off` leaves them to operators.
#[tokio::test]
async fn probing_can_be_turned_off() {
    let lab = Lab::shared().await;
    let config = lab.config("[relay]\nunroutable_probe = \"off\"\n");
    let relay = lab.spawn(&["relay", "--config", &config]);
    relay.wait_for_log("lane resumed").await;
    lab.sql("select oncebox.publish('late', to_jsonb(i)) from generate_series(1, 3) as i").await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held where state = 'parked'", 3).await;
    let _tap = Tap::on(&lab).await;
    // Several looks at the held ones.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(lab.number("select count(*) from oncebox.outbox_held where attempts = 1 and state = 'parked'").await, 3);
    // One that an operator sends leaves the others too.
    lab.sql("update oncebox.outbox_held set state = 'waiting', next_at = now() where \"offset\" = 1").await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held where state = 'parked'", 2).await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held", 2).await;
}
