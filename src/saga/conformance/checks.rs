//! What is sent in each check, and what a participant should answer.

use crate::saga::state::{Op, Outcome};
use Outcome::{Failed, Succeeded, UndoNoop};

/// What a command carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// What the participant succeeds with.
    Good,
    /// What it answers `failed` to; a good one if none is known.
    Failing,
    /// No JSON.
    Malformed,
}

/// A command of a script.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    /// What it asks for.
    pub op: Op,
    /// Its epoch.
    pub epoch: i32,
    /// Its attempt.
    pub attempt: i32,
    /// The same attempt again: the same message, delivered twice.
    pub is_copy: bool,
    /// What it carries.
    pub body: Body,
    /// Whether a final reply is waited for.
    pub waits: bool,
}

/// What the replies of a check's saga must be.
#[derive(Debug, Clone, Copy)]
pub enum Want {
    /// Exactly one final reply to this op and epoch, one of these.
    One(Op, i32, &'static [Outcome]),
    /// As [`One`](Self::One), if a failing body is known; else succeeded or failed.
    IfFailing(Op, i32, &'static [Outcome]),
    /// None that says it was done, in this epoch.
    NotDone(i32),
    /// At most one final reply, and none that says it was done.
    Refused(i32),
    /// Either both do and undo succeeded, or the do had no success and the undo found nothing: one reply each at most.
    Agree(i32),
}

/// A check: a saga of its own.
#[derive(Debug)]
pub struct Check {
    /// Its name, in reports.
    pub name: &'static str,
    /// What is sent, in words.
    pub sent: &'static str,
    /// What is sent.
    pub script: &'static [Line],
    /// What must come.
    pub wants: &'static [Want],
}

/// The step's command for the first time, with its reply waited for.
pub const PLAIN: Line = Line { op: Op::Do, epoch: 1, attempt: 1, is_copy: false, body: Body::Good, waits: true };
const UNDO: Line = Line { op: Op::Undo, ..PLAIN };
/// The same message once more.
const COPY: Line = Line { is_copy: true, waits: false, ..PLAIN };
/// Another attempt, not waited for.
const AGAIN: Line = Line { attempt: 2, waits: false, ..PLAIN };

const DONE: Want = Want::One(Op::Do, 1, &[Succeeded]);
const UNDONE: Want = Want::One(Op::Undo, 1, &[Succeeded]);
const NOTHING_TO_UNDO: Want = Want::One(Op::Undo, 1, &[UndoNoop]);

/// Every check, in the order they are made. What may jam a participant comes last.
pub const CHECKS: &[Check] = &[
    Check { name: "plain_do", sent: "do", script: &[PLAIN], wants: &[DONE] },
    Check {
        name: "do_twice",
        sent: "do; the same message again; another attempt",
        script: &[PLAIN, COPY, AGAIN],
        wants: &[DONE],
    },
    Check {
        name: "do_twins",
        sent: "two attempts of do at once",
        script: &[Line { waits: false, ..PLAIN }, Line { waits: true, ..AGAIN }],
        wants: &[DONE],
    },
    Check { name: "do_undo", sent: "do; undo", script: &[PLAIN, UNDO], wants: &[DONE, UNDONE] },
    Check {
        name: "undo_before_do",
        sent: "undo; then the do",
        script: &[UNDO, Line { waits: false, ..PLAIN }],
        wants: &[NOTHING_TO_UNDO, Want::NotDone(1)],
    },
    Check {
        name: "undo_twice",
        sent: "do; undo; the same undo again; another attempt of it",
        script: &[PLAIN, UNDO, Line { op: Op::Undo, ..COPY }, Line { op: Op::Undo, ..AGAIN }],
        wants: &[DONE, UNDONE],
    },
    Check {
        name: "reordered",
        sent: "undo, do and another attempt of the undo at once",
        script: &[
            Line { waits: false, ..UNDO },
            Line { waits: false, ..PLAIN },
            Line { op: Op::Undo, waits: true, ..AGAIN },
        ],
        wants: &[Want::Agree(1)],
    },
    Check {
        name: "late_do",
        sent: "do; undo; another attempt of the do",
        script: &[PLAIN, UNDO, AGAIN],
        wants: &[DONE, UNDONE],
    },
    Check {
        name: "next_epoch",
        sent: "do with the failing body, if there is one; do in epoch 2; a late attempt of epoch 1",
        script: &[
            Line { body: Body::Failing, ..PLAIN },
            Line { epoch: 2, ..PLAIN },
            Line { body: Body::Failing, ..AGAIN },
        ],
        wants: &[Want::IfFailing(Op::Do, 1, &[Failed]), Want::IfFailing(Op::Do, 2, &[Succeeded])],
    },
    Check {
        name: "malformed_body",
        sent: "do with a body that is no JSON; then a plain do of another saga",
        script: &[Line { body: Body::Malformed, waits: false, ..PLAIN }],
        wants: &[Want::Refused(1)],
    },
];

impl Want {
    fn words(self, has_failing_body: bool) -> String {
        let either =
            |outcomes: &[Outcome]| outcomes.iter().map(|outcome| word(*outcome)).collect::<Vec<_>>().join(" or ");
        match self {
            Self::IfFailing(op, epoch, _) if !has_failing_body => {
                Self::One(op, epoch, &[Succeeded, Failed]).words(true)
            }
            Self::One(op, epoch, outcomes) | Self::IfFailing(op, epoch, outcomes) => {
                let epoch = if epoch == 1 { String::new() } else { format!(" in epoch {epoch}") };
                format!("{op}{epoch}: one final reply, {}", either(outcomes))
            }
            Self::NotDone(_) => "do: none that succeeded".to_owned(),
            Self::Refused(_) => "do: failed, or nothing (parked)".to_owned(),
            Self::Agree(_) => "do and undo succeeded, or undo found nothing to undo and do did not succeed".to_owned(),
        }
    }
}

impl Check {
    /// What must come, in words.
    pub fn expected(&self, has_failing_body: bool) -> String {
        self.wants.iter().map(|want| want.words(has_failing_body)).collect::<Vec<_>>().join("; ")
    }
}

/// As on the wire.
pub fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Succeeded => "succeeded",
        Failed => "failed",
        Outcome::Retry => "retry",
        Outcome::InProgress => "in_progress",
        UndoNoop => "undo_noop",
    }
}
