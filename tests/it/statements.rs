//! Goal: every SQL statement of the program fits the schema, and every one is found here: none hides in a call.

use crate::support::Lab;
use oncebox::{audit, cli, consumer, db, doctor, inbox, janitor, outbox, parked, relay, saga, status, streams};
use sqlx::{Executor, SqlSafeStr};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The lists of statements, by file.
fn lists() -> Vec<(&'static str, &'static [&'static str])> {
    let mut lists = vec![
        ("src/db.rs", db::STATEMENTS),
        ("src/audit/read.rs", audit::STATEMENTS),
        ("src/outbox/mod.rs", outbox::STATEMENTS),
        ("src/outbox/held.rs", outbox::held::STATEMENTS),
        ("src/outbox/journal.rs", outbox::journal::STATEMENTS),
        ("src/outbox/lease.rs", outbox::lease::STATEMENTS),
        ("src/outbox/look.rs", outbox::look::STATEMENTS),
        ("src/outbox/source.rs", outbox::source::STATEMENTS),
        ("src/outbox/pause.rs", outbox::pause::STATEMENTS),
        ("src/outbox/relays.rs", outbox::relays::STATEMENTS),
        ("src/outbox/unroutable.rs", outbox::unroutable::STATEMENTS),
        ("src/outbox/window.rs", outbox::window::STATEMENTS),
        ("src/inbox/mod.rs", inbox::STATEMENTS),
        ("src/inbox/held.rs", inbox::held::STATEMENTS),
        ("src/inbox/handler.rs", inbox::handler::STATEMENTS),
        ("src/janitor/inbox.rs", janitor::inbox::STATEMENTS),
        ("src/janitor/outbox.rs", janitor::outbox::STATEMENTS),
        ("src/outbox/history.rs", outbox::history::STATEMENTS),
        ("src/parked.rs", parked::STATEMENTS),
        ("src/cli/since.rs", cli::since::STATEMENTS),
        ("src/inbox/ledger.rs", inbox::ledger::STATEMENTS),
        ("src/doctor/database.rs", doctor::database::STATEMENTS),
        ("src/inbox/stream.rs", inbox::stream::STATEMENTS),
        ("src/outbox/void.rs", outbox::void::STATEMENTS),
        ("src/status.rs", status::STATEMENTS),
        ("src/saga/orchestrator.rs", saga::orchestrator::STATEMENTS),
        ("src/saga/replies.rs", saga::replies::STATEMENTS),
        ("src/saga/store.rs", saga::store::STATEMENTS),
        ("src/saga/store/act.rs", saga::store::act::STATEMENTS),
        ("src/saga/store/definitions.rs", saga::store::definitions::STATEMENTS),
        ("src/saga/participant.rs", saga::participant::STATEMENTS),
        ("src/saga/read.rs", saga::read::STATEMENTS),
        ("src/saga/read.rs", saga::read::STATEMENTS),
        ("src/saga/start.rs", saga::start::STATEMENTS),
        ("src/saga/store.rs", saga::store::STATEMENTS),
        ("src/saga/store/act.rs", saga::store::act::STATEMENTS),
        ("src/saga/store/definitions.rs", saga::store::definitions::STATEMENTS),
        ("src/streams.rs", streams::STATEMENTS),
        ("src/saga/participant.rs", saga::participant::STATEMENTS),
        ("src/saga/verify.rs", saga::verify::STATEMENTS),
        ("src/saga/verify/messages.rs", saga::verify::MESSAGE_STATEMENTS),
        ("src/status/sagas.rs", status::sagas::STATEMENTS),
        ("src/doctor/sagas.rs", doctor::sagas::STATEMENTS),
        ("src/cli/saga/mod.rs", cli::saga::STATEMENTS),
        ("src/cli/saga/list.rs", cli::saga::list::STATEMENTS),
        ("src/cli/saga/start.rs", cli::saga::start::STATEMENTS),
    ];
    let files = ["src/consumer/registration.rs", "src/consumer/worker.rs"];
    lists.extend(files.into_iter().zip(consumer::STATEMENTS.iter().copied()));
    lists.extend(relay::STATEMENTS.iter().map(|list| ("src/relay/schedule.rs", *list)));
    lists
}

/// Where statements may stand in the call: session settings and bookkeeping, and what works on private servers.
const FREE: &[&str] = &["src/db.rs", "src/migrate.rs", "src/demo/", "src/bench/", "src/node/"];

/// The statements that are made at run time: the calls of the handler that the config file names, for one and for many.
const MADE: &[(&str, &str)] = &[
    ("src/inbox/handler.rs", "AssertSqlSafe(self.call.as_str())"),
    ("src/inbox/handler.rs", "AssertSqlSafe(self.call_all.as_str())"),
    ("src/inbox/at_once.rs", "AssertSqlSafe(self.at_once.one.as_str())"),
    ("src/inbox/at_once.rs", "AssertSqlSafe(self.at_once.all.as_str())"),
];

/// Calls that take a statement as their first argument.
const CALLS: &[&str] =
    &["query", "query_as", "query_scalar", "query_with", "raw_sql", "execute", "prepare", "fetch_one"];

/// Source files, by path from the root of the checkout, without their unit tests.
pub fn sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("a folder of sources") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                walk(&path, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                into.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    walk(&root.join("src"), &mut paths);
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).expect("UTF-8");
            let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default().to_owned();
            (path.strip_prefix(root).expect("below the root").to_str().expect("UTF-8").replace('\\', "/"), code)
        })
        .collect()
}

/// What follows each call of `name(` or `name::<…>(`: the text from its first argument on.
fn arguments_of<'t>(code: &'t str, name: &str) -> Vec<&'t str> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices(name) {
        let before = code[..at].chars().next_back().unwrap_or(' ');
        let mut rest = &code[at + name.len()..];
        if before.is_alphanumeric() || before == '_' || code[..at].ends_with("fn ") {
            continue;
        }
        if let Some(generic) = rest.strip_prefix("::<") {
            rest = generic.split_once(">(").map_or("", |(_, after)| after);
        } else if let Some(plain) = rest.strip_prefix('(') {
            rest = plain;
        } else {
            continue;
        }
        found.push(rest.trim_start());
    }
    found
}

/// The constants an argument names: one, or one in each branch of `if … { A } else { B }`.
fn constants(argument: &str) -> Vec<&str> {
    if !argument.starts_with("if ") {
        return vec![word(argument)];
    }
    let choice = argument.split(')').next().unwrap_or_default();
    choice.split("{ ").skip(1).map(word).collect()
}

fn word(text: &str) -> &str {
    &text[..text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())]
}

/// Goal: Postgres accepts each statement against the schema as migrated.
#[tokio::test]
async fn every_statement_prepares() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let mut count = 0;
    for (file, list) in lists() {
        assert!(!list.is_empty(), "{file}");
        for statement in list {
            let prepared = conn.prepare((*statement).into_sql_str()).await.map(drop);
            prepared.unwrap_or_else(|error| panic!("{file}: {error}\n{statement}"));
            count += 1;
        }
    }
    assert!(count >= 27, "only {count} statements: has a list lost its entries?");
}

/// Goal: a statement is a constant of its file's list, never a literal in the call or a constant beside the list.
#[test]
fn every_statement_is_listed() {
    let listed: BTreeSet<&str> = lists().iter().map(|(file, _)| *file).collect();
    let mut calls = 0;
    for (file, code) in sources().iter().filter(|(file, _)| !FREE.iter().any(|free| file.starts_with(free))) {
        let list: Vec<&str> = code
            .split_once("STATEMENTS: &[&str] =")
            .map(|(_, rest)| {
                rest.trim_start()
                    .trim_start_matches("&[")
                    .split(']')
                    .next()
                    .unwrap_or_default()
                    .split(',')
                    .map(str::trim)
                    .collect()
            })
            .unwrap_or_default();
        assert_eq!(!list.is_empty(), listed.contains(file.as_str()), "{file}: its list and `lists` above");
        for name in CALLS {
            // Without an argument it is a URL's query.
            for argument in arguments_of(code, name).into_iter().filter(|argument| !argument.starts_with(')')) {
                assert!(!argument.starts_with('"') && !argument.starts_with("r#"), "{file}: {name}({argument:.60}");
                assert!(
                    !argument.starts_with("concat!") && !argument.starts_with("format!"),
                    "{file}: {name}({argument:.60}"
                );
                if name.starts_with("query") || *name == "raw_sql" {
                    let made = MADE.iter().any(|(at, made)| file == at && argument.starts_with(made));
                    assert!(
                        made || constants(argument).iter().all(|name| list.contains(name)),
                        "{file}: {name}({argument:.60} is not in STATEMENTS"
                    );
                    calls += 1;
                }
            }
        }
        assert!(!code.contains("query!(") && !code.contains("query_as!("), "{file}: ties users to our schema");
        let made = code.matches("AssertSqlSafe(").count();
        assert_eq!(made, MADE.iter().filter(|(at, _)| at == file).count(), "{file}: statements made at run time");
        // Every constant that speaks of the schema is listed.
        for part in code.split("\nconst ").skip(1).chain(code.split("\npub const ").skip(1)) {
            let (head, value) = part.split_once('=').unwrap_or_default();
            let value = value[..value.find(';').unwrap_or(0)].trim();
            // A name alone, as of a topic, is no statement.
            if head.contains("&str") && !head.contains("[&str]") && value.contains("oncebox.") && value.contains(' ') {
                assert!(list.contains(&word(part)), "{file}: {} is not in STATEMENTS", word(part));
            }
        }
    }
    assert!(calls >= 25, "only {calls} calls found: does the search still see them?");
}
