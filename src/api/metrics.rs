//! `/metrics`: a look at the database in Prometheus' text format.
//!
//! The names are a contract with dashboards and alerts. The figures are the database's, not this process's: every
//! process that serves them serves the same.

use super::ApiState;
use super::problem::{Problem, ProblemBody};
use super::request::NoParams;
use crate::db::{self, DbError};
use crate::status::{self, Held, Status};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use std::fmt::Write;
use std::time::Duration;

/// Longest wait for all of it: scrapers give up after 10 s.
const LIMIT: Duration = Duration::from_secs(9);
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A metric: name, type, and what it says.
type Metric = (&'static str, &'static str, &'static str);

const LAG_MESSAGES: Metric = (
    "oncebox_lag_messages",
    "gauge",
    "Committed messages of a lane that are neither confirmed nor held; counted up to 100000.",
);
const LAG_SECONDS: Metric = ("oncebox_lag_seconds", "gauge", "Age of the oldest of them; 0 when there is none.");
const PUBLISHED: Metric =
    ("oncebox_published_total", "counter", "Messages of a lane that got their offset, up to the newest window.");
const ACCEPTED: Metric = ("oncebox_accepted_total", "counter", "Inserts into the inbox, those rolled back included.");
const LANE_HELD: Metric = ("oncebox_lane_held", "gauge", "1 while a relay holds the lane, 0 while none does.");
const LANE_EPOCH: Metric = ("oncebox_lane_epoch", "counter", "How often the lane was taken.");
const WAITING: Metric = (
    "oncebox_waiting",
    "gauge",
    "Messages that are tried again by themselves: of a lane (side outbox) or of a consumer (side inbox).",
);
const WAITING_SECONDS: Metric =
    ("oncebox_waiting_seconds", "gauge", "For how long the first of those has been held; 0 when there is none.");
const PARKED: Metric = (
    "oncebox_parked",
    "gauge",
    "Messages that need an operator, by side (outbox, inbox), reason, and consumer (empty for the outbox).",
);
const SOURCES: Metric =
    ("oncebox_sources", "gauge", "Sources this outbox has had; each after the first came with a restore or failover.");
const SOURCE_MOVING: Metric = (
    "oncebox_source_moving",
    "gauge",
    "1 while the database is not the one its offsets were counted in and lanes have yet to move to a new source.",
);
const RELAYS: Metric = ("oncebox_relays", "gauge", "Relays that live, by whether they reach the broker.");
const PAUSES: Metric = ("oncebox_pauses", "gauge", "Pauses in force.");
const SCHEDULED: Metric = ("oncebox_scheduled", "gauge", "Messages not to be sent yet; counted up to 100000.");
const RETENTION_SECONDS: Metric = ("oncebox_retention_seconds", "gauge", "The setting retention.");
const OLDEST_SECONDS: Metric =
    ("oncebox_log_oldest_seconds", "gauge", "Age of the oldest message in the log; 0 when it is empty.");
const SLOT_BYTES: Metric = ("oncebox_log_slot_bytes", "gauge", "Size of a slot of the log, with its indexes.");
const PLANS: Metric = ("oncebox_journal_plans", "gauge", "Plans in the journal, of all lanes.");
const OLDEST_TRANSACTION: Metric = (
    "oncebox_oldest_transaction_seconds",
    "gauge",
    "How long the oldest transaction of the cluster has lasted, prepared ones included; 0 when there is none.",
);
const SAGAS: Metric = (
    "oncebox_sagas",
    "gauge",
    "Sagas by definition (empty without one, * for the smallest of more than 50) and status; counted up to 100000 a status.",
);
const SAGAS_PAUSED: Metric = ("oncebox_sagas_paused", "gauge", "Sagas that an operator holds.");
const SAGAS_OVERDUE: Metric = (
    "oncebox_sagas_overdue",
    "gauge",
    "Sagas whose timer has been due for more than 10 s: no orchestrator looks at them.",
);
const SAGA_OVERDUE_SECONDS: Metric =
    ("oncebox_saga_overdue_seconds", "gauge", "For how long the first timer of a saga has been due; 0 when none is.");
const SAGA_SIGNAL_SECONDS: Metric = (
    "oncebox_saga_signal_seconds",
    "gauge",
    "For how long the first signal has waited for an orchestrator; 0 when none does.",
);
const SAGA_STUCK: Metric = ("oncebox_saga_stuck", "gauge", "Sagas that need an operator; counted up to 100000.");
const SAGA_STUCK_SECONDS: Metric = (
    "oncebox_saga_stuck_seconds",
    "gauge",
    "How long the oldest of them has been stuck, of the first 1000; 0 when none is.",
);

/// Lag, parked messages, lanes, consumers and the log, for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "metrics",
    responses(
        (status = 200, description = "Prometheus' text format.", body = String, content_type = "text/plain", example = "# TYPE oncebox_pauses gauge\noncebox_pauses 0\n"),
        (status = 503, description = "The database does not answer; `detail` says why.", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(super) async fn metrics(State(state): State<ApiState>, _: NoParams) -> Result<Response, Problem> {
    let look = async {
        let _place = state.scrapes.acquire().await;
        let mut conn = status::connect(&state.database_url, "oncebox serve").await?;
        let status = status::look(&mut conn).await?;
        db::close(conn).await;
        Ok::<_, DbError>(status)
    };
    let detail = match tokio::time::timeout(LIMIT, look).await {
        Ok(Ok(status)) => return Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], render(&status)).into_response()),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the database did not answer within {LIMIT:?}"),
    };
    Err(Problem::unavailable(detail))
}

/// The page, metric by metric.
#[derive(Default)]
struct Page(String);

impl Page {
    fn metric(&mut self, (name, kind, help): Metric, samples: impl IntoIterator<Item = (String, f64)>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }
}

fn labels(pairs: &[(&str, &str)]) -> String {
    let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    format!("{{{}}}", pairs.join(","))
}

fn one(value: f64) -> [(String, f64); 1] {
    [(String::new(), value)]
}

fn render(status: &Status) -> String {
    let mut page = Page::default();
    let lanes = |value: fn(&status::Lane) -> f64| {
        status.lanes.iter().map(move |lane| (labels(&[("lane", &lane.lane.to_string())]), value(lane)))
    };
    page.metric(LAG_MESSAGES, lanes(|lane| lane.lag.count as f64));
    page.metric(LAG_SECONDS, lanes(|lane| lane.lag_s));
    page.metric(PUBLISHED, lanes(|lane| lane.published_total as f64));
    page.metric(ACCEPTED, one(status.accepted_total as f64));
    page.metric(LANE_HELD, lanes(|lane| f64::from(u8::from(lane.owner.is_some()))));
    page.metric(LANE_EPOCH, lanes(|lane| lane.epoch as f64));

    let of_lanes = status.lanes.iter().map(|lane| (lane.lane.to_string(), "outbox", &lane.held));
    let of_consumers = status.consumers.iter().map(|consumer| (consumer.consumer.clone(), "inbox", &consumer.held));
    let held: Vec<(String, &str, &Held)> = of_lanes.chain(of_consumers).collect();
    let whose = |whose: &str, side: &str| match side {
        "outbox" => labels(&[("side", side), ("lane", whose), ("consumer", "")]),
        _ => labels(&[("side", side), ("lane", ""), ("consumer", whose)]),
    };
    page.metric(WAITING, held.iter().map(|(name, side, held)| (whose(name, side), held.waiting as f64)));
    let seconds = held.iter().map(|(name, side, held)| (whose(name, side), held.oldest_waiting_s.unwrap_or(0.0)));
    page.metric(WAITING_SECONDS, seconds);
    // Lanes have no label here: their parked messages are one operator's list.
    let mut parked: std::collections::BTreeMap<(&str, &str, &str), i64> = std::collections::BTreeMap::new();
    for (name, side, held) in &held {
        let consumer = if *side == "outbox" { "" } else { name.as_str() };
        for (reason, count) in &held.parked {
            *parked.entry((side, reason, consumer)).or_default() += count;
        }
    }
    page.metric(
        PARKED,
        parked.into_iter().map(|((side, reason, consumer), count)| {
            (labels(&[("side", side), ("reason", reason), ("consumer", consumer)]), count as f64)
        }),
    );
    page.metric(SOURCES, one(status.source.count as f64));
    let moving = !status.source.is_here || status.source.lanes_behind > 0;
    page.metric(SOURCE_MOVING, one(f64::from(u8::from(moving))));
    let relays = ["true", "false"].map(|ready| {
        let count = status.relays.iter().filter(|relay| relay.ready.to_string() == ready).count();
        (labels(&[("ready", ready)]), count as f64)
    });
    page.metric(RELAYS, relays);
    page.metric(PAUSES, one(status.pauses.len() as f64));
    page.metric(SCHEDULED, one(status.scheduled.messages.count as f64));
    page.metric(RETENTION_SECONDS, one(status.ring.retention_s));
    page.metric(OLDEST_SECONDS, one(status.ring.oldest_s.unwrap_or(0.0)));
    let slots = status.ring.slots.iter();
    page.metric(SLOT_BYTES, slots.map(|slot| (labels(&[("slot", &slot.slot.to_string())]), slot.bytes as f64)));
    page.metric(PLANS, one(status.ring.plans as f64));
    let sagas = &status.sagas;
    let by_definition = sagas.by_definition.iter().flat_map(|(definition, by_status)| {
        by_status
            .iter()
            .map(move |(status, count)| (labels(&[("definition", definition), ("status", status)]), *count as f64))
    });
    page.metric(SAGAS, by_definition);
    page.metric(SAGAS_PAUSED, one(sagas.paused.count as f64));
    page.metric(SAGAS_OVERDUE, one(sagas.overdue.count as f64));
    page.metric(SAGA_OVERDUE_SECONDS, one(sagas.overdue_s));
    page.metric(SAGA_SIGNAL_SECONDS, one(sagas.signal_wait_s));
    page.metric(SAGA_STUCK, one(sagas.count("stuck").count as f64));
    page.metric(SAGA_STUCK_SECONDS, one(sagas.oldest_stuck_s.unwrap_or(0.0)));
    let oldest = status.oldest_transaction.as_ref().and_then(|oldest| oldest.age_s);
    page.metric(OLDEST_TRANSACTION, one(oldest.unwrap_or(0.0)));
    page.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: any consumer's name is a label that a scraper reads back.
    #[test]
    fn labels_are_escaped() {
        assert_eq!(labels(&[("a", "x\"y\\z\n"), ("b", "")]), r#"{a="x\"y\\z\n",b=""}"#);
    }
}
