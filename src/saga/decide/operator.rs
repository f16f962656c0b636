//! What operators ask for, and what they may ask for.

use super::advance::{is_for_operators, is_stuck};
use super::*;
use crate::saga::state::Operator;

/// What an operator may do with the saga now.
pub fn allowed_actions(saga: &Saga, definition: &Definition) -> Vec<Action> {
    [Action::Cancel, Action::Pause, Action::Resume, Action::Retry, Action::Terminate]
        .into_iter()
        .filter(|action| refusal(saga, definition, *action).is_none())
        .collect()
}

/// What an operator may do with one step of the saga now; nothing if there is no such step.
pub fn allowed_step_actions(saga: &Saga, definition: &Definition, step: &str) -> Vec<Action> {
    let at = saga.steps.iter().zip(&definition.steps).position(|(known, _)| known.id == step);
    let Some(at) = at else { return Vec::new() };
    [Action::Retry, Action::Skip, Action::Resolve]
        .into_iter()
        .filter(|action| step_refusal(saga, definition, at, *action).is_none())
        .collect()
}

/// Why not; none: it may be done.
fn refusal(saga: &Saga, definition: &Definition, action: Action) -> Option<Refusal> {
    let pivot_done = || {
        let done = |at: usize| saga.steps.get(at).is_some_and(|step| step.status == StepStatus::Succeeded);
        definition.pivot().is_some_and(done)
    };
    let status = saga.status;
    let any_stuck = || (0..saga.steps.len().min(definition.steps.len())).any(|at| is_stuck(saga, definition, at));
    let is = || format!("it is {}", status.as_str());
    let (what, why) = match action {
        Action::Cancel => (
            "be cancelled",
            match status {
                SagaStatus::Running if pivot_done() => Some("its pivot is done, there is no way back".into()),
                SagaStatus::Running if saga.cancel.is_some() => {
                    Some("it is to be, once its pivot's outcome is known".into())
                }
                SagaStatus::Scheduled | SagaStatus::Running => None,
                _ => Some(is()),
            },
        ),
        Action::Pause if saga.paused => ("be paused", Some("it is paused already".into())),
        Action::Pause => ("be paused", status.is_final().then(is)),
        Action::Resume => ("be resumed", (!saga.paused).then(|| "it is not paused".into())),
        Action::Retry if status != SagaStatus::Stuck => ("be retried", Some(is())),
        Action::Retry => ("be retried", (!any_stuck()).then(|| "no step of it is stuck any more".into())),
        Action::Terminate => ("be terminated", (status != SagaStatus::Stuck).then(is)),
        Action::Skip | Action::Resolve => ("be moved so", Some("that is for its steps".into())),
    };
    why.map(|why| Refusal::NotNow { what, why })
}

/// Why not; none: it may be done.
fn step_refusal(saga: &Saga, definition: &Definition, at: usize, action: Action) -> Option<Refusal> {
    let (stuck, step) = (saga.status == SagaStatus::Stuck, &saga.steps[at]);
    // Also one that is to be tried again once no other is stuck: another way out may still be chosen for it.
    let open = stuck && is_for_operators(saga, definition, at);
    let pending = || {
        let pivot = definition.steps.get(at).is_some_and(|step| step.pivot);
        saga.status == SagaStatus::Running && step.status == StepStatus::Pending && !pivot
    };
    let (what, allowed) = match action {
        Action::Retry => ("retry that step", stuck && is_stuck(saga, definition, at)),
        Action::Skip => ("skip that step", open && step.status != StepStatus::Unknown || pending()),
        Action::Resolve => ("resolve that step", open),
        _ => ("be moved so", false),
    };
    let why = || format!("the saga is {}, the step is {}", saga.status.as_str(), step.status.as_str());
    (!allowed).then(|| Refusal::NotNow { what, why: why() })
}

fn allowed(refusal: Option<Refusal>) -> Result<(), Refusal> {
    refusal.map_or(Ok(()), Err)
}

impl Deciding<'_> {
    fn check(&self, action: Action) -> Result<(), Refusal> {
        allowed(refusal(self.before, self.definition, action))
    }

    fn check_step(&self, at: usize, action: Action) -> Result<(), Refusal> {
        allowed(step_refusal(self.before, self.definition, at, action))
    }

    pub(super) fn cancel(&mut self, by: &Operator) -> Result<(), Refusal> {
        self.check(Action::Cancel)?;
        if self.saga.status == SagaStatus::Running {
            self.give_up(by.why.clone());
            return Ok(());
        }
        self.move_to(SagaStatus::Cancelled);
        self.saga.paused = false;
        self.saga.reason = Some(by.why.clone());
        (0..self.saga.steps.len()).for_each(|at| self.set(at, StepStatus::Skipped, None));
        Ok(())
    }

    pub(super) fn pause(&mut self) -> Result<(), Refusal> {
        self.check(Action::Pause)?;
        self.saga.paused = true;
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<(), Refusal> {
        self.check(Action::Resume)?;
        self.saga.paused = false;
        Ok(())
    }

    pub(super) fn terminate(&mut self, by: &Operator) -> Result<(), Refusal> {
        self.check(Action::Terminate)?;
        self.move_to(SagaStatus::Terminated);
        self.saga.paused = false;
        self.saga.cancel = None;
        self.saga.reason = Some(by.why.clone());
        Ok(())
    }

    pub(super) fn retry(&mut self) -> Result<(), Refusal> {
        self.check(Action::Retry)?;
        for at in 0..self.saga.steps.len() {
            if self.is_stuck(at) {
                self.mark(at);
            }
        }
        Ok(())
    }

    pub(super) fn retry_step(&mut self, at: usize) -> Result<(), Refusal> {
        self.check_step(at, Action::Retry)?;
        self.mark(at);
        Ok(())
    }

    /// The step is to be tried again, with all its attempts, once no other is stuck.
    fn mark(&mut self, at: usize) {
        self.saga.steps[at].due_at = Some(self.now);
        // Those of an undo begin anew when it is sent; until then they say that it was sent before.
        if self.status(at) != StepStatus::UndoStuck {
            self.saga.steps[at].attempt = 0;
        }
    }

    pub(super) fn skip_step(&mut self, at: usize) -> Result<(), Refusal> {
        self.check_step(at, Action::Skip)?;
        if self.status(at) == StepStatus::UndoStuck {
            self.set(at, StepStatus::UndoSkipped, None);
            self.compensation(at, CompensationStatus::Skipped);
        } else {
            self.set(at, StepStatus::Skipped, None);
        }
        Ok(())
    }

    pub(super) fn resolve_step(&mut self, at: usize, outcome: Outcome, output: Option<Value>) -> Result<(), Refusal> {
        self.check_step(at, Action::Resolve)?;
        if output.as_ref().is_some_and(template::is_too_deep) {
            let why = format!("its output is nested more than {} levels deep", template::DEPTH_LIMIT);
            return Err(Refusal::NotNow { what: "resolve that step", why });
        }
        match (self.status(at), outcome) {
            (StepStatus::UndoStuck, Outcome::Succeeded) => {
                self.set(at, StepStatus::Undone, None);
                self.compensation(at, CompensationStatus::Undone);
            }
            (StepStatus::Failed | StepStatus::Unknown, Outcome::Succeeded) => self.succeeded(at, output),
            (StepStatus::Unknown, Outcome::Failed) => {
                self.failed(at, "an operator said that it did not happen".into());
                // Whether to try it anew is for them to say, too.
                self.saga.steps[at].due_at = None;
            }
            (status, _) => {
                let why = format!("the step is {}: \"{}\" cannot be said of it", status.as_str(), word(outcome));
                return Err(Refusal::NotNow { what: "resolve that step", why });
            }
        }
        Ok(())
    }
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Succeeded => "succeeded",
        Outcome::Failed => "failed",
        Outcome::Retry => "retry",
        Outcome::InProgress => "in_progress",
        Outcome::UndoNoop => "undo_noop",
    }
}
