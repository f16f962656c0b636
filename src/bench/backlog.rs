//! An outbox that is filled and then drained by the real relay, in this process, on a clock at the port.
//!
//! Nothing else works in this process meanwhile, so its CPU is the relay's; a relay in a process of its own would add
//! its start and nothing else.

use super::bare::Load;
use super::cpu::Spent;
use super::scratch::{Scratch, TOPIC, body};
use super::stage::Stage;
use super::timed::{Seen, Timed};
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::relay::{self, RelayOptions};
use anyhow::{Context, bail};
use sqlx::{Connection, Executor, PgConnection};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

/// Longest time without any confirm.
const SILENCE: Duration = Duration::from_secs(60);
/// Rows of one filling transaction, and sessions that fill: apps commit concurrently, too.
const FILL_ROWS: u64 = 50_000;
const FILL_SESSIONS: u64 = 2;

/// A database with an outbox.
pub(super) struct Backlog<'a> {
    stage: &'a Stage,
    scratch: Scratch,
}

/// What a drain took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drained {
    /// From the first message published to the last one confirmed; CPU from before the relay's start to after its end.
    pub(super) whole: Spent,
    /// CPU of relay and Postgres from the first message published to the last one confirmed, where both are known.
    pub(super) cpu_s: Option<f64>,
    /// From the relay's start to its first message, with the CPU of relay and Postgres.
    pub(super) start_s: f64,
    pub(super) start_cpu_s: Option<f64>,
    pub(super) messages: u64,
}

impl<'a> Backlog<'a> {
    /// An empty outbox of so many lanes.
    pub(super) async fn create(stage: &'a Stage, lanes: u16) -> anyhow::Result<Self> {
        let scratch = Scratch::create(stage.servers.database_url()?).await?;
        let mut conn = PgConnection::connect(&scratch.url).await?;
        sqlx::query("update oncebox.setting set lanes = $1").bind(i32::from(lanes)).execute(&mut conn).await?;
        conn.close().await?;
        Ok(Self { stage, scratch })
    }

    pub(super) async fn drop(self) -> anyhow::Result<()> {
        self.scratch.drop().await
    }

    /// A session with a snapshot that sees nothing of what comes, until it is closed.
    pub(super) async fn hold_snapshot(&self) -> anyhow::Result<PgConnection> {
        let mut conn = PgConnection::connect(&self.scratch.url).await?;
        conn.execute("begin isolation level repeatable read; select count(*) from oncebox.setting").await?;
        Ok(conn)
    }

    /// Publishes in large transactions, and has what they wrote put on disk before the clock starts.
    pub(super) async fn fill(&self, load: &Load) -> anyhow::Result<()> {
        let mut sessions = JoinSet::new();
        for session in 0..FILL_SESSIONS {
            let (url, body, keys) = (self.scratch.url.clone(), body(load.payload), load.keys);
            let from = load.messages * session / FILL_SESSIONS;
            let to = load.messages * (session + 1) / FILL_SESSIONS;
            sessions.spawn(async move {
                let mut conn = PgConnection::connect(&url).await?;
                let payload: serde_json::Value = serde_json::from_str(&body)?;
                for start in (from..to).step_by(FILL_ROWS as usize) {
                    sqlx::query(
                        "select oncebox.publish($1, $2, key => case when $3 > 0 then 'k' || i % $3 end)
                        from generate_series($4, $5) as i",
                    )
                    .bind(TOPIC)
                    .bind(&payload)
                    .bind(keys)
                    .bind(start.cast_signed())
                    .bind((start + FILL_ROWS).min(to).cast_signed() - 1)
                    .execute(&mut conn)
                    .await?;
                }
                conn.close().await?;
                anyhow::Ok(())
            });
        }
        while let Some(filled) = sessions.join_next().await {
            filled??;
        }
        let mut conn = PgConnection::connect(&self.scratch.url).await?;
        conn.execute("checkpoint").await?;
        conn.close().await?;
        Ok(())
    }

    /// Runs the relay until so many messages are confirmed.
    pub(super) async fn drain(&self, messages: u64, exchange: &str) -> anyhow::Result<Drained> {
        let servers = &self.stage.servers;
        let mut options = RabbitMqOptions::new(servers.amqp_url()?);
        options.connection_name = "oncebox bench".to_owned();
        let relay_options = RelayOptions {
            database_url: self.scratch.url.clone(),
            exchange: exchange.to_owned(),
            key_window: self.stage.key_window,
            drain_deadline: Duration::from_secs(10),
            unroutable_probe: None,
        };
        let (timed, mut seen) = Timed::new(RabbitMq::new(options)?);
        let shutdown = CancellationToken::new();
        let (meter, began) = (servers.meter(), Instant::now());
        let relay = tokio::spawn(relay::run(Arc::new(timed), relay_options, shutdown.clone()));
        let guard = shutdown.drop_guard();
        let first = until(&mut seen, &relay, |seen| seen.first_published).await?;
        let (start, draining) = (meter.spent(), servers.meter());
        let last = until(&mut seen, &relay, |seen| seen.last_confirmed.filter(|_| seen.confirmed >= messages)).await?;
        let drained = draining.spent();
        let confirmed = seen.borrow().confirmed;
        drop(guard);
        relay.await??;
        Ok(Drained {
            whole: meter.spent_between(first, last),
            cpu_s: relay_and_postgres(&drained),
            start_s: (first - began).as_secs_f64(),
            start_cpu_s: relay_and_postgres(&start),
            messages: confirmed,
        })
    }
}

fn relay_and_postgres(spent: &Spent) -> Option<f64> {
    Some(spent.cpu.client? + spent.cpu.postgres?)
}

/// Waits for something to be seen, for as long as messages are confirmed meanwhile.
async fn until<T>(
    seen: &mut watch::Receiver<Seen>,
    relay: &JoinHandle<Result<(), relay::RelayError>>,
    wanted: impl Fn(&Seen) -> Option<T>,
) -> anyhow::Result<T> {
    loop {
        let now = *seen.borrow_and_update();
        if now.refused > 0 {
            bail!("{} messages were nacked or returned", now.refused);
        } else if let Some(found) = wanted(&now) {
            return Ok(found);
        } else if relay.is_finished() {
            bail!("the relay ended after {} messages", now.confirmed);
        }
        let changed = tokio::time::timeout(SILENCE, seen.changed()).await;
        changed.with_context(|| format!("no confirm for {SILENCE:?} after {} messages", now.confirmed))??;
    }
}
