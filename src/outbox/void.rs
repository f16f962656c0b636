//! Offsets whose messages never reached the broker, waiting to be announced.
//!
//! A trigger notes them in the transaction that parks or discards a message; a relay sends the notices and forgets
//! each one when the broker has confirmed it. One sent twice changes nothing: consumers pass an offset once.

use crate::db::{self, DbError};
use crate::message::{Envelope, MessageId, Position, Void};
use sqlx::{PgConnection, Row};
use std::time::Duration;

/// Longest wait for one of these statements.
const LIMIT: Duration = Duration::from_secs(20);

const UNSENT: &str = "
    select v.source, v.stream, v.\"offset\", v.topic, v.message_id, v.reason
    from oncebox.outbox_void as v
    where v.lane = $1
    order by v.source, v.stream, v.\"offset\" limit $2";

/// The void notices of a lane that are still to be sent, those of one stream in order.
pub async fn unsent(conn: &mut PgConnection, lane: i16, limit: i64) -> Result<Vec<Void>, DbError> {
    let query = sqlx::query(UNSENT).bind(lane).bind(limit);
    let rows = db::bounded("void notices", LIMIT, query.fetch_all(conn)).await?;
    rows.iter()
        .map(|row| {
            Ok(Void {
                position: Position { source: row.try_get(0)?, stream: row.try_get(1)?, offset: row.try_get(2)? },
                topic: row.try_get(3)?,
                message_id: MessageId(row.try_get(4)?),
                reason: row.try_get(5)?,
            })
        })
        .collect()
}

const SENT: &str = "
    delete from oncebox.outbox_void as v
    using (select lane from oncebox.outbox_lease where lane = $1 and epoch = $2 for update) as lease,
        unnest($3::uuid[], $4::text[], $5::bigint[]) as s (source, stream, \"offset\")
    where v.lane = lease.lane and v.source = s.source and v.stream = s.stream and v.\"offset\" = s.\"offset\"";

/// Forgets void notices that the broker has confirmed; nothing if another relay has the lane.
pub async fn sent(conn: &mut PgConnection, lane: i16, epoch: i64, voids: &[Void]) -> Result<(), DbError> {
    let query = sqlx::query(SENT)
        .bind(lane)
        .bind(epoch)
        .bind(voids.iter().map(|void| void.position.source).collect::<Vec<_>>())
        .bind(voids.iter().map(|void| void.position.stream.as_str()).collect::<Vec<_>>())
        .bind(voids.iter().map(|void| void.position.offset).collect::<Vec<_>>());
    db::bounded("forgetting void notices", LIMIT, query.execute(conn)).await?;
    Ok(())
}

const ANNOUNCE: &str = "select oncebox.outbox_announce($1, $2, $3, $4, $5, $6)";

/// Has the relay announce a message that a replay passes over for good, if it does: discarded, parked as expired or
/// refused, or `is_expired` since it was sent.
pub async fn announce(conn: &mut PgConnection, envelope: &Envelope, is_expired: bool) -> Result<(), DbError> {
    let at = &envelope.position;
    let query = sqlx::query(ANNOUNCE).bind(at.source).bind(&at.stream).bind(at.offset).bind(&envelope.message.topic);
    let query = query.bind(envelope.message.id.0).bind(is_expired);
    db::bounded("a void notice", LIMIT, query.execute(conn)).await?;
    Ok(())
}

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[UNSENT, SENT, ANNOUNCE];
