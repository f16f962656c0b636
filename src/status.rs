//! What an operator asks first: who publishes, how far behind, what is parked, and what holds things up.
//!
//! [`look`] reads it with a few bounded statements: index probes, and counts that stop at [`COUNT_LIMIT`], so that it can
//! be polled every second whatever lies in the tables. `oncebox status` and `/metrics` show the same look. It needs
//! the rights of `oncebox_admin`. Left out on purpose: sizes and rates of the broker, which has its own exporter.

pub mod sagas;

use crate::db::{self, DbError, SessionOptions};
use crate::migrate;
use crate::outbox::pause::{self, PauseEntry};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use std::collections::BTreeMap;
use std::time::Duration;
use utoipa::ToSchema;

/// Messages counted one by one; beyond it a count says "at least".
pub const COUNT_LIMIT: i32 = 100_000;
/// Longest wait for one statement: a count of so many rows that are not in memory takes a while.
const LIMIT: Duration = Duration::from_secs(10);

/// A number of rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Count {
    /// So many were counted.
    pub count: i64,
    /// There may be more: counting stopped.
    pub at_least: bool,
}

impl Count {
    fn upto_limit(count: i64) -> Self {
        let limit = i64::from(COUNT_LIMIT);
        Self { count: count.min(limit), at_least: count >= limit }
    }
}

/// Messages that are held, by what is to become of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct Held {
    /// To be tried again by themselves.
    pub waiting: i64,
    /// For how long the first of those has been held, in seconds.
    pub oldest_waiting_s: Option<f64>,
    /// Those that need an operator, by reason.
    pub parked: BTreeMap<String, i64>,
}

/// A relay process.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Relay {
    /// Named in its leases.
    pub owner: String,
    /// What it calls itself: host and pid.
    pub name: String,
    /// It reaches the broker.
    pub ready: bool,
    /// For how long it has run, in seconds.
    pub up_s: f64,
    /// When it was last heard of, in seconds ago.
    pub seen_s_ago: f64,
    /// Lanes it holds.
    pub lanes: Vec<i16>,
}

/// One lane of the log.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Lane {
    /// Which lane.
    pub lane: i16,
    /// The relay that holds it, if its lease has not run out.
    pub owner: Option<String>,
    /// What that relay calls itself.
    pub owner_name: Option<String>,
    /// How often the lane was taken.
    pub epoch: i64,
    /// Until the lease runs out unless it is renewed, in seconds.
    pub lease_left_s: Option<f64>,
    /// Window of the settled place; all windows before it are settled.
    pub settled_n: i64,
    /// Sequence number up to which that window is settled.
    pub settled_seq: i64,
    /// The newest window.
    pub newest_n: i64,
    /// Committed messages that are neither confirmed nor held.
    pub lag: Count,
    /// Age of the oldest of them, in seconds; 0 when there is none.
    pub lag_s: f64,
    /// Messages that got their offset, up to the newest window.
    pub published_total: i64,
    /// What left the log's order.
    pub held: Held,
}

/// Where messages say they come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Source {
    /// In force.
    pub current: String,
    /// How many there have been; each after the first came with a restore or a failover.
    pub count: i64,
    /// Since when, RFC 3339.
    pub since: String,
    /// Why it was made.
    pub reason: Option<String>,
    /// The database is the one it was made for: otherwise no relay has looked yet since it was moved.
    pub is_here: bool,
    /// Lanes that have yet to move to it.
    pub lanes_behind: i64,
}

/// One slot of the ring.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Slot {
    /// Which slot.
    pub slot: i16,
    /// What keeps it from being cleared: current, empty, young, unsettled; or clearable.
    pub state: String,
    /// Table and indexes.
    pub bytes: i64,
    /// Since when no new messages go there, RFC 3339.
    pub closed_at: Option<String>,
    /// When it was last cleared, RFC 3339.
    pub cleared_at: Option<String>,
}

/// The log's ring and its journal.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Ring {
    /// Where new messages go.
    pub current: i16,
    /// Since when, in seconds.
    pub current_for_s: f64,
    /// The setting, in seconds.
    pub retention_s: f64,
    /// Age of the oldest message in the log, in seconds.
    pub oldest_s: Option<f64>,
    /// Plans in the journal, of all lanes.
    pub plans: i64,
    /// Every slot.
    pub slots: Vec<Slot>,
}

/// Messages not to be sent yet.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Scheduled {
    /// How many.
    pub messages: Count,
    /// When the first of them is due, RFC 3339.
    pub next_due: Option<String>,
    /// Until then, in seconds; negative when it is overdue.
    pub next_due_in_s: Option<f64>,
}

/// A consumer with an inbox in this database.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Consumer {
    /// Its name.
    pub consumer: String,
    /// What it could not apply at once.
    pub held: Held,
}

/// Who has been in a transaction for longest, in the whole cluster.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct OldestTransaction {
    /// The session; none for a prepared transaction.
    pub pid: Option<i32>,
    /// Name of a prepared transaction.
    pub gid: Option<String>,
    /// Where.
    pub database: Option<String>,
    /// As whom.
    pub role: Option<String>,
    /// What the session calls itself.
    pub application: Option<String>,
    /// `active`, `idle in transaction`, `prepared` …
    pub state: Option<String>,
    /// Its transaction id if it has one, else the oldest it can see.
    pub xid: Option<i64>,
    /// How long it has lasted, in seconds; unknown where the schema's owner may not see it.
    pub age_s: Option<f64>,
}

/// What happened between two looks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
pub struct Rates {
    /// Offsets given to messages a second.
    pub published_per_s: f64,
    /// Inserts into the inbox a second, those rolled back included.
    pub accepted_per_s: f64,
    /// Seconds between the looks.
    pub over_s: f64,
}

/// One look.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Status {
    /// When, by the database's clock, RFC 3339.
    pub at: String,
    #[serde(skip)]
    at_s: f64,
    /// Every lane.
    pub lanes: Vec<Lane>,
    /// Every relay that lives.
    pub relays: Vec<Relay>,
    /// What operators have stopped.
    pub pauses: Vec<PauseEntry>,
    /// The outbox's name.
    pub source: Source,
    /// The log.
    pub ring: Ring,
    /// The schedule.
    pub scheduled: Scheduled,
    /// Every consumer known here.
    pub consumers: Vec<Consumer>,
    /// The sagas.
    pub sagas: sagas::Sagas,
    /// Inserts into the inbox since the server's counters began.
    pub accepted_total: i64,
    /// None when nobody else is in a transaction.
    pub oldest_transaction: Option<OldestTransaction>,
    /// Since an earlier look, if there was one.
    pub rates: Option<Rates>,
}

impl Status {
    /// Notes what happened since an earlier look. Counters that went down began anew: no rate is better than a wrong one.
    pub fn compare(&mut self, earlier: &Status) {
        let over_s = self.at_s - earlier.at_s;
        let published = |status: &Status| status.lanes.iter().map(|lane| lane.published_total).sum::<i64>();
        let (published, accepted) =
            (published(self) - published(earlier), self.accepted_total - earlier.accepted_total);
        self.rates = (over_s > 0.0 && published >= 0 && accepted >= 0).then(|| Rates {
            published_per_s: published as f64 / over_s,
            accepted_per_s: accepted as f64 / over_s,
            over_s,
        });
    }
}

/// A session for [`look`], on a schema this program knows.
pub async fn connect(url: &str, application_name: &'static str) -> Result<PgConnection, DbError> {
    let session = SessionOptions {
        application_name,
        statement_timeout: LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let mut conn = db::connect(url, session).await?;
    migrate::check(&mut conn).await?;
    Ok(conn)
}

// What the last plan that tells says: one that touched nothing leaves the lane's counter out, a keyframe never does.
const LANES: &str = "
    select l.lane,
        case when l.expires_at > clock_timestamp() then l.owner::text end,
        case when l.expires_at > clock_timestamp() then l.owner_name end,
        l.epoch,
        case when l.expires_at > clock_timestamp()
            then extract(epoch from l.expires_at - clock_timestamp())::float8 end,
        coalesce(s.n, 0), coalesce(s.seq, 0), coalesce(s.newest_n, 0), coalesce(g.messages, 0),
        greatest(coalesce(extract(epoch from clock_timestamp() - g.oldest), 0), 0)::float8,
        coalesce(c.next, 1) - 1
    from oncebox.outbox_lease as l
    left join oncebox.outbox_settled() as s on s.lane = l.lane
    cross join lateral oncebox.outbox_lag(l.lane, $1) as g
    left join lateral (
        select p.bases[array_position(p.streams, '#' || l.lane)] as next
        from oncebox.outbox_plan as p
        where p.lane = l.lane and (p.keyframe or p.streams @> array['#' || l.lane])
        order by p.n desc limit 1) as c on true
    order by l.lane";

const HELD: &str = "
    select h.lane, h.state, h.reason, count(*),
        extract(epoch from clock_timestamp() - min(h.held_at))::float8
    from (select lane, state, reason, held_at from oncebox.outbox_held order by lane, seq limit $1) as h
    group by h.lane, h.state, h.reason
    order by h.lane, h.state, h.reason";

const SOURCE: &str = r#"
    select s.source::text, (select count(*) from oncebox.outbox_source),
        to_char(s.made_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), s.reason,
        s.identity = oncebox.outbox_identity(),
        (select count(*) from oncebox.outbox_lease as l
        cross join lateral (
            select p.source from oncebox.outbox_plan as p where p.lane = l.lane order by p.n desc limit 1) as p
        where p.source <> s.source)
    from oncebox.outbox_source as s order by s.ordinal desc limit 1"#;

const RELAYS: &str = "
    select r.owner::text, r.name, r.ready, extract(epoch from clock_timestamp() - r.started_at)::float8,
        extract(epoch from clock_timestamp() - r.seen_at)::float8,
        array(
            select l.lane from oncebox.outbox_lease as l
            where l.owner = r.owner and l.expires_at > clock_timestamp() order by l.lane)
    from oncebox.outbox_relay as r
    order by r.owner";

const RING: &str = "
    select r.slot, extract(epoch from clock_timestamp() - r.turned_at)::float8,
        extract(epoch from s.retention)::float8,
        (select extract(epoch from clock_timestamp() - min(o.published_at))::float8
        from oncebox.outbox_lease as l
        cross join lateral (
            select i.published_at from oncebox.outbox as i where i.lane = l.lane order by i.seq limit 1) as o),
        (select coalesce(sum(n.newest + 1 - coalesce(t.below_n, 0)), 0)::bigint
        from oncebox.outbox_lease as l
        cross join lateral (
            select max(p.n) as newest from oncebox.outbox_plan as p where p.lane = l.lane) as n
        left join oncebox.outbox_trim as t on t.lane = l.lane)
    from oncebox.outbox_ring as r, oncebox.setting as s";

const SLOTS: &str = r#"
    select s.slot, oncebox.outbox_slot_state(s.slot),
        pg_total_relation_size(('oncebox.outbox_' || s.slot)::regclass),
        to_char(nullif(s.closed_at, '-infinity') at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
        to_char(s.cleared_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
    from oncebox.outbox_slot as s
    order by s.slot"#;

const SCHEDULED: &str = r#"
    select (select count(*) from (select from oncebox.outbox_scheduled limit $1) as s),
        to_char(f.deliver_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
        extract(epoch from f.deliver_at - clock_timestamp())::float8
    from (select 1) as one
    left join lateral (
        select deliver_at from oncebox.outbox_scheduled order by deliver_at, id limit 1) as f on true"#;

const CONSUMERS: &str = "select consumer from oncebox.inbox_consumers() as c (consumer) order by consumer";

const DELIVERIES: &str = "
    select h.consumer, h.state, h.reason, count(*),
        extract(epoch from clock_timestamp() - min(h.held_at))::float8
    from (
        select consumer, state, reason, held_at from oncebox.inbox_held order by consumer, message_id limit $1) as h
    group by h.consumer, h.state, h.reason
    order by h.consumer, h.state, h.reason";

const TOTALS: &str = r#"
    select
        to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
        extract(epoch from clock_timestamp())::float8,
        (select coalesce(sum(pg_stat_get_tuples_inserted(i.inhrelid)), 0)::bigint
        from pg_inherits as i where i.inhparent = 'oncebox.inbox'::regclass)"#;

const OLDEST: &str = "
    select t.pid, t.gid, t.database, t.role, t.application, t.state, t.xid,
        extract(epoch from clock_timestamp() - t.since)::float8
    from oncebox.oldest_transaction() as t
    where t.pid is not null or t.gid is not null";

/// Reads everything once.
pub async fn look(conn: &mut PgConnection) -> Result<Status, DbError> {
    let (at, at_s, accepted_total) =
        db::bounded("the totals", LIMIT, sqlx::query_as(TOTALS).fetch_one(&mut *conn)).await?;
    let rows = sqlx::query(LANES).bind(COUNT_LIMIT).fetch_all(&mut *conn);
    let mut lanes = db::bounded("the lanes", LIMIT, rows).await?.iter().map(lane).collect::<Result<Vec<_>, _>>()?;
    let rows = sqlx::query_as(HELD).bind(i64::from(COUNT_LIMIT)).fetch_all(&mut *conn);
    let mut held = held_by::<i16>(db::bounded("held messages", LIMIT, rows).await?);
    for lane in &mut lanes {
        lane.held = held.remove(&lane.lane).unwrap_or_default();
    }
    let source = db::bounded("the source", LIMIT, sqlx::query(SOURCE).fetch_one(&mut *conn)).await?;
    let rows = db::bounded("the relays", LIMIT, sqlx::query(RELAYS).fetch_all(&mut *conn)).await?;
    let relays = rows.iter().map(relay).collect::<Result<_, _>>()?;
    let pauses = pause::list(conn).await?;
    let (slot, current_for_s, retention_s, oldest_s, plans) =
        db::bounded("the ring", LIMIT, sqlx::query_as(RING).fetch_one(&mut *conn)).await?;
    let rows = db::bounded("the slots", LIMIT, sqlx::query(SLOTS).fetch_all(&mut *conn)).await?;
    let slots = rows.iter().map(ring_slot).collect::<Result<_, _>>()?;
    let scheduled = sqlx::query_as(SCHEDULED).bind(i64::from(COUNT_LIMIT)).fetch_one(&mut *conn);
    let (messages, next_due, next_due_in_s) = db::bounded("the schedule", LIMIT, scheduled).await?;
    let names: Vec<String> =
        db::bounded("the consumers", LIMIT, sqlx::query_scalar(CONSUMERS).fetch_all(&mut *conn)).await?;
    let rows = sqlx::query_as(DELIVERIES).bind(i64::from(COUNT_LIMIT)).fetch_all(&mut *conn);
    let mut held = held_by::<String>(db::bounded("held deliveries", LIMIT, rows).await?);
    let consumers = names
        .into_iter()
        .map(|consumer| Consumer { held: held.remove(&consumer).unwrap_or_default(), consumer })
        .collect();
    let sagas = sagas::look(conn).await?;
    let oldest = sqlx::query(OLDEST).fetch_optional(conn);
    let oldest = db::bounded("the oldest transaction", LIMIT, oldest).await?;
    Ok(Status {
        at,
        at_s,
        lanes,
        relays,
        pauses,
        source: source_of(&source)?,
        ring: Ring { current: slot, current_for_s, retention_s, oldest_s, plans, slots },
        scheduled: Scheduled { messages: Count::upto_limit(messages), next_due, next_due_in_s },
        consumers,
        sagas,
        accepted_total,
        oldest_transaction: oldest.as_ref().map(oldest_transaction).transpose()?,
        rates: None,
    })
}

fn source_of(row: &PgRow) -> Result<Source, sqlx::Error> {
    Ok(Source {
        current: row.try_get(0)?,
        count: row.try_get(1)?,
        since: row.try_get(2)?,
        reason: row.try_get(3)?,
        is_here: row.try_get(4)?,
        lanes_behind: row.try_get(5)?,
    })
}

fn relay(row: &PgRow) -> Result<Relay, sqlx::Error> {
    Ok(Relay {
        owner: row.try_get(0)?,
        name: row.try_get(1)?,
        ready: row.try_get(2)?,
        up_s: row.try_get(3)?,
        seen_s_ago: row.try_get(4)?,
        lanes: row.try_get(5)?,
    })
}

fn lane(row: &PgRow) -> Result<Lane, sqlx::Error> {
    Ok(Lane {
        lane: row.try_get(0)?,
        owner: row.try_get(1)?,
        owner_name: row.try_get(2)?,
        epoch: row.try_get(3)?,
        lease_left_s: row.try_get(4)?,
        settled_n: row.try_get(5)?,
        settled_seq: row.try_get(6)?,
        newest_n: row.try_get(7)?,
        lag: Count::upto_limit(row.try_get(8)?),
        lag_s: row.try_get(9)?,
        published_total: row.try_get(10)?,
        held: Held::default(),
    })
}

fn ring_slot(row: &PgRow) -> Result<Slot, sqlx::Error> {
    Ok(Slot {
        slot: row.try_get(0)?,
        state: row.try_get(1)?,
        bytes: row.try_get(2)?,
        closed_at: row.try_get(3)?,
        cleared_at: row.try_get(4)?,
    })
}

/// Rows of whose it is, state, reason, how many, and for how long the first has been held.
fn held_by<K: Ord>(rows: Vec<(K, String, String, i64, f64)>) -> BTreeMap<K, Held> {
    let mut by: BTreeMap<K, Held> = BTreeMap::new();
    for (whose, state, reason, count, oldest_s) in rows {
        let held = by.entry(whose).or_default();
        if state == "parked" {
            *held.parked.entry(reason).or_default() += count;
        } else {
            held.waiting += count;
            held.oldest_waiting_s = Some(held.oldest_waiting_s.unwrap_or(0.0).max(oldest_s));
        }
    }
    by
}

fn oldest_transaction(row: &PgRow) -> Result<OldestTransaction, sqlx::Error> {
    Ok(OldestTransaction {
        pid: row.try_get(0)?,
        gid: row.try_get(1)?,
        database: row.try_get(2)?,
        role: row.try_get(3)?,
        application: row.try_get(4)?,
        state: row.try_get(5)?,
        xid: row.try_get(6)?,
        age_s: row.try_get(7)?,
    })
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] =
    &[LANES, HELD, SOURCE, RELAYS, RING, SLOTS, SCHEDULED, CONSUMERS, DELIVERIES, TOTALS, OLDEST];

#[cfg(test)]
mod tests {
    use super::*;

    fn status(at_s: f64, accepted_total: i64) -> Status {
        Status {
            at: String::new(),
            at_s,
            lanes: Vec::new(),
            relays: Vec::new(),
            pauses: Vec::new(),
            source: Source {
                current: String::new(),
                count: 1,
                since: String::new(),
                reason: None,
                is_here: true,
                lanes_behind: 0,
            },
            ring: Ring {
                current: 0,
                current_for_s: 0.0,
                retention_s: 1.0,
                oldest_s: None,
                plans: 1,
                slots: Vec::new(),
            },
            scheduled: Scheduled { messages: Count::default(), next_due: None, next_due_in_s: None },
            consumers: Vec::new(),
            sagas: sagas::Sagas::default(),
            accepted_total,
            oldest_transaction: None,
            rates: None,
        }
    }

    /// Goal: rates are differences over time; a counter that began anew, or a clock that was set back, gives none.
    #[test]
    fn rates_need_two_looks_that_fit() {
        let mut later = status(12.0, 30);
        later.compare(&status(10.0, 10));
        assert_eq!(later.rates, Some(Rates { published_per_s: 0.0, accepted_per_s: 10.0, over_s: 2.0 }));
        later.compare(&status(10.0, 31));
        assert_eq!(later.rates, None);
        later.compare(&status(12.0, 10));
        assert_eq!(later.rates, None);
    }
}
