//! The outbox: `app transaction → `**`outbox`**` → relay → broker`.
//!
//! [`publish`] is all an app needs: one call inside its own transaction. The rest is the relay's side of the
//! tables: [`relays`] and [`lease`] say who publishes a lane, [`journal`] which rows come next and with which offsets,
//! [`held`] what is out of order or parked, [`pause`] what operators have stopped. Left out on purpose: any UPDATE or DELETE of the log itself.

#[cfg(feature = "cli")]
pub mod held;
#[cfg(feature = "cli")]
pub mod history;
#[cfg(feature = "cli")]
pub mod journal;
#[cfg(feature = "cli")]
pub mod lease;
#[cfg(feature = "cli")]
pub mod look;
#[cfg(feature = "cli")]
pub mod offsets;
#[cfg(feature = "cli")]
pub mod pause;
#[cfg(feature = "cli")]
pub mod relays;
#[cfg(feature = "cli")]
pub mod source;
#[cfg(feature = "cli")]
pub mod unroutable;
#[cfg(feature = "cli")]
pub mod void;
#[cfg(feature = "cli")]
pub mod window;

use crate::message::{Headers, MessageId};
use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use std::time::SystemTime;
use uuid::Uuid;

/// What an app publishes. Build it with [`NewMessage::json`] or [`NewMessage::bytes`], then set what is needed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct NewMessage {
    /// Routing key on the broker, 1 to 255 bytes.
    pub topic: String,
    /// The payload.
    pub payload: Payload,
    /// Messages of one key keep their order; at most 255 bytes.
    pub key: Option<String>,
    /// Strings, booleans, int64 and double numbers; at most 8 KiB together.
    pub headers: Headers,
    /// Default: a new UUIDv7.
    pub message_id: Option<MessageId>,
    /// Not before this time.
    pub deliver_at: Option<SystemTime>,
    /// Not after this time: parked as expired instead.
    pub expires_at: Option<SystemTime>,
}

/// A payload, and how it is described on the wire.
#[derive(Debug, Clone)]
pub enum Payload {
    /// JSON; consumers get it as Postgres prints a `jsonb`.
    Json(Value),
    /// Any bytes, with their MIME type of 1 to 255 bytes.
    Bytes {
        /// The payload, byte for byte.
        body: Vec<u8>,
        /// Its MIME type.
        content_type: String,
    },
}

impl NewMessage {
    /// A message with a JSON payload.
    pub fn json(topic: impl Into<String>, payload: Value) -> Self {
        Self::new(topic.into(), Payload::Json(payload))
    }

    /// A message with any payload.
    pub fn bytes(topic: impl Into<String>, body: Vec<u8>, content_type: impl Into<String>) -> Self {
        Self::new(topic.into(), Payload::Bytes { body, content_type: content_type.into() })
    }

    fn new(topic: String, payload: Payload) -> Self {
        Self {
            topic,
            payload,
            key: None,
            headers: Headers::new(),
            message_id: None,
            deliver_at: None,
            expires_at: None,
        }
    }

    /// Sets the ordering key.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// Sets the message id.
    #[must_use]
    pub fn message_id(mut self, id: MessageId) -> Self {
        self.message_id = Some(id);
        self
    }

    /// Sets the time before which it is not sent.
    #[must_use]
    pub fn deliver_at(mut self, at: SystemTime) -> Self {
        self.deliver_at = Some(at);
        self
    }

    /// Sets the time after which it is parked as expired.
    #[must_use]
    pub fn expires_at(mut self, at: SystemTime) -> Self {
        self.expires_at = Some(at);
        self
    }
}

/// Why a message was not published. The caller's transaction is aborted, as after any SQL error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// An argument that broker, relay or consumer could not carry (SQLSTATE 22023); the text names it.
    #[error("{0}")]
    Refused(String),
    /// Anything else the database reports: no schema, no right to EXECUTE, a lost connection.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// Seconds since the epoch as `to_timestamp` takes them; null stays null, and so does the sign before 1970.
fn epoch_seconds(at: Option<SystemTime>) -> Option<f64> {
    at.map(|at| match at.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => since.as_secs_f64(),
        Err(before) => -before.duration().as_secs_f64(),
    })
}

const PUBLISH_JSON: &str =
    "select oncebox.publish($1, $2::jsonb, $3, $4::jsonb, $5, to_timestamp($6), to_timestamp($7))";
const PUBLISH_BYTES: &str =
    "select oncebox.publish_bytes($1, $2, $8, $3, $4::jsonb, $5, to_timestamp($6), to_timestamp($7))";

/// Publishes `message` when the transaction open on `conn` commits; a rollback leaves no trace. Outside a
/// transaction it is durable on return.
///
/// # Errors
/// [`PublishError::Refused`] when an argument cannot be carried, [`PublishError::Database`] otherwise.
///
/// # Cancel safety
/// Not cancel safe: roll the transaction back when the future was dropped.
pub async fn publish(conn: &mut PgConnection, message: NewMessage) -> Result<MessageId, PublishError> {
    let deliver_at = epoch_seconds(message.deliver_at);
    let expires_at = epoch_seconds(message.expires_at);
    let id = message.message_id.map(|id| id.0);
    let query = match message.payload {
        Payload::Json(payload) => sqlx::query_scalar::<_, Uuid>(PUBLISH_JSON)
            .bind(message.topic)
            .bind(Json(payload))
            .bind(message.key)
            .bind(Json(message.headers))
            .bind(id)
            .bind(deliver_at)
            .bind(expires_at),
        Payload::Bytes { body, content_type } => sqlx::query_scalar::<_, Uuid>(PUBLISH_BYTES)
            .bind(message.topic)
            .bind(body)
            .bind(message.key)
            .bind(Json(message.headers))
            .bind(id)
            .bind(deliver_at)
            .bind(expires_at)
            .bind(content_type),
    };
    match query.fetch_one(conn).await {
        Ok(id) => Ok(MessageId(id)),
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("22023") => {
            Err(PublishError::Refused(error.message().to_owned()))
        }
        Err(error) => Err(error.into()),
    }
}

/// Every statement of this room, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[PUBLISH_JSON, PUBLISH_BYTES];
