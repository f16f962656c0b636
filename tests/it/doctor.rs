//! Goal: `oncebox doctor` finds what is wrong with real servers, says what mends it, and its exit code tells safe from
//! unsafe; what it cannot see it says, and no server's absence makes it crash or hang.

use crate::support::{Lab, connect, eventually, unique};
use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use oncebox::node::PostgresOptions;
use serde_json::Value;
use sqlx::Executor;
use std::collections::HashMap;
use std::process::Command;
use std::time::{Duration, Instant};

const CONFIG: &str = r#"
[[consumer]]
name = "billing"
bindings = ["order.#"]
handler = { http = "http://127.0.0.1:1/" }
"#;

/// What was found, by check; and the exit code.
async fn findings(mut command: Command) -> (HashMap<String, Value>, i32) {
    command.arg("--json");
    // A blocking call would stand in the way of servers that run on this thread.
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("ends").expect("runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let list: Vec<Value> = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}\n{said}"));
    assert!(!text.contains("guest:") && !said.contains("guest:"), "{text}\n{said}");
    let found = list.into_iter().map(|finding| (finding["check"].as_str().expect("a check").to_owned(), finding));
    (found.collect(), output.status.code().expect("no signal"))
}

async fn doctor(lab: &Lab, args: &[&str]) -> (HashMap<String, Value>, i32) {
    let mut command = lab.command(&["doctor"]);
    if let Some(url) = lab.rabbit.management_url() {
        command.env("ONCEBOX_MANAGEMENT_URL", url);
    }
    command.args(args);
    findings(command).await
}

/// Checks of this severity.
fn of<'f>(found: &'f HashMap<String, Value>, severity: &str) -> Vec<&'f str> {
    let mut checks: Vec<&str> =
        found.values().filter(|f| f["severity"] == severity).map(|f| f["check"].as_str().expect("text")).collect();
    checks.sort_unstable();
    checks
}

fn assert_found(found: &HashMap<String, Value>, check: &str, severity: &str, words: &str) {
    let finding = found.get(check).unwrap_or_else(|| panic!("no finding \"{check}\" in {found:#?}"));
    assert_eq!(finding["severity"], severity, "{finding:#}");
    assert!(finding["found"].as_str().expect("text").contains(words), "no {words:?} in {finding:#}");
    assert!(severity == "ok" || severity == "note" || finding["mend"].is_string(), "no mend: {finding:#}");
}

/// The consumer of `CONFIG` has declared its queue, and runs no more.
async fn declared(lab: &Lab) -> String {
    let config = lab.config(CONFIG);
    let mut consumer = lab.consume(&config).await;
    assert!(consumer.stop().await.0.success());
    config
}

async fn channel(lab: &Lab) -> (lapin::Connection, lapin::Channel) {
    let connection = lapin::Connection::connect(&lab.amqp_url, Default::default()).await.expect("connects");
    let channel = connection.create_channel().await.expect("a channel");
    (connection, channel)
}

/// Declares the queue `billing` with these arguments.
async fn declare(lab: &Lab, durable: bool, arguments: &[(&str, AMQPValue)]) {
    let (connection, channel) = channel(lab).await;
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    let options = QueueDeclareOptions { durable, ..Default::default() };
    channel.queue_declare("billing".into(), options, table).await.expect("declares");
    connection.close(200, "done".into()).await.expect("closes");
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// Goal: a set-up that is in order has nothing unsafe and nothing to warn of, and every part of it was looked at; without
/// the management API the same, and what was not checked is said: B1.
#[tokio::test]
async fn a_healthy_set_up_is_safe() {
    let lab = Lab::with_management().await;
    let config = declared(&lab).await;
    let (found, code) = doctor(&lab, &["--config", &config]).await;
    assert_eq!((of(&found, "unsafe"), of(&found, "warning"), code), (vec![], vec![], 0), "{found:#?}");
    for check in [
        "database: version",
        "database: fsync",
        "database: full_page_writes",
        "database: synchronous_commit",
        "database: clock",
        "database: schema",
        "database: oncebox.setting",
        "broker: version",
        "broker: alarms",
        "broker: management",
        "exchange oncebox",
        "exchange oncebox: arguments",
        "queue billing",
        "queue billing: arguments",
        "queue billing: bindings",
        "queue billing: consumer timeout",
    ] {
        assert_found(&found, check, "ok", "");
    }
    assert!(found.keys().any(|check| check.starts_with("node oncebox-")), "{:?}", found.keys());

    // Plain AMQP, and the table.
    let (found, code) = findings({
        let mut command = lab.command(&["doctor", "--config", &config]);
        command.env_remove("ONCEBOX_MANAGEMENT_URL");
        command
    })
    .await;
    assert_eq!((of(&found, "unsafe"), code), (vec![], 0), "{found:#?}");
    assert_found(&found, "broker: management", "note", "not checked");
    assert_found(&found, "queue billing", "ok", "as oncebox declares it");
    let output = lab.command(&["doctor", "--config", &config]).output().expect("runs");
    let table = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(output.status.success() && table.contains("queue billing") && table.contains("0 unsafe"), "{table}");

    // Nothing is declared by looking.
    let fresh = unique("fresh");
    lab.rabbit.add_vhost(&fresh).await.expect("a vhost");
    let url = lab.rabbit.url(&fresh);
    let (found, code) = doctor(&lab, &["--config", &config, "--amqp-url", &url]).await;
    assert_eq!(code, 0);
    assert_found(&found, "queue billing", "note", "does not exist yet");
    assert_found(&found, "exchange oncebox", "note", "does not exist yet");
    let list =
        lab.rabbit.ctl(&["list_queues", "-p", &fresh, "--quiet", "--no-table-headers", "name"]).await.expect("lists");
    assert_eq!(list.trim(), "");
}

/// Goal: durability switched off in the database is unsafe, and each setting is named: B2.
#[tokio::test]
async fn unsafe_databases_are_told() {
    let settings = [("fsync", "off"), ("full_page_writes", "off"), ("synchronous_commit", "off")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let lab = Lab::own_with(PostgresOptions { settings }).await;
    let (found, code) = doctor(&lab, &[]).await;
    assert_eq!(code, 1);
    let expected = ["database: fsync", "database: full_page_writes", "database: synchronous_commit"];
    assert_eq!(of(&found, "unsafe"), expected);
    assert!(found["database: fsync"]["mend"].as_str().expect("text").contains("fsync = on"));
}

/// Goal: synchronous_commit counts as this role gets it in this database, though our own session raises it: B3.
#[tokio::test]
async fn settings_of_the_role_count() {
    let lab = Lab::shared().await;
    lab.sql(&format!("alter database {} set synchronous_commit = off", lab.name)).await;
    let (found, code) = doctor(&lab, &[]).await;
    assert_eq!((of(&found, "unsafe"), code), (vec!["database: synchronous_commit"], 1));
    // Its mend mends it.
    lab.sql(found["database: synchronous_commit"]["mend"].as_str().expect("text")).await;
    assert_eq!(doctor(&lab, &[]).await.1, 0);
}

/// Goal: a transaction left open is named with its pid, a prepared one with its name, and the mend ends it: B4.
#[tokio::test]
async fn open_transactions_are_named() {
    let lab = Lab::shared().await;
    let mut open = connect(&lab.database_url).await;
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut open).await.expect("a pid");
    open.execute("set application_name = 'sleepy app'; begin; select 1").await.expect("begins");
    let gid = unique("gid");
    let mut conn = lab.connect().await;
    conn.execute(sqlx::AssertSqlSafe(format!("begin; create table t (); prepare transaction '{gid}'")))
        .await
        .expect("prepares");
    let text = |found: &HashMap<String, Value>| found.values().map(Value::to_string).collect::<String>();
    assert!(!text(&doctor(&lab, &[]).await.0).contains("sleepy app"), "young ones are none of its business");
    let list = || async {
        let output = lab.command(&["doctor", "--json", "--long-transaction-s", "0"]).output().expect("runs");
        assert!(output.status.success(), "a warning is not unsafe");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let found = list().await;
    for words in [
        format!("pid {pid} (\\\"sleepy app\\\", role oncebox, database {}, idle in transaction)", lab.name),
        format!("select pg_terminate_backend({pid})"),
        format!("the prepared transaction '{gid}' of database {}", lab.name),
        format!("rollback prepared '{gid}'"),
    ] {
        assert!(found.contains(&words), "no {words} in {found}");
    }
    lab.sql(&format!("select pg_terminate_backend({pid})")).await;
    lab.sql(&format!("rollback prepared '{gid}'")).await;
    eventually("both are gone", async || {
        let found = list().await;
        (!found.contains("sleepy app") && !found.contains(&gid)).then_some(())
    })
    .await;
}

/// Goal: a schema that is missing, old or new, and a role without rights, are told with what mends them: B5.
#[tokio::test]
async fn schemas_and_roles_are_told() {
    let lab = Lab::shared().await;
    let empty = unique("empty");
    lab.postgres.create_database(&empty).await.expect("a database");
    let (found, code) = doctor(&lab, &["--database-url", &lab.postgres.url(&empty)]).await;
    assert_eq!(code, 1);
    assert_found(&found, "database: schema", "unsafe", "no oncebox schema");
    assert_eq!(found["database: schema"]["mend"], "oncebox migrate");
    let role = unique("nobody");
    lab.sql(&format!("create role {role} login")).await;
    let as_role = lab.database_url.replace("oncebox@", &format!("{role}@"));
    let (found, code) = doctor(&lab, &["--database-url", &as_role]).await;
    assert_eq!(code, 1);
    assert_found(&found, "database: schema", "unsafe", "permission denied");
    assert_found(&found, "database: roles", "warning", "has not the rights of oncebox_relay");
    lab.sql(&format!("grant oncebox_relay, pg_read_all_stats to {role}")).await;
    let (found, code) = doctor(&lab, &["--database-url", &as_role]).await;
    assert_eq!((of(&found, "warning"), code), (vec![], 0), "{found:#?}");
    lab.sql("update oncebox.schema_history set version = version + 1000 where version = (select max(version) from oncebox.schema_history)").await;
    assert_found(&doctor(&lab, &[]).await.0, "database: schema", "unsafe", "run a newer oncebox");
    lab.sql("delete from oncebox.schema_history where version > 1").await;
    let (found, code) = doctor(&lab, &[]).await;
    assert_eq!(code, 1);
    assert_found(&found, "database: schema", "unsafe", "at version 1, this program needs");
}

/// Goal: a queue that can lose messages is unsafe for each reason, by argument and by policy; without the management API
/// it is unsafe for being otherwise than declared: B6.
#[tokio::test]
async fn queues_that_lose_messages_are_told() {
    let lab = Lab::with_management().await;
    let config = declared(&lab).await;
    let args = ["--config", config.as_str()];
    let policy = async |definition: &str| {
        let set = ["set_policy", "-p", &lab.name, "p", "^billing$", definition, "--apply-to", "queues"];
        lab.rabbit.ctl(&set).await.expect("a policy");
    };
    // Policies reach the API's statistics within their interval of 5 s.
    let eventually_unsafe = async |expected: &[&str]| {
        eventually(&format!("{expected:?} unsafe"), async || {
            let (found, code) = doctor(&lab, &args).await;
            (of(&found, "unsafe") == expected).then(|| assert_eq!(code, i32::from(!expected.is_empty())))
        })
        .await;
    };
    policy(r#"{"message-ttl": 60000, "expires": 3600000, "delivery-limit": 3}"#).await;
    eventually_unsafe(&["queue billing: delivery-limit", "queue billing: expires", "queue billing: message-ttl"]).await;
    policy(r#"{"max-length": 10, "overflow": "drop-head"}"#).await;
    eventually_unsafe(&["queue billing: overflow"]).await;
    policy(r#"{"max-length": 10, "overflow": "reject-publish"}"#).await;
    eventually_unsafe(&[]).await;
    lab.rabbit.ctl(&["clear_policy", "-p", &lab.name, "p"]).await.expect("cleared");
    for (durable, arguments, expected) in [
        (false, vec![], &["queue billing: durable", "queue billing: single active consumer"][..]),
        (true, vec![("x-single-active-consumer", AMQPValue::Boolean(true))], &[]),
        (
            true,
            vec![
                ("x-queue-type", text("quorum")),
                ("x-single-active-consumer", AMQPValue::Boolean(true)),
                ("x-message-ttl", AMQPValue::LongInt(1_000)),
                ("x-delivery-limit", AMQPValue::LongInt(2)),
            ],
            &["queue billing: delivery-limit", "queue billing: message-ttl"],
        ),
    ] {
        lab.rabbit.ctl(&["delete_queue", "-p", &lab.name, "billing"]).await.expect("deleted");
        declare(&lab, durable, &arguments).await;
        let (found, code) = doctor(&lab, &args).await;
        assert_eq!((of(&found, "unsafe"), code), (expected.to_vec(), i32::from(!expected.is_empty())), "{found:#?}");
        assert_found(&found, "queue billing", "warning", "does not start on it");
        assert_found(&found, "queue billing: bindings", "warning", "order.#");
        if !arguments.iter().any(|(name, _)| *name == "x-queue-type") {
            assert_found(&found, "queue billing: type", "warning", "classic");
        }
        let (found, code) = findings(lab.command(&["doctor", "--config", &config])).await;
        assert_eq!((of(&found, "unsafe"), code), (vec!["queue billing"], 1));
    }
}

/// Goal: an alternate exchange, by policy or argument, and an exchange of another kind are unsafe: B7.
#[tokio::test]
async fn exchanges_that_swallow_messages_are_told() {
    let lab = Lab::with_management().await;
    let config = declared(&lab).await;
    let set = [
        "set_policy",
        "-p",
        &lab.name,
        "ae",
        "^oncebox$",
        r#"{"alternate-exchange": "amq.fanout"}"#,
        "--apply-to",
        "exchanges",
    ];
    lab.rabbit.ctl(&set).await.expect("a policy");
    eventually("the policy is seen", async || {
        let (found, code) = doctor(&lab, &["--config", &config]).await;
        (of(&found, "unsafe") == ["exchange oncebox: alternate exchange"]).then(|| assert_eq!(code, 1))
    })
    .await;
    let (connection, channel) = channel(&lab).await;
    let mut arguments = FieldTable::default();
    arguments.insert("alternate-exchange".into(), text("amq.fanout"));
    let options = ExchangeDeclareOptions::default();
    channel.exchange_declare("bad".into(), ExchangeKind::Direct, options, arguments).await.expect("declares");
    let bad = lab.config("exchange = \"bad\"");
    let (found, code) = doctor(&lab, &["--config", &bad]).await;
    assert_eq!(code, 1);
    for check in ["type", "durable", "alternate exchange"] {
        assert_found(&found, &format!("exchange bad: {check}"), "unsafe", "");
    }
    drop(connection);
}

/// Goal: a quorum queue whose only member is down is unsafe, though the broker's statistics still count it; once it is
/// back, all is well.
#[tokio::test]
async fn queues_that_nobody_leads_are_told() {
    let lab = Lab::with_management().await;
    let config = declared(&lab).await;
    let queue = format!("rabbit_misc:r(<<\"{}\">>, queue, <<\"billing\">>)", lab.name);
    for (act, expected) in [("stop", vec!["queue billing: quorum"]), ("restart", vec![])] {
        let member = format!("{{ok, Q}} = rabbit_amqqueue:lookup({queue}), Member = amqqueue:get_pid(Q)");
        let eval = format!("{member}, ok = ra:{act}_server(quorum_queues, Member).");
        lab.rabbit.ctl(&["eval", &eval]).await.expect("acts");
        eventually(act, async || {
            let (found, code) = doctor(&lab, &["--config", &config]).await;
            let is_told = of(&found, "unsafe") == expected && of(&found, "warning").is_empty();
            is_told.then(|| assert_eq!(code, i32::from(!expected.is_empty())))
        })
        .await;
    }
}

/// Goal: how long deliveries may wait is reckoned from the prefetch that the consumer really asks for.
#[tokio::test]
async fn waits_are_reckoned_from_the_prefetch() {
    let lab = Lab::shared().await;
    lab.sql(
        "create schema shop;
         create function shop.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
         language plpgsql as 'begin end'",
    )
    .await;
    let (sql, http) = ("handler = { sql = \"shop.on_message\" }\n", "handler = { http = \"http://127.0.0.1:1/\" }\n");
    for (name, handler, settings, ahead, severity) in [
        ("default", sql, "", 400, "ok"),
        ("slow", sql, "handler_timeout = \"60s\"", 400, "warning"),
        ("wide", sql, "concurrency = 40\norder = \"none\"", 640, "ok"),
        ("single", sql, "concurrency = 3\nbatch = 1", 48, "ok"),
        ("stream", sql, "order = \"stream\"", 128, "ok"),
        ("http", http, "order = \"none\"", 128, "ok"),
    ] {
        let config = lab.config(&format!("[[consumer]]\nname = \"{name}\"\nbindings = [\"#\"]\n{handler}{settings}"));
        let mut consumer = lab.consume(&config).await;
        let list = lab.rabbit.ctl(&["list_consumers", "-p", &lab.name, "queue_name", "prefetch_count"]).await;
        let list = list.expect("lists");
        assert_eq!(list.lines().last(), Some(format!("{name}\t{ahead}").as_str()), "{list}");
        let (found, _) = doctor(&lab, &["--config", &config]).await;
        let words = format!("of {ahead} deliveries ahead");
        assert_found(&found, &format!("queue {name}: consumer timeout"), severity, &words);
        assert!(consumer.stop().await.0.success());
    }
}

/// Goal: a memory alarm is seen by plain AMQP and by the management API: B8.
#[tokio::test]
async fn alarms_are_told() {
    let lab = Lab::with_management().await;
    lab.rabbit.ctl(&["set_vm_memory_high_watermark", "0"]).await.expect("an alarm");
    let (found, code) = findings(lab.command(&["doctor"])).await;
    assert_eq!(code, 1);
    assert_found(&found, "broker: alarms", "unsafe", "memory or disk alarm");
    eventually("the node's alarm is seen", async || {
        let (found, _) = doctor(&lab, &[]).await;
        found.iter().any(|(check, f)| check.starts_with("node ") && f["severity"] == "unsafe").then_some(())
    })
    .await;
    lab.rabbit.ctl(&["set_vm_memory_high_watermark", "0.6"]).await.expect("no alarm");
    eventually("the alarm is over", async || (doctor(&lab, &[]).await.1 == 0).then_some(())).await;
}

/// Goal: servers that are down or refuse are findings, within bounded time, and the rest is looked at; wrong settings are
/// exit code 2: B9.
#[tokio::test]
async fn absent_servers_are_findings() {
    let lab = Lab::shared().await;
    let began = Instant::now();
    let (found, code) = doctor(&lab, &["--database-url", "postgres://u:p@127.0.0.1:1/d"]).await;
    assert_eq!(code, 1);
    assert_found(&found, "database: connection", "unsafe", "refused");
    assert_found(&found, "broker: alarms", "ok", "");
    let (found, code) = doctor(&lab, &["--amqp-url", "amqp://127.0.0.1:1/"]).await;
    assert_eq!(code, 1);
    assert_found(&found, "broker: connection", "unsafe", "cannot reach the broker");
    assert_found(&found, "database: schema", "ok", "");
    let (found, code) = doctor(&lab, &["--management-url", "http://guest:se-cret@127.0.0.1:1"]).await;
    assert_eq!((of(&found, "unsafe"), code), (vec![], 0));
    assert_found(&found, "broker: management", "warning", "cannot connect");
    // Servers that take the connection and say nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = silent.local_addr().expect("bound").port();
    let (found, code) = doctor(
        &lab,
        &[
            "--database-url",
            &format!("postgres://127.0.0.1:{port}/d"),
            "--amqp-url",
            &format!("amqp://127.0.0.1:{port}"),
        ],
    )
    .await;
    assert_eq!(code, 1);
    assert_found(&found, "database: connection", "unsafe", "did not answer");
    assert_found(&found, "broker: connection", "unsafe", "did not answer");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    let other = lab.config(&CONFIG.replace("name =", "database_url = \"postgres://127.0.0.1:1/d\"\nname ="));
    let (found, _) = doctor(&lab, &["--config", &other]).await;
    assert_found(&found, "database of billing: connection", "unsafe", "refused");
    let mut nowhere = lab.command(&["doctor"]);
    nowhere.env_remove("ONCEBOX_AMQP_URL");
    let (found, code) = findings(nowhere).await;
    assert_found(&found, "broker", "note", "not checked");
    assert_eq!(code, 0);
    for (args, words) in
        [(&["--management-url", "ftp://se-cret"][..], "management_url: "), (&["--database-url", "x"], "database_url: ")]
    {
        let output = lab.command(&["doctor"]).args(args).output().expect("runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(words) && !said.contains("se-cret"), "{said}");
    }
}
