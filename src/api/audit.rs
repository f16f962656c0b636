//! `/v1/audit`: every offset held against what each consumer's ledger says, as `oncebox audit` does.

use super::ApiState;
use super::problem::{Kind, Problem};
use super::request::Params;
use crate::audit::{self, AuditOptions, Report};
use crate::replay::ReplayError;
use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use std::time::Duration;
use utoipa::{OpenApi, ToSchema};

/// The grace unless the client says otherwise, as on the command line.
const GRACE: Duration = Duration::from_secs(2);
/// Longest grace: a request has its limit.
const GRACE_LIMIT: Duration = Duration::from_secs(10);
/// Longest audit, below the limit of a request.
const LIMIT: Duration = Duration::from_secs(28);
/// Audits at a time: each opens sessions of its own.
pub(super) const AT_A_TIME: usize = 2;
/// Longest name of a consumer.
const NAME_BYTES: usize = 255;

/// What an audit found.
#[derive(Debug, Serialize, ToSchema)]
struct Audit {
    /// Nothing is missing, doubled or unknown.
    is_clean: bool,
    /// Messages that a consumer lacks.
    missing_count: u64,
    /// Messages that were applied under two ids.
    doubled_count: u64,
    /// Applied offsets that this outbox never produced.
    unknown_count: u64,
    #[serde(flatten)]
    report: Report,
}

#[derive(OpenApi)]
#[openapi(paths(run), tags((name = "audit", description = "Whether anything is missing or doubled.")))]
pub(super) struct Description;

pub(super) fn routes() -> Router<ApiState> {
    Router::new().route("/v1/audit", get(run))
}

/// Per stream: produced, published, applied by each consumer, missing, doubled. What is missing at two looks is missing.
#[utoipa::path(
    get, path = "/v1/audit", tag = "audit", operation_id = "runAudit",
    params(
        ("grace" = Option<String>, Query, description = "How long after a later message of its stream one may still be on its way: 500ms, 2s; at most 10s.", pattern = "^[0-9]{1,5}(ms|s)$", example = "2s"),
        ("consumer" = Option<String>, Query, description = "Only this consumer.", min_length = 1, max_length = 255)
    ),
    responses(
        (status = 200, description = "What was found, also when it is bad.", body = Audit, example = json!({
            "is_clean": false, "missing_count": 1, "doubled_count": 0, "unknown_count": 0,
            "streams": [{"source": "8c1d9f9e-6d55-4b0e-9b0c-3f5ad3a1c0de", "stream": "order.placed#0",
                "produced": 1200, "published": 1198, "unpublished": 0, "waiting": 0, "parked": 2, "discarded": 0}],
            "consumers": [{"consumer": "billing", "source": "8c1d9f9e-6d55-4b0e-9b0c-3f5ad3a1c0de",
                "stream": "order.placed#0", "from": 1, "applied": 1197, "behind": 0, "waiting": 0, "parked": 0,
                "discarded": 0, "missing": [[17, 17]], "doubled": [], "unknown": [], "checked": true}],
            "missing": [{"consumer": "billing", "source": "8c1d9f9e-6d55-4b0e-9b0c-3f5ad3a1c0de",
                "stream": "order.placed#0", "offset": 17, "message_id": "019b8d6e-2b00-7c3a-8f00-000000000001"}]
        })),
        (status = 404, response = super::openapi::NotFound)
    )
)]
async fn run(State(state): State<ApiState>, mut params: Params) -> Result<Json<Audit>, Problem> {
    let grace = params.duration("grace", GRACE_LIMIT)?.unwrap_or(GRACE);
    let consumer = params.text("consumer", NAME_BYTES)?;
    params.finish()?;
    let busy = |_| Problem::unavailable(format!("{AT_A_TIME} audits run at this moment"));
    let _permit = state.audits.try_acquire().map_err(busy)?;
    let options = AuditOptions {
        database_url: state.database_url.clone(),
        consumer_database_urls: state.consumer_database_urls.clone(),
        grace,
    };
    let mut report = match tokio::time::timeout(LIMIT, audit::run(&options)).await {
        Ok(Ok(report)) => report,
        Ok(Err(ReplayError::Db(error))) => return Err(error.into()),
        Ok(Err(error)) => {
            tracing::error!(%error, "an audit failed");
            return Err(Problem::new(Kind::Internal, "the audit failed; the server's log says why"));
        }
        Err(_) => return Err(Problem::unavailable(format!("the audit took longer than {LIMIT:?}"))),
    };
    if let Some(consumer) = consumer {
        report.consumers.retain(|entry| entry.consumer == consumer);
        report.missing.retain(|entry| entry.consumer == consumer);
        // An empty report would pass for a clean one.
        if report.consumers.is_empty() {
            return Err(Problem::not_found(format!("the audit knows no consumer \"{consumer}\" of any stream")));
        }
    }
    Ok(Json(Audit {
        is_clean: report.is_clean(),
        missing_count: report.missing_count(),
        doubled_count: report.doubled_count(),
        unknown_count: report.unknown_count(),
        report,
    }))
}
