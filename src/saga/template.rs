//! Bodies of commands: JSON in which strings such as `$.input.sku` stand for values. Pure.
//!
//! ```text
//! $.input[.path]  $.business_key  $.saga_id  $.labels[.name]  $.steps.<id>.output[.path]
//! ```
//!
//! A string is a reference as a whole or not at all, and what it stands for keeps its type. A path's parts are names or
//! places in an array, apart by dots; `["a.b"]` is a name of any characters, `[0]` a place. One `$` more escapes:
//! `$$.input` is the text `$.input`. Keys are never references. What is not there is null. Left out on purpose:
//! expressions and text around a reference; a participant computes, a template only carries.

use super::state::Saga;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use uuid::Uuid;

/// What references can name.
#[derive(Debug, Clone, PartialEq)]
pub struct Scope<'a> {
    /// What the saga was started with.
    pub input: &'a Value,
    /// The saga's.
    pub business_key: &'a str,
    /// The saga's.
    pub saga_id: Uuid,
    /// The saga's.
    pub labels: &'a Map<String, Value>,
    /// What steps gave, by their ids.
    pub outputs: BTreeMap<&'a str, &'a Value>,
}

impl<'a> Scope<'a> {
    /// Everything a saga knows at this moment.
    pub fn of(saga: &'a Saga) -> Self {
        let output = |step: &'a super::state::Step| Some((step.id.as_str(), step.output.as_ref()?));
        Self {
            input: &saga.input,
            business_key: &saga.business_key,
            saga_id: saga.id,
            labels: &saga.labels,
            outputs: saga.steps.iter().filter_map(output).collect(),
        }
    }
}

/// `body` with every reference replaced. What is not there is null, as is a reference that no definition could hold.
pub fn evaluate(body: &Value, scope: &Scope<'_>) -> Value {
    match body {
        Value::String(text) => match reference(text) {
            Some(found) => found.map_or(Value::Null, |reference| reference.value(scope)),
            None => Value::String(unescaped(text).to_owned()),
        },
        Value::Array(items) => items.iter().map(|item| evaluate(item, scope)).collect(),
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), evaluate(value, scope))).collect(),
        other => other.clone(),
    }
}

/// The body that evaluates to `value`, whatever strings it has.
pub fn constant(value: &Value) -> Value {
    match value {
        Value::String(text) if dollars(text) > 0 => Value::String(format!("${text}")),
        Value::Array(items) => items.iter().map(constant).collect(),
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), constant(value))).collect(),
        other => other.clone(),
    }
}

/// How many `$` stand before a dot at the beginning: 1 makes a reference, more are an escape of one less.
fn dollars(text: &str) -> usize {
    let rest = text.trim_start_matches('$');
    if rest.starts_with('.') { text.len() - rest.len() } else { 0 }
}

fn unescaped(text: &str) -> &str {
    if dollars(text) > 1 { &text[1..] } else { text }
}

/// What a string stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reference {
    /// A part of the input.
    Input(Vec<String>),
    /// The saga's business key.
    BusinessKey,
    /// The saga's id.
    SagaId,
    /// The labels, or one of them.
    Labels(Option<String>),
    /// A part of a step's output.
    Output {
        /// The step's id.
        step: String,
        /// Where in its output.
        path: Vec<String>,
    },
}

/// The reference that `text` is; none when it is a text, an error when it begins like one and is none.
pub(crate) fn reference(text: &str) -> Option<Result<Reference, String>> {
    (dollars(text) == 1).then(|| parsed(&text[1..]))
}

impl Reference {
    fn value(&self, scope: &Scope<'_>) -> Value {
        let found = match self {
            Self::Input(path) => follow(scope.input, path),
            Self::BusinessKey => return Value::String(scope.business_key.to_owned()),
            Self::SagaId => return Value::String(scope.saga_id.to_string()),
            Self::Labels(None) => return Value::Object(scope.labels.clone()),
            Self::Labels(Some(name)) => scope.labels.get(name),
            Self::Output { step, path } => {
                scope.outputs.get(step.as_str()).copied().and_then(|output| follow(output, path))
            }
        };
        found.cloned().unwrap_or_default()
    }
}

fn follow<'v>(value: &'v Value, path: &[String]) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, part| match value {
        Value::Object(fields) => fields.get(part),
        // Written as JSON writes numbers: "01" and "+1" are names, not places.
        Value::Array(items) => {
            part.parse::<usize>().ok().filter(|place| place.to_string() == *part).and_then(|place| items.get(place))
        }
        _ => None,
    })
}

fn parsed(text: &str) -> Result<Reference, String> {
    let parts = parts(text)?;
    let mut parts = parts.into_iter();
    let root = parts.next().unwrap_or_default();
    let rest: Vec<String> = parts.collect();
    match (root.as_str(), rest.as_slice()) {
        ("input", _) => Ok(Reference::Input(rest)),
        ("business_key", []) => Ok(Reference::BusinessKey),
        ("saga_id", []) => Ok(Reference::SagaId),
        ("labels", []) => Ok(Reference::Labels(None)),
        ("labels", [name]) => Ok(Reference::Labels(Some(name.clone()))),
        ("business_key" | "saga_id" | "labels", _) => Err(format!("$.{root} has nothing below that")),
        ("steps", [step, output, path @ ..]) if output == "output" => {
            Ok(Reference::Output { step: step.clone(), path: path.to_vec() })
        }
        ("steps", _) => Err("of a step there is $.steps.<id>.output (an id with dots: $.steps[\"a.b\"].output)".into()),
        _ => Err(format!(
            "\"{root}\" is none of input, business_key, saga_id, labels, steps ($$. begins a text that is no reference)"
        )),
    }
}

/// The parts of a path, `text` from its first dot on.
fn parts(text: &str) -> Result<Vec<String>, String> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        if let Some(bracketed) = rest.strip_prefix('[') {
            let mut values = serde_json::Deserializer::from_str(bracketed).into_iter::<Value>();
            let part = match values.next() {
                Some(Ok(Value::String(name))) => name,
                Some(Ok(Value::Number(place))) if place.is_u64() => place.to_string(),
                _ => return Err("in brackets stands a name as [\"name\"] or a place as [0]".into()),
            };
            let closed = bracketed[values.byte_offset()..].strip_prefix(']');
            rest = closed.ok_or_else(|| "a bracket is not closed".to_owned())?;
            parts.push(part);
        } else if let Some(dotted) = rest.strip_prefix('.') {
            let end = dotted.find(['.', '[']).unwrap_or(dotted.len());
            let name = &dotted[..end];
            if name.is_empty() || name.contains(|c: char| c.is_whitespace() || matches!(c, ']' | '"' | '$')) {
                return Err(format!("\"{name}\" is no name in a path: write [\"…\"] (a reference is a whole string)"));
            }
            parts.push(name.to_owned());
            rest = &dotted[end..];
        } else {
            return Err("behind a bracket comes a dot, a bracket or the end".into());
        }
    }
    Ok(parts)
}

/// Deepest value that a saga takes, `saga_check_json` in SQL. With a body of a definition around it, and the state of the
/// saga around that, it is not as deep as `serde_json` reads: 128 levels.
pub const DEPTH_LIMIT: usize = 64;

/// Whether a value has more levels than a saga takes.
pub fn is_too_deep(value: &Value) -> bool {
    fn deeper_than(value: &Value, levels: usize) -> bool {
        match value {
            Value::Array(items) => levels == 0 || items.iter().any(|item| deeper_than(item, levels - 1)),
            Value::Object(fields) => levels == 0 || fields.values().any(|field| deeper_than(field, levels - 1)),
            _ => false,
        }
    }
    deeper_than(value, DEPTH_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn evaluated(body: Value) -> Value {
        let input = json!({"sku": "A-1", "lines": [{"n": 2}, {"n": 3}], "a.b": {"c d": true}, "01": "zero one"});
        let labels = json!({"team": "blue"});
        let (reserve, dotted) = (json!({"id": 7, "list": [[1, 2]]}), json!("whole"));
        let scope = Scope {
            input: &input,
            business_key: "o-1",
            saga_id: Uuid::nil(),
            labels: labels.as_object().expect("an object"),
            outputs: BTreeMap::from([("reserve", &reserve), ("a.b", &dotted)]),
        };
        evaluate(&body, &scope)
    }

    /// Goal: a reference keeps the type of what it names, and what is not there is null.
    #[test]
    fn references_stand_for_values() {
        for (text, expected) in [
            ("$.input.sku", json!("A-1")),
            ("$.input.lines.1.n", json!(3)),
            ("$.input.lines[1].n", json!(3)),
            ("$.input.lines", json!([{"n": 2}, {"n": 3}])),
            ("$.input[\"a.b\"][\"c d\"]", json!(true)),
            ("$.input.01", json!("zero one")),
            ("$.business_key", json!("o-1")),
            ("$.saga_id", json!("00000000-0000-0000-0000-000000000000")),
            ("$.labels", json!({"team": "blue"})),
            ("$.labels.team", json!("blue")),
            ("$.steps.reserve.output.id", json!(7)),
            ("$.steps.reserve.output.list.0.1", json!(2)),
            ("$.steps[\"a.b\"].output", json!("whole")),
            ("$.input.none.of.this", Value::Null),
            ("$.input.lines.2", Value::Null),
            ("$.input.lines.01", Value::Null),
            ("$.input.lines.+1", Value::Null),
            ("$.input.sku.0", Value::Null),
            ("$.labels.none", Value::Null),
            ("$.steps.later.output", Value::Null),
        ] {
            assert_eq!(evaluated(json!({"in": [text]})), json!({"in": [expected]}), "{text}");
        }
    }

    /// Goal: only whole strings that begin with `$.` are references; one `$` more makes them texts, keys are texts.
    #[test]
    fn texts_stay_texts() {
        for (text, expected) in [
            ("$$.input.sku", "$.input.sku"),
            ("$$$.input.sku", "$$.input.sku"),
            ("$", "$"),
            ("$5", "$5"),
            ("$$", "$$"),
            ("costs $.input.sku", "costs $.input.sku"),
            ("", ""),
        ] {
            assert_eq!(evaluated(json!({"$.input.sku": text})), json!({"$.input.sku": expected}), "{text}");
        }
    }

    /// Goal: what looks like a reference and is none says why.
    #[test]
    fn broken_references_say_why() {
        for (text, why) in [
            ("$.", "\"\" is no name"),
            ("$.inputs", "\"inputs\" is none of input, business_key"),
            ("$.input..a", "\"\" is no name"),
            ("$.input.a and b", "\"a and b\" is no name"),
            ("$.input[a]", "in brackets stands a name"),
            ("$.input[-1]", "in brackets stands a name"),
            ("$.input[\"a\"", "a bracket is not closed"),
            ("$.input[0]a", "behind a bracket"),
            ("$.business_key.a", "$.business_key has nothing below"),
            ("$.labels.a.b", "$.labels has nothing below"),
            ("$.steps", "of a step there is $.steps.<id>.output"),
            ("$.steps.a", "of a step there is"),
            ("$.steps.a.error", "of a step there is"),
        ] {
            let found = reference(text).expect("it begins like one").expect_err(text);
            assert!(found.contains(why), "{text}: {found}");
            assert_eq!(evaluated(json!(text)), Value::Null);
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[$.a-c\\[\\]\"0]{0,8}".prop_map(Value::from),
            "\\$\\.(input|steps|labels)[.a-c\\[\\]\"0]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[$.a-c]{0,4}", inner, 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Goal: a constant comes out as it went in, whatever its strings look like, and no text panics.
        #[test]
        fn constants_come_out_as_they_went_in(value in any_json()) {
            prop_assert_eq!(evaluated(constant(&value)), value.clone());
            evaluated(value);
        }

        /// Goal: no text whatever panics.
        #[test]
        fn any_text_is_a_reference_a_text_or_an_error(text in "\\$?\\.?\\PC{0,30}") {
            let _ = reference(&text);
            evaluated(Value::String(text));
        }
    }
}
