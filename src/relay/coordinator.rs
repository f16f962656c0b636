//! One a process: looks which relays live and which lanes are free, takes this relay's share, and gives back what has
//! become another's.
//!
//! What to take is decided by [`share`](super::share) alone; nothing is negotiated. A lane given back is drained
//! first, and free for the other's next look.

use super::lane::Lane;
use super::share::{candidates, share};
use super::{BrokerHealth, RelayError, RelayOptions, connect};
use crate::backoff::Backoff;
use crate::broker::{Broker, Publisher};
use crate::db::DbError;
use crate::outbox::journal::Plan;
use crate::outbox::relays::{self, LiveRelay, Seat};
use sqlx::PgConnection;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How often a relay looks, and how often while a lane of its share is still in another's hands: with the time to
/// drain and to take it, the gap when a lane changes hands.
const LOOK_EVERY: Duration = Duration::from_millis(200);
const LOOK_EVERY_AWAITING: Duration = Duration::from_millis(50);
/// A lane that stays free for this long, although it is another's share, is taken by whoever sees it.
const BORROW_AFTER: Duration = Duration::from_secs(3);
/// It is not given back before this: the other has just shown that it does not take it.
const BORROW_FOR: Duration = Duration::from_secs(15);
/// How often a relay without the broker and without a lane tries to reach it.
const PROBE_EVERY: Duration = Duration::from_secs(2);
/// Longest wait for a word to the others at the end.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);
/// Delay before a lane goes on after it moved to a new source, or found that it must.
const SOURCE_DELAY: Duration = Duration::from_millis(50);
/// Delay before a lane, or the look, is tried again after its database failed.
const BACKOFF: Backoff = Backoff { initial: Duration::from_millis(200), cap: Duration::from_secs(5) };

/// A lane this process works on.
struct Running {
    stop: CancellationToken,
    since: Instant,
}

/// Failures of a lane in a row, and when it may be tried again.
#[derive(Clone, Copy)]
struct Resting {
    failures: u32,
    until: Instant,
}

pub(crate) struct Coordinator<B> {
    owner: Uuid,
    name: Arc<str>,
    broker: Arc<B>,
    health: Arc<BrokerHealth>,
    options: Arc<RelayOptions>,
    shutdown: CancellationToken,
    lanes: JoinSet<(i16, Result<(), RelayError>)>,
    running: HashMap<i16, Running>,
    resting: HashMap<i16, Resting>,
    /// The newest plan seen of each lane this process has held.
    known: HashMap<i16, watch::Sender<Option<Plan>>>,
    /// Since when lanes are free that are another's share.
    free_since: HashMap<i16, Instant>,
    /// Lanes taken out of turn, until when they are kept.
    borrowed: HashMap<i16, Instant>,
    probes: JoinSet<()>,
    probed_at: Option<Instant>,
}

impl<B: Broker> Coordinator<B> {
    pub fn new(broker: Arc<B>, options: RelayOptions, name: String, shutdown: CancellationToken) -> Self {
        Self {
            owner: Uuid::new_v7(uuid::Timestamp::now(uuid::NoContext)),
            name: name.into(),
            broker,
            health: Arc::new(BrokerHealth::default()),
            options: Arc::new(options),
            shutdown,
            lanes: JoinSet::new(),
            running: HashMap::new(),
            resting: HashMap::new(),
            known: HashMap::new(),
            free_since: HashMap::new(),
            borrowed: HashMap::new(),
            probes: JoinSet::new(),
            probed_at: None,
        }
    }

    /// Runs until `shutdown`, then waits for the lanes, which drain by themselves.
    pub async fn run(mut self) -> Result<(), RelayError> {
        // Whoever starts the relay learns what is wrong with the database; later it is retried.
        let mut conn = connect(&self.options).await?;
        relays::beat(&mut conn, self.owner, &self.name, self.health.ready()).await?;
        tracing::info!(owner = %self.owner, name = %self.name, exchange = self.options.exchange, "relay started");
        let (pace_sender, pace) = watch::channel(LOOK_EVERY);
        let (view_sender, mut views) = mpsc::channel(1);
        let watch = Watch {
            owner: self.owner,
            name: Arc::clone(&self.name),
            health: Arc::clone(&self.health),
            options: Arc::clone(&self.options),
            pace,
            views: view_sender,
        };
        // Beside the loop, not in it: a database that does not answer must not delay what becomes of the lanes.
        let watching = tokio::spawn(watch.run(conn));
        while !self.shutdown.is_cancelled() {
            self.probe_broker();
            tokio::select! {
                view = views.recv() => {
                    let (seats, live) = view.expect("the watch does not end by itself");
                    let pace = self.take_and_give_back(&seats, &live);
                    pace_sender.send_replace(pace);
                }
                Some(ended) = self.lanes.join_next() => self.lane_ended(ended.expect("a lane does not panic")),
                Some(_) = self.probes.join_next() => {}
                () = self.shutdown.cancelled() => {}
            }
        }
        // A heartbeat that is still on its way must not come behind the farewell.
        drop(views);
        let unwatched = watching.abort_handle();
        if tokio::time::timeout(LEAVE_LIMIT, watching).await.is_err() {
            unwatched.abort();
        }
        // At once, not behind the drained lanes: each of them is taken as soon as it is free.
        let left = async {
            let mut conn = connect(&self.options).await?;
            relays::leave(&mut conn, self.owner).await
        };
        if !matches!(tokio::time::timeout(LEAVE_LIMIT, left).await, Ok(Ok(()))) {
            tracing::warn!("the other relays could not be told of the end");
        }
        while let Some(ended) = self.lanes.join_next().await {
            let (lane, result) = ended.expect("a lane does not panic");
            if let Err(error) = result {
                tracing::warn!(lane, %error, "the lane was not given back: its lease runs out");
            }
        }
        tracing::info!("relay stopped");
        Ok(())
    }

    /// Takes what is this relay's share, gives back what is not; returns how soon to look again.
    fn take_and_give_back(&mut self, seats: &[Seat], live: &[LiveRelay]) -> Duration {
        let candidates = candidates(seats, live, self.owner);
        let shares = share(seats, &candidates);
        let mut awaiting = false;
        for seat in seats {
            let mine = shares.get(&seat.lane) == Some(&self.owner);
            let by_other = seat.held && seat.owner != Some(self.owner);
            awaiting |= mine && by_other;
            if mine || seat.held {
                self.free_since.remove(&seat.lane);
            }
            match (self.running.get(&seat.lane), mine) {
                (Some(running), false) if !self.keeps_borrowed(seat.lane) && !running.stop.is_cancelled() => {
                    tracing::info!(lane = seat.lane, relays = candidates.len(), "the lane is another relay's share");
                    running.stop.cancel();
                }
                (None, true) if !by_other => self.take(seat.lane),
                (None, false) if !seat.held => self.borrow_if_left(seat, candidates.contains(&self.owner)),
                _ => {}
            }
        }
        if awaiting { LOOK_EVERY_AWAITING } else { LOOK_EVERY }
    }

    fn keeps_borrowed(&self, lane: i16) -> bool {
        self.borrowed.get(&lane).is_some_and(|until| Instant::now() < *until)
    }

    fn borrow_if_left(&mut self, seat: &Seat, able: bool) {
        let since = *self.free_since.entry(seat.lane).or_insert_with(Instant::now);
        if able && since.elapsed() >= BORROW_AFTER {
            tracing::warn!(lane = seat.lane, "the lane stays free though it is another relay's share: taking it");
            self.free_since.remove(&seat.lane);
            self.borrowed.insert(seat.lane, Instant::now() + BORROW_FOR);
            self.take(seat.lane);
        }
    }

    fn take(&mut self, number: i16) {
        if self.resting.get(&number).is_some_and(|resting| Instant::now() < resting.until) {
            return;
        }
        let stop = self.shutdown.child_token();
        let lane = Lane {
            lane: number,
            owner: self.owner,
            name: Arc::clone(&self.name),
            broker: Arc::clone(&self.broker),
            health: Arc::clone(&self.health),
            options: Arc::clone(&self.options),
            stop: stop.clone(),
            known: self.known.entry(number).or_default().clone(),
        };
        self.running.insert(number, Running { stop, since: Instant::now() });
        self.lanes.spawn(async move { (number, lane.run().await) });
    }

    fn lane_ended(&mut self, (lane, result): (i16, Result<(), RelayError>)) {
        let ran = self.running.remove(&lane).map_or(Duration::ZERO, |running| running.since.elapsed());
        match result {
            Ok(()) => {
                self.resting.remove(&lane);
            }
            Err(RelayError::Db(DbError::LeaseLost { .. })) => {
                tracing::warn!(lane, "another relay has taken the lane");
                self.resting.remove(&lane);
            }
            Err(RelayError::Db(error @ DbError::SourceReplaced { .. })) => {
                tracing::warn!(lane, %error, "the lane begins anew");
                self.resting.insert(lane, Resting { failures: 0, until: Instant::now() + SOURCE_DELAY });
            }
            Err(error) => {
                let before = self.resting.get(&lane).map_or(0, |resting| resting.failures);
                let failures = if ran > BACKOFF.cap { 1 } else { before + 1 };
                let delay = BACKOFF.jittered(failures);
                tracing::error!(lane, %error, ?delay, "the lane stopped; it begins anew");
                self.resting.insert(lane, Resting { failures, until: Instant::now() + delay });
            }
        }
    }

    /// A lane's own sessions tell whether the broker can be reached; without a lane somebody else must try.
    fn probe_broker(&mut self) {
        let due = self.probed_at.is_none_or(|at| at.elapsed() >= PROBE_EVERY);
        if self.health.ready() || !self.running.is_empty() || !self.probes.is_empty() || !due {
            return;
        }
        self.probed_at = Some(Instant::now());
        let (broker, options, health) = (Arc::clone(&self.broker), Arc::clone(&self.options), Arc::clone(&self.health));
        self.probes.spawn(async move {
            let session = broker.publisher(&options.exchange).await;
            health.note(session.is_ok());
            if let Ok(publisher) = session {
                publisher.close().await;
            }
        });
    }
}

/// Says that this relay lives, and looks at the others and the lanes.
struct Watch {
    owner: Uuid,
    name: Arc<str>,
    health: Arc<BrokerHealth>,
    options: Arc<RelayOptions>,
    pace: watch::Receiver<Duration>,
    views: mpsc::Sender<(Vec<Seat>, Vec<LiveRelay>)>,
}

impl Watch {
    async fn run(mut self, conn: PgConnection) {
        let mut conn = Some(conn);
        let mut told = None;
        let mut failures = 0;
        loop {
            let delay = match self.look(&mut conn, &mut told).await {
                Ok(view) => {
                    failures = 0;
                    if self.views.send(view).await.is_err() {
                        return;
                    }
                    *self.pace.borrow_and_update()
                }
                Err(error) => {
                    conn = None;
                    failures += 1;
                    let delay = BACKOFF.jittered(failures);
                    tracing::warn!(%error, ?delay, "the relays and lanes could not be looked at");
                    delay
                }
            };
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.views.closed() => return,
            }
        }
    }

    async fn look(
        &self,
        conn: &mut Option<PgConnection>,
        told: &mut Option<(bool, Instant)>,
    ) -> Result<(Vec<Seat>, Vec<LiveRelay>), DbError> {
        let conn = match conn {
            Some(conn) => conn,
            None => conn.insert(connect(&self.options).await?),
        };
        let ready = self.health.ready();
        if told.is_none_or(|(told, at)| told != ready || at.elapsed() >= relays::BEAT_EVERY) {
            relays::beat(conn, self.owner, &self.name, ready).await?;
            *told = Some((ready, Instant::now()));
        }
        relays::look(conn).await
    }
}

/// Host and pid: which process holds a lane, for operators.
pub(crate) fn process_name() -> String {
    let host =
        ["/proc/sys/kernel/hostname", "/etc/hostname"].iter().find_map(|path| std::fs::read_to_string(path).ok());
    let host = host.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_default();
    let host = if host.trim().is_empty() { "unknown host" } else { host.trim() };
    format!("{host} pid {}", std::process::id())
}
