//! From commit to confirm, at a steady rate.

use super::{Scratch, body, with_queue};
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::broker::{Broker, BrokerError, Outcome, Publisher, QueueSpec, Subscription};
use crate::config::Config;
use crate::message::{Envelope, Void};
use crate::relay::{self, RelayOptions};
use clap::Args;
use sqlx::{Connection, PgConnection};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Sessions that commit, so that the rate does not depend on how long one commit takes.
const WRITERS: u32 = 8;

#[derive(Debug, Args)]
pub(super) struct LatencyBench {
    /// Messages a second, each in a transaction of its own
    #[arg(long, default_value_t = 1_000)]
    rate: u32,
    /// Seconds of measuring, after two of warming up
    #[arg(long, default_value_t = 15)]
    seconds: u32,
    /// Bytes of a payload
    #[arg(long, default_value_t = 256)]
    payload: usize,
}

/// When which message was confirmed.
type Confirmed = Arc<Mutex<HashMap<Uuid, Instant>>>;

pub(super) async fn run(bench: LatencyBench, config: &Config) -> anyhow::Result<()> {
    with_queue(config, async |exchange| measure(&bench, config, exchange).await).await
}

async fn measure(bench: &LatencyBench, config: &Config, exchange: &str) -> anyhow::Result<()> {
    let scratch = Scratch::create(config.database_url()?).await?;
    let broker = RabbitMq::new(RabbitMqOptions::new(config.amqp_url()?))?;
    let spec = QueueSpec {
        name: exchange.to_owned(),
        exchange: exchange.to_owned(),
        bindings: Vec::new(),
        single_active_consumer: false,
        voids: false,
    };
    let mut subscription = broker.subscribe(&spec, 1_000).await?;
    let consuming = tokio::spawn(async move {
        while let Ok(delivery) = subscription.next().await {
            if subscription.ack(delivery.tag).await.is_err() {
                break;
            }
        }
    });

    let confirmed = Confirmed::default();
    let shutdown = CancellationToken::new();
    let options = RelayOptions {
        database_url: scratch.url.clone(),
        exchange: exchange.to_owned(),
        key_window: config.key_window,
        drain_deadline: Duration::from_secs(10),
        unroutable_probe: None,
    };
    let timed = Timed { broker, confirmed: Arc::clone(&confirmed) };
    let relay = tokio::spawn(relay::run(Arc::new(timed), options, shutdown.clone()));

    let mut writers = JoinSet::new();
    let warm_up = bench.rate * 2 / WRITERS;
    let each = warm_up + bench.rate * bench.seconds / WRITERS;
    for writer in 0..WRITERS {
        let (url, body) = (scratch.url.clone(), body(bench.payload));
        let pause = Duration::from_secs_f64(f64::from(WRITERS) / f64::from(bench.rate));
        writers.spawn(write(url, body, pause, pause * writer / WRITERS, each));
    }
    let mut committed = Vec::new();
    while let Some(written) = writers.join_next().await {
        committed.extend(written??.into_iter().skip(warm_up as usize));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    shutdown.cancel();
    relay.await??;
    consuming.abort();

    report(bench, &committed, &confirmed);
    scratch.drop().await
}

fn report(bench: &LatencyBench, committed: &[(Uuid, Instant)], confirmed: &Confirmed) {
    let confirmed = confirmed.lock().unwrap_or_else(PoisonError::into_inner);
    let mut latencies: Vec<f64> = committed
        .iter()
        .filter_map(|(id, at)| Some(confirmed.get(id)?.saturating_duration_since(*at).as_secs_f64() * 1e3))
        .collect();
    latencies.sort_by(f64::total_cmp);
    let at = |share: f64| latencies.get((latencies.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN);
    println!(
        "{} of {} messages confirmed, {}/s: commit to confirm p50 {:.2} ms, p90 {:.2} ms, p99 {:.2} ms, max {:.2} ms",
        latencies.len(),
        committed.len(),
        bench.rate,
        at(0.5),
        at(0.9),
        at(0.99),
        latencies.last().copied().unwrap_or(f64::NAN),
    );
}

async fn write(
    url: String,
    body: String,
    pause: Duration,
    offset: Duration,
    count: u32,
) -> anyhow::Result<Vec<(Uuid, Instant)>> {
    let mut conn = PgConnection::connect(&url).await?;
    let payload: serde_json::Value = serde_json::from_str(&body)?;
    let mut committed = Vec::with_capacity(count as usize);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + offset, pause);
    for _ in 0..count {
        ticks.tick().await;
        let publish = sqlx::query_scalar("select oncebox.publish('order.placed', $1)").bind(&payload);
        committed.push((publish.fetch_one(&mut conn).await?, Instant::now()));
    }
    Ok(committed)
}

/// A broker that notes when each message was confirmed.
struct Timed {
    broker: RabbitMq,
    confirmed: Confirmed,
}

impl Broker for Timed {
    type Publisher = TimedPublisher<<RabbitMq as Broker>::Publisher>;
    type Subscription = <RabbitMq as Broker>::Subscription;

    async fn publisher(&self, exchange: &str) -> Result<Self::Publisher, BrokerError> {
        let publisher = self.broker.publisher(exchange).await?;
        Ok(TimedPublisher { publisher, ids: HashMap::new(), confirmed: Arc::clone(&self.confirmed) })
    }

    async fn subscribe(&self, queue: &QueueSpec, prefetch: u16) -> Result<Self::Subscription, BrokerError> {
        self.broker.subscribe(queue, prefetch).await
    }

    async fn listen(&self, queue: &QueueSpec, prefetch: u16) -> Result<Self::Subscription, BrokerError> {
        self.broker.listen(queue, prefetch).await
    }
}

struct TimedPublisher<P> {
    publisher: P,
    ids: HashMap<u64, Uuid>,
    confirmed: Confirmed,
}

impl<P: Publisher> Publisher for TimedPublisher<P> {
    fn capacity(&self) -> usize {
        self.publisher.capacity()
    }

    fn unconfirmed(&self) -> usize {
        self.publisher.unconfirmed()
    }

    fn is_blocked(&self) -> bool {
        self.publisher.is_blocked()
    }

    async fn publish(&mut self, ticket: u64, envelope: &Envelope) -> Result<(), BrokerError> {
        self.ids.insert(ticket, envelope.message.id.0);
        self.publisher.publish(ticket, envelope).await
    }

    async fn publish_void(&mut self, ticket: u64, void: &Void) -> Result<(), BrokerError> {
        self.publisher.publish_void(ticket, void).await
    }

    async fn outcomes(&mut self, into: &mut Vec<(u64, Outcome)>) -> Result<(), BrokerError> {
        let known = into.len();
        self.publisher.outcomes(into).await?;
        let now = Instant::now();
        let mut confirmed = self.confirmed.lock().unwrap_or_else(PoisonError::into_inner);
        for (ticket, _) in &into[known..] {
            if let Some(id) = self.ids.remove(ticket) {
                confirmed.insert(id, now);
            }
        }
        Ok(())
    }

    async fn close(self) {
        self.publisher.close().await;
    }
}
