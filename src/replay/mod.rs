//! Replay: retained messages are sent again, each under the id, headers, offset and ordinal it had.
//!
//! `outbox's log → `**`replay`**` → broker`, beside the relay and never ahead of it: only what the relay has settled is
//! sent. Consumers that have a message ignore the copy; one that is new, or lost its queue, catches up. Held, discarded
//! and expired messages are passed over. What of the asked range was not sent is told by stream and offset.
//!
//! `walk` reads the log, `pending` decides which message goes next, this file talks to the broker. Left out on purpose:
//! changing anything in the database, and resuming: a replay that ended early is simply run again.

mod pending;
mod spans;
mod walk;

pub use spans::{Span, Spans};

use crate::backoff::Backoff;
use crate::broker::{Broker, BrokerError, Outcome, Publisher};
use crate::db::{self, DbError};
use crate::message::{Envelope, MessageId};
use crate::outbox::{lease, void};
use crate::ranges::Ranges;
use pending::{Pending, Ticket};
use serde::Serialize;
use sqlx::PgConnection;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use walk::{Found as Read, Skip, Walk, Wanted};

/// Messages kept ready: enough that a few busy keys do not starve the broker.
const PENDING: usize = 1_000;
/// Messages without an outcome: as many as a lost session makes come twice.
const IN_FLIGHT: usize = 500;
/// Nacks after which a message is given up: with the delays between them about a minute.
const MAX_NACKS: u32 = 10;
/// Delay before a nacked message is sent again.
const NACK_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(200), cap: Duration::from_secs(10) };
/// Delay before a server is tried again.
const SERVER_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(200), cap: Duration::from_secs(5) };
/// How long a server may be away, or give no outcome, before the replay fails.
const PATIENCE: Duration = Duration::from_secs(120);
/// How late messages may be and still be made up for: timers are no finer.
const CATCH_UP: Duration = Duration::from_millis(20);
/// Longest sleep: how soon a blocked session is seen to be unblocked.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Longest statement: a page of a window with large bodies.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// The channel was closed because of a message: precondition failed, content too large.
const REFUSALS: [u16; 2] = [406, 311];

/// Which messages are meant.
#[derive(Debug, Clone)]
pub enum Selection {
    /// Offsets by stream, `topic#lane`. A range that ends at `i64::MAX` asks for all there is.
    Offsets {
        /// The source that counted them; none for the present one.
        source: Option<Uuid>,
        /// The offsets.
        streams: BTreeMap<String, Ranges>,
    },
    /// What was published at or after a time.
    Since {
        /// Seconds since the Unix epoch; the whole second counts.
        at_s: f64,
        /// One stream; none for all.
        stream: Option<String>,
    },
}

impl Selection {
    /// How many messages it asks for, if that can be told.
    pub fn count(&self) -> Option<u64> {
        match self {
            Self::Since { .. } => None,
            Self::Offsets { streams, .. } => {
                let open = streams.values().any(|ranges| ranges.last() == Some(i64::MAX));
                (!open).then(|| streams.values().map(Ranges::count).sum())
            }
        }
    }
}

/// How a replay runs.
#[derive(Debug, Clone)]
pub struct ReplayOptions {
    /// Where the outbox is.
    pub database_url: String,
    /// Topic exchange to publish to.
    pub exchange: String,
    /// What is sent.
    pub selection: Selection,
    /// Messages a second at most, repeated ones included.
    pub rate: u32,
    /// How long messages in flight are waited for when it is stopped.
    pub drain_deadline: Duration,
}

/// Why a replay failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The selection names no stream there can be.
    #[error("\"{0}\" is no stream of this outbox: it must be topic#lane, with a lane there is")]
    NoSuchStream(String),
    /// The database's side.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The broker's side.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// What became of the selection, so far or in the end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Summary {
    /// Messages the broker took responsibility for; without a broker, those that would be sent.
    pub sent: u64,
    /// Passed over: the relay holds them, waiting or parked.
    pub held: u64,
    /// Passed over: an operator discarded them.
    pub discarded: u64,
    /// Passed over: their time has passed.
    pub expired: u64,
    /// Returned by the broker: no queue is bound for them.
    pub unroutable: Spans,
    /// Nacked again and again, or refused for good.
    pub refused: Spans,
    /// No longer in the log.
    pub not_retained: Spans,
    /// Not settled by the relay yet, or never published.
    pub not_settled: Spans,
    /// Stopped before they were sent.
    pub not_reached: Spans,
    /// It was stopped.
    pub interrupted: bool,
}

impl Summary {
    /// Messages looked at.
    pub fn seen(&self) -> u64 {
        self.sent + self.held + self.discarded + self.expired + self.unroutable.count() + self.refused.count()
    }

    fn skip(&mut self, skip: Skip) {
        match skip {
            Skip::Held => self.held += 1,
            Skip::Discarded => self.discarded += 1,
            Skip::Expired => self.expired += 1,
        }
    }
}

/// A message of a selection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Found {
    /// `topic#lane`
    pub stream: String,
    /// Its place in it.
    pub offset: i64,
    /// Its id.
    pub message_id: MessageId,
    /// Its topic.
    pub topic: String,
    /// When it was published, seconds since the Unix epoch.
    pub published_at_s: u64,
}

/// Names the retained messages of a selection, also held, discarded and expired ones, at most `limit` of them; sends
/// nothing.
///
/// # Errors
/// The database's, and streams there cannot be.
pub async fn find(conn: &mut PgConnection, selection: &Selection, limit: usize) -> Result<Vec<Found>, ReplayError> {
    let mut found = Vec::new();
    for mut walk in walks(conn, selection).await? {
        while let Some(batch) = walk.next(conn).await? {
            for Read { envelope, .. } in batch {
                if found.len() == limit {
                    return Ok(found);
                }
                found.push(Found {
                    stream: envelope.position.stream,
                    offset: envelope.position.offset,
                    message_id: envelope.message.id,
                    topic: envelope.message.topic,
                    published_at_s: envelope.message.published_at_s,
                });
            }
        }
    }
    Ok(found)
}

/// Counts what [`run`] would do, without a broker.
///
/// # Errors
/// The database's, and streams there cannot be.
pub async fn count(
    database_url: &str,
    selection: &Selection,
    shutdown: &CancellationToken,
) -> Result<Summary, ReplayError> {
    let mut log = Log::open(database_url, selection).await?;
    let mut summary = Summary::default();
    while !shutdown.is_cancelled()
        && let Some(batch) = log.next(&mut summary, shutdown).await?
    {
        for read in batch {
            match read.skip {
                Some(skip) => summary.skip(skip),
                None => summary.sent += 1,
            }
        }
    }
    summary.interrupted = shutdown.is_cancelled();
    log.close().await;
    Ok(summary)
}

/// Sends the selection, and calls `progress` whenever something is done with. When `shutdown` is cancelled it sends no
/// more, waits for what is in flight within the drain deadline, and says what it did not come to.
///
/// # Errors
/// What no waiting can mend, and servers that stay away. What was sent before is no harm: it can be sent again.
pub async fn run<B: Broker>(
    broker: &B,
    options: &ReplayOptions,
    mut progress: impl FnMut(&Summary),
    shutdown: CancellationToken,
) -> Result<Summary, ReplayError> {
    let log = Log::open(&options.database_url, &options.selection).await?;
    let mut replay = Replay {
        log,
        pending: Pending::default(),
        suspects: BTreeSet::new(),
        pace: Pace::new(options.rate),
        summary: Summary::default(),
        more: true,
    };
    let (mut failures, mut heard) = (0, Instant::now());
    loop {
        replay.take_in(&shutdown).await?;
        if replay.is_done(&shutdown) {
            break;
        }
        let seen = replay.summary.seen();
        let error = match broker.publisher(&options.exchange).await {
            Ok(mut publisher) => match replay.session(&mut publisher, options, &mut progress, &shutdown).await {
                Ok(()) => {
                    publisher.close().await;
                    break;
                }
                Err(ReplayError::Broker(error)) => error,
                Err(error) => return Err(error),
            },
            Err(error) => error,
        };
        replay.after_session(&error);
        if replay.summary.seen() > seen {
            (failures, heard) = (0, Instant::now());
        }
        failures += 1;
        if !error.is_transient() || heard.elapsed() > PATIENCE {
            return Err(error.into());
        }
        let delay = SERVER_BACKOFF.jittered(failures);
        tracing::warn!(%error, ?delay, "no session with the broker");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = shutdown.cancelled() => {}
        }
    }
    let summary = replay.end(&shutdown).await;
    progress(&summary);
    Ok(summary)
}

struct Replay {
    log: Log,
    pending: Pending,
    /// One of these may have made the broker close the channel: they are sent alone.
    suspects: BTreeSet<Ticket>,
    pace: Pace,
    summary: Summary,
    /// The log has more.
    more: bool,
}

impl Replay {
    fn is_done(&self, shutdown: &CancellationToken) -> bool {
        self.pending.in_flight() == 0 && (shutdown.is_cancelled() || (!self.more && self.pending.len() == 0))
    }

    async fn take_in(&mut self, shutdown: &CancellationToken) -> Result<(), ReplayError> {
        while self.more && self.pending.len() < PENDING && !shutdown.is_cancelled() {
            let Some(batch) = self.log.next(&mut self.summary, shutdown).await? else {
                self.more = false;
                return Ok(());
            };
            for Read { envelope, expires, skip } in batch {
                match skip {
                    Some(skip) => {
                        self.summary.skip(skip);
                        self.log.announce(&envelope, skip).await?;
                    }
                    None => self.pending.push(envelope, expires),
                }
            }
        }
        Ok(())
    }

    /// Sends until all is done or the session fails.
    async fn session<P: Publisher>(
        &mut self,
        publisher: &mut P,
        options: &ReplayOptions,
        progress: &mut impl FnMut(&Summary),
        shutdown: &CancellationToken,
    ) -> Result<(), ReplayError> {
        let mut outcomes = Vec::new();
        let mut deadline = None;
        loop {
            self.take_in(shutdown).await?;
            if self.is_done(shutdown) {
                return Ok(());
            }
            if shutdown.is_cancelled() {
                let end = *deadline.get_or_insert_with(|| Instant::now() + options.drain_deadline);
                if Instant::now() >= end {
                    return Ok(());
                }
            } else if !publisher.is_blocked() {
                self.send(publisher).await?;
            }
            let now = Instant::now();
            let mut wake = now + LOOK_EVERY;
            let may_send = !publisher.is_blocked() && !shutdown.is_cancelled() && self.pending.in_flight() < IN_FLIGHT;
            if may_send && self.pending.is_ready() {
                wake = wake.min(self.pace.next_at.max(now + Duration::from_millis(1)));
            }
            wake = wake.min(self.pending.next_due().unwrap_or(wake));
            tokio::select! {
                result = publisher.outcomes(&mut outcomes) => {
                    result?;
                    self.settle(&mut outcomes);
                    progress(&self.summary);
                }
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
    }

    async fn send<P: Publisher>(&mut self, publisher: &mut P) -> Result<(), BrokerError> {
        while publisher.capacity() > 0
            && self.pending.in_flight() < IN_FLIGHT
            && (self.suspects.is_empty() || self.pending.in_flight() == 0)
        {
            let now = Instant::now();
            if self.pace.next_at > now {
                break;
            }
            let Some(ticket) = self.pending.next(now) else { break };
            let item = self.pending.get(ticket);
            if item.expires.is_some_and(|at| at <= now) {
                self.suspects.remove(&ticket);
                self.pending.done(ticket);
                self.summary.skip(Skip::Expired);
                continue;
            }
            self.pace.sent(now);
            publisher.publish(ticket, &item.envelope).await?;
        }
        Ok(())
    }

    fn settle(&mut self, outcomes: &mut Vec<(Ticket, Outcome)>) {
        for (ticket, outcome) in outcomes.drain(..) {
            self.suspects.remove(&ticket);
            let failed = match outcome {
                Outcome::Nacked => {
                    let nacks = self.pending.nacked(ticket);
                    if nacks < MAX_NACKS {
                        self.pending.again(ticket, Instant::now() + NACK_BACKOFF.jittered(nacks));
                        continue;
                    }
                    Some(&mut self.summary.refused)
                }
                Outcome::Returned { .. } => Some(&mut self.summary.unroutable),
                Outcome::Confirmed => None,
            };
            match (self.pending.done(ticket), failed) {
                (Some(item), Some(spans)) => {
                    let at = &item.envelope.position;
                    spans.add_one(&at.stream, at.offset);
                }
                (Some(_), None) => self.summary.sent += 1,
                (None, _) => {}
            }
        }
    }

    /// Everything in flight is unsent again. A message that was alone when the broker closed the channel because of it
    /// is given up; of several, each is sent alone.
    fn after_session(&mut self, error: &BrokerError) {
        let unsent = self.pending.unsend();
        if !matches!(error, BrokerError::ChannelClosed { code, .. } if REFUSALS.contains(code)) {
            return;
        }
        let alone = unsent.first().copied().filter(|_| unsent.len() == 1);
        self.suspects.extend(unsent);
        if let Some(ticket) = alone {
            self.suspects.remove(&ticket);
            if let Some(item) = self.pending.done(ticket) {
                let at = &item.envelope.position;
                tracing::error!(stream = at.stream, offset = at.offset, %error, "the broker refuses a message");
                self.summary.refused.add_one(&at.stream, at.offset);
            }
        }
    }

    async fn end(mut self, shutdown: &CancellationToken) -> Summary {
        let unfinished = self.more || self.pending.len() > 0;
        self.summary.interrupted = shutdown.is_cancelled() && unfinished;
        if self.summary.interrupted {
            for item in self.pending.iter() {
                let at = &item.envelope.position;
                self.summary.not_reached.add_one(&at.stream, at.offset);
            }
            self.log.not_reached(&mut self.summary.not_reached);
        }
        self.log.close().await;
        self.summary
    }
}

/// When the next message may be sent.
struct Pace {
    interval: Duration,
    next_at: Instant,
}

impl Pace {
    fn new(rate: u32) -> Self {
        Self { interval: Duration::from_secs(1) / rate.max(1), next_at: Instant::now() }
    }

    fn sent(&mut self, now: Instant) {
        let late = now.checked_sub(CATCH_UP).unwrap_or(now);
        self.next_at = self.next_at.max(late) + self.interval;
    }
}

/// The lanes' walks, one after the other, over failures of the database.
struct Log {
    database_url: String,
    conn: Option<PgConnection>,
    walks: VecDeque<Walk>,
}

impl Log {
    /// What is passed over for good leaves no gap in the streams of those who catch up.
    async fn announce(&mut self, envelope: &Envelope, skip: Skip) -> Result<(), DbError> {
        match &mut self.conn {
            Some(conn) => void::announce(conn, envelope, skip == Skip::Expired).await,
            None => Ok(()),
        }
    }

    async fn open(database_url: &str, selection: &Selection) -> Result<Self, ReplayError> {
        let mut conn = connect(database_url).await?;
        let walks = walks(&mut conn, selection).await?;
        Ok(Self { database_url: database_url.to_owned(), conn: Some(conn), walks: walks.into() })
    }

    /// The next messages; none for the moment if it is stopped while the database is away.
    async fn next(
        &mut self,
        summary: &mut Summary,
        shutdown: &CancellationToken,
    ) -> Result<Option<Vec<Read>>, ReplayError> {
        let (mut failures, began) = (0, Instant::now());
        while let Some(walk) = self.walks.front_mut() {
            let attempt = async {
                let conn = match &mut self.conn {
                    Some(conn) => conn,
                    None => self.conn.insert(connect(&self.database_url).await?),
                };
                walk.next(conn).await
            };
            match attempt.await {
                Ok(Some(batch)) => return Ok(Some(batch)),
                Ok(None) => {
                    for (into, spans) in
                        [(&mut summary.not_retained, &walk.missing), (&mut summary.not_settled, &walk.beyond())]
                    {
                        for (stream, from, to) in spans.iter() {
                            into.add(stream, from, to);
                        }
                    }
                    self.walks.pop_front();
                }
                Err(error) if error.is_transient() && began.elapsed() < PATIENCE => {
                    self.conn = None;
                    failures += 1;
                    let delay = SERVER_BACKOFF.jittered(failures);
                    tracing::warn!(%error, ?delay, "the database is away");
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = shutdown.cancelled() => return Ok(Some(Vec::new())),
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    fn not_reached(&self, into: &mut Spans) {
        for walk in &self.walks {
            for (stream, from, to) in walk.remaining().iter() {
                into.add(stream, from, to);
            }
        }
    }

    async fn close(self) {
        if let Some(conn) = self.conn {
            db::close(conn).await;
        }
    }
}

/// A session after whose fence everything it sees is as durable as Postgres was asked to make it.
async fn connect(url: &str) -> Result<PgConnection, DbError> {
    let session = db::SessionOptions {
        application_name: "oncebox replay",
        statement_timeout: STATEMENT_TIMEOUT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: true,
    };
    let mut conn = db::connect(url, session).await?;
    db::fenced(db::bounded("a fence", STATEMENT_TIMEOUT, db::mark(&mut conn))).await?;
    Ok(conn)
}

/// One walk for each lane that the selection touches, in the order of the lanes.
async fn walks(conn: &mut PgConnection, selection: &Selection) -> Result<Vec<Walk>, ReplayError> {
    let no_stream = |stream: &str| ReplayError::NoSuchStream(stream.to_owned());
    let mut wanted: BTreeMap<i16, (Option<&str>, Wanted)> = BTreeMap::new();
    let source = match selection {
        Selection::Since { at_s, stream } => {
            let lanes = match stream {
                Some(stream) => vec![lane_of(stream).ok_or_else(|| no_stream(stream))?],
                None => lease::lanes(conn).await?,
            };
            for lane in lanes {
                let since = Wanted::Since { at_s: *at_s, stream: stream.clone() };
                wanted.insert(lane, (stream.as_deref(), since));
            }
            None
        }
        Selection::Offsets { source, streams } => {
            let mut lanes: BTreeMap<i16, BTreeMap<String, Ranges>> = BTreeMap::new();
            for (stream, ranges) in streams {
                let lane = lane_of(stream).ok_or_else(|| no_stream(stream))?;
                lanes.entry(lane).or_default().insert(stream.clone(), ranges.clone());
            }
            for (lane, of_lane) in lanes {
                let example = streams.keys().find(|stream| of_lane.contains_key(*stream)).map(String::as_str);
                wanted.insert(lane, (example, Wanted::Offsets(of_lane)));
            }
            *source
        }
    };
    let mut walks = Vec::new();
    for (lane, (stream, wanted)) in wanted {
        let walk = Walk::begin(conn, lane, source, wanted).await?;
        walks.push(walk.ok_or_else(|| no_stream(stream.unwrap_or_default()))?);
    }
    Ok(walks)
}

fn lane_of(stream: &str) -> Option<i16> {
    let (topic, lane) = stream.rsplit_once('#')?;
    lane.parse().ok().filter(|lane| *lane >= 0 && !topic.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: over any stretch no more goes out than the rate allows, but for what timers may be late.
    #[test]
    fn the_pace_is_kept() {
        let mut pace = Pace::new(1_000);
        let start = pace.next_at;
        let (mut now, mut sent) = (start, 0u32);
        // Timers that fire late, and once very late.
        for late_us in (0..400).map(|i| if i == 200 { 500_000 } else { (i * 37) % 3_000 }) {
            now = now.max(pace.next_at) + Duration::from_micros(late_us);
            while pace.next_at <= now {
                pace.sent(now);
                sent += 1;
            }
            let allowed = (now - start).as_secs_f64() * 1_000.0 + 1.0;
            assert!(f64::from(sent) <= allowed, "{sent} after {:?}", now - start);
        }
        assert!(f64::from(sent) > (now - start).as_secs_f64() * 1_000.0 - 520.0, "{sent} in {:?}", now - start);
    }

    /// Goal: a stream names its lane.
    #[test]
    fn streams_name_their_lanes() {
        for (stream, lane) in [("order.placed#0", Some(0)), ("a#b#12", Some(12)), ("*#0", Some(0)), ("#0", None)] {
            assert_eq!(lane_of(stream), lane, "{stream}");
        }
        for stream in ["order.placed", "a#", "a#-1", "a#x", ""] {
            assert_eq!(lane_of(stream), None, "{stream}");
        }
    }
}
