//! A consumer's queue, and how long its deliveries may wait for their acknowledgement.

use super::{Finding, Severity};
use crate::broker::QueueSpec;
use crate::consumer::prefetch;
use std::time::Duration;

/// The broker's wait for an acknowledgement unless it is told otherwise.
pub(super) const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);

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

/// Whether the slowest handlers still acknowledge in time, if the workers share what the consumer takes ahead. Where one
/// worker has it all, as with a single key, it waits longer: that is told, and no fault.
pub(super) fn judge_timeout(queue: &QueueUse, timeout: Duration) -> Finding {
    let check = format!("queue {}: consumer timeout", queue.spec.name);
    let ahead = prefetch(queue.concurrency, queue.batch);
    // One after the other; the messages of a batch that fails go alone, each with a time-out of its own.
    let in_line = ahead.div_ceil(queue.concurrency.max(1)) as u32;
    let wait = queue.handler_timeout * in_line;
    let found = format!(
        "of {ahead} deliveries ahead, each with a handler that takes handler_timeout, the last is acknowledged after \
         {wait:?} if the workers share them, {:?} if one has them all; the broker waits {timeout:?}",
        queue.handler_timeout * ahead as u32
    );
    if wait <= timeout {
        return Finding::ok(check, found);
    }
    let mend = format!(
        "lower handler_timeout to {:?}, or raise consumer_timeout in rabbitmq.conf to {} (ms)",
        timeout / in_line,
        wait.as_millis()
    );
    Finding::bad(Severity::Warning, check, format!("{found}, closes the channel, and delivers again"), mend)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(concurrency: usize, batch: usize, handler_timeout_s: u64) -> QueueUse {
        QueueUse {
            spec: QueueSpec {
                name: "q".to_owned(),
                exchange: "e".to_owned(),
                bindings: Vec::new(),
                single_active_consumer: true,
                voids: false,
            },
            concurrency,
            batch,
            handler_timeout: Duration::from_secs(handler_timeout_s),
        }
    }

    /// Goal: handlers that outlast the broker's patience are told, and what mends it does.
    #[test]
    fn consumer_timeouts_are_judged() {
        for (concurrency, batch, handler_timeout_s, timeout_s, expected) in [
            // 128 ahead, 16 in line.
            (8, 1, 112, 1_800, Severity::Ok),
            (8, 1, 113, 1_800, Severity::Warning),
            (8, 1, 62, 1_000, Severity::Ok),
            (8, 1, 63, 1_000, Severity::Warning),
            // 400 ahead, 50 in line.
            (8, 100, 36, 1_800, Severity::Ok),
            (8, 100, 37, 1_800, Severity::Warning),
            // 52 ahead, 18 in line.
            (3, 13, 100, 1_800, Severity::Ok),
            (3, 13, 101, 1_800, Severity::Warning),
        ] {
            let finding = judge_timeout(&queue(concurrency, batch, handler_timeout_s), Duration::from_secs(timeout_s));
            assert_eq!(finding.severity, expected, "{finding:?}");
            assert_eq!(finding.mend.is_some(), expected != Severity::Ok, "{finding:?}");
        }
        let judged = |handler_timeout_s, timeout_s| {
            judge_timeout(&queue(8, 100, handler_timeout_s), Duration::from_secs(timeout_s))
        };
        let mend = judged(60, 1_800).mend.expect("it mends");
        assert_eq!(mend, "lower handler_timeout to 36s, or raise consumer_timeout in rabbitmq.conf to 3000000 (ms)");
        assert_eq!(judged(36, 1_800).severity, Severity::Ok);
        assert_eq!(judged(60, 3_000).severity, Severity::Ok);
    }
}
