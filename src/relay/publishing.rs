//! Publishes a lane's messages in order of their keys and settles what becomes of each.
//!
//! One task owns the publisher and every decision about an outcome. A session with the broker that fails is
//! replaced, and what had no outcome is sent again; a message that made the broker close the channel is found by
//! sending the suspects one at a time.

use super::lookahead::{Lookahead, Ticket};
use super::pauses::Pauses;
use super::reader::Page;
use super::{BrokerHealth, RelayError, RelayOptions};
use crate::backoff::Backoff;
use crate::broker::{Broker, BrokerError, Outcome, Publisher};
use crate::db::DbError;
use crate::failpoints;
use crate::message::{Position, Void};
use crate::outbox::held::{self, Due, Reason};
use crate::outbox::journal::LogPlace;
use crate::outbox::lease::Lease;
use crate::outbox::{pause, unroutable, void};
use futures_util::FutureExt;
use sqlx::PgConnection;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Messages read ahead of the first unsettled one: enough that a few busy keys do not starve the broker.
const LOOK_AHEAD: usize = 10_000;
/// Bytes of bodies kept in it.
const LOOK_AHEAD_BYTES: usize = 64 << 20;
/// How often held messages are looked at while some wait, and how often when none is known to (an operator may have
/// set one to waiting).
const HELD_EVERY: Duration = Duration::from_millis(100);
const HELD_IDLE_EVERY: Duration = Duration::from_secs(1);
/// How often room for what is ready to be sent is looked for: it may come back without an outcome.
const ROOM_EVERY: Duration = Duration::from_millis(10);
/// Held messages sent at a time.
const HELD_BATCH: i64 = 500;
/// Tickets of held messages have this bit, which no ordinal of the log reaches.
const HELD_TICKET: Ticket = 1 << 63;
/// Tickets of void notices have this bit, which none of the others reaches.
const VOID_TICKET: Ticket = 1 << 62;
/// Void notices in flight.
const VOID_BATCH: i64 = 500;
/// Delay before a nacked message is sent again.
const NACK_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(200), cap: Duration::from_secs(10) };
/// Delay before a new session with the broker.
const SESSION_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(200), cap: Duration::from_secs(2) };
/// The channel was closed because of a message, not of the broker's state: precondition failed, content too large.
const REFUSALS: [u16; 2] = [406, 311];

pub(crate) struct Publishing<'a, B> {
    pub broker: &'a B,
    pub health: &'a BrokerHealth,
    pub options: &'a RelayOptions,
    pub conn: PgConnection,
    pub lease: watch::Receiver<Lease>,
    pub pages: mpsc::Receiver<Page>,
    pub settled: watch::Sender<LogPlace>,
    /// Cancelled: take no more from the log, wait for what is in flight, end.
    pub drain: CancellationToken,
    /// Places that are held already.
    pub already_held: HashSet<LogPlace>,
    pub lookahead: Lookahead,
    /// Held messages that wait, as of the last look.
    pub waiting: i64,
    /// What must not be sent for now.
    pub pauses: Pauses,
}

/// What one lane's publishing keeps between sessions.
#[derive(Default)]
struct Held {
    in_flight: HashMap<Ticket, Due>,
    next_ticket: Ticket,
    next_look: Option<Instant>,
    /// When the waiting ones and their keys were counted.
    counted_at: Option<Instant>,
    /// How many of them wait for another attempt.
    nacked: i64,
    /// One of these, by sequence number, may have made the broker close the channel.
    suspects: HashSet<i64>,
    /// When topics that no queue was bound for were tried again, or the lane was taken.
    probed_at: Option<Instant>,
    voids: HashMap<Ticket, Void>,
}

impl<B: Broker> Publishing<'_, B> {
    /// Publishes until drained; the messages still unsettled then are left to the next relay.
    pub async fn run(mut self) -> Result<(), RelayError> {
        let mut held = Held { next_ticket: HELD_TICKET, probed_at: Some(Instant::now()), ..Held::default() };
        let mut suspects = BTreeSet::new();
        let mut failures = 0;
        loop {
            if self.drain.is_cancelled() {
                return Ok(());
            }
            let session = self.broker.publisher(&self.options.exchange).await;
            self.health.note(session.is_ok());
            let error = match session {
                Ok(mut publisher) => {
                    let before = (self.lookahead.settled(), Instant::now());
                    match self.session(&mut publisher, &mut held, &mut suspects).await {
                        Ok(()) => {
                            publisher.close().await;
                            return Ok(());
                        }
                        Err(RelayError::Broker(error)) => {
                            if self.lookahead.settled() > before.0 || before.1.elapsed() > SESSION_BACKOFF.cap {
                                failures = 0;
                            }
                            self.after_session(&error, &mut held, &mut suspects).await?;
                            error
                        }
                        Err(error) => return Err(error),
                    }
                }
                Err(error) => error,
            };
            failures += 1;
            let delay = SESSION_BACKOFF.jittered(failures);
            if error.is_transient() {
                tracing::warn!(%error, ?delay, "no session with the broker");
            } else {
                tracing::error!(%error, ?delay, "no session with the broker until this is mended");
            }
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.drain.cancelled() => {}
            }
        }
    }

    /// Everything in flight is unsent again. If it was one message alone that made the broker close the channel,
    /// it is parked; if it was one of several, they become suspects.
    async fn after_session(
        &mut self,
        error: &BrokerError,
        held: &mut Held,
        suspects: &mut BTreeSet<Ticket>,
    ) -> Result<(), RelayError> {
        let refused = match error {
            BrokerError::ChannelClosed { code, .. } if REFUSALS.contains(code) => Some(error.to_string()),
            _ => None,
        };
        let held_in_flight: Vec<Due> = held.in_flight.drain().map(|(_, due)| due).collect();
        if let Some(text) = refused {
            match (self.lookahead.in_flight().as_slice(), held_in_flight.as_slice()) {
                ([alone], []) => {
                    tracing::error!(error = text, "the broker refuses a message: parked");
                    suspects.remove(alone);
                    self.lookahead.take_out(*alone, Reason::Refused(text));
                }
                ([], [alone]) => {
                    let lease = *self.lease.borrow();
                    held.suspects.remove(&alone.seq);
                    held::record(&mut self.conn, lease.lane, lease.epoch, alone.seq, &Reason::Refused(text)).await?;
                }
                (several, held_too) => {
                    suspects.extend(several);
                    held.suspects.extend(held_too.iter().map(|due| due.seq));
                }
            }
        }
        held.voids.clear();
        self.lookahead.unsend();
        // Before the pauses are read again: what is held for one that has ended by then is released by that look.
        Ok(self.write_leaving(held).await?)
    }

    async fn session(
        &mut self,
        publisher: &mut B::Publisher,
        held: &mut Held,
        suspects: &mut BTreeSet<Ticket>,
    ) -> Result<(), RelayError> {
        let mut outcomes = Vec::new();
        let mut blocked = false;
        let mut open = true;
        loop {
            if publisher.is_blocked() != blocked {
                blocked = publisher.is_blocked();
                tracing::warn!(
                    blocked,
                    lane = self.lease.borrow().lane,
                    "the broker changed its mind about publishers"
                );
            }
            if self.pauses.next_read() <= Instant::now() && !self.drain.is_cancelled() {
                self.heed_pauses(held).await?;
            }
            let sent = !blocked && self.may_publish() && self.send(publisher, held, suspects).await?;
            if sent {
                // It is on its way before the statements that follow, however long they take.
                if let Some(told) = publisher.outcomes(&mut outcomes).now_or_never() {
                    told?;
                    self.settle(&mut outcomes, held, suspects).await?;
                }
                failpoints::pass("relay.published");
            }
            self.write_leaving(held).await?;
            self.settled.send_if_modified(|place| {
                let newer = self.lookahead.settled() > *place;
                *place = self.lookahead.settled().max(*place);
                newer
            });
            if self.drain.is_cancelled() && publisher.unconfirmed() == 0 {
                return Ok(());
            }

            let room = self.lookahead.len() < LOOK_AHEAD
                && self.lookahead.bytes() < LOOK_AHEAD_BYTES
                && self.waiting < held::MAX_WAITING;
            let look = held.next_look.unwrap_or_else(Instant::now);
            let unsent = !blocked && self.lookahead.has_ready() && self.may_publish();
            // Room came with what was written, or a turn with what was told.
            let more = unsent && sent && publisher.capacity() > 0;
            tokio::select! {
                // Also with nothing unconfirmed: it keeps the session alive, and hears of alarms and of its end.
                result = publisher.outcomes(&mut outcomes) => {
                    result?;
                    self.settle(&mut outcomes, held, suspects).await?;
                }
                () = tokio::task::yield_now(), if more => {}
                () = tokio::time::sleep(ROOM_EVERY), if unsent && publisher.capacity() == 0 => {}
                page = self.pages.recv(), if open && room && !self.drain.is_cancelled() => match page {
                    Some(page) => self.take_in(page),
                    None => open = false,
                },
                () = tokio::time::sleep_until(look.into()), if !self.drain.is_cancelled() => {
                    if blocked || !suspects.is_empty() || !self.may_publish() {
                        held.next_look = Some(Instant::now() + HELD_EVERY);
                    } else {
                        self.send_held(publisher, held).await?;
                    }
                }
                () = tokio::time::sleep_until(self.pauses.next_read().into()), if !self.drain.is_cancelled() => {}
                () = self.drain.cancelled(), if !self.drain.is_cancelled() => {}
            }
        }
    }

    /// The lease must outlive the moment of sending by this process's own clock, and nobody have paused the lane.
    fn may_publish(&self) -> bool {
        !self.drain.is_cancelled() && !self.pauses.lane_paused() && self.lease_is_good()
    }

    fn lease_is_good(&self) -> bool {
        Instant::now() < self.lease.borrow().valid_until
    }

    /// Reads the pauses again; what one that has ended held back is due at once.
    async fn heed_pauses(&mut self, held: &mut Held) -> Result<(), DbError> {
        let lease = *self.lease.borrow();
        if self.pauses.refresh(&mut self.conn, lease).await? {
            held.next_look = None;
        }
        Ok(())
    }

    fn take_in(&mut self, page: Page) {
        for item in page.items {
            if self.already_held.remove(&item.place) {
                self.lookahead.push_settled(item.place);
            } else {
                self.lookahead.push(item);
            }
        }
        if let Some(end) = page.end {
            self.lookahead.push_settled(end);
        }
    }

    /// Sends what has its turn, as far as there is room; answers whether anything was.
    async fn send(
        &mut self,
        publisher: &mut B::Publisher,
        held: &Held,
        suspects: &mut BTreeSet<Ticket>,
    ) -> Result<bool, RelayError> {
        let mut sent = false;
        // Suspects come first, alone, and so does whatever else has its turn until the last of them is settled; then
        // the held ones among them.
        let held_first = suspects.is_empty() && !held.suspects.is_empty();
        // The clock is looked at before each message: the process may be frozen between any two of them.
        let valid_until = self.lease.borrow().valid_until;
        while publisher.capacity() > 0
            && !held_first
            && (suspects.is_empty() || publisher.unconfirmed() == 0)
            && Instant::now() < valid_until
        {
            let Some(ticket) = self.lookahead.next() else { break };
            let item = self.lookahead.item(ticket);
            if self.pauses.topic_paused(&item.envelope.message.topic) {
                suspects.remove(&ticket);
                self.lookahead.take_out(ticket, Reason::Paused);
                continue;
            }
            if item.expires.is_some_and(|at| at <= Instant::now()) {
                suspects.remove(&ticket);
                self.lookahead.take_out(ticket, Reason::Expired);
                continue;
            }
            publisher.publish(ticket, &item.envelope).await?;
            sent = true;
        }
        Ok(sent)
    }

    async fn settle(
        &mut self,
        outcomes: &mut Vec<(Ticket, Outcome)>,
        held: &mut Held,
        suspects: &mut BTreeSet<Ticket>,
    ) -> Result<(), RelayError> {
        let lease = *self.lease.borrow();
        let mut released = Vec::new();
        let mut routable = BTreeSet::new();
        let mut announced = Vec::new();
        for (ticket, outcome) in outcomes.drain(..) {
            if let Some(void) = held.voids.remove(&ticket) {
                // Otherwise it is sent again at the next look.
                announced.extend(Some(void).filter(|_| outcome == Outcome::Confirmed));
                continue;
            }
            suspects.remove(&ticket);
            let attempt = held.in_flight.get(&ticket).map_or(1, |due| due.attempts + 1);
            let reason = match outcome {
                Outcome::Confirmed => None,
                Outcome::Nacked => Some(Reason::Nacked { retry_in: NACK_BACKOFF.jittered(attempt) }),
                Outcome::Returned { code, text } => Some(Reason::Unroutable(format!("{code} {text}"))),
            };
            if matches!(reason, Some(Reason::Nacked { .. })) {
                held.nacked += 1;
            }
            let of_held = held.in_flight.remove(&ticket);
            if let Some(due) = &of_held {
                held.suspects.remove(&due.seq);
            }
            match (of_held, reason) {
                (None, None) => self.lookahead.confirm(ticket),
                (None, Some(reason)) => self.lookahead.take_out(ticket, reason),
                (Some(due), None) => {
                    released.push(due.seq);
                    if due.was_unroutable && self.options.unroutable_probe.is_some() {
                        routable.insert(due.envelope.message.topic);
                    }
                }
                (Some(due), Some(reason)) => {
                    held::record(&mut self.conn, lease.lane, lease.epoch, due.seq, &reason).await?;
                    held.next_look = held.next_look.map(|look| look.min(Instant::now() + HELD_EVERY));
                }
            }
        }
        if !announced.is_empty() {
            void::sent(&mut self.conn, lease.lane, lease.epoch, &announced).await?;
        }
        if !released.is_empty() {
            held::release(&mut self.conn, lease.lane, lease.epoch, &released).await?;
            for topic in routable {
                let next = unroutable::release_next(&mut self.conn, lease.lane, lease.epoch, &topic).await?;
                self.waiting += next as i64;
                if next > 0 {
                    tracing::info!(topic, messages = next, "a queue is bound now: unroutable messages are released");
                }
            }
            // The next of their keys may go at once.
            held.next_look = None;
        }
        failpoints::pass("relay.confirmed");
        Ok(())
    }

    /// Writes what left the log's order to the held messages; only then may the log settle past it.
    async fn write_leaving(&mut self, held: &mut Held) -> Result<(), DbError> {
        if self.lookahead.leaving().len() == 0 {
            return Ok(());
        }
        let lease = *self.lease.borrow();
        let leaving: Vec<_> =
            self.lookahead.leaving().map(|(item, reason)| (item.place, &item.envelope, reason)).collect();
        for (place, envelope, reason) in leaving.iter().filter(|(.., reason)| !reason.waits()) {
            let Position { stream, offset, .. } = &envelope.position;
            tracing::warn!(stream, offset, seq = place.seq, ?reason, "parked");
        }
        let waits = leaving.iter().filter(|(.., reason)| reason.waits()).count();
        let voids = leaving.iter().any(|(.., reason)| matches!(reason, Reason::Expired | Reason::Refused(_)));
        held::hold(&mut self.conn, lease.lane, lease.epoch, &leaving).await?;
        failpoints::pass("relay.held");
        self.lookahead.left();
        if waits > 0 || voids {
            self.waiting += waits as i64;
            held.next_look = held.next_look.map(|look| look.min(Instant::now() + HELD_EVERY));
        }
        Ok(())
    }

    /// Sends the held messages whose turn has come, and forgets keys of which none is held any more.
    async fn send_held(&mut self, publisher: &mut B::Publisher, held: &mut Held) -> Result<(), RelayError> {
        let lease = *self.lease.borrow();
        self.write_leaving(held).await?;
        self.probe_unroutable(held).await?;
        // Counting walks all of them: not after each one that was sent.
        if held.counted_at.is_none_or(|at| at.elapsed() >= HELD_EVERY) {
            let waiting = held::waiting(&mut self.conn, lease.lane).await?;
            held.counted_at = Some(Instant::now());
            self.waiting = waiting.count;
            held.nacked = waiting.nacked;
            self.lookahead.keep_held_keys(waiting.keys);
        }
        let sent: Vec<i64> = held.in_flight.values().map(|due| due.seq).collect();
        let room = match held.suspects.is_empty() {
            true => HELD_BATCH.min(publisher.capacity() as i64),
            false => i64::from(publisher.unconfirmed() == 0),
        };
        let due = if self.waiting == 0 || room == 0 {
            Vec::new()
        } else {
            held::due(&mut self.conn, lease.lane, &sent, room).await?
        };
        // Those of paused topics wait for a word, not for a moment: nothing comes due by itself but nacked ones.
        let hurry = self.waiting > 0 && (held.nacked > 0 || room == 0 || !due.is_empty() || !held.suspects.is_empty());
        if due.is_empty() && publisher.unconfirmed() == 0 {
            // They wait for their time or were taken care of: the log must not wait for them.
            held.suspects.clear();
        }
        let (paused, due): (Vec<Due>, Vec<Due>) =
            due.into_iter().partition(|due| self.pauses.topic_paused(&due.envelope.message.topic));
        if !paused.is_empty() {
            let seqs: Vec<i64> = paused.iter().map(|due| due.seq).collect();
            pause::hold_paused(&mut self.conn, lease.lane, lease.epoch, &seqs).await?;
        }
        for due in due {
            if due.expired {
                held::record(&mut self.conn, lease.lane, lease.epoch, due.seq, &Reason::Expired).await?;
                continue;
            }
            // Large ones fill the room before there are so many. The rest is due at the next look.
            if publisher.capacity() == 0 || !self.lease_is_good() {
                break;
            }
            let ticket = held.next_ticket;
            held.next_ticket += 1;
            // In flight before it is sent: the broker may close the channel because of it while it is.
            let envelope = due.envelope.clone();
            held.in_flight.insert(ticket, due);
            publisher.publish(ticket, &envelope).await?;
        }
        let voids = self.send_voids(publisher, held).await?;
        let soon = hurry || voids;
        held.next_look = Some(Instant::now() + if soon { HELD_EVERY } else { HELD_IDLE_EVERY });
        Ok(())
    }

    /// Sets one message of each of a few topics that no queue was bound for to waiting, at a bounded rate; its
    /// confirm releases the others.
    async fn probe_unroutable(&mut self, held: &mut Held) -> Result<(), DbError> {
        let Some(every) = self.options.unroutable_probe else { return Ok(()) };
        if held.probed_at.is_some_and(|at| at.elapsed() < every) {
            return Ok(());
        }
        let lease = *self.lease.borrow();
        held.probed_at = Some(Instant::now());
        if unroutable::probe(&mut self.conn, lease.lane, lease.epoch).await? > 0 {
            // They are due now, and later ones of their keys wait for them.
            held.counted_at = None;
        }
        Ok(())
    }

    /// Announces offsets that will not come, a batch at a time; answers whether some are in flight or still due.
    async fn send_voids(&mut self, publisher: &mut B::Publisher, held: &mut Held) -> Result<bool, RelayError> {
        let room = VOID_BATCH.min(publisher.capacity() as i64);
        if !held.voids.is_empty() || !held.suspects.is_empty() || room == 0 {
            return Ok(!held.voids.is_empty());
        }
        let lease = *self.lease.borrow();
        let voids = void::unsent(&mut self.conn, lease.lane, room).await?;
        let some = !voids.is_empty();
        if some {
            failpoints::pass("relay.voids_read");
        }
        for (ticket, void) in (VOID_TICKET..).zip(voids) {
            if publisher.capacity() == 0 || !self.lease_is_good() {
                break;
            }
            publisher.publish_void(ticket, &void).await?;
            held.voids.insert(ticket, void);
        }
        Ok(some)
    }
}
