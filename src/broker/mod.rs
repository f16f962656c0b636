//! The port to the broker: publish with exact outcomes, consume with exact acknowledgements.
//!
//! Two implementations hold to one conformance suite: [`rabbitmq`], and [`memory`] with faults for tests.
//! The port knows messages and outcomes; it knows neither database nor retries: the relay and the consumer
//! decide what an outcome means. Reconnecting is the caller's work too: a session that failed stays failed,
//! and a new one starts with nothing of the old.

pub mod memory;
pub mod rabbitmq;

use crate::message::{Delivery, Envelope, Void};
use std::future::Future;
use std::time::Duration;

/// What became of one published message. A timeout and a blocked connection are no outcome of a message but
/// of the session: [`BrokerError::TimedOut`] and [`Publisher::is_blocked`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The broker took responsibility for it.
    Confirmed,
    /// The broker refused responsibility for now (a full queue, an internal error): worth a retry.
    Nacked,
    /// No queue is bound for it: the broker handed it back and dropped it.
    Returned {
        /// The broker's reply code, 312 for no route.
        code: u16,
        /// The broker's reply text.
        text: String,
    },
}

/// Why a session with the broker failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// No connection could be made: wrong host or port, or the broker is down.
    #[error("cannot reach the broker at {address}: {reason}")]
    Unreachable {
        /// Host and port, without credentials.
        address: String,
        /// What the connection attempt said.
        reason: String,
    },
    /// The broker refused the credentials or the vhost.
    #[error("the broker at {address} refused the connection: {reason}")]
    AccessRefused {
        /// Host, port and vhost, without credentials.
        address: String,
        /// The broker's words, and what to mend.
        reason: String,
    },
    /// The AMQP URL cannot be used.
    #[error("the AMQP URL is not valid: {0}")]
    InvalidUrl(String),
    /// The broker closed the channel because of something published or declared on it (404, 403, 406 …).
    #[error("the broker closed the channel: {code} {text}")]
    ChannelClosed {
        /// AMQP reply code.
        code: u16,
        /// AMQP reply text.
        text: String,
    },
    /// A queue or exchange exists with other arguments than ours, or may not be used as configured.
    #[error("{kind} \"{name}\" {reason}")]
    Topology {
        /// `queue` or `exchange`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// The broker's words, and what to mend.
        reason: String,
    },
    /// The connection is gone.
    #[error("the connection to the broker was lost: {0}")]
    ConnectionLost(String),
    /// The broker answered nothing within the limit; the connection must not be used again.
    #[error("the broker did not answer {what} within {limit:?}")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
}

impl BrokerError {
    /// True when trying again later can help without anyone changing credentials, topology or config.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::ConnectionLost(_) | Self::TimedOut { .. } | Self::ChannelClosed { .. }
        )
    }
}

/// How a queue is to be declared and bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueSpec {
    /// Queue name.
    pub name: String,
    /// Topic exchange its bindings are made on.
    pub exchange: String,
    /// Topic patterns.
    pub bindings: Vec<String>,
    /// One active consumer at a time: what order by key needs.
    pub single_active_consumer: bool,
    /// Gets the exchange's void notices too: what order by stream needs.
    pub voids: bool,
}

/// Name of the fanout exchange for void notices beside a topic exchange: no topic binding ever sees them.
pub fn void_exchange(exchange: &str) -> String {
    format!("{exchange}.void")
}

/// A broker that sessions can be opened on.
pub trait Broker: Send + Sync + 'static {
    /// A publishing session.
    type Publisher: Publisher;
    /// A consuming session.
    type Subscription: Subscription;

    /// Opens a session of its own connection and declares the durable topic exchange it will publish to, and the
    /// fanout exchange for void notices.
    fn publisher(&self, exchange: &str) -> impl Future<Output = Result<Self::Publisher, BrokerError>> + Send;

    /// Opens a session of its own connection, declares exchange, queue and bindings, and starts consuming with
    /// at most `prefetch` unacknowledged deliveries.
    fn subscribe(
        &self,
        queue: &QueueSpec,
        prefetch: u16,
    ) -> impl Future<Output = Result<Self::Subscription, BrokerError>> + Send;

    /// As [`subscribe`](Self::subscribe), to a queue of the session's own: it begins empty, nobody else may consume from it,
    /// and it goes, with what is in it, when the session ends however it ends. It does not outlive the broker's restart.
    fn listen(
        &self,
        queue: &QueueSpec,
        prefetch: u16,
    ) -> impl Future<Output = Result<Self::Subscription, BrokerError>> + Send;
}

/// A publishing session: persistent, mandatory, confirmed. After any error the session is over, and whatever
/// had no outcome yet may or may not have reached a queue.
///
/// The session lives in the calls alone: what was published goes out, heartbeats are exchanged and an alarm is heard of
/// while [`outcomes`](Self::outcomes) is awaited. Who keeps a session awaits it also with nothing unconfirmed; one that
/// is left alone for twice the heartbeat is taken for dead by the broker.
pub trait Publisher: Send + 'static {
    /// How many messages [`publish`](Self::publish) takes now without waiting for outcomes; 0 means first take
    /// some [`outcomes`](Self::outcomes).
    fn capacity(&self) -> usize;

    /// Messages without an outcome yet.
    fn unconfirmed(&self) -> usize;

    /// True while the broker has told the session to send nothing (a memory or disk alarm).
    fn is_blocked(&self) -> bool;

    /// Takes one message under the caller's `ticket`, which comes back with its outcome. It may be on its way only when
    /// [`outcomes`](Self::outcomes) is awaited next. Call it only with capacity left: without, it waits for room, and then
    /// is where an ended session shows. Not cancel safe.
    fn publish(&mut self, ticket: u64, envelope: &Envelope) -> impl Future<Output = Result<(), BrokerError>> + Send;

    /// Sends a void notice to the queues that asked for them, likewise; without such a queue the broker confirms and
    /// drops it.
    fn publish_void(&mut self, ticket: u64, void: &Void) -> impl Future<Output = Result<(), BrokerError>> + Send;

    /// Waits for the next batch of exact outcomes and appends it to `into`; pends while nothing is unconfirmed, and
    /// keeps the session alive meanwhile. A return is never mistaken for a confirm, whatever else is in flight. Cancel
    /// safe. Fails with [`BrokerError::TimedOut`] when the oldest unconfirmed message has waited too long on a session
    /// that is not blocked; what waited to be sent is then never sent.
    fn outcomes(&mut self, into: &mut Vec<(u64, Outcome)>) -> impl Future<Output = Result<(), BrokerError>> + Send;

    /// Ends the session in order, within a short limit.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// A consuming session.
pub trait Subscription: Send + 'static {
    /// The next delivery. Cancel safe.
    fn next(&mut self) -> impl Future<Output = Result<Delivery, BrokerError>> + Send;

    /// How many messages of the queue are ready and were not handed to any consumer yet.
    fn ready(&mut self) -> impl Future<Output = Result<u32, BrokerError>> + Send;

    /// Acknowledges one delivery of this session, and it alone.
    fn ack(&mut self, tag: u64) -> impl Future<Output = Result<(), BrokerError>> + Send;

    /// Acknowledges these deliveries and no others: what lies between their tags stays unacknowledged.
    fn ack_all(&mut self, tags: &[u64]) -> impl Future<Output = Result<(), BrokerError>> + Send {
        async move {
            for tag in tags {
                self.ack(*tag).await?;
            }
            Ok(())
        }
    }

    /// Ends the session in order, within a short limit; the broker redelivers what was not acknowledged.
    fn close(self) -> impl Future<Output = ()> + Send;
}
