//! Reads a lane's windows in order, gives every message its place in its stream, and opens new windows.
//!
//! It runs ahead of publishing by a bounded channel. It alone writes to the journal, and with each plan it records how
//! far publishing has settled.

use super::lookahead::Item;
use crate::db::DbError;
use crate::failpoints;
use crate::outbox::journal::{self, LogPlace, Plan, RecordedPlan, Resume};
use crate::outbox::look::{self, Opened, PlanRecord, Sight};
use crate::outbox::offsets::Offsets;
use crate::outbox::source::{self, Change};
use crate::outbox::window::{self, LogRow};
use sqlx::PgConnection;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// Rows of one read: large enough that a read costs little a row, small enough to start publishing soon.
const PAGE_ROWS: i64 = 2_500;
/// Rows of the first read, when nothing is known of their size; each read asks for at most four times as many as the
/// one before, since what was asked for and not taken must still come over the wire.
const FIRST_PAGE_ROWS: i64 = 64;
/// Rows that a look brings along: a window of more is read by the page, which costs less a row.
const LOOK_ROWS: i64 = 100;
/// Counters that are sent with each look until a plan has recorded them; more are recorded at once, by a plan of
/// their own if need be.
const LOOK_COUNTERS: usize = 32;
/// Bytes of bodies after which a read stops.
const PAGE_BYTES: usize = 8 << 20;
/// Looks one after the other behind a row, for the next one: under load it comes within these few, which cost less than
/// a message, and below it they are few.
const QUICK_LOOKS: u32 = 7;
/// Pause between looks while messages come.
const POLL_BUSY: Duration = Duration::from_millis(1);
/// Looks when nothing has come for a while.
const POLL_IDLE: Duration = Duration::from_millis(50);
/// How long after the last message looks stay frequent.
const BUSY_FOR: Duration = Duration::from_millis(250);
/// Numbers taken without a visible row (open or rolled-back transactions), or a slow look that found nothing, after
/// which a new plan moves the place where looks begin.
const REBASE_NUMBERS: i64 = 5_000;
const REBASE_SLOW: Duration = Duration::from_millis(20);
/// After such a pause one more plan is made. It records the counters behind the last rows, which the log must keep
/// until then; and looks beyond a plan at which transactions were open are dearer.
const TIDY_AFTER: Duration = Duration::from_secs(1);
/// How often at most.
const REBASE_EVERY: Duration = Duration::from_secs(1);
/// After so long without a look the next one only makes a plan, as the first one does: what one transaction has written
/// meanwhile can be millions of rows that nobody may see yet. The page walks them without a lock; the look would keep the
/// lease from being renewed.
const STALE_AFTER: Duration = Duration::from_secs(1);
/// How often an idle lane looks whether its source is still in force.
const SOURCE_LOOK: Duration = Duration::from_secs(5);

/// Reads one lane for as long as its lease lasts.
pub(crate) struct Reader {
    conn: PgConnection,
    epoch: i64,
    offsets: Offsets,
    /// Windows that are recorded but not read to their end; never empty but for the moment a new one is opened.
    ahead: VecDeque<RecordedPlan>,
    /// The newest plan.
    newest: Plan,
    /// How far the first of `ahead` is read.
    read_upto: i64,
    settled: watch::Receiver<LogPlace>,
    pages: mpsc::Sender<Page>,
    /// The newest plan, for the time after this lease.
    known: watch::Sender<Option<Plan>>,
    /// No window is opened any more: the lane moves to a new source once all of them are settled.
    change: Option<Change>,
}

/// Messages in log order.
pub(crate) struct Page {
    pub items: Vec<Item>,
    /// The window they belong to ends behind them: everything of it lies before this place.
    pub end: Option<LogPlace>,
}

impl Reader {
    /// Goes on where the journal says. Passes over what is settled in the middle of a window without sending it.
    pub async fn resume(
        mut conn: PgConnection,
        epoch: i64,
        resume: Resume,
        settled: watch::Receiver<LogPlace>,
        pages: mpsc::Sender<Page>,
        known: watch::Sender<Option<Plan>>,
        change: Option<Change>,
    ) -> Result<Self, DbError> {
        let Resume { settled: from, plans, mut offsets, .. } = resume;
        let first = plans.front().expect("a resume holds the settled plan").plan.clone();
        let newest = plans.back().expect("a resume holds the newest plan").plan.clone();
        for (topic, count) in window::count_upto(&mut conn, &first, from.seq).await? {
            offsets.skip(&topic, count);
        }
        known.send_replace(Some(newest.clone()));
        Ok(Self { conn, epoch, offsets, ahead: plans, newest, read_upto: from.seq, settled, pages, known, change })
    }

    /// Reads until an error, or until nobody takes the messages any more.
    pub async fn run(mut self) -> Result<(), DbError> {
        let mut limit = FIRST_PAGE_ROWS;
        let mut last_row = Instant::now();
        let mut looks_since: u32 = 0;
        let mut last_plan = Instant::now();
        let mut tidied = false;
        let mut rebase = true;
        let mut looked = Instant::now();
        let mut source_seen = Instant::now();
        loop {
            while let Some(current) = self.ahead.front() {
                let plan = current.plan.clone();
                let page = window::read(&mut self.conn, &plan, self.read_upto, limit, PAGE_BYTES).await?;
                failpoints::pass("relay.window_read");
                limit = next_limit(limit, &page.rows);
                if !page.rows.is_empty() {
                    last_row = Instant::now();
                    looks_since = 0;
                    tidied = false;
                }
                if !self.hand_on(&plan, page).await? {
                    return Ok(());
                }
            }
            if let Some(change) = self.change.take() {
                return self.move_to(change).await;
            }

            let stale = looked.elapsed() >= STALE_AFTER;
            looked = Instant::now();
            looks_since = looks_since.saturating_add(1);
            let tidy = !tidied && last_row.elapsed() >= TIDY_AFTER;
            let forced = tidy || stale || std::mem::take(&mut rebase);
            let idle = last_row.elapsed() >= BUSY_FOR;
            let seen = match idle && !forced && look::nothing_new(&mut self.conn, &self.newest).await? {
                true => None,
                false => Some(self.look(forced, if forced { 0 } else { limit.min(LOOK_ROWS) }).await?),
            };
            if let Some(Sight { q, opened: None }) = &seen {
                let dear = is_dear(q - self.newest.q2, self.newest.ended_calm(), looked.elapsed());
                rebase = dear && last_plan.elapsed() >= REBASE_EVERY;
            }
            if let Some(opened) = seen.and_then(|seen| seen.opened) {
                tidied |= tidy;
                last_plan = Instant::now();
                if !opened.rows.is_empty() {
                    failpoints::pass("relay.window_read");
                    limit = next_limit(limit, &opened.rows);
                    last_row = Instant::now();
                    looks_since = 0;
                    tidied = false;
                }
                let page = window::Page { rows: opened.rows, last: opened.complete };
                if !self.hand_on(&opened.recorded.plan, page).await? {
                    return Ok(());
                }
            } else if self.pages.is_closed() {
                return Ok(());
            } else if source_seen.elapsed() >= SOURCE_LOOK {
                // An idle lane must move too: until then nothing in the log counts as settled.
                source_seen = Instant::now();
                if !journal::source_stands(&mut self.conn, self.newest.source).await? {
                    return Err(DbError::SourceReplaced { lane: self.newest.lane });
                }
            } else if !rebase && looks_since >= QUICK_LOOKS {
                tokio::time::sleep(poll_delay(last_row.elapsed())).await;
            }
        }
    }

    /// Gives rows of the first window their places and hands them on; false when nobody takes them any more.
    async fn hand_on(&mut self, plan: &Plan, page: window::Page) -> Result<bool, DbError> {
        if let Some(row) = page.rows.last() {
            self.read_upto = row.place.seq;
        }
        let end = page.last.then_some(LogPlace { n: plan.n + 1, seq: 0 });
        let items: Vec<Item> = page.rows.into_iter().map(|row| self.place(plan, row)).collect();
        if !(items.is_empty() && end.is_none()) && self.pages.send(Page { items, end }).await.is_err() {
            return Ok(false);
        }
        if page.last {
            self.next_window()?;
        }
        Ok(true)
    }

    fn place(&mut self, plan: &Plan, row: LogRow) -> Item {
        let envelope = self.offsets.place(plan.source, row.message);
        Item { place: row.place, envelope, expires: row.expires }
    }

    /// The first window is read to its end. On a replay the next plan must agree with what was counted.
    fn next_window(&mut self) -> Result<(), DbError> {
        self.ahead.pop_front();
        self.read_upto = 0;
        if let Some(next) = self.ahead.front()
            && let Some(stream) = self.offsets.contradiction(&next.streams, &next.bases)
        {
            return Err(DbError::JournalBroken {
                lane: next.plan.lane,
                n: next.plan.n,
                reason: format!("the offsets of stream \"{stream}\" differ from those recorded"),
            });
        }
        Ok(())
    }

    /// Looks beyond the newest plan; what it brings is durable.
    async fn look(&mut self, forced: bool, max_rows: i64) -> Result<Sight, DbError> {
        let settled = *self.settled.borrow();
        let keyframe = (self.newest.n + 1) % journal::KEYFRAME_EVERY == 0;
        let (streams, bases) = if keyframe { self.offsets.keyframe() } else { self.offsets.delta() };
        let forced = forced || streams.len() > LOOK_COUNTERS;
        let record = PlanRecord { settled, keyframe, streams, bases };
        let sight = look::look(&mut self.conn, self.epoch, &self.newest, forced, record, max_rows).await?;
        if let Some(Opened { recorded, .. }) = &sight.opened {
            failpoints::pass("relay.planned");
            self.offsets.recorded();
            self.newest = recorded.plan.clone();
            self.known.send_replace(Some(recorded.plan.clone()));
            self.ahead.push_back(recorded.clone());
        }
        Ok(sight)
    }

    /// Moves the lane once everything that was read is settled; the next take-over begins with the new source.
    async fn move_to(mut self, change: Change) -> Result<(), DbError> {
        let end = LogPlace { n: self.newest.n + 1, seq: 0 };
        tokio::select! {
            settled = self.settled.wait_for(|settled| *settled >= end) => if settled.is_err() { return Ok(()) },
            () = self.pages.closed() => return Ok(()),
        }
        let (lane, window) = (self.newest.lane, self.newest.n);
        tracing::warn!(lane, window, "everything of the old source is settled; the lane moves");
        failpoints::pass("relay.source_finished");
        let (streams, next) = self.offsets.keyframe();
        let rewritten = source::rebase(&mut self.conn, self.epoch, &self.newest, &streams, &next).await?;
        failpoints::pass("relay.source_moved");
        tracing::warn!(lane, window = window + 1, source = %change.to, rewritten, "the lane has moved to its new source");
        Err(DbError::SourceReplaced { lane })
    }
}

/// Aims at [`PAGE_BYTES`] by the size of the last page's bodies.
fn next_limit(limit: i64, rows: &[LogRow]) -> i64 {
    let bytes: usize = rows.iter().map(|row| row.message.body.len()).sum();
    match bytes.checked_div(rows.len()) {
        None => limit,
        Some(mean) => ((PAGE_BYTES / mean.max(1)) as i64).min(limit * 4).clamp(16, PAGE_ROWS),
    }
}

/// Whether looks beyond the newest plan cost too much for the nothing that they find. Beyond a calm plan after which
/// no number was taken there is nothing to be slow: then it was the machine.
fn is_dear(numbers: i64, calm: bool, took: Duration) -> bool {
    numbers >= REBASE_NUMBERS || (took >= REBASE_SLOW && (numbers > 0 || !calm))
}

fn poll_delay(since_last_row: Duration) -> Duration {
    if since_last_row < BUSY_FOR {
        return POLL_BUSY;
    }
    // From one pace to the other within a second, so that the first messages after a pause wait little.
    let calm = (since_last_row - BUSY_FOR).as_secs_f64().min(1.0);
    POLL_BUSY + (POLL_IDLE - POLL_BUSY).mul_f64(calm)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a slow look at which nothing was found moves the place where looks begin, also when no number was taken,
    /// if transactions were open at the newest plan.
    #[test]
    fn a_slow_look_beyond_a_plan_that_is_not_calm_is_dear() {
        assert!(is_dear(0, false, REBASE_SLOW));
        assert!(is_dear(1, true, REBASE_SLOW));
        assert!(is_dear(REBASE_NUMBERS, true, Duration::ZERO));
        assert!(!is_dear(0, true, REBASE_SLOW));
        assert!(!is_dear(1, false, REBASE_SLOW / 2));
    }
}
