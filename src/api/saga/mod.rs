//! Sagas and their definitions: start, look, act.
//!
//! A saga's entity tag is its `seq`: what an operator decided upon is named by `If-Match`, and a saga that has moved on
//! since is left alone. In problems the saga's own status is `saga_status`: RFC 9457 gives `status` to HTTP.

mod actions;
mod body;
mod definitions;
mod events;
mod examples;
mod list;
mod parts;
mod show;
mod signals;
mod start;
mod text;
mod watch;

pub(super) use body::Description;

use super::ApiState;
use super::problem::{Kind, Problem};
use super::sessions::Failure;
use crate::saga::read::{self, Standing};
use crate::saga::store::Definitions;
use axum::extract::FromRequestParts;
use axum::extract::rejection::PathRejection;
use axum::http::request::Parts;
use axum::routing::{get, post};
use axum::{Extension, RequestPartsExt, Router};
use serde::de::DeserializeOwned;
use sqlx::PgConnection;
use std::collections::HashMap;
use std::sync::Arc;
use uuid::Uuid;

/// What this part of the API serves.
pub(super) fn routes() -> Router<ApiState> {
    let sagas = Router::new()
        .route("/v1/sagas", get(list::sagas).post(start::start))
        .route("/v1/sagas/{id}", get(show::saga))
        .route("/v1/sagas/{id}/steps", get(parts::steps))
        .route("/v1/sagas/{id}/compensations", get(parts::compensations))
        .route("/v1/sagas/{id}/history", get(parts::history))
        .route("/v1/sagas/{id}/graph", get(parts::graph))
        .route("/v1/sagas/{id}/verify", get(parts::verify))
        .route("/v1/sagas/{id}/events", get(events::events))
        .route("/v1/sagas/{id}/actions/{action}", post(actions::act))
        .route("/v1/sagas/{id}/steps/{step}/actions/resolve", post(actions::resolve))
        .route("/v1/sagas/{id}/steps/{step}/actions/{action}", post(actions::act_on_step))
        .route("/v1/sagas/{id}/signals/{name}", post(signals::signal))
        .layer(Extension(watch::Watch::new()))
        .layer(Extension(Arc::<Definitions>::default()));
    let definitions = Router::new()
        .route("/v1/definitions", get(definitions::list))
        .route("/v1/definitions/validate", post(definitions::validate))
        .route("/v1/definitions/{name}", get(definitions::show))
        .route(
            "/v1/definitions/{name}/versions/{version}",
            get(definitions::document).put(definitions::define).delete(definitions::remove),
        );
    sagas.merge(definitions)
}

/// What the path of a request says, as text, by the names in the route.
#[derive(Debug)]
struct PathParts(HashMap<String, String>);

impl<S: Sync + Send> FromRequestParts<S> for PathParts {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let found: Result<axum::extract::Path<HashMap<String, String>>, PathRejection> = parts.extract().await;
        let axum::extract::Path(found) =
            found.map_err(|error| Problem::new(Kind::Malformed, format!("the path cannot be read: {error}")))?;
        if found.values().any(|value| value.contains('\0')) {
            return Err(Problem::new(Kind::Malformed, "the path holds a NUL"));
        }
        Ok(Self(found))
    }
}

impl PathParts {
    /// The saga's id.
    fn id(&self) -> Result<Uuid, Problem> {
        let text = self.text("id");
        Uuid::try_parse(text).map_err(|_| Problem::new(Kind::Malformed, format!("id: \"{text}\" is no UUID")))
    }

    /// A part of the route.
    fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// A part that is one of a few words; another one leads nowhere.
    fn word<T: DeserializeOwned>(&self, name: &str) -> Result<T, Problem> {
        let text = self.text(name);
        serde_json::from_value(text.into()).map_err(|_| Problem::not_found(format!("there is no {name} \"{text}\"")))
    }
}

/// Why there is no such saga: it was never there, or is gone.
async fn missing(conn: &mut PgConnection, id: Uuid) -> Failure {
    match read::purged(conn, id).await {
        Ok(Some(purged)) => {
            let detail = format!("saga {id} ended as {} and was removed after its retention", purged.status.as_str());
            let problem = Problem::new(Kind::Gone, detail)
                .with("saga_id", id.to_string())
                .with("saga_status", purged.status.as_str())
                .with("ended_at", purged.ended_at);
            problem.into()
        }
        Ok(None) => Problem::not_found(format!("there is no saga {id}")).with("saga_id", id.to_string()).into(),
        Err(error) => error.into(),
    }
}

/// Adds which saga a problem is about, and where it stands.
fn about(problem: Problem, saga: &Standing) -> Problem {
    problem.with("saga_id", saga.id.to_string()).with("saga_status", saga.status.as_str()).with("seq", saga.seq)
}

/// JSON that Postgres cannot hold though it is JSON: a NUL, or half of a surrogate pair.
fn unheld(pointer: &str, sqlstate: &str) -> Problem {
    let reason = if sqlstate == "22P05" { "must not hold \\u0000" } else { "must not hold half of a surrogate pair" };
    Problem::invalid(pointer, reason)
}
