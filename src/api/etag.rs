//! Entity tags (RFC 9110 §8.8.3, §13.1): a resource that changes has a number, and its tag is the number in quotes.

use super::problem::{Kind, Problem};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

/// The tag of a resource at this number.
pub(super) fn etag(seq: i64) -> HeaderValue {
    HeaderValue::try_from(format!("\"{seq}\"")).unwrap_or(HeaderValue::from_static("\"0\""))
}

/// What `If-Match` or `If-None-Match` asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Condition {
    /// The header is not there.
    Missing,
    /// `*`
    Any,
    /// Tags, each with whether it is weak.
    Tags(Vec<(bool, String)>),
}

impl Condition {
    /// Reads `If-Match`.
    ///
    /// # Errors
    /// 400 when it is no list of entity tags.
    pub(super) fn if_match(headers: &HeaderMap) -> Result<Self, Problem> {
        Self::read(headers, &header::IF_MATCH)
    }

    /// Reads `If-None-Match`.
    ///
    /// # Errors
    /// 400 when it is no list of entity tags.
    pub(super) fn if_none_match(headers: &HeaderMap) -> Result<Self, Problem> {
        Self::read(headers, &header::IF_NONE_MATCH)
    }

    /// Whether `If-Match` lets a change happen at this number; a weak tag never does.
    ///
    /// # Errors
    /// 428 when the header is missing.
    pub(super) fn allows_change(&self, seq: i64) -> Result<bool, Problem> {
        match self {
            Self::Missing => {
                let detail = "send If-Match with the ETag that was read, or If-Match: * for whatever there is";
                Err(Problem::new(Kind::PreconditionRequired, detail))
            }
            Self::Any => Ok(true),
            Self::Tags(tags) => Ok(tags.iter().any(|(weak, tag)| !weak && *tag == seq.to_string())),
        }
    }

    /// Whether `If-None-Match` names this number: the client has it already.
    pub(super) fn names(&self, seq: i64) -> bool {
        match self {
            Self::Missing => false,
            Self::Any => true,
            Self::Tags(tags) => tags.iter().any(|(_, tag)| *tag == seq.to_string()),
        }
    }

    fn read(headers: &HeaderMap, name: &HeaderName) -> Result<Self, Problem> {
        let malformed = || {
            Problem::new(
                Kind::Malformed,
                format!("{name} must be * or a list of entity tags such as \"7\", with quotes"),
            )
        };
        let (mut tags, mut any, mut is_there) = (Vec::new(), false, false);
        for value in headers.get_all(name) {
            is_there = true;
            let mut rest = value.as_bytes();
            loop {
                // Elements of a list may be empty.
                rest = rest.trim_ascii_start();
                if let Some(behind) = rest.strip_prefix(b",") {
                    rest = behind;
                    continue;
                }
                if rest.is_empty() {
                    break;
                }
                rest = match rest.strip_prefix(b"*") {
                    Some(behind) => {
                        any = true;
                        behind
                    }
                    None => {
                        let (tag, behind) = entity_tag(rest).ok_or_else(malformed)?;
                        tags.push(tag);
                        behind
                    }
                };
                rest = rest.trim_ascii_start();
                if !rest.is_empty() && !rest.starts_with(b",") {
                    return Err(malformed());
                }
            }
        }
        match (any, tags.is_empty()) {
            (false, true) if is_there => Err(malformed()),
            (false, true) => Ok(Self::Missing),
            (true, true) => Ok(Self::Any),
            (false, false) => Ok(Self::Tags(tags)),
            (true, false) => Err(malformed()),
        }
    }
}

/// The tag that a text begins with, whether it is weak, and what comes behind it. A tag may hold commas, and bytes that are
/// no ASCII; neither is one of ours.
fn entity_tag(text: &[u8]) -> Option<((bool, String), &[u8])> {
    let (is_weak, text) = text.strip_prefix(b"W/").map_or((false, text), |text| (true, text));
    let text = text.strip_prefix(b"\"")?;
    let end = text.iter().position(|byte| *byte == b'"')?;
    let (tag, behind) = (&text[..end], &text[end + 1..]);
    let is_opaque = tag.iter().all(|byte| byte.is_ascii_graphic() || *byte >= 0x80);
    is_opaque.then(|| ((is_weak, String::from_utf8_lossy(tag).into_owned()), behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(values: &[&'static str]) -> Result<Condition, Problem> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::IF_MATCH, HeaderValue::from_static(value));
        }
        Condition::if_match(&headers)
    }

    /// Goal: conditions are compared as RFC 9110 says: strongly for a change, weakly for what the client has.
    #[test]
    fn conditions_compare_as_specified() {
        let allows = |value| read(&[value]).expect("well formed").allows_change(7).expect("there");
        for (value, expected) in [
            ("*", true),
            ("\"7\"", true),
            ("W/\"7\"", false),
            ("\"6\", \"7\"", true),
            ("\"77\"", false),
            ("\"\"", false),
            (", \"7\",", true),
            ("\"a,7\"", false),
            ("\"a,\",W/\"7\" , \"7\"", true),
        ] {
            assert_eq!(allows(value), expected, "{value}");
        }
        assert!(read(&["\"6\"", "\"7\""]).expect("a list over two fields").names(7));
        assert!(read(&["W/\"7\""]).expect("well formed").names(7));
        assert!(read(&[]).expect("missing").allows_change(7).is_err());
        for wrong in
            ["7", "\"7", "\"a\"b\"", "", "*, \"7\"", ",", "\"7\"\"8\"", "\"7\" \"8\"", "\"a b\"", "**", "w/\"7\""]
        {
            assert!(read(&[wrong]).is_err(), "{wrong}");
        }
    }
}
