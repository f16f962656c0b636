//! `/v1/outbox` and `/v1/relays`: lag and lanes, streams, parked messages, and pauses.

use super::ApiState;
use super::auth::Caller;
use super::page::{Listing, Page, PageParams};
use super::parked::{self, Acted, Action, FilterParams};
use super::problem::Problem;
use super::request::{Because, JsonBody, NoParams, Params, Reason};
use crate::outbox::pause::{self, PauseEntry};
use crate::parked::{Detail, Key, Parked, Side};
use crate::status::{self, Lane, OldestTransaction, Relay, Ring, Scheduled, Source, Status};
use crate::streams::{self, OutboxPlace, OutboxStream};
use axum::extract::{Path, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use utoipa::{OpenApi, ToSchema};

/// The outbox at a glance.
#[derive(Debug, Serialize, ToSchema)]
struct Outbox {
    /// When, by the database's clock, RFC 3339.
    at: String,
    /// The outbox's name.
    source: Source,
    /// Every lane: who sends it, how far behind, and what it holds.
    lanes: Vec<Lane>,
    /// What operators have stopped.
    pauses: Vec<PauseEntry>,
    /// Messages not to be sent yet.
    scheduled: Scheduled,
    /// The log.
    ring: Ring,
    /// Who has been in a transaction for longest, in the whole cluster; windows wait for it.
    oldest_transaction: Option<OldestTransaction>,
}

/// Every relay that lives.
#[derive(Debug, Serialize, ToSchema)]
struct Relays {
    /// When, by the database's clock, RFC 3339.
    at: String,
    /// One entry a process.
    items: Vec<Relay>,
}

/// Every pause in force.
#[derive(Debug, Serialize, ToSchema)]
struct Pauses {
    /// Oldest first.
    items: Vec<PauseEntry>,
}

/// What to pause: topics, a lane, topics of a lane, or (without either) everything.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewPause {
    /// Topics that match this pattern: `*` stands for one word, `#` for any number of words.
    #[schema(min_length = 1, max_length = 255)]
    topic: Option<String>,
    /// This lane.
    #[schema(minimum = 0, maximum = 32767)]
    lane: Option<i32>,
    /// Why, for those who find it paused; kept with the name of the token.
    reason: Reason,
}

/// What a pause was that is over.
#[derive(Debug, Serialize, ToSchema)]
struct Resumed {
    /// The pause as it was.
    pause: PauseEntry,
    /// The token's name.
    #[schema(example = "ops")]
    by: String,
    /// As it was given.
    #[schema(example = "the broker is back")]
    reason: String,
}

#[derive(OpenApi)]
#[openapi(
    paths(
        look, relays, list_streams, list_parked, show_parked, retry_parked, discard_parked, list_pauses, add_pause,
        show_pause, resume
    ),
    tags(
        (name = "outbox", description = "What the application published and relays send."),
        (name = "pauses", description = "What operators have stopped.")
    )
)]
pub(super) struct Description;

pub(super) fn routes() -> Router<ApiState> {
    Router::new()
        .route("/v1/outbox", get(look))
        .route("/v1/relays", get(relays))
        .route("/v1/outbox/streams", get(list_streams))
        .route("/v1/outbox/parked", get(list_parked))
        .route("/v1/outbox/parked/{lane}/{seq}", get(show_parked))
        .route("/v1/outbox/parked/{lane}/{seq}/actions/retry", post(retry_parked))
        .route("/v1/outbox/parked/{lane}/{seq}/actions/discard", post(discard_parked))
        .route("/v1/outbox/pauses", get(list_pauses).post(add_pause))
        .route("/v1/outbox/pauses/{id}", get(show_pause))
        .route("/v1/outbox/pauses/{id}/actions/resume", post(resume))
}

/// One look at everything.
pub(super) async fn status(state: &ApiState) -> Result<Status, Problem> {
    state.sessions.run(|conn| Box::pin(async move { Ok(status::look(conn).await?) })).await
}

/// The outbox at a glance: lag, lanes, held and scheduled messages, and the log.
#[utoipa::path(
    get, path = "/v1/outbox", tag = "outbox", operation_id = "getOutbox",
    responses((status = 200, description = "As of now.", body = Outbox, example = json!({
        "at": "2026-01-31T08:00:00.000Z",
        "source": {"current": "8c1d9f9e-6d55-4b0e-9b0c-3f5ad3a1c0de", "count": 1, "since": "2026-01-01T00:00:00Z",
            "reason": null, "is_here": true, "lanes_behind": 0},
        "lanes": [{"lane": 0, "owner": "5f0c8a52-6f0e-4a53-8d0a-0d7d5f0f8a11", "owner_name": "host:4711", "epoch": 3,
            "lease_left_s": 8.5, "settled_n": 811, "settled_seq": 1200, "newest_n": 812,
            "lag": {"count": 12, "at_least": false}, "lag_s": 0.2, "published_total": 1200,
            "held": {"waiting": 1, "oldest_waiting_s": 4.2, "parked": {"unroutable": 2}}}],
        "pauses": [],
        "scheduled": {"messages": {"count": 0, "at_least": false}, "next_due": null, "next_due_in_s": null},
        "ring": {"current": 0, "current_for_s": 60.5, "retention_s": 604800.0, "oldest_s": 60.1, "plans": 812,
            "slots": [{"slot": 0, "state": "current", "bytes": 65536, "closed_at": null, "cleared_at": null}]},
        "oldest_transaction": null
    })))
)]
async fn look(State(state): State<ApiState>, _: NoParams) -> Result<Json<Outbox>, Problem> {
    let Status { at, source, lanes, pauses, scheduled, ring, oldest_transaction, .. } = status(&state).await?;
    Ok(Json(Outbox { at, source, lanes, pauses, scheduled, ring, oldest_transaction }))
}

/// Every relay that lives, and the lanes it holds.
#[utoipa::path(
    get, path = "/v1/relays", tag = "outbox", operation_id = "listRelays",
    responses((status = 200, description = "As of now.", body = Relays, example = json!({
        "at": "2026-01-31T08:00:00.000Z",
        "items": [{"owner": "5f0c8a52-6f0e-4a53-8d0a-0d7d5f0f8a11", "name": "host:4711", "ready": true, "up_s": 60.5,
            "seen_s_ago": 0.4, "lanes": [0]}]
    })))
)]
async fn relays(State(state): State<ApiState>, _: NoParams) -> Result<Json<Relays>, Problem> {
    let Status { at, relays, .. } = status(&state).await?;
    Ok(Json(Relays { at, items: relays }))
}

/// The streams, by source and name, and how many messages each has.
#[utoipa::path(
    get, path = "/v1/outbox/streams", tag = "outbox", operation_id = "listOutboxStreams", params(PageParams),
    responses((status = 200, description = "A page; `Link` leads to the next.", body = Listing<OutboxStream>,
        headers(("Link" = Option<String>, description = "The next page, rel=\"next\".")), example = json!({
        "items": [{"source": "8c1d9f9e-6d55-4b0e-9b0c-3f5ad3a1c0de", "stream": "order.placed#0", "produced": 1200,
            "waiting": 1, "parked": 2}],
        "next": null
    })))
)]
async fn list_streams(
    State(state): State<ApiState>,
    uri: Uri,
    mut params: Params,
) -> Result<Listing<OutboxStream>, Problem> {
    let page = Page::take(&mut params, &uri)?;
    params.finish()?;
    let (after, fetch) = (page.after::<OutboxPlace>()?, page.fetch());
    let rows = state
        .sessions
        .run(move |conn| Box::pin(async move { Ok(streams::of_outbox(conn, after.as_ref(), fetch).await?) }))
        .await?;
    Ok(page.cut(rows, |row| OutboxPlace(row.source, row.stream.clone())))
}

/// Messages that relays could not send and that wait for an operator, by lane and number in the log.
#[utoipa::path(
    get, path = "/v1/outbox/parked", tag = "outbox", operation_id = "listOutboxParked", params(FilterParams, PageParams),
    responses((status = 200, description = "A page; `Link` leads to the next.", body = Listing<Parked>,
        headers(("Link" = Option<String>, description = "The next page, rel=\"next\".")), example = json!({
        "items": [{"side": "outbox", "consumer": null, "message_id": "019b8d6e-2b00-7c3a-8f00-000000000001", "lane": 0,
            "seq": 7, "source": "8c1d9f9e-6d55-4b0e-9b0c-3f5ad3a1c0de", "stream": "order.placed#0", "offset": 7,
            "topic": "order.placed", "key": "42", "reason": "unroutable", "last_error": "312 NO_ROUTE", "attempts": 1,
            "first_at": "2026-01-31T08:00:00.000000Z", "last_at": "2026-01-31T08:00:00.000000Z"}],
        "next": null
    })))
)]
async fn list_parked(State(state): State<ApiState>, uri: Uri, params: Params) -> Result<Listing<Parked>, Problem> {
    let to_key = |(lane, seq): (i16, i64)| Key::Outbox(lane, seq);
    let of_row = |row: &Parked| (row.lane.unwrap_or_default(), row.seq.unwrap_or_default());
    parked::list(&state, Side::Outbox, params, &uri, to_key, of_row).await
}

/// One parked message, with its headers and its payload.
#[utoipa::path(
    get, path = "/v1/outbox/parked/{lane}/{seq}", tag = "outbox", operation_id = "getOutboxParked",
    params(
        ("lane" = i16, Path, description = "Its lane.", minimum = 0, maximum = 32767, example = 0),
        ("seq" = i64, Path, description = "Its number in the log.", minimum = 1, example = 7)
    ),
    responses((status = 200, description = "It.", body = Detail, example = json!({
        "side": "outbox", "consumer": null, "message_id": "019b8d6e-2b00-7c3a-8f00-000000000001", "lane": 0, "seq": 7,
        "source": "8c1d9f9e-6d55-4b0e-9b0c-3f5ad3a1c0de", "stream": "order.placed#0", "offset": 7,
        "topic": "order.placed", "key": "42", "reason": "unroutable", "last_error": "312 NO_ROUTE", "attempts": 1,
        "first_at": "2026-01-31T08:00:00.000000Z", "last_at": "2026-01-31T08:00:00.000000Z",
        "content_type": "application/json", "published_at": "2026-01-31T07:59:59.000000Z", "expires_at": null,
        "headers": {"trace": "abc"}, "body": {"encoding": "json", "value": {"order": 42}}
    })), (status = 404, response = super::openapi::NotFound))
)]
async fn show_parked(
    State(state): State<ApiState>,
    Path((lane, seq)): Path<(i16, i64)>,
    _: NoParams,
) -> Result<Json<Detail>, Problem> {
    parked::show(&state, Key::Outbox(lane, seq)).await.map(Json)
}

/// Sends a parked message again under its own id and offset, also one that has expired.
#[utoipa::path(
    post, path = "/v1/outbox/parked/{lane}/{seq}/actions/retry", tag = "outbox", operation_id = "retryOutboxParked",
    params(
        ("lane" = i16, Path, description = "Its lane.", minimum = 0, maximum = 32767, example = 0),
        ("seq" = i64, Path, description = "Its number in the log.", minimum = 1, example = 7)
    ),
    request_body(content = Because, example = json!({"reason": "the queue is bound again"})),
    responses(
        (status = 200, description = "A relay sends it next.", body = Acted,
            example = json!({"action": "retry", "by": "ops", "reason": "the queue is bound again"})),
        (status = 404, response = super::openapi::NotFound)
    )
)]
async fn retry_parked(
    State(state): State<ApiState>,
    caller: Caller,
    Path((lane, seq)): Path<(i16, i64)>,
    _: NoParams,
    JsonBody(because): JsonBody<Because>,
) -> Result<Json<Acted>, Problem> {
    parked::act(&state, Key::Outbox(lane, seq), Action::Retry, &caller.name, because.reason.0).await.map(Json)
}

/// Gives a parked message up for good; who and why are recorded with it.
#[utoipa::path(
    post, path = "/v1/outbox/parked/{lane}/{seq}/actions/discard", tag = "outbox", operation_id = "discardOutboxParked",
    params(
        ("lane" = i16, Path, description = "Its lane.", minimum = 0, maximum = 32767, example = 0),
        ("seq" = i64, Path, description = "Its number in the log.", minimum = 1, example = 7)
    ),
    request_body(content = Because, example = json!({"reason": "a test that went astray"})),
    responses(
        (status = 200, description = "It is gone.", body = Acted,
            example = json!({"action": "discard", "by": "ops", "reason": "a test that went astray"})),
        (status = 404, response = super::openapi::NotFound)
    )
)]
async fn discard_parked(
    State(state): State<ApiState>,
    caller: Caller,
    Path((lane, seq)): Path<(i16, i64)>,
    _: NoParams,
    JsonBody(because): JsonBody<Because>,
) -> Result<Json<Acted>, Problem> {
    parked::act(&state, Key::Outbox(lane, seq), Action::Discard, &caller.name, because.reason.0).await.map(Json)
}

/// Every pause in force, oldest first.
#[utoipa::path(
    get, path = "/v1/outbox/pauses", tag = "pauses", operation_id = "listPauses",
    responses((status = 200, description = "All of them.", body = Pauses, example = json!({"items": [
        {"id": 3, "topic": "order.#", "lane": null, "paused_at": "2026-01-31T08:00:00Z", "paused_by": "ops",
            "why": "the shop is moved", "held": 12}]})))
)]
async fn list_pauses(State(state): State<ApiState>, _: NoParams) -> Result<Json<Pauses>, Problem> {
    let items = state.sessions.run(|conn| Box::pin(async move { Ok(pause::list(conn).await?) })).await?;
    Ok(Json(Pauses { items }))
}

/// Stops sending, until resumed. The same pause again is the one that is there.
#[utoipa::path(
    post, path = "/v1/outbox/pauses", tag = "pauses", operation_id = "addPause",
    request_body(content = NewPause, example = json!({"topic": "order.#", "reason": "the shop is moved"})),
    responses(
        (status = 201, description = "Relays heed it within about a second.", body = PauseEntry,
            headers(("Location" = String, description = "Its path.")), example = json!(
            {"id": 3, "topic": "order.#", "lane": null, "paused_at": "2026-01-31T08:00:00Z", "paused_by": "ops",
                "why": "the shop is moved", "held": 0})),
        (status = 200, description = "The same was paused already, by whom and why it says.", body = PauseEntry,
            headers(("Location" = String, description = "Its path.")), example = json!(
            {"id": 3, "topic": "order.#", "lane": null, "paused_at": "2026-01-31T08:00:00Z", "paused_by": "ops",
                "why": "the shop is moved", "held": 12}))
    )
)]
async fn add_pause(
    State(state): State<ApiState>,
    caller: Caller,
    _: NoParams,
    JsonBody(new): JsonBody<NewPause>,
) -> Result<Response, Problem> {
    let by = caller.name.to_string();
    let (entry, is_new) = state
        .sessions
        .run(move |conn| {
            Box::pin(async move {
                let before = pause::list(conn).await?;
                let id = pause::pause(conn, new.topic.as_deref(), new.lane, &new.reason.0, Some(&by)).await?;
                let entry = pause::list(conn).await?.into_iter().find(|entry| entry.id == id);
                // Gone again: somebody resumed it at this moment.
                let gone = || Problem::not_found("the pause was resumed at this moment");
                Ok((entry.ok_or_else(gone)?, before.iter().all(|entry| entry.id != id)))
            })
        })
        .await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    let location = format!("/v1/outbox/pauses/{}", entry.id);
    Ok((status, [(header::LOCATION, location)], Json(entry)).into_response())
}

/// One pause.
#[utoipa::path(
    get, path = "/v1/outbox/pauses/{id}", tag = "pauses", operation_id = "getPause",
    params(("id" = i64, Path, description = "Its id.", minimum = 1, example = 3)),
    responses(
        (status = 200, description = "It.", body = PauseEntry, example = json!(
            {"id": 3, "topic": "order.#", "lane": null, "paused_at": "2026-01-31T08:00:00Z", "paused_by": "ops",
                "why": "the shop is moved", "held": 12})),
        (status = 404, response = super::openapi::NotFound)
    )
)]
async fn show_pause(
    State(state): State<ApiState>,
    Path(id): Path<i64>,
    _: NoParams,
) -> Result<Json<PauseEntry>, Problem> {
    let found = state.sessions.run(|conn| Box::pin(async move { Ok(pause::list(conn).await?) })).await?;
    found.into_iter().find(|entry| entry.id == id).map(Json).ok_or_else(|| no_pause(id))
}

/// Lifts one pause; others stay in force.
#[utoipa::path(
    post, path = "/v1/outbox/pauses/{id}/actions/resume", tag = "pauses", operation_id = "resumePause",
    params(("id" = i64, Path, description = "Its id.", minimum = 1, example = 3)),
    request_body(content = Because, example = json!({"reason": "the shop has moved"})),
    responses(
        (status = 200, description = "It is lifted; relays heed it within about a second.", body = Resumed,
            example = json!({"pause": {"id": 3, "topic": "order.#", "lane": null, "paused_at": "2026-01-31T08:00:00Z",
                "paused_by": "ops", "why": "the shop is moved", "held": 12},
                "by": "ops", "reason": "the shop has moved"})),
        (status = 404, response = super::openapi::NotFound)
    )
)]
async fn resume(
    State(state): State<ApiState>,
    caller: Caller,
    Path(id): Path<i64>,
    _: NoParams,
    JsonBody(because): JsonBody<Because>,
) -> Result<Json<Resumed>, Problem> {
    let (by, reason) = (caller.name.to_string(), because.reason.0);
    tracing::info!(token = by, reason, pause = id, "lifting a pause");
    let pause = state
        .sessions
        .run(move |conn| {
            Box::pin(async move {
                let found = pause::list(conn).await?.into_iter().find(|entry| entry.id == id);
                let entry = found.ok_or_else(|| no_pause(id))?;
                match pause::resume(conn, entry.topic.as_deref(), entry.lane.map(i32::from)).await? {
                    0 => Err(no_pause(id).into()),
                    _ => Ok(entry),
                }
            })
        })
        .await?;
    Ok(Json(Resumed { pause, by, reason }))
}

fn no_pause(id: i64) -> Problem {
    Problem::not_found(format!("no pause {id} is in force"))
}
