//! Goal: the processes answer as an orchestrator and an operator expect: health, readiness, the API's description,
//! and an end in order on SIGTERM.

use crate::support::{LIMIT, Lab, ONCEBOX, Process, eventually, folder};
use serde_json::{Value, json};
use sqlx::Executor;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// An idle process has nothing to wait for.
const QUICKLY: Duration = Duration::from_secs(3);

/// An answer over HTTP.
struct Answer {
    status: u16,
    content_type: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// One request over a connection of its own.
async fn request(address: &str, method: &str, path: &str) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let header = |name: &str| {
        let mut found = lines.clone().filter_map(|line| line.split_once(": "));
        found.find(|(header, _)| header.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned())
    };
    assert_eq!(header("content-length"), Some(body.len().to_string()), "{head}");
    Ok(Answer {
        status: status.unwrap_or_default(),
        content_type: header("content-type").unwrap_or_default(),
        body: body.to_owned(),
    })
}

async fn get(address: &str, path: &str) -> Answer {
    tokio::time::timeout(LIMIT, request(address, "GET", path)).await.expect("an answer in time").expect("an answer")
}

/// Starts `args` on a free port; the process and its address once it serves.
async fn serve(lab: &Lab, args: &[&str]) -> (Process, String) {
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let address = format!("127.0.0.1:{port}");
    let process = lab.spawn(&[args, &["--listen", &address]].concat());
    process.wait_for_log("serving").await;
    (process, address)
}

/// Goal: health, readiness and the description are served; what is not there is a problem, not an empty page.
#[tokio::test]
async fn serve_answers() {
    let lab = Lab::shared().await;
    let (mut process, address) = serve(&lab, &["serve"]).await;
    for path in ["/healthz", "/readyz"] {
        let answer = get(&address, path).await;
        assert_eq!((answer.status, answer.json()), (200, json!({ "status": "ok" })), "{path}");
        assert_eq!(answer.content_type, "application/json");
    }
    let description = get(&address, "/openapi.yaml").await;
    assert_eq!((description.status, description.content_type.as_str()), (200, "application/yaml"));
    assert_eq!(description.body, oncebox::api::openapi_yaml());
    for path in ["/", "/nowhere", "/healthz/", "/v2/nowhere?x=1"] {
        let answer = get(&address, path).await;
        assert_eq!((answer.status, answer.content_type.as_str()), (404, "application/problem+json"), "{path}");
        let problem = answer.json();
        assert_eq!((&problem["status"], &problem["title"]), (&json!(404), &json!("Not Found")));
        assert!(problem["type"].is_string() && problem["detail"].is_string(), "{problem}");
    }
    let answer = request(&address, "POST", "/healthz").await.unwrap();
    assert_eq!(answer.status, 405);

    // The schema goes while it runs, and comes back.
    let mut conn = lab.connect().await;
    conn.execute("alter schema oncebox rename to elsewhere").await.unwrap();
    let answer = get(&address, "/readyz").await;
    assert_eq!((answer.status, answer.content_type.as_str()), (503, "application/problem+json"));
    let problem = answer.json();
    assert_eq!((&problem["status"], &problem["title"]), (&json!(503), &json!("Service Unavailable")));
    assert_eq!(problem["detail"], "the database has no oncebox schema: run `oncebox migrate`");
    assert_eq!(get(&address, "/healthz").await.status, 200, "alive all the same");
    conn.execute("alter schema elsewhere rename to oncebox").await.unwrap();
    assert_eq!(get(&address, "/readyz").await.status, 200);
    let (status, took) = process.stop().await;
    assert!(status.success() && took < QUICKLY, "{status} after {took:?}: {}", process.log());
}

/// Goal: what the program says of its API is what the repository holds, byte for byte.
#[test]
fn openapi_is_the_file() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/openapi.yaml");
    let file = std::fs::read_to_string(&file).expect("made with: oncebox openapi > openapi/openapi.yaml");
    // It needs no configuration.
    let output = Command::new(ONCEBOX).arg("openapi").env_remove("ONCEBOX_DATABASE_URL").output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), file, "renew it: oncebox openapi > openapi/openapi.yaml");
    for path in ["/healthz:", "/readyz:"] {
        assert!(file.contains(path), "{path} is not described");
    }
}

/// Goal: servers that are held stop with their holder's caller, also if nobody reads what they say then.
#[test]
fn held_servers_stop_with_the_caller() {
    let dir = folder("held");
    let mut holder = Command::new(ONCEBOX);
    holder.args(["node", "hold", "--dir"]).arg(&dir);
    let mut holder =
        holder.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut line = String::new();
    BufReader::new(holder.stdout.take().expect("piped")).read_line(&mut line).expect("readable");
    assert_eq!(line.trim(), "ready");
    let text = std::fs::read_to_string(dir.join("postgres/data/postmaster.pid")).expect("Postgres runs");
    // A process that has ended has none, also if nobody has reaped it yet.
    let command_line = Path::new("/proc").join(text.lines().next().expect("its pid")).join("cmdline");
    let runs = || std::fs::read(&command_line).is_ok_and(|line| !line.is_empty());
    assert!(runs());
    drop((holder.stderr.take(), holder.stdin.take()));
    assert!(holder.wait().expect("it ends").success());
    assert!(!runs(), "Postgres still runs");
    assert!(!dir.exists(), "{} is still there", dir.display());
}

/// Goal: help and version are exit 0, on stdout.
#[test]
fn help_and_version() {
    for args in [&["--help"][..], &["help"], &["relay", "--help"], &["--version"], &["migrate", "-V"]] {
        let output = Command::new(ONCEBOX).args(args).output().unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty() && !output.stdout.is_empty(),
            "{args:?}: {output:?}"
        );
    }
    let version = Command::new(ONCEBOX).arg("--version").output().unwrap().stdout;
    assert_eq!(String::from_utf8(version).unwrap(), format!("oncebox {}\n", env!("CARGO_PKG_VERSION")));
    // Passwords of the environment do not show.
    let help = Command::new(ONCEBOX).arg("--help").env("ONCEBOX_DATABASE_URL", "postgres://u:se-cret@h/d").output();
    assert!(!String::from_utf8_lossy(&help.unwrap().stdout).contains("se-cret"));
}

const CONFIG: &str = "[[consumer]]\nname = \"app\"\nbindings = [\"t\"]\nhandler = { sql = \"app.on_message\" }\n";
const HANDLER: &str = "create schema app;
    create table app.effect (id uuid primary key);
    create function app.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language sql as 'insert into app.effect values (message_id)'";

/// Goal: SIGTERM and SIGINT end every process with exit 0, quickly, with its leases given back and its sessions gone.
#[tokio::test]
async fn signals_end_processes_in_order() {
    let lab = Lab::shared().await;
    lab.sql(HANDLER).await;
    let config = lab.config(CONFIG);
    for signal in ["TERM", "INT"] {
        let relay = lab.relay().await;
        let consumer = lab.consume(&config).await;
        let (server, _) = serve(&lab, &["serve"]).await;
        for mut process in [relay, consumer, server] {
            let began = std::time::Instant::now();
            process.signal(signal);
            let status = process.end().await;
            assert!(status.success() && began.elapsed() < QUICKLY, "{status} {:?}: {}", began.elapsed(), process.log());
            assert!(!process.log().contains("ERROR"), "{}", process.log());
        }
        assert_eq!(lab.number("select count(*) from oncebox.outbox_lease where owner is not null").await, 0);
    }
}

/// Goal: `run` is all of it in one process: a message goes through, the API answers, and one signal ends it all.
#[tokio::test]
async fn run_is_all_of_it() {
    let lab = Lab::shared().await;
    lab.sql(HANDLER).await;
    let config = lab.config(CONFIG);
    let (mut process, address) = serve(&lab, &["run", "--config", &config]).await;
    process.wait_for_log("consuming").await;
    assert_eq!(get(&address, "/readyz").await.status, 200);
    lab.sql("select oncebox.publish('t', '1')").await;
    crate::support::eventually_number(&mut lab.connect().await, "select count(*) from app.effect", 1).await;
    let (status, took) = process.stop().await;
    assert!(status.success() && took < QUICKLY, "{status} after {took:?}: {}", process.log());
    assert!(!process.log().contains("ERROR"), "{}", process.log());
    eventually("its sessions end", || async {
        let sessions = "select count(*) from pg_stat_activity where datname = current_database()
            and application_name like 'oncebox%'";
        (lab.number(sessions).await == 0).then_some(())
    })
    .await;
}

/// Goal: a process that waits for a server that is away ends on SIGTERM too.
#[tokio::test]
async fn waiting_processes_end_too() {
    let lab = Lab::shared().await;
    lab.sql(HANDLER).await;
    let config = lab.config(CONFIG);
    for args in
        [&["relay"][..], &["consume", "--config", &config], &["run", "--config", &config, "--listen", "127.0.0.1:0"]]
    {
        for (name, url, said) in [
            ("ONCEBOX_DATABASE_URL", "postgres://oncebox@127.0.0.1:1/x", "waiting for the database"),
            ("ONCEBOX_AMQP_URL", "amqp://127.0.0.1:1/%2f", "cannot reach the broker"),
        ] {
            let mut command = lab.command(args);
            command.env(name, url);
            let mut process = Process::spawn(command);
            process.wait_for_log(said).await;
            let (status, took) = process.stop().await;
            assert!(took < QUICKLY, "{args:?} without {name}: {status} after {took:?}: {}", process.log());
            assert!(status.success(), "{args:?} without {name}: {status}: {}", process.log());
        }
    }
}
