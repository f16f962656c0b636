//! The servers a benchmark runs on: given ones, or private ones that it starts and ends.
//!
//! Private servers have fsync on and their products' default settings: a figure without them would be of a system that
//! nobody runs.

use super::cpu::{Meter, Pids};
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::config::{Config, ConfigError};
use crate::node::{Postgres, PostgresOptions, Rabbit, RabbitOptions};
use anyhow::{Context, bail};
use clap::Args;
use sqlx::{Connection, PgConnection};
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(super) struct ServerOptions {
    /// Start private servers even if URLs are given by environment or config
    #[arg(long, global = true, conflicts_with_all = ["postgres_pid", "broker_pid"])]
    private: bool,
    /// Folder for the private servers' data [default: a new one in the temp folder]
    #[arg(long, global = true, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    /// Pid of the postmaster behind a given database URL on this machine, to measure its CPU
    #[arg(long, global = true, value_name = "PID")]
    postgres_pid: Option<u32>,
    /// Pid of the Erlang machine behind a given AMQP URL on this machine, to measure its CPU
    #[arg(long, global = true, value_name = "PID")]
    broker_pid: Option<u32>,
}

/// Which servers a benchmark needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needs {
    pub(super) postgres: bool,
    pub(super) broker: bool,
}

impl Needs {
    pub(super) const BOTH: Self = Self { postgres: true, broker: true };
    pub(super) const BROKER: Self = Self { postgres: false, broker: true };
    pub(super) const POSTGRES: Self = Self { postgres: true, broker: false };
}

/// The servers of one run. Private ones end, data included, when this is dropped.
pub(super) struct Servers {
    database_url: Option<String>,
    amqp_url: Option<String>,
    pids: Pids,
    // Before the folder they live in.
    postgres: Option<Postgres>,
    rabbit: Option<Rabbit>,
    _folder: Option<Folder>,
}

/// A folder that goes when it is dropped, if it is ours.
struct Folder {
    path: PathBuf,
    ours: bool,
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.ours {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

impl Servers {
    /// Finds or starts what is needed.
    pub(super) async fn open(options: &ServerOptions, config: &Config, needs: Needs) -> anyhow::Result<Self> {
        let given = |there: bool| there && !options.private;
        let database_url = given(needs.postgres && config.has_database_url()).then(|| config.database_url());
        let amqp_url = given(needs.broker && config.has_amqp_url()).then(|| config.amqp_url());
        let mut servers = Self {
            database_url: database_url.transpose()?.map(str::to_owned),
            amqp_url: amqp_url.transpose()?.map(str::to_owned),
            pids: Pids {
                postgres: known(options.postgres_pid, "--postgres-pid", "postgres")?,
                broker: known(options.broker_pid, "--broker-pid", "beam")?,
            },
            postgres: None,
            rabbit: None,
            _folder: None,
        };
        let missing = Needs {
            postgres: needs.postgres && servers.database_url.is_none(),
            broker: needs.broker && servers.amqp_url.is_none(),
        };
        for (private, pid, option) in [
            (missing.postgres, options.postgres_pid, "--postgres-pid"),
            (missing.broker, options.broker_pid, "--broker-pid"),
        ] {
            if private && pid.is_some() {
                bail!(ConfigError { setting: option.to_owned(), reason: "goes with a given URL only".to_owned() });
            }
        }
        if missing.postgres || missing.broker {
            servers.start(options.dir.as_deref(), missing).await?;
        }
        Ok(servers)
    }

    async fn start(&mut self, dir: Option<&Path>, missing: Needs) -> anyhow::Result<()> {
        let name = format!("oncebox-bench-{}", uuid::Uuid::now_v7().simple());
        let path = dir.map_or_else(|| std::env::temp_dir().join(name), Path::to_owned);
        let ours = !path.exists();
        fs::create_dir_all(&path).with_context(|| format!("--dir {}", path.display()))?;
        self._folder = Some(Folder { path: path.clone(), ours });
        if missing.postgres {
            eprintln!("starting a private PostgreSQL …");
            let postgres = Postgres::start(&path, PostgresOptions::default()).await?;
            postgres.create_database("oncebox").await?;
            self.database_url = Some(postgres.url("oncebox"));
            self.pids.postgres = postgres.pid();
            self.postgres = Some(postgres);
        }
        if missing.broker {
            eprintln!("starting a private RabbitMQ …");
            let rabbit = Rabbit::start(&path, RabbitOptions::default()).await?;
            self.amqp_url = Some(rabbit.url("/"));
            self.pids.broker = rabbit.pid();
            self.rabbit = Some(rabbit);
        }
        Ok(())
    }

    /// Ends private servers; reports of given ones nothing.
    pub(super) fn end(self) {
        drop(self);
    }

    pub(super) fn database_url(&self) -> anyhow::Result<&str> {
        self.database_url.as_deref().context("this benchmark was started without a database")
    }

    pub(super) fn amqp_url(&self) -> anyhow::Result<&str> {
        self.amqp_url.as_deref().context("this benchmark was started without a broker")
    }

    pub(super) fn pids(&self) -> Pids {
        self.pids
    }

    /// Starts the clock, of CPU too.
    pub(super) fn meter(&self) -> Meter {
        Meter::start(self.pids)
    }

    /// What a reader must know of the servers, in words.
    pub(super) async fn facts(&self) -> anyhow::Result<Vec<(String, String)>> {
        let mut facts = Vec::new();
        let mut fact = |name: &str, value: String| facts.push((name.to_owned(), value));
        if let Some(url) = &self.database_url {
            let mut conn = PgConnection::connect(url).await?;
            let query = "
                select name || case unit when '8kB' then ', 8 kB pages' else '' end, setting from pg_catalog.pg_settings
                where name in ('server_version', 'fsync', 'synchronous_commit', 'full_page_writes', 'shared_buffers')
                order by array_position(array['server_version', 'fsync', 'synchronous_commit'], name), name";
            let settings: Vec<(String, String)> = sqlx::query_as(query).fetch_all(&mut conn).await?;
            conn.close().await?;
            fact("Postgres", if self.postgres.is_some() { "private" } else { "given" }.to_owned());
            for (name, value) in settings {
                fact(&format!("Postgres {name}"), value);
            }
        }
        if let Some(url) = &self.amqp_url {
            let (major, minor) = RabbitMq::new(RabbitMqOptions::new(url))?.server_version().await?;
            fact("RabbitMQ", if self.rabbit.is_some() { "private" } else { "given" }.to_owned());
            fact("RabbitMQ version", format!("{major}.{minor}"));
        }
        if let Some(folder) = &self._folder {
            let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
            for (what, sub) in [("Postgres", "postgres"), ("RabbitMQ", "rabbitmq")] {
                if let Ok(path) = folder.path.join(sub).canonicalize() {
                    fact(&format!("{what} file system"), file_system(&mounts, &path).unwrap_or("unknown").to_owned());
                }
            }
        }
        Ok(facts)
    }

    /// Why CPU figures are missing, if they are.
    pub(super) fn silent(&self) -> Option<String> {
        let postgres = self.database_url.is_some() && self.pids.postgres.is_none();
        let broker = self.amqp_url.is_some() && self.pids.broker.is_none();
        let whose = match (postgres, broker) {
            (true, true) => "Postgres and the broker",
            (true, false) => "Postgres",
            (false, true) => "the broker",
            (false, false) => return None,
        };
        Some(format!(
            "CPU of {whose} is not measured: the server is given, not ours; --postgres-pid and --broker-pid name local ones"
        ))
    }
}

/// A pid that an operator gave, checked against what it should be: a figure of another process would be a lie.
fn known(pid: Option<u32>, option: &str, name: &str) -> Result<Option<u32>, ConfigError> {
    let Some(pid) = pid else { return Ok(None) };
    let found = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if found.starts_with(name) {
        return Ok(Some(pid));
    }
    let found = if found.is_empty() { "no process here" } else { found.trim() };
    Err(ConfigError { setting: option.to_owned(), reason: format!("{pid} is {found}, not {name}") })
}

/// The file system that a path lies on: the longest mount point above it.
fn file_system<'a>(mounts: &'a str, path: &Path) -> Option<&'a str> {
    let entry = |line: &'a str| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?, words.next()?))
    };
    let above = mounts.lines().filter_map(entry).filter(|(point, _)| path.starts_with(point));
    above.max_by_key(|(point, _)| point.len()).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: data in memory are seen as such.
    #[test]
    fn the_longest_mount_point_counts() {
        let mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/vdb /tmp2 xfs rw 0 0";
        assert_eq!(file_system(mounts, Path::new("/tmp/x")), Some("tmpfs"));
        assert_eq!(file_system(mounts, Path::new("/tmp2/x")), Some("xfs"));
        assert_eq!(file_system(mounts, Path::new("/home")), Some("ext4"));
    }

    /// Goal: a pid of something else is refused, with the option's name.
    #[test]
    fn a_wrong_pid_is_refused() {
        let error = known(Some(std::process::id()), "--postgres-pid", "postgres").expect_err("this is no Postgres");
        assert!(error.to_string().starts_with("--postgres-pid: "), "{error}");
        assert_eq!(known(None, "--postgres-pid", "postgres").expect("nothing to check"), None);
    }
}
