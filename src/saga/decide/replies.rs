//! What participants say. Replies are matched by step, op and epoch, whatever the attempt.

use super::*;
use crate::saga::state::Op;

/// What a reply says.
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    pub(super) output: Option<Value>,
    pub(super) error: Option<String>,
}

impl Deciding<'_> {
    pub(super) fn reply(&mut self, at: usize, op: Op, epoch: i32, answer: Answer) -> Result<(), Refusal> {
        let step = &self.saga.steps[at];
        if let Some(expected) = self.never_sent(at, op, epoch) {
            return Err(Refusal::NeverSent { step: step.id.clone(), op: op.to_string(), epoch, expected });
        }
        if self.saga.status.is_final() {
            return self.ignore(format!("the saga is {} already", self.saga.status.as_str()));
        }
        if epoch < step.epoch {
            return self.ignore(format!("an answer in epoch {epoch}, the step is in {}", step.epoch));
        }
        match op {
            Op::Do => self.done(at, answer),
            Op::Undo => self.undone(at, answer),
        }
    }

    /// What there is instead of the command that a reply answers.
    fn never_sent(&self, at: usize, op: Op, epoch: i32) -> Option<String> {
        let step = &self.saga.steps[at];
        if self.saga.definition.is_none() && op == Op::Do {
            return Some("the saga has no definition, its steps were done before".into());
        }
        if matches!(self.definition.steps[at].work, Work::Wait { .. }) && op == Op::Do {
            return Some("it waits for a signal".into());
        }
        if epoch < 1 || epoch > step.epoch {
            return Some(match step.epoch {
                0 => "it has sent nothing".into(),
                known => format!("its epoch is {known}"),
            });
        }
        let sent = |compensation: &Compensation| match compensation.status {
            CompensationStatus::Recorded | CompensationStatus::Ready | CompensationStatus::Released => false,
            // Its body may have been too long to be sent at all.
            CompensationStatus::Stuck | CompensationStatus::Skipped => step.attempt > 0,
            _ => true,
        };
        let undo_sent = step.compensation.as_ref().is_some_and(sent);
        (op == Op::Undo && !undo_sent).then(|| format!("it is {}", step.status.as_str()))
    }

    fn done(&mut self, at: usize, answer: Answer) -> Result<(), Refusal> {
        let status = self.status(at);
        if !matches!(status, StepStatus::Dispatched | StepStatus::Backoff | StepStatus::Unknown) {
            return self.ignore(format!("the step is {} already", status.as_str()));
        }
        let error = answer.error.unwrap_or_else(|| "the participant gave no reason".into());
        match (answer.outcome, status) {
            (Outcome::Succeeded, _) => self.succeeded(at, answer.output),
            (Outcome::Failed, _) => self.failed(at, error),
            (Outcome::Retry, StepStatus::Dispatched) => self.unanswered(at, error),
            (Outcome::InProgress, StepStatus::Dispatched) if self.forward() => {
                self.saga.steps[at].due_at = Some(self.after(self.definition.steps[at].timeout_ms));
            }
            (Outcome::InProgress, StepStatus::Dispatched) => {
                return self.ignore("the saga turns back, it waits no longer");
            }
            (Outcome::UndoNoop, _) => return self.ignore("undo_noop answers no do"),
            (Outcome::Retry | Outcome::InProgress, _) => {
                return self.ignore(format!("the step is {} already", status.as_str()));
            }
        }
        Ok(())
    }

    fn undone(&mut self, at: usize, answer: Answer) -> Result<(), Refusal> {
        let status = self.status(at);
        if !matches!(status, StepStatus::Undoing | StepStatus::UndoBackoff | StepStatus::UndoStuck) {
            return self.ignore(format!("the step is {} already", status.as_str()));
        }
        let error = answer.error.unwrap_or_else(|| "the participant gave no reason".into());
        match (answer.outcome, status) {
            (Outcome::Succeeded, _) => {
                self.set(at, StepStatus::Undone, None);
                self.compensation(at, CompensationStatus::Undone);
            }
            (Outcome::UndoNoop, _) => {
                self.set(at, StepStatus::UndoNoop, None);
                self.compensation(at, CompensationStatus::Noop);
            }
            (Outcome::Failed | Outcome::Retry, StepStatus::Undoing) => self.undo_unanswered(at, error),
            (Outcome::InProgress, StepStatus::Undoing) => {
                self.saga.steps[at].due_at = Some(self.after(self.definition.steps[at].timeout_ms));
            }
            (Outcome::Failed | Outcome::Retry | Outcome::InProgress, _) => {
                return self.ignore(format!("the step is {} already", status.as_str()));
            }
        }
        Ok(())
    }

    pub(super) fn succeeded(&mut self, at: usize, output: Option<Value>) {
        self.set(at, StepStatus::Succeeded, None);
        // The database cannot tell null from nothing.
        self.saga.steps[at].output = output.filter(|output| !output.is_null());
        self.saga.steps[at].error = None;
        if self.saga.steps[at].compensation.is_none() {
            return;
        }
        let Some(undo) = &self.definition.steps[at].undo else { return };
        // A body over the limit stays out: the saga may never need it, and says so if it does.
        let body = self.body(&undo.body).ok();
        if let Some(compensation) = &mut self.saga.steps[at].compensation {
            compensation.status = if body.is_some() { CompensationStatus::Ready } else { CompensationStatus::Recorded };
            compensation.payload = body.filter(|body| !body.is_null());
        }
    }

    /// The step is not done, for good. After the pivot there is no way back, so it is tried anew.
    pub(super) fn failed(&mut self, at: usize, error: String) {
        let retry = &self.definition.steps[at].retry;
        let more = self.is_after_pivot(at) && self.saga.steps[at].attempt < retry.max;
        let due_at = more.then(|| self.next_attempt(at, Op::Do, retry));
        self.set(at, StepStatus::Failed, due_at);
        self.saga.steps[at].error = Some(error);
        self.compensation(at, CompensationStatus::Released);
    }

    /// An attempt ended without a final answer.
    pub(super) fn unanswered(&mut self, at: usize, error: String) {
        let retry = &self.definition.steps[at].retry;
        self.saga.steps[at].error = Some(error);
        if self.forward() && self.saga.steps[at].attempt < retry.max {
            let due_at = self.next_attempt(at, Op::Do, retry);
            self.set(at, StepStatus::Backoff, Some(due_at));
        } else {
            self.set(at, StepStatus::Unknown, None);
        }
    }
}
