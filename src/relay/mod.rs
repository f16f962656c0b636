//! The relay: `app → outbox → `**`relay`**` → broker → consumer`.
//!
//! Any number of relays may run: they share the lanes (`coordinator`, `share`), and those without a lane stand by. For
//! each lane of its share (`lane`) a relay reads the next window (`reader`), publishes with confirms (`publishing`),
//! settles. A relay that lost its lease changes nothing any more, and what it had in flight arrives as duplicates with
//! the same id and offset. Left out on purpose: any talk between relays; the leases decide.

mod coordinator;
mod lane;
mod lookahead;
mod pauses;
mod publishing;
mod reader;
mod schedule;
mod share;

use crate::broker::{Broker, BrokerError};
use crate::db::{self, DbError};
use coordinator::Coordinator;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Every statement of this room, for the test that prepares them all.
pub const STATEMENTS: &[&[&str]] = &[schedule::STATEMENTS];

/// Longest statement: a page of a window with large bodies.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// How a relay runs.
#[derive(Debug, Clone)]
pub struct RelayOptions {
    /// Where the outbox is.
    pub database_url: String,
    /// Topic exchange to publish to.
    pub exchange: String,
    /// Unconfirmed messages a key. 1 keeps a key's order under nacks; more is faster and gives that up.
    pub key_window: usize,
    /// How long in-flight messages are waited for at the end.
    pub drain_deadline: Duration,
    /// How often a message of each topic that no queue was bound for is tried again; none: never.
    pub unroutable_probe: Option<Duration>,
}

/// Why a lane could not be published for the moment.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// The database's side.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The broker's side.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Publishes this process's share of the lanes until `shutdown` is cancelled; then drains, settles and gives them back
/// within the drain deadline.
///
/// # Errors
/// Only what no waiting can mend, such as a database that cannot be reached at the start; anything later is logged and
/// retried.
pub async fn run<B: Broker>(
    broker: Arc<B>,
    options: RelayOptions,
    shutdown: CancellationToken,
) -> Result<(), RelayError> {
    Coordinator::new(broker, options, coordinator::process_name(), shutdown).run().await
}

async fn connect(options: &RelayOptions) -> Result<sqlx::PgConnection, DbError> {
    let session = db::SessionOptions {
        application_name: "oncebox relay",
        statement_timeout: STATEMENT_TIMEOUT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: true,
    };
    db::connect(&options.database_url, session).await
}

/// Sessions with the broker may fail for this long before the relay leaves the lanes to others that have one.
const UNREADY_AFTER: Duration = Duration::from_secs(3);

/// Whether this process reaches the broker, as its sessions found.
#[derive(Debug, Default)]
struct BrokerHealth(Mutex<Sessions>);

#[derive(Debug, Default)]
struct Sessions {
    /// There was one.
    reached: bool,
    failing_since: Option<Instant>,
}

impl BrokerHealth {
    /// A session was opened, or could not be.
    fn note(&self, opened: bool) {
        let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if opened {
            *sessions = Sessions { reached: true, failing_since: None };
        } else {
            sessions.failing_since.get_or_insert_with(Instant::now);
        }
    }

    /// It was reached, and has not been out of reach for long since.
    fn ready(&self) -> bool {
        let sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.reached && sessions.failing_since.is_none_or(|since| since.elapsed() < UNREADY_AFTER)
    }
}
