//! Goal: a look, a plan and a page cost what they hold, whatever the log's statistics say of it: they are kept by none
//! but the autovacuum, which may not have come yet, or have come when the log was empty.

use crate::support::Lab;
use crate::window::{Reader, read};
use oncebox::outbox::window;
use sqlx::{AssertSqlSafe, Executor, PgConnection};

const LEAVES: [&str; 8] =
    ["outbox_0", "outbox_1", "outbox_2", "outbox_3", "outbox_4", "outbox_5", "outbox_6", "outbox_7"];

/// What something reads, as the server counts.
#[derive(Debug)]
struct Cost {
    /// Rows and index entries of the log and the journal.
    rows: i64,
    /// Searches of the log's indexes: one that finds nothing reads no entry, and costs all the same.
    searches: i64,
}

async fn cost_of(reader: &mut Reader, work: impl AsyncFnOnce(&mut Reader)) -> Cost {
    let before = read_so_far(&mut reader.conn).await;
    work(reader).await;
    let after = read_so_far(&mut reader.conn).await;
    Cost { rows: after.0 - before.0, searches: after.1 - before.1 }
}

async fn read_so_far(conn: &mut PgConnection) -> (i64, i64) {
    conn.execute("select pg_stat_force_next_flush()").await.expect("flushes");
    sqlx::query_as(
        "select ((select sum(seq_tup_read) from pg_stat_user_tables
                where schemaname = 'oncebox' and relname ~ '^outbox_([0-7]|plan)$') + sum(idx_tup_read))::bigint,
            (sum(idx_scan) filter (where relname ~ '^outbox_[0-7]$'))::bigint
        from pg_stat_user_indexes where schemaname = 'oncebox' and relname ~ '^outbox_([0-7]|plan)$'",
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

    let cost = cost_of(&mut reader, async |reader| {
        for page in 0..20 {
            let after = plan.q1 + page * (BACKLOG / 20);
            let rows = window::read(&mut reader.conn, &plan, after, 50, usize::MAX).await.expect("reads").rows;
            assert_eq!(rows.len(), 50);
        }
    })
    .await;
    assert!((20 * 50..20 * 60).contains(&cost.rows), "20 pages of 50 rows: {cost:?}");

    for open in [false, true] {
        let mut other = lab.connect().await;
        if open {
            other.execute("begin; select oncebox.publish('open', '1')").await.expect("publishes");
            // The snapshot that lists it is the next one's first.
            reader.window(10).await;
            assert!(!reader.newest.ended_calm());
        }
        let cost = cost_of(&mut reader, async |reader| {
            for _ in 0..20 {
                publish(lab, "one", 1).await;
                let opened = reader.look(false, 10).await.opened.expect("it is found");
                assert!(opened.rows.len() == 1 && opened.complete);
                reader.newest = opened.recorded.plan;
            }
        })
        .await;
        assert!(cost.rows < 20 * 20, "20 windows of one row each: {cost:?}, one open: {open}");

        let cost = cost_of(&mut reader, twenty_looks_at_nothing).await;
        assert!(cost.rows < 20 * 5, "20 looks at nothing: {cost:?}, one open: {open}");
        other.execute("rollback").await.expect("rolls back");
    }
    let counted = read(&mut reader.conn, &plan, 5_000).await;
    assert_eq!(counted.len() as i64, BACKLOG);
}

async fn twenty_looks_at_nothing(reader: &mut Reader) {
    for _ in 0..20 {
        assert!(reader.look(false, 10).await.opened.is_none());
    }
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

/// Goal: a look that is to bring no rows makes its plan without a walk over those that nobody may see yet; the page behind
/// it has the rows of the window.
#[tokio::test]
async fn a_look_without_rows_walks_none() {
    const UNSEEN: i64 = 5_000;
    let lab = Lab::shared().await;
    let mut reader = Reader::new(&lab).await;
    for seen in [0, 3] {
        let mut other = lab.connect().await;
        other
            .execute(AssertSqlSafe(format!(
                "begin; select oncebox.publish('unseen', '1', key => i::text) from generate_series(1, {UNSEEN}) as i"
            )))
            .await
            .expect("publishes");
        publish(&lab, "seen", seen).await;
        let cost = cost_of(&mut reader, async |reader| {
            let opened = reader.look(true, 0).await.opened.expect("it was forced");
            assert!(opened.rows.is_empty() && !opened.complete);
            reader.newest = opened.recorded.plan;
        })
        .await;
        assert!(cost.rows < 50, "a look without rows: {cost:?}");
        let plan = reader.newest.clone();
        let cost = cost_of(&mut reader, async |reader| {
            let page = window::read(&mut reader.conn, &plan, 0, 10, usize::MAX).await.expect("reads");
            assert_eq!((page.rows.len() as i64, page.last), (seen, true));
        })
        .await;
        assert!(cost.rows >= UNSEEN, "the page walks what the look did not: {cost:?}");
        other.execute("rollback").await.expect("rolls back");
    }
}

/// Goal: a relay's session takes no parallel workers, also where they look free: each would be a process for a few rows.
#[tokio::test]
async fn a_relays_session_takes_no_parallel_workers() {
    let lab = Lab::shared().await;
    for free in
        ["parallel_setup_cost", "parallel_tuple_cost", "min_parallel_table_scan_size", "min_parallel_index_scan_size"]
    {
        lab.sql(&format!("alter database {} set {free} = 0", lab.name)).await;
    }
    publish(&lab, "backlog", BACKLOG).await;
    lab.sql("analyze oncebox.outbox").await;
    let explain = "explain select o.body from oncebox.outbox as o where o.lane = 0 and o.seq > 0";
    let takes_workers = async |conn: &mut PgConnection| {
        let lines: Vec<String> = sqlx::query_scalar(explain).fetch_all(conn).await.expect("explains");
        lines.iter().any(|line| line.contains("Gather"))
    };
    assert!(takes_workers(&mut lab.connect().await).await, "nobody would");
    assert!(!takes_workers(&mut Reader::new(&lab).await.conn).await);
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
    let cost = cost_of(&mut reader, twenty_looks_at_nothing).await;
    assert!(cost.rows < 20 * 10 && cost.searches < 20 * 100, "20 looks at nothing: {cost:?}");

    // One of them ends: the look finds it, and so does a page, and the counts.
    above.execute("commit").await.expect("commits");
    let cost = cost_of(&mut reader, async |reader| {
        let opened = reader.look(false, 10).await.opened.expect("it is found");
        let rows = &opened.rows;
        assert!(rows.len() == 3 && opened.complete && rows.iter().all(|row| row.message.topic == "above"));
        reader.newest = opened.recorded.plan;
    })
    .await;
    assert!(cost.rows < 50 && cost.searches < 200, "a window of 3 rows: {cost:?}");
    let first = reader.newest.clone();
    let cost = cost_of(&mut reader, async |reader| {
        for _ in 0..20 {
            assert_eq!(read(&mut reader.conn, &first, 100).await.len(), 3);
        }
    })
    .await;
    assert!(cost.rows < 20 * 50 && cost.searches < 20 * 200, "20 pages of 3 rows, and their counts: {cost:?}");

    // As does the one with the savepoints, which the next plan's snapshot lists.
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
