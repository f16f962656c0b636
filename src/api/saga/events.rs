//! A saga's history as it happens: server-sent events (WHATWG HTML §9.2).
//!
//! Each history row is one event, whose id is its `seq`: a client that lost the connection goes on behind the last one
//! it has. Every stream ends, with an event `end` that says why; one that ended for time is asked for again.

use super::super::ApiState;
use super::super::openapi;
use super::super::problem::{Kind, Problem};
use super::super::request::Params;
use super::text::Span;
use super::watch::{Watch, Watcher};
use super::{PathParts, missing};
use crate::saga::read::{self, HistoryPart, HistoryRow};
use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::Stream;
use futures_util::stream::unfold;
use serde_json::json;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::Instant;
use utoipa::IntoParams;
use uuid::Uuid;

/// Longest stream: proxies and balancers move on, and a client that is gone is noticed.
const STREAM_LIMIT: Duration = Duration::from_secs(300);
/// Between two signs of life: less than the minute after which common proxies give up.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Rows that are read at once.
const ROWS: i64 = 100;
/// Pause after the database could not be read.
const AWAY_PAUSE: Duration = Duration::from_secs(1);

/// The parameters as the description shows them.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code)]
pub(super) struct StreamParams {
    /// Begin behind this row; `Last-Event-ID` goes before it.
    #[param(required = false, minimum = 0, default = 0)]
    after: i64,
    /// How long the stream lasts at most, up to 5m.
    #[param(required = false, pattern = "^[0-9]{1,6}(ms|s|m)$", default = "5m")]
    lasting: String,
}

/// A saga's history as it happens.
///
/// Server-sent events: the id is the row's `seq`, the name what happened, the data the row as JSON as in `/history`.
/// `Last-Event-ID` goes on behind that row. A comment comes every 15 s. The last event is `end`, whose `reason` is
/// `final` (the saga has ended and all was sent), `time` (5 minutes, or `lasting`), `shutdown` or `gone`.
#[utoipa::path(
    get, path = "/v1/sagas/{id}/events", tag = "sagas", operation_id = "streamSagaEvents",
    params(
        ("id" = Uuid, Path, description = "The saga's.", example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10"),
        ("Last-Event-ID" = Option<String>, Header, description = "The last row the client has.", pattern = "^[0-9]{0,18}$", example = "7"),
        StreamParams,
    ),
    responses(
        (status = 200, description = "The stream.", body = String, content_type = "text/event-stream", example = "id: 2\nevent: due\ndata: {\"seq\": 2}\n\nevent: end\ndata: {\"reason\": \"final\"}\n\n"),
        (status = 404, response = openapi::NotFound),
        (status = 410, response = openapi::Gone),
    )
)]
pub(super) async fn events(
    State(state): State<ApiState>,
    Extension(watch): Extension<Watch>,
    path: PathParts,
    mut params: Params,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let id = path.id()?;
    let after = params.number("after", 0..=i64::MAX)?.unwrap_or(0);
    let lasting = params.parsed::<Span>("lasting")?.map_or(STREAM_LIMIT, Span::duration);
    params.finish()?;
    let after = match headers.get("last-event-id").map(HeaderValue::to_str) {
        None => after,
        Some(Ok("")) => after,
        Some(text) => {
            let number = text.ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
            number.and_then(|text| text.parse().ok()).ok_or_else(|| {
                Problem::new(Kind::Malformed, "Last-Event-ID must be the id of an event of this stream, a number")
            })?
        }
    };
    let watcher = watch.stream(&state.sessions, id)?;
    let until = Instant::now() + lasting.min(STREAM_LIMIT);
    let mut stream = Streamed { state, id, after, until, watcher, rows: VecDeque::new(), is_ended: false };
    stream.read().await?;
    let events = unfold(stream, |mut stream| async move { stream.next().await.map(|event| (Ok(event), stream)) });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT)))
}

struct Streamed {
    state: ApiState,
    id: Uuid,
    /// The last row that was sent.
    after: i64,
    until: Instant,
    watcher: Watcher,
    /// Read, to be sent.
    rows: VecDeque<HistoryRow>,
    is_ended: bool,
}

impl Streamed {
    /// The next event; none after `end`.
    async fn next(&mut self) -> Option<Event> {
        if self.is_ended {
            return None;
        }
        loop {
            if let Some(row) = self.rows.pop_front() {
                self.after = row.seq;
                // Rows hold no line breaks, so that one is one line of data.
                let data = serde_json::to_string(&row).unwrap_or_default();
                return Some(Event::default().id(row.seq.to_string()).event(row.event).data(data));
            }
            if Instant::now() >= self.until {
                return Some(self.end("time", None));
            }
            match self.read().await {
                Ok(_) if !self.rows.is_empty() => continue,
                Ok(part) if part.status.is_final() => return Some(self.end("final", Some(part.status.as_str()))),
                Ok(_) => {}
                Err(problem) if problem.is(Kind::NotFound) || problem.is(Kind::Gone) => {
                    return Some(self.end("gone", None));
                }
                // Said in the log; the stream outlasts it.
                Err(_) => tokio::time::sleep(AWAY_PAUSE).await,
            }
            let shutdown = self.state.shutdown.clone();
            tokio::select! {
                () = self.watcher.moved_beyond(self.after) => {}
                () = tokio::time::sleep_until(self.until) => return Some(self.end("time", None)),
                () = shutdown.cancelled() => return Some(self.end("shutdown", None)),
            }
        }
    }

    /// Reads what is behind the last row that was sent.
    async fn read(&mut self) -> Result<HistoryPart, Problem> {
        let (id, after) = (self.id, self.after);
        let part = self.state.sessions.run(move |conn| {
            Box::pin(async move {
                match read::history(conn, id, after, ROWS).await? {
                    Some(part) => Ok(part),
                    None => Err(missing(conn, id).await),
                }
            })
        });
        let mut part = part.await?;
        self.rows = std::mem::take(&mut part.rows).into();
        Ok(part)
    }

    fn end(&mut self, reason: &str, status: Option<&str>) -> Event {
        self.is_ended = true;
        let data = json!({ "reason": reason, "seq": self.after, "saga_status": status });
        Event::default().event("end").data(data.to_string())
    }
}
