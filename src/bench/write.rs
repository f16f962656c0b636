//! What an outbox row adds to a business transaction: rate, and CPU of Postgres.
//!
//! Every side is the same transaction, `begin`, a business row, what is added, `commit`, each a statement of its own as an
//! app sends them; one publishes in the business row's own statement instead, as its `returning`. A plain insert of the
//! same row into the log is the floor: what is above it is the function's own. A row of topic and payload in a table of
//! one's own is what a hand-made outbox would cost.

use super::cpu::Spent;
use super::figure::{Better, Measured, Section, Side};
use super::flow::{Flow, with_queue_for};
use super::report::Measurement;
use super::scratch::{Scratch, body};
use super::servers::Needs;
use super::stage::Stage;
use crate::consumer::Order;
use anyhow::Context;
use clap::Args;
use sqlx::{Connection, Executor, PgConnection};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;

/// Not measured: plans and connections.
const WARM_UP: Duration = Duration::from_millis(500);
/// Longest transaction: after that the server is taken for dead.
const LIMIT: Duration = Duration::from_secs(30);

/// Nothing is vacuumed meanwhile: every side is as short.
const TABLES: &str = "
    create table business (
        id bigint generated always as identity primary key, customer bigint not null, amount bigint not null,
        payload jsonb not null
    ) with (autovacuum_enabled = off);
    create table own_outbox (
        id bigint generated always as identity primary key, topic text not null, payload jsonb not null
    ) with (autovacuum_enabled = off);";
const BUSINESS: &str = "insert into business (customer, amount, payload) values ($1, $2, $3)";
const BUSINESS_RETURNING_PUBLISH: &str = "insert into business (customer, amount, payload) values ($1, $2, $3)
    returning oncebox.publish('order.placed', payload)";

#[derive(Debug, Args)]
pub(super) struct WriteBench {
    /// Sessions that write, one number for each comparison
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8], value_parser = clap::value_parser!(u32).range(1..=1_000))]
    connections: Vec<u32>,
    /// Seconds of measuring, after half a second of warming up
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    seconds: u32,
    /// Bytes of a payload
    #[arg(long, default_value_t = 256)]
    payload: usize,
    /// Measure also beside a running relay, whose reading then counts too
    #[arg(long)]
    relay: bool,
}

impl WriteBench {
    /// The broker is for the relay.
    pub(super) fn needs(&self) -> Needs {
        if self.relay { Needs::BOTH } else { Needs::POSTGRES }
    }
}

/// What a transaction adds to its business row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Adds {
    Nothing,
    OwnTable,
    PlainInsert,
    Publish,
    PublishReturning,
    PublishWithKey,
    PublishBytes,
    PublishBesideRelay,
}

impl Adds {
    /// The last one needs a broker.
    const ALL: [Self; 8] = [
        Self::Nothing,
        Self::OwnTable,
        Self::PlainInsert,
        Self::Publish,
        Self::PublishReturning,
        Self::PublishWithKey,
        Self::PublishBytes,
        Self::PublishBesideRelay,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "business row alone",
            Self::OwnTable => "and a row in a table of one's own",
            Self::PlainInsert => "and a plain insert into the log",
            Self::Publish => "and publish",
            Self::PublishReturning => "and publish, in the same statement",
            Self::PublishWithKey => "and publish with a key",
            Self::PublishBytes => "and publish_bytes",
            Self::PublishBesideRelay => "and publish, relay running",
        }
    }

    fn side(self, against: Self) -> Side {
        match self {
            Self::Nothing | Self::OwnTable | Self::PlainInsert => Side::baseline(self.name()),
            _ => Side::subject(self.name()).against(against.name()),
        }
    }

    /// What writes the business row.
    fn business(self) -> &'static str {
        if self == Self::PublishReturning { BUSINESS_RETURNING_PUBLISH } else { BUSINESS }
    }

    /// What follows it.
    fn statement(self) -> Option<&'static str> {
        match self {
            Self::Nothing | Self::PublishReturning => None,
            Self::OwnTable => Some("insert into own_outbox (topic, payload) values ('order.placed', $1)"),
            Self::PlainInsert => Some(
                "insert into oncebox.outbox (
                    slot, lane, seq, xid, message_id, topic, key, content_type, headers, body, published_at, expires_at)
                values (0, 0, nextval('oncebox.outbox_seq'), pg_current_xact_id(), gen_random_uuid(), 'order.placed', null,
                    'application/json', '{}', $1, clock_timestamp(), null)",
            ),
            Self::Publish | Self::PublishBesideRelay => Some("select oncebox.publish('order.placed', $1)"),
            Self::PublishWithKey => Some("select oncebox.publish('order.placed', $1, key => 'customer-000042')"),
            Self::PublishBytes => Some("select oncebox.publish_bytes('order.placed', $1, 'application/json')"),
        }
    }

    /// The parameter is bytes, not JSON.
    fn takes_bytes(self) -> bool {
        matches!(self, Self::PlainInsert | Self::PublishBytes)
    }
}

pub(super) async fn run(bench: &WriteBench, stage: &Stage) -> anyhow::Result<Measurement> {
    let sides = if bench.relay { &Adds::ALL[..] } else { &Adds::ALL[..7] };
    let mut measurement = Measurement::new("write", "What an outbox row adds to a business transaction")
        .setting("payload", format!("{} B", bench.payload))
        .setting("seconds a run", bench.seconds);
    for &connections in &bench.connections {
        let mut rates = Section::new(format!("{connections} connections"), "tx/s", Better::Higher);
        let title = format!("added to the business row, {connections} connections");
        let mut added = Section::new(title, "CPU-s of Postgres / 100k", Better::Lower);
        for adds in sides {
            rates = rates.side(adds.side(Adds::Nothing));
        }
        for adds in &sides[1..] {
            added = added.side(adds.side(Adds::PlainInsert));
        }
        let mut cpu = vec![vec![None; sides.len()]; stage.runs];
        for turn in stage.turns(sides.len()) {
            let (transactions, spent) = measure(bench, stage, sides[turn.side], connections).await?;
            cpu[turn.run - 1][turn.side] = spent.cpu.postgres.map(|s| s * 100_000.0 / transactions as f64);
            stage.record(&mut rates, turn, Measured::rate(transactions, &spent));
        }
        measurement = measurement.section(&rates);
        for run in cpu {
            let Some(run) = run.into_iter().collect::<Option<Vec<f64>>>() else { continue };
            for (side, with) in run[1..].iter().enumerate() {
                added.record(side, Measured::plain(with - run[0]));
            }
        }
        // Without a pid there is no CPU.
        if added.has_figures() {
            measurement = measurement.section(&added);
        }
    }
    if bench.relay {
        measurement =
            measurement.note("Beside a running relay, CPU of Postgres holds what the relay reads and records too.");
    }
    Ok(measurement
        .note(
            "What is added is the CPU of all of Postgres (WAL writer and checkpointer included) with it less that without \
             it, of the same run. Rates depend on the disk's fsync; CPU does not.",
        )
        .note(
            "The plain insert of an equal row into the log is the floor: round trip, insert, indexes, WAL; no app could do \
             it, for it knows neither slot nor lane. The ratio to it holds on a busy machine; CPU-seconds of the same code \
             rise by a factor where both cores are shared.",
        ))
}

async fn measure(bench: &WriteBench, stage: &Stage, adds: Adds, connections: u32) -> anyhow::Result<(u64, Spent)> {
    let scratch = Scratch::create(stage.servers.database_url()?).await?;
    let result = if adds == Adds::PublishBesideRelay {
        with_queue_for(stage, Order::None, async |exchange| {
            let mut flow = Flow::new(stage, false)?;
            flow.relay(&scratch, exchange)?;
            let result = write(bench, stage, &scratch, adds, connections).await?;
            flow.end().await?;
            Ok(result)
        })
        .await
    } else {
        write(bench, stage, &scratch, adds, connections).await
    };
    scratch.drop().await?;
    result
}

/// Transactions within the measured time, and what they took.
async fn write(
    bench: &WriteBench,
    stage: &Stage,
    scratch: &Scratch,
    adds: Adds,
    connections: u32,
) -> anyhow::Result<(u64, Spent)> {
    let mut conn = PgConnection::connect(&scratch.url).await?;
    conn.execute(TABLES).await?;
    conn.execute("checkpoint").await?;
    conn.close().await?;
    let (committed, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let payload: serde_json::Value = serde_json::from_str(&body(bench.payload))?;
    let mut sessions = JoinSet::new();
    for number in 0..connections {
        let conn = PgConnection::connect(&scratch.url).await?;
        let writing = Writing {
            conn,
            adds,
            payload: payload.clone(),
            bytes: body(bench.payload).into_bytes(),
            ordinal: i64::from(number),
            stride: connections.into(),
        };
        sessions.spawn(writing.run(Arc::clone(&committed), Arc::clone(&stop)));
    }
    tokio::time::sleep(WARM_UP).await;
    let (meter, before) = (stage.servers.meter(), committed.load(Ordering::SeqCst));
    tokio::time::sleep(Duration::from_secs(bench.seconds.into())).await;
    let (spent, after) = (meter.spent(), committed.load(Ordering::SeqCst));
    stop.store(true, Ordering::SeqCst);
    while let Some(ended) = sessions.join_next().await {
        ended.context("a writer")??;
    }
    anyhow::ensure!(after > before, "no transaction committed within {} s", bench.seconds);
    Ok((after - before, spent))
}

/// One session of an app.
struct Writing {
    conn: PgConnection,
    adds: Adds,
    payload: serde_json::Value,
    bytes: Vec<u8>,
    ordinal: i64,
    stride: i64,
}

impl Writing {
    async fn run(mut self, committed: Arc<AtomicU64>, stop: Arc<AtomicBool>) -> anyhow::Result<()> {
        while !stop.load(Ordering::SeqCst) {
            tokio::time::timeout(LIMIT, self.transaction()).await.context("a transaction took too long")??;
            committed.fetch_add(1, Ordering::SeqCst);
            self.ordinal += self.stride;
        }
        self.conn.close().await?;
        Ok(())
    }

    async fn transaction(&mut self) -> Result<(), sqlx::Error> {
        let mut transaction = self.conn.begin().await?;
        sqlx::query(self.adds.business())
            .bind(self.ordinal % 10_000)
            .bind(self.ordinal)
            .bind(&self.payload)
            .execute(&mut *transaction)
            .await?;
        if let Some(statement) = self.adds.statement() {
            let query = sqlx::query(statement);
            let query = if self.adds.takes_bytes() { query.bind(&self.bytes) } else { query.bind(&self.payload) };
            query.execute(&mut *transaction).await?;
        }
        transaction.commit().await
    }
}
