//! Parked messages of both sides, behind `/v1/outbox/parked` and `/v1/inbox/parked`: what the two have in common.

use super::ApiState;
use super::page::{Listing, Page};
use super::problem::Problem;
use super::request::Params;
use crate::parked::{self, Detail, Filter, Key, Parked, Side, TopicPattern, Verb};
use serde::Serialize;
use serde::de::DeserializeOwned;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

/// Longest topic pattern, reason or consumer's name in a filter.
const FILTER_BYTES: usize = 255;

/// The filters as the description shows them.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code)]
pub(super) struct FilterParams {
    /// Only this reason, e.g. `unroutable` or `too_many_attempts`.
    #[param(min_length = 1, max_length = 255, required = false)]
    reason: String,
    /// Only topics that match, as a binding does: `order.*`, `order.#`.
    #[param(min_length = 1, max_length = 255, required = false)]
    topic: String,
    /// Only this message.
    #[param(required = false)]
    message_id: Uuid,
}

/// What an operator's action did.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Acted {
    /// `retry` or `discard`.
    #[schema(example = "retry")]
    action: &'static str,
    /// The token's name.
    #[schema(example = "ops")]
    by: String,
    /// As it was given.
    #[schema(example = "the queue is bound again")]
    reason: String,
}

/// Which of the two actions.
#[derive(Debug, Clone, Copy)]
pub(super) enum Action {
    Retry,
    Discard,
}

/// One page of one side.
pub(super) async fn list<K>(
    state: &ApiState,
    side: Side,
    mut params: Params,
    uri: &axum::http::Uri,
    to_key: fn(K) -> Key,
    of_row: fn(&Parked) -> K,
) -> Result<Listing<Parked>, Problem>
where
    K: Serialize + DeserializeOwned,
{
    let page = Page::take(&mut params, uri)?;
    let filter = Filter {
        side: Some(side),
        ids: params.parsed("message_id")?.map(|id| vec![id]),
        reason: params.text("reason", FILTER_BYTES)?,
        topic: params.text("topic", FILTER_BYTES)?.as_deref().map(TopicPattern::new),
        consumer: if side == Side::Inbox { params.text("consumer", FILTER_BYTES)? } else { None },
        since_s: None,
    };
    params.finish()?;
    let (after, fetch) = (page.after::<K>()?.map(to_key), page.fetch());
    let rows = state
        .sessions
        .run(move |conn| Box::pin(async move { Ok(parked::page(conn, side, &filter, after.as_ref(), fetch).await?) }))
        .await?;
    Ok(page.cut(rows, of_row))
}

/// One message with its payload.
pub(super) async fn show(state: &ApiState, key: Key) -> Result<Detail, Problem> {
    let found = {
        let key = key.clone();
        state.sessions.run(move |conn| Box::pin(async move { Ok(parked::show_one(conn, &key).await?) })).await?
    };
    found.ok_or_else(|| not_parked(&key))
}

/// Retries or discards one message. The token's name and the reason are kept with what is discarded; of a retry the log
/// keeps them.
pub(super) async fn act(
    state: &ApiState,
    key: Key,
    action: Action,
    by: &str,
    reason: String,
) -> Result<Acted, Problem> {
    let (name, verb) = match action {
        Action::Retry => ("retry", Verb::Retry),
        Action::Discard => ("discard", Verb::Discard { why: reason.clone(), by: by.to_owned() }),
    };
    tracing::info!(token = by, reason, ?key, action = name, "acting on a parked message");
    let done = {
        let key = key.clone();
        state.sessions.run(move |conn| Box::pin(async move { Ok(parked::act(conn, &key, &verb).await?) })).await?
    };
    match done {
        true => Ok(Acted { action: name, by: by.to_owned(), reason }),
        false => Err(not_parked(&key)),
    }
}

fn not_parked(key: &Key) -> Problem {
    Problem::not_found(match key {
        Key::Outbox(lane, seq) => format!("no message {seq} of lane {lane} is parked"),
        Key::Inbox(consumer, id) => format!("no message {id} of consumer \"{consumer}\" is parked"),
    })
}
