//! What follows from where a saga stands, whatever event brought it there.

use super::*;

impl Deciding<'_> {
    /// Goes on as far as this event may; sets when to look again.
    pub(super) fn advance(&mut self) {
        let begun = self.saga.status != SagaStatus::Scheduled && !self.saga.status.is_final();
        if begun && !self.saga.paused {
            self.settle_stuck();
            if self.forward() {
                self.go_forward();
            }
            if !self.forward() {
                self.go_back();
            }
        }
        self.saga.next_due = self.next_due();
    }

    /// A saga is stuck while one of its steps is.
    fn settle_stuck(&mut self) {
        let stuck = (0..self.saga.steps.len()).find(|at| self.is_stuck(*at));
        match (stuck, self.saga.status) {
            (Some(_), SagaStatus::Stuck) => {}
            (Some(at), _) => {
                if self.move_to(SagaStatus::Stuck) && self.forward() {
                    self.saga.reason = Some(self.failure(at));
                }
            }
            (None, SagaStatus::Stuck) => match self.saga.phase {
                Phase::Forward => {
                    if self.move_to(SagaStatus::Running) {
                        self.saga.reason = None;
                    }
                }
                Phase::Backward => {
                    self.move_to(SagaStatus::Compensating);
                }
            },
            (None, _) => {}
        }
    }

    pub(super) fn is_stuck(&self, at: usize) -> bool {
        is_stuck(&self.saga, self.definition, at)
    }

    pub(super) fn failure(&self, at: usize) -> String {
        let step = &self.saga.steps[at];
        let what = if step.status == StepStatus::Failed { "failed" } else { "may have run, its attempts are used up" };
        match &step.error {
            Some(error) => format!("step \"{}\" {what}: {error}", step.id),
            None => format!("step \"{}\" {what}", step.id),
        }
    }
}

/// Only an operator can move the step, and has not yet.
pub(super) fn is_stuck(saga: &Saga, definition: &Definition, at: usize) -> bool {
    saga.steps[at].due_at.is_none() && is_for_operators(saga, definition, at)
}

/// The step came to nothing where the saga can neither go on nor back without it.
pub(super) fn is_for_operators(saga: &Saga, definition: &Definition, at: usize) -> bool {
    match (saga.phase, saga.steps[at].status) {
        (Phase::Backward, StepStatus::UndoStuck) => true,
        (Phase::Forward, StepStatus::Unknown) => definition.is_at_or_after_pivot(at),
        (Phase::Forward, StepStatus::Failed) => !definition.steps[at].pivot && definition.is_at_or_after_pivot(at),
        _ => false,
    }
}
