//! The HTTP handler: one POST a message, outside every transaction, before the one that accepts it.
//!
//! Its effect is at-least-once with a key: after a crash, or a lost connection to the database, the endpoint gets the
//! same message with the same `Idempotency-Key` again. While the endpoint is not there or asks for patience, all
//! workers of the consumer pause together. Left out on purpose: signing, and anything but POST.

use super::Received;
use super::handler::{Handler, HandlerError, Handling};
use crate::backoff::Backoff;
use crate::http::{Answer, Client, Endpoint, HeaderMap, HeaderName, HeaderValue, HttpError};
use serde_json::{Map, Value};
use sqlx::PgConnection;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So much of an answer's body goes into `last_error`.
const QUOTED_BYTES: usize = 500;
/// So much of it is read, so that the connection of an answer of common size can be used again.
const READ_BYTES: usize = 64 * 1024;
/// Delay before the endpoint is tried again when it is not there.
const ABSENT_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(100), cap: Duration::from_secs(5) };
/// Longest `Retry-After` that is honoured: an endpoint that is back sooner than it thought is not left idle.
const RETRY_AFTER_LIMIT: Duration = Duration::from_secs(60);

/// The message id, the same at every repetition.
const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// The topic.
const TOPIC: &str = "oncebox-topic";
/// A JSON object, in ASCII, of the headers that HTTP cannot carry as fields.
const OTHER_HEADERS: &str = "oncebox-headers";

/// Names that mean something to HTTP, to whoever stands between, or to the endpoint's trust in the caller: a message's
/// producer must not set them. `x-*`, `proxy-*`, `sec-*`, `accept*`, `access-control-*`, `content-*` and `if-*` are too.
const RESERVED: &[&str] = &[
    "authorization",
    "connection",
    "cookie",
    "cookie2",
    "date",
    "dnt",
    "early-data",
    "expect",
    "forwarded",
    "from",
    "host",
    "http2-settings",
    "keep-alive",
    "max-forwards",
    "origin",
    "priority",
    "range",
    "referer",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "upgrade-insecure-requests",
    "user-agent",
    "via",
    "www-authenticate",
    IDEMPOTENCY_KEY,
    TOPIC,
    OTHER_HEADERS,
];
const RESERVED_PREFIXES: &[&str] = &["x-", "proxy-", "sec-", "accept", "access-control-", "content-", "if-"];

/// Posts each message to an endpoint: 2xx applied it, 409 and 422 park it, anything else fails.
pub struct HttpHandler {
    client: Client,
    fixed: HeaderMap,
    limit: Duration,
    pause: Mutex<Pause>,
}

impl fmt::Debug for HttpHandler {
    /// Leaves the fixed headers out: they hold credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpHandler").field("client", &self.client).field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl HttpHandler {
    /// A handler that sends `fixed` with every request and waits at most `limit` for an answer.
    ///
    /// # Errors
    /// [`HttpError::NoTls`].
    pub fn new(endpoint: Endpoint, fixed: HeaderMap, limit: Duration) -> Result<Self, HttpError> {
        Ok(Self { client: Client::new(endpoint)?, fixed, limit, pause: Mutex::default() })
    }

    fn pause(&self) -> std::sync::MutexGuard<'_, Pause> {
        // Two numbers are whole after any panic.
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn post(&self, message: &Received) -> Result<(), HandlerError> {
        let began = Instant::now();
        let shown = self.client.endpoint().shown();
        if let Some(rest) = self.pause().rest(began) {
            return Err(HandlerError::Unavailable { reason: format!("{shown} is paused"), retry_after: Some(rest) });
        }
        let answered =
            self.client.post(fields(message, &self.fixed), message.body.clone(), self.limit, READ_BYTES).await;
        let verdict = verdict(answered);
        if !matches!(verdict, Verdict::Absent { .. }) {
            self.pause().end();
        }
        match verdict {
            Verdict::Applied => Ok(()),
            Verdict::Park(reason) => Err(HandlerError::Park(format!("{shown} {reason}"))),
            Verdict::Failed(reason) => Err(HandlerError::Failed(format!("{shown} {reason}"))),
            Verdict::Absent { reason, retry_after } => {
                let retry_after = self.pause().begin(began, Instant::now(), retry_after);
                Err(HandlerError::Unavailable { reason: format!("{shown} {reason}"), retry_after: Some(retry_after) })
            }
        }
    }
}

impl Handler for HttpHandler {
    fn works_outside(&self) -> bool {
        true
    }

    fn call_out<'a>(&'a self, message: &'a Received) -> Handling<'a> {
        Box::pin(self.post(message))
    }

    fn is_one_statement(&self) -> bool {
        true
    }

    /// The work is done already.
    fn handle<'a>(&'a self, _: &'a mut PgConnection, _: &'a Received) -> Handling<'a> {
        Box::pin(async { Ok(()) })
    }
}

/// How long no worker calls the endpoint.
#[derive(Debug, Default)]
struct Pause {
    until: Option<Instant>,
    failures: u32,
}

impl Pause {
    fn rest(&self, now: Instant) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(now)).filter(|rest| !rest.is_zero())
    }

    /// Pauses after a call that began at `called`. Calls that were under way together are one failure.
    fn begin(&mut self, called: Instant, now: Instant, retry_after: Option<Duration>) -> Duration {
        if self.until.is_none_or(|until| called >= until) {
            self.failures = self.failures.saturating_add(1);
        }
        let delay = match retry_after {
            Some(asked) => asked.clamp(ABSENT_BACKOFF.initial, RETRY_AFTER_LIMIT),
            None => ABSENT_BACKOFF.jittered(self.failures),
        };
        let until = self.until.map_or(now + delay, |until| until.max(now + delay));
        self.until = Some(until);
        until - now
    }

    /// It was there: the next failure is a first one.
    fn end(&mut self) {
        self.failures = 0;
    }
}

/// What an answer, or its absence, means for the message.
#[derive(Debug, PartialEq)]
enum Verdict {
    Applied,
    Park(String),
    Failed(String),
    Absent { reason: String, retry_after: Option<Duration> },
}

fn verdict(answered: Result<Answer, HttpError>) -> Verdict {
    let answer = match answered {
        Ok(answer) => answer,
        Err(error @ (HttpError::Unreachable(_) | HttpError::NoTls(_))) => {
            return Verdict::Absent { reason: format!("is not there: {error}"), retry_after: None };
        }
        Err(error) => return Verdict::Failed(format!("gave {error}")),
    };
    let quoted = String::from_utf8_lossy(&answer.body[..answer.body.len().min(QUOTED_BYTES)]).replace('\0', "\u{fffd}");
    let said = format!("answered {}: {quoted}", answer.status);
    let said = said.trim_end_matches([':', ' ']).to_owned();
    match answer.status {
        200..=299 => Verdict::Applied,
        300..=399 => Verdict::Failed(format!("{said} (redirects are not followed)")),
        409 | 422 => Verdict::Park(said),
        429 | 502..=504 => Verdict::Absent { reason: said, retry_after: retry_after(&answer.headers) },
        _ => Verdict::Failed(said),
    }
}

/// The seconds of `Retry-After`. Its other form, a date, would trust two clocks: the usual backoff does for it.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get("retry-after")?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds.min(RETRY_AFTER_LIMIT.as_secs())))
}

/// The fields of a message's request. Names are HTTP's, so without case; what the config gives wins over the message,
/// and what HTTP cannot carry as it is goes into `oncebox-headers`.
fn fields(message: &Received, fixed: &HeaderMap) -> HeaderMap {
    let mut fields = HeaderMap::new();
    let mut others = Map::new();
    for (name, value) in &message.headers {
        let field = HeaderName::from_bytes(name.as_bytes()).ok().zip(field_value(value));
        match field
            .filter(|(name, _)| !is_reserved(name.as_str()) && !fixed.contains_key(name) && !fields.contains_key(name))
        {
            Some((name, value)) => drop(fields.insert(name, value)),
            None => drop(others.insert(name.clone(), value.clone())),
        }
    }
    let mut set = |name: &'static str, value: &str| {
        let value = legal(value).or_else(|| legal(&ascii_json(&Value::from(value))));
        if let Some(value) = value {
            fields.insert(HeaderName::from_static(name), value);
        }
    };
    set(IDEMPOTENCY_KEY, &message.id.to_string());
    set(TOPIC, &message.topic);
    if let Some(content_type) = message.content_type.as_deref().filter(|text| legal(text).is_some()) {
        set("content-type", content_type);
    }
    if !others.is_empty() {
        set(OTHER_HEADERS, &ascii_json(&Value::Object(others)));
    }
    for (name, value) in fixed {
        fields.insert(name.clone(), value.clone());
    }
    fields
}

/// Whether the config may set a field of this name in every request: not those that frame the request, or that say
/// which message it carries.
pub fn may_be_fixed(name: &str) -> bool {
    const OURS: &[&str] =
        &["connection", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"];
    !OURS.contains(&name) && name != IDEMPOTENCY_KEY && !name.starts_with("content-") && !name.starts_with("oncebox-")
}

/// True for a name that no message sets.
fn is_reserved(name: &str) -> bool {
    RESERVED.contains(&name) || RESERVED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn field_value(value: &Value) -> Option<HeaderValue> {
    match value {
        Value::String(text) => legal(text),
        Value::Bool(_) | Value::Number(_) => legal(&value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// ASCII that arrives as it was sent: no control characters, and no space at either end, which HTTP would take off.
fn legal(text: &str) -> Option<HeaderValue> {
    let plain = text.bytes().all(|byte| matches!(byte, b' '..=b'~')) && text.trim() == text;
    HeaderValue::from_str(text).ok().filter(|_| plain)
}

/// JSON with every other character escaped.
fn ascii_json(value: &Value) -> String {
    let mut text = String::new();
    for character in value.to_string().chars() {
        match character {
            ' '..='~' => text.push(character),
            other => {
                let mut units = [0; 2];
                text.extend(other.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::MessageId;
    use proptest::prelude::*;
    use serde_json::json;
    use uuid::Uuid;

    fn message(topic: &str, headers: Value) -> Received {
        Received {
            id: MessageId(Uuid::from_u128(7)),
            topic: topic.to_owned(),
            key: None,
            position: None,
            content_type: Some("application/json".to_owned()),
            headers: headers.as_object().expect("an object").clone(),
            body: b"{}".to_vec(),
        }
    }

    fn text<'f>(fields: &'f HeaderMap, name: &str) -> Option<&'f str> {
        fields.get(name).map(|value| value.to_str().expect("ASCII"))
    }

    /// Goal: what HTTP can carry passes as it is; what it cannot, or must not, arrives in `oncebox-headers`.
    #[test]
    fn headers_become_fields() {
        let headers = json!({
            "tenant": "acme", "Count": 3, "ok": true, "traceparent": "00-ab-cd-01", "oncebox-offset": 9,
            "Content-Length": "1", "host": "evil", "Authorization": "forged", "transfer-encoding": "chunked",
            "x-forwarded-for": "1.1.1.1", "idempotency-key": "forged", "accept-encoding": "gzip",
            "naïve": "1", "line": "a\r\nhost: evil", "city": "Zürich 🚀", "padded": " a", "list": [1], "nothing": null,
        });
        let mut fixed = HeaderMap::new();
        fixed.insert("authorization", HeaderValue::from_static("Bearer t"));
        fixed.insert("tenant", HeaderValue::from_static("fixed"));
        let fields = fields(&message("order.placed", headers), &fixed);
        for (name, value) in [
            ("count", "3"),
            ("ok", "true"),
            ("traceparent", "00-ab-cd-01"),
            ("oncebox-offset", "9"),
            ("idempotency-key", "00000000-0000-0000-0000-000000000007"),
            ("oncebox-topic", "order.placed"),
            ("content-type", "application/json"),
            ("authorization", "Bearer t"),
            ("tenant", "fixed"),
        ] {
            assert_eq!(text(&fields, name), Some(value), "{name}");
        }
        assert_eq!(fields.len(), 10, "{fields:?}");
        let others = text(&fields, OTHER_HEADERS).expect("some");
        let others: Value = serde_json::from_str(others).expect("JSON");
        assert_eq!(
            others,
            json!({
                "tenant": "acme", "Content-Length": "1", "host": "evil", "Authorization": "forged",
                "transfer-encoding": "chunked", "x-forwarded-for": "1.1.1.1", "idempotency-key": "forged",
                "accept-encoding": "gzip", "naïve": "1", "line": "a\r\nhost: evil", "city": "Zürich 🚀", "padded": " a",
                "list": [1], "nothing": null,
            })
        );
    }

    proptest! {
        /// Goal: no header is lost, whatever its name and value: it is a field or in `oncebox-headers`.
        #[test]
        fn no_header_is_lost(names in proptest::collection::vec(("\\PC{0,8}|[a-zA-Z-]{1,8}", "\\PC{0,12}"), 0..8)) {
            let headers: Map<String, Value> =
                names.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
            let fields = fields(&message("t", Value::Object(headers.clone())), &HeaderMap::new());
            let others: Value = text(&fields, OTHER_HEADERS).map_or(json!({}), |t| serde_json::from_str(t).expect("JSON"));
            for (name, value) in &headers {
                let as_field = text(&fields, &name.to_ascii_lowercase()) == value.as_str();
                prop_assert!(others.get(name) == Some(value) || as_field, "{name:?}: {value:?} in {fields:?}");
            }
        }
    }

    fn answer(status: u16, body: &[u8]) -> Result<Answer, HttpError> {
        Ok(Answer { status, headers: HeaderMap::new(), body: body.to_vec(), is_whole: true })
    }

    /// Goal: every status, and every way to get none, has its one meaning.
    #[test]
    fn answers_have_one_meaning_each() {
        for status in 100..=599 {
            let verdict = verdict(answer(status, b"why"));
            let text = format!("answered {status}: why");
            let expected = match status {
                200..=299 => Verdict::Applied,
                409 | 422 => Verdict::Park(text),
                429 | 502 | 503 | 504 => Verdict::Absent { reason: text, retry_after: None },
                300..=399 => Verdict::Failed(format!("{text} (redirects are not followed)")),
                _ => Verdict::Failed(text),
            };
            assert_eq!(verdict, expected);
        }
        assert!(matches!(verdict(Err(HttpError::Unreachable("x".to_owned()))), Verdict::Absent { .. }));
        assert!(matches!(verdict(Err(HttpError::TimedOut(Duration::from_secs(1)))), Verdict::Failed(_)));
        assert!(matches!(verdict(Err(HttpError::Broken("x".to_owned()))), Verdict::Failed(_)));
        assert_eq!(verdict(answer(500, b"")), Verdict::Failed("answered 500".to_owned()));
        let Verdict::Failed(text) = verdict(answer(500, &[b'x'; 4_000])) else { panic!("not failed") };
        assert_eq!(text.len(), QUOTED_BYTES + "answered 500: ".len());
    }

    /// Goal: `Retry-After` is honoured up to its bound; calls that fail together are one failure; a pause never shrinks.
    #[test]
    fn pauses_are_bounded() {
        let mut headers = HeaderMap::new();
        for (value, expected) in
            [("7", Some(7)), ("86400", Some(60)), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None)]
        {
            headers.insert("retry-after", HeaderValue::from_static(value));
            assert_eq!(retry_after(&headers), expected.map(Duration::from_secs), "{value}");
        }
        let (mut pause, start) = (Pause::default(), Instant::now());
        assert_eq!(pause.rest(start), None);
        assert_eq!(pause.begin(start, start, Some(Duration::from_secs(7))), Duration::from_secs(7));
        for _ in 0..5 {
            assert!(pause.begin(start, start, None) == Duration::from_secs(7), "a pause shrank");
        }
        assert_eq!((pause.failures, pause.rest(start)), (1, Some(Duration::from_secs(7))));
        let later = start + Duration::from_secs(8);
        assert_eq!(pause.rest(later), None);
        pause.begin(later, later, None);
        assert_eq!(pause.failures, 2);
    }
}
