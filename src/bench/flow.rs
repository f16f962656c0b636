//! Relay and consumer in this process, through a broker that notes what was published, confirmed and acknowledged, and
//! when.
//!
//! A consumer acknowledges a message as soon as the transaction of its effect has committed, so the time of the
//! acknowledgement is that of the commit's return, as for a writer; with batches, a little later.

use super::scratch::{self, Scratch};
use super::stage::Stage;
use crate::backoff::Backoff;
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::broker::{Broker, BrokerError, Outcome, Publisher, QueueSpec, Subscription};
use crate::consumer::{self, ConsumerOptions, Order};
use crate::inbox::handler::SqlHandler;
use crate::janitor;
use crate::message::{Delivery, Envelope, Void};
use crate::relay::{self, RelayOptions};
use anyhow::{Context, bail};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// What a consumer is called.
pub(super) const CONSUMER: &str = "bench";
/// Where effects go, a row each, and the handler that writes them.
pub(super) const EFFECTS: &str = "
    create table effect (message_id uuid not null, payload jsonb not null);
    create function own(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$ begin insert into effect values (message_id, payload); end $$;";
/// Longest wait for a queue that is declared: that can take long where much else runs, and is not measured.
const SET_UP_LIMIT: Duration = Duration::from_secs(60);
/// How long relay and consumer may take to end.
const DRAIN: Duration = Duration::from_secs(10);
/// A plain consumer: how many deliveries it takes ahead, and acknowledges at a time.
const DRAIN_PREFETCH: u16 = 500;
const DRAIN_ACKS: usize = 100;
/// How often a count is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Runs a measurement with an exchange and a quorum queue of one's own, both of the name it is given, and removes both.
/// With order by key the queue has a single active consumer, as that order needs.
pub(super) async fn with_queue_for<T>(
    stage: &Stage,
    order: Order,
    work: impl AsyncFnOnce(&str) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let name = format!("oncebox-bench-{}", Uuid::now_v7().simple());
    let spec = spec(&name, order);
    let options = RabbitMqOptions { connect_timeout: SET_UP_LIMIT, ..RabbitMqOptions::new(stage.servers.amqp_url()?) };
    let broker = RabbitMq::new(options)?;
    broker.subscribe(&spec, 1).await?.close().await;
    let result = work(&name).await;
    scratch::remove(&stage.servers, &name).await?;
    result
}

/// A queue that gets everything of the exchange of its name.
pub(super) fn spec(name: &str, order: Order) -> QueueSpec {
    QueueSpec {
        name: name.to_owned(),
        exchange: name.to_owned(),
        bindings: vec!["#".to_owned()],
        single_active_consumer: order != Order::None,
        voids: false,
    }
}

/// How a consumer is set up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Consuming {
    /// Function that handles a message.
    pub handler: &'static str,
    /// Handlers at a time, one message a transaction.
    pub workers: usize,
    /// Most messages of a transaction; 1 is one by one.
    pub batch: usize,
    pub order: Order,
}

/// What was seen on its way to the broker and back.
#[derive(Debug)]
pub(super) struct Notes {
    /// Handed to the broker.
    pub published: Noted,
    pub confirmed: Noted,
    pub applied: Noted,
    /// When the first delivery was handed to the consumer.
    pub first_delivery: OnceLock<Instant>,
}

/// Messages of one kind: how many, and when which.
#[derive(Debug)]
pub(super) struct Noted {
    count: AtomicU64,
    /// Not kept where only the count matters: it would grow without end.
    times: Option<Mutex<Vec<(Uuid, Instant)>>>,
}

impl Noted {
    fn new(keep_times: bool) -> Self {
        Self { count: AtomicU64::new(0), times: keep_times.then(Mutex::default) }
    }

    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// When each message was seen first.
    pub(super) fn times(&self) -> HashMap<Uuid, Instant> {
        let mut first = HashMap::new();
        if let Some(times) = &self.times {
            for (id, at) in times.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                first.entry(*id).or_insert(*at);
            }
        }
        first
    }

    fn note(&self, id: Option<Uuid>, at: Instant) {
        if let (Some(times), Some(id)) = (&self.times, id) {
            times.lock().unwrap_or_else(PoisonError::into_inner).push((id, at));
        }
        self.count.fetch_add(1, Ordering::SeqCst);
    }
}

/// Parts of oncebox that run beside a measurement.
pub(super) struct Flow {
    pub notes: Arc<Notes>,
    amqp_url: String,
    key_window: usize,
    shutdown: CancellationToken,
    tasks: JoinSet<anyhow::Result<()>>,
}

impl Flow {
    /// Nothing runs yet. With `keep_times` each message is noted, otherwise they are counted.
    pub(super) fn new(stage: &Stage, keep_times: bool) -> anyhow::Result<Self> {
        Ok(Self {
            notes: Arc::new(Notes {
                published: Noted::new(keep_times),
                confirmed: Noted::new(keep_times),
                applied: Noted::new(keep_times),
                first_delivery: OnceLock::new(),
            }),
            amqp_url: stage.servers.amqp_url()?.to_owned(),
            key_window: stage.key_window,
            shutdown: CancellationToken::new(),
            tasks: JoinSet::new(),
        })
    }

    fn broker(&self) -> anyhow::Result<Arc<Noting>> {
        let broker = RabbitMq::new(RabbitMqOptions::new(self.amqp_url.as_str()))?;
        Ok(Arc::new(Noting { broker, notes: Arc::clone(&self.notes) }))
    }

    /// Starts a relay.
    pub(super) fn relay(&mut self, scratch: &Scratch, exchange: &str) -> anyhow::Result<()> {
        let options = RelayOptions {
            database_url: scratch.url.clone(),
            exchange: exchange.to_owned(),
            key_window: self.key_window,
            drain_deadline: DRAIN,
            unroutable_probe: None,
        };
        let (broker, shutdown) = (self.broker()?, self.shutdown.clone());
        self.tasks.spawn(async move { relay::run(broker, options, shutdown).await.context("the relay") });
        Ok(())
    }

    /// Starts a consumer of a queue in the same database.
    pub(super) fn consumer(&mut self, scratch: &Scratch, queue: &str, consuming: Consuming) -> anyhow::Result<()> {
        let options = ConsumerOptions {
            name: CONSUMER.to_owned(),
            database_url: scratch.url.clone(),
            outbox_url: Some(scratch.url.clone()),
            queue: queue.to_owned(),
            exchange: queue.to_owned(),
            bindings: vec!["#".to_owned()],
            concurrency: consuming.workers,
            batch: consuming.batch,
            max_attempts: 5,
            order: consuming.order,
            backoff: Backoff { initial: Duration::from_secs(1), cap: Duration::from_secs(10) },
            handler_timeout: Duration::from_secs(60),
            drain_deadline: DRAIN,
        };
        let handler = Arc::new(SqlHandler::new(consuming.handler)?);
        let (broker, shutdown) = (self.broker()?, self.shutdown.clone());
        self.tasks
            .spawn(async move { consumer::run(broker, handler, options, shutdown).await.context("the consumer") });
        Ok(())
    }

    /// Starts a plain consumer, with neither inbox nor database, that keeps a queue short. It acknowledges many at a
    /// time: each acknowledgement is an entry of the queue's own log.
    pub(super) async fn drain(&mut self, queue: &str, order: Order) -> anyhow::Result<()> {
        let broker = RabbitMq::new(RabbitMqOptions::new(self.amqp_url.as_str()))?;
        let mut subscription = broker.subscribe(&spec(queue, order), DRAIN_PREFETCH).await?;
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(async move {
            let mut tags = Vec::new();
            loop {
                tokio::select! {
                    delivery = subscription.next() => tags.push(delivery?.tag),
                    () = shutdown.cancelled() => break,
                }
                if tags.len() >= DRAIN_ACKS {
                    subscription.ack_all(&tags).await?;
                    tags.clear();
                }
            }
            subscription.close().await;
            Ok(())
        });
        Ok(())
    }

    /// Starts both janitors, as `oncebox run` does.
    pub(super) fn janitors(&mut self, scratch: &Scratch) {
        let (url, shutdown) = (scratch.url.clone(), self.shutdown.clone());
        self.tasks.spawn(async move {
            janitor::outbox::run(janitor::outbox::OutboxJanitorOptions { database_url: url }, shutdown).await;
            Ok(())
        });
        let (url, shutdown) = (scratch.url.clone(), self.shutdown.clone());
        self.tasks.spawn(async move {
            janitor::inbox::run(janitor::inbox::InboxJanitorOptions { database_url: url }, shutdown).await;
            Ok(())
        });
    }

    /// Fails if one of the parts has ended.
    pub(super) fn still_runs(&mut self) -> anyhow::Result<()> {
        match self.tasks.try_join_next() {
            None => Ok(()),
            Some(ended) => ended.context("a part ended")?.and_then(|()| bail!("a part ended by itself")),
        }
    }

    /// Waits until so many messages are applied; says by when.
    pub(super) async fn applied(&mut self, count: u64, limit: Duration) -> anyhow::Result<Instant> {
        self.reached("applied", |notes| &notes.applied, count, limit).await
    }

    /// Waits until so many messages are confirmed; says by when.
    pub(super) async fn confirmed(&mut self, count: u64, limit: Duration) -> anyhow::Result<Instant> {
        self.reached("confirmed", |notes| &notes.confirmed, count, limit).await
    }

    async fn reached(
        &mut self,
        what: &str,
        noted: impl Fn(&Notes) -> &Noted,
        count: u64,
        limit: Duration,
    ) -> anyhow::Result<Instant> {
        let began = Instant::now();
        while noted(&self.notes).count() < count {
            self.still_runs()?;
            if began.elapsed() > limit {
                bail!("{} of {count} messages were {what} after {:?}", noted(&self.notes).count(), began.elapsed());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(Instant::now())
    }

    /// Ends everything in order.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        self.still_runs()?;
        self.shutdown.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.context("a part ended")??;
        }
        Ok(())
    }
}

/// A broker that notes what goes through it.
struct Noting {
    broker: RabbitMq,
    notes: Arc<Notes>,
}

impl Broker for Noting {
    type Publisher = NotingPublisher<<RabbitMq as Broker>::Publisher>;
    type Subscription = NotingSubscription<<RabbitMq as Broker>::Subscription>;

    async fn publisher(&self, exchange: &str) -> Result<Self::Publisher, BrokerError> {
        let publisher = self.broker.publisher(exchange).await?;
        Ok(NotingPublisher { publisher, ids: HashMap::new(), notes: Arc::clone(&self.notes) })
    }

    async fn subscribe(&self, queue: &QueueSpec, prefetch: u16) -> Result<Self::Subscription, BrokerError> {
        let subscription = self.broker.subscribe(queue, prefetch).await?;
        Ok(NotingSubscription { subscription, ids: HashMap::new(), notes: Arc::clone(&self.notes) })
    }

    async fn listen(&self, queue: &QueueSpec, prefetch: u16) -> Result<Self::Subscription, BrokerError> {
        let subscription = self.broker.listen(queue, prefetch).await?;
        Ok(NotingSubscription { subscription, ids: HashMap::new(), notes: Arc::clone(&self.notes) })
    }
}

struct NotingPublisher<P> {
    publisher: P,
    /// Of messages whose time is to be kept.
    ids: HashMap<u64, Uuid>,
    notes: Arc<Notes>,
}

impl<P: Publisher> Publisher for NotingPublisher<P> {
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
        if self.notes.confirmed.times.is_some() {
            self.ids.insert(ticket, envelope.message.id.0);
            self.notes.published.note(Some(envelope.message.id.0), Instant::now());
        }
        self.publisher.publish(ticket, envelope).await
    }

    async fn publish_void(&mut self, ticket: u64, void: &Void) -> Result<(), BrokerError> {
        self.publisher.publish_void(ticket, void).await
    }

    async fn outcomes(&mut self, into: &mut Vec<(u64, Outcome)>) -> Result<(), BrokerError> {
        let known = into.len();
        self.publisher.outcomes(into).await?;
        let now = Instant::now();
        for (ticket, outcome) in &into[known..] {
            let id = self.ids.remove(ticket);
            if *outcome == Outcome::Confirmed {
                self.notes.confirmed.note(id, now);
            }
        }
        Ok(())
    }

    async fn close(self) {
        self.publisher.close().await;
    }
}

struct NotingSubscription<S> {
    subscription: S,
    /// Of messages whose time is to be kept.
    ids: HashMap<u64, Uuid>,
    notes: Arc<Notes>,
}

impl<S: Subscription> Subscription for NotingSubscription<S> {
    async fn next(&mut self) -> Result<Delivery, BrokerError> {
        let delivery = self.subscription.next().await?;
        self.notes.first_delivery.get_or_init(Instant::now);
        if self.notes.applied.times.is_some()
            && let Some(id) = delivery.message_id.as_deref().and_then(|id| Uuid::parse_str(id).ok())
        {
            self.ids.insert(delivery.tag, id);
        }
        Ok(delivery)
    }

    async fn ready(&mut self) -> Result<u32, BrokerError> {
        self.subscription.ready().await
    }

    async fn ack(&mut self, tag: u64) -> Result<(), BrokerError> {
        self.ack_all(&[tag]).await
    }

    async fn ack_all(&mut self, tags: &[u64]) -> Result<(), BrokerError> {
        let now = Instant::now();
        self.subscription.ack_all(tags).await?;
        for tag in tags {
            self.notes.applied.note(self.ids.remove(tag), now);
        }
        Ok(())
    }

    async fn close(self) {
        self.subscription.close().await;
    }
}
