//! Goal: the benchmarks of the flow come to their end on any servers, count what they say they count, and leave nothing.
//!
//! Numbers are tiny and never judged: how fast anything is, is no test.

use crate::support::{Lab, folder};
use serde_json::Value;
use std::path::Path;

/// Runs a benchmark on the lab's servers and gives its measurement.
async fn bench(lab: &Lab, args: &[&str]) -> Value {
    let (ok, report, said) = run(lab, args).await;
    assert!(ok, "bench {args:?}:\n{said}");
    let measurements = report["measurements"].as_array().expect("measurements");
    assert_eq!(measurements.len(), 1, "{report}");
    assert_eq!(measurements[0]["name"], args[0]);
    measurements[0].clone()
}

async fn run(lab: &Lab, args: &[&str]) -> (bool, Value, String) {
    let folder = folder("bench");
    let (json, page) = (folder.join("figures.json"), folder.join("page.html"));
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let mut all = vec!["bench".to_owned(), "--json".to_owned(), text(&json), "--page".to_owned(), text(&page)];
    all.extend(args.iter().map(|arg| (*arg).to_owned()));
    let args: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut command = tokio::process::Command::from(lab.command(&args));
    let output = command.kill_on_drop(true).output().await.expect("the program runs");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let report = std::fs::read(&json).ok().map(|bytes| serde_json::from_slice(&bytes).expect("valid JSON"));
    (output.status.success(), report.unwrap_or_default(), said)
}

fn section<'a>(measurement: &'a Value, title: &str) -> &'a Value {
    let sections = measurement["sections"].as_array().expect("sections");
    let found = sections.iter().find(|section| section["title"] == title);
    found.unwrap_or_else(|| panic!("no section {title:?}: {measurement}"))
}

/// Every side of a section has a value of each run, and none is out of this world.
fn figures(section: &Value, runs: usize, sides: usize) -> &Vec<Value> {
    let figures = section["figures"].as_array().expect("figures");
    assert_eq!(figures.len(), sides, "{section}");
    for figure in figures {
        let values = figure["runs"].as_array().expect("values");
        assert_eq!(values.len(), runs, "{figure}");
        assert!(values.iter().all(|value| value.as_f64().is_some_and(f64::is_finite)), "{figure}");
        assert!(figure["name"].is_string() && figure["role"].is_string() && figure["median"].is_f64(), "{figure}");
        let ratios = figure["ratios"].as_array().expect("ratios");
        // What stands beside nothing has no ratio, as with no lag in a quarter.
        let is_zero = |name: &Value| figures.iter().any(|f| f["name"] == *name && f["median"].as_f64() == Some(0.0));
        let has_ratio =
            |ratio: &Value| ratio["ratio"].is_number() || (is_zero(&ratio["to"]) && ratio["ratio"].is_null());
        assert!(ratios.iter().all(|ratio| ratio["to"].is_string() && has_ratio(ratio)), "{figure}");
    }
    figures
}

/// Goal: latency is given to the confirm and to the effect, each in turn with its floor and with an open transaction beside
/// it, for every message; and it is shown in its parts.
#[tokio::test(flavor = "multi_thread")]
async fn latency_stands_beside_its_floor() {
    let lab = Lab::shared().await;
    let args = ["latency", "--rate", "80", "--seconds", "1", "--keys", "5", "--open-transaction", "--runs", "2"];
    let measurement = bench(&lab, &args).await;
    for to in ["confirm", "effect"] {
        let figures = figures(section(&measurement, &format!("commit to {to} at 80/s")), 2, 3);
        assert_eq!(figures[2]["ratios"][0]["to"], figures[1]["name"], "{to}");
        for (side, figure) in figures.iter().enumerate() {
            let latency = &figure["latency_ms"];
            let at = |name: &str| latency[name].as_f64().unwrap_or_else(|| panic!("{name}: {figure}"));
            assert!(at("p50") <= at("p90") && at("p90") <= at("p99") && at("p99") <= at("max"), "{latency}");
            let bins = latency["histogram"].as_array().expect("a histogram");
            let counted: u64 = bins.iter().map(|bin| bin["count"].as_u64().expect("a count")).sum();
            assert_eq!(latency["samples"].as_u64(), Some(counted), "{latency}");
            // A second of the schedule, twice; the floor is measured as often as there is time.
            let expected = if side == 0 { 1..=120 } else { 150..=160 };
            assert!(expected.contains(&counted), "{counted} samples to {to}, side {side}");
            let extra = |name: &str| figure["extras"][name].as_f64().unwrap_or_else(|| panic!("{name}: {figure}"));
            assert!(extra("publish to confirm p50, ms") <= extra("publish to confirm p99, ms"), "{figure}");
            assert!(extra("commit p50, ms") > 0.0 && extra("writers late max, ms") >= 0.0, "{figure}");
            if side > 0 {
                assert!(extra("commit to publish p99, ms") > 0.0 && extra("plans a second") > 0.0, "{figure}");
            }
        }
    }
}

/// Goal: what a row adds is the difference of the sides of one run, for each number of connections, also beside a relay.
#[tokio::test(flavor = "multi_thread")]
async fn write_gives_what_a_row_adds() {
    let lab = Lab::shared().await;
    let pid = lab.postgres.pid().expect("it runs").to_string();
    let args =
        ["write", "--connections", "1,2", "--seconds", "1", "--relay", "--runs", "1", "--postgres-pid", pid.as_str()];
    let measurement = bench(&lab, &args).await;
    for connections in ["1 connections", "2 connections"] {
        let rates = figures(section(&measurement, connections), 1, 8);
        let title = format!("added to the business row, {connections}");
        let added = figures(section(&measurement, &title), 1, 7);
        let cpu = |figure: &Value| figure["cpu_s_per_100k"]["postgres"].as_f64().expect("the pid is known");
        for (with, added) in rates[1..].iter().zip(added) {
            assert_eq!(with["name"], added["name"]);
            let difference = cpu(with) - cpu(&rates[0]);
            assert!((added["median"].as_f64().unwrap() - difference).abs() < 1e-6, "{with} {added}");
        }
        assert!(rates.iter().all(|figure| figure["median"].as_f64().unwrap() > 0.0), "{rates:?}");
    }
}

/// Goal: without a pid there is no CPU of Postgres, and no difference is made up.
#[tokio::test(flavor = "multi_thread")]
async fn write_without_cpu_gives_rates_alone() {
    let lab = Lab::shared().await;
    let measurement = bench(&lab, &["write", "--connections", "1", "--seconds", "1", "--runs", "1"]).await;
    figures(section(&measurement, "1 connections"), 1, 7);
    assert_eq!(measurement["sections"].as_array().map(Vec::len), Some(1), "{measurement}");
}

/// Goal: each way of draining is measured on all messages, beside its ceilings, and batches beside one by one.
#[tokio::test(flavor = "multi_thread")]
async fn inbox_stands_beside_bare_sql_and_a_bare_client() {
    let lab = Lab::shared().await;
    let measurement =
        bench(&lab, &["inbox", "--messages", "205", "--workers", "2,4", "--batch", "20", "--runs", "1"]).await;
    for (what, sides) in [("effects of a row each", 7), ("effects that share ten rows", 5)] {
        let all = figures(section(&measurement, what), 1, sides);
        let subjects: Vec<&Value> = all.iter().filter(|figure| figure["role"] == "subject").collect();
        assert_eq!(subjects.len(), sides / 2, "{all:?}");
        assert!(
            subjects.iter().all(|figure| figure["ratios"][0]["ratio"].as_f64().is_some_and(|ratio| ratio > 0.0)),
            "{all:?}"
        );
        let compared = figures(section(&measurement, &format!("{what}: batches beside one by one")), 1, 2);
        assert_eq!(compared[1]["name"], "consumer, batches of up to 20");
        assert_eq!(compared[1]["ratios"][0]["to"], "consumer, 2 workers, one a transaction");
    }
}

/// Goal: the whole way loses and doubles nothing, leaves no dead row in the log while its ring turns, shows its curves,
/// and everything it made is gone afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn end_to_end_counts_everything_and_leaves_nothing() {
    let lab = Lab::own().await;
    let names = "select count(*) from pg_database";
    let before = lab.number(names).await;
    let args = ["end-to-end", "--seconds", "6", "--rate", "60", "--writers", "2", "--keys", "7", "--runs", "1"];
    let measurement = bench(&lab, &args).await;
    let flowed = figures(section(&measurement, "what flowed"), 1, 3);
    assert_eq!(flowed[2]["extras"]["lost or doubled"].as_f64(), Some(0.0));
    let dead = figures(section(&measurement, "dead rows, most at a time"), 1, 2);
    assert_eq!(dead[0]["median"].as_f64(), Some(0.0), "{dead:?}");
    assert!(dead[0]["extras"]["turns of the ring"].as_f64().is_some_and(|turns| turns >= 1.0), "{dead:?}");
    for title in ["lag of the relay: committed, not confirmed", "size of the log", "memory of this process"] {
        let quarters = figures(section(&measurement, title), 1, 2);
        assert!(
            quarters[1]["extras"]["growth a minute"].is_f64() && quarters[1]["extras"]["grows"].is_f64(),
            "{title}"
        );
    }
    // Vacuum has not been there.
    let journal = figures(section(&measurement, "size of the journal"), 1, 2);
    assert!(journal[1]["extras"]["grows"].is_null(), "{journal:?}");
    let plots = measurement["plots"].as_array().expect("plots");
    assert_eq!(plots.len(), 6, "{plots:?}");
    for line in plots.iter().flat_map(|plot| plot["lines"].as_array().expect("lines")) {
        assert!(line["points"].as_array().is_some_and(|points| points.len() >= 10), "{line}");
    }

    assert_eq!(lab.number(names).await, before, "a database is left");
    for kind in ["list_queues", "list_exchanges"] {
        let left = lab.rabbit.ctl(&[kind, "-p", &lab.name, "name"]).await.expect("rabbitmqctl");
        assert!(!left.contains("oncebox-bench"), "{kind}: {left}");
    }
}

/// Goal: flat out is no rate: writers are bound by the database alone, and what they wrote still arrives once.
#[tokio::test(flavor = "multi_thread")]
async fn end_to_end_runs_flat_out() {
    let lab = Lab::shared().await;
    let args =
        ["end-to-end", "--seconds", "2", "--flat-out", "--rate", "1", "--writers", "2", "--keys", "0", "--runs", "1"];
    let measurement = bench(&lab, &args).await;
    let flowed = figures(section(&measurement, "what flowed"), 1, 3);
    assert!(flowed[0]["median"].as_f64().is_some_and(|rate| rate > 5.0), "{flowed:?}");
    assert_eq!(flowed[2]["extras"]["lost or doubled"].as_f64(), Some(0.0));
}
