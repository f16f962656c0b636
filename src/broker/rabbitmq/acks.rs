//! Which frames acknowledge deliveries: pure.
//!
//! A frame with `multiple` acknowledges everything up to its tag, so it stands only for deliveries that are all settled,
//! without a gap, from the oldest one on: there one frame does what many would. Behind the first gap each goes alone.

use std::collections::VecDeque;

/// The deliveries of a session from the oldest one that is not acknowledged on, by tag.
#[derive(Debug, Default)]
pub(super) struct Acks {
    deliveries: VecDeque<(u64, State)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Open,
    /// To be acknowledged by the frames that are being made.
    Settled,
    /// Acknowledged alone, behind a gap.
    Acknowledged,
}

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ack {
    pub(super) tag: u64,
    /// Everything open up to the tag.
    pub(super) multiple: bool,
}

impl Acks {
    /// A delivery came; tags rise.
    pub(super) fn delivered(&mut self, tag: u64) {
        debug_assert!(self.deliveries.back().is_none_or(|(last, _)| *last < tag), "tags rise");
        self.deliveries.push_back((tag, State::Open));
    }

    /// The frames that acknowledge these and no others. A tag that is not open gets its own: the broker refuses it.
    pub(super) fn frames(&mut self, tags: &[u64]) -> Vec<Ack> {
        let mut unknown = Vec::new();
        for &tag in tags {
            match self.state(tag) {
                Some(state) if *state == State::Open => *state = State::Settled,
                _ => unknown.push(Ack { tag, multiple: false }),
            }
        }
        let mut frames = Vec::new();
        let mut upto: Option<Ack> = None;
        while let Some((tag, state)) = self.deliveries.front().copied()
            && state != State::Open
        {
            self.deliveries.pop_front();
            if state == State::Settled {
                upto = Some(Ack { tag, multiple: upto.is_some() });
            }
        }
        frames.extend(upto);
        for &tag in tags {
            if let Some(state) = self.state(tag)
                && *state == State::Settled
            {
                *state = State::Acknowledged;
                frames.push(Ack { tag, multiple: false });
            }
        }
        frames.extend(unknown);
        frames
    }

    fn state(&mut self, tag: u64) -> Option<&mut State> {
        let index = self.deliveries.binary_search_by_key(&tag, |(tag, _)| *tag).ok()?;
        Some(&mut self.deliveries[index].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// What a broker does with the frames.
    fn acknowledge(open: &mut BTreeSet<u64>, frames: &[Ack]) -> Result<BTreeSet<u64>, u64> {
        let mut gone = BTreeSet::new();
        for frame in frames {
            if !open.contains(&frame.tag) {
                return Err(frame.tag);
            }
            let taken: Vec<u64> =
                open.iter().copied().filter(|tag| *tag == frame.tag || (frame.multiple && *tag < frame.tag)).collect();
            for tag in taken {
                open.remove(&tag);
                gone.insert(tag);
            }
        }
        Ok(gone)
    }

    proptest! {
        /// Goal: whatever is settled in whatever order, the broker takes exactly that for acknowledged, each time; and
        /// what is settled without a gap from the oldest on is one frame.
        #[test]
        fn exactly_what_is_settled_is_acknowledged(
            steps in prop::collection::vec((0usize..6, prop::collection::vec(any::<prop::sample::Index>(), 0..6)), 1..60),
        ) {
            let (mut acks, mut open, mut next) = (Acks::default(), BTreeSet::new(), 1);
            for (delivered, picks) in steps {
                for _ in 0..delivered {
                    acks.delivered(next);
                    open.insert(next);
                    next += 1;
                }
                let mut rest: Vec<u64> = open.iter().copied().collect();
                let mut tags = Vec::new();
                for pick in picks {
                    if !rest.is_empty() {
                        tags.push(rest.remove(pick.index(rest.len())));
                    }
                }
                let oldest_left = rest.first().copied().unwrap_or(u64::MAX);
                let frames = acks.frames(&tags);
                let in_front = tags.iter().filter(|tag| **tag < oldest_left).count();
                prop_assert_eq!(frames.len(), tags.len() - in_front + in_front.min(1));
                prop_assert_eq!(acknowledge(&mut open, &frames), Ok(tags.iter().copied().collect()));
                prop_assert_eq!(open.iter().copied().collect::<Vec<_>>(), rest);
            }
        }
    }

    /// Goal: a tag that was never delivered, or was acknowledged before, is put to the broker alone, which refuses it.
    #[test]
    fn what_is_not_open_goes_alone() {
        let mut acks = Acks::default();
        for tag in 1..=3 {
            acks.delivered(tag);
        }
        let alone = |tag| Ack { tag, multiple: false };
        assert_eq!(acks.frames(&[9]), [alone(9)]);
        assert_eq!(acks.frames(&[2]), [alone(2)]);
        assert_eq!(acks.frames(&[2, 1, 1]), [alone(1), alone(2), alone(1)]);
        assert_eq!(acks.frames(&[3]), [alone(3)]);
    }

    /// Goal: nothing is kept of what is acknowledged up to a gap.
    #[test]
    fn what_is_done_is_forgotten() {
        let mut acks = Acks::default();
        for tag in 1..=1_000 {
            acks.delivered(tag);
            acks.frames(&[tag]);
        }
        assert!(acks.deliveries.is_empty());
    }
}
