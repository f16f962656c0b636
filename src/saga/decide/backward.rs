//! The way back: each step is undone when everything that came after it is settled.

use super::*;
use crate::saga::definition::OnExhausted;
use crate::saga::state::Op;

impl Deciding<'_> {
    /// The saga is to turn back; where its pivot may be under way, that decides.
    pub(super) fn give_up(&mut self, why: String) {
        let under_way = |at: usize| {
            let command = matches!(self.definition.steps[at].work, Work::Command(_));
            command && matches!(self.status(at), StepStatus::Dispatched | StepStatus::Backoff | StepStatus::Unknown)
        };
        if self.definition.pivot().is_some_and(under_way) {
            self.saga.cancel = Some(why);
        } else {
            self.turn_back(why);
        }
    }

    pub(super) fn turn_back(&mut self, why: String) {
        if !self.move_to(SagaStatus::Compensating) {
            return;
        }
        self.saga.phase = Phase::Backward;
        self.saga.reason = Some(why);
        self.saga.cancel = None;
        for at in 0..self.saga.steps.len() {
            match (self.status(at), &self.definition.steps[at].work) {
                (StepStatus::Pending, _) => self.set(at, StepStatus::Skipped, None),
                (StepStatus::Dispatched, Work::Wait { .. }) => self.failed(at, "the saga turned back".into()),
                (StepStatus::Backoff, _) if !self.to_undo(at) => self.set(at, StepStatus::Unknown, None),
                (StepStatus::Backoff, _) => self.saga.steps[at].due_at = None,
                _ => {}
            }
        }
    }

    pub(super) fn go_back(&mut self) {
        if self.saga.status != SagaStatus::Compensating {
            return;
        }
        let blocked = self.blocked();
        for at in (0..self.saga.steps.len()).rev() {
            match self.status(at) {
                StepStatus::UndoBackoff | StepStatus::UndoStuck if self.is_due(at) && !self.moved(at) => self.undo(at),
                StepStatus::Succeeded | StepStatus::Unknown | StepStatus::Backoff
                    if self.to_undo(at) && !blocked[at] =>
                {
                    if self.moved(at) {
                        self.again = true;
                    } else {
                        self.undo(at);
                    }
                }
                _ => {}
            }
        }
        if !(0..self.saga.steps.len()).any(|at| self.is_open(at)) {
            self.move_to(SagaStatus::Compensated);
        }
    }

    /// On the way back: something is to be waited for, or to be undone.
    fn is_open(&self, at: usize) -> bool {
        match self.status(at) {
            StepStatus::Dispatched | StepStatus::Undoing | StepStatus::UndoBackoff | StepStatus::UndoStuck => true,
            StepStatus::Succeeded | StepStatus::Unknown | StepStatus::Backoff => self.to_undo(at),
            _ => false,
        }
    }

    /// Which steps have an open one somewhere behind them.
    fn blocked(&self) -> Vec<bool> {
        let mut blocked = vec![false; self.saga.steps.len()];
        for at in (0..blocked.len()).rev() {
            if blocked[at] || self.is_open(at) {
                self.definition.steps[at].after.iter().for_each(|before| blocked[*before] = true);
            }
        }
        blocked
    }

    /// Sends the command that undoes the step.
    fn undo(&mut self, at: usize) {
        let defined = &self.definition.steps[at];
        let (Some(template), Some(compensation)) = (&defined.undo, self.saga.steps[at].compensation.clone()) else {
            return;
        };
        let body = match &compensation.payload {
            Some(body) => Ok(body.clone()),
            None => self.body(&template.body),
        };
        let again = self.status(at) == StepStatus::UndoBackoff;
        let body = match body {
            Ok(body) => body,
            Err(error) => {
                self.set(at, StepStatus::UndoStuck, None);
                self.compensation(at, CompensationStatus::Stuck);
                self.saga.steps[at].attempt = 0;
                self.saga.steps[at].error = Some(error);
                self.again = true;
                return;
            }
        };
        let deadline = self.after(defined.timeout_ms);
        self.set(at, StepStatus::Undoing, Some(deadline));
        let step = &mut self.saga.steps[at];
        step.attempt = if again { step.attempt + 1 } else { 1 };
        step.compensation = Some(Compensation {
            payload: Some(body.clone()),
            status: CompensationStatus::Sent,
            ..compensation.clone()
        });
        self.commands.push(Command {
            step: step.id.clone(),
            op: Op::Undo,
            epoch: step.epoch,
            attempt: step.attempt,
            topic: compensation.topic,
            body,
            deadline,
        });
    }

    /// An attempt to undo the step came to nothing.
    pub(super) fn undo_unanswered(&mut self, at: usize, error: String) {
        let defined = &self.definition.steps[at];
        self.saga.steps[at].error = Some(error);
        if self.saga.steps[at].attempt < defined.undo_retry.max {
            let due_at = self.next_attempt(at, Op::Undo, &defined.undo_retry);
            return self.set(at, StepStatus::UndoBackoff, Some(due_at));
        }
        match defined.on_undo_exhausted {
            OnExhausted::Stuck => {
                self.set(at, StepStatus::UndoStuck, None);
                self.compensation(at, CompensationStatus::Stuck);
            }
            OnExhausted::Skip => {
                self.set(at, StepStatus::UndoSkipped, None);
                self.compensation(at, CompensationStatus::Skipped);
            }
        }
    }
}
