//! What operators do with a saga or one of its steps.
//!
//! An action is one event of the saga: decided and written under its lock, after `If-Match` was compared there.

use super::super::ApiState;
use super::super::auth::Caller;
use super::super::etag::Condition;
use super::super::openapi;
use super::super::problem::{Kind, Problem, ProblemBody};
use super::super::request::{Because, JsonBody, NoParams, Reason};
use super::super::sessions::Failure;
use super::body::{SagaBody, load};
use super::{PathParts, about, missing};
use crate::saga::decide::Refusal;
use crate::saga::read::{self, Standing};
use crate::saga::state::{Event, Operator, Outcome};
use crate::saga::store::{self, ActError, Definitions};
use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use serde_json::Value;
use sqlx::PgConnection;
use std::sync::Arc;
use utoipa::ToSchema;
use uuid::Uuid;

/// What can be done with a saga.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum SagaAction {
    /// Turn back.
    Cancel,
    /// Send nothing new.
    Pause,
    /// Go on.
    Resume,
    /// Try what is stuck again.
    Retry,
    /// Give up as it stands.
    Terminate,
}

/// What can be done with a step, and needs no more than a reason.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum StepAction {
    /// Try it again.
    Retry,
    /// Go on without it.
    Skip,
}

/// What became of a step.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Resolution {
    /// It happened; of an undo: it is undone.
    Succeeded,
    /// It did not happen.
    Failed,
}

/// What became of a step, and who says so.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"reason": "seen in the bank's books", "outcome": "succeeded", "output": {"id": 17}}))]
pub(super) struct Resolved {
    /// Why; kept with the name of the token.
    reason: Reason,
    /// What became of it.
    outcome: Resolution,
    /// What it gave, for the steps that come after it.
    #[serde(default)]
    #[schema(required = false)]
    output: Value,
}

/// Cancels, pauses, resumes, retries or terminates a saga.
///
/// The reason and the token's name are kept in the history. The answer is the saga afterwards; what follows is done by
/// the orchestrator. Two with the same `If-Match`: one of them finds that the saga has moved on.
#[utoipa::path(
    post, path = "/v1/sagas/{id}/actions/{action}", tag = "sagas", operation_id = "actOnSaga",
    params(
        ("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10"),
        ("action" = SagaAction, Path, description = "What to do.", example = "cancel"),
        ("If-Match" = String, Header, description = "The saga's tag as it was read, or `*`.", example = "*", pattern = "^(\\*|\"[0-9]{1,18}\")$"),
    ),
    request_body(content = Because, example = json!({"reason": "the customer called"})),
    responses(
        (status = 202, description = "It is done; the saga as it is now.", body = SagaBody, headers(("ETag" = String, description = "Its new `seq`, in quotes."))),
        (status = 404, response = openapi::NotFound),
        (status = 409, description = "Not in the saga's state; `allowed_actions` says what is.", body = ProblemBody, content_type = "application/problem+json"),
        (status = 410, response = openapi::Gone),
        (status = 412, response = openapi::Stale),
        (status = 428, response = openapi::PreconditionRequired),
    )
)]
pub(super) async fn act(
    State(state): State<ApiState>,
    Extension(definitions): Extension<Arc<Definitions>>,
    caller: Caller,
    path: PathParts,
    _: NoParams,
    condition: Guarded,
    JsonBody(Because { reason }): JsonBody<Because>,
) -> Result<Response, Problem> {
    let by = operator(&caller, reason);
    let event = match path.word("action")? {
        SagaAction::Cancel => Event::Cancel(by),
        SagaAction::Pause => Event::Pause(by),
        SagaAction::Resume => Event::Resume(by),
        SagaAction::Retry => Event::Retry(by),
        SagaAction::Terminate => Event::Terminate(by),
    };
    happen(&state, definitions, path.id()?, condition, event).await
}

/// Retries or skips a step.
///
/// A stuck step is tried again with all its attempts; a step that waits, failed for good, or cannot be undone is skipped.
#[utoipa::path(
    post, path = "/v1/sagas/{id}/steps/{step}/actions/{action}", tag = "sagas", operation_id = "actOnSagaStep",
    params(
        ("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10"),
        ("step" = String, Path, description = "The step's id.", example = "reserve"),
        ("action" = StepAction, Path, description = "What to do.", example = "retry"),
        ("If-Match" = String, Header, description = "The saga's tag as it was read, or `*`.", example = "*", pattern = "^(\\*|\"[0-9]{1,18}\")$"),
    ),
    request_body(content = Because, example = json!({"reason": "the stock is counted again"})),
    responses(
        (status = 202, description = "It is done; the saga as it is now.", body = SagaBody, headers(("ETag" = String, description = "Its new `seq`, in quotes."))),
        (status = 404, response = openapi::NotFound),
        (status = 409, description = "Not in the step's state; `allowed_actions` says what is.", body = ProblemBody, content_type = "application/problem+json"),
        (status = 410, response = openapi::Gone),
        (status = 412, response = openapi::Stale),
        (status = 428, response = openapi::PreconditionRequired),
    )
)]
pub(super) async fn act_on_step(
    State(state): State<ApiState>,
    Extension(definitions): Extension<Arc<Definitions>>,
    caller: Caller,
    path: PathParts,
    _: NoParams,
    condition: Guarded,
    JsonBody(Because { reason }): JsonBody<Because>,
) -> Result<Response, Problem> {
    let (by, step) = (operator(&caller, reason), path.text("step").to_owned());
    let event = match path.word("action")? {
        StepAction::Retry => Event::RetryStep { step, by },
        StepAction::Skip => Event::SkipStep { step, by },
    };
    happen(&state, definitions, path.id()?, condition, event).await
}

/// Says what became of a step.
///
/// For a step whose outcome is unknown or that failed, and for an undo that is stuck: somebody looked.
#[utoipa::path(
    post, path = "/v1/sagas/{id}/steps/{step}/actions/resolve", tag = "sagas", operation_id = "resolveSagaStep",
    params(
        ("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10"),
        ("step" = String, Path, description = "The step's id.", example = "reserve"),
        ("If-Match" = String, Header, description = "The saga's tag as it was read, or `*`.", example = "*", pattern = "^(\\*|\"[0-9]{1,18}\")$"),
    ),
    request_body(content = Resolved, example = json!({"reason": "seen in the bank's books", "outcome": "succeeded", "output": {"id": 17}})),
    responses(
        (status = 202, description = "It is done; the saga as it is now.", body = SagaBody, headers(("ETag" = String, description = "Its new `seq`, in quotes."))),
        (status = 404, response = openapi::NotFound),
        (status = 409, description = "Not in the step's state; `allowed_actions` says what is.", body = ProblemBody, content_type = "application/problem+json"),
        (status = 410, response = openapi::Gone),
        (status = 412, response = openapi::Stale),
        (status = 428, response = openapi::PreconditionRequired),
    )
)]
pub(super) async fn resolve(
    State(state): State<ApiState>,
    Extension(definitions): Extension<Arc<Definitions>>,
    caller: Caller,
    path: PathParts,
    _: NoParams,
    condition: Guarded,
    JsonBody(Resolved { reason, outcome, output }): JsonBody<Resolved>,
) -> Result<Response, Problem> {
    let outcome = match outcome {
        Resolution::Succeeded => Outcome::Succeeded,
        Resolution::Failed => Outcome::Failed,
    };
    let event = Event::ResolveStep {
        step: path.text("step").to_owned(),
        outcome,
        output: Some(output).filter(|output| !output.is_null()),
        by: operator(&caller, reason),
    };
    happen(&state, definitions, path.id()?, condition, event).await
}

fn operator(caller: &Caller, Reason(why): Reason) -> Operator {
    Operator { who: caller.name.to_string(), why }
}

/// `If-Match`, which is there: looked at before the body is.
#[derive(Debug)]
pub(super) struct Guarded(Condition);

impl<S: Sync> axum::extract::FromRequestParts<S> for Guarded {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, _: &S) -> Result<Self, Problem> {
        Self::new(&parts.headers)
    }
}

impl Guarded {
    fn new(headers: &HeaderMap) -> Result<Self, Problem> {
        let condition = Condition::if_match(headers)?;
        // It says what is missing for any number.
        condition.allows_change(0)?;
        Ok(Self(condition))
    }

    /// The number at which the change may happen: any, or the saga's own if it is among those that are named.
    fn seq(&self, saga: &Standing) -> Result<Option<i64>, Problem> {
        match (&self.0, self.0.allows_change(saga.seq)?) {
            (Condition::Any, _) => Ok(None),
            (_, true) => Ok(Some(saga.seq)),
            (_, false) => Err(stale(saga)),
        }
    }
}

fn stale(saga: &Standing) -> Problem {
    about(Problem::new(Kind::Stale, format!("the saga has moved on, its ETag is \"{}\"", saga.seq)), saga)
}

async fn happen(
    state: &ApiState,
    definitions: Arc<Definitions>,
    id: Uuid,
    condition: Guarded,
    event: Event,
) -> Result<Response, Problem> {
    let saga = state.sessions.run(move |conn| {
        Box::pin(async move {
            let Some(saga) = standing(conn, id).await? else { return Err(missing(conn, id).await) };
            let expected = condition.seq(&saga)?;
            match store::act(conn, &definitions, id, &event, expected).await {
                Ok(_) => load(conn, &definitions, id).await,
                Err(error) => Err(refused(conn, id, error).await),
            }
        })
    });
    Ok(saga.await?.response(StatusCode::ACCEPTED))
}

async fn standing(conn: &mut PgConnection, id: Uuid) -> Result<Option<Standing>, Failure> {
    Ok(read::standings(conn, &[id]).await?.pop())
}

/// What a client is told when nothing came of it.
async fn refused(conn: &mut PgConnection, id: Uuid, error: ActError) -> Failure {
    match error {
        ActError::NotFound(_) | ActError::Purged(_) => missing(conn, id).await,
        ActError::Stale { .. } => match standing(conn, id).await {
            Ok(Some(saga)) => stale(&saga).into(),
            Ok(None) => missing(conn, id).await,
            Err(error) => error,
        },
        ActError::Refused { refusal, status, seq, allowed } => {
            let kind = match refusal {
                Refusal::UnknownStep(_) => Kind::NotFound,
                _ => Kind::Conflict,
            };
            let problem = about(Problem::new(kind, refusal.to_string()), &Standing { id, seq, status });
            problem.with("allowed_actions", serde_json::to_value(allowed).unwrap_or_default()).into()
        }
        ActError::Definition(error) => {
            Problem::new(Kind::Conflict, error.to_string()).with("saga_id", id.to_string()).into()
        }
        ActError::Db(error) => error.into(),
    }
}
