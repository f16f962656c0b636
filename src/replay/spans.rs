//! Offsets of several streams, as a replay reports them: pure.

use crate::ranges::Ranges;
use serde::Serialize;
use std::collections::BTreeMap;

/// Offsets of several streams.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(into = "Vec<Span>")]
pub struct Spans(BTreeMap<String, Ranges>);

/// A range of a stream's offsets, both ends in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Span {
    /// `topic#lane`
    pub stream: String,
    /// First offset.
    pub from: i64,
    /// Last offset.
    pub to: i64,
}

impl Spans {
    /// Adds a range of a stream.
    pub fn add(&mut self, stream: &str, from: i64, to: i64) {
        if from <= to {
            self.0.entry(stream.to_owned()).or_default().add(from, to);
        }
    }

    /// Adds one offset.
    pub fn add_one(&mut self, stream: &str, offset: i64) {
        self.add(stream, offset, offset);
    }

    /// True when there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many offsets it holds.
    pub fn count(&self) -> u64 {
        self.0.values().map(Ranges::count).fold(0, u64::saturating_add)
    }

    /// Every range, by stream and offset.
    pub fn iter(&self) -> impl Iterator<Item = (&str, i64, i64)> {
        self.0.iter().flat_map(|(stream, ranges)| ranges.iter().map(move |(from, to)| (stream.as_str(), from, to)))
    }
}

impl From<Spans> for Vec<Span> {
    fn from(spans: Spans) -> Self {
        spans.iter().map(|(stream, from, to)| Span { stream: stream.to_owned(), from, to }).collect()
    }
}
