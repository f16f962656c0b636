//! An HTTP/1.1 client with bounds: a wait for the connection, a wait for the whole, and a size for the answer.
//!
//! One [`Client`] belongs to one endpoint and keeps its connections between requests. What could not be sent because no
//! connection came about ([`HttpError::Unreachable`]) is told apart from what may have been received. Left out on
//! purpose: redirects, which are answers like any other, cookies, proxies, compression, and retries beyond a kept
//! connection that turned out to be closed before anything was sent.

pub use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{HttpConnector, capture_connection};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use std::error::Error;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

/// Longest wait for a connection, TLS included.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// A kept connection is not used again after this: less than the two seconds after which the most impatient of common
/// servers close theirs, so that a request does not meet the close on its way.
const IDLE_LIMIT: Duration = Duration::from_secs(1);
/// Longest wait for the rest of an answer whose status is known: only the connection's reuse depends on it.
const REST_LIMIT: Duration = Duration::from_secs(2);

/// Where requests go, with the credentials of its URL.
#[derive(Clone)]
pub struct Endpoint {
    uri: Uri,
    credentials: Option<HeaderValue>,
}

impl fmt::Debug for Endpoint {
    /// Leaves out credentials and query: either may hold a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

/// Why a URL is no endpoint; its words do not quote the URL, which may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidUrl(&'static str);

impl Endpoint {
    /// Reads `http://` or `https://`, a host, perhaps `user:password@` before it, and a path.
    pub fn parse(url: &str) -> Result<Self, InvalidUrl> {
        let uri: Uri = url.parse().map_err(|_| InvalidUrl("is no valid URL: write http://host:port/path"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(InvalidUrl("must begin with http:// or https://"));
        }
        let authority = uri.authority().ok_or(InvalidUrl("names no host"))?.as_str();
        let (credentials, host) = match authority.rsplit_once('@') {
            Some((user_info, host)) => {
                let decoded = percent_decoded(user_info).ok_or(InvalidUrl("has malformed credentials"))?;
                // Without a colon it is a user without a password.
                let pair = if user_info.contains(':') { decoded } else { [decoded, b":".to_vec()].concat() };
                let mut value = HeaderValue::try_from(format!("Basic {}", base64(&pair)))
                    .map_err(|_| InvalidUrl("has malformed credentials"))?;
                value.set_sensitive(true);
                (Some(value), host.to_owned())
            }
            None => (None, authority.to_owned()),
        };
        if uri.host().is_none_or(str::is_empty) || host.starts_with(':') {
            return Err(InvalidUrl("names no host"));
        }
        if uri.port_u16().is_none() && !host.ends_with(']') && host.contains(':') {
            return Err(InvalidUrl("has a port that is no number"));
        }
        let mut parts = uri.into_parts();
        parts.authority = Some(host.parse().map_err(|_| InvalidUrl("names no valid host"))?);
        let uri = Uri::from_parts(parts).map_err(|_| InvalidUrl("is no valid URL: write http://host:port/path"))?;
        Ok(Self { uri, credentials })
    }

    /// True when the URL holds a user name.
    pub fn has_credentials(&self) -> bool {
        self.credentials.is_some()
    }

    /// The same server and credentials, another path.
    pub fn at(&self, path: &str) -> Result<Self, InvalidUrl> {
        let base = self.uri.path().trim_end_matches('/');
        let mut parts = self.uri.clone().into_parts();
        parts.path_and_query =
            Some(format!("{base}{path}").parse().map_err(|_| InvalidUrl("cannot take such a path"))?);
        let uri = Uri::from_parts(parts).map_err(|_| InvalidUrl("cannot take such a path"))?;
        Ok(Self { uri, credentials: self.credentials.clone() })
    }

    /// Scheme, host, port and path, without credentials and query.
    pub fn shown(&self) -> String {
        let authority = self.uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
        format!("{}://{authority}{}", self.uri.scheme_str().unwrap_or_default(), self.uri.path())
    }
}

/// Why a request got no answer.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// No connection came about, so the endpoint has seen nothing of the request.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// It was sent, and no answer came in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The connection broke before the answer, or the answer was no HTTP.
    #[error("no answer: {0}")]
    Broken(String),
    /// The certificates of this machine cannot be read.
    #[error("no TLS: {0}")]
    NoTls(String),
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Its fields.
    pub headers: HeaderMap,
    /// The body, or as much of it as was asked for and came.
    pub body: Vec<u8>,
    /// Whether that is the whole body.
    pub is_whole: bool,
}

/// A client of one endpoint.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Inner,
    endpoint: Endpoint,
}

#[derive(Debug, Clone)]
enum Inner {
    Plain(legacy::Client<HttpConnector, Full<Bytes>>),
    Tls(legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>),
}

impl Client {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// [`HttpError::NoTls`], for `https` only.
    pub fn new(endpoint: Endpoint) -> Result<Self, HttpError> {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_LIMIT));
        connector.set_nodelay(true);
        connector.enforce_http(false);
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_idle_timeout(IDLE_LIMIT);
        let inner = match endpoint.uri.scheme_str() {
            Some("https") => {
                let tls = HttpsConnectorBuilder::new().with_native_roots();
                let tls = tls.map_err(|error| HttpError::NoTls(error.to_string()))?;
                Inner::Tls(builder.build(tls.https_only().enable_http1().wrap_connector(connector)))
            }
            _ => Inner::Plain(builder.build(connector)),
        };
        Ok(Self { inner, endpoint })
    }

    /// Where its requests go.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Sends the body to the endpoint, and reads at most `keep_bytes` of the answer's.
    pub async fn post(
        &self,
        headers: HeaderMap,
        body: Vec<u8>,
        limit: Duration,
        keep_bytes: usize,
    ) -> Result<Answer, HttpError> {
        self.send(Method::POST, &self.endpoint, headers, body, limit, keep_bytes).await
    }

    /// Asks for a path below the endpoint.
    pub async fn get(&self, path: &str, limit: Duration, keep_bytes: usize) -> Result<Answer, HttpError> {
        let endpoint = self.endpoint.at(path).map_err(|error| HttpError::Broken(error.to_string()))?;
        self.send(Method::GET, &endpoint, HeaderMap::new(), Vec::new(), limit, keep_bytes).await
    }

    async fn send(
        &self,
        method: Method,
        endpoint: &Endpoint,
        headers: HeaderMap,
        body: Vec<u8>,
        limit: Duration,
        keep_bytes: usize,
    ) -> Result<Answer, HttpError> {
        let began = Instant::now();
        let mut request = Request::new(Full::new(Bytes::from(body)));
        *request.method_mut() = method;
        *request.uri_mut() = endpoint.uri.clone();
        *request.headers_mut() = headers;
        if let Some(credentials) = &endpoint.credentials {
            request.headers_mut().insert(hyper::header::AUTHORIZATION, credentials.clone());
        }
        let mut connection = capture_connection(&mut request);
        let asked = match &self.inner {
            Inner::Plain(client) => client.request(request),
            Inner::Tls(client) => client.request(request),
        };
        tokio::pin!(asked);
        let connect_limit = CONNECT_LIMIT.min(limit);
        let answered = tokio::select! {
            answered = &mut asked => Some(answered),
            connected = tokio::time::timeout(connect_limit, connection.wait_for_connection_metadata()) => match connected {
                Ok(_) => None,
                Err(_) => return Err(HttpError::Unreachable(format!("no connection within {connect_limit:?}"))),
            },
        };
        let answered = match answered {
            Some(answered) => answered,
            None => tokio::time::timeout_at(began + limit, asked).await.map_err(|_| HttpError::TimedOut(limit))?,
        };
        let (parts, mut incoming) = answered.map_err(|error| failure(&error))?.into_parts();
        let mut body = Vec::new();
        let rest_by = (began + limit).min(Instant::now() + REST_LIMIT.max(limit / 2));
        let read = tokio::time::timeout_at(rest_by, read(&mut incoming, &mut body, keep_bytes)).await;
        let is_whole = matches!(read, Ok(Ok(true)));
        Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, body, is_whole })
    }
}

/// Reads up to so many bytes; true if that was all. A body that is dropped before its end takes its connection along.
async fn read(incoming: &mut Incoming, into: &mut Vec<u8>, keep_bytes: usize) -> Result<bool, hyper::Error> {
    while let Some(frame) = incoming.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        let room = keep_bytes - into.len();
        into.extend_from_slice(&data[..data.len().min(room)]);
        if data.len() > room {
            return Ok(false);
        }
    }
    Ok(true)
}

fn failure(error: &legacy::Error) -> HttpError {
    // The outer error says only which step failed.
    let mut text = String::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = if text.is_empty() { said } else { format!("{text}: {said}") };
        }
        cause = error.source();
    }
    let text = if text.is_empty() { error.to_string() } else { text };
    match error.is_connect() {
        true => HttpError::Unreachable(text),
        false => HttpError::Broken(text),
    }
}

fn percent_decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let (high, low) = (char::from(bytes.next()?).to_digit(16)?, char::from(bytes.next()?).to_digit(16)?);
                (high * 16 + low) as u8
            }
            byte => byte,
        });
    }
    Some(decoded)
}

/// RFC 4648, with padding: all that basic authentication needs.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let sextet = (word >> (18 - 6 * place) & 63) as usize;
            text.push(if place <= chunk.len() { char::from(ALPHABET[sextet]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: credentials leave the URL, decoded, and are never shown; what is no endpoint is refused without being
    /// quoted.
    #[test]
    fn urls_become_endpoints() {
        let endpoint = Endpoint::parse("http://us%65r:p%40ss@host:15672/base/?token=se-cret").expect("valid");
        assert_eq!(endpoint.credentials.as_ref().expect("given"), &format!("Basic {}", base64(b"user:p@ss")));
        assert_eq!(endpoint.shown(), "http://host:15672/base/");
        assert_eq!(format!("{endpoint:?}"), "http://host:15672/base/");
        assert_eq!(
            endpoint.at("/api/nodes?x=%2F").expect("a path").uri.to_string(),
            "http://host:15672/base/api/nodes?x=%2F"
        );
        let plain = Endpoint::parse("https://[::1]/").expect("valid");
        assert_eq!((plain.uri.host(), plain.has_credentials()), (Some("[::1]"), false));
        for url in [
            "",
            "host",
            "/path",
            "ftp://host/",
            "http://",
            "http://:80/",
            "http://u:p@/",
            "http://h:port/",
            "http://ä/",
        ] {
            assert!(Endpoint::parse(url).is_err(), "{url}");
        }
    }

    /// Goal: the encoding is the standard's: its own test vectors.
    #[test]
    fn base64_follows_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
