//! A saga's rows against what its history comes to: pure.

use super::refold::{Refolded, Written};
use super::{Check, Finding};
use crate::saga::definition::Definition;
use crate::saga::read::{Compensation, Detail};
use crate::saga::snapshot::{millis, state};
use crate::saga::state::{Millis, Saga, Signal, Step};
use serde_json::{Value, json};

/// Every column that the history determines.
pub(super) fn rows(
    detail: &Detail,
    compensations: &[Compensation],
    definition: Option<&Definition>,
    folded: &Refolded,
    findings: &mut Vec<Finding>,
) {
    // What a broken history comes to is unknown: it is a finding already.
    let Some(expected) = &folded.saga else { return };
    let found = state(detail, compensations);
    let mut differ = Differences { findings, step: None };
    saga(&found, expected, &mut differ);
    let summary = &detail.summary;
    differ.time("created_at", Some(millis(&summary.created_at)), Some(folded.created_at));
    differ.time("changed_at", Some(millis(&summary.changed_at)), Some(folded.changed_at));
    differ.time("ended_at", summary.ended_at.as_deref().map(millis), folded.ended_at);

    let names = |saga: &Saga| saga.steps.iter().map(|step| step.id.clone()).collect::<Vec<_>>();
    differ.value("steps", json!(names(&found)), json!(names(expected)));
    for (place, expected) in expected.steps.iter().enumerate() {
        let Some(found) = found.steps.iter().find(|step| step.id == expected.id) else { continue };
        let Some(row) = detail.steps.iter().find(|step| step.id == expected.id) else { continue };
        differ.step = Some(expected.id.clone());
        let written = folded.written.get(&expected.id).cloned().unwrap_or_default();
        step(found, expected, &written, &mut differ);
        let pivot = definition.and_then(|definition| definition.steps.get(place)).is_some_and(|step| step.pivot);
        differ.value("pivot", json!(row.pivot), json!(pivot));
        differ.time("changed_at", Some(millis(&row.changed_at)), written.step);
        differ.time("dispatched_at", row.dispatched_at.as_deref().map(millis), written.dispatched);
        if let Some(row) = compensations.iter().find(|compensation| compensation.step == expected.id) {
            differ.time("compensation.recorded_at", Some(millis(&row.recorded_at)), written.recorded);
            differ.time("compensation.changed_at", Some(millis(&row.changed_at)), written.compensation);
        }
    }
    differ.step = None;
}

fn saga(found: &Saga, expected: &Saga, differ: &mut Differences<'_>) {
    differ.value("status", json!(found.status), json!(expected.status));
    differ.value("phase", json!(found.phase), json!(expected.phase));
    differ.value("paused", json!(found.paused), json!(expected.paused));
    differ.value("cancel", json!(found.cancel), json!(expected.cancel));
    differ.value("reason", json!(found.reason), json!(expected.reason));
    differ.value("seq", json!(found.seq), json!(expected.seq));
    differ.value("input", found.input.clone(), expected.input.clone());
    differ.value("labels", json!(found.labels), json!(expected.labels));
    differ.time("start_at", Some(found.start_at), Some(expected.start_at));
    differ.time("deadline", found.deadline, expected.deadline);
    differ.time("next_due", found.next_due, expected.next_due);
}

fn step(found: &Step, expected: &Step, written: &Written, differ: &mut Differences<'_>) {
    differ.value("status", json!(found.status), json!(expected.status));
    differ.value("epoch", json!(found.epoch), json!(expected.epoch));
    differ.value("attempt", json!(found.attempt), json!(expected.attempt));
    differ.value("message_id", json!(found.message_id), json!(written.message_id));
    differ.time("due_at", found.due_at, expected.due_at);
    differ.value("output", json!(found.output), json!(expected.output));
    differ.value("error", json!(found.error), json!(expected.error));
    differ.value("compensation", json!(found.compensation), json!(expected.compensation));
}

struct Differences<'f> {
    findings: &'f mut Vec<Finding>,
    step: Option<String>,
}

impl Differences<'_> {
    fn value(&mut self, column: &str, found: Value, expected: Value) {
        if found == expected {
            return;
        }
        let finding = Finding::new(Check::State, format!("{column} is {found}, and its history comes to {expected}"));
        self.findings.push(match &self.step {
            Some(step) => finding.of(step),
            None => finding,
        });
    }

    fn time(&mut self, column: &str, found: Option<Millis>, expected: Option<Millis>) {
        self.value(column, json!(found), json!(expected));
    }
}

/// Signals that the history speaks of are there and as it says; those it does not speak of are new.
pub(super) fn signals(detail: &Detail, folded: &Refolded, findings: &mut Vec<Finding>) {
    let Some(saga) = &folded.saga else { return };
    let mut find = |name: &str, what: String| {
        findings.push(Finding::new(Check::Signals, format!("signal \"{name}\" {what}")));
    };
    let kept = |name: &str| saga.signals.iter().any(|signal: &Signal| signal.name == name);
    for row in &detail.signals {
        let payload =
            row.payload.as_deref().and_then(|raw| serde_json::from_str(raw.get()).ok()).unwrap_or(Value::Null);
        let Some(taken) = folded.signals.get(&row.name) else {
            // One that a saga could not take any more is kept, and no event of it.
            if row.state == "taken" {
                find(&row.name, "counts as taken, and no row of the history took it".to_owned());
            }
            continue;
        };
        if *taken != payload {
            find(&row.name, format!("carries {payload}, and the history took it with {taken}"));
        }
        let expected = if kept(&row.name) { "kept" } else { "taken" };
        if row.state != expected {
            find(&row.name, format!("is {}, and by the history it is {expected}", row.state));
        }
    }
    for name in folded.signals.keys() {
        if !detail.signals.iter().any(|row| row.name == *name) {
            find(name, "was taken by the history, and is not there".to_owned());
        }
    }
}
