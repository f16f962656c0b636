//! The publisher's connection: logging in, and moving bytes both ways while somebody polls.
//!
//! No task and no thread: what is written waits in one buffer until the socket takes it, what is read waits in another
//! until it is asked for. Every wait of the handshake is bounded by who opens the connection. Whoever holds it must poll it
//! more often than its heartbeat, or the broker takes it for dead.

use super::frames::{self, CHANNEL, Frame};
use super::session::{self, CLOSE_LIMIT, Stream};
use super::{RabbitMq, short};
use crate::broker::BrokerError;
use amq_protocol::auth::{Credentials, SASLMechanism};
use amq_protocol::protocol::{AMQPClass, channel, confirm, connection, exchange};
use amq_protocol::types::{AMQPValue, FieldTable, LongString};
use futures_util::{AsyncRead, AsyncWrite};
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpSocket;
use tokio::time::Instant;

/// Largest frame we offer: RabbitMQ's own default, and the most that a read or a hostile peer can make us hold.
const FRAME_MAX: u32 = 131_072;
/// Smallest that AMQP allows for, and smallest that RabbitMQ takes from 4.1 on.
const FRAME_MIN: u32 = 4_096;
const FRAME_MIN_RABBITMQ: u32 = 8_192;
/// Two of the largest frames: what is read at a time.
const INPUT_BYTES: usize = 2 * FRAME_MAX as usize;

pub(super) struct Connection {
    /// The stream, and its socket to end it by; none once it has ended.
    stream: Option<(Box<dyn Stream>, TcpSocket)>,
    out: Vec<u8>,
    /// Bytes of `out` that the socket took.
    written: usize,
    /// What the socket took may wait in the TLS session.
    unflushed: bool,
    input: Box<[u8]>,
    /// What was read and not yet asked for.
    unread: std::ops::Range<usize>,
    frame_max: usize,
    /// None if neither side asked for one.
    heartbeat: Option<Duration>,
    last_read: Instant,
    last_write: Instant,
}

/// Why a handshake got no further.
enum Refusal {
    /// The broker's code and words.
    Closed(u16, String),
    Failed(BrokerError),
}

impl Connection {
    /// Connects and logs in. Dropping the future ends the attempt.
    pub(super) async fn open(broker: &RabbitMq) -> Result<Self, BrokerError> {
        let unreachable = |reason: String| BrokerError::Unreachable { address: broker.address(), reason };
        let stream = session::dial(&broker.uri).await.map_err(|error| unreachable(error.to_string()))?;
        let mut this = Self {
            stream: Some(stream),
            out: Vec::new(),
            written: 0,
            unflushed: false,
            input: vec![0; INPUT_BYTES].into_boxed_slice(),
            unread: 0..0,
            frame_max: FRAME_MAX as usize,
            heartbeat: None,
            last_read: Instant::now(),
            last_write: Instant::now(),
        };
        this.log_in(broker).await.map_err(|refusal| match refusal {
            Refusal::Closed(code, text) => session::refused_login(broker, code, &text),
            Refusal::Failed(BrokerError::ConnectionLost(reason)) => unreachable(reason),
            Refusal::Failed(error) => error,
        })?;
        Ok(this)
    }

    async fn log_in(&mut self, broker: &RabbitMq) -> Result<(), Refusal> {
        self.out.extend_from_slice(frames::PROTOCOL_HEADER);
        let AMQPClass::Connection(connection::AMQPMethod::Start(start)) = self.answer().await? else {
            return Err(unexpected("its greeting"));
        };
        let mut next = self.call(0, start_ok(broker, &start.mechanisms)?).await?;
        if let AMQPClass::Connection(connection::AMQPMethod::Secure(_)) = next {
            next = self.call(0, secure_ok(broker)?).await?;
        }
        let AMQPClass::Connection(connection::AMQPMethod::Tune(tune)) = next else {
            return Err(unexpected("connection.tune"));
        };
        let tuned = self.tune(broker, &tune);
        frames::method(&mut self.out, 0, AMQPClass::Connection(connection::AMQPMethod::TuneOk(tuned)));
        let virtual_host = broker.uri.vhost.as_str().into();
        let open = connection::AMQPMethod::Open(connection::Open { virtual_host });
        match self.call(0, AMQPClass::Connection(open)).await? {
            AMQPClass::Connection(connection::AMQPMethod::OpenOk(_)) => Ok(()),
            _ => Err(unexpected("connection.open-ok")),
        }
    }

    /// Settles on what both sides want, 0 being no wish.
    fn tune(&mut self, broker: &RabbitMq, theirs: &connection::Tune) -> connection::TuneOk {
        let query = &broker.uri.query;
        let frame_max = least(least(query.frame_max.unwrap_or_default(), theirs.frame_max), FRAME_MAX);
        let below = (1..FRAME_MIN_RABBITMQ).contains(&theirs.frame_max);
        let heartbeat = least(query.heartbeat.unwrap_or_default(), theirs.heartbeat);
        let tuned = connection::TuneOk {
            channel_max: least(query.channel_max.unwrap_or_default(), theirs.channel_max),
            frame_max: frame_max.max(if below { FRAME_MIN } else { FRAME_MIN_RABBITMQ }),
            heartbeat,
        };
        self.frame_max = tuned.frame_max as usize;
        self.heartbeat = (heartbeat > 0).then(|| Duration::from_secs(heartbeat.into()));
        tuned
    }

    /// Opens the channel.
    pub(super) async fn open_channel(&mut self) -> Result<(), BrokerError> {
        let open = AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {}));
        match self.call(CHANNEL, open).await.map_err(lost)? {
            AMQPClass::Channel(channel::AMQPMethod::OpenOk(_)) => Ok(()),
            _ => Err(lost(unexpected("channel.open-ok"))),
        }
    }

    /// Puts the channel into confirm mode.
    pub(super) async fn select_confirms(&mut self) -> Result<(), BrokerError> {
        let select = AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: false }));
        match self.call(CHANNEL, select).await.map_err(lost)? {
            AMQPClass::Confirm(confirm::AMQPMethod::SelectOk(_)) => Ok(()),
            _ => Err(lost(unexpected("confirm.select-ok"))),
        }
    }

    /// Declares a durable exchange, or finds it as it should be.
    pub(super) async fn declare_exchange(
        &mut self,
        broker: &RabbitMq,
        name: &str,
        kind: &str,
    ) -> Result<(), BrokerError> {
        let declare = exchange::Declare {
            exchange: short("exchange", name)?,
            kind: kind.into(),
            passive: false,
            durable: true,
            auto_delete: false,
            internal: false,
            nowait: false,
            arguments: FieldTable::default(),
        };
        let declare = AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare));
        match self.call(CHANNEL, declare).await {
            Ok(AMQPClass::Exchange(exchange::AMQPMethod::DeclareOk(_))) => Ok(()),
            Ok(_) => Err(lost(unexpected("exchange.declare-ok"))),
            Err(Refusal::Closed(code, text)) => {
                let mend = session::exchange_mend(kind);
                Err(session::refused_declaration(broker, "exchange", name, &mend, code, &text))
            }
            Err(Refusal::Failed(error)) => Err(error),
        }
    }

    /// Sends a method and waits for the broker's next.
    async fn call(&mut self, channel: u16, method: AMQPClass) -> Result<AMQPClass, Refusal> {
        frames::method(&mut self.out, channel, method);
        self.answer().await
    }

    /// The broker's next method, before anything is published.
    async fn answer(&mut self) -> Result<AMQPClass, Refusal> {
        loop {
            match poll_fn(|cx| self.poll_frame(cx)).await.map_err(Refusal::Failed)? {
                Frame::Heartbeat => {}
                Frame::Method(_, class) => match *class {
                    AMQPClass::Connection(connection::AMQPMethod::Close(close)) => {
                        return Err(Refusal::Closed(close.reply_code, close.reply_text.to_string()));
                    }
                    AMQPClass::Channel(channel::AMQPMethod::Close(close)) => {
                        return Err(Refusal::Closed(close.reply_code, close.reply_text.to_string()));
                    }
                    // An alarm: it concerns publishing alone, and shows again when something is published.
                    AMQPClass::Connection(
                        connection::AMQPMethod::Blocked(_) | connection::AMQPMethod::Unblocked(_),
                    ) => {}
                    class => return Ok(class),
                },
                _ => return Err(unexpected("an answer")),
            }
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Frame, BrokerError>> {
        self.poll_write(cx)?;
        loop {
            if let Some(frame) = self.next_frame()? {
                return Poll::Ready(Ok(frame));
            }
            ready!(self.poll_read(cx))?;
        }
    }

    /// Largest frame both sides take.
    pub(super) fn frame_max(&self) -> usize {
        self.frame_max
    }

    /// Where frames are written to.
    pub(super) fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// Bytes that the socket has not taken.
    pub(super) fn waiting(&self) -> usize {
        self.out.len() - self.written
    }

    /// Hands over what the socket takes now, and has the rest wake the task.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<(), BrokerError> {
        let Some((stream, _)) = &mut self.stream else { return Err(gone()) };
        while self.written < self.out.len() {
            match Pin::new(&mut *stream).poll_write(cx, &self.out[self.written..]) {
                Poll::Ready(Ok(0)) => return Err(gone()),
                Poll::Ready(Ok(bytes)) => {
                    self.written += bytes;
                    self.unflushed = true;
                    self.last_write = Instant::now();
                }
                Poll::Ready(Err(error)) => return Err(BrokerError::ConnectionLost(error.to_string())),
                Poll::Pending => break,
            }
        }
        if self.written == self.out.len() {
            self.out.clear();
            self.written = 0;
        } else if self.written > self.out.len() / 2 {
            self.out.drain(..self.written);
            self.written = 0;
        }
        if self.unflushed {
            match Pin::new(stream).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(error)) => return Err(BrokerError::ConnectionLost(error.to_string())),
                Poll::Pending => {}
            }
        }
        Ok(())
    }

    /// Reads once. [`next_frame`](Self::next_frame) must have taken out what was there.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BrokerError>> {
        let Some((stream, _)) = &mut self.stream else { return Poll::Ready(Err(gone())) };
        // Less than a frame is left.
        self.input.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        match ready!(Pin::new(stream).poll_read(cx, &mut self.input[self.unread.end..])) {
            Ok(0) => Poll::Ready(Err(gone())),
            Ok(bytes) => {
                self.unread.end += bytes;
                self.last_read = Instant::now();
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(BrokerError::ConnectionLost(error.to_string()))),
        }
    }

    /// The next frame of what was read.
    pub(super) fn next_frame(&mut self) -> Result<Option<Frame>, BrokerError> {
        let read = frames::read(&self.input[self.unread.clone()], self.frame_max);
        Ok(read.map_err(BrokerError::ConnectionLost)?.map(|(frame, bytes)| {
            self.unread.start += bytes;
            frame
        }))
    }

    /// Keeps the connection alive, and fails if the broker is not; answers when to look again.
    pub(super) fn beat(&mut self, now: Instant) -> Result<Option<Instant>, BrokerError> {
        let Some(heartbeat) = self.heartbeat else { return Ok(None) };
        let silent = now.saturating_duration_since(self.last_read);
        if silent > 2 * heartbeat {
            return Err(BrokerError::ConnectionLost(format!("nothing came from the broker for {silent:.1?}")));
        }
        if self.waiting() == 0 && now >= self.last_write + heartbeat / 2 {
            frames::heartbeat(&mut self.out);
            self.last_write = now;
        }
        // What waits for the socket is as good as a heartbeat.
        let write_at = if self.waiting() == 0 { self.last_write + heartbeat / 2 } else { now + heartbeat / 2 };
        Ok(Some(write_at.min(self.last_read + 2 * heartbeat + Duration::from_millis(1))))
    }

    /// Ends the connection at once, and by a reset: a plain end would have the system deliver what it still holds, to a
    /// broker that reads it when its alarm is over.
    pub(super) fn cut(&mut self) {
        if let Some((_, socket)) = self.stream.take() {
            let _ = socket.set_zero_linger();
        }
    }

    /// Sends what waits, closes in order, and cuts when the broker takes too long to answer.
    pub(super) async fn close(&mut self) {
        let close = connection::Close { reply_code: 200, reply_text: "closed".into(), class_id: 0, method_id: 0 };
        frames::method(&mut self.out, 0, AMQPClass::Connection(connection::AMQPMethod::Close(close)));
        let closed = async {
            loop {
                if let Frame::Method(0, class) = poll_fn(|cx| self.poll_frame(cx)).await?
                    && matches!(*class, AMQPClass::Connection(connection::AMQPMethod::CloseOk(_)))
                {
                    return Ok::<_, BrokerError>(());
                }
            }
        };
        match tokio::time::timeout(CLOSE_LIMIT, closed).await {
            Ok(Ok(())) => self.stream = None,
            _ => self.cut(),
        }
    }
}

/// The smaller of two wishes, of which 0 is none.
fn least<T: Ord + Default>(one: T, other: T) -> T {
    if one == T::default() || (other != T::default() && other < one) { other } else { one }
}

fn gone() -> BrokerError {
    BrokerError::ConnectionLost("the broker closed the connection".to_owned())
}

fn unexpected(instead_of: &str) -> Refusal {
    Refusal::Failed(BrokerError::ConnectionLost(format!("the broker sent something else than {instead_of}")))
}

fn lost(refusal: Refusal) -> BrokerError {
    match refusal {
        Refusal::Closed(code, text) => session::closed(code, &text),
        Refusal::Failed(error) => error,
    }
}

fn start_ok(broker: &RabbitMq, offered: &LongString) -> Result<AMQPClass, Refusal> {
    let mechanism = broker.uri.query.auth_mechanism.unwrap_or_default();
    let offered = offered.to_string();
    if !offered.split_whitespace().any(|one| one == mechanism.name()) {
        let reason = format!("it offers no authentication by {mechanism}, but by: {offered}");
        return Err(Refusal::Failed(BrokerError::AccessRefused { address: broker.address(), reason }));
    }
    // Without the last one RabbitMQ answers a wrong password by hanging up.
    let capabilities: FieldTable = [
        "publisher_confirms",
        "basic.nack",
        "connection.blocked",
        "consumer_cancel_notify",
        "authentication_failure_close",
    ]
    .into_iter()
    .fold(FieldTable::default(), |mut table, capability| {
        table.insert(capability.into(), AMQPValue::Boolean(true));
        table
    });
    let mut client_properties = FieldTable::default();
    for (name, value) in [
        ("product", "oncebox"),
        ("version", env!("CARGO_PKG_VERSION")),
        ("platform", "rust"),
        ("connection_name", &broker.options.connection_name),
    ] {
        client_properties.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    client_properties.insert("capabilities".into(), AMQPValue::FieldTable(capabilities));
    Ok(AMQPClass::Connection(connection::AMQPMethod::StartOk(connection::StartOk {
        client_properties,
        mechanism: mechanism.name().into(),
        response: credentials(broker).sasl_auth_string(mechanism),
        locale: "en_US".into(),
    })))
}

/// The answer to a challenge, of which one mechanism has one.
fn secure_ok(broker: &RabbitMq) -> Result<AMQPClass, Refusal> {
    let mechanism = broker.uri.query.auth_mechanism.unwrap_or_default();
    if mechanism != SASLMechanism::RabbitCrDemo {
        let reason = format!("it asked for more than authentication by {mechanism} has to say");
        return Err(Refusal::Failed(BrokerError::AccessRefused { address: broker.address(), reason }));
    }
    let response = credentials(broker).rabbit_cr_demo_answer();
    Ok(AMQPClass::Connection(connection::AMQPMethod::SecureOk(connection::SecureOk { response })))
}

fn credentials(broker: &RabbitMq) -> Credentials {
    broker.uri.authority.userinfo.clone().into()
}
