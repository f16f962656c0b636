//! Goal: what becomes of a delivery is one answer of the database, and no place of a message is forgotten by it.

use crate::support::{Lab, number};
use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

async fn receive(conn: &mut PgConnection, id: Uuid, place: &str, key: &str) -> String {
    let call = format!("select oncebox.inbox_receive('c', '{id}', {place}, {key})");
    sqlx::query_scalar(AssertSqlSafe(call.clone())).fetch_one(conn).await.unwrap_or_else(|e| panic!("{call}: {e}"))
}

async fn hold(lab: &Lab, id: Uuid, state: &str, place: &str, key: &str) {
    lab.sql(&format!(
        "insert into oncebox.inbox_held
            (consumer, message_id, state, reason, source, stream, \"offset\", key, topic, headers, body)
        values ('c', '{id}', '{state}', 'failed', {place}, {key}, 't', '{{}}', '')"
    ))
    .await;
}

/// Goal: new, done, held and behind its key are told apart; only 'new' accepts; a parked message holds up nobody.
#[tokio::test]
async fn inbox_receive_says_what_to_do() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let (first, waits, later, parked) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    let none = "null, null, null";
    assert_eq!(receive(&mut conn, first, none, "'k'").await, "new");
    assert_eq!(receive(&mut conn, first, none, "'k'").await, "done");
    hold(&lab, parked, "parked", none, "'k'").await;
    assert_eq!(receive(&mut conn, Uuid::now_v7(), none, "'k'").await, "new");
    hold(&lab, waits, "waiting", none, "'k'").await;
    for id in [waits, parked] {
        assert_eq!(receive(&mut conn, id, none, "'k'").await, "held");
    }
    assert_eq!(receive(&mut conn, later, none, "'k'").await, "behind_key");
    assert_eq!(receive(&mut conn, Uuid::now_v7(), none, "'other'").await, "new");
    assert_eq!(receive(&mut conn, Uuid::now_v7(), none, "null").await, "new");
    let accepted = format!("select count(*) from oncebox.inbox where message_id in ('{waits}', '{later}', '{parked}')");
    assert_eq!(number(&mut conn, &accepted).await, 0);
}

/// Goal: a held message that comes again under another place leaves that place behind, since it is acknowledged and
/// never seen again; under its own place it leaves nothing.
#[tokio::test]
async fn inbox_receive_records_the_second_place_of_a_held_message() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let (id, source) = (Uuid::now_v7(), Uuid::now_v7());
    let place = |offset: i64| format!("'{source}', 't#0', {offset}");
    hold(&lab, id, "waiting", &place(1), "null").await;
    let aliases =
        format!("select coalesce(sum(\"offset\"), 0)::bigint from oncebox.inbox_alias where message_id = '{id}'");
    assert_eq!(receive(&mut conn, id, &place(1), "null").await, "held");
    assert_eq!(receive(&mut conn, id, "null, null, null", "null").await, "held");
    assert_eq!(number(&mut conn, &aliases).await, 0);
    for _ in 0..2 {
        assert_eq!(receive(&mut conn, id, &place(7), "null").await, "held");
        assert_eq!(number(&mut conn, &aliases).await, 7);
    }
}

/// Goal: in a batch, a key that was found held up stays so to its end, although the message that held it up is done with
/// in the middle: no later message of the key runs before an earlier one.
#[tokio::test]
async fn a_key_stays_held_up_to_the_end_of_its_batch() {
    let lab = Lab::shared().await;
    let mut conn = lab.connect().await;
    let (waits, other) = (Uuid::now_v7(), Uuid::now_v7());
    hold(&lab, waits, "waiting", "null, null, null", "'k'").await;
    // Accepting the other one is the moment at which the waiting one is done with.
    lab.sql(&format!(
        "create function public.done() returns trigger language plpgsql as $$ begin
            delete from oncebox.inbox_held where message_id = '{waits}'; return null; end $$;
        create trigger done after insert on oncebox.inbox for each row when (new.message_id = '{other}')
            execute function public.done()"
    ))
    .await;
    let call = "select oncebox.inbox_receive_all('c', $1, $2, array_fill(null::text, array[3]), array_fill(null::bigint, array[3]), $3)";
    let answers: Vec<String> = sqlx::query_scalar(call)
        .bind(vec![Uuid::now_v7(), other, Uuid::now_v7()])
        .bind(vec![None::<Uuid>; 3])
        .bind(vec![Some("k"), Some("other"), Some("k")])
        .fetch_one(&mut conn)
        .await
        .unwrap();
    assert_eq!(answers, ["behind_key", "new", "behind_key"]);
    assert_eq!(number(&mut conn, "select count(*) from oncebox.inbox_held").await, 0);
}
