//! A history computed again, row by row, and held against what its rows say came of them: pure.

use super::{Check, Finding};
use crate::saga::decide::{Change, Changes, Limits, StepChange, decide};
use crate::saga::definition::Definition;
use crate::saga::fold::{self, Origin, Past};
use crate::saga::read::HistoryRow;
use crate::saga::snapshot::millis;
use crate::saga::state::{Command, Event, Millis, Op, Saga, Step, StepStatus};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use uuid::Uuid;

/// A command as its history row names it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Recorded {
    pub step: String,
    pub op: Op,
    pub epoch: i32,
    pub attempt: i32,
    pub message_id: Uuid,
    pub topic: String,
}

/// A command that the history made, and what is known of its message.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub seq: i64,
    pub at: Millis,
    pub message_id: Uuid,
    pub command: Command,
}

/// A reply that counted.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub seq: i64,
    pub at: Millis,
    pub event: Event,
    pub cause: Option<Uuid>,
}

/// When a step's rows were last written.
#[derive(Debug, Clone, Default)]
pub(super) struct Written {
    pub step: Option<Millis>,
    pub dispatched: Option<Millis>,
    pub message_id: Option<Uuid>,
    pub recorded: Option<Millis>,
    pub compensation: Option<Millis>,
}

/// What the history comes to.
#[derive(Debug, Default)]
pub(super) struct Refolded {
    /// None when a row could not have been.
    pub saga: Option<Saga>,
    /// How far it could be computed.
    pub rows: i64,
    pub sent: Vec<Sent>,
    pub answers: Vec<Answer>,
    /// Signals by name, as the history has them.
    pub signals: HashMap<String, Value>,
    pub written: HashMap<String, Written>,
    pub created_at: Millis,
    pub changed_at: Millis,
    pub ended_at: Option<Millis>,
    pub findings: Vec<Finding>,
}

/// Computes everything again, as far as it can be.
pub(super) fn refold(origin: &Origin, definition: Option<&Definition>, history: &[HistoryRow]) -> Refolded {
    let mut folded = Refolded::default();
    let mut saga: Option<Saga> = None;
    for (place, row) in history.iter().enumerate() {
        if row.seq != place as i64 + 1 {
            let what = format!("stands where row {} should: rows are missing or doubled", place + 1);
            folded.find(Check::Chain, row.seq, what);
            return folded;
        }
        let (past, changes) = match past(row) {
            Ok(read) => read,
            Err(error) => {
                folded.find(Check::Fold, row.seq, format!("cannot be read: {error}"));
                return folded;
            }
        };
        let after = match &saga {
            None => fold::initial(origin, definition, &past),
            Some(before) => fold::next(before, definition, &past),
        };
        let after = match after {
            Ok(after) => after,
            Err(error) => {
                folded.find(Check::Fold, row.seq, error.to_string());
                return folded;
            }
        };
        folded.take(saga.as_ref(), &after, definition, &past, &changes, row.cause);
        saga = Some(after);
        folded.rows = row.seq;
    }
    folded.saga = saga;
    folded
}

fn past(row: &HistoryRow) -> Result<(Past, Value), serde_json::Error> {
    let detail: Value = serde_json::from_str(row.detail.get())?;
    let changes: Value = serde_json::from_str(row.changes.get())?;
    let event = serde_json::from_value(json!({ "event": row.event, "detail": detail }))?;
    let payload_limit_bytes = changes["payload_limit_bytes"].as_u64().and_then(|limit| limit.try_into().ok());
    Ok((Past { seq: row.seq, at: millis(&row.at), event, payload_limit_bytes }, changes))
}

impl Refolded {
    fn find(&mut self, check: Check, seq: i64, detail: String) {
        self.findings.push(Finding::new(check, detail).at(seq));
    }

    fn take(
        &mut self,
        before: Option<&Saga>,
        after: &Saga,
        definition: Option<&Definition>,
        past: &Past,
        changes: &Value,
        cause: Option<Uuid>,
    ) {
        let at = past.at;
        self.changed_at = at;
        match before {
            None => self.created_at = at,
            Some(before) if !before.status.is_final() && after.status.is_final() => self.ended_at = Some(at),
            Some(_) => {}
        }
        let ignored = self.changes(before, after, definition, past, changes);
        let none = Vec::new();
        let steps_before = before.map_or(&none, |before| &before.steps);
        for (place, step) in after.steps.iter().enumerate() {
            self.step(steps_before.get(place), step, at);
        }
        match &past.event {
            Event::Signal { name, payload } => {
                self.signals.entry(name.clone()).or_insert_with(|| payload.clone().unwrap_or(Value::Null));
            }
            event @ Event::Reply { .. } if !ignored => {
                self.answers.push(Answer { seq: past.seq, at, event: event.clone(), cause });
            }
            _ => {}
        }
    }

    /// When the rows of the step are written: whenever something of them changes.
    fn step(&mut self, before: Option<&Step>, after: &Step, at: Millis) {
        let written = self.written.entry(after.id.clone()).or_default();
        let own = |step: &Step| Step { compensation: None, message_id: None, ..step.clone() };
        if before.map(own) != Some(own(after)) {
            written.step = Some(at);
        }
        let is_dispatched = |step: &Step| step.status == StepStatus::Dispatched;
        if is_dispatched(after) && !before.is_some_and(is_dispatched) {
            written.dispatched = Some(at);
        }
        let compensation_before = before.and_then(|before| before.compensation.as_ref());
        if after.compensation.as_ref() != compensation_before {
            written.compensation = Some(at);
            if compensation_before.is_none() {
                written.recorded = Some(at);
            }
        }
    }

    /// Holds what the row says came of its event against what must have come of it; true: nothing came of it.
    fn changes(
        &mut self,
        before: Option<&Saga>,
        after: &Saga,
        definition: Option<&Definition>,
        past: &Past,
        recorded: &Value,
    ) -> bool {
        let limits = Limits { payload_bytes: past.payload_limit_bytes.unwrap_or(usize::MAX) };
        let decided = before.and_then(|before| {
            let definition = definition.cloned().unwrap_or_else(|| Definition::enlisted(before));
            decide(before, &definition, &past.event, past.at, &limits).ok()
        });
        let commands =
            match serde_json::from_value::<Vec<Recorded>>(recorded.get("commands").cloned().unwrap_or(json!([]))) {
                Ok(commands) => commands,
                Err(error) => {
                    self.find(Check::Changes, past.seq, format!("its commands cannot be read: {error}"));
                    return false;
                }
            };
        let (changes, sent) = match decided {
            Some(decided) => (decided.changes, decided.commands),
            // What the database's own functions did.
            None => (difference(before, after), Vec::new()),
        };
        let mut said = recorded.clone();
        if let Some(said) = said.as_object_mut() {
            said.remove("commands");
        }
        let expected = serde_json::to_value(&changes).unwrap_or_default();
        if said != expected {
            let what = format!("says that {said} came of it, and it must have been {expected}");
            self.find(Check::Changes, past.seq, what);
        }
        let bare = |recorded: &Recorded| {
            let Recorded { step, op, epoch, attempt, topic, .. } = recorded;
            json!([step, op, epoch, attempt, topic])
        };
        let wanted = |command: &Command| {
            let Command { step, op, epoch, attempt, topic, .. } = command;
            json!([step, op, epoch, attempt, topic])
        };
        let said: Vec<Value> = commands.iter().map(bare).collect();
        let expected: Vec<Value> = sent.iter().map(wanted).collect();
        if said != expected {
            let what = format!("names the commands {}, and they must have been {}", json!(said), json!(expected));
            self.find(Check::Changes, past.seq, what);
            return false;
        }
        for (recorded, command) in commands.into_iter().zip(sent) {
            let written = self.written.entry(command.step.clone()).or_default();
            written.message_id = Some(recorded.message_id);
            written.step = Some(past.at);
            written.dispatched = Some(past.at);
            self.sent.push(Sent { seq: past.seq, at: past.at, message_id: recorded.message_id, command });
        }
        matches!(changes, Changes { ignored: Some(_), .. })
    }
}

/// What changed between two states, in the words of the history.
fn difference(before: Option<&Saga>, after: &Saga) -> Changes {
    let Some(before) = before else { return Changes::default() };
    let known = |step: &&Step| before.steps.iter().any(|known| known.id == step.id);
    let new = after.steps.iter().filter(|step| !known(step)).map(|step| StepChange {
        step: step.id.clone(),
        from: StepStatus::Pending,
        to: step.status,
        epoch: step.epoch,
        attempt: step.attempt,
        error: None,
    });
    Changes {
        saga: (before.status != after.status).then_some(Change { from: before.status, to: after.status }),
        steps: new.collect(),
        ..Changes::default()
    }
}
