//! The consumer: `relay → broker → `**`consumer`**` → inbox → handler`.
//!
//! One task owns the subscription: it hands deliveries to workers and acknowledges each one alone, after a worker
//! committed it: applied, held for another attempt, or parked. Nothing is ever requeued. Workers (`worker`) own
//! one database session each. With order by key, a key always goes to the same worker, and what is held is decided
//! by the table, so the order holds over redeliveries, failures and several processes. Left out on purpose: batches.

mod returned;
mod worker;

use crate::backoff::Backoff;
use crate::broker::{Broker, BrokerError, QueueSpec, Subscription};
use crate::db::{self, DbError};
use crate::failpoints;
use crate::inbox::handler::Handler;
use crate::inbox::held;
use crate::message::Delivery;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use worker::Worker;

/// Deliveries on their way for each worker: enough that none waits for the broker.
const PREFETCH_PER_WORKER: usize = 16;
/// How often waiting deliveries are looked at.
const RETRY_LOOK: Duration = Duration::from_millis(200);
/// Delay before a new subscription, or a new look after the database failed.
const RECONNECT_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(200), cap: Duration::from_secs(5) };
/// Longest look for waiting deliveries.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// Which order effects keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Effects of one key one at a time and in order; a failing message holds up its own key only.
    Key,
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
    /// Queue to consume from; declared if it does not exist.
    pub queue: String,
    /// Topic exchange its bindings are made on.
    pub exchange: String,
    /// Topic patterns.
    pub bindings: Vec<String>,
    /// Handlers at a time.
    pub concurrency: usize,
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
    /// A waiting delivery whose turn has come.
    Retry(Uuid),
}

/// A delivery that is committed and may be acknowledged.
struct Settled {
    session: u64,
    tag: u64,
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
    let prefetch = (options.concurrency.max(1) * PREFETCH_PER_WORKER).min(4_096);
    let (settled_sender, settled) = mpsc::channel(prefetch);
    let shared = Arc::new(Shared::default());
    let stop_workers = CancellationToken::new();
    let mut workers = JoinSet::new();
    let mut queues = Vec::new();
    let mut first = None;
    for number in 0..options.concurrency.max(1) {
        // By key every worker has a queue of its own; without order they share one.
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
    drop(settled_sender);
    workers.spawn(retries(Arc::clone(&options), queues.clone(), Arc::clone(&shared), stop_workers.clone()));

    let mut consuming = Consuming {
        broker,
        options: Arc::clone(&options),
        queues,
        settled,
        prefetch,
        shared: Arc::clone(&shared),
        session: 0,
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
            tracing::warn!(consumer = options.name, "the drain deadline passed: running handlers are rolled back");
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
    /// One of those has ended: the next of its key may have its turn.
    ended: Notify,
}

impl Shared {
    fn under_way(&self) -> std::sync::MutexGuard<'_, HashSet<Uuid>> {
        // A set of ids is whole after any panic.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, id: Uuid) {
        self.under_way().remove(&id);
        self.ended.notify_one();
    }
}

/// The same key goes to the same worker; what has no key goes round.
fn worker_of(key: Option<&str>, count: usize, round: u64) -> usize {
    match key {
        Some(key) => {
            let mut hasher = DefaultHasher::new();
            key.hash(&mut hasher);
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
            single_active_consumer: self.options.order == Order::Key,
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
                    self.shared.session.store(self.session, Ordering::SeqCst);
                    let began = Instant::now();
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
        loop {
            tokio::select! {
                delivery = subscription.next(), if !stop_workers.is_cancelled() => {
                    let deliveries = match delivery? {
                        delivery if first && self.options.order == Order::Key => {
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
                settled = self.settled.recv() => match settled {
                    Some(settled) => self.acknowledge(subscription, settled).await?,
                    None => return Ok(()),
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
        let queue = self.queues[worker_of(delivery.key(), self.queues.len(), round)].clone();
        loop {
            tokio::select! {
                permit = queue.reserve() => {
                    // Workers end before the queues do only when the process does.
                    if let Ok(permit) = permit {
                        permit.send(Job::Delivery { session: self.session, delivery });
                    }
                    return Ok(());
                }
                Some(settled) = self.settled.recv() => self.acknowledge(subscription, settled).await?,
                // Not handed out, not acknowledged: the broker delivers it again.
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// A tag of an earlier session is dead: the broker delivers that message again.
    async fn acknowledge(&self, subscription: &mut B::Subscription, settled: Settled) -> Result<(), BrokerError> {
        if settled.session == self.session {
            subscription.ack(settled.tag).await?;
            failpoints::pass("consumer.acknowledged");
        }
        Ok(())
    }
}

/// Hands waiting deliveries to the workers when their turn has come.
async fn retries(
    options: Arc<ConsumerOptions>,
    queues: Vec<mpsc::Sender<Job>>,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    let mut failures = 0;
    while !stop.is_cancelled() {
        let result = tokio::select! {
            result = look_for_retries(&options, &queues, &shared) => result,
            () = stop.cancelled() => return,
        };
        failures += 1;
        let delay = RECONNECT_BACKOFF.jittered(failures.min(10));
        if let Err(error) = result {
            tracing::warn!(consumer = options.name, %error, ?delay, "no look at waiting deliveries");
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stop.cancelled() => {}
        }
    }
}

async fn look_for_retries(
    options: &ConsumerOptions,
    queues: &[mpsc::Sender<Job>],
    shared: &Shared,
) -> Result<(), DbError> {
    let session = db::SessionOptions {
        application_name: "oncebox consume",
        statement_timeout: LOOK_LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        index_scans_only: false,
    };
    let mut conn = db::connect(&options.database_url, session).await?;
    let by_key = options.order == Order::Key;
    let mut round = 0;
    loop {
        let busy: Vec<Uuid> = shared.under_way().iter().copied().collect();
        let room = options.concurrency.max(1).saturating_sub(busy.len());
        if room > 0 {
            let look = held::due(&mut conn, &options.name, &busy, by_key, room as i64);
            for (id, key) in db::bounded("waiting deliveries", LOOK_LIMIT, look).await? {
                round += 1;
                shared.under_way().insert(id);
                // A full queue: its worker has enough to do, and other keys must not wait for it.
                if queues[worker_of(key.as_deref(), queues.len(), round)].try_send(Job::Retry(id)).is_err() {
                    shared.under_way().remove(&id);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_LOOK) => {}
            () = shared.ended.notified() => {}
        }
    }
}

/// Workers' jobs, shared by those that take from one queue.
type Jobs = Arc<tokio::sync::Mutex<mpsc::Receiver<Job>>>;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Goal: one key always meets one worker, and keyless messages use them all.
    #[test]
    fn keys_stick_to_their_worker() {
        let workers: HashMap<usize, usize> = (0..100).fold(HashMap::new(), |mut seen, round| {
            assert_eq!(worker_of(Some("k"), 8, round), worker_of(Some("k"), 8, 0));
            *seen.entry(worker_of(None, 8, round)).or_default() += 1;
            seen
        });
        assert_eq!(workers.len(), 8);
    }
}
