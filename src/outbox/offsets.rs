//! Which offset a message gets: counters a stream, pure.
//!
//! The counters depend on nothing but the rows before, in window order, so every replay assigns the same offsets.

use crate::message::{Envelope, Message, Position};
use std::collections::HashMap;
use uuid::Uuid;

/// Streams a lane keeps apart; the topics beyond share one stream, `*#lane`. It bounds the counters in memory and
/// in each keyframe of the journal.
pub const MAX_STREAMS: usize = 10_000;

/// The next offset of every stream of a lane.
#[derive(Debug, Clone)]
pub struct Offsets {
    lane: i16,
    /// The counter of the whole lane.
    ordinals: Counter,
    streams: Vec<Counter>,
    /// Which of `streams` is a topic's.
    by_topic: HashMap<String, usize>,
    /// Which of `streams` have moved.
    moved: Vec<usize>,
}

#[derive(Debug, Clone)]
struct Counter {
    /// As the journal names it.
    stream: String,
    next: i64,
    moved: bool,
}

impl Counter {
    fn advance(&mut self, count: i64) -> i64 {
        self.moved = true;
        self.next += count;
        self.next - count
    }
}

impl Offsets {
    /// A lane in which nothing was published.
    pub fn new(lane: i16) -> Self {
        // No topic is empty: the lane's own counter stands beside those of its streams.
        let ordinals = Counter { stream: format!("#{lane}"), next: 1, moved: false };
        Self { lane, ordinals, streams: Vec::new(), by_topic: HashMap::new(), moved: Vec::new() }
    }

    /// Sets counters as the journal recorded them: the offset the next message of each stream gets.
    pub fn apply(&mut self, streams: &[String], bases: &[i64]) {
        for (stream, base) in streams.iter().zip(bases) {
            match topic_of(stream) {
                "" => self.ordinals.next = *base,
                topic => {
                    let at = self.stream(topic);
                    self.streams[at].next = *base;
                }
            }
        }
    }

    /// Stream, offset and ordinal of the next message of `topic`.
    pub fn assign(&mut self, topic: &str) -> (String, i64, i64) {
        self.skip(topic, 1)
    }

    /// Gives the next message its place, on its way to the broker.
    pub fn place(&mut self, source: Uuid, message: Message) -> Envelope {
        let (stream, offset, ordinal) = self.assign(&message.topic);
        Envelope { message, position: Position { source, stream, offset }, ordinal }
    }

    /// The offset the next message of a stream gets, and 1 if none was published in it. `#lane` asks for the ordinal.
    pub fn next(&self, stream: &str) -> i64 {
        self.counter(stream).map_or(1, |counter| counter.next)
    }

    /// Passes over `count` messages of `topic`; returns the stream, and the first of their offsets and ordinals.
    pub fn skip(&mut self, topic: &str, count: i64) -> (String, i64, i64) {
        let ordinal = self.ordinals.advance(count);
        let at = match self.by_topic.get(topic) {
            Some(at) => *at,
            None if self.streams.len() + 1 >= MAX_STREAMS => self.stream("*"),
            None => self.stream(topic),
        };
        let counter = &mut self.streams[at];
        if !counter.moved {
            self.moved.push(at);
        }
        let offset = counter.advance(count);
        (counter.stream.clone(), offset, ordinal)
    }

    /// The counters that moved since they were last [`recorded`](Self::recorded), sorted.
    pub fn delta(&self) -> (Vec<String>, Vec<i64>) {
        let streams = self.moved.iter().map(|at| &self.streams[*at]);
        listed(std::iter::once(&self.ordinals).filter(|ordinals| ordinals.moved).chain(streams))
    }

    /// Every counter, sorted.
    pub fn keyframe(&self) -> (Vec<String>, Vec<i64>) {
        listed(std::iter::once(&self.ordinals).filter(|ordinals| ordinals.next > 1).chain(&self.streams))
    }

    /// A plan has recorded what moved.
    pub fn recorded(&mut self) {
        self.ordinals.moved = false;
        for at in self.moved.drain(..) {
            self.streams[at].moved = false;
        }
    }

    /// The first stream whose counter differs from the one recorded, if any.
    pub fn contradiction<'a>(&self, streams: &'a [String], bases: &[i64]) -> Option<&'a str> {
        let mut recorded = streams.iter().zip(bases);
        recorded
            .find(|(stream, base)| self.counter(stream).map(|counter| counter.next) != Some(**base))
            .map(|(stream, _)| stream.as_str())
    }

    fn counter(&self, stream: &str) -> Option<&Counter> {
        match topic_of(stream) {
            "" => Some(&self.ordinals),
            topic => self.by_topic.get(topic).map(|at| &self.streams[*at]),
        }
    }

    /// The counter of a topic's stream, which is made if it is missing.
    fn stream(&mut self, topic: &str) -> usize {
        if let Some(at) = self.by_topic.get(topic) {
            return *at;
        }
        self.streams.push(Counter { stream: format!("{topic}#{}", self.lane), next: 1, moved: false });
        self.by_topic.insert(topic.to_owned(), self.streams.len() - 1);
        self.streams.len() - 1
    }
}

/// `topic#lane` without its lane.
fn topic_of(stream: &str) -> &str {
    stream.rsplit_once('#').map_or(stream, |(topic, _)| topic)
}

fn listed<'a>(counters: impl Iterator<Item = &'a Counter>) -> (Vec<String>, Vec<i64>) {
    let mut counters: Vec<&Counter> = counters.collect();
    counters.sort_unstable_by(|a, b| a.stream.cmp(&b.stream));
    counters.into_iter().map(|counter| (counter.stream.clone(), counter.next)).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Goal: cut anywhere into windows, replayed from the recorded deltas, every message gets the same dense
        /// offset.
        #[test]
        fn a_replay_from_any_delta_assigns_the_same(topics in prop::collection::vec(0u8..5, 1..200), cut in 0usize..200) {
            let cut = cut.min(topics.len());
            let mut whole = Offsets::new(3);
            let all: Vec<_> = topics.iter().map(|t| whole.assign(&t.to_string())).collect();

            let mut first = Offsets::new(3);
            for topic in &topics[..cut] {
                first.assign(&topic.to_string());
            }
            let (streams, bases) = first.delta();
            let mut resumed = Offsets::new(3);
            resumed.apply(&streams, &bases);
            let rest: Vec<_> = topics[cut..].iter().map(|t| resumed.assign(&t.to_string())).collect();
            prop_assert_eq!(&all[cut..], &rest[..]);

            let mut by_stream: HashMap<String, Vec<i64>> = HashMap::new();
            for (expected, (stream, offset, ordinal)) in (1..).zip(all) {
                prop_assert_eq!(ordinal, expected);
                by_stream.entry(stream).or_default().push(offset);
            }
            for offsets in by_stream.values() {
                prop_assert_eq!(offsets, &(1..=offsets.len() as i64).collect::<Vec<_>>());
            }
        }
    }

    /// Goal: topics beyond the bound share one stream and still get dense offsets.
    #[test]
    fn topics_beyond_the_bound_share_a_stream() {
        let mut offsets = Offsets::new(0);
        let mut assign = |topic: &str| {
            let (stream, offset, _) = offsets.assign(topic);
            (stream, offset)
        };
        for i in 1..MAX_STREAMS {
            assert_eq!(assign(&format!("t{i}")), (format!("t{i}#0"), 1));
        }
        assert_eq!(assign("late"), ("*#0".to_owned(), 1));
        assert_eq!(assign("later"), ("*#0".to_owned(), 2));
        assert_eq!(assign("t7"), ("t7#0".to_owned(), 2));
    }
}
