//! The broker by its management API: alarms, policies, and every argument of exchange and queues.

use super::queue::{CONSUMER_TIMEOUT, QueueUse, judge_timeout};
use super::{Finding, Severity};
use crate::http::{Client, Endpoint};
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use std::time::Duration;

/// Longest wait for one answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest answer: a busy broker's list of policies or bindings.
const READ_BYTES: usize = 8 * 1024 * 1024;
/// From this version on a quorum queue drops a message after 20 deliveries unless told not to.
const DELIVERY_LIMIT_SINCE_MAJOR: u32 = 4;
/// A consumer that crashes so often on one message has long been seen to.
const GENEROUS_DELIVERY_LIMIT: i64 = 1_000;

/// What to look at.
#[derive(Debug, Clone)]
pub struct ManagementCheck {
    /// The API.
    pub endpoint: Endpoint,
    /// The vhost of the AMQP URL.
    pub vhost: String,
    /// The exchange.
    pub exchange: String,
    /// The consumers' queues.
    pub queues: Vec<QueueUse>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Overview {
    rabbitmq_version: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Node {
    name: String,
    running: bool,
    mem_alarm: bool,
    disk_free_alarm: bool,
    partitions: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Exchange {
    #[serde(rename = "type")]
    kind: String,
    durable: bool,
    auto_delete: bool,
    internal: bool,
    arguments: Value,
    policy: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Policy {
    definition: Value,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Queue {
    #[serde(rename = "type")]
    kind: String,
    durable: bool,
    auto_delete: bool,
    exclusive: bool,
    arguments: Value,
    /// An empty list instead of an object when no policy applies.
    effective_policy_definition: Value,
    /// Null, empty or missing if there is none.
    leader: Option<String>,
    members: Vec<String>,
    online: Vec<String>,
}

/// An object that may name a field twice, as RabbitMQ does `online` once its statistics differ from what it sees: of two
/// lists the shorter one counts.
struct Fields(Map<String, Value>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Map::new();
        while let Some((name, value)) = map.next_entry::<String, Value>()? {
            let length = |value: &Value| value.as_array().map(Vec::len);
            if fields.get(&name).is_none_or(|known| length(&value) <= length(known)) {
                fields.insert(name, value);
            }
        }
        Ok(Fields(fields))
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Binding {
    destination: String,
    destination_type: String,
    routing_key: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Limits {
    value: Value,
}

/// Looks at the broker.
pub async fn check(what: &ManagementCheck) -> Vec<Finding> {
    let bad = |found: String| {
        let mend =
            "mend the URL, user and password; the user needs the tag monitoring, and rabbitmq_management must run";
        Finding::bad(Severity::Warning, "broker: management", found, mend)
    };
    let api = match Client::new(what.endpoint.clone()) {
        Ok(client) => Api { client, vhost: percent_encoded(&what.vhost) },
        Err(error) => return vec![bad(error.to_string())],
    };
    let major = match api.get::<Overview>("/api/overview").await {
        Ok(Some(overview)) => {
            overview.rabbitmq_version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or_default()
        }
        Ok(None) => return vec![bad("there is no management API at this URL".to_owned())],
        Err(error) => return vec![bad(error)],
    };
    let mut findings = vec![Finding::ok("broker: management", format!("answers at {}", what.endpoint.shown()))];
    let looked = async {
        findings.extend(judge_nodes(&api.list::<Node>("/api/nodes").await?));
        let limits: Vec<Limits> = api.list(&format!("/api/vhost-limits/{}", api.vhost)).await?;
        findings.extend(limits.iter().filter_map(|limits| judge_limits(&what.vhost, &limits.value)));
        let path = format!("/api/exchanges/{}/{}", api.vhost, percent_encoded(&what.exchange));
        let Some(exchange) = api.get::<Exchange>(&path).await? else { return Ok(()) };
        let policy = match &exchange.policy {
            Some(name) => api.get::<Policy>(&format!("/api/policies/{}/{}", api.vhost, percent_encoded(name))).await?,
            None => None,
        };
        findings.extend(judge_exchange(&what.exchange, &exchange, &policy.unwrap_or_default().definition));
        let bindings: Vec<Binding> = api.list(&format!("{path}/bindings/source")).await?;
        for queue in &what.queues {
            let path = format!("/api/queues/{}/{}", api.vhost, percent_encoded(&queue.spec.name));
            if let Some(Fields(fields)) = api.get(&path).await? {
                let found = Queue::deserialize(Value::Object(fields)).map_err(|error| format!("{path}: {error}"))?;
                findings.extend(judge_queue(queue, &found, major));
                findings.push(judge_bindings(queue, &bindings));
            }
        }
        Ok::<_, String>(())
    };
    if let Err(error) = looked.await {
        findings.push(bad(error));
    }
    findings
}

struct Api {
    client: Client,
    vhost: String,
}

impl Api {
    /// Nothing if it answers 404.
    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, String> {
        let answer = self.client.get(path, LIMIT, READ_BYTES).await.map_err(|error| format!("{path}: {error}"))?;
        match answer.status {
            200 if !answer.is_whole => {
                Err(format!("{path}: the answer did not end within {LIMIT:?} and {READ_BYTES} bytes"))
            }
            200 => serde_json::from_slice(&answer.body).map(Some).map_err(|error| format!("{path}: {error}")),
            404 => Ok(None),
            401 => Err(format!("{path}: answered 401: wrong user or password")),
            status => Err(format!("{path}: answered {status}")),
        }
    }

    async fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, String> {
        Ok(self.get(path).await?.unwrap_or_default())
    }
}

fn percent_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

fn judge_nodes(nodes: &[Node]) -> Vec<Finding> {
    nodes
        .iter()
        .map(|node| {
            let check = format!("node {}", node.name);
            let bad = |severity, found: &str, mend: &str| Finding::bad(severity, check.clone(), found, mend);
            match node {
                Node { running: false, .. } => bad(Severity::Warning, "is down", "start it"),
                Node { mem_alarm: true, .. } => bad(
                    Severity::Unsafe,
                    "memory alarm: whoever publishes is blocked",
                    "free memory, or raise vm_memory_high_watermark",
                ),
                Node { disk_free_alarm: true, .. } => bad(
                    Severity::Unsafe,
                    "disk alarm: whoever publishes is blocked",
                    "free disk space, or lower disk_free_limit",
                ),
                Node { partitions, .. } if !partitions.is_empty() => {
                    bad(Severity::Unsafe, "the cluster is partitioned", "mend the network, then restart one side")
                }
                _ => Finding::ok(check, "runs, without alarms"),
            }
        })
        .collect()
}

fn judge_limits(vhost: &str, limits: &Value) -> Option<Finding> {
    let limits = limits.as_object().filter(|limits| !limits.is_empty())?;
    let text: Vec<String> = limits.iter().map(|(name, limit)| format!("{name} {limit}")).collect();
    let found = format!("{}: over it, processes cannot connect or declare", text.join(", "));
    Some(
        Finding::note(format!("vhost {vhost}: limits"), found).or(format!("rabbitmqctl clear_vhost_limits -p {vhost}")),
    )
}

fn judge_exchange(name: &str, exchange: &Exchange, policy: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut bad = |what: &str, found: &str, mend: &str| {
        findings.push(Finding::bad(Severity::Unsafe, format!("exchange {name}: {what}"), found, mend));
    };
    let anew = "delete it and let the relay declare it";
    if exchange.kind != "topic" {
        bad("type", &format!("is a {} exchange: bindings by pattern do not work", exchange.kind), anew);
    }
    if !exchange.durable {
        bad("durable", "is not: a restart of the broker removes it, and every binding with it", anew);
    }
    if exchange.auto_delete {
        bad("auto-delete", "it goes with its last binding", anew);
    }
    if exchange.internal {
        bad("internal", "the relay cannot publish to it", anew);
    }
    let alternate = text(&exchange.arguments, "alternate-exchange").or_else(|| text(policy, "alternate-exchange"));
    if let Some(alternate) = alternate {
        bad(
            "alternate exchange",
            &format!("\"{alternate}\" swallows unroutable messages: they look delivered, where they should be parked"),
            "remove the policy or the argument; bind a queue with # to see what nobody takes",
        );
    }
    if findings.is_empty() {
        findings
            .push(Finding::ok(format!("exchange {name}: arguments"), "durable topic exchange, no alternate exchange"));
    }
    findings
}

fn text<'v>(map: &'v Value, name: &str) -> Option<&'v str> {
    map.get(name).and_then(Value::as_str)
}

impl Queue {
    /// A limit, whether by argument or policy: the lower one counts.
    fn limit(&self, name: &str) -> Option<i64> {
        let argument = self.arguments.get(format!("x-{name}")).and_then(Value::as_i64);
        let policy = self.effective_policy_definition.get(name).and_then(Value::as_i64);
        argument.into_iter().chain(policy).min()
    }

    /// A word: the argument's counts before the policy's.
    fn word(&self, name: &str) -> Option<&str> {
        text(&self.arguments, &format!("x-{name}")).or_else(|| text(&self.effective_policy_definition, name))
    }
}

fn judge_queue(queue: &QueueUse, found: &Queue, major: u32) -> Vec<Finding> {
    let mut findings = judge_kind(queue, found);
    findings.extend(judge_limits_of(queue, found, major));
    findings.extend(judge_dead_lettering(queue, found));
    if findings.is_empty() {
        let check = format!("queue {}: arguments", queue.spec.name);
        findings.push(Finding::ok(check, "durable quorum queue that drops, expires and limits nothing"));
    }
    let timeout = found.limit("consumer-timeout").and_then(|ms| u64::try_from(ms).ok()).map(Duration::from_millis);
    findings.push(judge_timeout(queue, timeout.unwrap_or(CONSUMER_TIMEOUT)));
    findings
}

fn judge_kind(queue: &QueueUse, found: &Queue) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut bad = |severity, what: &str, found: String, mend: &str| {
        findings.push(Finding::bad(severity, format!("queue {}: {what}", queue.spec.name), found, mend));
    };
    let anew = "delete it when it is empty, and let the consumer declare it";
    match found.kind.as_str() {
        "quorum" => {}
        "classic" => {
            let text = "classic: it confirms messages before they are on disk, and has one copy".to_owned();
            bad(Severity::Warning, "type", text, anew);
        }
        other => bad(Severity::Unsafe, "type", format!("{other}: nothing of it is acknowledged one by one"), anew),
    }
    if !found.durable {
        bad(Severity::Unsafe, "durable", "is not: a restart of the broker empties it".to_owned(), anew);
    }
    if found.auto_delete {
        bad(Severity::Unsafe, "auto-delete", "it goes with its last consumer, and its messages too".to_owned(), anew);
    }
    if found.exclusive {
        bad(Severity::Unsafe, "exclusive", "it goes with the connection that made it".to_owned(), anew);
    }
    let is_single = found.arguments.get("x-single-active-consumer") == Some(&Value::Bool(true));
    if queue.spec.single_active_consumer && !is_single {
        let text = "is not set: several processes would handle one key at a time".to_owned();
        bad(Severity::Unsafe, "single active consumer", text, anew);
    }
    if !found.members.is_empty() && found.online.len() * 2 <= found.members.len() {
        let text =
            format!("{} of {} members are online: it takes and gives nothing", found.online.len(), found.members.len());
        bad(Severity::Unsafe, "quorum", text, "start the nodes of its other members");
    } else if found.kind == "quorum" && found.leader.as_deref().is_none_or(str::is_empty) {
        let (online, members) = (found.online.len(), found.members.len());
        let text = format!("has no leader, with {online} of {members} members online: it takes and gives nothing");
        let mend = "restart its nodes, one at a time; if it still has none, delete it, let the consumer declare it, and send what it \
                    held once more: oncebox audit --redrive";
        bad(Severity::Unsafe, "leader", text, mend);
    }
    findings
}

fn judge_limits_of(queue: &QueueUse, found: &Queue, major: u32) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut bad = |severity, what: &str, found: String, mend: &str| {
        findings.push(Finding::bad(severity, format!("queue {}: {what}", queue.spec.name), found, mend));
    };
    let remove = "remove it from the policy, or delete the queue when it is empty and let the consumer declare it";
    if let Some(ms) = found.limit("message-ttl") {
        bad(Severity::Unsafe, "message-ttl", format!("{ms} ms: what is not consumed in time is lost"), remove);
    }
    if let Some(ms) = found.limit("expires") {
        bad(Severity::Unsafe, "expires", format!("{ms} ms without a consumer, and the queue is gone"), remove);
    }
    let is_limited = ["max-length", "max-length-bytes"].iter().any(|name| found.limit(name).is_some());
    match (is_limited, found.word("overflow").unwrap_or("drop-head"), found.kind.as_str()) {
        (true, "reject-publish", _) | (true, "reject-publish-dlx", "classic") => {}
        (true, overflow, kind) => bad(
            Severity::Unsafe,
            "overflow",
            format!("{overflow} on a {kind} queue of limited length: the oldest messages are dropped when it is full"),
            "set overflow to reject-publish: the relay waits and tries again",
        ),
        (false, _, _) if found.word("overflow") == Some("drop-head") => bad(
            Severity::Warning,
            "overflow",
            "drop-head: the first limit of its length that somebody sets will lose messages".to_owned(),
            "set overflow to reject-publish",
        ),
        _ => {}
    }
    if found.kind == "quorum" {
        let mend = "set delivery-limit to -1 by the queue's argument";
        match found.limit("delivery-limit") {
            None if major >= DELIVERY_LIMIT_SINCE_MAJOR => {
                let text = "not set: after 20 deliveries, e.g. crashes of consumers, a message is dropped".to_owned();
                bad(Severity::Unsafe, "delivery-limit", text, mend);
            }
            Some(limit) if (0..GENEROUS_DELIVERY_LIMIT).contains(&limit) => {
                let text =
                    format!("{limit}: after as many deliveries, e.g. crashes, an unprocessed message leaves the queue");
                bad(
                    Severity::Unsafe,
                    "delivery-limit",
                    text,
                    if major >= DELIVERY_LIMIT_SINCE_MAJOR { mend } else { remove },
                );
            }
            _ => {}
        }
    }
    findings
}

fn judge_dead_lettering(queue: &QueueUse, found: &Queue) -> Option<Finding> {
    let exchange = found.word("dead-letter-exchange")?;
    let check = format!("queue {}: dead-lettering", queue.spec.name);
    let is_safe = found.kind == "quorum"
        && found.word("dead-letter-strategy") == Some("at-least-once")
        && found.word("overflow") == Some("reject-publish");
    Some(match is_safe {
        true => Finding::ok(check, format!("to \"{exchange}\", at least once")),
        false => Finding::bad(
            Severity::Warning,
            check,
            format!("to \"{exchange}\", at most once: what is dead-lettered may be lost on the way"),
            "on a quorum queue set dead-letter-strategy to at-least-once and overflow to reject-publish",
        ),
    })
}

fn judge_bindings(queue: &QueueUse, bindings: &[Binding]) -> Finding {
    let check = format!("queue {}: bindings", queue.spec.name);
    let is_there = |pattern: &&String| {
        bindings.iter().any(|binding| {
            binding.destination_type == "queue"
                && binding.destination == queue.spec.name
                && binding.routing_key == **pattern
        })
    };
    let missing: Vec<&str> =
        queue.spec.bindings.iter().filter(|pattern| !is_there(pattern)).map(String::as_str).collect();
    match missing.is_empty() {
        true => Finding::ok(check, format!("{} of the config are there", queue.spec.bindings.len())),
        false => Finding::bad(
            Severity::Warning,
            check,
            format!("missing: {}: until the consumer starts, such messages go past it", missing.join(", ")),
            "start the consumer, which makes them",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::QueueSpec;
    use serde_json::json;

    fn consumer(single: bool) -> QueueUse {
        QueueUse {
            spec: QueueSpec {
                name: "q".to_owned(),
                exchange: "e".to_owned(),
                bindings: vec!["a.#".to_owned()],
                single_active_consumer: single,
                voids: false,
            },
            concurrency: 8,
            batch: 1,
            handler_timeout: Duration::from_secs(10),
        }
    }

    fn queue(kind: &str, arguments: Value, policy: Value) -> Queue {
        Queue {
            kind: kind.to_owned(),
            durable: true,
            leader: (kind == "quorum").then(|| "a".to_owned()),
            arguments,
            effective_policy_definition: policy,
            ..Queue::default()
        }
    }

    /// What is not in order, by its short name.
    fn told(found: &Queue, major: u32) -> Vec<(String, Severity)> {
        let findings = judge_queue(&consumer(false), found, major).into_iter();
        findings
            .filter(|finding| finding.severity < Severity::Note)
            .map(|finding| (finding.check.trim_start_matches("queue q: ").to_owned(), finding.severity))
            .collect()
    }

    /// Goal: every property of a queue that can lose a message is told, by argument and by policy alike.
    #[test]
    fn queues_are_judged() {
        use Severity::{Unsafe, Warning};
        let none = || json!([]);
        for (name, value, expected) in [
            ("message-ttl", json!(1000), vec![("message-ttl", Unsafe)]),
            ("expires", json!(1000), vec![("expires", Unsafe)]),
            ("max-length", json!(5), vec![("overflow", Unsafe)]),
            ("max-length-bytes", json!(5), vec![("overflow", Unsafe)]),
            ("overflow", json!("drop-head"), vec![("overflow", Warning)]),
            ("overflow", json!("reject-publish"), vec![]),
            ("delivery-limit", json!(3), vec![("delivery-limit", Unsafe)]),
            ("delivery-limit", json!(0), vec![("delivery-limit", Unsafe)]),
            ("delivery-limit", json!(-1), vec![]),
            ("delivery-limit", json!(100_000), vec![]),
            ("dead-letter-exchange", json!("dlx"), vec![("dead-lettering", Warning)]),
            ("consumer-timeout", json!(1000), vec![("consumer timeout", Warning)]),
        ] {
            let expected: Vec<_> = expected.into_iter().map(|(what, severity)| (what.to_owned(), severity)).collect();
            let argument = format!("x-{name}");
            assert_eq!(told(&queue("quorum", json!({argument: value}), none()), 3), expected, "argument {name}");
            assert_eq!(told(&queue("quorum", json!({}), json!({name: value})), 3), expected, "policy {name}");
        }
        let limited = |overflow: &str| json!({"max-length": 5, "overflow": overflow});
        assert_eq!(told(&queue("quorum", json!({}), limited("reject-publish")), 3), []);
        assert_eq!(told(&queue("quorum", json!({}), limited("reject-publish-dlx")), 3).len(), 1);
        // The lower limit counts, and so does the argument's word.
        assert_eq!(told(&queue("quorum", json!({"x-delivery-limit": 5000}), json!({"delivery-limit": 2})), 3).len(), 1);
        assert_eq!(told(&queue("quorum", json!({"x-overflow": "reject-publish"}), limited("drop-head")), 3), []);
        let safe = json!({"x-dead-letter-exchange": "d", "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"});
        assert_eq!(told(&queue("quorum", safe, none()), 3), []);
        // The default limit of later brokers.
        assert_eq!(told(&queue("quorum", json!({}), none()), 4), [("delivery-limit".to_owned(), Unsafe)]);
        assert_eq!(told(&queue("quorum", json!({"x-delivery-limit": -1}), none()), 4), []);
    }

    /// Goal: a queue of another kind, or without what order by key needs, is told.
    #[test]
    fn kinds_are_judged() {
        let base = || queue("quorum", json!({}), json!([]));
        assert_eq!(told(&base(), 3), []);
        assert_eq!(told(&queue("classic", json!({}), json!([])), 3), [("type".to_owned(), Severity::Warning)]);
        assert_eq!(told(&queue("stream", json!({}), json!([])), 3), [("type".to_owned(), Severity::Unsafe)]);
        for (found, what) in [
            (Queue { durable: false, ..base() }, "durable"),
            (Queue { auto_delete: true, ..base() }, "auto-delete"),
            (Queue { exclusive: true, ..base() }, "exclusive"),
            (Queue { members: vec!["a".into(), "b".into(), "c".into()], online: vec!["a".into()], ..base() }, "quorum"),
        ] {
            assert_eq!(told(&found, 3), [(what.to_owned(), Severity::Unsafe)]);
        }
        for (answer, what) in [
            (r#""leader":null,"members":["a"],"online":["a"],"#, "leader"),
            (r#""leader":"","members":["a"],"online":["a"],"#, "leader"),
            (r#""members":["a"],"online":["a"],"#, "leader"),
            (r#""leader":null,"members":["a"],"online":[],"online":["a"],"#, "quorum"),
            (r#""leader":null,"members":["a"],"online":["a"],"online":[],"#, "quorum"),
        ] {
            let answer = format!(r#"{{"arguments":{{}},"durable":true,{answer}"state":"running","type":"quorum"}}"#);
            let Fields(fields) = serde_json::from_str(&answer).expect("an object");
            let found = Queue::deserialize(Value::Object(fields)).expect("a queue");
            assert_eq!(told(&found, 3), [(what.to_owned(), Severity::Unsafe)], "{answer}");
        }
        let severities = |arguments| judge_kind(&consumer(true), &queue("quorum", arguments, json!([]))).len();
        assert_eq!((severities(json!({})), severities(json!({"x-single-active-consumer": true}))), (1, 0));
    }

    /// Goal: an exchange that swallows, forgets or misroutes messages is told.
    #[test]
    fn exchanges_are_judged() {
        let base = || Exchange { kind: "topic".to_owned(), durable: true, ..Exchange::default() };
        let unsafe_ones = |exchange: &Exchange, policy: Value| {
            judge_exchange("e", exchange, &policy).iter().filter(|f| f.severity == Severity::Unsafe).count()
        };
        assert_eq!(unsafe_ones(&base(), json!({})), 0);
        assert_eq!(unsafe_ones(&base(), json!({"alternate-exchange": "ae"})), 1);
        assert_eq!(unsafe_ones(&Exchange { arguments: json!({"alternate-exchange": "ae"}), ..base() }, Value::Null), 1);
        assert_eq!(
            unsafe_ones(
                &Exchange { durable: false, auto_delete: true, internal: true, kind: "fanout".into(), ..base() },
                Value::Null
            ),
            4
        );
    }

    /// Goal: alarms and lost nodes are told, and which bindings are not there.
    #[test]
    fn nodes_and_bindings_are_judged() {
        let node = |text: Value| judge_nodes(&[serde_json::from_value(text).expect("a node")])[0].severity;
        assert_eq!(node(json!({"running": true, "mem_alarm": false})), Severity::Ok);
        assert_eq!(node(json!({"running": true, "mem_alarm": true})), Severity::Unsafe);
        assert_eq!(node(json!({"running": true, "disk_free_alarm": true})), Severity::Unsafe);
        assert_eq!(node(json!({"running": true, "partitions": ["b"]})), Severity::Unsafe);
        assert_eq!(node(json!({"running": false})), Severity::Warning);
        let binding =
            |key: &str| Binding { destination: "q".into(), destination_type: "queue".into(), routing_key: key.into() };
        assert_eq!(judge_bindings(&consumer(false), &[binding("a.#")]).severity, Severity::Ok);
        assert_eq!(judge_bindings(&consumer(false), &[binding("b.#")]).severity, Severity::Warning);
    }
}
