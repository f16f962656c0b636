//! Goal: the journal's windows hold every committed row exactly once, in an order that keeps each key's, with the same
//! offsets at every replay, whatever transactions, savepoints, aborts, prepared and long transactions there are.

use crate::support::{Lab, connect};
use oncebox::db::{self, DbError, SessionOptions};
use oncebox::outbox::journal::{self, LogPlace};
use oncebox::outbox::lease;
use oncebox::outbox::look::{self, Opened, PlanRecord, Sight};
use oncebox::outbox::window;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::collections::HashMap;
use std::time::Duration;
use uuid::Uuid;

/// What one of four sessions does next.
#[derive(Debug, Clone)]
enum Step {
    Publish {
        session: usize,
        key: u8,
    },
    Savepoint {
        session: usize,
    },
    RollbackToSavepoint {
        session: usize,
    },
    Commit {
        session: usize,
    },
    Rollback {
        session: usize,
    },
    /// Ends the session's transaction as a prepared one, to be committed or rolled back later.
    Prepare {
        session: usize,
    },
    FinishPrepared {
        commit: bool,
    },
    /// An xid is taken that writes no row, by itself or inside a session's transaction.
    UseXid,
    /// A relay opens a window and reads it, some rows at a time.
    Window {
        page: i64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let session = 0usize..4;
    prop_oneof![
        6 => (session.clone(), 0u8..3).prop_map(|(session, key)| Step::Publish { session, key }),
        1 => session.clone().prop_map(|session| Step::Savepoint { session }),
        1 => session.clone().prop_map(|session| Step::RollbackToSavepoint { session }),
        3 => session.clone().prop_map(|session| Step::Commit { session }),
        1 => session.clone().prop_map(|session| Step::Rollback { session }),
        1 => session.prop_map(|session| Step::Prepare { session }),
        1 => any::<bool>().prop_map(|commit| Step::FinishPrepared { commit }),
        1 => Just(Step::UseXid),
        4 => (1i64..4).prop_map(|page| Step::Window { page }),
    ]
}

/// One session, and what its open transaction has published.
struct Writer {
    conn: PgConnection,
    open: bool,
    rows: Vec<(Uuid, u8)>,
    savepoint: Option<usize>,
}

/// The relay's half, driven by hand.
pub struct Reader {
    pub conn: PgConnection,
    lane: i16,
    epoch: i64,
    pub newest: journal::Plan,
}

impl Reader {
    pub async fn new(lab: &Lab) -> Self {
        let options = SessionOptions {
            application_name: "test",
            statement_timeout: Duration::from_secs(30),
            idle_timeout: db::IDLE_TIMEOUT,
            plain_index_plans: true,
        };
        let mut conn = db::connect(&lab.database_url, options).await.expect("connects");
        let lease = lease::take(&mut conn, 0, Uuid::now_v7(), "test").await.expect("asks").expect("gets the lane");
        let resume = journal::resume(&mut conn, 0).await.expect("resumes");
        let newest = resume.plans.back().expect("the newest plan").plan.clone();
        Self { conn, lane: 0, epoch: lease.epoch, newest }
    }

    /// Looks, and opens the next window whether or not anything is new; reads it `page` rows at a time, of which the
    /// first come with the look. The look must have found the window by itself if it holds anything.
    pub async fn window(&mut self, page: i64) -> (bool, Vec<Uuid>) {
        let idle = self.newest.n % 2 == 0 && look::nothing_new(&mut self.conn, &self.newest).await.expect("looks");
        let mut sight = self.look(idle, page).await;
        let found = !idle && sight.opened.is_some();
        if sight.opened.is_none() {
            sight = self.look(true, page).await;
        }
        let Opened { recorded, rows, complete } = sight.opened.expect("it was forced");
        let plan = recorded.plan;
        assert!(rows.len() as i64 <= page && (complete || !rows.is_empty() || page == 0));
        let mut ids: Vec<Uuid> = rows.iter().map(|row| row.message.id.0).collect();
        // All of it by the page is what the look brought, and the rest.
        let all = read(&mut self.conn, &plan, page.max(1)).await;
        assert_eq!(all[..ids.len()], ids, "a look brings other rows than a page");
        if complete {
            assert_eq!(all.len(), ids.len(), "the look said that this is all");
        }
        ids.extend(&all[ids.len()..]);
        self.newest = plan;
        (found, ids)
    }

    pub async fn look(&mut self, forced: bool, max_rows: i64) -> Sight {
        let settled = LogPlace { n: 0, seq: 0 };
        let record = PlanRecord { settled, keyframe: false, streams: Vec::new(), bases: Vec::new() };
        look::look(&mut self.conn, self.epoch, &self.newest, forced, record, max_rows).await.expect("looks")
    }

    /// Every window of the journal again, as a relay that takes over would read them.
    async fn replay(&mut self, page: i64) -> Vec<Uuid> {
        let resume = journal::resume(&mut self.conn, self.lane).await.expect("resumes");
        let mut rows = Vec::new();
        for recorded in resume.plans {
            rows.extend(read(&mut self.conn, &recorded.plan, page).await);
        }
        rows
    }
}

pub async fn read(conn: &mut PgConnection, plan: &journal::Plan, page: i64) -> Vec<Uuid> {
    let (mut rows, mut after) = (Vec::new(), 0);
    loop {
        let read = window::read(conn, plan, after, page, usize::MAX).await.expect("reads");
        after = read.rows.last().map_or(after, |row| row.place.seq);
        rows.extend(read.rows.iter().map(|row| row.message.id.0));
        if read.last {
            let counted: i64 =
                window::count_upto(conn, plan, i64::MAX).await.expect("counts").iter().map(|(_, count)| count).sum();
            assert_eq!(counted, rows.len() as i64, "the counts of a window disagree with its rows");
            return rows;
        }
    }
}

async fn run(lab: &Lab, steps: &[Step]) {
    let mut admin = connect(&lab.database_url).await;
    admin.execute("truncate oncebox.outbox; delete from oncebox.outbox_plan where n > 0").await.expect("cleared");
    admin.execute("update oncebox.outbox_lease set owner = null, expires_at = '-infinity'").await.expect("freed");
    let mut writers = Vec::new();
    for _ in 0..4 {
        let conn = connect(&lab.database_url).await;
        writers.push(Writer { conn, open: false, rows: Vec::new(), savepoint: None });
    }
    let mut reader = Reader::new(lab).await;
    let mut prepared: Vec<(String, Vec<(Uuid, u8)>)> = Vec::new();
    // Committed rows, with when they were published and when they were committed, by the test's own clock.
    let mut committed: HashMap<Uuid, (u8, usize, usize)> = HashMap::new();
    let mut published_at: HashMap<Uuid, usize> = HashMap::new();
    let mut seen: Vec<Uuid> = Vec::new();

    for (now, step) in steps.iter().enumerate() {
        let mut commit = |rows: &mut Vec<(Uuid, u8)>| {
            for (id, key) in rows.drain(..) {
                committed.insert(id, (key, published_at[&id], now));
            }
        };
        match step {
            Step::Publish { session, key } => {
                let writer = &mut writers[*session];
                if !writer.open {
                    writer.conn.execute("begin").await.expect("begins");
                    writer.open = true;
                }
                let publish = sqlx::query_scalar("select oncebox.publish('t', '1', key => $1)").bind(key.to_string());
                let id = publish.fetch_one(&mut writer.conn).await.expect("publishes");
                writer.rows.push((id, *key));
                published_at.insert(id, now);
            }
            Step::Savepoint { session } if writers[*session].open => {
                let writer = &mut writers[*session];
                writer.conn.execute("savepoint s").await.expect("saves");
                writer.savepoint = Some(writer.rows.len());
            }
            Step::RollbackToSavepoint { session } => {
                let writer = &mut writers[*session];
                if let Some(length) = writer.savepoint.filter(|_| writer.open) {
                    writer.conn.execute("rollback to s").await.expect("rolls back");
                    writer.rows.truncate(length);
                }
            }
            Step::Commit { session } | Step::Rollback { session } | Step::Prepare { session }
                if writers[*session].open =>
            {
                let writer = &mut writers[*session];
                match step {
                    Step::Commit { .. } => {
                        writer.conn.execute("commit").await.expect("commits");
                        commit(&mut writer.rows);
                    }
                    Step::Rollback { .. } => {
                        writer.conn.execute("rollback").await.expect("rolls back");
                    }
                    _ => {
                        let name = Uuid::now_v7().to_string();
                        let prepare = format!("prepare transaction '{name}'");
                        writer.conn.execute(AssertSqlSafe(prepare)).await.expect("prepares");
                        prepared.push((name, std::mem::take(&mut writer.rows)));
                    }
                }
                (writer.open, writer.savepoint) = (false, None);
                writer.rows.clear();
            }
            Step::FinishPrepared { commit: keep } => {
                if let Some((name, mut rows)) = prepared.pop() {
                    let verb = if *keep { "commit" } else { "rollback" };
                    admin.execute(AssertSqlSafe(format!("{verb} prepared '{name}'"))).await.expect("finishes");
                    if *keep {
                        commit(&mut rows);
                    }
                }
            }
            Step::UseXid => {
                admin.execute("select pg_current_xact_id()").await.expect("uses an xid");
            }
            Step::Window { page } => {
                let (found, rows) = reader.window(*page).await;
                assert!(found || rows.is_empty(), "the probe saw nothing, the window holds {}", rows.len());
                seen.extend(rows);
            }
            _ => {}
        }
    }
    for writer in &mut writers {
        if writer.open {
            writer.conn.execute("commit").await.expect("commits");
            for (id, key) in writer.rows.drain(..) {
                committed.insert(id, (key, published_at[&id], steps.len()));
            }
        }
    }
    for (name, _) in prepared {
        admin.execute(AssertSqlSafe(format!("rollback prepared '{name}'"))).await.expect("rolls back");
    }
    let (_, rest) = reader.window(100).await;
    seen.extend(rest);
    let (found, nothing) = reader.window(100).await;
    assert!(!found && nothing.is_empty(), "rows are seen twice");

    // Exactly the committed rows, each once.
    let mut expected: Vec<Uuid> = committed.keys().copied().collect();
    let mut found = seen.clone();
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, expected);
    // If one was committed before another of its key was published, it comes first.
    let place: HashMap<Uuid, usize> = seen.iter().enumerate().map(|(place, id)| (*id, place)).collect();
    for (first, (key, _, committed_at)) in &committed {
        for (second, (other_key, published, _)) in &committed {
            if key == other_key && committed_at < published {
                assert!(place[first] < place[second], "the order of key {key}");
            }
        }
    }
    // A relay that takes over reads the same, in the same order, whatever its page.
    for page in [1, 2, 1000] {
        assert_eq!(reader.replay(page).await, seen, "a replay with pages of {page}");
    }
}

/// Goal: as the file says, over many random histories.
#[test]
fn windows_hold_every_committed_row_once() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    // Prepared transactions are the cluster's, and a long one of another test only adds to the history.
    let lab = runtime.block_on(Lab::shared());
    let mut runner = TestRunner::new(Config { cases: 120, failure_persistence: None, ..Config::default() });
    let histories = prop::collection::vec(step(), 1..60);
    let result = runner.run(&histories, |steps| {
        runtime.block_on(run(&lab, &steps));
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// Goal: a plan knows whether a transaction was open when it was made: then, and only then, rows with lower numbers can
/// still come.
#[tokio::test]
async fn a_plan_knows_of_open_transactions() {
    // On a shared server other tests' transactions, prepared ones too, can be open the whole time.
    let lab = Lab::own().await;
    let mut reader = Reader::new(&lab).await;
    let mut quiet = false;
    for _ in 0..50 {
        // Autovacuum's transactions are open at times.
        reader.window(10).await;
        quiet |= reader.newest.ended_calm();
    }
    assert!(quiet, "never quiet");
    let mut open = lab.connect().await;
    open.execute("begin; select oncebox.publish('t', '1')").await.expect("publishes");
    reader.window(10).await;
    assert!(!reader.newest.ended_calm(), "{:?}", reader.newest);
    open.execute("commit").await.expect("commits");
    assert_eq!(reader.window(10).await.1.len(), 1);
}

/// Goal: the first message of a new database is not passed over: an unused sequence says 1 before it gives out 1.
#[tokio::test]
async fn the_first_message_is_found() {
    let lab = Lab::shared().await;
    let mut reader = Reader::new(&lab).await;
    assert!(reader.window(10).await.1.is_empty());
    let mut conn = lab.connect().await;
    let id: Uuid =
        sqlx::query_scalar("select oncebox.publish('t', '1')").fetch_one(&mut conn).await.expect("publishes");
    assert_eq!(reader.window(10).await, (true, vec![id]));
    conn.close().await.expect("closes");
}

/// Goal: the window's statements use the indexes on a table that was never analysed, behind a large backlog, with a
/// large transaction open when the window before was taken.
#[tokio::test]
async fn windows_are_read_by_index() {
    let lab = Lab::shared().await;
    let mut reader = Reader::new(&lab).await;
    let mut late = lab.connect().await;
    late.execute("begin; select oncebox.publish('late', '1', key => i::text) from generate_series(1, 3000) as i")
        .await
        .expect("publishes");
    reader.window(10).await;
    lab.sql("select oncebox.publish('t', '1', key => i::text) from generate_series(1, 30000) as i").await;
    late.execute("commit").await.expect("commits");
    let plan = reader.look(false, 0).await.opened.expect("something was found").recorded.plan;
    // In the middle: a page costs what it holds, not what the window holds.
    for after in [1_500, 20_000] {
        let explain = format!("explain (analyze, format text) {}", window::STATEMENTS[0]);
        let mut query = sqlx::query_scalar::<_, String>(AssertSqlSafe(explain));
        query = query
            .bind(0i16)
            .bind(&plan.s1)
            .bind(&plan.p1)
            .bind(plan.q1)
            .bind(&plan.s2)
            .bind(after as i64)
            .bind(100i64)
            .bind(plan.q_top);
        let lines = query.fetch_all(&mut reader.conn).await.expect("explains").join("\n");
        assert!(!lines.contains("Seq Scan on outbox"), "{lines}");
        let most = lines.split("rows=").filter_map(|rest| rest.split_once(' ')?.0.parse::<u64>().ok()).max();
        let touched = lines.split("Removed by Filter: ").skip(1);
        let removed: u64 = touched.filter_map(|rest| rest.split('\n').next()?.trim().parse::<u64>().ok()).sum();
        assert!(removed < 200, "a page of 100 rows passes over {removed} (most {most:?}):\n{lines}");
    }
}

/// Goal: a relay whose lane was taken over finds that out at its next look: it gets no row, and no plan is recorded.
#[tokio::test]
async fn a_look_of_an_earlier_holder_is_refused() {
    let lab = Lab::shared().await;
    let mut reader = Reader::new(&lab).await;
    lab.sql("update oncebox.outbox_lease set epoch = epoch + 1 where lane = 0").await;
    lab.sql("select oncebox.publish('t', '1')").await;
    let settled = LogPlace { n: 0, seq: 0 };
    let record = PlanRecord { settled, keyframe: false, streams: Vec::new(), bases: Vec::new() };
    let seen = look::look(&mut reader.conn, reader.epoch, &reader.newest, false, record, 10).await;
    assert!(matches!(seen, Err(DbError::LeaseLost { lane: 0 })), "{seen:?}");
    assert_eq!(lab.number("select max(n) from oncebox.outbox_plan where lane = 0").await, reader.newest.n);
}
