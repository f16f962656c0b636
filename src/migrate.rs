//! The schema: refinery's files and bookkeeping on an sqlx connection, under a lock.
//!
//! refinery alone lets concurrent migrators collide; an advisory lock on the migrating session makes the others
//! wait and then find nothing to do. A process that meets a schema it does not know stops.

use crate::db::{self, DbError};
use refinery_core::Migration;
use refinery_core::traits::r#async::{AsyncMigrate, AsyncQuery, AsyncTransaction};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row};
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

mod embedded {
    refinery::embed_migrations!("migrations");
}

/// Key of the advisory lock that migrators take: the bytes of "oncebox" as a number.
const LOCK_KEY: i64 = 0x006f_6e63_6562_6f78;
const TABLE: &str = "oncebox.schema_history";
/// Applying a migration may have to wait for its table locks.
const STATEMENT_LIMIT: Duration = Duration::from_secs(600);

/// One migration, applied or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Number of the file.
    pub version: i32,
    /// Name of the file.
    pub name: String,
    /// When it was applied, RFC 3339.
    pub applied_on: Option<String>,
}

/// Why migrating failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// The database said no.
    #[error(transparent)]
    Db(#[from] DbError),
    /// refinery said no: a file that was applied has changed, or its SQL failed.
    #[error("{}", describe(.0))]
    Refinery(#[from] refinery_core::Error),
}

fn describe(error: &refinery_core::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Applies what is missing; returns what this call applied. Safe from many places at once. Each migration is
/// committed as a whole or not at all.
pub async fn migrate(url: &str) -> Result<Vec<Step>, MigrateError> {
    let mut conn = session(url).await?;
    let lock = async {
        sqlx::query("select set_config('lock_timeout', '0', false)").execute(&mut conn).await?;
        sqlx::query("select pg_advisory_lock($1)").bind(LOCK_KEY).execute(&mut conn).await
    };
    db::bounded("the migration lock", STATEMENT_LIMIT, lock).await?;
    if let Some(found) = applied_version(&mut conn).await?.filter(|found| *found > known_version()) {
        return Err(DbError::SchemaTooNew { found, known: known_version() }.into());
    }
    // `if not exists` alone asks for the right to create schemas, also when there is nothing to create.
    let missing: bool = sqlx::query_scalar("select to_regnamespace('oncebox') is null")
        .fetch_one(&mut conn)
        .await
        .map_err(DbError::from)?;
    if missing {
        conn.execute("create schema if not exists oncebox").await.map_err(DbError::from)?;
    }
    let mut runner = embedded::migrations::runner();
    runner.set_migration_table_name(TABLE);
    let report = runner.run_async(&mut Session(&mut conn)).await?;
    // The lock goes with the session.
    db::close(conn).await;
    Ok(report.applied_migrations().iter().map(step).collect())
}

/// Every migration this program has, and those the database has, in order.
pub async fn status(url: &str) -> Result<Vec<Step>, MigrateError> {
    let mut conn = session(url).await?;
    let mut steps: Vec<Step> = embedded::migrations::runner().get_migrations().iter().map(step).collect();
    if applied_version(&mut conn).await?.is_some() {
        for applied in Session(&mut conn).query(APPLIED).await.map_err(DbError::from)? {
            match steps.iter_mut().find(|step| step.version == applied.version()) {
                Some(known) => known.applied_on = step(&applied).applied_on,
                None => steps.push(step(&applied)),
            }
        }
    }
    steps.sort_by_key(|step| step.version);
    db::close(conn).await;
    Ok(steps)
}

/// Fails unless the database has exactly the schema this program was built for.
pub async fn check(conn: &mut PgConnection) -> Result<(), DbError> {
    let needed = known_version();
    match applied_version(conn).await? {
        None => Err(DbError::SchemaMissing),
        Some(found) if found < needed => Err(DbError::SchemaTooOld { found, needed }),
        Some(found) if found > needed => Err(DbError::SchemaTooNew { found, known: needed }),
        Some(_) => Ok(()),
    }
}

const APPLIED: &str = "select version, name, applied_on, checksum from oncebox.schema_history order by version";

async fn session(url: &str) -> Result<PgConnection, DbError> {
    let options = db::SessionOptions {
        application_name: "oncebox migrate",
        statement_timeout: STATEMENT_LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    db::connect(url, options).await
}

fn known_version() -> i32 {
    embedded::migrations::runner().get_migrations().iter().map(Migration::version).max().unwrap_or_default()
}

async fn applied_version(conn: &mut PgConnection) -> Result<Option<i32>, DbError> {
    let exists: bool =
        sqlx::query_scalar("select to_regclass('oncebox.schema_history') is not null").fetch_one(&mut *conn).await?;
    if !exists {
        return Ok(None);
    }
    Ok(sqlx::query_scalar("select max(version) from oncebox.schema_history").fetch_one(conn).await?)
}

fn step(migration: &Migration) -> Step {
    Step {
        version: migration.version(),
        name: migration.name().to_owned(),
        applied_on: migration.applied_on().and_then(|at| at.format(&Rfc3339).ok()),
    }
}

/// refinery's driver traits on an sqlx connection.
struct Session<'c>(&'c mut PgConnection);

impl AsyncTransaction for Session<'_> {
    type Error = sqlx::Error;

    async fn execute<'a, T: Iterator<Item = &'a str> + Send + 'a>(
        &'a mut self,
        queries: T,
    ) -> Result<usize, sqlx::Error> {
        let mut transaction = self.0.begin().await?;
        let mut count = 0;
        for query in queries {
            // The text is a file of this crate or refinery's own bookkeeping.
            sqlx::raw_sql(AssertSqlSafe(query)).execute(&mut *transaction).await?;
            count += 1;
        }
        transaction.commit().await?;
        Ok(count)
    }
}

impl AsyncQuery<Vec<Migration>> for Session<'_> {
    async fn query<'a>(&'a mut self, query: &'a str) -> Result<Vec<Migration>, sqlx::Error> {
        let rows = sqlx::query(AssertSqlSafe(query)).fetch_all(&mut *self.0).await?;
        rows.iter()
            .map(|row| {
                let unreadable = |what: String| sqlx::Error::Protocol(format!("{TABLE} is not readable: {what}"));
                let applied_on: String = row.try_get(2)?;
                let checksum: String = row.try_get(3)?;
                Ok(Migration::applied(
                    row.try_get(0)?,
                    row.try_get(1)?,
                    OffsetDateTime::parse(&applied_on, &Rfc3339).map_err(|error| unreadable(error.to_string()))?,
                    checksum.parse().map_err(|_| unreadable(format!("checksum {checksum}")))?,
                ))
            })
            .collect()
    }
}

impl AsyncMigrate for Session<'_> {}
