//! The relay: `app → outbox → `**`relay`**` → broker → consumer`.
//!
//! For each lane it can get the lease of: read the next window (`reader`), publish with confirms
//! (`publishing`), settle. Any number of relays may run; those without a lane stand by. A relay that lost its
//! lease changes nothing any more, and what it had in flight arrives as duplicates with the same id and offset.
//! Left out on purpose: deciding what an unroutable message deserves, which is an operator's matter.

mod lookahead;
mod publishing;
mod reader;

use crate::backoff::Backoff;
use crate::broker::{Broker, BrokerError};
use crate::db::{self, DbError};
use crate::failpoints;
use crate::outbox::held;
use crate::outbox::journal::{self, LogPlace};
use crate::outbox::lease::{self, Lease};
use lookahead::Lookahead;
use publishing::Publishing;
use reader::Reader;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Every statement of this room, for the test that prepares them all.
pub const STATEMENTS: &[&[&str]] = &[reader::STATEMENTS];

/// Pages between reader and publisher: one in hand, one waiting.
const PAGES_AHEAD: usize = 2;
/// How often a relay without the lane looks whether it is free.
const STANDBY_LOOK: Duration = Duration::from_millis(500);
/// An idle lane saves what has settled after this.
const SAVE_AFTER: Duration = Duration::from_millis(200);
/// Delay before a lane is tried again after its database failed.
const LANE_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(200), cap: Duration::from_secs(5) };
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

/// Publishes every lane this process can get until `shutdown` is cancelled; then drains, settles and gives the lanes
/// back within the drain deadline.
///
/// # Errors
/// Only what no waiting can mend, such as a database without the schema; anything transient is logged and retried.
pub async fn run<B: Broker>(
    broker: Arc<B>,
    options: RelayOptions,
    shutdown: CancellationToken,
) -> Result<(), RelayError> {
    let owner = Uuid::new_v7(uuid::Timestamp::now(uuid::NoContext));
    let mut conn = connect(&options).await?;
    let lanes = lease::lanes(&mut conn).await?;
    db::close(conn).await;
    tracing::info!(%owner, ?lanes, exchange = options.exchange, "relay started");
    let options = Arc::new(options);
    let mut tasks = JoinSet::new();
    for lane in lanes {
        let lane = Lane {
            lane,
            owner,
            broker: Arc::clone(&broker),
            options: Arc::clone(&options),
            shutdown: shutdown.clone(),
        };
        tasks.spawn(lane.run());
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("a lane does not panic")?;
    }
    tracing::info!("relay stopped");
    Ok(())
}

async fn connect(options: &RelayOptions) -> Result<sqlx::PgConnection, DbError> {
    let session = db::SessionOptions {
        application_name: "oncebox relay",
        statement_timeout: STATEMENT_TIMEOUT,
        idle_timeout: db::IDLE_TIMEOUT,
        index_scans_only: true,
    };
    db::connect(&options.database_url, session).await
}

struct Lane<B> {
    lane: i16,
    owner: Uuid,
    broker: Arc<B>,
    options: Arc<RelayOptions>,
    shutdown: CancellationToken,
}

impl<B: Broker> Lane<B> {
    /// Stands by for the lane, holds it, and begins anew after every failure.
    async fn run(self) -> Result<(), RelayError> {
        let mut failures = 0;
        while !self.shutdown.is_cancelled() {
            let began = Instant::now();
            let delay = match self.stand_by_and_hold().await {
                Ok(()) => STANDBY_LOOK,
                Err(RelayError::Db(DbError::LeaseLost { lane })) => {
                    tracing::warn!(lane, "another relay has taken the lane");
                    STANDBY_LOOK
                }
                Err(error) => {
                    failures = if began.elapsed() > LANE_BACKOFF.cap { 1 } else { failures + 1 };
                    let delay = LANE_BACKOFF.jittered(failures);
                    tracing::error!(lane = self.lane, %error, ?delay, "the lane stopped; it begins anew");
                    delay
                }
            };
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.shutdown.cancelled() => {}
            }
        }
        Ok(())
    }

    async fn stand_by_and_hold(&self) -> Result<(), RelayError> {
        let mut conn = connect(&self.options).await?;
        let name = format!("pid {}", std::process::id());
        let lease = loop {
            if let Some(lease) = lease::take(&mut conn, self.lane, self.owner, &name).await? {
                break lease;
            }
            tokio::select! {
                () = tokio::time::sleep(STANDBY_LOOK) => {}
                () = self.shutdown.cancelled() => return Ok(()),
            }
        };
        tracing::info!(lane = lease.lane, epoch = lease.epoch, "lane taken");
        failpoints::pass("relay.lease_taken");
        self.hold(conn, lease).await
    }

    /// Runs reader, publisher and the lease's keeper side by side; the first that ends, ends all.
    async fn hold(&self, mut conn: sqlx::PgConnection, lease: Lease) -> Result<(), RelayError> {
        let resume = journal::resume(&mut conn, self.lane).await?;
        let from = resume.settled;
        let (waiting, held_keys) = held::waiting(&mut conn, self.lane).await?;
        let already_held = held::held_beyond(&mut conn, self.lane, from).await?;
        tracing::info!(lane = self.lane, window = from.n, seq = from.seq, waiting, "lane resumed");

        let (lease_sender, lease_receiver) = watch::channel(lease);
        let (settled_sender, settled) = watch::channel(from);
        let (pages_sender, pages) = mpsc::channel(PAGES_AHEAD);
        let reader = connect(&self.options).await?;
        let reader = Reader::resume(reader, lease.epoch, resume, settled.clone(), pages_sender).await?;
        let publishing = Publishing {
            broker: &*self.broker,
            options: &self.options,
            conn: connect(&self.options).await?,
            lease: lease_receiver,
            pages,
            settled: settled_sender,
            drain: self.shutdown.clone(),
            already_held,
            lookahead: Lookahead::new(self.options.key_window, from, held_keys),
            waiting,
        };
        let publishing = async {
            tokio::select! {
                result = publishing.run() => result,
                () = self.drain_deadline() => {
                    tracing::warn!(lane = self.lane, "the drain deadline passed: what is in flight will be sent again");
                    Ok(())
                }
            }
        };
        tokio::select! {
            result = publishing => result?,
            result = reader.run() => {
                result?;
            }
            error = keep(&mut conn, lease, lease_sender, settled.clone()) => return Err(error.into()),
        }
        failpoints::pass("relay.before_release");
        // The keeper's statement may have been cut off: its connection is not used again.
        let mut conn = connect(&self.options).await?;
        let settled = *settled.borrow();
        lease::release(&mut conn, lease, settled).await?;
        tracing::info!(lane = self.lane, window = settled.n, seq = settled.seq, "lane given back");
        Ok(())
    }

    async fn drain_deadline(&self) {
        self.shutdown.cancelled().await;
        tokio::time::sleep(self.options.drain_deadline).await;
    }
}

/// Renews the lease and saves the settled place with it; ends only when the lease cannot be kept.
async fn keep(
    conn: &mut sqlx::PgConnection,
    mut lease: Lease,
    sender: watch::Sender<Lease>,
    mut settled: watch::Receiver<LogPlace>,
) -> DbError {
    let mut saved = *settled.borrow_and_update();
    loop {
        let renew_at = tokio::time::Instant::now() + lease::RENEW_EVERY;
        loop {
            // Each change starts the wait anew: what settles under load is saved with plans and renewals.
            let idle = tokio::time::sleep(SAVE_AFTER);
            tokio::select! {
                () = tokio::time::sleep_until(renew_at) => break,
                changed = settled.changed() => if changed.is_err() { std::future::pending::<()>().await },
                () = idle, if *settled.borrow() > saved => break,
            }
        }
        let place = *settled.borrow();
        lease = match lease::renew(conn, lease, place).await {
            Ok(lease) => lease,
            Err(error) => return error,
        };
        saved = place;
        sender.send_replace(lease);
    }
}
