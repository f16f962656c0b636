//! A worker: one job at a time, each in one transaction of its own database session.
//!
//! A job ends only when its outcome is committed: applied, held, or parked. Errors of the connection or the server
//! are waited out and do not count as attempts; the handler's own failures do.

use super::{ConsumerOptions, Job, Jobs, Order, Settled, Shared};
use crate::backoff::Backoff;
use crate::db::{self, DbError};
use crate::failpoints;
use crate::inbox::handler::{Handler, HandlerError};
use crate::inbox::held::{self, Reason};
use crate::inbox::{self, Received, Reception};
use crate::message::{Delivery, MessageId};
use futures_util::FutureExt;
use sqlx::{Connection, PgConnection};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Delay before a job is tried again after an error that does not count.
const TRANSIENT_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(50), cap: Duration::from_secs(5) };
/// Longest wait for the database beyond the handler's own time.
const MARGIN: Duration = Duration::from_secs(5);

pub(super) struct Worker {
    number: usize,
    options: Arc<ConsumerOptions>,
    handler: Arc<dyn Handler>,
    jobs: Jobs,
    settled: mpsc::Sender<Settled>,
    shared: Arc<Shared>,
    conn: Option<PgConnection>,
}

/// Why a job's transaction did not commit.
enum Failure {
    /// The handler's own: counts as an attempt.
    Handler(HandlerError),
    /// The same, and it was cut off in the middle: the session cannot be used again.
    CutOff(HandlerError),
    /// The connection's, the server's, or a conflict: the job is tried again as it is.
    Transient(DbError),
}

impl From<DbError> for Failure {
    fn from(error: DbError) -> Self {
        Self::Transient(error)
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        match db::sqlstate(&error).as_deref() {
            // Committing would roll back, and Postgres would not call that an error.
            Some("25P02") => {
                Self::Handler(HandlerError::Failed("a statement failed, and the handler went on".to_owned()))
            }
            _ => Self::Transient(error.into()),
        }
    }
}

impl Worker {
    pub fn new(
        number: usize,
        options: Arc<ConsumerOptions>,
        handler: Arc<dyn Handler>,
        jobs: Jobs,
        settled: mpsc::Sender<Settled>,
        shared: Arc<Shared>,
    ) -> Self {
        Self { number, options, handler, jobs, settled, shared, conn: None }
    }

    /// Works until stopped; a job that has begun is finished first.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let job = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                job = async { self.jobs.lock().await.recv().await } => match job {
                    Some(job) => job,
                    None => break,
                },
            };
            match job {
                // The broker delivers it again in the present session.
                Job::Delivery { session, .. } if session != self.shared.session.load(Ordering::SeqCst) => {}
                Job::Delivery { session, delivery } => {
                    let tag = delivery.tag;
                    if self.deliver(delivery, &stop).await && self.settled.send(Settled { session, tag }).await.is_err()
                    {
                        break;
                    }
                }
                Job::Retry(id) => {
                    self.retry(id, &stop).await;
                    self.shared.end(id);
                }
            }
        }
        if let Some(conn) = self.conn.take() {
            db::close(conn).await;
        }
    }

    /// Brings a delivery to a committed outcome; false if the worker was stopped before.
    async fn deliver(&mut self, delivery: Delivery, stop: &CancellationToken) -> bool {
        failpoints::pass("consumer.delivered");
        let Some(id) = Received::id_of(&delivery) else {
            let message = Received::new(MessageId(Uuid::now_v7()), delivery);
            return self.hold(&message, &Reason::NoMessageId, stop).await;
        };
        let message = Received::new(id, delivery);
        let mut failures = 0;
        loop {
            match self.apply(&message).await {
                Ok(()) => return true,
                Err(Failure::Handler(error) | Failure::CutOff(error)) => {
                    let retry_in = self.options.backoff.jittered(1);
                    let reason = Reason::of_failure(&error, 1, self.options.max_attempts, retry_in);
                    tracing::warn!(
                        consumer = self.options.name, message.id = %message.id, attempt = 1, %error, ?reason, "handler failed");
                    return self.hold(&message, &reason, stop).await;
                }
                Err(Failure::Transient(error)) => {
                    failures += 1;
                    if !self.wait_out(&error, failures, stop).await {
                        return false;
                    }
                }
            }
        }
    }

    /// One transaction: accept, handle, commit; or hold behind its key, commit.
    async fn apply(&mut self, message: &Received) -> Result<(), Failure> {
        let by_key = self.options.order == Order::Key;
        let (consumer, handler) = (Arc::clone(&self.options), Arc::clone(&self.handler));
        let limit = self.options.handler_timeout + 2 * MARGIN;
        let conn = self.session().await?;
        let work = async {
            let mut transaction = conn.begin().await?;
            match inbox::receive(&mut transaction, &consumer.name, message, by_key).await.map_err(accept_error)? {
                Reception::New => {
                    failpoints::pass("consumer.accepted");
                    run(&*handler, &mut transaction, message, &consumer).await?;
                    failpoints::pass("consumer.handled");
                }
                Reception::BehindKey => {
                    held::hold(&mut transaction, &consumer.name, message, &Reason::BehindKey).await?
                }
                Reception::Done | Reception::Held => {}
            }
            transaction.commit().await.map_err(commit_failure)?;
            failpoints::pass("consumer.committed");
            Ok(())
        };
        let result = within(limit, work).await;
        self.keep_session(&result).await;
        result
    }

    /// Brings a waiting delivery, if it still has its turn, to a committed outcome.
    async fn retry(&mut self, id: Uuid, stop: &CancellationToken) {
        let mut failures = 0;
        loop {
            let error = match self.apply_held(id).await {
                Ok(()) => return,
                Err((Failure::Handler(error) | Failure::CutOff(error), attempts)) => {
                    let retry_in = self.options.backoff.jittered(attempts + 1);
                    let reason = Reason::of_failure(&error, attempts + 1, self.options.max_attempts, retry_in);
                    tracing::warn!(
                        consumer = self.options.name, message.id = %id, attempt = attempts + 1, %error, ?reason,
                        "handler failed");
                    match self.record(id, attempts, &reason).await {
                        Ok(()) => return,
                        Err(error) => error,
                    }
                }
                Err((Failure::Transient(error), _)) => error,
            };
            failures += 1;
            if !self.wait_out(&error, failures, stop).await {
                return;
            }
        }
    }

    /// One transaction: claim, accept, handle, forget, commit. A failure comes with the attempts before this one.
    async fn apply_held(&mut self, id: Uuid) -> Result<(), (Failure, u32)> {
        let by_key = self.options.order == Order::Key;
        let (consumer, handler) = (Arc::clone(&self.options), Arc::clone(&self.handler));
        let limit = self.options.handler_timeout + 2 * MARGIN;
        let mut attempts = 0;
        let conn = self.session().await.map_err(|error| (error.into(), 0))?;
        let work = async {
            let mut transaction = conn.begin().await?;
            let Some((message, before)) = held::claim(&mut transaction, &consumer.name, id, by_key).await? else {
                transaction.rollback().await?;
                return Ok(());
            };
            attempts = before;
            let position = message.position.as_ref();
            let accepted = inbox::accept(&mut transaction, &consumer.name, message.id, position).await;
            if accepted.map_err(accept_error)? {
                run(&*handler, &mut transaction, &message, &consumer).await?;
                failpoints::pass("consumer.retry_handled");
            }
            held::forget(&mut transaction, &consumer.name, id).await?;
            transaction.commit().await.map_err(commit_failure)?;
            failpoints::pass("consumer.retry_committed");
            Ok(())
        };
        let result = within(limit, work).await;
        self.keep_session(&result).await;
        result.map_err(|failure| (failure, attempts))
    }

    /// Holds a delivery, however long the database is away; false if the worker was stopped before.
    async fn hold(&mut self, message: &Received, reason: &Reason, stop: &CancellationToken) -> bool {
        let mut failures = 0;
        loop {
            let options = Arc::clone(&self.options);
            let error = match self.session().await {
                Ok(conn) => {
                    let hold = held::hold(conn, &options.name, message, reason);
                    match db::bounded("holding a delivery", MARGIN, hold).await {
                        Ok(()) => {
                            failpoints::pass("consumer.failure_recorded");
                            return true;
                        }
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            self.conn = None;
            failures += 1;
            if !self.wait_out(&error, failures, stop).await {
                return false;
            }
        }
    }

    async fn record(&mut self, id: Uuid, attempts: u32, reason: &Reason) -> Result<(), DbError> {
        let options = Arc::clone(&self.options);
        let conn = self.session().await?;
        let result =
            db::bounded("recording an attempt", MARGIN, held::record(conn, &options.name, id, attempts, reason)).await;
        if result.is_err() {
            self.conn = None;
        }
        result
    }

    async fn session(&mut self) -> Result<&mut PgConnection, DbError> {
        let conn = match self.conn.take() {
            Some(conn) => conn,
            None => {
                let session = db::SessionOptions {
                    application_name: "oncebox consume",
                    statement_timeout: self.options.handler_timeout,
                    idle_timeout: match self.handler.is_one_statement() {
                        true => db::IDLE_TIMEOUT,
                        // It may wait for something else inside the transaction.
                        false => self.options.handler_timeout + 2 * MARGIN,
                    },
                    index_scans_only: false,
                };
                db::connect(&self.options.database_url, session).await?
            }
        };
        Ok(self.conn.insert(conn))
    }

    /// A session whose transaction did not commit is not used again: what it was in the middle of is unknown. After
    /// the handler's own failure it is healthy, and the transaction's drop has queued the rollback.
    async fn keep_session(&mut self, result: &Result<(), Failure>) {
        let healthy = match (result, &mut self.conn) {
            (Ok(()), _) => true,
            (Err(Failure::Handler(_)), Some(conn)) => {
                matches!(tokio::time::timeout(MARGIN, conn.ping()).await, Ok(Ok(())))
            }
            _ => false,
        };
        if !healthy {
            self.conn = None;
        }
    }

    /// Waits before the same job is tried again; false if the worker is to stop.
    async fn wait_out(&self, error: &DbError, failures: u32, stop: &CancellationToken) -> bool {
        let delay = TRANSIENT_BACKOFF.jittered(failures);
        tracing::warn!(consumer = self.options.name, worker = self.number, %error, ?delay, "not done, for no fault of the handler");
        tokio::select! {
            () = tokio::time::sleep(delay) => true,
            () = stop.cancelled() => false,
        }
    }
}

/// Runs the handler, however it ends, and makes sure that its transaction stands.
async fn run(
    handler: &dyn Handler,
    conn: &mut PgConnection,
    message: &Received,
    options: &ConsumerOptions,
) -> Result<(), Failure> {
    let failed = |text: String| HandlerError::Failed(text);
    // A statement that runs too long is ended by the server, a moment earlier.
    let limit = options.handler_timeout + MARGIN;
    let handling = AssertUnwindSafe(async { handler.handle(conn, message).await }).catch_unwind();
    match tokio::time::timeout(limit, handling).await {
        Ok(Ok(result)) => result.map_err(handler_failure)?,
        Ok(Err(panic)) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            return Err(Failure::CutOff(failed(format!("the handler panicked: {text}"))));
        }
        Err(_) => return Err(Failure::CutOff(failed(format!("the handler ran longer than {limit:?}")))),
    }
    if !handler.is_one_statement() && !inbox::is_accepted(conn, &options.name, message.id).await? {
        return Err(Failure::CutOff(failed("the handler ended the transaction it ran in".to_owned())));
    }
    Ok(())
}

async fn within(limit: Duration, work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Failure::Transient(DbError::TimedOut { what: "a delivery's transaction", limit })),
    }
}

fn handler_failure(error: HandlerError) -> Failure {
    match error {
        HandlerError::Database(error) if db::is_transient(&error) => Failure::Transient(error.into()),
        error => Failure::Handler(error),
    }
}

/// `accept` refuses what can never be accepted (OB001, 22023): that is the message's fault, not the server's.
fn accept_error(error: sqlx::Error) -> Failure {
    match db::sqlstate(&error).as_deref() {
        Some("OB001" | "22023") => Failure::Handler(HandlerError::Park(error.to_string())),
        _ => Failure::Transient(error.into()),
    }
}

/// Deferred constraints speak at the commit: an error that is not transient is the handler's.
fn commit_failure(error: sqlx::Error) -> Failure {
    handler_failure(HandlerError::Database(error))
}
