//! Goal: the conformance kit lets a right participant pass, leaves nothing behind, and names what is wrong with each wrong
//! one by the check made for it.

use crate::support::{Lab, Process};
use lapin::options::{QueueBindOptions, QueueDeclareOptions};
use serde_json::Value;
use std::process::Output;

const BARRIER: &str = "oncebox.saga_barrier((headers ->> 'oncebox-saga')::uuid, headers ->> 'oncebox-step',
    headers ->> 'oncebox-op', (headers ->> 'oncebox-epoch')::int)";

/// A shop whose handler has this body; sku `none` is sold out.
async fn shop(handler: &str) -> (Lab, Process, Process) {
    let lab = Lab::shared().await;
    lab.sql(&format!(
        "create schema shop;
        create table shop.stock (sku text primary key, left_over bigint not null check (left_over >= 0));
        insert into shop.stock values ('a', 1000), ('none', 0);
        create table shop.reservation (saga text, epoch text);
        create function shop.work(payload jsonb, headers jsonb) returns void language plpgsql as $$
        begin
            if headers ->> 'oncebox-op' = 'do' then
                update shop.stock set left_over = left_over - 1 where sku = payload ->> 'sku';
                insert into shop.reservation values (headers ->> 'oncebox-saga', headers ->> 'oncebox-epoch');
            else
                update shop.stock set left_over = left_over + 1 where sku = payload ->> 'sku';
                delete from shop.reservation
                where saga = headers ->> 'oncebox-saga' and epoch = headers ->> 'oncebox-epoch';
            end if;
        end $$;
        create function shop.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language plpgsql as $$ {handler} $$;"
    ))
    .await;
    let config = lab.config(
        "[[consumer]]\nname = \"shop\"\nqueue = \"shop\"\nbindings = [\"stock.*\"]\nhandler = { sql = \"shop.on_command\" }\n\
         max_attempts = 2\nbackoff_initial = \"10ms\"\n",
    );
    let consumer = lab.consume(&config).await;
    let relay = lab.relay().await;
    (lab, consumer, relay)
}

async fn kit(lab: &Lab, more: &[&str]) -> Output {
    let args = [
        "saga",
        "conformance",
        "--queue",
        "shop",
        "--topic",
        "stock.reserve",
        "--undo-topic",
        "stock.release",
        "--body",
        r#"{"sku": "a"}"#,
    ];
    let mut command = lab.command(&[&args[..], more].concat());
    // It needs no database.
    command.env_remove("ONCEBOX_DATABASE_URL");
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// What the kit says in JSON: name and verdict of each check, and all of it.
async fn findings(lab: &Lab, more: &[&str]) -> (Vec<(String, String)>, Value) {
    let output = kit(lab, &[&["--json"], more].concat()).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let report: Value = serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text} {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(output.status.code(), Some(if report["conforms"] == true { 0 } else { 1 }));
    let findings = report["findings"].as_array().unwrap().iter();
    let names = findings.map(|finding| {
        (finding["check"].as_str().unwrap().to_owned(), finding["verdict"].as_str().unwrap().to_owned())
    });
    (names.collect(), report)
}

/// The kit finds exactly these checks failed; what it saw in the first of them.
async fn fails(handler: &str, more: &[&str], expected: &[&str]) -> String {
    let (lab, _consumer, _relay) = shop(handler).await;
    let (findings, report) = findings(&lab, &[&["--timeout", "6s"], more].concat()).await;
    let failed: Vec<&str> =
        findings.iter().filter(|(_, verdict)| verdict == "fail").map(|(name, _)| name.as_str()).collect();
    assert_eq!(failed, expected, "{report:#}");
    let first = report["findings"].as_array().unwrap().iter().find(|finding| finding["verdict"] == "fail").unwrap();
    first["seen"].as_str().unwrap().to_owned()
}

/// Goal: a participant written as the README says passes every check, with and without a failing body; afterwards its
/// books are as before, only the message that is no JSON is parked, and the kit's queue is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_right_participant_conforms() {
    let (lab, _consumer, _relay) = shop(&format!(
        "begin
            if {BARRIER} <> 'run' then return; end if;
            begin
                perform shop.work(payload, headers);
                perform oncebox.saga_reply(headers, 'succeeded');
            exception when check_violation then
                perform oncebox.saga_reply(headers, 'failed', error => 'sold out');
            end;
        end"
    ))
    .await;
    for more in [&["--failing-body", r#"{"sku": "none"}"#, "--timeout", "30s"][..], &["--timeout", "30s"]] {
        let (findings, report) = findings(&lab, more).await;
        assert!(findings.len() == 10 && findings.iter().all(|(_, verdict)| verdict == "pass"), "{report:#}");
        assert_eq!((&report["conforms"], &report["left_done"]), (&Value::Bool(true), &Value::from(0)), "{report:#}");
        assert_eq!(lab.number("select left_over from shop.stock where sku = 'a'").await, 1_000);
        assert_eq!(lab.number("select count(*) from shop.reservation").await, 0);
    }
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held where state = 'parked'").await, 2);
    assert_eq!(lab.number("select count(*) from oncebox.inbox_held where state <> 'parked'").await, 0);
    let queues = lab.rabbit.ctl(&["list_queues", "-q", "-p", &lab.name, "name"]).await.unwrap();
    assert!(queues.contains("shop") && !queues.contains("conformance"), "{queues}");
    let text = kit(&lab, &["--timeout", "30s"]).await;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("pass  undo_before_do") && text.ends_with("10 passed, 0 failed\n"), "{text}");
}

/// Goal: without the barrier every repetition has an effect, and an undo undoes what never was.
#[tokio::test(flavor = "multi_thread")]
async fn a_participant_without_the_barrier_is_found() {
    let seen = fails(
        "begin perform shop.work(payload, headers); perform oncebox.saga_reply(headers, 'succeeded'); end",
        &[],
        &["do_twice", "do_twins", "undo_before_do", "undo_twice", "reordered", "late_do", "next_epoch"],
    )
    .await;
    assert!(seen.contains("2 final replies"), "{seen}");
}

/// Goal: a duplicate that is answered again is found, though its work is not done again.
#[tokio::test(flavor = "multi_thread")]
async fn a_participant_that_answers_duplicates_is_found() {
    fails(
        &format!(
            "declare v_answer text := {BARRIER};
            begin
                if v_answer = 'void' then return; end if;
                if v_answer = 'run' then perform shop.work(payload, headers); end if;
                perform oncebox.saga_reply(headers, 'succeeded');
            end"
        ),
        &[],
        &["do_twice", "do_twins", "undo_twice", "reordered", "next_epoch"],
    )
    .await;
}

/// Goal: a participant that commits its mark before its work is silent for ever when the work fails: found with a body
/// that makes it fail.
#[tokio::test(flavor = "multi_thread")]
async fn a_participant_that_marks_before_its_work_is_found() {
    let seen = fails(
        "declare v_answer text;
            begin
                create extension if not exists dblink with schema public;
                select answer into v_answer from public.dblink(
                    format('host=%s port=%s dbname=%s user=oncebox', split_part(
                        current_setting('unix_socket_directories'), ',', 1), current_setting('port'), current_database()),
                    format('select oncebox.saga_barrier(%L, %L, %L, %s)', headers ->> 'oncebox-saga',
                        headers ->> 'oncebox-step', headers ->> 'oncebox-op', headers ->> 'oncebox-epoch'))
                    as mark (answer text);
                if v_answer <> 'run' then return; end if;
                perform shop.work(payload, headers);
                perform oncebox.saga_reply(headers, 'succeeded');
            end",
        &["--failing-body", r#"{"sku": "none"}"#],
        &["next_epoch"],
    )
    .await;
    assert!(seen.contains("no reply to do in epoch 1 within 6s"), "{seen}");
}

/// Goal: a participant that passes over an undo that came first, and then does what was already undone, is found.
#[tokio::test(flavor = "multi_thread")]
async fn a_participant_that_ignores_early_undos_is_found() {
    let seen = fails(
        &format!(
            "begin
                if headers ->> 'oncebox-op' = 'undo' and not exists (
                    select from shop.reservation as r
                    where r.saga = headers ->> 'oncebox-saga' and r.epoch = headers ->> 'oncebox-epoch') then
                    return;
                end if;
                if {BARRIER} <> 'run' then return; end if;
                perform shop.work(payload, headers);
                perform oncebox.saga_reply(headers, 'succeeded');
            end"
        ),
        &[],
        &["undo_before_do"],
    )
    .await;
    assert!(seen.contains("no reply to undo in epoch 1") && seen.contains("the do succeeded after its undo"), "{seen}");
}

/// Goal: a reply under another epoch than its command's is found.
#[tokio::test(flavor = "multi_thread")]
async fn a_participant_with_a_wrong_epoch_is_found() {
    let handler = |epoch: &str| {
        format!(
            "begin
                if {BARRIER} <> 'run' then return; end if;
                perform shop.work(payload, headers);
                perform oncebox.saga_reply(headers || jsonb_build_object('oncebox-epoch', {epoch}), 'succeeded');
            end"
        )
    };
    fails(&handler("1"), &[], &["next_epoch"]).await;
    let (lab, _consumer, _relay) = shop(&handler("(headers ->> 'oncebox-epoch')::int + 1")).await;
    let (findings, report) = findings(&lab, &["--timeout", "6s"]).await;
    assert_eq!(findings[0], ("plain_do".to_owned(), "fail".to_owned()), "{report:#}");
    let seen = report["findings"][0]["seen"].as_str().unwrap();
    assert!(seen.contains("a reply to do in epoch 2, which was never sent"), "{seen}");
    assert_eq!(findings.iter().filter(|(_, verdict)| verdict == "skipped").count(), 0);
}

/// Goal: `retry` and `in_progress` are taken as an orchestrator takes them.
#[tokio::test(flavor = "multi_thread")]
async fn a_participant_may_ask_for_another_attempt() {
    let (lab, _consumer, _relay) = shop(&format!(
        "begin
            if {BARRIER} <> 'run' then return; end if;
            if headers ->> 'oncebox-attempt' = '1' then
                perform oncebox.saga_reply(headers, 'in_progress');
                perform oncebox.saga_reply(headers, 'retry', error => 'busy');
                return;
            end if;
            perform shop.work(payload, headers);
            perform oncebox.saga_reply(headers, 'succeeded');
        end"
    ))
    .await;
    let (findings, report) = findings(&lab, &["--timeout", "30s"]).await;
    for check in ["plain_do", "do_undo", "undo_before_do", "next_epoch", "malformed_body"] {
        assert!(findings.contains(&(check.to_owned(), "pass".to_owned())), "{check}: {report:#}");
    }
}

/// Goal: a queue that nobody serves, one that does not exist, topics that nothing is bound for, and bad arguments are told
/// apart, each in one line.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_checked_is_told() {
    let lab = Lab::shared().await;
    let error = |output: Output| {
        assert_eq!(output.stdout, b"");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).trim().to_owned())
    };
    let (code, text) = error(kit(&lab, &[]).await);
    assert!(code == Some(1) && text.contains("the exchange \"oncebox\" does not exist"), "{text}");

    let connection = lapin::Connection::connect(&lab.amqp_url, Default::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    drop(crate::support::wire::Tap::bound(&lab, "tap", &["nothing"]).await);
    let (code, text) = error(kit(&lab, &[]).await);
    assert!(code == Some(1) && text.contains("the queue \"shop\" does not exist"), "{text}");

    // A classic queue, as another stack would declare it.
    channel.queue_declare("shop".into(), QueueDeclareOptions::default(), Default::default()).await.unwrap();
    let (code, text) = error(kit(&lab, &[]).await);
    assert!(code == Some(1) && text.contains("\"stock.reserve\"") && text.contains("no queue is bound"), "{text}");

    let bind = channel.queue_bind(
        "shop".into(),
        "oncebox".into(),
        "stock.*".into(),
        QueueBindOptions::default(),
        Default::default(),
    );
    bind.await.unwrap();
    let (findings, report) = findings(&lab, &["--timeout", "500ms"]).await;
    assert_eq!(findings[0].1, "fail");
    assert!(findings[1..].iter().all(|(_, verdict)| verdict == "skipped"), "{report:#}");
    assert!(report["findings"][0]["seen"].as_str().unwrap().starts_with("no reply to do in epoch 1 within 500ms"));

    let long = "x".repeat(101);
    for (name, wrong) in [("--step", long.as_str()), ("--timeout", "soon"), ("--failing-body", "{"), ("--queue", "")] {
        let (code, text) = error(kit(&lab, &[name, wrong]).await);
        assert!(code == Some(2) && text.contains(name), "{name}: {code:?} {text}");
    }
}
