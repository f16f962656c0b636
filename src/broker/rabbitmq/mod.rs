//! RabbitMQ over AMQP 0-9-1, through lapin.
//!
//! Each session has a connection of its own, without lapin's recovery: that gives up after 16 attempts and
//! keeps stale returns over a channel reset, and the relay must know which messages are in doubt. A session
//! that failed stays failed; who opened it opens another. Queues are declared here, never changed or deleted.

mod flight;
mod inspect;
mod publisher;
mod session;
mod subscription;
mod wire;

pub(crate) use wire::properties;

pub use inspect::{Found, Inspection};
pub use publisher::RabbitPublisher;
pub use subscription::RabbitSubscription;

use super::{Broker, BrokerError, QueueSpec};
use lapin::types::ShortString;
use lapin::uri::{AMQPScheme, AMQPUri};
use std::fmt;
use std::time::Duration;

/// Heartbeat asked for when the URL names none: a frozen broker is noticed after about twice this.
const HEARTBEAT_S: u16 = 10;

/// How to reach RabbitMQ, and how long to wait for it.
#[derive(Clone)]
pub struct RabbitMqOptions {
    /// `amqp://user:password@host:port/vhost`, or `amqps://`; `?heartbeat=` in seconds is honoured.
    pub url: String,
    /// Name of the connection in RabbitMQ's listings and logs.
    pub connection_name: String,
    /// How long a message may stay unconfirmed, or an acknowledgement unsent, on a session that is not blocked.
    pub confirm_timeout: Duration,
    /// How long connecting and declaring may take together.
    pub connect_timeout: Duration,
    /// Most messages in flight on one publisher.
    pub max_unconfirmed: usize,
}

impl RabbitMqOptions {
    /// Defaults: 30 s for a confirm, longer than a quorum queue's leader election takes; 10 s to connect;
    /// 5,000 messages in flight, where the broker's rate levels off.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            connection_name: "oncebox".to_owned(),
            confirm_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            max_unconfirmed: 5_000,
        }
    }
}

impl fmt::Debug for RabbitMqOptions {
    /// Leaves the URL out: it holds the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMqOptions")
            .field("connection_name", &self.connection_name)
            .field("confirm_timeout", &self.confirm_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("max_unconfirmed", &self.max_unconfirmed)
            .finish_non_exhaustive()
    }
}

/// A RabbitMQ broker; opens nothing before a session is asked for.
#[derive(Clone)]
pub struct RabbitMq {
    uri: AMQPUri,
    options: RabbitMqOptions,
}

impl fmt::Debug for RabbitMq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMq").field("address", &self.address()).field("options", &self.options).finish()
    }
}

impl RabbitMq {
    /// Checks the URL; connects to nothing.
    ///
    /// # Errors
    /// [`BrokerError::InvalidUrl`], which never repeats the URL's credentials.
    pub fn new(options: RabbitMqOptions) -> Result<Self, BrokerError> {
        // The parser's own words quote the URL for some mistakes, password and all: give ours instead.
        let mut uri: AMQPUri = options.url.parse().map_err(|_| {
            BrokerError::InvalidUrl("expected amqp://user:password@host:port/vhost or amqps://…".to_owned())
        })?;
        // lapin panics on a vhost that is no short string.
        if uri.vhost.len() > 255 {
            return Err(BrokerError::InvalidUrl("the vhost is longer than 255 bytes".to_owned()));
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT_S);
        Ok(Self { uri, options })
    }

    /// Host, port and vhost, without credentials.
    pub fn address(&self) -> String {
        let scheme = match self.uri.scheme {
            AMQPScheme::AMQP => "amqp",
            AMQPScheme::AMQPS => "amqps",
        };
        let authority = &self.uri.authority;
        format!("{scheme}://{}:{} (vhost \"{}\")", authority.host, authority.port, self.uri.vhost)
    }

    /// The version the broker gives in its greeting, as `(major, minor)`; logs in to nothing.
    ///
    /// # Errors
    /// [`BrokerError::Unreachable`] and [`BrokerError::TimedOut`].
    pub async fn server_version(&self) -> Result<(u32, u32), BrokerError> {
        session::server_version(self).await
    }
}

impl Broker for RabbitMq {
    type Publisher = RabbitPublisher;
    type Subscription = RabbitSubscription;

    async fn publisher(&self, exchange: &str) -> Result<RabbitPublisher, BrokerError> {
        session::in_time(self, RabbitPublisher::open(self, exchange)).await
    }

    async fn subscribe(&self, queue: &QueueSpec, prefetch: u16) -> Result<RabbitSubscription, BrokerError> {
        session::in_time(self, RabbitSubscription::open(self, queue, prefetch, false)).await
    }

    async fn listen(&self, queue: &QueueSpec, prefetch: u16) -> Result<RabbitSubscription, BrokerError> {
        session::in_time(self, RabbitSubscription::open(self, queue, prefetch, true)).await
    }
}

/// A name for the wire; names over 255 bytes do not fit AMQP's short strings, and lapin panics on them.
fn short(kind: &'static str, name: &str) -> Result<ShortString, BrokerError> {
    ShortString::try_new(name).map_err(|_| BrokerError::Topology {
        kind,
        name: name.chars().take(40).collect(),
        reason: format!("has a name of {} bytes; AMQP allows 255", name.len()),
    })
}
