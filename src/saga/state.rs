//! What a saga is at one moment, as data: read from the tables, decided upon, written back.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;
use utoipa::ToSchema;
use uuid::Uuid;

/// A time in milliseconds since the Unix epoch, by the clock of the saga's database.
pub type Millis = i64;

/// Where a saga stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SagaStatus {
    /// Not begun: it has a time, or no orchestrator has seen it yet.
    Scheduled,
    /// On its way forward.
    Running,
    /// Every step succeeded or was skipped.
    Completed,
    /// On its way back.
    Compensating,
    /// What had been done is undone.
    Compensated,
    /// Cancelled before it began.
    Cancelled,
    /// It needs an operator.
    Stuck,
    /// An operator gave it up as it stands.
    Terminated,
}

impl SagaStatus {
    /// Every status.
    pub const ALL: [Self; 8] = [
        Self::Scheduled,
        Self::Running,
        Self::Completed,
        Self::Compensating,
        Self::Compensated,
        Self::Cancelled,
        Self::Stuck,
        Self::Terminated,
    ];

    /// Nothing will change any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Compensated | Self::Cancelled | Self::Terminated)
    }

    /// Whether one transaction may move a saga from here to `to`; `phase` is the one it is in before. The database's
    /// trigger says the same. Whether the pivot forbids it is not asked here.
    pub fn may_become(self, to: Self, phase: Phase) -> bool {
        match (self, to) {
            (Self::Scheduled, Self::Running | Self::Cancelled)
            | (Self::Running, Self::Completed | Self::Compensating | Self::Stuck)
            | (Self::Compensating, Self::Compensated | Self::Stuck)
            | (Self::Stuck, Self::Terminated) => true,
            (Self::Stuck, Self::Running) => phase == Phase::Forward,
            (Self::Stuck, Self::Compensating) => phase == Phase::Backward,
            _ => false,
        }
    }

    /// As in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Compensating => "compensating",
            Self::Compensated => "compensated",
            Self::Cancelled => "cancelled",
            Self::Stuck => "stuck",
            Self::Terminated => "terminated",
        }
    }
}

/// Which way a saga goes; a stuck one goes on this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Steps are done.
    Forward,
    /// Steps are undone.
    Backward,
}

/// Where a step stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepStatus {
    /// Its turn has not come.
    Pending,
    /// Its command is out, or it waits for its signal.
    Dispatched,
    /// It will not run: an operator said so, or the saga turned back before its turn came.
    Skipped,
    /// Done.
    Succeeded,
    /// Not done, for good: nothing of it happened.
    Failed,
    /// Its next attempt has a time. It may have run.
    Backoff,
    /// Its attempts are used up without a final answer. It may have run.
    Unknown,
    /// The command that undoes it is out.
    Undoing,
    /// Undone.
    Undone,
    /// Undone, and there was nothing to undo: it had never run, and never will.
    UndoNoop,
    /// The next attempt to undo it has a time.
    UndoBackoff,
    /// The attempts to undo it are used up: an operator is needed.
    UndoStuck,
    /// An operator, or its definition, gave up undoing it.
    UndoSkipped,
}

impl StepStatus {
    /// Every status.
    pub const ALL: [Self; 13] = [
        Self::Pending,
        Self::Dispatched,
        Self::Skipped,
        Self::Succeeded,
        Self::Failed,
        Self::Backoff,
        Self::Unknown,
        Self::Undoing,
        Self::Undone,
        Self::UndoNoop,
        Self::UndoBackoff,
        Self::UndoStuck,
        Self::UndoSkipped,
    ];

    /// Whether one transaction may move a step from here to `to`. The database's trigger says the same.
    pub fn may_become(self, to: Self) -> bool {
        use StepStatus::*;
        match self {
            // Failed: its command cannot be made, as when its body is over the limit.
            Pending => matches!(to, Dispatched | Skipped | Failed),
            Dispatched => matches!(to, Succeeded | Failed | Backoff | Unknown),
            // A late answer to an earlier attempt counts: the barrier answers no later one again.
            Backoff => matches!(to, Dispatched | Succeeded | Failed | Unknown | Undoing | UndoStuck),
            Unknown => matches!(to, Backoff | Succeeded | Failed | Undoing | UndoStuck),
            Failed => matches!(to, Dispatched | Skipped | Succeeded),
            Succeeded => matches!(to, Undoing | UndoStuck),
            Undoing => matches!(to, Undone | UndoNoop | UndoBackoff | UndoStuck | UndoSkipped),
            // A late answer to an earlier attempt counts here too.
            UndoBackoff => matches!(to, Undoing | Undone | UndoNoop),
            UndoStuck => matches!(to, Undoing | Undone | UndoNoop | UndoSkipped),
            Skipped | Undone | UndoNoop | UndoSkipped => false,
        }
    }

    /// As in the database.
    pub fn as_str(self) -> &'static str {
        use StepStatus::*;
        match self {
            Pending => "pending",
            Dispatched => "dispatched",
            Skipped => "skipped",
            Succeeded => "succeeded",
            Failed => "failed",
            Backoff => "backoff",
            Unknown => "unknown",
            Undoing => "undoing",
            Undone => "undone",
            UndoNoop => "undo_noop",
            UndoBackoff => "undo_backoff",
            UndoStuck => "undo_stuck",
            UndoSkipped => "undo_skipped",
        }
    }
}

/// Where the record of a compensation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CompensationStatus {
    /// The step's command is out, the body waits for its reply.
    Recorded,
    /// The body is complete.
    Ready,
    /// The command that undoes is out.
    Sent,
    /// Undone.
    Undone,
    /// There was nothing to undo.
    Noop,
    /// The attempts are used up.
    Stuck,
    /// Given up.
    Skipped,
    /// Never needed: the saga completed, or the step failed.
    Released,
}

impl CompensationStatus {
    /// Every status.
    pub const ALL: [Self; 8] =
        [Self::Recorded, Self::Ready, Self::Sent, Self::Undone, Self::Noop, Self::Stuck, Self::Skipped, Self::Released];

    /// Whether one transaction may move a record from here to `to`. The database's trigger says the same.
    pub fn may_become(self, to: Self) -> bool {
        use CompensationStatus::*;
        match self {
            Recorded => matches!(to, Ready | Sent | Stuck | Released),
            Ready => matches!(to, Sent | Released),
            Sent => matches!(to, Undone | Noop | Stuck | Skipped),
            Stuck => matches!(to, Sent | Undone | Noop | Skipped),
            Undone | Noop | Skipped | Released => false,
        }
    }

    /// As in the database.
    pub fn as_str(self) -> &'static str {
        use CompensationStatus::*;
        match self {
            Recorded => "recorded",
            Ready => "ready",
            Sent => "sent",
            Undone => "undone",
            Noop => "noop",
            Stuck => "stuck",
            Skipped => "skipped",
            Released => "released",
        }
    }
}

/// What a command asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// The step's work.
    Do,
    /// What undoes it.
    Undo,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Do => "do",
            Self::Undo => "undo",
        })
    }
}

/// A saga and its steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Saga {
    /// Its id, a UUIDv7.
    pub id: Uuid,
    /// Name and version of its definition; none when it was opened without one.
    pub definition: Option<(String, i32)>,
    /// Unique for its definition.
    pub business_key: String,
    /// Where it stands.
    pub status: SagaStatus,
    /// Which way it goes.
    pub phase: Phase,
    /// An operator holds it: nothing new is sent, what comes in is recorded.
    pub paused: bool,
    /// Why it is to be cancelled, while that waits for the pivot's outcome.
    pub cancel: Option<String>,
    /// Why it turned back or needs an operator.
    pub reason: Option<String>,
    /// Of its newest history row.
    pub seq: i64,
    /// What it was started with.
    pub input: Value,
    /// What it can be found by.
    pub labels: Map<String, Value>,
    /// When it begins.
    pub start_at: Millis,
    /// When it turns back unless its pivot is done.
    pub deadline: Option<Millis>,
    /// When the orchestrator must look at it.
    pub next_due: Option<Millis>,
    /// In the order of the definition.
    pub steps: Vec<Step>,
    /// Signals that came before their step waited.
    pub signals: Vec<Signal>,
}

/// A step of a saga.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Its id in the definition.
    pub id: String,
    /// Where it stands.
    pub status: StepStatus,
    /// 0: never dispatched. Rises when a step that failed for good runs again.
    pub epoch: i32,
    /// Commands sent for the present op, since an operator last asked for it.
    pub attempt: i32,
    /// The newest command.
    pub message_id: Option<Uuid>,
    /// End of the wait for a reply, or time of the next attempt.
    pub due_at: Option<Millis>,
    /// What its reply said.
    pub output: Option<Value>,
    /// Why it failed, or the last attempt did.
    pub error: Option<String>,
    /// How it is undone, once its command is out.
    pub compensation: Option<Compensation>,
}

/// The record of how a step is undone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Compensation {
    /// Where the command goes.
    pub topic: String,
    /// Its body; none until the step's reply is there.
    pub payload: Option<Value>,
    /// Where it stands.
    pub status: CompensationStatus,
}

/// A signal that no step has taken yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Signal {
    /// What steps wait for.
    pub name: String,
    /// Becomes the step's output.
    pub payload: Option<Value>,
}

/// What a participant says of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done.
    Succeeded,
    /// Not done, for good.
    Failed,
    /// Not done; try again.
    Retry,
    /// Still at it: wait on.
    InProgress,
    /// Said by the barrier: the step had never run, there was nothing to undo.
    UndoNoop,
}

/// Who asks for something, and why: kept in the history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operator {
    /// Name of the token, or of the person at the command line.
    pub who: String,
    /// Their words.
    pub why: String,
}

/// What happens to a saga. A history row holds one, as `event` and `detail`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", content = "detail", rename_all = "snake_case")]
pub enum Event {
    /// By `saga_start`: the row was made, with its steps pending.
    Created {
        /// What it was started with.
        input: Value,
        /// What it can be found by.
        labels: Map<String, Value>,
        /// When it begins.
        start_at: Millis,
        /// When it turns back.
        deadline: Option<Millis>,
    },
    /// By `saga_open`: made without a definition, and running.
    Opened {
        /// When it turns back.
        deadline: Option<Millis>,
    },
    /// By `saga_compensate_with`: a step was done, and is undone so.
    Enlisted {
        /// Its id.
        step: String,
        /// Where the compensation goes.
        topic: String,
        /// Its body.
        payload: Value,
    },
    /// By `saga_complete`.
    Completed {},
    /// By `saga_abort`.
    Aborted {
        /// Why.
        reason: String,
    },
    /// A time has come: start, end of a wait, next attempt or deadline.
    Due {},
    /// A participant answered.
    Reply {
        /// Which step.
        step: String,
        /// Which command of it.
        op: Op,
        /// Which epoch.
        epoch: i32,
        /// The answer.
        outcome: Outcome,
        /// What the step gave.
        output: Option<Value>,
        /// Why it failed.
        error: Option<String>,
    },
    /// Somebody sent a signal.
    Signal {
        /// Its name.
        name: String,
        /// What it carries.
        payload: Option<Value>,
    },
    /// Turn back.
    Cancel(Operator),
    /// Send nothing new.
    Pause(Operator),
    /// Go on.
    Resume(Operator),
    /// Try every stuck step again.
    Retry(Operator),
    /// Give up a stuck saga as it stands.
    Terminate(Operator),
    /// Try a stuck step again.
    RetryStep {
        /// Which step.
        step: String,
        /// By whom.
        #[serde(flatten)]
        by: Operator,
    },
    /// Go on without a failed step, or without undoing a stuck one.
    SkipStep {
        /// Which step.
        step: String,
        /// By whom.
        #[serde(flatten)]
        by: Operator,
    },
    /// Say what became of a stuck step.
    ResolveStep {
        /// Which step.
        step: String,
        /// `Succeeded` or `Failed`; for a stuck undo `Succeeded` alone.
        outcome: Outcome,
        /// What the step gave.
        output: Option<Value>,
        /// By whom.
        #[serde(flatten)]
        by: Operator,
    },
}

/// A command to be published: the store gives it an id and puts it into the outbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// Which step.
    pub step: String,
    /// The step's work, or what undoes it.
    pub op: Op,
    /// Which epoch.
    pub epoch: i32,
    /// Which attempt of it, from 1.
    pub attempt: i32,
    /// Where it goes.
    pub topic: String,
    /// Its body.
    pub body: Value,
    /// Until when the saga waits for the reply.
    pub deadline: Millis,
}
