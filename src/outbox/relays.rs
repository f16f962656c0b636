//! Which relays run, and what each of them holds: what they read to share the lanes.
//!
//! All times are the database's. Nothing here decides who publishes: that is the [`lease`].

use super::lease;
use crate::db::{self, DbError};
use sqlx::{PgConnection, Row};
use std::time::Duration;
use uuid::Uuid;

/// How often a relay says that it lives: as often as it renews a lease.
pub const BEAT_EVERY: Duration = lease::RENEW_EVERY;
/// A relay that was not seen for a lease's term gets no share.
const LIVE_FOR: Duration = lease::TERM;
/// Rows of relays that ended without a word are removed after this.
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// Longest wait for one of these statements: shorter than a term, so that a stuck one is noticed in time.
const LIMIT: Duration = Duration::from_millis(3_500);

// Its own row is not among those forgotten: one statement cannot delete and write the same row.
const BEAT: &str = "
    with forgotten as (
        delete from oncebox.outbox_relay
        where owner <> $1 and seen_at < clock_timestamp() - make_interval(secs => $4)
    )
    insert into oncebox.outbox_relay (owner, name, ready, started_at, seen_at)
    values ($1, $2, $3, clock_timestamp(), clock_timestamp())
    on conflict (owner) do update set ready = excluded.ready, seen_at = excluded.seen_at";

/// Says that a relay lives, and whether it can publish.
pub async fn beat(conn: &mut PgConnection, owner: Uuid, name: &str, ready: bool) -> Result<(), DbError> {
    let query = sqlx::query(BEAT).bind(owner).bind(name).bind(ready).bind(FORGET_AFTER.as_secs_f64());
    db::bounded("a heartbeat", LIMIT, query.execute(conn)).await?;
    Ok(())
}

const LEAVE: &str = "delete from oncebox.outbox_relay where owner = $1";

/// Says that a relay takes no lanes any more: the others share without it.
pub async fn leave(conn: &mut PgConnection, owner: Uuid) -> Result<(), DbError> {
    db::bounded("a farewell", LIMIT, sqlx::query(LEAVE).bind(owner).execute(conn)).await?;
    Ok(())
}

/// A lane as its lease shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seat {
    /// Which lane.
    pub lane: i16,
    /// Who took it and has not given it back.
    pub owner: Option<Uuid>,
    /// The lease has not run out.
    pub held: bool,
}

/// A relay that lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveRelay {
    /// Named in its leases; older ones sort first.
    pub owner: Uuid,
    /// It reaches the broker.
    pub ready: bool,
}

const LOOK: &str = "
    select l.lane, l.owner, l.expires_at > clock_timestamp() from oncebox.outbox_lease as l
    union all
    select null::smallint, r.owner, r.ready from oncebox.outbox_relay as r
    where r.seen_at > clock_timestamp() - make_interval(secs => $1)
    order by 1, 2";

/// Every lane, and every relay that lives, both in order.
pub async fn look(conn: &mut PgConnection) -> Result<(Vec<Seat>, Vec<LiveRelay>), DbError> {
    let query = sqlx::query(LOOK).bind(LIVE_FOR.as_secs_f64()).fetch_all(conn);
    let (mut seats, mut relays) = (Vec::new(), Vec::new());
    for row in db::bounded("the lanes and relays", LIMIT, query).await? {
        match row.try_get(0)? {
            Some(lane) => seats.push(Seat { lane, owner: row.try_get(1)?, held: row.try_get(2)? }),
            None => relays.push(LiveRelay { owner: row.try_get(1)?, ready: row.try_get(2)? }),
        }
    }
    Ok((seats, relays))
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[BEAT, LEAVE, LOOK];
