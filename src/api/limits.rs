//! What every request passes through: how many at a time, how long a URI, who may, how long it may take; and every
//! answer of 400 and above leaves as a problem.

use super::ApiState;
use super::auth::Scope;
use super::problem::{self, Kind, Problem};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::{FutureExt, StreamExt};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

/// Longest body of a request.
pub(super) const BODY_BYTES: usize = 1 << 20;
/// Longest path and query.
pub(super) const URI_BYTES: usize = 4 << 10;
/// Requests at a time; the open paths do not count, so that a busy server still shows that it lives.
pub(super) const REQUESTS: usize = 256;
/// Longest request.
pub(super) const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// Longest `wait` of a long poll, which comes on top.
pub(super) const WAIT_LIMIT: Duration = Duration::from_secs(60);
/// Most that is read and thrown away of a body that was refused, so that the client reads the answer and not a reset.
const DISCARDED_BYTES: usize = 64 << 20;
/// Longest time spent on that.
const DISCARD_LIMIT: Duration = Duration::from_secs(5);
/// Most of a foreign error's text that becomes the problem's detail.
const DETAIL_BYTES: usize = 2 << 10;

/// Paths without a token. What is neither here nor below `/v1` does not exist, whatever the router knows.
const OPEN: [&str; 4] = ["/healthz", "/readyz", METRICS, "/openapi.yaml"];
const METRICS: &str = "/metrics";

/// Lets a request in, or not, and sees to its answer.
pub(super) async fn guard(State(state): State<ApiState>, mut request: Request, next: Next) -> Response {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let is_v1 = uri.path() == "/v1" || uri.path().starts_with("/v1/");
    let checked = check(&state, &mut request, is_v1);
    let mut response = match checked {
        Ok(_permit) => {
            let limit = if waits(&uri) { REQUEST_LIMIT + WAIT_LIMIT } else { REQUEST_LIMIT };
            let run = AssertUnwindSafe(next.run(request)).catch_unwind();
            match tokio::time::timeout(limit, run).await {
                Ok(Ok(response)) => response,
                Ok(Err(panic)) => {
                    let said = panic.downcast_ref::<String>().map(String::as_str);
                    let said = said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
                    tracing::error!(%method, path = uri.path(), panic = said, "a request panicked");
                    Problem::new(Kind::Internal, "the server failed; its log says why").into_response()
                }
                Err(_) => Problem::unavailable(format!("it took longer than {limit:?}")).into_response(),
            }
        }
        Err(problem) => {
            discard(request.into_body());
            problem.into_response()
        }
    };
    if response.status().as_u16() >= 400 {
        response = as_problem(response, &method, &uri).await;
    }
    if is_v1 {
        response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    }
    response
}

/// Everything that is decided by the head of a request.
fn check(
    state: &ApiState,
    request: &mut Request,
    is_v1: bool,
) -> Result<Option<tokio::sync::OwnedSemaphorePermit>, Problem> {
    let uri = request.uri();
    let length = uri.path_and_query().map_or(0, |text| text.as_str().len());
    if length > URI_BYTES {
        return Err(Problem::new(Kind::UriTooLong, format!("path and query are over {URI_BYTES} bytes")));
    }
    let closed = is_v1 || (uri.path() == METRICS && !state.metrics_are_open);
    if !closed {
        return match OPEN.contains(&uri.path()) {
            true => Ok(None),
            false => Err(Problem::not_found("there is nothing here: see /openapi.yaml")),
        };
    }
    let permit = state.requests.clone().try_acquire_owned();
    let permit = permit.map_err(|_| Problem::unavailable(format!("there are {REQUESTS} requests at this moment")))?;
    let caller = state.tokens.admit(request.headers(), Scope::needed(request.method()))?;
    if !request.method().is_safe() {
        tracing::info!(token = &*caller.name, method = %request.method(), path = request.uri().path(), "operated");
    }
    request.extensions_mut().insert(caller);
    Ok(Some(permit))
}

/// A long poll says so by its parameter.
fn waits(uri: &Uri) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|pair| pair.starts_with("wait=")))
}

/// Errors of the framework become problems, with their headers and in their words.
async fn as_problem(response: Response, method: &Method, uri: &Uri) -> Response {
    let is_problem = |value: &HeaderValue| value.as_bytes() == problem::CONTENT_TYPE.as_bytes();
    if response.headers().get(header::CONTENT_TYPE).is_some_and(is_problem) {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let kind = Kind::of_status(parts.status);
    let detail = match kind {
        Kind::MethodNotAllowed => format!("{} has no {method}; the header Allow says what it has", uri.path()),
        _ => {
            let text = axum::body::to_bytes(body, DETAIL_BYTES).await.unwrap_or_default();
            match String::from_utf8_lossy(&text).trim() {
                "" => "the request cannot be answered".to_owned(),
                text => text.to_owned(),
            }
        }
    };
    let mut problem = Problem::new(kind, detail).into_response();
    parts.headers.remove(header::CONTENT_TYPE);
    parts.headers.remove(header::CONTENT_LENGTH);
    for (name, value) in &parts.headers {
        problem.headers_mut().append(name.clone(), value.clone());
    }
    problem
}

/// Reads the rest of a refused body and keeps none of it, while the answer is already on its way: a client that still
/// writes to a closed connection would not see it.
pub(super) fn discard(body: Body) {
    let read = async move {
        let mut stream = body.into_data_stream();
        let mut left = DISCARDED_BYTES;
        while let Some(Ok(chunk)) = stream.next().await {
            left = left.saturating_sub(chunk.len());
            if left == 0 {
                break;
            }
        }
    };
    tokio::spawn(tokio::time::timeout(DISCARD_LIMIT, read));
}

#[cfg(test)]
mod tests {
    use super::super::{ApiOptions, Tokens};
    use super::*;
    use axum::Router;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_util::sync::CancellationToken;

    /// Goal: a handler that panics costs its own request a 500 and nobody else anything; a route that is on no list is
    /// not there, whatever the router knows.
    #[tokio::test]
    async fn panics_and_unlisted_routes_are_problems() {
        let options = ApiOptions {
            database_url: String::new(),
            consumer_database_urls: Vec::new(),
            tokens: Tokens::default(),
            metrics_are_open: true,
        };
        let state = ApiState::new(options, CancellationToken::new());
        let router = Router::new()
            .route(
                "/healthz",
                get(|| async {
                    if state_is_bad() {
                        panic!("on purpose")
                    }
                }),
            )
            .route("/secret", get(|| async { "for all to see" }))
            .layer(axum::middleware::from_fn_with_state(state.clone(), guard))
            .with_state(state);
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let server = tokio::spawn(axum::serve(listener, router).into_future());
        for (path, status) in [("/healthz", "500"), ("/secret", "404"), ("/healthz", "500")] {
            let mut stream = tokio::net::TcpStream::connect(address).await.expect("it listens");
            let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.expect("it reads");
            let mut text = String::new();
            stream.read_to_string(&mut text).await.expect("an answer");
            assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {text}");
            assert!(text.contains(problem::CONTENT_TYPE) && !text.contains("on purpose"), "{path}: {text}");
        }
        server.abort();
    }

    fn state_is_bad() -> bool {
        true
    }
}
