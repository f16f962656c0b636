//! What readers ask of sagas: a list, one saga whole, its compensations, its history, its definition.
//!
//! Each function is one statement, so what it answers was true at one moment. Nothing is locked: an orchestrator may
//! be ahead by the time the answer is read, and `seq` says so. Times are RFC 3339 in UTC; inputs, outputs and bodies
//! keep their digits. It needs the rights of `oncebox_admin`. Left out on purpose: changing anything, and judging
//! (that is `verify`).

use super::state::{CompensationStatus, Phase, SagaStatus, StepStatus};
use crate::db::{self, DbError};
use serde::de::value::{Error as WordError, StrDeserializer};
use serde::de::{Deserialize, IntoDeserializer};
use serde::{Deserialize as Deserialized, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{PgConnection, Row};
use utoipa::ToSchema;
use uuid::Uuid;

/// Longest wait for one statement.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

macro_rules! rfc3339 {
    ($time:literal) => {
        concat!("to_char(", $time, " at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
    };
}

/// Which sagas are meant; what is not set does not narrow.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// In one of these; empty: in any.
    pub statuses: Vec<SagaStatus>,
    /// Of this definition, in any version.
    pub definition: Option<String>,
    /// With this key; several definitions may each have a saga with it.
    pub business_key: Option<String>,
    /// With all of these labels.
    pub labels: Map<String, Value>,
    /// Made after this time, in microseconds since the Unix epoch.
    pub created_after_us: Option<i64>,
}

/// A saga as a list shows it: without its input and its steps.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Summary {
    /// Its id, a UUIDv7.
    #[schema(example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10")]
    pub id: Uuid,
    /// Name of its definition; null when it was opened without one.
    #[schema(example = "order")]
    pub definition: Option<String>,
    /// Version of its definition.
    #[schema(example = 3)]
    pub version: Option<i32>,
    /// Unique for its definition.
    #[schema(example = "order-4711")]
    pub business_key: String,
    /// Where it stands.
    pub status: SagaStatus,
    /// Which way it goes; a stuck one goes on this way.
    pub phase: Phase,
    /// An operator holds it: nothing new is sent, what comes in is recorded.
    pub paused: bool,
    /// Why it is to be cancelled, while that waits for the outcome of the pivot.
    pub cancel: Option<String>,
    /// Why it turned back or needs an operator.
    pub reason: Option<String>,
    /// Rises by one with each change: the number of its newest history row.
    #[schema(example = 7)]
    pub seq: i64,
    /// What it can be found by.
    #[schema(value_type = Object)]
    pub labels: Map<String, Value>,
    /// When it was made.
    #[schema(format = DateTime, example = "2026-01-15T10:00:00.000000Z")]
    pub created_at: String,
    /// When it begins.
    #[schema(format = DateTime, example = "2026-01-15T10:00:00.000000Z")]
    pub start_at: Option<String>,
    /// When it turns back unless its pivot is done.
    #[schema(format = DateTime, example = "2026-01-15T10:10:00.000000Z")]
    pub deadline: Option<String>,
    /// When it last changed.
    #[schema(format = DateTime, example = "2026-01-15T10:00:02.500000Z")]
    pub changed_at: String,
    /// When it ended.
    #[schema(format = DateTime)]
    pub ended_at: Option<String>,
    /// When an orchestrator looks at it next if nothing arrives before.
    #[schema(format = DateTime, example = "2026-01-15T10:00:32.500000Z")]
    pub next_due: Option<String>,
}

/// A step of a saga.
#[derive(Debug, Clone, Serialize, Deserialized, ToSchema)]
pub struct Step {
    /// Its id in the definition.
    #[schema(example = "reserve")]
    pub id: String,
    /// Where it stands.
    pub status: StepStatus,
    /// When it succeeded there is no way back.
    pub pivot: bool,
    /// 0: never dispatched. Rises when a step that failed for good runs again.
    #[schema(example = 1)]
    pub epoch: i32,
    /// Commands sent for the present op and epoch, since an operator last asked for it.
    #[schema(example = 1)]
    pub attempt: i32,
    /// The newest command.
    pub message_id: Option<Uuid>,
    /// End of the wait for a reply, or time of the next attempt.
    #[schema(format = DateTime)]
    pub due_at: Option<String>,
    /// What its reply, or its signal, gave.
    #[schema(value_type = Value)]
    pub output: Option<Box<RawValue>>,
    /// Why it failed, or the last attempt did.
    pub error: Option<String>,
    /// When its newest command was made.
    #[schema(format = DateTime)]
    pub dispatched_at: Option<String>,
    /// When it last changed.
    #[schema(format = DateTime, example = "2026-01-15T10:00:02.500000Z")]
    pub changed_at: String,
    /// Where its compensation stands; null while there is nothing to undo.
    pub compensation: Option<CompensationStatus>,
}

/// A signal that was sent to a saga.
#[derive(Debug, Clone, Serialize, Deserialized, ToSchema)]
pub struct SentSignal {
    /// What a step waits for.
    #[schema(example = "approved")]
    pub name: String,
    /// What it carries.
    #[schema(value_type = Value)]
    pub payload: Option<Box<RawValue>>,
    /// `new`: no orchestrator has seen it; `kept`: no step waits for it yet; `taken`: a step has it.
    #[schema(example = "taken")]
    pub state: String,
    /// When it was sent.
    #[schema(format = DateTime, example = "2026-01-15T10:00:02.500000Z")]
    pub sent_at: String,
}

/// A saga whole.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Detail {
    /// What a list shows.
    #[serde(flatten)]
    pub summary: Summary,
    /// What it was started with.
    #[schema(value_type = Value)]
    pub input: Box<RawValue>,
    /// In the order of its definition.
    pub steps: Vec<Step>,
    /// In the order of their coming.
    pub signals: Vec<SentSignal>,
}

/// How a step is undone.
#[derive(Debug, Clone, Serialize, Deserialized, ToSchema)]
pub struct Compensation {
    /// Which step.
    #[schema(example = "reserve")]
    pub step: String,
    /// Where the command goes.
    #[schema(example = "stock.release")]
    pub topic: String,
    /// Its body; null until the step's reply is there.
    #[schema(value_type = Value)]
    pub payload: Option<Box<RawValue>>,
    /// Where it stands.
    pub status: CompensationStatus,
    /// When the step's command was made.
    #[schema(format = DateTime, example = "2026-01-15T10:00:02.500000Z")]
    pub recorded_at: String,
    /// When it last changed.
    #[schema(format = DateTime, example = "2026-01-15T10:00:02.500000Z")]
    pub changed_at: String,
}

/// One change of a saga.
#[derive(Debug, Clone, Serialize, Deserialized, ToSchema)]
pub struct HistoryRow {
    /// Dense from 1.
    #[schema(example = 2)]
    pub seq: i64,
    /// When.
    #[schema(format = DateTime, example = "2026-01-15T10:00:02.500000Z")]
    pub at: String,
    /// What kind of thing happened.
    #[schema(example = "due")]
    pub event: String,
    /// What happened: with the definition, enough to compute every state again.
    #[schema(value_type = Object)]
    pub detail: Box<RawValue>,
    /// What became of it: `{"saga": {"from", "to"}, "steps": […], "commands": […]}`.
    #[schema(value_type = Object)]
    pub changes: Box<RawValue>,
    /// The message that brought it.
    pub cause: Option<Uuid>,
    /// Hash of this row and everything before it, in hex.
    #[schema(example = "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9")]
    pub hash: String,
}

/// Part of a history, and where the saga stood when it was read.
#[derive(Debug, Clone)]
pub struct HistoryPart {
    /// Number of the newest row there is.
    pub seq: i64,
    /// The saga's status.
    pub status: SagaStatus,
    /// In order.
    pub rows: Vec<HistoryRow>,
}

/// A saga that was removed after its retention.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Purged {
    /// How it ended.
    pub status: SagaStatus,
    /// When.
    pub ended_at: String,
    /// When it was removed.
    pub purged_at: String,
}

/// A definition with its versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct DefinitionSummary {
    /// Its name.
    #[schema(example = "order")]
    pub name: String,
    /// The newest first.
    pub versions: Vec<VersionSummary>,
}

/// One version of a definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialized, ToSchema)]
pub struct VersionSummary {
    /// Its number, from 1.
    #[schema(example = 3)]
    pub version: i32,
    /// sha256 of the document, in hex.
    #[schema(example = "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9")]
    pub hash: String,
    /// When it was made.
    #[schema(format = DateTime, example = "2026-01-15T10:00:00.000000Z")]
    pub created_at: String,
    /// By whom.
    #[schema(example = "deploy")]
    pub created_by: Option<String>,
}

/// A definition's document.
#[derive(Debug, Clone)]
pub struct Document {
    /// sha256 of the document, in hex.
    pub hash: String,
    /// As it was accepted.
    pub document: Box<RawValue>,
}

/// A state as the database writes it.
fn word<T: for<'d> Deserialize<'d>>(text: &str) -> Result<T, sqlx::Error> {
    let from: StrDeserializer<'_, WordError> = text.into_deserializer();
    T::deserialize(from).map_err(|error| sqlx::Error::Decode(error.into()))
}

/// What [`summary`] reads.
macro_rules! columns {
    () => {
        concat!(
            "s.id, s.definition, s.version, s.business_key, s.status, s.phase, s.paused, s.cancel, s.reason, s.seq,
            s.labels, ",
            rfc3339!("s.created_at"),
            ", ",
            rfc3339!("s.start_at"),
            ", ",
            rfc3339!("s.deadline"),
            ", ",
            rfc3339!("s.changed_at"),
            ", ",
            rfc3339!("s.ended_at"),
            ", ",
            rfc3339!("s.next_due")
        )
    };
}

fn summary(row: &PgRow) -> Result<Summary, sqlx::Error> {
    Ok(Summary {
        id: row.try_get(0)?,
        definition: row.try_get(1)?,
        version: row.try_get(2)?,
        business_key: row.try_get(3)?,
        status: word(row.try_get(4)?)?,
        phase: word(row.try_get(5)?)?,
        paused: row.try_get(6)?,
        cancel: row.try_get(7)?,
        reason: row.try_get(8)?,
        seq: row.try_get(9)?,
        labels: row.try_get::<Json<_>, _>(10)?.0,
        created_at: row.try_get(11)?,
        start_at: row.try_get(12)?,
        deadline: row.try_get(13)?,
        changed_at: row.try_get(14)?,
        ended_at: row.try_get(15)?,
        next_due: row.try_get(16)?,
    })
}

// The unique index begins with the definition: a key alone is looked up once for each definition there is.
const LIST: &str = concat!(
    "select ",
    columns!(),
    " from oncebox.saga as s
    where ($1::text[] is null or s.status = any($1))
        and ($2::text is null or s.definition = $2)
        and ($3::text is null or s.business_key = $3 and coalesce(s.definition, '') in (
            select '' union all select d.name from oncebox.saga_definition as d))
        and ($4::jsonb is null or s.labels @> $4)
        and ($5::bigint is null or s.created_at > timestamptz 'epoch' + $5 * interval '1 microsecond')
        and ($6::uuid is null or s.id < $6)
    order by s.id desc limit $7"
);

/// The sagas that match, the newest first, at most `limit` of them; those behind `after`, the last one of an earlier
/// part of the list.
pub async fn list(
    conn: &mut PgConnection,
    filter: &Filter,
    after: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Summary>, DbError> {
    let statuses: Vec<&str> = filter.statuses.iter().map(|status| status.as_str()).collect();
    let query = sqlx::query(LIST)
        // Planned for these values: a plan for any filter would serve none well.
        .persistent(false)
        .bind((!statuses.is_empty()).then_some(statuses))
        .bind(&filter.definition)
        .bind(&filter.business_key)
        .bind((!filter.labels.is_empty()).then_some(Json(&filter.labels)))
        .bind(filter.created_after_us)
        .bind(after)
        .bind(limit);
    let rows = db::bounded("the sagas", LIMIT, query.fetch_all(conn)).await?;
    Ok(rows.iter().map(summary).collect::<Result<_, _>>()?)
}

const SHOW: &str = concat!(
    "select ",
    columns!(),
    ", s.input,
    (select coalesce(jsonb_agg(jsonb_build_object(
        'id', t.step, 'status', t.status, 'pivot', t.pivot, 'epoch', t.epoch, 'attempt', t.attempt,
        'message_id', t.message_id, 'output', t.output, 'error', t.error, 'compensation', c.status,
        'due_at', ",
    rfc3339!("t.due_at"),
    ", 'dispatched_at', ",
    rfc3339!("t.dispatched_at"),
    ", 'changed_at', ",
    rfc3339!("t.changed_at"),
    ") order by t.ordinal), '[]')
        from oncebox.saga_step as t
        left join oncebox.saga_compensation as c on c.saga_id = t.saga_id and c.step = t.step
        where t.saga_id = s.id),
    (select coalesce(jsonb_agg(jsonb_build_object(
        'name', g.name, 'payload', g.payload, 'state', g.state, 'sent_at', ",
    rfc3339!("g.sent_at"),
    ") order by g.sent_at, g.name), '[]') from oncebox.saga_signal as g where g.saga_id = s.id)
    from oncebox.saga as s where s.id = $1"
);

/// One saga with its steps and signals; none when there is no such saga, or none any more: see [`purged`].
pub async fn show(conn: &mut PgConnection, id: Uuid) -> Result<Option<Detail>, DbError> {
    let row = db::bounded("the saga", LIMIT, sqlx::query(SHOW).bind(id).fetch_optional(conn)).await?;
    let detail = |row: PgRow| {
        Ok::<_, sqlx::Error>(Detail {
            summary: summary(&row)?,
            input: row.try_get::<Json<_>, _>(17)?.0,
            steps: row.try_get::<Json<_>, _>(18)?.0,
            signals: row.try_get::<Json<_>, _>(19)?.0,
        })
    };
    Ok(row.map(detail).transpose()?)
}

/// How far a saga has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Which saga.
    pub id: Uuid,
    /// Of its newest history row.
    pub seq: i64,
    /// Where it stands.
    pub status: SagaStatus,
}

fn standing(row: &PgRow) -> Result<Standing, sqlx::Error> {
    Ok(Standing { id: row.try_get(0)?, seq: row.try_get(1)?, status: word(row.try_get(2)?)? })
}

const STANDING: &str = "select id, seq, status from oncebox.saga where id = any($1) order by id";

/// How far sagas have come; those that do not exist are left out.
pub async fn standings(conn: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<Standing>, DbError> {
    let rows = db::bounded("the sagas", LIMIT, sqlx::query(STANDING).bind(ids).fetch_all(conn)).await?;
    Ok(rows.iter().map(standing).collect::<Result<_, _>>()?)
}

const FIND: &str = "
    select id, seq, status from oncebox.saga
    where coalesce(definition, '') = coalesce($1, '') and business_key = $2";

/// The saga with this business key; without a definition, among those opened without one.
pub async fn find(
    conn: &mut PgConnection,
    definition: Option<&str>,
    business_key: &str,
) -> Result<Option<Standing>, DbError> {
    let query = sqlx::query(FIND).bind(definition).bind(business_key);
    let row = db::bounded("the saga", LIMIT, query.fetch_optional(conn)).await?;
    Ok(row.as_ref().map(standing).transpose()?)
}

const PURGED: &str = concat!(
    "select p.status, ",
    rfc3339!("p.ended_at"),
    ", ",
    rfc3339!("p.purged_at"),
    " from oncebox.saga_purged as p where p.id = $1"
);

/// What is known of a saga that was removed.
pub async fn purged(conn: &mut PgConnection, id: Uuid) -> Result<Option<Purged>, DbError> {
    let row = db::bounded("the saga", LIMIT, sqlx::query(PURGED).bind(id).fetch_optional(conn)).await?;
    let purged = |row: PgRow| {
        Ok::<_, sqlx::Error>(Purged {
            status: word(row.try_get(0)?)?,
            ended_at: row.try_get(1)?,
            purged_at: row.try_get(2)?,
        })
    };
    Ok(row.map(purged).transpose()?)
}

const COMPENSATIONS: &str = concat!(
    "select (select coalesce(jsonb_agg(jsonb_build_object(
        'step', c.step, 'topic', c.topic, 'payload', c.payload, 'status', c.status, 'recorded_at', ",
    rfc3339!("c.recorded_at"),
    ", 'changed_at', ",
    rfc3339!("c.changed_at"),
    ") order by c.ordinal), '[]') from oncebox.saga_compensation as c where c.saga_id = s.id)
    from oncebox.saga as s where s.id = $1"
);

/// How a saga's steps are undone, in the order of the steps; none when there is no such saga.
pub async fn compensations(conn: &mut PgConnection, id: Uuid) -> Result<Option<Vec<Compensation>>, DbError> {
    let query = sqlx::query_scalar(COMPENSATIONS).bind(id);
    let found: Option<Json<_>> = db::bounded("the compensations", LIMIT, query.fetch_optional(conn)).await?;
    Ok(found.map(|found| found.0))
}

const HISTORY: &str = concat!(
    "select s.seq, s.status, (select coalesce(jsonb_agg(jsonb_build_object(
        'seq', h.seq, 'event', h.event, 'detail', h.detail, 'changes', h.changes, 'cause', h.cause,
        'hash', encode(h.hash, 'hex'), 'at', ",
    rfc3339!("h.at"),
    ") order by h.seq), '[]') from (
            select i.seq, i.event, i.detail, i.changes, i.cause, i.hash, i.at
            from oncebox.saga_history as i where i.saga_id = s.id and i.seq > $2 order by i.seq limit $3) as h)
    from oncebox.saga as s where s.id = $1"
);

/// A saga's history behind row `after` (0: from the beginning), at most `limit` rows; none when there is no such saga.
pub async fn history(
    conn: &mut PgConnection,
    id: Uuid,
    after: i64,
    limit: i64,
) -> Result<Option<HistoryPart>, DbError> {
    let query = sqlx::query(HISTORY).bind(id).bind(after).bind(limit);
    let row = db::bounded("the history", LIMIT, query.fetch_optional(conn)).await?;
    let part = |row: PgRow| {
        Ok::<_, sqlx::Error>(HistoryPart {
            seq: row.try_get(0)?,
            status: word(row.try_get(1)?)?,
            rows: row.try_get::<Json<_>, _>(2)?.0,
        })
    };
    Ok(row.map(part).transpose()?)
}

const DEFINITIONS: &str = concat!(
    "select n.name, (select jsonb_agg(jsonb_build_object(
        'version', d.version, 'hash', encode(d.hash, 'hex'), 'created_by', d.created_by, 'created_at', ",
    rfc3339!("d.created_at"),
    ") order by d.version desc) from oncebox.saga_definition as d where d.name = n.name)
    from (select distinct e.name from oncebox.saga_definition as e
        where ($1::text is null or e.name > $1) and ($2::text is null or e.name = $2)) as n
    order by n.name limit $3"
);

/// Definitions by name, at most `limit` of them, those behind `after`.
pub async fn definitions(
    conn: &mut PgConnection,
    after: Option<&str>,
    limit: i64,
) -> Result<Vec<DefinitionSummary>, DbError> {
    definitions_named(conn, after, None, limit).await
}

/// One definition with its versions.
pub async fn definition(conn: &mut PgConnection, name: &str) -> Result<Option<DefinitionSummary>, DbError> {
    Ok(definitions_named(conn, None, Some(name), 1).await?.pop())
}

async fn definitions_named(
    conn: &mut PgConnection,
    after: Option<&str>,
    name: Option<&str>,
    limit: i64,
) -> Result<Vec<DefinitionSummary>, DbError> {
    let query = sqlx::query(DEFINITIONS).bind(after).bind(name).bind(limit);
    let rows = db::bounded("the definitions", LIMIT, query.fetch_all(conn)).await?;
    let definition = |row: &PgRow| {
        Ok::<_, sqlx::Error>(DefinitionSummary { name: row.try_get(0)?, versions: row.try_get::<Json<_>, _>(1)?.0 })
    };
    Ok(rows.iter().map(definition).collect::<Result<_, _>>()?)
}

const DOCUMENT: &str = "
    select encode(hash, 'hex'), document from oncebox.saga_definition where name = $1 and version = $2";

/// A definition's document.
pub async fn document(conn: &mut PgConnection, name: &str, version: i32) -> Result<Option<Document>, DbError> {
    let query = sqlx::query(DOCUMENT).bind(name).bind(version);
    let row = db::bounded("the definition", LIMIT, query.fetch_optional(conn)).await?;
    let document = |row: PgRow| {
        Ok::<_, sqlx::Error>(Document { hash: row.try_get(0)?, document: row.try_get::<Json<_>, _>(1)?.0 })
    };
    Ok(row.map(document).transpose()?)
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[LIST, SHOW, STANDING, FIND, PURGED, COMPENSATIONS, HISTORY, DEFINITIONS, DOCUMENT];
