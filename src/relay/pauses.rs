//! What a lane must not send for now, as read about once a second.
//!
//! A paused lane sends nothing and keeps its lease. Messages of a paused topic leave the log's order when their turn
//! comes, and whenever the pauses change, those held that no pause matches any more are set due.

use crate::db::DbError;
use crate::outbox::lease::Lease;
use crate::outbox::pause::{self, Pause};
use crate::topic;
use sqlx::PgConnection;
use std::time::{Duration, Instant};

/// How often pauses are read: what a pause or its end may take to be heeded.
const READ_EVERY: Duration = Duration::from_secs(1);

/// The pauses in force for one lane.
pub(crate) struct Pauses {
    in_force: Vec<Pause>,
    read_at: Instant,
}

impl Pauses {
    /// Reads them before anything of the lane is sent, and sets due what an earlier relay held for a pause that has
    /// ended since.
    pub async fn load(conn: &mut PgConnection, lease: Lease) -> Result<Self, DbError> {
        let mut pauses = Self { in_force: Vec::new(), read_at: Instant::now() };
        pauses.read(conn, lease).await?;
        pause::release_resumed(conn, lease.lane, lease.epoch).await?;
        Ok(pauses)
    }

    /// When they should be read again.
    pub fn next_read(&self) -> Instant {
        self.read_at + READ_EVERY
    }

    /// Reads them again. True when held messages became due.
    ///
    /// Ids are compared, so that a pause that was lifted and made again in between is a change too: what was held
    /// for the first one must be looked at again.
    pub async fn refresh(&mut self, conn: &mut PgConnection, lease: Lease) -> Result<bool, DbError> {
        if !self.read(conn, lease).await? {
            return Ok(false);
        }
        Ok(pause::release_resumed(conn, lease.lane, lease.epoch).await? > 0)
    }

    async fn read(&mut self, conn: &mut PgConnection, lease: Lease) -> Result<bool, DbError> {
        let found = pause::in_force(conn, lease.lane).await?;
        self.read_at = Instant::now();
        if found == self.in_force {
            return Ok(false);
        }
        let was_paused = self.lane_paused();
        self.in_force = found;
        let topics: Vec<&str> = self.patterns().collect();
        let lane_paused = self.lane_paused();
        tracing::info!(lane = lease.lane, lane_paused, was_paused, ?topics, "the pauses have changed");
        Ok(true)
    }

    fn patterns(&self) -> impl Iterator<Item = &str> {
        self.in_force.iter().filter_map(|pause| pause.topic_pattern.as_deref())
    }

    /// Nothing of the lane may be sent.
    pub fn lane_paused(&self) -> bool {
        self.in_force.iter().any(|pause| pause.topic_pattern.is_none())
    }

    /// Messages of this topic may not be sent.
    pub fn topic_paused(&self, topic: &str) -> bool {
        self.patterns().any(|pattern| topic::matches(pattern, topic))
    }
}
