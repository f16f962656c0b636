//! A transition as `oncebox.saga_apply` takes it: only what changed, so that outputs are not written over and over.

use super::Applied;
use crate::saga::decide::Changes;
use crate::saga::state::{Compensation, CompensationStatus, Event, Millis, Op, Phase, SagaStatus, Step, StepStatus};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

#[derive(Serialize)]
pub(super) struct Row<'a> {
    id: Uuid,
    seq: i64,
    at: Millis,
    /// `event` and `detail`.
    #[serde(flatten)]
    event: &'a Event,
    changes: RecordedChanges<'a>,
    cause: Option<Uuid>,
    status: SagaStatus,
    phase: Phase,
    paused: bool,
    cancel: Option<&'a str>,
    reason: Option<&'a str>,
    next_due: Option<Millis>,
    steps: Vec<StepRow<'a>>,
    recorded: Vec<CompensationRow<'a>>,
    compensations: Vec<CompensationRow<'a>>,
    signals: Vec<SignalRow<'a>>,
    commands: Vec<CommandRow<'a>>,
}

/// The changes as history keeps them, with the ids of the commands.
#[derive(Serialize)]
struct RecordedChanges<'a> {
    #[serde(flatten)]
    changes: &'a Changes,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    commands: Vec<RecordedCommand<'a>>,
}

#[derive(Serialize)]
struct RecordedCommand<'a> {
    step: &'a str,
    op: Op,
    epoch: i32,
    attempt: i32,
    message_id: Uuid,
    topic: &'a str,
}

#[derive(Serialize)]
struct StepRow<'a> {
    step: &'a str,
    status: StepStatus,
    epoch: i32,
    attempt: i32,
    message_id: Option<Uuid>,
    due_at: Option<Millis>,
    output: Option<&'a Value>,
    error: Option<&'a str>,
}

#[derive(Serialize)]
struct CompensationRow<'a> {
    step: &'a str,
    topic: &'a str,
    payload: Option<&'a Value>,
    status: CompensationStatus,
}

#[derive(Serialize)]
struct SignalRow<'a> {
    name: &'a str,
    state: &'static str,
}

#[derive(Serialize)]
struct CommandRow<'a> {
    #[serde(flatten)]
    recorded: RecordedCommand<'a>,
    deadline: Millis,
    /// As text: what was measured is what goes out.
    body: String,
}

impl<'a> Row<'a> {
    /// `ids` are those of the commands, in their order.
    pub(super) fn new(applied: &'a Applied<'_>, ids: &[Uuid]) -> Self {
        let transition = &applied.transition;
        let saga = &transition.saga;
        let commands = || {
            transition.commands.iter().zip(ids).map(|(command, id)| RecordedCommand {
                step: &command.step,
                op: command.op,
                epoch: command.epoch,
                attempt: command.attempt,
                message_id: *id,
                topic: &command.topic,
            })
        };
        let was = |step: &Step| applied.before.steps.iter().find(|before| before.id == step.id);
        let mut row = Self {
            id: saga.id,
            seq: saga.seq,
            at: applied.at,
            event: applied.event,
            changes: RecordedChanges { changes: &transition.changes, commands: commands().collect() },
            cause: applied.cause,
            status: saga.status,
            phase: saga.phase,
            paused: saga.paused,
            cancel: saga.cancel.as_deref(),
            reason: saga.reason.as_deref(),
            next_due: saga.next_due,
            steps: Vec::new(),
            recorded: Vec::new(),
            compensations: Vec::new(),
            signals: signals(applied),
            commands: commands()
                .zip(&transition.commands)
                .map(|(recorded, command)| CommandRow {
                    recorded,
                    deadline: command.deadline,
                    body: command.body.to_string(),
                })
                .collect(),
        };
        for step in &saga.steps {
            let before = was(step);
            if before.is_none_or(|before| differs(before, step)) {
                row.steps.push(StepRow::new(step));
            }
            match (before.and_then(|before| before.compensation.as_ref()), &step.compensation) {
                (None, Some(now)) => row.recorded.push(CompensationRow::new(&step.id, now)),
                (Some(before), Some(now)) if before != now => {
                    row.compensations.push(CompensationRow::new(&step.id, now))
                }
                _ => {}
            }
        }
        row
    }
}

/// Whether the step's own row changes.
fn differs(before: &Step, step: &Step) -> bool {
    let row = |step: &Step| (step.status, step.epoch, step.attempt, step.message_id, step.due_at);
    row(before) != row(step) || before.output != step.output || before.error != step.error
}

/// What becomes of signals: those a step took, and the one that came and that no step took yet.
fn signals<'a>(applied: &'a Applied<'_>) -> Vec<SignalRow<'a>> {
    let taken = &applied.transition.signals_taken;
    let mut rows: Vec<_> = taken.iter().map(|name| SignalRow { name, state: "taken" }).collect();
    if let Event::Signal { name, .. } = applied.event
        && !taken.contains(name)
    {
        rows.push(SignalRow { name, state: "kept" });
    }
    rows
}

impl<'a> StepRow<'a> {
    fn new(step: &'a Step) -> Self {
        Self {
            step: &step.id,
            status: step.status,
            epoch: step.epoch,
            attempt: step.attempt,
            message_id: step.message_id,
            due_at: step.due_at,
            output: step.output.as_ref(),
            error: step.error.as_deref(),
        }
    }
}

impl<'a> CompensationRow<'a> {
    fn new(step: &'a str, compensation: &'a Compensation) -> Self {
        Self { step, topic: &compensation.topic, payload: compensation.payload.as_ref(), status: compensation.status }
    }
}
