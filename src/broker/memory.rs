//! A broker in memory, for tests: topic routing, durable queues, confirms, redelivery, and faults on demand.
//!
//! It answers what RabbitMQ answers, at once and in the same order every time; the one thing that takes time
//! is the timeout of a confirm that a fault withholds. Left out: connections that need a network, and alarms
//! that need memory. [`MemoryBroker::block`] and the faults stand for them.

use super::{Broker, BrokerError, Outcome, Publisher, QueueSpec, Subscription};
use crate::message::{Delivery, Envelope, Void, header};
use crate::topic;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Most messages in flight on one publisher.
const MAX_UNCONFIRMED: usize = 5_000;

/// Which messages a fault is for.
pub type Matcher = Box<dyn Fn(&Envelope) -> bool + Send>;

/// A thing that goes wrong, once for each of the next `n` messages it matches (see [`MemoryBroker::inject`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The broker refuses responsibility for it.
    Nack,
    /// The broker stores it, and its confirm never comes.
    WithholdConfirm,
    /// The connection breaks before the message is stored.
    DropBeforeRouting,
    /// The connection breaks when the message is stored, and before its confirm.
    DropAfterRouting,
    /// The broker closes the channel with 406; the message is not stored.
    CloseChannel,
    /// Every queue it is routed to gets it twice.
    Duplicate,
}

/// A broker in memory. Clones share their queues and faults.
#[derive(Clone)]
pub struct MemoryBroker {
    shared: Arc<Shared>,
    confirm_timeout: Duration,
}

struct Shared {
    state: Mutex<State>,
    /// Rings at every change, for whoever waits for a delivery, an outcome or the end of its connection.
    changed: Notify,
}

#[derive(Default)]
struct State {
    queues: BTreeMap<String, Queue>,
    faults: Vec<(Fault, usize, Matcher)>,
    blocked: bool,
    unblocked_at: Option<Instant>,
    refusing: bool,
    connections: BTreeMap<u64, Connection>,
    last_connection: u64,
}

struct Queue {
    spec: QueueSpec,
    /// The connection it goes with, if it is that one's own.
    owner: Option<u64>,
    bindings: BTreeSet<(String, String)>,
    /// Exchanges whose void notices it gets.
    voids: BTreeSet<String>,
    messages: VecDeque<Delivery>,
    /// What came back, in the order it came back; delivered first, as a quorum queue does.
    returned: VecDeque<Delivery>,
    /// Connections that consume, in the order they came: the first is the single active one.
    consumers: VecDeque<u64>,
}

#[derive(Default)]
struct Connection {
    exchange: String,
    ended: Option<BrokerError>,
    /// Published while the broker was blocked.
    unsent: VecDeque<(u64, Sent)>,
    outcomes: Vec<(u64, Outcome)>,
    oldest_withheld: Option<Instant>,
    unacked: BTreeMap<u64, Delivery>,
    last_tag: u64,
}

enum Sent {
    Message(Envelope),
    Void(Void),
}

impl Default for MemoryBroker {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBroker").field("confirm_timeout", &self.confirm_timeout).finish_non_exhaustive()
    }
}

impl MemoryBroker {
    /// An empty broker; a withheld confirm times out after 30 s.
    pub fn new() -> Self {
        Self::with_confirm_timeout(Duration::from_secs(30))
    }

    /// An empty broker whose publishers wait this long for a confirm.
    pub fn with_confirm_timeout(confirm_timeout: Duration) -> Self {
        let shared = Shared { state: Mutex::new(State::default()), changed: Notify::new() };
        Self { shared: Arc::new(shared), confirm_timeout }
    }

    /// Has `fault` happen to the next `times` messages that match, from whichever publisher. Of several faults
    /// that match one message, the one injected first happens.
    pub fn inject(&self, fault: Fault, times: usize, matcher: impl Fn(&Envelope) -> bool + Send + 'static) {
        self.shared.lock().faults.push((fault, times, Box::new(matcher)));
    }

    /// Has `fault` happen to the message after the next `after`.
    pub fn inject_after(&self, fault: Fault, after: usize) {
        let passed = AtomicUsize::new(0);
        self.inject(fault, 1, move |_| passed.fetch_add(1, Ordering::Relaxed) >= after);
    }

    /// Takes no messages from now on, as under a memory alarm.
    pub fn block(&self) {
        self.shared.change(|state| state.blocked = true);
    }

    /// Ends [`block`](Self::block); what was published meanwhile is routed now.
    pub fn unblock(&self) {
        self.shared.change(|state| {
            state.blocked = false;
            state.unblocked_at = Some(Instant::now());
            for connection in state.connections.keys().copied().collect::<Vec<_>>() {
                let unsent = std::mem::take(&mut state.connection(connection).unsent);
                for (ticket, sent) in unsent {
                    match sent {
                        Sent::Message(envelope) => state.take(connection, ticket, &envelope),
                        Sent::Void(void) => state.take_void(connection, ticket, &void),
                    }
                }
            }
        });
    }

    /// Refuses new sessions, or takes them again.
    pub fn refuse_connections(&self, refuse: bool) {
        self.shared.change(|state| state.refusing = refuse);
    }

    /// Breaks every connection there is.
    pub fn drop_connections(&self) {
        self.shared.change(|state| {
            for connection in state.connections.keys().copied().collect::<Vec<_>>() {
                state.end(connection, BrokerError::ConnectionLost("dropped by a fault".to_owned()));
            }
        });
    }

    /// Deletes a queue and everything in it; its consumers are cancelled.
    pub fn delete_queue(&self, queue: &str) {
        self.shared.change(|state| {
            for consumer in state.queues.remove(queue).map(|queue| queue.consumers).unwrap_or_default() {
                let text = format!("the broker cancelled the consumer: was queue \"{queue}\" deleted?");
                state.end(consumer, BrokerError::ConnectionLost(text));
            }
        });
    }

    /// Messages in a queue that nobody holds unacknowledged.
    pub fn ready(&self, queue: &str) -> usize {
        self.shared.lock().queues.get(queue).map_or(0, |queue| queue.returned.len() + queue.messages.len())
    }
}

impl Broker for MemoryBroker {
    type Publisher = MemoryPublisher;
    type Subscription = MemorySubscription;

    async fn publisher(&self, exchange: &str) -> Result<MemoryPublisher, BrokerError> {
        let mut state = self.shared.lock();
        let connection = state.connect(exchange)?;
        Ok(MemoryPublisher {
            connection: Handle { shared: Arc::clone(&self.shared), number: connection },
            confirm_timeout: self.confirm_timeout,
            unconfirmed: 0,
        })
    }

    async fn subscribe(&self, spec: &QueueSpec, prefetch: u16) -> Result<MemorySubscription, BrokerError> {
        self.consume(spec, prefetch, false)
    }

    async fn listen(&self, spec: &QueueSpec, prefetch: u16) -> Result<MemorySubscription, BrokerError> {
        self.consume(spec, prefetch, true)
    }
}

impl MemoryBroker {
    fn consume(&self, spec: &QueueSpec, prefetch: u16, is_private: bool) -> Result<MemorySubscription, BrokerError> {
        let mut state = self.shared.lock();
        let connection = state.connect(&spec.exchange)?;
        let is_taken = |queue: &Queue| is_private || queue.owner.is_some();
        if state.queues.get(&spec.name).is_some_and(is_taken) {
            state.connections.remove(&connection);
            return Err(BrokerError::Topology {
                kind: "queue",
                name: spec.name.clone(),
                reason: "exists with other arguments or owners: give it another name".to_owned(),
            });
        }
        let queue = state.queues.entry(spec.name.clone()).or_insert_with(|| Queue {
            owner: is_private.then_some(connection),
            spec: spec.clone(),
            bindings: BTreeSet::new(),
            voids: BTreeSet::new(),
            messages: VecDeque::new(),
            returned: VecDeque::new(),
            consumers: VecDeque::new(),
        });
        if queue.spec.single_active_consumer != spec.single_active_consumer {
            state.connections.remove(&connection);
            return Err(BrokerError::Topology {
                kind: "queue",
                name: spec.name.clone(),
                reason: "exists with other arguments (x-single-active-consumer): delete it".to_owned(),
            });
        }
        queue.bindings.extend(spec.bindings.iter().map(|pattern| (spec.exchange.clone(), pattern.clone())));
        if spec.voids {
            queue.voids.insert(spec.exchange.clone());
        }
        queue.consumers.push_back(connection);
        Ok(MemorySubscription {
            connection: Handle { shared: Arc::clone(&self.shared), number: connection },
            queue: spec.name.clone(),
            prefetch: usize::from(prefetch),
        })
    }
}

/// A connection; dropping it ends it.
struct Handle {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.change(|state| {
            state.end(self.number, BrokerError::ConnectionLost("closed".to_owned()));
            state.connections.remove(&self.number);
        });
    }
}

/// A publishing session in memory.
pub struct MemoryPublisher {
    connection: Handle,
    confirm_timeout: Duration,
    unconfirmed: usize,
}

impl Publisher for MemoryPublisher {
    fn capacity(&self) -> usize {
        MAX_UNCONFIRMED - self.unconfirmed
    }

    fn unconfirmed(&self) -> usize {
        self.unconfirmed
    }

    fn is_blocked(&self) -> bool {
        self.connection.shared.lock().blocked
    }

    async fn publish(&mut self, ticket: u64, envelope: &Envelope) -> Result<(), BrokerError> {
        let number = self.connection.number;
        self.connection.shared.change(|state| {
            state.alive(number)?;
            self.unconfirmed += 1;
            if state.blocked {
                state.connection(number).unsent.push_back((ticket, Sent::Message(envelope.clone())));
                return Ok(());
            }
            state.take(number, ticket, envelope);
            Ok(())
        })
    }

    async fn publish_void(&mut self, ticket: u64, void: &Void) -> Result<(), BrokerError> {
        let number = self.connection.number;
        self.connection.shared.change(|state| {
            state.alive(number)?;
            self.unconfirmed += 1;
            if state.blocked {
                state.connection(number).unsent.push_back((ticket, Sent::Void(void.clone())));
                return Ok(());
            }
            state.take_void(number, ticket, void);
            Ok(())
        })
    }

    async fn outcomes(&mut self, into: &mut Vec<(u64, Outcome)>) -> Result<(), BrokerError> {
        loop {
            let shared = Arc::clone(&self.connection.shared);
            let changed = shared.changed.notified();
            tokio::pin!(changed);
            // Before the look, or a change between the look and the wait would be slept through.
            changed.as_mut().enable();
            let deadline = {
                let mut state = shared.lock();
                state.alive(self.connection.number)?;
                let (blocked, unblocked_at) = (state.blocked, state.unblocked_at);
                let connection = state.connection(self.connection.number);
                if !connection.outcomes.is_empty() {
                    self.unconfirmed -= connection.outcomes.len();
                    into.append(&mut connection.outcomes);
                    return Ok(());
                }
                let since = connection.oldest_withheld.map(|since| since.max(unblocked_at.unwrap_or(since)));
                since.filter(|_| !blocked).map(|since| since + self.confirm_timeout)
            };
            match deadline {
                None => changed.await,
                Some(deadline) if tokio::time::timeout_at(deadline, changed).await.is_ok() => {}
                Some(_) => {
                    let error = BrokerError::TimedOut { what: "a publish", limit: self.confirm_timeout };
                    shared.change(|state| state.end(self.connection.number, error));
                }
            }
        }
    }

    async fn close(self) {}
}

/// A consuming session in memory.
pub struct MemorySubscription {
    connection: Handle,
    queue: String,
    prefetch: usize,
}

impl Subscription for MemorySubscription {
    async fn next(&mut self) -> Result<Delivery, BrokerError> {
        loop {
            let changed = self.connection.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(delivery) = self.connection.shared.lock().deliver(self)? {
                return Ok(delivery);
            }
            changed.await;
        }
    }

    async fn ready(&mut self) -> Result<u32, BrokerError> {
        let state = self.connection.shared.lock();
        let queue = state.queues.get(&self.queue);
        Ok(queue.map_or(0, |queue| queue.returned.len() + queue.messages.len()) as u32)
    }

    async fn ack(&mut self, tag: u64) -> Result<(), BrokerError> {
        let number = self.connection.number;
        self.connection.shared.change(|state| {
            state.alive(number)?;
            if state.connection(number).unacked.remove(&tag).is_none() {
                // As RabbitMQ does: the session learns of it at its next call.
                let text = format!("PRECONDITION_FAILED - unknown delivery tag {tag}");
                state.end(number, BrokerError::ChannelClosed { code: 406, text });
            }
            Ok(())
        })
    }

    async fn close(self) {}
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let result = change(&mut self.lock());
        self.changed.notify_waiters();
        result
    }
}

impl State {
    fn connect(&mut self, exchange: &str) -> Result<u64, BrokerError> {
        if self.refusing {
            return Err(BrokerError::Unreachable {
                address: "memory".to_owned(),
                reason: "refused by a fault".to_owned(),
            });
        }
        self.last_connection += 1;
        let connection = Connection { exchange: exchange.to_owned(), ..Connection::default() };
        self.connections.insert(self.last_connection, connection);
        Ok(self.last_connection)
    }

    fn connection(&mut self, number: u64) -> &mut Connection {
        self.connections.get_mut(&number).expect("a connection is there until its handle drops")
    }

    fn alive(&mut self, number: u64) -> Result<(), BrokerError> {
        self.connection(number).ended.clone().map_or(Ok(()), Err)
    }

    /// Ends a connection: outcomes that were not taken are lost, deliveries not acknowledged go back.
    fn end(&mut self, number: u64, error: BrokerError) {
        let connection = self.connection(number);
        connection.ended.get_or_insert(error);
        connection.outcomes.clear();
        connection.unsent.clear();
        let unacked = std::mem::take(&mut connection.unacked);
        if let Some(queue) = self.queues.values_mut().find(|queue| queue.consumers.contains(&number)) {
            queue.consumers.retain(|consumer| *consumer != number);
            queue.returned.extend(unacked.into_values().map(|was| Delivery { redelivered: true, ..was }));
        }
        self.queues.retain(|_, queue| queue.owner != Some(number));
    }

    /// Takes a message as the broker does, faults included.
    fn take(&mut self, number: u64, ticket: u64, envelope: &Envelope) {
        if self.alive(number).is_err() {
            return;
        }
        let fault = self.fault(envelope);
        let dropped = BrokerError::ConnectionLost("dropped by a fault".to_owned());
        match fault {
            Some(Fault::Nack) => return self.connection(number).outcomes.push((ticket, Outcome::Nacked)),
            Some(Fault::DropBeforeRouting) => return self.end(number, dropped),
            Some(Fault::CloseChannel) => {
                let text = "PRECONDITION_FAILED - refused by a fault".to_owned();
                return self.end(number, BrokerError::ChannelClosed { code: 406, text });
            }
            _ => {}
        }
        let copies = if fault == Some(Fault::Duplicate) { 2 } else { 1 };
        let exchange = self.connection(number).exchange.clone();
        let outcome = match self.route(&exchange, envelope, copies) {
            0 => Outcome::Returned { code: 312, text: "NO_ROUTE".to_owned() },
            _ => Outcome::Confirmed,
        };
        let connection = self.connection(number);
        match fault {
            Some(Fault::DropAfterRouting) => self.end(number, dropped),
            Some(Fault::WithholdConfirm) => {
                connection.oldest_withheld.get_or_insert_with(Instant::now);
            }
            _ => connection.outcomes.push((ticket, outcome)),
        }
    }

    /// Takes a void notice; faults are for messages.
    fn take_void(&mut self, number: u64, ticket: u64, void: &Void) {
        if self.alive(number).is_err() {
            return;
        }
        let exchange = self.connection(number).exchange.clone();
        for queue in self.queues.values_mut().filter(|queue| queue.voids.contains(&exchange)) {
            queue.messages.push_back(void_delivery(void));
        }
        self.connection(number).outcomes.push((ticket, Outcome::Confirmed));
    }

    /// The first fault that matches, which is thereby used up by one.
    fn fault(&mut self, envelope: &Envelope) -> Option<Fault> {
        let (fault, left, _) = self.faults.iter_mut().find(|(_, left, matches)| *left > 0 && matches(envelope))?;
        *left -= 1;
        Some(fault.clone())
    }

    /// Stores the message in each queue bound for it; answers how many there are.
    fn route(&mut self, exchange: &str, envelope: &Envelope, copies: usize) -> usize {
        let topic = &envelope.message.topic;
        let bound = |queue: &Queue| {
            queue.bindings.iter().any(|(from, pattern)| from == exchange && topic::matches(pattern, topic))
        };
        let mut routed = 0;
        for queue in self.queues.values_mut().filter(|queue| bound(queue)) {
            routed += 1;
            queue.messages.extend(std::iter::repeat_n(delivery(envelope), copies));
        }
        routed
    }

    /// The next delivery for a consumer that may have one.
    fn deliver(&mut self, consumer: &MemorySubscription) -> Result<Option<Delivery>, BrokerError> {
        let number = consumer.connection.number;
        self.alive(number)?;
        let full = consumer.prefetch > 0 && self.connection(number).unacked.len() >= consumer.prefetch;
        let Some(queue) = self.queues.get_mut(&consumer.queue).filter(|_| !full) else { return Ok(None) };
        if queue.spec.single_active_consumer && queue.consumers.front() != Some(&number) {
            return Ok(None);
        }
        let next = queue.returned.pop_front().or_else(|| queue.messages.pop_front());
        let Some(mut delivery) = next else { return Ok(None) };
        let connection = self.connection(number);
        connection.last_tag += 1;
        delivery.tag = connection.last_tag;
        connection.unacked.insert(delivery.tag, delivery.clone());
        Ok(Some(delivery))
    }
}

/// What a consumer sees of an envelope; the tag comes with the delivery.
fn delivery(envelope: &Envelope) -> Delivery {
    let (message, position) = (&envelope.message, &envelope.position);
    let mut headers = message.headers.clone();
    headers.insert(header::SOURCE.to_owned(), position.source.to_string().into());
    headers.insert(header::STREAM.to_owned(), position.stream.clone().into());
    headers.insert(header::OFFSET.to_owned(), position.offset.into());
    headers.insert(header::ORDINAL.to_owned(), envelope.ordinal.into());
    if let Some(key) = &message.key {
        headers.insert(header::KEY.to_owned(), key.clone().into());
    }
    Delivery {
        tag: 0,
        message_id: Some(message.id.to_string()),
        topic: message.topic.clone(),
        content_type: Some(message.content_type.clone()),
        headers,
        body: message.body.clone(),
        redelivered: false,
    }
}

/// What a consumer sees of a void notice.
fn void_delivery(void: &Void) -> Delivery {
    let position = &void.position;
    let headers = [
        (header::SOURCE, position.source.to_string().into()),
        (header::STREAM, position.stream.clone().into()),
        (header::OFFSET, position.offset.into()),
        (header::VOID, void.reason.clone().into()),
    ];
    Delivery {
        tag: 0,
        message_id: Some(void.message_id.to_string()),
        topic: void.topic.clone(),
        content_type: Some("application/json".to_owned()),
        headers: headers.map(|(name, value)| (name.to_owned(), value)).into_iter().collect(),
        body: b"{}".to_vec(),
        redelivered: false,
    }
}
