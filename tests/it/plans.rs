//! Goal: a look, a plan and a page cost what they hold, whatever the log's statistics say of it: they are kept by none
//! but the autovacuum, which may not have come yet, or have come when the log was empty.

use crate::support::Lab;
use crate::window::{Reader, read};
use oncebox::outbox::window;
use sqlx::{AssertSqlSafe, Executor, PgConnection};

const LEAVES: [&str; 8] =
    ["outbox_0", "outbox_1", "outbox_2", "outbox_3", "outbox_4", "outbox_5", "outbox_6", "outbox_7"];

/// How many rows and index entries of the log and the journal were read so far, as the server counts.
async fn touched(conn: &mut PgConnection) -> i64 {
    conn.execute("select pg_stat_force_next_flush()").await.expect("flushes");
    sqlx::query_scalar(
        "select ((select sum(seq_tup_read) from pg_stat_user_tables
                where schemaname = 'oncebox' and relname ~ '^outbox_([0-7]|plan)$')
            + (select sum(idx_tup_read) from pg_stat_user_indexes
                where schemaname = 'oncebox' and relname ~ '^outbox_([0-7]|plan)$'))::bigint",
    )
    .fetch_one(conn)
    .await
    .expect("counts")
}

/// How often an index of the log was searched so far: a search that finds nothing reads no entry, and costs all the same.
async fn searched(conn: &mut PgConnection) -> i64 {
    conn.execute("select pg_stat_force_next_flush()").await.expect("flushes");
    sqlx::query_scalar(
        "select sum(idx_scan)::bigint from pg_stat_user_indexes
        where schemaname = 'oncebox' and relname ~ '^outbox_[0-7]$'",
    )
    .fetch_one(conn)
    .await
    .expect("counts")
}

const BACKLOG: i64 = 20_000;

async fn publish(lab: &Lab, topic: &str, count: i64) {
    lab.sql(&format!("select oncebox.publish('{topic}', '1', key => i::text) from generate_series(1, {count}) as i"))
        .await;
}

/// Pages in the middle of a backlog, looks that find one message behind it, and looks that find none: each many times,
/// so that prepared statements have their generic plans, and with a transaction open and without.
async fn everything_costs_what_it_holds(lab: &Lab) {
    let mut reader = Reader::new(lab).await;
    publish(lab, "backlog", BACKLOG).await;
    let plan = reader.look(false, 0).await.opened.expect("the backlog is found").recorded.plan;
    assert!(plan.q_top - plan.q1 >= BACKLOG);
    reader.newest = plan.clone();

    let before = touched(&mut reader.conn).await;
    for page in 0..20 {
        let after = plan.q1 + page * (BACKLOG / 20);
        let rows = window::read(&mut reader.conn, &plan, after, 50, usize::MAX).await.expect("reads").rows;
        assert_eq!(rows.len(), 50);
    }
    let cost = touched(&mut reader.conn).await - before;
    assert!((20 * 50..20 * 60).contains(&cost), "20 pages of 50 rows read {cost} rows");

    for open in [false, true] {
        let mut other = lab.connect().await;
        if open {
            other.execute("begin; select oncebox.publish('open', '1')").await.expect("publishes");
            // The snapshot that lists it is the next one's first.
            reader.window(10).await;
            assert!(!reader.newest.ended_calm());
        }
        let before = touched(&mut reader.conn).await;
        for _ in 0..20 {
            publish(lab, "one", 1).await;
            let opened = reader.look(false, 10).await.opened.expect("it is found");
            assert!(opened.rows.len() == 1 && opened.complete);
            reader.newest = opened.recorded.plan;
        }
        let cost = touched(&mut reader.conn).await - before;
        assert!(cost < 20 * 20, "20 windows of one row each read {cost} rows, one open: {open}");

        let before = touched(&mut reader.conn).await;
        for _ in 0..20 {
            assert!(reader.look(false, 10).await.opened.is_none());
        }
        let cost = touched(&mut reader.conn).await - before;
        assert!(cost < 20 * 5, "20 looks at nothing read {cost} rows, one open: {open}");
        other.execute("rollback").await.expect("rolls back");
    }
    let counted = read(&mut reader.conn, &plan, 5_000).await;
    assert_eq!(counted.len() as i64, BACKLOG);
}

/// Goal: so on a log that was never analysed.
#[tokio::test]
async fn a_log_never_analysed_is_read_by_index() {
    let lab = Lab::shared().await;
    for leaf in LEAVES {
        lab.sql(&format!("alter table oncebox.{leaf} set (autovacuum_enabled = false)")).await;
    }
    everything_costs_what_it_holds(&lab).await;
    let analysed = "select count(*) from pg_stat_user_tables where relname = 'outbox_0' and last_analyze is not null";
    assert_eq!(lab.number(analysed).await, 0);
}

/// Goal: so on a log that was analysed when it was almost empty, and grew.
#[tokio::test]
async fn a_log_analysed_when_almost_empty_is_read_by_index() {
    let lab = Lab::shared().await;
    publish(&lab, "few", 3).await;
    for leaf in LEAVES {
        lab.sql(&format!("alter table oncebox.{leaf} set (autovacuum_enabled = false)")).await;
        lab.sql(&format!("analyze oncebox.{leaf}")).await;
    }
    let mut reader = Reader::new(&lab).await;
    assert_eq!(reader.window(10).await.1.len(), 3);
    lab.sql("update oncebox.outbox_lease set owner = null, expires_at = '-infinity'").await;
    everything_costs_what_it_holds(&lab).await;
}

/// Goal: no parallel workers are started for a page of a log that looks large: each would be a process for a few rows.
#[tokio::test]
async fn a_page_takes_no_parallel_workers() {
    let lab = Lab::own().await;
    for free in
        ["parallel_setup_cost", "parallel_tuple_cost", "min_parallel_table_scan_size", "min_parallel_index_scan_size"]
    {
        lab.sql(&format!("alter database {} set {free} = 0", lab.name)).await;
    }
    publish(&lab, "backlog", BACKLOG).await;
    lab.sql("analyze oncebox.outbox").await;
    let mut reader = Reader::new(&lab).await;
    let plan = reader.look(false, 0).await.opened.expect("the backlog is found").recorded.plan;
    assert_eq!(read(&mut reader.conn, &plan, 5_000).await.len() as i64, BACKLOG);
    let prepared: Vec<String> = sqlx::query_scalar(
        "select format('explain execute %s (%s)', p.name, array_to_string(array_fill('null'::text,
            array[cardinality(p.parameter_types)]), ', '))
        from pg_prepared_statements as p where p.statement like '%from oncebox.outbox as o%' and cardinality(p.parameter_types) > 0",
    )
    .fetch_all(&mut reader.conn)
    .await
    .expect("the session's statements");
    assert!(!prepared.is_empty());
    for explain in prepared {
        let lines: Vec<String> =
            sqlx::query_scalar(AssertSqlSafe(explain)).fetch_all(&mut reader.conn).await.expect("explains");
        assert!(lines.iter().any(|line| line.contains("Index Scan")), "{lines:#?}");
        assert!(!lines.iter().any(|line| line.contains("Gather")), "{lines:#?}");
    }
}

/// Goal: savepoints can put any number of xids between a plan's snapshot and its own: its looks, its window and the
/// counts of it still read what they hold, and hold the rows of the transactions that were open.
#[tokio::test]
async fn a_plan_after_many_savepoints_costs_what_it_holds() {
    // Of its own: on a shared server another test's transactions end while the savepoints are made, and move xmax.
    let lab = Lab::own().await;
    let mut reader = Reader::new(&lab).await;
    publish(&lab, "before", 1).await;
    assert_eq!(reader.window(10).await.1.len(), 1);
    // Both write rows after a look read the sequence, and before the plan does.
    let mut saving = lab.connect().await;
    saving
        .execute(
            "begin;
            select oncebox.publish('saving', '1', key => i::text) from generate_series(1, 500) as i;
            create temporary table app (i integer);
            do $$ begin
                for i in 1..20000 loop
                    begin insert into app values (i); exception when others then null; end;
                end loop;
            end $$",
        )
        .await
        .expect("saves");
    let mut above = lab.connect().await;
    above
        .execute("begin; select oncebox.publish('above', '1', key => i::text) from generate_series(1, 3) as i")
        .await
        .expect("publishes");
    let plan = reader.look(true, 10).await.opened.expect("it was forced").recorded.plan;
    let xmax: i64 = plan.s2.split(':').nth(1).expect("an xmax").parse().expect("an xid");
    let range = plan.p2.parse::<i64>().expect("an xid") - xmax;
    assert!(range > 20_000, "{plan:?}");
    reader.newest = plan;

    // Looks that find nothing, while those rows are there and nobody's.
    let before = (touched(&mut reader.conn).await, searched(&mut reader.conn).await);
    for _ in 0..20 {
        assert!(reader.look(false, 10).await.opened.is_none());
    }
    let cost = touched(&mut reader.conn).await - before.0;
    let searches = searched(&mut reader.conn).await - before.1;
    assert!(cost < 20 * 10 && searches < 20 * 100, "20 looks at nothing read {cost} rows in {searches} searches");

    // One of them ends: the look finds it, and so does a page, and the counts.
    above.execute("commit").await.expect("commits");
    let before = (touched(&mut reader.conn).await, searched(&mut reader.conn).await);
    let opened = reader.look(false, 10).await.opened.expect("it is found");
    assert!(opened.rows.len() == 3 && opened.complete && opened.rows.iter().all(|row| row.message.topic == "above"));
    let cost = touched(&mut reader.conn).await - before.0;
    let searches = searched(&mut reader.conn).await - before.1;
    assert!(cost < 50 && searches < 200, "a window of 3 rows read {cost} rows in {searches} searches");
    let first = opened.recorded.plan;
    let before = (touched(&mut reader.conn).await, searched(&mut reader.conn).await);
    for _ in 0..20 {
        assert_eq!(read(&mut reader.conn, &first, 100).await.len(), 3);
    }
    let cost = touched(&mut reader.conn).await - before.0;
    let searches = searched(&mut reader.conn).await - before.1;
    assert!(
        cost < 20 * 50 && searches < 20 * 200,
        "20 pages of 3 rows, and their counts, read {cost} rows in {searches} searches"
    );

    // As does the one with the savepoints, which the next plan's snapshot lists.
    reader.newest = first;
    saving.execute("commit").await.expect("commits");
    let (found, rows) = reader.window(100).await;
    assert!(found && rows.len() == 500);
    assert!(!reader.window(10).await.0);
}

/// Goal: as above, when the transaction with the savepoints is the one that ends first.
#[tokio::test]
async fn rows_of_a_transaction_with_many_savepoints_are_found() {
    let lab = Lab::own().await;
    let mut reader = Reader::new(&lab).await;
    let mut saving = lab.connect().await;
    saving
        .execute(
            "begin;
            select oncebox.publish('saving', '1', key => i::text) from generate_series(1, 5) as i;
            create temporary table app (i integer);
            do $$ begin
                for i in 1..5000 loop
                    begin insert into app values (i); exception when others then null; end;
                end loop;
            end $$;
            select oncebox.publish('saving', '2', key => i::text) from generate_series(1, 5) as i",
        )
        .await
        .expect("saves");
    let plan = reader.look(true, 10).await.opened.expect("it was forced").recorded.plan;
    reader.newest = plan;
    saving.execute("commit").await.expect("commits");
    publish(&lab, "after", 2).await;
    let (found, rows) = reader.window(3).await;
    assert!(found && rows.len() == 12);
    let (found, rows) = reader.window(3).await;
    assert!(!found && rows.is_empty());
}

/// Goal: what a look brings is bounded with all its columns: rows of short bodies and long names too.
#[tokio::test]
async fn a_look_counts_every_column_of_its_rows() {
    let lab = Lab::shared().await;
    let mut reader = Reader::new(&lab).await;
    lab.sql(
        "select oncebox.publish_bytes(repeat('t', 255), '', repeat('c', 255), key => rpad(i::text, 255, 'k'))
        from generate_series(1, 100) as i",
    )
    .await;
    let opened = reader.look(false, 100).await.opened.expect("they are found");
    // 915 bytes each.
    assert_eq!((opened.rows.len(), opened.complete), ((32 << 10) / 915, false));
    assert_eq!(read(&mut reader.conn, &opened.recorded.plan, 100).await.len(), 100);
}
