//! Goal: the database's own rules for sagas are those of the program, pair by pair, and hold against a superuser's
//! UPDATE; what is written once stays as it was, and whatever was done to a history shows.

use crate::support::Lab;
use oncebox::saga::state::{CompensationStatus, Phase, SagaStatus, StepStatus};
use oncebox::saga::store;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use uuid::Uuid;

/// A definition with a plain step and a pivot, and one saga of it that runs, with a compensation.
const ONE_SAGA: &str = r#"
    insert into oncebox.saga_definition (name, version, document) values ('order', 1, '{
        "name": "order", "version": 1, "steps": [
            {"id": "reserve", "do": {"topic": "stock.reserve", "body": {}}, "undo": {"topic": "stock.release", "body": {}}},
            {"id": "charge", "pivot": true, "do": {"topic": "pay.charge", "body": {}}}
        ]}');
    select oncebox.saga_start('order', 'k', '{"sku": 1}', labels => '{"tenant": "a"}')"#;

async fn one_saga(conn: &mut PgConnection) -> Uuid {
    conn.execute(ONE_SAGA).await.expect("a saga");
    let id = sqlx::query_scalar("select id from oncebox.saga").fetch_one(&mut *conn).await.unwrap();
    set_up(
        conn,
        "update oncebox.saga set status = 'running', next_due = null;
        insert into oncebox.saga_compensation (saga_id, step, ordinal, topic, status, recorded_at, changed_at)
        select id, 'reserve', 0, 'stock.release', 'recorded', now(), now() from oncebox.saga",
    )
    .await;
    id
}

/// Writes rows past the triggers.
async fn set_up(conn: &mut PgConnection, text: &str) {
    let text = format!("set session_replication_role = replica; {text}; set session_replication_role = origin");
    conn.execute(AssertSqlSafe(text.as_str())).await.unwrap_or_else(|error| panic!("{text}: {error}"));
}

/// Whether the statement goes through; it is taken back either way. Anything but the rules' own refusal fails.
async fn goes(conn: &mut PgConnection, text: &str) -> bool {
    let mut attempt = conn.begin().await.unwrap();
    let result = attempt.execute(AssertSqlSafe(text)).await;
    attempt.rollback().await.unwrap();
    match result {
        Ok(done) => {
            assert_eq!(done.rows_affected(), 1, "{text}");
            true
        }
        Err(error) => {
            let error = error.into_database_error().expect("an error of the database");
            assert_eq!(error.code().as_deref(), Some("23514"), "{text}: {error}");
            false
        }
    }
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Forward => "forward",
        Phase::Backward => "backward",
    }
}

/// As the columns must be in this status; none: it cannot be in this phase.
fn saga_columns(status: SagaStatus, way: Phase) -> Option<String> {
    let fits = match status {
        SagaStatus::Compensating | SagaStatus::Compensated => way == Phase::Backward,
        SagaStatus::Stuck | SagaStatus::Terminated => true,
        _ => way == Phase::Forward,
    };
    let ended = if status.is_final() { "now()" } else { "null" };
    fits.then(|| {
        format!("status = '{}', phase = '{}', ended_at = {ended}, next_due = null", status.as_str(), phase(way))
    })
}

/// Goal: for every pair of statuses and phases, an UPDATE of a saga goes through exactly when the program may make it.
#[tokio::test]
async fn sagas_move_as_the_program_moves_them() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    one_saga(&mut conn).await;
    let (mut tried, mut gone) = (0, 0);
    for from in SagaStatus::ALL {
        for before in [Phase::Forward, Phase::Backward] {
            let Some(columns) = saga_columns(from, before) else { continue };
            set_up(&mut conn, &format!("update oncebox.saga set {columns}")).await;
            for to in SagaStatus::ALL.into_iter().filter(|to| *to != from) {
                for after in [Phase::Forward, Phase::Backward] {
                    let Some(columns) = saga_columns(to, after) else { continue };
                    // It turns in that moment and in no other.
                    let turns = (from, to) == (SagaStatus::Running, SagaStatus::Compensating);
                    let expected = from.may_become(to, before) && (before == after || turns);
                    let went = goes(&mut conn, &format!("update oncebox.saga set seq = seq + 1, {columns}")).await;
                    assert_eq!(went, expected, "{from:?} {before:?} → {to:?} {after:?}");
                    let without_history = goes(&mut conn, &format!("update oncebox.saga set {columns}")).await;
                    assert!(!without_history, "{from:?} → {to:?} without a new seq");
                    tried += 1;
                    gone += i32::from(went);
                }
            }
        }
    }
    assert!(tried > 80 && gone > 10, "{gone} of {tried}: did the pairs get lost?");
}

/// Goal: the same for every pair of statuses of a step.
#[tokio::test]
async fn steps_move_as_the_program_moves_them() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    one_saga(&mut conn).await;
    for from in StepStatus::ALL {
        let row = format!("update oncebox.saga_step set status = '{}' where step = 'reserve'", from.as_str());
        set_up(&mut conn, &row).await;
        for to in StepStatus::ALL.into_iter().filter(|to| *to != from) {
            let update = format!("update oncebox.saga_step set status = '{}' where step = 'reserve'", to.as_str());
            assert_eq!(goes(&mut conn, &update).await, from.may_become(to), "{from:?} → {to:?}");
        }
        assert!(goes(&mut conn, "update oncebox.saga_step set attempt = attempt + 1 where step = 'reserve'").await);
    }
}

/// Goal: the same for every pair of statuses of a compensation.
#[tokio::test]
async fn compensations_move_as_the_program_moves_them() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    one_saga(&mut conn).await;
    for from in CompensationStatus::ALL {
        set_up(&mut conn, &format!("update oncebox.saga_compensation set status = '{}'", from.as_str())).await;
        for to in CompensationStatus::ALL.into_iter().filter(|to| *to != from) {
            let update = format!("update oncebox.saga_compensation set status = '{}'", to.as_str());
            assert_eq!(goes(&mut conn, &update).await, from.may_become(to), "{from:?} → {to:?}");
        }
    }
}

/// Goal: a saga cannot turn back once its pivot may have run, and can before that; other steps do not matter.
#[tokio::test]
async fn nothing_turns_back_after_the_pivot() {
    use StepStatus::*;
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    one_saga(&mut conn).await;
    let turn = "update oncebox.saga set seq = seq + 1, status = 'compensating', phase = 'backward'";
    for status in StepStatus::ALL {
        for (step, pivot) in [("charge", true), ("reserve", false)] {
            set_up(
                &mut conn,
                &format!(
                    "update oncebox.saga_step set status = 'pending';
                    update oncebox.saga_step set status = '{}' where step = '{step}'",
                    status.as_str()
                ),
            )
            .await;
            let refused = pivot && matches!(status, Dispatched | Backoff | Unknown | Succeeded);
            assert_eq!(goes(&mut conn, turn).await, !refused, "{step} is {status:?}");
        }
    }
}

/// Goal: sagas, steps and compensations begin as the program begins them and in no other status.
#[tokio::test]
async fn everything_begins_at_its_beginning() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    one_saga(&mut conn).await;
    for status in SagaStatus::ALL {
        for (definition, of) in [(true, "definition, version, definition_hash"), (false, "null, null, null")] {
            let ended = if status.is_final() { "now()" } else { "null" };
            let way = if saga_columns(status, Phase::Forward).is_some() { "forward" } else { "backward" };
            let insert = format!(
                "insert into oncebox.saga (id, definition, version, definition_hash, business_key, status, phase,
                    created_at, start_at, changed_at, ended_at)
                select gen_random_uuid(), {of}, 'other', '{}', '{way}', now(), now(), now(), {ended} from oncebox.saga",
                status.as_str()
            );
            let expected = status == SagaStatus::Scheduled || (status == SagaStatus::Running && !definition);
            assert_eq!(goes(&mut conn, &insert).await, expected, "{insert}");
        }
    }
    for status in StepStatus::ALL {
        let insert = format!(
            "insert into oncebox.saga_step (saga_id, step, ordinal, status, changed_at)
            select id, 'more', 9, '{}', now() from oncebox.saga",
            status.as_str()
        );
        assert_eq!(goes(&mut conn, &insert).await, status == StepStatus::Pending, "{insert}");
    }
    for status in CompensationStatus::ALL {
        let insert = format!(
            "insert into oncebox.saga_compensation (saga_id, step, ordinal, topic, status, recorded_at, changed_at)
            select id, 'charge', 1, 't', '{}', now(), now() from oncebox.saga",
            status.as_str()
        );
        let expected = matches!(status, CompensationStatus::Recorded | CompensationStatus::Ready);
        assert_eq!(goes(&mut conn, &insert).await, expected, "{insert}");
    }
    let first_step = "insert into oncebox.saga_step (saga_id, step, ordinal, status, changed_at)
        select id, 'done', 0, 'succeeded', now() from oncebox.saga where definition is null";
    set_up(
        &mut conn,
        "insert into oncebox.saga (id, business_key, status, created_at, start_at, changed_at)
        values (gen_random_uuid(), 'open', 'running', now(), now(), now())",
    )
    .await;
    assert!(goes(&mut conn, first_step).await, "what is enlisted is done");
}

/// Goal: what is written once stays: whatever a saga was started with, history, definitions, and all of a saga that has
/// ended; and nobody removes any of it.
#[tokio::test]
async fn what_is_written_stays() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    one_saga(&mut conn).await;
    let saga = [
        "id = gen_random_uuid()",
        "definition = null, version = null, definition_hash = null",
        "definition_hash = ''",
        "business_key = 'other'",
        "input = '{}'",
        "labels = '{}'",
        "created_at = now()",
        "start_at = now()",
        "deadline = now()",
        "seq = seq + 2",
        "seq = seq - 1",
        "head = ''",
        "reason = 'because'",
        "paused = true",
    ]
    .map(|change| format!("update oncebox.saga set {change}"));
    let others = [
        "update oncebox.saga_step set step = 'other' where step = 'reserve'",
        "update oncebox.saga_step set ordinal = 7 where step = 'reserve'",
        "update oncebox.saga_step set pivot = not pivot where step = 'reserve'",
        "update oncebox.saga_step set epoch = -1 where step = 'reserve'",
        "update oncebox.saga_compensation set topic = 'other'",
        "update oncebox.saga_compensation set recorded_at = '2000-01-01'",
        "update oncebox.saga_history set event = 'other'",
        "update oncebox.saga_history set detail = '{}'",
        "update oncebox.saga_history set hash = ''",
        "update oncebox.saga_definition set document = '{}'",
        "update oncebox.saga_definition set created_by = 'other'",
        "insert into oncebox.saga_history select saga_id, 2, at, event, detail, changes, cause, hash from oncebox.saga_history",
        "delete from oncebox.saga",
        "delete from oncebox.saga_step where step = 'charge'",
        "delete from oncebox.saga_compensation",
        "delete from oncebox.saga_history",
        "truncate oncebox.saga cascade",
        "truncate oncebox.saga_history",
    ]
    .map(str::to_owned);
    for change in saga.into_iter().chain(others) {
        assert!(!goes(&mut conn, &change).await, "went through: {change}");
    }
    // A wake-up is no change of state.
    assert!(goes(&mut conn, "update oncebox.saga set next_due = now(), changed_at = now()").await);
    assert!(goes(&mut conn, "update oncebox.saga set paused = true, seq = seq + 1").await);

    let error = conn.execute("delete from oncebox.saga_definition").await.unwrap_err().into_database_error().unwrap();
    assert_eq!(error.code().as_deref(), Some("23503"));
    assert!(error.message().contains("definition \"order\" version 1 is in use by 1 saga"), "{error}");

    set_up(&mut conn, "update oncebox.saga set status = 'completed', ended_at = now(), next_due = null").await;
    for change in [
        "update oncebox.saga set seq = seq + 1, reason = 'because'",
        "update oncebox.saga set seq = seq + 1, ended_at = '2000-01-01'",
        "update oncebox.saga set seq = seq + 1, cancel = 'because'",
        "update oncebox.saga_step set attempt = 7 where step = 'reserve'",
        "update oncebox.saga_step set output = '1' where step = 'reserve'",
        "insert into oncebox.saga_step (saga_id, step, ordinal, changed_at) select id, 'more', 9, now() from oncebox.saga",
        "update oncebox.saga_compensation set payload = '1'",
        "delete from oncebox.saga",
        "delete from oncebox.saga_history",
    ] {
        assert!(!goes(&mut conn, change).await, "went through: {change}");
    }
    // A reply that comes late is recorded.
    assert!(goes(&mut conn, "update oncebox.saga set seq = seq + 1, head = sha256(head)").await);
}

/// Goal: a history is dense from 1, each row follows from all before it, and whatever was changed, removed, added or
/// swapped is found, also behind the triggers' back; settings of the session change nothing.
#[tokio::test]
async fn a_changed_history_shows() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let id = one_saga(&mut conn).await;
    let record = r#"select oncebox.saga_record(id, 'due', '{"a": 0.1}', '{"s": "é"}', oncebox.saga_now(),
        case when seq % 2 = 0 then gen_random_uuid() end) from oncebox.saga"#;
    for _ in 0..4 {
        conn.execute(record).await.unwrap();
    }
    let seqs: Vec<i64> =
        sqlx::query_scalar("select seq from oncebox.saga_history order by seq").fetch_all(&mut conn).await.unwrap();
    assert_eq!(seqs, [1, 2, 3, 4, 5]);
    for settings in [
        "set timezone = 'Asia/Kathmandu'; set datestyle = 'German'; set intervalstyle = 'sql_standard'",
        "set extra_float_digits = -5; set bytea_output = 'escape'; set client_encoding = 'LATIN1'",
        "reset all",
    ] {
        conn.execute(settings).await.unwrap();
        assert_eq!(store::broken_at(&mut conn, id).await.unwrap(), None, "{settings}");
    }
    for (change, expected) in [
        ("update oncebox.saga_history set at = at + interval '1 microsecond' where seq = 2", 2),
        ("update oncebox.saga_history set event = 'reply' where seq = 3", 3),
        (r#"update oncebox.saga_history set detail = '{"a": 0.2}' where seq = 3"#, 3),
        (r#"update oncebox.saga_history set changes = '{"s": "e"}' where seq = 4"#, 4),
        ("update oncebox.saga_history set cause = gen_random_uuid() where seq = 2", 2),
        ("update oncebox.saga_history set cause = null where cause is not null and seq = 3", 3),
        ("update oncebox.saga_history set hash = sha256(hash) where seq = 1", 1),
        ("delete from oncebox.saga_history where seq = 1", 2),
        ("delete from oncebox.saga_history where seq = 3", 4),
        // The newest row: the saga itself knows of it.
        ("delete from oncebox.saga_history where seq = 5", 5),
        ("delete from oncebox.saga_history", 5),
        (
            "update oncebox.saga_history set seq = 9 where seq = 2; update oncebox.saga_history set seq = 2 where seq = 3;
            update oncebox.saga_history set seq = 3 where seq = 9",
            2,
        ),
        (
            "insert into oncebox.saga_history select saga_id, 6, at, event, detail, changes, cause,
                oncebox.saga_history_hash(hash, saga_id, 6, at, event, detail, changes, cause)
            from oncebox.saga_history where seq = 5",
            5,
        ),
        ("update oncebox.saga set head = sha256(head)", 5),
    ] {
        let mut attempt = conn.begin().await.unwrap();
        set_up(&mut attempt, change).await;
        assert_eq!(store::broken_at(&mut attempt, id).await.unwrap(), Some(expected), "{change}");
        attempt.rollback().await.unwrap();
    }
    assert_eq!(store::broken_at(&mut conn, id).await.unwrap(), None);

    // Where one part ends and the next begins is part of what is hashed.
    let hash = |event: &str, detail: &str| {
        format!(
            "select oncebox.saga_history_hash('', '{id}', 1, '2000-01-01 00:00Z', '{event}', '{detail}', '{{}}', null)"
        )
    };
    let mut of =
        async |text: String| -> Vec<u8> { sqlx::query_scalar(AssertSqlSafe(text)).fetch_one(&mut conn).await.unwrap() };
    assert_ne!(of(hash("a1", "1")).await, of(hash("a", "11")).await);
}
