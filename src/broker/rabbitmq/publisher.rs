//! The publishing session: one channel, whose order RabbitMQ keeps, and the clock that bounds the wait for it.
//!
//! No task and no timer per message: the one who calls drives everything, and lapin's thread does the I/O.

use super::flight::{Flight, Written};
use super::session::{self, Session};
use super::wire::{self, Place};
use super::{RabbitMq, short};
use crate::broker::{BrokerError, Outcome, Publisher, void_exchange};
use crate::message::{Envelope, Void};
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
    writes: Writes,
    channel: Arc<Channel>,
    flight: Flight<PublisherConfirm>,
    events: Pin<Box<dyn Stream<Item = Event> + Send>>,
    session: Session,
    exchange: ShortString,
    void_exchange: ShortString,
    max_unconfirmed: usize,
    confirm_timeout: Duration,
    /// Waits are counted from here at the earliest: the last moment the broker had the session blocked.
    clock_starts_at: Instant,
    timer: Pin<Box<Sleep>>,
    /// A channel or connection found closed, and until when its reason is waited for.
    ending: Option<Error>,
    reason_until: Option<Instant>,
    failed: Option<BrokerError>,
}

/// The messages on their way to the socket, which they reach in this order.
#[derive(Default)]
struct Writes {
    queue: VecDeque<Write>,
    bytes: usize,
}

impl Writes {
    fn push(&mut self, write: Write) {
        self.bytes += write.bytes;
        self.queue.push_back(write);
    }

    /// The next message that was written; if none was, that wakes the task.
    fn next(&mut self, cx: &mut Context<'_>) -> Option<Written<PublisherConfirm>> {
        if !self.queue.front_mut()?.is_done(cx) {
            return None;
        }
        let write = self.queue.pop_front()?;
        self.bytes -= write.bytes;
        let confirm = write.written.expect("a write that is done has a result");
        Some(confirm.map(|confirm| (write.number, confirm)))
    }

    /// The next message that was written, by now.
    fn next_now(&mut self) -> Option<Written<PublisherConfirm>> {
        self.next(&mut Context::from_waker(Waker::noop()))
    }
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
        session::declare_exchanges(broker, &channel, exchange).await?;
        let confirm = channel.confirm_select(ConfirmSelectOptions::default());
        confirm.await.map_err(|error| session::lost(&error))?;
        Ok(Self {
            writes: Writes::default(),
            channel: Arc::new(channel),
            flight: Flight::new(),
            events,
            session,
            exchange: short("exchange", exchange)?,
            void_exchange: short("exchange", &void_exchange(exchange))?,
            max_unconfirmed: broker.options.max_unconfirmed.max(1),
            confirm_timeout: broker.options.confirm_timeout,
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
        while let Some(written) = self.writes.next(cx) {
            match written {
                Ok((number, confirm)) => self.flight.written(number, confirm),
                Err(error) => heard.push(error),
            }
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
    /// Before confirms and writes are polled: it takes their wakers off.
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
            self.flight.look(|| self.writes.next_now())?;
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
        if let Err(error) = self.poll_events(cx).and_then(|()| self.poll_clock(cx)) {
            return self.fail_for(error, cx);
        }
        loop {
            match self.flight.poll(cx, into, || self.writes.next_now()) {
                Poll::Ready(Err(error)) => return self.fail_for(error, cx),
                Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
                Poll::Pending => {}
            }
            // The last write wakes the task, by when they all are done.
            if !self.writes.queue.back_mut().is_some_and(|write| write.is_done(cx)) {
                return Poll::Pending;
            }
        }
    }

    /// Ready when there is room ahead of the socket, or waiting for it is no use: a blocked session takes
    /// messages into memory up to [`BLOCKED_LIMIT_BYTES`].
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BrokerError>> {
        if let Some(error) = self.ending.clone() {
            return self.fail_for(error, cx);
        }
        let taken = self.poll_events(cx).and_then(|()| self.poll_clock(cx));
        let taken = taken.and_then(|()| self.flight.take_written(|| self.writes.next_now()).map(drop));
        if let Err(error) = taken {
            return self.fail_for(error, cx);
        }
        // Half of it, so that the task is woken once in a hundred messages and not for each.
        let room = self.writes.queue.len() <= WRITE_AHEAD / 2 && self.writes.bytes <= WRITE_AHEAD_BYTES / 2;
        if room || self.is_blocked() {
            return Poll::Ready(Ok(()));
        }
        let middle = self.writes.queue.len().saturating_sub(WRITE_AHEAD / 2 + 1);
        if self.writes.queue[middle].is_done(cx) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl RabbitPublisher {
    /// Hands a message to lapin, and waits while too much is ahead of the socket.
    async fn send<W>(
        &mut self,
        ticket: u64,
        place: Place,
        bytes: usize,
        write: impl FnOnce(Arc<Channel>) -> W,
    ) -> Result<(), BrokerError>
    where
        W: Future<Output = Result<PublisherConfirm, Error>> + Send + 'static,
    {
        let writing = Box::pin(write(Arc::clone(&self.channel)));
        let number = self.flight.board(ticket, place);
        let mut write = Write { number, bytes, writing, written: None };
        // The first poll hands the message to lapin; that it is written shows later.
        write.is_done(&mut Context::from_waker(Waker::noop()));
        self.writes.push(write);
        if self.writes.queue.len() > WRITE_AHEAD || self.writes.bytes > WRITE_AHEAD_BYTES {
            poll_fn(|cx| self.poll_room(cx)).await?;
        }
        Ok(())
    }
}

impl Publisher for RabbitPublisher {
    fn capacity(&self) -> usize {
        if self.writes.bytes >= BLOCKED_LIMIT_BYTES {
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
        let place = (position.source, position.stream.clone(), position.offset);
        let properties = wire::properties(envelope).map_err(|error| self.fail(error))?;
        let topic = wire::short(&message.topic).map_err(|error| self.fail(error))?;
        let (exchange, body) = (self.exchange.clone(), message.body.clone());
        self.send(ticket, place, body.len(), |channel| publish(channel, exchange, topic, true, body, properties)).await
    }

    async fn publish_void(&mut self, ticket: u64, void: &Void) -> Result<(), BrokerError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        // No message's place: a return of the message itself, sent after all, must not be taken for the notice's.
        let place = (void.position.source, void.position.stream.clone(), -void.position.offset);
        let properties = wire::void_properties(void).map_err(|error| self.fail(error))?;
        let topic = wire::short(&void.topic).map_err(|error| self.fail(error))?;
        let (exchange, body) = (self.void_exchange.clone(), b"{}".to_vec());
        self.send(ticket, place, body.len(), |channel| publish(channel, exchange, topic, false, body, properties)).await
    }

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
    mandatory: bool,
    body: Vec<u8>,
    properties: lapin::BasicProperties,
) -> Result<PublisherConfirm, Error> {
    let options = BasicPublishOptions { mandatory, ..BasicPublishOptions::default() };
    channel.basic_publish(exchange, topic, options, &body, properties).await
}
