//! Starting a saga at a client's request, once a request, and sending it signals.
//!
//! The SQL functions do it; what is added here is the client's own name of a request. Saga and name are written in
//! one transaction, and a twin of the request waits for it: no crash leaves a saga without its name.

use super::read::{self, Standing};
use crate::db::{self, DbError};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::types::Json;
use sqlx::{Connection, PgConnection, Postgres, Row};
use std::time::Duration;
use uuid::Uuid;

/// Longest wait for one statement: a twin may hold its lock for as long as its own statements take.
const LIMIT: Duration = Duration::from_secs(15);

/// A saga to be started; what is not set is left to its definition.
#[derive(Debug, Clone)]
pub struct Start {
    /// Name of the definition.
    pub definition: String,
    /// Its version; none: the newest.
    pub version: Option<i32>,
    /// Unique for the definition.
    pub business_key: String,
    /// What its steps can use.
    pub input: Option<Box<RawValue>>,
    /// When it begins, in microseconds since the Unix epoch; none: now.
    pub start_at_us: Option<i64>,
    /// How long it may take.
    pub deadline_ms: Option<i64>,
    /// What it can be found by.
    pub labels: Map<String, Value>,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Started {
    /// It is started.
    New(Uuid),
    /// It was, by the same request.
    Before(Uuid),
    /// The name of the request belongs to another one.
    OtherRequest,
    /// The business key belongs to another saga.
    Taken(Standing),
}

impl Start {
    /// Binds `$2` to `$8`.
    fn bind<'q>(&'q self, query: Query<'q, Postgres, PgArguments>) -> Query<'q, Postgres, PgArguments> {
        query
            .bind(&self.definition)
            .bind(self.version)
            .bind(&self.business_key)
            .bind(self.input.as_ref().map(Json))
            .bind(self.start_at_us)
            .bind(self.deadline_ms)
            .bind(Json(&self.labels))
    }
}

// One lock a name, so that its twin waits; another name with the same hash waits as well, and that is all.
const LOCK_KEY: &str = "select pg_advisory_xact_lock(hashtextextended('oncebox saga request ' || $1, 0))";

/// The request as JSON of a fixed form: what is left out and what is null, and the order of fields, make no difference.
macro_rules! request_hash {
    () => {
        "sha256(convert_to(jsonb_build_array(
            $2::text, $3::integer, $4::text, coalesce($5::jsonb, '{}'), $6::bigint, $7::bigint, $8::jsonb)::text,
            'UTF8'))"
    };
}

const BY_KEY: &str = concat!(
    "select r.saga_id, r.request_hash = ",
    request_hash!(),
    " from oncebox.saga_request as r where r.idempotency_key = $1"
);

const START: &str = "
    select oncebox.saga_start(
        definition => $1, version => $2, business_key => $3, input => $4,
        start_at => timestamptz 'epoch' + $5::bigint * interval '1 microsecond',
        deadline => $6::bigint * interval '1 millisecond', labels => $7)";

// Only a row of this very transaction has its xid: the function answers with a saga that was there as well.
const IS_NEW: &str = "select s.xmin = pg_current_xact_id()::xid from oncebox.saga as s where s.id = $1";

const REMEMBER: &str = concat!(
    "insert into oncebox.saga_request (idempotency_key, request_hash, saga_id) values ($1, ",
    request_hash!(),
    ", $9)"
);

/// Starts a saga, in a transaction of its own that is committed on return, unless the same request did before.
///
/// # Errors
/// SQLSTATE 22023 with the name of the argument that is wrong. Not cancel-safe: the session must be dropped then.
pub async fn start(conn: &mut PgConnection, saga: &Start, request_key: Option<&str>) -> Result<Started, DbError> {
    let mut transaction = db::bounded("a transaction", LIMIT, conn.begin()).await?;
    if let Some(key) = request_key {
        let lock = sqlx::query(LOCK_KEY).bind(key);
        db::bounded("a twin of the request", LIMIT, lock.execute(&mut *transaction)).await?;
        let query = saga.bind(sqlx::query(BY_KEY).bind(key));
        let found = db::bounded("the request", LIMIT, query.fetch_optional(&mut *transaction)).await?;
        if let Some(row) = found {
            let same: bool = row.try_get(1)?;
            return Ok(if same { Started::Before(row.try_get(0)?) } else { Started::OtherRequest });
        }
    }
    let query = sqlx::query_scalar::<_, Uuid>(START)
        .bind(&saga.definition)
        .bind(saga.version)
        .bind(&saga.business_key)
        .bind(saga.input.as_ref().map(Json))
        .bind(saga.start_at_us)
        .bind(saga.deadline_ms)
        .bind(Json(&saga.labels));
    let id = match db::bounded("the start of a saga", LIMIT, query.fetch_one(&mut *transaction)).await {
        Ok(id) => {
            let query = sqlx::query_scalar::<_, bool>(IS_NEW).bind(id);
            db::bounded("the saga", LIMIT, query.fetch_one(&mut *transaction)).await?.then_some(id)
        }
        // Its key belongs to a saga that was started otherwise.
        Err(DbError::Sqlx(error)) if db::sqlstate(&error).as_deref() == Some("23505") => None,
        Err(error) => return Err(error),
    };
    let Some(id) = id else {
        db::bounded("a rollback", LIMIT, transaction.rollback()).await?;
        let taken = read::find(conn, Some(&saga.definition), &saga.business_key).await?;
        // Removed in between: the caller's next try finds the key free.
        let gone = || DbError::Sqlx(sqlx::Error::Protocol("the business key was taken and freed meanwhile".to_owned()));
        return taken.map(Started::Taken).ok_or_else(gone);
    };
    if let Some(key) = request_key {
        let query = saga.bind(sqlx::query(REMEMBER).bind(key)).bind(id);
        db::bounded("the request", LIMIT, query.execute(&mut *transaction)).await?;
    }
    db::bounded("a commit", LIMIT, transaction.commit()).await?;
    Ok(Started::New(id))
}

const SIGNAL: &str = "select oncebox.saga_signal($1, $2, $3)";

/// Sends a signal to a saga, durable on return; the same again does nothing.
///
/// # Errors
/// SQLSTATE P0002 when there is no such saga, 55000 when it has ended, 23505 when it has the signal with another
/// payload, 22023 when no step waits for it or an argument is wrong.
pub async fn signal(conn: &mut PgConnection, id: Uuid, name: &str, payload: Option<&RawValue>) -> Result<(), DbError> {
    let query = sqlx::query(SIGNAL).bind(id).bind(name).bind(payload.map(Json));
    db::bounded("a signal", LIMIT, query.execute(conn)).await?;
    Ok(())
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[LOCK_KEY, BY_KEY, START, IS_NEW, REMEMBER, SIGNAL];
