//! The broker by plain AMQP: what any client may see of it.

use super::management::{self, ManagementCheck};
use super::queue::{CONSUMER_TIMEOUT, QueueUse, judge_timeout};
use super::{Finding, Severity};
use crate::broker::rabbitmq::{Found, Inspection, RabbitMq};
use crate::broker::{BrokerError, QueueSpec};
use crate::http::Endpoint;

/// The oldest broker the product is tested on.
const OLDEST_VERSION: (u32, u32) = (3, 10);

/// The broker, and what the config says of it.
#[derive(Debug, Clone)]
pub struct BrokerCheck {
    /// The broker.
    pub broker: RabbitMq,
    /// The management API, if there is one.
    pub management: Option<Endpoint>,
    /// The exchange.
    pub exchange: String,
    /// The consumers' queues.
    pub queues: Vec<QueueUse>,
}

/// Looks at the broker.
pub async fn check(what: &BrokerCheck) -> Vec<Finding> {
    let specs: Vec<QueueSpec> = what.queues.iter().map(|queue| queue.spec.clone()).collect();
    let mut findings = match what.broker.inspect(&what.exchange, &specs).await {
        Ok(inspection) => judge(what, &inspection),
        Err(error) => {
            let mend = match error {
                BrokerError::AccessRefused { .. } => "mend user, password, vhost or permissions",
                _ => "start it, or mend the URL or the network between",
            };
            vec![Finding::bad(Severity::Unsafe, "broker: connection", error.to_string(), mend)]
        }
    };
    findings.extend(match &what.management {
        Some(endpoint) => {
            let queues = what.queues.clone();
            let vhost = what.broker.vhost().to_owned();
            management::check(&ManagementCheck {
                endpoint: endpoint.clone(),
                vhost,
                exchange: what.exchange.clone(),
                queues,
            })
            .await
        }
        None => vec![not_checked()],
    });
    findings
}

fn not_checked() -> Finding {
    let found = "not checked: alarms before they block, bindings, and of exchange and queues what policies set: \
                 delivery-limit, TTL, length and overflow, dead-lettering, alternate exchange, consumer timeout";
    Finding::note("broker: management", found)
        .or("give --management-url, ONCEBOX_MANAGEMENT_URL or management_url in the config file")
}

fn judge(what: &BrokerCheck, inspection: &Inspection) -> Vec<Finding> {
    let mut findings = vec![version(inspection.version)];
    findings.push(match inspection.is_blocked {
        true => Finding::bad(
            Severity::Unsafe,
            "broker: alarms",
            "it blocks whoever publishes: a memory or disk alarm is in force, and the outbox grows meanwhile",
            "rabbitmq-diagnostics alarms; free memory or disk, or raise the watermark",
        ),
        false => Finding::ok("broker: alarms", "it takes publishes"),
    });
    findings.push(existing(
        format!("exchange {}", what.exchange),
        &inspection.exchange,
        false,
        "the relay or a consumer",
    ));
    let knows_more = what.management.is_some();
    for (queue, found) in what.queues.iter().zip(&inspection.queues) {
        let name = &queue.spec.name;
        findings.push(existing(format!("queue {name}"), found, knows_more, "the consumer"));
        if *found != Found::Missing && !knows_more {
            findings.push(judge_timeout(queue, CONSUMER_TIMEOUT));
        }
    }
    findings
}

fn version(version: (u32, u32)) -> Finding {
    let (check, found) = ("broker: version", format!("RabbitMQ {}.{}", version.0, version.1));
    match version >= OLDEST_VERSION {
        true => Finding::ok(check, found),
        false => {
            let found = format!("{found}: its quorum queues and dead-lettering lack what is promised from 3.10 on");
            Finding::bad(Severity::Unsafe, check, found, "upgrade the broker")
        }
    }
}

/// By AMQP alone nothing tells a harmless difference from one that loses messages, so it counts as one that does.
fn existing(check: String, found: &Found, knows_more: bool, maker: &str) -> Finding {
    match found {
        Found::AsDeclared => Finding::ok(check, "is as oncebox declares it"),
        Found::Missing => Finding::note(check, format!("does not exist yet: {maker} declares it at its start")),
        Found::Different(words) => {
            let severity = if knows_more { Severity::Warning } else { Severity::Unsafe };
            let found = format!("{maker} does not start on it: it {words}");
            Finding::bad(severity, check, found, "delete it when it is empty, and let oncebox declare it")
        }
        Found::Refused(words) => Finding::bad(
            Severity::Warning,
            check,
            format!("may not be looked at: {words}"),
            "grant the user configure, write and read on it",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what AMQP tells is judged: a difference of unknown kind counts as unsafe, a missing queue does not.
    #[test]
    fn amqp_findings_are_judged() {
        let judged = |found: Found, knows_more| existing("q".to_owned(), &found, knows_more, "x").severity;
        assert_eq!(judged(Found::AsDeclared, false), Severity::Ok);
        assert_eq!(judged(Found::Missing, false), Severity::Note);
        assert_eq!(judged(Found::Different("words".to_owned()), false), Severity::Unsafe);
        assert_eq!(judged(Found::Different("words".to_owned()), true), Severity::Warning);
        assert_eq!(judged(Found::Refused("words".to_owned()), false), Severity::Warning);
        assert_eq!(version((3, 9)).severity, Severity::Unsafe);
        assert_eq!(version((3, 10)).severity, Severity::Ok);
        assert_eq!(version((4, 0)).severity, Severity::Ok);
    }
}
