//! The REST API. So far: is the process alive, and could it do its work.
//!
//! `/healthz` answers while the process runs, `/readyz` asks the database each time. Both are open: an orchestrator
//! calls them without credentials, and they tell nothing about messages.

mod metrics;

use crate::db::{self, SessionOptions};
use crate::migrate;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use utoipa::{OpenApi, ToSchema};

/// Longest wait of `/readyz` for the database.
const READY_LIMIT: Duration = Duration::from_secs(3);

/// What `/healthz` and `/readyz` answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ok`.
    #[schema(example = "ok")]
    status: &'static str,
}

/// An error as RFC 9457 describes it, sent as `application/problem+json`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Problem {
    /// Names the kind of problem.
    #[serde(rename = "type")]
    #[schema(example = "about:blank")]
    kind: &'static str,
    /// A few words.
    #[schema(example = "Service Unavailable")]
    title: &'static str,
    /// The HTTP status.
    #[schema(example = 503)]
    status: u16,
    /// What is wrong here.
    #[schema(example = "the database has no oncebox schema: run `oncebox migrate`")]
    detail: String,
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, [(header::CONTENT_TYPE, "application/problem+json")], Json(self)).into_response()
    }
}

#[derive(OpenApi)]
#[openapi(
    info(title = "oncebox", description = "Exactly-once messaging for Postgres and RabbitMQ.", license(name = "Apache-2.0", identifier = "Apache-2.0")),
    paths(healthz, readyz, metrics::metrics),
    components(schemas(Health, Problem)),
    tags((name = "health", description = "For orchestrators."), (name = "metrics", description = "For Prometheus."))
)]
struct Description;

/// The API's description as `openapi/openapi.yaml` holds it.
pub fn openapi_yaml() -> String {
    Description::openapi().to_yaml().expect("the description is serialisable")
}

/// The API's routes.
pub fn router(database_url: String) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.yaml", get(|| async { ([(header::CONTENT_TYPE, "application/yaml")], openapi_yaml()) }))
        .fallback(|| async {
            let detail = "there is nothing here: see /openapi.yaml".to_owned();
            Problem { kind: "about:blank", title: "Not Found", status: 404, detail }
        })
        .with_state(Arc::new(database_url))
}

/// Is the process alive?
#[utoipa::path(get, path = "/healthz", tag = "health", responses((status = 200, description = "It runs.", body = Health)))]
async fn healthz() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// Could it do its work: does the database answer, with the schema this program was built for?
#[utoipa::path(
    get, path = "/readyz", tag = "health",
    responses(
        (status = 200, description = "It could.", body = Health),
        (status = 503, description = "It could not; `detail` says why.", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn readyz(State(database_url): State<Arc<String>>) -> Result<Json<Health>, Problem> {
    let session = SessionOptions {
        application_name: "oncebox serve",
        statement_timeout: READY_LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        index_scans_only: false,
    };
    let check = async {
        let mut conn = db::connect(&database_url, session).await?;
        migrate::check(&mut conn).await?;
        db::close(conn).await;
        Ok::<_, db::DbError>(())
    };
    let detail = match tokio::time::timeout(READY_LIMIT, check).await {
        Ok(Ok(())) => return Ok(Json(Health { status: "ok" })),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the database did not answer within {READY_LIMIT:?}"),
    };
    Err(Problem { kind: "about:blank", title: "Service Unavailable", status: 503, detail })
}
