//! What there is to say of one saga, put together from its rows, its definition and its history: pure, no I/O.

use super::text::{clean, cut, duration};
use crate::saga::definition::{Definition, Retry, StepDefinition, Work};
use crate::saga::read::{self, Detail, HistoryRow};
use crate::saga::snapshot::{millis, state};
use crate::saga::state::{CompensationStatus, Millis, Op, Outcome, Phase, Saga, SagaStatus, Step, StepStatus};
use serde_json::{Map, Value};
use std::collections::HashMap;
use uuid::Uuid;

/// From when on a timer that nobody looked at means that no orchestrator is at work.
pub const OVERDUE_MS: Millis = 10_000;

/// Longest error among what is waited for: its step has more of it.
const ERROR_CHARS: usize = 100;

/// One saga as it is drawn.
#[derive(Debug, Clone)]
pub struct View {
    pub now: Millis,
    pub id: Uuid,
    pub definition: Option<(String, i32)>,
    pub business_key: String,
    pub status: SagaStatus,
    pub backward: bool,
    pub paused: bool,
    pub reason: Option<String>,
    pub cancel: Option<String>,
    pub created_at: Millis,
    pub start_at: Millis,
    pub deadline: Option<Millis>,
    pub ended_at: Option<Millis>,
    pub labels: Map<String, Value>,
    pub steps: Vec<StepView>,
    pub waits: Vec<String>,
    pub actions: Vec<String>,
    pub history: Option<Vec<HistoryLine>>,
}

/// One step.
#[derive(Debug, Clone)]
pub struct StepView {
    pub id: String,
    pub pivot: bool,
    pub status: StepStatus,
    pub sent: Sent,
    pub error: Option<String>,
    pub notes: Vec<String>,
    pub undo: Option<UndoView>,
}

/// What undoes it.
#[derive(Debug, Clone)]
pub struct UndoView {
    pub topic: String,
    pub status: CompensationStatus,
    pub sent: Sent,
}

/// The commands of one epoch and op.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sent {
    /// The first of them.
    pub at: Option<Millis>,
    /// The final answer, or the end of waiting for it.
    pub answered_at: Option<Millis>,
    pub under_way: bool,
    pub attempts: i32,
    pub max: Option<i32>,
}

/// A history row in words.
#[derive(Debug, Clone)]
pub struct HistoryLine {
    pub seq: i64,
    pub at: Millis,
    pub text: String,
}

/// What a view is made of.
pub struct Parts<'p> {
    pub now: Millis,
    pub detail: &'p Detail,
    pub compensations: &'p [read::Compensation],
    pub history: &'p [HistoryRow],
    /// None for a saga without one, or when it cannot be read.
    pub definition: Option<&'p Definition>,
    pub actions: Vec<String>,
    pub with_history: bool,
}

impl View {
    pub fn new(parts: Parts<'_>) -> Self {
        let Parts { now, detail, definition, .. } = parts;
        let saga = state(detail, parts.compensations);
        let summary = &detail.summary;
        let mut times = Times::of(parts.history);
        let steps = detail.steps.iter().zip(&saga.steps).enumerate().map(|(place, (row, step))| {
            let as_defined = definition.and_then(|definition| definition.steps.get(place));
            step_view(row.pivot, step, as_defined, definition, place, &mut times)
        });
        let mut view = Self {
            now,
            id: saga.id,
            definition: saga.definition.clone(),
            business_key: saga.business_key.clone(),
            status: saga.status,
            backward: saga.phase == Phase::Backward,
            paused: saga.paused,
            reason: saga.reason.clone(),
            cancel: saga.cancel.clone(),
            created_at: millis(&summary.created_at),
            start_at: saga.start_at,
            deadline: saga.deadline,
            ended_at: summary.ended_at.as_deref().map(millis),
            labels: saga.labels.clone(),
            steps: steps.collect(),
            waits: Vec::new(),
            actions: parts.actions,
            history: parts.with_history.then(|| parts.history.iter().map(history_line).collect()),
        };
        view.waits = waits(&view, &saga, definition);
        view
    }

    /// `order/A-1042`, as the command line takes it.
    pub fn name(&self) -> String {
        match &self.definition {
            Some((definition, _)) => format!("{definition}/{}", self.business_key),
            None => format!("/{}", self.business_key),
        }
    }
}

fn step_view(
    pivot: bool,
    step: &Step,
    as_defined: Option<&StepDefinition>,
    definition: Option<&Definition>,
    place: usize,
    times: &mut Times,
) -> StepView {
    let mut notes = Vec::new();
    if step.epoch > 1 {
        notes.push(format!("epoch {}", step.epoch));
    }
    if let (Some(own), Some(definition)) = (as_defined, definition) {
        let follows_one_before = own.after.len() == 1 && own.after.first().is_some_and(|after| after + 1 == place);
        if place > 0 && !follows_one_before {
            let names: Vec<&str> =
                own.after.iter().filter_map(|&after| Some(&*definition.steps.get(after)?.id)).collect();
            notes.push(if names.is_empty() { "at once".to_owned() } else { format!("after {}", names.join(", ")) });
        }
        if let Work::Wait { signal, .. } = &own.work {
            notes.push(format!("signal {signal}"));
        }
    }
    if step.status == StepStatus::UndoNoop {
        notes.push("it had never run".to_owned());
    }
    let mut sent = times.take(&step.id, Op::Do, step.epoch);
    let waits_for_signal = as_defined.is_some_and(|own| matches!(own.work, Work::Wait { .. }));
    if waits_for_signal {
        sent.attempts = 0;
    }
    sent.max = as_defined.map(|own| own.retry.max);
    sent.under_way = matches!(step.status, StepStatus::Dispatched | StepStatus::Backoff);
    let undo = step.compensation.as_ref().map(|compensation| {
        let mut sent = times.take(&step.id, Op::Undo, step.epoch);
        sent.max = as_defined.map(|own| own.undo_retry.max);
        sent.under_way = matches!(step.status, StepStatus::Undoing | StepStatus::UndoBackoff);
        UndoView { topic: compensation.topic.clone(), status: compensation.status, sent }
    });
    StepView { id: step.id.clone(), pivot, status: step.status, sent, error: step.error.clone(), notes, undo }
}

/// When commands went out and when they were answered, by step, op and epoch: the rows of a step say the newest alone.
#[derive(Default)]
struct Times(HashMap<(String, Op, i32), Sent>);

impl Times {
    fn of(history: &[HistoryRow]) -> Self {
        let mut times = Self::default();
        for row in history {
            let at = millis(&row.at);
            let changes: Value = serde_json::from_str(row.changes.get()).unwrap_or(Value::Null);
            for change in list(&changes, "steps") {
                times.step(change, at);
            }
            for command in list(&changes, "commands") {
                let (step, epoch) = (text(command, "step"), command["epoch"].as_i64().unwrap_or(0) as i32);
                let op = if text(command, "op") == "undo" { Op::Undo } else { Op::Do };
                let sent = times.0.entry((step, op, epoch)).or_default();
                sent.at.get_or_insert(at);
                sent.attempts += 1;
            }
        }
        times
    }

    fn step(&mut self, change: &Value, at: Millis) {
        let epoch = change["epoch"].as_i64().unwrap_or(0) as i32;
        let status = |name| serde_json::from_value::<StepStatus>(change[name].clone()).ok();
        let (Some(from), Some(to)) = (status("from"), status("to")) else { return };
        use StepStatus::*;
        let op = if matches!(from, Undoing | UndoBackoff | UndoStuck) { Op::Undo } else { Op::Do };
        let sent = self.0.entry((text(change, "step"), op, epoch)).or_default();
        match to {
            // A wait has no command.
            Dispatched => {
                sent.at.get_or_insert(at);
            }
            Succeeded | Failed | Unknown | Undone | UndoNoop | UndoStuck | UndoSkipped if from != to => {
                sent.answered_at = Some(at);
            }
            _ => {}
        }
    }

    fn take(&mut self, step: &str, op: Op, epoch: i32) -> Sent {
        self.0.remove(&(step.to_owned(), op, epoch)).unwrap_or_default()
    }
}

fn list<'v>(value: &'v Value, name: &str) -> impl Iterator<Item = &'v Value> {
    value[name].as_array().into_iter().flatten()
}

fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_default().to_owned()
}

/// What the saga waits for now.
fn waits(view: &View, saga: &Saga, definition: Option<&Definition>) -> Vec<String> {
    if saga.status.is_final() {
        return Vec::new();
    }
    let mut waits = Vec::new();
    if saga.paused {
        waits.push("an operator who resumes it; what comes in is recorded, nothing is sent".to_owned());
    }
    let overdue_ms = saga.next_due.map_or(0, |due| view.now - due);
    if overdue_ms > OVERDUE_MS && !saga.paused {
        waits.push(format!("an orchestrator: due for {}, and none has looked (oncebox run)", duration(overdue_ms)));
    }
    match saga.status {
        SagaStatus::Scheduled if saga.start_at > view.now => {
            waits.push(format!("its start, {}", view.when(saga.start_at)))
        }
        SagaStatus::Scheduled if waits.is_empty() => waits.push("an orchestrator, to begin".to_owned()),
        SagaStatus::Running if saga.definition.is_none() => waits.push("saga_complete, or saga_abort".to_owned()),
        _ => {}
    }
    for (place, step) in saga.steps.iter().enumerate() {
        let as_defined = definition.and_then(|definition| definition.steps.get(place));
        waits.extend(wait_of(view, saga, step, as_defined));
    }
    if waits.is_empty() {
        waits.push("what is due at once".to_owned());
    }
    waits
}

fn wait_of(view: &View, saga: &Saga, step: &Step, as_defined: Option<&StepDefinition>) -> Option<String> {
    use StepStatus::*;
    let id = &step.id;
    let stuck = saga.status == SagaStatus::Stuck;
    // Timers rest meanwhile, and what was due begins anew.
    let until = |prefix: &str| match step.due_at {
        Some(_) if stuck || saga.paused => String::new(),
        Some(at) => format!("{prefix}{}", view.when(at)),
        None => String::new(),
    };
    let of = |retry: Option<&Retry>, attempt: i32| {
        format!("attempt {attempt}{}", retry.map_or(String::new(), |retry| format!(" of {}", retry.max)))
    };
    let (retry, undo_retry) = (as_defined.map(|own| &own.retry), as_defined.map(|own| &own.undo_retry));
    let why = step.error.as_deref().map_or(String::new(), |error| format!(": {}", cut(&clean(error), ERROR_CHARS)));
    Some(match (step.status, as_defined.map(|own| &own.work)) {
        (Dispatched, Some(Work::Wait { signal, .. })) => {
            format!("signal \"{signal}\", for \"{id}\"{}", until(" until "))
        }
        (Dispatched, _) => format!("the reply to \"{id}\", {}{}", of(retry, step.attempt), until(", until ")),
        (Backoff, _) if !stuck => format!("{} of \"{id}\"{}", of(retry, step.attempt + 1), until(", ")),
        (Failed, _) if step.due_at.is_some() => format!("another attempt of \"{id}\"{}", until(", ")),
        (Undoing, _) => {
            format!("the reply to the undo of \"{id}\", {}{}", of(undo_retry, step.attempt), until(", until "))
        }
        (UndoBackoff, _) => format!("{} to undo \"{id}\"{}", of(undo_retry, step.attempt + 1), until(", ")),
        (UndoStuck, _) => format!("an operator: \"{id}\" could not be undone{why}"),
        (Failed | Unknown, _) if stuck && saga.phase == Phase::Forward => {
            let what = if step.status == Failed { "has failed" } else { "may or may not have run" };
            format!("an operator: \"{id}\" {what}{why}")
        }
        _ => return None,
    })
}

/// One row in words: what happened, and what became of it.
pub fn history_line(row: &HistoryRow) -> HistoryLine {
    let detail: Value = serde_json::from_str(row.detail.get()).unwrap_or(Value::Null);
    let changes: Value = serde_json::from_str(row.changes.get()).unwrap_or(Value::Null);
    let mut became: Vec<String> = Vec::new();
    if let (Some(from), Some(to)) = (changes["saga"]["from"].as_str(), changes["saga"]["to"].as_str()) {
        became.push(format!("saga {from} → {to}"));
    }
    for change in list(&changes, "steps") {
        let (step, from, to) = (text(change, "step"), text(change, "from"), text(change, "to"));
        became.push(if from == to { format!("{step} {to} again") } else { format!("{step} {from} → {to}") });
    }
    for command in list(&changes, "commands") {
        became.push(format!("sent {} (attempt {})", text(command, "topic"), command["attempt"]));
    }
    if let Some(why) = changes["ignored"].as_str() {
        became.push(format!("ignored: {why}"));
    }
    let mut line = what(&row.event, &detail);
    if !became.is_empty() {
        line += &format!(": {}", became.join("; "));
    }
    HistoryLine { seq: row.seq, at: millis(&row.at), text: line }
}

fn what(event: &str, detail: &Value) -> String {
    let step = || text(detail, "step");
    let by = || match (detail["who"].as_str(), detail["why"].as_str()) {
        (Some(who), Some(why)) => format!(" by {who} ({why})"),
        _ => String::new(),
    };
    match event {
        "due" => "time".to_owned(),
        "reply" => {
            let undo = if text(detail, "op") == "undo" { "the undo of " } else { "" };
            let outcome = match serde_json::from_value::<Outcome>(detail["outcome"].clone()) {
                Ok(Outcome::UndoNoop) => "nothing to undo".to_owned(),
                _ => text(detail, "outcome").replace('_', " "),
            };
            let error = detail["error"].as_str().map_or(String::new(), |error| format!(" ({error})"));
            format!("reply to {undo}{}: {outcome}{error}", step())
        }
        "signal" => format!("signal {}", text(detail, "name")),
        "enlisted" => format!("enlisted {}", step()),
        "aborted" => format!("aborted ({})", text(detail, "reason")),
        "retry_step" | "skip_step" | "resolve_step" => {
            format!("{} {}{}", event.trim_end_matches("_step"), step(), by())
        }
        _ => format!("{event}{}", by()),
    }
}
