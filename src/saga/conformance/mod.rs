//! Does a participant keep to the rules of sagas? `kit → broker → participant → its outbox → broker → kit`.
//!
//! [`run`] sends commands as an orchestrator does, but twice, late and in the wrong order, each [`checks`] for a saga of its
//! own that nobody else knows, and judges what the participant says ([`transcript`]). It needs the broker alone: neither
//! the participant's database nor an orchestrator. What the participant did is undone afterwards as far as it says it can
//! be. Left out on purpose: crashes in the middle of the work, which nobody can cause from outside.

pub mod checks;
mod talk;
pub mod transcript;

use super::state::Op;
use crate::broker::{Broker, BrokerError};
use checks::{CHECKS, Check, Line};
use serde::Serialize;
use serde_json::Value;
use std::time::Duration;
use talk::Talk;
use transcript::Transcript;

/// After the last answer, for what should not come. A participant that answers what it should not does so when it
/// handles the message, and others after it were answered by then.
const QUIET: Duration = Duration::from_secs(1);

/// What is to be checked, and how.
#[derive(Debug, Clone)]
pub struct ConformanceOptions {
    /// Topic exchange of commands and replies.
    pub exchange: String,
    /// Where the step's command goes.
    pub topic: String,
    /// Where the command goes that undoes it.
    pub undo_topic: String,
    /// The step, as the participant is told.
    pub step: String,
    /// Body of both commands: one the participant succeeds with.
    pub body: Value,
    /// A body that it answers `failed` to, if there is one.
    pub failing_body: Option<Value>,
    /// How long a reply is waited for.
    pub timeout: Duration,
}

/// Why the checks could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConformanceError {
    /// Nothing would get the command.
    #[error(
        "no queue is bound to the exchange \"{exchange}\" for the topic \"{topic}\": start the participant, or bind its queue"
    )]
    Unroutable {
        /// The exchange.
        exchange: String,
        /// The topic.
        topic: String,
    },
    /// The participant's queue takes no more.
    #[error("the broker refuses messages for the topic \"{0}\": is the participant's queue full?")]
    Refused(String),
    /// The broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// What became of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Pass,
    /// Not so.
    Fail,
    /// Not made, since the participant says nothing at all.
    Skipped,
}

/// One check, and what it found.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// Name of the check.
    pub check: &'static str,
    /// What was sent.
    pub sent: &'static str,
    /// What became of it.
    pub verdict: Verdict,
    /// What a participant should say.
    pub expected: String,
    /// What this one said; if that was wrong, in which way.
    pub seen: String,
}

/// What all checks found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Every check passed.
    pub conforms: bool,
    /// Each check, in the order they were made.
    pub findings: Vec<Finding>,
    /// Actions of the checks that the participant did and has not said to have undone.
    pub left_done: usize,
}

/// Makes every check, one after the other; takes a few seconds if every reply comes at once, and at most one `timeout` a
/// check more.
///
/// # Errors
/// [`ConformanceError`]: the checks could not be made. A participant that says nothing is no error but a finding.
pub async fn run<B: Broker>(broker: &B, options: &ConformanceOptions) -> Result<Report, ConformanceError> {
    let mut talk = Talk::open(broker, options.clone()).await?;
    let report = converse(&mut talk, options).await;
    talk.close().await;
    report
}

async fn converse<B: Broker>(talk: &mut Talk<B>, options: &ConformanceOptions) -> Result<Report, ConformanceError> {
    let mut transcripts = Vec::new();
    for check in CHECKS {
        let transcript = play(talk, check).await?;
        let is_mute = transcripts.is_empty() && talk.heard(&transcript).is_empty();
        transcripts.push(transcript);
        if is_mute {
            break;
        }
    }
    // What is answered last: by then whatever came before has been handled.
    let mut probe = Transcript::new();
    if transcripts.len() == CHECKS.len() {
        talk.ask(&mut probe, &checks::PLAIN).await?;
        talk.listen_for(QUIET).await?;
    }
    for transcript in transcripts.iter_mut().chain([&mut probe]) {
        transcript.heard = talk.heard(transcript).to_vec();
    }
    let has_failing_body = options.failing_body.is_some();
    let mut findings: Vec<Finding> = CHECKS
        .iter()
        .enumerate()
        .map(|(index, check)| {
            let expected = check.expected(has_failing_body);
            let (verdict, seen) = match transcripts.get(index) {
                Some(transcript) => transcript.judge(check, options, has_failing_body),
                None => (Verdict::Skipped, "not made: the participant answered nothing".to_owned()),
            };
            Finding { check: check.name, sent: check.sent, verdict, expected, seen }
        })
        .collect();
    if let Some(last) = findings.last_mut().filter(|last| last.verdict == Verdict::Pass)
        && !probe.silent.is_empty()
    {
        last.verdict = Verdict::Fail;
        last.seen = format!("then no reply to anything within {:?}", options.timeout);
    }
    transcripts.push(probe);
    let left_done = undo(talk, &mut transcripts).await?;
    let conforms = findings.iter().all(|finding| finding.verdict == Verdict::Pass);
    Ok(Report { conforms, findings, left_done })
}

/// Says a check's lines, and waits where it says so; not again once the participant was silent.
async fn play<B: Broker>(talk: &mut Talk<B>, check: &Check) -> Result<Transcript, ConformanceError> {
    let mut transcript = Transcript::new();
    for line in check.script {
        if line.waits && transcript.silent.is_empty() {
            talk.ask(&mut transcript, line).await?;
        } else {
            talk.say(&mut transcript, line).await?;
        }
    }
    Ok(transcript)
}

/// Has undone what succeeded and was not undone; how much of it was not.
async fn undo<B: Broker>(talk: &mut Talk<B>, transcripts: &mut [Transcript]) -> Result<usize, ConformanceError> {
    let mut left = 0;
    for transcript in transcripts {
        for epoch in transcript.to_undo() {
            let line = Line { op: Op::Undo, epoch, waits: true, ..checks::PLAIN };
            let is_undone = transcript.silent.is_empty() && talk.ask(transcript, &line).await?;
            left += usize::from(!is_undone);
        }
    }
    Ok(left)
}
