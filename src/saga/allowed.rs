//! What an operator may do with a saga as it was read: the same words as the decision's own. Pure.

use super::decide::{self, Action};
use super::definition::Definition;
use super::read::Detail;
use super::state::{Compensation, Saga, Step};
use serde_json::Value;

/// For the saga as a whole, and for each of its steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// For the saga.
    pub saga: Vec<Action>,
    /// For each step, in their order.
    pub steps: Vec<Vec<Action>>,
}

impl Allowed {
    /// What is allowed now, by the definition that the saga follows.
    pub fn new(saga: &Saga, definition: &Definition) -> Self {
        let of_step = |step: &Step| decide::allowed_step_actions(saga, definition, &step.id);
        Self { saga: decide::allowed_actions(saga, definition), steps: saga.steps.iter().map(of_step).collect() }
    }
}

/// As much of a saga's state as these questions take: whether there is a time, not which; no inputs, outputs and bodies.
pub fn state(saga: &Detail) -> Saga {
    let is_set = |time: &Option<String>| time.as_ref().map(|_| 0);
    let step = |step: &super::read::Step| Step {
        id: step.id.clone(),
        status: step.status,
        epoch: step.epoch,
        attempt: step.attempt,
        message_id: step.message_id,
        due_at: is_set(&step.due_at),
        output: None,
        error: step.error.clone(),
        compensation: step.compensation.map(|status| Compensation { topic: String::new(), payload: None, status }),
    };
    let summary = &saga.summary;
    Saga {
        id: summary.id,
        definition: summary.definition.clone().zip(summary.version),
        business_key: summary.business_key.clone(),
        status: summary.status,
        phase: summary.phase,
        paused: summary.paused,
        cancel: summary.cancel.clone(),
        reason: summary.reason.clone(),
        seq: summary.seq,
        input: Value::Null,
        labels: summary.labels.clone(),
        start_at: 0,
        deadline: is_set(&summary.deadline),
        next_due: is_set(&summary.next_due),
        steps: saga.steps.iter().map(step).collect(),
        signals: Vec::new(),
    }
}
