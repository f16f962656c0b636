//! A look at the broker that declares nothing new: is it there, does it block, and is what exists as we declare it?
//!
//! Plain AMQP tells no more: policies, limits and alarms of the node are seen by the management API only.

use super::session::{self, Session};
use super::subscription::declare_queue;
use super::{RabbitMq, short};
use crate::broker::{BrokerError, QueueSpec};
use lapin::options::{BasicPublishOptions, ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, ExchangeKind};
use std::time::Duration;

/// A broker that answers nothing for so long after a publish has blocked it.
const BLOCKED_AFTER: Duration = Duration::from_secs(3);

/// What a look found.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// The broker's version.
    pub version: (u32, u32),
    /// The exchange.
    pub exchange: Found,
    /// Each queue, in the order asked for.
    pub queues: Vec<Found>,
    /// Whether it takes publishes; not so during a memory or disk alarm.
    pub is_blocked: bool,
}

/// One exchange or queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// It is as we declare it.
    AsDeclared,
    /// It does not exist.
    Missing,
    /// It exists with other arguments: the broker's words, about the first that differs.
    Different(String),
    /// We may not look.
    Refused(String),
}

impl RabbitMq {
    /// Looks at the exchange and the queues; changes nothing. A queue deleted in the middle of it may be declared anew.
    ///
    /// # Errors
    /// The broker cannot be reached, refuses the connection, or stops to answer.
    pub async fn inspect(&self, exchange: &str, queues: &[QueueSpec]) -> Result<Inspection, BrokerError> {
        let version = self.server_version().await?;
        let mut session = session::in_time(self, Session::open(self)).await?;
        let looked = session::in_time(self, async {
            let exchange = look_at_exchange(self, &session, exchange).await?;
            let mut found = Vec::new();
            for queue in queues {
                found.push(look_at_queue(self, &session, queue, version.0).await?);
            }
            Ok((exchange, found))
        });
        let (exchange, queues) = looked.await?;
        // Last: a blocked broker reads nothing more.
        let is_blocked = session::in_time(self, is_blocked(&session)).await?;
        if is_blocked {
            session.cut();
        } else {
            session.close().await;
        }
        Ok(Inspection { version, exchange, queues, is_blocked })
    }

    /// The vhost.
    pub fn vhost(&self) -> &str {
        &self.uri.vhost
    }
}

async fn look_at_exchange(broker: &RabbitMq, session: &Session, name: &str) -> Result<Found, BrokerError> {
    let name_on_wire = short("exchange", name)?;
    let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
    // A refusal closes its channel: each question has one of its own.
    let channel = session.connection().create_channel().await.map_err(|error| session::lost(&error))?;
    let asked = channel.exchange_declare(name_on_wire, ExchangeKind::Topic, passive, FieldTable::default()).await;
    if let Err(error) = asked {
        return refusal(session::lost(&error));
    }
    verdict(session::declare_exchange(broker, &channel, name, ExchangeKind::Topic).await)
}

async fn look_at_queue(
    broker: &RabbitMq,
    session: &Session,
    spec: &QueueSpec,
    major: u32,
) -> Result<Found, BrokerError> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let channel = session.connection().create_channel().await.map_err(|error| session::lost(&error))?;
    let asked = channel.queue_declare(short("queue", &spec.name)?, passive, FieldTable::default()).await;
    if let Err(error) = asked {
        return refusal(session::lost(&error));
    }
    verdict(declare_queue(broker, &channel, spec, major).await)
}

fn refusal(error: BrokerError) -> Result<Found, BrokerError> {
    match error {
        BrokerError::ChannelClosed { code: 404, .. } => Ok(Found::Missing),
        BrokerError::ChannelClosed { text, .. } => Ok(Found::Refused(text)),
        error => Err(error),
    }
}

fn verdict(declared: Result<(), BrokerError>) -> Result<Found, BrokerError> {
    match declared {
        Ok(()) => Ok(Found::AsDeclared),
        Err(BrokerError::Topology { reason, .. }) => Ok(Found::Different(reason)),
        Err(BrokerError::AccessRefused { reason, .. }) => Ok(Found::Refused(reason)),
        Err(error) => Err(error),
    }
}

/// A broker blocks a connection when it publishes, not before: a message to a queue that does not exist, which is dropped.
async fn is_blocked(session: &Session) -> Result<bool, BrokerError> {
    let lost = |error: lapin::Error| session::lost(&error);
    let channel = session.connection().create_channel().await.map_err(lost)?;
    let nowhere = format!("oncebox.doctor.{}", uuid::Uuid::now_v7().simple());
    let publish = channel.basic_publish(
        "".into(),
        short("queue", &nowhere)?,
        BasicPublishOptions::default(),
        b"",
        BasicProperties::default(),
    );
    let answered = tokio::time::timeout(BLOCKED_AFTER, async {
        publish.await.map_err(lost)?;
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        // Answered by 404, unless nothing is read any more.
        let _ = channel.queue_declare(short("queue", &nowhere)?, passive, FieldTable::default()).await;
        Ok::<_, BrokerError>(())
    });
    match answered.await {
        Ok(Ok(())) => Ok(session.connection().status().blocked()),
        Ok(Err(error)) => Err(error),
        Err(_) => Ok(true),
    }
}
