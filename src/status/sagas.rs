//! How the sagas stand: how many in which status, how long the stuck ones wait, whether an orchestrator is at work.
//!
//! Every count stops at a bound, every look is an index's: it can be polled however many sagas there are.

use super::{COUNT_LIMIT, Count, LIMIT};
use crate::db::{self, DbError};
use serde::Serialize;
use sqlx::PgConnection;
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// From when on a timer that nobody looked at means that no orchestrator is at work.
pub const OVERDUE_S: f64 = 10.0;
/// Stuck sagas whose age is looked up: an operator has enough to do with these.
const AGES: i32 = 1_000;
/// Definitions that are told apart; the rest counts as one, so that nobody's names flood a monitoring system.
pub const DEFINITIONS: usize = 50;
/// What the rest is called: no definition's name.
pub const REST: &str = "*";

/// The sagas of one database.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct Sagas {
    /// How many are in each status; those in none are left out.
    pub by_status: BTreeMap<String, Count>,
    /// The same by definition, `""` for those without one; the smallest of many are counted as `*`.
    pub by_definition: BTreeMap<String, BTreeMap<String, i64>>,
    /// How many an operator holds.
    pub paused: Count,
    /// How long the oldest stuck saga has been stuck, in seconds; none when none is.
    pub oldest_stuck_s: Option<f64>,
    /// Sagas whose timer is due for more than [`OVERDUE_S`]: none looks at them.
    pub overdue: Count,
    /// For how long the first timer has been due, in seconds; 0 when none is.
    pub overdue_s: f64,
    /// For how long the first signal has waited for an orchestrator, in seconds; 0 when none does.
    pub signal_wait_s: f64,
}

impl Sagas {
    /// How many are in a status.
    pub fn count(&self, status: &str) -> Count {
        self.by_status.get(status).copied().unwrap_or_default()
    }

    /// No orchestrator is at work, or it does not keep up.
    pub fn is_neglected(&self) -> bool {
        self.overdue_s > OVERDUE_S || self.signal_wait_s > OVERDUE_S
    }
}

const COUNTS: &str = "
    select t.status, coalesce(c.definition, ''), count(c.id)
    from unnest(array['scheduled', 'running', 'completed', 'compensating', 'compensated', 'cancelled', 'stuck',
        'terminated']) as t (status)
    cross join lateral (
        select s.id, s.definition from oncebox.saga as s where s.status = t.status order by s.id limit $1) as c
    group by t.status, coalesce(c.definition, '')
    order by t.status, coalesce(c.definition, '')";

const TIMERS: &str = "
    select
        (select count(*) from (select from oncebox.saga where next_due < clock_timestamp() - make_interval(secs => $2)
            limit $1) as o),
        coalesce((select extract(epoch from clock_timestamp() - s.next_due)::float8
            from oncebox.saga as s where s.next_due is not null order by s.next_due limit 1), 0),
        coalesce((select extract(epoch from clock_timestamp() - g.sent_at)::float8
            from oncebox.saga_signal as g where g.state = 'new' order by g.sent_at limit 1), 0),
        (select count(*) from (select from oncebox.saga as s
            where s.status in ('scheduled', 'running', 'compensating', 'stuck') and s.paused limit $1) as p)";

// Later changes of a stuck saga, such as a pause, do not make it younger.
const OLDEST_STUCK: &str = "
    select extract(epoch from clock_timestamp() - min(b.at))::float8
    from (select s.id, s.changed_at from oncebox.saga as s where s.status = 'stuck' order by s.id limit $1) as s
    cross join lateral (
        select coalesce((
            select h.at from oncebox.saga_history as h
            where h.saga_id = s.id and h.changes -> 'saga' ->> 'to' = 'stuck' order by h.seq desc limit 1),
            s.changed_at) as at) as b";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[COUNTS, TIMERS, OLDEST_STUCK];

/// Reads it once.
pub async fn look(conn: &mut PgConnection) -> Result<Sagas, DbError> {
    let query = sqlx::query_as(COUNTS).bind(i64::from(COUNT_LIMIT)).fetch_all(&mut *conn);
    let counts: Vec<(String, String, i64)> = db::bounded("the sagas", LIMIT, query).await?;
    let query = sqlx::query_as(TIMERS).bind(i64::from(COUNT_LIMIT)).bind(OVERDUE_S).fetch_one(&mut *conn);
    let timers: (i64, f64, f64, i64) = db::bounded("the sagas' timers", LIMIT, query).await?;
    let query = sqlx::query_scalar(OLDEST_STUCK).bind(i64::from(AGES)).fetch_one(conn);
    let oldest_stuck_s: Option<f64> = db::bounded("the stuck sagas", LIMIT, query).await?;
    let mut by_status: BTreeMap<String, i64> = BTreeMap::new();
    for (status, _, count) in &counts {
        *by_status.entry(status.clone()).or_default() += count;
    }
    Ok(Sagas {
        by_status: by_status.into_iter().map(|(status, count)| (status, Count::upto_limit(count))).collect(),
        by_definition: bounded(counts),
        paused: Count::upto_limit(timers.3),
        oldest_stuck_s: oldest_stuck_s.map(|age_s| age_s.max(0.0)),
        overdue: Count::upto_limit(timers.0),
        overdue_s: timers.1.max(0.0),
        signal_wait_s: timers.2.max(0.0),
    })
}

/// Counts by definition and status; of too many definitions the smallest become one.
fn bounded(counts: Vec<(String, String, i64)>) -> BTreeMap<String, BTreeMap<String, i64>> {
    let mut by: BTreeMap<String, BTreeMap<String, i64>> = BTreeMap::new();
    for (status, definition, count) in counts {
        *by.entry(definition).or_default().entry(status).or_default() += count;
    }
    if by.len() <= DEFINITIONS {
        return by;
    }
    let mut sizes: Vec<(i64, String)> = by.iter().map(|(name, of)| (of.values().sum(), name.clone())).collect();
    sizes.sort_unstable();
    for (_, name) in sizes.into_iter().take(by.len() - DEFINITIONS) {
        for (status, count) in by.remove(&name).unwrap_or_default() {
            *by.entry(REST.to_owned()).or_default().entry(status).or_default() += count;
        }
    }
    by
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: however many definitions there are, the figures are bounded, and no saga is lost from them.
    #[test]
    fn many_definitions_become_one() {
        let counts = (0..200).flat_map(|n| {
            [("running", n), ("stuck", 1)].map(|(status, count)| (status.to_owned(), format!("d{n:03}"), count))
        });
        let by = bounded(counts.collect());
        assert_eq!(by.len(), DEFINITIONS + 1);
        assert_eq!(by.values().flat_map(BTreeMap::values).sum::<i64>(), (0..200).sum::<i64>() + 200);
        assert_eq!(by[REST]["stuck"], 150);
        assert!(by.contains_key("d199") && !by.contains_key("d000"));
    }
}
