//! The REST API: what operators and dashboards ask and do, over HTTP.
//!
//! Every request passes `limits`: sizes, tokens, time, and errors as problems (RFC 9457). Everything below `/v1` needs
//! a token (`auth`); `/healthz`, `/readyz`, `/metrics` and `/openapi.yaml` are open.
//!
//! To add a resource, write a file with `routes() -> Router<ApiState>`, whose paths are whole (`/v1/…`), and a struct
//! `Description` that derives `utoipa::OpenApi` over its operations, and name both in `resources`. A handler takes
//! `State<ApiState>`, `auth::Caller` for the name that is recorded, `request::Params` (or `NoParams`),
//! `page::Page`, `etag::Condition`, and last `request::JsonBody`; it answers `Result<_, Problem>`. Database work goes
//! through `state.sessions.run(|conn| Box::pin(async move { … }))`, which ends whatever becomes of the client. Problems
//! that any operation can answer, and the security scheme, are added to the description by themselves: an operation
//! lists its own.

mod audit;
mod auth;
mod etag;
mod inbox;
mod limits;
mod metrics;
mod openapi;
mod outbox;
mod page;
mod parked;
mod problem;
mod request;
mod saga;
mod server;
mod sessions;

pub use auth::{ENVIRONMENT, Scope, TokenError, Tokens, check_name, hex, line};
pub use openapi::{openapi_json, openapi_yaml};
pub use server::serve;

use crate::db::{self, SessionOptions};
use crate::migrate;
use axum::extract::State;
use axum::http::header;
use axum::routing::get;
use axum::{Json, Router, middleware};
use problem::{Problem, ProblemBody};
use request::NoParams;
use serde::Serialize;
use sessions::Sessions;
use std::ops::Deref;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;
use utoipa::{OpenApi, ToSchema};

/// Longest wait of `/readyz` for the database.
const READY_LIMIT: Duration = Duration::from_secs(3);
/// Sessions of `/metrics` at a time; others wait. Whoever reaches the port may ask, and must not use up the database's
/// connections.
const SCRAPES: usize = 2;

/// What a server is told.
#[derive(Debug, Clone)]
pub struct ApiOptions {
    /// The database.
    pub database_url: String,
    /// Databases of consumers that are not beside the outbox.
    pub consumer_database_urls: Vec<String>,
    /// Who may call.
    pub tokens: Tokens,
    /// `/metrics` needs no token.
    pub metrics_are_open: bool,
}

/// What all handlers share.
#[derive(Debug, Clone)]
struct ApiState(Arc<Shared>);

/// The fields of [`ApiState`].
#[derive(Debug)]
struct Shared {
    database_url: String,
    consumer_database_urls: Vec<String>,
    sessions: Sessions,
    tokens: Tokens,
    metrics_are_open: bool,
    /// Requests at this moment.
    requests: Arc<Semaphore>,
    /// Audits at this moment.
    audits: Semaphore,
    /// When `/readyz` last asked, and what it heard.
    readiness: Mutex<Option<(Instant, Result<(), String>)>>,
    /// Sessions of `/metrics` at this moment.
    scrapes: Semaphore,
    /// Long polls and streams end with it.
    shutdown: CancellationToken,
}

impl ApiState {
    fn new(options: ApiOptions, shutdown: CancellationToken) -> Self {
        let ApiOptions { database_url, consumer_database_urls, tokens, metrics_are_open } = options;
        Self(Arc::new(Shared {
            sessions: Sessions::new(&database_url),
            database_url,
            consumer_database_urls,
            tokens,
            metrics_are_open,
            requests: Arc::new(Semaphore::new(limits::REQUESTS)),
            audits: Semaphore::new(audit::AT_A_TIME),
            readiness: Mutex::default(),
            scrapes: Semaphore::new(SCRAPES),
            shutdown,
        }))
    }
}

impl Deref for ApiState {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// Every resource: its routes and its part of the description.
fn resources() -> Vec<(Router<ApiState>, utoipa::openapi::OpenApi)> {
    vec![
        // One line each; the first one says what the whole is.
        (open_routes(), Description::openapi()),
        (outbox::routes(), outbox::Description::openapi()),
        (inbox::routes(), inbox::Description::openapi()),
        (audit::routes(), audit::Description::openapi()),
        (saga::routes(), saga::Description::openapi()),
    ]
}

/// The API's routes.
fn router(options: ApiOptions, shutdown: CancellationToken) -> Router {
    let state = ApiState::new(options, shutdown);
    let routes = resources().into_iter().fold(Router::new(), |all, (routes, _)| all.merge(routes));
    routes
        .fallback(|| async { Problem::not_found("there is nothing here: see /openapi.yaml") })
        .layer(middleware::from_fn_with_state(state.clone(), limits::guard))
        .with_state(state)
}

/// What `/healthz` and `/readyz` answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ok`.
    #[schema(example = "ok")]
    status: &'static str,
}

#[derive(OpenApi)]
#[openapi(
    info(title = "oncebox", description = "Exactly-once messaging for Postgres and RabbitMQ.", license(name = "Apache-2.0", identifier = "Apache-2.0")),
    paths(healthz, readyz, metrics::metrics, description),
    components(schemas(Health, ProblemBody)),
    tags((name = "health", description = "For orchestrators."), (name = "metrics", description = "For Prometheus."))
)]
struct Description;

fn open_routes() -> Router<ApiState> {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.yaml", get(description))
}

/// The API's description.
#[utoipa::path(
    get, path = "/openapi.yaml", tag = "health", operation_id = "getDescription",
    responses((status = 200, description = "OpenAPI 3.1.", body = Object, content_type = "application/yaml", example = json!({"openapi": "3.1.0"})))
)]
async fn description(_: NoParams) -> ([(header::HeaderName, &'static str); 1], &'static str) {
    // Making it takes long enough to keep a processor busy with it.
    static TEXT: LazyLock<String> = LazyLock::new(openapi_yaml);
    ([(header::CONTENT_TYPE, "application/yaml")], TEXT.as_str())
}

/// Is the process alive?
#[utoipa::path(
    get, path = "/healthz", tag = "health",
    responses((status = 200, description = "It runs.", body = Health, example = json!({"status": "ok"})))
)]
async fn healthz(_: NoParams) -> Json<Health> {
    Json(Health { status: "ok" })
}

/// Could it do its work: does the database answer, with the schema this program was built for?
#[utoipa::path(
    get, path = "/readyz", tag = "health",
    responses(
        (status = 200, description = "It could.", body = Health, example = json!({"status": "ok"})),
        (status = 503, description = "It could not; `detail` says why.", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
async fn readyz(State(state): State<ApiState>, _: NoParams) -> Result<Json<Health>, Problem> {
    // One asks, and those who came before it asked take its answer: however many ask, it is one session.
    let came = Instant::now();
    let mut last = state.readiness.lock().await;
    let answer = match &*last {
        Some((asked, answer)) if *asked >= came => answer.clone(),
        _ => {
            let asked = Instant::now();
            let answer = is_ready(&state.database_url).await;
            *last = Some((asked, answer.clone()));
            answer
        }
    };
    answer.map(|()| Json(Health { status: "ok" })).map_err(Problem::unavailable)
}

/// Whether the database answers, or why not.
async fn is_ready(database_url: &str) -> Result<(), String> {
    let session = SessionOptions {
        application_name: "oncebox serve",
        statement_timeout: READY_LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let check = async {
        let mut conn = db::connect(database_url, session).await?;
        migrate::check(&mut conn).await?;
        db::close(conn).await;
        Ok::<_, db::DbError>(())
    };
    match tokio::time::timeout(READY_LIMIT, check).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err(format!("the database did not answer within {READY_LIMIT:?}")),
    }
}
