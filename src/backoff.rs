//! Attempt → delay: exponential with full jitter. Pure but for the random number, which the caller passes in.

use std::time::Duration;

/// How delays between attempts grow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    /// Longest delay after the first attempt.
    pub initial: Duration,
    /// Longest delay ever.
    pub cap: Duration,
}

impl Backoff {
    /// The longest delay after `attempt` attempts (from 1): `initial`, doubled by each further one, up to `cap`.
    pub fn ceiling(&self, attempt: u32) -> Duration {
        let doubled = 2u32.saturating_pow(attempt.saturating_sub(1));
        self.initial.saturating_mul(doubled).min(self.cap)
    }

    /// The delay after `attempt` attempts; `unit` is uniform in 0..1. Full jitter spreads clients that failed
    /// together over the whole span; a twentieth is kept so that no delay is nothing.
    pub fn delay(&self, attempt: u32, unit: f64) -> Duration {
        let ceiling = self.ceiling(attempt);
        ceiling / 20 + (ceiling - ceiling / 20).mul_f64(unit.clamp(0.0, 1.0))
    }

    /// [`delay`](Self::delay) with a random number of its own.
    pub fn jittered(&self, attempt: u32) -> Duration {
        self.delay(attempt, random_unit())
    }
}

/// Uniform in 0..1: the low 32 bits of a UUIDv7 are random, and uuids are what this crate already has.
fn random_unit() -> f64 {
    f64::from(uuid::Uuid::now_v7().as_u128() as u32) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Goal: a delay never passes its ceiling, ceilings never fall, and no attempt number overflows.
        #[test]
        fn delays_stay_under_rising_ceilings(attempt in 1u32..=u32::MAX, unit in 0.0f64..1.0) {
            let backoff = Backoff { initial: Duration::from_millis(100), cap: Duration::from_secs(30) };
            let delay = backoff.delay(attempt, unit);
            prop_assert!(delay > Duration::ZERO && delay <= backoff.ceiling(attempt));
            prop_assert!(backoff.ceiling(attempt) <= backoff.ceiling(attempt.saturating_add(1)));
            prop_assert!(backoff.ceiling(attempt) <= backoff.cap);
        }
    }

    /// Goal: the random numbers are spread, so that jitter spreads.
    #[test]
    fn jitter_spreads() {
        let units: Vec<f64> = (0..1000).map(|_| random_unit()).collect();
        let mean = units.iter().sum::<f64>() / 1000.0;
        assert!((0.4..0.6).contains(&mean), "mean {mean}");
        assert!(units.iter().all(|unit| (0.0..1.0).contains(unit)));
    }
}
