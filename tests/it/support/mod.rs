//! Private servers and processes for tests.
//!
//! Most tests share one Postgres and one RabbitMQ, each with a database and a vhost of its own ([`Lab::shared`]);
//! those that kill or freeze a server get their own ([`Lab::own`]). Everything goes when the test, or the whole test
//! process, ends however it ends.

pub mod amqp_peer;
pub mod api;
pub mod endpoint;
pub mod participant;
pub mod process;
pub mod proxy;
pub mod rabbit;
pub mod saga;
pub mod storm;
pub mod wire;

pub use process::Process;
pub use rabbit::{TestRabbit, own_rabbit, rabbit};

use oncebox::node::{Postgres, PostgresOptions, Rabbit, RabbitOptions};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The program under test.
pub const ONCEBOX: &str = env!("CARGO_BIN_EXE_oncebox");

/// Longest wait for anything that should happen: generous, for a loaded machine.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A folder of this test process.
pub fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{}", std::process::id(), unique(name)));
    std::fs::create_dir_all(&folder).expect("a folder for the test");
    folder
}

/// A name that no other test of this process uses.
pub fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("{name}_{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The shared nodes' folder. They belong to a child that stops them when its input ends, as it does with us.
pub fn shared_nodes() -> &'static Path {
    static NODES: OnceLock<(PathBuf, Child)> = OnceLock::new();
    let (dir, _) = NODES.get_or_init(|| {
        let dir = folder("nodes");
        let mut child = Command::new(ONCEBOX)
            .args(["node", "hold", "--dir"])
            .arg(&dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("readable");
        assert_eq!(line.trim(), "ready", "the shared nodes did not come up");
        (dir, child)
    });
    dir
}

/// A database with the schema, and a vhost.
pub struct Lab {
    pub name: String,
    pub database_url: String,
    pub amqp_url: String,
    pub postgres: Postgres,
    pub rabbit: Rabbit,
}

impl Lab {
    /// On the shared servers.
    pub async fn shared() -> Self {
        let postgres = Postgres::attach(shared_nodes()).await.expect("the shared Postgres runs");
        let rabbit = Rabbit::attach(shared_nodes()).await.expect("the shared RabbitMQ runs");
        Self::on(postgres, rabbit).await
    }

    /// On servers of its own, to be killed and frozen.
    pub async fn own() -> Self {
        Self::own_with(PostgresOptions::default()).await
    }

    /// On servers of its own, Postgres with other settings.
    pub async fn own_with(options: PostgresOptions) -> Self {
        let dir = folder("own");
        let postgres = Postgres::start(&dir, options).await.expect("Postgres starts");
        let rabbit = Rabbit::start(&dir, RabbitOptions::default()).await.expect("RabbitMQ starts");
        Self::on(postgres, rabbit).await
    }

    /// On the shared Postgres and a RabbitMQ of its own with the management API.
    pub async fn with_management() -> Self {
        Self::with_rabbit(RabbitOptions { management: true, ..RabbitOptions::default() }).await
    }

    /// On the shared Postgres and a RabbitMQ of its own with other settings.
    pub async fn with_rabbit(options: RabbitOptions) -> Self {
        let postgres = Postgres::attach(shared_nodes()).await.expect("the shared Postgres runs");
        let rabbit = Rabbit::start(&folder("rabbit"), options).await.expect("RabbitMQ starts");
        Self::on(postgres, rabbit).await
    }

    async fn on(postgres: Postgres, rabbit: Rabbit) -> Self {
        let name = unique("lab");
        postgres.create_database(&name).await.expect("a database");
        rabbit.add_vhost(&name).await.expect("a vhost");
        let lab = Self { database_url: postgres.url(&name), amqp_url: rabbit.url(&name), name, postgres, rabbit };
        // Roles belong to the whole cluster: the first migration makes them while no other looks for them.
        static FIRST: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let _turn = FIRST.lock().await;
        oncebox::migrate::migrate(&lab.database_url).await.expect("the migrations apply");
        lab
    }

    /// A superuser's session.
    pub async fn connect(&self) -> PgConnection {
        connect(&self.database_url).await
    }

    /// Runs SQL text as superuser.
    pub async fn sql(&self, text: &str) {
        let mut conn = self.connect().await;
        conn.execute(AssertSqlSafe(text)).await.unwrap_or_else(|error| panic!("{text}: {error}"));
    }

    /// One number.
    pub async fn number(&self, query: &str) -> i64 {
        number(&mut self.connect().await, query).await
    }

    /// From now on commits wait for a synchronous standby that never comes.
    pub async fn require_absent_standby(&self) {
        self.sql("alter system set synchronous_standby_names = 'nobody'").await;
        self.sql("select pg_reload_conf()").await;
        eventually("the setting is in force", async || {
            let set = "select (current_setting('synchronous_standby_names') = 'nobody')::int::bigint";
            (self.number(set).await == 1).then_some(())
        })
        .await;
    }

    /// Commits wait for no standby any more.
    pub async fn require_no_standby(&self) {
        self.sql("alter system reset synchronous_standby_names").await;
        self.sql("select pg_reload_conf()").await;
    }

    /// The program with this lab's URLs.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(ONCEBOX);
        command.args(args);
        for name in ["ONCEBOX_CONFIG", "ONCEBOX_LISTEN", "ONCEBOX_FAILPOINT"] {
            command.env_remove(name);
        }
        command.env("ONCEBOX_DATABASE_URL", &self.database_url).env("ONCEBOX_AMQP_URL", &self.amqp_url);
        command
    }

    /// Starts the program with this lab's URLs.
    pub fn spawn(&self, args: &[&str]) -> Process {
        Process::spawn(self.command(args))
    }

    /// Starts a relay and waits until it holds its lane.
    pub async fn relay(&self) -> Process {
        let relay = self.spawn(&["relay"]);
        relay.wait_for_log("lane resumed").await;
        relay
    }

    /// A config file with these consumers, and how `consume` is told of it.
    pub fn config(&self, text: &str) -> String {
        let path = folder("config").join("oncebox.toml");
        std::fs::write(&path, text).expect("a config file");
        path.to_str().expect("a path in UTF-8").to_owned()
    }

    /// Starts a consumer process and waits until it consumes.
    pub async fn consume(&self, config: &str) -> Process {
        let consumer = self.spawn(&["consume", "--config", config]);
        consumer.wait_for_log("consuming").await;
        consumer
    }
}

/// A superuser's session.
pub async fn connect(url: &str) -> PgConnection {
    PgConnection::connect(url).await.unwrap_or_else(|error| panic!("{url}: {error}"))
}

/// One number.
pub async fn number(conn: &mut PgConnection, query: &str) -> i64 {
    let number = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(conn).await;
    number.unwrap_or_else(|error| panic!("{query}: {error}"))
}

/// Waits until `look` finds something, or fails the test by name.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < LIMIT, "did not happen within {LIMIT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until a query gives this number.
pub async fn eventually_number(conn: &mut PgConnection, query: &str, expected: i64) {
    let began = Instant::now();
    let mut found = number(conn, query).await;
    while found != expected {
        assert!(began.elapsed() < LIMIT, "{query}: {found}, not {expected}, after {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
        found = number(conn, query).await;
    }
}
