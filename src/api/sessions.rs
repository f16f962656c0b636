//! Database sessions of the API: a few, each taken for one short unit of work.
//!
//! The work runs in a task of its own: a client that hangs up drops the handler, not the work, so no session is left in
//! the middle of anything. A session that saw an error or a timeout is not used again.

use super::problem::Problem;
use crate::db::{self, DbError, SessionOptions};
use crate::migrate;
use futures_util::future::BoxFuture;
use sqlx::{Connection, PgConnection};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Most sessions: an operator's API, not an application's data path.
const SESSIONS: usize = 8;
/// Longest wait for one of them to be free.
const FREE_LIMIT: Duration = Duration::from_secs(2);
/// Longest wait for a new one.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for a sign of life of one that was idle.
const PING_LIMIT: Duration = Duration::from_secs(1);
/// Longest statement.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest unit of work.
const WORK_LIMIT: Duration = Duration::from_secs(25);

/// Why a unit of work came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The session is dropped.
    Database(DbError),
    /// Refused in order; the session is as good as before.
    Refused(Problem),
}

impl From<DbError> for Failure {
    fn from(error: DbError) -> Self {
        Self::Database(error)
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error.into())
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Refused(problem)
    }
}

/// The sessions of one server.
#[derive(Debug, Clone)]
pub(super) struct Sessions {
    database_url: Arc<str>,
    free: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<PgConnection>>>,
}

impl Sessions {
    /// Connects to nothing yet.
    pub(super) fn new(database_url: &str) -> Self {
        Self { database_url: database_url.into(), free: Arc::new(Semaphore::new(SESSIONS)), idle: Arc::default() }
    }

    /// Runs a unit of work to its end, whatever becomes of the caller. Work that begins a transaction ends it.
    ///
    /// # Errors
    /// 503 when no session is free or the database is away, else what the work fails with.
    pub(super) async fn run<T, W>(&self, work: W) -> Result<T, Problem>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, Failure>> + Send + 'static,
    {
        let permit = match tokio::time::timeout(FREE_LIMIT, Arc::clone(&self.free).acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            _ => return Err(Problem::unavailable(format!("all {SESSIONS} database sessions are busy"))),
        };
        let mut conn = self.session().await?;
        let idle = Arc::clone(&self.idle);
        let task = tokio::spawn(async move {
            let result = match tokio::time::timeout(WORK_LIMIT, work(&mut conn)).await {
                Ok(result) => result,
                Err(_) => Err(DbError::TimedOut { what: "a request", limit: WORK_LIMIT }.into()),
            };
            // Work that was refused may have left a transaction, whose rollback is sent with the next command only: until
            // then its locks would hold up others, and its snapshot every relay.
            let is_whole = match &result {
                Ok(_) => true,
                Err(Failure::Refused(_)) => alive(&mut conn).await,
                Err(Failure::Database(_)) => false,
            };
            if is_whole {
                idle.lock().unwrap_or_else(PoisonError::into_inner).push(conn);
            }
            drop(permit);
            result
        });
        match task.await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(Failure::Database(error))) => Err(error.into()),
            Ok(Err(Failure::Refused(problem))) => Err(problem),
            // Its session went with it.
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(Problem::unavailable("the server is stopping")),
        }
    }

    /// An idle session that still answers, or a new one.
    async fn session(&self) -> Result<PgConnection, Problem> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut conn) = idle else { break };
            if alive(&mut conn).await {
                return Ok(conn);
            }
        }
        let session = SessionOptions {
            application_name: "oncebox serve",
            statement_timeout: STATEMENT_TIMEOUT,
            idle_timeout: db::IDLE_TIMEOUT,
            plain_index_plans: false,
        };
        let connect = async {
            let mut conn = db::connect(&self.database_url, session).await?;
            migrate::check(&mut conn).await?;
            Ok::<_, DbError>(conn)
        };
        match tokio::time::timeout(CONNECT_LIMIT, connect).await {
            Ok(Ok(conn)) => Ok(conn),
            Ok(Err(error)) => {
                tracing::warn!(%error, "no database session");
                Err(Problem::unavailable(format!("the database is away: {error}")))
            }
            Err(_) => Err(Problem::unavailable(format!("the database did not answer within {CONNECT_LIMIT:?}"))),
        }
    }
}

/// Whether a session answers; rolls back what was left open.
async fn alive(conn: &mut PgConnection) -> bool {
    matches!(tokio::time::timeout(PING_LIMIT, conn.ping()).await, Ok(Ok(())))
}
