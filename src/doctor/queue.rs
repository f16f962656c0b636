//! A consumer's queue, and how long its deliveries may wait for their acknowledgement.

use super::{Finding, Severity};
use crate::broker::QueueSpec;
use std::time::Duration;

/// The broker's wait for an acknowledgement unless it is told otherwise.
pub(super) const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// Deliveries a consumer takes ahead: for each worker, for each message of a batch, and at most.
const AHEAD_PER_WORKER: usize = 16;
const AHEAD_PER_BATCHED: usize = 4;
const AHEAD_MAX: usize = 4_096;

/// A consumer's queue.
#[derive(Debug, Clone)]
pub struct QueueUse {
    /// As the consumer declares it.
    pub spec: QueueSpec,
    /// Handlers at a time.
    pub concurrency: usize,
    /// Most messages of one transaction; 1 is one by one.
    pub batch: usize,
    /// Longest run of a handler.
    pub handler_timeout: Duration,
}

impl QueueUse {
    /// Deliveries the consumer takes ahead: its prefetch.
    fn ahead(&self) -> usize {
        let for_batches = if self.batch > 1 { AHEAD_PER_BATCHED * self.batch } else { 0 };
        (AHEAD_PER_WORKER * self.concurrency.max(1)).max(for_batches).min(AHEAD_MAX)
    }

    /// Handlers that run one after the other before the last delivery ahead is acknowledged: where all workers share them,
    /// and at most. One worker has them all if they are of one key or stream, or in batches that fail: these share one
    /// time-out, but each of their messages has its own afterwards.
    fn in_line(&self) -> (u32, u32) {
        let ahead = self.ahead();
        let shared = ahead.div_ceil(self.concurrency.max(1));
        let most = if self.spec.single_active_consumer || self.batch > 1 { ahead } else { shared };
        (shared as u32, most as u32)
    }
}

/// Whether the slowest handlers still acknowledge in time.
pub(super) fn judge_timeout(queue: &QueueUse, timeout: Duration) -> Finding {
    let check = format!("queue {}: consumer timeout", queue.spec.name);
    let (shared, most) = queue.in_line();
    let wait = |handlers: u32| queue.handler_timeout * handlers;
    let found = |handlers: u32, whose: &str| {
        format!(
            "of {} deliveries ahead, each with a handler that takes handler_timeout, the last is acknowledged after {:?} \
             {whose}; the broker waits {timeout:?}",
            queue.ahead(),
            wait(handlers)
        )
    };
    let mend = |handlers: u32| {
        let (most, least) = (timeout / handlers, wait(handlers).as_millis());
        format!("lower handler_timeout to {most:?}, or raise consumer_timeout in rabbitmq.conf to {least} (ms)")
    };
    if wait(shared) > timeout {
        let found = format!("{}, closes the channel, and delivers again", found(shared, "if the workers share them"));
        Finding::bad(Severity::Warning, check, found, mend(shared))
    } else if wait(most) > timeout {
        let whose = "if one worker has them all, as with one key";
        let found = format!("{}, closes the channel, and delivers again", found(most, whose));
        Finding::note(check, found).or(mend(most))
    } else {
        Finding::ok(check, found(most, "at most"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(order_by_key: bool, concurrency: usize, batch: usize, handler_timeout_s: u64) -> QueueUse {
        QueueUse {
            spec: QueueSpec {
                name: "q".to_owned(),
                exchange: "e".to_owned(),
                bindings: Vec::new(),
                single_active_consumer: order_by_key,
                voids: false,
            },
            concurrency,
            batch,
            handler_timeout: Duration::from_secs(handler_timeout_s),
        }
    }

    /// Goal: what waits in line follows from workers, batches and order.
    #[test]
    fn handlers_in_line_are_counted() {
        for (order_by_key, concurrency, batch, ahead, in_line) in [
            (true, 8, 100, 400, (50, 400)),
            (true, 8, 1, 128, (16, 128)),
            (false, 8, 1, 128, (16, 16)),
            // Each of a batch that failed goes alone, whatever its key.
            (false, 8, 100, 400, (50, 400)),
            (true, 3, 13, 52, (18, 52)),
            (true, 1, 2, 16, (16, 16)),
            (true, 256, 1_000, 4_096, (16, 4_096)),
        ] {
            let queue = queue(order_by_key, concurrency, batch, 60);
            assert_eq!((queue.ahead(), queue.in_line()), (ahead, in_line), "{queue:?}");
        }
    }

    /// Goal: handlers that outlast the broker's patience are told: a warning where they do so side by side, a note where
    /// only one worker's would; and what mends it does.
    #[test]
    fn consumer_timeouts_are_judged() {
        let judged = |queue: &QueueUse, timeout_s| judge_timeout(queue, Duration::from_secs(timeout_s));
        for (queue, timeout_s, expected) in [
            (queue(false, 8, 1, 112), 1_800, Severity::Ok),
            (queue(false, 8, 1, 113), 1_800, Severity::Warning),
            (queue(true, 8, 1, 14), 1_800, Severity::Ok),
            (queue(true, 8, 1, 15), 1_800, Severity::Note),
            (queue(true, 8, 1, 113), 1_800, Severity::Warning),
            (queue(true, 8, 100, 4), 1_800, Severity::Ok),
            (queue(true, 8, 100, 36), 1_800, Severity::Note),
            (queue(true, 8, 100, 37), 1_800, Severity::Warning),
            (queue(true, 8, 1, 14), 1_000, Severity::Note),
        ] {
            let finding = judged(&queue, timeout_s);
            assert_eq!(finding.severity, expected, "{finding:?}");
            assert_eq!(finding.mend.is_some(), expected != Severity::Ok, "{finding:?}");
        }
        let mend = judged(&queue(true, 8, 100, 60), 1_800).mend.expect("it mends");
        assert_eq!(mend, "lower handler_timeout to 36s, or raise consumer_timeout in rabbitmq.conf to 3000000 (ms)");
        assert!(judged(&queue(true, 8, 100, 36), 1_800).severity > Severity::Warning);
        assert!(judged(&queue(true, 8, 100, 60), 3_000).severity > Severity::Warning);
    }
}
