//! Time and signals: moves the sagas whose time has come (start, timeout, next attempt, deadline) and those that were
//! sent a signal. Replies come another way (`replies`).
//!
//! A round is one transaction: lock what is due, decide, write states, history and commands. What others work on is
//! passed over, so any number of orchestrators may run; one that dies leaves nothing half-done. A saga that cannot be
//! worked on, as when its definition cannot be read, is put off and keeps no other waiting. Also removes what ended long
//! ago, in bounded bites.

use super::decide::{Limits, decide};
use super::state::{Event, Millis, Signal};
use super::store::{self, Applied, Definitions, Due};
use crate::backoff::Backoff;
use crate::db::{self, DbError, SessionOptions};
use crate::failpoints;
use sqlx::{Connection, PgConnection};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Sagas of one round: a transaction of some ten milliseconds.
const ROUND: i32 = 100;
/// Pause after a round that found something, and longest one while there is nothing: two index probes each.
const PAUSE: Backoff = Backoff { initial: Duration::from_millis(5), cap: Duration::from_millis(250) };
/// Longest statement, and longest round. The end of a process waits for its round.
const LIMIT: Duration = Duration::from_secs(8);
/// How long a saga is put off that cannot be worked on: somebody must mend something.
const PUT_OFF_FOR: Duration = Duration::from_secs(60);
/// Pause between looks for what ended long ago.
const PURGE_EVERY: Duration = Duration::from_secs(60);
/// Sagas removed at a time: the first time, and at most. What a saga leaves behind has no common size, so bites grow
/// while they are quick, and shrink.
const PURGE_BITE: (i32, i32) = (16, 500);
/// Bites between these are left as they are.
const PURGE_TAKES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));
/// Delay after an error.
const ERROR_BACKOFF: Backoff = Backoff { initial: Duration::from_millis(100), cap: Duration::from_secs(10) };

/// How an orchestrator runs.
#[derive(Debug, Clone)]
pub struct OrchestratorOptions {
    /// Where the sagas are.
    pub database_url: String,
}

/// Moves sagas until `shutdown` is cancelled; a round that has begun is finished first. Errors are logged and
/// everything is tried again.
pub async fn run(options: OrchestratorOptions, shutdown: CancellationToken) {
    let mut orchestrator = Orchestrator {
        options,
        conn: None,
        definitions: Definitions::default(),
        one_by_one: false,
        size: ROUND,
        purge_at: Instant::now() + PURGE_EVERY / 2,
        purge_bite: PURGE_BITE.0,
    };
    let (mut failures, mut idle) = (0, 0);
    tracing::info!("orchestrating");
    while !shutdown.is_cancelled() {
        let pause = match orchestrator.work().await {
            Ok(found) => {
                failures = 0;
                idle = if found > 0 { 0 } else { idle + 1 };
                pause(found, idle)
            }
            Err(error) => {
                failures += 1;
                let delay = ERROR_BACKOFF.jittered(failures);
                tracing::warn!(%error, ?delay, "sagas were not looked at; it is tried again");
                delay
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => {}
        }
    }
    if let Some(conn) = orchestrator.conn {
        db::close(conn).await;
    }
}

/// None while there may be more, little while there was something, then ever more.
fn pause(found: usize, idle: u32) -> Duration {
    if found >= ROUND as usize { Duration::ZERO } else { PAUSE.ceiling(idle + 1) }
}

/// The round was too much at a time, or seems so; it may be the server that is slow.
fn took_too_long(error: &DbError) -> bool {
    match error {
        DbError::TimedOut { .. } => true,
        DbError::Sqlx(error) => db::sqlstate(error).as_deref() == Some("57014"),
        _ => false,
    }
}

/// How many sagas to remove at a time after a bite that took so long, or failed.
fn next_bite(bite: i32, succeeded: bool, took: Duration) -> i32 {
    match succeeded {
        true if took < PURGE_TAKES.0 => (bite * 2).min(PURGE_BITE.1),
        true if took <= PURGE_TAKES.1 => bite,
        _ => (bite / 2).max(1),
    }
}

struct Orchestrator {
    options: OrchestratorOptions,
    conn: Option<PgConnection>,
    definitions: Definitions,
    /// The last round failed, and not for the database's sake: the next one finds out whose fault it was.
    one_by_one: bool,
    /// Sagas of the next round at most: fewer after one that took too long, since what they hold has no common size.
    size: i32,
    purge_at: Instant,
    purge_bite: i32,
}

impl Orchestrator {
    /// A round, and a bite of the purge if it is time; how many sagas it found.
    async fn work(&mut self) -> Result<usize, DbError> {
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => connect(&self.options.database_url).await?,
        };
        let one_by_one = std::mem::take(&mut self.one_by_one);
        let round = self.round(&mut conn, one_by_one);
        let result = tokio::time::timeout(LIMIT, round).await;
        let found = match result.unwrap_or(Err(DbError::TimedOut { what: "a round of sagas", limit: LIMIT })) {
            Ok(found) => found,
            Err(error) => {
                if took_too_long(&error) {
                    self.size = (self.size / 2).max(1);
                } else {
                    self.one_by_one = !error.is_transient();
                }
                return Err(error);
            }
        };
        self.size = (self.size * 2).min(ROUND);
        if Instant::now() >= self.purge_at {
            let began = Instant::now();
            let purged = store::purge(&mut conn, self.purge_bite).await;
            self.purge_bite = next_bite(self.purge_bite, purged.is_ok(), began.elapsed());
            match purged {
                Ok(0) => self.purge_at = Instant::now() + PURGE_EVERY,
                Ok(removed) => {
                    tracing::info!(removed, "sagas and what was kept for them removed after their retention")
                }
                Err(error) => {
                    // Sagas that go on do not wait for those that ended.
                    tracing::warn!(%error, "sagas that ended were not removed; it is tried again");
                    self.purge_at = Instant::now() + PURGE_EVERY;
                    return Ok(found);
                }
            }
        }
        // Only a session that had no error is used again.
        self.conn = Some(conn);
        Ok(found)
    }

    /// One transaction: everything that is due, one event of each saga. One by one each saga has a savepoint of its own,
    /// and one that fails is put off.
    async fn round(&self, conn: &mut PgConnection, one_by_one: bool) -> Result<usize, DbError> {
        let mut transaction = conn.begin().await?;
        let due = store::due(&mut transaction, self.size).await?;
        let found = due.len();
        if found == 0 {
            transaction.rollback().await?;
            return Ok(0);
        }
        failpoints::pass("saga.due_found");
        let now = store::now(&mut transaction).await?;
        let limits = store::limits(&mut transaction).await?;
        let events: BTreeMap<Uuid, Event> = due.into_iter().map(|due| (due.id, next_event(due))).collect();
        let mut put_off = Vec::new();
        if one_by_one {
            for (id, event) in &events {
                let mut savepoint = transaction.begin().await?;
                let one = BTreeMap::from([(*id, event.clone())]);
                match self.move_all(&mut savepoint, &one, now, &limits).await {
                    Ok(set_aside) => {
                        savepoint.commit().await?;
                        put_off.extend(set_aside);
                    }
                    Err(error) if error.is_transient() => return Err(error),
                    Err(error) => {
                        savepoint.rollback().await?;
                        tracing::error!(saga.id = %id, %error, "a saga cannot be moved: it is put off");
                        put_off.push(*id);
                    }
                }
            }
        } else {
            put_off = self.move_all(&mut transaction, &events, now, &limits).await?;
        }
        if !put_off.is_empty() {
            let query = sqlx::query(PUT_OFF).bind(&put_off).bind(PUT_OFF_FOR.as_secs_f64());
            db::bounded("putting sagas off", LIMIT, query.execute(&mut *transaction)).await?;
        }
        failpoints::pass("saga.due_applied");
        transaction.commit().await?;
        failpoints::pass("saga.due_committed");
        tracing::debug!(found, "sagas moved");
        Ok(found)
    }

    /// Moves sagas, each by its event; returns those that cannot be moved.
    async fn move_all(
        &self,
        conn: &mut PgConnection,
        events: &BTreeMap<Uuid, Event>,
        now: Millis,
        limits: &Limits,
    ) -> Result<Vec<Uuid>, DbError> {
        let ids: Vec<Uuid> = events.keys().copied().collect();
        let sagas = store::load(conn, &ids).await?;
        let followed = self.definitions.of(conn, &sagas).await?;
        let (mut moved, mut put_off) = (Vec::with_capacity(sagas.len()), Vec::new());
        for (saga, definition) in sagas.iter().zip(followed) {
            let Some(event) = events.get(&saga.id) else { continue };
            let decided = match &definition {
                Ok(definition) => decide(saga, definition, event, now, limits).map_err(|refusal| refusal.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match decided {
                Ok(transition) => moved.push(Applied { before: saga, transition, event, at: now, cause: None }),
                Err(error) => {
                    tracing::error!(saga.id = %saga.id, error, "a saga cannot be moved: it is put off");
                    put_off.push(saga.id);
                }
            }
        }
        failpoints::pass("saga.due_decided");
        store::apply(conn, &mut moved).await?;
        Ok(put_off)
    }
}

/// One event at a time; a signal first, since it may be what a step waits for whose time is over.
fn next_event(due: Due) -> Event {
    match due.signals.into_iter().next() {
        Some(Signal { name, payload }) => Event::Signal { name, payload },
        None => Event::Due {},
    }
}

async fn connect(database_url: &str) -> Result<PgConnection, DbError> {
    let session = SessionOptions {
        application_name: "oncebox orchestrate",
        statement_timeout: LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    db::connect(database_url, session).await
}

const PUT_OFF: &str = "select oncebox.saga_put_off($1, make_interval(secs => $2))";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[PUT_OFF];

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: an orchestrator that finds as much as it can take goes on at once, one that finds nothing asks a few
    /// times a second.
    #[test]
    fn idle_orchestrators_ask_rarely() {
        assert_eq!(pause(ROUND as usize, 0), Duration::ZERO);
        assert!(pause(1, 0) <= Duration::from_millis(20));
        assert!((1..20).all(|idle| pause(0, idle) <= pause(0, idle + 1)));
        assert_eq!(pause(0, 20), PAUSE.cap);
    }

    /// Goal: removal takes what it can in a short time, and never nothing.
    #[test]
    fn bites_fit_the_time() {
        let (quick, slow) = (Duration::from_millis(1), Duration::from_secs(1));
        assert_eq!((0..10).fold(PURGE_BITE.0, |bite, _| next_bite(bite, true, quick)), PURGE_BITE.1);
        assert_eq!((0..10).fold(PURGE_BITE.1, |bite, _| next_bite(bite, true, slow)), 1);
        assert_eq!((0..10).fold(PURGE_BITE.1, |bite, _| next_bite(bite, false, quick)), 1);
    }
}
