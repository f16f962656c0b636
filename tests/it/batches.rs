//! Goal: messages that share a transaction are each applied exactly once and in the order of their key, whatever ends
//! it, and the failure of one touches no other; and sharing is what makes them fast.

use crate::support::{Lab, Process, connect, eventually, eventually_number};
use sqlx::Executor;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Effects are numbered in the order in which they were written. `bad` fails, `late` fails at the commit, `slow` runs
/// too long. A row of `shop.call` is a failure's trace only if it was not rolled back.
const SCHEMA: &str = "
    create schema shop;
    create table shop.effect (
        n bigserial primary key, key text, number bigint, xid bigint default pg_current_xact_id()::text::bigint);
    create table shop.parent (id bigint primary key);
    create table shop.child (parent bigint references shop.parent deferrable initially deferred);
    create table shop.hot (id bigint primary key, total bigint not null default 0);
    insert into shop.hot (id) select generate_series(0, 9);
    create function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    begin
        insert into shop.effect (key, number) values (headers ->> 'oncebox-key', (payload ->> 'n')::bigint);
        if payload ? 'bad' then raise exception 'a bad message'; end if;
        if payload ? 'late' then insert into shop.child values (7); end if;
        if payload ? 'slow' then perform pg_sleep(60); end if;
        if payload ? 'hot' then update shop.hot set total = total + 1 where id = (payload ->> 'hot')::bigint; end if;
    end
    $$;";

fn config(extra: &str) -> String {
    format!(
        "[[consumer]]\nname = \"shop\"\nbindings = [\"order.#\"]\nhandler = {{ sql = \"shop.on_message\" }}\n\
         backoff_initial = \"20ms\"\nbackoff_cap = \"50ms\"\nmax_attempts = 2\n{extra}"
    )
}

/// Publishes numbers over `keys` keys, with something extra in the payload of one of them.
async fn publish(lab: &Lab, from: i64, to: i64, keys: i64, special: (i64, &str)) {
    lab.sql(&format!(
        "select oncebox.publish('order.placed', jsonb_build_object('n', i)
            || case when i = {} then '{}'::jsonb else '{{}}' end, key => 'k' || i % {keys})
        from generate_series({from}, {to}) as i",
        special.0, special.1
    ))
    .await;
}

async fn effects(lab: &Lab) -> HashMap<String, Vec<i64>> {
    let rows: Vec<(String, i64)> = sqlx::query_as("select key, number from shop.effect order by n")
        .fetch_all(&mut connect(&lab.database_url).await)
        .await
        .unwrap();
    let mut effects: HashMap<String, Vec<i64>> = HashMap::new();
    for (key, number) in rows {
        effects.entry(key).or_default().push(number);
    }
    effects
}

/// Every number but `missing` once, in order within its key.
fn assert_in_order(mut effects: HashMap<String, Vec<i64>>, count: i64, keys: i64, missing: i64) {
    for key in 0..keys {
        let expected: Vec<i64> = (1..=count).filter(|n| n % keys == key && *n != missing).collect();
        assert_eq!(effects.remove(&format!("k{key}")).unwrap_or_default(), expected, "key k{key}");
    }
}

/// The number of effects that share a transaction with others.
const SHARED: &str = "select coalesce(sum(c), 0)::bigint
    from (select count(*) as c from shop.effect group by xid having count(*) > 1) as t";

/// Publishes everything before the consumer takes its queue up, so that it meets full batches.
async fn with_backlog(lab: &Lab, config: &str, count: i64, keys: i64, special: (i64, &str)) -> (Process, Process) {
    lab.sql(SCHEMA).await;
    let path = lab.config(config);
    lab.consume(&path).await.stop().await;
    let relay = lab.relay().await;
    publish(lab, 1, count, keys, special).await;
    queue_holds(lab, count).await;
    (relay, lab.consume(&path).await)
}

async fn queue_holds(lab: &Lab, count: i64) {
    let line = format!("shop\t{count}");
    eventually("the queue is full", async || {
        let list = ["list_queues", "-p", &lab.name, "--quiet", "--no-table-headers", "name", "messages"];
        let listing = lab.rabbit.ctl(&list).await.expect("rabbitmqctl answers");
        listing.lines().any(|found| found.trim() == line).then_some(())
    })
    .await;
}

/// Goal: most messages of a backlog share their transaction with others, and keep the order they came in, also those
/// of one key within a batch.
#[tokio::test]
async fn a_backlog_is_applied_in_batches_and_in_order() {
    let lab = Lab::shared().await;
    let _running = with_backlog(&lab, &config(""), 2_000, 3, (0, "{}")).await;
    eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", 2_000).await;
    assert_in_order(effects(&lab).await, 2_000, 3, 0);
    let shared = lab.number(SHARED).await;
    assert!(shared > 1_500, "only {shared} of 2,000 effects share a transaction");
}

/// What a failing message in the middle of a backlog leaves behind.
async fn one_fails(special: &str, extra: &str, parked: &str) {
    let lab = Lab::shared().await;
    let (count, keys, bad) = (400, 4, 101);
    let _running = with_backlog(&lab, &config(extra), count, keys, (bad, special)).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held where state = 'parked'", 1).await;
    eventually_number(&mut conn, "select count(*) from shop.effect", count - 1).await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held", 1).await;
    assert_in_order(effects(&lab).await, count, keys, bad);
    let found: (String, String, i32) = sqlx::query_as("select reason, last_error, attempts from oncebox.inbox_held")
        .fetch_one(&mut conn)
        .await
        .unwrap();
    assert_eq!((found.0.as_str(), found.2), ("too_many_attempts", 2));
    assert!(found.1.contains(parked), "{}", found.1);
    assert!(lab.number(SHARED).await > count / 4, "nothing was shared: the test shows nothing");
}

/// Goal: one failing message among many: it alone is held and parked, its key's later ones wait for that and go on in
/// order, all others are applied once.
#[tokio::test]
async fn one_failing_message_touches_no_other() {
    one_fails("{\"bad\": 1}", "", "a bad message").await;
}

/// Goal: the same when it fails only at the commit of them all.
#[tokio::test]
async fn one_that_fails_at_the_commit_touches_no_other() {
    one_fails("{\"late\": 1}", "", "foreign key").await;
}

/// Goal: the same when it runs too long.
#[tokio::test]
async fn one_that_runs_too_long_touches_no_other() {
    one_fails("{\"slow\": 1}", "handler_timeout = \"500ms\"\n", "statement timeout").await;
}

/// Goal: without order, two processes whose messages touch the same few rows in different orders do not end each
/// other: no batch is rolled back for a deadlock, and every effect is there once.
#[tokio::test]
async fn processes_that_share_rows_do_not_deadlock() {
    let lab = Lab::shared().await;
    lab.sql(SCHEMA).await;
    let path = lab.config(&config("order = \"none\"\n"));
    let consumers = [lab.consume(&path).await, lab.consume(&path).await];
    let _relay = lab.relay().await;
    let count = 6_000;
    lab.sql(&format!(
        "select oncebox.publish('order.placed',
            jsonb_build_object('n', i, 'hot', ('x' || substr(md5(i::text), 1, 6))::bit(24)::int % 10))
        from generate_series(1, {count}) as i"
    ))
    .await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from shop.effect", count).await;
    assert_eq!(lab.number("select sum(total)::bigint from shop.hot").await, count);
    assert_eq!(lab.number("select count(distinct number) from shop.effect").await, count);
    assert!(lab.number(SHARED).await > count / 2, "nothing was shared: the test shows nothing");
    for consumer in &consumers {
        assert!(!consumer.log().contains("deadlock"), "{}", consumer.log());
    }
}

/// Goal: a consumer that dies before, in or after the commit of a batch, again and again, loses, doubles and reorders
/// nothing.
#[tokio::test]
async fn a_crash_around_a_batch_loses_doubles_and_reorders_nothing() {
    for point in ["consumer.batch_accepted", "consumer.batch_handled", "consumer.batch_committed"] {
        let lab = Lab::shared().await;
        lab.sql(SCHEMA).await;
        let path = lab.config(&config(""));
        lab.consume(&path).await.stop().await;
        let _relay = lab.relay().await;
        let (count, keys) = (1_500, 7);
        publish(&lab, 1, count, keys, (0, "{}")).await;
        queue_holds(&lab, count).await;
        for hit in [1, 3] {
            let mut command = lab.command(&["consume", "--config", &path]);
            command.env("ONCEBOX_FAILPOINT", format!("{point}={hit}"));
            let mut doomed = Process::spawn(command);
            doomed.end().await;
            assert!(doomed.log().contains(&format!("failpoint {point}")), "{}", doomed.log());
        }
        let _consumer = lab.consume(&path).await;
        eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", count).await;
        eventually_number(&mut lab.connect().await, "select count(*) from oncebox.inbox_held", 0).await;
        assert_in_order(effects(&lab).await, count, keys, 0);
    }
}

/// Goal: a slow handler is not slowed down further: its messages run side by side after a few, in the order of their
/// keys.
#[tokio::test]
async fn slow_handlers_run_side_by_side() {
    let lab = Lab::shared().await;
    lab.sql(SCHEMA).await;
    lab.sql("create or replace function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language sql as $$ select pg_sleep(0.05);
            insert into shop.effect (key, number) values ($4 ->> 'oncebox-key', ($3 ->> 'n')::bigint) $$")
    .await;
    let path = lab.config(&config(""));
    let _consumer = lab.consume(&path).await;
    let _relay = lab.relay().await;
    let (count, keys) = (800, 80);
    let began = Instant::now();
    publish(&lab, 1, count, keys, (0, "{}")).await;
    eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", count).await;
    // One after the other they take 40 s.
    assert!(began.elapsed() < Duration::from_secs(28), "{:?}", began.elapsed());
    assert_in_order(effects(&lab).await, count, keys, 0);
}

/// Goal: the same where a first batch does not fit into the handler's time-out: it is not tried again and again.
#[tokio::test]
async fn handlers_slow_for_their_time_out_run_side_by_side() {
    let lab = Lab::shared().await;
    lab.sql(SCHEMA).await;
    lab.sql("alter table shop.effect add session integer default pg_backend_pid();
        create or replace function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language sql as $$ select pg_sleep(0.25);
            insert into shop.effect (key, number) values ($4 ->> 'oncebox-key', ($3 ->> 'n')::bigint) $$")
    .await;
    let path = lab.config(&config("handler_timeout = \"1s\"\n"));
    let _consumer = lab.consume(&path).await;
    let _relay = lab.relay().await;
    let (count, keys) = (60, 20);
    publish(&lab, 1, count, keys, (0, "{}")).await;
    eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", count).await;
    let sessions = lab.number("select count(distinct session) from shop.effect").await;
    assert!(sessions > 2, "{sessions} sessions applied them");
    assert_in_order(effects(&lab).await, count, keys, 0);
}

/// Goal: a batch is what is waiting and never waits for more: with one message at a time, each is handled before the next
/// one is there, and shares its transaction with no other.
#[tokio::test]
async fn a_single_delivery_is_handled_at_once() {
    let lab = Lab::shared().await;
    lab.sql(SCHEMA).await;
    let _consumer = lab.consume(&lab.config(&config(""))).await;
    let _relay = lab.relay().await;
    let mut conn = lab.connect().await;
    for n in 1..=20 {
        publish(&lab, n, n, 3, (0, "{}")).await;
        eventually_number(&mut conn, "select count(*) from shop.effect", n).await;
    }
    assert_eq!(lab.number(SHARED).await, 0);
}

/// Goal: batches are the default, and `batch = 1` switches them off.
#[tokio::test]
async fn batch_1_switches_batches_off() {
    let lab = Lab::shared().await;
    let _running = with_backlog(&lab, &config("batch = 1\n"), 300, 3, (0, "{}")).await;
    eventually_number(&mut lab.connect().await, "select count(*) from shop.effect", 300).await;
    assert_in_order(effects(&lab).await, 300, 3, 0);
    assert_eq!(lab.number(SHARED).await, 0);
}

/// Goal: one statement for accepting and handling does not mix up whose fault a failure is: what the inbox refuses is
/// parked at once, what the handler raises counts as its attempt, whatever the code.
#[tokio::test]
async fn whose_fault_it_is_is_known() {
    for (batch, code) in [(1, "OB001"), (1, "22023"), (100, "OB001")] {
        let lab = Lab::shared().await;
        lab.sql(SCHEMA).await;
        lab.sql(&format!(
            "create or replace function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb)
            returns void language plpgsql as $$ begin
                if payload ? 'bad' then raise exception using errcode = '{code}', message = 'the handler says no'; end if;
                insert into shop.effect (key, number) values ('k', (payload ->> 'n')::bigint);
            end $$"
        ))
        .await;
        let _consumer = lab.consume(&lab.config(&config(&format!("batch = {batch}\n")))).await;
        let _relay = lab.relay().await;
        publish(&lab, 1, 6, 1, (3, "{\"bad\": 1}")).await;
        let mut conn = lab.connect().await;
        let held = "select count(*) from oncebox.inbox_held where state = 'parked' and reason = 'too_many_attempts'
            and attempts = 2 and last_error like '%the handler says no%'";
        eventually_number(&mut conn, held, 1).await;
        eventually_number(&mut conn, "select count(*) from shop.effect", 5).await;
        eventually_number(&mut conn, "select count(*) from oncebox.inbox_held", 1).await;
    }
}

/// Goal: while one message waits for a row that somebody has locked, the others are applied; and the order of its key holds.
#[tokio::test]
async fn a_message_that_waits_for_a_lock_holds_up_no_other() {
    let lab = Lab::shared().await;
    lab.sql(SCHEMA).await;
    let mut holder = lab.connect().await;
    holder.execute("begin; update shop.hot set total = 0 where id = 5").await.unwrap();
    let _consumer = lab.consume(&lab.config(&config(""))).await;
    let _relay = lab.relay().await;
    let (count, keys, waits) = (400, 40, 50);
    publish(&lab, 1, count, keys, (waits, "{\"hot\": 5}")).await;
    let mut conn = lab.connect().await;
    // Those of its key wait, and those of keys that the same worker has.
    let others = format!("select (count(*) >= {})::int::bigint from shop.effect", count / 2);
    eventually_number(&mut conn, &others, 1).await;
    assert_eq!(lab.number(&format!("select count(*) from shop.effect where number = {waits}")).await, 0);
    holder.execute("commit").await.unwrap();
    eventually_number(&mut conn, "select count(*) from shop.effect", count).await;
    assert_in_order(effects(&lab).await, count, keys, 0);
}

/// Goal: a message that comes again after a crash, while the statement of the process that died still has it, holds up no
/// other key either.
#[tokio::test]
async fn a_message_that_comes_again_and_waits_holds_up_no_other() {
    let lab = Lab::shared().await;
    lab.sql(SCHEMA).await;
    let mut holder = lab.connect().await;
    let id = uuid::Uuid::now_v7();
    holder.execute("begin").await.expect("begins");
    sqlx::query("select oncebox.accept('shop', $1)").bind(id).execute(&mut holder).await.expect("accepts");
    let path = lab.config(&config(""));
    let mut doomed = lab.consume(&path).await;
    let _relay = lab.relay().await;
    lab.sql(&format!("select oncebox.publish('order.placed', '{{\"n\": 1}}', key => 'k1', message_id => '{id}')"))
        .await;
    let mut conn = lab.connect().await;
    let waits = "select (count(*) > 0)::int::bigint from pg_stat_activity
        where datname = current_database() and application_name = 'oncebox consume' and wait_event_type = 'Lock'";
    eventually_number(&mut conn, waits, 1).await;
    doomed.kill9();
    let _consumer = lab.consume(&path).await;
    let (count, keys) = (400, 40);
    publish(&lab, 2, count, keys, (0, "{}")).await;
    // Those of its key wait, and those of keys that the same worker has.
    let others = format!("select (count(*) >= {})::int::bigint from shop.effect", count / 2);
    eventually_number(&mut conn, &others, 1).await;
    assert_eq!(lab.number("select count(*) from shop.effect where number = 1").await, 0);
    holder.execute("rollback").await.expect("rolls back");
    eventually_number(&mut conn, "select count(*) from shop.effect", count).await;
    assert_in_order(effects(&lab).await, count, keys, 0);
}

/// Goal: a handler that the planner may put in the place of its call reads what the message before it wrote.
#[tokio::test]
async fn a_handler_in_sql_sees_the_message_before_it() {
    for batch in [1, 100] {
        let lab = Lab::shared().await;
        lab.sql(SCHEMA).await;
        lab.sql(
            "create function shop.total_of(which bigint) returns bigint language plpgsql stable as $$
                begin return (select h.total from shop.hot as h where h.id = which); end $$;
            create function shop.set_total(which bigint, new_total bigint) returns void language plpgsql as $$
                begin update shop.hot set total = new_total where id = which; end $$;
            create or replace function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb)
            returns void language sql as $$ select shop.set_total(5, shop.total_of(5) + 1) $$",
        )
        .await;
        let path = lab.config(&config(&format!("batch = {batch}\n")));
        lab.consume(&path).await.stop().await;
        let _relay = lab.relay().await;
        publish(&lab, 1, 60, 1, (0, "{}")).await;
        queue_holds(&lab, 60).await;
        let _consumer = lab.consume(&path).await;
        eventually_number(&mut lab.connect().await, "select count(*) from oncebox.inbox", 60).await;
        assert_eq!(lab.number("select total from shop.hot where id = 5").await, 60, "batch {batch}");
    }
}

/// Goal: the same when the handler becomes such a function while the consumer runs.
#[tokio::test]
async fn a_handler_replaced_by_one_in_sql_sees_the_message_before_it() {
    let lab = Lab::shared().await;
    lab.sql(SCHEMA).await;
    let function = "function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void";
    lab.sql(&format!(
        "create function shop.total() returns bigint language plpgsql stable as $$
            begin return (select h.total from shop.hot as h where h.id = 5); end $$;
        create function shop.set_total(new_total bigint) returns void language plpgsql as $$
            begin update shop.hot set total = new_total where id = 5; end $$;
        create or replace {function} language plpgsql as $$
            begin perform shop.set_total(shop.total() + 1); end $$"
    ))
    .await;
    let consumer = lab.consume(&lab.config(&config(""))).await;
    let _relay = lab.relay().await;
    let mut conn = lab.connect().await;
    publish(&lab, 1, 500, 1, (0, "{}")).await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox", 500).await;
    lab.sql(&format!("create or replace {function} language sql as $$ select shop.set_total(shop.total() + 1) $$"))
        .await;
    // It meets them all at once, or none might wait for another.
    consumer.signal("STOP");
    publish(&lab, 501, 1_000, 1, (0, "{}")).await;
    queue_holds(&lab, 500).await;
    consumer.signal("CONT");
    eventually_number(&mut conn, "select count(*) from oncebox.inbox", 1_000).await;
    let transactions = lab.number("select count(distinct xmin::text) from oncebox.inbox").await;
    assert!(transactions < 900, "nothing was shared: the test shows nothing: {transactions}");
    assert_eq!(lab.number("select total from shop.hot where id = 5").await, 1_000);
}
