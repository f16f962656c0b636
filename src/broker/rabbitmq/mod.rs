//! RabbitMQ over AMQP 0-9-1.
//!
//! Publishing has a connection of our own on lapin's codec: `frames` writes and reads the bytes, `connection` logs in
//! and moves them, `flight` pairs confirms and returns with messages, `publisher` is the port. lapin's own publish path
//! costs more CPU than all the rest of the relay, hands returns to the wrong confirms, and goes on sending what was given
//! up. lapin does the rest: declaring and binding queues, consuming, inspection.
//!
//! Each session has a connection of its own, without recovery: the relay must know which messages are in doubt, and
//! lapin's gives up after 16 attempts and keeps stale returns over a channel reset. A session that failed stays failed; who
//! opened it opens another. Queues are declared here, never changed or deleted.

mod acks;
mod connection;
mod flight;
mod frames;
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
use std::net::Ipv6Addr;
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
        // The parser knows names only, and takes its default for what stands in brackets.
        if let Some(literal) = bracketed(&options.url) {
            let address: Ipv6Addr = literal
                .parse()
                .map_err(|_| BrokerError::InvalidUrl("what stands in [ ] as its host is no IPv6 address".to_owned()))?;
            uri.authority.host = address.to_string();
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
        let host = match authority.host.contains(':') {
            true => format!("[{}]", authority.host),
            false => authority.host.clone(),
        };
        format!("{scheme}://{host}:{} (vhost \"{}\")", authority.port, self.uri.vhost)
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

/// What stands in brackets as the host of a URL.
fn bracketed(url: &str) -> Option<&str> {
    let authority = url.split_once("://")?.1.split(['/', '?', '#']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    host.strip_prefix('[')?.split(']').next()
}

/// A name for the wire; names over 255 bytes do not fit AMQP's short strings, and lapin panics on them.
fn short(kind: &'static str, name: &str) -> Result<ShortString, BrokerError> {
    ShortString::try_new(name).map_err(|_| BrokerError::Topology {
        kind,
        name: name.chars().take(40).collect(),
        reason: format!("has a name of {} bytes; AMQP allows 255", name.len()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: an IPv6 address is the host it names, never the parser's default.
    #[test]
    fn an_ipv6_host_is_itself() {
        let address = |url: &str| RabbitMq::new(RabbitMqOptions::new(url)).map(|broker| broker.address());
        for (url, expected) in [
            ("amqp://u:p@[fd00::5]:5673/v", "amqp://[fd00::5]:5673 (vhost \"v\")"),
            ("amqps://[::1]", "amqps://[::1]:5671 (vhost \"/\")"),
            ("amqp://u:p%40[@[FD00:0:0::5]?heartbeat=5", "amqp://[fd00::5]:5672 (vhost \"/\")"),
            ("amqp://u:p@127.0.0.1/v", "amqp://127.0.0.1:5672 (vhost \"v\")"),
            ("amqp://u:p@host/[::1]", "amqp://host:5672 (vhost \"[::1]\")"),
        ] {
            assert_eq!(address(url).expect("it is one"), expected, "{url}");
        }
        for url in ["amqp://u:sesame@[fd00::5/v", "amqp://u:sesame@[fd00::x]/v", "amqp://u:sesame@[::\t1]/v"] {
            let error = address(url).expect_err("it is no address");
            assert!(matches!(error, BrokerError::InvalidUrl(_)) && !error.to_string().contains("sesame"), "{error}");
        }
    }
}
