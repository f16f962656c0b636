//! Connections to Postgres: session settings, bounded waits, the durability fence, and what an error means.
//!
//! There is no pool: each loop owns its connection and drops it after any error that touched the session, so a
//! cancelled transaction can never leak into later work. Left out on purpose: retries, which belong to the loops.

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};
use std::cell::Cell;
use std::future::Future;
use std::str::FromStr;
use std::sync::LazyLock;
use std::time::Duration;
use tracing::Dispatch;
use tracing::instrument::WithSubscriber;

/// Longest wait for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for the fence behind a doubtful commit.
const FENCE_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for the end of one's own session.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// What went wrong between a process and its database.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DbError {
    /// The URL cannot be used.
    #[error("the database URL is not valid: {0}")]
    InvalidUrl(String),
    /// The database has no oncebox schema.
    #[error("the database has no oncebox schema: run `oncebox migrate`")]
    SchemaMissing,
    /// The schema is older than this program.
    #[error("the schema is at version {found}, this program needs {needed}: run `oncebox migrate`")]
    SchemaTooOld {
        /// Version in the database.
        found: i32,
        /// Version of this program.
        needed: i32,
    },
    /// The schema is newer than this program.
    #[error("the schema is at version {found}, this program knows {known}: run a newer oncebox")]
    SchemaTooNew {
        /// Version in the database.
        found: i32,
        /// Version of this program.
        known: i32,
    },
    /// No answer in time; the connection must not be used again.
    #[error("the database did not answer {what} within {limit:?}")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// A commit came back before the standby had it: nothing it covers may be published yet.
    #[error("a commit was not confirmed as durable: {0}")]
    FenceBroken(String),
    /// Another relay holds the lane.
    #[error("the lease of lane {lane} was lost")]
    LeaseLost {
        /// Which lane.
        lane: i16,
    },
    /// The lane's plans belong to another database, or to an earlier point of this one.
    #[error("lane {lane} must move to a new source")]
    SourceReplaced {
        /// Which lane.
        lane: i16,
    },
    /// The journal contradicts itself; publishing on would reuse or skip offsets.
    #[error("the journal of lane {lane} is inconsistent at plan {n}: {reason}")]
    JournalBroken {
        /// Which lane.
        lane: i16,
        /// Which plan.
        n: i64,
        /// What does not fit.
        reason: String,
    },
    /// Anything else that Postgres or the driver reports.
    #[error(transparent)]
    Sqlx(#[from] sqlx::Error),
}

impl DbError {
    /// True when the same work can succeed later without anyone changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::TimedOut { .. } | Self::FenceBroken(_) | Self::LeaseLost { .. } | Self::SourceReplaced { .. } => true,
            Self::Sqlx(error) => is_transient(error),
            _ => false,
        }
    }
}

/// The SQLSTATE of an error that Postgres raised.
pub fn sqlstate(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(|code| code.into_owned())
}

/// True for errors of the connection, the server's state or a conflict, and not of the statement: class 08, 40,
/// 53, 57, SQLSTATE 55P03, 25P03 (the session idled too long) and 25006 (a standby), and everything below the protocol. 57014 is not among them: it is
/// how a statement that always runs too long ends.
pub fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::PoolTimedOut | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(_) => sqlstate(error).is_some_and(|code| {
            let class = code.get(..2).unwrap_or_default();
            code != "57014"
                && (matches!(class, "08" | "40" | "53" | "57") || matches!(&*code, "55P03" | "25P03" | "25006"))
        }),
        _ => false,
    }
}

/// True when the transaction lost against another one and the whole of it should run again: 40001 and 40P01.
pub fn is_conflict(error: &sqlx::Error) -> bool {
    matches!(sqlstate(error).as_deref(), Some("40001" | "40P01"))
}

/// The usual [`SessionOptions::idle_timeout`]: no loop of ours waits for anything but the database in a transaction.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How a session is set up.
#[derive(Debug, Clone, Copy)]
pub struct SessionOptions {
    /// Shown in `pg_stat_activity`.
    pub application_name: &'static str,
    /// A statement that runs longer fails with SQLSTATE 57014.
    pub statement_timeout: Duration,
    /// A transaction in which nothing happens for longer is ended by the server, and with it its locks.
    pub idle_timeout: Duration,
    /// Index scans whatever the statistics say, since the log's tables may never have been analysed; and no parallel
    /// workers, which cost a small read more than it takes.
    pub plain_index_plans: bool,
}

/// Opens a session. Its locks cannot outlive a frozen process for long: the server ends sessions that idle inside
/// a transaction or whose peer is gone. `synchronous_commit` is raised to `on` unless it is `remote_apply`, and
/// warnings, which fences watch for, are shown.
pub async fn connect(url: &str, options: SessionOptions) -> Result<PgConnection, DbError> {
    let connect = PgConnectOptions::from_str(url)
        .map_err(|error| DbError::InvalidUrl(error.to_string()))?
        .application_name(options.application_name)
        .disable_statement_logging();
    let mut conn = bounded("a connection", CONNECT_LIMIT, connect.connect()).await?;
    let setup = sqlx::query(
        "select set_config('statement_timeout', $1, false),
            set_config('lock_timeout', '10s', false),
            set_config('idle_in_transaction_session_timeout', $4, false),
            set_config('tcp_user_timeout', '15s', false),
            set_config('tcp_keepalives_idle', '5', false),
            set_config('tcp_keepalives_interval', '2', false),
            set_config('tcp_keepalives_count', '5', false),
            set_config('jit', 'off', false),
            set_config('client_min_messages', case current_setting('client_min_messages') when 'error' then 'warning'
                else current_setting('client_min_messages') end, false),
            set_config('synchronous_commit',
                case current_setting('synchronous_commit') when 'remote_apply' then 'remote_apply' else 'on' end, false),
            set_config('default_transaction_isolation', 'read committed', false),
            set_config('enable_seqscan', $2, false),
            set_config('enable_bitmapscan', $2, false),
            set_config('plan_cache_mode', $3, false),
            set_config('max_parallel_workers_per_gather', case when $2 = 'off' then '0'
                else current_setting('max_parallel_workers_per_gather') end, false)",
    )
    .bind(format!("{}ms", options.statement_timeout.as_millis()))
    .bind(if options.plain_index_plans { "off" } else { "on" })
    .bind(if options.plain_index_plans { "force_generic_plan" } else { "auto" })
    .bind(format!("{}ms", options.idle_timeout.as_millis()));
    bounded("session settings", CONNECT_LIMIT, setup.execute(&mut conn)).await?;
    Ok(conn)
}

/// Ends a session in order.
pub async fn close(conn: PgConnection) {
    // A peer that is gone cannot be told; its own limits end the session.
    let _ = tokio::time::timeout(CLOSE_LIMIT, conn.close()).await;
}

/// Waits for the database with a limit; after [`DbError::TimedOut`] the connection must be dropped.
pub async fn bounded<T>(
    what: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, DbError> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(DbError::TimedOut { what, limit }),
    }
}

/// Runs statements that commit, and fails when a commit came back with a warning: Postgres answers so when the wait
/// for the synchronous standby was cancelled, and the driver would take it for success.
pub async fn fenced<T>(work: impl Future<Output = Result<T, DbError>>) -> Result<T, DbError> {
    match watched(work).await? {
        Committed { is_doubtful: true, .. } => {
            Err(DbError::FenceBroken("it was cancelled while it waited for the standby".to_owned()))
        }
        Committed { value, .. } => Ok(value),
    }
}

const MARK: &str = "select pg_logical_emit_message(true, 'oncebox', 'mark')::text";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[MARK];

/// Makes a transaction one that writes: only such a one waits for the standby when it commits, and once it has waited,
/// everything that was committed before is durable too.
pub async fn mark(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query(MARK).execute(conn).await?;
    Ok(())
}

/// What statements that commit have answered; nobody may act on it before it is [`confirmed`](Self::confirmed).
#[must_use]
#[derive(Debug)]
pub struct Committed<T> {
    value: T,
    /// The server has warned meanwhile, perhaps because the wait for the standby was cancelled.
    is_doubtful: bool,
}

impl<T> Committed<T> {
    /// The answer, as durable as Postgres was asked to make it: behind a doubtful commit a fence is waited for.
    ///
    /// # Errors
    /// [`DbError::FenceBroken`] or an error of the session: the commit may be lost on the standby although everybody sees it.
    pub async fn confirmed(self, conn: &mut PgConnection) -> Result<T, DbError> {
        if self.is_doubtful {
            fenced(bounded("a fence", FENCE_LIMIT, mark(conn))).await?;
        }
        Ok(self.value)
    }
}

/// Runs statements that commit, and watches for warnings of the server. Nothing else may run in `work`: it would log in vain.
pub async fn watched<T, E>(work: impl Future<Output = Result<T, E>>) -> Result<Committed<T>, E> {
    let watch = Watch { warned: Cell::new(false), log: tracing::dispatcher::get_default(Clone::clone) };
    let watched = async {
        let value = work.with_subscriber(WATCH.clone()).await?;
        Ok(Committed { value, is_doubtful: WATCHED.with(|watch| watch.warned.get()) })
    };
    WATCHED.scope(watch, watched).await
}

tokio::task_local! {
    static WATCHED: Watch;
}
/// One for all: making a dispatcher walks every log statement of the program.
static WATCH: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(WarningWatch));

/// What one watch has seen, and where the server's notices are logged otherwise.
struct Watch {
    warned: Cell<bool>,
    log: Dispatch,
}

/// Sees the server's warnings where the driver shows them, in its log events, and passes all its notices on.
struct WarningWatch;

impl tracing::Subscriber for WarningWatch {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "sqlx::postgres::notice"
    }
    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(tracing::level_filters::LevelFilter::WARN)
    }
    fn event(&self, event: &tracing::Event<'_>) {
        let notice = event.metadata();
        if !self.enabled(notice) {
            return;
        }
        // Without a watch there is none to tell.
        let _ = WATCHED.try_with(|watch| {
            watch.warned.set(watch.warned.get() || *notice.level() <= tracing::Level::WARN);
            if watch.log.enabled(notice) {
                watch.log.event(event);
            }
        });
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}
