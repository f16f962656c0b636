//! From commit to confirm, and from commit to effect, at a steady rate; and what an unrelated open transaction does to it.
//!
//! The baseline, in turn with it under the same load, does what a machine cannot do without: one commit, and one message
//! published and confirmed (or delivered, and its effect committed), by sessions that wait for nothing else. What is above
//! that is oncebox's own: how soon it looks, and what waits in line.

use super::cpu::Spent;
use super::figure::{Better, Measured, Section, Side, quantile};
use super::flow::{Consuming, EFFECTS, Flow, spec, with_queue_for};
use super::report::Measurement;
use super::scratch::{Scratch, body, envelope};
use super::stage::Stage;
use super::writers::{Commit, Load, Writers};
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::broker::{Broker, Publisher, QueueSpec, Subscription};
use crate::consumer::Order;
use anyhow::{Context, bail};
use clap::Args;
use sqlx::{Connection, Executor, PgConnection};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Not measured: connections, plans and batch sizes find their way.
const WARM_UP: Duration = Duration::from_secs(2);
/// Between two probes: enough for a percentile, a small share of the load.
const PROBE_EVERY: Duration = Duration::from_millis(20);
/// Longest wait for the first and for the last message.
const LIMIT: Duration = Duration::from_secs(60);

/// Until the writers begin: time to connect.
const BEFORE: Duration = Duration::from_millis(500);

const RELAY: &str = "relay";
const BOTH: &str = "relay and consumer";
const BESIDE: &str = "beside an open write transaction";

#[derive(Debug, Args)]
pub(super) struct LatencyBench {
    /// Messages a second, each in a transaction of its own
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Seconds of measuring, after two of warming up
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    seconds: u32,
    /// Sessions that commit, so that the rate does not depend on how long one commit takes
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    writers: u32,
    /// Bytes of a payload
    #[arg(long, default_value_t = 256)]
    payload: usize,
    /// Ordering keys, 0 for none
    #[arg(long, default_value_t = 0)]
    keys: i64,
    /// Most messages of a transaction of the consumer
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    batch: u32,
    /// Measure also beside a transaction that has written elsewhere and stays open all the time
    #[arg(long)]
    open_transaction: bool,
}

/// How far a message is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    Confirm,
    Effect,
}

impl To {
    fn section(self, bench: &LatencyBench) -> Section {
        let (title, floor, subject) = match self {
            Self::Confirm => ("commit to confirm", "bare: a commit, then publish to confirm", RELAY),
            Self::Effect => ("commit to effect", "bare: a commit, publish to delivery, a commit", BOTH),
        };
        let section = Section::new(format!("{title} at {}/s", bench.rate), "ms", Better::Lower)
            .side(Side::baseline(floor))
            .side(Side::subject(subject).against(floor));
        match bench.open_transaction {
            true => section.side(Side::subject(format!("{subject}, {BESIDE}")).against(subject)),
            false => section,
        }
    }
}

pub(super) async fn run(bench: &LatencyBench, stage: &Stage) -> anyhow::Result<Measurement> {
    let mut measurement =
        Measurement::new("latency", "How soon a message is confirmed, and how soon its effect is there")
            .setting("rate", format!("{}/s", bench.rate))
            .setting("writers", bench.writers)
            .setting("seconds a run", bench.seconds)
            .setting("payload", format!("{} B", bench.payload))
            .setting("keys", bench.keys)
            .setting("consumer", format!("batches of up to {}, SQL handler of one insert", bench.batch));
    for to in [To::Confirm, To::Effect] {
        let mut section = to.section(bench);
        for turn in stage.turns(section.sides()) {
            let order = order(bench);
            let measured = with_queue_for(stage, order, async |queue| {
                let scratch = Scratch::create(stage.servers.database_url()?).await?;
                let ground = Ground { bench, stage, scratch: &scratch, queue, to };
                let measured = match turn.side {
                    0 => ground.bare().await,
                    side => ground.oncebox(side == 2).await,
                };
                scratch.drop().await?;
                measured
            });
            stage.record(&mut section, turn, measured.await?);
        }
        measurement = measurement.section(&section);
    }
    if bench.open_transaction {
        measurement = measurement.note(
            "The open transaction has written to a table of its own in the same database and stays open throughout.",
        );
    }
    Ok(measurement
        .note(
            "Latency counts from the return of the writer's commit. Writers keep to a schedule and make up for what they \
             missed, so a stall counts for every message it held up; how late they were stands beside it (timers have a \
             grain of a millisecond).",
        )
        .note(
            "The sides take turns. To the confirm only the relay runs, and a plain consumer that acknowledges a hundred \
             at a time and keeps the queue short; to the effect the consumer runs instead of that.",
        )
        .note(
            "The bare baseline runs beside the same writers at the same rate, without relay and consumer: every 20 ms a \
             session does one commit with fsync and one publish to confirm, which is what no relay can go below; to the \
             effect it is one commit more, and a delivery.",
        )
        .note("The effect's time is the acknowledgement that follows its commit; within a batch it is a little late."))
}

/// By key where there are keys.
fn order(bench: &LatencyBench) -> Order {
    if bench.keys > 0 { Order::Key } else { Order::None }
}

/// Where one side is measured in one run.
struct Ground<'a> {
    bench: &'a LatencyBench,
    stage: &'a Stage,
    scratch: &'a Scratch,
    queue: &'a str,
    to: To,
}

/// What the writers did in the time that is measured.
struct Written {
    /// Messages, those of the warm-up too.
    all: u64,
    commits: Vec<Commit>,
    plans_per_s: f64,
    spent: Spent,
}

impl Written {
    /// What stands beside every latency: how the load itself fared.
    fn measured(&self, samples_ms: Vec<f64>) -> Measured {
        let of = |ms: fn(&Commit) -> f64| self.commits.iter().map(ms).collect::<Vec<f64>>();
        let commit = of(|commit| ms(commit.began, commit.committed));
        let late = of(|commit| ms(commit.due, commit.began));
        Measured::latency(samples_ms, self.commits.len() as u64, &self.spent)
            .with("commit p50, ms", at(&commit, 0.5))
            .with("commit p99, ms", at(&commit, 0.99))
            .with("writers late p99, ms", at(&late, 0.99))
            .with("writers late max, ms", at(&late, 1.0))
    }
}

impl Ground<'_> {
    /// The same writers, and a session that does what a machine cannot do without.
    async fn bare(&self) -> anyhow::Result<Measured> {
        let mut conn = self.prepare().await?;
        let mut flow = Flow::new(self.stage, false)?;
        if self.to == To::Confirm {
            flow.drain(self.queue, order(self.bench)).await?;
        }
        let load = self.load();
        let probe = Probe {
            database_url: self.scratch.url.clone(),
            amqp_url: self.stage.servers.amqp_url()?.to_owned(),
            spec: spec(self.queue, order(self.bench)),
            to: self.to,
            body: body(self.bench.payload),
            from: load.from + WARM_UP,
            until: load.until,
        };
        let probing = tokio::spawn(probe.run());
        let written = self.write(&load, &mut conn).await?;
        let probed = probing.await.context("the probe")??;
        flow.end().await?;
        let measured = written.measured(probed.all_ms);
        Ok(with_quantiles(measured, ["publish to confirm p50, ms", "publish to confirm p99, ms"], &probed.broker_ms))
    }

    /// The same writers, and oncebox; all that was committed must come through.
    async fn oncebox(&self, open: bool) -> anyhow::Result<Measured> {
        let mut conn = self.prepare().await?;
        let mut flow = Flow::new(self.stage, true)?;
        flow.relay(self.scratch, self.queue)?;
        match self.to {
            To::Confirm => flow.drain(self.queue, order(self.bench)).await?,
            To::Effect => {
                let batch = self.bench.batch as usize;
                let consuming = Consuming { handler: "own", workers: 8, batch, order: order(self.bench) };
                flow.consumer(self.scratch, self.queue, consuming)?;
            }
        }
        // All have begun when the first message is through.
        conn.execute("select oncebox.publish('order.placed', '{}')").await?;
        self.through(&mut flow, 1).await?;
        let mut unrelated = PgConnection::connect(&self.scratch.url).await?;
        if open {
            unrelated.execute("begin; insert into unrelated values (1)").await?;
        }
        let written = self.write(&self.load(), &mut conn).await?;
        self.through(&mut flow, written.all + 1).await?;
        unrelated.close().await?;
        let (published, confirmed) = (flow.notes.published.times(), flow.notes.confirmed.times());
        let applied = flow.notes.applied.times();
        flow.end().await?;
        let to_confirm = since_commit(&written.commits, &confirmed)?;
        let samples = match self.to {
            To::Confirm => to_confirm,
            To::Effect => since_commit(&written.commits, &applied)?,
        };
        let to_publish = since_commit(&written.commits, &published)?;
        let broker: Vec<f64> = written
            .commits
            .iter()
            .filter_map(|commit| Some(ms(*published.get(&commit.id)?, *confirmed.get(&commit.id)?)))
            .collect();
        let measured = written.measured(samples).with("plans a second", written.plans_per_s);
        let measured =
            with_quantiles(measured, ["commit to publish p50, ms", "commit to publish p99, ms"], &to_publish);
        Ok(with_quantiles(measured, ["publish to confirm p50, ms", "publish to confirm p99, ms"], &broker))
    }

    async fn prepare(&self) -> anyhow::Result<PgConnection> {
        let mut conn = PgConnection::connect(&self.scratch.url).await?;
        conn.execute(EFFECTS).await?;
        conn.execute("create table unrelated (n integer not null); create table probe (n integer not null)").await?;
        conn.execute("checkpoint").await?;
        Ok(conn)
    }

    fn load(&self) -> Load {
        let from = Instant::now() + BEFORE;
        Load {
            database_url: self.scratch.url.clone(),
            writers: self.bench.writers,
            rate: Some(self.bench.rate),
            payload: self.bench.payload,
            keys: self.bench.keys,
            from,
            until: from + WARM_UP + Duration::from_secs(self.bench.seconds.into()),
        }
    }

    async fn write(&self, load: &Load, conn: &mut PgConnection) -> anyhow::Result<Written> {
        let measured_from = load.from + WARM_UP;
        let writers = Writers::start(load, true).await?;
        tokio::time::sleep_until(measured_from.into()).await;
        let (meter, first) = (self.stage.servers.meter(), newest_plan(conn).await?);
        tokio::time::sleep_until(load.until.into()).await;
        let (spent, last) = (meter.spent(), newest_plan(conn).await?);
        let (all, commits) = writers.end().await?;
        let commits: Vec<Commit> = commits.into_iter().filter(|commit| commit.due >= measured_from).collect();
        Ok(Written { all, commits, plans_per_s: (last - first) as f64 / spent.seconds, spent })
    }

    async fn through(&self, flow: &mut Flow, count: u64) -> anyhow::Result<Instant> {
        match self.to {
            To::Confirm => flow.confirmed(count, LIMIT).await,
            To::Effect => flow.applied(count, LIMIT).await,
        }
    }
}

async fn newest_plan(conn: &mut PgConnection) -> anyhow::Result<i64> {
    let query = "select n from oncebox.outbox_plan order by n desc limit 1";
    Ok(sqlx::query_scalar(query).fetch_optional(conn).await?.unwrap_or(0))
}

fn with_quantiles(measured: Measured, names: [&'static str; 2], samples: &[f64]) -> Measured {
    measured.with(names[0], at(samples, 0.5)).with(names[1], at(samples, 0.99))
}

/// Milliseconds from each commit's return; every message must be there.
fn since_commit(commits: &[Commit], seen: &HashMap<Uuid, Instant>) -> anyhow::Result<Vec<f64>> {
    let times: Vec<f64> =
        commits.iter().filter_map(|commit| Some(ms(commit.committed, *seen.get(&commit.id)?))).collect();
    if times.len() < commits.len() || times.is_empty() {
        bail!("{} of {} messages were seen", times.len(), commits.len());
    }
    Ok(times)
}

/// What overtook the reply to the commit took no time.
fn ms(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e3
}

fn at(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, share)
}

/// Does, one after the other, what no relay and no consumer can do without.
struct Probe {
    database_url: String,
    amqp_url: String,
    spec: QueueSpec,
    to: To,
    body: String,
    from: Instant,
    until: Instant,
}

#[derive(Default)]
struct Probed {
    all_ms: Vec<f64>,
    /// Of that, from publish to confirm.
    broker_ms: Vec<f64>,
}

impl Probe {
    async fn run(self) -> anyhow::Result<Probed> {
        let mut conn = PgConnection::connect(&self.database_url).await?;
        let mut effects = PgConnection::connect(&self.database_url).await?;
        let broker = RabbitMq::new(RabbitMqOptions::new(self.amqp_url.as_str()))?;
        let mut publisher = broker.publisher(&self.spec.exchange).await?;
        let mut subscription = match self.to {
            To::Confirm => None,
            To::Effect => Some(broker.subscribe(&self.spec, 10).await?),
        };
        let mut probed = Probed::default();
        tokio::time::sleep_until(self.from.into()).await;
        for ordinal in 1.. {
            if Instant::now() >= self.until {
                break;
            }
            let envelope = envelope(ordinal, &self.body, 0);
            let began = Instant::now();
            let once = async {
                sqlx::query("insert into probe values (1)").execute(&mut conn).await?;
                let published = Instant::now();
                publisher.publish(ordinal.unsigned_abs(), &envelope).await?;
                let confirm = async {
                    publisher.outcomes(&mut Vec::new()).await?;
                    anyhow::Ok(Instant::now())
                };
                let effect = async {
                    let Some(subscription) = &mut subscription else { return Ok(None) };
                    let delivery = subscription.next().await?;
                    sqlx::query("insert into effect values ($1, $2::text::jsonb)")
                        .bind(envelope.message.id.0)
                        .bind(&self.body)
                        .execute(&mut effects)
                        .await?;
                    let at = Instant::now();
                    subscription.ack(delivery.tag).await?;
                    anyhow::Ok(Some(at))
                };
                let (confirmed, applied) = tokio::try_join!(confirm, effect)?;
                anyhow::Ok((published, confirmed, applied))
            };
            let (published, confirmed, applied) =
                tokio::time::timeout(LIMIT, once).await.context("a probe took too long")??;
            probed.all_ms.push(ms(began, applied.unwrap_or(confirmed)));
            probed.broker_ms.push(ms(published, confirmed));
            tokio::time::sleep(PROBE_EVERY).await;
        }
        publisher.close().await;
        if let Some(subscription) = subscription {
            subscription.close().await;
        }
        Ok(probed)
    }
}
