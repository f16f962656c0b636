//! A broker that notes when the relay published first and when its last message was confirmed: the same two moments that
//! the other publishers are clocked by. What the relay needs before and after does not count as draining.

use crate::broker::rabbitmq::RabbitMq;
use crate::broker::{Broker, BrokerError, Outcome, Publisher, QueueSpec};
use crate::message::{Envelope, Void};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;

/// What was seen so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    pub(super) first_published: Option<Instant>,
    pub(super) last_confirmed: Option<Instant>,
    pub(super) confirmed: u64,
    /// Nacked or returned: the drain is none.
    pub(super) refused: u64,
}

/// RabbitMQ with a clock at the port.
pub(super) struct Timed {
    broker: RabbitMq,
    seen: Arc<watch::Sender<Seen>>,
}

impl Timed {
    pub(super) fn new(broker: RabbitMq) -> (Self, watch::Receiver<Seen>) {
        let (sender, receiver) = watch::channel(Seen::default());
        (Self { broker, seen: Arc::new(sender) }, receiver)
    }
}

impl Broker for Timed {
    type Publisher = TimedPublisher<<RabbitMq as Broker>::Publisher>;
    type Subscription = <RabbitMq as Broker>::Subscription;

    async fn publisher(&self, exchange: &str) -> Result<Self::Publisher, BrokerError> {
        let publisher = self.broker.publisher(exchange).await?;
        Ok(TimedPublisher { publisher, published: false, seen: Arc::clone(&self.seen) })
    }

    async fn subscribe(&self, queue: &QueueSpec, prefetch: u16) -> Result<Self::Subscription, BrokerError> {
        self.broker.subscribe(queue, prefetch).await
    }

    async fn listen(&self, queue: &QueueSpec, prefetch: u16) -> Result<Self::Subscription, BrokerError> {
        self.broker.listen(queue, prefetch).await
    }
}

pub(super) struct TimedPublisher<P> {
    publisher: P,
    published: bool,
    seen: Arc<watch::Sender<Seen>>,
}

impl<P: Publisher> Publisher for TimedPublisher<P> {
    fn capacity(&self) -> usize {
        self.publisher.capacity()
    }

    fn unconfirmed(&self) -> usize {
        self.publisher.unconfirmed()
    }

    fn is_blocked(&self) -> bool {
        self.publisher.is_blocked()
    }

    async fn publish(&mut self, ticket: u64, envelope: &Envelope) -> Result<(), BrokerError> {
        if !std::mem::replace(&mut self.published, true) {
            let now = Instant::now();
            self.seen.send_modify(|seen| seen.first_published = seen.first_published.or(Some(now)));
        }
        self.publisher.publish(ticket, envelope).await
    }

    async fn publish_void(&mut self, ticket: u64, void: &Void) -> Result<(), BrokerError> {
        self.publisher.publish_void(ticket, void).await
    }

    async fn outcomes(&mut self, into: &mut Vec<(u64, Outcome)>) -> Result<(), BrokerError> {
        let known = into.len();
        self.publisher.outcomes(into).await?;
        let now = Instant::now();
        let new = into.len() - known;
        let confirmed = into[known..].iter().filter(|(_, outcome)| *outcome == Outcome::Confirmed).count();
        self.seen.send_modify(|seen| {
            seen.last_confirmed = Some(now);
            seen.confirmed += confirmed as u64;
            seen.refused += (new - confirmed) as u64;
        });
        Ok(())
    }

    async fn close(self) {
        self.publisher.close().await;
    }
}
