//! What belongs to a saga: steps, compensations, history, graph.

use super::super::ApiState;
use super::super::etag::etag;
use super::super::openapi;
use super::super::page::{Listing, Page, PageParams};
use super::super::problem::Problem;
use super::super::request::{NoParams, Params};
use super::body::{StepBody, load_defined};
use super::{PathParts, missing, show};
use crate::saga::graph::Graph;
use crate::saga::read::{self, Compensation, HistoryRow};
use crate::saga::store::Definitions;
use crate::saga::verify::{self, Report};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Serialize;
use std::sync::Arc;
use utoipa::{IntoParams, ToSchema};

/// Graphviz' language.
const DOT: &str = "text/vnd.graphviz";

/// All there is of something.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Items<T> {
    /// In their order.
    items: Vec<T>,
}

/// A saga's steps, in the order of its definition.
#[utoipa::path(
    get, path = "/v1/sagas/{id}/steps", tag = "sagas", operation_id = "listSagaSteps",
    params(("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10")),
    responses(
        (status = 200, description = "The steps.", body = Items<StepBody>, headers(("ETag" = String, description = "The saga's `seq`, in quotes."))),
        (status = 404, response = openapi::NotFound),
        (status = 410, response = openapi::Gone),
    )
)]
pub(super) async fn steps(
    State(state): State<ApiState>,
    Extension(definitions): Extension<Arc<Definitions>>,
    path: PathParts,
    _: NoParams,
) -> Result<([(header::HeaderName, HeaderValue); 1], Json<Items<StepBody>>), Problem> {
    let saga = show::read(&state, &definitions, path.id()?).await?;
    Ok(([(header::ETAG, etag(saga.summary.seq))], Json(Items { items: saga.into_steps() })))
}

/// How a saga's steps are undone: recorded when a step's command goes out, complete when its reply is there.
#[utoipa::path(
    get, path = "/v1/sagas/{id}/compensations", tag = "sagas", operation_id = "listSagaCompensations",
    params(("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10")),
    responses(
        (status = 200, description = "The compensations, in the order of the steps.", body = Items<Compensation>),
        (status = 404, response = openapi::NotFound),
        (status = 410, response = openapi::Gone),
    )
)]
pub(super) async fn compensations(
    State(state): State<ApiState>,
    path: PathParts,
    _: NoParams,
) -> Result<Json<Items<Compensation>>, Problem> {
    let id = path.id()?;
    let found = state.sessions.run(move |conn| {
        Box::pin(async move {
            match read::compensations(conn, id).await? {
                Some(found) => Ok(found),
                None => Err(missing(conn, id).await),
            }
        })
    });
    Ok(Json(Items { items: found.await? }))
}

/// The parameters as the description shows them.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code)]
pub(super) struct AfterParams {
    /// Only rows behind this one.
    #[param(required = false, minimum = 0, default = 0)]
    after: i64,
}

/// What happened to a saga, in order.
#[utoipa::path(
    get, path = "/v1/sagas/{id}/history", tag = "sagas", operation_id = "listSagaHistory",
    params(("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10"), AfterParams, PageParams),
    responses(
        (
            status = 200, description = "A page.", body = Listing<HistoryRow>,
            headers(("Link" = String, description = "The next page, `rel=\"next\"`, if there is one.")),
        ),
        (status = 404, response = openapi::NotFound),
        (status = 410, response = openapi::Gone),
    )
)]
pub(super) async fn history(
    State(state): State<ApiState>,
    path: PathParts,
    mut params: Params,
    uri: Uri,
) -> Result<Listing<HistoryRow>, Problem> {
    let id = path.id()?;
    let after = params.number("after", 0..=i64::MAX)?.unwrap_or(0);
    let page = Page::take(&mut params, &uri)?;
    params.finish()?;
    let (after, limit) = (page.after::<i64>()?.unwrap_or(0).max(after), page.fetch());
    let part = state.sessions.run(move |conn| {
        Box::pin(async move {
            match read::history(conn, id, after, limit).await? {
                Some(part) => Ok(part),
                None => Err(missing(conn, id).await),
            }
        })
    });
    Ok(page.cut(part.await?.rows, |row| row.seq))
}

/// A saga as a graph: JSON, or Graphviz' language when `Accept` asks for it.
#[utoipa::path(
    get, path = "/v1/sagas/{id}/graph", tag = "sagas", operation_id = "getSagaGraph",
    params(("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10")),
    responses(
        (status = 200, description = "Steps, and which waits for which.", content(
            (Graph = "application/json"),
            (String = "text/vnd.graphviz", example = "digraph \"01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10\" {}"),
        )),
        (status = 404, response = openapi::NotFound),
        (status = 410, response = openapi::Gone),
    )
)]
pub(super) async fn graph(
    State(state): State<ApiState>,
    Extension(definitions): Extension<Arc<Definitions>>,
    path: PathParts,
    _: NoParams,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let id = path.id()?;
    let found = state.sessions.run(move |conn| Box::pin(async move { load_defined(conn, &definitions, id).await }));
    let (saga, definition) = found.await?;
    let graph = Graph::new(&saga, definition.as_deref().filter(|_| saga.summary.definition.is_some()));
    let accepts_dot = |value: &HeaderValue| value.to_str().is_ok_and(|text| text.contains(DOT));
    let mut response = match headers.get_all(header::ACCEPT).iter().any(accepts_dot) {
        true => ([(header::CONTENT_TYPE, DOT)], graph.dot()).into_response(),
        false => Json(graph).into_response(),
    };
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    Ok(response)
}

/// What was found of a saga.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Verified {
    /// Everything fits.
    #[schema(example = true)]
    is_clean: bool,
    #[serde(flatten)]
    report: Report,
}

/// Holds a saga's history against its rows, its commands, the outbox and the barrier.
///
/// What does not fit is among `findings`; that is an answer, and no error.
#[utoipa::path(
    get, path = "/v1/sagas/{id}/verify", tag = "sagas", operation_id = "verifySaga",
    params(("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10")),
    responses(
        (status = 200, description = "What was found.", body = Verified),
        (status = 404, response = openapi::NotFound),
        (status = 410, response = openapi::Gone),
    )
)]
pub(super) async fn verify(
    State(state): State<ApiState>,
    path: PathParts,
    _: NoParams,
) -> Result<Json<Verified>, Problem> {
    let id = path.id()?;
    let report = state.sessions.run(move |conn| {
        Box::pin(async move {
            match verify::verify(conn, id).await? {
                Some(report) => Ok(report),
                None => Err(missing(conn, id).await),
            }
        })
    });
    let report = report.await?;
    Ok(Json(Verified { is_clean: report.is_clean(), report }))
}
