//! The fields of a definition, each by itself. Pure.

use super::faults::{Faults, Path, shown};
use super::order::Link;
use super::{
    CommandTemplate, DEFAULT_RETRY, DEFAULT_TIMEOUT_MS, DEFAULT_UNDO_RETRY, Jitter, OnExhausted, Retry, StepDefinition,
    Work,
};
use serde_json::{Map, Value};

/// Most steps of a definition.
const STEPS_LIMIT: usize = 64;
/// Longest name, id or signal.
const NAME_LIMIT_BYTES: usize = 100;
/// Longest routing key, by AMQP.
const TOPIC_LIMIT_BYTES: usize = 255;
/// Longest duration: 365 days.
const DURATION_LIMIT_MS: i64 = 365 * 86_400_000;

/// A definition as far as its fields go; what was wrong has its default.
pub(super) struct Draft {
    pub(super) name: String,
    pub(super) version: i32,
    pub(super) deadline_ms: Option<i64>,
    pub(super) steps: Vec<DraftStep>,
}

/// A step as far as its fields go.
pub(super) struct DraftStep {
    /// Its `after` is empty yet.
    pub(super) step: StepDefinition,
    /// As given.
    after: Option<Vec<String>>,
    /// Whether it could be read.
    after_known: bool,
}

impl DraftStep {
    /// What it says of its place.
    pub(super) fn link(&self) -> Link<'_> {
        Link { id: &self.step.id, after: self.after.as_deref(), known: self.after_known }
    }
}

/// Reads the whole document.
pub(super) fn definition(document: &Value, faults: &mut Faults) -> Draft {
    let path = Path::ROOT;
    let fields = Fields::of(document, &path, &["name", "version", "deadline", "steps"], faults);
    let mut draft = Draft {
        name: fields.required("name", faults, name).unwrap_or_default(),
        version: fields
            .required("version", faults, |value, path, faults| integer(value, path, i32::MAX, faults))
            .unwrap_or_default(),
        deadline_ms: fields.optional("deadline", faults, duration),
        steps: Vec::new(),
    };
    let path = path.field("steps");
    match fields.given("steps") {
        Some(Value::Array(items)) => {
            if items.is_empty() || items.len() > STEPS_LIMIT {
                faults.add(&path, format!("{} steps: there are 1 to {STEPS_LIMIT}", items.len()));
            }
            // What is beyond the limit is not looked at: it would cost time without bound.
            let steps = items.iter().take(STEPS_LIMIT).enumerate();
            draft.steps = steps.map(|(place, item)| step(item, &path.place(place), faults)).collect();
        }
        Some(other) => faults.add(&path, format!("{} is no list of steps", shown(other))),
        None => fields.missing("steps", faults),
    }
    draft
}

fn step(value: &Value, path: &Path<'_>, faults: &mut Faults) -> DraftStep {
    let known = ["id", "after", "pivot", "do", "wait", "undo", "timeout", "retry", "undo_retry"];
    let fields = Fields::of(value, path, &known, faults);
    let id = fields.required("id", faults, name).unwrap_or_default();
    let before = faults.count();
    let after = fields.optional("after", faults, ids);
    let after_known = fields.map.is_some() && faults.count() == before;
    let (work, waits) = work(&fields, faults);
    if waits {
        for (field, why) in [
            ("undo", "a wait has nothing to undo"),
            ("undo_retry", "a wait has nothing to undo"),
            ("retry", "a wait is not repeated"),
            ("timeout", "the timeout of a wait stands in `wait`"),
        ] {
            if fields.given(field).is_some() {
                faults.add(&path.field(field), why);
            }
        }
    }
    let pivot = fields.optional("pivot", faults, boolean).unwrap_or_default();
    if pivot && waits {
        faults.add(&path.field("pivot"), "a wait cannot be the pivot: it does nothing that could not be undone");
    }
    let timeout_ms = fields.optional("timeout", faults, duration).unwrap_or(DEFAULT_TIMEOUT_MS);
    let retry_of =
        |value: &Value, path: &Path<'_>, faults: &mut Faults| retry(value, path, DEFAULT_RETRY, false, faults).0;
    let undo_retry_of =
        |value: &Value, path: &Path<'_>, faults: &mut Faults| retry(value, path, DEFAULT_UNDO_RETRY, true, faults);
    let retry = fields.optional("retry", faults, retry_of).unwrap_or(DEFAULT_RETRY);
    let undo = fields.optional("undo", faults, command);
    let undo_retry = fields.optional("undo_retry", faults, undo_retry_of);
    let (undo_retry, on_undo_exhausted) = undo_retry.unwrap_or((DEFAULT_UNDO_RETRY, OnExhausted::Stuck));
    let step =
        StepDefinition { id, after: Vec::new(), work, pivot, timeout_ms, retry, undo, undo_retry, on_undo_exhausted };
    DraftStep { step, after, after_known }
}

/// What it does, and whether that is a wait alone.
fn work(fields: &Fields<'_>, faults: &mut Faults) -> (Work, bool) {
    let nothing = || Work::Command(CommandTemplate { topic: String::new(), body: Value::Null });
    let done = fields.optional("do", faults, command);
    let wait = fields.optional("wait", faults, |value, path, faults| {
        let fields = Fields::of(value, path, &["signal", "timeout"], faults);
        let signal = fields.required("signal", faults, name).unwrap_or_default();
        Work::Wait { signal, timeout_ms: fields.optional("timeout", faults, duration) }
    });
    match (done, wait) {
        (Some(command), None) => (Work::Command(command), false),
        (None, Some(wait)) => (wait, true),
        (Some(command), Some(_)) => {
            faults.add(&fields.path.field("wait"), "a step has `do` or `wait`, not both");
            (Work::Command(command), false)
        }
        (None, None) => {
            if fields.map.is_some() {
                faults.add(fields.path, "a step has `do` or `wait`");
            }
            (nothing(), false)
        }
    }
}

fn command(value: &Value, path: &Path<'_>, faults: &mut Faults) -> CommandTemplate {
    let fields = Fields::of(value, path, &["topic", "body"], faults);
    CommandTemplate {
        topic: fields.required("topic", faults, topic).unwrap_or_default(),
        body: fields.given("body").cloned().unwrap_or_else(|| Value::Object(Map::new())),
    }
}

fn retry(value: &Value, path: &Path<'_>, default: Retry, of_undo: bool, faults: &mut Faults) -> (Retry, OnExhausted) {
    let known = ["max", "initial", "factor", "cap", "jitter", "on_exhausted"];
    let fields = Fields::of(value, path, if of_undo { &known } else { &known[..5] }, faults);
    let retry = Retry {
        max: fields
            .optional("max", faults, |value, path, faults| integer(value, path, 1_000, faults))
            .unwrap_or(default.max),
        initial_ms: fields.optional("initial", faults, duration).unwrap_or(default.initial_ms),
        factor: fields.optional("factor", faults, factor).unwrap_or(default.factor),
        cap_ms: fields.optional("cap", faults, duration).unwrap_or(default.cap_ms),
        jitter: fields
            .optional("jitter", faults, |value, path, faults| {
                one_of(value, path, &[("full", Jitter::Full), ("none", Jitter::None)], faults)
            })
            .unwrap_or(default.jitter),
    };
    if retry.cap_ms < retry.initial_ms {
        match fields.given("cap") {
            Some(_) => faults.add(&path.field("cap"), "is shorter than `initial`"),
            None => faults.add(&path.field("initial"), "is longer than `cap`, which is 1m where it is left out"),
        }
    }
    let exhausted = fields
        .optional("on_exhausted", faults, |value, path, faults| {
            one_of(value, path, &[("stuck", OnExhausted::Stuck), ("skip", OnExhausted::Skip)], faults)
        })
        .filter(|_| of_undo);
    (retry, exhausted.unwrap_or(OnExhausted::Stuck))
}

/// The fields of an object; of none when it is no object.
struct Fields<'a> {
    map: Option<&'a Map<String, Value>>,
    path: &'a Path<'a>,
}

impl<'a> Fields<'a> {
    fn of(value: &'a Value, path: &'a Path<'a>, known: &[&str], faults: &mut Faults) -> Self {
        let map = value.as_object();
        match map {
            Some(map) => {
                for name in map.keys().filter(|name| !known.contains(&name.as_str())) {
                    faults.add(&path.field(name), format!("unknown field: there are {}", known.join(", ")));
                }
            }
            None => faults.add(path, format!("{} is no object", shown(value))),
        }
        Self { map, path }
    }

    fn given(&self, name: &str) -> Option<&'a Value> {
        self.map?.get(name)
    }

    fn optional<T>(
        &self,
        name: &str,
        faults: &mut Faults,
        read: impl FnOnce(&Value, &Path<'_>, &mut Faults) -> T,
    ) -> Option<T> {
        self.given(name).map(|value| read(value, &self.path.field(name), faults))
    }

    fn required<T>(
        &self,
        name: &str,
        faults: &mut Faults,
        read: impl FnOnce(&Value, &Path<'_>, &mut Faults) -> T,
    ) -> Option<T> {
        if self.given(name).is_none() {
            self.missing(name, faults);
        }
        self.optional(name, faults, read)
    }

    fn missing(&self, name: &str, faults: &mut Faults) {
        if self.map.is_some() {
            faults.add(&self.path.field(name), "is missing");
        }
    }
}

/// As it stands even if it is wrong, so that what refers to it is not wrong too.
fn name(value: &Value, path: &Path<'_>, faults: &mut Faults) -> String {
    let text = value.as_str().unwrap_or_default();
    let valid = (1..=NAME_LIMIT_BYTES).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if !valid {
        let rule = "1 to 100 letters, digits, dots, dashes or underscores, beginning with a letter or digit";
        faults.add(path, format!("{} is no name: {rule}", shown(value)));
    }
    text.to_owned()
}

/// Those that are no ids are empty.
fn ids(value: &Value, path: &Path<'_>, faults: &mut Faults) -> Vec<String> {
    match value {
        // Steps have so many others at most.
        Value::Array(items) if items.len() < STEPS_LIMIT => {
            let id = |(place, item): (usize, &Value)| match item.as_str() {
                Some(id) if !id.is_empty() => id.to_owned(),
                _ => {
                    faults.add(&path.place(place), format!("{} is no id of a step", shown(item)));
                    String::new()
                }
            };
            items.iter().enumerate().map(id).collect()
        }
        Value::Array(items) => {
            faults.add(path, format!("{} ids: a step has {} others at most", items.len(), STEPS_LIMIT - 1));
            Vec::new()
        }
        other => {
            faults.add(path, format!("{} is no list of ids", shown(other)));
            Vec::new()
        }
    }
}

fn topic(value: &Value, path: &Path<'_>, faults: &mut Faults) -> String {
    let text = value.as_str().unwrap_or_default();
    if !(1..=TOPIC_LIMIT_BYTES).contains(&text.len()) || text.contains('\0') {
        faults.add(path, format!("{} is no topic: 1 to {TOPIC_LIMIT_BYTES} bytes without NUL", shown(value)));
    } else if text.split('.').any(|word| matches!(word, "*" | "#")) {
        faults.add(path, format!("{} is a pattern: a command goes to one topic", shown(value)));
    }
    text.to_owned()
}

fn integer(value: &Value, path: &Path<'_>, most: i32, faults: &mut Faults) -> i32 {
    let number = value.as_i64().and_then(|number| i32::try_from(number).ok());
    number.filter(|number| (1..=most).contains(number)).unwrap_or_else(|| {
        faults.add(path, format!("{} is no whole number from 1 to {most}", shown(value)));
        1
    })
}

fn factor(value: &Value, path: &Path<'_>, faults: &mut Faults) -> f64 {
    value.as_f64().filter(|factor| (1.0..=100.0).contains(factor)).unwrap_or_else(|| {
        faults.add(path, format!("{} is no number from 1 to 100", shown(value)));
        1.0
    })
}

fn boolean(value: &Value, path: &Path<'_>, faults: &mut Faults) -> bool {
    value.as_bool().unwrap_or_else(|| {
        faults.add(path, format!("{} is neither true nor false", shown(value)));
        false
    })
}

fn one_of<T: Copy>(value: &Value, path: &Path<'_>, words: &[(&str, T)], faults: &mut Faults) -> T {
    let found = words.iter().find(|(word, _)| value.as_str() == Some(word));
    found
        .unwrap_or_else(|| {
            let list = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
            faults.add(path, format!("{} is none of {list}", shown(value)));
            &words[0]
        })
        .1
}

/// A number and a unit: `500ms`, `30s`, `5m`, `24h`, `7d`.
fn duration(value: &Value, path: &Path<'_>, faults: &mut Faults) -> i64 {
    let parsed = value.as_str().and_then(|text| {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let unit_ms = match &text[digits..] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        text[..digits].parse::<i64>().ok()?.checked_mul(unit_ms)
    });
    parsed.filter(|ms| (1..=DURATION_LIMIT_MS).contains(ms)).unwrap_or_else(|| {
        faults.add(path, format!("{} is no duration from 1ms to 365d: write 500ms, 30s, 5m, 24h or 7d", shown(value)));
        1
    })
}
