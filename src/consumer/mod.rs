//! The consumer: `relay → broker → `**`consumer`**` → inbox → handler`.
//!
//! One task owns the subscription: it hands deliveries to workers and acknowledges each one after a worker committed it
//! (applied, held for another attempt, or parked), and never one that is open. Nothing is ever requeued. Workers (`worker`) own
//! one database session each. With order by key or stream (`stream`), each of them always goes to the same worker, and
//! what is held is decided by the table, so the order holds over redeliveries, failures and several processes. Where the
//! handler allows it, one worker (`batch`) takes all deliveries instead, many in a transaction.

mod batch;
mod pace;
mod registration;
mod retry;
mod returned;
mod stream;
mod worker;

use crate::backoff::Backoff;
use crate::broker::{Broker, BrokerError, QueueSpec, Subscription};
use crate::db::DbError;
use crate::failpoints;
use crate::inbox::Received;
use crate::inbox::handler::Handler;
use crate::inbox::held::Due;
use crate::message::{Delivery, MessageId};
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, OwnedSemaphorePermit, RwLock, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use worker::Worker;

/// Every statement of this room, for the test that prepares them all.
pub const STATEMENTS: &[&[&str]] = &[registration::STATEMENTS, worker::STATEMENTS];

/// Deliveries on their way for each worker: enough that none waits for the broker.
const PREFETCH_PER_WORKER: usize = 16;
/// Most deliveries on their way.
const MAX_PREFETCH: usize = 4_096;
/// Delay before a new subscription, or a new look after the database failed.
const RECONNECT_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(200), cap: Duration::from_secs(5) };

/// Workers' reports that are acknowledged together: no more than there are workers, as a rule.
const SETTLED_AT_A_TIME: usize = 256;

/// Longest look at waiting deliveries, or at where streams begin.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// Which order effects keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Effects of one key one at a time and in order; a failing message holds up its own key only.
    Key,
    /// Each stream in offset order without a gap; what comes early waits, a failing message holds up its stream only.
    Stream,
    /// As they come.
    None,
}

/// How a consumer runs.
#[derive(Debug, Clone)]
pub struct ConsumerOptions {
    /// Name of the logical consumer: what the inbox deduplicates for.
    pub name: String,
    /// Database of inbox and effects.
    pub database_url: String,
    /// Database of the outbox: it is told of this consumer, for the audit, and asked where streams begin.
    pub outbox_url: Option<String>,
    /// Queue to consume from; declared if it does not exist.
    pub queue: String,
    /// Topic exchange its bindings are made on.
    pub exchange: String,
    /// Topic patterns.
    pub bindings: Vec<String>,
    /// Handlers at a time, where each message has a transaction of its own.
    pub concurrency: usize,
    /// Most messages of one transaction, for a handler that takes many in one statement; 1 is one by one.
    pub batch: usize,
    /// The handler's own failures after which a message is parked.
    pub max_attempts: u32,
    /// Which order effects keep.
    pub order: Order,
    /// Delay between a message's attempts.
    pub backoff: Backoff,
    /// Longest run of one handler; longer counts as a failure.
    pub handler_timeout: Duration,
    /// How long running handlers are waited for at the end.
    pub drain_deadline: Duration,
}

/// Why a consumer cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConsumerError {
    /// The database's side.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The broker's side.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// A part of the consumer ended by itself, which none should: its last words are in the log.
    #[error("a worker ended unexpectedly")]
    WorkerEnded,
}

/// Work for a worker.
enum Job {
    /// A delivery of the subscription with this number.
    Delivery { session: u64, delivery: Delivery },
    /// The same, passed on by the batch worker, which waits for the permit before it goes on itself.
    PassedOn { taken: Box<Taken>, permit: OwnedSemaphorePermit },
    /// A waiting delivery whose turn has come.
    Retry(Due),
}

/// A delivery of the subscription with this number, with the message taken out.
struct Taken {
    session: u64,
    tag: u64,
    redelivered: bool,
    message: Received,
}

impl Taken {
    fn new(session: u64, id: MessageId, delivery: Delivery) -> Self {
        failpoints::pass("consumer.delivered");
        let (tag, redelivered) = (delivery.tag, delivery.redelivered);
        Self { session, tag, redelivered, message: Received::new(id, delivery) }
    }
}

/// Deliveries that are committed and may be acknowledged.
struct Settled {
    session: u64,
    tags: Vec<u64>,
}

/// Deliveries on their way to a consumer of so many handlers at a time and messages of a transaction, one by one or
/// batched: it takes so many ahead.
pub fn prefetch(concurrency: usize, batch: usize) -> usize {
    // Room for a batch in hand, the next one, and as many on their way: acknowledged, and not replaced yet.
    let for_batches = if batch > 1 { 4 * batch } else { 0 };
    (concurrency.max(1) * PREFETCH_PER_WORKER).max(for_batches).min(MAX_PREFETCH)
}

/// Consumes until `shutdown` is cancelled; then lets running handlers end within the drain deadline.
///
/// # Errors
/// Only what was wrong from the start and no waiting can mend; later failures are logged and retried.
pub async fn run<B: Broker>(
    broker: Arc<B>,
    handler: Arc<dyn Handler>,
    options: ConsumerOptions,
    shutdown: CancellationToken,
) -> Result<(), ConsumerError> {
    let options = Arc::new(options);
    let batching = options.batch > 1 && options.order != Order::Stream && handler.batches().is_some();
    let prefetch = prefetch(options.concurrency, if batching { options.batch } else { 1 });
    let (settled_sender, settled) = mpsc::channel(prefetch);
    let shared = Arc::new(Shared::default());
    let stop_workers = CancellationToken::new();
    let mut workers = JoinSet::new();
    let mut queues = Vec::new();
    let mut first = None;
    for number in 0..options.concurrency.max(1) {
        // By key or stream every worker has a queue of its own; without order they share one.
        let jobs = match (&first, options.order) {
            (Some(jobs), Order::None) => Arc::clone(jobs),
            _ => {
                let (sender, receiver) = mpsc::channel(prefetch + options.concurrency);
                queues.push(sender);
                Arc::new(tokio::sync::Mutex::new(receiver))
            }
        };
        first.get_or_insert_with(|| Arc::clone(&jobs));
        let worker = Worker::new(
            number,
            Arc::clone(&options),
            Arc::clone(&handler),
            jobs,
            settled_sender.clone(),
            Arc::clone(&shared),
        );
        workers.spawn(worker.run(stop_workers.clone()));
    }
    let mut deliveries = queues.clone();
    if batching {
        let (sender, receiver) = mpsc::channel(prefetch);
        deliveries = vec![sender];
        let worker = Worker::new(
            options.concurrency.max(1),
            Arc::clone(&options),
            Arc::clone(&handler),
            Arc::new(tokio::sync::Mutex::new(receiver)),
            settled_sender.clone(),
            Arc::clone(&shared),
        );
        workers.spawn(batch::run(worker, queues.clone(), stop_workers.clone()));
    }
    drop(settled_sender);
    let bound = CancellationToken::new();
    workers.spawn(registration::run(Arc::clone(&options), bound.clone(), stop_workers.clone()));
    workers.spawn(retry::hand_out(Arc::clone(&options), queues, Arc::clone(&shared), stop_workers.clone()));

    let mut consuming = Consuming {
        broker,
        options: Arc::clone(&options),
        queues: deliveries,
        settled,
        prefetch,
        shared: Arc::clone(&shared),
        session: 0,
        bound,
        begun: false,
    };
    let work = async {
        let result = {
            let consuming = consuming.run(&shutdown, &stop_workers);
            tokio::pin!(consuming);
            loop {
                tokio::select! {
                    result = &mut consuming => break result,
                    Some(_) = workers.join_next() => if !stop_workers.is_cancelled() {
                        break Err(ConsumerError::WorkerEnded);
                    },
                }
            }
        };
        stop_workers.cancel();
        while workers.join_next().await.is_some() {}
        result
    };
    tokio::select! {
        result = work => result,
        () = deadline(&shutdown, options.drain_deadline) => {
            tracing::warn!(consumer = options.name, "the drain deadline passed: running handlers are not waited for, and what they commit is done");
            Ok(())
        }
    }
}

async fn deadline(shutdown: &CancellationToken, limit: Duration) {
    shutdown.cancelled().await;
    tokio::time::sleep(limit).await;
}

/// What the tasks of a consumer share.
#[derive(Default)]
struct Shared {
    /// Number of the present session with the broker: jobs of earlier ones are delivered again.
    session: AtomicU64,
    /// Ids of waiting deliveries that workers have in hand.
    under_way: Mutex<HashSet<Uuid>>,
    /// Waiting deliveries have changed: one has ended, and the next of its key may have its turn, or one has come.
    changed: Notify,
    /// Jobs hold it for reading; one that may end the process holds it for writing, so that no other is blamed.
    turns: Arc<RwLock<()>>,
}

impl Shared {
    fn under_way(&self) -> std::sync::MutexGuard<'_, HashSet<Uuid>> {
        // A set of ids is whole after any panic.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, id: Uuid) {
        self.under_way().remove(&id);
        self.changed.notify_one();
    }
}

/// The same key or stream goes to the same worker, as it came and as it is stored; what has none goes round.
fn worker_of(key: Option<&str>, count: usize, round: u64) -> usize {
    match key {
        Some(key) => {
            let mut hasher = DefaultHasher::new();
            // Stored without NUL characters.
            key.replace('\0', "\u{fffd}").hash(&mut hasher);
            (hasher.finish() % count as u64) as usize
        }
        None => (round % count as u64) as usize,
    }
}

struct Consuming<B> {
    broker: Arc<B>,
    options: Arc<ConsumerOptions>,
    queues: Vec<mpsc::Sender<Job>>,
    settled: mpsc::Receiver<Settled>,
    prefetch: usize,
    shared: Arc<Shared>,
    session: u64,
    /// Cancelled once the broker has the bindings.
    bound: CancellationToken,
    /// Where streams begin is recorded.
    begun: bool,
}

impl<B: Broker> Consuming<B> {
    async fn run(
        &mut self,
        shutdown: &CancellationToken,
        stop_workers: &CancellationToken,
    ) -> Result<(), ConsumerError> {
        let spec = QueueSpec {
            name: self.options.queue.clone(),
            exchange: self.options.exchange.clone(),
            bindings: self.options.bindings.clone(),
            single_active_consumer: self.options.order != Order::None,
            voids: self.options.order == Order::Stream,
        };
        let prefetch = u16::try_from(self.prefetch).unwrap_or(u16::MAX);
        let mut failures = 0;
        let consumer = self.options.name.clone();
        loop {
            let subscribed = tokio::select! {
                subscribed = self.broker.subscribe(&spec, prefetch) => subscribed,
                () = shutdown.cancelled() => return Ok(()),
            };
            let error = match subscribed {
                Ok(mut subscription) => {
                    self.session += 1;
                    self.bound.cancel();
                    self.shared.session.store(self.session, Ordering::SeqCst);
                    let began = Instant::now();
                    if self.options.order == Order::Stream && !self.begun {
                        tokio::select! {
                            result = stream::begin(&self.options) => result?,
                            () = shutdown.cancelled() => return Ok(()),
                        }
                        self.begun = true;
                    }
                    tracing::info!(consumer, queue = spec.name, "consuming");
                    match self.consume(&mut subscription, shutdown, stop_workers).await {
                        Ok(()) => {
                            subscription.close().await;
                            return Ok(());
                        }
                        Err(error) => {
                            if began.elapsed() > RECONNECT_BACKOFF.cap {
                                failures = 0;
                            }
                            error
                        }
                    }
                }
                Err(error) if self.session == 0 && !error.is_transient() => return Err(error.into()),
                Err(error) => error,
            };
            failures += 1;
            let delay = RECONNECT_BACKOFF.jittered(failures);
            tracing::warn!(consumer, %error, ?delay, "no subscription");
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// Hands out deliveries and acknowledges them, until the session fails or, at shutdown, the workers have ended.
    async fn consume(
        &mut self,
        subscription: &mut B::Subscription,
        shutdown: &CancellationToken,
        stop_workers: &CancellationToken,
    ) -> Result<(), BrokerError> {
        let mut round = 0;
        let mut first = true;
        let mut settled = Vec::new();
        loop {
            tokio::select! {
                delivery = subscription.next(), if !stop_workers.is_cancelled() => {
                    let deliveries = match delivery? {
                        delivery if first && self.options.order != Order::None => {
                            returned::collect(subscription, delivery, self.prefetch).await?
                        }
                        delivery => vec![delivery],
                    };
                    first = false;
                    for delivery in deliveries {
                        round += 1;
                        self.hand_out(subscription, delivery, round, shutdown).await?;
                    }
                }
                count = self.settled.recv_many(&mut settled, SETTLED_AT_A_TIME) => match count {
                    0 => return Ok(()),
                    _ => self.acknowledge(subscription, &mut settled).await?,
                },
                () = shutdown.cancelled(), if !stop_workers.is_cancelled() => stop_workers.cancel(),
            }
        }
    }

    /// Queues a delivery for its worker. A queue has room for a whole prefetch, so this waits only for jobs of an
    /// earlier session, and meanwhile takes what the workers have done, or they would wait for us.
    async fn hand_out(
        &mut self,
        subscription: &mut B::Subscription,
        delivery: Delivery,
        round: u64,
        shutdown: &CancellationToken,
    ) -> Result<(), BrokerError> {
        // Not handed out, not acknowledged: the broker delivers it again. So is everything behind it, or that would
        // overtake it.
        if shutdown.is_cancelled() {
            return Ok(());
        }
        let line = stream::line(self.options.order, &delivery);
        let queue = self.queues[worker_of(line, self.queues.len(), round)].clone();
        let mut settled = Vec::new();
        loop {
            tokio::select! {
                permit = queue.reserve() => {
                    // Workers end before the queues do only when the process does.
                    if let Ok(permit) = permit {
                        permit.send(Job::Delivery { session: self.session, delivery });
                    }
                    return Ok(());
                }
                1.. = self.settled.recv_many(&mut settled, SETTLED_AT_A_TIME) => {
                    self.acknowledge(subscription, &mut settled).await?;
                }
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// A tag of an earlier session is dead: the broker delivers that message again.
    async fn acknowledge(
        &self,
        subscription: &mut B::Subscription,
        settled: &mut Vec<Settled>,
    ) -> Result<(), BrokerError> {
        let present = settled.drain(..).filter(|settled| settled.session == self.session);
        let tags: Vec<u64> = present.flat_map(|settled| settled.tags).collect();
        if !tags.is_empty() {
            subscription.ack_all(&tags).await?;
            failpoints::pass("consumer.acknowledged");
        }
        Ok(())
    }
}

/// Workers' jobs, shared by those that take from one queue.
type Jobs = Arc<tokio::sync::Mutex<mpsc::Receiver<Job>>>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::memory::MemoryBroker;
    use crate::message::header;
    use std::collections::HashMap;

    pub(super) fn options() -> ConsumerOptions {
        ConsumerOptions {
            name: "shop".to_owned(),
            // Nobody answers there.
            database_url: "postgres://127.0.0.1:1/none".to_owned(),
            outbox_url: None,
            queue: "shop".to_owned(),
            exchange: "oncebox".to_owned(),
            bindings: vec!["#".to_owned()],
            concurrency: 8,
            batch: 100,
            max_attempts: 5,
            order: Order::Key,
            backoff: RECONNECT_BACKOFF,
            handler_timeout: Duration::from_secs(30),
            drain_deadline: Duration::from_secs(5),
        }
    }

    /// A delivery of key `k`.
    pub(super) fn delivery(tag: u64) -> Delivery {
        let headers = serde_json::json!({ header::KEY: "k" });
        Delivery {
            tag,
            message_id: Some(Uuid::from_u128(tag.into()).to_string()),
            topic: "t".to_owned(),
            content_type: None,
            headers: headers.as_object().expect("an object").clone(),
            body: Vec::new(),
            redelivered: false,
        }
    }

    /// Goal: at shutdown no delivery is handed out behind one that was not: its key's order would be reversed.
    #[tokio::test]
    async fn nothing_is_handed_out_once_shut_down() {
        let (queue, mut jobs) = mpsc::channel(64);
        let (_settled, settled) = mpsc::channel(1);
        let mut consuming = Consuming {
            broker: Arc::new(MemoryBroker::new()),
            options: Arc::new(options()),
            queues: vec![queue],
            settled,
            prefetch: 64,
            shared: Arc::default(),
            session: 1,
            bound: CancellationToken::new(),
            begun: false,
        };
        let spec = QueueSpec {
            name: "shop".to_owned(),
            exchange: "oncebox".to_owned(),
            bindings: Vec::new(),
            single_active_consumer: true,
            voids: false,
        };
        let mut subscription = consuming.broker.subscribe(&spec, 64).await.expect("a session");
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        for tag in 1..=64 {
            consuming.hand_out(&mut subscription, delivery(tag), tag, &shutdown).await.expect("a session");
        }
        assert!(jobs.try_recv().is_err(), "the broker delivers them all again");
    }

    /// Goal: one key always meets one worker, as it came and as it is stored, and keyless messages use them all.
    #[test]
    fn keys_stick_to_their_worker() {
        for n in 0..20 {
            let (came, stored) = (format!("{n}\0"), format!("{n}\u{fffd}"));
            assert_eq!(worker_of(Some(&came), 8, 0), worker_of(Some(&stored), 8, 0), "{n}");
        }
        let workers: HashMap<usize, usize> = (0..100).fold(HashMap::new(), |mut seen, round| {
            assert_eq!(worker_of(Some("k"), 8, round), worker_of(Some("k"), 8, 0));
            *seen.entry(worker_of(None, 8, round)).or_default() += 1;
            seen
        });
        assert_eq!(workers.len(), 8);
    }
}
