//! What an operator may do with a saga and each of its steps. Pure.

use super::decide::{self, Action};
use super::definition::Definition;
use super::state::{Saga, Step};

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
