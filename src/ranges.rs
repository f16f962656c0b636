//! Sets of offsets as ranges: pure. They grow with gaps, not with messages.

/// A set of offsets: ranges with both ends in, sorted, neither overlapping nor adjacent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(Vec<(i64, i64)>);

impl Ranges {
    /// One range; its end may be `i64::MAX` for all there is.
    pub fn of(from: i64, to: i64) -> Self {
        let mut ranges = Self::default();
        ranges.add(from, to);
        ranges
    }

    /// Adds a range; an empty one adds nothing.
    pub fn add(&mut self, from: i64, to: i64) {
        if from > to {
            return;
        }
        // Those that end before it, with at least one offset between, stay as they are, and so do those behind it.
        let first = self.0.partition_point(|range| range.1 < from.saturating_sub(1));
        let last = self.0.partition_point(|range| range.0 <= to.saturating_add(1));
        let joined = self.0[first..last].iter().fold((from, to), |sum, range| (sum.0.min(range.0), sum.1.max(range.1)));
        self.0.splice(first..last, [joined]);
    }

    /// The part that lies in a range.
    pub fn clip(&self, from: i64, to: i64) -> Self {
        let first = self.0.partition_point(|range| range.1 < from);
        let within = self.0[first..].iter().take_while(|range| range.0 <= to);
        Self(within.map(|range| (range.0.max(from), range.1.min(to))).filter(|range| range.0 <= range.1).collect())
    }

    /// Whether any of a range is in it.
    pub fn meets(&self, from: i64, to: i64) -> bool {
        let first = self.0.partition_point(|range| range.1 < from);
        from <= to && self.0.get(first).is_some_and(|range| range.0 <= to)
    }

    /// Whether it holds an offset.
    pub fn contains(&self, offset: i64) -> bool {
        self.meets(offset, offset)
    }

    /// The smallest offset.
    pub fn first(&self) -> Option<i64> {
        self.0.first().map(|range| range.0)
    }

    /// The largest offset.
    pub fn last(&self) -> Option<i64> {
        self.0.last().map(|range| range.1)
    }

    /// How many offsets it holds.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|(from, to)| to.abs_diff(*from).saturating_add(1)).fold(0, u64::saturating_add)
    }

    /// Reads an `int8multirange` as Postgres prints it: `{[1,5),[7,9)}`.
    pub fn parse(text: &str) -> Option<Self> {
        let inner = text.strip_prefix('{')?.strip_suffix('}')?;
        let mut ranges = Vec::new();
        for range in inner.split("),").filter(|range| !range.is_empty()) {
            let (first, end) = range.strip_prefix('[')?.trim_end_matches(')').split_once(',')?;
            ranges.push((first.parse().ok()?, end.parse::<i64>().ok()?.checked_sub(1)?));
        }
        Some(Self(ranges))
    }

    /// What is in either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut all: Vec<_> = self.iter().chain(other.iter()).collect();
        all.sort_unstable();
        let mut ranges: Vec<(i64, i64)> = Vec::with_capacity(all.len());
        for (from, to) in all {
            match ranges.last_mut() {
                Some(last) if from <= last.1.saturating_add(1) => last.1 = last.1.max(to),
                _ => ranges.push((from, to)),
            }
        }
        Self(ranges)
    }

    /// What is here and not in `other`.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        let mut ranges = Vec::new();
        for (from, to) in self.iter() {
            let mut next = Some(from);
            for (out, back) in other.clip(from, to).iter() {
                ranges.extend(next.filter(|next| *next < out).map(|next| (next, out - 1)));
                next = back.checked_add(1);
            }
            ranges.extend(next.filter(|next| *next <= to).map(|next| (next, to)));
        }
        Self(ranges)
    }

    /// What is in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.minus(&self.minus(other))
    }

    /// True when it holds none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        /// Goal: ranges are the set they stand for, whatever the order they came in, and in normal form.
        #[test]
        fn ranges_are_sets(added in prop::collection::vec((1i64..60, 0i64..8), 0..20), clip in (1i64..60, 0i64..20)) {
            let (mut ranges, mut set) = (Ranges::default(), BTreeSet::new());
            for (from, more) in added {
                ranges.add(from, from + more);
                set.extend(from..=from + more);
            }
            let listed = |ranges: &Ranges| ranges.iter().flat_map(|(from, to)| from..=to).collect::<Vec<_>>();
            prop_assert_eq!(listed(&ranges), set.iter().copied().collect::<Vec<_>>());
            prop_assert!(ranges.0.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0), "{:?}", ranges);
            prop_assert_eq!(ranges.count(), set.len() as u64);
            prop_assert_eq!((ranges.first(), ranges.last()), (set.first().copied(), set.last().copied()));
            let (from, to) = (clip.0, clip.0 + clip.1);
            let within: Vec<i64> = set.range(from..=to).copied().collect();
            prop_assert_eq!(ranges.meets(from, to), !within.is_empty());
            prop_assert_eq!(listed(&ranges.clip(from, to)), within);
        }
    }

    /// Goal: an open end is no overflow.
    #[test]
    fn an_open_end_is_a_range_too() {
        let mut ranges = Ranges::of(5, i64::MAX);
        ranges.add(4, 4);
        ranges.add(1, 2);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(1, 2), (4, i64::MAX)]);
        assert!(ranges.contains(i64::MAX) && !ranges.contains(3));
        assert_eq!(ranges.clip(7, i64::MAX), Ranges::of(7, i64::MAX));
    }

    proptest! {
        /// Goal: the operations agree with those on plain sets, and ranges stay in normal form.
        #[test]
        fn operations_are_those_of_sets(
            a in prop::collection::btree_set(1i64..40, 0..30),
            b in prop::collection::btree_set(1i64..40, 0..30),
        ) {
            let ranges = |set: &BTreeSet<i64>| set.iter().fold(Ranges::default(), |all, o| all.union(&Ranges::of(*o, *o)));
            let set = |ranges: &Ranges| ranges.iter().flat_map(|(from, to)| from..=to).collect::<BTreeSet<i64>>();
            let (x, y) = (ranges(&a), ranges(&b));
            prop_assert_eq!(set(&x.union(&y)), a.union(&b).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(set(&x.minus(&y)), a.difference(&b).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(set(&x.intersection(&y)), a.intersection(&b).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(x.is_empty(), a.is_empty());
            for set in [x.union(&y), x.minus(&y), x.intersection(&y)] {
                prop_assert!(set.0.iter().all(|(from, to)| from <= to));
                prop_assert!(set.0.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0));
            }
        }
    }

    /// Goal: what Postgres prints is read, and nothing else.
    #[test]
    fn multiranges_are_read() {
        assert_eq!(Ranges::parse("{}"), Some(Ranges::default()));
        let two = Ranges::parse("{[1,5),[7,9)}").expect("two ranges");
        assert_eq!(two.iter().collect::<Vec<_>>(), [(1, 4), (7, 8)]);
        for text in ["", "{", "[1,2)", "{[1,}", "{(1,2)}", "{[a,2)}"] {
            assert_eq!(Ranges::parse(text), None, "{text}");
        }
    }
}
