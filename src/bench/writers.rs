//! Apps that publish: sessions with a transaction a message, on a schedule that waits for nobody, or flat out.
//!
//! A writer that was held up starts what it missed at once and one after the other, and says how late it was: the rate
//! stays what was asked for, and a stall of the database shows as lateness, not as a lower rate (no coordinated omission).

use super::scratch::body;
use anyhow::Context;
use sqlx::{Connection, PgConnection};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use uuid::Uuid;

/// Longest transaction: after that the server is taken for dead.
const LIMIT: Duration = Duration::from_secs(30);

/// What is written.
#[derive(Debug, Clone)]
pub(super) struct Load {
    pub database_url: String,
    /// Sessions.
    pub writers: u32,
    /// Messages a second of all together; none: flat out.
    pub rate: Option<u32>,
    /// Bytes of a payload.
    pub payload: usize,
    /// Ordering keys, 0 for none.
    pub keys: i64,
    pub from: Instant,
    pub until: Instant,
}

/// One committed transaction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Commit {
    pub id: Uuid,
    /// When it was to begin; flat out, when it began.
    pub due: Instant,
    pub began: Instant,
    /// When the commit had returned.
    pub committed: Instant,
}

/// Writers at work.
pub(super) struct Writers {
    sessions: JoinSet<anyhow::Result<Vec<Commit>>>,
    committed: Arc<AtomicU64>,
}

impl Writers {
    /// Starts them; with `keep` each transaction is remembered, otherwise they are counted.
    pub(super) async fn start(load: &Load, keep: bool) -> anyhow::Result<Self> {
        let committed = Arc::new(AtomicU64::new(0));
        let mut sessions = JoinSet::new();
        for number in 0..load.writers {
            let conn = PgConnection::connect(&load.database_url).await?;
            sessions.spawn(write(conn, load.clone(), number, keep, Arc::clone(&committed)));
        }
        Ok(Self { sessions, committed })
    }

    /// Committed so far.
    pub(super) fn committed(&self) -> u64 {
        self.committed.load(Ordering::SeqCst)
    }

    /// Waits for their end: how many transactions there were, and those remembered.
    pub(super) async fn end(mut self) -> anyhow::Result<(u64, Vec<Commit>)> {
        let mut commits = Vec::new();
        while let Some(ended) = self.sessions.join_next().await {
            commits.extend(ended.context("a writer")??);
        }
        Ok((self.committed.load(Ordering::SeqCst), commits))
    }
}

async fn write(
    mut conn: PgConnection,
    load: Load,
    number: u32,
    keep: bool,
    committed: Arc<AtomicU64>,
) -> anyhow::Result<Vec<Commit>> {
    let payload: serde_json::Value = serde_json::from_str(&body(load.payload))?;
    let pause = load.rate.map(|rate| Duration::from_secs_f64(f64::from(load.writers) / f64::from(rate)));
    let mut due = load.from + pause.unwrap_or_default() * number / load.writers;
    let mut commits = Vec::new();
    let mut ordinal = i64::from(number);
    tokio::time::sleep_until(due.into()).await;
    while due < load.until && Instant::now() < load.until {
        let key = (load.keys > 0).then(|| format!("k{}", ordinal % load.keys));
        let began = Instant::now();
        let publish = sqlx::query_scalar("select oncebox.publish('order.placed', $1, key => $2)")
            .bind(&payload)
            .bind(key)
            .fetch_one(&mut conn);
        let id = tokio::time::timeout(LIMIT, publish).await.context("a transaction took too long")??;
        let now = Instant::now();
        committed.fetch_add(1, Ordering::SeqCst);
        if keep {
            let due = if pause.is_some() { due } else { began };
            commits.push(Commit { id, due, began, committed: now });
        }
        ordinal += i64::from(load.writers);
        due = match pause {
            Some(pause) => due + pause,
            None => now,
        };
        if due > now {
            tokio::time::sleep_until(due.into()).await;
        }
    }
    conn.close().await?;
    Ok(commits)
}
