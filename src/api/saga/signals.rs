//! Signals to a saga.

use super::super::ApiState;
use super::super::openapi;
use super::super::problem::{Kind, Problem, ProblemBody};
use super::super::request::{JsonBody, NoParams};
use super::super::sessions::Failure;
use super::body::{SagaBody, load};
use super::{PathParts, about, missing, unheld};
use crate::db::{self, DbError};
use crate::saga::store::Definitions;
use crate::saga::{read, start};
use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde_json::value::RawValue;
use sqlx::PgConnection;
use std::sync::Arc;
use utoipa::ToSchema;
use uuid::Uuid;

/// What a signal carries.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SignalBody {
    /// Becomes the output of the step that waits for it.
    #[serde(default)]
    #[schema(value_type = Value, required = false)]
    payload: Option<Box<RawValue>>,
}

/// Sends a signal to a saga.
///
/// A step that waits for it takes it, also one whose turn is yet to come. A saga takes a signal once: the same again
/// changes nothing.
#[utoipa::path(
    post, path = "/v1/sagas/{id}/signals/{name}", tag = "sagas", operation_id = "signalSaga",
    params(
        ("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10"),
        ("name" = String, Path, description = "What a step waits for.", min_length = 1, max_length = 100, example = "approved"),
    ),
    request_body(content = SignalBody, example = json!({"payload": {"by": "anna"}})),
    responses(
        (status = 202, description = "It is sent; the saga as it is now.", body = SagaBody, headers(("ETag" = String, description = "Its `seq`, in quotes."))),
        (status = 404, response = openapi::NotFound),
        (status = 409, description = "The saga has ended, or has the signal with another payload.", body = ProblemBody, content_type = "application/problem+json"),
        (status = 410, response = openapi::Gone),
        (status = 422, description = "No step of the saga's definition waits for such a signal, or the body does not fit.", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(super) async fn signal(
    State(state): State<ApiState>,
    Extension(definitions): Extension<Arc<Definitions>>,
    path: PathParts,
    _: NoParams,
    JsonBody(SignalBody { payload }): JsonBody<SignalBody>,
) -> Result<Response, Problem> {
    let (id, name) = (path.id()?, path.text("name").to_owned());
    let saga = state.sessions.run(move |conn| {
        Box::pin(async move {
            match start::signal(conn, id, &name, payload.as_deref()).await {
                Ok(()) => load(conn, &definitions, id).await,
                Err(error) => Err(refused(conn, id, error).await),
            }
        })
    });
    Ok(saga.await?.response(StatusCode::ACCEPTED))
}

/// What a client is told when it is not sent.
async fn refused(conn: &mut PgConnection, id: Uuid, error: DbError) -> Failure {
    let DbError::Sqlx(sql) = &error else { return error.into() };
    let message = sql.as_database_error().map(|error| error.message().to_owned()).unwrap_or_default();
    // The words begin with the argument's name, which is the path's here.
    let (argument, words) = message.split_once(": ").unwrap_or(("", &message));
    let kind = match db::sqlstate(sql).as_deref() {
        Some("P0002") => return missing(conn, id).await,
        Some(code @ ("22P02" | "22P05")) => return unheld("/payload", code).into(),
        Some("22023") if argument == "payload" => return Problem::invalid("/payload", words).into(),
        Some("22023") => Kind::Invalid,
        Some("55000" | "23505") => Kind::Conflict,
        _ => return error.into(),
    };
    let problem = Problem::new(kind, words);
    match read::standings(conn, &[id]).await.map(|mut found| found.pop()) {
        Ok(Some(saga)) => about(problem, &saga).into(),
        Ok(None) => missing(conn, id).await,
        Err(error) => error.into(),
    }
}
