//! What the reads gave, as decisions see it: the saga of `state` from the rows, without a lock.

use super::read::{self, Detail};
use super::state::{Compensation, Millis, Saga, Signal, Step};
use serde_json::Value;
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A time as the reads give it; what is none is the epoch, which is no saga's time.
pub fn millis(rfc3339: &str) -> Millis {
    let time = OffsetDateTime::parse(rfc3339, &Rfc3339);
    time.map_or(0, |time| (time.unix_timestamp_nanos() / 1_000_000) as Millis)
}

/// The saga as decisions see it. The rows should be of one moment. Where a compensation is not among those given, its
/// status alone is known: enough to say what is allowed.
pub fn state(detail: &Detail, compensations: &[read::Compensation]) -> Saga {
    let summary = &detail.summary;
    let value = |raw: &RawValue| serde_json::from_str(raw.get()).unwrap_or(Value::Null);
    // An output of JSON's null is none, as it is when the program reads a saga.
    let some = |raw: &Option<Box<RawValue>>| raw.as_deref().map(value).filter(|value| !value.is_null());
    let time = |text: &Option<String>| text.as_deref().map(millis);
    let undo = |step: &read::Step| match compensations.iter().find(|compensation| compensation.step == step.id) {
        Some(found) => {
            Some(Compensation { topic: found.topic.clone(), payload: some(&found.payload), status: found.status })
        }
        None => step.compensation.map(|status| Compensation { topic: String::new(), payload: None, status }),
    };
    let step = |step: &read::Step| Step {
        id: step.id.clone(),
        status: step.status,
        epoch: step.epoch,
        attempt: step.attempt,
        message_id: step.message_id,
        due_at: time(&step.due_at),
        output: some(&step.output),
        error: step.error.clone(),
        compensation: undo(step),
    };
    let kept = detail.signals.iter().filter(|signal| signal.state == "kept");
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
        input: value(&detail.input),
        labels: summary.labels.clone(),
        start_at: summary.start_at.as_deref().map_or(0, millis),
        deadline: time(&summary.deadline),
        next_due: time(&summary.next_due),
        steps: detail.steps.iter().map(step).collect(),
        signals: kept.map(|signal| Signal { name: signal.name.clone(), payload: some(&signal.payload) }).collect(),
    }
}
