//! Goal: migrating works from many places at once, into any database of a cluster, with the rights it says it needs;
//! and no process runs on a schema it does not know.

use crate::support::{Lab, ONCEBOX, Process, connect, eventually_number, folder, number, shared_nodes, unique};
use oncebox::node::{Postgres, PostgresOptions};
use sqlx::{AssertSqlSafe, Executor, PgConnection};
use std::process::{Command, Output};

/// A database without a schema, on the shared server.
async fn empty() -> String {
    let postgres = Postgres::attach(shared_nodes()).await.expect("the shared Postgres runs");
    let name = unique("empty");
    postgres.create_database(&name).await.expect("a database");
    postgres.url(&name)
}

fn command(url: &str, args: &[&str]) -> Command {
    let mut command = Command::new(ONCEBOX);
    command.args(args).env("ONCEBOX_DATABASE_URL", url).env("ONCEBOX_AMQP_URL", "amqp://127.0.0.1:1/%2f");
    for name in ["ONCEBOX_CONFIG", "ONCEBOX_LISTEN", "ONCEBOX_LOG", "ONCEBOX_FAILPOINT"] {
        command.env_remove(name);
    }
    command
}

/// Runs `oncebox migrate` to its end.
fn migrate(url: &str, args: &[&str]) -> Output {
    command(url, &[&["migrate"], args].concat()).output().expect("the program starts")
}

fn stdout(output: &Output) -> Vec<String> {
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

/// Exit 1 and one line that holds `expected`.
async fn assert_fails(command: Command, expected: &str) {
    let mut process = Process::spawn(command);
    let status = process.end().await;
    let said = process.log();
    assert_eq!(status.code(), Some(1), "{said}");
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("oncebox: ")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].contains(expected), "{said}");
    assert!(said.lines().count() <= 2 && !said.contains("panicked"), "{said}");
}

/// Migrations as the files of this checkout name them.
fn files() -> Vec<String> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let mut names: Vec<(i32, String)> = std::fs::read_dir(folder)
        .expect("the folder of migrations")
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|file| {
            let (version, name) = file.trim_start_matches('V').trim_end_matches(".sql").split_once("__").unwrap();
            (version.parse().unwrap(), format!("V{version} {name}"))
        })
        .collect();
    names.sort();
    names.into_iter().map(|(_, name)| name).collect()
}

/// Goal: of eight processes that migrate an empty database at once all succeed, and each migration is applied once.
#[tokio::test]
async fn many_migrate_at_once() {
    let url = empty().await;
    let mut processes: Vec<Process> = (0..8).map(|_| Process::spawn(command(&url, &["migrate"]))).collect();
    let mut applied = Vec::new();
    for process in &mut processes {
        let status = process.end().await;
        assert!(status.success(), "{status}: {}", process.log());
        applied.extend(process.log().lines().filter_map(|line| Some(line.strip_suffix(": applied")?.to_owned())));
    }
    let mut expected = files();
    applied.sort();
    expected.sort();
    assert_eq!(applied, expected, "each once, by one of them");
    let mut conn = connect(&url).await;
    assert_eq!(number(&mut conn, "select count(*) from oncebox.schema_history").await, files().len() as i64);
    // No lock stays behind.
    assert_eq!(
        number(
            &mut conn,
            "select count(*) from pg_locks where locktype = 'advisory' and database =
        (select oid from pg_database where datname = current_database())"
        )
        .await,
        0
    );
    assert_eq!(stdout(&migrate(&url, &[])), ["the schema is up to date"]);
}

/// Goal: several databases of a new cluster, in which the roles are not made yet, migrate at once.
#[tokio::test]
async fn databases_of_a_new_cluster_migrate_at_once() {
    let cluster = Postgres::start(&folder("cluster"), PostgresOptions::default()).await.expect("Postgres starts");
    let mut processes = Vec::new();
    for _ in 0..4 {
        let name = unique("db");
        cluster.create_database(&name).await.expect("a database");
        for _ in 0..2 {
            processes.push(Process::spawn(command(&cluster.url(&name), &["migrate"])));
        }
    }
    for process in &mut processes {
        let status = process.end().await;
        assert!(status.success(), "{status}: {}", process.log());
    }
    let roles = "select count(*) from pg_roles where rolname like 'oncebox\\_%' and not rolcanlogin and not rolsuper";
    assert_eq!(number(&mut connect(&cluster.url("postgres")).await, roles).await, 5);
}

/// Goal: `--status` tells what is applied and changes nothing.
#[tokio::test]
async fn status_shows_and_changes_nothing() {
    let url = empty().await;
    let before = migrate(&url, &["--status"]);
    assert!(before.status.success());
    assert_eq!(stdout(&before), files().iter().map(|file| format!("{file}: not applied")).collect::<Vec<_>>());
    let mut conn = connect(&url).await;
    let schemas = "select count(*) from pg_namespace where nspname = 'oncebox'";
    assert_eq!(number(&mut conn, schemas).await, 0, "status made the schema");
    assert!(migrate(&url, &[]).status.success());
    let after = stdout(&migrate(&url, &["--status"]));
    assert_eq!(after.len(), files().len());
    for (line, file) in after.iter().zip(files()) {
        assert!(line.starts_with(&format!("{file}: applied 2")), "{line}");
    }
    // A later version is shown too.
    insert_newer(&url).await;
    let newer = stdout(&migrate(&url, &["--status"]));
    assert!(newer.last().unwrap().starts_with("V99 later: applied 2"), "{newer:?}");
}

async fn insert_newer(url: &str) {
    let newer = "insert into oncebox.schema_history (version, name, applied_on, checksum)
        select 99, 'later', applied_on, '1' from oncebox.schema_history where version = 1";
    connect(url).await.execute(newer).await.unwrap();
}

/// Goal: a migration that was changed after it was applied is refused by name, and nothing else is applied.
#[tokio::test]
async fn a_changed_migration_is_refused() {
    let url = empty().await;
    assert!(migrate(&url, &[]).status.success());
    let mut conn = connect(&url).await;
    conn.execute("update oncebox.schema_history set checksum = '1' where version = 2").await.unwrap();
    assert_fails(command(&url, &["migrate"]), "V2__outbox").await;
    assert_eq!(number(&mut conn, "select count(*) from oncebox.schema_history").await, files().len() as i64);
    // A row that is not readable is said to be so.
    conn.execute("update oncebox.schema_history set checksum = 'x' where version = 2").await.unwrap();
    assert_fails(command(&url, &["migrate"]), "oncebox.schema_history").await;
}

/// Goal: migrate, relay and consume refuse a schema that is newer than the program, one that is older, and none, in a
/// line that says what to do.
#[tokio::test]
async fn no_process_runs_on_a_schema_it_does_not_know() {
    let url = empty().await;
    let config = folder("config").join("oncebox.toml");
    std::fs::write(&config, "[[consumer]]\nname = \"c\"\nhandler = { sql = \"f\" }").unwrap();
    let config = config.to_str().unwrap().to_owned();
    let processes: [&[&str]; 2] = [&["relay"], &["consume", "--config", &config]];
    let last = files().len();
    for args in processes {
        assert_fails(command(&url, args), "the database has no oncebox schema: run `oncebox migrate`").await;
    }
    assert!(migrate(&url, &[]).status.success());
    let mut conn = connect(&url).await;
    conn.execute(AssertSqlSafe(format!("delete from oncebox.schema_history where version = {last}"))).await.unwrap();
    for args in processes {
        let expected =
            format!("the schema is at version {}, this program needs {last}: run `oncebox migrate`", last - 1);
        assert_fails(command(&url, args), &expected).await;
    }
    insert_newer(&url).await;
    let expected = format!("the schema is at version 99, this program knows {last}: run a newer oncebox");
    for args in processes {
        assert_fails(command(&url, args), &expected).await;
    }
    assert_fails(command(&url, &["migrate"]), &expected).await;
}

/// Goal: the owner of a database migrates it without being superuser: with CREATEROLE on a new cluster, and without
/// once the roles are there; without both, the failure says so and leaves nothing half-made.
#[tokio::test]
async fn an_owner_who_is_no_superuser_migrates() {
    let cluster = Postgres::start(&folder("cluster"), PostgresOptions::default()).await.expect("Postgres starts");
    let mut superuser = connect(&cluster.url("postgres")).await;
    for sql in [
        "create role maker login createrole",
        "create role plain login",
        "create database made owner maker",
        "create database owned owner plain",
        "create database prepared",
        "revoke all on database made, owned, prepared from public",
        "grant connect on database prepared to plain",
    ] {
        superuser.execute(sql).await.unwrap();
    }
    let url = |role: &str, database: &str| cluster.url(database).replace("oncebox@", &format!("{role}@"));
    assert_fails(command(&url("plain", "owned"), &["migrate"]), "permission denied to create role").await;
    let mut conn = connect(&url("plain", "owned")).await;
    let tables =
        "select count(*) from pg_class where relnamespace = 'oncebox'::regnamespace and relname <> 'schema_history'
        and relkind = 'r'";
    assert_eq!(number(&mut conn, tables).await, 0, "half a migration");
    for (role, database) in [("maker", "made"), ("plain", "owned")] {
        let url = url(role, database);
        let output = migrate(&url, &[]);
        assert!(output.status.success(), "{role}: {output:?}");
        assert_eq!(stdout(&output).len(), files().len());
        let mut conn = connect(&url).await;
        conn.execute("select oncebox.publish('t', '1')").await.unwrap();
        conn.execute("update oncebox.setting set dedup_window = '1 day'").await.unwrap();
        assert_eq!(stdout(&migrate(&url, &[])), ["the schema is up to date"]);
    }
    // A schema made beforehand by who may make schemas.
    connect(&cluster.url("prepared")).await.execute("create schema oncebox authorization plain").await.unwrap();
    for applied in [files().len(), 1] {
        let output = migrate(&url("plain", "prepared"), &[]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(stdout(&output).len(), applied);
    }
}

/// Goal: a migrated lab is what its processes expect.
#[tokio::test]
async fn the_library_migrates_once() {
    let lab = Lab::shared().await;
    assert_eq!(oncebox::migrate::migrate(&lab.database_url).await.unwrap(), []);
    oncebox::migrate::check(&mut lab.connect().await).await.unwrap();
}

/// A migration's SQL, by the start of its file's name.
fn sql_of(version: i32) -> String {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let file = std::fs::read_dir(folder)
        .expect("the folder of migrations")
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with(&format!("V{version}__")))
        .unwrap_or_else(|| panic!("V{version}"));
    std::fs::read_to_string(file).unwrap()
}

/// Goal: the functions behind `publish` are replaced while writers publish, one of them in a transaction that stays open:
/// none fails or waits for it, every committed message is in the log, settings are copied; only a snapshot from before
/// is sent back to begin anew.
#[tokio::test]
async fn publish_is_replaced_under_writers() {
    let url = empty().await;
    let mut conn = connect(&url).await;
    conn.execute("create schema oncebox; create table oncebox.schema_history (version int)").await.unwrap();
    for version in 1..17 {
        conn.execute(AssertSqlSafe(format!("begin; {}; commit", sql_of(version)))).await.expect("an older migration");
    }
    conn.execute(
        "update oncebox.setting set lanes = 4, payload_limit_bytes = 50; update oncebox.outbox_ring set slot = 2",
    )
    .await
    .unwrap();
    const PUBLISH: &str = "select oncebox.publish('t', to_jsonb(1), key => 'k')";
    let mut open = connect(&url).await;
    open.execute("begin").await.unwrap();
    open.execute(PUBLISH).await.unwrap();
    let mut old_snapshot = connect(&url).await;
    old_snapshot.execute("begin isolation level repeatable read; select 1").await.unwrap();

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let writers: Vec<_> = (0..3)
        .map(|_| {
            let (url, stopped) = (url.clone(), stopped.clone());
            tokio::spawn(async move {
                let mut conn = connect(&url).await;
                let mut published = 0;
                while !*stopped.borrow() {
                    conn.execute(PUBLISH).await.expect("publish");
                    published += 1;
                }
                published
            })
        })
        .collect();
    let mut observer = connect(&url).await;
    let rows = "select count(*) from oncebox.outbox";
    let beyond = async |observer: &mut PgConnection, least: i64| {
        eventually_number(observer, &format!("select (count(*) >= {least})::int::bigint from oncebox.outbox"), 1).await
    };
    beyond(&mut observer, 100).await;
    conn.execute("set lock_timeout = '10s'").await.unwrap();
    conn.execute(AssertSqlSafe(format!("begin; {}", sql_of(17)))).await.expect("V17 beside an open transaction");
    // Not committed yet: they go on with what they know.
    let so_far = number(&mut observer, rows).await;
    beyond(&mut observer, so_far + 100).await;
    conn.execute("commit").await.unwrap();
    let so_far = number(&mut observer, rows).await;
    beyond(&mut observer, so_far + 100).await;
    open.execute(PUBLISH).await.unwrap();
    open.execute("commit").await.unwrap();
    stop.send_replace(true);
    let mut published = 2;
    for writer in writers {
        published += writer.await.expect("a writer");
    }
    assert_eq!(number(&mut observer, rows).await, published);
    let lanes = "select count(distinct (lane, slot)) from oncebox.outbox where slot = 2";
    assert_eq!(number(&mut observer, lanes).await, 1, "one key in one lane, before and after");
    let error = old_snapshot.execute(PUBLISH).await.unwrap_err();
    assert_eq!(error.as_database_error().and_then(|error| error.code()).as_deref(), Some("40001"), "{error}");
    let too_large = "select oncebox.publish('t', to_jsonb(repeat('x', 50)))";
    conn.execute(too_large).await.expect_err("the limit of before");
}
