//! Databases, exchanges and queues of a measurement's own, removed after it; and the messages it sends.

use super::servers::Servers;
use crate::broker::void_exchange;
use crate::message::{Envelope, Headers, Message, MessageId, Position};
use crate::migrate;
use lapin::options::{
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ConnectionProperties, ExchangeKind};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use uuid::Uuid;

/// Topic of the messages.
pub(super) const TOPIC: &str = "order.placed";

/// A database with the schema, for one measurement.
pub(super) struct Scratch {
    name: String,
    pub(super) url: String,
    server_url: String,
}

impl Scratch {
    pub(super) async fn create(server_url: &str) -> anyhow::Result<Self> {
        let name = format!("oncebox_bench_{}", Uuid::now_v7().simple());
        PgConnection::connect(server_url).await?.execute(AssertSqlSafe(format!("create database {name}"))).await?;
        let (base, options) = server_url.split_once('?').map_or((server_url, ""), |(base, options)| (base, options));
        let base = base.rsplit_once('/').map_or(base, |(base, _)| base);
        let url = format!("{base}/{name}?{options}");
        migrate::migrate(&url).await?;
        Ok(Self { name, url, server_url: server_url.to_owned() })
    }

    pub(super) async fn drop(self) -> anyhow::Result<()> {
        let drop = format!("drop database {} with (force)", self.name);
        PgConnection::connect(&self.server_url).await?.execute(AssertSqlSafe(drop)).await?;
        Ok(())
    }
}

/// Kind of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum QueueKind {
    Quorum,
    Classic,
}

/// Kind of an exchange; `default` is the nameless one, which routes by queue name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum ExchangeType {
    Topic,
    Direct,
    Fanout,
    Default,
}

impl QueueKind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::Classic => "classic",
        }
    }
}

impl ExchangeType {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Topic => "topic",
            Self::Direct => "direct",
            Self::Fanout => "fanout",
            Self::Default => "default",
        }
    }
}

/// An exchange with one durable queue behind it.
#[derive(Debug, Clone)]
pub(super) struct Route {
    /// Empty for the default exchange.
    pub(super) exchange: String,
    /// What reaches the queue.
    pub(super) routing_key: String,
}

/// Runs a measurement with an exchange and a queue of one's own, and removes both. A topic exchange is bound with the pattern `#`, as a consumer of
/// everything would.
pub(super) async fn with_route<T>(
    servers: &Servers,
    exchange: ExchangeType,
    queue: QueueKind,
    work: impl AsyncFnOnce(&Route) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let name = format!("oncebox-bench-{}", Uuid::now_v7().simple());
    let channel = channel(servers).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(queue.name().into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(name.as_str().into(), durable, arguments).await?;
    let kind = match exchange {
        ExchangeType::Topic => Some((ExchangeKind::Topic, "#")),
        ExchangeType::Direct => Some((ExchangeKind::Direct, TOPIC)),
        ExchangeType::Fanout => Some((ExchangeKind::Fanout, "")),
        ExchangeType::Default => None,
    };
    let mut route = Route { exchange: name.clone(), routing_key: TOPIC.to_owned() };
    if let Some((kind, binding)) = kind {
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(name.as_str().into(), kind, durable, FieldTable::default()).await?;
        let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
        channel.queue_bind(name.as_str().into(), name.as_str().into(), binding.into(), options, arguments).await?;
    } else {
        route = Route { exchange: String::new(), routing_key: name.clone() };
    }
    let result = work(&route).await;
    remove(servers, &name).await?;
    result
}

/// Removes an exchange, that for its void notices, and a queue, where they are there.
pub(super) async fn remove(servers: &Servers, name: &str) -> anyhow::Result<()> {
    let channel = channel(servers).await?;
    channel.queue_delete(name.into(), QueueDeleteOptions::default()).await?;
    for exchange in [name.to_owned(), void_exchange(name)] {
        channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await?;
    }
    Ok(())
}

/// A channel on a connection of its own.
pub(super) async fn channel(servers: &Servers) -> anyhow::Result<Channel> {
    let connection = lapin::Connection::connect(servers.amqp_url()?, ConnectionProperties::default()).await?;
    Ok(connection.create_channel().await?)
}

/// A message of the size and shape that the benchmarks publish.
pub(super) fn envelope(ordinal: i64, body: &str, keys: i64) -> Envelope {
    let source = Uuid::nil();
    Envelope {
        message: Message {
            id: MessageId(Uuid::now_v7()),
            topic: TOPIC.to_owned(),
            key: (keys > 0).then(|| format!("k{}", ordinal % keys)),
            content_type: "application/json".to_owned(),
            headers: Headers::new(),
            body: body.as_bytes().to_vec(),
            published_at_s: 1_700_000_000,
        },
        position: Position { source, stream: format!("{TOPIC}#0"), offset: ordinal },
        ordinal,
    }
}

/// A JSON text of so many bytes, as Postgres prints it.
pub(super) fn body(bytes: usize) -> String {
    format!("{{\"text\": \"{}\"}}", "x".repeat(bytes.saturating_sub(12)))
}
