//! A document → a definition, or everything that is wrong with it. Pure.
//!
//! Three rounds over the document: the fields of each step by themselves, which step comes before which, and what
//! depends on that: the pivot and the references. A field that is wrong counts as its default, so that its neighbours
//! are still looked at; what depends on an `after` that is wrong is not guessed at.

use super::faults::{Fault, Faults, Path, shown};
use super::fields::{self, Draft};
use super::order::{Link, Links};
use super::{CommandTemplate, Definition, StepDefinition, Work};
use crate::saga::template::{self, Reference};
use serde_json::Value;
use std::collections::HashMap;

/// Deepest body: what a participant can be expected to read, and far from where recursion hurts.
const BODY_DEPTH_LIMIT: usize = 32;

impl Definition {
    /// The definition that `document` holds, defaults filled in and the steps in an order.
    ///
    /// # Errors
    /// Everything that is wrong with it, in the order of the document.
    pub fn parse(document: &Value) -> Result<Self, Vec<Fault>> {
        let mut faults = Faults::default();
        let draft = fields::definition(document, &mut faults);
        let links: Vec<Link<'_>> = draft.steps.iter().map(fields::DraftStep::link).collect();
        let links = Links::of(&links, &mut faults);
        if let Some(pivot) = one_pivot(&draft, &mut faults) {
            pivot_divides(&draft, &links, pivot, &mut faults);
        }
        signals_once(&draft, &mut faults);
        references(&draft, &links, &mut faults);
        faults.unless_any((), document).map(|()| ordered(draft, &links))
    }
}

/// `links` has no cycle.
fn ordered(draft: Draft, links: &Links) -> Definition {
    let order = links.order();
    let mut place_of = vec![0; order.len()];
    for (place, in_document) in order.iter().enumerate() {
        place_of[*in_document] = place;
    }
    let step = |in_document: &usize| {
        let mut after: Vec<usize> = links.after(*in_document).iter().map(|earlier| place_of[*earlier]).collect();
        after.sort_unstable();
        StepDefinition { after, ..draft.steps[*in_document].step.clone() }
    };
    Definition {
        steps: order.iter().map(step).collect(),
        name: draft.name,
        version: draft.version,
        deadline_ms: draft.deadline_ms,
    }
}

/// The pivot's place if there is one alone.
fn one_pivot(draft: &Draft, faults: &mut Faults) -> Option<usize> {
    let steps = Path::ROOT.field("steps");
    let pivots: Vec<usize> = (0..draft.steps.len()).filter(|place| draft.steps[*place].step.pivot).collect();
    let first = *pivots.first()?;
    let name = &draft.steps[first].step.id;
    for place in &pivots[1..] {
        faults.add(&steps.place(*place).field("pivot"), format!("\"{name}\" is the pivot, and there is one at most"));
    }
    (pivots.len() == 1).then_some(first)
}

fn signals_once(draft: &Draft, faults: &mut Faults) {
    let steps = Path::ROOT.field("steps");
    let mut waiting: HashMap<&str, &str> = HashMap::new();
    for (place, draft) in draft.steps.iter().enumerate() {
        let Work::Wait { signal, .. } = &draft.step.work else { continue };
        if signal.is_empty() {
            continue;
        }
        match waiting.get(signal.as_str()) {
            Some(first) => faults.add(
                &steps.place(place).field("wait").field("signal"),
                format!("\"{first}\" waits for \"{signal}\" already, and a signal is taken once"),
            ),
            None => drop(waiting.insert(signal, &draft.step.id)),
        }
    }
}

/// What is done after the pivot stays done, so nothing there has an undo; and a step beside the pivot could neither be
/// undone for sure nor kept for sure.
fn pivot_divides(draft: &Draft, links: &Links, pivot: usize, faults: &mut Faults) {
    let (before_pivot, pivot_known) = links.ancestors(pivot);
    let name = &draft.steps[pivot].step.id;
    let steps = Path::ROOT.field("steps");
    for (place, draft) in draft.steps.iter().enumerate() {
        let path = steps.place(place);
        let (before, known) = links.ancestors(place);
        let beyond = place == pivot || before[pivot];
        if beyond && draft.step.undo.is_some() {
            let which = if place == pivot { "the pivot" } else { "a step after the pivot" };
            faults.add(&path.field("undo"), format!("{which} is never undone"));
        }
        if !beyond && !before_pivot[place] && known && pivot_known {
            let detail = format!("is unordered: neither before nor after the pivot \"{name}\" (add it to an `after`)");
            faults.add(&path, detail);
        }
    }
}

fn references(draft: &Draft, links: &Links, faults: &mut Faults) {
    let steps = Path::ROOT.field("steps");
    for (place, draft_step) in draft.steps.iter().enumerate() {
        let step = &draft_step.step;
        let path = steps.place(place);
        let (before, known) = links.ancestors(place);
        let allowed = |named: &str, own: bool| -> Result<(), String> {
            if named == step.id {
                return if own { Ok(()) } else { Err("a step's own output is not there before it is done".into()) };
            }
            match draft.steps.iter().position(|other| other.step.id == named) {
                None => Err(format!("there is no step \"{named}\"")),
                Some(other) if known && !before[other] => {
                    Err(format!("\"{named}\" does not come before this step: its output may not be there"))
                }
                Some(_) => Ok(()),
            }
        };
        let mut check = |command: &CommandTemplate, field: &str, own: bool| {
            let path = path.field(field);
            body(&command.body, &path.field("body"), 0, &|named| allowed(named, own), faults);
        };
        if let Work::Command(command) = &step.work {
            check(command, "do", false);
        }
        if let Some(undo) = &step.undo {
            check(undo, "undo", true);
        }
    }
}

/// Looks at every string of a body.
fn body(
    value: &Value,
    path: &Path<'_>,
    depth: usize,
    allowed: &dyn Fn(&str) -> Result<(), String>,
    faults: &mut Faults,
) {
    let nul = |text: &str| text.contains('\0');
    match value {
        Value::Array(_) | Value::Object(_) if depth == BODY_DEPTH_LIMIT => {
            faults.add(path, format!("a body is at most {BODY_DEPTH_LIMIT} deep"));
        }
        Value::Array(items) => {
            for (place, item) in items.iter().enumerate() {
                body(item, &path.place(place), depth + 1, allowed, faults);
            }
        }
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = path.field(name);
                if nul(name) {
                    faults.add(&path, "a NUL character cannot be stored");
                }
                body(value, &path, depth + 1, allowed, faults);
            }
        }
        Value::String(text) => {
            if nul(text) {
                faults.add(path, "a NUL character cannot be stored");
            }
            let found = template::reference(text).map(|found| match found? {
                Reference::Output { step, .. } => allowed(&step),
                _ => Ok(()),
            });
            if let Some(Err(why)) = found {
                faults.add(path, format!("{} is no reference: {why}", shown(value)));
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use proptest::prelude::*;
    use proptest::sample::Index;
    use serde_json::json;

    const ORDER: &str = include_str!("../../../docs/examples/order.yaml");

    fn order() -> Value {
        document_from_text(ORDER).expect("a document")
    }

    /// Faults as `pointer: detail`.
    fn faults(document: &Value) -> Vec<String> {
        Definition::parse(document).err().unwrap_or_default().iter().map(Fault::to_string).collect()
    }

    /// The faults of a definition with these steps, in YAML.
    fn faults_of_steps(steps: &str) -> Vec<String> {
        faults(&document_from_text(&format!("{{name: d, version: 1, steps: [{steps}]}}")).expect("a document"))
    }

    /// The document that parses to `definition`, everything written out.
    fn print(definition: &Definition) -> Value {
        let duration = |ms: i64| {
            let units = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
            let (unit, length) = units.into_iter().find(|(_, length)| ms % length == 0).expect("1 divides");
            json!(format!("{}{unit}", ms / length))
        };
        let retry = |retry: &Retry| {
            json!({
                "max": retry.max, "initial": duration(retry.initial_ms), "factor": retry.factor,
                "cap": duration(retry.cap_ms), "jitter": if retry.jitter == Jitter::Full { "full" } else { "none" },
            })
        };
        let command = |command: &CommandTemplate| json!({"topic": command.topic, "body": command.body});
        let step = |step: &StepDefinition| {
            let after: Vec<&str> = step.after.iter().map(|place| definition.steps[*place].id.as_str()).collect();
            let mut document = json!({"id": step.id, "after": after, "pivot": step.pivot});
            match &step.work {
                Work::Wait { signal, timeout_ms } => {
                    document["wait"] = json!({"signal": signal});
                    if let Some(ms) = timeout_ms {
                        document["wait"]["timeout"] = duration(*ms);
                    }
                }
                Work::Command(work) => {
                    document["do"] = command(work);
                    document["timeout"] = duration(step.timeout_ms);
                    document["retry"] = retry(&step.retry);
                    document["undo_retry"] = retry(&step.undo_retry);
                    let skip = step.on_undo_exhausted == OnExhausted::Skip;
                    document["undo_retry"]["on_exhausted"] = json!(if skip { "skip" } else { "stuck" });
                    if let Some(undo) = &step.undo {
                        document["undo"] = command(undo);
                    }
                }
            }
            document
        };
        let steps: Vec<Value> = definition.steps.iter().map(step).collect();
        let mut document = json!({"name": definition.name, "version": definition.version, "steps": steps});
        if let Some(ms) = definition.deadline_ms {
            document["deadline"] = duration(ms);
        }
        document
    }

    /// Goal: the example of the documentation is a definition, with every default of the documentation.
    #[test]
    fn the_example_is_a_definition() {
        let definition = Definition::parse(&order()).expect("valid");
        assert_eq!((definition.name.as_str(), definition.version), ("order", 2));
        assert_eq!(definition.deadline_ms, Some(2 * 86_400_000));
        let ids: Vec<&str> = definition.steps.iter().map(|step| step.id.as_str()).collect();
        assert_eq!(ids, ["reserve", "approve", "charge", "ship", "thank"]);
        let afters: Vec<&[usize]> = definition.steps.iter().map(|step| step.after.as_slice()).collect();
        assert_eq!(afters, [&[][..], &[0], &[1], &[2], &[2]]);
        assert_eq!(definition.pivot(), Some(2));
        let wait = Work::Wait { signal: "approved".into(), timeout_ms: Some(86_400_000) };
        assert_eq!(definition.steps[1].work, wait);
        for step in &definition.steps {
            assert_eq!((step.retry, step.undo_retry), (DEFAULT_RETRY, DEFAULT_UNDO_RETRY));
            assert_eq!(step.on_undo_exhausted, OnExhausted::Stuck);
            assert_eq!(step.timeout_ms, if step.id == "ship" { 3_600_000 } else { 30_000 });
        }
        let retry = Retry { max: 5, initial_ms: 1_000, factor: 2.0, cap_ms: 60_000, jitter: Jitter::Full };
        assert_eq!((DEFAULT_RETRY, DEFAULT_UNDO_RETRY), (retry, Retry { max: 20, ..retry }));
    }

    /// Goal: what is left out has its default, also a body, and other fields of a retry.
    #[test]
    fn what_is_left_out_has_its_default() {
        let document = json!({"name": "d", "version": 2147483647, "steps": [
            {"id": "a", "do": {"topic": "t"}, "retry": {"max": 1}, "undo": {"topic": "u"},
             "undo_retry": {"initial": "2s", "on_exhausted": "skip"}},
            {"id": "b", "wait": {"signal": "s"}},
        ]});
        let definition = Definition::parse(&document).expect("valid");
        assert_eq!(definition.deadline_ms, None);
        let step = &definition.steps[0];
        assert_eq!(step.work, Work::Command(CommandTemplate { topic: "t".into(), body: json!({}) }));
        assert_eq!(step.undo, Some(CommandTemplate { topic: "u".into(), body: json!({}) }));
        assert_eq!(step.retry, Retry { max: 1, ..DEFAULT_RETRY });
        assert_eq!(step.undo_retry, Retry { initial_ms: 2_000, ..DEFAULT_UNDO_RETRY });
        assert_eq!(step.on_undo_exhausted, OnExhausted::Skip);
        assert_eq!(definition.steps[1].work, Work::Wait { signal: "s".into(), timeout_ms: None });
        assert_eq!(definition.steps[1].after, [0]);
    }

    /// Goal: each field has its limits, said at its pointer; what lies just within them is taken.
    #[test]
    fn fields_have_limits() {
        let long = "n".repeat(101);
        let wide = "t".repeat(256);
        let cases = [
            ("/name", json!("-a"), "\"-a\" is no name"),
            ("/name", json!("a b"), "is no name"),
            ("/name", json!(""), "is no name"),
            ("/name", json!("ä"), "is no name"),
            ("/name", json!(7), "7 is no name"),
            ("/name", json!(long), "is no name"),
            ("/version", json!(0), "0 is no whole number from 1 to 2147483647"),
            ("/version", json!(2_147_483_648i64), "is no whole number"),
            ("/version", json!(1.5), "is no whole number"),
            ("/version", json!("1"), "\"1\" is no whole number"),
            ("/deadline", json!("0s"), "is no duration"),
            ("/deadline", json!("366d"), "is no duration"),
            ("/deadline", json!("5 m"), "is no duration"),
            ("/deadline", json!("-5m"), "is no duration"),
            ("/deadline", json!("1.5h"), "is no duration"),
            ("/deadline", json!("99999999999999999999d"), "is no duration"),
            ("/deadline", json!("9223372036854775807d"), "is no duration"),
            ("/deadline", json!(5), "5 is no duration"),
            ("/deadline", json!(null), "null is no duration"),
            ("/steps", json!([]), "0 steps: there are 1 to 64"),
            ("/steps", json!({}), "an object is no list of steps"),
            ("/steps/0", json!("reserve"), "\"reserve\" is no object"),
            ("/steps/0/id", json!("a/b"), "is no name"),
            ("/steps/0/pivot", json!("yes"), "neither true nor false"),
            ("/steps/0/timeout", json!("soon"), "is no duration"),
            ("/steps/0/do", json!("stock.reserve"), "is no object"),
            ("/steps/0/do/topic", json!(""), "is no topic"),
            ("/steps/0/do/topic", json!(wide), "is no topic"),
            ("/steps/0/do/topic", json!("a\0b"), "is no topic"),
            ("/steps/0/do/topic", json!("a.*.b"), "is a pattern"),
            ("/steps/0/do/topic", json!("#"), "is a pattern"),
            ("/steps/0/undo/topic", json!("a.#"), "is a pattern"),
            ("/steps/0/do/body", json!({"a/b~": ["a\0"]}), "a NUL character cannot be stored"),
            ("/steps/0/do/body", json!({"a\0": 1}), "a NUL character cannot be stored"),
            ("/steps/0/retry/max", json!(0), "is no whole number from 1 to 1000"),
            ("/steps/0/retry/max", json!(1001), "is no whole number from 1 to 1000"),
            ("/steps/0/retry/factor", json!(0.9), "is no number from 1 to 100"),
            ("/steps/0/retry/factor", json!(101), "is no number from 1 to 100"),
            ("/steps/0/retry/cap", json!("500ms"), "is shorter than `initial`"),
            ("/steps/0/retry/jitter", json!("half"), "is none of full, none"),
            ("/steps/0/retry/on_exhausted", json!("stuck"), "unknown field"),
            ("/steps/0/undo_retry/on_exhausted", json!("fail"), "is none of stuck, skip"),
            ("/steps/0/undo_retry/initial", json!("2m"), "is longer than `cap`, which is 1m"),
            ("/steps/1/wait/signal", json!("a b"), "is no name"),
            ("/steps/1/wait/timeout", json!("never"), "is no duration"),
            ("/steps/1/after", json!("reserve"), "is no list of ids"),
            ("/steps/1/after", json!([7, ""]), "7 is no id"),
            ("/steps/1/after", json!(vec!["reserve"; 64]), "64 ids"),
        ];
        for (pointer, value, detail) in cases {
            let mut document = order();
            set(&mut document, pointer, value);
            let found = Definition::parse(&document).expect_err(pointer);
            let expected = found.iter().find(|fault| fault.pointer.starts_with(pointer)).expect(pointer);
            assert!(expected.detail.contains(detail), "{pointer}: {found:?}");
        }
        for (pointer, value) in [
            ("/name", json!("n".repeat(100))),
            ("/name", json!("0._-a")),
            ("/version", json!(2_147_483_647)),
            ("/deadline", json!("365d")),
            ("/deadline", json!("1ms")),
            ("/steps/0/do/topic", json!("t".repeat(255))),
            ("/steps/0/do/topic", json!("a*b.#c")),
            ("/steps/0/do/body", json!(null)),
            ("/steps/0/retry/max", json!(1000)),
            ("/steps/0/retry/factor", json!(100)),
            ("/steps/0/retry/factor", json!(1)),
            ("/steps/0/retry/cap", json!("1s")),
            ("/steps/1/pivot", json!(false)),
        ] {
            let mut document = order();
            set(&mut document, pointer, value);
            assert_eq!(faults(&document), Vec::<String>::new(), "{pointer}");
        }
    }

    /// Sets what a pointer leads to; its last part may be new.
    fn set(document: &mut Value, pointer: &str, value: Value) {
        let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
        match document.pointer_mut(parent).expect("a parent") {
            Value::Array(items) => items[name.parse::<usize>().expect("a place")] = value,
            object => object[name] = value,
        }
    }

    /// Goal: unknown fields are refused at every level, and missing ones are pointed to.
    #[test]
    fn fields_are_known_and_there() {
        let objects =
            ["", "/steps/0", "/steps/0/do", "/steps/0/undo", "/steps/0/retry", "/steps/0/undo_retry", "/steps/1/wait"];
        for object in objects {
            let mut document = order();
            document.pointer_mut(object).expect(object)["a/b~c"] = json!(1);
            let found = Definition::parse(&document).expect_err(object);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].pointer, format!("{object}/a~1b~0c"));
            assert!(found[0].detail.starts_with("unknown field: there are "), "{found:?}");
        }
        assert_eq!(faults(&json!({})), ["/name: is missing", "/version: is missing", "/steps: is missing"]);
        assert_eq!(faults(&json!([])), ["a list is no object"]);
        let found = faults_of_steps("{id: a}, {do: {}}, {id: c, wait: {}}, {id: d, do: {topic: t}, wait: {signal: s}}");
        assert_eq!(
            found,
            [
                "/steps/0: a step has `do` or `wait`",
                "/steps/1/id: is missing",
                "/steps/1/do/topic: is missing",
                "/steps/2/wait/signal: is missing",
                "/steps/3/wait: a step has `do` or `wait`, not both",
            ]
        );
    }

    /// Goal: a wait has nothing of a command's, and is no pivot.
    #[test]
    fn waits_have_nothing_of_a_command() {
        let found = faults_of_steps(
            "{id: a, wait: {signal: s}, undo: {topic: u}, undo_retry: {max: 1}, retry: {max: 1}, timeout: 1s, pivot: true}",
        );
        let pointers: Vec<&str> = found.iter().filter_map(|fault| fault.split(':').next()).collect();
        let fields = ["pivot", "timeout", "retry", "undo", "undo_retry"].map(|field| format!("/steps/0/{field}"));
        pointers.iter().for_each(|pointer| assert!(fields.contains(&(*pointer).to_owned()), "{found:?}"));
        fields.iter().for_each(|field| assert!(pointers.contains(&field.as_str()), "{field}: {found:?}"));
    }

    /// Goal: a signal is taken once, so one step waits for it.
    #[test]
    fn one_step_waits_for_a_signal() {
        let found =
            faults_of_steps("{id: a, wait: {signal: s}}, {id: b, wait: {signal: s}}, {id: c, wait: {signal: r}}");
        assert_eq!(found, ["/steps/1/wait/signal: \"a\" waits for \"s\" already, and a signal is taken once"]);
    }

    /// Goal: ids are unique and `after` names others, each once; later ones too.
    #[test]
    fn after_names_other_steps() {
        let found = faults_of_steps(
            "{id: a, after: [b, a, x, b], do: {topic: t}}, {id: b, after: [], do: {topic: t}}, {id: b, do: {topic: t}}",
        );
        assert_eq!(
            found,
            [
                "/steps/0/after/1: a step cannot wait for itself",
                "/steps/0/after/2: there is no step \"x\"",
                "/steps/0/after/3: \"b\" is given twice",
                "/steps/2/id: another step has the id \"b\"",
            ]
        );
        let steps = |texts: &str| {
            let text = format!("{{name: d, version: 1, steps: [{texts}]}}");
            let definition = Definition::parse(&document_from_text(&text).expect("a document")).expect("valid");
            definition.steps.iter().map(|step| (step.id.clone(), step.after.clone())).collect::<Vec<_>>()
        };
        let step = |id: &str, after: &[usize]| (id.to_owned(), after.to_vec());
        let do_it = "do: {topic: t}";
        assert_eq!(
            steps(&format!(
                "{{id: a, after: [d, c], {do_it}}}, {{id: b, {do_it}}}, {{id: c, after: [], {do_it}}}, {{id: d, {do_it}}}"
            )),
            [step("c", &[]), step("d", &[0]), step("a", &[0, 1]), step("b", &[2])]
        );
    }

    /// Goal: each cycle is named once, in the direction of waiting; what hangs on one is not blamed.
    #[test]
    fn cycles_are_named() {
        let found = faults_of_steps(
            "{id: a, after: [c], do: {topic: t}}, {id: b, do: {topic: t}}, {id: c, do: {topic: t}}, {id: d, do: {topic: t}}, \
             {id: e, after: [f], do: {topic: t}}, {id: f, after: [e, a], do: {topic: t}}",
        );
        assert_eq!(
            found,
            [
                "/steps/0/after: a cycle: \"a\" waits for \"c\" waits for \"b\" waits for \"a\"",
                "/steps/4/after: a cycle: \"e\" waits for \"f\" waits for \"e\"",
            ]
        );
    }

    /// Goal: one pivot at most, no undo at it or after it, and no step beside it.
    #[test]
    fn the_pivot_divides() {
        let found = faults_of_steps(
            "{id: a, do: {topic: t}, undo: {topic: u}}, {id: p, pivot: true, do: {topic: t}, undo: {topic: u}}, \
             {id: c, do: {topic: t}, undo: {topic: u}}, {id: d, after: [a], do: {topic: t}, undo: {topic: u}}",
        );
        assert_eq!(
            found,
            [
                "/steps/1/undo: the pivot is never undone",
                "/steps/2/undo: a step after the pivot is never undone",
                "/steps/3: is unordered: neither before nor after the pivot \"p\" (add it to an `after`)",
            ]
        );
        let found = faults_of_steps("{id: p, pivot: true, do: {topic: t}}, {id: q, pivot: true, do: {topic: t}}");
        assert_eq!(found, ["/steps/1/pivot: \"p\" is the pivot, and there is one at most"]);
    }

    /// Goal: a body names outputs that are there for sure, and only an undo its own step's.
    #[test]
    fn references_name_what_is_there() {
        let found = faults_of_steps(
            "{id: a, do: {topic: t, body: [$.steps.a.output, $.steps.b.output, $.steps.x.output.y, $.inptu, {k: $.steps.a}]}, \
                     undo: {topic: u, body: [$.steps.a.output.id, $.steps.b.output, $.input.x, $$.anything, $.labels.a]}}, \
             {id: b, do: {topic: t, body: $.steps.a.output}}, \
             {id: c, after: [a], do: {topic: t, body: {'a/b': $.steps.b.output, c: $.steps.a.output}}}",
        );
        let expected = [
            ("/steps/0/do/body/0", "a step's own output is not there"),
            ("/steps/0/do/body/1", "\"b\" does not come before this step"),
            ("/steps/0/do/body/2", "there is no step \"x\""),
            ("/steps/0/do/body/3", "\"inptu\" is none of"),
            ("/steps/0/do/body/4/k", "of a step there is"),
            ("/steps/0/undo/body/1", "\"b\" does not come before this step"),
            ("/steps/2/do/body/a~1b", "\"b\" does not come before this step"),
        ];
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (fault, (pointer, detail)) in found.iter().zip(expected) {
            assert!(fault.starts_with(&format!("{pointer}: ")) && fault.contains(detail), "{fault}");
        }
    }

    /// Goal: a body is as deep as its limit and no deeper.
    #[test]
    fn bodies_have_a_depth() {
        let nested = |depth: usize| (0..depth).fold(json!(1), |inner, _| json!([inner]));
        let mut document = order();
        document["steps"][0]["do"]["body"] = nested(32);
        assert_eq!(faults(&document), Vec::<String>::new());
        document["steps"][0]["do"]["body"] = nested(33);
        assert_eq!(faults(&document), [format!("/steps/0/do/body{}: a body is at most 32 deep", "/0".repeat(32))]);
    }

    /// Goal: 64 steps and no more.
    #[test]
    fn steps_have_a_number() {
        let steps = |number: usize| {
            let step = |place| json!({"id": format!("s{place}"), "do": {"topic": "t"}});
            json!({"name": "d", "version": 1, "steps": (0..number).map(step).collect::<Vec<_>>()})
        };
        assert_eq!(faults(&steps(64)), Vec::<String>::new());
        assert_eq!(faults(&steps(65)), ["/steps: 65 steps: there are 1 to 64"]);
    }

    /// Goal: all faults of all kinds come at once, in the order of the document, and one does not hide another.
    #[test]
    fn faults_come_at_once_in_order() {
        let found = faults(&json!({
            "colour": "red", "version": 0, "name": "a b", "deadline": "1y",
            "steps": [
                {"undo": {"topic": "u", "bdy": 1}, "timeout": "x", "id": "a", "after": ["gone"], "do": {"topic": ""}},
                {"id": "b", "do": {"topic": "t", "body": "$.steps.c.output"}},
                {"id": "c", "after": ["d"], "do": {"topic": "t"}, "retry": {"max": 0}},
                {"id": "d", "wait": {"signal": "s"}},
                {"id": "e", "after": [], "pivot": true, "do": {"topic": "t"}, "undo": {"topic": "u"}},
                {"id": "f", "after": [], "do": {"topic": "t"}},
            ],
        }));
        let pointers: Vec<&str> = found.iter().filter_map(|fault| fault.split(": ").next()).collect();
        assert_eq!(
            pointers,
            [
                "/name",
                "/version",
                "/deadline",
                "/steps/0/after/0",
                "/steps/0/do/topic",
                "/steps/0/timeout",
                "/steps/0/undo/bdy",
                "/steps/2",
                "/steps/2/after",
                "/steps/2/retry/max",
                "/steps/3",
                "/steps/4/undo",
                "/steps/5",
                "/colour",
            ]
        );
    }

    /// Goal: a hostile document is answered with a bounded list.
    #[test]
    fn faults_are_bounded() {
        let body: Value = (0..50_000).map(|_| json!("$.x")).collect();
        let long = "k".repeat(50_000);
        let document =
            json!({"name": "d", "version": 1, "steps": [{"id": "a", "do": {"topic": "t", "body": {long: body}}}]});
        let found = Definition::parse(&document).expect_err("faults");
        assert!(found.iter().map(|fault| fault.pointer.len() + fault.detail.len()).sum::<usize>() < 400_000);
        assert_eq!(found.last().map(Fault::to_string).as_deref(), Some("there are more faults than are shown"));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9..1e9f64).prop_map(Value::from),
            "[a-z0-9$.*#\0/~ ]{0,6}".prop_map(Value::from),
            prop::sample::select(vec![
                "a",
                "b",
                "reserve",
                "full",
                "1s",
                "2m",
                "$.steps.reserve.output",
                "$.input",
                "t.*"
            ])
            .prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            let fields = prop::sample::select(vec![
                "name",
                "version",
                "deadline",
                "steps",
                "id",
                "after",
                "pivot",
                "do",
                "wait",
                "undo",
                "topic",
                "body",
                "signal",
                "timeout",
                "retry",
                "undo_retry",
                "max",
                "initial",
                "factor",
                "cap",
                "on_exhausted",
                "a/~b",
            ]);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec((fields, inner), 0..6).prop_map(|fields| {
                    Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
                }),
            ]
        })
    }

    /// Every place of a document, as pointers.
    fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_owned());
        match value {
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(place, item)| pointers(item, &format!("{at}/{place}"), found));
            }
            Value::Object(fields) => fields.iter().for_each(|(name, value)| {
                pointers(value, &format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")), found);
            }),
            _ => {}
        }
    }

    /// What every answer to every document must hold.
    fn check(document: &Value) -> Result<(), TestCaseError> {
        match Definition::parse(document) {
            Ok(definition) => {
                for (place, step) in definition.steps.iter().enumerate() {
                    prop_assert!(step.after.iter().all(|earlier| *earlier < place));
                }
                prop_assert_eq!(Definition::parse(&print(&definition)), Ok(definition));
            }
            Err(faults) => {
                prop_assert!(!faults.is_empty());
                for fault in &faults {
                    let parent = fault.pointer.rsplit_once('/').map_or("", |(parent, _)| parent);
                    let there = document.pointer(&fault.pointer).or(document.pointer(parent));
                    prop_assert!(there.is_some(), "{} leads nowhere in {}", fault, document);
                    prop_assert!(!fault.detail.is_empty() && !fault.detail.contains('\n'));
                }
            }
        }
        Ok(())
    }

    /// Values for the fields of a step.
    fn retry() -> impl Strategy<Value = Retry> {
        (1..=1000i32, 1..=86_400_000i64, 1.0..100.0f64, 0..86_400_000i64, any::<bool>()).prop_map(
            |(max, initial_ms, factor, more_ms, full)| Retry {
                max,
                initial_ms,
                factor,
                cap_ms: initial_ms + more_ms,
                jitter: if full { Jitter::Full } else { Jitter::None },
            },
        )
    }

    /// What a random step is made of; the definition around it decides what of it may be.
    #[derive(Debug, Clone)]
    struct Seed {
        after: Vec<Index>,
        wait: bool,
        timeout_ms: i64,
        retry: Retry,
        undo_retry: Retry,
        undo: bool,
        skip: bool,
        body: Value,
        names: Index,
    }

    fn seed() -> impl Strategy<Value = Seed> {
        let order = (prop::collection::vec(any::<Index>(), 0..4), any::<bool>(), 1..=365 * 86_400_000i64);
        let rest = (retry(), retry(), any::<bool>(), any::<bool>(), any_json(), any::<Index>());
        (order, rest).prop_map(|((after, wait, timeout_ms), (retry, undo_retry, undo, skip, body, names))| Seed {
            after,
            wait,
            timeout_ms,
            retry,
            undo_retry,
            undo,
            skip,
            body,
            names,
        })
    }

    /// A valid definition: with a pivot, everything before it leads to it and everything after it comes from it.
    fn valid(seeds: &[Seed], pivot: Option<Index>, deadline_ms: Option<i64>) -> Definition {
        let pivot = pivot.map(|pivot| pivot.index(seeds.len())).filter(|place| !seeds[*place].wait);
        let step = |(place, seed): (usize, &Seed)| {
            let mut after: Vec<usize> = match pivot {
                Some(pivot) if place == pivot => (0..pivot).collect(),
                _ if place == 0 => Vec::new(),
                _ => seed.after.iter().map(|pick| pick.index(place)).collect(),
            };
            after.extend(pivot.filter(|pivot| place > *pivot));
            after.sort_unstable();
            after.dedup();
            let id = |place: usize| format!("s.{place}");
            // Random text without what would be refused; references to a step before.
            let clean = serde_json::from_str(&seed.body.to_string().replace("\\u0000", "")).expect("still JSON");
            let mut body = vec![template::constant(&clean), json!("$.input.a"), json!("$.business_key")];
            if !after.is_empty() {
                body.push(json!(format!("$.steps[\"{}\"].output.0", id(after[seed.names.index(after.len())]))));
            }
            let command = |topic: &str| CommandTemplate { topic: topic.into(), body: Value::from(body.clone()) };
            let undo = seed.undo && !seed.wait && pivot.is_none_or(|pivot| place < pivot);
            StepDefinition {
                id: id(place),
                after,
                work: match seed.wait {
                    true => Work::Wait { signal: id(place), timeout_ms: seed.undo.then_some(seed.timeout_ms) },
                    false => Work::Command(command("a.b")),
                },
                pivot: pivot == Some(place),
                timeout_ms: if seed.wait { DEFAULT_TIMEOUT_MS } else { seed.timeout_ms },
                retry: if seed.wait { DEFAULT_RETRY } else { seed.retry },
                undo: undo.then(|| command("a.b.undo")),
                undo_retry: if seed.wait { DEFAULT_UNDO_RETRY } else { seed.undo_retry },
                on_undo_exhausted: if seed.skip && !seed.wait { OnExhausted::Skip } else { OnExhausted::Stuck },
            }
        };
        Definition {
            name: "a.b-c".into(),
            version: seeds.len() as i32,
            deadline_ms,
            steps: seeds.iter().enumerate().map(step).collect(),
        }
    }

    proptest! {
        /// Goal: what is written out is read as the same, also as YAML text made of JSON.
        #[test]
        fn what_is_printed_is_parsed_as_the_same(
            seeds in prop::collection::vec(seed(), 1..9),
            pivot in prop::option::of(any::<Index>()),
            deadline_ms in prop::option::of(1..=365 * 86_400_000i64),
        ) {
            let definition = valid(&seeds, pivot, deadline_ms);
            let document = print(&definition);
            prop_assert_eq!(Definition::parse(&document), Ok(definition));
            prop_assert_eq!(document_from_text(&document.to_string()), Ok(document.clone()));
            prop_assert_eq!(document_from_text(&yaml_serde::to_string(&document).expect("YAML")), Ok(document));
        }

        /// Goal: no document whatever panics, and each fault leads to its place.
        #[test]
        fn any_document_is_answered(document in any_json()) {
            check(&document)?;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Goal: no change to a valid document panics, and each fault leads to its place.
        #[test]
        fn any_change_is_answered(changes in prop::collection::vec((any::<Index>(), any_json()), 1..4)) {
            let mut document = order();
            for (pick, value) in changes {
                let mut places = Vec::new();
                pointers(&document, "", &mut places);
                *document.pointer_mut(&places[pick.index(places.len())]).expect("it is there") = value;
            }
            check(&document)?;
        }
    }
}
