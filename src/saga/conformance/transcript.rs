//! What was said and answered in a check, and what is to be thought of it. Pure.

use super::checks::{Check, Line, Want, word};
use super::{ConformanceOptions, Verdict};
use crate::message::Delivery;
use crate::saga::participant::CommandHeaders;
use crate::saga::state::{Op, Outcome};
use serde_json::Value;
use uuid::Uuid;

/// More replies than this to one saga of the kit are a storm: no check causes half as many.
const STORM: usize = 20;
/// Replies quoted in a finding.
const QUOTED: usize = 6;

/// One check's saga.
#[derive(Debug)]
pub struct Transcript {
    /// Its saga.
    pub saga: Uuid,
    /// What was sent.
    pub sent: Vec<Line>,
    /// What was waited for in vain.
    pub silent: Vec<(Op, i32)>,
    /// What was answered, in the order it came.
    pub heard: Vec<Heard>,
}

/// A reply.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// As it should be.
    Reply {
        /// What it answers.
        command: CommandHeaders,
        /// The answer.
        outcome: Outcome,
    },
    /// No orchestrator could read it: why.
    Wrong(String),
}

impl Heard {
    /// Reads a delivery of the reply topic; the saga it is of, if it says so at all.
    pub fn of(delivery: &Delivery) -> Option<(Uuid, Self)> {
        let by_key = delivery.key().and_then(|key| Uuid::parse_str(key).ok());
        let command = match CommandHeaders::of(&delivery.headers) {
            Ok(command) => command,
            Err(error) => {
                let named = delivery.headers.get("oncebox-saga").and_then(Value::as_str);
                let saga = named.and_then(|saga| Uuid::parse_str(saga).ok()).or(by_key)?;
                return Some((saga, Self::Wrong(error.to_string())));
            }
        };
        let saga = command.saga;
        if let Some(key) = delivery.key().filter(|_| by_key != Some(saga)) {
            let key: String = key.chars().take(40).collect();
            return Some((saga, Self::Wrong(format!("its key is \"{key}\", not the id of its saga"))));
        }
        Some(match outcome(&delivery.body, command.op) {
            Ok(outcome) => (saga, Self::Reply { command, outcome }),
            Err(why) => (saga, Self::Wrong(why)),
        })
    }
}

fn outcome(body: &[u8], op: Op) -> Result<Outcome, String> {
    let body: Value = serde_json::from_slice(body).map_err(|error| format!("its body is no JSON: {error}"))?;
    let said = body.get("outcome").ok_or("its body has no \"outcome\"")?;
    let outcome: Outcome = serde_json::from_value(said.clone()).map_err(|_| format!("its outcome is {said:.60}"))?;
    if outcome == Outcome::UndoNoop && op == Op::Do {
        return Err("it answers a do with undo_noop".to_owned());
    }
    match body.get("error") {
        None | Some(Value::Null | Value::String(_)) => Ok(outcome),
        Some(_) => Err("its error is no text".to_owned()),
    }
}

/// Whether nothing more is to come: a failed undo is tried again.
pub fn is_final(op: Op, outcome: Outcome) -> bool {
    match outcome {
        Outcome::Succeeded | Outcome::UndoNoop => true,
        Outcome::Failed => op == Op::Do,
        Outcome::Retry | Outcome::InProgress => false,
    }
}

impl Transcript {
    /// An empty one, of a fresh saga.
    pub fn new() -> Self {
        Self { saga: Uuid::now_v7(), sent: Vec::new(), silent: Vec::new(), heard: Vec::new() }
    }

    fn finals(&self, op: Op, epoch: i32) -> Vec<Outcome> {
        let of = |heard: &Heard| match heard {
            Heard::Reply { command, outcome } if (command.op, command.epoch) == (op, epoch) => Some(*outcome),
            _ => None,
        };
        self.heard.iter().filter_map(of).filter(|outcome| is_final(op, *outcome)).collect()
    }

    /// Epochs whose action succeeded, and whose undo was not asked for.
    pub fn to_undo(&self) -> Vec<i32> {
        let asked = |epoch| self.sent.iter().any(|line| (line.op, line.epoch) == (Op::Undo, epoch));
        (1..=2).filter(|epoch| self.finals(Op::Do, *epoch).contains(&Outcome::Succeeded) && !asked(*epoch)).collect()
    }

    /// Whether it was as it should be, and what was seen.
    pub fn judge(&self, check: &Check, options: &ConformanceOptions, has_failing_body: bool) -> (Verdict, String) {
        let mut wrong = self.unfit(&options.step);
        for (op, epoch) in &self.silent {
            wrong.push(format!("no reply to {op} in epoch {epoch} within {:?}", options.timeout));
        }
        wrong.extend(check.wants.iter().filter_map(|want| self.misses(*want, has_failing_body)));
        wrong.dedup();
        if wrong.is_empty() {
            return (Verdict::Pass, self.quote());
        }
        (Verdict::Fail, format!("{} (seen: {})", wrong.join("; "), self.quote()))
    }

    /// What no check allows.
    fn unfit(&self, step: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        for heard in self.heard.iter().take(STORM) {
            match heard {
                Heard::Wrong(why) => wrong.push(format!("a reply cannot be read: {why}")),
                Heard::Reply { command, .. } if command.step != step => {
                    wrong.push(format!("a reply names step \"{:.40}\", not \"{step}\"", command.step));
                }
                Heard::Reply { command: CommandHeaders { op, epoch, attempt, .. }, .. } => {
                    let of_it = || self.sent.iter().filter(|line| (line.op, line.epoch) == (*op, *epoch));
                    if of_it().next().is_none() {
                        wrong.push(format!("a reply to {op} in epoch {epoch}, which was never sent"));
                    } else if attempt.is_some_and(|attempt| of_it().all(|line| line.attempt != attempt)) {
                        let attempt = attempt.unwrap_or_default();
                        wrong.push(format!("a reply to attempt {attempt} of {op}, which was never sent"));
                    }
                }
            }
        }
        if self.heard.len() > STORM {
            wrong.push(format!("a storm: {} replies", self.heard.len()));
        }
        wrong.dedup();
        wrong
    }

    fn misses(&self, want: Want, has_failing_body: bool) -> Option<String> {
        let words = |outcomes: &[Outcome]| outcomes.iter().map(|outcome| word(*outcome)).collect::<Vec<_>>().join(", ");
        match want {
            Want::IfFailing(op, epoch, _) if !has_failing_body => {
                self.misses(Want::One(op, epoch, &[Outcome::Succeeded, Outcome::Failed]), true)
            }
            Want::One(op, epoch, allowed) | Want::IfFailing(op, epoch, allowed) => {
                let finals = self.finals(op, epoch);
                match finals[..] {
                    [one] if allowed.contains(&one) => None,
                    // Said already, as silence.
                    [] if self.silent.contains(&(op, epoch)) => None,
                    [] => Some(format!("no final reply to {op} in epoch {epoch}")),
                    [one] => Some(format!("{op} in epoch {epoch} was answered by {}", word(one))),
                    _ => Some(format!("{op} in epoch {epoch} has {} final replies: {}", finals.len(), words(&finals))),
                }
            }
            Want::NotDone(epoch) => {
                let done = self.finals(Op::Do, epoch).contains(&Outcome::Succeeded);
                done.then(|| "the do succeeded after its undo".to_owned())
            }
            Want::Refused(epoch) => match self.finals(Op::Do, epoch)[..] {
                [] | [Outcome::Failed] => None,
                [Outcome::Succeeded] => Some("it succeeded".to_owned()),
                ref finals => Some(format!("{} final replies: {}", finals.len(), words(finals))),
            },
            Want::Agree(epoch) => {
                let (done, undone) = (self.finals(Op::Do, epoch), self.finals(Op::Undo, epoch));
                match (&done[..], &undone[..]) {
                    ([Outcome::Succeeded], [Outcome::Succeeded]) | ([] | [Outcome::Failed], [Outcome::UndoNoop]) => {
                        None
                    }
                    (_, []) if self.silent.contains(&(Op::Undo, epoch)) => None,
                    _ => Some(format!("do: {}; undo: {}", or_nothing(words(&done)), or_nothing(words(&undone)))),
                }
            }
        }
    }

    fn quote(&self) -> String {
        let mut quoted: Vec<String> = self.heard.iter().take(QUOTED).map(quote).collect();
        if self.heard.len() > QUOTED {
            quoted.push(format!("and {} more", self.heard.len() - QUOTED));
        }
        or_nothing(quoted.join(", "))
    }
}

impl Default for Transcript {
    fn default() -> Self {
        Self::new()
    }
}

fn quote(heard: &Heard) -> String {
    match heard {
        Heard::Reply { command, outcome } if command.epoch == 1 => format!("{} {}", command.op, word(*outcome)),
        Heard::Reply { command, outcome } => format!("{} {} in epoch {}", command.op, word(*outcome), command.epoch),
        Heard::Wrong(_) => "something unreadable".to_owned(),
    }
}

fn or_nothing(words: String) -> String {
    if words.is_empty() { "nothing".to_owned() } else { words }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{Body, CHECKS, PLAIN};
    use super::*;
    use serde_json::json;
    use std::time::Duration;

    fn options() -> ConformanceOptions {
        ConformanceOptions {
            exchange: "oncebox".to_owned(),
            topic: "do".to_owned(),
            undo_topic: "undo".to_owned(),
            step: "s".to_owned(),
            body: json!({}),
            failing_body: None,
            timeout: Duration::from_secs(10),
        }
    }

    fn check(name: &str) -> &'static Check {
        CHECKS.iter().find(|check| check.name == name).expect(name)
    }

    fn delivery(changes: Value, body: Value, key: Option<&str>) -> Delivery {
        let saga = Uuid::from_u128(7);
        let headers = json!({"oncebox-saga": saga, "oncebox-step": "s", "oncebox-op": "do", "oncebox-epoch": 1,
            "oncebox-attempt": 1, "oncebox-key": saga});
        let mut headers = headers.as_object().expect("an object").clone();
        headers.extend(changes.as_object().expect("an object").clone());
        if let Some(key) = key {
            headers.insert("oncebox-key".to_owned(), json!(key));
        }
        Delivery {
            tag: 1,
            message_id: None,
            topic: CommandHeaders::REPLY_TOPIC.to_owned(),
            content_type: None,
            headers,
            body: serde_json::to_vec(&body).expect("JSON"),
            redelivered: false,
        }
    }

    fn reply(op: Op, epoch: i32, outcome: Outcome) -> Heard {
        let command =
            CommandHeaders { saga: Uuid::nil(), step: "s".to_owned(), op, epoch, attempt: None, deadline: None };
        Heard::Reply { command, outcome }
    }

    fn transcript(check: &Check, heard: Vec<Heard>) -> Transcript {
        Transcript { sent: check.script.to_vec(), heard, ..Transcript::new() }
    }

    fn verdict(name: &str, heard: Vec<Heard>) -> Verdict {
        let check = check(name);
        transcript(check, heard).judge(check, &options(), false).0
    }

    /// Goal: a reply that an orchestrator could not read is no reply, and why is said; one of nobody is passed over.
    #[test]
    fn replies_are_read_strictly() {
        let good = json!({"outcome": "succeeded", "output": {"id": 1}, "error": null});
        let read = |changes, body, key| Heard::of(&delivery(changes, body, key));
        let Some((saga, Heard::Reply { command, outcome })) = read(json!({}), good.clone(), None) else {
            panic!("a reply")
        };
        assert_eq!((saga, command.epoch, outcome), (Uuid::from_u128(7), 1, Outcome::Succeeded));
        for (changes, body, key, why) in [
            (json!({"oncebox-epoch": "one"}), good.clone(), None, "oncebox-epoch"),
            (json!({"oncebox-op": null}), good.clone(), None, "oncebox-op"),
            (json!({}), good.clone(), Some("order 7"), "key"),
            (json!({}), json!(["succeeded"]), None, "outcome"),
            (json!({}), json!({"outcome": "done"}), None, "done"),
            (json!({}), json!({"outcome": "undo_noop"}), None, "undo_noop"),
            (json!({}), json!({"outcome": "failed", "error": {"code": 1}}), None, "error"),
        ] {
            match read(changes, body, key) {
                Some((_, Heard::Wrong(text))) => assert!(text.contains(why), "{text}"),
                other => panic!("{why}: {other:?}"),
            }
        }
        assert_eq!(read(json!({"oncebox-saga": "?", "oncebox-key": "?"}), good, None), None);
    }

    /// Goal: what each check is made for makes it fail, and what it allows does not.
    #[test]
    fn checks_tell_right_from_wrong() {
        use Op::{Do, Undo};
        use Outcome::{Failed, InProgress, Retry, Succeeded, UndoNoop};
        use Verdict::{Fail, Pass};
        let twice = |outcome| vec![reply(Do, 1, outcome), reply(Do, 1, outcome)];
        for (name, heard, expected) in [
            ("plain_do", vec![], Fail),
            ("plain_do", vec![reply(Do, 1, Failed)], Fail),
            ("plain_do", vec![reply(Do, 1, InProgress), reply(Do, 1, Retry), reply(Do, 1, Succeeded)], Pass),
            ("plain_do", vec![reply(Do, 1, Succeeded), Heard::Wrong("x".to_owned())], Fail),
            ("plain_do", vec![reply(Do, 1, Succeeded), reply(Undo, 1, Succeeded)], Fail),
            ("do_twice", twice(Succeeded), Fail),
            ("undo_before_do", vec![reply(Undo, 1, UndoNoop)], Pass),
            ("undo_before_do", vec![reply(Undo, 1, UndoNoop), reply(Do, 1, Failed)], Pass),
            ("undo_before_do", vec![reply(Undo, 1, UndoNoop), reply(Do, 1, Succeeded)], Fail),
            ("undo_before_do", vec![reply(Undo, 1, Succeeded)], Fail),
            ("reordered", vec![reply(Do, 1, Succeeded), reply(Undo, 1, Succeeded)], Pass),
            ("reordered", vec![reply(Do, 1, Succeeded), reply(Undo, 1, UndoNoop)], Fail),
            ("reordered", vec![reply(Undo, 1, Succeeded)], Fail),
            ("reordered", vec![reply(Undo, 1, UndoNoop), reply(Undo, 1, Failed)], Pass),
            ("next_epoch", vec![reply(Do, 1, Failed), reply(Do, 2, Succeeded)], Pass),
            ("next_epoch", vec![reply(Do, 1, Failed), reply(Do, 1, Succeeded)], Fail),
            ("malformed_body", vec![], Pass),
            ("malformed_body", vec![reply(Do, 1, Failed)], Pass),
            ("malformed_body", vec![reply(Do, 1, Succeeded)], Fail),
            ("malformed_body", twice(Failed), Fail),
            ("malformed_body", vec![reply(Do, 1, Retry); STORM], Pass),
            ("malformed_body", vec![reply(Do, 1, Retry); STORM + 1], Fail),
        ] {
            assert_eq!(verdict(name, heard.clone()), expected, "{name}: {heard:?}");
        }
    }

    /// Goal: every script can be judged right: nothing it wants is about what it never sends, and only the last check
    /// sends what may jam a participant.
    #[test]
    fn checks_ask_for_what_they_send() {
        for (index, check) in CHECKS.iter().enumerate() {
            for want in check.wants {
                let (op, epoch) = match want {
                    Want::One(op, epoch, _) | Want::IfFailing(op, epoch, _) => (*op, *epoch),
                    Want::NotDone(epoch) | Want::Refused(epoch) | Want::Agree(epoch) => (Op::Do, *epoch),
                };
                assert!(check.script.iter().any(|line| (line.op, line.epoch) == (op, epoch)), "{}", check.name);
            }
            let jams = check.script.iter().any(|line| line.body == Body::Malformed);
            assert_eq!(jams, index + 1 == CHECKS.len(), "{}", check.name);
        }
        assert_eq!(CHECKS[0].script.len(), 1);
        assert!(PLAIN.waits && CHECKS[0].script[0].waits);
    }

    /// Goal: what was done and whose undo was not asked for is to be undone, and only that.
    #[test]
    fn what_is_left_done_is_known() {
        let done = |epoch| reply(Op::Do, epoch, Outcome::Succeeded);
        assert_eq!(transcript(check("do_twice"), vec![done(1)]).to_undo(), [1]);
        assert_eq!(transcript(check("next_epoch"), vec![done(1), done(2)]).to_undo(), [1, 2]);
        assert!(transcript(check("do_undo"), vec![done(1)]).to_undo().is_empty());
        assert!(transcript(check("do_twice"), vec![]).to_undo().is_empty());
    }
}
