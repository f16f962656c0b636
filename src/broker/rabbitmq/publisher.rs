//! The publishing session: one channel, whose order RabbitMQ keeps, and the clock that bounds the wait for it.
//!
//! No task and no timer per message: the one who calls drives everything. [`publish`](Publisher::publish) puts a message
//! into the buffer, [`outcomes`](Publisher::outcomes) writes and reads.

use super::connection::Connection;
use super::flight::Flight;
use super::frames::{self, CHANNEL, Frame};
use super::{RabbitMq, session, short, wire};
use crate::broker::{BrokerError, Outcome, Publisher, void_exchange};
use crate::message::{Envelope, Void};
use amq_protocol::frame::AMQPContentHeader;
use amq_protocol::protocol::{AMQPClass, basic, channel, connection};
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// A queue that is slow to confirm may fall behind the others by this many times the messages in flight.
const SPAN_FACTOR: usize = 4;

/// Bytes worth a write before anybody waits for outcomes.
const WRITE_AT_BYTES: usize = 64 * 1024;

/// Bytes that may wait for the socket, and one message more: beyond it, what was published is not what is being sent.
const WAITING_LIMIT_BYTES: usize = 1024 * 1024;

/// How often a session looks at its clocks; a quarter of a shorter timeout.
const TICK: Duration = Duration::from_secs(1);
const SHORTEST_TICK: Duration = Duration::from_millis(1);

/// A publishing session on RabbitMQ.
///
/// Dropping it cuts its connection: what the broker has not read by then is not sent any more.
pub struct RabbitPublisher {
    connection: Connection,
    flight: Flight,
    exchange: String,
    void_exchange: String,
    max_unconfirmed: usize,
    confirm_timeout: Duration,
    /// An alarm of the broker's, and a channel it told to pause.
    is_blocked: bool,
    is_paused: bool,
    /// Waits are counted from here at the earliest: the last moment the broker had the session blocked.
    clock_starts_at: Instant,
    timer: Pin<Box<Sleep>>,
    /// A message being handed back.
    returning: Option<Returning>,
    /// Outcomes that were not collected yet.
    told: Vec<(u64, Outcome)>,
    failed: Option<BrokerError>,
}

/// What is known of a message while its frames come in.
struct Returning {
    reason: basic::Return,
    /// None until its header came; then the bytes of its body that are still to come.
    header: Option<(AMQPContentHeader, u64)>,
}

impl RabbitPublisher {
    pub(super) async fn open(broker: &RabbitMq, exchange: &str) -> Result<Self, BrokerError> {
        let void_exchange = void_exchange(exchange);
        // Before a connection is made for a name that no frame can carry.
        short("exchange", &void_exchange)?;
        let mut connection = Connection::open(broker).await?;
        connection.open_channel().await?;
        connection.declare_exchange(broker, exchange, "topic").await?;
        connection.declare_exchange(broker, &void_exchange, "fanout").await?;
        connection.select_confirms().await?;
        Ok(Self {
            connection,
            flight: Flight::new(),
            exchange: exchange.to_owned(),
            void_exchange,
            max_unconfirmed: broker.options.max_unconfirmed.max(1),
            confirm_timeout: broker.options.confirm_timeout,
            is_blocked: false,
            is_paused: false,
            clock_starts_at: Instant::now(),
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            returning: None,
            told: Vec::new(),
            failed: None,
        })
    }

    /// Ends the session: the caller will send elsewhere what has no outcome, so nothing of it may be sent from here.
    fn fail(&mut self, error: BrokerError) -> BrokerError {
        self.connection.cut();
        self.failed.get_or_insert(error).clone()
    }

    /// Writes what the socket takes, reads all it has, and looks at the clocks, in this order: what has come is heard
    /// before anybody is found too late.
    fn turn(&mut self, cx: &mut Context<'_>) -> Result<(), BrokerError> {
        self.flight.sent(Instant::now());
        let written = self.connection.poll_write(cx);
        loop {
            // The handshake may have read more than its last answer.
            while let Some(frame) = self.connection.next_frame()? {
                self.hear(frame)?;
            }
            match self.connection.poll_read(cx) {
                Poll::Ready(read) => read?,
                Poll::Pending => break,
            }
        }
        // Now only: the broker's words about it may have come.
        written?;
        self.poll_clock(cx)?;
        self.connection.poll_write(cx)
    }

    fn hear(&mut self, frame: Frame) -> Result<(), BrokerError> {
        match frame {
            Frame::Heartbeat => Ok(()),
            Frame::Header(CHANNEL, header) => self.hear_header(*header),
            Frame::Body(CHANNEL, bytes) => self.hear_body(bytes as u64),
            Frame::Confirm { tag, multiple, acked } if self.returning.is_none() => {
                let taken = self.flight.confirmed(tag, multiple, acked, &mut self.told);
                taken.map_err(|mismatch| BrokerError::ConnectionLost(mismatch.to_string()))
            }
            Frame::Method(0, class) => match *class {
                AMQPClass::Connection(method) => self.hear_connection(method),
                _ => Err(unexpected()),
            },
            Frame::Method(CHANNEL, class) => match *class {
                AMQPClass::Channel(method) => self.hear_channel(method),
                AMQPClass::Basic(basic::AMQPMethod::Return(reason)) if self.returning.is_none() => {
                    self.returning = Some(Returning { reason, header: None });
                    Ok(())
                }
                _ => Err(unexpected()),
            },
            _ => Err(unexpected()),
        }
    }

    fn hear_connection(&mut self, method: connection::AMQPMethod) -> Result<(), BrokerError> {
        match method {
            connection::AMQPMethod::Blocked(blocked) => {
                tracing::warn!(reason = blocked.reason.as_str(), "the broker blocks publishing");
                self.is_blocked = true;
                self.clock_starts_at = Instant::now();
                Ok(())
            }
            connection::AMQPMethod::Unblocked(_) => {
                tracing::info!("the broker takes messages again");
                self.is_blocked = false;
                self.clock_starts_at = Instant::now();
                Ok(())
            }
            connection::AMQPMethod::Close(close) => {
                self.answer(0, AMQPClass::Connection(connection::AMQPMethod::CloseOk(connection::CloseOk {})));
                Err(session::closed(close.reply_code, close.reply_text.as_str()))
            }
            _ => Err(unexpected()),
        }
    }

    fn hear_channel(&mut self, method: channel::AMQPMethod) -> Result<(), BrokerError> {
        match method {
            channel::AMQPMethod::Flow(flow) => {
                self.is_paused = !flow.active;
                self.clock_starts_at = Instant::now();
                let ok = channel::AMQPMethod::FlowOk(channel::FlowOk { active: flow.active });
                frames::method(self.connection.out(), CHANNEL, AMQPClass::Channel(ok));
                Ok(())
            }
            channel::AMQPMethod::Close(close) => {
                self.answer(CHANNEL, AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {})));
                Err(session::closed(close.reply_code, close.reply_text.as_str()))
            }
            _ => Err(unexpected()),
        }
    }

    /// The last word of a session, as far as the socket takes it.
    fn answer(&mut self, channel: u16, method: AMQPClass) {
        frames::method(self.connection.out(), channel, method);
        let _ = self.connection.poll_write(&mut Context::from_waker(Waker::noop()));
    }

    fn hear_header(&mut self, header: AMQPContentHeader) -> Result<(), BrokerError> {
        match &mut self.returning {
            Some(returning) if returning.header.is_none() => {
                let bytes = header.body_size;
                returning.header = Some((header, bytes));
                self.hear_body(0)
            }
            _ => Err(unexpected()),
        }
    }

    fn hear_body(&mut self, bytes: u64) -> Result<(), BrokerError> {
        let Some(Returning { header: Some((_, missing)), .. }) = &mut self.returning else { return Err(unexpected()) };
        *missing = missing.checked_sub(bytes).ok_or_else(unexpected)?;
        if *missing > 0 {
            return Ok(());
        }
        let Some(Returning { reason, header: Some((header, _)) }) = self.returning.take() else {
            return Err(unexpected());
        };
        let place = wire::place(&header.properties).unwrap_or_default();
        let taken = self.flight.returned(&place, reason.reply_code, reason.reply_text.to_string());
        taken.map_err(|mismatch| BrokerError::ConnectionLost(mismatch.to_string()))
    }

    /// Looks every tick whether the broker lives and the oldest unconfirmed message is in its time.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Result<(), BrokerError> {
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            if self.is_blocked() {
                self.clock_starts_at = now;
            }
            let mut next = now + TICK.min(self.confirm_timeout / 4).max(SHORTEST_TICK);
            if let Some(at) = self.connection.beat(now)? {
                next = next.min(at);
            }
            if let Some(sent_at) = self.flight.oldest() {
                let deadline = sent_at.max(self.clock_starts_at) + self.confirm_timeout;
                if deadline <= now {
                    return Err(BrokerError::TimedOut { what: "a publish", limit: self.confirm_timeout });
                }
                next = next.min(deadline);
            }
            self.timer.as_mut().reset(next);
        }
        Ok(())
    }

    fn poll_outcomes(&mut self, cx: &mut Context<'_>, into: &mut Vec<(u64, Outcome)>) -> Poll<Result<(), BrokerError>> {
        if self.told.is_empty() {
            if let Some(error) = &self.failed {
                return Poll::Ready(Err(error.clone()));
            }
            if let Err(error) = self.turn(cx) {
                let error = self.fail(error);
                if self.told.is_empty() {
                    return Poll::Ready(Err(error));
                }
            }
        }
        if self.told.is_empty() {
            return Poll::Pending;
        }
        // Also those that came before the session failed: they are certain.
        into.append(&mut self.told);
        Poll::Ready(Ok(()))
    }

    /// Ready when another message may wait for the socket.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BrokerError>> {
        if let Err(error) = self.turn(cx) {
            return Poll::Ready(Err(self.fail(error)));
        }
        if self.connection.waiting() < WAITING_LIMIT_BYTES { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Waits while too much waits for the socket.
    async fn room(&mut self) -> Result<(), BrokerError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.connection.waiting() >= WAITING_LIMIT_BYTES {
            poll_fn(|cx| self.poll_room(cx)).await?;
        }
        Ok(())
    }

    /// Starts to write when that is worth it.
    async fn written(&mut self) {
        if self.connection.waiting() >= WRITE_AT_BYTES {
            // A failed write fails again in the next turn, which knows to look for the reason first.
            let _ = poll_fn(|cx| Poll::Ready(self.connection.poll_write(cx))).await;
        }
    }
}

impl Publisher for RabbitPublisher {
    fn capacity(&self) -> usize {
        if self.connection.waiting() >= WAITING_LIMIT_BYTES {
            return 0;
        }
        let unused = self.max_unconfirmed.saturating_sub(self.unconfirmed());
        unused.min((self.max_unconfirmed * SPAN_FACTOR).saturating_sub(self.flight.span()))
    }

    fn unconfirmed(&self) -> usize {
        self.flight.unconfirmed() + self.told.len()
    }

    fn is_blocked(&self) -> bool {
        self.is_blocked || self.is_paused
    }

    async fn publish(&mut self, ticket: u64, envelope: &Envelope) -> Result<(), BrokerError> {
        self.room().await?;
        let frame_max = self.connection.frame_max();
        frames::publish(self.connection.out(), &self.exchange, envelope, frame_max)
            .map_err(|error| self.fail(error))?;
        let position = &envelope.position;
        let place = (position.source, position.stream.clone(), position.offset);
        self.flight.board(ticket, Some(place), Instant::now());
        self.written().await;
        Ok(())
    }

    async fn publish_void(&mut self, ticket: u64, void: &Void) -> Result<(), BrokerError> {
        self.room().await?;
        let frame_max = self.connection.frame_max();
        let written = frames::publish_void(self.connection.out(), &self.void_exchange, void, frame_max);
        written.map_err(|error| self.fail(error))?;
        self.flight.board(ticket, None, Instant::now());
        self.written().await;
        Ok(())
    }

    async fn outcomes(&mut self, into: &mut Vec<(u64, Outcome)>) -> Result<(), BrokerError> {
        poll_fn(|cx| self.poll_outcomes(cx, into)).await
    }

    async fn close(mut self) {
        if self.failed.is_none() {
            self.connection.close().await;
        }
    }
}

impl Drop for RabbitPublisher {
    fn drop(&mut self) {
        self.connection.cut();
    }
}

fn unexpected() -> BrokerError {
    BrokerError::ConnectionLost("the broker sent a frame that has no place here".to_owned())
}
