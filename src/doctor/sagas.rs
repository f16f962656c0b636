//! Sagas: is an orchestrator at work, who needs an operator, and does the barrier remember for long enough.

use super::{Finding, Severity};
use crate::db::{self, DbError};
use crate::saga::definition::{Definition, Retry};
use crate::status::sagas::{self, Sagas};
use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use std::time::Duration;

/// Longest wait for one question.
const LIMIT: Duration = Duration::from_secs(10);
/// Definitions that are looked at, the newest.
const DEFINITIONS: i64 = 1_000;

const FACTS: &str = "
    select (extract(epoch from g.barrier_retention) * 1000)::bigint,
        (select count(*) from (select from oncebox.inbox_held as h
            where h.consumer = 'oncebox.saga' and h.state = 'parked' limit 100000) as h),
        coalesce((select (extract(epoch from clock_timestamp() - min(o.start_at)) * 1000)::bigint
            from unnest(array['running', 'compensating', 'stuck']) as t (status)
            cross join lateral (
                select s.start_at from oncebox.saga as s where s.status = t.status order by s.id limit 1) as o), 0)
    from oncebox.setting as g";

const DOCUMENTS: &str = "select d.document from oncebox.saga_definition as d order by d.created_at desc limit $1";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[FACTS, DOCUMENTS];

/// What was asked.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// As `oncebox status` shows them.
    pub sagas: Sagas,
    /// The setting, in milliseconds.
    pub barrier_retention_ms: i64,
    /// Replies that the orchestrator's inbox could not apply.
    pub parked_replies: i64,
    /// Age of the oldest saga that is under way, in milliseconds.
    pub oldest_ms: i64,
    /// The definition that may take the longest, and how long.
    pub longest: Option<(String, i64)>,
}

/// Looks at the sagas of one database.
pub async fn check(conn: &mut PgConnection, name: &str) -> Vec<Finding> {
    match gather(conn).await {
        Ok(facts) => judge(name, &facts),
        Err(DbError::Sqlx(error)) if db::sqlstate(&error).as_deref() == Some("42501") => {
            vec![
                Finding::note(format!("{name}: sagas"), "not looked at: the role may not")
                    .or("grant the role oncebox_admin"),
            ]
        }
        Err(error) => {
            let mend = "see the server's log";
            vec![Finding::bad(Severity::Warning, format!("{name}: sagas"), error.to_string(), mend)]
        }
    }
}

async fn gather(conn: &mut PgConnection) -> Result<Facts, DbError> {
    let sagas = sagas::look(conn).await?;
    let query = sqlx::query_as(FACTS).fetch_one(&mut *conn);
    let (barrier_retention_ms, parked_replies, oldest_ms) = db::bounded("the sagas", LIMIT, query).await?;
    let query = sqlx::query_scalar(DOCUMENTS).bind(DEFINITIONS).fetch_all(conn);
    let documents: Vec<Json<Value>> = db::bounded("the definitions", LIMIT, query).await?;
    let definitions = documents.iter().filter_map(|Json(document)| Definition::parse(document).ok());
    let longest = definitions
        .map(|definition| (format!("{} version {}", definition.name, definition.version), longest_ms(&definition)))
        .max_by_key(|(_, ms)| *ms);
    Ok(Facts { sagas, barrier_retention_ms, parked_replies, oldest_ms, longest })
}

/// How long a saga may take from its start to the last answer of its last undo: without a deadline, as if every step
/// needed all its attempts.
pub fn longest_ms(definition: &Definition) -> i64 {
    let attempts = |retry: &Retry, timeout_ms: i64| {
        let mut delay_ms = retry.initial_ms as f64;
        let mut span_ms = 0.0;
        for _ in 0..retry.max.clamp(0, 10_000) {
            span_ms += timeout_ms as f64 + delay_ms.min(retry.cap_ms as f64);
            delay_ms *= retry.factor;
        }
        span_ms as i64
    };
    let forward = definition.deadline_ms.unwrap_or_else(|| {
        let waits = |step: &crate::saga::definition::StepDefinition| match &step.work {
            crate::saga::definition::Work::Wait { timeout_ms, .. } => timeout_ms.unwrap_or(0),
            crate::saga::definition::Work::Command(_) => attempts(&step.retry, step.timeout_ms),
        };
        definition.steps.iter().map(waits).fold(0, i64::saturating_add)
    });
    let undo = definition.steps.iter().filter(|step| step.undo.is_some());
    undo.map(|step| attempts(&step.undo_retry, step.timeout_ms)).fold(forward, i64::saturating_add)
}

/// What the facts mean.
pub fn judge(name: &str, facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let check = |what: &str| format!("{name}: {what}");
    let sagas = &facts.sagas;
    findings.push(match sagas.is_neglected() {
        true => Finding::bad(
            Severity::Unsafe,
            check("saga orchestrator"),
            format!(
                "{} sagas are overdue, the first for {:.0} s, and the first signal waits for {:.0} s: none is at work, or \
                 it does not keep up",
                sagas.overdue.count, sagas.overdue_s, sagas.signal_wait_s
            ),
            "oncebox run, in one place at least; its log says what holds it up",
        ),
        false => Finding::ok(check("saga orchestrator"), "no saga is overdue"),
    });
    let stuck = sagas.count("stuck").count;
    findings.push(match stuck {
        0 => Finding::ok(check("stuck sagas"), "none"),
        _ => {
            let oldest_h = sagas.oldest_stuck_s.unwrap_or(0.0) / 3_600.0;
            let found = format!("{stuck} need an operator, the oldest for {oldest_h:.1} h");
            Finding::bad(Severity::Warning, check("stuck sagas"), found, "oncebox saga list --status stuck")
        }
    });
    if facts.parked_replies > 0 {
        let found = format!("{} are parked: their sagas wait for them in vain", facts.parked_replies);
        let mend = "oncebox parked list --consumer oncebox.saga, then retry or discard";
        findings.push(Finding::bad(Severity::Warning, check("saga replies"), found, mend));
    }
    findings.push(barrier(check("barrier_retention"), facts));
    findings
}

/// An undo that finds no row of its action takes it for one that never ran: rows must outlive their sagas.
fn barrier(check: String, facts: &Facts) -> Finding {
    let days = |ms: i64| ms as f64 / 86_400_000.0;
    let kept = facts.barrier_retention_ms;
    let mend = "update oncebox.setting set barrier_retention = …, at the sagas' database and at the participants'";
    if facts.oldest_ms > kept {
        let found = format!(
            "{:.1} days, and a saga is under way for {:.1}: its undos may be taken for those of actions that never ran",
            days(kept),
            days(facts.oldest_ms)
        );
        return Finding::bad(Severity::Unsafe, check, found, mend);
    }
    match &facts.longest {
        Some((definition, ms)) if *ms > kept => {
            let found = format!("{:.1} days, and a saga of {definition} may take {:.1}", days(kept), days(*ms));
            Finding::bad(Severity::Warning, check, found, mend)
        }
        _ if facts.oldest_ms > kept / 2 => {
            let found = format!("{:.1} days, and a saga is under way for {:.1}", days(kept), days(facts.oldest_ms));
            Finding::bad(Severity::Warning, check, found, "end that saga, or keep rows for longer")
        }
        _ => Finding::ok(check, format!("{:.1} days", days(kept))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Count;

    /// Goal: each thing that is wrong with sagas is told as bad as it is, and nothing where nothing is.
    #[test]
    fn sagas_are_judged() {
        let well = || Facts { barrier_retention_ms: 1_000_000, ..Facts::default() };
        let worst = |facts: &Facts| judge("d", facts).iter().map(|finding| finding.severity).min();
        assert_eq!(worst(&well()), Some(Severity::Ok));
        let sagas = |sagas| Facts { sagas, ..well() };
        let stuck =
            Sagas { by_status: [("stuck".to_owned(), Count { count: 2, at_least: false })].into(), ..Sagas::default() };
        for (facts, expected) in [
            (sagas(Sagas { overdue_s: 11.0, ..Sagas::default() }), Severity::Unsafe),
            (sagas(Sagas { signal_wait_s: 11.0, ..Sagas::default() }), Severity::Unsafe),
            (sagas(stuck), Severity::Warning),
            (Facts { parked_replies: 1, ..well() }, Severity::Warning),
            (Facts { oldest_ms: 1_000_001, ..well() }, Severity::Unsafe),
            (Facts { oldest_ms: 600_000, ..well() }, Severity::Warning),
            (Facts { oldest_ms: 400_000, ..well() }, Severity::Ok),
            (Facts { longest: Some(("order version 1".to_owned(), 1_000_001)), ..well() }, Severity::Warning),
            (Facts { longest: Some(("order version 1".to_owned(), 1_000_000)), ..well() }, Severity::Ok),
        ] {
            assert_eq!(worst(&facts), Some(expected), "{facts:?}");
        }
    }
}
