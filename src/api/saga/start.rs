//! Starting a saga: once a business key, and once an `Idempotency-Key`.

use super::super::ApiState;
use super::super::openapi;
use super::super::problem::{Kind, Problem, ProblemBody};
use super::super::request::{JsonBody, NoParams};
use super::super::sessions::Failure;
use super::body::{SagaBody, load};
use super::text::{Span, Time};
use super::{about, unheld};
use crate::db::{self, DbError};
use crate::saga::start::{self, Start, Started};
use crate::saga::store::Definitions;
use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use utoipa::ToSchema;

/// Name of the header that names a request.
const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Its longest value.
const KEY_BYTES: usize = 255;

/// Longest time a saga may take.
const DEADLINE_LIMIT: Duration = Duration::from_secs(3_650 * 86_400);

/// A saga to be started.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "definition": "order", "business_key": "order-4711", "input": {"sku": "a-1"}, "deadline": "10m",
    "labels": {"customer": "17"}
}))]
pub(super) struct StartBody {
    /// Name of its definition.
    #[schema(min_length = 1, max_length = 100)]
    definition: String,
    /// Version of its definition; left out: the newest.
    #[schema(required = false, minimum = 1)]
    version: Option<i32>,
    /// Unique for the definition; at most 255 bytes.
    #[schema(min_length = 1, max_length = 255)]
    business_key: String,
    /// What its steps can use; left out: `{}`.
    #[serde(default)]
    #[schema(value_type = Value, required = false)]
    input: Option<Box<RawValue>>,
    /// When it begins; left out: now.
    #[schema(value_type = Option<String>, format = DateTime, required = false)]
    start_at: Option<Time>,
    /// How long it may take before it turns back, from its start; left out: as its definition says.
    #[schema(value_type = Option<String>, pattern = "^[0-9]{1,12}(ms|s|m|h|d)$", required = false)]
    deadline: Option<Span>,
    /// What it can be found by: at most 32, together at most 4 KiB.
    #[schema(required = false)]
    labels: Option<BTreeMap<String, String>>,
}

impl StartBody {
    /// Refuses what the database could not hold, by its place.
    fn checked(self) -> Result<Start, Problem> {
        let texts = [("/definition", &self.definition), ("/business_key", &self.business_key)];
        let labels = self.labels.unwrap_or_default();
        let texts =
            texts.into_iter().chain(labels.iter().flat_map(|(name, value)| [("/labels", name), ("/labels", value)]));
        for (pointer, text) in texts {
            if text.contains('\0') {
                return Err(Problem::invalid(pointer, "must not hold \\u0000"));
            }
        }
        // The database refuses it too, unless it is too long for an interval.
        if self.deadline.is_some_and(|span| span.duration() > DEADLINE_LIMIT) {
            return Err(Problem::invalid("/deadline", "must be at most 3650d"));
        }
        Ok(Start {
            definition: self.definition,
            version: self.version,
            business_key: self.business_key,
            input: self.input,
            start_at_us: self.start_at.map(|time| time.micros),
            deadline_ms: self.deadline.map(|span| span.ms),
            labels: labels.into_iter().map(|(name, value)| (name, value.into())).collect(),
        })
    }
}

fn request_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let wrong = |detail: &str| Err(Problem::new(Kind::Malformed, format!("Idempotency-Key: {detail}")));
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    match (values.next().map(HeaderValue::to_str), values.next()) {
        (None, _) => Ok(None),
        (_, Some(_)) => wrong("came more than once"),
        (Some(Ok(key)), None) if (1..=KEY_BYTES).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => wrong("must be 1 to 255 visible ASCII characters"),
    }
}

/// Starts a saga.
///
/// With `Idempotency-Key` a request can be repeated safely: the same body gets the same saga, with 200, and starts
/// nothing. Without it, a request whose answer was lost is answered 409 with the id of the saga that it started.
#[utoipa::path(
    post, path = "/v1/sagas", tag = "sagas", operation_id = "startSaga",
    params(("Idempotency-Key" = Option<String>, Header, description = "The client's own name of this request, kept for the retention of sagas.", min_length = 1, max_length = 255, example = "8f0f9a4e")),
    request_body(content = StartBody, example = json!({"definition": "order", "business_key": "order-4711", "input": {"sku": "a-1"}, "deadline": "10m", "labels": {"customer": "17"}})),
    responses(
        (status = 200, description = "The same request started it before; the saga as it is now.", body = SagaBody, headers(("ETag" = String, description = "Its `seq`, in quotes."), ("Location" = String, description = "Its path."))),
        (status = 201, description = "It is started.", body = SagaBody, headers(("ETag" = String, description = "Its `seq`, in quotes."), ("Location" = String, description = "Its path."))),
        (status = 409, description = "The business key belongs to another saga: `saga_id`.", body = ProblemBody, content_type = "application/problem+json"),
        (status = 410, response = openapi::Gone),
        (status = 422, description = "The body does not fit, there is no such definition, or the `Idempotency-Key` was used with another body.", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(super) async fn start(
    State(state): State<ApiState>,
    Extension(definitions): Extension<Arc<Definitions>>,
    _: NoParams,
    headers: HeaderMap,
    JsonBody(body): JsonBody<StartBody>,
) -> Result<Response, Problem> {
    let key = request_key(&headers)?;
    let saga = body.checked()?;
    let (saga, is_new) = state
        .sessions
        .run(move |conn| {
            Box::pin(async move {
                match start::start(conn, &saga, key.as_deref()).await.map_err(refused)? {
                    Started::New(id) => Ok((load(conn, &definitions, id).await?, true)),
                    Started::Before(id) => Ok((load(conn, &definitions, id).await?, false)),
                    Started::OtherRequest => {
                        let detail = "the Idempotency-Key was used for a request with another body";
                        Err(Problem::new(Kind::Invalid, detail).into())
                    }
                    Started::Taken(other) => {
                        let detail = format!(
                            "business_key: \"{}\" of definition \"{}\" belongs to saga {}",
                            saga.business_key, saga.definition, other.id
                        );
                        Err(about(Problem::new(Kind::Conflict, detail), &other).into())
                    }
                }
            })
        })
        .await?;
    let location = HeaderValue::try_from(format!("/v1/sagas/{}", saga.summary.id));
    let mut response = saga.response(if is_new { StatusCode::CREATED } else { StatusCode::OK });
    if let Ok(location) = location {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

fn refused(error: DbError) -> Failure {
    let DbError::Sqlx(sql) = &error else { return error.into() };
    match db::sqlstate(sql).as_deref() {
        // The other texts were looked at.
        Some(code @ ("22P02" | "22P05")) => unheld("/input", code).into(),
        Some("22023") => Failure::Refused(error.into()),
        _ => error.into(),
    }
}
