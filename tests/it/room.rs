//! Goal: the relay publishes where there is room and nowhere else, and uses room that comes back, whatever brings it.

use crate::support::{Lab, eventually, eventually_number};
use oncebox::broker::memory::{Fault, MemoryBroker, MemoryPublisher, MemorySubscription};
use oncebox::broker::{Broker, BrokerError, Outcome, Publisher, QueueSpec};
use oncebox::message::{Envelope, Void};
use oncebox::relay::{self, RelayOptions};
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Messages that fill the room, and how long it is full then: as the bytes that wait for a socket, which nobody counts
/// in messages and of which no outcome tells.
const ROOM: usize = 3;
const FULL_FOR: Duration = Duration::from_millis(20);

#[derive(Clone)]
struct Narrow {
    inner: MemoryBroker,
    /// Outcomes come when so many were published.
    outcomes_from: usize,
    published: Arc<AtomicUsize>,
    /// Published where there was no room.
    overrun: Arc<AtomicUsize>,
}

impl Narrow {
    fn new(outcomes_from: usize) -> Self {
        let inner = MemoryBroker::new();
        Self { inner, outcomes_from, published: Arc::default(), overrun: Arc::default() }
    }
}

impl Broker for Narrow {
    type Publisher = NarrowPublisher;
    type Subscription = MemorySubscription;

    async fn publisher(&self, exchange: &str) -> Result<NarrowPublisher, BrokerError> {
        let inner = self.inner.publisher(exchange).await?;
        Ok(NarrowPublisher { inner, broker: self.clone(), taken: 0, last: Instant::now() })
    }

    async fn subscribe(&self, queue: &QueueSpec, prefetch: u16) -> Result<MemorySubscription, BrokerError> {
        self.inner.subscribe(queue, prefetch).await
    }

    async fn listen(&self, queue: &QueueSpec, prefetch: u16) -> Result<MemorySubscription, BrokerError> {
        self.inner.listen(queue, prefetch).await
    }
}

struct NarrowPublisher {
    inner: MemoryPublisher,
    broker: Narrow,
    taken: usize,
    last: Instant,
}

impl NarrowPublisher {
    fn take(&mut self) {
        self.broker.published.fetch_add(1, Ordering::SeqCst);
        self.broker.overrun.fetch_add(usize::from(self.capacity() == 0), Ordering::SeqCst);
        if self.taken >= ROOM {
            self.taken = 0;
        }
        self.taken += 1;
        self.last = Instant::now();
    }
}

impl Publisher for NarrowPublisher {
    fn capacity(&self) -> usize {
        if self.taken >= ROOM && self.last.elapsed() < FULL_FOR { 0 } else { self.inner.capacity() }
    }

    fn unconfirmed(&self) -> usize {
        self.inner.unconfirmed()
    }

    fn is_blocked(&self) -> bool {
        self.inner.is_blocked()
    }

    async fn publish(&mut self, ticket: u64, envelope: &Envelope) -> Result<(), BrokerError> {
        self.take();
        self.inner.publish(ticket, envelope).await
    }

    async fn publish_void(&mut self, ticket: u64, void: &Void) -> Result<(), BrokerError> {
        self.take();
        self.inner.publish_void(ticket, void).await
    }

    async fn outcomes(&mut self, into: &mut Vec<(u64, Outcome)>) -> Result<(), BrokerError> {
        if self.broker.published.load(Ordering::SeqCst) < self.broker.outcomes_from {
            pending::<()>().await;
        }
        self.inner.outcomes(into).await
    }

    async fn close(self) {
        self.inner.close().await;
    }
}

/// A queue that gets everything, void notices too.
async fn queue(broker: &Narrow) -> MemorySubscription {
    let spec = QueueSpec {
        name: "q".to_owned(),
        exchange: "oncebox".to_owned(),
        bindings: vec!["#".to_owned()],
        single_active_consumer: false,
        voids: true,
    };
    broker.subscribe(&spec, 0).await.unwrap()
}

fn options(lab: &Lab) -> RelayOptions {
    RelayOptions {
        database_url: lab.database_url.clone(),
        exchange: "oncebox".to_owned(),
        key_window: 1,
        drain_deadline: Duration::from_secs(5),
        unroutable_probe: None,
    }
}

/// Goal: held messages and void notices wait for room as those of the log do: one that is published without it would
/// keep the relay from everything else for as long as the broker takes nothing.
#[tokio::test]
async fn held_messages_and_voids_wait_for_room() {
    let lab = Lab::shared().await;
    let broker = Narrow::new(0);
    let _queue = queue(&broker).await;
    broker.inner.inject(Fault::Nack, 60, |_| true);
    lab.sql("select oncebox.publish('t', to_jsonb(i)) from generate_series(1, 60) as i").await;
    lab.sql(
        "select oncebox.publish('t', to_jsonb(i), expires_at => now() - interval '1 second') from generate_series(1, 30) as i",
    )
    .await;
    let stop = CancellationToken::new();
    let running = tokio::spawn(relay::run(Arc::new(broker.clone()), options(&lab), stop.clone()));
    // 60 were nacked, are sent again, and 30 notices with them.
    eventually("all is published", async || (broker.published.load(Ordering::SeqCst) >= 150).then_some(())).await;
    let mut conn = lab.connect().await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_held where state = 'waiting'", 0).await;
    eventually_number(&mut conn, "select count(*) from oncebox.outbox_void", 0).await;
    stop.cancel();
    running.await.unwrap().unwrap();
    assert_eq!(broker.published.load(Ordering::SeqCst), 150);
    assert_eq!(broker.overrun.load(Ordering::SeqCst), 0, "published without room");
}

/// Goal: room that comes back without an outcome, and a turn that an outcome brings at once, are used at once: at one
/// look a second this would take minutes.
#[tokio::test]
async fn room_is_used_when_it_comes_back() {
    for (outcomes_from, key) in [(300, "null"), (0, "'k'")] {
        let lab = Lab::shared().await;
        let broker = Narrow::new(outcomes_from);
        let _queue = queue(&broker).await;
        lab.sql(&format!("select oncebox.publish('t', to_jsonb(i), key => {key}) from generate_series(1, 600) as i"))
            .await;
        let stop = CancellationToken::new();
        let running = tokio::spawn(relay::run(Arc::new(broker.clone()), options(&lab), stop.clone()));
        eventually("all is published", async || (broker.published.load(Ordering::SeqCst) >= 600).then_some(())).await;
        stop.cancel();
        running.await.unwrap().unwrap();
        assert_eq!(broker.overrun.load(Ordering::SeqCst), 0, "published without room");
    }
}
