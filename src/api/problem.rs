//! Errors as RFC 9457 describes them: every answer of 400 and above is one, `application/problem+json`.
//!
//! A [`Kind`] is the stable part, which programs compare; `detail` is for people.

use crate::db::{self, DbError};
use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// The media type.
pub(super) const CONTENT_TYPE: &str = "application/problem+json";

/// Kinds of problems: a URI that never changes, a title, and the status they come with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Malformed,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    Conflict,
    Gone,
    Stale,
    TooLarge,
    UriTooLong,
    UnsupportedMediaType,
    Invalid,
    PreconditionRequired,
    Internal,
    Unavailable,
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 15] = [
        Self::Malformed,
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::Conflict,
        Self::Gone,
        Self::Stale,
        Self::TooLarge,
        Self::UriTooLong,
        Self::UnsupportedMediaType,
        Self::Invalid,
        Self::PreconditionRequired,
        Self::Internal,
        Self::Unavailable,
    ];

    /// Status, URI, title, and what it says in the description.
    pub(super) fn words(self) -> (u16, &'static str, &'static str, &'static str) {
        match self {
            Self::Malformed => {
                (400, "/problems/malformed", "Bad Request", "Path, query, header or JSON cannot be read.")
            }
            Self::Unauthorized => (401, "/problems/unauthorized", "Unauthorized", "No valid token came along."),
            Self::Forbidden => (403, "/problems/forbidden", "Forbidden", "The token's scope does not reach so far."),
            Self::NotFound => (404, "/problems/not-found", "Not Found", "There is no such thing."),
            Self::MethodNotAllowed => {
                (405, "/problems/method-not-allowed", "Method Not Allowed", "`Allow` says which methods there are.")
            }
            Self::Conflict => (409, "/problems/conflict", "Conflict", "It is not possible in the state things are in."),
            Self::Gone => (410, "/problems/gone", "Gone", "It was there, and its retention is over."),
            Self::Stale => (412, "/problems/stale", "Precondition Failed", "It has changed since it was read."),
            Self::TooLarge => (413, "/problems/too-large", "Content Too Large", "The body is over the limit."),
            Self::UriTooLong => (414, "/problems/uri-too-long", "URI Too Long", "Path and query are over the limit."),
            Self::UnsupportedMediaType => (
                415,
                "/problems/unsupported-media-type",
                "Unsupported Media Type",
                "The body is not of a type that is read here.",
            ),
            Self::Invalid => {
                (422, "/problems/invalid", "Unprocessable Content", "The JSON is not what is asked for; see `errors`.")
            }
            Self::PreconditionRequired => {
                (428, "/problems/precondition-required", "Precondition Required", "`If-Match` is missing.")
            }
            Self::Internal => (500, "/problems/internal", "Internal Server Error", "A defect; the log says more."),
            Self::Unavailable => (
                503,
                "/problems/unavailable",
                "Service Unavailable",
                "The database is away or all is busy: try again after `Retry-After` seconds.",
            ),
        }
    }

    /// The kind that goes with a status.
    pub(super) fn of_status(status: StatusCode) -> Self {
        let found = Self::ALL.into_iter().find(|kind| kind.words().0 == status.as_u16());
        found.unwrap_or(if status.is_server_error() { Self::Internal } else { Self::Malformed })
    }
}

/// One thing that is wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct FieldError {
    /// Where in the body, a JSON pointer (RFC 6901).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "/reason", nullable = false)]
    pub pointer: Option<String>,
    /// Which parameter of the query.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub parameter: Option<String>,
    /// What is wrong there.
    #[schema(example = "must not be empty")]
    pub detail: String,
}

/// An error on its way to the client.
#[derive(Debug)]
pub(super) struct Problem {
    kind: Kind,
    detail: String,
    errors: Vec<FieldError>,
    more: Map<String, Value>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// An error as RFC 9457 describes it, sent as `application/problem+json`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct ProblemBody {
    /// Names the kind of problem; never changes.
    #[serde(rename = "type")]
    #[schema(example = "/problems/unavailable")]
    kind: &'static str,
    /// A few words, the same for the whole kind.
    #[schema(example = "Service Unavailable")]
    title: &'static str,
    /// The HTTP status.
    #[schema(example = 503, minimum = 400, maximum = 599)]
    status: u16,
    /// What is wrong here.
    #[schema(example = "the database has no oncebox schema: run `oncebox migrate`")]
    detail: String,
    /// What is wrong field by field, where that can be said.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    errors: Vec<FieldError>,
    #[serde(flatten)]
    #[schema(ignore)]
    more: Map<String, Value>,
}

impl Problem {
    /// A problem with its words for people.
    pub(super) fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), errors: Vec::new(), more: Map::new(), headers: Vec::new() }
    }

    /// Whether it is of this kind.
    pub(super) fn is(&self, kind: Kind) -> bool {
        self.kind == kind
    }

    /// Busy or away: try again in a second.
    pub(super) fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(Kind::Unavailable, detail).header(header::RETRY_AFTER, HeaderValue::from_static("1"))
    }

    /// Nothing is there.
    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, detail)
    }

    /// A field of the body is wrong.
    pub(super) fn invalid(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        let (pointer, detail) = (pointer.into(), detail.into());
        let whole = if pointer.is_empty() { detail.clone() } else { format!("{pointer}: {detail}") };
        let mut problem = Self::new(Kind::Invalid, whole);
        problem.errors.push(FieldError { pointer: Some(pointer), parameter: None, detail });
        problem
    }

    /// Parameters of the query are wrong.
    pub(super) fn parameters(errors: Vec<(String, String)>) -> Self {
        let words: Vec<String> = errors.iter().map(|(name, detail)| format!("{name}: {detail}")).collect();
        let mut problem = Self::new(Kind::Malformed, words.join("; "));
        let error = |(name, detail)| FieldError { pointer: None, parameter: Some(name), detail };
        problem.errors = errors.into_iter().map(error).collect();
        problem
    }

    /// Replaces the list of what is wrong field by field.
    pub(super) fn errors(mut self, errors: Vec<FieldError>) -> Self {
        self.errors = errors;
        self
    }

    /// Adds a member of its own.
    pub(super) fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.more.insert(name.to_owned(), value.into());
        self
    }

    /// Adds a header.
    pub(super) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}

impl From<DbError> for Problem {
    /// What the database refuses for the caller's values is the caller's; what a second try mends is 503; the rest is
    /// ours, and its words stay in the log.
    fn from(error: DbError) -> Self {
        if let DbError::Sqlx(sql) = &error
            && let Some(code) = db::sqlstate(sql)
        {
            let said = || sql.as_database_error().map_or_else(String::new, |error| error.message().to_owned());
            match code.as_str() {
                // Text that Postgres cannot hold, such as a NUL.
                "22021" | "22P05" => return Self::new(Kind::Malformed, said()),
                "22023" => {
                    let message = said();
                    let (field, reason) = match message.split_once(": ") {
                        Some((field, reason)) if !field.contains(' ') => (format!("/{field}"), reason.to_owned()),
                        _ => (String::new(), message.clone()),
                    };
                    return Self::invalid(field, reason);
                }
                // Refused by the rights of the role or a read-only standby: nothing the caller can mend.
                "42501" => {
                    tracing::error!(%error, "the API's role lacks a right");
                    return Self::new(Kind::Internal, format!("the server's database role lacks a right: {}", said()));
                }
                _ => {}
            }
        }
        match &error {
            DbError::SchemaMissing | DbError::SchemaTooOld { .. } | DbError::SchemaTooNew { .. } => {
                Self::unavailable(error.to_string())
            }
            _ if error.is_transient() => {
                tracing::warn!(%error, "a request failed on the database");
                Self::unavailable(format!("the database does not answer: {error}"))
            }
            DbError::Sqlx(sql) if db::sqlstate(sql).as_deref() == Some("57014") => {
                tracing::warn!(%error, "a request took the database too long");
                Self::unavailable("the database took too long for it")
            }
            _ => {
                tracing::error!(%error, "a request failed");
                Self::new(Kind::Internal, "the server failed; its log says why")
            }
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, kind, title, _) = self.kind.words();
        let status_code = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = ProblemBody { kind, title, status, detail: self.detail, errors: self.errors, more: self.more };
        let mut response = (status_code, [(header::CONTENT_TYPE, CONTENT_TYPE)], Json(body)).into_response();
        for (name, value) in self.headers {
            response.headers_mut().insert(name, value);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: kinds are told apart by status and by URI, and a status finds its kind.
    #[test]
    fn kinds_are_distinct() {
        for kind in Kind::ALL {
            let (status, uri, ..) = kind.words();
            assert!(uri.starts_with("/problems/"), "{uri}");
            assert_eq!(Kind::of_status(StatusCode::from_u16(status).expect("a status")), kind);
        }
        assert_eq!(Kind::of_status(StatusCode::NOT_IMPLEMENTED), Kind::Internal);
        assert_eq!(Kind::of_status(StatusCode::IM_A_TEAPOT), Kind::Malformed);
    }
}
