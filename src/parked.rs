//! Parked messages of both sides: what operators look at, retry and discard.
//!
//! A parked message holds up nobody and stays until an operator decides. Everything here is the view `oncebox.parked`
//! and the functions beside it, which do the same from any SQL session; the command line and the API only put words
//! to them. Left out on purpose: deciding by rule what a message deserves, and messages that wait for their next
//! attempt by themselves.

use crate::db::{self, DbError};
use crate::message::{Headers, MessageId};
use serde::Serialize;
use serde_json::value::RawValue;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::types::Json;
use sqlx::{PgConnection, Postgres, Row};
use std::time::Duration;
use utoipa::ToSchema;
use uuid::Uuid;

/// Messages of one statement of bulk work: short enough that their locks are held for a moment only.
pub const BATCH: i64 = 500;
/// Longest wait for one statement.
const LIMIT: Duration = Duration::from_secs(60);

/// Which table a message is parked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The relay could not send it.
    Outbox,
    /// A consumer could not apply it.
    Inbox,
}

impl Side {
    /// Both, in the order of the flow.
    pub const ALL: [Self; 2] = [Self::Outbox, Self::Inbox];

    /// Its name in `oncebox.parked`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Outbox => "outbox",
            Self::Inbox => "inbox",
        }
    }
}

/// Topics by an AMQP pattern: words between dots, `*` for one word, `#` for any number of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicPattern {
    /// For `'.' || topic`, so that every word has a dot before it.
    regex: String,
}

impl TopicPattern {
    /// Reads a pattern as a binding would.
    pub fn new(pattern: &str) -> Self {
        let mut regex = "^".to_owned();
        for word in pattern.split('.') {
            match word {
                "#" => regex.push_str("(\\.[^.]*)*"),
                "*" => regex.push_str("\\.[^.]*"),
                word => {
                    regex.push_str("\\.");
                    for c in word.chars() {
                        if c.is_ascii_punctuation() && c != '_' {
                            regex.push('\\');
                        }
                        regex.push(c);
                    }
                }
            }
        }
        regex.push('$');
        Self { regex }
    }
}

/// Which parked messages are meant; what is not set does not narrow.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// One side only.
    pub side: Option<Side>,
    /// These message ids only.
    pub ids: Option<Vec<Uuid>>,
    /// This reason only.
    pub reason: Option<String>,
    /// Topics that match only.
    pub topic: Option<TopicPattern>,
    /// This consumer only, which leaves nothing of the outbox.
    pub consumer: Option<String>,
    /// Parked at or after this time only, seconds since the Unix epoch.
    pub since_s: Option<f64>,
}

impl Filter {
    fn takes(&self, side: Side) -> bool {
        self.side.is_none_or(|only| only == side)
    }

    /// Binds `$1` to `$5`.
    fn bind<'q>(&'q self, query: Query<'q, Postgres, PgArguments>) -> Query<'q, Postgres, PgArguments> {
        query
            .bind(&self.ids)
            .bind(&self.reason)
            .bind(self.topic.as_ref().map(|topic| &topic.regex))
            .bind(&self.consumer)
            .bind(self.since_s)
    }
}

/// A parked message, without its payload. Times are RFC 3339 in UTC.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Parked {
    /// Where it is parked.
    pub side: Side,
    /// Who could not apply it; none on the outbox's side.
    pub consumer: Option<String>,
    /// Its id.
    #[schema(value_type = Uuid)]
    pub message_id: MessageId,
    /// Its lane; none on the inbox's side.
    pub lane: Option<i16>,
    /// Its number in the log; none on the inbox's side.
    pub seq: Option<i64>,
    /// The outbox it came from, if oncebox published it.
    pub source: Option<Uuid>,
    /// Its stream.
    pub stream: Option<String>,
    /// Its place in the stream.
    pub offset: Option<i64>,
    /// Its topic.
    pub topic: String,
    /// Its ordering key.
    pub key: Option<String>,
    /// Why it was parked.
    pub reason: String,
    /// What broker or handler said last.
    pub last_error: Option<String>,
    /// Attempts so far.
    pub attempts: i32,
    /// When it was first held.
    pub first_at: String,
    /// When it was parked.
    pub last_at: String,
}

/// A payload as an operator can read it.
#[derive(Debug, Serialize)]
#[serde(tag = "encoding", content = "value", rename_all = "lowercase")]
pub enum Body {
    /// JSON, digit for digit.
    Json(Box<RawValue>),
    /// Text.
    Text(String),
    /// Other bytes, two digits each.
    Hex(String),
}

/// A payload as an operator can read it.
#[derive(ToSchema)]
#[allow(dead_code)]
struct Payload {
    /// `json`: the value is the payload, digit for digit; `text`: it is its text; `hex`: two digits a byte.
    #[schema(pattern = "^(json|text|hex)$", example = "json")]
    encoding: String,
    /// The payload.
    value: serde_json::Value,
}

impl Body {
    fn new(content_type: Option<&str>, body: Vec<u8>) -> Self {
        let text = match String::from_utf8(body) {
            Ok(text) => text,
            Err(error) => return Self::Hex(error.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()),
        };
        let is_json = content_type.is_some_and(|kind| kind.starts_with("application/json") || kind.contains("+json"));
        match serde_json::from_str::<Box<RawValue>>(&text) {
            Ok(json) if is_json => Self::Json(json),
            _ => Self::Text(text),
        }
    }
}

/// A parked message with everything that is known of it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ParkedMessage)]
pub struct Detail {
    /// What the list tells.
    #[serde(flatten)]
    pub parked: Parked,
    /// MIME type of the payload.
    pub content_type: Option<String>,
    /// When it was published, if this is its outbox.
    pub published_at: Option<String>,
    /// Not to be sent after this time.
    pub expires_at: Option<String>,
    /// Its headers.
    #[schema(value_type = Object)]
    pub headers: Headers,
    /// Its payload.
    #[schema(value_type = Payload)]
    pub body: Body,
}

macro_rules! rfc3339 {
    ($time:literal) => {
        concat!("to_char(", $time, " at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
    };
}

/// What [`parked_row`] reads.
macro_rules! columns {
    () => {
        concat!(
            "p.side, p.consumer, p.message_id, p.lane, p.seq, p.source, p.stream, p.\"offset\", p.topic, p.key, p.reason,
            p.last_error, p.attempts, ",
            rfc3339!("p.first_at"),
            ", ",
            rfc3339!("p.last_at")
        )
    };
}

/// The conditions of [`Filter::bind`].
macro_rules! matching {
    () => {
        "($1::uuid[] is null or p.message_id = any($1))
        and ($2::text is null or p.reason = $2)
        and ($3::text is null or '.' || p.topic ~ $3)
        and ($4::text is null or p.consumer = $4)
        and ($5::float8 is null or p.last_at >= to_timestamp($5))"
    };
}

const LIST: &str = concat!(
    "select ",
    columns!(),
    " from oncebox.parked as p where ",
    matching!(),
    " and ($6::text is null or p.side = $6)
    order by p.last_at, p.side desc, p.lane, p.seq, p.consumer, p.message_id limit $7"
);

/// The messages that match, longest parked first, at most `limit` of them.
pub async fn list(conn: &mut PgConnection, filter: &Filter, limit: i64) -> Result<Vec<Parked>, DbError> {
    let query = filter.bind(sqlx::query(LIST)).bind(filter.side.map(Side::name)).bind(limit);
    let rows = db::bounded("parked messages", LIMIT, query.fetch_all(conn)).await?;
    Ok(rows.iter().map(parked_row).collect::<Result<_, _>>()?)
}

/// Which parked message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// A message of the outbox, by lane and number in the log.
    Outbox(i16, i64),
    /// A message of a consumer, by id.
    Inbox(String, Uuid),
}

const PAGE_OUTBOX: &str = concat!(
    "select ",
    columns!(),
    " from oncebox.parked as p where ",
    matching!(),
    " and p.side = 'outbox' and (p.lane, p.seq) > ($6, $7) order by p.lane, p.seq limit $8"
);

const PAGE_INBOX: &str = concat!(
    "select ",
    columns!(),
    " from oncebox.parked as p where ",
    matching!(),
    " and p.side = 'inbox' and (p.consumer, p.message_id) > ($6, $7) order by p.consumer, p.message_id limit $8"
);

/// The messages of one side that match, behind a place, by lane and number or by consumer and id.
pub async fn page(
    conn: &mut PgConnection,
    side: Side,
    filter: &Filter,
    after: Option<&Key>,
    limit: i64,
) -> Result<Vec<Parked>, DbError> {
    let query = match side {
        Side::Outbox => {
            let (lane, seq) = if let Some(Key::Outbox(lane, seq)) = after { (*lane, *seq) } else { (-1, 0) };
            filter.bind(sqlx::query(PAGE_OUTBOX)).bind(lane).bind(seq)
        }
        Side::Inbox => {
            let begin = (String::new(), Uuid::nil());
            let place = if let Some(Key::Inbox(consumer, id)) = after { (consumer.clone(), *id) } else { begin };
            filter.bind(sqlx::query(PAGE_INBOX)).bind(place.0).bind(place.1)
        }
    };
    let rows = db::bounded("parked messages", LIMIT, query.bind(limit).fetch_all(conn)).await?;
    Ok(rows.iter().map(parked_row).collect::<Result<_, _>>()?)
}

const COUNT: &str =
    concat!("select count(*) from oncebox.parked as p where ", matching!(), " and ($6::text is null or p.side = $6)");

/// How many match.
pub async fn count(conn: &mut PgConnection, filter: &Filter) -> Result<i64, DbError> {
    let query = filter.bind(sqlx::query(COUNT)).bind(filter.side.map(Side::name));
    let row = db::bounded("parked messages", LIMIT, query.fetch_one(conn)).await?;
    Ok(row.try_get(0)?)
}

fn parked_row(row: &PgRow) -> Result<Parked, sqlx::Error> {
    let side: &str = row.try_get(0)?;
    Ok(Parked {
        side: if side == "outbox" { Side::Outbox } else { Side::Inbox },
        consumer: row.try_get(1)?,
        message_id: MessageId(row.try_get(2)?),
        lane: row.try_get(3)?,
        seq: row.try_get(4)?,
        source: row.try_get(5)?,
        stream: row.try_get(6)?,
        offset: row.try_get(7)?,
        topic: row.try_get(8)?,
        key: row.try_get(9)?,
        reason: row.try_get(10)?,
        last_error: row.try_get(11)?,
        attempts: row.try_get(12)?,
        first_at: row.try_get(13)?,
        last_at: row.try_get(14)?,
    })
}

macro_rules! show {
    ($which:expr, $order:literal) => {
        concat!(
            "select ",
            columns!(),
            ", coalesce(o.content_type, i.content_type), ",
            rfc3339!("o.published_at"),
            ", ",
            rfc3339!("o.expires_at"),
            ", coalesce(o.headers, i.headers), coalesce(o.body, i.body)
            from oncebox.parked as p
            left join oncebox.outbox_held as o on p.side = 'outbox' and o.lane = p.lane and o.seq = p.seq
            left join oncebox.inbox_held as i
                on p.side = 'inbox' and i.consumer = p.consumer and i.message_id = p.message_id
            where ",
            $which,
            $order
        )
    };
}

const SHOW: &str = show!(
    concat!(matching!(), " and ($6::text is null or p.side = $6)"),
    " order by p.side desc, p.lane, p.seq, p.consumer limit $7"
);

/// Everything about the messages that match: the same id can be parked by several consumers, and on both sides.
pub async fn show(conn: &mut PgConnection, filter: &Filter, limit: i64) -> Result<Vec<Detail>, DbError> {
    let query = filter.bind(sqlx::query(SHOW)).bind(filter.side.map(Side::name)).bind(limit);
    let rows = db::bounded("parked messages", LIMIT, query.fetch_all(conn)).await?;
    Ok(rows.iter().map(detail_row).collect::<Result<_, sqlx::Error>>()?)
}

const SHOW_OUTBOX: &str = show!("p.side = 'outbox' and p.lane = $1 and p.seq = $2", "");
const SHOW_INBOX: &str = show!("p.side = 'inbox' and p.consumer = $1 and p.message_id = $2", "");

/// Everything about one message, if it is parked.
pub async fn show_one(conn: &mut PgConnection, key: &Key) -> Result<Option<Detail>, DbError> {
    let query = match key {
        Key::Outbox(lane, seq) => sqlx::query(SHOW_OUTBOX).bind(lane).bind(seq),
        Key::Inbox(consumer, message_id) => sqlx::query(SHOW_INBOX).bind(consumer).bind(message_id),
    };
    let row = db::bounded("a parked message", LIMIT, query.fetch_optional(conn)).await?;
    Ok(row.as_ref().map(detail_row).transpose()?)
}

fn detail_row(row: &PgRow) -> Result<Detail, sqlx::Error> {
    let content_type: Option<String> = row.try_get(15)?;
    Ok(Detail {
        parked: parked_row(row)?,
        published_at: row.try_get(16)?,
        expires_at: row.try_get(17)?,
        headers: row.try_get::<Json<Headers>, _>(18)?.0,
        body: Body::new(content_type.as_deref(), row.try_get(19)?),
        content_type,
    })
}

const RETRY_ONE_OUTBOX: &str = "select oncebox.outbox_retry($1, $2)";
const RETRY_ONE_INBOX: &str = "select oncebox.inbox_retry($1, $2)";
const DISCARD_ONE_OUTBOX: &str = "select oncebox.outbox_discard($1, $2, $3, $4)";
const DISCARD_ONE_INBOX: &str = "select oncebox.inbox_discard($1, $2, $3, $4)";

/// Does it to one message, durable on return; false if it is not parked.
pub async fn act(conn: &mut PgConnection, key: &Key, verb: &Verb) -> Result<bool, DbError> {
    let query = match (key, verb) {
        (Key::Outbox(..), Verb::Retry) => sqlx::query_scalar(RETRY_ONE_OUTBOX),
        (Key::Outbox(..), Verb::Discard { .. }) => sqlx::query_scalar(DISCARD_ONE_OUTBOX),
        (Key::Inbox(..), Verb::Retry) => sqlx::query_scalar(RETRY_ONE_INBOX),
        (Key::Inbox(..), Verb::Discard { .. }) => sqlx::query_scalar(DISCARD_ONE_INBOX),
    };
    let query = match key {
        Key::Outbox(lane, seq) => query.bind(i32::from(*lane)).bind(seq),
        Key::Inbox(consumer, message_id) => query.bind(consumer).bind(message_id),
    };
    let query = match verb {
        Verb::Retry => query,
        Verb::Discard { why, by } => query.bind(why).bind(by),
    };
    db::bounded("a parked message", LIMIT, query.fetch_one(conn)).await
}

/// What is to be done with parked messages.
#[derive(Debug, Clone)]
pub enum Verb {
    /// Send it, or hand it to the handler, once more.
    Retry,
    /// Give it up, and record it.
    Discard {
        /// Why; not empty.
        why: String,
        /// Who; not empty.
        by: String,
    },
}

/// What became of one message of bulk work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Done {
    /// Where it was parked.
    pub side: Side,
    /// By whom; none on the outbox's side.
    pub consumer: Option<String>,
    /// Its id.
    pub message_id: MessageId,
    /// False: somebody else had retried or discarded it at this moment.
    pub done: bool,
}

/// Where the next batch goes on: behind the last message of this one.
#[derive(Debug, Clone)]
enum Place {
    Outbox { lane: i16, seq: i64 },
    Inbox { consumer: String, message_id: Uuid },
    End,
}

/// Bulk work, a batch a call of [`Bulk::next`]. Each message is taken once: one that is parked again meanwhile, or was
/// parked after the start, stays.
#[derive(Debug)]
pub struct Bulk {
    filter: Filter,
    verb: Verb,
    place: Place,
    until_s: f64,
}

const NOW: &str = "select extract(epoch from clock_timestamp())::float8";

// The functions look at each message again under its lock.
macro_rules! outbox_batch {
    ($call:literal) => {
        concat!(
            "with batch as (
                select p.lane, p.seq, p.message_id from oncebox.parked as p
                where p.side = 'outbox' and ",
            matching!(),
            " and p.last_at <= to_timestamp($6) and (p.lane, p.seq) > ($7, $8)
                order by p.lane, p.seq limit $9)
            select b.message_id, ",
            $call,
            ", b.lane, b.seq from batch as b order by b.lane, b.seq"
        )
    };
}

macro_rules! inbox_batch {
    ($call:literal) => {
        concat!(
            "with batch as (
                select p.consumer, p.message_id from oncebox.parked as p
                where p.side = 'inbox' and ",
            matching!(),
            " and p.last_at <= to_timestamp($6) and (p.consumer, p.message_id) > ($7, $8)
                order by p.consumer, p.message_id limit $9)
            select b.message_id, ",
            $call,
            ", b.consumer from batch as b order by b.consumer, b.message_id"
        )
    };
}

const RETRY_OUTBOX: &str = outbox_batch!("oncebox.outbox_retry(b.lane, b.seq)");
const RETRY_INBOX: &str = inbox_batch!("oncebox.inbox_retry(b.consumer, b.message_id)");
const DISCARD_OUTBOX: &str = outbox_batch!("oncebox.outbox_discard(b.lane, b.seq, $10, $11)");
const DISCARD_INBOX: &str = inbox_batch!("oncebox.inbox_discard(b.consumer, b.message_id, $10, $11)");

impl Bulk {
    /// Work on what matches now.
    pub async fn new(conn: &mut PgConnection, filter: Filter, verb: Verb) -> Result<Self, DbError> {
        let until_s = db::bounded("the time", LIMIT, sqlx::query_scalar(NOW).fetch_one(conn)).await?;
        let place = match () {
            () if filter.takes(Side::Outbox) && filter.consumer.is_none() => Place::Outbox { lane: -1, seq: 0 },
            () if filter.takes(Side::Inbox) => Self::inbox_begins(),
            () => Place::End,
        };
        Ok(Self { filter, verb, place, until_s })
    }

    fn inbox_begins() -> Place {
        Place::Inbox { consumer: String::new(), message_id: Uuid::nil() }
    }

    /// Does the next batch, in one transaction of its own, durable on return; nothing when all is done.
    pub async fn next(&mut self, conn: &mut PgConnection) -> Result<Option<Vec<Done>>, DbError> {
        loop {
            let (side, query) = match (&self.place, &self.verb) {
                (Place::End, _) => return Ok(None),
                (Place::Outbox { .. }, Verb::Retry) => (Side::Outbox, sqlx::query(RETRY_OUTBOX)),
                (Place::Outbox { .. }, Verb::Discard { .. }) => (Side::Outbox, sqlx::query(DISCARD_OUTBOX)),
                (Place::Inbox { .. }, Verb::Retry) => (Side::Inbox, sqlx::query(RETRY_INBOX)),
                (Place::Inbox { .. }, Verb::Discard { .. }) => (Side::Inbox, sqlx::query(DISCARD_INBOX)),
            };
            let mut query = self.filter.bind(query).bind(self.until_s);
            query = match &self.place {
                Place::Outbox { lane, seq } => query.bind(lane).bind(seq),
                Place::Inbox { consumer, message_id } => query.bind(consumer).bind(message_id),
                Place::End => query,
            };
            query = query.bind(BATCH);
            if let Verb::Discard { why, by } = &self.verb {
                query = query.bind(why).bind(by);
            }
            let rows = db::bounded("a batch of parked messages", LIMIT, query.fetch_all(&mut *conn)).await?;
            let next = match (side, rows.last()) {
                (Side::Outbox, Some(last)) => Place::Outbox { lane: last.try_get(2)?, seq: last.try_get(3)? },
                (Side::Inbox, Some(last)) => Place::Inbox { consumer: last.try_get(2)?, message_id: last.try_get(0)? },
                (Side::Outbox, None) if self.filter.takes(Side::Inbox) => Self::inbox_begins(),
                (_, None) => Place::End,
            };
            let done = |row: &PgRow| {
                Ok(Done {
                    side,
                    consumer: if side == Side::Inbox { row.try_get(2)? } else { None },
                    message_id: MessageId(row.try_get(0)?),
                    done: row.try_get(1)?,
                })
            };
            let batch: Vec<Done> = rows.iter().map(done).collect::<Result<_, sqlx::Error>>()?;
            self.place = next;
            if !batch.is_empty() {
                return Ok(Some(batch));
            }
        }
    }
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[
    LIST,
    PAGE_OUTBOX,
    PAGE_INBOX,
    COUNT,
    SHOW,
    SHOW_OUTBOX,
    SHOW_INBOX,
    RETRY_ONE_OUTBOX,
    RETRY_ONE_INBOX,
    DISCARD_ONE_OUTBOX,
    DISCARD_ONE_INBOX,
    NOW,
    RETRY_OUTBOX,
    RETRY_INBOX,
    DISCARD_OUTBOX,
    DISCARD_INBOX,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a pattern becomes a regular expression in which nothing of a topic is special.
    #[test]
    fn patterns_are_words() {
        for (pattern, regex) in [
            ("order.placed", "^\\.order\\.placed$"),
            ("order.*", "^\\.order\\.[^.]*$"),
            ("#", "^(\\.[^.]*)*$"),
            ("a.#.b", "^\\.a(\\.[^.]*)*\\.b$"),
            ("a+b(c).d*", "^\\.a\\+b\\(c\\)\\.d\\*$"),
        ] {
            assert_eq!(TopicPattern::new(pattern).regex, regex, "{pattern}");
        }
    }

    /// Goal: a payload is shown as what it is, and a number of JSON keeps every digit.
    #[test]
    fn bodies_are_shown_as_what_they_are() {
        let shown =
            |kind: &str, body: &[u8]| serde_json::to_string(&Body::new(Some(kind), body.to_vec())).expect("serializes");
        let digits = br#"{"n": 12345678901234567890123}"#;
        assert_eq!(shown("application/json", digits), r#"{"encoding":"json","value":{"n": 12345678901234567890123}}"#);
        assert_eq!(shown("text/plain", b"{}"), r#"{"encoding":"text","value":"{}"}"#);
        assert_eq!(shown("application/json", b"{"), r#"{"encoding":"text","value":"{"}"#);
        assert_eq!(shown("application/octet-stream", b"\xff\x00"), r#"{"encoding":"hex","value":"ff00"}"#);
    }
}
