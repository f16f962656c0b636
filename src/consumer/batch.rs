//! Batches: one worker takes all deliveries and applies many in one transaction, one statement for the inbox and one or
//! a few for the handler, so that many effects share one commit. It takes what waits and never waits for more.
//!
//! If anything fails, the transaction is rolled back and its messages go one by one, in order, each in its own: so one's
//! failure touches no other. A consumer has one batch transaction at a time, over all its processes. Where handlers are
//! slow, sharing a commit saves nothing and running side by side does: then deliveries are passed on to the workers
//! for a while. Waiting deliveries are theirs anyway.

use super::worker::{Failure, MARGIN, Worker, accept_error, commit_failure, ended, stands, within};
use super::{Job, Order, Settled, worker_of};
use crate::failpoints;
use crate::inbox::held::{self, Reason};
use crate::inbox::{self, Received, Reception};
use crate::message::Delivery;
use sqlx::Connection;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// Size of the first batch, and of the first after a failure; it doubles with each that succeeds in time.
const FIRST_SIZE: usize = 8;
/// Longer batches are halved: they keep locks, and other processes out.
const LONG_BATCH: Duration = Duration::from_millis(200);
/// A handler that takes longer for a message gains more from workers side by side than from shared commits.
const SLOW_HANDLER: Duration = Duration::from_millis(2);
/// It is also that much slower than the inbox: if both are slow, the database is.
const SLOWER_THAN_INBOX: u32 = 8;
/// Slow batches in a row after which deliveries are passed on: the first ones of a session plan their statements.
const SLOW_BATCHES: u32 = 3;
/// For so long they are.
const PASS_ON: Duration = Duration::from_secs(10);
/// Bytes of payload after which a batch takes no more.
const MAX_BYTES: usize = 8 << 20;
/// Deliveries passed on at a time: more than any prefetch.
const MAX_PASSED_ON: u32 = 4_096;

/// Works until stopped; a batch that has begun is finished first.
pub(super) async fn run(worker: Worker, workers: Vec<mpsc::Sender<Job>>, stop: CancellationToken) {
    let size = FIRST_SIZE.min(worker.options.batch);
    let passed_on = Arc::new(Semaphore::new(MAX_PASSED_ON as usize));
    let batching = Batching { worker, workers, passed_on, pass_on_until: None, size, slow: 0, round: 0, carried: None };
    batching.run(&stop).await;
}

struct Batching {
    worker: Worker,
    workers: Vec<mpsc::Sender<Job>>,
    /// Holds a permit less for each delivery that a worker has in hand.
    passed_on: Arc<Semaphore>,
    pass_on_until: Option<Instant>,
    size: usize,
    slow: u32,
    round: u64,
    /// Taken from the queue, and not part of the batch before it.
    carried: Option<(u64, Delivery)>,
}

/// What the two statements of a batch took.
struct Times {
    inbox: Duration,
    handler: Duration,
}

/// Messages of one transaction, in the order they came.
struct Batch {
    session: u64,
    tags: Vec<u64>,
    messages: Vec<Received>,
}

impl Batching {
    async fn run(mut self, stop: &CancellationToken) {
        while let Some((session, delivery)) = self.next(stop).await {
            let goes_on = if self.passes_on(stop).await {
                self.pass_on(session, delivery, stop).await
            } else if !may_share(&delivery) {
                self.worker.deliver_and_settle(session, delivery, stop).await
            } else {
                let batch = self.collect(session, delivery);
                self.apply(batch, stop).await
            };
            if !goes_on {
                break;
            }
        }
        self.worker.close().await;
    }

    /// The next delivery of the present session; nothing once stopped.
    async fn next(&mut self, stop: &CancellationToken) -> Option<(u64, Delivery)> {
        loop {
            let (session, delivery) = match self.carried.take() {
                Some(carried) => carried,
                None => tokio::select! {
                    biased;
                    () = stop.cancelled() => return None,
                    job = async { self.worker.jobs.lock().await.recv().await } => match job? {
                        Job::Delivery { session, delivery, .. } => (session, delivery),
                        // Waiting deliveries go to the workers.
                        Job::Retry(_) => continue,
                    },
                },
            };
            if stop.is_cancelled() {
                return None;
            }
            // The broker delivers it again in the present session.
            if session == self.worker.shared.session.load(Ordering::SeqCst) {
                return Some((session, delivery));
            }
        }
    }

    /// Takes what waits, up to the size. An id is in a batch once: its copy finds it done in the next.
    fn collect(&mut self, session: u64, first: Delivery) -> Batch {
        let mut batch = Batch { session, tags: Vec::new(), messages: Vec::new() };
        let mut bytes = first.body.len();
        batch.take(first);
        let Ok(mut jobs) = self.worker.jobs.try_lock() else { return batch };
        while batch.messages.len() < self.size && bytes < MAX_BYTES {
            let Ok(Job::Delivery { session, delivery, .. }) = jobs.try_recv() else { break };
            if session != batch.session || !may_share(&delivery) || batch.has(&delivery) {
                self.carried = Some((session, delivery));
                break;
            }
            bytes += delivery.body.len();
            batch.take(delivery);
        }
        batch
    }

    /// Brings every message of a batch to a committed outcome, together or one by one; false once stopped.
    async fn apply(&mut self, batch: Batch, stop: &CancellationToken) -> bool {
        let turns = Arc::clone(&self.worker.shared.turns);
        let together = if batch.messages.len() > 1 {
            let turn = Arc::clone(&turns).read_owned().await;
            let result = self.worker.apply_batch(&batch.messages).await;
            drop(turn);
            Some(result)
        } else {
            None
        };
        match together {
            Some(Ok(times)) => {
                self.learn(batch.messages.len(), times);
                for tag in batch.tags {
                    if self.worker.settled.send(Settled { session: batch.session, tag }).await.is_err() {
                        return false;
                    }
                }
                return true;
            }
            Some(Err(failure)) => {
                tracing::info!(
                    consumer = self.worker.options.name, messages = batch.messages.len(), %failure,
                    "a batch was rolled back: its messages go one by one");
                self.size = FIRST_SIZE.min(self.worker.options.batch);
            }
            None => self.size = (2 * self.size).min(self.worker.options.batch),
        }
        for (tag, message) in batch.tags.into_iter().zip(&batch.messages) {
            let turn = Arc::clone(&turns).read_owned().await;
            let done = self.worker.bring(message, false, stop).await;
            drop(turn);
            if !done || self.worker.settled.send(Settled { session: batch.session, tag }).await.is_err() {
                return false;
            }
        }
        true
    }

    fn learn(&mut self, messages: usize, Times { inbox, handler }: Times) {
        self.size = match inbox + handler > LONG_BATCH {
            true => (self.size / 2).max(2),
            false => (2 * self.size).min(self.worker.options.batch),
        };
        let slow = handler > SLOW_HANDLER * messages as u32 && handler > SLOWER_THAN_INBOX * inbox;
        self.slow = if slow { self.slow + 1 } else { 0 };
        if self.slow >= SLOW_BATCHES {
            tracing::info!(consumer = self.worker.options.name, "the handler is slow: no batches for a while");
            (self.slow, self.size) = (SLOW_BATCHES - 1, FIRST_SIZE.min(self.worker.options.batch));
            self.pass_on_until = Some(Instant::now() + PASS_ON);
        }
    }

    /// Whether deliveries are passed on now. When that ends, waits until the workers have done theirs: a key's order
    /// would not survive two hands.
    async fn passes_on(&mut self, stop: &CancellationToken) -> bool {
        match self.pass_on_until {
            Some(until) if Instant::now() < until => true,
            Some(_) => {
                tokio::select! {
                    _ = self.passed_on.acquire_many(MAX_PASSED_ON) => {}
                    () = stop.cancelled() => return true,
                }
                self.pass_on_until = None;
                false
            }
            None => false,
        }
    }

    async fn pass_on(&mut self, session: u64, delivery: Delivery, stop: &CancellationToken) -> bool {
        self.round += 1;
        let worker = &self.workers[worker_of(delivery.key(), self.workers.len(), self.round)];
        tokio::select! {
            permit = Arc::clone(&self.passed_on).acquire_owned() => {
                let job = Job::Delivery { session, delivery, passed_on: permit.ok() };
                tokio::select! {
                    sent = worker.send(job) => sent.is_ok(),
                    () = stop.cancelled() => false,
                }
            }
            () = stop.cancelled() => false,
        }
    }
}

/// What comes again, has no id, or is a void notice of a queue that was once read in order of its streams, goes alone.
fn may_share(delivery: &Delivery) -> bool {
    !delivery.redelivered && delivery.void().is_none() && Received::id_of(delivery).is_some()
}

impl Batch {
    fn has(&self, delivery: &Delivery) -> bool {
        let id = Received::id_of(delivery);
        self.messages.iter().any(|message| Some(message.id) == id)
    }

    fn take(&mut self, delivery: Delivery) {
        failpoints::pass("consumer.delivered");
        if let Some(id) = Received::id_of(&delivery) {
            self.tags.push(delivery.tag);
            self.messages.push(Received::new(id, delivery));
        }
    }
}

impl Worker {
    /// One transaction: receive all, handle the new ones, hold those behind their key, commit.
    async fn apply_batch(&mut self, messages: &[Received]) -> Result<Times, Failure> {
        let by_key = self.options.order == Order::Key;
        let (options, handler) = (Arc::clone(&self.options), Arc::clone(&self.handler));
        let limit = self.options.handler_timeout + 3 * MARGIN;
        let conn = self.session().await?;
        let work = async {
            let mut transaction = conn.begin().await?;
            inbox::take_batch_turn(&mut transaction, &options.name).await?;
            let began = Instant::now();
            let receptions = inbox::receive_all(&mut transaction, &options.name, messages, by_key).await;
            let receptions = receptions.map_err(accept_error)?;
            let of = |wanted: Reception| {
                let both = messages.iter().zip(&receptions);
                both.filter(|(_, reception)| **reception == wanted).map(|(message, _)| message).collect::<Vec<_>>()
            };
            let inbox = began.elapsed();
            failpoints::pass("consumer.batch_accepted");
            let new = of(Reception::New);
            if let (Some(batches), [first, ..]) = (handler.batches(), &new[..]) {
                ended(batches.handle_all(&mut transaction, &new), &options).await?;
                stands(&*handler, &mut transaction, first, &options).await?;
            }
            let times = Times { inbox, handler: began.elapsed() - inbox };
            failpoints::pass("consumer.batch_handled");
            for message in of(Reception::BehindKey) {
                held::hold(&mut transaction, &options.name, message, &Reason::BehindKey).await?;
            }
            transaction.commit().await.map_err(commit_failure)?;
            failpoints::pass("consumer.batch_committed");
            Ok(times)
        };
        let result = within(limit, work).await;
        self.keep_session(&result).await;
        result
    }
}
