//! One lane, from the lease to its return: reader, publisher and the lease's keeper side by side.

use super::lookahead::Lookahead;
use super::pauses::Pauses;
use super::publishing::Publishing;
use super::reader::Reader;
use super::schedule;
use super::{BrokerHealth, RelayError, RelayOptions, connect};
use crate::broker::Broker;
use crate::db::DbError;
use crate::failpoints;
use crate::outbox::held;
use crate::outbox::journal::{self, LogPlace, Plan};
use crate::outbox::lease::{self, Lease};
use crate::outbox::source;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Pages between reader and publisher: one in hand, one waiting.
const PAGES_AHEAD: usize = 2;
/// An idle lane saves what has settled after this.
const SAVE_AFTER: Duration = Duration::from_millis(200);

pub(crate) struct Lane<B> {
    pub lane: i16,
    pub owner: Uuid,
    pub name: Arc<str>,
    pub broker: Arc<B>,
    pub health: Arc<BrokerHealth>,
    pub options: Arc<RelayOptions>,
    /// Cancelled: drain, settle and give the lane back.
    pub stop: CancellationToken,
    /// The newest plan this process has seen: a database that does not hold it any more was put back.
    pub known: watch::Sender<Option<Plan>>,
}

impl<B: Broker> Lane<B> {
    /// Takes the lane and publishes it until told to stop, or until a failure. Returns at once when another relay was
    /// faster.
    pub async fn run(self) -> Result<(), RelayError> {
        let mut conn = connect(&self.options).await?;
        let Some(lease) = lease::take(&mut conn, self.lane, self.owner, &self.name).await? else { return Ok(()) };
        tracing::info!(lane = lease.lane, epoch = lease.epoch, "lane taken");
        failpoints::pass("relay.lease_taken");
        self.hold(conn, lease).await
    }

    /// Runs reader, publisher and the lease's keeper side by side; the first that ends, ends all.
    async fn hold(&self, mut conn: sqlx::PgConnection, lease: Lease) -> Result<(), RelayError> {
        let identity = source::identity(&mut conn).await?;
        let resume = journal::resume(&mut conn, self.lane).await?;
        let known = self.known.borrow().clone();
        let change = source::check(&mut conn, &resume, known.as_ref()).await?;
        if let Some(change) = &change {
            tracing::error!(
                lane = self.lane,
                reason = change.reason,
                old_identity = change.from_identity,
                identity = change.to_identity,
                old_source = %change.from,
                source = %change.to,
                "offsets may be given twice here: recorded windows are finished, then the lane moves to a new source"
            );
        }
        let (reader, mut publisher) = tokio::try_join!(self.connect_to(&identity), self.connect_to(&identity))?;
        let from = resume.settled;
        let pauses = Pauses::load(&mut publisher, lease).await?;
        let waiting = held::waiting(&mut conn, self.lane).await?;
        let already_held = held::held_beyond(&mut conn, self.lane, from).await?;
        tracing::info!(lane = self.lane, window = from.n, seq = from.seq, waiting = waiting.count, "lane resumed");

        let (lease_sender, lease_receiver) = watch::channel(lease);
        let (settled_sender, settled) = watch::channel(from);
        let (pages_sender, pages) = mpsc::channel(PAGES_AHEAD);
        let reader =
            Reader::resume(reader, lease.epoch, resume, settled.clone(), pages_sender, self.known.clone(), change)
                .await?;
        let publishing = Publishing {
            broker: &*self.broker,
            health: &self.health,
            options: &self.options,
            conn: publisher,
            lease: lease_receiver,
            pages,
            settled: settled_sender,
            drain: self.stop.clone(),
            already_held,
            lookahead: Lookahead::new(self.options.key_window, from, waiting.keys),
            waiting: waiting.count,
            pauses,
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
        let schedule = match self.lane {
            0 => Some(self.connect_to(&identity).await?),
            _ => None,
        };
        let schedule = async {
            match schedule {
                Some(conn) => schedule::release_due(conn).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = publishing => result?,
            error = schedule => return Err(error.into()),
            result = reader.run() => {
                result?;
            }
            error = keep(&mut conn, lease, lease_sender, settled.clone()) => return Err(error.into()),
        }
        failpoints::pass("relay.before_release");
        // The keeper's statement may have been cut off: its connection is not used again.
        let mut conn = self.connect_to(&identity).await?;
        let settled = *settled.borrow();
        lease::release(&mut conn, lease, settled).await?;
        tracing::info!(lane = self.lane, window = settled.n, seq = settled.seq, "lane given back");
        Ok(())
    }

    /// A further session with the database the lane was taken in. Another one, promoted meanwhile, may lack what this
    /// one was told, such as held messages behind a settled place.
    async fn connect_to(&self, identity: &str) -> Result<sqlx::PgConnection, DbError> {
        let mut conn = connect(&self.options).await?;
        match source::identity(&mut conn).await? == identity {
            true => Ok(conn),
            false => Err(DbError::SourceReplaced { lane: self.lane }),
        }
    }

    async fn drain_deadline(&self) {
        self.stop.cancelled().await;
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
