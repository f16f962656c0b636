//! The messages in flight on the channel, and what became of each.
//!
//! The broker counts what is published on a channel and names messages by that number, the delivery tag. Whatever the
//! order of its confirms, single or for all up to a tag, each says which messages it is about. A return does not: it brings
//! the message back. But the broker sends it before the confirm of the same message, so it belongs to one that has none
//! yet, and is known by its place in the log.
//!
//! Two in flight at one place are the same message twice, and RabbitMQ hands back in the order of publishing: what is
//! returned is looked for behind the last one that was. If only one of the two was routed, one is told confirmed and one
//! returned, whichever it was.

use super::wire::Place;
use crate::broker::Outcome;
use std::collections::VecDeque;
use tokio::time::Instant;

/// Messages in flight.
#[derive(Debug)]
pub(super) struct Flight {
    /// In the order of publishing; those whose outcome was told leave when they are the oldest.
    messages: VecDeque<InFlight>,
    /// Delivery tag of the first of `messages`.
    first: u64,
    unconfirmed: usize,
    /// The newest of them, which nobody has tried to write yet.
    unsent: usize,
    /// Tag behind that of the last message returned.
    after_return: u64,
}

#[derive(Debug)]
struct InFlight {
    ticket: u64,
    /// None for what is never returned.
    place: Option<Place>,
    /// When it was first tried to be written; meaningless before.
    sent_at: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    Waiting,
    /// Handed back; its confirm is still to come.
    Returned {
        code: u16,
        text: String,
    },
    Told,
}

/// What the broker said about a message that it cannot say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Mismatch {
    #[error("the broker confirmed message {0} of the session, which was not sent")]
    Unsent(u64),
    #[error("the broker confirmed message {0} of the session twice")]
    Twice(u64),
    #[error("the broker returned a message that was not in flight")]
    NotInFlight,
}

impl Flight {
    pub(super) fn new() -> Self {
        Self { messages: VecDeque::new(), first: 1, unconfirmed: 0, unsent: 0, after_return: 0 }
    }

    /// Messages whose outcome has not been told.
    pub(super) fn unconfirmed(&self) -> usize {
        self.unconfirmed
    }

    /// Messages from the oldest without an outcome to the newest, those that have one included.
    pub(super) fn span(&self) -> usize {
        self.messages.len()
    }

    /// When the oldest message without an outcome was first tried to be written.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.messages.front().filter(|_| self.unsent < self.messages.len()).map(|message| message.sent_at)
    }

    /// Takes the next message on.
    pub(super) fn board(&mut self, ticket: u64, place: Option<Place>, now: Instant) {
        self.messages.push_back(InFlight { ticket, place, sent_at: now, state: State::Waiting });
        self.unconfirmed += 1;
        self.unsent += 1;
    }

    /// What was taken on is being written from now: the wait for its confirm begins, however long its caller was elsewhere.
    pub(super) fn sent(&mut self, now: Instant) {
        let from = self.messages.len().saturating_sub(self.unsent);
        for message in self.messages.range_mut(from..) {
            message.sent_at = now;
        }
        self.unsent = 0;
    }

    /// The broker handed a message back.
    pub(super) fn returned(&mut self, place: &Place, code: u16, text: String) -> Result<(), Mismatch> {
        let from = self.after_return.saturating_sub(self.first) as usize;
        let is_it = |at: &usize| {
            let message = &self.messages[*at];
            matches!(message.state, State::Waiting) && message.place.as_ref() == Some(place)
        };
        let behind = (from..self.messages.len()).find(is_it);
        let at = behind.or_else(|| (0..from.min(self.messages.len())).find(is_it)).ok_or(Mismatch::NotInFlight)?;
        self.messages[at].state = State::Returned { code, text };
        self.after_return = self.first + at as u64 + 1;
        Ok(())
    }

    /// The broker took, or refused, the message of this tag, or all up to it that were open (all there are, up to 0); tells
    /// their outcomes.
    pub(super) fn confirmed(
        &mut self,
        tag: u64,
        multiple: bool,
        acked: bool,
        into: &mut Vec<(u64, Outcome)>,
    ) -> Result<(), Mismatch> {
        let newest = self.first + self.messages.len() as u64 - 1;
        let tag = if tag == 0 && multiple { newest } else { tag };
        if tag == 0 || tag > newest {
            return Err(Mismatch::Unsent(tag));
        }
        let told = into.len();
        let upto = (tag + 1).saturating_sub(self.first) as usize;
        for message in self.messages.range_mut(if multiple { 0 } else { upto.saturating_sub(1) }..upto) {
            let outcome = match std::mem::replace(&mut message.state, State::Told) {
                State::Told => continue,
                // A message that was nacked was not taken, whatever else is said of it.
                _ if !acked => Outcome::Nacked,
                State::Waiting => Outcome::Confirmed,
                State::Returned { code, text } => Outcome::Returned { code, text },
            };
            into.push((message.ticket, outcome));
        }
        if into.len() == told {
            return Err(Mismatch::Twice(tag));
        }
        self.unconfirmed -= into.len() - told;
        while let Some(InFlight { state: State::Told, .. }) = self.messages.front() {
            self.messages.pop_front();
            self.first += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn place(offset: u64) -> Option<Place> {
        Some((Uuid::nil(), "t#0".to_owned(), offset as i64))
    }

    fn no_route() -> Outcome {
        Outcome::Returned { code: 312, text: "NO_ROUTE".to_owned() }
    }

    fn ticket(tag: u64) -> u64 {
        1_000 + 7 * tag
    }

    proptest! {
        // Goal: each message is told its own fate, once, in whatever order and grouping the broker confirms, while more are
        // published; what is left open is what was not confirmed.
        #[test]
        fn each_is_told_its_own_fate_once(
            fates in prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => Just(1), 1 => Just(2)], 1..120),
            window in 1usize..40,
            draws in prop::collection::vec((0u8..10, any::<prop::sample::Index>()), 400),
        ) {
            let fate = |tag: u64| match fates[tag as usize - 1] {
                0 => Outcome::Confirmed,
                1 => Outcome::Nacked,
                _ => no_route(),
            };
            let (mut flight, mut told) = (Flight::new(), Vec::new());
            let mut open: Vec<u64> = Vec::new();
            let mut handed_back = 0;
            let mut sent = 0;
            for (draw, which) in draws {
                if draw < 5 && sent < fates.len() as u64 && open.len() < window {
                    sent += 1;
                    flight.board(ticket(sent), place(sent), Instant::now());
                    flight.sent(Instant::now());
                    open.push(sent);
                } else if !open.is_empty() {
                    let at = which.index(open.len());
                    let tag = open[at];
                    // The broker hands back in the order of publishing, before it confirms.
                    for back in handed_back + 1..=tag {
                        if fate(back) == no_route() {
                            flight.returned(&place(back).expect("one"), 312, "NO_ROUTE".to_owned()).expect("in flight");
                        }
                    }
                    handed_back = handed_back.max(tag);
                    let nacked = |tag: u64| fate(tag) == Outcome::Nacked;
                    let all_alike = open[..=at].iter().all(|other| nacked(*other) == nacked(tag));
                    let multiple = draw % 2 == 0 && all_alike;
                    flight.confirmed(tag, multiple, !nacked(tag), &mut told).expect("in flight");
                    if multiple {
                        open.drain(..=at);
                    } else {
                        open.remove(at);
                    }
                }
                prop_assert_eq!(flight.unconfirmed(), open.len());
                prop_assert_eq!(told.len() + open.len(), sent as usize);
                prop_assert_eq!(flight.span() as u64, open.first().map_or(0, |first| sent + 1 - first));
                prop_assert_eq!(flight.oldest().is_some(), !open.is_empty());
            }
            let mut tags: Vec<u64> = told.iter().map(|(told, _)| (told - 1_000) / 7).collect();
            for ((told, outcome), tag) in told.iter().zip(&tags) {
                prop_assert_eq!((*told, outcome), (ticket(*tag), &fate(*tag)));
            }
            tags.extend(&open);
            tags.sort_unstable();
            prop_assert_eq!(tags, (1..=sent).collect::<Vec<_>>());
        }

        // Goal: no nonsense of a broker makes us tell an outcome twice or of nothing, or stop.
        #[test]
        fn nonsense_is_refused(
            count in 0u64..20,
            said in prop::collection::vec((0u64..25, any::<bool>(), any::<bool>(), any::<bool>()), 0..60),
        ) {
            let (mut flight, mut told) = (Flight::new(), Vec::new());
            (1..=count).for_each(|tag| flight.board(tag, place(tag), Instant::now()));
            for (tag, multiple, acked, returned) in said {
                let before = told.len();
                let newest = if multiple && tag == 0 { count } else { tag };
                let known = (1..=newest)
                    .filter(|upto| multiple || *upto == newest)
                    .all(|upto| told.iter().any(|(ticket, _)| *ticket == upto));
                if returned {
                    let in_flight = (1..=count).contains(&tag) && !told.iter().any(|(ticket, _)| *ticket == tag);
                    prop_assert!(flight.returned(&place(tag).expect("one"), 312, String::new()).is_err() || in_flight);
                    continue;
                }
                let expected = match newest {
                    0 => Err(Mismatch::Unsent(0)),
                    tag if tag > count => Err(Mismatch::Unsent(tag)),
                    tag if known => Err(Mismatch::Twice(tag)),
                    _ => Ok(()),
                };
                prop_assert_eq!(flight.confirmed(tag, multiple, acked, &mut told), expected);
                prop_assert!(expected.is_ok() || told.len() == before);
                let mut tickets: Vec<u64> = told.iter().map(|(ticket, _)| *ticket).collect();
                tickets.sort_unstable();
                tickets.dedup();
                prop_assert_eq!(tickets.len(), told.len());
                prop_assert_eq!(flight.unconfirmed() + told.len(), count as usize);
            }
        }
    }

    // Goal: of two copies of one message in flight one return makes one returned and leaves the other to its confirm; a
    // second return is the other's.
    #[test]
    fn two_at_one_place_are_told_one_return_each() {
        for returns in 0..=2 {
            let (mut flight, mut told) = (Flight::new(), Vec::new());
            for number in 1..=3 {
                flight.board(number, place(7 + number / 3), Instant::now());
            }
            for _ in 0..returns {
                flight.returned(&place(7).expect("one"), 312, "NO_ROUTE".to_owned()).expect("in flight");
            }
            flight.confirmed(3, true, true, &mut told).expect("in flight");
            assert_eq!(told.iter().filter(|(_, outcome)| *outcome == no_route()).count(), returns);
            assert_eq!(told[2], (3, Outcome::Confirmed));
        }
    }

    // Goal: a copy is returned though its twin, which was routed, has its confirm already; and nothing that was told, or is
    // never returned, takes a return.
    #[test]
    fn a_return_is_of_what_has_no_confirm_yet() {
        let (mut flight, mut told) = (Flight::new(), Vec::new());
        for number in 1..=3 {
            flight.board(number, place(7).filter(|_| number < 3), Instant::now());
        }
        flight.confirmed(1, false, true, &mut told).expect("in flight");
        flight.returned(&place(7).expect("one"), 312, "NO_ROUTE".to_owned()).expect("in flight");
        assert_eq!(flight.returned(&place(7).expect("one"), 312, String::new()), Err(Mismatch::NotInFlight));
        flight.confirmed(3, true, true, &mut told).expect("in flight");
        assert_eq!(told, [(1, Outcome::Confirmed), (2, no_route()), (3, Outcome::Confirmed)]);
    }

    // Goal: the wait for a confirm begins when its message is written, not when it was taken on.
    #[test]
    fn the_clock_starts_with_the_write() {
        let (mut flight, now) = (Flight::new(), Instant::now());
        flight.board(1, place(1), now);
        assert_eq!(flight.oldest(), None);
        flight.sent(now + std::time::Duration::from_secs(9));
        flight.board(2, place(2), now);
        assert_eq!(flight.oldest(), Some(now + std::time::Duration::from_secs(9)));
        flight.confirmed(1, false, true, &mut Vec::new()).expect("in flight");
        assert_eq!(flight.oldest(), None);
    }
}
