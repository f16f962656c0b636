//! What travels: the message an app publishes, its place in a stream, and the delivery a consumer sees.
//!
//! Pure data. The limits of each field stand with the SQL function that enforces them, `oncebox.publish`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;
use uuid::Uuid;

/// Header names the relay adds to each message; callers may not use the prefix `oncebox-`.
pub mod header {
    /// Which outbox the message came from: a uuid as text.
    pub const SOURCE: &str = "oncebox-source";
    /// The stream the message belongs to: `topic#lane`.
    pub const STREAM: &str = "oncebox-stream";
    /// The message's place in its stream: an int64, dense from 1.
    pub const OFFSET: &str = "oncebox-offset";
    /// The message's place in its lane, over all streams: an int64, dense from 1. What a broker hands back out of
    /// order is put in order by it.
    pub const ORDINAL: &str = "oncebox-ordinal";
    /// The ordering key, when there is one.
    pub const KEY: &str = "oncebox-key";
    /// On a void notice only: why the offset it names will never come.
    pub const VOID: &str = "oncebox-void";
}

/// Identity of a message: what the inbox deduplicates by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MessageId(pub Uuid);

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<Uuid> for MessageId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

/// A message header's values: strings, booleans, int64 and double numbers.
pub type Headers = Map<String, Value>;

/// A message as it lies in the outbox.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// What the inbox deduplicates by.
    pub id: MessageId,
    /// Routing key on the broker, 1 to 255 bytes.
    pub topic: String,
    /// Messages of one key keep their order.
    pub key: Option<String>,
    /// MIME type of the body.
    pub content_type: String,
    /// The caller's headers.
    pub headers: Headers,
    /// The payload, byte for byte as published.
    pub body: Vec<u8>,
    /// When the app published it, seconds since the Unix epoch.
    pub published_at_s: u64,
}

/// Where a message stands in the log: the same at every redelivery.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Position {
    /// The outbox the message came from.
    pub source: Uuid,
    /// `topic#lane`.
    pub stream: String,
    /// Dense from 1 in its stream.
    pub offset: i64,
}

/// A message on its way to the broker.
#[derive(Debug, Clone, PartialEq)]
pub struct Envelope {
    /// What is sent.
    pub message: Message,
    /// Where it stands in its stream.
    pub position: Position,
    /// Where it stands in its lane, dense from 1.
    pub ordinal: i64,
}

/// A notice that the message of an offset will never come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Void {
    /// The offset.
    pub position: Position,
    /// Topic of the message that will not come.
    pub topic: String,
    /// Its id.
    pub message_id: MessageId,
    /// `expired`, `refused` or `discarded`.
    pub reason: String,
}

/// A message as a consumer receives it, from oncebox's relay or from any other producer.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivery {
    /// The broker's tag: valid on the subscription that delivered it, dead after a reconnect.
    pub tag: u64,
    /// The property `message_id` as it came; other producers may omit it or use any text.
    pub message_id: Option<String>,
    /// Routing key it was published with.
    pub topic: String,
    /// MIME type of the body, if given.
    pub content_type: Option<String>,
    /// Every header on the wire, the relay's own among them.
    pub headers: Headers,
    /// The payload.
    pub body: Vec<u8>,
    /// The broker delivered it before; `false` proves nothing.
    pub redelivered: bool,
}

impl Delivery {
    /// The place in its stream, when the relay's three headers are there and well-formed.
    pub fn position(&self) -> Option<Position> {
        Some(Position {
            source: Uuid::parse_str(self.headers.get(header::SOURCE)?.as_str()?).ok()?,
            stream: self.headers.get(header::STREAM)?.as_str()?.to_owned(),
            offset: self.headers.get(header::OFFSET)?.as_i64().filter(|offset| *offset > 0)?,
        })
    }

    /// The lane of its source and the place in it: messages of one key are published in this order.
    pub fn lane_place(&self) -> Option<(&str, &str, i64)> {
        let source = self.headers.get(header::SOURCE)?.as_str()?;
        let (_, lane) = self.headers.get(header::STREAM)?.as_str()?.rsplit_once('#')?;
        Some((source, lane, self.headers.get(header::ORDINAL)?.as_i64()?))
    }

    /// Why the offset it names will never come, if it is a void notice and no message.
    pub fn void(&self) -> Option<&str> {
        self.headers.get(header::VOID)?.as_str()
    }

    /// The ordering key, when the producer gave one.
    pub fn key(&self) -> Option<&str> {
        self.headers.get(header::KEY)?.as_str()
    }
}
