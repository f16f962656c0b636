//! Who publishes a lane: an owner, an epoch that every write names, and an end by the database's clock.

use super::journal::LogPlace;
use crate::db::{self, DbError};
use sqlx::{PgConnection, Row};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a lease is good without renewal. A relay that died is replaced after this and one look of the standby.
pub const TERM: Duration = Duration::from_secs(5);
/// How often it is renewed: three tries fit into a term.
pub const RENEW_EVERY: Duration = Duration::from_millis(1_500);
/// Longest wait for one of these statements: shorter than a term, so that a stuck renewal is noticed in time.
const LIMIT: Duration = Duration::from_millis(3_500);

/// A lane held by this process.
#[derive(Debug, Clone, Copy)]
pub struct Lease {
    /// Which lane.
    pub lane: i16,
    /// Named in every write; a higher one means another relay has taken over.
    pub epoch: i64,
    /// Do not publish after this moment of this process's clock. It is counted from before the statement that set
    /// the end was sent, so it never lies later than the end in the database.
    pub valid_until: Instant,
}

const TAKE: &str = "
    update oncebox.outbox_lease
    set epoch = epoch + 1, owner = $2, owner_name = $3, acquired_at = clock_timestamp(),
        expires_at = clock_timestamp() + make_interval(secs => $4)
    where lane = $1 and (expires_at <= clock_timestamp() or owner = $2)
    returning epoch";

/// Takes the lane if nobody else holds it. The commit is a fence: rows of plans read afterwards are durable.
pub async fn take(conn: &mut PgConnection, lane: i16, owner: Uuid, owner_name: &str) -> Result<Option<Lease>, DbError> {
    let asked = Instant::now();
    let query = sqlx::query(TAKE).bind(lane).bind(owner).bind(owner_name).bind(TERM.as_secs_f64());
    let row = db::fenced(db::bounded("a lease", LIMIT, query.fetch_optional(conn))).await?;
    row.map(|row| Ok(Lease { lane, epoch: row.try_get(0)?, valid_until: asked + TERM })).transpose()
}

const RENEW: &str = "
    update oncebox.outbox_lease
    set expires_at = clock_timestamp() + make_interval(secs => $3), settled_n = $4, settled_seq = $5
    where lane = $1 and epoch = $2";

/// Prolongs the lease by a term from now, and saves how far the lane is settled. Also a fence.
pub async fn renew(conn: &mut PgConnection, lease: Lease, settled: LogPlace) -> Result<Lease, DbError> {
    let asked = Instant::now();
    let query = sqlx::query(RENEW)
        .bind(lease.lane)
        .bind(lease.epoch)
        .bind(TERM.as_secs_f64())
        .bind(settled.n)
        .bind(settled.seq);
    let done = db::fenced(db::bounded("a lease renewal", LIMIT, query.execute(conn))).await?;
    if done.rows_affected() == 0 {
        return Err(DbError::LeaseLost { lane: lease.lane });
    }
    Ok(Lease { valid_until: asked + TERM, ..lease })
}

const RELEASE: &str = "
    update oncebox.outbox_lease
    set owner = null, expires_at = '-infinity', settled_n = $3, settled_seq = $4
    where lane = $1 and epoch = $2";

/// Gives the lane back with its last settled place; the next relay may take it at once.
pub async fn release(conn: &mut PgConnection, lease: Lease, settled: LogPlace) -> Result<(), DbError> {
    let query = sqlx::query(RELEASE).bind(lease.lane).bind(lease.epoch).bind(settled.n).bind(settled.seq);
    db::bounded("a lease release", LIMIT, query.execute(conn)).await?;
    Ok(())
}

const LANES: &str = "select lane from oncebox.outbox_lease order by lane";

/// Every lane there is.
pub async fn lanes(conn: &mut PgConnection) -> Result<Vec<i16>, DbError> {
    db::bounded("the lanes", LIMIT, sqlx::query_scalar(LANES).fetch_all(conn)).await
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[TAKE, RENEW, RELEASE, LANES];
