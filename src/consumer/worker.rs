//! A worker: one job at a time, each in one transaction of its own database session.
//!
//! A job ends only when its outcome is committed: applied, held, or parked. Errors of the connection or the server
//! are waited out and do not count as attempts; the handler's own failures do.
//!
//! What a delivery is acknowledged for must be on the synchronous standby too. So every commit before that is watched, and
//! one that changes nothing, for the outcome is known, writes a mark: the commit that made the outcome may never have waited.

mod at_once;
mod outside;

use super::{ConsumerOptions, Job, Jobs, Settled, Shared, Taken, stream};
use crate::backoff::Backoff;
use crate::db::{self, DbError};
use crate::failpoints;
use crate::inbox::handler::{Handler, HandlerError, Handling};
use crate::inbox::held::Reason;
use crate::inbox::{self, Received, Reception};
use crate::message::{Delivery, MessageId, Position};
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
pub(super) const MARGIN: Duration = Duration::from_secs(5);

pub(super) struct Worker {
    number: usize,
    pub(super) options: Arc<ConsumerOptions>,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) jobs: Jobs,
    pub(super) settled: mpsc::Sender<Settled>,
    pub(super) shared: Arc<Shared>,
    pub(super) conn: Option<PgConnection>,
    /// What the last message took that was applied in one statement.
    pub(super) took: Option<Times>,
    /// Longest wait for a lock, if it is to be shorter than the usual.
    pub(super) lock_limit: Option<Duration>,
}

const LOCK_LIMIT: &str = "select set_config('lock_timeout', $1, false)";

/// Every statement of this file, for the test that prepares them all.
pub(super) const STATEMENTS: &[&str] = &[LOCK_LIMIT];

/// What one or more messages of a transaction took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// Accepting them.
    pub(super) inbox: Duration,
    /// The handler's work.
    pub(super) handler: Duration,
}

/// Why a job's transaction did not commit.
pub(super) enum Failure {
    /// The handler's own: counts as an attempt.
    Handler(HandlerError),
    /// The same, and it was cut off in the middle: the session cannot be used again.
    CutOff(HandlerError),
    /// The connection's, the server's, or a conflict: the job is tried again as it is.
    Transient(DbError),
    /// What the handler depends on is not there: the same, after a pause.
    Unavailable { reason: String, retry_after: Option<Duration> },
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Handler(error) | Self::CutOff(error) => error.fmt(f),
            Self::Transient(error) => error.fmt(f),
            Self::Unavailable { reason, .. } => f.write_str(reason),
        }
    }
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
        Self { number, options, handler, jobs, settled, shared, conn: None, took: None, lock_limit: None }
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
                    if !self.deliver_and_settle(session, delivery, &stop).await {
                        break;
                    }
                }
                Job::PassedOn { taken, .. } if taken.session != self.shared.session.load(Ordering::SeqCst) => {}
                Job::PassedOn { taken, permit } => {
                    let Taken { session, tag, redelivered, message } = *taken;
                    let turn = Arc::clone(&self.shared.turns).read_owned().await;
                    let done = self.bring(&message, redelivered, &stop).await;
                    drop(turn);
                    if !done || self.settled.send(Settled { session, tags: vec![tag] }).await.is_err() {
                        break;
                    }
                    drop(permit);
                }
                Job::Retry(due) => {
                    let id = due.id;
                    // What waits behind it in its stream follows at once, or new deliveries would outrun it for ever.
                    let mut next = Some(due);
                    while let Some(due) = next.filter(|_| !stop.is_cancelled()) {
                        next = self.retry(&due, &stop).await;
                    }
                    self.shared.end(id);
                }
            }
        }
        self.close().await;
    }

    /// Ends its session in order.
    pub(super) async fn close(self) {
        if let Some(conn) = self.conn {
            db::close(conn).await;
        }
    }

    /// Brings a delivery to a committed outcome and has it acknowledged; false if nobody is there to do so.
    pub(super) async fn deliver_and_settle(
        &mut self,
        session: u64,
        delivery: Delivery,
        stop: &CancellationToken,
    ) -> bool {
        let tag = delivery.tag;
        let turn = Arc::clone(&self.shared.turns).read_owned().await;
        let done = self.deliver(delivery, stop).await;
        drop(turn);
        !done || self.settled.send(Settled { session, tags: vec![tag] }).await.is_ok()
    }

    /// Brings a delivery to a committed outcome; false if the worker was stopped before.
    async fn deliver(&mut self, delivery: Delivery, stop: &CancellationToken) -> bool {
        failpoints::pass("consumer.delivered");
        if let (Some(reason), Some(at)) = (delivery.void(), delivery.position()) {
            return self.void(&at, &delivery.topic, reason, stop).await;
        }
        let Some(id) = Received::id_of(&delivery) else {
            let message = Received::new(MessageId(Uuid::now_v7()), delivery);
            return self.hold(&message, &Reason::NoMessageId, stop).await;
        };
        let redelivered = delivery.redelivered;
        self.bring(&Received::new(id, delivery), redelivered, stop).await
    }

    /// Brings a message to a committed outcome; false if the worker was stopped before.
    pub(super) async fn bring(&mut self, message: &Received, redelivered: bool, stop: &CancellationToken) -> bool {
        let (mut failures, mut called) = (0, false);
        loop {
            let Err(failure) = self.bring_once(message, redelivered, &mut called).await else { return true };
            failures += 1;
            if let Some(done) = self.bear(message, failure, failures, stop).await {
                return done;
            }
        }
    }

    pub(super) async fn bring_once(
        &mut self,
        message: &Received,
        redelivered: bool,
        called: &mut bool,
    ) -> Result<(), Failure> {
        match redelivered {
            true => self.put_back(message).await,
            false => self.attempt(message, called).await,
        }
    }

    /// Does what a failure asks for: holds the message, and answers whether that was done before the worker was stopped; or
    /// waits, and answers nothing, for it is to be tried again.
    pub(super) async fn bear(
        &mut self,
        message: &Received,
        failure: Failure,
        failures: u32,
        stop: &CancellationToken,
    ) -> Option<bool> {
        let waited = match failure {
            Failure::Unavailable { reason, retry_after } => self.pause(&reason, retry_after, failures, stop).await,
            Failure::Handler(error) | Failure::CutOff(error) => {
                let retry_in = self.options.backoff.jittered(1);
                let reason = Reason::of_failure(&error, 1, self.options.max_attempts, retry_in);
                tracing::warn!(
                    consumer = self.options.name, message.id = %message.id, attempt = 1, %error, ?reason, "handler failed");
                return Some(self.hold(message, &reason, stop).await);
            }
            Failure::Transient(error) => self.wait_out(&error, failures, stop).await,
        };
        if waited { None } else { Some(false) }
    }

    /// One transaction: accept, handle, commit; or hold behind its key, commit. In one statement where the handler is one.
    async fn apply(&mut self, message: &Received) -> Result<(), Failure> {
        if self.apply_at_once(message).await? {
            return Ok(());
        }
        let (consumer, handler) = (Arc::clone(&self.options), Arc::clone(&self.handler));
        let limit = self.options.handler_timeout + 2 * MARGIN;
        let conn = self.session().await?;
        let work = async {
            let mut transaction = conn.begin().await?;
            match stream::receive(&mut transaction, &consumer, message).await.map_err(accept_error)? {
                Reception::New => {
                    failpoints::pass("consumer.accepted");
                    run(&*handler, &mut transaction, message, &consumer).await?;
                    failpoints::pass("consumer.handled");
                }
                reception => match reception.holds() {
                    Some(reason) => stream::hold(&mut transaction, &consumer, message, &reason).await?,
                    None => db::mark(&mut transaction).await?,
                },
            }
            db::watched(transaction.commit()).await.map_err(commit_failure)?.confirmed(conn).await?;
            failpoints::pass("consumer.committed");
            Ok(())
        };
        let result = within(limit, work).await;
        self.keep_session(&result).await;
        result
    }

    /// Holds a delivery that was delivered before, unless its outcome is known: it may have ended the process that had
    /// it, so its next start is counted first, in the table. Whether it is new is asked like any other time, and taken
    /// back.
    async fn put_back(&mut self, message: &Received) -> Result<(), Failure> {
        let (consumer, shared) = (Arc::clone(&self.options), Arc::clone(&self.shared));
        let conn = self.session().await?;
        let work = async {
            let mut transaction = conn.begin().await?;
            let mut asking = transaction.begin().await?;
            let reception = stream::receive(&mut asking, &consumer, message).await.map_err(accept_error)?;
            let reason = match reception {
                Reception::New => {
                    asking.rollback().await?;
                    Some(Reason::Redelivered)
                }
                reception => {
                    asking.commit().await?;
                    reception.holds()
                }
            };
            match &reason {
                Some(reason) => stream::hold(&mut transaction, &consumer, message, reason).await?,
                None => db::mark(&mut transaction).await?,
            }
            db::watched(transaction.commit()).await?.confirmed(conn).await?;
            if reason.is_some() {
                shared.changed.notify_one();
            }
            Ok(())
        };
        let result = within(3 * MARGIN, work).await;
        self.keep_session(&result).await;
        result
    }

    /// Holds a delivery, however long the database is away; false if the worker was stopped before.
    pub(super) async fn hold(&mut self, message: &Received, reason: &Reason, stop: &CancellationToken) -> bool {
        let mut failures = 0;
        loop {
            let options = Arc::clone(&self.options);
            let error = match self.session().await {
                Ok(conn) => {
                    let hold = stream::hold(conn, &options, message, reason);
                    match db::fenced(db::bounded("holding a delivery", MARGIN, hold)).await {
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

    /// Passes the offset of a void notice; false if the worker was stopped before.
    async fn void(&mut self, at: &Position, topic: &str, reason: &str, stop: &CancellationToken) -> bool {
        let mut failures = 0;
        loop {
            let options = Arc::clone(&self.options);
            let error = match self.session().await {
                Ok(conn) => {
                    let void = stream::void(conn, &options, at, topic, reason);
                    match db::fenced(db::bounded("a void notice", MARGIN, void)).await {
                        Ok(()) => return true,
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

    pub(super) async fn session(&mut self) -> Result<&mut PgConnection, DbError> {
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
                    plain_index_plans: false,
                };
                let mut conn = db::connect(&self.options.database_url, session).await?;
                if let Some(limit) = self.lock_limit {
                    let set = sqlx::query(LOCK_LIMIT).bind(format!("{}ms", limit.as_millis())).execute(&mut conn);
                    db::bounded("session settings", MARGIN, set).await?;
                }
                conn
            }
        };
        Ok(self.conn.insert(conn))
    }

    /// A session whose transaction did not commit is not used again: what it was in the middle of is unknown. After
    /// the handler's own failure it is healthy, and the transaction's drop has queued the rollback.
    pub(super) async fn keep_session<T>(&mut self, result: &Result<T, Failure>) {
        let healthy = match (result, &mut self.conn) {
            (Ok(_), _) => true,
            (Err(Failure::Handler(_) | Failure::Unavailable { .. }), Some(conn)) => {
                matches!(tokio::time::timeout(MARGIN, conn.ping()).await, Ok(Ok(())))
            }
            _ => false,
        };
        if !healthy {
            self.conn = None;
        }
    }

    /// Waits before the same job is tried again; false if the worker is to stop.
    pub(super) async fn wait_out(&self, error: &DbError, failures: u32, stop: &CancellationToken) -> bool {
        let delay = TRANSIENT_BACKOFF.jittered(failures);
        tracing::warn!(consumer = self.options.name, worker = self.number, %error, ?delay, "not done, for no fault of the handler");
        tokio::select! {
            () = tokio::time::sleep(delay) => true,
            () = stop.cancelled() => false,
        }
    }
}

/// Runs the handler, however it ends, and makes sure that its transaction stands.
pub(super) async fn run(
    handler: &dyn Handler,
    conn: &mut PgConnection,
    message: &Received,
    options: &ConsumerOptions,
) -> Result<(), Failure> {
    ended(handler.handle(conn, message), options).await?;
    stands(handler, conn, message, options).await
}

/// Fails unless the transaction that accepted the message stands: a handler of several statements may have passed over
/// one that failed, or have ended the transaction.
pub(super) async fn stands(
    handler: &dyn Handler,
    conn: &mut PgConnection,
    message: &Received,
    options: &ConsumerOptions,
) -> Result<(), Failure> {
    if !handler.is_one_statement() && !inbox::is_accepted(conn, &options.name, message.id).await? {
        let text = "the handler ended the transaction it ran in".to_owned();
        return Err(Failure::CutOff(HandlerError::Failed(text)));
    }
    Ok(())
}

/// Waits for a handler, however it ends.
pub(super) async fn ended(handling: Handling<'_>, options: &ConsumerOptions) -> Result<(), Failure> {
    let failed = |text: String| HandlerError::Failed(text);
    // A statement that runs too long is ended by the server, a moment earlier.
    let limit = options.handler_timeout + MARGIN;
    match tokio::time::timeout(limit, AssertUnwindSafe(handling).catch_unwind()).await {
        Ok(Ok(result)) => result.map_err(handler_failure),
        Ok(Err(panic)) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Err(Failure::CutOff(failed(format!("the handler panicked: {text}"))))
        }
        Err(_) => Err(Failure::CutOff(failed(format!("the handler ran longer than {limit:?}")))),
    }
}

pub(super) async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Failure::Transient(DbError::TimedOut { what: "a delivery's transaction", limit })),
    }
}

pub(super) fn handler_failure(error: HandlerError) -> Failure {
    match error {
        HandlerError::Database(error) if db::is_transient(&error) => Failure::Transient(error.into()),
        HandlerError::Unavailable { reason, retry_after } => Failure::Unavailable { reason, retry_after },
        error => Failure::Handler(error),
    }
}

/// `accept` refuses what can never be accepted (OB001, 22023): that is the message's fault, not the server's.
pub(super) fn accept_error(error: sqlx::Error) -> Failure {
    match db::sqlstate(&error).as_deref() {
        Some("OB001" | "22023") => Failure::Handler(HandlerError::Park(error.to_string())),
        _ => Failure::Transient(error.into()),
    }
}

/// Deferred constraints speak at the commit: an error that is not transient is the handler's.
pub(super) fn commit_failure(error: sqlx::Error) -> Failure {
    handler_failure(HandlerError::Database(error))
}
