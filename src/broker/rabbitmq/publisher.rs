//! The publishing session: one channel, whose order RabbitMQ keeps, and the clock that bounds the wait for it.
//!
//! No task and no timer per message: the one who calls drives everything, and lapin's thread does the I/O.

use super::flight::Flight;
use super::session::{self, Session};
use super::{RabbitMq, short, wire};
use crate::broker::{BrokerError, Outcome, Publisher};
use crate::message::Envelope;
use futures_util::Stream;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{Channel, ConnectionState, Error, ErrorKind, Event, PublisherConfirm};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// A queue that is slow to confirm may fall behind the others by this many times the messages in flight.
const SPAN_FACTOR: usize = 4;

/// Messages handed to lapin ahead of the socket. Waiting for each write costs two thread switches a message.
const WRITE_AHEAD: usize = 256;

/// Bytes handed to lapin ahead of the socket, for large messages.
const WRITE_AHEAD_BYTES: usize = 1024 * 1024;

/// Bytes that may lie in memory while the broker blocks the connection.
const BLOCKED_LIMIT_BYTES: usize = 16 * 1024 * 1024;

/// How often a session looks whether its time is up or its connection gone; a quarter of a shorter timeout.
const TICK: Duration = Duration::from_secs(1);

/// How long the reason of a closed channel may lag behind the fact.
const REASON_LIMIT: Duration = Duration::from_millis(500);

/// A publishing session on RabbitMQ.
///
/// Dropping it ends its connection: in order if the broker answers, by force after two seconds.
pub struct RabbitPublisher {
    // Before the session: the channel, which writes share, keeps lapin's connection open.
    writes: VecDeque<Write>,
    channel: Arc<Channel>,
    flight: Flight<PublisherConfirm>,
    events: Pin<Box<dyn Stream<Item = Event> + Send>>,
    session: Session,
    exchange: ShortString,
    max_unconfirmed: usize,
    confirm_timeout: Duration,
    unwritten_bytes: usize,
    /// Waits are counted from here at the earliest: the last moment the broker had the session blocked.
    clock_starts_at: Instant,
    timer: Pin<Box<Sleep>>,
    /// A channel or connection found closed, and until when its reason is waited for.
    ending: Option<Error>,
    reason_until: Option<Instant>,
    failed: Option<BrokerError>,
}

/// A message on its way to the socket.
struct Write {
    number: u64,
    bytes: usize,
    writing: Pin<Box<dyn Future<Output = Result<PublisherConfirm, Error>> + Send>>,
    written: Option<Result<PublisherConfirm, Error>>,
}

impl Write {
    fn is_done(&mut self, cx: &mut Context<'_>) -> bool {
        if self.written.is_none()
            && let Poll::Ready(result) = self.writing.as_mut().poll(cx)
        {
            self.written = Some(result);
        }
        self.written.is_some()
    }
}

impl RabbitPublisher {
    pub(super) async fn open(broker: &RabbitMq, exchange: &str) -> Result<Self, BrokerError> {
        let session = Session::open(broker).await?;
        let events = Box::pin(session.connection().events_listener());
        let channel = session.connection().create_channel().await.map_err(|error| session::lost(&error))?;
        session::declare_exchange(broker, &channel, exchange).await?;
        let confirm = channel.confirm_select(ConfirmSelectOptions::default());
        confirm.await.map_err(|error| session::lost(&error))?;
        Ok(Self {
            writes: VecDeque::new(),
            channel: Arc::new(channel),
            flight: Flight::new(),
            events,
            session,
            exchange: short("exchange", exchange)?,
            max_unconfirmed: broker.options.max_unconfirmed.max(1),
            confirm_timeout: broker.options.confirm_timeout,
            unwritten_bytes: 0,
            clock_starts_at: Instant::now(),
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            ending: None,
            reason_until: None,
            failed: None,
        })
    }

    fn fail(&mut self, error: BrokerError) -> BrokerError {
        self.failed.insert(error).clone()
    }

    /// Ends the session for `error`, or for the broker's own words behind it: messages queued on a channel that
    /// was closed take the connection with them, and then the other channels tell of that alone. A closed
    /// channel shows a moment before its reason does.
    fn fail_for(&mut self, error: Error, cx: &mut Context<'_>) -> Poll<Result<(), BrokerError>> {
        if let Some(error) = &self.failed {
            return Poll::Ready(Err(error.clone()));
        }
        let reason = match error.is_amqp_soft_error() {
            true => Some(error.clone()),
            false => self.poll_reason(cx),
        };
        let state = matches!(error.kind(), ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_));
        let until = *self.reason_until.get_or_insert_with(|| Instant::now() + REASON_LIMIT);
        if reason.is_none() && state && Instant::now() < until {
            self.ending = Some(error.clone());
            self.timer.as_mut().reset(until);
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        Poll::Ready(Err(self.fail(session::lost(reason.as_ref().unwrap_or(&error)))))
    }

    /// The best explanation that any part of the session has heard.
    fn poll_reason(&mut self, cx: &mut Context<'_>) -> Option<Error> {
        let mut heard: Vec<Error> = Vec::new();
        while let Err(error) = self.take_writes(cx) {
            heard.push(error);
        }
        self.flight.hear(cx, &mut heard);
        while let Poll::Ready(Some(event)) = self.events.as_mut().poll_next(cx) {
            if let Event::Error(error) = event {
                heard.push(error);
            }
        }
        let soft = heard.iter().position(Error::is_amqp_soft_error);
        let best = soft.or_else(|| heard.iter().position(Error::is_amqp_error))?;
        Some(heard.swap_remove(best))
    }

    /// Has the confirms of messages that are written awaited.
    fn take_writes(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        while self.writes.front_mut().is_some_and(|write| write.is_done(cx)) {
            let write = self.writes.pop_front().expect("it was looked at just now");
            self.unwritten_bytes -= write.bytes;
            let confirm = write.written.expect("a write that is done has a result")?;
            self.flight.written(write.number, confirm);
        }
        Ok(())
    }

    /// Restarts the clock when the broker blocks or unblocks the session. Before the clock is looked at: a caller
    /// that was busy through an alarm learns of its beginning and end only here.
    fn poll_events(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        while let Poll::Ready(Some(event)) = self.events.as_mut().poll_next(cx) {
            match event {
                Event::ConnectionBlocked(reason) => {
                    tracing::warn!(reason, "the broker blocks publishing");
                    self.clock_starts_at = Instant::now();
                }
                Event::ConnectionUnblocked => {
                    tracing::info!("the broker takes messages again");
                    self.clock_starts_at = Instant::now();
                }
                Event::Error(error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Looks every tick whether the connection is there and the oldest unconfirmed message in its time.
    /// Before confirms are polled: it takes their wakers off.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        while self.timer.as_mut().poll(cx).is_ready() {
            let status = self.session.connection().status();
            if !status.connected() {
                return Err(ErrorKind::InvalidConnectionState(ConnectionState::Closed).into());
            }
            let now = Instant::now();
            if status.blocked() {
                self.clock_starts_at = now;
            }
            let mut next = now + TICK.min(self.confirm_timeout / 4);
            self.flight.look()?;
            if let Some(published_at) = self.flight.oldest_missing() {
                let deadline = published_at.max(self.clock_starts_at) + self.confirm_timeout;
                if deadline <= now {
                    // What is queued must not be sent any more: the caller will send it elsewhere.
                    self.session.cut();
                    self.failed = Some(BrokerError::TimedOut { what: "a publish", limit: self.confirm_timeout });
                    return Err(ErrorKind::InvalidConnectionState(ConnectionState::Closed).into());
                }
                next = next.min(deadline);
            }
            self.timer.as_mut().reset(next);
        }
        Ok(())
    }

    fn poll_outcomes(&mut self, cx: &mut Context<'_>, into: &mut Vec<(u64, Outcome)>) -> Poll<Result<(), BrokerError>> {
        if let Some(error) = &self.failed {
            return Poll::Ready(Err(error.clone()));
        }
        if let Some(error) = self.ending.clone() {
            return self.fail_for(error, cx);
        }
        let alive = self.poll_events(cx).and_then(|()| self.poll_clock(cx)).and_then(|()| self.poll_all_written(cx));
        if let Err(error) = alive {
            return self.fail_for(error, cx);
        }
        match self.flight.poll(cx, into) {
            Poll::Ready(Err(error)) => self.fail_for(error, cx),
            poll => poll.map(|_| Ok(())),
        }
    }

    /// Takes the writes that are done; the last of the rest wakes the task, by when they all are.
    fn poll_all_written(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        self.take_writes(&mut Context::from_waker(Waker::noop()))?;
        if self.writes.back_mut().is_some_and(|write| write.is_done(cx)) {
            self.take_writes(cx)?;
        }
        Ok(())
    }

    /// Ready when there is room ahead of the socket, or waiting for it is no use: a blocked session takes
    /// messages into memory up to [`BLOCKED_LIMIT_BYTES`].
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BrokerError>> {
        if let Some(error) = self.ending.clone() {
            return self.fail_for(error, cx);
        }
        let taken = self.poll_events(cx).and_then(|()| self.poll_clock(cx));
        let taken = taken.and_then(|()| self.take_writes(&mut Context::from_waker(Waker::noop())));
        if let Err(error) = taken {
            return self.fail_for(error, cx);
        }
        // Half of it, so that the task is woken once in a hundred messages and not for each.
        let room = self.writes.len() <= WRITE_AHEAD / 2 && self.unwritten_bytes <= WRITE_AHEAD_BYTES / 2;
        if room || self.is_blocked() {
            return Poll::Ready(Ok(()));
        }
        let middle = self.writes.len().saturating_sub(WRITE_AHEAD / 2 + 1);
        if self.writes[middle].is_done(cx) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl Publisher for RabbitPublisher {
    fn capacity(&self) -> usize {
        if self.unwritten_bytes >= BLOCKED_LIMIT_BYTES {
            return 0;
        }
        let unused = self.max_unconfirmed.saturating_sub(self.flight.unconfirmed());
        unused.min((self.max_unconfirmed * SPAN_FACTOR).saturating_sub(self.flight.span()))
    }

    fn unconfirmed(&self) -> usize {
        self.flight.unconfirmed()
    }

    fn is_blocked(&self) -> bool {
        self.session.connection().status().blocked()
    }

    async fn publish(&mut self, ticket: u64, envelope: &Envelope) -> Result<(), BrokerError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let (message, position) = (&envelope.message, &envelope.position);
        let properties = wire::properties(envelope).map_err(|error| self.fail(error))?;
        let topic = wire::short(&message.topic).map_err(|error| self.fail(error))?;
        let channel = Arc::clone(&self.channel);
        let (exchange, body) = (self.exchange.clone(), message.body.clone());
        let number = self.flight.board(ticket, (position.source, position.stream.clone(), position.offset));
        let mut write = Write {
            number,
            bytes: body.len(),
            writing: Box::pin(publish(channel, exchange, topic, body, properties)),
            written: None,
        };
        // The first poll hands the message to lapin; that it is written shows later.
        write.is_done(&mut Context::from_waker(Waker::noop()));
        self.unwritten_bytes += write.bytes;
        self.writes.push_back(write);
        if self.writes.len() > WRITE_AHEAD || self.unwritten_bytes > WRITE_AHEAD_BYTES {
            poll_fn(|cx| self.poll_room(cx)).await?;
        }
        Ok(())
    }

    /// Does nothing: no outcome waits for company.
    fn flush(&mut self) {}

    async fn outcomes(&mut self, into: &mut Vec<(u64, Outcome)>) -> Result<(), BrokerError> {
        poll_fn(|cx| self.poll_outcomes(cx, into)).await
    }

    async fn close(mut self) {
        self.session.close().await;
    }
}

async fn publish(
    channel: Arc<Channel>,
    exchange: ShortString,
    topic: ShortString,
    body: Vec<u8>,
    properties: lapin::BasicProperties,
) -> Result<PublisherConfirm, Error> {
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    channel.basic_publish(exchange, topic, options, &body, properties).await
}
