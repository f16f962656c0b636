//! Writers like those of an app: concurrent transactions that publish, some rolled back, some committed
//! asynchronously. What was committed is read from a table they write in the same transactions.

use super::wire::Published;
use super::{Lab, connect};
use sqlx::{Connection, Executor, PgConnection};
use std::time::Duration;
use tokio::task::JoinSet;

/// What a storm does.
#[derive(Debug, Clone, Copy)]
pub struct Storm {
    pub writers: usize,
    /// Transactions of each writer that commit or roll back.
    pub transactions: usize,
    /// Messages of one transaction.
    pub batch: usize,
    pub keys: usize,
}

/// A few bits of a number that look random.
fn mix(n: usize) -> usize {
    let mixed = (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) as usize >> 33
}

/// The tables the writers use. Call it once, before the storm.
pub async fn prepare(lab: &Lab, storm: Storm) {
    lab.sql("create table app (n bigserial primary key, id uuid not null, key text); create table app_key (key text primary key)")
        .await;
    lab.sql(&format!("insert into app_key select 'k' || i from generate_series(0, {}) as i", storm.keys - 1)).await;
}

/// Runs the writers to their end; a writer whose session breaks connects again and goes on.
pub async fn run(database_url: String, storm: Storm) {
    let mut writers = JoinSet::new();
    for writer in 0..storm.writers {
        let url = database_url.clone();
        writers.spawn(async move {
            let mut conn = None;
            for number in 0..storm.transactions {
                let n = writer * storm.transactions + number;
                // The outcome of a broken commit is unknown: the table tells, and the next number goes on.
                let mut session = match conn.take() {
                    Some(session) => session,
                    None => reconnect(&url).await,
                };
                if transaction(&mut session, storm, n).await.is_ok() {
                    conn = Some(session);
                }
            }
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended.expect("a writer does not panic");
    }
}

async fn reconnect(url: &str) -> PgConnection {
    loop {
        if let Ok(Ok(conn)) = tokio::time::timeout(Duration::from_secs(5), PgConnection::connect(url)).await {
            return conn;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn transaction(conn: &mut PgConnection, storm: Storm, n: usize) -> Result<(), sqlx::Error> {
    conn.execute(if mix(n).is_multiple_of(3) { "begin; set local synchronous_commit = off" } else { "begin" }).await?;
    let key = (!mix(n + 1).is_multiple_of(10)).then(|| format!("k{}", mix(n + 2) % storm.keys));
    if let Some(key) = &key {
        // As an app does that needs the order of its key: the row lock first, then publish.
        sqlx::query("select from app_key where key = $1 for update").bind(key).execute(&mut *conn).await?;
    }
    sqlx::query(
        "insert into app (id, key)
        select oncebox.publish('t.' || (i + $1) % 3, jsonb_build_object('n', $1, 'i', i), key => $2), $2
        from generate_series(1, $3) as i",
    )
    .bind(n as i32)
    .bind(&key)
    .bind(storm.batch as i32)
    .execute(&mut *conn)
    .await?;
    conn.execute(if mix(n + 3).is_multiple_of(10) { "rollback" } else { "commit" }).await?;
    Ok(())
}

/// What the database says was committed, in each key's order.
pub async fn committed(lab: &Lab) -> Vec<Published> {
    let mut conn = connect(&lab.database_url).await;
    let rows: Vec<(String, Option<String>)> =
        sqlx::query_as("select id::text, key from app order by n").fetch_all(&mut conn).await.expect("reads");
    rows.into_iter().map(|(id, key)| Published { id, key }).collect()
}
