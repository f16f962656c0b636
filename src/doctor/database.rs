//! The database: settings that durability rests on, roles, schema, clock, and transactions left open.

use super::{Finding, Severity, sagas};
use crate::db::{self, DbError, SessionOptions};
use crate::migrate;
use sqlx::PgConnection;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest wait for one question.
const LIMIT: Duration = Duration::from_secs(10);
/// The clock is asked so often; the quickest answer counts.
const CLOCK_SAMPLES: usize = 5;
/// Most open transactions that are listed.
const LISTED: i64 = 20;
/// The oldest server whose features the schema uses: `begin atomic` bodies and multiranges.
const OLDEST_VERSION: i32 = 140_000;

const SERVER: &str = "
    select current_setting('server_version_num')::int, pg_is_in_recovery(), current_user::text,
        (select rolsuper from pg_roles where rolname = current_user), pg_has_role('pg_read_all_stats', 'usage'),
        (select count(*) from pg_stat_replication), current_database()::text";

// What a session of this role in this database starts with, whatever this session has set since.
const SETTINGS: &str = "
    select name, reset_val from pg_settings
    where name in ('fsync', 'full_page_writes', 'synchronous_commit', 'synchronous_standby_names', 'wal_level',
        'zero_damaged_pages', 'ignore_checksum_failure', 'autovacuum', 'statement_timeout', 'transaction_timeout',
        'idle_in_transaction_session_timeout', 'default_transaction_isolation', 'default_transaction_read_only')
    order by name";

const ROLES: &str = "
    select n.name, r.oid is not null, coalesce(pg_has_role(r.oid, 'usage'), false)
    from unnest(array['oncebox_producer', 'oncebox_consumer', 'oncebox_relay', 'oncebox_orchestrator',
        'oncebox_admin']) as n (name)
    left join pg_roles as r on r.rolname = n.name
    order by n.name";

const CLOCK: &str = "select (extract(epoch from clock_timestamp()) * 1000)::double precision";

const OPEN: &str = "
    select pid, extract(epoch from clock_timestamp() - xact_start)::double precision, coalesce(application_name, ''),
        coalesce(state, ''), coalesce(usename::text, ''), coalesce(datname::text, '')
    from pg_stat_activity
    where backend_type = 'client backend' and pid <> pg_backend_pid()
        and xact_start < clock_timestamp() - make_interval(secs => $1)
    order by xact_start limit $2";

const PREPARED: &str = "
    select gid, extract(epoch from clock_timestamp() - prepared)::double precision, database::text
    from pg_prepared_xacts
    where prepared < clock_timestamp() - make_interval(secs => $1)
    order by prepared limit $2";

const SETTING: &str = "
    select payload_limit_bytes, extract(epoch from dedup_window)::double precision, lanes from oncebox.setting";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[SERVER, SETTINGS, ROLES, CLOCK, OPEN, PREPARED, SETTING];

/// Which database, and what for.
#[derive(Debug, Clone)]
pub struct DatabaseCheck {
    /// What findings call it: `database`, or that of a consumer.
    pub name: String,
    /// Where it is.
    pub url: String,
    /// The roles whose rights the processes on it need.
    pub roles: Vec<&'static str>,
    /// From when on an open transaction is a warning.
    pub long_transaction: Duration,
}

/// A transaction that is open for long.
#[derive(Debug, Clone)]
pub struct OpenTransaction {
    /// How to end it.
    pub end: String,
    /// Whose it is.
    pub whose: String,
    /// For how long.
    pub age: Duration,
}

/// How far the database's clock is ahead, as measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClockOffset {
    /// Ahead of this host, in milliseconds; negative when behind.
    pub ahead_ms: f64,
    /// The measurement is right up to this.
    pub error_ms: f64,
}

/// What was asked of the server.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// As `server_version_num`.
    pub version: i32,
    /// A standby.
    pub is_standby: bool,
    /// The role of the connection.
    pub user: String,
    /// Whether that is a superuser.
    pub is_superuser: bool,
    /// Whether it sees other roles' transactions.
    pub sees_all: bool,
    /// Standbys that stream.
    pub standbys: i64,
    /// The database's name.
    pub database: String,
    /// Settings a session starts with.
    pub settings: BTreeMap<String, String>,
    /// Each role of ours: does it exist, and has the connection its rights?
    pub roles: Vec<(String, bool, bool)>,
    /// The clock.
    pub clock: Option<ClockOffset>,
    /// What is open for too long.
    pub open: Vec<OpenTransaction>,
}

/// Looks at one database.
pub async fn check(what: &DatabaseCheck) -> Vec<Finding> {
    let session = SessionOptions {
        application_name: "oncebox doctor",
        statement_timeout: LIMIT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let mut conn = match db::connect(&what.url, session).await {
        Ok(conn) => conn,
        Err(error) => return vec![unreachable(&what.name, &error)],
    };
    let mut findings = match gather(&mut conn, what.long_transaction).await {
        Ok(facts) => judge(what, &facts),
        Err(error) => vec![unreachable(&what.name, &error)],
    };
    findings.extend(schema(&mut conn, &what.name).await);
    if findings
        .iter()
        .all(|finding| finding.check != format!("{}: schema", what.name) || finding.severity == Severity::Ok)
    {
        findings.extend(sagas::check(&mut conn, &what.name).await);
    }
    db::close(conn).await;
    findings
}

fn unreachable(name: &str, error: &DbError) -> Finding {
    let mend = "start it, or mend the URL, the credentials or the network between";
    Finding::bad(Severity::Unsafe, format!("{name}: connection"), error.to_string(), mend)
}

async fn gather(conn: &mut PgConnection, long: Duration) -> Result<Facts, DbError> {
    type Server = (i32, bool, String, Option<bool>, bool, i64, String);
    let server: Server = db::bounded("what server it is", LIMIT, sqlx::query_as(SERVER).fetch_one(&mut *conn)).await?;
    let settings: Vec<(String, Option<String>)> =
        db::bounded("its settings", LIMIT, sqlx::query_as(SETTINGS).fetch_all(&mut *conn)).await?;
    let roles = db::bounded("its roles", LIMIT, sqlx::query_as(ROLES).fetch_all(&mut *conn)).await?;
    let seconds = long.as_secs_f64();
    type Open = (i32, f64, String, String, String, String);
    let open: Vec<Open> = db::bounded("open transactions", LIMIT, async {
        sqlx::query_as(OPEN).bind(seconds).bind(LISTED).fetch_all(&mut *conn).await
    })
    .await?;
    let prepared: Vec<(String, f64, String)> = db::bounded("prepared transactions", LIMIT, async {
        sqlx::query_as(PREPARED).bind(seconds).bind(LISTED).fetch_all(&mut *conn).await
    })
    .await?;
    let open = open.into_iter().map(|(pid, age_s, application, state, user, database)| OpenTransaction {
        end: format!("select pg_terminate_backend({pid})"),
        whose: format!("pid {pid} (\"{application}\", role {user}, database {database}, {state})"),
        age: Duration::from_secs_f64(age_s.max(0.0)),
    });
    let prepared = prepared.into_iter().map(|(gid, age_s, database)| OpenTransaction {
        end: format!("rollback prepared '{}', or commit it, in database {database}", gid.replace('\'', "''")),
        whose: format!("the prepared transaction '{gid}' of database {database}"),
        age: Duration::from_secs_f64(age_s.max(0.0)),
    });
    Ok(Facts {
        version: server.0,
        is_standby: server.1,
        user: server.2,
        is_superuser: server.3.unwrap_or_default(),
        sees_all: server.4,
        standbys: server.5,
        database: server.6,
        settings: settings.into_iter().map(|(name, value)| (name, value.unwrap_or_default())).collect(),
        roles,
        clock: Some(clock(conn).await?),
        open: open.chain(prepared).collect(),
    })
}

/// The server's time lies somewhere between question and answer: half of the quickest round trip is the error.
async fn clock(conn: &mut PgConnection) -> Result<ClockOffset, DbError> {
    let now_ms = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1000.0;
    let mut best: Option<ClockOffset> = None;
    for _ in 0..CLOCK_SAMPLES {
        let asked_ms = now_ms();
        let server_ms: f64 = db::bounded("its clock", LIMIT, sqlx::query_scalar(CLOCK).fetch_one(&mut *conn)).await?;
        let error_ms = (now_ms() - asked_ms).max(0.0) / 2.0;
        if best.is_none_or(|best| error_ms < best.error_ms) {
            best = Some(ClockOffset { ahead_ms: server_ms - asked_ms - error_ms, error_ms });
        }
    }
    Ok(best.expect("the loop runs at least once"))
}

async fn schema(conn: &mut PgConnection, name: &str) -> Vec<Finding> {
    let check = format!("{name}: schema");
    let checked = tokio::time::timeout(LIMIT, migrate::check(conn)).await;
    match checked.unwrap_or(Err(DbError::TimedOut { what: "its schema's version", limit: LIMIT })) {
        Ok(()) => {}
        Err(error @ DbError::SchemaTooNew { .. }) => {
            return vec![Finding::bad(Severity::Unsafe, check, error.to_string(), "run the newer oncebox everywhere")];
        }
        Err(error @ (DbError::SchemaMissing | DbError::SchemaTooOld { .. })) => {
            return vec![Finding::bad(Severity::Unsafe, check, error.to_string(), "oncebox migrate")];
        }
        Err(error) => {
            let mend = "grant the role one of oncebox_relay, oncebox_consumer and oncebox_admin";
            return vec![Finding::bad(Severity::Unsafe, check, error.to_string(), mend)];
        }
    }
    let mut findings = vec![Finding::ok(check, "is the one this program was built for")];
    let check = format!("{name}: oncebox.setting");
    let rows: Result<Vec<(i32, f64, i16)>, _> =
        db::bounded("the settings row", LIMIT, sqlx::query_as(SETTING).fetch_all(conn)).await;
    findings.push(match rows.as_deref() {
        Ok([(payload_limit_bytes, window_s, lanes)]) => Finding::ok(
            check,
            format!(
                "payloads up to {payload_limit_bytes} bytes, dedup window {:.1} days, {lanes} lane(s)",
                window_s / 86_400.0
            ),
        ),
        Ok(rows) => Finding::bad(
            Severity::Unsafe,
            check,
            format!("{} rows: publish and accept fail", rows.len()),
            "insert into oncebox.setting default values",
        ),
        Err(error) => Finding::bad(Severity::Warning, check, error.to_string(), "grant the role oncebox_admin"),
    });
    findings
}

/// What the facts mean.
pub fn judge(what: &DatabaseCheck, facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![version(&what.name, facts.version)];
    if facts.is_standby {
        let mend = "give the URL of the primary";
        let found = "is a standby: nothing can be written";
        findings.push(Finding::bad(Severity::Unsafe, format!("{}: primary", what.name), found, mend));
    }
    for (setting, value) in &facts.settings {
        findings.push(judge_setting(what, facts, setting, value));
    }
    findings.extend(judge_roles(what, facts));
    findings.extend(facts.clock.map(|clock| judge_clock(&what.name, clock)));
    findings.extend(judge_open(what, facts));
    findings
}

fn version(name: &str, version: i32) -> Finding {
    let (check, found) = (format!("{name}: version"), format!("PostgreSQL {}", version / 10_000));
    match version >= OLDEST_VERSION {
        true => Finding::ok(check, found),
        false => Finding::bad(Severity::Unsafe, check, format!("{found}: the schema needs 14"), "upgrade the server"),
    }
}

fn judge_setting(what: &DatabaseCheck, facts: &Facts, setting: &str, value: &str) -> Finding {
    let check = format!("{}: {setting}", what.name);
    let alter = |to: &str| format!("alter system set {setting} = {to}; select pg_reload_conf()");
    let here = |to: &str| format!("alter database \"{}\" set {setting} = '{to}'", facts.database);
    let bad =
        |severity, why: &str, mend: String| Finding::bad(severity, check.clone(), format!("{value}: {why}"), mend);
    let shown = if value.is_empty() { "not set" } else { value };
    match (setting, value) {
        ("fsync", "off") => {
            bad(Severity::Unsafe, "a power cut loses what was committed, or the whole database", alter("on"))
        }
        ("full_page_writes", "off") => bad(Severity::Unsafe, "a power cut can tear pages", alter("on")),
        ("zero_damaged_pages", "on") => bad(Severity::Unsafe, "damaged rows vanish silently", alter("off")),
        ("ignore_checksum_failure", "on") => bad(Severity::Unsafe, "damaged pages are read as if whole", alter("off")),
        ("autovacuum", "off") => bad(Severity::Warning, "dead rows pile up, transaction ids run out", alter("on")),
        ("synchronous_commit", "off") => bad(
            Severity::Unsafe,
            "a consumer of your own acknowledges effects that a crash then loses, and apps are told of commits that \
             are not; oncebox's own processes raise it to on",
            here("on"),
        ),
        ("synchronous_commit", "local") if !setting_is_empty(facts, "synchronous_standby_names") => {
            bad(Severity::Unsafe, "commits do not wait for the synchronous standby: a failover loses them", here("on"))
        }
        ("synchronous_standby_names", "") if facts.standbys > 0 => Finding::bad(
            Severity::Warning,
            check,
            format!("{} standby(s) follow, none synchronously: a failover loses the last commits", facts.standbys),
            "name them, e.g. alter system set synchronous_standby_names = 'any 1 (*)'",
        ),
        ("synchronous_standby_names", "") => {
            Finding::note(check, "not set: with this machine's disk goes what was committed")
        }
        ("wal_level", "minimal") => {
            Finding::note(check, "minimal: neither a standby nor point-in-time recovery").or(alter("replica"))
        }
        ("default_transaction_read_only", "on") => {
            bad(Severity::Unsafe, "publish and accept fail in a session that does not change it", here("off"))
        }
        ("default_transaction_isolation", level) if level != "read committed" => bad(
            Severity::Warning,
            "accept answers a concurrent copy with SQLSTATE 40001; oncebox's own processes use read committed",
            here("read committed"),
        ),
        ("idle_in_transaction_session_timeout", "0") => Finding::note(
            check,
            "0: an app that stalls inside a transaction holds its locks for as long; oncebox's own processes set one",
        )
        .or(here("5min")),
        ("transaction_timeout", value) if value != "0" => bad(
            Severity::Warning,
            "milliseconds: it ends handlers that run longer, and a long migration",
            "alter role … set transaction_timeout = 0, for the roles of oncebox's processes".to_owned(),
        ),
        ("statement_timeout", value) if value != "0" => {
            Finding::ok(check, format!("{value} ms; oncebox's own processes set their own"))
        }
        _ => Finding::ok(check, shown),
    }
}

fn setting_is_empty(facts: &Facts, setting: &str) -> bool {
    facts.settings.get(setting).is_none_or(String::is_empty)
}

fn judge_roles(what: &DatabaseCheck, facts: &Facts) -> Vec<Finding> {
    let check = format!("{}: roles", what.name);
    let missing: Vec<&str> = facts.roles.iter().filter(|role| !role.1).map(|role| role.0.as_str()).collect();
    if !missing.is_empty() {
        let found = format!("missing: {}", missing.join(", "));
        return vec![Finding::bad(
            Severity::Unsafe,
            check,
            found,
            "oncebox migrate makes them in a new database; create role … nologin in one restored without",
        )];
    }
    let (user, needed) = (&facts.user, what.roles.join(", "));
    if facts.is_superuser {
        let mend = format!("run the processes as a role of their own: grant {needed} to it");
        return vec![Finding::note(check, format!("{user} is a superuser, who may do more than is needed")).or(mend)];
    }
    let may = |name: &str| facts.roles.iter().any(|role| role.0 == name && role.2);
    let lacking: Vec<&str> = what.roles.iter().copied().filter(|role| !may(role)).collect();
    if lacking.is_empty() {
        return vec![Finding::ok(check, format!("{user} has the rights of {needed}"))];
    }
    let lacking = lacking.join(", ");
    let found = format!("{user} has not the rights of {lacking}: a process that needs them ends at its start");
    vec![Finding::bad(Severity::Warning, check, found, format!("grant {lacking} to \"{user}\""))]
}

/// Ids are UUIDv7 of the host's or the database's time, and the dedup window counts by the database's: a clock that is
/// wrong by minutes makes new messages look old, or far ahead.
pub fn judge_clock(name: &str, clock: ClockOffset) -> Finding {
    let check = format!("{name}: clock");
    let side = if clock.ahead_ms < 0.0 { "behind" } else { "ahead of" };
    let found = format!("{:.3} s {side} this host (± {:.3} s)", clock.ahead_ms.abs() / 1000.0, clock.error_ms / 1000.0);
    let mend = "synchronise both clocks (chrony, systemd-timesyncd)";
    // What is certain counts, not what may be.
    match clock.ahead_ms.abs() - clock.error_ms {
        certain if certain > 60_000.0 => Finding::bad(Severity::Unsafe, check, found, mend),
        certain if certain > 1_000.0 => Finding::bad(Severity::Warning, check, found, mend),
        _ => Finding::ok(check, found),
    }
}

fn judge_open(what: &DatabaseCheck, facts: &Facts) -> Vec<Finding> {
    let check = format!("{}: open transactions", what.name);
    let limit = what.long_transaction;
    let mut findings: Vec<Finding> = facts
        .open
        .iter()
        .map(|open| {
            let age = Duration::from_secs(open.age.as_secs());
            let found =
                format!("{} is open for {age:?}: its own messages wait, and dead rows are kept for it", open.whose);
            Finding::bad(Severity::Warning, check.clone(), found, open.end.clone())
        })
        .collect();
    if !facts.sees_all && !facts.is_superuser {
        let found = format!("{} sees only its own", facts.user);
        findings.push(Finding::note(check, found).or(format!("grant pg_read_all_stats to \"{}\"", facts.user)));
    } else if findings.is_empty() {
        findings.push(Finding::ok(check, format!("none is open for more than {limit:?}")));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn what() -> DatabaseCheck {
        DatabaseCheck {
            name: "database".to_owned(),
            url: String::new(),
            roles: vec!["oncebox_relay"],
            long_transaction: Duration::from_secs(600),
        }
    }

    fn severity(setting: &str, value: &str, others: &[(&str, &str)], standbys: i64) -> Severity {
        let settings = others.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        judge_setting(&what(), &Facts { settings, standbys, ..Facts::default() }, setting, value).severity
    }

    /// Goal: each setting that breaks a promise is told, and its default is not.
    #[test]
    fn settings_are_judged() {
        let standby = &[("synchronous_standby_names", "s1")][..];
        for (setting, value, others, standbys, expected) in [
            ("fsync", "on", &[][..], 0, Severity::Ok),
            ("fsync", "off", &[], 0, Severity::Unsafe),
            ("full_page_writes", "off", &[], 0, Severity::Unsafe),
            ("synchronous_commit", "on", &[], 0, Severity::Ok),
            ("synchronous_commit", "off", &[], 0, Severity::Unsafe),
            ("synchronous_commit", "local", &[], 0, Severity::Ok),
            ("synchronous_commit", "local", standby, 1, Severity::Unsafe),
            ("synchronous_standby_names", "", &[], 0, Severity::Note),
            ("synchronous_standby_names", "", &[], 1, Severity::Warning),
            ("synchronous_standby_names", "s1", &[], 1, Severity::Ok),
            ("wal_level", "replica", &[], 0, Severity::Ok),
            ("wal_level", "minimal", &[], 0, Severity::Note),
            ("default_transaction_isolation", "read committed", &[], 0, Severity::Ok),
            ("default_transaction_isolation", "serializable", &[], 0, Severity::Warning),
            ("default_transaction_read_only", "on", &[], 0, Severity::Unsafe),
            ("transaction_timeout", "0", &[], 0, Severity::Ok),
            ("transaction_timeout", "5000", &[], 0, Severity::Warning),
            ("statement_timeout", "5000", &[], 0, Severity::Ok),
            ("autovacuum", "off", &[], 0, Severity::Warning),
        ] {
            assert_eq!(severity(setting, value, others, standbys), expected, "{setting} = {value}");
        }
        assert_eq!(version("d", 130_011).severity, Severity::Unsafe);
        assert_eq!(version("d", 140_000).severity, Severity::Ok);
    }

    /// Goal: a role is told what it lacks, and a missing role is.
    #[test]
    fn roles_are_judged() {
        let facts = |exists, may, is_superuser| Facts {
            roles: vec![("oncebox_relay".to_owned(), exists, may)],
            is_superuser,
            ..Facts::default()
        };
        for (facts, expected) in [
            (facts(false, false, true), Severity::Unsafe),
            (facts(true, false, false), Severity::Warning),
            (facts(true, true, false), Severity::Ok),
            (facts(true, true, true), Severity::Note),
        ] {
            assert_eq!(judge_roles(&what(), &facts)[0].severity, expected);
        }
    }

    proptest! {
        /// Goal: a clock is judged by what is certain of its offset, alike ahead and behind, and never better when it is
        /// further off.
        #[test]
        fn clocks_are_judged(ahead_ms in -200_000.0f64..200_000.0, error_ms in 0.0f64..5_000.0) {
            let judged = |ahead_ms: f64| judge_clock("d", ClockOffset { ahead_ms, error_ms }).severity;
            let certain = ahead_ms.abs() - error_ms;
            let expected = if certain > 60_000.0 { Severity::Unsafe }
                else if certain > 1_000.0 { Severity::Warning } else { Severity::Ok };
            prop_assert_eq!(judged(ahead_ms), expected);
            prop_assert_eq!(judged(-ahead_ms), expected);
            prop_assert!(judged(ahead_ms * 2.0) <= expected);
        }
    }
}
