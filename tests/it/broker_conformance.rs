//! One suite for both brokers: what the relay and the consumer rely on holds on RabbitMQ and in memory alike,
//! or tests on the one in memory prove nothing.

use crate::support::{TestRabbit, own_rabbit, rabbit};
use futures_util::FutureExt;
use lapin::options::{
    BasicGetOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties};
use oncebox::broker::memory::{Fault, MemoryBroker};
use oncebox::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use oncebox::broker::{Broker, BrokerError, Outcome, Publisher, QueueSpec, Subscription};
use oncebox::message::{Delivery, Envelope, Message, MessageId, Position, Void, header};
use serde_json::json;
use std::future::Future;
use std::time::{Duration, Instant};
use uuid::Uuid;

const EXCHANGE: &str = "oncebox";
const SOURCE: Uuid = Uuid::from_u128(0x0b0c);
const PATIENCE: Duration = Duration::from_secs(30);

/// What a case needs of a broker beyond the port.
trait Place {
    type Broker: Broker;
    fn broker(&self) -> &Self::Broker;
    /// Makes a queue for `full.#` that takes one message and refuses the rest.
    async fn fill(&self);
}

struct InMemory(MemoryBroker);

impl Place for InMemory {
    type Broker = MemoryBroker;
    fn broker(&self) -> &MemoryBroker {
        &self.0
    }
    async fn fill(&self) {
        drop(self.0.subscribe(&spec("full", &["full.#"]), 1).await.unwrap());
        self.0.inject(Fault::Nack, usize::MAX, |envelope| {
            envelope.message.topic.starts_with("full.") && envelope.position.offset > 12
        });
    }
}

struct OnRabbit {
    broker: RabbitMq,
    url: String,
}

impl OnRabbit {
    async fn fresh() -> Self {
        let node = rabbit().await;
        Self::at(node.url(&node.fresh_vhost().await))
    }

    fn at(url: String) -> Self {
        Self { broker: RabbitMq::new(RabbitMqOptions::new(&url)).unwrap(), url }
    }

    fn with(&self, change: impl FnOnce(&mut RabbitMqOptions)) -> RabbitMq {
        let mut options = RabbitMqOptions::new(&self.url);
        change(&mut options);
        RabbitMq::new(options).unwrap()
    }

    async fn channel(&self) -> (Connection, lapin::Channel) {
        let connection = Connection::connect(&self.url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        (connection, channel)
    }
}

impl Place for OnRabbit {
    type Broker = RabbitMq;
    fn broker(&self) -> &RabbitMq {
        &self.broker
    }
    async fn fill(&self) {
        // The exchange is the publisher's to declare.
        self.broker.publisher(EXCHANGE).await.unwrap().close().await;
        let (_connection, channel) = self.channel().await;
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
        arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare("full".into(), durable, arguments).await.unwrap();
        let bind = QueueBindOptions::default();
        channel.queue_bind("full".into(), EXCHANGE.into(), "full.#".into(), bind, FieldTable::default()).await.unwrap();
    }
}

macro_rules! on_both {
    ($($case:ident),* $(,)?) => {
        mod memory {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $case() {
                super::$case(&super::InMemory(super::MemoryBroker::new())).await;
            })*
        }
        mod rabbitmq {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $case() {
                super::$case(&super::OnRabbit::fresh().await).await;
            })*
        }
    };
}

on_both!(
    confirmed_messages_arrive_in_order,
    returns_are_exact_under_pipelining,
    nacks_are_kept_apart_from_returns,
    bodies_and_headers_arrive_equal,
    acks_are_single,
    acks_out_of_order_leave_what_is_open,
    a_dropped_subscription_gives_its_deliveries_back,
    one_active_consumer_takes_over_from_another,
    only_bound_topics_arrive,
    an_ack_of_an_unknown_delivery_ends_the_session,
    outcomes_may_be_cancelled,
    void_notices_reach_who_asked_for_them,
    a_queue_of_ones_own_goes_with_its_session,
);

fn spec(name: &str, bindings: &[&str]) -> QueueSpec {
    QueueSpec {
        name: name.to_owned(),
        exchange: EXCHANGE.to_owned(),
        bindings: bindings.iter().map(ToString::to_string).collect(),
        single_active_consumer: false,
        voids: false,
    }
}

/// The `n`-th message of a test, from 1: its body is `n`, its offset too.
fn envelope(topic: &str, n: i64) -> Envelope {
    Envelope {
        message: Message {
            id: MessageId(Uuid::from_u128(n as u128)),
            topic: topic.to_owned(),
            key: None,
            content_type: "text/plain".to_owned(),
            headers: Default::default(),
            body: n.to_string().into_bytes(),
            published_at_s: 1_700_000_000,
        },
        position: Position { source: SOURCE, stream: format!("{topic}#0"), offset: n },
        ordinal: n,
    }
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} took over {PATIENCE:?}"),
    }
}

/// Publishes all, taking outcomes only when there is no room left; answers the outcomes in publishing order.
async fn publish(publisher: &mut impl Publisher, envelopes: &[Envelope]) -> Result<Vec<Outcome>, BrokerError> {
    let ticket = |index: usize| 1_000_003 * (index as u64 + 1);
    let mut outcomes = vec![None; envelopes.len()];
    let (mut sent, mut settled, mut batch) = (0, 0, Vec::new());
    while settled < envelopes.len() {
        while sent < envelopes.len() && publisher.capacity() > 0 {
            publisher.publish(ticket(sent), &envelopes[sent]).await?;
            sent += 1;
        }
        assert_eq!(publisher.unconfirmed(), sent - settled);
        soon("an outcome", publisher.outcomes(&mut batch)).await?;
        settled += batch.len();
        for (got, outcome) in batch.drain(..) {
            let index = (got / 1_000_003) as usize - 1;
            assert_eq!(got, ticket(index), "a ticket nobody gave");
            assert_eq!(outcomes[index].replace(outcome), None, "two outcomes for one ticket");
        }
    }
    Ok(outcomes.into_iter().map(|outcome| outcome.expect("each has one")).collect())
}

async fn receive(subscription: &mut impl Subscription, n: usize) -> Vec<Delivery> {
    let mut deliveries = Vec::with_capacity(n);
    while deliveries.len() < n {
        deliveries.push(soon("a delivery", subscription.next()).await.unwrap());
    }
    deliveries
}

fn numbers(deliveries: &[Delivery]) -> Vec<i64> {
    deliveries.iter().map(|delivery| delivery.position().expect("one of ours").offset).collect()
}

fn returned(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Returned { code: 312, text } if text == "NO_ROUTE")
}

// Goal: what is confirmed is there, once and in order, over more messages than fit in flight.
async fn confirmed_messages_arrive_in_order(place: &impl Place) {
    let mut subscription = place.broker().subscribe(&spec("q", &["t"]), 500).await.unwrap();
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    assert!(publisher.capacity() >= 5_000 && publisher.unconfirmed() == 0 && !publisher.is_blocked());
    let all: Vec<_> = (1..=6_000).map(|n| envelope("t", n)).collect();
    let outcomes = publish(&mut publisher, &all).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Confirmed));
    for n in 1..=6_000 {
        let delivery = soon("a delivery", subscription.next()).await.unwrap();
        assert_eq!((numbers(std::slice::from_ref(&delivery)), delivery.redelivered), (vec![n], false));
        subscription.ack(delivery.tag).await.unwrap();
    }
    subscription.close().await;
    publisher.close().await;
}

// Goal: of many messages in flight each gets its own outcome. Two share each message id, so nothing may be told by
// it; lapin's own pairing of returns and confirms fails here.
async fn returns_are_exact_under_pipelining(place: &impl Place) {
    drop(place.broker().subscribe(&spec("q", &["t"]), 1).await.unwrap());
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    for round in 0..3 {
        let all: Vec<_> = (1..=3_000)
            .map(|n| {
                let mut envelope = envelope(if n % 12 == 5 { "nowhere" } else { "t" }, n + round * 3_000);
                envelope.message.id = MessageId(Uuid::from_u128(n as u128 / 2));
                envelope
            })
            .collect();
        let outcomes = publish(&mut publisher, &all).await.unwrap();
        let wrong = all.iter().zip(&outcomes).filter(|(sent, outcome)| match sent.message.topic.as_str() {
            "nowhere" => !returned(outcome),
            _ => **outcome != Outcome::Confirmed,
        });
        assert_eq!(wrong.count(), 0, "messages with another's outcome");
    }
}

// Goal: a full queue's refusal and a missing route are told apart, also in one flight.
async fn nacks_are_kept_apart_from_returns(place: &impl Place) {
    place.fill().await;
    drop(place.broker().subscribe(&spec("q", &["t"]), 1).await.unwrap());
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    publish(&mut publisher, &[envelope("full.x", 1)]).await.unwrap();
    let topics = ["t", "full.x", "nowhere", "t", "t", "full.x", "t", "nowhere"];
    let all: Vec<_> = (13..=1_012).map(|n| envelope(topics[n as usize % topics.len()], n)).collect();
    let outcomes = publish(&mut publisher, &all).await.unwrap();
    for (sent, outcome) in all.iter().zip(&outcomes) {
        let right = match sent.message.topic.as_str() {
            "t" => *outcome == Outcome::Confirmed,
            "full.x" => *outcome == Outcome::Nacked,
            _ => returned(outcome),
        };
        assert!(right, "{}: {outcome:?}", sent.position.stream);
    }
}

// Goal: every byte and every header type arrives as it was published.
async fn bodies_and_headers_arrive_equal(place: &impl Place) {
    let mut subscription = place.broker().subscribe(&spec("q", &["#"]), 50).await.unwrap();
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    let bodies = [Vec::new(), vec![0], b"{\"a\": 1.0}".to_vec(), vec![0xff; 1_000], vec![7; 1024 * 1024]];
    let mut sent = Vec::new();
    for (index, body) in bodies.into_iter().enumerate() {
        let mut envelope = envelope(&"äöü.".repeat(36), index as i64 + 1);
        envelope.message.body = body;
        envelope.message.key = (index % 2 == 0).then(|| "Käthe ☃".to_owned());
        envelope.message.content_type = "application/x-thing; v=1".to_owned();
        envelope.message.headers = json!({
            "text": "é☃", "empty": "", "long": "x".repeat(5_000), "yes": true, "no": false, "zero": 0, "min": i64::MIN,
            "max": i64::MAX, "half": 0.5, "whole": 2.0, "tiny": 5e-324, "huge": 1.7976931348623157e308, "below": -1.25,
            "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "": "nameless",
        })
        .as_object()
        .unwrap()
        .clone();
        sent.push(envelope);
    }
    let outcomes = publish(&mut publisher, &sent).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Confirmed));
    for (envelope, delivery) in sent.iter().zip(receive(&mut subscription, sent.len()).await) {
        let message = &envelope.message;
        assert_eq!(delivery.position().as_ref(), Some(&envelope.position));
        assert_eq!(delivery.key(), message.key.as_deref());
        assert_eq!(delivery.message_id, Some(message.id.to_string()));
        assert_eq!(delivery.topic, message.topic);
        assert_eq!(delivery.content_type.as_ref(), Some(&message.content_type));
        assert!(delivery.body == message.body, "{} bytes arrived as {}", message.body.len(), delivery.body.len());
        let ours = |name: &String| name.starts_with("oncebox-");
        let theirs: serde_json::Map<_, _> = delivery.headers.into_iter().filter(|(name, _)| !ours(name)).collect();
        assert_eq!(theirs, message.headers);
        assert!(theirs["whole"].is_f64() && theirs["zero"].is_i64(), "a number changed its type");
    }
}

// Goal: a session's own queue gets what is bound to it, is nobody else's, and is gone when the session ended, in order or
// not: the same name can be taken again, and what was not acknowledged does not come back.
async fn a_queue_of_ones_own_goes_with_its_session(place: &impl Place) {
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    for in_order in [true, false] {
        let mut own = soon("the queue", async {
            loop {
                match place.broker().listen(&spec("own", &["own.*"]), 10).await {
                    Ok(own) => break own,
                    // The broker has not noticed yet that its connection is gone.
                    Err(error) => assert!(matches!(error, BrokerError::Topology { .. }), "{error}"),
                }
                tokio::task::yield_now().await;
            }
        })
        .await;
        let taken = place.broker().listen(&spec("own", &["own.*"]), 10).await.err().expect("it has an owner");
        assert!(matches!(taken, BrokerError::Topology { kind: "queue", .. }), "{taken}");
        let outcomes = publish(&mut publisher, &[envelope("own.a", 1), envelope("own.b", 2)]).await.unwrap();
        assert_eq!(outcomes, [Outcome::Confirmed, Outcome::Confirmed]);
        let deliveries = receive(&mut own, 2).await;
        assert_eq!(numbers(&deliveries), [1, 2]);
        own.ack(deliveries[0].tag).await.unwrap();
        if in_order {
            own.close().await;
        } else {
            drop(own);
        }
    }
    soon("the end of the queue", async {
        let topic = "own.a";
        while !returned(&publish(&mut publisher, &[envelope(topic, 3)]).await.unwrap()[0]) {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

// Goal: an acknowledgement is for one delivery, not for those before it.
async fn acks_are_single(place: &impl Place) {
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    let mut first = place.broker().subscribe(&spec("q", &["t"]), 10).await.unwrap();
    let all: Vec<_> = (1..=10).map(|n| envelope("t", n)).collect();
    publish(&mut publisher, &all).await.unwrap();
    let deliveries = receive(&mut first, 10).await;
    for index in [7, 2] {
        first.ack(deliveries[index].tag).await.unwrap();
    }
    first.close().await;
    let mut second = place.broker().subscribe(&spec("q", &["t"]), 10).await.unwrap();
    let again = receive(&mut second, 8).await;
    assert_eq!(numbers(&again), [1, 2, 4, 5, 6, 7, 9, 10]);
    assert!(again.iter().all(|delivery| delivery.redelivered));
}

// Goal: deliveries that are acknowledged in any order, many at once and with gaps, are gone; those between them, and they
// alone, come back in order. What is open moves: the front closes, and gaps are filled behind others that stay.
async fn acks_out_of_order_leave_what_is_open(place: &impl Place) {
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    let mut first = place.broker().subscribe(&spec("q", &["t"]), 50).await.unwrap();
    let all: Vec<_> = (1..=60).map(|n| envelope("t", n)).collect();
    publish(&mut publisher, &all).await.unwrap();
    let mut deliveries = receive(&mut first, 50).await;
    let calls: [&[i64]; 6] = [
        &[30, 12, 11, 31],               // nothing at the front
        &[5, 2, 1, 4, 8],                // the front up to 2
        &[3, 9],                         // 3 alone: 4 and 5 are done
        &[40, 6, 7, 10, 13, 14, 33, 32], // the front up to 14, over what is done
        &[50, 49, 47],
        &[22, 15, 16, 35, 17],
    ];
    for call in calls {
        let tags: Vec<_> = call.iter().map(|n| deliveries[*n as usize - 1].tag).collect();
        first.ack_all(&tags).await.unwrap();
    }
    // The ones behind the fiftieth came for those that are done.
    deliveries.extend(receive(&mut first, 10).await);
    assert_eq!(numbers(&deliveries), (1..=60).collect::<Vec<_>>());
    first.ack_all(&[deliveries[54].tag, deliveries[17].tag]).await.unwrap();
    first.close().await;
    let mut second = place.broker().subscribe(&spec("q", &["t"]), 100).await.unwrap();
    let done = calls.concat().into_iter().chain([55, 18]).collect::<Vec<_>>();
    let open: Vec<_> = (1..=60).filter(|n| !done.contains(n)).collect();
    let again = receive(&mut second, open.len()).await;
    assert_eq!(numbers(&again), open);
    assert!(again.iter().all(|delivery| delivery.redelivered));
    // What else had come back would be here before this one.
    publish(&mut publisher, &[envelope("t", 61)]).await.unwrap();
    assert_eq!(numbers(&receive(&mut second, 1).await), [61]);
}

// Goal: what a crashed consumer held comes back before what is newer, behind what came back before it: a consumer
// that dies with the first of four returned messages in hand puts it after the other three.
async fn a_dropped_subscription_gives_its_deliveries_back(place: &impl Place) {
    let alone = QueueSpec { single_active_consumer: true, ..spec("q", &["t"]) };
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    let mut first = place.broker().subscribe(&alone, 4).await.unwrap();
    let mut second = place.broker().subscribe(&alone, 1).await.unwrap();
    let mut third = place.broker().subscribe(&alone, 20).await.unwrap();
    let all: Vec<_> = (1..=10).map(|n| envelope("t", n)).collect();
    publish(&mut publisher, &all).await.unwrap();
    assert_eq!(numbers(&receive(&mut first, 4).await), [1, 2, 3, 4]);
    drop(first);
    assert_eq!(numbers(&receive(&mut second, 1).await), [1]);
    drop(second);
    let again = receive(&mut third, 10).await;
    assert_eq!(numbers(&again), [2, 3, 4, 1, 5, 6, 7, 8, 9, 10]);
    let redelivered: Vec<_> = again.iter().map(|delivery| delivery.redelivered).collect();
    assert_eq!(redelivered, [[true; 4].as_slice(), &[false; 6]].concat());
}

// Goal: with a single active consumer the second gets nothing until the first is gone, and then everything.
async fn one_active_consumer_takes_over_from_another(place: &impl Place) {
    let alone = QueueSpec { single_active_consumer: true, ..spec("q", &["t"]) };
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    let mut first = place.broker().subscribe(&alone, 5).await.unwrap();
    let mut second = place.broker().subscribe(&alone, 5).await.unwrap();
    let all: Vec<_> = (1..=20).map(|n| envelope("t", n)).collect();
    publish(&mut publisher, &all).await.unwrap();
    for n in 1..=15 {
        let delivery = receive(&mut first, 1).await.remove(0);
        assert_eq!(delivery.position().unwrap().offset, n);
        first.ack(delivery.tag).await.unwrap();
    }
    assert_eq!(numbers(&receive(&mut first, 5).await), [16, 17, 18, 19, 20]);
    assert!(second.next().now_or_never().is_none(), "two consumers were active");
    drop(first);
    assert_eq!(numbers(&receive(&mut second, 5).await), [16, 17, 18, 19, 20]);
}

// Goal: a queue gets what its patterns name, once each, and nothing else.
async fn only_bound_topics_arrive(place: &impl Place) {
    let mut subscription = place.broker().subscribe(&spec("q", &["a.*", "b.#", "b.c", "end"]), 50).await.unwrap();
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    let topics = ["a.x", "a.x.y", "a", "b", "b.c", "b.c.d.e", "c", "end"];
    let all: Vec<_> = topics.iter().zip(1..).map(|(topic, n)| envelope(topic, n)).collect();
    let outcomes = publish(&mut publisher, &all).await.unwrap();
    let unrouted: Vec<_> = topics.iter().zip(&outcomes).filter(|(_, o)| returned(o)).map(|(t, _)| *t).collect();
    assert_eq!(unrouted, ["a.x.y", "a", "c"]);
    assert_eq!(numbers(&receive(&mut subscription, 5).await), [1, 4, 5, 6, 8]);
}

// Goal: a wrong tag is an error of the session, not silence.
async fn an_ack_of_an_unknown_delivery_ends_the_session(place: &impl Place) {
    let mut subscription = place.broker().subscribe(&spec("q", &["t"]), 10).await.unwrap();
    let _ = subscription.ack(99).await;
    let error = soon("the end", subscription.next()).await.unwrap_err();
    assert!(matches!(error, BrokerError::ChannelClosed { code: 406, .. }), "{error}");
    assert!(subscription.next().await.is_err() && subscription.ack(1).await.is_err());
}

// Goal: dropping `outcomes` loses none, and it pends while nothing is unconfirmed.
async fn outcomes_may_be_cancelled(place: &impl Place) {
    drop(place.broker().subscribe(&spec("q", &["t"]), 1).await.unwrap());
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    let mut outcomes = Vec::new();
    assert!(publisher.outcomes(&mut outcomes).now_or_never().is_none());
    for n in 1..=500 {
        publisher.publish(n as u64, &envelope("t", n)).await.unwrap();
        if let Some(result) = publisher.outcomes(&mut outcomes).now_or_never() {
            result.unwrap();
        }
        while publisher.capacity() == 0 {
            soon("an outcome", publisher.outcomes(&mut outcomes)).await.unwrap();
        }
    }
    while outcomes.len() < 500 {
        soon("an outcome", publisher.outcomes(&mut outcomes)).await.unwrap();
    }
    let mut tickets: Vec<_> = outcomes.iter().map(|(ticket, _)| *ticket).collect();
    tickets.sort_unstable();
    assert_eq!(tickets, (1..=500).collect::<Vec<_>>());
    assert_eq!(publisher.unconfirmed(), 0);
}

// Goal: a void notice is confirmed, arrives at every queue that asked for them and at no other, whatever their bindings,
// and says which offset will not come and why; without such a queue it is confirmed and gone.
async fn void_notices_reach_who_asked_for_them(place: &impl Place) {
    let void = |offset| Void {
        position: Position { source: SOURCE, stream: "t#0".to_owned(), offset },
        topic: "t".to_owned(),
        message_id: MessageId(Uuid::from_u128(7)),
        reason: "expired".to_owned(),
    };
    let mut all = place.broker().subscribe(&spec("all", &["#"]), 10).await.unwrap();
    let mut publisher = place.broker().publisher(EXCHANGE).await.unwrap();
    let mut outcomes = Vec::new();
    publisher.publish_void(1, &void(1)).await.unwrap();
    while outcomes.is_empty() {
        soon("an outcome", publisher.outcomes(&mut outcomes)).await.unwrap();
    }
    let asking = QueueSpec { voids: true, ..spec("asking", &["other"]) };
    let mut asking = place.broker().subscribe(&asking, 10).await.unwrap();
    let mut second = place.broker().subscribe(&QueueSpec { voids: true, ..spec("second", &["t"]) }, 10).await.unwrap();
    publisher.publish_void(2, &void(2)).await.unwrap();
    publisher.publish(3, &envelope("t", 3)).await.unwrap();
    while outcomes.len() < 3 {
        soon("an outcome", publisher.outcomes(&mut outcomes)).await.unwrap();
    }
    outcomes.sort_by_key(|(ticket, _)| *ticket);
    assert_eq!(outcomes, [1, 2, 3].map(|ticket| (ticket, Outcome::Confirmed)));
    let notice = receive(&mut asking, 1).await.remove(0);
    assert_eq!((notice.void(), notice.position()), (Some("expired"), Some(void(2).position)));
    assert_eq!((notice.message_id, notice.topic.as_str()), (Some(Uuid::from_u128(7).to_string()), "t"));
    assert_eq!((notice.content_type.as_deref(), notice.body.as_slice()), (Some("application/json"), &b"{}"[..]));
    let both = receive(&mut second, 2).await;
    assert_eq!((both[0].void(), both[1].void()), (Some("expired"), None));
    assert_eq!(numbers(&receive(&mut all, 1).await), [3], "a void notice among the messages");
    assert!(asking.next().now_or_never().is_none());
}

// Goal: the wire is the contract's, also for consumers that do not use this crate.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_properties_follow_the_contract() {
    let place = OnRabbit::fresh().await;
    drop(place.broker.subscribe(&spec("q", &["t"]), 1).await.unwrap());
    let mut publisher = place.broker.publisher(EXCHANGE).await.unwrap();
    publish(&mut publisher, &[envelope("t", 1)]).await.unwrap();
    let (_connection, channel) = place.channel().await;
    let message = soon("the message", async {
        loop {
            // The dropped subscription may hold it for a moment.
            if let Some(message) = channel.basic_get("q".into(), BasicGetOptions::default()).await.unwrap() {
                return message;
            }
        }
    })
    .await;
    let properties = &message.properties;
    assert_eq!(properties.kind().as_ref().unwrap().as_str(), "t");
    assert_eq!(properties.app_id().as_ref().unwrap().as_str(), SOURCE.to_string());
    assert_eq!((*properties.timestamp(), *properties.delivery_mode()), (Some(1_700_000_000), Some(2)));
    let headers = properties.headers().as_ref().unwrap().inner();
    assert_eq!(headers[header::OFFSET], AMQPValue::LongLongInt(1));
    assert_eq!(headers[header::SOURCE], AMQPValue::LongString(SOURCE.to_string().into()));
}

// Goal: a queue or exchange that is not ours is refused by name, with what is wrong and the mend.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_wrong_topology_is_named() {
    let place = OnRabbit::fresh().await;
    let (_connection, channel) = place.channel().await;
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare("classic".into(), durable, FieldTable::default()).await.unwrap();
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    channel.queue_declare("mine".into(), exclusive, FieldTable::default()).await.unwrap();
    for (queue, word) in [("classic", "x-queue-type=quorum"), ("mine", "RESOURCE_LOCKED")] {
        let error = place.broker.subscribe(&spec(queue, &["t"]), 1).await.err().expect("it is another kind of queue");
        let BrokerError::Topology { kind: "queue", name, reason } = &error else { panic!("{error}") };
        assert!(name == queue && reason.contains(word) && reason.contains("delete it"), "{error}");
        assert!(!error.is_transient());
    }
    drop(place.broker.subscribe(&spec("q", &["t"]), 1).await.unwrap());
    let alone = QueueSpec { single_active_consumer: true, ..spec("q", &["t"]) };
    let error = place.broker.subscribe(&alone, 1).await.err().expect("it has more consumers");
    assert!(error.to_string().contains("x-single-active-consumer=true"), "{error}");
    for other in ["amq.direct", "amq.topic.of.nobody"] {
        let error = place.broker.publisher(other).await.err().expect("it is no exchange of ours");
        assert!(!error.is_transient() && error.to_string().contains(other), "{error}");
    }
}

// Goal: who cannot get in is told why and what to mend, and no error shows the password.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_refusals_name_the_mend() {
    let node = rabbit().await;
    let url = node.url("no-such-vhost");
    let at = url.rfind('@').expect("credentials") + 1;
    let refused = |url: String| async move {
        let error = OnRabbit::at(url).broker.publisher(EXCHANGE).await.err().expect("it is refused");
        assert!(!error.to_string().contains("sesame"), "{error}");
        error
    };
    let vhost = refused(url.clone()).await;
    assert!(matches!(vhost, BrokerError::AccessRefused { .. }) && !vhost.is_transient(), "{vhost}");
    assert!(vhost.to_string().contains("rabbitmqctl add_vhost no-such-vhost"), "{vhost}");
    let password = refused(format!("amqp://nobody:sesame@{}", &url[at..])).await;
    assert!(matches!(password, BrokerError::AccessRefused { .. }), "{password}");
    assert!(password.to_string().contains("user \"nobody\""), "{password}");
    let port = refused("amqp://nobody:sesame@127.0.0.1:1/v".to_owned()).await;
    assert!(matches!(port, BrokerError::Unreachable { .. }) && port.is_transient(), "{port}");
    let name = refused("amqp://nobody:sesame@no-such-host.invalid/v".to_owned()).await;
    assert!(matches!(name, BrokerError::Unreachable { .. }), "{name}");
    for wrong in ["http://nobody:sesame@host", "nobody:sesame@host", "amqp://nobody:sesame@host:port"] {
        let error = RabbitMq::new(RabbitMqOptions::new(wrong)).expect_err("it is no AMQP URL");
        assert!(matches!(error, BrokerError::InvalidUrl(_)) && !error.to_string().contains("sesame"), "{error}");
    }
    let options = RabbitMqOptions::new("amqp://nobody:sesame@host/v");
    let shown = format!("{options:?} {:?}", RabbitMq::new(options.clone()).unwrap());
    assert!(!shown.contains("sesame"), "{shown}");
}

// Goal: a listener that never answers costs the connect timeout, and no thread stays behind.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_a_silent_listener_times_out() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let place = OnRabbit::at(format!("amqp://{}/v", listener.local_addr().unwrap()));
    let broker = place.with(|options| options.connect_timeout = Duration::from_millis(200));
    let error = broker.publisher(EXCHANGE).await.err().expect("nobody answers");
    assert!(matches!(error, BrokerError::TimedOut { .. }), "{error}");
    let (mut peer, _) = listener.accept().await.unwrap();
    let mut left = Vec::new();
    soon("the end of the attempt", tokio::io::AsyncReadExt::read_to_end(&mut peer, &mut left)).await.unwrap();
}

// Goal: a consumer whose queue is gone hears of it.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_a_deleted_queue_ends_its_consumer() {
    let place = OnRabbit::fresh().await;
    let mut subscription = place.broker.subscribe(&spec("q", &["t"]), 1).await.unwrap();
    let (_connection, channel) = place.channel().await;
    channel.queue_delete("q".into(), QueueDeleteOptions::default()).await.unwrap();
    let error = soon("the end", subscription.next()).await.unwrap_err();
    assert!(matches!(&error, BrokerError::ConnectionLost(text) if text.contains("\"q\"")), "{error}");
}

// Goal: a channel the broker closed is told with its code, also when it happens in the middle of a flight.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_a_deleted_exchange_closes_the_channel() {
    let place = OnRabbit::fresh().await;
    let mut publisher = place.broker.publisher(EXCHANGE).await.unwrap();
    let (_connection, channel) = place.channel().await;
    channel.exchange_delete(EXCHANGE.into(), ExchangeDeleteOptions::default()).await.unwrap();
    let all: Vec<_> = (1..=3_000).map(|n| envelope("t", n)).collect();
    let error = publish(&mut publisher, &all).await.unwrap_err();
    assert!(matches!(error, BrokerError::ChannelClosed { code: 404, .. }), "{error}");
    assert!(publisher.outcomes(&mut Vec::new()).await.is_err());
    assert!(publisher.publish(1, &envelope("t", 1)).await.is_err());
}

// Goal: dropping a session, with messages in flight too, leaves no connection behind.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_dropped_sessions_end_their_connections() {
    let node = rabbit().await;
    let place = OnRabbit::fresh().await;
    let named = place.with(|options| options.connection_name = format!("dropped {}", Uuid::now_v7()));
    let name = format!("{named:?}").split("dropped ").nth(1).unwrap()[..36].to_owned();
    let list = || async { node.ctl(&["list_connections", "client_properties"]).await.contains(&name) };
    let subscription = named.subscribe(&spec("q", &["t"]), 1).await.unwrap();
    let mut publisher = named.publisher(EXCHANGE).await.unwrap();
    for n in 1..=1_000 {
        publisher.publish(n as u64, &envelope("t", n)).await.unwrap();
    }
    assert!(list().await);
    drop((publisher, subscription));
    soon("the end of the connections", async { while list().await {} }).await;
}

// Goal: an alarm shows as blocked, costs no confirm its time, hangs nobody, and ends without loss; then a body
// over the broker's limit closes the channel with its code.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_alarms_block_and_large_bodies_close_the_channel() {
    let node = own_rabbit().await;
    let place = OnRabbit::at(node.url(&node.fresh_vhost().await));
    let hasty = place.with(|options| options.confirm_timeout = Duration::from_millis(1_500));
    drop(hasty.subscribe(&spec("q", &["t"]), 1).await.unwrap());
    let mut publisher = hasty.publisher(EXCHANGE).await.unwrap();
    let mut other = hasty.publisher(EXCHANGE).await.unwrap();
    node.ctl(&["set_vm_memory_high_watermark", "0"]).await;
    let mut outcomes = Vec::new();
    for session in [&mut publisher, &mut other] {
        let mut n = 0;
        soon("the alarm", async {
            while !session.is_blocked() {
                n += 1;
                session.publish(n as u64, &envelope("t", n)).await.unwrap();
                let tick = tokio::time::timeout(Duration::from_millis(20), session.outcomes(&mut outcomes)).await;
                tick.unwrap_or(Ok(())).unwrap();
            }
        })
        .await;
    }
    outcomes.clear();
    let before = publisher.unconfirmed();
    for n in 1..=1_000 {
        soon("a publish while blocked", publisher.publish(n as u64, &envelope("t", n))).await.unwrap();
    }
    let waited = tokio::time::timeout(Duration::from_secs(4), publisher.outcomes(&mut outcomes)).await;
    assert!(waited.is_err(), "{waited:?} while blocked");
    assert!(publisher.is_blocked() && publisher.unconfirmed() == before + 1_000);
    let closing = Instant::now();
    other.close().await;
    assert!(closing.elapsed() < Duration::from_secs(3), "closing took {:?}", closing.elapsed());
    // Polled meanwhile: a session that is left alone for longer than its heartbeats ends.
    let mut ended = std::pin::pin!(node.ctl(&["set_vm_memory_high_watermark", "0.4"]));
    loop {
        tokio::select! {
            _ = &mut ended => break,
            result = publisher.outcomes(&mut outcomes) => result.unwrap(),
        }
    }
    while publisher.unconfirmed() > 0 {
        soon("an outcome", publisher.outcomes(&mut outcomes)).await.unwrap();
    }
    assert_eq!(outcomes.len(), before + 1_000);
    assert!(outcomes.iter().all(|(_, outcome)| *outcome == Outcome::Confirmed));
    node.ctl(&["eval", "application:set_env(rabbit, max_message_size, 1000)."]).await;
    refuses_a_large_body(&hasty).await;
}

async fn refuses_a_large_body(broker: &RabbitMq) {
    for bad in [1, 700, 2_999] {
        let mut publisher = broker.publisher(EXCHANGE).await.unwrap();
        let mut all: Vec<_> = (1..=3_000).map(|n| envelope("t", n)).collect();
        all[bad].message.body = vec![b'x'; 1_001];
        let error = publish(&mut publisher, &all).await.unwrap_err();
        assert!(matches!(error, BrokerError::ChannelClosed { code: 406, .. }), "{error}");
    }
}

// Goal: a frozen broker costs its timeout and nothing stays behind; a killed one is noticed at once; what it
// confirmed is there after its restart.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_frozen_and_killed_brokers_end_sessions() {
    let mut node: TestRabbit = own_rabbit().await;
    let place = OnRabbit::at(node.url(&node.fresh_vhost().await));
    drop(place.broker.subscribe(&spec("q", &["t"]), 1).await.unwrap());
    let hasty = place.with(|options| {
        options.confirm_timeout = Duration::from_secs(1);
        options.connect_timeout = Duration::from_secs(1);
    });
    let mut publisher = hasty.publisher(EXCHANGE).await.unwrap();
    let confirmed = publish(&mut publisher, &[envelope("t", 1)]).await.unwrap();
    assert_eq!(confirmed, [Outcome::Confirmed]);
    node.freeze();
    let threads = io_threads();
    let since = Instant::now();
    let large =
        Envelope { message: Message { body: vec![0; 1024 * 1024], ..envelope("t", 2).message }, ..envelope("t", 2) };
    let error = loop {
        // More than the sockets hold: a publish that pends must end too.
        if let Err(error) = publisher.publish(2, &large).await {
            break error;
        }
    };
    assert!(matches!(error, BrokerError::TimedOut { .. }), "{error}");
    assert!(since.elapsed() < Duration::from_secs(4), "noticed after {:?}", since.elapsed());
    for _ in 0..3 {
        let publisher = hasty.publisher(EXCHANGE).await.err().expect("it is frozen");
        let subscription = hasty.subscribe(&spec("q", &["t"]), 1).await.err().expect("it is frozen");
        for error in [publisher, subscription] {
            assert!(matches!(error, BrokerError::TimedOut { .. }), "{error}");
        }
    }
    drop(publisher);
    soon("the end of their threads", async {
        while io_threads() > threads {
            tokio::task::yield_now().await;
        }
    })
    .await;
    node.thaw();

    let mut publisher = place.broker.publisher(EXCHANGE).await.unwrap();
    let mut subscription = place.broker.subscribe(&spec("other", &["o"]), 1).await.unwrap();
    node.kill9();
    let lost = [
        publish(&mut publisher, &[envelope("t", 3)]).await.unwrap_err(),
        soon("the end", subscription.next()).await.unwrap_err(),
    ];
    assert!(lost.iter().all(|error| matches!(error, BrokerError::ConnectionLost(_))), "{lost:?}");
    let down = place.broker.publisher(EXCHANGE).await.err().expect("it is down");
    assert!(matches!(down, BrokerError::Unreachable { .. }), "{down}");
    node.restart().await;
    let mut subscription = place.broker.subscribe(&spec("q", &["t"]), 1).await.unwrap();
    assert_eq!(numbers(&receive(&mut subscription, 1).await), [1]);
}

fn io_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("lapin-io-loop")).count()
}

// Goal: the faults in memory do what they say, so that tests with them mean something.
#[tokio::test]
async fn memory_faults_do_what_they_say() {
    let broker = MemoryBroker::with_confirm_timeout(Duration::from_millis(100));
    let mut subscription = broker.subscribe(&spec("q", &["t"]), 0).await.unwrap();
    let one = |n| [envelope("t", n)];

    let mut publisher = broker.publisher(EXCHANGE).await.unwrap();
    broker.inject(Fault::Duplicate, 1, |envelope| envelope.position.offset == 1);
    assert_eq!(publish(&mut publisher, &one(1)).await.unwrap(), [Outcome::Confirmed]);
    assert_eq!(numbers(&receive(&mut subscription, 2).await), [1, 1]);

    broker.inject_after(Fault::DropAfterRouting, 2);
    let three: Vec<_> = (2..=4).map(|n| envelope("t", n)).collect();
    assert!(matches!(publish(&mut publisher, &three).await, Err(BrokerError::ConnectionLost(_))));
    assert_eq!(numbers(&receive(&mut subscription, 3).await), [2, 3, 4], "stored, but unconfirmed");

    let mut publisher = broker.publisher(EXCHANGE).await.unwrap();
    broker.inject(Fault::DropBeforeRouting, 1, |_| true);
    assert!(matches!(publish(&mut publisher, &one(5)).await, Err(BrokerError::ConnectionLost(_))));
    assert_eq!(broker.ready("q"), 0);

    let mut publisher = broker.publisher(EXCHANGE).await.unwrap();
    broker.inject(Fault::CloseChannel, 1, |envelope| envelope.message.body == b"6");
    assert!(matches!(publish(&mut publisher, &one(6)).await, Err(BrokerError::ChannelClosed { code: 406, .. })));

    let mut publisher = broker.publisher(EXCHANGE).await.unwrap();
    broker.inject(Fault::WithholdConfirm, 1, |_| true);
    publisher.publish(7, &envelope("t", 7)).await.unwrap();
    broker.block();
    let mut outcomes = Vec::new();
    let blocked = tokio::time::timeout(Duration::from_millis(300), publisher.outcomes(&mut outcomes)).await;
    assert!(blocked.is_err() && publisher.is_blocked());
    publisher.publish(8, &envelope("t", 8)).await.unwrap();
    assert_eq!(broker.ready("q"), 1, "a blocked broker took a message");
    broker.unblock();
    publisher.outcomes(&mut outcomes).await.unwrap();
    assert_eq!(outcomes, [(8, Outcome::Confirmed)]);
    assert!(matches!(soon("the timeout", publisher.outcomes(&mut outcomes)).await, Err(BrokerError::TimedOut { .. })));

    broker.refuse_connections(true);
    assert!(matches!(broker.publisher(EXCHANGE).await.err(), Some(BrokerError::Unreachable { .. })));
    broker.refuse_connections(false);
    broker.drop_connections();
    assert!(matches!(subscription.next().await, Err(BrokerError::ConnectionLost(_))));
    let mut subscription = broker.subscribe(&spec("q", &["t"]), 0).await.unwrap();
    assert_eq!(numbers(&receive(&mut subscription, 7).await), [1, 1, 2, 3, 4, 7, 8]);
    broker.delete_queue("q");
    assert!(matches!(subscription.next().await, Err(BrokerError::ConnectionLost(text)) if text.contains("\"q\"")));
}
