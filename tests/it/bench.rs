//! Goal: `oncebox bench` ends with figures beside their ceilings, whole in JSON and on the page, leaves nothing behind on
//! the servers, and refuses by name what it cannot measure. How fast anything is, no test asks.

use crate::support::{Lab, ONCEBOX, Process, folder};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// Runs the benchmark on a lab's servers, in a folder of its own.
fn bench(lab: &Lab, dir: &Path, args: &[&str]) -> Output {
    let mut command = lab.command(&["bench"]);
    command.args(args).current_dir(dir).output().expect("it runs")
}

/// Likewise; it must succeed. Gives what `--json` and the page hold.
fn report(lab: &Lab, args: &[&str]) -> (Value, String, String) {
    let dir = folder("bench");
    let output = bench(lab, &dir, &[args, &["--json", "figures.json", "--page", "page.html"]].concat());
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{args:?}: {stderr}");
    assert!(stderr.contains("page.html"), "where the page lies is not said: {stderr}");
    let json = std::fs::read_to_string(dir.join("figures.json")).expect("the JSON is written");
    let page = std::fs::read_to_string(dir.join("page.html")).expect("the page is written");
    assert_well_formed(&page);
    (serde_json::from_str(&json).expect("it is JSON"), page, stdout.into_owned())
}

/// Every tag is closed in order.
fn assert_well_formed(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    for piece in page.split('<').skip(1) {
        let (tag, _) = piece.split_once('>').unwrap_or_else(|| panic!("<{piece} never ends"));
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "{tag}"),
            None if tag.starts_with('!') || tag.ends_with('/') => {}
            None => open.push(tag.split_whitespace().next().expect("a name")),
        }
    }
    assert_eq!(open, Vec::<&str>::new());
}

/// The names of a section's sides, after every figure was checked for its fields.
fn sides(report: &Value, runs: usize) -> Vec<String> {
    for field in ["version", "date", "runs", "machine", "warnings", "measurements"] {
        assert!(!report[field].is_null(), "{field} is missing");
    }
    let section = &report["measurements"][0]["sections"][0];
    assert!(section["title"].is_string() && section["unit"].is_string() && section["better"].is_string(), "{section}");
    let figures = section["figures"].as_array().expect("figures");
    for figure in figures {
        let fields =
            ["name", "role", "runs", "median", "min", "max", "ratios", "cpu_s_per_100k", "latency_ms", "extras"];
        let object = figure.as_object().expect("an object");
        assert!(fields.iter().all(|field| object.contains_key(*field)), "{figure}");
        assert_eq!(figure["runs"].as_array().map(Vec::len), Some(runs), "{figure}");
        assert!(figure["median"].as_f64().is_some_and(|median| median > 0.0), "{figure}");
        for ratio in figure["ratios"].as_array().expect("ratios") {
            assert!(ratio["to"].is_string() && ratio["ratio"].as_f64().is_some_and(|ratio| ratio > 0.0), "{figure}");
        }
    }
    figures.iter().map(|figure| figure["name"].as_str().expect("a name").to_owned()).collect()
}

fn figure(report: &Value, side: usize) -> &Value {
    &report["measurements"][0]["sections"][0]["figures"][side]
}

/// Nothing of a benchmark is left on the lab's servers.
async fn assert_clean(lab: &Lab) {
    let left = "select count(*) from pg_database where datname like 'oncebox_bench_%'";
    assert_eq!(lab.number(left).await, 0, "databases are left");
    for what in ["list_queues", "list_exchanges"] {
        let listed = lab.rabbit.ctl(&[what, "-p", &lab.name, "name"]).await.expect("listed");
        assert!(!listed.contains("oncebox-bench"), "{what}: {listed}");
    }
}

/// Goal: the ceiling, lapin and oncebox's publisher stand side by side, also over several channels; and exchange and
/// queue kinds are compared. CPU of servers that are not ours is absent unless they are named, and that is said.
#[tokio::test(flavor = "multi_thread")]
async fn publish_shows_the_ceiling() {
    let lab = Lab::own().await;
    let small = ["publish", "--messages", "600", "--payload", "64", "--window", "50"];
    let (json, page, table) = report(&lab, &[&small[..], &["--channels", "3", "--keys", "4", "--runs", "2"]].concat());
    assert_eq!(sides(&json, 2), ["hand-framed AMQP", "lapin", "oncebox's publisher, from memory"]);
    assert_eq!(figure(&json, 2)["ratios"][0]["to"], "hand-framed AMQP");
    assert_eq!(figure(&json, 0)["role"], "ceiling");
    let cpu = &figure(&json, 1)["cpu_s_per_100k"];
    assert!(cpu["client"].is_number() && cpu["broker"].is_null() && cpu["postgres"].is_null(), "{cpu}");
    for text in [&page, &table] {
        assert!(text.contains("CPU of the broker is not measured") && text.contains("no median"), "{text}");
    }
    let pid = lab.rabbit.pid().expect("it runs").to_string();
    let matrix = ["--matrix", "--runs", "1", "--broker-pid", &pid];
    let (json, ..) = report(&lab, &[&small[..], &matrix].concat());
    let kinds = ["topic exchange, quorum queue", "direct exchange, quorum queue"];
    assert_eq!(sides(&json, 1)[..2], kinds);
    assert!(figure(&json, 3)["cpu_s_per_100k"]["broker"].is_number(), "{json}");
    for exchange in ["direct", "fanout", "default"] {
        let (json, ..) =
            report(&lab, &[&small[..], &["--exchange", exchange, "--queue", "classic", "--runs", "1"]].concat());
        assert_eq!(sides(&json, 1), ["hand-framed AMQP", "lapin"], "{exchange}");
    }
    assert_clean(&lab).await;
}

/// Goal: the relay stands beside the ceiling and a bare client, with an old snapshot beside none, and in backlogs of
/// several sizes; its CPU is Postgres' too.
#[tokio::test(flavor = "multi_thread")]
async fn relay_stands_beside_the_ceiling() {
    let lab = Lab::own().await;
    let pids = [lab.postgres.pid(), lab.rabbit.pid()].map(|pid| pid.expect("it runs").to_string());
    let common = ["--payload", "64", "--runs", "1", "--postgres-pid", &pids[0], "--broker-pid", &pids[1]];
    let args = ["relay", "--messages", "700", "--keys", "300", "--lanes", "2"];
    let (json, page, _) = report(&lab, &[&args[..], &common].concat());
    assert_eq!(sides(&json, 1), ["hand-framed AMQP", "lapin", "relay"]);
    let relay = figure(&json, 2);
    let to: Vec<&str> = relay["ratios"].as_array().expect("ratios").iter().filter_map(|r| r["to"].as_str()).collect();
    assert_eq!(to, ["hand-framed AMQP", "lapin"]);
    let cpu = relay["cpu_s_per_100k"].as_object().expect("CPU");
    assert!(cpu.values().all(Value::is_number), "{cpu:?}");
    assert!(page.contains("<svg") && !page.contains("<script"));

    let (json, ..) = report(&lab, &[&["relay", "--messages", "300", "--snapshot-held"][..], &common].concat());
    assert_eq!(sides(&json, 1), ["relay", "relay, a snapshot from before the backlog is held"]);

    let sizes = ["relay", "--backlog", "200,900", "--part", "400"];
    let (json, page, _) = report(&lab, &[&sizes[..], &common].concat());
    let names = json["measurements"][0]["sections"][0]["figures"].as_array().expect("figures");
    assert_eq!(
        names.iter().filter_map(|f| f["name"].as_str()).collect::<Vec<_>>(),
        ["backlog of 200", "backlog of 900"]
    );
    assert!(names.iter().all(|figure| figure["extras"]["msg/s"].is_number()), "{json}");
    assert!(page.contains("by the size of the backlog"), "{page}");
    assert_clean(&lab).await;
}

/// The program without any server of ours.
fn alone(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(ONCEBOX);
    for name in ["ONCEBOX_CONFIG", "ONCEBOX_DATABASE_URL", "ONCEBOX_AMQP_URL"] {
        command.env_remove(name);
    }
    command.args(["bench"]).args(args).current_dir(dir);
    command
}

/// Goal: without URLs it starts its own servers, with fsync on and their CPU measured, and they are gone afterwards. JSON
/// on stdout is nothing but JSON.
#[tokio::test(flavor = "multi_thread")]
async fn private_servers_come_and_go() {
    let dir = folder("bench");
    let servers = dir.join("servers");
    let args = ["relay", "--messages", "200", "--runs", "1", "--json", "-", "--dir", "servers"];
    let output = alone(&dir, &args).output().expect("it runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let json: Value = serde_json::from_slice(&output.stdout).expect("only JSON on stdout");
    sides(&json, 1);
    let fact = |name: &str| {
        let facts = json["machine"].as_array().expect("facts");
        facts.iter().find(|fact| fact["name"] == name).map(|fact| fact["value"].as_str().expect("text").to_owned())
    };
    assert_eq!((fact("Postgres").as_deref(), fact("Postgres fsync").as_deref()), (Some("private"), Some("on")));
    assert_eq!(fact("RabbitMQ").as_deref(), Some("private"));
    let cpu = figure(&json, 2)["cpu_s_per_100k"].as_object().expect("CPU");
    assert!(cpu.values().all(Value::is_number), "{cpu:?}");
    assert!(!servers.exists(), "the servers' folder is left");
    assert!(
        dir.join("oncebox-bench-relay.html").exists(),
        "outside of a checkout the page lies in the folder: {stderr}"
    );
}

/// Goal: told to stop, it takes its private servers with it.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_leaves_no_server() {
    let dir = folder("bench");
    let servers = dir.join("servers");
    let mut process = Process::spawn(alone(&dir, &["saga", "--dir", "servers"]));
    process.wait_for_log("starting a private RabbitMQ").await;
    let data = servers.join("postgres").canonicalize().expect("Postgres has its folder");
    let (status, _) = process.stop().await;
    assert_eq!(status.code(), Some(130), "{}", process.log());
    assert!(!servers.exists() && !data.exists(), "the servers' folders are left");
}

/// Goal: what cannot be measured as asked is refused before anything is, by its name and with exit code 2.
#[tokio::test(flavor = "multi_thread")]
async fn bad_options_are_refused_by_name() {
    let lab = Lab::shared().await;
    let dir = folder("bench");
    for (args, names) in [
        (&["relay", "--exchange", "direct"][..], "--exchange"),
        (&["relay", "--backlog", "100,200"], "--backlog"),
        (&["relay", "--backlog", "100", "--snapshot-held"], "--snapshot-held"),
        (&["relay", "--part", "100"], "--backlog"),
        (&["relay", "--runs", "0"], "--runs"),
        (&["relay", "--postgres-pid", "1"], "--postgres-pid"),
        (&["relay", "--page", "nowhere/page.html"], "--page"),
        (&["relay", "--json", "nowhere/figures.json"], "--json"),
        (&["relay", "--private", "--broker-pid", "1"], "--broker-pid"),
        (&["publish", "--payload", "3"], "--payload"),
        (&["publish", "--window", "0"], "--window"),
        (&["publish", "--matrix", "--queue", "classic"], "--queue"),
        (&["publish", "--exchange", "headers"], "--exchange"),
        (&["all", "--only", "relya"], "--only"),
    ] {
        let output = bench(&lab, &dir, args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(names), "{args:?} does not name {names}: {stderr}");
    }
}
