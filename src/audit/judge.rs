//! What the figures of outbox and inboxes mean: pure.

use crate::message::MessageId;
use crate::ranges::Ranges;
use serde::Serialize;
use serde::ser::{SerializeSeq, Serializer};
use std::collections::BTreeMap;
use utoipa::ToSchema;
use uuid::Uuid;

/// A stream of one source.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
pub struct StreamId {
    /// The outbox.
    pub source: Uuid,
    /// `topic#lane`.
    pub stream: String,
}

impl StreamId {
    /// Topics beyond a lane's bound share this stream: consumers see parts of it.
    fn is_shared(&self) -> bool {
        self.stream.starts_with("*#")
    }
}

/// What the outbox knows of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Produced {
    /// Offset the next message gets.
    pub next_offset: i64,
    /// Offset of the first message that may not have reached the broker.
    pub unsettled_from: i64,
    /// Held by the relay.
    pub waiting: Ranges,
    pub parked: Ranges,
    pub discarded: Ranges,
}

/// What a consumer is to apply of a stream: everything from `start` on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Expected {
    pub consumer: String,
    pub id: StreamId,
    pub start: i64,
}

/// What a consumer has made of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Applied {
    /// In its ledger.
    pub applied: Ranges,
    pub waiting: Ranges,
    pub parked: Ranges,
    pub discarded: Ranges,
    /// Offsets that came under two ids.
    pub doubled: Ranges,
}

/// One outbox.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    pub streams: BTreeMap<StreamId, Produced>,
    pub expected: Vec<Expected>,
}

/// A consumer's stream as one database has it.
#[derive(Debug)]
pub(super) struct Inbox {
    pub consumer: String,
    pub id: StreamId,
    pub applied: Applied,
}

/// What became of a stream's messages on their way to the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = AuditedStream)]
pub struct Stream {
    /// Which.
    #[serde(flatten)]
    pub id: StreamId,
    /// Committed messages.
    pub produced: u64,
    /// Confirmed by the broker.
    pub published: u64,
    /// Not sent yet.
    pub unpublished: u64,
    /// Held for another attempt.
    pub waiting: u64,
    /// Need an operator.
    pub parked: u64,
    /// Given up by an operator.
    pub discarded: u64,
}

/// What became of a stream's messages at one consumer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ConsumerStream {
    /// The logical consumer.
    pub consumer: String,
    /// Which stream.
    #[serde(flatten)]
    pub id: StreamId,
    /// The first offset it must apply.
    pub from: i64,
    /// Applied offsets.
    pub applied: u64,
    /// On their way: published beyond the last one it applied.
    pub behind: u64,
    /// Held for another attempt.
    pub waiting: u64,
    /// Need an operator.
    pub parked: u64,
    /// Given up by an operator.
    pub discarded: u64,
    /// Lost on the way, as ranges of first and last offset.
    #[serde(serialize_with = "as_ranges")]
    #[schema(value_type = Vec<Vec<i64>>, example = json!([[3, 5]]))]
    pub missing: Ranges,
    /// Applied under two ids.
    #[serde(serialize_with = "as_ranges")]
    #[schema(value_type = Vec<Vec<i64>>, example = json!([[3, 5]]))]
    pub doubled: Ranges,
    /// Applied, and never produced by this outbox: it has gone back in time.
    #[serde(serialize_with = "as_ranges")]
    #[schema(value_type = Vec<Vec<i64>>, example = json!([[3, 5]]))]
    pub unknown: Ranges,
    /// False: a stream that several topics share tells nothing of what is missing.
    pub checked: bool,
}

fn as_ranges<S: Serializer>(set: &Ranges, serializer: S) -> Result<S::Ok, S::Error> {
    let mut list = serializer.serialize_seq(None)?;
    for range in set.iter() {
        list.serialize_element(&range)?;
    }
    list.end()
}

/// The whole audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Report {
    /// The outbox, by stream.
    pub streams: Vec<Stream>,
    /// The consumers, by consumer and stream.
    pub consumers: Vec<ConsumerStream>,
    /// What is missing, message by message; the first of them.
    pub missing: Vec<Missing>,
}

/// A message that a consumer lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Missing {
    /// The logical consumer.
    pub consumer: String,
    /// Which stream.
    #[serde(flatten)]
    pub id: StreamId,
    /// Its place there.
    pub offset: i64,
    /// Its id, if the log still holds it.
    #[schema(value_type = Option<Uuid>)]
    pub message_id: Option<MessageId>,
}

impl Report {
    /// Messages that are missing.
    pub fn missing_count(&self) -> u64 {
        self.consumers.iter().map(|stream| stream.missing.count()).sum()
    }

    /// Messages that are doubled.
    pub fn doubled_count(&self) -> u64 {
        self.consumers.iter().map(|stream| stream.doubled.count()).sum()
    }

    /// Applied offsets that were never produced.
    pub fn unknown_count(&self) -> u64 {
        self.consumers.iter().map(|stream| stream.unknown.count()).sum()
    }

    /// The streams of which somebody lacks something, and what; by source.
    pub fn lacking(&self) -> BTreeMap<Uuid, BTreeMap<String, Ranges>> {
        let mut lacking: BTreeMap<Uuid, BTreeMap<String, Ranges>> = BTreeMap::new();
        for entry in self.consumers.iter().filter(|entry| !entry.missing.is_empty()) {
            let ranges = lacking.entry(entry.id.source).or_default().entry(entry.id.stream.clone()).or_default();
            *ranges = ranges.union(&entry.missing);
        }
        lacking
    }

    /// Nothing is missing, doubled or unknown.
    pub fn is_clean(&self) -> bool {
        self.missing_count() == 0 && self.doubled_count() == 0 && self.unknown_count() == 0
    }

    /// Missing is what was missing at an earlier look too.
    pub(super) fn confirm(mut self, earlier: &Self) -> Self {
        for stream in &mut self.consumers {
            let before = earlier.consumers.iter().find(|e| e.consumer == stream.consumer && e.id == stream.id);
            let before = before.map_or_else(Ranges::default, |before| before.missing.clone());
            stream.missing = stream.missing.intersection(&before);
        }
        self
    }
}

/// Holds what was applied against what was produced.
pub(super) fn judge(outbox: Outbox, inboxes: Vec<Inbox>) -> Report {
    let mut found: BTreeMap<(String, StreamId), (Option<i64>, Applied)> = BTreeMap::new();
    for Expected { consumer, id, start } in outbox.expected {
        found.entry((consumer, id)).or_default().0 = Some(start);
    }
    // A consumer may have been moved from one database to another: both ledgers count.
    for Inbox { consumer, id, applied } in inboxes {
        let entry = &mut found.entry((consumer, id)).or_default().1;
        entry.doubled = entry.doubled.union(&applied.doubled).union(&entry.applied.intersection(&applied.applied));
        entry.applied = entry.applied.union(&applied.applied);
        entry.waiting = entry.waiting.union(&applied.waiting);
        entry.parked = entry.parked.union(&applied.parked);
        entry.discarded = entry.discarded.union(&applied.discarded);
    }
    let consumers = found
        .into_iter()
        .map(|((consumer, id), (start, applied))| {
            consumer_stream(consumer, outbox.streams.get(&id), id, start, &applied)
        })
        .collect();
    let streams = outbox.streams.into_iter().map(|(id, produced)| stream(id, &produced)).collect();
    Report { streams, consumers, missing: Vec::new() }
}

fn stream(id: StreamId, produced: &Produced) -> Stream {
    let settled = Ranges::of(1, produced.unsettled_from - 1);
    let [waiting, parked, discarded] =
        [&produced.waiting, &produced.parked, &produced.discarded].map(|set| set.intersection(&settled).count());
    Stream {
        id,
        produced: Ranges::of(1, produced.next_offset - 1).count(),
        published: settled.count() - waiting - parked - discarded,
        unpublished: Ranges::of(produced.unsettled_from, produced.next_offset - 1).count(),
        waiting,
        parked,
        discarded,
    }
}

fn consumer_stream(
    consumer: String,
    produced: Option<&Produced>,
    id: StreamId,
    start: Option<i64>,
    inbox: &Applied,
) -> ConsumerStream {
    let from = start.or(inbox.applied.first()).unwrap_or(1);
    let taken = inbox.applied.union(&inbox.waiting).union(&inbox.parked).union(&inbox.discarded);
    let mut entry = ConsumerStream {
        consumer,
        from,
        applied: inbox.applied.minus(&inbox.discarded).count(),
        behind: 0,
        waiting: inbox.waiting.count(),
        parked: inbox.parked.count(),
        discarded: inbox.discarded.count(),
        missing: Ranges::default(),
        doubled: inbox.doubled.clone(),
        unknown: Ranges::default(),
        checked: produced.is_some() && !id.is_shared(),
        id,
    };
    // Another outbox than the one that is audited has its own audit.
    let Some(produced) = produced else { return entry };
    if let Some(last) = taken.last() {
        entry.unknown = taken.minus(&Ranges::of(1, produced.next_offset - 1));
        if !entry.checked {
            return entry;
        }
        // What is in flight while later offsets are applied is not missing.
        let reachable = Ranges::of(from, last.min(produced.unsettled_from - 1));
        let kept_back = produced.waiting.union(&produced.parked).union(&produced.discarded);
        entry.missing = reachable.minus(&taken).minus(&kept_back);
    }
    let sent = Ranges::of(from.max(taken.last().map_or(1, |last| last + 1)), produced.unsettled_from - 1);
    let kept_back = produced.waiting.union(&produced.parked).union(&produced.discarded);
    entry.behind = sent.minus(&kept_back).count();
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id() -> StreamId {
        StreamId { source: Uuid::nil(), stream: "t#0".to_owned() }
    }

    fn set(offsets: &[i64]) -> Ranges {
        offsets.iter().fold(Ranges::default(), |set, offset| set.union(&Ranges::of(*offset, *offset)))
    }

    fn judged(produced: Produced, start: Option<i64>, applied: Applied) -> ConsumerStream {
        let outbox = Outbox {
            streams: BTreeMap::from([(id(), produced)]),
            expected: start.map(|start| Expected { consumer: "c".to_owned(), id: id(), start }).into_iter().collect(),
        };
        let inbox = Inbox { consumer: "c".to_owned(), id: id(), applied };
        judge(outbox, vec![inbox]).consumers.remove(0)
    }

    proptest! {
        /// Goal: whatever fate each message has, exactly the lost ones below something later are missing.
        #[test]
        fn exactly_the_lost_ones_are_missing(fates in prop::collection::vec(0u8..7, 1..60)) {
            let offsets = |fate: u8| -> Vec<i64> {
                (1..).zip(&fates).filter(|(_, f)| **f == fate).map(|(offset, _)| offset).collect()
            };
            let produced = Produced {
                next_offset: fates.len() as i64 + 1,
                unsettled_from: fates.len() as i64 + 1,
                parked: set(&offsets(1)),
                waiting: set(&offsets(2)),
                ..Produced::default()
            };
            let applied = Applied {
                applied: set(&offsets(3)).union(&set(&offsets(6))),
                waiting: set(&offsets(4)),
                parked: set(&offsets(5)),
                ..Applied::default()
            };
            let last = (1..).zip(&fates).filter(|(_, f)| (3..=6).contains(*f)).map(|(o, _)| o).last().unwrap_or(0);
            let lost: Vec<i64> = offsets(0).into_iter().filter(|offset| *offset < last).collect();
            let entry = judged(produced, Some(1), applied);
            prop_assert_eq!(entry.missing, set(&lost));
            prop_assert_eq!(entry.behind, offsets(0).into_iter().filter(|offset| *offset > last).count() as u64);
            prop_assert!(entry.doubled.is_empty() && entry.unknown.is_empty());
        }
    }

    /// Goal: nothing is expected from before the binding; of an unknown consumer, nothing before its first message.
    #[test]
    fn a_consumer_has_a_beginning() {
        let produced = || Produced { next_offset: 11, unsettled_from: 11, ..Produced::default() };
        let applied = || Applied { applied: set(&[5, 7]), ..Applied::default() };
        assert_eq!(judged(produced(), Some(4), applied()).missing, set(&[4, 6]));
        assert_eq!(judged(produced(), None, applied()).missing, set(&[6]));
    }

    /// Goal: what the relay has not settled may still be on its way; what was never produced is unknown.
    #[test]
    fn unsettled_offsets_are_not_missing() {
        let produced = Produced { next_offset: 8, unsettled_from: 3, ..Produced::default() };
        let entry = judged(produced, Some(1), Applied { applied: set(&[1, 6, 9]), ..Applied::default() });
        assert_eq!((entry.missing, entry.unknown), (set(&[2]), set(&[9])));
    }

    /// Goal: the same offset in two databases is two effects.
    #[test]
    fn an_offset_applied_in_two_databases_is_doubled() {
        let inbox = |offsets| Inbox {
            consumer: "c".to_owned(),
            id: id(),
            applied: Applied { applied: set(offsets), ..Applied::default() },
        };
        let produced = Produced { next_offset: 9, unsettled_from: 9, ..Produced::default() };
        let outbox = Outbox { streams: BTreeMap::from([(id(), produced)]), expected: Vec::new() };
        let report = judge(outbox, vec![inbox(&[1, 2]), inbox(&[2, 3])]);
        assert_eq!((report.doubled_count(), report.missing_count(), report.is_clean()), (1, 0, false));
    }

    /// Goal: a gap that closes within the grace was none.
    #[test]
    fn only_what_stays_missing_is() {
        let look = |applied: &[i64]| {
            let produced = Produced { next_offset: 9, unsettled_from: 9, ..Produced::default() };
            let outbox = Outbox { streams: BTreeMap::from([(id(), produced)]), expected: Vec::new() };
            let applied = Applied { applied: set(applied), ..Applied::default() };
            judge(outbox, vec![Inbox { consumer: "c".to_owned(), id: id(), applied }])
        };
        let report = look(&[1, 2, 4, 5, 7]).confirm(&look(&[1, 4, 6]));
        assert_eq!(report.consumers[0].missing, set(&[3]));
    }
}
