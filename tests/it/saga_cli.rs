//! Goal: `oncebox saga …` shows what is, does what an operator asks with who and why in the history, and says in one line
//! what it cannot do; `status`, `/metrics`' look and `doctor` speak of sagas.

use crate::support::saga::{Driven, ORDER, define, operator};
use crate::support::{LIMIT, Lab, Process, folder};
use oncebox::saga::state::{Event, Op, Outcome};
use oncebox::status;
use serde_json::{Value, json};
use sqlx::Executor;
use std::process::Command;
use uuid::Uuid;

/// Exit code, stdout and stderr.
async fn saga(lab: &Lab, args: &[&str]) -> (i32, String, String) {
    let mut command = lab.command(&[&["saga"], args].concat());
    command.env("USER", "olga");
    run(command).await
}

async fn run(mut command: Command) -> (i32, String, String) {
    command.env("ONCEBOX_LOG", "warn").env_remove("COLUMNS");
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("ends").expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code().expect("no signal"), text(output.stdout), text(output.stderr))
}

async fn json_of(lab: &Lab, args: &[&str]) -> Value {
    let (code, out, err) = saga(lab, args).await;
    assert_eq!(code, 0, "{args:?}: {out}{err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

/// Goal: definitions from a file: every fault with its pointer and exit 2, without a database; stored once, shown, removed.
#[tokio::test]
async fn saga_definitions_are_kept_by_command() {
    let lab = Lab::shared().await;
    let dir = folder("definitions");
    let file = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    };
    let good = file("good.yaml", ORDER);
    let bad = file("bad.yaml", "name: order\nversion: 0\nsteps:\n- {id: a, do: {topic: t}, timout: 5s}\n");
    let mut without = Command::new(crate::support::ONCEBOX);
    without.args(["saga", "validate", &good]).env_remove("ONCEBOX_DATABASE_URL");
    assert_eq!(
        run(without).await,
        (0, "order version 3: reserve, label, approve, charge, ship\n".to_owned(), String::new())
    );
    for verb in ["validate", "define"] {
        let (code, _, err) = saga(&lab, &[verb, &bad]).await;
        assert_eq!(code, 2, "{err}");
        assert!(err.contains("/version: ") && err.contains("/steps/0/timout: ") && err.lines().count() >= 2, "{err}");
        let (code, out, _) = saga(&lab, &[verb, &bad, "--json"]).await;
        let faults: Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!((code, &faults["valid"], &faults["faults"][0]["pointer"]), (2, &json!(false), &json!("/version")));
    }
    assert_eq!(saga(&lab, &["define", &good]).await.1, "defined order version 3\n");
    assert_eq!(saga(&lab, &["define", &good]).await.1, "order version 3 is there already, the same\n");
    let other = file("other.yaml", &ORDER.replace("10m", "11m"));
    let (code, _, err) = saga(&lab, &["define", &other]).await;
    assert!(code == 1 && err.contains("with another document"), "{err}");
    let (_, table, _) = saga(&lab, &["definitions"]).await;
    assert!(table.contains("order") && table.contains("olga"), "{table}");
    let document = json_of(&lab, &["definitions", "order", "--version", "3"]).await;
    assert_eq!(document["steps"][0]["do"]["topic"], "stock.reserve");
    saga(&lab, &["start", "order", "A-1"]).await;
    let (code, _, err) = saga(&lab, &["undefine", "order", "3"]).await;
    assert!(code == 1 && err.contains("in use by 1 saga"), "{err}");
    assert_eq!(saga(&lab, &["undefine", "order", "4"]).await.0, 1);
}

/// Goal: started from the command line, the same again is the same saga, arguments that are wrong are named; found by its
/// key; signalled; watched until its end.
#[tokio::test]
async fn sagas_are_started_signalled_and_watched_by_command() {
    let lab = Lab::shared().await;
    define(&lab, ORDER).await;
    let args = ["start", "order", "A/1", "--input", r#"{"sku": 7}"#, "--label", "region=eu", "--deadline", "10m"];
    let (code, out, err) = saga(&lab, &args).await;
    assert_eq!(code, 0, "{err}");
    let id: Uuid = out.trim().parse().expect("an id");
    assert_eq!(saga(&lab, &args).await.1, out, "the same again");
    for (args, code, words) in [
        (&["start", "order", "A/1", "--input", "{}"][..], 1, "was started otherwise"),
        (&["start", "odor", "A"], 1, "there is no definition \"odor\""),
        (&["start", "order", "B", "--input", "{"], 2, "--input: is no JSON"),
        (&["start", "order", "B", "--start-at", "soon"], 2, "--start-at: "),
        (&["start", "order", "B", "--deadline", "soon"], 2, "--deadline: "),
        (&["start", "order", "B", "--label", "x"], 2, "NAME=VALUE"),
        (&["signal", "order/A/1", "nonsense"], 1, "waits for a signal"),
        (&["signal", "order/C", "approved"], 1, "there is no saga order/C"),
        (&["show", "nobody"], 1, "names no saga"),
    ] {
        let (found, _, err) = saga(&lab, args).await;
        assert!(
            found == code && err.contains(words) && !err.contains("returned from database"),
            "{args:?}: {found} {err}"
        );
    }
    let (code, out, err) = saga(&lab, &["start", "order", "W", "--wait", "50ms"]).await;
    assert!(code == 1 && out.contains("scheduled") && err.contains("still scheduled"), "{out}{err}");

    let shown = json_of(&lab, &["show", "order/A/1", "--json"]).await;
    assert_eq!(
        (&shown["id"], &shown["input"], &shown["labels"]),
        (&json!(id), &json!({ "sku": 7 }), &json!({ "region": "eu" }))
    );
    assert_eq!(shown["allowed_actions"][0], "cancel", "{shown}");

    let mut command = lab.command(&["saga", "watch", "order/A/1"]);
    command.env("ONCEBOX_LOG", "warn");
    let mut watch = Process::spawn(command);
    watch.wait_for_log("created").await;
    let (code, _, err) = saga(&lab, &["watch", "order/A/1", "--timeout", "100ms"]).await;
    assert!(code == 1 && err.contains("still scheduled"), "{err}");
    let sent = saga(&lab, &["signal", "order/A/1", "approved", "--payload", r#"{"who": "ann"}"#]).await;
    assert_eq!(sent.0, 0, "{sent:?}");
    let mut driven = Driven::of(lab.connect().await, id);
    driven.complete().await;
    assert!(tokio::time::timeout(LIMIT, watch.end()).await.expect("it ends").success());
    let log = watch.log();
    assert!(log.contains("charge dispatched → succeeded") && log.trim_end().ends_with("completed"), "{log}");
    let (code, out, _) = saga(
        &lab,
        &[
            "start",
            "order",
            "A/1",
            "--input",
            r#"{"sku": 7}"#,
            "--label",
            "region=eu",
            "--deadline",
            "10m",
            "--wait",
            "30s",
            "--json",
        ],
    )
    .await;
    assert_eq!((code, serde_json::from_str(&out).ok()), (0, Some(json!({ "id": id, "status": "completed" }))));

    let by_label = json_of(&lab, &["list", "--label", "region=eu", "--json"]).await;
    assert_eq!((by_label["sagas"].as_array().map(Vec::len), &by_label["sagas"][0]["id"]), (Some(1), &json!(id)));
    let (code, out, _) = saga(&lab, &["list", "--status", "stuck"]).await;
    assert_eq!((code, out.as_str()), (0, "no saga matches\n"));
    assert_eq!(saga(&lab, &["list", "--status", "happy"]).await.0, 2);
    let (_, out, _) = saga(&lab, &["list", "--limit", "1"]).await;
    assert!(out.contains("the newest 1: --limit shows more"), "{out}");
}

/// A saga whose last step has failed for good after the pivot.
async fn stuck(lab: &Lab, key: &str) -> Driven {
    let mut saga = Driven::start(lab, key).await;
    saga.settle().await;
    saga.done("reserve").await;
    saga.signal().await;
    saga.done("label").await;
    saga.done("charge").await;
    saga.answer("ship", Op::Do, Outcome::Failed, None).await;
    saga
}

/// Goal: what needs an operator is listed with its reason and age, drawn as a tree, and moved by each verb; who and why
/// are in the history; what is illegal now is refused in one line that names the state and what is allowed.
#[tokio::test]
async fn operators_act_by_command() {
    let lab = Lab::shared().await;
    define(&lab, ORDER).await;
    let driven = stuck(&lab, "S-1").await;
    let (_, out, _) = saga(&lab, &["list", "--status", "stuck,compensating"]).await;
    for words in ["order/S-1", "reason", "age", "ship"] {
        assert!(out.contains(words), "{words} in\n{out}");
    }
    let (code, tree, err) = saga(&lab, &["show", "order/S-1", "--history"]).await;
    assert_eq!(code, 0, "{err}");
    for words in [
        "order/S-1  stuck, on its way forward",
        "├─ ✓ reserve",
        "│  └─ ↶ stock.release",
        "charge ◆",
        "└─ ✗ ship",
        "out of stock",
        "waits for   an operator: \"ship\" has failed: out of stock",
        "retry ship",
        "reply to ship: failed (out of stock)",
    ] {
        assert!(tree.contains(words), "{words} in\n{tree}");
    }
    assert!(!tree.contains('\x1b') && tree.lines().all(|line| line.chars().count() <= 100), "{tree}");

    for (args, code, words) in [
        (&["retry", "order/S-1"][..], 2, "--why"),
        (&["retry", "order/S-1", "--why", " "], 2, "--why: must not be empty"),
        (&["cancel", "order/S-1", "--why", "x"], 1, "(status stuck; allowed now: "),
        (&["resume", "order/S-1", "--why", "x"], 1, "retry, terminate, retry ship"),
        (&["skip", "order/S-1", "nothing", "--why", "x"], 1, "no step \"nothing\""),
        (&["pause", "order/S-1", "--why", "x", "--seq", "1"], 1, "has moved on"),
        (&["resolve", "order/S-1", "ship", "--outcome", "failed", "--output", "1", "--why", "x"], 2, "--output"),
    ] {
        let (found, out, err) = saga(&lab, args).await;
        assert!(found == code && err.contains(words), "{args:?}: {found} {out}{err}");
        assert!(code == 2 || err.lines().count() == 1, "{err}");
    }
    let changed = json_of(&lab, &["pause", "order/S-1", "--why", "let me see", "--by", "otto", "--json"]).await;
    assert_eq!(changed["paused"], true);
    assert_eq!(saga(&lab, &["resume", "order/S-1", "--why", "seen"]).await.0, 0);
    let (code, out, err) = saga(&lab, &["retry", "order/S-1", "ship", "--why", "stock came"]).await;
    assert!(code == 0 && out.contains("stuck → running") && out.contains("ship failed → "), "{out}{err}");
    let history = json_of(&lab, &["show", "order/S-1", "--history", "--json"]).await;
    let whos: Vec<(&str, &str)> = history["history"]
        .as_array()
        .expect("rows")
        .iter()
        .filter_map(|row| Some((row["detail"]["who"].as_str()?, row["detail"]["why"].as_str()?)))
        .collect();
    assert_eq!(whos, [("otto", "let me see"), ("olga", "seen"), ("olga", "stock came")]);
    let mut nobody = lab.command(&["saga", "pause", "order/S-1", "--why", "no $USER", "--json"]);
    nobody.env_remove("USER");
    assert_eq!(run(nobody).await.0, 0, "a container sets no $USER");
    drop(driven);

    for (key, args, status) in [
        (
            "S-2",
            &["resolve", "order/S-2", "ship", "--outcome", "succeeded", "--output", "{}", "--why", "by hand"][..],
            "completed",
        ),
        ("S-3", &["skip", "order/S-3", "ship", "--why", "no need"], "completed"),
        ("S-4", &["terminate", "order/S-4", "--why", "enough"], "terminated"),
    ] {
        let mut driven = stuck(&lab, key).await;
        let (code, out, err) = saga(&lab, args).await;
        assert_eq!(code, 0, "{out}{err}");
        assert_eq!(driven.settle().await.status.as_str(), status, "{args:?}");
    }
    let mut driven = Driven::start(&lab, "S-5").await;
    driven.settle().await;
    assert_eq!(saga(&lab, &["cancel", &driven.id.to_string(), "--why", "no money"]).await.0, 0);
    assert_eq!(driven.settle().await.status.as_str(), "compensating");

    let (code, out, err) = saga(&lab, &["verify", "order/S-1", "order/S-4"]).await;
    assert!(code == 0 && out.matches("all fits").count() == 2, "{out}{err}");
    let (code, out, err) = saga(&lab, &["verify", "--all-finished"]).await;
    assert_eq!((code, out.as_str()), (0, "3 sagas, 0 findings\n"), "{err}");
    let mut forger = lab.connect().await;
    forger
        .execute("set session_replication_role = replica; update oncebox.saga_step set status = 'skipped' where step = 'label'")
        .await
        .expect("forged");
    let (code, out, _) = saga(&lab, &["verify", "--all-finished"]).await;
    assert!(code == 1 && out.contains("state, step \"label\": status is"), "{out}");
    let found = run(lab.command(&["saga", "verify", "order/S-3", "--json"])).await;
    let found: Value = serde_json::from_str(&found.1).expect("JSON");
    assert_eq!(found["reports"][0]["findings"][0]["check"], "state", "{found}");
    assert_eq!(saga(&lab, &["verify"]).await.0, 2);
}

/// Goal: status, metrics' look and doctor tell how many sagas are where, how long stuck ones wait, and that nobody looks at
/// overdue ones; a role without rights is told so.
#[tokio::test]
async fn sagas_show_in_status_and_doctor() {
    let lab = Lab::shared().await;
    define(&lab, ORDER).await;
    let mut held = stuck(&lab, "S-1").await;
    held.happen(Event::Pause(operator()), None).await;
    Driven::start(&lab, "A-1").await.settle().await;
    Driven::start(&lab, "A-2").await.complete().await;
    let mut conn = status::connect(&lab.database_url, "test").await.expect("connects");
    let sagas = status::look(&mut conn).await.expect("looks").sagas;
    let count = |status: &str| sagas.count(status).count;
    assert_eq!((count("stuck"), count("running"), count("completed"), count("cancelled")), (1, 1, 1, 0));
    assert_eq!((sagas.by_definition["order"]["stuck"], sagas.paused.count), (1, 1));
    assert!(sagas.oldest_stuck_s.is_some_and(|age_s| (0.0..120.0).contains(&age_s)), "{sagas:?}");
    assert_eq!((sagas.overdue.count, sagas.is_neglected()), (0, false), "{sagas:?}");

    lab.sql(
        "set session_replication_role = replica;
        update oncebox.saga set next_due = now() - interval '1 minute' where business_key = 'A-1'",
    )
    .await;
    let sagas = status::look(&mut conn).await.expect("looks").sagas;
    assert!(sagas.is_neglected() && sagas.overdue.count == 1 && sagas.overdue_s > 59.0, "{sagas:?}");
    let (_, out, _) = run(lab.command(&["status"])).await;
    for words in
        ["sagas: 1 completed, 1 running, 1 stuck, 1 paused", "stuck: the oldest for", "no orchestrator is at work"]
    {
        assert!(out.contains(words), "{words} in\n{out}");
    }
    let mut doctor = lab.command(&["doctor", "--json"]);
    doctor.env_remove("ONCEBOX_AMQP_URL");
    let (code, out, _) = run(doctor).await;
    let findings: Vec<Value> = serde_json::from_str(&out).expect("JSON");
    let severity = |check: &str| {
        findings.iter().find(|finding| finding["check"] == check).unwrap_or_else(|| panic!("{check}: {out}"))["severity"].clone()
    };
    assert_eq!(code, 1, "{out}");
    assert_eq!(severity("database: saga orchestrator"), "unsafe");
    assert_eq!(severity("database: stuck sagas"), "warning");
    assert_eq!(severity("database: barrier_retention"), "ok");
}
