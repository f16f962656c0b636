//! How large batches are, and when workers side by side are better than batches. Pure: times are handed in.
//!
//! A shared commit saves what a message costs beside its handler. That is little where the handler takes many times as
//! long as the inbox, measured in the same transaction, so that a slow machine is none to the rule; there workers side
//! by side may be faster, if the handler waits or there are cores. Whether they are cannot be told from a batch: a
//! handler that waits for a row which all of them change is as slow side by side. So it is tried, and the rates are
//! compared. What was no faster is tried again after longer and longer. Side by side is kept, too, while messages come
//! more slowly than they are handled: then there is nothing to share, and no message waits for another one's handler.

use super::worker::Times;
use std::time::{Duration, Instant};

/// Size of the first batch, and most of one after a failure; it doubles with each that succeeds in time.
const FIRST_SIZE: usize = 8;
/// Longer batches are halved: they keep locks, and other processes out.
const LONG_BATCH: Duration = Duration::from_millis(200);
/// A handler that takes more times as long as the inbox gains little from a shared commit. A commit of its own costs a
/// message about as much as ten shares in one do.
const SLOWER_THAN_INBOX: u32 = 8;
/// Slow transactions in a row before side by side is tried: the first ones of a session plan their statements.
const SLOW_IN_A_ROW: u32 = 3;
/// Shortest trial, and how long side by side is kept before batches are looked at again; twice as long each time that
/// it was faster.
const TRIAL: Duration = Duration::from_secs(1);
const MAX_ASIDE: Duration = Duration::from_secs(60);
/// Messages of each worker that a trial must see the end of.
const TRIAL_MESSAGES: u64 = 4;
/// How much faster it must be, in percent of the rate of batches.
const FASTER_PERCENT: f64 = 120.0;
/// How long it is not tried again if it was not; twice as long each time.
const DISTRUST: Duration = Duration::from_secs(10);
const MAX_DISTRUST: Duration = Duration::from_secs(600);

/// What is known about a consumer's transactions.
#[derive(Debug)]
pub(super) struct Pace {
    /// Most messages of a batch.
    max: usize,
    /// Workers there are side by side; 1 if they are no choice.
    workers: usize,
    size: usize,
    slow: u32,
    aside: Option<Aside>,
    keep: Duration,
    distrust: Duration,
    distrusted_until: Option<Instant>,
}

/// Deliveries go to the workers.
#[derive(Debug)]
struct Aside {
    since: Instant,
    until: Instant,
    /// Messages a second of the batches before.
    batched: f64,
    handed: u64,
    /// Of these, handed on while every worker had more to do.
    crowded: u64,
    /// Because a message could not be applied for now, and not for the sake of the rate.
    stuck: bool,
}

/// What side by side was worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Faster than batches.
    Faster,
    /// Not faster: batches again.
    NotFaster,
    /// The workers had too little to do to tell.
    Idle,
}

impl Pace {
    pub(super) fn new(max: usize, workers: usize) -> Self {
        Self {
            max,
            workers,
            size: FIRST_SIZE.min(max),
            slow: 0,
            aside: None,
            keep: TRIAL,
            distrust: DISTRUST,
            distrusted_until: None,
        }
    }

    /// Most messages of the next batch.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// A batch was rolled back. If it had too much to do for the handler's time-out, a half, at last a single message, has
    /// not.
    pub(super) fn failed(&mut self) {
        self.size = (self.size / 2).clamp(1, FIRST_SIZE);
    }

    /// A transaction of so many messages was committed, and took so long if that is known; true if deliveries go to the
    /// workers from now on.
    pub(super) fn applied(&mut self, messages: usize, took: Option<Times>, now: Instant) -> bool {
        let total = took.map_or(Duration::ZERO, |took| took.inbox + took.handler);
        self.size = match total > LONG_BATCH {
            true => (self.size / 2).max(1),
            false => 2 * self.size,
        }
        .min(self.max);
        let Some(took) = took.filter(|_| self.workers > 1) else { return false };
        self.slow = if is_slow(took) { self.slow + 1 } else { 0 };
        if self.slow < SLOW_IN_A_ROW || self.distrusted_until.is_some_and(|until| now < until) {
            return false;
        }
        let batched = messages as f64 / total.as_secs_f64().max(f64::MIN_POSITIVE);
        self.aside = Some(Aside { since: now, until: now + self.keep, batched, handed: 0, crowded: 0, stuck: false });
        // The next slow one is enough: the sessions are warm.
        self.slow = SLOW_IN_A_ROW - 1;
        self.begin_small();
        true
    }

    /// What fits was found out before.
    fn begin_small(&mut self) {
        self.size = self.size.min(FIRST_SIZE);
    }

    /// A message waits for something, or the workers still wait for it: the others must not, so deliveries go to the
    /// workers.
    pub(super) fn stuck(&mut self, now: Instant) {
        self.begin_small();
        self.aside = Some(Aside { since: now, until: now + TRIAL, batched: 0.0, handed: 0, crowded: 0, stuck: true });
    }

    /// Whether deliveries go to the workers.
    pub(super) fn is_aside(&self) -> bool {
        self.aside.is_some()
    }

    /// A delivery goes to the workers, who have so many others in hand.
    pub(super) fn hand_on(&mut self, in_hand: usize) {
        if let Some(aside) = &mut self.aside {
            aside.handed += 1;
            aside.crowded += u64::from(in_hand >= 2 * self.workers);
        }
    }

    /// What side by side was worth, once that is known and its time is over; batches begin anew then.
    pub(super) fn look_back(&mut self, in_hand: usize, now: Instant) -> Option<Verdict> {
        let aside = self.aside.as_ref().filter(|aside| now >= aside.until)?;
        if aside.stuck {
            self.aside = None;
            return Some(Verdict::Idle);
        }
        let done = aside.handed.saturating_sub(in_hand as u64);
        let crowded = 2 * aside.crowded > aside.handed;
        if crowded && done < TRIAL_MESSAGES * self.workers as u64 {
            return None;
        }
        let rate = done as f64 / now.duration_since(aside.since).as_secs_f64().max(f64::MIN_POSITIVE);
        let verdict = match crowded {
            false => Verdict::Idle,
            true if 100.0 * rate > FASTER_PERCENT * aside.batched => Verdict::Faster,
            true => Verdict::NotFaster,
        };
        match verdict {
            Verdict::NotFaster => {
                self.keep = TRIAL;
                self.distrusted_until = Some(now + self.distrust);
                self.distrust = (2 * self.distrust).min(MAX_DISTRUST);
            }
            Verdict::Faster | Verdict::Idle => {
                self.keep = (2 * self.keep).min(MAX_ASIDE);
                self.distrust = DISTRUST;
            }
        }
        self.aside = None;
        Some(verdict)
    }
}

/// Whether a shared commit saves little.
fn is_slow(took: Times) -> bool {
    took.handler > SLOWER_THAN_INBOX * took.inbox
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn times(inbox_us: u64, handler_us: u64) -> Option<Times> {
        Some(Times { inbox: Duration::from_micros(inbox_us), handler: Duration::from_micros(handler_us) })
    }

    /// A pace of 8 workers that has just gone side by side; batches did 100 messages a second.
    fn aside(now: Instant) -> Pace {
        let mut pace = Pace::new(100, 8);
        let went: Vec<bool> = (0..3).map(|_| pace.applied(10, times(1_000, 99_000), now)).collect();
        assert_eq!(went, [false, false, true]);
        pace
    }

    /// Goal: side by side is kept if it is faster, longer each time; if not, batches come back and the next trial waits
    /// longer each time; where the workers idle nothing is held against it.
    #[test]
    fn side_by_side_is_tried_and_measured() {
        let start = Instant::now();
        for (handed, in_hand, after_ms, expected) in [
            (900, 400, 1_000, Some(Verdict::Faster)),
            (500, 400, 1_000, Some(Verdict::NotFaster)),
            (900, 400, 999, None),
            // Each takes longer than the trial: its end is waited for.
            (400, 392, 1_000, None),
            (400, 368, 9_000, Some(Verdict::NotFaster)),
            (10, 1, 1_000, Some(Verdict::Idle)),
        ] {
            let mut pace = aside(start);
            (0..handed).for_each(|_| pace.hand_on(in_hand));
            let now = start + Duration::from_millis(after_ms);
            assert_eq!(pace.look_back(in_hand, now), expected, "{handed} handed on, {in_hand} in hand, {after_ms} ms");
            assert_eq!(pace.is_aside(), expected.is_none());
            let again = pace.applied(10, times(1_000, 99_000), now);
            assert_eq!(again, matches!(expected, Some(Verdict::Faster | Verdict::Idle)) || expected.is_none());
        }
    }

    /// Goal: what was not faster is tried again after 10 s, 20 s, …, and no more than 10 minutes.
    #[test]
    fn trials_that_fail_become_rare() {
        let mut now = Instant::now();
        let mut pace = aside(now);
        for wait_s in [10, 20, 40, 80, 160, 320, 600, 600] {
            (0..100).for_each(|_| pace.hand_on(50));
            now += TRIAL;
            assert_eq!(pace.look_back(50, now), Some(Verdict::NotFaster));
            assert!(!pace.applied(10, times(1_000, 99_000), now + Duration::from_secs(wait_s - 1)), "{wait_s}");
            now += Duration::from_secs(wait_s);
            assert!(pace.applied(10, times(1_000, 99_000), now), "{wait_s}");
        }
    }

    /// Goal: however few calls fit into the time-out, a size is found that does, its times are learned, and what was found
    /// is kept while the workers have their trial.
    #[test]
    fn a_size_that_fits_is_found() {
        let start = Instant::now();
        for fits in 1..=FIRST_SIZE {
            let mut pace = Pace::new(100, 8);
            for _ in 0..20 {
                match pace.size() {
                    size if size > fits => pace.failed(),
                    size => drop(pace.applied(size, times(1_000, 900_000 * size as u64), start)),
                }
                if pace.is_aside() {
                    break;
                }
            }
            assert!(pace.is_aside(), "{fits} fit, and side by side is never tried");
            assert_eq!(pace.look_back(0, start + TRIAL), Some(Verdict::Idle));
            assert!(pace.size() <= fits, "{fits} fit, and {} are the next batch", pace.size());
        }
    }

    proptest! {
        /// Goal: a machine that is slower in everything, by any factor, is no reason to leave batches.
        #[test]
        fn a_slow_machine_is_no_slow_handler(inbox in 10_u64..10_000, percent in 1_u64..800, factor in 1_u64..1_000) {
            let mut pace = Pace::new(100, 8);
            let (inbox, handler) = (inbox * factor, inbox * factor * percent / 100);
            for _ in 0..20 {
                prop_assert!(!pace.applied(100, times(inbox, handler), Instant::now()));
            }
        }

        /// Goal: whatever happens, a batch has at least one message and at most what is configured; and a single worker is
        /// never side by side.
        #[test]
        fn sizes_stay_in_bounds(max in 1_usize..1_000, took in prop::collection::vec((0_u64..500_000, 0_u64..500_000), 1..60)) {
            let mut pace = Pace::new(max, 1);
            for (inbox, handler) in took {
                match inbox % 7 {
                    0 => pace.failed(),
                    1 => prop_assert!(!pace.applied(1, None, Instant::now())),
                    _ => prop_assert!(!pace.applied(pace.size(), times(inbox, handler), Instant::now())),
                }
                prop_assert!((1..=max).contains(&pace.size()));
            }
        }
    }
}
