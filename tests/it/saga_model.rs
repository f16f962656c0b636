//! Goal: sagas keep their promises whatever happens. Random definitions run against participants with the real
//! barrier's rules, a network that delays, doubles and reorders, processes that die before and after their commits,
//! and operators who do what they are allowed to; after each event and at the end everything is checked. No servers.

use oncebox::saga::decide::{
    Action, Limits, Refusal, StepChange, Transition, allowed_actions, allowed_step_actions, decide,
};
use oncebox::saga::definition::{CommandTemplate, Definition, Jitter, OnExhausted, Retry, StepDefinition, Work};
use oncebox::saga::fold::{self, Origin, Past};
use oncebox::saga::state::{
    Command, CompensationStatus, Event, Millis, Op, Operator, Outcome, Phase, Saga, SagaStatus, Step, StepStatus,
};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use uuid::Uuid;

/// Longest body while the limit is low: the bodies of this test lie on both sides of it.
const LOW_LIMIT_BYTES: usize = 45;
/// Events that the end of a case may take: far more than the longest took.
const MOST_EVENTS_TO_DRAIN: usize = 1_000;
/// Every so many events the dear checks are made.
const CHECK_EACH: i64 = 5;
/// How often a stuck saga is retried before the messages that come after everything else are let through.
const MOST_RETRIES_BEFORE_LATE_MESSAGES: u32 = 3;
/// What a failed case tells of its events.
const MOST_EVENTS_TOLD: usize = 150;

/// A step of a random definition, before it is made to fit the others.
#[derive(Debug, Clone)]
struct Sketch {
    after: u8,
    wait: Option<Option<i64>>,
    undo: bool,
    attempts: i32,
    undo_attempts: i32,
    skip: bool,
    undo_timeout: bool,
    long_undo: bool,
}

fn sketch() -> impl Strategy<Value = Sketch> {
    let wait = prop_oneof![
        6 => Just(None),
        1 => Just(Some(None)),
        1 => Just(Some(Some(2_000))),
    ];
    (
        any::<u8>(),
        wait,
        prop::bool::weighted(0.8),
        1..4i32,
        1..4i32,
        prop::bool::weighted(0.15),
        any::<bool>(),
        prop::bool::weighted(0.4),
    )
        .prop_map(|(after, wait, undo, attempts, undo_attempts, skip, undo_timeout, long_undo)| Sketch {
            after,
            wait,
            undo,
            attempts,
            undo_attempts,
            skip,
            undo_timeout,
            long_undo,
        })
}

/// A valid definition: every step is ordered against the pivot, and nothing at or after it is undone.
fn definition(sketches: &[Sketch], pivot: Option<usize>, deadline_ms: Option<i64>) -> Definition {
    let mut steps: Vec<StepDefinition> = Vec::new();
    for (place, sketch) in sketches.iter().enumerate() {
        let mut after: Vec<usize> = (0..place).filter(|before| sketch.after >> before & 1 == 1).collect();
        match pivot {
            Some(pivot) if pivot == place => after = (0..place).collect(),
            Some(pivot) if pivot < place && !after.iter().any(|before| *before >= pivot) => after.push(pivot),
            _ => {}
        }
        let id = format!("s{place}");
        let retry = |max| Retry { max, initial_ms: 300, factor: 2.0, cap_ms: 1_000, jitter: Jitter::Full };
        let body = json!({"outs": after.iter().map(|before| format!("$.steps.s{before}.output")).collect::<Vec<_>>()});
        let past_pivot = pivot.is_some_and(|pivot| pivot <= place);
        let pad = "x".repeat(if sketch.long_undo { LOW_LIMIT_BYTES } else { 0 });
        let undo = || CommandTemplate {
            topic: format!("{id}.undo"),
            body: json!({"out": format!("$.steps.{id}.output"), "pad": pad}),
        };
        steps.push(StepDefinition {
            after,
            work: match sketch.wait {
                Some(timeout_ms) => Work::Wait { signal: format!("signal-{id}"), timeout_ms },
                None => Work::Command(CommandTemplate { topic: format!("{id}.do"), body }),
            },
            pivot: pivot == Some(place),
            timeout_ms: if sketch.undo_timeout { 500 } else { 1_500 },
            retry: retry(sketch.attempts),
            undo: (sketch.undo && sketch.wait.is_none() && !past_pivot).then(undo),
            undo_retry: retry(sketch.undo_attempts),
            on_undo_exhausted: if sketch.skip { OnExhausted::Skip } else { OnExhausted::Stuck },
            id,
        });
    }
    Definition { name: "model".into(), version: 1, deadline_ms, steps }
}

/// A case: what is run, and the numbers that chance draws from.
#[derive(Clone)]
struct Case {
    /// None: a saga without a definition, of which participants become part.
    definition: Option<Definition>,
    deadline_ms: Option<i64>,
    low_limit: bool,
    calm: bool,
    chance: Vec<u16>,
}

fn case() -> impl Strategy<Value = Case> {
    let steps = prop::collection::vec(sketch(), 1..9);
    let deadline = prop::option::weighted(0.3, 500..12_000i64);
    let chance = prop::collection::vec(any::<u16>(), 0..240);
    (steps, prop::option::weighted(0.6, any::<prop::sample::Index>()), deadline, chance, 0..10u8, any::<bool>())
        .prop_map(|(steps, pivot, deadline_ms, chance, kind, calm)| {
            let pivot = pivot.map(|pivot| pivot.index(steps.len()));
            let definition = (kind > 0).then(|| definition(&steps, pivot, deadline_ms));
            Case { definition, deadline_ms, low_limit: (1..4).contains(&kind), calm, chance }
        })
}

/// The story of a failed case tells it readably.
impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "calm {}, low limit {}, chance {:?}", self.calm, self.low_limit, self.chance)
    }
}

#[derive(Debug, Clone)]
enum Message {
    Command(Command),
    Reply { step: String, op: Op, epoch: i32, outcome: Outcome, output: Option<Value> },
}

/// A message under way.
#[derive(Debug, Clone)]
struct Sent {
    message: Message,
    /// It arrives when everything else is over.
    very_late: bool,
}

/// What became of a step's action, by its participant's own books.
#[derive(Debug, Default)]
struct Books {
    applied: u32,
    undone: u32,
    /// An operator said what became of it.
    resolved: bool,
}

struct World {
    saga: Saga,
    case: Case,
    definition: Definition,
    limits: Limits,
    now: Millis,
    chance: VecDeque<u16>,
    under_way: Vec<Sent>,
    /// The barrier: whether a row of (step, op, epoch) is a tombstone.
    barrier: BTreeMap<(String, Op, i32), bool>,
    books: BTreeMap<String, Books>,
    history: Vec<Past>,
    log: Vec<String>,
    telling: bool,
    calls: u32,
    unstuck: u32,
    /// Changes that were made.
    seen: BTreeSet<Seen>,
}

type Checked = Result<(), String>;
/// A change that was made: of what, from, to.
type Seen = (&'static str, &'static str, &'static str);

macro_rules! ensure {
    ($cond:expr, $($why:tt)+) => { if !$cond { return Err(format!($($why)+)); } };
}

fn by(why: &str) -> Operator {
    Operator { who: "model".into(), why: why.into() }
}

/// As the tables keep it.
fn stored<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T) -> T {
    serde_json::from_value(serde_json::to_value(value).unwrap()).unwrap()
}

/// A transition in a line.
fn told(event: &Event, was: &Saga, transition: &Transition) -> String {
    let (is, changes) = (&transition.saga, &transition.changes);
    let event = serde_json::to_string(event).unwrap();
    let step = |change: &StepChange| {
        format!(
            " {} {}→{} ({}.{})",
            change.step,
            change.from.as_str(),
            change.to.as_str(),
            change.epoch,
            change.attempt
        )
    };
    let steps: String = changes.steps.iter().map(step).collect();
    let ignored = changes.ignored.as_ref().map(|why| format!(" ignored: {why}")).unwrap_or_default();
    let (was, due) = (was.status.as_str(), is.next_due);
    format!("{event}: {was}→{}{steps}{ignored}, due {due:?}", is.status.as_str())
}

impl World {
    fn new(case: &Case) -> Self {
        let origin = Self::origin(case);
        let deadline = case.deadline_ms.map(|deadline_ms| 1_000 + deadline_ms);
        let event = match &case.definition {
            Some(_) => Event::Created { input: json!({}), labels: Map::new(), start_at: 1_000, deadline },
            None => Event::Opened { deadline },
        };
        let first = Past { seq: 1, at: 900, event, payload_limit_bytes: None };
        let saga = fold::initial(&origin, case.definition.as_ref(), &first).unwrap();
        Self {
            definition: case.definition.clone().unwrap_or_else(|| Definition::enlisted(&saga)),
            limits: Limits { payload_bytes: if case.low_limit { LOW_LIMIT_BYTES } else { 1 << 20 } },
            now: 900,
            chance: case.chance.iter().copied().collect(),
            under_way: Vec::new(),
            barrier: BTreeMap::new(),
            books: BTreeMap::new(),
            history: vec![first],
            log: Vec::new(),
            telling: false,
            calls: 0,
            unstuck: 0,
            seen: BTreeSet::new(),
            case: case.clone(),
            saga,
        }
    }

    fn origin(case: &Case) -> Origin {
        let definition = case.definition.as_ref().map(|defined| (defined.name.clone(), defined.version));
        Origin { id: Uuid::from_u128(7), definition, business_key: "key".into() }
    }

    /// Below `n`; 0, the good case, when chance is used up.
    fn draw(&mut self, n: usize) -> usize {
        self.chance.pop_front().map_or(0, |drawn| usize::from(drawn) % n)
    }

    fn place(&self, step: &str) -> usize {
        self.saga.steps.iter().position(|known| known.id == step).unwrap()
    }

    fn books(&mut self, step: &str) -> &mut Books {
        self.books.entry(step.to_owned()).or_default()
    }

    fn send(&mut self, message: Message) {
        let very_late = self.draw(16) == 1;
        self.under_way.push(Sent { message, very_late });
    }

    // The orchestrator.

    fn decide(&self, event: &Event) -> Result<Transition, Refusal> {
        decide(&self.saga, &self.definition, event, self.now, &self.limits)
    }

    /// Decides, checks, and keeps what was decided; an error of its own when it was refused.
    fn apply(&mut self, event: Event) -> Result<Result<(), Refusal>, String> {
        let transition = match self.decide(&event) {
            Ok(transition) => transition,
            Err(refusal) => {
                self.log.push(format!("{:>6} {event:?} REFUSED {refusal}", self.now));
                return Ok(Err(refusal));
            }
        };
        if self.telling {
            self.log.push(format!("{:>6} {}", self.now, told(&event, &self.saga, &transition)));
        }
        self.check_transition(&event, &transition)?;
        self.see(&transition.saga);
        let past = Past {
            seq: transition.saga.seq,
            at: self.now,
            event: stored(&event),
            payload_limit_bytes: stored(&transition.changes).payload_limit_bytes,
        };
        let folded = fold::next(&self.saga, self.case.definition.as_ref(), &past).map_err(|error| error.to_string())?;
        ensure!(folded == transition.saga, "the history says otherwise:\n{folded:?}\n{:?}", transition.saga);
        self.history.push(past);
        self.saga = transition.saga;
        let kept = self.saga.seq % CHECK_EACH != 0 || stored(&self.saga) == self.saga;
        ensure!(kept, "the tables cannot hold it: {:?}", self.saga);
        for command in transition.commands {
            self.send(Message::Command(command));
        }
        self.check_state()?;
        Ok(Ok(()))
    }

    fn see(&mut self, is: &Saga) {
        let was = &self.saga;
        let mut note = |kind, was: &'static str, is: &'static str| {
            if was != is {
                self.seen.insert((kind, was, is));
            }
        };
        note("saga", was.status.as_str(), is.status.as_str());
        for (was, is) in was.steps.iter().zip(&is.steps) {
            note("step", was.status.as_str(), is.status.as_str());
            if let (Some(was), Some(is)) = (&was.compensation, &is.compensation) {
                note("compensation", was.status.as_str(), is.status.as_str());
            }
        }
    }

    /// What the database's own functions do with a saga without a definition.
    fn sql(&mut self, event: Event) -> Checked {
        let past = Past { seq: self.saga.seq + 1, at: self.now, event, payload_limit_bytes: None };
        self.log.push(format!("{:>6} {:?} by SQL", self.now, past.event));
        self.saga = fold::next(&self.saga, None, &past).map_err(|error| error.to_string())?;
        self.definition = Definition::enlisted(&self.saga);
        self.history.push(past);
        Ok(())
    }

    // The participants.

    /// Takes a message from the network at a place.
    fn deliver(&mut self, place: usize) -> Checked {
        let sent = self.under_way.remove(place);
        match sent.message.clone() {
            Message::Command(command) => self.participate(command, sent),
            Message::Reply { step, op, epoch, outcome, output } => {
                let event = Event::Reply { step, op, epoch, outcome, output, error: None };
                if self.draw(12) == 1 {
                    // The orchestrator dies before its commit: it has decided for nothing, the message comes again.
                    let _ = self.decide(&event);
                    self.under_way.push(sent);
                    return Ok(());
                }
                let answered = self.apply(event)?;
                ensure!(answered.is_ok(), "a participant's reply was refused: {answered:?}");
                Ok(())
            }
        }
    }

    fn reply(&mut self, command: &Command, outcome: Outcome, output: Option<Value>) {
        let (step, op, epoch) = (command.step.clone(), command.op, command.epoch);
        self.send(Message::Reply { step, op, epoch, outcome, output });
    }

    fn participate(&mut self, command: Command, sent: Sent) -> Checked {
        let act = if self.case.calm {
            [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5]
        } else {
            [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 5]
        };
        let act = act[self.draw(13)];
        if act == 3 {
            // It dies before its commit: nothing happened, the message comes again.
            self.under_way.push(sent);
            return Ok(());
        }
        if act == 4 {
            // It dies after its commit: the message comes again.
            self.under_way.push(sent.clone());
        }
        let key = |op| (command.step.clone(), op, command.epoch);
        match command.op {
            Op::Do => self.act(&command, key(Op::Do), act, sent),
            Op::Undo => {
                let never_ran = *self.barrier.entry(key(Op::Do)).or_insert(true);
                if self.barrier.contains_key(&key(Op::Undo)) {
                    return Ok(());
                }
                self.barrier.insert(key(Op::Undo), false);
                if never_ran {
                    self.reply(&command, Outcome::UndoNoop, None);
                } else if matches!(act, 1 | 2) {
                    self.barrier.remove(&key(Op::Undo));
                    self.reply(&command, if act == 1 { Outcome::Failed } else { Outcome::Retry }, None);
                } else {
                    self.undo(&command.step)?;
                    self.reply(&command, Outcome::Succeeded, None);
                }
                Ok(())
            }
        }
    }

    /// A do reaches its participant.
    fn act(&mut self, command: &Command, key: (String, Op, i32), act: usize, sent: Sent) -> Checked {
        if self.barrier.contains_key(&key) {
            return Ok(());
        }
        match act {
            // It failed for good: the row stays, nothing must happen in this epoch any more.
            1 => {
                self.barrier.insert(key, true);
                self.reply(command, Outcome::Failed, None);
            }
            2 => self.reply(command, Outcome::Retry, None),
            5 => {
                self.reply(command, Outcome::InProgress, None);
                self.under_way.push(sent);
            }
            _ => {
                self.barrier.insert(key, false);
                self.calls += 1;
                let long = self.draw(3) == 1;
                let output = json!(format!("{}{}", self.calls, if long { "x".repeat(40) } else { String::new() }));
                let final_already = self.saga.status.is_final();
                let status = self.saga.steps[self.place(&command.step)].status;
                ensure!(
                    !final_already
                        || self.saga.status == SagaStatus::Terminated
                        || matches!(status, StepStatus::Unknown | StepStatus::UndoSkipped),
                    "{} took effect after the end",
                    command.step
                );
                let books = self.books(&command.step);
                ensure!(books.applied == 0, "{} was applied twice", command.step);
                ensure!(books.undone == 0, "{} was applied after it was undone", command.step);
                books.applied = 1;
                self.reply(command, Outcome::Succeeded, Some(output));
            }
        }
        Ok(())
    }

    /// The undo of a step takes effect.
    fn undo(&mut self, step: &str) -> Checked {
        let place = self.place(step);
        ensure!(!self.definition.is_at_or_after_pivot(place), "{step} is undone, the pivot or after it");
        let status = self.saga.steps[place].status;
        ensure!(
            !self.saga.status.is_final()
                || self.saga.status == SagaStatus::Terminated
                || status == StepStatus::UndoSkipped,
            "{step} was undone after the end"
        );
        for behind in self.definition.dependents(place).iter().collect::<Vec<_>>() {
            let (id, status) = (self.saga.steps[behind].id.clone(), self.saga.steps[behind].status);
            let has_undo = self.definition.steps[behind].undo.is_some();
            let given_up = status == StepStatus::UndoSkipped;
            let books = self.books(&id);
            ensure!(
                !has_undo || given_up || books.applied == books.undone,
                "{step} was undone before {id}, which came after it"
            );
        }
        let books = self.books(step);
        ensure!(books.applied == 1, "{step} was undone, but never done");
        ensure!(books.undone == 0, "{step} was undone twice");
        books.undone = 1;
        Ok(())
    }

    // Operators, and who else may interfere.

    fn interfere(&mut self) -> Checked {
        let place = self.draw(self.saga.steps.len().max(1));
        let step = self.saga.steps.get(place).map(|step| step.id.clone()).unwrap_or_default();
        let event = match self.draw(24) {
            0..=2 => Event::Resume(by("")),
            3 | 4 => Event::Pause(by("")),
            5 => Event::Cancel(by("no more")),
            6..=8 => Event::Retry(by("")),
            9 => return self.terminate(),
            10..=13 => Event::RetryStep { step, by: by("") },
            14..=16 => Event::SkipStep { step, by: by("") },
            17..=23 if !step.is_empty() => return self.resolve(place),
            _ => return Ok(()),
        };
        // A pending step is skipped now and then only, or little else would happen.
        let pending = self.saga.steps.get(place).is_some_and(|step| step.status == StepStatus::Pending);
        if matches!(event, Event::SkipStep { .. }) && pending && self.draw(4) != 1 {
            return Ok(());
        }
        self.apply(event)?.ok();
        Ok(())
    }

    fn terminate(&mut self) -> Checked {
        if self.draw(4) == 1 {
            self.apply(Event::Terminate(by("enough")))?.ok();
        }
        Ok(())
    }

    /// An operator who says the truth, which nothing under way can change any more.
    fn resolve(&mut self, place: usize) -> Checked {
        let (step, status) = (self.saga.steps[place].id.clone(), self.saga.steps[place].status);
        let about = |sent: &Sent| matches!(&sent.message, Message::Command(command) if command.step == step);
        let settled = !self.under_way.iter().any(about);
        let books = self.books(&step);
        let (done, undone) = (books.applied == 1, books.undone == 1);
        let by_hand = !done && status == StepStatus::Failed || done && !undone && status == StepStatus::UndoStuck;
        let outcome = match status {
            StepStatus::Unknown if done => Outcome::Succeeded,
            StepStatus::Unknown if settled => Outcome::Failed,
            StepStatus::Failed | StepStatus::UndoStuck if settled => Outcome::Succeeded,
            _ => return Ok(()),
        };
        let event = Event::ResolveStep { step: step.clone(), outcome, output: Some(json!("by hand")), by: by("seen") };
        if self.apply(event)?.is_err() {
            return Ok(());
        }
        self.books(&step).resolved = true;
        if by_hand {
            match status {
                StepStatus::Failed => self.books(&step).applied = 1,
                _ => self.undo(&step)?,
            }
        }
        Ok(())
    }

    fn signal(&mut self) -> Checked {
        let place = self.draw(self.saga.steps.len().max(1));
        let waits = self.definition.steps.get(place).map(|step| &step.work);
        let Some(Work::Wait { signal, .. }) = waits else { return Ok(()) };
        let event = Event::Signal { name: signal.clone(), payload: Some(json!(7)) };
        let signalled = self.apply(event)?;
        ensure!(signalled.is_ok(), "a signal was refused: {signalled:?}");
        Ok(())
    }

    /// What a participant and the app do with a saga without a definition.
    fn enlist(&mut self) -> Checked {
        if self.saga.definition.is_some() || self.saga.status != SagaStatus::Running {
            return Ok(());
        }
        let step = format!("s{}", self.saga.steps.len());
        match self.draw(12) {
            0 if self.chance.is_empty() => self.sql(Event::Completed {}),
            10 => self.sql(Event::Completed {}),
            11 => self.sql(Event::Aborted { reason: "no".into() }),
            _ if self.saga.steps.len() < 6 => {
                self.barrier.insert((step.clone(), Op::Do, 1), false);
                self.books(&step).applied = 1;
                let (topic, payload) = (format!("{step}.undo"), json!({"of": "$.business_key"}));
                self.sql(Event::Enlisted { step, topic, payload })
            }
            _ => Ok(()),
        }
    }

    // The course of a case.

    /// One thing happens, by chance.
    fn happen(&mut self) -> Checked {
        match self.draw(32) {
            0..=15 if !self.under_way.is_empty() => {
                let place = self.draw(self.under_way.len());
                if self.under_way[place].very_late { Ok(()) } else { self.deliver(place) }
            }
            16..=18 if !self.under_way.is_empty() => {
                let place = self.draw(self.under_way.len());
                let again = self.under_way[place].clone();
                self.under_way.push(again);
                Ok(())
            }
            0..=22 => self.wait(),
            23 => {
                self.now += self.draw(700) as Millis;
                Ok(())
            }
            24..=26 => self.signal(),
            27 | 28 => self.enlist(),
            _ => self.interfere(),
        }
    }

    /// Time passes until something is due.
    fn wait(&mut self) -> Checked {
        if self.case.calm && self.under_way.iter().any(|sent| !sent.very_late) && self.draw(3) != 0 {
            return Ok(());
        }
        let Some(due) = self.saga.next_due else {
            ensure!(self.decide(&Event::Due {}).is_err(), "nothing is due, and it was not refused");
            return Ok(());
        };
        if due > self.now {
            ensure!(self.decide(&Event::Due {}).is_err(), "nothing is due yet, and it was not refused");
            self.now = due;
        }
        let late = self.draw(8);
        self.now += if late == 1 { 2_000 } else { 0 };
        if self.draw(12) == 1 {
            // The orchestrator dies before its commit.
            let _ = self.decide(&Event::Due {});
            return Ok(());
        }
        let due = self.apply(Event::Due {})?;
        ensure!(due.is_ok(), "what is due was refused: {due:?}");
        Ok(())
    }

    /// From here on all goes well: every saga ends, with an operator's help if it is stuck.
    fn drain(&mut self) -> Checked {
        self.limits.payload_bytes = 1 << 20;
        for _ in 0..MOST_EVENTS_TO_DRAIN {
            if self.saga.status.is_final() {
                return self.end();
            }
            if self.saga.paused && self.saga.next_due.is_some() {
                // It was aborted while it was paused.
                self.wait()?;
                ensure!(self.saga.next_due.is_none(), "paused, and due again and again");
            } else if self.saga.paused {
                let resumed = self.apply(Event::Resume(by("")))?;
                ensure!(resumed.is_ok(), "it cannot be resumed: {resumed:?}");
            } else if let Some(place) = self.under_way.iter().position(|sent| !sent.very_late) {
                self.deliver(place)?;
            } else if self.saga.status == SagaStatus::Stuck {
                self.unstick()?;
            } else if let Some(name) = self.awaited() {
                let signalled = self.apply(Event::Signal { name, payload: None })?;
                ensure!(signalled.is_ok(), "a signal was refused: {signalled:?}");
            } else if self.saga.next_due.is_some() {
                self.wait()?;
            } else {
                ensure!(self.saga.definition.is_none(), "it sleeps for ever");
                self.enlist()?;
            }
        }
        Err("it comes to no end".into())
    }

    /// The signal that a step waits for and that has not come.
    fn awaited(&self) -> Option<String> {
        let waits = |(step, defined): (&Step, &StepDefinition)| match &defined.work {
            Work::Wait { signal, .. } if step.status == StepStatus::Dispatched => Some(signal.clone()),
            _ => None,
        };
        let kept = |signal: &String| self.saga.signals.iter().any(|kept| kept.name == *signal);
        self.saga.steps.iter().zip(&self.definition.steps).filter_map(waits).find(|signal| !kept(signal))
    }

    fn unstick(&mut self) -> Checked {
        let actions = allowed_actions(&self.saga, &self.definition);
        ensure!(actions.contains(&Action::Retry), "stuck, and no retry is allowed: {actions:?}");
        self.unstuck += 1;
        if self.unstuck > MOST_RETRIES_BEFORE_LATE_MESSAGES {
            // What was answered once is not answered again: that reply has to arrive in the end.
            self.under_way.iter_mut().for_each(|sent| sent.very_late = false);
        }
        let stuck: Vec<String> = self.saga.steps.iter().map(|step| step.id.clone()).collect();
        for step in stuck {
            if self.calls.is_multiple_of(2) {
                self.apply(Event::Retry(by("")))?.ok();
                return Ok(());
            }
            self.apply(Event::RetryStep { step, by: by("") })?.ok();
        }
        Ok(())
    }

    /// The saga ended; what is still under way arrives.
    fn end(&mut self) -> Checked {
        self.check_end()?;
        let ended = self.saga.clone();
        while !self.under_way.is_empty() {
            self.deliver(0)?;
        }
        ensure!(Saga { seq: ended.seq, ..self.saga.clone() } == ended, "it changed after its end: {:?}", self.saga);
        self.check_end()?;
        let origin = Self::origin(&self.case);
        let replayed = fold::replay(&origin, self.case.definition.as_ref(), &self.history);
        ensure!(replayed.as_ref() == Ok(&self.saga), "the whole history says otherwise: {replayed:?}");
        Ok(())
    }

    // What must hold.

    fn check_transition(&self, event: &Event, transition: &Transition) -> Checked {
        let (was, is, changes) = (&self.saga, &transition.saga, &transition.changes);
        ensure!(is.seq == was.seq + 1, "seq {} became {}", was.seq, is.seq);
        if changes.ignored.is_some() {
            let same = Saga { seq: was.seq, ..is.clone() } == *was;
            ensure!(same && transition.commands.is_empty(), "ignored, and yet it changed: {transition:?}");
            return Ok(());
        }
        ensure!(!was.status.is_final(), "a final saga moved");
        let moved = was.status != is.status;
        ensure!(!moved || was.status.may_become(is.status, was.phase), "{:?} became {:?}", was.status, is.status);
        ensure!(changes.saga.is_some() == moved, "the change of status is not told");
        let completed = is.status == SagaStatus::Completed;
        ensure!(!completed || is.definition.is_some(), "without a definition, and it completed by itself");
        let turned = was.phase != is.phase;
        let turns = (was.status, is.status) == (SagaStatus::Running, SagaStatus::Compensating);
        ensure!(turned == turns, "it turned without turning back, or the other way round");
        if let Some(pivot) = self.definition.pivot().filter(|_| turns) {
            let pivot = is.steps[pivot].status;
            let open = matches!(pivot, StepStatus::Dispatched | StepStatus::Backoff | StepStatus::Unknown);
            ensure!(!open && pivot != StepStatus::Succeeded, "it turned back while its pivot is {pivot:?}");
        }
        for (was, is) in was.steps.iter().zip(&is.steps) {
            self.check_step(was, is, transition)?;
            self.check_time(event, was, is)?;
        }
        let silent = is.paused || is.status == SagaStatus::Stuck || is.status.is_final();
        ensure!(!silent || transition.commands.is_empty(), "it sends while it should not: {:?}", transition.commands);
        for command in &transition.commands {
            self.check_command(event, command, is)?;
        }
        Ok(())
    }

    fn check_step(&self, was: &Step, is: &Step, transition: &Transition) -> Checked {
        let id = &is.id;
        let moved = was.status != is.status;
        ensure!(!moved || was.status.may_become(is.status), "{id}: {:?} became {:?}", was.status, is.status);
        ensure!(is.epoch >= was.epoch, "{id}: its epoch fell");
        let anew = was.status == StepStatus::Failed && is.status == StepStatus::Dispatched;
        let first = was.epoch == 0 && is.status == StepStatus::Dispatched;
        ensure!(is.epoch == was.epoch + i32::from(anew || first), "{id}: epoch {} became {}", was.epoch, is.epoch);
        let told = transition.changes.steps.iter().any(|change| change.step == *id && change.to == is.status);
        ensure!(told || !moved, "{id}: its change is not told");
        if let Some(compensation) = is.compensation.as_ref().filter(|_| moved && is.status == StepStatus::Succeeded) {
            let complete = compensation.payload.as_ref().is_some_and(|body| Some(&body["out"]) == is.output.as_ref());
            let too_long = transition.changes.payload_limit_bytes.is_some();
            ensure!(complete || too_long, "{id}: its undo is not filled in: {compensation:?}");
        }
        match (&was.compensation, &is.compensation) {
            (Some(_), None) => return Err(format!("{id}: its compensation is gone")),
            (None, Some(new)) => {
                ensure!(new.status == CompensationStatus::Recorded, "{id}: begins as {:?}", new.status)
            }
            (Some(was), Some(is)) if was.status != is.status => {
                ensure!(was.status.may_become(is.status), "{id}: undo {:?} became {:?}", was.status, is.status);
            }
            _ => {}
        }
        Ok(())
    }

    /// What only time may bring does not come before its time.
    fn check_time(&self, event: &Event, was: &Step, is: &Step) -> Checked {
        use StepStatus::{Backoff, Dispatched, UndoBackoff, UndoStuck, Undoing, Unknown};
        let answered = matches!(event, Event::Reply { step, .. } if *step == is.id);
        let timed = match (was.status, is.status) {
            (Dispatched, Backoff | Unknown) | (Undoing, UndoBackoff | UndoStuck) => !answered,
            (Backoff, Dispatched) | (UndoBackoff, Undoing) => true,
            _ => false,
        };
        let due = was.due_at.is_some_and(|due_at| due_at <= self.now);
        let waits_on = was.status == Dispatched && is.status == Dispatched && is.due_at > was.due_at;
        ensure!(!waits_on || self.saga.phase == Phase::Forward, "{}: it is waited for longer on the way back", is.id);
        ensure!(!timed || due, "{}: {:?} became {:?} before its time", is.id, was.status, is.status);
        Ok(())
    }

    fn check_command(&self, event: &Event, command: &Command, is: &Saga) -> Checked {
        let id = &command.step;
        let place = self.place(id);
        let step = &is.steps[place];
        ensure!((command.epoch, command.attempt) == (step.epoch, step.attempt), "{id}: epoch or attempt differ");
        ensure!(Some(command.deadline) == step.due_at, "{id}: its command's deadline is not its own");
        let defined = &self.definition.steps[place];
        let max = if command.op == Op::Do { defined.retry.max } else { defined.undo_retry.max };
        ensure!((1..=max).contains(&command.attempt), "{id}: attempt {} of {max}", command.attempt);
        let late = is.deadline.is_some_and(|deadline| deadline <= self.now);
        let pivot_done = self.definition.pivot().is_some_and(|pivot| is.steps[pivot].status == StepStatus::Succeeded);
        match command.op {
            Op::Do => {
                ensure!(is.phase == Phase::Forward, "{id}: done on the way back, by {event:?}");
                let fresh = self.saga.steps[place].status == StepStatus::Pending;
                ensure!(!late || pivot_done || !fresh, "{id}: begun after the deadline");
                let done = |at: &usize| matches!(is.steps[*at].status, StepStatus::Succeeded | StepStatus::Skipped);
                ensure!(defined.after.iter().all(done), "{id}: done before its turn");
                ensure!(step.status == StepStatus::Dispatched, "{id}: sent, and {:?}", step.status);
            }
            Op::Undo => {
                ensure!(is.phase == Phase::Backward, "{id}: undone on the way forward");
                ensure!(step.status == StepStatus::Undoing, "{id}: its undo was sent, and it is {:?}", step.status);
                if self.saga.definition.is_some() {
                    let known = step.output.clone().unwrap_or_default();
                    ensure!(command.body["out"] == known, "{id}: undone with {}", command.body);
                } else {
                    ensure!(command.body == json!({"of": "$.business_key"}), "{id}: undone with {}", command.body);
                }
            }
        }
        Ok(())
    }

    fn check_state(&self) -> Checked {
        let saga = &self.saga;
        let stuck: Vec<&str> =
            saga.steps.iter().filter(|step| self.needs_operator(step)).map(|s| s.id.as_str()).collect();
        let in_time = saga.next_due.is_some();
        if saga.status.is_final() {
            ensure!(!saga.paused && !in_time && saga.cancel.is_none(), "final, and paused, due or to be cancelled");
        } else if saga.paused {
            ensure!(!in_time, "paused, and due");
        } else if saga.status == SagaStatus::Stuck {
            ensure!(!in_time, "stuck, and due");
            ensure!(!stuck.is_empty(), "stuck without a stuck step");
        } else {
            ensure!(
                stuck.is_empty() || saga.next_due <= Some(self.now) && in_time,
                "not stuck, but its steps are: {stuck:?}"
            );
            let waits = saga.steps.iter().any(|step| {
                let kept = |signal: &str| saga.signals.iter().any(|kept| kept.name == signal);
                let work = &self.definition.steps[self.place(&step.id)].work;
                let waits = matches!(work, Work::Wait { signal, timeout_ms: None } if !kept(signal));
                waits && step.status == StepStatus::Dispatched
            });
            let enlisting = saga.definition.is_none() && saga.status == SagaStatus::Running;
            ensure!(in_time || waits || enlisting, "nothing will ever wake it");
            let first = saga.steps.iter().filter_map(|step| step.due_at).min();
            ensure!(first.is_none() || saga.next_due <= first, "it sleeps past {first:?}: {:?}", saga.next_due);
        }
        for step in &saga.steps {
            let timed = matches!(
                step.status,
                StepStatus::Dispatched | StepStatus::Backoff | StepStatus::Undoing | StepStatus::UndoBackoff
            );
            let may = timed || saga.status == SagaStatus::Stuck || saga.paused || self.definition.pivot().is_some();
            ensure!(
                may || step.due_at.is_none() || step.status == StepStatus::UndoStuck,
                "{}: due, and {:?}",
                step.id,
                step.status
            );
        }
        if saga.seq % CHECK_EACH == 0 { self.check_actions() } else { Ok(()) }
    }

    fn needs_operator(&self, step: &Step) -> bool {
        let place = self.place(&step.id);
        let forward = self.saga.phase == Phase::Forward && self.definition.is_at_or_after_pivot(place);
        step.due_at.is_none()
            && match step.status {
                StepStatus::Failed => forward && !self.definition.steps[place].pivot,
                StepStatus::Unknown => forward,
                StepStatus::UndoStuck => true,
                _ => false,
            }
    }

    /// What operators are told they may do is what they may do.
    fn check_actions(&self) -> Checked {
        let allowed = allowed_actions(&self.saga, &self.definition);
        for (action, event) in [
            (Action::Cancel, Event::Cancel(by(""))),
            (Action::Pause, Event::Pause(by(""))),
            (Action::Resume, Event::Resume(by(""))),
            (Action::Retry, Event::Retry(by(""))),
            (Action::Terminate, Event::Terminate(by(""))),
        ] {
            let decided = self.decide(&event);
            ensure!(decided.is_ok() == allowed.contains(&action), "{action:?} in {allowed:?}: {decided:?}");
        }
        for step in &self.saga.steps {
            let allowed = allowed_step_actions(&self.saga, &self.definition, &step.id);
            let (id, outcome, output) = (step.id.clone(), Outcome::Succeeded, None);
            for (action, event) in [
                (Action::Retry, Event::RetryStep { step: id.clone(), by: by("") }),
                (Action::Skip, Event::SkipStep { step: id.clone(), by: by("") }),
                (Action::Resolve, Event::ResolveStep { step: id.clone(), outcome, output, by: by("") }),
            ] {
                let decided = self.decide(&event);
                ensure!(decided.is_ok() == allowed.contains(&action), "{id}: {action:?} in {allowed:?}: {decided:?}");
            }
        }
        Ok(())
    }

    /// A final saga did what it says.
    fn check_end(&self) -> Checked {
        let none = Books::default();
        for (place, step) in self.saga.steps.iter().enumerate() {
            let (id, status) = (&step.id, step.status);
            let books = self.books.get(id).unwrap_or(&none);
            let wait = matches!(self.definition.steps[place].work, Work::Wait { .. });
            let net = (books.applied, books.undone);
            let open = matches!(
                step.compensation.as_ref().map(|compensation| compensation.status),
                Some(CompensationStatus::Recorded | CompensationStatus::Ready | CompensationStatus::Sent)
            );
            ensure!(!open || self.saga.status == SagaStatus::Terminated, "{id}: its compensation is left behind");
            let right = match (self.saga.status, status) {
                (SagaStatus::Terminated, _) => true,
                (SagaStatus::Completed, StepStatus::Succeeded) => net == (1, 0) || wait,
                (SagaStatus::Completed | SagaStatus::Compensated | SagaStatus::Cancelled, StepStatus::Skipped) => {
                    net == (0, 0)
                }
                (SagaStatus::Compensated, _) if self.definition.steps[place].pivot => {
                    status == StepStatus::Failed && net == (0, 0)
                }
                (SagaStatus::Compensated, StepStatus::Undone) => net == (1, 1) || books.resolved && net == (0, 0),
                (SagaStatus::Compensated, StepStatus::UndoNoop | StepStatus::Failed) => net == (0, 0),
                (SagaStatus::Compensated, StepStatus::UndoSkipped) => true,
                (SagaStatus::Compensated, StepStatus::Succeeded) => {
                    self.definition.steps[place].undo.is_none() && (net == (1, 0) || wait)
                }
                (SagaStatus::Compensated, StepStatus::Unknown) => {
                    self.definition.steps[place].undo.is_none() && books.undone == 0
                }
                _ => false,
            };
            ensure!(right, "{id} is {status:?} in a {:?} saga: applied {}, undone {}", self.saga.status, net.0, net.1);
        }
        Ok(())
    }

    fn run(&mut self) -> Checked {
        while !self.chance.is_empty() && !self.saga.status.is_final() {
            self.happen()?;
        }
        self.chance.clear();
        self.drain()
    }

    fn story(&self) -> String {
        let step = |step: &StepDefinition| {
            let work = match &step.work {
                Work::Command(_) => "do".to_owned(),
                Work::Wait { timeout_ms, .. } => format!("wait {timeout_ms:?}"),
            };
            let (undo, tries) = (step.undo.is_some(), (step.retry.max, step.undo_retry.max));
            format!("  {} after {:?}: {work}, undo {undo}, pivot {}, tries {tries:?}", step.id, step.after, step.pivot)
        };
        let steps: Vec<String> = self.definition.steps.iter().map(step).collect();
        let state: Vec<String> =
            self.saga.steps.iter().map(|step| format!("{} {:?} due {:?}", step.id, step.status, step.due_at)).collect();
        let told = &self.log[..self.log.len().min(MOST_EVENTS_TOLD)];
        format!(
            "{}\nevents:\n{}\nnow {} {:?}: {}",
            steps.join("\n"),
            told.join("\n"),
            self.now,
            self.saga.status,
            state.join(", ")
        )
    }
}

/// The same cases each time; as many others as `PROPTEST_CASES` says, for a hunt.
fn runner() -> (TestRunner, bool) {
    let hunt = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    let cases = hunt.unwrap_or(3_000);
    let config = ProptestConfig { cases, max_shrink_iters: 3_000, failure_persistence: None, ..Default::default() };
    let runner = match hunt {
        Some(_) => TestRunner::new(config),
        None => TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha)),
    };
    (runner, hunt.is_some())
}

/// Goal: whatever happens and in whatever order, a saga ends as it should: everything done exactly once, or undone
/// exactly once in reverse order, each change along the way one that the database allows. And chance is seen to have
/// led through every one of them.
#[test]
fn sagas_keep_their_promises() {
    let seen = RefCell::new(BTreeSet::new());
    let (mut runner, hunt) = runner();
    let ran = runner.run(&case(), |case| {
        let mut world = World::new(&case);
        if let Err(why) = world.run() {
            // Once more, to tell it.
            let mut world = World { telling: true, ..World::new(&case) };
            prop_assert_eq!(world.run().err(), Some(why.clone()));
            prop_assert!(false, "{}\n{}", why, world.story());
        }
        seen.borrow_mut().append(&mut world.seen);
        Ok(())
    });
    if let Err(failed) = ran {
        panic!("{failed}");
    }
    let possible = possible();
    let never: Vec<_> = possible.difference(&seen.borrow()).cloned().collect();
    assert!(hunt || never.is_empty(), "never seen: {never:?}");
}

/// Every change that the database allows.
fn possible() -> BTreeSet<Seen> {
    let either = |was: SagaStatus, is| was.may_become(is, Phase::Forward) || was.may_become(is, Phase::Backward);
    let sagas = pairs("saga", &SagaStatus::ALL, either, SagaStatus::as_str);
    let steps = pairs("step", &StepStatus::ALL, StepStatus::may_become, StepStatus::as_str);
    let all = &CompensationStatus::ALL;
    let compensations = pairs("compensation", all, CompensationStatus::may_become, CompensationStatus::as_str);
    sagas.into_iter().chain(steps).chain(compensations).collect()
}

fn pairs<T: Copy>(
    kind: &'static str,
    all: &[T],
    may_become: impl Fn(T, T) -> bool,
    word: impl Fn(T) -> &'static str,
) -> Vec<Seen> {
    let each = all.iter().flat_map(|was| all.iter().map(move |is| (*was, *is)));
    each.filter(|(was, is)| may_become(*was, *is)).map(|(was, is)| (kind, word(was), word(is))).collect()
}
