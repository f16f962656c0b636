//! Waiting deliveries: handed out when their turn has come, and each run counted before it begins.
//!
//! A run that never ended was in a process that did: it was the message's fault, or that of another one, or nobody's.
//! So the message runs again with nothing beside it in its process, and is parked when such a run never ended either
//! and its attempts are used up. One that ends the process does so at most `max_attempts` + 1 times, or twice more
//! than once if only one attempt is allowed: its first delivery, and the first run beside others, blame nobody.

use super::worker::{Failure, MARGIN, Worker, accept_error, commit_failure, run, within};
use super::{ConsumerOptions, Job, LOOK_LIMIT, Order, RECONNECT_BACKOFF, Shared, stream, worker_of};
use crate::db::{self, DbError};
use crate::failpoints;
use crate::inbox;
use crate::inbox::held::{self, Due, Reason};
use sqlx::Connection;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How often waiting deliveries are looked at.
const RETRY_LOOK: Duration = Duration::from_millis(200);
/// For how long after its start a run is left to the process that began it; from then on only the lock of its
/// transaction protects it. Longer than a process that lost the database needs to go on.
pub(super) const LEASE: Duration = Duration::from_secs(5);
/// Deliveries seen beyond those there is room for: some may be running elsewhere, and must not hide the rest.
const LOOK_BEYOND: usize = 64;

/// Hands waiting deliveries to the workers when their turn has come.
pub(super) async fn hand_out(
    options: Arc<ConsumerOptions>,
    queues: Vec<mpsc::Sender<Job>>,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    let mut failures = 0;
    while !stop.is_cancelled() {
        let result = tokio::select! {
            result = look(&options, &queues, &shared) => result,
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

async fn look(options: &ConsumerOptions, queues: &[mpsc::Sender<Job>], shared: &Shared) -> Result<(), DbError> {
    let session = db::SessionOptions {
        application_name: "oncebox consume",
        statement_timeout: LOOK_LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let mut conn = db::connect(&options.database_url, session).await?;
    let connected = Instant::now();
    let mut round = 0;
    loop {
        let busy: Vec<Uuid> = shared.under_way().iter().copied().collect();
        let mut room = options.concurrency.max(1).saturating_sub(busy.len());
        if room > 0 {
            // While the database was away no process could record the end of a run: they all get a lease's time.
            let unended = connected.elapsed() > LEASE;
            let limit = (room + LOOK_BEYOND) as i64;
            let look = stream::due(&mut conn, options, &busy, unended, limit);
            for due in db::bounded("waiting deliveries", LOOK_LIMIT, look).await? {
                if room == 0 {
                    break;
                }
                if due.is_unended() {
                    let free = held::is_free(&mut conn, &options.name, &due);
                    if !db::bounded("a delivery's lock", LOOK_LIMIT, free).await? {
                        continue;
                    }
                }
                round += 1;
                let (id, worker) = (due.id, worker_of(due.key.as_deref(), queues.len(), round));
                shared.under_way().insert(id);
                // A full queue: its worker has enough to do, and other keys must not wait for it.
                match queues[worker].try_send(Job::Retry(due)) {
                    Ok(()) => room -= 1,
                    Err(_) => drop(shared.under_way().remove(&id)),
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_LOOK) => {}
            () = shared.changed.notified() => {}
        }
    }
}

impl Worker {
    /// Brings a waiting delivery, if it still has its turn, to a committed outcome; one whose last run never ended with
    /// nothing beside it. Answers the next of its stream.
    pub(super) async fn retry(&mut self, due: &Due, stop: &CancellationToken) -> Option<Due> {
        let turns = Arc::clone(&self.shared.turns);
        if due.is_unended() {
            let alone = tokio::select! {
                alone = turns.write_owned() => alone,
                () = stop.cancelled() => return None,
            };
            let next = if due.is_to_blame(self.options.max_attempts) {
                self.blame(due, stop).await;
                None
            } else {
                self.run_counted(due, stop).await
            };
            drop(alone);
            next
        } else {
            let beside_others = turns.read_owned().await;
            let next = self.run_counted(due, stop).await;
            drop(beside_others);
            next
        }
    }

    /// Counts a start, and runs until that run has an outcome. What is no fault of the handler is waited out under the
    /// same start; when the worker is stopped meanwhile, the start is taken back.
    async fn run_counted(&mut self, due: &Due, stop: &CancellationToken) -> Option<Due> {
        let mut failures = 0;
        let attempt = loop {
            match self.start(due).await {
                Ok(Some(attempt)) => break attempt,
                Ok(None) => return None,
                Err(error) => {
                    failures += 1;
                    if !self.wait_out(&error, failures, stop).await {
                        return None;
                    }
                }
            }
        };
        failpoints::pass("consumer.retry_started");
        let mut called = false;
        loop {
            let error = match self.attempt_held(due.id, attempt, &mut called).await {
                Ok(next) => return next,
                Err(Failure::Unavailable { reason, retry_after }) => {
                    failures += 1;
                    // Nothing but the lease protects it meanwhile.
                    let lease = retry_after.unwrap_or(LEASE) + LEASE;
                    if !self.renew(due.id, attempt, lease).await {
                        return None;
                    }
                    if !self.pause(&reason, retry_after, failures, stop).await {
                        self.take_back(due).await;
                        return None;
                    }
                    continue;
                }
                Err(Failure::Handler(error) | Failure::CutOff(error)) => {
                    let retry_in = self.options.backoff.jittered(attempt);
                    let reason = Reason::of_failure(&error, attempt, self.options.max_attempts, retry_in);
                    tracing::warn!(
                        consumer = self.options.name, message.id = %due.id, attempt, %error, ?reason, "handler failed");
                    match self.record(due.id, attempt, &reason).await {
                        Ok(()) => return None,
                        Err(error) => error,
                    }
                }
                Err(Failure::Transient(error)) => error,
            };
            failures += 1;
            if !self.renew(due.id, attempt, 2 * LEASE).await {
                return None;
            }
            if !self.wait_out(&error, failures, stop).await {
                self.take_back(due).await;
                return None;
            }
        }
    }

    /// One transaction: claim, accept, handle, forget, commit. Answers the next of its stream.
    pub(super) async fn apply_held(&mut self, id: Uuid, attempt: u32) -> Result<Option<Due>, Failure> {
        let (consumer, handler) = (Arc::clone(&self.options), Arc::clone(&self.handler));
        let limit = self.options.handler_timeout + 2 * MARGIN;
        let mut next = None;
        let conn = self.session().await?;
        let work = async {
            let mut transaction = conn.begin().await?;
            let Some(message) = stream::claim(&mut transaction, &consumer, id, attempt).await? else {
                transaction.rollback().await?;
                return Ok(());
            };
            let position = message.position.as_ref();
            let accepted = inbox::accept(&mut transaction, &consumer.name, message.id, position).await;
            if accepted.map_err(accept_error)? {
                run(&*handler, &mut transaction, &message, &consumer).await?;
                failpoints::pass("consumer.retry_handled");
            }
            held::forget(&mut transaction, &consumer.name, id).await?;
            next = stream::successor(&mut transaction, &consumer, &message).await?;
            transaction.commit().await.map_err(commit_failure)?;
            failpoints::pass("consumer.retry_committed");
            Ok(())
        };
        let result = within(limit, work).await;
        self.keep_session(&result).await;
        result.map(|()| next)
    }

    async fn start(&mut self, due: &Due) -> Result<Option<u32>, DbError> {
        let options = Arc::clone(&self.options);
        let by_key = options.order == Order::Key;
        let lease = LEASE.max(options.backoff.ceiling(due.attempts + 1));
        let conn = self.session().await?;
        let start = held::start(conn, &options.name, due, by_key, lease);
        let result = db::bounded("counting a start", MARGIN, start).await;
        self.drop_session_after(&result);
        result
    }

    /// False if another process has taken the run over; true also if the database does not answer.
    pub(super) async fn renew(&mut self, id: Uuid, attempt: u32, lease: Duration) -> bool {
        let options = Arc::clone(&self.options);
        let Ok(conn) = self.session().await else { return true };
        let renew = held::renew(conn, &options.name, id, attempt, lease);
        let result = db::bounded("renewing a start", MARGIN, renew).await;
        self.drop_session_after(&result);
        result.unwrap_or(true)
    }

    async fn record(&mut self, id: Uuid, attempt: u32, reason: &Reason) -> Result<(), DbError> {
        let options = Arc::clone(&self.options);
        let conn = self.session().await?;
        let record = held::record(conn, &options.name, id, attempt, reason);
        let result = db::bounded("recording an attempt", MARGIN, record).await;
        self.drop_session_after(&result);
        result
    }

    async fn blame(&mut self, due: &Due, stop: &CancellationToken) {
        let options = Arc::clone(&self.options);
        let mut failures = 0;
        loop {
            let result = match self.session().await {
                Ok(conn) => db::bounded("parking a delivery", MARGIN, held::blame(conn, &options.name, due)).await,
                Err(error) => Err(error),
            };
            self.drop_session_after(&result);
            let Err(error) = result else {
                tracing::error!(
                    consumer = options.name, message.id = %due.id, attempts = due.attempts,
                    "parked: the consumer process has ended each time while handling it");
                return;
            };
            failures += 1;
            if !self.wait_out(&error, failures, stop).await {
                return;
            }
        }
    }

    /// Best effort: if it fails, the start counts as one that never ended.
    async fn take_back(&mut self, due: &Due) {
        let options = Arc::clone(&self.options);
        if let Ok(conn) = self.session().await {
            let result = db::bounded("taking back a start", MARGIN, held::take_back(conn, &options.name, due)).await;
            self.drop_session_after(&result);
        }
    }

    fn drop_session_after<T>(&mut self, result: &Result<T, DbError>) {
        if result.is_err() {
            self.conn = None;
        }
    }
}
