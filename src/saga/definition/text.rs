//! YAML or JSON → a JSON value. Pure.
//!
//! Refused is what YAML can say and JSON cannot, and what is read differently by different readers: tags, keys that are
//! no strings, `.nan`, anchors, a key given twice, and the NUL that jsonb cannot hold.

use super::faults::{Fault, Faults, Path, shown};
use serde::de::{self, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::collections::HashSet;
use std::fmt;

/// Longest text of a definition: 64 steps of 4 KiB.
pub const TEXT_LIMIT_BYTES: usize = 256 * 1024;

/// Deepest text: brackets open at once. Beyond it the YAML reader takes time quadratic in the text.
const NESTING_LIMIT: usize = 1_000;

/// The document that a text holds, as YAML or JSON; [`Definition::parse`] says whether it is a definition.
///
/// # Errors
/// Everything that is wrong with it as a text. What cannot be read at all is one fault with an empty pointer; its
/// message has line and column.
///
/// [`Definition::parse`]: super::Definition::parse
pub fn document_from_text(text: &str) -> Result<Value, Vec<Fault>> {
    let whole = |detail: String| vec![Fault { pointer: String::new(), detail }];
    if text.len() > TEXT_LIMIT_BYTES {
        return Err(whole(format!("{} bytes of text are more than {TEXT_LIMIT_BYTES}", text.len())));
    }
    // JSON by its own reader: it knows escapes that YAML does not. A text it cannot read may still be YAML.
    if text.trim_start().starts_with('{') {
        let mut faults = Faults::default();
        let mut json = serde_json::Deserializer::from_str(text);
        let read = Node { path: &Path::ROOT, faults: &mut faults }.deserialize(&mut json);
        if let Ok(value) = read
            && json.end().is_ok()
        {
            return faults.unless_any((), &value).map(|()| value);
        }
    }
    if let Some(name) = anchor_in_use(text) {
        return Err(whole(format!("the anchor &{name} and its alias *{name} are not understood: write it out twice")));
    }
    if nests_deeper_than(NESTING_LIMIT, text) {
        return Err(whole(format!("more than {NESTING_LIMIT} brackets are open at once")));
    }
    let mut faults = Faults::default();
    let yaml = yaml_serde::Deserializer::from_str(text);
    let value =
        Node { path: &Path::ROOT, faults: &mut faults }.deserialize(yaml).map_err(|error| whole(error.to_string()))?;
    faults.unless_any((), &value).map(|()| value)
}

/// A name that stands behind both `&` and `*`. Every alias in use is found; a text where both stand by chance is refused
/// too, and can be given as JSON. Aliases grow without bound, and the reader mixes up anchors that are set twice.
fn anchor_in_use(text: &str) -> Option<&str> {
    let names = |mark: char| {
        text.match_indices(mark).map(move |(at, _)| {
            let rest = &text[at + 1..];
            &rest[..rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-').unwrap_or(rest.len())]
        })
    };
    let anchors: HashSet<&str> = names('&').filter(|name| !name.is_empty()).collect();
    names('*').find(|name| anchors.contains(name))
}

fn nests_deeper_than(limit: usize, text: &str) -> bool {
    let mut open = 0usize;
    text.bytes().any(|byte| {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        open > limit
    })
}

/// Reads one value; what is wrong with it is noted, and reading goes on.
struct Node<'a> {
    path: &'a Path<'a>,
    faults: &'a mut Faults,
}

impl Node<'_> {
    fn text(self, text: &str) -> Value {
        if text.contains('\0') {
            self.faults.add(self.path, "a NUL character cannot be stored");
        }
        Value::String(text.to_owned())
    }

    fn refused(self, detail: impl Into<String>) -> Value {
        self.faults.add(self.path, detail);
        Value::Null
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON can hold")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(self.refused(format!("{value} is beyond 64 bits: write it as a string")))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Value, E> {
        Ok(self.refused(format!("{value} is beyond 64 bits: write it as a string")))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(match Number::from_f64(value) {
            Some(number) => Value::Number(number),
            None => self.refused(format!("{value} is no number that JSON can hold")),
        })
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(self.text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let path = self.path.place(list.len());
            match items.next_element_seed(Node { path: &path, faults: self.faults })? {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = fields.next_key_seed(Node { path: self.path, faults: self.faults })? {
            let Value::String(name) = &key else {
                self.faults.add(self.path, format!("the key {} is no string: quote it", shown(&key)));
                fields.next_value_seed(Node { path: self.path, faults: &mut Faults::default() })?;
                continue;
            };
            let path = self.path.field(name);
            let value = fields.next_value_seed(Node { path: &path, faults: self.faults })?;
            if map.contains_key(name) {
                self.faults.add(&path, "is given twice");
            }
            map.insert(name.clone(), value);
        }
        Ok(Value::Object(map))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<Value, A::Error> {
        Err(de::Error::custom("a tag (!name) is not understood"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::time::{Duration, Instant};

    fn faults(text: &str) -> Vec<String> {
        document_from_text(text).err().unwrap_or_default().iter().map(Fault::to_string).collect()
    }

    /// Goal: YAML and JSON are read as the same document.
    #[test]
    fn yaml_and_json_are_read_alike() {
        let expected = json!({"a": [1, -2, 1.5, true, null, "x: y"], "b": {"c": "2", "d": "no", "e": "é😀"}});
        let json = "{\"a\": [1, -2, 1.5, true, null, \"x: y\"],\t\"b\": {\"c\": \"2\", \"d\": \"no\", \"e\": \"é\\ud83d\\ude00\"}}";
        let block = "a:\n- 1\n- -2\n- 1.5\n- true\n-\n- 'x: y'\nb:\n  c: '2'\n  d: no\n  e: é😀\n";
        let flow = "{a: [1, -2, 1.5, true, ~, 'x: y'], b: {c: \"2\", d: no, e: é😀}} # that is all";
        for text in [json, block, flow] {
            assert_eq!(document_from_text(text), Ok(expected.clone()), "{text}");
        }
    }

    /// Goal: what YAML can say and JSON cannot is refused, each at its place, all at once.
    #[test]
    fn what_json_cannot_say_is_refused() {
        assert_eq!(
            faults(
                "a: [.nan, -.inf, 1, \"\\0\"]\nb: {1: x, true: [.nan], c: 1, c: 2}\nd: 123456789012345678901234567890\n? [e]\n: 1\n\"f\\0\": 1\n"
            ),
            [
                "the key a list is no string: quote it",
                "a NUL character cannot be stored",
                "/a/0: NaN is no number that JSON can hold",
                "/a/1: -inf is no number that JSON can hold",
                "/a/3: a NUL character cannot be stored",
                "/b: the key 1 is no string: quote it",
                "/b: the key true is no string: quote it",
                "/b/c: is given twice",
                "/d: 123456789012345678901234567890 is beyond 64 bits: write it as a string",
            ]
        );
        for (text, detail) in [
            ("a: !mine 1", "a tag (!name) is not understood"),
            ("a: !mine {b: 1}", "a tag (!name) is not understood"),
            ("a: &x [1]\nb: *x\n", "the anchor &x and its alias *x are not understood"),
            ("a: &x {b: 1}\nc: {<<: *x}\n", "the anchor &x"),
            ("a: *x", "unknown anchor"),
            ("a: [1", "did not find expected"),
            ("a: 1\n---\nb: 2\n", "more than one document"),
            ("{\"a\": 1, \"a\": 2}", "/a: is given twice"),
            ("{\"a\": \"\\u0000\"}", "/a: a NUL character"),
        ] {
            let found = faults(text);
            assert!(found.len() == 1 && found[0].contains(detail), "{text}: {found:?}");
        }
        assert_eq!(document_from_text(""), Ok(Value::Null));
        assert_eq!(document_from_text("a: b&c * d & e*f"), Ok(json!({"a": "b&c * d & e*f"})));
    }

    /// Goal: no text takes long or much: neither too long ones, nor deep ones, nor those that expand.
    #[test]
    fn texts_are_bounded() {
        assert!(faults(&" ".repeat(TEXT_LIMIT_BYTES + 1))[0].contains("262145 bytes of text are more than 262144"));
        let laughs: String =
            (1..30).map(|n| format!("a{n}: &a{n} [{}]\n", format!("*a{},", n - 1).repeat(9))).collect();
        assert!(faults(&format!("a0: &a0 lol\n{laughs}"))[0].contains("are not understood"));
        for deep in ["[", "{a: ", "- ", "? ", "[{", "\n", "a: [\n", "!a ", "&a ", "{\"a\":", "\"", "- - [", ": ", "a,"]
        {
            let begun = Instant::now();
            let _ = document_from_text(&deep.repeat(TEXT_LIMIT_BYTES / deep.len()));
            let _ = document_from_text(&format!("[{}", deep.repeat(TEXT_LIMIT_BYTES / deep.len() - 1)));
            println!("{deep:?} {:?}", begun.elapsed());
            assert!(begun.elapsed() < Duration::from_secs(20), "{deep:?} took {:?}", begun.elapsed());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Goal: no text panics, also not one that was a definition before somebody fell onto the keyboard.
        #[test]
        fn any_text_is_answered(
            cuts in prop::collection::vec((any::<prop::sample::Index>(), 0usize..4, "[-\\[\\]{}:,&*!?|>'\"%@#\0\t\n a-c0-9.~<$é]{0,3}"), 1..6),
            any in "[-\\[\\]{}:,&*!?|>'\"#\n a-c0.~]{0,60}",
        ) {
            let mut text: Vec<char> = include_str!("../../../docs/examples/order.yaml").chars().collect();
            for (at, removed, put) in cuts {
                let at = at.index(text.len());
                let end = (at + removed).min(text.len());
                text.splice(at..end, put.chars());
            }
            for text in [text.into_iter().collect(), any] {
                match document_from_text(&text) {
                    Ok(document) => drop(super::super::Definition::parse(&document)),
                    Err(faults) => prop_assert!(!faults.is_empty()),
                }
            }
        }
    }
}
