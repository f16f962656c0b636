//! Goal: each role may do what its work needs and nothing else, on every object there is: the expected rights are
//! listed here in full, so an object or a right without an entry fails. And what is granted is enough to work with.

use crate::support::wire::Tap;
use crate::support::{Lab, connect, eventually_number, unique};
use sqlx::AssertSqlSafe;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Every object of the schema, and which role may do what with it; whom it does not name may do nothing. Partitions
/// are reached through their parents only.
const EXPECTED: &[(&str, &[(&str, &str)])] = &[
    (
        "schema oncebox",
        &[
            ("oncebox_producer", "usage"),
            ("oncebox_consumer", "usage"),
            ("oncebox_relay", "usage"),
            ("oncebox_orchestrator", "usage"),
            ("oncebox_admin", "usage"),
        ],
    ),
    (
        "table schema_history",
        &[
            ("oncebox_consumer", "select"),
            ("oncebox_relay", "select"),
            ("oncebox_orchestrator", "select"),
            ("oncebox_admin", "select"),
        ],
    ),
    (
        "table setting",
        &[
            ("oncebox_consumer", "select"),
            ("oncebox_relay", "select"),
            ("oncebox_orchestrator", "select"),
            ("oncebox_admin", "select update"),
        ],
    ),
    ("table saga_definition", &[("oncebox_orchestrator", "select"), ("oncebox_admin", "select insert delete")]),
    ("table saga", &[("oncebox_orchestrator", "select"), ("oncebox_admin", "select")]),
    ("table saga_step", &[("oncebox_orchestrator", "select"), ("oncebox_admin", "select")]),
    ("table saga_compensation", &[("oncebox_orchestrator", "select"), ("oncebox_admin", "select")]),
    ("table saga_history", &[("oncebox_orchestrator", "select"), ("oncebox_admin", "select")]),
    ("table saga_signal", &[("oncebox_orchestrator", "select"), ("oncebox_admin", "select")]),
    ("table saga_barrier", &[("oncebox_orchestrator", "select"), ("oncebox_admin", "select")]),
    ("table saga_purged", &[("oncebox_orchestrator", "select"), ("oncebox_admin", "select")]),
    ("function saga_put_off", &[("oncebox_orchestrator", "execute"), ("oncebox_admin", "execute")]),
    ("table saga_request", &[("oncebox_admin", "select insert delete")]),
    (
        "function saga_start",
        &[
            ("oncebox_producer", "execute"),
            ("oncebox_consumer", "execute"),
            ("oncebox_orchestrator", "execute"),
            ("oncebox_admin", "execute"),
        ],
    ),
    (
        "function saga_signal",
        &[
            ("oncebox_producer", "execute"),
            ("oncebox_consumer", "execute"),
            ("oncebox_orchestrator", "execute"),
            ("oncebox_admin", "execute"),
        ],
    ),
    ("function saga_load", &[("oncebox_orchestrator", "execute"), ("oncebox_admin", "execute")]),
    ("function saga_due", &[("oncebox_orchestrator", "execute"), ("oncebox_admin", "execute")]),
    ("function saga_apply", &[("oncebox_orchestrator", "execute"), ("oncebox_admin", "execute")]),
    ("function saga_keep_signal", &[("oncebox_orchestrator", "execute"), ("oncebox_admin", "execute")]),
    ("function saga_history_broken", &[("oncebox_orchestrator", "execute"), ("oncebox_admin", "execute")]),
    ("function saga_barrier_clear", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function saga_purge", &[("oncebox_orchestrator", "execute"), ("oncebox_admin", "execute")]),
    ("function saga_ms", &[]),
    ("function saga_time", &[]),
    ("function saga_now", &[]),
    ("function saga_history_hash", &[]),
    ("function saga_may_become", &[]),
    ("function saga_step_may_become", &[]),
    ("function saga_compensation_may_become", &[]),
    ("function saga_is_final", &[]),
    ("function saga_guard", &[]),
    ("function saga_step_guard", &[]),
    ("function saga_compensation_guard", &[]),
    ("function saga_history_guard", &[]),
    ("function saga_refuse_update", &[]),
    ("function saga_guard_delete", &[]),
    ("function saga_guard_part", &[]),
    ("function saga_refuse_truncate", &[]),
    ("function saga_definition_guard", &[]),
    ("function saga_record", &[]),
    ("function saga_check_json", &[]),
    ("function saga_duration_ms", &[]),
    ("table outbox", &[("oncebox_relay", "select"), ("oncebox_admin", "select")]),
    ("table outbox_#", &[]),
    ("table outbox_ring", &[("oncebox_admin", "select")]),
    ("table outbox_current", &[]),
    ("table outbox_slot", &[("oncebox_relay", "select"), ("oncebox_admin", "select")]),
    ("table outbox_trim", &[("oncebox_admin", "select")]),
    ("table outbox_source", &[("oncebox_relay", "select"), ("oncebox_admin", "select")]),
    (
        "table outbox_source",
        &[("oncebox_relay", "select"), ("oncebox_consumer", "select"), ("oncebox_admin", "select")],
    ),
    ("sequence outbox_source_ordinal_seq", &[]),
    ("table outbox_source_end", &[("oncebox_relay", "select"), ("oncebox_admin", "select")]),
    ("function outbox_identity", &[("oncebox_relay", "execute"), ("oncebox_admin", "execute")]),
    ("function outbox_source_in_force", &[("oncebox_relay", "execute"), ("oncebox_admin", "execute")]),
    ("function outbox_adopt_source", &[("oncebox_relay", "execute")]),
    ("function outbox_renew_source", &[("oncebox_admin", "execute")]),
    ("function outbox_rebase", &[("oncebox_relay", "execute")]),
    ("function outbox_look", &[("oncebox_relay", "execute")]),
    ("sequence outbox_seq", &[("oncebox_relay", "select"), ("oncebox_admin", "select")]),
    ("table outbox_plan", &[("oncebox_relay", "select insert"), ("oncebox_admin", "select")]),
    ("table outbox_lease", &[("oncebox_relay", "select update"), ("oncebox_admin", "select")]),
    (
        "table outbox_held",
        &[("oncebox_relay", "select insert update delete"), ("oncebox_admin", "select update delete")],
    ),
    ("table outbox_scheduled", &[("oncebox_admin", "select")]),
    ("table outbox_relay", &[("oncebox_relay", "select insert update delete"), ("oncebox_admin", "select")]),
    ("table outbox_pause", &[("oncebox_relay", "select"), ("oncebox_admin", "select")]),
    ("sequence outbox_pause_id_seq", &[]),
    ("function topic_matches", &[("oncebox_relay", "execute"), ("oncebox_admin", "execute")]),
    ("function pause", &[("oncebox_admin", "execute")]),
    ("function resume", &[("oncebox_admin", "execute")]),
    ("function resume_all", &[("oncebox_admin", "execute")]),
    ("sequence outbox_scheduled_id_seq", &[]),
    ("table inbox", &[("oncebox_consumer", "select"), ("oncebox_admin", "select")]),
    ("table inbox_#", &[]),
    ("table inbox_ledger", &[("oncebox_admin", "select")]),
    ("table inbox_horizon", &[("oncebox_admin", "select")]),
    ("table inbox_alias", &[("oncebox_admin", "select")]),
    ("table inbox_fold", &[("oncebox_admin", "select")]),
    ("table inbox_doubled", &[("oncebox_admin", "select delete")]),
    (
        "table inbox_held",
        &[("oncebox_consumer", "select insert update delete"), ("oncebox_admin", "select insert update delete")],
    ),
    ("sequence inbox_held_n_seq", &[]),
    ("table inbox_stream", &[("oncebox_consumer", "select"), ("oncebox_admin", "select")]),
    ("table inbox_void", &[("oncebox_admin", "select")]),
    ("table inbox_binding", &[("oncebox_consumer", "select"), ("oncebox_admin", "select")]),
    ("table inbox_gap", &[("oncebox_admin", "select")]),
    ("table inbox_given_up", &[("oncebox_admin", "select")]),
    ("function outbox_announce", &[("oncebox_admin", "execute")]),
    ("table outbox_void", &[("oncebox_relay", "select delete"), ("oncebox_admin", "select")]),
    ("function uuid_v7", &[]),
    ("function uuid_v7_ms", &[("oncebox_consumer", "execute")]),
    ("function inbox_day_leaf", &[("oncebox_consumer", "execute")]),
    ("function outbox_make_lanes", &[]),
    ("function setting_guard_lanes", &[]),
    ("function setting_to_current", &[]),
    ("function outbox_ring_to_current", &[]),
    ("function outbox_lane", &[]),
    ("function outbox_check_headers", &[]),
    ("function outbox_insert", &[]),
    ("function outbox_append", &[]),
    ("function publish", &[("oncebox_producer", "execute"), ("oncebox_admin", "execute")]),
    ("function publish_bytes", &[("oncebox_producer", "execute"), ("oncebox_admin", "execute")]),
    ("function outbox_release_due", &[("oncebox_relay", "execute")]),
    ("function outbox_settled", &[("oncebox_admin", "execute")]),
    ("function outbox_open_then", &[("oncebox_relay", "execute"), ("oncebox_admin", "execute")]),
    ("function outbox_lag", &[("oncebox_admin", "execute")]),
    ("function inbox_consumers", &[("oncebox_admin", "execute")]),
    ("function oldest_transaction", &[("oncebox_admin", "execute")]),
    ("function outbox_slot_state", &[("oncebox_relay", "execute"), ("oncebox_admin", "execute")]),
    ("function outbox_turn", &[("oncebox_relay", "execute"), ("oncebox_admin", "execute")]),
    ("function outbox_clear", &[("oncebox_relay", "execute"), ("oncebox_admin", "execute")]),
    ("function outbox_trim_journal", &[("oncebox_relay", "execute"), ("oncebox_admin", "execute")]),
    ("table outbox_discarded", &[("oncebox_relay", "select"), ("oncebox_admin", "select")]),
    ("table inbox_discarded", &[("oncebox_admin", "select")]),
    ("sequence inbox_discarded_n_seq", &[]),
    ("table parked", &[("oncebox_admin", "select")]),
    ("function outbox_retry", &[("oncebox_admin", "execute")]),
    ("function inbox_retry", &[("oncebox_admin", "execute")]),
    ("function parked_check_discard", &[]),
    ("function outbox_discard", &[("oncebox_admin", "execute")]),
    ("function inbox_discard", &[("oncebox_admin", "execute")]),
    ("function inbox_lock_stream", &[]),
    ("function inbox_advance_stream", &[]),
    ("function inbox_pass_stream", &[]),
    ("function inbox_void_stream", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function inbox_receive_stream", &[("oncebox_consumer", "execute")]),
    ("function inbox_turn", &[("oncebox_consumer", "execute")]),
    ("function inbox_pass_twin", &[("oncebox_consumer", "execute")]),
    ("function inbox_held_stream", &[]),
    ("function inbox_begin_stream", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function inbox_begin", &[("oncebox_consumer", "execute")]),
    ("function outbox_counters", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function outbox_note_void", &[]),
    ("function outbox_unnote_void", &[]),
    ("table consumer_binding", &[("oncebox_admin", "select")]),
    ("table consumer_start", &[("oncebox_admin", "select")]),
    ("function stream_topic", &[("oncebox_admin", "execute")]),
    ("function consumer_register", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function consumer_forget", &[("oncebox_admin", "execute")]),
    ("function saga_answer", &[]),
    ("function saga_cut", &[]),
    ("function saga_take", &[]),
    (
        "function saga_open",
        &[("oncebox_producer", "execute"), ("oncebox_consumer", "execute"), ("oncebox_admin", "execute")],
    ),
    (
        "function saga_compensate_with",
        &[("oncebox_producer", "execute"), ("oncebox_consumer", "execute"), ("oncebox_admin", "execute")],
    ),
    (
        "function saga_complete",
        &[("oncebox_producer", "execute"), ("oncebox_consumer", "execute"), ("oncebox_admin", "execute")],
    ),
    (
        "function saga_abort",
        &[("oncebox_producer", "execute"), ("oncebox_consumer", "execute"), ("oncebox_admin", "execute")],
    ),
    (
        "function saga_barrier",
        &[("oncebox_producer", "execute"), ("oncebox_consumer", "execute"), ("oncebox_admin", "execute")],
    ),
    (
        "function saga_reply",
        &[("oncebox_producer", "execute"), ("oncebox_consumer", "execute"), ("oncebox_admin", "execute")],
    ),
    ("function accept", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function inbox_receive", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function inbox_receive_all", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function inbox_receive_batch", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function inbox_call", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function inbox_fold", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function inbox_clear", &[("oncebox_consumer", "execute"), ("oncebox_admin", "execute")]),
    ("function inbox_newest_ms", &[]),
];

/// Each object, role and verb that Postgres lets through: of the roles, and of one that is in none of them and so
/// has PUBLIC's rights. Rights on single columns count as rights on the table.
const ACTUAL: &str = "
    with role (name) as (
        values ('oncebox_producer'), ('oncebox_consumer'), ('oncebox_relay'), ('oncebox_orchestrator'),
            ('oncebox_admin'), ($1)
    ), object (kind, name, oid) as (
        select 'schema', nspname::text, oid from pg_namespace where nspname = 'oncebox'
        union all
        select case relkind when 'S' then 'sequence' else 'table' end, relname::text, oid from pg_class
        where relnamespace = 'oncebox'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'f', 'S')
        union all
        select 'function', proname::text, oid from pg_proc where pronamespace = 'oncebox'::regnamespace
    ), verb (kind, name) as (
        values ('schema', 'usage'), ('schema', 'create'), ('table', 'select'), ('table', 'insert'), ('table', 'update'),
            ('table', 'delete'), ('table', 'truncate'), ('table', 'references'), ('table', 'trigger'),
            ('sequence', 'usage'), ('sequence', 'select'), ('sequence', 'update'), ('function', 'execute')
    )
    select o.kind || ' ' || o.name, r.name, v.name, case
        when o.kind = 'schema' then has_schema_privilege(r.name, o.oid, v.name)
        when o.kind = 'sequence' then has_sequence_privilege(r.name, o.oid, v.name)
        when o.kind = 'function' then has_function_privilege(r.name, o.oid, v.name)
        when v.name in ('select', 'insert', 'update', 'references') then
            has_any_column_privilege(r.name, o.oid, v.name)
        else has_table_privilege(r.name, o.oid, v.name) end
    from object as o join verb as v using (kind) cross join role as r";

/// Partitions differ by number only.
fn family(object: &str) -> String {
    match object.rsplit_once('_') {
        Some((parent, number)) if number.bytes().all(|b| b.is_ascii_digit()) => format!("{parent}_#"),
        _ => object.to_owned(),
    }
}

/// Goal: every table, sequence and function has exactly the rights listed above, and PUBLIC has none.
#[tokio::test]
async fn every_right_is_listed() {
    let lab = Lab::shared().await;
    let nobody = unique("nobody");
    lab.sql(&format!("create role {nobody}")).await;
    let rows: Vec<(String, String, String, bool)> =
        sqlx::query_as(ACTUAL).bind(&nobody).fetch_all(&mut lab.connect().await).await.unwrap();
    let mut actual: BTreeMap<String, BTreeSet<(String, String)>> = BTreeMap::new();
    for (object, role, verb, may) in rows {
        let rights = actual.entry(family(&object)).or_default();
        if may {
            rights.insert((role, verb));
        }
    }
    let expected: BTreeMap<String, BTreeSet<(String, String)>> = EXPECTED
        .iter()
        .map(|(object, rights)| {
            let rights = rights
                .iter()
                .flat_map(|(role, verbs)| verbs.split(' ').map(|verb| (role.to_string(), verb.to_owned())));
            (object.to_string(), rights.collect())
        })
        .collect();
    let names = |map: &BTreeMap<String, _>| map.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&actual), names(&expected), "objects of the schema, and those listed here");
    for (object, rights) in &expected {
        assert_eq!(&actual[object], rights, "rights on {object}");
    }
}

/// Goal: no function runs with its owner's rights on its caller's search path; and no object belongs to a role that
/// apps log in with.
#[tokio::test]
async fn definers_fix_their_search_path() {
    let lab = Lab::shared().await;
    let functions: Vec<(String, bool)> = sqlx::query_as(
        "select proname::text, coalesce(proconfig @> array['search_path=pg_catalog, pg_temp'], false)
        from pg_proc where pronamespace = 'oncebox'::regnamespace and prosecdef order by 1",
    )
    .fetch_all(&mut lab.connect().await)
    .await
    .unwrap();
    let fixed: Vec<&str> = functions.iter().filter(|(_, fixed)| *fixed).map(|(name, _)| name.as_str()).collect();
    assert_eq!(fixed.len(), functions.len(), "without a fixed search path: {functions:?}");
    for name in ["accept", "inbox_receive", "outbox_release_due", "publish", "publish_bytes", "setting_guard_lanes"] {
        assert!(fixed.contains(&name), "{name} does not run as its owner");
    }
    let owners = "select count(*) from pg_class where relnamespace = 'oncebox'::regnamespace
        and pg_get_userbyid(relowner) <> 'oncebox'";
    assert_eq!(lab.number(owners).await, 0);
}

/// Makes a role that may log in, in one group; the lab's URL for it.
async fn login(lab: &Lab, group: &str) -> (String, String) {
    let role = unique("login");
    lab.sql(&format!("create role {role} login in role {group}")).await;
    let url = lab.database_url.replace("oncebox@", &format!("{role}@"));
    (role, url)
}

fn command(lab: &Lab, url: &str, args: &[&str]) -> Command {
    let mut command = lab.command(args);
    command.env("ONCEBOX_DATABASE_URL", url);
    command
}

/// Goal: a producer publishes, and can neither read nor change anything, nor call what is not for it.
#[tokio::test]
async fn a_producer_only_publishes() {
    let lab = Lab::shared().await;
    let (_, url) = login(&lab, "oncebox_producer").await;
    let mut conn = connect(&url).await;
    for call in
        ["publish('t', '1')", "publish_bytes('t', '1', 'text/plain')", "publish('t', '1', deliver_at => '2999-01-01')"]
    {
        sqlx::query(AssertSqlSafe(format!("select oncebox.{call}"))).execute(&mut conn).await.expect(call);
    }
    for refused in [
        "select from oncebox.outbox",
        "select from oncebox.outbox_0",
        "select from oncebox.outbox_scheduled",
        "select from oncebox.setting",
        "insert into oncebox.outbox_ring values (true, 1)",
        "update oncebox.setting set payload_limit_bytes = 1",
        "delete from oncebox.outbox",
        "truncate oncebox.outbox",
        "select nextval('oncebox.outbox_seq')",
        "select oncebox.outbox_insert('t', '', 't', null, '{}', gen_random_uuid(), now(), null)",
        "select oncebox.outbox_append('t', '', 't', null, '{}', null, null, null)",
        "select oncebox.outbox_release_due(1)",
        "select oncebox.accept('c', gen_random_uuid())",
        "create table oncebox.mine ()",
    ] {
        let error = sqlx::query(AssertSqlSafe(refused)).execute(&mut conn).await.expect_err(refused);
        let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned();
        assert_eq!(code, "42501", "{refused}: {error}");
    }
}

/// Goal: an admin changes settings, lanes among them.
#[tokio::test]
async fn an_admin_changes_settings() {
    let lab = Lab::shared().await;
    let (_, url) = login(&lab, "oncebox_admin").await;
    let mut conn = connect(&url).await;
    let change = "update oncebox.setting set lanes = 3, payload_limit_bytes = 7, dedup_window = '1 day'";
    sqlx::query(change).execute(&mut conn).await.unwrap();
    assert_eq!(lab.number("select count(*) from oncebox.outbox_lease").await, 3);
}

/// Goal: a role with a relay's rights alone runs the relay: due, scheduled, unroutable and expired messages, and an
/// end in order.
#[tokio::test]
async fn a_relay_role_runs_the_relay() {
    let lab = Lab::shared().await;
    let (_, url) = login(&lab, "oncebox_relay").await;
    let (_, producer) = login(&lab, "oncebox_producer").await;
    let tap = Tap::bound(&lab, "tap", &["t.#"]).await;
    let mut app = connect(&producer).await;
    for call in [
        "publish('t.1', '1', key => 'k')",
        "publish('t.2', '2', deliver_at => clock_timestamp() + interval '100 ms')",
        "publish('nowhere', '3')",
        "publish('t.3', '4', expires_at => clock_timestamp())",
    ] {
        sqlx::query(AssertSqlSafe(format!("select oncebox.{call}"))).execute(&mut app).await.expect(call);
    }
    let mut relay = crate::support::Process::spawn(command(&lab, &url, &["relay"]));
    relay.wait_for_log("lane resumed").await;
    let mut observer = lab.connect().await;
    let parked =
        "select count(*) from oncebox.outbox_held where state = 'parked' and reason in ('unroutable', 'expired')";
    eventually_number(&mut observer, parked, 2).await;
    assert_eq!(tap.read(2).await.deliveries.len(), 2);
    let (status, _) = relay.stop().await;
    assert!(status.success(), "{}", relay.log());
    assert_eq!(lab.number("select count(*) from oncebox.outbox_lease where owner is null and settled_n > 0").await, 1);
    assert!(!relay.log().contains("permission denied"), "{}", relay.log());
}

/// Goal: a role with a consumer's rights, and those on its own handler and tables, runs the consumer: effects, retries
/// and parking.
#[tokio::test]
async fn a_consumer_role_runs_the_consumer() {
    let lab = Lab::shared().await;
    let (role, url) = login(&lab, "oncebox_consumer").await;
    lab.sql(&format!(
        "create schema app authorization {role};
        set role {role};
        create table app.effect (id uuid, n int);
        create function app.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language plpgsql as $$
        begin
            insert into app.effect values (message_id, (payload ->> 'n')::int);
            if (payload ->> 'n')::int = 2 then raise 'no'; end if;
        end $$;"
    ))
    .await;
    let config = lab.config(
        "[[consumer]]\nname = \"app\"\nbindings = [\"t\"]\nhandler = { sql = \"app.on_message\" }\nmax_attempts = 2\n\
         backoff_initial = \"10ms\"\n",
    );
    let mut consumer = crate::support::Process::spawn(command(&lab, &url, &["consume", "--config", &config]));
    consumer.wait_for_log("consuming").await;
    let relay = lab.relay().await;
    lab.sql("select oncebox.publish('t', jsonb_build_object('n', n), key => n::text) from generate_series(1, 3) as n")
        .await;
    let mut observer = lab.connect().await;
    let parked = "select count(*) from oncebox.inbox_held where state = 'parked' and attempts = 2";
    eventually_number(&mut observer, parked, 1).await;
    eventually_number(&mut observer, "select count(*) from app.effect", 2).await;
    assert_eq!(lab.number("select count(*) from oncebox.inbox").await, 2);
    drop(relay);
    assert!(consumer.stop().await.0.success());
    assert!(!consumer.log().contains("permission denied"), "{}", consumer.log());
}
