//! What sagas follow: kept by name and version, read once and remembered.

use super::LIMIT;
use crate::db::{self, DbError};
use crate::saga::definition::Definition;
use crate::saga::state::Saga;
use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Definitions remembered at once: more than any one program's sagas are likely to follow.
const CACHED: usize = 1_000;

/// Why a saga cannot be moved: its definition cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DefinitionError {
    /// It is not there.
    #[error("there is no definition \"{name}\" version {version}")]
    Missing {
        /// Its name.
        name: String,
        /// Its version.
        version: i32,
    },
    /// It was stored without having been checked, or by a program that knew more.
    #[error("definition \"{name}\" version {version} is not valid: {faults}")]
    Invalid {
        /// Its name.
        name: String,
        /// Its version.
        version: i32,
        /// What is wrong with it.
        faults: String,
    },
}

/// Every definition that was needed so far. Each is read once, and again if another document took its place.
#[derive(Debug, Default)]
pub struct Definitions {
    /// By name and version, with the hash of the document.
    known: Mutex<HashMap<Key, (Vec<u8>, Followed)>>,
}

/// Name and version.
type Key = (String, i32);
type Followed = Result<Arc<Definition>, DefinitionError>;

const HASHES: &str = "
    select d.name, d.version, d.hash
    from unnest($1::text[], $2::integer[]) as w (name, version)
    join oncebox.saga_definition as d on d.name = w.name and d.version = w.version
    order by d.name, d.version";

const DOCUMENT: &str =
    "select d.hash, d.document from oncebox.saga_definition as d where d.name = $1 and d.version = $2";

impl Definitions {
    /// What each of these sagas follows, in their order.
    pub async fn of(&self, conn: &mut PgConnection, sagas: &[Saga]) -> Result<Vec<Followed>, DbError> {
        let mut wanted: Vec<&(String, i32)> = sagas.iter().filter_map(|saga| saga.definition.as_ref()).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let found = self.look_up(conn, &wanted).await?;
        let followed = |saga: &Saga| match &saga.definition {
            None => Ok(Arc::new(Definition::enlisted(saga))),
            Some(key) => found
                .get(key)
                .cloned()
                .unwrap_or_else(|| Err(DefinitionError::Missing { name: key.0.clone(), version: key.1 })),
        };
        Ok(sagas.iter().map(followed).collect())
    }

    async fn look_up<'k>(
        &self,
        conn: &mut PgConnection,
        wanted: &[&'k (String, i32)],
    ) -> Result<HashMap<&'k (String, i32), Followed>, DbError> {
        let mut found = HashMap::new();
        if wanted.is_empty() {
            return Ok(found);
        }
        // A document can be removed while no saga follows it, and another one stored in its place.
        let names: Vec<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
        let versions: Vec<i32> = wanted.iter().map(|(_, version)| *version).collect();
        let query = sqlx::query_as::<_, (String, i32, Vec<u8>)>(HASHES).bind(names).bind(versions);
        let hashes = db::bounded("definitions", LIMIT, query.fetch_all(&mut *conn)).await?;
        let hashes: HashMap<(String, i32), Vec<u8>> =
            hashes.into_iter().map(|(name, version, hash)| ((name, version), hash)).collect();
        for key in wanted {
            let Some(hash) = hashes.get(*key) else { continue };
            let followed = match self.remembered(key, hash) {
                Some(followed) => followed,
                None => match self.read(conn, key).await? {
                    Some(followed) => followed,
                    None => continue,
                },
            };
            found.insert(*key, followed);
        }
        Ok(found)
    }

    fn remembered(&self, key: &(String, i32), hash: &[u8]) -> Option<Followed> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(key).filter(|(of, _)| of == hash).map(|(_, followed)| followed.clone())
    }

    async fn read(&self, conn: &mut PgConnection, key: &(String, i32)) -> Result<Option<Followed>, DbError> {
        let query = sqlx::query_as::<_, (Vec<u8>, Json<Value>)>(DOCUMENT).bind(&key.0).bind(key.1);
        let row = db::bounded("a definition", LIMIT, query.fetch_optional(conn)).await?;
        let Some((hash, Json(document))) = row else { return Ok(None) };
        let followed = Definition::parse(&document).map(Arc::new).map_err(|faults| DefinitionError::Invalid {
            name: key.0.clone(),
            version: key.1,
            faults: faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        });
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= CACHED {
            known.clear();
        }
        known.insert(key.clone(), (hash, followed.clone()));
        Ok(Some(followed))
    }
}

/// What became of a definition that was to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defined {
    /// It is stored.
    New,
    /// It was stored before, the same.
    AlreadySame,
    /// Another one is stored under this version.
    Conflict,
}

const DEFINE: &str = "
    insert into oncebox.saga_definition (name, version, document, created_by)
    values ($1, $2, $3, $4)
    on conflict (name, version) do nothing";

const IS_SAME: &str = "select d.document = $3 from oncebox.saga_definition as d where d.name = $1 and d.version = $2";

/// Stores a definition under its name and version, for good. That it is valid is the caller's to check
/// ([`Definition::parse`]): the database looks at name, version and the order of the steps only.
///
/// # Errors
/// SQLSTATE 22023 when the document's name or version is not this one, or its steps have no order.
pub async fn define(
    conn: &mut PgConnection,
    name: &str,
    version: i32,
    document: &Value,
    by: Option<&str>,
) -> Result<Defined, DbError> {
    let query = sqlx::query(DEFINE).bind(name).bind(version).bind(Json(document)).bind(by);
    if db::bounded("a definition", LIMIT, query.execute(&mut *conn)).await?.rows_affected() > 0 {
        return Ok(Defined::New);
    }
    let query = sqlx::query_scalar::<_, bool>(IS_SAME).bind(name).bind(version).bind(Json(document));
    let same = db::bounded("a definition", LIMIT, query.fetch_optional(conn)).await?;
    // One that was removed in between was another one's business; asked again, it will be stored.
    Ok(if same.unwrap_or(false) { Defined::AlreadySame } else { Defined::Conflict })
}

/// What became of a definition that was to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undefined {
    /// It is gone.
    Removed,
    /// There is none.
    NotThere,
    /// Sagas follow it or did: how many, in words.
    InUse(String),
}

const UNDEFINE: &str = "delete from oncebox.saga_definition where name = $1 and version = $2";

/// Removes a definition that no saga follows, nor one that has ended and is still kept.
pub async fn undefine(conn: &mut PgConnection, name: &str, version: i32) -> Result<Undefined, DbError> {
    let query = sqlx::query(UNDEFINE).bind(name).bind(version);
    match db::bounded("a definition", LIMIT, query.execute(conn)).await {
        Ok(done) if done.rows_affected() > 0 => Ok(Undefined::Removed),
        Ok(_) => Ok(Undefined::NotThere),
        Err(DbError::Sqlx(error)) if db::sqlstate(&error).as_deref() == Some("23503") => {
            let message = error.as_database_error().map(|error| error.message().to_owned());
            Ok(Undefined::InUse(message.unwrap_or_default()))
        }
        Err(error) => Err(error),
    }
}

/// The statements of this file, for a test that prepares them.
pub const STATEMENTS: &[&str] = &[HASHES, DOCUMENT, DEFINE, IS_SAME, UNDEFINE];
