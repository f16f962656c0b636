//! Reads a lane's windows in order, gives every message its place in its stream, and opens new windows.
//!
//! It runs ahead of publishing by a bounded channel. It alone writes to the journal, and with each plan it records how
//! far publishing has settled.

use super::lookahead::Item;
use crate::db::{DbError, bounded};
use crate::failpoints;
use crate::message::{Envelope, Position};
use crate::outbox::journal::{self, LogPlace, Plan, PlanRecord, RecordedPlan, Resume};
use crate::outbox::offsets::Offsets;
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
/// Bytes of bodies after which a read stops.
const PAGE_BYTES: usize = 8 << 20;
/// Looks while messages come: what a message waits here at most, beside the work for those before it.
const POLL_BUSY: Duration = Duration::from_millis(2);
/// Looks when nothing has come for a while.
const POLL_IDLE: Duration = Duration::from_millis(50);
/// How long after the last message looks stay frequent.
const BUSY_FOR: Duration = Duration::from_millis(250);
/// Numbers taken without a visible row (open or rolled-back transactions), or a slow look, after which a new plan
/// moves the place where looks begin.
const REBASE_NUMBERS: i64 = 5_000;
const REBASE_SLOW: Duration = Duration::from_millis(20);
/// After such a pause one more plan is made if transactions were open at the newest one: looks beyond it are dearer.
const TIDY_AFTER: Duration = Duration::from_secs(1);
/// How often at most.
const REBASE_EVERY: Duration = Duration::from_secs(1);
/// How often due messages of the schedule are moved into the log.
const SCHEDULE_EVERY: Duration = Duration::from_millis(250);
const SCHEDULE_BATCH: i32 = 500;

const RELEASE_DUE: &str = "select oncebox.outbox_release_due($1)";

/// Every statement of this file, for the test that prepares them all.
pub(crate) const STATEMENTS: &[&str] = &[RELEASE_DUE];

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
    ) -> Result<Self, DbError> {
        let Resume { settled: from, plans, mut offsets } = resume;
        let first = plans.front().expect("a resume holds the settled plan").plan.clone();
        let newest = plans.back().expect("a resume holds the newest plan").plan.clone();
        for (topic, count) in window::count_upto(&mut conn, &first, from.seq).await? {
            offsets.skip(&topic, count);
        }
        Ok(Self { conn, epoch, offsets, ahead: plans, newest, read_upto: from.seq, settled, pages })
    }

    /// Reads until an error, or until nobody takes the messages any more.
    pub async fn run(mut self) -> Result<(), DbError> {
        let mut limit = FIRST_PAGE_ROWS;
        let mut last_row = Instant::now();
        let mut last_plan = Instant::now();
        let mut tidied = false;
        let mut last_release = None;
        loop {
            while let Some(current) = self.ahead.front() {
                let plan = current.plan.clone();
                let page = window::read(&mut self.conn, &plan, self.read_upto, limit, PAGE_BYTES).await?;
                failpoints::pass("relay.window_read");
                limit = next_limit(limit, &page.rows);
                if let Some(row) = page.rows.last() {
                    self.read_upto = row.place.seq;
                    last_row = Instant::now();
                    tidied = false;
                }
                let end = page.last.then_some(LogPlace { n: plan.n + 1, seq: 0 });
                let items = page.rows.into_iter().map(|row| self.place(&plan, row)).collect();
                if self.pages.send(Page { items, end }).await.is_err() {
                    return Ok(());
                }
                if page.last {
                    self.next_window()?;
                }
            }

            if self.newest.lane == 0 && last_release.is_none_or(|at: Instant| at.elapsed() >= SCHEDULE_EVERY) {
                let released = self.release_due().await?;
                // A full batch: more is due, and is moved after what is in the log has been read.
                last_release = (released < SCHEDULE_BATCH).then(Instant::now);
            }

            let looked = Instant::now();
            let probe = journal::probe(&mut self.conn, &self.newest, last_row.elapsed() >= BUSY_FOR).await?;
            let numbers = probe.q - self.newest.q2;
            let unseen = numbers >= REBASE_NUMBERS || (numbers > 0 && looked.elapsed() >= REBASE_SLOW);
            let rebase = unseen && last_plan.elapsed() >= REBASE_EVERY;
            let tidy = !tidied && last_row.elapsed() >= TIDY_AFTER && !self.newest.ended_calm();
            if probe.found || rebase || tidy {
                tidied |= tidy;
                self.open_window(probe.q).await?;
                last_plan = Instant::now();
            } else if self.pages.is_closed() {
                return Ok(());
            } else {
                tokio::time::sleep(poll_delay(last_row.elapsed())).await;
            }
        }
    }

    fn place(&mut self, plan: &Plan, row: LogRow) -> Item {
        let (stream, offset, ordinal) = self.offsets.assign(&row.message.topic);
        let position = Position { source: plan.source, stream, offset };
        let envelope = Envelope { message: row.message, position, ordinal };
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

    /// Commits the next plan; nothing of its window has been read before it is durable.
    async fn open_window(&mut self, q: i64) -> Result<(), DbError> {
        let settled = *self.settled.borrow();
        let keyframe = (self.newest.n + 1) % journal::KEYFRAME_EVERY == 0;
        let (streams, bases) = if keyframe { self.offsets.take_keyframe() } else { self.offsets.take_delta() };
        let record = PlanRecord { q, settled, keyframe, streams, bases };
        let plan = journal::append(&mut self.conn, self.epoch, &self.newest, &record).await?;
        failpoints::pass("relay.planned");
        self.newest = plan.clone();
        self.ahead.push_back(RecordedPlan { plan, streams: record.streams, bases: record.bases });
        Ok(())
    }

    async fn release_due(&mut self) -> Result<i32, DbError> {
        let query = sqlx::query_scalar(RELEASE_DUE).bind(SCHEDULE_BATCH).fetch_one(&mut self.conn);
        bounded("the schedule", Duration::from_secs(20), query).await
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

fn poll_delay(since_last_row: Duration) -> Duration {
    if since_last_row < BUSY_FOR {
        return POLL_BUSY;
    }
    // From one pace to the other within a second, so that the first messages after a pause wait little.
    let calm = (since_last_row - BUSY_FOR).as_secs_f64().min(1.0);
    POLL_BUSY + (POLL_IDLE - POLL_BUSY).mul_f64(calm)
}
