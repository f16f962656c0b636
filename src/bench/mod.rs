//! `oncebox bench`: what the relay does, beside what a bare client does with the same messages in the same run.
//!
//! Everything happens in databases, exchanges and queues of its own, which are dropped afterwards. Absolute rates say
//! something about the machine; the ratio says something about oncebox.

mod inbox;
mod latency;
mod relay;
mod saga;

use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::broker::{Broker, QueueSpec, Subscription};
use crate::config::Config;
use crate::message::{Envelope, Headers, Message, MessageId, Position};
use crate::migrate;
use clap::{Args, Subcommand};
use lapin::options::{ExchangeDeleteOptions, QueueDeleteOptions};
use lapin::{Channel, ConnectionProperties};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use uuid::Uuid;

/// Arguments of `oncebox bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Drain of a backlog, beside a bare lapin publisher of the same messages
    Relay(relay::RelayBench),
    /// Commit to confirm at a given rate
    Latency(latency::LatencyBench),
    /// Drain of a queue by a consumer in batches, beside one message a transaction
    Inbox(inbox::InboxBench),
    /// Sagas of three steps from start to end, beside chains of as many messages without a saga
    Saga(saga::SagaBench),
}

/// Runs a benchmark on the servers of the config and prints its table.
pub async fn run(args: BenchArgs, config: &Config) -> anyhow::Result<()> {
    match args.what {
        What::Relay(bench) => relay::run(bench, config).await,
        What::Latency(bench) => latency::run(bench, config).await,
        What::Inbox(bench) => inbox::run(bench, config).await,
        What::Saga(bench) => saga::run(bench, config).await,
    }
}

/// A database with the schema, for one measurement.
struct Scratch {
    name: String,
    url: String,
    server_url: String,
}

impl Scratch {
    async fn create(server_url: &str) -> anyhow::Result<Self> {
        let name = format!("oncebox_bench_{}", Uuid::now_v7().simple());
        PgConnection::connect(server_url).await?.execute(AssertSqlSafe(format!("create database {name}"))).await?;
        let (base, options) = server_url.split_once('?').map_or((server_url, ""), |(base, options)| (base, options));
        let base = base.rsplit_once('/').map_or(base, |(base, _)| base);
        let url = format!("{base}/{name}?{options}");
        migrate::migrate(&url).await?;
        Ok(Self { name, url, server_url: server_url.to_owned() })
    }

    async fn drop(self) -> anyhow::Result<()> {
        let drop = format!("drop database {} with (force)", self.name);
        PgConnection::connect(&self.server_url).await?.execute(AssertSqlSafe(drop)).await?;
        Ok(())
    }
}

/// Runs a measurement with an exchange and a quorum queue of one's own, both of the name it is given, and removes both.
async fn with_queue<T>(config: &Config, work: impl AsyncFnOnce(&str) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let name = format!("oncebox-bench-{}", Uuid::now_v7().simple());
    let spec = QueueSpec {
        name: name.clone(),
        exchange: name.clone(),
        bindings: vec!["#".to_owned()],
        single_active_consumer: false,
        voids: false,
    };
    let broker = RabbitMq::new(RabbitMqOptions::new(config.amqp_url()?))?;
    broker.subscribe(&spec, 1).await?.close().await;
    let result = work(&name).await;
    let channel = channel(config).await?;
    channel.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await?;
    channel.exchange_delete(name.as_str().into(), ExchangeDeleteOptions::default()).await?;
    result
}

async fn channel(config: &Config) -> anyhow::Result<Channel> {
    let connection = lapin::Connection::connect(config.amqp_url()?, ConnectionProperties::default()).await?;
    Ok(connection.create_channel().await?)
}

/// A message of the size and shape that the benchmarks publish.
fn envelope(ordinal: i64, body: &str, keys: i64) -> Envelope {
    let source = Uuid::nil();
    Envelope {
        message: Message {
            id: MessageId(Uuid::now_v7()),
            topic: "order.placed".to_owned(),
            key: (keys > 0).then(|| format!("k{}", ordinal % keys)),
            content_type: "application/json".to_owned(),
            headers: Headers::new(),
            body: body.as_bytes().to_vec(),
            published_at_s: 1_700_000_000,
        },
        position: Position { source, stream: "order.placed#0".to_owned(), offset: ordinal },
        ordinal,
    }
}

/// A JSON text of so many bytes, as Postgres prints it.
fn body(bytes: usize) -> String {
    format!("{{\"text\": \"{}\"}}", "x".repeat(bytes.saturating_sub(12)))
}

/// CPU seconds of this process so far, user and system.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    // Linux counts in hundredths for every architecture this runs on.
    (ticks(11) + ticks(12)) / 100.0
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}
