//! Whether what is recorded of a saga fits together: its history, its rows, its commands and the barrier.
//!
//! ```text
//! history ─▶ hash chain, head            (a changed, missing or added row)
//!         └▶ every event decided again ─▶ state = the rows? changes = those recorded?
//!                                      └▶ commands = the outbox's messages? replies = the barrier's rows?
//! ```
//!
//! Everything is read in one transaction, so that a saga may move on meanwhile; nothing is locked or changed. What is
//! gone by its retention (messages, barrier rows) is not missed. A participant's barrier is looked at where it lies in
//! this database. Left out on purpose: mending. Who may rewrite every table and every hash leaves no trace here: keep a
//! copy of the newest hashes elsewhere against that.

mod compare;
mod messages;
mod refold;

use super::definition::{Definition, Work};
use super::fold::Origin;
use super::read::{self, Detail, HistoryRow};
use super::state::SagaStatus;
use crate::db::{self, DbError};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use std::time::Duration;
use utoipa::ToSchema;
use uuid::Uuid;

/// Longest wait for one statement.
const LIMIT: Duration = Duration::from_secs(60);
/// History rows of one statement.
const PAGE: i64 = 1_000;

/// What was held against what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// The rows of the history: dense, each with its hash, the newest with the saga's.
    Chain,
    /// The definition, and the hash that the saga keeps of it.
    Definition,
    /// Whether each event could follow those before it.
    Fold,
    /// What a row says came of its event, against what must have come of it.
    Changes,
    /// The saga's rows, against what its history comes to.
    State,
    /// The signals, against those the history took.
    Signals,
    /// The commands, against the messages of the outbox.
    Outbox,
    /// The replies, against the rows of the barrier.
    Barrier,
}

impl Check {
    /// In a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chain => "chain",
            Self::Definition => "definition",
            Self::Fold => "fold",
            Self::Changes => "changes",
            Self::State => "state",
            Self::Signals => "signals",
            Self::Outbox => "outbox",
            Self::Barrier => "barrier",
        }
    }
}

/// Something that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Finding {
    /// What was looked at.
    pub check: Check,
    /// Which history row it is about, if it is about one.
    pub seq: Option<i64>,
    /// Which step, if it is about one.
    pub step: Option<String>,
    /// What does not fit.
    #[schema(example = "status is \"succeeded\", and must be \"failed\"")]
    pub detail: String,
}

impl Finding {
    fn new(check: Check, detail: impl Into<String>) -> Self {
        Self { check, seq: None, step: None, detail: detail.into() }
    }

    fn at(self, seq: i64) -> Self {
        Self { seq: Some(seq), ..self }
    }

    fn of(self, step: &str) -> Self {
        Self { step: Some(step.to_owned()), ..self }
    }
}

/// What was found of one saga.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = SagaReport)]
pub struct Report {
    /// Which saga.
    #[schema(value_type = String, format = "uuid")]
    pub id: Uuid,
    /// Name of its definition.
    pub definition: Option<String>,
    /// Its business key.
    pub business_key: String,
    /// Where it stands.
    pub status: SagaStatus,
    /// Rows of its history that were computed again.
    pub rows: i64,
    /// Commands that it has sent.
    pub commands: i64,
    /// Those whose message is still in the outbox, and was compared.
    pub messages: i64,
    /// Rows of the barrier that were compared.
    pub barrier_rows: i64,
    /// What does not fit; empty: all is well.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Everything fits.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }
}

const BEGIN: &str = "begin isolation level repeatable read read only";

const SEALS: &str = r#"
    select oncebox.saga_history_broken(s.id),
        s.definition is null or s.definition_hash is not distinct from d.hash,
        s.definition is null or sha256(convert_to(d.document::text, 'UTF8')) is not distinct from d.hash,
        d.steps, d.pivot, array(select n from unnest(d.signals) as n order by n collate "C"), d.deadline_ms,
        exists (select from oncebox.saga_purged as p where p.id = s.id),
        coalesce((select bool_and(k.ordinal = k.n - 1 and k.ordinal = coalesce(c.ordinal, k.ordinal)) from (
            select t.step, t.ordinal, row_number() over (order by t.ordinal) as n
            from oncebox.saga_step as t where t.saga_id = s.id) as k
        left join oncebox.saga_compensation as c on c.saga_id = s.id and c.step = k.step), true)
    from oncebox.saga as s
    left join oncebox.saga_definition as d on d.name = s.definition and d.version = s.version
    where s.id = $1"#;

const FINISHED: &str = "
    select s.id, s.ended_at::text from oncebox.saga as s
    where s.ended_at is not null and (s.ended_at, s.id) > (
        coalesce($1::text::timestamptz, '-infinity'), coalesce($2, '00000000-0000-0000-0000-000000000000'::uuid))
    order by s.ended_at, s.id limit $3";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[SEALS, FINISHED];

/// The statements of the files below this one.
pub const MESSAGE_STATEMENTS: &[&str] = messages::STATEMENTS;

/// Looks at one saga; none when there is no such saga. Needs the rights of `oncebox_admin`.
///
/// # Errors
/// The database's. The connection must not be used after one.
pub async fn verify(conn: &mut PgConnection, id: Uuid) -> Result<Option<Report>, DbError> {
    let mut transaction = db::bounded("a transaction", LIMIT, conn.begin_with(BEGIN)).await?;
    let report = verify_now(&mut transaction, id).await?;
    db::bounded("its end", LIMIT, transaction.rollback()).await?;
    Ok(report)
}

async fn verify_now(conn: &mut PgConnection, id: Uuid) -> Result<Option<Report>, DbError> {
    let Some(detail) = read::show(conn, id).await? else { return Ok(None) };
    let compensations = read::compensations(conn, id).await?.unwrap_or_default();
    let history = history(conn, id).await?;
    let mut findings = Vec::new();
    let (definition, definition_hash) = definition(conn, &detail, &mut findings).await?;
    beginning(&detail, definition_hash, history.first(), &mut findings);
    seals(conn, id, definition.as_ref(), &mut findings).await?;

    let summary = &detail.summary;
    let origin = Origin {
        id,
        definition: summary.definition.clone().zip(summary.version),
        business_key: summary.business_key.clone(),
    };
    let mut folded = refold::refold(&origin, definition.as_ref(), &history);
    findings.append(&mut folded.findings);
    compare::rows(&detail, &compensations, definition.as_ref(), &folded, &mut findings);
    compare::signals(&detail, &folded, &mut findings);
    let messages = messages::outbox(conn, id, &folded.sent, &mut findings).await?;
    let barrier_rows = messages::barrier(conn, id, &detail, &folded, &mut findings).await?;
    findings.sort_by(|a, b| (a.check, a.seq, &a.step, &a.detail).cmp(&(b.check, b.seq, &b.step, &b.detail)));
    findings.dedup();
    Ok(Some(Report {
        id,
        definition: summary.definition.clone(),
        business_key: summary.business_key.clone(),
        status: summary.status,
        rows: folded.rows,
        commands: folded.sent.len() as i64,
        messages,
        barrier_rows,
        findings,
    }))
}

async fn history(conn: &mut PgConnection, id: Uuid) -> Result<Vec<HistoryRow>, DbError> {
    let mut rows: Vec<HistoryRow> = Vec::new();
    loop {
        let after = rows.last().map_or(i64::MIN, |row| row.seq);
        let Some(part) = read::history(conn, id, after, PAGE).await? else { return Ok(rows) };
        let is_last = (part.rows.len() as i64) < PAGE;
        rows.extend(part.rows);
        if is_last {
            return Ok(rows);
        }
    }
}

/// What the saga is called and follows, against its first row.
fn beginning(
    detail: &Detail,
    definition_hash: Option<String>,
    first: Option<&HistoryRow>,
    findings: &mut Vec<Finding>,
) {
    let said: Value = first.and_then(|row| serde_json::from_str(row.detail.get()).ok()).unwrap_or_default();
    let summary = &detail.summary;
    for (column, found) in [
        ("business_key", json!(summary.business_key)),
        ("definition", json!(summary.definition)),
        ("version", json!(summary.version)),
        ("definition_hash", json!(definition_hash)),
    ] {
        if said[column] != found {
            let what = format!("{column} is {found}, and its first row says {}", said[column]);
            findings.push(Finding::new(Check::State, what).at(1));
        }
    }
}

/// The definition as it is now, and its hash; that it is the one the saga was started with, the hashes say.
async fn definition(
    conn: &mut PgConnection,
    detail: &Detail,
    findings: &mut Vec<Finding>,
) -> Result<(Option<Definition>, Option<String>), DbError> {
    let (Some(name), Some(version)) = (&detail.summary.definition, detail.summary.version) else {
        return Ok((None, None));
    };
    let document = read::document(conn, name, version).await?;
    let hash = document.as_ref().map(|found| found.hash.clone());
    let parsed = document.as_ref().map(|found| {
        let document = serde_json::from_str(found.document.get()).map_err(|error| error.to_string())?;
        Definition::parse(&document)
            .map_err(|faults| faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    });
    let definition = match parsed {
        Some(Ok(definition)) => Some(definition),
        Some(Err(why)) => {
            findings.push(Finding::new(Check::Definition, format!("{name} version {version} cannot be read: {why}")));
            None
        }
        None => {
            findings.push(Finding::new(Check::Definition, format!("{name} version {version} is not there")));
            None
        }
    };
    Ok((definition, hash))
}

async fn seals(
    conn: &mut PgConnection,
    id: Uuid,
    definition: Option<&Definition>,
    findings: &mut Vec<Finding>,
) -> Result<(), DbError> {
    let query = sqlx::query_as(SEALS).bind(id).fetch_one(conn);
    let (broken, same, whole, steps, pivot, signals, deadline_ms, purged, ordered): Seals =
        db::bounded("the hashes", LIMIT, query).await?;
    if let Some(seq) = broken {
        let what = "is not what its hash was made of, or what the saga or the rows beside it speak of";
        findings.push(Finding::new(Check::Chain, what).at(seq));
    }
    if !same {
        let what = "the definition is not the one that the saga was started with: their hashes differ";
        findings.push(Finding::new(Check::Definition, what));
    }
    if !whole {
        findings.push(Finding::new(Check::Definition, "the definition's document is not what its hash was made of"));
    }
    if let Some(definition) = definition
        && (steps, pivot, signals, deadline_ms) != derived(definition)
    {
        let what = "steps, pivot, signals or deadline beside the definition's document are not those of the document";
        findings.push(Finding::new(Check::Definition, what));
    }
    if purged {
        findings.push(Finding::new(Check::State, "it is noted as removed, and is here"));
    }
    if !ordered {
        findings.push(Finding::new(Check::State, "the ordinals of its steps and compensations do not fit together"));
    }
    Ok(())
}

/// Broken at, same definition, whole definition; what the definition's columns repeat of it; removed, in order.
type Seals =
    (Option<i64>, bool, bool, Option<Vec<String>>, Option<String>, Option<Vec<String>>, Option<i64>, bool, bool);

/// What the definition's columns repeat of its document; signals in the order of their names.
type Derived = (Option<Vec<String>>, Option<String>, Option<Vec<String>>, Option<i64>);

fn derived(definition: &Definition) -> Derived {
    let steps = definition.steps.iter().map(|step| step.id.clone()).collect();
    let pivot = definition.steps.iter().find(|step| step.pivot).map(|step| step.id.clone());
    let mut signals: Vec<String> = definition
        .steps
        .iter()
        .filter_map(|step| match &step.work {
            Work::Wait { signal, .. } => Some(signal.clone()),
            Work::Command(_) => None,
        })
        .collect();
    signals.sort_unstable();
    (Some(steps), pivot, Some(signals), definition.deadline_ms)
}

/// The ended sagas behind `after`, the first to end first, each with when it ended.
pub async fn finished(
    conn: &mut PgConnection,
    after: Option<&(Uuid, String)>,
    limit: i64,
) -> Result<Vec<(Uuid, String)>, DbError> {
    let (id, at) = (after.map(|after| after.0), after.map(|after| &after.1));
    let query = sqlx::query_as(FINISHED).bind(at).bind(id).bind(limit);
    db::bounded("the ended sagas", LIMIT, query.fetch_all(conn)).await
}
