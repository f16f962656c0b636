//! `/v1/inbox`: the consumers of the API's database, their streams, and their parked messages.

use super::ApiState;
use super::auth::Caller;
use super::outbox;
use super::page::{Listing, Page, PageParams};
use super::parked::{self, Acted, Action, FilterParams};
use super::problem::Problem;
use super::request::{Because, JsonBody, NoParams, Params};
use crate::parked::{Detail, Key, Parked, Side};
use crate::status::{Consumer, Status};
use crate::streams::{self, InboxPlace, InboxStream};
use axum::extract::{Path, State};
use axum::http::Uri;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Serialize;
use utoipa::{OpenApi, ToSchema};
use uuid::Uuid;

/// Longest name of a consumer.
const NAME_BYTES: usize = 255;

/// The inbox at a glance.
#[derive(Debug, Serialize, ToSchema)]
struct Inbox {
    /// When, by the database's clock, RFC 3339.
    at: String,
    /// Inserts into the inbox since the server's counters began, those rolled back included.
    accepted_total: i64,
    /// Every consumer that has accepted or holds a message in this database.
    consumers: Vec<Consumer>,
}

#[derive(OpenApi)]
#[openapi(
    paths(look, list_streams, list_parked, show_parked, retry_parked, discard_parked),
    tags((name = "inbox", description = "What consumers have made of what came."))
)]
pub(super) struct Description;

pub(super) fn routes() -> Router<ApiState> {
    Router::new()
        .route("/v1/inbox", get(look))
        .route("/v1/inbox/streams", get(list_streams))
        .route("/v1/inbox/parked", get(list_parked))
        .route("/v1/inbox/parked/{consumer}/{message_id}", get(show_parked))
        .route("/v1/inbox/parked/{consumer}/{message_id}/actions/retry", post(retry_parked))
        .route("/v1/inbox/parked/{consumer}/{message_id}/actions/discard", post(discard_parked))
}

/// The consumers of this database, and what each could not apply at once.
#[utoipa::path(
    get, path = "/v1/inbox", tag = "inbox", operation_id = "getInbox",
    responses((status = 200, description = "As of now.", body = Inbox, example = json!({
        "at": "2026-01-31T08:00:00.000Z", "accepted_total": 1200,
        "consumers": [{"consumer": "billing",
            "held": {"waiting": 1, "oldest_waiting_s": 4.2, "parked": {"too_many_attempts": 1}}}]
    })))
)]
async fn look(State(state): State<ApiState>, _: NoParams) -> Result<Json<Inbox>, Problem> {
    let Status { at, accepted_total, consumers, .. } = outbox::status(&state).await?;
    Ok(Json(Inbox { at, accepted_total, consumers }))
}

/// What each consumer has settled of each stream, by consumer, source and stream; about a second old.
#[utoipa::path(
    get, path = "/v1/inbox/streams", tag = "inbox", operation_id = "listInboxStreams",
    params(
        ("consumer" = Option<String>, Query, description = "Only this consumer.", min_length = 1, max_length = 255),
        PageParams
    ),
    responses((status = 200, description = "A page; `Link` leads to the next.", body = Listing<InboxStream>,
        headers(("Link" = Option<String>, description = "The next page, rel=\"next\".")), example = json!({
        "items": [{"consumer": "billing", "source": "8c1d9f9e-6d55-4b0e-9b0c-3f5ad3a1c0de",
            "stream": "order.placed#0", "settled": 1188, "last_offset": 1188, "next_offset": null}],
        "next": null
    })))
)]
async fn list_streams(
    State(state): State<ApiState>,
    uri: Uri,
    mut params: Params,
) -> Result<Listing<InboxStream>, Problem> {
    let page = Page::take(&mut params, &uri)?;
    let consumer = params.text("consumer", NAME_BYTES)?;
    params.finish()?;
    let (after, fetch) = (page.after::<InboxPlace>()?, page.fetch());
    let rows = state
        .sessions
        .run(move |conn| {
            Box::pin(async move { Ok(streams::of_inbox(conn, consumer.as_deref(), after.as_ref(), fetch).await?) })
        })
        .await?;
    Ok(page.cut(rows, |row| InboxPlace(row.consumer.clone(), row.source, row.stream.clone())))
}

/// Messages that consumers could not apply and that wait for an operator, by consumer and id.
#[utoipa::path(
    get, path = "/v1/inbox/parked", tag = "inbox", operation_id = "listInboxParked",
    params(
        ("consumer" = Option<String>, Query, description = "Only this consumer's.", min_length = 1, max_length = 255),
        FilterParams,
        PageParams
    ),
    responses((status = 200, description = "A page; `Link` leads to the next.", body = Listing<Parked>,
        headers(("Link" = Option<String>, description = "The next page, rel=\"next\".")), example = json!({
        "items": [{"side": "inbox", "consumer": "billing", "message_id": "019b8d6e-2b00-7c3a-8f00-000000000001",
            "lane": null, "seq": null, "source": "8c1d9f9e-6d55-4b0e-9b0c-3f5ad3a1c0de", "stream": "order.placed#0",
            "offset": 7, "topic": "order.placed", "key": "42", "reason": "too_many_attempts",
            "last_error": "no such customer", "attempts": 5, "first_at": "2026-01-31T08:00:00.000000Z",
            "last_at": "2026-01-31T08:05:00.000000Z"}],
        "next": null
    })))
)]
async fn list_parked(State(state): State<ApiState>, uri: Uri, params: Params) -> Result<Listing<Parked>, Problem> {
    let to_key = |(consumer, message_id): (String, Uuid)| Key::Inbox(consumer, message_id);
    let of_row = |row: &Parked| (row.consumer.clone().unwrap_or_default(), row.message_id.0);
    parked::list(&state, Side::Inbox, params, &uri, to_key, of_row).await
}

/// One parked message, with its headers and its payload.
#[utoipa::path(
    get, path = "/v1/inbox/parked/{consumer}/{message_id}", tag = "inbox", operation_id = "getInboxParked",
    params(
        ("consumer" = String, Path, description = "Who could not apply it.", min_length = 1, max_length = 255, example = "billing"),
        ("message_id" = Uuid, Path, description = "Its id.", example = "019b8d6e-2b00-7c3a-8f00-000000000001")
    ),
    responses((status = 200, description = "It.", body = Detail, example = json!({
        "side": "inbox", "consumer": "billing", "message_id": "019b8d6e-2b00-7c3a-8f00-000000000001", "lane": null,
        "seq": null, "source": "8c1d9f9e-6d55-4b0e-9b0c-3f5ad3a1c0de", "stream": "order.placed#0", "offset": 7,
        "topic": "order.placed", "key": "42", "reason": "too_many_attempts", "last_error": "no such customer",
        "attempts": 5, "first_at": "2026-01-31T08:00:00.000000Z", "last_at": "2026-01-31T08:05:00.000000Z",
        "content_type": "application/json", "published_at": null, "expires_at": null, "headers": {},
        "body": {"encoding": "json", "value": {"order": 42}}
    })), (status = 404, response = super::openapi::NotFound))
)]
async fn show_parked(
    State(state): State<ApiState>,
    Path((consumer, message_id)): Path<(String, Uuid)>,
    _: NoParams,
) -> Result<Json<Detail>, Problem> {
    parked::show(&state, Key::Inbox(consumer, message_id)).await.map(Json)
}

/// Hands a parked message to its handler again, with all its attempts anew.
#[utoipa::path(
    post, path = "/v1/inbox/parked/{consumer}/{message_id}/actions/retry", tag = "inbox",
    operation_id = "retryInboxParked",
    params(
        ("consumer" = String, Path, description = "Who could not apply it.", min_length = 1, max_length = 255, example = "billing"),
        ("message_id" = Uuid, Path, description = "Its id.", example = "019b8d6e-2b00-7c3a-8f00-000000000001")
    ),
    request_body(content = Because, example = json!({"reason": "the customer is there now"})),
    responses(
        (status = 200, description = "Its consumer takes it next.", body = Acted,
            example = json!({"action": "retry", "by": "ops", "reason": "the customer is there now"})),
        (status = 404, response = super::openapi::NotFound)
    )
)]
async fn retry_parked(
    State(state): State<ApiState>,
    caller: Caller,
    Path((consumer, message_id)): Path<(String, Uuid)>,
    _: NoParams,
    JsonBody(because): JsonBody<Because>,
) -> Result<Json<Acted>, Problem> {
    let key = Key::Inbox(consumer, message_id);
    parked::act(&state, key, Action::Retry, &caller.name, because.reason.0).await.map(Json)
}

/// Gives a parked message up for good; who and why are recorded with it.
#[utoipa::path(
    post, path = "/v1/inbox/parked/{consumer}/{message_id}/actions/discard", tag = "inbox",
    operation_id = "discardInboxParked",
    params(
        ("consumer" = String, Path, description = "Who could not apply it.", min_length = 1, max_length = 255, example = "billing"),
        ("message_id" = Uuid, Path, description = "Its id.", example = "019b8d6e-2b00-7c3a-8f00-000000000001")
    ),
    request_body(content = Because, example = json!({"reason": "booked by hand"})),
    responses(
        (status = 200, description = "It is gone.", body = Acted,
            example = json!({"action": "discard", "by": "ops", "reason": "booked by hand"})),
        (status = 404, response = super::openapi::NotFound)
    )
)]
async fn discard_parked(
    State(state): State<ApiState>,
    caller: Caller,
    Path((consumer, message_id)): Path<(String, Uuid)>,
    _: NoParams,
    JsonBody(because): JsonBody<Because>,
) -> Result<Json<Acted>, Problem> {
    let key = Key::Inbox(consumer, message_id);
    parked::act(&state, key, Action::Discard, &caller.name, because.reason.0).await.map(Json)
}
