//! Which frames acknowledge deliveries: pure.
//!
//! A frame with `multiple` acknowledges everything open up to its tag, so it goes no further than the oldest delivery that
//! stays open: there one frame does what many would. Beyond it each goes alone.

use std::collections::BTreeSet;

/// The open deliveries of a session, by tag: no more than its prefetch, however long the oldest stays open.
#[derive(Debug, Default)]
pub(super) struct Acks {
    open: BTreeSet<u64>,
}

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ack {
    pub(super) tag: u64,
    /// Everything open up to the tag.
    pub(super) multiple: bool,
}

impl Acks {
    /// A delivery came.
    pub(super) fn delivered(&mut self, tag: u64) {
        self.open.insert(tag);
    }

    /// The frames that acknowledge these and no others. A tag that is not open gets its own: the broker refuses it.
    pub(super) fn frames(&mut self, tags: &[u64]) -> Vec<Ack> {
        let (settled, unknown): (Vec<u64>, Vec<u64>) = tags.iter().partition(|tag| self.open.remove(tag));
        let oldest_open = self.open.first().copied().unwrap_or(u64::MAX);
        let (front, beyond): (Vec<u64>, Vec<u64>) = settled.into_iter().partition(|tag| *tag < oldest_open);
        let upto = front.iter().max().map(|tag| Ack { tag: *tag, multiple: front.len() > 1 });
        let alone = beyond.into_iter().chain(unknown).map(|tag| Ack { tag, multiple: false });
        upto.into_iter().chain(alone).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a broker does with the frames.
    fn acknowledge(open: &mut BTreeSet<u64>, frames: &[Ack]) -> Result<BTreeSet<u64>, u64> {
        let mut gone = BTreeSet::new();
        for frame in frames {
            if !open.contains(&frame.tag) {
                return Err(frame.tag);
            }
            let taken: Vec<u64> =
                open.iter().copied().filter(|tag| *tag == frame.tag || (frame.multiple && *tag < frame.tag)).collect();
            assert!(!frame.multiple || taken.len() > 1, "{frame:?} does what one alone would");
            for tag in taken {
                open.remove(&tag);
                gone.insert(tag);
            }
        }
        Ok(gone)
    }

    proptest! {
        /// Goal: whatever is settled in whatever order, the broker takes exactly that for acknowledged, each time; and
        /// what is settled without a gap from the oldest on is one frame. Nothing is kept but what is open.
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
                prop_assert_eq!(&acks.open, &open);
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

    /// Goal: behind a delivery that stays open nothing is kept of what is done.
    #[test]
    fn what_is_done_is_forgotten() {
        let mut acks = Acks::default();
        acks.delivered(1);
        for tag in 2..=1_000 {
            acks.delivered(tag);
            acks.frames(&[tag]);
            assert_eq!(acks.open.len(), 1);
        }
    }
}
