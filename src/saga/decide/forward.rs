//! The way forward: what is ready is dispatched; a failure before there is no way back turns the saga.

use super::*;
use crate::saga::state::{Op, Signal};

impl Deciding<'_> {
    pub(super) fn go_forward(&mut self) {
        if self.saga.status != SagaStatus::Running {
            return;
        }
        if let Some(why) = self.turning_point() {
            let why = self.saga.cancel.clone().unwrap_or(why);
            return self.turn_back(why);
        }
        if self.pivot_done() {
            self.saga.cancel = None;
        }
        let done = |step: &Step| matches!(step.status, StepStatus::Succeeded | StepStatus::Skipped);
        if self.saga.definition.is_some() && self.saga.steps.iter().all(done) {
            return self.complete();
        }
        for at in 0..self.saga.steps.len() {
            match self.status(at) {
                StepStatus::Pending if self.is_ready(at) => self.dispatch(at),
                StepStatus::Backoff | StepStatus::Failed if self.is_due(at) && !self.moved(at) => self.dispatch(at),
                // An operator asked for it.
                StepStatus::Unknown if self.is_due(at) => self.set(at, StepStatus::Backoff, Some(self.now)),
                StepStatus::Dispatched if self.kept_signal(at).is_some() => self.again = true,
                _ => {}
            }
        }
    }

    /// Why the saga must turn back, if it must: a step is not done and will not be, and there is a way back.
    fn turning_point(&self) -> Option<String> {
        let fatal = |at: &usize| match self.status(*at) {
            StepStatus::Failed => !self.is_after_pivot(*at),
            StepStatus::Unknown => !self.definition.is_at_or_after_pivot(*at),
            _ => false,
        };
        (0..self.saga.steps.len()).find(fatal).map(|at| self.failure(at))
    }

    fn complete(&mut self) {
        if !self.move_to(SagaStatus::Completed) {
            return;
        }
        for at in 0..self.saga.steps.len() {
            if self.to_undo(at) {
                self.compensation(at, CompensationStatus::Released);
            }
        }
    }

    fn is_ready(&self, at: usize) -> bool {
        let done = |before: &usize| matches!(self.status(*before), StepStatus::Succeeded | StepStatus::Skipped);
        // A saga whose time is over sends nothing new: the next event turns it back.
        self.definition.steps[at].after.iter().all(done) && self.deadline().is_none_or(|deadline| deadline > self.now)
    }

    /// Sends the step's command, or begins to wait for its signal.
    fn dispatch(&mut self, at: usize) {
        let defined = &self.definition.steps[at];
        let first = self.status(at) != StepStatus::Backoff;
        let (due_at, body) = match &defined.work {
            Work::Wait { timeout_ms, .. } => (timeout_ms.map(|timeout_ms| self.after(timeout_ms)), None),
            Work::Command(template) => match self.body(&template.body) {
                // What went out once goes out again, even if the limit was lowered since.
                Err(error) if first => return self.refuse(at, error),
                Err(_) => {
                    let body = template::evaluate(&template.body, &Scope::of(&self.saga));
                    (Some(self.after(defined.timeout_ms)), Some((template, body)))
                }
                Ok(body) => (Some(self.after(defined.timeout_ms)), Some((template, body))),
            },
        };
        let failed = self.status(at) == StepStatus::Failed;
        self.set(at, StepStatus::Dispatched, due_at);
        let step = &mut self.saga.steps[at];
        step.epoch = (step.epoch + i32::from(failed)).max(1);
        step.attempt += 1;
        let (epoch, attempt) = (step.epoch, step.attempt);
        if let Some(undo) = &defined.undo {
            step.compensation.get_or_insert_with(|| Compensation {
                topic: undo.topic.clone(),
                payload: None,
                status: CompensationStatus::Recorded,
            });
        }
        if let (Some((template, body)), Some(deadline)) = (body, due_at) {
            let (step, topic) = (defined.id.clone(), template.topic.clone());
            self.commands.push(Command { step, op: Op::Do, epoch, attempt, topic, body, deadline });
        } else if self.kept_signal(at).is_some() {
            self.again = true;
        }
    }

    /// The step's command cannot be made. What follows is for the next event: this one may have sent others.
    fn refuse(&mut self, at: usize, error: String) {
        self.set(at, StepStatus::Failed, None);
        self.saga.steps[at].error = Some(error);
        self.again = true;
    }

    /// A signal came.
    pub(super) fn signal(&mut self, name: &str, payload: Option<Value>) -> Result<(), Refusal> {
        let waits =
            |at: &usize| matches!(&self.definition.steps[*at].work, Work::Wait { signal, .. } if signal == name);
        let waiting: Vec<usize> = (0..self.saga.steps.len()).filter(waits).collect();
        if waiting.is_empty() {
            return Err(Refusal::UnknownSignal(name.to_owned()));
        }
        let kept = self.saga.signals.iter().any(|signal| signal.name == name);
        let wanted = |at: &&usize| match self.status(**at) {
            StepStatus::Pending | StepStatus::Dispatched => true,
            // Waits again after the pivot.
            StepStatus::Failed => self.is_after_pivot(**at),
            _ => false,
        };
        let going_on = self.forward() && !self.saga.status.is_final();
        if kept || !going_on || !waiting.iter().any(|at| wanted(&at)) {
            if !kept {
                self.signals_taken.push(name.to_owned());
            }
            return self.ignore("no step waits for this signal any more");
        }
        self.saga.signals.push(Signal { name: name.to_owned(), payload: payload.filter(|payload| !payload.is_null()) });
        self.take_kept_signals();
        Ok(())
    }

    /// The kept signal that the step waits for.
    fn kept_signal(&self, at: usize) -> Option<usize> {
        match &self.definition.steps[at].work {
            Work::Wait { signal, .. } => self.saga.signals.iter().position(|kept| kept.name == *signal),
            Work::Command(_) => None,
        }
    }

    /// Gives kept signals to the steps that wait for them.
    pub(super) fn take_kept_signals(&mut self) {
        for at in 0..self.saga.steps.len() {
            if self.status(at) != StepStatus::Dispatched {
                continue;
            }
            if let Some(kept) = self.kept_signal(at) {
                let signal = self.saga.signals.remove(kept);
                self.succeeded(at, signal.payload);
                self.signals_taken.push(signal.name);
            }
        }
    }
}
