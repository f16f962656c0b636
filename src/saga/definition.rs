//! What a saga should do: steps, their order, how they are undone, how long and how often to try.

mod faults;
mod fields;
mod graph;
mod order;
mod parse;
mod text;

pub use faults::Fault;
pub use graph::StepSet;
pub use text::{TEXT_LIMIT_BYTES, document_from_text};

use super::state::{self, Saga};
use super::template;
use serde_json::{Map, Value};

/// A definition that was found valid, every default filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct Definition {
    /// Its name.
    pub name: String,
    /// Its version, from 1.
    pub version: i32,
    /// How long a saga may take before it turns back, from its start.
    pub deadline_ms: Option<i64>,
    /// Each after those it waits for; apart from that in the order of the document.
    pub steps: Vec<StepDefinition>,
}

/// A step as it should be.
#[derive(Debug, Clone, PartialEq)]
pub struct StepDefinition {
    /// Unique in its definition.
    pub id: String,
    /// The steps it waits for, as places in [`Definition::steps`].
    pub after: Vec<usize>,
    /// What is done.
    pub work: Work,
    /// When it succeeded there is no way back.
    pub pivot: bool,
    /// How long a reply is waited for, in each attempt; also that of the undo.
    pub timeout_ms: i64,
    /// How often it is tried.
    pub retry: Retry,
    /// How it is undone.
    pub undo: Option<CommandTemplate>,
    /// How often that is tried.
    pub undo_retry: Retry,
    /// What becomes of an undo whose attempts are used up.
    pub on_undo_exhausted: OnExhausted,
}

/// What a step does.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// A command goes out, and its reply is waited for.
    Command(CommandTemplate),
    /// A signal is waited for.
    Wait {
        /// Its name.
        signal: String,
        /// How long; none: until the saga's deadline.
        timeout_ms: Option<i64>,
    },
}

/// Where a command goes, and what its body is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct CommandTemplate {
    /// Routing key.
    pub topic: String,
    /// JSON in which strings such as `$.input.sku` stand for values.
    pub body: Value,
}

/// How often, and how far apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retry {
    /// Attempts in all, the first among them.
    pub max: i32,
    /// Delay after the first attempt.
    pub initial_ms: i64,
    /// What the delay is multiplied with after each attempt.
    pub factor: f64,
    /// Longest delay.
    pub cap_ms: i64,
    /// Whether a delay is spread between nothing and its length.
    pub jitter: Jitter,
}

/// How delays are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jitter {
    /// Anything from 0 to the delay.
    Full,
    /// The delay itself.
    None,
}

/// What becomes of an undo whose attempts are used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnExhausted {
    /// The saga waits for an operator.
    Stuck,
    /// The undo is given up, and the saga goes on.
    Skip,
}

/// Where a definition says nothing.
pub const DEFAULT_TIMEOUT_MS: i64 = 30_000;
/// Where a definition says nothing.
pub const DEFAULT_RETRY: Retry = Retry { max: 5, initial_ms: 1_000, factor: 2.0, cap_ms: 60_000, jitter: Jitter::Full };
/// Where a definition says nothing: an undo must succeed in the end, so it is tried for longer.
pub const DEFAULT_UNDO_RETRY: Retry = Retry { max: 20, ..DEFAULT_RETRY };

impl Definition {
    /// The definition of a saga that was opened without one: its steps are done, each came after the one before, and
    /// their compensations are texts, in which nothing is a reference.
    pub fn enlisted(saga: &Saga) -> Self {
        let step = |(place, step): (usize, &state::Step)| StepDefinition {
            id: step.id.clone(),
            after: place.checked_sub(1).into_iter().collect(),
            // It never goes out: the step is there because it was done.
            work: Work::Command(CommandTemplate { topic: String::new(), body: Value::Object(Map::new()) }),
            pivot: false,
            timeout_ms: DEFAULT_TIMEOUT_MS,
            retry: DEFAULT_RETRY,
            undo: step.compensation.as_ref().map(|compensation| CommandTemplate {
                topic: compensation.topic.clone(),
                body: template::constant(compensation.payload.as_ref().unwrap_or(&Value::Null)),
            }),
            undo_retry: DEFAULT_UNDO_RETRY,
            on_undo_exhausted: OnExhausted::Stuck,
        };
        Self {
            name: String::new(),
            version: 0,
            deadline_ms: None,
            steps: saga.steps.iter().enumerate().map(step).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::saga::state::{Compensation, CompensationStatus, Phase, SagaStatus, Step, StepStatus};
    use serde_json::json;

    fn step(id: &str, payload: Value) -> Step {
        Step {
            id: id.into(),
            status: StepStatus::Succeeded,
            epoch: 1,
            attempt: 0,
            message_id: None,
            due_at: None,
            output: None,
            error: None,
            compensation: Some(Compensation {
                topic: format!("{id}.undo"),
                payload: Some(payload),
                status: CompensationStatus::Ready,
            }),
        }
    }

    /// Goal: an enlisted compensation is sent as it was given, even if it looks like a reference, in a list of any length.
    #[test]
    fn enlisted_steps_follow_each_other_and_their_payloads_are_texts() {
        let payload = json!({"a": "$.business_key", "b": ["$$.x", "$", 1, null]});
        let saga = Saga {
            id: uuid::Uuid::nil(),
            definition: None,
            business_key: "secret".into(),
            status: SagaStatus::Running,
            phase: Phase::Forward,
            paused: false,
            cancel: None,
            reason: None,
            seq: 1,
            input: json!({}),
            labels: Map::new(),
            start_at: 0,
            deadline: None,
            next_due: None,
            steps: (0..100).map(|place| step(&format!("s{place}"), payload.clone())).collect(),
            signals: Vec::new(),
        };
        let definition = Definition::enlisted(&saga);
        assert_eq!(definition.steps[0].after, Vec::<usize>::new());
        assert_eq!(definition.ancestors(99).iter().count(), 99);
        assert_eq!(definition.dependents(0).iter().count(), 99);
        let undo = definition.steps[99].undo.as_ref().expect("it has one");
        assert_eq!(undo.topic, "s99.undo");
        assert_eq!(template::evaluate(&undo.body, &template::Scope::of(&saga)), payload);
    }
}
