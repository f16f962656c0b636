//! Goal: a message that ends the consumer process each time it is handled is noticed and parked, and costs no other
//! message anything.

use crate::support::{Lab, Process, connect, eventually_number, number};
use sqlx::PgConnection;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// The poison's handler takes a lock that the test sees, and stays there until the test has killed the process.
const SCHEMA: &str = "
    create schema shop;
    create table shop.effect (n bigserial primary key, key text, number bigint);
    create function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    begin
        if payload ? 'poison' then
            perform pg_advisory_xact_lock(4711);
            perform pg_sleep(60);
        end if;
        perform pg_sleep(0.003);
        insert into shop.effect (key, number) values (headers ->> 'oncebox-key', (payload ->> 'n')::bigint);
    end
    $$;";

const COUNT: i64 = 600;
const KEYS: i64 = 20;
const LIMIT: Duration = Duration::from_secs(120);

fn config(order: &str, max_attempts: u32) -> String {
    format!(
        "[[consumer]]\nname = \"shop\"\nbindings = [\"order.#\"]\nhandler = {{ sql = \"shop.on_message\" }}\n\
         concurrency = 8\nbackoff_initial = \"20ms\"\nbackoff_cap = \"50ms\"\n\
         order = \"{order}\"\nmax_attempts = {max_attempts}\n"
    )
}

/// Kills every process when one of them handles the poison; true if so.
async fn kill_at_the_poison(conn: &mut PgConnection, processes: &mut [Process]) -> bool {
    const HOLDER: &str = "select pid from pg_locks join pg_database on pg_database.oid = pg_locks.database
        where locktype = 'advisory' and granted and objid = 4711 and datname = current_database()";
    let Some(pid) = sqlx::query_scalar::<_, i32>(HOLDER).fetch_optional(&mut *conn).await.unwrap() else {
        return false;
    };
    for process in processes {
        process.kill9();
    }
    // Its session would notice at the end of the statement only.
    sqlx::query("select pg_terminate_backend($1, 30000)").bind(pid).execute(conn).await.unwrap();
    true
}

async fn a_poison_message_is_parked(order: &str, max_attempts: u32, processes: usize) {
    let lab = Lab::shared().await;
    lab.sql(SCHEMA).await;
    let path = lab.config(&config(order, max_attempts));
    let mut consumers = vec![lab.consume(&path).await];
    while consumers.len() < processes {
        consumers.push(lab.spawn(&["consume", "--config", &path]));
    }
    let _relay = lab.relay().await;
    lab.sql(&format!(
        "select oncebox.publish('order.placed', jsonb_build_object('n', i), key => 'k' || i % {KEYS})
            from generate_series(1, {COUNT} / 2) as i;
        select oncebox.publish('order.placed', '{{\"poison\": 1}}', key => 'k3');
        select oncebox.publish('order.placed', jsonb_build_object('n', i), key => 'k' || i % {KEYS})
            from generate_series({COUNT} / 2 + 1, {COUNT}) as i;"
    ))
    .await;
    let mut conn = lab.connect().await;
    let began = Instant::now();
    let mut kills = 0;
    while number(&mut conn, "select count(*) from oncebox.inbox_held where state = 'parked'").await == 0 {
        assert!(began.elapsed() < 3 * LIMIT, "not parked after {kills} kills");
        if kill_at_the_poison(&mut conn, &mut consumers).await {
            kills += 1;
            consumers = consumers.iter().map(|_| lab.spawn(&["consume", "--config", &path])).collect();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let allowed = max_attempts.max(2) + 1;
    assert!(kills > 1 && kills <= allowed, "{kills} kills, at most {allowed} allowed");
    eventually_number(&mut conn, "select count(*) from shop.effect", COUNT).await;
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held", 1).await;
    let parked: (String, String, i32, bool) = sqlx::query_as(
        "select reason, last_error, attempts, convert_from(body, 'UTF8')::jsonb ? 'poison' from oncebox.inbox_held",
    )
    .fetch_one(&mut conn)
    .await
    .unwrap();
    let attempts = i32::try_from(max_attempts.max(2)).unwrap();
    let error = "the consumer process ended while handling it".to_owned();
    assert_eq!(parked, ("too_many_attempts".to_owned(), error, attempts, true));
    let rows: Vec<(String, i64)> = sqlx::query_as("select key, number from shop.effect order by n")
        .fetch_all(&mut connect(&lab.database_url).await)
        .await
        .unwrap();
    let mut effects: HashMap<String, Vec<i64>> = HashMap::new();
    for (key, n) in rows {
        effects.entry(key).or_default().push(n);
    }
    for key in 0..KEYS {
        let mut found = effects.remove(&format!("k{key}")).unwrap_or_default();
        if order == "none" {
            found.sort_unstable();
        }
        assert_eq!(found, (1..=COUNT).filter(|n| n % KEYS == key).collect::<Vec<_>>(), "key k{key}");
    }
}

/// Goal: with order by key: parked after its attempts; its key goes on in order, and no neighbour is blamed.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_kills_its_process_is_parked() {
    a_poison_message_is_parked("key", 3, 1).await;
}

/// Goal: the same without order, when neighbours have a single attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_kills_its_process_is_parked_without_order() {
    a_poison_message_is_parked("none", 1, 1).await;
}
