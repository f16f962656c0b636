//! Which offset a message gets: counters a stream, pure.
//!
//! The counters depend on nothing but the rows before, in window order, so every replay assigns the same offsets.

use crate::message::{Envelope, Message, Position};
use std::collections::{HashMap, HashSet};
use uuid::Uuid;

/// Streams a lane keeps apart; the topics beyond share one stream, `*#lane`. It bounds the counters in memory and
/// in each keyframe of the journal.
pub const MAX_STREAMS: usize = 10_000;

/// The next offset of every stream of a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offsets {
    lane: i16,
    next: HashMap<String, i64>,
    touched: HashSet<String>,
}

impl Offsets {
    /// A lane in which nothing was published.
    pub fn new(lane: i16) -> Self {
        Self { lane, next: HashMap::new(), touched: HashSet::new() }
    }

    /// Sets counters as the journal recorded them: the offset the next message of each stream gets.
    pub fn apply(&mut self, streams: &[String], bases: &[i64]) {
        for (stream, base) in streams.iter().zip(bases) {
            self.next.insert(stream.clone(), *base);
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
        self.next.get(stream).copied().unwrap_or(1)
    }

    /// Passes over `count` messages of `topic`; returns the stream, and the first of their offsets and ordinals.
    pub fn skip(&mut self, topic: &str, count: i64) -> (String, i64, i64) {
        // No topic is empty: the lane's own counter stands beside those of its streams.
        let ordinal = self.advance(format!("#{}", self.lane), count);
        let mut stream = format!("{topic}#{}", self.lane);
        if !self.next.contains_key(&stream) && self.next.len() >= MAX_STREAMS {
            stream = format!("*#{}", self.lane);
        }
        let offset = self.advance(stream.clone(), count);
        (stream, offset, ordinal)
    }

    fn advance(&mut self, counter: String, count: i64) -> i64 {
        if !self.touched.contains(&counter) {
            self.touched.insert(counter.clone());
        }
        let next = self.next.entry(counter).or_insert(1);
        *next += count;
        *next - count
    }

    /// The counters that moved since the last call, sorted, as the next plan records them.
    pub fn take_delta(&mut self) -> (Vec<String>, Vec<i64>) {
        let touched = std::mem::take(&mut self.touched);
        self.counters(touched.into_iter().collect())
    }

    /// Every counter, sorted, as a keyframe records them; forgets what moved.
    pub fn take_keyframe(&mut self) -> (Vec<String>, Vec<i64>) {
        self.touched.clear();
        self.counters(self.next.keys().cloned().collect())
    }

    /// The first stream whose counter differs from the one recorded, if any.
    pub fn contradiction<'a>(&self, streams: &'a [String], bases: &[i64]) -> Option<&'a str> {
        let mut recorded = streams.iter().zip(bases);
        recorded.find(|(stream, base)| self.next.get(*stream) != Some(*base)).map(|(stream, _)| stream.as_str())
    }

    fn counters(&self, mut streams: Vec<String>) -> (Vec<String>, Vec<i64>) {
        streams.sort_unstable();
        let bases = streams.iter().map(|stream| self.next[stream]).collect();
        (streams, bases)
    }
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
            let (streams, bases) = first.take_delta();
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
