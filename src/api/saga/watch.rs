//! Waiting for changes of sagas: long polls and event streams share one look at the database.
//!
//! While anybody waits, one task asks every [`PAUSE`] how far all watched sagas have come, in one statement; it ends
//! with the last who waits. Left out on purpose: `NOTIFY`, whose lock at commit would slow every saga down for the
//! few that are watched.

use crate::api::problem::Problem;
use crate::api::sessions::Sessions;
use crate::saga::read;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use uuid::Uuid;

/// Long polls at a time: each holds one of the server's requests, which others need too.
pub(super) const WAITERS: usize = 100;
/// Event streams at a time: each holds a connection.
pub(super) const STREAMS: usize = 100;
/// Between two looks: what a change is noticed late by at most.
const PAUSE: Duration = Duration::from_millis(100);
/// Between two looks while the database is away.
const AWAY_PAUSE: Duration = Duration::from_secs(1);

/// How far a watched saga has come; none: nobody has looked yet.
type Seen = Option<Far>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Far {
    Seq(i64),
    Gone,
}

#[derive(Debug, Default)]
struct Watched {
    sagas: HashMap<Uuid, watch::Sender<Seen>>,
    /// A task is looking.
    is_looking: bool,
}

/// Who waits for what.
#[derive(Debug, Clone)]
pub(super) struct Watch {
    waiters: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    watched: Arc<Mutex<Watched>>,
}

/// One who waits; dropped, it no longer does.
#[derive(Debug)]
pub(super) struct Watcher {
    seen: watch::Receiver<Seen>,
    _place: OwnedSemaphorePermit,
}

impl Watch {
    pub(super) fn new() -> Self {
        let places = |places| Arc::new(Semaphore::new(places));
        Self { waiters: places(WAITERS), streams: places(STREAMS), watched: Arc::default() }
    }

    /// For a long poll.
    ///
    /// # Errors
    /// 503 when there are too many.
    pub(super) fn wait(&self, sessions: &Sessions, id: Uuid) -> Result<Watcher, Problem> {
        let place = Arc::clone(&self.waiters).try_acquire_owned();
        let place = place.map_err(|_| Problem::unavailable(format!("{WAITERS} others wait at this moment")))?;
        Ok(self.watch(sessions, id, place))
    }

    /// For an event stream.
    ///
    /// # Errors
    /// 503 when there are too many.
    pub(super) fn stream(&self, sessions: &Sessions, id: Uuid) -> Result<Watcher, Problem> {
        let place = Arc::clone(&self.streams).try_acquire_owned();
        let place = place.map_err(|_| Problem::unavailable(format!("there are {STREAMS} streams at this moment")))?;
        Ok(self.watch(sessions, id, place))
    }

    fn watch(&self, sessions: &Sessions, id: Uuid, place: OwnedSemaphorePermit) -> Watcher {
        let mut watched = self.lock();
        let seen = watched.sagas.entry(id).or_insert_with(|| watch::Sender::new(None)).subscribe();
        if !watched.is_looking {
            watched.is_looking = true;
            tokio::spawn(look(self.clone(), sessions.clone()));
        }
        Watcher { seen, _place: place }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that somebody still waits for; none: the looking ends.
    fn ids(&self) -> Vec<Uuid> {
        let mut watched = self.lock();
        watched.sagas.retain(|_, seen| seen.receiver_count() > 0);
        watched.is_looking = !watched.sagas.is_empty();
        watched.sagas.keys().copied().collect()
    }
}

impl Watcher {
    /// Waits until the saga is seen to be beyond `seq`, or gone.
    pub(super) async fn moved_beyond(&mut self, seq: i64) {
        let moved = |seen: &Seen| match seen {
            // Seen before the caller read the saga, perhaps: only a higher number is news.
            Some(Far::Seq(far)) => *far > seq,
            Some(Far::Gone) => true,
            None => false,
        };
        // The sender stays while there is a receiver.
        let _ = self.seen.wait_for(moved).await;
    }
}

async fn look(watch: Watch, sessions: Sessions) {
    loop {
        let ids = watch.ids();
        if ids.is_empty() {
            return;
        }
        let asked = ids.clone();
        let standings =
            sessions.run(move |conn| Box::pin(async move { Ok(read::standings(conn, &asked).await?) })).await;
        let Ok(standings) = standings else {
            tokio::time::sleep(AWAY_PAUSE).await;
            continue;
        };
        let found: HashMap<Uuid, i64> = standings.into_iter().map(|standing| (standing.id, standing.seq)).collect();
        {
            let watched = watch.lock();
            for id in ids {
                let far = found.get(&id).map_or(Far::Gone, |seq| Far::Seq(*seq));
                if let Some(seen) = watched.sagas.get(&id) {
                    seen.send_if_modified(|seen| seen.replace(far) != Some(far));
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}
