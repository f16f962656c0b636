//! The consuming session: one channel, one queue, and acknowledgements of exactly what was settled.

use super::acks::Acks;
use super::session::{self, Session};
use super::{RabbitMq, short, wire};
use crate::broker::{BrokerError, QueueSpec, Subscription, void_exchange};
use crate::message::Delivery;
use futures_util::StreamExt;
use futures_util::future::join_all;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Consumer, ErrorKind};
use std::time::Duration;

/// From this version on a quorum queue drops a message after 20 deliveries unless told not to; the versions
/// before know no such limit, and refuse the argument.
const DELIVERY_LIMIT_SINCE_MAJOR: u32 = 4;

/// A consuming session on RabbitMQ.
///
/// Dropping it ends its connection, and the broker delivers again what was not acknowledged.
pub struct RabbitSubscription {
    // Before the session: the consumer and its channel keep lapin's connection open.
    consumer: Consumer,
    channel: Channel,
    session: Session,
    queue: String,
    ack_timeout: Duration,
    acks: Acks,
    failed: Option<BrokerError>,
}

impl RabbitSubscription {
    pub(super) async fn open(
        broker: &RabbitMq,
        spec: &QueueSpec,
        prefetch: u16,
        is_private: bool,
    ) -> Result<Self, BrokerError> {
        let (major, _) = broker.server_version().await?;
        let session = Session::open(broker).await?;
        let lost = |error: lapin::Error| session::lost(&error);
        let channel = session.connection().create_channel().await.map_err(lost)?;
        session::declare_exchanges(broker, &channel, &spec.exchange).await?;
        if is_private {
            declare_private_queue(broker, &channel, spec).await?;
        } else {
            declare_queue(broker, &channel, spec, major).await?;
        }
        let (queue, exchange) = (short("queue", &spec.name)?, short("exchange", &spec.exchange)?);
        // Void notices first: none may be missed for a stream whose messages come.
        let voids = spec.voids.then(|| short("exchange", &void_exchange(&spec.exchange))).transpose()?;
        let mut bindings: Vec<_> = voids.map(|exchange| (exchange, ShortString::from(""))).into_iter().collect();
        for pattern in &spec.bindings {
            bindings.push((exchange.clone(), short("binding", pattern)?));
        }
        for (exchange, pattern) in bindings {
            let bind = channel.queue_bind(
                queue.clone(),
                exchange,
                pattern,
                QueueBindOptions::default(),
                FieldTable::default(),
            );
            bind.await.map_err(|error| session::topology(broker, "queue", &spec.name, "bind it by hand", &error))?;
        }
        channel.basic_qos(prefetch, BasicQosOptions::default()).await.map_err(lost)?;
        let consume =
            channel.basic_consume(queue, ShortString::from(""), BasicConsumeOptions::default(), FieldTable::default());
        let consumer = consume.await.map_err(|error| in_use(spec, error))?;
        Ok(Self {
            consumer,
            channel,
            session,
            queue: spec.name.clone(),
            ack_timeout: broker.options.confirm_timeout,
            acks: Acks::default(),
            failed: None,
        })
    }

    fn fail(&mut self, error: BrokerError) -> BrokerError {
        self.failed.get_or_insert(error).clone()
    }
}

impl Drop for RabbitSubscription {
    /// lapin cancels a consumer it drops, before it closes the channel. In between the broker turns to the next
    /// consumer, with newer messages than those still unacknowledged here: the order of keys would be lost.
    fn drop(&mut self) {
        self.session.cut();
    }
}

impl Subscription for RabbitSubscription {
    async fn next(&mut self) -> Result<Delivery, BrokerError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match self.consumer.next().await {
            Some(Ok(delivery)) => {
                self.acks.delivered(delivery.delivery_tag);
                Ok(wire::delivery(delivery))
            }
            Some(Err(error)) => Err(self.fail(session::lost(&error))),
            None => {
                let text = format!("the broker cancelled the consumer: was queue \"{}\" deleted?", self.queue);
                Err(self.fail(BrokerError::ConnectionLost(text)))
            }
        }
    }

    async fn ready(&mut self) -> Result<u32, BrokerError> {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = short("queue", &self.queue)?;
        let asked = self.channel.queue_declare(queue, options, FieldTable::default());
        match tokio::time::timeout(self.ack_timeout, asked).await {
            Ok(Ok(queue)) => Ok(queue.message_count()),
            Ok(Err(error)) => Err(self.fail(session::lost(&error))),
            Err(_) => {
                self.session.cut();
                let limit = self.ack_timeout;
                Err(self.fail(BrokerError::TimedOut { what: "the queue's length", limit }))
            }
        }
    }

    async fn ack(&mut self, tag: u64) -> Result<(), BrokerError> {
        self.ack_all(&[tag]).await
    }

    /// As few frames as may be; together they are one wake of lapin's thread, and one write.
    async fn ack_all(&mut self, tags: &[u64]) -> Result<(), BrokerError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let (channel, limit) = (&self.channel, self.ack_timeout);
        let frames = self.acks.frames(tags);
        let sent =
            join_all(frames.iter().map(|ack| channel.basic_ack(ack.tag, BasicAckOptions { multiple: ack.multiple })));
        match tokio::time::timeout(limit, sent).await {
            Ok(results) => match results.into_iter().find_map(Result::err) {
                None => Ok(()),
                Some(error) => Err(self.fail(session::lost(&error))),
            },
            Err(_) => {
                self.session.cut();
                Err(self.fail(BrokerError::TimedOut { what: "an acknowledgement", limit }))
            }
        }
    }

    async fn close(mut self) {
        self.session.close().await;
    }
}

pub(super) async fn declare_queue(
    broker: &RabbitMq,
    channel: &Channel,
    spec: &QueueSpec,
    major: u32,
) -> Result<(), BrokerError> {
    let mut arguments = FieldTable::default();
    let mut asked = vec!["x-queue-type=quorum"];
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    if spec.single_active_consumer {
        asked.push("x-single-active-consumer=true");
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    }
    if major >= DELIVERY_LIMIT_SINCE_MAJOR {
        asked.push("x-delivery-limit=-1");
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(-1));
    }
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(short("queue", &spec.name)?, options, arguments).await;
    declared.map(drop).map_err(|error| {
        let mend = format!("delete it, or declare it durable with {}", asked.join(", "));
        session::topology(broker, "queue", &spec.name, &mend, &error)
    })
}

/// The broker deletes an exclusive queue with the connection that declared it.
async fn declare_private_queue(broker: &RabbitMq, channel: &Channel, spec: &QueueSpec) -> Result<(), BrokerError> {
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(short("queue", &spec.name)?, options, FieldTable::default()).await;
    declared.map(drop).map_err(|error| session::topology(broker, "queue", &spec.name, "give it another name", &error))
}

/// Why the queue may not be consumed from.
fn in_use(spec: &QueueSpec, error: lapin::Error) -> BrokerError {
    match error.kind() {
        ErrorKind::ProtocolError(protocol) if protocol.get_id() == 403 => BrokerError::Topology {
            kind: "queue",
            name: spec.name.clone(),
            reason: format!(
                "may not be consumed from ({}): stop its exclusive consumer, or grant the user read permission",
                protocol.get_message()
            ),
        },
        _ => session::lost(&error),
    }
}
