//! Goal: whatever is wrong from the start ends a command at once with the right exit code and one line that names the
//! cause: 2 for usage and configuration, 1 for servers that refuse; no backtrace, no password, no busy loop.

use crate::support::{Lab, ONCEBOX, Process, folder, shared_nodes, unique};
use oncebox::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use oncebox::broker::{Broker, QueueSpec, Subscription};
use oncebox::node::Postgres;
use sqlx::Connection;
use std::process::Command;
use std::time::{Duration, Instant};

/// A server that refuses is asked once: the slowest, a broker that refuses credentials, answers after seconds.
const AT_ONCE: Duration = Duration::from_secs(30);

/// The program without any settings.
fn bare(args: &[&str]) -> Command {
    let mut command = Command::new(ONCEBOX);
    command.args(args);
    for name in std::env::vars().map(|(name, _)| name).filter(|name| name.starts_with("ONCEBOX_")) {
        command.env_remove(name);
    }
    command
}

/// Runs it to its end, which must come at once, with this exit code; what it said.
async fn fails(command: Command, code: i32) -> String {
    let (began, shown) = (Instant::now(), format!("{command:?}"));
    let mut process = Process::spawn(command);
    let status = process.end().await;
    let said = process.log();
    let shown = format!("{shown}\n{said}");
    assert_eq!(status.code(), Some(code), "{shown}");
    assert!(began.elapsed() < AT_ONCE, "after {:?}: {shown}", began.elapsed());
    for word in ["panicked", "backtrace", "RUST_", "se-cret"] {
        assert!(!said.contains(word), "{word}: {shown}");
    }
    said
}

/// The one line that begins with the program's name; next to it at most a few log lines.
async fn line(command: Command, code: i32) -> String {
    let said = fails(command, code).await;
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("oncebox: ")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(said.lines().count() <= 6, "{said}");
    lines[0].trim_start_matches("oncebox: ").to_owned()
}

fn config(text: &str) -> String {
    let path = folder("config").join("oncebox.toml");
    std::fs::write(&path, text).expect("a config file");
    path.to_str().expect("a path in UTF-8").to_owned()
}

const CONSUMER: &str = "[[consumer]]\nname = \"billing\"\nhandler = { sql = \"app.on_message\" }\n";

/// Goal: wrong usage is exit 2 and says what is right.
#[tokio::test]
async fn wrong_usage() {
    let help = fails(bare(&[]), 2).await;
    assert!(help.contains("Usage: oncebox") && help.contains("migrate") && help.contains("relay"), "{help}");
    for (args, expected) in [
        (&["frobnicate"][..], "'frobnicate'"),
        (&["migrate", "--stauts"], "'--stauts'"),
        (&["relay", "--listen", "127.0.0.1:1"], "'--listen'"),
        (&["migrate", "extra"], "'extra'"),
        (&["serve", "--listen"], "'--listen <ADDRESS:PORT>'"),
    ] {
        let said = fails(bare(args), 2).await;
        let first = said.lines().next().unwrap_or_default();
        assert!(first.starts_with("error: ") && first.contains(expected), "{args:?}: {said}");
    }
}

/// Goal: a missing or wrong setting is exit 2 and one line that begins with its name, wherever it comes from.
#[tokio::test]
async fn wrong_settings() {
    let consumer = |line: &str| format!("{CONSUMER}{line}\n");
    let urls = "database_url = \"postgres://h/d\"\namqp_url = \"amqp://h\"\n";
    for (text, args, expected) in [
        ("", &["migrate"][..], "database_url: is not set"),
        ("", &["relay"], "database_url: is not set"),
        ("", &["consume"], "database_url: is not set"),
        ("", &["serve"], "database_url: is not set"),
        ("", &["run"], "database_url: is not set"),
        ("database_url = \"postgres://h/d\"", &["relay"], "amqp_url: is not set"),
        ("database_url = \"postgres://h/d\"", &["consume"], "amqp_url: is not set"),
        ("database_url = \"postgres://h/d\"", &["run"], "amqp_url: is not set"),
        (urls, &["consume"], "consumer: there is none"),
        ("", &["relay", "--database-url", "mysql://u:se-cret@h/d"], "database_url: must begin with postgres://"),
        ("", &["migrate", "--database-url", "postgres://u:se-cret@h:port/d"], "database_url: "),
        ("", &["migrate", "--database-url", "postgres://u:se-cret@[h/d"], "database_url: "),
        ("", &["migrate", "--database-url", "postgres://u:se-cret@h/d?sslmode=maybe"], "database_url: "),
        (
            "database_url = \"postgres://h/d\"",
            &["relay", "--amqp-url", "http://u:se-cret@h/"],
            "amqp_url: must begin with amqp://",
        ),
        ("databse_url = \"x\"", &["migrate"], "config file, line 1: unknown field `databse_url`"),
        ("\n\nlisten = 7", &["serve"], "config file, line 3: "),
        ("x = [", &["relay"], "config file, line 1: "),
        ("listen = \"7077\"", &["serve"], "listen: \"7077\" is no address:port"),
        ("", &["serve", "--listen", "localhost"], "listen: \"localhost\" is no address:port"),
        ("drain_deadline = \"10\"", &["relay"], "drain_deadline: \"10\" is no duration"),
        ("[relay]\nkey_window = 0", &["relay"], "relay.key_window: must be 1 to 10000"),
        ("exchange = \"\"", &["relay"], "exchange: must be 1 to 255 bytes"),
        (&consumer("order = \"fifo\""), &["consume"], "consumer \"billing\": order: \"fifo\" is neither"),
        (
            &consumer("database_url = \"mysql://u:se-cret@h\""),
            &["consume"],
            "consumer \"billing\": database_url: must begin",
        ),
        (&consumer("concurrency = 0"), &["consume"], "consumer \"billing\": concurrency: must be 1"),
        (&consumer("handlr = 1"), &["consume"], "config file, line 4: unknown field `handlr`"),
        (&consumer(CONSUMER), &["consume"], "consumer.name: \"billing\" is there twice"),
        ("[[consumer]]\nname = \"b\"", &["consume"], "config file, line 1: missing field `handler`"),
    ] {
        let path = config(text);
        let mut args = args.to_vec();
        args.extend(["--config", &path]);
        let said = line(bare(&args), 2).await;
        assert!(said.starts_with(expected), "{text:?} {args:?}: {said}");
    }
}

/// Goal: the environment's settings are named like the file's; flags win over it.
#[tokio::test]
async fn wrong_environment() {
    for (name, value, args, expected) in [
        ("ONCEBOX_DATABASE_URL", "sqlite://x", &["migrate"][..], "database_url: must begin with postgres://"),
        ("ONCEBOX_DATABASE_URL", "postgres://h", &["migrate", "--database-url", "x"], "database_url: must begin"),
        ("ONCEBOX_LISTEN", "nowhere", &["serve"], "listen: \"nowhere\" is no address:port"),
        ("ONCEBOX_LOG", "oncebox=loud", &["migrate"], "log: \"oncebox=loud\""),
        ("ONCEBOX_CONFIG", "/nowhere/oncebox.toml", &["relay"], "--config: /nowhere/oncebox.toml: No such file"),
    ] {
        let mut command = bare(args);
        command.env(name, value);
        let said = line(command, 2).await;
        assert!(said.starts_with(expected), "{name}={value}: {said}");
    }
    let said = line(bare(&["relay", "--log", "a=b=c"]), 2).await;
    assert!(said.starts_with("log: \"a=b=c\""), "{said}");
    let said = line(bare(&["relay", "--config", "/"]), 2).await;
    assert!(said.starts_with("--config: /: "), "{said}");
    let binary = folder("config").join("binary.toml");
    std::fs::write(&binary, [0xff, 0xfe]).unwrap();
    let said = line(bare(&["relay", "--config", binary.to_str().unwrap()]), 2).await;
    assert!(said.starts_with("--config: "), "{said}");
}

/// Goal: a database that cannot be reached or refuses is exit 1 and says which refusal.
#[tokio::test]
async fn databases_that_refuse() {
    let postgres = Postgres::attach(shared_nodes()).await.expect("the shared Postgres runs");
    for args in [&["migrate"][..], &["migrate", "--status"]] {
        let mut command = bare(args);
        command.env("ONCEBOX_DATABASE_URL", "postgres://u:se-cret@127.0.0.1:1/d");
        let said = line(command, 1).await;
        assert!(said.contains("Connection refused"), "{said}");
    }
    // A role that needs a password, as the server's trust in everyone else does not ask for one.
    let role = unique("guarded");
    let lab = Lab::shared().await;
    lab.sql(&format!("create role {role} login password 'right'")).await;
    let file: String = sqlx::query_scalar("show hba_file").fetch_one(&mut lab.connect().await).await.unwrap();
    let rules = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("host all {role} 127.0.0.1/32 scram-sha-256\n{rules}")).unwrap();
    lab.sql("select pg_reload_conf()").await;
    let guarded = lab.database_url.replace("oncebox@", &format!("{role}:se-cret@"));
    crate::support::eventually("the rule is in force", || async { sqlx::PgConnection::connect(&guarded).await.err() })
        .await;
    let consume = config(CONSUMER);
    for args in [&["migrate"][..], &["relay"], &["consume", "--config", &consume], &["run", "--listen", "127.0.0.1:0"]]
    {
        for (url, expected) in [
            (guarded.as_str(), format!("password authentication failed for user \"{role}\"")),
            (&postgres.url("nowhere"), "database \"nowhere\" does not exist".to_owned()),
            (&postgres.url("postgres").replace("oncebox@", "nobody@"), "role \"nobody\" does not exist".to_owned()),
        ] {
            let mut command = bare(args);
            command.env("ONCEBOX_DATABASE_URL", url).env("ONCEBOX_AMQP_URL", &lab.amqp_url);
            let said = line(command, 1).await;
            assert!(said.contains(&expected), "{args:?}: {said}");
        }
    }
}

/// Goal: a role without the rights is told which: exit 1.
#[tokio::test]
async fn roles_without_rights() {
    let lab = Lab::shared().await;
    let role = unique("powerless");
    lab.sql(&format!("create role {role} login in role oncebox_producer")).await;
    let consume = config(CONSUMER);
    for args in [&["relay"][..], &["consume", "--config", &consume]] {
        let mut command = lab.command(args);
        command.env("ONCEBOX_DATABASE_URL", lab.database_url.replace("oncebox@", &format!("{role}@")));
        let said = line(command, 1).await;
        assert!(said.contains("permission denied for table schema_history"), "{args:?}: {said}");
    }
}

/// Goal: a broker that refuses credentials or vhost is exit 1, from relay, consume and run, with the mend in the line.
#[tokio::test]
async fn brokers_that_refuse() {
    let lab = Lab::shared().await;
    handler(&lab).await;
    let consume = lab.config(CONSUMER);
    let vhostless = lab.amqp_url.replace(&lab.name, "nowhere");
    let wrong = lab.amqp_url.replace("guest:guest@", "guest:se-cret@");
    assert!(vhostless != lab.amqp_url && wrong != lab.amqp_url, "{}", lab.amqp_url);
    for args in [&["relay"][..], &["consume", "--config", &consume], &["run", "--listen", "127.0.0.1:0"]] {
        for (url, expected) in [(&wrong, "check name and password"), (&vhostless, "rabbitmqctl add_vhost nowhere")] {
            let mut command = lab.command(args);
            command.env("ONCEBOX_AMQP_URL", url);
            let said = line(command, 1).await;
            assert!(said.contains("refused the connection") && said.contains(expected), "{args:?}: {said}");
        }
    }
}

async fn handler(lab: &Lab) {
    lab.sql(
        "create schema app;
        create function app.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language sql as ''",
    )
    .await;
}

/// Goal: a queue or exchange that exists with other arguments is exit 1: the line names it and the mend.
#[tokio::test]
async fn topology_that_differs() {
    let lab = Lab::shared().await;
    handler(&lab).await;
    let broker = RabbitMq::new(RabbitMqOptions::new(&lab.amqp_url)).unwrap();
    // Order by key declares single active consumers; this one is without.
    let queue = QueueSpec {
        name: "taken".to_owned(),
        exchange: "oncebox".to_owned(),
        bindings: vec![],
        single_active_consumer: false,
        voids: false,
    };
    broker.subscribe(&queue, 1).await.unwrap().close().await;
    let consume = lab.config(&format!("{CONSUMER}queue = \"taken\"\n"));
    let said = line(lab.command(&["consume", "--config", &consume]), 1).await;
    assert!(said.starts_with("consumer \"billing\": queue \"taken\" exists with other arguments"), "{said}");
    assert!(said.contains("delete"), "no mend: {said}");
    let exchange = lab.config("exchange = \"amq.direct\"\n");
    let said = line(lab.command(&["relay", "--config", &exchange]), 1).await;
    assert!(
        said.starts_with("exchange \"amq.direct\" exists with other arguments") && said.contains("delete"),
        "{said}"
    );
}

/// Goal: a handler that is not there, or may not be called, is exit 1: the line names it and the mend.
#[tokio::test]
async fn handlers_that_cannot_be_called() {
    let lab = Lab::shared().await;
    let consume = lab.config(CONSUMER);
    let signature = "\"app\".\"on_message\"(uuid, text, jsonb, jsonb)";
    let missing = format!("consumer \"billing\": handler: the function {signature} does not exist");
    let said = line(lab.command(&["consume", "--config", &consume]), 1).await;
    assert!(said.starts_with(&missing), "{said}");
    // One with other arguments is another.
    lab.sql("create schema app; create function app.on_message(uuid, jsonb) returns void language sql as ''").await;
    let said = line(lab.command(&["run", "--config", &consume, "--listen", "127.0.0.1:0"]), 1).await;
    assert!(said.starts_with(&missing), "{said}");

    lab.sql("drop schema app cascade").await;
    handler(&lab).await;
    let role = unique("consumer");
    lab.sql(&format!(
        "create role {role} login in role oncebox_consumer; revoke all on function app.on_message from public"
    ))
    .await;
    let consume_as_role = || {
        let mut command = lab.command(&["consume", "--config", &consume]);
        command.env("ONCEBOX_DATABASE_URL", lab.database_url.replace("oncebox@", &format!("{role}@")));
        command
    };
    let said = line(consume_as_role(), 1).await;
    assert!(said.starts_with("consumer \"billing\": handler: "), "{said}");
    assert!(said.contains("permission denied for schema app"), "{said}");
    lab.sql(&format!("grant usage on schema app to {role}")).await;
    let said = line(consume_as_role(), 1).await;
    let expected = format!(
        "consumer \"billing\": handler: role {role} may not call {signature}: grant execute on function {signature} to {role}"
    );
    assert_eq!(said, expected);

    for (declared, wrong) in [
        (
            "alter function app.on_message(uuid, text, jsonb, jsonb) stable",
            "is declared stable or immutable: a handler writes, so make it volatile",
        ),
        (
            "drop function app.on_message(uuid, text, jsonb, jsonb);
            create function app.on_message(uuid, text, jsonb, jsonb) returns setof int language sql as 'select 1'",
            "returns a set: a handler returns void",
        ),
    ] {
        lab.sql(declared).await;
        let said = line(lab.command(&["consume", "--config", &consume]), 1).await;
        assert_eq!(said, format!("consumer \"billing\": handler: the function {signature} {wrong}"));
    }
}

/// Goal: a port in use is exit 1, and the line names it.
#[tokio::test]
async fn ports_in_use() {
    let lab = Lab::shared().await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    for command in ["serve", "run"] {
        let said = line(lab.command(&[command, "--listen", &address]), 1).await;
        assert!(said.starts_with(&format!("listen: cannot listen on {address}: Address already in use")), "{said}");
    }
}
