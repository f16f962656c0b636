//! Walks the settled part of one lane's log again and gives every message the place it had.
//!
//! The counters are the journal's at every plan. A window is given out only if it is whole: the counters behind it,
//! as the next plan has them, are those reached by counting its rows. Where they are not, rows were cleared, nobody
//! can tell which, and the offsets of the whole window count as not retained.

use super::spans::Spans;
use crate::db::DbError;
use crate::message::Envelope;
use crate::outbox::history::{self, Extent, PastPlan};
use crate::outbox::journal::Plan;
use crate::outbox::offsets::Offsets;
use crate::outbox::window::{self, LogRow};
use crate::ranges::Ranges;
use sqlx::PgConnection;
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;
use uuid::Uuid;

/// Rows of one read.
const PAGE_ROWS: i64 = 500;
/// Bytes of bodies after which a read stops.
const PAGE_BYTES: usize = 4 << 20;
/// Plans of one read.
const PLANS: i64 = 500;
/// The database's clock may have stood back by this much between a message and its window.
const SLACK_S: f64 = 60.0;

/// What is wanted of a lane.
#[derive(Debug, Clone)]
pub(super) enum Wanted {
    /// These offsets.
    Offsets(BTreeMap<String, Ranges>),
    /// What was published at or after a time, of one stream or of all.
    Since { at_s: f64, stream: Option<String> },
}

impl Wanted {
    fn has(&self, stream: &str, offset: i64, published_at_s: u64) -> bool {
        match self {
            Self::Offsets(streams) => streams.get(stream).is_some_and(|ranges| ranges.contains(offset)),
            // The log has whole seconds here: the first one counts in full.
            Self::Since { at_s, stream: only } => {
                only.as_ref().is_none_or(|only| only == stream) && published_at_s as f64 >= at_s.floor()
            }
        }
    }
}

/// Why a message is not sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Skip {
    Held,
    Discarded,
    Expired,
}

/// A message of the past.
#[derive(Debug)]
pub(super) struct Found {
    pub envelope: Envelope,
    pub expires: Option<Instant>,
    pub skip: Option<Skip>,
}

/// A window that is being read.
struct Open {
    after: i64,
    /// Counters at its start.
    offsets: Offsets,
    /// The log's partitions as they were when the window was found whole.
    leaves: String,
}

pub(super) struct Walk {
    lane: i16,
    source: Uuid,
    extent: Extent,
    wanted: Wanted,
    /// Counters where the walk stands.
    offsets: Offsets,
    /// Plans from the current one on.
    ahead: VecDeque<PastPlan>,
    load_from: i64,
    all_loaded: bool,
    /// The plan whose counters have been taken over.
    entered: Option<i64>,
    /// The first plan lies at or before all that is wanted.
    from_the_start: bool,
    open: Option<Open>,
    /// Ended where nobody can tell which offsets follow.
    cut: bool,
    done: bool,
    /// Wanted, and no longer retained.
    pub missing: Spans,
}

impl Walk {
    /// Begins at the nearest plan with all counters; nothing if there is no such lane.
    pub async fn begin(
        conn: &mut PgConnection,
        lane: i16,
        source: Option<Uuid>,
        wanted: Wanted,
    ) -> Result<Option<Self>, DbError> {
        let Some(extent) = history::extent(conn, lane).await? else { return Ok(None) };
        let source = source.unwrap_or(extent.source);
        let nearest = match &wanted {
            Wanted::Offsets(streams) => {
                let firsts = streams.iter().filter_map(|(stream, ranges)| Some((stream.as_str(), ranges.first()?)));
                history::keyframe_of_offsets(conn, lane, source, &firsts.collect()).await?
            }
            Wanted::Since { at_s, .. } => history::keyframe_of_time(conn, lane, source, at_s - SLACK_S).await?,
        };
        let start = match nearest {
            Some(n) => Some(n),
            None => history::first_keyframe(conn, lane, source).await?,
        };
        Ok(Some(Self {
            lane,
            source,
            extent,
            wanted,
            offsets: Offsets::new(lane),
            ahead: VecDeque::new(),
            load_from: start.unwrap_or(i64::MAX),
            all_loaded: start.is_none(),
            entered: None,
            from_the_start: nearest.is_some(),
            open: None,
            cut: false,
            done: false,
            missing: Spans::default(),
        }))
    }

    /// The next messages, in the order of the log; nothing when all that is settled has been walked. After an error
    /// it can be asked again, on another connection.
    pub async fn next(&mut self, conn: &mut PgConnection) -> Result<Option<Vec<Found>>, DbError> {
        while !self.done {
            if self.ahead.len() < 2 && !self.all_loaded {
                let plans =
                    history::plans(conn, self.lane, self.source, self.load_from, self.extent.newest, PLANS).await?;
                self.all_loaded = (plans.len() as i64) < PLANS;
                self.load_from = plans.last().map_or(self.load_from, |last| last.recorded.plan.n + 1);
                self.ahead.extend(plans);
                continue;
            }
            let settled = self.extent.settled;
            let Some(current) = self.ahead.front() else { break };
            let plan = current.recorded.plan.clone();
            if !self.enter() {
                self.ahead.pop_front();
                continue;
            }
            let unsettled = plan.n > settled.n || (plan.n == settled.n && settled.seq == 0);
            if unsettled || self.nothing_more_wanted() {
                break;
            }
            if self.open.is_none() && !self.wants_window() {
                self.ahead.pop_front();
                continue;
            }
            let upto = if plan.n == settled.n { settled.seq } else { i64::MAX };
            if let Some(found) = self.read(conn, &plan, upto).await? {
                return Ok(Some(found));
            }
        }
        self.done = true;
        Ok(None)
    }

    /// What is wanted beyond the settled place; ask when the walk is done.
    pub fn beyond(&self) -> Spans {
        if self.cut { Spans::default() } else { self.remaining() }
    }

    /// What is wanted and was not come to yet.
    pub fn remaining(&self) -> Spans {
        let mut remaining = Spans::default();
        if let Wanted::Offsets(streams) = &self.wanted {
            for (stream, ranges) in streams {
                for (from, to) in ranges.clip(self.offsets.next(stream), i64::MAX).iter() {
                    // An open end asks for what there is.
                    if to < i64::MAX {
                        remaining.add(stream, from, to);
                    }
                }
            }
        }
        remaining
    }

    /// Takes over the counters of the current plan; false if they cannot be known: behind a hole in the journal, until
    /// a plan with all of them comes.
    fn enter(&mut self) -> bool {
        let Some(current) = self.ahead.front() else { return false };
        let n = current.recorded.plan.n;
        if self.entered == Some(n) {
            return true;
        }
        let follows = self.entered.is_some_and(|before| before + 1 == n);
        if !follows && !current.keyframe {
            return false;
        }
        if current.keyframe {
            if !follows && (self.entered.is_some() || !self.from_the_start) {
                self.miss_until(0);
            }
            self.offsets = Offsets::new(self.lane);
        }
        if let Some(PastPlan { recorded, .. }) = self.ahead.front() {
            self.offsets.apply(&recorded.streams, &recorded.bases);
        }
        self.entered = Some(n);
        true
    }

    /// Notes as missing what lies between the counters here and those of a plan ahead.
    fn miss_until(&mut self, ahead: usize) {
        let Some(next) = self.ahead.get(ahead) else { return };
        let lane_counter = format!("#{}", self.lane);
        for (stream, base) in next.recorded.streams.iter().zip(&next.recorded.bases) {
            let (from, to) = (self.offsets.next(stream), base - 1);
            match &self.wanted {
                _ if *stream == lane_counter => {}
                Wanted::Offsets(streams) => {
                    for (from, to) in streams.get(stream).map(|wanted| wanted.clip(from, to)).unwrap_or_default().iter()
                    {
                        self.missing.add(stream, from, to);
                    }
                }
                Wanted::Since { stream: only, .. } => {
                    if only.as_ref().is_none_or(|only| only == stream) {
                        self.missing.add(stream, from, to);
                    }
                }
            }
        }
    }

    /// The plan behind the current one, if none lies between.
    fn successor(&self) -> Option<&PastPlan> {
        let n = self.ahead.front()?.recorded.plan.n;
        self.ahead.get(1).filter(|next| next.recorded.plan.n == n + 1)
    }

    fn nothing_more_wanted(&self) -> bool {
        match &self.wanted {
            Wanted::Offsets(streams) => {
                streams.iter().all(|(stream, ranges)| ranges.last().is_none_or(|last| last < self.offsets.next(stream)))
            }
            Wanted::Since { .. } => false,
        }
    }

    /// Whether the current window can hold anything wanted, by the counters before and behind it.
    fn wants_window(&self) -> bool {
        let Some(current) = self.ahead.front() else { return false };
        let behind = |stream: &str| {
            let Some(next) = self.successor() else { return i64::MAX };
            let recorded = &next.recorded;
            let found = recorded.streams.iter().position(|other| other == stream);
            found.map_or(self.offsets.next(stream), |index| recorded.bases[index])
        };
        match &self.wanted {
            Wanted::Offsets(streams) => {
                streams.iter().any(|(stream, ranges)| ranges.meets(self.offsets.next(stream), behind(stream) - 1))
            }
            Wanted::Since { at_s, stream } => {
                let grew = |stream: &String| behind(stream) > self.offsets.next(stream);
                current.planned_at_s >= at_s - SLACK_S && stream.as_ref().is_none_or(grew)
            }
        }
    }

    /// Reads on in the current window, up to a row; nothing if the window is not whole. Changes nothing before the
    /// last answer of the database is there.
    async fn read(&mut self, conn: &mut PgConnection, plan: &Plan, upto: i64) -> Result<Option<Vec<Found>>, DbError> {
        let after = self.open.as_ref().map_or(0, |open| open.after);
        let page = window::read(conn, plan, after, PAGE_ROWS, PAGE_BYTES).await?;
        // A window of one page shows itself whether it is whole.
        let checks_itself = after == 0 && page.last && upto == i64::MAX && self.successor().is_some();
        let mut whole = true;
        let mut leaves = String::new();
        if !checks_itself {
            if self.successor().is_none() && plan.n == self.extent.newest {
                // The relay may have gone on since: rows are kept for sure only while their window is the newest.
                let next = plan.n + 1;
                self.ahead.extend(history::plans(conn, self.lane, self.source, next, next, 1).await?);
            }
            leaves = history::leaves(conn).await?;
            if self.open.as_ref().is_none_or(|open| open.leaves != leaves) {
                whole = self.is_whole(conn, plan).await?;
            }
        }
        let seqs: Vec<i64> = page.rows.iter().map(|row| row.place.seq).collect();
        let out_of_order = history::out_of_order(conn, self.lane, &seqs).await?;

        let before = match self.open.take() {
            Some(open) => open.offsets,
            None => self.offsets.clone(),
        };
        let mut found = Vec::new();
        if whole {
            for row in page.rows.into_iter().take_while(|row| row.place.seq <= upto) {
                found.extend(self.place(plan, row, &out_of_order));
            }
            if checks_itself && self.contradicts() {
                self.offsets = before.clone();
                whole = false;
                found.clear();
            }
        }
        if !whole {
            if self.successor().is_some() {
                self.miss_until(1);
            } else {
                // Nothing tells where it ended.
                for (stream, from, to) in self.remaining().iter() {
                    self.missing.add(stream, from, to);
                }
                (self.cut, self.done) = (true, true);
            }
            self.ahead.pop_front();
            return Ok(None);
        }
        let last_seq = seqs.last().copied().unwrap_or(after);
        if page.last || last_seq >= upto {
            // Behind the settled place the counters stand where they are.
            self.done = upto < i64::MAX || plan.n == self.extent.newest;
            self.ahead.pop_front();
        } else {
            self.open = Some(Open { after: last_seq, offsets: before, leaves });
        }
        Ok(Some(found))
    }

    fn place(&mut self, plan: &Plan, row: LogRow, out_of_order: &BTreeMap<i64, bool>) -> Option<Found> {
        let envelope = self.offsets.place(plan.source, row.message);
        let at = &envelope.position;
        if !self.wanted.has(&at.stream, at.offset, envelope.message.published_at_s) {
            return None;
        }
        let skip = match out_of_order.get(&row.place.seq) {
            Some(true) => Some(Skip::Discarded),
            Some(false) => Some(Skip::Held),
            None if row.expires.is_some_and(|at| at <= Instant::now()) => Some(Skip::Expired),
            None => None,
        };
        Some(Found { envelope, expires: row.expires, skip })
    }

    /// The counters after the window are not those the next plan recorded.
    fn contradicts(&self) -> bool {
        self.successor()
            .is_some_and(|next| self.offsets.contradiction(&next.recorded.streams, &next.recorded.bases).is_some())
    }

    /// Counts the rows of the current window. The newest has nothing to be held against, and need not be: its rows are
    /// kept, since a relay that begins anew counts them too.
    async fn is_whole(&self, conn: &mut PgConnection, plan: &Plan) -> Result<bool, DbError> {
        let Some(next) = self.successor() else {
            let newest = history::extent(conn, self.lane).await?.map(|extent| extent.newest);
            return Ok(newest == Some(plan.n) && self.open.is_none());
        };
        // From the window's start, wherever the reading stands.
        let mut offsets = self.open.as_ref().map_or(&self.offsets, |open| &open.offsets).clone();
        for (topic, count) in window::count_upto(conn, plan, i64::MAX).await? {
            offsets.skip(&topic, count);
        }
        Ok(offsets.contradiction(&next.recorded.streams, &next.recorded.bases).is_none())
    }
}
