//! A saga computed again from its history, as it must have become: what `verify` compares the tables with. Pure.
//!
//! The database's own functions make the first row of a history and the rows of sagas without a definition; their
//! effect is repeated here. Everything else is [`decide`]'s. Left out on purpose: ids of messages, which no event names.

use super::decide::{Limits, Refusal, decide};
use super::definition::Definition;
use super::state::{Compensation, CompensationStatus, Event, Millis, Phase, Saga, SagaStatus, Step, StepStatus};
use serde_json::{Map, Value};
use uuid::Uuid;

/// What a saga is from its first moment, beside what its first event says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Its id.
    pub id: Uuid,
    /// Name and version of its definition; none when it was opened without one.
    pub definition: Option<(String, i32)>,
    /// Its business key.
    pub business_key: String,
}

/// A row of a history.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// Its number.
    pub seq: i64,
    /// When it happened.
    pub at: Millis,
    /// What happened.
    pub event: Event,
    /// From its changes: the limit that a body was over, if one was.
    pub payload_limit_bytes: Option<usize>,
}

/// Why a history leads nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FoldError {
    /// Every history begins with the making of its saga.
    #[error("row {seq} is no beginning of a saga")]
    NoBeginning {
        /// Its number.
        seq: i64,
    },
    /// A row is missing.
    #[error("row {seq} stands where row {expected} should")]
    Gap {
        /// Its number.
        seq: i64,
        /// The number that it should have.
        expected: i64,
    },
    /// The saga could not have moved so.
    #[error("row {seq} cannot be: {source}")]
    Refused {
        /// Its number.
        seq: i64,
        /// Why.
        source: Refusal,
    },
}

/// The saga after all of `history`; `definition` is the one it was started with.
///
/// # Errors
///
/// At the first row that could not have been.
pub fn replay(origin: &Origin, definition: Option<&Definition>, history: &[Past]) -> Result<Saga, FoldError> {
    let (first, rest) = history.split_first().ok_or(FoldError::NoBeginning { seq: 0 })?;
    rest.iter().try_fold(initial(origin, definition, first)?, |saga, past| next(&saga, definition, past))
}

/// The saga after the first row of its history.
///
/// # Errors
///
/// When that row does not begin a saga.
pub fn initial(origin: &Origin, definition: Option<&Definition>, first: &Past) -> Result<Saga, FoldError> {
    let mut saga = Saga {
        id: origin.id,
        definition: origin.definition.clone(),
        business_key: origin.business_key.clone(),
        status: SagaStatus::Running,
        phase: Phase::Forward,
        paused: false,
        cancel: None,
        reason: None,
        seq: first.seq,
        input: Value::Object(Map::new()),
        labels: Map::new(),
        start_at: first.at,
        deadline: None,
        next_due: None,
        steps: Vec::new(),
        signals: Vec::new(),
    };
    match (&first.event, definition) {
        _ if first.seq != 1 => return Err(FoldError::Gap { seq: first.seq, expected: 1 }),
        (Event::Created { input, labels, start_at, deadline }, Some(definition)) => {
            saga.status = SagaStatus::Scheduled;
            (saga.input, saga.labels) = (input.clone(), labels.clone());
            (saga.start_at, saga.deadline, saga.next_due) = (*start_at, *deadline, Some(*start_at));
            saga.steps = definition.steps.iter().map(|step| pending(&step.id)).collect();
        }
        (Event::Opened { deadline }, None) => (saga.deadline, saga.next_due) = (*deadline, *deadline),
        _ => return Err(FoldError::NoBeginning { seq: first.seq }),
    }
    Ok(saga)
}

/// The saga after one more row.
///
/// # Errors
///
/// When the row could not have followed.
pub fn next(saga: &Saga, definition: Option<&Definition>, past: &Past) -> Result<Saga, FoldError> {
    let (seq, expected) = (past.seq, saga.seq + 1);
    if seq != expected {
        return Err(FoldError::Gap { seq, expected });
    }
    let refused = |source| FoldError::Refused { seq, source };
    if let Some(enlisted) = enlisted(saga, past) {
        return enlisted.map(|moved| Saga { seq, ..moved }).map_err(refused);
    }
    // A row that names no limit had no body over the one of its time.
    let limits = Limits { payload_bytes: past.payload_limit_bytes.unwrap_or(usize::MAX) };
    let transition = match definition {
        Some(definition) => decide(saga, definition, &past.event, past.at, &limits),
        None => decide(saga, &Definition::enlisted(saga), &past.event, past.at, &limits),
    };
    transition.map(|transition| transition.saga).map_err(refused)
}

/// What the database's functions make of a saga without a definition; none: the event is not theirs.
fn enlisted(saga: &Saga, past: &Past) -> Option<Result<Saga, Refusal>> {
    let mut saga = saga.clone();
    let (runs, what) = (saga.status == SagaStatus::Running && saga.definition.is_none(), saga.status.as_str());
    match &past.event {
        Event::Enlisted { step, topic, payload } => {
            let payload = Some(payload.clone()).filter(|payload| !payload.is_null());
            let (topic, status) = (topic.clone(), CompensationStatus::Ready);
            saga.steps.push(Step {
                status: StepStatus::Succeeded,
                epoch: 1,
                compensation: Some(Compensation { topic, payload, status }),
                ..pending(step)
            });
        }
        Event::Completed {} => {
            (saga.status, saga.paused, saga.next_due) = (SagaStatus::Completed, false, None);
            for compensation in saga.steps.iter_mut().filter_map(|step| step.compensation.as_mut()) {
                compensation.status = CompensationStatus::Released;
            }
        }
        Event::Aborted { reason } => {
            (saga.status, saga.phase) = (SagaStatus::Compensating, Phase::Backward);
            (saga.reason, saga.next_due) = (Some(reason.clone()), Some(past.at));
        }
        _ => return None,
    }
    let why = || Refusal::NotNow { what: "be moved so", why: format!("it is {what}, or has a definition") };
    Some(if runs { Ok(saga) } else { Err(why()) })
}

fn pending(id: &str) -> Step {
    Step {
        id: id.to_owned(),
        status: StepStatus::Pending,
        epoch: 0,
        attempt: 0,
        message_id: None,
        due_at: None,
        output: None,
        error: None,
        compensation: None,
    }
}
