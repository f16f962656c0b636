//! The inbox: `broker → consumer → `**`inbox`**` → handler's transaction`.
//!
//! [`accept`] says, inside the handler's own transaction, whether a message is new; [`handler`] is what runs then;
//! [`held`] keeps what must be tried again or needs an operator; [`stream`] applies streams in order. Left out on purpose: the broker, which the
//! consumer talks to.

mod at_once;
pub mod handler;
pub mod held;
pub mod http;
pub mod ledger;
pub mod stream;

use crate::message::{Delivery, Headers, MessageId, Position};
use sqlx::PgConnection;
use uuid::Uuid;

/// A message as handlers get it.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// What it is deduplicated by.
    pub id: MessageId,
    /// Routing key it was published with.
    pub topic: String,
    /// Its ordering key.
    pub key: Option<String>,
    /// Its place in its stream, unless another producer than oncebox published it.
    pub position: Option<Position>,
    /// MIME type of the body.
    pub content_type: Option<String>,
    /// Every header on the wire: the caller's and those that begin with `oncebox-`.
    pub headers: Headers,
    /// The payload, byte for byte.
    pub body: Vec<u8>,
}

/// Namespace of the ids made from other producers' text ids.
const TEXT_IDS: Uuid = Uuid::from_u128(0x8f1c_6a3e_52d4_4b0e_9d57_0c2b_7a61_e4f3);

/// Longest key: what `oncebox.publish` allows.
const MAX_KEY_BYTES: usize = 255;
/// Longest stream: a topic, `#` and a lane.
const MAX_STREAM_BYTES: usize = 262;

impl Received {
    /// What a delivery is deduplicated by. An id that is no uuid becomes a version 5 uuid of its text, the same at every
    /// delivery; without any id there is nothing.
    pub fn id_of(delivery: &Delivery) -> Option<MessageId> {
        let text = delivery.message_id.as_deref().filter(|text| !text.is_empty())?;
        Some(MessageId(Uuid::parse_str(text).unwrap_or_else(|_| Uuid::new_v5(&TEXT_IDS, text.as_bytes()))))
    }

    /// Reads a delivery under an id.
    pub fn new(id: MessageId, delivery: Delivery) -> Self {
        // Postgres cannot store a NUL character, and no message of ours has one. What is longer than ours can be is not
        // ours, and would not fit into an index.
        let storable = |text: &str| text.replace('\0', "\u{fffd}");
        let position = delivery.position().filter(|at| at.stream.len() <= MAX_STREAM_BYTES);
        Self {
            id,
            position: position.map(|at| Position { stream: storable(&at.stream), ..at }),
            key: delivery.key().filter(|key| key.len() <= MAX_KEY_BYTES).map(storable),
            topic: storable(&delivery.topic),
            content_type: delivery.content_type.as_deref().map(storable),
            headers: delivery.headers,
            body: delivery.body,
        }
    }
}

const ACCEPT: &str = "select oncebox.accept($1, $2, $3, $4, $5)";

/// Says whether `consumer` sees this message for the first time; call it first in the handler's transaction. `true`:
/// do the work, commit, then acknowledge. `false`: it is done already, commit and acknowledge. If the transaction
/// rolls back, the message was not accepted. Waits for the outcome of a twin in flight.
///
/// # Errors
/// SQLSTATE `OB001` when the id is a UUIDv7 older than the dedup window and `position` is missing; 22023 for
/// arguments that make no sense; 40001 under repeatable read when a twin committed meanwhile.
pub async fn accept(
    conn: &mut PgConnection,
    consumer: &str,
    id: MessageId,
    position: Option<&Position>,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(ACCEPT)
        .bind(consumer)
        .bind(id.0)
        .bind(position.map(|at| at.source))
        .bind(position.map(|at| at.stream.as_str()))
        .bind(position.map(|at| at.offset))
        .fetch_one(conn)
        .await
}

const IS_ACCEPTED: &str = "
    select exists (
        select from oncebox.inbox as i
        where i.leaf = any (array[oncebox.inbox_day_leaf($2), 16]) and i.consumer = $1 and i.message_id = $2)";

/// Whether the transaction, which accepted the message, still stands: no statement of it has failed, and the handler
/// has not ended it.
pub async fn is_accepted(conn: &mut PgConnection, consumer: &str, id: MessageId) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(IS_ACCEPTED).bind(consumer).bind(id.0).fetch_one(conn).await
}

/// What is to be done with a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reception {
    /// First time: do the work in this transaction.
    New,
    /// Applied already: acknowledge.
    Done,
    /// Held already, waiting or parked: acknowledge.
    Held,
    /// An earlier message of its key waits: hold it too, then acknowledge.
    BehindKey,
    /// An offset before its own has not come: hold it, then acknowledge.
    Gap,
    /// An earlier message of its stream waits: hold it too, then acknowledge.
    BehindStream,
}

impl Reception {
    /// Why the delivery is to be held, if it is to be.
    pub fn holds(self) -> Option<held::Reason> {
        match self {
            Self::BehindKey => Some(held::Reason::BehindKey),
            Self::Gap => Some(held::Reason::Gap),
            Self::BehindStream => Some(held::Reason::BehindStream),
            Self::New | Self::Done | Self::Held => None,
        }
    }

    fn of(answer: &str) -> Self {
        match answer {
            "new" => Self::New,
            "done" => Self::Done,
            "held" => Self::Held,
            _ => Self::BehindKey,
        }
    }
}

const RECEIVE: &str = "select oncebox.inbox_receive($1, $2, $3, $4, $5, $6)";

/// Accepts a delivery unless it is held, or `by_key` and an earlier message of its key is. Part of the handler's
/// transaction, like [`accept`].
pub async fn receive(
    conn: &mut PgConnection,
    consumer: &str,
    message: &Received,
    by_key: bool,
) -> Result<Reception, sqlx::Error> {
    let position = message.position.as_ref();
    let answer: String = sqlx::query_scalar(RECEIVE)
        .bind(consumer)
        .bind(message.id.0)
        .bind(position.map(|at| at.source))
        .bind(position.map(|at| at.stream.as_str()))
        .bind(position.map(|at| at.offset))
        .bind(message.key.as_deref().filter(|_| by_key))
        .fetch_one(conn)
        .await?;
    Ok(Reception::of(&answer))
}

const BATCH_TURN: &str = "select pg_advisory_xact_lock(hashtextextended('oncebox batch ' || $1, 0))";

/// Waits until no other batch of the consumer is in a transaction, and keeps others out until the end of this one: two
/// that touch the same rows in different orders would end each other again and again.
pub async fn take_batch_turn(conn: &mut PgConnection, consumer: &str) -> Result<(), sqlx::Error> {
    sqlx::query(BATCH_TURN).bind(consumer).execute(conn).await?;
    Ok(())
}

const RECEIVE_ALL: &str = "select oncebox.inbox_receive_all($1, $2, $3, $4, $5, $6)";

/// [`receive`] of many, in this order, in one statement; an answer each.
pub async fn receive_all(
    conn: &mut PgConnection,
    consumer: &str,
    messages: &[Received],
    by_key: bool,
) -> Result<Vec<Reception>, sqlx::Error> {
    let positions = || messages.iter().map(|message| message.position.as_ref());
    let answers: Vec<Option<String>> = sqlx::query_scalar(RECEIVE_ALL)
        .bind(consumer)
        .bind(messages.iter().map(|message| message.id.0).collect::<Vec<_>>())
        .bind(positions().map(|at| at.map(|at| at.source)).collect::<Vec<_>>())
        .bind(positions().map(|at| at.map(|at| at.stream.as_str())).collect::<Vec<_>>())
        .bind(positions().map(|at| at.map(|at| at.offset)).collect::<Vec<_>>())
        .bind(messages.iter().map(|message| message.key.as_deref().filter(|_| by_key)).collect::<Vec<_>>())
        .fetch_one(conn)
        .await?;
    Ok(answers.into_iter().flatten().map(|answer| Reception::of(&answer)).collect())
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[ACCEPT, IS_ACCEPTED, RECEIVE, BATCH_TURN, RECEIVE_ALL];
