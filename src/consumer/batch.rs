//! Batches: one worker takes all deliveries and applies many in one transaction, one statement for the inbox and one or
//! a few for the handler, so that many effects share one commit. It takes what waits and never waits for more.
//!
//! If anything fails, the transaction is rolled back and its messages go one by one, in order, each in its own: so one's
//! failure touches no other. A consumer has one batch transaction at a time, over all its processes. Where the handler is
//! slow and workers side by side are faster (`pace`), deliveries are passed on to them for a while; and so they are while a
//! message waits for a lock or anything else that passes, for the others must not wait for it. Waiting deliveries are
//! theirs anyway.

use super::pace::Pace;
use super::worker::{
    Failure, MARGIN, Times, Worker, accept_error, commit_failure, ended, handler_failure, stands, within,
};
use super::{Job, Order, Settled, Taken, worker_of};
use crate::db;
use crate::failpoints;
use crate::inbox::handler::SqlHandler;
use crate::inbox::held::{self, Reason};
use crate::inbox::{self, Received, Reception};
use crate::message::{Delivery, MessageId};
use sqlx::Connection;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// Bytes of payload after which a batch takes no more.
const MAX_BYTES: usize = 8 << 20;
/// Deliveries passed on at a time: more than any prefetch.
const MAX_PASSED_ON: u32 = 4_096;

/// Longest wait of a batch for one lock: all its messages wait along.
const LOCK_LIMIT: Duration = Duration::from_secs(1);
/// How long the workers are waited for before batches begin again: if one is stuck, deliveries keep going past it.
const WORKERS_LIMIT: Duration = Duration::from_millis(100);

/// Works until stopped; a batch that has begun is finished first.
pub(super) async fn run(mut worker: Worker, workers: Vec<mpsc::Sender<Job>>, stop: CancellationToken) {
    worker.lock_limit = Some(LOCK_LIMIT);
    let side_by_side = worker.handler.batches().is_some_and(|batches| !batches.shares_its_work());
    let pace = Pace::new(worker.options.batch, if side_by_side { workers_of(&worker) } else { 1 });
    let passed_on = Arc::new(Semaphore::new(MAX_PASSED_ON as usize));
    let batching = Batching { worker, workers, passed_on, pace, round: 0, carried: None };
    batching.run(&stop).await;
}

struct Batching {
    worker: Worker,
    workers: Vec<mpsc::Sender<Job>>,
    /// Holds a permit less for each delivery that a worker has in hand.
    passed_on: Arc<Semaphore>,
    pace: Pace,
    round: u64,
    /// Taken from the queue, and not part of the batch before it.
    carried: Option<(u64, Delivery)>,
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
            let goes_on = match id_of(&delivery) {
                Some(id) => self.bring_next(Taken::new(session, id, delivery), stop).await,
                // It is in nobody's way.
                None => self.worker.deliver_and_settle(session, delivery, stop).await,
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
                        Job::Delivery { session, delivery } => (session, delivery),
                        // Others go to the workers.
                        Job::PassedOn { .. } | Job::Retry(_) => continue,
                    },
                },
            };
            if stop.is_cancelled() {
                return None;
            }
            // The broker delivers it again in the present session.
            if self.is_present(session) {
                return Some((session, delivery));
            }
        }
    }

    fn is_present(&self, session: u64) -> bool {
        session == self.worker.shared.session.load(Ordering::SeqCst)
    }

    /// Brings a message, and maybe others with it, to a committed outcome, or passes it on; false once stopped. One that
    /// was delivered before goes alone.
    async fn bring_next(&mut self, taken: Taken, stop: &CancellationToken) -> bool {
        if self.passes_on(stop).await {
            self.pace.hand_on(self.in_hand());
            return self.hand_over(taken, stop).await;
        }
        // While the workers were waited for, they may have left earlier ones of its key to the broker, of an old session
        // or because they stop: it goes back with them.
        if stop.is_cancelled() || !self.is_present(taken.session) {
            return true;
        }
        if taken.redelivered {
            return self.bring(taken, stop).await;
        }
        let batch = self.collect(taken);
        self.apply(batch, stop).await
    }

    /// Takes what waits, up to the size. An id is in a batch once: its copy finds it done in the next.
    fn collect(&mut self, first: Taken) -> Batch {
        let mut bytes = first.message.body.len();
        let mut batch = Batch { session: first.session, tags: vec![first.tag], messages: vec![first.message] };
        let Ok(mut jobs) = self.worker.jobs.try_lock() else { return batch };
        while batch.messages.len() < self.pace.size() && bytes < MAX_BYTES {
            let Ok(Job::Delivery { session, delivery }) = jobs.try_recv() else { break };
            let shares = session == batch.session && !delivery.redelivered;
            let Some(id) = id_of(&delivery).filter(|id| shares && !batch.has(*id)) else {
                self.carried = Some((session, delivery));
                break;
            };
            bytes += delivery.body.len();
            let taken = Taken::new(session, id, delivery);
            batch.tags.push(taken.tag);
            batch.messages.push(taken.message);
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
            Some(Ok((times, behind))) => {
                self.learn(batch.messages.len(), Some(times));
                if !self.hold_behind(&batch, behind, stop).await {
                    return false;
                }
                let settled = Settled { session: batch.session, tags: batch.tags };
                return self.worker.settled.send(settled).await.is_ok();
            }
            Some(Err(failure)) => {
                tracing::info!(
                    consumer = self.worker.options.name, messages = batch.messages.len(), %failure,
                    "a batch was rolled back: its messages go one by one");
                self.pace.failed();
                if matches!(failure, Failure::Transient(_)) {
                    self.pace.stuck(Instant::now());
                }
            }
            None => {}
        }
        let alone = batch.messages.len() == 1;
        for (tag, message) in batch.tags.into_iter().zip(batch.messages) {
            if !self.bring(Taken { session: batch.session, tag, redelivered: false, message }, stop).await {
                return false;
            }
        }
        if alone && !self.pace.is_aside() {
            self.learn(1, self.worker.took);
        }
        true
    }

    /// Brings one message to a committed outcome, or has its worker do so if that would keep the others waiting; false once
    /// stopped.
    async fn bring(&mut self, taken: Taken, stop: &CancellationToken) -> bool {
        if self.pace.is_aside() {
            return self.hand_over(taken, stop).await;
        }
        let Taken { session, tag, redelivered, message } = &taken;
        self.worker.took = None;
        let turn = Arc::clone(&self.worker.shared.turns).read_owned().await;
        let done = match self.worker.bring_once(message, *redelivered, &mut false).await {
            Ok(()) => true,
            Err(failure @ (Failure::Handler(_) | Failure::CutOff(_))) => {
                self.worker.bear(message, failure, 1, stop).await.unwrap_or(false)
            }
            Err(failure) => {
                tracing::info!(
                    consumer = self.worker.options.name, message.id = %message.id, %failure,
                    "a message must wait: it goes to a worker, and so do those behind it");
                self.pace.stuck(Instant::now());
                false
            }
        };
        drop(turn);
        match done {
            true => self.worker.settled.send(Settled { session: *session, tags: vec![*tag] }).await.is_ok(),
            false if self.pace.is_aside() => self.hand_over(taken, stop).await,
            false => false,
        }
    }

    /// Gives a message to its worker; false once stopped.
    async fn hand_over(&mut self, taken: Taken, stop: &CancellationToken) -> bool {
        self.round += 1;
        let worker = worker_of(taken.message.key.as_deref(), self.workers.len(), self.round);
        let taken = Box::new(taken);
        let sending = async {
            let Ok(permit) = Arc::clone(&self.passed_on).acquire_owned().await else { return false };
            self.workers[worker].send(Job::PassedOn { taken, permit }).await.is_ok()
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => false,
            sent = sending => sent,
        }
    }

    /// Holds what a batch that is one statement found behind its key; false if the worker was stopped before.
    async fn hold_behind(&mut self, batch: &Batch, behind: Vec<usize>, stop: &CancellationToken) -> bool {
        for n in behind {
            if !self.worker.hold(&batch.messages[n], &Reason::BehindKey, stop).await {
                return false;
            }
        }
        true
    }

    fn learn(&mut self, messages: usize, times: Option<Times>) {
        if self.pace.applied(messages, times, Instant::now()) {
            tracing::debug!(consumer = self.worker.options.name, "the handler is slow: trying workers side by side");
        }
    }

    fn in_hand(&self) -> usize {
        MAX_PASSED_ON as usize - self.passed_on.available_permits()
    }

    /// Whether deliveries are passed on now. When that ends, waits until the workers have done theirs: a key's order
    /// would not survive two hands.
    async fn passes_on(&mut self, stop: &CancellationToken) -> bool {
        if !self.pace.is_aside() {
            return false;
        }
        let Some(verdict) = self.pace.look_back(self.in_hand(), Instant::now()) else { return true };
        let idle = tokio::time::timeout(WORKERS_LIMIT, self.passed_on.acquire_many(MAX_PASSED_ON));
        let idle = tokio::select! {
            biased;
            () = stop.cancelled() => return true,
            idle = idle => idle.is_ok(),
        };
        if !idle {
            self.pace.stuck(Instant::now());
            return true;
        }
        tracing::debug!(consumer = self.worker.options.name, ?verdict, "batches again, after workers side by side");
        false
    }
}

/// The id of what has one, and is no void notice of a queue that was once read in order of its streams.
fn id_of(delivery: &Delivery) -> Option<MessageId> {
    Received::id_of(delivery).filter(|_| delivery.void().is_none())
}

impl Batch {
    fn has(&self, id: MessageId) -> bool {
        self.messages.iter().any(|message| message.id == id)
    }
}

fn workers_of(worker: &Worker) -> usize {
    worker.options.concurrency.max(1)
}

/// What is one statement otherwise.
const STEPS: &[&str] = &["consumer.batch_accepted", "consumer.batch_handled"];

impl Worker {
    /// One transaction: receive all, handle the new ones, commit; in one statement where the handler is one. What is
    /// behind its key is held in it, or left to the caller by its number.
    async fn apply_batch(&mut self, messages: &[Received]) -> Result<(Times, Vec<usize>), Failure> {
        let handler = Arc::clone(&self.handler);
        let limit = self.options.handler_timeout + 3 * MARGIN;
        let result = match handler.as_function().filter(|_| !failpoints::armed(STEPS)) {
            Some(function) => within(limit, self.apply_batch_at_once(function, messages)).await,
            None => within(limit, self.apply_batch_in_steps(messages)).await.map(|times| (times, Vec::new())),
        };
        self.keep_session(&result).await;
        result
    }

    async fn apply_batch_at_once(
        &mut self,
        function: &SqlHandler,
        messages: &[Received],
    ) -> Result<(Times, Vec<usize>), Failure> {
        let options = Arc::clone(&self.options);
        let conn = self.session().await?;
        let by_key = options.order == Order::Key;
        let applied = db::watched(function.receive_and_apply_all(conn, &options.name, messages, by_key)).await;
        let applied = applied.map_err(handler_failure)?.confirmed(conn).await?;
        failpoints::pass("consumer.batch_committed");
        let behind = applied.receptions.iter().enumerate().filter(|(_, reception)| **reception == Reception::BehindKey);
        let behind = behind.map(|(n, _)| n).collect();
        Ok((Times { inbox: applied.inbox, handler: applied.handler }, behind))
    }

    async fn apply_batch_in_steps(&mut self, messages: &[Received]) -> Result<Times, Failure> {
        let by_key = self.options.order == Order::Key;
        let (options, handler) = (Arc::clone(&self.options), Arc::clone(&self.handler));
        let conn = self.session().await?;
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
        if receptions.iter().any(|reception| matches!(reception, Reception::Done | Reception::Held)) {
            db::mark(&mut transaction).await?;
        }
        db::watched(transaction.commit()).await.map_err(commit_failure)?.confirmed(conn).await?;
        failpoints::pass("consumer.batch_committed");
        Ok(times)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Shared;
    use super::super::tests::{delivery, options};
    use super::*;
    use crate::inbox::handler::Handler;
    use futures_util::FutureExt;

    /// Goal: while a batch waits for the workers, one of them leaves an earlier message of its key to the broker, as of
    /// an old session or because it is to stop: the batch goes back with it, and overtakes nothing.
    #[tokio::test]
    async fn a_batch_overtakes_nothing_that_a_worker_left() {
        let handler: Arc<dyn Handler> = Arc::new(SqlHandler::new("shop.on_message").expect("a name"));
        for n in 0..64 {
            let (_jobs, queue) = mpsc::channel(1);
            let (settled, _settled) = mpsc::channel(1);
            let (worker_queue, mut handed_over) = mpsc::channel(1);
            let (queue, shared) = (Arc::new(tokio::sync::Mutex::new(queue)), Arc::new(Shared::default()));
            shared.session.store(1, Ordering::SeqCst);
            let mut batching = Batching {
                worker: Worker::new(0, Arc::new(options()), Arc::clone(&handler), queue, settled, Arc::clone(&shared)),
                workers: vec![worker_queue],
                passed_on: Arc::new(Semaphore::new(MAX_PASSED_ON as usize)),
                pace: Pace::new(100, 8),
                round: 0,
                carried: None,
            };
            let now = Instant::now();
            batching.pace.stuck(now - Duration::from_secs(2));
            let earlier = Arc::clone(&batching.passed_on).acquire_owned().await.expect("open");
            let stop = CancellationToken::new();
            let delivery = delivery(2);
            let id = id_of(&delivery).expect("an id");
            {
                let mut bringing = std::pin::pin!(batching.bring_next(Taken::new(1, id, delivery), &stop));
                assert!((&mut bringing).now_or_never().is_none(), "it waits for the workers");
                match n % 2 {
                    0 => shared.session.store(2, Ordering::SeqCst),
                    _ => stop.cancel(),
                }
                drop(earlier);
                bringing.await;
            }
            // Nobody answers where the database would be: what is tried must wait, and goes to a worker.
            let tried = batching.pace.is_aside() || handed_over.try_recv().is_ok();
            assert!(!tried, "{n}");
        }
    }
}
