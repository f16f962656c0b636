//! A saga as the API answers it, and the description of these resources.

use super::super::etag;
use super::super::page::Listing;
use super::super::sessions::Failure;
use super::examples::Examples;
use super::{actions, definitions, events, list, missing, parts, show, signals, start};
use crate::saga::allowed::Allowed;
use crate::saga::decide::Action;
use crate::saga::definition::Definition;
use crate::saga::read::{self, Detail, SentSignal, Step, Summary};
use crate::saga::snapshot;
use crate::saga::store::Definitions;
use crate::saga::{graph, state};
use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::value::RawValue;
use sqlx::PgConnection;
use std::sync::Arc;
use utoipa::{OpenApi, ToSchema};
use uuid::Uuid;

/// A saga.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Saga)]
pub(super) struct SagaBody {
    #[serde(flatten)]
    pub summary: Summary,
    /// What it was started with.
    #[schema(value_type = Value)]
    input: Box<RawValue>,
    /// In the order of its definition.
    steps: Vec<StepBody>,
    /// In the order of their coming.
    signals: Vec<SentSignal>,
    /// What an operator may do with it now.
    #[schema(value_type = Vec<String>, example = json!(["cancel", "pause"]))]
    pub allowed_actions: Vec<Action>,
}

/// A step of a saga.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = SagaStep)]
pub(super) struct StepBody {
    #[serde(flatten)]
    step: Step,
    /// What an operator may do with it now.
    #[schema(value_type = Vec<String>, example = json!([]))]
    pub allowed_actions: Vec<Action>,
}

impl SagaBody {
    fn new(saga: Detail, allowed: Allowed) -> Self {
        let Detail { summary, input, steps, signals } = saga;
        let steps = steps.into_iter().zip(allowed.steps);
        let steps = steps.map(|(step, allowed_actions)| StepBody { step, allowed_actions }).collect();
        Self { summary, input, steps, signals, allowed_actions: allowed.saga }
    }

    /// Its steps alone.
    pub(super) fn into_steps(self) -> Vec<StepBody> {
        self.steps
    }

    /// The answer, with its entity tag.
    pub(super) fn response(self, status: StatusCode) -> Response {
        let tag = etag::etag(self.summary.seq);
        (status, [(header::ETAG, tag)], Json(self)).into_response()
    }
}

/// A saga as it is; 404 or 410 when it is not.
pub(super) async fn load(conn: &mut PgConnection, definitions: &Definitions, id: Uuid) -> Result<SagaBody, Failure> {
    let (saga, definition) = load_defined(conn, definitions, id).await?;
    let allowed = match definition {
        Some(definition) => Allowed::new(&snapshot::state(&saga, &[]), &definition),
        None => Allowed { saga: Vec::new(), steps: vec![Vec::new(); saga.steps.len()] },
    };
    Ok(SagaBody::new(saga, allowed))
}

/// A saga with what it follows; none when that cannot be followed, so that nothing can be done with the saga either.
pub(super) async fn load_defined(
    conn: &mut PgConnection,
    definitions: &Definitions,
    id: Uuid,
) -> Result<(Detail, Option<Arc<Definition>>), Failure> {
    let Some(saga) = read::show(conn, id).await? else { return Err(missing(conn, id).await) };
    let followed = definitions.of(conn, &[snapshot::state(&saga, &[])]).await?.pop();
    let definition = followed.and_then(|followed| {
        followed.inspect_err(|error| tracing::warn!(saga.id = %id, %error, "a saga that cannot be moved was read")).ok()
    });
    Ok((saga, definition))
}

#[derive(OpenApi)]
#[openapi(
    paths(
        list::sagas, start::start, show::saga, parts::steps, parts::compensations, parts::history, parts::graph, parts::verify,
        events::events, actions::act, actions::act_on_step, actions::resolve, signals::signal,
        definitions::list, definitions::show, definitions::document, definitions::define, definitions::remove,
        definitions::validate,
    ),
    components(schemas(
        SagaBody, StepBody, actions::SagaAction, actions::StepAction, Summary, Step, SentSignal, read::Compensation, read::HistoryRow, read::DefinitionSummary,
        read::VersionSummary, graph::Graph, graph::Node, graph::NodeKind, graph::Edge, state::SagaStatus, state::Phase,
        state::StepStatus, state::CompensationStatus, Listing<Summary>, Listing<read::HistoryRow>,
        Listing<read::DefinitionSummary>, parts::Items<StepBody>, parts::Items<read::Compensation>,
    )),
    modifiers(&Examples),
    tags(
        (name = "sagas", description = "Start, look, act. In problems the saga's own status is `saga_status`."),
        (name = "definitions", description = "What sagas do."),
    )
)]
pub(in crate::api) struct Description;
