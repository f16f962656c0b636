//! Which message is sent next, pure: at most one of a key is unconfirmed, so that nacks and lost sessions change
//! no key's order.

use crate::message::Envelope;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Instant;

/// Names a message between sending and outcome; rises in the order of the log.
pub(super) type Ticket = u64;

/// A message that waits for its turn or its outcome.
#[derive(Debug)]
pub(super) struct Item {
    pub envelope: Envelope,
    /// Not to be sent after this moment.
    pub expires: Option<Instant>,
    /// Nacks so far.
    pub nacks: u32,
}

/// Messages read and not done with.
#[derive(Debug, Default)]
pub(super) struct Pending {
    items: BTreeMap<Ticket, Item>,
    next_ticket: Ticket,
    ready: BTreeSet<Ticket>,
    in_flight: BTreeSet<Ticket>,
    delayed: BTreeSet<(Instant, Ticket)>,
    /// For each key with a message that is ready, delayed or in flight: those behind it.
    behind: HashMap<String, VecDeque<Ticket>>,
}

impl Pending {
    /// Takes in the next message of the log.
    pub fn push(&mut self, envelope: Envelope, expires: Option<Instant>) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        match envelope.message.key.as_ref().map(|key| self.behind.get_mut(key)) {
            Some(Some(behind)) => behind.push_back(ticket),
            Some(None) => {
                let key = envelope.message.key.clone().expect("it has a key");
                self.behind.insert(key, VecDeque::new());
                self.ready.insert(ticket);
            }
            None => {
                self.ready.insert(ticket);
            }
        }
        self.items.insert(ticket, Item { envelope, expires, nacks: 0 });
    }

    /// The next message to be sent, from now on in flight.
    pub fn next(&mut self, now: Instant) -> Option<Ticket> {
        while let Some((at, ticket)) = self.delayed.first().copied().filter(|(at, _)| *at <= now) {
            self.delayed.remove(&(at, ticket));
            self.ready.insert(ticket);
        }
        let ticket = self.ready.pop_first()?;
        self.in_flight.insert(ticket);
        Some(ticket)
    }

    /// One of them.
    pub fn get(&self, ticket: Ticket) -> &Item {
        &self.items[&ticket]
    }

    /// A message has its outcome, whatever it is: the next of its key may go.
    pub fn done(&mut self, ticket: Ticket) -> Option<Item> {
        self.in_flight.remove(&ticket);
        // It may have been unsent since.
        self.ready.remove(&ticket);
        let item = self.items.remove(&ticket)?;
        if let Some(key) = &item.envelope.message.key {
            match self.behind.get_mut(key).and_then(VecDeque::pop_front) {
                Some(next) => {
                    self.ready.insert(next);
                }
                None => {
                    self.behind.remove(key);
                }
            }
        }
        Some(item)
    }

    /// A message was nacked: it goes again at a time, and its key waits for it. Returns how often it was.
    pub fn nacked(&mut self, ticket: Ticket) -> u32 {
        let item = self.items.get_mut(&ticket);
        item.map_or(0, |item| {
            item.nacks += 1;
            item.nacks
        })
    }

    /// Sends a message of those in flight again, not before a time.
    pub fn again(&mut self, ticket: Ticket, at: Instant) {
        if self.in_flight.remove(&ticket) {
            self.delayed.insert((at, ticket));
        }
    }

    /// The session is gone: nothing is in flight any more. Returns what was.
    pub fn unsend(&mut self) -> BTreeSet<Ticket> {
        let unsent = std::mem::take(&mut self.in_flight);
        self.ready.extend(&unsent);
        unsent
    }

    /// Messages in it.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Messages without an outcome.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// True when one could be sent at once.
    pub fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// When the first nacked one goes again.
    pub fn next_due(&self) -> Option<Instant> {
        self.delayed.first().map(|(at, _)| *at)
    }

    /// All of them, in the order of the log.
    pub fn iter(&self) -> impl Iterator<Item = &Item> {
        self.items.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Headers, Message, MessageId, Position};
    use proptest::prelude::*;
    use std::time::Duration;
    use uuid::Uuid;

    fn envelope(offset: i64, key: u8) -> Envelope {
        let message = Message {
            id: MessageId(Uuid::nil()),
            topic: "t".to_owned(),
            key: (key > 0).then(|| key.to_string()),
            content_type: "c".to_owned(),
            headers: Headers::new(),
            body: Vec::new(),
            published_at_s: 0,
        };
        let position = Position { source: Uuid::nil(), stream: "t#0".to_owned(), offset };
        Envelope { message, position, ordinal: offset }
    }

    proptest! {
        /// Goal: whatever is confirmed, nacked or lost with a session, every message is done once, and those of a
        /// key in their order, one at a time.
        #[test]
        fn each_is_done_once_and_keys_keep_their_order(
            keys in prop::collection::vec(0u8..4, 1..60),
            outcomes in prop::collection::vec((0usize..8, 0u8..5), 0..400),
        ) {
            let start = Instant::now();
            let (mut now, mut pending, mut done) = (start, Pending::default(), Vec::new());
            for (offset, key) in (0..).zip(&keys) {
                pending.push(envelope(offset, *key), None);
            }
            let mut flying: Vec<Ticket> = Vec::new();
            let steps = outcomes.into_iter().chain(std::iter::repeat((0, 0))).take(2_000);
            for (pick, outcome) in steps {
                if pending.len() == 0 {
                    break;
                }
                now += Duration::from_millis(1);
                while let Some(ticket) = pending.next(now) {
                    flying.push(ticket);
                }
                let mut seen = BTreeSet::new();
                for ticket in &flying {
                    let key = pending.get(*ticket).envelope.message.key.clone();
                    prop_assert!(key.is_none() || seen.insert(key), "two of one key in flight");
                }
                if flying.is_empty() {
                    continue;
                }
                let ticket = flying.swap_remove(pick % flying.len());
                match outcome {
                    0 | 1 => done.push(pending.done(ticket).expect("it was in flight").envelope),
                    2 => {
                        pending.nacked(ticket);
                        pending.again(ticket, now + Duration::from_millis(3));
                    }
                    lost => {
                        pending.unsend();
                        flying.clear();
                        // It is given up as what ended the session.
                        if lost == 3 {
                            done.push(pending.done(ticket).expect("it was in flight").envelope);
                        }
                    }
                }
            }
            prop_assert_eq!(done.len(), keys.len());
            for key in 1..4u8 {
                let key = Some(key.to_string());
                let order: Vec<i64> =
                    done.iter().filter(|e| e.message.key == key).map(|e| e.position.offset).collect();
                prop_assert!(order.is_sorted(), "{:?}", order);
            }
        }
    }
}
