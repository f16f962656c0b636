//! Keeps the log within its retention: turns the ring, clears slots that are settled and old, trims the journal.
//!
//! Every step is one call of a function in a transaction of its own, so a janitor that dies or freezes between two
//! leaves nothing half-done and no lock behind.

use super::Rounds;
use crate::backoff::Backoff;
use crate::db::{self, DbError};
use crate::outbox::lease;
use sqlx::PgConnection;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Longest wait for one of these statements. A trim deletes [`TRIM_BATCH`] rows, everything else does less.
const LIMIT: Duration = Duration::from_secs(20);
/// Plans deleted at a time: some seconds of a busy relay's, in a transaction of some ten milliseconds.
const TRIM_BATCH: i32 = 5_000;
/// Batches a lane has in one round, so that one lane's arrears do not keep the ring from turning.
const TRIM_BATCHES: u32 = 10;
/// Pause between rounds: a thirtieth of the retention, a fifth of what a slot is written for, within these bounds.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// Pause while the journal is longer than one round could trim.
const PAUSE_BEHIND: Duration = Duration::from_millis(50);
/// Delay before a slot that somebody reads is tried again: each try makes relays wait for up to 100 ms.
const LOCKED_BACKOFF: Backoff = Backoff { initial: Duration::from_secs(1), cap: Duration::from_secs(30) };
/// How often at most it is said that the ring is stuck.
const STUCK_EVERY: Duration = Duration::from_secs(60);

/// How a janitor of the outbox runs.
#[derive(Debug, Clone)]
pub struct OutboxJanitorOptions {
    /// Where the outbox is.
    pub database_url: String,
}

/// Keeps the log small until `shutdown` is cancelled. Errors are logged and everything is tried again: what the
/// janitor leaves undone costs space, never messages.
pub async fn run(options: OutboxJanitorOptions, shutdown: CancellationToken) {
    let janitor = Janitor { slots: BTreeMap::new(), said_stuck: None };
    super::go_round(&options.database_url, janitor, shutdown).await;
}

const SLOTS: &str = "select slot from oncebox.outbox_slot order by slot";
const TURN: &str = "
    select t.outcome, t.slot, extract(epoch from clock_timestamp() - t.since)::float8,
        extract(epoch from s.retention)::float8
    from oncebox.outbox_turn() as t, oncebox.setting as s";
const CLEAR: &str = "select oncebox.outbox_clear($1)";
const TRIM: &str = "select oncebox.outbox_trim_journal($1, $2)";

struct Janitor {
    /// What became of each slot at its last look.
    slots: BTreeMap<i16, Slot>,
    said_stuck: Option<Instant>,
}

#[derive(Debug, Default)]
struct Slot {
    state: String,
    /// How often in a row it was locked by a reader, and when it is tried again.
    locked: u32,
    not_before: Option<Instant>,
}

impl Slot {
    fn look_again(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| at <= now)
    }

    fn looked(&mut self, state: String, now: Instant, delay: impl FnOnce(u32) -> Duration) {
        self.locked = if state == "locked" { self.locked.saturating_add(1) } else { 0 };
        self.not_before = (self.locked > 0).then(|| now + delay(self.locked));
        self.state = state;
    }
}

impl Rounds for Janitor {
    const FAILED: &'static str = "the outbox was not tidied up";
    const LIMIT: Duration = LIMIT;

    /// Clears first: the slot that gets free is the one to turn to. Returns how long to wait for the next round.
    async fn round(&mut self, conn: &mut PgConnection) -> Result<Duration, DbError> {
        let slots: Vec<i16> = db::bounded("the slots", LIMIT, sqlx::query_scalar(SLOTS).fetch_all(&mut *conn)).await?;
        for slot in slots {
            let known = self.slots.entry(slot).or_default();
            if known.look_again(Instant::now()) {
                let clear = sqlx::query_scalar(CLEAR).bind(slot).fetch_one(&mut *conn);
                let state: String = db::bounded("clearing a slot", LIMIT, clear).await?;
                if state == "cleared" {
                    tracing::info!(slot, "slot of the log cleared");
                }
                known.looked(state, Instant::now(), |locked| LOCKED_BACKOFF.jittered(locked));
            }
        }

        let turn = sqlx::query_as(TURN).fetch_one(&mut *conn);
        let (outcome, slot, age_s, retention_s): (String, i16, f64, f64) =
            db::bounded("turning the ring", LIMIT, turn).await?;
        let retention = seconds(retention_s);
        if outcome == "turned" {
            tracing::info!(slot, "the log goes on in another slot");
        }
        let stuck = outcome == "full" && seconds(age_s) > retention;
        if stuck && self.said_stuck.is_none_or(|at| at.elapsed() >= STUCK_EVERY) {
            let slots: Vec<_> = self.slots.iter().map(|(slot, known)| format!("{slot} {}", known.state)).collect();
            tracing::warn!(slot, since = ?seconds(age_s), ?slots, "the ring is stuck: no slot can be cleared, the log grows");
            self.said_stuck = Some(Instant::now());
        }

        let mut behind = false;
        for lane in lease::lanes(conn).await? {
            let mut batches = 0;
            loop {
                let trim = sqlx::query_scalar(TRIM).bind(lane).bind(TRIM_BATCH).fetch_one(&mut *conn);
                let trimmed: i32 = db::bounded("trimming the journal", LIMIT, trim).await?;
                tracing::debug!(lane, trimmed, "journal trimmed");
                batches += 1;
                behind |= trimmed == TRIM_BATCH && batches == TRIM_BATCHES;
                if trimmed < TRIM_BATCH || batches == TRIM_BATCHES {
                    break;
                }
            }
        }
        Ok(pause(retention, behind))
    }
}

/// Of an interval that the database says is positive and at most a year.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

/// How long to wait for the next round; janitors that were started together drift apart.
fn pause(retention: Duration, behind: bool) -> Duration {
    if behind {
        return PAUSE_BEHIND;
    }
    let pause = (retention / 30).clamp(PAUSE_MIN, PAUSE_MAX);
    pause / 2 + Backoff { initial: pause / 2, cap: pause / 2 }.jittered(1)
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[SLOTS, TURN, CLEAR, TRIM];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Goal: whatever the retention, a slot is looked at several times in the sixth of it that it is written for,
        /// and an idle janitor asks no more than ten times a second.
        #[test]
        fn rounds_fit_the_retention(retention_s in 1u64..366 * 86_400) {
            let retention = Duration::from_secs(retention_s);
            let pause = pause(retention, false);
            prop_assert!(pause <= retention / 6 / 2 || pause <= PAUSE_MIN);
            prop_assert!(pause >= PAUSE_MIN / 2 && pause <= PAUSE_MAX);
        }

        /// Goal: a slot that readers lock is tried ever more rarely, but always again; any other outcome ends that.
        #[test]
        fn locked_slots_are_tried_again(outcomes in prop::collection::vec(prop::bool::weighted(0.8), 1..50)) {
            let mut slot = Slot::default();
            let mut now = Instant::now();
            for locked in outcomes {
                prop_assert!(slot.look_again(now));
                let state = if locked { "locked" } else { "young" };
                slot.looked(state.to_owned(), now, |n| LOCKED_BACKOFF.ceiling(n));
                prop_assert_eq!(slot.look_again(now), !locked);
                now += LOCKED_BACKOFF.ceiling(slot.locked.max(1));
            }
        }
    }
}
