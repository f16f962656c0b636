//! One event of an operator, from reading the saga to the commit.

use super::{Applied, DefinitionError, Definitions, LIMIT, apply, limits, load, now};
use crate::db::{self, DbError};
use crate::saga::decide::{Action, Changes, Refusal, allowed_actions, allowed_step_actions, decide};
use crate::saga::definition::Definition;
use crate::saga::state::{Event, Saga, SagaStatus};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Acted {
    /// The saga afterwards.
    pub saga: Saga,
    /// What changed.
    pub changes: Changes,
}

/// Why nothing came of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ActError {
    /// There is no such saga.
    #[error("there is no saga {0}")]
    NotFound(Uuid),
    /// It ended long ago, and was removed.
    #[error("saga {0} has ended and was removed after its retention")]
    Purged(Uuid),
    /// It has moved on since the operator looked.
    #[error("the saga has moved on, its seq is {seq}")]
    Stale {
        /// Where it is now.
        seq: i64,
    },
    /// Not in this state.
    #[error("{refusal}")]
    Refused {
        /// Why.
        refusal: Refusal,
        /// Its state.
        status: SagaStatus,
        /// Where it is now.
        seq: i64,
        /// What could be done instead: with the saga, or with the step that was spoken of.
        allowed: Vec<Action>,
    },
    /// What it follows cannot be followed.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// The database said no.
    #[error(transparent)]
    Db(#[from] DbError),
}

impl From<sqlx::Error> for ActError {
    fn from(error: sqlx::Error) -> Self {
        Self::Db(error.into())
    }
}

/// Applies an event to a saga, in a transaction of its own that is committed on return; `expected_seq` is where the
/// operator saw it. Runs once more when it lost against another transaction. Not cancel-safe: the session must be
/// dropped if this is.
pub async fn act(
    conn: &mut PgConnection,
    definitions: &Definitions,
    saga_id: Uuid,
    event: &Event,
    expected_seq: Option<i64>,
) -> Result<Acted, ActError> {
    match once(conn, definitions, saga_id, event, expected_seq).await {
        Err(ActError::Db(DbError::Sqlx(error))) if db::is_conflict(&error) => {
            once(conn, definitions, saga_id, event, expected_seq).await
        }
        other => other,
    }
}

const IS_PURGED: &str = "select exists (select from oncebox.saga_purged as p where p.id = $1)";

async fn once(
    conn: &mut PgConnection,
    definitions: &Definitions,
    saga_id: Uuid,
    event: &Event,
    expected_seq: Option<i64>,
) -> Result<Acted, ActError> {
    let mut transaction = db::bounded("a transaction", LIMIT, conn.begin()).await?;
    let sagas = load(&mut transaction, &[saga_id]).await?;
    let followed = definitions.of(&mut transaction, &sagas).await?;
    let Some((saga, definition)) = sagas.into_iter().zip(followed).next() else {
        let query = sqlx::query_scalar(IS_PURGED).bind(saga_id);
        let purged: bool = db::bounded("what was removed", LIMIT, query.fetch_one(&mut *transaction)).await?;
        return Err(if purged { ActError::Purged(saga_id) } else { ActError::NotFound(saga_id) });
    };
    if expected_seq.is_some_and(|expected| expected != saga.seq) {
        return Err(ActError::Stale { seq: saga.seq });
    }
    let definition = definition?;
    let at = now(&mut transaction).await?;
    let limits = limits(&mut transaction).await?;
    let transition = decide(&saga, &definition, event, at, &limits)
        .map_err(|refusal| refused(refusal, &saga, &definition, event))?;
    let mut applied = [Applied { before: &saga, transition, event, at, cause: None }];
    apply(&mut transaction, &mut applied).await?;
    db::bounded("a commit", LIMIT, transaction.commit()).await?;
    let [Applied { transition, .. }] = applied;
    Ok(Acted { saga: transition.saga, changes: transition.changes })
}

fn refused(refusal: Refusal, saga: &Saga, definition: &Definition, event: &Event) -> ActError {
    let allowed = match event {
        Event::RetryStep { step, .. } | Event::SkipStep { step, .. } | Event::ResolveStep { step, .. } => {
            allowed_step_actions(saga, definition, step)
        }
        _ => allowed_actions(saga, definition),
    };
    ActError::Refused { refusal, status: saga.status, seq: saga.seq, allowed }
}

/// The statements of this file, for a test that prepares them.
pub const STATEMENTS: &[&str] = &[IS_PURGED];
