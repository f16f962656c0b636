//! What was on the wire: a queue of the demo's own, bound to everything, read after the relays have stopped.

use super::deliveries;
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::broker::{Broker, Outcome, Publisher, QueueSpec, Subscription};
use crate::message::{Delivery, Envelope, Headers, Message, MessageId, Position};
use anyhow::{Context, bail};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;
use uuid::Uuid;

const EXCHANGE: &str = "oncebox";
/// Routed to the tap alone, as its last message.
const END: &str = "demo.end";
/// Longest silence before the tap's last message.
const SILENCE: Duration = Duration::from_secs(20);
/// Enough that the broker never waits for an acknowledgement.
const PREFETCH: u16 = 2_000;

/// The tap, and the queue of the consumers as they declare it: both are there before the first order, or messages
/// would be parked as unroutable.
pub async fn declare(amqp_url: &str) -> anyhow::Result<()> {
    let broker = broker(amqp_url)?;
    let billing = QueueSpec {
        name: "billing".to_owned(),
        exchange: EXCHANGE.to_owned(),
        bindings: vec!["order.placed".to_owned(), "customer.closed".to_owned()],
        single_active_consumer: true,
        voids: false,
    };
    for queue in [billing, tap()].into_iter().chain(deliveries::queues(EXCHANGE)) {
        broker.subscribe(&queue, 1).await.with_context(|| format!("queue \"{}\"", queue.name))?.close().await;
    }
    Ok(())
}

fn broker(amqp_url: &str) -> anyhow::Result<RabbitMq> {
    let mut options = RabbitMqOptions::new(amqp_url);
    options.connection_name = "oncebox demo".to_owned();
    Ok(RabbitMq::new(options)?)
}

fn tap() -> QueueSpec {
    QueueSpec {
        name: "demo-tap".to_owned(),
        exchange: EXCHANGE.to_owned(),
        bindings: vec!["#".to_owned()],
        single_active_consumer: false,
        voids: false,
    }
}

/// Reads the tap to its end. The relays must have stopped: the end is a message behind all of theirs.
pub async fn read(amqp_url: &str) -> anyhow::Result<Wire> {
    let broker = broker(amqp_url)?;
    publish_end(&broker).await?;
    let mut subscription = broker.subscribe(&tap(), PREFETCH).await?;
    let mut wire = Wire::default();
    loop {
        let delivery = tokio::time::timeout(SILENCE, subscription.next()).await.context("the tap is silent")??;
        subscription.ack(delivery.tag).await?;
        if delivery.topic == END {
            break;
        }
        wire.observe(&delivery);
    }
    subscription.close().await;
    Ok(wire)
}

async fn publish_end(broker: &RabbitMq) -> anyhow::Result<()> {
    let message = Message {
        id: MessageId(Uuid::now_v7()),
        topic: END.to_owned(),
        key: None,
        content_type: "text/plain".to_owned(),
        headers: Headers::new(),
        body: Vec::new(),
        published_at_s: 0,
    };
    let position = Position { source: Uuid::nil(), stream: END.to_owned(), offset: 1 };
    let mut publisher = broker.publisher(EXCHANGE).await?;
    publisher.publish(0, &Envelope { message, position, ordinal: 1 }).await?;
    let mut outcomes = Vec::new();
    while outcomes.is_empty() {
        publisher.outcomes(&mut outcomes).await?;
    }
    publisher.close().await;
    match outcomes.pop() {
        Some((_, Outcome::Confirmed)) => Ok(()),
        other => bail!("the tap's last message was not confirmed: {other:?}"),
    }
}

/// Everything that was seen, message by message.
#[derive(Debug, Default)]
pub struct Wire {
    by_place: HashMap<(Uuid, String, i64), String>,
    /// Every message id seen.
    pub ids: HashSet<String>,
    last_of_key: HashMap<String, i64>,
    /// Deliveries of a place that was seen before.
    pub duplicates: u64,
    /// Duplicates that carried another message id than the first of their place, and ids seen at two places.
    pub changed: u64,
    /// First occurrences that came after a later one of their key.
    pub out_of_order: u64,
    /// Deliveries without id, place or key: not of the shop.
    pub foreign: u64,
}

impl Wire {
    /// Takes note of the next delivery, in the order of the queue.
    pub fn observe(&mut self, delivery: &Delivery) {
        let body: Option<serde_json::Value> = serde_json::from_slice(&delivery.body).ok();
        let number = body.and_then(|body| body.get("number")?.as_i64());
        let (Some(id), Some(place), Some(key)) = (&delivery.message_id, delivery.position(), delivery.key()) else {
            self.foreign += 1;
            return;
        };
        if let Some(first) = self.by_place.get(&(place.source, place.stream.clone(), place.offset)) {
            self.duplicates += 1;
            self.changed += u64::from(first != id);
            return;
        }
        self.by_place.insert((place.source, place.stream, place.offset), id.clone());
        self.changed += u64::from(!self.ids.insert(id.clone()));
        // Commands and replies of sagas carry no number of a customer's.
        if let Some(number) = number {
            let last = self.last_of_key.entry(key.to_owned()).or_default();
            self.out_of_order += u64::from(number <= *last);
            *last = number.max(*last);
        }
    }

    /// Different places.
    pub fn distinct(&self) -> u64 {
        self.by_place.len() as u64
    }

    /// Streams, and offsets that are missing in them between 1 and their highest.
    pub fn streams_and_gaps(&self) -> (u64, u64) {
        let mut streams: BTreeMap<(Uuid, &str), (i64, i64)> = BTreeMap::new();
        for (source, stream, offset) in self.by_place.keys() {
            let (count, highest) = streams.entry((*source, stream)).or_default();
            *count += 1;
            *highest = (*highest).max(*offset);
        }
        let gaps = streams.values().map(|(count, highest)| (highest - count) as u64).sum();
        (streams.len() as u64, gaps)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::message::header;
    use serde_json::{Value, json};

    /// A delivery of the shop's: message id, offset, key, number.
    pub fn delivery(id: &str, offset: i64, key: &str, number: i64) -> Delivery {
        let headers = [
            (header::SOURCE, json!(Uuid::nil().to_string())),
            (header::STREAM, json!("order.placed#0")),
            (header::OFFSET, json!(offset)),
            (header::KEY, json!(key)),
        ];
        Delivery {
            tag: 0,
            message_id: Some(id.to_owned()),
            topic: "order.placed".to_owned(),
            content_type: None,
            headers: headers.into_iter().map(|(name, value): (&str, Value)| (name.to_owned(), value)).collect(),
            body: json!({ "number": number }).to_string().into_bytes(),
            redelivered: false,
        }
    }

    fn wire(deliveries: &[(&str, i64, &str, i64)]) -> Wire {
        let mut wire = Wire::default();
        for (id, offset, key, number) in deliveries {
            wire.observe(&delivery(id, *offset, key, *number));
        }
        wire
    }

    /// Goal: a replay of the same messages is duplicates and nothing worse.
    #[test]
    fn replays_are_duplicates() {
        let wire = wire(&[("a", 1, "k", 1), ("b", 2, "k", 2), ("a", 1, "k", 1), ("b", 2, "k", 2), ("c", 3, "l", 1)]);
        assert_eq!((wire.distinct(), wire.duplicates, wire.changed, wire.out_of_order), (3, 2, 0, 0));
        assert_eq!(wire.streams_and_gaps(), (1, 0));
    }

    /// Goal: each way in which a relay could break its promise is seen.
    #[test]
    fn broken_promises_are_seen() {
        assert_eq!(wire(&[("a", 1, "k", 1), ("b", 1, "k", 1)]).changed, 1, "an offset given twice");
        assert_eq!(wire(&[("a", 1, "k", 1), ("a", 2, "k", 2)]).changed, 1, "a message at two places");
        assert_eq!(wire(&[("b", 1, "k", 2), ("a", 2, "k", 1)]).out_of_order, 1, "a key out of order");
        assert_eq!(wire(&[("b", 1, "k", 2), ("a", 2, "l", 1)]).out_of_order, 0, "keys are independent");
        assert_eq!(wire(&[("a", 2, "k", 1)]).streams_and_gaps(), (1, 1), "an offset left out");
        let mut foreign = Wire::default();
        foreign.observe(&Delivery { message_id: None, ..delivery("a", 1, "k", 1) });
        assert_eq!((foreign.foreign, foreign.distinct()), (1, 0));
    }
}
