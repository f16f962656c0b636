//! What is wrong with a document, and where. Pure.

use serde::Serialize;
use serde_json::Value;
use std::fmt;

/// One thing that is wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Where, as a JSON pointer (RFC 6901). A field that is missing is pointed to as if it were there.
    pub pointer: String,
    /// What, as one line.
    pub detail: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pointer.as_str() {
            "" => f.write_str(&self.detail),
            pointer => write!(f, "{pointer}: {}", self.detail),
        }
    }
}

/// Faults are kept up to this size together: a hostile document can have a fault every few bytes, each below a pointer
/// of its own length.
const LIMIT_BYTES: usize = 256 * 1024;

/// Fields in the order in which one writes them: serde_json and jsonb both forget the document's own.
const FIELDS: &[&str] = &[
    "name",
    "version",
    "deadline",
    "steps",
    "id",
    "after",
    "pivot",
    "do",
    "wait",
    "signal",
    "topic",
    "body",
    "timeout",
    "retry",
    "undo",
    "undo_retry",
    "max",
    "initial",
    "factor",
    "cap",
    "jitter",
    "on_exhausted",
];

/// The faults found so far.
#[derive(Debug, Default)]
pub(super) struct Faults {
    found: Vec<Fault>,
    bytes: usize,
    more: bool,
}

impl Faults {
    /// Adds one.
    pub(super) fn add(&mut self, path: &Path<'_>, detail: impl Into<String>) {
        if self.bytes >= LIMIT_BYTES {
            self.more = true;
            return;
        }
        let fault = Fault { pointer: path.to_string(), detail: detail.into() };
        self.bytes += fault.pointer.len() + fault.detail.len();
        self.found.push(fault);
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.found.len()
    }

    /// `value` if there were none; else all of them in the order of `document`.
    pub(super) fn unless_any<T>(self, value: T, document: &Value) -> Result<T, Vec<Fault>> {
        if self.found.is_empty() {
            return Ok(value);
        }
        let mut found = self.found;
        found.sort_by_cached_key(|fault| position(document, &fault.pointer));
        found.dedup();
        if self.more {
            found.push(Fault { pointer: String::new(), detail: "there are more faults than are shown".into() });
        }
        Err(found)
    }
}

/// Where a pointer leads in `document`, comparable: places of arrays as numbers, fields as in [`FIELDS`], then others.
fn position(document: &Value, pointer: &str) -> Vec<(usize, String)> {
    let mut at = Some(document);
    let step = |token: &str| {
        let name = token.replace("~1", "/").replace("~0", "~");
        let place = match at {
            Some(Value::Array(_)) => name.parse().unwrap_or(usize::MAX),
            _ => FIELDS.iter().position(|field| *field == name).unwrap_or(FIELDS.len()),
        };
        at = match at {
            Some(Value::Array(items)) => items.get(place),
            Some(Value::Object(fields)) => fields.get(&name),
            _ => None,
        };
        (place, name)
    };
    pointer.split('/').skip(1).map(step).collect()
}

/// A way into a document; written out only where something is wrong.
#[derive(Debug, Clone, Copy)]
pub(super) struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    token: Token<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Token<'a> {
    Field(&'a str),
    Place(usize),
}

impl<'a> Path<'a> {
    /// The whole document.
    pub(super) const ROOT: Path<'static> = Path { parent: None, token: Token::Place(0) };

    /// A field of what is here.
    pub(super) fn field(&'a self, name: &'a str) -> Path<'a> {
        Path { parent: Some(self), token: Token::Field(name) }
    }

    /// An item of what is here.
    pub(super) fn place(&'a self, place: usize) -> Path<'a> {
        Path { parent: Some(self), token: Token::Place(place) }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(parent) = self.parent else { return Ok(()) };
        parent.fmt(f)?;
        match self.token {
            Token::Field(name) => write!(f, "/{}", name.replace('~', "~0").replace('/', "~1")),
            Token::Place(place) => write!(f, "/{place}"),
        }
    }
}

/// A value in a message: short, and on one line.
pub(super) fn shown(value: &Value) -> String {
    const LONGEST_CHARS: usize = 60;
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        other => {
            let text = other.to_string();
            match text.char_indices().nth(LONGEST_CHARS) {
                Some((end, _)) => format!("{}…", &text[..end]),
                None => text,
            }
        }
    }
}
