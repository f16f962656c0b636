//! One saga: conditional GET and long poll.

use super::super::ApiState;
use super::super::etag::{Condition, etag};
use super::super::limits::WAIT_LIMIT;
use super::super::openapi;
use super::super::problem::Problem;
use super::super::request::Params;
use super::PathParts;
use super::body::{SagaBody, load};
use super::text::Span;
use super::watch::Watch;
use crate::saga::store::Definitions;
use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use utoipa::IntoParams;
use uuid::Uuid;

/// The parameters as the description shows them.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code)]
pub(super) struct WaitParams {
    /// With `If-None-Match`: how long to wait for a change before the answer is 304; at most 60s.
    #[param(required = false, pattern = "^[0-9]{1,5}(ms|s|m)$", example = "30s")]
    wait: String,
}

/// Takes `wait`.
pub(super) fn waiting(params: &mut Params) -> Result<Duration, Problem> {
    let wait = params.parsed::<Span>("wait")?.map_or(Duration::ZERO, Span::duration);
    if wait > WAIT_LIMIT {
        return Err(Problem::parameters(vec![("wait".to_owned(), format!("must be at most {WAIT_LIMIT:?}"))]));
    }
    Ok(wait)
}

/// A saga with its steps.
///
/// The entity tag is the saga's `seq`. With `If-None-Match` the answer is 304 while nothing has changed; with `wait` as
/// well, it comes as soon as something does, or when the time is over.
#[utoipa::path(
    get, path = "/v1/sagas/{id}", tag = "sagas", operation_id = "getSaga",
    params(
        ("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10"),
        ("If-None-Match" = Option<String>, Header, description = "The tag that is known.", example = "\"7\""),
        WaitParams,
    ),
    responses(
        (status = 200, description = "The saga.", body = SagaBody, headers(("ETag" = String, description = "Its `seq`, in quotes."))),
        (status = 304, description = "It is as it was."),
        (status = 404, response = openapi::NotFound),
        (status = 410, response = openapi::Gone),
    )
)]
pub(super) async fn saga(
    State(state): State<ApiState>,
    Extension(watch): Extension<Watch>,
    Extension(definitions): Extension<Arc<Definitions>>,
    path: PathParts,
    mut params: Params,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let id = path.id()?;
    let wait = waiting(&mut params)?;
    params.finish()?;
    let condition = Condition::if_none_match(&headers)?;
    let until = Instant::now() + wait;
    let saga = read(&state, &definitions, id).await?;
    let seq = saga.summary.seq;
    if !condition.names(seq) {
        return Ok(saga.response(StatusCode::OK));
    }
    // Whoever waits holds none of it.
    drop(saga);
    if !wait.is_zero() {
        let mut watcher = watch.wait(&state.sessions, id)?;
        tokio::select! {
            () = watcher.moved_beyond(seq) => return Ok(read(&state, &definitions, id).await?.response(StatusCode::OK)),
            () = tokio::time::sleep_until(until) => {}
            () = state.shutdown.cancelled() => {}
        }
    }
    Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag(seq))]).into_response())
}

/// A saga in a unit of work of its own.
pub(super) async fn read(state: &ApiState, definitions: &Arc<Definitions>, id: Uuid) -> Result<SagaBody, Problem> {
    let definitions = Arc::clone(definitions);
    state.sessions.run(move |conn| Box::pin(async move { load(conn, &definitions, id).await })).await
}
