//! `oncebox demo`: the main job end to end on real servers, with faults, and its reconciliation.
//!
//! A small shop on the private servers: writers place orders, each in one transaction with its message; two relays and
//! two consumers, processes of this program, turn them into invoices while processes and servers are killed by a plan
//! that follows from the seed. Then databases, wire and clients must agree. Left out on purpose: servers of the user's,
//! which no demo may kill.

mod books;
mod children;
mod deliveries;
mod faults;
mod progress;
mod random;
mod reconcile;
mod shop;
mod wire;

use crate::node::{Postgres, PostgresOptions, Rabbit, RabbitOptions};
use anyhow::{Context, bail};
use books::Books;
use children::{Children, Kind};
use deliveries::Deliveries;
use faults::{Done, Faults, Targets};
use progress::{Counts, Progress};
use reconcile::{Evidence, Report, number};
use shop::Counter;
use sqlx::{AssertSqlSafe, Executor, PgConnection};
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;

/// How long the rest may take once the faults are over: the promise of the product.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at the counts.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Databases of earlier demos that stay for a look.
const DATABASES_KEPT: i64 = 2;
/// Exit code after Ctrl-C, as shells count it.
const INTERRUPTED: u8 = 130;

/// Arguments of `oncebox demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Folder of the private servers; they are started if they do not run
    #[arg(long, default_value = ".dev", value_name = "FOLDER")]
    dir: PathBuf,
    /// How many orders are placed
    #[arg(long, default_value_t = 2_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    orders: u64,
    /// Repeats the orders and the faults of an earlier run [default: random]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// How much goes wrong
    #[arg(long, value_enum, default_value_t = Faults::Some)]
    faults: Faults,
}

/// Runs the demo: exit code 0 if everything adds up, 1 if not, 130 after Ctrl-C.
///
/// # Errors
/// The private servers do not come up or stay away, or a part of the demo itself fails.
pub async fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(|| RandomState::new().hash_one(0_u8) % 1_000_000);
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut hang_up = signal(SignalKind::hangup())?;
    let stop = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
        }
    };
    tokio::pin!(stop);

    let faults = clap::ValueEnum::to_possible_value(&args.faults).map(|v| v.get_name().to_owned()).unwrap_or_default();
    eprintln!("{} orders, seed {seed}, faults: {faults}", number(args.orders));
    let stage = tokio::select! {
        stage = Stage::set_up(&args, seed) => stage?,
        () = &mut stop => return Ok(ExitCode::from(INTERRUPTED)),
    };
    let progress = Progress::new((1..=args.orders).filter(|id| !shop::order(seed, *id).regretted).count() as u64);
    let performed = tokio::select! {
        performed = stage.perform(&progress) => Some(performed),
        () = &mut stop => None,
    };
    progress.clear();
    if performed.is_none() {
        eprintln!("interrupted: cleaning up");
    }
    // The children are gone with the performance; later signals do not cut this short.
    stage.tear_down().await?;
    let Some(performed) = performed else { return Ok(ExitCode::from(INTERRUPTED)) };
    let report = performed?;
    println!("{report}");
    println!("{}", stage.hint());
    if report.problems.is_empty() {
        println!("everything adds up ({:.0} s, seed {seed})", progress.elapsed().as_secs_f64());
        return Ok(ExitCode::SUCCESS);
    }
    println!("it does not add up (seed {seed}): {}", report.problems.join("; "));
    Ok(ExitCode::FAILURE)
}

/// The servers, and what is the demo's own on them.
struct Stage {
    dir: PathBuf,
    /// Of the database and of the vhost.
    name: String,
    seed: u64,
    orders: u64,
    faults: Faults,
    postgres: Mutex<Postgres>,
    rabbit: Mutex<Rabbit>,
    database_url: String,
    amqp_url: String,
    /// One demo at a time kills the servers of a folder.
    _lock: File,
}

impl Stage {
    async fn set_up(args: &DemoArgs, seed: u64) -> anyhow::Result<Self> {
        let logs = args.dir.join("demo-logs");
        fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        let lock = File::create(logs.join("lock")).with_context(|| logs.display().to_string())?;
        if lock.try_lock().is_err() {
            bail!("another demo runs on the servers of {}", args.dir.display());
        }
        let dir = args.dir.as_path();
        if Postgres::attach(dir).await.is_none() || Rabbit::attach(dir).await.is_none() {
            eprintln!("starting PostgreSQL and RabbitMQ in {} …", dir.display());
        }
        let postgres = Postgres::up(dir, PostgresOptions::default()).await;
        let postgres = postgres.context("the private PostgreSQL cannot be started")?;
        // What `./dev psql` opens, if these servers were never started by `./dev`.
        postgres.create_database("oncebox").await?;
        let rabbit = Rabbit::up(dir, RabbitOptions::default()).await;
        let rabbit = rabbit.context("the private RabbitMQ cannot be started")?;
        let name = format!("demo_{:08x}", RandomState::new().hash_one(1_u8) as u32);
        Ok(Self {
            dir: dir.to_owned(),
            seed,
            orders: args.orders,
            faults: args.faults,
            database_url: postgres.url(&name),
            amqp_url: rabbit.url(&name),
            name,
            postgres: Mutex::new(postgres),
            rabbit: Mutex::new(rabbit),
            _lock: lock,
        })
    }

    fn logs(&self) -> PathBuf {
        self.dir.join("demo-logs")
    }

    async fn perform(&self, progress: &Progress) -> anyhow::Result<Report> {
        let vhost = async { self.rabbit.lock().await.add_vhost(&self.name).await.context("the vhost of the demo") };
        tokio::try_join!(self.make_database(), vhost)?;
        wire::declare(&self.amqp_url).await?;
        let config = self.logs().join("oncebox.toml");
        fs::write(&config, shop::CONSUMER_CONFIG).with_context(|| config.display().to_string())?;
        let children = Children::start(&self.logs(), &config, &self.database_url, &self.amqp_url).await?;
        progress.note(&format!(
            "database and vhost {}; two relays, two consumers, two orchestrators, eight writers",
            self.name
        ));

        let counter = Arc::new(Counter::default());
        let (done, drained) = tokio::select! {
            done = self.trade(&children, &counter, progress) => done?,
            error = self.watch(&children, &counter, progress) => return Err(error),
        };
        self.show(&counter, None, progress).await;
        let mut troubles = Vec::new();
        if !drained {
            troubles.push(format!("not drained within {} s of the last fault", DRAIN_LIMIT.as_secs()));
        }
        progress.note("stopping the relays, reading the wire");
        children.stop(Kind::Relay).await?;
        let wire = wire::read(&self.amqp_url).await.context("reading the wire")?;
        children.stop(Kind::Consumer).await?;
        children.stop(Kind::Orchestrator).await?;
        troubles.extend(children.unexpected().await);

        let mut conn = shop::connect(&self.database_url).await?;
        let books = Books::read(&mut conn).await.context("reading the books")?;
        let unanswered = counter.unanswered();
        let compared = books::compare(&mut conn, (self.seed, self.orders), &unanswered, &wire).await?;
        let deliveries = Deliveries::read(&mut conn).await.context("reading the sagas")?;
        crate::db::close(conn).await;
        let (committed, rolled_back) = (&counter.committed, &counter.rolled_back);
        Ok(reconcile::judge(Evidence {
            committed: committed.load(Ordering::Relaxed),
            rolled_back: rolled_back.load(Ordering::Relaxed),
            books,
            compared,
            deliveries,
            wire,
            done,
            troubles,
        }))
    }

    /// A database of its own, with both schemas; drops those of demos long ago.
    async fn make_database(&self) -> anyhow::Result<()> {
        let url = self.postgres.lock().await.url("postgres");
        let mut conn = shop::connect(&url).await?;
        let old =
            "select datname::text from pg_database where datname ~ '^demo_[0-9a-f]{8}$' order by oid desc offset $1";
        let old: Vec<String> = sqlx::query_scalar(old).bind(DATABASES_KEPT).fetch_all(&mut conn).await?;
        // Names of this pattern need no quotes.
        for name in old {
            conn.execute(AssertSqlSafe(format!("drop database if exists {name} with (force)"))).await?;
        }
        conn.execute(AssertSqlSafe(format!("create database {}", self.name))).await?;
        crate::db::close(conn).await;
        crate::migrate::migrate(&self.database_url).await?;
        shop::open(&self.database_url).await
    }

    /// Orders and faults side by side, then the customers' last messages; whether all of them arrived.
    async fn trade(
        &self,
        children: &Children,
        counter: &Arc<Counter>,
        progress: &Progress,
    ) -> anyhow::Result<(Done, bool)> {
        // Long enough for each fault to meet work under way, and for the next to meet its recovery.
        let span = Duration::from_secs(match self.faults {
            Faults::None => 3,
            Faults::Some => 14,
            Faults::Many => 32,
        });
        // Slow machines, restarts, and a hundred orders a second on top.
        let limit = span + Duration::from_secs(180 + self.orders / 100);
        let targets = Targets {
            children,
            postgres: &self.postgres,
            rabbit: &self.rabbit,
            database_url: &self.database_url,
            counter,
            progress,
        };
        let plan = faults::plan(self.seed, self.faults, self.orders);
        let selling = async {
            shop::sell(&self.database_url, self.seed, self.orders, span, counter).await?;
            progress.note("all orders are placed");
            anyhow::Ok(())
        };
        let both = async { tokio::try_join!(selling, targets.execute(&plan)) };
        let ((), done) = tokio::time::timeout(limit, both)
            .await
            .with_context(|| format!("orders and faults did not end within {} s", limit.as_secs()))??;
        let faults_over = std::time::Instant::now();
        shop::close_accounts(&self.database_url).await?;
        let mut conn = shop::connect(&self.database_url).await?;
        while !is_drained(&mut conn).await? {
            if faults_over.elapsed() > DRAIN_LIMIT {
                return Ok((done, false));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        crate::db::close(conn).await;
        let seconds = faults_over.elapsed().as_secs_f64();
        progress
            .note(&format!("every customer has their final statement, {seconds:.1} s after the last fault and order"));
        Ok((done, true))
    }

    /// Shows the progress and replaces children that ended by themselves; ends only when that fails.
    async fn watch(&self, children: &Children, counter: &Counter, progress: &Progress) -> anyhow::Error {
        let mut session = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            match children.replace_ended().await {
                Ok(ended) => ended.iter().for_each(|what| progress.note(what)),
                Err(error) => return error,
            }
            session = self.show(counter, session, progress).await;
        }
    }

    async fn show(
        &self,
        counter: &Counter,
        session: Option<PgConnection>,
        progress: &Progress,
    ) -> Option<PgConnection> {
        let ordered = counter.committed.load(Ordering::Relaxed);
        let Some((conn, (published, invoiced))) = look(&self.database_url, session).await else {
            progress.show(Counts { ordered, ..Counts::default() });
            return None;
        };
        // The settled place is saved now and then: what is invoiced was surely published.
        progress.show(Counts { ordered, published: published.max(invoiced), invoiced });
        Some(conn)
    }

    /// Removes the vhost, and leaves both servers running.
    async fn tear_down(&self) -> anyhow::Result<()> {
        let mut postgres = self.postgres.lock().await;
        if !postgres.is_alive() {
            postgres.restart().await.context("the private PostgreSQL did not come back")?;
        }
        let mut rabbit = self.rabbit.lock().await;
        if !rabbit.is_alive() {
            rabbit.restart().await.context("the private RabbitMQ did not come back")?;
        }
        // It is not there yet when the performance ended early.
        let _ = rabbit.ctl(&["await_startup"]).await;
        let _ = rabbit.ctl(&["delete_vhost", &self.name]).await;
        Ok(())
    }

    fn hint(&self) -> String {
        let psql = match self.dir == Path::new(".dev") {
            true => "./dev psql".to_owned(),
            false => format!("oncebox node psql --dir {}", self.dir.display()),
        };
        format!("to look at it: {psql}, then \\c {}; logs in {}", self.name, self.logs().display())
    }
}

async fn is_drained(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let drained = "select (select count(*) from billing.statement) >= (select count(*) from shop.customer)
        and not exists (select from oncebox.saga where ended_at is null)
        and not exists (select from oncebox.outbox_held where state = 'waiting')
        and not exists (select from oncebox.inbox_held where state = 'waiting')";
    sqlx::query_scalar(drained).fetch_one(conn).await
}

/// Messages of orders that the relays have settled, about, and invoices; none while the database is away.
async fn look(url: &str, session: Option<PgConnection>) -> Option<(PgConnection, (u64, u64))> {
    let mut conn = match session {
        Some(conn) => conn,
        None => shop::connect(url).await.ok()?,
    };
    let counts = "select
        (select count(*) from oncebox.outbox as o join oncebox.outbox_lease as l using (lane)
            where o.seq <= l.settled_seq and o.topic = 'order.placed'),
        (select count(*) from billing.invoice)";
    let (published, invoiced): (i64, i64) = sqlx::query_as(counts).fetch_one(&mut conn).await.ok()?;
    Some((conn, (published as u64, invoiced as u64)))
}
