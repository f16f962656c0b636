//! Goal: the rules by which a saga moves, one test each. No servers.

use oncebox::saga::decide::{Action, Limits, Refusal, Transition, allowed_actions, allowed_step_actions, decide};
use oncebox::saga::definition::{CommandTemplate, Definition, Jitter, OnExhausted, Retry, StepDefinition, Work};
use oncebox::saga::fold::{self, FoldError, Origin, Past};
use oncebox::saga::state::{
    CompensationStatus, Event, Millis, Op, Operator, Outcome, Phase, Saga, SagaStatus, StepStatus,
};
use serde_json::{Map, Value, json};
use uuid::Uuid;

const RETRY: Retry = Retry { max: 2, initial_ms: 100, factor: 2.0, cap_ms: 1_000, jitter: Jitter::None };
const TIMEOUT_MS: i64 = 1_000;

/// A step that can be undone, after the one before it.
fn step(place: usize) -> StepDefinition {
    let id = ["a", "b", "c", "d"][place].to_owned();
    StepDefinition {
        after: place.checked_sub(1).into_iter().collect(),
        work: Work::Command(CommandTemplate { topic: format!("{id}.do"), body: json!({"key": "$.business_key"}) }),
        pivot: false,
        timeout_ms: TIMEOUT_MS,
        retry: RETRY,
        undo: Some(CommandTemplate {
            topic: format!("{id}.undo"),
            body: json!({"of": format!("$.steps.{id}.output")}),
        }),
        undo_retry: RETRY,
        on_undo_exhausted: OnExhausted::Stuck,
        id,
    }
}

fn list(steps: usize) -> Definition {
    Definition { name: "d".into(), version: 1, deadline_ms: None, steps: (0..steps).map(step).collect() }
}

/// `a`, then the pivot `b`, then `c`.
fn with_pivot() -> Definition {
    let mut definition = list(3);
    definition.steps[1].pivot = true;
    definition.steps[1].undo = None;
    definition.steps[2].undo = None;
    definition
}

/// A saga that is played through; its clock stands at `now`.
struct Play {
    saga: Saga,
    definition: Definition,
    now: Millis,
    limits: Limits,
    last: Option<Transition>,
}

fn by() -> Operator {
    Operator { who: "op".into(), why: "because".into() }
}

impl Play {
    fn scheduled(definition: Definition, deadline: Option<Millis>) -> Self {
        let origin = Origin { id: Uuid::from_u128(1), definition: Some(("d".into(), 1)), business_key: "key".into() };
        let event = Event::Created { input: json!({}), labels: Map::new(), start_at: 0, deadline };
        let first = Past { seq: 1, at: 0, event, payload_limit_bytes: None };
        let saga = fold::initial(&origin, Some(&definition), &first).unwrap();
        Self { saga, definition, now: 0, limits: Limits { payload_bytes: 1_000 }, last: None }
    }

    fn running(definition: Definition) -> Self {
        let mut play = Self::scheduled(definition, None);
        play.due();
        play
    }

    fn decide(&self, event: &Event) -> Result<Transition, Refusal> {
        decide(&self.saga, &self.definition, event, self.now, &self.limits)
    }

    fn on(&mut self, event: Event) -> &mut Self {
        let transition = self.decide(&event).unwrap_or_else(|refusal| panic!("{event:?}: {refusal}"));
        self.saga = transition.saga.clone();
        self.last = Some(transition);
        self
    }

    /// Lets time pass until something is due, and it happens.
    fn due(&mut self) -> &mut Self {
        self.now = self.now.max(self.saga.next_due.expect("something is due"));
        self.on(Event::Due {})
    }

    fn says(&mut self, step: &str, op: Op, outcome: Outcome) -> &mut Self {
        let epoch = self.saga.steps.iter().find(|known| known.id == step).expect("a step").epoch;
        self.on(reply(step, op, epoch, outcome))
    }

    fn done(&mut self, step: &str) -> &mut Self {
        self.says(step, Op::Do, Outcome::Succeeded)
    }

    fn undone(&mut self, step: &str) -> &mut Self {
        self.says(step, Op::Undo, Outcome::Succeeded)
    }

    fn steps(&self) -> Vec<StepStatus> {
        self.saga.steps.iter().map(|step| step.status).collect()
    }

    /// Commands of the last event, as `a.do 1.1`.
    fn sent(&self) -> Vec<String> {
        let commands = &self.last.as_ref().expect("an event").commands;
        commands.iter().map(|sent| format!("{} {}.{}", sent.topic, sent.epoch, sent.attempt)).collect()
    }

    fn ignored(&self) -> bool {
        self.last.as_ref().expect("an event").changes.ignored.is_some()
    }

    #[track_caller]
    fn is(&self, status: SagaStatus, steps: &[StepStatus], sent: &[&str]) {
        assert_eq!((self.saga.status, self.steps()), (status, steps.to_vec()));
        assert_eq!(self.sent(), sent);
    }

    #[track_caller]
    fn refuses(&self, event: Event) {
        assert!(matches!(self.decide(&event), Err(Refusal::NotNow { .. })), "{event:?} in {:?}", self.saga.status);
    }
}

fn reply(step: &str, op: Op, epoch: i32, outcome: Outcome) -> Event {
    let output = (outcome == Outcome::Succeeded).then(|| json!(format!("out of {step}")));
    Event::Reply { step: step.into(), op, epoch, outcome, output, error: None }
}

fn resolve(step: &str, outcome: Outcome) -> Event {
    Event::ResolveStep { step: step.into(), outcome, output: None, by: by() }
}

use SagaStatus::{Cancelled, Compensated, Compensating, Completed, Running, Stuck, Terminated};
use StepStatus::{
    Backoff, Dispatched, Failed, Pending, Skipped, Succeeded, UndoBackoff, UndoNoop, UndoSkipped, UndoStuck, Undoing,
    Undone, Unknown,
};

/// Goal: each step's command goes out when those before it are done, with its timeout and its own compensation.
#[test]
fn steps_are_done_in_order() {
    let mut play = Play::scheduled(list(2), None);
    assert_eq!(play.saga.next_due, Some(0));
    play.due().is(Running, &[Dispatched, Pending], &["a.do 1.1"]);
    assert_eq!(play.saga.next_due, Some(TIMEOUT_MS));
    let compensation = play.saga.steps[0].compensation.clone().unwrap();
    assert_eq!((compensation.status, compensation.payload), (CompensationStatus::Recorded, None));
    play.done("a").is(Running, &[Succeeded, Dispatched], &["b.do 1.1"]);
    let compensation = play.saga.steps[0].compensation.clone().unwrap();
    let payload = Some(json!({"of": "out of a"}));
    assert_eq!((compensation.status, compensation.payload), (CompensationStatus::Ready, payload));
    play.done("b").is(Completed, &[Succeeded, Succeeded], &[]);
    assert_eq!(play.saga.next_due, None);
    let released = |step: &oncebox::saga::state::Step| step.compensation.as_ref().unwrap().status;
    assert!(play.saga.steps.iter().map(released).all(|status| status == CompensationStatus::Released));
}

/// Goal: a timer before its time is refused, not noted; so is one of a saga that waits for nothing.
#[test]
fn what_is_not_due_is_refused() {
    let mut play = Play::running(list(1));
    play.refuses(Event::Due {});
    play.done("a");
    play.now = 1_000_000;
    play.refuses(Event::Due {});
}

/// Goal: without an answer a command goes out again after a growing delay; then it may have run, and is undone.
#[test]
fn a_command_is_tried_again_and_then_undone() {
    let mut play = Play::running(list(2));
    play.done("a").due().is(Running, &[Succeeded, Backoff], &[]);
    assert_eq!(play.saga.next_due, Some(play.now + 100));
    play.due().is(Running, &[Succeeded, Dispatched], &["b.do 1.2"]);
    // The unknown step changed in this event, so its undo follows in the next, and that of what was before it then.
    play.due().is(Compensating, &[Succeeded, Unknown], &[]);
    assert_eq!(play.saga.next_due, Some(play.now));
    play.due().is(Compensating, &[Succeeded, Undoing], &["b.undo 1.1"]);
    assert_eq!(play.last.as_ref().unwrap().commands[0].body, json!({"of": Value::Null}));
    play.says("b", Op::Undo, Outcome::UndoNoop).is(Compensating, &[Undoing, UndoNoop], &["a.undo 1.1"]);
    play.undone("a").is(Compensated, &[Undone, UndoNoop], &[]);
}

/// Goal: a late answer to an earlier attempt counts: the barrier gives no other.
#[test]
fn late_answers_count() {
    for (attempts, late) in [(1, Backoff), (2, Unknown)] {
        let mut play = Play::running(with_pivot());
        play.done("a");
        for _ in 0..attempts {
            play.says("b", Op::Do, Outcome::Retry);
            if play.steps()[1] == Backoff && attempts == 2 {
                play.due();
            }
        }
        assert_eq!(play.steps()[1], late);
        play.done("b").is(Running, &[Succeeded, Succeeded, Dispatched], &["c.do 1.1"]);
    }
}

/// Goal: a step that failed is not undone, those before it are; why is kept.
#[test]
fn a_failure_turns_the_saga_back() {
    let mut play = Play::running(list(3));
    play.done("a").says("b", Op::Do, Outcome::Failed);
    play.is(Compensating, &[Undoing, Failed, Skipped], &["a.undo 1.1"]);
    assert_eq!(play.saga.phase, Phase::Backward);
    assert!(play.saga.reason.as_ref().unwrap().contains("\"b\" failed"));
    assert_eq!(play.saga.steps[1].compensation.as_ref().unwrap().status, CompensationStatus::Released);
    play.undone("a").is(Compensated, &[Undone, Failed, Skipped], &[]);
}

/// Goal: a step is undone when everything behind it is: the branches of a fork in any order, their root last; what is
/// still out is waited for, but not tried again.
#[test]
fn undo_is_in_reverse_order_and_waits_for_what_is_out() {
    let mut definition = list(4);
    definition.steps[2].after = vec![0];
    definition.steps[3].after = vec![0];
    let mut play = Play::running(definition);
    play.done("a").is(Running, &[Succeeded, Dispatched, Dispatched, Dispatched], &["b.do 1.1", "c.do 1.1", "d.do 1.1"]);
    play.done("b").says("c", Op::Do, Outcome::Failed);
    play.is(Compensating, &[Succeeded, Undoing, Failed, Dispatched], &["b.undo 1.1"]);
    let due = play.saga.next_due;
    play.says("d", Op::Do, Outcome::InProgress);
    assert!(play.ignored() && play.saga.next_due == due);
    play.undone("b").is(Compensating, &[Succeeded, Undone, Failed, Dispatched], &[]);
    play.due().is(Compensating, &[Succeeded, Undone, Failed, Unknown], &[]);
    play.due().is(Compensating, &[Succeeded, Undone, Failed, Undoing], &["d.undo 1.1"]);
    play.undone("d").is(Compensating, &[Undoing, Undone, Failed, Undone], &["a.undo 1.1"]);
}

/// Goal: an undo is tried again, then it is stuck: an operator tries it anew, with all its attempts.
#[test]
fn an_undo_that_will_not_succeed_is_stuck() {
    let mut play = Play::running(list(2));
    play.done("a").says("b", Op::Do, Outcome::Failed);
    play.says("a", Op::Undo, Outcome::Failed).is(Compensating, &[UndoBackoff, Failed], &[]);
    play.due().is(Compensating, &[Undoing, Failed], &["a.undo 1.2"]);
    play.due().is(Stuck, &[UndoStuck, Failed], &[]);
    assert_eq!(play.saga.next_due, None);
    assert_eq!(allowed_actions(&play.saga, &play.definition), [Action::Pause, Action::Retry, Action::Terminate]);
    let all = [Action::Retry, Action::Skip, Action::Resolve];
    assert_eq!(allowed_step_actions(&play.saga, &play.definition, "a"), all);
    play.on(Event::RetryStep { step: "a".into(), by: by() }).is(Compensating, &[Undoing, Failed], &["a.undo 1.1"]);
    play.undone("a").is(Compensated, &[Undone, Failed], &[]);
}

/// Goal: a definition may say that an undo is given up; an operator may too, or say that it is done.
#[test]
fn an_undo_may_be_given_up() {
    let mut definition = list(2);
    definition.steps[0].on_undo_exhausted = OnExhausted::Skip;
    definition.steps[0].undo_retry.max = 1;
    let mut play = Play::running(definition);
    play.done("a").says("b", Op::Do, Outcome::Failed).due();
    play.is(Compensated, &[UndoSkipped, Failed], &[]);
    for (event, then) in [
        (Event::SkipStep { step: "a".into(), by: by() }, UndoSkipped),
        (resolve("a", Outcome::Succeeded), Undone),
        (reply("a", Op::Undo, 1, Outcome::Succeeded), Undone),
    ] {
        let mut play = Play::running(list(2));
        play.done("a").says("b", Op::Do, Outcome::Failed).due().due().due();
        play.is(Stuck, &[UndoStuck, Failed], &[]);
        play.refuses(resolve("a", Outcome::Failed));
        play.on(event).is(Compensating, &[then, Failed], &[]);
        play.due().is(Compensated, &[then, Failed], &[]);
    }
}

/// Goal: a pivot that may have run never turns the saga back: it is stuck, and only its outcome decides.
#[test]
fn an_unknown_pivot_never_compensates() {
    let stuck = || {
        let mut play = Play::running(with_pivot());
        play.done("a").due().due().due();
        play.is(Stuck, &[Succeeded, Unknown, Pending], &[]);
        play
    };
    stuck().refuses(Event::Cancel(by()));
    stuck().refuses(Event::SkipStep { step: "b".into(), by: by() });
    let mut play = stuck();
    play.done("b").is(Running, &[Succeeded, Succeeded, Dispatched], &["c.do 1.1"]);
    let mut play = stuck();
    play.on(Event::Retry(by())).is(Running, &[Succeeded, Backoff, Pending], &[]);
    play.due().is(Running, &[Succeeded, Dispatched, Pending], &["b.do 1.1"]);
    let mut play = stuck();
    play.on(resolve("b", Outcome::Failed)).is(Running, &[Succeeded, Failed, Pending], &[]);
    play.due().is(Compensating, &[Undoing, Failed, Skipped], &["a.undo 1.1"]);
    let mut play = stuck();
    play.on(resolve("b", Outcome::Succeeded)).is(Running, &[Succeeded, Succeeded, Dispatched], &["c.do 1.1"]);
}

/// Goal: a cancel, or the deadline, that meets the pivot under way waits for its outcome, which decides.
#[test]
fn a_cancel_waits_for_the_pivot() {
    for (outcome, status, cancel_left) in [(Outcome::Succeeded, Running, false), (Outcome::Failed, Compensating, false)]
    {
        let mut play = Play::running(with_pivot());
        play.done("a").on(Event::Cancel(by()));
        assert_eq!((play.saga.status, play.saga.cancel.as_deref()), (Running, Some("because")));
        play.refuses(Event::Cancel(by()));
        play.says("b", Op::Do, outcome);
        assert_eq!((play.saga.status, play.saga.cancel.is_some()), (status, cancel_left));
    }
    let mut play = Play::scheduled(with_pivot(), Some(500));
    play.due().done("a").due();
    assert_eq!((play.saga.status, play.saga.cancel.as_deref()), (Running, Some("deadline")));
    assert_eq!(play.saga.next_due, Some(TIMEOUT_MS));
}

/// Goal: after the pivot there is only forward: a failure is tried anew in the next epoch, then stuck; no cancel, no
/// deadline.
#[test]
fn after_the_pivot_there_is_only_forward() {
    let mut play = Play::scheduled(with_pivot(), Some(500));
    play.due().done("a").done("b");
    play.refuses(Event::Cancel(by()));
    assert_eq!(play.saga.next_due, Some(TIMEOUT_MS));
    play.says("c", Op::Do, Outcome::Failed).is(Running, &[Succeeded, Succeeded, Failed], &[]);
    play.due().is(Running, &[Succeeded, Succeeded, Dispatched], &["c.do 2.2"]);
    play.on(reply("c", Op::Do, 1, Outcome::Succeeded));
    assert!(play.ignored());
    play.says("c", Op::Do, Outcome::Failed).is(Stuck, &[Succeeded, Succeeded, Failed], &[]);
    let mut skipped = Play { saga: play.saga.clone(), definition: with_pivot(), last: None, ..play };
    play = Play { saga: skipped.saga.clone(), definition: with_pivot(), last: None, ..skipped };
    play.on(Event::Retry(by())).is(Running, &[Succeeded, Succeeded, Dispatched], &["c.do 3.1"]);
    play.done("c").is(Completed, &[Succeeded, Succeeded, Succeeded], &[]);
    skipped = Play { last: None, ..skipped };
    skipped.on(Event::SkipStep { step: "c".into(), by: by() }).is(Running, &[Succeeded, Succeeded, Skipped], &[]);
    skipped.due().is(Completed, &[Succeeded, Succeeded, Skipped], &[]);
}

/// Goal: the deadline turns a saga back; nothing new is begun after it.
#[test]
fn the_deadline_turns_back() {
    let mut play = Play::scheduled(list(2), Some(500));
    play.due();
    play.now = 600;
    play.done("a").is(Running, &[Succeeded, Pending], &[]);
    play.due().is(Compensating, &[Undoing, Skipped], &["a.undo 1.1"]);
    assert_eq!(play.saga.reason.as_deref(), Some("deadline"));
}

/// Goal: cancelled before its start a saga has done nothing; later it is undone, also while paused, where nothing is sent.
#[test]
fn a_cancel_turns_back() {
    let mut play = Play::scheduled(list(1), None);
    play.on(Event::Pause(by())).on(Event::Cancel(by())).is(Cancelled, &[Skipped], &[]);
    assert!(!play.saga.paused);
    let mut play = Play::running(list(2));
    play.done("a").says("b", Op::Do, Outcome::Retry).on(Event::Pause(by())).on(Event::Cancel(by()));
    play.is(Compensating, &[Succeeded, Backoff], &[]);
    assert_eq!(play.saga.next_due, None);
    play.on(Event::Resume(by())).is(Compensating, &[Succeeded, Undoing], &["b.undo 1.1"]);
}

/// Goal: while paused replies change steps, and nothing is sent or timed.
#[test]
fn a_pause_sends_nothing() {
    let mut play = Play::running(list(2));
    play.on(Event::Pause(by()));
    assert_eq!(play.saga.next_due, None);
    play.refuses(Event::Pause(by()));
    play.now = 1_000_000;
    play.refuses(Event::Due {});
    play.done("a").is(Running, &[Succeeded, Pending], &[]);
    play.on(Event::Resume(by())).is(Running, &[Succeeded, Dispatched], &["b.do 1.1"]);
    play.refuses(Event::Resume(by()));
}

fn with_wait(timeout_ms: Option<i64>) -> Definition {
    let mut definition = list(2);
    definition.steps[1].work = Work::Wait { signal: "ok".into(), timeout_ms };
    definition.steps[1].undo = None;
    definition
}

fn signal(name: &str) -> Event {
    Event::Signal { name: name.into(), payload: Some(json!(7)) }
}

/// Goal: a signal is taken by the step that waits, or kept until it does; none is taken twice.
#[test]
fn signals_are_kept_and_taken() {
    let mut play = Play::running(with_wait(None));
    play.done("a").is(Running, &[Succeeded, Dispatched], &[]);
    assert_eq!(play.saga.next_due, None);
    play.on(signal("ok")).is(Completed, &[Succeeded, Succeeded], &[]);
    assert_eq!(play.last.as_ref().unwrap().signals_taken, ["ok"]);
    assert_eq!(play.saga.steps[1].output, Some(json!(7)));
    play.on(signal("ok"));
    assert!(play.ignored());

    let mut play = Play::running(with_wait(None));
    play.on(signal("ok"));
    assert_eq!((play.saga.signals.len(), play.last.as_ref().unwrap().signals_taken.len()), (1, 0));
    play.done("a").is(Running, &[Succeeded, Dispatched], &[]);
    assert_eq!(play.saga.next_due, Some(play.now));
    play.due().is(Completed, &[Succeeded, Succeeded], &[]);
    assert!(play.saga.signals.is_empty());
    assert_eq!(play.decide(&signal("no")), Err(Refusal::UnknownSignal("no".into())));
}

/// Goal: a signal that does not come in time is a failure; turning back ends the wait.
#[test]
fn a_wait_ends() {
    let mut play = Play::running(with_wait(Some(300)));
    play.done("a").due().is(Compensating, &[Undoing, Failed], &["a.undo 1.1"]);
    let mut play = Play::running(with_wait(None));
    play.done("a").on(Event::Cancel(by())).is(Compensating, &[Undoing, Failed], &["a.undo 1.1"]);
    play.on(signal("ok"));
    assert!(play.ignored());
}

/// Goal: replies to what was never sent are refused, late ones change nothing but the history.
#[test]
fn replies_are_matched_by_step_op_and_epoch() {
    let mut play = Play::running(list(2));
    let refused = |play: &Play, event| matches!(play.decide(&event), Err(Refusal::NeverSent { .. }));
    assert!(refused(&play, reply("b", Op::Do, 1, Outcome::Succeeded)), "pending");
    assert!(refused(&play, reply("a", Op::Do, 2, Outcome::Succeeded)), "a later epoch");
    assert!(refused(&play, reply("a", Op::Undo, 1, Outcome::Succeeded)), "no undo was sent");
    assert_eq!(play.decide(&reply("x", Op::Do, 1, Outcome::Succeeded)), Err(Refusal::UnknownStep("x".into())));
    play.done("a").done("a");
    assert!(play.ignored());
    play.done("b");
    let ended = play.saga.clone();
    play.says("b", Op::Do, Outcome::Failed);
    assert!(play.ignored());
    assert_eq!(Saga { seq: ended.seq, ..play.saga.clone() }, ended);
}

/// Goal: a body over the limit is a failure before anything was sent; over the limit an undo is stuck. Exactly at the
/// limit, as Postgres prints it, is fine.
#[test]
fn bodies_have_a_limit() {
    let body = json!({"key": "key"}).to_string().len() + 1;
    for (limit, status) in [(body, Dispatched), (body - 1, Failed)] {
        let mut play = Play::scheduled(list(1), None);
        play.limits.payload_bytes = limit;
        play.due();
        assert_eq!(play.steps(), [status]);
    }
    let mut play = Play::running(list(2));
    play.limits.payload_bytes = body;
    play.done("a").says("b", Op::Do, Outcome::Failed).is(Compensating, &[UndoStuck, Failed], &[]);
    assert_eq!(play.last.as_ref().unwrap().changes.payload_limit_bytes, Some(body));
    play.due().is(Stuck, &[UndoStuck, Failed], &[]);
    play.limits.payload_bytes = 1_000;
    play.on(Event::Retry(by())).is(Compensating, &[Undoing, Failed], &["a.undo 1.1"]);
}

/// Goal: a stuck saga with two stuck steps goes on when an operator has cared for both, and gives up when told to.
#[test]
fn all_stuck_steps_are_cared_for_first() {
    let mut definition = with_pivot();
    definition.steps.push(StepDefinition { after: vec![1], undo: None, ..step(3) });
    definition.steps[2].retry.max = 1;
    definition.steps[3].retry.max = 1;
    let mut play = Play::running(definition);
    play.done("a").done("b").says("c", Op::Do, Outcome::Failed).says("d", Op::Do, Outcome::Failed);
    play.is(Stuck, &[Succeeded, Succeeded, Failed, Failed], &[]);
    let retry = |step: &str| Event::RetryStep { step: step.into(), by: by() };
    play.on(retry("c")).is(Stuck, &[Succeeded, Succeeded, Failed, Failed], &[]);
    play.refuses(retry("c"));
    let mut given_up = Play { saga: play.saga.clone(), definition: play.definition.clone(), last: None, ..play };
    given_up.on(Event::Terminate(by())).is(Terminated, &[Succeeded, Succeeded, Failed, Failed], &[]);
    play = Play { saga: play.saga, definition: play.definition, last: None, ..given_up };
    play.on(retry("d")).is(Running, &[Succeeded, Succeeded, Dispatched, Dispatched], &["c.do 2.1", "d.do 2.1"]);
}

/// Goal: without a definition the steps that were enlisted are undone one after the other, newest first, with the
/// bodies they came with; and a saga nobody completes turns back at its deadline.
#[test]
fn enlisted_steps_are_undone_in_reverse() {
    let origin = Origin { id: Uuid::from_u128(1), definition: None, business_key: "key".into() };
    let row = |seq, event| Past { seq, at: 10, event, payload_limit_bytes: None };
    let enlisted = |step: &str| {
        let (step, topic) = (step.to_owned(), format!("{step}.undo"));
        Event::Enlisted { step, topic, payload: json!("$.business_key") }
    };
    let rows = vec![row(1, Event::Opened { deadline: Some(500) }), row(2, enlisted("a")), row(3, enlisted("b"))];
    let saga = fold::replay(&origin, None, &rows).unwrap();
    assert_eq!((saga.status, saga.next_due), (Running, Some(500)));
    let definition = Definition::enlisted(&saga);
    let mut play = Play { saga: saga.clone(), definition, now: 0, limits: Limits { payload_bytes: 99 }, last: None };
    play.due().is(Compensating, &[Succeeded, Undoing], &["b.undo 1.1"]);
    assert_eq!(play.last.as_ref().unwrap().commands[0].body, json!("$.business_key"));
    play.undone("b").is(Compensating, &[Undoing, Undone], &["a.undo 1.1"]);
    play.undone("a").is(Compensated, &[Undone, Undone], &[]);

    let aborted = fold::next(&saga, None, &row(4, Event::Aborted { reason: "no".into() })).unwrap();
    assert_eq!((aborted.status, aborted.next_due), (Compensating, Some(10)));
    let completed = fold::next(&saga, None, &row(4, Event::Completed {})).unwrap();
    let mut paused = Play { saga: saga.clone(), now: 0, last: None, ..play };
    paused.on(Event::Pause(by()));
    paused.saga = fold::next(&paused.saga, None, &row(5, Event::Aborted { reason: "no".into() })).unwrap();
    paused.due().is(Compensating, &[Succeeded, Succeeded], &[]);
    assert_eq!(paused.saga.next_due, None);
    paused.on(Event::Resume(by())).is(Compensating, &[Succeeded, Undoing], &["b.undo 1.1"]);
    assert_eq!((completed.status, completed.next_due), (Completed, None));
    assert_eq!(fold::next(&saga, None, &row(5, Event::Completed {})), Err(FoldError::Gap { seq: 5, expected: 4 }));
    let after_end = fold::next(&completed, None, &row(5, enlisted("c")));
    assert!(matches!(after_end, Err(FoldError::Refused { seq: 5, .. })));
}

/// Goal: delays grow up to their cap, and jitter spreads them, always the same way for one attempt.
#[test]
fn delays_are_the_same_each_time() {
    let delay = |jitter, id: u128, attempts: i32| {
        let mut definition = list(1);
        definition.steps[0].retry = Retry { max: 100, initial_ms: 1_000, factor: 2.0, cap_ms: 8_000, jitter };
        let mut play = Play::running(definition);
        play.saga.id = Uuid::from_u128(id);
        play.saga.steps[0].attempt = attempts;
        play.says("a", Op::Do, Outcome::Retry);
        play.saga.next_due.unwrap() - play.now
    };
    assert_eq!([1, 2, 3, 4, 5, 60].map(|n| delay(Jitter::None, 1, n)), [1_000, 2_000, 4_000, 8_000, 8_000, 8_000]);
    let spread: Vec<i64> = (0..200).map(|id| delay(Jitter::Full, id, 4)).collect();
    assert_eq!(spread, (0..200).map(|id| delay(Jitter::Full, id, 4)).collect::<Vec<_>>());
    assert!(spread.iter().all(|delay| (0..=8_000).contains(delay)));
    let mean = spread.iter().sum::<i64>() / 200;
    assert!((3_000..5_000).contains(&mean), "mean {mean}");
}
