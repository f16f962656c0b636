//! The pure step from one state of a saga to the next: `(saga, definition, event, now) → transition`, or a refusal.
//!
//! ```text
//! event ─▶ apply: what it says of the saga or of one step ─▶ advance: what follows ─▶ transition
//!          (replies, signals, timers, operator)              (forward or backward)
//! ```
//!
//! One event moves the saga's status once at most, and each step and each compensation once: that is what the
//! database's triggers can check. What is still to be done then is done by the next [`Event::Due`], for which
//! `next_due` is set to now. Nothing here is random or reads a clock, so the history's events give the same states
//! again. Left out on purpose: ids of commands, which the store gives.

mod advance;
mod backward;
mod forward;
mod operator;
mod replies;
mod timing;

pub use operator::{allowed_actions, allowed_step_actions};

use super::definition::{Definition, StepDefinition, Work};
use super::state::{
    Command, Compensation, CompensationStatus, Event, Millis, Outcome, Phase, Saga, SagaStatus, Step, StepStatus,
};
use super::template::{self, Scope};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What an event makes of a saga. The store writes all of it in one transaction.
#[derive(Debug, Clone, PartialEq)]
pub struct Transition {
    /// The saga afterwards; its `seq` is one more.
    pub saga: Saga,
    /// What changed, for the history.
    pub changes: Changes,
    /// What is to be published.
    pub commands: Vec<Command>,
    /// Signals that are done with, by name: a step has them, or none will want them any more. (Those to keep are in
    /// the saga.)
    pub signals_taken: Vec<String>,
}

/// What changed, as a history row keeps it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// The saga's status before and after, if it changed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub saga: Option<Change<SagaStatus>>,
    /// Steps whose status, epoch or attempt changed.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub steps: Vec<StepChange>,
    /// Why an event changed nothing, as a reply that came too late.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ignored: Option<String>,
    /// The limit that a body was over, if one was: it may be another one when the history is read.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub payload_limit_bytes: Option<usize>,
}

/// Before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change<T> {
    /// Before.
    pub from: T,
    /// After.
    pub to: T,
}

/// A step's change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepChange {
    /// Which step.
    pub step: String,
    /// Before.
    pub from: StepStatus,
    /// After; the same when only the attempt changed.
    pub to: StepStatus,
    /// After.
    pub epoch: i32,
    /// After.
    pub attempt: i32,
    /// Why, if something failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// What an operator may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Turn back.
    Cancel,
    /// Send nothing new.
    Pause,
    /// Go on.
    Resume,
    /// Try what is stuck again.
    Retry,
    /// Give up as it stands.
    Terminate,
    /// Go on without a step.
    Skip,
    /// Say what became of a step.
    Resolve,
}

/// Why an event is refused; the saga stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The definition has no such step.
    #[error("the saga has no step \"{0}\"")]
    UnknownStep(String),
    /// A reply to a command that was never sent.
    #[error("step \"{step}\" has sent no {op} in epoch {epoch}: {expected}")]
    NeverSent {
        /// Which step.
        step: String,
        /// `do` or `undo`.
        op: String,
        /// The epoch of the reply.
        epoch: i32,
        /// What there is instead.
        expected: String,
    },
    /// No step of the definition waits for such a signal.
    #[error("no step of the saga waits for a signal \"{0}\"")]
    UnknownSignal(String),
    /// Not in this state.
    #[error("the saga cannot {what} now: {why}")]
    NotNow {
        /// As an infinitive: `be cancelled`.
        what: &'static str,
        /// Its state.
        why: String,
    },
}

/// What the database allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest body of a command, as `oncebox.setting` has it.
    pub payload_bytes: usize,
}

/// What `event` makes of `saga` at the time `now`.
///
/// # Errors
///
/// When the event cannot be: the saga stays as it is. An event that comes too late is no error: its transition says
/// so in `changes.ignored`, and changes nothing but `seq`.
pub fn decide(
    saga: &Saga,
    definition: &Definition,
    event: &Event,
    now: Millis,
    limits: &Limits,
) -> Result<Transition, Refusal> {
    let same = |(step, defined): (&Step, &StepDefinition)| step.id == defined.id;
    if saga.steps.len() != definition.steps.len() || !saga.steps.iter().zip(&definition.steps).all(same) {
        return Err(Refusal::NotNow { what: "go on", why: "its steps are not those of its definition".into() });
    }
    let mut deciding = Deciding {
        before: saga,
        saga: saga.clone(),
        definition,
        now,
        limits,
        commands: Vec::new(),
        signals_taken: Vec::new(),
        ignored: None,
        over_limit: false,
        again: false,
    };
    deciding.apply(event)?;
    if deciding.ignored.is_none() {
        deciding.advance();
    }
    Ok(deciding.finish())
}

/// A transition in the making.
struct Deciding<'a> {
    before: &'a Saga,
    saga: Saga,
    definition: &'a Definition,
    now: Millis,
    limits: &'a Limits,
    commands: Vec<Command>,
    signals_taken: Vec<String>,
    ignored: Option<String>,
    /// A body was over the limit.
    over_limit: bool,
    /// Something is left for the next event, at once.
    again: bool,
}

impl Deciding<'_> {
    fn apply(&mut self, event: &Event) -> Result<(), Refusal> {
        match event {
            Event::Due {} => self.due(),
            Event::Reply { step, op, epoch, outcome, output, error } => {
                let answer = replies::Answer { outcome: *outcome, output: output.clone(), error: error.clone() };
                self.reply(self.place(step)?, *op, *epoch, answer)
            }
            Event::Signal { name, payload } => self.signal(name, payload.clone()),
            Event::Cancel(by) => self.cancel(by),
            Event::Pause(_) => self.pause(),
            Event::Resume(_) => self.resume(),
            Event::Retry(_) => self.retry(),
            Event::Terminate(by) => self.terminate(by),
            Event::RetryStep { step, .. } => self.retry_step(self.place(step)?),
            Event::SkipStep { step, .. } => self.skip_step(self.place(step)?),
            Event::ResolveStep { step, outcome, output, .. } => {
                self.resolve_step(self.place(step)?, *outcome, output.clone())
            }
            Event::Created { .. }
            | Event::Opened { .. }
            | Event::Enlisted { .. }
            | Event::Completed {}
            | Event::Aborted { .. } => {
                Err(Refusal::NotNow { what: "be moved so", why: "the database's own functions do that".into() })
            }
        }
    }

    fn place(&self, step: &str) -> Result<usize, Refusal> {
        let found = self.saga.steps.iter().position(|known| known.id == step);
        found.ok_or_else(|| Refusal::UnknownStep(step.to_owned()))
    }

    fn ignore(&mut self, why: impl Into<String>) -> Result<(), Refusal> {
        self.ignored = Some(why.into());
        Ok(())
    }

    fn status(&self, at: usize) -> StepStatus {
        self.saga.steps[at].status
    }

    /// Whether this event moved the step already.
    fn moved(&self, at: usize) -> bool {
        self.status(at) != self.before.steps[at].status
    }

    fn set(&mut self, at: usize, to: StepStatus, due_at: Option<Millis>) {
        let from = self.before.steps[at].status;
        debug_assert!(from == to || from.may_become(to), "step {at}: {from:?} -> {to:?}");
        self.saga.steps[at].status = to;
        self.saga.steps[at].due_at = due_at;
    }

    /// Moves the saga, unless this event did already: then the next one does.
    fn move_to(&mut self, to: SagaStatus) -> bool {
        if self.saga.status != self.before.status {
            self.again = true;
            return false;
        }
        debug_assert!(self.before.status.may_become(to, self.before.phase), "saga: {:?} -> {to:?}", self.before.status);
        self.saga.status = to;
        true
    }

    fn forward(&self) -> bool {
        self.saga.phase == Phase::Forward
    }

    fn pivot_done(&self) -> bool {
        self.definition.pivot().is_some_and(|pivot| self.status(pivot) == StepStatus::Succeeded)
    }

    fn is_after_pivot(&self, at: usize) -> bool {
        !self.definition.steps[at].pivot && self.definition.is_at_or_after_pivot(at)
    }

    /// `body` with its references replaced; an error when it is over the limit.
    fn body(&mut self, body: &Value) -> Result<Value, String> {
        let body = template::evaluate(body, &Scope::of(&self.saga));
        let (bytes, limit) = (printed_bytes(&body), self.limits.payload_bytes);
        if bytes <= limit {
            return Ok(body);
        }
        self.over_limit = true;
        Err(format!("the body of its command has {bytes} bytes, {limit} are allowed (setting payload_limit_bytes)"))
    }

    fn compensation(&mut self, at: usize, to: CompensationStatus) {
        if let Some(compensation) = &mut self.saga.steps[at].compensation {
            compensation.status = to;
        }
    }

    /// Whether there is something to undo, and nothing was sent for it yet.
    fn to_undo(&self, at: usize) -> bool {
        let open = |compensation: &Compensation| {
            matches!(compensation.status, CompensationStatus::Recorded | CompensationStatus::Ready)
        };
        self.saga.steps[at].compensation.as_ref().is_some_and(open)
    }

    fn finish(mut self) -> Transition {
        let before = self.before;
        self.saga.seq = before.seq + 1;
        let moved = |(old, new): (&Step, &Step)| {
            let same = (old.status, old.epoch, old.attempt) == (new.status, new.epoch, new.attempt);
            (!same).then(|| StepChange {
                step: new.id.clone(),
                from: old.status,
                to: new.status,
                epoch: new.epoch,
                attempt: new.attempt,
                error: new.error.clone().filter(|_| old.error != new.error),
            })
        };
        let changes = Changes {
            saga: (before.status != self.saga.status).then_some(Change { from: before.status, to: self.saga.status }),
            steps: before.steps.iter().zip(&self.saga.steps).filter_map(moved).collect(),
            ignored: self.ignored,
            payload_limit_bytes: self.over_limit.then_some(self.limits.payload_bytes),
        };
        Transition { saga: self.saga, changes, commands: self.commands, signals_taken: self.signals_taken }
    }
}

/// The length of a value as Postgres prints `jsonb`: with a blank behind each comma and colon.
fn printed_bytes(value: &Value) -> usize {
    match value {
        Value::Array(items) => 2 + items.iter().map(printed_bytes).sum::<usize>() + 2 * items.len().saturating_sub(1),
        Value::Object(fields) => {
            let entry = |(name, value): (&String, &Value)| quoted_bytes(name) + 2 + printed_bytes(value);
            2 + fields.iter().map(entry).sum::<usize>() + 2 * fields.len().saturating_sub(1)
        }
        Value::String(text) => quoted_bytes(text),
        other => other.to_string().len(),
    }
}

fn quoted_bytes(text: &str) -> usize {
    let escaped = |c: char| match c {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        c if c < ' ' => 6,
        c => c.len_utf8(),
    };
    2 + text.chars().map(escaped).sum::<usize>()
}
