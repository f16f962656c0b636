//! When: delays between attempts, the ends of waits, and when somebody must look at the saga again.

use super::*;
use crate::saga::definition::{Jitter, Retry};
use crate::saga::state::Op;
use uuid::Uuid;

impl Deciding<'_> {
    /// What time alone brings: the start, the deadline, ends of waits. What it makes possible is for `advance`.
    pub(super) fn due(&mut self) -> Result<(), Refusal> {
        if self.saga.next_due.is_none_or(|due| due > self.now) {
            return Err(Refusal::NotNow { what: "go on by itself", why: "nothing is due".into() });
        }
        if self.saga.paused {
            // An app aborted it meanwhile: that is for its resumption.
            return Ok(());
        }
        if self.saga.status == SagaStatus::Scheduled {
            self.move_to(SagaStatus::Running);
            return Ok(());
        }
        if self.deadline().is_some_and(|deadline| deadline <= self.now) {
            self.give_up("deadline".to_owned());
        }
        self.take_kept_signals();
        for at in 0..self.saga.steps.len() {
            if !self.is_due(at) {
                continue;
            }
            match self.status(at) {
                StepStatus::Dispatched => match &self.definition.steps[at].work {
                    Work::Wait { signal, .. } => {
                        self.failed(at, format!("no signal \"{signal}\" came in time"));
                    }
                    Work::Command(_) => self.unanswered(at, "no reply came in time".into()),
                },
                StepStatus::Undoing => self.undo_unanswered(at, "no reply to its undo came in time".into()),
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn is_due(&self, at: usize) -> bool {
        self.saga.steps[at].due_at.is_some_and(|due_at| due_at <= self.now)
    }

    /// The deadline, while it can still turn the saga back.
    pub(super) fn deadline(&self) -> Option<Millis> {
        self.saga.deadline.filter(|_| self.forward() && self.saga.cancel.is_none() && !self.pivot_done())
    }

    pub(super) fn next_due(&self) -> Option<Millis> {
        match self.saga.status {
            SagaStatus::Stuck => None,
            status if status.is_final() || self.saga.paused => None,
            SagaStatus::Scheduled => Some(self.saga.start_at),
            _ => {
                let steps = self.saga.steps.iter().filter_map(|step| step.due_at);
                steps.chain(self.deadline()).chain(self.again.then_some(self.now)).min()
            }
        }
    }

    pub(super) fn after(&self, wait_ms: i64) -> Millis {
        self.now.saturating_add(wait_ms)
    }

    /// When the attempt after the present one comes.
    pub(super) fn next_attempt(&self, at: usize, op: Op, retry: &Retry) -> Millis {
        let step = &self.saga.steps[at];
        let spread = match retry.jitter {
            Jitter::None => 1.0,
            Jitter::Full => unit(self.saga.id, &step.id, op, step.epoch, step.attempt),
        };
        self.after((longest_delay_ms(retry, step.attempt) * spread) as i64)
    }
}

fn longest_delay_ms(retry: &Retry, attempt: i32) -> f64 {
    let grown = retry.initial_ms as f64 * retry.factor.powi(attempt.saturating_sub(1));
    grown.min(retry.cap_ms as f64)
}

/// In 0..1, as good as random and always the same for one attempt: a UUIDv5 ends with 62 bits of a SHA-1.
fn unit(saga: Uuid, step: &str, op: Op, epoch: i32, attempt: i32) -> f64 {
    let hash = Uuid::new_v5(&saga, format!("{op} {epoch} {attempt} {step}").as_bytes());
    f64::from(hash.as_u128() as u32) / (f64::from(u32::MAX) + 1.0)
}
