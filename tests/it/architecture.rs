//! Goal: the rules of the house that a compiler does not check: imports go downward, files stay short, and each
//! foreign library stays in its room.

use crate::statements::sources;

/// Levels of the modules; a module may use those of lower levels only.
const LEVELS: &[&[&str]] = &[
    &["message", "backoff", "failpoints", "ranges", "topic", "http"],
    &["db"],
    &["migrate", "outbox", "inbox", "broker"],
    &["relay", "consumer", "janitor", "parked", "replay", "status", "streams", "saga"],
    &["audit"],
    &["api", "config", "doctor", "telemetry", "supervise", "node"],
    &["cli", "demo", "bench"],
];

/// What is allowed beyond that, as user and used: a wrong filter is an error of the configuration, and the command
/// line is what starts the demo and the benchmarks.
const EXCEPTIONS: &[(&str, &str)] = &[("telemetry", "config"), ("cli", "demo"), ("cli", "bench")];

/// Longest file, in lines before its tests.
const MAX_LINES: usize = 600;

fn level(module: &str) -> usize {
    let found = LEVELS.iter().position(|modules| modules.contains(&module));
    found.unwrap_or_else(|| panic!("{module} has no level: give it one in LEVELS"))
}

/// `src/relay/reader.rs` and `src/relay.rs` are `relay`.
fn module(file: &str) -> &str {
    let path = file.strip_prefix("src/").expect("sources are below src");
    path.split('/').next().expect("split gives one at least").trim_end_matches(".rs")
}

/// Code without its comments.
fn uncommented(code: &str) -> String {
    code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Modules that follow `crate::`, alone or in braces.
fn used(code: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = Vec::new();
    for (at, path) in code.match_indices("crate::") {
        let rest = &code[at + path.len()..];
        match rest.strip_prefix('{') {
            None => found.push(word(rest)),
            Some(list) => {
                let (mut depth, mut start) = (0, true);
                for (i, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => start = true,
                        c if start && !c.is_whitespace() => {
                            found.push(word(&list[i..]));
                            start = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    found
}

/// Goal: imports go downward; a room knows nothing of its users.
#[test]
fn imports_go_downward() {
    assert_eq!(used("use crate::{db::{self, A}, outbox}; crate::relay::x()"), ["db", "outbox", "relay"]);
    let mut checked = 0;
    for (file, code) in sources() {
        let user = module(&file);
        if matches!(user, "lib" | "main") {
            continue;
        }
        for used in used(&uncommented(&code)) {
            checked += 1;
            let allowed = user == used || level(&used) < level(user) || EXCEPTIONS.contains(&(user, used.as_str()));
            assert!(allowed, "{file} (level {}) uses {used} (level {})", level(user), level(&used));
        }
    }
    assert!(checked > 60, "only {checked} imports found: does the search still see them?");
}

/// Goal: no file grows beyond what one reads at a sitting.
#[test]
fn files_stay_short() {
    for (file, code) in sources() {
        let lines = code.lines().count();
        assert!(lines <= MAX_LINES, "{file} has {lines} lines without its tests: split it");
    }
}

/// Goal: nothing outside tests panics for want of an error.
#[test]
fn nothing_unwraps() {
    for (file, code) in sources() {
        for call in [".unwrap()", ".unwrap_err()", "todo!(", "unimplemented!(", "dbg!("] {
            assert!(!uncommented(&code).contains(call), "{file}: {call}");
        }
    }
}

/// Goal: each foreign library is used in one place, where it could be replaced.
#[test]
fn libraries_stay_in_their_rooms() {
    for (library, rooms) in [
        ("lapin", &["src/broker/rabbitmq/", "src/bench/"][..]),
        ("amq_protocol", &["src/broker/rabbitmq/"]),
        ("axum", &["src/api/", "src/cli/"]),
        ("hyper", &["src/http.rs", "src/api/server.rs"]),
        ("hyper_util", &["src/http.rs", "src/api/server.rs"]),
        ("hyper_rustls", &["src/http.rs"]),
        ("http_body_util", &["src/http.rs"]),
        ("refinery", &["src/migrate.rs"]),
        ("refinery_core", &["src/migrate.rs"]),
        ("clap", &["src/cli/", "src/main.rs", "src/demo/", "src/bench/"]),
        ("anyhow", &["src/cli/", "src/demo/", "src/bench/"]),
        ("toml", &["src/config.rs"]),
        ("serde_path_to_error", &["src/api/"]),
        ("yaml_serde", &["src/saga/definition/text.rs"]),
    ] {
        let mut found = false;
        for (file, code) in sources() {
            let code = uncommented(&code);
            let uses = code
                .match_indices(&format!("{library}::"))
                .any(|(at, _)| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':'));
            found |= uses;
            assert!(!uses || rooms.iter().any(|room| file.starts_with(room)), "{file} uses {library}");
        }
        assert!(found, "{library} is used nowhere: does the search still see it?");
    }
}

/// Goal: the client's wait for confirms hides nacks: nothing calls it.
#[test]
fn nothing_waits_for_confirms_blindly() {
    for (file, code) in sources() {
        assert!(!uncommented(&code).contains("wait_for_confirms"), "{file}");
    }
}
