//! Whether something that was sampled over time grows: pure.
//!
//! What fills and empties by turns, such as a ring of slots, rises steeply for a moment and falls again, so a fitted line
//! alone says little. The second half of a run is what counts (the first one warms caches, heaps and free space), and two
//! quarters of it are compared: it grows if it is typically higher in the last one than it ever was in the one before.

use super::figure::median;

/// A share of the earlier quarter's highest value that is no growth: the pages of a heap come and go by that much.
const NOISE: f64 = 0.01;

/// What the second half of a run says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Growth {
    /// Median of the third quarter.
    pub third: f64,
    /// Median of the last quarter.
    pub last: f64,
    /// Highest value of the third quarter.
    pub third_max: f64,
    /// Highest value of the whole run.
    pub max: f64,
    /// Slope of the line of least squares through the second half, a minute.
    pub per_minute: f64,
}

impl Growth {
    /// Of samples (seconds, value) in the order of time; nothing unless each quarter of the second half has some.
    pub(super) fn of(samples: &[(f64, f64)]) -> Option<Self> {
        let (began, ended) = (samples.first()?.0, samples.last()?.0);
        let quarter = |number: f64| began + (ended - began) * number / 4.0;
        let values = |from: f64, to: f64| -> Vec<f64> {
            samples.iter().filter(|(at, _)| *at > from && *at <= to).map(|(_, value)| *value).collect()
        };
        let (third, last) = (values(quarter(2.0), quarter(3.0)), values(quarter(3.0), ended));
        if third.is_empty() || last.is_empty() {
            return None;
        }
        let half: Vec<_> = samples.iter().copied().filter(|(at, _)| *at > quarter(2.0)).collect();
        Some(Self {
            third_max: max(third.iter().copied()),
            max: max(samples.iter().map(|(_, value)| *value)),
            third: median(third),
            last: median(last),
            per_minute: slope(&half) * 60.0,
        })
    }

    /// It is typically higher in the last quarter than it ever was in the third, by more than `at_least` and than a
    /// hundredth of that.
    pub(super) fn grows(&self, at_least: f64) -> bool {
        self.last - self.third_max > at_least.max(NOISE * self.third_max.abs())
    }
}

/// Of the line of least squares; 0 if all samples are of one time.
fn slope(samples: &[(f64, f64)]) -> f64 {
    let count = samples.len() as f64;
    let (x, y) = samples.iter().fold((0.0, 0.0), |(x, y), sample| (x + sample.0 / count, y + sample.1 / count));
    let (xy, xx) = samples.iter().fold((0.0, 0.0), |(xy, xx), sample| {
        (xy + (sample.0 - x) * (sample.1 - y), xx + (sample.0 - x) * (sample.0 - x))
    });
    if xx > 0.0 { xy / xx } else { 0.0 }
}

fn max(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::NEG_INFINITY, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples(value: impl Fn(f64) -> f64) -> Vec<(f64, f64)> {
        (0..600).map(|second| (f64::from(second), value(f64::from(second)))).collect()
    }

    /// Goal: the slope is that of the line, and a minute's.
    #[test]
    fn the_slope_is_a_minutes() {
        let growth = Growth::of(&samples(|second| 7.0 + 2.0 * second)).expect("enough samples");
        assert!((growth.per_minute - 120.0).abs() < 1e-6, "{growth:?}");
        assert_eq!((growth.third, growth.last), (7.0 + 2.0 * 374.5, 7.0 + 2.0 * 524.5));
    }

    /// Goal: a ring that fills and empties does not grow, whatever the line through it says; a leak of a tenth of it does.
    #[test]
    fn a_sawtooth_does_not_grow() {
        let sawtooth = |second: f64| 100.0 + second % 37.0;
        assert!(!Growth::of(&samples(sawtooth)).expect("enough").grows(0.0));
        assert!(Growth::of(&samples(|second| sawtooth(second) + second)).expect("enough").grows(0.0));
    }

    /// Goal: what warms up in the first half has not grown.
    #[test]
    fn the_first_half_does_not_count() {
        let growth = Growth::of(&samples(|second| second.min(299.0))).expect("enough");
        assert!(!growth.grows(0.0) && growth.per_minute.abs() < 1e-6, "{growth:?}");
    }

    /// Goal: too short a run says nothing, and does not panic.
    #[test]
    fn a_short_run_says_nothing() {
        assert_eq!(Growth::of(&[]), None);
        assert_eq!(Growth::of(&[(0.0, 1.0)]), None);
        assert_eq!(Growth::of(&[(0.0, 1.0), (1.0, 1.0)]), None);
    }

    proptest! {
        /// Goal: noise without a trend never grows, and a steady rise above it always does.
        #[test]
        fn noise_is_no_growth(noise in prop::collection::vec(0.0..10.0f64, 40..400), base in 0.0..1e6f64) {
            let at = |index: usize, extra: f64| (index as f64, base + noise[index] + extra);
            let flat: Vec<_> = (0..noise.len()).map(|index| at(index, 0.0)).collect();
            let growth = Growth::of(&flat).expect("enough");
            prop_assert!(!growth.grows(10.0));
            let rises: Vec<_> = (0..noise.len()).map(|index| at(index, index as f64 * (10.0 + base))).collect();
            let growth = Growth::of(&rises).expect("enough");
            prop_assert!(growth.grows(0.0) && growth.per_minute > 0.0, "{:?}", growth);
        }
    }
}
