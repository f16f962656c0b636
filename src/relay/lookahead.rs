//! Which message may be sent next, and how far everything is settled: pure.
//!
//! Messages come in log order and leave in any order, but of one key at most `key_window` are unconfirmed at a
//! time, so that a nack of one never lets a later one of its key pass it.

use crate::message::Envelope;
use crate::outbox::held::Reason;
use crate::outbox::journal::LogPlace;
use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Instant;

/// A message read from the log.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    /// Where it lies.
    pub place: LogPlace,
    /// What is to be sent.
    pub envelope: Envelope,
    /// Not to be sent after this moment.
    pub expires: Option<Instant>,
}

impl Item {
    fn key(&self) -> Option<&str> {
        self.envelope.message.key.as_deref()
    }
}

/// Names a message for as long as it is in the look-ahead: its ordinal since the lane was taken.
pub(crate) type Ticket = u64;

#[derive(Debug, PartialEq)]
enum State {
    /// Not sent: it has its turn, or waits behind others of its key.
    Unsent,
    InFlight,
    /// To be written to the held messages.
    Leaving(Reason),
    Done,
}

#[derive(Debug)]
struct Entry {
    /// Settled up to here once this and all before it are done.
    place: LogPlace,
    /// Nothing for a mark.
    item: Option<Item>,
    state: State,
}

/// A key with unsettled messages: how many have their turn, and who waits behind them.
#[derive(Debug)]
struct Key {
    turns: usize,
    behind: VecDeque<Ticket>,
}

/// Messages between the log and their outcome.
#[derive(Debug)]
pub(crate) struct Lookahead {
    key_window: usize,
    first: Ticket,
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Unsent messages that have their turn.
    ready: VecDeque<Ticket>,
    keys: HashMap<String, Key>,
    held_keys: HashSet<String>,
    leaving: Vec<Ticket>,
    settled: LogPlace,
}

impl Lookahead {
    /// Nothing read yet beyond `settled`; messages of `held_keys` follow those that are held already.
    pub fn new(key_window: usize, settled: LogPlace, held_keys: HashSet<String>) -> Self {
        Self {
            key_window: key_window.max(1),
            first: 0,
            entries: VecDeque::new(),
            bytes: 0,
            ready: VecDeque::new(),
            keys: HashMap::new(),
            held_keys,
            leaving: Vec::new(),
            settled,
        }
    }

    /// Messages from the first unsettled one on.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of the bodies that are kept.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Everything up to here is confirmed, held or parked.
    pub fn settled(&self) -> LogPlace {
        self.settled
    }

    /// Takes the next message of the log.
    pub fn push(&mut self, item: Item) {
        let ticket = self.first + self.entries.len() as Ticket;
        self.bytes += item.envelope.message.body.len();
        let mut follows_held = false;
        match item.key() {
            None => self.ready.push_back(ticket),
            Some(key) => match self.keys.get_mut(key) {
                Some(busy) if busy.turns >= self.key_window => busy.behind.push_back(ticket),
                Some(busy) => {
                    busy.turns += 1;
                    self.ready.push_back(ticket);
                }
                // Behind the held ones, unless others of the key wait here: an operator's retry must not part them.
                None if self.held_keys.contains(key) => follows_held = true,
                None => {
                    self.keys.insert(key.to_owned(), Key { turns: 1, behind: VecDeque::new() });
                    self.ready.push_back(ticket);
                }
            },
        }
        self.entries.push_back(Entry { place: item.place, item: Some(item), state: State::Unsent });
        if follows_held {
            self.leave(ticket, Reason::BehindKey);
        }
    }

    /// Passes over what needs no sending: a message that is held already, the end of a window.
    pub fn push_settled(&mut self, place: LogPlace) {
        self.entries.push_back(Entry { place, item: None, state: State::Done });
        self.settle();
    }

    /// The next message that may be sent; it counts as in flight from here on.
    pub fn next(&mut self) -> Option<Ticket> {
        let ticket = self.ready.pop_front()?;
        self.entry(ticket).state = State::InFlight;
        Some(ticket)
    }

    /// Some message may be sent.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// A message by its ticket.
    pub fn item(&self, ticket: Ticket) -> &Item {
        let item = self.entries[(ticket - self.first) as usize].item.as_ref();
        item.expect("a ticket names a message that is not done")
    }

    /// The broker has taken responsibility for a message in flight.
    pub fn confirm(&mut self, ticket: Ticket) {
        self.end_turn(ticket);
        self.finish(ticket);
    }

    /// A message in flight leaves the log's order. If it waits for another attempt, all of its key behind it follow
    /// it there; if it is parked, the next of its key has its turn.
    pub fn take_out(&mut self, ticket: Ticket, reason: Reason) {
        if reason.waits()
            && let Some(key) = self.item(ticket).key().map(str::to_owned)
        {
            let behind = self.keys.get_mut(&key).map(|key| std::mem::take(&mut key.behind)).unwrap_or_default();
            self.held_keys.insert(key);
            self.end_turn(ticket);
            self.leave(ticket, reason);
            for ticket in behind {
                self.leave(ticket, Reason::BehindKey);
            }
        } else {
            self.end_turn(ticket);
            self.leave(ticket, reason);
        }
    }

    /// Messages to be written to the held ones, in log order of their keys; call [`left`](Self::left) afterwards.
    pub fn leaving(&self) -> impl ExactSizeIterator<Item = (&Item, &Reason)> {
        self.leaving.iter().map(|ticket| match &self.entries[(*ticket - self.first) as usize].state {
            State::Leaving(reason) => (self.item(*ticket), reason),
            other => unreachable!("a message that leaves is {other:?}"),
        })
    }

    /// Those messages are durable among the held ones.
    pub fn left(&mut self) {
        for ticket in std::mem::take(&mut self.leaving) {
            self.finish(ticket);
        }
    }

    /// No message of these keys is held any more: later ones go the straight way again.
    pub fn keep_held_keys(&mut self, held: HashSet<String>) {
        debug_assert!(self.leaving.is_empty(), "keys are compared after everything that leaves was written");
        self.held_keys = held;
    }

    /// The messages in flight, in log order.
    pub fn in_flight(&self) -> Vec<Ticket> {
        let tickets = (self.first..).zip(&self.entries);
        tickets.filter(|(_, entry)| entry.state == State::InFlight).map(|(ticket, _)| ticket).collect()
    }

    /// The session is gone: everything in flight is to be sent again, first and in log order.
    pub fn unsend(&mut self) {
        for ticket in self.in_flight().into_iter().rev() {
            self.entry(ticket).state = State::Unsent;
            self.ready.push_front(ticket);
        }
    }

    fn entry(&mut self, ticket: Ticket) -> &mut Entry {
        &mut self.entries[(ticket - self.first) as usize]
    }

    fn leave(&mut self, ticket: Ticket, reason: Reason) {
        self.entry(ticket).state = State::Leaving(reason);
        self.leaving.push(ticket);
    }

    fn end_turn(&mut self, ticket: Ticket) {
        let item = self.entries[(ticket - self.first) as usize].item.as_ref();
        let Some(key) = item.and_then(Item::key) else { return };
        let Some(busy) = self.keys.get_mut(key) else { return };
        match busy.behind.pop_front() {
            // Its turn goes on to the next of the key.
            Some(next) => self.ready.push_back(next),
            None => {
                busy.turns -= 1;
                if busy.turns == 0 {
                    self.keys.remove(key);
                }
            }
        }
    }

    fn finish(&mut self, ticket: Ticket) {
        let entry = self.entry(ticket);
        entry.state = State::Done;
        let item = entry.item.take().expect("a message is finished once");
        self.bytes -= item.envelope.message.body.len();
        self.settle();
    }

    fn settle(&mut self) {
        while let Some(entry) = self.entries.front()
            && entry.state == State::Done
        {
            self.settled = entry.place;
            self.entries.pop_front();
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Headers, Message, MessageId, Position};
    use proptest::prelude::*;
    use std::time::Duration;
    use uuid::Uuid;

    fn item(seq: i64, key: Option<u8>) -> Item {
        let message = Message {
            id: MessageId(Uuid::now_v7()),
            topic: "t".to_owned(),
            key: key.map(|key| key.to_string()),
            content_type: "text/plain".to_owned(),
            headers: Headers::new(),
            body: vec![0; 10],
            published_at_s: 0,
        };
        let position = Position { source: Uuid::nil(), stream: "t#0".to_owned(), offset: seq };
        Item { place: LogPlace { n: 1, seq }, envelope: Envelope { message, position, ordinal: seq }, expires: None }
    }

    const START: LogPlace = LogPlace { n: 0, seq: 0 };

    proptest! {
        /// Goal: under any outcomes and lost sessions, of each key the confirmed messages and then the held ones
        /// are in log order, nothing vanishes, and nothing settles before it is confirmed or held.
        #[test]
        fn keys_keep_their_order_and_nothing_vanishes(
            keys in prop::collection::vec(prop::option::weighted(0.8, 0u8..4), 1..80),
            fates in prop::collection::vec(0u8..10, 400),
        ) {
            let mut lookahead = Lookahead::new(1, START, HashSet::new());
            let mut confirmed: Vec<i64> = Vec::new();
            let mut held: Vec<(i64, bool)> = Vec::new();
            for (seq, key) in (1..).zip(&keys) {
                lookahead.push(item(seq, *key));
            }
            let mut flying: VecDeque<Ticket> = VecDeque::new();
            for fate in fates.into_iter().chain(std::iter::repeat_n(9, 2 * keys.len())) {
                if let Some(ticket) = lookahead.next() {
                    flying.push_back(ticket);
                }
                if fate == 0 {
                    prop_assert_eq!(lookahead.in_flight().len(), flying.len());
                    lookahead.unsend();
                    flying.clear();
                    continue;
                }
                if fate == 1 {
                    held.extend(lookahead.leaving().map(|(item, reason)| (item.place.seq, reason.waits())));
                    lookahead.left();
                }
                let Some(ticket) = (if fate % 2 == 0 { flying.pop_back() } else { flying.pop_front() }) else { continue };
                let seq = lookahead.item(ticket).place.seq;
                match fate {
                    2 => lookahead.take_out(ticket, Reason::Nacked { retry_in: Duration::ZERO }),
                    3 => lookahead.take_out(ticket, Reason::Unroutable(String::new())),
                    _ => { confirmed.push(seq); lookahead.confirm(ticket); }
                }
                let settled = lookahead.settled().seq;
                let safe = |seq: i64| confirmed.contains(&seq) || held.iter().any(|(held, _)| *held == seq);
                prop_assert!((1..=settled).all(safe), "settled {settled} too early");
            }
            held.extend(lookahead.leaving().map(|(item, reason)| (item.place.seq, reason.waits())));
            lookahead.left();
            prop_assert_eq!(lookahead.settled().seq, keys.len() as i64);
            prop_assert_eq!(lookahead.bytes(), 0);
            prop_assert_eq!(lookahead.len(), 0);
            let mut all: Vec<i64> = confirmed.iter().copied().chain(held.iter().map(|(seq, _)| *seq)).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (1..=keys.len() as i64).collect::<Vec<_>>());
            for key in 0u8..4 {
                let of_key = |seq: &i64| keys[*seq as usize - 1] == Some(key);
                let waiting = held.iter().filter(|(_, waits)| *waits).map(|(seq, _)| *seq);
                let order: Vec<i64> = confirmed.iter().copied().filter(of_key).chain(waiting.filter(of_key)).collect();
                prop_assert!(order.is_sorted(), "key {key}: {order:?}");
            }
        }
    }

    /// Goal: a key has one message unconfirmed, other keys and keyless messages go on.
    #[test]
    fn one_unconfirmed_message_a_key() {
        let mut lookahead = Lookahead::new(1, START, HashSet::new());
        for (seq, key) in [(1, Some(1)), (2, Some(1)), (3, Some(2)), (4, None)] {
            lookahead.push(item(seq, key));
        }
        let sent: Vec<_> = std::iter::from_fn(|| lookahead.next()).collect();
        assert_eq!(sent, [0, 2, 3]);
        lookahead.confirm(0);
        assert_eq!(lookahead.next(), Some(1));
    }

    /// Goal: a parked message that an operator sends again parts no messages of its key that are under way.
    #[test]
    fn a_retry_does_not_part_a_busy_key() {
        let mut lookahead = Lookahead::new(1, START, HashSet::new());
        for seq in 5..=7 {
            lookahead.push(item(seq, Some(1)));
        }
        assert_eq!(lookahead.next(), Some(0));
        lookahead.keep_held_keys(HashSet::from(["1".to_owned()]));
        lookahead.push(item(8, Some(1)));
        assert_eq!(lookahead.leaving().len(), 0, "8 would overtake 6 and 7");
    }

    /// Goal: the end of a window settles only after everything before it.
    #[test]
    fn windows_end_when_their_messages_are_settled() {
        let mut lookahead = Lookahead::new(1, START, HashSet::new());
        lookahead.push(item(1, None));
        lookahead.push_settled(LogPlace { n: 2, seq: 0 });
        let ticket = lookahead.next().expect("its turn");
        assert_eq!(lookahead.settled(), START);
        lookahead.confirm(ticket);
        assert_eq!(lookahead.settled(), LogPlace { n: 2, seq: 0 });
        lookahead.push_settled(LogPlace { n: 3, seq: 0 });
        assert_eq!((lookahead.settled().n, lookahead.len()), (3, 0));
    }

    /// Goal: messages of a key that is held when the lane is taken follow it there.
    #[test]
    fn messages_of_a_held_key_are_held() {
        let mut lookahead = Lookahead::new(1, START, HashSet::from(["1".to_owned()]));
        lookahead.push(item(1, Some(1)));
        lookahead.push(item(2, Some(2)));
        assert_eq!(lookahead.next(), Some(1));
        assert_eq!(lookahead.leaving().len(), 1);
        lookahead.left();
        lookahead.keep_held_keys(HashSet::new());
        lookahead.push(item(3, Some(1)));
        assert_eq!(lookahead.next(), Some(2));
    }
}
