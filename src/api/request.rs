//! What handlers read of a request: parameters of the query and JSON bodies, each refused in words that name the place.

use super::limits::{self, BODY_BYTES};
use super::problem::{FieldError, Kind, Problem};
use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use futures_util::StreamExt;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_path_to_error::Segment;
use std::collections::VecDeque;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;
use utoipa::ToSchema;

/// Longest reason an operator gives, in characters.
const REASON_CHARS: usize = 1_000;

/// The parameters of a query. Handlers take those they know; [`Params::finish`] refuses the rest by name.
#[derive(Debug)]
pub(super) struct Params(VecDeque<(String, String)>);

impl<S: Sync> FromRequestParts<S> for Params {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Self::new(parts.uri.query())
    }
}

impl Params {
    /// Reads a query as `application/x-www-form-urlencoded`.
    ///
    /// # Errors
    /// 400 for what does not decode to text.
    pub(super) fn new(query: Option<&str>) -> Result<Self, Problem> {
        let mut params = VecDeque::new();
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let decoded = |text: &str| {
                let text = decode(text).filter(|text| !text.contains('\0'));
                text.ok_or_else(|| {
                    let name = decode(name).unwrap_or_else(|| "the query".to_owned());
                    Problem::parameters(vec![(name, "is not percent-encoded UTF-8 without NUL".to_owned())])
                })
            };
            params.push_back((decoded(name)?, decoded(value)?));
        }
        Ok(Self(params))
    }

    /// Takes every value of a parameter that may come several times.
    pub(super) fn all(&mut self, name: &str) -> Vec<String> {
        let (taken, left) = std::mem::take(&mut self.0).into_iter().partition(|(known, _)| known == name);
        self.0 = left;
        let taken: VecDeque<(String, String)> = taken;
        taken.into_iter().map(|(_, value)| value).collect()
    }

    /// Takes the parameters whose names begin so, without the beginning.
    pub(super) fn prefixed(&mut self, prefix: &str) -> Vec<(String, String)> {
        let (taken, left) = std::mem::take(&mut self.0).into_iter().partition(|(name, _)| name.starts_with(prefix));
        self.0 = left;
        let taken: VecDeque<(String, String)> = taken;
        taken.into_iter().map(|(name, value)| (name[prefix.len()..].to_owned(), value)).collect()
    }

    /// Takes a text of 1 to so many bytes.
    ///
    /// # Errors
    /// 400 when it is empty, too long, or there twice.
    pub(super) fn text(&mut self, name: &str, at_most_bytes: usize) -> Result<Option<String>, Problem> {
        let mut values = self.all(name);
        let wrong = |detail: String| Err(Problem::parameters(vec![(name.to_owned(), detail)]));
        match (values.pop(), values.is_empty()) {
            (None, _) => Ok(None),
            (_, false) => wrong("came more than once".to_owned()),
            (Some(value), true) if value.is_empty() || value.len() > at_most_bytes => {
                wrong(format!("must be 1 to {at_most_bytes} bytes"))
            }
            (value, true) => Ok(value),
        }
    }

    /// Takes a value that is read from text.
    ///
    /// # Errors
    /// 400 in the words of its type.
    pub(super) fn parsed<T>(&mut self, name: &str) -> Result<Option<T>, Problem>
    where
        T: FromStr,
        T::Err: Display,
    {
        let parse = |text: String| {
            text.parse().map_err(|error: T::Err| Problem::parameters(vec![(name.to_owned(), error.to_string())]))
        };
        self.text(name, 256)?.map(parse).transpose()
    }

    /// Takes a whole number of a range.
    ///
    /// # Errors
    /// 400 when it is none, or outside.
    pub(super) fn number(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Problem> {
        let Some(text) = self.text(name, 32)? else { return Ok(None) };
        match text.parse().ok().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let detail = format!("must be a whole number from {} to {}", range.start(), range.end());
                Err(Problem::parameters(vec![(name.to_owned(), detail)]))
            }
        }
    }

    /// Takes a duration, written as in the config file: 250ms, 10s, 5m.
    ///
    /// # Errors
    /// 400 when it is none, or too long.
    pub(super) fn duration(&mut self, name: &str, at_most: Duration) -> Result<Option<Duration>, Problem> {
        let Some(text) = self.text(name, 32)? else { return Ok(None) };
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let unit_ms = match &text[digits..] {
            "ms" => Some(1),
            "s" => Some(1_000),
            "m" => Some(60_000),
            _ => None,
        };
        let ms = text[..digits].parse::<u64>().ok().zip(unit_ms).and_then(|(number, unit)| number.checked_mul(unit));
        match ms.map(Duration::from_millis).filter(|duration| *duration <= at_most) {
            Some(duration) => Ok(Some(duration)),
            None => {
                let detail = format!("must be a duration such as 500ms, 10s or 1m, and at most {at_most:?}");
                Err(Problem::parameters(vec![(name.to_owned(), detail)]))
            }
        }
    }

    /// Refuses what nothing has taken.
    ///
    /// # Errors
    /// 400 that names each of them.
    pub(super) fn finish(self) -> Result<(), Problem> {
        if self.0.is_empty() {
            return Ok(());
        }
        let unknown = self.0.into_iter().map(|(name, _)| (name, "is no parameter of this".to_owned()));
        Err(Problem::parameters(unknown.collect()))
    }
}

/// `+` and `%xx`, if that gives UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
                let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(decoded).ok()
}

/// For handlers that know no parameter: any is refused.
#[derive(Debug)]
pub(super) struct NoParams;

impl<S: Sync> FromRequestParts<S> for NoParams {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Params::new(parts.uri.query())?.finish().map(|()| Self)
    }
}

/// The bytes of a body, as many as are allowed.
///
/// # Errors
/// 413 at once when the client announces more, else when more came; 400 when the client broke off.
pub(super) async fn read_body(headers: &HeaderMap, body: Body) -> Result<Vec<u8>, Problem> {
    let too_large = || Problem::new(Kind::TooLarge, format!("the body is over {BODY_BYTES} bytes"));
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|bytes| bytes > BODY_BYTES) {
        limits::discard(body);
        return Err(too_large());
    }
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| Problem::new(Kind::Malformed, format!("the body broke off: {error}")))?;
        if bytes.len() + chunk.len() > BODY_BYTES {
            limits::discard(Body::from_stream(stream));
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// The media type of a body, without its parameters.
pub(super) fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

/// A JSON body of this type. 415 for other media types, 413 for too many bytes, 400 for what is no JSON, and 422 with
/// pointers for JSON that does not fit; types deny unknown fields themselves.
#[derive(Debug)]
pub(super) struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let media_type = media_type(&parts.headers);
        if !media_type.as_deref().is_some_and(|kind| kind == "application/json" || kind.ends_with("+json")) {
            limits::discard(body);
            let detail = "send the body as Content-Type: application/json";
            return Err(Problem::new(Kind::UnsupportedMediaType, detail));
        }
        parse_json(&read_body(&parts.headers, body).await?).map(Self)
    }
}

/// Reads a JSON object as this type.
///
/// # Errors
/// 400 with line and column when it is none, 422 with a pointer when it does not fit.
pub(super) fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let malformed = |error: &serde_json::Error| Problem::new(Kind::Malformed, format!("the body is no JSON: {error}"));
    // All of it first, so that what is no JSON is never called JSON that does not fit.
    serde_json::from_slice::<IgnoredAny>(bytes).map_err(|error| malformed(&error))?;
    // Structs would be read from arrays too.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(Problem::invalid("", "must be a JSON object"));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        if !error.inner().is_data() {
            return malformed(error.inner());
        }
        let mut pointer = String::new();
        for segment in error.path() {
            match segment {
                Segment::Seq { index } => pointer += &format!("/{index}"),
                Segment::Map { key } => pointer += &format!("/{}", key.replace('~', "~0").replace('/', "~1")),
                Segment::Enum { .. } | Segment::Unknown => {}
            }
        }
        // The pointer says where; a line and a column of the body would say it twice.
        let said = error.inner().to_string();
        let said = said.rsplit_once(" at line ").map_or(said.as_str(), |(said, _)| said);
        Problem::invalid(pointer, said)
    })
}

/// Why an operator acts.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(try_from = "String")]
#[schema(value_type = String, min_length = 1, max_length = 1000, pattern = "\\S", example = "the queue is bound again")]
pub(super) struct Reason(pub String);

impl TryFrom<String> for Reason {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.trim().is_empty() || text.chars().count() > REASON_CHARS || text.contains('\0') {
            return Err(format!("must be 1 to {REASON_CHARS} characters without NUL, and not blank"));
        }
        Ok(Self(text))
    }
}

/// The body of an operator's action.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Because {
    /// Why; kept with the name of the token.
    pub reason: Reason,
}

/// One entry of a problem's `errors` for a place in the body.
pub(super) fn field_error(pointer: &str, detail: &str) -> FieldError {
    FieldError { pointer: Some(pointer.to_owned()), parameter: None, detail: detail.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::response::IntoResponse;
    use serde_json::Value;

    async fn shown(problem: Problem) -> (u16, Value) {
        let response = problem.into_response();
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), 10_000).await.expect("a body");
        (status, serde_json::from_slice(&body).expect("JSON"))
    }

    /// Goal: a body is refused in words that name the place.
    #[tokio::test]
    async fn bodies_are_refused_by_place() {
        for (body, status, pointer) in [
            ("", 400, None),
            ("{\"reason\": \"x\"", 400, None),
            ("{\"reason\": \"x\"} y", 400, None),
            ("{}", 422, Some("")),
            ("[]", 422, Some("")),
            (" [\"x\"]", 422, Some("")),
            ("\"x\"", 422, Some("")),
            ("{} y", 400, None),
            ("{\"reason\": 5}", 422, Some("/reason")),
            ("{\"reason\": \" \"}", 422, Some("/reason")),
            ("{\"reason\": \"a\\u0000\"}", 422, Some("/reason")),
            ("{\"reason\": \"x\", \"wy/\": 1}", 422, Some("/wy~1")),
        ] {
            let problem = parse_json::<Because>(body.as_bytes()).expect_err(body);
            let (found, value) = shown(problem).await;
            assert_eq!((found, value["errors"][0]["pointer"].as_str()), (status, pointer), "{body}: {value}");
        }
        assert_eq!(parse_json::<Because>(b"{\"reason\": \"x\"}").expect("fits").reason.0, "x");
    }

    /// Goal: parameters decode, come once, and are refused by name.
    #[tokio::test]
    async fn parameters_are_refused_by_name() {
        let params = |query: &str| Params::new(Some(query));
        let mut some = params("a=%C3%A4+b&label.k=v&limit=3&&c").expect("readable");
        assert_eq!(some.text("a", 10).expect("one").as_deref(), Some("ä b"));
        assert_eq!(some.prefixed("label."), [("k".to_owned(), "v".to_owned())]);
        assert_eq!(some.number("limit", 1..=3).expect("a number"), Some(3));
        assert_eq!(shown(some.finish().expect_err("c is left")).await.1["errors"][0]["parameter"], "c");
        for query in ["a=%ff", "a=%0", "a=%zz", "a=%00", "%ff=a"] {
            assert!(params(query).is_err(), "{query}");
        }
        assert!(params("a=1&a=2").expect("readable").text("a", 10).is_err());
        assert!(params("a=").expect("readable").text("a", 10).is_err());
        for wrong in ["0", "4", "x", "1.0", " 1", "99999999999999999999"] {
            assert!(params(&format!("a={wrong}")).expect("readable").number("a", 1..=3).is_err(), "{wrong}");
        }
    }
}
