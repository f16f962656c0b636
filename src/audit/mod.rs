//! The audit: every offset of every stream held against what each consumer's ledger says.
//!
//! It reads counters and ledgers, not messages, so it can run every minute. Missing is what the relay has settled,
//! what a consumer neither applied nor holds nor parked, and what lies below something it did apply, at two looks a
//! grace apart. Doubled is one offset applied under two ids. Left out on purpose: messages that carry no offset, and
//! streams beyond a lane's bound, which share one and are reported as not checked.

mod judge;
mod read;

use crate::broker::Broker;
use crate::db::{self, DbError, SessionOptions};
use crate::migrate;
use crate::replay::{self, ReplayError, ReplayOptions, Selection, Summary};
pub use judge::{ConsumerStream, Missing, Report, Stream, StreamId};
pub use read::STATEMENTS;
use std::collections::HashMap;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How an audit looks.
#[derive(Debug, Clone)]
pub struct AuditOptions {
    /// The database of the outbox, and of consumers beside it.
    pub database_url: String,
    /// Databases of other consumers.
    pub consumer_database_urls: Vec<String>,
    /// How long after a later offset of its stream a message may still be on its way.
    pub grace: Duration,
}

/// Missing messages that are named one by one; ranges are always whole.
const NAMED: usize = 100;
/// Longest statement: folding what came since the last fold.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Looks, and looks again after the grace if anything seems to be missing: what is missing both times is.
///
/// # Errors
/// A database that cannot be reached or read; an audit that could not look everywhere proves nothing.
pub async fn run(options: &AuditOptions) -> Result<Report, ReplayError> {
    let mut report = look(options).await?;
    if report.missing_count() > 0 {
        tokio::time::sleep(options.grace).await;
        let later = look(options).await?;
        report = later.confirm(&report);
        report.missing = name(options, &report).await?;
    }
    Ok(report)
}

/// Sends what is missing once more, under the same ids and offsets; consumers that have it ignore it.
///
/// # Errors
/// As [`replay::run`].
pub async fn redrive<B: Broker>(
    report: &Report,
    broker: &B,
    replay: &ReplayOptions,
    shutdown: &CancellationToken,
) -> Result<Vec<Summary>, ReplayError> {
    let mut summaries = Vec::new();
    for (source, streams) in report.lacking() {
        let selection = Selection::Offsets { source: Some(source), streams };
        let options = ReplayOptions { selection, ..replay.clone() };
        summaries.push(replay::run(broker, &options, |_| {}, shutdown.clone()).await?);
    }
    Ok(summaries)
}

/// Looks up the ids of what is missing.
async fn name(options: &AuditOptions, report: &Report) -> Result<Vec<Missing>, ReplayError> {
    let mut conn = connect(&options.database_url).await?;
    let mut ids = HashMap::new();
    for (source, streams) in report.lacking() {
        let selection = Selection::Offsets { source: Some(source), streams };
        for found in replay::find(&mut conn, &selection, NAMED).await? {
            ids.insert((source, found.stream, found.offset), found.message_id);
        }
    }
    db::close(conn).await;
    let each = report.consumers.iter().flat_map(|entry| {
        entry.missing.iter().flat_map(|(from, to)| from..=to).map(|offset| {
            let message_id = ids.get(&(entry.id.source, entry.id.stream.clone(), offset)).copied();
            Missing { consumer: entry.consumer.clone(), id: entry.id.clone(), offset, message_id }
        })
    });
    Ok(each.take(NAMED).collect())
}

/// Consumers first: whatever they have applied by then, the outbox has counted.
async fn look(options: &AuditOptions) -> Result<Report, DbError> {
    let mut inboxes = Vec::new();
    let mut urls = vec![options.database_url.as_str()];
    for url in &options.consumer_database_urls {
        if !urls.contains(&url.as_str()) {
            urls.push(url);
        }
    }
    for url in urls {
        let mut conn = connect(url).await?;
        inboxes.extend(read::inbox(&mut conn).await?);
        db::close(conn).await;
    }
    let mut conn = connect(&options.database_url).await?;
    let outbox = read::outbox(&mut conn).await?;
    db::close(conn).await;
    Ok(judge::judge(outbox, inboxes))
}

/// A session on a schema this program knows.
async fn connect(url: &str) -> Result<sqlx::PgConnection, DbError> {
    let session = SessionOptions {
        application_name: "oncebox audit",
        statement_timeout: STATEMENT_TIMEOUT,
        idle_timeout: db::IDLE_TIMEOUT,
        // The journal and the log may never have been analysed.
        plain_index_plans: true,
    };
    let mut conn = db::connect(url, session).await?;
    migrate::check(&mut conn).await?;
    Ok(conn)
}
