//! What was on the wire: a queue of its own, read to the end and held against what was published.

use super::{LIMIT, Lab};
use oncebox::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use oncebox::broker::{Broker, QueueSpec, Subscription};
use oncebox::message::{Delivery, Position};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

/// A durable queue that sees every message of a vhost.
pub struct Tap {
    amqp_url: String,
    broker: RabbitMq,
    queue: QueueSpec,
}

impl Tap {
    pub async fn on(lab: &Lab) -> Self {
        Self::bound(lab, "tap", &["#"]).await
    }

    pub async fn bound(lab: &Lab, name: &str, bindings: &[&str]) -> Self {
        let mut options = RabbitMqOptions::new(&lab.amqp_url);
        options.connection_name = "tap".to_owned();
        let tap = Self {
            amqp_url: lab.amqp_url.clone(),
            broker: RabbitMq::new(options).expect("a valid URL"),
            queue: QueueSpec {
                name: name.to_owned(),
                exchange: "oncebox".to_owned(),
                bindings: bindings.iter().map(|binding| binding.to_string()).collect(),
                single_active_consumer: false,
                voids: false,
            },
        };
        tap.broker.subscribe(&tap.queue, 1).await.expect("the tap is declared").close().await;
        tap
    }

    /// A tap whose queue nacks beyond so many messages, until they are read.
    pub async fn limited(lab: &Lab, name: &str, bindings: &[&str], room: u32) -> Self {
        let policy = format!(r#"{{"max-length": {room}, "overflow": "reject-publish"}}"#);
        let set = ["set_policy", "-p", &lab.name, name, &format!("^{name}$"), &policy, "--apply-to", "queues"];
        lab.rabbit.ctl(&set).await.expect("a policy");
        Self::bound(lab, name, bindings).await
    }

    /// How many messages lie in its queue.
    pub async fn depth(&self) -> u32 {
        let connection = lapin::Connection::connect(&self.amqp_url, Default::default()).await.expect("connects");
        let channel = connection.create_channel().await.expect("a channel");
        let passive = lapin::options::QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = channel.queue_declare(self.queue.name.as_str().into(), passive, Default::default()).await;
        queue.expect("the tap is there").message_count()
    }

    /// Reads until `distinct` different messages were seen and nothing more comes for a moment.
    pub async fn read(&self, distinct: usize) -> Wire {
        let began = Instant::now();
        let mut seen = HashSet::new();
        let mut deliveries = Vec::new();
        let mut subscription = self.broker.subscribe(&self.queue, 2_000).await.expect("the tap is there");
        loop {
            let wait = if seen.len() >= distinct { Duration::from_millis(500) } else { Duration::from_secs(15) };
            match tokio::time::timeout(wait, subscription.next()).await {
                Ok(delivery) => {
                    let delivery = delivery.expect("the broker stays");
                    subscription.ack(delivery.tag).await.expect("the broker stays");
                    seen.insert(delivery.position());
                    deliveries.push(delivery);
                }
                Err(_) => break,
            }
            assert!(began.elapsed() < 2 * LIMIT, "{} of {distinct} messages after {:?}", seen.len(), began.elapsed());
        }
        subscription.close().await;
        Wire { deliveries }
    }
}

/// Everything a tap saw, in order.
pub struct Wire {
    pub deliveries: Vec<Delivery>,
}

/// A message the test committed, as it should arrive.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Published {
    pub id: String,
    pub key: Option<String>,
}

impl Wire {
    /// Deliveries of messages that were seen before.
    pub fn duplicates(&self) -> usize {
        let distinct: HashSet<_> = self.deliveries.iter().map(Delivery::position).collect();
        self.deliveries.len() - distinct.len()
    }

    /// Every committed message is there and nothing else; offsets are dense from 1 in each stream, and every copy of
    /// a message has the same; of each key, first arrivals are in the order of `committed`.
    pub fn assert_exactly(&self, committed: &[Published]) {
        let mut place_of: HashMap<&str, Position> = HashMap::new();
        let mut firsts: HashMap<Option<&str>, Vec<&str>> = HashMap::new();
        let mut offsets: BTreeMap<String, BTreeMap<i64, &str>> = BTreeMap::new();
        for delivery in &self.deliveries {
            let id = delivery.message_id.as_deref().expect("the relay sets message_id");
            let position = delivery.position().expect("the relay sets its headers");
            match place_of.get(id) {
                Some(known) => assert_eq!(known, &position, "{id} came at two places"),
                None => {
                    let other = offsets.entry(position.stream.clone()).or_default().insert(position.offset, id);
                    assert_eq!(other, None, "two messages at {position:?}: {id}");
                    place_of.insert(id, position);
                    firsts.entry(delivery.key()).or_default().push(id);
                }
            }
        }
        let expected: HashSet<&str> = committed.iter().map(|message| message.id.as_str()).collect();
        let arrived: HashSet<&str> = place_of.keys().copied().collect();
        let lost: Vec<_> = expected.difference(&arrived).take(5).collect();
        let ghosts: Vec<_> = arrived.difference(&expected).take(5).collect();
        assert!(lost.is_empty(), "{} lost, e.g. {lost:?}", expected.difference(&arrived).count());
        assert!(ghosts.is_empty(), "{} ghosts, e.g. {ghosts:?}", arrived.difference(&expected).count());
        for (stream, offsets) in &offsets {
            let found: Vec<i64> = offsets.keys().copied().collect();
            assert!(found.iter().copied().eq(1..=found.len() as i64), "offsets of {stream} are not dense");
        }
        let mut order: HashMap<Option<&str>, Vec<&str>> = HashMap::new();
        for message in committed {
            order.entry(message.key.as_deref()).or_default().push(&message.id);
        }
        for (key, ids) in order.iter().filter(|(key, _)| key.is_some()) {
            assert_eq!(&firsts[key], ids, "the order of key {key:?}");
        }
    }
}
