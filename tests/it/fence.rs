//! Goal: nothing is published before it is durable, on this server and on the synchronous standby; and what the relay
//! once published, no crash of the database takes back.

use crate::support::storm;
use crate::support::wire::Tap;
use crate::support::{Lab, connect, eventually, eventually_number};
use oncebox::db::{self, DbError, SessionOptions};
use oncebox::node::PostgresOptions;
use oncebox::outbox::journal::{self, LogPlace};
use oncebox::outbox::lease;
use oncebox::outbox::look::{self, PlanRecord};
use sqlx::{AssertSqlSafe, Executor};
use std::time::Duration;
use uuid::Uuid;

/// Goal: messages of asynchronous commits that were on the wire are still in the database after kill -9 of Postgres:
/// with a WAL writer that is seldom awake, only the fence can have flushed them.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_published_survives_a_crash_of_the_database() {
    let settings = vec![
        ("wal_writer_delay".to_owned(), "10s".to_owned()),
        ("wal_writer_flush_after".to_owned(), "100MB".to_owned()),
    ];
    let mut lab = Lab::own_with(PostgresOptions { settings }).await;
    let tap = Tap::on(&lab).await;
    lab.sql("create table app (n bigserial primary key, id uuid not null, key text)").await;
    let _relay = lab.relay().await;
    for round in 0..3 {
        let mut conn = lab.connect().await;
        conn.execute("set synchronous_commit = off").await.expect("sets");
        let before = tap.depth().await;
        for i in 0..40 {
            sqlx::query("insert into app (id, key) select oncebox.publish('t', to_jsonb($1::int), key => 'k'), 'k'")
                .bind(round * 1000 + i)
                .execute(&mut conn)
                .await
                .expect("publishes");
        }
        eventually("some of it is published", async || (tap.depth().await > before).then_some(())).await;
        lab.postgres.kill9();
        lab.postgres.restart().await.expect("Postgres restarts");
    }
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_lease where expires_at > now()", 1).await;
    let committed = storm::committed(&lab).await;
    // A ghost, a message on the wire that the database has lost, fails here.
    tap.read(committed.len()).await.assert_exactly(&committed);
}

/// Waits until a commit of this application waits for the standby, and cancels the wait.
async fn cancel_a_waiting_commit(lab: &Lab, application: &str) {
    end_a_waiting_commit(lab, application, "pg_cancel_backend").await;
}

async fn end_a_waiting_commit(lab: &Lab, application: &str, how: &str) {
    eventually("a commit waits for the standby", async || {
        let cancel = sqlx::query_scalar(AssertSqlSafe(format!(
            "select count(*) from (select {how}(pid) from pg_stat_activity
            where wait_event = 'SyncRep' and application_name = $1) as c",
        )));
        let cancelled: i64 =
            cancel.bind(application).fetch_one(&mut connect(&lab.database_url).await).await.expect("cancels");
        (cancelled > 0).then_some(())
    })
    .await;
}

/// Goal: while the synchronous standby is away nothing is published, also when somebody cancels the waiting commit;
/// afterwards everything is.
#[tokio::test]
async fn a_cancelled_wait_for_the_standby_is_no_fence() {
    let lab = Lab::own().await;
    let tap = Tap::on(&lab).await;
    let relay = lab.relay().await;
    lab.require_absent_standby().await;
    let mut conn = lab.connect().await;
    conn.execute("set synchronous_commit = local; select oncebox.publish('t', '1')").await.expect("publishes");
    for _ in 0..3 {
        cancel_a_waiting_commit(&lab, "oncebox relay").await;
    }
    relay.wait_for_log("was not confirmed as durable").await;
    assert_eq!(tap.depth().await, 0, "a message was published that no standby has");
    lab.require_no_standby().await;
    assert_eq!(tap.read(1).await.deliveries.len(), 1);
}

/// Goal: a fenced commit fails when its wait was cancelled, and holds when nothing happened.
#[tokio::test]
async fn a_fence_tells_a_cancelled_commit_from_a_good_one() {
    let lab = Lab::own().await;
    let options = SessionOptions {
        application_name: "fenced",
        statement_timeout: Duration::from_secs(30),
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let mut conn = db::connect(&lab.database_url, options).await.expect("connects");
    let lease = lease::take(&mut conn, 0, Uuid::now_v7(), "test").await.expect("fenced").expect("free");
    lab.require_absent_standby().await;
    let renewing = tokio::spawn(async move {
        // Reloading is not instant: until then the renewal is a good fence.
        loop {
            let place = oncebox::outbox::journal::LogPlace { n: 0, seq: 0 };
            if let Err(error) = lease::renew(&mut conn, lease, place).await {
                return error;
            }
        }
    });
    cancel_a_waiting_commit(&lab, "fenced").await;
    assert!(matches!(renewing.await.expect("no panic"), DbError::FenceBroken(_)));
}

/// Goal: a look whose commit was cancelled while it waited for the standby hands out no row, although the rows of the
/// window came over the wire before that commit.
#[tokio::test]
async fn a_look_with_a_cancelled_commit_hands_out_nothing() {
    let lab = Lab::own().await;
    let options = SessionOptions {
        application_name: "looking",
        statement_timeout: Duration::from_secs(30),
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: true,
    };
    let mut conn = db::connect(&lab.database_url, options).await.expect("connects");
    let lease = lease::take(&mut conn, 0, Uuid::now_v7(), "test").await.expect("fenced").expect("free");
    lab.require_absent_standby().await;
    let looking = tokio::spawn(async move {
        let mut newest = journal::resume(&mut conn, 0).await.expect("resumes").plans.pop_back().expect("a plan").plan;
        // Reloading is not instant: until then the look is a good fence.
        loop {
            let publish =
                sqlx::raw_sql("begin; set local synchronous_commit = local; select oncebox.publish('t', '1'); commit");
            publish.execute(&mut conn).await.expect("publishes");
            let settled = LogPlace { n: 0, seq: 0 };
            let record = PlanRecord { settled, keyframe: false, streams: Vec::new(), bases: Vec::new() };
            match look::look(&mut conn, lease.epoch, &newest, false, record, 10).await {
                Ok(sight) => {
                    let opened = sight.opened.expect("the message is found");
                    assert_eq!(opened.rows.len(), 1);
                    newest = opened.recorded.plan;
                }
                Err(error) => return (error, newest.n),
            }
        }
    });
    cancel_a_waiting_commit(&lab, "looking").await;
    let (error, n) = looking.await.expect("no panic");
    assert!(matches!(error, DbError::FenceBroken(_)), "{error}");
    // The plan stands: its rows are read again behind a later fence.
    assert_eq!(lab.number("select max(n) from oncebox.outbox_plan").await, n + 1);
}

const CONSUMER: &str = "
    create schema shop;
    create table shop.effect (id uuid);
    create function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    begin
        if payload ? 'bad' then raise exception 'a bad message'; end if;
        if payload ? 'warn' then raise warning 'mind the step'; end if;
        insert into shop.effect values (message_id);
    end
    $$;";

fn consumer(lab: &Lab, extra: &str) -> String {
    lab.config(&format!(
        "[[consumer]]\nname = \"shop\"\nbindings = [\"t\"]\nhandler = {{ sql = \"shop.on_message\" }}\n\
         max_attempts = 1\n{extra}"
    ))
}

/// Messages in the consumer's queue that are not acknowledged.
async fn in_queue(lab: &Lab) -> i64 {
    let list = ["list_queues", "-p", &lab.name, "--quiet", "--no-table-headers", "name", "messages"];
    let listing = lab.rabbit.ctl(&list).await.expect("rabbitmqctl answers");
    let count = listing.lines().find_map(|line| line.strip_prefix("shop\t")).expect("the queue is listed");
    count.trim().parse().expect("a number")
}

/// Publishes these messages, has a consumer commit what becomes of them while there is no standby, and ends its waits:
/// the first by ending the session if `terminate`. Nothing may be acknowledged; afterwards everything is, `outcome`s
/// later.
async fn is_acknowledged_behind_the_standby(extra: &str, count: i64, payload: &str, terminate: bool, outcome: &str) {
    let lab = Lab::own().await;
    lab.sql(CONSUMER).await;
    let path = consumer(&lab, extra);
    lab.consume(&path).await.stop().await;
    let mut relay = lab.relay().await;
    lab.sql(&format!("select oncebox.publish('t', '{payload}') from generate_series(1, {count})")).await;
    eventually("the messages are in the queue", async || (in_queue(&lab).await == count).then_some(())).await;
    relay.stop().await;
    lab.require_absent_standby().await;
    let _consumer = lab.consume(&path).await;
    if terminate {
        end_a_waiting_commit(&lab, "oncebox consume", "pg_terminate_backend").await;
    }
    for _ in 0..4 {
        cancel_a_waiting_commit(&lab, "oncebox consume").await;
    }
    assert_eq!(in_queue(&lab).await, count, "acknowledged what no standby has");
    lab.require_no_standby().await;
    eventually("the queue is empty", async || (in_queue(&lab).await == 0).then_some(())).await;
    assert_eq!(lab.number(outcome).await, count);
}

const EFFECTS: &str = "select count(*) from shop.effect";

/// Goal: a message is not acknowledged while the standby has not its effect, also when somebody cancels the waiting
/// commit; applied in one statement.
#[tokio::test]
async fn one_message_is_acknowledged_behind_the_standby() {
    is_acknowledged_behind_the_standby("batch = 1\n", 1, "{}", false, EFFECTS).await;
}

/// Goal: the same for a batch.
#[tokio::test]
async fn a_batch_is_acknowledged_behind_the_standby() {
    is_acknowledged_behind_the_standby("", 50, "{}", false, EFFECTS).await;
}

/// Goal: the same step by step.
#[tokio::test]
async fn a_transaction_is_acknowledged_behind_the_standby() {
    is_acknowledged_behind_the_standby("order = \"stream\"\n", 1, "{}", false, EFFECTS).await;
}

/// Goal: the same when the session ends in its wait: what is found done afterwards is not known to be durable.
#[tokio::test]
async fn what_is_done_already_is_acknowledged_behind_the_standby() {
    for extra in ["batch = 1\n", "order = \"stream\"\n"] {
        is_acknowledged_behind_the_standby(extra, 1, "{}", true, EFFECTS).await;
    }
    is_acknowledged_behind_the_standby("", 50, "{}", true, EFFECTS).await;
}

/// Goal: the same for a message that is held or parked.
#[tokio::test]
async fn a_held_message_is_acknowledged_behind_the_standby() {
    let parked = "select count(*) from oncebox.inbox_held where state = 'parked'";
    is_acknowledged_behind_the_standby("batch = 1\n", 1, "{\"bad\": 1}", false, parked).await;
}

/// Goal: a handler that warns is applied without a second try, and its warnings are logged.
#[tokio::test]
async fn a_handler_may_warn() {
    for extra in ["", "batch = 1\n", "order = \"stream\"\n"] {
        let lab = Lab::shared().await;
        lab.sql(CONSUMER).await;
        let consumer = lab.consume(&consumer(&lab, extra)).await;
        let _relay = lab.relay().await;
        lab.sql("select oncebox.publish('t', '{\"warn\": 1}') from generate_series(1, 20)").await;
        eventually_number(&mut lab.connect().await, EFFECTS, 20).await;
        consumer.wait_for_log("mind the step").await;
        assert!(!consumer.log().contains("not done"), "{}", consumer.log());
    }
}
