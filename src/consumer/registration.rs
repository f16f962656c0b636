//! Tells the outbox from which offsets on this consumer must apply everything: what the audit expects of it.

use super::{ConsumerOptions, RECONNECT_BACKOFF};
use crate::db::{self, DbError};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Longest wait for the outbox.
const LIMIT: Duration = Duration::from_secs(10);

const REGISTER: &str = "select oncebox.consumer_register($1, $2)";

/// Every statement of this file, for the test that prepares them all.
pub(super) const STATEMENTS: &[&str] = &[REGISTER];

/// Registers the consumer once its queue is bound, and then waits for the end: a part that ends early would end the
/// consumer.
pub(super) async fn run(options: Arc<ConsumerOptions>, bound: CancellationToken, stop: CancellationToken) {
    tokio::select! {
        () = bound.cancelled() => if let Some(outbox_url) = &options.outbox_url {
            register(outbox_url, &options, &stop).await;
        },
        () = stop.cancelled() => return,
    }
    stop.cancelled().await;
}

/// Registers the bindings, which the broker has by now. An outbox that cannot be reached is tried again; one that
/// refuses is said, since only the audit suffers.
async fn register(outbox_url: &str, options: &ConsumerOptions, stop: &CancellationToken) {
    let mut failures = 0;
    while !stop.is_cancelled() {
        let error = match attempt(outbox_url, options).await {
            Ok(()) => return,
            Err(error) => error,
        };
        let consumer = &options.name;
        if !error.is_transient() {
            tracing::warn!(consumer, %error, "not registered: the audit does not know where this consumer begins");
            return;
        }
        failures += 1;
        let delay = RECONNECT_BACKOFF.jittered(failures);
        tracing::warn!(consumer, %error, ?delay, "not registered yet");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stop.cancelled() => {}
        }
    }
}

async fn attempt(outbox_url: &str, options: &ConsumerOptions) -> Result<(), DbError> {
    let session = db::SessionOptions {
        application_name: "oncebox consume",
        statement_timeout: LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: true,
    };
    let mut conn = db::connect(outbox_url, session).await?;
    let query = sqlx::query(REGISTER).bind(&options.name).bind(&options.bindings).execute(&mut conn);
    db::bounded("registering a consumer", LIMIT, query).await?;
    db::close(conn).await;
    Ok(())
}
